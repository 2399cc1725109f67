//! What several tests need.

use std::path::Path;

use cliptune_core::{Activation, Arch, Clip, Storage, VisionArch, checkpoint};

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
    let checkpoint = checkpoint::random(&arch, seed).unwrap();
    Clip::from_checkpoint(checkpoint, Storage::F32).unwrap()
}
