//! Finding out what a path holds, and making a checkpoint of it.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use candle_core::{DType, Tensor};
use rayon::prelude::*;
use serde_json::Value;

use super::hf::{self, HfConfig, Plan};
use super::open_clip::OpenClipConfig;
use super::safetensors::{self, SafetensorsFile};
use super::torch::{LEGACY_MAGIC, TorchFile};
use super::{Checkpoint, bytes, config, shapes};
use crate::{Activation, Arch, Error, Preprocess, Result};

const HF_CONFIG: &str = "config.json";
const HF_WEIGHTS: [&str; 2] = ["model.safetensors", "pytorch_model.bin"];
const OPEN_CLIP_CONFIG: &str = "open_clip_config.json";
const OPEN_CLIP_WEIGHTS: [&str; 3] = [
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.bin",
    "open_clip_model.bin",
];

/// Scalars that OpenAI stores among the tensors.
const SCALARS: [&str; 3] = ["input_resolution", "context_length", "vocab_size"];

/// The contents of a training checkpoint that a model is rebuilt from.
#[derive(Debug)]
pub struct TorchState {
    /// The tensors of `state_dict`, by key without a leading `module.`, in the stored type (f64 becomes f32), on the CPU.
    pub tensors: BTreeMap<String, Tensor>,
    /// Epochs trained, where the checkpoint says so.
    pub epoch: Option<usize>,
}

impl TorchState {
    /// The tensor under a key.
    ///
    /// # Errors
    /// [`Error::Prompt`] naming it if there is none.
    pub fn tensor(&self, key: &str) -> Result<&Tensor> {
        let tensor = self.tensors.get(key);
        tensor.ok_or_else(|| Error::Prompt(format!("the checkpoint holds no `{key}`")))
    }
}

/// Reads a checkpoint of `torch.save`: a state dict, or a dict that holds one under `state_dict` (Dassl's `model.pth.tar-50`).
///
/// A folder stands for the file that Dassl's `checkpoint` in it names, the newest. Dassl saves a model in several parts as a
/// folder for each; the folder above stands for all of them, with the part's name and a dot in front of every key.
///
/// Objects of other classes beside the state dict (optimiser, scheduler) are skipped. Nothing is executed.
///
/// # Errors
/// Files that PyTorch did not write, damaged files, and entries of the state dict that are not tensors; a folder that is
/// neither of these, and parts of different epochs.
pub fn read_torch_state(path: &Path) -> Result<TorchState> {
    if !path.is_dir() {
        return read_file(path);
    }
    if path.join(NEWEST).exists() {
        return read_file(&newest(path)?);
    }
    let io = |e| Error::io(path, e);
    let entries = std::fs::read_dir(path).map_err(io)?;
    let mut parts = entries
        .map(|entry| Ok(entry?.path()))
        .collect::<std::io::Result<Vec<_>>>()
        .map_err(io)?;
    parts.retain(|part| part.join(NEWEST).exists());
    parts.sort();
    let mut whole: Option<TorchState> = None;
    for part in parts {
        let state = read_file(&newest(&part)?)?;
        let name = part.file_name().unwrap_or_default().to_string_lossy();
        let whole = whole.get_or_insert(TorchState {
            tensors: BTreeMap::new(),
            epoch: state.epoch,
        });
        if whole.epoch != state.epoch {
            let message = "holds parts of different epochs; name one file, or let the `checkpoint` files name the same epoch";
            return Err(Error::format(path, message));
        }
        let named = |(key, tensor)| (format!("{name}.{key}"), tensor);
        whole.tensors.extend(state.tensors.into_iter().map(named));
    }
    whole.ok_or_else(|| {
        let message = "a folder without Dassl's `checkpoint`, and no folder in it has one; name the file itself";
        Error::format(path, message)
    })
}

/// The file in which Dassl writes which checkpoint is the newest.
const NEWEST: &str = "checkpoint";

fn newest(folder: &Path) -> Result<PathBuf> {
    let path = folder.join(NEWEST);
    let name = std::fs::read_to_string(&path).map_err(|e| Error::io(&path, e))?;
    match Path::new(name.trim()).file_name() {
        Some(name) => Ok(folder.join(name)),
        None => Err(Error::format(path, "names no file")),
    }
}

fn read_file(path: &Path) -> Result<TorchState> {
    match Source::open(path)? {
        Source::Torch(file) => {
            let epoch = file.epoch;
            Ok(TorchState {
                tensors: file.load(|_| true)?,
                epoch,
            })
        }
        Source::Safetensors(_) => Err(Error::format(
            path,
            "a safetensors file, expected one that torch.save wrote",
        )),
    }
}

/// A weights file of any kind, with no tensor read yet.
enum Source {
    Torch(TorchFile),
    Safetensors(SafetensorsFile),
}

impl Source {
    /// Looks at the first bytes.
    fn open(path: &Path) -> Result<Self> {
        let io = |e| Error::io(path, e);
        let mut file = File::open(path).map_err(io)?;
        let len = file.metadata().map_err(io)?.len();
        let mut head = Vec::new();
        file.by_ref().take(64).read_to_end(&mut head).map_err(io)?;
        file.seek(SeekFrom::Start(0)).map_err(io)?;
        if head.starts_with(b"PK\x03\x04") {
            return Ok(Self::Torch(TorchFile::open_zip(path, file, len)?));
        }
        if head.starts_with(LEGACY_MAGIC) {
            return Ok(Self::Torch(TorchFile::open_legacy(path, file, len)?));
        }
        if let Some(header_len) = safetensors::header_len(&head, len) {
            return Ok(Self::Safetensors(SafetensorsFile::open(
                path, file, header_len, len,
            )?));
        }
        Err(Error::format(path, match head.as_slice() {
            [] => "the file is empty".to_owned(),
            head if head.starts_with(b"version https://git-lfs") => {
                "a Git LFS pointer, not the weights themselves; fetch them with `git lfs pull`".to_owned()
            }
            [0x80, ..] => "a bare pickle, not weights of torch.save; save them again with torch.save(model.state_dict(), ...)".to_owned(),
            _ => "neither a PyTorch file nor a safetensors file (or one that is cut off)".to_owned(),
        }))
    }

    fn shapes(&self) -> BTreeMap<String, Vec<usize>> {
        match self {
            Self::Torch(file) => file.shapes(),
            Self::Safetensors(file) => file.shapes(),
        }
    }

    fn load(self, wanted: impl Fn(&str) -> bool) -> Result<BTreeMap<String, Tensor>> {
        match self {
            Self::Torch(file) => file.load(wanted),
            Self::Safetensors(file) => file.load(wanted),
        }
    }
}

/// What is known of weights beyond their tensors.
enum Companion {
    /// Nothing, so they are OpenAI's: QuickGELU and its normalisation.
    None,
    /// Metadata of a single file that [`Checkpoint::save`] wrote.
    Own(Activation, Preprocess),
    Hf(HfConfig),
    OpenClip(OpenClipConfig),
}

pub(super) fn open(path: &Path) -> Result<Checkpoint> {
    let (weights, folder) = match path.is_dir() {
        true => find_weights(path)?,
        false => (
            path.to_path_buf(),
            path.parent().unwrap_or(Path::new("")).to_path_buf(),
        ),
    };
    let source = Source::open(&weights)?;
    let mut found = source.shapes();
    found.retain(|name, _| !name.ends_with("num_batches_tracked"));
    let checked: Vec<String> = found
        .keys()
        .filter(|name| is_checked(name))
        .cloned()
        .collect();
    found.retain(|name, _| !is_checked(name));

    let companion = companion(&source, found.keys(), path, &weights, &folder)?;
    let activation = match &companion {
        Companion::None => Activation::QuickGelu,
        Companion::Own(activation, _) => *activation,
        Companion::Hf(config) => config.activation()?,
        Companion::OpenClip(config) => config.activation()?,
    };
    let plan = match &companion {
        Companion::Hf(_) => Some(Plan::new(found.keys(), &weights)?),
        _ => None,
    };
    let openai = match &plan {
        Some(plan) => plan.shapes(&found, &weights)?,
        None => found.clone(),
    };
    let arch = shapes::infer(&openai, activation, &weights)?;
    let mut preprocess = Preprocess::openai(arch.image_resolution);
    match companion {
        Companion::None => {}
        Companion::Own(_, own) => {
            preprocess = Preprocess {
                resolution: arch.image_resolution,
                ..own
            }
        }
        Companion::Hf(config) => {
            config.check(&arch)?;
            let beside = folder.join("preprocessor_config.json");
            if beside.is_file() {
                hf::read_preprocess(&beside, &mut preprocess)?;
            }
        }
        Companion::OpenClip(config) => {
            config.check(&arch)?;
            config.preprocess(&mut preprocess)?;
        }
    }

    let mut tensors = source.load(|name| found.contains_key(name) || is_checked(name))?;
    for name in checked {
        if let Some(tensor) = tensors.remove(&name) {
            check_integers(&name, &tensor, &arch, &weights)?;
        }
    }
    if let Some(plan) = plan {
        tensors = plan.convert(tensors, &weights)?;
    }
    check_numbers(&tensors, &weights)?;
    Ok(Checkpoint {
        path: path.to_path_buf(),
        arch,
        preprocess,
        tensors,
    })
}

/// The weights file of a folder.
fn find_weights(folder: &Path) -> Result<(PathBuf, PathBuf)> {
    let first = |names: &[&str]| {
        names
            .iter()
            .map(|name| folder.join(name))
            .find(|path| path.is_file())
    };
    let has = |name: &str| folder.join(name).is_file();
    let weights = match (has(OPEN_CLIP_CONFIG), has(HF_CONFIG)) {
        // Folders on the Hugging Face hub often hold both.
        (true, true) => first(&OPEN_CLIP_WEIGHTS).or_else(|| first(&HF_WEIGHTS)),
        (true, false) => first(&OPEN_CLIP_WEIGHTS),
        (false, true) => first(&HF_WEIGHTS),
        (false, false) => {
            return Err(Error::format(
                folder,
                format!(
                    "a folder without {HF_CONFIG} (transformers) or {OPEN_CLIP_CONFIG} (OpenCLIP)"
                ),
            ));
        }
    };
    let weights = weights.ok_or_else(|| {
        let sharded = [
            "model.safetensors.index.json",
            "pytorch_model.bin.index.json",
        ]
        .iter()
        .any(|name| has(name));
        let hint = if sharded {
            "; weights in several files are not supported, save them as one"
        } else {
            ""
        };
        let looked = [HF_WEIGHTS.as_slice(), OPEN_CLIP_WEIGHTS.as_slice()]
            .concat()
            .join(", ");
        Error::format(
            folder,
            format!("no weights found, looked for {looked}{hint}"),
        )
    })?;
    Ok((weights, folder.to_path_buf()))
}

fn companion<'a>(
    source: &Source,
    names: impl Iterator<Item = &'a String>,
    path: &Path,
    weights: &Path,
    folder: &Path,
) -> Result<Companion> {
    if hf::has_names(names) {
        let config = folder.join(HF_CONFIG);
        if !config.is_file() {
            return Err(Error::format(
                weights,
                format!("weights of transformers' CLIPModel without {HF_CONFIG} beside them"),
            ));
        }
        return Ok(Companion::Hf(HfConfig::read(&config)?));
    }
    match source {
        Source::Safetensors(file) if file.metadata.contains_key("activation") => own(file, weights),
        // An archive of OpenAI's stands for itself, whatever lies beside it.
        Source::Torch(file) if file.scripted => Ok(Companion::None),
        _ => {
            let config = folder.join(OPEN_CLIP_CONFIG);
            if config.is_file() {
                return Ok(Companion::OpenClip(OpenClipConfig::read(&config)?));
            }
            match path.is_dir() {
                true => Err(Error::format(
                    weights,
                    format!(
                        "the tensors do not have the names of transformers' CLIPModel, as {HF_CONFIG} beside them promises"
                    ),
                )),
                false => Ok(Companion::None),
            }
        }
    }
}

/// What [`Checkpoint::save`] writes into a single file's header.
fn own(file: &SafetensorsFile, path: &Path) -> Result<Companion> {
    let bad = |key: &str, value: &str, expected: &str| {
        Error::format(
            path,
            format!("metadata {key} = {value}, expected {expected}"),
        )
    };
    let get = |key: &str| file.metadata.get(key).map(String::as_str);
    let activation = match get("activation").unwrap_or_default() {
        "quick_gelu" => Activation::QuickGelu,
        "gelu" => Activation::Gelu,
        other => return Err(bad("activation", other, "quick_gelu or gelu")),
    };
    let mut preprocess = Preprocess::openai(0);
    let triple = |text: &str| {
        serde_json::from_str::<Value>(text)
            .ok()
            .as_ref()
            .and_then(config::triple)
    };
    if let Some(mean) = get("mean") {
        preprocess.mean = triple(mean).ok_or_else(|| bad("mean", mean, "three finite numbers"))?;
    }
    if let Some(std) = get("std") {
        let positive = triple(std).filter(|std| std.iter().all(|s| *s > 0.0));
        preprocess.std = positive.ok_or_else(|| bad("std", std, "three positive numbers"))?;
    }
    Ok(Companion::Own(activation, preprocess))
}

/// Whether a tensor is only compared with the sizes and then dropped.
fn is_checked(name: &str) -> bool {
    SCALARS.contains(&name) || name.ends_with(".embeddings.position_ids")
}

fn check_integers(name: &str, tensor: &Tensor, arch: &Arch, path: &Path) -> Result<()> {
    let found: Vec<i64> = tensor.flatten_all()?.to_dtype(DType::I64)?.to_vec1()?;
    let expected = match name {
        "input_resolution" => arch.image_resolution,
        "context_length" => arch.context_length,
        "vocab_size" => arch.vocab_size,
        _ if found.iter().zip(0..).all(|(found, i)| *found == i) => return Ok(()),
        _ => {
            return Err(Error::format(
                path,
                format!(
                    "tensor `{name}` does not count 0, 1, 2, ..., other orders are not supported"
                ),
            ));
        }
    };
    match found.as_slice() {
        [found] if usize::try_from(*found) == Ok(expected) => Ok(()),
        found => {
            let message = format!(
                "`{name}` is {}, but the tensors have {expected}",
                found.first().copied().unwrap_or_default()
            );
            Err(Error::format(path, message))
        }
    }
}

/// Weights are floating-point numbers, and finite.
fn check_numbers(tensors: &BTreeMap<String, Tensor>, path: &Path) -> Result<()> {
    let check = |(name, tensor): (&String, &Tensor)| -> Result<()> {
        let what = || format!("tensor `{name}` of {}", path.display());
        if !matches!(tensor.dtype(), DType::F16 | DType::BF16 | DType::F32) {
            return Err(Error::format(
                path,
                format!(
                    "tensor `{name}` is stored as {:?}, expected floating point",
                    tensor.dtype()
                ),
            ));
        }
        match bytes::not_finite(tensor)? {
            Some(value) => Err(Error::NotFinite {
                what: what(),
                value: f64::from(value),
            }),
            None => Ok(()),
        }
    };
    // All of them, so that the tensor that is named does not depend on the threads.
    let results: Vec<Result<()>> = tensors.par_iter().map(check).collect();
    results.into_iter().collect()
}
