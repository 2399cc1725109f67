//! How far a call is, on standard error: a bar on a terminal, a line now and then in a log.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::out;

/// Longest silence in a log.
const LOG_EVERY: Duration = Duration::from_secs(15);

/// Shows work of known length.
#[derive(Debug)]
pub(crate) struct Show {
    terminal: bool,
    bar: ProgressBar,
    what: String,
    total: u64,
    last: Instant,
}

impl Show {
    pub(crate) fn new() -> Self {
        Self {
            terminal: std::io::stderr().is_terminal(),
            bar: ProgressBar::hidden(),
            what: String::new(),
            total: 0,
            last: Instant::now(),
        }
    }

    /// Work of `total` units begins.
    pub(crate) fn start(&mut self, what: &str, total: u64) {
        (self.what, self.total, self.last) = (what.to_owned(), total, Instant::now());
        if !self.terminal {
            return;
        }
        let template = "{prefix:<18} {wide_bar} {percent:>3}%  {eta} left\n{wide_msg}";
        let style = ProgressStyle::with_template(template)
            .unwrap_or_else(|_| ProgressStyle::default_bar())
            .progress_chars("━━─");
        self.bar = ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::stderr());
        self.bar.set_style(style);
        self.bar.set_prefix(what.to_owned());
        self.bar.enable_steady_tick(Duration::from_millis(250));
    }

    /// `done` units are over; `doing` is what is in hand.
    pub(crate) fn at(&mut self, done: u64, doing: &str) {
        self.bar.set_message(doing.to_owned());
        self.bar.set_position(done);
        if !self.terminal && self.last.elapsed() >= LOG_EVERY {
            self.last = Instant::now();
            let percent = 100 * done / self.total.max(1);
            out::error(&format!("{}: {percent} % ({doing})", self.what));
        }
    }

    /// Something that the reader should see.
    pub(crate) fn note(&self, message: &str) {
        self.bar.suspend(|| out::error(message));
    }

    /// The work is over.
    pub(crate) fn finish(&mut self) {
        self.bar.finish_and_clear();
        self.bar = ProgressBar::hidden();
    }
}

/// A bar is not left behind when an error ends its work.
impl Drop for Show {
    fn drop(&mut self) {
        self.finish();
    }
}
