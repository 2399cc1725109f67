//! What a run shows: bars on a terminal, a line now and then in a log, nothing when quiet.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use cliptune::run::{Progress, TrainStatus};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::out;

/// Longest silence in a log while there is work, seconds.
const LOG_EVERY: f64 = 10.0;
/// Shortest time between two lines of a log, seconds.
const LOG_AT_MOST: f64 = 1.0;

/// Shows a run on standard error.
#[derive(Debug)]
pub(crate) enum Show {
    /// Nothing.
    Quiet,
    /// Bars that are redrawn.
    Terminal(Option<ProgressBar>),
    /// Lines that stay.
    Log(Log),
}

impl Show {
    pub(crate) fn new(quiet: bool) -> Self {
        match (quiet, std::io::stderr().is_terminal()) {
            (true, _) => Self::Quiet,
            (false, true) => Self::Terminal(None),
            (false, false) => Self::Log(Log::default()),
        }
    }

    fn report(&mut self, done: u64, status: Option<&TrainStatus>) {
        match self {
            Self::Quiet => {}
            Self::Terminal(Some(bar)) => {
                if let Some(status) = status {
                    bar.set_message(in_words(status));
                }
                bar.set_position(done);
            }
            Self::Terminal(None) => {}
            Self::Log(log) => log.report(done, status),
        }
    }
}

impl Progress for Show {
    fn start(&mut self, what: &str, done: u64, total: u64) {
        match self {
            Self::Quiet => {}
            Self::Terminal(bar) => *bar = Some(new_bar(what, done, total)),
            Self::Log(log) => *log = Log::start(what, done, total),
        }
    }

    fn trained(&mut self, done: u64, status: &TrainStatus) {
        self.report(done, Some(status));
    }

    fn advanced(&mut self, done: u64) {
        self.report(done, None);
    }

    fn finish(&mut self) {
        if let Self::Terminal(bar) = self
            && let Some(bar) = bar.take()
        {
            bar.finish_and_clear();
        }
    }

    fn note(&mut self, message: &str) {
        match self {
            Self::Quiet => {}
            Self::Terminal(Some(bar)) => bar.suspend(|| out::say(message)),
            Self::Terminal(None) | Self::Log(_) => out::say(message),
        }
    }
}

/// A bar is not left behind when an error ends its work.
impl Drop for Show {
    fn drop(&mut self) {
        self.finish();
    }
}

fn new_bar(what: &str, done: u64, total: u64) -> ProgressBar {
    // Training adds a line of figures below the bar.
    let template = match what {
        "training" => "{prefix:<17} {wide_bar} {percent:>3}%  {eta} left\n{wide_msg}",
        _ => "{prefix:<17} {wide_bar} {pos}/{len}  {eta} left",
    };
    let style = ProgressStyle::with_template(template)
        .unwrap_or_else(|_| ProgressStyle::default_bar())
        .progress_chars("━━─");
    let bar = ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::stderr());
    bar.set_style(style);
    bar.set_prefix(what.to_owned());
    bar.set_position(done);
    // What an earlier run did says nothing of this one's speed.
    bar.reset_eta();
    bar.enable_steady_tick(Duration::from_millis(250));
    bar
}

fn in_words(status: &TrainStatus) -> String {
    format!(
        "epoch {}/{}, loss {:.4}, accuracy {:.1} %, lr {:.3e}, {:.0} images/s",
        status.epoch,
        status.epochs,
        status.loss,
        status.accuracy,
        status.lr,
        status.images_per_second
    )
}

/// The state of a log.
#[derive(Debug)]
pub(crate) struct Log {
    what: String,
    first: u64,
    total: u64,
    tenth: u64,
    started: Instant,
    last: Instant,
}

impl Default for Log {
    fn default() -> Self {
        Self::start("", 0, 0)
    }
}

impl Log {
    fn start(what: &str, done: u64, total: u64) -> Self {
        let now = Instant::now();
        Self {
            what: what.to_owned(),
            first: done,
            total,
            tenth: tenths(done, total),
            started: now,
            last: now,
        }
    }

    fn report(&mut self, done: u64, status: Option<&TrainStatus>) {
        let (tenth, silence) = (tenths(done, self.total), self.last.elapsed().as_secs_f64());
        let due = silence >= LOG_EVERY || (tenth > self.tenth && silence >= LOG_AT_MOST);
        if !due && done < self.total {
            return;
        }
        (self.tenth, self.last) = (tenth, Instant::now());
        let speed =
            done.saturating_sub(self.first) as f64 / self.started.elapsed().as_secs_f64().max(1e-9);
        let left = self.total.saturating_sub(done) as f64 / speed.max(1e-9);
        let left = match done < self.total {
            true => format!(", {} left", duration(left)),
            false => String::new(),
        };
        match status {
            Some(status) => out::say(format_args!("{}: {}{left}", self.what, in_words(status))),
            None => out::say(format_args!("{}: {done}/{}{left}", self.what, self.total)),
        }
    }
}

fn tenths(done: u64, total: u64) -> u64 {
    done.saturating_mul(10) / total.max(1)
}

/// A length of time as a person says it.
pub(crate) fn duration(seconds: f64) -> String {
    // A float as large as the type's end saturates.
    let whole = seconds.round() as u64;
    match whole {
        0..60 if seconds < 10.0 => format!("{seconds:.1} s"),
        0..60 => format!("{whole} s"),
        60..3600 => format!("{} min {} s", whole / 60, whole % 60),
        _ => format!("{} h {} min", whole / 3600, whole % 3600 / 60),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_of_time_are_said_as_people_say_them() {
        let said: Vec<String> = [0.04, 9.96, 59.6, 61.0, 7260.0]
            .into_iter()
            .map(duration)
            .collect();
        assert_eq!(
            said,
            ["0.0 s", "10.0 s", "1 min 0 s", "1 min 1 s", "2 h 1 min"]
        );
    }
}
