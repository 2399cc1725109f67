//! One cache file: the features of some images, and by which keys they are found.
//!
//! A safetensors file with `features` `(n, ...)`, `items` `(n, 32)`, the images' keys, and last of all `checksum` `(32,)`, the
//! BLAKE3 of every byte before it. It stands at the end so that a file can be written in one pass. The header follows from the context and
//! the number of images, so a reader need not parse one: it compares.

use std::fs::File;
use std::io::Write;
use std::path::Path;

use cliptune_core::files;
use memmap2::Mmap;

pub(super) const FORMAT: &str = "cliptune features 1";

const CHECKSUM: usize = blake3::OUT_LEN;

/// What an image's features depend on, hashed.
pub(super) type ItemKey = [u8; 32];

/// Writes a whole file into what it is given.
pub(super) type Fill<'a> = &'a mut dyn FnMut(&mut dyn Write) -> std::io::Result<()>;

/// Gives the features of some images, little-endian f32.
pub(super) type Encode<'a> = &'a mut dyn FnMut(&[(usize, ItemKey)]) -> std::io::Result<Vec<u8>>;

/// What the features in a file depend on, besides the images.
#[derive(Debug)]
pub(super) struct Context {
    /// Hash of it all, in hexadecimal.
    pub(super) key: String,
    /// Shape of one image's features.
    pub(super) row_shape: Vec<usize>,
}

impl Context {
    fn row_bytes(&self) -> usize {
        self.row_shape.iter().product::<usize>() * size_of::<f32>()
    }

    /// Length and text of the header for `n` images, padded so that the features are aligned.
    fn header(&self, n: usize) -> Vec<u8> {
        let features = n * self.row_bytes();
        let items = features + n * size_of::<ItemKey>();
        let shape: Vec<usize> = [&[n], &self.row_shape[..]].concat();
        let mut text = serde_json::json!({
            "__metadata__": {"format": FORMAT, "context": self.key},
            "features": {"dtype": "F32", "shape": shape, "data_offsets": [0, features]},
            "items": {"dtype": "U8", "shape": [n, size_of::<ItemKey>()], "data_offsets": [features, items]},
            "checksum": {"dtype": "U8", "shape": [CHECKSUM], "data_offsets": [items, items + CHECKSUM]},
        })
        .to_string();
        while !text.len().is_multiple_of(8) {
            text.push(' ');
        }
        let mut header = (text.len() as u64).to_le_bytes().to_vec();
        header.extend(text.as_bytes());
        header
    }
}

/// Name for a file of these images.
pub(super) fn name(items: &[(usize, ItemKey)]) -> String {
    let mut hasher = blake3::Hasher::new();
    for (_, key) in items {
        hasher.update(key);
    }
    hasher.finalize().to_hex().chars().take(32).collect()
}

/// Writes a file, asking `encode` for the features of `batch` images at a time.
pub(super) fn write(
    out: &mut dyn Write,
    context: &Context,
    items: &[(usize, ItemKey)],
    batch: usize,
    encode: Encode<'_>,
) -> std::io::Result<()> {
    let mut hasher = blake3::Hasher::new();
    let mut put = |bytes: &[u8]| {
        hasher.update(bytes);
        out.write_all(bytes)
    };
    put(&context.header(items.len()))?;
    for batch in items.chunks(batch) {
        put(&encode(batch)?)?;
    }
    for (_, key) in items {
        put(key)?;
    }
    out.write_all(hasher.finalize().as_bytes())
}

/// A mapped cache file.
#[derive(Debug)]
pub(super) struct Shard {
    map: Mmap,
    n: usize,
    /// Where the features begin.
    start: usize,
    row_bytes: usize,
}

impl Shard {
    /// Maps a file and checks its size and header, not its content.
    pub(super) fn open(path: &Path, context: &Context) -> Result<Self, String> {
        let file = File::open(path).map_err(|e| e.to_string())?;
        Self::map(&file, context)
    }

    /// Writes the file at `path`, whole or not at all, and maps it.
    pub(super) fn create(path: &Path, context: &Context, fill: Fill<'_>) -> Result<Self, String> {
        let folder = path.parent().unwrap_or(Path::new("."));
        std::fs::create_dir_all(folder).map_err(|e| format!("{}: {e}", folder.display()))?;
        files::write_atomically(path, |w| fill(w)).map_err(|e| e.to_string())?;
        Self::open(path, context).map_err(|e| format!("{}: {e}", path.display()))
    }

    /// Writes a file that is gone when the mapping is.
    pub(super) fn temporary(context: &Context, fill: Fill<'_>) -> Result<Self, String> {
        let mut write = || {
            let file = tempfile::tempfile()?;
            let mut buffered = std::io::BufWriter::with_capacity(1 << 20, &file);
            fill(&mut buffered)?;
            buffered.flush()?;
            drop(buffered);
            Ok(file)
        };
        let file = write()
            .map_err(|e: std::io::Error| format!("{}: {e}", std::env::temp_dir().display()))?;
        Self::map(&file, context)
    }

    fn map(file: &File, context: &Context) -> Result<Self, String> {
        // SAFETY: the file is written once and then renamed into place, and only ever replaced or removed by name, which
        // leaves the mapped bytes as they are. A stranger who overwrites it in place breaks this, as with any mapped file.
        let map = unsafe { Mmap::map(file) }.map_err(|e| e.to_string())?;
        let length = map
            .first_chunk::<8>()
            .map(|bytes| u64::from_le_bytes(*bytes));
        let start = length.and_then(|n| usize::try_from(n).ok()?.checked_add(8));
        let row_bytes = context.row_bytes();
        let content = start
            .and_then(|start| map.len().checked_sub(start)?.checked_sub(CHECKSUM))
            .ok_or("the file is cut short")?;
        let n = content / (row_bytes + size_of::<ItemKey>());
        let header = context.header(n);
        if content % (row_bytes + size_of::<ItemKey>()) != 0 || !map.starts_with(&header) {
            return Err("the file is damaged (its header does not fit its size)".into());
        }
        Ok(Self {
            map,
            n,
            start: header.len(),
            row_bytes,
        })
    }

    /// Reads the whole file and compares it with its checksum.
    pub(super) fn verify(&self) -> Result<(), String> {
        let whole = self.map.split_last_chunk::<CHECKSUM>();
        let matches = |(content, checksum): (&[u8], &[u8; CHECKSUM])| {
            blake3::Hasher::new().update_rayon(content).finalize() == *checksum
        };
        if whole.is_some_and(matches) {
            Ok(())
        } else {
            Err("the file is damaged (its checksum is wrong)".into())
        }
    }

    /// Keys of the images, in the order of the rows.
    pub(super) fn keys(&self) -> impl Iterator<Item = ItemKey> + '_ {
        let keys = self
            .map
            .get(self.start + self.n * self.row_bytes..)
            .unwrap_or(&[]);
        keys.as_chunks().0.iter().take(self.n).copied()
    }

    /// The features of row `index`, little-endian f32.
    pub(super) fn row(&self, index: usize) -> Option<&[u8]> {
        if index >= self.n {
            return None;
        }
        let start = self.start + index * self.row_bytes;
        self.map.get(start..start + self.row_bytes)
    }
}
