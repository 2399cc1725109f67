//! A small random CLIP, and what every method's tests ask of it.

// Each test reads a part of it.
#![allow(dead_code)]

use std::collections::BTreeMap;

use candle_core::{Device, Tensor};
use cliptune_core::checkpoint::random;
use cliptune_core::method::Predictor;
use cliptune_core::prompt::ClassTokens;
use cliptune_core::rng::Rng;
use cliptune_core::train::{Batch, Objective, Step, gradients};
use cliptune_core::{
    Activation, Arch, Classes, Clip, Error, Gradients, ImageBatch, Learned, Result, Storage,
    VisionArch,
};

pub(crate) const BLOCKS: usize = 3;

pub(crate) fn clip_with(vision: VisionArch) -> Result<Clip> {
    let arch = Arch {
        embed_dim: 32,
        image_resolution: 32,
        vision,
        context_length: 77,
        vocab_size: 49_408,
        text_width: 64,
        text_layers: BLOCKS,
        activation: Activation::QuickGelu,
    };
    Clip::from_checkpoint(random(&arch, 1)?, Storage::F32)
}

pub(crate) fn clip() -> Result<Clip> {
    clip_with(VisionArch::Vit {
        layers: BLOCKS,
        width: 128,
        patch_size: 16,
    })
}

pub(crate) fn classes() -> Result<Classes> {
    Classes::new(["daisy", "common_sunflower"].map(String::from).to_vec())
}

pub(crate) fn pixels(n: usize) -> Result<Tensor> {
    let values = Rng::stream(5, "pixels", &[]).normal(n * 3 * 32 * 32);
    let values: Vec<f32> = values.into_iter().map(|x| x as f32).collect();
    Ok(Tensor::from_vec(values, (n, 3, 32, 32), &Device::Cpu)?)
}

pub(crate) fn largest(t: &Tensor) -> Result<f32> {
    Ok(t.abs()?.max_all()?.to_scalar::<f32>()?)
}

pub(crate) fn close(a: &Tensor, b: &Tensor) -> Result<bool> {
    Ok(largest(&(a - b)?)? < 1e-5 * largest(b)?)
}

/// Loss and gradients on three pictures.
pub(crate) fn step<O: Objective>(method: &mut Learned<O>, clip: &Clip) -> Result<(f64, Gradients)> {
    let classes = ClassTokens::new(clip.text(), &classes()?)?;
    let images = ImageBatch::encode(clip, &pixels(3)?, method.needs())?;
    let batch = Batch {
        images: &images,
        labels: &[0, 1, 0],
        classes: &classes,
    };
    let step = Step {
        seed: 0,
        epoch: 0,
        epochs: 1,
        index: 0,
        steps: 1,
    };
    let (loss, gradients) = gradients(method, clip, &batch, step)?;
    Ok((f64::from(loss.total.to_scalar::<f32>()?), gradients))
}

/// Every learned tensor gets a gradient, and its length is the slope of the loss along it.
pub(crate) fn gradients_are_slopes<O: Objective>(
    method: &mut Learned<O>,
    clip: &Clip,
) -> Result<()> {
    let (_, gradients) = step(method, clip)?;
    let start: BTreeMap<String, Tensor> = method.params().tensors()?.into_iter().collect();
    for (name, gradient) in gradients.iter() {
        let gradient = gradient.ok_or_else(|| Error::Data(format!("`{name}` gets no gradient")))?;
        let size = f64::from(gradient.sqr()?.sum_all()?.sqrt()?.to_scalar::<f32>()?);
        assert!(size > 1e-6, "the gradient of `{name}` is {size}");
        let h = 2e-3 / size.max(1e-2);
        let mut at = |sign: f64| -> Result<f64> {
            let mut moved = start.clone();
            let value = (&start[name] + (gradient * (sign * h / size))?)?;
            moved.insert(name.to_owned(), value);
            method.params().load(&moved)?;
            Ok(step(method, clip)?.0)
        };
        let slope = (at(1.0)? - at(-1.0)?) / (2.0 * h);
        method.params().load(&start)?;
        assert!(
            (slope - size).abs() < 0.03 * size + 1e-3,
            "`{name}`: slope {slope}, gradient {size}"
        );
    }
    Ok(())
}
