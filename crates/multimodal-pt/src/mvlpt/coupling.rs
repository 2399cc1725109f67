//! The network through which the prompts of both towers pass before they enter them (UPT of MVLPT's code).

use candle_core::Tensor;
use cliptune_core::layers::{Affine, Norm, SelfAttention};
use cliptune_core::{Activation, Params, Result, ops};
use serde::{Deserialize, Serialize};

use crate::coupling::Interaction;

/// What couples the prompts of the two towers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ProjectMethod {
    /// One block of CLIP's transformer with one head.
    #[default]
    Transformer,
    /// A GELU between the maps to and from the common width.
    Mlp,
    /// Nothing: the prompts enter the towers as they are learned.
    Identity,
}

/// Maps of a tower's prompts to the common width and back.
#[derive(Debug)]
struct Maps {
    pre: Affine,
    post: Affine,
}

impl Maps {
    /// Maps under the authors' keys; a tower of the common width has none.
    fn new(params: &mut Params, tower: &str, width: usize, common: usize) -> Result<Option<Self>> {
        if width == common {
            return Ok(None);
        }
        let key = |end: &str| format!("mvlpt_proj_ctx_{tower}_{end}");
        Ok(Some(Self {
            pre: Affine::new(params, &key("pre"), (common, width))?,
            post: Affine::new(params, &key("post"), (width, common))?,
        }))
    }
}

/// A block of CLIP's transformer: `Z' = Z + A(LN1 Z)`, `Z'' = Z' + MLP(LN2 Z')`.
#[derive(Debug)]
struct Block {
    ln_1: Norm,
    attention: SelfAttention,
    ln_2: Norm,
    widen: Affine,
    narrow: Affine,
}

impl Block {
    fn new(params: &mut Params, width: usize) -> Result<Self> {
        params.below("mvlpt_proj.resblocks.0.", |params| {
            Ok(Self {
                ln_1: Norm::new(params, "ln_1", width)?,
                attention: SelfAttention::new(params, "attn", width, 1)?,
                ln_2: Norm::new(params, "ln_2", width)?,
                widen: Affine::new(params, "mlp.c_fc", (4 * width, width))?,
                narrow: Affine::new(params, "mlp.c_proj", (width, 4 * width))?,
            })
        })
    }

    /// `(sequences, tokens, width)` → the same.
    fn forward(&self, z: &Tensor) -> Result<Tensor> {
        let z = (z + self.attention.forward(&self.ln_1.forward(z)?, None)?)?;
        let hidden = self.widen.forward(&self.ln_2.forward(&z)?)?;
        let hidden = ops::activation(&hidden, Activation::QuickGelu)?;
        Ok((&z + self.narrow.forward(&hidden)?)?)
    }
}

/// Between the maps.
#[derive(Debug)]
enum Network {
    Transformer(Box<Block>),
    Gelu,
}

/// Makes the prompts of both towers of the learned ones. Around the whole there is no residual: a learned prompt enters its
/// tower only through the network.
#[derive(Debug)]
pub(super) struct Coupling {
    text: Option<Maps>,
    vision: Option<Maps>,
    network: Network,
    interaction: Interaction,
}

impl Coupling {
    /// The network of `method`, `None` if there is none, for towers of two widths and a common width.
    pub(super) fn new(
        params: &mut Params,
        method: ProjectMethod,
        interaction: Interaction,
        (text, vision): (usize, usize),
        common: usize,
    ) -> Result<Option<Self>> {
        if method == ProjectMethod::Identity {
            return Ok(None);
        }
        Ok(Some(Self {
            text: Maps::new(params, "coop", text, common)?,
            vision: Maps::new(params, "vpt", vision, common)?,
            network: match method {
                ProjectMethod::Transformer => {
                    Network::Transformer(Box::new(Block::new(params, common)?))
                }
                _ => Network::Gelu,
            },
            interaction,
        }))
    }

    /// Text prompts `(.., n, text width)` and image prompts `(blocks, n, vision width)` → the same.
    pub(super) fn forward(&self, text: &Tensor, vision: &Tensor) -> Result<(Tensor, Tensor)> {
        let enter = |prompts: &Tensor, maps: &Option<Maps>| -> Result<Tensor> {
            let width = prompts.dim(candle_core::D::Minus1)?;
            let rows = prompts.reshape(((), width))?;
            match maps {
                Some(maps) => maps.pre.forward(&rows),
                None => Ok(rows),
            }
        };
        let (of_text, of_vision) = (enter(text, &self.text)?, enter(vision, &self.vision)?);
        let (n_text, n_vision) = (of_text.dim(0)?, of_vision.dim(0)?);
        let z = Tensor::cat(&[of_text, of_vision], 0)?;
        let coupled = match &self.network {
            Network::Transformer(block) => {
                let sequences = block.forward(&self.interaction.sequences(&z)?)?;
                sequences.reshape(z.shape())?
            }
            Network::Gelu => ops::activation(&z, Activation::Gelu)?,
        };
        let leave =
            |first: usize, rows: usize, maps: &Option<Maps>, like: &Tensor| -> Result<Tensor> {
                let rows = coupled.narrow(0, first, rows)?.contiguous()?;
                let rows = match maps {
                    Some(maps) => maps.post.forward(&rows)?,
                    None => rows,
                };
                Ok(rows.reshape(like.shape())?)
            };
        Ok((
            leave(0, n_text, &self.text, text)?,
            leave(n_text, n_vision, &self.vision, vision)?,
        ))
    }
}
