//! Learning rates by epoch, as Dassl sets them, or by step.

use serde::{Deserialize, Serialize};

use crate::train::Step;
use crate::{Error, Result};

/// What follows the warm-up.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum Decay {
    /// `½ · lr · (1 + cos(π (e − W) / E))`. The denominator is E, all epochs, so the rate never reaches zero.
    Cosine {},
    /// `½ · lr · (1 + cos(π (s − W) / (S − W)))` at step s of S in all: down to zero, step by step. The warm-up counts steps
    /// too, or there is none.
    CosineBySteps {},
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
    /// `lr · (s + 1) / steps` at each of the first `steps` steps s; for [`Decay::CosineBySteps`].
    LinearBySteps {
        /// Length; `None`: [`Warmup::STEPS`], or half of a run that is not twice as long.
        #[serde(default)]
        steps: Option<usize>,
    },
}

impl Warmup {
    /// Steps of a warm-up by steps that is not told otherwise: those of VP's authors.
    pub const STEPS: usize = 1000;
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

    /// Epochs of warm-up, or steps if the schedule goes by steps, of `all`.
    fn warmup_length(&self, all: usize) -> usize {
        match self.warmup {
            Warmup::None {} => 0,
            Warmup::Constant { epochs, .. } | Warmup::Linear { epochs, .. } => epochs,
            Warmup::LinearBySteps { steps } => steps.unwrap_or(Warmup::STEPS.min(all / 2)),
        }
    }

    /// The rate of a step for base rate `lr`.
    pub fn rate_at(&self, lr: f64, step: Step) -> f64 {
        match self.decay {
            Decay::CosineBySteps {} => self.rate(lr, step.global(), step.epochs * step.steps),
            _ => self.rate(lr, step.epoch, step.epochs),
        }
    }

    /// The rate in epoch `epoch` (from 0) of `epochs` for base rate `lr`; a schedule by steps counts these in the place of
    /// epochs.
    pub fn rate(&self, lr: f64, epoch: usize, epochs: usize) -> f64 {
        let warm = self.warmup_length(epochs);
        if epoch < warm {
            return match self.warmup {
                Warmup::None {} => lr,
                Warmup::Constant { lr, .. } => lr,
                Warmup::Linear { min_lr, .. } if epoch == 0 => min_lr,
                Warmup::Linear { epochs, .. } => lr * epoch as f64 / epochs as f64,
                Warmup::LinearBySteps { .. } => lr * (epoch + 1) as f64 / warm as f64,
            };
        }
        let past = epoch - warm;
        match &self.decay {
            Decay::Cosine {} => {
                0.5 * lr * (1.0 + (std::f64::consts::PI * past as f64 / epochs as f64).cos())
            }
            Decay::CosineBySteps {} => {
                let span = epochs.saturating_sub(warm).max(1);
                0.5 * lr * (1.0 + (std::f64::consts::PI * past as f64 / span as f64).cos())
            }
            Decay::SingleStep { step, gamma } => lr * gamma.powi((past / (*step).max(1)) as i32),
            Decay::MultiStep { milestones, gamma } => {
                lr * gamma.powi(milestones.iter().filter(|&&m| m <= past).count() as i32)
            }
            Decay::Constant {} => lr,
        }
    }

    /// Refuses a run of `steps` steps that its warm-up by steps would fill.
    ///
    /// # Errors
    /// [`Error::Config`].
    pub fn check_length(&self, steps: usize) -> Result<()> {
        match self.warmup {
            Warmup::LinearBySteps { steps: Some(warm) } if warm >= steps => {
                let expected =
                    format!("fewer than the run's {steps} steps; lower it, or train longer");
                Err(Error::config("train.schedule.warmup.steps", warm, expected))
            }
            _ => Ok(()),
        }
    }

    /// Refuses numbers that make no rate, and epochs together with steps.
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
            Warmup::LinearBySteps { steps: Some(0) } => {
                let expected = "at least one step, or kind = \"none\"";
                return Err(Error::config("warmup.steps", 0, expected));
            }
            Warmup::LinearBySteps { .. } => {}
        }
        let (warms, decays) = (
            matches!(self.warmup, Warmup::LinearBySteps { .. }),
            matches!(self.decay, Decay::CosineBySteps {}),
        );
        if warms != decays && !matches!(self.warmup, Warmup::None {}) {
            let expected = "warm-up and decay both by steps (linear_by_steps, cosine_by_steps) or both by epochs";
            return Err(Error::config(
                "train.schedule",
                "steps and epochs",
                expected,
            ));
        }
        match &self.decay {
            Decay::SingleStep { step: 0, .. } => {
                Err(Error::config("decay.step", 0, "at least one epoch"))
            }
            Decay::SingleStep { gamma, .. } | Decay::MultiStep { gamma, .. } => {
                positive("decay.gamma", *gamma)
            }
            Decay::Cosine {} | Decay::CosineBySteps {} | Decay::Constant {} => Ok(()),
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
    fn steps_rise_to_the_rate_and_fall_to_zero() -> Result<()> {
        let by_steps = |steps| Schedule {
            decay: Decay::CosineBySteps {},
            warmup: Warmup::LinearBySteps { steps },
        };
        let at = |schedule: &Schedule, global: usize| {
            let step = Step {
                seed: 0,
                epoch: global / 5,
                epochs: 1000,
                index: global % 5,
                steps: 5,
            };
            schedule.rate_at(40.0, step)
        };
        let papers = by_steps(None);
        assert_eq!([0, 999, 1000].map(|s| at(&papers, s)), [0.04, 40.0, 40.0]);
        assert!((at(&papers, 3000) - 20.0).abs() < 1e-9);
        assert!(at(&papers, 4999) < 1e-5);
        // A short run warms up for half of its steps; one that is all warm-up is refused.
        assert_eq!(rates(&papers, 1.0, 4), [0.5, 1.0, 1.0, 0.5]);
        assert!(papers.check_length(1).is_ok());
        assert!(by_steps(Some(3)).check_length(4).is_ok());
        let refused = by_steps(Some(4)).check_length(4).unwrap_err().to_string();
        assert!(refused.contains("4 steps"), "{refused}");
        assert!(by_steps(Some(0)).check().is_err());
        // Without a warm-up.
        let plain = Schedule {
            decay: Decay::CosineBySteps {},
            warmup: Warmup::None {},
        };
        plain.check()?;
        assert_eq!(rates(&plain, 1.0, 2), [1.0, 0.5]);
        // Steps and epochs do not mix.
        let mixed = Schedule {
            warmup: by_steps(None).warmup,
            ..Schedule::coop()
        };
        assert!(mixed.check().is_err());
        let mixed = Schedule {
            decay: Decay::CosineBySteps {},
            ..Schedule::coop()
        };
        assert!(mixed.check().is_err());
        Ok(())
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
