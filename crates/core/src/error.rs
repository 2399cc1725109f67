//! What can go wrong, in the user's words: the file, the value, what was expected, and a way out.

use std::path::{Path, PathBuf};

/// Shorthand for results with [`enum@Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Everything that core can refuse.
///
/// Messages are lower case and say what was found, what was wanted and where. New kinds may be added.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The operating system refused to read or write a file.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// The system's own words.
        source: std::io::Error,
    },
    /// A file is not what its name or its place says: truncated, malformed, or of a kind that is not supported.
    #[error("{}: {message}", path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// What was found and what was expected.
        message: String,
    },
    /// A tensor that the model needs is missing from a weights file.
    #[error("{}: tensor `{name}` is missing", path.display())]
    MissingTensor {
        /// The weights file.
        path: PathBuf,
        /// The tensor's state-dict key.
        name: String,
    },
    /// A tensor has another shape than the model or the method needs.
    #[error("{what} has shape {found:?}, expected {expected:?}")]
    Shape {
        /// Which tensor, and of which file if it came from one.
        what: String,
        /// The shape that was found.
        found: Vec<usize>,
        /// The shape that was needed.
        expected: Vec<usize>,
    },
    /// A number that must be finite is not.
    #[error("{what} holds a value that is not finite ({value})")]
    NotFinite {
        /// Which tensor, file or step.
        what: String,
        /// `NaN`, `inf` or `-inf`.
        value: f64,
    },
    /// Training produced a loss or a gradient that is not finite; nothing was written after it.
    #[error(
        "{tensor} is {value} at epoch {epoch}, step {step}; lower the learning rate or look at the data"
    )]
    Diverged {
        /// The loss, one of its terms, or the gradient of a named parameter.
        tensor: String,
        /// The value that was found.
        value: f64,
        /// Epoch, counted from 1.
        epoch: usize,
        /// Step inside the epoch, counted from 1.
        step: usize,
    },
    /// A setting has a value that the method or the loop cannot work with.
    #[error("{key} = {value}: {expected}")]
    Config {
        /// The setting's name as it is written in a config file.
        key: String,
        /// The value that was found.
        value: String,
        /// What was expected, and a way out.
        expected: String,
    },
    /// A prompt needs more tokens than the text tower has positions.
    #[error(
        "`{text}` needs {tokens} tokens, the text tower takes {context_length}; shorten the name or lower n_ctx"
    )]
    PromptTooLong {
        /// The sentence.
        text: String,
        /// Tokens with the start and the end token.
        tokens: usize,
        /// Positions of the text tower.
        context_length: usize,
    },
    /// A forward and backward pass takes more memory than it may.
    #[error(
        "a memory budget of {} MB is too small: even computed twice, a chunk at a time, these prompts take {} MB; raise the budget or give fewer classes or images",
        budget / 1_000_000,
        needed.div_ceil(1_000_000)
    )]
    Memory {
        /// Bytes that the leanest way takes.
        needed: u64,
        /// Bytes allowed.
        budget: u64,
    },
    /// The weights know another vocabulary than CLIP's, so text cannot be tokenised for them.
    #[error(
        "the text tower has a vocabulary of {found} tokens, CLIP's tokenizer needs {expected}; these weights cannot take text, only token ids"
    )]
    Vocabulary {
        /// Rows of the token embedding.
        found: usize,
        /// Size of CLIP's vocabulary.
        expected: usize,
    },
    /// The data given to a method or a metric do not fit together.
    #[error("{0}")]
    Data(String),
    /// A learned prompt cannot be used as asked.
    #[error("{0}")]
    Prompt(String),
    /// The caller asked to stop; what was finished is on disk.
    #[error("stopped on request")]
    Cancelled,
    /// A source of images failed.
    #[error(transparent)]
    Source(Box<dyn std::error::Error + Send + Sync>),
    /// The tensor library refused an operation.
    #[error(transparent)]
    Tensor(#[from] candle_core::Error),
}

impl Error {
    /// An operating-system error at `path`.
    pub fn io(path: impl AsRef<Path>, source: std::io::Error) -> Self {
        Self::Io {
            path: path.as_ref().to_path_buf(),
            source,
        }
    }

    /// A malformed file.
    pub fn format(path: impl AsRef<Path>, message: impl Into<String>) -> Self {
        Self::Format {
            path: path.as_ref().to_path_buf(),
            message: message.into(),
        }
    }

    /// A setting that cannot be used.
    pub fn config(key: &str, value: impl std::fmt::Display, expected: impl Into<String>) -> Self {
        Self::Config {
            key: key.to_owned(),
            value: value.to_string(),
            expected: expected.into(),
        }
    }
}
