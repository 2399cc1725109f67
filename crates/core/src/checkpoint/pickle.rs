//! A pickle reader that builds a [`Graph`] of plain data and runs nothing.
//!
//! Pickle is a program for a stack machine whose `REDUCE` calls any importable function. Here a call is only written down
//! as a node ([`Node::Call`]); what a node means is decided by [`super::torch`], which knows a handful of names.

use std::collections::HashMap;

use super::graph::{Graph, Node, NodeId};

/// Longest pickle that is read, in bytes. Published CLIPs have less than 1 MB of pickle beside their tensor data.
pub(super) const MAX_PICKLE: usize = 16 << 20;
/// Most instructions that are carried out. RN50x64 needs about 100,000.
const MAX_OPS: usize = 2_000_000;

/// Reads one pickle from the start of `bytes`; what follows its end is left alone.
pub(super) fn parse(bytes: &[u8]) -> Result<Graph, String> {
    let bytes = bytes.get(..MAX_PICKLE).unwrap_or(bytes);
    let mut machine = Machine {
        bytes,
        at: 0,
        nodes: Vec::new(),
        stack: Vec::new(),
        marks: Vec::new(),
        memo: HashMap::new(),
    };
    for _ in 0..MAX_OPS {
        let start = machine.at;
        match machine.step() {
            Ok(None) => {}
            Ok(Some(root)) => {
                return Ok(Graph {
                    nodes: machine.nodes,
                    root,
                    consumed: machine.at,
                });
            }
            Err(message) => return Err(format!("{message} (byte {start} of the pickle)")),
        }
    }
    Err(format!(
        "the pickle has more than {MAX_OPS} instructions; no weights file needs as many"
    ))
}

struct Machine<'a> {
    bytes: &'a [u8],
    at: usize,
    nodes: Vec<Node>,
    stack: Vec<NodeId>,
    /// Heights of the stack at the open marks.
    marks: Vec<usize>,
    memo: HashMap<usize, NodeId>,
}

impl Machine<'_> {
    /// Carries out one instruction; the root once `STOP` is reached.
    ///
    /// Each instruction consumes at least one byte and adds at most one node, so memory is bounded by the pickle's length.
    fn step(&mut self) -> Result<Option<NodeId>, String> {
        let [op] = self.take_array::<1>()?;
        match op {
            // Framing.
            0x80 => {
                let [version] = self.take_array()?;
                if version > 5 {
                    return Err(format!("pickle protocol {version} is not known"));
                }
            }
            0x95 => self.skip(8)?,
            b'.' => return self.pop().map(Some),
            // Stack and memo.
            b'(' => self.marks.push(self.stack.len()),
            b'0' => {
                self.pop()?;
            }
            b'1' => {
                self.pop_mark()?;
            }
            b'2' => {
                let top = self.top()?;
                self.stack.push(top);
            }
            b'q' => {
                let [i] = self.take_array()?;
                self.remember(usize::from(i))?;
            }
            b'r' => {
                let i = self.take_u32()?;
                self.remember(i)?;
            }
            0x94 => self.remember(self.memo.len())?,
            b'h' => {
                let [i] = self.take_array()?;
                self.recall(usize::from(i))?;
            }
            b'j' => {
                let i = self.take_u32()?;
                self.recall(i)?;
            }
            // Scalars.
            b'N' => self.push(Node::None),
            0x88 => self.push(Node::Bool(true)),
            0x89 => self.push(Node::Bool(false)),
            b'J' => {
                let v = i32::from_le_bytes(self.take_array()?);
                self.push(Node::Int(i64::from(v)));
            }
            b'K' => {
                let [v] = self.take_array()?;
                self.push(Node::Int(i64::from(v)));
            }
            b'M' => {
                let v = u16::from_le_bytes(self.take_array()?);
                self.push(Node::Int(i64::from(v)));
            }
            0x8a => {
                let [n] = self.take_array()?;
                let long = little_endian(self.take(usize::from(n))?);
                self.push(long);
            }
            0x8b => {
                let n = self.take_u32()?;
                let long = little_endian(self.take(n)?);
                self.push(long);
            }
            b'G' => {
                self.skip(8)?;
                self.push(Node::Other);
            }
            // Text and bytes.
            0x8c | b'U' => {
                let [n] = self.take_array()?;
                self.push_text(usize::from(n))?;
            }
            b'X' | b'T' => {
                let n = self.take_u32()?;
                self.push_text(n)?;
            }
            0x8d => {
                let n = self.take_u64()?;
                self.push_text(n)?;
            }
            b'C' => {
                let [n] = self.take_array()?;
                self.skip(usize::from(n))?;
                self.push(Node::Other);
            }
            b'B' => {
                let n = self.take_u32()?;
                self.skip(n)?;
                self.push(Node::Other);
            }
            0x8e => {
                let n = self.take_u64()?;
                self.skip(n)?;
                self.push(Node::Other);
            }
            // Containers.
            b')' => self.push(Node::Tuple(Vec::new())),
            b'}' => self.push(Node::Dict(Vec::new())),
            b']' => self.push(Node::List(Vec::new())),
            0x8f => self.push(Node::Other),
            b't' => {
                let items = self.pop_mark()?;
                self.push(Node::Tuple(items));
            }
            0x85..=0x87 => {
                let mut items = Vec::with_capacity(3);
                for _ in 0x85..=op {
                    items.push(self.pop()?);
                }
                items.reverse();
                self.push(Node::Tuple(items));
            }
            b'l' => {
                let items = self.pop_mark()?;
                self.push(Node::List(items));
            }
            b'd' => {
                let items = self.pop_mark()?;
                self.push(Node::Dict(pairs(&items)?));
            }
            0x91 => {
                self.pop_mark()?;
                self.push(Node::Other);
            }
            b'a' => {
                let item = self.pop()?;
                self.extend_list(&[item])?;
            }
            b'e' => {
                let items = self.pop_mark()?;
                self.extend_list(&items)?;
            }
            b's' => {
                let value = self.pop()?;
                let key = self.pop()?;
                self.extend_dict(&[key, value])?;
            }
            b'u' => {
                let items = self.pop_mark()?;
                self.extend_dict(&items)?;
            }
            0x90 => {
                self.pop_mark()?;
                self.top()?;
            }
            // Names, objects and calls: written down, never carried out.
            b'c' => {
                let module = self.take_line()?;
                let name = self.take_line()?;
                self.push(Node::Global(module, name));
            }
            0x93 => {
                let (name, module) = (self.pop()?, self.pop()?);
                let text = |id: NodeId| match self.nodes.get(id) {
                    Some(Node::Text(s)) => Ok(s.clone()),
                    _ => Err("a global's name is not text"),
                };
                let global = Node::Global(text(module)?, text(name)?);
                self.push(global);
            }
            b'R' => {
                let args = self.pop()?;
                let callable = self.pop()?;
                let node = if self.is_ordered_dict(callable) {
                    Node::Dict(Vec::new())
                } else {
                    Node::Call { callable, args }
                };
                self.push(node);
            }
            0x81 => {
                self.pop()?;
                let class = self.pop()?;
                self.push(Node::Object { class, state: None });
            }
            0x92 => {
                self.pop()?;
                self.pop()?;
                let class = self.pop()?;
                self.push(Node::Object { class, state: None });
            }
            b'b' => {
                let value = self.pop()?;
                let target = self.top()?;
                // Dicts carry `_metadata` this way; nothing of it is needed.
                if let Some(Node::Object { state, .. }) = self.nodes.get_mut(target) {
                    *state = Some(value);
                }
            }
            b'Q' => {
                let id = self.pop()?;
                self.push(Node::Persistent(id));
            }
            other => {
                return Err(format!(
                    "pickle instruction 0x{other:02x} is not one that torch writes"
                ));
            }
        }
        Ok(None)
    }

    fn push(&mut self, node: Node) {
        self.stack.push(self.nodes.len());
        self.nodes.push(node);
    }

    /// Height below which the open mark protects the stack.
    fn floor(&self) -> usize {
        self.marks.last().copied().unwrap_or(0)
    }

    fn top(&self) -> Result<NodeId, String> {
        match self.stack.last() {
            Some(&id) if self.stack.len() > self.floor() => Ok(id),
            _ => Err("the pickle takes more from its stack than there is".to_owned()),
        }
    }

    fn pop(&mut self) -> Result<NodeId, String> {
        let id = self.top()?;
        self.stack.pop();
        Ok(id)
    }

    fn pop_mark(&mut self) -> Result<Vec<NodeId>, String> {
        let height = self
            .marks
            .pop()
            .ok_or("the pickle closes a mark that was never opened")?;
        // `pop` never goes below an open mark, so `height` is at most the stack's length.
        Ok(self.stack.split_off(height.min(self.stack.len())))
    }

    fn remember(&mut self, slot: usize) -> Result<(), String> {
        let id = self.top()?;
        self.memo.insert(slot, id);
        Ok(())
    }

    fn recall(&mut self, slot: usize) -> Result<(), String> {
        let id = *self
            .memo
            .get(&slot)
            .ok_or_else(|| format!("memo {slot} is used before it is set"))?;
        self.stack.push(id);
        Ok(())
    }

    fn extend_list(&mut self, items: &[NodeId]) -> Result<(), String> {
        let target = self.top()?;
        match self.nodes.get_mut(target) {
            Some(Node::List(list)) => list.extend_from_slice(items),
            // List-like objects of foreign classes.
            Some(Node::Call { .. } | Node::Object { .. } | Node::Other) => {}
            _ => return Err("the pickle appends to something that is not a list".to_owned()),
        }
        Ok(())
    }

    fn extend_dict(&mut self, items: &[NodeId]) -> Result<(), String> {
        let target = self.top()?;
        let new = pairs(items)?;
        match self.nodes.get_mut(target) {
            Some(Node::Dict(entries)) => entries.extend(new),
            // Dict-like objects of foreign classes (`defaultdict`, `Counter`).
            Some(Node::Call { .. } | Node::Object { .. } | Node::Other) => {}
            _ => return Err("the pickle sets a key of something that is not a dict".to_owned()),
        }
        Ok(())
    }

    fn is_ordered_dict(&self, id: NodeId) -> bool {
        matches!(self.nodes.get(id), Some(Node::Global(module, name)) if module == "collections" && name == "OrderedDict")
    }

    fn take(&mut self, n: usize) -> Result<&[u8], String> {
        let end = self
            .at
            .checked_add(n)
            .filter(|&end| end <= self.bytes.len());
        let end = end.ok_or("the pickle is truncated")?;
        let piece = self
            .bytes
            .get(self.at..end)
            .ok_or("the pickle is truncated")?;
        self.at = end;
        Ok(piece)
    }

    fn skip(&mut self, n: usize) -> Result<(), String> {
        self.take(n).map(|_| ())
    }

    fn take_array<const N: usize>(&mut self) -> Result<[u8; N], String> {
        self.take(N)?
            .try_into()
            .map_err(|_| "the pickle is truncated".to_owned())
    }

    fn take_u32(&mut self) -> Result<usize, String> {
        usize::try_from(u32::from_le_bytes(self.take_array()?)).map_err(|e| e.to_string())
    }

    fn take_u64(&mut self) -> Result<usize, String> {
        usize::try_from(u64::from_le_bytes(self.take_array()?)).map_err(|e| e.to_string())
    }

    fn take_line(&mut self) -> Result<String, String> {
        let rest = self.bytes.get(self.at..).unwrap_or_default();
        let n = rest
            .iter()
            .position(|&b| b == b'\n')
            .ok_or("the pickle is truncated")?;
        let line = utf8(self.take(n)?)?;
        self.skip(1)?;
        Ok(line)
    }

    fn push_text(&mut self, n: usize) -> Result<(), String> {
        let text = utf8(self.take(n)?)?;
        self.push(Node::Text(text));
        Ok(())
    }
}

fn utf8(bytes: &[u8]) -> Result<String, String> {
    String::from_utf8(bytes.to_vec()).map_err(|_| "a text in the pickle is not UTF-8".to_owned())
}

fn pairs(items: &[NodeId]) -> Result<Vec<(NodeId, NodeId)>, String> {
    let (pairs, rest) = items.as_chunks::<2>();
    if !rest.is_empty() {
        return Err("the pickle sets a key without a value".to_owned());
    }
    Ok(pairs.iter().map(|&[key, value]| (key, value)).collect())
}

/// A signed little-endian integer of any length.
fn little_endian(bytes: &[u8]) -> Node {
    if bytes.len() > 8 {
        return Node::Other;
    }
    let negative = bytes.last().is_some_and(|b| b & 0x80 != 0);
    let mut full = [if negative { 0xff } else { 0 }; 8];
    for (to, from) in full.iter_mut().zip(bytes) {
        *to = *from;
    }
    Node::Int(i64::from_le_bytes(full))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_call_is_written_down_and_not_made() {
        // import os; os.system("echo hi")
        let graph = parse(b"\x80\x02cposix\nsystem\nX\x07\0\0\0echo hi\x85R.trailing").unwrap();
        assert!(matches!(graph.node(graph.root), Node::Call { .. }));
        assert_eq!(graph.class_name(graph.root), "posix.system");
        assert_eq!(
            graph.consumed,
            b"\x80\x02cposix\nsystem\nX\x07\0\0\0echo hi\x85R.".len()
        );
    }

    #[test]
    fn integers_of_every_width() {
        for (bytes, expected) in [
            (&b"K\xff."[..], 255),
            (b"M\x00\x01.", 256),
            (b"J\xff\xff\xff\xff.", -1),
            (b"\x8a\x00.", 0),
            (b"\x8a\x01\xff.", -1),
            (b"\x8a\x02\xff\x00.", 255),
            (b"\x8b\x03\0\0\0\0\0\x01.", 65536),
        ] {
            let graph = parse(bytes).unwrap();
            assert!(
                matches!(graph.node(graph.root), Node::Int(v) if *v == expected),
                "{bytes:?}"
            );
        }
    }

    #[test]
    fn a_list_may_hold_itself() {
        let graph = parse(b"]q\x00h\x00a.").unwrap();
        assert!(matches!(graph.node(graph.root), Node::List(items) if items == &[graph.root]));
    }

    #[test]
    fn misuse_of_the_stack_is_an_error() {
        for bad in [
            &b"."[..],
            b"(.",
            b"N(0.",
            b"t.",
            b"h\x05.",
            b"X\xff\xff\xff\xffab.",
            b"(Nd.",
            b"Nq",
            b"Na.",
            b"c\xff\n\n.",
            b"\x80\x09N.",
        ] {
            assert!(parse(bad).is_err(), "{bad:?}");
        }
    }

    proptest::proptest! {
        #[test]
        fn any_bytes_give_a_graph_or_an_error(bytes: Vec<u8>) {
            if let Ok(graph) = parse(&bytes) {
                proptest::prop_assert!(graph.nodes.len() <= bytes.len() && graph.consumed <= bytes.len());
            }
        }
    }
}
