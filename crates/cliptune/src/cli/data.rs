//! Labelled images on the command line.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Result, bail};
use cliptune::prompt_file::PromptFile;
use cliptune::{Classes, Clip, ImageNeeds, ImageSource, Labelled, View};
use serde::Deserialize;
use serde_json::Value;

use super::progress::Show;

/// Which classes are taken.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Subset {
    /// All
    #[default]
    All,
    /// The first half, rounded up
    Base,
    /// The second half
    New,
}

impl Subset {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::All => "all",
            Self::Base => "base",
            Self::New => "new",
        }
    }
}

/// Which images are measured.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum SplitName {
    /// Those that no training sees
    #[default]
    Test,
    /// Those that settings are chosen by
    Val,
    /// Those from which the training images are drawn
    Train,
    /// Every image
    All,
}

impl SplitName {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Test => "test",
            Self::Val => "val",
            Self::Train => "train",
            Self::All => "all",
        }
    }
    pub(crate) fn may_hold_training_images(self) -> bool {
        matches!(self, Self::Train | Self::All)
    }
}

/// Where encoded images are kept.
#[derive(Clone, Debug)]
pub(crate) enum CachePlan {
    /// In this folder, for later runs too.
    In(PathBuf),
    /// In memory.
    Memory,
}

impl CachePlan {
    pub(crate) fn new(folder: Option<PathBuf>, no_cache: bool) -> Self {
        match folder {
            Some(folder) => Self::In(folder),
            None if no_cache => Self::Memory,
            None => Self::user(),
        }
    }

    /// The user's cache folder, as the system's conventions have it.
    pub(crate) fn user() -> Self {
        let variable = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
        let base = if cfg!(windows) {
            variable("LOCALAPPDATA")
        } else if cfg!(target_os = "macos") {
            variable("HOME").map(|home| home.join("Library/Caches"))
        } else {
            variable("XDG_CACHE_HOME").or_else(|| variable("HOME").map(|home| home.join(".cache")))
        };
        base.map_or(Self::Memory, |base| Self::In(base.join("cliptune")))
    }
}

pub(crate) struct Data {}
pub(crate) struct Draw {
    pub(crate) labelled: Labelled,
    pub(crate) shortages: Vec<String>,
}
impl Draw {
    pub(crate) fn in_words(&self, _shots: usize, _seed: u64) -> String {
        String::new()
    }
}
impl Data {
    pub(crate) fn open(_images: &Path, _subset: Subset, _skip: bool, _show: &mut Show) -> Result<Self> {
        bail!("not yet")
    }
    pub(crate) fn classes(&self) -> &Classes {
        todo!()
    }
    pub(crate) fn in_words(&self) -> String {
        String::new()
    }
    pub(crate) fn notes(&self) -> Value {
        Value::Null
    }
    pub(crate) fn draw(&self, _shots: usize, _seed: u64) -> Result<Draw> {
        bail!("not yet")
    }
    pub(crate) fn items(&self, _split: SplitName) -> Result<Vec<(usize, u32)>> {
        bail!("not yet")
    }
    pub(crate) fn was_trained_on(&self, _file: &PromptFile) -> bool {
        false
    }
    pub(crate) fn skipped(&self) -> usize {
        0
    }
}
pub(crate) fn class_names(_images: &Path, _subset: Subset) -> Result<Classes> {
    bail!("not yet")
}
pub(crate) fn loose_images(_paths: &[PathBuf]) -> Result<Arc<dyn ImageSource>> {
    bail!("not yet")
}
pub(crate) fn encode(_clip: &Clip, labelled: &Labelled, _needs: ImageNeeds, _views: &[View], _cache: &CachePlan, _show: &mut Show) -> Result<Labelled> {
    Ok(labelled.clone())
}
pub(crate) fn encode_items(_data: &Data, _clip: &Clip, _indices: &[usize], _needs: ImageNeeds, _cache: &CachePlan, _show: &mut Show) -> Result<Arc<dyn ImageSource>> {
    bail!("not yet")
}
