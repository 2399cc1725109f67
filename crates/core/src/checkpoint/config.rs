//! JSON files beside weights, and whether they agree with the tensors.

use std::fmt::Display;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::{Error, Preprocess, Result};

const MAX_CONFIG: u64 = 1 << 20;

/// A JSON file, addressed by pointers such as `/text_config/hidden_size`.
pub(super) struct Config {
    pub(super) path: PathBuf,
    pub(super) root: Value,
}

impl Config {
    pub(super) fn read(path: &Path) -> Result<Self> {
        let mut text = String::new();
        File::open(path)
            .and_then(|file| file.take(MAX_CONFIG).read_to_string(&mut text))
            .map_err(|e| Error::io(path, e))?;
        let root = serde_json::from_str(&text)
            .map_err(|e| Error::format(path, format!("not valid JSON: {e}")))?;
        Ok(Self {
            path: path.to_path_buf(),
            root,
        })
    }

    /// A value that is there and not null.
    pub(super) fn get(&self, pointer: &str) -> Option<&Value> {
        self.root.pointer(pointer).filter(|v| !v.is_null())
    }

    /// A size, or `default` where the format leaves it out.
    pub(super) fn size(&self, pointer: &str, default: usize) -> Result<usize> {
        match self.get(pointer) {
            None => Ok(default),
            Some(v) => v
                .as_u64()
                .and_then(|v| usize::try_from(v).ok())
                .ok_or_else(|| self.wrong(pointer, v, "a size")),
        }
    }

    /// "x = y is not supported, expected z".
    pub(super) fn wrong(
        &self,
        pointer: &str,
        found: impl Display,
        expected: impl Display,
    ) -> Error {
        Error::format(
            &self.path,
            format!(
                "{} = {found} is not supported, expected {expected}",
                dotted(pointer)
            ),
        )
    }

    /// An error unless what the file says of a size is what the tensors say.
    pub(super) fn agree(&self, pointer: &str, default: usize, tensors: usize) -> Result<()> {
        let said = self.size(pointer, default)?;
        if said == tensors {
            return Ok(());
        }
        let message = format!(
            "{} is {said}, but the tensors have {tensors}",
            dotted(pointer)
        );
        Err(Error::format(&self.path, message))
    }

    /// Takes mean and standard deviation over where they are given.
    pub(super) fn normalisation(&self, mean: &str, std: &str, into: &mut Preprocess) -> Result<()> {
        if let Some(v) = self.get(mean) {
            into.mean = triple(v).ok_or_else(|| self.wrong(mean, v, "three finite numbers"))?;
        }
        if let Some(v) = self.get(std) {
            let positive = triple(v).filter(|std| std.iter().all(|s| *s > 0.0));
            into.std = positive.ok_or_else(|| self.wrong(std, v, "three positive numbers"))?;
        }
        Ok(())
    }
}

fn dotted(pointer: &str) -> String {
    pointer.trim_start_matches('/').replace('/', ".")
}

/// Three finite numbers.
pub(super) fn triple(value: &Value) -> Option<[f32; 3]> {
    let numbers: Vec<f32> = value
        .as_array()?
        .iter()
        .map(|v| v.as_f64().map(|v| v as f32))
        .collect::<Option<_>>()?;
    <[f32; 3]>::try_from(numbers)
        .ok()
        .filter(|v| v.iter().all(|x| x.is_finite()))
}

/// Three numbers as JSON, in the shortest decimals that give the same f32.
pub(super) fn decimals(numbers: [f32; 3]) -> Value {
    // Through text: f32 to f64 directly would print seventeen digits.
    numbers
        .iter()
        .map(|x| x.to_string().parse::<f64>().unwrap_or(f64::from(*x)))
        .collect()
}
