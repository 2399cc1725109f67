//! The numeric loops below the towers, on plain slices.
//!
//! Work is cut into blocks whose sizes depend on the matrices alone, never on the number of threads, and no sum is ever
//! split between threads. So results are equal bit for bit whatever the thread count.

mod conv;
mod packed;
pub(crate) mod rows;

use std::ops::Range;

use gemm::Parallelism;
use half::{bf16, f16};
use rayon::prelude::*;

use crate::Activation;

pub(crate) use conv::{Conv, ConvSizes, Finish, average_pool, average_pool_backward};
pub(crate) use packed::{Onto, Packed, Passing};

/// Columns of a product that one task computes.
const COLUMN_BLOCK: usize = 192;
/// Rows that one task of a row-wise pass handles.
const ROW_BLOCK: usize = 32;

/// A frozen matrix or vector, in the type in which it is kept.
#[derive(Clone, Debug)]
pub(crate) enum Stored {
    F32(Vec<f32>),
    F16(Vec<f16>),
    Bf16(Vec<bf16>),
}

impl Stored {
    pub(crate) fn len(&self) -> usize {
        match self {
            Self::F32(v) => v.len(),
            Self::F16(v) => v.len(),
            Self::Bf16(v) => v.len(),
        }
    }

    /// One element as f32.
    pub(crate) fn get(&self, at: usize) -> f32 {
        match self {
            Self::F32(v) => v[at],
            Self::F16(v) => v[at].to_f32(),
            Self::Bf16(v) => v[at].to_f32(),
        }
    }
}

/// A matrix inside a slice: element `(i, j)` is at `i·rows + j·cols`.
#[derive(Clone, Copy)]
pub(crate) struct Mat<'a> {
    pub(crate) data: &'a [f32],
    pub(crate) row_stride: usize,
    pub(crate) col_stride: usize,
}

impl<'a> Mat<'a> {
    /// Rows one after the other, `width` apart.
    pub(crate) fn rows(data: &'a [f32], width: usize) -> Self {
        Self {
            data,
            row_stride: width,
            col_stride: 1,
        }
    }

    /// The transpose of [`Mat::rows`].
    pub(crate) fn columns(data: &'a [f32], width: usize) -> Self {
        Self {
            data,
            row_stride: 1,
            col_stride: width,
        }
    }

    fn fits(&self, rows: usize, cols: usize) -> bool {
        rows == 0
            || cols == 0
            || (rows - 1) * self.row_stride + (cols - 1) * self.col_stride < self.data.len()
    }
}

/// `out = beta·out + alpha·a·b` on one thread; `out` has `m` rows, `out_width` apart.
#[allow(clippy::too_many_arguments)] // the argument list of every GEMM
pub(crate) fn gemm(
    m: usize,
    n: usize,
    k: usize,
    alpha: f32,
    a: Mat<'_>,
    b: Mat<'_>,
    beta: f32,
    out: &mut [f32],
    out_width: usize,
) {
    if m == 0 || n == 0 {
        return;
    }
    assert!(
        a.fits(m, k) && b.fits(k, n) && (m - 1) * out_width + n <= out.len(),
        "matrix sizes"
    );
    // SAFETY: the assertion above keeps every element that is read or written inside its slice, and `out` is borrowed
    // mutably, so it overlaps neither operand.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            out.as_mut_ptr(),
            1,
            out_width as isize,
            beta != 0.0,
            a.data.as_ptr(),
            a.col_stride as isize,
            a.row_stride as isize,
            b.data.as_ptr(),
            b.col_stride as isize,
            b.row_stride as isize,
            beta,
            alpha,
            false,
            false,
            false,
            Parallelism::None,
        );
    }
}

/// A pointer that tasks share; each writes its own elements.
#[derive(Clone, Copy)]
struct Shared(*mut f32);
// SAFETY: whoever makes one gives its tasks disjoint elements.
unsafe impl Send for Shared {}
// SAFETY: as above.
unsafe impl Sync for Shared {}

impl Shared {
    fn at(self, offset: usize) -> *mut f32 {
        self.0.wrapping_add(offset)
    }
}

/// `out (m, n) = x (m, k) · B (+ bias)`; `block(columns)` gives those columns of B as a `(k, columns.len())` matrix.
fn by_columns<'w>(
    x: &[f32],
    (m, k, n): (usize, usize, usize),
    bias: Option<&[f32]>,
    out: &mut [f32],
    block: impl Fn(Range<usize>) -> Mat<'w> + Sync,
) {
    assert!(
        x.len() >= m * k && out.len() == m * n && bias.is_none_or(|b| b.len() == n),
        "matrix sizes"
    );
    if m == 0 {
        return;
    }
    let shared = Shared(out.as_mut_ptr());
    (0..n.div_ceil(COLUMN_BLOCK)).into_par_iter().for_each(|i| {
        let columns = i * COLUMN_BLOCK..((i + 1) * COLUMN_BLOCK).min(n);
        let width = columns.len();
        let b = block(columns.clone());
        assert!(b.fits(k, width), "matrix sizes");
        if let Some(bias) = bias {
            for row in 0..m {
                // SAFETY: row `row < m`, columns below `n`, of `m·n` outputs; no other task touches these columns.
                let cells = unsafe {
                    std::slice::from_raw_parts_mut(shared.at(row * n + columns.start), width)
                };
                cells.copy_from_slice(&bias[columns.clone()]);
            }
        }
        // SAFETY: reads stay inside `x` (m·k) and `b` (checked above); writes go to this task's columns of `out` alone.
        unsafe {
            gemm::gemm(
                m,
                width,
                k,
                shared.at(columns.start),
                1,
                n as isize,
                bias.is_some(),
                x.as_ptr(),
                1,
                k as isize,
                b.data.as_ptr(),
                b.col_stride as isize,
                b.row_stride as isize,
                1.0,
                1.0,
                false,
                false,
                false,
                Parallelism::None,
            );
        }
    });
}

/// `out (m, n) = x (m, k) · wᵀ + bias` for `w (n, k)`.
pub(crate) fn linear(
    x: &[f32],
    m: usize,
    w: &[f32],
    (n, k): (usize, usize),
    bias: Option<&[f32]>,
    out: &mut [f32],
) {
    by_columns(x, (m, k, n), bias, out, |columns| {
        Mat::columns(&w[columns.start * k..columns.end * k], k)
    });
}

/// The gradient of [`linear`] with respect to its input: `dx (m, k) = dy (m, n) · w`.
pub(crate) fn linear_backward(
    dy: &[f32],
    m: usize,
    w: &[f32],
    (n, k): (usize, usize),
    dx: &mut [f32],
) {
    by_columns(dy, (m, n, k), None, dx, |columns| {
        Mat::rows(&w[columns.start..], k)
    });
}

/// The gradient of [`linear`] with respect to its weight: `dw (n, k) = dyᵀ (n, m) · x (m, k)`.
pub(crate) fn linear_weight_gradient(
    x: &[f32],
    dy: &[f32],
    m: usize,
    (n, k): (usize, usize),
    dw: &mut [f32],
) {
    gemm(
        n,
        k,
        m,
        1.0,
        Mat::columns(dy, n),
        Mat::rows(x, k),
        0.0,
        dw,
        k,
    );
}

/// The sum over the rows of `x (rows, sums.len())`: the gradient of a bias.
pub(crate) fn column_sums(x: &[f32], sums: &mut [f32]) {
    sums.fill(0.0);
    for row in x.chunks_exact(sums.len()) {
        sums.iter_mut().zip(row).for_each(|(sum, x)| *sum += x);
    }
}

/// [`rows::layer_norm`] on all threads.
pub(crate) fn layer_norm(x: &[f32], gain: &[f32], bias: &[f32], eps: f32, out: &mut [f32]) {
    let rows = ROW_BLOCK * gain.len();
    out.par_chunks_mut(rows)
        .zip(x.par_chunks(rows))
        .for_each(|(out, x)| rows::layer_norm(x, gain, bias, eps, out));
}

/// The gradient of [`layer_norm`] with respect to `x`.
pub(crate) fn layer_norm_backward(x: &[f32], gain: &[f32], eps: f32, dy: &[f32], dx: &mut [f32]) {
    let rows = ROW_BLOCK * gain.len();
    dx.par_chunks_mut(rows)
        .zip(x.par_chunks(rows))
        .zip(dy.par_chunks(rows))
        .for_each(|((dx, x), dy)| {
            dx.fill(0.0);
            rows::layer_norm_backward(x, gain, eps, dy, dx);
        });
}

/// The gradient of [`layer_norm`] with respect to its gain.
pub(crate) fn layer_norm_gain_gradient(x: &[f32], dy: &[f32], eps: f32, dgain: &mut [f32]) {
    let width = dgain.len();
    dgain.fill(0.0);
    for (x, dy) in x.chunks_exact(width).zip(dy.chunks_exact(width)) {
        let (mean, rstd) = rows::moments(x, eps);
        for ((dgain, x), dy) in dgain.iter_mut().zip(x).zip(dy) {
            *dgain += dy * (x - mean) * rstd;
        }
    }
}

/// Elements that one task of an element-wise pass handles.
const ELEMENT_BLOCK: usize = 4096;

/// [`rows::activate`] on all threads.
pub(crate) fn activate(kind: Activation, x: &[f32], out: &mut [f32]) {
    out.par_chunks_mut(ELEMENT_BLOCK)
        .zip(x.par_chunks(ELEMENT_BLOCK))
        .for_each(|(out, x)| rows::activate(kind, x, out));
}

/// The gradient of [`activate`].
pub(crate) fn activate_backward(kind: Activation, x: &[f32], dy: &[f32], dx: &mut [f32]) {
    dx.par_chunks_mut(ELEMENT_BLOCK)
        .zip(x.par_chunks(ELEMENT_BLOCK))
        .zip(dy.par_chunks(ELEMENT_BLOCK))
        .for_each(|((dx, x), dy)| {
            dx.copy_from_slice(dy);
            rows::activate_backward(kind, x, dx);
        });
}

/// [`rows::softmax`], compiled for the processor's vector units.
pub(crate) fn softmax_row(row: &mut [f32]) {
    rows::vectorised(
        #[inline(always)]
        || {
            rows::softmax(row);
        },
    );
}

/// Sizes of a self-attention over packed queries, keys and values.
#[derive(Clone, Copy, Debug)]
pub(crate) struct AttentionSizes {
    /// Sequences.
    pub(crate) batch: usize,
    /// Tokens of each.
    pub(crate) tokens: usize,
    /// Heads; the width is `64·heads` in every CLIP tower.
    pub(crate) heads: usize,
    /// Width of a head.
    pub(crate) head_width: usize,
    /// Whether a token sees only itself and what stands before it.
    pub(crate) causal: bool,
}

impl AttentionSizes {
    fn width(&self) -> usize {
        self.heads * self.head_width
    }

    /// `softmax(q·kᵀ/√d)` of one head, `(tokens, tokens)`.
    fn probabilities(&self, qkv: &[f32], head: usize, p: &mut [f32]) {
        let (t, d, w) = (self.tokens, self.head_width, self.width());
        let q = Mat::rows(&qkv[head * d..], 3 * w);
        let k = Mat::columns(&qkv[w + head * d..], 3 * w);
        gemm(t, t, d, 1.0 / (d as f32).sqrt(), q, k, 0.0, p, t);
        for (i, row) in p.chunks_exact_mut(t).enumerate() {
            let visible = if self.causal { i + 1 } else { t };
            row[visible..].fill(0.0);
            softmax_row(&mut row[..visible]);
        }
    }
}

/// Self-attention of each sequence: `qkv (batch, tokens, 3·width)` → `out (batch, tokens, width)`.
pub(crate) fn attention(qkv: &[f32], s: AttentionSizes, out: &mut [f32]) {
    let (t, d, w) = (s.tokens, s.head_width, s.width());
    if t * w == 0 {
        return;
    }
    out.par_chunks_mut(t * w)
        .zip(qkv.par_chunks(t * 3 * w))
        .for_each(|(out, qkv)| {
            let mut p = vec![0.0; t * t];
            for head in 0..s.heads {
                s.probabilities(qkv, head, &mut p);
                let v = Mat::rows(&qkv[2 * w + head * d..], 3 * w);
                gemm(
                    t,
                    d,
                    t,
                    1.0,
                    Mat::rows(&p, t),
                    v,
                    0.0,
                    &mut out[head * d..],
                    w,
                );
            }
        });
}

/// The gradient of [`attention`] with respect to `qkv`; the probabilities are computed again rather than kept.
pub(crate) fn attention_backward(qkv: &[f32], s: AttentionSizes, dy: &[f32], dqkv: &mut [f32]) {
    let (t, d, w) = (s.tokens, s.head_width, s.width());
    if t * w == 0 {
        return;
    }
    let scale = 1.0 / (d as f32).sqrt();
    dqkv.par_chunks_mut(t * 3 * w)
        .zip(qkv.par_chunks(t * 3 * w))
        .zip(dy.par_chunks(t * w))
        .for_each(|((dqkv, qkv), dy)| {
            let (mut p, mut ds) = (vec![0.0; t * t], vec![0.0; t * t]);
            for head in 0..s.heads {
                s.probabilities(qkv, head, &mut p);
                let (q, k, v) = (head * d, w + head * d, 2 * w + head * d);
                let dy = Mat::rows(&dy[head * d..], w);
                gemm(
                    t,
                    d,
                    t,
                    1.0,
                    Mat::columns(&p, t),
                    dy,
                    0.0,
                    &mut dqkv[v..],
                    3 * w,
                );
                gemm(
                    t,
                    t,
                    d,
                    1.0,
                    dy,
                    Mat::columns(&qkv[v..], 3 * w),
                    0.0,
                    &mut ds,
                    t,
                );
                for (ds, p) in ds.chunks_exact_mut(t).zip(p.chunks_exact(t)) {
                    let dot: f32 = ds.iter().zip(p).map(|(a, b)| a * b).sum();
                    ds.iter_mut()
                        .zip(p)
                        .for_each(|(ds, p)| *ds = p * (*ds - dot));
                }
                gemm(
                    t,
                    d,
                    t,
                    scale,
                    Mat::rows(&ds, t),
                    Mat::rows(&qkv[k..], 3 * w),
                    0.0,
                    &mut dqkv[q..],
                    3 * w,
                );
                gemm(
                    t,
                    d,
                    t,
                    scale,
                    Mat::columns(&ds, t),
                    Mat::rows(&qkv[q..], 3 * w),
                    0.0,
                    &mut dqkv[k..],
                    3 * w,
                );
            }
        });
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use proptest::prelude::*;

    pub(crate) fn numbers(n: usize, seed: u64) -> Vec<f32> {
        let mut x = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
        (0..n)
            .map(|_| {
                x ^= x << 13;
                x ^= x >> 7;
                x ^= x << 17;
                (x >> 40) as f32 / (1u64 << 23) as f32 - 1.0
            })
            .collect()
    }

    fn naive(
        m: usize,
        n: usize,
        k: usize,
        a: impl Fn(usize, usize) -> f32,
        b: impl Fn(usize, usize) -> f32,
    ) -> Vec<f32> {
        (0..m * n)
            .map(|i| {
                (0..k)
                    .map(|j| a(i / n, j) as f64 * b(j, i % n) as f64)
                    .sum::<f64>() as f32
            })
            .collect()
    }

    fn close(a: &[f32], b: &[f32], tolerance: f32) -> bool {
        a.len() == b.len()
            && a.iter()
                .zip(b)
                .all(|(a, b)| (a - b).abs() <= tolerance * (1.0 + b.abs()))
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]

        #[test]
        fn linear_equals_the_plain_sum(m in 0usize..9, n in 1usize..400, k in 1usize..40, seed in any::<u64>()) {
            let (x, w, bias) = (numbers(m * k, seed), numbers(n * k, seed ^ 1), numbers(n, seed ^ 2));
            let mut out = vec![f32::NAN; m * n];
            linear(&x, m, &w, (n, k), Some(&bias), &mut out);
            let mut expected = naive(m, n, k, |i, j| x[i * k + j], |j, i| w[i * k + j]);
            expected.iter_mut().enumerate().for_each(|(i, e)| *e += bias[i % n]);
            prop_assert!(close(&out, &expected, 1e-5));

            let mut dx = vec![f32::NAN; m * k];
            linear_backward(&expected, m, &w, (n, k), &mut dx);
            prop_assert!(close(&dx, &naive(m, k, n, |i, j| expected[i * n + j], |j, i| w[j * k + i]), 1e-4));
        }
    }

    #[test]
    fn exponentials_are_exact_to_rounding() {
        for i in -8_700..8_830 {
            let x = i as f32 * 0.01 + 0.003;
            let expected = f64::from(x).exp();
            let error = (f64::from(rows::exp(x)) - expected).abs() / expected;
            assert!(error < 2.5e-7, "{x}: {error}");
        }
        assert_eq!(rows::exp(0.0), 1.0);
        assert_eq!(rows::exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(rows::exp(f32::INFINITY), f32::INFINITY);
        assert!(rows::exp(f32::NAN).is_nan());
    }

    #[test]
    fn extreme_activations_stay_finite() {
        let x = [-1e30f32, -200.0, 0.0, 200.0, 1e30];
        for kind in [Activation::QuickGelu, Activation::Gelu] {
            let mut y = [0.0; 5];
            activate(kind, &x, &mut y);
            assert_eq!(y, [0.0, 0.0, 0.0, 200.0, 1e30]);
            let mut d = [0.0; 5];
            activate_backward(kind, &x, &[1.0; 5], &mut d);
            assert_eq!(d, [0.0, 0.0, 0.5, 1.0, 1.0]);
        }
    }
}
