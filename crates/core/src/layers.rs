//! Small learned networks beside the frozen towers.

use crate::{Param, Params, Result, ops};
use candle_core::Tensor;

/// A learned affine map `y = x·wᵀ + b` that starts as PyTorch's `Linear` does: weight and bias from U(−1/√in, 1/√in).
#[derive(Clone, Debug)]
pub struct Affine {
    weight: Param,
    bias: Param,
}

impl Affine {
    /// A map under the keys `<name>.weight (out, in)` and `<name>.bias (out)`.
    ///
    /// # Errors
    /// [`crate::Error::Config`] if a width is 0 or a name is taken.
    pub fn new(params: &mut Params, name: &str, (outputs, inputs): (usize, usize)) -> Result<Self> {
        if outputs == 0 || inputs == 0 {
            let found = format!("{inputs} to {outputs}");
            return Err(crate::Error::config(name, found, "widths of at least 1"));
        }
        let bound = 1.0 / (inputs as f64).sqrt();
        let range = (-bound, bound);
        Ok(Self {
            weight: params.uniform(&format!("{name}.weight"), (outputs, inputs), range)?,
            bias: params.uniform(&format!("{name}.bias"), outputs, range)?,
        })
    }

    /// `(.., in)` → `(.., out)`.
    ///
    /// # Errors
    /// [`crate::Error::Shape`] if `x` has another width.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (weight, bias) = (self.weight.tensor().clone(), self.bias.tensor().clone());
        ops::Linear::learned(weight, Some(bias))?.forward(x)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

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
            .broadcast_add(map.bias.tensor())?;
        let error = (map.forward(&x)? - expected)?.abs()?.max_all()?;
        assert!(error.to_scalar::<f32>()? < 1e-4);
        assert!(map.forward(&x.reshape((4, 8))?).is_err());
        assert!(Affine::new(&mut params, "empty", (0, 16)).is_err());
        Ok(())
    }
}
