//! The vision transformer.

use candle_core::{IndexOp, Tensor};

use super::block::{Block, Weights};
use super::text::Probe;
use crate::ops::{LayerNorm, Linear};
use crate::{Arch, HEAD_WIDTH, Result};

#[derive(Debug)]
pub(crate) struct Vit {
    /// `(1, 1, width)`.
    class_embedding: Tensor,
    /// `(1 + grid², width)`.
    positions: Tensor,
    patches: Linear,
    ln_pre: LayerNorm,
    blocks: Vec<Block>,
    ln_post: LayerNorm,
    projection: Linear,
    patch_size: usize,
    width: usize,
}

impl Vit {
    pub(crate) fn load(
        w: &mut Weights,
        arch: &Arch,
        layers: usize,
        width: usize,
        patch_size: usize,
    ) -> Result<Self> {
        let grid = arch.image_resolution / patch_size;
        let patch = 3 * patch_size * patch_size;
        let conv1 = w.stored("visual.conv1.weight", &[width, 3, patch_size, patch_size])?;
        let class_embedding = w.tensor("visual.class_embedding", &[width])?;
        let blocks = (0..layers).map(|i| {
            let prefix = format!("visual.transformer.resblocks.{i}");
            Block::load(w, &prefix, width, width / HEAD_WIDTH, arch.activation)
        });
        Ok(Self {
            blocks: blocks.collect::<Result<_>>()?,
            class_embedding: class_embedding.reshape((1, 1, width))?,
            positions: w.tensor("visual.positional_embedding", &[1 + grid * grid, width])?,
            patches: Linear::new(conv1, None, (width, patch)),
            ln_pre: w.layer_norm("visual.ln_pre", width)?,
            ln_post: w.layer_norm("visual.ln_post", width)?,
            projection: w.projection("visual.proj", (width, arch.embed_dim))?,
            patch_size,
            width,
        })
    }

    /// `(batch, 3, side, side)` → `(batch, 1 + grid², width)` after the last block.
    fn tokens(&self, pixels: &Tensor, probe: Probe<'_>) -> Result<Tensor> {
        let (batch, channels, height, width) = pixels.dims4()?;
        let p = self.patch_size;
        let (rows, columns) = (height / p, width / p);
        // A convolution whose step is its kernel: every patch is one row of a matrix.
        let patches = pixels
            .reshape(&[batch, channels, rows, p, columns, p][..])?
            .permute([0, 2, 4, 1, 3, 5])?
            .reshape((batch, rows * columns, channels * p * p))?;
        let x = self.patches.forward(&patches)?;
        probe("conv1", &x)?;
        let class = self.class_embedding.broadcast_as((batch, 1, self.width))?;
        let x = Tensor::cat(&[&class, &x], 1)?.broadcast_add(&self.positions)?;
        let mut x = self.ln_pre.forward(&x)?;
        probe("ln_pre", &x)?;
        for (i, block) in self.blocks.iter().enumerate() {
            x = block.forward(&x, false)?;
            probe(&format!("block{i}"), &x)?;
        }
        Ok(x)
    }

    /// The class token's feature, `(batch, embed_dim)`.
    pub(crate) fn encode(&self, pixels: &Tensor, probe: Probe<'_>) -> Result<Tensor> {
        let class = self.tokens(pixels, probe)?.i((.., 0))?.contiguous()?;
        let class = self.ln_post.forward(&class)?;
        probe("ln_post", &class)?;
        self.projection.forward(&class)
    }

    /// Every token's feature, `(batch, 1 + grid², embed_dim)`.
    pub(crate) fn encode_dense(&self, pixels: &Tensor) -> Result<Tensor> {
        let x = self.tokens(pixels, &mut |_, _| Ok(()))?;
        self.projection.forward(&self.ln_post.forward(&x)?)
    }

    pub(crate) fn bytes(&self) -> usize {
        self.patches.bytes()
            + self.projection.bytes()
            + self.blocks.iter().map(Block::bytes).sum::<usize>()
    }
}
