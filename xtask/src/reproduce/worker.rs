//! One run, in a process of its own, so that its memory is its own and its death nobody else's.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use candle_core::Tensor;
use cliptune::data::{CachedFeatures, ClassSubset, Confusion, FewShot, metrics};
use cliptune::method::{ClipId, Predictor, Task as MethodData};
use cliptune::task::{ImageBatch, Test};
use cliptune::train::{self, EVALUATION_BATCH, Recipe};
use cliptune::visual_prompt::VisualPrompts;
use cliptune::{
    Classes, Clip, ImageNeeds, ImageSource, Labelled, Run, Split, View, ops, registry, tasks,
};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::added;
use super::folder::{FEATURES, PICTURES};
use super::plan::Before;
use super::record::{
    Attention, DataNote, FORMAT, Machine, Measured, Protocol, Record, Revision, RunKey, Sample,
    Seconds, TaskNote,
};
use super::tasks::Source;

/// Test pictures of each set that a result tells the prediction of.
pub(crate) const SAMPLES: usize = 12;

/// All that a run needs to know; read from standard input.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Job {
    pub(crate) out: PathBuf,
    pub(crate) clip: PathBuf,
    pub(crate) weights_hash: String,
    pub(crate) source: Source,
    pub(crate) key: RunKey,
    pub(crate) task: TaskNote,
    pub(crate) label: String,
    pub(crate) method: String,
    pub(crate) config: Value,
    /// Slug and title of further tasks that are measured on.
    pub(crate) also_on: Vec<(String, String)>,
    /// What is learned before, if anything is.
    pub(crate) before: Option<Before>,
    pub(crate) revision: Option<Revision>,
}

/// Makes the run that standard input describes and writes its result.
pub(crate) fn main() -> Result<ExitCode> {
    let mut input = BufReader::new(std::io::stdin());
    let mut line = String::new();
    input.read_line(&mut line).context("standard input")?;
    let job: Job = serde_json::from_str(&line).context("standard input holds no run")?;
    // The input stays open as long as the caller lives; nobody waits for the result of an orphan.
    std::thread::spawn(move || {
        let mut rest = String::new();
        let _ = input.read_line(&mut rest);
        std::process::exit(1);
    });
    job.run()?.write(&job.out)?;
    Ok(ExitCode::SUCCESS)
}

impl Job {
    /// Makes the run.
    ///
    /// # Errors
    /// Whatever data, weights or method refuse.
    pub(crate) fn run(&self) -> Result<Record> {
        let started = Instant::now();
        let clip = Clip::load(&self.clip).context("the CLIP weights cannot be used")?;
        if clip.weights_hash() != self.weights_hash {
            bail!(
                "{}: the weights have changed since the call began",
                self.clip.display()
            );
        }
        let load = started.elapsed().as_secs_f64();

        let method = (registry::find(&self.method)?.configure)(&self.config)?;
        let needs = registry::find(&self.method)?.needs;
        let started = Instant::now();
        let (learned_from, mut tests) = self.data()?;
        let labelled = self.encode(&clip, needs, &learned_from, &mut tests)?;
        let encode = started.elapsed().as_secs_f64();

        let started = Instant::now();
        let mut run = Run::quiet(self.key.seed);
        if let Some(before) = &self.before {
            run.start = Some(self.learned_before(&clip, before)?);
        }
        let predictor = method.fit(&clip, MethodData::Labelled(&labelled), &mut run)?;
        let fit = started.elapsed().as_secs_f64();

        let folder = self.out.join(self.key.folder());
        let started = Instant::now();
        let tests: Vec<Measured> = tests
            .iter()
            .map(|test| test.measure(&clip, predictor.as_ref(), &folder))
            .collect::<Result<_>>()?;
        let evaluate = started.elapsed().as_secs_f64();

        let train = &labelled.train;
        Ok(Record {
            format: FORMAT.to_owned(),
            run: self.key.clone(),
            task: self.task.clone(),
            label: self.label.clone(),
            method: self.method.clone(),
            config: self.config.clone(),
            clip: ClipId::of(&clip),
            logit_scale: clip.scale(),
            data: DataNote {
                train_images: train.len(),
                train: (!train.is_empty())
                    .then(|| train.fingerprint())
                    .transpose()?,
            },
            machine: Machine {
                device: "cpu".to_owned(),
                dtype: "f32".to_owned(),
                threads: rayon::current_num_threads(),
                system: format!("{} {}", std::env::consts::OS, std::env::consts::ARCH),
            },
            version: env!("CARGO_PKG_VERSION").to_owned(),
            revision: self.revision.clone(),
            seconds: Seconds {
                load,
                encode,
                fit,
                evaluate,
            },
            peak_memory_bytes: peak_memory(),
            learned: predictor.learned_numbers()?,
            training: predictor.training().cloned(),
            tests,
        })
    }

    /// What is learned from, and what is measured on.
    pub(super) fn data(&self) -> Result<(Labelled, Vec<TestSet>)> {
        let task = &self.key.task;
        let drawn = self
            .source
            .open(task)?
            .few_shot(self.key.shots, self.key.seed)?;
        let test = |name: &str, title: &str, task: &str, drawn: &FewShot| TestSet {
            name: name.to_owned(),
            title: title.to_owned(),
            task: task.to_owned(),
            split: drawn.test.clone(),
            classes: drawn.labelled.classes.clone(),
        };
        Ok(match self.key.protocol {
            Protocol::FewShot | Protocol::MultiTask | Protocol::Supervised => {
                let tests = vec![test("test", &self.task.title, task, &drawn)];
                (drawn.labelled, tests)
            }
            Protocol::BaseToNew => {
                let base = drawn.subset(ClassSubset::Base)?;
                let new = drawn.subset(ClassSubset::New)?;
                let tests = vec![
                    test("base", "classes trained on", task, &base),
                    test("new", "classes never trained on", task, &new),
                ];
                (base.labelled, tests)
            }
            Protocol::CrossDataset | Protocol::DomainShift => {
                let mut tests = vec![test(task, &self.task.title, task, &drawn)];
                for (slug, title) in &self.also_on {
                    let other = self.source.open(slug)?.few_shot(0, self.key.seed)?;
                    tests.push(test(slug, title, slug, &other));
                }
                (drawn.labelled, tests)
            }
        })
    }

    /// What the method learns of other tasks together, as many pictures of each class as of the run's own.
    fn learned_before(&self, clip: &Clip, before: &Before) -> Result<BTreeMap<String, Tensor>> {
        let RunKey { shots, seed, .. } = self.key;
        let drawn = |slug: &String| self.source.open(slug)?.few_shot(shots, seed);
        let drawn: Vec<FewShot> = before.tasks.iter().map(drawn).collect::<Result<_>>()?;
        let named = before.tasks.iter().map(String::as_str);
        let parts: Vec<_> = named
            .zip(drawn.iter().map(|drawn| &drawn.labelled))
            .collect();
        let (labelled, tasks) = tasks::union(&parts)?;
        let mut config = before.config.clone();
        if let Some(config) = config.as_object_mut() {
            config.insert("tasks".into(), serde_json::to_value(&tasks)?);
        }
        let method = (registry::find(&self.method)?.configure)(&config)?;
        let mut run = Run::quiet(seed);
        let predictor = method.fit(clip, MethodData::Labelled(&labelled), &mut run)?;
        Ok(predictor.tensors()?.into_iter().collect())
    }

    /// The same data from the feature cache, where the method reads features.
    fn encode(
        &self,
        clip: &Clip,
        needs: ImageNeeds,
        labelled: &Labelled,
        tests: &mut [TestSet],
    ) -> Result<Labelled> {
        let recipe = self
            .config
            .get("train")
            .cloned()
            .map(serde_json::from_value::<Recipe>);
        let views = match recipe.transpose()? {
            Some(recipe) => train::views_to_prepare(&recipe, needs, self.key.seed),
            None => None,
        };
        let views = views.unwrap_or_else(|| vec![View::Fixed]);
        let source = cached(
            &self.out,
            &self.key.task,
            labelled.train.source().clone(),
            clip,
        );
        let mut items: Vec<usize> = labelled.train.items().iter().map(|item| item.0).collect();
        for view in views {
            source.prepare(clip, &items, needs, view, &mut |_| {})?;
        }
        if let Some(val) = &labelled.val {
            items = val.items().iter().map(|item| item.0).collect();
            source.prepare(clip, &items, needs, View::Fixed, &mut |_| {})?;
        }
        let source: Arc<dyn ImageSource> = Arc::new(source);
        for test in tests {
            let source = cached(&self.out, &test.task, test.split.source().clone(), clip);
            let items: Vec<usize> = test.split.items().iter().map(|item| item.0).collect();
            source.prepare(clip, &items, needs, View::Fixed, &mut |_| {})?;
            test.split = test.split.with_source(Arc::new(source));
        }
        Ok(Labelled {
            train: labelled.train.with_source(source.clone()),
            val: labelled.val.as_ref().map(|val| val.with_source(source)),
            classes: labelled.classes.clone(),
        })
    }
}

/// The feature cache of a task's pictures.
pub(crate) fn cached(
    out: &Path,
    task: &str,
    source: Arc<dyn ImageSource>,
    clip: &Clip,
) -> CachedFeatures {
    CachedFeatures::new(source, clip, Some(out.join(FEATURES).join(task)))
}

/// The picture file of a test picture, below the output folder.
pub(crate) fn picture_file(task: &str, item: usize) -> String {
    format!("{PICTURES}/{task}/{item}.png")
}

/// The positions of the test pictures that are shown: evenly over the split, so from many classes.
pub(crate) fn sample_positions(len: usize) -> impl Iterator<Item = usize> {
    let count = SAMPLES.min(len);
    (0..count).map(move |i| i * len / count)
}

/// Pictures that something is measured on.
pub(super) struct TestSet {
    name: String,
    title: String,
    /// The task that the pictures are of.
    pub(super) task: String,
    pub(super) split: Split<Test>,
    classes: Classes,
}

impl TestSet {
    /// Figures; what the classifier adds to a picture goes into `folder`.
    fn measure(&self, clip: &Clip, predictor: &dyn Predictor, folder: &Path) -> Result<Measured> {
        let classifier = predictor.classifier(clip, &self.classes)?;
        let labels: Vec<u32> = self.split.labels().collect();
        let positions: Vec<usize> = (0..labels.len()).collect();
        let images = |positions: &[usize]| -> Result<ImageBatch> {
            Ok(self
                .split
                .images(clip, positions, predictor.needs(), View::Fixed)?)
        };
        let of = |positions: &[usize]| -> Vec<u32> {
            positions
                .iter()
                .filter_map(|&p| labels.get(p).copied())
                .collect()
        };
        let mut confusion = Confusion::new(self.classes.len());
        for batch in positions.chunks(EVALUATION_BATCH) {
            confusion.add(&classifier.logits(&images(batch)?)?, &of(batch))?;
        }
        let shown: Vec<usize> = sample_positions(labels.len()).collect();
        let pictures = images(&shown)?;
        let logits = classifier.logits(&pictures)?;
        if let Some(added) = classifier.added_pixels()? {
            let first = pictures.pixels()?.narrow(0, 0, 1)?;
            added::write(folder, clip.preprocess(), &added, &first)?;
        }
        let maps = match classifier.class_attention(&pictures)? {
            None => Vec::new(),
            Some(after) => {
                let plain = VisualPrompts::new();
                let before = clip.image().class_attention(pictures.pixels()?, &plain)?;
                maps(&before, &after)?
            }
        };
        Ok(Measured {
            name: self.name.clone(),
            title: self.title.clone(),
            classes: self.classes.names().to_vec(),
            images: confusion.total(),
            data: self.split.fingerprint()?,
            accuracy: confusion.accuracy()?,
            per_class: confusion.per_class_accuracy(),
            confusion: confusion.matrix(),
            samples: self.samples(&shown, &of(&shown), &ops::softmax(&logits)?, maps)?,
        })
    }

    fn samples(
        &self,
        shown: &[usize],
        labels: &[u32],
        probabilities: &Tensor,
        maps: Vec<Attention>,
    ) -> Result<Vec<Sample>> {
        let best = metrics::top_k(probabilities, 1)?;
        let mut maps = maps.into_iter();
        let each = |((position, label), best): ((&usize, &u32), Vec<(u32, f32)>)| {
            let attention = maps.next();
            let (item, _) = self.split.items().get(*position)?;
            let (predicted, probability) = best.first().copied()?;
            Some(Sample {
                picture: picture_file(&self.task, *item),
                label: *label,
                predicted,
                probability: f64::from(probability),
                attention,
            })
        };
        Ok(shown
            .iter()
            .zip(labels)
            .zip(best)
            .filter_map(each)
            .collect())
    }
}

/// Each picture's part of two maps `(pictures, grid, grid)`.
fn maps(before: &Tensor, after: &Tensor) -> Result<Vec<Attention>> {
    let (before, after) = (before.flatten_from(1)?, after.flatten_from(1)?);
    let pairs = before.to_vec2()?.into_iter().zip(after.to_vec2()?);
    Ok(pairs
        .map(|(before, after)| Attention { before, after })
        .collect())
}

/// The largest resident memory of this process so far, bytes.
fn peak_memory() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}
