//! `cargo xtask reproduce`: every method on the built-in benchmark or on a data set, with a table and a report.

mod added;
mod builtin;
mod check;
mod contestants;
mod folder;
mod plan;
mod pool;
mod prepare;
mod progress;
mod record;
mod report;
mod summary;
mod table;
mod tasks;
mod worker;

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use cliptune::method::ClipId;
use cliptune::{Clip, ImageNeeds, files};

use self::contestants::{Setting, choose, unknown};
use self::folder::{Folder, Purpose, REPORT};
use self::plan::{Planned, Wish, plan};
use self::pool::{Failure, Pool};
use self::progress::Show;
use self::record::{Protocol, Revision, count};
use self::summary::Results;
use self::tasks::Source;
use self::worker::Job;
use crate::out;

/// The repository: the folder above this package.
pub(crate) fn root() -> &'static Path {
    let package = Path::new(env!("CARGO_MANIFEST_DIR"));
    package.parent().unwrap_or(package)
}

/// Arguments of `cargo xtask reproduce`.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Args {
    /// Methods, as `cliptune list` prints them [default: all]
    #[arg(long, value_delimiter = ',', value_name = "A,B")]
    methods: Vec<String>,
    /// few-shot, base-to-new, cross-dataset, domain-shift, multi-task, supervised [default: all that
    /// the data allow]
    #[arg(long, value_delimiter = ',', value_name = "A,B")]
    protocols: Vec<String>,
    /// Tasks of the built-in benchmark [default: those with something to learn; zero-shot on all]
    #[arg(long, value_delimiter = ',', value_name = "A,B")]
    tasks: Vec<String>,
    /// Training pictures a class; all protocols but few-shot take the largest, supervised takes what there is
    #[arg(
        long,
        value_delimiter = ',',
        value_name = "N,N",
        default_value = "1,2,4,8,16"
    )]
    shots: Vec<usize>,
    /// Seeds of pictures drawn, initial values and order
    #[arg(
        long,
        value_delimiter = ',',
        value_name = "N,N",
        default_value = "1,2,3"
    )]
    seeds: Vec<u64>,
    /// CLIP weights [default: the built-in CLIP]
    #[arg(long, value_name = "WEIGHTS")]
    clip: Option<PathBuf>,
    /// A data set in place of the built-in tasks: a folder, a CSV or a split file
    #[arg(long, value_name = "ROOT")]
    data: Option<PathBuf>,
    /// A setting of the methods, as `cliptune describe METHOD` prints them; may be repeated
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// Folder for results and report [default: target/reproduce]
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Runs side by side [default: one for each core]
    #[arg(long, value_name = "N")]
    jobs: Option<usize>,
    /// Throw away what an earlier call left there
    #[arg(long)]
    fresh: bool,
    /// List the runs and what has become of them; do nothing
    #[arg(long, conflicts_with_all = ["fresh", "report_only"])]
    dry_run: bool,
    /// Make table and report from the results that are there
    #[arg(long, conflicts_with = "fresh")]
    report_only: bool,
    /// Afterwards make sure that results and report are there and sane, and that learning helped on every few-shot task
    #[arg(long)]
    check: bool,
    /// Make the run that standard input describes
    #[arg(long, hide = true)]
    worker: bool,
}

pub(crate) fn main(args: &Args) -> Result<ExitCode> {
    if args.worker {
        return worker::main();
    }
    let cancel = Arc::new(AtomicBool::new(false));
    let stop = cancel.clone();
    // Without a handler an interrupt ends this process at once, and the runs with it.
    let _ = ctrlc::set_handler(move || {
        if stop.swap(true, Ordering::Relaxed) {
            std::process::exit(130);
        }
    });
    let program = std::env::current_exe().context("the path of this program")?;
    args.reproduce(&program, &["reproduce".into(), "--worker".into()], &cancel)
}

impl Args {
    fn out(&self) -> PathBuf {
        self.out
            .clone()
            .unwrap_or_else(|| root().join("target/reproduce"))
    }

    fn clip(&self) -> PathBuf {
        self.clip
            .clone()
            .unwrap_or_else(|| root().join("fixtures/clip"))
    }

    /// The whole call; runs are made by `program` with `arguments`.
    fn reproduce(
        &self,
        program: &Path,
        arguments: &[String],
        cancel: &AtomicBool,
    ) -> Result<ExitCode> {
        let started = Instant::now();
        if self.jobs == Some(0) {
            bail!("--jobs 0: expected at least one run at a time");
        }
        let source = Source::new(self.data.as_deref())?;
        let planned = plan(&self.wish()?, &source)?;
        if self.report_only {
            return self.conclude(&planned, Vec::new());
        }
        let clip = Clip::load(self.clip()).context("the CLIP weights cannot be used")?;
        clip.text()
            .tokenizer()
            .with_context(|| self.clip().display().to_string())?;
        let purpose = Purpose::new(ClipId::of(&clip), source.clone(), self.set.clone());
        if self.dry_run {
            return self.list(&planned, &purpose);
        }
        let folder = Folder::open(&self.out(), &purpose, self.fresh)?;
        let (missing, notes) = folder.missing(&planned)?;
        notes.iter().for_each(|note| out::error(note));
        let mut failures = Vec::new();
        if missing.is_empty() {
            out::error(&format!("all {} runs are there already", planned.len()));
        } else {
            out::error(&format!(
                "{} to make, {} there already, on {}",
                count(missing.len(), "run"),
                planned.len() - missing.len(),
                clip.arch().name()
            ));
            let jobs = self.jobs(&missing, &clip, &source)?;
            let cores = std::thread::available_parallelism().map_or(1, usize::from);
            let side_by_side = self.jobs.unwrap_or(cores);
            let pool = Pool {
                program: program.to_owned(),
                arguments: arguments.to_owned(),
                jobs: side_by_side,
                threads: (cores / side_by_side).max(1),
                cancel,
            };
            failures = make(&pool, &clip, folder.path(), jobs)?;
            out::error(&format!(
                "runs took {:.0} s",
                started.elapsed().as_secs_f64()
            ));
        }
        self.conclude(&planned, failures)
    }

    fn wish(&self) -> Result<Wish> {
        let settings = self
            .set
            .iter()
            .map(|set| Setting::parse(set))
            .collect::<Result<Vec<_>>>()?;
        let protocol = |name: &String| -> Result<Protocol> {
            let found = Protocol::ALL
                .into_iter()
                .find(|protocol| protocol.slug() == name);
            let slugs = Protocol::ALL.iter().map(|protocol| protocol.slug());
            found.with_context(|| {
                format!("--protocols {name}: {}", unknown("protocol", name, slugs))
            })
        };
        Ok(Wish {
            contestants: choose(&self.methods, &settings)?,
            protocols: self.protocols.iter().map(protocol).collect::<Result<_>>()?,
            tasks: self.tasks.clone(),
            shots: self.shots.clone(),
            seeds: self.seeds.clone(),
        })
    }

    fn list(&self, planned: &[Planned], purpose: &Purpose) -> Result<ExitCode> {
        let out = self.out();
        folder::check(&out, purpose)?;
        let mut there = 0;
        for run in planned {
            let state = match record::Record::find(&out, &run.key)? {
                record::Found::Good(_) => "there",
                record::Found::Nothing => "to make",
                record::Found::Damaged(_) => "damaged",
            };
            there += usize::from(state == "there");
            out::line(&format!("{state:<8} {}", run.key.folder().display()));
        }
        out::error(&format!(
            "{} runs, {there} of them there already",
            planned.len()
        ));
        Ok(ExitCode::SUCCESS)
    }

    /// The missing runs with what their processes must know.
    fn jobs(
        &self,
        missing: &[Planned],
        clip: &Clip,
        source: &Source,
    ) -> Result<Vec<(Planned, Job)>> {
        let path =
            |path: PathBuf| std::path::absolute(&path).with_context(|| path.display().to_string());
        let (out, weights, revision) = (path(self.out())?, path(self.clip())?, revision());
        let titles = source.tasks()?;
        let titled = |slug: &String| {
            let title = titles
                .iter()
                .find(|task| task.slug == *slug)
                .map(|task| &task.note.title);
            (slug.clone(), title.unwrap_or(slug).clone())
        };
        let job = |run: &Planned| Job {
            out: out.clone(),
            clip: weights.clone(),
            weights_hash: clip.weights_hash().to_owned(),
            source: source.clone(),
            key: run.key.clone(),
            task: run.task.note.clone(),
            label: run.contestant.label.clone(),
            method: run.contestant.entry.slug.to_owned(),
            config: run.config.clone(),
            also_on: run.also_on.iter().map(titled).collect(),
            before: run.before.clone(),
            revision: revision.clone(),
        };
        Ok(missing.iter().map(|run| (run.clone(), job(run))).collect())
    }

    /// Table, report and check of what is there now.
    fn conclude(&self, planned: &[Planned], failures: Vec<Failure>) -> Result<ExitCode> {
        let out = self.out();
        let (records, notes) = folder::results(&out)?;
        notes.iter().for_each(|note| out::error(note));
        if records.is_empty() && failures.is_empty() {
            bail!("{}: there are no results", out.display());
        }
        let results = Results::new(records);
        let path = out.join(REPORT);
        let html = report::html(&results, &out);
        files::write_atomically(&path, |w| w.write_all(html.as_bytes()))?;
        out::line(&table::text(&results));
        out::line(&format!("report    {}", path.display()));
        for failure in &failures {
            out::error(&format!(
                "failed: {}\n  {}",
                failure.key,
                failure.reason.replace('\n', "\n  ")
            ));
        }
        let mut good = failures.is_empty();
        if self.check {
            let complaints = check::complaints(planned, &results, &out);
            complaints
                .iter()
                .for_each(|complaint| out::error(&format!("check: {complaint}")));
            good &= complaints.is_empty();
        }
        Ok(if good {
            ExitCode::SUCCESS
        } else {
            ExitCode::FAILURE
        })
    }
}

fn make(
    pool: &Pool<'_>,
    clip: &Clip,
    out: &Path,
    jobs: Vec<(Planned, Job)>,
) -> Result<Vec<Failure>> {
    let mut show = Show::new();
    let needed: Vec<(Job, ImageNeeds)> = jobs
        .iter()
        .map(|(run, job)| (job.clone(), run.needs()))
        .collect();
    prepare::prepare(clip, out, &needed, &mut show)?;
    let weighed: Vec<(Job, u64)> = jobs
        .into_iter()
        .map(|(run, job)| (job, run.weight()))
        .collect();
    pool.run(&weighed, &mut show)
}

/// The commit that is checked out; none outside of a repository or without git.
pub(crate) fn revision() -> Option<Revision> {
    let git = |arguments: &[&str]| {
        let output = Command::new("git")
            .arg("-C")
            .arg(root())
            .args(arguments)
            .output()
            .ok()?;
        let text = String::from_utf8(output.stdout).ok()?;
        output.status.success().then(|| text.trim().to_owned())
    };
    let commit = git(&["rev-parse", "HEAD"])?;
    let dirty = !git(&["status", "--porcelain", "--untracked-files=no"])?.is_empty();
    Some(Revision { commit, dirty })
}
