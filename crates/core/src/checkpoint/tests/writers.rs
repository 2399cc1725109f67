//! Writes the files that PyTorch would, for tests.

use std::collections::BTreeMap;
use std::io::{Cursor, Write};

use candle_core::{DType, Tensor};
use zip::write::SimpleFileOptions;
use zip::{CompressionMethod, ZipWriter};

use super::super::bytes;
use super::super::torch::LEGACY_MAGIC;

/// Instructions of a pickle, one method each.
#[derive(Default)]
pub(super) struct Pickle(pub(super) Vec<u8>);

impl Pickle {
    pub(super) fn new() -> Self {
        Self(b"\x80\x02".to_vec())
    }

    pub(super) fn raw(mut self, bytes: &[u8]) -> Self {
        self.0.extend_from_slice(bytes);
        self
    }

    pub(super) fn text(self, text: &str) -> Self {
        self.raw(b"X")
            .raw(&(text.len() as u32).to_le_bytes())
            .raw(text.as_bytes())
    }

    pub(super) fn int(self, value: usize) -> Self {
        self.raw(b"\x8a\x08").raw(&(value as u64).to_le_bytes())
    }

    pub(super) fn tuple(self, values: &[usize]) -> Self {
        values
            .iter()
            .fold(self.raw(b"("), |p, v| p.int(*v))
            .raw(b"t")
    }

    /// A tensor over the storage `key` of `len` elements; `legacy` ids have one more part.
    pub(super) fn tensor(
        self,
        class: &str,
        key: &str,
        len: usize,
        window: (usize, &[usize], &[usize]),
        legacy: bool,
    ) -> Self {
        let (offset, shape, strides) = window;
        self.raw(b"ctorch._utils\n_rebuild_tensor_v2\n((")
            .text("storage")
            .raw(format!("ctorch\n{class}\n").as_bytes())
            .text(key)
            .text("cpu")
            .int(len)
            .raw(if legacy { b"NtQ" } else { b"tQ" })
            .int(offset)
            .tuple(shape)
            .tuple(strides)
            .raw(b"\x89ccollections\nOrderedDict\n)RtR")
    }

    fn whole(self, key: usize, tensor: &Tensor, legacy: bool) -> Self {
        let class = match tensor.dtype() {
            DType::F16 => "HalfStorage",
            DType::BF16 => "BFloat16Storage",
            DType::F32 => "FloatStorage",
            _ => "LongStorage",
        };
        let strides = tensor.stride().to_vec();
        self.tensor(
            class,
            &key.to_string(),
            tensor.elem_count(),
            (0, tensor.dims(), &strides),
            legacy,
        )
    }

    /// An ordered dict of tensors, storages numbered in order.
    pub(super) fn state_dict(
        self,
        tensors: &BTreeMap<String, Tensor>,
        prefix: &str,
        legacy: bool,
    ) -> Self {
        let open = self.raw(b"ccollections\nOrderedDict\n)R(");
        let each = |p: Self, (i, (name, tensor)): (usize, (&String, &Tensor))| {
            p.text(&format!("{prefix}{name}")).whole(i, tensor, legacy)
        };
        tensors
            .iter()
            .enumerate()
            .fold(open, each)
            .raw(b"u}(")
            .text("_metadata")
            .raw(b"}ub")
    }

    /// A tree of TorchScript modules.
    pub(super) fn modules(self, tensors: &BTreeMap<String, Tensor>) -> Self {
        let numbered: Vec<_> = tensors
            .iter()
            .enumerate()
            .map(|(i, (name, tensor))| (name.as_str(), i, tensor))
            .collect();
        self.module(&numbered)
    }

    fn module(self, tensors: &[(&str, usize, &Tensor)]) -> Self {
        let mut p = self
            .raw(b"c__torch__.clip\nModule\n)\x81}(")
            .text("training")
            .raw(b"\x89");
        let mut children: BTreeMap<&str, Vec<(&str, usize, &Tensor)>> = BTreeMap::new();
        for &(name, i, tensor) in tensors {
            match name.split_once('.') {
                Some((child, rest)) => children.entry(child).or_default().push((rest, i, tensor)),
                None => p = p.text(name).whole(i, tensor, false),
            }
        }
        children
            .iter()
            .fold(p, |p, (name, tensors)| p.text(name).module(tensors))
            .raw(b"ub")
    }

    pub(super) fn stop(self) -> Vec<u8> {
        self.raw(b".").0
    }
}

pub(super) fn numbers(tensor: &Tensor) -> Vec<u8> {
    let mut out = Vec::new();
    bytes::write_numbers(tensor, &mut out).unwrap();
    out
}

/// A zip as torch writes it, around any pickle and storages.
pub(super) fn zip(pickle: &[u8], storages: &[Vec<u8>], deflate: bool, byteorder: &str) -> Vec<u8> {
    let method = if deflate {
        CompressionMethod::Deflated
    } else {
        CompressionMethod::Stored
    };
    let options = SimpleFileOptions::default().compression_method(method);
    let mut zip = ZipWriter::new(Cursor::new(Vec::new()));
    let mut entry = |name: &str, content: &[u8]| {
        zip.start_file(format!("archive/{name}"), options).unwrap();
        zip.write_all(content).unwrap();
    };
    entry("data.pkl", pickle);
    entry("byteorder", byteorder.as_bytes());
    for (i, storage) in storages.iter().enumerate() {
        entry(&format!("data/{i}"), storage);
    }
    zip.finish().unwrap().into_inner()
}

pub(super) fn zip_of(pickle: &[u8], tensors: &BTreeMap<String, Tensor>, deflate: bool) -> Vec<u8> {
    zip(
        pickle,
        &tensors.values().map(numbers).collect::<Vec<_>>(),
        deflate,
        "little",
    )
}

/// The format before torch 1.6: five pickles, then the storages.
pub(super) fn legacy(tensors: &BTreeMap<String, Tensor>) -> Vec<u8> {
    let mut out = LEGACY_MAGIC.to_vec();
    out.extend(Pickle::new().int(1001).stop());
    out.extend(
        Pickle::new()
            .raw(b"}(")
            .text("little_endian")
            .raw(b"\x88u")
            .stop(),
    );
    out.extend(Pickle::new().state_dict(tensors, "", true).stop());
    out.extend(
        (0..tensors.len())
            .fold(Pickle::new().raw(b"]("), |p, i| p.text(&i.to_string()))
            .raw(b"e")
            .stop(),
    );
    for tensor in tensors.values() {
        out.extend((tensor.elem_count() as u64).to_le_bytes());
        out.extend(numbers(tensor));
    }
    out
}
