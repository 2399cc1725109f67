//! The hot paths of the foundation at ViT-B/16's and RN50's sizes, random weights: the towers forward, and one CoOp step.

#![allow(clippy::unwrap_used, missing_docs)]

use std::time::Duration;

use cliptune_benches::{classes, normal, rn50, vit_b16};
use cliptune_core::prompt::ClassTokens;
use cliptune_core::train::{Batch, Step, gradients};
use cliptune_core::{ImageBatch, Learned, optim};
use cliptune_text_pt::{CoOp, CoOpConfig};
use criterion::{Criterion, criterion_group, criterion_main};

fn one_thread(_: &mut Criterion) {
    cliptune_core::one_candle_thread();
}

fn image_towers(c: &mut Criterion) {
    let mut group = c.benchmark_group("image tower, batch 8");
    group
        .sample_size(10)
        .measurement_time(Duration::from_secs(10));
    let pixels = normal(&[8, 3, 224, 224]).unwrap();
    for (name, clip) in [("ViT-B/16", vit_b16().unwrap()), ("RN50", rn50().unwrap())] {
        group.bench_function(name, |b| b.iter(|| clip.image().encode(&pixels).unwrap()));
    }
}

fn coop_step(c: &mut Criterion) {
    let mut group = c.benchmark_group("CoOp step, 16 context tokens, batch 32");
    group
        .sample_size(10)
        .measurement_time(Duration::from_secs(10));
    let clip = vit_b16().unwrap();
    for n_cls in [10, 40, 100] {
        let classes = classes(n_cls).unwrap();
        let mut coop = Learned::<CoOp>::new(&CoOpConfig::default(), &clip, &classes, 1).unwrap();
        let tokens = ClassTokens::new(clip.text(), &classes).unwrap();
        let images = ImageBatch::of_features(normal(&[32, 512]).unwrap());
        let labels: Vec<u32> = (0..32).map(|i| i % n_cls as u32).collect();
        let batch = Batch {
            images: &images,
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
        let mut sgd = optim::Optimizer::new(optim::OptimizerConfig::coop(), coop.params()).unwrap();
        group.bench_function(format!("{n_cls} classes"), |b| {
            b.iter(|| {
                let (_, gradients) = gradients(&mut coop, &clip, &batch, step).unwrap();
                sgd.step(coop.params(), &gradients, |_| 1e-5).unwrap();
            });
        });
    }
}

criterion_group!(benches, one_thread, image_towers, coop_step);
criterion_main!(benches);
