//! Few-shot draws as the papers make them, and base and new classes.

use std::path::Path;
use std::sync::Arc;

use cliptune_core::task::Test;
use cliptune_core::{Classes, ImageSource, Labelled, Split, files};
use serde::{Deserialize, Serialize};

use crate::dataset::Item;
use crate::{Dataset, Error, PythonRandom, Result};

/// Images per class to choose by, at most (CoOp).
const MAX_VAL_SHOTS: usize = 4;

/// Which classes a run is about.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ClassSubset {
    /// Every class.
    #[default]
    All,
    /// The first half of the labels, rounded up.
    Base,
    /// The others.
    New,
}

impl ClassSubset {
    /// The labels of `n` that belong to the subset.
    pub fn labels(self, n: usize) -> std::ops::Range<usize> {
        let half = n.div_ceil(2);
        match self {
            Self::All => 0..n,
            Self::Base => 0..half,
            Self::New => half..n,
        }
    }
}

/// A class with fewer training images than shots were asked for; all of them are taken, none twice.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shortage {
    /// The class's name.
    pub class: String,
    /// Images it has.
    pub has: usize,
}

/// What a few-shot run learns from, and what it is measured on.
#[derive(Clone, Debug)]
pub struct FewShot {
    /// Images to learn from and to choose by.
    pub labelled: Labelled,
    /// Images that only the final measurement sees; empty if the data set has none.
    pub test: Split<Test>,
    /// Classes with fewer training images than shots.
    pub shortages: Vec<Shortage>,
}

impl Dataset {
    /// Draws `shots` training images per class, and up to four to choose by, exactly as Dassl does after `random.seed(seed)`.
    ///
    /// Classes are drawn in the order of their first image in the list, train before val, in one random stream. `shots = 0` takes
    /// every image. The test images are never drawn from.
    ///
    /// # Errors
    /// [`Error::Image`] if a file is missing.
    pub fn few_shot(&self, shots: usize, seed: u64) -> Result<FewShot> {
        let (train, val) = self.drawn(shots, seed);
        self.taken(shots, train, val)
    }

    fn drawn(&self, shots: usize, seed: u64) -> (Vec<Item>, Vec<Item>) {
        let [(_, train), (_, val), _] = self.lists();
        if shots == 0 {
            return (train.to_vec(), val.to_vec());
        }
        let mut random = PythonRandom::new(seed);
        let train = draw(train, shots, &mut random);
        (train, draw(val, shots.min(MAX_VAL_SHOTS), &mut random))
    }

    fn taken(&self, shots: usize, train: Vec<Item>, val: Vec<Item>) -> Result<FewShot> {
        let shortage = |(label, counts): (usize, crate::ClassCounts)| {
            (counts.train < shots.max(1)).then(|| Shortage {
                class: self.class_name(label as u32).to_owned(),
                has: counts.train,
            })
        };
        let val = if val.is_empty() {
            None
        } else {
            Some(self.split(val)?)
        };
        Ok(FewShot {
            labelled: Labelled {
                train: self.split(train)?,
                val,
                classes: self.classes().clone(),
            },
            test: self.test()?,
            shortages: self
                .counts()
                .into_iter()
                .enumerate()
                .filter_map(shortage)
                .collect(),
        })
    }

    /// The images that [`Dataset::few_shot`] would draw, as a record that can be written and published.
    pub fn draw(&self, shots: usize, seed: u64) -> Draw {
        let (train, val) = self.drawn(shots, seed);
        let named = |items: Vec<Item>| {
            let name = |(item, label): Item| {
                let class = self.class_name(label).to_owned();
                (self.images().name(item), label, class)
            };
            items.into_iter().map(name).collect()
        };
        Draw {
            format: FORMAT.to_owned(),
            seed,
            shots,
            dataset: self.fingerprint(),
            train: named(train),
            val: named(val),
        }
    }

    /// The images of a recorded draw.
    ///
    /// # Errors
    /// [`Error::Dataset`] if the draw was made from other lists; [`Error::Image`] if a file is missing.
    pub fn recorded(&self, draw: &Draw) -> Result<FewShot> {
        if draw.dataset != self.fingerprint() {
            let message = format!(
                "the draw was made from lists with the hash {}, these have {}; draw anew",
                draw.dataset,
                self.fingerprint()
            );
            return Err(Error::dataset(self.path(), message));
        }
        let [(_, train), (_, val), _] = self.lists();
        let find = |entries: &[DrawnImage], items: &[Item]| -> Result<Vec<Item>> {
            let by_name: std::collections::HashMap<String, Item> = items
                .iter()
                .map(|&(item, label)| (self.images().name(item), (item, label)))
                .collect();
            let find = |(name, label, _): &DrawnImage| match by_name.get(name) {
                Some(&item) if item.1 == *label => Ok(item),
                _ => Err(Error::dataset(
                    self.path(),
                    format!(
                        "the draw names `{name}` with label {label}, which is not in the list it was drawn from"
                    ),
                )),
            };
            entries.iter().map(find).collect()
        };
        self.taken(draw.shots, find(&draw.train, train)?, find(&draw.val, val)?)
    }
}

/// Takes `shots` of each class, or all it has.
fn draw(items: &[Item], shots: usize, random: &mut PythonRandom) -> Vec<Item> {
    let mut groups: Vec<Vec<Item>> = Vec::new();
    let mut group_of = std::collections::HashMap::new();
    for &item in items {
        let group = *group_of.entry(item.1).or_insert_with(|| {
            groups.push(Vec::new());
            groups.len() - 1
        });
        if let Some(group) = groups.get_mut(group) {
            group.push(item);
        }
    }
    let mut drawn = Vec::new();
    for group in groups {
        if group.len() >= shots {
            let chosen = random.sample(group.len(), shots);
            drawn.extend(chosen.into_iter().filter_map(|i| group.get(i)));
        } else {
            drawn.extend(group);
        }
    }
    drawn
}

impl FewShot {
    /// The same draw with the images of `subset` only, their labels counted from 0.
    ///
    /// Halves are formed after the draw, so base classes have the images that they have in the run over all classes.
    ///
    /// # Errors
    /// [`Error::Core`] if a class has no training image (its place among the labels would be lost) or the subset has no class.
    pub fn subset(&self, subset: ClassSubset) -> Result<Self> {
        let Labelled {
            train,
            val,
            classes,
        } = &self.labelled;
        if subset == ClassSubset::All {
            return Ok(self.clone());
        }
        let refuse = |message: String| Error::Core(cliptune_core::Error::Data(message));
        let mut counts = vec![0usize; classes.len()];
        for label in train.labels() {
            if let Some(count) = counts.get_mut(label as usize) {
                *count += 1;
            }
        }
        // Sets that are only measured on have no training image at all.
        let empty = counts
            .iter()
            .zip(classes.names())
            .find(|(count, _)| **count == 0);
        if let (false, Some((_, name))) = (train.is_empty(), empty) {
            return Err(refuse(format!(
                "class `{name}` has no training image, so base and new classes cannot be told apart; add images or remove the class"
            )));
        }
        let labels = subset.labels(classes.len());
        let names: Vec<String> = classes.names().get(labels.clone()).unwrap_or(&[]).to_vec();
        if names.is_empty() {
            return Err(refuse(format!(
                "{} class gives no new classes",
                classes.len()
            )));
        }
        let kept = |items: &[Item]| -> Vec<Item> {
            let inside = |&(item, label): &Item| {
                labels
                    .contains(&(label as usize))
                    .then(|| (item, label - labels.start as u32))
            };
            items.iter().filter_map(inside).collect()
        };
        let val = val
            .as_ref()
            .map(|val| Split::new(val.source().clone(), kept(val.items())));
        let has = |shortage: &&Shortage| names.contains(&shortage.class);
        Ok(Self {
            labelled: Labelled {
                train: Split::new(train.source().clone(), kept(train.items()))?,
                val: val.transpose()?,
                classes: Classes::new(names.clone())?,
            },
            test: Split::new(self.test.source().clone(), kept(self.test.items()))?,
            shortages: self.shortages.iter().filter(has).cloned().collect(),
        })
    }

    /// The same images from another source of them, such as a cache.
    pub fn with_source(&self, source: &Arc<dyn ImageSource>) -> Self {
        let Labelled {
            train,
            val,
            classes,
        } = &self.labelled;
        Self {
            labelled: Labelled {
                train: train.with_source(source.clone()),
                val: val.as_ref().map(|val| val.with_source(source.clone())),
                classes: classes.clone(),
            },
            test: self.test.with_source(source.clone()),
            shortages: self.shortages.clone(),
        }
    }
}

/// Name, label and class name, as in CoOp's split files.
pub type DrawnImage = (String, u32, String);

const FORMAT: &str = "cliptune few-shot draw 1";

/// A few-shot draw as a file: plain JSON with a checksum.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Draw {
    format: String,
    /// The seed it was drawn with.
    pub seed: u64,
    /// Images per class asked for; 0 for all.
    pub shots: usize,
    /// [`Dataset::fingerprint`] of the data set it was drawn from.
    pub dataset: String,
    /// Images to learn from, in the order drawn.
    pub train: Vec<DrawnImage>,
    /// Images to choose by, in the order drawn.
    pub val: Vec<DrawnImage>,
}

#[derive(Serialize, Deserialize)]
struct DrawFile {
    /// BLAKE3 of the draw as compact JSON.
    checksum: String,
    draw: Draw,
}

impl Draw {
    fn checksum(&self) -> serde_json::Result<String> {
        Ok(blake3::hash(&serde_json::to_vec(self)?)
            .to_hex()
            .to_string())
    }

    /// Writes the draw; an existing file is replaced.
    ///
    /// # Errors
    /// [`Error::Core`] naming the file.
    pub fn write(&self, path: &Path) -> Result<()> {
        let encode = || -> serde_json::Result<Vec<u8>> {
            let file = DrawFile {
                checksum: self.checksum()?,
                draw: self.clone(),
            };
            serde_json::to_vec_pretty(&file)
        };
        let mut text = encode().map_err(|e| Error::json(path, &e))?;
        text.push(b'\n');
        Ok(files::write_atomically(path, |w| w.write_all(&text))?)
    }

    /// Reads a draw and verifies its checksum.
    ///
    /// # Errors
    /// [`Error::Json`] for a malformed file, [`Error::Dataset`] for one that was changed.
    pub fn read(path: &Path) -> Result<Self> {
        let bytes = std::fs::read(path).map_err(|e| Error::io(path, e))?;
        Self::parse(&bytes, path)
    }

    fn parse(bytes: &[u8], path: &Path) -> Result<Self> {
        let file: DrawFile = serde_json::from_slice(bytes).map_err(|e| Error::json(path, &e))?;
        if file.draw.format != FORMAT {
            let message = format!("format `{}`, expected `{FORMAT}`", file.draw.format);
            return Err(Error::dataset(path, message));
        }
        let checksum = file.draw.checksum().map_err(|e| Error::json(path, &e))?;
        if checksum != file.checksum {
            let message = format!(
                "the checksum is {}, the content gives {checksum}; the file was changed after it was written",
                file.checksum
            );
            return Err(Error::dataset(path, message));
        }
        Ok(file.draw)
    }
}
