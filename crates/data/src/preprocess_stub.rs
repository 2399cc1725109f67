//! Stands in for core's preprocessing.
#![allow(missing_docs)]

use candle_core::{Device, Tensor};
use cliptune_core::rng::Rng;
use cliptune_core::{Preprocess, Result};

pub struct Pixels {
    pub width: usize,
    pub height: usize,
    pub rgb: Vec<u8>,
}

fn crop(p: &Pixels, preprocess: &Preprocess, (x0, y0): (usize, usize)) -> Result<Tensor> {
    let s = preprocess.resolution;
    let mut out = Vec::with_capacity(3 * s * s);
    for c in 0..3 {
        for y in 0..s {
            for x in 0..s {
                let (x, y) = (
                    (x + x0) * p.width / (s + x0),
                    (y + y0) * p.height / (s + y0),
                );
                let v = f32::from(p.rgb.get((y * p.width + x) * 3 + c).copied().unwrap_or(0));
                out.push((v / 255. - preprocess.mean[c]) / preprocess.std[c]);
            }
        }
    }
    Ok(Tensor::from_vec(out, (3, s, s), &Device::Cpu)?)
}

pub fn fixed_view(pixels: &Pixels, preprocess: &Preprocess) -> Result<Tensor> {
    crop(pixels, preprocess, (0, 0))
}

pub fn random_view(pixels: &Pixels, preprocess: &Preprocess, rng: &mut Rng) -> Result<Tensor> {
    crop(pixels, preprocess, (rng.below(64), rng.below(64)))
}
