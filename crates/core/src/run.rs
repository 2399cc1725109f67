//! What a run carries besides its settings: seed, progress, cancellation, and where to keep what must survive a crash.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use candle_core::Tensor;

use crate::{Error, Result};

/// A moment of a training run.
#[derive(Clone, Copy, Debug, Default)]
pub struct TrainStatus {
    /// Epoch, counted from 1.
    pub epoch: usize,
    /// All epochs.
    pub epochs: usize,
    /// Mean loss of the epoch so far.
    pub loss: f64,
    /// Training accuracy of the epoch so far, percent.
    pub accuracy: f64,
    /// Learning rate.
    pub lr: f64,
    /// Images of the epoch's batches per second.
    pub images_per_second: f64,
}

/// Someone who watches a run. Core knows no terminal; the command line draws bars.
pub trait Progress: Send {
    /// Long work of `total` units begins (`"training"`, `"encoding images"`), `done` of them being finished already.
    fn start(&mut self, what: &str, done: u64, total: u64);
    /// A step of training is over.
    fn trained(&mut self, done: u64, status: &TrainStatus);
    /// `done` units of other work are over.
    fn advanced(&mut self, done: u64);
    /// The work is over.
    fn finish(&mut self);
    /// Something the user should read.
    fn note(&mut self, message: &str);
}

/// Watches nothing.
#[derive(Clone, Copy, Debug, Default)]
pub struct Quiet;

impl Progress for Quiet {
    fn start(&mut self, _: &str, _: u64, _: u64) {}
    fn trained(&mut self, _: u64, _: &TrainStatus) {}
    fn advanced(&mut self, _: u64) {}
    fn finish(&mut self) {}
    fn note(&mut self, _: &str) {}
}

/// Where and how often a run writes down how far it is.
#[derive(Clone, Debug)]
pub struct CheckpointPlan {
    /// The file; replaced as the run goes on, removed by the caller when the result is safe.
    pub path: PathBuf,
    /// Least time between two checkpoints.
    pub every: Duration,
}

impl CheckpointPlan {
    /// The plan of a training before the one that counts: as often, in a file of its own beside this one's.
    #[must_use]
    pub fn before(&self, name: &str) -> Self {
        let mut path = self.path.clone().into_os_string();
        path.push(".");
        path.push(name);
        Self {
            path: path.into(),
            every: self.every,
        }
    }
}

/// What a run carries besides its settings.
pub struct Run {
    /// Determines initial values, the order of images and their crops.
    pub seed: u64,
    /// Who is told how far the run is.
    pub progress: Box<dyn Progress>,
    /// Where to keep what a killed run needs to go on; `None` keeps nothing.
    pub checkpoint: Option<CheckpointPlan>,
    /// Set from outside to stop after the step in hand.
    pub cancel: Arc<AtomicBool>,
    /// What every training of the run begins with in the place of its own start, by the authors' keys: what another run has
    /// learned, or the mean of several ([`crate::prompt_file::mean`]).
    pub start: Option<BTreeMap<String, Tensor>>,
}

impl Run {
    /// A run that shows nothing and keeps nothing.
    pub fn quiet(seed: u64) -> Self {
        Self {
            seed,
            progress: Box::new(Quiet),
            checkpoint: None,
            cancel: Arc::default(),
            start: None,
        }
    }

    /// # Errors
    /// [`Error::Cancelled`] once [`Run::cancel`] is set.
    pub fn check_cancelled(&self) -> Result<()> {
        match self.cancel.load(Ordering::Relaxed) {
            true => Err(Error::Cancelled),
            false => Ok(()),
        }
    }
}

impl std::fmt::Debug for Run {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Run")
            .field("seed", &self.seed)
            .field("checkpoint", &self.checkpoint)
            .finish_non_exhaustive()
    }
}
