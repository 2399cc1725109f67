//! Where the class token looks, before and after learning in the image tower.

use std::path::Path;

use super::details::picture;
use super::html::escape;
use super::words::title;
use crate::reproduce::record::{Measured, Protocol, Sample};
use crate::reproduce::summary::{Results, Who};

/// Pictures of a task that are shown.
const PICTURES: usize = 4;
/// How dark a patch is of which the class token takes nothing.
const DARKEST: f32 = 0.85;

/// Maps of every method that has some, task by task.
pub(super) fn attention(results: &Results, out: &Path) -> String {
    let tasks = results.learned_tasks();
    let maps: String = tasks
        .iter()
        .filter_map(|task| of_task(results, task, out))
        .collect();
    match maps.is_empty() {
        true => String::new(),
        false => format!(
            "<p>What the class token attends to in the last block of the image tower, the mean over heads: the darker a patch, the less of it reaches the picture's feature. Each map is scaled to its brightest patch. First seed, largest number of shots.</p>\n{maps}"
        ),
    }
}

fn of_task(results: &Results, task: &str, out: &Path) -> Option<String> {
    let all = results.who(Protocol::FewShot, task);
    let test = |who: &Who| -> Option<Measured> {
        let mut runs = results.best_taught(Protocol::FewShot, task, who);
        runs.next()?.test("test").cloned()
    };
    let mapped = |test: &Measured| test.samples.iter().any(|s| s.attention.is_some());
    let tests: Vec<(Who, Measured)> = all
        .into_iter()
        .filter_map(|who| Some((test(&who)?, who)))
        .filter(|(test, _)| mapped(test))
        .map(|(test, who)| (who, test))
        .collect();
    let (_, first) = tests.first()?;
    // Evenly over the samples, so of different classes.
    let step = first.samples.len().div_ceil(PICTURES).max(1);
    let rows = (0..first.samples.len()).step_by(step);
    let rows: String = rows.map(|index| row(&tests, index, out)).collect();
    Some(format!("<h3>{}</h3>\n{rows}", escape(title(results, task))))
}

/// A picture, as CLIP looks at it, and as it does with what each method learned.
fn row(tests: &[(Who, Measured)], index: usize, out: &Path) -> String {
    let at = |test: &Measured| test.samples.get(index).cloned();
    let Some((_, first)) = tests.first() else {
        return String::new();
    };
    let Some(sample) = at(first) else {
        return String::new();
    };
    let name = first
        .classes
        .get(sample.label as usize)
        .map_or("", String::as_str);
    let mut cells = format!(
        "<li>{}{}</li>",
        picture(out, &sample.picture, name),
        escape(name)
    );
    if let Some(map) = &sample.attention {
        cells.push_str(&cell(&sample, &map.before, "CLIP as it is", out));
    }
    for (who, test) in tests {
        let Some(sample) = at(test) else { continue };
        if let Some(map) = &sample.attention {
            cells.push_str(&cell(&sample, &map.after, &who.label, out));
        }
    }
    format!("<ul class=\"styles looks\">{cells}</ul>\n")
}

fn cell(sample: &Sample, map: &[f32], label: &str, out: &Path) -> String {
    let grid = map.len().isqrt();
    let most = map.iter().copied().fold(f32::MIN_POSITIVE, f32::max);
    let mut shade = String::new();
    for (i, share) in map.iter().enumerate() {
        shade.push_str(&format!(
            "<rect x=\"{}\" y=\"{}\" width=\"1\" height=\"1\" opacity=\"{:.2}\"/>",
            i % grid.max(1),
            i / grid.max(1),
            DARKEST * (1.0 - share / most)
        ));
    }
    format!(
        "<li><div class=\"look\">{}<svg viewBox=\"0 0 {grid} {grid}\" role=\"img\" aria-label=\"where the class token looks: {label}\">{shade}</svg></div>{label}</li>",
        picture(out, &sample.picture, ""),
        label = escape(label)
    )
}
