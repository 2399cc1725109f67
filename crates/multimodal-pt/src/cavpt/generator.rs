//! CAVPT: visual prompts that are made for an image from the features of the classes that it may show.

use candle_core::{DType, Device, Tensor};
use cliptune_core::layers::{Affine, Norm};
use cliptune_core::{Param, Params, Result, ops};

use crate::sides::STD;

/// What the generator's keys begin with in the whole model.
pub(super) const PREFIX: &str = "image_encoder.transformer.extractor.";

/// The map whose rows say how wide attention is.
pub(super) const QUERY: &str = "attns.0.qmlp";

/// Vectors beside the image's tokens, for each block.
pub(super) const CTX: &str = "ctx";

/// How large a generator is.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sizes {
    /// Blocks that it makes prompts for.
    pub(super) blocks: usize,
    /// Width of the image tower.
    pub(super) width: usize,
    /// Width of a class feature.
    pub(super) embed_dim: usize,
    /// Classes that its auxiliary classifier tells apart.
    pub(super) classes: usize,
    /// Learned vectors beside the image's tokens.
    pub(super) n_ctx: usize,
    /// Width of queries and keys.
    pub(super) attention_dim: usize,
}

/// One cross-attention for each prompted block, with an auxiliary classifier that keeps its outputs apart.
#[derive(Debug)]
pub(super) struct Generator {
    sizes: Sizes,
    layers: Vec<Layer>,
    /// `(blocks, n_ctx, width)`.
    ctx: Param,
}

#[derive(Debug)]
struct Layer {
    meta_net: Affine,
    query: Affine,
    key: Affine,
    value: Affine,
    /// Before the auxiliary classifier.
    class_norm: Norm,
    classifier: Affine,
    /// Of the prompts.
    norm: Norm,
}

/// What a layer makes.
pub(super) struct Made {
    /// Class-aware prompts, `(batch, candidates, width)`.
    pub(super) prompts: Tensor,
    /// What attention found for each candidate, `(batch, candidates, width)`.
    found: Tensor,
}

impl Generator {
    /// A generator at its start, under the authors' keys (`classfiers` is their spelling).
    pub(super) fn new(params: &mut Params, sizes: Sizes) -> Result<Self> {
        let Sizes {
            blocks,
            width,
            embed_dim,
            classes,
            n_ctx,
            attention_dim,
        } = sizes;
        let layer = |params: &mut Params, i: usize| {
            let scores = (attention_dim, width);
            let attention = |params: &mut Params, map: &str, sizes| {
                Affine::without_bias(params, &format!("attns.{i}.{map}"), sizes)
            };
            Ok(Layer {
                meta_net: Affine::new(params, &format!("meta_nets.{i}"), (width, embed_dim))?,
                query: attention(params, "qmlp", scores)?,
                key: attention(params, "kmlp", scores)?,
                value: attention(params, "vmlp", (width, width))?,
                class_norm: Norm::new(params, &format!("lns.{i}"), width)?,
                classifier: {
                    let name = format!("classfiers.{i}");
                    Affine::without_bias(params, &name, (classes, width))?
                },
                norm: Norm::new(params, &format!("lns2.{i}"), width)?,
            })
        };
        params.below(PREFIX, |params| {
            let layers = (0..blocks).map(|i| layer(params, i));
            let layers = layers.collect::<Result<_>>()?;
            let ctx = params.normal(CTX, (blocks, n_ctx, width), STD)?;
            Ok(Self { sizes, layers, ctx })
        })
    }

    pub(super) fn sizes(&self) -> &Sizes {
        &self.sizes
    }

    /// Prompts for the `i`-th of its blocks, from the tokens that the block reads, `(batch, 1 + grid², width)`, and raw features
    /// of each image's candidates, `(batch, candidates, embed_dim)`.
    ///
    /// No gradient flows to the tokens. With `c = meta_net(feature)` and `X` = tokens and `ctx[i]`:
    /// `found = value(softmax(query(c)·key(X)ᵀ / √attention_dim)·X)`, `prompts = norm(found + c)`.
    pub(super) fn make(&self, i: usize, tokens: &Tensor, features: &Tensor) -> Result<Made> {
        let layer = &self.layers[i];
        let batch = tokens.dim(0)?;
        let own = self.ctx.tensor().get(i)?.unsqueeze(0)?;
        let own = own.broadcast_as((batch, self.sizes.n_ctx, self.sizes.width))?;
        let read = Tensor::cat(&[&tokens.detach(), &own], 1)?;
        let classes = layer.meta_net.forward(features)?;
        let scores = layer
            .query
            .forward(&classes)?
            .matmul(&layer.key.forward(&read)?.transpose(1, 2)?.contiguous()?)?;
        let scores = (scores / (self.sizes.attention_dim as f64).sqrt())?;
        let mixed = ops::softmax(&scores)?.matmul(&read)?;
        let found = layer.value.forward(&mixed)?;
        Ok(Made {
            prompts: layer.norm.forward(&(&found + classes)?)?,
            found,
        })
    }

    /// The auxiliary classifier's logits, `(batch, candidates, n_cls)`.
    pub(super) fn class_logits(&self, i: usize, made: &Made) -> Result<Tensor> {
        let layer = &self.layers[i];
        let found = layer.class_norm.forward(&made.found)?;
        layer.classifier.forward(&found)
    }

    /// As [`Generator::class_logits`] of all blocks where images have no candidates, `(batch, blocks, 0, n_cls)`.
    pub(super) fn no_class_logits(&self, batch: usize) -> Result<Tensor> {
        let Sizes {
            blocks, classes, ..
        } = self.sizes;
        Ok(Tensor::zeros(
            (batch, blocks, 0, classes),
            DType::F32,
            &Device::Cpu,
        )?)
    }
}

/// Whether a key of the whole model belongs to the auxiliary classifier, which no prompt is made from.
pub(super) fn is_auxiliary(key: &str) -> bool {
    let own = key.strip_prefix(PREFIX).unwrap_or_default();
    own.starts_with("classfiers.") || own.starts_with("lns.")
}

#[cfg(test)]
mod tests {
    use candle_core::Var;
    use cliptune_core::Error;
    use cliptune_core::rng::Rng;

    use super::*;

    const SIZES: Sizes = Sizes {
        blocks: 2,
        width: 8,
        embed_dim: 6,
        classes: 3,
        n_ctx: 4,
        attention_dim: 5,
    };

    fn drawn(seed: u64, shape: (usize, usize, usize)) -> Result<Tensor> {
        let values = Rng::stream(seed, "drawn", &[]).normal(shape.0 * shape.1 * shape.2);
        let values: Vec<f32> = values.into_iter().map(|x| x as f32).collect();
        Ok(Tensor::from_vec(values, shape, &Device::Cpu)?)
    }

    fn largest(t: &Tensor) -> Result<f32> {
        Ok(t.abs()?.max_all()?.to_scalar()?)
    }

    #[test]
    fn attention_is_a_mean_of_what_it_reads() -> Result<()> {
        let mut params = Params::new(1);
        let generator = Generator::new(&mut params, SIZES)?;
        // Where all that is read is the same, that is what attention finds, whatever the scores.
        let row = drawn(2, (1, 1, 8))?;
        generator
            .ctx
            .set(&row.broadcast_as((2, 4, 8))?.contiguous()?)?;
        let made = generator.make(1, &row.broadcast_as((2, 9, 8))?, &drawn(3, (2, 3, 6))?)?;
        let expected = generator.layers[1].value.forward(&row)?;
        let error = made.found.broadcast_sub(&expected)?;
        assert!(largest(&error)? < 1e-5 * largest(&expected)?);
        Ok(())
    }

    #[test]
    fn candidates_stand_apart_and_tokens_get_no_gradient() -> Result<()> {
        let generator = Generator::new(&mut Params::new(1), SIZES)?;
        let tokens = Var::from_tensor(&drawn(2, (2, 9, 8))?)?;
        let features = Var::from_tensor(&drawn(3, (2, 3, 6))?)?;
        let made = generator.make(0, &tokens, &features)?;
        let order = Tensor::new(&[2u32, 0, 1], &Device::Cpu)?;
        let turned = generator.make(0, &tokens, &features.index_select(&order, 1)?)?;
        let error = (made.prompts.index_select(&order, 1)? - turned.prompts)?;
        assert!(largest(&error)? < 1e-5);
        let logits = generator.class_logits(0, &made)?;
        assert_eq!(logits.dims(), [2, 3, 3]);
        let loss = (made.prompts.powf(3.0)?.sum_all()? + logits.powf(3.0)?.sum_all()?)?;
        let gradients = loss.backward()?;
        assert!(gradients.get(&tokens).is_none());
        let features = gradients.get(&features);
        let features = features.ok_or_else(|| Error::Data("no gradient".into()))?;
        assert!(largest(features)? > 1e-4);
        Ok(())
    }
}
