//! The `cliptune` command.

mod cli;

fn main() -> std::process::ExitCode {
    cliptune_core::one_candle_thread();
    cli::main()
}
