//! Products with frozen matrices that were laid out once for the vector units.
//!
//! A matrix `B (k, n)` lies in panels of [`LANES`] columns, row after row, as f32 or, where every value is exactly so, as f16
//! or bf16: half the memory traffic, the same result. A tile of a few rows of the other operand meets a panel in registers. The inner
//! dimension is walked in fixed blocks and never divided among threads, so the bits do not depend on their number; they do
//! depend on whether the processor fuses multiplication and addition.
//!
//! Made for few rows against matrices of 256 to 3,072: 17 rows (a prefix), 120 (a chunk of suffixes), 197 (an image). On one
//! core whose fused peak is about 117 GFLOP/s (AMD EPYC, Zen 4, with AVX-512) it reaches, f32-held, 113 to 116 at 17 rows, 111 to
//! 115 at 120 and 101 to 104 at 197; f16-held 92 to 95 (17 rows hardly repay the widening), 107 to 109 and 103 to 105. The
//! `gemm` crate, which lays the matrix out in each call, reaches 57 to 94, 96 to 107 and 96 to 99
//! (`cargo bench -p cliptune-benches --bench kernels`).

mod lanes;

use std::cell::RefCell;
use std::ops::Range;

use half::{bf16, f16};
use rayon::prelude::*;

#[cfg(target_arch = "x86_64")]
use self::lanes::x86::{Avx2, Avx512};
use self::lanes::{Element, LANES, Lanes, Plain};
use super::Shared;

/// Rows of a panel that are walked at a time: they stay in the first cache while all rows of the other operand pass.
const DEPTH: usize = 512;

/// What a product is added to.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Onto<'a> {
    /// The bias, or nothing.
    Bias(Option<&'a [f32]>),
    /// What the output holds, and the bias.
    Output(Option<&'a [f32]>),
}

/// The panels.
#[derive(Clone, Debug)]
enum Panels {
    F32(Vec<f32>),
    F16(Vec<f16>),
    Bf16(Vec<bf16>),
}

impl Panels {
    /// In 16 bits if that loses nothing, as for weights that were published so.
    fn narrowest(values: Vec<f32>) -> Self {
        let kept = |narrow: fn(f32) -> f32| {
            values
                .par_iter()
                .all(|x| narrow(*x).to_bits() == x.to_bits())
        };
        if kept(|x| f16::from_f32(x).to_f32()) {
            return Self::F16(values.par_iter().map(|x| f16::from_f32(*x)).collect());
        }
        if kept(|x| bf16::from_f32(x).to_f32()) {
            return Self::Bf16(values.par_iter().map(|x| bf16::from_f32(*x)).collect());
        }
        Self::F32(values)
    }

    fn get(&self, at: usize) -> f32 {
        match self {
            Self::F32(v) => v[at],
            Self::F16(v) => v[at].to_f32(),
            Self::Bf16(v) => v[at].to_f32(),
        }
    }
}

/// A frozen matrix `(k, n)`.
#[derive(Clone, Debug)]
pub(crate) struct Packed {
    panels: Panels,
    k: usize,
    n: usize,
}

impl Packed {
    /// Lays out the matrix whose element `(row, column)` is `at(row, column)`.
    pub(crate) fn new((k, n): (usize, usize), at: impl Fn(usize, usize) -> f32 + Sync) -> Self {
        let mut values = vec![0.0f32; n.div_ceil(LANES) * k * LANES];
        values
            .par_chunks_mut((k * LANES).max(1))
            .enumerate()
            .for_each(|(panel, values)| {
                lay_panel(values, panel * LANES, n, &at);
            });
        Self {
            panels: Panels::narrowest(values),
            k,
            n,
        }
    }

    /// The transpose, laid out in the same way.
    pub(crate) fn transposed(&self) -> Self {
        let (k, n) = (self.k, self.n);
        Self::new((n, k), |row, column| self.get(column, row))
    }

    /// One element.
    pub(crate) fn get(&self, row: usize, column: usize) -> f32 {
        let panel = column / LANES * self.k * LANES;
        self.panels.get(panel + row * LANES + column % LANES)
    }

    pub(crate) fn bytes(&self) -> usize {
        match &self.panels {
            Panels::F32(v) => 4 * v.len(),
            Panels::F16(v) => 2 * v.len(),
            Panels::Bf16(v) => 2 * v.len(),
        }
    }

    /// `out (m, n) = a (m, k) · B`, added to what `onto` says, on the calling thread.
    pub(crate) fn multiply(&self, a: &[f32], m: usize, onto: Onto<'_>, out: &mut [f32]) {
        self.multiply_columns(a, m, 0..self.n, onto, out, self.n);
    }

    /// As [`Packed::multiply`] for some of B's columns, the first of which begins a panel; the rows of `out` begin `pitch`
    /// apart, and `onto`'s bias is that of all columns.
    pub(crate) fn multiply_columns(
        &self,
        a: &[f32],
        m: usize,
        columns: Range<usize>,
        onto: Onto<'_>,
        out: &mut [f32],
        pitch: usize,
    ) {
        if m == 0 || columns.is_empty() {
            return;
        }
        assert!(
            a.len() >= m * self.k && out.len() >= (m - 1) * pitch + columns.len(),
            "matrix sizes"
        );
        // SAFETY: the assertion above, and `out` is borrowed alone.
        unsafe { self.onto_pointer(a, m, columns, onto, out.as_mut_ptr(), pitch) }
    }

    /// As [`Packed::multiply`], on all threads; the same bits, since no element feels the others.
    pub(crate) fn multiply_parallel(&self, a: &[f32], m: usize, onto: Onto<'_>, out: &mut [f32]) {
        /// Rows and columns of a task.
        const TASK: (usize, usize) = (60, 256);
        if m == 0 || self.n == 0 {
            return;
        }
        assert!(
            a.len() >= m * self.k && out.len() >= m * self.n,
            "matrix sizes"
        );
        let out = Shared(out.as_mut_ptr());
        let across = self.n.div_ceil(TASK.1);
        (0..m.div_ceil(TASK.0) * across)
            .into_par_iter()
            .for_each(|task| {
                let first = task / across * TASK.0;
                let columns = task % across * TASK.1;
                let rows = TASK.0.min(m - first);
                let to = out.at(first * self.n + columns);
                let columns = columns..self.n.min(columns + TASK.1);
                // SAFETY: rows and columns of a task lie inside `out`, and no two tasks share an element.
                unsafe { self.onto_pointer(&a[first * self.k..], rows, columns, onto, to, self.n) };
            });
    }

    /// # Safety
    /// `out` must be good for `m` rows of `columns.len()` elements, `pitch` apart, that nobody else touches.
    unsafe fn onto_pointer(
        &self,
        a: &[f32],
        m: usize,
        columns: Range<usize>,
        onto: Onto<'_>,
        out: *mut f32,
        pitch: usize,
    ) {
        assert!(
            columns.start.is_multiple_of(LANES) && columns.end <= self.n && pitch >= columns.len(),
            "columns of a product"
        );
        for row in 0..m {
            // SAFETY: a row of the output, as the caller promises.
            let row =
                unsafe { std::slice::from_raw_parts_mut(out.add(row * pitch), columns.len()) };
            match onto {
                Onto::Bias(Some(bias)) => row.copy_from_slice(&bias[columns.clone()]),
                Onto::Bias(None) => row.fill(0.0),
                Onto::Output(Some(bias)) => {
                    let bias = &bias[columns.clone()];
                    row.iter_mut().zip(bias).for_each(|(x, b)| *x += b);
                }
                Onto::Output(None) => {}
            }
        }
        let job = Job {
            a,
            a_pitch: self.k,
            m,
            k: self.k,
            columns,
            out,
            pitch,
        };
        // SAFETY: the output is good for the job, as the caller promises.
        unsafe {
            match &self.panels {
                Panels::F32(panels) => run(job, panels),
                Panels::F16(panels) => run(job, panels),
                Panels::Bf16(panels) => run(job, panels),
            }
        }
    }
}

/// Lays the columns of a matrix from `first` on out as one panel; behind the last of `n` are zeros.
#[inline(always)]
fn lay_panel(values: &mut [f32], first: usize, n: usize, at: &impl Fn(usize, usize) -> f32) {
    let columns = LANES.min(n - first);
    for (row, values) in values.chunks_exact_mut(LANES).enumerate() {
        let (inside, outside) = values.split_at_mut(columns);
        for (column, value) in inside.iter_mut().enumerate() {
            *value = at(row, first + column);
        }
        outside.fill(0.0);
    }
}

/// A matrix `(k, n)` that is not frozen, laid out for a few products: the keys or values of a head.
#[derive(Debug, Default)]
pub(crate) struct Passing {
    panels: Vec<f32>,
    k: usize,
    n: usize,
}

impl Passing {
    /// Lays out the matrix whose element `(row, column)` is `at(row, column)`, in the room of the one before.
    pub(crate) fn lay_out(&mut self, (k, n): (usize, usize), at: impl Fn(usize, usize) -> f32) {
        (self.k, self.n) = (k, n);
        self.panels.resize(n.div_ceil(LANES) * k * LANES, 0.0);
        for (panel, values) in self.panels.chunks_exact_mut((k * LANES).max(1)).enumerate() {
            lay_panel(values, panel * LANES, n, &at);
        }
    }

    /// As [`Passing::lay_out`] for a matrix whose rows begin `pitch` apart.
    pub(crate) fn lay_rows(&mut self, (k, n): (usize, usize), rows: &[f32], pitch: usize) {
        (self.k, self.n) = (k, n);
        self.panels.resize(n.div_ceil(LANES) * k * LANES, 0.0);
        for (panel, values) in self.panels.chunks_exact_mut((k * LANES).max(1)).enumerate() {
            let first = panel * LANES;
            let columns = LANES.min(n - first);
            let (values, _) = values.as_chunks_mut::<LANES>();
            for (row, values) in values.iter_mut().enumerate() {
                let from = &rows[row * pitch + first..];
                match from.first_chunk::<LANES>() {
                    // A length that the compiler knows.
                    Some(from) if columns == LANES => *values = *from,
                    _ => {
                        let (inside, outside) = values.split_at_mut(columns);
                        inside.copy_from_slice(&from[..columns]);
                        outside.fill(0.0);
                    }
                }
            }
        }
    }

    /// `out (m, n) = a (m, k) · B` on the calling thread; rows begin `a_pitch` and `pitch` apart.
    pub(crate) fn multiply(
        &self,
        (a, a_pitch): (&[f32], usize),
        m: usize,
        (out, pitch): (&mut [f32], usize),
    ) {
        let (k, n) = (self.k, self.n);
        if m == 0 || n == 0 {
            return;
        }
        assert!(
            k > 0
                && a_pitch >= k
                && pitch >= n
                && a.len() >= (m - 1) * a_pitch + k
                && out.len() >= (m - 1) * pitch + n,
            "matrix sizes"
        );
        for row in out.chunks_mut(pitch).take(m) {
            row[..n].fill(0.0);
        }
        let job = Job {
            a,
            a_pitch,
            m,
            k,
            columns: 0..n,
            out: out.as_mut_ptr(),
            pitch,
        };
        // SAFETY: the assertion above, and `out` is borrowed alone.
        unsafe { run(job, &self.panels) };
    }
}

/// Adds `a (m, k) · B[.., columns]` to the output.
struct Job<'a> {
    /// Rows `a_pitch` apart.
    a: &'a [f32],
    a_pitch: usize,
    m: usize,
    k: usize,
    columns: Range<usize>,
    /// Good for `m` rows of `columns.len()` elements, `pitch` apart, that nobody else touches.
    out: *mut f32,
    pitch: usize,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = const { RefCell::new(Scratch::new()) };
}

/// What a thread copies to, kept for its next product.
struct Scratch {
    /// A block of depth of the rows that are being multiplied.
    rows: Vec<f32>,
    /// A block of depth of a panel that is held in 16 bits.
    panel: Vec<f32>,
}

impl Scratch {
    const fn new() -> Self {
        Self {
            rows: Vec::new(),
            panel: Vec::new(),
        }
    }
}

/// Adds the product to the output with the widest vectors that the processor has.
///
/// # Safety
/// [`Job::out`] must be what it says.
unsafe fn run<T: Element>(job: Job<'_>, panels: &[T]) {
    SCRATCH.with_borrow_mut(|scratch| {
        #[cfg(target_arch = "x86_64")]
        {
            if std::arch::is_x86_feature_detected!("avx512f") {
                // SAFETY: the feature is there.
                return unsafe { run_avx512(job, panels, scratch) };
            }
            if std::arch::is_x86_feature_detected!("avx2")
                && std::arch::is_x86_feature_detected!("fma")
                && std::arch::is_x86_feature_detected!("f16c")
            {
                // SAFETY: the features are there.
                return unsafe { run_avx2(job, panels, scratch) };
            }
        }
        // SAFETY: plain arrays need no feature.
        unsafe { walk::<Plain, T, 4>(job, panels, scratch) }
    });
}

/// [`walk`] with AVX2.
///
/// # Safety
/// Needs AVX2, FMA and F16C.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn run_avx2<T: Element>(job: Job<'_>, panels: &[T], scratch: &mut Scratch) {
    // SAFETY: the features are those of this function.
    unsafe { walk::<Avx2, T, 6>(job, panels, scratch) }
}

/// [`walk`] with AVX-512.
///
/// # Safety
/// Needs AVX-512F.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
unsafe fn run_avx512<T: Element>(job: Job<'_>, panels: &[T], scratch: &mut Scratch) {
    // SAFETY: the feature is that of this function.
    unsafe { walk::<Avx512, T, 12>(job, panels, scratch) }
}

/// All tiles, block of depth by block of depth.
///
/// Rows that lie whole pages apart would fall into the same sets of the first cache: a block of them is copied. A block of a
/// panel held in 16 bits is widened once for all tiles that meet it: a processor that widens slowly (Zen 1) would else spend a
/// quarter of its time on that.
#[inline(always)]
unsafe fn walk<L: Lanes, T: Element, const TALLEST: usize>(
    job: Job<'_>,
    panels: &[T],
    scratch: &mut Scratch,
) {
    let Scratch { rows, panel: wide } = scratch;
    let (m, k) = (job.m, job.k);
    let copied = job.a_pitch.is_multiple_of(1024);
    let pitch = if copied { DEPTH + LANES } else { job.a_pitch };
    if copied {
        rows.resize((m * pitch).max(rows.len()), 0.0);
    }
    // Tiles of nearly equal height: a low one cannot hide the latency of its sums.
    let tiles = m.div_ceil(TALLEST);
    let widened = T::NARROW && tiles > 1;
    if widened {
        wide.resize((DEPTH * LANES).max(wide.len()), 0.0);
    }
    let mut start = 0;
    while start < k {
        let depth = DEPTH.min(k - start);
        let a = match copied {
            true => {
                for (to, from) in rows
                    .chunks_exact_mut(pitch)
                    .zip(job.a.chunks(job.a_pitch))
                    .take(m)
                {
                    to[..depth].copy_from_slice(&from[start..start + depth]);
                }
                rows.as_slice()
            }
            false => &job.a[start..],
        };
        for first in job.columns.clone().step_by(LANES) {
            let panel = &panels[first * k + start * LANES..][..depth * LANES];
            let strip = Strip {
                job: &job,
                a,
                a_pitch: pitch,
                first,
                tiles,
            };
            // SAFETY: the caller has the instruction set; slices of sixteen elements.
            unsafe {
                if widened {
                    let wide = &mut wide[..depth * LANES];
                    let pairs = wide.chunks_exact_mut(LANES).zip(panel.chunks_exact(LANES));
                    for (to, from) in pairs {
                        T::load::<L>(from.as_ptr()).store(to.as_mut_ptr());
                    }
                    strip.add::<L, f32, TALLEST>(wide);
                } else {
                    strip.add::<L, T, TALLEST>(panel);
                }
            }
        }
        start += depth;
    }
}

/// The columns of a panel in all rows of the output.
struct Strip<'a> {
    job: &'a Job<'a>,
    /// All rows of the other operand, from the block of depth on.
    a: &'a [f32],
    a_pitch: usize,
    /// The panel's first column.
    first: usize,
    tiles: usize,
}

impl Strip<'_> {
    /// Adds the product with a block of depth of the panel, tile by tile.
    #[inline(always)]
    unsafe fn add<L: Lanes, T: Element, const TALLEST: usize>(&self, panel: &[T]) {
        let (job, depth) = (self.job, panel.len() / LANES);
        let columns = LANES.min(job.columns.end - self.first);
        let mut row = 0;
        for tile in 0..self.tiles {
            let height = job.m * (tile + 1) / self.tiles - row;
            let a = &self.a[row * self.a_pitch..][..(height - 1) * self.a_pitch + depth];
            // SAFETY: `height` rows of the output from `row` on, these columns of it; the rest is checked by the slices.
            unsafe {
                let out = job
                    .out
                    .add(row * job.pitch + self.first - job.columns.start);
                let part = Tile {
                    a: a.as_ptr(),
                    a_pitch: self.a_pitch,
                    panel: panel.as_ptr(),
                    depth,
                    out,
                    pitch: job.pitch,
                    columns,
                };
                part.add::<L, TALLEST>(height);
            }
            row += height;
        }
    }
}

/// Some rows of the output in one panel's columns.
struct Tile<T> {
    a: *const f32,
    a_pitch: usize,
    panel: *const T,
    depth: usize,
    out: *mut f32,
    pitch: usize,
    columns: usize,
}

impl<T: Element> Tile<T> {
    /// Adds the product of `height` rows, at most `TALLEST`, and the panel.
    #[inline(always)]
    unsafe fn add<L: Lanes, const TALLEST: usize>(self, height: usize) {
        /// Straight-line code, so that the sums stay in registers at any level of optimisation.
        macro_rules! rows {
            ($($sum:ident $row:literal)*) => {{
                $(let mut $sum = L::zero();)*
                for step in 0..self.depth {
                    let b = T::load::<L>(self.panel.add(step * LANES));
                    $($sum = $sum.plus_product(*self.a.add($row * self.a_pitch + step), b);)*
                }
                $(self.store($row, $sum);)*
            }};
        }
        // SAFETY: the caller answers for the pointers and the instruction set.
        unsafe {
            // The conditions are known to the compiler: heights that never come are not generated.
            match height {
                1 if TALLEST >= 1 => rows!(a 0),
                2 if TALLEST >= 2 => rows!(a 0 b 1),
                3 if TALLEST >= 3 => rows!(a 0 b 1 c 2),
                4 if TALLEST >= 4 => rows!(a 0 b 1 c 2 d 3),
                5 if TALLEST >= 5 => rows!(a 0 b 1 c 2 d 3 e 4),
                6 if TALLEST >= 6 => rows!(a 0 b 1 c 2 d 3 e 4 f 5),
                7 if TALLEST >= 7 => rows!(a 0 b 1 c 2 d 3 e 4 f 5 g 6),
                8 if TALLEST >= 8 => rows!(a 0 b 1 c 2 d 3 e 4 f 5 g 6 h 7),
                9 if TALLEST >= 9 => rows!(a 0 b 1 c 2 d 3 e 4 f 5 g 6 h 7 i 8),
                10 if TALLEST >= 10 => rows!(a 0 b 1 c 2 d 3 e 4 f 5 g 6 h 7 i 8 j 9),
                11 if TALLEST >= 11 => rows!(a 0 b 1 c 2 d 3 e 4 f 5 g 6 h 7 i 8 j 9 k 10),
                12 if TALLEST >= 12 => rows!(a 0 b 1 c 2 d 3 e 4 f 5 g 6 h 7 i 8 j 9 k 10 l 11),
                _ => unreachable!("a tile of {height} rows"),
            }
        }
    }

    #[inline(always)]
    unsafe fn store<L: Lanes>(&self, row: usize, sum: L) {
        // SAFETY: the caller answers for the pointers and the instruction set.
        unsafe {
            let to = self.out.add(row * self.pitch);
            if self.columns == LANES {
                L::load(to).plus(sum).store(to);
            } else {
                let mut part = [0.0f32; LANES];
                sum.store(part.as_mut_ptr());
                for (column, x) in part.into_iter().take(self.columns).enumerate() {
                    *to.add(column) += x;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::tests::numbers;
    use proptest::prelude::*;

    fn expected(a: &[f32], b: &[f32], (m, k, n): (usize, usize, usize)) -> Vec<f64> {
        let cell = |i: usize| -> f64 {
            (0..k)
                .map(|j| f64::from(a[i / n * k + j]) * f64::from(b[j * n + i % n]))
                .sum()
        };
        (0..m * n).map(cell).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]

        #[test]
        fn products_equal_the_plain_sum(m in 0usize..30, k in 1usize..700, n in 1usize..50, storage in 0usize..3, seed in any::<u64>()) {
            let a = numbers(m * k, seed);
            let mut b = numbers(k * n, seed ^ 1);
            // A third of a number has no short form, so that the panels stay as wide as is asked for.
            b[0] = 1.0 / 3.0;
            match storage {
                1 => b.iter_mut().for_each(|x| *x = f16::from_f32(*x).to_f32()),
                2 => b.iter_mut().for_each(|x| *x = bf16::from_f32(*x).to_f32() * 1e-20),
                _ => {}
            }
            let packed = Packed::new((k, n), |row, column| b[row * n + column]);
            prop_assert_eq!(matches!(packed.panels, Panels::F16(_)), storage == 1);
            let turned = packed.transposed();
            let identity: Vec<f32> = (0..n * n).map(|i| f32::from(u8::from(i % n == i / n))).collect();
            let mut back = vec![f32::NAN; n * k];
            turned.multiply_parallel(&identity, n, Onto::Bias(None), &mut back);
            for (i, x) in back.iter().enumerate() {
                prop_assert_eq!(*x, b[i % k * n + i / k]);
            }
            let (bias, before) = (numbers(n, seed ^ 2), numbers(m * n, seed ^ 3));
            let product = expected(&a, &b, (m, k, n));
            let close = |found: f32, wanted: f64| (f64::from(found) - wanted).abs() < 2e-6 * k as f64;
            let mut out = vec![f32::NAN; m * n];
            packed.multiply(&a, m, Onto::Bias(Some(&bias)), &mut out);
            for (i, (x, p)) in out.iter().zip(&product).enumerate() {
                prop_assert!(close(*x, p + f64::from(bias[i % n])));
            }
            packed.multiply(&a, m, Onto::Bias(None), &mut out);
            for (x, p) in out.iter().zip(&product) {
                prop_assert!(close(*x, *p));
            }
            let mut out = before.clone();
            packed.multiply(&a, m, Onto::Output(Some(&bias)), &mut out);
            for (i, (x, p)) in out.iter().zip(&product).enumerate() {
                prop_assert!(close(*x, p + f64::from(bias[i % n]) + f64::from(before[i])));
            }
        }

        /// A matrix laid out for the moment: rows apart on both sides, and what lies between them stays.
        #[test]
        fn passing_matrices_equal_the_plain_sum(m in 0usize..30, k in 1usize..90, n in 1usize..50, apart in 0usize..9, seed in any::<u64>()) {
            let (a_pitch, pitch) = (k + apart, n + apart);
            let (a, b) = (numbers(m * a_pitch, seed), numbers(k * n, seed ^ 1));
            let mut passing = Passing::default();
            passing.lay_out((n, k), |_, _| f32::NAN);
            passing.lay_out((k, n), |row, column| b[row * n + column]);
            let mut out = vec![7.0; m * pitch];
            passing.multiply((&a, a_pitch), m, (&mut out, pitch));
            let mut by_rows = Passing::default();
            let wide: Vec<f32> = b.chunks(n).flat_map(|row| row.iter().copied().chain(vec![f32::NAN; apart])).collect();
            by_rows.lay_rows((k, n), &wide, n + apart);
            prop_assert_eq!(&by_rows.panels[..], &passing.panels[..]);
            let rows: Vec<f32> = a.chunks(a_pitch.max(1)).flat_map(|row| row[..k].to_vec()).collect();
            for (i, p) in expected(&rows, &b, (m, k, n)).into_iter().enumerate() {
                let found = f64::from(out[i / n * pitch + i % n]);
                prop_assert!((found - p).abs() < 2e-6 * k as f64);
            }
            for row in out.chunks(pitch) {
                prop_assert!(row[n..].iter().all(|x| *x == 7.0));
            }
        }

        /// A row's bits do not depend on the rows beside it.
        #[test]
        fn a_row_has_the_same_bits_in_any_company(m in 1usize..30, k in 1usize..600, n in 1usize..40, seed in any::<u64>()) {
            let (a, b) = (numbers(m * k, seed), numbers(k * n, seed ^ 1));
            let packed = Packed::new((k, n), |row, column| b[row * n + column]);
            let mut all = vec![0.0; m * n];
            packed.multiply(&a, m, Onto::Bias(None), &mut all);
            let mut alone = vec![0.0; n];
            for (row, together) in all.chunks_exact(n).enumerate() {
                packed.multiply(&a[row * k..], 1, Onto::Bias(None), &mut alone);
                prop_assert_eq!(together, &alone[..]);
            }
        }

        /// Every instruction set gives the plain version's result, up to rounding.
        #[test]
        fn instruction_sets_agree(m in 1usize..20, k in 1usize..600, n in 1usize..40, seed in any::<u64>()) {
            let (a, b) = (numbers(m * k, seed), numbers(k * n, seed ^ 1));
            let packed = Packed::new((k, n), |row, column| b[row * n + column] / 3.0);
            let Panels::F32(panels) = &packed.panels else { return Ok(()) };
            let (mut wide, mut plain) = (vec![0.0; m * n], vec![0.0; m * n]);
            let job = |out: &mut Vec<f32>| Job { a: &a, a_pitch: k, m, k, columns: 0..n, out: out.as_mut_ptr(), pitch: n };
            // SAFETY: both outputs have m rows of n elements; plain arrays need no feature.
            unsafe {
                run(job(&mut wide), panels);
                walk::<Plain, f32, 4>(job(&mut plain), panels, &mut Scratch::new());
            }
            for (x, y) in wide.iter().zip(&plain) {
                prop_assert!((x - y).abs() < 1e-6 * k as f32);
            }
        }
    }
}
