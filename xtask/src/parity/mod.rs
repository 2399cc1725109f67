//! `cargo xtask parity`: builds each case's method from its `config`, runs it, and compares with what the authors' code gave.

mod case;
mod cavpt;
mod check;
mod clip_cases;
mod cocoop;
mod kgcoop;
mod multimodal_pt;
mod mvlpt;
mod objective;
mod plot;
mod preprocess;
mod prograd;
mod subpt;
mod text_pt;
mod tokenizer;
mod visual_pt;
mod vpt;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use serde_json::json;

use self::case::{Case, Models};
use self::check::Check;
use crate::out;

/// Arguments of `cargo xtask parity`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Folder with `clip/<model>/` and `<slug>/<case>/`.
    #[arg(long, default_value = concat!(env!("CARGO_MANIFEST_DIR"), "/../fixtures/parity"))]
    root: PathBuf,
    /// Only the cases of this method (a folder's name below the root); may be repeated.
    #[arg(long)]
    method: Vec<String>,
    /// One JSON object on standard output instead of lines; the summary goes to standard error.
    #[arg(long)]
    json: bool,
}

/// Runs one case; every comparison is recorded in `check`.
type Runner = fn(&Case, &mut Models, &mut Check) -> Result<()>;

/// The runner of a folder below the root. A new method adds its line here.
fn runner(slug: &str, name: &str) -> Option<Runner> {
    Some(match (slug, name) {
        ("clip-cases", "tokenizer") => tokenizer::run,
        ("clip-cases", "preprocess") => preprocess::run,
        ("clip-cases", _) => clip_cases::run,
        ("zeroshot", _) => text_pt::zeroshot,
        ("coop", _) => text_pt::coop,
        ("cocoop", _) => cocoop::run,
        ("kgcoop", _) => kgcoop::run,
        ("vpt", _) => vpt::run,
        ("prograd", _) => prograd::run,
        ("plot", _) => plot::run,
        ("subpt", _) => subpt::run,
        ("maple", _) => multimodal_pt::maple,
        ("ivlp", _) => multimodal_pt::ivlp,
        ("deep-vpt", _) => multimodal_pt::deep_vpt,
        ("upt", _) => multimodal_pt::upt,
        ("mvlpt", _) => mvlpt::run,
        ("vp", _) => visual_pt::vp,
        ("cavpt", _) => cavpt::run,
        _ => return None,
    })
}

pub(crate) fn main(args: &Args) -> Result<ExitCode> {
    let folders = case_folders(&args.root, &args.method)?;
    let mut models = Models::new(args.root.join("clip"));
    let mut outcomes = Vec::new();
    for (slug, path) in folders {
        let outcome = run_case(&slug, &path, &mut models);
        if !args.json {
            out::line(&outcome.line());
        }
        outcomes.push(outcome);
    }
    let failed = outcomes.iter().filter(|o| !o.passed()).count();
    let summary = format!("{} passed, {failed} failed", outcomes.len() - failed);
    if args.json {
        let cases: Vec<_> = outcomes.iter().map(Outcome::json).collect();
        let report = json!({"cases": cases, "passed": outcomes.len() - failed, "failed": failed});
        out::line(&serde_json::to_string_pretty(&report)?);
        out::error(&summary);
    } else {
        for outcome in outcomes.iter().filter(|o| !o.passed()) {
            outcome.failures().iter().for_each(|line| out::line(line));
        }
        out::line("");
        for (slug, worst) in worst_by_method(&outcomes) {
            out::line(&format!("{slug}: largest error {worst:.1e}"));
        }
        out::line(&summary);
    }
    Ok(if failed == 0 && !outcomes.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// Every `<slug>/<case>` below the root, sorted; `clip` holds no cases.
fn case_folders(root: &Path, methods: &[String]) -> Result<Vec<(String, PathBuf)>> {
    let mut slugs = subfolders(root)?;
    slugs.retain(|path| path.file_name().is_some_and(|name| name != "clip"));
    for method in methods {
        if !slugs.iter().any(|path| path.ends_with(method)) {
            bail!("{}: no folder `{method}`", root.display());
        }
    }
    let mut cases = Vec::new();
    for path in slugs {
        let slug = path
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        if methods.is_empty() || methods.contains(&slug) {
            cases.extend(
                subfolders(&path)?
                    .into_iter()
                    .map(|case| (slug.clone(), case)),
            );
        }
    }
    if cases.is_empty() {
        bail!("{}: no cases", root.display());
    }
    Ok(cases)
}

fn subfolders(path: &Path) -> Result<Vec<PathBuf>> {
    let entries = std::fs::read_dir(path).with_context(|| path.display().to_string())?;
    let mut folders = entries
        .map(|e| Ok(e?.path()))
        .collect::<std::io::Result<Vec<_>>>()?;
    folders.retain(|p| p.is_dir());
    folders.sort();
    Ok(folders)
}

struct Outcome {
    slug: String,
    name: String,
    error: Option<String>,
    check: Check,
}

fn run_case(slug: &str, path: &Path, models: &mut Models) -> Outcome {
    let name = path
        .file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned();
    let mut check = Check::default();
    let mut attempt = || -> Result<()> {
        let Some(run) = runner(slug, &name) else {
            bail!("unknown method `{slug}`")
        };
        let case = Case::read(slug, path)?;
        run(&case, models, &mut check)?;
        check.finish(&case);
        Ok(())
    };
    let error = attempt().err().map(|e| format!("{e:#}"));
    Outcome {
        slug: slug.to_owned(),
        name,
        error,
        check,
    }
}

impl Outcome {
    fn passed(&self) -> bool {
        self.error.is_none() && self.check.passed()
    }

    fn line(&self) -> String {
        let verdict = if self.passed() { "ok  " } else { "FAIL" };
        let (worst, tensor) = self.check.worst();
        let mut line = format!("{verdict} {}/{}", self.slug, self.name);
        line.push_str(&format!(
            "  largest error {worst:.1e} ({tensor}), {} compared",
            self.check.compared()
        ));
        for warning in self.check.warnings() {
            line.push_str(&format!("\n     {warning}"));
        }
        line
    }

    fn failures(&self) -> Vec<String> {
        let mut lines = vec![format!("\n{}/{}", self.slug, self.name)];
        lines.extend(self.error.iter().map(|e| format!("  error: {e}")));
        lines.extend(self.check.failures().map(|f| format!("  {f}")));
        lines
    }

    fn json(&self) -> serde_json::Value {
        let (worst, tensor) = self.check.worst();
        json!({
            "method": self.slug,
            "case": self.name,
            "passed": self.passed(),
            "error": self.error,
            "largest_error": worst,
            "largest_error_tensor": tensor,
            "compared": self.check.compared(),
            "failures": self.check.failures().collect::<Vec<_>>(),
            "warnings": self.check.warnings(),
        })
    }
}

fn worst_by_method(outcomes: &[Outcome]) -> BTreeMap<&str, f64> {
    let mut worst = BTreeMap::new();
    for outcome in outcomes {
        let entry = worst.entry(outcome.slug.as_str()).or_insert(0.0f64);
        *entry = entry.max(outcome.check.worst().0);
    }
    worst
}
