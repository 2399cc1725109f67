//! Small learned networks beside the frozen towers.

mod attention;

use candle_core::{DType, Device, Tensor};

use crate::{Param, Params, Result, ops};

pub use attention::SelfAttention;

/// A learned affine map `y = x·wᵀ + b` that starts as PyTorch's `Linear` does: weight and bias from U(−1/√in, 1/√in).
#[derive(Clone, Debug)]
pub struct Affine {
    weight: Param,
    bias: Option<Param>,
}

impl Affine {
    /// A map under the keys `<name>.weight (out, in)` and `<name>.bias (out)`.
    ///
    /// # Errors
    /// [`crate::Error::Config`] if a width is 0 or a name is taken.
    pub fn new(params: &mut Params, name: &str, (outputs, inputs): (usize, usize)) -> Result<Self> {
        let map = Self::without_bias(params, name, (outputs, inputs))?;
        let bias = params.uniform(&format!("{name}.bias"), outputs, range(inputs))?;
        Ok(Self {
            bias: Some(bias),
            ..map
        })
    }

    /// A linear map `y = x·wᵀ` under the key `<name>.weight (out, in)`.
    ///
    /// # Errors
    /// As [`Affine::new`].
    pub fn without_bias(
        params: &mut Params,
        name: &str,
        (outputs, inputs): (usize, usize),
    ) -> Result<Self> {
        expect_widths(name, (outputs, inputs))?;
        let shape = (outputs, inputs);
        Ok(Self {
            weight: params.uniform(&format!("{name}.weight"), shape, range(inputs))?,
            bias: None,
        })
    }

    /// A map whose weight starts from N(0, std²), under the keys of [`Affine::new`] and with its bias.
    ///
    /// # Errors
    /// As [`Affine::new`].
    pub fn normal(
        params: &mut Params,
        name: &str,
        (outputs, inputs): (usize, usize),
        std: f64,
    ) -> Result<Self> {
        expect_widths(name, (outputs, inputs))?;
        let weight = params.normal(&format!("{name}.weight"), (outputs, inputs), std)?;
        let bias = params.uniform(&format!("{name}.bias"), outputs, range(inputs))?;
        Ok(Self {
            weight,
            bias: Some(bias),
        })
    }

    /// A map that starts by giving zeros, under the keys of [`Affine::new`].
    ///
    /// # Errors
    /// [`crate::Error::Config`] if the name is taken.
    pub fn zeros(
        params: &mut Params,
        name: &str,
        (outputs, inputs): (usize, usize),
    ) -> Result<Self> {
        let zeros = |shape: &[usize]| Tensor::zeros(shape, DType::F32, &Device::Cpu);
        Ok(Self {
            weight: params.copied(&format!("{name}.weight"), &zeros(&[outputs, inputs])?)?,
            bias: Some(params.copied(&format!("{name}.bias"), &zeros(&[outputs])?)?),
        })
    }

    /// A map that starts as a copy of another.
    ///
    /// # Errors
    /// [`crate::Error::Config`] if the name is taken.
    pub fn copied(params: &mut Params, name: &str, other: &Self) -> Result<Self> {
        let weight = params.copied(&format!("{name}.weight"), other.weight.tensor())?;
        let bias = other.bias.as_ref();
        let bias = bias.map(|bias| params.copied(&format!("{name}.bias"), bias.tensor()));
        Ok(Self {
            weight,
            bias: bias.transpose()?,
        })
    }

    /// `(.., in)` → `(.., out)`.
    ///
    /// # Errors
    /// [`crate::Error::Shape`] if `x` has another width.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let bias = self.bias.as_ref().map(|bias| bias.tensor().clone());
        ops::Linear::learned(self.weight.tensor().clone(), bias)?.forward(x)
    }
}

fn expect_widths(name: &str, (outputs, inputs): (usize, usize)) -> Result<()> {
    if outputs == 0 || inputs == 0 {
        let found = format!("{inputs} to {outputs}");
        return Err(crate::Error::config(name, found, "widths of at least 1"));
    }
    Ok(())
}

/// What a map of so many inputs starts from.
fn range(inputs: usize) -> (f64, f64) {
    let bound = 1.0 / (inputs as f64).sqrt();
    (-bound, bound)
}

/// A learned LayerNorm over the last axis, epsilon 1e-5, that starts with a gain of 1 and a bias of 0.
#[derive(Clone, Debug)]
pub struct Norm {
    gain: Param,
    bias: Param,
}

impl Norm {
    /// A LayerNorm under the keys `<name>.weight (width)`, the gain, and `<name>.bias (width)`.
    ///
    /// # Errors
    /// [`crate::Error::Config`] if the name is taken.
    pub fn new(params: &mut Params, name: &str, width: usize) -> Result<Self> {
        let (one, zero) = (
            Tensor::ones(width, DType::F32, &Device::Cpu)?,
            Tensor::zeros(width, DType::F32, &Device::Cpu)?,
        );
        Ok(Self {
            gain: params.copied(&format!("{name}.weight"), &one)?,
            bias: params.copied(&format!("{name}.bias"), &zero)?,
        })
    }

    /// `(.., width)` → `(.., width)`.
    ///
    /// # Errors
    /// [`crate::Error::Shape`] if `x` has another width.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (gain, bias) = (self.gain.tensor().clone(), self.bias.tensor().clone());
        ops::LayerNorm::Learned { gain, bias }.forward(x)
    }
}

/// What stands between the maps of a [`Mlp`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Nonlinearity {
    /// `x` where it is positive, else 0.
    Relu,
    /// `x` where it is positive, else `exp(x) − 1`.
    Elu,
}

impl Nonlinearity {
    fn apply(self, x: &Tensor) -> Result<Tensor> {
        let positive = x.relu()?;
        match self {
            Self::Relu => Ok(positive),
            Self::Elu => {
                // The exponential never sees a positive number, so it cannot overflow.
                let negative = x.neg()?.relu()?.neg()?;
                Ok((positive + negative.exp()?.affine(1.0, -1.0)?)?)
            }
        }
    }
}

/// Learned affine maps with a nonlinearity between them, none behind the last.
#[derive(Clone, Debug)]
pub struct Mlp {
    layers: Vec<Affine>,
    between: Nonlinearity,
}

impl Mlp {
    /// Maps from `inputs` numbers; each of `layers` has a key and a width.
    ///
    /// # Errors
    /// As [`Affine::new`].
    pub fn new<S: AsRef<str>>(
        params: &mut Params,
        mut inputs: usize,
        layers: &[(S, usize)],
        between: Nonlinearity,
    ) -> Result<Self> {
        let mut maps = Vec::with_capacity(layers.len());
        for (name, width) in layers {
            maps.push(Affine::new(params, name.as_ref(), (*width, inputs))?);
            inputs = *width;
        }
        Ok(Self {
            layers: maps,
            between,
        })
    }

    /// `(.., inputs)` → `(.., width of the last layer)`.
    ///
    /// # Errors
    /// As [`Affine::forward`].
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let mut x = x.clone();
        for (i, layer) in self.layers.iter().enumerate() {
            if i > 0 {
                x = self.between.apply(&x)?;
            }
            x = layer.forward(&x)?;
        }
        Ok(x)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::D;

    #[test]
    fn it_is_an_affine_map_with_the_usual_start() -> Result<()> {
        let mut params = Params::new(3);
        let map = Affine::new(&mut params, "net.0", (30, 16))?;
        let names: Vec<_> = params.iter().map(Param::name).collect();
        assert_eq!(names, ["net.0.weight", "net.0.bias"]);
        for param in params.iter() {
            let values = param.tensor().flatten_all()?.to_vec1::<f32>()?;
            assert!(values.iter().all(|x| x.abs() <= 0.25));
            assert!(values.iter().any(|x| *x > 0.1) && values.iter().any(|x| *x < -0.1));
        }
        let x = Tensor::arange(0f32, 32.0, &Device::Cpu)?.reshape((2, 16))?;
        let expected = x
            .matmul(&map.weight.tensor().t()?)?
            .broadcast_add(&params.tensors()?[1].1)?;
        let error = (map.forward(&x)? - expected)?.abs()?.max_all()?;
        assert!(error.to_scalar::<f32>()? < 1e-4);
        assert!(map.forward(&x.reshape((4, 8))?).is_err());
        assert!(Affine::new(&mut params, "empty", (0, 16)).is_err());
        let copy = Affine::copied(&mut params, "net.1", &map)?;
        let (a, b) = (map.forward(&x)?, copy.forward(&x)?);
        assert_eq!((a - b)?.abs()?.max_all()?.to_scalar::<f32>()?, 0.0);
        assert!(Affine::copied(&mut params, "net.1", &map).is_err());
        let zeros = Affine::zeros(&mut params, "net.2", (30, 16))?.forward(&x)?;
        assert_eq!(zeros.abs()?.max_all()?.to_scalar::<f32>()?, 0.0);
        Ok(())
    }

    #[test]
    fn without_a_bias_it_is_linear() -> Result<()> {
        let mut params = Params::new(3);
        let map = Affine::without_bias(&mut params, "net", (3, 16))?;
        Affine::copied(&mut params, "copy", &map)?;
        let names: Vec<_> = params.iter().map(Param::name).collect();
        assert_eq!(names, ["net.weight", "copy.weight"]);
        let x = Tensor::arange(0f32, 64.0, &Device::Cpu)?.reshape((2, 2, 16))?;
        let twice = (map.forward(&x)? * 2.0)?;
        let error = (map.forward(&(&x * 2.0)?)? - twice)?.abs()?.max_all()?;
        assert_eq!(error.to_scalar::<f32>()?, 0.0);
        assert!(Affine::without_bias(&mut params, "empty", (0, 16)).is_err());
        Ok(())
    }

    #[test]
    fn a_weight_from_a_normal_distribution_has_the_usual_bias() -> Result<()> {
        let mut params = Params::new(3);
        let map = Affine::normal(&mut params, "net", (300, 100), 0.5)?;
        let variance = map.weight.tensor().sqr()?.mean_all()?.to_scalar::<f32>()?;
        assert!((variance - 0.25).abs() < 0.01, "{variance}");
        let bias = params.get("net.bias").ok_or(crate::Error::Cancelled)?;
        let bias = bias.tensor().to_vec1::<f32>()?;
        assert!(bias.iter().all(|x| x.abs() <= 0.1) && bias.iter().any(|x| x.abs() > 0.05));
        assert!(Affine::normal(&mut params, "empty", (16, 0), 0.5).is_err());
        Ok(())
    }

    #[test]
    fn a_norm_starts_with_mean_zero_and_variance_one() -> Result<()> {
        let mut params = Params::new(3);
        let norm = Norm::new(&mut params, "ln", 16)?;
        let x = Tensor::arange(0f32, 64.0, &Device::Cpu)?.reshape((2, 2, 16))?;
        let (y, far) = (norm.forward(&x)?, norm.forward(&(&x + 1000.0)?)?);
        let largest = |t: Tensor| -> Result<f32> { Ok(t.abs()?.max_all()?.to_scalar()?) };
        assert!(largest(y.mean(D::Minus1)?)? < 1e-5);
        assert!(largest((y.sqr()?.mean(D::Minus1)? - 1.0)?)? < 1e-4);
        assert!(largest((&y - far)?)? < 1e-3);
        let weight = params.get("ln.weight").ok_or(crate::Error::Cancelled)?;
        weight.set(&(weight.value()? * 3.0)?)?;
        let error = (norm.forward(&x)? - (y * 3.0)?)?;
        assert!(largest(error)? < 1e-5);
        assert!(norm.forward(&x.reshape((8, 8))?).is_err());
        Ok(())
    }

    #[test]
    fn nonlinearities_stand_between_the_maps_alone() -> Result<()> {
        let x = Tensor::new(&[[-200.0f32, -1.0, 0.0, 2.0, 200.0]], &Device::Cpu)?;
        for (between, expected) in [
            (Nonlinearity::Relu, [0.0, 0.0, 0.0, 2.0, 200.0]),
            (
                Nonlinearity::Elu,
                [-1.0, (-1f32).exp() - 1.0, 0.0, 2.0, 200.0],
            ),
        ] {
            let found = between.apply(&x)?.flatten_all()?.to_vec1::<f32>()?;
            assert!(
                found
                    .iter()
                    .zip(expected)
                    .all(|(a, b)| (a - b).abs() < 1e-6)
            );
            let mut params = Params::new(3);
            let mlp = Mlp::new(&mut params, 5, &[("first", 4), ("second", 3)], between)?;
            let names: Vec<_> = params.iter().map(Param::name).collect();
            let expected = ["first.weight", "first.bias", "second.weight", "second.bias"];
            assert_eq!(names, expected);
            let by_hand = between.apply(&mlp.layers[0].forward(&x)?)?;
            let by_hand = mlp.layers[1].forward(&by_hand)?.to_vec2::<f32>()?;
            assert_eq!(mlp.forward(&x)?.to_vec2::<f32>()?, by_hand);
        }
        Ok(())
    }
}
