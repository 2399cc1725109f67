//! One training step of every method that trains, at ViT-B/16's sizes with random weights: 100 classes, the method's own
//! batch and contexts, image features at hand. Where the image tower runs at every step, at most 8 images. A step is what `fit`
//! does between two batches: loss, gradients, optimiser.
//!
//! Criterion's throughput is in images; for a method that takes one image a step, the time of a step is that of an image.

#![allow(clippy::unwrap_used, missing_docs)]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread;
use std::time::Duration;

use candle_core::{Device, Tensor};
use cliptune_benches::{classes, normal, vit_b16};
use cliptune_core::method::{Entry, Task};
use cliptune_core::run::{Progress, TrainStatus};
use cliptune_core::task::{ImageSource, Split, View};
use cliptune_core::{
    Clip, Error, ImageBatch, ImageNeeds, Labelled, Preprocess, Result, Run, one_candle_thread,
};
use criterion::{Criterion, SamplingMode, Throughput, criterion_group, criterion_main};
use serde_json::{Value, json};

const CLASSES: usize = 100;
/// A global feature and those of 14 × 14 patches.
const TOKENS: usize = 197;
const EMBED_DIM: usize = 512;

/// Images in a step of a method that sends them through the image tower, at most.
const PIXELS_A_STEP: usize = 8;

/// Features as a cache holds them, and a few pictures.
#[derive(Debug)]
struct Images {
    /// `(n, embed_dim)`, or with every patch `(n, 1 + patches, embed_dim)`.
    features: Tensor,
    /// `(PIXELS_A_STEP, 3, 224, 224)`; what image shows which makes no difference to the time.
    pixels: Tensor,
}

impl ImageSource for Images {
    fn len(&self) -> usize {
        self.features.dims()[0]
    }

    fn name(&self, index: usize) -> String {
        format!("image {index}")
    }

    fn fingerprint(&self, _: &[usize]) -> Result<String> {
        Ok("random features".into())
    }

    fn pixels(&self, indices: &[usize], _: &Preprocess, _: View) -> Result<Tensor> {
        let indices: Vec<u32> = indices
            .iter()
            .map(|&i| (i % PIXELS_A_STEP) as u32)
            .collect();
        let indices = Tensor::new(indices, &Device::Cpu)?;
        Ok(self.pixels.index_select(&indices, 0)?)
    }

    fn images(
        &self,
        clip: &Clip,
        indices: &[usize],
        needs: ImageNeeds,
        view: View,
    ) -> Result<ImageBatch> {
        if needs == ImageNeeds::Pixels {
            let pixels = self.pixels(indices, clip.preprocess(), view)?;
            return Ok(ImageBatch::of_pixels(pixels));
        }
        let indices: Vec<u32> = indices.iter().map(|&i| i as u32).collect();
        let indices = Tensor::new(indices, &Device::Cpu)?;
        let chosen = self.features.index_select(&indices, 0)?;
        match needs {
            ImageNeeds::LocalFeatures => ImageBatch::of_local_features(chosen),
            _ => Ok(ImageBatch::of_features(chosen)),
        }
    }
}

/// Images enough for a batch and for every class.
fn data(needs: ImageNeeds, batch: usize) -> Result<Labelled> {
    let n = batch.max(CLASSES);
    let features = match needs {
        ImageNeeds::LocalFeatures => normal(&[n, TOKENS, EMBED_DIM])?,
        _ => normal(&[n, EMBED_DIM])?,
    };
    let pixels = normal(&[PIXELS_A_STEP, 3, 224, 224])?;
    let items = (0..n).map(|i| (i, (i % CLASSES) as u32)).collect();
    Ok(Labelled {
        train: Split::new(Arc::new(Images { features, pixels }), items)?,
        val: None,
        classes: classes(CLASSES)?,
    })
}

/// How many trainings a fit makes; the steps of the last are timed.
fn trainings(entry: &Entry) -> usize {
    match entry.slug {
        // The steps of its first are CoOp's.
        "subpt" => 2,
        _ => 1,
    }
}

/// Lets a fit make a step when it is asked for, and says when it is done.
struct Steps {
    trainings_left: usize,
    asked: Receiver<()>,
    done: SyncSender<()>,
    cancel: Arc<AtomicBool>,
}

impl Progress for Steps {
    fn start(&mut self, what: &str, _: u64, _: u64) {
        if what == "training" {
            self.trainings_left = self.trainings_left.saturating_sub(1);
        }
    }

    fn trained(&mut self, _: u64, _: &TrainStatus) {
        if self.trainings_left > 0 {
            return;
        }
        // Nobody asks any more once the bench is over.
        if self.done.send(()).is_err() || self.asked.recv().is_err() {
            self.cancel.store(true, Ordering::Relaxed);
        }
    }

    fn advanced(&mut self, _: u64) {}
    fn finish(&mut self) {}
    fn note(&mut self, _: &str) {}
}

/// Makes one step a call.
struct Stepper {
    ask: SyncSender<()>,
    done: Receiver<()>,
}

impl Stepper {
    fn step(&self) {
        self.ask.send(()).unwrap();
        self.done.recv().unwrap();
    }
}

/// Runs a fit with the method's defaults until nobody asks for a step any more.
fn fit(clip: &Clip, entry: &Entry, batch: usize, steps: Steps) -> Result<()> {
    // More epochs than anybody asks for.
    let mut settings =
        json!({ "train": { "epochs": 1_000_000_000, "batch_size": batch, "augment": "none" } });
    if entry.slug == "reprompt" {
        // What is looked up is made once, before the first step.
        settings["passes"] = json!(1);
    }
    let mut run = Run::quiet(1);
    run.cancel = steps.cancel.clone();
    run.progress = Box::new(steps);
    let method = (entry.configure)(&settings)?;
    let data = data(entry.needs, batch)?;
    match method.fit(clip, Task::Labelled(&data), &mut run) {
        Err(Error::Cancelled) => Ok(()),
        ended => ended.map(drop),
    }
}

fn bench_method(c: &mut Criterion, clip: &Clip, entry: &Entry, batch: usize) {
    let mut group = c.benchmark_group("training step, 100 classes");
    group
        .sample_size(10)
        .sampling_mode(SamplingMode::Flat)
        .warm_up_time(Duration::from_secs(1))
        .measurement_time(Duration::from_secs(10))
        .throughput(Throughput::Elements(batch as u64));
    let name = match batch {
        1 => format!("{}, 1 image", entry.name),
        _ => format!("{}, batch {batch}", entry.name),
    };
    thread::scope(|scope| {
        let start = || {
            let (ask, asked) = sync_channel(0);
            let (say, done) = sync_channel(0);
            let steps = Steps {
                trainings_left: trainings(entry),
                asked,
                done: say,
                cancel: Arc::default(),
            };
            scope.spawn(move || fit(clip, entry, batch, steps).unwrap());
            // What is computed once, and the first step.
            done.recv().unwrap();
            Stepper { ask, done }
        };
        // Only if this bench is asked for; once, while criterion comes again for every sample.
        let mut stepper = None;
        group.bench_function(name, |b| {
            let stepper = stepper.get_or_insert_with(start);
            b.iter(|| stepper.step());
        });
    });
    group.finish();
}

fn methods(c: &mut Criterion) {
    one_candle_thread();
    let clip = vit_b16().unwrap();
    let families = [
        cliptune_text_pt::METHODS,
        cliptune_multimodal_pt::METHODS,
        cliptune_visual_pt::METHODS,
    ];
    for entry in families.into_iter().flatten() {
        let defaults = (entry.defaults)();
        let batch = defaults
            .pointer("/train/batch_size")
            .and_then(Value::as_u64);
        // Zero-shot does not train.
        if let Some(batch) = batch {
            let batch = match entry.needs {
                ImageNeeds::Pixels => (batch as usize).min(PIXELS_A_STEP),
                _ => batch as usize,
            };
            bench_method(c, &clip, entry, batch);
        }
    }
}

criterion_group!(benches, methods);
criterion_main!(benches);
