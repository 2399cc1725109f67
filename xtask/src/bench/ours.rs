//! This workspace's side of each row, through its public interface.

mod deep;

use anyhow::{Context, Result};
use candle_core::Tensor;
use cliptune_core::method::Settings;
use cliptune_core::prompt::{ClassTokenPosition, ClassTokens, Prompts, placeholder};
use cliptune_core::tokenizer::END;
use cliptune_core::train::Batch;
use cliptune_core::{Classes, Clip, Gradients, ImageBatch, Learned, Params, ops};
use cliptune_text_pt::{CoCoOp, CoCoOpConfig, CoOp, CoOpConfig, PlotConfig, VptConfig};
use serde_json::json;

use super::inputs::{self, Named};
use super::names::names;
use super::rows::Task;
use super::worker::{Job, Work};

/// `twice` if the memory budget shall not let CoOp save everything.
pub(super) fn work(job: &Job, twice: bool) -> Result<Box<dyn Work>> {
    let clip = Clip::load(&job.weights)?;
    let inputs = inputs::read(&job.inputs)?;
    Ok(match job.task {
        Task::Coop { classes, n_ctx, .. } => {
            let mut coop = Coop::new(clip, &inputs, classes, n_ctx)?;
            if twice {
                let all = coop.clip.text().forecast(&coop.prompts()?)?.step;
                coop.clip.set_memory_budget(Some(all - 1));
            }
            Box::new(coop)
        }
        Task::Cocoop { classes, n_ctx, .. } => {
            Box::new(Cocoop::new(clip, &inputs, classes, n_ctx)?)
        }
        Task::Plot {
            classes,
            n_prompts,
            n_ctx,
            ..
        } => Box::new(Plot::new(clip, &inputs, classes, n_prompts, n_ctx)?),
        Task::Vpt {
            classes,
            samples,
            n_ctx,
            ..
        } => Box::new(Vpt::new(clip, &inputs, classes, samples, n_ctx)?),
        Task::Maple { classes, n_ctx, .. } => {
            Box::new(deep::Maple::new(clip, &inputs, classes, n_ctx)?)
        }
        Task::DeepVpt { n_ctx, .. } => Box::new(deep::DeepVpt::new(clip, &inputs, n_ctx)?),
        Task::Vp { padding, .. } => Box::new(deep::Vp::new(clip, &inputs, padding)?),
        Task::ZeroShot { templates, .. } => Box::new(ZeroShot {
            prompts: Prompts::of_tokens(tokens(&inputs)?),
            clip,
            templates,
        }),
        Task::Image { .. } => Box::new(Image {
            clip,
            pixels: inputs["pixels"].clone(),
        }),
    })
}

/// Token ids up to the end token.
fn tokens(inputs: &Named) -> Result<Vec<Vec<u32>>> {
    let mut all = inputs["tokens"]
        .to_dtype(candle_core::DType::U32)?
        .to_vec2::<u32>()?;
    for ids in &mut all {
        let end = ids.iter().position(|&id| id == END);
        ids.truncate(end.map_or(ids.len(), |end| end + 1));
    }
    Ok(all)
}

pub(super) fn labels(inputs: &Named) -> Result<Vec<u32>> {
    Ok(inputs["labels"]
        .to_dtype(candle_core::DType::U32)?
        .to_vec1()?)
}

/// Results with the gradients of everything learned.
fn with_gradients(results: &[(&str, &Tensor)], loss: &Tensor, params: &Params) -> Result<Named> {
    let mut named: Named = results
        .iter()
        .map(|(name, tensor)| ((*name).to_owned(), tensor.detach()))
        .collect();
    for (name, gradient) in Gradients::of(loss, params)?.iter() {
        if let Some(gradient) = gradient {
            named.insert(format!("grad.{name}"), gradient.clone());
        }
    }
    Ok(named)
}

struct Coop {
    clip: Clip,
    coop: Learned<CoOp>,
    classes: ClassTokens,
    image_features: Tensor,
    labels: Vec<u32>,
    n_ctx: usize,
}

impl Coop {
    fn new(clip: Clip, inputs: &Named, classes: usize, n_ctx: usize) -> Result<Self> {
        let classes = Classes::new(names(classes))?;
        let config = CoOpConfig::read(&json!({ "n_ctx": n_ctx }))?;
        let ctx = [("ctx".to_owned(), inputs["ctx"].clone())].into();
        Ok(Self {
            coop: Learned::<CoOp>::with_tensors(&config, &clip, &classes, 0, &ctx)?,
            classes: ClassTokens::new(clip.text(), &classes)?,
            clip,
            image_features: inputs["image_features"].clone(),
            labels: labels(inputs)?,
            n_ctx,
        })
    }

    fn prompts(&self) -> Result<Prompts> {
        let ctx = self.coop.params().get("ctx").context("no context")?;
        let words = placeholder(self.n_ctx);
        let end = ClassTokenPosition::End;
        Ok(self.classes.weave(ctx.tensor(), &words, end)?)
    }
}

impl Work for Coop {
    fn step(&mut self, _: usize) -> Result<Named> {
        let features = self.coop.context.text_features(&self.clip, &self.classes)?;
        let logits = self.clip.cosine_logits(&self.image_features, &features)?;
        let loss = ops::cross_entropy(&logits, &self.labels)?;
        let results = [("features", &features), ("logits", &logits)];
        with_gradients(&results, &loss, self.coop.params())
    }

    fn forecast(&self) -> Result<Option<u64>> {
        let prompts = self.prompts()?;
        Ok(Some(self.clip.text().forecast(&prompts)?.bytes()))
    }
}

struct Cocoop {
    clip: Clip,
    cocoop: Learned<CoCoOp>,
    classes: ClassTokens,
    image_features: Tensor,
    labels: Vec<u32>,
}

impl Cocoop {
    fn new(clip: Clip, inputs: &Named, classes: usize, n_ctx: usize) -> Result<Self> {
        let classes = Classes::new(names(classes))?;
        let config = CoCoOpConfig::read(&json!({ "n_ctx": n_ctx, "ctx_init": null }))?;
        Ok(Self {
            cocoop: Learned::<CoCoOp>::with_tensors(&config, &clip, &classes, 0, inputs)?,
            classes: ClassTokens::new(clip.text(), &classes)?,
            clip,
            image_features: inputs["image_features"].clone(),
            labels: labels(inputs)?,
        })
    }

    fn unit(&self) -> Result<Tensor> {
        Ok(ops::unit_length(&self.image_features, "an image feature")?)
    }
}

impl Work for Cocoop {
    fn step(&mut self, _: usize) -> Result<Named> {
        let unit = self.unit()?;
        let contexts = self.cocoop.contexts(&unit)?;
        let features =
            self.cocoop
                .context
                .text_features_under(&contexts, &self.clip, &self.classes)?;
        let text = ops::unit_length(&features, "a text feature")?;
        let logits = ops::own_dots(&(unit * self.clip.scale())?, &text)?;
        let loss = ops::cross_entropy(&logits, &self.labels)?;
        let features = features.flatten(0, 1)?;
        let results = [("features", &features), ("logits", &logits)];
        with_gradients(&results, &loss, self.cocoop.params())
    }

    fn forecast(&self) -> Result<Option<u64>> {
        let contexts = self.cocoop.contexts(&self.unit()?)?;
        forecast_each(&self.clip, &self.classes, &contexts)
    }
}

struct Plot {
    clip: Clip,
    plot: Learned<cliptune_text_pt::Plot>,
    classes: ClassTokens,
    images: ImageBatch,
    labels: Vec<u32>,
}

impl Plot {
    fn new(
        clip: Clip,
        inputs: &Named,
        classes: usize,
        n_prompts: usize,
        n_ctx: usize,
    ) -> Result<Self> {
        let classes = Classes::new(names(classes))?;
        let config = PlotConfig::read(&json!({ "n_prompts": n_prompts, "n_ctx": n_ctx }))?;
        Ok(Self {
            plot: Learned::<cliptune_text_pt::Plot>::with_tensors(
                &config, &clip, &classes, 0, inputs,
            )?,
            classes: ClassTokens::new(clip.text(), &classes)?,
            clip,
            images: ImageBatch::of_local_features(inputs["image_features"].clone())?,
            labels: labels(inputs)?,
        })
    }
}

impl Work for Plot {
    fn step(&mut self, _: usize) -> Result<Named> {
        let features = self.plot.text_features(&self.clip, &self.classes)?;
        let matched = self.plot.matched(&self.clip, &self.images, &features)?;
        let loss = ops::cross_entropy(&matched.logits, &self.labels)?;
        let results = [
            ("features", &features.flatten(0, 1)?),
            ("logits", &matched.logits),
            ("plan", &matched.transport.plan),
        ];
        with_gradients(&results, &loss, self.plot.params())
    }

    fn forecast(&self) -> Result<Option<u64>> {
        let ctx = self.plot.params().get("ctx").context("no contexts")?;
        forecast_each(&self.clip, &self.classes, ctx.tensor())
    }
}

struct Vpt {
    clip: Clip,
    vpt: Learned<cliptune_text_pt::Vpt>,
    classes: ClassTokens,
    images: ImageBatch,
    labels: Vec<u32>,
    noise: Tensor,
}

impl Vpt {
    fn new(
        clip: Clip,
        inputs: &Named,
        classes: usize,
        samples: usize,
        n_ctx: usize,
    ) -> Result<Self> {
        let classes = Classes::new(names(classes))?;
        let settings = json!({ "n_ctx": n_ctx, "ctx_init": null, "samples": samples });
        let config = VptConfig::read(&settings)?;
        Ok(Self {
            vpt: Learned::<cliptune_text_pt::Vpt>::with_tensors(
                &config, &clip, &classes, 0, inputs,
            )?,
            classes: ClassTokens::new(clip.text(), &classes)?,
            clip,
            images: ImageBatch::of_features(inputs["image_features"].clone()),
            labels: labels(inputs)?,
            noise: inputs["noise"].clone(),
        })
    }
}

impl Work for Vpt {
    fn step(&mut self, _: usize) -> Result<Named> {
        let batch = Batch {
            images: &self.images,
            labels: &self.labels,
            classes: &self.classes,
        };
        let loss = self.vpt.loss_with(&self.clip, &batch, &self.noise)?;
        let logits = loss.logits.as_ref().context("a loss without logits")?;
        let results = [("logits", logits), ("loss", &loss.total.reshape(1)?)];
        with_gradients(&results, &loss.total, self.vpt.params())
    }

    fn forecast(&self) -> Result<Option<u64>> {
        let posterior = self.vpt.posterior(self.images.features()?)?;
        let contexts = self.vpt.contexts(&posterior, &self.noise)?.flatten(0, 1)?;
        forecast_each(&self.clip, &self.classes, &contexts)
    }
}

/// Bytes that a pass of every class with each of `contexts (n, n_ctx, width)` is expected to add to the process.
fn forecast_each(clip: &Clip, classes: &ClassTokens, contexts: &Tensor) -> Result<Option<u64>> {
    let words = placeholder(contexts.dim(1)?);
    let prompts = classes.weave_each(contexts, &words, ClassTokenPosition::End)?;
    Ok(Some(clip.text().forecast(&prompts)?.bytes()))
}

struct ZeroShot {
    clip: Clip,
    prompts: Prompts,
    templates: usize,
}

impl Work for ZeroShot {
    fn step(&mut self, _: usize) -> Result<Named> {
        let features = self.clip.text().encode(&self.prompts)?;
        let (prompts, dim) = features.dims2()?;
        let unit = ops::unit_length(&features, "a text feature")?;
        let mean = unit
            .reshape((prompts / self.templates, self.templates, dim))?
            .mean(1)?;
        let weights = ops::unit_length(&mean, "a mean text feature")?;
        Ok([
            ("features".to_owned(), features),
            ("weights".to_owned(), weights),
        ]
        .into())
    }

    fn forecast(&self) -> Result<Option<u64>> {
        Ok(Some(self.clip.text().forecast(&self.prompts)?.bytes()))
    }
}

struct Image {
    clip: Clip,
    pixels: Tensor,
}

impl Work for Image {
    fn step(&mut self, _: usize) -> Result<Named> {
        let features = self.clip.image().encode(&self.pixels)?;
        Ok([("features".to_owned(), features)].into())
    }

    fn forecast(&self) -> Result<Option<u64>> {
        Ok(Some(self.clip.image().forecast(self.pixels.dim(0)?)?))
    }
}
