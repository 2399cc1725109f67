//! Convolution and pooling of the ResNet tower.

use rayon::prelude::*;

use super::{Mat, Stored, gemm};

/// Filters of a convolution that one task computes.
const FILTER_BLOCK: usize = 32;

/// A convolution's sizes; padding is the same on all sides.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ConvSizes {
    /// Channels of the input.
    pub(crate) channels: usize,
    /// Height and width of the input.
    pub(crate) side: (usize, usize),
    /// Channels of the output.
    pub(crate) filters: usize,
    /// Side of the kernel.
    pub(crate) kernel: usize,
    /// Step between outputs.
    pub(crate) stride: usize,
    /// Zeros around the input.
    pub(crate) padding: usize,
}

impl ConvSizes {
    /// Height and width of the output.
    pub(crate) fn out_side(&self) -> (usize, usize) {
        let out = |n: usize| (n + 2 * self.padding - self.kernel) / self.stride + 1;
        (out(self.side.0), out(self.side.1))
    }

    /// The input's patches as columns, `(channels·kernel², out_h·out_w)`.
    fn patches(&self, image: &[f32], columns: &mut [f32]) {
        let (h, w) = self.side;
        let (oh, ow) = self.out_side();
        for (row, out) in columns.chunks_exact_mut(oh * ow).enumerate() {
            let (c, ky, kx) = (
                row / (self.kernel * self.kernel),
                row / self.kernel % self.kernel,
                row % self.kernel,
            );
            let plane = &image[c * h * w..(c + 1) * h * w];
            for (oy, out) in out.chunks_exact_mut(ow).enumerate() {
                let y = (oy * self.stride + ky).wrapping_sub(self.padding);
                if y >= h {
                    out.fill(0.0);
                    continue;
                }
                let line = &plane[y * w..(y + 1) * w];
                for (ox, out) in out.iter_mut().enumerate() {
                    let x = (ox * self.stride + kx).wrapping_sub(self.padding);
                    *out = line.get(x).copied().unwrap_or(0.0);
                }
            }
        }
    }
}

/// Convolution, then `scale·y + shift` of each channel and, if asked, ReLU: a frozen convolution with its BatchNorm.
///
/// `x (batch, channels, h, w)` → `out (batch, filters, out_h, out_w)`; `weight (filters, channels·kernel²)`.
pub(crate) fn conv(
    x: &[f32],
    s: ConvSizes,
    weight: &Stored,
    scale: &[f32],
    shift: &[f32],
    relu: bool,
    out: &mut [f32],
) {
    let (oh, ow) = s.out_side();
    let (k, n) = (s.channels * s.kernel * s.kernel, oh * ow);
    assert!(
        weight.len() == s.filters * k && scale.len() == s.filters && shift.len() == s.filters,
        "matrix sizes"
    );
    let mut wide = Vec::new();
    let weight = match weight {
        Stored::F32(w) => w.as_slice(),
        _ => {
            weight.widen_into(0..weight.len(), &mut wide);
            wide.as_slice()
        }
    };
    let image = s.channels * s.side.0 * s.side.1;
    out.par_chunks_mut(s.filters * n)
        .zip(x.par_chunks(image))
        .for_each(|(out, x)| {
            let mut columns = Vec::new();
            let columns = if s.kernel == 1 && s.stride == 1 && s.padding == 0 {
                x
            } else {
                columns.resize(k * n, 0.0);
                s.patches(x, &mut columns);
                &columns
            };
            // Filters in fixed blocks, so that one image alone can use every core.
            out.par_chunks_mut(FILTER_BLOCK * n)
                .enumerate()
                .for_each(|(i, out)| {
                    let first = i * FILTER_BLOCK;
                    let filters = out.len() / n;
                    let w = Mat::rows(&weight[first * k..(first + filters) * k], k);
                    gemm(filters, n, k, 1.0, w, Mat::rows(columns, n), 0.0, out, n);
                    for ((out, scale), shift) in out
                        .chunks_exact_mut(n)
                        .zip(&scale[first..])
                        .zip(&shift[first..])
                    {
                        for y in out {
                            *y = *y * scale + shift;
                            if relu {
                                *y = y.max(0.0);
                            }
                        }
                    }
                });
        });
}

/// Mean over squares of `factor` pixels, stepping by the same.
pub(crate) fn average_pool(x: &[f32], side: (usize, usize), factor: usize, out: &mut [f32]) {
    let (h, w) = side;
    let (oh, ow) = (h / factor, w / factor);
    let norm = 1.0 / (factor * factor) as f32;
    out.par_chunks_mut(oh * ow)
        .zip(x.par_chunks(h * w))
        .for_each(|(out, x)| {
            for (i, out) in out.iter_mut().enumerate() {
                let (oy, ox) = (i / ow * factor, i % ow * factor);
                let sum: f32 = (0..factor)
                    .map(|y| x[(oy + y) * w + ox..][..factor].iter().sum::<f32>())
                    .sum();
                *out = sum * norm;
            }
        });
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
            channels in 1usize..4, h in 3usize..9, w in 3usize..9, filters in 1usize..40,
            kernel in prop::sample::select(vec![1usize, 3]), stride in 1usize..3, seed in any::<u64>(),
        ) {
            let s = ConvSizes { channels, side: (h, w), filters, kernel, stride, padding: kernel / 2 };
            let (oh, ow) = s.out_side();
            let x = numbers(2 * channels * h * w, seed);
            let weight = numbers(filters * channels * kernel * kernel, seed ^ 1);
            let (scale, shift) = (numbers(filters, seed ^ 2), numbers(filters, seed ^ 3));
            let mut out = vec![f32::NAN; 2 * filters * oh * ow];
            conv(&x, s, &Stored::F32(weight.clone()), &scale, &shift, true, &mut out);
            for (i, &y) in out.iter().enumerate() {
                let (b, f, oy, ox) = (i / (filters * oh * ow), i / (oh * ow) % filters, i / ow % oh, i % ow);
                let mut sum = 0.0f64;
                for c in 0..channels {
                    for ky in 0..kernel {
                        for kx in 0..kernel {
                            let (y, x_) = ((oy * stride + ky) as i64 - s.padding as i64, (ox * stride + kx) as i64 - s.padding as i64);
                            if (0..h as i64).contains(&y) && (0..w as i64).contains(&x_) {
                                sum += x[((b * channels + c) * h + y as usize) * w + x_ as usize] as f64
                                    * weight[((f * channels + c) * kernel + ky) * kernel + kx] as f64;
                            }
                        }
                    }
                }
                let expected = (sum as f32 * scale[f] + shift[f]).max(0.0);
                prop_assert!((y - expected).abs() < 1e-4, "{y} {expected}");
            }
        }
    }
}
