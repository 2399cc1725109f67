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
//! beside the result. The authors do this base to new; elsewhere they give 100 names of ImageNet.
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

use candle_core::Tensor;
use cliptune_core::checkpoint::TorchState;
use cliptune_core::context::{self, Context};
use cliptune_core::method::{
    self, AnyMethod, Classifier, Entry, Imported, Method, Paper, Predictor, TextClassifier,
};
use cliptune_core::optim::OptimizerConfig;
use cliptune_core::prompt::{ClassTokenPosition, ClassTokens, Prompts};
use cliptune_core::prompt_file::PromptFile;
use cliptune_core::run::CheckpointPlan;
use cliptune_core::subspace::Subspace;
use cliptune_core::templates::{self, Ensemble, Sentences};
use cliptune_core::train::{self, Batch, Loss, Objective, Recipe, Step};
use cliptune_core::{
    Classes, Clip, Error, Gradients, ImageNeeds, Labelled, Params, Result, Run, ops,
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
    configure: |settings| Ok(Box::new(SubPtConfig::read(settings)?)),
    load: |file, clip| Ok(Box::new(SubPt::load(file, clip)?)),
    import: Some(|state, settings, clip, classes| {
        let config = SubPtConfig::of_checkpoint(state, settings, clip)?;
        let predictor = SubPt::with_tensors(&config, clip, classes, 0, &state.tensors)?;
        Ok(Imported {
            config: AnyMethod::config(&config),
            predictor: Box::new(predictor),
        })
    }),
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
    /// Settings from a value whose missing keys take their defaults.
    ///
    /// # Errors
    /// [`Error::Config`] naming the key.
    pub fn read(settings: &Value) -> Result<Self> {
        let config: Self = method::read_config(ENTRY.slug, settings)?;
        config.check()?;
        Ok(config)
    }

    /// `settings` completed by the shape of a checkpoint's context.
    fn of_checkpoint(state: &TorchState, settings: &Value, clip: &Clip) -> Result<Self> {
        let mut config = Self::read(settings)?;
        let (contexts, n_ctx) = context::sizes_in(state, clip.text())?;
        config.n_ctx = n_ctx;
        config.class_specific |= contexts.is_some();
        config.check()?;
        Ok(config)
    }

    /// Refuses settings that contradict each other.
    ///
    /// # Errors
    /// [`Error::Config`] naming the key.
    pub fn check(&self) -> Result<()> {
        context::check(Some(self.n_ctx))?;
        if self.class_specific && self.words().is_some() {
            let expected =
                "initial words give one context for all classes; leave one of the two out";
            return Err(Error::config(
                "class_specific",
                "true with ctx_init",
                expected,
            ));
        }
        if self.projects() {
            self.check_subspace()?;
        }
        if self.learns_novel() {
            self.check_novel()?;
        }
        self.train.check()
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
        if self.class_token_position != ClassTokenPosition::End {
            let position = format!("{:?}", self.class_token_position).to_lowercase();
            let expected = "end, with the novel feature learner";
            return Err(Error::config("class_token_position", position, expected));
        }
        if !(self.lambda.is_finite() && self.lambda >= 0.0) {
            let expected = "a finite number of at least 0";
            return Err(Error::config("lambda", self.lambda, expected));
        }
        self.anchors().map(|_| ())
    }

    /// The sentences whose features the novel names are held to.
    fn anchors(&self) -> Result<Sentences> {
        let own = match (&self.template, &self.dataset) {
            (Some(template), Some(dataset)) => {
                let expected = format!("either a template or a data set, not `{dataset}` as well");
                return Err(Error::config("template", template, expected));
            }
            (Some(template), None) => Some(template.as_str()),
            (None, Some(dataset)) => {
                let template = templates::type_first(dataset)?;
                (!templates::is_imagenet(dataset)).then_some(template)
            }
            (None, None) => None,
        };
        let list = Ensemble::Imagenet80.templates().iter().copied();
        Sentences::new(list.chain(own).map(str::to_owned).collect())
    }

    fn words(&self) -> Option<String> {
        context::initial_words(self.ctx_init.as_deref())
    }

    fn projects(&self) -> bool {
        self.variant != Variant::Nfl
    }

    fn learns_novel(&self) -> bool {
        self.variant != Variant::Sub
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

impl Method for SubPtConfig {
    type Data = Labelled;
    type Fitted = SubPt;

    fn fit(&self, clip: &Clip, data: &Labelled, run: &mut Run) -> Result<SubPt> {
        self.check()?;
        data.check()?;
        let settings = serde_json::to_value(self).unwrap_or(Value::Null);
        let mut method = SubPt::new(self, clip, &data.classes, run.seed)?;
        let mut early = None;
        if self.projects() {
            early = self.early_stage(&mut method, clip, data, run)?;
        }
        method.history = train::train(&mut method, clip, data, &self.train, &settings, run)?;
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
        method: &mut SubPt,
        clip: &Clip,
        data: &Labelled,
        run: &mut Run,
    ) -> Result<Option<std::path::PathBuf>> {
        let shots = data.shots();
        let epochs = self.train.epochs_for(shots, data.classes.len());
        let (n_early, rank) = self.subspace_for(shots, epochs)?;
        let mut first = SubPt::new(self, clip, &data.classes, run.seed)?;
        first.stage = Stage::Collecting {
            contexts: Vec::new(),
            wanted: n_early,
        };
        run.progress.note(&format!(
            "first training: {n_early} epochs, for the subspace of the second"
        ));
        let settings = serde_json::to_value((self, "early")).unwrap_or(Value::Null);
        // The last epoch that counts is the last one: nothing is chosen here.
        let recipe = Recipe {
            epochs: Some(epochs),
            keep: train::Keep::Last,
            ..self.train.clone()
        };
        let plan = run.checkpoint.clone();
        let early = plan.as_ref().map(|plan| {
            let mut path = plan.path.clone().into_os_string();
            path.push(".early");
            CheckpointPlan {
                path: path.into(),
                every: plan.every,
            }
        });
        run.checkpoint = early.clone();
        let trained = train::train(&mut first, clip, data, &recipe, &settings, run);
        run.checkpoint = plan;
        trained?;
        let Stage::Collecting { contexts, .. } = &first.stage else {
            return Ok(None);
        };
        let rows = contexts.iter().map(Tensor::flatten_all);
        let rows = Tensor::stack(&rows.collect::<candle_core::Result<Vec<_>>>()?, 0)?;
        let found = Subspace::principal(&rows, rank)?;
        let held: f64 = found.explained_variance_ratio.iter().sum();
        run.progress.note(&format!(
            "second training: along {rank} directions that hold {:.1}% of what the context did",
            100.0 * held
        ));
        if self.restart == Restart::FirstEpoch {
            let start = (context::KEY.to_owned(), contexts[0].clone());
            method.params.load(&BTreeMap::from([start]))?;
        }
        method.project_onto(found.subspace)?;
        Ok(early.map(|plan| plan.path))
    }
}

/// A learned context on its way.
#[derive(Debug)]
pub struct SubPt {
    /// `(n_ctx, width)`, or `(n_cls, n_ctx, width)` if class-specific.
    context: Context,
    params: Params,
    position: ClassTokenPosition,
    novel: Option<Novel>,
    stage: Stage,
    /// Weight decay that is projected with the gradient.
    confined_decay: Option<f64>,
    history: train::History,
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

impl SubPt {
    /// A context at its start, without a subspace yet.
    ///
    /// # Errors
    /// [`Error::Config`] for contradicting settings, [`Error::PromptTooLong`] if a class name leaves no room.
    pub fn new(config: &SubPtConfig, clip: &Clip, classes: &Classes, seed: u64) -> Result<Self> {
        config.check()?;
        let mut params = Params::new(seed);
        let context = match config.words() {
            Some(words) => Context::of_last_words(&mut params, clip.text(), &words, config.n_ctx)?,
            None if config.class_specific => {
                Context::per_class(&mut params, clip.text(), classes, config.n_ctx)?
            }
            None => Context::random(&mut params, clip.text(), config.n_ctx)?,
        };
        context.check_position(clip.text(), config.class_token_position)?;
        let novel = match config.learns_novel() {
            true => Some(Novel {
                classes: ClassTokens::new(
                    clip.text(),
                    &Classes::new(config.novel_classes.clone())?,
                )?,
                anchors: config.anchors()?,
                lambda: config.lambda,
            }),
            false => None,
        };
        let confined_decay = match config.train.optimizer {
            OptimizerConfig::Sgd { weight_decay, .. } if config.confine_decay => Some(weight_decay),
            _ => None,
        };
        let method = Self {
            context,
            params,
            position: config.class_token_position,
            novel,
            stage: Stage::Plain,
            confined_decay,
            history: train::History::default(),
        };
        method.prompts(&[&ClassTokens::new(clip.text(), classes)?])?;
        if let Some(novel) = &method.novel {
            method.prompts(&[&novel.classes])?;
        }
        Ok(method)
    }

    /// From a prompt file of this method.
    ///
    /// # Errors
    /// [`Error::Prompt`], [`Error::Shape`] or [`Error::Config`] if the file does not fit itself or the weights.
    pub fn load(file: &PromptFile, clip: &Clip) -> Result<Self> {
        let config = SubPtConfig::read(&file.config)?;
        Self::with_tensors(&config, clip, &file.classes, file.seed, &file.tensors)
    }

    /// From a checkpoint of the authors' code. What it was trained along, and the novel names, are not needed to predict.
    ///
    /// # Errors
    /// [`Error::Prompt`] if there is no `ctx`, [`Error::Shape`] if it does not fit the weights or the classes.
    pub fn import(
        state: &TorchState,
        settings: &Value,
        clip: &Clip,
        classes: &Classes,
    ) -> Result<Self> {
        let config = SubPtConfig::of_checkpoint(state, settings, clip)?;
        Self::with_tensors(&config, clip, classes, 0, &state.tensors)
    }

    /// A context with given values instead of its start.
    ///
    /// # Errors
    /// As [`SubPt::new`] and [`Params::load`].
    pub fn with_tensors(
        config: &SubPtConfig,
        clip: &Clip,
        classes: &Classes,
        seed: u64,
        tensors: &BTreeMap<String, Tensor>,
    ) -> Result<Self> {
        let method = Self::new(config, clip, classes, seed)?;
        method.params.load(tensors)?;
        Ok(method)
    }

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

    /// How the training went, the second where there were two; empty for a loaded context.
    pub fn history(&self) -> &train::History {
        &self.history
    }

    /// The context before the names of several lists of classes, one list after the other.
    fn prompts(&self, lists: &[&ClassTokens]) -> Result<Prompts> {
        if let [classes] = lists {
            return self.context.prompts(classes, self.position);
        }
        let mut prompts = Prompts::new();
        let source = prompts.learn(self.context.tensor());
        for classes in lists {
            let woven = classes.woven(self.context.words(), self.context.n_ctx())?;
            for prompt in woven.around(source, |_| 0, self.position) {
                prompts.push(prompt);
            }
        }
        Ok(prompts)
    }

    /// Raw text features of the classes, `(n_cls, embed_dim)`; gradients flow to the context.
    ///
    /// # Errors
    /// [`Error::PromptTooLong`]; [`Error::Prompt`] if class-specific contexts meet another number of classes.
    pub fn text_features(&self, clip: &Clip, classes: &ClassTokens) -> Result<Tensor> {
        clip.text().encode(&self.prompts(&[classes])?)
    }

    /// Text features of unit length of the novel names, `(novel, embed_dim)`: with the learned context, and of the
    /// sentences that they are held to. `None` without NFL.
    ///
    /// # Errors
    /// As [`SubPt::text_features`] and [`Sentences::mean`].
    pub fn novel_features(&self, clip: &Clip) -> Result<Option<(Tensor, Tensor)>> {
        let Some(novel) = &self.novel else {
            return Ok(None);
        };
        let learned = self.text_features(clip, &novel.classes)?;
        let learned = ops::unit_length(&learned, "a novel text feature")?;
        Ok(Some((learned, novel.anchors.mean(clip, &novel.classes)?)))
    }
}

impl Predictor for SubPt {
    fn needs(&self) -> ImageNeeds {
        ImageNeeds::GlobalFeatures
    }

    fn classifier<'a>(
        &'a self,
        clip: &'a Clip,
        classes: &Classes,
    ) -> Result<Box<dyn Classifier + 'a>> {
        self.context.check_serves(classes)?;
        let classes = ClassTokens::new(clip.text(), classes)?;
        let features = self.text_features(clip, &classes)?.detach();
        let features = ops::unit_length(&features, "a text feature")?;
        Ok(Box::new(TextClassifier::new(clip, features)))
    }

    fn tensors(&self) -> Result<Vec<(String, Tensor)>> {
        self.params.tensors()
    }

    fn training(&self) -> Option<&train::History> {
        Some(&self.history).filter(|history| history.kept > 0)
    }
}

impl Objective for SubPt {
    fn params(&self) -> &Params {
        &self.params
    }

    fn loss(&self, clip: &Clip, batch: &Batch<'_>, _: Step) -> Result<Loss> {
        let images = batch.images.features()?;
        let Some(novel) = &self.novel else {
            let text = self.text_features(clip, batch.classes)?;
            return Loss::cross_entropy(clip.cosine_logits(images, &text)?, batch.labels);
        };
        // One pass for both lists, which share what stands in front of the names.
        let text = clip
            .text()
            .encode(&self.prompts(&[batch.classes, &novel.classes])?)?;
        let n_cls = batch.classes.len();
        let logits = clip.cosine_logits(images, &text.narrow(0, 0, n_cls)?)?;
        let learned = text.narrow(0, n_cls, novel.classes.len())?;
        let learned = ops::unit_length(&learned, "a novel text feature")?;
        let anchors = novel.anchors.mean(clip, &novel.classes)?;
        let nfl = ops::cosine_distance(&learned, &anchors)?;
        let mut loss = Loss::cross_entropy(logits, batch.labels)?;
        loss.terms = vec![("xe", loss.total.clone()), ("nfl", nfl.clone())];
        loss.total = (loss.total + (nfl * novel.lambda)?)?;
        Ok(loss)
    }

    fn shape_gradients(&mut self, _: &Loss, gradients: &mut Gradients, _: Step) -> Result<()> {
        let (Stage::Projecting(subspace), Some(gradient)) =
            (&self.stage, gradients.get(context::KEY))
        else {
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
