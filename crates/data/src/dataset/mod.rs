//! Folders, CSV files and split files as data sets.

mod csv;
mod folder;
mod split_json;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use cliptune_core::task::{Role, Test, Train, Val};
use cliptune_core::{Classes, ImageSource, Split};
use serde::{Deserialize, Serialize};

use crate::{BadImage, DiskImages, Error, Result};

/// A labelled image: item of the source, label.
pub(crate) type Item = (usize, u32);

/// Where a data set's train, val and test lists come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SplitOrigin {
    /// Sub-folders `train`, `val`, `test`.
    Folders,
    /// The column `split` of a CSV file.
    Column,
    /// A split file as CoOp publishes them.
    SplitFile,
    /// Nothing was given: half of each class to train, a fifth to val, the rest to test.
    ///
    /// Each class's images are put in the order of the BLAKE3 of their names (path below the data set's folder, or as the
    /// CSV file writes it), and cut after ⌈n/2⌉ and another ⌊n/5⌋. So the split is the same for every seed and on every
    /// machine, a class with one image trains on it, and adding images moves few of the others.
    Rule,
}

impl SplitOrigin {
    /// Whether the data themselves say what is test data.
    pub fn is_given(self) -> bool {
        self != Self::Rule
    }
}

impl std::fmt::Display for SplitOrigin {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Folders => "given by sub-folders",
            Self::Column => "given by the column `split`",
            Self::SplitFile => "given by a split file",
            Self::Rule => "50/20/30 per class, by a hash of the file names",
        })
    }
}

/// Images of one class in each list.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClassCounts {
    /// Images to learn from.
    pub train: usize,
    /// Images to choose by.
    pub val: usize,
    /// Images to measure on.
    pub test: usize,
}

/// A labelled set of image files with its split into train, val and test.
///
/// Opening reads lists, not images. A listed file that is not there is remembered and refused by name when the images are
/// asked for, unless [`Dataset::without`] has dropped it.
#[derive(Clone, Debug)]
pub struct Dataset {
    path: PathBuf,
    images: Arc<DiskImages>,
    classes: Classes,
    train: Vec<Item>,
    val: Vec<Item>,
    test: Vec<Item>,
    origin: SplitOrigin,
    /// Items whose file is not there.
    missing: Vec<usize>,
    ignored: BTreeMap<String, usize>,
    skipped: usize,
}

/// What the readers find, before it is a data set.
#[derive(Debug, Default)]
struct Listing {
    /// Name and file of each image.
    files: Vec<(String, PathBuf)>,
    classes: Vec<String>,
    /// The lists, if they were given.
    given: Option<Lists>,
    /// All images with their labels, if they were not.
    all: Vec<Item>,
    ignored: BTreeMap<String, usize>,
}

#[derive(Debug, Default)]
struct Lists {
    train: Vec<Item>,
    val: Vec<Item>,
    test: Vec<Item>,
}

impl Dataset {
    /// Opens whatever `path` is: a CSV file, a split file, a folder with one `split_zhou_*.json`, a folder with `train/`,
    /// `val/`, `test/`, or a folder with one sub-folder per class.
    ///
    /// # Errors
    /// Says what was found where something else was expected, with file and line.
    pub fn open(path: &Path) -> Result<Self> {
        let meta = std::fs::metadata(path).map_err(|e| Error::io(path, e))?;
        if meta.is_dir() {
            return match split_json::find(path)? {
                Some(file) => Self::from_split_json(&file),
                None => Self::from_folder(path),
            };
        }
        let extension = path.extension().and_then(|e| e.to_str()).unwrap_or("");
        match extension.to_ascii_lowercase().as_str() {
            "csv" => Self::from_csv(path),
            "json" => Self::from_split_json(path),
            _ => Err(Error::dataset(
                path,
                "not a data set; expected a folder, a .csv file or a split file (.json)",
            )),
        }
    }

    /// A folder with one sub-folder per class, or with such folders below `train/`, `val/` (or `valid/`, `validation/`), `test/`.
    ///
    /// A class is called as its folder; classes are in the order of their names, images in that of their paths. Images may
    /// lie in folders below the class's; hidden files are passed over, files of other types counted ([`Dataset::ignored`]).
    ///
    /// # Errors
    /// [`Error::Dataset`] if there are no class folders, one is empty, or the split folders are ambiguous.
    pub fn from_folder(path: &Path) -> Result<Self> {
        Self::build(path, folder::read(path)?, SplitOrigin::Folders)
    }

    /// A CSV file with the header `path,label` or `path,label,split` in any order.
    ///
    /// Paths are relative to the file's folder, or absolute. A label is the class's name; classes are in the order in which
    /// they first appear. `split` is `train`, `val` or `test`.
    ///
    /// # Errors
    /// [`Error::Line`] with the line that is wrong.
    pub fn from_csv(path: &Path) -> Result<Self> {
        let bytes = std::fs::read(path).map_err(|e| Error::io(path, e))?;
        Self::build(path, csv::parse(&bytes, path)?, SplitOrigin::Column)
    }

    /// A split file as CoOp publishes them: keys `train`, `val` and `test`, each a list of `[relative path, label, class name]`.
    ///
    /// The images lie in `images/` beside the file, else in that folder beside it (or its own) which holds most of those listed.
    ///
    /// # Errors
    /// [`Error::Json`] for malformed files; [`Error::Dataset`] for contradictions and for paths that leave the folder.
    pub fn from_split_json(path: &Path) -> Result<Self> {
        let bytes = std::fs::read(path).map_err(|e| Error::io(path, e))?;
        Self::build(
            path,
            split_json::read(&bytes, path)?,
            SplitOrigin::SplitFile,
        )
    }

    fn build(path: &Path, listing: Listing, origin: SplitOrigin) -> Result<Self> {
        let Listing {
            files,
            classes,
            given,
            all,
            ignored,
        } = listing;
        let (lists, origin) = match given {
            Some(lists) => (lists, origin),
            None => (split_by_rule(&files, &all), SplitOrigin::Rule),
        };
        let missing = |&(i, file): &(usize, &(String, PathBuf))| (!file.1.is_file()).then_some(i);
        Ok(Self {
            path: path.to_path_buf(),
            missing: files
                .iter()
                .enumerate()
                .filter_map(|f| missing(&f))
                .collect(),
            images: Arc::new(DiskImages::new(files)),
            classes: Classes::new(classes).map_err(|e| Error::dataset(path, e.to_string()))?,
            train: lists.train,
            val: lists.val,
            test: lists.test,
            origin,
            ignored,
            skipped: 0,
        })
    }

    /// The folder or file that was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// All image files, as the lists number them.
    pub fn images(&self) -> &Arc<DiskImages> {
        &self.images
    }

    /// Class names in the order of their labels.
    pub fn classes(&self) -> &Classes {
        &self.classes
    }

    /// Where the lists come from.
    pub fn origin(&self) -> SplitOrigin {
        self.origin
    }

    /// Files that are no JPEG or PNG, counted by extension.
    pub fn ignored(&self) -> &BTreeMap<String, usize> {
        &self.ignored
    }

    /// Images that [`Dataset::without`] has dropped.
    pub fn skipped(&self) -> usize {
        self.skipped
    }

    /// Images of each class, in the order of the labels.
    pub fn counts(&self) -> Vec<ClassCounts> {
        let mut counts = vec![ClassCounts::default(); self.classes.len()];
        let mut add = |items: &[Item], field: fn(&mut ClassCounts) -> &mut usize| {
            for &(_, label) in items {
                if let Some(class) = counts.get_mut(label as usize) {
                    *field(class) += 1;
                }
            }
        };
        add(&self.train, |c| &mut c.train);
        add(&self.val, |c| &mut c.val);
        add(&self.test, |c| &mut c.test);
        counts
    }

    /// All images to learn from.
    ///
    /// # Errors
    /// [`Error::Image`] if a file is missing.
    pub fn train(&self) -> Result<Split<Train>> {
        self.split(self.train.clone())
    }

    /// All images to choose by; may be empty.
    ///
    /// # Errors
    /// [`Error::Image`] if a file is missing.
    pub fn val(&self) -> Result<Split<Val>> {
        self.split(self.val.clone())
    }

    /// The images that only the final measurement sees; may be empty.
    ///
    /// # Errors
    /// [`Error::Image`] if a file is missing.
    pub fn test(&self) -> Result<Split<Test>> {
        self.split(self.test.clone())
    }

    /// Every image as test data: labelled pictures on which something is measured and from which nothing is learned.
    ///
    /// # Errors
    /// [`Error::Dataset`] if the data say themselves what is test data; [`Error::Image`] if a file is missing.
    pub fn all_as_test(&self) -> Result<Split<Test>> {
        if self.origin.is_given() {
            let message = format!("the split is {}; measure on its test images", self.origin);
            return Err(Error::dataset(&self.path, message));
        }
        let mut all: Vec<Item> = self.items().collect();
        all.sort_unstable();
        self.split(all)
    }

    /// Decodes every listed image and returns those that cannot be used, missing ones among them.
    ///
    /// `progress` is told `(done, total)`, from several threads.
    pub fn check_images(&self, progress: &(dyn Fn(usize, usize) + Sync)) -> Vec<BadImage> {
        let items: Vec<usize> = self.items().map(|(item, _)| item).collect();
        self.images
            .check(&items, &|done| progress(done, items.len()))
    }

    /// The data set without `bad`; other images keep their numbers and stay in their lists.
    ///
    /// # Errors
    /// [`Error::Dataset`] if a class that had training images has none left.
    pub fn without(&self, bad: &[BadImage]) -> Result<Self> {
        let bad: HashSet<usize> = bad.iter().map(|b| b.item).collect();
        let keep = |items: &[Item]| -> Vec<Item> {
            let good = |(item, _): &&Item| !bad.contains(item);
            items.iter().filter(good).copied().collect()
        };
        let mut kept = self.clone();
        kept.train = keep(&self.train);
        kept.val = keep(&self.val);
        kept.test = keep(&self.test);
        kept.missing.retain(|item| !bad.contains(item));
        kept.skipped += self.items().count() - kept.items().count();
        for (label, (before, after)) in self.counts().iter().zip(kept.counts()).enumerate() {
            if before.train > 0 && after.train == 0 {
                let message = format!(
                    "none of the {} training images of class `{}` can be read",
                    before.train,
                    self.class_name(label as u32)
                );
                return Err(Error::dataset(&self.path, message));
            }
        }
        Ok(kept)
    }

    /// Hash of the lists: names, labels and class names in order, not what the files hold.
    pub fn fingerprint(&self) -> String {
        let mut hasher = blake3::Hasher::new();
        let mut add = |text: &str| {
            hasher.update(&(text.len() as u64).to_le_bytes());
            hasher.update(text.as_bytes());
        };
        for name in self.classes.names() {
            add(name);
        }
        for (role, items) in self.lists() {
            add(role);
            for &(item, label) in items {
                add(&self.images.name(item));
                add(&label.to_string());
            }
        }
        hasher.finalize().to_hex().to_string()
    }

    pub(crate) fn lists(&self) -> [(&'static str, &[Item]); 3] {
        [
            (Train::NAME, &self.train),
            (Val::NAME, &self.val),
            (Test::NAME, &self.test),
        ]
    }

    pub(crate) fn class_name(&self, label: u32) -> &str {
        let names = self.classes.names();
        names.get(label as usize).map_or("", String::as_str)
    }

    /// `items` of this data set as a split, unless one of its files is missing.
    pub(crate) fn split<R: Role>(&self, items: Vec<Item>) -> Result<Split<R>> {
        if !self.missing.is_empty() {
            let missing: HashSet<usize> = self.missing.iter().copied().collect();
            let mut gone = items.iter().filter(|(item, _)| missing.contains(item));
            if let Some(&(item, _)) = gone.next() {
                let path = self.images.path(item).unwrap_or(&self.path);
                let reason = match gone.count() {
                    0 => "the file is missing".to_owned(),
                    more => format!(
                        "the file is missing, and so are {more} more of the {} split",
                        R::NAME
                    ),
                };
                return Err(Error::image(path, reason));
            }
        }
        Ok(Split::new(self.images.clone(), items)?)
    }

    fn items(&self) -> impl Iterator<Item = Item> + '_ {
        self.lists()
            .into_iter()
            .flat_map(|(_, items)| items.iter().copied())
    }
}

/// See [`SplitOrigin::Rule`]. Lists are in the order of `all`.
fn split_by_rule(files: &[(String, PathBuf)], all: &[Item]) -> Lists {
    let mut classes: BTreeMap<u32, Vec<(blake3::Hash, usize)>> = BTreeMap::new();
    for (position, &(item, label)) in all.iter().enumerate() {
        let name = files.get(item).map_or("", |(name, _)| name);
        let hash = blake3::hash(name.as_bytes());
        classes.entry(label).or_default().push((hash, position));
    }
    let mut place: HashMap<usize, &'static str> = HashMap::new();
    for order in classes.values_mut() {
        order.sort_unstable_by(|a, b| a.0.as_bytes().cmp(b.0.as_bytes()));
        let (train, val) = (order.len().div_ceil(2), order.len() / 5);
        for (rank, &(_, position)) in order.iter().enumerate() {
            let role = match rank {
                r if r < train => Train::NAME,
                r if r < train + val => Val::NAME,
                _ => Test::NAME,
            };
            place.insert(position, role);
        }
    }
    let mut lists = Lists::default();
    for (position, &item) in all.iter().enumerate() {
        match place.get(&position).copied() {
            Some(Train::NAME) => lists.train.push(item),
            Some(Val::NAME) => lists.val.push(item),
            _ => lists.test.push(item),
        }
    }
    lists
}

#[cfg(test)]
pub(crate) mod tests;
