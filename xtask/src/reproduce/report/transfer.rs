//! What was learned, on classes and in styles that training did not show.

use std::path::Path;

use super::details::picture;
use super::html::{Table, escape};
use super::overview::on_new_classes;
use super::strips::{Dot, dots};
use super::words::{named, sign, title};
use crate::reproduce::record::{Measured, Protocol, Record, count};
use crate::reproduce::summary::{Figure, Results, Stat, Who};
use crate::reproduce::table::{shown, style};

/// Marks of base and new: a full and a hollow circle.
const BASE: usize = 1;
const NEW: usize = 6;

/// Base, new and H of each contestant.
pub(super) fn base_to_new(results: &Results) -> String {
    let tasks = results.tasks(Protocol::BaseToNew);
    if tasks.is_empty() {
        return String::new();
    }
    let sentences = tasks
        .iter()
        .filter_map(|task| on_new_classes(results, task));
    let sentences: String = sentences
        .map(|sentence| format!("<li>{}</li>", escape(&sentence)))
        .collect();
    let charts: String = tasks.iter().map(|task| halves(results, task)).collect();
    format!(
        "<p>The first half of the classes is <em>base</em>: training sees pictures and names of these only. The other half is <em>new</em>. Each half is measured among its own classes, so the two tasks differ and zero-shot CLIP need not be equally good at both. H is the harmonic mean: high only if both are.</p>\n<ul>{sentences}</ul>\n<p>{} base, {} new; bars show ±.</p>\n<div class=\"charts\">{charts}</div>\n{}",
        sign(BASE),
        sign(NEW),
        figures(results, &tasks)
    )
}

/// Both halves of a task as dots.
fn halves(results: &Results, task: &str) -> String {
    let row = |who: Who| {
        let dot = |name: Figure, mark| {
            let stat = results.transfer(task, &who, name)?;
            Some(dot_of(&who, mark, &stat))
        };
        let dots = [
            dot(|r| r.accuracy("base"), BASE),
            dot(|r| r.accuracy("new"), NEW),
        ];
        (who.label.clone(), dots.into_iter().flatten().collect())
    };
    let all = results.who(Protocol::BaseToNew, task);
    let rows: Vec<(String, Vec<Dot>)> = all.into_iter().map(row).collect();
    let title = title(results, task);
    format!(
        "<figure><h3>{}</h3>{}</figure>",
        escape(title),
        dots(
            &format!("{title}: accuracy on base and new classes"),
            "accuracy, %",
            &rows
        )
    )
}

fn dot_of(who: &Who, mark: usize, stat: &Stat) -> Dot {
    Dot {
        place: who.place,
        mark,
        value: stat.mean,
        spread: stat.spread(),
    }
}

/// The same in numbers, with the change against zero-shot CLIP.
fn figures(results: &Results, tasks: &[&str]) -> String {
    let heading = ["method", "base, %", "new, %", "H", "new against zero-shot"];
    let mut table = Table::new(&heading);
    for task in tasks {
        table.group(title(results, task));
        let all = results.who(Protocol::BaseToNew, task);
        let harmonic = |who: &Who| results.transfer(task, who, Record::harmonic);
        let best = all
            .iter()
            .filter_map(harmonic)
            .map(|stat| stat.mean)
            .fold(0.0, f64::max);
        for who in &all {
            let change = match who.fixed {
                true => None,
                false => results.change_on_new(task, who),
            };
            let row = [
                who.label.clone(),
                shown(results.transfer(task, who, |r| r.accuracy("base"))),
                shown(results.transfer(task, who, |r| r.accuracy("new"))),
                shown(harmonic(who)),
                change.map_or_else(|| "–".to_owned(), |change| change.to_string()),
            ];
            let is_best = harmonic(who).is_some_and(|stat| stat.mean >= best);
            table.row(&row, is_best.then_some(3));
        }
    }
    table.finish()
}

/// Accuracy in each style, or on each task of other classes.
pub(super) fn elsewhere(results: &Results, protocol: Protocol, out: &Path) -> String {
    let tasks = results.tasks(protocol);
    tasks
        .iter()
        .filter_map(|task| from_task(results, protocol, task, out))
        .collect()
}

fn from_task(results: &Results, protocol: Protocol, task: &str, out: &Path) -> Option<String> {
    let first = results.of(protocol, task).next()?;
    let who = results.who(protocol, task);
    let names: Vec<&str> = first.tests.iter().map(|test| test.name.as_str()).collect();
    let stat = |who: &Who, name: &str| {
        let runs = results.best_taught(protocol, task, who);
        Stat::of(runs.filter_map(|r| r.accuracy(name)))
    };
    let mut heading = vec!["method"];
    heading.extend(names.iter().map(|name| style(name, task)));
    heading.push("mean of the others");
    let mut table = Table::new(&heading);
    for who in &who {
        let runs = results.best_taught(protocol, task, who);
        let mut row = vec![who.label.clone()];
        row.extend(names.iter().map(|name| shown(stat(who, name))));
        row.push(shown(Stat::of(runs.filter_map(Record::elsewhere))));
        table.row(&row, None);
    }
    let row = |name: &&str| {
        let dot = |who: &Who| Some(dot_of(who, who.place, &stat(who, name)?));
        let dots = who.iter().filter_map(dot).collect();
        (style(name, task).to_owned(), dots)
    };
    let rows: Vec<(String, Vec<Dot>)> = names.iter().map(row).collect();
    let title = title(results, task);
    let svg = dots(
        &match protocol {
            Protocol::CrossDataset => format!("{title}: accuracy on each task"),
            _ => format!("{title}: accuracy in each style"),
        },
        "accuracy, %",
        &rows,
    );
    let keys: Vec<String> = who.iter().map(named).collect();
    let pictures = count(
        results.shots(protocol, task).last().copied().unwrap_or(0),
        "picture",
    );
    let about = match protocol {
        Protocol::CrossDataset => format!(
            "Trained on {}, {pictures} a class, and measured on tasks whose classes training never named.",
            escape(title)
        ),
        _ => format!(
            "Trained on {} in the usual style, {pictures} a class, and measured on the same classes in styles that these pictures do not have.",
            escape(title)
        ),
    };
    Some(format!(
        "<p>{about}</p>\n{}<figure><p class=\"keys\">{}</p>{svg}</figure>\n{}",
        styles(&first.tests, task, out),
        keys.join(" "),
        table.finish()
    ))
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
