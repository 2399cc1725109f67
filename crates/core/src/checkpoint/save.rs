//! Writing checkpoints.

use std::path::Path;

use candle_core::{DType, Device, Tensor};
use serde_json::Value;

use super::{Checkpoint, bytes, config, hf, open_clip, safetensors};
use crate::files::write_atomically;
use crate::{Activation, Error, Result};

/// How weights are laid out on disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// A folder that transformers' `CLIPModel` loads: `config.json`, `preprocessor_config.json`, `model.safetensors`. ViT only.
    Hf,
    /// A folder that OpenCLIP loads: `open_clip_config.json`, `open_clip_model.safetensors`.
    OpenClip,
    /// One file with OpenAI's names; activation and normalisation are in its metadata.
    Safetensors,
}

pub(super) fn save(
    checkpoint: &Checkpoint,
    layout: Layout,
    dtype: Option<DType>,
    out: &Path,
) -> Result<()> {
    let Checkpoint {
        arch, preprocess, ..
    } = checkpoint;
    if let Some(other) =
        dtype.filter(|dtype| !matches!(dtype, DType::F16 | DType::BF16 | DType::F32))
    {
        return Err(Error::config(
            "dtype",
            format!("{other:?}"),
            "expected f16, bf16 or f32",
        ));
    }
    let plain = || {
        checkpoint
            .tensors
            .iter()
            .map(|(name, tensor)| Ok(vec![(name.clone(), tensor.clone())]))
    };
    let format = ("format", "pt".to_owned());
    match layout {
        Layout::Safetensors => {
            let activation = match arch.activation {
                Activation::QuickGelu => "quick_gelu",
                Activation::Gelu => "gelu",
            };
            let metadata = [
                format,
                ("activation", activation.to_owned()),
                ("mean", config::decimals(preprocess.mean).to_string()),
                ("std", config::decimals(preprocess.std).to_string()),
            ];
            safetensors::write(out, &converted(plain(), dtype)?, &metadata)
        }
        Layout::OpenClip => {
            let mut tensors = converted(plain(), dtype)?;
            // OpenCLIP's BatchNorm layers count batches in training and expect the count.
            let counters: Vec<String> = tensors
                .iter()
                .filter_map(|(name, _)| {
                    Some(format!(
                        "{}num_batches_tracked",
                        name.strip_suffix("running_mean")?
                    ))
                })
                .collect();
            for name in counters {
                tensors.push((name, Tensor::zeros((), DType::I64, &Device::Cpu)?));
            }
            folder(out, |folder| {
                json(
                    &folder.join("open_clip_config.json"),
                    &open_clip::config_json(arch, preprocess),
                )?;
                safetensors::write(
                    &folder.join("open_clip_model.safetensors"),
                    &tensors,
                    &[format],
                )
            })
        }
        Layout::Hf => {
            let stored = checkpoint.tensors.values().map(Tensor::dtype);
            let stored = stored
                .reduce(|a, b| if a == b { a } else { DType::F32 })
                .unwrap_or(DType::F32);
            let config = hf::config_json(arch, dtype.unwrap_or(stored)).ok_or_else(|| {
                Error::format(&checkpoint.path, "a ResNet, which transformers' CLIPModel does not know; write the OpenCLIP or the safetensors layout")
            })?;
            let renamed = checkpoint
                .tensors
                .iter()
                .map(|(name, tensor)| hf::from_openai(name, tensor));
            let tensors = converted(renamed, dtype)?;
            folder(out, |folder| {
                json(&folder.join("config.json"), &config)?;
                json(
                    &folder.join("preprocessor_config.json"),
                    &hf::preprocess_json(preprocess),
                )?;
                safetensors::write(&folder.join("model.safetensors"), &tensors, &[format])
            })
        }
    }
}

/// Tensors with numbers of type `dtype`.
fn converted(
    tensors: impl Iterator<Item = Result<Vec<(String, Tensor)>>>,
    dtype: Option<DType>,
) -> Result<Vec<(String, Tensor)>> {
    let mut out = Vec::new();
    for named in tensors {
        for (name, tensor) in named? {
            let tensor = match dtype {
                Some(dtype) if dtype != tensor.dtype() => {
                    let tensor = tensor.to_dtype(dtype)?;
                    if let Some(value) = bytes::not_finite(&tensor)? {
                        return Err(Error::NotFinite {
                            what: format!("tensor `{name}` as {dtype:?}"),
                            value: f64::from(value),
                        });
                    }
                    tensor
                }
                _ => tensor,
            };
            out.push((name, tensor));
        }
    }
    Ok(out)
}

fn json(path: &Path, value: &Value) -> Result<()> {
    write_atomically(path, |to| {
        serde_json::to_writer_pretty(&mut *to, value)?;
        to.write_all(b"\n")
    })
}

/// Fills a temporary folder beside `out` and renames it.
fn folder(out: &Path, fill: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let io = |e| Error::io(out, e);
    if out.is_file() || (out.is_dir() && std::fs::read_dir(out).map_err(io)?.next().is_some()) {
        return Err(Error::format(
            out,
            "exists and is not an empty folder; choose another place or remove it",
        ));
    }
    let parent = match out.parent() {
        Some(p) if !p.as_os_str().is_empty() => p,
        _ => Path::new("."),
    };
    let mut builder = tempfile::Builder::new();
    builder.prefix(".cliptune-").suffix(".tmp");
    // Temporary folders are private by default; a result should be as readable as any other folder (the umask still applies).
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o777));
    let temporary = builder.tempdir_in(parent).map_err(io)?;
    fill(temporary.path())?;
    // Only an empty folder can be in the way, and not every system renames over one.
    if out.is_dir() {
        std::fs::remove_dir(out).map_err(io)?;
    }
    std::fs::rename(temporary.path(), out).map_err(io)?;
    // The temporary name is gone now.
    let _ = temporary.keep();
    Ok(())
}
