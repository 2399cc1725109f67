//! Cases of CoCoOp.

use anyhow::Result;
use cliptune_core::method::Predictor;
use cliptune_core::prompt::ClassTokens;
use cliptune_core::task::ImageBatch;
use cliptune_core::train::Batch;
use cliptune_core::{ImageNeeds, Learned, ops};
use cliptune_text_pt::{CoCoOp, CoCoOpConfig};
use serde::Deserialize;

use super::case::{Case, Models};
use super::check::{AFTER, Check, START};
use super::objective;
use super::text_pt::{compare_start, compare_tokens, words};

#[derive(Deserialize)]
struct Json {
    n_ctx: usize,
    ctx_init: String,
    meta_net_hidden: usize,
}

pub(crate) fn run(case: &Case, models: &mut Models, check: &mut Check) -> Result<()> {
    let clip = models.of(case)?;
    let json: Json = case.config()?;
    let config = CoCoOpConfig {
        n_ctx: Some(json.n_ctx),
        ctx_init: Some(json.ctx_init.clone()),
        ..CoCoOpConfig::default()
    };
    let classes = case.classes()?;
    let tokens = ClassTokens::new(clip.text(), &classes)?;
    let words = words(&json.ctx_init, json.n_ctx);
    compare_tokens(case, &clip, &tokens, &words, json.n_ctx, "init", check)?;
    let fresh = Learned::<CoCoOp>::new(&config, &clip, &classes, 0)?;
    if !json.ctx_init.is_empty() {
        compare_start(case, fresh.params(), "ctx", check)?;
    }
    let hidden = fresh.params().get("meta_net.linear1.bias");
    let hidden = hidden.map_or(0, |bias| bias.tensor().elem_count());
    let failure = (hidden != json.meta_net_hidden).then(|| format!("{hidden}"));
    check.record("config.meta_net_hidden", 0.0, failure);

    let mut method =
        Learned::<CoCoOp>::with_tensors(&config, &clip, &classes, 0, &case.initial()?)?;
    let images = ImageBatch::encode(&clip, case.tensor("images")?, ImageNeeds::GlobalFeatures)?;
    check.tensor(case, "expect.image_features", images.features()?, START)?;
    let unit = ops::unit_length(images.features()?, "an image feature")?;
    check.tensor(case, "expect.meta_bias", &method.meta_bias(&unit)?, START)?;
    let contexts = method.contexts(&unit)?;
    let text = method
        .context
        .text_features_under(&contexts, &clip, &tokens)?;
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
