//! What the tests of all methods of this family share: a tiny random CLIP, pictures of noise, ways to look at tensors.
#![allow(dead_code, clippy::unwrap_used)] // Each test file takes what it needs.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use candle_core::{Device, Tensor};
use cliptune_core::checkpoint::random;
use cliptune_core::method::Predictor;
use cliptune_core::prompt::ClassTokens;
use cliptune_core::rng::Rng;
use cliptune_core::run::{Progress, TrainStatus};
use cliptune_core::task::{MemoryImages, Split};
use cliptune_core::train::{Batch, Loss, Objective, Step, gradients};
use cliptune_core::{
    Activation, Arch, Classes, Clip, Error, Gradients, ImageBatch, Labelled, Learned, Result, Run,
    Storage, VisionArch,
};

pub(crate) fn clip() -> Result<Clip> {
    clip_of_dim(32)
}

/// As [`clip`] with another joint width.
pub(crate) fn clip_of_dim(embed_dim: usize) -> Result<Clip> {
    let arch = Arch {
        embed_dim,
        image_resolution: 32,
        vision: VisionArch::Vit {
            layers: 1,
            width: 64,
            patch_size: 16,
        },
        context_length: 77,
        vocab_size: 49_408,
        text_width: 64,
        text_layers: 2,
        activation: Activation::QuickGelu,
    };
    Clip::from_checkpoint(random(&arch, 1)?, Storage::F32)
}

pub(crate) fn classes(names: &[&str]) -> Result<Classes> {
    Classes::new(names.iter().map(|n| (*n).to_owned()).collect())
}

pub(crate) fn flowers() -> Result<Classes> {
    classes(&["daisy", "common_sunflower", "hard-leaved pocket orchid"])
}

pub(crate) fn drawn(seed: u64, shape: impl Into<candle_core::Shape>) -> Result<Tensor> {
    let shape = shape.into();
    let values = Rng::stream(seed, "test", &[]).normal(shape.elem_count());
    let values: Vec<f32> = values.into_iter().map(|x| x as f32).collect();
    Ok(Tensor::from_vec(values, shape, &Device::Cpu)?)
}

/// 11 images to learn from, 3 to choose by.
pub(crate) fn data() -> Result<Labelled> {
    let source = Arc::new(MemoryImages::new(drawn(9, (14, 3, 32, 32))?));
    let items = |range: std::ops::Range<usize>| range.map(|i| (i, (i % 3) as u32)).collect();
    Ok(Labelled {
        train: Split::new(source.clone(), items(0..11))?,
        val: Some(Split::new(source, items(11..14))?),
        classes: flowers()?,
    })
}

/// Keeps what the user should read, and sets the run's cancel flag after a number of steps.
#[derive(Clone, Default)]
pub(crate) struct Watcher {
    pub(crate) notes: Arc<Mutex<Vec<String>>>,
    steps: Arc<AtomicUsize>,
    stop: Option<(usize, Arc<AtomicBool>)>,
}

impl Watcher {
    pub(crate) fn stopping(run: &Run, after: usize) -> Self {
        Self {
            stop: Some((after, run.cancel.clone())),
            ..Self::default()
        }
    }
}

impl Progress for Watcher {
    fn start(&mut self, _: &str, _: u64, _: u64) {}
    fn trained(&mut self, _: u64, _: &TrainStatus) {
        let steps = self.steps.fetch_add(1, Ordering::Relaxed) + 1;
        if let Some((after, cancel)) = &self.stop
            && steps == *after
        {
            cancel.store(true, Ordering::Relaxed);
        }
    }
    fn advanced(&mut self, _: u64) {}
    fn finish(&mut self) {}
    fn note(&mut self, message: &str) {
        self.notes.lock().unwrap().push(message.to_owned());
    }
}

/// Raw features of `n` pictures.
pub(crate) fn images(clip: &Clip, n: usize) -> Result<ImageBatch> {
    let pixels = drawn(9, (n, 3, 32, 32))?;
    Ok(ImageBatch::of_features(clip.image().encode(&pixels)?))
}

pub(crate) fn logits(predictor: &dyn Predictor, clip: &Clip, classes: &Classes) -> Result<Tensor> {
    predictor
        .classifier(clip, classes)?
        .logits(&images(clip, 4)?)
}

/// Loss and gradients of the first step on `n` pictures with labels 0, 1, 2, 0, ...
pub(crate) fn step<O: Objective>(
    method: &mut Learned<O>,
    clip: &Clip,
    classes: &Classes,
    n: usize,
) -> Result<(Loss, Gradients)> {
    let tokens = ClassTokens::new(clip.text(), classes)?;
    let labels: Vec<u32> = (0..n).map(|i| (i % classes.len()) as u32).collect();
    let batch = Batch {
        images: &images(clip, n)?,
        labels: &labels,
        classes: &tokens,
    };
    let step = Step {
        seed: 0,
        epoch: 0,
        epochs: 1,
        index: 0,
        steps: 1,
    };
    gradients(method, clip, &batch, step)
}

/// Every learned tensor gets a gradient, and its length is the slope of the loss along it.
pub(crate) fn gradients_are_slopes<O: Objective>(
    method: &mut Learned<O>,
    clip: &Clip,
    classes: &Classes,
    n: usize,
    h: f64,
) -> Result<()> {
    let worst = worst_slope(method, clip, classes, n, h)?;
    assert!(worst < 0.02, "slope and gradient differ by {worst}");
    Ok(())
}

/// The largest relative difference between a gradient's length and the slope of the loss along it, over steps of `h`.
pub(crate) fn worst_slope<O: Objective>(
    method: &mut Learned<O>,
    clip: &Clip,
    classes: &Classes,
    n: usize,
    h: f64,
) -> Result<f64> {
    let (_, gradients) = step(method, clip, classes, n)?;
    let mut worst: f64 = 0.0;
    for (name, gradient) in gradients.iter() {
        let gradient = gradient.ok_or_else(|| Error::Data(format!("`{name}` gets no gradient")))?;
        let start: BTreeMap<String, Tensor> = method.params().tensors()?.into_iter().collect();
        let size = f64::from(gradient.sqr()?.sum_all()?.sqrt()?.to_scalar::<f32>()?);
        assert!(size > 1e-6, "the gradient of `{name}` is {size}");
        let mut at = |sign: f64| -> Result<f64> {
            let mut moved = start.clone();
            let value = (&start[name] + (gradient * (sign * h / size))?)?;
            moved.insert(name.to_owned(), value);
            method.params().load(&moved)?;
            let loss = step(method, clip, classes, n)?.0.total;
            Ok(f64::from(loss.to_scalar::<f32>()?))
        };
        let numeric = (at(1.0)? - at(-1.0)?) / (2.0 * h);
        method.params().load(&start)?;
        worst = (numeric - size).abs().max(worst * size) / size;
    }
    Ok(worst)
}

pub(crate) fn bits(t: &Tensor) -> Result<Vec<u32>> {
    let values = t.flatten_all()?.to_vec1::<f32>()?;
    Ok(values.into_iter().map(f32::to_bits).collect())
}

/// Largest difference over the largest magnitude of `b`.
pub(crate) fn difference(a: &Tensor, b: &Tensor) -> Result<f32> {
    Ok((a - b)?.abs()?.max_all()?.to_scalar::<f32>()? / b.abs()?.max_all()?.to_scalar::<f32>()?)
}

/// The learned tensors with `name` replaced.
pub(crate) fn with(
    method: &Learned<impl Objective>,
    name: &str,
    value: Tensor,
) -> Result<BTreeMap<String, Tensor>> {
    let mut tensors: BTreeMap<String, Tensor> = method.params().tensors()?.into_iter().collect();
    assert!(tensors.insert(name.to_owned(), value).is_some(), "{name}");
    Ok(tensors)
}

/// A term of a loss.
pub(crate) fn term(loss: &Loss, name: &str) -> Result<f32> {
    let found = loss.terms.iter().find(|(n, _)| *n == name);
    let (_, value) = found.ok_or_else(|| Error::Data(format!("no term `{name}`")))?;
    Ok(value.to_scalar()?)
}

/// The error's words.
pub(crate) fn refused<T>(outcome: Result<T>) -> String {
    outcome.err().map(|e| e.to_string()).unwrap_or_default()
}
