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

use std::ops::Deref;

use cliptune_core::checkpoint::TorchState;
use cliptune_core::conditional::Conditional;
use cliptune_core::context::{self, Start};
use cliptune_core::learned::{self, Learner};
use cliptune_core::method::{self, Classifier, Entry, Method, Paper, Settings};
use cliptune_core::train::{Batch, Loss, Objective, Recipe, Step};
use cliptune_core::{Classes, Clip, ImageNeeds, Labelled, Learned, Params, Result, Run};
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
    configure: method::configure::<CoCoOpConfig>,
    load: learned::load::<CoCoOp>,
    import: Some(learned::import::<CoCoOp>),
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

    fn start(&self) -> Start {
        Start::of_words(self.ctx_init.as_deref(), self.n_ctx, Self::N_CTX)
    }
}

impl Settings for CoCoOpConfig {
    const SLUG: &'static str = ENTRY.slug;

    fn check(&self) -> Result<()> {
        self.start().check()?;
        self.train.check()
    }
}

impl Method for CoCoOpConfig {
    type Data = Labelled;
    type Fitted = Learned<CoCoOp>;

    fn fit(&self, clip: &Clip, data: &Labelled, run: &mut Run) -> Result<Learned<CoCoOp>> {
        Learned::fit(self, &self.train, clip, data, run)
    }
}

/// A learned context and the network that shifts it.
#[derive(Debug)]
pub struct CoCoOp(Conditional);

impl Deref for CoCoOp {
    type Target = Conditional;

    fn deref(&self) -> &Conditional {
        &self.0
    }
}

impl Learner for CoCoOp {
    type Config = CoCoOpConfig;

    fn start(
        config: &CoCoOpConfig,
        clip: &Clip,
        classes: &Classes,
        params: &mut Params,
    ) -> Result<Self> {
        let context = config.start().context(params, clip.text(), classes)?;
        Ok(Self(Conditional::new(params, context, clip)?))
    }

    fn complete(
        config: &mut CoCoOpConfig,
        given: &Value,
        state: &TorchState,
        clip: &Clip,
    ) -> Result<()> {
        config.n_ctx = Some(context::shared_in(state, clip.text())?);
        config.ctx_init = context::words_in(given);
        Ok(())
    }
}

impl Objective for CoCoOp {
    fn classifier<'a>(
        &'a self,
        clip: &'a Clip,
        classes: &Classes,
    ) -> Result<Box<dyn Classifier + 'a>> {
        self.0.classifier(clip, classes)
    }

    fn loss(&self, clip: &Clip, batch: &Batch<'_>, _: Step) -> Result<Loss> {
        let logits = self.logits(clip, batch.classes, batch.images.features()?)?;
        Loss::cross_entropy(logits, batch.labels)
    }
}
