//! The two streams: results go to standard output, everything else to standard error.

use std::io::{BufWriter, ErrorKind, Write};
use std::path::Path;

use anyhow::{Context, Error, Result};

use super::table::wrap;

/// The reader of standard output has gone (`cliptune list | head -1`): nothing is left to do, and nothing is wrong.
#[derive(Debug, thiserror::Error)]
#[error("standard output was closed")]
pub(crate) struct Closed;

/// Writes a result to standard output.
pub(crate) fn result(text: &str) -> Result<()> {
    stream(None, |out| Ok(out.write_all(text.as_bytes())?))
}

/// Writes a result piece by piece: to a file that appears when all is written, or to standard output without one.
pub(crate) fn stream(
    file: Option<&Path>,
    write: impl FnOnce(&mut dyn Write) -> Result<()>,
) -> Result<()> {
    let Some(path) = file else {
        let mut out = BufWriter::new(std::io::stdout().lock());
        let written = write(&mut out).and_then(|()| Ok(out.flush()?));
        return written.map_err(|e| match e.downcast_ref::<std::io::Error>() {
            Some(e) if e.kind() == ErrorKind::BrokenPipe => Closed.into(),
            Some(_) => e.context("standard output cannot be written"),
            None => e,
        });
    };
    // What failed for other reasons than the file's must not be blamed on the file.
    let mut failure = None;
    let written = cliptune::files::write_atomically(path, |out| {
        write(out).map_err(|e| match e.downcast::<std::io::Error>() {
            Ok(e) => e,
            Err(e) => {
                failure = Some(e);
                ErrorKind::Other.into()
            }
        })
    });
    match failure {
        Some(e) => Err(e),
        None => Ok(written?),
    }
}

/// Columns of a label in front of a message: `data      flowers/: ...`.
const LABEL: usize = 10;

/// Tells the user something that is not a result. A closed standard error is nobody's loss.
pub(crate) fn say(message: impl std::fmt::Display) {
    let mut message = message.to_string();
    if let Some((_, columns)) = console::Term::stderr().size_checked() {
        message = hang(&message, usize::from(columns));
    }
    let _ = writeln!(std::io::stderr().lock(), "{message}");
}

/// Wraps a message with a label so that its text stays in its column. Commands to be copied stay whole.
fn hang(message: &str, width: usize) -> String {
    match message.split_at_checked(LABEL) {
        Some((label, text))
            if label.ends_with("  ") && !label.trim().is_empty() && !label.starts_with("next") =>
        {
            let lines = wrap(text, width.saturating_sub(LABEL).max(20));
            let indent = format!("\n{}", " ".repeat(LABEL));
            format!("{label}{}", lines.join(&indent))
        }
        _ => message.to_owned(),
    }
}

/// Refuses a place where no file could be written, before any work is done for it.
pub(crate) fn check_writable(path: &Path) -> Result<()> {
    if path.is_dir() {
        return Err(Error::msg(format!(
            "{}: is a folder; name the file to write",
            path.display()
        )));
    }
    let folder = match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    if !folder.is_dir() {
        return Err(Error::msg(format!(
            "{}: there is no folder {}; make it first",
            path.display(),
            folder.display()
        )));
    }
    tempfile::Builder::new()
        .prefix(".cliptune-")
        .tempfile_in(folder)
        .map(drop)
        .with_context(|| format!("{}: the folder cannot be written", path.display()))
}

/// Columns of the terminal that `cliptune` writes to; 100 where there is none.
pub(crate) fn width() -> usize {
    match console::Term::stdout().size_checked() {
        Some((_, columns)) => usize::from(columns).max(40),
        None => 100,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_hang_below_their_label() {
        let data = "data      one two three four five";
        assert_eq!(
            hang(data, 30),
            "data      one two three four\n          five"
        );
        for whole in [
            "next      cliptune eval --clip a --images b",
            "error: a b c d e f g h i j k",
            "ä",
        ] {
            assert_eq!(hang(whole, 20), whole);
        }
    }
}
