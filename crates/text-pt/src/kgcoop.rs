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

use candle_core::Tensor;
use cliptune_core::checkpoint::TorchState;
use cliptune_core::context::{self, Context, Start};
use cliptune_core::learned::{self, Learner};
use cliptune_core::method::{self, Classifier, Entry, Method, Paper, Settings};
use cliptune_core::prompt::ClassTokens;
use cliptune_core::templates::{self, Sentences};
use cliptune_core::train::{Batch, Loss, Objective, Recipe, Step};
use cliptune_core::{Classes, Clip, ImageNeeds, Labelled, Learned, Params, Result, Run, ops};
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
    configure: method::configure::<KgCoOpConfig>,
    load: learned::load::<KgCoOp>,
    import: Some(learned::import::<KgCoOp>),
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

    fn start(&self) -> Start {
        Start {
            class_specific: self.class_specific,
            ..Start::of_words(self.ctx_init.as_deref(), self.n_ctx, Self::N_CTX)
        }
    }

    /// The hand-written sentence that the class features are held to.
    ///
    /// # Errors
    /// [`cliptune_core::Error::Config`] for a sentence without `{}`, for a data set without a sentence, or for both settings
    /// at once.
    pub fn sentences(&self) -> Result<Sentences> {
        let of_dataset = |dataset| match templates::id_of(dataset) {
            // The one data set for which the authors do not take CoOp's sentence.
            "dtd" => Ok("a photo of a {}, a type of texture."),
            _ => templates::for_dataset(dataset),
        };
        let (own, dataset) = (self.template.as_deref(), self.dataset.as_deref());
        let chosen = templates::chosen(own, dataset, of_dataset)?;
        Sentences::new(vec![chosen.unwrap_or(templates::DEFAULT).to_owned()])
    }
}

impl Settings for KgCoOpConfig {
    const SLUG: &'static str = ENTRY.slug;

    fn check(&self) -> Result<()> {
        self.start().check()?;
        method::check_weight("w", self.w)?;
        self.sentences()?;
        self.train.check()
    }
}

impl Method for KgCoOpConfig {
    type Data = Labelled;
    type Fitted = Learned<KgCoOp>;

    fn fit(&self, clip: &Clip, data: &Labelled, run: &mut Run) -> Result<Learned<KgCoOp>> {
        Learned::fit(self, &self.train, clip, data, run)
    }
}

/// A learned context, and what it is held to while it learns.
#[derive(Debug)]
pub struct KgCoOp {
    /// `(n_ctx, width)`, or `(n_cls, n_ctx, width)` if class-specific.
    pub context: Context,
    targets: Sentences,
    w: f64,
    distance: Distance,
}

impl Learner for KgCoOp {
    type Config = KgCoOpConfig;

    fn start(
        config: &KgCoOpConfig,
        clip: &Clip,
        classes: &Classes,
        params: &mut Params,
    ) -> Result<Self> {
        Ok(Self {
            context: config.start().context(params, clip.text(), classes)?,
            targets: config.sentences()?,
            w: config.w,
            distance: config.distance,
        })
    }

    fn complete(
        config: &mut KgCoOpConfig,
        given: &Value,
        state: &TorchState,
        clip: &Clip,
    ) -> Result<()> {
        let (contexts, n_ctx) = context::sizes_in(state, clip.text())?;
        config.n_ctx = Some(n_ctx);
        config.class_specific |= contexts.is_some();
        config.ctx_init = context::words_in(given);
        Ok(())
    }
}

impl KgCoOp {
    /// Unit features of the hand-written sentences, `(n_cls, embed_dim)`.
    ///
    /// # Errors
    /// As [`Sentences::each`].
    pub fn target_features(&self, clip: &Clip, classes: &ClassTokens) -> Result<Tensor> {
        self.targets.mean(clip, classes)
    }
}

impl Objective for KgCoOp {
    fn classifier<'a>(
        &'a self,
        clip: &'a Clip,
        classes: &Classes,
    ) -> Result<Box<dyn Classifier + 'a>> {
        self.context.classifier(clip, classes)
    }

    fn loss(&self, clip: &Clip, batch: &Batch<'_>, _: Step) -> Result<Loss> {
        let text = self.context.text_features(clip, batch.classes)?;
        let text = ops::unit_length(&text, "a text feature")?;
        let targets = self.target_features(clip, batch.classes)?;
        let kg = match self.distance {
            Distance::Cosine => ops::cosine_distance(&text, &targets)?,
            Distance::Squared => ops::squared_distance(&text, &targets)?,
        };
        let logits = clip.unit_logits(batch.images.features()?, &text)?;
        Loss::cross_entropy(logits, batch.labels)?
            .named("ce")
            .plus(self.w, "kg", kg)
    }
}
