//! Cases of PLOT.

use anyhow::Result;
use candle_core::{Device, Tensor};
use cliptune_core::method::Predictor;
use cliptune_core::prompt::{ClassTokenPosition, ClassTokens, placeholder};
use cliptune_core::task::ImageBatch;
use cliptune_core::train::Batch;
use cliptune_core::transport::Sinkhorn;
use cliptune_core::{ImageNeeds, Learned};
use cliptune_text_pt::{Plot, PlotConfig};
use serde::Deserialize;

use super::case::{Case, Models};
use super::check::{AFTER, Check, START};
use super::objective;
use super::text_pt::padded;

#[derive(Deserialize)]
struct Json {
    n: usize,
    n_ctx: usize,
    ctx_init: String,
    csc: bool,
    class_token_position: ClassTokenPosition,
    eps: f64,
    max_iter: usize,
    threshold: f64,
    add_pooled_logits: bool,
}

pub(crate) fn run(case: &Case, models: &mut Models, check: &mut Check) -> Result<()> {
    let clip = models.of(case)?;
    let json: Json = case.config()?;
    anyhow::ensure!(
        json.ctx_init.is_empty() && !json.csc,
        "PLOT has random, shared contexts only"
    );
    let config = PlotConfig {
        n_prompts: json.n,
        n_ctx: json.n_ctx,
        class_token_position: json.class_token_position,
        transport: Sinkhorn {
            eps: json.eps,
            max_iter: json.max_iter,
            threshold: json.threshold,
            ..Sinkhorn::default()
        },
        add_global: json.add_pooled_logits,
        ..PlotConfig::default()
    };
    let classes = case.classes()?;
    let tokens = ClassTokens::new(clip.text(), &classes)?;
    let sentences = tokens.sentences(&placeholder(json.n_ctx))?;
    let all: Vec<_> = (0..json.n).flat_map(|_| sentences.clone()).collect();
    let ids = padded(&all, clip.text().context_length())?;
    check.tensor(case, "input.tokenized_prompts", &ids, 0.0)?;

    let mut method = Learned::<Plot>::with_tensors(&config, &clip, &classes, 0, &case.initial()?)?;
    let images = ImageBatch::encode(&clip, case.tensor("images")?, ImageNeeds::LocalFeatures)?;
    let by_place = images.local_features()?.transpose(0, 1)?;
    check.tensor(case, "expect.image_features", &by_place, START)?;
    let text = method.text_features(&clip, &tokens)?;
    check.tensor(case, "expect.text_features", &text, START)?;
    let matched = method.matched(&clip, &images, &text)?;
    check.tensor(
        case,
        "expect.transport_plan",
        &matched.transport.plan,
        START,
    )?;
    let before = method.classifier(&clip, &classes)?.logits(&images)?;
    check.tensor(case, "expect.logits", &before, START)?;

    let labels = case.ids("labels")?;
    let batch = Batch {
        images: &images,
        labels: &labels,
        classes: &tokens,
    };
    let mut iterations = Vec::new();
    objective::train_watched(case, &clip, &mut method, &batch, check, &mut |method| {
        let text = method.text_features(&clip, &tokens)?;
        let of_step = method.matched(&clip, &images, &text)?.transport.iterations;
        iterations.push(i64::from(of_step[0]));
        Ok(())
    })?;
    let iterations = Tensor::new(iterations, &Device::Cpu)?;
    check.tensor(case, "expect.sinkhorn_iterations", &iterations, 0.0)?;
    let after = method.classifier(&clip, &classes)?.logits(&images)?;
    check.tensor(case, "expect.logits_after", &after, AFTER)
}
