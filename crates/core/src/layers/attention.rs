//! Self-attention whose weights are learned.

use candle_core::{DType, Device, Tensor};

use super::Affine;
use crate::{Error, Params, Result, ops};

/// Learned multi-head self-attention that starts as PyTorch's `MultiheadAttention` does: the three input maps from
/// U(−a, a), a = √(6 / (4·width)), the output map's weight as that of [`Affine`], biases at 0.
#[derive(Clone, Debug)]
pub struct SelfAttention {
    /// Queries, keys and values, one below the other.
    input: Affine,
    output: Affine,
    heads: usize,
}

impl SelfAttention {
    /// Attention under the keys `<name>.in_proj_weight (3·width, width)`, `<name>.in_proj_bias (3·width)`,
    /// `<name>.out_proj.weight (width, width)` and `<name>.out_proj.bias (width)`.
    ///
    /// # Errors
    /// [`Error::Config`] if the heads do not divide the width, or a name is taken.
    pub fn new(params: &mut Params, name: &str, width: usize, heads: usize) -> Result<Self> {
        if heads == 0 || width == 0 || !width.is_multiple_of(heads) {
            let expected = format!("a number that divides the width {width}");
            return Err(Error::config("heads", heads, expected));
        }
        let bound = (6.0 / (4 * width) as f64).sqrt();
        let zeros = |n: usize| Tensor::zeros(n, DType::F32, &Device::Cpu);
        let (weight, bias) = (
            format!("{name}.in_proj_weight"),
            format!("{name}.in_proj_bias"),
        );
        let input = Affine {
            weight: params.uniform(&weight, (3 * width, width), (-bound, bound))?,
            bias: Some(params.copied(&bias, &zeros(3 * width)?)?),
        };
        let name = format!("{name}.out_proj");
        let output = Affine::without_bias(params, &name, (width, width))?;
        let bias = params.copied(&format!("{name}.bias"), &zeros(width)?)?;
        Ok(Self {
            input,
            output: Affine {
                bias: Some(bias),
                ..output
            },
            heads,
        })
    }

    /// `softmax(q·kᵀ / √(width of a head)) · v` in every head, then the output map; every token of a sequence sees all of it.
    ///
    /// # Shapes
    /// `x` `(batch, tokens, width)` → the same; `kept` `(batch, heads, tokens, tokens)` multiplies the attention weights
    /// (dropout).
    ///
    /// # Errors
    /// [`Error::Shape`] if `x` has another width.
    pub fn forward(&self, x: &Tensor, kept: Option<&Tensor>) -> Result<Tensor> {
        let (batch, tokens, width) = x.dims3()?;
        let of_head = width / self.heads;
        let projected = self.input.forward(x)?;
        let part = |i: usize| -> Result<Tensor> {
            let part = projected.narrow(2, i * width, width)?;
            let part = part.reshape((batch, tokens, self.heads, of_head))?;
            Ok(part.transpose(1, 2)?.contiguous()?)
        };
        let (queries, keys, values) = (part(0)?, part(1)?, part(2)?);
        let scores = queries.matmul(&keys.transpose(2, 3)?.contiguous()?)?;
        let mut weights = ops::softmax(&(scores / (of_head as f64).sqrt())?)?;
        if let Some(kept) = kept {
            weights = (weights * kept)?;
        }
        let mixed = weights.matmul(&values)?.transpose(1, 2)?;
        self.output
            .forward(&mixed.reshape((batch, tokens, width))?.contiguous()?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Rng;
    use crate::{Gradients, Param};

    fn tokens(batch: usize, tokens: usize, width: usize) -> Result<Tensor> {
        let values = Rng::stream(5, "tokens", &[]).normal(batch * tokens * width);
        let values: Vec<f32> = values.into_iter().map(|x| x as f32).collect();
        Ok(Tensor::from_vec(
            values,
            (batch, tokens, width),
            &Device::Cpu,
        )?)
    }

    fn largest(t: Tensor) -> Result<f32> {
        Ok(t.abs()?.max_all()?.to_scalar()?)
    }

    #[test]
    fn it_is_that_of_the_towers() -> Result<()> {
        let mut params = Params::new(2);
        let attention = SelfAttention::new(&mut params, "attn", 16, 4)?;
        let names: Vec<_> = params.iter().map(Param::name).collect();
        let expected = [
            "attn.in_proj_weight",
            "attn.in_proj_bias",
            "attn.out_proj.weight",
            "attn.out_proj.bias",
        ];
        assert_eq!(names, expected);
        let x = tokens(2, 5, 16)?;
        let by_kernel = ops::attention(&attention.input.forward(&x)?, 4, false)?;
        let by_kernel = attention.output.forward(&by_kernel)?;
        assert!(largest((attention.forward(&x, None)? - by_kernel)?)? < 1e-5);
        assert!(SelfAttention::new(&mut params, "other", 16, 3).is_err());
        assert!(SelfAttention::new(&mut params, "other", 16, 0).is_err());
        Ok(())
    }

    #[test]
    fn a_token_alone_sees_itself_only() -> Result<()> {
        let mut params = Params::new(2);
        let attention = SelfAttention::new(&mut params, "attn", 8, 2)?;
        let x = tokens(3, 1, 8)?;
        let y = attention.forward(&x, None)?;
        let other = Tensor::cat(&[x.narrow(0, 0, 1)?, tokens(2, 1, 8)?], 0)?;
        let first = |t: &Tensor| t.narrow(0, 0, 1);
        let difference = (first(&y)? - first(&attention.forward(&other, None)?)?)?;
        assert_eq!(largest(difference)?, 0.0);
        // Queries and keys do not count, but have a gradient: a zero one, so that they decay.
        let gradients = Gradients::of(&y.sqr()?.sum_all()?, &params)?;
        let of_input = gradients
            .get("attn.in_proj_weight")
            .ok_or(Error::Cancelled)?;
        assert_eq!(largest(of_input.narrow(0, 0, 16)?)?, 0.0);
        assert!(largest(of_input.narrow(0, 16, 8)?)? > 0.0);
        // A weight that is dropped leaves the bias of the output alone, which starts at zero.
        let dropped = Tensor::zeros((3, 2, 1, 1), DType::F32, &Device::Cpu)?;
        assert_eq!(largest(attention.forward(&x, Some(&dropped))?)?, 0.0);
        Ok(())
    }
}
