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

use candle_core::Tensor;
use cliptune_core::checkpoint::TorchState;
use cliptune_core::context::{self, Context, Start};
use cliptune_core::layers::{Mlp, Nonlinearity};
use cliptune_core::learned::{self, Learner};
use cliptune_core::method::{self, Classifier, Entry, Method, Paper, Settings};
use cliptune_core::prompt::ClassTokens;
use cliptune_core::train::{Batch, Loss, Objective, Recipe, Step};
use cliptune_core::{
    Classes, Clip, Error, ImageBatch, ImageNeeds, Labelled, Learned, Params, Result, Run, ops,
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
pub struct CoCoOp {
    /// `(n_ctx, width)`.
    pub context: Context,
    /// `(.., embed_dim)` → `(.., width)`, a sixteenth of `embed_dim` in its middle. It does not start at zero: the first
    /// prompts are shifted already.
    meta_net: Mlp,
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
        let (embed_dim, width) = (clip.image().embed_dim(), clip.text().width());
        let hidden = embed_dim / 16;
        if hidden == 0 {
            return Err(Error::Data(format!(
                "the joint space has {embed_dim} dimensions; the Meta-Net has a sixteenth of them in its middle and needs at least 16"
            )));
        }
        let layers = [("meta_net.linear1", hidden), ("meta_net.linear2", width)];
        let meta_net = Mlp::new(params, embed_dim, &layers, Nonlinearity::Relu)?;
        Ok(Self { context, meta_net })
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

impl CoCoOp {
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

    /// `(batch, n_cls)` for unit features and the contexts made of them.
    fn logits(
        &self,
        clip: &Clip,
        classes: &ClassTokens,
        unit_features: &Tensor,
        contexts: &Tensor,
    ) -> Result<Tensor> {
        let text = self.context.text_features_under(contexts, clip, classes)?;
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

impl Objective for CoCoOp {
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

    fn loss(&self, clip: &Clip, batch: &Batch<'_>, _: Step) -> Result<Loss> {
        let unit = ops::unit_length(batch.images.features()?, "an image feature")?;
        let contexts = self.contexts(&unit)?;
        let logits = self.logits(clip, batch.classes, &unit, &contexts)?;
        Loss::cross_entropy(logits, batch.labels)
    }
}
