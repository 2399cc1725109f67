//! The prompt file: learned tensors under the authors' keys, and everything needed to use them, in one safetensors file.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use candle_core::{DType, Tensor};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::checkpoint::SafetensorsFile;
use crate::files::write_atomically;
use crate::method::{ClipId, Predictor};
use crate::params::{self, check_finite};
use crate::{Classes, Clip, Error, Result};

/// The metadata's key in the safetensors header.
const KEY: &str = "cliptune";
/// Version of the format.
const FORMAT: u32 = 1;

/// A learned prompt as it lies on disk.
#[derive(Clone, Debug)]
pub struct PromptFile {
    /// Slug of the method.
    pub method: String,
    /// Its settings.
    pub config: Value,
    /// The weights it was trained on.
    pub clip: ClipId,
    /// Class names it was trained on.
    pub classes: Classes,
    /// The run's seed.
    pub seed: u64,
    /// What else is known of the run (shots, accuracy, data): for people, not read back.
    pub notes: Value,
    /// Learned tensors.
    pub tensors: BTreeMap<String, Tensor>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Header {
    format: u32,
    version: String,
    method: String,
    config: Value,
    clip: ClipId,
    classes: Classes,
    seed: u64,
    #[serde(default)]
    notes: Value,
}

impl PromptFile {
    /// The file's content for a fitted predictor.
    ///
    /// # Errors
    /// Whatever the tensor library refuses.
    pub fn new(
        method: &str,
        config: Value,
        clip: &Clip,
        classes: &Classes,
        seed: u64,
        notes: Value,
        predictor: &dyn Predictor,
    ) -> Result<Self> {
        Ok(Self {
            method: method.to_owned(),
            config,
            clip: ClipId::of(clip),
            classes: classes.clone(),
            seed,
            notes,
            tensors: predictor.tensors()?.into_iter().collect(),
        })
    }

    /// Writes the file; an existing one is replaced only when everything is on disk.
    ///
    /// # Errors
    /// [`Error::Io`] naming the file, [`Error::NotFinite`] naming the tensor.
    pub fn save(&self, path: &Path) -> Result<()> {
        for (name, tensor) in &self.tensors {
            check_finite(tensor, &format!("learned tensor `{name}`"))?;
        }
        let header = Header {
            format: FORMAT,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            method: self.method.clone(),
            config: self.config.clone(),
            clip: self.clip.clone(),
            classes: self.classes.clone(),
            seed: self.seed,
            notes: self.notes.clone(),
        };
        let header =
            serde_json::to_string(&header).map_err(|e| Error::format(path, e.to_string()))?;
        let bytes = to_safetensors(&self.tensors, &header)
            .map_err(|e| Error::format(path, e.to_string()))?;
        write_atomically(path, |out| out.write_all(&bytes))
    }

    /// Reads a prompt file and checks that it is whole.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Format`] or [`Error::NotFinite`], each naming the file.
    pub fn load(path: &Path) -> Result<Self> {
        let not_a_prompt = "not a prompt file: the header has no `cliptune` entry";
        let (header, tensors) = read_safetensors(path, KEY, not_a_prompt)?;
        let value: Value = serde_json::from_str(&header)
            .map_err(|e| Error::format(path, format!("header: {e}")))?;
        match value.get("format").and_then(Value::as_u64) {
            Some(format) if format == u64::from(FORMAT) => {}
            Some(format) => {
                let message = format!(
                    "prompt file of format {format}, this version reads format {FORMAT}; update cliptune"
                );
                return Err(Error::format(path, message));
            }
            None => return Err(Error::format(path, "header: no format number")),
        }
        let header: Header = serde_json::from_value(value)
            .map_err(|e| Error::format(path, format!("header: {e}")))?;
        for (name, tensor) in &tensors {
            check_finite(
                tensor,
                &format!("{}: learned tensor `{name}`", path.display()),
            )?;
        }
        let Header {
            method,
            config,
            clip,
            classes,
            seed,
            notes,
            ..
        } = header;
        let classes = Classes::new(classes.names().to_vec())
            .map_err(|e| Error::format(path, e.to_string()))?;
        Ok(Self {
            method,
            config,
            clip,
            classes,
            seed,
            notes,
            tensors,
        })
    }

    /// Refuses weights that the prompt was not trained on.
    ///
    /// # Errors
    /// [`Error::Prompt`] naming both.
    pub fn check_clip(&self, clip: &Clip) -> Result<()> {
        let given = ClipId::of(clip);
        if self.clip.weights_hash == given.weights_hash {
            return Ok(());
        }
        Err(Error::Prompt(format!(
            "the prompt was trained on {} (weights {}), these weights are {} ({}); pass the weights it was trained on",
            self.clip.name,
            short(&self.clip.weights_hash),
            given.name,
            short(&given.weights_hash),
        )))
    }
}

/// The mean of what prompt files of several runs hold, to begin another run with ([`crate::Run::start`]): of one method, the same
/// weights and the same settings but for the training. Their classes need not be the same.
///
/// # Errors
/// [`Error::Prompt`] naming what differs, and as [`params::mean`].
pub fn mean(files: &[PromptFile]) -> Result<BTreeMap<String, Tensor>> {
    /// Settings that say nothing about what a tensor means.
    const FREE: [&str; 3] = ["train", "tasks", "task_mask"];
    let meaning = |file: &PromptFile| {
        let mut config = file.config.clone();
        if let Value::Object(settings) = &mut config {
            settings.retain(|key, _| !FREE.contains(&key.as_str()));
        }
        config
    };
    for pair in files.windows(2) {
        let [a, b] = pair else { continue };
        let differs = |what: &str, a: &dyn std::fmt::Display, b: &dyn std::fmt::Display| {
            Err(Error::Prompt(format!(
                "prompts of different {what} cannot be averaged: {a} and {b}"
            )))
        };
        if a.method != b.method {
            return differs("methods", &a.method, &b.method);
        }
        if a.clip.weights_hash != b.clip.weights_hash {
            return differs("weights", &a.clip.name, &b.clip.name);
        }
        let (a, b) = (meaning(a), meaning(b));
        if a != b {
            return differs("settings", &a, &b);
        }
    }
    let tensors: Vec<_> = files.iter().map(|file| &file.tensors).collect();
    params::mean(&tensors)
}

fn short(hash: &str) -> &str {
    hash.get(..12).unwrap_or(hash)
}

/// Serialises tensors with one metadata entry, in an order that depends on the content alone.
pub(crate) fn to_safetensors(
    tensors: &BTreeMap<String, Tensor>,
    header: &str,
) -> std::result::Result<Vec<u8>, safetensors::SafeTensorError> {
    let metadata = HashMap::from([(KEY.to_owned(), header.to_owned())]);
    safetensors::serialize(
        tensors.iter().map(|(k, v)| (k.clone(), v.clone())),
        Some(metadata),
    )
}

/// Reads a safetensors file of f32 and i64 tensors and one metadata entry; a file without it is refused with `missing`.
pub(crate) fn read_safetensors(
    path: &Path,
    key: &str,
    missing: &str,
) -> Result<(String, BTreeMap<String, Tensor>)> {
    let mut file = SafetensorsFile::open_path(path)?;
    let header = file
        .metadata
        .remove(key)
        .ok_or_else(|| Error::format(path, missing))?;
    let tensors = file.load(|_| true)?;
    for (name, tensor) in &tensors {
        if !matches!(tensor.dtype(), DType::F32 | DType::I64) {
            let message = format!("tensor `{name}` is {:?}, expected F32", tensor.dtype());
            return Err(Error::format(path, message));
        }
    }
    Ok((header, tensors))
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;
    use proptest::prelude::*;

    fn valid() -> Vec<u8> {
        let ctx = Tensor::new(&[[1f32, 2.0], [3.0, 4.0]], &Device::Cpu).unwrap();
        let header = Header {
            format: FORMAT,
            version: "0".into(),
            method: "coop".into(),
            config: Value::Null,
            clip: ClipId {
                name: "ViT".into(),
                weights_hash: "00".into(),
                text_width: 2,
                embed_dim: 2,
            },
            classes: Classes::new(vec!["a".into()]).unwrap(),
            seed: 1,
            notes: Value::Null,
        };
        let header = serde_json::to_string(&header).unwrap();
        to_safetensors(&[("ctx".to_owned(), ctx)].into(), &header).unwrap()
    }

    fn load(bytes: &[u8]) -> Result<PromptFile> {
        let file = tempfile::NamedTempFile::new().unwrap();
        write_atomically(file.path(), |out| out.write_all(bytes)).unwrap();
        PromptFile::load(file.path())
    }

    #[test]
    fn a_whole_file_loads_and_every_cut_is_refused() {
        let bytes = valid();
        let file = load(&bytes).unwrap();
        assert_eq!((file.method.as_str(), file.seed), ("coop", 1));
        assert_eq!(file.tensors["ctx"].dims(), [2, 2]);
        for cut in 0..bytes.len() {
            assert!(load(&bytes[..cut]).is_err(), "cut at {cut}");
        }
    }

    #[test]
    fn the_mean_is_that_of_runs_that_mean_the_same() {
        let first = load(&valid()).unwrap();
        let mut second = first.clone();
        second.seed = 2;
        second.classes = Classes::new(vec!["b".into(), "c".into()]).unwrap();
        second.config = serde_json::json!({"n_ctx": 2, "train": {"epochs": 3}});
        let ctx = (&first.tensors["ctx"] * 3.0).unwrap();
        second.tensors.insert("ctx".into(), ctx);
        let told =
            |a: &PromptFile, b: &PromptFile| mean(&[a.clone(), b.clone()]).unwrap_err().to_string();
        assert!(told(&first, &second).contains("different settings"));
        let mut first = first;
        first.config = serde_json::json!({"n_ctx": 2, "train": {"epochs": 4}});
        let found = mean(&[first.clone(), second.clone()]).unwrap();
        let expected = [[2f32, 4.0], [6.0, 8.0]];
        assert_eq!(found["ctx"].to_vec2::<f32>().unwrap(), expected);
        let mut other = second.clone();
        other.method = "kgcoop".into();
        assert!(told(&first, &other).contains("coop and kgcoop"));
        second.clip.weights_hash = "01".into();
        assert!(told(&first, &second).contains("different weights"));
        assert!(mean(&[]).is_err());
    }

    #[test]
    fn values_that_are_not_finite_are_refused_by_name() {
        let mut bytes = valid();
        let end = bytes.len();
        bytes[end - 4..].copy_from_slice(&f32::NAN.to_le_bytes());
        let message = load(&bytes).unwrap_err().to_string();
        assert!(
            message.contains("`ctx`") && message.contains("NaN"),
            "{message}"
        );
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(200))]

        #[test]
        fn any_bytes_are_a_file_or_an_error(
            changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..6),
            random in prop::collection::vec(any::<u8>(), 0..64), from_valid in any::<bool>(),
        ) {
            let mut bytes = if from_valid { valid() } else { random };
            for (at, value) in changes {
                if !bytes.is_empty() {
                    let at = at.index(bytes.len());
                    bytes[at] = value;
                }
            }
            let _ = load(&bytes);
        }
    }
}
