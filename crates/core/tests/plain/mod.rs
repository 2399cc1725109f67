//! A transformer block as plainly as candle can: its own operations, every position, autograd through everything.

use std::collections::BTreeMap;

use candle_core::{D, Tensor};
use cliptune_core::Activation;

pub(crate) type Tensors = BTreeMap<String, Tensor>;
pub(crate) type Plain<T> = candle_core::Result<T>;

pub(crate) fn linear(
    w: &Tensors,
    name: &str,
    weight: &str,
    bias: &str,
    x: &Tensor,
) -> Plain<Tensor> {
    let product = x.broadcast_matmul(&w[&format!("{name}{weight}")].t()?)?;
    product.broadcast_add(&w[&format!("{name}{bias}")])
}

pub(crate) fn layer_norm(w: &Tensors, name: &str, x: &Tensor) -> Plain<Tensor> {
    let (gain, bias) = (&w[&format!("{name}.weight")], &w[&format!("{name}.bias")]);
    candle_nn::ops::layer_norm_slow(x, gain, bias, 1e-5)
}

/// Attention of `(batch, tokens, width)` queries, keys and values; heads are 64 wide.
pub(crate) fn heads_of(q: &Tensor, k: &Tensor, v: &Tensor, mask: Option<&Tensor>) -> Plain<Tensor> {
    let (n, t, width) = q.dims3()?;
    let heads = |x: &Tensor| -> Plain<Tensor> {
        x.reshape((n, t, width / 64, 64))?
            .transpose(1, 2)?
            .contiguous()
    };
    let (q, k, v) = (heads(q)?, heads(k)?, heads(v)?);
    let mut scores = (q.matmul(&k.t()?.contiguous()?)? / 8.0)?;
    if let Some(mask) = mask {
        scores = scores.broadcast_add(mask)?;
    }
    let mixed = candle_nn::ops::softmax(&scores, D::Minus1)?.matmul(&v)?;
    mixed.transpose(1, 2)?.reshape((n, t, width))
}

pub(crate) fn block(
    w: &Tensors,
    name: &str,
    activation: Activation,
    causal: bool,
    x: &Tensor,
) -> Plain<Tensor> {
    let (_, t, width) = x.dims3()?;
    let normed = layer_norm(w, &format!("{name}.ln_1"), x)?;
    let qkv = linear(
        w,
        &format!("{name}.attn."),
        "in_proj_weight",
        "in_proj_bias",
        &normed,
    )?;
    let part = |i: usize| qkv.narrow(2, i * width, width);
    let mask = causal.then(|| {
        let cells = (0..t * t).map(|i| {
            if i % t > i / t {
                f32::NEG_INFINITY
            } else {
                0.0
            }
        });
        Tensor::from_vec(cells.collect::<Vec<f32>>(), (t, t), x.device())
    });
    let mixed = heads_of(&part(0)?, &part(1)?, &part(2)?, mask.transpose()?.as_ref())?;
    let x = (x + linear(
        w,
        &format!("{name}.attn."),
        "out_proj.weight",
        "out_proj.bias",
        &mixed,
    )?)?;
    let normed = layer_norm(w, &format!("{name}.ln_2"), &x)?;
    let hidden = linear(
        w,
        &format!("{name}.mlp."),
        "c_fc.weight",
        "c_fc.bias",
        &normed,
    )?;
    let hidden = match activation {
        Activation::QuickGelu => (&hidden * candle_nn::ops::sigmoid(&(&hidden * 1.702)?)?)?,
        Activation::Gelu => hidden.gelu_erf()?,
    };
    &x + linear(
        w,
        &format!("{name}.mlp."),
        "c_proj.weight",
        "c_proj.bias",
        &hidden,
    )?
}

/// The largest difference, relative to the largest magnitude.
pub(crate) fn error(ours: &Tensor, theirs: &Tensor) -> Plain<f32> {
    let difference = (ours - theirs)?.abs()?.max_all()?.to_scalar::<f32>()?;
    Ok(difference / theirs.abs()?.max_all()?.to_scalar::<f32>()?.max(1e-20))
}
