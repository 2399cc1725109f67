//! SubPT: CoOp whose gradients stay in the directions that its early epochs took, and the novel feature learner, NFL (Ma et
//! al., IEEE TCSVT 2023, arXiv 2211.02219).
//!
//! CoOp learns what generalises first and what does not later. So it is trained twice. The first training stops after `f`
//! epochs; the contexts after each of them, minus their mean, have the main directions `U (r, n_ctx · width)` (principal
//! component analysis). The second starts over, from the same start, with every gradient projected (eq. 5):
//!
//! `g ← Uᵀ·(U·g)`, with `L = CE(scale · cos(f(x), g([ctx, name_y])), y)`.
//!
//! NFL holds the text features of *novel* class names, of which there are no images, to those of hand-written sentences:
//! `L = CE + λ · mean_j (1 − cos(g([ctx, novel_j]), a_j))`, where `a_j` is the mean unit feature of CLIP's eighty sentences
//! and the data set's own. Both are independent of each other, and together the gradient of the sum is projected.
//!
//! Names of the classes that a model is tested on, given as novel ones, make the test transductive in the names: say so
//! beside the result. The authors do this base to new; elsewhere they give 100 names of ImageNet ([`novel_of_imagenet`]).
//!
//! # Differs from the authors' code
//! - One run makes both trainings; theirs writes checkpoints and components to files that the next script reads. The first
//!   stops after epoch `f`, of which the result is the same.
//! - Context, gradients and components are f32, and the components are found in f64; theirs casts them to f16, which makes
//!   `Uᵀ·U` a projection to about 1e-3 only.
//! - Initial words are right-aligned in the context in both trainings; theirs differs between the two.
//! - Weight decay and momentum act behind the projection, as in their code, so the context leaves its start's plane by
//!   shrinking. `confine_decay` projects the decay too.
//! - `restart = "first_epoch"` does what their scripts ask for with a key that no code reads.
//! - The anchors are computed from the names; theirs are files that are not published.
//! - Rows that span fewer directions than asked for are an error; theirs returns arbitrary directions.
//! - The novel loss is the cosine one; theirs lists a squared one that stops with an unexpected argument.
//! - Images are seen without random crops unless `train.augment = "crop_flip"`.

use std::collections::BTreeMap;
use std::path::PathBuf;

use candle_core::Tensor;
use cliptune_core::checkpoint::TorchState;
use cliptune_core::context::{self, Context, Length, Start};
use cliptune_core::learned::{self, Learner};
use cliptune_core::method::{self, Classifier, Entry, Method, Paper, Settings};
use cliptune_core::optim::OptimizerConfig;
use cliptune_core::prompt::{ClassTokenPosition, ClassTokens};
use cliptune_core::subspace::Subspace;
use cliptune_core::templates::{self, Ensemble, Sentences};
use cliptune_core::train::{self, Batch, Loss, Objective, Recipe, Step};
use cliptune_core::{
    Classes, Clip, Error, Gradients, ImageNeeds, Labelled, Learned, Params, Result, Run, ops,
};
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// The registry's entry.
pub const ENTRY: Entry = Entry {
    slug: "subpt",
    name: "SubPT",
    family: "text-pt",
    paper: Paper {
        title: "Understanding and Mitigating Overfitting in Prompt Tuning for Vision-Language Models",
        authors: "Ma, Liu, Deng, Xie, Dong, Xu",
        venue: "IEEE TCSVT 2023",
        arxiv: "2211.02219",
        code: "machengcheng2016/Subspace-Prompt-Learning@d546764",
    },
    summary: "Trains CoOp twice, the second time only along the main directions of the first epochs; can hold novel class names to hand-written sentences as well.",
    learns: "ctx: n_ctx vectors of the text tower's width, shared by all classes or one set per class",
    cost: "CoOp's steps, and those of the early epochs once more; novel names are encoded like classes",
    needs: ImageNeeds::GlobalFeatures,
    defaults: method::defaults_of::<SubPtConfig>,
    configure: method::configure::<SubPtConfig>,
    load: learned::load::<SubPt>,
    import: Some(learned::import::<SubPt>),
};

/// Which of its two parts are at work.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Variant {
    /// The subspace alone.
    #[default]
    Sub,
    /// The novel feature learner alone, trained once.
    Nfl,
    /// Both.
    SubNfl,
}

/// Where the second training starts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Restart {
    /// Where the first one did.
    #[default]
    Start,
    /// At its context after the first epoch.
    FirstEpoch,
}

/// Classes of ImageNet whose names are the authors' novel ones where the data set has no new classes, in their order.
const NOVEL_OF_IMAGENET: [usize; 100] = [
    717, 988, 619, 257, 327, 691, 760, 993, 929, 553, 123, 625, 741, 742, 642, 851, 653, 925, 634,
    818, 490, 769, 501, 832, 994, 338, 401, 455, 430, 916, 138, 31, 537, 247, 533, 530, 937, 855,
    762, 874, 604, 340, 838, 888, 892, 128, 719, 858, 20, 336, 670, 699, 751, 588, 346, 913, 465,
    356, 406, 476, 189, 674, 801, 147, 826, 146, 581, 0, 135, 285, 433, 420, 449, 418, 438, 206,
    866, 175, 370, 463, 930, 72, 923, 615, 242, 571, 254, 139, 985, 310, 121, 958, 137, 55, 443,
    692, 523, 863, 59, 186,
];

/// The authors' 100 novel names for few-shot learning and domain generalisation, for [`SubPtConfig::novel_classes`]: from
/// all 1,000 names of ImageNet, in the order of their WordNet ids.
///
/// # Errors
/// [`Error::Data`] for another number of names.
pub fn novel_of_imagenet(imagenet: &Classes) -> Result<Vec<String>> {
    let names = imagenet.names();
    if names.len() != 1000 {
        return Err(Error::Data(format!(
            "ImageNet has 1000 classes, these are {}",
            names.len()
        )));
    }
    let novel = NOVEL_OF_IMAGENET.iter();
    Ok(novel.map(|&label| names[label].clone()).collect())
}

/// Settings of [`SubPt`]; the defaults are the paper's.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SubPtConfig {
    /// Which of its two parts are at work.
    pub variant: Variant,
    /// Context tokens per prompt.
    pub n_ctx: usize,
    /// Words to start from, right-aligned in the context, with zeros in front of them; `None` draws from N(0, 0.02²).
    pub ctx_init: Option<String>,
    /// One context per class instead of one for all; not with NFL.
    pub class_specific: bool,
    /// Where the class name sits among the context tokens; `end` with NFL.
    pub class_token_position: ClassTokenPosition,
    /// Epochs that give the subspace (paper: t_early). `None` takes the paper's: 10, 20, 30, 40, 50 for 1, 2, 4, 8, 16
    /// shots, and no more than there are.
    pub n_early: Option<usize>,
    /// Directions of the subspace (paper: r), below `n_early`. `None` takes the paper's: 5 for 1 shot, else 10, and no more
    /// than the early epochs can give.
    pub rank: Option<usize>,
    /// Where the second training starts.
    pub restart: Restart,
    /// Projects the weight decay as well, so that the context stays in the plane through its start; needs SGD.
    pub confine_decay: bool,
    /// Names of the novel classes of NFL.
    pub novel_classes: Vec<String>,
    /// Weight of the novel loss (paper: λ).
    pub lambda: f64,
    /// The data set's own sentence, which joins the eighty of the anchors; neither this nor `dataset` leaves them alone.
    pub template: Option<String>,
    /// Takes that of the authors' code for this data set, type of the class first; ImageNet adds none.
    pub dataset: Option<String>,
    /// How it is trained, both times.
    pub train: Recipe,
}

impl Default for SubPtConfig {
    fn default() -> Self {
        Self {
            variant: Variant::Sub,
            n_ctx: 16,
            ctx_init: None,
            class_specific: false,
            class_token_position: ClassTokenPosition::End,
            n_early: None,
            rank: None,
            restart: Restart::Start,
            confine_decay: false,
            novel_classes: Vec::new(),
            lambda: 1.0,
            template: None,
            dataset: None,
            train: Recipe::default(),
        }
    }
}

impl SubPtConfig {
    fn start(&self) -> Start {
        Start {
            length: Length::Fixed(self.n_ctx),
            words: context::initial_words(self.ctx_init.as_deref()),
            class_specific: self.class_specific,
            position: self.class_token_position,
        }
    }

    fn projects(&self) -> bool {
        self.variant != Variant::Nfl
    }

    fn learns_novel(&self) -> bool {
        self.variant != Variant::Sub
    }

    fn check_subspace(&self) -> Result<()> {
        if let Some(n_early) = self.n_early {
            let epochs = self.train.epochs.unwrap_or(usize::MAX);
            if n_early < 2 || n_early > epochs {
                let expected = "from 2 to as many as there are epochs";
                return Err(Error::config("n_early", n_early, expected));
            }
        }
        if let Some(rank) = self.rank
            && (rank == 0 || self.n_early.is_some_and(|n_early| rank >= n_early))
        {
            let expected = "at least 1 and below n_early: as many contexts, minus their mean, span one direction less";
            return Err(Error::config("rank", rank, expected));
        }
        if self.confine_decay && !matches!(self.train.optimizer, OptimizerConfig::Sgd { .. }) {
            let expected = "needs train.optimizer.kind = \"sgd\": another optimiser leaves the subspace by itself";
            return Err(Error::config("confine_decay", true, expected));
        }
        Ok(())
    }

    fn check_novel(&self) -> Result<()> {
        if self.novel_classes.is_empty() {
            let expected = "at least one novel class name for the novel feature learner";
            return Err(Error::config("novel_classes", "[]", expected));
        }
        if self.class_specific {
            let expected = "novel classes have no context of their own; set it to false";
            return Err(Error::config("class_specific", true, expected));
        }
        let position = self.class_token_position;
        if position != ClassTokenPosition::End {
            let expected = "end, with the novel feature learner";
            return Err(Error::config("class_token_position", position, expected));
        }
        method::check_weight("lambda", self.lambda)?;
        self.anchors().map(|_| ())
    }

    /// The sentences whose features the novel names are held to.
    fn anchors(&self) -> Result<Sentences> {
        let dataset = self.dataset.as_deref();
        let own = templates::chosen(self.template.as_deref(), dataset, templates::type_first)?;
        // ImageNet's is among the eighty.
        let own = own.filter(|_| !dataset.is_some_and(templates::is_imagenet));
        let list = Ensemble::Imagenet80.templates().iter().copied();
        Sentences::new(list.chain(own).map(str::to_owned).collect())
    }

    /// Early epochs and directions for a run.
    ///
    /// # Errors
    /// [`Error::Config`] if there are too few epochs.
    pub fn subspace_for(&self, shots: usize, epochs: usize) -> Result<(usize, usize)> {
        let n_early = self.n_early.unwrap_or_else(|| {
            let paper = match shots {
                0..=1 => 10,
                2..=3 => 20,
                4..=7 => 30,
                8..=15 => 40,
                _ => 50,
            };
            paper.min(epochs)
        });
        if n_early < 2 || n_early > epochs {
            let expected = format!(
                "from 2 to the {epochs} epochs: the subspace is found in the contexts after each of them"
            );
            return Err(Error::config("n_early", n_early, expected));
        }
        let paper = if shots <= 1 { 5 } else { 10 };
        let rank = self.rank.unwrap_or(paper.min(n_early - 1));
        if rank == 0 || rank >= n_early {
            let expected = format!("at least 1 and below the {n_early} early epochs");
            return Err(Error::config("rank", rank, expected));
        }
        Ok((n_early, rank))
    }
}

impl Settings for SubPtConfig {
    const SLUG: &'static str = ENTRY.slug;

    fn check(&self) -> Result<()> {
        self.start().check()?;
        if self.projects() {
            self.check_subspace()?;
        }
        if self.learns_novel() {
            self.check_novel()?;
        }
        self.train.check()
    }
}

impl Method for SubPtConfig {
    type Data = Labelled;
    type Fitted = Learned<SubPt>;

    fn fit(&self, clip: &Clip, data: &Labelled, run: &mut Run) -> Result<Learned<SubPt>> {
        if !self.projects() {
            return Learned::fit(self, &self.train, clip, data, run);
        }
        data.check()?;
        let mut method = Learned::new(self, clip, &data.classes, run.seed)?;
        let early = self.early_stage(&mut method, clip, data, run)?;
        let settings = method::value_of(self);
        train::train(&mut method, clip, data, &self.train, &settings, run)?;
        // What the first training needed to survive a crash is no longer of use.
        if let Some(path) = early {
            let _ = std::fs::remove_file(path);
        }
        Ok(method)
    }
}

impl SubPtConfig {
    /// The first training: gives `method` its subspace, and the path of a checkpoint that may go when all is done.
    fn early_stage(
        &self,
        method: &mut Learned<SubPt>,
        clip: &Clip,
        data: &Labelled,
        run: &mut Run,
    ) -> Result<Option<PathBuf>> {
        let shots = data.shots();
        let epochs = self.train.epochs_for(shots, data.classes.len());
        let (n_early, rank) = self.subspace_for(shots, epochs)?;
        let mut first: Learned<SubPt> = Learned::new(self, clip, &data.classes, run.seed)?;
        first.stage = Stage::Collecting {
            contexts: Vec::new(),
            wanted: n_early,
        };
        run.progress.note(&format!(
            "first training: {n_early} epochs, for the subspace of the second"
        ));
        // The last epoch that counts is the last one: nothing is chosen here.
        let recipe = Recipe {
            epochs: Some(epochs),
            keep: train::Keep::Last,
            ..self.train.clone()
        };
        let settings = method::value_of(&(self, "early"));
        let plan = run.checkpoint.clone();
        let early = plan.as_ref().map(|plan| plan.before("early"));
        run.checkpoint = early.clone();
        let trained = train::train(&mut first, clip, data, &recipe, &settings, run);
        run.checkpoint = plan;
        trained?;
        let Stage::Collecting { contexts, .. } = &first.stage else {
            return Ok(None);
        };
        let rows = Tensor::stack(contexts, 0)?.flatten_from(1)?;
        let found = Subspace::principal(&rows, rank)?;
        let held: f64 = found.explained_variance_ratio.iter().sum();
        run.progress.note(&format!(
            "second training: along {rank} directions that hold {:.1}% of what the context did",
            100.0 * held
        ));
        if self.restart == Restart::FirstEpoch {
            let start = (context::KEY.to_owned(), contexts[0].clone());
            method.params().load(&BTreeMap::from([start]))?;
        }
        method.project_onto(found.subspace)?;
        Ok(early.map(|plan| plan.path))
    }
}

/// A learned context on its way.
#[derive(Debug)]
pub struct SubPt {
    /// `(n_ctx, width)`, or `(n_cls, n_ctx, width)` if class-specific.
    pub context: Context,
    novel: Option<Novel>,
    stage: Stage,
    /// Weight decay that is projected with the gradient.
    confined_decay: Option<f64>,
}

/// The novel feature learner.
#[derive(Debug)]
struct Novel {
    classes: ClassTokens,
    anchors: Sentences,
    lambda: f64,
}

/// What happens to the gradient and after an epoch.
#[derive(Debug)]
enum Stage {
    /// Nothing.
    Plain,
    /// The context is kept after each of the first `wanted` epochs.
    Collecting {
        contexts: Vec<Tensor>,
        wanted: usize,
    },
    /// The gradient is projected.
    Projecting(Subspace),
}

impl Learner for SubPt {
    type Config = SubPtConfig;

    /// Without a subspace yet.
    fn start(
        config: &SubPtConfig,
        clip: &Clip,
        classes: &Classes,
        params: &mut Params,
    ) -> Result<Self> {
        let context = config.start().context(params, clip.text(), classes)?;
        let novel = match config.learns_novel() {
            true => {
                let names = Classes::new(config.novel_classes.clone())?;
                let classes = ClassTokens::new(clip.text(), &names)?;
                classes.sentences(context.words())?;
                Some(Novel {
                    classes,
                    anchors: config.anchors()?,
                    lambda: config.lambda,
                })
            }
            false => None,
        };
        let confined_decay = match config.train.optimizer {
            OptimizerConfig::Sgd { weight_decay, .. } if config.confine_decay => Some(weight_decay),
            _ => None,
        };
        Ok(Self {
            context,
            novel,
            stage: Stage::Plain,
            confined_decay,
        })
    }

    /// What the context was trained along, and the novel names, are not needed to predict.
    fn complete(
        config: &mut SubPtConfig,
        given: &Value,
        state: &TorchState,
        clip: &Clip,
    ) -> Result<()> {
        let (contexts, n_ctx) = context::sizes_in(state, clip.text())?;
        config.n_ctx = n_ctx;
        config.class_specific |= contexts.is_some();
        config.ctx_init = context::words_in(given);
        Ok(())
    }
}

impl SubPt {
    /// Projects every gradient from now on.
    ///
    /// # Errors
    /// [`Error::Shape`] if the directions are not those of this context.
    pub fn project_onto(&mut self, subspace: Subspace) -> Result<()> {
        let numbers = self.context.tensor().elem_count();
        if subspace.dim() != numbers {
            return Err(Error::Shape {
                what: "the subspace of the context".into(),
                found: vec![subspace.rank(), subspace.dim()],
                expected: vec![subspace.rank(), numbers],
            });
        }
        self.stage = Stage::Projecting(subspace);
        Ok(())
    }

    /// What every gradient is projected onto, once it is known.
    pub fn subspace(&self) -> Option<&Subspace> {
        match &self.stage {
            Stage::Projecting(subspace) => Some(subspace),
            Stage::Plain | Stage::Collecting { .. } => None,
        }
    }

    /// Text features of unit length of the novel names, `(novel, embed_dim)`: with the learned context, and of the
    /// sentences that they are held to. `None` without NFL.
    ///
    /// # Errors
    /// As [`Context::text_features`] and [`Sentences::mean`].
    pub fn novel_features(&self, clip: &Clip) -> Result<Option<(Tensor, Tensor)>> {
        let Some(novel) = &self.novel else {
            return Ok(None);
        };
        let learned = self.context.text_features(clip, &novel.classes)?;
        let learned = ops::unit_length(&learned, "a novel text feature")?;
        Ok(Some((learned, novel.anchors.mean(clip, &novel.classes)?)))
    }
}

impl Objective for SubPt {
    fn classifier<'a>(
        &'a self,
        clip: &'a Clip,
        classes: &Classes,
    ) -> Result<Box<dyn Classifier + 'a>> {
        self.context.classifier(clip, classes)
    }

    fn loss(&self, clip: &Clip, batch: &Batch<'_>, _: Step) -> Result<Loss> {
        let images = batch.images.features()?;
        let Some(novel) = &self.novel else {
            let text = self.context.text_features(clip, batch.classes)?;
            return Loss::cross_entropy(clip.cosine_logits(images, &text)?, batch.labels);
        };
        // One pass for both lists, which share what stands in front of the names.
        let prompts = self.context.prompts_of(&[batch.classes, &novel.classes])?;
        let text = clip.text().encode(&prompts)?;
        let n_cls = batch.classes.len();
        let logits = clip.cosine_logits(images, &text.narrow(0, 0, n_cls)?)?;
        let learned = text.narrow(0, n_cls, novel.classes.len())?;
        let learned = ops::unit_length(&learned, "a novel text feature")?;
        let anchors = novel.anchors.mean(clip, &novel.classes)?;
        let nfl = ops::cosine_distance(&learned, &anchors)?;
        Loss::cross_entropy(logits, batch.labels)?
            .named("xe")
            .plus(novel.lambda, "nfl", nfl)
    }

    fn shape_gradients(&mut self, _: &Params, _: &Loss, gradients: &mut Gradients) -> Result<()> {
        let Stage::Projecting(subspace) = &self.stage else {
            return Ok(());
        };
        let Some(gradient) = gradients.get(context::KEY) else {
            return Ok(());
        };
        let projected = match self.confined_decay {
            // The optimiser adds the decay itself: what it adds is taken off here, and its projection put in its place.
            Some(decay) => {
                let decay = (self.context.tensor().detach() * decay)?;
                (subspace.project(&(gradient + &decay)?)? - decay)?
            }
            None => subspace.project(gradient)?,
        };
        gradients.set(context::KEY, projected)
    }

    fn after_epoch(&mut self, done: usize) -> Result<bool> {
        let Stage::Collecting { contexts, wanted } = &mut self.stage else {
            return Ok(true);
        };
        contexts.push(self.context.tensor().detach().copy()?);
        Ok(done < *wanted)
    }

    fn state(&self) -> Vec<(String, Tensor)> {
        let contexts: &[Tensor] = match &self.stage {
            Stage::Collecting { contexts, .. } => contexts,
            _ => &[],
        };
        let named = contexts.iter().enumerate();
        named
            .map(|(i, ctx)| (format!("{i:05}"), ctx.clone()))
            .collect()
    }

    fn load_state(&mut self, state: &BTreeMap<String, Tensor>) -> Result<()> {
        if let Stage::Collecting { contexts, .. } = &mut self.stage {
            // The names sort by epoch.
            *contexts = state.values().cloned().collect();
        }
        Ok(())
    }
}
