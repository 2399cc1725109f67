//! Towers that are trained themselves: the same numbers as the frozen ones, and a gradient for every weight.

use candle_core::{DType, Device, Tensor};
use cliptune_core::clip::Glimpses;
use cliptune_core::prompt::{Piece, Prompts};
use cliptune_core::rng::Rng;
use cliptune_core::tokenizer::{END, START};
use cliptune_core::{
    Activation, Arch, Checkpoint, Clip, Gradients, Params, Result, Storage, VisionArch, checkpoint,
};

fn arch() -> Arch {
    Arch {
        embed_dim: 16,
        image_resolution: 16,
        vision: VisionArch::Vit {
            layers: 2,
            width: 64,
            patch_size: 4,
        },
        context_length: 12,
        vocab_size: 49_408,
        text_width: 64,
        text_layers: 2,
        activation: Activation::QuickGelu,
    }
}

/// Random weights with norms and biases that are not the identity.
fn weights() -> Result<Checkpoint> {
    let mut checkpoint = checkpoint::random(&arch(), 3)?;
    for (name, tensor) in &mut checkpoint.tensors {
        if tensor.rank() == 1 {
            let noise = normal(tensor.elem_count(), name)?;
            *tensor = (&*tensor + (noise * 0.1)?)?;
        }
    }
    Ok(checkpoint)
}

fn normal(n: usize, purpose: &str) -> Result<Tensor> {
    let values: Vec<f32> = Rng::stream(5, purpose, &[])
        .normal(n)
        .into_iter()
        .map(|x| x as f32)
        .collect();
    Ok(Tensor::from_vec(values, n, &Device::Cpu)?)
}

fn pixels(batch: usize) -> Result<Tensor> {
    Ok(normal(batch * 3 * 16 * 16, "pixels")?.reshape((batch, 3, 16, 16))?)
}

fn prompts(table: &Tensor) -> Prompts {
    let mut prompts = Prompts::new();
    let source = prompts.learn(table);
    for words in [&[0, 2, 1][..], &[2, 2, 0, 1]] {
        let mut pieces = vec![Piece::Words(vec![START])];
        pieces.extend(words.iter().map(|&row| Piece::Learned {
            source,
            context: 0,
            rows: row..row + 1,
        }));
        prompts.push(pieces);
    }
    prompts
}

fn difference(a: &Tensor, b: &Tensor) -> Result<f32> {
    let scale = b.abs()?.max_all()?.to_scalar::<f32>()?;
    Ok((a - b)?.abs()?.max_all()?.to_scalar::<f32>()? / scale)
}

#[test]
fn learned_towers_compute_what_frozen_ones_do() -> Result<()> {
    let frozen = Clip::from_checkpoint(weights()?, Storage::F32)?;
    let learned = Clip::learned(weights()?, &mut Params::new(0))?;
    let pixels = pixels(2)?;
    let image = |clip: &Clip| clip.image().encode(&pixels);
    assert!(difference(&image(&learned)?, &image(&frozen)?)? < 1e-5);
    let ids = [vec![START, 320, END], vec![START, 1125, 539, END]];
    let text = |clip: &Clip| clip.text().encode(&Prompts::of_tokens(ids.clone()));
    assert!(difference(&text(&learned)?, &text(&frozen)?)? < 1e-5);
    Ok(())
}

#[test]
fn glimpses_of_everything_give_the_class_feature_and_ignore_other_patches() -> Result<()> {
    let clip = Clip::from_checkpoint(weights()?, Storage::F32)?;
    let pixels = pixels(3)?;
    let all = clip
        .image()
        .encode_glimpses(&pixels, &Glimpses::everything(3, 16))?;
    assert_eq!(all.dims(), [3 + 48, 16]);
    let class = clip.image().encode(&pixels)?;
    assert!(difference(&all.narrow(0, 0, 3)?, &class)? < 1e-5);
    // What is not kept cannot matter.
    let seen = Glimpses {
        kept: vec![vec![1, 7, 9]; 3],
        values: vec![(2, 1)],
    };
    let glimpse = clip.image().encode_glimpses(&pixels, &seen)?;
    let blank = pixels.narrow(2, 0, 4)?.zeros_like()?;
    // Row 0 of the grid but patch 1: its pixels are columns 4 to 7.
    let top = Tensor::cat(
        &[
            &blank.narrow(3, 0, 4)?,
            &pixels.narrow(2, 0, 4)?.narrow(3, 4, 4)?,
            &blank.narrow(3, 0, 8)?,
        ],
        3,
    )?;
    let changed = Tensor::cat(&[&top, &pixels.narrow(2, 4, 12)?], 2)?;
    let again = clip.image().encode_glimpses(&changed, &seen)?;
    assert_eq!(
        glimpse.flatten_all()?.to_vec1::<f32>()?,
        again.flatten_all()?.to_vec1::<f32>()?
    );
    Ok(())
}

#[test]
fn every_weight_gets_the_gradient_of_finite_differences() -> Result<()> {
    let mut params = Params::new(0);
    let clip = Clip::learned(weights()?, &mut params)?;
    let table = params.copied(
        "table",
        &(normal(3 * 64, "table")?.reshape((3, 64))? * 0.1)?,
    )?;
    let (pixels, probe) = (pixels(2)?, normal(7 * 16, "probe")?.reshape((7, 16))?);
    let seen = Glimpses {
        kept: vec![vec![0, 5, 6, 15], vec![2, 3, 8, 9]],
        values: vec![(0, 1), (1, 0), (1, 3)],
    };
    let loss = || -> Result<Tensor> {
        let image = clip.image().encode_glimpses(&pixels, &seen)?;
        let text = clip.text().encode(&prompts(table.tensor()))?;
        Ok((Tensor::cat(&[&image, &text], 0)? * &probe)?.sum_all()?)
    };
    let value = || -> Result<f64> { Ok(loss()?.to_dtype(DType::F64)?.to_scalar()?) };
    let gradients = Gradients::of(&loss()?, &params)?;
    let start: std::collections::BTreeMap<_, _> = params.tensors()?.into_iter().collect();
    for (name, gradient) in gradients.iter() {
        let gradient = gradient.unwrap_or_else(|| panic!("`{name}` got no gradient"));
        let direction = normal(gradient.elem_count(), name)?.reshape(gradient.shape())?;
        let expected = (gradient * &direction)?.sum_all()?.to_dtype(DType::F64)?;
        let expected = expected.to_scalar::<f64>()?;
        let step = 2e-3;
        let mut moved = [0.0; 2];
        for (moved, sign) in moved.iter_mut().zip([1.0, -1.0]) {
            let mut tensors = start.clone();
            tensors.insert(
                name.to_owned(),
                (&start[name] + (&direction * (sign * step))?)?,
            );
            params.load(&tensors)?;
            *moved = value()?;
        }
        params.load(&start)?;
        let measured = (moved[0] - moved[1]) / (2.0 * step);
        let scale = gradient.sqr()?.sum_all()?.sqrt()?.to_scalar::<f32>()?;
        let error = (measured - expected).abs() / f64::from(scale);
        assert!(
            error < 0.03,
            "`{name}`: {measured} against {expected}, scale {scale}"
        );
    }
    Ok(())
}
