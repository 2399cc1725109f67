//! Labelled images on the command line.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use anyhow::{Context, Error, Result, bail};
use cliptune::data::{
    BadImage, CachedFeatures, ClassCounts, ClassSubset, Dataset, DiskImages, Event,
};
use cliptune::prompt_file::PromptFile;
use cliptune::run::Progress;
use cliptune::{Classes, Clip, ImageNeeds, ImageSource, Labelled, View};
use serde::Deserialize;
use serde_json::{Value, json};

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

impl From<Subset> for ClassSubset {
    fn from(subset: Subset) -> Self {
        match subset {
            Subset::All => Self::All,
            Subset::Base => Self::Base,
            Subset::New => Self::New,
        }
    }
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

    /// Whether a prompt may have been trained on these.
    pub(crate) fn may_hold_training_images(self) -> bool {
        matches!(self, Self::Train | Self::All)
    }
}

/// Where encoded images are kept.
#[derive(Clone, Debug)]
pub(crate) enum CachePlan {
    /// In this folder, for later runs too.
    In(PathBuf),
    /// In a temporary file.
    Temporary,
}

impl CachePlan {
    pub(crate) fn new(folder: Option<PathBuf>, no_cache: bool) -> Self {
        match folder {
            Some(folder) => Self::In(folder),
            None if no_cache => Self::Temporary,
            None => Self::user(),
        }
    }

    /// The user's cache folder, as the system's conventions have it.
    pub(crate) fn user() -> Self {
        let variable = |name: &str| {
            std::env::var_os(name)
                .filter(|v| !v.is_empty())
                .map(PathBuf::from)
        };
        let base = if cfg!(windows) {
            variable("LOCALAPPDATA")
        } else if cfg!(target_os = "macos") {
            variable("HOME").map(|home| home.join("Library/Caches"))
        } else {
            variable("XDG_CACHE_HOME").or_else(|| variable("HOME").map(|home| home.join(".cache")))
        };
        base.map_or(Self::Temporary, |base| Self::In(base.join("cliptune")))
    }
}

/// A data set, opened as the flags say.
pub(crate) struct Data {
    dataset: Dataset,
    subset: Subset,
    classes: Classes,
    /// Hash of the lists as they are given, unreadable images included.
    lists: String,
}

/// What is learned from.
pub(crate) struct Draw {
    pub(crate) labelled: Labelled,
    pub(crate) warnings: Vec<String>,
}

impl Draw {
    /// How many images were drawn.
    pub(crate) fn in_words(&self, shots: usize, seed: u64) -> String {
        let (train, classes) = (self.labelled.train.len(), self.labelled.classes.len());
        let val = match &self.labelled.val {
            Some(val) => format!("{} to choose by", val.len()),
            None => "none to choose by".to_owned(),
        };
        let rule = match shots {
            0 => "all there are".to_owned(),
            _ => format!("{shots} shots, seed {seed}"),
        };
        format!("{train} images of {classes} classes to learn from, {val} ({rule})")
    }
}

impl Data {
    pub(crate) fn open(
        images: &Path,
        subset: Subset,
        skip_bad_images: bool,
        show: &mut Show,
    ) -> Result<Self> {
        let mut dataset = Dataset::open(images).context("the images cannot be used")?;
        let lists = dataset.fingerprint();
        if skip_bad_images {
            let bad = check(&dataset, show);
            for BadImage { name, reason, .. } in &bad {
                show.note(&format!("left out  {name}: {reason}"));
            }
            dataset = dataset.without(&bad)?;
        }
        let names = dataset.classes().names();
        let taken = ClassSubset::from(subset).labels(names.len());
        let names = names.get(taken).unwrap_or_default().to_vec();
        let classes = Classes::new(names).with_context(|| {
            format!(
                "{}: too few classes for --subset {}",
                images.display(),
                subset.name()
            )
        })?;
        Ok(Self {
            dataset,
            subset,
            classes,
            lists,
        })
    }

    /// The classes taken.
    pub(crate) fn classes(&self) -> &Classes {
        &self.classes
    }

    /// Images that were left out because they cannot be read.
    pub(crate) fn skipped(&self) -> usize {
        self.dataset.skipped()
    }

    /// What was found, a line for each thing worth knowing.
    pub(crate) fn in_words(&self) -> Vec<String> {
        let counts = self.dataset.counts();
        let sum = |field: fn(&ClassCounts) -> usize| -> usize { counts.iter().map(field).sum() };
        let (train, val, test) = (sum(|c| c.train), sum(|c| c.val), sum(|c| c.test));
        let mut lines = vec![
            format!(
                "data      {}: {} classes, {} images",
                self.dataset.path().display(),
                counts.len(),
                train + val + test
            ),
            format!(
                "split     {train} train, {val} val, {test} test ({})",
                self.dataset.origin()
            ),
        ];
        if self.subset != Subset::All {
            let (name, n) = (self.subset.name(), self.classes.len());
            lines.push(format!("subset    {name}: {n} of {} classes", counts.len()));
        }
        if self.skipped() > 0 {
            lines.push(format!(
                "left out  {} images that cannot be read",
                self.skipped()
            ));
        }
        for (extension, count) in self.dataset.ignored() {
            let kind = match extension.as_str() {
                "" => "without an extension".to_owned(),
                extension => format!("of type .{extension}"),
            };
            lines.push(format!(
                "note      {count} files {kind} are not read; JPEG and PNG are"
            ));
        }
        lines
    }

    /// What a prompt file keeps of the data: no path and no time, so that equal runs give equal files.
    pub(crate) fn notes(&self) -> Value {
        json!({
            "split": self.dataset.origin(),
            "lists": self.lists,
            "skipped_images": self.skipped(),
        })
    }

    /// Whether the prompt in `file` was trained on these lists.
    pub(crate) fn was_trained_on(&self, file: &PromptFile) -> bool {
        let is_this = |data: &Value| data["lists"] == self.lists.as_str();
        match file.notes.get("data") {
            Some(Value::Array(several)) => several.iter().any(is_this),
            Some(data) => is_this(data),
            None => false,
        }
    }

    /// `shots` training images of each class, or all with 0.
    pub(crate) fn draw(&self, shots: usize, seed: u64) -> Result<Draw> {
        let drawn = self.dataset.few_shot(shots, seed)?;
        drawn.labelled.check()?;
        let drawn = drawn.subset(self.subset.into())?;
        let short: Vec<String> = drawn
            .shortages
            .iter()
            .map(|shortage| format!("{} ({})", shortage.class, shortage.has))
            .collect();
        let warnings = match short.len() {
            0 => Vec::new(),
            n => {
                let named: Vec<&str> = short.iter().take(MOST_NAMED).map(String::as_str).collect();
                let more = if n > MOST_NAMED { ", ..." } else { "" };
                vec![format!(
                    "{n} of {} classes have fewer than {shots} training images and give all they have: {}{more}",
                    self.classes.len(),
                    named.join(", ")
                )]
            }
        };
        Ok(Draw {
            labelled: drawn.labelled,
            warnings,
        })
    }

    /// `(item, label)` of the images of a split that belong to the classes taken.
    pub(crate) fn items(&self, split: SplitName) -> Result<Vec<(usize, u32)>> {
        let data = &self.dataset;
        let items = match split {
            SplitName::Train => data.train()?.items().to_vec(),
            SplitName::Val => data.val()?.items().to_vec(),
            SplitName::Test => data.test()?.items().to_vec(),
            SplitName::All => {
                let (train, val, test) = (data.train()?, data.val()?, data.test()?);
                [train.items(), val.items(), test.items()].concat()
            }
        };
        let taken = ClassSubset::from(self.subset).labels(data.classes().len());
        let of_taken = |(item, label): (usize, u32)| {
            let label = label as usize;
            taken
                .contains(&label)
                .then(|| (item, (label - taken.start) as u32))
        };
        Ok(items.into_iter().filter_map(of_taken).collect())
    }
}

/// Classes that are named in a warning.
const MOST_NAMED: usize = 10;

/// The images of `dataset` that cannot be read.
fn check(dataset: &Dataset, show: &mut Show) -> Vec<BadImage> {
    let n: usize = dataset
        .counts()
        .iter()
        .map(|c| c.train + c.val + c.test)
        .sum();
    show.start("checking images", 0, n as u64);
    let shared = Mutex::new(&mut *show);
    let bad = dataset.check_images(&|done, _| {
        if let Ok(mut show) = shared.lock() {
            show.advanced(done as u64);
        }
    });
    show.finish();
    bad
}

/// The class names of a data set.
pub(crate) fn class_names(images: &Path, subset: Subset) -> Result<Classes> {
    let data = Data::open(images, subset, false, &mut Show::Quiet)?;
    Ok(data.classes().clone())
}

/// Images without labels: files, and all images below folders, in the order given.
pub(crate) fn loose_images(paths: &[PathBuf]) -> Result<Arc<dyn ImageSource>> {
    let mut files = Vec::new();
    for path in paths {
        let meta = std::fs::metadata(path).with_context(|| path.display().to_string())?;
        if !meta.is_dir() {
            files.push(path.clone());
            continue;
        }
        let before = files.len();
        walk(path, &mut files)?;
        if files.len() == before {
            bail!("{}: the folder holds no JPEG or PNG image", path.display());
        }
    }
    let named = files
        .into_iter()
        .map(|path| (path.display().to_string(), path));
    Ok(Arc::new(DiskImages::new(named)))
}

/// Image files below `folder`, sorted; hidden ones and linked folders are passed over.
fn walk(folder: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    let mut entries: Vec<_> = std::fs::read_dir(folder)
        .and_then(Iterator::collect::<std::io::Result<_>>)
        .with_context(|| folder.display().to_string())?;
    entries.sort_by_key(std::fs::DirEntry::file_name);
    for entry in entries {
        let path = entry.path();
        if entry.file_name().as_encoded_bytes().first() == Some(&b'.') {
            continue;
        }
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            walk(&path, files)?;
        } else if is_image(&path) {
            files.push(path);
        }
    }
    Ok(())
}

fn is_image(path: &Path) -> bool {
    let extension = path.extension().and_then(|e| e.to_str()).unwrap_or("");
    ["jpg", "jpeg", "jpe", "png"].contains(&extension.to_ascii_lowercase().as_str())
}

/// `labelled` from a cache that holds the `views` of its images, so that training does not run the image tower.
pub(crate) fn encode(
    clip: &Clip,
    labelled: &Labelled,
    needs: ImageNeeds,
    views: &[View],
    cache: &CachePlan,
    show: &mut Show,
) -> Result<Labelled> {
    let items = |split: &[(usize, u32)]| split.iter().map(|(item, _)| *item).collect::<Vec<_>>();
    let source = cached(labelled.train.source().clone(), clip, cache);
    for view in views {
        let mut items = items(labelled.train.items());
        if let (View::Fixed, Some(val)) = (view, &labelled.val) {
            items.extend(val.items().iter().map(|(item, _)| *item));
        }
        prepare(&source, clip, &items, needs, *view, show)?;
    }
    let source: Arc<dyn ImageSource> = Arc::new(source);
    Ok(Labelled {
        train: labelled.train.with_source(source.clone()),
        val: labelled.val.as_ref().map(|val| val.with_source(source)),
        classes: labelled.classes.clone(),
    })
}

/// The images at `items` of `data`, encoded once and kept for later runs.
pub(crate) fn encode_items(
    data: &Data,
    clip: &Clip,
    items: &[usize],
    needs: ImageNeeds,
    cache: &CachePlan,
    show: &mut Show,
) -> Result<Arc<dyn ImageSource>> {
    let source = cached(data.dataset.images().clone(), clip, cache);
    prepare(&source, clip, items, needs, View::Fixed, show)?;
    Ok(Arc::new(source))
}

fn cached(inner: Arc<dyn ImageSource>, clip: &Clip, cache: &CachePlan) -> CachedFeatures {
    let folder = match cache {
        CachePlan::In(folder) => Some(folder.clone()),
        CachePlan::Temporary => None,
    };
    CachedFeatures::new(inner, clip, folder)
}

fn prepare(
    source: &CachedFeatures,
    clip: &Clip,
    items: &[usize],
    needs: ImageNeeds,
    view: View,
    show: &mut Show,
) -> Result<()> {
    let mut started = false;
    let prepared = source.prepare(clip, items, needs, view, &mut |event| match event {
        Event::Progress { done, total } => {
            if !started {
                show.start("encoding images", done as u64, total as u64);
                started = true;
            }
            show.advanced(done as u64);
        }
        Event::Warning(message) => show.note(&format!("warning   {message}")),
    });
    show.finish();
    prepared.map_err(|error| match error {
        error @ cliptune::data::Error::Image { .. } => {
            Error::new(error).context("an image cannot be used; --skip-bad-images leaves such out")
        }
        error => error.into(),
    })
}
