//! The parts of the report that look at one task closely.

use std::path::Path;

use super::charts::color;
use super::heat::heat;
use super::html::{Bar, base64, escape};
use super::words::{best_learner, title};
use crate::reproduce::record::{Measured, Protocol, Record, Sample};
use crate::reproduce::summary::{Results, Who};

/// Classes with a bar each; of more, the worst and the best are shown.
const MOST_BARS: usize = 60;
/// Worst classes shown of a task with very many.
const WORST: usize = 40;
/// Confusions that are said in words.
const SAID: usize = 5;

/// Accuracy by class and confusions of each task on which something was learned.
pub(super) fn classes(results: &Results) -> String {
    let tasks = results.learned_tasks();
    let parts: String = tasks
        .iter()
        .filter_map(|task| of_task(results, task))
        .collect();
    match parts.is_empty() {
        true => String::new(),
        false => format!(
            "<p>The best learner of each task at its largest number of shots, all seeds together. The upright mark on a bar is zero-shot CLIP.</p>\n{parts}"
        ),
    }
}

fn of_task(results: &Results, task: &str) -> Option<String> {
    let (who, shots, _) = best_learner(results, task)?;
    let learned = Sum::of(results.runs(Protocol::FewShot, task, &who, shots))?;
    let fixed = results
        .who(Protocol::FewShot, task)
        .into_iter()
        .find(|who| who.fixed);
    let before = fixed.and_then(|fixed| Sum::of(results.runs(Protocol::FewShot, task, &fixed, 0)));
    let mut html = format!(
        "<h3>{}: {}, {shots} shots</h3>\n{}{}",
        escape(title(results, task)),
        escape(&who.label),
        learned.bars(before.as_ref(), &color(who.place)),
        learned.in_words()
    );
    if learned.classes.len() <= MOST_BARS {
        let name = format!("{}: which class was taken for which", title(results, task));
        html.push_str(&format!(
            "<figure><div class=\"scroll\" tabindex=\"0\">{}</div><figcaption>Rows: what it is. Columns: what it was called. The stronger the colour, the larger the share of the row; a perfect classifier fills the diagonal from top left to bottom right.</figcaption></figure>\n",
            heat(&name, &learned.classes, &learned.shares())
        ));
    }
    Some(html)
}

/// Confusions added up over seeds.
struct Sum {
    classes: Vec<String>,
    counts: Vec<Vec<u64>>,
}

impl Sum {
    fn of<'a>(records: impl Iterator<Item = &'a Record>) -> Option<Self> {
        let mut tests = records.filter_map(|record| record.test("test"));
        let Measured {
            classes, confusion, ..
        } = tests.next()?;
        let mut sum = Self {
            classes: classes.clone(),
            counts: confusion.clone(),
        };
        for test in tests.filter(|test| test.classes == *classes) {
            for (row, more) in sum.counts.iter_mut().zip(&test.confusion) {
                row.iter_mut()
                    .zip(more)
                    .for_each(|(count, more)| *count += more);
            }
        }
        Some(sum)
    }

    /// Each row divided by its sum.
    fn shares(&self) -> Vec<Vec<f64>> {
        let share = |row: &Vec<u64>| {
            let total = row.iter().sum::<u64>().max(1) as f64;
            row.iter().map(|count| *count as f64 / total).collect()
        };
        self.counts.iter().map(share).collect()
    }

    /// Percent of each class that is right; none without pictures.
    fn accuracies(&self) -> Vec<Option<f64>> {
        let of = |(i, row): (usize, &Vec<u64>)| {
            let total: u64 = row.iter().sum();
            (total > 0).then(|| 100.0 * row.get(i).copied().unwrap_or(0) as f64 / total as f64)
        };
        self.counts.iter().enumerate().map(of).collect()
    }

    /// A bar for each class, best first.
    fn bars(&self, before: Option<&Self>, color: &str) -> String {
        let before = before.map(Self::accuracies).unwrap_or_default();
        let names = self.classes.iter().zip(self.accuracies()).enumerate();
        let mut classes: Vec<(usize, &str, f64)> = names
            .filter_map(|(i, (name, accuracy))| Some((i, name.as_str(), accuracy?)))
            .collect();
        classes.sort_by(|a, b| b.2.total_cmp(&a.2));
        let mut note = String::new();
        if classes.len() > MOST_BARS {
            let better = classes.len() - WORST;
            note = format!(
                "<p class=\"faint\">The worst {WORST} of {} classes.</p>",
                classes.len()
            );
            classes.drain(..better);
        }
        let mut html = String::new();
        for (class, label, percent) in classes {
            let value = format!("{percent:.0} %");
            let tick = before.get(class).copied().flatten();
            html.push_str(
                &Bar {
                    label,
                    percent,
                    value: &value,
                    color,
                    tick,
                }
                .html(),
            );
        }
        format!("{note}<div class=\"bars\">{html}</div>\n")
    }

    /// The largest confusions as sentences.
    fn in_words(&self) -> String {
        let mut pairs = Vec::new();
        for (i, row) in self.shares().into_iter().enumerate() {
            pairs.extend(
                row.into_iter()
                    .enumerate()
                    .filter(|(j, _)| *j != i)
                    .map(|(j, share)| (share, i, j)),
            );
        }
        pairs.retain(|(share, ..)| *share >= 0.05);
        pairs.sort_by(|a, b| b.0.total_cmp(&a.0));
        let name = |class: usize| self.classes.get(class).map_or("", String::as_str);
        let said = pairs.iter().take(SAID).map(|(share, is, called)| {
            format!(
                "{} called {} ({:.0} %)",
                escape(name(*is)),
                escape(name(*called)),
                100.0 * share
            )
        });
        match pairs.is_empty() {
            true => {
                "<p>No class is taken for another in 5 % of its pictures or more.</p>\n".to_owned()
            }
            false => format!(
                "<p>Most often confused: {}.</p>\n",
                said.collect::<Vec<_>>().join(", ")
            ),
        }
    }
}

/// Test pictures with everyone's predictions.
pub(super) fn pictures(results: &Results, out: &Path) -> String {
    let tasks = results.learned_tasks();
    let parts: String = tasks
        .iter()
        .map(|task| of_pictures(results, task, out))
        .collect();
    match parts.is_empty() {
        true => String::new(),
        false => format!(
            "<p>Pictures as CLIP sees them, enlarged, with what each contestant calls them after its largest number of shots (first seed) and how sure it is. ✓ is right, ✗ is wrong.</p>\n{parts}"
        ),
    }
}

/// What everyone said of one picture.
fn said_of(samples: &[(&Who, &Measured)], index: usize) -> String {
    let mut html = String::new();
    for (who, test) in samples {
        let Some(Sample {
            label,
            predicted,
            probability,
            ..
        }) = test.samples.get(index)
        else {
            continue;
        };
        let name = test
            .classes
            .get(*predicted as usize)
            .map_or("", String::as_str);
        let (sign, verdict) = if label == predicted {
            ("✓", "right")
        } else {
            ("✗", "wrong")
        };
        html.push_str(&format!(
            "<span class=\"said\"><span class=\"by {}\">{}</span><span title=\"{verdict}\">{sign}</span> {} <span class=\"faint\">{:.0} %</span></span>",
            color(who.place),
            escape(&who.label),
            escape(name),
            100.0 * probability
        ));
    }
    html
}

fn of_pictures(results: &Results, task: &str, out: &Path) -> String {
    let all = results.who(Protocol::FewShot, task);
    let first = |who| {
        results
            .best_taught(Protocol::FewShot, task, who)
            .next()?
            .test("test")
    };
    let samples: Vec<(&Who, &Measured)> = all
        .iter()
        .filter_map(|who| Some((who, first(who)?)))
        .collect();
    let Some((_, shown)) = samples.first() else {
        return String::new();
    };
    let mut html = String::new();
    for (index, sample) in shown.samples.iter().enumerate() {
        let name = shown
            .classes
            .get(sample.label as usize)
            .map_or("", String::as_str);
        html.push_str(&format!(
            "<li>{}<div class=\"true\">{}</div>{}</li>",
            picture(out, &sample.picture, name),
            escape(name),
            said_of(&samples, index)
        ));
    }
    format!(
        "<h3>{}</h3>\n<ul class=\"pictures\">{html}</ul>\n",
        escape(title(results, task))
    )
}

/// A picture file below `out` inside the page; a word if it is not there any more.
pub(super) fn picture(out: &Path, file: &str, what: &str) -> String {
    // A result may have been edited; nothing outside of the folder is shown.
    let inside = Path::new(file)
        .components()
        .all(|part| matches!(part, std::path::Component::Normal(_)));
    match std::fs::read(out.join(file)) {
        Ok(bytes) if inside => format!(
            "<img alt=\"{}\" src=\"data:image/png;base64,{}\"/>",
            escape(what),
            base64(&bytes)
        ),
        _ => "<p class=\"faint\">(the picture is not there)</p>".to_owned(),
    }
}
