//! One step of training: the losses and the gradient of every weight.

use std::collections::HashMap;
use std::ops::Range;

use anyhow::{Context, Result};
use candle_core::{Device, Tensor};
use cliptune_core::Gradients;
use cliptune_core::clip::Glimpses;
use cliptune_core::ops::{cross_entropy, log_softmax, unit_length};
use cliptune_core::prompt::Prompts;
use rayon::prelude::*;

use super::batch::Batch;
use super::learner::{HEAD, Learner};

/// Pictures and captions of one task: small enough for the caches, and a fixed number whatever the threads.
const PICTURES_TOGETHER: usize = 16;
const CAPTIONS_TOGETHER: usize = 32;

/// What the losses weigh at a moment of training.
#[derive(Clone, Debug)]
pub(crate) struct Weighting {
    /// Of each head by name; what is missing is not used.
    pub(crate) heads: Vec<(&'static str, f64)>,
    /// Of naming the shapes above patches.
    pub(crate) named: f64,
    /// Share of the contrastive targets that goes to all pictures of the same shape.
    pub(crate) softness: f64,
}

/// The losses of a step.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Losses {
    pub(crate) total: f64,
    pub(crate) contrastive: f64,
    pub(crate) named: f64,
}

impl Losses {
    /// An exponential mean: these, moved by `share` towards `new`.
    pub(crate) fn towards(self, new: Self, share: f64) -> Self {
        let mix = |a: f64, b: f64| a + share * (b - a);
        Self {
            total: mix(self.total, new.total),
            contrastive: mix(self.contrastive, new.contrastive),
            named: mix(self.named, new.named),
        }
    }
}

/// A part of the batch that runs through a tower by itself.
enum Part {
    Pictures(Range<usize>, Glimpses),
    Captions(Vec<usize>),
    Words(Range<usize>),
}

/// Losses and gradients of `batch`; `words` are prompts that name every shape.
///
/// The towers run part by part, side by side. Their features become leaves of the small graph of the losses; its gradients
/// then go back through each part.
pub(crate) fn step(
    learner: &Learner,
    batch: &Batch,
    words: &[Vec<u32>],
    weighting: &Weighting,
) -> Result<(Losses, Gradients)> {
    let parts = parts(batch, words.len());
    let outputs: Vec<Tensor> = parts
        .par_iter()
        .map(|part| forward(learner, batch, words, part))
        .collect::<Result<_>>()?;
    let joined = Joined::of(&parts, &outputs)?;
    let (losses, leaves, gradients) = compare(learner, batch, &joined, weighting)?;
    let mut all = vec![gradients.group(&learner.params)];
    let towers: Vec<Gradients> = parts
        .par_iter()
        .zip(&outputs)
        .map(|(part, output)| {
            let wanted = leaves.of(part)?;
            let surrogate = (output * wanted)?.sum_all()?;
            Ok(Gradients::of(&surrogate, &learner.params)?)
        })
        .collect::<Result<_>>()?;
    all.extend(towers);
    Ok((losses, Gradients::sum(all)?))
}

fn parts(batch: &Batch, words: usize) -> Vec<Part> {
    let n = batch.captions.len();
    let mut parts: Vec<Part> = (0..n)
        .step_by(PICTURES_TOGETHER)
        .map(|start| {
            let range = start..(start + PICTURES_TOGETHER).min(n);
            Part::Pictures(range.clone(), batch.glimpses(range))
        })
        .collect();
    // Captions of similar length together: shorter ones are padded.
    let mut order: Vec<usize> = (0..n).collect();
    order.sort_by_key(|&i| (batch.captions[i].len(), i));
    parts.extend(
        order
            .chunks(CAPTIONS_TOGETHER)
            .map(|chunk| Part::Captions(chunk.to_vec())),
    );
    if !batch.named.is_empty() {
        parts.push(Part::Words(0..words));
    }
    parts
}

fn forward(learner: &Learner, batch: &Batch, words: &[Vec<u32>], part: &Part) -> Result<Tensor> {
    let clip = &learner.clip;
    let text = |prompts: Prompts| Ok(clip.text().encode(&prompts)?);
    match part {
        Part::Pictures(range, glimpses) => {
            let pixels = batch.pixels.narrow(0, range.start, range.len())?;
            Ok(clip.image().encode_glimpses(&pixels, glimpses)?)
        }
        Part::Captions(chosen) => {
            text(learner.prompts(chosen.iter().map(|&i| &batch.captions[i]))?)
        }
        Part::Words(range) => text(learner.prompts(words[range.clone()].iter())?),
    }
}

/// Features of the whole batch, cut off from the towers.
struct Joined {
    pictures: Tensor,
    named: Option<Tensor>,
    captions: Tensor,
    words: Option<Tensor>,
    /// Caption of each row of `captions`.
    order: Vec<usize>,
}

impl Joined {
    fn of(parts: &[Part], outputs: &[Tensor]) -> Result<Self> {
        let (mut pictures, mut named, mut captions) = (Vec::new(), Vec::new(), Vec::new());
        let (mut words, mut order) = (None, Vec::new());
        for (part, output) in parts.iter().zip(outputs) {
            let output = output.detach();
            match part {
                Part::Pictures(range, glimpses) => {
                    pictures.push(output.narrow(0, 0, range.len())?);
                    if !glimpses.values.is_empty() {
                        named.push(output.narrow(0, range.len(), glimpses.values.len())?);
                    }
                }
                Part::Captions(chosen) => {
                    order.extend(chosen);
                    captions.push(output);
                }
                Part::Words(_) => words = Some(output),
            }
        }
        let join = |list: &[Tensor]| match list {
            [] => Ok(None),
            list => Tensor::cat(list, 0).map(Some),
        };
        Ok(Self {
            pictures: join(&pictures)?.context("no picture")?,
            named: join(&named)?,
            captions: join(&captions)?.context("no caption")?,
            words,
            order,
        })
    }
}

/// Gradients of the features.
struct Leaves {
    pictures: Tensor,
    named: Option<Tensor>,
    captions: Tensor,
    words: Option<Tensor>,
    /// First row of `named` of each part by its first picture.
    first_named: HashMap<usize, usize>,
    /// Row of `captions` of each caption.
    row: Vec<usize>,
}

impl Leaves {
    /// The gradient of a part's output.
    fn of(&self, part: &Part) -> Result<Tensor> {
        match part {
            Part::Pictures(range, glimpses) => {
                let pictures = self.pictures.narrow(0, range.start, range.len())?;
                let (Some(named), false) = (&self.named, glimpses.values.is_empty()) else {
                    return Ok(pictures);
                };
                let first = self.first_named[&range.start];
                let named = named.narrow(0, first, glimpses.values.len())?;
                Ok(Tensor::cat(&[&pictures, &named], 0)?)
            }
            Part::Captions(chosen) => {
                let first = self.row[chosen[0]];
                Ok(self.captions.narrow(0, first, chosen.len())?)
            }
            Part::Words(_) => self.words.clone().context("no words"),
        }
    }
}

fn compare(
    learner: &Learner,
    batch: &Batch,
    joined: &Joined,
    weighting: &Weighting,
) -> Result<(Losses, Leaves, Gradients)> {
    let mut leaves = learner
        .params
        .group(|p| p.name().starts_with(HEAD) || p.name() == learner.logit_scale.name());
    let pictures = leaves.copied("pictures", &joined.pictures)?;
    let captions = leaves.copied("captions", &joined.captions)?;
    let image = unit_length(pictures.tensor(), "a picture's feature")?;
    let text = unit_length(captions.tensor(), "a caption's feature")?;
    let n = joined.order.len();
    let mut row = vec![0; n];
    joined
        .order
        .iter()
        .enumerate()
        .for_each(|(r, &i)| row[i] = r);
    let index: Vec<u32> = row.iter().map(|&r| r as u32).collect();
    let text = text.index_select(&Tensor::new(index, &Device::Cpu)?, 0)?;
    let scale = learner.logit_scale.tensor().exp()?;

    let targets = targets(batch, weighting.softness)?;
    let logits = image.matmul(&text.t()?)?.broadcast_mul(&scale)?;
    let one_way = |logits: &Tensor| -> Result<Tensor> {
        Ok(((&targets * log_softmax(logits)?)?.sum_all()? * (-0.5 / n as f64))?)
    };
    let contrastive = (one_way(&logits)? + one_way(&logits.t()?.contiguous()?)?)?;
    let mut total = contrastive.clone();

    // Unit features are small numbers; at this length a head starts with logits of a useful size.
    let seen = (&image * (image.dim(1)? as f64).sqrt())?;
    for (name, weight) in &weighting.heads {
        let Some((_, chosen, answers)) = batch.answers.iter().find(|(head, ..)| head == name)
        else {
            continue;
        };
        if chosen.is_empty() {
            continue;
        }
        let chosen = Tensor::new(chosen.as_slice(), &Device::Cpu)?;
        let logits = learner
            .head(name)?
            .logits(&seen.index_select(&chosen, 0)?)?;
        total = (total + (cross_entropy(&logits, answers)? * *weight)?)?;
    }

    let mut named_loss = 0.0;
    let (mut has_named, mut first_named) = (false, HashMap::new());
    if let (Some(named), Some(words)) = (&joined.named, &joined.words) {
        has_named = true;
        let named = leaves.copied("named", named)?;
        let words = leaves.copied("words", words)?;
        let patches = unit_length(named.tensor(), "a patch's feature")?;
        let words = unit_length(words.tensor(), "a word's feature")?;
        let logits = patches.matmul(&words.t()?)?.broadcast_mul(&scale)?;
        let answers: Vec<u32> = batch.named.iter().map(|(.., shape)| *shape).collect();
        let loss = cross_entropy(&logits, &answers)?;
        named_loss = f64::from(loss.to_scalar::<f32>()?);
        total = (total + (loss * weighting.named)?)?;
        for start in (0..n).step_by(PICTURES_TOGETHER) {
            let first = batch.named.iter().position(|(i, ..)| *i >= start);
            first_named.insert(start, first.unwrap_or(batch.named.len()));
        }
    }

    let losses = Losses {
        total: f64::from(total.to_scalar::<f32>()?),
        contrastive: f64::from(contrastive.to_scalar::<f32>()?),
        named: named_loss,
    };
    let gradients = Gradients::of(&total, &leaves)?;
    let leaf = |name: &str| {
        gradients
            .get(name)
            .cloned()
            .context("a leaf has no gradient")
    };
    let optional = |name: &str| has_named.then(|| leaf(name)).transpose();
    let leaves = Leaves {
        pictures: leaf("pictures")?,
        captions: leaf("captions")?,
        named: optional("named")?,
        words: optional("words")?,
        first_named,
        row,
    };
    Ok((losses, leaves, gradients))
}

/// Row-stochastic targets: a picture's own caption and its equals, and a share for all pictures of the same shape.
fn targets(batch: &Batch, softness: f64) -> Result<Tensor> {
    let n = batch.captions.len();
    let mut rows = Vec::with_capacity(n * n);
    for i in 0..n {
        let equal: Vec<bool> = (0..n)
            .map(|j| batch.captions[i] == batch.captions[j])
            .collect();
        let alike: Vec<bool> = (0..n)
            .map(|j| i == j || (batch.shapes[i].is_some() && batch.shapes[i] == batch.shapes[j]))
            .collect();
        let count = |list: &[bool]| list.iter().filter(|x| **x).count() as f64;
        let (equals, alikes) = (count(&equal), count(&alike));
        rows.extend((0..n).map(|j| {
            let own = if equal[j] {
                (1.0 - softness) / equals
            } else {
                0.0
            };
            let kind = if alike[j] { softness / alikes } else { 0.0 };
            (own + kind) as f32
        }));
    }
    Ok(Tensor::from_vec(rows, (n, n), &Device::Cpu)?)
}
