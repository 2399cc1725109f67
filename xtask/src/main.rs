//! The project's own commands: `cargo xtask bench`, `parity`, `pretrain`, `probe`, `reproduce`.

mod bench;
mod parity;
mod pretrain;
mod probe;
mod reproduce;

use std::process::ExitCode;

use clap::Parser;

/// cliptune's own commands.
#[derive(Parser)]
#[command(name = "cargo xtask")]
enum Command {
    /// Compares steps with PyTorch and plain candle: time, memory, equal results.
    Bench(bench::Args),
    /// Runs the parity cases: our numbers against those of the authors' code.
    Parity(parity::Args),
    /// Trains the built-in CLIP on the procedural picture world.
    Pretrain(pretrain::Args),
    /// Judges a CLIP on the tasks of the picture world.
    Probe(probe::Args),
    /// Compares the methods on the built-in benchmark or on a data set, and reports.
    Reproduce(Box<reproduce::Args>),
}

fn main() -> ExitCode {
    cliptune_core::one_candle_thread();
    let outcome = match Command::parse() {
        Command::Bench(args) => bench::main(&args),
        Command::Parity(args) => parity::main(&args),
        Command::Pretrain(args) => pretrain::main(&args).map(|()| ExitCode::SUCCESS),
        Command::Probe(args) => probe::main(&args).map(|()| ExitCode::SUCCESS),
        Command::Reproduce(args) => reproduce::main(&args),
    };
    match outcome {
        Ok(code) => code,
        Err(error) => {
            out::error(&format!("error: {error:#}"));
            ExitCode::FAILURE
        }
    }
}

/// The one place that prints.
mod out {
    use std::io::Write;

    /// A line for the reader or the next program; a closed pipe is not our problem.
    pub(crate) fn line(text: &str) {
        let _ = writeln!(std::io::stdout(), "{text}");
    }

    /// A line about the run itself.
    pub(crate) fn error(text: &str) {
        let _ = writeln!(std::io::stderr(), "{text}");
    }
}
