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
    /// Slugs of all contestants there are.
    order: Vec<String>,
}

impl Results {
    pub(crate) fn new(mut records: Vec<Record>) -> Self {
        records.sort_by(|a, b| a.run.cmp(&b.run));
        let order = match contestants::choose(&[], &[]) {
            Ok(all) => all.into_iter().map(|contestant| contestant.slug).collect(),
            Err(_) => Vec::new(),
        };
        Self { records, order }
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
        let all: BTreeSet<Who> = self.of(protocol, task).map(|r| self.who_made(r)).collect();
        all.into_iter().collect()
    }

    /// Whose result `record` is.
    pub(crate) fn who_made(&self, record: &Record) -> Who {
        let place = self
            .order
            .iter()
            .position(|slug| *slug == record.run.contestant);
        Who {
            place: place.unwrap_or(self.order.len()),
            slug: record.run.contestant.clone(),
            label: record.label.clone(),
            fixed: record.run.shots == 0,
        }
    }

    /// Seeds of what was learned.
    pub(crate) fn seeds(&self) -> Vec<String> {
        let learned = self.records.iter().filter(|r| r.run.shots > 0);
        let seeds: BTreeSet<u64> = learned.map(|r| r.run.seed).collect();
        seeds.iter().map(ToString::to_string).collect()
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

    /// What learning did to classes that were not trained on: a sentence for each contestant.
    pub(crate) fn on_new_classes(&self) -> Vec<String> {
        let mut learners: BTreeSet<Who> = BTreeSet::new();
        let tasks = self.tasks(Protocol::BaseToNew);
        for task in &tasks {
            let all = self.who(Protocol::BaseToNew, task);
            learners.extend(all.into_iter().filter(|who| !who.fixed));
        }
        let sentence = |who: &Who| {
            let verdict = |task: &&str| Some(((*task).to_owned(), self.change_on_new(task, who)?));
            let verdicts: Vec<(String, Change)> = tasks.iter().filter_map(verdict).collect();
            (!verdicts.is_empty()).then(|| lost(&who.label, &verdicts))
        };
        learners.iter().filter_map(sentence).collect()
    }

    /// A figure of base to new over seeds, at the largest number of shots.
    pub(crate) fn transfer(&self, task: &str, who: &Who, figure: Figure) -> Option<Stat> {
        let runs = self.best_taught(Protocol::BaseToNew, task, who);
        Stat::of(runs.filter_map(figure))
    }

    /// Accuracy on new classes after learning, less zero-shot's.
    pub(crate) fn change_on_new(&self, task: &str, who: &Who) -> Option<Change> {
        let new: Figure = |r| r.accuracy("new");
        let all = self.who(Protocol::BaseToNew, task);
        let fixed = all.iter().find(|who| who.fixed)?;
        let after = self.transfer(task, who, new)?;
        Some(Change {
            points: after.mean - self.transfer(task, fixed, new)?.mean,
            spread: after.sd,
        })
    }
}

/// A number that a result holds.
pub(crate) type Figure = fn(&Record) -> Option<f64>;

/// A difference and how far chance alone may move it; unknown with one seed.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Change {
    pub(crate) points: f64,
    spread: Option<f64>,
}

impl Change {
    fn is_clear(&self) -> bool {
        self.points.abs() > self.spread.unwrap_or(0.0) && self.points.abs() >= 0.05
    }

    /// Whether accuracy rose beyond the spread.
    pub(crate) fn gains(&self) -> bool {
        self.is_clear() && self.points > 0.0
    }

    /// Whether it fell beyond the spread.
    pub(crate) fn loses(&self) -> bool {
        self.is_clear() && self.points < 0.0
    }
}

/// `+1.0` or `−1.0`.
impl std::fmt::Display for Change {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&format!("{:+.1}", self.points).replace('-', "−"))
    }
}

/// `all` split into gains, losses and what is neither clearly, each as `name (+1.0)`.
pub(crate) fn sorted_out(all: &[(String, Change)]) -> [Vec<String>; 3] {
    let list = |of: &dyn Fn(&Change) -> bool| -> Vec<String> {
        let named = all.iter().filter(|(_, change)| of(change));
        named
            .map(|(name, change)| format!("{name} ({change})"))
            .collect()
    };
    [
        list(&Change::gains),
        list(&Change::loses),
        list(&|change| !change.is_clear()),
    ]
}

/// What "no change" is measured by.
pub(crate) fn beyond(all: &[(String, Change)]) -> &'static str {
    match all.iter().any(|(_, change)| change.spread.is_some()) {
        true => " beyond the spread",
        false => "",
    }
}

/// Where learning cost accuracy on new classes, where it gained and where neither is clear.
fn lost(label: &str, verdicts: &[(String, Change)]) -> String {
    let [gains, losses, unclear] = sorted_out(verdicts);
    let beyond = beyond(verdicts);
    let mut text = match losses.is_empty() {
        true => format!("{label} loses nothing on new classes{beyond}"),
        false => format!("{label} loses on the new classes of {}", losses.join(", ")),
    };
    if !gains.is_empty() {
        text.push_str(&format!("; it gains on {}", gains.join(", ")));
    }
    if !unclear.is_empty() {
        text.push_str(&format!("; no change{beyond} on {}", unclear.join(", ")));
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
        let change = |name: &str, points, spread| (name.to_owned(), Change { points, spread });
        let all = [
            change("a", -5.0, Some(1.0)),
            change("b", -1.0, Some(2.0)),
            change("c", 6.0, Some(2.0)),
        ];
        assert_eq!(
            lost("CoOp", &all),
            "CoOp loses on the new classes of a (−5.0); it gains on c (+6.0); no change beyond the spread on b (−1.0). (Points against zero-shot.)"
        );
        assert!(
            lost("CoOp", &all[1..])
                .starts_with("CoOp loses nothing on new classes beyond the spread; it gains on c")
        );
        // One seed has no spread to speak of.
        let one = [change("a", -0.01, None), change("b", 0.5, None)];
        assert_eq!(
            lost("CoOp", &one),
            "CoOp loses nothing on new classes; it gains on b (+0.5); no change on a (−0.0). (Points against zero-shot.)"
        );
    }
}
