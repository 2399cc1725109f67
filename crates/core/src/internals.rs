//! Kernels for the benches; nothing here is part of the interface.

use crate::Activation;
use crate::engine::attend::{Attention, Prefixes};
use crate::engine::plan::{Chunk, Sequence};
use crate::kernels::{Onto, Packed, rows};

/// A frozen matrix laid out for the vector units.
#[derive(Debug)]
pub struct Matrix(Packed);

impl Matrix {
    /// From the rows of a matrix `(k, n)`.
    pub fn new((k, n): (usize, usize), values: &[f32]) -> Self {
        Self(Packed::new((k, n), |row, column| values[row * n + column]))
    }

    /// `out (m, n) = a (m, k) · B` on the calling thread.
    pub fn multiply(&self, a: &[f32], m: usize, out: &mut [f32]) {
        self.0.multiply(a, m, Onto::Bias(None), out);
    }

    /// As [`Matrix::multiply`] on all threads.
    pub fn multiply_parallel(&self, a: &[f32], m: usize, out: &mut [f32]) {
        self.0.multiply_parallel(a, m, Onto::Bias(None), out);
    }
}

/// LayerNorm of rows.
pub fn layer_norm(x: &[f32], gain: &[f32], bias: &[f32], out: &mut [f32]) {
    rows::layer_norm(x, gain, bias, 1e-5, out);
}

/// Adds the gradient of [`layer_norm`].
pub fn layer_norm_backward(x: &[f32], gain: &[f32], dy: &[f32], dx: &mut [f32]) {
    rows::layer_norm_backward(x, gain, 1e-5, dy, dx);
}

/// QuickGELU.
pub fn quick_gelu(x: &[f32], out: &mut [f32]) {
    rows::activate(Activation::QuickGelu, x, out);
}

/// Classes of some rows each that attend to a prefix and themselves.
#[derive(Debug)]
pub struct TextAttention {
    chunk: Chunk,
    prefix: Vec<f32>,
    known: usize,
    qkv: Vec<f32>,
    width: usize,
    asking: Vec<u32>,
    scratch: Vec<f32>,
}

impl TextAttention {
    /// `classes` of `len` rows behind a prefix of `known` rows; `values` fill queries, keys and values.
    pub fn new(
        known: usize,
        classes: usize,
        len: usize,
        width: usize,
        values: impl Fn(usize) -> Vec<f32>,
    ) -> Self {
        let sequence = |i: usize| Sequence {
            start: i * len,
            len,
            reads: (i * len..(i + 1) * len).map(|row| row as u32).collect(),
            group: 0,
            prompt: i,
        };
        let rows = classes * len;
        Self {
            chunk: Chunk {
                first: 0,
                rows,
                sequences: (0..classes).map(sequence).collect(),
                ..Chunk::default()
            },
            prefix: values(known * 3 * width),
            known,
            qkv: values(rows * 3 * width),
            width,
            asking: (0..rows as u32).collect(),
            scratch: vec![0.0; 2 * (known + len)],
        }
    }

    /// Rows that ask.
    pub fn rows(&self) -> usize {
        self.chunk.rows
    }

    /// Multiplications and additions of a pass forward.
    pub fn flops(&self) -> usize {
        let keys = |s: &Sequence| (1..=s.len).map(|own| self.known + own).sum::<usize>();
        4 * self.width * self.chunk.sequences.iter().map(keys).sum::<usize>()
    }

    fn parts(&mut self) -> (Attention<'_>, &mut [f32]) {
        let (prefix, known) = (&self.prefix, self.known);
        let attention = Attention {
            chunk: &self.chunk,
            qkv: &self.qkv,
            prefixes: Prefixes(Box::new(move |_| (prefix, known))),
            width: self.width,
            asking: &self.asking,
        };
        (attention, &mut self.scratch)
    }

    /// `out (rows, width)`.
    pub fn forward(&mut self, out: &mut [f32]) {
        let (attention, scratch) = self.parts();
        attention.forward(out, scratch);
    }

    /// From `d_out (rows, width)`: adds to `d_qkv (rows, 3·width)` and to the prefix's `owing (known, 2·width)`.
    pub fn backward(&mut self, d_out: &[f32], d_qkv: &mut [f32], owing: &mut [f32]) {
        let (attention, scratch) = self.parts();
        attention.backward(d_out, d_qkv, scratch, owing, |_| Some(0));
    }
}
