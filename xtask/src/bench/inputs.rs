//! The files that all contenders read: weights of a published size with random values, and a row's inputs.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use candle_core::{DType, Device, Tensor};
use cliptune_core::checkpoint::{self, Layout};
use cliptune_core::prompt::placeholder;
use cliptune_core::rng::Rng;
use cliptune_core::templates::Ensemble;
use cliptune_core::tokenizer::Tokenizer;
use cliptune_core::{Arch, files};

use super::names::names;
use super::rows::{Row, Task};

/// Tensors by name.
pub(super) type Named = BTreeMap<String, Tensor>;

/// Part of the files' names: another number for other contents.
const EDITION: u32 = 2;

/// The weights file of a row, written if it is not there.
pub(super) fn weights(folder: &Path, row: &Row, tiny: bool) -> Result<PathBuf> {
    let name = file_name("weights", row.sizes.slug(), tiny);
    let path = folder.join(name);
    if !path.exists() {
        let mut checkpoint = checkpoint::random(&row.sizes.arch(tiny), 1)?;
        for (name, tensor) in &mut checkpoint.tensors {
            *tensor = varied(name, tensor)?;
        }
        // As published weights are: every contender computes in f32 with the same numbers.
        checkpoint.save(Layout::Safetensors, Some(DType::F16), &path)?;
    }
    Ok(path)
}

/// The inputs file of a row, written if it is not there.
pub(super) fn inputs(folder: &Path, row: &Row, tiny: bool) -> Result<PathBuf> {
    let path = folder.join(file_name("inputs", row.name, tiny));
    if !path.exists() {
        write(&path, &tensors(&row.task, &row.sizes.arch(tiny))?)?;
    }
    Ok(path)
}

fn file_name(what: &str, slug: &str, tiny: bool) -> String {
    let tiny = if tiny { "-tiny" } else { "" };
    format!("{what}-{slug}{tiny}-{EDITION}.safetensors")
}

/// Writes tensors as safetensors.
pub(super) fn write(path: &Path, tensors: &Named) -> Result<()> {
    let bytes = safetensors::serialize(tensors, None)?;
    Ok(files::write_atomically(path, |file| {
        file.write_all(&bytes)
    })?)
}

/// Reads what [`write()`] wrote.
pub(super) fn read(path: &Path) -> Result<Named> {
    let tensors = candle_core::safetensors::load(path, &Device::Cpu)
        .with_context(|| path.display().to_string())?;
    Ok(tensors.into_iter().collect())
}

/// Initial weights with what training changes: norms and biases that are not one and zero, so that leaving one out shows.
fn varied(name: &str, tensor: &Tensor) -> Result<Tensor> {
    if tensor.rank() != 1 || name == "visual.class_embedding" {
        return Ok(tensor.clone());
    }
    let n = tensor.elem_count();
    let noise = Rng::stream(2, name, &[]).normal(n);
    let value = |z: f64| match name {
        // The last norm of a residual branch: near zero, or sixteen branches in a row add up to large numbers.
        _ if name.ends_with("bn3.weight") => 0.2 + 0.02 * z,
        _ if name.ends_with("running_var") => 1.0 + 0.1 * z.abs(),
        _ if name.ends_with("bias") || name.ends_with("running_mean") => 0.02 * z,
        _ => 1.0 + 0.05 * z,
    };
    let values: Vec<f32> = noise.into_iter().map(|z| value(z) as f32).collect();
    Ok(Tensor::from_vec(values, n, &Device::Cpu)?)
}

fn tensors(task: &Task, arch: &Arch) -> Result<Named> {
    let (width, dim) = (arch.text_width, arch.embed_dim);
    let normal = |name: &str, shape: &[usize], std: f64| -> Result<(String, Tensor)> {
        let values = Rng::stream(1, name, &[]).normal(shape.iter().product());
        let values: Vec<f32> = values.into_iter().map(|x| (x * std) as f32).collect();
        Ok((
            name.to_owned(),
            Tensor::from_vec(values, shape, &Device::Cpu)?,
        ))
    };
    let side = arch.image_resolution;
    let pixels = |batch: usize| normal("pixels", &[batch, 3, side, side], 1.0);
    let labels = |batch: usize, classes: usize| -> Result<(String, Tensor)> {
        let labels: Vec<i64> = (0..batch).map(|i| (i * 37 % classes) as i64).collect();
        Ok(("labels".to_owned(), Tensor::new(labels, &Device::Cpu)?))
    };
    let entries = match *task {
        Task::Coop {
            classes,
            n_ctx,
            batch,
            ..
        } => vec![
            tokens(&learned_prompts(classes, n_ctx), arch.context_length)?,
            normal("ctx", &[n_ctx, width], 0.02)?,
            normal("image_features", &[batch, dim], 1.0)?,
            labels(batch, classes)?,
        ],
        Task::Cocoop {
            classes,
            n_ctx,
            batch,
        } => {
            let hidden = dim / 16;
            // The authors' initial values: uniform within fan_in^-1/2, so of this standard deviation.
            let std = |fan_in: usize| (3.0 * fan_in as f64).powf(-0.5);
            vec![
                tokens(&learned_prompts(classes, n_ctx), arch.context_length)?,
                normal("ctx", &[n_ctx, width], 0.02)?,
                normal("meta_net.linear1.weight", &[hidden, dim], std(dim))?,
                normal("meta_net.linear1.bias", &[hidden], std(dim))?,
                normal("meta_net.linear2.weight", &[width, hidden], std(hidden))?,
                normal("meta_net.linear2.bias", &[width], std(hidden))?,
                normal("image_features", &[batch, dim], 1.0)?,
                labels(batch, classes)?,
            ]
        }
        Task::Plot {
            classes,
            n_prompts,
            n_ctx,
            places,
            batch,
            ..
        } => vec![
            tokens(&learned_prompts(classes, n_ctx), arch.context_length)?,
            normal("ctx", &[n_prompts, n_ctx, width], 0.02)?,
            normal("image_features", &[batch, 1 + places, dim], 1.0)?,
            labels(batch, classes)?,
        ],
        Task::Vpt {
            classes,
            samples,
            n_ctx,
            batch,
            ..
        } => vec![
            tokens(&learned_prompts(classes, n_ctx), arch.context_length)?,
            normal("ctx", &[n_ctx, width], 0.02)?,
            normal("mean_posterior", &[1, width], 0.02)?,
            // A log-variance, in spite of its name.
            normal("std_posterior", &[1, width], 0.5)?,
            normal("noise", &[samples, 1, width], 1.0)?,
            normal("image_features", &[batch, dim], 1.0)?,
            labels(batch, classes)?,
        ],
        Task::Maple {
            classes,
            n_ctx,
            depth,
            batch,
        } => {
            let (blocks, vision_width) = arch.vit_sizes()?;
            let prompts = names(classes);
            let prompts = prompts.iter().map(|name| format!("{MAPLE_WORDS} {name}."));
            let prompts: Vec<String> = prompts.collect();
            let mut entries = vec![
                tokens(&prompts, arch.context_length)?,
                pixels(batch)?,
                labels(batch, classes)?,
            ];
            // The authors' initial values: uniform within fan_in^-1/2, so of this standard deviation.
            let std = (3.0 * width as f64).powf(-0.5);
            for block in 0..depth.min(blocks).min(arch.text_layers) {
                let keys = maple_keys(block);
                entries.push(normal(&keys.prompt, &[n_ctx, width], 0.02)?);
                let map = [format!("{}.weight", keys.map), format!("{}.bias", keys.map)];
                entries.push(normal(&map[0], &[vision_width, width], std)?);
                entries.push(normal(&map[1], &[vision_width], std)?);
            }
            entries
        }
        Task::DeepVpt {
            classes,
            n_ctx,
            depth,
            batch,
        } => {
            let (blocks, vision_width) = arch.vit_sizes()?;
            let mut entries = vec![
                normal("text_features", &[classes, dim], 1.0)?,
                pixels(batch)?,
                labels(batch, classes)?,
            ];
            for block in 0..depth.min(blocks) {
                let key = visual_prompt_key(block);
                entries.push(normal(&key, &[n_ctx, vision_width], 0.02)?);
            }
            entries
        }
        Task::Vp {
            classes,
            padding,
            batch,
        } => {
            let side = arch.image_resolution;
            let across = [1, 3, padding, side];
            let upright = [1, 3, side - 2 * padding, padding];
            vec![
                normal("text_features", &[classes, dim], 1.0)?,
                pixels(batch)?,
                labels(batch, classes)?,
                normal("pad_up", &across, 1.0)?,
                normal("pad_down", &across, 1.0)?,
                normal("pad_left", &upright, 1.0)?,
                normal("pad_right", &upright, 1.0)?,
            ]
        }
        Task::ZeroShot {
            templates,
            names: n,
            ..
        } => {
            let all = Ensemble::Imagenet80.templates();
            let chosen = || all.iter().step_by(all.len() / templates);
            let prompts: Vec<String> = names(n)
                .iter()
                .flat_map(|name| chosen().map(|template| template.replace("{}", name)))
                .collect();
            vec![tokens(&prompts, arch.context_length)?]
        }
        Task::Image { batch } => vec![pixels(batch)?],
    };
    Ok(entries.into_iter().collect())
}

/// The words of MaPLe's prompts, of which the first stand for the context.
pub(super) const MAPLE_WORDS: &str = "a photo of a";

/// The keys of what MaPLe learns for a block of both towers.
pub(super) struct MapleKeys {
    /// The text tower's prompt.
    pub(super) prompt: String,
    /// The map that makes the image tower's of it, without `.weight` and `.bias`.
    pub(super) map: String,
}

pub(super) fn maple_keys(block: usize) -> MapleKeys {
    match block.checked_sub(1) {
        None => MapleKeys {
            prompt: "prompt_learner.ctx".into(),
            map: "prompt_learner.proj".into(),
        },
        Some(i) => MapleKeys {
            prompt: format!("prompt_learner.compound_prompts_text.{i}"),
            map: format!("prompt_learner.compound_prompt_projections.{i}"),
        },
    }
}

/// The key of deep visual prompt tuning's tokens of a block.
pub(super) fn visual_prompt_key(block: usize) -> String {
    match block {
        0 => "image_encoder.VPT".into(),
        _ => format!("image_encoder.transformer.resblocks.{block}.VPT_shallow"),
    }
}

/// Blocks with inputs under these keys.
pub(super) fn depth(inputs: &Named, key: impl Fn(usize) -> String) -> usize {
    (0..).take_while(|&i| inputs.contains_key(&key(i))).count()
}

/// Sentences whose first `n_ctx` words stand for the context.
fn learned_prompts(classes: usize, n_ctx: usize) -> Vec<String> {
    let words = placeholder(n_ctx);
    names(classes)
        .iter()
        .map(|name| format!("{words} {name}."))
        .collect()
}

/// `(prompts, context_length)`, padded with zeros as the authors' tokenizer pads.
fn tokens(prompts: &[String], context_length: usize) -> Result<(String, Tensor)> {
    let mut all: Vec<i64> = Vec::new();
    for prompt in prompts {
        let mut ids = Tokenizer::get().tokenize(prompt, context_length)?;
        ids.resize(context_length, 0);
        all.extend(ids.into_iter().map(i64::from));
    }
    let tensor = Tensor::from_vec(all, (prompts.len(), context_length), &Device::Cpu)?;
    Ok(("tokens".to_owned(), tensor))
}
