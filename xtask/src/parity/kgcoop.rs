//! Cases of KgCoOp.

use anyhow::{Result, ensure};
use cliptune_core::method::Predictor;
use cliptune_core::prompt::{ClassTokenPosition, ClassTokens};
use cliptune_core::task::ImageBatch;
use cliptune_core::train::Batch;
use cliptune_core::{ImageNeeds, Learned};
use cliptune_text_pt::{KgCoOp, KgCoOpConfig};
use serde::Deserialize;

use super::case::{Case, Models};
use super::check::{AFTER, Check, START};
use super::objective;
use super::text_pt::{compare_start, compare_tokens, words};

/// What the authors start from, whatever words are configured.
const WORDS: &str = "a photo of a";

#[derive(Deserialize)]
struct Json {
    n_ctx: usize,
    ctx_init: bool,
    csc: bool,
    class_token_position: ClassTokenPosition,
    w: f64,
    template: String,
    dataset: Option<String>,
}

pub(crate) fn run(case: &Case, models: &mut Models, check: &mut Check) -> Result<()> {
    let clip = models.of(case)?;
    let json: Json = case.config()?;
    // The authors read the position and put the name at the end all the same.
    let _ = json.class_token_position;
    let ctx_init = if json.ctx_init { WORDS } else { "" };
    let n_ctx = if json.ctx_init { 4 } else { json.n_ctx };
    let config = KgCoOpConfig {
        n_ctx: Some(n_ctx),
        ctx_init: Some(ctx_init.into()),
        class_specific: json.csc && !json.ctx_init,
        w: json.w,
        template: Some(json.template.clone()),
        ..KgCoOpConfig::default()
    };
    // Where the case names the authors' data set, our own table must give the same sentence.
    if json.dataset.is_some() {
        let of_dataset = KgCoOpConfig {
            template: None,
            dataset: json.dataset,
            ..KgCoOpConfig::default()
        };
        let own = of_dataset.sentences()?.templates().to_vec();
        let failure = (own != [json.template]).then(|| format!("our template is {own:?}"));
        check.record("config.template", 0.0, failure);
    }
    let classes = case.classes()?;
    let tokens = ClassTokens::new(clip.text(), &classes)?;
    let words = words(ctx_init, n_ctx);
    compare_tokens(case, &clip, &tokens, &words, n_ctx, "init", check)?;
    if json.ctx_init {
        let fresh = Learned::<KgCoOp>::new(&config, &clip, &classes, 0)?;
        compare_start(case, fresh.params(), "ctx", check)?;
    }

    // As an import: the dead tensors of a checkpoint are there and mean nothing.
    let mut tensors = case.initial()?;
    for name in case.names().filter_map(|name| name.strip_prefix("init.")) {
        tensors.insert(name.into(), case.tensor(&format!("init.{name}"))?.clone());
    }
    let mut method = Learned::<KgCoOp>::with_tensors(&config, &clip, &classes, 0, &tensors)?;
    ensure!(method.params().len() == 1, "only the context is learned");
    let images = ImageBatch::encode(&clip, case.tensor("images")?, ImageNeeds::GlobalFeatures)?;
    check.tensor(case, "expect.image_features", images.features()?, START)?;
    let targets = method.target_features(&clip, &tokens)?;
    check.tensor(case, "expect.frozen_text_features", &targets, START)?;
    let text = method.context.text_features(&clip, &tokens)?;
    check.tensor(case, "expect.text_features", &text, START)?;
    let before = method.classifier(&clip, &classes)?.logits(&images)?;
    check.tensor(case, "expect.logits", &before, START)?;
    let labels = case.ids("labels")?;
    let batch = Batch {
        images: &images,
        labels: &labels,
        classes: &tokens,
    };
    objective::train(case, &clip, &mut method, &batch, check)?;
    let after = method.classifier(&clip, &classes)?.logits(&images)?;
    check.tensor(case, "expect.logits_after", &after, AFTER)
}
