//! The `cliptune` command: arguments, and one file per command.

mod convert;
mod data;
mod describe;
mod eval;
mod fit;
mod fit_file;
mod import;
mod inspect;
mod list;
mod model;
mod out;
mod predict;
mod predictor;
mod progress;
mod settings;
mod table;

use std::process::ExitCode;

use clap::Parser;

/// Adapt CLIP to your own images: learn a prompt from a few labelled photographs, measure it, use it.
///
/// Results go to standard output, everything else to standard error. Exit status: 0, 1 after an error, 2 for a command
/// line that cannot be understood.
#[derive(Debug, Parser)]
#[command(version, max_term_width = 100, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    Fit(Box<fit::Fit>),
    Eval(eval::Eval),
    Predict(predict::Predict),
    List(list::List),
    Describe(describe::Describe),
    Convert(convert::Convert),
    Import(import::Import),
    Inspect(inspect::Inspect),
}

/// Runs the command line.
pub(crate) fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Fit(command) => command.run(),
        Command::Eval(command) => command.run(),
        Command::Predict(command) => command.run(),
        Command::List(command) => command.run(),
        Command::Describe(command) => command.run(),
        Command::Convert(command) => command.run(),
        Command::Import(command) => command.run(),
        Command::Inspect(command) => command.run(),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if error.is::<out::Closed>() => ExitCode::SUCCESS,
        Err(error) => {
            out::say(explain(&error));
            ExitCode::FAILURE
        }
    }
}

/// `error: ...`, and each cause on a line of its own unless the line above says it already.
fn explain(error: &anyhow::Error) -> String {
    let mut text = format!("error: {error}");
    let mut above = error.to_string();
    for cause in error.chain().skip(1).map(ToString::to_string) {
        if !above.contains(&cause) {
            text.push_str(&format!("\n  because: {cause}"));
            above = cause;
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn causes_follow_once() {
        let error = anyhow::anyhow!("disk full")
            .context("a.txt: disk full")
            .context("cannot save");
        assert_eq!(
            explain(&error),
            "error: cannot save\n  because: a.txt: disk full"
        );
    }
}
