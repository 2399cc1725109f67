//! IVLP: independent prompts in both towers (the baseline of MaPLe; Khattak et al., CVPR 2023, arXiv 2210.03117, and Rasheed
//! et al., "Fine-tuned CLIP Models are Efficient Video Learners", CVPR 2023).
//!
//! The first blocks of each tower read learned vectors, replaced from block to block; nothing ties the two towers. With
//! `prompt_depth_vision = 0` it is deep language prompting alone.
//!
//! # Differs from the authors' code
//! - Everything learned stays in f32; theirs holds `ctx` in f16.
//! - A depth left out takes the paper's 12 as far as the tower has blocks; more than it has is an error.
//! - Without visual prompts the image tower runs once per image if `train.augment = "none"` (equal numbers).

use candle_core::Tensor;
use cliptune_core::checkpoint::TorchState;
use cliptune_core::learned::{self, Learner};
use cliptune_core::method::{self, Classifier, Entry, Method, Paper, Settings, TextClassifier};
use cliptune_core::prompt::ClassTokens;
use cliptune_core::train::{Batch, Loss, Objective, Recipe, Step};
use cliptune_core::{
    Classes, Clip, Error, ImageBatch, ImageNeeds, Labelled, Learned, Param, Params, Result, Run,
    ops,
};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::sides::{self, PromptedClassifier, VisualSide};

/// The registry's entry.
pub const ENTRY: Entry = Entry {
    slug: "ivlp",
    name: "IVLP",
    family: "multimodal-pt",
    paper: Paper {
        title: "MaPLe: Multi-modal Prompt Learning",
        authors: "Khattak, Rasheed, Maaz, Khan, Khan",
        venue: "CVPR 2023",
        arxiv: "2210.03117",
        code: "muzairkhattak/multimodal-prompt-learning@69bce21",
    },
    summary: "Learns prompts for the first blocks of the text tower and, independently, of the image tower.",
    learns: "prompt_learner.ctx, VPT and VPT_shallow: n_ctx_text vectors for each prompted text block, n_ctx_vision for each image block",
    cost: "both towers forward and backward at each step: the text tower for every class, the image tower for every image",
    needs: ImageNeeds::Pixels,
    defaults: method::defaults_of::<IvlpConfig>,
    configure: method::configure::<IvlpConfig>,
    load: learned::load::<Ivlp>,
    import: Some(learned::import::<Ivlp>),
};

/// Settings of [`Ivlp`]; the defaults are the authors' for base-to-new.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct IvlpConfig {
    /// Text prompt tokens of each block, at least 1.
    pub n_ctx_text: usize,
    /// Visual prompt tokens of each block; 0 leaves the image tower as it is.
    pub n_ctx_vision: usize,
    /// Words of which the first `n_ctx_text` tokens are what the context starts from; the others stay in front of the class
    /// name. Counts for `n_ctx_text` up to 4; `None` or more vectors draw from N(0, 0.02²).
    pub ctx_init: Option<String>,
    /// Blocks of the text tower that read prompts, at least 1; `None`: 12, or all if there are fewer.
    pub prompt_depth_text: Option<usize>,
    /// Blocks of the image tower that read prompts, 0 for none; `None`: 12, or all if there are fewer.
    pub prompt_depth_vision: Option<usize>,
    /// How it is trained: 5 epochs, 4 images a step, rate 0.0035.
    pub train: Recipe,
}

impl Default for IvlpConfig {
    fn default() -> Self {
        Self {
            n_ctx_text: 2,
            n_ctx_vision: 2,
            ctx_init: Some("a photo of a".into()),
            prompt_depth_text: None,
            prompt_depth_vision: None,
            train: sides::recipe(0.0035),
        }
    }
}

impl IvlpConfig {
    /// The paper's depth in both towers.
    pub const DEPTH: usize = 12;

    /// Whether the image tower stays as it is.
    fn is_text_only(&self) -> bool {
        self.n_ctx_vision == 0 || self.prompt_depth_vision == Some(0)
    }
}

impl Settings for IvlpConfig {
    const SLUG: &'static str = ENTRY.slug;

    fn check(&self) -> Result<()> {
        if self.n_ctx_text == 0 {
            return Err(Error::config("n_ctx_text", 0, "at least one context token"));
        }
        if self.prompt_depth_text == Some(0) {
            return Err(Error::config("prompt_depth_text", 0, "at least one block"));
        }
        self.train.check()
    }
}

/// The key of the text prompts of a block behind the first.
fn text_prompt(block: usize) -> String {
    format!("text_encoder.transformer.resblocks.{block}.VPT_shallow")
}

impl Method for IvlpConfig {
    type Data = Labelled;
    type Fitted = Learned<Ivlp>;

    fn fit(&self, clip: &Clip, data: &Labelled, run: &mut Run) -> Result<Learned<Ivlp>> {
        Learned::fit(self, &self.train, clip, data, run)
    }
}

/// Learned prompts of both towers.
#[derive(Debug)]
pub struct Ivlp {
    /// `(n_ctx_text, text width)`, then as many again for block 1, 2, ...
    text: Vec<Param>,
    vision: VisualSide,
    words: String,
}

impl Ivlp {
    /// Raw text features of the classes, `(n_cls, embed_dim)`; gradients flow to the text prompts.
    ///
    /// # Errors
    /// [`Error::PromptTooLong`].
    pub fn text_features(&self, clip: &Clip, classes: &ClassTokens) -> Result<Tensor> {
        let text = self.text.iter().map(|param| param.tensor().clone());
        let text: Vec<Tensor> = text.collect();
        let ctx = (&text[0], self.words.as_str());
        clip.text()
            .encode(&sides::text_prompts(classes, ctx, &text[1..])?)
    }

    /// Raw image features, `(batch, embed_dim)`; gradients flow to the visual prompts.
    ///
    /// # Errors
    /// [`Error::Data`] if the images are not what [`Objective::needs`] asks for.
    pub fn image_features(&self, clip: &Clip, images: &ImageBatch) -> Result<Tensor> {
        match self.vision.is_empty() {
            true => Ok(images.features()?.clone()),
            false => {
                let prompts = self.vision.prompts();
                clip.image()
                    .encode_prompted(images.pixels_or_patches()?, &prompts)
            }
        }
    }
}

impl Learner for Ivlp {
    type Config = IvlpConfig;

    fn start(
        config: &IvlpConfig,
        clip: &Clip,
        classes: &Classes,
        params: &mut Params,
    ) -> Result<Self> {
        let (set, papers) = (config.prompt_depth_text, IvlpConfig::DEPTH);
        let blocks = clip.arch().text_layers;
        let depth = sides::depth("prompt_depth_text", set, papers, blocks, 1)?;
        let (n_ctx, ctx_init) = (config.n_ctx_text, config.ctx_init.as_deref());
        let (ctx, words) = sides::text_context(params, clip, n_ctx, ctx_init)?;
        let mut text = vec![ctx];
        for block in 1..depth {
            let shape = (n_ctx, clip.text().width());
            text.push(params.normal(&text_prompt(block), shape, sides::STD)?);
        }
        let vision = match config.is_text_only() {
            true => VisualSide::new(params, 0, 0, 0)?,
            false => {
                let (blocks, width) = clip.arch().vit_sizes()?;
                let (key, set) = ("prompt_depth_vision", config.prompt_depth_vision);
                let depth = sides::depth(key, set, papers, blocks, 0)?;
                VisualSide::new(params, width, config.n_ctx_vision, depth)?
            }
        };
        // Refuses names that are too long before any work.
        ClassTokens::new(clip.text(), classes)?.sentences(&words)?;
        Ok(Self {
            text,
            vision,
            words,
        })
    }

    fn complete(config: &mut IvlpConfig, _: &Value, state: &TorchState, _: &Clip) -> Result<()> {
        config.n_ctx_text = sides::rows_of(state, sides::CTX)?;
        config.prompt_depth_text = Some(1 + sides::count(state, 1, text_prompt));
        let depth = sides::count(state, 0, VisualSide::key);
        // No visual prompts, or lost ones: only the settings can tell.
        if depth == 0 && !config.is_text_only() {
            return Err(Error::Prompt(format!(
                "the checkpoint holds no `{}`; if only language prompts were learned, set prompt_depth_vision = 0",
                VisualSide::key(0)
            )));
        }
        config.prompt_depth_vision = Some(depth);
        config.n_ctx_vision = match depth {
            0 => 0,
            _ => sides::rows_of(state, &VisualSide::key(0))?,
        };
        Ok(())
    }
}

impl Objective for Ivlp {
    /// Without visual prompts the image tower is frozen, and features will do.
    fn needs(&self) -> ImageNeeds {
        match self.vision.is_empty() {
            true => ImageNeeds::GlobalFeatures,
            false => ImageNeeds::Pixels,
        }
    }

    fn classifier<'a>(
        &'a self,
        clip: &'a Clip,
        classes: &Classes,
    ) -> Result<Box<dyn Classifier + 'a>> {
        let text = self.text_features(clip, &ClassTokens::new(clip.text(), classes)?)?;
        if self.vision.is_empty() {
            let text = ops::unit_length(&text.detach(), "a text feature")?;
            return Ok(Box::new(TextClassifier::new(clip, text)));
        }
        let prompts = self.vision.constants()?;
        Ok(Box::new(PromptedClassifier::new(clip, prompts, &text)?))
    }

    fn loss(&self, clip: &Clip, batch: &Batch<'_>, _: Step) -> Result<Loss> {
        let text = self.text_features(clip, batch.classes)?;
        let images = self.image_features(clip, batch.images)?;
        Loss::cross_entropy(clip.cosine_logits(&images, &text)?, batch.labels)
    }
}
