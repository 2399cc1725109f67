//! Cases of DPT with CAVPT.

use std::collections::BTreeMap;

use anyhow::{Context, Result, bail};
use candle_core::Tensor;
use cliptune_core::method::Predictor;
use cliptune_core::prompt::{ClassTokenPosition, ClassTokens};
use cliptune_core::schedule::{Schedule, Warmup};
use cliptune_core::task::ImageBatch;
use cliptune_core::train::{Batch, Objective};
use cliptune_core::{Clip, Learned, templates};
use cliptune_multimodal_pt::cavpt::Variant;
use cliptune_multimodal_pt::{Cavpt, CavptConfig};
use serde::Deserialize;

use super::case::{Case, Models};
use super::check::{AFTER, Check, START};
use super::objective::{self, Course};
use super::text_pt::{compare_start, compare_tokens, words};

#[derive(Deserialize)]
struct CavptCase {
    variant: Variant,
    n_ctx: usize,
    ctx_init: String,
    csc: bool,
    class_token_position: ClassTokenPosition,
    vpt_n_ctx: usize,
    template: String,
    dataset: Option<String>,
    guidance_epochs: usize,
    guidance_main_weight: f64,
    class_prompt_num: Option<usize>,
    bottom_limit: Option<usize>,
    alpha: Option<f64>,
    generator_n_ctx: Option<usize>,
    attention_dim: Option<usize>,
    schedule: Groups,
}

/// What the authors' schedule says beside what all cases' say.
#[derive(Deserialize)]
struct Groups {
    lr: f64,
    max_epoch: usize,
    #[serde(default)]
    warmup_epoch: usize,
    warmup_cons_lr: Option<f64>,
    batches_per_epoch: usize,
    text_lr: f64,
    text_warmup_epoch: usize,
}

impl CavptCase {
    fn config(&self) -> CavptConfig {
        let defaults = CavptConfig::default();
        let mut config = CavptConfig {
            variant: self.variant,
            n_ctx: Some(self.n_ctx),
            ctx_init: Some(self.ctx_init.clone()),
            class_specific: self.csc,
            class_token_position: self.class_token_position,
            vpt_n_ctx: self.vpt_n_ctx,
            class_prompt_num: self.class_prompt_num.unwrap_or(defaults.class_prompt_num),
            bottom_limit: self.bottom_limit,
            generator_n_ctx: self.generator_n_ctx.unwrap_or(defaults.generator_n_ctx),
            attention_dim: self.attention_dim.unwrap_or(defaults.attention_dim),
            alpha: self.alpha.unwrap_or(defaults.alpha),
            guidance_epochs: self.guidance_epochs,
            guidance_main_weight: self.guidance_main_weight,
            template: Some(self.template.clone()),
            text_lr: self.schedule.text_lr,
            text_warmup_epochs: self.schedule.text_warmup_epoch,
            ..defaults
        };
        config.train.lr = self.schedule.lr;
        config.train.schedule = Schedule {
            warmup: Warmup::Constant {
                epochs: self.schedule.warmup_epoch,
                lr: self.schedule.warmup_cons_lr.unwrap_or(1e-5),
            },
            ..Schedule::coop()
        };
        config
    }
}

/// The group of the authors' optimisers that a parameter belongs to.
fn group(param: &str) -> &'static str {
    match param {
        _ if param.contains("ctx_learner") => "visual",
        _ if param.contains("extractor") => "generator",
        _ => "text",
    }
}

pub(crate) fn run(case: &Case, models: &mut Models, check: &mut Check) -> Result<()> {
    let clip = models.of(case)?;
    let json: CavptCase = case.config()?;
    let config = json.config();
    // Where the case names the authors' data set, our own table must give the same sentence.
    if let Some(own) = json.dataset.as_deref().map(templates::for_dataset) {
        let own = own.unwrap_or(templates::DEFAULT);
        let failure = (own != json.template).then(|| format!("our template is {own:?}"));
        check.record("config.template", 0.0, failure);
    }
    let classes = case.classes()?;
    let tokens = ClassTokens::new(clip.text(), &classes)?;
    let words = words(&json.ctx_init, json.n_ctx);
    if !json.ctx_init.is_empty() {
        let fresh = Learned::<Cavpt>::new(&config, &clip, &classes, 0)?;
        compare_start(case, fresh.params(), "prompt_learner.ctx", check)?;
    }
    let buffers = "init.prompt_learner";
    compare_tokens(case, &clip, &tokens, &words, json.n_ctx, buffers, check)?;
    let mut method = Learned::<Cavpt>::with_tensors(&config, &clip, &classes, 0, &case.initial()?)?;
    forward(case, &clip, &method, &tokens, check)?;

    let images = ImageBatch::encode(&clip, case.tensor("images")?, method.needs())?;
    let logits = |method: &Learned<Cavpt>| -> Result<Tensor> {
        Ok(method.classifier(&clip, &classes)?.logits(&images)?)
    };
    check.tensor(case, "expect.logits", &logits(&method)?, START)?;
    let labels = case.ids("labels")?;
    let batch = Batch {
        images: &images,
        labels: &labels,
        classes: &tokens,
    };
    let rates = rates(case, &config, &json.schedule, &method, check)?;
    let course = Course {
        batches: json.schedule.batches_per_epoch,
        epochs: json.schedule.max_epoch,
        rate: &|param, step| rates[param][step],
    };
    let watch = &mut |_: &Learned<Cavpt>| Ok(());
    objective::train_along(case, &clip, &mut method, (&batch, &course), check, watch)?;
    check.tensor(case, "expect.logits_after", &logits(&method)?, AFTER)
}

/// All that the first step computes, piece by piece.
fn forward(
    case: &Case,
    clip: &Clip,
    method: &Cavpt,
    classes: &ClassTokens,
    check: &mut Check,
) -> Result<()> {
    let pixels = case.tensor("images")?;
    let text = method.text_features(clip, classes)?;
    check.tensor(case, "expect.text_features", &text, START)?;
    let frozen = method.frozen_text_features(clip, classes)?;
    check.tensor(case, "expect.frozen_text_features", &frozen, START)?;
    let plain = clip.image().encode(pixels)?;
    check.tensor(case, "expect.zeroshot_image_features", &plain, START)?;
    let candidates = method.candidates(clip, &plain, &frozen)?;
    if let Some(candidates) = &candidates {
        check.tensor(case, "expect.candidates", candidates, 0.0)?;
    }
    let seen = method.see(clip, pixels, &text, candidates.as_ref())?;
    check.tensor(case, "expect.image_features", &seen.features, START)?;
    if let Some(logits) = &seen.class_logits {
        check.tensor(case, "expect.aux_logits", logits, START)?;
    }
    let of_text = clip.cosine_logits(&plain, &text)?;
    check.tensor(case, "expect.logits_text", &of_text, START)?;
    let of_image = clip.unit_logits(&seen.features, &frozen)?;
    check.tensor(case, "expect.logits_image", &of_image, START)
}

/// The case's rates of every parameter by step; the method's own must be the same.
fn rates<'a>(
    case: &'a Case,
    config: &CavptConfig,
    schedule: &Groups,
    method: &Learned<Cavpt>,
    check: &mut Check,
) -> Result<BTreeMap<String, &'a [f64]>> {
    let mut all = BTreeMap::new();
    for param in method.params().iter() {
        let group = group(param.name());
        let expected = case.json.lr_per_step_groups.get(group);
        let expected = expected.with_context(|| format!("no rates of `{group}`"))?;
        if expected.len() != case.json.lr_per_step.len() {
            bail!("`{group}` has {} rates", expected.len());
        }
        let rate = |step: usize| {
            let epoch = step / schedule.batches_per_epoch.max(1);
            let own = method.rate(param.name(), epoch, schedule.max_epoch);
            let recipe = &config.train;
            let shared = || recipe.schedule.rate(recipe.lr, epoch, schedule.max_epoch);
            own.unwrap_or_else(shared)
        };
        let ours: Vec<f64> = (0..expected.len()).map(rate).collect();
        let name = format!("lr_per_step_groups.{}", param.name());
        check.numbers(&name, &ours, expected, 1e-9);
        all.insert(param.name().to_owned(), expected.as_slice());
    }
    Ok(all)
}
