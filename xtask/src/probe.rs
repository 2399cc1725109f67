//! `cargo xtask probe`: what a CLIP knows of the picture world, task by task.

use std::path::PathBuf;

use anyhow::{Result, bail};
use cliptune_core::Clip;
use cliptune_scenes::{SIDE, Task};

use crate::out;
use crate::pretrain::{known, local};

/// Judges a CLIP on every task of the picture world: zero-shot, and logistic regression on 16 pictures a class.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Weights, as `cliptune --clip` takes them.
    #[arg(long, default_value = "fixtures/clip")]
    clip: PathBuf,
}

pub(crate) fn main(args: &Args) -> Result<()> {
    let clip = Clip::load(&args.clip)?;
    if clip.preprocess().resolution != SIDE {
        bail!(
            "{}: takes images of {} pixels, not of {SIDE}",
            args.clip.display(),
            clip.preprocess().resolution
        );
    }
    out::line("task              classes  chance  zero-shot  logistic, 16 shots  headroom");
    for task in Task::ALL {
        let k = known(&clip, task)?;
        out::line(&format!(
            "{:<16} {:>8} {:>7.1} {:>10.1} {:>19.1} {:>9.1}",
            task.slug(),
            k.classes,
            100.0 / k.classes as f64,
            k.zero_shot,
            k.logistic,
            k.logistic - k.zero_shot
        ));
    }
    let l = local(&clip, 1_000)?;
    out::line(&format!(
        "\npatches under an object name its shape: {:.1} % among all shapes, {:.1} % among those present (chance {:.1} %)",
        l.among_all, l.among_present, l.chance_present
    ));
    out::line(&format!(
        "shapes of a picture with several: mAP {:.1} % from the global feature, {:.1} % with the best patch added (chance {:.1} %)",
        l.global_map, l.local_map, l.chance_map
    ));
    out::line(&format!("logit scale {:.1}", clip.scale()));
    Ok(())
}
