//! The ResNet's gradient to the pixels.

use crate::plain::{Plain, Tensors, error, heads_of, linear};
use candle_core::{Device, Tensor, Var};
use cliptune_core::checkpoint::random;
use cliptune_core::rng::Rng;
use cliptune_core::{Activation, Arch, Clip, Gradients, Params, Storage, VisionArch};
use rayon::ThreadPoolBuilder;

const LAYERS: [usize; 4] = [1, 2, 1, 1];
const WIDTH: usize = 16;
const EMBED: usize = 24;

fn arch(side: usize) -> Arch {
    Arch {
        embed_dim: EMBED,
        image_resolution: side,
        vision: VisionArch::ResNet {
            layers: LAYERS,
            width: WIDTH,
        },
        context_length: 8,
        vocab_size: 8,
        text_width: 64,
        text_layers: 1,
        activation: Activation::QuickGelu,
    }
}

fn conv_bn(w: &Tensors, conv: &str, bn: &str, stride: usize, x: &Tensor) -> Plain<Tensor> {
    let kernel = &w[&format!("{conv}.weight")];
    let padding = kernel.dim(2)? / 2;
    let part = |name: &str| w[&format!("{bn}.{name}")].reshape((1, (), 1, 1));
    let scale = (part("weight")? / (part("running_var")? + 1e-5)?.sqrt()?)?;
    x.conv2d(kernel, padding, stride, 1, 1)?
        .broadcast_sub(&part("running_mean")?)?
        .broadcast_mul(&scale)?
        .broadcast_add(&part("bias")?)
}

fn bottleneck(w: &Tensors, name: &str, pool: usize, x: &Tensor) -> Plain<Tensor> {
    let conv = |i: usize, x: &Tensor| {
        conv_bn(
            w,
            &format!("{name}.conv{i}"),
            &format!("{name}.bn{i}"),
            1,
            x,
        )
    };
    let pooled = |x: &Tensor| match pool {
        1 => Ok(x.clone()),
        pool => x.avg_pool2d(pool),
    };
    let y = conv(2, &conv(1, x)?.relu()?)?.relu()?;
    let y = conv(3, &pooled(&y)?)?;
    let down = format!("{name}.downsample");
    let past = match w.contains_key(&format!("{down}.0.weight")) {
        true => conv_bn(
            w,
            &format!("{down}.0"),
            &format!("{down}.1"),
            1,
            &pooled(x)?,
        )?,
        false => x.clone(),
    };
    (y + past)?.relu()
}

/// `(batch, 1 + h·w, embed_dim)`, the pooled feature first.
fn features(w: &Tensors, pixels: &Tensor) -> Plain<Tensor> {
    let mut x = pixels.clone();
    for i in 1..4 {
        let (conv, bn) = (format!("visual.conv{i}"), format!("visual.bn{i}"));
        x = conv_bn(w, &conv, &bn, if i == 1 { 2 } else { 1 }, &x)?.relu()?;
    }
    x = x.avg_pool2d(2)?;
    for (stage, blocks) in LAYERS.into_iter().enumerate() {
        for block in 0..blocks {
            let pool = if stage > 0 && block == 0 { 2 } else { 1 };
            x = bottleneck(w, &format!("visual.layer{}.{block}", stage + 1), pool, &x)?;
        }
    }
    let x = x.flatten_from(2)?.transpose(1, 2)?.contiguous()?;
    let x = Tensor::cat(&[&x.mean_keepdim(1)?, &x], 1)?
        .broadcast_add(&w["visual.attnpool.positional_embedding"])?;
    let name = "visual.attnpool.";
    let part = |which: &str| {
        let (weight, bias) = (format!("{which}.weight"), format!("{which}.bias"));
        linear(w, name, &weight, &bias, &x)
    };
    let mixed = heads_of(&part("q_proj")?, &part("k_proj")?, &part("v_proj")?, None)?;
    linear(w, name, "c_proj.weight", "c_proj.bias", &mixed)
}

#[test]
fn the_gradient_to_the_pixels_equals_the_plain_one() -> cliptune_core::Result<()> {
    for (side, batch) in [(64, 3), (96, 1)] {
        let checkpoint = random(&arch(side), 7)?;
        let w = checkpoint.tensors.clone();
        let clip = Clip::from_checkpoint(checkpoint, Storage::F32)?;
        let mut rng = Rng::stream(7, "judge", &[]);
        let mut draw = |shape: &[usize]| -> Plain<Tensor> {
            let values = rng.normal(shape.iter().product());
            let values: Vec<f32> = values.into_iter().map(|x| x as f32).collect();
            Tensor::from_vec(values, shape, &Device::Cpu)
        };
        let pixels = draw(&[batch, 3, side, side])?;
        let var = Var::from_tensor(&pixels)?;
        let every = features(&w, var.as_tensor())?;
        for dense in [false, true] {
            let theirs = match dense {
                true => every.clone(),
                false => every.narrow(1, 0, 1)?.squeeze(1)?,
            };
            let weights = draw(theirs.dims())?;
            let store = (&theirs * &weights)?.sum_all()?.backward()?;
            let theirs_back = store.get(var.as_tensor()).cloned();
            let mut bits = Vec::new();
            for threads in [1, 2, 4] {
                let pool = ThreadPoolBuilder::new().num_threads(threads).build();
                let pool = pool.map_err(|e| cliptune_core::Error::Data(e.to_string()))?;
                let (ours, back) = pool.install(|| -> cliptune_core::Result<_> {
                    let mut params = Params::new(0);
                    let learned = params.copied("pixels", &pixels)?;
                    let ours = match dense {
                        true => clip.image().encode_dense(learned.tensor())?,
                        false => clip.image().encode(learned.tensor())?,
                    };
                    let loss = (&ours * &weights)?.sum_all()?;
                    let back = Gradients::of(&loss, &params)?.get("pixels").cloned();
                    Ok((ours, back))
                })?;
                let (Some(back), Some(theirs_back)) = (back, &theirs_back) else {
                    panic!("a gradient is missing");
                };
                let (forward, backward) = (error(&ours, &theirs)?, error(&back, theirs_back)?);
                assert!(forward < 1e-5 && backward < 1e-5, "{forward} {backward}");
                let values = back.flatten_all()?.to_vec1::<f32>()?;
                bits.push(values.into_iter().map(f32::to_bits).collect::<Vec<_>>());
            }
            assert!(bits.iter().all(|b| *b == bits[0]));
        }
    }
    Ok(())
}
