//! What was learned, on classes and in styles that training did not show.

use std::path::Path;

use super::charts::{Dot, color, dots};
use super::details::picture;
use super::html::{Bar, Table, escape};
use super::words::title;
use crate::reproduce::record::{Measured, Protocol, Record, count};
use crate::reproduce::summary::{Results, Stat, Who};
use crate::reproduce::table::style;

/// A number that a result holds.
type Figure = fn(&Record) -> Option<f64>;

/// Base, new and H of each contestant.
pub(super) fn base_to_new(results: &Results) -> String {
    let tasks = results.tasks(Protocol::BaseToNew);
    if tasks.is_empty() {
        return String::new();
    }
    let mut html = "<p>The first half of the classes is <em>base</em>: training sees pictures and names of these only. The other half is <em>new</em>. Each half is measured among its own classes, so the two tasks differ and zero-shot CLIP need not be equally good at both. H is the harmonic mean: high only if both are.</p>\n<ul>".to_owned();
    for sentence in results.on_new_classes(|task| title(results, task)) {
        html.push_str(&format!("<li>{}</li>", escape(&sentence)));
    }
    html.push_str("</ul>\n<div class=\"grid\">");
    for task in tasks {
        html.push_str(&format!(
            "<section><h3>{}</h3><div class=\"bars\">",
            escape(title(results, task))
        ));
        for who in results.who(Protocol::BaseToNew, task) {
            html.push_str(&format!(
                "<span class=\"who\">{}</span>",
                escape(&who.label)
            ));
            let figures: [(&str, &str, Figure); 3] = [
                ("base", "half", |r| r.accuracy("base")),
                ("new", "new", |r| r.accuracy("new")),
                ("H", "", Record::harmonic),
            ];
            for (label, filling, figure) in figures {
                let runs = results.best_taught(Protocol::BaseToNew, task, &who);
                let Some(stat) = Stat::of(runs.filter_map(figure)) else {
                    continue;
                };
                let (value, color) = (stat.to_string(), color(who.place));
                let bar = Bar {
                    label,
                    percent: stat.mean,
                    value: &value,
                    color: &color,
                    filling,
                    tick: None,
                };
                html.push_str(&bar.html());
            }
        }
        html.push_str("</div></section>");
    }
    html.push_str("</div>\n");
    html
}

/// Accuracy in each style.
pub(super) fn domain_shift(results: &Results, out: &Path) -> String {
    let mut html = String::new();
    for task in results.tasks(Protocol::DomainShift) {
        let Some(first) = results.of(Protocol::DomainShift, task).next() else {
            continue;
        };
        let who = results.who(Protocol::DomainShift, task);
        let stat = |who: &Who, name: &str| {
            Stat::of(
                results
                    .best_taught(Protocol::DomainShift, task, who)
                    .filter_map(|r| r.accuracy(name)),
            )
        };
        let mut heading = vec!["style"];
        heading.extend(who.iter().map(|who| who.label.as_str()));
        let mut table = Table::new(&heading);
        let mut rows = Vec::new();
        for test in &first.tests {
            let name = style(&test.name, task);
            let stats: Vec<Option<Stat>> = who.iter().map(|who| stat(who, &test.name)).collect();
            table.row(&cells(name, &stats), None);
            let dots = who.iter().zip(&stats);
            let dots = dots.filter_map(|(who, stat)| {
                let stat = stat.as_ref()?;
                let (value, spread) = (stat.mean, stat.spread());
                Some(Dot {
                    place: who.place,
                    value,
                    spread,
                })
            });
            rows.push((name.to_owned(), dots.collect()));
        }
        let mean = |who: &Who| {
            Stat::of(
                results
                    .best_taught(Protocol::DomainShift, task, who)
                    .filter_map(Record::shifted),
            )
        };
        table.row(
            &cells(
                "mean of the others",
                &who.iter().map(mean).collect::<Vec<_>>(),
            ),
            None,
        );
        let title = title(results, task);
        let names: String = who
            .iter()
            .map(|who| {
                format!(
                    "<span class=\"key {}\">{} {}</span> ",
                    color(who.place),
                    key(who.place),
                    escape(&who.label)
                )
            })
            .collect();
        let svg = dots(
            &format!("{title}: accuracy in each style"),
            "accuracy, %",
            &rows,
        );
        html.push_str(&format!(
            "<p>Trained on {} in the usual style, {} a class, and measured on the same classes in styles that these pictures do not have.</p>\n{}<figure><p>{names}</p>{svg}</figure>\n{}",
            escape(title),
            count(results.shots(Protocol::DomainShift, task).last().copied().unwrap_or(0), "picture"),
            styles(&first.tests, task, out),
            table.finish()
        ));
    }
    html
}

fn cells(name: &str, stats: &[Option<Stat>]) -> Vec<String> {
    let shown = |stat: &Option<Stat>| stat.map_or_else(|| "–".to_owned(), |stat| stat.to_string());
    std::iter::once(name.to_owned())
        .chain(stats.iter().map(shown))
        .collect()
}

/// A contestant's mark for a line of text.
fn key(place: usize) -> String {
    format!(
        "<svg viewBox=\"0 0 14 14\" style=\"display:inline-block;width:.9rem;vertical-align:-.1rem\" aria-hidden=\"true\">{}</svg>",
        super::charts::mark(place, 7.0, 7.0)
    )
}

/// A picture of each style.
fn styles(tests: &[Measured], task: &str, out: &Path) -> String {
    let mut html = String::new();
    for (i, test) in tests.iter().enumerate() {
        // Another class each time shows more of the world.
        let Some(sample) = test.samples.get(i % test.samples.len().max(1)) else {
            continue;
        };
        let name = test
            .classes
            .get(sample.label as usize)
            .map_or("", String::as_str);
        let style = style(&test.name, task);
        html.push_str(&format!(
            "<li>{}{}</li>",
            picture(out, &sample.picture, &format!("{name}, {style}")),
            escape(style)
        ));
    }
    format!("<ul class=\"styles\">{html}</ul>\n")
}
