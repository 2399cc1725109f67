//! Zero-shot CLIP: hand-written sentences instead of learned ones (Radford et al., ICML 2021, arXiv 2103.00020).
//!
//! One template: `p(y|x) = softmax_y( scale · cos(f(x), g(template(name_y))) )`. Several: the class feature is the mean of
//! the unit text features over the templates, scaled to unit length again.

use candle_core::Tensor;
use cliptune_core::method::{
    self, Classifier, Entry, Method, Paper, Predictor, Settings, TextClassifier,
};
use cliptune_core::prompt::ClassTokens;
use cliptune_core::templates::{self, Ensemble, Sentences};
use cliptune_core::{Classes, Clip, Error, ImageNeeds, Labelled, Result, Run};
use serde::{Deserialize, Serialize};

/// The registry's entry.
pub const ENTRY: Entry = Entry {
    slug: "zeroshot",
    name: "Zero-shot CLIP",
    family: "text-pt",
    paper: Paper {
        title: "Learning Transferable Visual Models From Natural Language Supervision",
        authors: "Radford, Kim, Hallacy, Ramesh, Goh, Agarwal, Sastry, Askell, Mishkin, Clark, Krueger, Sutskever",
        venue: "ICML 2021",
        arxiv: "2103.00020",
        code: "KaiyangZhou/CoOp@ff61507 (trainers/zsclip.py)",
    },
    summary: "Compares an image with one sentence per class, or with the mean of several; nothing is learned.",
    learns: "nothing",
    cost: "text tower forward once per class and template",
    needs: ImageNeeds::GlobalFeatures,
    defaults: method::defaults_of::<ZeroShotConfig>,
    configure: method::configure::<ZeroShotConfig>,
    load: |file, _| {
        Ok(Box::new(ZeroShot::new(&ZeroShotConfig::read(
            &file.config,
        )?)?))
    },
    import: None,
};

/// Which sentences. At most one of the three is set; none means `a photo of a {}.`
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ZeroShotConfig {
    /// The sentences themselves, `{}` standing for the class name; several are averaged. A template that occurs twice counts
    /// twice.
    pub templates: Vec<String>,
    /// Takes the template that the CoOp authors use for this data set (`OxfordPets` or `oxford_pets`).
    pub dataset: Option<String>,
    /// A published list: `select7` (with `dataset` also that one's template, unless it is ImageNet) or `imagenet80`.
    pub ensemble: Option<Ensemble>,
}

impl ZeroShotConfig {
    /// One template.
    pub fn template(template: &str) -> Self {
        Self {
            templates: vec![template.to_owned()],
            ..Self::default()
        }
    }

    /// The sentences.
    ///
    /// # Errors
    /// [`Error::Config`] for an unknown data set, a template without `{}`, or templates beside a list.
    pub fn resolve(&self) -> Result<Vec<String>> {
        if !self.templates.is_empty() {
            if self.dataset.is_some() || self.ensemble.is_some() {
                let expected = "either templates of your own, or a data set's or a published list";
                return Err(Error::config(
                    "templates",
                    format!("{:?}", self.templates),
                    expected,
                ));
            }
            Sentences::new(self.templates.clone())?;
            return Ok(self.templates.clone());
        }
        let own = self
            .dataset
            .as_deref()
            .map(templates::for_dataset)
            .transpose()?;
        let mut list: Vec<String> = match self.ensemble {
            Some(ensemble) => ensemble
                .templates()
                .iter()
                .map(|t| (*t).to_owned())
                .collect(),
            None => vec![own.unwrap_or(templates::DEFAULT).to_owned()],
        };
        // The authors append the data set's own template to the selected seven unless the data set is ImageNet.
        if let (Some(Ensemble::Select7), Some(own), Some(dataset)) =
            (self.ensemble, own, &self.dataset)
            && !templates::is_imagenet(dataset)
        {
            list.push(own.to_owned());
        }
        Ok(list)
    }
}

impl Settings for ZeroShotConfig {
    const SLUG: &'static str = ENTRY.slug;

    fn check(&self) -> Result<()> {
        self.resolve().map(|_| ())
    }
}

impl Method for ZeroShotConfig {
    type Data = Labelled;
    type Fitted = ZeroShot;

    fn fit(&self, _: &Clip, _: &Labelled, _: &mut Run) -> Result<ZeroShot> {
        ZeroShot::new(self)
    }
}

/// Hand-written prompts.
#[derive(Clone, Debug)]
pub struct ZeroShot {
    sentences: Sentences,
}

impl ZeroShot {
    /// # Errors
    /// As [`ZeroShotConfig::resolve`].
    pub fn new(config: &ZeroShotConfig) -> Result<Self> {
        Ok(Self {
            sentences: Sentences::new(config.resolve()?)?,
        })
    }

    /// The sentences.
    pub fn templates(&self) -> &[String] {
        self.sentences.templates()
    }

    /// Class features of unit length, `(n_cls, embed_dim)`.
    ///
    /// # Errors
    /// [`Error::PromptTooLong`], [`Error::NotFinite`] for a zero feature.
    pub fn text_features(&self, clip: &Clip, classes: &ClassTokens) -> Result<Tensor> {
        self.sentences.mean(clip, classes)
    }
}

impl Predictor for ZeroShot {
    fn needs(&self) -> ImageNeeds {
        ImageNeeds::GlobalFeatures
    }

    fn classifier<'a>(
        &'a self,
        clip: &'a Clip,
        classes: &Classes,
    ) -> Result<Box<dyn Classifier + 'a>> {
        let features = self.text_features(clip, &ClassTokens::new(clip.text(), classes)?)?;
        Ok(Box::new(TextClassifier::new(clip, features)))
    }

    fn tensors(&self) -> Result<Vec<(String, Tensor)>> {
        Ok(Vec::new())
    }
}
