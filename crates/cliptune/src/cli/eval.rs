//! `cliptune eval`: how often a prompt, or zero-shot CLIP, is right on labelled images.

use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, Result};
use cliptune::data::Confusion;
use cliptune::run::Progress;
use cliptune::train::EVALUATION_BATCH;
use cliptune::{Classes, View};
use serde_json::json;

use super::data::{self, CachePlan, Data, SplitName, Subset};
use super::model::ModelArgs;
use super::out;
use super::predictor::PredictorArgs;
use super::progress::{Show, duration};
use super::table::Table;

/// Rows of the table by class unless all are asked for.
const WORST: usize = 20;

/// Measure a prompt, or zero-shot CLIP, on labelled images
#[derive(Debug, clap::Args)]
pub(crate) struct Eval {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    predictor: PredictorArgs,
    /// Labelled images: a folder with one folder per class, a CSV, or images/ beside split_zhou_*.json
    #[arg(long, value_name = "DIR")]
    images: PathBuf,
    /// Images to measure on
    #[arg(
        long,
        value_enum,
        value_name = "SPLIT",
        default_value_t,
        help_heading = "Data"
    )]
    split: SplitName,
    /// Classes to take: all, or the first (base) or second (new) half of them
    #[arg(
        long,
        value_enum,
        value_name = "PART",
        default_value_t,
        help_heading = "Data"
    )]
    subset: Subset,
    /// Leave out images that cannot be read instead of stopping
    #[arg(long, help_heading = "Data")]
    skip_bad_images: bool,
    /// Folder for encoded images [default: the user's cache folder]
    #[arg(
        long,
        value_name = "DIR",
        help_heading = "Data",
        conflicts_with = "no_cache"
    )]
    cache: Option<PathBuf>,
    /// Keep no encoded images for later runs
    #[arg(long, help_heading = "Data")]
    no_cache: bool,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
    /// Print every class, not only the worst
    #[arg(long)]
    per_class: bool,
}

/// How one class fared.
#[derive(Clone)]
struct ClassResult {
    name: String,
    correct: u64,
    total: u64,
}

impl ClassResult {
    /// Percent; none without images.
    fn accuracy(&self) -> Option<f64> {
        (self.total > 0).then(|| 100.0 * self.correct as f64 / self.total as f64)
    }
}

impl Eval {
    pub(crate) fn run(&self) -> Result<()> {
        let started = Instant::now();
        let quiet = self.model.machine.quiet;
        let say = |message: String| {
            if !quiet {
                out::say(message);
            }
        };
        let chosen = self.predictor.read()?;
        let mut show = Show::new(quiet);
        let data = Data::open(&self.images, self.subset, self.skip_bad_images, &mut show)?;
        let items = data.items(self.split)?;
        if items.is_empty() {
            anyhow::bail!(
                "{}: the {} split has no image; `--split all` takes every image",
                self.images.display(),
                self.split.name()
            );
        }
        data.in_words().into_iter().for_each(&say);
        if let Some(file) = chosen.file()
            && self.split.may_hold_training_images()
            && data.was_trained_on(file)
        {
            say(format!(
                "warning   the prompt was trained on images of this data, and the {} split holds them: the accuracy says little about other images",
                self.split.name()
            ));
        }
        let clip = self.model.load()?;
        let classes = data.classes();
        let predictor = chosen.predictor(&clip, classes)?;
        let classifier = predictor.classifier(&clip, classes).with_context(|| {
            format!(
                "{}: classes that the prompt cannot serve",
                self.images.display()
            )
        })?;
        let cache = CachePlan::new(self.cache.clone(), self.no_cache);
        let indices: Vec<usize> = items.iter().map(|(item, _)| *item).collect();
        let source =
            data::encode_items(&data, &clip, &indices, predictor.needs(), &cache, &mut show)?;

        let mut show = Show::new(quiet);
        let mut confusion = Confusion::new(classes.len());
        show.start("evaluating", 0, items.len() as u64);
        let mut done = 0;
        for batch in items.chunks(EVALUATION_BATCH) {
            let indices: Vec<usize> = batch.iter().map(|(item, _)| *item).collect();
            let images = source.images(&clip, &indices, predictor.needs(), View::Fixed)?;
            let labels: Vec<u32> = batch.iter().map(|(_, label)| *label).collect();
            confusion.add(&classifier.logits(&images)?, &labels)?;
            done += batch.len();
            show.advanced(done as u64);
        }
        show.finish();

        let seconds = started.elapsed().as_secs_f64();
        let per_class = by_name(&confusion, &items, classes);
        let correct: u64 = per_class.iter().map(|class| class.correct).sum();
        if self.json {
            let per_class: Vec<_> = per_class
                .iter()
                .map(|c| json!({"class": c.name, "correct": c.correct, "total": c.total, "accuracy": c.accuracy()}))
                .collect();
            let result = json!({
                "accuracy": confusion.accuracy()?,
                "correct": correct,
                "total": confusion.total(),
                "macro_f1": confusion.macro_f1()?,
                "method": chosen.method(),
                "clip": clip.arch().name(),
                "weights_hash": clip.weights_hash(),
                "split": self.split.name(),
                "subset": self.subset.name(),
                "classes": classes.names(),
                "per_class": per_class,
                "skipped_images": data.skipped(),
                "seconds": seconds,
            });
            return out::result(&format!("{result}\n"));
        }
        let mut text = format!(
            "accuracy  {:.2} %  ({} of {} images, {} classes)\nmacro F1  {:.2} %\n\n",
            confusion.accuracy()?,
            correct,
            confusion.total(),
            classes.len(),
            confusion.macro_f1()?,
        );
        text.push_str(&by_class(
            per_class,
            if self.per_class { usize::MAX } else { WORST },
        ));
        out::result(&text)?;
        say(format!("time      {}", duration(seconds)));
        Ok(())
    }
}

fn by_name(confusion: &Confusion, items: &[(usize, u32)], classes: &Classes) -> Vec<ClassResult> {
    let mut totals = vec![0; classes.len()];
    for (_, label) in items {
        if let Some(total) = totals.get_mut(*label as usize) {
            *total += 1;
        }
    }
    let named = classes.names().iter().zip(totals).enumerate();
    let result = |(label, (name, total)): (usize, (&String, u64))| ClassResult {
        name: name.clone(),
        correct: confusion.count(label as u32, label as u32),
        total,
    };
    named.map(result).collect()
}

/// The classes as a table, the worst first.
fn by_class(mut classes: Vec<ClassResult>, most: usize) -> String {
    let empty = classes.iter().filter(|c| c.total == 0).count();
    classes.retain(|c| c.total > 0);
    let percent = |c: &ClassResult| c.accuracy().unwrap_or(0.0);
    classes.sort_by(|a, b| percent(a).total_cmp(&percent(b)));
    let mut table = Table::new(&["ACCURACY", "CORRECT", "IMAGES", "CLASS"]).right(&[0, 1, 2]);
    for class in classes.iter().take(most) {
        let accuracy = format!("{:.1} %", percent(class));
        let (correct, total) = (class.correct.to_string(), class.total.to_string());
        table.row(vec![accuracy, correct, total, class.name.clone()]);
    }
    let mut text = table.render(out::width());
    if classes.len() > most {
        let more = classes.len() - most;
        text.push_str(&format!(
            "... and {more} better classes; --per-class shows all\n"
        ));
    }
    if empty > 0 {
        text.push_str(&format!("{empty} classes have no image in this split\n"));
    }
    text
}
