//! ProGrad: a learned context whose gradient does not point against what CLIP knows (Zhu et al., ICCV 2023, arXiv 2205.14865).
//!
//! Student logits `z` are CoOp's, teacher logits `q` are zero-shot CLIP's. `g_c = ∇ CE(z, y)` is the gradient of the task,
//! `g_k = ∇ L_kl` that of staying with the teacher, `L_kl = mean_b Σ_c −softmax(q_b/T)_c · log_softmax(z_b/T)_c · T²`. The
//! step follows (eq. 4)
//!
//! `g = g_c` if `cos(g_c, g_k) ≥ 0`, else `g = g_c − λ · (g_c·ĝ_k) · ĝ_k`, with `ĝ_k = g_k/‖g_k‖`.
//!
//! `L_kl` is never minimised: it only steers. What is kept is the context; the teacher is not needed to predict.
//!
//! # Differs from the authors' code
//! - Context, gradients and both towers compute in f32; theirs trains a student in f16 beside a teacher in f32.
//! - If one of the two gradients is zero the step is `g_c`; theirs divides by zero and comes to the same through NaN.
//! - `class_token_position = "middle"` works; theirs stops with an undefined name. Words that leave a token of the template
//!   frozen in front of the name (those with a comma) are refused at `front` and `middle`, where theirs takes the wrong rows
//!   for the name.
//! - A prompt that serves other classes keeps the words it was trained with; theirs takes those of the data set it is tested
//!   on.
//! - Class-specific contexts with initial words are an error; theirs drops the first silently.
//! - Images are seen without random crops unless `train.augment = "crop_flip"`.

use std::collections::BTreeMap;

use candle_core::{D, Tensor};
use cliptune_core::checkpoint::TorchState;
use cliptune_core::context::{self, Context};
use cliptune_core::method::{
    self, AnyMethod, Classifier, Entry, Imported, Method, Paper, Predictor, TextClassifier,
};
use cliptune_core::prompt::{ClassTokenPosition, ClassTokens, Prompts};
use cliptune_core::prompt_file::PromptFile;
use cliptune_core::subspace;
use cliptune_core::templates::{self, Sentences};
use cliptune_core::train::{self, Batch, Loss, Objective, Recipe, Step};
use cliptune_core::{
    Classes, Clip, Error, Gradients, ImageNeeds, Labelled, Params, Result, Run, ops,
};
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// The registry's entry.
pub const ENTRY: Entry = Entry {
    slug: "prograd",
    name: "ProGrad",
    family: "text-pt",
    paper: Paper {
        title: "Prompt-aligned Gradient for Prompt Tuning",
        authors: "Zhu, Niu, Han, Wu, Zhang",
        venue: "ICCV 2023",
        arxiv: "2205.14865",
        code: "BeierZhu/Prompt-align@1b76203",
    },
    summary: "Learns a context as CoOp does, but takes from every step what would lead away from zero-shot CLIP's answers.",
    learns: "ctx: n_ctx vectors of the text tower's width, shared by all classes or one set per class",
    cost: "CoOp's, with a second backward pass; the teacher's text features once",
    needs: ImageNeeds::GlobalFeatures,
    defaults: method::defaults_of::<ProGradConfig>,
    configure: |settings| Ok(Box::new(ProGradConfig::read(settings)?)),
    load: |file, clip| Ok(Box::new(ProGrad::load(file, clip)?)),
    import: Some(|state, settings, clip, classes| {
        let config = ProGradConfig::of_checkpoint(state, settings, clip)?;
        let predictor = ProGrad::with_tensors(&config, clip, classes, 0, &state.tensors)?;
        Ok(Imported {
            config: AnyMethod::config(&config),
            predictor: Box::new(predictor),
        })
    }),
};

/// Settings of [`ProGrad`]; the defaults are the paper's.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ProGradConfig {
    /// Context tokens per prompt (paper: M).
    pub n_ctx: usize,
    /// Starts from the template's words, right-aligned in the context, with zeros in front of them; `false` draws from
    /// N(0, 0.02²).
    pub ctx_init: bool,
    /// One context per class instead of one for all; needs `ctx_init = false`.
    pub class_specific: bool,
    /// Where the class name sits among the context tokens.
    pub class_token_position: ClassTokenPosition,
    /// The teacher's sentence, and the initial words up to its ` {}.`; neither this nor `dataset` is `a photo of a {}.`
    pub template: Option<String>,
    /// Takes the template of the authors' code for this data set (`OxfordPets` or `oxford_pets`): type of the class first.
    pub dataset: Option<String>,
    /// Share of the conflict that is taken out (paper: λ). The authors use 0.8 for 8 and 16 shots of flowers, dtd and
    /// eurosat. Outside 0 to 1 it is allowed, with a warning.
    pub lambda: f64,
    /// Temperature T of both softmaxes of the teacher's loss.
    pub temperature: f64,
    /// How it is trained.
    pub train: Recipe,
}

impl Default for ProGradConfig {
    fn default() -> Self {
        Self {
            n_ctx: 16,
            ctx_init: true,
            class_specific: false,
            class_token_position: ClassTokenPosition::End,
            template: None,
            dataset: None,
            lambda: 1.0,
            temperature: 1.0,
            train: Recipe::default(),
        }
    }
}

impl ProGradConfig {
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
        if contexts.is_some() {
            // Their code has initial words for a shared context only.
            (config.class_specific, config.ctx_init) = (true, false);
        }
        Ok(config)
    }

    /// Refuses settings that contradict each other.
    ///
    /// # Errors
    /// [`Error::Config`] naming the key.
    pub fn check(&self) -> Result<()> {
        context::check(Some(self.n_ctx))?;
        if self.class_specific && self.ctx_init {
            let expected = "initial words give one context for all classes; set ctx_init = false";
            return Err(Error::config(
                "class_specific",
                "true with ctx_init",
                expected,
            ));
        }
        if !self.lambda.is_finite() {
            return Err(Error::config("lambda", self.lambda, "a finite number"));
        }
        if !(self.temperature.is_finite() && self.temperature > 0.0) {
            let expected = "a finite number above 0";
            return Err(Error::config("temperature", self.temperature, expected));
        }
        let template = self.sentence()?;
        if self.ctx_init && template.strip_suffix(" {}.").is_none_or(str::is_empty) {
            let expected = "a template that ends in ` {}.`, for its words to stand in front of the class name; or ctx_init = false";
            return Err(Error::config("template", template, expected));
        }
        self.train.check()
    }

    /// The template.
    ///
    /// # Errors
    /// [`Error::Config`] for an unknown data set, or a template beside one.
    pub fn sentence(&self) -> Result<&str> {
        match (&self.template, &self.dataset) {
            (Some(template), Some(dataset)) => {
                let expected = format!("either a template or a data set, not `{dataset}` as well");
                Err(Error::config("template", template, expected))
            }
            (Some(template), None) => Ok(template),
            (None, Some(dataset)) => templates::type_first(dataset),
            (None, None) => Ok(templates::DEFAULT),
        }
    }
}

impl Method for ProGradConfig {
    type Data = Labelled;
    type Fitted = ProGrad;

    fn fit(&self, clip: &Clip, data: &Labelled, run: &mut Run) -> Result<ProGrad> {
        self.check()?;
        data.check()?;
        if !(0.0..=1.0).contains(&self.lambda) {
            let warning = format!(
                "lambda = {}: below 0 it adds to the conflict, above 1 it turns it around",
                self.lambda
            );
            run.progress.note(&warning);
        }
        let mut prograd = ProGrad::new(self, clip, &data.classes, run.seed)?;
        let settings = serde_json::to_value(self).unwrap_or(Value::Null);
        prograd.history = train::train(&mut prograd, clip, data, &self.train, &settings, run)?;
        Ok(prograd)
    }
}

/// A learned context and the teacher that keeps it in line.
#[derive(Debug)]
pub struct ProGrad {
    /// `(n_ctx, width)`, or `(n_cls, n_ctx, width)` if class-specific.
    context: Context,
    params: Params,
    position: ClassTokenPosition,
    teacher: Sentences,
    lambda: f64,
    temperature: f64,
    /// Of the last step's two gradients.
    cosine: Option<f64>,
    history: train::History,
}

impl ProGrad {
    /// A context at its start.
    ///
    /// # Errors
    /// [`Error::Config`] for contradicting settings or more initial words than vectors, [`Error::PromptTooLong`] if a class
    /// name leaves no room.
    pub fn new(config: &ProGradConfig, clip: &Clip, classes: &Classes, seed: u64) -> Result<Self> {
        config.check()?;
        let (template, position) = (config.sentence()?, config.class_token_position);
        let mut params = Params::new(seed);
        let words = template.strip_suffix(" {}.").filter(|_| config.ctx_init);
        let context = match words {
            Some(words) => Context::of_last_words(&mut params, clip.text(), words, config.n_ctx)?,
            None if config.class_specific => {
                Context::per_class(&mut params, clip.text(), classes, config.n_ctx)?
            }
            None => Context::random(&mut params, clip.text(), config.n_ctx)?,
        };
        context.check_position(clip.text(), position)?;
        let prograd = Self {
            context,
            params,
            position,
            teacher: Sentences::new(vec![template.to_owned()])?,
            lambda: config.lambda,
            temperature: config.temperature,
            cosine: None,
            history: train::History::default(),
        };
        prograd.prompts(&ClassTokens::new(clip.text(), classes)?)?;
        Ok(prograd)
    }

    /// From a prompt file of this method.
    ///
    /// # Errors
    /// [`Error::Prompt`], [`Error::Shape`] or [`Error::Config`] if the file does not fit itself or the weights.
    pub fn load(file: &PromptFile, clip: &Clip) -> Result<Self> {
        let config = ProGradConfig::read(&file.config)?;
        Self::with_tensors(&config, clip, &file.classes, file.seed, &file.tensors)
    }

    /// From a checkpoint of the authors' code. It does not say which template was used: `settings` do.
    ///
    /// # Errors
    /// [`Error::Prompt`] if there is no `ctx`, [`Error::Shape`] if it does not fit the weights or the classes.
    pub fn import(
        state: &TorchState,
        settings: &Value,
        clip: &Clip,
        classes: &Classes,
    ) -> Result<Self> {
        let config = ProGradConfig::of_checkpoint(state, settings, clip)?;
        Self::with_tensors(&config, clip, classes, 0, &state.tensors)
    }

    /// A context with given values instead of its start.
    ///
    /// # Errors
    /// As [`ProGrad::new`] and [`Params::load`].
    pub fn with_tensors(
        config: &ProGradConfig,
        clip: &Clip,
        classes: &Classes,
        seed: u64,
        tensors: &BTreeMap<String, Tensor>,
    ) -> Result<Self> {
        let prograd = Self::new(config, clip, classes, seed)?;
        prograd.params.load(tensors)?;
        Ok(prograd)
    }

    /// How the training went; empty for a loaded context.
    pub fn history(&self) -> &train::History {
        &self.history
    }

    /// Cosine of the two gradients of the last step, below 0 where they were in conflict.
    pub fn cosine(&self) -> Option<f64> {
        self.cosine
    }

    fn prompts(&self, classes: &ClassTokens) -> Result<Prompts> {
        self.context.prompts(classes, self.position)
    }

    /// Raw text features of the classes, `(n_cls, embed_dim)`; gradients flow to the context.
    ///
    /// # Errors
    /// [`Error::PromptTooLong`]; [`Error::Prompt`] if class-specific contexts meet another number of classes.
    pub fn text_features(&self, clip: &Clip, classes: &ClassTokens) -> Result<Tensor> {
        clip.text().encode(&self.prompts(classes)?)
    }

    /// The teacher's class features of unit length, `(n_cls, embed_dim)`.
    ///
    /// # Errors
    /// As [`Sentences::mean`].
    pub fn teacher_features(&self, clip: &Clip, classes: &ClassTokens) -> Result<Tensor> {
        self.teacher.mean(clip, classes)
    }

    /// `mean_b Σ_c −softmax(teacher/T) · log_softmax(student/T) · T²`.
    fn distillation(&self, student: &Tensor, teacher: &Tensor) -> Result<Tensor> {
        let t = self.temperature;
        let wanted = ops::softmax(&(teacher / t)?)?;
        let given = ops::log_softmax(&(student / t)?)?;
        let of_each = (wanted * given)?.sum(D::Minus1)?;
        Ok((of_each.mean_all()? * (-t * t))?)
    }
}

impl Predictor for ProGrad {
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

impl Objective for ProGrad {
    fn params(&self) -> &Params {
        &self.params
    }

    fn loss(&self, clip: &Clip, batch: &Batch<'_>, _: Step) -> Result<Loss> {
        let images = batch.images.features()?;
        let teacher = self.teacher_features(clip, batch.classes)?;
        let teacher = clip.unit_logits(images, &teacher)?;
        let student = clip.cosine_logits(images, &self.text_features(clip, batch.classes)?)?;
        let kl = self.distillation(&student, &teacher)?;
        let mut loss = Loss::cross_entropy(student, batch.labels)?;
        loss.terms = vec![("xe", loss.total.clone()), ("kl", kl)];
        Ok(loss)
    }

    fn shape_gradients(&mut self, loss: &Loss, gradients: &mut Gradients, _: Step) -> Result<()> {
        let Some(kl) = loss.term("kl") else {
            return Ok(());
        };
        let general = Gradients::of(kl, &self.params)?;
        let (Some(task), Some(general)) = (gradients.get(context::KEY), general.get(context::KEY))
        else {
            return Ok(());
        };
        let aligned = subspace::align(task, general, self.lambda)?;
        self.cosine = Some(aligned.cosine);
        gradients.set(context::KEY, aligned.gradient)
    }
}
