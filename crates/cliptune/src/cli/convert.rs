//! `cliptune convert`: the same weights in another layout.

use std::path::PathBuf;

use anyhow::{Context, Result};
use candle_core::DType;
use cliptune::Checkpoint;
use cliptune::checkpoint::Layout;

use super::model::StorageName;
use super::out;

/// Convert CLIP weights to another layout
#[derive(Debug, clap::Args)]
pub(crate) struct Convert {
    /// CLIP weights: OpenAI's .pt, an OpenCLIP or Hugging Face file or folder, safetensors
    #[arg(long, value_name = "WEIGHTS")]
    clip: PathBuf,
    /// Layout to write
    #[arg(long, value_enum, value_name = "LAYOUT")]
    to: LayoutName,
    /// Type of the numbers [default: as they are stored]
    #[arg(long, value_enum, value_name = "TYPE")]
    dtype: Option<StorageName>,
    /// Folder to make, or file for the layout `safetensors`
    #[arg(short, long, value_name = "OUT")]
    out: PathBuf,
}

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum LayoutName {
    /// A folder as Hugging Face's transformers keep it
    Hf,
    /// A folder as OpenCLIP keeps it
    OpenClip,
    /// One file with OpenAI's tensor names
    Safetensors,
}

impl Convert {
    pub(crate) fn run(&self) -> Result<()> {
        if matches!(self.to, LayoutName::Safetensors) {
            out::check_writable(&self.out)?;
        }
        let layout = match self.to {
            LayoutName::Hf => Layout::Hf,
            LayoutName::OpenClip => Layout::OpenClip,
            LayoutName::Safetensors => Layout::Safetensors,
        };
        let dtype = self.dtype.map(|name| match name {
            StorageName::F32 => DType::F32,
            StorageName::F16 => DType::F16,
            StorageName::Bf16 => DType::BF16,
        });
        let checkpoint = Checkpoint::open(&self.clip).context("the CLIP weights cannot be used")?;
        checkpoint
            .save(layout, dtype, &self.out)
            .context("the weights cannot be written")?;
        out::say(format_args!(
            "wrote {} to {}",
            checkpoint.arch.name(),
            self.out.display()
        ));
        Ok(())
    }
}
