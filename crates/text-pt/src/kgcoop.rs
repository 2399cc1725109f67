//! KgCoOp: CoOp held to hand-written knowledge (Yao, Zhang, Xu, CVPR 2023, arXiv 2303.13283).
//!
//! The farther the learned class features `t_i = g([ctx, name_i])` move from those of a hand-written sentence,
//! `w_i = g(template(name_i))`, the worse they serve new classes. So the distance is part of the loss (eq. 5):
//! `L = CE + w · (1 − mean over classes of cos(t_i, w_i))`, over all classes at every step, whatever images it sees.
//!
//! # Differs from the authors' code
//! - Their loss is the default; the paper's, the mean of `‖t_i − w_i‖²` over unit features, is `distance = "squared"`. It is
//!   twice the other at equal weight: their w = 8 is the paper's λ = 4.
//! - Any words of one token each can be the start, and `ctx_init` with another number of tokens than `n_ctx` is an error;
//!   theirs starts from "a photo of a" whatever the words are and drops `n_ctx` silently.
//! - Initial words together with class-specific contexts are an error; theirs drops the second silently.
//! - Targets and context are f32; theirs are f16, in which the penalty moves in steps of 5e-4.
//! - The dead tensors of their checkpoints (`bias_vectors`, `meta_net.*`) are read over and not written.
//! - Images are seen without random crops unless `train.augment = "crop_flip"` asks for the authors' transform.

use std::collections::BTreeMap;

use candle_core::Tensor;
use cliptune_core::checkpoint::TorchState;
use cliptune_core::context::{self, Context};
use cliptune_core::method::{
    self, AnyMethod, Classifier, Entry, Imported, Method, Paper, Predictor, TextClassifier,
};
use cliptune_core::prompt::{ClassTokenPosition, ClassTokens};
use cliptune_core::prompt_file::PromptFile;
use cliptune_core::templates::{self, Sentences};
use cliptune_core::train::{self, Batch, Loss, Objective, Recipe, Step};
use cliptune_core::{Classes, Clip, Error, ImageNeeds, Labelled, Params, Result, Run, ops};
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// The registry's entry.
pub const ENTRY: Entry = Entry {
    slug: "kgcoop",
    name: "KgCoOp",
    family: "text-pt",
    paper: Paper {
        title: "Visual-Language Prompt Tuning with Knowledge-guided Context Optimization",
        authors: "Yao, Zhang, Xu",
        venue: "CVPR 2023",
        arxiv: "2303.13283",
        code: "htyao89/KgCoOp@c43ccc3",
    },
    summary: "CoOp whose class features are held close to those of a hand-written sentence, so that the context stays useful for new classes.",
    learns: "ctx: n_ctx vectors of the text tower's width, shared by all classes or one set per class",
    cost: "text tower forward and backward for every class at each step, as CoOp; images and hand-written sentences are encoded once",
    needs: ImageNeeds::GlobalFeatures,
    defaults: method::defaults_of::<KgCoOpConfig>,
    configure: |settings| Ok(Box::new(KgCoOpConfig::read(settings)?)),
    load: |file, clip| Ok(Box::new(KgCoOp::load(file, clip)?)),
    import: Some(|state, settings, clip, classes| {
        let config = KgCoOpConfig::of_checkpoint(state, settings, clip)?;
        let predictor = KgCoOp::with_tensors(&config, clip, classes, 0, &state.tensors)?;
        Ok(Imported {
            config: AnyMethod::config(&config),
            predictor: Box::new(predictor),
        })
    }),
};

/// How far a learned class feature is from its hand-written one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Distance {
    /// `1 − cos`, the authors' code.
    #[default]
    Cosine,
    /// `‖t − w‖²` of unit features, the paper: twice the other.
    Squared,
}

/// Settings of [`KgCoOp`]; the defaults are the authors' scripts'.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct KgCoOpConfig {
    /// Context tokens per prompt, at least 1 (paper: M). `None`: as many as `ctx_init` has tokens, else 4.
    pub n_ctx: Option<usize>,
    /// Words to start from, one token each; `None` or empty draws from N(0, 0.02²).
    pub ctx_init: Option<String>,
    /// One context per class instead of one for all (paper: CSC); needs `ctx_init = ""`.
    pub class_specific: bool,
    /// Weight of the distance (paper: λ), at least 0; 0 is CoOp.
    pub w: f64,
    /// Which distance.
    pub distance: Distance,
    /// The hand-written sentence, `{}` standing for the class name; `None` takes the data set's, else `a photo of a {}.`
    pub template: Option<String>,
    /// Takes the sentence that the authors use for this data set (`OxfordPets` or `oxford_pets`).
    pub dataset: Option<String>,
    /// How it is trained: 100 epochs, 128 images a step.
    pub train: Recipe,
}

impl Default for KgCoOpConfig {
    fn default() -> Self {
        Self {
            n_ctx: None,
            ctx_init: Some("a photo of a".into()),
            class_specific: false,
            w: 8.0,
            distance: Distance::default(),
            template: None,
            dataset: None,
            train: Recipe {
                epochs: Some(100),
                batch_size: 128,
                ..Recipe::default()
            },
        }
    }
}

impl KgCoOpConfig {
    /// Context tokens without initial words.
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
        let (contexts, n_ctx) = context::sizes_in(state, clip.text())?;
        let mut config: Self = method::read_config(ENTRY.slug, settings)?;
        // What the context started from no longer matters unless the caller says it.
        if settings.get("ctx_init").is_none() {
            config.ctx_init = None;
        }
        config.n_ctx = Some(n_ctx);
        config.class_specific |= contexts.is_some();
        config.check()?;
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
            let found = "true with ctx_init";
            return Err(Error::config("class_specific", found, expected));
        }
        if !(self.w.is_finite() && self.w >= 0.0) {
            let expected = "a finite number of at least 0";
            return Err(Error::config("w", self.w, expected));
        }
        self.sentences()?;
        self.train.check()
    }

    fn words(&self) -> Option<String> {
        context::initial_words(self.ctx_init.as_deref())
    }

    /// The hand-written sentence that the class features are held to.
    ///
    /// # Errors
    /// [`Error::Config`] for a sentence without `{}`, for a data set without a sentence, or for both settings at once.
    pub fn sentences(&self) -> Result<Sentences> {
        let template = match (self.template.as_deref(), self.dataset.as_deref()) {
            (Some(template), None) => template,
            (None, None) => templates::DEFAULT,
            // The one data set for which the authors do not take CoOp's sentence.
            (None, Some(dataset)) if templates::id_of(dataset) == "dtd" => {
                "a photo of a {}, a type of texture."
            }
            (None, Some(dataset)) => templates::for_dataset(dataset)?,
            (Some(template), Some(_)) => {
                let expected = "either a template of your own or a data set's";
                return Err(Error::config("template", template, expected));
            }
        };
        Sentences::new(vec![template.to_owned()])
    }
}

impl Method for KgCoOpConfig {
    type Data = Labelled;
    type Fitted = KgCoOp;

    fn fit(&self, clip: &Clip, data: &Labelled, run: &mut Run) -> Result<KgCoOp> {
        self.check()?;
        data.check()?;
        let mut kgcoop = KgCoOp::new(self, clip, &data.classes, run.seed)?;
        let settings = serde_json::to_value(self).unwrap_or(Value::Null);
        kgcoop.history = train::train(&mut kgcoop, clip, data, &self.train, &settings, run)?;
        Ok(kgcoop)
    }
}

/// A learned context, and what it is held to while it learns.
#[derive(Debug)]
pub struct KgCoOp {
    /// `(n_ctx, width)`, or `(n_cls, n_ctx, width)` if class-specific.
    context: Context,
    params: Params,
    targets: Sentences,
    w: f64,
    distance: Distance,
    history: train::History,
}

impl KgCoOp {
    /// A context at its start.
    ///
    /// # Errors
    /// [`Error::Config`] for contradicting settings, [`Error::PromptTooLong`] if a class name leaves no room.
    pub fn new(config: &KgCoOpConfig, clip: &Clip, classes: &Classes, seed: u64) -> Result<Self> {
        config.check()?;
        let mut params = Params::new(seed);
        let n_ctx = config.n_ctx.unwrap_or(KgCoOpConfig::N_CTX);
        let context = match config.words() {
            Some(words) => Context::of_words(&mut params, clip.text(), &words, config.n_ctx)?,
            None if config.class_specific => {
                Context::per_class(&mut params, clip.text(), classes, n_ctx)?
            }
            None => Context::random(&mut params, clip.text(), n_ctx)?,
        };
        // Refuses names that are too long before any work.
        ClassTokens::new(clip.text(), classes)?.sentences(context.words())?;
        Ok(Self {
            context,
            params,
            targets: config.sentences()?,
            w: config.w,
            distance: config.distance,
            history: train::History::default(),
        })
    }

    /// From a prompt file of this method.
    ///
    /// # Errors
    /// [`Error::Prompt`], [`Error::Shape`] or [`Error::Config`] if the file does not fit itself or the weights.
    pub fn load(file: &PromptFile, clip: &Clip) -> Result<Self> {
        let config = KgCoOpConfig::read(&file.config)?;
        Self::with_tensors(&config, clip, &file.classes, file.seed, &file.tensors)
    }

    /// A context with given values instead of drawn ones, under the authors' key `ctx`.
    ///
    /// # Errors
    /// As [`KgCoOp::new`] and [`Params::load`].
    pub fn with_tensors(
        config: &KgCoOpConfig,
        clip: &Clip,
        classes: &Classes,
        seed: u64,
        tensors: &BTreeMap<String, Tensor>,
    ) -> Result<Self> {
        let kgcoop = Self::new(config, clip, classes, seed)?;
        kgcoop.params.load(tensors)?;
        Ok(kgcoop)
    }

    /// How the training went; empty for a loaded context.
    pub fn history(&self) -> &train::History {
        &self.history
    }

    /// Raw text features of the classes, `(n_cls, embed_dim)`; gradients flow to the context.
    ///
    /// # Errors
    /// [`Error::PromptTooLong`]; [`Error::Prompt`] if class-specific contexts meet another number of classes.
    pub fn text_features(&self, clip: &Clip, classes: &ClassTokens) -> Result<Tensor> {
        clip.text()
            .encode(&self.context.prompts(classes, ClassTokenPosition::End)?)
    }

    /// Unit features of the hand-written sentences, `(n_cls, embed_dim)`.
    ///
    /// # Errors
    /// As [`Sentences::each`].
    pub fn target_features(&self, clip: &Clip, classes: &ClassTokens) -> Result<Tensor> {
        self.targets.mean(clip, classes)
    }
}

impl Predictor for KgCoOp {
    fn needs(&self) -> ImageNeeds {
        ImageNeeds::GlobalFeatures
    }

    fn classifier<'a>(
        &'a self,
        clip: &'a Clip,
        classes: &Classes,
    ) -> Result<Box<dyn Classifier + 'a>> {
        self.context.check_serves(classes)?;
        let classes = ClassTokens::new(clip.text(), classes)?;
        let features = self.text_features(clip, &classes)?.detach();
        let features = ops::unit_length(&features, "a text feature")?;
        Ok(Box::new(TextClassifier::new(clip, features)))
    }

    fn tensors(&self) -> Result<Vec<(String, Tensor)>> {
        self.params.tensors()
    }

    fn training(&self) -> Option<&train::History> {
        Some(&self.history).filter(|history| history.kept > 0)
    }
}

impl Objective for KgCoOp {
    fn params(&self) -> &Params {
        &self.params
    }

    fn loss(&self, clip: &Clip, batch: &Batch<'_>, _: Step) -> Result<Loss> {
        let text = self.text_features(clip, batch.classes)?;
        let text = ops::unit_length(&text, "a text feature")?;
        let targets = self.target_features(clip, batch.classes)?;
        let logits = clip.unit_logits(batch.images.features()?, &text)?;
        let ce = ops::cross_entropy(&logits, batch.labels)?;
        let kg = match self.distance {
            Distance::Cosine => ops::cosine_distance(&text, &targets)?,
            Distance::Squared => ops::squared_distance(&text, &targets)?,
        };
        Ok(Loss {
            total: (&ce + (&kg * self.w)?)?,
            terms: vec![("ce", ce), ("kg", kg)],
            logits: Some(logits),
        })
    }
}
