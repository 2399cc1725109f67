//! CoCoOp inside MVLPT: a context that each image shifts.

use candle_core::Tensor;
use cliptune_core::context::{Context, Start};
use cliptune_core::layers::{Mlp, Nonlinearity};
use cliptune_core::method::Classifier;
use cliptune_core::prompt::ClassTokens;
use cliptune_core::{Classes, Clip, Error, ImageBatch, Params, Result, ops};

/// A context, and the network that makes of an image's unit feature what is added to it.
#[derive(Debug)]
pub struct Conditional {
    pub(super) context: Context,
    /// A sixteenth of the joint width in its middle.
    meta_net: Mlp,
}

impl Conditional {
    pub(super) fn new(
        params: &mut Params,
        start: &Start,
        clip: &Clip,
        classes: &Classes,
    ) -> Result<Self> {
        let tower = clip.text();
        let context = params.below("cocoop_", |params| start.context(params, tower, classes))?;
        let embed_dim = clip.image().embed_dim();
        let hidden = embed_dim / 16;
        if hidden == 0 {
            return Err(Error::Data(format!(
                "the joint space has {embed_dim} dimensions; the Meta-Net has a sixteenth of them in its middle and needs at least 16"
            )));
        }
        let layers = [("linear1", hidden), ("linear2", tower.width())];
        let meta_net = params.below("meta_net.", |params| {
            Mlp::new(params, embed_dim, &layers, Nonlinearity::Relu)
        })?;
        Ok(Self { context, meta_net })
    }

    /// Each image's own context, `(batch, n_ctx, text width)`, from unit features `(batch, embed_dim)`.
    ///
    /// # Errors
    /// [`Error::Shape`] if the features have another width.
    pub fn contexts(&self, unit: &Tensor) -> Result<Tensor> {
        let shift = self.meta_net.forward(unit)?.unsqueeze(1)?;
        Ok(self.context.tensor().unsqueeze(0)?.broadcast_add(&shift)?)
    }

    /// Raw text features `(batch, n_cls, embed_dim)` under [`Conditional::contexts`].
    ///
    /// # Errors
    /// As [`Context::text_features_under`].
    pub fn text_features(
        &self,
        clip: &Clip,
        classes: &ClassTokens,
        contexts: &Tensor,
    ) -> Result<Tensor> {
        self.context.text_features_under(contexts, clip, classes)
    }

    /// Logits `(batch, n_cls)` for unit features of images and the contexts made of them.
    pub(super) fn logits(
        &self,
        clip: &Clip,
        classes: &ClassTokens,
        unit: &Tensor,
        contexts: &Tensor,
    ) -> Result<Tensor> {
        let text = self.text_features(clip, classes, contexts)?;
        let text = ops::unit_length(&text, "a text feature")?;
        ops::own_dots(&(unit * clip.scale())?, &text)
    }
}

/// The network and the text tower run for every image.
pub(super) struct PerImage<'a> {
    pub(super) conditional: &'a Conditional,
    pub(super) clip: &'a Clip,
    pub(super) classes: ClassTokens,
}

impl Classifier for PerImage<'_> {
    fn logits(&self, images: &ImageBatch) -> Result<Tensor> {
        let unit = ops::unit_length(images.features()?, "an image feature")?;
        // One image at a time: memory does not grow with the batch, and neither do the bits depend on it.
        ops::row_by_row(&unit, |_, unit| {
            let contexts = self.conditional.contexts(unit)?.detach();
            self.conditional
                .logits(self.clip, &self.classes, unit, &contexts)
        })
    }
}
