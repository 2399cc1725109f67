//! CoOp: learned words around a fixed class name (Zhou et al., IJCV 2022, arXiv 2109.01134).
//!
//! `p(y|x) = softmax_y( scale · cos(f(x), g([ctx, name_y])) )`; only `ctx` is learned (eq. 2), by cross entropy.
//!
//! # Differs from the authors' code
//! - The context and its gradient stay in f32 whatever the towers' storage; theirs trains in f16 by default.
//! - Initial words together with class-specific contexts are an error; theirs drops the second silently.
//! - Initial words whose number of tokens differs from `n_ctx` are an error; theirs counts words and takes any `n_ctx`.
//! - Images are seen without random crops unless `train.augment = "crop_flip"` asks for the authors' transform, so that the
//!   frozen image tower runs once per image.
//! - Text features are encoded once for an evaluation, not once per batch (equal numbers).

use std::collections::BTreeMap;

use candle_core::Tensor;
use cliptune_core::checkpoint::TorchState;
use cliptune_core::context::{self, Context};
use cliptune_core::method::{
    self, AnyMethod, Classifier, Entry, Imported, Method, Paper, Predictor, TextClassifier,
};
use cliptune_core::prompt::{ClassTokenPosition, ClassTokens, Prompts};
use cliptune_core::prompt_file::PromptFile;
use cliptune_core::train::{self, Batch, Loss, Objective, Recipe, Step};
use cliptune_core::{Classes, Clip, Error, ImageNeeds, Labelled, Params, Result, Run, ops};
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// The registry's entry.
pub const ENTRY: Entry = Entry {
    slug: "coop",
    name: "CoOp",
    family: "text-pt",
    paper: Paper {
        title: "Learning to Prompt for Vision-Language Models",
        authors: "Zhou, Yang, Loy, Liu",
        venue: "IJCV 2022",
        arxiv: "2109.01134",
        code: "KaiyangZhou/CoOp@ff61507",
    },
    summary: "Replaces the words around the class name by free vectors in the text tower's input space, learned by cross entropy on a few labelled images.",
    learns: "ctx: n_ctx vectors of the text tower's width, shared by all classes or one set per class",
    cost: "text tower forward and backward for every class at each step; images are encoded once",
    needs: ImageNeeds::GlobalFeatures,
    defaults: method::defaults_of::<CoOpConfig>,
    configure: |settings| Ok(Box::new(CoOpConfig::read(settings)?)),
    load: |file, clip| Ok(Box::new(CoOp::load(file, clip)?)),
    import: Some(|state, settings, clip, classes| {
        let config = CoOpConfig::of_checkpoint(state, settings, clip)?;
        let predictor = Box::new(CoOp::with_tensors(
            &config,
            clip,
            classes,
            0,
            &state.tensors,
        )?);
        Ok(Imported {
            config: AnyMethod::config(&config),
            predictor,
        })
    }),
};

/// Settings of [`CoOp`]; the defaults are the paper's.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct CoOpConfig {
    /// Context tokens per prompt, at least 1 (paper: M). `None`: as many as `ctx_init` has tokens, else 16.
    pub n_ctx: Option<usize>,
    /// Words to start from, one token each (`a photo of a`); `None` draws from N(0, 0.02²).
    pub ctx_init: Option<String>,
    /// One context per class instead of one for all (paper: CSC).
    pub class_specific: bool,
    /// Where the class name sits among the context tokens.
    pub class_token_position: ClassTokenPosition,
    /// How it is trained.
    pub train: Recipe,
}

impl CoOpConfig {
    /// Context tokens without initial words (paper: M = 16).
    pub const N_CTX: usize = 16;

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
        let (contexts, n_ctx) = context::sizes_in(state, clip.text())?;
        config.n_ctx = Some(n_ctx);
        config.class_specific |= contexts.is_some();
        Ok(config)
    }

    /// Refuses settings that contradict each other.
    ///
    /// # Errors
    /// [`Error::Config`] naming the key.
    pub fn check(&self) -> Result<()> {
        context::check(self.n_ctx)?;
        if self.class_specific && self.words().is_some() {
            let expected =
                "initial words give one context for all classes; leave one of the two out";
            return Err(Error::config(
                "class_specific",
                "true with ctx_init",
                expected,
            ));
        }
        self.train.check()
    }

    /// The initial words, spaces for underscores, if there are any.
    fn words(&self) -> Option<String> {
        context::initial_words(self.ctx_init.as_deref())
    }
}

impl Method for CoOpConfig {
    type Data = Labelled;
    type Fitted = CoOp;

    fn fit(&self, clip: &Clip, data: &Labelled, run: &mut Run) -> Result<CoOp> {
        self.check()?;
        data.check()?;
        let mut coop = CoOp::new(self, clip, &data.classes, run.seed)?;
        let settings = serde_json::to_value(self).unwrap_or(Value::Null);
        coop.history = train::train(&mut coop, clip, data, &self.train, &settings, run)?;
        Ok(coop)
    }
}

/// A learned context.
#[derive(Debug)]
pub struct CoOp {
    /// `(n_ctx, width)`, or `(n_cls, n_ctx, width)` if class-specific.
    context: Context,
    params: Params,
    position: ClassTokenPosition,
    history: train::History,
}

impl CoOp {
    /// A context at its start.
    ///
    /// # Errors
    /// [`Error::Config`] for contradicting settings, [`Error::PromptTooLong`] if a class name leaves no room.
    pub fn new(config: &CoOpConfig, clip: &Clip, classes: &Classes, seed: u64) -> Result<Self> {
        config.check()?;
        let mut params = Params::new(seed);
        let context = match config.words() {
            Some(words) => Context::of_words(&mut params, clip.text(), &words, config.n_ctx)?,
            None => {
                let n_ctx = config.n_ctx.unwrap_or(CoOpConfig::N_CTX);
                match config.class_specific {
                    true => Context::per_class(&mut params, clip.text(), classes, n_ctx)?,
                    false => Context::random(&mut params, clip.text(), n_ctx)?,
                }
            }
        };
        let coop = Self {
            context,
            params,
            position: config.class_token_position,
            history: train::History::default(),
        };
        coop.prompts(&ClassTokens::new(clip.text(), classes)?)?;
        Ok(coop)
    }

    /// From a prompt file of this method.
    ///
    /// # Errors
    /// [`Error::Prompt`], [`Error::Shape`] or [`Error::Config`] if the file does not fit itself or the weights.
    pub fn load(file: &PromptFile, clip: &Clip) -> Result<Self> {
        Self::with_tensors(
            &CoOpConfig::read(&file.config)?,
            clip,
            &file.classes,
            file.seed,
            &file.tensors,
        )
    }

    /// From a checkpoint of the authors' code (`prompt_learner/model.pth.tar-*`). Its `token_prefix` and `token_suffix` are
    /// rebuilt from `classes`, so a shared context serves any class names.
    ///
    /// The checkpoint does not say where the class name stood: `settings` do, and may leave out the rest.
    ///
    /// # Errors
    /// [`Error::Prompt`] if there is no `ctx`, [`Error::Shape`] if it does not fit the weights or the classes.
    pub fn import(
        state: &TorchState,
        settings: &Value,
        clip: &Clip,
        classes: &Classes,
    ) -> Result<Self> {
        let config = CoOpConfig::of_checkpoint(state, settings, clip)?;
        Self::with_tensors(&config, clip, classes, 0, &state.tensors)
    }

    /// A context with given values instead of drawn ones.
    ///
    /// # Errors
    /// As [`CoOp::new`] and [`Params::load`].
    pub fn with_tensors(
        config: &CoOpConfig,
        clip: &Clip,
        classes: &Classes,
        seed: u64,
        tensors: &BTreeMap<String, Tensor>,
    ) -> Result<Self> {
        let coop = Self::new(config, clip, classes, seed)?;
        coop.params.load(tensors)?;
        Ok(coop)
    }

    /// How the training went; empty for a loaded context.
    pub fn history(&self) -> &train::History {
        &self.history
    }

    fn prompts(&self, classes: &ClassTokens) -> Result<Prompts> {
        self.context.prompts(classes, self.position)
    }

    /// Raw text features of the classes, `(n_cls, embed_dim)`; gradients flow to the context.
    ///
    /// # Errors
    /// [`Error::PromptTooLong`]; [`Error::Prompt`] if class-specific contexts meet another number of classes.
    pub fn text_features(&self, clip: &Clip, classes: &ClassTokens) -> Result<Tensor> {
        clip.text().encode(&self.prompts(classes)?)
    }
}

impl Predictor for CoOp {
    fn needs(&self) -> ImageNeeds {
        ImageNeeds::GlobalFeatures
    }

    fn classifier<'a>(
        &'a self,
        clip: &'a Clip,
        classes: &Classes,
    ) -> Result<Box<dyn Classifier + 'a>> {
        self.context.check_serves(classes)?;
        let features = self
            .text_features(clip, &ClassTokens::new(clip.text(), classes)?)?
            .detach();
        Ok(Box::new(TextClassifier::new(
            clip,
            ops::unit_length(&features, "a text feature")?,
        )))
    }

    fn tensors(&self) -> Result<Vec<(String, Tensor)>> {
        self.params.tensors()
    }

    fn training(&self) -> Option<&train::History> {
        Some(&self.history).filter(|history| history.kept > 0)
    }
}

impl Objective for CoOp {
    fn params(&self) -> &Params {
        &self.params
    }

    fn loss(&self, clip: &Clip, batch: &Batch<'_>, _: Step) -> Result<Loss> {
        let text_features = self.text_features(clip, batch.classes)?;
        Loss::cross_entropy(
            clip.cosine_logits(batch.images.features()?, &text_features)?,
            batch.labels,
        )
    }
}
