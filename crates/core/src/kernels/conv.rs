//! Convolution and pooling of the ResNet tower, on images whose channels lie side by side: `(height, width, channels)`.

use std::ops::Range;
use std::sync::OnceLock;

use rayon::prelude::*;

use super::rows::vectorised;
use super::{Onto, Packed, Stored};

/// Output pixels that are computed at a time: their patches stay in the second-level cache.
const PIXELS: usize = 96;

/// A convolution's sizes; padding keeps the side if the stride is 1.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ConvSizes {
    /// Channels of the input.
    pub(crate) channels: usize,
    /// Channels of the output.
    pub(crate) filters: usize,
    /// Side of the kernel, odd.
    pub(crate) kernel: usize,
    /// Step between outputs.
    pub(crate) stride: usize,
}

impl ConvSizes {
    /// Zeros around the input.
    fn padding(&self) -> usize {
        self.kernel / 2
    }

    /// Pixels of a patch, times channels.
    fn patch(&self) -> usize {
        self.kernel * self.kernel * self.channels
    }

    /// Sizes of [`Conv::turned`].
    pub(crate) fn turned(&self) -> Self {
        Self {
            channels: self.filters,
            filters: self.channels,
            ..*self
        }
    }

    /// Floats that [`Conv::apply`] needs beside input and output.
    pub(crate) fn scratch(&self) -> usize {
        PIXELS * (self.patch() + self.filters)
    }

    /// Height and width of the output.
    pub(crate) fn out_side(&self, (h, w): (usize, usize)) -> (usize, usize) {
        let out = |n: usize| (n + 2 * self.padding() - self.kernel) / self.stride + 1;
        (out(h), out(w))
    }

    /// The patches below the output pixels `range`, a row each, in the order of the kernel: row, column, channel.
    fn patches(&self, x: &[f32], (h, w): (usize, usize), range: Range<usize>, rows: &mut [f32]) {
        let out_width = self.out_side((h, w)).1;
        let (line, channels) = (self.kernel * self.channels, self.channels);
        for (pixel, row) in range.zip(rows.chunks_exact_mut(self.patch())) {
            let (top, left) = (
                pixel / out_width * self.stride,
                pixel % out_width * self.stride,
            );
            for (ky, row) in row.chunks_exact_mut(line).enumerate() {
                let y = (top + ky).wrapping_sub(self.padding());
                if y >= h {
                    row.fill(0.0);
                    continue;
                }
                let from = &x[y * w * channels..][..w * channels];
                if left >= self.padding() && left - self.padding() + self.kernel <= w {
                    row.copy_from_slice(&from[(left - self.padding()) * channels..][..line]);
                    continue;
                }
                for (kx, cell) in row.chunks_exact_mut(channels).enumerate() {
                    let x = (left + kx).wrapping_sub(self.padding());
                    match x < w {
                        true => cell.copy_from_slice(&from[x * channels..][..channels]),
                        false => cell.fill(0.0),
                    }
                }
            }
        }
    }
}

/// What becomes of a convolution's result `y`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Finish {
    /// `out = y`.
    Linear,
    /// `out = max(y, 0)`.
    Relu,
    /// `out = max(out + y, 0)`.
    AddRelu,
}

/// A frozen convolution with its BatchNorm, which only scales and shifts each filter.
#[derive(Debug)]
pub(crate) struct Conv {
    sizes: ConvSizes,
    /// `(kernel²·channels, filters)`.
    weight: Packed,
    scale: Vec<f32>,
    shift: Vec<f32>,
    /// What takes gradients back, from the first one on.
    turned: OnceLock<Box<Self>>,
}

impl Conv {
    /// `weight` is `(filters, channels, kernel, kernel)`.
    pub(crate) fn new(sizes: ConvSizes, weight: &Stored, scale: Vec<f32>, shift: Vec<f32>) -> Self {
        let (channels, area) = (sizes.channels, sizes.kernel * sizes.kernel);
        let weight = Packed::new((sizes.patch(), sizes.filters), |row, filter| {
            weight.get((filter * channels + row % channels) * area + row / channels)
        });
        Self {
            sizes,
            weight,
            scale,
            shift,
            turned: OnceLock::new(),
        }
    }

    /// The convolution that turns the gradient of this one's sums, before BatchNorm, into that of its input, if the stride is 1:
    /// the kernel is turned around, and filters and channels change places.
    pub(crate) fn turned(&self) -> &Self {
        if let Some(turned) = self.turned.get() {
            return turned;
        }
        let sizes = self.sizes.turned();
        let (filters, channels) = (self.sizes.filters, self.sizes.channels);
        let last = self.sizes.kernel * self.sizes.kernel - 1;
        let weight = Packed::new((sizes.patch(), channels), |row, channel| {
            let tap = last - row / filters;
            self.weight.get(tap * channels + channel, row % filters)
        });
        let turned = Self {
            sizes,
            weight,
            scale: vec![1.0; channels],
            shift: vec![0.0; channels],
            turned: OnceLock::new(),
        };
        // Not inside `get_or_init`: laying out runs on the pool, and a thread that waits there may come back here.
        self.turned.get_or_init(|| Box::new(turned))
    }

    /// From the gradient of BatchNorm's output to that of its input, in place.
    pub(crate) fn scale_gradient(&self, d: &mut [f32]) {
        vectorised(
            #[inline(always)]
            || {
                for d in d.chunks_exact_mut(self.sizes.filters) {
                    d.iter_mut().zip(&self.scale).for_each(|(d, s)| *d *= s);
                }
            },
        );
    }

    /// The gradient of the input `(height, width, channels)` from that of the sums before BatchNorm, whatever the stride, a
    /// patch at a time: for the first convolution, whose few channels make patches small.
    pub(crate) fn scatter_gradient(&self, d: &[f32], (h, w): (usize, usize), out: &mut [f32]) {
        let s = &self.sizes;
        let (out_width, patch) = (s.out_side((h, w)).1, s.patch());
        let out = &mut out[..h * w * s.channels];
        out.fill(0.0);
        let turned = self.weight.transposed();
        let mut rows = vec![0.0; PIXELS * patch];
        for (i, d) in d.chunks(PIXELS * s.filters).enumerate() {
            let m = d.len() / s.filters;
            turned.multiply(d, m, Onto::Bias(None), &mut rows);
            for (pixel, row) in rows.chunks_exact(patch).take(m).enumerate() {
                let pixel = i * PIXELS + pixel;
                let (top, left) = (pixel / out_width * s.stride, pixel % out_width * s.stride);
                for (tap, row) in row.chunks_exact(s.channels).enumerate() {
                    let y = (top + tap / s.kernel).wrapping_sub(s.padding());
                    let x = (left + tap % s.kernel).wrapping_sub(s.padding());
                    if y < h && x < w {
                        let cell = &mut out[(y * w + x) * s.channels..][..s.channels];
                        cell.iter_mut().zip(row).for_each(|(cell, d)| *cell += d);
                    }
                }
            }
        }
    }

    pub(crate) fn sizes(&self) -> ConvSizes {
        self.sizes
    }

    pub(crate) fn bytes(&self) -> usize {
        self.weight.bytes() + 4 * (self.scale.len() + self.shift.len())
    }

    /// See [`ConvSizes::scratch`].
    pub(crate) fn scratch(&self) -> usize {
        self.sizes.scratch()
    }

    /// `x (height, width, channels)` → `out (height', width', filters)`, and the latter's height and width.
    pub(crate) fn apply(
        &self,
        x: &[f32],
        side: (usize, usize),
        finish: Finish,
        scratch: &mut [f32],
        out: &mut [f32],
    ) -> (usize, usize) {
        let (h, w) = self.sizes.out_side(side);
        let blocks = out[..h * w * self.sizes.filters].chunks_mut(PIXELS * self.sizes.filters);
        for (i, out) in blocks.enumerate() {
            self.block(x, side, i * PIXELS, finish, scratch, out);
        }
        (h, w)
    }

    /// As [`Conv::apply`] on all threads, with scratch memory of each block's own; the same bits.
    pub(crate) fn apply_parallel(
        &self,
        x: &[f32],
        side: (usize, usize),
        finish: Finish,
        out: &mut [f32],
    ) -> (usize, usize) {
        /// Pixels of a task: a quarter, so that small images have enough of them.
        const FEW: usize = PIXELS / 4;
        let (h, w) = self.sizes.out_side(side);
        out[..h * w * self.sizes.filters]
            .par_chunks_mut(FEW * self.sizes.filters)
            .enumerate()
            .for_each_init(
                || vec![0.0; self.scratch() / 4],
                |scratch, (i, out)| self.block(x, side, i * FEW, finish, scratch, out),
            );
        (h, w)
    }

    /// The output pixels from `first` on that `out` has room for.
    fn block(
        &self,
        x: &[f32],
        side: (usize, usize),
        first: usize,
        finish: Finish,
        scratch: &mut [f32],
        out: &mut [f32],
    ) {
        let (s, filters) = (&self.sizes, self.sizes.filters);
        let m = out.len() / filters;
        let (rows, y) = scratch.split_at_mut(m * s.patch());
        let rows = if s.kernel == 1 && s.stride == 1 {
            &x[first * s.channels..][..m * s.channels]
        } else {
            s.patches(x, side, first..first + m, rows);
            rows
        };
        let y = &mut y[..m * filters];
        self.weight.multiply(rows, m, Onto::Bias(None), y);
        vectorised(
            #[inline(always)]
            || {
                for (out, y) in out.chunks_exact_mut(filters).zip(y.chunks_exact(filters)) {
                    self.finish(finish, y, out);
                }
            },
        );
    }

    /// BatchNorm and what follows of one pixel.
    #[inline(always)]
    fn finish(&self, finish: Finish, y: &[f32], out: &mut [f32]) {
        let affine = self.scale.iter().zip(&self.shift);
        for ((out, y), (scale, shift)) in out.iter_mut().zip(y).zip(affine) {
            let y = y * scale + shift;
            *out = match finish {
                Finish::Linear => y,
                Finish::Relu => relu(y),
                Finish::AddRelu => relu(*out + y),
            };
        }
    }
}

/// What is not a number stays so.
#[inline(always)]
fn relu(x: f32) -> f32 {
    if x < 0.0 { 0.0 } else { x }
}

/// Mean over squares of `factor` pixels, stepping by the same; gives the new height and width.
pub(crate) fn average_pool(
    x: &[f32],
    (h, w): (usize, usize),
    channels: usize,
    factor: usize,
    out: &mut [f32],
) -> (usize, usize) {
    let (oh, ow) = (h / factor, w / factor);
    let norm = 1.0 / (factor * factor) as f32;
    for (i, out) in out.chunks_exact_mut(channels).take(oh * ow).enumerate() {
        let (top, left) = (i / ow * factor, i % ow * factor);
        out.fill(0.0);
        for pixel in (0..factor * factor).map(|i| (top + i / factor) * w + left + i % factor) {
            let x = &x[pixel * channels..][..channels];
            out.iter_mut().zip(x).for_each(|(out, x)| *out += x);
        }
        out.iter_mut().for_each(|out| *out *= norm);
    }
    (oh, ow)
}

/// The gradient of [`average_pool`]'s input, whose height and width are `side`.
pub(crate) fn average_pool_backward(
    d: &[f32],
    (h, w): (usize, usize),
    channels: usize,
    factor: usize,
    out: &mut [f32],
) {
    let (oh, ow) = (h / factor, w / factor);
    let norm = 1.0 / (factor * factor) as f32;
    for (i, out) in out.chunks_exact_mut(channels).take(h * w).enumerate() {
        let (y, x) = (i / w / factor, i % w / factor);
        if y >= oh || x >= ow {
            // Rows and columns that fill no square are read by none.
            out.fill(0.0);
            continue;
        }
        let d = &d[(y * ow + x) * channels..][..channels];
        out.iter_mut().zip(d).for_each(|(out, d)| *out = norm * d);
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::numbers;
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]

        #[test]
        fn convolution_equals_the_plain_sum(
            channels in 1usize..4, h in 3usize..15, w in 3usize..15, filters in 1usize..40,
            kernel in prop::sample::select(vec![1usize, 3]), stride in 1usize..3, seed in any::<u64>(),
            finish in prop::sample::select(vec![Finish::Linear, Finish::Relu, Finish::AddRelu]),
        ) {
            let s = ConvSizes { channels, filters, kernel, stride };
            let (oh, ow) = s.out_side((h, w));
            let x = numbers(channels * h * w, seed);
            let weight = numbers(filters * channels * kernel * kernel, seed ^ 1);
            let (scale, shift) = (numbers(filters, seed ^ 2), numbers(filters, seed ^ 3));
            let before = numbers(filters * oh * ow, seed ^ 4);
            let conv = Conv::new(s, &Stored::F32(weight.clone()), scale.clone(), shift.clone());
            let mut out = before.clone();
            let mut scratch = vec![f32::NAN; conv.scratch()];
            prop_assert_eq!(conv.apply(&x, (h, w), finish, &mut scratch, &mut out), (oh, ow));
            for (i, &y) in out.iter().enumerate() {
                let (oy, ox, f) = (i / filters / ow, i / filters % ow, i % filters);
                let mut sum = 0.0f64;
                for c in 0..channels {
                    for ky in 0..kernel {
                        for kx in 0..kernel {
                            let (y, x_) = ((oy * stride + ky) as i64 - s.padding() as i64, (ox * stride + kx) as i64 - s.padding() as i64);
                            if (0..h as i64).contains(&y) && (0..w as i64).contains(&x_) {
                                sum += x[(y as usize * w + x_ as usize) * channels + c] as f64
                                    * weight[((f * channels + c) * kernel + ky) * kernel + kx] as f64;
                            }
                        }
                    }
                }
                let linear = sum as f32 * scale[f] + shift[f];
                let expected = match finish {
                    Finish::Linear => linear,
                    Finish::Relu => linear.max(0.0),
                    Finish::AddRelu => (before[i] + linear).max(0.0),
                };
                prop_assert!((y - expected).abs() < 1e-4, "{y} {expected}");
            }
            let mut again = before;
            prop_assert_eq!(conv.apply_parallel(&x, (h, w), finish, &mut again), (oh, ow));
            prop_assert_eq!(out, again);
        }
    }

    #[test]
    fn pooling_takes_means_of_squares() {
        // Two channels of a 2×4 image.
        let x: Vec<f32> = (0..16).map(|i| i as f32).collect();
        let mut out = vec![f32::NAN; 4];
        assert_eq!(average_pool(&x, (2, 4), 2, 2, &mut out), (1, 2));
        assert_eq!(out, [5.0, 6.0, 9.0, 10.0]);
    }
}
