//! A context that each image shifts: CoCoOp (Zhou et al., CVPR 2022, arXiv 2203.05557, eq. 3), by itself or inside another
//! method.
//!
//! A small network, the Meta-Net, maps the image's unit feature `v` to one vector that is added to every context vector:
//! `π(v) = W₂·relu(W₁·v + b₁) + b₂`, `ctx(v) = [ctx₁ + π(v), ..., ctx_M + π(v)]`.

use candle_core::Tensor;

use crate::context::Context;
use crate::layers::{Mlp, Nonlinearity};
use crate::method::Classifier;
use crate::prompt::ClassTokens;
use crate::{Classes, Clip, Error, ImageBatch, Params, Result, ops};

/// A learned context and the network that shifts it.
#[derive(Debug)]
pub struct Conditional {
    /// `(n_ctx, width)`.
    pub context: Context,
    /// `(.., embed_dim)` → `(.., width)`, a sixteenth of `embed_dim` in its middle. It does not start at zero: the first
    /// prompts are shifted already.
    meta_net: Mlp,
}

impl Conditional {
    /// A Meta-Net at its start, under `meta_net.linear1` and `meta_net.linear2`, for a context.
    ///
    /// # Errors
    /// [`Error::Data`] if the joint space is too narrow for a sixteenth of it.
    pub fn new(params: &mut Params, context: Context, clip: &Clip) -> Result<Self> {
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
    /// As [`Conditional::meta_bias`].
    pub fn contexts(&self, unit_features: &Tensor) -> Result<Tensor> {
        let bias = self.meta_bias(unit_features)?.unsqueeze(1)?;
        Ok(self.context.tensor().unsqueeze(0)?.broadcast_add(&bias)?)
    }

    /// Logits of a batch, `(batch, n_cls)`, from raw image features `(batch, embed_dim)`; gradients flow to the context and the
    /// Meta-Net.
    ///
    /// # Errors
    /// As [`Context::text_features_under`]; [`Error::NotFinite`] for features that have no direction.
    pub fn logits(&self, clip: &Clip, classes: &ClassTokens, features: &Tensor) -> Result<Tensor> {
        let unit = ops::unit_length(features, "an image feature")?;
        self.unit_logits(clip, classes, &unit, &self.contexts(&unit)?)
    }

    /// For unit features and the contexts made of them.
    fn unit_logits(
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

    /// Classifies; the Meta-Net and the text tower run for every image.
    ///
    /// # Errors
    /// [`Error::PromptTooLong`].
    pub fn classifier<'a>(
        &'a self,
        clip: &'a Clip,
        classes: &Classes,
    ) -> Result<Box<dyn Classifier + 'a>> {
        let classes = ClassTokens::new(clip.text(), classes)?;
        classes.sentences(self.context.words())?;
        Ok(Box::new(PerImage {
            conditional: self,
            clip,
            classes,
        }))
    }
}

struct PerImage<'a> {
    conditional: &'a Conditional,
    clip: &'a Clip,
    classes: ClassTokens,
}

impl Classifier for PerImage<'_> {
    fn logits(&self, images: &ImageBatch) -> Result<Tensor> {
        let unit = ops::unit_length(images.features()?, "an image feature")?;
        // One image at a time: memory does not grow with the batch, and neither do the bits depend on it.
        ops::row_by_row(&unit, |_, unit| {
            let contexts = self.conditional.contexts(unit)?.detach();
            self.conditional
                .unit_logits(self.clip, &self.classes, unit, &contexts)
        })
    }
}
