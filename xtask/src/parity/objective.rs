//! What the cases of all gradient methods have in common: the first step's loss and gradients, then the steps.

use std::collections::BTreeMap;

use anyhow::{Context, Result, bail};
use cliptune_core::optim::{Optimizer, OptimizerConfig};
use cliptune_core::schedule::{Decay, Schedule, Warmup};
use cliptune_core::train::{Batch, Objective, Step, gradients};
use cliptune_core::{Clip, Learned};
use serde::Deserialize;

use super::case::Case;
use super::check::{AFTER, Check, START};

/// The first step of a case, for what is computed apart from the steps.
pub(crate) const FIRST: Step = Step {
    seed: 0,
    epoch: 0,
    epochs: 1,
    index: 0,
    steps: 1,
};

/// How a case's steps are made where the epoch or the parameter matters.
pub(crate) struct Course<'a> {
    /// Steps of an epoch.
    pub(crate) batches: usize,
    /// All epochs.
    pub(crate) epochs: usize,
    /// The learning rate of a parameter at a step.
    pub(crate) rate: &'a dyn Fn(&str, usize) -> f64,
}

/// Compares loss, terms and gradients at the start, makes the case's steps, and compares losses and parameters after them.
pub(crate) fn train<O: Objective>(
    case: &Case,
    clip: &Clip,
    learned: &mut Learned<O>,
    batch: &Batch<'_>,
    check: &mut Check,
) -> Result<()> {
    train_watched(case, clip, learned, batch, check, &mut |_| Ok(()))
}

/// As [`train`], showing the method to `watch` at every step, when its gradients are known and nothing has moved yet.
pub(crate) fn train_watched<O: Objective>(
    case: &Case,
    clip: &Clip,
    learned: &mut Learned<O>,
    batch: &Batch<'_>,
    check: &mut Check,
    watch: &mut dyn FnMut(&Learned<O>) -> Result<()>,
) -> Result<()> {
    let course = Course {
        batches: case.json.lr_per_step.len(),
        epochs: 1,
        rate: &|_, step| case.json.lr_per_step[step],
    };
    train_along(case, clip, learned, (batch, &course), check, watch)
}

/// As [`train_watched`], in epochs and with rates of the case's own.
pub(crate) fn train_along<O: Objective>(
    case: &Case,
    clip: &Clip,
    learned: &mut Learned<O>,
    (batch, course): (&Batch<'_>, &Course<'_>),
    check: &mut Check,
    watch: &mut dyn FnMut(&Learned<O>) -> Result<()>,
) -> Result<()> {
    let Some(config) = &case.json.optimizer else {
        return Ok(());
    };
    let config = OptimizerConfig::deserialize(config).context("optimizer")?;
    schedule(case, check)?;
    let mut optimizer = Optimizer::new(config, learned.params())?;
    let mut losses = Vec::new();
    let mut terms: BTreeMap<&str, Vec<f64>> = BTreeMap::new();
    let batches = course.batches.max(1);
    for index in 0..case.json.lr_per_step.len() {
        let step = Step {
            seed: 0,
            epoch: index / batches,
            epochs: course.epochs,
            index: index % batches,
            steps: batches,
        };
        let (loss, gradients) = gradients(learned, clip, batch, step)?;
        losses.push(f64::from(loss.total.to_scalar::<f32>()?));
        for (name, term) in &loss.terms {
            let value = f64::from(term.to_scalar::<f32>()?);
            terms.entry(name).or_default().push(value);
        }
        if index == 0 {
            check.tensor(case, "expect.loss", &loss.total, START)?;
            for (name, term) in &loss.terms {
                check.tensor(case, &format!("expect.loss.{name}"), term, START)?;
            }
            for (name, gradient) in gradients.iter() {
                let key = format!("expect.grad.{name}");
                match (gradient, case.get(&key)) {
                    (Some(gradient), _) => check.tensor(case, &key, gradient, START)?,
                    (None, Some(expected)) => {
                        check.tensor(case, &key, &expected.zeros_like()?, START)?
                    }
                    (None, None) => {}
                }
            }
        }
        watch(learned)?;
        optimizer.step(learned.params(), &gradients, |param| {
            (course.rate)(param, index)
        })?;
    }
    check.list(case, "expect.losses", &losses, AFTER)?;
    for (name, values) in &terms {
        check.list(case, &format!("expect.losses.{name}"), values, AFTER)?;
    }
    for param in learned.params().iter() {
        check.parameter(case, param.name(), &param.value()?)?;
    }
    Ok(())
}

/// `config.schedule` as the authors' configs spell it.
#[derive(Deserialize)]
struct ScheduleJson {
    lr: f64,
    max_epoch: usize,
    lr_scheduler: String,
    #[serde(default)]
    warmup_epoch: usize,
    warmup_type: Option<String>,
    warmup_cons_lr: Option<f64>,
    batches_per_epoch: usize,
    #[serde(default)]
    stepsize: Vec<usize>,
    gamma: Option<f64>,
}

/// `config.schedule` of a method whose rate changes with every step.
#[derive(Deserialize)]
struct StepScheduleJson {
    lr: f64,
    warmup_steps: usize,
    total_steps: usize,
}

impl StepScheduleJson {
    const KIND: &str = "per_step_warmup_cosine";

    fn rates(&self, steps: usize) -> Vec<f64> {
        let schedule = Schedule {
            decay: Decay::CosineBySteps {},
            warmup: Warmup::LinearBySteps {
                steps: Some(self.warmup_steps),
            },
        };
        let rate = |step| schedule.rate(self.lr, step, self.total_steps);
        (0..steps).map(rate).collect()
    }
}

/// The case's learning rates follow from its schedule.
fn schedule(case: &Case, check: &mut Check) -> Result<()> {
    let Some(json) = case.json.config.get("schedule") else {
        return Ok(());
    };
    if json["lr_scheduler"] == StepScheduleJson::KIND {
        let json = StepScheduleJson::deserialize(json).context("config.schedule")?;
        let rates = json.rates(case.json.lr_per_step.len());
        check.numbers("lr_per_step", &rates, &case.json.lr_per_step, 1e-9);
        return Ok(());
    }
    let json = ScheduleJson::deserialize(json).context("config.schedule")?;
    let decay = match (json.lr_scheduler.as_str(), json.gamma) {
        ("cosine", _) => Decay::Cosine {},
        ("multi_step", Some(gamma)) => Decay::MultiStep {
            milestones: json.stepsize,
            gamma,
        },
        (other, _) => bail!("config.schedule.lr_scheduler `{other}` is unknown here"),
    };
    let low = json.warmup_cons_lr.unwrap_or(1e-5);
    let warmup = match (json.warmup_type.as_deref(), json.warmup_epoch) {
        (_, 0) => Warmup::None {},
        (Some("constant"), epochs) => Warmup::Constant { epochs, lr: low },
        (Some("linear"), epochs) => Warmup::Linear {
            epochs,
            min_lr: low,
        },
        (other, _) => bail!("config.schedule.warmup_type {other:?} is unknown here"),
    };
    let schedule = Schedule { decay, warmup };
    let rates: Vec<f64> = (0..case.json.lr_per_step.len())
        .map(|step| {
            schedule.rate(
                json.lr,
                step / json.batches_per_epoch.max(1),
                json.max_epoch,
            )
        })
        .collect();
    check.numbers("lr_per_step", &rates, &case.json.lr_per_step, 1e-9);
    Ok(())
}
