//! Safetensors files, read tensor by tensor and written as a stream.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::{BufReader, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use ::safetensors::tensor::{Dtype, Metadata};
use candle_core::{DType, Tensor};
use serde_json::{Map, Value, json};

use super::bytes;
use crate::files::write_atomically;
use crate::{Error, Result};

/// Longest header that is read, the format's own limit.
const MAX_HEADER: u64 = 100_000_000;

struct Place {
    dtype: DType,
    shape: Vec<usize>,
    start: u64,
    len: usize,
}

/// An opened file, with no tensor read yet.
pub(crate) struct SafetensorsFile {
    path: PathBuf,
    file: BufReader<File>,
    places: BTreeMap<String, Place>,
    /// The header's free text.
    pub(crate) metadata: HashMap<String, String>,
}

/// Length of the header if the first bytes of a file of `file_len` bytes are those of a safetensors file.
pub(super) fn header_len(head: &[u8], file_len: u64) -> Option<u64> {
    let (len, rest) = head.split_first_chunk::<8>()?;
    let len = u64::from_le_bytes(*len);
    (rest.first() == Some(&b'{') && len <= MAX_HEADER && len < file_len).then_some(len)
}

impl SafetensorsFile {
    /// Opens a file that can only be a safetensors file.
    pub(crate) fn open_path(path: &Path) -> Result<Self> {
        let io = |e| Error::io(path, e);
        let file = File::open(path).map_err(io)?;
        let len = file.metadata().map_err(io)?.len();
        let mut head = Vec::new();
        (&file).take(9).read_to_end(&mut head).map_err(io)?;
        let header_len = header_len(&head, len)
            .ok_or_else(|| Error::format(path, "not a whole safetensors file"))?;
        Self::open(path, file, header_len, len)
    }

    /// Reads the header, whose length [`header_len`] found.
    ///
    /// The file is not mapped: mapped, one that shrinks while it is in use would end the process instead of giving an error.
    pub(super) fn open(path: &Path, file: File, header_len: u64, file_len: u64) -> Result<Self> {
        let bad = |message: String| Error::format(path, message);
        let mut file = BufReader::new(file);
        file.seek(SeekFrom::Start(8))
            .map_err(|e| Error::io(path, e))?;
        let mut header = Vec::new();
        file.by_ref()
            .take(header_len)
            .read_to_end(&mut header)
            .map_err(|e| Error::io(path, e))?;
        let header: Metadata = serde_json::from_slice(&header)
            .map_err(|e| bad(format!("the safetensors header is damaged: {e}")))?;
        let data_start = header_len + 8;
        let mut places = BTreeMap::new();
        let mut total = 0u64;
        for (name, info) in header.tensors() {
            let bad = |message: &str| bad(format!("tensor `{name}`: {message}"));
            let dtype = match info.dtype {
                Dtype::F16 => DType::F16,
                Dtype::BF16 => DType::BF16,
                Dtype::F32 => DType::F32,
                Dtype::F64 => DType::F64,
                Dtype::I64 => DType::I64,
                Dtype::I32 => DType::I32,
                Dtype::I16 => DType::I16,
                Dtype::U8 | Dtype::BOOL => DType::U8,
                _ => {
                    return Err(bad(&format!(
                        "is stored as {:?}, which is not supported",
                        info.dtype
                    )));
                }
            };
            let (start, end) = info.data_offsets;
            let len = info
                .shape
                .iter()
                .try_fold(dtype.size_in_bytes(), |n, d| n.checked_mul(*d));
            let len = len.filter(|&len| end.checked_sub(start) == Some(len));
            let len = len.ok_or_else(|| bad("its shape does not fit the bytes it is given"))?;
            let (start, end) = (start as u64, end as u64);
            if data_start.checked_add(end).is_none_or(|end| end > file_len) {
                return Err(bad(
                    "the file ends before it; it may be truncated, download it again",
                ));
            }
            total = total.saturating_add(end - start);
            places.insert(
                name,
                Place {
                    dtype,
                    shape: info.shape.clone(),
                    start: data_start + start,
                    len,
                },
            );
        }
        if data_start.checked_add(total) != Some(file_len) {
            return Err(bad(format!(
                "its tensors take {total} bytes, the file has {}",
                file_len - data_start
            )));
        }
        let metadata = header.metadata().clone().unwrap_or_default();
        Ok(Self {
            path: path.to_path_buf(),
            file,
            places,
            metadata,
        })
    }

    /// Name and shape of every tensor.
    pub(super) fn shapes(&self) -> BTreeMap<String, Vec<usize>> {
        self.places
            .iter()
            .map(|(name, place)| (name.clone(), place.shape.clone()))
            .collect()
    }

    /// Reads the tensors whose name `wanted` accepts.
    pub(crate) fn load(
        mut self,
        wanted: impl Fn(&str) -> bool,
    ) -> Result<BTreeMap<String, Tensor>> {
        let mut tensors = BTreeMap::new();
        let mut places: Vec<_> = self
            .places
            .into_iter()
            .filter(|(name, _)| wanted(name))
            .collect();
        places.sort_by_key(|(_, place)| place.start);
        for (name, place) in places {
            let mut read = || {
                self.file.seek(SeekFrom::Start(place.start))?;
                bytes::read_exactly(&mut self.file, place.len)
            };
            let numbers = read().map_err(|e| Error::io(&self.path, e))?;
            tensors.insert(name, bytes::tensor(&numbers, place.dtype, &place.shape)?);
        }
        Ok(tensors)
    }
}

/// Writes tensors (f16, bf16, f32 or i64, on the CPU) one after the other; nothing is copied as a whole.
///
/// # Errors
/// [`Error::Io`] naming `path`.
pub(super) fn write(
    path: &Path,
    tensors: &[(String, Tensor)],
    metadata: &[(&str, String)],
) -> Result<()> {
    let mut header = Map::new();
    let metadata: Map<String, Value> = metadata
        .iter()
        .map(|(k, v)| ((*k).to_owned(), json!(v)))
        .collect();
    header.insert("__metadata__".to_owned(), Value::Object(metadata));
    // Wide types first keeps every tensor aligned, as readers that map the file expect.
    let mut ordered: Vec<_> = tensors.iter().collect();
    ordered.sort_by(|(a, x), (b, y)| {
        y.dtype()
            .size_in_bytes()
            .cmp(&x.dtype().size_in_bytes())
            .then_with(|| a.cmp(b))
    });
    let mut end = 0;
    for (name, tensor) in &ordered {
        let start = end;
        end += tensor.elem_count() * tensor.dtype().size_in_bytes();
        let dtype = match tensor.dtype() {
            DType::F16 => "F16",
            DType::BF16 => "BF16",
            DType::F32 => "F32",
            DType::I64 => "I64",
            other => {
                return Err(Error::format(
                    path,
                    format!("tensor `{name}` of type {other:?} cannot be written"),
                ));
            }
        };
        header.insert(
            name.clone(),
            json!({"dtype": dtype, "shape": tensor.dims(), "data_offsets": [start, end]}),
        );
    }
    let mut header = Value::Object(header).to_string();
    while !header.len().is_multiple_of(8) {
        header.push(' ');
    }
    write_atomically(path, |to: &mut dyn Write| {
        to.write_all(&(header.len() as u64).to_le_bytes())?;
        to.write_all(header.as_bytes())?;
        ordered
            .iter()
            .try_for_each(|(_, tensor)| bytes::write_numbers(tensor, to))
    })
}
