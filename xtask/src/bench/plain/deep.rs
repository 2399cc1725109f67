//! The methods that send images through the tower at every step: MaPLe, deep visual prompt tuning, VP.

use std::collections::BTreeMap;

use anyhow::Result;
use candle_core::{Device, IndexOp, Tensor, Var};
use candle_nn::{Linear, Module};

use super::{PlainClip, for_each, unit};
use crate::bench::inputs::{self, Named, maple_keys, visual_prompt_key};
use crate::bench::ours::labels;
use crate::bench::worker::Work;

pub(super) struct Deep {
    clip: PlainClip,
    learned: BTreeMap<String, Var>,
    classes: Classes,
    pixels: Tensor,
    labels: Vec<u32>,
    depth: usize,
}

/// Where class features come from.
enum Classes {
    /// Prompts with deep ones of their own, of which the image tower's are made.
    Maple { tokens: Tensor },
    /// Unit features at hand.
    Fixed { text: Tensor },
}

pub(super) fn maple(clip: PlainClip, inputs: &Named) -> Result<Deep> {
    let tokens = inputs["tokens"].clone();
    let depth = inputs::depth(inputs, |block| maple_keys(block).prompt);
    Deep::new(
        clip,
        inputs,
        "prompt_learner.",
        depth,
        Classes::Maple { tokens },
    )
}

pub(super) fn deep_vpt(clip: PlainClip, inputs: &Named) -> Result<Deep> {
    let text = unit(&inputs["text_features"])?;
    let depth = inputs::depth(inputs, visual_prompt_key);
    Deep::new(
        clip,
        inputs,
        "image_encoder.",
        depth,
        Classes::Fixed { text },
    )
}

impl Deep {
    fn new(
        clip: PlainClip,
        inputs: &Named,
        prefix: &str,
        depth: usize,
        classes: Classes,
    ) -> Result<Self> {
        let learned = inputs.iter().filter(|(name, _)| name.starts_with(prefix));
        let learned = learned.map(|(name, tensor)| Ok((name.clone(), Var::from_tensor(tensor)?)));
        Ok(Self {
            learned: learned.collect::<Result<_>>()?,
            classes,
            pixels: inputs["pixels"].clone(),
            labels: labels(inputs)?,
            depth,
            clip,
        })
    }

    fn value(&self, key: &str) -> Tensor {
        self.learned[key].as_tensor().clone()
    }

    /// The image tower's prompts of a block, `(n, width)`.
    fn visual(&self, block: usize) -> Result<Tensor> {
        let Classes::Maple { .. } = self.classes else {
            return Ok(self.value(&visual_prompt_key(block)));
        };
        let keys = maple_keys(block);
        let weight = self.value(&format!("{}.weight", keys.map));
        let bias = self.value(&format!("{}.bias", keys.map));
        Ok(Linear::new(weight, Some(bias)).forward(&self.value(&keys.prompt))?)
    }

    /// Raw features of the prompts, `(classes, dim)`.
    fn text(&self, tokens: &Tensor) -> Result<Tensor> {
        let ctx = self.value(&maple_keys(0).prompt);
        let n = ctx.dim(0)?;
        let enter = |block: usize, x: Tensor| -> Result<Tensor> {
            if !(1..self.depth).contains(&block) {
                return Ok(x);
            }
            let own = for_each(&self.value(&maple_keys(block).prompt), x.dim(0)?)?;
            let (first, rest) = (x.i((.., ..1))?, x.i((.., 1 + n..))?);
            Ok(Tensor::cat(&[first, own, rest], 1)?)
        };
        let embedded = self.clip.embed_with(&ctx, tokens)?;
        self.clip.text_with(&embedded, tokens, &enter)
    }

    /// Raw features of the images, `(batch, dim)`.
    fn images(&self) -> Result<Tensor> {
        let visual = (0..self.depth).map(|block| self.visual(block));
        let visual = visual.collect::<Result<Vec<_>>>()?;
        let enter = |block: usize, x: Tensor| -> Result<Tensor> {
            if !(1..self.depth).contains(&block) {
                return Ok(x);
            }
            let own = for_each(&visual[block], x.dim(0)?)?;
            let kept = x.dim(1)? - own.dim(1)?;
            Ok(Tensor::cat(&[x.i((.., ..kept))?, own], 1)?)
        };
        self.clip.vit(&self.pixels, visual.first(), &enter)
    }
}

impl Work for Deep {
    fn step(&mut self, _: usize) -> Result<Named> {
        let images = self.images()?;
        let mut named = Named::new();
        named.insert("image_features".into(), images.detach());
        let text = match &self.classes {
            Classes::Fixed { text } => text.clone(),
            Classes::Maple { tokens } => {
                let text = self.text(tokens)?;
                named.insert("text_features".into(), text.detach());
                unit(&text)?
            }
        };
        let logits = (unit(&images)? * self.clip.scale()?)?.matmul(&text.t()?)?;
        named.insert("logits".into(), logits.detach());
        let labels = Tensor::new(self.labels.as_slice(), &Device::Cpu)?;
        let store = candle_nn::loss::cross_entropy(&logits, &labels)?.backward()?;
        for (name, var) in &self.learned {
            if let Some(gradient) = store.get(var) {
                named.insert(format!("grad.{name}"), gradient.detach());
            }
        }
        Ok(named)
    }
}

/// The frame's pieces by their keys.
const PIECES: [&str; 4] = ["pad_up", "pad_down", "pad_left", "pad_right"];

pub(super) struct Vp {
    clip: PlainClip,
    pieces: [Var; 4],
    /// `(classes, dim)`, of unit length.
    text: Tensor,
    pixels: Tensor,
    labels: Vec<u32>,
}

impl Vp {
    pub(super) fn new(clip: PlainClip, inputs: &Named) -> Result<Self> {
        let [up, down, left, right] = PIECES.map(|key| Var::from_tensor(&inputs[key]));
        Ok(Self {
            clip,
            pieces: [up?, down?, left?, right?],
            text: unit(&inputs["text_features"])?,
            pixels: inputs["pixels"].clone(),
            labels: labels(inputs)?,
        })
    }
}

impl Work for Vp {
    fn step(&mut self, _: usize) -> Result<Named> {
        let [up, down, left, right] = &self.pieces;
        let (_, _, inner, padding) = left.dims4()?;
        let across = up.dim(3)? - 2 * padding;
        let nothing = Tensor::zeros((1, 3, inner, across), left.dtype(), &Device::Cpu)?;
        let between = Tensor::cat(&[left.as_tensor(), &nothing, right.as_tensor()], 3)?;
        let frame = Tensor::cat(&[up.as_tensor(), &between, down.as_tensor()], 2)?;
        let framed = self.pixels.broadcast_add(&frame)?;
        let images = self.clip.vit(&framed, None, &|_, x| Ok(x))?;
        let logits = (unit(&images)? * self.clip.scale()?)?.matmul(&self.text.t()?)?;
        let labels = Tensor::new(self.labels.as_slice(), &Device::Cpu)?;
        let store = candle_nn::loss::cross_entropy(&logits, &labels)?.backward()?;
        let mut named = Named::new();
        named.insert("image_features".into(), images.detach());
        named.insert("logits".into(), logits.detach());
        for (key, piece) in PIECES.iter().zip(&self.pieces) {
            if let Some(gradient) = store.get(piece) {
                named.insert(format!("grad.{key}"), gradient.detach());
            }
        }
        Ok(named)
    }
}
