//! The methods with several contexts for every class: PLOT and VPT (variational).

use std::collections::BTreeMap;
use std::ops::Range;

use anyhow::{Context, Result};
use candle_core::backprop::GradStore;
use candle_core::{D, Device, IndexOp, Tensor, Var};
use candle_nn::loss;

use super::{PlainClip, unit};
use crate::bench::inputs::Named;
use crate::bench::ours::labels;
use crate::bench::worker::Work;

/// Strength of the entropy, updates at most and the mean change of `r` at which they end, as PLOT's authors set them.
const EPS: f64 = 0.1;
const MAX_ITER: usize = 100;
const THRESHOLD: f32 = 1e-2;
/// Weight of VPT's KL term.
const KL_WEIGHT: f64 = 0.001;

pub(super) struct Several {
    clip: PlainClip,
    learned: BTreeMap<String, Var>,
    head: Head,
    tokens: Tensor,
    labels: Vec<u32>,
    /// Classes of one autograd graph.
    graph: usize,
}

/// What becomes of the text features.
enum Head {
    /// Unit features `(batch, places, dim)`.
    Plot { places: Tensor },
    /// Unit features `(batch, dim)` and noise `(samples, 1, width)`.
    Vpt { images: Tensor, noise: Tensor },
}

pub(super) fn plot(clip: PlainClip, inputs: &Named, graph: usize) -> Result<Several> {
    // The first is the global feature.
    let places = unit(&inputs["image_features"].i((.., 1..))?)?;
    Several::new(clip, inputs, &["ctx"], Head::Plot { places }, graph)
}

pub(super) fn vpt(clip: PlainClip, inputs: &Named, graph: usize) -> Result<Several> {
    let head = Head::Vpt {
        images: unit(&inputs["image_features"])?,
        noise: inputs["noise"].clone(),
    };
    let learned = ["ctx", "mean_posterior", "std_posterior"];
    Several::new(clip, inputs, &learned, head, graph)
}

impl Several {
    fn new(
        clip: PlainClip,
        inputs: &Named,
        learned: &[&str],
        head: Head,
        graph: usize,
    ) -> Result<Self> {
        let learned = learned
            .iter()
            .map(|&name| Ok((name.to_owned(), Var::from_tensor(&inputs[name])?)));
        Ok(Self {
            clip,
            learned: learned.collect::<Result<_>>()?,
            head,
            tokens: inputs["tokens"].clone(),
            labels: labels(inputs)?,
            graph,
        })
    }

    /// `(contexts, n_ctx, width)`.
    fn contexts(&self) -> Result<Tensor> {
        let ctx = self.learned["ctx"].as_tensor();
        Ok(match &self.head {
            Head::Plot { .. } => ctx.clone(),
            Head::Vpt { noise, .. } => {
                let deviation = self.learned["std_posterior"].exp()?.sqrt()?;
                let added = noise.broadcast_mul(&deviation)?;
                let added = added.broadcast_add(&self.learned["mean_posterior"])?;
                added.broadcast_add(&ctx.unsqueeze(0)?)?
            }
        })
    }

    /// Features `(contexts, classes, dim)` of a part of the classes.
    fn features(&self, contexts: &Tensor, classes: Range<usize>) -> Result<Tensor> {
        let tokens = self.tokens.i(classes)?;
        let (n, n_cls) = (contexts.dim(0)?, tokens.dim(0)?);
        let each = (0..n).map(|k| self.clip.embed_with(&contexts.get(k)?, &tokens));
        let embedded = Tensor::cat(&each.collect::<Result<Vec<_>>>()?, 0)?;
        let features = self.clip.text(&embedded, &tokens.repeat((n, 1))?)?;
        Ok(features.reshape((n, n_cls, ()))?)
    }

    /// The loss of text features `(contexts, classes, dim)`, and what leads to it.
    fn loss(&self, features: &Tensor) -> Result<(Tensor, Named)> {
        let (n, n_cls, dim) = features.dims3()?;
        let text = unit(features)?.reshape((n * n_cls, dim))?;
        let scale = self.clip.scale()?;
        // A part of the classes has labels of its own.
        let labels = self.labels.iter().map(|label| label % n_cls as u32);
        let labels = Tensor::new(labels.collect::<Vec<u32>>(), &Device::Cpu)?;
        let (loss, results) = match &self.head {
            Head::Plot { places } => {
                let (batch, m, _) = places.dims3()?;
                let similarity = places
                    .reshape((batch * m, dim))?
                    .matmul(&text.t()?)?
                    .reshape((batch, m, n, n_cls))?
                    .permute((0, 3, 1, 2))?
                    .reshape((batch * n_cls, m, n))?;
                let plan = plan(&similarity.detach())?;
                let score = (&plan * similarity)?.sum((1, 2))?;
                let logits = (score.reshape((batch, n_cls))? * scale)?;
                let loss = loss::cross_entropy(&logits, &labels)?;
                (loss, vec![("logits", logits), ("plan", plan)])
            }
            Head::Vpt { images, .. } => {
                let batch = images.dim(0)?;
                let logits = (images * scale)?
                    .matmul(&text.t()?)?
                    .reshape((batch, n, n_cls))?
                    .transpose(0, 1)?;
                let log_probs = candle_nn::ops::log_softmax(&logits, D::Minus1)?;
                let logits = (log_probs.log_sum_exp(0)? - (n as f64).ln())?;
                let loss = loss::nll(&logits, &labels)?;
                let mean = self.learned["mean_posterior"].as_tensor();
                let log_variance = self.learned["std_posterior"].as_tensor();
                let kl = ((log_variance.exp()? + mean.sqr()?)? - log_variance)?;
                let kl = kl.mean_all()?.affine(0.5, -0.5)?;
                let loss = (loss + (kl * KL_WEIGHT)?)?;
                let named = vec![("logits", logits), ("loss", loss.reshape(1)?)];
                (loss, named)
            }
        };
        let results = results.into_iter();
        let results = results.map(|(name, tensor)| (name.to_owned(), tensor.detach()));
        let mut results: Named = results.collect();
        if let Head::Plot { .. } = self.head {
            results.insert("features".into(), features.flatten(0, 1)?.detach());
        }
        Ok((loss, results))
    }

    /// Adds the gradients of what is learned to those that `named` has.
    fn add_gradients(&self, store: &GradStore, named: &mut Named) -> Result<()> {
        for (name, var) in &self.learned {
            if let Some(gradient) = store.get(var) {
                let name = format!("grad.{name}");
                let sum = match named.get(&name) {
                    Some(sum) => (sum + gradient)?,
                    None => gradient.clone(),
                };
                named.insert(name, sum.detach());
            }
        }
        Ok(())
    }

    fn graphs(&self) -> Result<Vec<Range<usize>>> {
        let classes = self.tokens.dim(0)?;
        let firsts = (0..classes).step_by(self.graph);
        Ok(firsts
            .map(|first| first..(first + self.graph).min(classes))
            .collect())
    }
}

impl Work for Several {
    /// One graph with its own classes only.
    fn step(&mut self, round: usize) -> Result<Named> {
        let graphs = self.graphs()?;
        let classes = graphs[round % graphs.len()].clone();
        let features = self.features(&self.contexts()?, classes)?;
        let (loss, mut named) = self.loss(&features)?;
        self.add_gradients(&loss.backward()?, &mut named)?;
        Ok(named)
    }

    /// All features without a graph, the loss and its gradient by the features, then one graph at a time.
    fn check(&mut self) -> Result<Named> {
        let (graphs, contexts) = (self.graphs()?, self.contexts()?.detach());
        let parts = graphs.iter().cloned();
        let parts = parts.map(|classes| self.features(&contexts, classes));
        let features = Tensor::cat(&parts.collect::<Result<Vec<_>>>()?, 1)?;
        let features = Var::from_tensor(&features)?;
        let (loss, mut named) = self.loss(&features)?;
        let store = loss.backward()?;
        self.add_gradients(&store, &mut named)?;
        let gradient = store
            .get(&features)
            .context("the features get no gradient")?;
        for classes in graphs {
            let gradient = gradient.i((.., classes.clone()))?.detach();
            let part = self.features(&self.contexts()?, classes)?;
            let store = (part * gradient)?.sum_all()?.backward()?;
            self.add_gradients(&store, &mut named)?;
        }
        Ok(named)
    }
}

/// Sinkhorn's algorithm between uniform weights, until `r` rests in the mean over all problems `(problems, m, n)`.
fn plan(similarity: &Tensor) -> Result<Tensor> {
    let (problems, m, n) = similarity.dims3()?;
    let kernel = ((similarity - 1.0)? / EPS)?.exp()?;
    let turned = kernel.transpose(1, 2)?.contiguous()?;
    let mut r = kernel.i((.., .., ..1))?.ones_like()?;
    let mut c = Tensor::ones((problems, n, 1), r.dtype(), r.device())?;
    for _ in 0..MAX_ITER {
        let before = r;
        r = (kernel.matmul(&c)?.recip()? / m as f64)?;
        c = (turned.matmul(&r)?.recip()? / n as f64)?;
        let change = (&r - before)?.abs()?.mean_all()?.to_scalar::<f32>()?;
        if change < THRESHOLD {
            break;
        }
    }
    let columns = c.transpose(1, 2)?;
    Ok(kernel.broadcast_mul(&r)?.broadcast_mul(&columns)?)
}
