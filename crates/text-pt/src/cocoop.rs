//! CoCoOp: a context that each image shifts (Zhou et al., CVPR 2022, arXiv 2203.05557).
//!
//! A small network, the Meta-Net, maps the image's unit feature `v` to one vector that is added to every context vector:
//! `π(v) = W₂·relu(W₁·v + b₁) + b₂`, `ctx(v) = [ctx₁ + π(v), ..., ctx_M + π(v)]` and
//! `p(y|x) = softmax_y( scale · cos(f(x), g([ctx(v), name_y])) )` (eq. 3). `ctx` and the Meta-Net are learned by cross
//! entropy. The price: the text tower runs once per class and image, also for prediction.
//!
//! # Differs from the authors' code
//! - What is learned and its gradient stay in f32 whatever the towers' storage; theirs trains in f16 by default, without
//!   loss scaling, where small gradients vanish.
//! - Initial words whose number of tokens differs from `n_ctx` are an error; theirs counts words and takes any `n_ctx`.
//! - Without initial words `n_ctx` defaults to 4, the number of the shipped settings; their bare code has 16.
//! - The Meta-Net starts from our own generator, evenly from ±1/√in as PyTorch's `Linear`.
//! - Images are seen without random crops unless `train.augment = "crop_flip"` asks for the authors' transform.

use std::collections::BTreeMap;

use candle_core::Tensor;
use cliptune_core::checkpoint::TorchState;
use cliptune_core::context::{self, Context};
use cliptune_core::layers::Affine;
use cliptune_core::method::{
    self, AnyMethod, Classifier, Entry, Imported, Method, Paper, Predictor,
};
use cliptune_core::prompt::{ClassTokenPosition, ClassTokens};
use cliptune_core::prompt_file::PromptFile;
use cliptune_core::train::{self, Batch, Loss, Objective, Recipe, Step};
use cliptune_core::{
    Classes, Clip, Error, ImageBatch, ImageNeeds, Labelled, Params, Result, Run, ops,
};
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// The registry's entry.
pub const ENTRY: Entry = Entry {
    slug: "cocoop",
    name: "CoCoOp",
    family: "text-pt",
    paper: Paper {
        title: "Conditional Prompt Learning for Vision-Language Models",
        authors: "Zhou, Yang, Loy, Liu",
        venue: "CVPR 2022",
        arxiv: "2203.05557",
        code: "KaiyangZhou/CoOp@ff61507",
    },
    summary: "CoOp's context, shifted for every image by a small network that sees the image's feature; meant to keep what was learned useful for new classes.",
    learns: "ctx: n_ctx vectors of the text tower's width; meta_net: two linear layers, a sixteenth of the joint width between them",
    cost: "text tower forward and backward for every class and image at each step, forward for every class and image when predicting; images are encoded once",
    needs: ImageNeeds::GlobalFeatures,
    defaults: method::defaults_of::<CoCoOpConfig>,
    configure: |settings| Ok(Box::new(CoCoOpConfig::read(settings)?)),
    load: |file, clip| Ok(Box::new(CoCoOp::load(file, clip)?)),
    import: Some(|state, settings, clip, classes| {
        let config = CoCoOpConfig::of_checkpoint(state, settings, clip)?;
        let predictor = CoCoOp::with_tensors(&config, clip, classes, 0, &state.tensors)?;
        Ok(Imported {
            config: AnyMethod::config(&config),
            predictor: Box::new(predictor),
        })
    }),
};

/// Settings of [`CoCoOp`]; the defaults are the paper's.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct CoCoOpConfig {
    /// Context tokens per prompt, at least 1 (paper: M). `None`: as many as `ctx_init` has tokens, else 4.
    pub n_ctx: Option<usize>,
    /// Words to start from, one token each; `None` or empty draws from N(0, 0.02²).
    pub ctx_init: Option<String>,
    /// How it is trained: 10 epochs, one image a step. Larger batches make fewer steps, for which the paper gives no rate.
    pub train: Recipe,
}

impl Default for CoCoOpConfig {
    fn default() -> Self {
        Self {
            n_ctx: None,
            ctx_init: Some("a photo of a".into()),
            train: Recipe {
                epochs: Some(10),
                batch_size: 1,
                ..Recipe::default()
            },
        }
    }
}

impl CoCoOpConfig {
    /// Context tokens without initial words (paper: M = 4).
    pub const N_CTX: usize = 4;

    /// Settings from a value whose missing keys take their defaults.
    ///
    /// # Errors
    /// [`Error::Config`] naming the key.
    pub fn read(settings: &Value) -> Result<Self> {
        let config: Self = method::read_config(ENTRY.slug, settings)?;
        config.check()?;
        Ok(config)
    }

    /// `settings` completed by the shape of a checkpoint's context.
    fn of_checkpoint(state: &TorchState, settings: &Value, clip: &Clip) -> Result<Self> {
        let mut config = Self::read(settings)?;
        config.n_ctx = Some(context::shared_in(state, clip.text())?);
        // What the context started from no longer matters unless the caller says it.
        if settings.get("ctx_init").is_none() {
            config.ctx_init = None;
        }
        Ok(config)
    }

    /// Refuses settings that cannot be used.
    ///
    /// # Errors
    /// [`Error::Config`] naming the key.
    pub fn check(&self) -> Result<()> {
        context::check(self.n_ctx)?;
        self.train.check()
    }
}

impl Method for CoCoOpConfig {
    type Data = Labelled;
    type Fitted = CoCoOp;

    fn fit(&self, clip: &Clip, data: &Labelled, run: &mut Run) -> Result<CoCoOp> {
        self.check()?;
        data.check()?;
        let mut cocoop = CoCoOp::new(self, clip, &data.classes, run.seed)?;
        let settings = serde_json::to_value(self).unwrap_or(Value::Null);
        cocoop.history = train::train(&mut cocoop, clip, data, &self.train, &settings, run)?;
        Ok(cocoop)
    }
}

/// The network from an image's unit feature to what is added to the context.
#[derive(Debug)]
struct MetaNet {
    linear1: Affine,
    linear2: Affine,
}

impl MetaNet {
    fn new(params: &mut Params, embed_dim: usize, width: usize) -> Result<Self> {
        let hidden = embed_dim / 16;
        if hidden == 0 {
            return Err(Error::Data(format!(
                "the joint space has {embed_dim} dimensions; the Meta-Net has a sixteenth of them in its middle and needs at least 16"
            )));
        }
        Ok(Self {
            linear1: Affine::new(params, "meta_net.linear1", (hidden, embed_dim))?,
            linear2: Affine::new(params, "meta_net.linear2", (width, hidden))?,
        })
    }

    /// `(batch, embed_dim)` → `(batch, width)`.
    fn forward(&self, features: &Tensor) -> Result<Tensor> {
        self.linear2
            .forward(&self.linear1.forward(features)?.relu()?)
    }
}

/// A learned context and the network that shifts it.
#[derive(Debug)]
pub struct CoCoOp {
    /// `(n_ctx, width)`.
    context: Context,
    meta_net: MetaNet,
    params: Params,
    history: train::History,
}

impl CoCoOp {
    /// A context and a Meta-Net at their start. The Meta-Net does not start at zero: the first prompts are shifted already.
    ///
    /// # Errors
    /// [`Error::Config`] for contradicting settings, [`Error::PromptTooLong`] if a class name leaves no room,
    /// [`Error::Data`] if the joint space has fewer than 16 dimensions.
    pub fn new(config: &CoCoOpConfig, clip: &Clip, classes: &Classes, seed: u64) -> Result<Self> {
        config.check()?;
        let mut params = Params::new(seed);
        let context = match context::initial_words(config.ctx_init.as_deref()) {
            Some(words) => Context::of_words(&mut params, clip.text(), &words, config.n_ctx)?,
            None => {
                let n_ctx = config.n_ctx.unwrap_or(CoCoOpConfig::N_CTX);
                Context::random(&mut params, clip.text(), n_ctx)?
            }
        };
        let embed_dim = clip.image().embed_dim();
        let meta_net = MetaNet::new(&mut params, embed_dim, clip.text().width())?;
        // Refuses names that are too long before any work.
        ClassTokens::new(clip.text(), classes)?.sentences(context.words())?;
        Ok(Self {
            context,
            meta_net,
            params,
            history: train::History::default(),
        })
    }

    /// From a prompt file of this method.
    ///
    /// # Errors
    /// [`Error::Prompt`], [`Error::Shape`] or [`Error::Config`] if the file does not fit itself or the weights.
    pub fn load(file: &PromptFile, clip: &Clip) -> Result<Self> {
        let config = CoCoOpConfig::read(&file.config)?;
        Self::with_tensors(&config, clip, &file.classes, file.seed, &file.tensors)
    }

    /// A context and a Meta-Net with given values instead of drawn ones, under the authors' keys: `ctx`,
    /// `meta_net.linear1.weight`, ... What else a checkpoint holds (`token_prefix`, `token_suffix`) is rebuilt from `classes`.
    ///
    /// # Errors
    /// As [`CoCoOp::new`] and [`Params::load`].
    pub fn with_tensors(
        config: &CoCoOpConfig,
        clip: &Clip,
        classes: &Classes,
        seed: u64,
        tensors: &BTreeMap<String, Tensor>,
    ) -> Result<Self> {
        let cocoop = Self::new(config, clip, classes, seed)?;
        cocoop.params.load(tensors)?;
        Ok(cocoop)
    }

    /// How the training went; empty for a loaded context.
    pub fn history(&self) -> &train::History {
        &self.history
    }

    /// What the Meta-Net adds to the context of each image, `(batch, width)`, from unit features `(batch, embed_dim)`.
    ///
    /// # Errors
    /// [`Error::Shape`] if the features have another width.
    pub fn meta_bias(&self, unit_features: &Tensor) -> Result<Tensor> {
        self.meta_net.forward(unit_features)
    }

    /// Each image's own context, `(batch, n_ctx, width)`, from unit features.
    ///
    /// # Errors
    /// As [`CoCoOp::meta_bias`].
    pub fn contexts(&self, unit_features: &Tensor) -> Result<Tensor> {
        let bias = self.meta_bias(unit_features)?.unsqueeze(1)?;
        Ok(self.context.tensor().unsqueeze(0)?.broadcast_add(&bias)?)
    }

    /// Raw text features of all classes under each of `contexts (batch, n_ctx, width)`, `(batch, n_cls, embed_dim)`.
    ///
    /// # Errors
    /// [`Error::PromptTooLong`], [`Error::Shape`].
    pub fn text_features(
        &self,
        clip: &Clip,
        classes: &ClassTokens,
        contexts: &Tensor,
    ) -> Result<Tensor> {
        let words = self.context.words();
        let prompts = classes.weave_each(contexts, words, ClassTokenPosition::End)?;
        let features = clip.text().encode(&prompts)?;
        let (batch, embed_dim) = (contexts.dim(0)?, features.dim(1)?);
        Ok(features.reshape((batch, classes.len(), embed_dim))?)
    }

    /// `(batch, n_cls)` for unit features and the contexts made of them.
    fn logits(
        &self,
        clip: &Clip,
        classes: &ClassTokens,
        unit_features: &Tensor,
        contexts: &Tensor,
    ) -> Result<Tensor> {
        let text = self.text_features(clip, classes, contexts)?;
        let text = ops::unit_length(&text, "a text feature")?;
        ops::own_dots(&(unit_features * clip.scale())?, &text)
    }
}

/// The Meta-Net and the text tower run for every image.
struct PerImage<'a> {
    cocoop: &'a CoCoOp,
    clip: &'a Clip,
    classes: ClassTokens,
}

impl Classifier for PerImage<'_> {
    fn logits(&self, images: &ImageBatch) -> Result<Tensor> {
        let unit = ops::unit_length(images.features()?, "an image feature")?;
        // One image at a time: memory does not grow with the batch, and neither do the bits depend on it.
        ops::row_by_row(&unit, |_, unit| {
            let contexts = self.cocoop.contexts(unit)?.detach();
            self.cocoop
                .logits(self.clip, &self.classes, unit, &contexts)
        })
    }
}

impl Predictor for CoCoOp {
    fn needs(&self) -> ImageNeeds {
        ImageNeeds::GlobalFeatures
    }

    fn classifier<'a>(
        &'a self,
        clip: &'a Clip,
        classes: &Classes,
    ) -> Result<Box<dyn Classifier + 'a>> {
        let classes = ClassTokens::new(clip.text(), classes)?;
        classes.sentences(self.context.words())?;
        Ok(Box::new(PerImage {
            cocoop: self,
            clip,
            classes,
        }))
    }

    fn tensors(&self) -> Result<Vec<(String, Tensor)>> {
        self.params.tensors()
    }

    fn training(&self) -> Option<&train::History> {
        Some(&self.history).filter(|history| history.kept > 0)
    }
}

impl Objective for CoCoOp {
    fn params(&self) -> &Params {
        &self.params
    }

    fn loss(&self, clip: &Clip, batch: &Batch<'_>, _: Step) -> Result<Loss> {
        let unit = ops::unit_length(batch.images.features()?, "an image feature")?;
        let contexts = self.contexts(&unit)?;
        Loss::cross_entropy(
            self.logits(clip, batch.classes, &unit, &contexts)?,
            batch.labels,
        )
    }
}
