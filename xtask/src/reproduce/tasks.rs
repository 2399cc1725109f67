//! What the methods are compared on: the built-in tasks, or a data set of the user's.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail};
use cliptune::data::{Dataset, FewShot};
use cliptune::task::Split;
use serde::{Deserialize, Serialize};

use super::builtin;
use super::record::TaskNote;

/// Where all pictures come from. Two calls with equal sources see the same pictures.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub(crate) enum Source {
    /// The built-in tasks.
    BuiltIn {
        /// [`builtin::fingerprint`].
        pictures: String,
    },
    /// A data set on disk.
    DataSet {
        root: PathBuf,
        /// [`Dataset::fingerprint`].
        lists: String,
    },
}

/// A task by name.
#[derive(Clone, Debug)]
pub(crate) struct Task {
    pub(crate) slug: String,
    pub(crate) note: TaskNote,
    /// The hand-written sentence of zero-shot CLIP.
    pub(crate) template: String,
    pub(crate) n_cls: usize,
    /// Training pictures that the largest draw may take of a class; none if there is no such limit.
    pub(crate) most_shots: Option<usize>,
}

impl Source {
    /// The built-in tasks, or the data set at `root`.
    ///
    /// # Errors
    /// A data set that cannot be opened.
    pub(crate) fn new(root: Option<&Path>) -> Result<Self> {
        let Some(root) = root else {
            return Ok(Self::BuiltIn {
                pictures: builtin::fingerprint(),
            });
        };
        let root = std::path::absolute(root).with_context(|| root.display().to_string())?;
        let lists = Dataset::open(&root)?.fingerprint();
        Ok(Self::DataSet { root, lists })
    }

    /// What differs between two sources, for people.
    pub(crate) fn in_words(&self) -> String {
        let short = |hash: &str| hash.chars().take(12).collect::<String>();
        match self {
            Self::BuiltIn { pictures } => format!("the built-in pictures {}", short(pictures)),
            Self::DataSet { root, lists } => format!("{} ({})", root.display(), short(lists)),
        }
    }

    /// All tasks, in the order of tables.
    ///
    /// # Errors
    /// A data set that cannot be opened.
    pub(crate) fn tasks(&self) -> Result<Vec<Task>> {
        match self {
            Self::BuiltIn { .. } => Ok(builtin::tasks()),
            Self::DataSet { root, .. } => Ok(vec![of_data_set(root, &Dataset::open(root)?)]),
        }
    }

    /// The task called `slug`, its pictures ready to be drawn from.
    ///
    /// # Errors
    /// An unknown task; a data set that is not the one of the name any more.
    pub(crate) fn open(&self, slug: &str) -> Result<Opened> {
        match self {
            Self::BuiltIn { pictures } => {
                let task = builtin::Drawn::new(slug, pictures);
                Ok(Opened::Drawn(
                    task.ok_or_else(|| anyhow!("no such task `{slug}`"))?,
                ))
            }
            Self::DataSet { root, lists } => {
                let dataset = Dataset::open(root)?;
                if dataset.fingerprint() != *lists {
                    bail!(
                        "{}: the data have changed since the call began",
                        root.display()
                    );
                }
                Ok(Opened::Files(Box::new(dataset)))
            }
        }
    }
}

fn of_data_set(root: &Path, dataset: &Dataset) -> Task {
    let name = root.file_stem().unwrap_or_default().to_string_lossy();
    let plain = |c: char| {
        if c.is_alphanumeric() {
            c.to_ascii_lowercase()
        } else {
            '-'
        }
    };
    let slug: String = name.chars().map(plain).collect();
    let n_cls = dataset.classes().len();
    Task {
        slug: match slug.trim_matches('-') {
            "" => "data".to_owned(),
            slug => slug.to_owned(),
        },
        note: TaskNote {
            title: name.into_owned(),
            about: format!("Pictures of {n_cls} classes from a folder."),
            origin: format!("a data set of {n_cls} classes, split {}", dataset.origin()),
        },
        template: "a photo of a {}.".to_owned(),
        n_cls,
        most_shots: None,
    }
}

/// A task with its pictures.
#[derive(Debug)]
pub(crate) enum Opened {
    Drawn(builtin::Drawn),
    Files(Box<Dataset>),
}

impl Opened {
    /// `shots` training pictures of each class by `seed`, and the test pictures. With 0 shots there is nothing to learn from.
    ///
    /// # Errors
    /// Missing files, no test pictures.
    pub(crate) fn few_shot(&self, shots: usize, seed: u64) -> Result<FewShot> {
        let mut drawn = match self {
            Self::Drawn(pictures) => pictures.few_shot(shots, seed)?,
            Self::Files(dataset) => dataset.few_shot(shots, seed)?,
        };
        if shots == 0 {
            let source = drawn.labelled.train.source().clone();
            drawn.labelled.train = Split::new(source, Vec::new())?;
            drawn.labelled.val = None;
        }
        if drawn.test.is_empty() {
            bail!("there are no test pictures");
        }
        Ok(drawn)
    }
}
