//! Bicubic resizing, bit for bit as Pillow 13 does it: widened by the scale when shrinking, in two passes that are each rounded
//! and clipped to the samples' range.

use std::ops::Range;

/// Where in the picture is read: a rectangle of rows that are `stride` samples apart.
#[derive(Clone, Copy, Debug)]
pub(super) struct Source<'a, S> {
    /// Samples from the rectangle's first row on.
    pub(super) data: &'a [S],
    /// Samples from one row to the next.
    pub(super) stride: usize,
    /// Samples of a row before the rectangle.
    pub(super) offset: usize,
}

impl<'a, S> Source<'a, S> {
    /// A row of the rectangle, and what follows it.
    fn row(&self, y: usize) -> &'a [S] {
        &self.data[y * self.stride + self.offset..]
    }
}

/// Along one axis: `input` pixels are resized to `output`, of which only those in `kept` are computed.
#[derive(Clone, Debug)]
pub(super) struct Axis {
    pub(super) input: usize,
    pub(super) output: usize,
    pub(super) kept: Range<usize>,
}

/// A sample and the arithmetic in which it is resized.
pub(super) trait Sample: Copy {
    /// Weights and weighted sums.
    type Sum: Copy;
    /// An empty sum.
    const EMPTY: Self::Sum;

    fn weight(weight: f64) -> Self::Sum;
    fn add(self, weight: Self::Sum, sum: &mut Self::Sum);
    fn of_sum(sum: Self::Sum) -> Self;
}

/// Bits after the point of the weights for 8-bit samples.
const PRECISION: u32 = 22;

impl Sample for u8 {
    type Sum = i32;
    const EMPTY: i32 = 1 << (PRECISION - 1);

    fn weight(weight: f64) -> i32 {
        (weight * f64::from(1 << PRECISION) + if weight < 0.0 { -0.5 } else { 0.5 }) as i32
    }

    fn add(self, weight: i32, sum: &mut i32) {
        *sum += i32::from(self) * weight;
    }

    fn of_sum(sum: i32) -> Self {
        (sum >> PRECISION).clamp(0, 255) as u8
    }
}

impl Sample for u16 {
    type Sum = f64;
    const EMPTY: f64 = 0.0;

    fn weight(weight: f64) -> f64 {
        weight
    }

    fn add(self, weight: f64, sum: &mut f64) {
        *sum += f64::from(self) * weight;
    }

    fn of_sum(sum: f64) -> Self {
        let rounded = if sum >= 0.0 {
            (sum + 0.5).floor()
        } else {
            -(sum.abs() + 0.5).floor()
        } as i32;
        // Pillow clips the two bytes apart.
        Self::from_le_bytes([
            (rounded % 256).clamp(0, 255) as u8,
            (rounded >> 8).clamp(0, 255) as u8,
        ])
    }
}

/// Half the width of the bicubic kernel.
const SUPPORT: f64 = 2.0;

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
struct Weights<S: Sample> {
    /// First input pixel, and where its weight is.
    of_output: Vec<(usize, Range<usize>)>,
    values: Vec<S::Sum>,
}

impl<S: Sample> Weights<S> {
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
            let raw: Vec<f64> = (first..end)
                .map(|x| bicubic((x as f64 - centre + 0.5) * (1.0 / widening)))
                .collect();
            let sum: f64 = raw.iter().sum();
            let from = values.len();
            values.extend(
                raw.into_iter()
                    .map(|w| S::weight(if sum != 0.0 { w / sum } else { w })),
            );
            of_output.push((first, from..values.len()));
        }
        Self { of_output, values }
    }

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

    /// For each output its first input, counted from `start`, and its weights.
    fn iter(&self, start: usize) -> impl Iterator<Item = (usize, &[S::Sum])> {
        self.of_output
            .iter()
            .map(move |(first, weights)| (first - start, &self.values[weights.clone()]))
    }
}

/// Resizes pixels of `N` samples; gives `(rows kept, columns kept, N)`.
pub(super) fn resize<S: Sample, const N: usize>(
    source: Source<S>,
    columns: &Axis,
    rows: &Axis,
) -> Vec<S> {
    let across = Weights::new(columns);
    let down = Weights::new(rows);
    // Rows come first unless the height shrinks by more than twice what the width does (Pillow 13; earlier: always).
    let lost = |axis: &Axis| axis.input as i128 - axis.output as i128;
    if lost(rows) > 0 && lost(rows) > 2 * lost(columns) {
        let needed = across.needed();
        let width = needed.len() * N;
        let low = resize_down(
            Source {
                offset: source.offset + needed.start * N,
                ..source
            },
            width,
            &down,
            0,
        );
        let low = Source {
            data: &low,
            stride: width,
            offset: 0,
        };
        resize_across::<S, N>(low, 0..rows.kept.len(), &across, needed.start)
    } else {
        let needed = down.needed();
        let width = columns.kept.len() * N;
        let narrow = resize_across::<S, N>(source, needed.clone(), &across, 0);
        resize_down(
            Source {
                data: &narrow,
                stride: width,
                offset: 0,
            },
            width,
            &down,
            needed.start,
        )
    }
}

/// Resizes each of `rows`; `source` begins at the input column `start`.
fn resize_across<S: Sample, const N: usize>(
    source: Source<S>,
    rows: Range<usize>,
    weights: &Weights<S>,
    start: usize,
) -> Vec<S> {
    let mut out = Vec::with_capacity(rows.len() * weights.of_output.len() * N);
    for y in rows {
        let (pixels, _) = source.row(y).as_chunks::<N>();
        for (first, weights) in weights.iter(start) {
            let mut sums = [S::EMPTY; N];
            for (pixel, &weight) in pixels[first..].iter().zip(weights) {
                for (sum, &sample) in sums.iter_mut().zip(pixel) {
                    sample.add(weight, sum);
                }
            }
            out.extend(sums.map(S::of_sum));
        }
    }
    out
}

/// Resizes columns, rows of `width` samples at a time; `source` begins at the input row `start`.
fn resize_down<S: Sample>(
    source: Source<S>,
    width: usize,
    weights: &Weights<S>,
    start: usize,
) -> Vec<S> {
    let mut out = Vec::with_capacity(weights.of_output.len() * width);
    let mut sums = vec![S::EMPTY; width];
    for (first, weights) in weights.iter(start) {
        sums.fill(S::EMPTY);
        for (y, &weight) in (first..).zip(weights) {
            for (sum, &sample) in sums.iter_mut().zip(source.row(y)) {
                sample.add(weight, sum);
            }
        }
        out.extend(sums.iter().map(|&sum| S::of_sum(sum)));
    }
    out
}

/// Takes the nearest of the pixels, which are one byte each.
pub(super) fn nearest(source: Source<u8>, columns: &Axis, rows: &Axis) -> Vec<u8> {
    let xs = nearest_inputs(columns);
    let mut out = Vec::with_capacity(rows.kept.len() * columns.kept.len());
    for y in nearest_inputs(rows) {
        let row = source.row(y);
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
