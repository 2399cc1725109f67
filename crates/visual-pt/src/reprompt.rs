//! RePrompt: visual prompts that depend on what similar training images are (Rong, Chen, Ou, Chen, Yu, Liu, arXiv 2306.02243).
//!
//! A database holds the frozen features of the training images. An image's neighbours N there have weights
//! `w_i = softmax_i(cos(q, key_i) / tau)` and say
//!
//! - at the input: `V_l + Δ_l` are the tokens of block l of the image tower, with
//!   `Δ = up(relu(down([Σ w_i·key_i ; Σ w_i·t⁰_{y_i}])))` and t⁰ the features of hand-written sentences;
//! - in training: `loss = mean( (1 + beta·F) · CE )`, `F = −log p_kNN(y)` held below 5, `p_kNN(c) = Σ_{y_i = c} w_i`;
//! - to predict: `p = lambda·p_kNN + (1 − lambda)·p_model`.
//!
//! A training image never finds itself.
//!
//! # Differs from the authors' code
//! There is none that is public, and only the paper's abstract could be read: a database of training images, or external ones,
//! and retrieval at several stages of prompt learning are its words. This is a reading of them, not a reproduction.
//! - The weighted loss and the mixed probabilities are those of RetroPrompt (Chen et al., NeurIPS 2022), whose CLIP trainer
//!   (zjunlp/PromptKG) also gives the keys, means over 10 augmented passes, and k = 4. Its faults are not taken over: mixing as
//!   if probabilities were logarithms, keys of images in an order that changes from pass to pass, one weight for the whole
//!   batch, images that find themselves.
//! - How neighbours enter the image tower, `tau`, the bound of F, the network and the prompts' numbers are this project's.

use std::collections::BTreeMap;

use candle_core::{Device, Tensor};
use cliptune_core::checkpoint::TorchState;
use cliptune_core::context::{Context, Start};
use cliptune_core::layers::Affine;
use cliptune_core::learned::{self, Learner};
use cliptune_core::method::{self, Classifier, Entry, Method, Paper, Predictor, Settings};
use cliptune_core::prompt::ClassTokens;
use cliptune_core::prompt_file::PromptFile;
use cliptune_core::templates::{self, Sentences};
use cliptune_core::train::{Augment, Batch, Loss, Objective, Recipe, Step, train};
use cliptune_core::visual_prompt::{Tokens, VisualPrompts};
use cliptune_core::{
    Classes, Clip, Error, ImageNeeds, Labelled, Learned, Param, Params, Result, Run, View, ops,
};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::retrieval::{self, Database, Neighbour};
use crate::voting::Voting;

/// The registry's entry.
pub const ENTRY: Entry = Entry {
    slug: "reprompt",
    name: "RePrompt",
    family: "visual-pt",
    paper: Paper {
        title: "Retrieval-Enhanced Visual Prompt Learning for Few-shot Classification",
        authors: "Rong, Chen, Ou, Chen, Yu, Liu",
        venue: "preprint 2023",
        arxiv: "2306.02243",
        code: "none is public",
    },
    summary: "Learns prompts in both towers and looks up similar training images: they shift the image's prompts, weigh the loss, and vote.",
    learns: "ctx: n_ctx vectors of the text tower's width; visual_prompts: n_ctx_vision tokens for each of prompt_depth_vision blocks; retrieval_net: two linear maps",
    cost: "both towers forward and backward at each step, and the image tower forward once more to look the image up, when predicting too",
    needs: ImageNeeds::Pixels,
    defaults: method::defaults_of::<RePromptConfig>,
    configure: method::configure::<RePromptConfig>,
    load,
    import: None,
};

/// Key of the share of the neighbours' votes in a prompt file.
const LAMBDA: &str = "lambda";

/// What F is held below: an image without a neighbour of its class counts at most `1 + 5·beta`.
const MOST_GUIDANCE: f32 = 5.0;

/// Settings of [`RePrompt`]. The paper's could not be read; see the module.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RePromptConfig {
    /// Text context tokens, at least 1. `None`: as many as `ctx_init` has tokens, else 4.
    pub n_ctx: Option<usize>,
    /// Words to start from, one token each; `None` or empty draws from N(0, 0.02²).
    pub ctx_init: Option<String>,
    /// Visual prompt tokens of each block; 0 leaves the image tower as it is.
    pub n_ctx_vision: usize,
    /// Blocks of the image tower that read prompts, at least 1; `None`: all.
    pub prompt_depth_vision: Option<usize>,
    /// Inner width of the network that makes Δ; `None`: a sixteenth of the features'.
    pub hidden: Option<usize>,
    /// Neighbours of an image; `None`: 4, or all that there are.
    pub k: Option<usize>,
    /// Temperature of the neighbours' weights, above 0.
    pub tau: f64,
    /// Weight of F in the loss; `None`: 0.2, or 0 at one shot, where no image finds one of its class.
    pub beta: Option<f64>,
    /// Share of the neighbours' votes, 0 to 1; `None`: the best on the validation images of 0, 0.05, ..., 0.95, else 0.2.
    pub lambda: Option<f64>,
    /// Random crops whose mean is an image's key; 0: its fixed view.
    pub passes: usize,
    /// The hand-written sentence of t⁰, `{}` standing for the class name; `None`: `a photo of a {}.`
    pub template: Option<String>,
    /// How it is trained: the CoOp family's recipe, with random crops.
    pub train: Recipe,
}

impl Default for RePromptConfig {
    fn default() -> Self {
        Self {
            n_ctx: None,
            ctx_init: Some("a photo of a".into()),
            n_ctx_vision: 4,
            prompt_depth_vision: None,
            hidden: None,
            k: None,
            tau: 0.05,
            beta: None,
            lambda: None,
            passes: 10,
            template: None,
            train: Recipe {
                // The image tower runs at every step whatever the view.
                augment: Augment::CropFlip,
                ..Recipe::default()
            },
        }
    }
}

impl RePromptConfig {
    /// Text context tokens without initial words.
    pub const N_CTX: usize = 4;
    /// Neighbours.
    pub const K: usize = 4;
    /// Weight of F.
    pub const BETA: f64 = 0.2;
    /// Share of the neighbours' votes where there is nothing to choose it by.
    pub const LAMBDA: f64 = 0.2;
    /// The features' width over that of the network.
    const NARROWING: usize = 16;

    fn start(&self) -> Start {
        Start::of_words(self.ctx_init.as_deref(), self.n_ctx, Self::N_CTX)
    }

    fn sentences(&self) -> Result<Sentences> {
        let template = self.template.as_deref().unwrap_or(templates::DEFAULT);
        Sentences::new(vec![template.to_owned()])
    }

    /// As [`Method::fit`] with labelled images in the database that are not learned from. They must not be among those that
    /// the result is measured on.
    ///
    /// # Errors
    /// As [`Method::fit`], and as [`Database::joined`].
    pub fn fit_with(
        &self,
        clip: &Clip,
        data: &Labelled,
        external: Option<&Database>,
        run: &mut Run,
    ) -> Result<Learned<RePrompt>> {
        data.check()?;
        let mut method = Learned::<RePrompt>::new(self, clip, &data.classes, run.seed)?;
        let mut database = Database::of_split(clip, &data.train, self.passes, run)?;
        if let Some(external) = external {
            database = database.joined(external)?;
        }
        retrieval::check_k(method.k(&database), database.available())?;
        method.set_database(database)?;
        match (data.shots(), self.beta) {
            (1, None) => method.beta = 0.0,
            (1, Some(beta)) if beta > 0.0 && external.is_none() => run.progress.note(
                "one picture a class: no image finds one of its class, so beta weighs all alike; leave it out or set it to 0",
            ),
            _ => {}
        }
        if self.train.augment == Augment::None {
            // The training images look the same at every step.
            let features = retrieval::features(clip, &data.train, View::Fixed, |_| Ok(()))?;
            let features = ops::unit_length(&features, "an image feature")?.to_vec2()?;
            let items = data.train.items().iter().map(|(item, _)| *item);
            method.queries = items.zip(features).collect();
        }
        train(
            &mut method,
            clip,
            data,
            &self.train,
            &method::value_of(self),
            run,
        )?;
        if let (None, Some(val)) = (self.lambda, &data.val)
            && !val.is_empty()
        {
            let voting = Voting::new(clip, &method, &method.classes, &data.classes, 0.0)?;
            method.lambda = voting.best_share(val)?;
        }
        Ok(method)
    }
}

impl Settings for RePromptConfig {
    const SLUG: &'static str = ENTRY.slug;

    fn check(&self) -> Result<()> {
        self.start().check()?;
        for (key, set, what) in [
            ("prompt_depth_vision", self.prompt_depth_vision, "block"),
            ("hidden", self.hidden, "number"),
            ("k", self.k, "neighbour"),
        ] {
            if set == Some(0) {
                return Err(Error::config(key, 0, format!("at least one {what}")));
            }
        }
        method::check_positive("tau", self.tau)?;
        method::check_weight("beta", self.beta.unwrap_or(0.0))?;
        let lambda = self.lambda.unwrap_or(0.0);
        if !(0.0..=1.0).contains(&lambda) {
            return Err(Error::config("lambda", lambda, "a share from 0 to 1"));
        }
        self.sentences()?;
        self.train.check()
    }
}

impl Method for RePromptConfig {
    type Data = Labelled;
    type Fitted = Learned<RePrompt>;

    fn fit(&self, clip: &Clip, data: &Labelled, run: &mut Run) -> Result<Learned<RePrompt>> {
        self.fit_with(clip, data, None, run)
    }
}

/// From a prompt file: the database belongs to the weights that it was encoded with.
///
/// # Errors
/// As [`PromptFile::check_clip`] and [`Learned::load`].
pub fn load(file: &PromptFile, clip: &Clip) -> Result<Box<dyn Predictor>> {
    file.check_clip(clip)?;
    learned::load::<RePrompt>(file, clip)
}

/// What is learned inside the image tower.
#[derive(Debug)]
struct Visual {
    /// `(blocks, n_ctx_vision, width)`.
    prompts: Param,
    down: Affine,
    up: Affine,
}

/// Prompts of both towers, the network that neighbours go through, and the database.
#[derive(Debug)]
pub struct RePrompt {
    context: Context,
    visual: Option<Visual>,
    embed_dim: usize,
    /// The classes trained on.
    classes: Classes,
    own: ClassTokens,
    sentences: Sentences,
    /// Empty until the training images are known.
    database: Option<Database>,
    /// Unit features of training images that look the same at every step, by their numbers in the source.
    queries: BTreeMap<usize, Vec<f32>>,
    k: Option<usize>,
    tau: f64,
    beta: f64,
    lambda: f32,
}

/// What a batch of images found.
#[derive(Clone, Debug)]
pub struct Found {
    /// Every image's neighbours, nearest first.
    pub neighbours: Vec<Vec<Neighbour>>,
    /// p_kNN over the classes trained on, `(batch, n_cls)`.
    pub votes: Vec<Vec<f32>>,
    /// `[Σ w_i·key_i ; Σ w_i·t⁰_{y_i}]`, `(batch, 2·embed_dim)`.
    pub context: Tensor,
}

impl RePrompt {
    /// The database.
    ///
    /// # Errors
    /// [`Error::Prompt`] before there is one.
    pub fn database(&self) -> Result<&Database> {
        let missing = || Error::Prompt("there is no retrieval database yet; fit builds it".into());
        self.database.as_ref().ok_or_else(missing)
    }

    /// Takes a database of the classes trained on.
    ///
    /// # Errors
    /// As [`Database::check`] for the features' width and the number of classes.
    pub fn set_database(&mut self, database: Database) -> Result<()> {
        database.check(self.embed_dim, self.classes.len())?;
        self.database = Some(database);
        Ok(())
    }

    /// Neighbours of an image, if the database has so many.
    fn k(&self, database: &Database) -> usize {
        let others = database.len().saturating_sub(1);
        self.k.unwrap_or(RePromptConfig::K.min(others).max(1))
    }

    /// What training images find, themselves left out; `items` are their numbers in the source.
    fn look_up_others(&self, clip: &Clip, images: &Tensor, items: &[usize]) -> Result<Found> {
        let known = items.iter().map(|item| self.queries.get(item).cloned());
        match known.collect::<Option<Vec<_>>>() {
            Some(queries) => self.look_up(clip, &queries, Some(items)),
            None => self.look_up(clip, &queries(clip, images)?, Some(items)),
        }
    }

    /// Looks unit features up; `own` are the numbers of training images, which do not find themselves.
    ///
    /// # Errors
    /// [`Error::Config`] if there are fewer than k neighbours, [`Error::Prompt`] without a database.
    pub fn look_up(
        &self,
        clip: &Clip,
        queries: &[Vec<f32>],
        own: Option<&[usize]>,
    ) -> Result<Found> {
        let database = self.database()?;
        let k = self.k(database);
        let written = self.sentences.mean(clip, &self.own)?.to_vec2::<f32>()?;
        let (mut neighbours, mut votes, mut context) = (Vec::new(), Vec::new(), Vec::new());
        for (i, query) in queries.iter().enumerate() {
            let own = own.map(|items| items[i]);
            let found = database.nearest(query, (k, self.tau), own)?;
            let mut of_image = vec![0.0; 2 * self.embed_dim];
            let (key, value) = of_image.split_at_mut(self.embed_dim);
            for &(entry, weight) in &found {
                let label = database.label(entry) as usize;
                add(key, database.key(entry), weight);
                add(value, &written[label], weight);
            }
            context.extend(of_image);
            votes.push(database.votes(&found, self.classes.len()));
            neighbours.push(found);
        }
        let shape = (queries.len(), 2 * self.embed_dim);
        Ok(Found {
            neighbours,
            votes,
            context: Tensor::from_vec(context, shape, &Device::Cpu)?,
        })
    }

    /// Raw features of images, pixels `(batch, 3, side, side)` or patches `(batch, grid², width)`, whose neighbours gave `context (batch, 2·embed_dim)`,
    /// `(batch, embed_dim)`; gradients flow to the visual prompts and the network.
    ///
    /// # Errors
    /// [`Error::Shape`] if the images are not of the tower's resolution.
    pub fn image_features(&self, clip: &Clip, images: &Tensor, context: &Tensor) -> Result<Tensor> {
        match self.visual_prompts(context)? {
            Some(prompts) => clip.image().encode_prompted(images, &prompts),
            None => unprompted(clip, images),
        }
    }

    /// What images whose neighbours gave `context` are seen with.
    pub(crate) fn visual_prompts(&self, context: &Tensor) -> Result<Option<VisualPrompts>> {
        let Some(visual) = &self.visual else {
            return Ok(None);
        };
        let (blocks, _, width) = visual.prompts.tensor().dims3()?;
        let shift = visual.up.forward(&visual.down.forward(context)?.relu()?)?;
        let shift = shift.reshape((context.dim(0)?, blocks, 1, width))?;
        let of_block = |block| -> Result<Tokens> {
            let of_image = shift.narrow(1, block, 1)?.squeeze(1)?;
            let of_all = visual.prompts.tensor().narrow(0, block, 1)?;
            Ok(Tokens::PerImage(of_image.broadcast_add(&of_all)?))
        };
        let by_block = (0..blocks).map(of_block).collect::<Result<Vec<_>>>()?;
        Ok(Some(VisualPrompts::deep(by_block)))
    }

    /// Raw text features of the classes, `(n_cls, embed_dim)`; gradients flow to the context.
    ///
    /// # Errors
    /// [`Error::PromptTooLong`].
    pub fn text_features(&self, clip: &Clip, classes: &ClassTokens) -> Result<Tensor> {
        self.context.text_features(clip, classes)
    }

    /// F of each image: `−log p_kNN` of its label, at most 5. `votes (batch, n_cls)`.
    fn guidance(votes: &[Vec<f32>], labels: &[u32]) -> Result<Tensor> {
        let of_image = |(votes, label): (&Vec<f32>, &u32)| {
            let vote = votes.get(*label as usize).copied().unwrap_or(0.0);
            // A rounding above 1 would count as less than nothing.
            (-vote.ln()).clamp(0.0, MOST_GUIDANCE)
        };
        let guidance: Vec<f32> = votes.iter().zip(labels).map(of_image).collect();
        Ok(Tensor::new(guidance, &Device::Cpu)?)
    }
}

/// Raw features of images without visual prompts, `(batch, embed_dim)`.
fn unprompted(clip: &Clip, images: &Tensor) -> Result<Tensor> {
    clip.image().encode_prompted(images, &VisualPrompts::new())
}

/// Unit features of unprompted images, `(batch, embed_dim)`: what is looked up.
pub(crate) fn queries(clip: &Clip, images: &Tensor) -> Result<Vec<Vec<f32>>> {
    let features = unprompted(clip, &images.detach())?;
    Ok(ops::unit_length(&features, "an image feature")?.to_vec2()?)
}

/// Adds `weight · x` to `sum`.
fn add(sum: &mut [f32], x: &[f32], weight: f32) {
    sum.iter_mut()
        .zip(x)
        .for_each(|(sum, x)| *sum += weight * x);
}

impl Learner for RePrompt {
    type Config = RePromptConfig;

    fn start(
        config: &RePromptConfig,
        clip: &Clip,
        classes: &Classes,
        params: &mut Params,
    ) -> Result<Self> {
        let (layers, width) = clip.arch().vit_sizes()?;
        let depth = config.prompt_depth_vision.unwrap_or(layers);
        if depth > layers {
            let expected = format!("1 to {layers}, the blocks of the tower");
            return Err(Error::config("prompt_depth_vision", depth, expected));
        }
        // Refuses names that are too long before any work.
        let context = config.start().context(params, clip.text(), classes)?;
        let embed_dim = clip.arch().embed_dim;
        let visual = match config.n_ctx_vision {
            0 => None,
            n_ctx => {
                let narrow = (embed_dim / RePromptConfig::NARROWING).max(1);
                let hidden = config.hidden.unwrap_or(narrow);
                let (inputs, outputs) = (2 * embed_dim, depth * width);
                let prompts = params.normal("visual_prompts", (depth, n_ctx, width), 0.02)?;
                let down = Affine::new(params, "retrieval_net.down", (hidden, inputs))?;
                // Zeros: at the start the prompts are the same for all images.
                let up = Affine::zeros(params, "retrieval_net.up", (outputs, hidden))?;
                Some(Visual { prompts, down, up })
            }
        };
        Ok(Self {
            context,
            visual,
            embed_dim,
            classes: classes.clone(),
            own: ClassTokens::new(clip.text(), classes)?,
            sentences: config.sentences()?,
            database: None,
            queries: BTreeMap::new(),
            k: config.k,
            tau: config.tau,
            beta: config.beta.unwrap_or(RePromptConfig::BETA),
            lambda: config.lambda.unwrap_or(RePromptConfig::LAMBDA) as f32,
        })
    }

    /// There are no checkpoints of the authors' code.
    fn complete(_: &mut RePromptConfig, _: &Value, _: &TorchState, _: &Clip) -> Result<()> {
        Ok(())
    }
}

impl Objective for RePrompt {
    fn needs(&self) -> ImageNeeds {
        ImageNeeds::Pixels
    }

    fn classifier<'a>(
        &'a self,
        clip: &'a Clip,
        classes: &Classes,
    ) -> Result<Box<dyn Classifier + 'a>> {
        let voting = Voting::new(clip, self, &self.classes, classes, self.lambda)?;
        Ok(Box::new(voting))
    }

    fn loss(&self, clip: &Clip, batch: &Batch<'_>, _: Step) -> Result<Loss> {
        let untold = "which training images these are is not known, so they would find themselves; take them from a split, or name them with ImageBatch::with_items";
        let own = batch
            .images
            .items()
            .ok_or_else(|| Error::Data(untold.into()))?;
        let images = batch.images.pixels_or_patches()?;
        let found = self.look_up_others(clip, images, own)?;
        let text = self.text_features(clip, batch.classes)?;
        let images = self.image_features(clip, images, &found.context)?;
        let logits = clip.cosine_logits(&images, &text)?;
        let mut loss = Loss::cross_entropy(logits, batch.labels)?.named("ce");
        if self.beta > 0.0
            && let Some(logits) = &loss.logits
        {
            let labels = Tensor::new(batch.labels, &Device::Cpu)?.unsqueeze(1)?;
            let each = ops::log_softmax(logits)?
                .gather(&labels, 1)?
                .squeeze(1)?
                .neg()?;
            let guided = (each * Self::guidance(&found.votes, batch.labels)?)?.mean_all()?;
            loss = loss.plus(self.beta, "guided", guided)?;
        }
        Ok(loss)
    }

    fn buffers(&self) -> Result<Vec<(String, Tensor)>> {
        let mut buffers = self.database()?.tensors()?;
        buffers.push((LAMBDA.into(), Tensor::new(&[self.lambda], &Device::Cpu)?));
        Ok(buffers)
    }

    fn load_buffers(&mut self, tensors: &BTreeMap<String, Tensor>) -> Result<()> {
        self.set_database(Database::of_tensors(tensors)?)?;
        let missing = || Error::Prompt(format!("the prompt holds no `{LAMBDA}`"));
        let lambda = tensors.get(LAMBDA).ok_or_else(missing)?.flatten_all()?;
        self.lambda = lambda.get(0)?.to_scalar()?;
        Ok(())
    }
}
