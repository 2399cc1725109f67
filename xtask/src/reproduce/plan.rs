//! Which runs a call consists of.

use anyhow::{Result, bail};
use cliptune::ImageNeeds;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::builtin;
use super::contestants::{Contestant, Drawn, unknown};
use super::record::{Protocol, RunKey};
use super::tasks::{Source, Task};

/// What the arguments ask for; empty lists stand for the default.
#[derive(Clone, Debug)]
pub(crate) struct Wish {
    pub(crate) contestants: Vec<Contestant>,
    pub(crate) protocols: Vec<Protocol>,
    pub(crate) tasks: Vec<String>,
    pub(crate) shots: Vec<usize>,
    pub(crate) seeds: Vec<u64>,
}

/// A run to be made.
#[derive(Clone, Debug)]
pub(crate) struct Planned {
    pub(crate) key: RunKey,
    pub(crate) contestant: Contestant,
    pub(crate) task: Task,
    pub(crate) config: Value,
    /// Slugs of further tasks whose test pictures are measured on.
    pub(crate) also_on: Vec<String>,
    /// What is learned before, if anything is.
    pub(crate) before: Option<Before>,
}

/// Tasks that are learned together before a run's own.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Before {
    /// Their slugs.
    pub(crate) tasks: Vec<String>,
    /// The settings for that.
    pub(crate) config: Value,
}

impl Planned {
    /// What the method reads of an image.
    pub(crate) fn needs(&self) -> ImageNeeds {
        self.contestant.entry.needs
    }

    /// How long it takes, in no particular unit: for the progress bar.
    pub(crate) fn weight(&self) -> u64 {
        // Starting, reading weights and measuring cost about as much as a few hundred class prompts.
        const START: usize = 600;
        let number = |key: &str| {
            self.config
                .pointer(key)
                .and_then(Value::as_u64)
                .unwrap_or(0) as usize
        };
        let per_class = match self.config.get("class_specific").and_then(Value::as_bool) {
            Some(true) => 4,
            _ => 1,
        };
        let n_cls = match self.key.protocol {
            Protocol::BaseToNew => self.task.n_cls.div_ceil(2),
            _ => self.task.n_cls,
        };
        let steps = (self.key.shots * n_cls / number("/train/batch_size").max(1)).max(1);
        (START + number("/train/epochs") * steps * (n_cls * per_class + 8)) as u64
    }
}

/// All runs that `wish` asks for, cheap protocols and few shots first.
///
/// # Errors
/// Unknown names, numbers that make no sense, nothing to do.
pub(crate) fn plan(wish: &Wish, source: &Source) -> Result<Vec<Planned>> {
    let known = source.tasks()?;
    for name in &wish.tasks {
        if !known.iter().any(|task| task.slug == *name) {
            let slugs = known.iter().map(|task| task.slug.as_str());
            bail!("--tasks {name}: {}", unknown("task", name, slugs));
        }
    }
    check_numbers(wish, &known)?;
    let mut runs = Vec::new();
    for protocol in Protocol::ALL {
        if wish.protocols.is_empty() || wish.protocols.contains(&protocol) {
            let before = runs.len();
            let of_protocol = Part {
                wish,
                source,
                known: &known,
                protocol,
            };
            of_protocol.plan(&mut runs)?;
            if runs.len() == before && wish.protocols.contains(&protocol) {
                bail!(
                    "--protocols {}: {}",
                    protocol.slug(),
                    of_protocol.why_nothing()
                );
            }
        }
    }
    if runs.is_empty() {
        bail!("there is nothing to run");
    }
    Ok(runs)
}

fn check_numbers(wish: &Wish, known: &[Task]) -> Result<()> {
    if wish.shots.contains(&0) {
        bail!("--shots 0: expected at least one training picture a class");
    }
    let most = known.iter().filter_map(|task| task.most_shots).min();
    if let (Some(most), Some(&largest)) = (most, wish.shots.iter().max())
        && largest > most
    {
        bail!("--shots {largest}: the built-in tasks have {most} training pictures a class");
    }
    if wish.shots.is_empty() || wish.seeds.is_empty() {
        bail!("--shots and --seeds need at least one number each");
    }
    Ok(())
}

/// The runs of one protocol.
struct Part<'a> {
    wish: &'a Wish,
    source: &'a Source,
    known: &'a [Task],
    protocol: Protocol,
}

impl Part<'_> {
    fn plan(&self, runs: &mut Vec<Planned>) -> Result<()> {
        let largest = self.wish.shots.iter().max().copied().unwrap_or(1);
        let shots = match self.protocol {
            Protocol::FewShot => {
                let mut shots = self.wish.shots.clone();
                shots.sort_unstable();
                shots.dedup();
                shots
            }
            Protocol::Supervised => vec![builtin::POOL],
            _ => vec![largest],
        };
        for task in self.known {
            for contestant in &self.wish.contestants {
                if !self.takes(task, contestant) {
                    continue;
                }
                match contestant.is_fixed() {
                    true => runs.push(self.run(task, contestant, 0, 1)?),
                    false => {
                        for &shots in &shots {
                            for &seed in &self.wish.seeds {
                                runs.push(self.run(task, contestant, shots, seed)?);
                            }
                        }
                    }
                }
            }
        }
        Ok(())
    }

    /// Whether `contestant` is run on `task`.
    fn takes(&self, task: &Task, contestant: &Contestant) -> bool {
        let builtin = matches!(self.source, Source::BuiltIn { .. });
        let wanted = |default: &[&str]| match self.wish.tasks.as_slice() {
            [] => !builtin || default.contains(&task.slug.as_str()),
            tasks => tasks.contains(&task.slug),
        };
        match self.protocol {
            // Zero-shot costs next to nothing, so it shows what CLIP knows of every task.
            Protocol::FewShot if self.wish.tasks.is_empty() && contestant.is_fixed() => true,
            Protocol::FewShot => wanted(builtin::FEW_SHOT),
            Protocol::BaseToNew => {
                task.n_cls >= 4 && contestant.serves_new_classes && wanted(builtin::BASE_TO_NEW)
            }
            Protocol::CrossDataset => {
                builtin
                    && task.slug == builtin::CROSS_FROM
                    && contestant.serves_new_classes
                    && wanted(&[builtin::CROSS_FROM])
            }
            Protocol::DomainShift => {
                builtin && task.slug == builtin::SHIFT_FROM && wanted(&[builtin::SHIFT_FROM])
            }
            Protocol::MultiTask => {
                builtin && contestant.is_multi_task() && wanted(builtin::MULTI_TASK_TO)
            }
            Protocol::Supervised => {
                // What learns nothing is there to compare with.
                let mut all = self.wish.contestants.iter();
                let takes_part = contestant.is_supervised()
                    || contestant.is_fixed() && all.any(Contestant::is_supervised);
                builtin && takes_part && wanted(builtin::SUPERVISED)
            }
        }
    }

    fn why_nothing(&self) -> String {
        match self.protocol {
            Protocol::FewShot => "there is no task".to_owned(),
            Protocol::BaseToNew => {
                "needs a task of at least 4 classes and a method that serves new classes".to_owned()
            }
            _ if matches!(self.source, Source::DataSet { .. }) => {
                "is there for the built-in tasks only".to_owned()
            }
            Protocol::MultiTask => "needs a method that learns many tasks as one: mvlpt".to_owned(),
            Protocol::Supervised => {
                "needs a method that is trained on whole training sets: vp".to_owned()
            }
            Protocol::CrossDataset => starts_from(builtin::CROSS_FROM),
            Protocol::DomainShift => starts_from(builtin::SHIFT_FROM),
        }
    }

    fn run(
        &self,
        task: &Task,
        contestant: &Contestant,
        shots: usize,
        seed: u64,
    ) -> Result<Planned> {
        let n_cls = match self.protocol {
            Protocol::BaseToNew => task.n_cls.div_ceil(2),
            _ => task.n_cls,
        };
        let builtin = matches!(self.source, Source::BuiltIn { .. });
        let drawn = builtin.then_some(Drawn { shots, n_cls });
        Ok(Planned {
            key: RunKey {
                protocol: self.protocol,
                task: task.slug.clone(),
                contestant: contestant.slug.clone(),
                shots,
                seed,
            },
            config: contestant.config(&task.template, drawn)?,
            before: match self.protocol {
                Protocol::MultiTask => Some(self.before(task, contestant, shots)?),
                _ => None,
            },
            contestant: contestant.clone(),
            task: task.clone(),
            also_on: match self.protocol {
                Protocol::CrossDataset => {
                    builtin::CROSS_TO.iter().map(ToString::to_string).collect()
                }
                Protocol::DomainShift => builtin::shifted(&task.slug),
                _ => Vec::new(),
            },
        })
    }
}

impl Part<'_> {
    /// The other tasks, and the settings to learn them with.
    fn before(&self, task: &Task, contestant: &Contestant, shots: usize) -> Result<Before> {
        let others = |known: &&Task| {
            known.slug != task.slug && builtin::MULTI_TASK_FROM.contains(&known.slug.as_str())
        };
        let others: Vec<&Task> = self.known.iter().filter(others).collect();
        let n_cls = others.iter().map(|task| task.n_cls).sum();
        Ok(Before {
            tasks: others.iter().map(|task| task.slug.clone()).collect(),
            config: contestant.config(&task.template, Some(Drawn { shots, n_cls }))?,
        })
    }
}

fn starts_from(task: &str) -> String {
    format!("starts from the task `{task}`; add it to --tasks")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reproduce::contestants::choose;

    fn wish(tasks: &[&str], protocols: &[Protocol]) -> Result<Wish> {
        Ok(Wish {
            contestants: choose(&["zeroshot".into(), "coop".into()], &[])?,
            protocols: protocols.to_vec(),
            tasks: tasks.iter().map(|task| (*task).to_owned()).collect(),
            shots: vec![16, 1],
            seeds: vec![1, 2, 3],
        })
    }

    fn source() -> Source {
        Source::BuiltIn {
            pictures: String::new(),
        }
    }

    #[test]
    fn zero_shot_runs_once_on_every_task_and_the_rest_on_those_with_something_to_learn()
    -> Result<()> {
        let runs = plan(&wish(&[], &[])?, &source())?;
        let of = |protocol, fixed| {
            let of = |run: &&Planned| {
                run.key.protocol == protocol && (run.key.contestant == "zeroshot") == fixed
            };
            runs.iter().filter(of).count()
        };
        assert_eq!(of(Protocol::FewShot, true), builtin::tasks().len());
        // Two contestants, two numbers of shots, three seeds.
        assert_eq!(of(Protocol::FewShot, false), builtin::FEW_SHOT.len() * 12);
        // Class-specific contexts serve no new classes.
        assert_eq!(of(Protocol::BaseToNew, true), builtin::BASE_TO_NEW.len());
        assert_eq!(
            of(Protocol::BaseToNew, false),
            builtin::BASE_TO_NEW.len() * 3
        );
        assert_eq!(
            (
                of(Protocol::DomainShift, true),
                of(Protocol::DomainShift, false)
            ),
            (1, 6)
        );
        // Neither do they name the classes of another task.
        assert_eq!(
            (
                of(Protocol::CrossDataset, true),
                of(Protocol::CrossDataset, false)
            ),
            (1, 3)
        );
        for protocol in [Protocol::CrossDataset, Protocol::DomainShift] {
            let first = runs.iter().find(|run| run.key.protocol == protocol);
            assert!(first.is_some_and(|run| run.also_on.len() > 1));
        }
        // CoOp is not a method that its authors train on whole training sets.
        assert_eq!(of(Protocol::Supervised, true), 0);
        let mut wish = wish(&[], &[Protocol::Supervised])?;
        wish.contestants = choose(&["zeroshot".into(), "vp".into()], &[])?;
        assert_eq!(plan(&wish, &source())?.len(), 1 + 3);
        let mut folders: Vec<_> = runs.iter().map(|run| run.key.folder()).collect();
        folders.sort();
        folders.dedup();
        assert_eq!(folders.len(), runs.len());
        Ok(())
    }

    #[test]
    fn every_default_task_exists() {
        let known: Vec<String> = builtin::tasks().into_iter().map(|task| task.slug).collect();
        let defaults = [
            builtin::FEW_SHOT,
            builtin::BASE_TO_NEW,
            &[builtin::CROSS_FROM, builtin::SHIFT_FROM],
            builtin::CROSS_TO,
            builtin::MULTI_TASK_FROM,
            builtin::MULTI_TASK_TO,
            builtin::SUPERVISED,
        ]
        .concat();
        for task in defaults {
            assert!(known.iter().any(|slug| slug == task), "{task}");
        }
    }

    #[test]
    fn many_tasks_come_before_the_one_that_is_measured() -> Result<()> {
        let mut wish = wish(&[], &[Protocol::MultiTask])?;
        let refused = plan(&wish, &source()).unwrap_err().to_string();
        assert!(refused.contains("mvlpt"), "{refused}");
        wish.contestants = choose(&["mvlpt".into()], &[])?;
        let runs = plan(&wish, &source())?;
        assert_eq!(runs.len(), builtin::MULTI_TASK_TO.len() * 3);
        for run in runs {
            let tasks = run.before.map(|before| before.tasks).unwrap_or_default();
            assert_eq!(tasks, builtin::MULTI_TASK_FROM);
        }
        Ok(())
    }

    #[test]
    fn domain_shift_needs_its_task() -> Result<()> {
        let message = |tasks: &[&str]| -> Result<String> {
            let wish = wish(tasks, &[Protocol::DomainShift])?;
            Ok(plan(&wish, &source())
                .map(|runs| runs.len())
                .unwrap_err()
                .to_string())
        };
        assert!(message(&["texture"])?.contains("add it to --tasks"));
        assert!(plan(&wish(&["shape"], &[Protocol::DomainShift])?, &source()).is_ok());
        Ok(())
    }
}
