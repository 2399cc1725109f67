//! Reading CLIP weights from any published layout, and writing them in another.
//!
//! What a file is, is decided by its content: OpenAI's TorchScript archives, state dicts of `torch.save`, folders of
//! transformers and of OpenCLIP, and single safetensors files. Sizes are read off the tensors; a config beside them must agree.
//! Nothing in a file is ever executed, and memory stays within a small multiple of the file's size.

mod bytes;
mod config;
mod graph;
mod hf;
mod open;
mod open_clip;
mod pickle;
mod random;
mod safetensors;
mod save;
mod shapes;
#[cfg(test)]
mod tests;
mod torch;
mod window;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use candle_core::Tensor;
use rayon::prelude::*;

use crate::{Arch, Preprocess, Result};

pub use open::{TorchState, read_torch_state};
pub use random::random;
pub(crate) use safetensors::SafetensorsFile;
pub use save::Layout;
pub use shapes::expected_tensors;

/// A checkpoint in memory: the sizes, and every tensor under OpenAI's state-dict key, in the type in which it was stored.
#[derive(Debug)]
pub struct Checkpoint {
    /// File or folder it came from.
    pub path: PathBuf,
    /// Sizes and activation.
    pub arch: Arch,
    /// Normalisation that belongs to the weights.
    pub preprocess: Preprocess,
    /// Tensors under OpenAI's keys (`visual.conv1.weight`, `transformer.resblocks.0.attn.in_proj_weight`, ...), on the CPU; f16, bf16 or f32.
    pub tensors: BTreeMap<String, Tensor>,
}

impl Checkpoint {
    /// Opens weights of any supported layout: a file, or a folder of transformers or OpenCLIP.
    ///
    /// # Errors
    /// Names the file, the tensor or setting, and what was expected: damaged and unknown files, missing, unknown and misshapen tensors, values that are not finite, a config that contradicts the tensors, and settings that the towers here do not compute.
    pub fn open(path: &Path) -> Result<Self> {
        open::open(path)
    }

    /// Writes the weights in a layout, with numbers of type `dtype` (f16, bf16 or f32), or as stored.
    ///
    /// `out` becomes a folder for [`Layout::Hf`] and [`Layout::OpenClip`], a file for [`Layout::Safetensors`]. It appears only when it is complete.
    ///
    /// # Errors
    /// A folder that exists and is not empty, a ResNet for transformers, a value beyond the range of `dtype`, and whatever the operating system refuses.
    pub fn save(
        &self,
        layout: Layout,
        dtype: Option<candle_core::DType>,
        out: &Path,
    ) -> Result<()> {
        save::save(self, layout, dtype, out)
    }
}

/// A fingerprint of weights: 64 hexadecimal digits that depend on names, shapes and values, but not on layout or number type.
///
/// BLAKE3 over, in the order of names, each tensor's name, shape and the BLAKE3 of its values as little-endian f32.
///
/// # Errors
/// Tensors that are not floating point or not on the CPU.
pub fn weights_hash(tensors: &BTreeMap<String, Tensor>) -> Result<String> {
    let each = |(name, tensor): (&String, &Tensor)| -> Result<Vec<u8>> {
        let mut values = blake3::Hasher::new();
        let mut raw = Vec::new();
        bytes::for_each_f32(tensor, |piece| {
            raw.clear();
            raw.extend(piece.iter().flat_map(|x| x.to_le_bytes()));
            values.update(&raw);
        })?;
        let mut entry = Vec::new();
        entry.extend((name.len() as u64).to_le_bytes());
        entry.extend(name.as_bytes());
        entry.extend((tensor.rank() as u64).to_le_bytes());
        entry.extend(tensor.dims().iter().flat_map(|d| (*d as u64).to_le_bytes()));
        entry.extend(values.finalize().as_bytes());
        Ok(entry)
    };
    let entries: Vec<Vec<u8>> = tensors.par_iter().map(each).collect::<Result<_>>()?;
    Ok(blake3::hash(&entries.concat()).to_hex().to_string())
}
