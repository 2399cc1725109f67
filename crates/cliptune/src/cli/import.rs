//! `cliptune import`: a checkpoint of the authors' code as a prompt file.

use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use cliptune::checkpoint::read_torch_state;
use cliptune::method::Imported;
use cliptune::prompt_file::PromptFile;
use cliptune::registry;
use serde_json::json;

use super::data;
use super::model::ModelArgs;
use super::out;
use super::predictor::read_classes;
use super::settings::{Setting, configure};

/// Turn a checkpoint of the authors' code into a prompt file
#[derive(Debug, clap::Args)]
pub(crate) struct Import {
    #[command(flatten)]
    model: ModelArgs,
    /// Method that made the checkpoint, as `cliptune list` prints it
    #[arg(long, value_name = "METHOD")]
    method: String,
    /// The authors' file, for example prompt_learner/model.pth.tar-50, or the folder above a model's parts
    #[arg(long, value_name = "FILE")]
    checkpoint: PathBuf,
    /// Class names it was trained on: a file with one name a line, or names with commas
    #[arg(
        long,
        value_name = "NAMES",
        required_unless_present = "images",
        conflicts_with = "images"
    )]
    classes: Option<String>,
    /// Data it was trained on, for the class names
    #[arg(long, value_name = "DIR")]
    images: Option<PathBuf>,
    /// Half of the data's classes it was trained on [default: all]
    #[arg(long, value_enum, value_name = "PART", requires = "images")]
    subset: Option<data::Subset>,
    /// A setting that the checkpoint does not hold, for example class_token_position=front
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// Prompt file to write
    #[arg(short, long, value_name = "FILE")]
    out: PathBuf,
}

impl Import {
    pub(crate) fn run(&self) -> Result<()> {
        let entry = registry::find(&self.method)?;
        let Some(import) = entry.import else {
            let able: Vec<&str> = registry::methods()
                .iter()
                .filter(|e| e.import.is_some())
                .map(|e| e.slug)
                .collect();
            bail!(
                "--method {}: checkpoints of {} cannot be imported; those of {} can",
                entry.slug,
                entry.name,
                able.join(", ")
            );
        };
        let flags: Vec<Setting> = self
            .set
            .iter()
            .map(|set| Setting::from_flag(set))
            .collect::<Result<_>>()?;
        let settings = configure(&entry, &[], &flags)?.config();
        let classes = match (&self.classes, &self.images) {
            (Some(given), _) => read_classes(given)?,
            (None, Some(images)) => data::class_names(images, self.subset.unwrap_or_default())?,
            (None, None) => {
                bail!("--classes or --images is needed: the checkpoint holds no class names")
            }
        };
        out::check_writable(&self.out)?;
        let state = read_torch_state(&self.checkpoint).context("the checkpoint cannot be read")?;
        let clip = self.model.load()?;
        let Imported { config, predictor } = import(&state, &settings, &clip, &classes)
            .with_context(|| format!("{}: does not fit", self.checkpoint.display()))?;
        let notes = json!({"imported_from": entry.paper.code, "epoch": state.epoch});
        let seed = 0;
        PromptFile::new(
            entry.slug,
            config,
            &clip,
            &classes,
            seed,
            notes,
            predictor.as_ref(),
        )?
        .save(&self.out)
        .context("the prompt cannot be written")?;
        if !self.model.machine.quiet {
            out::say(format_args!(
                "wrote     {} ({} for {} classes)",
                self.out.display(),
                entry.name,
                classes.len()
            ));
        }
        Ok(())
    }
}
