//! What several tests need.

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::{Device, Tensor};
use cliptune_core::rng::Rng;
use cliptune_core::{Activation, Arch, Checkpoint, Clip, Preprocess, Storage, VisionArch};

pub(crate) type TestResult<T = ()> = Result<T, Box<dyn std::error::Error>>;

/// Writes a picture that differs for every `seed`.
pub(crate) fn write_picture(path: &Path, seed: u8, (width, height): (usize, usize)) {
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    let mut image = image::RgbImage::new(width as u32, height as u32);
    for (x, y, pixel) in image.enumerate_pixels_mut() {
        let v = |a: u32, b: u32| (x * a + y * b + u32::from(seed) * 37) as u8;
        *pixel = image::Rgb([v(3, 5), v(7, 1), seed]);
    }
    image.save(path).unwrap();
}

/// Writes a text file.
pub(crate) fn write_text(path: &Path, text: &str) {
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    cliptune_core::files::write_atomically(path, |w| w.write_all(text.as_bytes())).unwrap();
}

/// A ViT of one block on 16 × 16 pixels with random weights.
pub(crate) fn tiny_clip(seed: u64) -> Clip {
    let (w, d) = (64, 8);
    let arch = Arch {
        embed_dim: d,
        image_resolution: 16,
        vision: VisionArch::Vit {
            layers: 1,
            width: w,
            patch_size: 8,
        },
        context_length: 8,
        vocab_size: 16,
        text_width: w,
        text_layers: 1,
        activation: Activation::QuickGelu,
    };
    let mut shapes: Vec<(String, Vec<usize>)> = vec![
        ("logit_scale".into(), vec![]),
        ("token_embedding.weight".into(), vec![16, w]),
        ("positional_embedding".into(), vec![8, w]),
        ("text_projection".into(), vec![w, d]),
        ("visual.proj".into(), vec![w, d]),
        ("visual.conv1.weight".into(), vec![w, 3, 8, 8]),
        ("visual.class_embedding".into(), vec![w]),
        ("visual.positional_embedding".into(), vec![5, w]),
    ];
    let mut block = |prefix: &str| {
        for norm in ["ln_1", "ln_2"] {
            shapes.push((format!("{prefix}.{norm}.weight"), vec![w]));
            shapes.push((format!("{prefix}.{norm}.bias"), vec![w]));
        }
        let linears = [
            ("attn.in_proj_weight", "attn.in_proj_bias", 3 * w, w),
            ("attn.out_proj.weight", "attn.out_proj.bias", w, w),
            ("mlp.c_fc.weight", "mlp.c_fc.bias", 4 * w, w),
            ("mlp.c_proj.weight", "mlp.c_proj.bias", w, 4 * w),
        ];
        for (weight, bias, out, input) in linears {
            shapes.push((format!("{prefix}.{weight}"), vec![out, input]));
            shapes.push((format!("{prefix}.{bias}"), vec![out]));
        }
    };
    block("transformer.resblocks.0");
    block("visual.transformer.resblocks.0");
    for norm in ["ln_final", "visual.ln_pre", "visual.ln_post"] {
        shapes.push((format!("{norm}.weight"), vec![w]));
        shapes.push((format!("{norm}.bias"), vec![w]));
    }
    let tensor = |(name, shape): (String, Vec<usize>)| {
        let mut rng = Rng::stream(seed, &name, &[]);
        let values = rng.normal(shape.iter().product());
        let values: Vec<f32> = values.into_iter().map(|v| 0.2 * v as f32).collect();
        let tensor = Tensor::from_vec(values, shape, &Device::Cpu).unwrap();
        (name, tensor)
    };
    let tensors: BTreeMap<String, Tensor> = shapes.into_iter().map(tensor).collect();
    let checkpoint = Checkpoint {
        path: "tiny".into(),
        arch,
        preprocess: Preprocess::openai(16),
        tensors,
    };
    Clip::from_checkpoint(checkpoint, Storage::F32).unwrap()
}
