//! MVLPT: prompts that are learned on many tasks together, and from there on each task alone (Shen et al., "Multitask
//! Vision-Language Prompt Tuning", WACV 2024, arXiv 2211.11720).
//!
//! What is learned is a text context (CoOp), image prompts for every block (VPT), both, coupled by a small network (UPT), or a
//! context that each image shifts (CoCoOp). Many tasks are one data set whose classes follow one another, with one softmax over
//! all of them: [`cliptune_core::tasks::union`]. A task alone begins with the mean of what several seeds learned:
//! [`cliptune_core::prompt_file::mean`] and [`Run::start`].
//!
//! # Differs from the authors' code
//! - Everything learned stays in f32; theirs is f16 but for the network.
//! - `interaction = "attention"` lets coupled prompts see one another; the default is what the code does: its transformer takes
//!   the sequence for a batch.
//! - `task_mask = "neg_inf"` leaves classes of other tasks out; theirs, `zero`, lets each count as a logit of 0.
//! - `project_method = "mlp"` is a GELU; theirs names a class that does not exist, and fails.
//! - `CUT_CONTEXTLEN` is no setting: every sentence ends at its own end token here, with the same numbers.
//! - Initial words together with class-specific contexts are an error; theirs drops the second silently.
//! - The last epoch is kept; the authors keep the one that is best on validation images, `train.keep = "best_val"`.

mod coupling;
mod settings;
mod vision;

use candle_core::Tensor;
use cliptune_core::checkpoint::TorchState;
use cliptune_core::conditional::Conditional;
use cliptune_core::context::{self, Context};
use cliptune_core::learned::{self, Learner};
use cliptune_core::method::{self, Classifier, Entry, Imported, Method, Paper, TextClassifier};
use cliptune_core::prompt::{ClassTokenPosition, ClassTokens};
use cliptune_core::tasks::Tasks;
use cliptune_core::templates::{DEFAULT, Sentences};
use cliptune_core::train::{Batch, Loss, Objective, Step};
use cliptune_core::{
    Classes, Clip, Error, ImageBatch, ImageNeeds, Labelled, Learned, Params, Result, Run, ops,
};
use serde_json::Value;

use self::coupling::Coupling;
pub use self::coupling::ProjectMethod;
pub use self::settings::{MvlptConfig, TaskMask, Variant};
use self::vision::Vision;
use crate::sides::{self, PromptedClassifier};

/// The registry's entry.
pub const ENTRY: Entry = Entry {
    slug: "mvlpt",
    name: "MVLPT",
    family: "multimodal-pt",
    paper: Paper {
        title: "Multitask Vision-Language Prompt Tuning",
        authors: "Shen, Yang, Zhang, Zhai, Gonzalez, Keutzer, Darrell",
        venue: "WACV 2024",
        arxiv: "2211.11720",
        code: "sIncerass/MVLPT@6fa518b",
    },
    summary: "Learns text prompts, image prompts or both, coupled by a small network, on many tasks together, to begin with on each of others.",
    learns: "ctx: n_ctx vectors of the text tower's width; vpt_embeddings: n_ctx_vision vectors for each block of the image tower; mvlpt_proj: the network that couples them",
    cost: "both towers forward and backward at each step: the text tower for every class of all tasks, the image tower for every image; one of them alone for the variants coop and vpt",
    needs: ImageNeeds::Pixels,
    defaults: method::defaults_of::<MvlptConfig>,
    configure: method::configure::<MvlptConfig>,
    load: learned::load::<Mvlpt>,
    import: Some(import),
};

impl Method for MvlptConfig {
    type Data = Labelled;
    type Fitted = Learned<Mvlpt>;

    fn fit(&self, clip: &Clip, data: &Labelled, run: &mut Run) -> Result<Learned<Mvlpt>> {
        Learned::fit(self, &self.train, clip, data, run)
    }
}

/// As [`Learned::import`]; older checkpoints call the coupling network `upt_proj`.
///
/// # Errors
/// As [`Learned::import`].
pub fn import(
    state: &TorchState,
    settings: &Value,
    clip: &Clip,
    classes: &Classes,
) -> Result<Imported> {
    let present = |key: &String| key.replace("upt_proj", NETWORK);
    let tensors = state.tensors.iter();
    let renamed = TorchState {
        tensors: tensors.map(|(key, t)| (present(key), t.clone())).collect(),
        epoch: state.epoch,
    };
    learned::import::<Mvlpt>(&renamed, settings, clip, classes)
}

/// What the keys of the coupling network and its maps begin with.
const NETWORK: &str = "mvlpt_proj";
/// The key of the context that images shift.
const SHIFTED: &str = "cocoop_ctx";

/// Where the classes' features come from.
#[derive(Debug)]
enum Text {
    Learned(Context),
    Conditional(Conditional),
    HandWritten(Sentences),
}

/// The prompts that enter the towers.
#[derive(Clone, Debug)]
pub struct MvlptPrompts {
    /// `(n_ctx, text width)`, or `(n_cls, n_ctx, text width)` if class-specific, where a context is learned for all images.
    pub text: Option<Tensor>,
    /// `(blocks with prompts of their own, n_ctx_vision, width)`, where image prompts are learned.
    pub visual: Option<Tensor>,
}

/// Learned prompts of one tower or both.
#[derive(Debug)]
pub struct Mvlpt {
    text: Text,
    vision: Option<Vision>,
    coupling: Option<Coupling>,
    position: ClassTokenPosition,
    tasks: Tasks,
    task_mask: TaskMask,
}

impl Mvlpt {
    /// The prompts as they enter the towers; gradients flow to all that makes them.
    ///
    /// # Errors
    /// Whatever the tensor library refuses.
    pub fn prompts(&self) -> Result<MvlptPrompts> {
        let text = match &self.text {
            Text::Learned(context) => Some(context.tensor().clone()),
            _ => None,
        };
        let visual = self.vision.as_ref().map(Vision::tensor).transpose()?;
        let (text, visual) = match (&self.coupling, text, visual) {
            (Some(coupling), Some(text), Some(visual)) => {
                let (text, visual) = coupling.forward(&text, &visual)?;
                (Some(text), Some(visual))
            }
            (_, text, visual) => (text, visual),
        };
        Ok(MvlptPrompts { text, visual })
    }

    /// Text features of the classes, `(n_cls, embed_dim)`: raw, those of hand-written sentences of unit length; with `cocoop`
    /// before any image shifts the context.
    ///
    /// # Errors
    /// [`Error::PromptTooLong`]; [`Error::Prompt`] if class-specific contexts meet another number of classes.
    pub fn text_features(
        &self,
        clip: &Clip,
        classes: &ClassTokens,
        prompts: &MvlptPrompts,
    ) -> Result<Tensor> {
        match &self.text {
            Text::Learned(context) => {
                let text = prompts.text.as_ref().unwrap_or(context.tensor());
                let woven = classes.weave(text, context.words(), self.position)?;
                clip.text().encode(&woven)
            }
            Text::Conditional(conditional) => conditional.context.text_features(clip, classes),
            Text::HandWritten(sentences) => sentences.mean(clip, classes),
        }
    }

    /// The context that each image shifts, with `cocoop`.
    pub fn conditional(&self) -> Option<&Conditional> {
        match &self.text {
            Text::Conditional(conditional) => Some(conditional),
            _ => None,
        }
    }

    /// Raw image features, `(batch, embed_dim)`; in training, a step's dropout is drawn.
    ///
    /// # Errors
    /// [`Error::Data`] if the images are not what [`Objective::needs`] asks for, [`Error::Shape`] if they are not of the
    /// tower's resolution.
    pub fn image_features(
        &self,
        clip: &Clip,
        images: &ImageBatch,
        prompts: &MvlptPrompts,
        training: Option<Step>,
    ) -> Result<Tensor> {
        match (&self.vision, &prompts.visual) {
            (Some(vision), Some(visual)) => {
                let training = training.map(|step| (images.len(), step));
                let declared = vision.declared(&vision.tokens(visual)?, training)?;
                clip.image()
                    .encode_prompted(images.pixels_or_patches()?, &declared)
            }
            _ => Ok(images.features()?.clone()),
        }
    }

    /// Logits of a training step over the classes of all tasks, `(batch, n_cls)`.
    ///
    /// # Errors
    /// As [`Mvlpt::image_features`] and [`Mvlpt::text_features`].
    pub fn training_logits(
        &self,
        clip: &Clip,
        images: &ImageBatch,
        classes: &ClassTokens,
        step: Step,
    ) -> Result<Tensor> {
        let prompts = self.prompts()?;
        let images = self.image_features(clip, images, &prompts, Some(step))?;
        match &self.text {
            Text::Conditional(conditional) => conditional.logits(clip, classes, &images),
            _ => {
                let text = self.text_features(clip, classes, &prompts)?;
                clip.cosine_logits(&images, &text)
            }
        }
    }

    /// Logits as [`TaskMask`] leaves them for images of these tasks.
    ///
    /// # Errors
    /// [`Error::Data`] if there is no such task.
    pub fn masked(&self, logits: &Tensor, tasks: &[usize]) -> Result<Tensor> {
        match self.task_mask {
            TaskMask::None => Ok(logits.clone()),
            TaskMask::Zero => Ok((logits * self.tasks.inside(tasks)?)?),
            TaskMask::NegInf => {
                // So low that its exponential is 0. An infinity would make NaN of a soft target of 0.
                const LOW: f64 = 1e30;
                let offset = self.tasks.inside(tasks)?.affine(LOW, -LOW)?;
                Ok((logits + offset)?)
            }
        }
    }

    /// The loss of images that may show several classes: soft cross entropy with `targets (batch, n_cls)`, each divided by its
    /// sum. `tasks` are those that the images belong to; without [`MvlptConfig::task_mask`] nobody asks.
    ///
    /// # Errors
    /// As [`Objective::loss`] and [`ops::soft_cross_entropy`].
    pub fn loss_of_targets(
        &self,
        clip: &Clip,
        images: &ImageBatch,
        classes: &ClassTokens,
        (targets, tasks): (&Tensor, &[usize]),
        step: Step,
    ) -> Result<Loss> {
        let logits = self.training_logits(clip, images, classes, step)?;
        let logits = self.masked(&logits, tasks)?;
        Ok(Loss {
            total: ops::soft_cross_entropy(&logits, targets)?,
            terms: Vec::new(),
            logits: Some(logits),
        })
    }
}

impl Learner for Mvlpt {
    type Config = MvlptConfig;

    fn start(
        config: &MvlptConfig,
        clip: &Clip,
        classes: &Classes,
        params: &mut Params,
    ) -> Result<Self> {
        config.tasks.check_classes(classes.len())?;
        let (variant, start) = (config.variant, config.start());
        let text = match variant {
            Variant::Coop | Variant::Upt => {
                Text::Learned(start.context(params, clip.text(), classes)?)
            }
            Variant::Cocoop => {
                let tower = clip.text();
                let context =
                    params.below("cocoop_", |params| start.context(params, tower, classes))?;
                Text::Conditional(Conditional::new(params, context, clip)?)
            }
            Variant::Vpt => {
                // Refuses names that are too long before any work.
                ClassTokens::new(clip.text(), classes)?.fill(DEFAULT)?;
                Text::HandWritten(Sentences::new(vec![DEFAULT.to_owned()])?)
            }
        };
        let vision = variant.sees().then(|| {
            let n_ctx = config.n_ctx_vision.unwrap_or(variant.papers());
            let (deep, project) = (config.vpt_deep, config.vpt_project);
            Vision::new(params, clip, n_ctx, deep, project, config.vpt_dropout)
        });
        let coupling = match variant {
            Variant::Upt => {
                let widths = (clip.text().width(), clip.arch().vit_sizes()?.1);
                let method = config.project_method;
                let learned = config.vpt_project.unwrap_or(widths.1);
                if learned != widths.1 && method != ProjectMethod::Identity {
                    let expected = format!(
                        "the network couples prompts of the image tower's width {}; leave it out, or take project_method = \"identity\"",
                        widths.1
                    );
                    return Err(Error::config("vpt_project", learned, expected));
                }
                Coupling::new(
                    params,
                    method,
                    config.interaction,
                    widths,
                    config.project_dim,
                )?
            }
            _ => None,
        };
        Ok(Self {
            text,
            vision: vision.transpose()?,
            coupling,
            position: start.position,
            tasks: config.tasks.clone(),
            task_mask: config.task_mask,
        })
    }

    fn complete(
        config: &mut MvlptConfig,
        given: &Value,
        state: &TorchState,
        clip: &Clip,
    ) -> Result<()> {
        let held = |key: &str| state.tensors.contains_key(key);
        let held_below = |prefix: &str| state.tensors.keys().any(|key| key.starts_with(prefix));
        let (text, vision) = (held(context::KEY), held(vision::FIRST));
        config.variant = match (held(SHIFTED), held_below(NETWORK) || text && vision) {
            (true, _) => Variant::Cocoop,
            (_, true) => Variant::Upt,
            _ if vision => Variant::Vpt,
            _ => Variant::Coop,
        };
        let key = match config.variant {
            Variant::Coop | Variant::Upt => Some(context::KEY),
            Variant::Cocoop => Some(SHIFTED),
            Variant::Vpt => None,
        };
        let sizes = key.map(|key| context::sizes_of(key, state, clip.text()));
        let sizes = sizes.transpose()?;
        config.n_ctx = sizes.map(|(_, n_ctx)| n_ctx);
        config.class_specific = sizes.is_some_and(|(contexts, _)| contexts.is_some());
        config.ctx_init = key.and_then(|_| context::words_in(given));
        (config.n_ctx_vision, config.vpt_project) = (None, None);
        if config.variant.sees() {
            let [_, n_ctx] = sides::leading_of(state, vision::FIRST)?;
            config.n_ctx_vision = Some(n_ctx);
            config.vpt_deep = held(vision::DEEPER);
            if held_below(vision::PROJECTION) {
                let width = state.tensors[vision::FIRST].dims().last();
                config.vpt_project = width.copied();
            }
        }
        if config.variant == Variant::Upt {
            let blocks = held_below(&format!("{NETWORK}.resblocks"));
            config.project_method = match (blocks, held_below(NETWORK), config.project_method) {
                (true, ..) => ProjectMethod::Transformer,
                (_, true, _) | (.., ProjectMethod::Mlp) => ProjectMethod::Mlp,
                _ => ProjectMethod::Identity,
            };
            let common = [
                ".resblocks.0.ln_1.bias",
                "_ctx_coop_pre.bias",
                "_ctx_vpt_pre.bias",
            ];
            let common = common.map(|end| state.tensors.get(&format!("{NETWORK}{end}")));
            if let Some(bias) = common.into_iter().flatten().next() {
                config.project_dim = bias.elem_count();
            }
        }
        Ok(())
    }
}

impl Objective for Mvlpt {
    /// Without image prompts the image tower is frozen, and features will do.
    fn needs(&self) -> ImageNeeds {
        match self.vision {
            Some(_) => ImageNeeds::Pixels,
            None => ImageNeeds::GlobalFeatures,
        }
    }

    fn tasks(&self) -> Option<&Tasks> {
        Some(&self.tasks).filter(|tasks| !tasks.is_empty())
    }

    fn classifier<'a>(
        &'a self,
        clip: &'a Clip,
        classes: &Classes,
    ) -> Result<Box<dyn Classifier + 'a>> {
        let tokens = ClassTokens::new(clip.text(), classes)?;
        match &self.text {
            Text::Conditional(conditional) => return conditional.classifier(clip, classes),
            Text::Learned(context) => context.check_serves(classes)?,
            Text::HandWritten(_) => {}
        }
        let prompts = self.prompts()?;
        let text = self.text_features(clip, &tokens, &prompts)?;
        Ok(match (&self.vision, &prompts.visual) {
            (Some(vision), Some(visual)) => {
                let declared = vision.declared(&vision.tokens(visual)?.detach(), None)?;
                Box::new(PromptedClassifier::new(clip, declared, &text)?)
            }
            _ => {
                let text = ops::unit_length(&text.detach(), "a text feature")?;
                Box::new(TextClassifier::new(clip, text))
            }
        })
    }

    fn loss(&self, clip: &Clip, batch: &Batch<'_>, step: Step) -> Result<Loss> {
        let mut logits = self.training_logits(clip, batch.images, batch.classes, step)?;
        if self.task_mask != TaskMask::None {
            logits = self.masked(&logits, &self.tasks.of_labels(batch.labels)?)?;
        }
        Loss::cross_entropy(logits, batch.labels)
    }
}
