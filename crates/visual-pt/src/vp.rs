//! VP: one learned picture that is added to every image (Bahng, Jahanian, Sankaranarayanan, Isola, 2022, arXiv 2203.17274).
//!
//! `p(y|x) = softmax_y( scale · cos(f(x + δ), g("This is a photo of a <name_y>")) )`; only δ is learned, by cross entropy. It is
//! zero but for a frame around the image (`padding`), a square in its corner (`fixed_patch`) or a square at a random place
//! (`random_patch`), and is added to the normalised pixels, which are not clipped after.
//!
//! With a ViT δ passes the patch embedding by itself: that is linear and has no bias, so
//! `patches(x + δ) = patches(x) + patches(δ)`, whatever the image. A ResNet sees the sum of the pixels.
//!
//! # Differs from the authors' code
//! - The last epoch is kept, or with `train.keep = "best_val"` the best on validation images. Theirs keeps the epoch with the
//!   best accuracy on the *test* images and reports that one. For their number give the test images as validation images.
//! - The places of `random_patch` come from the seed; theirs from a generator that is never seeded. As in theirs there is one
//!   place for the whole batch, when predicting too, and the last row and column are never reached; `per_image = true` gives
//!   each image its own place. A patch as large as the image stays in its corner; theirs fails.
//! - The warm-up takes 1,000 steps as theirs does, but half of a run that has fewer than 2,000. Set to all steps or more it is
//!   an error; theirs divides by zero at exactly that many.
//! - Theirs clamps the logit scale to at most 4.6052 after every step, so the first loss has the weights' own and everything
//!   later the clamped one. So has this.
//! - All is computed in f32; theirs in f16 with a scaled loss. CLIP is frozen; theirs collects gradients for it without using
//!   them. Class features are encoded once for a list of classes, not once per step (equal numbers).
//! - They stop early after 1,000 epochs without a better accuracy, which never happens in their 1,000 epochs: left out.

use std::cell::Cell;
use std::ops::Range;

use candle_core::{DType, Device, Tensor};
use cliptune_core::checkpoint::TorchState;
use cliptune_core::learned::{self, Learner};
use cliptune_core::method::{self, Classifier, Entry, Method, Paper, Settings};
use cliptune_core::optim::OptimizerConfig;
use cliptune_core::prompt::ClassTokens;
use cliptune_core::rng::Rng;
use cliptune_core::schedule::{Decay, Schedule, Warmup};
use cliptune_core::templates::Sentences;
use cliptune_core::train::{Batch, Loss, Objective, Recipe, Step};
use cliptune_core::visual_prompt::VisualPrompts;
use cliptune_core::{
    Classes, Clip, Error, ImageBatch, ImageNeeds, Labelled, Learned, Param, Params, Result, Run,
    VisionArch, ops,
};
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// The registry's entry.
pub const ENTRY: Entry = Entry {
    slug: "vp",
    name: "VP",
    family: "visual-pt",
    paper: Paper {
        title: "Exploring Visual Prompts for Adapting Large-Scale Models",
        authors: "Bahng, Jahanian, Sankaranarayanan, Isola",
        venue: "arXiv 2022",
        arxiv: "2203.17274",
        code: "hjbahng/visual_prompting@679e71f",
    },
    summary: "Learns a frame of pixels, or a patch, that is added to every image; class features are hand-written.",
    learns: "pad_up, pad_down, pad_left, pad_right: the pixels of a frame; or patch: those of a square",
    cost: "image tower forward and backward for every image at each step; classes are encoded once",
    needs: ImageNeeds::Pixels,
    defaults: method::defaults_of::<VpConfig>,
    configure: method::configure::<VpConfig>,
    load: learned::load::<Vp>,
    import: Some(learned::import::<Vp>),
};

/// Which pixels are learned.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Prompter {
    /// A frame around the image.
    #[default]
    Padding,
    /// A square in the upper left corner.
    FixedPatch,
    /// A square whose place is drawn at every step, and for every batch that is predicted.
    RandomPatch,
}

impl Prompter {
    /// The first of its keys in the authors' checkpoints.
    fn key(self) -> &'static str {
        match self {
            Self::Padding => UP,
            Self::FixedPatch | Self::RandomPatch => PATCH,
        }
    }
}

// The authors' keys.
const UP: &str = "pad_up";
const DOWN: &str = "pad_down";
const LEFT: &str = "pad_left";
const RIGHT: &str = "pad_right";
const PATCH: &str = "patch";

/// Settings of [`Vp`]; the defaults are the authors'.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct VpConfig {
    /// Which pixels are learned.
    pub prompter: Prompter,
    /// Width of the frame or side of the square, in pixels, at least 1; `None`: the authors' 30 of 224, in proportion to the
    /// image.
    pub prompt_size: Option<usize>,
    /// With `random_patch`: a place for every image in the place of one for the batch.
    pub per_image: bool,
    /// The hand-written sentence, `{}` standing for the class name in lower case, with spaces for underscores and hyphens;
    /// `None`: `This is a photo of a {}`, without a full stop, for every data set.
    pub template: Option<String>,
    /// How it is trained: 1,000 epochs, 256 images a step, rate 40.
    pub train: Recipe,
}

impl Default for VpConfig {
    fn default() -> Self {
        Self {
            prompter: Prompter::default(),
            prompt_size: None,
            per_image: false,
            template: None,
            train: Recipe {
                epochs: Some(1000),
                batch_size: 256,
                drop_last: false,
                lr: 40.0,
                optimizer: OptimizerConfig::Sgd {
                    momentum: 0.9,
                    weight_decay: 0.0,
                    dampening: 0.0,
                    nesterov: false,
                },
                schedule: Schedule {
                    decay: Decay::CosineBySteps {},
                    warmup: Warmup::LinearBySteps { steps: None },
                },
                ..Recipe::default()
            },
        }
    }
}

impl VpConfig {
    /// The authors' sentence.
    pub const TEMPLATE: &str = "This is a photo of a {}";
    /// The authors' prompt size, for images of [`VpConfig::SIDE`] pixels.
    pub const SIZE: usize = 30;
    /// Side of the authors' images.
    pub const SIDE: usize = 224;

    /// The prompt size for images of `side` pixels.
    ///
    /// # Errors
    /// [`Error::Config`] if it does not fit.
    pub fn size_for(&self, side: usize) -> Result<usize> {
        let papers = (Self::SIZE * side + Self::SIDE / 2) / Self::SIDE;
        let size = self.prompt_size.unwrap_or(papers.max(1));
        let (most, what) = match self.prompter {
            Prompter::Padding => (side / 2, "a frame"),
            Prompter::FixedPatch | Prompter::RandomPatch => (side, "a patch"),
        };
        match (1..=most).contains(&size) {
            true => Ok(size),
            false => {
                let expected = format!("1 to {most} for {what} on images of {side}×{side} pixels");
                Err(Error::config("prompt_size", size, expected))
            }
        }
    }

    fn sentences(&self) -> Result<Sentences> {
        let template = self.template.as_deref().unwrap_or(Self::TEMPLATE);
        Sentences::new(vec![template.to_owned()])
    }
}

impl Settings for VpConfig {
    const SLUG: &'static str = ENTRY.slug;

    fn check(&self) -> Result<()> {
        if self.prompt_size == Some(0) {
            return Err(Error::config("prompt_size", 0, "at least one pixel"));
        }
        if self.per_image && self.prompter != Prompter::RandomPatch {
            let expected = "needs prompter = \"random_patch\"; the others have one place";
            return Err(Error::config("per_image", true, expected));
        }
        self.sentences()?;
        self.train.check()
    }
}

impl Method for VpConfig {
    type Data = Labelled;
    type Fitted = Learned<Vp>;

    fn fit(&self, clip: &Clip, data: &Labelled, run: &mut Run) -> Result<Learned<Vp>> {
        Learned::fit(self, &self.train, clip, data, run)
    }
}

/// What is learned.
#[derive(Debug)]
enum Pixels {
    /// Above and below `(1, 3, p, side)`, left and right `(1, 3, side − 2p, p)`.
    Frame([Param; 4]),
    /// `(1, 3, p, p)`.
    Patch(Param),
}

/// Row and column of a patch's upper left pixel.
pub type Place = (usize, usize);

/// The learned picture δ.
#[derive(Debug)]
pub struct Vp {
    prompter: Prompter,
    pixels: Pixels,
    /// Side of the images.
    side: usize,
    /// Width of the frame or side of the patch.
    size: usize,
    per_image: bool,
    seed: u64,
    sentences: Sentences,
}

impl Vp {
    /// δ with the patch at each of `places`, `(places, 3, side, side)`; a frame has one place, whatever it is called. Gradients
    /// flow to the learned pixels; the others are zeros without any.
    ///
    /// # Errors
    /// Whatever the tensor library refuses, such as a place outside of the image.
    pub fn perturbations(&self, places: &[Place]) -> Result<Tensor> {
        let (side, p) = (self.side, self.size);
        let patch = match &self.pixels {
            Pixels::Frame(pieces) => return self.frame(pieces),
            Pixels::Patch(patch) => patch.tensor(),
        };
        let placed = places.iter().map(|&(row, column)| {
            let rows = patch.pad_with_zeros(2, row, side.saturating_sub(row + p))?;
            rows.pad_with_zeros(3, column, side.saturating_sub(column + p))
        });
        let placed = placed.collect::<candle_core::Result<Vec<_>>>()?;
        Ok(Tensor::cat(&placed, 0)?)
    }

    fn frame(&self, pieces: &[Param; 4]) -> Result<Tensor> {
        let [up, down, left, right] = pieces.each_ref().map(Param::tensor);
        let inside = self.side - 2 * self.size;
        if inside == 0 {
            return Ok(Tensor::cat(&[up, down], 2)?);
        }
        let zeros = Tensor::zeros((1, 3, inside, inside), DType::F32, &Device::Cpu)?;
        let middle = Tensor::cat(&[left, &zeros, right], 3)?;
        Ok(Tensor::cat(&[up, &middle, down], 2)?)
    }

    /// Raw features of images, pixels `(batch, 3, side, side)` or a ViT's patches `(batch, grid², width)`, under δ
    /// `(1 or batch, 3, side, side)`: `(batch, embed_dim)`; gradients flow to the learned pixels.
    ///
    /// # Errors
    /// [`Error::Prompt`] if the images are not of the size that δ was learned for.
    pub fn image_features(&self, clip: &Clip, images: &Tensor, delta: &Tensor) -> Result<Tensor> {
        if let [_, _, height, width] = *images.dims()
            && (height, width) != (self.side, self.side)
        {
            return Err(of_other_size(self.side, (height, width)));
        }
        match clip.arch().vision {
            VisionArch::Vit { .. } => {
                let patches = perturbed_patches(clip, images, delta)?;
                clip.image()
                    .encode_prompted(&patches, &VisualPrompts::new())
            }
            VisionArch::ResNet { .. } => clip.image().encode(&images.broadcast_add(delta)?),
        }
    }

    /// Unit features of the classes, `(n_cls, embed_dim)`.
    ///
    /// # Errors
    /// [`Error::PromptTooLong`]; [`Error::Data`] for a name of hyphens alone.
    pub fn text_features(&self, clip: &Clip, classes: &ClassTokens) -> Result<Tensor> {
        self.sentences.mean(clip, &spoken(clip, classes.names())?)
    }

    /// Loss of a batch under the patch at `places`, one for all images or one for each.
    ///
    /// # Errors
    /// As [`Vp::image_features`] and [`Vp::text_features`].
    pub fn loss_at(
        &self,
        clip: &Clip,
        batch: &Batch<'_>,
        places: &[Place],
        step: Step,
    ) -> Result<Loss> {
        let text = self.text_features(clip, batch.classes)?;
        let delta = self.perturbations(places)?;
        let images = batch.images.pixels_or_patches()?;
        let images = self.image_features(clip, images, &delta)?;
        let logits = logits(&images, &text, logit_scale(clip, step.global()))?;
        Loss::cross_entropy(logits, batch.labels)
    }

    /// The places of some images: one for all, or one for each. They depend on the seed, `purpose`, `round` and the images'
    /// numbers.
    fn places(&self, purpose: &str, round: u64, images: Range<u64>) -> Vec<Place> {
        if self.prompter != Prompter::RandomPatch {
            return vec![(0, 0)];
        }
        let drawn = match self.per_image {
            true => images,
            false => images.start..images.start + 1,
        };
        let offsets = self.side - self.size;
        let place = |image| {
            let mut rng = Rng::stream(self.seed, purpose, &[round, image]);
            (rng.below(offsets), rng.below(offsets))
        };
        drawn.map(place).collect()
    }
}

/// Logarithm of the cosines' factor once `steps` steps are done: the weights' own, from the first step on clamped to 0 to 4.6052
/// as the authors do.
pub fn logit_scale(clip: &Clip, steps: usize) -> f64 {
    match steps {
        0 => clip.logit_scale(),
        _ => clip.logit_scale().clamp(0.0, f64::from(4.6052f32)),
    }
}

/// `exp(logit_scale) · cos` of raw image features and unit text features, `(batch, n_cls)`.
fn logits(images: &Tensor, text: &Tensor, logit_scale: f64) -> Result<Tensor> {
    let images = ops::unit_length(images, "an image feature")?;
    // The authors take the exponential in f32.
    let scale = f64::from((logit_scale as f32).exp());
    Ok((images * scale)?.matmul(&text.t()?)?)
}

/// Class names as the authors' sentence speaks them.
///
/// # Errors
/// [`Error::Data`] if a name has no letter left.
pub fn spoken(clip: &Clip, names: &[String]) -> Result<ClassTokens> {
    let names = names
        .iter()
        .map(|name| name.to_lowercase().replace(['_', '-'], " "));
    ClassTokens::new(clip.text(), &Classes::new(names.collect())?)
}

fn of_other_size(side: usize, (height, width): (usize, usize)) -> Error {
    Error::Prompt(format!(
        "the prompt was learned for images of {side}×{side} pixels, these are {height}×{width}; take the weights it was learned with, or learn it anew"
    ))
}

impl Learner for Vp {
    type Config = VpConfig;

    /// Pixels start from N(0, 1), in units of normalised pixels.
    fn start(
        config: &VpConfig,
        clip: &Clip,
        classes: &Classes,
        params: &mut Params,
    ) -> Result<Self> {
        let side = clip.arch().image_resolution;
        let size = config.size_for(side)?;
        let seed = params.seed();
        let mut drawn = |key: &str, rows, columns| params.normal(key, (1, 3, rows, columns), 1.0);
        let pixels = match config.prompter {
            Prompter::Padding => {
                let inside = side - 2 * size;
                Pixels::Frame([
                    drawn(UP, size, side)?,
                    drawn(DOWN, size, side)?,
                    drawn(LEFT, inside, size)?,
                    drawn(RIGHT, inside, size)?,
                ])
            }
            Prompter::FixedPatch | Prompter::RandomPatch => {
                Pixels::Patch(drawn(PATCH, size, size)?)
            }
        };
        let sentences = config.sentences()?;
        // Refuses names that are too long before any work.
        let classes = spoken(clip, classes.names())?;
        for template in sentences.templates() {
            classes.fill(template)?;
        }
        Ok(Self {
            prompter: config.prompter,
            pixels,
            side,
            size,
            per_image: config.per_image,
            seed,
            sentences,
        })
    }

    fn complete(config: &mut VpConfig, _: &Value, state: &TorchState, clip: &Clip) -> Result<()> {
        let key = config.prompter.key();
        let missing = || {
            let other = [UP, PATCH]
                .into_iter()
                .find(|k| state.tensors.contains_key(*k));
            Error::Prompt(match other {
                Some(PATCH) => format!(
                    "the checkpoint holds no `{key}` but `{PATCH}`: set prompter to \"fixed_patch\" or \"random_patch\""
                ),
                Some(other) => format!(
                    "the checkpoint holds no `{key}` but `{other}`: set prompter to \"padding\""
                ),
                None => format!("the checkpoint holds no `{key}`"),
            })
        };
        let tensor = state.tensors.get(key).ok_or_else(missing)?;
        let [1, 3, size, length] = *tensor.dims() else {
            return Err(Error::Shape {
                what: format!("`{key}` of the checkpoint"),
                found: tensor.dims().to_vec(),
                expected: vec![1, 3, VpConfig::SIZE, VpConfig::SIDE],
            });
        };
        let side = clip.arch().image_resolution;
        if config.prompter == Prompter::Padding && length != side {
            return Err(of_other_size(length, (side, side)));
        }
        config.prompt_size = Some(size);
        Ok(())
    }
}

impl Objective for Vp {
    fn needs(&self) -> ImageNeeds {
        ImageNeeds::Pixels
    }

    fn classifier<'a>(
        &'a self,
        clip: &'a Clip,
        classes: &Classes,
    ) -> Result<Box<dyn Classifier + 'a>> {
        let classes = ClassTokens::new(clip.text(), classes)?;
        Ok(Box::new(PerturbedClassifier {
            clip,
            vp: self,
            text_features: self.text_features(clip, &classes)?,
            seen: Cell::new(0),
        }))
    }

    fn loss(&self, clip: &Clip, batch: &Batch<'_>, step: Step) -> Result<Loss> {
        let images = batch.images.len() as u64;
        let places = self.places("vp/step", step.global() as u64, 0..images);
        self.loss_at(clip, batch, &places, step)
    }
}

/// A ViT's patches of images under δ, from pixels or patches. One embedding of δ serves the whole batch, and so does one on the
/// way back.
fn perturbed_patches(clip: &Clip, images: &Tensor, delta: &Tensor) -> Result<Tensor> {
    let image = clip.image();
    let delta = image.patches(delta)?;
    Ok(match images.rank() {
        4 => image.patches(images)?.broadcast_add(&delta)?,
        _ => images.broadcast_add(&delta)?,
    })
}

/// Compares images under δ with one fixed feature per class.
#[derive(Debug)]
struct PerturbedClassifier<'a> {
    clip: &'a Clip,
    vp: &'a Vp,
    /// `(n_cls, embed_dim)`, of unit length.
    text_features: Tensor,
    /// Images so far, which the places of the next depend on.
    seen: Cell<u64>,
}

impl PerturbedClassifier<'_> {
    /// What is added to the next so many images.
    fn delta(&self, images: usize) -> Result<Tensor> {
        let first = self.seen.get();
        let places = first..first + images as u64;
        let places = self.vp.places("vp/predict", 0, places);
        Ok(self.vp.perturbations(&places)?.detach())
    }
}

impl Classifier for PerturbedClassifier<'_> {
    fn logits(&self, images: &ImageBatch) -> Result<Tensor> {
        let delta = self.delta(images.len())?;
        self.seen.set(self.seen.get() + images.len() as u64);
        let images = self
            .vp
            .image_features(self.clip, images.pixels_or_patches()?, &delta)?;
        logits(&images, &self.text_features, logit_scale(self.clip, 1))
    }

    /// Of a ViT.
    fn class_attention(&self, images: &ImageBatch) -> Result<Option<Tensor>> {
        if let VisionArch::ResNet { .. } = self.clip.arch().vision {
            return Ok(None);
        }
        let delta = self.delta(images.len())?;
        let patches = perturbed_patches(self.clip, images.pixels_or_patches()?, &delta)?;
        let image = self.clip.image();
        Ok(Some(
            image.class_attention(&patches, &VisualPrompts::new())?,
        ))
    }

    /// A patch that has no place of its own is in the corner.
    fn added_pixels(&self) -> Result<Option<Tensor>> {
        Ok(Some(self.vp.perturbations(&[(0, 0)])?.detach()))
    }
}
