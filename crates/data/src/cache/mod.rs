//! Features of a frozen tower, computed once.

mod shard;

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use candle_core::{Device, Tensor};
use cliptune_core::preprocess::{Mode, Pixels, fixed_view};
use cliptune_core::{Clip, ImageBatch, ImageNeeds, ImageSource, Preprocess, Storage, View};
use rayon::prelude::*;

use self::shard::{Context, Fill, ItemKey, Shard};
use crate::disk::first_error;
use crate::{Error, Result};

/// Images that are decoded and encoded together. It has no part in the result: a tower's features do not depend on the batch.
const BATCH: usize = 32;

/// Images in one cache file: what a killed run can lose.
const SHARD: usize = 2048;

const EXTENSION: &str = ".safetensors";

/// What happens while features are prepared.
#[derive(Clone, Copy, Debug)]
pub enum Event<'a> {
    /// So many of the images asked for are ready.
    Progress {
        /// Images ready.
        done: usize,
        /// Images asked for.
        total: usize,
    },
    /// Something is wrong with the cache folder or a file in it; the features are right all the same.
    Warning(&'a str),
}

/// A source whose features are computed once and then read from memory-mapped files.
///
/// What is cached is keyed by everything that it depends on: the weights; what the tower and the preprocessing make of a test
/// picture, so another precision or arithmetic is another key; resolution and normalisation; the view; global or local features;
/// the version of this crate; and the content of each image. Files that are damaged are found by their checksum, removed
/// and made anew. Several processes may share a folder: files appear whole or not at all, and equal names have equal content.
#[derive(Debug)]
pub struct CachedFeatures {
    inner: Arc<dyn ImageSource>,
    /// The model that features are kept for.
    model: Model,
    folder: Option<PathBuf>,
    prepared: Mutex<Prepared>,
}

/// Weights hash, preprocessing, how the weights are kept.
type Model = (String, Preprocess, Storage);
type Prepared = HashMap<(ImageNeeds, View), Arc<Rows>>;

/// Where the rows of prepared items are.
#[derive(Clone, Debug, Default)]
struct Rows {
    shards: Vec<Arc<Shard>>,
    /// Shard and row of an item.
    places: HashMap<usize, (usize, usize)>,
    /// Shape of one image's features.
    row_shape: Vec<usize>,
}

impl CachedFeatures {
    /// Keeps the features that `clip` gives `inner`'s images, in files below `folder`; without one, in a temporary file.
    ///
    /// Nothing is encoded before [`CachedFeatures::prepare`].
    pub fn new(inner: Arc<dyn ImageSource>, clip: &Clip, folder: Option<PathBuf>) -> Self {
        Self {
            inner,
            model: model_of(clip),
            folder,
            prepared: Mutex::default(),
        }
    }

    /// Encodes those of `items` that no cache file holds, and maps them all.
    ///
    /// `on_event` is told of progress and of trouble with the folder: if it cannot be written, the features go to a temporary file, and
    /// if that cannot be had either, they are computed whenever they are asked for. Pixels are never kept.
    ///
    /// # Errors
    /// [`Error::Image`] naming an image that cannot be read; errors of the tower.
    pub fn prepare(
        &self,
        clip: &Clip,
        items: &[usize],
        needs: ImageNeeds,
        view: View,
        on_event: &mut dyn FnMut(Event<'_>),
    ) -> Result<()> {
        if needs == ImageNeeds::Pixels || items.is_empty() {
            return Ok(());
        }
        if model_of(clip) != self.model {
            let message = "the feature cache was made for other weights".to_owned();
            return Err(Error::Core(cliptune_core::Error::Data(message)));
        }
        let mut rows = Rows::clone(&self.rows(needs, view));
        let mut missing = items.to_vec();
        missing.sort_unstable();
        missing.dedup();
        let total = missing.len();
        missing.retain(|item| !rows.places.contains_key(item));
        if !missing.is_empty() {
            let context = Context::of(clip, needs, view)?;
            let mut keyed = self.keyed(&missing, view)?;
            let mut folder = self.folder.as_deref();
            if let Some(folder) = folder {
                rows.find_on_disk(folder, &context, &keyed, on_event);
                keyed.retain(|(item, _)| !rows.places.contains_key(item));
            }
            let mut done = total - keyed.len();
            on_event(Event::Progress { done, total });
            for items in keyed.chunks(SHARD) {
                let job = Job {
                    source: &*self.inner,
                    clip,
                    items,
                    needs,
                    view,
                    context: &context,
                };
                let mut warnings = Vec::new();
                let mut on_encoded = |count| {
                    on_event(Event::Progress {
                        done: done + count,
                        total,
                    })
                };
                let shard = job.run(&mut folder, &mut on_encoded, &mut |w| warnings.push(w))?;
                for warning in warnings {
                    on_event(Event::Warning(&warning));
                }
                if let Some(shard) = shard {
                    rows.add(shard, items.iter().map(|(item, _)| *item).zip(0..));
                }
                done += items.len();
            }
            rows.row_shape = context.row_shape;
            self.lock().insert((needs, view), Arc::new(rows));
        }
        on_event(Event::Progress { done: total, total });
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, Prepared> {
        // A panic elsewhere cannot leave the map half changed.
        self.prepared.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn rows(&self, needs: ImageNeeds, view: View) -> Arc<Rows> {
        self.lock().get(&(needs, view)).cloned().unwrap_or_default()
    }

    /// What the features of each item depend on, besides the model: its content, and for a random view its number.
    fn keyed(&self, items: &[usize], view: View) -> Result<Vec<(usize, ItemKey)>> {
        let key = |&item: &usize| -> Result<(usize, ItemKey)> {
            let mut hasher = blake3::Hasher::new();
            hasher.update(self.inner.fingerprint(&[item])?.as_bytes());
            if view != View::Fixed {
                hasher.update(&(item as u64).to_le_bytes());
            }
            Ok((item, *hasher.finalize().as_bytes()))
        };
        first_error(items.par_iter().map(key))
    }
}

fn model_of(clip: &Clip) -> Model {
    (
        clip.weights_hash().to_owned(),
        clip.preprocess().clone(),
        clip.storage(),
    )
}

impl Rows {
    fn row(&self, item: usize) -> Option<&[u8]> {
        let &(shard, row) = self.places.get(&item)?;
        self.shards.get(shard)?.row(row)
    }

    fn add(&mut self, shard: Shard, items: impl Iterator<Item = (usize, usize)>) {
        let number = self.shards.len();
        self.shards.push(Arc::new(shard));
        self.places
            .extend(items.map(|(item, row)| (item, (number, row))));
    }

    /// Takes what the files of earlier runs hold. Damaged ones are removed.
    fn find_on_disk(
        &mut self,
        folder: &Path,
        context: &Context,
        wanted: &[(usize, ItemKey)],
        on_event: &mut dyn FnMut(Event<'_>),
    ) {
        // An unreadable folder shows itself when a file is written.
        let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
        let ours = |path: &PathBuf| {
            let name = path.file_name().and_then(|name| name.to_str());
            name.is_some_and(|name| name.starts_with(&context.key) && name.ends_with(EXTENSION))
        };
        let mut paths: Vec<PathBuf> = entries.map(|entry| entry.path()).filter(ours).collect();
        paths.sort_unstable();
        for path in paths {
            let open = || {
                let shard = Shard::open(&path, context)?;
                let rows: HashMap<ItemKey, usize> = shard.keys().zip(0..).collect();
                let place = |(item, key): &(usize, ItemKey)| Some((*item, *rows.get(key)?));
                let mut found: Vec<(usize, usize)> = wanted.iter().filter_map(place).collect();
                found.retain(|(item, _)| !self.places.contains_key(item));
                if !found.is_empty() {
                    // Reads the whole file, so only if something in it is wanted.
                    shard.verify()?;
                }
                Ok((shard, found))
            };
            match open() {
                Ok((_, found)) if found.is_empty() => {}
                Ok((shard, found)) => self.add(shard, found.into_iter()),
                Err(reason) => {
                    let reason: String = reason;
                    let message =
                        format!("{}: {reason}; computing its features anew", path.display());
                    on_event(Event::Warning(&message));
                    let _ = std::fs::remove_file(&path);
                }
            }
        }
    }
}

impl Context {
    fn of(clip: &Clip, needs: ImageNeeds, view: View) -> cliptune_core::Result<Self> {
        let preprocess = clip.preprocess();
        // A picture with slopes, edges and noise, larger than its view in one direction and smaller in the other.
        let (width, height) = (
            preprocess.resolution + 61,
            preprocess.resolution.div_ceil(2) + 1,
        );
        let byte = |i: usize| (i.wrapping_mul(i / 7 + 3) ^ (i / 96)) as u8;
        let picture: Vec<u8> = (0..3 * width * height).map(byte).collect();
        let picture = Pixels::new(width, height, Mode::Rgb, picture)?;
        let shape = (1, 3, preprocess.resolution, preprocess.resolution);
        let pixels = Tensor::from_vec(fixed_view(&picture, preprocess)?, shape, clip.device())?;
        let probe = features_of(&ImageBatch::encode(clip, &pixels, needs)?, needs)?;

        let mut hasher = blake3::Hasher::new();
        let mut add = |part: &[u8]| {
            hasher.update(&(part.len() as u64).to_le_bytes());
            hasher.update(part);
        };
        add(shard::FORMAT.as_bytes());
        add(env!("CARGO_PKG_VERSION").as_bytes());
        add(clip.weights_hash().as_bytes());
        add(&(preprocess.resolution as u64).to_le_bytes());
        for value in preprocess.mean.iter().chain(&preprocess.std) {
            add(&value.to_le_bytes());
        }
        add(match needs {
            ImageNeeds::GlobalFeatures => b"global",
            ImageNeeds::LocalFeatures => b"local",
            ImageNeeds::Pixels => b"pixels",
        });
        match view {
            View::Fixed => add(b"fixed"),
            View::Random { seed, draw } => {
                add(b"random");
                add(&seed.to_le_bytes());
                add(&(draw as u64).to_le_bytes());
            }
        }
        add(&bytes_of(&probe)?);
        let key = hasher.finalize().to_hex().chars().take(32).collect();
        Ok(Self {
            key,
            row_shape: probe.dims().iter().skip(1).copied().collect(),
        })
    }
}

/// The features that `needs` names.
fn features_of(batch: &ImageBatch, needs: ImageNeeds) -> cliptune_core::Result<Tensor> {
    Ok(match needs {
        ImageNeeds::LocalFeatures => batch.local_features()?.clone(),
        _ => batch.features()?.clone(),
    })
}

fn bytes_of(tensor: &Tensor) -> cliptune_core::Result<Vec<u8>> {
    let values = tensor
        .to_device(&Device::Cpu)?
        .flatten_all()?
        .to_vec1::<f32>()?;
    Ok(values.into_iter().flat_map(f32::to_le_bytes).collect())
}

/// The images of one file to be.
struct Job<'a> {
    source: &'a dyn ImageSource,
    clip: &'a Clip,
    items: &'a [(usize, ItemKey)],
    needs: ImageNeeds,
    view: View,
    context: &'a Context,
}

impl Job<'_> {
    /// Encodes the images into a file of `folder`, else into a temporary one; nothing if there cannot be any. A folder that
    /// fails is not tried again.
    fn run(
        &self,
        folder: &mut Option<&Path>,
        on_encoded: &mut dyn FnMut(usize),
        on_warning: &mut dyn FnMut(String),
    ) -> Result<Option<Shard>> {
        if let Some(path) = *folder {
            let name = format!(
                "{}-{}{EXTENSION}",
                self.context.key,
                shard::name(self.items)
            );
            let path = path.join(name);
            let place = |fill: Fill<'_>| Shard::create(&path, self.context, fill);
            match self.write(on_encoded, place)? {
                Ok(shard) => return Ok(Some(shard)),
                Err(reason) => on_warning(format!("{reason}; features are kept for this run only")),
            }
            *folder = None;
        }
        match self.write(on_encoded, |fill| Shard::temporary(self.context, fill))? {
            Ok(shard) => Ok(Some(shard)),
            Err(reason) => {
                on_warning(format!(
                    "{reason}; features are computed whenever they are needed"
                ));
                Ok(None)
            }
        }
    }

    /// Fails if the images cannot be encoded; what `place` says of the file is inside.
    fn write(
        &self,
        on_encoded: &mut dyn FnMut(usize),
        place: impl FnOnce(Fill<'_>) -> Result<Shard, String>,
    ) -> Result<Result<Shard, String>> {
        let mut failure = None;
        let mut encoded = 0;
        let written = place(&mut |w| {
            shard::write(w, self.context, self.items, BATCH, &mut |batch| {
                // Errors of the tower pass through code that knows only those of files.
                let bytes = self.encode(batch).map_err(|e| {
                    failure = Some(e);
                    std::io::Error::other("stopped")
                })?;
                encoded += batch.len();
                on_encoded(encoded);
                Ok(bytes)
            })
        });
        match failure {
            Some(failure) => Err(failure.into()),
            None => Ok(written),
        }
    }

    fn encode(&self, batch: &[(usize, ItemKey)]) -> cliptune_core::Result<Vec<u8>> {
        let items: Vec<usize> = batch.iter().map(|(item, _)| *item).collect();
        encode(
            self.source,
            self.clip,
            &items,
            (self.needs, self.view),
            &self.context.row_shape,
        )
    }
}

/// Features of `items`, little-endian f32, the same bits whatever else is encoded.
fn encode(
    source: &dyn ImageSource,
    clip: &Clip,
    items: &[usize],
    (needs, view): (ImageNeeds, View),
    row_shape: &[usize],
) -> cliptune_core::Result<Vec<u8>> {
    let mut out = Vec::new();
    for batch in items.chunks(BATCH) {
        let features = features_of(&source.images(clip, batch, needs, view)?, needs)?;
        let expected = [&[batch.len()], row_shape].concat();
        if features.dims() != expected {
            return Err(cliptune_core::Error::Shape {
                what: "batch of image features".into(),
                found: features.dims().to_vec(),
                expected,
            });
        }
        out.extend(bytes_of(&features)?);
    }
    Ok(out)
}

impl ImageSource for CachedFeatures {
    fn len(&self) -> usize {
        self.inner.len()
    }

    fn name(&self, index: usize) -> String {
        self.inner.name(index)
    }

    fn fingerprint(&self, indices: &[usize]) -> cliptune_core::Result<String> {
        self.inner.fingerprint(indices)
    }

    fn pixels(
        &self,
        indices: &[usize],
        preprocess: &Preprocess,
        view: View,
    ) -> cliptune_core::Result<Tensor> {
        self.inner.pixels(indices, preprocess, view)
    }

    /// Rows that were prepared come from the files, others from the tower, with the bits that they would have there.
    fn images(
        &self,
        clip: &Clip,
        indices: &[usize],
        needs: ImageNeeds,
        view: View,
    ) -> cliptune_core::Result<ImageBatch> {
        let rows = self.rows(needs, view);
        let prepared = indices.iter().filter(|&&index| rows.row(index).is_some());
        if prepared.count() == 0 || model_of(clip) != self.model {
            return self.inner.images(clip, indices, needs, view);
        }
        let mut missing = indices.to_vec();
        missing.retain(|&index| rows.row(index).is_none());
        let computed = encode(&*self.inner, clip, &missing, (needs, view), &rows.row_shape)?;
        let row_bytes = computed.len() / missing.len().max(1);
        let mut computed = computed.chunks_exact(row_bytes.max(1));
        let mut values: Vec<f32> = Vec::new();
        for &index in indices {
            let row = rows.row(index).or_else(|| computed.next()).unwrap_or(&[]);
            let (numbers, _) = row.as_chunks::<4>();
            values.extend(numbers.iter().map(|bytes| f32::from_le_bytes(*bytes)));
        }
        let shape = [&[indices.len()], &rows.row_shape[..]].concat();
        let features = Tensor::from_vec(values, shape, &Device::Cpu)?.to_device(clip.device())?;
        match needs {
            ImageNeeds::LocalFeatures => ImageBatch::of_local_features(features),
            _ => Ok(ImageBatch::of_features(features)),
        }
    }
}

#[cfg(test)]
mod tests;
