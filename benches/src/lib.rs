//! What the benches share: models of published sizes with random weights.

use candle_core::{Device, Tensor};
use cliptune_core::checkpoint::random;
use cliptune_core::rng::Rng;
use cliptune_core::{Activation, Arch, Classes, Clip, Result, Storage, VisionArch};

/// A model of ViT-B/16's or RN50's sizes with random weights.
///
/// # Errors
/// Whatever the tensor library refuses.
pub fn model(vision: VisionArch, embed_dim: usize, storage: Storage) -> Result<Clip> {
    let arch = Arch {
        embed_dim,
        image_resolution: 224,
        vision,
        context_length: 77,
        vocab_size: 49_408,
        text_width: 512,
        text_layers: 12,
        activation: Activation::QuickGelu,
    };
    Clip::from_checkpoint(random(&arch, 1)?, storage)
}

/// ViT-B/16's sizes.
///
/// # Errors
/// As [`model`].
pub fn vit_b16() -> Result<Clip> {
    model(
        VisionArch::Vit {
            layers: 12,
            width: 768,
            patch_size: 16,
        },
        512,
        Storage::F16,
    )
}

/// RN50's sizes.
///
/// # Errors
/// As [`model`].
pub fn rn50() -> Result<Clip> {
    model(
        VisionArch::ResNet {
            layers: [3, 4, 6, 3],
            width: 64,
        },
        1024,
        Storage::F16,
    )
}

/// Seeded normal numbers.
///
/// # Errors
/// Whatever the tensor library refuses.
pub fn normal(shape: &[usize]) -> Result<Tensor> {
    let values = Rng::stream(1, "bench", &[]).normal(shape.iter().product());
    let values: Vec<f32> = values.into_iter().map(|x| x as f32).collect();
    Ok(Tensor::from_vec(values, shape, &Device::Cpu)?)
}

/// `n` class names of one to three words.
///
/// # Errors
/// Never; the signature follows [`Classes::new`].
pub fn classes(n: usize) -> Result<Classes> {
    const WORDS: [&str; 12] = [
        "red",
        "golden",
        "retriever",
        "motorbike",
        "orchid",
        "tiger",
        "ceiling",
        "fan",
        "sea",
        "horse",
        "apple",
        "pie",
    ];
    let name = |i: usize| {
        let words = (0..1 + i % 3).map(|k| WORDS[(i * 5 + k * 7 + i / 12) % WORDS.len()]);
        format!("{} {i}", words.collect::<Vec<_>>().join(" "))
    };
    Classes::new((0..n).map(name).collect())
}
