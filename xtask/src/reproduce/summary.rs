//! Results over seeds: the figures that table and report share.

use std::collections::BTreeSet;

use super::builtin;
use super::contestants;
use super::record::{Protocol, Record};

/// Mean and spread over seeds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Stat {
    pub(crate) mean: f64,
    /// Sample standard deviation; none of a single value.
    pub(crate) sd: Option<f64>,
}

impl Stat {
    /// None of no values.
    pub(crate) fn of(values: impl IntoIterator<Item = f64>) -> Option<Self> {
        let values: Vec<f64> = values.into_iter().collect();
        let n = values.len() as f64;
        let mean = values.iter().sum::<f64>() / n;
        let squares: f64 = values.iter().map(|value| (value - mean).powi(2)).sum();
        let sd = (values.len() > 1).then(|| (squares / (n - 1.0)).sqrt());
        (!values.is_empty()).then_some(Self { mean, sd })
    }

    pub(crate) fn spread(&self) -> f64 {
        self.sd.unwrap_or(0.0)
    }
}

/// `54.3 ± 1.2`, or `54.3` of a single value.
impl std::fmt::Display for Stat {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:.1}", self.mean)?;
        match self.sd {
            Some(sd) => write!(f, " ± {sd:.1}"),
            None => Ok(()),
        }
    }
}

/// A contestant as it occurs in results.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Who {
    /// Place in the registry, for the order of rows and the choice of colours.
    pub(crate) place: usize,
    pub(crate) slug: String,
    pub(crate) label: String,
    /// Whether nothing is learned.
    pub(crate) fixed: bool,
}

/// All results of a folder.
#[derive(Debug)]
pub(crate) struct Results {
    records: Vec<Record>,
}

impl Results {
    pub(crate) fn new(mut records: Vec<Record>) -> Self {
        records.sort_by(|a, b| a.run.cmp(&b.run));
        Self { records }
    }

    pub(crate) fn all(&self) -> &[Record] {
        &self.records
    }

    /// Results of one task under one protocol.
    pub(crate) fn of<'a>(
        &'a self,
        protocol: Protocol,
        task: &'a str,
    ) -> impl Iterator<Item = &'a Record> + Clone {
        self.records
            .iter()
            .filter(move |r| r.run.protocol == protocol && r.run.task == task)
    }

    /// Tasks with results under `protocol`, in the order of the benchmark.
    pub(crate) fn tasks(&self, protocol: Protocol) -> Vec<&str> {
        let with_results: BTreeSet<&str> = self
            .records
            .iter()
            .filter(|r| r.run.protocol == protocol)
            .map(|r| r.run.task.as_str())
            .collect();
        let order: Vec<String> = builtin::tasks().into_iter().map(|task| task.slug).collect();
        let place = |task: &&str| {
            order
                .iter()
                .position(|slug| slug == task)
                .unwrap_or(order.len())
        };
        let mut tasks: Vec<&str> = with_results.into_iter().collect();
        tasks.sort_by_key(place);
        tasks
    }

    /// Few-shot tasks on which something was learned.
    pub(crate) fn learned_tasks(&self) -> Vec<&str> {
        let mut tasks = self.tasks(Protocol::FewShot);
        tasks.retain(|task| self.of(Protocol::FewShot, task).any(|r| r.run.shots > 0));
        tasks
    }

    /// Everyone with a result under `protocol` on `task`, in the order of the registry.
    pub(crate) fn who(&self, protocol: Protocol, task: &str) -> Vec<Who> {
        let order: Vec<String> = match contestants::choose(&[], &[]) {
            Ok(all) => all.into_iter().map(|contestant| contestant.slug).collect(),
            Err(_) => Vec::new(),
        };
        let who = |r: &Record| Who {
            place: order
                .iter()
                .position(|slug| *slug == r.run.contestant)
                .unwrap_or(order.len()),
            slug: r.run.contestant.clone(),
            label: r.label.clone(),
            fixed: r.run.shots == 0,
        };
        let all: BTreeSet<Who> = self.of(protocol, task).map(who).collect();
        all.into_iter().collect()
    }

    /// Numbers of shots under `protocol` on `task`, 0 left out.
    pub(crate) fn shots(&self, protocol: Protocol, task: &str) -> Vec<usize> {
        let shots = self
            .of(protocol, task)
            .map(|r| r.run.shots)
            .filter(|shots| *shots > 0);
        shots.collect::<BTreeSet<_>>().into_iter().collect()
    }

    /// Results of one contestant over seeds.
    pub(crate) fn runs<'a>(
        &'a self,
        protocol: Protocol,
        task: &'a str,
        who: &'a Who,
        shots: usize,
    ) -> impl Iterator<Item = &'a Record> + Clone {
        self.of(protocol, task)
            .filter(move |r| r.run.contestant == who.slug && r.run.shots == shots)
    }

    /// Results of one contestant at its largest number of shots.
    pub(crate) fn best_taught<'a>(
        &'a self,
        protocol: Protocol,
        task: &'a str,
        who: &'a Who,
    ) -> impl Iterator<Item = &'a Record> + Clone {
        let of_who = self
            .of(protocol, task)
            .filter(|r| r.run.contestant == who.slug);
        let largest = of_who.map(|r| r.run.shots).max().unwrap_or(0);
        self.runs(protocol, task, who, largest)
    }

    /// Few-shot accuracy over seeds.
    pub(crate) fn few_shot(&self, task: &str, who: &Who, shots: usize) -> Option<Stat> {
        Stat::of(
            self.runs(Protocol::FewShot, task, who, shots)
                .filter_map(|r| r.accuracy("test")),
        )
    }

    /// Accuracy of the contestant that learns nothing.
    pub(crate) fn zero_shot(&self, task: &str) -> Option<f64> {
        let fixed = self
            .who(Protocol::FewShot, task)
            .into_iter()
            .find(|who| who.fixed)?;
        Some(self.few_shot(task, &fixed, 0)?.mean)
    }

    /// What learning did to classes that were not trained on: a sentence for each contestant, tasks called by `name`.
    pub(crate) fn on_new_classes<'a>(&'a self, name: impl Fn(&'a str) -> &'a str) -> Vec<String> {
        let mut learners: BTreeSet<Who> = BTreeSet::new();
        let tasks = self.tasks(Protocol::BaseToNew);
        for task in &tasks {
            let all = self.who(Protocol::BaseToNew, task);
            learners.extend(all.into_iter().filter(|who| !who.fixed));
        }
        let sentence = |who: &Who| {
            let verdict = |task: &&'a str| Some((name(task), self.change_on_new(task, who)?));
            let verdicts: Vec<(&str, Change)> = tasks.iter().filter_map(verdict).collect();
            (!verdicts.is_empty()).then(|| lost(&who.label, &verdicts))
        };
        learners.iter().filter_map(sentence).collect()
    }

    /// Accuracy on new classes after learning, less zero-shot's.
    fn change_on_new(&self, task: &str, who: &Who) -> Option<Change> {
        let new = |who: &Who| {
            let runs = self.best_taught(Protocol::BaseToNew, task, who);
            Stat::of(runs.filter_map(|r| r.accuracy("new")))
        };
        let all = self.who(Protocol::BaseToNew, task);
        let before = all.iter().find(|who| who.fixed).and_then(new)?;
        let after = new(who)?;
        Some(Change {
            points: after.mean - before.mean,
            spread: after.spread(),
        })
    }
}

/// A difference and how far chance alone may move it.
#[derive(Clone, Copy, Debug)]
struct Change {
    points: f64,
    spread: f64,
}

impl Change {
    fn is_clear(&self) -> bool {
        self.points.abs() > self.spread && self.points.abs() >= 0.05
    }
}

/// `+1.0` or `−1.0`.
fn signed(points: f64) -> String {
    format!("{points:+.1}").replace('-', "−")
}

/// Where learning cost accuracy on new classes, where it gained and where neither is clear.
fn lost(label: &str, verdicts: &[(&str, Change)]) -> String {
    let list = |of: &dyn Fn(&Change) -> bool| -> Vec<String> {
        let named = verdicts.iter().filter(|(_, change)| of(change));
        named
            .map(|(task, change)| format!("{task} ({})", signed(change.points)))
            .collect()
    };
    let losses = list(&|change| change.is_clear() && change.points < 0.0);
    let gains = list(&|change| change.is_clear() && change.points > 0.0);
    let unclear = list(&|change| !change.is_clear());
    let mut text = match losses.is_empty() {
        true => format!("{label} loses nothing on new classes beyond the spread over seeds"),
        false => format!("{label} loses on the new classes of {}", losses.join(", ")),
    };
    if !gains.is_empty() {
        text.push_str(&format!("; it gains on {}", gains.join(", ")));
    }
    if !unclear.is_empty() {
        text.push_str(&format!(
            "; no change beyond the spread on {}",
            unclear.join(", ")
        ));
    }
    text.push_str(". (Points against zero-shot.)");
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spread_is_that_of_a_sample() {
        let stat = Stat::of([50.0, 52.0, 54.0]).unwrap();
        assert_eq!(stat.to_string(), "52.0 ± 2.0");
        assert_eq!(Stat::of([7.25]).unwrap().to_string(), "7.2");
        assert_eq!(Stat::of([]), None);
    }

    #[test]
    fn a_loss_is_one_only_beyond_the_spread() {
        let change = |points, spread| Change { points, spread };
        let all = [
            ("a", change(-5.0, 1.0)),
            ("b", change(-1.0, 2.0)),
            ("c", change(6.0, 2.0)),
        ];
        assert_eq!(
            lost("CoOp", &all),
            "CoOp loses on the new classes of a (−5.0); it gains on c (+6.0); no change beyond the spread on b (−1.0). (Points against zero-shot.)"
        );
        assert!(
            lost("CoOp", &all[1..])
                .starts_with("CoOp loses nothing on new classes beyond the spread")
        );
    }
}
