//! The residual block that both transformers are made of, and how frozen tensors become layers.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use candle_core::{DType, IndexOp, Tensor};
use half::f16;
use rayon::prelude::*;

use crate::kernels::Stored;
use crate::ops::{self, FrozenLinear, FrozenNorm, LayerNorm, Linear};
use crate::{Activation, Error, Result};

/// Hands out a checkpoint's tensors, each once, in the type in which they are to be kept.
pub(crate) struct Weights {
    path: PathBuf,
    tensors: BTreeMap<String, Tensor>,
    storage: DType,
    /// Whether layers hold the tensors themselves, which are variables.
    learned: bool,
}

impl Weights {
    pub(crate) fn new(path: &Path, tensors: BTreeMap<String, Tensor>, storage: DType) -> Self {
        Self {
            path: path.to_path_buf(),
            tensors,
            storage,
            learned: false,
        }
    }

    /// For layers that are trained: `tensors` are f32 variables, and the layers use them as they are.
    pub(crate) fn learned(path: &Path, tensors: BTreeMap<String, Tensor>) -> Self {
        Self {
            learned: true,
            ..Self::new(path, tensors, DType::F32)
        }
    }

    /// Whether layers hold variables.
    pub(crate) fn is_learned(&self) -> bool {
        self.learned
    }

    /// Takes the tensor out, so that it is freed as soon as the layer holds its own copy.
    pub(crate) fn take(&mut self, name: &str) -> Result<Tensor> {
        let missing = || Error::MissingTensor {
            path: self.path.clone(),
            name: name.to_owned(),
        };
        self.tensors.remove(name).ok_or_else(missing)
    }

    fn expect(&self, name: &str, tensor: &Tensor, expected: &[usize]) -> Result<()> {
        if tensor.dims() == expected {
            return Ok(());
        }
        let what = format!("{}: tensor `{name}`", self.path.display());
        Err(Error::Shape {
            what,
            found: tensor.dims().to_vec(),
            expected: expected.to_vec(),
        })
    }

    /// A small tensor (gain, bias, position table, scale) as f32.
    pub(crate) fn values(&mut self, name: &str, shape: &[usize]) -> Result<Vec<f32>> {
        let tensor = self.take(name)?;
        self.expect(name, &tensor, shape)?;
        Ok(tensor.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?)
    }

    /// As [`Weights::values`], as a tensor.
    pub(crate) fn tensor(&mut self, name: &str, shape: &[usize]) -> Result<Tensor> {
        let tensor = self.take(name)?;
        self.expect(name, &tensor, shape)?;
        Ok(tensor.to_dtype(DType::F32)?)
    }

    /// A matrix (or convolution) in the storage type.
    pub(crate) fn stored(&mut self, name: &str, shape: &[usize]) -> Result<Stored> {
        let tensor = self.take(name)?;
        self.expect(name, &tensor, shape)?;
        keep(&tensor, self.storage)
    }

    /// A table of rows in the storage type, or in 16 bits where that loses nothing.
    pub(crate) fn table(&self, tensor: &Tensor) -> Result<Tensor> {
        if self.storage != DType::F32 || matches!(tensor.dtype(), DType::F16 | DType::BF16) {
            return Ok(match self.storage {
                DType::F32 => tensor.clone(),
                storage => tensor.to_dtype(storage)?,
            });
        }
        let tensor = tensor.to_dtype(DType::F32)?;
        let short = ops::with_values(&tensor, |values| {
            values.par_iter().all(|x| f16::from_f32(*x).to_f32() == *x)
        })?;
        Ok(match short {
            true => tensor.to_dtype(DType::F16)?,
            false => tensor,
        })
    }

    /// A matrix made of several tensors, in the storage type.
    pub(crate) fn keep(&self, tensor: &Tensor) -> Result<Stored> {
        keep(tensor, self.storage)
    }

    /// An affine map from a tensor that holds `(out, in)` in its order, whatever its `shape`, and maybe a bias.
    pub(crate) fn affine(
        &mut self,
        weight: &str,
        shape: &[usize],
        bias: Option<&str>,
        (out, input): (usize, usize),
    ) -> Result<Linear> {
        if self.learned {
            let weight = self.tensor(weight, shape)?.reshape((out, input))?;
            let bias = bias.map(|name| self.tensor(name, &[out])).transpose()?;
            return Linear::learned(weight, bias);
        }
        let weight = self.stored(weight, shape)?;
        let bias = bias.map(|name| self.values(name, &[out])).transpose()?;
        Ok(Linear::frozen(weight, bias, (out, input)))
    }

    /// `name.weight (out, in)` and `name.bias`.
    pub(crate) fn linear(&mut self, name: &str, (out, input): (usize, usize)) -> Result<Linear> {
        let (weight, bias) = (format!("{name}.weight"), format!("{name}.bias"));
        self.affine(&weight, &[out, input], Some(&bias), (out, input))
    }

    /// A projection that the checkpoint keeps as `(in, out)`, without bias.
    pub(crate) fn projection(
        &mut self,
        name: &str,
        (input, out): (usize, usize),
    ) -> Result<Linear> {
        let tensor = self.take(name)?;
        self.expect(name, &tensor, &[input, out])?;
        if self.learned {
            return Linear::learned(tensor.t()?, None);
        }
        let weight = keep(&tensor.t()?, self.storage)?;
        Ok(Linear::frozen(weight, None, (out, input)))
    }

    /// `name.weight` and `name.bias` of a LayerNorm.
    pub(crate) fn layer_norm(&mut self, name: &str, width: usize) -> Result<LayerNorm> {
        let (gain, bias) = (format!("{name}.weight"), format!("{name}.bias"));
        if self.learned {
            return Ok(LayerNorm::Learned {
                gain: self.tensor(&gain, &[width])?,
                bias: self.tensor(&bias, &[width])?,
            });
        }
        let gain = self.values(&gain, &[width])?;
        Ok(LayerNorm::frozen(gain, self.values(&bias, &[width])?))
    }
}

fn keep(tensor: &Tensor, storage: DType) -> Result<Stored> {
    let flat = tensor.to_dtype(storage)?.flatten_all()?;
    Ok(match storage {
        DType::F16 => Stored::F16(flat.to_vec1()?),
        DType::BF16 => Stored::Bf16(flat.to_vec1()?),
        _ => Stored::F32(flat.to_vec1()?),
    })
}

/// `x + attn(ln_1(x))`, then `x + mlp(ln_2(x))`.
#[derive(Debug)]
pub(crate) struct Block {
    ln_1: LayerNorm,
    in_proj: Linear,
    out_proj: Linear,
    ln_2: LayerNorm,
    c_fc: Linear,
    c_proj: Linear,
    heads: usize,
    activation: Activation,
}

impl Block {
    pub(crate) fn load(
        w: &mut Weights,
        prefix: &str,
        width: usize,
        heads: usize,
        activation: Activation,
    ) -> Result<Self> {
        let in_proj = w.affine(
            &format!("{prefix}.attn.in_proj_weight"),
            &[3 * width, width],
            Some(&format!("{prefix}.attn.in_proj_bias")),
            (3 * width, width),
        )?;
        Ok(Self {
            ln_1: w.layer_norm(&format!("{prefix}.ln_1"), width)?,
            in_proj,
            out_proj: w.linear(&format!("{prefix}.attn.out_proj"), (width, width))?,
            ln_2: w.layer_norm(&format!("{prefix}.ln_2"), width)?,
            c_fc: w.linear(&format!("{prefix}.mlp.c_fc"), (4 * width, width))?,
            c_proj: w.linear(&format!("{prefix}.mlp.c_proj"), (width, 4 * width))?,
            heads,
            activation,
        })
    }

    /// `(batch, tokens, width)` → the same.
    pub(crate) fn forward(&self, x: &Tensor, causal: bool) -> Result<Tensor> {
        let qkv = self.in_proj.forward(&self.ln_1.forward(x)?)?;
        let x = (x + self
            .out_proj
            .forward(&ops::attention(&qkv, self.heads, causal)?)?)?;
        drop(qkv);
        self.mlp(&x)
    }

    /// As [`Block::forward`] for what the class token gathers, and beside it the *values* of other tokens: what they would
    /// hand to attention, as if each saw itself alone (MaskCLIP, Sec. 3.2).
    ///
    /// `x (batch, tokens, width)`; `rows` number tokens of the flattened `(batch · tokens)`. Gives `(batch + rows, width)`:
    /// every image's class token, then the rows.
    pub(crate) fn class_and_values(&self, x: &Tensor, rows: &Tensor) -> Result<Tensor> {
        let (batch, tokens, width) = x.dims3()?;
        let qkv = self.in_proj.forward(&self.ln_1.forward(x)?)?;
        let class = ops::attention(&qkv, self.heads, false)?.i((.., 0))?;
        let flat = (batch * tokens, width);
        let values = qkv.narrow(2, 2 * width, width)?.reshape(flat)?;
        let mixed = Tensor::cat(&[&class, &values.index_select(rows, 0)?], 0)?;
        let own = x.reshape(flat)?.index_select(rows, 0)?;
        let own = Tensor::cat(&[&x.i((.., 0))?, &own], 0)?;
        self.mlp(&(own + self.out_proj.forward(&mixed)?)?)
    }

    /// What share of its attention to the other tokens the class token gives each of them, the mean over heads:
    /// `(batch, tokens, width)` → `(batch, tokens − 1)`, rows that sum to 1.
    pub(crate) fn class_attention(&self, x: &Tensor) -> Result<Tensor> {
        let (batch, tokens, width) = x.dims3()?;
        let size = width / self.heads;
        let qkv = self.in_proj.forward(&self.ln_1.forward(x)?)?;
        let part = |part: usize, first: usize, n: usize| -> Result<Tensor> {
            let rows = qkv.narrow(2, part * width, width)?.narrow(1, first, n)?;
            let by_head = rows.reshape((batch, n, self.heads, size))?;
            Ok(by_head.transpose(1, 2)?.contiguous()?)
        };
        let (query, keys) = (part(0, 0, 1)?, part(1, 1, tokens - 1)?);
        let scores = (query.matmul(&keys.t()?)? / (size as f64).sqrt())?;
        Ok(ops::softmax(&scores)?.mean(1)?.squeeze(1)?)
    }

    fn mlp(&self, x: &Tensor) -> Result<Tensor> {
        let hidden = self.c_fc.forward(&self.ln_2.forward(x)?)?;
        let hidden = ops::activation(&hidden, self.activation)?;
        Ok((x + self.c_proj.forward(&hidden)?)?)
    }

    /// The layers as plain loops, if no weight is learned.
    pub(crate) fn frozen(&self) -> Option<FrozenBlock<'_>> {
        Some(FrozenBlock {
            ln_1: self.ln_1.as_frozen()?,
            in_proj: self.in_proj.as_frozen()?,
            out_proj: self.out_proj.as_frozen()?,
            ln_2: self.ln_2.as_frozen()?,
            c_fc: self.c_fc.as_frozen()?,
            c_proj: self.c_proj.as_frozen()?,
            activation: self.activation,
        })
    }

    pub(crate) fn bytes(&self) -> usize {
        [&self.in_proj, &self.out_proj, &self.c_fc, &self.c_proj]
            .iter()
            .map(|l| l.bytes())
            .sum()
    }
}

/// A [`Block`] whose layers are called on slices.
#[derive(Clone, Copy)]
pub(crate) struct FrozenBlock<'a> {
    pub(crate) ln_1: &'a FrozenNorm,
    pub(crate) in_proj: &'a FrozenLinear,
    pub(crate) out_proj: &'a FrozenLinear,
    pub(crate) ln_2: &'a FrozenNorm,
    pub(crate) c_fc: &'a FrozenLinear,
    pub(crate) c_proj: &'a FrozenLinear,
    pub(crate) activation: Activation,
}

impl FrozenBlock<'_> {
    /// Bytes of the layouts for the way back that are not there yet.
    pub(crate) fn bytes_to_come(&self) -> usize {
        [self.in_proj, self.out_proj, self.c_fc, self.c_proj]
            .iter()
            .map(|l| l.bytes_to_come())
            .sum()
    }
}
