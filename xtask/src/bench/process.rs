//! A worker as its parent sees it: requests and replies, time and memory.

use std::collections::BTreeMap;
use std::fmt;
use std::io::{BufRead, BufReader, Lines, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use anyhow::{Context, Result, bail};

use super::rows::Contender;
use super::worker::{Job, Reply, Request};

/// How workers are started.
#[derive(Clone, Debug)]
pub(super) struct Launch {
    /// This program.
    pub(super) program: PathBuf,
    /// A Python with PyTorch, if PyTorch takes part.
    pub(super) python: Option<PathBuf>,
}

/// One step's cost.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Sample {
    /// Seconds.
    pub(super) wall: f64,
    /// Seconds of all threads, user and system.
    pub(super) cpu: f64,
}

/// A worker that the system has ended, as it does where memory runs out.
#[derive(Debug)]
pub(super) struct Killed(pub(super) &'static str);

impl fmt::Display for Killed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "the process of {} was killed: too little memory?",
            self.0
        )
    }
}

impl std::error::Error for Killed {}

/// A worker that has loaded.
#[derive(Debug)]
pub(super) struct Process {
    contender: Contender,
    child: Child,
    input: ChildStdin,
    output: Lines<BufReader<ChildStdout>>,
    pub(super) versions: BTreeMap<String, String>,
    pub(super) forecast: Option<u64>,
    /// Most memory while loading, in bytes.
    pub(super) load_peak: u64,
    /// Memory before the first step.
    pub(super) base: u64,
}

impl Process {
    /// Starts a worker and waits until it has loaded.
    pub(super) fn start(launch: &Launch, job: &Job) -> Result<Self> {
        let mut command = match (&launch.python, job.contender.is_torch()) {
            (Some(python), true) => {
                let mut command = Command::new(python);
                command.arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("src/bench/pytorch.py"));
                command
            }
            (None, true) => bail!("PyTorch takes part, but there is no Python"),
            (_, false) => {
                let mut command = Command::new(&launch.program);
                command.args(["bench", "--worker"]);
                command.env("RAYON_NUM_THREADS", job.threads.to_string());
                if job.contender == Contender::Candle {
                    // All its threads; ours keeps candle's own pool small.
                    command.env("CANDLE_NUM_THREADS", job.threads.to_string());
                }
                command
            }
        };
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let named = || format!("{}: {:?}", job.contender.title(), command.get_program());
        let started = format!("cannot start {}", named());
        let mut child = command.spawn().context(started)?;
        let (input, output) = (child.stdin.take(), child.stdout.take());
        let mut process = Self {
            contender: job.contender,
            child,
            input: input.context("the worker has no standard input")?,
            output: BufReader::new(output.context("the worker has no standard output")?).lines(),
            versions: BTreeMap::new(),
            forecast: None,
            load_peak: 0,
            base: 0,
        };
        match process.send(&serde_json::to_string(job)?)? {
            Reply::Ready { versions, forecast } => {
                (process.versions, process.forecast) = (versions, forecast);
            }
            reply => bail!("{} answered {reply:?} to a job", job.contender.title()),
        }
        let pid = process.child.id();
        process.load_peak = status(pid, "VmHWM")?;
        let reset = format!("/proc/{pid}/clear_refs");
        // The peak starts again from what is resident now; a file of the kernel cannot be replaced by renaming.
        let mut file = std::fs::OpenOptions::new().write(true).open(&reset)?;
        file.write_all(b"5").context(reset)?;
        process.base = process.resident()?;
        Ok(process)
    }

    /// Lets the worker do one thing.
    pub(super) fn ask(&mut self, request: &Request) -> Result<Sample> {
        let before = cpu_seconds(self.child.id())?;
        match self.send(&serde_json::to_string(request)?)? {
            Reply::Took(wall) => Ok(Sample {
                wall,
                cpu: cpu_seconds(self.child.id())? - before,
            }),
            reply => bail!("{} answered {reply:?} to a request", self.contender.title()),
        }
    }

    fn send(&mut self, line: &str) -> Result<Reply> {
        // A worker that has ended shows in the reply that does not come.
        let sent = writeln!(self.input, "{line}").and_then(|()| self.input.flush());
        match (sent, self.output.next()) {
            (Ok(()), Some(Ok(reply))) => serde_json::from_str(&reply)
                .with_context(|| format!("{} answered `{reply}`", self.contender.title())),
            _ => {
                let status = self.child.wait()?;
                let title = self.contender.title();
                match std::os::unix::process::ExitStatusExt::signal(&status) {
                    Some(9) => Err(Killed(title).into()),
                    _ => bail!("the process of {title} ended with {status}"),
                }
            }
        }
    }

    /// Most memory since it was ready, in bytes.
    pub(super) fn peak(&self) -> Result<u64> {
        status(self.child.id(), "VmHWM")
    }

    /// Memory now.
    pub(super) fn resident(&self) -> Result<u64> {
        status(self.child.id(), "VmRSS")
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Memory that new work could take, in bytes.
pub(super) fn available() -> Result<u64> {
    field("/proc/meminfo", "MemAvailable")
}

/// Memory of the machine.
pub(super) fn total() -> Result<u64> {
    field("/proc/meminfo", "MemTotal")
}

fn status(pid: u32, name: &str) -> Result<u64> {
    field(&format!("/proc/{pid}/status"), name)
}

/// A size from one of the kernel's lists.
fn field(path: &str, name: &str) -> Result<u64> {
    let text = std::fs::read_to_string(path)
        .with_context(|| format!("{path} (the comparison needs Linux)"))?;
    kilobytes(&text, name).with_context(|| format!("{path}: no {name}"))
}

fn kilobytes(text: &str, name: &str) -> Option<u64> {
    let mut lines = text.lines();
    let value = lines.find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
    let kib: u64 = value.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}

fn cpu_seconds(pid: u32) -> Result<f64> {
    let path = format!("/proc/{pid}/stat");
    let text = std::fs::read_to_string(&path).with_context(|| path.clone())?;
    ticks(&text)
        .map(|ticks| ticks as f64 / 100.0)
        .with_context(|| format!("{path}: no times"))
}

/// User and system time in hundredths of a second, the unit that Linux shows to programs.
fn ticks(stat: &str) -> Option<u64> {
    // The name in parentheses may hold anything, also spaces.
    let (_, fields) = stat.rsplit_once(") ")?;
    let mut fields = fields.split(' ').skip(11);
    let user: u64 = fields.next()?.parse().ok()?;
    let system: u64 = fields.next()?.parse().ok()?;
    Some(user + system)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_lists_are_read() {
        let text = "Name:\tx\nVmHWM:\t    1024 kB\nVmRSS:\t 12 kB\n";
        assert_eq!(kilobytes(text, "VmHWM"), Some(1 << 20));
        assert_eq!(kilobytes(text, "VmRSS"), Some(12 << 10));
        assert_eq!(kilobytes(text, "Vm"), None);
        let stat = "7 (a) b) S 1 7 7 0 -1 4194304 100 0 0 0 250 31 5 6 20 0 1 0 9";
        assert_eq!(ticks(stat), Some(281));
    }
}
