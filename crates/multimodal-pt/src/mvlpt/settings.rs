//! What MVLPT can be told.

use cliptune_core::context::{self, Start};
use cliptune_core::method::Settings;
use cliptune_core::prompt::ClassTokenPosition;
use cliptune_core::tasks::Tasks;
use cliptune_core::train::{Augment, Recipe};
use cliptune_core::{Error, Result};
use serde::{Deserialize, Serialize};

use super::coupling::ProjectMethod;
use crate::coupling::{Interaction, check_rate};

/// What is learned.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Variant {
    /// A text context.
    Coop,
    /// Image prompts; class features come from a hand-written sentence.
    Vpt,
    /// Both, coupled by a network.
    #[default]
    Upt,
    /// A text context that a small network shifts for each image; the class name stands behind it.
    Cocoop,
}

impl Variant {
    /// Whether image prompts are learned.
    pub(super) fn sees(self) -> bool {
        matches!(self, Self::Vpt | Self::Upt)
    }

    /// Context vectors, and image prompts of a block, of the authors' runs.
    pub(super) fn papers(self) -> usize {
        match self {
            Self::Coop | Self::Vpt => 16,
            Self::Upt | Self::Cocoop => 4,
        }
    }
}

/// What the classes of other tasks count in the loss of an image.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TaskMask {
    /// As much as those of its own: one softmax over all tasks.
    #[default]
    None,
    /// A logit of 0 each, as with the authors' `MULTITASK_LABEL_PERTASK`.
    Zero,
    /// Nothing.
    NegInf,
}

/// Settings of [`super::Mvlpt`]; the defaults are the authors'.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct MvlptConfig {
    /// What is learned.
    pub variant: Variant,
    /// Context vectors, at least 1. `None`: as many as `ctx_init` has tokens, else 16, or 4 beside other things learned.
    pub n_ctx: Option<usize>,
    /// Words to start from, one token each; `None` draws from N(0, 0.02²).
    pub ctx_init: Option<String>,
    /// One context per class instead of one for all.
    pub class_specific: bool,
    /// Where the class name sits among the context tokens.
    pub class_token_position: ClassTokenPosition,
    /// Image prompts of each block, at least 1. `None`: 16, with `upt` 4.
    pub n_ctx_vision: Option<usize>,
    /// Whether every block has image prompts of its own; else those of the first run on.
    pub vpt_deep: bool,
    /// Width in which image prompts are learned, before a map to the tower's; `None`: the tower's own, without a map.
    pub vpt_project: Option<usize>,
    /// Share of an image prompt's numbers that a training step drops, below 1.
    pub vpt_dropout: f64,
    /// What couples the prompts of both towers (`upt`).
    pub project_method: ProjectMethod,
    /// The common width in which they are coupled.
    pub project_dim: usize,
    /// Whether coupled prompts see one another.
    pub interaction: Interaction,
    /// The tasks that the classes divide into, in order; empty for a single task.
    pub tasks: Tasks,
    /// What the classes of other tasks count.
    pub task_mask: TaskMask,
    /// How it is trained: 200 epochs.
    pub train: Recipe,
}

impl Default for MvlptConfig {
    fn default() -> Self {
        Self {
            variant: Variant::Upt,
            n_ctx: None,
            ctx_init: None,
            class_specific: false,
            class_token_position: ClassTokenPosition::Middle,
            n_ctx_vision: None,
            vpt_deep: true,
            vpt_project: None,
            vpt_dropout: 0.0,
            project_method: ProjectMethod::Transformer,
            project_dim: 128,
            interaction: Interaction::None,
            tasks: Tasks::default(),
            task_mask: TaskMask::None,
            // The image tower runs at every step whatever the view.
            train: Recipe {
                epochs: Some(200),
                augment: Augment::CropFlip,
                ..Recipe::default()
            },
        }
    }
}

impl MvlptConfig {
    /// What the text context starts from.
    pub(super) fn start(&self) -> Start {
        let papers = self.variant.papers();
        Start {
            class_specific: self.class_specific,
            position: match self.variant {
                Variant::Cocoop => ClassTokenPosition::End,
                _ => self.class_token_position,
            },
            ..Start::of_words(self.ctx_init.as_deref(), self.n_ctx, papers)
        }
    }

    /// Refuses settings of what the variant does not learn.
    fn check_variant(&self) -> Result<()> {
        use Variant::{Cocoop, Coop, Upt, Vpt};
        let words = self.ctx_init.as_deref();
        let given: [(&str, Option<String>, &[Variant]); 5] = [
            (
                "n_ctx",
                self.n_ctx.map(|n| n.to_string()),
                &[Coop, Upt, Cocoop],
            ),
            (
                "ctx_init",
                context::initial_words(words),
                &[Coop, Upt, Cocoop],
            ),
            (
                "class_specific",
                self.class_specific.then(|| "true".to_owned()),
                &[Coop, Upt],
            ),
            (
                "n_ctx_vision",
                self.n_ctx_vision.map(|n| n.to_string()),
                &[Vpt, Upt],
            ),
            (
                "vpt_project",
                self.vpt_project.map(|n| n.to_string()),
                &[Vpt, Upt],
            ),
        ];
        for (key, value, variants) in given {
            if let Some(value) = value.filter(|_| !variants.contains(&self.variant)) {
                let named: Vec<_> = variants
                    .iter()
                    .map(|v| format!("{v:?}").to_lowercase())
                    .collect();
                let expected = format!("a setting of variant = {}", named.join(", "));
                return Err(Error::config(key, value, expected));
            }
        }
        Ok(())
    }
}

impl Settings for MvlptConfig {
    const SLUG: &'static str = super::ENTRY.slug;

    fn check(&self) -> Result<()> {
        self.check_variant()?;
        self.start().check()?;
        let at_least_one = [
            ("n_ctx_vision", self.n_ctx_vision),
            ("vpt_project", self.vpt_project),
            ("project_dim", Some(self.project_dim)),
        ];
        if let Some((key, _)) = at_least_one.iter().find(|(_, n)| *n == Some(0)) {
            return Err(Error::config(key, 0, "at least 1"));
        }
        check_rate("vpt_dropout", self.vpt_dropout)?;
        self.tasks.check()?;
        if self.tasks.is_empty() && self.task_mask != TaskMask::None {
            let expected = "names and numbers of classes of the tasks, for task_mask";
            return Err(Error::config("tasks", "[]", expected));
        }
        self.train.check()
    }
}
