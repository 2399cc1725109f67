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

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use proptest::prelude::*;

    use super::*;
    use crate::dataset::tests::damaged;
    use crate::testing::{TestResult, write_picture, write_text};

    /// Three classes with 40, 3 and 25 training images, listed in the order 2, 0, 1.
    fn example(root: &Path) -> Dataset {
        let mut rows = String::from("path,label,split\n");
        write_picture(&root.join("x.png"), 1, (4, 4));
        for (class, train, val, test) in [("c", 25, 6, 2), ("a", 40, 5, 2), ("b", 3, 1, 1)] {
            for (split, n) in [("train", train), ("val", val), ("test", test)] {
                for i in 0..n {
                    let name = format!("{class}-{split}-{i}.png");
                    std::fs::hard_link(root.join("x.png"), root.join(&name)).unwrap();
                    rows.push_str(&format!("{name},{class},{split}\n"));
                }
            }
        }
        let file = root.join("list.csv");
        write_text(&file, &rows);
        Dataset::open(&file).unwrap()
    }

    fn numbers<R: cliptune_core::task::Role>(split: &Split<R>, class: &str) -> Vec<usize> {
        let name = |position| split.name(position);
        let of_class = (0..split.len())
            .map(name)
            .filter(|name| name.starts_with(class));
        of_class
            .map(|name| {
                name.rsplit('-')
                    .next()
                    .unwrap()
                    .trim_end_matches(".png")
                    .parse()
                    .unwrap()
            })
            .collect()
    }

    #[test]
    fn draws_are_dassls() -> TestResult {
        let dir = tempfile::tempdir()?;
        let set = example(dir.path());
        let drawn = set.few_shot(16, 1)?;
        // By the rule, with the generator alone: c (25), a (40), b (3: all), then val with 4 in the same stream.
        let mut random = PythonRandom::new(1);
        let train = &drawn.labelled.train;
        assert_eq!(numbers(train, "c"), random.sample(25, 16));
        assert_eq!(numbers(train, "a"), random.sample(40, 16));
        assert_eq!(numbers(train, "b"), [0, 1, 2]);
        let val = drawn.labelled.val.as_ref().unwrap();
        assert_eq!(numbers(val, "c"), random.sample(6, 4));
        assert_eq!(numbers(val, "a"), random.sample(5, 4));
        assert_eq!(numbers(val, "b"), [0]);
        assert_eq!(
            train.labels().collect::<Vec<_>>(),
            [vec![0; 16], vec![1; 16], vec![2; 3]].concat()
        );
        let short = Shortage {
            class: "b".into(),
            has: 3,
        };
        assert_eq!(drawn.shortages, [short]);
        assert_eq!(drawn.test.len(), 5);
        assert_eq!(drawn.labelled.shots(), 16);
        drawn.labelled.check()?;

        // Few shots lower the images to choose by.
        assert_eq!(set.few_shot(2, 1)?.labelled.val.unwrap().len(), 2 + 2 + 1);
        let all = set.few_shot(0, 1)?;
        assert_eq!(all.labelled.train.len(), 68);
        assert_eq!(all.labelled.val.unwrap().len(), 12);
        assert!(all.shortages.is_empty());
        Ok(())
    }

    /// What CPython draws with seed 1 from 25, 40 and (all of) 3 images.
    #[test]
    fn draws_are_cpythons() -> TestResult {
        let dir = tempfile::tempdir()?;
        let drawn = example(dir.path()).few_shot(16, 1)?;
        assert_eq!(numbers(&drawn.labelled.train, "c"), CPYTHON_C);
        assert_eq!(numbers(&drawn.labelled.train, "a"), CPYTHON_A);
        assert_eq!(numbers(&drawn.labelled.val.unwrap(), "a"), CPYTHON_VAL_A);
        Ok(())
    }

    const CPYTHON_C: [usize; 16] = [4, 18, 2, 8, 3, 15, 14, 19, 12, 6, 1, 7, 0, 17, 11, 9];
    const CPYTHON_A: [usize; 16] = [0, 28, 17, 14, 6, 20, 1, 33, 32, 34, 37, 39, 12, 21, 35, 13];
    const CPYTHON_VAL_A: [usize; 4] = [3, 1, 4, 0];

    #[test]
    fn base_and_new() -> TestResult {
        let dir = tempfile::tempdir()?;
        let drawn = example(dir.path()).few_shot(4, 2)?;
        assert_eq!(drawn.subset(ClassSubset::All)?.test.len(), 5);
        let base = drawn.subset(ClassSubset::Base)?;
        assert_eq!(base.labelled.classes.names(), ["c", "a"]);
        assert_eq!(
            base.labelled.train.items(),
            &drawn.labelled.train.items()[..8]
        );
        assert_eq!(base.test.items().len(), 4);
        assert!(base.shortages.is_empty());
        let new = drawn.subset(ClassSubset::New)?;
        assert_eq!(new.labelled.classes.names(), ["b"]);
        assert_eq!(new.labelled.train.labels().collect::<Vec<_>>(), [0, 0, 0]);
        assert_eq!(numbers(&new.test, "b"), [0]);
        assert_eq!(new.labelled.val.unwrap().len(), 1);
        assert_eq!(new.shortages.len(), 1);
        assert_eq!(ClassSubset::Base.labels(37), 0..19);
        assert_eq!(ClassSubset::New.labels(37), 19..37);
        Ok(())
    }

    #[test]
    fn a_class_without_training_images_stops_the_halving() -> TestResult {
        let dir = tempfile::tempdir()?;
        for name in ["train/a/1.png", "test/a/2.png", "test/b/3.png"] {
            write_picture(&dir.path().join(name), 1, (4, 4));
        }
        let drawn = Dataset::open(dir.path())?.few_shot(1, 1)?;
        assert_eq!(
            drawn.shortages,
            [Shortage {
                class: "b".into(),
                has: 0
            }]
        );
        let message = drawn.subset(ClassSubset::Base).unwrap_err().to_string();
        assert!(
            message.contains("class `b` has no training image"),
            "{message}"
        );
        Ok(())
    }

    #[test]
    fn draws_as_files() -> TestResult {
        let dir = tempfile::tempdir()?;
        let set = example(dir.path());
        let draw = set.draw(4, 3);
        let path = dir.path().join("draw.json");
        draw.write(&path)?;
        let back = Draw::read(&path)?;
        assert_eq!(back, draw);
        let (direct, read) = (set.few_shot(4, 3)?, set.recorded(&back)?);
        assert_eq!(direct.labelled.train.items(), read.labelled.train.items());
        assert_eq!(
            direct.labelled.val.unwrap().items(),
            read.labelled.val.unwrap().items()
        );
        assert_eq!(direct.shortages, read.shortages);

        let text = std::fs::read_to_string(&path)?;
        write_text(&path, &text.replacen("-train-1", "-train-2", 1));
        assert!(
            Draw::read(&path)
                .unwrap_err()
                .to_string()
                .contains("draw.json: the checksum is")
        );
        write_text(&path, &text.replacen("\"seed\": 3", "\"seed\": x", 1));
        assert!(
            Draw::read(&path)
                .unwrap_err()
                .to_string()
                .contains("draw.json, line ")
        );

        // Another list is another data set.
        let list = std::fs::read_to_string(dir.path().join("list.csv"))?;
        let shorter = dir.path().join("shorter.csv");
        write_text(&shorter, &list.replacen("c-test-0.png,c,test\n", "", 1));
        let message = Dataset::open(&shorter)?
            .recorded(&back)
            .unwrap_err()
            .to_string();
        assert!(message.contains("draw anew"), "{message}");
        Ok(())
    }

    const DRAW: &[u8] = br#"{"checksum":"","draw":{"format":"cliptune few-shot draw 1","seed":1,"shots":2,"dataset":"d","train":[["a",0,"x"]],"val":[]}}"#;

    #[test]
    fn the_example_fails_only_by_its_checksum() {
        let path = PathBuf::from("d.json");
        let message = Draw::parse(DRAW, &path).unwrap_err().to_string();
        assert!(message.contains("checksum"), "{message}");
    }

    proptest! {
        #[test]
        fn draw_files_never_panic(bytes in prop_oneof![prop::collection::vec(any::<u8>(), 0..200), damaged(DRAW)]) {
            prop_assert!(Draw::parse(&bytes, Path::new("d.json")).is_err());
        }
    }
}
