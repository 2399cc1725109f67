//! The values of a pickle.
//!
//! Nodes live in one flat list and refer to each other by index, so cycles and deep nesting cost nothing.

/// Index of a [`Node`] in its [`Graph`].
pub(super) type NodeId = usize;

/// One value of a pickle.
#[derive(Debug)]
pub(super) enum Node {
    None,
    Bool(bool),
    Int(i64),
    Text(String),
    /// A value of a kind that no tensor depends on: bytes, sets, floats, integers beyond 64 bits.
    Other,
    List(Vec<NodeId>),
    Tuple(Vec<NodeId>),
    /// `dict` and `OrderedDict`, in order; a later entry replaces an earlier one of the same key.
    Dict(Vec<(NodeId, NodeId)>),
    /// An importable name: `module`, `name`.
    Global(String, String),
    /// A call that is not made: of `callable`, with `args`.
    Call {
        callable: NodeId,
        args: NodeId,
    },
    /// An instance of `class`, with the state that `__setstate__` would receive.
    Object {
        class: NodeId,
        state: Option<NodeId>,
    },
    /// A reference to data outside the pickle.
    Persistent(NodeId),
}

/// All values of one pickle.
#[derive(Debug)]
pub(super) struct Graph {
    pub(super) nodes: Vec<Node>,
    /// The value that the pickle stands for.
    pub(super) root: NodeId,
    /// Bytes up to and with the `STOP` instruction.
    pub(super) consumed: usize,
}

impl Graph {
    pub(super) fn node(&self, id: NodeId) -> &Node {
        self.nodes.get(id).unwrap_or(&Node::None)
    }

    pub(super) fn text(&self, id: NodeId) -> Option<&str> {
        match self.node(id) {
            Node::Text(s) => Some(s),
            _ => None,
        }
    }

    /// The value of a text key in a dict node.
    pub(super) fn get(&self, dict: NodeId, key: &str) -> Option<NodeId> {
        match self.node(dict) {
            Node::Dict(entries) => entries
                .iter()
                .rev()
                .find(|(k, _)| self.text(*k) == Some(key))
                .map(|(_, v)| *v),
            _ => None,
        }
    }

    /// Module and name of what a node is an instance of, or the result of.
    pub(super) fn class(&self, id: NodeId) -> Option<(&str, &str)> {
        let class = match self.node(id) {
            Node::Call { callable, .. } => *callable,
            Node::Object { class, .. } => *class,
            _ => id,
        };
        match self.node(class) {
            Node::Global(module, name) => Some((module, name)),
            _ => None,
        }
    }

    /// What a node is, for messages: `module.name`, or its kind.
    pub(super) fn class_name(&self, id: NodeId) -> String {
        match (self.class(id), self.node(id)) {
            (Some((module, name)), _) => format!("{}.{}", shorten(module), shorten(name)),
            (None, Node::Text(_)) => "str".to_owned(),
            (None, Node::Int(_) | Node::Bool(_)) => "number".to_owned(),
            (None, Node::List(_) | Node::Tuple(_)) => "list".to_owned(),
            (None, Node::Dict(_)) => "dict".to_owned(),
            (None, Node::None) => "None".to_owned(),
            _ => "object of an unknown class".to_owned(),
        }
    }
}

/// A name from a file, short enough for a message.
pub(super) fn shorten(name: &str) -> String {
    match name.char_indices().nth(120) {
        Some((end, _)) => format!("{}...", name.get(..end).unwrap_or_default()),
        None => name.to_owned(),
    }
}
