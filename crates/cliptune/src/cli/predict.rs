//! `cliptune predict`: the most probable classes of images.

use std::io::{IsTerminal, Write};
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use cliptune::method::{Classifier, Predictor};
use cliptune::run::Progress;
use cliptune::{Classes, Clip, ImageSource, View};
use serde_json::json;

use super::data;
use super::model::ModelArgs;
use super::out;
use super::predictor::{PredictorArgs, read_classes};
use super::progress::Show;

/// Images that are read and encoded together.
const BATCH: usize = 32;

/// Print the most probable classes of images
#[derive(Debug, clap::Args)]
pub(crate) struct Predict {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    predictor: PredictorArgs,
    /// Images, or folders of images
    #[arg(value_name = "IMAGE|DIR", required = true)]
    images: Vec<PathBuf>,
    /// Classes to choose from: a file with one name a line, or names with commas [default: the prompt's]
    #[arg(long, value_name = "NAMES")]
    classes: Option<String>,
    /// Classes to print of each image
    #[arg(short = 'k', long, value_name = "K", default_value_t = 5)]
    top_k: usize,
    /// How to print them
    #[arg(long, value_enum, value_name = "FORMAT", default_value_t)]
    format: Format,
    /// File to write instead of printing
    #[arg(short, long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// Leave out images that cannot be read instead of stopping
    #[arg(long)]
    skip_bad_images: bool,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
enum Format {
    /// For people
    #[default]
    Table,
    /// image,rank,class,probability
    Csv,
    /// One array
    Json,
}

/// An image's best classes and their probabilities.
struct Prediction {
    image: String,
    top: Vec<(usize, f64)>,
}

impl Predict {
    pub(crate) fn run(&self) -> Result<()> {
        if self.top_k == 0 {
            bail!("--top-k 0: expected at least 1");
        }
        let chosen = self.predictor.read()?;
        let classes = match (&self.classes, chosen.file()) {
            (Some(given), _) => read_classes(given)?,
            (None, Some(file)) => file.classes.clone(),
            (None, None) => bail!(
                "nothing says which classes to choose from; give --prompt FILE, or --classes NAMES for zero-shot"
            ),
        };
        let source = data::loose_images(&self.images)?;
        if let Some(path) = &self.out {
            out::check_writable(path)?;
        }
        let clip = self.model.load()?;
        let predictor = chosen.predictor(&clip, &classes)?;
        let classifier = predictor.classifier(&clip, &classes)?;
        let mut work = Work {
            clip: &clip,
            predictor: predictor.as_ref(),
            classifier: classifier.as_ref(),
            source,
            top_k: self.top_k.min(classes.len()),
            skip_bad_images: self.skip_bad_images,
            bad: 0,
            to_terminal: self.out.is_none() && std::io::stdout().is_terminal(),
            show: Show::new(self.model.machine.quiet),
        };
        out::stream(self.out.as_deref(), |out| match self.format {
            Format::Table => work.run(&mut |predictions| table(out, &classes, predictions)),
            Format::Csv => {
                writeln!(out, "image,rank,class,probability")?;
                work.run(&mut |predictions| csv(out, &classes, predictions))
            }
            Format::Json => {
                let mut before = "[\n";
                work.run(&mut |predictions| {
                    for prediction in predictions {
                        write!(out, "{before}{}", as_json(&classes, prediction))?;
                        before = ",\n";
                    }
                    Ok(out.flush()?)
                })?;
                Ok(out.write_all(if before == ",\n" { b"\n]\n" } else { b"[]\n" })?)
            }
        })?;
        if work.bad > 0 && !self.model.machine.quiet {
            out::say(format_args!(
                "{} images could not be read and were left out",
                work.bad
            ));
        }
        Ok(())
    }
}

struct Work<'a> {
    clip: &'a Clip,
    predictor: &'a dyn Predictor,
    classifier: &'a dyn Classifier,
    source: Arc<dyn ImageSource>,
    top_k: usize,
    skip_bad_images: bool,
    bad: usize,
    to_terminal: bool,
    show: Show,
}

impl Work<'_> {
    fn run(&mut self, write: &mut dyn FnMut(&[Prediction]) -> Result<()>) -> Result<()> {
        let indices: Vec<usize> = (0..self.source.len()).collect();
        // One batch is over before a bar could be read; and results on a terminal are progress enough.
        let show_bar = indices.len() > BATCH && !self.to_terminal;
        if show_bar {
            self.show
                .start("classifying images", 0, indices.len() as u64);
        }
        let mut done = 0;
        for indices in indices.chunks(BATCH) {
            let indices = match self.skip_bad_images {
                true => self.readable(indices),
                false => indices.to_vec(),
            };
            let predictions = self.predict(&indices)?;
            write(&predictions)?;
            done += BATCH;
            if show_bar {
                self.show.advanced(done.min(self.source.len()) as u64);
            }
        }
        self.show.finish();
        Ok(())
    }

    /// Those of `indices` that can be read; the others are counted and named.
    fn readable(&mut self, indices: &[usize]) -> Vec<usize> {
        let read = |indices: &[usize]| {
            self.source
                .pixels(indices, self.clip.preprocess(), View::Fixed)
                .map(drop)
        };
        if read(indices).is_ok() {
            return indices.to_vec();
        }
        let mut good = Vec::new();
        for &index in indices {
            match read(&[index]) {
                Ok(()) => good.push(index),
                Err(e) => {
                    self.bad += 1;
                    self.show.note(&format!("left out: {e}"));
                }
            }
        }
        good
    }

    fn predict(&self, indices: &[usize]) -> Result<Vec<Prediction>> {
        if indices.is_empty() {
            return Ok(Vec::new());
        }
        let images = self
            .source
            .images(self.clip, indices, self.predictor.needs(), View::Fixed)
            .context("an image cannot be used; --skip-bad-images leaves such out")?;
        let rows = self.classifier.logits(&images)?.to_vec2::<f32>()?;
        let predictions = indices.iter().zip(rows).map(|(&index, row)| {
            let mut top: Vec<(usize, f64)> = softmax(&row).into_iter().enumerate().collect();
            // Stable: of equals the first class comes first.
            top.sort_by(|a, b| b.1.total_cmp(&a.1));
            top.truncate(self.top_k);
            Prediction {
                image: self.source.name(index),
                top,
            }
        });
        Ok(predictions.collect())
    }
}

fn softmax(logits: &[f32]) -> Vec<f64> {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let exps: Vec<f64> = logits
        .iter()
        .map(|&x| (f64::from(x) - f64::from(max)).exp())
        .collect();
    let sum: f64 = exps.iter().sum();
    exps.into_iter().map(|x| x / sum).collect()
}

fn name(classes: &Classes, label: usize) -> &str {
    classes.names().get(label).map_or("", String::as_str)
}

fn table(out: &mut dyn Write, classes: &Classes, predictions: &[Prediction]) -> Result<()> {
    for Prediction { image, top } in predictions {
        writeln!(out, "{image}")?;
        for (label, probability) in top {
            writeln!(
                out,
                "  {:5.1} %  {}",
                100.0 * probability,
                name(classes, *label)
            )?;
        }
    }
    Ok(out.flush()?)
}

fn csv(out: &mut dyn Write, classes: &Classes, predictions: &[Prediction]) -> Result<()> {
    let mut writer = csv::Writer::from_writer(out);
    for Prediction { image, top } in predictions {
        for (rank, (label, probability)) in top.iter().enumerate() {
            let (rank, probability) = ((rank + 1).to_string(), format!("{probability:.6}"));
            writer
                .write_record([image, &rank, name(classes, *label), &probability])
                .map_err(io)?;
        }
    }
    Ok(writer.flush()?)
}

/// The operating system's error inside, so that a closed pipe is known as one.
fn io(error: csv::Error) -> anyhow::Error {
    match error.into_kind() {
        csv::ErrorKind::Io(e) => e.into(),
        kind => anyhow::anyhow!("{kind:?}"),
    }
}

fn as_json(classes: &Classes, Prediction { image, top }: &Prediction) -> serde_json::Value {
    let predictions: Vec<_> = top
        .iter()
        .map(|(label, probability)| json!({"class": name(classes, *label), "probability": probability}))
        .collect();
    json!({"image": image, "predictions": predictions})
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn probabilities_of_large_logits_are_finite() {
        let p = softmax(&[1000.0, 1000.0, -1000.0]);
        assert_eq!(p, [0.5, 0.5, 0.0]);
    }
}
