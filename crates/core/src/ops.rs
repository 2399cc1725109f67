//! The towers' operations on candle tensors.
//!
//! Each is one candle custom op, so methods compose them freely with ordinary candle code. Frozen weights are fields of the
//! op, not its arguments: candle's autograd never forms their gradients. Layers of a tower that is trained itself
//! ([`crate::Clip::learned`]) take their weights as arguments.

mod losses;

use std::sync::{Arc, OnceLock};

use candle_core::{CpuStorage, CustomOp1, CustomOp3, Layout, Shape, Tensor};
use rayon::prelude::*;

use crate::kernels::{self, AttentionSizes, Onto, Packed, Stored, rows};
use crate::{Activation, Error, Result};

pub use self::losses::{
    check_labels, cosine_distance, cross_entropy, log_mean_exp, log_softmax,
    negative_log_likelihood, own_dots, soft_cross_entropy, softmax, squared_distance, unit_length,
};

/// An affine map `y = x·wᵀ + b`.
#[derive(Clone, Debug)]
pub(crate) enum Linear {
    /// Weights that no gradient reaches.
    Frozen(FrozenLinear),
    /// Weights that are variables or made of variables.
    Learned(LearnedLinear),
}

impl Linear {
    pub(crate) fn frozen(
        weight: Stored,
        bias: Option<Vec<f32>>,
        (out_width, in_width): (usize, usize),
    ) -> Self {
        Self::Frozen(FrozenLinear::new(weight, bias, (out_width, in_width)))
    }

    /// For a weight `(out, in)` and a bias `(out)`.
    pub(crate) fn learned(weight: Tensor, bias: Option<Tensor>) -> Result<Self> {
        let (out_width, in_width) = weight.dims2()?;
        Ok(Self::Learned(LearnedLinear {
            weight,
            bias,
            sizes: (out_width, in_width),
        }))
    }

    /// `(.., in)` → `(.., out)`.
    pub(crate) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        match self {
            Self::Frozen(op) => {
                expect_width("input of a linear layer", x, op.in_width)?;
                Ok(x.contiguous()?.apply_op1(op.clone())?)
            }
            Self::Learned(layer) => layer.forward(x),
        }
    }

    pub(crate) fn as_frozen(&self) -> Option<&FrozenLinear> {
        match self {
            Self::Frozen(op) => Some(op),
            Self::Learned(_) => None,
        }
    }

    /// Bytes held.
    pub(crate) fn bytes(&self) -> usize {
        match self {
            Self::Frozen(op) => op.bytes(),
            Self::Learned(layer) => {
                let (out_width, in_width) = layer.sizes;
                4 * (out_width * in_width + layer.bias.as_ref().map_or(0, Tensor::elem_count))
            }
        }
    }
}

#[derive(Clone, Debug)]
pub(crate) struct FrozenLinear {
    /// `wᵀ (in, out)`.
    forward: Arc<Packed>,
    /// `w (out, in)`, from the first gradient on.
    backward: Arc<OnceLock<Packed>>,
    bias: Option<Arc<Vec<f32>>>,
    in_width: usize,
    out_width: usize,
}

impl FrozenLinear {
    /// For `weight (out, in)` and a bias `(out)`.
    pub(crate) fn new(
        weight: Stored,
        bias: Option<Vec<f32>>,
        (out_width, in_width): (usize, usize),
    ) -> Self {
        debug_assert_eq!(weight.len(), out_width * in_width);
        let forward = Packed::new((in_width, out_width), |row, column| {
            weight.get(column * in_width + row)
        });
        Self {
            forward: Arc::new(forward),
            backward: Arc::default(),
            bias: bias.map(Arc::new),
            in_width,
            out_width,
        }
    }

    /// Bytes held.
    pub(crate) fn bytes(&self) -> usize {
        let backward = self.backward.get().map_or(0, Packed::bytes);
        self.forward.bytes() + backward + self.bias().map_or(0, |b| 4 * b.len())
    }

    fn bias(&self) -> Option<&[f32]> {
        self.bias.as_deref().map(Vec::as_slice)
    }

    fn turned(&self) -> &Packed {
        if let Some(turned) = self.backward.get() {
            return turned;
        }
        // Not inside `get_or_init`: it runs on the pool, and a thread that waits there may come back here.
        let turned = self.forward.transposed();
        self.backward.get_or_init(|| turned)
    }

    /// Bytes of the layout for the way back that are not there yet.
    pub(crate) fn bytes_to_come(&self) -> usize {
        match self.backward.get() {
            Some(_) => 0,
            None => self.forward.bytes(),
        }
    }

    /// `out (m, out) = x (m, in)·wᵀ + b`.
    pub(crate) fn apply(&self, x: &[f32], m: usize, out: &mut [f32], threads: Threads) {
        threads.multiply(&self.forward, x, m, Onto::Bias(self.bias()), out);
    }

    /// `out += x·wᵀ + b`.
    pub(crate) fn add(&self, x: &[f32], m: usize, out: &mut [f32], threads: Threads) {
        threads.multiply(&self.forward, x, m, Onto::Output(self.bias()), out);
    }

    /// As [`FrozenLinear::apply`] for queries, keys and values side by side, but without the queries, whose place in `out`
    /// stays as it is.
    pub(crate) fn apply_keys(&self, x: &[f32], m: usize, out: &mut [f32]) {
        let (width, all) = (self.in_width, self.out_width);
        if let Some(out) = out.get_mut(width..) {
            self.forward
                .multiply_columns(x, m, width..all, Onto::Bias(self.bias()), out, all);
        }
    }

    pub(crate) fn out_width(&self) -> usize {
        self.out_width
    }

    /// `dx (m, in) = dy (m, out)·w`.
    pub(crate) fn backward(&self, dy: &[f32], m: usize, dx: &mut [f32], threads: Threads) {
        threads.multiply(self.turned(), dy, m, Onto::Bias(None), dx);
    }
}

/// Who computes a product; the bits are the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Threads {
    /// The calling thread.
    One,
    /// All of them.
    All,
}

impl Threads {
    /// For each of so many tasks that run side by side: where they are too few to go round, all threads help each.
    pub(crate) fn for_tasks(tasks: usize) -> Self {
        match tasks < rayon::current_num_threads() {
            true => Self::All,
            false => Self::One,
        }
    }

    fn multiply(self, b: &Packed, a: &[f32], m: usize, onto: Onto<'_>, out: &mut [f32]) {
        match self {
            Self::One => b.multiply(a, m, onto, out),
            Self::All => b.multiply_parallel(a, m, onto, out),
        }
    }
}

#[derive(Clone, Debug)]
pub(crate) struct LearnedLinear {
    weight: Tensor,
    bias: Option<Tensor>,
    sizes: (usize, usize),
}

impl LearnedLinear {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (out_width, in_width) = self.sizes;
        expect_width("input of a linear layer", x, in_width)?;
        let op = LinearOfThree {
            out_width,
            in_width,
            biased: self.bias.is_some(),
        };
        // A custom op has a fixed number of arguments: without a bias a constant stands in.
        let bias = match &self.bias {
            Some(bias) => bias.contiguous()?,
            None => Tensor::zeros(out_width, x.dtype(), x.device())?,
        };
        let weight = self.weight.contiguous()?;
        Ok(x.contiguous()?.apply_op3(&weight, &bias, op)?)
    }
}

/// [`Linear`] with its weights as arguments, so that they get gradients too.
struct LinearOfThree {
    out_width: usize,
    in_width: usize,
    biased: bool,
}

impl CustomOp3 for LinearOfThree {
    fn name(&self) -> &'static str {
        "learned-linear"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        weight: &CpuStorage,
        weight_layout: &Layout,
        bias: &CpuStorage,
        bias_layout: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let x = values(x, x_layout)?;
        let m = x.len() / self.in_width;
        let mut out = vec![0.0; m * self.out_width];
        kernels::linear(
            x,
            m,
            values(weight, weight_layout)?,
            (self.out_width, self.in_width),
            self.biased.then_some(values(bias, bias_layout)?),
            &mut out,
        );
        let mut dims = x_layout.dims().to_vec();
        if let Some(last) = dims.last_mut() {
            *last = self.out_width;
        }
        Ok((CpuStorage::F32(out), dims.into()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        weight: &Tensor,
        bias: &Tensor,
        _: &Tensor,
        dy: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let m = x.elem_count() / self.in_width;
        let sizes = (self.out_width, self.in_width);
        let dx = match x.track_op() {
            true => Some(filled(dy, weight, x.shape(), |dy, w, dx| {
                kernels::linear_backward(dy, m, w, sizes, dx)
            })?),
            false => None,
        };
        let dw = filled(dy, x, weight.shape(), |dy, x, dw| {
            kernels::linear_weight_gradient(x, dy, m, sizes, dw)
        })?;
        let db = match self.biased {
            true => Some(filled(dy, dy, bias.shape(), |dy, _, db| {
                kernels::column_sums(dy, db)
            })?),
            false => None,
        };
        Ok((dx, Some(dw), db))
    }
}

fn expect_width(what: &str, x: &Tensor, width: usize) -> Result<()> {
    if x.dims().last() == Some(&width) {
        return Ok(());
    }
    let mut expected = x.dims().to_vec();
    if let Some(last) = expected.last_mut() {
        *last = width;
    }
    Err(Error::Shape {
        what: what.into(),
        found: x.dims().to_vec(),
        expected,
    })
}

/// The values of a contiguous f32 argument.
pub(crate) fn values<'a>(
    storage: &'a CpuStorage,
    layout: &Layout,
) -> candle_core::Result<&'a [f32]> {
    let (start, end) = layout
        .contiguous_offsets()
        .ok_or_else(|| candle_core::Error::Msg("operand is not contiguous".into()).bt())?;
    Ok(&storage.as_slice::<f32>()?[start..end])
}

/// The values of a tensor as they lie in memory, copied only if they are not contiguous.
pub(crate) fn with_values<T>(t: &Tensor, f: impl FnOnce(&[f32]) -> T) -> candle_core::Result<T> {
    let t = t.contiguous()?;
    let (storage, layout) = t.storage_and_layout();
    match &*storage {
        candle_core::Storage::Cpu(storage) => Ok(f(values(storage, layout)?)),
        _ => Err(candle_core::Error::Msg("operand is not on the CPU".into()).bt()),
    }
}

/// A new tensor like `like`, filled by `f(values of a, values of b)`.
fn filled(
    a: &Tensor,
    b: &Tensor,
    shape: &Shape,
    f: impl FnOnce(&[f32], &[f32], &mut [f32]),
) -> candle_core::Result<Tensor> {
    let mut out = vec![0.0; shape.elem_count()];
    with_values(a, |a| with_values(b, |b| f(a, b, &mut out)))??;
    Tensor::from_vec(out, shape, a.device())
}

/// A tensor of `like`'s shape and device.
pub(crate) fn from_values(values: Vec<f32>, like: &Tensor) -> candle_core::Result<Tensor> {
    Tensor::from_vec(values, like.shape(), like.device())
}

impl CustomOp1 for FrozenLinear {
    fn name(&self) -> &'static str {
        "frozen-linear"
    }

    fn cpu_fwd(
        &self,
        storage: &CpuStorage,
        layout: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let x = values(storage, layout)?;
        let m = x.len() / self.in_width;
        let mut out = vec![0.0; m * self.out_width];
        self.forward
            .multiply_parallel(x, m, Onto::Bias(self.bias()), &mut out);
        let mut dims = layout.dims().to_vec();
        if let Some(last) = dims.last_mut() {
            *last = self.out_width;
        }
        Ok((CpuStorage::F32(out), dims.into()))
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, dy: &Tensor) -> candle_core::Result<Option<Tensor>> {
        let m = x.elem_count() / self.in_width;
        filled(dy, dy, x.shape(), |dy, _, dx| {
            self.turned().multiply_parallel(dy, m, Onto::Bias(None), dx)
        })
        .map(Some)
    }
}

/// LayerNorm over the last axis.
#[derive(Clone, Debug)]
pub(crate) enum LayerNorm {
    /// Gain and bias that no gradient reaches.
    Frozen(FrozenNorm),
    /// Gain and bias that are variables.
    Learned { gain: Tensor, bias: Tensor },
}

const LAYER_NORM_EPS: f32 = 1e-5;

impl LayerNorm {
    pub(crate) fn frozen(gain: Vec<f32>, bias: Vec<f32>) -> Self {
        Self::Frozen(FrozenNorm::new(gain, bias))
    }

    pub(crate) fn as_frozen(&self) -> Option<&FrozenNorm> {
        match self {
            Self::Frozen(op) => Some(op),
            Self::Learned { .. } => None,
        }
    }

    pub(crate) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        const WHAT: &str = "input of a LayerNorm";
        match self {
            Self::Frozen(op) => {
                expect_width(WHAT, x, op.gain.len())?;
                Ok(x.contiguous()?.apply_op1(op.clone())?)
            }
            Self::Learned { gain, bias } => {
                expect_width(WHAT, x, gain.elem_count())?;
                Ok(x.contiguous()?.apply_op3(gain, bias, NormOfThree)?)
            }
        }
    }
}

#[derive(Clone, Debug)]
pub(crate) struct FrozenNorm {
    gain: Arc<Vec<f32>>,
    bias: Arc<Vec<f32>>,
}

impl FrozenNorm {
    pub(crate) fn new(gain: Vec<f32>, bias: Vec<f32>) -> Self {
        debug_assert_eq!(gain.len(), bias.len());
        Self {
            gain: Arc::new(gain),
            bias: Arc::new(bias),
        }
    }

    /// On the calling thread.
    pub(crate) fn normalise(&self, x: &[f32], out: &mut [f32]) {
        rows::layer_norm(x, &self.gain, &self.bias, LAYER_NORM_EPS, out);
    }

    /// Adds the gradient to `dx`.
    pub(crate) fn backward(&self, x: &[f32], dy: &[f32], dx: &mut [f32]) {
        rows::layer_norm_backward(x, &self.gain, LAYER_NORM_EPS, dy, dx);
    }

    /// Adds the gradients of gain and bias, as if they were learned, to two rows.
    pub(crate) fn weights_backward(&self, x: &[f32], dy: &[f32], d: &mut [f32]) {
        let width = self.gain.len();
        let mut part = vec![0.0; width];
        kernels::layer_norm_gain_gradient(x, dy, LAYER_NORM_EPS, &mut part);
        rows::add_into(&mut d[..width], &part);
        kernels::column_sums(dy, &mut part);
        rows::add_into(&mut d[width..2 * width], &part);
    }

    /// Gain and bias.
    pub(crate) fn weights(&self) -> (&[f32], &[f32]) {
        (&self.gain, &self.bias)
    }
}

impl CustomOp1 for FrozenNorm {
    fn name(&self) -> &'static str {
        "frozen-layer-norm"
    }

    fn cpu_fwd(
        &self,
        storage: &CpuStorage,
        layout: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let x = values(storage, layout)?;
        let mut out = vec![0.0; x.len()];
        kernels::layer_norm(x, &self.gain, &self.bias, LAYER_NORM_EPS, &mut out);
        Ok((CpuStorage::F32(out), layout.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, dy: &Tensor) -> candle_core::Result<Option<Tensor>> {
        filled(x, dy, x.shape(), |x, dy, dx| {
            kernels::layer_norm_backward(x, &self.gain, LAYER_NORM_EPS, dy, dx)
        })
        .map(Some)
    }
}

/// [`LayerNorm`] with gain and bias as arguments, so that they get gradients too.
struct NormOfThree;

impl CustomOp3 for NormOfThree {
    fn name(&self) -> &'static str {
        "learned-layer-norm"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        layout: &Layout,
        gain: &CpuStorage,
        gain_layout: &Layout,
        bias: &CpuStorage,
        bias_layout: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let x = values(x, layout)?;
        let (gain, bias) = (values(gain, gain_layout)?, values(bias, bias_layout)?);
        let mut out = vec![0.0; x.len()];
        kernels::layer_norm(x, gain, bias, LAYER_NORM_EPS, &mut out);
        Ok((CpuStorage::F32(out), layout.shape().clone()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        gain: &Tensor,
        bias: &Tensor,
        _: &Tensor,
        dy: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let dx = match x.track_op() {
            true => Some(with_values(gain, |gain| {
                filled(x, dy, x.shape(), |x, dy, dx| {
                    kernels::layer_norm_backward(x, gain, LAYER_NORM_EPS, dy, dx)
                })
            })??),
            false => None,
        };
        let dgain = filled(x, dy, gain.shape(), |x, dy, out| {
            kernels::layer_norm_gain_gradient(x, dy, LAYER_NORM_EPS, out)
        })?;
        let dbias = filled(dy, dy, bias.shape(), |dy, _, out| {
            kernels::column_sums(dy, out)
        })?;
        Ok((dx, Some(dgain), Some(dbias)))
    }
}

/// Multi-head self-attention on packed `(batch, tokens, 3·width)` queries, keys and values → `(batch, tokens, width)`.
pub(crate) fn attention(qkv: &Tensor, heads: usize, causal: bool) -> Result<Tensor> {
    let (batch, tokens, width) = qkv.dims3()?;
    let head_width = width / 3 / heads.max(1);
    if heads * head_width * 3 != width {
        return Err(Error::Data(format!(
            "attention of width {} cannot have {heads} heads",
            width / 3
        )));
    }
    Ok(qkv.contiguous()?.apply_op1(Attention(AttentionSizes {
        batch,
        tokens,
        heads,
        head_width,
        causal,
    }))?)
}

struct Attention(AttentionSizes);

impl CustomOp1 for Attention {
    fn name(&self) -> &'static str {
        "attention"
    }

    fn cpu_fwd(
        &self,
        storage: &CpuStorage,
        layout: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let s = self.0;
        let width = s.heads * s.head_width;
        let mut out = vec![0.0; s.batch * s.tokens * width];
        kernels::attention(values(storage, layout)?, s, &mut out);
        Ok((CpuStorage::F32(out), (s.batch, s.tokens, width).into()))
    }

    fn bwd(&self, qkv: &Tensor, _: &Tensor, dy: &Tensor) -> candle_core::Result<Option<Tensor>> {
        filled(qkv, dy, qkv.shape(), |qkv, dy, dqkv| {
            kernels::attention_backward(qkv, self.0, dy, dqkv)
        })
        .map(Some)
    }
}

/// The nonlinearity of the towers' MLPs.
pub fn activation(x: &Tensor, kind: Activation) -> Result<Tensor> {
    Ok(x.contiguous()?.apply_op1(Nonlinearity(kind))?)
}

struct Nonlinearity(Activation);

impl CustomOp1 for Nonlinearity {
    fn name(&self) -> &'static str {
        "activation"
    }

    fn cpu_fwd(
        &self,
        storage: &CpuStorage,
        layout: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let x = values(storage, layout)?;
        let mut out = vec![0.0; x.len()];
        kernels::activate(self.0, x, &mut out);
        Ok((CpuStorage::F32(out), layout.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, dy: &Tensor) -> candle_core::Result<Option<Tensor>> {
        filled(x, dy, x.shape(), |x, dy, dx| {
            kernels::activate_backward(self.0, x, dy, dx)
        })
        .map(Some)
    }
}

/// Calls `f` with the number of every row of `x` and the row alone, in parallel, and puts the results below one another.
///
/// What a row gives has the same bits whatever rows are beside it. About as many rows are worked on at a time as there are
/// threads.
///
/// # Errors
/// The error of the first row that fails; [`Error::Data`] if there is no row.
pub fn row_by_row(
    x: &Tensor,
    f: impl Fn(usize, &Tensor) -> Result<Tensor> + Sync,
) -> Result<Tensor> {
    let rows = x.dims().first().copied().unwrap_or(0);
    if rows == 0 {
        return Err(Error::Data("the batch holds no image".into()));
    }
    // All rows run, so that of several errors the first is told, not the quickest.
    let results: Vec<Result<Tensor>> = (0..rows)
        .into_par_iter()
        .map(|row| f(row, &x.narrow(0, row, 1)?))
        .collect();
    let results = results.into_iter().collect::<Result<Vec<_>>>()?;
    Ok(Tensor::cat(&results, 0)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Rng;
    use candle_core::{Device, IndexOp};

    fn drawn(seed: u64, shape: impl Into<Shape>) -> Result<Tensor> {
        let shape = shape.into();
        let values = Rng::stream(seed, "test", &[]).normal(shape.elem_count());
        let values: Vec<f32> = values.into_iter().map(|x| x as f32).collect();
        Ok(Tensor::from_vec(values, shape, &Device::Cpu)?)
    }

    fn value(t: &Tensor) -> Result<f32> {
        Ok(t.to_scalar()?)
    }

    #[test]
    fn rows_are_alone_and_in_order() -> Result<()> {
        let x = drawn(3, (7, 4))?;
        let doubled = row_by_row(&x, |_, row| {
            assert_eq!(row.dims(), [1, 4]);
            Ok((row * 2.0)?)
        })?;
        let error = (doubled - (&x * 2.0)?)?.abs()?.max_all()?;
        assert_eq!(value(&error)?, 0.0);
        let numbers = row_by_row(&x, |i, _| Ok(Tensor::new(&[i as u32], &Device::Cpu)?))?;
        assert_eq!(numbers.to_vec1::<u32>()?, [0, 1, 2, 3, 4, 5, 6]);
        let first = x.i((2, 0))?.to_scalar::<f32>()?;
        let failed = row_by_row(&x, |_, row| match value(&row.i((0, 0))?)? {
            found if found == first => Err(Error::Data("this one".into())),
            _ => Ok(row.clone()),
        });
        assert_eq!(failed.unwrap_err().to_string(), "this one");
        assert!(row_by_row(&x.narrow(0, 0, 0)?, |_, row| Ok(row.clone())).is_err());
        Ok(())
    }
}
