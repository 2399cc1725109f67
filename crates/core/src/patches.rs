//! Embedded patches of images that are seen again and again, kept while a training runs.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use candle_core::{Device, Tensor};

use crate::task::{ImageSource, Role};
use crate::{Clip, ImageBatch, ImageNeeds, Preprocess, Result, Split, View};

/// Most bytes that the patches of a split may take, some 450 images of ViT-B/16; what comes later is read each time.
const MOST_BYTES: usize = 256 << 20;

/// `split` for a training that sees each image more than once: where the method reads pixels and the image tower is a frozen ViT,
/// an image is read and its patches are embedded once, and the rest is answered from memory.
pub(crate) fn remembered<R: Role>(split: &Split<R>, clip: &Clip, needs: ImageNeeds) -> Split<R> {
    match needs == ImageNeeds::Pixels && clip.image().takes_prompts() {
        true => split.with_source(Arc::new(Remembered::new(
            split.source().clone(),
            MOST_BYTES,
        ))),
        false => split.clone(),
    }
}

/// A source that remembers patches.
#[derive(Debug)]
struct Remembered {
    source: Arc<dyn ImageSource>,
    most_bytes: usize,
    kept: Mutex<Kept>,
}

#[derive(Debug, Default)]
struct Kept {
    /// `(grid², width)` each.
    patches: HashMap<(usize, View), Arc<[f32]>>,
    bytes: usize,
}

impl Kept {
    fn keep(&mut self, key: (usize, View), row: &Arc<[f32]>, most_bytes: usize) {
        let bytes = size_of_val::<[f32]>(row);
        if self.bytes + bytes <= most_bytes && self.patches.insert(key, row.clone()).is_none() {
            self.bytes += bytes;
        }
    }
}

impl Remembered {
    fn new(source: Arc<dyn ImageSource>, most_bytes: usize) -> Self {
        Self {
            source,
            most_bytes,
            kept: Mutex::default(),
        }
    }

    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads images and embeds them, `(indices.len(), grid², width)`.
    fn embed(&self, clip: &Clip, indices: &[usize], view: View) -> Result<Tensor> {
        let pixels = self.source.pixels(indices, clip.preprocess(), view)?;
        Ok(clip.image().patches(&pixels)?.detach())
    }
}

impl ImageSource for Remembered {
    fn len(&self) -> usize {
        self.source.len()
    }

    fn name(&self, index: usize) -> String {
        self.source.name(index)
    }

    fn fingerprint(&self, indices: &[usize]) -> Result<String> {
        self.source.fingerprint(indices)
    }

    fn pixels(&self, indices: &[usize], preprocess: &Preprocess, view: View) -> Result<Tensor> {
        self.source.pixels(indices, preprocess, view)
    }

    /// Patches, whatever is asked for but features.
    fn images(
        &self,
        clip: &Clip,
        indices: &[usize],
        needs: ImageNeeds,
        view: View,
    ) -> Result<ImageBatch> {
        if needs != ImageNeeds::Pixels {
            return self.source.images(clip, indices, needs, view);
        }
        let mut found: Vec<Option<Arc<[f32]>>> = {
            let kept = self.kept();
            let of = |index: &usize| kept.patches.get(&(*index, view)).cloned();
            indices.iter().map(of).collect()
        };
        let missing = || {
            found
                .iter()
                .zip(indices)
                .filter(|(found, _)| found.is_none())
        };
        let new: Vec<usize> = missing().map(|(_, index)| *index).collect();
        if !new.is_empty() {
            let rows = self.embed(clip, &new, view)?;
            let rows = rows.flatten_from(1)?.to_vec2::<f32>()?;
            let gaps = found.iter_mut().filter(|found| found.is_none());
            let mut kept = self.kept();
            for ((gap, row), index) in gaps.zip(rows).zip(new) {
                let row: Arc<[f32]> = row.into();
                kept.keep((index, view), &row, self.most_bytes);
                *gap = Some(row);
            }
        }
        let (_, width) = clip.arch().vit_sizes()?;
        let rows: Vec<&[f32]> = found.iter().flatten().map(|row| &**row).collect();
        let patches = rows.first().map_or(0, |row| row.len() / width);
        let shape = (indices.len(), patches, width);
        let patches = Tensor::from_vec(rows.concat(), shape, &Device::Cpu)?;
        Ok(ImageBatch::of_patches(patches))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;
    use crate::checkpoint::random;
    use crate::rng::Rng;
    use crate::task::{MemoryImages, Train};
    use crate::visual_prompt::VisualPrompts;
    use crate::{Activation, Arch, Storage, VisionArch};

    /// Counts the images that are read.
    #[derive(Debug)]
    struct Counted(MemoryImages, AtomicUsize);

    impl ImageSource for Counted {
        fn len(&self) -> usize {
            self.0.len()
        }
        fn name(&self, index: usize) -> String {
            self.0.name(index)
        }
        fn fingerprint(&self, indices: &[usize]) -> Result<String> {
            self.0.fingerprint(indices)
        }
        fn pixels(&self, indices: &[usize], preprocess: &Preprocess, view: View) -> Result<Tensor> {
            self.1.fetch_add(indices.len(), Ordering::Relaxed);
            self.0.pixels(indices, preprocess, view)
        }
    }

    fn clip(vision: VisionArch) -> Result<Clip> {
        let arch = Arch {
            embed_dim: 32,
            image_resolution: 32,
            vision,
            context_length: 77,
            vocab_size: 49_408,
            text_width: 64,
            text_layers: 1,
            activation: Activation::QuickGelu,
        };
        Clip::from_checkpoint(random(&arch, 1)?, Storage::F32)
    }

    const VIT: VisionArch = VisionArch::Vit {
        layers: 2,
        width: 64,
        patch_size: 16,
    };

    /// What the patches of one image take.
    const BYTES: usize = 4 * 64 * 4;

    fn counted() -> Result<Arc<Counted>> {
        let values = Rng::stream(3, "pixels", &[]).normal(6 * 3 * 32 * 32);
        let values: Vec<f32> = values.into_iter().map(|x| x as f32).collect();
        let pixels = Tensor::from_vec(values, (6, 3, 32, 32), &Device::Cpu)?;
        Ok(Arc::new(Counted(
            MemoryImages::new(pixels),
            AtomicUsize::new(0),
        )))
    }

    fn bits(t: &Tensor) -> Result<Vec<u32>> {
        let values = t.flatten_all()?.to_vec1::<f32>()?;
        Ok(values.into_iter().map(f32::to_bits).collect())
    }

    #[test]
    fn an_image_is_read_once_and_its_features_have_the_same_bits() -> Result<()> {
        let (clip, source) = (clip(VIT)?, counted()?);
        let remembered = Remembered::new(source.clone(), 6 * BYTES);
        let none = VisualPrompts::new();
        for (indices, read) in [
            (vec![4, 1, 0], 3),
            (vec![1, 5, 4, 2], 5),
            (vec![5, 4, 2, 1, 0, 1], 5),
            (vec![3], 6),
        ] {
            let given = remembered.images(&clip, &indices, ImageNeeds::Pixels, View::Fixed)?;
            assert_eq!(given.len(), indices.len());
            assert_eq!(source.1.load(Ordering::Relaxed), read);
            let pixels = source.0.pixels(&indices, clip.preprocess(), View::Fixed)?;
            let patches = given.pixels_or_patches()?;
            assert_eq!(bits(patches)?, bits(&clip.image().patches(&pixels)?)?);
            let features = clip.image().encode_prompted(patches, &none)?;
            assert_eq!(bits(&features)?, bits(&clip.image().encode(&pixels)?)?);
        }
        // Another view is another picture.
        let view = View::Random { seed: 1, draw: 0 };
        remembered.images(&clip, &[3], ImageNeeds::Pixels, view)?;
        assert_eq!(source.1.load(Ordering::Relaxed), 7);
        Ok(())
    }

    #[test]
    fn no_more_is_kept_than_there_is_room_for() -> Result<()> {
        let (clip, source) = (clip(VIT)?, counted()?);
        let remembered = Remembered::new(source.clone(), 3 * BYTES - 1);
        for read in [5, 8, 11] {
            remembered.images(&clip, &[0, 1, 2, 3, 4], ImageNeeds::Pixels, View::Fixed)?;
            assert_eq!(source.1.load(Ordering::Relaxed), read);
        }
        Ok(())
    }

    #[test]
    fn only_a_vit_that_is_shown_pixels_remembers() -> Result<()> {
        let source = counted()?;
        let split = Split::<Train>::new(source.clone(), vec![(0, 0), (1, 1)])?;
        let reads = |vision, needs| -> Result<usize> {
            let clip = clip(vision)?;
            let before = source.1.load(Ordering::Relaxed);
            let split = remembered(&split, &clip, needs);
            for _ in 0..2 {
                split.images(&clip, &[0, 1], needs, View::Fixed)?;
            }
            Ok(source.1.load(Ordering::Relaxed) - before)
        };
        let resnet = VisionArch::ResNet {
            layers: [1, 1, 1, 1],
            width: 16,
        };
        assert_eq!(reads(VIT, ImageNeeds::Pixels)?, 2);
        assert_eq!(reads(VIT, ImageNeeds::GlobalFeatures)?, 4);
        assert_eq!(reads(resnet, ImageNeeds::Pixels)?, 4);
        Ok(())
    }
}
