//! Bicubic resizing, bit for bit as Pillow does it: widened by the scale when shrinking, first along rows, then along columns,
//! each pass rounded and clipped to the samples' range.

use std::ops::Range;

/// Where in the picture is read: a rectangle of rows that are `stride` bytes apart.
#[derive(Clone, Copy, Debug)]
pub(super) struct Source<'a> {
    /// Samples from the rectangle's first row on.
    pub(super) data: &'a [u8],
    /// Bytes from one row to the next.
    pub(super) stride: usize,
    /// Bytes of a row before the rectangle.
    pub(super) offset: usize,
}

/// Along one axis: `input` pixels are resized to `output`, of which only those in `kept` are computed.
#[derive(Clone, Debug)]
pub(super) struct Axis {
    pub(super) input: usize,
    pub(super) output: usize,
    pub(super) kept: Range<usize>,
}

/// Half the width of the bicubic kernel.
const SUPPORT: f64 = 2.0;
/// Bits after the point of the weights for 8-bit samples.
const PRECISION: u32 = 22;

/// The bicubic kernel with `a = -0.5`.
fn bicubic(x: f64) -> f64 {
    const A: f64 = -0.5;
    let x = x.abs();
    if x < 1.0 {
        ((A + 2.0) * x - (A + 3.0)) * x * x + 1.0
    } else if x < 2.0 {
        (((x - 5.0) * x + 8.0) * x - 4.0) * A
    } else {
        0.0
    }
}

/// What each computed pixel of an axis is made of.
#[derive(Debug)]
struct Weights<T> {
    /// First input pixel, and where its weight is.
    of_output: Vec<(usize, Range<usize>)>,
    values: Vec<T>,
}

impl Weights<f64> {
    fn new(axis: &Axis) -> Self {
        let scale = axis.input as f64 / axis.output as f64;
        let widening = scale.max(1.0);
        let support = SUPPORT * widening;
        let mut of_output = Vec::with_capacity(axis.kept.len());
        let mut values = Vec::new();
        for at in axis.kept.clone() {
            let centre = (at as f64 + 0.5) * scale;
            // Conversions to integers go towards zero, and negative values become zero.
            let first = (centre - support + 0.5) as usize;
            let end = ((centre + support + 0.5) as usize).min(axis.input);
            let from = values.len();
            values.extend(
                (first..end).map(|x| bicubic((x as f64 - centre + 0.5) * (1.0 / widening))),
            );
            let sum: f64 = values[from..].iter().sum();
            if sum != 0.0 {
                values[from..].iter_mut().for_each(|w| *w /= sum);
            }
            of_output.push((first, from..values.len()));
        }
        Self { of_output, values }
    }

    fn fixed_point(self) -> Weights<i32> {
        let one = f64::from(1 << PRECISION);
        let round = |w: f64| (w * one + if w < 0.0 { -0.5 } else { 0.5 }) as i32;
        Weights {
            of_output: self.of_output,
            values: self.values.into_iter().map(round).collect(),
        }
    }
}

impl<T> Weights<T> {
    /// Input pixels that any of the outputs needs.
    fn needed(&self) -> Range<usize> {
        let first = self.of_output.first().map_or(0, |(first, _)| *first);
        let end = self
            .of_output
            .iter()
            .map(|(first, weights)| first + weights.len())
            .max()
            .unwrap_or(0);
        first..end
    }

    /// For each output its first input and its weights.
    fn iter(&self) -> impl Iterator<Item = (usize, &[T])> {
        self.of_output
            .iter()
            .map(|(first, weights)| (*first, &self.values[weights.clone()]))
    }
}

fn clip(sum: i32) -> u8 {
    (sum >> PRECISION).clamp(0, 255) as u8
}

/// Resizes pixels of `N` samples of 8 bits; gives `(rows kept, columns kept, N)`.
pub(super) fn resize<const N: usize>(source: Source, columns: &Axis, rows: &Axis) -> Vec<u8> {
    const HALF: i32 = 1 << (PRECISION - 1);
    let across = Weights::new(columns).fixed_point();
    let down = Weights::new(rows).fixed_point();
    let width = columns.kept.len() * N;
    let needed = down.needed();

    let mut narrow = Vec::with_capacity(needed.len() * width);
    for y in needed.clone() {
        let row = &source.data[y * source.stride + source.offset..][..columns.input * N];
        let (pixels, _) = row.as_chunks::<N>();
        for (first, weights) in across.iter() {
            let mut sums = [HALF; N];
            for (pixel, &weight) in pixels[first..].iter().zip(weights) {
                for (sum, &sample) in sums.iter_mut().zip(pixel) {
                    *sum += i32::from(sample) * weight;
                }
            }
            narrow.extend(sums.map(clip));
        }
    }

    let mut out = Vec::with_capacity(rows.kept.len() * width);
    let mut sums = vec![HALF; width];
    for (first, weights) in down.iter() {
        sums.fill(HALF);
        for (row, &weight) in narrow[(first - needed.start) * width..]
            .chunks_exact(width)
            .zip(weights)
        {
            for (sum, &sample) in sums.iter_mut().zip(row) {
                *sum += i32::from(sample) * weight;
            }
        }
        out.extend(sums.iter().map(|&sum| clip(sum)));
    }
    out
}

/// Resizes samples of 16 bits, lower byte first; gives `(rows kept, columns kept)` in the same form.
pub(super) fn resize_16(source: Source, columns: &Axis, rows: &Axis) -> Vec<u8> {
    let across = Weights::new(columns);
    let down = Weights::new(rows);
    let width = columns.kept.len();
    let needed = down.needed();
    // Pillow clips the two bytes apart.
    let clip = |sum: f64| {
        let rounded = if sum >= 0.0 {
            (sum + 0.5).floor()
        } else {
            -(sum.abs() + 0.5).floor()
        } as i32;
        u16::from_le_bytes([
            (rounded % 256).clamp(0, 255) as u8,
            (rounded >> 8).clamp(0, 255) as u8,
        ])
    };

    let mut narrow = Vec::with_capacity(needed.len() * width);
    for y in needed.clone() {
        let row = &source.data[y * source.stride + source.offset..][..columns.input * 2];
        let (samples, _) = row.as_chunks::<2>();
        narrow.extend(across.iter().map(|(first, weights)| {
            let products = samples[first..]
                .iter()
                .zip(weights)
                .map(|(&s, w)| f64::from(u16::from_le_bytes(s)) * w);
            clip(products.fold(0.0, |sum, product| sum + product))
        }));
    }
    let mut out = Vec::with_capacity(rows.kept.len() * width * 2);
    for (first, weights) in down.iter() {
        for x in 0..width {
            let column = narrow[(first - needed.start) * width + x..]
                .iter()
                .step_by(width);
            let sum = column
                .zip(weights)
                .fold(0.0, |sum, (&s, w)| sum + f64::from(s) * w);
            out.extend(clip(sum).to_le_bytes());
        }
    }
    out
}

/// Takes the nearest of the pixels, which are one byte each.
pub(super) fn nearest(source: Source, columns: &Axis, rows: &Axis) -> Vec<u8> {
    let xs = nearest_inputs(columns);
    let mut out = Vec::with_capacity(rows.kept.len() * columns.kept.len());
    for y in nearest_inputs(rows) {
        let row = &source.data[y * source.stride + source.offset..][..columns.input];
        out.extend(xs.iter().map(|&x| row[x]));
    }
    out
}

/// The input of each computed pixel. Pillow adds up the step, so this does too.
fn nearest_inputs(axis: &Axis) -> Vec<usize> {
    let step = axis.input as f64 / axis.output as f64;
    let places = std::iter::successors(Some(step * 0.5), |at| Some(at + step));
    places
        .map(|at| (at as usize).min(axis.input - 1))
        .take(axis.kept.end)
        .skip(axis.kept.start)
        .collect()
}
