//! Which tensors an architecture has, and which architecture a set of tensors is.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use crate::arch::HEAD_WIDTH;
use crate::{Activation, Arch, Error, Result, VisionArch};

/// Name and shape of every tensor by OpenAI's state-dict keys, in the order of their modules.
type Shapes = Vec<(String, Vec<usize>)>;

/// Every tensor of an architecture: OpenAI's state-dict key and shape.
///
/// Linear weights are `(out, in)`, convolutions `(out, in, height, width)`; `visual.proj` is `(vision width, embed_dim)`, `text_projection` `(text_width, embed_dim)`, `logit_scale` a scalar.
pub fn expected_tensors(arch: &Arch) -> Vec<(String, Vec<usize>)> {
    let mut out = Shapes::new();
    let embed = arch.embed_dim;
    let mut add = |name: &str, shape: &[usize]| out.push((name.to_owned(), shape.to_vec()));
    add(
        "positional_embedding",
        &[arch.context_length, arch.text_width],
    );
    add("text_projection", &[arch.text_width, embed]);
    add("logit_scale", &[]);
    match arch.vision {
        VisionArch::Vit {
            layers,
            width,
            patch_size,
        } => {
            let grid = arch.image_resolution.checked_div(patch_size).unwrap_or(0);
            add("visual.class_embedding", &[width]);
            add(
                "visual.positional_embedding",
                &[grid.saturating_mul(grid).saturating_add(1), width],
            );
            add("visual.proj", &[width, embed]);
            add("visual.conv1.weight", &[width, 3, patch_size, patch_size]);
            norm(&mut out, "visual.ln_pre", width);
            transformer(&mut out, "visual.transformer", layers, width);
            norm(&mut out, "visual.ln_post", width);
        }
        VisionArch::ResNet { layers, width } => {
            resnet(&mut out, layers, width, arch.image_resolution / 32, embed)
        }
    }
    transformer(&mut out, "transformer", arch.text_layers, arch.text_width);
    out.push((
        "token_embedding.weight".to_owned(),
        vec![arch.vocab_size, arch.text_width],
    ));
    norm(&mut out, "ln_final", arch.text_width);
    out
}

fn norm(out: &mut Shapes, name: &str, width: usize) {
    out.push((format!("{name}.weight"), vec![width]));
    out.push((format!("{name}.bias"), vec![width]));
}

fn linear(out: &mut Shapes, name: &str, to: usize, from: usize) {
    out.push((format!("{name}.weight"), vec![to, from]));
    out.push((format!("{name}.bias"), vec![to]));
}

fn transformer(out: &mut Shapes, name: &str, layers: usize, width: usize) {
    let wide = |times: usize| width.saturating_mul(times);
    for i in 0..layers {
        let block = format!("{name}.resblocks.{i}");
        out.push((format!("{block}.attn.in_proj_weight"), vec![wide(3), width]));
        out.push((format!("{block}.attn.in_proj_bias"), vec![wide(3)]));
        linear(out, &format!("{block}.attn.out_proj"), width, width);
        norm(out, &format!("{block}.ln_1"), width);
        linear(out, &format!("{block}.mlp.c_fc"), wide(4), width);
        linear(out, &format!("{block}.mlp.c_proj"), width, wide(4));
        norm(out, &format!("{block}.ln_2"), width);
    }
}

fn resnet(out: &mut Shapes, layers: [usize; 4], width: usize, grid: usize, embed: usize) {
    let mut conv = |conv: String, bn: String, to: usize, from: usize, side: usize| {
        out.push((format!("{conv}.weight"), vec![to, from, side, side]));
        norm(out, &bn, to);
        out.push((format!("{bn}.running_mean"), vec![to]));
        out.push((format!("{bn}.running_var"), vec![to]));
    };
    let half = width / 2;
    conv("visual.conv1".into(), "visual.bn1".into(), half, 3, 3);
    conv("visual.conv2".into(), "visual.bn2".into(), half, half, 3);
    conv("visual.conv3".into(), "visual.bn3".into(), width, half, 3);
    let mut from = width;
    for (stage, &blocks) in layers.iter().enumerate() {
        let planes = width.saturating_mul(1 << stage);
        let to = planes.saturating_mul(4);
        for i in 0..blocks {
            let block = format!("visual.layer{}.{i}", stage + 1);
            conv(
                format!("{block}.conv1"),
                format!("{block}.bn1"),
                planes,
                from,
                1,
            );
            conv(
                format!("{block}.conv2"),
                format!("{block}.bn2"),
                planes,
                planes,
                3,
            );
            conv(
                format!("{block}.conv3"),
                format!("{block}.bn3"),
                to,
                planes,
                1,
            );
            if i == 0 {
                conv(
                    format!("{block}.downsample.0"),
                    format!("{block}.downsample.1"),
                    to,
                    from,
                    1,
                );
            }
            from = to;
        }
    }
    let wide = width.saturating_mul(32);
    let tokens = grid.saturating_mul(grid).saturating_add(1);
    out.push((
        "visual.attnpool.positional_embedding".to_owned(),
        vec![tokens, wide],
    ));
    for name in ["k_proj", "q_proj", "v_proj"] {
        linear(out, &format!("visual.attnpool.{name}"), wide, wide);
    }
    linear(out, "visual.attnpool.c_proj", embed, wide);
}

/// Reads the sizes off the tensors' shapes, then checks that every tensor is there, has the right shape and is known.
pub(super) fn infer(
    shapes: &BTreeMap<String, Vec<usize>>,
    activation: Activation,
    path: &Path,
) -> Result<Arch> {
    let arch = sizes(shapes, activation, path)?;
    let expected = expected_tensors(&arch);
    for (name, expected) in &expected {
        let found = shapes.get(name).ok_or_else(|| missing(path, name))?;
        if found != expected {
            let what = format!("tensor `{name}` of {}", path.display());
            return Err(Error::Shape {
                what,
                found: found.clone(),
                expected: expected.clone(),
            });
        }
    }
    let known: BTreeSet<&str> = expected.iter().map(|(name, _)| name.as_str()).collect();
    match shapes.keys().find(|name| !known.contains(name.as_str())) {
        Some(name) => Err(Error::format(
            path,
            format!(
                "tensor `{name}` is not part of a CLIP of these sizes ({})",
                arch.name()
            ),
        )),
        None => Ok(arch),
    }
}

fn missing(path: &Path, name: &str) -> Error {
    Error::MissingTensor {
        path: path.to_path_buf(),
        name: name.to_owned(),
    }
}

fn sizes(
    shapes: &BTreeMap<String, Vec<usize>>,
    activation: Activation,
    path: &Path,
) -> Result<Arch> {
    let bad = |message: String| Error::format(path, message);
    let dims = |name: &str, rank: usize| -> Result<&[usize]> {
        let shape = shapes.get(name).ok_or_else(|| missing(path, name))?;
        match shape.len() == rank && !shape.contains(&0) {
            true => Ok(shape),
            false => Err(bad(format!(
                "tensor `{name}` has shape {shape:?}, expected {rank} dimensions, none empty"
            ))),
        }
    };
    let dim = |name: &str, rank: usize, axis: usize| {
        Ok::<_, Error>(dims(name, rank)?.get(axis).copied().unwrap_or(0))
    };
    // Side of the square grid of patches behind a positional embedding that has one more row, for the class token.
    let grid = |name: &str| {
        let rows = dim(name, 2, 0)?;
        let side = (rows - 1).isqrt();
        match side > 0 && side * side == rows - 1 {
            true => Ok(side),
            false => Err(bad(format!(
                "tensor `{name}` has {rows} rows, expected a square number and one more"
            ))),
        }
    };
    let heads = |what: &str, width: usize| match width.is_multiple_of(HEAD_WIDTH) {
        true => Ok(width),
        false => Err(bad(format!(
            "the {what} tower has width {width}, expected a multiple of {HEAD_WIDTH}"
        ))),
    };
    let (vision, image_resolution) = if shapes.contains_key("visual.proj") {
        let width = heads("image", dim("visual.conv1.weight", 4, 0)?)?;
        let patch_size = dim("visual.conv1.weight", 4, 3)?;
        let layers = blocks(shapes, "visual.transformer.resblocks.");
        let resolution = grid("visual.positional_embedding")?.checked_mul(patch_size);
        (
            VisionArch::Vit {
                layers,
                width,
                patch_size,
            },
            resolution,
        )
    } else if shapes.contains_key("visual.attnpool.positional_embedding") {
        let width = dim("visual.conv3.weight", 4, 0)?;
        if !width.is_multiple_of(2) {
            return Err(bad(format!(
                "the image tower's stem has width {width}, expected an even number"
            )));
        }
        let layers = [1, 2, 3, 4].map(|stage| blocks(shapes, &format!("visual.layer{stage}.")));
        if layers.contains(&0) {
            return Err(bad(format!(
                "the image tower has stages of {layers:?} blocks, expected at least one each"
            )));
        }
        (
            VisionArch::ResNet { layers, width },
            grid("visual.attnpool.positional_embedding")?.checked_mul(32),
        )
    } else {
        return Err(bad("no CLIP image tower found: neither `visual.proj` (ViT) nor `visual.attnpool.positional_embedding` (ResNet) is there".to_owned()));
    };
    let text_width = heads("text", dim("ln_final.weight", 1, 0)?)?;
    Ok(Arch {
        embed_dim: dim("text_projection", 2, 1)?,
        image_resolution: image_resolution
            .ok_or_else(|| bad("the image size overflows".to_owned()))?,
        vision,
        context_length: dim("positional_embedding", 2, 0)?,
        vocab_size: dim("token_embedding.weight", 2, 0)?,
        text_width,
        text_layers: blocks(shapes, "transformer.resblocks."),
        activation,
    })
}

/// How many different blocks there are below a prefix.
fn blocks(shapes: &BTreeMap<String, Vec<usize>>, prefix: &str) -> usize {
    let below = shapes
        .keys()
        .filter_map(|name| name.strip_prefix(prefix)?.split('.').next());
    below.collect::<BTreeSet<_>>().len()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn published() -> Vec<(Arch, usize)> {
        let vit = |layers, width, patch_size| VisionArch::Vit {
            layers,
            width,
            patch_size,
        };
        let rn = |layers, width| VisionArch::ResNet { layers, width };
        let arch = |vision, image_resolution, embed_dim, text_width| Arch {
            embed_dim,
            image_resolution,
            vision,
            context_length: 77,
            vocab_size: 49_408,
            text_width,
            text_layers: 12,
            activation: Activation::QuickGelu,
        };
        // Parameter counts of the published models; BatchNorm's running statistics are counted here too.
        vec![
            (arch(vit(12, 768, 32), 224, 512, 512), 151_277_313),
            (arch(vit(12, 768, 16), 224, 512, 512), 149_620_737),
            (arch(vit(24, 1024, 14), 224, 768, 768), 427_616_513),
            (arch(vit(24, 1024, 14), 336, 768, 768), 427_944_193),
            (arch(rn([3, 4, 6, 3], 64), 224, 1024, 512), 102_007_137),
            (arch(rn([3, 4, 23, 3], 64), 224, 512, 512), 119_688_033),
            (arch(rn([4, 6, 10, 6], 80), 288, 640, 640), 178_300_601),
            (arch(rn([6, 8, 18, 8], 96), 384, 768, 768), 290_979_217),
            (arch(rn([3, 15, 36, 10], 128), 448, 1024, 1024), 623_258_305),
        ]
    }

    #[test]
    fn published_models_have_their_number_of_parameters_and_are_recognised() {
        for (arch, parameters) in published() {
            let expected = expected_tensors(&arch);
            let learned = expected
                .iter()
                .filter(|(name, _)| !name.contains("running_"));
            let count: usize = learned
                .map(|(_, shape)| shape.iter().product::<usize>())
                .sum();
            assert_eq!(count, parameters, "{}", arch.name());
            let shapes: BTreeMap<_, _> = expected.into_iter().collect();
            assert_eq!(
                infer(&shapes, Activation::QuickGelu, Path::new("x")).unwrap(),
                arch
            );
        }
    }

    #[test]
    fn each_tensor_is_needed_and_no_other_is_taken() {
        for (arch, _) in [published().swap_remove(0), published().swap_remove(4)] {
            let full: BTreeMap<_, _> = expected_tensors(&arch).into_iter().collect();
            for name in full.keys() {
                let mut shapes = full.clone();
                shapes.remove(name);
                infer(&shapes, Activation::Gelu, Path::new("x")).unwrap_err();
                let mut shapes = full.clone();
                shapes.insert(name.clone(), vec![7, 7, 7]);
                infer(&shapes, Activation::Gelu, Path::new("x")).unwrap_err();
            }
            let mut shapes = full;
            shapes.insert("text_bias".to_owned(), vec![1]);
            let error = infer(&shapes, Activation::Gelu, Path::new("w.pt"))
                .unwrap_err()
                .to_string();
            assert!(
                error.starts_with("w.pt: tensor `text_bias` is not part of"),
                "{error}"
            );
        }
    }
}
