//! What classifies: a prompt file, or sentences written by hand. Flags that `eval` and `predict` share.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use cliptune::method::{ClipId, Entry, Predictor};
use cliptune::prompt_file::PromptFile;
use cliptune::{Classes, Clip, registry};
use serde_json::Value;

use super::settings::{Setting, configure};

/// Flags that choose the predictor.
#[derive(Debug, clap::Args)]
pub(crate) struct PredictorArgs {
    /// Prompt file that `cliptune fit` wrote [default: zero-shot, with "a photo of a {}."]
    #[arg(long, value_name = "FILE", conflicts_with_all = ["template", "ensemble", "dataset"])]
    prompt: Option<PathBuf>,
    /// Zero-shot: a sentence with {} for the class name; give it several times to average
    #[arg(long, value_name = "SENTENCE", help_heading = "Zero-shot")]
    template: Vec<String>,
    /// Zero-shot: a published list of sentences, select7 or imagenet80
    #[arg(long, value_name = "NAME", help_heading = "Zero-shot")]
    ensemble: Option<String>,
    /// Zero-shot: the sentence that the CoOp authors use for a data set, such as oxford_pets
    #[arg(long, value_name = "NAME", help_heading = "Zero-shot")]
    dataset: Option<String>,
}

/// A predictor whose file and settings have been read; the weights are still to come.
#[derive(Debug)]
pub(crate) struct Chosen {
    entry: Entry,
    file: Option<(PathBuf, PromptFile)>,
    config: Value,
}

impl PredictorArgs {
    /// Reads and checks all that can be checked without weights.
    pub(crate) fn read(&self) -> Result<Chosen> {
        if let Some(path) = &self.prompt {
            let file = PromptFile::load(path).context("the prompt cannot be used")?;
            let entry = registry::find(&file.method)
                .with_context(|| format!("{}: made by another build", path.display()))?;
            let config = file.config.clone();
            return Ok(Chosen {
                entry,
                file: Some((path.clone(), file)),
                config,
            });
        }
        let entry = registry::find("zeroshot")?;
        let mut flags = Vec::new();
        if !self.template.is_empty() {
            flags.push(Setting::from_alias(
                "--template",
                "templates",
                self.template.clone(),
            ));
        }
        if let Some(name) = &self.ensemble {
            flags.push(Setting::from_alias("--ensemble", "ensemble", name.as_str()));
        }
        if let Some(name) = &self.dataset {
            flags.push(Setting::from_alias("--dataset", "dataset", name.as_str()));
        }
        let config = configure(&entry, &[], &flags)?.config();
        Ok(Chosen {
            entry,
            file: None,
            config,
        })
    }
}

impl Chosen {
    /// The method's name.
    pub(crate) fn method(&self) -> &'static str {
        self.entry.slug
    }

    /// The prompt file, unless the sentences are hand-written.
    pub(crate) fn file(&self) -> Option<&PromptFile> {
        self.file.as_ref().map(|(_, file)| file)
    }

    /// The predictor on `clip`.
    pub(crate) fn predictor(&self, clip: &Clip, classes: &Classes) -> Result<Box<dyn Predictor>> {
        let Some((path, file)) = &self.file else {
            let file = PromptFile {
                method: self.entry.slug.to_owned(),
                config: self.config.clone(),
                clip: ClipId::of(clip),
                classes: classes.clone(),
                seed: 0,
                notes: Value::Null,
                tensors: Default::default(),
            };
            return Ok((self.entry.load)(&file, clip)?);
        };
        file.check_clip(clip)
            .and_then(|()| (self.entry.load)(file, clip))
            .with_context(|| format!("{}: cannot be used here", path.display()))
    }
}

/// Class names from a file with one name a line, or from a list with commas.
pub(crate) fn read_classes(given: &str) -> Result<Classes> {
    let path = Path::new(given);
    let looks_like_a_file =
        path.extension().is_some_and(|e| e == "txt") || given.contains(std::path::MAIN_SEPARATOR);
    let names: Vec<String> = if path.is_file() {
        let text = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
        let lines: Vec<&str> = text
            .trim_start_matches('\u{feff}')
            .lines()
            .map(str::trim)
            .collect();
        let end = lines
            .iter()
            .rposition(|line| !line.is_empty())
            .map_or(0, |last| last + 1);
        if let Some(empty) = lines.iter().take(end).position(|line| line.is_empty()) {
            bail!(
                "{}:{}: empty line; expected one class name a line",
                path.display(),
                empty + 1
            );
        }
        lines.into_iter().take(end).map(str::to_owned).collect()
    } else if looks_like_a_file && !given.contains(',') {
        bail!(
            "--classes {given}: there is no such file; expected a file with one name a line, or names with commas"
        );
    } else {
        given
            .split(',')
            .map(|name| name.trim().to_owned())
            .collect()
    };
    Classes::new(names).with_context(|| format!("--classes {given}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn class_names_come_from_a_file_or_a_list() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let path = folder.path().join("names.txt");
        cliptune::files::write_atomically(&path, |out| {
            out.write_all("\u{feff}daisy\r\nblue, big tit\n\n".as_bytes())
        })?;
        let path = path.display().to_string();
        assert_eq!(read_classes(&path)?.names(), ["daisy", "blue, big tit"]);
        assert_eq!(read_classes("daisy, tulip")?.names(), ["daisy", "tulip"]);
        assert!(read_classes("daisy,,tulip").is_err());
        assert!(
            read_classes("absent.txt")
                .unwrap_err()
                .to_string()
                .contains("no such file")
        );
        Ok(())
    }
}
