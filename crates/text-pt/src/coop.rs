//! CoOp: learned words around a fixed class name (Zhou et al., IJCV 2022, arXiv 2109.01134).
//!
//! `p(y|x) = softmax_y( scale · cos(f(x), g([ctx, name_y])) )`; only `ctx` is learned (eq. 2), by cross entropy.
//!
//! # Differs from the authors' code
//! - The context and its gradient stay in f32 whatever the towers' storage; theirs trains in f16 by default.
//! - Initial words together with class-specific contexts are an error; theirs drops the second silently.
//! - A context has at least one vector; theirs takes none, too, and compares with the bare name.
//! - Initial words whose number of tokens differs from `n_ctx` are an error; theirs counts words and takes any `n_ctx`.
//! - Images are seen without random crops unless `train.augment = "crop_flip"` asks for the authors' transform, so that the
//!   frozen image tower runs once per image.
//! - Text features are encoded once for an evaluation, not once per batch (equal numbers).

use cliptune_core::checkpoint::TorchState;
use cliptune_core::context::{self, Context, Start};
use cliptune_core::learned::{self, Learner};
use cliptune_core::method::{self, Classifier, Entry, Method, Paper, Settings};
use cliptune_core::prompt::ClassTokenPosition;
use cliptune_core::train::{Batch, Loss, Objective, Recipe, Step};
use cliptune_core::{Classes, Clip, ImageNeeds, Labelled, Learned, Params, Result, Run};
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
    configure: method::configure::<CoOpConfig>,
    load: learned::load::<CoOp>,
    import: Some(learned::import::<CoOp>),
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

    fn start(&self) -> Start {
        Start {
            class_specific: self.class_specific,
            position: self.class_token_position,
            ..Start::of_words(self.ctx_init.as_deref(), self.n_ctx, Self::N_CTX)
        }
    }
}

impl Settings for CoOpConfig {
    const SLUG: &'static str = ENTRY.slug;

    fn check(&self) -> Result<()> {
        self.start().check()?;
        self.train.check()
    }
}

impl Method for CoOpConfig {
    type Data = Labelled;
    type Fitted = Learned<CoOp>;

    fn fit(&self, clip: &Clip, data: &Labelled, run: &mut Run) -> Result<Learned<CoOp>> {
        Learned::fit(self, &self.train, clip, data, run)
    }
}

/// A learned context.
#[derive(Debug)]
pub struct CoOp {
    /// `(n_ctx, width)`, or `(n_cls, n_ctx, width)` if class-specific.
    pub context: Context,
}

impl Learner for CoOp {
    type Config = CoOpConfig;

    fn start(
        config: &CoOpConfig,
        clip: &Clip,
        classes: &Classes,
        params: &mut Params,
    ) -> Result<Self> {
        let context = config.start().context(params, clip.text(), classes)?;
        Ok(Self { context })
    }

    fn complete(
        config: &mut CoOpConfig,
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

impl Objective for CoOp {
    fn classifier<'a>(
        &'a self,
        clip: &'a Clip,
        classes: &Classes,
    ) -> Result<Box<dyn Classifier + 'a>> {
        self.context.classifier(clip, classes)
    }

    fn loss(&self, clip: &Clip, batch: &Batch<'_>, _: Step) -> Result<Loss> {
        let text_features = self.context.text_features(clip, batch.classes)?;
        let logits = clip.cosine_logits(batch.images.features()?, &text_features)?;
        Loss::cross_entropy(logits, batch.labels)
    }
}
