//! PLOT: several learned contexts per class, matched to places of the image by optimal transport (Chen et al., ICLR 2023,
//! arXiv 2210.01253).
//!
//! With `N` contexts, class `c` has text features `t_1 .. t_N` and an image has `M` local features `f_1 .. f_M`, all of unit
//! length. The plan `T (M, N)` moves uniform weights from the one to the other at the cost `1 − f_m·t_n`, with entropy `ε`,
//! and (eq. 8)
//!
//! `p(c|x) = softmax_c( scale · Σ_mn T_mn · f_m·t_n )`.
//!
//! The plan is sought without a gradient and held fixed: `∂/∂t_n` of a score is `Σ_m T_mn f_m`. Only the contexts are
//! learned, by cross entropy.
//!
//! # Differs from the authors' code
//! - Contexts, features and transport compute in f32; theirs takes f16, where `exp(−cost/ε)` is 0 for cosines below −0.66.
//! - A plan that is not finite is an error naming the step; theirs returns nothing and stops in the optimiser.
//! - Contexts shared by all classes that start at random are all there is: theirs has settings for initial words and
//!   class-specific contexts whose shapes break for more than one prompt. Class names stand in front or in the middle only
//!   with one prompt, as theirs can.
//! - The global feature's logits are added where `add_global` says so; theirs asks whether the data set is called ImageNet.
//! - Any image tower serves: theirs takes the places of a ResNet's attention pool, and so do we; a ViT gives its patches.
//! - Images are seen without random crops unless `train.augment = "crop_flip"`. The batch is 128; theirs is 32 for
//!   OxfordFlowers, FGVCAircraft and StanfordCars.

use std::collections::BTreeMap;

use candle_core::{IndexOp, Tensor};
use cliptune_core::checkpoint::TorchState;
use cliptune_core::context::{self, Context};
use cliptune_core::method::{
    self, AnyMethod, Classifier, Entry, Imported, Method, Paper, Predictor,
};
use cliptune_core::prompt::{ClassTokenPosition, ClassTokens, Prompts};
use cliptune_core::prompt_file::PromptFile;
use cliptune_core::train::{self, Batch, Loss, Objective, Recipe, Step};
use cliptune_core::transport::{Sinkhorn, Transport};
use cliptune_core::{
    Classes, Clip, Error, ImageBatch, ImageNeeds, Labelled, Params, Result, Run, ops,
};
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// The registry's entry.
pub const ENTRY: Entry = Entry {
    slug: "plot",
    name: "PLOT",
    family: "text-pt",
    paper: Paper {
        title: "PLOT: Prompt Learning with Optimal Transport for Vision-Language Models",
        authors: "Chen, Yao, Song, Li, Rao, Zhang",
        venue: "ICLR 2023",
        arxiv: "2210.01253",
        code: "CHENGY12/PLOT@728539f (plot-coop)",
    },
    summary: "Learns several contexts per class and compares them with the places of an image instead of its one global feature: an optimal transport decides which context looks where.",
    learns: "ctx: n_prompts × n_ctx vectors of the text tower's width, shared by all classes",
    cost: "text tower forward and backward for every class and context at each step; images are encoded once, at every place",
    needs: ImageNeeds::LocalFeatures,
    defaults: method::defaults_of::<PlotConfig>,
    configure: |settings| Ok(Box::new(PlotConfig::read(settings)?)),
    load: |file, clip| Ok(Box::new(Plot::load(file, clip)?)),
    import: Some(|state, settings, clip, classes| {
        let config = PlotConfig::of_checkpoint(state, settings, clip)?;
        let predictor = Plot::with_tensors(&config, clip, classes, 0, &state.tensors)?;
        Ok(Imported {
            config: AnyMethod::config(&config),
            predictor: Box::new(predictor),
        })
    }),
};

/// Settings of [`Plot`]; the defaults are the paper's.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PlotConfig {
    /// Contexts, each of which makes a prompt of every class (paper: N).
    pub n_prompts: usize,
    /// Context tokens of each.
    pub n_ctx: usize,
    /// Where the class name sits among them; `end` unless there is one prompt per class.
    pub class_token_position: ClassTokenPosition,
    /// The transport between places and prompts. `stop = "per_problem"` makes an image's logits independent of the images
    /// beside it.
    pub transport: Sinkhorn,
    /// Adds the logits of the global feature and the mean prompt, as the authors do for ImageNet.
    pub add_global: bool,
    /// How it is trained.
    pub train: Recipe,
}

impl Default for PlotConfig {
    fn default() -> Self {
        Self {
            n_prompts: 4,
            n_ctx: 16,
            class_token_position: ClassTokenPosition::End,
            transport: Sinkhorn::default(),
            add_global: false,
            train: Recipe {
                batch_size: 128,
                ..Recipe::default()
            },
        }
    }
}

impl PlotConfig {
    /// Settings from a value whose missing keys take their defaults.
    ///
    /// # Errors
    /// [`Error::Config`] naming the key.
    pub fn read(settings: &Value) -> Result<Self> {
        let config: Self = method::read_config(ENTRY.slug, settings)?;
        config.check()?;
        Ok(config)
    }

    /// `settings` completed by the shape of a checkpoint's contexts.
    fn of_checkpoint(state: &TorchState, settings: &Value, clip: &Clip) -> Result<Self> {
        let mut config = Self::read(settings)?;
        let (contexts, n_ctx) = context::sizes_in(state, clip.text())?;
        (config.n_prompts, config.n_ctx) = (contexts.unwrap_or(1), n_ctx);
        config.check()?;
        Ok(config)
    }

    /// Refuses settings that contradict each other.
    ///
    /// # Errors
    /// [`Error::Config`] naming the key.
    pub fn check(&self) -> Result<()> {
        context::check(Some(self.n_ctx))?;
        if self.n_prompts == 0 {
            return Err(Error::config(
                "n_prompts",
                0,
                "at least one prompt per class",
            ));
        }
        if self.n_prompts > 1 && self.class_token_position != ClassTokenPosition::End {
            let position = format!("{:?}", self.class_token_position).to_lowercase();
            let expected = "end, with more than one prompt per class; or n_prompts = 1";
            return Err(Error::config("class_token_position", position, expected));
        }
        self.transport.check()?;
        self.train.check()
    }
}

impl Method for PlotConfig {
    type Data = Labelled;
    type Fitted = Plot;

    fn fit(&self, clip: &Clip, data: &Labelled, run: &mut Run) -> Result<Plot> {
        self.check()?;
        data.check()?;
        let mut plot = Plot::new(self, clip, &data.classes, run.seed)?;
        let settings = serde_json::to_value(self).unwrap_or(Value::Null);
        plot.history = train::train(&mut plot, clip, data, &self.train, &settings, run)?;
        Ok(plot)
    }
}

/// Learned contexts, and the rule that matches them to places.
#[derive(Debug)]
pub struct Plot {
    /// `(n_prompts, n_ctx, width)`.
    contexts: Context,
    params: Params,
    position: ClassTokenPosition,
    matching: Matching,
    history: train::History,
}

/// Logits of a batch, and the plans behind them.
#[derive(Clone, Debug)]
pub struct Matched {
    /// `(batch, n_cls)`.
    pub logits: Tensor,
    /// One problem for each image and class, class by class for an image: `(batch · n_cls, places, n_prompts)`.
    pub transport: Transport,
}

impl Plot {
    /// Contexts at their start.
    ///
    /// # Errors
    /// [`Error::Config`] for contradicting settings, [`Error::PromptTooLong`] if a class name leaves no room.
    pub fn new(config: &PlotConfig, clip: &Clip, classes: &Classes, seed: u64) -> Result<Self> {
        config.check()?;
        let mut params = Params::new(seed);
        let contexts = Context::several(&mut params, clip.text(), config.n_prompts, config.n_ctx)?;
        let plot = Self {
            contexts,
            params,
            position: config.class_token_position,
            matching: Matching {
                transport: config.transport.clone(),
                add_global: config.add_global,
            },
            history: train::History::default(),
        };
        plot.prompts(&ClassTokens::new(clip.text(), classes)?)?;
        Ok(plot)
    }

    /// From a prompt file of this method.
    ///
    /// # Errors
    /// [`Error::Prompt`], [`Error::Shape`] or [`Error::Config`] if the file does not fit itself or the weights.
    pub fn load(file: &PromptFile, clip: &Clip) -> Result<Self> {
        let config = PlotConfig::read(&file.config)?;
        Self::with_tensors(&config, clip, &file.classes, file.seed, &file.tensors)
    }

    /// From a checkpoint of the authors' code (`plot-coop`). Its `token_prefix` and `token_suffix` are rebuilt from
    /// `classes`.
    ///
    /// # Errors
    /// [`Error::Prompt`] if there is no `ctx`, [`Error::Shape`] if it does not fit the weights.
    pub fn import(
        state: &TorchState,
        settings: &Value,
        clip: &Clip,
        classes: &Classes,
    ) -> Result<Self> {
        let config = PlotConfig::of_checkpoint(state, settings, clip)?;
        Self::with_tensors(&config, clip, classes, 0, &state.tensors)
    }

    /// Contexts with given values instead of drawn ones.
    ///
    /// # Errors
    /// As [`Plot::new`] and [`Params::load`].
    pub fn with_tensors(
        config: &PlotConfig,
        clip: &Clip,
        classes: &Classes,
        seed: u64,
        tensors: &BTreeMap<String, Tensor>,
    ) -> Result<Self> {
        let plot = Self::new(config, clip, classes, seed)?;
        plot.params.load(tensors)?;
        Ok(plot)
    }

    /// How the training went; empty for loaded contexts.
    pub fn history(&self) -> &train::History {
        &self.history
    }

    fn prompts(&self, classes: &ClassTokens) -> Result<Prompts> {
        classes.weave_each(self.contexts.tensor(), self.contexts.words(), self.position)
    }

    /// Raw text features, `(n_prompts, n_cls, embed_dim)`; gradients flow to the contexts.
    ///
    /// # Errors
    /// [`Error::PromptTooLong`].
    pub fn text_features(&self, clip: &Clip, classes: &ClassTokens) -> Result<Tensor> {
        let features = clip.text().encode(&self.prompts(classes)?)?;
        let n_prompts = self.contexts.tensor().dim(0)?;
        Ok(features.reshape((n_prompts, classes.len(), ()))?)
    }

    /// Logits of images against raw text features `(n_prompts, n_cls, embed_dim)`, and the plans they come from.
    ///
    /// # Errors
    /// [`Error::NotFinite`] for zero features and plans that underflow; [`Error::Data`] if the images have no places.
    pub fn matched(
        &self,
        clip: &Clip,
        images: &ImageBatch,
        text_features: &Tensor,
    ) -> Result<Matched> {
        self.matching.run(clip, images, text_features)
    }
}

/// How places and prompts become logits.
#[derive(Clone, Debug)]
struct Matching {
    transport: Sinkhorn,
    add_global: bool,
}

impl Matching {
    fn run(&self, clip: &Clip, images: &ImageBatch, text: &Tensor) -> Result<Matched> {
        let (n_prompts, n_cls, dim) = text.dims3()?;
        let tokens = images.local_features()?;
        let (batch, places) = (tokens.dim(0)?, tokens.dim(1)?.saturating_sub(1));
        if places == 0 {
            return Err(Error::Data("the images have no local features".into()));
        }
        let local = tokens.i((.., 1..))?.contiguous()?;
        let local = ops::unit_length(&local, "a local image feature")?;
        let unit_text = ops::unit_length(text, "a text feature")?;
        let similarity = local
            .reshape((batch * places, dim))?
            .matmul(&unit_text.reshape((n_prompts * n_cls, dim))?.t()?)?
            .reshape((batch, places, n_prompts, n_cls))?
            .permute((0, 3, 1, 2))?
            .reshape((batch * n_cls, places, n_prompts))?;
        let transport = self.transport.solve(&similarity.affine(-1.0, 1.0)?)?;
        let score = (&transport.plan * similarity)?.sum((1, 2))?;
        let mut logits = (score.reshape((batch, n_cls))? * clip.scale())?;
        if self.add_global {
            logits = (logits + clip.cosine_logits(images.features()?, &text.mean(0)?)?)?;
        }
        Ok(Matched { logits, transport })
    }
}

impl Predictor for Plot {
    fn needs(&self) -> ImageNeeds {
        ImageNeeds::LocalFeatures
    }

    fn classifier<'a>(
        &'a self,
        clip: &'a Clip,
        classes: &Classes,
    ) -> Result<Box<dyn Classifier + 'a>> {
        let classes = ClassTokens::new(clip.text(), classes)?;
        Ok(Box::new(PlaceClassifier {
            clip,
            matching: &self.matching,
            text_features: self.text_features(clip, &classes)?.detach(),
        }))
    }

    fn tensors(&self) -> Result<Vec<(String, Tensor)>> {
        self.params.tensors()
    }

    fn training(&self) -> Option<&train::History> {
        Some(&self.history).filter(|history| history.kept > 0)
    }
}

/// Compares the places of images with several features per class.
struct PlaceClassifier<'a> {
    clip: &'a Clip,
    matching: &'a Matching,
    text_features: Tensor,
}

impl Classifier for PlaceClassifier<'_> {
    fn logits(&self, images: &ImageBatch) -> Result<Tensor> {
        let matched = self.matching.run(self.clip, images, &self.text_features)?;
        Ok(matched.logits)
    }
}

impl Objective for Plot {
    fn params(&self) -> &Params {
        &self.params
    }

    fn loss(&self, clip: &Clip, batch: &Batch<'_>, _: Step) -> Result<Loss> {
        let text_features = self.text_features(clip, batch.classes)?;
        let matched = self.matched(clip, batch.images, &text_features)?;
        Loss::cross_entropy(matched.logits, batch.labels)
    }
}
