//! Few-shot accuracy: table, curves, cost.

use std::collections::BTreeSet;

use super::charts::{Chart, Point, Series};
use super::html::{Table, escape};
use super::words::{about, listed, title};
use crate::reproduce::builtin::MULTI_TASK_FROM;
use crate::reproduce::record::{Protocol, count};
use crate::reproduce::summary::{Results, Stat, Who};
use crate::reproduce::table::{fit_time, memory, shown, thousands};

/// Main table, curves, cost.
pub(super) fn few_shot(results: &Results) -> String {
    let tasks = results.learned_tasks();
    if tasks.is_empty() {
        return String::new();
    }
    let table = taught(results, Protocol::FewShot, &tasks);
    let curves: String = tasks
        .iter()
        .filter_map(|task| curves(results, task))
        .collect();
    let costs: String = tasks
        .iter()
        .filter_map(|task| costs(results, task))
        .collect();
    let mut html = format!(
        "<p>Shots are training pictures of each class. Learned numbers are what training changes and a prompt file keeps. Fit is the time of training on {}; pictures are encoded before, once for all. Peak memory is that of the whole process. The best of each task is set in bold.</p>\n{table}",
        threads(results)
    );
    if !curves.is_empty() {
        html.push_str(&format!(
            "<h3>More pictures</h3>\n<p>The dashed line is zero-shot CLIP, which needs no pictures; bars show ±.</p>\n<div class=\"charts\">{curves}</div>\n"
        ));
    }
    if !costs.is_empty() {
        html.push_str(&format!(
            "<h3>What it costs</h3>\n<p>Accuracy at the largest number of shots against the time of training: the higher and the further left, the better.</p>\n<div class=\"charts\">{costs}</div>\n"
        ));
    }
    html
}

/// How many threads a run had.
fn threads(results: &Results) -> String {
    let all = results.all().iter();
    let numbers: BTreeSet<usize> = all.map(|record| record.machine.threads).collect();
    match numbers.into_iter().collect::<Vec<_>>().as_slice() {
        [only] => count(*only, "thread"),
        _ => "a number of threads that differs between the runs".to_owned(),
    }
}

/// Accuracy after other tasks, beside that without them.
pub(super) fn multi_task(results: &Results) -> String {
    let tasks = results.tasks(Protocol::MultiTask);
    if tasks.is_empty() {
        return String::new();
    }
    let mut table = Table::new(&["method", "alone, %", "after other tasks, %"]);
    for task in &tasks {
        for shots in results.shots(Protocol::MultiTask, task) {
            table.group(&format!(
                "{}, {}",
                title(results, task),
                count(shots, "shot")
            ));
            for who in results.who(Protocol::MultiTask, task) {
                let runs = results.runs(Protocol::MultiTask, task, &who, shots);
                let row = [
                    who.label.clone(),
                    shown(results.few_shot(task, &who, shots)),
                    shown(Stat::of(runs.filter_map(|r| r.accuracy("test")))),
                ];
                table.row(&row, None);
            }
        }
    }
    let others: Vec<String> = MULTI_TASK_FROM.iter().map(ToString::to_string).collect();
    format!(
        "<p>The tasks {} are learned together first, with as many pictures of each class, and from there the task itself.</p>\n{}",
        listed(&others),
        table.finish()
    )
}

/// Accuracy and cost where every training picture was shown.
pub(super) fn supervised(results: &Results) -> String {
    let tasks = results.tasks(Protocol::Supervised);
    match tasks.is_empty() {
        true => String::new(),
        false => format!(
            "<p>For methods whose authors train on whole training sets: every training picture of each class is shown.</p>\n{}",
            taught(results, Protocol::Supervised, &tasks)
        ),
    }
}

/// Accuracy and cost at the largest number of training pictures.
fn taught(results: &Results, protocol: Protocol, tasks: &[&str]) -> String {
    let mut table = Table::new(&[
        "method",
        "accuracy, %",
        "learned numbers",
        "fit",
        "peak memory",
    ]);
    for task in tasks {
        let all = results.who(protocol, task);
        let accuracy = |who: &Who| {
            let runs = results.best_taught(protocol, task, who);
            Stat::of(runs.filter_map(|r| r.accuracy("test")))
        };
        let best = all
            .iter()
            .filter_map(accuracy)
            .map(|stat| stat.mean)
            .fold(0.0, f64::max);
        let shots = results.shots(protocol, task).last().copied().unwrap_or(0);
        table.group(&format!(
            "{}, {}",
            title(results, task),
            count(shots, "shot")
        ));
        for who in &all {
            let runs = results.best_taught(protocol, task, who);
            let (Some(first), Some(stat)) = (runs.clone().next(), accuracy(who)) else {
                continue;
            };
            let row = [
                who.label.clone(),
                stat.to_string(),
                thousands(first.learned),
                fit_time(runs.clone()),
                memory(runs),
            ];
            table.row(&row, (stat.mean >= best).then_some(1));
        }
    }
    table.finish()
}

fn level(results: &Results, task: &str) -> Vec<(String, usize, f64)> {
    results
        .zero_shot(task)
        .map(|accuracy| ("zero-shot".to_owned(), 0, accuracy))
        .into_iter()
        .collect()
}

fn figure(caption: &str, about: &str, svg: &str) -> String {
    format!(
        "<figure><h3>{}</h3>{svg}<figcaption>{}</figcaption></figure>\n",
        escape(caption),
        escape(about)
    )
}

/// Accuracy by shots; nothing if there is one number of shots only.
fn curves(results: &Results, task: &str) -> Option<String> {
    let shots = results.shots(Protocol::FewShot, task);
    let learners = results
        .who(Protocol::FewShot, task)
        .into_iter()
        .filter(|who| !who.fixed);
    let series = learners.map(|who| {
        let at = |(i, shots): (usize, &usize)| {
            let stat = results.few_shot(task, &who, *shots)?;
            Some(Point {
                x: i as f64,
                y: stat.mean,
                spread: stat.spread(),
            })
        };
        let points = shots.iter().enumerate().filter_map(at).collect();
        Series {
            label: who.label.clone(),
            place: who.place,
            points,
        }
    });
    let title = title(results, task);
    let chart = Chart {
        title: format!("{title}: accuracy by training pictures a class"),
        x_title: "training pictures a class".to_owned(),
        y_title: "accuracy, %".to_owned(),
        x_ticks: shots
            .iter()
            .enumerate()
            .map(|(i, shots)| (i as f64, shots.to_string()))
            .collect(),
        levels: level(results, task),
        series: series.collect(),
    };
    (shots.len() > 1).then(|| figure(title, about(results, task), &chart.svg()))
}

/// Accuracy by time of training, at the largest number of shots.
fn costs(results: &Results, task: &str) -> Option<String> {
    let learners = results
        .who(Protocol::FewShot, task)
        .into_iter()
        .filter(|who| !who.fixed);
    let series: Vec<Series> = learners
        .filter_map(|who| {
            let runs = results.best_taught(Protocol::FewShot, task, &who);
            let seconds = Stat::of(runs.clone().map(|r| r.seconds.fit))?
                .mean
                .max(1e-3);
            let stat = Stat::of(runs.filter_map(|r| r.accuracy("test")))?;
            let point = Point {
                x: seconds.log10(),
                y: stat.mean,
                spread: stat.spread(),
            };
            Some(Series {
                label: who.label.clone(),
                place: who.place,
                points: vec![point],
            })
        })
        .collect();
    let points = series
        .iter()
        .flat_map(|series| &series.points)
        .map(|point| point.x);
    let (least, most) = points.fold((f64::INFINITY, f64::NEG_INFINITY), |(a, b), x| {
        (a.min(x), b.max(x))
    });
    let ticks = [
        0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1_000.0, 3_000.0, 10_000.0,
    ];
    let within = |seconds: &&f64| (least - 0.5..=most + 0.5).contains(&seconds.log10());
    let title = title(results, task);
    let chart = Chart {
        title: format!("{title}: accuracy by time of training"),
        x_title: "seconds of training".to_owned(),
        y_title: "accuracy, %".to_owned(),
        x_ticks: ticks
            .iter()
            .filter(within)
            .map(|seconds| (seconds.log10(), seconds.to_string()))
            .collect(),
        levels: level(results, task),
        series,
    };
    least.is_finite().then(|| figure(title, "", &chart.svg()))
}
