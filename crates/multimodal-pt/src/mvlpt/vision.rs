//! The image prompts of MVLPT: one set for the first block or for every block.

use candle_core::Tensor;
use cliptune_core::layers::Affine;
use cliptune_core::rng::Rng;
use cliptune_core::train::Step;
use cliptune_core::visual_prompt::{Tokens, VisualPrompts};
use cliptune_core::{Clip, Param, Params, Result, VisionArch};

use crate::coupling;

/// The keys of the image prompts of the first block, and of the others.
pub(super) const FIRST: &str = "vpt_embeddings";
pub(super) const DEEPER: &str = "vpt_embeddings_deep";
/// The key of the map to the tower's width.
pub(super) const PROJECTION: &str = "vpt_proj";

/// Learned image prompts.
#[derive(Debug)]
pub(super) struct Vision {
    /// `(1, n, width)`.
    first: Param,
    /// `(blocks − 1, n, width)`.
    deeper: Option<Param>,
    /// To the tower's width, from a smaller one.
    projection: Option<Affine>,
    dropout: f64,
}

impl Vision {
    /// Prompts from U(−a, a), a = √(6 / (3·patch² + width)), for one block or for all; `project` is a width of their own.
    pub(super) fn new(
        params: &mut Params,
        clip: &Clip,
        n_ctx: usize,
        deep: bool,
        project: Option<usize>,
        dropout: f64,
    ) -> Result<Self> {
        let (blocks, tower_width) = clip.arch().vit_sizes()?;
        let patch = match clip.arch().vision {
            VisionArch::Vit { patch_size, .. } => patch_size,
            VisionArch::ResNet { .. } => 0,
        };
        let width = project.unwrap_or(tower_width);
        // Kaiming's for what goes out, as the authors have it.
        let std = (2.0 / tower_width as f64).sqrt();
        let projection = project.map(|w| Affine::normal(params, PROJECTION, (tower_width, w), std));
        let bound = (6.0 / (3 * patch * patch + width) as f64).sqrt();
        let range = (-bound, bound);
        let deeper =
            (deep && blocks > 1).then(|| params.uniform(DEEPER, (blocks - 1, n_ctx, width), range));
        Ok(Self {
            first: params.uniform(FIRST, (1, n_ctx, width), range)?,
            deeper: deeper.transpose()?,
            projection: projection.transpose()?,
            dropout,
        })
    }

    /// What is learned, `(blocks with prompts of their own, n, width)`.
    pub(super) fn tensor(&self) -> Result<Tensor> {
        let first = self.first.tensor();
        Ok(match &self.deeper {
            Some(deeper) => Tensor::cat(&[first, deeper.tensor()], 0)?,
            None => first.clone(),
        })
    }

    /// Prompts of the shape of [`Vision::tensor`] in the tower's width.
    pub(super) fn tokens(&self, prompts: &Tensor) -> Result<Tensor> {
        match &self.projection {
            Some(projection) => projection.forward(prompts),
            None => Ok(prompts.clone()),
        }
    }

    /// [`Vision::tokens`] as the tower takes them: behind `ln_pre`, replaced at every block that has its own. In training, so
    /// many images in a step, each image drops its own part.
    pub(super) fn declared(
        &self,
        by_block: &Tensor,
        training: Option<(usize, Step)>,
    ) -> Result<VisualPrompts> {
        let mut declared = VisualPrompts::new();
        for block in 0..by_block.dim(0)? {
            let tokens = by_block.get(block)?;
            let tokens = match training.filter(|_| self.dropout > 0.0) {
                Some((images, step)) => {
                    let counters = [step.epoch as u64, step.index as u64, block as u64];
                    let mut rng = Rng::stream(step.seed, "dropout/vpt", &counters);
                    let (n, width) = tokens.dims2()?;
                    let kept = coupling::kept(&mut rng, (images, n, width), self.dropout)?;
                    Tokens::PerImage(kept.broadcast_mul(&tokens)?)
                }
                None => Tokens::Shared(tokens),
            };
            declared.replace(block, tokens);
        }
        Ok(declared)
    }
}
