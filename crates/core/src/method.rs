//! What a method is: something that fits a predictor to data, and the entry under which it is found.

use candle_core::Tensor;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::checkpoint::TorchState;
use crate::prompt_file::PromptFile;
use crate::task::{ImageBatch, ImageNeeds, Labelled};
use crate::train::History;
use crate::{Classes, Clip, Error, Result, Run};

/// Settings of a method, the defaults being the paper's: what a user writes as TOML or JSON.
pub trait Settings: Default + Serialize + DeserializeOwned {
    /// The method's [`Entry::slug`], for messages.
    const SLUG: &'static str;

    /// Refuses settings that cannot be used or contradict each other.
    ///
    /// # Errors
    /// [`Error::Config`] naming the key.
    fn check(&self) -> Result<()>;

    /// Settings from a value whose missing keys take their defaults.
    ///
    /// # Errors
    /// [`Error::Config`] naming the key.
    fn read(settings: &Value) -> Result<Self> {
        let config: Self = read_config(Self::SLUG, settings)?;
        config.check()?;
        Ok(config)
    }
}

/// Refuses a setting that is not a finite number of at least 0: a weight of a loss.
///
/// # Errors
/// [`Error::Config`].
pub fn check_weight(key: &str, value: f64) -> Result<()> {
    match value.is_finite() && value >= 0.0 {
        true => Ok(()),
        false => Err(Error::config(key, value, "a finite number of at least 0")),
    }
}

/// Refuses a setting that is not a finite number above 0: a rate, a temperature.
///
/// # Errors
/// [`Error::Config`].
pub fn check_positive(key: &str, value: f64) -> Result<()> {
    match value.is_finite() && value > 0.0 {
        true => Ok(()),
        false => Err(Error::config(key, value, "a finite number above 0")),
    }
}

/// A transfer method: its settings, the defaults being the paper's.
pub trait Method {
    /// What it learns from: [`Labelled`], later others.
    type Data: ?Sized;
    /// What it leaves behind.
    type Fitted: Predictor;

    /// Learns from `data`. Training-free methods compute here what they need; test-time methods do nothing.
    ///
    /// # Errors
    /// Bad settings and bad data are found before any work.
    fn fit(&self, clip: &Clip, data: &Self::Data, run: &mut Run) -> Result<Self::Fitted>;
}

/// What a fit leaves behind: a few learned tensors and the rule for using them.
pub trait Predictor: std::fmt::Debug {
    /// What it reads of an image.
    fn needs(&self) -> ImageNeeds;

    /// Does all work that depends on the classes but not on the images, once.
    ///
    /// # Errors
    /// [`Error::Prompt`] if the predictor cannot serve these classes, [`Error::PromptTooLong`].
    fn classifier<'a>(
        &'a self,
        clip: &'a Clip,
        classes: &Classes,
    ) -> Result<Box<dyn Classifier + 'a>>;

    /// The learned tensors under the authors' keys, and what belongs to them.
    ///
    /// # Errors
    /// Whatever the tensor library refuses.
    fn tensors(&self) -> Result<Vec<(String, Tensor)>>;

    /// How many numbers were learned.
    ///
    /// # Errors
    /// As [`Predictor::tensors`].
    fn learned_numbers(&self) -> Result<usize> {
        let tensors = self.tensors()?;
        Ok(tensors.iter().map(|(_, tensor)| tensor.elem_count()).sum())
    }

    /// How the training went, if there was one since the predictor was made.
    fn training(&self) -> Option<&History> {
        None
    }
}

/// A predictor made ready for a list of classes.
pub trait Classifier {
    /// `(batch, n_cls)`.
    ///
    /// # Errors
    /// If the images are not in the form that [`Predictor::needs`] asks for.
    fn logits(&self, images: &ImageBatch) -> Result<Tensor>;

    /// Where the class token of the prompted image tower looks, `(batch, grid, grid)`, as
    /// [`crate::clip::ImageTower::class_attention`]; none where the image tower is as it was.
    ///
    /// # Errors
    /// As [`Classifier::logits`].
    fn class_attention(&self, _: &ImageBatch) -> Result<Option<Tensor>> {
        Ok(None)
    }

    /// What is added to the normalised pixels of an image, `(1, 3, side, side)`, where something is.
    ///
    /// # Errors
    /// Whatever the tensor library refuses.
    fn added_pixels(&self) -> Result<Option<Tensor>> {
        Ok(None)
    }
}

/// A classifier that compares image features with one fixed feature per class.
#[derive(Debug)]
pub struct TextClassifier<'a> {
    clip: &'a Clip,
    text_features: Tensor,
}

impl<'a> TextClassifier<'a> {
    /// `text_features` `(n_cls, embed_dim)`, of unit length.
    pub fn new(clip: &'a Clip, text_features: Tensor) -> Self {
        Self {
            clip,
            text_features,
        }
    }
}

impl Classifier for TextClassifier<'_> {
    fn logits(&self, images: &ImageBatch) -> Result<Tensor> {
        self.clip
            .unit_logits(images.features()?, &self.text_features)
    }
}

/// The data of a fit, for callers that know the method only by name.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub enum Task<'a> {
    /// Labelled images, few or many.
    Labelled(&'a Labelled),
}

/// Data types that a [`Task`] may hold.
pub trait FromTask {
    /// # Errors
    /// [`Error::Data`] if the task is of another kind.
    fn from_task<'a>(task: Task<'a>) -> Result<&'a Self>;
}

impl FromTask for Labelled {
    fn from_task<'a>(task: Task<'a>) -> Result<&'a Self> {
        match task {
            Task::Labelled(data) => Ok(data),
        }
    }
}

/// A configured method whose types are hidden.
pub trait AnyMethod {
    /// All settings, defaults included.
    fn config(&self) -> Value;

    /// As [`Method::fit`].
    ///
    /// # Errors
    /// As [`Method::fit`].
    fn fit(&self, clip: &Clip, data: Task<'_>, run: &mut Run) -> Result<Box<dyn Predictor>>;
}

impl<M> AnyMethod for M
where
    M: Method + Serialize,
    M::Data: FromTask,
    M::Fitted: 'static,
{
    fn config(&self) -> Value {
        value_of(self)
    }

    fn fit(&self, clip: &Clip, data: Task<'_>, run: &mut Run) -> Result<Box<dyn Predictor>> {
        Ok(Box::new(Method::fit(
            self,
            clip,
            M::Data::from_task(data)?,
            run,
        )?))
    }
}

/// Where a method was published.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Paper {
    /// Title.
    pub title: &'static str,
    /// Authors.
    pub authors: &'static str,
    /// Venue and year.
    pub venue: &'static str,
    /// arXiv number.
    pub arxiv: &'static str,
    /// The authors' repository and the commit that was read.
    pub code: &'static str,
}

/// A method's entry in the registry: all that the command line and the tools know of it.
#[derive(Clone, Copy)]
pub struct Entry {
    /// Its name on the command line and in files.
    pub slug: &'static str,
    /// Its name in the literature.
    pub name: &'static str,
    /// The family's crate, without the prefix.
    pub family: &'static str,
    /// Where it was published.
    pub paper: Paper,
    /// What it does, in a sentence or two.
    pub summary: &'static str,
    /// What is learned.
    pub learns: &'static str,
    /// What a step costs.
    pub cost: &'static str,
    /// What it reads of an image.
    pub needs: ImageNeeds,
    /// The settings' defaults.
    pub defaults: fn() -> Value,
    /// A method from settings; missing keys take their defaults, unknown ones are errors.
    pub configure: fn(&Value) -> Result<Box<dyn AnyMethod>>,
    /// A predictor from a prompt file.
    pub load: fn(&PromptFile, &Clip) -> Result<Box<dyn Predictor>>,
    /// A prompt file's content from a checkpoint of the authors' code, where that is possible.
    pub import: Option<Import>,
}

/// Reads a checkpoint of the authors' code by settings that say what it does not.
pub type Import = fn(&TorchState, &Value, &Clip, &Classes) -> Result<Imported>;

/// A predictor from a checkpoint of the authors' code.
#[derive(Debug)]
pub struct Imported {
    /// All settings, those included that the checkpoint's shapes decide.
    pub config: Value,
    /// The predictor.
    pub predictor: Box<dyn Predictor>,
}

impl std::fmt::Debug for Entry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Entry")
            .field("slug", &self.slug)
            .finish_non_exhaustive()
    }
}

/// Reads a method's settings over its defaults, which hold for nested settings too, naming what does not fit.
///
/// # Errors
/// [`Error::Config`] with the key and what was expected.
pub fn read_config<C>(slug: &str, settings: &Value) -> Result<C>
where
    C: Default + Serialize + DeserializeOwned,
{
    let mut config = defaults_of::<C>();
    lay_over(&mut config, settings);
    C::deserialize(config)
        .map_err(|e| Error::config("settings", format_args!("of {slug}"), e.to_string()))
}

/// Lays `over` on `base`. A table of another `kind` replaces the one below it: the settings of SGD mean nothing to Adam.
pub fn lay_over(base: &mut Value, over: &Value) {
    let (Value::Object(base), Value::Object(over)) = (&mut *base, over) else {
        *base = over.clone();
        return;
    };
    if over
        .get("kind")
        .is_some_and(|kind| base.get("kind") != Some(kind))
    {
        base.clear();
    }
    for (key, value) in over {
        lay_over(base.entry(key.clone()).or_insert(Value::Null), value);
    }
}

/// Settings as a value.
pub fn value_of<C: Serialize>(config: &C) -> Value {
    serde_json::to_value(config).unwrap_or(Value::Null)
}

/// Default settings as a value: [`Entry::defaults`].
pub fn defaults_of<C: Default + Serialize>() -> Value {
    value_of(&C::default())
}

/// Settings that are read and checked, as a method: [`Entry::configure`].
///
/// # Errors
/// As [`Settings::read`].
pub fn configure<C: Settings + AnyMethod + 'static>(
    settings: &Value,
) -> Result<Box<dyn AnyMethod>> {
    Ok(Box::new(C::read(settings)?))
}

/// What is known of the weights a prompt was trained on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClipId {
    /// Published name, or a description.
    pub name: String,
    /// [`Clip::weights_hash`].
    pub weights_hash: String,
    /// Width of the text tower.
    pub text_width: usize,
    /// Width of the joint feature space.
    pub embed_dim: usize,
}

impl ClipId {
    /// The identity of `clip`.
    pub fn of(clip: &Clip) -> Self {
        let arch = clip.arch();
        Self {
            name: arch.name(),
            weights_hash: clip.weights_hash().to_owned(),
            text_width: arch.text_width,
            embed_dim: arch.embed_dim,
        }
    }
}
