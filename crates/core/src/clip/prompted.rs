//! The image tower with visual prompts.

use std::ops::Range;

use candle_core::{DType, Device, Tensor};

use super::vit::Vit;
use super::{ImageTower, Tower};
use crate::engine::image::{self, Kept};
use crate::engine::memory::Forecast;
use crate::ops::FrozenNorm;
use crate::visual_prompt::{BlockNorms, LaidOut, NormWeights, Sizes, Stretch, VisualPrompts};
use crate::{Error, Result};

/// What prompts run over.
#[derive(Clone, Copy)]
enum From<'a> {
    /// Pixels `(batch, 3, side, side)` or patches `(batch, grid², width)`.
    Images(&'a Tensor),
    /// What a block reads, `(batch, 1 + grid², width)`.
    Block(usize, &'a Tensor),
}

impl From<'_> {
    /// The way up to block `end`, after which so many tokens are read.
    fn stretch(self, end: usize, read: usize) -> Result<Stretch> {
        let (input, first) = match self {
            Self::Images(images) => (images, 0),
            Self::Block(block, tokens) => (tokens, block),
        };
        Ok(Stretch {
            blocks: first..end,
            images: input.dim(0)?,
            with_entry: matches!(self, Self::Images(_)),
            input_learned: input.track_op(),
            read,
        })
    }
}

/// What the engine needs of a tower whose weights are not learned.
struct Frozen<'a> {
    vit: &'a Vit,
    ln_pre: &'a FrozenNorm,
}

impl Frozen<'_> {
    fn sizes(&self) -> Sizes {
        Sizes {
            blocks: self.vit.blocks.len(),
            width: self.vit.width,
            tokens: self.vit.token_count(),
        }
    }

    fn lay_out(&self, stretch: &Stretch, prompts: &VisualPrompts) -> Result<(LaidOut, Forecast)> {
        let laid_out = prompts.lay_out(&self.sizes(), stretch)?;
        let forecast = image::forecast(
            &self.vit.blocks,
            self.ln_pre,
            &laid_out.plan,
            stretch.with_entry,
            self.vit.memory_budget,
        )?;
        Ok((laid_out, forecast))
    }
}

impl ImageTower {
    /// A ViT without learned weights; others take no prompts.
    fn frozen(&self) -> Result<Frozen<'_>> {
        let Tower::Vit(vit) = &self.tower else {
            return Err(Error::Prompt(
                "visual prompts need an image tower that is a ViT, this one is a ResNet; take ViT weights, or a method that learns text prompts only".into(),
            ));
        };
        match (&vit.entry, vit.ln_pre.as_frozen()) {
            (Some(_), Some(ln_pre)) => Ok(Frozen { vit, ln_pre }),
            _ => Err(Error::Prompt(
                "visual prompts need a frozen image tower; the weights of this one are learned"
                    .into(),
            )),
        }
    }

    /// Whether it takes visual prompts: a ViT whose weights are not learned.
    pub fn takes_prompts(&self) -> bool {
        self.frozen().is_ok()
    }

    /// Embedded patches, `(batch, 3, side, side)` → `(batch, grid², width)`: the convolution's output, without class token and
    /// positions.
    ///
    /// It depends on the pixels alone: for fixed views, embed once and keep. It is linear and has no bias, so a perturbation of
    /// the pixels may be embedded by itself and added (VP): `patches(x + δ) = patches(x) + patches(δ)`. Differentiable.
    ///
    /// # Errors
    /// As [`ImageTower::encode`]; [`Error::Prompt`] for a ResNet or a tower that is trained itself.
    pub fn patches(&self, pixels: &Tensor) -> Result<Tensor> {
        let vit = self.frozen()?.vit;
        self.expect(pixels)?;
        vit.patches.forward(&vit.patch_rows(pixels)?)
    }

    /// Raw features of images with visual prompts: pixels `(batch, 3, side, side)` or [`ImageTower::patches`]
    /// `(batch, grid², width)` → `(batch, embed_dim)`, or `(sets, batch, embed_dim)` if tokens come in sets.
    ///
    /// Gradients reach whatever is tracked: tokens, LayerNorms' gains and biases, patches, pixels. Only what leads to one of
    /// these is computed backward, and prompt rows whose output nobody reads give keys and values only.
    ///
    /// An image's feature has the same bits whatever stands beside it in the batch, on any number of threads and under any memory
    /// budget; without prompts, those of [`ImageTower::encode`].
    ///
    /// # Errors
    /// Before anything is computed: [`Error::Prompt`] for a ResNet or prompts at a block that is not there, [`Error::Shape`] if
    /// tokens or images do not fit the tower or the batch, [`Error::NotFinite`] if a token is NaN or infinite,
    /// [`Error::Memory`] if the memory budget is too small whatever is recomputed.
    pub fn encode_prompted(&self, images: &Tensor, prompts: &VisualPrompts) -> Result<Tensor> {
        let blocks = self.frozen()?.vit.blocks.len();
        let (x, sets) = self.run_prompted(From::Images(images), blocks, 1, prompts)?;
        self.features_of(&x, sets, false)
    }

    /// As [`ImageTower::encode_prompted`], of every token of the image: `(batch, 1 + grid², embed_dim)`, or
    /// `(sets, batch, 1 + grid², embed_dim)`, the class token first. Prompt tokens have no features.
    ///
    /// # Errors
    /// As [`ImageTower::encode_prompted`].
    pub fn encode_prompted_dense(
        &self,
        images: &Tensor,
        prompts: &VisualPrompts,
    ) -> Result<Tensor> {
        let sizes = self.frozen()?.sizes();
        let (x, sets) =
            self.run_prompted(From::Images(images), sizes.blocks, sizes.tokens, prompts)?;
        self.features_of(&x, sets, true)
    }

    /// The images' own tokens at the input of `block`, `(batch, 1 + grid², width)`: what prompts that depend on the image are
    /// made from (CAVPT). Go on with [`ImageTower::encode_prompted_from`]; prompt tokens do not come along.
    ///
    /// # Errors
    /// As [`ImageTower::encode_prompted`]; [`Error::Prompt`] if there is no such block, if prompts are declared below block
    /// 0, or if tokens come in sets.
    pub fn prompted_tokens(
        &self,
        images: &Tensor,
        block: usize,
        prompts: &VisualPrompts,
    ) -> Result<Tensor> {
        let tower = self.frozen()?;
        let sizes = tower.sizes();
        check_border(0..sizes.blocks, block, &sizes)?;
        let from = From::Images(images);
        if block == 0 {
            self.check(from, &sizes)?;
            if !prompts.is_empty() {
                return Err(Error::Prompt(
                    "no block runs before block 0, so no visual prompts can join there; declare them for the blocks above".into(),
                ));
            }
            let patches = match images.rank() {
                4 => self.patches(images)?,
                _ => images.to_dtype(DType::F32)?,
            };
            return tower.vit.tokens_of(&patches);
        }
        let (x, _) = self.run_prompted(from, block, sizes.tokens, prompts)?;
        Ok(x)
    }

    /// As [`ImageTower::prompted_tokens`] at the input of block `to`, from the tokens `(batch, 1 + grid², width)` that block
    /// `from` reads; blocks keep their numbers in the declaration.
    ///
    /// # Errors
    /// As [`ImageTower::prompted_tokens`]; [`Error::Prompt`] if `to` does not lie behind `from`.
    pub fn prompted_tokens_from(
        &self,
        tokens: &Tensor,
        from: usize,
        to: usize,
        prompts: &VisualPrompts,
    ) -> Result<Tensor> {
        let sizes = self.frozen()?.sizes();
        check_border(from + 1..sizes.blocks, to, &sizes)?;
        let (x, _) = self.run_prompted(From::Block(from, tokens), to, sizes.tokens, prompts)?;
        Ok(x)
    }

    /// As [`ImageTower::encode_prompted`] from the tokens `(batch, 1 + grid², width)` that `block` reads; blocks keep their
    /// numbers in the declaration.
    ///
    /// # Errors
    /// As [`ImageTower::prompted_tokens`].
    pub fn encode_prompted_from(
        &self,
        tokens: &Tensor,
        block: usize,
        prompts: &VisualPrompts,
    ) -> Result<Tensor> {
        let sizes = self.frozen()?.sizes();
        check_border(0..sizes.blocks, block, &sizes)?;
        let (x, sets) = self.run_prompted(From::Block(block, tokens), sizes.blocks, 1, prompts)?;
        self.features_of(&x, sets, false)
    }

    /// Where the class token looks in the last block, `(batch, grid, grid)`: the share that each patch has of its attention to
    /// patches, the mean over heads; an image's shares sum to 1. Prompts take attention from all patches alike, so what they
    /// take in the last block itself does not show here. No gradients.
    ///
    /// # Errors
    /// As [`ImageTower::prompted_tokens`]; a tower of one block has no block to come before the last.
    pub fn class_attention(&self, images: &Tensor, prompts: &VisualPrompts) -> Result<Tensor> {
        let last = self.frozen()?.sizes().blocks.saturating_sub(1);
        let below = prompts.below(last);
        self.class_attention_from(&self.prompted_tokens(images, last, &below)?)
    }

    /// As [`ImageTower::class_attention`] from the tokens `(batch, 1 + grid², width)` that the last block reads.
    ///
    /// # Errors
    /// [`Error::Prompt`] for a ResNet or a tower that is trained itself, [`Error::Shape`] if the tokens are not the tower's.
    pub fn class_attention_from(&self, tokens: &Tensor) -> Result<Tensor> {
        let (vit, sizes) = (self.frozen()?.vit, self.frozen()?.sizes());
        let last = sizes.blocks.saturating_sub(1);
        self.check(From::Block(last, tokens), &sizes)?;
        let shares = vit.blocks[last].class_attention(&tokens.detach())?;
        let grid = (sizes.tokens - 1).isqrt();
        Ok(shares.reshape((shares.dim(0)?, grid, grid))?)
    }

    /// What [`ImageTower::encode_prompted`] of so many images and its way back take, known before anything runs; where no
    /// gradient is tracked, a forward pass. Patches are taken to be without a gradient.
    ///
    /// # Errors
    /// As [`ImageTower::encode_prompted`].
    pub fn forecast_prompted(&self, images: usize, prompts: &VisualPrompts) -> Result<Forecast> {
        self.forecast_step(images, prompts, false)
    }

    /// As [`ImageTower::forecast_prompted`] where the patches have a gradient, as under a perturbation of the pixels that is
    /// learned (VP).
    ///
    /// # Errors
    /// As [`ImageTower::encode_prompted`].
    pub fn forecast_perturbed(&self, images: usize, prompts: &VisualPrompts) -> Result<Forecast> {
        self.forecast_step(images, prompts, true)
    }

    fn forecast_step(
        &self,
        images: usize,
        prompts: &VisualPrompts,
        input_learned: bool,
    ) -> Result<Forecast> {
        let tower = self.frozen()?;
        let stretch = Stretch {
            blocks: 0..tower.vit.blocks.len(),
            images,
            with_entry: true,
            input_learned,
            read: 1,
        };
        tower
            .lay_out(&stretch, prompts)
            .map(|(_, forecast)| forecast)
    }

    /// The blocks' own LayerNorms: what [`VisualPrompts::tune_layer_norms`] starts from.
    ///
    /// # Errors
    /// [`Error::Prompt`] for a ResNet or a tower that is trained itself.
    pub fn block_norms(&self) -> Result<Vec<BlockNorms>> {
        let vit = self.frozen()?.vit;
        let weights = |norm: &FrozenNorm| -> Result<NormWeights> {
            let (weight, bias) = norm.weights();
            Ok(NormWeights {
                weight: Tensor::new(weight, &Device::Cpu)?,
                bias: Tensor::new(bias, &Device::Cpu)?,
            })
        };
        let blocks = vit.blocks.iter().filter_map(|block| block.frozen());
        let norms = blocks.map(|block| {
            Ok(BlockNorms {
                ln_1: weights(block.ln_1)?,
                ln_2: weights(block.ln_2)?,
            })
        });
        norms.collect()
    }

    /// See [`super::Clip::set_memory_budget`].
    pub(super) fn set_memory_budget(&mut self, bytes: Option<u64>) {
        if let Tower::Vit(vit) = &mut self.tower {
            vit.memory_budget = bytes;
            vit.buffers.clear();
        }
    }

    /// Refuses what is no batch of images or of their tokens.
    fn check(&self, from: From<'_>, sizes: &Sizes) -> Result<()> {
        match from {
            From::Images(pixels) if pixels.rank() == 4 => self.expect(pixels),
            From::Images(patches) => expect_rows(patches, true, sizes),
            From::Block(_, tokens) => expect_rows(tokens, false, sizes),
        }
    }

    /// Runs blocks up to `end`: `(runs, read, width)`, and the number of sets if tokens come in sets.
    fn run_prompted(
        &self,
        from: From<'_>,
        end: usize,
        read: usize,
        prompts: &VisualPrompts,
    ) -> Result<(Tensor, Option<usize>)> {
        let tower = self.frozen()?;
        let (vit, sizes) = (tower.vit, tower.sizes());
        self.check(from, &sizes)?;
        let stretch = from.stretch(end, read)?;
        let (laid_out, forecast) = tower.lay_out(&stretch, prompts)?;
        let input = match from {
            From::Images(pixels) if pixels.rank() == 4 => self.patches(pixels)?,
            From::Images(rows) | From::Block(_, rows) => rows.to_dtype(DType::F32)?,
        };
        let op = image::Tower {
            blocks: vit.blocks.clone(),
            entry: vit.entry.clone().filter(|_| stretch.with_entry),
            ln_pre: tower.ln_pre.clone(),
            plan: laid_out.plan,
            normed: laid_out.normed,
            buffers: vit.buffers.clone(),
            forecast,
            kept: Kept::default(),
        };
        let x = op.apply(&laid_out.table, &laid_out.norms, &input)?;
        Ok((x, laid_out.sets))
    }

    /// From tokens after the last block, `(runs, read, width)`, to features, with an axis of tokens for `every` token.
    fn features_of(&self, x: &Tensor, sets: Option<usize>, every: bool) -> Result<Tensor> {
        let vit = self.frozen()?.vit;
        let features = vit.projection.forward(&vit.ln_post.forward(x)?)?;
        let runs = features.dim(0)?;
        let mut shape = match sets {
            Some(sets) => vec![sets, runs / sets],
            None => vec![runs],
        };
        if every {
            shape.push(features.dim(1)?);
        }
        shape.push(self.embed_dim);
        Ok(features.reshape(shape)?)
    }
}

/// Where a tower may be cut in two: before one of `blocks`.
fn check_border(blocks: Range<usize>, block: usize, sizes: &Sizes) -> Result<()> {
    match blocks.contains(&block) {
        true => Ok(()),
        false => Err(Error::Prompt(format!(
            "the image tower has {} blocks and cannot be cut before block {block}; here one of {} to {} is expected",
            sizes.blocks,
            blocks.start,
            sizes.blocks.saturating_sub(1)
        ))),
    }
}

fn expect_rows(input: &Tensor, with_entry: bool, sizes: &Sizes) -> Result<()> {
    let rows = sizes.tokens - usize::from(with_entry);
    let batch = input.dims().first().copied().unwrap_or(1);
    if batch == 0 {
        return Err(Error::Data("the batch holds no image".into()));
    }
    if input.dims() == [batch, rows, sizes.width] {
        return Ok(());
    }
    let what = match with_entry {
        true => "patches of a batch of images",
        false => "tokens of a batch of images",
    };
    Err(Error::Shape {
        what: what.into(),
        found: input.dims().to_vec(),
        expected: vec![batch, rows, sizes.width],
    })
}
