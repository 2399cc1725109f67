//! Several tasks learned as one: their classes follow one another in one list, and their images in one set.

use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::Arc;

use candle_core::{D, Device, Tensor};
use serde::{Deserialize, Serialize};

use crate::method::Predictor;
use crate::task::{Role, Train, Val};
use crate::train::EVALUATION_BATCH;
use crate::{
    Classes, Clip, Error, ImageBatch, ImageNeeds, ImageSource, Labelled, Preprocess, Result, Split,
    View,
};

/// A task among others.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TaskClasses {
    /// What it is called.
    pub name: String,
    /// How many classes it has.
    pub n_cls: usize,
}

/// Tasks whose classes follow one another in one list: the first task's from 0 on, and so forth. None means that all classes
/// are one task.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Tasks(Vec<TaskClasses>);

impl Tasks {
    /// Tasks in the order of their classes.
    ///
    /// # Errors
    /// As [`Tasks::check`].
    pub fn new(tasks: Vec<TaskClasses>) -> Result<Self> {
        let tasks = Self(tasks);
        tasks.check()?;
        Ok(tasks)
    }

    /// Refuses tasks without classes and names that occur twice.
    ///
    /// # Errors
    /// [`Error::Config`] naming the task.
    pub fn check(&self) -> Result<()> {
        let mut names = BTreeSet::new();
        for TaskClasses { name, n_cls } in &self.0 {
            if *n_cls == 0 {
                return Err(Error::config("tasks", name, "a task of at least one class"));
            }
            if !names.insert(name) {
                let expected = "a name that no other task has";
                return Err(Error::config("tasks", name, expected));
            }
        }
        Ok(())
    }

    /// Refuses a list of classes that is not as long as the tasks' together.
    ///
    /// # Errors
    /// [`Error::Data`] saying both numbers.
    pub fn check_classes(&self, classes: usize) -> Result<()> {
        if self.is_empty() || self.n_cls() == classes {
            return Ok(());
        }
        Err(Error::Data(format!(
            "the {} tasks have {} classes, the data {classes}; a task for every class is needed, in the order of the labels",
            self.len(),
            self.n_cls()
        )))
    }

    /// The tasks.
    pub fn list(&self) -> &[TaskClasses] {
        &self.0
    }

    /// Number of tasks.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether nothing is divided.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Classes of all tasks.
    pub fn n_cls(&self) -> usize {
        self.0.iter().map(|task| task.n_cls).sum()
    }

    /// Labels of every task: together they are `0..n_cls`.
    pub fn ranges(&self) -> Vec<Range<usize>> {
        let mut end = 0;
        let range = |task: &TaskClasses| {
            let start = end;
            end += task.n_cls;
            start..end
        };
        self.0.iter().map(range).collect()
    }

    /// The tasks that labels belong to.
    ///
    /// # Errors
    /// [`Error::Data`] if a label is not below [`Tasks::n_cls`].
    pub fn of_labels(&self, labels: &[u32]) -> Result<Vec<usize>> {
        let ranges = self.ranges();
        let of_label = |label: &u32| {
            let label = *label as usize;
            let task = ranges.iter().position(|range| range.contains(&label));
            task.ok_or_else(|| {
                Error::Data(format!(
                    "label {label} belongs to no task, they have {} classes",
                    self.n_cls()
                ))
            })
        };
        labels.iter().map(of_label).collect()
    }

    /// What is inside each image's own task, 1, and outside, 0: `(tasks.len(), n_cls)`.
    ///
    /// # Errors
    /// [`Error::Data`] if there is no such task.
    pub fn inside(&self, tasks: &[usize]) -> Result<Tensor> {
        let (ranges, n_cls) = (self.ranges(), self.n_cls());
        let mut inside = Vec::with_capacity(tasks.len() * n_cls);
        for task in tasks {
            let range = ranges.get(*task).ok_or_else(|| {
                Error::Data(format!(
                    "task {task} is not there, there are {}",
                    self.len()
                ))
            })?;
            inside.extend((0..n_cls).map(|label| f32::from(u8::from(range.contains(&label)))));
        }
        Ok(Tensor::from_vec(
            inside,
            (tasks.len(), n_cls),
            &Device::Cpu,
        )?)
    }

    /// Percent of right answers on each task of `split`, where an image may only be given a class of its own task; `None` for
    /// a task without images.
    ///
    /// # Errors
    /// As [`Predictor::classifier`] and [`Split::images`]; [`Error::Data`] if the classes are not the tasks'.
    pub fn accuracies<R: Role>(
        &self,
        predictor: &dyn Predictor,
        clip: &Clip,
        split: &Split<R>,
        classes: &Classes,
    ) -> Result<Vec<Option<f64>>> {
        self.check_classes(classes.len())?;
        let classifier = predictor.classifier(clip, classes)?;
        let labels: Vec<u32> = split.labels().collect();
        let of_image = self.of_labels(&labels)?;
        let accuracy = |(task, range): (usize, &Range<usize>)| -> Result<Option<f64>> {
            let own = |position: &usize| of_image[*position] == task;
            let positions: Vec<usize> = (0..split.len()).filter(own).collect();
            let mut correct = 0;
            for positions in positions.chunks(EVALUATION_BATCH) {
                let images = split.images(clip, positions, predictor.needs(), View::Fixed)?;
                let logits = classifier.logits(&images)?.detach();
                let own = logits.narrow(D::Minus1, range.start, range.len())?;
                let best = own.argmax(D::Minus1)?.to_vec1::<u32>()?;
                let right = |(best, position): &(u32, &usize)| {
                    *best as usize + range.start == labels[**position] as usize
                };
                correct += best.into_iter().zip(positions).filter(right).count();
            }
            let percent = 100.0 * correct as f64 / positions.len().max(1) as f64;
            Ok((!positions.is_empty()).then_some(percent))
        };
        self.ranges().iter().enumerate().map(accuracy).collect()
    }

    /// The plain mean of [`Tasks::accuracies`] over the tasks that have images.
    ///
    /// # Errors
    /// As [`Tasks::accuracies`].
    pub fn mean_accuracy<R: Role>(
        &self,
        predictor: &dyn Predictor,
        clip: &Clip,
        split: &Split<R>,
        classes: &Classes,
    ) -> Result<f64> {
        let found = self.accuracies(predictor, clip, split, classes)?;
        let found: Vec<f64> = found.into_iter().flatten().collect();
        Ok(found.iter().sum::<f64>() / found.len().max(1) as f64)
    }
}

/// The data of several tasks as one: a label counts the classes of all tasks before its own, too. Images to choose by come
/// from the tasks that have some.
///
/// # Errors
/// [`Error::Data`] if there is no task, or a task is not whole in itself; [`Error::Config`] for names that occur twice.
pub fn union(parts: &[(&str, &Labelled)]) -> Result<(Labelled, Tasks)> {
    if parts.is_empty() {
        return Err(Error::Data("there are no tasks to join".into()));
    }
    for (name, data) in parts {
        data.check()
            .map_err(|e| Error::Data(format!("task `{name}`: {e}")))?;
    }
    let of_part = |(name, data): &(&str, &Labelled)| TaskClasses {
        name: (*name).to_owned(),
        n_cls: data.classes.len(),
    };
    let tasks = Tasks::new(parts.iter().map(of_part).collect())?;
    let firsts: Vec<u32> = tasks.ranges().iter().map(|r| r.start as u32).collect();
    let names = parts
        .iter()
        .flat_map(|(_, data)| data.classes.names().to_vec());
    let train = parts.iter().map(|(_, data)| Some(&data.train));
    let val = parts.iter().map(|(_, data)| data.val.as_ref());
    let data = Labelled {
        train: joined::<Train>(train, &firsts)?,
        val: match parts.iter().any(|(_, data)| data.val.is_some()) {
            true => Some(joined::<Val>(val, &firsts)?),
            false => None,
        },
        classes: Classes::new(names.collect())?,
    };
    Ok((data, tasks))
}

/// Splits one after the other; the labels of each begin at its entry of `firsts`.
fn joined<'a, R: Role>(
    splits: impl Iterator<Item = Option<&'a Split<R>>>,
    firsts: &[u32],
) -> Result<Split<R>> {
    let (mut sources, mut items, mut end) = (Vec::new(), Vec::new(), 0);
    for (split, first) in splits.zip(firsts) {
        let Some(split) = split else { continue };
        let shifted = split.items().iter();
        items.extend(shifted.map(|(item, label)| (end + item, first + label)));
        end += split.source().len();
        sources.push(split.source().clone());
    }
    Split::new(Arc::new(Joined(sources)), items)
}

/// Sources one after the other.
#[derive(Debug)]
struct Joined(Vec<Arc<dyn ImageSource>>);

impl Joined {
    /// Which source an image comes from, and its number there.
    fn place(&self, index: usize) -> (usize, usize) {
        let mut item = index;
        for (source, images) in self.0.iter().enumerate() {
            if item < images.len() {
                return (source, item);
            }
            item -= images.len();
        }
        (self.0.len(), item)
    }

    /// For each source that `indices` names: the source, its items, and where in `indices` they stand.
    fn parts(&self, indices: &[usize]) -> Vec<(&dyn ImageSource, Vec<usize>, Vec<usize>)> {
        let mut parts: Vec<_> = self
            .0
            .iter()
            .map(|source| (source.as_ref(), Vec::new(), Vec::new()))
            .collect();
        for (position, index) in indices.iter().enumerate() {
            let (source, item) = self.place(*index);
            if let Some((_, items, positions)) = parts.get_mut(source) {
                items.push(item);
                positions.push(position);
            }
        }
        parts.retain(|(_, items, _)| !items.is_empty());
        parts
    }
}

/// Rows of several parts in one tensor, each at its own place.
fn gather(parts: &[Tensor], places: &[Vec<usize>]) -> Result<Tensor> {
    let rows = Tensor::cat(parts, 0)?;
    let mut order = vec![0u32; rows.dim(0)?];
    for (row, place) in places.iter().flatten().enumerate() {
        order[*place] = row as u32;
    }
    let order = Tensor::new(order, rows.device())?;
    Ok(rows.index_select(&order, 0)?)
}

impl ImageSource for Joined {
    fn len(&self) -> usize {
        self.0.iter().map(|source| source.len()).sum()
    }

    fn name(&self, index: usize) -> String {
        let (source, item) = self.place(index);
        match self.0.get(source) {
            Some(source) => source.name(item),
            None => format!("image {index}"),
        }
    }

    fn fingerprint(&self, indices: &[usize]) -> Result<String> {
        let mut hasher = blake3::Hasher::new();
        for index in indices {
            let (source, _) = self.place(*index);
            hasher.update(&(source as u64).to_le_bytes());
        }
        for (source, items, _) in self.parts(indices) {
            hasher.update(source.fingerprint(&items)?.as_bytes());
        }
        Ok(hasher.finalize().to_hex().to_string())
    }

    fn pixels(&self, indices: &[usize], preprocess: &Preprocess, view: View) -> Result<Tensor> {
        let (mut tensors, mut places) = (Vec::new(), Vec::new());
        for (source, items, positions) in self.parts(indices) {
            tensors.push(source.pixels(&items, preprocess, view)?);
            places.push(positions);
        }
        gather(&tensors, &places)
    }

    fn images(
        &self,
        clip: &Clip,
        indices: &[usize],
        needs: ImageNeeds,
        view: View,
    ) -> Result<ImageBatch> {
        let (mut tensors, mut places) = (Vec::new(), Vec::new());
        for (source, items, positions) in self.parts(indices) {
            let images = source.images(clip, &items, needs, view)?;
            tensors.push(match needs {
                ImageNeeds::GlobalFeatures => images.features()?.clone(),
                ImageNeeds::LocalFeatures => images.local_features()?.clone(),
                ImageNeeds::Pixels => images.pixels()?.clone(),
            });
            places.push(positions);
        }
        let rows = gather(&tensors, &places)?;
        match needs {
            ImageNeeds::GlobalFeatures => Ok(ImageBatch::of_features(rows)),
            ImageNeeds::LocalFeatures => ImageBatch::of_local_features(rows),
            ImageNeeds::Pixels => Ok(ImageBatch::of_pixels(rows)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::task::MemoryImages;

    fn part(first: f32, classes: &[&str], labels: &[u32]) -> Result<Labelled> {
        let n = labels.len();
        let pixels = Tensor::arange(first, first + n as f32, &Device::Cpu)?;
        let source = Arc::new(MemoryImages::new(pixels.reshape((n, 1, 1, 1))?));
        let items = labels.iter().copied().enumerate().collect();
        Ok(Labelled {
            train: Split::new(source, items)?,
            val: None,
            classes: Classes::new(classes.iter().map(|c| (*c).to_owned()).collect())?,
        })
    }

    fn named(tasks: &[(&str, usize)]) -> Result<Tasks> {
        let task = |(name, n_cls): &(&str, usize)| TaskClasses {
            name: (*name).to_owned(),
            n_cls: *n_cls,
        };
        Tasks::new(tasks.iter().map(task).collect())
    }

    #[test]
    fn ranges_tile_the_classes() -> Result<()> {
        let tasks = named(&[("pets", 4), ("land", 3), ("textures", 2)])?;
        assert_eq!(tasks.ranges(), [0..4, 4..7, 7..9]);
        assert_eq!(tasks.n_cls(), 9);
        assert_eq!(tasks.of_labels(&[8, 0, 4, 3])?, [2, 0, 1, 0]);
        assert!(tasks.of_labels(&[9]).is_err());
        let swapped = named(&[("textures", 2), ("land", 3), ("pets", 4)])?;
        assert_eq!(swapped.ranges(), [0..2, 2..5, 5..9]);
        let inside = tasks.inside(&[1, 2])?.to_vec2::<f32>()?;
        assert_eq!(inside[0], [0., 0., 0., 0., 1., 1., 1., 0., 0.]);
        assert_eq!(inside[1], [0., 0., 0., 0., 0., 0., 0., 1., 1.]);
        assert!(tasks.inside(&[3]).is_err());
        assert!(tasks.check_classes(9).is_ok() && Tasks::default().check_classes(5).is_ok());
        let told = tasks.check_classes(8).unwrap_err().to_string();
        assert!(told.contains("9 classes, the data 8"), "{told}");
        for bad in [&[("pets", 0)][..], &[("pets", 1), ("pets", 2)]] {
            let told = named(bad).unwrap_err().to_string();
            assert!(told.contains("pets"), "{told}");
        }
        Ok(())
    }

    #[test]
    fn a_union_keeps_every_image_with_its_class() -> Result<()> {
        let first = part(0.0, &["cat", "dog"], &[1, 0, 1])?;
        let mut second = part(10.0, &["river", "sea", "dog"], &[2, 1, 0, 0])?;
        second.val = Some(Split::new(second.train.source().clone(), vec![(3, 2)])?);
        let (data, tasks) = union(&[("pets", &first), ("land", &second)])?;
        assert_eq!(tasks, named(&[("pets", 2), ("land", 3)])?);
        assert_eq!(data.classes.names(), ["cat", "dog", "river", "sea", "dog"]);
        assert_eq!(
            data.train.labels().collect::<Vec<_>>(),
            [1, 0, 1, 4, 3, 2, 2]
        );
        data.check()?;
        // Only the second has images to choose by; their labels count the first's classes, too.
        let val = data.val.as_ref().ok_or(Error::Cancelled)?;
        assert_eq!(val.items(), [(3, 4)]);
        // Images of both sources in any order.
        let preprocess = Preprocess::openai(1);
        let source = data.train.source();
        let pixels = source.pixels(&[6, 0, 3, 2], &preprocess, View::Fixed)?;
        assert_eq!(
            pixels.flatten_all()?.to_vec1::<f32>()?,
            [13.0, 0.0, 10.0, 2.0]
        );
        assert_eq!(source.name(4), "image 1");
        assert_ne!(source.fingerprint(&[0, 3])?, source.fingerprint(&[3, 0])?);
        assert_eq!(source.fingerprint(&[0, 3])?, source.fingerprint(&[0, 3])?);
        assert!(union(&[]).is_err());
        let told = union(&[("pets", &first), ("pets", &second)])
            .unwrap_err()
            .to_string();
        assert!(told.contains("pets"), "{told}");
        let empty = part(0.0, &["cat", "dog"], &[1])?;
        let told = union(&[("pets", &empty)]).unwrap_err().to_string();
        assert!(told.contains("pets") && told.contains("`cat`"), "{told}");
        Ok(())
    }
}
