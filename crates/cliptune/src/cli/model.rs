//! The weights: flags of every command that needs them.

use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, Result};
use cliptune::{Clip, Storage};
use serde::Deserialize;

use super::out;

/// How the frozen weights are kept.
#[derive(Clone, Copy, Debug, Default, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub(crate) enum StorageName {
    /// Fastest
    #[default]
    F32,
    /// Half the memory
    F16,
    /// Half the memory, fewer digits
    Bf16,
}

impl From<StorageName> for Storage {
    fn from(name: StorageName) -> Self {
        match name {
            StorageName::F32 => Self::F32,
            StorageName::F16 => Self::F16,
            StorageName::Bf16 => Self::Bf16,
        }
    }
}

/// Flags of the weights and of the machine.
#[derive(Debug, clap::Args)]
pub(crate) struct ModelArgs {
    /// CLIP weights: OpenAI's .pt, an OpenCLIP or Hugging Face file or folder, safetensors
    #[arg(long, value_name = "WEIGHTS")]
    pub(crate) clip: PathBuf,
    #[command(flatten)]
    pub(crate) machine: MachineArgs,
}

/// Flags of the machine.
#[derive(Debug, clap::Args)]
pub(crate) struct MachineArgs {
    /// How the frozen weights are kept in memory; computation is in f32 always [default: f32]
    #[arg(long, value_enum, value_name = "TYPE", help_heading = "Machine")]
    pub(crate) storage: Option<StorageName>,
    /// Threads to use [default: all cores]
    #[arg(long, value_name = "N", help_heading = "Machine")]
    pub(crate) threads: Option<usize>,
    /// Print nothing but results and errors
    #[arg(short, long, help_heading = "Machine")]
    pub(crate) quiet: bool,
}

impl ModelArgs {
    pub(crate) fn load(&self) -> Result<Clip> {
        set_threads(self.machine.threads)?;
        load(
            &self.clip,
            self.machine.storage.unwrap_or_default(),
            self.machine.quiet,
        )
    }
}

/// Limits the threads; results do not depend on their number.
pub(crate) fn set_threads(threads: Option<usize>) -> Result<()> {
    match threads {
        None => Ok(()),
        Some(0) => anyhow::bail!("--threads 0: at least one thread is needed"),
        Some(n) => rayon::ThreadPoolBuilder::new()
            .num_threads(n)
            .build_global()
            .with_context(|| format!("--threads {n}")),
    }
}

/// Loads the weights and says what they are.
pub(crate) fn load(path: &std::path::Path, storage: StorageName, quiet: bool) -> Result<Clip> {
    let started = Instant::now();
    let clip = Clip::load_with(path, storage.into()).context("the CLIP weights cannot be used")?;
    // Every method reads class names; weights that cannot are refused before any work.
    clip.text()
        .tokenizer()
        .with_context(|| format!("{} cannot be used", path.display()))?;
    if !quiet {
        out::say(format_args!(
            "weights   {} from {} ({:.1} s)",
            clip.arch().name(),
            path.display(),
            started.elapsed().as_secs_f64()
        ));
    }
    Ok(clip)
}
