//! SGD, Adam and AdamW as PyTorch computes them, in f32, with the state open for checkpoints.

use std::collections::BTreeMap;

use candle_core::{Device, Tensor};
use serde::{Deserialize, Serialize};

use crate::params::{Gradients, Params};
use crate::{Error, Result};

/// Which optimiser, with PyTorch's names and defaults for what it takes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase", deny_unknown_fields)]
pub enum OptimizerConfig {
    /// Stochastic gradient descent.
    Sgd {
        /// Share of the last update kept in the next.
        #[serde(default)]
        momentum: f64,
        /// Added to the gradient as `weight_decay · p`.
        #[serde(default)]
        weight_decay: f64,
        /// Taken off the new gradient's share of the momentum.
        #[serde(default)]
        dampening: f64,
        /// Looks one momentum step ahead.
        #[serde(default)]
        nesterov: bool,
    },
    /// Adam; weight decay is added to the gradient.
    Adam {
        /// Decay rates of both moments.
        #[serde(default = "betas")]
        betas: [f64; 2],
        /// Keeps the denominator from zero.
        #[serde(default = "eps")]
        eps: f64,
        /// Added to the gradient as `weight_decay · p`.
        #[serde(default)]
        weight_decay: f64,
        /// Divides by the largest second moment seen.
        #[serde(default)]
        amsgrad: bool,
    },
    /// Adam whose weight decay shrinks the parameter directly.
    AdamW {
        /// Decay rates of both moments.
        #[serde(default = "betas")]
        betas: [f64; 2],
        /// Keeps the denominator from zero.
        #[serde(default = "eps")]
        eps: f64,
        /// `p` is scaled by `1 − lr · weight_decay` first.
        #[serde(default = "decoupled")]
        weight_decay: f64,
        /// Divides by the largest second moment seen.
        #[serde(default)]
        amsgrad: bool,
    },
}

fn betas() -> [f64; 2] {
    [0.9, 0.999]
}
fn eps() -> f64 {
    1e-8
}
fn decoupled() -> f64 {
    0.01
}

impl OptimizerConfig {
    /// What the CoOp family uses: SGD, momentum 0.9, weight decay 5e-4.
    pub fn coop() -> Self {
        Self::Sgd {
            momentum: 0.9,
            weight_decay: 5e-4,
            dampening: 0.0,
            nesterov: false,
        }
    }

    /// Refuses what PyTorch refuses.
    ///
    /// # Errors
    /// [`Error::Config`].
    pub fn check(&self) -> Result<()> {
        let non_negative = |key: &str, value: f64| match value.is_finite() && value >= 0.0 {
            true => Ok(()),
            false => Err(Error::config(key, value, "a finite number of at least 0")),
        };
        match *self {
            Self::Sgd {
                momentum,
                weight_decay,
                dampening,
                nesterov,
            } => {
                non_negative("momentum", momentum)?;
                non_negative("weight_decay", weight_decay)?;
                if !dampening.is_finite() {
                    return Err(Error::config("dampening", dampening, "a finite number"));
                }
                if nesterov && (momentum == 0.0 || dampening != 0.0) {
                    return Err(Error::config(
                        "nesterov",
                        nesterov,
                        "needs a momentum and no dampening",
                    ));
                }
                Ok(())
            }
            Self::Adam {
                betas,
                eps,
                weight_decay,
                ..
            }
            | Self::AdamW {
                betas,
                eps,
                weight_decay,
                ..
            } => {
                for beta in betas {
                    if !(0.0..1.0).contains(&beta) {
                        return Err(Error::config("betas", beta, "numbers from 0 to below 1"));
                    }
                }
                non_negative("eps", eps)?;
                non_negative("weight_decay", weight_decay)
            }
        }
    }
}

/// What an optimiser remembers of one parameter.
#[derive(Clone, Debug, Default)]
struct State {
    /// Updates made.
    steps: u64,
    /// Momentum (SGD) or first moment.
    first: Vec<f32>,
    /// Second moment.
    second: Vec<f32>,
    /// Largest second moment.
    largest: Vec<f32>,
}

/// An optimiser and its state.
#[derive(Clone, Debug)]
pub struct Optimizer {
    config: OptimizerConfig,
    states: Vec<State>,
}

impl Optimizer {
    /// A fresh optimiser for `params`.
    ///
    /// # Errors
    /// As [`OptimizerConfig::check`].
    pub fn new(config: OptimizerConfig, params: &Params) -> Result<Self> {
        config.check()?;
        Ok(Self {
            config,
            states: vec![State::default(); params.len()],
        })
    }

    /// Updates every parameter; `lr` gives each parameter's rate. One without a gradient is skipped, as PyTorch does: no
    /// decay either.
    ///
    /// # Errors
    /// [`Error::Shape`] if a gradient has another shape than its parameter.
    pub fn step(
        &mut self,
        params: &Params,
        gradients: &Gradients,
        lr: impl Fn(&str) -> f64,
    ) -> Result<()> {
        for (index, ((param, (_, gradient)), state)) in params
            .iter()
            .zip(gradients.iter())
            .zip(&mut self.states)
            .enumerate()
        {
            let Some(gradient) = gradient else { continue };
            let shape = param.tensor().shape().clone();
            if gradient.shape() != &shape {
                let what = format!("gradient of `{}`", param.name());
                return Err(Error::Shape {
                    what,
                    found: gradient.dims().to_vec(),
                    expected: shape.dims().to_vec(),
                });
            }
            let mut p = param.value()?.flatten_all()?.to_vec1::<f32>()?;
            let g = gradient.flatten_all()?.to_vec1::<f32>()?;
            state.update(&self.config, &mut p, g, lr(param.name()));
            params.set(index, &Tensor::from_vec(p, shape, &Device::Cpu)?)?;
        }
        Ok(())
    }

    /// The state as named tensors, for a checkpoint.
    ///
    /// # Errors
    /// Whatever the tensor library refuses.
    pub fn tensors(&self, params: &Params) -> Result<Vec<(String, Tensor)>> {
        let mut out = Vec::new();
        for (state, param) in self.states.iter().zip(params.iter()) {
            let name = param.name();
            out.push((
                format!("{name}.steps"),
                Tensor::new(state.steps as i64, &Device::Cpu)?,
            ));
            for (part, values) in [
                ("first", &state.first),
                ("second", &state.second),
                ("largest", &state.largest),
            ] {
                if !values.is_empty() {
                    out.push((
                        format!("{name}.{part}"),
                        Tensor::new(values.as_slice(), &Device::Cpu)?,
                    ));
                }
            }
        }
        Ok(out)
    }

    /// Restores what [`Optimizer::tensors`] gave.
    ///
    /// # Errors
    /// [`Error::Data`] if something is missing or of another size.
    pub fn load(&mut self, params: &Params, tensors: &BTreeMap<String, Tensor>) -> Result<()> {
        for (state, param) in self.states.iter_mut().zip(params.iter()) {
            let (name, size) = (param.name(), param.tensor().elem_count());
            let missing =
                || Error::Data(format!("the optimiser's state of `{name}` is incomplete"));
            let part = |part: &str| -> Result<Vec<f32>> {
                match tensors.get(&format!("{name}.{part}")) {
                    None => Ok(Vec::new()),
                    Some(t) if t.dims() == [size] => Ok(t.to_vec1()?),
                    Some(_) => Err(missing()),
                }
            };
            let steps = tensors.get(&format!("{name}.steps")).ok_or_else(missing)?;
            let steps = steps.to_scalar::<i64>()? as u64;
            *state = State {
                steps,
                first: part("first")?,
                second: part("second")?,
                largest: part("largest")?,
            };
        }
        Ok(())
    }
}

impl State {
    fn update(&mut self, config: &OptimizerConfig, p: &mut [f32], mut g: Vec<f32>, lr: f64) {
        self.steps += 1;
        match *config {
            OptimizerConfig::Sgd {
                momentum,
                weight_decay,
                dampening,
                nesterov,
            } => {
                decay_into(&mut g, p, weight_decay);
                if momentum != 0.0 {
                    let momentum = momentum as f32;
                    if self.first.is_empty() {
                        self.first = g.clone();
                    } else {
                        let fresh = (1.0 - dampening) as f32;
                        self.first
                            .iter_mut()
                            .zip(&g)
                            .for_each(|(v, g)| *v = momentum * *v + fresh * g);
                    }
                    if nesterov {
                        g.iter_mut()
                            .zip(&self.first)
                            .for_each(|(g, v)| *g += momentum * v);
                    } else {
                        g.copy_from_slice(&self.first);
                    }
                }
                p.iter_mut().zip(&g).for_each(|(p, g)| *p -= lr as f32 * g);
            }
            OptimizerConfig::Adam {
                betas,
                eps,
                weight_decay,
                amsgrad,
            } => {
                decay_into(&mut g, p, weight_decay);
                self.adam(p, &g, betas, eps, amsgrad, lr);
            }
            OptimizerConfig::AdamW {
                betas,
                eps,
                weight_decay,
                amsgrad,
            } => {
                let keep = (1.0 - lr * weight_decay) as f32;
                p.iter_mut().for_each(|p| *p *= keep);
                self.adam(p, &g, betas, eps, amsgrad, lr);
            }
        }
    }

    fn adam(
        &mut self,
        p: &mut [f32],
        g: &[f32],
        [beta1, beta2]: [f64; 2],
        eps: f64,
        amsgrad: bool,
        lr: f64,
    ) {
        self.first.resize(p.len(), 0.0);
        self.second.resize(p.len(), 0.0);
        if amsgrad {
            self.largest.resize(p.len(), 0.0);
        }
        let steps = self.steps as f64;
        let step = (lr / (1.0 - beta1.powf(steps))) as f32;
        let root = (1.0 - beta2.powf(steps)).sqrt() as f32;
        let (keep1, fresh1, keep2, fresh2) = (
            beta1 as f32,
            (1.0 - beta1) as f32,
            beta2 as f32,
            (1.0 - beta2) as f32,
        );
        for i in 0..p.len() {
            self.first[i] = keep1 * self.first[i] + fresh1 * g[i];
            self.second[i] = keep2 * self.second[i] + fresh2 * g[i] * g[i];
            let second = if amsgrad {
                self.largest[i] = self.largest[i].max(self.second[i]);
                self.largest[i]
            } else {
                self.second[i]
            };
            p[i] -= step * self.first[i] / (second.sqrt() / root + eps as f32);
        }
    }
}

fn decay_into(g: &mut [f32], p: &[f32], weight_decay: f64) {
    if weight_decay != 0.0 {
        let decay = weight_decay as f32;
        g.iter_mut().zip(p).for_each(|(g, p)| *g += decay * p);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// PyTorch's documented update rules, one number at a time in f64.
    struct Judge {
        p: f64,
        first: Option<f64>,
        second: f64,
        largest: f64,
        steps: i32,
    }

    impl Judge {
        fn update(&mut self, config: &OptimizerConfig, grad: f64, lr: f64) {
            self.steps += 1;
            match *config {
                OptimizerConfig::Sgd {
                    momentum,
                    weight_decay,
                    dampening,
                    nesterov,
                } => {
                    let mut g = grad + weight_decay * self.p;
                    if momentum != 0.0 {
                        let buffer = self
                            .first
                            .map_or(g, |b| momentum * b + (1.0 - dampening) * g);
                        self.first = Some(buffer);
                        g = if nesterov {
                            g + momentum * buffer
                        } else {
                            buffer
                        };
                    }
                    self.p -= lr * g;
                }
                OptimizerConfig::Adam {
                    betas,
                    eps,
                    weight_decay,
                    amsgrad,
                } => {
                    self.adam(grad + weight_decay * self.p, betas, eps, amsgrad, lr);
                }
                OptimizerConfig::AdamW {
                    betas,
                    eps,
                    weight_decay,
                    amsgrad,
                } => {
                    self.p -= lr * weight_decay * self.p;
                    self.adam(grad, betas, eps, amsgrad, lr);
                }
            }
        }

        fn adam(&mut self, g: f64, betas: [f64; 2], eps: f64, amsgrad: bool, lr: f64) {
            let first = betas[0] * self.first.unwrap_or(0.0) + (1.0 - betas[0]) * g;
            self.first = Some(first);
            self.second = betas[1] * self.second + (1.0 - betas[1]) * g * g;
            let corrected = |second: f64| second / (1.0 - betas[1].powi(self.steps));
            self.largest = self.largest.max(self.second);
            let second = if amsgrad { self.largest } else { self.second };
            let first = first / (1.0 - betas[0].powi(self.steps));
            self.p -= lr * first / (corrected(second).sqrt() + eps);
        }
    }

    fn configs() -> impl Strategy<Value = OptimizerConfig> {
        let decay = prop::sample::select(vec![0.0, 5e-4, 0.1]);
        let sgd = (
            prop::sample::select(vec![0.0, 0.9]),
            decay.clone(),
            prop::sample::select(vec![0.0, 0.3]),
            any::<bool>(),
        );
        let sgd =
            sgd.prop_map(
                |(momentum, weight_decay, dampening, nesterov)| OptimizerConfig::Sgd {
                    momentum,
                    weight_decay,
                    dampening: if nesterov { 0.0 } else { dampening },
                    nesterov: nesterov && momentum > 0.0,
                },
            );
        let adam =
            (decay, any::<bool>(), any::<bool>()).prop_map(|(weight_decay, amsgrad, decoupled)| {
                let (betas, eps) = ([0.9, 0.999], 1e-8);
                match decoupled {
                    true => OptimizerConfig::AdamW {
                        betas,
                        eps,
                        weight_decay,
                        amsgrad,
                    },
                    false => OptimizerConfig::Adam {
                        betas,
                        eps,
                        weight_decay,
                        amsgrad,
                    },
                }
            });
        prop_oneof![sgd, adam]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn updates_follow_the_documented_rules(
            config in configs(), start in -1.0f32..1.0, grads in prop::collection::vec(-1.0f32..1.0, 1..8),
        ) {
            let mut params = Params::new(0);
            params.copied("p", &Tensor::new(&[start], &Device::Cpu)?)?;
            let mut optimizer = Optimizer::new(config.clone(), &params)?;
            let mut judge = Judge { p: f64::from(start), first: None, second: 0.0, largest: 0.0, steps: 0 };
            for (i, &g) in grads.iter().enumerate() {
                // A fresh optimiser that takes the state over half way must not be told apart.
                if i == grads.len() / 2 {
                    let state = optimizer.tensors(&params)?.into_iter().collect();
                    optimizer = Optimizer::new(config.clone(), &params)?;
                    optimizer.load(&params, &state)?;
                }
                let lr = 0.01 * (1.0 + i as f64);
                let p = params.get("p").map(|p| p.tensor().clone()).ok_or(TestCaseError::fail("no p"))?;
                let gradients = Gradients::of(&(p * f64::from(g))?.sum_all()?, &params)?;
                optimizer.step(&params, &gradients, |_| lr)?;
                judge.update(&config, f64::from(g), lr);
            }
            let p = params.tensors()?[0].1.to_vec1::<f32>()?[0];
            prop_assert!((f64::from(p) - judge.p).abs() < 2e-6, "{config:?}: {p} {}", judge.p);
        }
    }

    #[test]
    fn a_parameter_without_gradient_is_left_alone() -> Result<()> {
        let mut params = Params::new(0);
        let a = params.copied("a", &Tensor::new(&[1f32], &Device::Cpu)?)?;
        params.copied("b", &Tensor::new(&[1f32], &Device::Cpu)?)?;
        let mut optimizer = Optimizer::new(OptimizerConfig::coop(), &params)?;
        let gradients = Gradients::of(&(a.tensor() - a.tensor())?.sum_all()?, &params)?;
        optimizer.step(&params, &gradients, |_| 0.1)?;
        let values: Vec<f32> = params
            .tensors()?
            .iter()
            .map(|(_, t)| t.to_vec1::<f32>().unwrap()[0])
            .collect();
        // `a` has a zero gradient and decays; `b` has none and does not.
        assert_eq!(values, [1.0 - 0.1 * 5e-4, 1.0]);
        Ok(())
    }

    #[test]
    fn nonsense_is_refused() {
        let sgd = |momentum, nesterov| OptimizerConfig::Sgd {
            momentum,
            weight_decay: 0.0,
            dampening: 0.0,
            nesterov,
        };
        assert!(sgd(0.9, true).check().is_ok());
        assert!(sgd(0.0, true).check().is_err());
        assert!(sgd(-0.1, false).check().is_err());
        assert!(sgd(f64::NAN, false).check().is_err());
    }
}
