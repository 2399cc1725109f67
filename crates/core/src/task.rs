//! The data a method is given: images that can be asked for, labels, classes, and splits that cannot be mixed up.
//!
//! Core knows no files. [`ImageSource`] is implemented by `cliptune-data` for folders and caches, and by [`MemoryImages`]
//! for tensors at hand.

use std::marker::PhantomData;
use std::sync::Arc;

use candle_core::{IndexOp, Tensor};
use serde::{Deserialize, Serialize};

use crate::{Clip, Error, Preprocess, Result};

/// How the images of a set are to be seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum View {
    /// Resize and centre crop: the same pixels every time, so features of a frozen tower may be cached.
    Fixed,
    /// A random resized crop and flip, drawn from `(seed, draw, index)` and from nothing else.
    Random {
        /// The run's seed.
        seed: u64,
        /// Which of the image's crops: the epoch, or the number of a pre-encoded view.
        draw: usize,
    },
}

/// What a method reads of an image; decides what may be computed once and kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ImageNeeds {
    /// The tower's feature, `(batch, embed_dim)`.
    GlobalFeatures,
    /// The feature of every patch as well, `(batch, 1 + h·w, embed_dim)`, global one first.
    LocalFeatures,
    /// The preprocessed pixels: something is learned in the image tower or before it.
    Pixels,
}

/// A batch of images in the form that a method asked for.
#[derive(Clone, Debug, Default)]
pub struct ImageBatch {
    features: Option<Tensor>,
    local_features: Option<Tensor>,
    pixels: Option<Tensor>,
    patches: Option<Tensor>,
    items: Option<Vec<usize>>,
}

impl ImageBatch {
    /// Images as raw global features `(batch, embed_dim)`.
    pub fn of_features(features: Tensor) -> Self {
        Self {
            features: Some(features),
            ..Self::default()
        }
    }

    /// Images as raw features of every token `(batch, 1 + h·w, embed_dim)`, the global one first.
    pub fn of_local_features(local: Tensor) -> Result<Self> {
        let features = local.i((.., 0))?.contiguous()?;
        Ok(Self {
            features: Some(features),
            local_features: Some(local),
            ..Self::default()
        })
    }

    /// Images as preprocessed pixels `(batch, 3, side, side)`.
    pub fn of_pixels(pixels: Tensor) -> Self {
        Self {
            pixels: Some(pixels),
            ..Self::default()
        }
    }

    /// Images as [`crate::clip::ImageTower::patches`] `(batch, grid², width)`.
    pub fn of_patches(patches: Tensor) -> Self {
        Self {
            patches: Some(patches),
            ..Self::default()
        }
    }

    /// Encodes `pixels` with the frozen tower as far as `needs` asks.
    pub fn encode(clip: &Clip, pixels: &Tensor, needs: ImageNeeds) -> Result<Self> {
        match needs {
            ImageNeeds::GlobalFeatures => Ok(Self::of_features(clip.image().encode(pixels)?)),
            ImageNeeds::LocalFeatures => {
                Self::of_local_features(clip.image().encode_dense(pixels)?)
            }
            ImageNeeds::Pixels => Ok(Self::of_pixels(pixels.clone())),
        }
    }

    /// The same images with their numbers in the source that they come from.
    #[must_use]
    pub fn with_items(self, items: Vec<usize>) -> Self {
        Self {
            items: Some(items),
            ..self
        }
    }

    /// Which items of their source the images are, if they were taken from a [`Split`].
    pub fn items(&self) -> Option<&[usize]> {
        self.items.as_deref()
    }

    /// Raw global features `(batch, embed_dim)`, not of unit length.
    ///
    /// # Errors
    /// [`Error::Data`] if the batch was asked for as pixels.
    pub fn features(&self) -> Result<&Tensor> {
        self.features
            .as_ref()
            .ok_or_else(|| Error::Data("the batch holds no image features".into()))
    }

    /// Raw features of every token `(batch, 1 + h·w, embed_dim)`, the global one first.
    ///
    /// # Errors
    /// [`Error::Data`] if the batch was asked for otherwise.
    pub fn local_features(&self) -> Result<&Tensor> {
        self.local_features
            .as_ref()
            .ok_or_else(|| Error::Data("the batch holds no local image features".into()))
    }

    /// Preprocessed pixels `(batch, 3, side, side)`. A method that learns in a ViT asks for
    /// [`ImageBatch::pixels_or_patches`] instead.
    ///
    /// # Errors
    /// [`Error::Data`] if the batch was asked for as features, or holds patches.
    pub fn pixels(&self) -> Result<&Tensor> {
        self.pixels
            .as_ref()
            .ok_or_else(|| Error::Data("the batch holds no pixels".into()))
    }

    /// What the image tower takes with prompts: its patches where they are at hand (a training embeds a view that comes again
    /// only once), else the pixels.
    ///
    /// # Errors
    /// [`Error::Data`] if the batch was asked for as features.
    pub fn pixels_or_patches(&self) -> Result<&Tensor> {
        self.patches.as_ref().map_or_else(|| self.pixels(), Ok)
    }

    /// Number of images.
    pub fn len(&self) -> usize {
        [&self.features, &self.pixels, &self.patches]
            .into_iter()
            .flatten()
            .next()
            .map_or(0, |t| t.dims()[0])
    }

    /// Whether there is no image.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Where a set's images come from. Items are numbered; every view of an item depends on the arguments alone.
pub trait ImageSource: Send + Sync + std::fmt::Debug {
    /// Number of images.
    fn len(&self) -> usize;

    /// Whether there is no image.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// What to call item `index` in a message: its path, where it has one.
    fn name(&self, index: usize) -> String;

    /// Hash of what the images at `indices` are, for caches and for refusing to resume on other data.
    ///
    /// # Errors
    /// Names the image that cannot be read.
    fn fingerprint(&self, indices: &[usize]) -> Result<String>;

    /// Preprocessed, normalised pixels `(indices.len(), 3, side, side)`, f32.
    ///
    /// # Errors
    /// Names the image that cannot be read.
    fn pixels(&self, indices: &[usize], preprocess: &Preprocess, view: View) -> Result<Tensor>;

    /// The images in the form that `needs` asks for. Caches answer without running the tower.
    ///
    /// # Errors
    /// As [`ImageSource::pixels`].
    fn images(
        &self,
        clip: &Clip,
        indices: &[usize],
        needs: ImageNeeds,
        view: View,
    ) -> Result<ImageBatch> {
        ImageBatch::encode(clip, &self.pixels(indices, clip.preprocess(), view)?, needs)
    }
}

/// Images that are already preprocessed, in memory. They have only one view, whatever is asked.
#[derive(Clone, Debug)]
pub struct MemoryImages {
    pixels: Tensor,
}

impl MemoryImages {
    /// `pixels` `(n, 3, side, side)`, normalised.
    pub fn new(pixels: Tensor) -> Self {
        Self { pixels }
    }

    fn select(&self, indices: &[usize]) -> Result<Tensor> {
        let indices: Vec<u32> = indices.iter().map(|&i| i as u32).collect();
        let indices = Tensor::new(indices, self.pixels.device())?;
        Ok(self.pixels.index_select(&indices, 0)?)
    }
}

impl ImageSource for MemoryImages {
    fn len(&self) -> usize {
        self.pixels.dims()[0]
    }

    fn name(&self, index: usize) -> String {
        format!("image {index}")
    }

    fn fingerprint(&self, indices: &[usize]) -> Result<String> {
        let view = self.select(indices)?.flatten_all()?.to_vec1::<f32>()?;
        let mut hasher = blake3::Hasher::new();
        view.iter().for_each(|v| {
            hasher.update(&v.to_le_bytes());
        });
        Ok(hasher.finalize().to_hex().to_string())
    }

    fn pixels(&self, indices: &[usize], _: &Preprocess, _: View) -> Result<Tensor> {
        self.select(indices)
    }
}

/// Marks the images a method learns from.
#[derive(Clone, Copy, Debug)]
pub enum Train {}
/// Marks the images on which settings and epochs may be chosen.
#[derive(Clone, Copy, Debug)]
pub enum Val {}
/// Marks the images that only the final measurement sees.
#[derive(Clone, Copy, Debug)]
pub enum Test {}

mod sealed {
    pub trait Sealed {}
    impl Sealed for super::Train {}
    impl Sealed for super::Val {}
    impl Sealed for super::Test {}
}

/// One of [`Train`], [`Val`], [`Test`].
pub trait Role: sealed::Sealed + Send + Sync + 'static {
    /// `train`, `val` or `test`.
    const NAME: &'static str;
}
impl Role for Train {
    const NAME: &'static str = "train";
}
impl Role for Val {
    const NAME: &'static str = "val";
}
impl Role for Test {
    const NAME: &'static str = "test";
}

/// Labelled images of one role. A method takes `Split<Train>` and, for selection, `Split<Val>`; nothing turns a `Split<Test>`
/// into either:
///
/// ```
/// # use cliptune_core::{Classes, Labelled, Split};
/// # use cliptune_core::task::{Test, Train, Val};
/// fn task(train: Split<Train>, val: Split<Val>, test: Split<Test>, classes: Classes) -> Labelled {
///     Labelled { train, val: Some(val), classes }
/// }
/// ```
///
/// Learning from the test images does not compile,
///
/// ```compile_fail,E0308
/// # use cliptune_core::{Classes, Labelled, Split};
/// # use cliptune_core::task::{Test, Train, Val};
/// fn task(train: Split<Train>, val: Split<Val>, test: Split<Test>, classes: Classes) -> Labelled {
///     Labelled { train: test, val: Some(val), classes }
/// }
/// ```
///
/// nor does choosing by them.
///
/// ```compile_fail,E0308
/// # use cliptune_core::{Classes, Labelled, Split};
/// # use cliptune_core::task::{Test, Train, Val};
/// fn task(train: Split<Train>, val: Split<Val>, test: Split<Test>, classes: Classes) -> Labelled {
///     Labelled { train, val: Some(test), classes }
/// }
/// ```
pub struct Split<R: Role> {
    source: Arc<dyn ImageSource>,
    items: Vec<(usize, u32)>,
    role: PhantomData<R>,
}

impl<R: Role> Clone for Split<R> {
    fn clone(&self) -> Self {
        Self {
            source: self.source.clone(),
            items: self.items.clone(),
            role: PhantomData,
        }
    }
}

impl<R: Role> std::fmt::Debug for Split<R> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} split of {} images", R::NAME, self.len())
    }
}

impl<R: Role> Split<R> {
    /// A split of `source` from `(item, label)` pairs.
    ///
    /// # Errors
    /// [`Error::Data`] if an item does not exist in the source.
    pub fn new(source: Arc<dyn ImageSource>, items: Vec<(usize, u32)>) -> Result<Self> {
        if let Some((item, _)) = items.iter().find(|(item, _)| *item >= source.len()) {
            return Err(Error::Data(format!(
                "item {item} is not among the {} images of the source",
                source.len()
            )));
        }
        Ok(Self {
            source,
            items,
            role: PhantomData,
        })
    }

    /// Number of images.
    pub fn len(&self) -> usize {
        self.items.len()
    }

    /// Whether the split has no image.
    pub fn is_empty(&self) -> bool {
        self.items.is_empty()
    }

    /// `(item of the source, label)`, in order.
    pub fn items(&self) -> &[(usize, u32)] {
        &self.items
    }

    /// Labels in order.
    pub fn labels(&self) -> impl Iterator<Item = u32> + '_ {
        self.items.iter().map(|&(_, label)| label)
    }

    /// Where the images come from.
    pub fn source(&self) -> &Arc<dyn ImageSource> {
        &self.source
    }

    /// The same items from another source of the same images, such as a cache over the present one.
    pub fn with_source(&self, source: Arc<dyn ImageSource>) -> Self {
        Self {
            source,
            items: self.items.clone(),
            role: PhantomData,
        }
    }

    /// The images at `positions` of this split.
    ///
    /// # Errors
    /// As [`ImageSource::images`].
    pub fn images(
        &self,
        clip: &Clip,
        positions: &[usize],
        needs: ImageNeeds,
        view: View,
    ) -> Result<ImageBatch> {
        let items: Vec<usize> = positions.iter().map(|&p| self.items[p].0).collect();
        let images = self.source.images(clip, &items, needs, view)?;
        Ok(images.with_items(items))
    }

    /// Hash of the images and their labels.
    ///
    /// # Errors
    /// As [`ImageSource::fingerprint`].
    pub fn fingerprint(&self) -> Result<String> {
        let items: Vec<usize> = self.items.iter().map(|i| i.0).collect();
        let mut hasher = blake3::Hasher::new();
        hasher.update(self.source.fingerprint(&items)?.as_bytes());
        self.labels().for_each(|label| {
            hasher.update(&label.to_le_bytes());
        });
        Ok(hasher.finalize().to_hex().to_string())
    }

    /// Name of the image at `position`.
    pub fn name(&self, position: usize) -> String {
        self.source.name(self.items[position].0)
    }
}

/// Class names as the data set gives them; a label is a position in this list.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Classes(Vec<String>);

impl Classes {
    /// Class names in the order of their labels.
    ///
    /// # Errors
    /// [`Error::Data`] if there is none, or one is empty. Equal names are allowed: ImageNet has some.
    pub fn new(names: Vec<String>) -> Result<Self> {
        if names.is_empty() {
            return Err(Error::Data("there are no classes".into()));
        }
        if let Some(label) = names.iter().position(|name| name.trim().is_empty()) {
            return Err(Error::Data(format!("the name of class {label} is empty")));
        }
        Ok(Self(names))
    }

    /// The names, underscores still inside.
    pub fn names(&self) -> &[String] {
        &self.0
    }

    /// Number of classes.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Never true.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// What a supervised few-shot method learns from: labelled images, some to learn and some to choose by.
#[derive(Clone, Debug)]
pub struct Labelled {
    /// Images to learn from.
    pub train: Split<Train>,
    /// Images to choose by, where there are any.
    pub val: Option<Split<Val>>,
    /// Names of the labels of both.
    pub classes: Classes,
}

impl Labelled {
    /// Images per class of the largest class: the number of shots, as schedules that depend on it count.
    pub fn shots(&self) -> usize {
        let mut counts = vec![0usize; self.classes.len()];
        for label in self.train.labels() {
            if let Some(count) = counts.get_mut(label as usize) {
                *count += 1;
            }
        }
        counts.into_iter().max().unwrap_or(0)
    }

    /// Checks that there is something to learn and that every label has a name.
    ///
    /// # Errors
    /// [`Error::Data`] saying which class is empty or which label is out of range.
    pub fn check(&self) -> Result<()> {
        let n_cls = self.classes.len();
        let mut counts = vec![0usize; n_cls];
        for (position, label) in self.train.labels().enumerate() {
            match counts.get_mut(label as usize) {
                Some(count) => *count += 1,
                None => {
                    let name = self.train.name(position);
                    return Err(Error::Data(format!(
                        "{name}: label {label} has no name, there are {n_cls} classes"
                    )));
                }
            }
        }
        if let Some(label) = counts.iter().position(|&n| n == 0) {
            let name = &self.classes.names()[label];
            return Err(Error::Data(format!(
                "class `{name}` has no training image; leave it out or add images"
            )));
        }
        Ok(())
    }
}
