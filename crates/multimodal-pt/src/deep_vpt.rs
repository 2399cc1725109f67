//! Deep visual prompt tuning: learned tokens in the image tower's blocks, and hand-written class features (Jia et al., ECCV
//! 2022, arXiv 2203.12119, for CLIP as in MaPLe's repository). Not the variational method that is called VPT too.
//!
//! Each of the first blocks of the image tower reads `n_ctx_vision` learned vectors in the place of those of the block before;
//! the text tower stays as it is. Learned by cross entropy.
//!
//! # Differs from the authors' code
//! - Prompts are not rounded to f16 on their way into the tower.
//! - A depth left out takes 12 blocks as far as the tower has them; more than it has is an error.
//! - The class features are encoded once for a list of classes, not once per step (equal numbers).

use candle_core::Tensor;
use cliptune_core::checkpoint::TorchState;
use cliptune_core::learned::{self, Learner};
use cliptune_core::method::{self, Classifier, Entry, Method, Paper, Settings};
use cliptune_core::prompt::ClassTokens;
use cliptune_core::templates::{DEFAULT, Sentences};
use cliptune_core::train::{Batch, Loss, Objective, Recipe, Step};
use cliptune_core::{Classes, Clip, Error, ImageNeeds, Labelled, Learned, Params, Result, Run};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::sides::{self, PromptedClassifier, VisualSide};

/// The registry's entry.
pub const ENTRY: Entry = Entry {
    slug: "deep-vpt",
    name: "Deep VPT",
    family: "multimodal-pt",
    paper: Paper {
        title: "Visual Prompt Tuning",
        authors: "Jia, Tang, Chen, Cardie, Belongie, Hariharan, Lim",
        venue: "ECCV 2022",
        arxiv: "2203.12119",
        code: "muzairkhattak/multimodal-prompt-learning@69bce21",
    },
    summary: "Learns tokens that the first blocks of the image tower read beside the image's own; class features are hand-written.",
    learns: "VPT and VPT_shallow: n_ctx_vision vectors of the image tower's width for each of prompt_depth_vision blocks",
    cost: "image tower forward and backward for every image at each step; classes are encoded once",
    needs: ImageNeeds::Pixels,
    defaults: method::defaults_of::<DeepVptConfig>,
    configure: method::configure::<DeepVptConfig>,
    load: learned::load::<DeepVpt>,
    import: Some(learned::import::<DeepVpt>),
};

/// Settings of [`DeepVpt`]; the defaults are the authors' for base-to-new.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DeepVptConfig {
    /// Prompt tokens of each block, at least 1.
    pub n_ctx_vision: usize,
    /// Blocks of the image tower that read prompts, at least 1; `None`: 12, or all if there are fewer. 1 is shallow.
    pub prompt_depth_vision: Option<usize>,
    /// The hand-written sentence, `{}` standing for the class name; `None` takes `a photo of a {}.` as the authors do for every
    /// data set.
    pub template: Option<String>,
    /// How it is trained: 5 epochs, 4 images a step, rate 0.0025.
    pub train: Recipe,
}

impl Default for DeepVptConfig {
    fn default() -> Self {
        Self {
            n_ctx_vision: 8,
            prompt_depth_vision: None,
            template: None,
            train: sides::recipe(0.0025),
        }
    }
}

impl DeepVptConfig {
    /// The authors' depth.
    pub const DEPTH: usize = 12;

    fn sentences(&self) -> Result<Sentences> {
        let template = self.template.as_deref().unwrap_or(DEFAULT);
        Sentences::new(vec![template.to_owned()])
    }
}

impl Settings for DeepVptConfig {
    const SLUG: &'static str = ENTRY.slug;

    fn check(&self) -> Result<()> {
        if self.n_ctx_vision == 0 {
            return Err(Error::config("n_ctx_vision", 0, "at least one token"));
        }
        if self.prompt_depth_vision == Some(0) {
            let expected = "at least one block";
            return Err(Error::config("prompt_depth_vision", 0, expected));
        }
        self.sentences()?;
        self.train.check()
    }
}

impl Method for DeepVptConfig {
    type Data = Labelled;
    type Fitted = Learned<DeepVpt>;

    fn fit(&self, clip: &Clip, data: &Labelled, run: &mut Run) -> Result<Learned<DeepVpt>> {
        Learned::fit(self, &self.train, clip, data, run)
    }
}

/// Learned prompts of the image tower.
#[derive(Debug)]
pub struct DeepVpt {
    vision: VisualSide,
    sentences: Sentences,
}

impl DeepVpt {
    /// Raw image features, `(batch, 3, side, side)` → `(batch, embed_dim)`; gradients flow to the prompts.
    ///
    /// # Errors
    /// [`Error::Shape`] if the images are not of the tower's resolution.
    pub fn image_features(&self, clip: &Clip, images: &Tensor) -> Result<Tensor> {
        clip.image().encode_prompted(images, &self.vision.prompts())
    }

    /// Unit features of the classes, `(n_cls, embed_dim)`.
    ///
    /// # Errors
    /// [`Error::PromptTooLong`].
    pub fn text_features(&self, clip: &Clip, classes: &ClassTokens) -> Result<Tensor> {
        self.sentences.mean(clip, classes)
    }
}

impl Learner for DeepVpt {
    type Config = DeepVptConfig;

    fn start(
        config: &DeepVptConfig,
        clip: &Clip,
        classes: &Classes,
        params: &mut Params,
    ) -> Result<Self> {
        let (blocks, width) = clip.arch().vit_sizes()?;
        let (set, papers) = (config.prompt_depth_vision, DeepVptConfig::DEPTH);
        let depth = sides::depth("prompt_depth_vision", set, papers, blocks, 1)?;
        let vision = VisualSide::new(params, width, config.n_ctx_vision, depth)?;
        let sentences = config.sentences()?;
        // Refuses names that are too long before any work.
        let classes = ClassTokens::new(clip.text(), classes)?;
        for template in sentences.templates() {
            classes.fill(template)?;
        }
        Ok(Self { vision, sentences })
    }

    fn complete(config: &mut DeepVptConfig, _: &Value, state: &TorchState, _: &Clip) -> Result<()> {
        config.n_ctx_vision = sides::rows_of(state, &VisualSide::key(0))?;
        config.prompt_depth_vision = Some(sides::count(state, 0, VisualSide::key));
        Ok(())
    }
}

impl Objective for DeepVpt {
    fn needs(&self) -> ImageNeeds {
        ImageNeeds::Pixels
    }

    fn classifier<'a>(
        &'a self,
        clip: &'a Clip,
        classes: &Classes,
    ) -> Result<Box<dyn Classifier + 'a>> {
        let text = self.text_features(clip, &ClassTokens::new(clip.text(), classes)?)?;
        let prompts = self.vision.constants()?;
        Ok(Box::new(PromptedClassifier::of_unit(clip, prompts, text)))
    }

    fn loss(&self, clip: &Clip, batch: &Batch<'_>, _: Step) -> Result<Loss> {
        let text = self.text_features(clip, batch.classes)?;
        let images = self.image_features(clip, batch.images.pixels_or_patches()?)?;
        Loss::cross_entropy(clip.unit_logits(&images, &text)?, batch.labels)
    }
}
