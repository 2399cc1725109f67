//! `result.json`: all that is kept of a run.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail};
use cliptune::data::metrics::harmonic_mean;
use cliptune::files;
use cliptune::method::ClipId;
use cliptune::train::History;
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// `1 run`, `2 runs`.
pub(crate) fn count(n: usize, what: &str) -> String {
    format!("{n} {what}{}", if n == 1 { "" } else { "s" })
}

/// What a result file says it is.
pub(crate) const FORMAT: &str = "cliptune result 1";

/// What is trained on what, and measured where.
#[derive(
    Clone,
    Copy,
    Debug,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    Hash,
    Serialize,
    Deserialize,
    clap::ValueEnum,
)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Protocol {
    /// A few pictures of every class; measured on others of the same classes.
    FewShot,
    /// Trained on the first half of the classes; measured on both halves.
    BaseToNew,
    /// Trained on one task; measured on others, whose classes training never named.
    CrossDataset,
    /// Trained on pictures in the usual style; measured in other styles.
    DomainShift,
    /// Trained on other tasks together first, and from there on a few pictures of every class; measured on others of these.
    MultiTask,
    /// Trained on every training picture there is; measured on others of the same classes.
    Supervised,
}

impl Protocol {
    pub(crate) const ALL: [Self; 6] = [
        Self::FewShot,
        Self::BaseToNew,
        Self::CrossDataset,
        Self::DomainShift,
        Self::MultiTask,
        Self::Supervised,
    ];

    /// Its name on the command line and in folders.
    pub(crate) fn slug(self) -> &'static str {
        match self {
            Self::FewShot => "few-shot",
            Self::BaseToNew => "base-to-new",
            Self::CrossDataset => "cross-dataset",
            Self::DomainShift => "domain-shift",
            Self::MultiTask => "multi-task",
            Self::Supervised => "supervised",
        }
    }
}

/// What tells one run from another.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub(crate) struct RunKey {
    pub(crate) protocol: Protocol,
    /// The task's slug.
    pub(crate) task: String,
    /// The contestant's slug.
    pub(crate) contestant: String,
    /// Training pictures of each class; 0 if nothing is learned.
    pub(crate) shots: usize,
    pub(crate) seed: u64,
}

impl RunKey {
    /// The run's folder below the output folder.
    pub(crate) fn folder(&self) -> PathBuf {
        let Self {
            protocol,
            task,
            contestant,
            shots,
            seed,
        } = self;
        [
            protocol.slug(),
            task,
            contestant,
            &format!("shots_{shots}"),
            &format!("seed_{seed}"),
        ]
        .iter()
        .collect()
    }

    /// The run's result file below `out`.
    pub(crate) fn file(&self, out: &Path) -> PathBuf {
        out.join(self.folder()).join("result.json")
    }
}

impl std::fmt::Display for RunKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self {
            protocol,
            task,
            contestant,
            shots,
            seed,
        } = self;
        write!(f, "{} {task} {contestant}", protocol.slug())?;
        match shots {
            0 => Ok(()),
            _ => write!(f, ", {}, seed {seed}", count(*shots, "shot")),
        }
    }
}

/// A finished run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Record {
    pub(crate) format: String,
    pub(crate) run: RunKey,
    /// The task in words.
    pub(crate) task: TaskNote,
    /// The contestant's name in tables.
    pub(crate) label: String,
    /// The method's slug in the registry.
    pub(crate) method: String,
    /// All settings, defaults included.
    pub(crate) config: Value,
    pub(crate) clip: ClipId,
    /// [`cliptune::Clip::scale`].
    pub(crate) logit_scale: f64,
    pub(crate) data: DataNote,
    pub(crate) machine: Machine,
    /// Version of the workspace.
    pub(crate) version: String,
    pub(crate) revision: Option<Revision>,
    pub(crate) seconds: Seconds,
    /// Largest resident memory of the process that made the run, where the system tells it.
    pub(crate) peak_memory_bytes: Option<u64>,
    /// Learned numbers.
    pub(crate) learned: usize,
    /// Loss by epoch, if there was a training.
    pub(crate) training: Option<History>,
    /// What was measured: one for pictures of the classes trained on; base and new; one for each further task.
    pub(crate) tests: Vec<Measured>,
}

/// A task in words.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct TaskNote {
    /// Its name, as a heading.
    pub(crate) title: String,
    /// One sentence: what is to be told from what.
    pub(crate) about: String,
    /// Where the pictures come from, as a sentence's end.
    pub(crate) origin: String,
}

/// What was learned from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct DataNote {
    pub(crate) train_images: usize,
    /// [`cliptune::Split::fingerprint`] of the training pictures; none without training pictures.
    pub(crate) train: Option<String>,
}

/// Where it was computed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Machine {
    pub(crate) device: String,
    pub(crate) dtype: String,
    pub(crate) threads: usize,
    pub(crate) system: String,
}

/// The commit that the command was built from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Revision {
    pub(crate) commit: String,
    /// Whether files differ from it.
    pub(crate) dirty: bool,
}

/// Wall time of a run's parts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Seconds {
    /// Reading the weights.
    pub(crate) load: f64,
    /// Image features, which are in the cache but for a first call.
    pub(crate) encode: f64,
    pub(crate) fit: f64,
    pub(crate) evaluate: f64,
}

/// Figures on one set of test pictures.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Measured {
    /// `test`, `base`, `new`, or the task's slug.
    pub(crate) name: String,
    /// In words.
    pub(crate) title: String,
    pub(crate) classes: Vec<String>,
    pub(crate) images: u64,
    /// [`cliptune::Split::fingerprint`] of the test pictures.
    pub(crate) data: String,
    /// Percent.
    pub(crate) accuracy: f64,
    /// Percent; none for a class without pictures.
    pub(crate) per_class: Vec<Option<f64>>,
    /// Row: class, column: prediction.
    pub(crate) confusion: Vec<Vec<u64>>,
    pub(crate) samples: Vec<Sample>,
}

/// What was predicted for a test picture.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Sample {
    /// The picture, below the output folder.
    pub(crate) picture: String,
    pub(crate) label: u32,
    pub(crate) predicted: u32,
    /// Softmax of the logits at the prediction.
    pub(crate) probability: f64,
    /// Where the class token looks, if the method learned something in the image tower.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) attention: Option<Attention>,
}

/// The share of each patch in what the class token looks at, line by line over a square grid.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Attention {
    /// In CLIP as it is.
    pub(crate) before: Vec<f32>,
    /// With what was learned.
    pub(crate) after: Vec<f32>,
}

/// What became of a result file.
#[derive(Debug)]
pub(crate) enum Found {
    Nothing,
    Good(Box<Record>),
    /// The file is not a result of this run; says why.
    Damaged(String),
}

impl Record {
    /// Writes the result, all or nothing.
    pub(crate) fn write(&self, out: &Path) -> Result<()> {
        let path = self.run.file(out);
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
        }
        let mut text = serde_json::to_vec_pretty(self)?;
        text.push(b'\n');
        Ok(files::write_atomically(&path, |w| w.write_all(&text))?)
    }

    /// Reads the result of `run`.
    ///
    /// # Errors
    /// If the operating system refuses to read a file that is there.
    pub(crate) fn find(out: &Path, run: &RunKey) -> Result<Found> {
        let path = run.file(out);
        let bytes = match std::fs::read(&path) {
            Ok(bytes) => bytes,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Found::Nothing),
            Err(e) => return Err(anyhow!(e).context(path.display().to_string())),
        };
        Ok(match Self::parse(&bytes) {
            Ok(record) if record.run == *run => Found::Good(Box::new(record)),
            Ok(record) => Found::Damaged(format!("it is of another run ({})", record.run)),
            Err(reason) => Found::Damaged(format!("{reason:#}")),
        })
    }

    /// A result from the bytes of its file, if it agrees with itself.
    pub(crate) fn parse(bytes: &[u8]) -> Result<Self> {
        let record: Self = serde_json::from_slice(bytes).context("not a result")?;
        if record.format != FORMAT {
            bail!("its format is `{}`, expected `{FORMAT}`", record.format);
        }
        if record.tests.is_empty() {
            bail!("it holds no measurement");
        }
        record.tests.iter().try_for_each(Measured::check)?;
        Ok(record)
    }

    /// The figures called `name`.
    pub(crate) fn test(&self, name: &str) -> Option<&Measured> {
        self.tests.iter().find(|test| test.name == name)
    }

    /// Accuracy on `name`, percent.
    pub(crate) fn accuracy(&self, name: &str) -> Option<f64> {
        Some(self.test(name)?.accuracy)
    }

    /// Harmonic mean of base and new accuracy.
    pub(crate) fn harmonic(&self) -> Option<f64> {
        Some(harmonic_mean(self.accuracy("base")?, self.accuracy("new")?))
    }

    /// Mean accuracy over the styles or tasks that were not trained on.
    pub(crate) fn elsewhere(&self) -> Option<f64> {
        let others: Vec<f64> = self
            .tests
            .iter()
            .filter(|test| test.name != self.run.task)
            .map(|test| test.accuracy)
            .collect();
        (!others.is_empty()).then(|| others.iter().sum::<f64>() / others.len() as f64)
    }
}

impl Measured {
    /// Checks that the figures agree with the confusion matrix.
    fn check(&self) -> Result<()> {
        let n = self.classes.len();
        let square = self.confusion.len() == n && self.confusion.iter().all(|row| row.len() == n);
        if n == 0 || !square || self.per_class.len() != n {
            bail!(
                "`{}`: the confusion matrix does not fit the {n} classes",
                self.name
            );
        }
        let counted = self
            .confusion
            .iter()
            .flatten()
            .try_fold(0u64, |sum, &c| sum.checked_add(c));
        if counted != Some(self.images) || self.images == 0 {
            bail!(
                "`{}`: the confusion matrix does not count {} pictures",
                self.name,
                self.images
            );
        }
        let right: u64 = (0..n).filter_map(|i| self.confusion.get(i)?.get(i)).sum();
        let accuracy = 100.0 * right as f64 / self.images as f64;
        if self.accuracy.is_nan() || (self.accuracy - accuracy).abs() > 1e-6 {
            bail!(
                "`{}`: accuracy {} is not that of the confusion matrix",
                self.name,
                self.accuracy
            );
        }
        let square = |map: &Vec<f32>| {
            map.len().isqrt().pow(2) == map.len()
                && map.iter().all(|share| (0.0..=1.0).contains(share))
        };
        let maps = self.samples.iter().filter_map(|s| s.attention.as_ref());
        for map in maps {
            if !square(&map.before) || !square(&map.after) {
                bail!("`{}`: a map of attention is not one", self.name);
            }
        }
        let known = |label: u32| (label as usize) < n;
        if !self
            .samples
            .iter()
            .all(|s| known(s.label) && known(s.predicted))
        {
            bail!("`{}`: a sample has no class", self.name);
        }
        Ok(())
    }
}
