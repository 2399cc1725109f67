//! `cliptune fit`: learn from labelled images, write a prompt file.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::exit;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use candle_core::Tensor;
use cliptune::method::{AnyMethod, Entry, Predictor, Task};
use cliptune::prompt_file::{self, PromptFile};
use cliptune::run::CheckpointPlan;
use cliptune::tasks::{self, TaskClasses, Tasks};
use cliptune::train::{self, Recipe};
use cliptune::{Clip, Error, Labelled, Run, registry};
use serde_json::{Value, json};

use super::data::{self, CachePlan, Data, Draw, Subset};
use super::fit_file::FitFile;
use super::model::{self, MachineArgs, StorageName};
use super::out;
use super::progress::{Show, duration};
use super::settings::{Setting, configure};

/// Learn from labelled images and write a prompt file
///
/// A killed run goes on where it was when the same command is given again, and ends with the same file.
#[derive(Debug, clap::Args)]
pub(crate) struct Fit {
    /// CLIP weights: OpenAI's .pt, an OpenCLIP or Hugging Face file or folder, safetensors
    #[arg(long, value_name = "WEIGHTS")]
    clip: Option<PathBuf>,
    /// Labelled images: a folder with one folder per class, a CSV, or images/ beside split_zhou_*.json; given several times,
    /// all classes of all of them
    #[arg(long, value_name = "DIR")]
    images: Vec<PathBuf>,
    /// Method, as `cliptune list` prints it
    #[arg(long, value_name = "METHOD")]
    method: Option<String>,
    /// Prompt file to write
    #[arg(short, long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// TOML file with any of these flags as keys, and the method's settings in [config]; flags win
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,

    /// Training images per class; 0 takes all [default: 0]
    #[arg(long, value_name = "N", help_heading = "Data")]
    shots: Option<usize>,
    /// Determines the images drawn, the initial values and the order [default: 1]
    #[arg(long, value_name = "N", help_heading = "Data")]
    seed: Option<u64>,
    /// Classes to take: all, or the first (base) or second (new) half of them [default: all]
    #[arg(long, value_enum, value_name = "PART", help_heading = "Data")]
    subset: Option<Subset>,
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

    /// Megabytes that a training step may take beside the weights; what does not fit is computed twice [default: no limit]
    #[arg(long, value_name = "MB", help_heading = "Machine")]
    memory: Option<u64>,

    /// Passes over the training images: train.epochs [default: the method's]
    #[arg(long, value_name = "N", help_heading = "Training")]
    epochs: Option<usize>,
    /// Learning rate: train.lr [default: the method's]
    #[arg(
        long,
        value_name = "X",
        help_heading = "Training",
        allow_negative_numbers = true
    )]
    lr: Option<f64>,
    /// Images per step: train.batch_size [default: the method's]
    #[arg(long, value_name = "N", help_heading = "Training")]
    batch: Option<usize>,
    /// Any other setting, as `cliptune describe METHOD` prints them
    #[arg(long, value_name = "KEY=VALUE", help_heading = "Training")]
    set: Vec<String>,
    /// Prompt file of the same method to begin with, in the place of the method's own start; of several the mean
    #[arg(long, value_name = "FILE", help_heading = "Training")]
    init: Vec<PathBuf>,
    /// Throw away what an unfinished run left and start over
    #[arg(long, help_heading = "Training")]
    fresh: bool,
    /// Least time between two checkpoints
    #[arg(long, value_name = "SECONDS", default_value_t = 5.0, hide = true)]
    checkpoint_every: f64,

    #[command(flatten)]
    machine: MachineArgs,
}

/// All that a fit needs to know, from flags and file, checked.
struct Plan {
    clip: PathBuf,
    /// At least one.
    images: Vec<PathBuf>,
    out: PathBuf,
    entry: Entry,
    method: Box<dyn AnyMethod>,
    shots: usize,
    seed: u64,
    subset: Subset,
    skip_bad_images: bool,
    cache: CachePlan,
    init: Vec<PathBuf>,
    fresh: bool,
    checkpoint: CheckpointPlan,
    storage: StorageName,
    /// In megabytes.
    memory: Option<u64>,
    threads: Option<usize>,
    quiet: bool,
}

impl Fit {
    fn plan(&self) -> Result<Plan> {
        let file = match &self.config {
            Some(path) => FitFile::read(path)?,
            None => FitFile::default(),
        };
        let needed = |flag: Option<&PathBuf>, key: Option<&PathBuf>, name: &str, what: &str| {
            flag.or(key).cloned().ok_or_else(|| {
                anyhow!(
                    "--{name} is missing: {what}; give the flag, or `{name}` in a --config file"
                )
            })
        };
        let clip = needed(
            self.clip.as_ref(),
            file.clip.as_ref(),
            "clip",
            "the CLIP weights",
        )?;
        let images = match self.images.is_empty() {
            true => file.images.map(Vec::from).unwrap_or_default(),
            false => self.images.clone(),
        };
        needed(images.first(), None, "images", "the labelled images")?;
        let out = needed(
            self.out.as_ref(),
            file.out.as_ref(),
            "out",
            "the prompt file to write",
        )?;
        let slug = self.method.as_ref().or(file.method.as_ref()).ok_or_else(|| {
            anyhow!("--method is missing: what to learn; `cliptune list` shows the methods, `coop` is a good start")
        })?;
        let entry = registry::find(slug)?;
        let subset = self.subset.or(file.subset).unwrap_or_default();
        let mut flags = Vec::new();
        if images.len() > 1 && (entry.defaults)().get("tasks").is_some() {
            // Before what the user says, who may divide them otherwise.
            flags.push(Setting::from_alias(
                "--images",
                "tasks",
                tasks_of(&images, subset)?,
            ));
        }
        for set in &self.set {
            flags.push(Setting::from_flag(set)?);
        }
        if let Some(epochs) = self.epochs {
            flags.push(Setting::from_alias("--epochs", "train.epochs", epochs));
        }
        if let Some(lr) = self.lr {
            if !lr.is_finite() {
                bail!("--lr {lr}: expected a finite number above 0");
            }
            flags.push(Setting::from_alias("--lr", "train.lr", lr));
        }
        if let Some(batch) = self.batch {
            flags.push(Setting::from_alias("--batch", "train.batch_size", batch));
        }
        let method = configure(&entry, &file.settings, &flags)?;
        let every = Duration::try_from_secs_f64(self.checkpoint_every)
            .map_err(|e| anyhow!("--checkpoint-every {}: {e}", self.checkpoint_every))?;
        out::check_writable(&out)?;
        let mut checkpoint = out.clone().into_os_string();
        checkpoint.push(".ckpt");
        let cache = match (&self.cache, self.no_cache) {
            (Some(folder), _) => CachePlan::In(folder.clone()),
            (None, true) => CachePlan::Temporary,
            (None, false) => match (file.cache, file.no_cache.unwrap_or(false)) {
                (Some(_), true) => bail!("cache and no_cache exclude each other"),
                (Some(folder), false) => CachePlan::In(folder),
                (None, true) => CachePlan::Temporary,
                (None, false) => CachePlan::user(),
            },
        };
        Ok(Plan {
            clip,
            images,
            out,
            entry,
            method,
            shots: self.shots.or(file.shots).unwrap_or(0),
            seed: self.seed.or(file.seed).unwrap_or(1),
            subset,
            skip_bad_images: self.skip_bad_images || file.skip_bad_images.unwrap_or(false),
            cache,
            init: match self.init.is_empty() {
                true => file.init.map(Vec::from).unwrap_or_default(),
                false => self.init.clone(),
            },
            fresh: self.fresh || file.fresh.unwrap_or(false),
            checkpoint: CheckpointPlan {
                path: checkpoint.into(),
                every,
            },
            storage: self.machine.storage.or(file.storage).unwrap_or_default(),
            memory: self.memory.or(file.memory),
            threads: self.machine.threads.or(file.threads),
            quiet: self.machine.quiet || file.quiet.unwrap_or(false),
        })
    }

    pub(crate) fn run(&self) -> Result<()> {
        self.plan()?.run()
    }
}

impl Plan {
    fn say(&self, message: impl std::fmt::Display) {
        if !self.quiet {
            out::say(message);
        }
    }

    fn run(self) -> Result<()> {
        let started = Instant::now();
        model::set_threads(self.threads)?;
        let drawn: Vec<(Data, Draw)> = self
            .images
            .iter()
            .map(|images| self.draw(images))
            .collect::<Result<_>>()?;
        if self.fresh && self.checkpoint.path.exists() {
            let path = &self.checkpoint.path;
            std::fs::remove_file(path).with_context(|| path.display().to_string())?;
        }

        let mut clip = model::load(&self.clip, self.storage, self.quiet)?;
        clip.set_memory_budget(self.memory.map(|mb| mb.saturating_mul(1_000_000)));
        let start = self.start(&clip)?;
        let mut parts = Vec::with_capacity(drawn.len());
        for (_, draw) in &drawn {
            parts.push(self.encode(&clip, &draw.labelled)?);
        }
        let labelled = match &parts[..] {
            [labelled] => labelled.clone(),
            parts => {
                let names: Vec<String> = self.images.iter().map(|path| name_of(path)).collect();
                let named = names.iter().map(String::as_str).zip(parts);
                let (labelled, _) = tasks::union(&named.collect::<Vec<_>>())
                    .context("the --images cannot be learned together")?;
                self.say(format_args!(
                    "together  {} images of {} classes",
                    labelled.train.len(),
                    labelled.classes.len()
                ));
                labelled
            }
        };
        let predictor = self.train(&clip, &labelled, start)?;
        let (train_accuracy, val_accuracy) = accuracies(predictor.as_ref(), &clip, &labelled)?;
        let epochs = predictor.training().map(|history| history.epochs.len());
        let kept = predictor.training().map(|history| history.kept);
        let notes = json!({
            "shots": self.shots,
            "subset": self.subset.name(),
            "data": match &drawn[..] {
                [(data, _)] => data.notes(),
                drawn => drawn.iter().map(|(data, _)| data.notes()).collect(),
            },
            "train_images": labelled.train.len(),
            "val_images": labelled.val.as_ref().map_or(0, |val| val.len()),
            "epochs": epochs,
            "kept_epoch": kept,
            "train_accuracy": train_accuracy,
            "val_accuracy": val_accuracy,
        });
        PromptFile::new(
            self.entry.slug,
            self.method.config(),
            &clip,
            &labelled.classes,
            self.seed,
            notes,
            predictor.as_ref(),
        )?
        .save(&self.out)
        .with_context(|| match self.checkpoint.path.exists() {
            true => format!(
                "the prompt cannot be written; the training is kept in {}, give the same command again",
                self.checkpoint.path.display()
            ),
            false => "the prompt cannot be written".to_owned(),
        })?;
        if self.checkpoint.path.exists() {
            let path = &self.checkpoint.path;
            std::fs::remove_file(path).with_context(|| {
                format!(
                    "the prompt is written, but {} cannot be removed",
                    path.display()
                )
            })?;
        }

        let learned = predictor.learned_numbers()?;
        let mut accuracy = format!("train {train_accuracy:.1} %");
        if let Some(val) = val_accuracy {
            accuracy.push_str(&format!(", val {val:.1} %"));
        }
        if let (Some(kept), Some(epochs)) = (kept, epochs) {
            accuracy.push_str(&format!(" (epoch {kept} of {epochs})"));
        }
        self.say(format_args!("accuracy  {accuracy}"));
        self.say(format_args!(
            "time      {}",
            duration(started.elapsed().as_secs_f64())
        ));
        self.say(format_args!(
            "wrote     {} ({}, {learned} learned numbers)",
            self.out.display(),
            self.entry.name
        ));
        let subset = match self.subset {
            Subset::All => String::new(),
            part => format!(" --subset {}", part.name()),
        };
        self.say(format_args!(
            "next      cliptune eval --clip {} --images {}{subset} --prompt {}",
            quoted(&self.clip),
            self.images
                .first()
                .map_or_else(String::new, |path| quoted(path)),
            quoted(&self.out)
        ));
        self.say(format_args!(
            "          cliptune predict --clip {} --prompt {} PHOTO.jpg",
            quoted(&self.clip),
            quoted(&self.out)
        ));
        Ok(())
    }

    /// Opens a data set and draws from it.
    fn draw(&self, images: &Path) -> Result<(Data, Draw)> {
        let mut show = Show::new(self.quiet);
        let data = Data::open(images, self.subset, self.skip_bad_images, &mut show)?;
        let draw = data.draw(self.shots, self.seed)?;
        data.in_words().into_iter().for_each(|line| self.say(line));
        self.say(format_args!(
            "drawn     {}",
            draw.in_words(self.shots, self.seed)
        ));
        for warning in &draw.warnings {
            self.say(format_args!("warning   {warning}"));
        }
        Ok((data, draw))
    }

    /// Encodes once what is seen again and again.
    fn encode(&self, clip: &Clip, labelled: &Labelled) -> Result<Labelled> {
        let needs = self.entry.needs;
        let recipe = self
            .method
            .config()
            .get("train")
            .map(recipe_of)
            .transpose()?;
        let views = recipe.and_then(|recipe| train::views_to_prepare(&recipe, needs, self.seed));
        let mut show = Show::new(self.quiet);
        data::encode(
            clip,
            labelled,
            needs,
            views.as_deref().unwrap_or(&[]),
            &self.cache,
            &mut show,
        )
    }

    /// What the training begins with, if not with the method's own start.
    fn start(&self, clip: &Clip) -> Result<Option<BTreeMap<String, Tensor>>> {
        if self.init.is_empty() {
            return Ok(None);
        }
        if self.method.config().get("train").is_none() {
            bail!("--init: {} is not trained", self.entry.name);
        }
        let mut files = Vec::with_capacity(self.init.len());
        for path in &self.init {
            let file = PromptFile::load(path).context("--init cannot be read")?;
            let name = path.display();
            if file.method != self.entry.slug {
                bail!(
                    "--init {name}: a prompt of {}, this is a fit of {}; begin with one of the same method",
                    file.method,
                    self.entry.slug
                );
            }
            file.check_clip(clip)
                .with_context(|| format!("--init {name} does not fit"))?;
            files.push(file);
        }
        let start = prompt_file::mean(&files).context("--init does not fit itself")?;
        self.say(match files.len() {
            1 => "begin     with what the prompt file holds".to_owned(),
            n => format!("begin     with the mean of {n} prompt files"),
        });
        Ok(Some(start))
    }

    fn train(
        &self,
        clip: &Clip,
        labelled: &Labelled,
        start: Option<BTreeMap<String, Tensor>>,
    ) -> Result<Box<dyn Predictor>> {
        let mut run = Run {
            seed: self.seed,
            progress: Box::new(Show::new(self.quiet)),
            checkpoint: Some(self.checkpoint.clone()),
            cancel: Arc::default(),
            start,
        };
        let training = Arc::new(AtomicBool::new(true));
        stop_on_interrupt(run.cancel.clone(), training.clone());
        let fitted = self.method.fit(clip, Task::Labelled(labelled), &mut run);
        training.store(false, Ordering::Relaxed);
        let path = &self.checkpoint.path;
        fitted.map_err(|error| match error {
            Error::Cancelled => anyhow!(
                "stopped; the training is kept in {}, the same command goes on from there",
                path.display()
            ),
            Error::Format {
                path: ref named, ..
            } if named == path => anyhow!(error).context(format!(
                "{} is in the way; --fresh throws it away",
                path.display()
            )),
            error => anyhow!(error).context("training failed"),
        })
    }
}

/// What a data set is called among others.
fn name_of(images: &Path) -> String {
    let name = images.file_stem().unwrap_or(images.as_os_str());
    name.to_string_lossy().into_owned()
}

/// The classes of several data sets as the setting `tasks`.
fn tasks_of(images: &[PathBuf], subset: Subset) -> Result<Value> {
    let task = |path: &PathBuf| {
        Ok(TaskClasses {
            name: name_of(path),
            n_cls: data::class_names(path, subset)?.len(),
        })
    };
    let tasks = Tasks::new(images.iter().map(task).collect::<Result<_>>()?)
        .context("the --images cannot be learned together")?;
    Ok(serde_json::to_value(tasks)?)
}

/// Percent of right answers on the images trained on and on those to choose by, of what is kept.
fn accuracies(
    predictor: &dyn Predictor,
    clip: &Clip,
    data: &Labelled,
) -> Result<(f64, Option<f64>)> {
    let val = match &data.val {
        Some(val) if !val.is_empty() => Some(train::accuracy(predictor, clip, val, &data.classes)?),
        _ => None,
    };
    Ok((
        train::accuracy(predictor, clip, &data.train, &data.classes)?,
        val,
    ))
}

/// While `training`, the first interrupt ends it after the step in hand; any other interrupt ends the program.
fn stop_on_interrupt(cancel: Arc<AtomicBool>, training: Arc<AtomicBool>) {
    let handler = move || {
        if !training.load(Ordering::Relaxed) || cancel.swap(true, Ordering::Relaxed) {
            exit(130);
        }
        out::say("\nstopping after this step; once more stops at once");
    };
    // Without a handler an interrupt ends the program at once, which loses no more than a few seconds.
    let _ = ctrlc::set_handler(handler);
}

fn recipe_of(value: &Value) -> Result<Recipe> {
    serde_json::from_value(value.clone()).context("the method's `train` is no recipe")
}

/// A path as it can be pasted into a shell.
fn quoted(path: &Path) -> String {
    let text = path.display().to_string();
    let plain = |c: char| c.is_alphanumeric() || "/._-+:@%".contains(c);
    match text.chars().all(plain) {
        true => text,
        false => format!("'{}'", text.replace('\'', r"'\''")),
    }
}
