//! Results as text for a terminal.

use super::record::{Protocol, Record};
use super::summary::{Results, Stat, Who};

/// All tables and the sentences that belong to them.
pub(crate) fn text(results: &Results) -> String {
    let parts = [
        taught(results),
        by_shots(results),
        base_to_new(results),
        elsewhere(results, Protocol::CrossDataset),
        elsewhere(results, Protocol::DomainShift),
        multi_task(results),
        supervised(results),
        zero_shot(results),
        legend(results),
    ];
    let parts: Vec<String> = parts.into_iter().filter(|part| !part.is_empty()).collect();
    parts.join("\n")
}

/// Accuracy and cost at the largest number of shots.
fn taught(results: &Results) -> String {
    let heading = [
        "task",
        "method",
        "shots",
        "accuracy, %",
        "learned numbers",
        "fit",
        "peak memory",
    ];
    let mut table = Table::new(&heading, 2);
    for task in results.learned_tasks() {
        for who in results.who(Protocol::FewShot, task) {
            let runs = results.best_taught(Protocol::FewShot, task, &who);
            if let Some(row) = cost_row(task, &who, runs) {
                table.row(row);
            }
        }
    }
    table.titled("Few-shot: accuracy and cost")
}

/// Mean fit time of `runs`; nothing for what does not fit.
pub(crate) fn fit_time<'a>(runs: impl Iterator<Item = &'a Record>) -> String {
    let seconds = Stat::of(runs.filter(|r| r.run.shots > 0).map(|r| r.seconds.fit));
    seconds.map_or_else(
        || "–".to_owned(),
        |seconds| match seconds.mean {
            short if short < 0.1 => format!("{short:.2} s"),
            mean => format!("{mean:.1} s"),
        },
    )
}

/// Largest memory of `runs`.
pub(crate) fn memory<'a>(runs: impl Iterator<Item = &'a Record>) -> String {
    let most = runs.filter_map(|r| r.peak_memory_bytes).max();
    most.map_or_else(|| "–".to_owned(), |bytes| format!("{} MiB", bytes >> 20))
}

/// A figure, or a dash where there is none.
pub(crate) fn shown(stat: Option<Stat>) -> String {
    stat.map_or_else(|| "–".to_owned(), |stat| stat.to_string())
}

/// `12 345`.
pub(crate) fn thousands(number: usize) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            text.push('\u{202f}');
        }
        text.push(digit);
    }
    text
}

/// Accuracy by number of shots.
fn by_shots(results: &Results) -> String {
    let tasks = results.learned_tasks();
    let mut shots: Vec<usize> = tasks
        .iter()
        .flat_map(|task| results.shots(Protocol::FewShot, task))
        .collect();
    shots.sort_unstable();
    shots.dedup();
    if shots.len() < 2 {
        return String::new();
    }
    let mut heading = vec!["task".to_owned(), "method".to_owned(), "0 shots".to_owned()];
    heading.extend(shots.iter().map(ToString::to_string));
    let heading: Vec<&str> = heading.iter().map(String::as_str).collect();
    let mut table = Table::new(&heading, 2);
    for task in tasks {
        for who in results.who(Protocol::FewShot, task) {
            let at = |shots: &usize| match results.few_shot(task, &who, *shots) {
                Some(stat) => stat.to_string(),
                None => String::new(),
            };
            let mut row = vec![task.to_owned(), who.label.clone(), at(&0)];
            row.extend(shots.iter().map(at));
            table.row(row);
        }
    }
    table.titled("Few-shot accuracy by training pictures a class, %")
}

fn base_to_new(results: &Results) -> String {
    let mut table = Table::new(&["task", "method", "base, %", "new, %", "H"], 2);
    for task in results.tasks(Protocol::BaseToNew) {
        for who in results.who(Protocol::BaseToNew, task) {
            let runs = results.best_taught(Protocol::BaseToNew, task, &who);
            let of = |figure: fn(&Record) -> Option<f64>| {
                shown(Stat::of(runs.clone().filter_map(figure)))
            };
            table.row([
                task.to_owned(),
                who.label.clone(),
                of(|r| r.accuracy("base")),
                of(|r| r.accuracy("new")),
                of(Record::harmonic),
            ]);
        }
    }
    let mut text = table.titled("Base to new: learned on the base classes only");
    for sentence in results.on_new_classes() {
        text.push_str(&format!("{sentence}\n"));
    }
    text
}

/// One task learned from, measured in other styles or on other tasks.
fn elsewhere(results: &Results, protocol: Protocol) -> String {
    let mut parts = String::new();
    for task in results.tasks(protocol) {
        let Some(first) = results.of(protocol, task).next() else {
            continue;
        };
        let names: Vec<&str> = first.tests.iter().map(|test| test.name.as_str()).collect();
        let mut heading = vec!["method"];
        heading.extend(names.iter().map(|name| style(name, task)));
        heading.push("mean of others");
        let mut table = Table::new(&heading, 1);
        for who in results.who(protocol, task) {
            let runs = results.best_taught(protocol, task, &who);
            let mut row = vec![who.label.clone()];
            row.extend(
                names
                    .iter()
                    .map(|name| shown(Stat::of(runs.clone().filter_map(|r| r.accuracy(name))))),
            );
            row.push(shown(Stat::of(runs.filter_map(Record::elsewhere))));
            table.row(row);
        }
        parts.push_str(&table.titled(&match protocol {
            Protocol::CrossDataset => {
                format!("Cross-dataset: learned on {task}, measured on tasks of other classes, %")
            }
            _ => format!("Domain shift: learned on {task}, measured in other styles, %"),
        }));
    }
    parts
}

/// `sketch` of `shape-sketch`; a task of another name is called by it.
pub(crate) fn style<'a>(name: &'a str, task: &str) -> &'a str {
    match name.strip_prefix(task) {
        Some("") => "as learned",
        Some(rest) => rest.strip_prefix('-').unwrap_or(name),
        None => name,
    }
}

/// Accuracy after other tasks, beside that without them.
fn multi_task(results: &Results) -> String {
    let heading = ["task", "method", "shots", "alone, %", "after others, %"];
    let mut table = Table::new(&heading, 2);
    for task in results.tasks(Protocol::MultiTask) {
        for who in results.who(Protocol::MultiTask, task) {
            for shots in results.shots(Protocol::MultiTask, task) {
                let runs = results.runs(Protocol::MultiTask, task, &who, shots);
                table.row([
                    task.to_owned(),
                    who.label.clone(),
                    shots.to_string(),
                    shown(results.few_shot(task, &who, shots)),
                    shown(Stat::of(runs.filter_map(|r| r.accuracy("test")))),
                ]);
            }
        }
    }
    table.titled("Multi-task: begun with what other tasks taught")
}

/// Accuracy and cost where every training picture was shown.
fn supervised(results: &Results) -> String {
    let heading = [
        "task",
        "method",
        "pictures a class",
        "accuracy, %",
        "learned numbers",
        "fit",
        "peak memory",
    ];
    let mut table = Table::new(&heading, 2);
    for task in results.tasks(Protocol::Supervised) {
        for who in results.who(Protocol::Supervised, task) {
            let runs = results.best_taught(Protocol::Supervised, task, &who);
            if let Some(row) = cost_row(task, &who, runs) {
                table.row(row);
            }
        }
    }
    table.titled("Supervised: learned from every training picture")
}

/// A contestant's accuracy on a task and what it cost.
fn cost_row<'a>(
    task: &str,
    who: &Who,
    runs: impl Iterator<Item = &'a Record> + Clone,
) -> Option<[String; 7]> {
    let first = runs.clone().next()?;
    Some([
        task.to_owned(),
        who.label.clone(),
        first.run.shots.to_string(),
        shown(Stat::of(runs.clone().filter_map(|r| r.accuracy("test")))),
        thousands(first.learned),
        fit_time(runs.clone()),
        memory(runs),
    ])
}

/// What CLIP knows without learning.
fn zero_shot(results: &Results) -> String {
    let mut table = Table::new(&["task", "classes", "chance, %", "zero-shot, %"], 1);
    for task in results.tasks(Protocol::FewShot) {
        let Some((accuracy, n_cls)) = zero_shot_of(results, task) else {
            continue;
        };
        table.row([
            task.to_owned(),
            n_cls.to_string(),
            format!("{:.1}", 100.0 / n_cls as f64),
            format!("{accuracy:.1}"),
        ]);
    }
    table.titled("Zero-shot CLIP on every task")
}

/// Zero-shot accuracy and number of classes of a task.
pub(crate) fn zero_shot_of(results: &Results, task: &str) -> Option<(f64, usize)> {
    let fixed = |who: &Who| who.fixed;
    let who = results
        .who(Protocol::FewShot, task)
        .into_iter()
        .find(fixed)?;
    let record = results.runs(Protocol::FewShot, task, &who, 0).next()?;
    let test = record.test("test")?;
    Some((test.accuracy, test.classes.len()))
}

/// What the numbers mean.
fn legend(results: &Results) -> String {
    let mut text = String::new();
    match results.seeds().as_slice() {
        [] => {}
        [seed] => text.push_str(&format!(
            "One seed ({seed}): how far chance moves these numbers is not known.\n"
        )),
        seeds => text.push_str(&format!(
            "± is the sample standard deviation over seeds {}.\n",
            seeds.join(", ")
        )),
    }
    if !results.tasks(Protocol::BaseToNew).is_empty() {
        text.push_str("H is the harmonic mean of base and new.\n");
    }
    if let Some(epochs) = epochs(results) {
        text.push_str(&format!(
            "Trained for {epochs}; the papers train for 10 to 200.\n"
        ));
    }
    text
}

/// How long was trained, in words; nothing if nothing was.
pub(crate) fn epochs(results: &Results) -> Option<String> {
    let lengths: std::collections::BTreeSet<usize> = results
        .all()
        .iter()
        .filter_map(|r| Some(r.training.as_ref()?.epochs.len()))
        .collect();
    match (lengths.first(), lengths.last()) {
        (Some(least), Some(most)) if least == most => Some(format!("{least} epochs")),
        (Some(least), Some(most)) => Some(format!("{least} to {most} epochs")),
        _ => None,
    }
}

/// Rows under a heading; the first columns flush left, the others flush right.
struct Table {
    rows: Vec<Vec<String>>,
    left: usize,
}

impl Table {
    fn new(heading: &[&str], left: usize) -> Self {
        let heading = heading.iter().map(|cell| (*cell).to_owned()).collect();
        Self {
            rows: vec![heading],
            left,
        }
    }

    fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        self.rows.push(cells.into_iter().collect());
    }

    /// The table below its title; nothing without rows.
    fn titled(&self, title: &str) -> String {
        if self.rows.len() < 2 {
            return String::new();
        }
        let wide = |cell: &String| cell.chars().count();
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or(0);
        let width = |column| {
            self.rows
                .iter()
                .filter_map(|row| row.get(column))
                .map(wide)
                .max()
                .unwrap_or(0)
        };
        let widths: Vec<usize> = (0..columns).map(width).collect();
        let mut text = format!("{title}\n");
        // A task's name stands once.
        let mut above = String::new();
        for row in &self.rows {
            let mut line = String::new();
            for (column, (cell, &width)) in row.iter().zip(&widths).enumerate() {
                let cell = match column == 0 && self.left > 1 && *cell == above {
                    true => "",
                    false => cell.as_str(),
                };
                match column < self.left {
                    true => line.push_str(&format!("{cell:<width$}  ")),
                    false => line.push_str(&format!("{cell:>width$}  ")),
                }
            }
            above = row.first().cloned().unwrap_or_default();
            text.push_str(line.trim_end());
            text.push('\n');
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::style;

    #[test]
    fn a_style_is_called_by_what_it_adds_and_another_task_by_its_name() {
        assert_eq!(style("shape", "shape"), "as learned");
        assert_eq!(style("shape-sketch", "shape"), "sketch");
        assert_eq!(style("color", "small"), "color");
        assert_eq!(style("shapes", "shape"), "shapes");
    }
}
