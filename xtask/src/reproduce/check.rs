//! Whether what a call left is there and makes sense.

use std::path::Path;

use super::folder::REPORT;
use super::plan::Planned;
use super::record::Protocol;
use super::summary::{Results, Who};

/// What is wrong, a line each.
pub(crate) fn complaints(planned: &[Planned], results: &Results, out: &Path) -> Vec<String> {
    let there = |run: &&Planned| !results.all().iter().any(|record| record.run == run.key);
    let missing = planned.iter().filter(there);
    let mut found: Vec<String> = missing
        .map(|run| format!("{}: there is no result", run.key))
        .collect();
    match std::fs::read_to_string(out.join(REPORT)) {
        Ok(html) if html.trim_end().ends_with("</html>") => {}
        Ok(_) => found.push(format!("{REPORT} is not complete")),
        Err(e) => found.push(format!("{REPORT}: {e}")),
    }
    for task in results.learned_tasks() {
        found.extend(no_gain(results, task));
    }
    found
}

/// Complains if nothing that learns is above zero-shot at the largest number of shots.
fn no_gain(results: &Results, task: &str) -> Option<String> {
    let Some(before) = results.zero_shot(task) else {
        return Some(format!("{task}: zero-shot CLIP was not measured"));
    };
    let shots = results.shots(Protocol::FewShot, task).last().copied()?;
    let learners = results.who(Protocol::FewShot, task);
    let after = |who: &Who| Some(results.few_shot(task, who, shots)?.mean);
    let best = learners
        .iter()
        .filter(|who| !who.fixed)
        .filter_map(after)
        .fold(f64::NAN, f64::max);
    let message =
        format!("{task}: {best:.1} % at {shots} shots is not above zero-shot, {before:.1} %");
    (best.is_nan() || best <= before).then_some(message)
}
