//! The parts of the report that compare methods.

use std::collections::BTreeSet;
use std::path::Path;

use super::charts::{Chart, Dot, Point, Series, color, dots};
use super::details::picture;
use super::html::{Bar, Table, escape};
use crate::reproduce::record::{Measured, Protocol, Record};
use crate::reproduce::summary::{Results, Stat, Who};
use crate::reproduce::table::{epochs, fit_time, memory, style, thousands, zero_shot_of};

/// A task's heading.
pub(super) fn title<'a>(results: &'a Results, task: &'a str) -> &'a str {
    let record = results.all().iter().find(|record| record.run.task == task);
    record.map_or(task, |record| record.task.title.as_str())
}

/// What the page is about, in two sentences.
pub(super) fn lead(results: &Results) -> String {
    let methods: BTreeSet<&str> = results.all().iter().map(|r| r.label.as_str()).collect();
    let tasks: BTreeSet<&str> = results.all().iter().map(|r| r.run.task.as_str()).collect();
    format!(
        "<p class=\"lead\">CLIP compares a picture with one sentence per class. The methods below change those sentences, or what is done with them, so that a few labelled pictures make it better. {} ran on {}.</p>",
        count(methods.len(), "contestant"),
        count(tasks.len(), "task")
    )
}

fn count(n: usize, what: &str) -> String {
    format!("{n} {what}{}", if n == 1 { "" } else { "s" })
}

/// The results in sentences.
pub(super) fn findings(results: &Results) -> String {
    let mut lines: Vec<String> = results
        .learned_tasks()
        .iter()
        .filter_map(|task| gain(results, task))
        .collect();
    lines.extend(results.on_new_classes(|task| title(results, task)));
    lines.extend(
        results
            .tasks(Protocol::DomainShift)
            .iter()
            .filter_map(|task| shift(results, task)),
    );
    let lines: String = lines
        .iter()
        .map(|line| format!("<li>{}</li>", escape(line)))
        .collect();
    match lines.is_empty() {
        true => String::new(),
        false => format!("<ul>{lines}</ul>\n"),
    }
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

fn gain(results: &Results, task: &str) -> Option<String> {
    let (who, shots, after) = best_learner(results, task)?;
    let before = results.zero_shot(task)?;
    let change = after.mean - before;
    let verdict = match change {
        _ if change.abs() <= after.spread() => "no change beyond the spread".to_owned(),
        _ if change > 0.0 => format!("{change:.1} points more"),
        _ => format!("{:.1} points less", -change),
    };
    Some(format!(
        "{}: zero-shot CLIP is right on {before:.1} % of the test pictures; with {} a class {} reaches {after} %, {verdict}.",
        title(results, task),
        count(shots, "picture"),
        who.label
    ))
}

fn shift(results: &Results, task: &str) -> Option<String> {
    let of = |who: &Who| {
        let runs = results.best_taught(Protocol::DomainShift, task, who);
        let at_home = Stat::of(runs.clone().filter_map(|r| r.accuracy(task)))?;
        let away = Stat::of(runs.filter_map(Record::shifted))?;
        Some(format!("{} from {at_home} % to {away} %", who.label))
    };
    let parts: Vec<String> = results
        .who(Protocol::DomainShift, task)
        .iter()
        .filter_map(of)
        .collect();
    (!parts.is_empty()).then(|| {
        format!(
            "{}, from the usual style to the mean of the others: {}.",
            title(results, task),
            parts.join("; ")
        )
    })
}

/// What was run on what.
pub(super) fn setting(results: &Results) -> String {
    let all = results.all();
    let Some(first) = all.first() else {
        return String::new();
    };
    let seconds =
        |r: &Record| r.seconds.load + r.seconds.encode + r.seconds.fit + r.seconds.evaluate;
    let minutes = all.iter().map(seconds).sum::<f64>() / 60.0;
    let seeds: BTreeSet<u64> = all
        .iter()
        .filter(|r| r.run.shots > 0)
        .map(|r| r.run.seed)
        .collect();
    let seeds: Vec<String> = seeds.iter().map(ToString::to_string).collect();
    let hash: String = first.clip.weights_hash.chars().take(12).collect();
    let mut rows = vec![
        ("Pictures", first.task.origin.clone()),
        ("Tasks", tasks_in_words(results)),
        (
            "CLIP",
            format!(
                "{}; features of {} numbers, logit scale {:.1}, weights {hash}",
                first.clip.name, first.clip.embed_dim, first.logit_scale
            ),
        ),
        (
            "Runs",
            format!(
                "{}, {minutes:.1} minutes if made one after the other; each in a process of its own",
                count(all.len(), "run")
            ),
        ),
    ];
    if !seeds.is_empty() {
        rows.push((
            "±",
            format!("sample standard deviation over seeds {}: each draws other training pictures and starts from other values", seeds.join(", ")),
        ));
    }
    if let Some(epochs) = epochs(results) {
        rows.push(("Training", format!("{epochs} at the papers' learning rates; the papers train for 50 to 200, so their methods may gain from more")));
    }
    rows.push(("Made with", made_with(results)));
    let rows: String = rows
        .iter()
        .map(|(name, text)| format!("<dt>{}</dt><dd>{}</dd>", escape(name), escape(text)))
        .collect();
    format!("<dl>{rows}</dl>\n{}", settings(results))
}

/// How many tasks there are and where something was learned; what each asks is said further below.
fn tasks_in_words(results: &Results) -> String {
    let all: BTreeSet<&str> = results.all().iter().map(|r| r.run.task.as_str()).collect();
    let mut text = count(all.len(), "task");
    let parts = [
        ("few-shot on", results.learned_tasks()),
        ("base-to-new on", results.tasks(Protocol::BaseToNew)),
        ("domain shift from", results.tasks(Protocol::DomainShift)),
    ];
    for (what, tasks) in parts.iter().filter(|(_, tasks)| !tasks.is_empty()) {
        let titles: Vec<&str> = tasks.iter().map(|task| title(results, task)).collect();
        text.push_str(&format!("; {what} {}", titles.join(", ")));
    }
    text
}

fn made_with(results: &Results) -> String {
    let Some(first) = results.all().first() else {
        return String::new();
    };
    let revisions: BTreeSet<String> = results
        .all()
        .iter()
        .filter_map(|r| r.revision.as_ref())
        .map(|r| {
            let short: String = r.commit.chars().take(10).collect();
            format!("{short}{}", if r.dirty { " with changes" } else { "" })
        })
        .collect();
    let machine = &first.machine;
    let mut text = format!(
        "cliptune {}, {} ({}), {}, {} a run",
        first.version,
        machine.device,
        machine.system,
        machine.dtype,
        count(machine.threads, "thread")
    );
    if !revisions.is_empty() {
        let list: Vec<String> = revisions.into_iter().collect();
        text.push_str(&format!("; commit {}", list.join(" and ")));
    }
    text
}

/// All settings of each contestant, folded away.
fn settings(results: &Results) -> String {
    let mut rows = String::new();
    let mut seen = BTreeSet::new();
    for record in results
        .all()
        .iter()
        .filter(|r| seen.insert(r.label.as_str()))
    {
        rows.push_str(&format!(
            "<dt>{}</dt><dd><code>{}</code></dd>",
            escape(&record.label),
            escape(&record.config.to_string())
        ));
    }
    format!("<details><summary>All settings</summary><dl>{rows}</dl></details>\n")
}

/// Main table, curves, cost.
pub(super) fn few_shot(results: &Results) -> String {
    let tasks = results.learned_tasks();
    if tasks.is_empty() {
        return String::new();
    }
    let table = taught(results, &tasks);
    let curves: String = tasks
        .iter()
        .filter_map(|task| curves(results, task))
        .collect();
    let costs: String = tasks
        .iter()
        .filter_map(|task| costs(results, task))
        .collect();
    let mut html = format!(
        "<p>Shots are training pictures of each class. Learned numbers are what training changes and a prompt file keeps. Fit is the time of training on one thread; pictures are encoded before, once for all. Peak memory is that of the whole process. The best of each task is set in bold.</p>\n{table}"
    );
    if !curves.is_empty() {
        html.push_str(&format!(
            "<h3>More pictures</h3>\n<p>The dashed line is zero-shot CLIP, which needs no pictures; bars show ±.</p>\n<div class=\"grid\">{curves}</div>\n"
        ));
    }
    if !costs.is_empty() {
        html.push_str(&format!(
            "<h3>What it costs</h3>\n<p>Accuracy at the largest number of shots against the time of training: the higher and the further left, the better.</p>\n<div class=\"grid\">{costs}</div>\n"
        ));
    }
    html
}

/// Accuracy and cost at the largest number of shots.
fn taught(results: &Results, tasks: &[&str]) -> String {
    let mut table = Table::new(&[
        "method",
        "accuracy, %",
        "learned numbers",
        "fit",
        "peak memory",
    ]);
    for task in tasks {
        let all = results.who(Protocol::FewShot, task);
        let accuracy = |who: &Who| {
            let runs = results.best_taught(Protocol::FewShot, task, who);
            Stat::of(runs.filter_map(|r| r.accuracy("test")))
        };
        let best = all
            .iter()
            .filter_map(accuracy)
            .map(|stat| stat.mean)
            .fold(0.0, f64::max);
        let shots = results
            .shots(Protocol::FewShot, task)
            .last()
            .copied()
            .unwrap_or(0);
        table.group(&format!(
            "{}, {}",
            title(results, task),
            count(shots, "shot")
        ));
        for who in &all {
            let runs = results.best_taught(Protocol::FewShot, task, who);
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
        "<figure><h3>{}</h3><figcaption>{}</figcaption>{svg}</figure>\n",
        escape(caption),
        escape(about)
    )
}

/// What a task asks.
fn about<'a>(results: &'a Results, task: &str) -> &'a str {
    let record = results.all().iter().find(|record| record.run.task == task);
    record.map_or("", |record| record.task.about.as_str())
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
                "mean of the other styles",
                &who.iter().map(mean).collect::<Vec<_>>(),
            ),
            None,
        );
        let title = title(results, task);
        let names: String = who
            .iter()
            .map(|who| {
                format!(
                    "<span class=\"{}\">{} {}</span> ",
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
            "<p>Trained on {} in the usual style, {} a class, and measured on the same classes in styles that training never showed.</p>\n{}<figure><p>{names}</p>{svg}</figure>\n{}",
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

/// Zero-shot accuracy of all tasks.
pub(super) fn zero_shot(results: &Results) -> String {
    let mut html = String::new();
    for task in results.tasks(Protocol::FewShot) {
        let Some((accuracy, n_cls)) = zero_shot_of(results, task) else {
            continue;
        };
        let value = format!("{accuracy:.1}");
        let chance = 100.0 / n_cls as f64;
        let label = format!("{} ({n_cls})", title(results, task));
        let bar = Bar {
            label: &label,
            percent: accuracy,
            value: &value,
            color: "c0",
            filling: "",
            tick: Some(chance),
        };
        html.push_str(&bar.html());
        html.push_str(&format!(
            "<small class=\"about\">{}</small>",
            escape(about(results, task))
        ));
    }
    match html.is_empty() {
        true => String::new(),
        false => format!(
            "<p>Accuracy in percent with one hand-written sentence per class, number of classes in brackets. The upright mark is what guessing gives.</p>\n<div class=\"bars\">{html}</div>\n"
        ),
    }
}
