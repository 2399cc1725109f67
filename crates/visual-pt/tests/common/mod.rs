//! Small random CLIPs and pictures.

#![allow(clippy::unwrap_used)]
#![allow(dead_code)] // Each test file needs its part.

use std::collections::BTreeMap;
use std::sync::Arc;

use candle_core::{Device, Tensor};
use cliptune_core::checkpoint::random;
use cliptune_core::rng::Rng;
use cliptune_core::task::{MemoryImages, Split, Train};
use cliptune_core::train::{Objective, Step};
use cliptune_core::{
    Activation, Arch, Checkpoint, Classes, Clip, Error, Gradients, Labelled, Learned, Result,
    Storage, VisionArch,
};

pub(crate) const SIDE: usize = 32;
pub(crate) const WIDTH: usize = 128;
pub(crate) const BLOCKS: usize = 3;

/// The only step of a run.
pub(crate) const STEP: Step = Step {
    seed: 0,
    epoch: 0,
    epochs: 1,
    index: 0,
    steps: 1,
};

pub(crate) const VIT: VisionArch = VisionArch::Vit {
    layers: BLOCKS,
    width: WIDTH,
    patch_size: 16,
};

pub(crate) const RESNET: VisionArch = VisionArch::ResNet {
    layers: [1, 1, 1, 1],
    width: 16,
};

pub(crate) fn weights(vision: VisionArch, seed: u64) -> Result<Checkpoint> {
    let arch = Arch {
        embed_dim: 32,
        image_resolution: SIDE,
        vision,
        context_length: 77,
        vocab_size: 49_408,
        text_width: 64,
        text_layers: 1,
        activation: Activation::QuickGelu,
    };
    random(&arch, seed)
}

pub(crate) fn clip_with(vision: VisionArch) -> Result<Clip> {
    Clip::from_checkpoint(weights(vision, 1)?, Storage::F32)
}

pub(crate) fn clip() -> Result<Clip> {
    clip_with(VIT)
}

pub(crate) fn named(names: &[&str]) -> Result<Classes> {
    Classes::new(names.iter().map(|name| (*name).to_owned()).collect())
}

pub(crate) fn classes() -> Result<Classes> {
    named(&["daisy", "common_sunflower", "lily"])
}

pub(crate) fn pixels(n: usize) -> Result<Tensor> {
    let values = Rng::stream(5, "pixels", &[]).normal(n * 3 * SIDE * SIDE);
    let values: Vec<f32> = values.into_iter().map(|x| x as f32).collect();
    Ok(Tensor::from_vec(values, (n, 3, SIDE, SIDE), &Device::Cpu)?)
}

/// `n` pictures with the labels 0, 1, 2, 0, ...
pub(crate) fn split(n: usize) -> Result<Split<Train>> {
    let source = Arc::new(MemoryImages::new(pixels(n)?));
    Split::new(source, (0..n).map(|i| (i, (i % 3) as u32)).collect())
}

pub(crate) fn data(n: usize) -> Result<Labelled> {
    Ok(Labelled {
        train: split(n)?,
        val: None,
        classes: classes()?,
    })
}

pub(crate) fn largest(t: &Tensor) -> Result<f32> {
    Ok(t.abs()?.max_all()?.to_scalar::<f32>()?)
}

pub(crate) fn close(a: &Tensor, b: &Tensor) -> Result<bool> {
    Ok(largest(&(a - b)?)? <= 1e-5 * largest(b)?)
}

pub(crate) fn rows(t: &Tensor) -> Result<Vec<Vec<f32>>> {
    Ok(t.detach().to_vec2()?)
}

/// Every learned tensor gets a gradient, and its length is the slope of the loss along it.
pub(crate) fn gradients_are_slopes<O: Objective>(
    method: &mut Learned<O>,
    step: impl Fn(&mut Learned<O>) -> Result<(f64, Gradients)>,
) -> Result<()> {
    let (_, gradients) = step(method)?;
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
            Ok(step(method)?.0)
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
