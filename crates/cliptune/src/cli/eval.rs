//! `cliptune eval`: how often a prompt, or zero-shot CLIP, is right on labelled images.

use std::fmt::Write;
use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, Result};
use cliptune::View;
use cliptune::run::Progress;
use cliptune::train::EVALUATION_BATCH;
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
    #[arg(long, value_enum, value_name = "SPLIT", default_value_t, help_heading = "Data")]
    split: SplitName,
    /// Classes to take: all, or the first (base) or second (new) half of them
    #[arg(long, value_enum, value_name = "PART", default_value_t, help_heading = "Data")]
    subset: Subset,
    /// Leave out images that cannot be read instead of stopping
    #[arg(long, help_heading = "Data")]
    skip_bad_images: bool,
    /// Folder for encoded images [default: the user's cache folder]
    #[arg(long, value_name = "DIR", help_heading = "Data", conflicts_with = "no_cache")]
    cache: Option<PathBuf>,
    /// Keep encoded images in memory only
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
struct ClassResult {
    name: String,
    correct: usize,
    total: usize,
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
        say(format!("data      {}", data.in_words()));
        if let Some(file) = chosen.file() {
            if self.split.may_hold_training_images() && data.was_trained_on(file) {
                say(format!(
                    "warning   the prompt was trained on images of this data, and the {} split holds them: the accuracy says little about other images",
                    self.split.name()
                ));
            }
        }
        let clip = self.model.load()?;
        let classes = data.classes();
        let predictor = chosen.predictor(&clip, classes)?;
        let classifier = predictor
            .classifier(&clip, classes)
            .with_context(|| format!("{}: classes that the prompt cannot serve", self.images.display()))?;
        let cache = CachePlan::new(self.cache.clone(), self.no_cache);
        let indices: Vec<usize> = items.iter().map(|(item, _)| *item).collect();
        let source =
            data::encode_items(&data, &clip, &indices, predictor.needs(), &cache, &mut show)?;

        let mut results: Vec<ClassResult> = Vec::new();
        let mut confusion = vec![vec![0usize; classes.len()]; classes.len()];
        let mut show = Show::new(quiet);
        show.start("evaluating", 0, items.len() as u64);
        let mut done = 0;
        for batch in items.chunks(EVALUATION_BATCH) {
            let indices: Vec<usize> = batch.iter().map(|(item, _)| *item).collect();
            let images = source.images(&clip, &indices, predictor.needs(), View::Fixed)?;
            let rows = classifier.logits(&images)?.to_vec2::<f32>()?;
            for (row, (_, label)) in rows.iter().zip(batch) {
                let _ = (row, label);
            }
            done += batch.len();
            show.advanced(done as u64);
        }
        show.finish();
        let _ = (&mut results, &mut confusion);
        Ok(())
    }
}
