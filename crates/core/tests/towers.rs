//! Both towers: gradients against finite differences, the same bits on any number of threads and in any batch.

use candle_core::{DType, Device, IndexOp, Tensor};
use cliptune_core::checkpoint::random;
use cliptune_core::prompt::{Piece, Prompts};
use cliptune_core::rng::Rng;
use cliptune_core::tokenizer::{END, START};
use cliptune_core::{Activation, Arch, Clip, Gradients, Params, Result, Storage, VisionArch};
use proptest::prelude::*;

fn arch(vision: VisionArch, activation: Activation) -> Arch {
    Arch {
        embed_dim: 32,
        image_resolution: 64,
        vision,
        context_length: 24,
        vocab_size: 49_408,
        text_width: 64,
        text_layers: 2,
        activation,
    }
}

fn vit() -> VisionArch {
    VisionArch::Vit {
        layers: 2,
        width: 128,
        patch_size: 16,
    }
}

fn resnet() -> VisionArch {
    VisionArch::ResNet {
        layers: [1, 2, 1, 1],
        width: 16,
    }
}

fn clip(vision: VisionArch, activation: Activation) -> Result<Clip> {
    Clip::from_checkpoint(random(&arch(vision, activation), 3)?, Storage::F32)
}

fn normal(seed: u64, shape: &[usize], std: f64) -> Result<Tensor> {
    let values = Rng::stream(seed, "test", &[]).normal(shape.iter().product());
    let values: Vec<f32> = values.into_iter().map(|x| (x * std) as f32).collect();
    Ok(Tensor::from_vec(values, shape, &Device::Cpu)?)
}

fn bits(t: &Tensor) -> Result<Vec<u32>> {
    Ok(t.flatten_all()?
        .to_vec1::<f32>()?
        .into_iter()
        .map(f32::to_bits)
        .collect())
}

/// Three prompts of different lengths that share the learned rows in different ways.
fn prompts(ctx: &Tensor) -> Prompts {
    let mut prompts = Prompts::new();
    let source = prompts.learn(ctx);
    let learned = |rows| Piece::Learned {
        source,
        context: 0,
        rows,
    };
    prompts.push(vec![
        Piece::Words(vec![START]),
        learned(0..3),
        Piece::Words(vec![17, 400, 269, END]),
    ]);
    prompts.push(vec![
        Piece::Words(vec![START, 900]),
        learned(0..1),
        Piece::Words(vec![5]),
        learned(1..3),
        Piece::Words(vec![END]),
    ]);
    prompts.push(vec![
        Piece::Words(vec![START, 31, 32, 33, 34]),
        learned(0..2),
        Piece::Words(vec![269, END]),
    ]);
    prompts
}

/// `Σ w · features` and its gradient with respect to the context.
fn weighted(clip: &Clip, ctx: &Tensor, weights: &Tensor) -> Result<(f64, Tensor)> {
    let mut params = Params::new(0);
    let param = params.copied("ctx", ctx)?;
    let loss = (clip.text().encode(&prompts(param.tensor()))? * weights)?.sum_all()?;
    let gradients = Gradients::of(&loss, &params)?;
    let gradient = gradients
        .get("ctx")
        .cloned()
        .ok_or(cliptune_core::Error::Cancelled)?;
    Ok((f64::from(loss.to_scalar::<f32>()?), gradient))
}

#[test]
fn the_text_gradient_agrees_with_finite_differences() -> Result<()> {
    for activation in [Activation::QuickGelu, Activation::Gelu] {
        let clip = clip(vit(), activation)?;
        let (ctx, weights) = (normal(1, &[3, 64], 0.5)?, normal(2, &[3, 32], 1.0)?);
        let (_, gradient) = weighted(&clip, &ctx, &weights)?;
        for direction in 0..4 {
            let d = normal(10 + direction, &[3, 64], 1.0)?;
            let h = 1e-2;
            let at =
                |sign: f64| weighted(&clip, &(&ctx + (&d * (sign * h))?)?, &weights).map(|r| r.0);
            let numeric = (at(1.0)? - at(-1.0)?) / (2.0 * h);
            let analytic = f64::from((&gradient * &d)?.sum_all()?.to_scalar::<f32>()?);
            assert!(
                (numeric - analytic).abs() < 2e-3 * (1.0 + numeric.abs()),
                "{activation:?}: {numeric} {analytic}"
            );
        }
    }
    Ok(())
}

#[test]
fn the_same_bits_on_any_number_of_threads() -> Result<()> {
    let pixels = normal(5, &[5, 3, 64, 64], 1.0)?;
    let (ctx, weights) = (normal(1, &[3, 64], 0.5)?, normal(2, &[3, 32], 1.0)?);
    let mut results = Vec::new();
    // Of five images: one thread has several, each has one, several share one.
    for threads in [1, 2, 5, 7] {
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .build()
            .map_err(|_| cliptune_core::Error::Cancelled)?;
        results.push(pool.install(|| -> Result<_> {
            let (vit, resnet) = (
                clip(vit(), Activation::Gelu)?,
                clip(resnet(), Activation::QuickGelu)?,
            );
            let (loss, gradient) = weighted(&vit, &ctx, &weights)?;
            Ok((
                loss.to_bits(),
                bits(&gradient)?,
                bits(&vit.image().encode(&pixels)?)?,
                bits(&resnet.image().encode_dense(&pixels)?)?,
            ))
        })?);
    }
    assert!(results.iter().all(|r| *r == results[0]));
    Ok(())
}

#[test]
fn an_image_has_the_same_feature_in_any_batch() -> Result<()> {
    let pixels = normal(5, &[6, 3, 64, 64], 1.0)?;
    for vision in [vit(), resnet()] {
        let clip = clip(vision, Activation::QuickGelu)?;
        let all = clip.image().encode(&pixels)?;
        for i in 0..6 {
            let alone = clip.image().encode(&pixels.i(i..=i)?)?;
            assert_eq!(
                bits(&alone)?,
                bits(&all.i(i..=i)?)?,
                "image {i} of {}",
                clip.arch().name()
            );
        }
        let (global, dense) = (
            clip.image().encode(&pixels)?,
            clip.image().encode_dense(&pixels)?,
        );
        let difference = (global - dense.i((.., 0))?)?
            .abs()?
            .max_all()?
            .to_scalar::<f32>()?;
        assert!(difference < 1e-5, "{difference}");
    }
    Ok(())
}

/// `|a − b|` over the largest magnitude of `b`.
fn difference(a: &Tensor, b: &Tensor) -> Result<f32> {
    assert_eq!(a.dims(), b.dims());
    let largest = |t: &Tensor| t.abs()?.max_all()?.to_scalar::<f32>();
    Ok(largest(&(a - b)?)? / largest(b)?)
}

/// The towers whose weights are learned run layer by layer: the judge of the plain loops.
#[test]
fn the_frozen_transformer_equals_the_learned_one() -> Result<()> {
    // Few tokens and many, a patch with more pixels than the tower is wide.
    for (patch_size, width) in [(16, 128), (4, 64), (32, 64)] {
        let vision = VisionArch::Vit {
            layers: 2,
            width,
            patch_size,
        };
        let arch = arch(vision, Activation::QuickGelu);
        let frozen = Clip::from_checkpoint(random(&arch, 3)?, Storage::F32)?;
        let learned = Clip::learned(random(&arch, 3)?, &mut Params::new(0))?;
        let pixels = normal(5, &[3, 3, 64, 64], 1.0)?;
        let (found, wanted) = (
            frozen.image().encode(&pixels)?,
            learned.image().encode(&pixels)?,
        );
        let off = difference(&found, &wanted)?;
        assert!(off < 1e-5, "{patch_size}: {off}");
        let (found, wanted) = (
            frozen.image().encode_dense(&pixels)?,
            learned.image().encode_dense(&pixels)?,
        );
        let off = difference(&found, &wanted)?;
        assert!(off < 1e-5, "{patch_size}, every token: {off}");
    }
    Ok(())
}

#[test]
fn half_storage_computes_with_the_rounded_weights() -> Result<()> {
    let pixels = normal(5, &[2, 3, 64, 64], 1.0)?;
    for vision in [vit(), resnet()] {
        let arch = arch(vision, Activation::QuickGelu);
        for (dtype, storage) in [(DType::F16, Storage::F16), (DType::BF16, Storage::Bf16)] {
            // Weights that are exact in the narrow type give the same bits however they are kept.
            let mut rounded = random(&arch, 3)?;
            for (_, tensor) in rounded.tensors.iter_mut() {
                *tensor = tensor.to_dtype(dtype)?.to_dtype(DType::F32)?;
            }
            let mut again = random(&arch, 3)?;
            again.tensors = rounded.tensors.clone();
            let (wide, narrow) = (
                Clip::from_checkpoint(rounded, Storage::F32)?,
                Clip::from_checkpoint(again, storage)?,
            );
            assert_eq!(
                bits(&wide.image().encode(&pixels)?)?,
                bits(&narrow.image().encode(&pixels)?)?
            );
            let ctx = normal(1, &[3, 64], 0.5)?;
            assert_eq!(
                bits(&wide.text().encode(&prompts(&ctx))?)?,
                bits(&narrow.text().encode(&prompts(&ctx))?)?
            );
            // Weights that are not exact in 16 bits take twice the room as they are.
            let exact = Clip::from_checkpoint(random(&arch, 3)?, Storage::F32)?;
            assert!(narrow.bytes() < exact.bytes() * 6 / 10);
        }
    }
    Ok(())
}

#[test]
fn a_gradient_through_hidden_states_is_refused_not_dropped() -> Result<()> {
    let clip = clip(resnet(), Activation::QuickGelu)?;
    let mut params = Params::new(0);
    let pixels = params.copied("pixels", &normal(5, &[1, 3, 64, 64], 1.0)?)?;
    let refused = clip
        .image()
        .last_stage(pixels.tensor())
        .unwrap_err()
        .to_string();
    assert!(refused.contains("no gradient"), "{refused}");
    Ok(())
}

#[test]
fn pixels_of_another_size_are_refused() -> Result<()> {
    let clip = clip(vit(), Activation::QuickGelu)?;
    let refused = clip
        .image()
        .encode(&normal(5, &[1, 3, 32, 32], 1.0)?)
        .unwrap_err()
        .to_string();
    assert_eq!(
        refused,
        "batch of images has shape [1, 3, 32, 32], expected [1, 3, 64, 64]"
    );
    Ok(())
}

#[test]
fn the_feature_is_taken_at_the_first_end_token() -> Result<()> {
    let clip = clip(vit(), Activation::QuickGelu)?;
    let encode = |ids: &[u32]| clip.text().encode(&Prompts::of_tokens([ids.to_vec()]));
    assert_eq!(
        bits(&encode(&[START, 5, END])?)?,
        bits(&encode(&[START, 5, END, 7, END])?)?
    );
    let refused = encode(&[5; 25]).unwrap_err().to_string();
    assert!(
        refused.contains("needs 25 tokens, the text tower takes 24"),
        "{refused}"
    );
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]

    #[test]
    fn a_prompt_does_not_feel_its_neighbours(lengths in prop::collection::vec(0usize..20, 1..5), seed in 0u64..100) {
        let clip = clip(vit(), Activation::QuickGelu)?;
        let mut rng = Rng::stream(seed, "tokens", &[]);
        let rows: Vec<Vec<u32>> = lengths.iter().map(|&n| {
            let words = (0..n).map(|_| rng.below(49_000) as u32);
            std::iter::once(START).chain(words).chain([END]).collect()
        }).collect();
        let together = clip.text().encode(&Prompts::of_tokens(rows.clone()))?;
        for (i, row) in rows.into_iter().enumerate() {
            let alone = clip.text().encode(&Prompts::of_tokens([row]))?;
            let difference = (together.i(i..=i)? - &alone)?.abs()?.max_all()?.to_scalar::<f32>()?;
            let size = alone.abs()?.max_all()?.to_scalar::<f32>()?;
            prop_assert!(difference <= 1e-5 * size, "{difference} of {size}");
        }
    }
}
