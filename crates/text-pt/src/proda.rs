//! ProDA: a Gaussian of class features from many prompts (Lu et al., CVPR 2022, arXiv 2205.03340).
//!
//! K contexts give K unit features `w_{i,k}` of every class. A step takes K_b of them, with mean `m_i` and deviations
//! `δ_{i,k} = w_{i,k} − m_i`, as samples of a Gaussian, and minimises an upper bound of the expected cross entropy under it. For
//! an image `v` of class `y`, with `s` the scale,
//!
//! - `l_i = s · v·m_i`,
//! - `σ_j = 1/(K_b + 1) · Σ_k Σ_d v_d² (δ_{j,k,d} − δ_{y,k,d})²`, the variance of `v·(w_j − w_y)`,
//! - `loss = −log softmax_y(l + ½ s² σ) + alpha · mean over pairs k ≠ l of |p_k·p_l|`,
//!
//! where `p_k` is the unit feature of context k without a class name: contexts are pushed apart. The mean over all K predicts,
//! `p(y|x) = softmax_y(s · v·m_y)`, and is not scaled to unit length: classes that the prompts disagree on weigh less.
//!
//! A quarter of the contexts stands behind the class name, a quarter around it, the rest in front of it.
//!
//! # Differs from the authors' code
//! There is none in public but the fork that this follows (and the paper's derivation):
//! - Variances are formed from products of the size of the logits, never as a `(dim, n_cls, n_cls)` covariance.
//! - Everything is f32; theirs multiplies variances of 1e-3 by `s²` = 10⁴ in f16.
//! - Underscores of class names become spaces before anything is counted or tokenised; the fork mixes both.
//! - One context has no pairs: its diversity term is 0, where theirs is 0/0.
//! - Prompts of all contexts and any number of classes predict; the fork drops the remainder of 1,000 when memory is short.
//! - Images are seen without random crops unless `train.augment = "crop_flip"` asks for the authors' transform.

use candle_core::{D, Tensor};
use cliptune_core::checkpoint::TorchState;
use cliptune_core::context::{self, Context};
use cliptune_core::learned::{self, Learner};
use cliptune_core::method::{self, Classifier, Entry, Method, Paper, Settings, TextClassifier};
use cliptune_core::prompt::{ClassTokenPosition, ClassTokens, Piece, Prompts};
use cliptune_core::rng::Rng;
use cliptune_core::train::{Batch, Loss, Objective, Recipe, Step};
use cliptune_core::{
    Classes, Clip, Error, ImageNeeds, Labelled, Learned, Params, Result, Run, ops,
};
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// The registry's entry.
pub const ENTRY: Entry = Entry {
    slug: "proda",
    name: "ProDA",
    family: "text-pt",
    paper: Paper {
        title: "Prompt Distribution Learning",
        authors: "Lu, Liu, Zhang, Liu, Tian",
        venue: "CVPR 2022",
        arxiv: "2205.03340",
        code: "ml-stat-Sustech/CLIP_Calibration@5b68fb1 (the authors' bbbdylan/proda@bf8d52b holds none)",
    },
    summary: "Learns many contexts whose class features are taken as samples of a Gaussian, and predicts by their mean.",
    learns: "ctx: n_prompts contexts of n_ctx vectors of the text tower's width",
    cost: "text tower forward and backward for every class under prompt_batch contexts, and once per context, at each step; images are encoded once",
    needs: ImageNeeds::GlobalFeatures,
    defaults: method::defaults_of::<ProDaConfig>,
    configure: method::configure::<ProDaConfig>,
    load: learned::load::<ProDa>,
    import: Some(learned::import::<ProDa>),
};

/// Settings of [`ProDa`]; the defaults are the fork's.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ProDaConfig {
    /// Contexts (paper: K): 1, or a number that 4 divides.
    pub n_prompts: usize,
    /// Context tokens of each, at least 1 (paper: M).
    pub n_ctx: usize,
    /// Contexts that a step takes (K_b); divides `n_prompts`.
    pub prompt_batch: usize,
    /// Weight of the diversity term, at least 0.
    pub alpha: f64,
    /// Adds the variances to the logits of a step; without them the contexts' mean is trained by cross entropy.
    pub surrogate: bool,
    /// How it is trained: 100 epochs, 4 images a step.
    pub train: Recipe,
}

impl Default for ProDaConfig {
    fn default() -> Self {
        Self {
            n_prompts: 32,
            n_ctx: 16,
            prompt_batch: 4,
            alpha: 0.1,
            surrogate: true,
            train: Recipe {
                epochs: Some(100),
                batch_size: 4,
                lr: 0.001,
                ..Recipe::default()
            },
        }
    }
}

impl Settings for ProDaConfig {
    const SLUG: &'static str = ENTRY.slug;

    fn check(&self) -> Result<()> {
        context::check(self.n_ctx)?;
        if self.n_prompts == 0 || (self.n_prompts > 1 && !self.n_prompts.is_multiple_of(4)) {
            let expected = "1, or a number that 4 divides: a quarter of the contexts stands behind the class name, a quarter around it, half in front of it";
            return Err(Error::config("n_prompts", self.n_prompts, expected));
        }
        if !self.n_prompts.is_multiple_of(self.prompt_batch) {
            let expected = format!("a divisor of n_prompts = {}", self.n_prompts);
            return Err(Error::config("prompt_batch", self.prompt_batch, expected));
        }
        method::check_weight("alpha", self.alpha)?;
        self.train.check()
    }
}

impl Method for ProDaConfig {
    type Data = Labelled;
    type Fitted = Learned<ProDa>;

    fn fit(&self, clip: &Clip, data: &Labelled, run: &mut Run) -> Result<Learned<ProDa>> {
        Learned::fit(self, &self.train, clip, data, run)
    }
}

/// Learned contexts.
#[derive(Debug)]
pub struct ProDa {
    /// `(n_prompts, n_ctx, width)`; each has its own place of the class name.
    context: Context,
    n_prompts: usize,
    prompt_batch: usize,
    alpha: f64,
    surrogate: bool,
}

impl Learner for ProDa {
    type Config = ProDaConfig;

    fn start(
        config: &ProDaConfig,
        clip: &Clip,
        classes: &Classes,
        params: &mut Params,
    ) -> Result<Self> {
        let (tower, n_prompts) = (clip.text(), config.n_prompts);
        let context = Context::several(params, tower, n_prompts, config.n_ctx)?;
        Ok(Self {
            context: context.at(ClassTokenPosition::End, tower, classes)?,
            n_prompts,
            prompt_batch: config.prompt_batch,
            alpha: config.alpha,
            surrogate: config.surrogate,
        })
    }

    fn complete(
        config: &mut ProDaConfig,
        given: &Value,
        state: &TorchState,
        clip: &Clip,
    ) -> Result<()> {
        let (contexts, n_ctx) = context::sizes_in(state, clip.text())?;
        let Some(n_prompts) = contexts else {
            return Err(Error::Prompt(
                "`ctx` of the checkpoint is one context, ProDA has several; is it CoOp's?".into(),
            ));
        };
        (config.n_prompts, config.n_ctx) = (n_prompts, n_ctx);
        // Only training takes batches of contexts.
        if given.get("prompt_batch").is_none() && !n_prompts.is_multiple_of(config.prompt_batch) {
            config.prompt_batch = n_prompts;
        }
        Ok(())
    }
}

impl ProDa {
    /// Where the class name stands in context `k`'s prompts.
    pub fn position(&self, k: usize) -> ClassTokenPosition {
        match 4 * k / self.n_prompts {
            _ if self.n_prompts == 1 => ClassTokenPosition::End,
            0 => ClassTokenPosition::Front,
            1 => ClassTokenPosition::Middle,
            _ => ClassTokenPosition::End,
        }
    }

    /// The contexts that a step takes: every context once before any comes again, in an order drawn anew each time.
    pub fn drawn(&self, step: Step) -> Vec<usize> {
        let batches = self.n_prompts / self.prompt_batch;
        let (round, batch) = (step.global() / batches, step.global() % batches);
        let order = Rng::stream(step.seed, "prompts", &[round as u64]).permutation(self.n_prompts);
        let first = batch * self.prompt_batch;
        order[first..first + self.prompt_batch].to_vec()
    }

    /// Unit features of all classes under the contexts `chosen`, `(chosen, n_cls, embed_dim)`, and, if asked for, those of
    /// every context without a class name, `(n_prompts, embed_dim)`.
    ///
    /// # Errors
    /// [`Error::PromptTooLong`].
    pub fn text_features(
        &self,
        clip: &Clip,
        classes: &ClassTokens,
        chosen: &[usize],
        nameless: bool,
    ) -> Result<(Tensor, Option<Tensor>)> {
        self.encode(self.context.tensor(), clip, classes, chosen, nameless)
    }

    fn encode(
        &self,
        contexts: &Tensor,
        clip: &Clip,
        classes: &ClassTokens,
        chosen: &[usize],
        nameless: bool,
    ) -> Result<(Tensor, Option<Tensor>)> {
        let (words, n_ctx) = (self.context.words(), self.context.n_ctx());
        let mut prompts = Prompts::new();
        let source = prompts.learn(contexts);
        let woven = classes.woven(words, n_ctx)?;
        for &k in chosen {
            for prompt in woven.around(source, |_| k, self.position(k)) {
                prompts.push(prompt);
            }
        }
        if nameless {
            let (tower, text) = (clip.text(), format!("{words}."));
            let ids = tower.tokenizer()?.tokenize(&text, tower.context_length())?;
            for context in 0..self.n_prompts {
                prompts.push(vec![
                    Piece::Words(ids[..1].to_vec()),
                    Piece::Learned {
                        source,
                        context,
                        rows: 0..n_ctx,
                    },
                    Piece::Words(ids[1 + n_ctx..].to_vec()),
                ]);
            }
        }
        let features = ops::unit_length(&clip.text().encode(&prompts)?, "a text feature")?;
        let (named, dim) = (chosen.len() * classes.len(), features.dim(1)?);
        let of_classes = features.narrow(0, 0, named)?;
        let of_classes = of_classes.reshape((chosen.len(), classes.len(), dim))?;
        let of_contexts = match nameless {
            true => Some(features.narrow(0, named, self.n_prompts)?),
            false => None,
        };
        Ok((of_classes, of_contexts))
    }

    /// Mean over all contexts of the unit features, `(n_cls, embed_dim)`, not of unit length itself.
    fn mean_features(&self, clip: &Clip, classes: &ClassTokens) -> Result<Tensor> {
        let contexts = self.context.tensor().detach();
        // One context at a time: memory does not grow with their number.
        let of = |k: usize| -> Result<Tensor> {
            let (features, _) = self.encode(&contexts, clip, classes, &[k], false)?;
            Ok(features.squeeze(0)?)
        };
        let mut sum = of(0)?;
        for k in 1..self.n_prompts {
            sum = (sum + of(k)?)?;
        }
        Ok((sum / self.n_prompts as f64)?)
    }
}

/// The variance `σ (batch, n_cls)` of `v·(w_j − w_y)` for unit image features `v (batch, dim)` of classes `labels`, under the
/// Gaussian that has `features (samples, n_cls, dim)` as samples, its covariance taken to be diagonal in `dim`.
///
/// With `A_ij = Σ_d v_d² Σ_k δ_{i,k,d} δ_{j,k,d} / (samples + 1)` it is `A_yy + A_jj − 2·A_yj`: at least 0, and 0 at `j = y`,
/// both up to rounding.
///
/// # Errors
/// [`Error::Data`] if the labels are not one below `n_cls` for each image.
pub fn variances(image: &Tensor, features: &Tensor, labels: &[u32]) -> Result<Tensor> {
    let (samples, n_cls, dim) = features.dims3()?;
    let batch = image.dim(0)?;
    ops::check_labels(labels, batch, n_cls)?;
    let labels = Tensor::new(labels, image.device())?;
    let deviations = features.broadcast_sub(&features.mean_keepdim(0)?)?;
    let squares = image.sqr()?;
    let of_all = squares.matmul(&deviations.sqr()?.sum(0)?.t()?)?;
    let of_own = of_all.gather(&labels.unsqueeze(1)?, 1)?;
    // All samples in one product: (batch, samples·dim) by (samples·dim, n_cls).
    let rows = deviations.transpose(0, 1)?.contiguous()?;
    let own = rows
        .index_select(&labels, 0)?
        .broadcast_mul(&squares.unsqueeze(1)?)?
        .reshape((batch, samples * dim))?;
    let mixed = own.matmul(&rows.reshape((n_cls, samples * dim))?.t()?)?;
    let sum = of_all.broadcast_add(&of_own)?;
    Ok(((sum - (mixed * 2.0)?)? / (samples + 1) as f64)?)
}

/// Mean over ordered pairs of different rows of `|p_k·p_l|`, for rows `(n, dim)` of unit length; 0 for a single row.
///
/// # Errors
/// If `features` is not a matrix.
pub fn diversity(features: &Tensor) -> Result<Tensor> {
    let n = features.dim(0)?;
    let all = features.matmul(&features.t()?)?.abs()?.sum_all()?;
    let own = features.sqr()?.sum(D::Minus1)?.sum_all()?;
    Ok(((all - own)? / (n * (n - 1)).max(1) as f64)?)
}

impl Objective for ProDa {
    fn classifier<'a>(
        &'a self,
        clip: &'a Clip,
        classes: &Classes,
    ) -> Result<Box<dyn Classifier + 'a>> {
        let classes = ClassTokens::new(clip.text(), classes)?;
        let features = self.mean_features(clip, &classes)?;
        Ok(Box::new(TextClassifier::new(clip, features)))
    }

    fn loss(&self, clip: &Clip, batch: &Batch<'_>, step: Step) -> Result<Loss> {
        let unit = ops::unit_length(batch.images.features()?, "an image feature")?;
        let chosen = self.drawn(step);
        let (features, of_contexts) = self.text_features(clip, batch.classes, &chosen, true)?;
        let logits = clip.unit_logits(&unit, &features.mean(0)?)?;
        let raised = match self.surrogate {
            true => {
                let variances = variances(&unit, &features, batch.labels)?;
                (&logits + (variances * (0.5 * clip.scale() * clip.scale()))?)?
            }
            false => logits.clone(),
        };
        let mut loss = Loss::cross_entropy(raised, batch.labels)?.named("ce");
        loss.logits = Some(logits);
        let diversity = match of_contexts {
            Some(features) if self.n_prompts > 1 => diversity(&features)?,
            _ => loss.total.zeros_like()?,
        };
        loss.plus(self.alpha, "diversity", diversity)
    }
}
