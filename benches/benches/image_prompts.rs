//! Steps that learn inside the image tower, at ViT-B/16's sizes with random weights: forward, loss, all gradients.

#![allow(clippy::unwrap_used, missing_docs)]

use std::time::Duration;

use candle_core::{IndexOp, Tensor};
use cliptune_benches::{classes, normal, vit_b16};
use cliptune_core::layers::Affine;
use cliptune_core::optim::Optimizer;
use cliptune_core::prompt::ClassTokens;
use cliptune_core::train::{Batch, Step, gradients};
use cliptune_core::visual_prompt::{Tokens, VisualPrompts};
use cliptune_core::{Clip, Gradients, ImageBatch, Learned, Params, ops};
use cliptune_visual_pt::{Vp, VpConfig};
use criterion::{Criterion, criterion_group, criterion_main};

const WIDTH: usize = 768;

fn one_thread(_: &mut Criterion) {
    cliptune_core::one_candle_thread();
}

/// Cross entropy against a hundred frozen classes, and its gradients.
fn step(clip: &Clip, features: &Tensor, text: &Tensor, params: &Params) {
    let logits = clip.cosine_logits(features, text).unwrap();
    let labels: Vec<u32> = (0..logits.dim(0).unwrap() as u32).collect();
    let loss = ops::cross_entropy(&logits, &labels).unwrap();
    Gradients::of(&loss, params).unwrap();
}

fn image_prompts(c: &mut Criterion) {
    let mut group = c.benchmark_group("image prompts");
    group
        .sample_size(10)
        .measurement_time(Duration::from_secs(20));
    let clip = vit_b16().unwrap();
    let text = normal(&[100, 512]).unwrap();
    let pixels = normal(&[4, 3, 224, 224]).unwrap();

    // Deep visual prompt tuning: 8 tokens, replaced at every block.
    let mut params = Params::new(1);
    let deep: Vec<Tensor> = (0..12)
        .map(|i| {
            let param = params.normal(&i.to_string(), (8, WIDTH), 0.02).unwrap();
            param.tensor().clone()
        })
        .collect();
    let declare = || VisualPrompts::deep(deep.iter().cloned().map(Tokens::Shared));
    group.bench_function("deep VPT, batch 4, 8 tokens, 12 blocks", |b| {
        b.iter(|| {
            let features = clip.image().encode_prompted(&pixels, &declare()).unwrap();
            step(&clip, &features, &text, &params);
        });
    });
    group.bench_function("the tower alone, batch 4", |b| {
        b.iter(|| clip.image().encode(&pixels).unwrap());
    });

    // MaPLe's image half: 2 tokens in 9 blocks, each projected from the text side's.
    let mut params = Params::new(1);
    let text_side = params.normal("text", (9, 2, 512), 0.02).unwrap();
    let projections: Vec<Affine> = (0..9)
        .map(|i| Affine::new(&mut params, &i.to_string(), (WIDTH, 512)).unwrap())
        .collect();
    group.bench_function("MaPLe's image half, batch 4, 2 tokens, 9 blocks", |b| {
        b.iter(|| {
            let tokens = projections.iter().enumerate().map(|(block, projection)| {
                let own = text_side.tensor().i(block).unwrap();
                Tokens::Shared(projection.forward(&own).unwrap())
            });
            let prompts = VisualPrompts::deep(tokens);
            let features = clip.image().encode_prompted(&pixels, &prompts).unwrap();
            step(&clip, &features, &text, &params);
        });
    });

    // VP with its defaults but for the batch: a learned frame of 30 pixels, from pixels to the optimiser's update.
    let names = classes(100).unwrap();
    let config = VpConfig::default();
    let mut vp = Learned::<Vp>::new(&config, &clip, &names, 1).unwrap();
    let mut optimizer = Optimizer::new(config.train.optimizer, vp.params()).unwrap();
    let names = ClassTokens::new(clip.text(), &names).unwrap();
    let labels: Vec<u32> = (0..8).collect();
    let images = ImageBatch::of_pixels(normal(&[8, 3, 224, 224]).unwrap());
    let batch = Batch {
        images: &images,
        labels: &labels,
        classes: &names,
    };
    let first = Step {
        seed: 1,
        epoch: 0,
        epochs: 1,
        index: 0,
        steps: 1,
    };
    group.bench_function("VP, batch 8, a frame of 30 pixels", |b| {
        b.iter(|| {
            let (_, gradients) = gradients(&mut vp, &clip, &batch, first).unwrap();
            // So small a rate that every iteration has the same to do.
            optimizer.step(vp.params(), &gradients, |_| 1e-9).unwrap();
        });
    });
}

criterion_group!(benches, one_thread, image_prompts);
criterion_main!(benches);
