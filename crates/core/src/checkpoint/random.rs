//! Weights as CLIP's training starts from them.

use std::path::PathBuf;

use candle_core::{Device, Tensor};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};
use rayon::prelude::*;

use super::{Checkpoint, expected_tensors};
use crate::{Arch, Error, Preprocess, Result, VisionArch};

/// Random f32 weights of an architecture, drawn as openai/CLIP's `initialize_parameters` does.
///
/// Normal with its standard deviations (the image tower's transformer like the text tower's, convolutions `fan_in^-1/2`), LayerNorm and BatchNorm the identity, except that each ResNet block's last BatchNorm has weight 0; biases 0; `logit_scale` `ln(1 / 0.07)`. Each tensor has its own stream of the seeded generator, so it does not depend on what else is drawn.
///
/// # Errors
/// If a tensor's size is beyond what can be counted.
pub fn random(arch: &Arch, seed: u64) -> Result<Checkpoint> {
    let draw = |(i, (name, shape)): (usize, (String, Vec<usize>))| {
        let numel = shape.iter().try_fold(1usize, |n, d| n.checked_mul(*d));
        let numel = numel.ok_or_else(|| {
            Error::Data(format!("tensor `{name}` of shape {shape:?} is too large"))
        })?;
        let numbers = match start(arch, &name, &shape) {
            Start::Constant(value) => vec![value; numel],
            Start::Normal(std) => {
                let mut rng = ChaCha8Rng::seed_from_u64(seed);
                rng.set_stream(i as u64);
                normal(&mut rng, numel, std)
            }
        };
        Ok((name, Tensor::from_vec(numbers, shape, &Device::Cpu)?))
    };
    let expected: Vec<_> = expected_tensors(arch).into_iter().enumerate().collect();
    Ok(Checkpoint {
        path: PathBuf::from(format!("<random weights, seed {seed}>")),
        arch: arch.clone(),
        preprocess: Preprocess::openai(arch.image_resolution),
        tensors: expected.into_par_iter().map(draw).collect::<Result<_>>()?,
    })
}

enum Start {
    Constant(f32),
    Normal(f32),
}

fn start(arch: &Arch, name: &str, shape: &[usize]) -> Start {
    let image = name.starts_with("visual.");
    let (width, layers) = match arch.vision {
        VisionArch::Vit { layers, width, .. } if image => (width, layers),
        VisionArch::ResNet { width, .. } if image => (width.saturating_mul(32), 1),
        _ => (arch.text_width, arch.text_layers),
    };
    let (width, layers) = (width as f32, layers as f32);
    match name {
        "logit_scale" => return Start::Constant((1.0f32 / 0.07).ln()),
        "token_embedding.weight" => return Start::Normal(0.02),
        "positional_embedding" => return Start::Normal(0.01),
        _ => {}
    }
    if name.ends_with("bias") || name.ends_with("running_mean") {
        return Start::Constant(0.0);
    }
    if name.starts_with("visual.layer") && name.ends_with("bn3.weight") {
        return Start::Constant(0.0);
    }
    if shape.len() == 4 {
        let fan_in: f32 = shape.iter().skip(1).map(|&d| d as f32).product();
        return Start::Normal(fan_in.powf(-0.5));
    }
    if name.ends_with("attn.out_proj.weight") || name.ends_with("mlp.c_proj.weight") {
        return Start::Normal(width.powf(-0.5) * (2.0 * layers).powf(-0.5));
    }
    if name.ends_with("mlp.c_fc.weight") {
        return Start::Normal((2.0 * width).powf(-0.5));
    }
    // What is left with one axis: norms, and the class embedding.
    if shape.len() == 1 && name != "visual.class_embedding" {
        return Start::Constant(1.0);
    }
    Start::Normal(width.powf(-0.5))
}

/// Box and Muller's pairs.
fn normal(rng: &mut ChaCha8Rng, numel: usize, std: f32) -> Vec<f32> {
    let mut unit = || (rng.next_u32() >> 8) as f32 / (1 << 24) as f32;
    let mut numbers = Vec::with_capacity(numel + 1);
    while numbers.len() < numel {
        let radius = std * (-2.0 * (1.0 - unit()).ln()).sqrt();
        let (sin, cos) = (std::f32::consts::TAU * unit()).sin_cos();
        numbers.extend([radius * cos, radius * sin]);
    }
    numbers.truncate(numel);
    numbers
}
