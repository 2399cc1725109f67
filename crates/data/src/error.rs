//! What can be wrong with data: the file, the line, what was found and what was expected.

use std::path::{Path, PathBuf};

/// Shorthand for results with [`enum@Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Everything that reading, drawing and caching can refuse. New kinds may be added.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file or folder is not a data set, or not one that can be used as asked.
    #[error("{}: {message}", path.display())]
    Dataset {
        /// The file or folder that was opened.
        path: PathBuf,
        /// What was found and what was expected.
        message: String,
    },
    /// A line of a text file is wrong.
    #[error("{}, line {line}: {message}", path.display())]
    Line {
        /// The file.
        path: PathBuf,
        /// The line, counted from 1.
        line: u64,
        /// What was found and what was expected.
        message: String,
    },
    /// A JSON file is malformed or holds other things than it should.
    #[error("{}, line {line}, column {column}: {message}", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// The line, counted from 1.
        line: usize,
        /// The column, counted from 1.
        column: usize,
        /// What was found and what was expected.
        message: String,
    },
    /// An image cannot be read.
    #[error("{}: {reason}", path.display())]
    Image {
        /// The image file.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// What core refused.
    #[error(transparent)]
    Core(#[from] cliptune_core::Error),
}

impl Error {
    pub(crate) fn io(path: impl AsRef<Path>, source: std::io::Error) -> Self {
        Self::Core(cliptune_core::Error::io(path, source))
    }

    pub(crate) fn dataset(path: impl AsRef<Path>, message: impl Into<String>) -> Self {
        Self::Dataset {
            path: path.as_ref().to_path_buf(),
            message: message.into(),
        }
    }

    pub(crate) fn line(path: impl AsRef<Path>, line: u64, message: impl Into<String>) -> Self {
        Self::Line {
            path: path.as_ref().to_path_buf(),
            line,
            message: message.into(),
        }
    }

    pub(crate) fn image(path: impl AsRef<Path>, reason: impl Into<String>) -> Self {
        Self::Image {
            path: path.as_ref().to_path_buf(),
            reason: reason.into(),
        }
    }

    pub(crate) fn json(path: impl AsRef<Path>, error: &serde_json::Error) -> Self {
        // serde_json appends the position to its message; here it stands in front.
        let text = error.to_string();
        let message = text.split(" at line ").next().unwrap_or(&text).to_owned();
        Self::Json {
            path: path.as_ref().to_path_buf(),
            line: error.line(),
            column: error.column(),
            message,
        }
    }
}

impl From<Error> for cliptune_core::Error {
    fn from(error: Error) -> Self {
        match error {
            Error::Core(error) => error,
            error => Self::Source(Box::new(error)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_way_into_core_unwraps_what_came_from_there() {
        let inner = cliptune_core::Error::Data("odd".into());
        let back = cliptune_core::Error::from(Error::from(inner));
        assert!(matches!(back, cliptune_core::Error::Data(m) if m == "odd"));
        let image = cliptune_core::Error::from(Error::image("a.png", "is empty"));
        assert!(matches!(&image, cliptune_core::Error::Source(_)));
        assert_eq!(image.to_string(), "a.png: is empty");
    }

    #[test]
    fn json_errors_say_where() {
        let error = serde_json::from_str::<Vec<u32>>("[1,\n 2 3]").unwrap_err();
        let message = Error::json("s.json", &error).to_string();
        assert_eq!(message, "s.json, line 2, column 4: expected `,` or `]`");
    }
}
