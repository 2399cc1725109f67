//! VPT, variational prompt tuning: a distribution of contexts (Derakhshani et al., ICCV 2023, arXiv 2210.02390). Not Visual
//! Prompt Tuning, which shares the acronym.
//!
//! One Gaussian vector `r` is added to all context vectors: `r = μ + ε·exp(½·logvar)`, `ε ~ N(0, I)`. Its mean and variance are
//! learned, for all images (`coopvpt`) or as functions of the image's unit feature (`cocoopvpt`), beside a prior N(0, I). With L
//! samples `p_l(y|x) = softmax_y( scale · cos(f(x), g([ctx + r_l, name_y])) )`,
//! `loss = −mean over images of log( mean_l p_l(y|x) ) + kl_weight · KL`, and `p(y|x) = mean_l p_l(y|x)` predicts: the logits
//! are its logarithms.
//!
//! # Differs from the authors' code
//! - The paper states the evidence lower bound, the mean of the logarithms; theirs takes the logarithm of the mean, which is the
//!   default here. `bound = "elbo"` is the paper's. Both weight a KL that is a mean over dimensions, not a sum.
//! - Prediction draws once, from the run's seed, so that a prediction can be repeated and the text features of `coopvpt` are
//!   computed once; theirs draws anew for every batch (`prediction = "resample"`).
//! - With `cocoopvpt` any batch size is right: theirs adds image b's vector to context position b, so only B = 1 is.
//!   `strict = true` refuses other sizes.
//! - What is learned stays in f32; theirs trains in f16. Their key `std_posterior` holds the log-variance; it keeps its name.
//! - Initial words whose number of tokens differs from `n_ctx` are an error.
//! - Images are seen without random crops unless `train.augment = "crop_flip"` asks for the authors' transform.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};

use candle_core::{DType, Device, Tensor};
use cliptune_core::checkpoint::TorchState;
use cliptune_core::context::{self, Context};
use cliptune_core::layers::Affine;
use cliptune_core::method::{
    self, AnyMethod, Classifier, Entry, Imported, Method, Paper, Predictor,
};
use cliptune_core::prompt::{ClassTokenPosition, ClassTokens};
use cliptune_core::prompt_file::PromptFile;
use cliptune_core::rng::Rng;
use cliptune_core::train::{self, Batch, Loss, Objective, Recipe, Step};
use cliptune_core::{
    Classes, Clip, Error, ImageBatch, ImageNeeds, Labelled, Param, Params, Result, Run, ops,
    templates,
};
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// The registry's entry.
pub const ENTRY: Entry = Entry {
    slug: "vpt",
    name: "VPT (variational)",
    family: "text-pt",
    paper: Paper {
        title: "Bayesian Prompt Learning for Image-Language Model Generalization",
        authors: "Derakhshani, Sanchez, Bulat, Turrisi da Costa, Snoek, Tzimiropoulos, Martinez",
        venue: "ICCV 2023",
        arxiv: "2210.02390",
        code: "saic-fi/Bayesian-Prompt-Learning@8a73fff",
    },
    summary: "Learns a Gaussian distribution of contexts instead of one context, and averages the class probabilities of several samples of it.",
    learns: "ctx: n_ctx vectors of the text tower's width; mean and log-variance of the vector added to them, or two networks that give them for an image",
    cost: "text tower forward and backward for every class and sample at each step; when predicting once in all (coopvpt) or for every image (cocoopvpt); images are encoded once",
    needs: ImageNeeds::GlobalFeatures,
    defaults: method::defaults_of::<VptConfig>,
    configure: |settings| Ok(Box::new(VptConfig::read(settings)?)),
    load: |file, clip| Ok(Box::new(Vpt::load(file, clip)?)),
    import: Some(|state, settings, clip, classes| {
        let config = VptConfig::of_checkpoint(state, settings, clip)?;
        let predictor = Vpt::with_tensors(&config, clip, classes, 0, &state.tensors)?;
        Ok(Imported {
            config: AnyMethod::config(&config),
            predictor: Box::new(predictor),
        })
    }),
};

/// What the distribution depends on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum VptType {
    /// On nothing: one mean and one log-variance are learned. The authors' only complete settings.
    #[default]
    CoopVpt,
    /// On the image: two networks give them.
    CocoopVpt,
}

/// What is maximised beside the KL term.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Bound {
    /// The logarithm of the samples' mean likelihood: the authors' code.
    #[default]
    Likelihood,
    /// The mean of the samples' logarithms: the paper. Never above the other.
    Elbo,
}

/// Which contexts predict.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Prediction {
    /// L samples, drawn once from the run's seed.
    #[default]
    Samples,
    /// L new samples for every batch; for every image with `cocoopvpt`. The authors' code, at their batch of 1.
    Resample,
    /// The distribution's mean alone.
    Mean,
}

/// The authors' L and epochs by data set, for 16 shots.
const DATASETS: &[(&str, usize, usize)] = &[
    ("caltech101", 20, 20),
    ("oxford_pets", 40, 20),
    ("stanford_cars", 20, 40),
    ("oxford_flowers", 10, 40),
    ("food101", 20, 20),
    ("fgvc_aircraft", 10, 10),
    ("sun397", 20, 10),
    ("dtd", 40, 10),
    ("eurosat", 20, 60),
    ("ucf101", 5, 20),
    ("imagenet", 10, 10),
];

/// Settings of [`Vpt`]; the defaults are the authors' scripts' for ImageNet.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct VptConfig {
    /// Context tokens per prompt, at least 1 (paper: M). `None`: as many as `ctx_init` has tokens, else 4.
    pub n_ctx: Option<usize>,
    /// Words to start from, one token each; `None` or empty draws from N(0, 0.02²).
    pub ctx_init: Option<String>,
    /// What the distribution depends on.
    pub vpt_type: VptType,
    /// Samples per step and prediction, at least 1 (paper: L); `None`: the authors' number for `dataset`, else 10.
    pub samples: Option<usize>,
    /// Takes the authors' samples and epochs for this data set (`OxfordPets` or `oxford_pets`).
    pub dataset: Option<String>,
    /// What is maximised.
    pub bound: Bound,
    /// Weight of the mean over dimensions of KL(N(μ, exp(logvar)) ‖ N(0, 1)), at least 0.
    pub kl_weight: f64,
    /// Which contexts predict.
    pub prediction: Prediction,
    /// Refuses batches of several images with `cocoopvpt`, for which the authors' code is not what the paper says.
    pub strict: bool,
    /// How it is trained: one image a step; `train.epochs` left out takes the authors' number for `dataset`, else 10.
    pub train: Recipe,
}

impl Default for VptConfig {
    fn default() -> Self {
        Self {
            n_ctx: None,
            ctx_init: Some("a photo of a".into()),
            vpt_type: VptType::default(),
            samples: None,
            dataset: None,
            bound: Bound::default(),
            kl_weight: 0.001,
            prediction: Prediction::default(),
            strict: false,
            train: Recipe {
                batch_size: 1,
                ..Recipe::default()
            },
        }
    }
}

impl VptConfig {
    /// Context tokens without initial words (paper: M = 4).
    pub const N_CTX: usize = 4;

    /// Settings from a value whose missing keys take their defaults.
    ///
    /// # Errors
    /// [`Error::Config`] naming the key.
    pub fn read(settings: &Value) -> Result<Self> {
        let config: Self = method::read_config(ENTRY.slug, settings)?;
        config.check()?;
        Ok(config)
    }

    /// `settings` completed by what the checkpoint holds.
    fn of_checkpoint(state: &TorchState, settings: &Value, clip: &Clip) -> Result<Self> {
        let mut config = Self::read(settings)?;
        let found = match state.tensors.contains_key("mean_posterior") {
            true => VptType::CoopVpt,
            false => VptType::CocoopVpt,
        };
        if settings.get("vpt_type").is_some() && config.vpt_type != found {
            return Err(Error::Prompt(format!(
                "the checkpoint is of {found:?}, the settings say {:?}; leave vpt_type out",
                config.vpt_type
            )));
        }
        config.vpt_type = found;
        config.n_ctx = Some(context::shared_in(state, clip.text())?);
        // What the context started from no longer matters unless the caller says it.
        if settings.get("ctx_init").is_none() {
            config.ctx_init = None;
        }
        config.check()?;
        Ok(config)
    }

    /// Refuses settings that cannot be used.
    ///
    /// # Errors
    /// [`Error::Config`] naming the key.
    pub fn check(&self) -> Result<()> {
        context::check(self.n_ctx)?;
        if self.samples == Some(0) {
            return Err(Error::config("samples", 0, "at least one sample"));
        }
        if !(self.kl_weight.is_finite() && self.kl_weight >= 0.0) {
            let expected = "a finite number of at least 0";
            return Err(Error::config("kl_weight", self.kl_weight, expected));
        }
        if self.strict && self.vpt_type == VptType::CocoopVpt && self.train.batch_size != 1 {
            let expected = "the authors' cocoopvpt is right for one image a step only; take 1 or leave out strict";
            return Err(Error::config(
                "train.batch_size",
                self.train.batch_size,
                expected,
            ));
        }
        self.samples_and_epochs()?;
        self.train.check()
    }

    /// L and the number of epochs.
    ///
    /// # Errors
    /// [`Error::Config`] for a data set that the authors give no numbers for.
    pub fn samples_and_epochs(&self) -> Result<(usize, usize)> {
        let (samples, epochs) = match self.dataset.as_deref() {
            None => (10, 10),
            Some(name) => {
                let id = templates::id_of(name);
                let found = DATASETS.iter().find(|(known, ..)| *known == id);
                let known = || DATASETS.iter().map(|d| d.0).collect::<Vec<_>>().join(", ");
                let &(_, samples, epochs) = found
                    .ok_or_else(|| Error::config("dataset", name, format!("one of {}", known())))?;
                (samples, epochs)
            }
        };
        let samples = self.samples.unwrap_or(samples);
        Ok((samples, self.train.epochs.unwrap_or(epochs)))
    }
}

impl Method for VptConfig {
    type Data = Labelled;
    type Fitted = Vpt;

    fn fit(&self, clip: &Clip, data: &Labelled, run: &mut Run) -> Result<Vpt> {
        self.check()?;
        data.check()?;
        let recipe = Recipe {
            epochs: Some(self.samples_and_epochs()?.1),
            ..self.train.clone()
        };
        let mut vpt = Vpt::new(self, clip, &data.classes, run.seed)?;
        let settings = serde_json::to_value(self).unwrap_or(Value::Null);
        vpt.history = train::train(&mut vpt, clip, data, &recipe, &settings, run)?;
        Ok(vpt)
    }
}

/// Three affine maps with ELUs between them.
#[derive(Debug)]
struct Mlp(Box<[Affine; 3]>);

impl Mlp {
    fn new(params: &mut Params, name: &str, embed_dim: usize, width: usize) -> Result<Self> {
        let hidden = embed_dim / 2;
        Ok(Self(Box::new([
            Affine::new(params, &format!("{name}.module.0"), (hidden, embed_dim))?,
            Affine::new(params, &format!("{name}.module.2"), (hidden, hidden))?,
            Affine::new(params, &format!("{name}.module.4"), (width, hidden))?,
        ])))
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let [first, second, last] = &*self.0;
        let x = elu(&first.forward(x)?)?;
        last.forward(&elu(&second.forward(&x)?)?)
    }
}

/// `x` where it is positive, else `exp(x) − 1`. The exponential never sees a positive number, so it cannot overflow.
fn elu(x: &Tensor) -> Result<Tensor> {
    let negative = x.neg()?.relu()?.neg()?;
    Ok((x.relu()? + negative.exp()?.affine(1.0, -1.0)?)?)
}

/// Where the distribution of the added vector comes from.
#[derive(Debug)]
enum Posterior {
    Learned {
        mean: Param,
        /// Named `std_posterior` by the authors.
        log_variance: Param,
    },
    OfImage {
        mean: Mlp,
        log_variance: Mlp,
    },
}

/// A learned distribution of contexts.
#[derive(Debug)]
pub struct Vpt {
    /// `(n_ctx, width)`.
    context: Context,
    posterior: Posterior,
    params: Params,
    samples: usize,
    bound: Bound,
    kl_weight: f64,
    prediction: Prediction,
    /// Determines the samples that predict.
    seed: u64,
    history: train::History,
}

impl Vpt {
    /// A distribution at its start. It is wide: with `coopvpt` every dimension has a standard deviation of 1 to 1.65, where
    /// token embeddings have 0.01 to 0.02.
    ///
    /// # Errors
    /// [`Error::Config`] for contradicting settings, [`Error::PromptTooLong`] if a class name leaves no room.
    pub fn new(config: &VptConfig, clip: &Clip, classes: &Classes, seed: u64) -> Result<Self> {
        config.check()?;
        let (width, embed_dim) = (clip.text().width(), clip.image().embed_dim());
        let mut params = Params::new(seed);
        let context = match context::initial_words(config.ctx_init.as_deref()) {
            Some(words) => Context::of_words(&mut params, clip.text(), &words, config.n_ctx)?,
            None => {
                let n_ctx = config.n_ctx.unwrap_or(VptConfig::N_CTX);
                Context::random(&mut params, clip.text(), n_ctx)?
            }
        };
        let posterior = match config.vpt_type {
            VptType::CoopVpt => {
                let zeros = Tensor::zeros((1, width), DType::F32, &Device::Cpu)?;
                Posterior::Learned {
                    mean: params.copied("mean_posterior", &zeros)?,
                    log_variance: params.uniform("std_posterior", (1, width), (0.0, 1.0))?,
                }
            }
            VptType::CocoopVpt => {
                let mut mlp = |name| Mlp::new(&mut params, name, embed_dim, width);
                Posterior::OfImage {
                    mean: mlp("meta_net.weight_mean")?,
                    log_variance: mlp("meta_net.weight_log_variance")?,
                }
            }
        };
        // Refuses names that are too long before any work.
        ClassTokens::new(clip.text(), classes)?.sentences(context.words())?;
        Ok(Self {
            context,
            posterior,
            params,
            samples: config.samples_and_epochs()?.0,
            bound: config.bound,
            kl_weight: config.kl_weight,
            prediction: config.prediction,
            seed,
            history: train::History::default(),
        })
    }

    /// From a prompt file of this method.
    ///
    /// # Errors
    /// [`Error::Prompt`], [`Error::Shape`] or [`Error::Config`] if the file does not fit itself or the weights.
    pub fn load(file: &PromptFile, clip: &Clip) -> Result<Self> {
        let config = VptConfig::read(&file.config)?;
        Self::with_tensors(&config, clip, &file.classes, file.seed, &file.tensors)
    }

    /// A distribution with given values instead of drawn ones, under the authors' keys.
    ///
    /// # Errors
    /// As [`Vpt::new`] and [`Params::load`].
    pub fn with_tensors(
        config: &VptConfig,
        clip: &Clip,
        classes: &Classes,
        seed: u64,
        tensors: &BTreeMap<String, Tensor>,
    ) -> Result<Self> {
        let vpt = Self::new(config, clip, classes, seed)?;
        vpt.params.load(tensors)?;
        Ok(vpt)
    }

    /// How the training went; empty for a loaded distribution.
    pub fn history(&self) -> &train::History {
        &self.history
    }

    /// Samples per step and prediction (paper: L).
    pub fn samples(&self) -> usize {
        self.samples
    }

    /// Mean and log-variance of what is added to the context, from unit features `(batch, embed_dim)`: each `(1, width)` for
    /// `coopvpt`, `(batch, width)` for `cocoopvpt`.
    ///
    /// # Errors
    /// [`Error::Shape`] if the features have another width.
    pub fn posterior(&self, unit_features: &Tensor) -> Result<(Tensor, Tensor)> {
        match &self.posterior {
            Posterior::Learned { mean, log_variance } => {
                Ok((mean.tensor().clone(), log_variance.tensor().clone()))
            }
            Posterior::OfImage { mean, log_variance } => Ok((
                mean.forward(unit_features)?,
                log_variance.forward(unit_features)?,
            )),
        }
    }

    /// Contexts `(L, images, n_ctx, width)` from a posterior `(images, width)` and standard normal `noise`
    /// `(L, images, width)`; 1 stands for all images in either.
    ///
    /// # Errors
    /// If the shapes do not fit together.
    pub fn contexts(
        &self,
        (mean, log_variance): &(Tensor, Tensor),
        noise: &Tensor,
    ) -> Result<Tensor> {
        let deviation = (log_variance * 0.5)?.exp()?;
        let added = noise
            .broadcast_mul(&deviation)?
            .broadcast_add(mean)?
            .unsqueeze(2)?;
        Ok(self.context.tensor().broadcast_add(&added)?)
    }

    /// Raw text features `(L, images, n_cls, embed_dim)` of contexts `(L, images, n_ctx, width)`.
    ///
    /// # Errors
    /// [`Error::PromptTooLong`], [`Error::Shape`].
    pub fn text_features(
        &self,
        clip: &Clip,
        classes: &ClassTokens,
        contexts: &Tensor,
    ) -> Result<Tensor> {
        let (samples, images, n_ctx, width) = contexts.dims4()?;
        let contexts = contexts.reshape((samples * images, n_ctx, width))?;
        let words = self.context.words();
        let prompts = classes.weave_each(&contexts, words, ClassTokenPosition::End)?;
        let features = clip.text().encode(&prompts)?;
        let embed_dim = features.dim(1)?;
        Ok(features.reshape((samples, images, classes.len(), embed_dim))?)
    }

    /// Log-probabilities `(L, batch, n_cls)` of unit image features `(batch, embed_dim)` under unit text features
    /// `(L, batch, n_cls, embed_dim)`, or `(L, 1, n_cls, embed_dim)` for all images.
    ///
    /// # Errors
    /// If the shapes do not fit together.
    pub fn log_probs(&self, clip: &Clip, unit_features: &Tensor, text: &Tensor) -> Result<Tensor> {
        let (samples, images, n_cls, dim) = text.dims4()?;
        let image = (unit_features * clip.scale())?;
        let batch = image.dim(0)?;
        let logits = match images {
            1 => image
                .matmul(&text.reshape((samples * n_cls, dim))?.t()?)?
                .reshape((batch, samples, n_cls))?
                .transpose(0, 1)?,
            _ => {
                let image = image.unsqueeze(0)?.repeat((samples, 1, 1))?;
                let text = text.reshape((samples * images, n_cls, dim))?;
                ops::own_dots(&image.reshape((samples * batch, dim))?, &text)?
                    .reshape((samples, batch, n_cls))?
            }
        };
        ops::log_softmax(&logits.contiguous()?)
    }

    /// The loss of a batch under given standard normal `noise`, `(L, 1, width)` or with `cocoopvpt` `(L, batch, width)`.
    ///
    /// # Errors
    /// As [`Objective::loss`].
    pub fn loss_with(&self, clip: &Clip, batch: &Batch<'_>, noise: &Tensor) -> Result<Loss> {
        let unit = ops::unit_length(batch.images.features()?, "an image feature")?;
        let posterior = self.posterior(&unit)?;
        let contexts = self.contexts(&posterior, noise)?;
        let text = self.text_features(clip, batch.classes, &contexts)?;
        let text = ops::unit_length(&text, "a text feature")?;
        let log_probs = self.log_probs(clip, &unit, &text)?;
        let logits = ops::log_mean_exp(&log_probs)?;
        let task = match self.bound {
            Bound::Likelihood => ops::negative_log_likelihood(&logits, batch.labels)?,
            Bound::Elbo => ops::negative_log_likelihood(&log_probs.mean(0)?, batch.labels)?,
        };
        let kl = kl_to_standard(&posterior)?;
        Ok(Loss {
            total: (&task + (&kl * self.kl_weight)?)?,
            terms: vec![("task", task), ("kl", kl)],
            logits: Some(logits),
        })
    }

    fn depends_on_image(&self) -> bool {
        matches!(self.posterior, Posterior::OfImage { .. })
    }

    /// Standard normal noise `(L, images, width)`.
    fn noise(&self, mut rng: Rng, images: usize) -> Result<Tensor> {
        let dims = self.context.tensor().dims();
        let shape = (self.samples, images, dims[dims.len() - 1]);
        let values = rng.normal(shape.0 * shape.1 * shape.2).into_iter();
        let values: Vec<f32> = values.map(|x| x as f32).collect();
        Ok(Tensor::from_vec(values, shape, &Device::Cpu)?)
    }
}

/// Mean over images and dimensions of KL(N(μ, exp(logvar)) ‖ N(0, 1)) = ½·(exp(logvar) + μ² − 1 − logvar).
fn kl_to_standard((mean, log_variance): &(Tensor, Tensor)) -> Result<Tensor> {
    let twice = ((log_variance.exp()? + mean.sqr()?)? - log_variance)?;
    Ok(twice.mean_all()?.affine(0.5, -0.5)?)
}

/// Averages the probabilities of samples.
struct Sampled<'a> {
    vpt: &'a Vpt,
    clip: &'a Clip,
    classes: ClassTokens,
    /// Unit text features where neither images nor batches change them.
    text: Option<Tensor>,
    /// Batches seen, where each has samples of its own.
    batches: AtomicU64,
}

impl Sampled<'_> {
    /// Unit text features `(L, 1, n_cls, embed_dim)` for one image, or for all.
    fn text_features(&self, unit_features: &Tensor, rng: Rng) -> Result<Tensor> {
        let noise = self.vpt.noise(rng, 1)?;
        let noise = match self.vpt.prediction {
            Prediction::Mean => noise.narrow(0, 0, 1)?.zeros_like()?,
            _ => noise,
        };
        let posterior = self.vpt.posterior(unit_features)?;
        let contexts = self.vpt.contexts(&posterior, &noise)?.detach();
        let text = self
            .vpt
            .text_features(self.clip, &self.classes, &contexts)?;
        ops::unit_length(&text, "a text feature")
    }
}

impl Classifier for Sampled<'_> {
    fn logits(&self, images: &ImageBatch) -> Result<Tensor> {
        let unit = ops::unit_length(images.features()?, "an image feature")?;
        let resample = self.vpt.prediction == Prediction::Resample;
        let batch = self.batches.fetch_add(1, Ordering::Relaxed);
        let rng = |image: u64| match resample {
            true => Rng::stream(self.vpt.seed, "predict", &[batch, image]),
            false => Rng::stream(self.vpt.seed, "predict", &[]),
        };
        let shared = match (&self.text, self.vpt.depends_on_image()) {
            (Some(text), _) => Some(text.clone()),
            (None, false) => Some(self.text_features(&unit, rng(0))?),
            (None, true) => None,
        };
        // One image at a time: memory does not grow with the batch, and neither do the bits depend on it.
        ops::row_by_row(&unit, |image, unit| {
            let text = match &shared {
                Some(text) => text.clone(),
                None => self.text_features(unit, rng(image as u64))?,
            };
            ops::log_mean_exp(&self.vpt.log_probs(self.clip, unit, &text)?)
        })
    }
}

impl Predictor for Vpt {
    fn needs(&self) -> ImageNeeds {
        ImageNeeds::GlobalFeatures
    }

    fn classifier<'a>(
        &'a self,
        clip: &'a Clip,
        classes: &Classes,
    ) -> Result<Box<dyn Classifier + 'a>> {
        let classes = ClassTokens::new(clip.text(), classes)?;
        classes.sentences(self.context.words())?;
        let mut sampled = Sampled {
            vpt: self,
            clip,
            classes,
            text: None,
            batches: AtomicU64::new(0),
        };
        if !self.depends_on_image() && self.prediction != Prediction::Resample {
            // No image decides anything here; a row of zeros stands in.
            let none = Tensor::zeros((1, clip.image().embed_dim()), DType::F32, &Device::Cpu)?;
            let rng = Rng::stream(self.seed, "predict", &[]);
            sampled.text = Some(sampled.text_features(&none, rng)?);
        }
        Ok(Box::new(sampled))
    }

    fn tensors(&self) -> Result<Vec<(String, Tensor)>> {
        self.params.tensors()
    }

    fn training(&self) -> Option<&train::History> {
        Some(&self.history).filter(|history| history.kept > 0)
    }
}

impl Objective for Vpt {
    fn params(&self) -> &Params {
        &self.params
    }

    fn loss(&self, clip: &Clip, batch: &Batch<'_>, step: Step) -> Result<Loss> {
        let images = match self.depends_on_image() {
            true => batch.images.len(),
            false => 1,
        };
        let counters = [step.epoch as u64, step.index as u64];
        let noise = self.noise(Rng::stream(step.seed, "samples", &counters), images)?;
        self.loss_with(clip, batch, &noise)
    }
}
