//! The vision transformer.

use std::sync::Arc;

use candle_core::{IndexOp, Tensor};

use super::Glimpses;
use super::block::{Block, Weights};
use super::text::Probe;
use super::vit_run::{self, Runner, Wanted};
use crate::engine::buffers::Buffers;
use crate::engine::image::run::Entry;
use crate::ops::{self, LayerNorm, Linear, with_values};
use crate::{Arch, Error, HEAD_WIDTH, Result};

#[derive(Debug)]
pub(crate) struct Vit {
    /// `(1, 1, width)`.
    class_embedding: Tensor,
    /// `(1 + grid², width)`.
    positions: Tensor,
    /// Both as plain numbers, if no weight is learned.
    pub(super) entry: Option<Arc<Entry>>,
    pub(super) patches: Linear,
    pub(super) ln_pre: LayerNorm,
    /// Shared with the operations that run them.
    pub(super) blocks: Arc<Vec<Block>>,
    pub(super) ln_post: LayerNorm,
    pub(super) projection: Linear,
    patch_size: usize,
    pub(super) width: usize,
    embed_dim: usize,
    /// Pixels of a side.
    side: usize,
    /// What a pass over prompted images may take at most, in bytes.
    pub(super) memory_budget: Option<u64>,
    /// What such passes are computed in, from one to the next.
    pub(super) buffers: Arc<Buffers>,
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
        let conv1 = w.affine(
            "visual.conv1.weight",
            &[width, 3, patch_size, patch_size],
            None,
            (width, patch),
        )?;
        let class_embedding = w.tensor("visual.class_embedding", &[width])?;
        let blocks = (0..layers).map(|i| {
            let prefix = format!("visual.transformer.resblocks.{i}");
            Block::load(w, &prefix, width, width / HEAD_WIDTH, arch.activation)
        });
        let blocks = Arc::new(blocks.collect::<Result<_>>()?);
        let positions = w.tensor("visual.positional_embedding", &[1 + grid * grid, width])?;
        let entry = match w.is_learned() {
            true => None,
            false => Some(Arc::new(Entry {
                class_embedding: class_embedding.to_vec1()?,
                positions: positions.flatten_all()?.to_vec1()?,
            })),
        };
        Ok(Self {
            entry,
            blocks,
            class_embedding: class_embedding.reshape((1, 1, width))?,
            positions,
            patches: conv1,
            ln_pre: w.layer_norm("visual.ln_pre", width)?,
            ln_post: w.layer_norm("visual.ln_post", width)?,
            projection: w.projection("visual.proj", (width, arch.embed_dim))?,
            patch_size,
            width,
            embed_dim: arch.embed_dim,
            side: arch.image_resolution,
            memory_budget: None,
            buffers: Arc::default(),
        })
    }

    /// Whether pixels need a gradient through frozen weights.
    pub(super) fn is_engine_wanted(&self, pixels: &Tensor) -> bool {
        pixels.track_op() && self.entry.is_some()
    }

    /// Class token and patches.
    pub(super) fn token_count(&self) -> usize {
        let grid = self.side / self.patch_size;
        1 + grid * grid
    }

    /// Every patch's pixels as a row: `(batch, 3, side, side)` → `(batch, grid², 3·patch²)`.
    pub(super) fn patch_rows(&self, pixels: &Tensor) -> Result<Tensor> {
        let (batch, channels, height, width) = pixels.dims4()?;
        let p = self.patch_size;
        let (rows, columns) = (height / p, width / p);
        // A convolution whose step is its kernel: every patch is one row of a matrix.
        Ok(pixels
            .reshape(&[batch, channels, rows, p, columns, p][..])?
            .permute([0, 2, 4, 1, 3, 5])?
            .reshape((batch, rows * columns, channels * p * p))?)
    }

    /// What the first block reads: patches `(batch, n, 3·patch²)`, and the positions `(1 + n, width)` or
    /// `(batch, 1 + n, width)` that belong to them.
    fn enter(&self, patches: &Tensor, positions: &Tensor, probe: Probe<'_>) -> Result<Tensor> {
        let x = self.patches.forward(patches)?;
        probe("conv1", &x)?;
        let x = self.join_class(&x, positions)?;
        probe("ln_pre", &x)?;
        Ok(x)
    }

    /// Embedded patches `(batch, n, width)` behind the class token, with their positions, after `ln_pre`.
    fn join_class(&self, patches: &Tensor, positions: &Tensor) -> Result<Tensor> {
        let class = self
            .class_embedding
            .broadcast_as((patches.dim(0)?, 1, self.width))?;
        let x = Tensor::cat(&[&class, patches], 1)?.broadcast_add(positions)?;
        self.ln_pre.forward(&x)
    }

    /// What the first block reads, `(batch, 1 + grid², width)`, from embedded patches `(batch, grid², width)`.
    pub(super) fn tokens_of(&self, patches: &Tensor) -> Result<Tensor> {
        self.join_class(patches, &self.positions)
    }

    /// `(batch, 3, side, side)` → `(batch, 1 + grid², width)` after the last block.
    fn tokens(&self, pixels: &Tensor, probe: Probe<'_>) -> Result<Tensor> {
        let mut x = self.enter(&self.patch_rows(pixels)?, &self.positions, probe)?;
        for (i, block) in self.blocks.iter().enumerate() {
            x = block.forward(&x, false)?;
            probe(&format!("block{i}"), &x)?;
        }
        Ok(x)
    }

    /// See [`super::ImageTower::encode_glimpses`].
    pub(crate) fn encode_glimpses(&self, pixels: &Tensor, seen: &Glimpses) -> Result<Tensor> {
        let batch = pixels.dim(0)?;
        let kept = seen.kept.first().map_or(0, Vec::len);
        let patches = self.patch_rows(pixels)?;
        let (_, n, pixels_of_patch) = patches.dims3()?;
        if seen.kept.len() != batch || seen.kept.iter().any(|kept_here| kept_here.len() != kept) {
            let message = "a glimpse lists equally many patches of every image";
            return Err(Error::Data(message.into()));
        }
        let index = |of: &mut dyn Iterator<Item = usize>| {
            let rows: Vec<u32> = of.map(|row| row as u32).collect();
            Tensor::new(rows, pixels.device())
        };
        let mut rows = (0..batch).flat_map(|i| seen.kept[i].iter().map(move |p| i * n + p));
        let patches = patches
            .reshape((batch * n, pixels_of_patch))?
            .index_select(&index(&mut rows)?, 0)?
            .reshape((batch, kept, pixels_of_patch))?;
        let places = |kept: &Vec<usize>| {
            let places: Vec<usize> = kept.iter().map(|p| p + 1).collect();
            std::iter::once(0).chain(places)
        };
        let positions = self
            .positions
            .index_select(&index(&mut seen.kept.iter().flat_map(places))?, 0)?
            .reshape((batch, 1 + kept, self.width))?;
        let mut x = self.enter(&patches, &positions, &mut |_, _| Ok(()))?;
        let Some((last, first)) = self.blocks.split_last() else {
            return Err(Error::Data("the image tower has no block".into()));
        };
        for block in first {
            x = block.forward(&x, false)?;
        }
        let mut rows = seen.values.iter().map(|(i, p)| i * (1 + kept) + 1 + p);
        let x = last.class_and_values(&x, &index(&mut rows)?)?;
        self.projection.forward(&self.ln_post.forward(&x)?)
    }

    /// Features of every image by itself: of the class token `(batch, embed_dim)`, or of every token
    /// `(batch, 1 + grid², embed_dim)`.
    pub(crate) fn features(&self, pixels: &Tensor, wanted: Wanted) -> Result<Tensor> {
        let Some(runner) = self.runner() else {
            // Matrix kernels choose their blocks by the number of rows: alone, an image has its own bits.
            return ops::row_by_row(pixels, |_, image| match wanted {
                Wanted::ClassToken => self.encode(image, &mut |_, _| Ok(())),
                Wanted::EveryToken => self.encode_dense(image),
            });
        };
        let features = with_values(pixels, |pixels| runner.run(pixels, wanted))?;
        let mut shape = vec![pixels.dim(0)?, self.embed_dim];
        if let Wanted::EveryToken = wanted {
            shape.insert(1, self.token_count());
        }
        Ok(Tensor::from_vec(features, shape, pixels.device())?)
    }

    /// Floats in which one image is computed.
    pub(crate) fn room(&self) -> usize {
        vit_run::sizes(self.token_count(), self.width, self.patch_size)
            .iter()
            .sum()
    }

    /// The tower as plain loops, if no weight is learned.
    fn runner(&self) -> Option<Runner<'_>> {
        Some(Runner {
            entry: self.entry.as_deref()?,
            patches: self.patches.as_frozen()?,
            ln_pre: self.ln_pre.as_frozen()?,
            blocks: self
                .blocks
                .iter()
                .map(Block::frozen)
                .collect::<Option<_>>()?,
            ln_post: self.ln_post.as_frozen()?,
            projection: self.projection.as_frozen()?,
            patch_size: self.patch_size,
            side: self.side,
        })
    }

    /// The class token's feature, `(batch, embed_dim)`, the batch as a whole.
    pub(crate) fn encode(&self, pixels: &Tensor, probe: Probe<'_>) -> Result<Tensor> {
        let class = self.tokens(pixels, probe)?.i((.., 0))?.contiguous()?;
        let class = self.ln_post.forward(&class)?;
        probe("ln_post", &class)?;
        self.projection.forward(&class)
    }

    /// Every token's feature, `(batch, 1 + grid², embed_dim)`, the batch as a whole.
    fn encode_dense(&self, pixels: &Tensor) -> Result<Tensor> {
        let x = self.tokens(pixels, &mut |_, _| Ok(()))?;
        self.projection.forward(&self.ln_post.forward(&x)?)
    }

    pub(crate) fn bytes(&self) -> usize {
        self.patches.bytes()
            + self.projection.bytes()
            + self.blocks.iter().map(Block::bytes).sum::<usize>()
    }
}
