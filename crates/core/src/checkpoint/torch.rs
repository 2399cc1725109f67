//! Files that PyTorch writes: state dicts (zip, or the format before torch 1.6) and TorchScript archives.
//!
//! Only the shapes and places of tensors are taken from the pickle; the numbers are read from the file directly.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::{BufReader, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use candle_core::Tensor;
use zip::ZipArchive;

use super::bytes::{self, Budget};
use super::graph::{Graph, Node, NodeId, shorten};
use super::pickle::{self, MAX_PICKLE};
use super::window::{Window, storage_id, window};
use crate::{Error, Result};

/// First bytes of what `torch.save` wrote before version 1.6: a pickled magic number.
pub(super) const LEGACY_MAGIC: &[u8] = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.";

/// Limits on the walk through a TorchScript module tree; RN50x64 has about a thousand modules of a dozen attributes, 6 deep.
/// Modules may be shared, so the pickle's length alone does not bound the walk.
const MAX_ATTRIBUTES: usize = 100_000;
const MAX_DEPTH: usize = 64;
const MAX_NAME: usize = 1024;

/// An opened file, with no tensor read yet.
pub(super) struct TorchFile {
    path: PathBuf,
    windows: BTreeMap<String, Window>,
    store: Store,
    file_len: u64,
    /// Whether it is a TorchScript archive.
    pub(super) scripted: bool,
    /// The checkpoint's `epoch`, if it has one.
    pub(super) epoch: Option<usize>,
}

enum Store {
    Zip {
        archive: Box<ZipArchive<BufReader<File>>>,
        /// Name of the folder inside the archive, with its slash.
        root: String,
    },
    /// Position and length in bytes of each storage.
    Legacy {
        file: BufReader<File>,
        places: HashMap<String, (u64, usize)>,
    },
}

impl TorchFile {
    /// Reads the pickle of a zip archive.
    pub(super) fn open_zip(path: &Path, file: File, file_len: u64) -> Result<Self> {
        let bad = |message: String| Error::format(path, message);
        let mut archive = ZipArchive::new(BufReader::new(file)).map_err(|e| {
            bad(format!(
                "not a complete zip archive ({e}); it may be truncated, download it again"
            ))
        })?;
        let root = archive
            .file_names()
            .filter_map(|name| name.ok()?.strip_suffix("data.pkl").map(str::to_owned))
            .find(|root| root.is_empty() || root.find('/') == Some(root.len() - 1))
            .ok_or_else(|| {
                bad("a zip archive without data.pkl, so not one that torch wrote".to_owned())
            })?;
        let order = read_entry(&mut archive, &format!("{root}byteorder"), 16, file_len);
        if order.is_ok_and(|order| order.trim_ascii() == b"big") {
            return Err(bad(
                "the numbers are big-endian, expected little-endian".to_owned()
            ));
        }
        let pickle = read_entry(
            &mut archive,
            &format!("{root}data.pkl"),
            MAX_PICKLE,
            file_len,
        )
        .map_err(&bad)?;
        let graph = pickle::parse(&pickle).map_err(|e| bad(format!("data.pkl: {e}")))?;
        let store = Store::Zip {
            archive: Box::new(archive),
            root,
        };
        Self::from_graph(path, &graph, store, file_len)
    }

    /// Reads the pickles of a file from before torch 1.6.
    pub(super) fn open_legacy(path: &Path, file: File, file_len: u64) -> Result<Self> {
        let bad = |message: String| Error::format(path, message);
        let mut file = BufReader::new(file);
        let mut head = Vec::new();
        // The pickles come first; storages may follow in the same bytes.
        let limit = u64::try_from(MAX_PICKLE).unwrap_or(u64::MAX);
        file.by_ref()
            .take(limit)
            .read_to_end(&mut head)
            .map_err(|e| Error::io(path, e))?;
        let mut at = 0;
        let mut next = || -> Result<Graph> {
            let graph =
                pickle::parse(head.get(at..).unwrap_or_default()).map_err(|e| bad(e.clone()))?;
            at += graph.consumed;
            Ok(graph)
        };
        let (_magic, _protocol, system, graph, keys) =
            (next()?, next()?, next()?, next()?, next()?);
        if system
            .get(system.root, "little_endian")
            .is_some_and(|id| matches!(system.node(id), Node::Bool(false)))
        {
            return Err(bad(
                "the numbers are big-endian, expected little-endian".to_owned()
            ));
        }
        let places = legacy_places(&mut file, at, &graph, &keys, file_len).map_err(bad)?;
        Self::from_graph(path, &graph, Store::Legacy { file, places }, file_len)
    }

    fn from_graph(path: &Path, graph: &Graph, store: Store, file_len: u64) -> Result<Self> {
        let bad = |message: String| Error::format(path, message);
        let root = graph.root;
        let scripted = is_module(graph, root);
        let windows = match graph.node(root) {
            Node::Dict(_) => {
                let nested = graph.get(root, "state_dict").filter(|&id| matches!(graph.node(id), Node::Dict(_)));
                state_dict(graph, nested.unwrap_or(root))
            }
            _ if scripted => module_tree(graph),
            _ => Err(format!(
                "holds a pickled `{}`, expected a state dict; save it again with torch.save(model.state_dict(), ...)",
                graph.class_name(root)
            )),
        }
        .map_err(bad)?;
        let epoch = graph
            .get(root, "epoch")
            .and_then(|id| match graph.node(id) {
                Node::Int(epoch) => usize::try_from(*epoch).ok(),
                _ => None,
            });
        Ok(Self {
            path: path.to_path_buf(),
            windows,
            store,
            file_len,
            scripted,
            epoch,
        })
    }

    /// Name and shape of every tensor.
    pub(super) fn shapes(&self) -> BTreeMap<String, Vec<usize>> {
        self.windows
            .iter()
            .map(|(name, window)| (name.clone(), window.shape.clone()))
            .collect()
    }

    /// Reads the tensors whose name `wanted` accepts, each storage once.
    pub(super) fn load(
        mut self,
        wanted: impl Fn(&str) -> bool,
    ) -> Result<BTreeMap<String, Tensor>> {
        let mut by_storage: BTreeMap<&str, Vec<(&String, &Window)>> = BTreeMap::new();
        for (name, window) in self.windows.iter().filter(|(name, _)| wanted(name)) {
            by_storage
                .entry(&window.storage)
                .or_default()
                .push((name, window));
        }
        let mut budget = Budget::of_file(self.file_len);
        let mut tensors = BTreeMap::new();
        for (key, windows) in by_storage {
            let longest = windows
                .iter()
                .map(|(_, w)| w.storage_len.saturating_mul(w.dtype.size_in_bytes()))
                .max();
            let len = longest.unwrap_or(0);
            let bad =
                |message: String| Error::format(&self.path, format!("storage {key}: {message}"));
            budget.take(len).map_err(bad)?;
            let storage = self.store.read(key, len, self.file_len).map_err(bad)?;
            for (name, window) in windows {
                let bad = |message: String| {
                    Error::format(&self.path, format!("tensor `{name}`: {message}"))
                };
                let picked;
                let numbers = if window.covers(&storage) {
                    &storage
                } else {
                    picked = window.pick(&storage, &mut budget).map_err(bad)?;
                    &picked
                };
                let tensor = bytes::tensor(numbers, window.dtype, &window.shape)?;
                tensors.insert(name.clone(), tensor);
            }
        }
        Ok(tensors)
    }
}

/// The entries of a state dict, without the prefix that data-parallel training leaves.
fn state_dict(graph: &Graph, dict: NodeId) -> Result<BTreeMap<String, Window>, String> {
    let Node::Dict(entries) = graph.node(dict) else {
        return Err("the state dict is not a dict".to_owned());
    };
    let mut windows = BTreeMap::new();
    for &(key, value) in entries {
        let name = graph
            .text(key)
            .ok_or("the state dict has a key that is not text")?;
        let window = window(graph, value).map_err(|e| format!("entry `{}`: {e}", shorten(name)))?;
        windows.insert(name.to_owned(), window);
    }
    if !windows.is_empty() && windows.keys().all(|name| name.starts_with("module.")) {
        let stripped = |name: String| {
            name.strip_prefix("module.")
                .map(str::to_owned)
                .unwrap_or(name)
        };
        windows = windows
            .into_iter()
            .map(|(name, window)| (stripped(name), window))
            .collect();
    }
    Ok(windows)
}

/// Whether a node is one of the values that TorchScript builds by calls besides tensors.
fn is_setting(graph: &Graph, id: NodeId) -> bool {
    graph
        .class(id)
        .is_some_and(|class| class.0 == "torch.jit._pickle" || class == ("torch", "device"))
}

/// Whether a node is a TorchScript module.
fn is_module(graph: &Graph, id: NodeId) -> bool {
    let scripted = |(module, _): (&str, &str)| {
        module
            .strip_prefix("__torch__")
            .is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
    };
    matches!(graph.node(id), Node::Object { .. }) && graph.class(id).is_some_and(scripted)
}

/// The tensors of a TorchScript module and its submodules, under their dotted paths.
fn module_tree(graph: &Graph) -> Result<BTreeMap<String, Window>, String> {
    let mut windows = BTreeMap::new();
    let mut open = vec![(graph.root, String::new(), 0)];
    let mut attributes = 0;
    while let Some((id, prefix, depth)) = open.pop() {
        let Node::Object {
            state: Some(state), ..
        } = graph.node(id)
        else {
            continue;
        };
        let Node::Dict(entries) = graph.node(*state) else {
            continue;
        };
        attributes += entries.len();
        if attributes > MAX_ATTRIBUTES || depth > MAX_DEPTH {
            return Err(format!(
                "modules with more than {MAX_ATTRIBUTES} attributes, or nested deeper than {MAX_DEPTH}"
            ));
        }
        for &(key, value) in entries {
            let Some(name) = graph.text(key) else {
                continue;
            };
            if prefix.len() + name.len() > MAX_NAME {
                return Err(format!(
                    "an attribute has a name of more than {MAX_NAME} bytes"
                ));
            }
            match graph.node(value) {
                _ if is_module(graph, value) => {
                    open.push((value, format!("{prefix}{name}."), depth + 1));
                }
                // Typed lists and devices: settings of layers.
                Node::Call { .. } if is_setting(graph, value) => {}
                Node::Call { .. } => {
                    let window = window(graph, value)
                        .map_err(|e| format!("attribute `{prefix}{name}`: {e}"))?;
                    windows.insert(format!("{prefix}{name}"), window);
                }
                _ => {}
            }
        }
    }
    Ok(windows)
}

impl Store {
    /// All `len` bytes of a storage.
    fn read(&mut self, key: &str, len: usize, file_len: u64) -> Result<Vec<u8>, String> {
        match self {
            Self::Zip { archive, root } => {
                let storage = read_entry(archive, &format!("{root}data/{key}"), len, file_len)?;
                if storage.len() != len {
                    return Err(format!("has {} bytes, expected {len}", storage.len()));
                }
                Ok(storage)
            }
            Self::Legacy { file, places } => {
                let &(at, found) = places.get(key).ok_or("is missing")?;
                if found != len {
                    return Err(format!("has {found} bytes, expected {len}"));
                }
                file.seek(SeekFrom::Start(at)).map_err(|e| e.to_string())?;
                bytes::read_exactly(file, len).map_err(|e| e.to_string())
            }
        }
    }
}

/// The whole of a zip entry of at most `limit` bytes; its checksum is verified on the way.
fn read_entry(
    archive: &mut ZipArchive<BufReader<File>>,
    name: &str,
    limit: usize,
    file_len: u64,
) -> Result<Vec<u8>, String> {
    let entry = archive.by_name(name).map_err(|e| format!("{name}: {e}"))?;
    let size = entry.size();
    let limit = u64::try_from(limit).unwrap_or(u64::MAX);
    if size > limit {
        return Err(format!("{name} has {size} bytes, expected at most {limit}"));
    }
    // A declared size costs nothing to fake; beyond the file's own length memory grows only with what is really unpacked.
    let mut content = Vec::with_capacity(usize::try_from(size.min(file_len)).unwrap_or(0));
    entry
        .take(size.saturating_add(1))
        .read_to_end(&mut content)
        .map_err(|e| format!("{name}: {e}"))?;
    Ok(content)
}

/// Finds the storages that follow the pickles: each its number of elements (8 bytes), then the elements.
fn legacy_places(
    file: &mut BufReader<File>,
    start: usize,
    graph: &Graph,
    keys: &Graph,
    file_len: u64,
) -> Result<HashMap<String, (u64, usize)>, String> {
    let mut widths = HashMap::new();
    for node in &graph.nodes {
        if let Node::Persistent(id) = node {
            let (key, dtype, _) = storage_id(graph, *id)?;
            widths.insert(key, dtype.size_in_bytes());
        }
    }
    let Node::List(order) = keys.node(keys.root) else {
        return Err("the list of storages is missing".to_owned());
    };
    let mut places = HashMap::new();
    let mut at = u64::try_from(start).map_err(|e| e.to_string())?;
    for &key in order {
        let key = keys.text(key).ok_or("a storage's key is not text")?;
        let width = *widths
            .get(key)
            .ok_or("a storage is listed that no tensor refers to")?;
        file.seek(SeekFrom::Start(at)).map_err(|e| e.to_string())?;
        let mut count = [0; 8];
        file.read_exact(&mut count)
            .map_err(|_| "truncated before the last storage")?;
        let len = usize::try_from(i64::from_le_bytes(count))
            .ok()
            .and_then(|n| n.checked_mul(width));
        let len = len.ok_or("a storage's length is not a size")?;
        let end = at
            .saturating_add(8)
            .saturating_add(u64::try_from(len).unwrap_or(u64::MAX));
        if end > file_len {
            return Err("truncated before the end of the last storage".to_owned());
        }
        places.insert(key.to_owned(), (at + 8, len));
        at = end;
    }
    Ok(places)
}
