//! Cases of ProGrad.

use anyhow::{Context, Result};
use cliptune_core::method::{Predictor, Settings};
use cliptune_core::prompt::{ClassTokenPosition, ClassTokens, placeholder};
use cliptune_core::task::ImageBatch;
use cliptune_core::train::{Batch, Objective};
use cliptune_core::{Gradients, ImageNeeds, Learned};
use cliptune_text_pt::{ProGrad, ProGradConfig};
use serde::Deserialize;
use serde_json::json;

use super::case::{Case, Models};
use super::check::{AFTER, Check, START};
use super::objective;
use super::text_pt::{compare_start, compare_tokens};

#[derive(Deserialize)]
struct Json {
    n_ctx: usize,
    ctx_init: bool,
    csc: bool,
    class_token_position: ClassTokenPosition,
    dataset: String,
    template: String,
    temperature: f64,
    lambda: f64,
}

pub(crate) fn run(case: &Case, models: &mut Models, check: &mut Check) -> Result<()> {
    let clip = models.of(case)?;
    let json: Json = case.config()?;
    let config = ProGradConfig {
        n_ctx: json.n_ctx,
        ctx_init: json.ctx_init,
        class_specific: json.csc,
        class_token_position: json.class_token_position,
        template: Some(json.template.clone()),
        temperature: json.temperature,
        lambda: json.lambda,
        ..ProGradConfig::default()
    };
    // Our table must give the template that the case spells out.
    let by_name = ProGradConfig::read(&json!({"dataset": json.dataset, "ctx_init": false}))?;
    let own = by_name.sentence()?;
    let failure = (own != json.template).then(|| format!("our template is {own:?}"));
    check.record("config.template", 0.0, failure);

    let classes = case.classes()?;
    let tokens = ClassTokens::new(clip.text(), &classes)?;
    let words = match json.ctx_init {
        true => {
            let fresh = Learned::<ProGrad>::new(&config, &clip, &classes, 0)?;
            compare_start(case, fresh.params(), "ctx", check)?;
            let words = json.template.trim_end_matches(" {}.");
            let zeros = json.n_ctx - words.split(' ').count();
            format!("{} {words}", placeholder(zeros)).trim().to_owned()
        }
        false => placeholder(json.n_ctx),
    };
    compare_tokens(case, &clip, &tokens, &words, json.n_ctx, "init", check)?;

    let mut method =
        Learned::<ProGrad>::with_tensors(&config, &clip, &classes, 0, &case.initial()?)?;
    let images = ImageBatch::encode(&clip, case.tensor("images")?, ImageNeeds::GlobalFeatures)?;
    let teacher = method.teacher_features(&clip, &tokens)?;
    check.tensor(case, "expect.teacher_text_features", &teacher, START)?;
    let teacher = clip.unit_logits(images.features()?, &teacher)?;
    check.tensor(case, "expect.teacher_logits", &teacher, START)?;
    let before = method.classifier(&clip, &classes)?.logits(&images)?;
    check.tensor(case, "expect.logits", &before, START)?;

    let labels = case.ids("labels")?;
    let batch = Batch {
        images: &images,
        labels: &labels,
        classes: &tokens,
    };
    let loss = method.loss(&clip, &batch, objective::FIRST)?;
    for (name, loss) in [("xe", Some(&loss.total)), ("kl", loss.term("kl"))] {
        let gradients = Gradients::of(loss.context("no such term")?, method.params())?;
        let gradient = gradients.get("ctx").context("no gradient")?;
        check.tensor(case, &format!("expect.grad_{name}.ctx"), gradient, START)?;
    }
    let mut cosines = Vec::new();
    objective::train_watched(case, &clip, &mut method, &batch, check, &mut |method| {
        cosines.push(method.cosine().context("no cosine")?);
        Ok(())
    })?;
    check.list(case, "expect.cosines", &cosines, AFTER)?;
    let after = method.classifier(&clip, &classes)?.logits(&images)?;
    check.tensor(case, "expect.logits_after", &after, AFTER)
}
