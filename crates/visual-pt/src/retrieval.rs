//! Labelled image features to look up: the nearest of them, and what they say of a label.

use std::collections::BTreeMap;

use candle_core::{DType, Device, Tensor};
use cliptune_core::task::{Role, Split};
use cliptune_core::train::EVALUATION_BATCH;
use cliptune_core::{Clip, Error, ImageNeeds, Result, Run, View, ops};

/// Name of the keys in a prompt file.
const KEYS: &str = "db_keys";
/// Name of the labels in a prompt file.
const LABELS: &str = "db_labels";

/// How far a key's length may be from 1.
const ROUNDING: f32 = 1e-3;

/// Labelled image features of unit length.
#[derive(Clone, Debug)]
pub struct Database {
    /// Width of a feature.
    width: usize,
    keys: Vec<Vec<f32>>,
    labels: Vec<u32>,
    /// Which image of the training source an entry is, where it is one: what training leaves out of that image's own search.
    items: Vec<Option<usize>>,
}

/// An entry that was found, and its weight among the found.
pub type Neighbour = (usize, f32);

impl Database {
    /// Entries from `keys (n, embed_dim)` of unit length, none of which is a training image.
    ///
    /// # Errors
    /// [`Error::Data`] if there is no entry, a key is not of unit length, or the numbers of keys and labels differ.
    pub fn new(keys: &Tensor, labels: Vec<u32>) -> Result<Self> {
        let (n, width) = keys.dims2()?;
        if n == 0 {
            return Err(Error::Data(
                "the retrieval database is empty; give it labelled images".into(),
            ));
        }
        if n != labels.len() {
            let message = format!(
                "{n} keys of a retrieval database for {} labels",
                labels.len()
            );
            return Err(Error::Data(message));
        }
        let keys = keys.to_dtype(DType::F32)?.to_vec2::<f32>()?;
        for (entry, key) in keys.iter().enumerate() {
            let length = dot(key, key).sqrt();
            if !(1.0 - ROUNDING..=1.0 + ROUNDING).contains(&length) {
                return Err(Error::Data(format!(
                    "key {entry} of the retrieval database has length {length}, expected 1: features are scaled to unit length before they are kept"
                )));
            }
        }
        Ok(Self {
            width,
            keys,
            labels,
            items: vec![None; n],
        })
    }

    /// The images of a split, each once: features of the frozen tower, the mean over `passes` random crops, or with 0 passes
    /// those of the fixed view.
    ///
    /// # Errors
    /// As [`Split::images`]; [`Error::Cancelled`].
    pub fn of_split<R: Role>(
        clip: &Clip,
        split: &Split<R>,
        passes: usize,
        run: &mut Run,
    ) -> Result<Self> {
        let views: Vec<View> = match passes {
            0 => vec![View::Fixed],
            _ => (0..passes)
                .map(|draw| View::Random {
                    seed: run.seed,
                    draw,
                })
                .collect(),
        };
        let mut sum = None;
        let total = (split.len() * views.len()) as u64;
        run.progress.start("encoding images", 0, total);
        for (pass, view) in views.iter().enumerate() {
            let features = features(clip, split, *view, |done| {
                run.progress.advanced((pass * split.len() + done) as u64);
                run.check_cancelled()
            })?;
            sum = Some(match sum {
                None => features,
                Some(sum) => (sum + features)?,
            });
        }
        run.progress.finish();
        let empty = || Error::Data("the retrieval database is empty".into());
        let keys = ops::unit_length(&sum.ok_or_else(empty)?, "a key of the database")?;
        let mut database = Self::new(&keys, split.labels().collect())?;
        let items = split.items().iter().map(|&(item, _)| Some(item));
        database.items = items.collect();
        Ok(database)
    }

    /// With the entries of another database of the same classes behind its own: external images.
    ///
    /// # Errors
    /// [`Error::Data`] if the features are of another width.
    pub fn joined(mut self, other: &Self) -> Result<Self> {
        if other.width != self.width {
            let message = format!(
                "a retrieval database of width {} cannot take one of width {}; encode both with the same weights",
                self.width, other.width
            );
            return Err(Error::Data(message));
        }
        self.keys.extend(other.keys.iter().cloned());
        self.labels.extend(&other.labels);
        // They are no training images, whatever they were called in their own source.
        self.items.extend(vec![None; other.len()]);
        Ok(self)
    }

    /// Number of entries.
    pub fn len(&self) -> usize {
        self.keys.len()
    }

    /// Never true.
    pub fn is_empty(&self) -> bool {
        self.keys.is_empty()
    }

    /// Label of an entry.
    pub fn label(&self, entry: usize) -> u32 {
        self.labels[entry]
    }

    /// Unit feature of an entry.
    pub fn key(&self, entry: usize) -> &[f32] {
        &self.keys[entry]
    }

    /// Refuses features of another width and labels without a name.
    ///
    /// # Errors
    /// [`Error::Data`].
    pub fn check(&self, width: usize, n_cls: usize) -> Result<()> {
        if self.width != width {
            let message = format!(
                "the retrieval database holds features of width {}, the weights give {width}; build it with these weights",
                self.width
            );
            return Err(Error::Data(message));
        }
        match self.labels.iter().find(|&&label| label as usize >= n_cls) {
            None => Ok(()),
            Some(label) => Err(Error::Data(format!(
                "label {label} of the retrieval database has no name, there are {n_cls} classes"
            ))),
        }
    }

    /// How many entries any of its training images can find when its own are left out.
    pub fn available(&self) -> usize {
        let mut own = BTreeMap::<usize, usize>::new();
        for item in self.items.iter().flatten() {
            *own.entry(*item).or_default() += 1;
        }
        self.len() - own.values().max().copied().unwrap_or(0)
    }

    /// The `k` entries nearest to a unit feature, nearest first, without those of the training image `own`; their weights are
    /// the softmax of cosine / `tau`.
    ///
    /// Of entries equally near those of lower labels come first, whatever their order in the database.
    ///
    /// # Errors
    /// [`Error::Config`] if there are fewer.
    pub fn nearest(
        &self,
        query: &[f32],
        (k, tau): (usize, f64),
        own: Option<usize>,
    ) -> Result<Vec<Neighbour>> {
        let found = (0..self.len()).filter(|&entry| own.is_none() || self.items[entry] != own);
        let mut found: Vec<Neighbour> = found
            .map(|entry| (entry, dot(query, &self.keys[entry])))
            .collect();
        check_k(k, found.len())?;
        found.sort_by(|(a, near_a), (b, near_b)| {
            let by_label = self.labels[*a].cmp(&self.labels[*b]);
            near_b.total_cmp(near_a).then(by_label)
        });
        found.truncate(k);
        let nearest = f64::from(found[0].1);
        let weight = |near: f32| ((f64::from(near) - nearest) / tau).exp();
        let total: f64 = found.iter().map(|(_, near)| weight(*near)).sum();
        for (_, near) in &mut found {
            *near = (weight(*near) / total) as f32;
        }
        Ok(found)
    }

    /// The weight of each label among neighbours: their probabilities, `n_cls` of them.
    pub fn votes(&self, neighbours: &[Neighbour], n_cls: usize) -> Vec<f32> {
        let mut votes = vec![0.0; n_cls];
        for (entry, weight) in neighbours {
            votes[self.labels[*entry] as usize] += weight;
        }
        votes
    }

    /// Keys and labels under their names in a prompt file.
    ///
    /// # Errors
    /// Whatever the tensor library refuses.
    pub fn tensors(&self) -> Result<Vec<(String, Tensor)>> {
        let shape = (self.len(), self.width);
        let keys = Tensor::from_vec(self.keys.concat(), shape, &Device::Cpu)?;
        let labels: Vec<i64> = self.labels.iter().map(|&label| label.into()).collect();
        let labels = Tensor::new(labels, &Device::Cpu)?;
        Ok(vec![(KEYS.into(), keys), (LABELS.into(), labels)])
    }

    /// From what [`Database::tensors`] gave.
    ///
    /// # Errors
    /// [`Error::Prompt`] if a tensor is missing; as [`Database::new`].
    pub fn of_tensors(tensors: &BTreeMap<String, Tensor>) -> Result<Self> {
        let named = |name: &str| {
            let missing = || Error::Prompt(format!("the prompt holds no `{name}`"));
            tensors.get(name).ok_or_else(missing)
        };
        let labels = named(LABELS)?.to_dtype(DType::U32)?.to_vec1()?;
        Self::new(named(KEYS)?, labels)
    }
}

/// Refuses a number of neighbours that is none or more than there are.
///
/// # Errors
/// [`Error::Config`].
pub(crate) fn check_k(k: usize, available: usize) -> Result<()> {
    match (1..=available).contains(&k) {
        true => Ok(()),
        false => Err(Error::config(
            "k",
            k,
            format!(
                "at least 1, and only {available} neighbours available; lower it, or add images"
            ),
        )),
    }
}

/// Raw features of all images of a split in one view, `(n, embed_dim)`; `tell` hears how many are done.
pub(crate) fn features<R: Role>(
    clip: &Clip,
    split: &Split<R>,
    view: View,
    mut tell: impl FnMut(usize) -> Result<()>,
) -> Result<Tensor> {
    let positions: Vec<usize> = (0..split.len()).collect();
    let mut features = Vec::new();
    for positions in positions.chunks(EVALUATION_BATCH) {
        let images = split.images(clip, positions, ImageNeeds::GlobalFeatures, view)?;
        features.push(images.features()?.detach());
        tell(positions[0] + positions.len())?;
    }
    Ok(Tensor::cat(&features, 0)?)
}

/// In f64 and always in the same order: what is nearest does not depend on what else is looked up.
fn dot(a: &[f32], b: &[f32]) -> f32 {
    let products = a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b));
    products.sum::<f64>() as f32
}
