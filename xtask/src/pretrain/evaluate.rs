//! What a CLIP knows of the picture world: zero-shot, what its features hold, and what its patches know.

use anyhow::{Context, Result};
use candle_core::{Device, Tensor};
use cliptune_core::clip::Glimpses;
use cliptune_core::ops::{cross_entropy, unit_length};
use cliptune_core::optim::{Optimizer, OptimizerConfig};
use cliptune_core::preprocess::normalise;
use cliptune_core::prompt::{ClassTokens, Prompts};
use cliptune_core::{Classes, Clip, Gradients, Params};
use cliptune_data::Confusion;
use cliptune_scenes::{self as scenes, Picture, Shape, Task};
use rayon::prelude::*;

use super::batch::{GRID, cover};

/// Seeds of the pictures to learn from and to test on; training draws from others.
const POOL_SEED: u64 = 0x706f_6f6c;
const TEST_SEED: u64 = 0x7465_7374;

/// Pictures as the image tower reads them, `(n, 3, side, side)`.
fn pixels(clip: &Clip, pictures: &[Picture]) -> Result<Tensor> {
    let rows: Vec<Vec<f32>> = pictures
        .par_iter()
        .map(|p| normalise(&p.rgb, clip.preprocess()))
        .collect::<cliptune_core::Result<_>>()?;
    let side = scenes::SIDE;
    let shape = (pictures.len(), 3, side, side);
    Ok(Tensor::from_vec(rows.concat(), shape, &Device::Cpu)?)
}

/// Unit image features of `per_class` pictures of every class, class by class.
fn features(clip: &Clip, task: Task, seed: u64, per_class: usize, from: u64) -> Result<Labelled> {
    let n_cls = task.classes().len();
    let labels: Vec<u32> = (0..n_cls as u32)
        .flat_map(|class| std::iter::repeat_n(class, per_class))
        .collect();
    let pictures: Vec<Picture> = labels
        .par_iter()
        .enumerate()
        .map(|(i, &class)| task.picture(seed, class as usize, from + (i % per_class) as u64))
        .collect();
    let features = clip.image().encode(&pixels(clip, &pictures)?)?;
    Ok(Labelled {
        features: unit_length(&features, "an image feature")?,
        labels,
    })
}

struct Labelled {
    features: Tensor,
    labels: Vec<u32>,
}

/// Unit text features of class names in a template.
fn class_features(clip: &Clip, names: Vec<String>, template: &str) -> Result<Tensor> {
    let classes = ClassTokens::new(clip.text(), &Classes::new(names)?)?;
    let prompts = Prompts::of_tokens(classes.fill(template)?);
    Ok(unit_length(
        &clip.text().encode(&prompts)?,
        "a text feature",
    )?)
}

/// Percent of rows whose largest logit is their label's.
fn accuracy(logits: &Tensor, labels: &[u32]) -> Result<f64> {
    let mut confusion = Confusion::new(logits.dim(1)?);
    confusion.add(logits, labels)?;
    Ok(confusion.accuracy()?)
}

/// Zero-shot accuracy of a task in percent, on `per_class` pictures of each class.
pub(crate) fn zero_shot(clip: &Clip, task: Task, per_class: usize) -> Result<f64> {
    let test = features(clip, task, TEST_SEED, per_class, 0)?;
    let text = class_features(clip, task.classes(), task.template())?;
    accuracy(&test.features.matmul(&text.t()?)?, &test.labels)
}

/// What is known of a task.
#[derive(Clone, Debug)]
pub(crate) struct Known {
    pub(crate) classes: usize,
    pub(crate) zero_shot: f64,
    /// Logistic regression on the features of 16 pictures a class.
    pub(crate) logistic: f64,
}

pub(crate) fn known(clip: &Clip, task: Task) -> Result<Known> {
    let classes = task.classes().len();
    let per_class = (1_000 / classes).max(20);
    let test = features(clip, task, TEST_SEED, per_class, 0)?;
    let text = class_features(clip, task.classes(), task.template())?;
    let zero_shot = accuracy(&test.features.matmul(&text.t()?)?, &test.labels)?;
    let train = features(clip, task, POOL_SEED, 16, 0)?;
    let val = features(clip, task, POOL_SEED, 16, 16)?;
    let mut best: Option<(f64, Logistic)> = None;
    for penalty in [1e-4, 1e-3, 1e-2, 1e-1] {
        let fitted = Logistic::fit(&train, classes, penalty)?;
        let score = accuracy(&fitted.logits(&val.features)?, &val.labels)?;
        if best.as_ref().is_none_or(|(best, _)| score > *best) {
            best = Some((score, fitted));
        }
    }
    let (_, fitted) = best.context("no penalty was tried")?;
    Ok(Known {
        classes,
        zero_shot,
        logistic: accuracy(&fitted.logits(&test.features)?, &test.labels)?,
    })
}

/// Multinomial logistic regression on features that are centred first.
struct Logistic {
    mean: Tensor,
    params: Params,
}

impl Logistic {
    fn fit(data: &Labelled, n_cls: usize, penalty: f64) -> Result<Self> {
        let width = data.features.dim(1)?;
        let mut params = Params::new(0);
        let weight = params.normal("weight", (width, n_cls), 0.0)?;
        let bias = params.normal("bias", n_cls, 0.0)?;
        let fitted = Self {
            mean: data.features.mean_keepdim(0)?,
            params,
        };
        let adam = OptimizerConfig::Adam {
            betas: [0.9, 0.999],
            eps: 1e-8,
            weight_decay: 0.0,
            amsgrad: false,
        };
        let mut optimizer = Optimizer::new(adam, &fitted.params)?;
        let x = fitted.scaled(&data.features)?;
        const STEPS: usize = 300;
        for step in 0..STEPS {
            let logits = x.matmul(weight.tensor())?.broadcast_add(bias.tensor())?;
            let decay = (weight.tensor().sqr()?.sum_all()? * penalty)?;
            let loss = (cross_entropy(&logits, &data.labels)? + decay)?;
            let gradients = Gradients::of(&loss, &fitted.params)?;
            let lr = 0.1 * (1.0 - step as f64 / STEPS as f64);
            optimizer.step(&fitted.params, &gradients, |_| lr)?;
        }
        Ok(fitted)
    }

    fn scaled(&self, features: &Tensor) -> Result<Tensor> {
        let width = features.dim(1)? as f64;
        Ok((features.broadcast_sub(&self.mean)? * width.sqrt())?)
    }

    fn logits(&self, features: &Tensor) -> Result<Tensor> {
        let get = |name: &str| self.params.get(name).context("no such parameter");
        let logits = self.scaled(features)?.matmul(get("weight")?.tensor())?;
        Ok(logits.broadcast_add(get("bias")?.tensor())?)
    }
}

/// What local features know.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Local {
    /// Percent of the patches under an object that name its shape among all shapes.
    pub(crate) among_all: f64,
    /// The same among the shapes that are in the picture.
    pub(crate) among_present: f64,
    /// What guessing among those present gives.
    pub(crate) chance_present: f64,
    /// Mean average precision of naming the shapes of a picture by its global feature, percent.
    pub(crate) global_map: f64,
    /// The same with the best patch of each shape added.
    pub(crate) local_map: f64,
    /// Mean average precision of shuffled scores: the share of positives.
    pub(crate) chance_map: f64,
}

/// Judges value-path patches and multi-label naming on `n` pictures of several shapes.
pub(crate) fn local(clip: &Clip, n: usize) -> Result<Local> {
    let pictures: Vec<Picture> = (0..n as u64)
        .into_par_iter()
        .map(|i| scenes::multi_label(TEST_SEED, i))
        .collect();
    let words: Vec<String> = Shape::ALL.iter().map(|s| s.word().to_owned()).collect();
    let text = class_features(clip, words, "a photo of a {}.")?;
    let shapes = text.dim(0)?;
    let (mut all, mut present, mut chance, mut patches) = (0usize, 0usize, 0.0, 0usize);
    let (mut global, mut local) = (Vec::new(), Vec::new());
    for chunk in pictures.chunks(50) {
        let seen = Glimpses::everything(chunk.len(), GRID * GRID);
        let features = clip.image().encode_glimpses(&pixels(clip, chunk)?, &seen)?;
        let scores = unit_length(&features, "a feature")?.matmul(&text.t()?)?;
        let scores = scores.to_vec2::<f32>()?;
        let (whole, parts) = scores.split_at(chunk.len());
        for (i, picture) in chunk.iter().enumerate() {
            let here = present_shapes(picture);
            let parts = &parts[i * GRID * GRID..(i + 1) * GRID * GRID];
            for (scores, cover) in parts.iter().zip(cover(picture)) {
                let Some((object, share)) = cover else {
                    continue;
                };
                if share <= 0.5 {
                    continue;
                }
                let shape = picture.scene.objects[object].shape.index();
                patches += 1;
                all += usize::from(best(scores, 0..shapes) == Some(shape));
                present += usize::from(best(scores, here.iter().copied()) == Some(shape));
                chance += 1.0 / here.len() as f64;
            }
            global.push(whole[i].clone());
            let most = |s: usize| parts.iter().map(|p| p[s]).fold(f32::NEG_INFINITY, f32::max);
            local.push((0..shapes).map(|s| whole[i][s] + most(s)).collect());
        }
    }
    let truth: Vec<Vec<usize>> = pictures.iter().map(present_shapes).collect();
    let positives: usize = truth.iter().map(Vec::len).sum();
    let percent = |count: f64| 100.0 * count / patches as f64;
    Ok(Local {
        among_all: percent(all as f64),
        among_present: percent(present as f64),
        chance_present: percent(chance),
        global_map: mean_average_precision(&global, &truth, shapes),
        local_map: mean_average_precision(&local, &truth, shapes),
        chance_map: 100.0 * positives as f64 / (n * shapes) as f64,
    })
}

fn present_shapes(picture: &Picture) -> Vec<usize> {
    let mut shapes: Vec<usize> = picture
        .scene
        .objects
        .iter()
        .map(|o| o.shape.index())
        .collect();
    shapes.sort_unstable();
    shapes.dedup();
    shapes
}

fn best(scores: &[f32], among: impl Iterator<Item = usize>) -> Option<usize> {
    among.max_by(|a, b| scores[*a].total_cmp(&scores[*b]))
}

/// The mean over classes of the mean precision at each positive, percent.
fn mean_average_precision(scores: &[Vec<f32>], truth: &[Vec<usize>], classes: usize) -> f64 {
    let (mut sum, mut counted) = (0.0, 0);
    for class in 0..classes {
        let mut order: Vec<usize> = (0..scores.len()).collect();
        order.sort_by(|a, b| {
            scores[*b][class]
                .total_cmp(&scores[*a][class])
                .then(a.cmp(b))
        });
        let (mut hits, mut precision) = (0usize, 0.0);
        for (rank, i) in order.into_iter().enumerate() {
            if truth[i].contains(&class) {
                hits += 1;
                precision += hits as f64 / (rank + 1) as f64;
            }
        }
        if hits > 0 {
            sum += precision / hits as f64;
            counted += 1;
        }
    }
    100.0 * sum / f64::from(counted.max(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn average_precision_by_hand() {
        // Positives at ranks 1 and 3 of class 0: (1 + 2/3) / 2; class 1 has one, at rank 2.
        let scores = [vec![0.9, 0.1], vec![0.5, 0.8], vec![0.4, 0.2]];
        let truth = [vec![0], vec![], vec![0, 1]];
        let expected = 100.0 * ((1.0 + 2.0 / 3.0) / 2.0 + 0.5) / 2.0;
        assert!((mean_average_precision(&scores, &truth, 2) - expected).abs() < 1e-9);
    }
}
