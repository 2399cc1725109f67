//! UPT: one set of prompts that a small network turns into text prompts and image prompts (Zang et al., "Unified Vision and
//! Language Prompt Learning", arXiv 2210.07225).
//!
//! Shared vectors U pass a block of attention and two affine maps,
//! `H = LN1(U + A(U))`, `Û = H + W2·relu(W1·LN2(H) + b1) + b2`; the first rows of Û are the text prompts, the others become
//! image prompts through one more affine map. All of it is learned by cross entropy; afterwards the prompts are constants.
//!
//! # Differs from the authors' code
//! - Everything learned stays in f32; theirs is f16, in which most of the weight decay vanishes.
//! - `interaction = "attention"` lets the prompts see one another, as the paper describes; the default is what the code does:
//!   its attention takes the sequence for a batch.
//! - The released trainer calls a function that is not there; the shallow one beside it stands in, as its notes say.
//! - The place where text prompts end is `n_ctx`; theirs is the literal 4.
//! - `depth = "deep"` gives every block of the image tower prompts of its own, in the order of their deep function; their notes
//!   name such variants, but the release has none.

use candle_core::Tensor;
use cliptune_core::checkpoint::TorchState;
use cliptune_core::layers::{Affine, Norm, SelfAttention};
use cliptune_core::learned::{self, Learner};
use cliptune_core::method::{self, Classifier, Entry, Method, Paper, Settings};
use cliptune_core::prompt::{ClassTokenPosition, ClassTokens, placeholder};
use cliptune_core::rng::Rng;
use cliptune_core::train::{Augment, Batch, Loss, Objective, Recipe, Step};
use cliptune_core::visual_prompt::{Tokens, VisualPrompts};
use cliptune_core::{
    Classes, Clip, Error, ImageNeeds, Labelled, Learned, Param, Params, Result, Run, context,
};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::coupling::{self, Interaction};
use crate::sides::{self, PromptedClassifier};

/// The registry's entry.
pub const ENTRY: Entry = Entry {
    slug: "upt",
    name: "UPT",
    family: "multimodal-pt",
    paper: Paper {
        title: "Unified Vision and Language Prompt Learning",
        authors: "Zang, Li, Zhou, Huang, Loy",
        venue: "arXiv 2022",
        arxiv: "2210.07225",
        code: "yuhangzang/UPT@3d1640f",
    },
    summary: "Learns one small set of prompts and a network that turns them into text prompts and image prompts.",
    learns: "uni_ctx: twice n_ctx vectors of the text tower's width; self_attn, norm1, norm2, linear1, linear2: a block that they pass; mlp: a linear map to the image tower's width",
    cost: "both towers forward and backward at each step: the text tower for every class, the image tower for every image",
    needs: ImageNeeds::Pixels,
    defaults: method::defaults_of::<UptConfig>,
    configure: method::configure::<UptConfig>,
    load: learned::load::<Upt>,
    import: Some(learned::import::<Upt>),
};

/// Which blocks of the image tower get prompts of their own.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Depth {
    /// Prompts join before the first LayerNorm and stay.
    #[default]
    Shallow,
    /// Every block's prompts replace those of the block before; they pass no LayerNorm on the way in.
    Deep,
}

/// Settings of [`Upt`]; the defaults are the authors'.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct UptConfig {
    /// Text prompts, and image prompts of each block, at least 1.
    pub n_ctx: usize,
    /// Words that stand for the text prompts where the sentence is tokenised, at least `n_ctx` tokens of them; more stay in
    /// front of the name. Nothing starts from them.
    pub ctx_init: Option<String>,
    /// Where the class name sits among the text prompts.
    pub class_token_position: ClassTokenPosition,
    /// Which blocks of the image tower get prompts of their own.
    pub depth: Depth,
    /// Whether the prompts see one another.
    pub interaction: Interaction,
    /// Heads of the attention; they divide the text tower's width.
    pub heads: usize,
    /// Share of the block's numbers that a training step drops, below 1.
    pub dropout: f64,
    /// How it is trained.
    pub train: Recipe,
}

impl Default for UptConfig {
    fn default() -> Self {
        Self {
            n_ctx: 4,
            ctx_init: None,
            class_token_position: ClassTokenPosition::End,
            depth: Depth::Shallow,
            interaction: Interaction::None,
            heads: 1,
            dropout: 0.1,
            // The image tower runs at every step whatever the view.
            train: Recipe {
                augment: Augment::CropFlip,
                ..Recipe::default()
            },
        }
    }
}

impl Settings for UptConfig {
    const SLUG: &'static str = ENTRY.slug;

    fn check(&self) -> Result<()> {
        context::check(self.n_ctx)?;
        if self.heads == 0 {
            return Err(Error::config("heads", 0, "at least one head"));
        }
        coupling::check_rate("dropout", self.dropout)?;
        self.train.check()
    }
}

impl Method for UptConfig {
    type Data = Labelled;
    type Fitted = Learned<Upt>;

    fn fit(&self, clip: &Clip, data: &Labelled, run: &mut Run) -> Result<Learned<Upt>> {
        Learned::fit(self, &self.train, clip, data, run)
    }
}

/// Factors that a pass through the block multiplies by: 0 for what is dropped, else 1 / (1 − rate).
#[derive(Clone, Debug)]
pub struct Kept {
    /// On the attention's weights, `(tokens, heads, 1, 1)`, or with [`Interaction::Attention`] `(1, heads, tokens, tokens)`.
    pub attention: Tensor,
    /// On what the attention gives, `(tokens, width)`.
    pub residual1: Tensor,
    /// Between the two maps, `(tokens, width)`.
    pub hidden: Tensor,
    /// On what the second map gives, `(tokens, width)`.
    pub residual2: Tensor,
}

/// What a training step keeps: the block runs twice, for the text prompts and for the image prompts.
#[derive(Clone, Debug)]
pub struct KeptOfStep {
    /// On the way to the text prompts.
    pub text: Kept,
    /// On the way to the image prompts.
    pub visual: Kept,
}

/// The prompts of both towers.
#[derive(Clone, Debug)]
pub struct UptPrompts {
    /// `(n_ctx, text width)`.
    pub text: Tensor,
    /// `(n_ctx, vision width)`; deep, `(n_ctx · blocks, vision width)`, the blocks of a prompt one below the other.
    pub visual: Tensor,
}

/// Shared prompts and the network that makes the towers' prompts of them.
#[derive(Debug)]
pub struct Upt {
    /// `(1, n_ctx + image prompts, text width)`.
    uni_ctx: Param,
    attention: SelfAttention,
    norms: [Norm; 2],
    maps: [Affine; 2],
    /// To the image tower's width.
    to_vision: Affine,
    /// Blocks of the image tower with prompts of their own; `None`: they join before the first LayerNorm.
    deep: Option<usize>,
    n_ctx: usize,
    words: String,
    position: ClassTokenPosition,
    interaction: Interaction,
    heads: usize,
    dropout: f64,
}

impl Upt {
    /// What the block makes of the shared prompts, `(tokens, text width)`.
    ///
    /// # Errors
    /// If `kept` is of other shapes.
    pub fn block(&self, kept: Option<&Kept>) -> Result<Tensor> {
        let keep = |x: Tensor, of: fn(&Kept) -> &Tensor| -> Result<Tensor> {
            Ok(match kept {
                Some(kept) => (x * of(kept))?,
                None => x,
            })
        };
        let prompts = self.uni_ctx.tensor().squeeze(0)?;
        let weights = kept.map(|kept| &kept.attention);
        let sequences = self.interaction.sequences(&prompts)?;
        let seen = self.attention.forward(&sequences, weights)?;
        let seen = keep(seen.reshape(prompts.shape())?, |kept| &kept.residual1)?;
        let first = self.norms[0].forward(&(prompts + seen)?)?;
        let hidden = self.maps[0].forward(&self.norms[1].forward(&first)?)?;
        let hidden = keep(hidden.relu()?, |kept| &kept.hidden)?;
        let second = keep(self.maps[1].forward(&hidden)?, |kept| &kept.residual2)?;
        Ok((first + second)?)
    }

    /// The prompts of both towers; gradients flow to everything that is learned.
    ///
    /// # Errors
    /// As [`Upt::block`].
    pub fn prompts(&self, kept: Option<&KeptOfStep>) -> Result<UptPrompts> {
        let for_text = self.block(kept.map(|kept| &kept.text))?;
        // The second pass differs from the first only in what it drops.
        let for_vision = match kept {
            Some(kept) => self.block(Some(&kept.visual))?,
            None => for_text.clone(),
        };
        let others = for_vision.dim(0)? - self.n_ctx;
        let for_vision = for_vision.narrow(0, self.n_ctx, others)?;
        Ok(UptPrompts {
            text: for_text.narrow(0, 0, self.n_ctx)?,
            visual: self.to_vision.forward(&for_vision.contiguous()?)?,
        })
    }

    /// Raw text features of the classes, `(n_cls, embed_dim)`.
    ///
    /// # Errors
    /// [`Error::PromptTooLong`].
    pub fn text_features(
        &self,
        clip: &Clip,
        classes: &ClassTokens,
        prompts: &UptPrompts,
    ) -> Result<Tensor> {
        let woven = classes.weave(&prompts.text, &self.words, self.position)?;
        clip.text().encode(&woven)
    }

    /// Raw image features, `(batch, 3, side, side)` → `(batch, embed_dim)`.
    ///
    /// # Errors
    /// [`Error::Shape`] if the images are not of the tower's resolution.
    pub fn image_features(
        &self,
        clip: &Clip,
        images: &Tensor,
        prompts: &UptPrompts,
    ) -> Result<Tensor> {
        let declared = self.declared(prompts.visual.clone())?;
        clip.image().encode_prompted(images, &declared)
    }

    /// Image prompts as the tower takes them.
    fn declared(&self, visual: Tensor) -> Result<VisualPrompts> {
        let mut declared = VisualPrompts::new();
        let Some(blocks) = self.deep else {
            declared.join_before_ln_pre(Tokens::Shared(visual));
            return Ok(declared);
        };
        let by_prompt = visual.reshape((self.n_ctx, blocks, ()))?;
        for block in 0..blocks {
            let tokens = by_prompt.narrow(1, block, 1)?.squeeze(1)?;
            declared.replace(block, Tokens::Shared(tokens));
        }
        Ok(declared)
    }

    /// What a step keeps; nothing is dropped at a rate of 0.
    fn kept(&self, step: Step) -> Result<Option<KeptOfStep>> {
        if self.dropout == 0.0 {
            return Ok(None);
        }
        let (_, tokens, width) = self.uni_ctx.tensor().dims3()?;
        let (sequences, length) = self.interaction.layout(tokens);
        let attention = (sequences, self.heads, length, length);
        let counters = [step.epoch as u64, step.index as u64];
        let pass = |name: &str| -> Result<Kept> {
            let mut rng = Rng::stream(step.seed, &format!("dropout/{name}"), &counters);
            let rate = self.dropout;
            Ok(Kept {
                attention: coupling::kept(&mut rng, attention, rate)?,
                residual1: coupling::kept(&mut rng, (tokens, width), rate)?,
                hidden: coupling::kept(&mut rng, (tokens, width), rate)?,
                residual2: coupling::kept(&mut rng, (tokens, width), rate)?,
            })
        };
        Ok(Some(KeptOfStep {
            text: pass("text")?,
            visual: pass("visual")?,
        }))
    }

    /// The loss of a batch with given dropout.
    ///
    /// # Errors
    /// As [`Objective::loss`].
    pub fn loss_with(
        &self,
        clip: &Clip,
        batch: &Batch<'_>,
        kept: Option<&KeptOfStep>,
    ) -> Result<Loss> {
        let prompts = self.prompts(kept)?;
        let text = self.text_features(clip, batch.classes, &prompts)?;
        let images = self.image_features(clip, batch.images.pixels_or_patches()?, &prompts)?;
        Loss::cross_entropy(clip.cosine_logits(&images, &text)?, batch.labels)
    }
}

impl Learner for Upt {
    type Config = UptConfig;

    fn start(
        config: &UptConfig,
        clip: &Clip,
        classes: &Classes,
        params: &mut Params,
    ) -> Result<Self> {
        let (blocks, vision_width) = clip.arch().vit_sizes()?;
        let (n_ctx, width) = (config.n_ctx, clip.text().width());
        let words = context::initial_words(config.ctx_init.as_deref());
        let words = words.unwrap_or_else(|| placeholder(n_ctx));
        // Refuses names that are too long, and words that are too few, before any work.
        ClassTokens::new(clip.text(), classes)?.woven(&words, n_ctx)?;
        let deep = (config.depth == Depth::Deep).then_some(blocks);
        let shared = (1, n_ctx + n_ctx * deep.unwrap_or(1), width);
        let square = (width, width);
        Ok(Self {
            uni_ctx: params.normal("uni_ctx", shared, sides::STD)?,
            attention: SelfAttention::new(params, "self_attn", width, config.heads)?,
            norms: [
                Norm::new(params, "norm1", width)?,
                Norm::new(params, "norm2", width)?,
            ],
            maps: [
                Affine::new(params, "linear1", square)?,
                Affine::new(params, "linear2", square)?,
            ],
            to_vision: Affine::new(params, "mlp", (vision_width, width))?,
            deep,
            n_ctx,
            words,
            position: config.class_token_position,
            interaction: config.interaction,
            heads: config.heads,
            dropout: config.dropout,
        })
    }

    fn complete(config: &mut UptConfig, _: &Value, state: &TorchState, clip: &Clip) -> Result<()> {
        let [_, rows] = sides::leading_of(state, "uni_ctx")?;
        let parts = match config.depth {
            Depth::Shallow => 2,
            Depth::Deep => 1 + clip.arch().vit_sizes()?.0,
        };
        if rows == 0 || !rows.is_multiple_of(parts) {
            return Err(Error::Prompt(format!(
                "`uni_ctx` of the checkpoint holds {rows} vectors, which do not divide into {parts} equal parts, one for the text tower and the others for the image tower; is `depth` right?"
            )));
        }
        config.n_ctx = rows / parts;
        Ok(())
    }
}

impl Objective for Upt {
    fn needs(&self) -> ImageNeeds {
        ImageNeeds::Pixels
    }

    fn classifier<'a>(
        &'a self,
        clip: &'a Clip,
        classes: &Classes,
    ) -> Result<Box<dyn Classifier + 'a>> {
        let prompts = self.prompts(None)?;
        let classes = ClassTokens::new(clip.text(), classes)?;
        let text = self.text_features(clip, &classes, &prompts)?;
        let visual = self.declared(prompts.visual.detach())?;
        Ok(Box::new(PromptedClassifier::new(clip, visual, &text)?))
    }

    fn loss(&self, clip: &Clip, batch: &Batch<'_>, step: Step) -> Result<Loss> {
        self.loss_with(clip, batch, self.kept(step)?.as_ref())
    }
}
