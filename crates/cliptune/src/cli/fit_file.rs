//! The TOML file that can say all that `cliptune fit` takes.

use std::ops::Range;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow};
use serde::Deserialize;
use toml::de::{DeTable, DeValue};

use super::data::Subset;
use super::model::StorageName;
use super::settings::Setting;

/// One path, or several.
#[derive(Debug, Deserialize)]
#[serde(untagged, expecting = "expected a path or a list of paths")]
pub(crate) enum Paths {
    One(PathBuf),
    Many(Vec<PathBuf>),
}

impl Paths {
    fn iter_mut(&mut self) -> impl Iterator<Item = &mut PathBuf> {
        match self {
            Self::One(path) => std::slice::from_mut(path).iter_mut(),
            Self::Many(paths) => paths.iter_mut(),
        }
    }
}

impl From<Paths> for Vec<PathBuf> {
    fn from(paths: Paths) -> Self {
        match paths {
            Paths::One(path) => vec![path],
            Paths::Many(paths) => paths,
        }
    }
}

/// What a file may say; every key is optional, and flags win.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct FitFile {
    pub(crate) clip: Option<PathBuf>,
    pub(crate) storage: Option<StorageName>,
    pub(crate) images: Option<Paths>,
    pub(crate) subset: Option<Subset>,
    pub(crate) shots: Option<usize>,
    pub(crate) method: Option<String>,
    pub(crate) seed: Option<u64>,
    pub(crate) out: Option<PathBuf>,
    pub(crate) epochs: Option<usize>,
    pub(crate) lr: Option<f64>,
    pub(crate) batch: Option<usize>,
    pub(crate) cache: Option<PathBuf>,
    pub(crate) no_cache: Option<bool>,
    pub(crate) skip_bad_images: Option<bool>,
    pub(crate) init: Option<Paths>,
    pub(crate) fresh: Option<bool>,
    pub(crate) quiet: Option<bool>,
    pub(crate) memory: Option<u64>,
    pub(crate) threads: Option<usize>,
    config: Option<toml::Table>,
    /// The method's settings: `config`, with the lines.
    #[serde(skip)]
    pub(crate) settings: Vec<Setting>,
}

impl FitFile {
    /// Reads a file. Relative paths in it are relative to it.
    ///
    /// # Errors
    /// Names the file, the line and what is wrong with it.
    pub(crate) fn read(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
        let mut file = Self::parse(&text, &path.display().to_string())?;
        let folder = path.parent().unwrap_or(Path::new(""));
        for path in [&mut file.clip, &mut file.out, &mut file.cache]
            .into_iter()
            .flatten()
            .chain(file.images.iter_mut().flat_map(Paths::iter_mut))
            .chain(file.init.iter_mut().flat_map(Paths::iter_mut))
        {
            *path = folder.join(&path);
        }
        Ok(file)
    }

    fn parse(text: &str, name: &str) -> Result<Self> {
        let refuse = |e: toml::de::Error| match e.span() {
            Some(span) => anyhow!("{name}:{}: {}", line(text, &span), e.message()),
            None => anyhow!("{name}: {}", e.message()),
        };
        let mut file: Self = toml::from_str(text).map_err(refuse)?;
        let lines = DeTable::parse(text).map_err(refuse)?.into_inner();
        let aliases = [
            (
                "epochs",
                file.epochs.map(|n| toml::Value::Integer(n as i64)),
            ),
            ("lr", file.lr.map(toml::Value::Float)),
            ("batch", file.batch.map(|n| toml::Value::Integer(n as i64))),
        ];
        for (key, value) in aliases {
            let Some(value) = value else { continue };
            let setting = if key == "batch" { "batch_size" } else { key };
            let at = line_of(text, &lines, &[key.to_owned()]);
            let origin = format!("{name}:{at}: {key} = {value}");
            let path = vec!["train".to_owned(), setting.to_owned()];
            file.settings
                .push(Setting::from_file(path, &value, origin)?);
        }
        if let Some(config) = file.config.take() {
            leaves(
                &toml::Value::Table(config),
                &mut Vec::new(),
                &mut |path, value| {
                    let full: Vec<String> = std::iter::once("config".to_owned())
                        .chain(path.iter().cloned())
                        .collect();
                    let at = line_of(text, &lines, &full);
                    let origin = format!("{name}:{at}: {} = {value}", full.join("."));
                    file.settings
                        .push(Setting::from_file(path.to_vec(), value, origin)?);
                    Ok(())
                },
            )?;
        }
        Ok(file)
    }
}

fn leaves(
    value: &toml::Value,
    path: &mut Vec<String>,
    visit: &mut dyn FnMut(&[String], &toml::Value) -> Result<()>,
) -> Result<()> {
    let toml::Value::Table(table) = value else {
        return visit(path, value);
    };
    for (key, value) in table {
        path.push(key.clone());
        leaves(value, path, visit)?;
        path.pop();
    }
    Ok(())
}

/// Line of a byte range, counted from 1.
fn line(text: &str, span: &Range<usize>) -> usize {
    1 + text
        .bytes()
        .take(span.start)
        .filter(|byte| *byte == b'\n')
        .count()
}

/// Line on which the deepest known part of `path` is written.
fn line_of(text: &str, table: &DeTable<'_>, path: &[String]) -> usize {
    let (mut table, mut found) = (table, 1);
    for part in path {
        let Some((key, value)) = table.iter().find(|(key, _)| key.get_ref() == part) else {
            break;
        };
        found = line(text, &key.span());
        match value.get_ref() {
            DeValue::Table(inner) => table = inner,
            _ => break,
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn everything_can_be_said() -> Result<()> {
        let text = "clip = \"w.pt\"\nimages = \"/data\"\nmethod = \"coop\"\nshots = 4\nseed = 2\nsubset = \"base\"\nstorage = \"f16\"\nmemory = 400\nbatch = 8\n\n[config]\nn_ctx = 4\ntrain.lr = 1.0\n[config.train.optimizer]\nkind = \"adam\"\n";
        let file = FitFile::parse(text, "fit.toml")?;
        assert_eq!((file.shots, file.memory), (Some(4), Some(400)));
        let shown = format!("{:?}", file.settings);
        assert!(shown.contains("fit.toml:9: batch = 8"), "{shown}");
        assert!(shown.contains("fit.toml:12: config.n_ctx = 4"), "{shown}");
        assert!(
            shown.contains("fit.toml:15: config.train.optimizer.kind = "),
            "{shown}"
        );
        Ok(())
    }

    #[test]
    fn refusals_name_the_line() {
        let message = |text: &str| FitFile::parse(text, "fit.toml").unwrap_err().to_string();
        assert!(
            message("seed = 1\nshoots = 4\n").starts_with("fit.toml:2: unknown field `shoots`")
        );
        assert!(message("seed = 1\n\nshots = \"x\"").starts_with("fit.toml:3: invalid type"));
        assert!(message("seed = 1\n[config\n").starts_with("fit.toml:2: "));
        assert!(message("subset = \"old\"").contains("base"));
        assert!(message("seed = 1\nimages = 3").starts_with("fit.toml:2: expected a path"));
        assert!(message("[config]\ntrain.lr = nan").starts_with("fit.toml:2: "));
    }

    proptest! {
        #[test]
        fn no_file_panics(text in "[a-z_.]{0,8} ?=?[a-z0-9\\[\\]{}\".,=\n -]{0,40}") {
            let _ = FitFile::parse(&text, "fit.toml");
        }
    }
}
