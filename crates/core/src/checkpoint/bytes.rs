//! Between bytes on disk and tensors, a piece at a time.

use std::io::{Read, Write};

use candle_core::{CpuStorage, DType, Device, Storage, Tensor};
use half::{bf16, f16};

use crate::{Error, Result};

/// Bytes handled at once where a whole tensor need not be.
const PIECE: usize = 1 << 20;

/// How much memory the tensors of one file may take.
///
/// A file may be smaller than its tensors (deflated entries, several views of one storage), but not without bound.
pub(super) struct Budget {
    left: u64,
}

impl Budget {
    pub(super) fn of_file(len: u64) -> Self {
        Self {
            left: len.saturating_mul(64).saturating_add(16 << 20),
        }
    }

    /// Sets `bytes` aside, or says that the file is not to be trusted.
    pub(super) fn take(&mut self, bytes: usize) -> Result<(), String> {
        let left = u64::try_from(bytes)
            .ok()
            .and_then(|n| self.left.checked_sub(n));
        self.left =
            left.ok_or("the tensors together are more than 64 times larger than the file")?;
        Ok(())
    }
}

/// Reads `len` bytes; memory grows only as they arrive.
pub(super) fn read_exactly(from: &mut impl Read, len: usize) -> std::io::Result<Vec<u8>> {
    let mut content = Vec::new();
    from.take(u64::try_from(len).unwrap_or(u64::MAX))
        .read_to_end(&mut content)?;
    if content.len() != len {
        return Err(std::io::ErrorKind::UnexpectedEof.into());
    }
    Ok(content)
}

/// A tensor of little-endian numbers; f64 becomes f32, which every consumer computes in.
pub(super) fn tensor(bytes: &[u8], dtype: DType, shape: &[usize]) -> Result<Tensor> {
    let device = Device::Cpu;
    if bytes.is_empty() {
        return Ok(Tensor::zeros(shape, dtype, &device)?);
    }
    macro_rules! decode {
        ($t:ty, $width:literal) => {{
            let numbers: Vec<$t> = bytes
                .as_chunks::<$width>()
                .0
                .iter()
                .map(|b| <$t>::from_le_bytes(*b))
                .collect();
            Tensor::from_vec(numbers, shape, &device)?
        }};
    }
    Ok(match dtype {
        DType::F16 => decode!(f16, 2),
        DType::BF16 => decode!(bf16, 2),
        DType::F32 => decode!(f32, 4),
        DType::F64 => decode!(f64, 8).to_dtype(DType::F32)?,
        DType::I64 => decode!(i64, 8),
        DType::I32 => decode!(i32, 4),
        DType::I16 => decode!(i16, 2),
        DType::U8 => decode!(u8, 1),
        other => {
            return Err(Error::Data(format!(
                "tensors of type {other:?} are not supported"
            )));
        }
    })
}

/// Calls `f` with the numbers of a contiguous CPU tensor in pieces, as f32.
pub(super) fn for_each_f32(tensor: &Tensor, mut f: impl FnMut(&[f32])) -> Result<()> {
    let tensor = tensor.contiguous()?;
    let (storage, layout) = tensor.storage_and_layout();
    let range = layout.start_offset()..layout.start_offset() + layout.shape().elem_count();
    let unsupported = || {
        Error::Data(format!(
            "expected a floating-point tensor on the CPU, found {:?}",
            tensor.dtype()
        ))
    };
    let mut piece = Vec::new();
    macro_rules! each {
        ($numbers:expr, $convert:expr) => {
            for numbers in $numbers.get(range).unwrap_or_default().chunks(PIECE / 4) {
                piece.clear();
                piece.extend(numbers.iter().map($convert));
                f(&piece);
            }
        };
    }
    match &*storage {
        Storage::Cpu(CpuStorage::F32(v)) => v
            .get(range)
            .unwrap_or_default()
            .chunks(PIECE / 4)
            .for_each(f),
        Storage::Cpu(CpuStorage::F16(v)) => each!(v, |x| x.to_f32()),
        Storage::Cpu(CpuStorage::BF16(v)) => each!(v, |x| x.to_f32()),
        _ => return Err(unsupported()),
    }
    Ok(())
}

/// The first number that is not finite, if there is one.
pub(super) fn not_finite(tensor: &Tensor) -> Result<Option<f32>> {
    let mut found = None;
    for_each_f32(tensor, |piece| {
        found = found.or_else(|| piece.iter().copied().find(|x| !x.is_finite()));
    })?;
    Ok(found)
}

/// Writes the numbers of a CPU tensor as they are, little-endian.
pub(super) fn write_numbers(tensor: &Tensor, to: &mut dyn Write) -> std::io::Result<()> {
    let tensor = tensor.contiguous().map_err(std::io::Error::other)?;
    let (storage, layout) = tensor.storage_and_layout();
    let range = layout.start_offset()..layout.start_offset() + layout.shape().elem_count();
    let mut piece: Vec<u8> = Vec::with_capacity(PIECE);
    macro_rules! each {
        ($numbers:expr) => {
            for numbers in $numbers.get(range).unwrap_or_default().chunks(PIECE / 8) {
                piece.clear();
                for x in numbers {
                    piece.extend_from_slice(&x.to_le_bytes());
                }
                to.write_all(&piece)?;
            }
        };
    }
    match &*storage {
        Storage::Cpu(CpuStorage::F32(v)) => each!(v),
        Storage::Cpu(CpuStorage::F16(v)) => each!(v),
        Storage::Cpu(CpuStorage::BF16(v)) => each!(v),
        Storage::Cpu(CpuStorage::I64(v)) => each!(v),
        _ => {
            return Err(std::io::Error::other(format!(
                "tensors of type {:?} are not written",
                tensor.dtype()
            )));
        }
    }
    Ok(())
}
