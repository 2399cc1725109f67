//! OpenAI's modified ResNet: a stem of three convolutions, anti-aliased strides, and an attention pool.

use std::sync::Arc;

use candle_core::Tensor;
use rayon::prelude::*;

use super::block::Weights;
use super::resnet_back::{Trace, Traced};
use super::text::Probe;
use crate::engine::buffers::{Buffers, Cut};
use crate::engine::image::attend::attend;
use crate::kernels::{Conv, ConvSizes, Finish, average_pool, rows};
use crate::ops::{FrozenLinear, Threads, with_values};
use crate::{Arch, Error, HEAD_WIDTH, Result};

/// A convolution and the BatchNorm behind it.
fn conv_bn(
    w: &mut Weights,
    conv: &str,
    bn: &str,
    (channels, filters): (usize, usize),
    kernel: usize,
    stride: usize,
) -> Result<Conv> {
    const EPS: f32 = 1e-5;
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
        .map(|(g, v)| g / (v + EPS).sqrt())
        .collect();
    let shift = bias
        .iter()
        .zip(&mean)
        .zip(&scale)
        .map(|((b, m), s)| b - m * s)
        .collect();
    let sizes = ConvSizes {
        channels,
        filters,
        kernel,
        stride,
    };
    Ok(Conv::new(sizes, &weight, scale, shift))
}

#[derive(Debug)]
pub(super) struct Bottleneck {
    pub(super) convs: [Conv; 3],
    pub(super) downsample: Option<Conv>,
    /// Side of the squares that are averaged.
    pub(super) pool: usize,
}

impl Bottleneck {
    fn load(
        w: &mut Weights,
        prefix: &str,
        channels: usize,
        planes: usize,
        pool: usize,
    ) -> Result<Self> {
        let mut conv = |i: usize, sizes, kernel| {
            let (conv, bn) = (format!("{prefix}.conv{i}"), format!("{prefix}.bn{i}"));
            conv_bn(w, &conv, &bn, sizes, kernel, 1)
        };
        let convs = [
            conv(1, (channels, planes), 1)?,
            conv(2, (planes, planes), 3)?,
            conv(3, (planes, 4 * planes), 1)?,
        ];
        let downsample = if pool > 1 || channels != 4 * planes {
            let (conv, bn) = (
                format!("{prefix}.downsample.0"),
                format!("{prefix}.downsample.1"),
            );
            Some(conv_bn(w, &conv, &bn, (channels, 4 * planes), 1, 1)?)
        } else {
            None
        };
        Ok(Self {
            convs,
            downsample,
            pool,
        })
    }

    /// Replaces `room.x (height, width, channels)`, and gives the new height and width.
    fn apply(&self, side: (usize, usize), room: &mut Room<'_>) -> (usize, usize) {
        let Room {
            x,
            other,
            inner: [a, b],
            work,
        } = room;
        let [first, second, third] = &self.convs;
        work.conv(first, x, side, Finish::Relu, a);
        work.conv(second, a, side, Finish::Relu, b);
        let mut out_side = side;
        if self.pool > 1 {
            out_side = average_pool(b, side, second.sizes().filters, self.pool, a);
            std::mem::swap(a, b);
        }
        if let Some(conv) = &self.downsample {
            if self.pool > 1 {
                average_pool(x, side, conv.sizes().channels, self.pool, a);
                std::mem::swap(a, x);
            }
            work.conv(conv, x, out_side, Finish::Linear, other);
            std::mem::swap(x, other);
        }
        work.conv(third, b, out_side, Finish::AddRelu, x);
        out_side
    }
}

/// What one image needs on its way, cut from one buffer.
pub(super) struct Room<'a> {
    /// The current activation, `(height, width, channels)`.
    pub(super) x: &'a mut [f32],
    /// What becomes the next.
    pub(super) other: &'a mut [f32],
    /// Activations inside a block.
    pub(super) inner: [&'a mut [f32]; 2],
    pub(super) work: Work<'a>,
}

/// How convolutions are computed.
pub(super) struct Work<'a> {
    scratch: &'a mut [f32],
    pub(super) threads: Threads,
    /// What is kept for a way back, if there is one.
    pub(super) trace: Option<Trace>,
}

impl Work<'_> {
    pub(super) fn conv(
        &mut self,
        conv: &Conv,
        x: &[f32],
        side: (usize, usize),
        finish: Finish,
        out: &mut [f32],
    ) -> (usize, usize) {
        let side = match self.threads {
            Threads::One => conv.apply(x, side, finish, self.scratch, out),
            Threads::All => conv.apply_parallel(x, side, finish, out),
        };
        if let (Some(trace), true) = (&mut self.trace, finish != Finish::Linear) {
            trace.see(&out[..side.0 * side.1 * conv.sizes().filters]);
        }
        side
    }
}

/// The pool at the end: multi-head attention whose queries are the tokens' mean and, for local features, the tokens.
#[derive(Debug)]
pub(super) struct AttentionPool {
    /// `(1 + grid², channels)`.
    positions: Vec<f32>,
    pub(super) in_proj: FrozenLinear,
    pub(super) c_proj: FrozenLinear,
    pub(super) channels: usize,
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
        let in_proj = w.keep(&Tensor::cat(&weight, 0)?)?;
        let name = "visual.attnpool.c_proj";
        let c_proj = w.stored(&format!("{name}.weight"), &[arch.embed_dim, channels])?;
        let c_bias = w.values(&format!("{name}.bias"), &[arch.embed_dim])?;
        Ok(Self {
            positions: w.values(
                "visual.attnpool.positional_embedding",
                &[1 + grid * grid, channels],
            )?,
            in_proj: FrozenLinear::new(in_proj, Some(bias), (3 * channels, channels)),
            c_proj: FrozenLinear::new(c_proj, Some(c_bias), (arch.embed_dim, channels)),
            channels,
            grid,
        })
    }

    /// `room.x (height, width, channels)` → as many features as `out` has room for, the pooled one first, then the pixels'.
    fn apply(
        &self,
        (h, w): (usize, usize),
        positions: Option<&[f32]>,
        room: &mut Room<'_>,
        out: &mut [f32],
    ) {
        let (channels, threads) = (self.channels, room.work.threads);
        let (rows, asking) = (1 + h * w, out.len() / self.c_proj.out_width());
        let pixels = &room.x[..h * w * channels];
        let tokens = &mut room.other[..rows * channels];
        let (mean, others) = tokens.split_at_mut(channels);
        others.copy_from_slice(pixels);
        mean.fill(0.0);
        for pixel in pixels.chunks_exact(channels) {
            rows::add_into(mean, pixel);
        }
        mean.iter_mut().for_each(|x| *x /= (h * w) as f32);
        if let Some(positions) = positions {
            rows::add_into(tokens, positions);
        }
        let [qkv, mixed] = &mut room.inner;
        self.in_proj.apply(tokens, asking, qkv, threads);
        if asking < rows {
            self.in_proj.apply_keys(tokens, rows, qkv);
        }
        let mixed = &mut mixed[..asking * channels];
        let log_sums = match &mut room.work.trace {
            Some(trace) => {
                trace.qkv = qkv[..rows * 3 * channels].to_vec();
                trace.log_sums = vec![0.0; asking * channels / HEAD_WIDTH];
                &mut trace.log_sums[..]
            }
            None => &mut [],
        };
        attend(qkv, (rows, channels), threads, room.x, log_sums, mixed);
        self.c_proj.apply(mixed, asking, out, threads);
    }

    /// The position table `(1 + h·w, channels)`, for a grid of another size resized as TaI-DPT and DualCoOp do it.
    fn positions_for(&self, (h, w): (usize, usize)) -> Vec<f32> {
        if (h, w) == (self.grid, self.grid) {
            return self.positions.clone();
        }
        let (class, grid) = self.positions.split_at(self.channels);
        let resized = resize_grid(grid, self.grid, self.channels, (h, w));
        [class, &resized].concat()
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
    pub(super) stem: [Conv; 3],
    pub(super) stages: Vec<Vec<Bottleneck>>,
    pub(super) pool: AttentionPool,
    /// Channels after the stem.
    pub(super) width: usize,
    embed_dim: usize,
}

/// Which features are wanted.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Wanted {
    /// The pooled one.
    Pooled,
    /// The pooled one and every pixel's.
    Every {
        /// Whether the pool adds its position table.
        with_positions: bool,
    },
}

impl ResNet {
    pub(crate) fn load(
        w: &mut Weights,
        arch: &Arch,
        layers: [usize; 4],
        width: usize,
    ) -> Result<Self> {
        let mut conv = |i: usize, sizes, stride| {
            let (conv, bn) = (format!("visual.conv{i}"), format!("visual.bn{i}"));
            conv_bn(w, &conv, &bn, sizes, 3, stride)
        };
        let stem = [
            conv(1, (3, width / 2), 2)?,
            conv(2, (width / 2, width / 2), 1)?,
            conv(3, (width / 2, width), 1)?,
        ];
        let mut channels = width;
        let mut stages = Vec::with_capacity(4);
        for (stage, &blocks) in layers.iter().enumerate() {
            let planes = width << stage;
            let mut loaded = Vec::with_capacity(blocks);
            for block in 0..blocks {
                let pool = if stage > 0 && block == 0 { 2 } else { 1 };
                let prefix = format!("visual.layer{}.{block}", stage + 1);
                loaded.push(Bottleneck::load(w, &prefix, channels, planes, pool)?);
                channels = 4 * planes;
            }
            stages.push(loaded);
        }
        Ok(Self {
            stem,
            stages,
            pool: AttentionPool::load(w, arch, channels)?,
            width,
            embed_dim: arch.embed_dim,
        })
    }

    fn convs(&self) -> impl Iterator<Item = &Conv> {
        let blocks = self.stages.iter().flatten();
        let blocks = blocks.flat_map(|b| b.convs.iter().chain(&b.downsample));
        self.stem.iter().chain(blocks)
    }

    /// Height and width after the stem's pool and after every stage.
    fn sides(&self, side: (usize, usize)) -> Vec<(usize, usize)> {
        let (h, w) = self.stem[0].sizes().out_side(side);
        let stages = self.stages.len() as u32;
        // The first stage keeps the stem's.
        let halvings = std::iter::once(1).chain(1..=stages);
        halvings.map(|n| (h >> n, w >> n)).collect()
    }

    /// Features of every image by itself, `(batch, embed_dim)` or `(batch, 1 + h·w, embed_dim)`, the pooled one first.
    pub(crate) fn features(self: &Arc<Self>, pixels: &Tensor, wanted: Wanted) -> Result<Tensor> {
        expect_channels(pixels)?;
        if pixels.track_op() {
            return Ok(pixels
                .contiguous()?
                .apply_op1(Traced::new(self.clone(), wanted))?);
        }
        let (batch, _, h, w) = pixels.dims4()?;
        let (features, _) = with_values(pixels, |pixels| {
            self.features_of(pixels, (h, w), wanted, false)
        })?;
        let mut shape = vec![batch, self.embed_dim];
        if let Wanted::Every { .. } = wanted {
            shape.insert(1, self.rows((h, w), wanted));
        }
        Ok(Tensor::from_vec(features, shape, pixels.device())?)
    }

    /// Features of an image.
    pub(super) fn rows(&self, side: (usize, usize), wanted: Wanted) -> usize {
        let (h, w) = self.grid(side);
        match wanted {
            Wanted::Pooled => 1,
            Wanted::Every { .. } => 1 + h * w,
        }
    }

    /// Height and width of what the attention pool reads.
    pub(super) fn grid(&self, side: (usize, usize)) -> (usize, usize) {
        self.sides(side).last().copied().unwrap_or((0, 0))
    }

    /// As [`ResNet::features`] on slices, with traces for a way back if they are wanted.
    pub(super) fn features_of(
        &self,
        pixels: &[f32],
        side: (usize, usize),
        wanted: Wanted,
        traced: bool,
    ) -> (Vec<f32>, Vec<Option<Trace>>) {
        let grid = self.grid(side);
        let positions = match wanted {
            Wanted::Every {
                with_positions: false,
            } => None,
            _ => Some(self.pool.positions_for(grid)),
        };
        let floats = self.rows(side, wanted) * self.embed_dim;
        let mut features = vec![0.0; pixels.len() / (3 * side.0 * side.1).max(1) * floats];
        let images = pixels.chunks((3 * side.0 * side.1).max(1));
        let tasks = images.zip(features.chunks_mut(floats.max(1))).collect();
        let scratch = self.scratch(false);
        let traces = self.each_image(tasks, side, scratch, |(image, out), room| {
            room.work.trace = traced.then(Trace::default);
            self.walk(image, side, room, &mut |_, _| {});
            self.pool.apply(grid, positions.as_deref(), room, out);
            room.work.trace.take()
        });
        (features, traces)
    }

    /// The pooled feature, `(batch, embed_dim)`, with a look at the hidden states.
    pub(crate) fn encode(self: &Arc<Self>, pixels: &Tensor, probe: Probe<'_>) -> Result<Tensor> {
        for i in 0..=self.stages.len() {
            let name = match i {
                0 => "stem".to_owned(),
                stage => format!("layer{stage}"),
            };
            probe(&name, &self.state(pixels, i)?)?;
        }
        self.features(pixels, Wanted::Pooled)
    }

    /// What the attention pool reads: `(batch, 32·width, h/32, w/32)`.
    pub(crate) fn last_stage(&self, pixels: &Tensor) -> Result<Tensor> {
        self.state(pixels, self.stages.len())
    }

    /// What stage `stage`, counted from 1, gives, or for 0 the stem: `(batch, channels, h, w)`.
    fn state(&self, pixels: &Tensor, stage: usize) -> Result<Tensor> {
        let (batch, _, h, w) = pixels.dims4()?;
        let (oh, ow) = self.sides((h, w))[stage];
        let channels = match stage {
            0 => self.width,
            _ => (2 * self.width) << stage,
        };
        expect_channels(pixels)?;
        if pixels.track_op() {
            let message =
                "the hidden states of a ResNet image tower have no gradient, only its features";
            return Err(Error::Data(message.into()));
        }
        let floats = oh * ow * channels;
        let mut values = vec![0.0; batch * floats];
        with_values(pixels, |pixels| {
            let images = pixels.chunks((3 * h * w).max(1));
            let tasks = images.zip(values.chunks_mut(floats.max(1))).collect();
            self.each_image(tasks, (h, w), self.scratch(false), |(image, out), room| {
                self.walk(image, (h, w), room, &mut |i, x| {
                    if i == stage {
                        out.copy_from_slice(&x[..out.len()]);
                    }
                });
            });
        })?;
        let state = Tensor::from_vec(values, (batch, oh, ow, channels), pixels.device())?;
        Ok(state.permute((0, 3, 1, 2))?.contiguous()?)
    }

    /// Runs `f(task, room)` for every image's task, with `scratch` floats for convolutions.
    pub(super) fn each_image<I: Send, T: Send>(
        &self,
        tasks: Vec<I>,
        side: (usize, usize),
        scratch: usize,
        f: impl Fn(I, &mut Room<'_>) -> T + Sync,
    ) -> Vec<T> {
        let threads = Threads::for_tasks(tasks.len());
        let scratch = match threads {
            Threads::One => scratch,
            Threads::All => 0,
        };
        let activation = self.activation(side);
        let buffers = Buffers::default();
        tasks
            .into_par_iter()
            .with_max_len(1)
            .map(|task| {
                let mut buffer = buffers.take(4 * activation + scratch);
                let mut cut = Cut::new(&mut buffer);
                let mut room = Room {
                    x: cut.take(activation),
                    other: cut.take(activation),
                    inner: [cut.take(activation), cut.take(activation)],
                    work: Work {
                        scratch: cut.take(scratch),
                        threads,
                        trace: None,
                    },
                };
                let result = f(task, &mut room);
                buffers.give(buffer);
                result
            })
            .collect()
    }

    /// `image (3, h, w)` through stem and stages, to `room.x`; `see(i, x)` after the stem (0) and every stage.
    fn walk(
        &self,
        image: &[f32],
        side: (usize, usize),
        room: &mut Room<'_>,
        see: &mut dyn FnMut(usize, &[f32]),
    ) {
        let area = side.0 * side.1;
        for (i, pixel) in room.x.chunks_exact_mut(3).take(area).enumerate() {
            pixel.copy_from_slice(&[image[i], image[area + i], image[2 * area + i]]);
        }
        let mut side = side;
        for conv in &self.stem {
            side = room.work.conv(conv, room.x, side, Finish::Relu, room.other);
            std::mem::swap(&mut room.x, &mut room.other);
        }
        side = average_pool(room.x, side, self.width, 2, room.other);
        std::mem::swap(&mut room.x, &mut room.other);
        see(0, room.x);
        for (i, stage) in self.stages.iter().enumerate() {
            for block in stage {
                side = block.apply(side, room);
            }
            see(i + 1, room.x);
        }
    }

    /// Floats of the largest activation.
    fn activation(&self, (h, w): (usize, usize)) -> usize {
        let (oh, ow) = self.stem[0].sizes().out_side((h, w));
        // After the stem nothing is larger than what its last convolution gives.
        (3 * h * w).max(oh * ow * self.width)
    }

    /// Floats in which a convolution is computed, or its way `back`.
    pub(super) fn scratch(&self, back: bool) -> usize {
        let sizes = self.convs().map(Conv::sizes);
        let scratch = sizes.map(|s| match back {
            true => s.turned().scratch(),
            false => s.scratch(),
        });
        scratch.max().unwrap_or(0)
    }

    /// Floats in which one of many images is computed.
    pub(crate) fn room(&self, side: usize) -> usize {
        4 * self.activation((side, side)) + self.scratch(false)
    }

    pub(crate) fn bytes(&self) -> usize {
        let convs: usize = self.convs().map(Conv::bytes).sum();
        convs + self.pool.in_proj.bytes() + self.pool.c_proj.bytes()
    }
}

fn expect_channels(pixels: &Tensor) -> Result<()> {
    let (batch, channels, h, w) = pixels.dims4()?;
    if channels == 3 {
        return Ok(());
    }
    Err(Error::Shape {
        what: "batch of images".into(),
        found: pixels.dims().to_vec(),
        expected: vec![batch, 3, h, w],
    })
}
