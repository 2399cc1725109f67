//! One contender in a process of its own, so that its time and memory are its own.
//!
//! The protocol, in lines of JSON on standard input and output; `pytorch.py` speaks it too. The worker reads a [`Job`], loads
//! and answers [`Reply::Ready`]; then it answers each [`Request`] with [`Reply::Took`] until its input ends. Memory and CPU
//! time are read from outside, in the same way for everybody.

use std::collections::BTreeMap;
use std::io::{BufRead, Write};
use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use super::inputs::{self, Named};
use super::rows::{Contender, Task};
use super::{ours, plain};

/// What a worker is for.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Job {
    pub(super) contender: Contender,
    pub(super) task: Task,
    pub(super) weights: PathBuf,
    pub(super) inputs: PathBuf,
    pub(super) threads: usize,
}

/// What is asked of a worker.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Request {
    /// The whole step; results and gradients are written there.
    Check(PathBuf),
    /// What is timed, for the given round.
    Step(usize),
}

/// What a worker answers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Reply {
    /// Everything is loaded.
    Ready {
        /// Names and versions of what computes.
        versions: BTreeMap<String, String>,
        /// Bytes that a step is expected to add to the process.
        forecast: Option<u64>,
    },
    /// Seconds of the step alone.
    Took(f64),
}

/// A contender's side of a row.
pub(super) trait Work {
    /// What is timed: results and gradients under the names that all contenders use.
    fn step(&mut self, round: usize) -> Result<Named>;

    /// The whole of a step of which only a part is timed.
    fn check(&mut self) -> Result<Named> {
        self.step(0)
    }

    /// Bytes that a step is expected to add to the process.
    fn forecast(&self) -> Result<Option<u64>> {
        Ok(None)
    }
}

/// Serves the parent process until it closes the pipe.
pub(super) fn main() -> Result<()> {
    let mut lines = std::io::stdin().lock().lines();
    let job = lines.next().context("standard input is empty")??;
    let job: Job = serde_json::from_str(&job).context("standard input holds no job")?;
    let mut work: Box<dyn Work> = match job.contender {
        Contender::Ours => ours::work(&job, false)?,
        Contender::OursTwice => ours::work(&job, true)?,
        Contender::Candle => plain::work(&job)?,
        Contender::Authors | Contender::Fair => bail!("PyTorch's worker is a Python script"),
    };
    let version = match job.contender {
        Contender::Candle => ("candle", candle_version()),
        _ => ("cliptune", env!("CARGO_PKG_VERSION")),
    };
    let forecast = work.forecast()?;
    give_back_memory();
    answer(&Reply::Ready {
        versions: BTreeMap::from([(version.0.to_owned(), version.1.to_owned())]),
        forecast,
    })?;
    for line in lines {
        let request: Request = serde_json::from_str(&line?).context("not a request")?;
        let started = Instant::now();
        let seconds = match request {
            Request::Step(round) => {
                // Results are dropped inside: giving memory back is part of a step.
                drop(work.step(round)?);
                started.elapsed().as_secs_f64()
            }
            Request::Check(path) => {
                let named = work.check()?;
                let seconds = started.elapsed().as_secs_f64();
                inputs::write(&path, &named)?;
                seconds
            }
        };
        answer(&Reply::Took(seconds))?;
    }
    Ok(())
}

/// Returns what loading has freed to the system: a step that takes it anew is then seen to grow by it.
fn give_back_memory() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: it releases only what is not in use.
    unsafe {
        libc::malloc_trim(0)
    };
}

fn answer(reply: &Reply) -> Result<()> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{}", serde_json::to_string(reply)?)?;
    Ok(out.flush()?)
}

/// The version of candle that the lock file names.
fn candle_version() -> &'static str {
    let lock = include_str!("../../../Cargo.lock");
    let (_, entry) = lock
        .split_once("name = \"candle-core\"")
        .unwrap_or(("", ""));
    entry.split('"').nth(1).unwrap_or("unknown")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_and_replies_are_what_the_script_reads_and_writes() -> Result<()> {
        let check = Request::Check("out".into());
        assert_eq!(serde_json::to_string(&check)?, r#"{"check":"out"}"#);
        assert_eq!(serde_json::to_string(&Request::Step(3))?, r#"{"step":3}"#);
        let reply: Reply = serde_json::from_str(r#"{"took": 1.5}"#)?;
        assert_eq!(reply, Reply::Took(1.5));
        let ready = r#"{"ready": {"versions": {"torch": "2"}, "forecast": null}}"#;
        let versions = BTreeMap::from([("torch".to_owned(), "2".to_owned())]);
        let reply: Reply = serde_json::from_str(ready)?;
        assert_eq!(
            reply,
            Reply::Ready {
                versions,
                forecast: None
            }
        );
        Ok(())
    }

    #[test]
    fn the_version_of_candle_is_found() {
        assert!(candle_version().starts_with("0."), "{}", candle_version());
    }
}
