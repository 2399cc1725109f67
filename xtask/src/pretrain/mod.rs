//! `cargo xtask pretrain`: trains the built-in CLIP on captioned pictures of the procedural world.
//!
//! Contrastive training of both towers, all weights learned, with pictures that are drawn anew at every step. Three helps are
//! declared: easy pictures with simple captions at first; linear heads that name what a picture shows from the image feature
//! and are thrown away; and patches that name the shape above them through the text tower.

mod batch;
mod evaluate;
mod learner;
mod saved;
mod step;

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use candle_core::{DType, Device, Tensor};
use cliptune_core::checkpoint::Layout;
use cliptune_core::optim::{Optimizer, OptimizerConfig};
use cliptune_core::rng::Rng;
use cliptune_core::tokenizer::Tokenizer;
use cliptune_core::{CONTEXT_LENGTH, Clip, Params, Storage};
use cliptune_scenes::{Shape, Task, Wording, World};
use indicatif::{ProgressBar, ProgressStyle};
use serde::{Deserialize, Serialize};

use self::batch::{Batch, Draw, heads};
use self::learner::Learner;
use self::step::{Losses, Weighting, step};
use crate::out;

pub(crate) use self::evaluate::{known, local};

/// Trains the built-in CLIP.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Folder for the weights, Hugging Face layout in f16; must not exist.
    #[arg(long, default_value = "target/clip")]
    out: PathBuf,
    /// Steps of training.
    #[arg(long, default_value_t = Settings::default().steps)]
    steps: usize,
    /// Seed of weights, pictures and captions.
    #[arg(long, default_value_t = Settings::default().seed)]
    seed: u64,
    /// Threads; the result does not depend on it.
    #[arg(long)]
    threads: Option<usize>,
    /// Throws the state of an unfinished training away.
    #[arg(long)]
    fresh: bool,
}

/// What determines the result.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Settings {
    steps: usize,
    seed: u64,
    /// Pictures of a step.
    batch: usize,
    /// Largest learning rate.
    lr: f64,
    /// Version of the recipe in this file; a state of another one is refused.
    recipe: u32,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            steps: 5_000,
            seed: 1,
            batch: 128,
            lr: 1.2e-3,
            recipe: 1,
        }
    }
}

/// Share of the steps that see easy pictures and simple captions.
const EASY: f64 = 0.04;
/// Share after which the learning rate falls.
const FALLING: f64 = 0.55;
/// Share after which the image tower sees every patch.
const WHOLE: f64 = 0.85;
const WARM_UP: usize = 100;
/// Logarithms of the least factor of the cosines at the beginning, when it starts to rise, and at the end; CLIP's is 100.
const SCALE: (f64, f64) = (2.66, 4.1);

/// The training at a moment.
struct Moment {
    draw: Draw,
    weighting: Weighting,
    lr: f64,
    least_scale: f64,
}

impl Settings {
    fn moment(&self, step: usize) -> Moment {
        let share = step as f64 / self.steps as f64;
        let easy = share < EASY;
        let (world, wording) = match easy {
            true => (World::easy(), Wording::simple()),
            false => (World::training(), Wording::full()),
        };
        let shape = if share < 0.5 { 1.0 } else { 0.3 };
        let heads = heads().into_iter().map(|(name, _)| match name {
            "shape" => (name, shape),
            "kind" => (name, 0.1),
            _ => (name, 0.25),
        });
        let warm = ((step + 1) as f64 / WARM_UP as f64).min(1.0);
        let fall = ((1.0 - share) / (1.0 - FALLING)).min(1.0);
        let rise = ((share - 0.3) / 0.6).clamp(0.0, 1.0);
        Moment {
            draw: Draw {
                world,
                wording,
                pictures: self.batch,
                kept: if share < WHOLE { 40 } else { 64 },
                named: 6,
            },
            weighting: Weighting {
                heads: heads.collect(),
                named: 0.5,
                softness: if easy { 0.5 } else { 0.0 },
            },
            lr: self.lr * warm * fall.max(0.01),
            least_scale: SCALE.0 + rise * (SCALE.1 - SCALE.0),
        }
    }
}

/// A line of the training curve.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Point {
    step: usize,
    loss: f64,
    contrastive: f64,
    named: f64,
    /// Factor of the cosines.
    scale: f64,
    /// Zero-shot accuracy in percent by task.
    zero_shot: Vec<(String, f64)>,
    /// Seconds of training so far.
    seconds: f64,
}

/// Tasks that the training curve follows.
const FOLLOWED: [Task; 4] = [Task::Shape, Task::Color, Task::Pattern, Task::Count];
const LOOK_EVERY: usize = 250;
const SAVE_EVERY: Duration = Duration::from_secs(120);

/// A training in hand.
struct Training {
    settings: Settings,
    learner: Learner,
    groups: Vec<(Params, Optimizer)>,
    step: usize,
    curve: Vec<Point>,
    seconds: f64,
}

impl Training {
    fn new(settings: Settings) -> Result<Self> {
        let learner = Learner::new(settings.seed, &heads())?;
        // Decay is for matrices that multiply; tables, norms and biases go without.
        let decays = |name: &str| {
            name.ends_with("weight") && !name.contains("ln_") && !name.contains("embedding")
                || name.ends_with("proj")
                || name == "text_projection"
        };
        let all = &learner.params;
        let matrices = all.group(|p| decays(p.name()) && p.tensor().rank() > 1);
        let rest = all.group(|p| !(decays(p.name()) && p.tensor().rank() > 1));
        let group = |params: Params, weight_decay: f64| -> Result<_> {
            let config = OptimizerConfig::AdamW {
                betas: [0.9, 0.98],
                eps: 1e-8,
                weight_decay,
                amsgrad: false,
            };
            let optimizer = Optimizer::new(config, &params)?;
            Ok((params, optimizer))
        };
        Ok(Self {
            groups: vec![group(matrices, 0.1)?, group(rest, 0.0)?],
            settings,
            learner,
            step: 0,
            curve: Vec::new(),
            seconds: 0.0,
        })
    }

    fn advance(&mut self) -> Result<Losses> {
        let moment = self.settings.moment(self.step);
        let learner = &self.learner;
        let seed = self.settings.seed;
        let batch = Batch::draw(&moment.draw, learner.clip.preprocess(), seed, self.step)?;
        let words = words(seed, self.step)?;
        let (losses, mut gradients) = step(learner, &batch, &words, &moment.weighting)?;
        gradients
            .clip_norm(1.0)
            .with_context(|| format!("step {} ({losses:?})", self.step))?;
        for (params, optimizer) in &mut self.groups {
            optimizer.step(params, &gradients.group(params), |_| moment.lr)?;
        }
        let scale = f64::from(learner.logit_scale.value()?.to_scalar::<f32>()?);
        let scale = scale.clamp(moment.least_scale, 100f64.ln());
        let scale = Tensor::new(scale as f32, &Device::Cpu)?;
        learner.logit_scale.set(&scale)?;
        self.step += 1;
        Ok(losses)
    }

    fn clip(&self) -> Result<Clip> {
        Ok(Clip::from_checkpoint(
            self.learner.checkpoint()?,
            Storage::F32,
        )?)
    }

    fn look(&mut self, losses: Losses) -> Result<&Point> {
        let clip = self.clip()?;
        let zero_shot = FOLLOWED.iter().map(|task| {
            let per_class = 360 / task.classes().len();
            let accuracy = evaluate::zero_shot(&clip, *task, per_class)?;
            Ok((task.slug(), accuracy))
        });
        let zero_shot = zero_shot.collect::<Result<_>>()?;
        self.curve.push(Point {
            step: self.step,
            loss: losses.total,
            contrastive: losses.contrastive,
            named: losses.named,
            scale: clip.scale(),
            zero_shot,
            seconds: self.seconds,
        });
        self.curve.last().context("the curve is empty")
    }
}

impl std::fmt::Display for Point {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "step {:>6}  loss {:.3}  contrastive {:.3}  patches {:.3}  scale {:.1}  zero-shot",
            self.step, self.loss, self.contrastive, self.named, self.scale
        )?;
        for (task, accuracy) in &self.zero_shot {
            write!(f, " {task} {accuracy:.1}")?;
        }
        write!(f, "  {:.0} s", self.seconds)
    }
}

/// Every shape in a sentence: what patches are compared with. Synonyms and sentences change from step to step.
fn words(seed: u64, step: usize) -> Result<Vec<Vec<u32>>> {
    const SENTENCES: [&str; 5] = [
        "{}",
        "a {}.",
        "a photo of a {}.",
        "a picture of a {}",
        "there is a {}",
    ];
    let mut rng = Rng::stream(seed, "words", &[step as u64]);
    let each = Shape::ALL.iter().map(|shape| {
        let synonyms = shape.synonyms();
        let word = match rng.uniform() < 0.15 && !synonyms.is_empty() {
            true => synonyms[rng.below(synonyms.len())],
            false => shape.word(),
        };
        let sentence = SENTENCES[rng.below(SENTENCES.len())].replace("{}", word);
        Ok(Tokenizer::get().tokenize(&sentence, CONTEXT_LENGTH)?)
    });
    each.collect()
}

pub(crate) fn main(args: &Args) -> Result<()> {
    if let Some(threads) = args.threads {
        ensure!(threads > 0, "--threads 0: expected at least 1");
        rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .build_global()?;
    }
    if args.out.exists() {
        bail!("{} exists already; give another --out", args.out.display());
    }
    ensure!(args.steps > 0, "--steps 0: expected at least 1");
    let settings = Settings {
        steps: args.steps,
        seed: args.seed,
        ..Settings::default()
    };
    let mut state = args.out.clone().into_os_string();
    state.push(".state");
    let state = PathBuf::from(state);
    if let Some(folder) = args.out.parent().filter(|f| !f.as_os_str().is_empty()) {
        std::fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
    }
    if args.fresh && state.exists() {
        std::fs::remove_file(&state).with_context(|| state.display().to_string())?;
    }
    let mut training = Training::new(settings)?;
    if state.exists() {
        training.resume(&state)?;
        out::line(&format!(
            "going on after step {} of {}",
            training.step, training.settings.steps
        ));
    }
    train(&mut training, &state)?;
    let checkpoint = training.learner.checkpoint()?;
    checkpoint.save(Layout::Hf, Some(DType::F16), &args.out)?;
    training.write_curve(&args.out.join("training.csv"))?;
    std::fs::remove_file(&state).with_context(|| state.display().to_string())?;
    out::line(&format!("wrote {}", args.out.display()));
    Ok(())
}

fn train(training: &mut Training, state: &std::path::Path) -> Result<()> {
    let bar = ProgressBar::new(training.settings.steps as u64).with_position(training.step as u64);
    bar.set_style(ProgressStyle::with_template(
        "{bar:30} step {pos} of {len}, {eta} left  {msg}",
    )?);
    let mut saved = Instant::now();
    let mut mean: Option<Losses> = None;
    while training.step < training.settings.steps {
        let started = Instant::now();
        let losses = training.advance()?;
        training.seconds += started.elapsed().as_secs_f64();
        let smooth = mean.map_or(losses, |mean| mean.towards(losses, 0.02));
        mean = Some(smooth);
        bar.inc(1);
        bar.set_message(format!("loss {:.3}", smooth.total));
        let last = training.step == training.settings.steps;
        if training.step.is_multiple_of(LOOK_EVERY) || last {
            let point = training.look(smooth)?.to_string();
            bar.suspend(|| out::line(&point));
        }
        if saved.elapsed() > SAVE_EVERY || last {
            training.save(state)?;
            saved = Instant::now();
        }
    }
    bar.finish_and_clear();
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tiny() -> Settings {
        Settings {
            steps: 4,
            batch: 20,
            ..Settings::default()
        }
    }

    fn values(training: &Training) -> Result<Vec<Vec<f32>>> {
        let tensors = training.learner.params.tensors()?;
        let flat = |(_, t): (String, Tensor)| Ok(t.flatten_all()?.to_vec1::<f32>()?);
        tensors.into_iter().map(flat).collect()
    }

    #[test]
    fn a_stopped_training_goes_on_to_the_same_bits_on_any_number_of_threads() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let state = folder.path().join("state");
        let threads = |n| rayon::ThreadPoolBuilder::new().num_threads(n).build();
        let mut whole = Training::new(tiny())?;
        threads(1)?.install(|| (0..4).try_for_each(|_| whole.advance().map(drop)))?;

        let mut first = Training::new(tiny())?;
        threads(3)?.install(|| (0..2).try_for_each(|_| first.advance().map(drop)))?;
        first.save(&state)?;
        let mut second = Training::new(tiny())?;
        second.resume(&state)?;
        assert_eq!(second.step, 2);
        threads(2)?.install(|| (0..2).try_for_each(|_| second.advance().map(drop)))?;
        assert!(values(&whole)? == values(&second)?);

        let mut other = Training::new(Settings { seed: 2, ..tiny() })?;
        let refused = other.resume(&state).unwrap_err().to_string();
        assert!(refused.contains("--fresh"), "{refused}");
        std::fs::File::options()
            .write(true)
            .open(&state)?
            .set_len(1000)?;
        let damaged = format!("{:#}", Training::new(tiny())?.resume(&state).unwrap_err());
        assert!(damaged.contains("state"), "{damaged}");
        Ok(())
    }

    #[test]
    fn everything_is_learned_and_only_heads_are_thrown_away() -> Result<()> {
        let mut training = Training::new(tiny())?;
        let before = training.learner.checkpoint()?.tensors;
        let losses = training.advance()?;
        assert!(losses.total > losses.contrastive && losses.contrastive > 0.0);
        let after = training.learner.checkpoint()?.tensors;
        assert!(before.keys().eq(after.keys()));
        for (name, tensor) in &after {
            let moved = (tensor - &before[name])?
                .abs()?
                .max_all()?
                .to_scalar::<f32>()?;
            assert!(moved > 0.0, "`{name}` did not move");
        }
        // Words that no caption has stay as they were drawn.
        let row = |t: &std::collections::BTreeMap<String, Tensor>| -> Result<Vec<f32>> {
            Ok(t["token_embedding.weight"].get(40_000)?.to_vec1()?)
        };
        assert_eq!(row(&before)?, row(&after)?);
        Ok(())
    }

    #[test]
    fn the_schedule_ends_where_it_should() {
        let settings = Settings::default();
        let (first, last) = (settings.moment(0), settings.moment(settings.steps - 1));
        assert!(first.lr < 0.02 * settings.lr && last.lr < 0.02 * settings.lr);
        assert!(first.weighting.softness > 0.0 && last.weighting.softness == 0.0);
        assert_eq!((first.draw.kept, last.draw.kept), (40, 64));
        assert!((last.least_scale.exp() - 60.0).abs() < 1.0);
    }
}
