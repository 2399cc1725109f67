//! Networks through which the prompts of both towers are made together: who sees whom, and what they drop in training.

use candle_core::{Device, Shape, Tensor};
use cliptune_core::rng::Rng;
use cliptune_core::{Error, Result};
use serde::{Deserialize, Serialize};

/// Whether the prompts see one another in the network that couples them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Interaction {
    /// Every prompt passes by itself: what the authors' code computes, whose attention takes a sequence of n prompts for n
    /// sequences of one.
    #[default]
    None,
    /// All prompts are one sequence: what the papers describe.
    Attention,
}

impl Interaction {
    /// Prompts `(tokens, width)` as sequences, `(sequences, tokens of each, width)`.
    pub(crate) fn sequences(self, prompts: &Tensor) -> Result<Tensor> {
        Ok(match self {
            Self::None => prompts.unsqueeze(1)?,
            Self::Attention => prompts.unsqueeze(0)?,
        })
    }

    /// Sequences, and tokens of each, of so many prompts.
    pub(crate) fn layout(self, tokens: usize) -> (usize, usize) {
        match self {
            Self::None => (tokens, 1),
            Self::Attention => (1, tokens),
        }
    }
}

/// Factors of dropout: 0 with probability `rate`, else 1 / (1 − rate).
pub(crate) fn kept(rng: &mut Rng, shape: impl Into<Shape>, rate: f64) -> Result<Tensor> {
    let shape = shape.into();
    let factor = (1.0 / (1.0 - rate)) as f32;
    let draw = |_| if rng.uniform() < rate { 0.0 } else { factor };
    let factors: Vec<f32> = (0..shape.elem_count()).map(draw).collect();
    Ok(Tensor::from_vec(factors, shape, &Device::Cpu)?)
}

/// Refuses a rate of dropout that is not from 0 up to, but not including, 1.
///
/// # Errors
/// [`Error::Config`] naming the key.
pub(crate) fn check_rate(key: &str, rate: f64) -> Result<()> {
    match (0.0..1.0).contains(&rate) {
        true => Ok(()),
        false => Err(Error::config(key, rate, "at least 0 and below 1")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_kept_makes_up_for_what_is_dropped() -> Result<()> {
        let mut rng = Rng::stream(1, "test", &[]);
        let factors = kept(&mut rng, (100, 100), 0.25)?;
        let mean = factors.mean_all()?.to_scalar::<f32>()?;
        assert!((mean - 1.0).abs() < 0.02, "{mean}");
        let values = factors.flatten_all()?.to_vec1::<f32>()?;
        let expected = [0.0, 1.0f32 / 0.75];
        assert!(
            values
                .iter()
                .all(|x| expected.iter().any(|e| (x - e).abs() < 1e-6))
        );
        for rate in [-0.1, 1.0, f64::NAN] {
            assert!(check_rate("dropout", rate).is_err());
        }
        assert!(check_rate("dropout", 0.0).is_ok());
        Ok(())
    }
}
