//! Words that several parts of the report share.

use super::charts::{color, mark};
use super::html::escape;
use crate::reproduce::record::Protocol;
use crate::reproduce::summary::{Results, Stat, Who};

/// A task's heading.
pub(super) fn title<'a>(results: &'a Results, task: &'a str) -> &'a str {
    let record = results.all().iter().find(|record| record.run.task == task);
    record.map_or(task, |record| record.task.title.as_str())
}

/// What a task asks.
pub(super) fn about<'a>(results: &'a Results, task: &str) -> &'a str {
    let record = results.all().iter().find(|record| record.run.task == task);
    record.map_or("", |record| record.task.about.as_str())
}

/// Best learner of a task at its largest number of shots.
pub(super) fn best_learner(results: &Results, task: &str) -> Option<(Who, usize, Stat)> {
    let shots = results.shots(Protocol::FewShot, task).last().copied()?;
    let learners = results
        .who(Protocol::FewShot, task)
        .into_iter()
        .filter(|who| !who.fixed);
    learners
        .filter_map(|who| {
            let stat = results.few_shot(task, &who, shots)?;
            Some((who, shots, stat))
        })
        .max_by(|a, b| a.2.mean.total_cmp(&b.2.mean))
}

/// A contestant's mark and name in its colour.
pub(super) fn named(who: &Who) -> String {
    format!(
        "<span class=\"key {}\">{} {}</span>",
        color(who.place),
        sign(who.place),
        escape(&who.label)
    )
}

/// A mark for a line of text.
pub(super) fn sign(place: usize) -> String {
    format!(
        "<svg class=\"sign\" viewBox=\"0 0 14 14\" aria-hidden=\"true\">{}</svg>",
        mark(place, 7.0, 7.0)
    )
}

/// Names as a list in prose: `a, b and c`.
pub(super) fn listed(names: &[String]) -> String {
    match names {
        [] => String::new(),
        [only] => only.clone(),
        [first @ .., last] => format!("{} and {last}", first.join(", ")),
    }
}
