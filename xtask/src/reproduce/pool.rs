//! Runs side by side, each in a process of its own.

use std::io::{Read, Write};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{self, Sender};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};

use super::progress::Show;
use super::record::RunKey;
use super::worker::Job;

/// Characters of a failed run's last words that are shown.
const LAST_WORDS: usize = 2_000;
/// Time between two looks at a process.
const LOOK: Duration = Duration::from_millis(10);

/// How runs are started.
#[derive(Clone, Debug)]
pub(crate) struct Pool<'a> {
    /// The program that makes one run, and its arguments.
    pub(crate) program: PathBuf,
    pub(crate) arguments: Vec<String>,
    /// Runs at a time.
    pub(crate) jobs: usize,
    /// Threads of each run.
    pub(crate) threads: usize,
    /// Set from outside to stop everything.
    pub(crate) cancel: &'a AtomicBool,
}

/// A run that has no result, and why.
#[derive(Debug)]
pub(crate) struct Failure {
    pub(crate) key: RunKey,
    pub(crate) reason: String,
}

/// What a thread tells of the run in its hands.
enum News {
    Started(usize),
    Ended(usize, Result<()>),
}

impl Pool<'_> {
    /// Makes all runs; one that fails does not stop the others. The numbers are the runs' shares of the bar.
    ///
    /// # Errors
    /// Only if the call was stopped from outside.
    pub(crate) fn run(&self, jobs: &[(Job, u64)], show: &mut Show) -> Result<Vec<Failure>> {
        show.start("running", jobs.iter().map(|(_, weight)| weight).sum());
        let next = AtomicUsize::new(0);
        let mut failures = Vec::new();
        std::thread::scope(|scope| {
            let (sender, news) = mpsc::channel();
            for _ in 0..self.jobs.min(jobs.len()) {
                let (sender, next) = (sender.clone(), &next);
                scope.spawn(move || self.work(jobs, next, &sender));
            }
            drop(sender);
            let mut state = State {
                jobs,
                running: Vec::new(),
                done: 0,
                ended: 0,
            };
            for news in news {
                if let Some(failure) = state.hear(news) {
                    show.note(&format!("failed: {}", failure.key));
                    failures.push(failure);
                }
                show.at(state.done, &state.in_words());
            }
        });
        show.finish();
        if self.cancel.load(Ordering::Relaxed) {
            bail!("stopped; the finished runs are kept, the same command goes on from there");
        }
        Ok(failures)
    }

    fn work(&self, jobs: &[(Job, u64)], next: &AtomicUsize, sender: &Sender<News>) {
        while !self.cancel.load(Ordering::Relaxed) {
            let index = next.fetch_add(1, Ordering::Relaxed);
            let Some((job, _)) = jobs.get(index) else {
                break;
            };
            // The receiver outlives all senders.
            let _ = sender.send(News::Started(index));
            let outcome = self.one(job);
            if !self.cancel.load(Ordering::Relaxed) {
                let _ = sender.send(News::Ended(index, outcome));
            }
        }
    }

    fn one(&self, job: &Job) -> Result<()> {
        let mut child = Command::new(&self.program)
            .args(&self.arguments)
            .env("RAYON_NUM_THREADS", self.threads.to_string())
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| self.program.display().to_string())?;
        let mut text = serde_json::to_vec(job)?;
        text.push(b'\n');
        let mut input = child.stdin.take();
        if let Some(input) = &mut input {
            // A process that died before it listened says why on standard error.
            let _ = input.write_all(&text);
        }
        let mut stderr = child.stderr.take();
        let words = std::thread::spawn(move || {
            let mut bytes = Vec::new();
            if let Some(stderr) = &mut stderr {
                let _ = stderr.read_to_end(&mut bytes);
            }
            String::from_utf8_lossy(&bytes).into_owned()
        });
        let status = self.wait(&mut child)?;
        // Open until now: a run whose input ends knows that its caller is gone.
        drop(input);
        let words = words.join().unwrap_or_default();
        match (status.success(), words.trim()) {
            (true, _) => Ok(()),
            (false, "") => Err(anyhow!("{status}")),
            (false, words) => Err(anyhow!("{status}: {}", last_of(words))),
        }
    }

    /// Waits for the process; ends it if the call is stopped.
    fn wait(&self, child: &mut Child) -> Result<std::process::ExitStatus> {
        loop {
            if let Some(status) = child.try_wait()? {
                return Ok(status);
            }
            if self.cancel.load(Ordering::Relaxed) {
                let _ = child.kill();
                return Ok(child.wait()?);
            }
            std::thread::sleep(LOOK);
        }
    }
}

fn last_of(words: &str) -> String {
    let skip = words.chars().count().saturating_sub(LAST_WORDS);
    words.chars().skip(skip).collect()
}

/// What is going on.
struct State<'a> {
    jobs: &'a [(Job, u64)],
    running: Vec<usize>,
    /// Shares of the bar that are over.
    done: u64,
    ended: usize,
}

impl State<'_> {
    fn hear(&mut self, news: News) -> Option<Failure> {
        match news {
            News::Started(index) => {
                self.running.push(index);
                None
            }
            News::Ended(index, outcome) => {
                self.running.retain(|running| *running != index);
                self.ended += 1;
                let (job, weight) = self.jobs.get(index)?;
                self.done += weight;
                let reason = format!("{:#}", outcome.err()?);
                Some(Failure {
                    key: job.key.clone(),
                    reason,
                })
            }
        }
    }

    fn in_words(&self) -> String {
        let names = self
            .running
            .iter()
            .filter_map(|index| Some(self.jobs.get(*index)?.0.key.to_string()));
        let names: Vec<String> = names.collect();
        let ended = format!("{} of {} runs done", self.ended, self.jobs.len());
        match names.is_empty() {
            true => ended,
            false => format!("{ended}; now {}", names.join(" | ")),
        }
    }
}
