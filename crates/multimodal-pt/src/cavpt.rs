//! DPT with CAVPT: prompts in both towers, and class-aware ones in the last blocks of the image tower (Xing et al., IEEE
//! Transactions on Multimedia 2023, arXiv 2208.08340).
//!
//! The text tower reads a learned context, as in CoOp. The lower blocks of the image tower read free tokens, replaced from
//! block to block. The upper blocks read tokens that a small cross-attention makes for each image: of the learned features of the K
//! classes that zero-shot CLIP finds most likely for it, looking at the image's own tokens.
//!
//! Learned by cross entropy, and for the first epochs also by what each side says beside the other's frozen twin; an
//! auxiliary classifier learns to tell which class a prompt was made of. With `variant = "vlp"` all blocks read free tokens.
//!
//! # Differs from the authors' code
//! - Everything learned stays in f32; theirs holds it in f16, in which cross-attention loses digits.
//! - The number of blocks and all widths are the weights'; theirs counts on 12 blocks.
//! - Of candidates that are equally likely the class that comes first in the list is taken; theirs leaves it open.
//! - A data set without a sentence of its own takes `a photo of a {}.`; theirs stops.
//! - The auxiliary classifier is kept in the prompt file for the classes that it was trained on, and not used to predict;
//!   theirs drops it on loading and leaves a random one.

mod generator;
mod vision;

use candle_core::{DType, Device, Tensor};
use cliptune_core::checkpoint::TorchState;
use cliptune_core::context::{self, Context, Start};
use cliptune_core::learned::{self, Learner};
use cliptune_core::method::{self, Classifier, Entry, Method, Paper, Settings};
use cliptune_core::prompt::{ClassTokenPosition, ClassTokens};
use cliptune_core::schedule::{Decay, Schedule, Warmup};
use cliptune_core::templates::{self, Sentences};
use cliptune_core::train::{Augment, Batch, Loss, Objective, Recipe, Step};
use cliptune_core::{
    Classes, Clip, Error, Gradients, ImageBatch, ImageNeeds, Labelled, Learned, Param, Params,
    Result, Run, ops,
};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use self::generator::{Generator, Sizes};
use self::vision::Given;
pub use self::vision::Seen;
use crate::sides;

/// The registry's entry.
pub const ENTRY: Entry = Entry {
    slug: "cavpt",
    name: "DPT with CAVPT",
    family: "multimodal-pt",
    paper: Paper {
        title: "Dual Modality Prompt Tuning for Vision-Language Pre-Trained Model",
        authors: "Xing, Wu, Cheng, Zhang, Liang, Wang, Zhang",
        venue: "IEEE TMM 2023",
        arxiv: "2208.08340",
        code: "fanrena/DPT@11fef90",
    },
    summary: "Learns a text context and image tokens; in the last block the tokens are made for each image, from the classes that it may show.",
    learns: "prompt_learner.ctx, ctx_learner.ctx and extractor.*: a text context, vpt_n_ctx tokens for each lower image block, and a cross-attention that makes those of the upper blocks",
    cost: "both towers forward and backward at each step, and the image tower forward once more without prompts; two image passes to predict",
    needs: ImageNeeds::Pixels,
    defaults: method::defaults_of::<CavptConfig>,
    configure: method::configure::<CavptConfig>,
    load: learned::load::<Cavpt>,
    import: Some(learned::import::<Cavpt>),
};

/// What the blocks of the image tower read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Variant {
    /// Free tokens in the lower blocks, class-aware ones in the upper: the whole method.
    #[default]
    Dpt,
    /// Free tokens in all blocks.
    Vlp,
}

/// Settings of [`Cavpt`]; the defaults are those of the authors' script.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct CavptConfig {
    /// With class-aware tokens or without.
    pub variant: Variant,
    /// Context tokens of the text prompt, at least 1. `None`: as many as `ctx_init` has tokens, else 16.
    pub n_ctx: Option<usize>,
    /// Words to start from, one token each; `None` or empty draws from N(0, 0.02²).
    pub ctx_init: Option<String>,
    /// One text context per class instead of one for all (CSC); needs `ctx_init = ""`.
    pub class_specific: bool,
    /// Where the class name sits among the context tokens.
    pub class_token_position: ClassTokenPosition,
    /// Free tokens of each lower block of the image tower; 0 for none.
    pub vpt_n_ctx: usize,
    /// Class-aware tokens of each upper block: one for each of the most likely classes, at most as many as there are; 0 for
    /// none, so that the upper blocks read the image alone.
    pub class_prompt_num: usize,
    /// The first block with class-aware tokens, counted from 1; `None`: the last.
    pub bottom_limit: Option<usize>,
    /// Vectors that cross-attention reads beside the image's tokens, at least 1.
    pub generator_n_ctx: usize,
    /// Width of its queries and keys, at least 1.
    pub attention_dim: usize,
    /// Weight of the auxiliary classifier's loss, at least 0.
    pub alpha: f64,
    /// Epochs in which both sides also learn beside the other's frozen twin.
    pub guidance_epochs: usize,
    /// Weight of the main cross entropy in these epochs, at least 0.
    pub guidance_main_weight: f64,
    /// The hand-written sentence, `{}` standing for the class name; `None` takes the data set's, else `a photo of a {}.`
    pub template: Option<String>,
    /// Takes the sentence that the authors use for this data set (`OxfordPets` or `oxford_pets`).
    pub dataset: Option<String>,
    /// Learning rate of the text context.
    pub text_lr: f64,
    /// Warm-up epochs of the text context.
    pub text_warmup_epochs: usize,
    /// How it is trained: 60 epochs, 32 images a step; its rate and warm-up are those of the image tokens and the
    /// cross-attention.
    pub train: Recipe,
}

impl Default for CavptConfig {
    fn default() -> Self {
        Self {
            variant: Variant::default(),
            n_ctx: None,
            ctx_init: None,
            class_specific: false,
            class_token_position: ClassTokenPosition::default(),
            vpt_n_ctx: 10,
            class_prompt_num: 10,
            bottom_limit: None,
            generator_n_ctx: 10,
            attention_dim: 32,
            alpha: 0.3,
            guidance_epochs: 30,
            guidance_main_weight: 0.1,
            template: None,
            dataset: None,
            text_lr: 0.002,
            text_warmup_epochs: 1,
            train: Recipe {
                epochs: Some(60),
                lr: 0.01,
                schedule: Schedule {
                    decay: Decay::Cosine {},
                    warmup: Warmup::Constant {
                        epochs: 10,
                        lr: 1e-5,
                    },
                },
                // The image tower runs at every step whatever the view.
                augment: Augment::CropFlip,
                ..Recipe::default()
            },
        }
    }
}

impl CavptConfig {
    /// Context tokens without initial words.
    pub const N_CTX: usize = 16;

    fn text(&self) -> Start {
        Start {
            class_specific: self.class_specific,
            position: self.class_token_position,
            ..Start::of_words(self.ctx_init.as_deref(), self.n_ctx, Self::N_CTX)
        }
    }

    /// The hand-written sentence of the frozen class features.
    fn sentences(&self) -> Result<Sentences> {
        let (own, dataset) = (self.template.as_deref(), self.dataset.as_deref());
        let chosen = templates::chosen(own, dataset, templates::for_dataset)?;
        Sentences::new(vec![chosen.unwrap_or(templates::DEFAULT).to_owned()])
    }

    /// The recipe's schedule with the text context's warm-up.
    fn text_schedule(&self) -> Schedule {
        let mut schedule = self.train.schedule.clone();
        match &mut schedule.warmup {
            Warmup::None {} | Warmup::LinearBySteps { .. } => {}
            Warmup::Constant { epochs, .. } | Warmup::Linear { epochs, .. } => {
                *epochs = self.text_warmup_epochs
            }
        }
        schedule
    }
}

impl Settings for CavptConfig {
    const SLUG: &'static str = ENTRY.slug;

    fn check(&self) -> Result<()> {
        self.text().check()?;
        for (key, value) in [
            ("generator_n_ctx", self.generator_n_ctx),
            ("attention_dim", self.attention_dim),
        ] {
            if value == 0 {
                return Err(Error::config(key, 0, "at least 1"));
            }
        }
        if self.bottom_limit == Some(0) {
            let expected = "a block, counted from 1";
            return Err(Error::config("bottom_limit", 0, expected));
        }
        method::check_weight("alpha", self.alpha)?;
        method::check_weight("guidance_main_weight", self.guidance_main_weight)?;
        method::check_positive("text_lr", self.text_lr)?;
        self.sentences()?;
        self.train.check()
    }
}

/// What the text context's keys begin with in the whole model.
const TEXT: &str = "prompt_learner.";

/// The free tokens' key.
const VISUAL: &str = "image_encoder.transformer.ctx_learner.ctx";

impl Method for CavptConfig {
    type Data = Labelled;
    type Fitted = Learned<Cavpt>;

    fn fit(&self, clip: &Clip, data: &Labelled, run: &mut Run) -> Result<Learned<Cavpt>> {
        Learned::fit(self, &self.train, clip, data, run)
    }
}

/// Learned prompts of both towers.
#[derive(Debug)]
pub struct Cavpt {
    context: Context,
    /// `(free blocks, vpt_n_ctx, width)`.
    visual: Param,
    /// Makes the tokens of the blocks above the free ones.
    generator: Option<Generator>,
    class_prompt_num: usize,
    sentences: Sentences,
    alpha: f64,
    guidance_epochs: usize,
    guidance_main_weight: f64,
    text_lr: f64,
    text_schedule: Schedule,
}

impl Cavpt {
    /// Raw text features of the classes under the learned context, `(n_cls, embed_dim)`; gradients flow to it.
    ///
    /// # Errors
    /// As [`Context::text_features`].
    pub fn text_features(&self, clip: &Clip, classes: &ClassTokens) -> Result<Tensor> {
        self.context.text_features(clip, classes)
    }

    /// Unit features of the hand-written sentences, `(n_cls, embed_dim)`.
    ///
    /// # Errors
    /// As [`Sentences::mean`].
    pub fn frozen_text_features(&self, clip: &Clip, classes: &ClassTokens) -> Result<Tensor> {
        self.sentences.mean(clip, classes)
    }

    /// The classes that zero-shot CLIP finds most likely, the likeliest first: raw features of the images without prompts
    /// `(batch, embed_dim)` and [`Cavpt::frozen_text_features`] → `(batch, min(class_prompt_num, n_cls))`, u32. `None` for
    /// [`Variant::Vlp`].
    ///
    /// # Errors
    /// As [`Clip::unit_logits`].
    pub fn candidates(
        &self,
        clip: &Clip,
        plain: &Tensor,
        frozen_text: &Tensor,
    ) -> Result<Option<Tensor>> {
        if self.generator.is_none() {
            return Ok(None);
        }
        let logits = clip.unit_logits(&plain.detach(), frozen_text)?;
        let (batch, n_cls) = logits.dims2()?;
        let k = self.class_prompt_num.min(n_cls);
        let mut all: Vec<u32> = Vec::with_capacity(batch * k);
        for row in logits.to_vec2::<f32>()? {
            let mut order: Vec<u32> = (0..n_cls as u32).collect();
            // A stable sort: of equals the first.
            order.sort_by(|&a, &b| row[b as usize].total_cmp(&row[a as usize]));
            all.extend(&order[..k]);
        }
        Ok(Some(Tensor::from_vec(all, (batch, k), &Device::Cpu)?))
    }
}

/// Mean cross entropy of the auxiliary classifier, `(batch, upper blocks, candidates, n_cls)`, over the tokens that were made
/// of their image's label; 0 if there is none.
fn auxiliary_loss(logits: &Tensor, candidates: &Tensor, labels: &[u32]) -> Result<Tensor> {
    let (batch, blocks, k, n_cls) = logits.dims4()?;
    ops::check_labels(labels, batch, n_cls)?;
    let (mut rows, mut targets) = (Vec::new(), Vec::new());
    for (image, (candidates, &label)) in candidates.to_vec2::<u32>()?.iter().zip(labels).enumerate()
    {
        let Some(place) = candidates.iter().position(|&class| class == label) else {
            continue;
        };
        for block in 0..blocks {
            rows.push(((image * blocks + block) * k + place) as u32);
            targets.push(label);
        }
    }
    if rows.is_empty() {
        return Ok(Tensor::zeros((), DType::F32, &Device::Cpu)?);
    }
    let rows = Tensor::new(rows, &Device::Cpu)?;
    let logits = logits.reshape((batch * blocks * k, n_cls))?;
    ops::cross_entropy(&logits.index_select(&rows, 0)?, &targets)
}

impl Learner for Cavpt {
    type Config = CavptConfig;

    fn start(
        config: &CavptConfig,
        clip: &Clip,
        classes: &Classes,
        params: &mut Params,
    ) -> Result<Self> {
        let (blocks, width) = clip.arch().vit_sizes()?;
        let free_blocks = match config.variant {
            Variant::Vlp => blocks,
            Variant::Dpt => {
                sides::depth("bottom_limit", config.bottom_limit, blocks, blocks, 1)? - 1
            }
        };
        let upper = blocks - free_blocks;
        if upper > 0 && config.class_prompt_num > 0 && config.alpha > 0.0 && classes.len() == 1 {
            let expected = "0 for a single class, of which the auxiliary classifier has nothing to learn; or more classes";
            return Err(Error::config("alpha", config.alpha, expected));
        }
        let context = params.below(TEXT, |params| {
            config.text().context(params, clip.text(), classes)
        })?;
        let shape = (free_blocks, config.vpt_n_ctx, width);
        let visual = params.normal(VISUAL, shape, sides::STD)?;
        let sizes = Sizes {
            blocks: upper,
            width,
            embed_dim: clip.arch().embed_dim,
            classes: classes.len(),
            n_ctx: config.generator_n_ctx,
            attention_dim: config.attention_dim,
        };
        let generator = (upper > 0).then(|| Generator::new(params, sizes));
        let sentences = config.sentences()?;
        // Refuses names that are too long before any work.
        let classes = ClassTokens::new(clip.text(), classes)?;
        for template in sentences.templates() {
            classes.fill(template)?;
        }
        Ok(Self {
            context,
            visual,
            generator: generator.transpose()?,
            class_prompt_num: config.class_prompt_num,
            sentences,
            alpha: config.alpha,
            guidance_epochs: config.guidance_epochs,
            guidance_main_weight: config.guidance_main_weight,
            text_lr: config.text_lr,
            text_schedule: config.text_schedule(),
        })
    }

    /// How many classes are candidates is not to be seen.
    fn complete(
        config: &mut CavptConfig,
        given: &Value,
        state: &TorchState,
        clip: &Clip,
    ) -> Result<()> {
        let text = format!("{TEXT}{}", context::KEY);
        let (contexts, n_ctx) = context::sizes_of(&text, state, clip.text())?;
        config.n_ctx = Some(n_ctx);
        config.class_specific |= contexts.is_some();
        config.ctx_init = context::words_in(given);
        let [free_blocks, vpt_n_ctx] = sides::leading_of(state, VISUAL)?;
        config.vpt_n_ctx = vpt_n_ctx;
        let mut keys = state.tensors.keys();
        if !keys.any(|key| key.starts_with(generator::PREFIX)) {
            config.variant = Variant::Vlp;
            return Ok(());
        }
        let key = |name: &str| format!("{}{name}", generator::PREFIX);
        config.variant = Variant::Dpt;
        config.bottom_limit = Some(free_blocks + 1);
        [_, config.generator_n_ctx] = sides::leading_of(state, &key(generator::CTX))?;
        let query = key(&format!("{}.weight", generator::QUERY));
        config.attention_dim = sides::rows_of(state, &query)?;
        Ok(())
    }
}

impl Objective for Cavpt {
    fn needs(&self) -> ImageNeeds {
        ImageNeeds::Pixels
    }

    fn classifier<'a>(
        &'a self,
        clip: &'a Clip,
        classes: &Classes,
    ) -> Result<Box<dyn Classifier + 'a>> {
        self.context.check_serves(classes)?;
        let classes = ClassTokens::new(clip.text(), classes)?;
        let text = self.text_features(clip, &classes)?.detach();
        Ok(Box::new(CavptClassifier {
            method: self,
            clip,
            unit_text: ops::unit_length(&text, "a text feature")?,
            text,
            frozen_text: self.frozen_text_features(clip, &classes)?,
        }))
    }

    fn loss(&self, clip: &Clip, batch: &Batch<'_>, step: Step) -> Result<Loss> {
        let (images, labels) = (batch.images.pixels_or_patches()?, batch.labels);
        let text = self.text_features(clip, batch.classes)?;
        let unit_text = ops::unit_length(&text, "a text feature")?;
        let frozen_text = self.frozen_text_features(clip, batch.classes)?;
        let plain = vision::plain(clip, images)?;
        let candidates = self.candidates(clip, &plain, &frozen_text)?;
        let seen = self.see(clip, images, &text, candidates.as_ref())?;
        let logits = clip.unit_logits(&seen.features, &unit_text)?;
        let mut loss = Loss::cross_entropy(logits, labels)?.named("main");
        if step.epoch < self.guidance_epochs {
            loss.total = (loss.total * self.guidance_main_weight)?;
            for (term, images, text) in [
                ("text", &plain, &unit_text),
                ("image", &seen.features, &frozen_text),
            ] {
                let logits = clip.unit_logits(images, text)?;
                loss = loss.plus(1.0, term, ops::cross_entropy(&logits, labels)?)?;
            }
        }
        match (&seen.class_logits, &candidates) {
            (Some(logits), Some(candidates)) => {
                let auxiliary = auxiliary_loss(logits, candidates, labels)?;
                loss.plus(self.alpha, "aux", auxiliary)
            }
            _ => Ok(loss),
        }
    }

    /// With no candidates the generator's gradient is zero and not missing, so the authors' optimiser decays it.
    fn shape_gradients(
        &mut self,
        params: &Params,
        _: &Loss,
        gradients: &mut Gradients,
    ) -> Result<()> {
        if self.class_prompt_num > 0 {
            return Ok(());
        }
        for param in params.iter() {
            let name = param.name();
            if name.starts_with(generator::PREFIX) && !generator::is_auxiliary(name) {
                gradients.set(name, param.value()?.zeros_like()?)?;
            }
        }
        Ok(())
    }

    /// The text context has an optimiser of its own.
    fn rate(&self, param: &str, epoch: usize, epochs: usize) -> Option<f64> {
        let rate = || self.text_schedule.rate(self.text_lr, epoch, epochs);
        param.starts_with(TEXT).then(rate)
    }
}

/// Sees each image twice: as CLIP does, to choose its candidates, and with its prompts.
struct CavptClassifier<'a> {
    method: &'a Cavpt,
    clip: &'a Clip,
    /// Raw, `(n_cls, embed_dim)`.
    text: Tensor,
    unit_text: Tensor,
    frozen_text: Tensor,
}

impl CavptClassifier<'_> {
    fn candidates(&self, images: &Tensor) -> Result<Option<Tensor>> {
        if self.method.generator.is_none() {
            return Ok(None);
        }
        let plain = vision::plain(self.clip, images)?;
        self.method.candidates(self.clip, &plain, &self.frozen_text)
    }

    fn given<'b>(&'b self, images: &'b Tensor, candidates: &'b Option<Tensor>) -> Given<'b> {
        Given {
            images,
            text: &self.text,
            candidates: candidates.as_ref(),
        }
    }
}

impl Classifier for CavptClassifier<'_> {
    fn logits(&self, images: &ImageBatch) -> Result<Tensor> {
        let images = images.pixels_or_patches()?;
        let candidates = self.candidates(images)?;
        let given = self.given(images, &candidates);
        let seen = self.method.pass(self.clip, given, false)?;
        self.clip.unit_logits(&seen.features, &self.unit_text)
    }

    fn class_attention(&self, images: &ImageBatch) -> Result<Option<Tensor>> {
        let images = images.pixels_or_patches()?;
        let candidates = self.candidates(images)?;
        let given = self.given(images, &candidates);
        Ok(Some(self.method.class_attention(self.clip, given)?))
    }
}
