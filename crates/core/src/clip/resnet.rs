//! OpenAI's modified ResNet: a stem of three convolutions, anti-aliased strides, and an attention pool.

use candle_core::{IndexOp, Tensor};

use super::block::Weights;
use super::text::Probe;
use crate::kernels::{self, ConvSizes, Stored};
use crate::ops::{self, Linear};
use crate::{Arch, HEAD_WIDTH, Result};

/// A frozen convolution with its BatchNorm, which only scales and shifts.
#[derive(Debug)]
struct ConvBn {
    weight: Stored,
    scale: Vec<f32>,
    shift: Vec<f32>,
    channels: usize,
    filters: usize,
    kernel: usize,
}

impl ConvBn {
    const EPS: f32 = 1e-5;

    fn load(
        w: &mut Weights,
        conv: &str,
        bn: &str,
        channels: usize,
        filters: usize,
        kernel: usize,
    ) -> Result<Self> {
        let weight = w.stored(
            &format!("{conv}.weight"),
            &[filters, channels, kernel, kernel],
        )?;
        let mut part = |name: &str| w.values(&format!("{bn}.{name}"), &[filters]);
        let (gain, bias, mean, variance) = (
            part("weight")?,
            part("bias")?,
            part("running_mean")?,
            part("running_var")?,
        );
        let scale: Vec<f32> = gain
            .iter()
            .zip(&variance)
            .map(|(g, v)| g / (v + Self::EPS).sqrt())
            .collect();
        let shift = bias
            .iter()
            .zip(&mean)
            .zip(&scale)
            .map(|((b, m), s)| b - m * s)
            .collect();
        Ok(Self {
            weight,
            scale,
            shift,
            channels,
            filters,
            kernel,
        })
    }

    /// `(batch, channels, h, w)` → `(batch, filters, h', w')`.
    fn forward(&self, x: &Tensor, stride: usize, relu: bool) -> Result<Tensor> {
        let (batch, _, height, width) = x.dims4()?;
        let sizes = ConvSizes {
            channels: self.channels,
            side: (height, width),
            filters: self.filters,
            kernel: self.kernel,
            stride,
            padding: self.kernel / 2,
        };
        let (h, w) = sizes.out_side();
        ops::map(x, (batch, self.filters, h, w), |x, out| {
            kernels::conv(x, sizes, &self.weight, &self.scale, &self.shift, relu, out);
        })
    }
}

fn average_pool(x: &Tensor, factor: usize) -> Result<Tensor> {
    if factor == 1 {
        return Ok(x.clone());
    }
    let (batch, channels, h, w) = x.dims4()?;
    ops::map(x, (batch, channels, h / factor, w / factor), |x, out| {
        kernels::average_pool(x, (h, w), factor, out)
    })
}

#[derive(Debug)]
struct Bottleneck {
    convs: [ConvBn; 3],
    downsample: Option<ConvBn>,
    stride: usize,
}

impl Bottleneck {
    fn load(
        w: &mut Weights,
        prefix: &str,
        channels: usize,
        planes: usize,
        stride: usize,
    ) -> Result<Self> {
        let mut conv = |i: usize, channels, filters, kernel| {
            ConvBn::load(
                w,
                &format!("{prefix}.conv{i}"),
                &format!("{prefix}.bn{i}"),
                channels,
                filters,
                kernel,
            )
        };
        let convs = [
            conv(1, channels, planes, 1)?,
            conv(2, planes, planes, 3)?,
            conv(3, planes, 4 * planes, 1)?,
        ];
        let downsample = if stride > 1 || channels != 4 * planes {
            let (conv, bn) = (
                format!("{prefix}.downsample.0"),
                format!("{prefix}.downsample.1"),
            );
            Some(ConvBn::load(w, &conv, &bn, channels, 4 * planes, 1)?)
        } else {
            None
        };
        Ok(Self {
            convs,
            downsample,
            stride,
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let out = self.convs[0].forward(x, 1, true)?;
        let out = average_pool(&self.convs[1].forward(&out, 1, true)?, self.stride)?;
        let out = self.convs[2].forward(&out, 1, false)?;
        let shortcut = match &self.downsample {
            Some(conv) => conv.forward(&average_pool(x, self.stride)?, 1, false)?,
            None => x.clone(),
        };
        Ok((out + shortcut)?.relu()?)
    }
}

/// The pool at the end: multi-head attention whose queries are the tokens' mean and, for local features, the tokens.
#[derive(Debug)]
struct AttentionPool {
    /// `(1 + grid², channels)`.
    positions: Tensor,
    in_proj: Linear,
    c_proj: Linear,
    heads: usize,
    grid: usize,
}

impl AttentionPool {
    fn load(w: &mut Weights, arch: &Arch, channels: usize) -> Result<Self> {
        let grid = arch.image_resolution / 32;
        let (mut weight, mut bias) = (Vec::new(), Vec::new());
        for name in ["q_proj", "k_proj", "v_proj"] {
            weight.push(w.tensor(
                &format!("visual.attnpool.{name}.weight"),
                &[channels, channels],
            )?);
            bias.extend(w.values(&format!("visual.attnpool.{name}.bias"), &[channels])?);
        }
        let weight = w.keep(&Tensor::cat(&weight, 0)?)?;
        Ok(Self {
            positions: w.tensor(
                "visual.attnpool.positional_embedding",
                &[1 + grid * grid, channels],
            )?,
            in_proj: Linear::frozen(weight, Some(bias), (3 * channels, channels)),
            c_proj: w.linear("visual.attnpool.c_proj", (arch.embed_dim, channels))?,
            heads: channels / HEAD_WIDTH,
            grid,
        })
    }

    /// `(batch, channels, h, w)` → `(batch, 1 + h·w, embed_dim)`, the pooled feature first.
    fn forward(&self, x: &Tensor, with_positions: bool) -> Result<Tensor> {
        let (batch, channels, h, w) = x.dims4()?;
        let tokens = x
            .reshape((batch, channels, h * w))?
            .transpose(1, 2)?
            .contiguous()?;
        let mut tokens = Tensor::cat(&[&tokens.mean_keepdim(1)?, &tokens], 1)?;
        if with_positions {
            tokens = tokens.broadcast_add(&self.positions_for(h, w)?)?;
        }
        self.c_proj.forward(&ops::attention(
            &self.in_proj.forward(&tokens)?,
            self.heads,
            false,
        )?)
    }

    /// The position table for a grid of another size, as TaI-DPT and DualCoOp resize it.
    fn positions_for(&self, h: usize, w: usize) -> Result<Tensor> {
        if (h, w) == (self.grid, self.grid) {
            return Ok(self.positions.clone());
        }
        let channels = self.positions.dims()[1];
        let grid = self.positions.i(1..)?.flatten_all()?.to_vec1::<f32>()?;
        let resized = resize_grid(&grid, self.grid, channels, (h, w));
        let resized = Tensor::from_vec(resized, (h * w, channels), self.positions.device())?;
        Ok(Tensor::cat(&[&self.positions.i(..1)?, &resized], 0)?)
    }
}

/// Bicubic resize of a square grid of vectors as PyTorch does it when it is given the scale factor `(h + 0.1) / side`:
/// a = −0.75, no antialiasing, edges clamped, sampling at `(i + 0.5)·side/(h + 0.1) − 0.5`.
fn resize_grid(grid: &[f32], side: usize, channels: usize, (h, w): (usize, usize)) -> Vec<f32> {
    let taps = |size: usize| -> Vec<[(usize, f32); 4]> {
        let scale = side as f32 / (size as f32 + 0.1);
        let last = side as isize - 1;
        (0..size)
            .map(|i| {
                let x = (i as f32 + 0.5) * scale - 0.5;
                let (floor, t) = (x.floor() as isize, x - x.floor());
                let weights = cubic_weights(t);
                std::array::from_fn(|k| {
                    ((floor + k as isize - 1).clamp(0, last) as usize, weights[k])
                })
            })
            .collect()
    };
    let (rows, columns) = (taps(h), taps(w));
    let mut out = vec![0.0; h * w * channels];
    for (y, row) in rows.iter().enumerate() {
        for (x, column) in columns.iter().enumerate() {
            let cell = &mut out[(y * w + x) * channels..][..channels];
            for &(gy, wy) in row {
                for &(gx, wx) in column {
                    let from = &grid[(gy * side + gx) * channels..][..channels];
                    cell.iter_mut()
                        .zip(from)
                        .for_each(|(c, g)| *c += wy * wx * g);
                }
            }
        }
    }
    out
}

/// Weights of the four neighbours at distance `t` past the second, a = −0.75.
fn cubic_weights(t: f32) -> [f32; 4] {
    const A: f32 = -0.75;
    let near = |x: f32| ((A + 2.0) * x - (A + 3.0)) * x * x + 1.0;
    let far = |x: f32| ((A * x - 5.0 * A) * x + 8.0 * A) * x - 4.0 * A;
    [far(1.0 + t), near(t), near(1.0 - t), far(2.0 - t)]
}

#[derive(Debug)]
pub(crate) struct ResNet {
    stem: [ConvBn; 3],
    stages: Vec<Vec<Bottleneck>>,
    pool: AttentionPool,
}

impl ResNet {
    pub(crate) fn load(
        w: &mut Weights,
        arch: &Arch,
        layers: [usize; 4],
        width: usize,
    ) -> Result<Self> {
        let mut conv = |i: usize, channels, filters| {
            ConvBn::load(
                w,
                &format!("visual.conv{i}"),
                &format!("visual.bn{i}"),
                channels,
                filters,
                3,
            )
        };
        let stem = [
            conv(1, 3, width / 2)?,
            conv(2, width / 2, width / 2)?,
            conv(3, width / 2, width)?,
        ];
        let mut channels = width;
        let mut stages = Vec::with_capacity(4);
        for (stage, &blocks) in layers.iter().enumerate() {
            let planes = width << stage;
            let mut loaded = Vec::with_capacity(blocks);
            for block in 0..blocks {
                let stride = if stage > 0 && block == 0 { 2 } else { 1 };
                let prefix = format!("visual.layer{}.{block}", stage + 1);
                loaded.push(Bottleneck::load(w, &prefix, channels, planes, stride)?);
                channels = 4 * planes;
            }
            stages.push(loaded);
        }
        Ok(Self {
            stem,
            stages,
            pool: AttentionPool::load(w, arch, channels)?,
        })
    }

    /// What the attention pool reads: `(batch, 32·width, h/32, w/32)`.
    pub(crate) fn last_stage(&self, pixels: &Tensor, probe: Probe<'_>) -> Result<Tensor> {
        let mut x = self.stem[0].forward(pixels, 2, true)?;
        for conv in &self.stem[1..] {
            x = conv.forward(&x, 1, true)?;
        }
        x = average_pool(&x, 2)?;
        probe("stem", &x)?;
        for (i, stage) in self.stages.iter().enumerate() {
            for block in stage {
                x = block.forward(&x)?;
            }
            probe(&format!("layer{}", i + 1), &x)?;
        }
        Ok(x)
    }

    /// Pooled and local features, `(batch, 1 + h·w, embed_dim)`, the pooled one first.
    pub(crate) fn encode_dense(&self, pixels: &Tensor, with_positions: bool) -> Result<Tensor> {
        self.pool.forward(
            &self.last_stage(pixels, &mut |_, _| Ok(()))?,
            with_positions,
        )
    }

    /// The pooled feature, `(batch, embed_dim)`.
    pub(crate) fn encode(&self, pixels: &Tensor, probe: Probe<'_>) -> Result<Tensor> {
        Ok(self
            .pool
            .forward(&self.last_stage(pixels, probe)?, true)?
            .i((.., 0))?
            .contiguous()?)
    }

    pub(crate) fn bytes(&self) -> usize {
        let blocks = self
            .stages
            .iter()
            .flatten()
            .flat_map(|b| b.convs.iter().chain(&b.downsample));
        let convs = self.stem.iter().chain(blocks).map(|c| c.weight.bytes());
        convs.sum::<usize>() + self.pool.in_proj.bytes() + self.pool.c_proj.bytes()
    }
}
