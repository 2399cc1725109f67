//! The output folder: whose it is, what it is for, and which results it holds.

use std::fs::{File, TryLockError};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail};
use cliptune::files;
use cliptune::method::ClipId;
use serde::{Deserialize, Serialize};

use super::plan::Planned;
use super::record::{Found, Protocol, Record};
use super::tasks::Source;

const FORMAT: &str = "cliptune benchmark 1";
/// What the folder is for.
const PURPOSE: &str = "benchmark.json";
const LOCK: &str = ".lock";
const RESULT: &str = "result.json";
pub(crate) const DAMAGED: &str = "result.json.damaged";
/// Encoded pictures.
pub(crate) const FEATURES: &str = "features";
/// Test pictures that the report shows.
pub(crate) const PICTURES: &str = "pictures";
pub(crate) const REPORT: &str = "report.html";

/// What all results of a folder have in common.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Purpose {
    format: String,
    /// Version of the workspace.
    version: String,
    clip: ClipId,
    source: Source,
    /// `--set`, as given.
    settings: Vec<String>,
}

impl Purpose {
    pub(crate) fn new(clip: ClipId, source: Source, settings: Vec<String>) -> Self {
        let version = env!("CARGO_PKG_VERSION").to_owned();
        Self {
            format: FORMAT.to_owned(),
            version,
            clip,
            source,
            settings,
        }
    }

    /// What differs from what the folder was made for, a line each.
    fn differences(&self, there: &Self) -> Vec<String> {
        let clip = |p: &Self| {
            let hash: String = p.clip.weights_hash.chars().take(12).collect();
            format!("{} ({hash})", p.clip.name)
        };
        let settings = |p: &Self| match p.settings.as_slice() {
            [] => "the defaults".to_owned(),
            settings => format!("--set {}", settings.join(" --set ")),
        };
        let source = |p: &Self| p.source.in_words();
        let parts: [(&str, String, String); 5] = [
            ("format", there.format.clone(), self.format.clone()),
            ("version", there.version.clone(), self.version.clone()),
            ("CLIP", clip(there), clip(self)),
            ("pictures", source(there), source(self)),
            ("settings", settings(there), settings(self)),
        ];
        let line = |(what, old, new): (&str, String, String)| {
            (old != new).then(|| format!("  {what}: {old} there, {new} now"))
        };
        parts.into_iter().filter_map(line).collect()
    }
}

/// An output folder that nobody else writes to as long as this lives.
#[derive(Debug)]
pub(crate) struct Folder {
    path: PathBuf,
    /// Held, not read: the system gives the lock back when the process ends, however it ends.
    _lock: File,
}

impl Folder {
    /// Makes or takes over the folder at `path`; with `fresh`, without what was in it.
    ///
    /// # Errors
    /// Another call works in it, somebody else's files are in it, or its results are of another configuration.
    pub(crate) fn open(path: &Path, purpose: &Purpose, fresh: bool) -> Result<Self> {
        std::fs::create_dir_all(path).with_context(|| path.display().to_string())?;
        let ours = path.join(PURPOSE).exists();
        if !ours && !is_empty(path)? {
            bail!(
                "{}: the folder is not empty and not one of this command's; give another --out",
                path.display()
            );
        }
        let folder = Self {
            path: path.to_owned(),
            _lock: lock(path)?,
        };
        if fresh {
            folder.clear()?;
        } else if ours {
            check(path, purpose)?;
        }
        folder.write_purpose(purpose)?;
        Ok(folder)
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    fn write_purpose(&self, purpose: &Purpose) -> Result<()> {
        let mut text = serde_json::to_vec_pretty(purpose)?;
        text.push(b'\n');
        Ok(files::write_atomically(&self.path.join(PURPOSE), |w| {
            w.write_all(&text)
        })?)
    }

    /// Those of `runs` that have no result yet. A damaged result is named in the notes and moved aside.
    ///
    /// # Errors
    /// A result of the same run under other settings.
    pub(crate) fn missing(&self, runs: &[Planned]) -> Result<(Vec<Planned>, Vec<String>)> {
        let (mut missing, mut notes) = (Vec::new(), Vec::new());
        for run in runs {
            match Record::find(&self.path, &run.key)? {
                Found::Nothing => missing.push(run.clone()),
                Found::Good(record) if record.config == run.config => {}
                Found::Good(record) => bail!(
                    "{}: made with other settings\n  there: {}\n  now:   {}\n--fresh starts over, another --out keeps both",
                    run.key.file(&self.path).display(),
                    record.config,
                    run.config
                ),
                Found::Damaged(reason) => {
                    notes.push(self.set_aside(run, &reason)?);
                    missing.push(run.clone());
                }
            }
        }
        Ok((missing, notes))
    }

    fn set_aside(&self, run: &Planned, reason: &str) -> Result<String> {
        let file = run.key.file(&self.path);
        let aside = file.with_file_name(DAMAGED);
        std::fs::rename(&file, &aside).with_context(|| file.display().to_string())?;
        Ok(format!(
            "{}: damaged: {reason}; moved to {DAMAGED}, the run is made again",
            file.display()
        ))
    }

    /// Removes what this command writes, and nothing else.
    fn clear(&self) -> Result<()> {
        for protocol in Protocol::ALL {
            let ours = |name: &str| name == RESULT || name == DAMAGED;
            remove_below(&self.path.join(protocol.slug()), &ours)?;
        }
        remove_below(&self.path.join(FEATURES), &|name| {
            name.ends_with(".safetensors")
        })?;
        remove_below(&self.path.join(PICTURES), &|name| name.ends_with(".png"))?;
        for name in [REPORT, PURPOSE] {
            let file = self.path.join(name);
            if file.exists() {
                std::fs::remove_file(&file).with_context(|| file.display().to_string())?;
            }
        }
        Ok(())
    }
}

/// Checks that the folder at `path`, if it holds anything, is for `purpose`.
///
/// # Errors
/// Says what differs.
pub(crate) fn check(path: &Path, purpose: &Purpose) -> Result<()> {
    let file = path.join(PURPOSE);
    let way_out = "--fresh starts over there, another --out keeps both";
    let bytes = match std::fs::read(&file) {
        Ok(bytes) => bytes,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(anyhow!(e).context(file.display().to_string())),
    };
    let there: Purpose = serde_json::from_slice(&bytes)
        .map_err(|e| anyhow!("{}: damaged: {e}; {way_out}", file.display()))?;
    let differences = purpose.differences(&there);
    if !differences.is_empty() {
        bail!(
            "{} holds results of another configuration\n{}\n{way_out}",
            path.display(),
            differences.join("\n")
        );
    }
    Ok(())
}

/// Every good result below `out`, and a line about each file that is none.
///
/// # Errors
/// A folder that cannot be read.
pub(crate) fn results(out: &Path) -> Result<(Vec<Record>, Vec<String>)> {
    let (mut records, mut notes) = (Vec::new(), Vec::new());
    for protocol in Protocol::ALL {
        let mut files = Vec::new();
        files_below(
            &out.join(protocol.slug()),
            &|name| name == RESULT,
            &mut files,
        )?;
        for file in files {
            let bytes = std::fs::read(&file).with_context(|| file.display().to_string())?;
            match Record::parse(&bytes) {
                Ok(record) if record.run.file(out) == file => records.push(record),
                Ok(record) => notes.push(format!(
                    "{}: left out: it is of another run ({})",
                    file.display(),
                    record.run
                )),
                Err(reason) => notes.push(format!("{}: left out: {reason:#}", file.display())),
            }
        }
    }
    Ok((records, notes))
}

fn lock(path: &Path) -> Result<File> {
    let file = path.join(LOCK);
    let lock = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&file)
        .with_context(|| file.display().to_string())?;
    match lock.try_lock() {
        Ok(()) => Ok(lock),
        Err(TryLockError::WouldBlock) => bail!(
            "{}: another call works in this folder; wait for it or give another --out",
            path.display()
        ),
        Err(TryLockError::Error(e)) => Err(anyhow!(e).context(file.display().to_string())),
    }
}

fn is_empty(path: &Path) -> Result<bool> {
    let entries = std::fs::read_dir(path).with_context(|| path.display().to_string())?;
    Ok(entries.flatten().all(|entry| entry.file_name() == LOCK))
}

/// Files below `folder` whose name `wanted` accepts, sorted. Links are not followed.
fn files_below(
    folder: &Path,
    wanted: &dyn Fn(&str) -> bool,
    found: &mut Vec<PathBuf>,
) -> Result<()> {
    let entries = match std::fs::read_dir(folder) {
        Ok(entries) => entries.collect::<std::io::Result<Vec<_>>>(),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(e) => Err(e),
    };
    let mut entries = entries.with_context(|| folder.display().to_string())?;
    entries.sort_by_key(std::fs::DirEntry::file_name);
    for entry in entries {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            files_below(&entry.path(), wanted, found)?;
        } else if entry.file_name().to_str().is_some_and(wanted) {
            found.push(entry.path());
        }
    }
    Ok(())
}

/// Removes the files that `ours` accepts, and the folders that are empty then.
fn remove_below(folder: &Path, ours: &dyn Fn(&str) -> bool) -> Result<()> {
    let mut files = Vec::new();
    files_below(folder, ours, &mut files)?;
    for file in files {
        std::fs::remove_file(&file).with_context(|| file.display().to_string())?;
        // A folder that holds anything else refuses, and stays.
        let mut parent = file.parent();
        while let Some(above) = parent.filter(|above| above.starts_with(folder)) {
            if std::fs::remove_dir(above).is_err() {
                break;
            }
            parent = above.parent();
        }
    }
    Ok(())
}
