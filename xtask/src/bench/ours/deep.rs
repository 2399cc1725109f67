//! The methods that send images through the tower at every step: MaPLe, deep visual prompt tuning, VP.

use anyhow::{Context, Result};
use candle_core::Tensor;
use cliptune_core::method::Settings;
use cliptune_core::prompt::{ClassTokenPosition, ClassTokens, Prompts};
use cliptune_core::visual_prompt::{Tokens, VisualPrompts};
use cliptune_core::{Classes, Clip, Learned, Params, ops};
use cliptune_multimodal_pt::{DeepVptConfig, MaPLe, MaPLeConfig};
use cliptune_visual_pt::VpConfig;
use serde_json::json;

use super::{labels, with_gradients};
use crate::bench::inputs::{self, MAPLE_WORDS, Named, maple_keys, visual_prompt_key};
use crate::bench::names::names;
use crate::bench::worker::Work;

/// What is learned under a key.
fn learned(params: &Params, key: &str) -> Result<Tensor> {
    let param = params.get(key).with_context(|| format!("no `{key}`"))?;
    Ok(param.tensor().clone())
}

/// Bytes that a pass of so many images with tokens of block 0, 1, ... is expected to add to the process.
fn forecast(clip: &Clip, images: usize, by_block: Vec<Tensor>) -> Result<u64> {
    let prompts = VisualPrompts::deep(by_block.into_iter().map(Tokens::Shared));
    Ok(clip.image().forecast_prompted(images, &prompts)?.bytes())
}

pub(super) struct Maple {
    clip: Clip,
    maple: Learned<MaPLe>,
    classes: ClassTokens,
    pixels: Tensor,
    labels: Vec<u32>,
    depth: usize,
}

impl Maple {
    pub(super) fn new(clip: Clip, inputs: &Named, classes: usize, n_ctx: usize) -> Result<Self> {
        let classes = Classes::new(names(classes))?;
        let depth = inputs::depth(inputs, |block| maple_keys(block).prompt);
        let settings = json!({"n_ctx": n_ctx, "ctx_init": MAPLE_WORDS, "prompt_depth": depth});
        let config = MaPLeConfig::read(&settings)?;
        Ok(Self {
            maple: Learned::<MaPLe>::with_tensors(&config, &clip, &classes, 0, inputs)?,
            classes: ClassTokens::new(clip.text(), &classes)?,
            clip,
            pixels: inputs["pixels"].clone(),
            labels: labels(inputs)?,
            depth,
        })
    }

    fn prompts(&self) -> Result<Prompts> {
        let of_block = |block| learned(self.maple.params(), &maple_keys(block).prompt);
        let end = ClassTokenPosition::End;
        let mut prompts = self.classes.weave(&of_block(0)?, MAPLE_WORDS, end)?;
        let deeper = (1..self.depth).map(of_block).collect::<Result<Vec<_>>>()?;
        if !deeper.is_empty() {
            prompts.deepen(0, &Tensor::stack(&deeper, 0)?)?;
        }
        Ok(prompts)
    }
}

impl Work for Maple {
    fn step(&mut self, _: usize) -> Result<Named> {
        let text = self.maple.text_features(&self.clip, &self.classes)?;
        let images = self.maple.image_features(&self.clip, &self.pixels)?;
        let logits = self.clip.cosine_logits(&images, &text)?;
        let loss = ops::cross_entropy(&logits, &self.labels)?;
        let results = [
            ("text_features", &text),
            ("image_features", &images),
            ("logits", &logits),
        ];
        with_gradients(&results, &loss, self.maple.params())
    }

    fn forecast(&self) -> Result<Option<u64>> {
        let text = self.clip.text().forecast(&self.prompts()?)?.bytes();
        let tokens = self.maple.vision_context()?;
        let images = forecast(&self.clip, self.pixels.dim(0)?, tokens)?;
        Ok(Some(text + images))
    }
}

pub(super) struct DeepVpt {
    clip: Clip,
    vpt: Learned<cliptune_multimodal_pt::DeepVpt>,
    /// `(classes, dim)`, of unit length.
    text: Tensor,
    pixels: Tensor,
    labels: Vec<u32>,
    depth: usize,
}

impl DeepVpt {
    pub(super) fn new(clip: Clip, inputs: &Named, n_ctx: usize) -> Result<Self> {
        let depth = inputs::depth(inputs, visual_prompt_key);
        let settings = json!({"n_ctx_vision": n_ctx, "prompt_depth_vision": depth});
        let config = DeepVptConfig::read(&settings)?;
        let text = &inputs["text_features"];
        let classes = Classes::new(names(text.dim(0)?))?;
        Ok(Self {
            vpt: Learned::<cliptune_multimodal_pt::DeepVpt>::with_tensors(
                &config, &clip, &classes, 0, inputs,
            )?,
            clip,
            text: ops::unit_length(text, "a text feature")?,
            pixels: inputs["pixels"].clone(),
            labels: labels(inputs)?,
            depth,
        })
    }
}

impl Work for DeepVpt {
    fn step(&mut self, _: usize) -> Result<Named> {
        let images = self.vpt.image_features(&self.clip, &self.pixels)?;
        let logits = self.clip.unit_logits(&images, &self.text)?;
        let loss = ops::cross_entropy(&logits, &self.labels)?;
        let results = [("image_features", &images), ("logits", &logits)];
        with_gradients(&results, &loss, self.vpt.params())
    }

    fn forecast(&self) -> Result<Option<u64>> {
        let of_block = |block| learned(self.vpt.params(), &visual_prompt_key(block));
        let tokens = (0..self.depth).map(of_block).collect::<Result<_>>()?;
        forecast(&self.clip, self.pixels.dim(0)?, tokens).map(Some)
    }
}

pub(super) struct Vp {
    clip: Clip,
    vp: Learned<cliptune_visual_pt::Vp>,
    /// `(classes, dim)`, of unit length.
    text: Tensor,
    pixels: Tensor,
    labels: Vec<u32>,
}

impl Vp {
    pub(super) fn new(clip: Clip, inputs: &Named, padding: usize) -> Result<Self> {
        let config = VpConfig::read(&json!({ "prompt_size": padding }))?;
        let text = &inputs["text_features"];
        let classes = Classes::new(names(text.dim(0)?))?;
        Ok(Self {
            vp: Learned::<cliptune_visual_pt::Vp>::with_tensors(
                &config, &clip, &classes, 0, inputs,
            )?,
            clip,
            text: ops::unit_length(text, "a text feature")?,
            pixels: inputs["pixels"].clone(),
            labels: labels(inputs)?,
        })
    }
}

impl Work for Vp {
    fn step(&mut self, _: usize) -> Result<Named> {
        let delta = self.vp.perturbations(&[(0, 0)])?;
        let images = self.vp.image_features(&self.clip, &self.pixels, &delta)?;
        let logits = self.clip.unit_logits(&images, &self.text)?;
        let loss = ops::cross_entropy(&logits, &self.labels)?;
        let results = [("image_features", &images), ("logits", &logits)];
        with_gradients(&results, &loss, self.vp.params())
    }

    fn forecast(&self) -> Result<Option<u64>> {
        let images = self.pixels.dim(0)?;
        let none = VisualPrompts::new();
        let tower = self.clip.image().forecast_perturbed(images, &none)?;
        // The images' patches, these under the frame, and the gradient of both.
        let patches = self.clip.image().patches(&self.pixels)?.elem_count();
        Ok(Some(tower.bytes() + 3 * 4 * patches as u64))
    }
}
