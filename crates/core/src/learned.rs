//! What a method that learns by gradient leaves behind: itself, its parameters, how the training went. Files, checkpoints of
//! the authors' code and the fit are the same for all of them and stand here.

use std::collections::BTreeMap;
use std::ops::{Deref, DerefMut};

use candle_core::Tensor;
use serde_json::Value;

use crate::checkpoint::TorchState;
use crate::method::{Classifier, Imported, Predictor, Settings, read_config, value_of};
use crate::prompt_file::PromptFile;
use crate::train::{History, Objective, Recipe, train};
use crate::{Classes, Clip, ImageNeeds, Labelled, Params, Result, Run};

/// How a method that learns by gradient comes from its settings. What it computes is its [`Objective`].
pub trait Learner: Objective + Sized + 'static {
    /// Its settings.
    type Config: Settings;

    /// The method at its start, before `classes`. What is learned is made in `params`, under the authors' state-dict keys;
    /// what is frozen is an argument of everything that is called later.
    ///
    /// # Errors
    /// [`crate::Error::Config`] for contradicting settings, [`crate::Error::PromptTooLong`] if a class name leaves no room.
    fn start(
        config: &Self::Config,
        clip: &Clip,
        classes: &Classes,
        params: &mut Params,
    ) -> Result<Self>;

    /// Sets in `config` what the tensors of a checkpoint of the authors' code decide, their number of contexts and vectors
    /// above all. `given` are the settings that the caller named.
    ///
    /// # Errors
    /// [`crate::Error::Prompt`] if a tensor is missing or another method's, [`crate::Error::Shape`].
    fn complete(
        config: &mut Self::Config,
        given: &Value,
        state: &TorchState,
        clip: &Clip,
    ) -> Result<()>;
}

/// A method that learns by gradient, with all that it learned. What the method itself can tell is reached through it.
#[derive(Debug)]
pub struct Learned<O> {
    objective: O,
    params: Params,
    pub(crate) history: History,
}

impl<O> Learned<O> {
    /// A method whose learned tensors are `params`.
    pub fn of(objective: O, params: Params) -> Self {
        Self {
            objective,
            params,
            history: History::default(),
        }
    }

    /// Everything that is learned.
    pub fn params(&self) -> &Params {
        &self.params
    }

    /// How the training went; empty if there was none.
    pub fn history(&self) -> &History {
        &self.history
    }

    /// The method to change, beside its parameters.
    pub(crate) fn parts(&mut self) -> (&mut O, &Params) {
        (&mut self.objective, &self.params)
    }
}

impl<O> Deref for Learned<O> {
    type Target = O;

    fn deref(&self) -> &O {
        &self.objective
    }
}

impl<O> DerefMut for Learned<O> {
    fn deref_mut(&mut self) -> &mut O {
        &mut self.objective
    }
}

impl<L: Learner> Learned<L> {
    /// A method at its start; what is drawn depends on `seed`.
    ///
    /// # Errors
    /// As [`Learner::start`].
    pub fn new(config: &L::Config, clip: &Clip, classes: &Classes, seed: u64) -> Result<Self> {
        config.check()?;
        let mut params = Params::new(seed);
        let objective = L::start(config, clip, classes, &mut params)?;
        Ok(Self::of(objective, params))
    }

    /// A method with given values, by the authors' keys, instead of its start. Tensors that it does not learn, such as the
    /// `token_prefix` of a checkpoint, are read over: they are rebuilt from `classes`.
    ///
    /// # Errors
    /// As [`Learned::new`], [`Params::load`] and [`Objective::load_buffers`].
    pub fn with_tensors(
        config: &L::Config,
        clip: &Clip,
        classes: &Classes,
        seed: u64,
        tensors: &BTreeMap<String, Tensor>,
    ) -> Result<Self> {
        let mut learned = Self::new(config, clip, classes, seed)?;
        learned.params.load(tensors)?;
        learned.objective.load_buffers(tensors)?;
        Ok(learned)
    }

    /// From a prompt file of this method.
    ///
    /// # Errors
    /// [`crate::Error::Prompt`], [`crate::Error::Shape`] or [`crate::Error::Config`] if the file does not fit itself or the
    /// weights.
    pub fn load(file: &PromptFile, clip: &Clip) -> Result<Self> {
        let config = L::Config::read(&file.config)?;
        Self::with_tensors(&config, clip, &file.classes, file.seed, &file.tensors)
    }

    /// From a checkpoint of the authors' code (`prompt_learner/model.pth.tar-*`), with the settings that are behind it.
    /// `settings` say what no tensor shows, such as where the class name stood, and may leave out the rest.
    ///
    /// # Errors
    /// [`crate::Error::Prompt`] if a learned tensor is missing, [`crate::Error::Shape`] if one does not fit the weights or
    /// the classes, [`crate::Error::Config`].
    pub fn import(
        state: &TorchState,
        settings: &Value,
        clip: &Clip,
        classes: &Classes,
    ) -> Result<(L::Config, Self)> {
        let mut config: L::Config = read_config(L::Config::SLUG, settings)?;
        L::complete(&mut config, settings, state, clip)?;
        let learned = Self::with_tensors(&config, clip, classes, 0, &state.tensors)?;
        Ok((config, learned))
    }

    /// Starts and trains by `recipe`.
    ///
    /// # Errors
    /// As [`Learned::new`] and [`train`]; bad settings and bad data are found before any work.
    pub fn fit(
        config: &L::Config,
        recipe: &Recipe,
        clip: &Clip,
        data: &Labelled,
        run: &mut Run,
    ) -> Result<Self> {
        data.check()?;
        let mut learned = Self::new(config, clip, &data.classes, run.seed)?;
        train(&mut learned, clip, data, recipe, &value_of(config), run)?;
        Ok(learned)
    }
}

/// As [`Learned::load`], as a registry wants it: [`crate::method::Entry::load`].
///
/// # Errors
/// As [`Learned::load`].
pub fn load<L: Learner>(file: &PromptFile, clip: &Clip) -> Result<Box<dyn Predictor>> {
    Ok(Box::new(Learned::<L>::load(file, clip)?))
}

/// As [`Learned::import`], as a registry wants it: [`crate::method::Entry::import`].
///
/// # Errors
/// As [`Learned::import`].
pub fn import<L: Learner>(
    state: &TorchState,
    settings: &Value,
    clip: &Clip,
    classes: &Classes,
) -> Result<Imported> {
    let (config, learned) = Learned::<L>::import(state, settings, clip, classes)?;
    Ok(Imported {
        config: value_of(&config),
        predictor: Box::new(learned),
    })
}

impl<O: Objective> Predictor for Learned<O> {
    fn needs(&self) -> ImageNeeds {
        self.objective.needs()
    }

    fn classifier<'a>(
        &'a self,
        clip: &'a Clip,
        classes: &Classes,
    ) -> Result<Box<dyn Classifier + 'a>> {
        self.objective.classifier(clip, classes)
    }

    fn tensors(&self) -> Result<Vec<(String, Tensor)>> {
        let mut tensors = self.params.tensors()?;
        tensors.extend(self.objective.buffers()?);
        Ok(tensors)
    }

    /// Without what only belongs to them.
    fn learned_numbers(&self) -> Result<usize> {
        Ok(self.params.count())
    }

    fn training(&self) -> Option<&History> {
        Some(&self.history).filter(|history| history.kept > 0)
    }
}
