//! The model in training: towers whose weights are learned, the tokens that captions use, and heads that are thrown away.

use std::collections::{BTreeMap, HashMap};

use anyhow::{Context, Result, anyhow, ensure};
use candle_core::{Device, Tensor};
use cliptune_core::prompt::{Piece, Prompts};
use cliptune_core::tokenizer::{START, Tokenizer};
use cliptune_core::{
    Activation, Arch, CONTEXT_LENGTH, Checkpoint, Clip, Param, Params, VOCAB_SIZE, VisionArch,
    checkpoint,
};
use cliptune_scenes as scenes;

/// Prefix of the parameters that are not part of CLIP.
pub(crate) const HEAD: &str = "head.";

/// The sizes of the built-in CLIP.
pub(crate) fn arch() -> Arch {
    Arch {
        embed_dim: 128,
        image_resolution: scenes::SIDE,
        vision: VisionArch::Vit {
            layers: 4,
            width: 128,
            patch_size: 8,
        },
        context_length: CONTEXT_LENGTH,
        vocab_size: VOCAB_SIZE,
        text_width: 128,
        text_layers: 3,
        activation: Activation::QuickGelu,
    }
}

/// A linear classifier on the image feature that helps the tower in training.
#[derive(Debug)]
pub(crate) struct Head {
    weight: Param,
    bias: Param,
}

impl Head {
    fn new(params: &mut Params, name: &str, width: usize, n_cls: usize) -> Result<Self> {
        Ok(Self {
            weight: params.normal(&format!("{HEAD}{name}.weight"), (n_cls, width), 0.05)?,
            bias: params.normal(&format!("{HEAD}{name}.bias"), n_cls, 0.0)?,
        })
    }

    /// `(n, width)` → `(n, n_cls)`.
    pub(crate) fn logits(&self, features: &Tensor) -> Result<Tensor> {
        let logits = features.matmul(&self.weight.tensor().t()?)?;
        Ok(logits.broadcast_add(self.bias.tensor())?)
    }
}

/// Everything that is learned, and the CLIP that it makes up.
#[derive(Debug)]
pub(crate) struct Learner {
    pub(crate) params: Params,
    pub(crate) clip: Clip,
    /// Logarithm of the factor of the cosines.
    pub(crate) logit_scale: Param,
    /// Token embeddings of the words that occur, `(words, width)`.
    tokens: Param,
    /// Row of [`Learner::tokens`] by token id.
    rows: HashMap<u32, usize>,
    heads: BTreeMap<&'static str, Head>,
    start: BTreeMap<String, Tensor>,
}

impl Learner {
    /// Random weights as CLIP's own training starts, but for two things: the image tower's positions start as waves over
    /// both axes, strong enough to be seen beside the pixels, and words that never occur keep random rows.
    pub(crate) fn new(seed: u64, heads: &[(&'static str, usize)]) -> Result<Self> {
        let arch = arch();
        let mut start = checkpoint::random(&arch, seed)?;
        start
            .tensors
            .insert("visual.positional_embedding".into(), waves(&arch)?);
        let tensors = start.tensors.clone();
        let mut params = Params::new(seed);
        let clip = Clip::learned(start, &mut params)?;
        let mut ids: Vec<u32> = Vec::new();
        for word in scenes::vocabulary() {
            ids.extend(Tokenizer::get().encode(&word));
        }
        ids.push(cliptune_core::tokenizer::END);
        ids.sort_unstable();
        ids.dedup();
        let table = clip.text().embed(&ids)?;
        let tokens = params.copied("token_embedding.weight", &table)?;
        let logit_scale = params.copied("logit_scale", &tensors["logit_scale"])?;
        let mut named = BTreeMap::new();
        for (name, n_cls) in heads {
            named.insert(*name, Head::new(&mut params, name, arch.embed_dim, *n_cls)?);
        }
        Ok(Self {
            params,
            clip,
            logit_scale,
            tokens,
            rows: ids.iter().enumerate().map(|(row, id)| (*id, row)).collect(),
            heads: named,
            start: tensors,
        })
    }

    pub(crate) fn head(&self, name: &str) -> Result<&Head> {
        self.heads
            .get(name)
            .ok_or_else(|| anyhow!("no head `{name}`"))
    }

    /// Captions as prompts whose tokens are learned rows.
    pub(crate) fn prompts<'a>(
        &self,
        captions: impl Iterator<Item = &'a Vec<u32>>,
    ) -> Result<Prompts> {
        let mut prompts = Prompts::new();
        let source = prompts.learn(self.tokens.tensor());
        for ids in captions {
            let mut pieces = vec![Piece::Words(vec![START])];
            for id in &ids[1..] {
                let row = *self.rows.get(id).with_context(|| {
                    let word = Tokenizer::get().decode(&[*id]);
                    format!("token {id} (`{word}`) is not in the vocabulary of the captions")
                })?;
                pieces.push(Piece::Learned {
                    source,
                    context: 0,
                    rows: row..row + 1,
                });
            }
            prompts.push(pieces);
        }
        Ok(prompts)
    }

    /// The present weights as a checkpoint.
    pub(crate) fn checkpoint(&self) -> Result<Checkpoint> {
        let mut tensors = self.start.clone();
        let words = tensors
            .get("token_embedding.weight")
            .context("no token embedding")?;
        let (vocab, width) = words.dims2()?;
        let mut words = words.flatten_all()?.to_vec1::<f32>()?;
        let learned = self.tokens.value()?.to_vec2::<f32>()?;
        for (id, row) in &self.rows {
            let at = *id as usize * width;
            words[at..at + width].copy_from_slice(&learned[*row]);
        }
        for (name, value) in self.params.tensors()? {
            if !name.starts_with(HEAD) {
                tensors.insert(name, value);
            }
        }
        let words = Tensor::from_vec(words, (vocab, width), &Device::Cpu)?;
        tensors.insert("token_embedding.weight".into(), words);
        ensure!(tensors.len() == self.start.len(), "a weight is unknown");
        Ok(Checkpoint {
            path: "<weights in training>".into(),
            arch: self.clip.arch().clone(),
            preprocess: self.clip.preprocess().clone(),
            tensors,
        })
    }
}

/// Sine and cosine of both axes in several wavelengths, with a root mean square of 0.5: `(1 + grid², width)`.
fn waves(arch: &Arch) -> Result<Tensor> {
    let VisionArch::Vit {
        width, patch_size, ..
    } = arch.vision
    else {
        return Err(anyhow!("only a ViT is trained"));
    };
    let grid = arch.image_resolution / patch_size;
    let per_axis = width / 4;
    let mut values = vec![0.0f32; width];
    for place in 0..grid * grid {
        for axis in [place / grid, place % grid] {
            for i in 0..per_axis {
                // Wavelengths from two patches to four times the grid.
                let share = i as f64 / (per_axis - 1) as f64;
                let length = 2.0 * (2.0 * grid as f64).powf(share);
                let angle = std::f64::consts::TAU * axis as f64 / length;
                let rms = 0.5 * std::f64::consts::SQRT_2;
                values.extend([(rms * angle.sin()) as f32, (rms * angle.cos()) as f32]);
            }
        }
    }
    Ok(Tensor::from_vec(
        values,
        (1 + grid * grid, width),
        &Device::Cpu,
    )?)
}
