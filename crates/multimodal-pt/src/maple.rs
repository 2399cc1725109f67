//! MaPLe: prompts in both towers, those of the image tower a linear function of the text tower's (Khattak et al., CVPR 2023,
//! arXiv 2210.03117).
//!
//! The first J blocks of the text tower read learned vectors P_i in the place of the context; the same blocks of the image
//! tower read `F_i(P_i)`, a learned linear map for each (eqs. 5 to 8). Both features are compared as in CLIP, and all of it is
//! learned by cross entropy.
//!
//! # Differs from the authors' code
//! - Everything learned stays in f32; theirs holds `ctx` and `proj` in f16.
//! - Widths are the towers' own; theirs are literals, so that only ViT-B runs.
//! - `prompt_depth` left out takes the paper's 9 as far as the towers have blocks; more than they have is an error.

use candle_core::Tensor;
use cliptune_core::checkpoint::TorchState;
use cliptune_core::layers::Affine;
use cliptune_core::learned::{self, Learner};
use cliptune_core::method::{self, Classifier, Entry, Method, Paper, Settings};
use cliptune_core::prompt::ClassTokens;
use cliptune_core::train::{Batch, Loss, Objective, Recipe, Step};
use cliptune_core::visual_prompt::{Tokens, VisualPrompts};
use cliptune_core::{
    Classes, Clip, Error, ImageNeeds, Labelled, Learned, Param, Params, Result, Run, context,
};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::sides::{self, PromptedClassifier};

/// The registry's entry.
pub const ENTRY: Entry = Entry {
    slug: "maple",
    name: "MaPLe",
    family: "multimodal-pt",
    paper: Paper {
        title: "MaPLe: Multi-modal Prompt Learning",
        authors: "Khattak, Rasheed, Maaz, Khan, Khan",
        venue: "CVPR 2023",
        arxiv: "2210.03117",
        code: "muzairkhattak/multimodal-prompt-learning@69bce21",
    },
    summary: "Learns text prompts for the first blocks of the text tower, and for each a linear map that makes the image tower's prompts of them.",
    learns: "prompt_learner.*: n_ctx vectors of the text tower's width and a linear map to the image tower's for each of prompt_depth blocks",
    cost: "both towers forward and backward at each step: the text tower for every class, the image tower for every image",
    needs: ImageNeeds::Pixels,
    defaults: method::defaults_of::<MaPLeConfig>,
    configure: method::configure::<MaPLeConfig>,
    load: learned::load::<MaPLe>,
    import: Some(learned::import::<MaPLe>),
};

/// Settings of [`MaPLe`]; the defaults are the paper's for base-to-new.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct MaPLeConfig {
    /// Prompt tokens of each tower and block, at least 1.
    pub n_ctx: usize,
    /// Words of which the first `n_ctx` tokens are what the context starts from; the others stay in front of the class name.
    /// Counts for `n_ctx` up to 4; `None` or more vectors draw from N(0, 0.02²).
    pub ctx_init: Option<String>,
    /// Blocks of both towers that read prompts, at least 1 (paper: J); `None`: 9, or all if there are fewer.
    pub prompt_depth: Option<usize>,
    /// How it is trained: 5 epochs, 4 images a step, rate 0.0035.
    pub train: Recipe,
}

impl Default for MaPLeConfig {
    fn default() -> Self {
        Self {
            n_ctx: 2,
            ctx_init: Some("a photo of a".into()),
            prompt_depth: None,
            train: sides::recipe(0.0035),
        }
    }
}

impl MaPLeConfig {
    /// The paper's depth.
    pub const DEPTH: usize = 9;
}

impl Settings for MaPLeConfig {
    const SLUG: &'static str = ENTRY.slug;

    fn check(&self) -> Result<()> {
        context::check(self.n_ctx)?;
        if self.prompt_depth == Some(0) {
            return Err(Error::config("prompt_depth", 0, "at least one block"));
        }
        self.train.check()
    }
}

/// The key of the text prompts that replace the context at block `i + 1`.
fn compound_prompt(i: usize) -> String {
    format!("prompt_learner.compound_prompts_text.{i}")
}

/// The key of the map that makes image prompts of them.
fn compound_projection(i: usize) -> String {
    format!("prompt_learner.compound_prompt_projections.{i}")
}

impl Method for MaPLeConfig {
    type Data = Labelled;
    type Fitted = Learned<MaPLe>;

    fn fit(&self, clip: &Clip, data: &Labelled, run: &mut Run) -> Result<Learned<MaPLe>> {
        Learned::fit(self, &self.train, clip, data, run)
    }
}

/// Learned prompts of the text tower, and the maps that make the image tower's of them.
#[derive(Debug)]
pub struct MaPLe {
    /// `(n_ctx, text width)`, then as many again for block 1, 2, ...
    text: Vec<Param>,
    /// One for each of `text`.
    projections: Vec<Affine>,
    words: String,
}

impl MaPLe {
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

    /// The image tower's prompts by block, `(n_ctx, vision width)` each; gradients flow to the text prompts and the maps.
    ///
    /// # Errors
    /// Whatever the tensor library refuses.
    pub fn vision_context(&self) -> Result<Vec<Tensor>> {
        let pairs = self.text.iter().zip(&self.projections);
        pairs
            .map(|(text, projection)| projection.forward(text.tensor()))
            .collect()
    }

    /// Raw image features, `(batch, 3, side, side)` → `(batch, embed_dim)`; gradients flow to the text prompts and the maps.
    ///
    /// # Errors
    /// [`Error::Shape`] if the images are not of the tower's resolution.
    pub fn image_features(&self, clip: &Clip, images: &Tensor) -> Result<Tensor> {
        let tokens = self.vision_context()?.into_iter().map(Tokens::Shared);
        let prompts = VisualPrompts::deep(tokens);
        clip.image().encode_prompted(images, &prompts)
    }
}

impl Learner for MaPLe {
    type Config = MaPLeConfig;

    /// The maps of all blocks but the first start alike.
    fn start(
        config: &MaPLeConfig,
        clip: &Clip,
        classes: &Classes,
        params: &mut Params,
    ) -> Result<Self> {
        let (blocks, width) = clip.arch().vit_sizes()?;
        let blocks = blocks.min(clip.arch().text_layers);
        let papers = MaPLeConfig::DEPTH;
        let depth = sides::depth("prompt_depth", config.prompt_depth, papers, blocks, 1)?;
        let text_width = clip.text().width();
        let ctx_init = config.ctx_init.as_deref();
        let (ctx, words) = sides::text_context(params, clip, config.n_ctx, ctx_init)?;
        let sizes = (width, text_width);
        let proj = Affine::new(params, "prompt_learner.proj", sizes)?;
        let (mut text, mut projections) = (vec![ctx], vec![proj]);
        for i in 0..depth - 1 {
            let shape = (config.n_ctx, text_width);
            text.push(params.normal(&compound_prompt(i), shape, sides::STD)?);
        }
        for i in 0..depth - 1 {
            let name = compound_projection(i);
            let projection = match i {
                0 => Affine::new(params, &name, sizes)?,
                _ => Affine::copied(params, &name, &projections[1])?,
            };
            projections.push(projection);
        }
        // Refuses names that are too long before any work.
        ClassTokens::new(clip.text(), classes)?.sentences(&words)?;
        Ok(Self {
            text,
            projections,
            words,
        })
    }

    fn complete(config: &mut MaPLeConfig, _: &Value, state: &TorchState, _: &Clip) -> Result<()> {
        config.n_ctx = sides::rows_of(state, sides::CTX)?;
        config.prompt_depth = Some(1 + sides::count(state, 0, compound_prompt));
        Ok(())
    }
}

impl Objective for MaPLe {
    fn needs(&self) -> ImageNeeds {
        ImageNeeds::Pixels
    }

    fn classifier<'a>(
        &'a self,
        clip: &'a Clip,
        classes: &Classes,
    ) -> Result<Box<dyn Classifier + 'a>> {
        let text = self.text_features(clip, &ClassTokens::new(clip.text(), classes)?)?;
        let vision = self.vision_context()?.into_iter();
        let prompts = VisualPrompts::deep(vision.map(|t| Tokens::Shared(t.detach())));
        Ok(Box::new(PromptedClassifier::new(clip, prompts, &text)?))
    }

    fn loss(&self, clip: &Clip, batch: &Batch<'_>, _: Step) -> Result<Loss> {
        let text = self.text_features(clip, batch.classes)?;
        let images = self.image_features(clip, batch.images.pixels_or_patches()?)?;
        Loss::cross_entropy(clip.cosine_logits(&images, &text)?, batch.labels)
    }
}
