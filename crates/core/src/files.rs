//! Writing files so that a reader never sees half of one.

use std::io::Write;
use std::path::Path;

use crate::{Error, Result};

/// Writes `path` through a temporary file in the same folder: written, synced, renamed.
///
/// An existing file stays as it was unless everything succeeded; on failure (full disk, no permission) nothing is left behind.
///
/// # Errors
/// [`Error::Io`] naming `path`.
pub fn write_atomically(
    path: &Path,
    write: impl FnOnce(&mut dyn Write) -> std::io::Result<()>,
) -> Result<()> {
    let folder = match path.parent() {
        Some(p) if !p.as_os_str().is_empty() => p,
        _ => Path::new("."),
    };
    let attempt = || -> std::io::Result<()> {
        let mut builder = tempfile::Builder::new();
        builder.prefix(".cliptune-").suffix(".tmp");
        // Temporary files are private by default; a result should be as readable as any other file (the umask still applies).
        #[cfg(unix)]
        builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
        let mut file = builder.tempfile_in(folder)?;
        {
            let mut buffered = std::io::BufWriter::with_capacity(1 << 20, file.as_file_mut());
            write(&mut buffered)?;
            buffered.flush()?;
        }
        file.as_file().sync_all()?;
        file.persist(path).map_err(|e| e.error)?;
        Ok(())
    };
    attempt().map_err(|e| Error::io(path, e))?;
    // The rename itself survives a power cut only once the folder is synced; not every file system allows it.
    if let Ok(dir) = std::fs::File::open(folder) {
        let _ = dir.sync_all();
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_write_leaves_the_old_file() -> Result<(), Box<dyn std::error::Error>> {
        let dir = tempfile::tempdir()?;
        let path = dir.path().join("a.txt");
        write_atomically(&path, |w| w.write_all(b"old"))?;
        let failed = write_atomically(&path, |w| {
            w.write_all(b"half")?;
            Err(std::io::Error::other("disk full"))
        });
        assert!(failed.unwrap_err().to_string().contains("a.txt: disk full"));
        assert_eq!(std::fs::read(&path)?, b"old");
        assert_eq!(std::fs::read_dir(dir.path())?.count(), 1);
        Ok(())
    }
}
