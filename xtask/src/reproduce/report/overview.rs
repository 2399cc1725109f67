//! The report's beginning and end: what came out, what was run, and what CLIP knows without learning.

use std::collections::BTreeSet;

use super::html::{Bar, escape};
use super::words::{about, best_learner, listed, title};
use crate::reproduce::record::{Protocol, Record, count};
use crate::reproduce::summary::{Change, Results, Stat, Who, beyond, sorted_out};
use crate::reproduce::table::{epochs, zero_shot_of};

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

/// The results in sentences.
pub(super) fn findings(results: &Results) -> String {
    let mut lines: Vec<String> = results
        .learned_tasks()
        .iter()
        .filter_map(|task| gain(results, task))
        .collect();
    lines.extend(
        results
            .tasks(Protocol::BaseToNew)
            .iter()
            .filter_map(|task| on_new_classes(results, task)),
    );
    for protocol in [Protocol::CrossDataset, Protocol::DomainShift] {
        let tasks = results.tasks(protocol);
        lines.extend(
            tasks
                .iter()
                .filter_map(|task| elsewhere(results, protocol, task)),
        );
    }
    let lines: String = lines
        .iter()
        .map(|line| format!("<li>{}</li>", escape(line)))
        .collect();
    match lines.is_empty() {
        true => String::new(),
        false => format!("<ul>{lines}</ul>\n"),
    }
}

fn gain(results: &Results, task: &str) -> Option<String> {
    let (who, shots, after) = best_learner(results, task)?;
    let before = results.zero_shot(task)?;
    let change = after.mean - before;
    let verdict = match after.sd {
        Some(sd) if change.abs() <= sd => "no change beyond the spread".to_owned(),
        _ if change.abs() < 0.05 => "no change".to_owned(),
        _ if change > 0.0 => format!("{change:.1} points more"),
        _ => format!("{:.1} points less", -change),
    };
    Some(format!(
        "{}: zero-shot CLIP is right on {before:.1} % of the test pictures; with {} a class the best learner, {}, reaches {after} %, {verdict}.",
        title(results, task),
        count(shots, "picture"),
        who.label
    ))
}

/// What learning on half of the classes did to the other half, and who is best on both.
pub(super) fn on_new_classes(results: &Results, task: &str) -> Option<String> {
    let all = results.who(Protocol::BaseToNew, task);
    let (fixed, learners): (Vec<Who>, Vec<Who>) = all.into_iter().partition(|who| who.fixed);
    let fixed = fixed.first()?;
    let changes: Vec<(String, Change)> = learners
        .iter()
        .filter_map(|who| Some((who.label.clone(), results.change_on_new(task, who)?)))
        .collect();
    let [gains, losses, unclear] = sorted_out(&changes);
    let unchanged = format!("no change{} with ", beyond(&changes));
    let parts = [
        ("better are ", gains),
        ("worse are ", losses),
        (unchanged.as_str(), unclear),
    ];
    let parts: Vec<String> = parts
        .iter()
        .filter(|(_, names)| !names.is_empty())
        .map(|(what, names)| format!("{what}{}", listed(names)))
        .collect();
    let harmonic = |who: &Who| results.transfer(task, who, Record::harmonic);
    let (best, h) = learners
        .iter()
        .filter_map(|who| Some((who, harmonic(who)?)))
        .max_by(|a, b| a.1.mean.total_cmp(&b.1.mean))?;
    Some(format!(
        "{}, new classes, against zero-shot CLIP's {} %: {}. Best H of the learners: {}, {h} (zero-shot {}).",
        title(results, task),
        results.transfer(task, fixed, |r| r.accuracy("new"))?,
        parts.join("; "),
        best.label,
        harmonic(fixed)?
    ))
}

/// What another style or task costs zero-shot CLIP, and whom it costs least and most.
fn elsewhere(results: &Results, protocol: Protocol, task: &str) -> Option<String> {
    let of = |who: &Who| {
        let runs = results.best_taught(protocol, task, who);
        let at_home = Stat::of(runs.clone().filter_map(|r| r.accuracy(task)))?;
        Some((
            who.clone(),
            at_home,
            Stat::of(runs.filter_map(Record::elsewhere))?,
        ))
    };
    let all = results.who(protocol, task);
    let (fixed, mut learners): (Vec<_>, Vec<_>) =
        all.iter().filter_map(of).partition(|(who, ..)| who.fixed);
    learners.sort_by(|a, b| b.2.mean.total_cmp(&a.2.mean));
    let mut parts: Vec<String> = fixed
        .iter()
        .map(|(who, home, away)| format!("{} goes from {home} % to {away} %", who.label))
        .collect();
    if let Some((who, home, away)) = learners.first() {
        parts.push(format!(
            "the best learner there, {}, from {home} % to {away} %",
            who.label
        ));
    }
    if let [_, .., (who, home, away)] = learners.as_slice() {
        parts.push(format!(
            "the worst, {}, from {home} % to {away} %",
            who.label
        ));
    }
    (!parts.is_empty()).then(|| {
        let from = match protocol {
            Protocol::CrossDataset => "from its own classes to the mean of the other tasks",
            _ => "from the usual style to the mean of the others",
        };
        format!("{}, {from}: {}.", title(results, task), parts.join("; "))
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
    match results.seeds().as_slice() {
        [] => {}
        [seed] => rows.push((
            "Seeds",
            format!("{seed} alone, so how far chance moves these numbers is not known"),
        )),
        seeds => rows.push((
            "±",
            format!("sample standard deviation over seeds {}: each draws other training pictures and starts from other values", seeds.join(", ")),
        )),
    }
    if let Some(epochs) = epochs(results) {
        rows.push(("Training", format!("{epochs} at the papers' learning rates; the papers train for 10 to 200, so their methods may gain from more")));
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
        ("cross-dataset from", results.tasks(Protocol::CrossDataset)),
        ("domain shift from", results.tasks(Protocol::DomainShift)),
        ("after other tasks on", results.tasks(Protocol::MultiTask)),
        ("supervised on", results.tasks(Protocol::Supervised)),
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
