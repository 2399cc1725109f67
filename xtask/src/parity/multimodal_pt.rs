//! Cases of the multimodal-pt family.

use anyhow::Result;
use candle_core::Tensor;
use cliptune_core::method::{Classifier, Predictor};
use cliptune_core::prompt::{ClassTokenPosition, ClassTokens, Prompts};
use cliptune_core::task::ImageBatch;
use cliptune_core::train::{Batch, Loss, Objective, Step};
use cliptune_core::{Classes, Clip, ImageNeeds, Learned, Params};
use cliptune_multimodal_pt::upt::{Depth, Kept, KeptOfStep};
use cliptune_multimodal_pt::{
    DeepVpt, DeepVptConfig, Interaction, Ivlp, IvlpConfig, MaPLe, MaPLeConfig, Upt, UptConfig,
};
use serde::Deserialize;

use super::case::{Case, Models};
use super::check::{AFTER, Check, START};
use super::objective;
use super::text_pt::{compare_start, padded, words};

/// The text context's key.
const CTX: &str = "prompt_learner.ctx";
/// Longest context that starts from words.
const MOST_WORDS: usize = 4;

#[derive(Deserialize)]
struct MaPLeCase {
    n_ctx: usize,
    ctx_init: String,
    prompt_depth: usize,
}

pub(crate) fn maple(case: &Case, models: &mut Models, check: &mut Check) -> Result<()> {
    let clip = models.of(case)?;
    let json: MaPLeCase = case.config()?;
    let config = MaPLeConfig {
        n_ctx: json.n_ctx,
        ctx_init: Some(json.ctx_init.clone()),
        prompt_depth: Some(json.prompt_depth),
        ..MaPLeConfig::default()
    };
    let classes = case.classes()?;
    let fresh = Learned::<MaPLe>::new(&config, &clip, &classes, 0)?;
    start(
        case,
        &clip,
        fresh.params(),
        &json.ctx_init,
        json.n_ctx,
        check,
    )?;
    let method = Learned::<MaPLe>::with_tensors(&config, &clip, &classes, 0, &case.initial()?)?;
    for (block, tokens) in method.vision_context()?.iter().enumerate() {
        let name = match block.checked_sub(1) {
            None => "expect.shared_ctx_vision".to_owned(),
            Some(i) => format!("expect.deep_ctx_vision.{i}"),
        };
        check.tensor(case, &name, tokens, START)?;
    }
    let tokens = ClassTokens::new(clip.text(), &classes)?;
    let text = method.text_features(&clip, &tokens)?;
    check.tensor(case, "expect.text_features", &text, START)?;
    let images = method.image_features(&clip, case.tensor("images")?)?;
    check.tensor(case, "expect.image_features", &images, START)?;
    run(case, &clip, method, &tokens, check)
}

#[derive(Deserialize)]
struct IvlpCase {
    n_ctx_text: usize,
    n_ctx_vision: usize,
    ctx_init: String,
    prompt_depth_text: usize,
    prompt_depth_vision: usize,
}

pub(crate) fn ivlp(case: &Case, models: &mut Models, check: &mut Check) -> Result<()> {
    let clip = models.of(case)?;
    let json: IvlpCase = case.config()?;
    let config = IvlpConfig {
        n_ctx_text: json.n_ctx_text,
        n_ctx_vision: json.n_ctx_vision,
        ctx_init: Some(json.ctx_init.clone()),
        prompt_depth_text: Some(json.prompt_depth_text),
        prompt_depth_vision: Some(json.prompt_depth_vision),
        ..IvlpConfig::default()
    };
    let classes = case.classes()?;
    let fresh = Learned::<Ivlp>::new(&config, &clip, &classes, 0)?;
    start(
        case,
        &clip,
        fresh.params(),
        &json.ctx_init,
        json.n_ctx_text,
        check,
    )?;
    let method = Learned::<Ivlp>::with_tensors(&config, &clip, &classes, 0, &case.initial()?)?;
    let tokens = ClassTokens::new(clip.text(), &classes)?;
    let text = method.text_features(&clip, &tokens)?;
    check.tensor(case, "expect.text_features", &text, START)?;
    let images = ImageBatch::encode(&clip, case.tensor("images")?, method.needs())?;
    let images = method.image_features(&clip, &images)?;
    check.tensor(case, "expect.image_features", &images, START)?;
    run(case, &clip, method, &tokens, check)
}

#[derive(Deserialize)]
struct DeepVptCase {
    n_ctx_vision: usize,
    prompt_depth_vision: usize,
    template: String,
}

pub(crate) fn deep_vpt(case: &Case, models: &mut Models, check: &mut Check) -> Result<()> {
    let clip = models.of(case)?;
    let json: DeepVptCase = case.config()?;
    let config = DeepVptConfig {
        n_ctx_vision: json.n_ctx_vision,
        prompt_depth_vision: Some(json.prompt_depth_vision),
        template: None,
        ..DeepVptConfig::default()
    };
    let classes = case.classes()?;
    let method = Learned::<DeepVpt>::with_tensors(&config, &clip, &classes, 0, &case.initial()?)?;
    let tokens = ClassTokens::new(clip.text(), &classes)?;
    let sentences = Prompts::of_tokens(tokens.fill(&json.template)?);
    let text = clip.text().encode(&sentences)?;
    check.tensor(case, "expect.text_features", &text, START)?;
    let images = method.image_features(&clip, case.tensor("images")?)?;
    check.tensor(case, "expect.image_features", &images, START)?;
    run(case, &clip, method, &tokens, check)
}

#[derive(Deserialize)]
struct UptCase {
    n_ctx: usize,
    ctx_init: String,
    class_token_position: ClassTokenPosition,
    dropout: f64,
    interaction: Interaction,
    depth: Depth,
    heads: usize,
}

/// UPT with the case's dropout in the place of what it draws.
#[derive(Debug)]
struct Dropping<'a> {
    upt: &'a Upt,
    /// One for each step; none if nothing is dropped.
    kept: Vec<KeptOfStep>,
}

impl Objective for Dropping<'_> {
    fn needs(&self) -> ImageNeeds {
        self.upt.needs()
    }

    fn classifier<'a>(
        &'a self,
        clip: &'a Clip,
        classes: &Classes,
    ) -> cliptune_core::Result<Box<dyn Classifier + 'a>> {
        self.upt.classifier(clip, classes)
    }

    fn loss(&self, clip: &Clip, batch: &Batch<'_>, step: Step) -> cliptune_core::Result<Loss> {
        self.upt.loss_with(clip, batch, self.kept.get(step.index))
    }
}

/// What step `step` of the case keeps.
fn kept_of(case: &Case, json: &UptCase, step: usize) -> Result<KeptOfStep> {
    let pass = |pass: &str| -> Result<Kept> {
        let factors = |of: &str| -> Result<Tensor> {
            let all = case.tensor(&format!("noise.dropout.{pass}.{of}"))?;
            Ok(all.get(step)?)
        };
        let of_tokens = |of: &str| -> Result<Tensor> { Ok(factors(of)?.squeeze(0)?) };
        let residual1 = of_tokens("residual1")?;
        let attention = factors("attn")?;
        let (sequences, tokens) = match json.interaction {
            Interaction::None => (residual1.dim(0)?, 1),
            Interaction::Attention => (1, residual1.dim(0)?),
        };
        Ok(Kept {
            attention: attention.reshape((sequences, json.heads, tokens, tokens))?,
            residual1,
            hidden: of_tokens("hidden")?,
            residual2: of_tokens("residual2")?,
        })
    };
    Ok(KeptOfStep {
        text: pass("text")?,
        visual: pass("visual")?,
    })
}

pub(crate) fn upt(case: &Case, models: &mut Models, check: &mut Check) -> Result<()> {
    let clip = models.of(case)?;
    let json: UptCase = case.config()?;
    let config = UptConfig {
        n_ctx: json.n_ctx,
        ctx_init: Some(json.ctx_init.clone()),
        class_token_position: json.class_token_position,
        depth: json.depth,
        interaction: json.interaction,
        heads: json.heads,
        dropout: json.dropout,
        ..UptConfig::default()
    };
    let classes = case.classes()?;
    let tokens = ClassTokens::new(clip.text(), &classes)?;
    let sentences = tokens.sentences(&words(&json.ctx_init, json.n_ctx))?;
    let ids = padded(&sentences, clip.text().context_length())?;
    check.tensor(case, "input.tokenized_prompts", &ids, 0.0)?;
    let method = Learned::<Upt>::with_tensors(&config, &clip, &classes, 0, &case.initial()?)?;
    let prompts = method.prompts(None)?;
    check.tensor(case, "expect.text_prompt", &prompts.text, START)?;
    check.tensor(case, "expect.visual_prompt", &prompts.visual, START)?;
    let text = method.text_features(&clip, &tokens, &prompts)?;
    check.tensor(case, "expect.text_features", &text, START)?;
    let images = method.image_features(&clip, case.tensor("images")?, &prompts)?;
    check.tensor(case, "expect.image_features", &images, START)?;
    let steps = match json.dropout {
        0.0 => 0,
        _ => case.json.lr_per_step.len(),
    };
    let kept = (0..steps).map(|step| kept_of(case, &json, step));
    let dropping = Dropping {
        upt: &method,
        kept: kept.collect::<Result<_>>()?,
    };
    let params = method.params().clone();
    run(case, &clip, Learned::of(dropping, params), &tokens, check)
}

/// What the context starts from and what the tokenizer sees.
fn start(
    case: &Case,
    clip: &Clip,
    fresh: &Params,
    ctx_init: &str,
    n_ctx: usize,
    check: &mut Check,
) -> Result<()> {
    let ctx_init = if n_ctx <= MOST_WORDS { ctx_init } else { "" };
    if !ctx_init.is_empty() {
        compare_start(case, fresh, CTX, check)?;
    }
    let tokens = ClassTokens::new(clip.text(), &case.classes()?)?;
    let sentences = tokens.sentences(&words(ctx_init, n_ctx))?;
    let ids = padded(&sentences, clip.text().context_length())?;
    check.tensor(case, "input.tokenized_prompts", &ids, 0.0)
}

/// Logits, the steps, and logits after them.
fn run<O: Objective>(
    case: &Case,
    clip: &Clip,
    mut method: Learned<O>,
    tokens: &ClassTokens,
    check: &mut Check,
) -> Result<()> {
    let images = ImageBatch::encode(clip, case.tensor("images")?, method.needs())?;
    let classes = case.classes()?;
    let logits =
        |method: &O| -> Result<Tensor> { Ok(method.classifier(clip, &classes)?.logits(&images)?) };
    check.tensor(case, "expect.logits", &logits(&method)?, START)?;
    let labels = case.ids("labels")?;
    let batch = Batch {
        images: &images,
        labels: &labels,
        classes: tokens,
    };
    objective::train(case, clip, &mut method, &batch, check)?;
    check.tensor(case, "expect.logits_after", &logits(&method)?, AFTER)
}
