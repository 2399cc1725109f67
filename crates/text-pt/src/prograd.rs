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

use candle_core::{D, Tensor};
use cliptune_core::checkpoint::TorchState;
use cliptune_core::context::{self, Context, Length, Start};
use cliptune_core::learned::{self, Learner};
use cliptune_core::method::{self, Classifier, Entry, Method, Paper, Settings};
use cliptune_core::prompt::{ClassTokenPosition, ClassTokens};
use cliptune_core::subspace;
use cliptune_core::templates::{self, Sentences};
use cliptune_core::train::{Batch, Loss, Objective, Recipe, Step};
use cliptune_core::{
    Classes, Clip, Error, Gradients, ImageNeeds, Labelled, Learned, Params, Result, Run, ops,
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
    configure: method::configure::<ProGradConfig>,
    load: learned::load::<ProGrad>,
    import: Some(learned::import::<ProGrad>),
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
    /// The template.
    ///
    /// # Errors
    /// [`Error::Config`] for an unknown data set, or a template beside one.
    pub fn sentence(&self) -> Result<&str> {
        let (own, dataset) = (self.template.as_deref(), self.dataset.as_deref());
        let chosen = templates::chosen(own, dataset, templates::type_first)?;
        Ok(chosen.unwrap_or(templates::DEFAULT))
    }

    fn start(&self) -> Result<Start> {
        let template = self.sentence()?;
        let words = match self.ctx_init {
            true => {
                let words = template.strip_suffix(" {}.").filter(|w| !w.is_empty());
                let expected = "a template that ends in ` {}.`, for its words to stand in front of the class name; or ctx_init = false";
                let missing = || Error::config("template", template, expected);
                Some(words.ok_or_else(missing)?.to_owned())
            }
            false => None,
        };
        Ok(Start {
            length: Length::Fixed(self.n_ctx),
            words,
            class_specific: self.class_specific,
            position: self.class_token_position,
        })
    }
}

impl Settings for ProGradConfig {
    const SLUG: &'static str = ENTRY.slug;

    fn check(&self) -> Result<()> {
        if !self.lambda.is_finite() {
            return Err(Error::config("lambda", self.lambda, "a finite number"));
        }
        method::check_positive("temperature", self.temperature)?;
        self.start()?.check()?;
        self.train.check()
    }
}

impl Method for ProGradConfig {
    type Data = Labelled;
    type Fitted = Learned<ProGrad>;

    fn fit(&self, clip: &Clip, data: &Labelled, run: &mut Run) -> Result<Learned<ProGrad>> {
        if !(0.0..=1.0).contains(&self.lambda) {
            let warning = format!(
                "lambda = {}: below 0 it adds to the conflict, above 1 it turns it around",
                self.lambda
            );
            run.progress.note(&warning);
        }
        Learned::fit(self, &self.train, clip, data, run)
    }
}

/// A learned context and the teacher that keeps it in line.
#[derive(Debug)]
pub struct ProGrad {
    /// `(n_ctx, width)`, or `(n_cls, n_ctx, width)` if class-specific.
    pub context: Context,
    teacher: Sentences,
    lambda: f64,
    temperature: f64,
    /// Of the last step's two gradients.
    cosine: Option<f64>,
}

impl Learner for ProGrad {
    type Config = ProGradConfig;

    fn start(
        config: &ProGradConfig,
        clip: &Clip,
        classes: &Classes,
        params: &mut Params,
    ) -> Result<Self> {
        Ok(Self {
            context: config.start()?.context(params, clip.text(), classes)?,
            teacher: Sentences::new(vec![config.sentence()?.to_owned()])?,
            lambda: config.lambda,
            temperature: config.temperature,
            cosine: None,
        })
    }

    /// The checkpoint does not say which template was used: the settings do.
    fn complete(
        config: &mut ProGradConfig,
        _: &Value,
        state: &TorchState,
        clip: &Clip,
    ) -> Result<()> {
        let (contexts, n_ctx) = context::sizes_in(state, clip.text())?;
        config.n_ctx = n_ctx;
        if contexts.is_some() {
            // Their code has initial words for a shared context only.
            (config.class_specific, config.ctx_init) = (true, false);
        }
        Ok(())
    }
}

impl ProGrad {
    /// Cosine of the two gradients of the last step, below 0 where they were in conflict.
    pub fn cosine(&self) -> Option<f64> {
        self.cosine
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

impl Objective for ProGrad {
    fn classifier<'a>(
        &'a self,
        clip: &'a Clip,
        classes: &Classes,
    ) -> Result<Box<dyn Classifier + 'a>> {
        self.context.classifier(clip, classes)
    }

    fn loss(&self, clip: &Clip, batch: &Batch<'_>, _: Step) -> Result<Loss> {
        let images = batch.images.features()?;
        let teacher = self.teacher_features(clip, batch.classes)?;
        let teacher = clip.unit_logits(images, &teacher)?;
        let student =
            clip.cosine_logits(images, &self.context.text_features(clip, batch.classes)?)?;
        let kl = self.distillation(&student, &teacher)?;
        let mut loss = Loss::cross_entropy(student, batch.labels)?.named("xe");
        // It steers and is not minimised.
        loss.terms.push(("kl", kl));
        Ok(loss)
    }

    fn shape_gradients(
        &mut self,
        params: &Params,
        loss: &Loss,
        gradients: &mut Gradients,
    ) -> Result<()> {
        let Some(kl) = loss.term("kl") else {
            return Ok(());
        };
        let general = Gradients::of(kl, params)?;
        let (Some(task), Some(general)) = (gradients.get(context::KEY), general.get(context::KEY))
        else {
            return Ok(());
        };
        let aligned = subspace::align(task, general, self.lambda)?;
        self.cosine = Some(aligned.cosine);
        gradients.set(context::KEY, aligned.gradient)
    }
}
