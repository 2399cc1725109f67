//! The training loop that every method which learns by gradient shares.

mod state;

use std::time::Instant;

use candle_core::Tensor;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use self::state::{Saved, identity};
use crate::learned::Learned;
use crate::method::{Classifier, Predictor, check_positive};
use crate::optim::{Optimizer, OptimizerConfig};
use crate::params::{Gradients, Params, check_finite};
use crate::patches;
use crate::prompt::ClassTokens;
use crate::rng::Rng;
use crate::run::{Run, TrainStatus};
use crate::schedule::Schedule;
use crate::task::{ImageBatch, ImageNeeds, Labelled, Role, Split, View};
use crate::tasks::Tasks;
use crate::{Classes, Clip, Error, Result, ops};

/// How the images are varied while training.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Augment {
    /// The test view every time. A frozen tower then runs once per image, however many epochs.
    #[default]
    None,
    /// Random resized crop and flip, as the authors do: a new one in every epoch, or [`Recipe::views`] different ones.
    CropFlip,
}

/// Which epoch's parameters are kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Keep {
    /// The last one's, as the authors do.
    #[default]
    Last,
    /// The one with the best accuracy on the validation images; the earliest of equals.
    BestVal,
}

/// How a method is trained; every method's settings hold one as `train`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Recipe {
    /// Passes over the training images; `None` takes the CoOp family's rule: 50 for 1 shot and for 1,000 classes and more,
    /// 100 for 2 to 4 shots, else 200.
    pub epochs: Option<usize>,
    /// Images per step.
    pub batch_size: usize,
    /// Leaves out the last, smaller batch of an epoch unless it is the only one.
    pub drop_last: bool,
    /// Base learning rate.
    pub lr: f64,
    /// Optimiser.
    pub optimizer: OptimizerConfig,
    /// Learning rate by epoch or step.
    pub schedule: Schedule,
    /// How the images are varied.
    pub augment: Augment,
    /// With `crop_flip`: how many crops of each image there are, encoded once each; 0 draws a new one in every epoch.
    pub views: usize,
    /// Which epoch is kept.
    pub keep: Keep,
}

impl Default for Recipe {
    /// The CoOp family's recipe, but for the crops: see [`Augment`].
    fn default() -> Self {
        Self {
            epochs: None,
            batch_size: 32,
            drop_last: true,
            lr: 0.002,
            optimizer: OptimizerConfig::coop(),
            schedule: Schedule::coop(),
            augment: Augment::None,
            views: 0,
            keep: Keep::Last,
        }
    }
}

impl Recipe {
    /// Epochs for data with this many shots and classes.
    pub fn epochs_for(&self, shots: usize, n_cls: usize) -> usize {
        self.epochs.unwrap_or(match shots {
            _ if n_cls >= 1000 => 50,
            0..=1 => 50,
            2..=4 => 100,
            _ => 200,
        })
    }

    /// Steps of an epoch over `images` images.
    pub fn steps(&self, images: usize) -> usize {
        let steps = match self.drop_last {
            true => images / self.batch_size,
            false => images.div_ceil(self.batch_size),
        };
        steps.max(1)
    }

    /// The view of the images in an epoch.
    pub fn view(&self, seed: u64, epoch: usize) -> View {
        match (self.augment, self.views) {
            (Augment::None, _) => View::Fixed,
            (Augment::CropFlip, 0) => View::Random { seed, draw: epoch },
            (Augment::CropFlip, views) => View::Random {
                seed,
                draw: epoch % views,
            },
        }
    }

    /// Whether later epochs show an image as an earlier one did.
    fn sees_views_again(&self) -> bool {
        self.augment == Augment::None || self.views > 0
    }

    /// # Errors
    /// [`Error::Config`].
    pub fn check(&self) -> Result<()> {
        if self.epochs == Some(0) {
            return Err(Error::config("train.epochs", 0, "at least one epoch"));
        }
        if self.batch_size == 0 {
            return Err(Error::config("train.batch_size", 0, "at least one image"));
        }
        check_positive("train.lr", self.lr)?;
        if self.views > 0 && self.augment == Augment::None {
            return Err(Error::config(
                "train.views",
                self.views,
                "needs train.augment = \"crop_flip\"",
            ));
        }
        self.optimizer.check()?;
        self.schedule.check()
    }
}

/// Where in the run a step stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Step {
    /// The run's seed, for methods that draw.
    pub seed: u64,
    /// Epoch, from 0.
    pub epoch: usize,
    /// All epochs.
    pub epochs: usize,
    /// Step of the epoch, from 0.
    pub index: usize,
    /// Steps of an epoch.
    pub steps: usize,
}

impl Step {
    /// Steps before this one, over all epochs.
    pub fn global(&self) -> usize {
        self.epoch * self.steps + self.index
    }
}

/// A batch of labelled images with the classes that the labels count.
#[derive(Clone, Copy, Debug)]
pub struct Batch<'a> {
    /// The images, as [`Predictor::needs`] asked for them.
    pub images: &'a ImageBatch,
    /// Their labels.
    pub labels: &'a [u32],
    /// What the labels stand for.
    pub classes: &'a ClassTokens,
}

/// A loss: what is minimised, its parts under the paper's names, and the logits for the running accuracy.
#[derive(Clone, Debug)]
pub struct Loss {
    /// The scalar to minimise.
    pub total: Tensor,
    /// Its unweighted terms.
    pub terms: Vec<(&'static str, Tensor)>,
    /// `(batch, n_cls)`, if the method has them.
    pub logits: Option<Tensor>,
}

impl Loss {
    /// Cross entropy of `logits` alone.
    ///
    /// # Errors
    /// As [`ops::cross_entropy`].
    pub fn cross_entropy(logits: Tensor, labels: &[u32]) -> Result<Self> {
        let total = ops::cross_entropy(&logits, labels)?;
        Ok(Self {
            total,
            terms: Vec::new(),
            logits: Some(logits),
        })
    }

    /// Names the only term so far.
    #[must_use]
    pub fn named(mut self, name: &'static str) -> Self {
        self.terms = vec![(name, self.total.clone())];
        self
    }

    /// Adds `weight · term` to what is minimised.
    ///
    /// # Errors
    /// Whatever the tensor library refuses.
    pub fn plus(mut self, weight: f64, name: &'static str, term: Tensor) -> Result<Self> {
        self.total = (self.total + (&term * weight)?)?;
        self.terms.push((name, term));
        Ok(self)
    }

    /// The term called `name`.
    pub fn term(&self, name: &str) -> Option<&Tensor> {
        let found = self.terms.iter().find(|(term, _)| *term == name);
        found.map(|(_, value)| value)
    }
}

/// What a method that learns by gradient computes; its parameters are beside it, in [`Learned`].
pub trait Objective: std::fmt::Debug {
    /// What it reads of an image.
    fn needs(&self) -> ImageNeeds {
        ImageNeeds::GlobalFeatures
    }

    /// As [`Predictor::classifier`].
    ///
    /// # Errors
    /// As [`Predictor::classifier`].
    fn classifier<'a>(
        &'a self,
        clip: &'a Clip,
        classes: &Classes,
    ) -> Result<Box<dyn Classifier + 'a>>;

    /// The tasks that the classes divide into: the best epoch is then that of the best mean over the tasks, each measured
    /// among its own classes. `None` for a single task.
    fn tasks(&self) -> Option<&Tasks> {
        None
    }

    /// The loss of a batch.
    ///
    /// # Errors
    /// Whatever the forward pass refuses.
    fn loss(&self, clip: &Clip, batch: &Batch<'_>, step: Step) -> Result<Loss>;

    /// Changes the gradients of [`Loss::total`] before the optimiser sees them (ProGrad, SubPT). `loss` is what
    /// [`Objective::loss`] gave: a term that is not minimised may be run backward here.
    ///
    /// # Errors
    /// Whatever the computation refuses.
    fn shape_gradients(
        &mut self,
        _params: &Params,
        _loss: &Loss,
        _gradients: &mut Gradients,
    ) -> Result<()> {
        Ok(())
    }

    /// The learning rate of a parameter in `epoch` (from 0) of `epochs`, for methods whose parameters do not all learn at the
    /// recipe's rate; `None` is the recipe's.
    fn rate(&self, _param: &str, _epoch: usize, _epochs: usize) -> Option<f64> {
        None
    }

    /// Looks at the parameters after an epoch, of which `done` are over; `false` ends the training there.
    ///
    /// # Errors
    /// Whatever the computation refuses.
    fn after_epoch(&mut self, _done: usize) -> Result<bool> {
        Ok(true)
    }

    /// What is saved beside the learned tensors: frozen ones that come from the training data.
    ///
    /// # Errors
    /// Whatever the tensor library refuses; [`Error::Prompt`] if there is none yet.
    fn buffers(&self) -> Result<Vec<(String, Tensor)>> {
        Ok(Vec::new())
    }

    /// Takes back what [`Objective::buffers`] gave.
    ///
    /// # Errors
    /// [`Error::Prompt`] if something is missing or does not fit.
    fn load_buffers(
        &mut self,
        _tensors: &std::collections::BTreeMap<String, Tensor>,
    ) -> Result<()> {
        Ok(())
    }

    /// What else must survive a crash for the run to go on exactly (collected gradients, running means).
    fn state(&self) -> Vec<(String, Tensor)> {
        Vec::new()
    }

    /// Takes back what [`Objective::state`] gave.
    ///
    /// # Errors
    /// If something is missing.
    fn load_state(&mut self, _state: &std::collections::BTreeMap<String, Tensor>) -> Result<()> {
        Ok(())
    }
}

/// An epoch in the run's record.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct EpochRecord {
    /// Epoch, counted from 1.
    pub epoch: usize,
    /// Learning rate, of its last step; the recipe's, where parameters have rates of their own.
    pub lr: f64,
    /// Mean loss.
    pub loss: f64,
    /// Training accuracy in percent, over the batches as they were seen.
    pub accuracy: f64,
    /// Validation accuracy in percent, where it decides.
    pub val_accuracy: Option<f64>,
}

/// The record of a training run.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct History {
    /// One record per epoch.
    pub epochs: Vec<EpochRecord>,
    /// The epoch whose parameters were kept, counted from 1.
    pub kept: usize,
}

/// One step: loss, gradients, the method's own gradient rule. The parameters are not touched.
///
/// # Errors
/// As [`Objective::loss`]; a loss, term or gradient that is not finite is [`Error::Diverged`].
pub fn gradients<O: Objective>(
    learned: &mut Learned<O>,
    clip: &Clip,
    batch: &Batch<'_>,
    step: Step,
) -> Result<(Loss, Gradients)> {
    let diverged = |tensor: &str, value: f64| Error::Diverged {
        tensor: tensor.to_owned(),
        value,
        epoch: step.epoch + 1,
        step: step.index + 1,
    };
    let (objective, params) = learned.parts();
    let loss = objective.loss(clip, batch, step).map_err(|e| match e {
        // A context that has run away shows first in what is computed from it.
        Error::NotFinite { what, value } => diverged(&what, value),
        e => e,
    })?;
    for (name, term) in &loss.terms {
        let value = f64::from(term.to_scalar::<f32>()?);
        if !value.is_finite() {
            return Err(diverged(&format!("loss term `{name}`"), value));
        }
    }
    let value = f64::from(loss.total.to_scalar::<f32>()?);
    if !value.is_finite() {
        return Err(diverged("loss", value));
    }
    let mut gradients = Gradients::of(&loss.total, params)?;
    objective.shape_gradients(params, &loss, &mut gradients)?;
    for (name, gradient) in gradients.iter() {
        if let Some(Err(Error::NotFinite { value, .. })) = gradient.map(|g| check_finite(g, name)) {
            return Err(diverged(&format!("gradient of `{name}`"), value));
        }
    }
    Ok((loss, gradients))
}

/// Percent of `positions` that `predictor` gets right.
///
/// # Errors
/// As [`Predictor::classifier`] and [`crate::task::ImageSource::images`].
pub fn accuracy<R: Role>(
    predictor: &dyn Predictor,
    clip: &Clip,
    split: &Split<R>,
    classes: &Classes,
) -> Result<f64> {
    let classifier = predictor.classifier(clip, classes)?;
    let labels: Vec<u32> = split.labels().collect();
    let positions: Vec<usize> = (0..split.len()).collect();
    let mut correct = 0;
    for positions in positions.chunks(EVALUATION_BATCH) {
        let images = split.images(clip, positions, predictor.needs(), View::Fixed)?;
        let batch: Vec<u32> = positions.iter().map(|&p| labels[p]).collect();
        correct += count_correct(&classifier.logits(&images)?, &batch)?;
    }
    Ok(100.0 * correct as f64 / split.len().max(1) as f64)
}

/// Images per batch of an evaluation.
pub const EVALUATION_BATCH: usize = 100;

fn count_correct(logits: &Tensor, labels: &[u32]) -> Result<usize> {
    let rows = logits.detach().to_vec2::<f32>()?;
    // The first of equals, as torch's argmax on a CPU.
    let argmax =
        |row: &[f32]| (0..row.len()).fold(0, |best, i| if row[i] > row[best] { i } else { best });
    Ok(rows
        .iter()
        .zip(labels)
        .filter(|(row, label)| argmax(row) == **label as usize)
        .count())
}

/// The running figures of an epoch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
struct Tally {
    loss: f64,
    correct: usize,
    images: usize,
    steps: usize,
}

impl Tally {
    fn mean_loss(&self) -> f64 {
        self.loss / self.steps.max(1) as f64
    }

    fn accuracy(&self) -> f64 {
        100.0 * self.correct as f64 / self.images.max(1) as f64
    }
}

/// Trains `learned`, from [`Run::start`] if there is one, and leaves it with the parameters that [`Recipe::keep`] names and with
/// the record of the training.
///
/// `settings` are the method's, for recognising a checkpoint of the same run. With [`Run::checkpoint`] the run writes down
/// how far it is; called again after a crash it goes on from there and ends with the same bits.
///
/// # Errors
/// [`Error::Diverged`], [`Error::Config`], [`Error::Data`]; as [`Params::load`] if [`Run::start`] does not fit; a checkpoint of
/// another run is refused, not overwritten.
pub fn train<O: Objective>(
    learned: &mut Learned<O>,
    clip: &Clip,
    data: &Labelled,
    recipe: &Recipe,
    settings: &Value,
    run: &mut Run,
) -> Result<()> {
    recipe.check()?;
    data.check()?;
    let val = match (recipe.keep, &data.val) {
        (Keep::Last, _) => None,
        (Keep::BestVal, Some(val)) if !val.is_empty() => {
            Some(patches::remembered(val, clip, learned.needs()))
        }
        (Keep::BestVal, _) => {
            return Err(Error::config(
                "train.keep",
                "best_val",
                "needs validation images, and there are none",
            ));
        }
    };
    if let Some(start) = &run.start {
        learned.params().load(start)?;
    }
    let classes = ClassTokens::new(clip.text(), &data.classes)?;
    let train = match recipe.sees_views_again() {
        true => patches::remembered(&data.train, clip, learned.needs()),
        false => data.train.clone(),
    };
    let labels: Vec<u32> = train.labels().collect();
    let (n, batch_size) = (labels.len(), recipe.batch_size);
    let steps = recipe.steps(n);
    let epochs = recipe.epochs_for(data.shots(), data.classes.len());
    recipe.schedule.check_length(epochs * steps)?;
    let mut optimizer = Optimizer::new(recipe.optimizer.clone(), learned.params())?;

    let identity = match &run.checkpoint {
        Some(_) => identity(clip, data, settings, run, learned.params())?,
        None => String::new(),
    };
    let mut saved = Saved::default();
    if let Some(plan) = &run.checkpoint
        && let Some(found) = state::load(&plan.path, &identity, learned, &mut optimizer)?
    {
        saved = found;
        run.progress.note(&format!(
            "going on from epoch {}, step {}",
            saved.epoch + 1,
            saved.tally.steps + 1
        ));
    }

    let done = (saved.epoch * steps + saved.tally.steps) as u64;
    run.progress
        .start("training", done, (epochs * steps) as u64);
    let (started, mut images_seen) = (Instant::now(), 0usize);
    let mut last_saved = Instant::now();
    while saved.epoch < epochs {
        let epoch = saved.epoch;
        let order = Rng::stream(run.seed, "order", &[epoch as u64]).permutation(n);
        let view = recipe.view(run.seed, epoch);
        let step_of = |index| Step {
            seed: run.seed,
            epoch,
            epochs,
            index,
            steps,
        };
        for (index, positions) in order
            .chunks(batch_size)
            .take(steps)
            .enumerate()
            .skip(saved.tally.steps)
        {
            if let Err(cancelled) = run.check_cancelled() {
                if let Some(plan) = &run.checkpoint {
                    state::save(&plan.path, &identity, &saved, learned, &optimizer)?;
                }
                return Err(cancelled);
            }
            let step = step_of(index);
            let lr = recipe.schedule.rate_at(recipe.lr, step);
            let images = train.images(clip, positions, learned.needs(), view)?;
            let labels: Vec<u32> = positions.iter().map(|&p| labels[p]).collect();
            let batch = Batch {
                images: &images,
                labels: &labels,
                classes: &classes,
            };
            let (loss, gradients) = gradients(learned, clip, &batch, step)?;
            optimizer.step(learned.params(), &gradients, |param| {
                learned.rate(param, epoch, epochs).unwrap_or(lr)
            })?;
            saved.tally.loss += f64::from(loss.total.to_scalar::<f32>()?);
            saved.tally.correct += loss
                .logits
                .map_or(Ok(0), |logits| count_correct(&logits, &labels))?;
            saved.tally.images += labels.len();
            saved.tally.steps += 1;
            images_seen += labels.len();
            let status = TrainStatus {
                epoch: epoch + 1,
                epochs,
                loss: saved.tally.mean_loss(),
                accuracy: saved.tally.accuracy(),
                lr,
                images_per_second: images_seen as f64 / started.elapsed().as_secs_f64().max(1e-9),
            };
            run.progress.trained((step.global() + 1) as u64, &status);
            if let Some(plan) = run
                .checkpoint
                .as_ref()
                .filter(|plan| last_saved.elapsed() >= plan.every)
            {
                state::save(&plan.path, &identity, &saved, learned, &optimizer)?;
                last_saved = Instant::now();
            }
        }
        let val_accuracy = match &val {
            Some(val) => Some(match learned.tasks() {
                Some(tasks) => tasks.mean_accuracy(learned, clip, val, &data.classes)?,
                None => accuracy(learned, clip, val, &data.classes)?,
            }),
            None => None,
        };
        let lr = recipe.schedule.rate_at(recipe.lr, step_of(steps - 1));
        saved.finish_epoch(lr, val_accuracy, learned.params())?;
        if !learned.after_epoch(saved.epoch)? {
            break;
        }
    }
    run.progress.finish();
    if let Some(best) = &saved.best {
        learned.params().load(best)?;
    }
    learned.history = saved.history;
    Ok(())
}

/// What [`Predictor::needs`] of the images can be encoded before training: every view that will be asked for, or `None`
/// where each epoch draws new crops.
pub fn views_to_prepare(recipe: &Recipe, needs: ImageNeeds, seed: u64) -> Option<Vec<View>> {
    if needs == ImageNeeds::Pixels || !recipe.sees_views_again() {
        return None;
    }
    Some(match recipe.augment {
        Augment::None => vec![View::Fixed],
        Augment::CropFlip => {
            let views = 0..recipe.views;
            views.map(|draw| View::Random { seed, draw }).collect()
        }
    })
}
