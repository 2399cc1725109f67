//! Tensors of PyTorch: strided windows on flat storages.

use candle_core::DType;

use super::bytes::Budget;
use super::graph::{Graph, Node, NodeId, shorten};

const MAX_RANK: usize = 8;

/// Where a tensor's numbers are: a strided window on a storage.
#[derive(Debug)]
pub(super) struct Window {
    pub(super) storage: String,
    pub(super) storage_len: usize,
    pub(super) dtype: DType,
    pub(super) offset: usize,
    pub(super) shape: Vec<usize>,
    pub(super) strides: Vec<usize>,
}

/// Reads what a call would build, if it builds a tensor.
pub(super) fn window(graph: &Graph, mut id: NodeId) -> Result<Window, String> {
    // A parameter wraps a tensor; nothing that torch writes wraps more than once or twice.
    for _ in 0..4 {
        let foreign = || {
            format!(
                "is a `{}`, expected a tensor; nothing else is read or run",
                graph.class_name(id)
            )
        };
        let Node::Call { callable, args } = graph.node(id) else {
            return Err(foreign());
        };
        let Node::Global(module, function) = graph.node(*callable) else {
            return Err(foreign());
        };
        let Node::Tuple(args) = graph.node(*args) else {
            return Err(foreign());
        };
        match (module.as_str(), function.as_str(), args.as_slice()) {
            (
                "torch._utils",
                "_rebuild_parameter" | "_rebuild_parameter_with_state",
                [data, ..],
            ) => id = *data,
            (
                "torch._utils",
                "_rebuild_tensor_v2" | "_rebuild_tensor",
                [storage, offset, shape, strides, ..],
            ) => {
                return Window::new(graph, *storage, *offset, *shape, *strides);
            }
            _ => return Err(foreign()),
        }
    }
    Err("is a parameter of a parameter, expected a tensor".to_owned())
}

impl Window {
    fn new(
        graph: &Graph,
        storage: NodeId,
        offset: NodeId,
        shape: NodeId,
        strides: NodeId,
    ) -> Result<Self, String> {
        let Node::Persistent(id) = graph.node(storage) else {
            return Err("does not refer to a storage".to_owned());
        };
        let (storage, dtype, storage_len) = storage_id(graph, *id)?;
        let window = Self {
            storage: storage.to_owned(),
            storage_len,
            dtype,
            offset: size(graph, offset)?,
            shape: sizes(graph, shape)?,
            strides: sizes(graph, strides)?,
        };
        let inside = || -> Option<bool> {
            let numel = window
                .shape
                .iter()
                .try_fold(1usize, |n, d| n.checked_mul(*d))?;
            numel.checked_mul(dtype.size_in_bytes())?;
            if numel == 0 {
                return Some(window.offset <= storage_len);
            }
            let mut last = window.offset;
            for (d, s) in window.shape.iter().zip(&window.strides) {
                last = last.checked_add(d.checked_sub(1)?.checked_mul(*s)?)?;
            }
            // More elements than the storage has: an expanded view, which could stand for any amount of memory.
            Some(last < storage_len && numel <= storage_len)
        };
        if window.shape.len() != window.strides.len() || inside() != Some(true) {
            return Err(format!(
                "shape {:?} with strides {:?} from {} does not fit its storage of {storage_len} elements",
                window.shape, window.strides, window.offset
            ));
        }
        Ok(window)
    }

    /// Whether the tensor is the whole storage, in order.
    pub(super) fn covers(&self, storage: &[u8]) -> bool {
        let mut expected = 1usize;
        for (d, s) in self.shape.iter().zip(&self.strides).rev() {
            if *d != 1 && *s != expected {
                return false;
            }
            expected = expected.saturating_mul(*d);
        }
        self.offset == 0 && expected.checked_mul(self.dtype.size_in_bytes()) == Some(storage.len())
    }

    /// The elements in row-major order.
    pub(super) fn pick(&self, storage: &[u8], budget: &mut Budget) -> Result<Vec<u8>, String> {
        let width = self.dtype.size_in_bytes();
        if self.storage_len.checked_mul(width) != Some(storage.len()) {
            return Err(format!(
                "its storage has {} bytes, expected {} times {width}",
                storage.len(),
                self.storage_len
            ));
        }
        // Checked to fit by `new`.
        let numel: usize = self.shape.iter().product();
        budget.take(numel.saturating_mul(width))?;
        let mut picked = Vec::with_capacity(numel * width);
        let mut index = vec![0usize; self.shape.len()];
        let mut at = self.offset;
        for _ in 0..numel {
            let element = storage
                .get(at * width..(at + 1) * width)
                .ok_or("reaches beyond its storage")?;
            picked.extend_from_slice(element);
            for axis in (0..index.len()).rev() {
                let (Some(i), Some(&d), Some(&s)) = (
                    index.get_mut(axis),
                    self.shape.get(axis),
                    self.strides.get(axis),
                ) else {
                    break;
                };
                // Wrapping, because the stride of an axis of length 1 may be anything; what is added there is taken off again.
                *i += 1;
                at = at.wrapping_add(s);
                if *i < d {
                    break;
                }
                *i = 0;
                at = at.wrapping_sub(d.wrapping_mul(s));
            }
        }
        Ok(picked)
    }
}

/// Key, element type and length of the storage that a persistent id names.
pub(super) fn storage_id(graph: &Graph, id: NodeId) -> Result<(&str, DType, usize), String> {
    let Node::Tuple(parts) = graph.node(id) else {
        return Err("a storage is not named by a tuple".to_owned());
    };
    let [tag, class, key, _location, len, view @ ..] = parts.as_slice() else {
        return Err("a storage is named by too short a tuple".to_owned());
    };
    if graph.text(*tag) != Some("storage")
        || view.iter().any(|&v| !matches!(graph.node(v), Node::None))
    {
        return Err("a storage is named in a way that is not known".to_owned());
    }
    let key = graph
        .text(*key)
        .filter(|key| key.len() <= 64)
        .ok_or("a storage's key is not a short text")?;
    let class = graph.class_name(*class);
    let dtype = match class
        .strip_prefix("torch.cuda.")
        .or(class.strip_prefix("torch."))
    {
        Some("HalfStorage") => DType::F16,
        Some("BFloat16Storage") => DType::BF16,
        Some("FloatStorage") => DType::F32,
        Some("DoubleStorage") => DType::F64,
        Some("LongStorage") => DType::I64,
        Some("IntStorage") => DType::I32,
        Some("ShortStorage") => DType::I16,
        Some("ByteStorage" | "BoolStorage") => DType::U8,
        _ => {
            return Err(format!(
                "is stored as `{}`, which is not supported",
                shorten(&class)
            ));
        }
    };
    Ok((key, dtype, size(graph, *len)?))
}

fn size(graph: &Graph, id: NodeId) -> Result<usize, String> {
    match graph.node(id) {
        Node::Int(v) => usize::try_from(*v).map_err(|_| format!("{v} is not a size")),
        _ => Err("a size is not a number".to_owned()),
    }
}

fn sizes(graph: &Graph, id: NodeId) -> Result<Vec<usize>, String> {
    match graph.node(id) {
        Node::Tuple(items) | Node::List(items) if items.len() <= MAX_RANK => {
            items.iter().map(|&i| size(graph, i)).collect()
        }
        _ => Err(format!(
            "a shape is not a tuple of at most {MAX_RANK} sizes"
        )),
    }
}
