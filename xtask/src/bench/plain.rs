//! CLIP in candle's own operations, as someone without this workspace would write it.

mod deep;
mod several;

use anyhow::Result;
use candle_core::{D, DType, Device, IndexOp, Tensor, Var};
use candle_nn::{BatchNorm, Linear, Module, ModuleT};

use super::inputs::{self, Named};
use super::ours::labels;
use super::rows::Task;
use super::worker::{Job, Work};

pub(super) fn work(job: &Job) -> Result<Box<dyn Work>> {
    let clip = PlainClip {
        weights: inputs::read(&job.weights)?
            .into_iter()
            .map(|(name, tensor)| Ok((name, tensor.to_dtype(DType::F32)?)))
            .collect::<Result<_>>()?,
        learns: !matches!(job.task, Task::ZeroShot { .. } | Task::Image { .. }),
    };
    let inputs = inputs::read(&job.inputs)?;
    let learned = |name: &str| Var::from_tensor(&inputs[name]);
    Ok(match job.task {
        Task::Coop { graph, .. } => Box::new(Coop {
            ctx: learned("ctx")?,
            tokens: inputs["tokens"].clone(),
            image_features: unit(&inputs["image_features"])?,
            labels: labels(&inputs)?,
            clip,
            graph,
        }),
        Task::Cocoop { .. } => {
            let names = inputs.keys().filter(|name| name.starts_with("meta_net."));
            let names = names.map(String::as_str).chain(["ctx"]);
            Box::new(Cocoop {
                learned: names
                    .map(|name| Ok((name.to_owned(), learned(name)?)))
                    .collect::<Result<_>>()?,
                tokens: inputs["tokens"].clone(),
                image_features: unit(&inputs["image_features"])?,
                labels: labels(&inputs)?,
                clip,
            })
        }
        Task::Plot { graph, .. } => Box::new(several::plot(clip, &inputs, graph)?),
        Task::Vpt { graph, .. } => Box::new(several::vpt(clip, &inputs, graph)?),
        Task::Maple { .. } => Box::new(deep::maple(clip, &inputs)?),
        Task::DeepVpt { .. } => Box::new(deep::deep_vpt(clip, &inputs)?),
        Task::Vp { .. } => Box::new(deep::Vp::new(clip, &inputs)?),
        Task::ZeroShot {
            templates, batch, ..
        } => Box::new(ZeroShot {
            tokens: inputs["tokens"].clone(),
            clip,
            templates,
            batch,
        }),
        Task::Image { .. } => Box::new(Image {
            pixels: inputs["pixels"].clone(),
            clip,
        }),
    })
}

fn unit(x: &Tensor) -> Result<Tensor> {
    Ok(x.broadcast_div(&x.sqr()?.sum_keepdim(D::Minus1)?.sqrt()?)?)
}

/// The same rows for each of a batch: `(n, width)` → `(batch, n, width)`.
fn for_each(rows: &Tensor, batch: usize) -> Result<Tensor> {
    let (n, width) = rows.dims2()?;
    Ok(rows.unsqueeze(0)?.expand((batch, n, width))?)
}

/// What a block reads without deep prompts.
fn unchanged(_: usize, x: Tensor) -> Result<Tensor> {
    Ok(x)
}

struct PlainClip {
    /// In f32.
    weights: Named,
    /// Whether gradients are wanted. candle's fast layer norm and softmax have none.
    learns: bool,
}

impl PlainClip {
    fn scale(&self) -> Result<f64> {
        Ok(f64::from(
            self.weights["logit_scale"].to_scalar::<f32>()?.exp(),
        ))
    }

    fn linear(&self, weight: &str, bias: &str, x: &Tensor) -> Result<Tensor> {
        let (weight, bias) = (self.weights[weight].clone(), self.weights[bias].clone());
        Ok(Linear::new(weight, Some(bias)).forward(x)?)
    }

    fn layer_norm(&self, name: &str, x: &Tensor) -> Result<Tensor> {
        let gain = &self.weights[&format!("{name}.weight")];
        let bias = &self.weights[&format!("{name}.bias")];
        if self.learns {
            return Ok(candle_nn::ops::layer_norm_slow(x, gain, bias, 1e-5)?);
        }
        #[allow(clippy::disallowed_methods, reason = "no gradient is wanted here")]
        Ok(candle_nn::ops::layer_norm(
            &x.contiguous()?,
            gain,
            bias,
            1e-5,
        )?)
    }

    fn softmax(&self, x: &Tensor) -> Result<Tensor> {
        if self.learns {
            return Ok(candle_nn::ops::softmax(x, D::Minus1)?);
        }
        #[allow(clippy::disallowed_methods, reason = "no gradient is wanted here")]
        Ok(candle_nn::ops::softmax_last_dim(x)?)
    }

    fn block(&self, name: &str, x: &Tensor, mask: Option<&Tensor>) -> Result<Tensor> {
        let (n, t, width) = x.dims3()?;
        let head_width = cliptune_core::HEAD_WIDTH;
        let normed = self.layer_norm(&format!("{name}.ln_1"), x)?;
        let qkv = self.linear(
            &format!("{name}.attn.in_proj_weight"),
            &format!("{name}.attn.in_proj_bias"),
            &normed,
        )?;
        let part = |i: usize| -> Result<Tensor> {
            let part = qkv.narrow(2, i * width, width)?;
            let heads = part.reshape((n, t, width / head_width, head_width))?;
            Ok(heads.transpose(1, 2)?.contiguous()?)
        };
        let (q, k, v) = (part(0)?, part(1)?, part(2)?);
        let mut scores = (q.matmul(&k.t()?)? / (head_width as f64).sqrt())?;
        if let Some(mask) = mask {
            scores = scores.broadcast_add(mask)?;
        }
        let mixed = self.softmax(&scores)?.matmul(&v)?;
        let mixed = mixed.transpose(1, 2)?.reshape((n, t, width))?;
        let attended = self.linear(
            &format!("{name}.attn.out_proj.weight"),
            &format!("{name}.attn.out_proj.bias"),
            &mixed,
        )?;
        let x = (x + attended)?;
        let hidden = self.linear(
            &format!("{name}.mlp.c_fc.weight"),
            &format!("{name}.mlp.c_fc.bias"),
            &self.layer_norm(&format!("{name}.ln_2"), &x)?,
        )?;
        let hidden = (&hidden * candle_nn::ops::sigmoid(&(&hidden * 1.702)?)?)?;
        let hidden = self.linear(
            &format!("{name}.mlp.c_proj.weight"),
            &format!("{name}.mlp.c_proj.bias"),
            &hidden,
        )?;
        Ok((x + hidden)?)
    }

    /// Runs all blocks; `enter` changes what one of them reads.
    fn blocks(
        &self,
        prefix: &str,
        mut x: Tensor,
        mask: Option<&Tensor>,
        enter: &dyn Fn(usize, Tensor) -> Result<Tensor>,
    ) -> Result<Tensor> {
        for i in 0.. {
            let name = format!("{prefix}transformer.resblocks.{i}");
            if !self.weights.contains_key(&format!("{name}.ln_1.weight")) {
                break;
            }
            x = self.block(&name, &enter(i, x)?, mask)?;
        }
        Ok(x)
    }

    /// Rows of the token embedding: `(prompts, tokens)` → `(prompts, tokens, width)`.
    fn embed(&self, tokens: &Tensor) -> Result<Tensor> {
        let (n, t) = tokens.dims2()?;
        let table = &self.weights["token_embedding.weight"];
        let rows = table.index_select(&tokens.flatten_all()?, 0)?;
        Ok(rows.reshape((n, t, table.dim(1)?))?)
    }

    /// Rows of the token embedding with `ctx (n_ctx, width)` in place of those after the start token.
    fn embed_with(&self, ctx: &Tensor, tokens: &Tensor) -> Result<Tensor> {
        let (n, n_ctx) = (tokens.dim(0)?, ctx.dim(0)?);
        let embedded = self.embed(tokens)?;
        let ctx = ctx.unsqueeze(0)?.expand((n, n_ctx, ctx.dim(1)?))?;
        Ok(Tensor::cat(
            &[embedded.i((.., ..1))?, ctx, embedded.i((.., 1 + n_ctx..))?],
            1,
        )?)
    }

    /// Features of the prompts, at the largest token id of each.
    fn text(&self, embedded: &Tensor, tokens: &Tensor) -> Result<Tensor> {
        self.text_with(embedded, tokens, &unchanged)
    }

    /// As [`PlainClip::text`], with deep prompts.
    fn text_with(
        &self,
        embedded: &Tensor,
        tokens: &Tensor,
        enter: &dyn Fn(usize, Tensor) -> Result<Tensor>,
    ) -> Result<Tensor> {
        let (n, t, width) = embedded.dims3()?;
        let mask = (0..t * t).map(|i| {
            if i % t > i / t {
                f32::NEG_INFINITY
            } else {
                0.0
            }
        });
        let mask = Tensor::from_vec(mask.collect(), (t, t), &Device::Cpu)?;
        let x = embedded.broadcast_add(&self.weights["positional_embedding"])?;
        let x = self.layer_norm("ln_final", &self.blocks("", x, Some(&mask), enter)?)?;
        let ends = tokens.argmax(D::Minus1)?;
        let rows = (Tensor::arange(0, n as u32, &Device::Cpu)? * t as f64)?;
        let x = x
            .reshape((n * t, width))?
            .index_select(&(rows + ends)?, 0)?;
        Ok(x.matmul(&self.weights["text_projection"])?)
    }

    fn image(&self, pixels: &Tensor) -> Result<Tensor> {
        match self.weights.contains_key("visual.proj") {
            true => self.vit(pixels, None, &unchanged),
            false => self.resnet(pixels),
        }
    }

    /// `joined (n, width)` are tokens that join before `ln_pre`.
    fn vit(
        &self,
        pixels: &Tensor,
        joined: Option<&Tensor>,
        enter: &dyn Fn(usize, Tensor) -> Result<Tensor>,
    ) -> Result<Tensor> {
        let conv = &self.weights["visual.conv1.weight"];
        let (width, patch) = (conv.dim(0)?, conv.dim(3)?);
        let patches = pixels.conv2d(conv, 0, patch, 1, 1)?;
        let patches = patches.flatten_from(2)?.transpose(1, 2)?;
        let class = self.weights["visual.class_embedding"].reshape((1, 1, width))?;
        let class = class.expand((pixels.dim(0)?, 1, width))?;
        let mut x = Tensor::cat(&[class, patches], 1)?
            .broadcast_add(&self.weights["visual.positional_embedding"])?;
        if let Some(joined) = joined {
            x = Tensor::cat(&[&x, &for_each(joined, x.dim(0)?)?], 1)?;
        }
        let x = self.layer_norm("visual.ln_pre", &x)?;
        let x = self.blocks("visual.", x, None, enter)?;
        let class = self.layer_norm("visual.ln_post", &x.i((.., 0))?)?;
        Ok(class.matmul(&self.weights["visual.proj"])?)
    }

    /// Convolution and its batch norm.
    fn conv(&self, conv: &str, norm: &str, stride: usize, x: &Tensor) -> Result<Tensor> {
        let kernel = &self.weights[&format!("visual.{conv}.weight")];
        let x = x.conv2d(kernel, kernel.dim(3)? / 2, stride, 1, 1)?;
        let part = |name: &str| self.weights[&format!("visual.{norm}.{name}")].clone();
        let norm = BatchNorm::new(
            kernel.dim(0)?,
            part("running_mean"),
            part("running_var"),
            part("weight"),
            part("bias"),
            1e-5,
        )?;
        Ok(norm.forward_t(&x, false)?)
    }

    fn bottleneck(&self, name: &str, stride: usize, x: &Tensor) -> Result<Tensor> {
        let conv = |i: usize, x: &Tensor| {
            self.conv(&format!("{name}.conv{i}"), &format!("{name}.bn{i}"), 1, x)
        };
        let pool = |x: Tensor| match stride {
            1 => Ok(x),
            _ => x.avg_pool2d(stride),
        };
        let out = conv(2, &conv(1, x)?.relu()?)?.relu()?;
        let out = conv(3, &pool(out)?)?;
        let downsample = format!("{name}.downsample.0");
        let skipped = match self
            .weights
            .contains_key(&format!("visual.{downsample}.weight"))
        {
            true => {
                let norm = format!("{name}.downsample.1");
                self.conv(&downsample, &norm, 1, &pool(x.clone())?)?
            }
            false => x.clone(),
        };
        Ok((out + skipped)?.relu()?)
    }

    fn resnet(&self, pixels: &Tensor) -> Result<Tensor> {
        let mut x = pixels.clone();
        for i in 1..=3 {
            let stride = if i == 1 { 2 } else { 1 };
            x = self.conv(&format!("conv{i}"), &format!("bn{i}"), stride, &x)?;
            x = x.relu()?;
        }
        x = x.avg_pool2d(2)?;
        for stage in 1..=4 {
            for i in 0.. {
                let name = format!("layer{stage}.{i}");
                let there = format!("visual.{name}.conv1.weight");
                if !self.weights.contains_key(&there) {
                    break;
                }
                let stride = if stage > 1 && i == 0 { 2 } else { 1 };
                x = self.bottleneck(&name, stride, &x)?;
            }
        }
        self.attention_pool(&x)
    }

    fn attention_pool(&self, x: &Tensor) -> Result<Tensor> {
        let x = x.flatten_from(2)?.transpose(1, 2)?.contiguous()?;
        let x = Tensor::cat(&[&x.mean_keepdim(1)?, &x], 1)?;
        let x = x.broadcast_add(&self.weights["visual.attnpool.positional_embedding"])?;
        let (n, t, width) = x.dims3()?;
        let head_width = cliptune_core::HEAD_WIDTH;
        let project = |name: &str, x: &Tensor| {
            self.linear(
                &format!("visual.attnpool.{name}_proj.weight"),
                &format!("visual.attnpool.{name}_proj.bias"),
                x,
            )
        };
        let heads = |x: Tensor, t: usize| -> Result<Tensor> {
            let heads = x.reshape((n, t, width / head_width, head_width))?;
            Ok(heads.transpose(1, 2)?.contiguous()?)
        };
        let q = heads(project("q", &x.i((.., ..1))?.contiguous()?)?, 1)?;
        let (k, v) = (heads(project("k", &x)?, t)?, heads(project("v", &x)?, t)?);
        let scores = (q.matmul(&k.t()?)? / (head_width as f64).sqrt())?;
        let mixed = self.softmax(&scores)?.matmul(&v)?;
        project("c", &mixed.transpose(1, 2)?.reshape((n, width))?)
    }
}

struct Coop {
    clip: PlainClip,
    ctx: Var,
    tokens: Tensor,
    image_features: Tensor,
    labels: Vec<u32>,
    graph: usize,
}

impl Work for Coop {
    fn step(&mut self, round: usize) -> Result<Named> {
        let classes = self.tokens.dim(0)?;
        let first = round * self.graph % classes;
        let tokens = self
            .tokens
            .narrow(0, first, self.graph.min(classes - first))?;
        let labels = self
            .labels
            .iter()
            .map(|label| label % tokens.dims()[0] as u32);
        let labels: Vec<u32> = labels.collect();
        let embedded = self.clip.embed_with(&self.ctx, &tokens)?;
        let features = self.clip.text(&embedded, &tokens)?;
        let scaled = (&self.image_features * self.clip.scale()?)?;
        let logits = scaled.matmul(&unit(&features)?.t()?)?;
        let loss = candle_nn::loss::cross_entropy(&logits, &Tensor::new(labels, &Device::Cpu)?)?;
        let store = loss.backward()?;
        let mut named = Named::new();
        named.insert("features".into(), features.detach());
        named.insert("logits".into(), logits.detach());
        if let Some(gradient) = store.get(&self.ctx) {
            named.insert("grad.ctx".into(), gradient.detach());
        }
        Ok(named)
    }

    fn check(&mut self) -> Result<Named> {
        let mut named = self.step(0)?;
        if self.graph < self.tokens.dim(0)? {
            // A part of the classes has its own logits and gradient; only the features are those of the whole.
            named.retain(|name, _| name == "features");
        }
        Ok(named)
    }
}

struct Cocoop {
    clip: PlainClip,
    learned: std::collections::BTreeMap<String, Var>,
    tokens: Tensor,
    image_features: Tensor,
    labels: Vec<u32>,
}

impl Work for Cocoop {
    fn step(&mut self, _: usize) -> Result<Named> {
        let linear = |i: usize| {
            let part = |name: &str| {
                self.learned[&format!("meta_net.linear{i}.{name}")]
                    .as_tensor()
                    .clone()
            };
            Linear::new(part("weight"), Some(part("bias")))
        };
        let hidden = linear(1).forward(&self.image_features)?.relu()?;
        let shift = linear(2).forward(&hidden)?;
        let (mut all, mut logits) = (Vec::new(), Vec::new());
        for image in 0..self.image_features.dim(0)? {
            let ctx = self.learned["ctx"].broadcast_add(&shift.i(image..=image)?)?;
            let embedded = self.clip.embed_with(&ctx, &self.tokens)?;
            let features = self.clip.text(&embedded, &self.tokens)?;
            let scaled = (self.image_features.i(image..=image)? * self.clip.scale()?)?;
            logits.push(scaled.matmul(&unit(&features)?.t()?)?);
            all.push(features.detach());
        }
        let logits = Tensor::cat(&logits, 0)?;
        let labels = Tensor::new(self.labels.as_slice(), &Device::Cpu)?;
        let store = candle_nn::loss::cross_entropy(&logits, &labels)?.backward()?;
        let mut named = Named::new();
        named.insert("features".into(), Tensor::cat(&all, 0)?);
        named.insert("logits".into(), logits.detach());
        for (name, var) in &self.learned {
            if let Some(gradient) = store.get(var) {
                named.insert(format!("grad.{name}"), gradient.detach());
            }
        }
        Ok(named)
    }
}

struct ZeroShot {
    clip: PlainClip,
    tokens: Tensor,
    templates: usize,
    batch: usize,
}

impl Work for ZeroShot {
    fn step(&mut self, _: usize) -> Result<Named> {
        let prompts = self.tokens.dim(0)?;
        let mut all = Vec::new();
        for first in (0..prompts).step_by(self.batch) {
            let tokens = self
                .tokens
                .narrow(0, first, self.batch.min(prompts - first))?;
            all.push(self.clip.text(&self.clip.embed(&tokens)?, &tokens)?);
        }
        let features = Tensor::cat(&all, 0)?;
        let dim = features.dim(1)?;
        let each = unit(&features)?.reshape((prompts / self.templates, self.templates, dim))?;
        let weights = unit(&each.mean(1)?)?;
        Ok([
            ("features".to_owned(), features),
            ("weights".to_owned(), weights),
        ]
        .into())
    }
}

struct Image {
    clip: PlainClip,
    pixels: Tensor,
}

impl Work for Image {
    fn step(&mut self, _: usize) -> Result<Named> {
        let features = self.clip.image(&self.pixels)?;
        Ok([("features".to_owned(), features)].into())
    }
}
