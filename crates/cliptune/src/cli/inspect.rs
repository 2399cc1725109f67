//! `cliptune inspect`: what weights or a prompt file hold.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use cliptune::Checkpoint;
use cliptune::checkpoint::weights_hash;
use cliptune::prompt_file::PromptFile;
use serde_json::{Value, json};

use super::out;

/// Show what CLIP weights or a prompt file hold, as JSON
#[derive(Debug, clap::Args)]
#[group(required = true, multiple = true)]
pub(crate) struct Inspect {
    /// CLIP weights
    #[arg(long, value_name = "WEIGHTS")]
    clip: Option<PathBuf>,
    /// Prompt file
    #[arg(long, value_name = "FILE")]
    prompt: Option<PathBuf>,
}

impl Inspect {
    pub(crate) fn run(&self) -> Result<()> {
        let shown = match (&self.clip, &self.prompt) {
            (Some(clip), None) => weights(clip)?,
            (None, Some(path)) => prompt(path)?,
            (clip, path) => json!({
                "clip": clip.as_deref().map(weights).transpose()?,
                "prompt": path.as_deref().map(prompt).transpose()?,
            }),
        };
        out::result(&format!("{}\n", serde_json::to_string_pretty(&shown)?))
    }
}

fn weights(path: &Path) -> Result<Value> {
    let checkpoint = Checkpoint::open(path).context("the CLIP weights cannot be used")?;
    let numbers: usize = checkpoint.tensors.values().map(|t| t.elem_count()).sum();
    Ok(json!({
        "name": checkpoint.arch.name(),
        "arch": checkpoint.arch,
        "preprocess": checkpoint.preprocess,
        "tensors": checkpoint.tensors.len(),
        "parameters": numbers,
        "weights_hash": weights_hash(&checkpoint.tensors)?,
    }))
}

fn prompt(path: &Path) -> Result<Value> {
    let file = PromptFile::load(path).context("the prompt cannot be used")?;
    let tensors: serde_json::Map<String, Value> = file
        .tensors
        .iter()
        .map(|(name, t)| (name.clone(), json!(t.dims())))
        .collect();
    Ok(json!({
        "method": file.method,
        "config": file.config,
        "clip": file.clip,
        "classes": file.classes,
        "seed": file.seed,
        "notes": file.notes,
        "tensors": tensors,
    }))
}
