//! Cases of VPT (variational).

use anyhow::Result;
use candle_core::{D, Tensor};
use cliptune_core::method::Classifier;
use cliptune_core::prompt::ClassTokens;
use cliptune_core::task::ImageBatch;
use cliptune_core::train::{Batch, Loss, Objective, Step};
use cliptune_core::{Classes, Clip, ImageNeeds, Learned, ops};
use cliptune_text_pt::vpt::VptType;
use cliptune_text_pt::{Vpt, VptConfig};
use serde::Deserialize;

use super::case::{Case, Models};
use super::check::{AFTER, Check, START};
use super::objective;
use super::text_pt::{compare_tokens, words};

#[derive(Deserialize)]
struct Json {
    vpt_type: VptType,
    l: usize,
    n_ctx: usize,
    ctx_init: String,
    kl_weight: f64,
    meta_net_hidden: Option<usize>,
}

/// The method with the case's noise in the place of what it draws.
#[derive(Debug)]
struct Noisy<'a> {
    vpt: &'a Vpt,
    /// `(steps, L, 1, width)`.
    noise: &'a Tensor,
}

impl Objective for Noisy<'_> {
    fn classifier<'a>(
        &'a self,
        clip: &'a Clip,
        classes: &Classes,
    ) -> cliptune_core::Result<Box<dyn Classifier + 'a>> {
        self.vpt.classifier(clip, classes)
    }

    fn loss(&self, clip: &Clip, batch: &Batch<'_>, step: Step) -> cliptune_core::Result<Loss> {
        self.vpt
            .loss_with(clip, batch, &self.noise.get(step.index)?)
    }
}

pub(crate) fn run(case: &Case, models: &mut Models, check: &mut Check) -> Result<()> {
    let clip = models.of(case)?;
    let json: Json = case.config()?;
    let config = VptConfig {
        n_ctx: Some(json.n_ctx),
        ctx_init: Some(json.ctx_init.clone()),
        vpt_type: json.vpt_type,
        samples: Some(json.l),
        kl_weight: json.kl_weight,
        ..VptConfig::default()
    };
    let classes = case.classes()?;
    let tokens = ClassTokens::new(clip.text(), &classes)?;
    let words = words(&json.ctx_init, json.n_ctx);
    compare_tokens(case, &clip, &tokens, &words, json.n_ctx, "init", check)?;
    if let Some(expected) = json.meta_net_hidden {
        let fresh = Learned::<Vpt>::new(&config, &clip, &classes, 0)?;
        let bias = fresh.params().get("meta_net.weight_mean.module.0.bias");
        let hidden = bias.map_or(0, |bias| bias.tensor().elem_count());
        let failure = (hidden != expected).then(|| format!("{hidden}"));
        check.record("config.meta_net_hidden", 0.0, failure);
    }

    let vpt = Learned::<Vpt>::with_tensors(&config, &clip, &classes, 0, &case.initial()?)?;
    let images = ImageBatch::encode(&clip, case.tensor("images")?, ImageNeeds::GlobalFeatures)?;
    check.tensor(case, "expect.image_features", images.features()?, START)?;
    let unit = ops::unit_length(images.features()?, "an image feature")?;
    // Raw text features and log-probabilities of the samples that `noise (L, 1, width)` makes.
    let sampled = |vpt: &Vpt, noise: &Tensor| -> Result<(Tensor, Tensor)> {
        let contexts = vpt.contexts(&vpt.posterior(&unit)?, noise)?;
        let text = vpt.text_features(&clip, &tokens, &contexts)?;
        let unit_text = ops::unit_length(&text, "a text feature")?;
        Ok((text, vpt.log_probs(&clip, &unit, &unit_text)?))
    };
    let (mean, log_variance) = vpt.posterior(&unit)?;
    check.tensor(case, "expect.mu", &mean, START)?;
    check.tensor(case, "expect.logvar", &log_variance, START)?;
    let (text, log_probs) = sampled(&vpt, case.tensor("noise.eval")?)?;
    check.tensor(case, "expect.text_features", &text.squeeze(1)?, START)?;
    check.tensor(case, "expect.sample_log_probs", &log_probs, START)?;
    let logits = ops::log_mean_exp(&log_probs)?;
    check.tensor(case, "expect.logits", &logits, START)?;
    let total = logits.exp()?.sum(D::Minus1)?;
    let ones = vec![1.0; total.elem_count()];
    check.numbers(
        "sum of probabilities",
        &super::check::values(&total)?,
        &ones,
        START,
    );

    let noise = case.tensor("noise.train")?;
    let (_, log_probs) = sampled(&vpt, &noise.get(0)?)?;
    check.tensor(case, "expect.train_sample_log_probs", &log_probs, START)?;
    let labels = case.ids("labels")?;
    let batch = Batch {
        images: &images,
        labels: &labels,
        classes: &tokens,
    };
    let noisy = Noisy { vpt: &vpt, noise };
    let mut noisy = Learned::of(noisy, vpt.params().clone());
    objective::train(case, &clip, &mut noisy, &batch, check)?;
    let (_, log_probs) = sampled(&vpt, case.tensor("noise.eval_after")?)?;
    let after = ops::log_mean_exp(&log_probs)?;
    check.tensor(case, "expect.logits_after", &after, AFTER)
}
