//! Declared visual prompts: a method says which learned tokens join an image's own, and where in the image tower; the tower
//! decides how to run them.
//!
//! A prompt token is a row as wide as the tower. It joins the class token and the patches at the input of a block, or before
//! `ln_pre`. What joins stays for all later blocks ([`VisualPrompts::join`]) or until other tokens replace it
//! ([`VisualPrompts::replace`]). Tokens may be one set for all images, a set for each image, or several sets each of which
//! every image runs with ([`Tokens`]).
//!
//! Among the image's tokens a prompt token has no place: it carries no position embedding, and attention does not see order.
//! Whether the authors put theirs behind the class token (UPT, MVLPT) or behind the patches (MaPLe, deep VPT, CAVPT), the image's
//! tokens come out the same. So there is nothing to declare.
//!
//! | method | declaration |
//! | --- | --- |
//! | deep VPT, IVLP, MaPLe | [`VisualPrompts::deep`] of `Shared`: `join_before_ln_pre`, then `replace(l, ..)` for block 1, 2, ... |
//! | UPT | `join_before_ln_pre(Shared)` |
//! | MVLPT | `replace(l, Shared)` for block 0, 1, ... |
//! | PLOT++ | `join_before_ln_pre(PerSet)` |
//! | RePrompt | [`VisualPrompts::deep`] of `PerImage` |
//! | CAVPT | `replace(l, Shared)` in the lower blocks, `replace(l, PerImage)` in the upper |
//! | LASP | [`VisualPrompts::tune_layer_norms`] |
//! | VP | none: the learned frame is added to the patches, see [`crate::clip::ImageTower::patches`] |
//!
//! # Example
//!
//! ```
//! use candle_core::{Device, Tensor};
//! use cliptune_core::checkpoint::random;
//! use cliptune_core::visual_prompt::{Tokens, VisualPrompts};
//! use cliptune_core::{Activation, Arch, Clip, Gradients, Params, Storage, VisionArch};
//!
//! # fn main() -> cliptune_core::Result<()> {
//! # let vision = VisionArch::Vit { layers: 3, width: 64, patch_size: 16 };
//! # let arch = Arch {
//! #     embed_dim: 32, image_resolution: 32, vision, context_length: 16, vocab_size: 8,
//! #     text_width: 64, text_layers: 1, activation: Activation::QuickGelu,
//! # };
//! let clip = Clip::from_checkpoint(random(&arch, 1)?, Storage::F32)?;
//! let mut params = Params::new(1);
//! // Deep visual prompt tuning: two tokens, replaced again at block 1.
//! let first = params.normal("VPT", (2, 64), 0.02)?;
//! let second = params.normal("VPT_shallow", (2, 64), 0.02)?;
//! let mut prompts = VisualPrompts::new();
//! prompts.join_before_ln_pre(Tokens::Shared(first.tensor().clone()));
//! prompts.replace(1, Tokens::Shared(second.tensor().clone()));
//!
//! let pixels = Tensor::zeros((4, 3, 32, 32), candle_core::DType::F32, &Device::Cpu)?;
//! // Fixed views: embed their patches once, and keep them.
//! let patches = clip.image().patches(&pixels)?;
//! let features = clip.image().encode_prompted(&patches, &prompts)?; // (4, 32)
//! let gradients = Gradients::of(&features.sqr()?.sum_all()?, &params)?;
//! assert!(gradients.get("VPT_shallow").is_some());
//! # Ok(())
//! # }
//! ```

use std::ops::Range;

use candle_core::{DType, Device, Tensor};

use crate::engine::image::plan::{Declared, Joining, Outline, Plan, Wanted, Whose};
use crate::params::check_finite;
use crate::{Error, Result};

/// Prompt tokens, learned or not.
#[derive(Clone, Debug)]
pub enum Tokens {
    /// `(n, width)`, the same for every image.
    Shared(Tensor),
    /// `(batch, n, width)`: every image's own.
    PerImage(Tensor),
    /// `(sets, n, width)`: every image runs with every set.
    PerSet(Tensor),
}

impl Tokens {
    fn tensor(&self) -> &Tensor {
        match self {
            Self::Shared(t) | Self::PerImage(t) | Self::PerSet(t) => t,
        }
    }
}

/// Gain and bias of a LayerNorm, `(width)` each.
#[derive(Clone, Debug)]
pub struct NormWeights {
    /// The factors (state-dict key `weight`).
    pub weight: Tensor,
    /// What is added.
    pub bias: Tensor,
}

/// The LayerNorms of a block.
#[derive(Clone, Debug)]
pub struct BlockNorms {
    /// Before attention.
    pub ln_1: NormWeights,
    /// Before the MLP.
    pub ln_2: NormWeights,
}

impl BlockNorms {
    fn tensors(&self) -> [&Tensor; 4] {
        [
            &self.ln_1.weight,
            &self.ln_1.bias,
            &self.ln_2.weight,
            &self.ln_2.bias,
        ]
    }
}

/// Tokens that join, and where.
#[derive(Clone, Debug)]
struct Join {
    block: usize,
    before_ln_pre: bool,
    tokens: Tokens,
}

/// What is learned in an image tower.
#[derive(Clone, Debug, Default)]
pub struct VisualPrompts {
    joins: Vec<Join>,
    /// Blocks that drop the prompt tokens that come from below.
    replaced: Vec<usize>,
    norms: Option<Vec<BlockNorms>>,
}

impl VisualPrompts {
    /// Nothing: the tower as it is.
    pub fn new() -> Self {
        Self::default()
    }

    /// Deep prompts: those of block 0 join before `ln_pre`, those of block 1, 2, ... replace the ones before them (MaPLe's
    /// repository).
    pub fn deep(by_block: impl IntoIterator<Item = Tokens>) -> Self {
        let mut prompts = Self::new();
        for (block, tokens) in by_block.into_iter().enumerate() {
            match block {
                0 => prompts.join_before_ln_pre(tokens),
                _ => prompts.replace(block, tokens),
            }
        }
        prompts
    }

    /// Lets tokens join the image's own before `ln_pre`, which they pass too.
    pub fn join_before_ln_pre(&mut self, tokens: Tokens) {
        self.joins.push(Join {
            block: 0,
            before_ln_pre: true,
            tokens,
        });
    }

    /// Lets tokens join at the input of `block`, counted from 0, beside those that are there.
    pub fn join(&mut self, block: usize, tokens: Tokens) {
        self.joins.push(Join {
            block,
            before_ln_pre: false,
            tokens,
        });
    }

    /// Lets tokens join at the input of `block` in place of all prompt tokens that come from the blocks below. At block 0 there
    /// is nothing to replace.
    pub fn replace(&mut self, block: usize, tokens: Tokens) {
        self.remove(block);
        self.join(block, tokens);
    }

    /// Drops the prompt tokens that come from the blocks below `block`.
    pub fn remove(&mut self, block: usize) {
        self.replaced.push(block);
    }

    /// Uses these gains and biases in place of the blocks' own, one entry for every block; learn them by starting from
    /// [`crate::clip::ImageTower::block_norms`]. `ln_pre` and `ln_post` stay as they are.
    pub fn tune_layer_norms(&mut self, norms: Vec<BlockNorms>) {
        self.norms = Some(norms);
    }

    /// Whether no tokens join or leave.
    pub(crate) fn is_empty(&self) -> bool {
        self.joins.is_empty() && self.replaced.is_empty()
    }

    /// What is declared for blocks below `block`.
    pub(crate) fn below(&self, block: usize) -> Self {
        let mut below = self.clone();
        below.joins.retain(|join| join.block < block);
        below.replaced.retain(|replaced| *replaced < block);
        below
    }

    /// Number of sets, if any tokens come in sets.
    fn sets(&self) -> Result<Option<usize>> {
        let mut sets = None;
        for join in &self.joins {
            if let Tokens::PerSet(tokens) = &join.tokens {
                let found = tokens.dims().first().copied().unwrap_or(0);
                if found == 0 || sets.is_some_and(|known| known != found) {
                    return Err(Error::Prompt(format!(
                        "visual prompts of block {} come in {found} sets, others in {}; every entry needs the same number, at least 1",
                        join.block,
                        sets.unwrap_or(0)
                    )));
                }
                sets = Some(found);
            }
        }
        Ok(sets)
    }

    /// How the prompts are run, and the tables of what there is to read.
    pub(crate) fn lay_out(&self, tower: &Sizes, stretch: &Stretch) -> Result<LaidOut> {
        let blocks = &stretch.blocks;
        for block in self
            .joins
            .iter()
            .map(|j| j.block)
            .chain(self.replaced.iter().copied())
        {
            if !blocks.contains(&block) {
                return Err(Error::Prompt(format!(
                    "visual prompts at block {block}; the image tower has {} blocks, and blocks {} to {} run here (lower the prompt depth)",
                    tower.blocks,
                    blocks.start,
                    blocks.end.saturating_sub(1)
                )));
            }
        }
        let sets = self.sets()?;
        if sets.is_some() && blocks.end < tower.blocks {
            return Err(Error::Prompt(
                "tokens on their way through the image tower cannot come in sets; let sets join in the last stretch".into(),
            ));
        }
        let mut joins: Vec<&Join> = self.joins.iter().collect();
        joins.sort_by_key(|j| (j.block, !j.before_ln_pre));
        let mut declared: Vec<Declared> = blocks
            .clone()
            .map(|block| Declared {
                replaces: self.replaced.contains(&block),
                ..Declared::default()
            })
            .collect();
        let (mut table, mut rows, mut normed) = (Vec::new(), 0, 0);
        let mut joins = joins.into_iter().peekable();
        for (block, declared) in blocks.clone().zip(&mut declared) {
            let first_of_block = rows;
            while let Some(join) = joins.next_if(|j| j.block == block) {
                if join.before_ln_pre && !stretch.with_entry {
                    return Err(Error::Prompt(
                        "tokens that join before ln_pre, for images that have passed it; let them join at a block".into(),
                    ));
                }
                let (n, whose) = join.check(tower.width, stretch.images)?;
                let tensor = join.tokens.tensor();
                let joining = Joining {
                    first: rows,
                    rows: n,
                    whose,
                    learned: tensor.track_op(),
                };
                if n == 0 {
                    continue;
                }
                let of_all = tensor.elem_count() / tower.width;
                table.push(tensor.reshape((of_all, tower.width))?);
                rows += of_all;
                if join.before_ln_pre {
                    normed = rows;
                }
                declared.joining.push(joining);
            }
            declared.table = first_of_block..rows;
        }
        // Operations have a fixed number of arguments: constants stand in for what is not there.
        let nothing = || Tensor::zeros((1, tower.width), DType::F32, &Device::Cpu);
        let table = match table.len() {
            0 => nothing()?,
            1 => table.remove(0),
            _ => Tensor::cat(&table, 0)?,
        };
        let norms = self.lay_out_norms(tower, blocks)?;
        let wanted = Wanted {
            table: table.track_op(),
            norms: norms.as_ref().is_some_and(Tensor::track_op),
            input: stretch.input_learned,
        };
        let plan = Plan::new(Outline {
            first: blocks.start,
            declared,
            tokens: tower.tokens,
            width: tower.width,
            images: stretch.images,
            sets: sets.unwrap_or(1),
            normed,
            table: rows,
            read: stretch.read,
            wanted,
        });
        Ok(LaidOut {
            plan,
            table,
            normed: norms.is_some(),
            norms: norms.map_or_else(nothing, Ok)?,
            sets,
        })
    }

    /// Gains and biases of the blocks, `(4·blocks, width)`.
    fn lay_out_norms(&self, tower: &Sizes, blocks: &Range<usize>) -> Result<Option<Tensor>> {
        let Some(norms) = &self.norms else {
            return Ok(None);
        };
        if norms.len() != tower.blocks {
            return Err(Error::Prompt(format!(
                "LayerNorms of {} blocks for an image tower of {}; give those of every block, learned or not",
                norms.len(),
                tower.blocks
            )));
        }
        let mut table = Vec::new();
        for (block, norms) in norms.iter().enumerate() {
            for tensor in norms.tensors() {
                let what = format!("LayerNorm of block {block} of the image tower");
                if tensor.dims() != [tower.width] {
                    return Err(Error::Shape {
                        what,
                        found: tensor.dims().to_vec(),
                        expected: vec![tower.width],
                    });
                }
                check_finite(tensor, &what)?;
                if blocks.contains(&block) {
                    table.push(tensor);
                }
            }
        }
        Ok(Some(Tensor::stack(&table, 0)?))
    }
}

impl Join {
    /// Tokens of a run, and whose they are.
    fn check(&self, width: usize, images: usize) -> Result<(usize, Whose)> {
        let tensor = self.tokens.tensor();
        let what = match self.before_ln_pre {
            true => "visual prompts before ln_pre".to_owned(),
            false => format!("visual prompts at block {}", self.block),
        };
        let dims = tensor.dims();
        let (whose, leading) = match self.tokens {
            Tokens::Shared(_) => (Whose::Everyone, None),
            Tokens::PerImage(_) => (Whose::Image, Some(images)),
            Tokens::PerSet(_) => (Whose::Set, Some(dims.first().copied().unwrap_or(1))),
        };
        let n = dims.len().checked_sub(2).map_or(1, |i| dims[i]);
        let expected: Vec<usize> = leading.into_iter().chain([n, width]).collect();
        if dims != expected {
            return Err(Error::Shape {
                what,
                found: dims.to_vec(),
                expected,
            });
        }
        check_finite(tensor, &what)?;
        Ok((n, whose))
    }
}

/// What a declaration is checked against.
pub(crate) struct Sizes {
    pub(crate) blocks: usize,
    pub(crate) width: usize,
    /// Class token and patches.
    pub(crate) tokens: usize,
}

/// Which part of the tower runs, over what.
pub(crate) struct Stretch {
    pub(crate) blocks: Range<usize>,
    pub(crate) images: usize,
    /// Whether it begins with patches.
    pub(crate) with_entry: bool,
    /// Whether the patches or tokens have a gradient.
    pub(crate) input_learned: bool,
    /// Tokens that are read at the end.
    pub(crate) read: usize,
}

/// A declaration ready to run.
pub(crate) struct LaidOut {
    pub(crate) plan: Plan,
    /// `(rows, width)`.
    pub(crate) table: Tensor,
    /// Whether `norms` are gains and biases.
    pub(crate) normed: bool,
    pub(crate) norms: Tensor,
    /// How many sets there are, if tokens come in sets.
    pub(crate) sets: Option<usize>,
}
