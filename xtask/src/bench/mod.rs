//! `cargo xtask bench`: one step of this workspace against PyTorch and plain candle: time, memory, equal results.
//!
//! Every contender is a process of its own that reads the same weights and inputs. First each computes the whole step and
//! results and gradients are compared; then the steps are timed, contender after contender in rounds.

mod inputs;
mod measure;
mod names;
mod ours;
mod plain;
mod process;
mod python;
mod record;
mod rows;
mod summary;
mod table;
mod worker;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};

use self::measure::Setup;
use self::process::Launch;
use self::record::Results;
use self::rows::{Contender, Row};
use crate::{out, reproduce};

/// Whether this is a development build, whose checks cost time.
const DEVELOPMENT: bool = cfg!(debug_assertions);
/// The call whose times are worth keeping.
const RELEASE: &str = "cargo run --release -p xtask -- bench";

/// Arguments of `cargo xtask bench`.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Args {
    /// A row, as --list names them; may be repeated [default: all]
    #[arg(long, value_name = "NAME")]
    row: Vec<String>,
    /// Name the rows; do nothing
    #[arg(long)]
    list: bool,
    /// Rounds of each row [default: 7, or 3 where a step of PyTorch takes over 30 s]
    #[arg(long, value_name = "N")]
    rounds: Option<usize>,
    /// A contender to leave out (authors, fair, candle, ours-twice); may be repeated
    #[arg(long, value_name = "NAME")]
    without: Vec<String>,
    /// A Python that has PyTorch [default: a virtual environment below target/bench, made once]
    #[arg(long, value_name = "PATH")]
    python: Option<PathBuf>,
    /// Folder for results [default: benches/results]
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Folder for weights, inputs and the virtual environment [default: target/bench]
    #[arg(long, value_name = "DIR")]
    work: Option<PathBuf>,
    /// Threads of each contender [default: one for each core]
    #[arg(long, value_name = "N")]
    threads: Option<usize>,
    /// Tiny towers, for tests of this command
    #[arg(long, hide = true)]
    tiny: bool,
    /// Serve as the contender that standard input describes
    #[arg(long, hide = true)]
    worker: bool,
}

pub(crate) fn main(args: &Args) -> Result<ExitCode> {
    if args.worker {
        return worker::main().map(|()| ExitCode::SUCCESS);
    }
    if args.list {
        for row in Row::all() {
            out::line(&format!("{:<10} {}", row.name, row.title));
        }
        return Ok(ExitCode::SUCCESS);
    }
    let (rows, without) = (args.rows()?, args.without()?);
    for (option, value) in [("--rounds", args.rounds), ("--threads", args.threads)] {
        if value == Some(0) {
            bail!("{option} 0: expected at least one");
        }
    }
    if DEVELOPMENT {
        out::error(&format!(
            "a development build is slower than what is shipped; to keep times: {RELEASE}"
        ));
    }
    let root = reproduce::root();
    let work = args.work.clone();
    let folder = std::path::absolute(work.unwrap_or_else(|| root.join("target/bench")))?;
    let results = args.out.clone();
    let results = results.unwrap_or_else(|| root.join("benches/results"));
    let outputs = folder.join("outputs");
    std::fs::create_dir_all(&outputs).with_context(|| outputs.display().to_string())?;
    let torch = |contender: &Contender| contender.is_torch() && !without.contains(contender);
    let python = Contender::ALL.iter().any(torch);
    let setup = Setup {
        launch: Launch {
            program: std::env::current_exe().context("the path of this program")?,
            python: python
                .then(|| python::find(args.python.as_deref(), &folder))
                .transpose()?,
        },
        folder,
        tiny: args.tiny,
        rounds: args.rounds,
        threads: args
            .threads
            .unwrap_or_else(|| std::thread::available_parallelism().map_or(1, usize::from)),
        command: args.command(),
        revision: reproduce::revision().map(|revision| {
            let dirty = if revision.dirty { " and changes" } else { "" };
            revision.commit + dirty
        }),
    };
    let mut good = true;
    for row in &rows {
        let mut contenders = row.contenders();
        contenders.retain(|contender| !without.contains(contender));
        let record = setup.measure(row, &contenders)?;
        out::line(&table::text(&record));
        good &= record.failures.is_empty();
        // Read again: another call may have written meanwhile.
        let mut all = Results::open(&results)?;
        all.add(record);
        if let Some(growth) = table::growth(&all).filter(|_| row.grows()) {
            out::line(&growth);
        }
        let page = all.write(&results)?;
        out::error(&format!("{}: written to {}", row.name, page.display()));
    }
    Ok(if good {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

impl Args {
    fn rows(&self) -> Result<Vec<Row>> {
        let mut rows = Row::all();
        for name in &self.row {
            if !rows.iter().any(|row| row.name == name) {
                let names: Vec<&str> = rows.iter().map(|row| row.name).collect();
                bail!("--row {name}: expected one of {}", names.join(", "));
            }
        }
        if !self.row.is_empty() {
            rows.retain(|row| self.row.iter().any(|name| name == row.name));
        }
        Ok(rows)
    }

    fn without(&self) -> Result<Vec<Contender>> {
        let contender = |name: &String| {
            let found = Contender::ALL.into_iter().find(|c| c.slug() == name);
            let names: Vec<&str> = Contender::ALL
                .iter()
                .filter(|contender| **contender != Contender::Ours)
                .map(|contender| contender.slug())
                .collect();
            match found {
                Some(Contender::Ours) | None => {
                    bail!("--without {name}: expected one of {}", names.join(", "))
                }
                Some(contender) => Ok(contender),
            }
        };
        self.without.iter().map(contender).collect()
    }

    /// The call without paths, which mean nothing on another machine.
    fn command(&self) -> String {
        let mut command = match DEVELOPMENT {
            true => "cargo xtask bench".to_owned(),
            false => RELEASE.to_owned(),
        };
        for row in &self.row {
            command += &format!(" --row {row}");
        }
        for name in &self.without {
            command += &format!(" --without {name}");
        }
        for (option, value) in [("--rounds", self.rounds), ("--threads", self.threads)] {
            if let Some(value) = value {
                command += &format!(" {option} {value}");
            }
        }
        command
    }
}
