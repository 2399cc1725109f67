//! What a comparison leaves behind: one JSON file a day and machine, rows replaced by name.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use anyhow::{Context, Result, bail};
use cliptune_core::files;
use serde::{Deserialize, Serialize};

use super::process;
use super::rows::{Contender, Row};
use super::summary::{Spread, date};
use super::table;

const FORMAT: &str = "cliptune bench 1";

/// Where it was measured.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Machine {
    /// As the processor calls itself.
    pub(super) cpu: String,
    pub(super) cores: usize,
    pub(super) memory_bytes: u64,
    pub(super) system: String,
}

impl Machine {
    pub(super) fn here() -> Result<Self> {
        let info = std::fs::read_to_string("/proc/cpuinfo").context("/proc/cpuinfo")?;
        Ok(Self {
            cpu: model(&info).unwrap_or(std::env::consts::ARCH).to_owned(),
            cores: std::thread::available_parallelism().map_or(1, usize::from),
            memory_bytes: process::total()?,
            system: format!("{} {}", std::env::consts::OS, std::env::consts::ARCH),
        })
    }

    /// The processor's name in lower case, letters and digits with single hyphens between.
    fn slug(&self) -> String {
        let lower = self.cpu.to_lowercase();
        let words = lower.split(|c: char| !c.is_ascii_alphanumeric());
        let words: Vec<&str> = words.filter(|word| !word.is_empty()).collect();
        words.join("-")
    }
}

fn model(cpuinfo: &str) -> Option<&str> {
    let mut lines = cpuinfo.lines();
    let line = lines.find(|line| line.starts_with("model name"))?;
    Some(line.split_once(':')?.1.trim())
}

/// One contender's part of a row.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Measured {
    pub(super) contender: Contender,
    /// Names and versions of what computes.
    pub(super) versions: BTreeMap<String, String>,
    /// How many times the timed part makes the whole step.
    pub(super) scale: usize,
    /// Seconds of the timed part, in order of the rounds.
    pub(super) wall: Vec<f64>,
    /// CPU seconds of the timed part.
    pub(super) cpu: Vec<f64>,
    /// Bytes: most while loading, before the first step, most above that in the first step and in any.
    pub(super) load_peak: u64,
    pub(super) base: u64,
    pub(super) first_growth: u64,
    pub(super) growth: u64,
    /// What a step was expected to add, before it ran.
    pub(super) forecast: Option<u64>,
    /// Largest difference from the reference over its largest magnitude, by tensor; empty for the reference.
    pub(super) errors: BTreeMap<String, f64>,
}

impl Measured {
    pub(super) fn new(contender: Contender, scale: usize) -> Self {
        Self {
            contender,
            versions: BTreeMap::new(),
            scale,
            wall: Vec::new(),
            cpu: Vec::new(),
            load_peak: 0,
            base: 0,
            first_growth: 0,
            growth: 0,
            forecast: None,
            errors: BTreeMap::new(),
        }
    }

    /// Seconds of the whole step.
    pub(super) fn wall(&self) -> Option<Spread> {
        Some(Spread::of(&self.wall)?.map(|x| x * self.scale as f64))
    }

    /// CPU seconds of the whole step.
    pub(super) fn cpu(&self) -> Option<Spread> {
        Some(Spread::of(&self.cpu)?.map(|x| x * self.scale as f64))
    }

    /// Most memory of the process, loading included.
    pub(super) fn peak(&self) -> u64 {
        self.load_peak.max(self.base + self.growth)
    }

    /// What the step would take in one graph, if only a part of it was run at a time.
    pub(super) fn one_graph(&self) -> Option<u64> {
        (self.scale > 1).then(|| self.base + self.scale as u64 * self.first_growth)
    }

    /// The tensor that differs most.
    pub(super) fn worst(&self) -> Option<(&str, f64)> {
        let by_error = |a: &(&str, f64), b: &(&str, f64)| a.1.total_cmp(&b.1);
        let all = self
            .errors
            .iter()
            .map(|(name, error)| (name.as_str(), *error));
        all.max_by(by_error)
    }
}

/// A row that was run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct RowRecord {
    pub(super) row: String,
    pub(super) title: String,
    pub(super) note: String,
    /// The call that made it.
    pub(super) command: String,
    /// The commit that was checked out.
    pub(super) revision: Option<String>,
    /// Threads of each contender.
    pub(super) threads: usize,
    /// Whom the others' results are compared with.
    pub(super) reference: Contender,
    pub(super) contenders: Vec<Measured>,
    /// Numbers of threads with which our results and gradients had the same bits; for each of our contenders.
    pub(super) same_bits: BTreeMap<String, Vec<usize>>,
    /// Peers that could not take part, and why.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(super) left_out: Vec<String>,
    /// Why the row does not count; empty if it does.
    pub(super) failures: Vec<String>,
}

impl RowRecord {
    pub(super) fn of(&self, contender: Contender) -> Option<&Measured> {
        self.contenders.iter().find(|m| m.contender == contender)
    }
}

/// All rows of a day and machine.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Results {
    format: String,
    pub(super) date: String,
    pub(super) machine: Machine,
    pub(super) rows: Vec<RowRecord>,
}

impl Results {
    /// Today's results, with the rows that are there already.
    pub(super) fn open(folder: &Path) -> Result<Self> {
        let machine = Machine::here()?;
        let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?;
        let results = Self {
            format: FORMAT.to_owned(),
            date: date(since.as_secs() / 86_400),
            machine,
            rows: Vec::new(),
        };
        let path = results.path(folder, "json");
        if !path.exists() {
            return Ok(results);
        }
        let named = || path.display().to_string();
        let text = std::fs::read_to_string(&path).with_context(named)?;
        let there: Self = serde_json::from_str(&text).with_context(named)?;
        if (&there.format, &there.machine) != (&results.format, &results.machine) {
            bail!(
                "{}: of another machine or format; --out names another folder",
                path.display()
            );
        }
        Ok(there)
    }

    /// Replaces a row, in the order of the list of rows.
    pub(super) fn add(&mut self, row: RowRecord) {
        self.rows.retain(|other| other.row != row.row);
        self.rows.push(row);
        let all = Row::all();
        let place = |row: &RowRecord| all.iter().position(|known| known.name == row.row);
        self.rows.sort_by_key(place);
    }

    fn path(&self, folder: &Path, extension: &str) -> PathBuf {
        folder.join(format!("{}-{}.{extension}", self.date, self.machine.slug()))
    }

    /// Writes the JSON and a page for readers; returns the page's path.
    pub(super) fn write(&self, folder: &Path) -> Result<PathBuf> {
        std::fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
        let json = serde_json::to_string_pretty(self)?;
        files::write_atomically(&self.path(folder, "json"), |w| {
            w.write_all(json.as_bytes())?;
            w.write_all(b"\n")
        })?;
        let page = self.path(folder, "md");
        let text = table::page(self);
        files::write_atomically(&page, |w| w.write_all(text.as_bytes()))?;
        Ok(page)
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A row of made-up numbers.
    pub(in super::super) fn row(name: &str) -> RowRecord {
        let measured = |contender, scale, wall: [f64; 3], growth| Measured {
            wall: wall.to_vec(),
            cpu: wall.map(|x| 2.0 * x).to_vec(),
            load_peak: 900_000_000,
            base: 500_000_000,
            first_growth: growth,
            growth: growth + 100_000_000,
            ..Measured::new(contender, scale)
        };
        let mut ours = measured(Contender::Ours, 1, [1.0, 1.1, 0.9], 100_000_000);
        ours.forecast = Some(180_000_000);
        ours.errors = [("logits".to_owned(), 1e-6), ("grad.ctx".to_owned(), 4e-6)].into();
        let theirs = measured(Contender::Authors, 10, [2.0, 2.2, 2.7], 4_000_000_000);
        RowRecord {
            row: name.to_owned(),
            title: format!("title of {name}"),
            note: "a note".to_owned(),
            command: format!("cargo xtask bench --row {name}"),
            revision: None,
            threads: 2,
            reference: Contender::Authors,
            contenders: vec![theirs, ours],
            same_bits: [("ours".to_owned(), vec![1, 2, 4])].into(),
            left_out: Vec::new(),
            failures: Vec::new(),
        }
    }

    #[test]
    fn sizes_and_errors() {
        let row = row("coop-1000");
        let theirs = row.of(Contender::Authors).unwrap();
        assert_eq!(theirs.wall().unwrap().median, 22.0);
        assert_eq!(theirs.peak(), 4_600_000_000);
        assert_eq!(theirs.one_graph(), Some(40_500_000_000));
        let ours = row.of(Contender::Ours).unwrap();
        assert_eq!(ours.peak(), 900_000_000);
        assert_eq!(ours.one_graph(), None);
        assert_eq!(ours.worst(), Some(("grad.ctx", 4e-6)));
    }

    #[test]
    fn rows_of_the_same_day_are_merged() -> Result<()> {
        let dir = tempfile::tempdir()?;
        let mut first = Results::open(dir.path())?;
        first.add(row("cocoop"));
        first.write(dir.path())?;
        let mut second = Results::open(dir.path())?;
        assert_eq!(second, first);
        second.add(row("coop-100"));
        let mut again = row("cocoop");
        again.threads = 1;
        second.add(again);
        let named: Vec<_> = second
            .rows
            .iter()
            .map(|r| (r.row.as_str(), r.threads))
            .collect();
        assert_eq!(named, [("coop-100", 2), ("cocoop", 1)]);
        second.write(dir.path())?;
        assert_eq!(Results::open(dir.path())?, second);
        assert_eq!(std::fs::read_dir(dir.path())?.count(), 2);
        Ok(())
    }

    #[test]
    fn the_processor_names_the_file() {
        let info = "processor\t: 0\nmodel name\t: Intel(R) Xeon(R) @ 2.20GHz\n";
        let machine = Machine {
            cpu: model(info).unwrap().to_owned(),
            cores: 2,
            memory_bytes: 1,
            system: String::new(),
        };
        assert_eq!(machine.slug(), "intel-r-xeon-r-2-20ghz");
    }
}
