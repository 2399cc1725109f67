//! The built-in tasks: pictures that are drawn when they are asked for.

use std::sync::Arc;

use candle_core::{Device, Tensor};
use cliptune::data::{FewShot, PythonRandom};
use cliptune::preprocess::{Mode, Pixels, fixed_view, random_view};
use cliptune::rng::Rng;
use cliptune::task::Split;
use cliptune::{Classes, Error, ImageSource, Labelled, Preprocess, View};
use cliptune_scenes as scenes;

use super::record::TaskNote;
use super::tasks::Task;

/// Raised when the same names come to mean other pictures or other measurements.
pub(crate) const VERSION: u32 = 1;
/// Pictures of each class from which training pictures are drawn.
pub(crate) const POOL: usize = 32;
/// Test pictures of a task, about.
const TEST: usize = 720;
/// Seeds of the pictures; training of the built-in CLIP uses others.
const POOL_SEED: u64 = 1_001;
const TEST_SEED: u64 = 2_002;

/// The task that the domain shift starts from; the styles' tasks are called after it.
pub(crate) const SHIFT_FROM: &str = "shape";
/// Tasks of the few-shot curves: those on which a few pictures teach more than the words know.
pub(crate) const FEW_SHOT: &[&str] = &["variety-rotated", "small", "texture", "mixed"];
/// The task that cross-dataset learns from, and those of other classes that it is measured on.
pub(crate) const CROSS_FROM: &str = "small";
pub(crate) const CROSS_TO: &[&str] = &[
    "variety-rotated",
    "color",
    "pattern",
    "count",
    "kind",
    "style",
];
/// Tasks that are learned together, and those that begin with what they taught.
pub(crate) const MULTI_TASK_FROM: &[&str] = &["color", "pattern", "count", "kind"];
pub(crate) const MULTI_TASK_TO: &[&str] = &["texture", "mixed"];
/// The task of which every training picture is shown.
pub(crate) const SUPERVISED: &[&str] = &["variety-rotated"];
/// Tasks of base-to-new.
pub(crate) const BASE_TO_NEW: &[&str] = &["variety-rotated", "shape-rotated", "shape"];

/// All tasks.
pub(crate) fn tasks() -> Vec<Task> {
    all().map(|task| described(&task)).collect()
}

fn all() -> impl Iterator<Item = scenes::Task> {
    scenes::Task::ALL.iter().copied()
}

fn described(task: &scenes::Task) -> Task {
    Task {
        slug: task.slug(),
        note: TaskNote {
            title: task.title().to_string(),
            about: task.about().to_string(),
            origin: format!(
                "drawn by a program, {side} × {side} pixels: coloured and patterned shapes on a ground. {POOL} pictures of each class to draw training pictures from, about {TEST} others of each task to test on",
                side = scenes::SIDE
            ),
        },
        template: task.template().to_string(),
        n_cls: task.classes().len(),
        most_shots: Some(POOL),
    }
}

/// The tasks that show `task` in other styles.
pub(crate) fn shifted(task: &str) -> Vec<String> {
    let prefix = format!("{task}-");
    all()
        .map(|task| task.slug())
        .filter(|slug| slug.starts_with(&prefix))
        .collect()
}

/// Changes when a picture of the benchmark changes: a hash over the first test picture of every class of every task.
pub(crate) fn fingerprint() -> String {
    let mut hasher = blake3::Hasher::new();
    for number in [VERSION as usize, POOL, TEST] {
        hasher.update(&(number as u64).to_le_bytes());
    }
    for task in all() {
        hasher.update(task.slug().as_bytes());
        for (class, name) in task.classes().iter().enumerate() {
            hasher.update(name.as_bytes());
            hasher.update(&task.picture(TEST_SEED, class, 0).rgb);
        }
    }
    hasher.finalize().to_hex().to_string()
}

/// The pictures of a task: those to draw from, class by class, then those to test on.
#[derive(Debug)]
pub(crate) struct Drawn {
    source: Arc<ScenePictures>,
    classes: Vec<String>,
}

impl Drawn {
    /// The task called `slug`; `pictures` is [`fingerprint`].
    pub(crate) fn new(slug: &str, pictures: &str) -> Option<Self> {
        let task = all().find(|task| task.slug() == slug)?;
        let classes: Vec<String> = task.classes().iter().map(ToString::to_string).collect();
        let source = ScenePictures {
            task,
            n_cls: classes.len(),
            tests: TEST.div_ceil(classes.len()),
            pictures: pictures.to_owned(),
        };
        Some(Self {
            source: Arc::new(source),
            classes,
        })
    }

    /// `shots` pictures of each class's pool, drawn as the papers' code draws them; at most [`POOL`].
    pub(crate) fn few_shot(&self, shots: usize, seed: u64) -> cliptune::Result<FewShot> {
        let pictures = &self.source;
        let mut random = PythonRandom::new(seed);
        let mut train = Vec::new();
        for class in 0..pictures.n_cls {
            let chosen = random.sample(POOL, shots);
            train.extend(chosen.into_iter().map(|i| (class * POOL + i, class as u32)));
        }
        let first = pictures.n_cls * POOL;
        let test = |i: usize| (first + i, (i / pictures.tests) as u32);
        let test = (0..pictures.n_cls * pictures.tests).map(test).collect();
        let source: Arc<dyn ImageSource> = pictures.clone();
        Ok(FewShot {
            labelled: Labelled {
                train: Split::new(source.clone(), train)?,
                val: None,
                classes: Classes::new(self.classes.clone())?,
            },
            test: Split::new(source, test)?,
            shortages: Vec::new(),
        })
    }
}

#[derive(Debug)]
struct ScenePictures {
    task: scenes::Task,
    n_cls: usize,
    /// Test pictures of a class.
    tests: usize,
    pictures: String,
}

/// What a picture is drawn from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Recipe {
    seed: u64,
    class: usize,
    index: u64,
}

impl ScenePictures {
    fn recipe(&self, item: usize) -> Result<Recipe, Error> {
        let (item, pool) = (item, self.n_cls * POOL);
        let (seed, item, each) = match item.checked_sub(pool) {
            None => (POOL_SEED, item, POOL),
            Some(test) => (TEST_SEED, test, self.tests),
        };
        let (class, index) = (item / each, (item % each) as u64);
        if class >= self.n_cls {
            return Err(Error::Data(format!(
                "there is no picture {item} of a class {class}"
            )));
        }
        Ok(Recipe { seed, class, index })
    }

    /// `(3, side, side)`.
    fn transformed(&self, item: usize, to: &Preprocess, view: View) -> Result<Vec<f32>, Error> {
        let Recipe { seed, class, index } = self.recipe(item)?;
        let rgb = self.task.picture(seed, class, index).rgb;
        let picture = Pixels::new(scenes::SIDE, scenes::SIDE, Mode::Rgb, rgb)?;
        match view {
            View::Fixed => fixed_view(&picture, to),
            View::Random { seed, draw } => {
                let mut rng = Rng::stream(seed, "view", &[draw as u64, item as u64]);
                random_view(&picture, to, &mut || rng.uniform())
            }
        }
    }
}

impl ImageSource for ScenePictures {
    fn len(&self) -> usize {
        self.n_cls * (POOL + self.tests)
    }

    fn name(&self, index: usize) -> String {
        match self.recipe(index) {
            Ok(Recipe { seed, class, index }) => {
                format!(
                    "{}, seed {seed}, class {class}, picture {index}",
                    self.task.slug()
                )
            }
            Err(_) => format!("picture {index}"),
        }
    }

    /// What the pictures are drawn from determines them, given the hash that stands for the drawing code.
    fn fingerprint(&self, indices: &[usize]) -> Result<String, Error> {
        let mut hasher = blake3::Hasher::new();
        hasher.update(self.pictures.as_bytes());
        hasher.update(self.task.slug().as_bytes());
        for &item in indices {
            let Recipe { seed, class, index } = self.recipe(item)?;
            for number in [seed, class as u64, index] {
                hasher.update(&number.to_le_bytes());
            }
        }
        Ok(hasher.finalize().to_hex().to_string())
    }

    fn pixels(&self, indices: &[usize], to: &Preprocess, view: View) -> Result<Tensor, Error> {
        use rayon::prelude::*;
        let pictures = indices
            .par_iter()
            .map(|&item| self.transformed(item, to, view));
        let pictures: Vec<Vec<f32>> = pictures.collect::<Result<_, _>>()?;
        let shape = (indices.len(), 3, to.resolution, to.resolution);
        Ok(Tensor::from_vec(pictures.concat(), shape, &Device::Cpu)?)
    }
}
