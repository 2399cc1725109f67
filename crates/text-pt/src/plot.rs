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

use candle_core::{IndexOp, Tensor};
use cliptune_core::checkpoint::TorchState;
use cliptune_core::context::{self, Context};
use cliptune_core::learned::{self, Learner};
use cliptune_core::method::{self, Classifier, Entry, Method, Paper, Settings};
use cliptune_core::prompt::{ClassTokenPosition, ClassTokens};
use cliptune_core::train::{Batch, Loss, Objective, Recipe, Step};
use cliptune_core::transport::{Sinkhorn, Transport};
use cliptune_core::{
    Classes, Clip, Error, ImageBatch, ImageNeeds, Labelled, Learned, Params, Result, Run, ops,
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
    configure: method::configure::<PlotConfig>,
    load: learned::load::<Plot>,
    import: Some(learned::import::<Plot>),
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

impl Settings for PlotConfig {
    const SLUG: &'static str = ENTRY.slug;

    fn check(&self) -> Result<()> {
        context::check(self.n_ctx)?;
        if self.n_prompts == 0 {
            let expected = "at least one prompt per class";
            return Err(Error::config("n_prompts", 0, expected));
        }
        let position = self.class_token_position;
        if self.n_prompts > 1 && position != ClassTokenPosition::End {
            let expected = "end, with more than one prompt per class; or n_prompts = 1";
            return Err(Error::config("class_token_position", position, expected));
        }
        self.transport.check()?;
        self.train.check()
    }
}

impl Method for PlotConfig {
    type Data = Labelled;
    type Fitted = Learned<Plot>;

    fn fit(&self, clip: &Clip, data: &Labelled, run: &mut Run) -> Result<Learned<Plot>> {
        Learned::fit(self, &self.train, clip, data, run)
    }
}

/// Learned contexts, and the rule that matches them to places.
#[derive(Debug)]
pub struct Plot {
    /// `(n_prompts, n_ctx, width)`.
    contexts: Context,
    matching: Matching,
}

impl Learner for Plot {
    type Config = PlotConfig;

    fn start(
        config: &PlotConfig,
        clip: &Clip,
        classes: &Classes,
        params: &mut Params,
    ) -> Result<Self> {
        let (tower, position) = (clip.text(), config.class_token_position);
        let contexts = Context::several(params, tower, config.n_prompts, config.n_ctx)?;
        Ok(Self {
            contexts: contexts.at(position, tower, classes)?,
            matching: Matching {
                transport: config.transport.clone(),
                add_global: config.add_global,
            },
        })
    }

    fn complete(config: &mut PlotConfig, _: &Value, state: &TorchState, clip: &Clip) -> Result<()> {
        let (contexts, n_ctx) = context::sizes_in(state, clip.text())?;
        (config.n_prompts, config.n_ctx) = (contexts.unwrap_or(1), n_ctx);
        Ok(())
    }
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
    /// Raw text features, `(n_prompts, n_cls, embed_dim)`; gradients flow to the contexts.
    ///
    /// # Errors
    /// As [`Context::text_features_under`].
    pub fn text_features(&self, clip: &Clip, classes: &ClassTokens) -> Result<Tensor> {
        let contexts = self.contexts.tensor();
        self.contexts.text_features_under(contexts, clip, classes)
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

    fn loss(&self, clip: &Clip, batch: &Batch<'_>, _: Step) -> Result<Loss> {
        let text_features = self.text_features(clip, batch.classes)?;
        let matched = self.matched(clip, batch.images, &text_features)?;
        Loss::cross_entropy(matched.logits, batch.labels)
    }
}
