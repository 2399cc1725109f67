//! Running a row: first what everybody computes is compared, then the steps are timed, contender after contender.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use candle_core::{DType, Tensor};

use super::inputs::{self, Named};
use super::process::{self, Killed, Launch, Process};
use super::record::{Measured, RowRecord};
use super::rows::{Contender, Row};
use super::summary::rounds;
use super::worker::{Job, Request};
use crate::out;

/// Largest difference over largest magnitude above which a row does not count.
const TOLERANCE: f64 = 1e-4;
/// Threads with which our results must have the same bits.
const THREADS: [usize; 3] = [1, 2, 4];
/// Steps that take longer are not warmed up again when their process had to make room for another.
const LONG: f64 = 30.0;

/// What holds for every row of a call.
pub(super) struct Setup {
    pub(super) launch: Launch,
    /// Weights, inputs and outputs are there.
    pub(super) folder: PathBuf,
    pub(super) tiny: bool,
    /// Instead of as many as are enough.
    pub(super) rounds: Option<usize>,
    pub(super) threads: usize,
    pub(super) command: String,
    pub(super) revision: Option<String>,
}

/// A contender of the row in hand.
struct Player {
    job: Job,
    measured: Measured,
    process: Option<Process>,
    warmed_up: bool,
    /// Memory that its process came to need.
    peak: u64,
    /// Seconds of its timed part, roughly.
    seconds: f64,
}

impl Setup {
    /// Runs a row.
    pub(super) fn measure(&self, row: &Row, contenders: &[Contender]) -> Result<RowRecord> {
        let weights = inputs::weights(&self.folder, row, self.tiny)?;
        let inputs = inputs::inputs(&self.folder, row, self.tiny)?;
        let player = |&contender: &Contender| Player {
            job: Job {
                contender,
                task: row.task.clone(),
                weights: weights.clone(),
                inputs: inputs.clone(),
                threads: self.threads,
            },
            measured: Measured::new(contender, row.scale(contender)),
            process: None,
            warmed_up: false,
            peak: 0,
            seconds: 0.0,
        };
        let mut players: Vec<Player> = contenders.iter().map(player).collect();
        let whole = contenders
            .iter()
            .find(|contender| row.checks_whole(**contender));
        let reference = *whole.context("nobody takes part")?;
        let mut record = RowRecord {
            row: row.name.to_owned(),
            title: row.title.to_owned(),
            note: row.note.to_owned(),
            command: self.command.clone(),
            revision: self.revision.clone(),
            threads: self.threads,
            reference,
            contenders: Vec::new(),
            same_bits: BTreeMap::new(),
            left_out: Vec::new(),
            failures: Vec::new(),
        };
        self.check(row, &mut players, &mut record)?;
        let torch = players.iter().filter(|p| p.job.contender.is_torch());
        let slowest = torch.map(|player| player.seconds).fold(0.0, f64::max);
        let n = self.rounds.unwrap_or_else(|| rounds(slowest));
        for round in 0..n {
            let mut took = Vec::new();
            for i in 0..players.len() {
                make_room(&mut players, i)?;
                let wall = players[i].turn(&self.launch, round)?;
                took.push(format!("{} {wall:.2} s", players[i].job.contender.title()));
            }
            say(
                row,
                &format!("round {} of {n}: {}", round + 1, took.join(", ")),
            );
        }
        record.contenders = players.into_iter().map(|player| player.measured).collect();
        Ok(record)
    }

    /// Lets each contender compute the whole step alone in a process, ours with other numbers of threads too, and compares
    /// results and gradients. A peer that has not enough memory takes no part.
    fn check(&self, row: &Row, players: &mut Vec<Player>, record: &mut RowRecord) -> Result<()> {
        let mut outputs = BTreeMap::new();
        let reference = record.reference;
        let may_be_left_out = |c: Contender| !c.is_ours() && c != reference;
        for player in players.iter_mut() {
            let contender = player.job.contender;
            let path = self.output(row, contender, self.threads);
            let mut process = Process::start(&self.launch, &player.job)?;
            let sample = match process.ask(&Request::Check(path.clone())) {
                Err(e) if e.is::<Killed>() && may_be_left_out(contender) => {
                    say(row, &e.to_string());
                    record.left_out.push(e.to_string());
                    continue;
                }
                other => other?,
            };
            player.peak = process.peak()?;
            player.seconds = sample.wall / player.measured.scale as f64;
            player.measured.forecast = process.forecast;
            player.measured.versions = process.versions.clone();
            drop(process);
            say(
                row,
                &format!("check: {} {:.2} s", contender.title(), sample.wall),
            );
            outputs.insert(contender, inputs::read(&path)?);
            if contender.is_ours() {
                let same = self.same_bits(row, &player.job, &path)?;
                if same.len() < THREADS.len() {
                    record.failures.push(format!(
                        "{}: other bits with other numbers of threads; as with {}: {same:?}",
                        contender.title(),
                        self.threads
                    ));
                }
                record.same_bits.insert(contender.slug().to_owned(), same);
            }
        }
        players.retain(|player| outputs.contains_key(&player.job.contender));
        let expected = &outputs[&record.reference];
        for player in players {
            let contender = player.job.contender;
            if contender == record.reference {
                continue;
            }
            let whole = row.checks_whole(contender);
            let errors = errors(&outputs[&contender], expected, whole)?;
            for (name, error) in errors.iter().filter(|(_, error)| **error > TOLERANCE) {
                record.failures.push(format!(
                    "{}: {name} differs by {error:.1e}, more than {TOLERANCE:.0e}",
                    contender.title()
                ));
            }
            player.measured.errors = errors;
            let (name, error) = player.measured.worst().context("nothing was compared")?;
            let title = contender.title();
            say(row, &format!("{title} differs by {error:.1e} ({name})"));
        }
        Ok(())
    }

    /// The numbers of threads with which the output has the bytes of `path`.
    fn same_bits(&self, row: &Row, job: &Job, path: &Path) -> Result<Vec<usize>> {
        let expected = std::fs::read(path).with_context(|| path.display().to_string())?;
        let mut same = Vec::new();
        for threads in THREADS {
            let path = self.output(row, job.contender, threads);
            if threads != self.threads {
                let job = Job {
                    threads,
                    ..job.clone()
                };
                Process::start(&self.launch, &job)?.ask(&Request::Check(path.clone()))?;
            }
            let found = std::fs::read(&path).with_context(|| path.display().to_string())?;
            if found == expected {
                same.push(threads);
            }
        }
        Ok(same)
    }

    fn output(&self, row: &Row, contender: Contender, threads: usize) -> PathBuf {
        let name = format!("{}-{}-{threads}.safetensors", row.name, contender.slug());
        self.folder.join("outputs").join(name)
    }
}

impl Player {
    /// One timed step, in a process that has run before.
    fn turn(&mut self, launch: &Launch, round: usize) -> Result<f64> {
        let measured = &mut self.measured;
        let process = match &mut self.process {
            Some(process) => process,
            none => {
                let process = none.insert(Process::start(launch, &self.job)?);
                measured.load_peak = measured.load_peak.max(process.load_peak);
                measured.base = process.base;
                if !self.warmed_up || self.seconds < LONG {
                    process.ask(&Request::Step(round))?;
                    if !self.warmed_up {
                        measured.first_growth = process.peak()?.saturating_sub(process.base);
                    }
                }
                self.warmed_up = true;
                process
            }
        };
        let sample = process.ask(&Request::Step(round))?;
        self.peak = self.peak.max(process.peak()?);
        let growth = process.peak()?.saturating_sub(process.base);
        measured.growth = measured.growth.max(growth);
        measured.wall.push(sample.wall);
        measured.cpu.push(sample.cpu);
        self.seconds = sample.wall;
        Ok(sample.wall)
    }
}

/// Ends the largest of the other processes until the next step fits into memory.
fn make_room(players: &mut [Player], next: usize) -> Result<()> {
    loop {
        let held = match &players[next].process {
            Some(process) => process.resident()?,
            None => 0,
        };
        // A tenth and 300 MB to spare.
        let needed = players[next].peak.saturating_sub(held) / 10 * 11 + 300_000_000;
        if process::available()? >= needed {
            return Ok(());
        }
        let mut largest = None;
        for (i, player) in players.iter().enumerate() {
            if let Some(process) = player.process.as_ref().filter(|_| i != next) {
                largest = largest.max(Some((process.resident()?, i)));
            }
        }
        match largest {
            Some((_, i)) => players[i].process = None,
            // Nobody is left who could give way: the step shows whether it fits.
            None => return Ok(()),
        }
    }
}

/// Largest difference over the largest magnitude of what is expected, by tensor.
///
/// Unless the `whole` step was computed, some tensors may be missing, and the first rows of one stand for all.
fn errors(found: &Named, expected: &Named, whole: bool) -> Result<BTreeMap<String, f64>> {
    if let Some(missing) = expected
        .keys()
        .find(|name| whole && !found.contains_key(*name))
    {
        bail!("`{missing}` was not computed");
    }
    let largest = |tensor: &Tensor| -> Result<f64> {
        // A maximum would pass over what is not a number.
        let values = tensor
            .to_dtype(DType::F64)?
            .flatten_all()?
            .to_vec1::<f64>()?;
        let larger = |a: f64, b: f64| {
            if b.is_nan() || b.abs() > a {
                b.abs()
            } else {
                a
            }
        };
        Ok(values.into_iter().fold(0.0, larger))
    };
    let mut errors = BTreeMap::new();
    for (name, found) in found {
        let expected = expected
            .get(name)
            .with_context(|| format!("the reference has no `{name}`"))?;
        if whole && found.dims() != expected.dims() {
            let (found, expected) = (found.dims(), expected.dims());
            bail!("`{name}` is of shape {found:?}, not {expected:?}");
        }
        let rows = found.dim(0)?.min(expected.dim(0)?);
        let expected = expected.narrow(0, 0, rows)?;
        let difference = largest(&(found - &expected)?)?;
        // What is not a number is as wrong as can be, and JSON has a number for it.
        let error = (difference / largest(&expected)?).min(f64::MAX);
        errors.insert(name.clone(), error);
    }
    Ok(errors)
}

fn say(row: &Row, what: &str) {
    out::error(&format!("{}: {what}", row.name));
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    fn named(name: &str, values: &[f32]) -> Result<Named> {
        let tensor = Tensor::new(values, &Device::Cpu)?.reshape(((), 2))?;
        Ok([(name.to_owned(), tensor)].into())
    }

    #[test]
    fn errors_are_relative_to_the_largest_magnitude() -> Result<()> {
        let expected = named("x", &[1.0, -4.0, 2.0, 8.0])?;
        let found = named("x", &[1.0, -4.0, 2.0, 6.0])?;
        assert_eq!(errors(&found, &expected, true)?["x"], 0.25);
        let part = named("x", &[2.0, -4.0])?;
        assert_eq!(errors(&part, &expected, false)?["x"], 0.25);
        assert!(errors(&part, &expected, true).is_err());
        assert!(errors(&Named::new(), &expected, true).is_err());
        let not_a_number = named("x", &[f32::NAN, -4.0])?;
        assert_eq!(errors(&not_a_number, &expected, false)?["x"], f64::MAX);
        let message = errors(&named("y", &[1.0, 1.0])?, &expected, false).unwrap_err();
        assert_eq!(message.to_string(), "the reference has no `y`");
        Ok(())
    }
}
