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

use std::sync::atomic::{AtomicU64, Ordering};

use candle_core::{DType, Device, Tensor};
use cliptune_core::checkpoint::TorchState;
use cliptune_core::context::{self, Context, Start};
use cliptune_core::layers::{Mlp, Nonlinearity};
use cliptune_core::learned::{self, Learner};
use cliptune_core::method::{self, Classifier, Entry, Method, Paper, Settings};
use cliptune_core::prompt::ClassTokens;
use cliptune_core::rng::Rng;
use cliptune_core::train::{Batch, Loss, Objective, Recipe, Step};
use cliptune_core::{
    Classes, Clip, Error, ImageBatch, ImageNeeds, Labelled, Learned, Param, Params, Result, Run,
    ops, templates,
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
    configure: method::configure::<VptConfig>,
    load: learned::load::<Vpt>,
    import: Some(learned::import::<Vpt>),
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

    fn start(&self) -> Start {
        Start::of_words(self.ctx_init.as_deref(), self.n_ctx, Self::N_CTX)
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

impl Settings for VptConfig {
    const SLUG: &'static str = ENTRY.slug;

    fn check(&self) -> Result<()> {
        self.start().check()?;
        if self.samples == Some(0) {
            return Err(Error::config("samples", 0, "at least one sample"));
        }
        method::check_weight("kl_weight", self.kl_weight)?;
        let batch_size = self.train.batch_size;
        if self.strict && self.vpt_type == VptType::CocoopVpt && batch_size != 1 {
            let expected = "the authors' cocoopvpt is right for one image a step only; take 1 or leave out strict";
            return Err(Error::config("train.batch_size", batch_size, expected));
        }
        self.samples_and_epochs()?;
        self.train.check()
    }
}

impl Method for VptConfig {
    type Data = Labelled;
    type Fitted = Learned<Vpt>;

    fn fit(&self, clip: &Clip, data: &Labelled, run: &mut Run) -> Result<Learned<Vpt>> {
        let recipe = Recipe {
            epochs: Some(self.samples_and_epochs()?.1),
            ..self.train.clone()
        };
        Learned::fit(self, &recipe, clip, data, run)
    }
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

impl Posterior {
    /// It is wide at its start: with `coopvpt` every dimension has a standard deviation of 1 to 1.65, where token embeddings
    /// have 0.01 to 0.02.
    fn start(vpt_type: VptType, clip: &Clip, params: &mut Params) -> Result<Self> {
        let (width, embed_dim) = (clip.text().width(), clip.image().embed_dim());
        match vpt_type {
            VptType::CoopVpt => {
                let zeros = Tensor::zeros((1, width), DType::F32, &Device::Cpu)?;
                Ok(Self::Learned {
                    mean: params.copied("mean_posterior", &zeros)?,
                    log_variance: params.uniform("std_posterior", (1, width), (0.0, 1.0))?,
                })
            }
            VptType::CocoopVpt => {
                let mut network = |name: &str| {
                    let hidden = embed_dim / 2;
                    let widths = [(0, hidden), (2, hidden), (4, width)];
                    let layers = widths.map(|(i, width)| (format!("{name}.module.{i}"), width));
                    Mlp::new(params, embed_dim, &layers, Nonlinearity::Elu)
                };
                Ok(Self::OfImage {
                    mean: network("meta_net.weight_mean")?,
                    log_variance: network("meta_net.weight_log_variance")?,
                })
            }
        }
    }
}

/// A learned distribution of contexts.
#[derive(Debug)]
pub struct Vpt {
    /// `(n_ctx, width)`.
    context: Context,
    posterior: Posterior,
    samples: usize,
    bound: Bound,
    kl_weight: f64,
    prediction: Prediction,
    /// Determines the samples that predict.
    seed: u64,
}

impl Learner for Vpt {
    type Config = VptConfig;

    fn start(
        config: &VptConfig,
        clip: &Clip,
        classes: &Classes,
        params: &mut Params,
    ) -> Result<Self> {
        Ok(Self {
            context: config.start().context(params, clip.text(), classes)?,
            posterior: Posterior::start(config.vpt_type, clip, params)?,
            samples: config.samples_and_epochs()?.0,
            bound: config.bound,
            kl_weight: config.kl_weight,
            prediction: config.prediction,
            seed: params.seed(),
        })
    }

    fn complete(
        config: &mut VptConfig,
        given: &Value,
        state: &TorchState,
        clip: &Clip,
    ) -> Result<()> {
        let learned = ["mean_posterior", "std_posterior"];
        let found = match learned.iter().any(|&key| state.tensors.contains_key(key)) {
            true => VptType::CoopVpt,
            false => VptType::CocoopVpt,
        };
        if given.get("vpt_type").is_some() && config.vpt_type != found {
            return Err(Error::Prompt(format!(
                "the checkpoint is of {found:?}, the settings say {:?}; leave vpt_type out",
                config.vpt_type
            )));
        }
        config.vpt_type = found;
        config.n_ctx = Some(context::shared_in(state, clip.text())?);
        config.ctx_init = context::words_in(given);
        Ok(())
    }
}

impl Vpt {
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
    /// As [`Context::text_features_under`].
    pub fn text_features(
        &self,
        clip: &Clip,
        classes: &ClassTokens,
        contexts: &Tensor,
    ) -> Result<Tensor> {
        let (samples, images, _, _) = contexts.dims4()?;
        let contexts = contexts.flatten(0, 1)?;
        let features = self.context.text_features_under(&contexts, clip, classes)?;
        Ok(features.reshape((samples, images, classes.len(), ()))?)
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
        let loss = Loss {
            total: task,
            terms: Vec::new(),
            logits: Some(logits),
        };
        loss.named("task").plus(self.kl_weight, "kl", kl)
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

impl Objective for Vpt {
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
