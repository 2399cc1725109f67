//! The sizes of a CLIP model.

use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// Positions of CLIP's text tower.
pub const CONTEXT_LENGTH: usize = 77;
/// Size of CLIP's vocabulary, start and end token included.
pub const VOCAB_SIZE: usize = 49_408;
/// Width of one attention head, in every tower of every CLIP: `heads = width / 64`.
pub const HEAD_WIDTH: usize = 64;

/// The nonlinearity of the transformers' MLPs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Activation {
    /// `x · sigmoid(1.702 x)`: OpenAI's weights.
    QuickGelu,
    /// `x · Φ(x)` with the exact Gaussian: most OpenCLIP weights.
    Gelu,
}

/// The image tower's kind and sizes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum VisionArch {
    /// A vision transformer.
    Vit {
        /// Residual blocks.
        layers: usize,
        /// Width of a token.
        width: usize,
        /// Side of a patch in pixels.
        patch_size: usize,
    },
    /// OpenAI's modified ResNet with an attention pool.
    ResNet {
        /// Bottleneck blocks of the four stages.
        layers: [usize; 4],
        /// Width of the stem; the last stage has 32 times as many channels.
        width: usize,
    },
}

/// The sizes of both towers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Arch {
    /// Width of the joint feature space.
    pub embed_dim: usize,
    /// Side of the input images in pixels.
    pub image_resolution: usize,
    /// The image tower.
    pub vision: VisionArch,
    /// Positions of the text tower.
    pub context_length: usize,
    /// Rows of the token embedding.
    pub vocab_size: usize,
    /// Width of a text token.
    pub text_width: usize,
    /// Residual blocks of the text tower.
    pub text_layers: usize,
    /// Nonlinearity of both towers' transformers.
    pub activation: Activation,
}

impl Arch {
    /// Attention heads of the text tower.
    pub fn text_heads(&self) -> usize {
        self.text_width / HEAD_WIDTH
    }

    /// Blocks and width of the image tower, for what needs a ViT.
    ///
    /// # Errors
    /// [`Error::Prompt`] for a ResNet.
    pub fn vit_sizes(&self) -> Result<(usize, usize)> {
        match self.vision {
            VisionArch::Vit { layers, width, .. } => Ok((layers, width)),
            VisionArch::ResNet { .. } => Err(Error::Prompt(format!(
                "{} has a ResNet image tower, visual prompts need a ViT; take ViT weights, or a method that learns text prompts only",
                self.name()
            ))),
        }
    }

    /// The published model with these sizes (`ViT-B/16`, `RN50`, ...), or a description of the image tower.
    pub fn name(&self) -> String {
        let known = match (&self.vision, self.image_resolution) {
            (
                VisionArch::Vit {
                    layers: 12,
                    width: 768,
                    patch_size: 32,
                },
                224,
            ) => "ViT-B/32",
            (
                VisionArch::Vit {
                    layers: 12,
                    width: 768,
                    patch_size: 16,
                },
                224,
            ) => "ViT-B/16",
            (
                VisionArch::Vit {
                    layers: 24,
                    width: 1024,
                    patch_size: 14,
                },
                224,
            ) => "ViT-L/14",
            (
                VisionArch::Vit {
                    layers: 24,
                    width: 1024,
                    patch_size: 14,
                },
                336,
            ) => "ViT-L/14@336px",
            (
                VisionArch::ResNet {
                    layers: [3, 4, 6, 3],
                    width: 64,
                },
                224,
            ) => "RN50",
            (
                VisionArch::ResNet {
                    layers: [3, 4, 23, 3],
                    width: 64,
                },
                224,
            ) => "RN101",
            (
                VisionArch::ResNet {
                    layers: [4, 6, 10, 6],
                    width: 80,
                },
                288,
            ) => "RN50x4",
            (
                VisionArch::ResNet {
                    layers: [6, 8, 18, 8],
                    width: 96,
                },
                384,
            ) => "RN50x16",
            (
                VisionArch::ResNet {
                    layers: [3, 15, 36, 10],
                    width: 128,
                },
                448,
            ) => "RN50x64",
            _ => "",
        };
        if !known.is_empty() {
            return known.to_owned();
        }
        match &self.vision {
            VisionArch::Vit {
                layers,
                width,
                patch_size,
            } => {
                format!(
                    "ViT, {layers} layers of width {width}, patch {patch_size}, {} px",
                    self.image_resolution
                )
            }
            VisionArch::ResNet { layers, width } => {
                format!(
                    "ResNet, stages {layers:?} of width {width}, {} px",
                    self.image_resolution
                )
            }
        }
    }
}

/// How an image becomes the tower's input: side, interpolation and normalisation that belong to the weights.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Preprocess {
    /// Side of the square input in pixels.
    pub resolution: usize,
    /// Mean of each channel, after scaling to `[0, 1]`.
    pub mean: [f32; 3],
    /// Standard deviation of each channel.
    pub std: [f32; 3],
}

impl Preprocess {
    /// OpenAI's normalisation at another resolution.
    pub fn openai(resolution: usize) -> Self {
        Self {
            resolution,
            mean: [0.481_454_66, 0.457_827_5, 0.408_210_73],
            std: [0.268_629_55, 0.261_302_6, 0.275_777_1],
        }
    }
}
