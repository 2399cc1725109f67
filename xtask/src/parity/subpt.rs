//! Cases of SubPT and its novel feature learner.

use anyhow::{Context, Result, ensure};
use candle_core::{D, Tensor};
use cliptune_core::method::Predictor;
use cliptune_core::prompt::{ClassTokenPosition, ClassTokens};
use cliptune_core::subspace::Subspace;
use cliptune_core::task::ImageBatch;
use cliptune_core::templates;
use cliptune_core::train::{Batch, Objective};
use cliptune_core::{Gradients, ImageNeeds, Learned};
use cliptune_text_pt::subpt::{SubPt, SubPtConfig, Variant};
use serde::Deserialize;

use super::case::{Case, Models};
use super::check::{AFTER, Check, START};
use super::objective;
use super::text_pt::{compare_start, compare_tokens, words};

#[derive(Deserialize)]
struct Json {
    variant: Variant,
    n_ctx: usize,
    ctx_init: String,
    csc: bool,
    class_token_position: ClassTokenPosition,
    dataset: String,
    template: String,
    finish: Option<usize>,
    dim: Option<usize>,
    lambda: Option<f64>,
    loss_type: Option<String>,
    #[serde(default)]
    nfl_classnames: Vec<String>,
}

pub(crate) fn run(case: &Case, models: &mut Models, check: &mut Check) -> Result<()> {
    let clip = models.of(case)?;
    let json: Json = case.config()?;
    if let Some(other) = json.loss_type.as_deref().filter(|&kind| kind != "cosine") {
        anyhow::bail!("config.loss_type `{other}` cannot run in the authors' code either");
    }
    let config = SubPtConfig {
        variant: json.variant,
        n_ctx: json.n_ctx,
        ctx_init: Some(json.ctx_init.clone()),
        class_specific: json.csc,
        class_token_position: json.class_token_position,
        n_early: json.finish,
        rank: json.dim,
        lambda: json.lambda.unwrap_or(1.0),
        novel_classes: json.nfl_classnames.clone(),
        dataset: Some(json.dataset.clone()),
        ..SubPtConfig::default()
    };
    let own = templates::type_first(&json.dataset)?;
    let failure = (own != json.template).then(|| format!("our template is {own:?}"));
    check.record("config.template", 0.0, failure);

    let classes = case.classes()?;
    let tokens = ClassTokens::new(clip.text(), &classes)?;
    if !json.ctx_init.is_empty() {
        let fresh = Learned::<SubPt>::new(&config, &clip, &classes, 0)?;
        compare_start(case, fresh.params(), "ctx", check)?;
    }
    let words = words(&json.ctx_init, json.n_ctx);
    compare_tokens(case, &clip, &tokens, &words, json.n_ctx, "init", check)?;
    if let (Some(finish), Some(dim)) = (json.finish, json.dim) {
        components(case, finish, dim, check)?;
    }

    let mut method = Learned::<SubPt>::with_tensors(&config, &clip, &classes, 0, &case.initial()?)?;
    if let Some((learned, anchors)) = method.novel_features(&clip)? {
        check.tensor(case, "expect.nfl_text_features", &learned, START)?;
        check.tensor(case, "input.nfl_text_features", &anchors, START)?;
    }
    let images = ImageBatch::encode(&clip, case.tensor("images")?, ImageNeeds::GlobalFeatures)?;
    let before = method.classifier(&clip, &classes)?.logits(&images)?;
    check.tensor(case, "expect.logits", &before, START)?;
    let labels = case.ids("labels")?;
    let batch = Batch {
        images: &images,
        labels: &labels,
        classes: &tokens,
    };
    if let Some(components) = case.get("input.components") {
        let loss = method.loss(&clip, &batch, objective::FIRST)?;
        let raw = Gradients::of(&loss.total, method.params())?;
        let raw = raw.get("ctx").context("no gradient")?;
        check.tensor(case, "expect.grad_raw.ctx", raw, START)?;
        method.project_onto(Subspace::from_components(components)?)?;
    }
    objective::train(case, &clip, &mut method, &batch, check)?;
    let after = method.classifier(&clip, &classes)?.logits(&images)?;
    check.tensor(case, "expect.logits_after", &after, AFTER)
}

/// The main directions of the case's contexts, each up to its sign.
fn components(case: &Case, finish: usize, dim: usize, check: &mut Check) -> Result<()> {
    let rows = case.tensor("input.checkpoints")?;
    ensure!(rows.dim(0)? == finish, "{finish} checkpoints are announced");
    let found = Subspace::principal(rows, dim)?;
    let ratio = &found.explained_variance_ratio;
    check.list(case, "expect.explained_variance_ratio", ratio, START)?;
    let ours = found.subspace.components()?;
    let expected = case.tensor("expect.components")?;
    let signs = (&ours * expected)?.sum_keepdim(D::Minus1)?.sign()?;
    let turned: Tensor = ours.broadcast_mul(&signs)?;
    check.tensor(case, "expect.components", &turned, START)
}
