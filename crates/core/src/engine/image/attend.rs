//! Attention of an image's tokens to all of them, forward and backward.
//!
//! Queries, keys and values lie in rows of `3·width`. Probabilities of one head at a time are formed from products with
//! matrices that are laid out for the moment; of them only the logarithm of each row's sum of exponentials is kept. The way
//! back forms them again, a row for every key, so that no product needs a transposed copy of anything large.

use std::cell::RefCell;

use rayon::prelude::*;

use crate::HEAD_WIDTH;
use crate::engine::buffers::{Buffers, Cut};
use crate::kernels::{Passing, rows};
use crate::ops::Threads;

/// Rows that ask in one task of attention on all threads.
const QUERIES: usize = 64;
/// `1 / √64`.
const SCALE: f32 = 0.125;

/// Keys and values of a head, laid out for the products.
#[derive(Default)]
struct Seen {
    keys: Passing,
    values: Passing,
}

thread_local! {
    static SEEN: RefCell<Seen> = RefCell::default();
}

/// Attention of as many rows as `mixed` has, the first ones, to all `tokens`.
///
/// `p` has room for their probabilities in one head. `log_sums`, if not empty, takes the logarithm of every asking row's sum
/// of exponentials, `(asking, heads)`.
pub(crate) fn attend(
    qkv: &[f32],
    (tokens, width): (usize, usize),
    threads: Threads,
    p: &mut [f32],
    log_sums: &mut [f32],
    mixed: &mut [f32],
) {
    let some = |first: usize, mixed: &mut [f32], p: &mut [f32], log_sums: &mut [f32]| {
        SEEN.with_borrow_mut(|seen| {
            attend_some(qkv, (tokens, width), first, p, log_sums, mixed, seen);
        });
    };
    if threads == Threads::One {
        return some(0, mixed, p, log_sums);
    }
    let parts = mixed
        .par_chunks_mut(QUERIES * width)
        .zip(p.par_chunks_mut(QUERIES * tokens))
        .enumerate();
    match log_sums.is_empty() {
        true => parts.for_each(|(i, (mixed, p))| some(i * QUERIES, mixed, p, &mut [])),
        false => parts
            .zip(log_sums.par_chunks_mut(QUERIES * width / HEAD_WIDTH))
            .for_each(|((i, (mixed, p)), log_sums)| some(i * QUERIES, mixed, p, log_sums)),
    }
}

/// As [`attend`], from row `first` on. A row's bits do not depend on the others.
fn attend_some(
    qkv: &[f32],
    (tokens, width): (usize, usize),
    first: usize,
    p: &mut [f32],
    log_sums: &mut [f32],
    mixed: &mut [f32],
    seen: &mut Seen,
) {
    let m = mixed.len() / width;
    let p = &mut p[..m * tokens];
    let pitch = 3 * width;
    let heads = width / HEAD_WIDTH;
    for (head, at) in (0..width).step_by(HEAD_WIDTH).enumerate() {
        let (k, v) = (width + at, 2 * width + at);
        seen.keys.lay_out((HEAD_WIDTH, tokens), |row, column| {
            SCALE * qkv[column * pitch + k + row]
        });
        seen.values.lay_rows((tokens, HEAD_WIDTH), &qkv[v..], pitch);
        let q = &qkv[first * pitch + at..];
        seen.keys.multiply((q, pitch), m, (p, tokens));
        rows::vectorised(
            #[inline(always)]
            || match log_sums.is_empty() {
                true => p.chunks_exact_mut(tokens).for_each(|row| {
                    rows::softmax(row);
                }),
                false => p
                    .chunks_exact_mut(tokens)
                    .zip(log_sums[head..].iter_mut().step_by(heads))
                    .for_each(|(row, log_sum)| *log_sum = rows::softmax(row)),
            },
        );
        seen.values
            .multiply((p, tokens), m, (&mut mixed[at..], width));
    }
}

/// Sizes of a way back.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sizes {
    pub(crate) width: usize,
    /// Rows that ask, the first ones.
    pub(crate) asking: usize,
    /// Rows that are seen.
    pub(crate) keys: usize,
    /// The first row whose gradient is wanted.
    pub(crate) from: usize,
}

impl Sizes {
    /// Asking rows whose gradient is wanted.
    fn queries(self) -> usize {
        self.asking.saturating_sub(self.from)
    }

    /// Floats of one head's gradients of queries, keys and values.
    fn head(self) -> usize {
        HEAD_WIDTH * (self.queries() + 2 * (self.keys - self.from))
    }

    /// Floats of what one head is computed in.
    fn scratch(self) -> usize {
        2 * self.keys * self.asking + 2 * self.asking + HEAD_WIDTH * self.keys
    }

    /// Floats that a way back on one thread takes.
    pub(crate) fn room(self) -> usize {
        self.scratch() + self.width / HEAD_WIDTH * self.head()
    }
}

/// The gradient of [`attend`] with respect to the rows of `qkv` from `sizes.from` on; other rows of `d_qkv` stay as they are,
/// and rows that do not ask get queries of zero.
pub(crate) fn attend_backward(
    qkv: &[f32],
    log_sums: &[f32],
    d_mixed: &[f32],
    sizes: Sizes,
    threads: Threads,
    buffers: &Buffers,
    d_qkv: &mut [f32],
) {
    let Sizes {
        width,
        asking,
        keys,
        from,
    } = sizes;
    if sizes.head() == 0 {
        return;
    }
    let heads = width / HEAD_WIDTH;
    let mut by_head = buffers.take(heads * sizes.head());
    let one = |(head, out): (usize, &mut [f32])| {
        let mut scratch = buffers.take(sizes.scratch());
        SEEN.with_borrow_mut(|seen| {
            head_backward(
                qkv,
                (log_sums, d_mixed),
                sizes,
                head,
                &mut scratch,
                out,
                seen,
            );
        });
        buffers.give(scratch);
    };
    let parts = &mut by_head[..heads * sizes.head()];
    match threads {
        Threads::One => parts
            .chunks_exact_mut(sizes.head())
            .enumerate()
            .for_each(one),
        Threads::All => parts
            .par_chunks_exact_mut(sizes.head())
            .enumerate()
            .for_each(one),
    }
    // From heads one after the other to rows.
    let (queries, wanted) = (sizes.queries(), keys - from);
    for (row, d) in d_qkv[from * 3 * width..keys * 3 * width]
        .chunks_exact_mut(3 * width)
        .enumerate()
    {
        for (head, part) in parts.chunks_exact(sizes.head()).enumerate() {
            let at = head * HEAD_WIDTH;
            let (d_q, rest) = part.split_at(HEAD_WIDTH * queries);
            let (d_k, d_v) = rest.split_at(HEAD_WIDTH * wanted);
            let out = &mut d[at..][..HEAD_WIDTH];
            match row + from < asking {
                true => out
                    .iter_mut()
                    .enumerate()
                    .for_each(|(i, d)| *d = SCALE * d_q[i * queries + row]),
                false => out.fill(0.0),
            }
            let own = row * HEAD_WIDTH..(row + 1) * HEAD_WIDTH;
            let out = &mut d[width + at..][..HEAD_WIDTH];
            for (d, x) in out.iter_mut().zip(&d_k[own.clone()]) {
                *d = SCALE * x;
            }
            d[2 * width + at..][..HEAD_WIDTH].copy_from_slice(&d_v[own]);
        }
    }
    buffers.give(by_head);
}

/// One head's gradients: of its queries transposed and, as those of its keys, without the scale; then of keys; then of values.
fn head_backward(
    qkv: &[f32],
    (log_sums, d_mixed): (&[f32], &[f32]),
    sizes: Sizes,
    head: usize,
    scratch: &mut [f32],
    out: &mut [f32],
    seen: &mut Seen,
) {
    let Sizes {
        width,
        asking: m,
        keys,
        from,
    } = sizes;
    let (pitch, heads) = (3 * width, width / HEAD_WIDTH);
    let q = head * HEAD_WIDTH;
    let (k, v) = (width + q, 2 * width + q);
    let mut cut = Cut::new(scratch);
    // A row for every key, a column for every query.
    let (p, d_p) = (cut.take(keys * m), cut.take(keys * m));
    let (sums, means) = (cut.take(m), cut.take(m));
    let turned = cut.take(HEAD_WIDTH * keys);
    for (sum, kept) in sums.iter_mut().zip(log_sums[head..].iter().step_by(heads)) {
        *sum = *kept;
    }
    let laid = &mut seen.keys;
    laid.lay_out((HEAD_WIDTH, m), |row, column| {
        SCALE * qkv[column * pitch + q + row]
    });
    laid.multiply((&qkv[k..], pitch), keys, (p, m));
    laid.lay_out((HEAD_WIDTH, m), |row, column| {
        d_mixed[column * width + q + row]
    });
    laid.multiply((&qkv[v..], pitch), keys, (d_p, m));
    rows::vectorised(
        #[inline(always)]
        || {
            means.fill(0.0);
            for (p, d_p) in p.chunks_exact_mut(m).zip(d_p.chunks_exact(m)) {
                let columns = p.iter_mut().zip(d_p).zip(&*sums).zip(means.iter_mut());
                for (((p, d_p), sum), mean) in columns {
                    *p = rows::exp(*p - sum);
                    *mean += *p * d_p;
                }
            }
            for (p, d_p) in p.chunks_exact(m).zip(d_p.chunks_exact_mut(m)) {
                for ((p, d_p), mean) in p.iter().zip(d_p).zip(&*means) {
                    *d_p = p * (*d_p - mean);
                }
            }
        },
    );
    let wanted = keys - from;
    let queries = sizes.queries();
    let (d_q, rest) = out.split_at_mut(HEAD_WIDTH * queries);
    let (d_k, d_v) = rest.split_at_mut(HEAD_WIDTH * wanted);
    laid.lay_rows((m, HEAD_WIDTH), &d_mixed[q..], width);
    laid.multiply((&p[from * m..], m), wanted, (d_v, HEAD_WIDTH));
    laid.lay_rows((m, HEAD_WIDTH), &qkv[q..], pitch);
    laid.multiply((&d_p[from * m..], m), wanted, (d_k, HEAD_WIDTH));
    if queries > 0 {
        for (row, key) in qkv[k..].chunks(pitch).take(keys).enumerate() {
            for (i, x) in key[..HEAD_WIDTH].iter().enumerate() {
                turned[i * keys + row] = *x;
            }
        }
        laid.lay_rows((keys, queries), &d_p[from..], m);
        laid.multiply((turned, keys), HEAD_WIDTH, (d_q, queries));
    }
}
