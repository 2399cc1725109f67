//! The frozen ResNet's way back to the pixels.
//!
//! Of the way forward a bit for every activation says whether it was positive; with frozen weights nothing else is needed, but
//! for the attention pool's queries, keys and values.

use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{CpuStorage, CustomOp1, Layout, Shape, Tensor};

use super::resnet::{AttentionPool, Bottleneck, ResNet, Room, Wanted, Work};
use crate::engine::buffers::Buffers;
use crate::engine::image::attend::{Sizes, attend_backward};
use crate::kernels::{Conv, Finish, average_pool_backward, rows};
use crate::ops::{from_values, values, with_values};

/// Which activations of an image were positive, and what the attention pool read.
#[derive(Debug, Default)]
pub(super) struct Trace {
    /// Those of every convolution with a rectifier, in the order of the way forward, a bit each.
    positive: Vec<Vec<u32>>,
    /// `(1 + h·w, 3·channels)`.
    pub(super) qkv: Vec<f32>,
    /// `(asking, heads)`.
    pub(super) log_sums: Vec<f32>,
}

impl Trace {
    pub(super) fn see(&mut self, activations: &[f32]) {
        let word = |part: &[f32]| {
            let bits = part.iter().enumerate();
            bits.fold(0u32, |word, (i, x)| word | (u32::from(*x > 0.0) << i))
        };
        let words = activations.chunks(u32::BITS as usize).map(word);
        self.positive.push(words.collect());
    }
}

/// The tower with a gradient to the pixels, as one operation.
pub(super) struct Traced {
    tower: Arc<ResNet>,
    wanted: Wanted,
    /// By image.
    traces: Mutex<Arc<Vec<Trace>>>,
}

impl Traced {
    pub(super) fn new(tower: Arc<ResNet>, wanted: Wanted) -> Self {
        Self {
            tower,
            wanted,
            traces: Mutex::default(),
        }
    }
}

impl CustomOp1 for Traced {
    fn name(&self) -> &'static str {
        "resnet-image-tower"
    }

    fn cpu_fwd(
        &self,
        pixels: &CpuStorage,
        layout: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let (batch, _, h, w) = layout.shape().dims4()?;
        let tower = &self.tower;
        let pixels = values(pixels, layout)?;
        let (features, traces) = tower.features_of(pixels, (h, w), self.wanted, true);
        let mut kept = self.traces.lock().unwrap_or_else(PoisonError::into_inner);
        *kept = Arc::new(traces.into_iter().flatten().collect());
        let width = tower.pool.c_proj.out_width();
        let shape = match self.wanted {
            Wanted::Pooled => Shape::from((batch, width)),
            Wanted::Every { .. } => (batch, tower.rows((h, w), self.wanted), width).into(),
        };
        Ok((CpuStorage::F32(features), shape))
    }

    fn bwd(
        &self,
        pixels: &Tensor,
        _: &Tensor,
        d_features: &Tensor,
    ) -> candle_core::Result<Option<Tensor>> {
        // Not held while the pool runs: a waiting thread may come back here.
        let traces = self
            .traces
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        let (_, _, h, w) = pixels.dims4()?;
        let mut d = vec![0.0; pixels.elem_count()];
        with_values(d_features, |d_features| {
            let each = d_features.len() / traces.len().max(1);
            let d_features = d_features.chunks(each.max(1));
            let images = d.chunks_mut((3 * h * w).max(1));
            let tasks = traces.iter().zip(d_features).zip(images).collect();
            let buffers = Buffers::default();
            let scratch = self.tower.scratch(true);
            self.tower
                .each_image(tasks, (h, w), scratch, |((trace, d_out), d), room| {
                    self.tower
                        .image_backward(trace, (h, w), d_out, room, &buffers, d);
                });
        })?;
        from_values(d, pixels).map(Some)
    }
}

impl ResNet {
    /// From the gradient of an image's features, `(asking, embed_dim)`, to that of its pixels `(3, h, w)`.
    fn image_backward(
        &self,
        trace: &Trace,
        side: (usize, usize),
        d_features: &[f32],
        room: &mut Room<'_>,
        buffers: &Buffers,
        d_pixels: &mut [f32],
    ) {
        self.pool
            .backward(trace, self.grid(side), d_features, room, buffers);
        let stem = self.stem[0].sizes().out_side(side);
        let mut inside = (stem.0 / 2, stem.1 / 2);
        let mut blocks = Vec::new();
        for block in self.stages.iter().flatten() {
            blocks.push((block, inside));
            inside = (inside.0 / block.pool, inside.1 / block.pool);
        }
        let mut positive = trace.positive.iter().rev();
        for (block, side) in blocks.into_iter().rev() {
            block.backward(side, &mut positive, room);
        }
        average_pool_backward(room.x, stem, self.width, 2, room.other);
        std::mem::swap(&mut room.x, &mut room.other);
        let [first, others @ ..] = &self.stem;
        for conv in others.iter().rev() {
            let d = through_rectifier(conv, room.x, stem, &mut positive);
            room.work.back(conv, d, stem, room.other);
            std::mem::swap(&mut room.x, &mut room.other);
        }
        let d = through_rectifier(first, room.x, stem, &mut positive);
        first.scatter_gradient(d, side, room.other);
        let area = side.0 * side.1;
        for (i, pixel) in room.other.chunks_exact(3).take(area).enumerate() {
            for (channel, d) in pixel.iter().enumerate() {
                d_pixels[channel * area + i] = *d;
            }
        }
    }
}

impl Bottleneck {
    /// From the gradient of what the block gives, in `room.x`, to that of what it reads, whose height and width are `side`.
    fn backward<'t>(
        &self,
        side: (usize, usize),
        positive: &mut impl Iterator<Item = &'t Vec<u32>>,
        room: &mut Room<'_>,
    ) {
        let Room {
            x,
            other,
            inner: [a, b],
            work,
        } = room;
        let [first, second, third] = &self.convs;
        let out_side = (side.0 / self.pool, side.1 / self.pool);
        let floats = out_side.0 * out_side.1 * third.sizes().filters;
        mask(&mut x[..floats], positive.next());
        let d = &mut other[..floats];
        d.copy_from_slice(&x[..floats]);
        third.scale_gradient(d);
        work.back(third, d, out_side, a);
        if self.pool > 1 {
            average_pool_backward(a, side, second.sizes().filters, self.pool, b);
            std::mem::swap(a, b);
        }
        let d = through_rectifier(second, a, side, positive);
        work.back(second, d, side, b);
        let d = through_rectifier(first, b, side, positive);
        work.back(first, d, side, a);
        // What goes past the convolutions.
        if let Some(conv) = &self.downsample {
            let d = &mut x[..floats];
            conv.scale_gradient(d);
            work.back(conv, d, out_side, other);
            match self.pool > 1 {
                true => average_pool_backward(other, side, conv.sizes().channels, self.pool, x),
                false => std::mem::swap(x, other),
            }
        }
        let floats = side.0 * side.1 * first.sizes().channels;
        rows::add_into(&mut x[..floats], &a[..floats]);
    }
}

impl AttentionPool {
    /// From the gradient of the features to that of what the pool reads, in `room.x`.
    fn backward(
        &self,
        trace: &Trace,
        (h, w): (usize, usize),
        d_features: &[f32],
        room: &mut Room<'_>,
        buffers: &Buffers,
    ) {
        let (channels, threads) = (self.channels, room.work.threads);
        let sizes = Sizes {
            width: channels,
            asking: d_features.len() / self.c_proj.out_width(),
            keys: 1 + h * w,
            from: 0,
        };
        let [d_mixed, d_qkv] = &mut room.inner;
        self.c_proj
            .backward(d_features, sizes.asking, d_mixed, threads);
        let (qkv, log_sums) = (&trace.qkv, &trace.log_sums);
        attend_backward(qkv, log_sums, d_mixed, sizes, threads, buffers, d_qkv);
        let d_tokens = &mut room.other[..sizes.keys * channels];
        self.in_proj.backward(d_qkv, sizes.keys, d_tokens, threads);
        let (d_mean, d_others) = d_tokens.split_at_mut(channels);
        d_mean.iter_mut().for_each(|d| *d /= (h * w) as f32);
        for (d, d_other) in room
            .x
            .chunks_exact_mut(channels)
            .zip(d_others.chunks_exact(channels))
        {
            d.copy_from_slice(d_other);
            rows::add_into(d, d_mean);
        }
    }
}

impl Work<'_> {
    /// The gradient of a convolution's input from that of its sums; the stride is 1.
    fn back(&mut self, conv: &Conv, d: &[f32], side: (usize, usize), out: &mut [f32]) {
        self.conv(conv.turned(), d, side, Finish::Linear, out);
    }
}

/// From the gradient of what the rectifier behind `conv` gives to that of the convolution's sums.
fn through_rectifier<'d, 't>(
    conv: &Conv,
    d: &'d mut [f32],
    side: (usize, usize),
    positive: &mut impl Iterator<Item = &'t Vec<u32>>,
) -> &'d [f32] {
    let d = &mut d[..side.0 * side.1 * conv.sizes().filters];
    mask(d, positive.next());
    conv.scale_gradient(d);
    d
}

/// Zero where an activation was not positive.
fn mask(d: &mut [f32], positive: Option<&Vec<u32>>) {
    let words = positive.map_or(&[][..], Vec::as_slice);
    for (d, word) in d.chunks_mut(u32::BITS as usize).zip(words) {
        for (i, d) in d.iter_mut().enumerate() {
            *d = if word >> i & 1 == 1 { *d } else { 0.0 };
        }
    }
}
