//! CLIP: two frozen towers that meet in one feature space, and a scale.

mod block;
mod prompted;
mod resnet;
mod resnet_back;
mod text;
mod vit;
mod vit_run;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};

use self::block::Weights;
use self::resnet::ResNet;
use self::vit::Vit;
use self::vit_run::Wanted;
use crate::visual_prompt::VisualPrompts;
use crate::{Arch, Checkpoint, Error, Params, Preprocess, Result, VisionArch, checkpoint, ops};

pub(crate) use self::block::{Block, FrozenBlock};
pub use self::text::{Probe, TextTower};
pub use crate::engine::memory::{Forecast, Policy};

/// How frozen weights are kept in memory. Computation is always in f32.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Storage {
    /// Exactly: as f32, linear layers in 16 bits where that loses nothing.
    #[default]
    F32,
    /// As f16: half the memory; exact for matrices that were published in f16, as OpenAI's are.
    F16,
    /// As bf16: half the memory, eight bits of precision.
    Bf16,
}

/// A CLIP model with frozen weights.
#[derive(Debug)]
pub struct Clip {
    text: TextTower,
    image: ImageTower,
    logit_scale: f64,
    arch: Arch,
    preprocess: Preprocess,
    weights_hash: String,
    storage: Storage,
}

impl Clip {
    /// Loads weights of any supported layout; see [`Checkpoint::open`].
    ///
    /// # Errors
    /// Names the file, the tensor and what was expected.
    pub fn load(path: impl AsRef<Path>) -> Result<Self> {
        Self::load_with(path, Storage::default())
    }

    /// As [`Clip::load`], keeping the frozen matrices in `storage`.
    ///
    /// # Errors
    /// As [`Clip::load`].
    pub fn load_with(path: impl AsRef<Path>, storage: Storage) -> Result<Self> {
        Self::from_checkpoint(Checkpoint::open(path.as_ref())?, storage)
    }

    /// Builds the towers from a checkpoint in memory.
    ///
    /// # Errors
    /// [`Error::MissingTensor`], [`Error::Shape`], [`Error::NotFinite`].
    pub fn from_checkpoint(checkpoint: Checkpoint, storage: Storage) -> Result<Self> {
        let Checkpoint {
            path,
            arch,
            preprocess,
            tensors,
        } = checkpoint;
        let weights_hash = checkpoint::weights_hash(&tensors)?;
        let dtype = match storage {
            Storage::F32 => DType::F32,
            Storage::F16 => DType::F16,
            Storage::Bf16 => DType::BF16,
        };
        let w = Weights::new(&path, tensors, dtype);
        Self::build(w, arch, preprocess, weights_hash, storage)
    }

    /// Builds towers that are trained themselves: every weight of a ViT and of the text tower's transformer becomes a
    /// parameter under its state-dict key, and features carry gradients to all of them.
    ///
    /// The token embedding and the logit scale stay as they are. Whoever trains them declares the tokens as learned rows of
    /// the prompts ([`crate::prompt::Piece::Learned`]) and scales the cosines. [`Clip::weights_hash`] is that of the
    /// beginning.
    ///
    /// # Errors
    /// As [`Clip::from_checkpoint`]; [`Error::Data`] for a ResNet, whose layers have no gradient here.
    pub fn learned(checkpoint: Checkpoint, params: &mut Params) -> Result<Self> {
        if let VisionArch::ResNet { .. } = checkpoint.arch.vision {
            return Err(Error::Data(
                "a ResNet image tower cannot be trained yet, only a ViT".into(),
            ));
        }
        let weights_hash = checkpoint::weights_hash(&checkpoint.tensors)?;
        let mut tensors = BTreeMap::new();
        for (name, tensor) in checkpoint.tensors {
            let tensor = match name.as_str() {
                "token_embedding.weight" | "logit_scale" => tensor.to_dtype(DType::F32)?,
                _ => params.copied(&name, &tensor)?.tensor().clone(),
            };
            tensors.insert(name, tensor);
        }
        let w = Weights::learned(&checkpoint.path, tensors);
        let (arch, preprocess) = (checkpoint.arch, checkpoint.preprocess);
        Self::build(w, arch, preprocess, weights_hash, Storage::F32)
    }

    fn build(
        mut w: Weights,
        arch: Arch,
        preprocess: Preprocess,
        weights_hash: String,
        storage: Storage,
    ) -> Result<Self> {
        let logit_scale = w.values("logit_scale", &[])?[0];
        let tower = match arch.vision {
            VisionArch::Vit {
                layers,
                width,
                patch_size,
            } => Tower::Vit(Box::new(Vit::load(
                &mut w, &arch, layers, width, patch_size,
            )?)),
            VisionArch::ResNet { layers, width } => {
                Tower::ResNet(Arc::new(ResNet::load(&mut w, &arch, layers, width)?))
            }
        };
        let image = ImageTower {
            tower,
            resolution: arch.image_resolution,
            embed_dim: arch.embed_dim,
        };
        let text = TextTower::load(&mut w, &arch)?;
        Ok(Self {
            text,
            image,
            logit_scale: f64::from(logit_scale),
            arch,
            preprocess,
            weights_hash,
            storage,
        })
    }

    /// Bounds what a forward and backward pass over prompts may take, in bytes beside the weights; `None`, the default, is no
    /// bound.
    ///
    /// A pass that would take more runs its prompts twice instead of keeping what it needs for the way back, and fewer of
    /// them at a time: slower, with the same bits. It holds for each tower by itself; see [`TextTower::forecast`] and
    /// [`ImageTower::forecast_prompted`].
    pub fn set_memory_budget(&mut self, bytes: Option<u64>) {
        self.text.set_memory_budget(bytes);
        self.image.set_memory_budget(bytes);
    }

    /// The text tower.
    pub fn text(&self) -> &TextTower {
        &self.text
    }

    /// The image tower.
    pub fn image(&self) -> &ImageTower {
        &self.image
    }

    /// Logarithm of [`Clip::scale`], as the checkpoint holds it.
    pub fn logit_scale(&self) -> f64 {
        self.logit_scale
    }

    /// Factor of the cosines, about 100 in published weights.
    pub fn scale(&self) -> f64 {
        // The authors take the exponential in f32.
        f64::from((self.logit_scale as f32).exp())
    }

    /// Sizes of both towers.
    pub fn arch(&self) -> &Arch {
        &self.arch
    }

    /// How images become this model's input.
    pub fn preprocess(&self) -> &Preprocess {
        &self.preprocess
    }

    /// Hash of all weights; equal for every layout that holds equal values.
    pub fn weights_hash(&self) -> &str {
        &self.weights_hash
    }

    /// How the frozen weights are kept.
    pub fn storage(&self) -> Storage {
        self.storage
    }

    /// Where the towers compute.
    pub fn device(&self) -> &Device {
        &Device::Cpu
    }

    /// `scale · cos(image, text)` of raw features: `(batch, embed_dim)` and `(n_cls, embed_dim)` → `(batch, n_cls)`.
    ///
    /// # Errors
    /// [`Error::NotFinite`] if a feature is zero or not finite.
    pub fn cosine_logits(&self, image_features: &Tensor, text_features: &Tensor) -> Result<Tensor> {
        let text = ops::unit_length(text_features, "a text feature")?;
        self.unit_logits(image_features, &text)
    }

    /// As [`Clip::cosine_logits`] for text features that are of unit length already.
    ///
    /// # Errors
    /// As [`Clip::cosine_logits`].
    pub fn unit_logits(&self, image_features: &Tensor, text_features: &Tensor) -> Result<Tensor> {
        let image = ops::unit_length(image_features, "an image feature")?;
        Ok((image * self.scale())?.matmul(&text_features.t()?)?)
    }

    /// Bytes of frozen matrices held.
    pub fn bytes(&self) -> usize {
        let image = match &self.image.tower {
            Tower::Vit(t) => t.bytes(),
            Tower::ResNet(t) => t.bytes(),
        };
        self.text.bytes() + image
    }
}

#[derive(Debug)]
enum Tower {
    Vit(Box<Vit>),
    ResNet(Arc<ResNet>),
}

/// CLIP's image tower, a vision transformer or a modified ResNet.
#[derive(Debug)]
pub struct ImageTower {
    tower: Tower,
    resolution: usize,
    embed_dim: usize,
}

impl ImageTower {
    /// Width of a feature.
    pub fn embed_dim(&self) -> usize {
        self.embed_dim
    }

    fn expect(&self, pixels: &Tensor) -> Result<()> {
        let r = self.resolution;
        match *pixels.dims() {
            [0, ..] => Err(Error::Data("the batch holds no image".into())),
            [_, 3, h, w] if (h, w) == (r, r) => Ok(()),
            _ => Err(Error::Shape {
                what: "batch of images".into(),
                found: pixels.dims().to_vec(),
                expected: vec![pixels.dims().first().copied().unwrap_or(1), 3, r, r],
            }),
        }
    }

    /// Raw features of preprocessed pixels: `(batch, 3, side, side)` → `(batch, embed_dim)`.
    ///
    /// An image's feature has the same bits whatever stands beside it in the batch. Gradients reach the pixels if they are
    /// tracked (VP).
    ///
    /// # Errors
    /// [`Error::Shape`] if the pixels are not of the tower's resolution, [`Error::Data`] if there is no image.
    pub fn encode(&self, pixels: &Tensor) -> Result<Tensor> {
        self.expect(pixels)?;
        match &self.tower {
            Tower::Vit(tower) if tower.is_engine_wanted(pixels) => {
                self.encode_prompted(pixels, &VisualPrompts::new())
            }
            Tower::Vit(tower) => tower.features(pixels, Wanted::ClassToken),
            Tower::ResNet(tower) => tower.features(pixels, resnet::Wanted::Pooled),
        }
    }

    /// Bytes that [`ImageTower::encode`] of so many images takes beside the weights: as many images at a time as there are
    /// threads.
    ///
    /// # Errors
    /// None that is known.
    pub fn forecast(&self, images: usize) -> Result<u64> {
        let room = match &self.tower {
            Tower::Vit(tower) => tower.room(),
            Tower::ResNet(tower) => tower.room(self.resolution),
        };
        let at_a_time = images.min(rayon::current_num_threads());
        Ok(4 * (at_a_time * room + images * self.embed_dim) as u64)
    }

    /// As [`ImageTower::encode`], showing every hidden state to `probe`.
    ///
    /// A ViT takes the batch as a whole, so the last bits may differ from those of [`ImageTower::encode`].
    ///
    /// Names are `conv1`, `ln_pre`, `block0`, ..., `ln_post` (ViT) and `stem`, `layer1`, ..., `layer4` (ResNet).
    ///
    /// # Errors
    /// As [`ImageTower::encode`], and those of `probe`.
    pub fn encode_probed(&self, pixels: &Tensor, probe: Probe<'_>) -> Result<Tensor> {
        self.expect(pixels)?;
        match &self.tower {
            Tower::Vit(tower) => tower.encode(pixels, probe),
            Tower::ResNet(tower) => tower.encode(pixels, probe),
        }
    }

    /// Raw features of every token, `(batch, 1 + h·w, embed_dim)`, the global feature first.
    ///
    /// ViT: every token through `ln_post` and the projection. ResNet: the attention pool with every token as a query.
    ///
    /// # Errors
    /// As [`ImageTower::encode`].
    pub fn encode_dense(&self, pixels: &Tensor) -> Result<Tensor> {
        self.expect(pixels)?;
        match &self.tower {
            Tower::Vit(tower) if tower.is_engine_wanted(pixels) => {
                self.encode_prompted_dense(pixels, &VisualPrompts::new())
            }
            Tower::Vit(tower) => tower.features(pixels, Wanted::EveryToken),
            Tower::ResNet(tower) => tower.features(
                pixels,
                resnet::Wanted::Every {
                    with_positions: true,
                },
            ),
        }
    }

    /// Raw features of every image's class token and the *value-path* features of chosen patches, from an image tower that
    /// sees only some of the patches.
    ///
    /// The value path replaces the last block's attention by each token's own value (MaskCLIP, Sec. 3.2), which keeps a
    /// patch's feature about that patch. `(batch, 3, side, side)` → `(batch + values, embed_dim)`: the images' features,
    /// then those of [`Glimpses::values`] in their order. The batch goes through the tower as a whole.
    ///
    /// # Errors
    /// As [`ImageTower::encode`]; [`Error::Data`] for a ResNet or glimpses that do not fit the images.
    pub fn encode_glimpses(&self, pixels: &Tensor, seen: &Glimpses) -> Result<Tensor> {
        self.expect(pixels)?;
        match &self.tower {
            Tower::Vit(tower) => tower.encode_glimpses(pixels, seen),
            Tower::ResNet(_) => Err(Error::Data("a ResNet has no patches to choose from".into())),
        }
    }

    /// As [`ImageTower::encode_dense`] for a ResNet at any resolution that 32 divides, with or without the pool's
    /// position table (TaI-DPT leaves it out); the table is resized to the grid.
    ///
    /// # Errors
    /// [`Error::Data`] for a ViT or another resolution.
    pub fn encode_dense_at_any_size(
        &self,
        pixels: &Tensor,
        with_positions: bool,
    ) -> Result<Tensor> {
        let (_, _, h, w) = pixels.dims4()?;
        match &self.tower {
            Tower::ResNet(tower) if h % 32 == 0 && w % 32 == 0 && h * w > 0 => {
                tower.features(pixels, resnet::Wanted::Every { with_positions })
            }
            Tower::ResNet(_) => Err(Error::Data(format!(
                "a ResNet takes sides that 32 divides, not {h}×{w}"
            ))),
            Tower::Vit(_) => Err(Error::Data("a ViT has no attention pool".into())),
        }
    }

    /// What a ResNet's attention pool reads, `(batch, channels, h/32, w/32)`.
    ///
    /// # Errors
    /// [`Error::Data`] for a ViT.
    pub fn last_stage(&self, pixels: &Tensor) -> Result<Tensor> {
        match &self.tower {
            Tower::ResNet(tower) => tower.last_stage(pixels),
            Tower::Vit(_) => Err(Error::Data("a ViT has no last stage".into())),
        }
    }
}

/// Which patches an image tower sees, and of which it gives features.
#[derive(Clone, Debug, Default)]
pub struct Glimpses {
    /// Patches that each image keeps, row by row of the grid from 0; equally many of every image.
    pub kept: Vec<Vec<usize>>,
    /// Whose value-path features are wanted: image, and place in that image's list of kept patches.
    pub values: Vec<(usize, usize)>,
}

impl Glimpses {
    /// Every one of `patches` patches of `batch` images, with the features of all.
    pub fn everything(batch: usize, patches: usize) -> Self {
        Self {
            kept: vec![(0..patches).collect(); batch],
            values: (0..batch)
                .flat_map(|i| (0..patches).map(move |p| (i, p)))
                .collect(),
        }
    }
}
