//! Learning rates by epoch, as Dassl sets them.

use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// What follows the warm-up.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum Decay {
    /// `½ · lr · (1 + cos(π (e − W) / E))`. The denominator is E, all epochs, so the rate never reaches zero.
    Cosine {},
    /// `lr · gamma^⌊(e − W) / step⌋`.
    SingleStep {
        /// Epochs between two drops.
        step: usize,
        /// Factor of a drop.
        gamma: f64,
    },
    /// `lr · gamma^k`, k being how many milestones are at or below `e − W`.
    MultiStep {
        /// Epochs of the drops, counted from the end of the warm-up.
        milestones: Vec<usize>,
        /// Factor of a drop.
        gamma: f64,
    },
    /// Always `lr`.
    Constant {},
}

// Variants without fields are written with braces: serde lets unknown keys pass beside a plain one.
impl Default for Decay {
    fn default() -> Self {
        Self::Cosine {}
    }
}

/// What comes before: a few epochs at a low or rising rate.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum Warmup {
    /// None.
    None {},
    /// The same low rate in each of the first `epochs`.
    Constant {
        /// Length.
        epochs: usize,
        /// The rate, whatever the base rate.
        lr: f64,
    },
    /// `lr · e / epochs`, and `min_lr` where that is zero.
    Linear {
        /// Length.
        epochs: usize,
        /// The rate of epoch 0.
        min_lr: f64,
    },
}

impl Default for Warmup {
    fn default() -> Self {
        Self::None {}
    }
}

/// A schedule: warm-up, then decay.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Schedule {
    /// After the warm-up.
    pub decay: Decay,
    /// Before it.
    pub warmup: Warmup,
}

impl Schedule {
    /// What the CoOp family uses: cosine after one epoch at 1e-5.
    pub fn coop() -> Self {
        Self {
            decay: Decay::Cosine {},
            warmup: Warmup::Constant {
                epochs: 1,
                lr: 1e-5,
            },
        }
    }

    fn warmup_epochs(&self) -> usize {
        match self.warmup {
            Warmup::None {} => 0,
            Warmup::Constant { epochs, .. } | Warmup::Linear { epochs, .. } => epochs,
        }
    }

    /// The rate in epoch `epoch` (from 0) of `epochs` for base rate `lr`.
    pub fn rate(&self, lr: f64, epoch: usize, epochs: usize) -> f64 {
        let warm = self.warmup_epochs();
        if epoch < warm {
            return match self.warmup {
                Warmup::None {} => lr,
                Warmup::Constant { lr, .. } => lr,
                Warmup::Linear { min_lr, .. } if epoch == 0 => min_lr,
                Warmup::Linear { epochs, .. } => lr * epoch as f64 / epochs as f64,
            };
        }
        let past = epoch - warm;
        match &self.decay {
            Decay::Cosine {} => {
                0.5 * lr * (1.0 + (std::f64::consts::PI * past as f64 / epochs as f64).cos())
            }
            Decay::SingleStep { step, gamma } => lr * gamma.powi((past / (*step).max(1)) as i32),
            Decay::MultiStep { milestones, gamma } => {
                lr * gamma.powi(milestones.iter().filter(|&&m| m <= past).count() as i32)
            }
            Decay::Constant {} => lr,
        }
    }

    /// Refuses numbers that make no rate.
    ///
    /// # Errors
    /// [`Error::Config`].
    pub fn check(&self) -> Result<()> {
        let positive = |key: &str, value: f64| match value.is_finite() && value > 0.0 {
            true => Ok(()),
            false => Err(Error::config(key, value, "a finite number above 0")),
        };
        match self.warmup {
            Warmup::None {} => {}
            Warmup::Constant { lr, .. } => positive("warmup.lr", lr)?,
            Warmup::Linear { min_lr, .. } => positive("warmup.min_lr", min_lr)?,
        }
        match &self.decay {
            Decay::SingleStep { step: 0, .. } => {
                Err(Error::config("decay.step", 0, "at least one epoch"))
            }
            Decay::SingleStep { gamma, .. } | Decay::MultiStep { gamma, .. } => {
                positive("decay.gamma", *gamma)
            }
            Decay::Cosine {} | Decay::Constant {} => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rates(schedule: &Schedule, lr: f64, epochs: usize) -> Vec<f64> {
        (0..epochs).map(|e| schedule.rate(lr, e, epochs)).collect()
    }

    #[test]
    fn cosine_with_constant_warmup_gives_the_published_vectors() {
        let expected = [
            1e-5,
            0.002,
            0.001951057,
            0.001809017,
            0.001587785,
            0.001309017,
            0.001,
            0.000690983,
            0.000412215,
            0.000190983,
        ];
        for (found, expected) in rates(&Schedule::coop(), 0.002, 10)
            .into_iter()
            .zip(expected)
        {
            assert!((found - expected).abs() < 5e-10, "{found} {expected}");
        }
        assert!((Schedule::coop().rate(0.002, 49, 50) - 7.885299e-6).abs() < 1e-12);
        let lasp = Schedule {
            warmup: Warmup::Constant {
                epochs: 5,
                lr: 1e-5,
            },
            ..Schedule::coop()
        };
        for (epoch, expected) in [
            (5, 0.0032),
            (6, 0.0031968),
            (29, 0.0017005),
            (49, 0.00011236),
        ] {
            assert!(
                (lasp.rate(0.0032, epoch, 50) - expected).abs() < 5e-8,
                "epoch {epoch}"
            );
        }
    }

    #[test]
    fn steps_count_from_the_end_of_the_warmup() {
        let schedule = Schedule {
            decay: Decay::MultiStep {
                milestones: vec![2],
                gamma: 0.3,
            },
            warmup: Warmup::Linear {
                epochs: 2,
                min_lr: 1e-5,
            },
        };
        assert_eq!(
            rates(&schedule, 0.002, 5),
            [1e-5, 0.001, 0.002, 0.002, 0.002 * 0.3]
        );
        let schedule = Schedule {
            decay: Decay::SingleStep {
                step: 2,
                gamma: 0.5,
            },
            warmup: Warmup::None {},
        };
        assert_eq!(rates(&schedule, 1.0, 5), [1.0, 1.0, 0.5, 0.5, 0.25]);
    }

    #[test]
    fn a_schedule_reads_from_toml_like_json() {
        let schedule: Schedule = serde_json::from_str(
            r#"{"decay": {"kind": "multi_step", "milestones": [2], "gamma": 0.1}, "warmup": {"kind": "none"}}"#,
        )
        .unwrap();
        assert_eq!(schedule.rate(1.0, 2, 4), 0.1);
        assert!(
            serde_json::from_str::<Schedule>(r#"{"decay": {"kind": "cosine", "gamma": 1}}"#)
                .is_err()
        );
    }
}
