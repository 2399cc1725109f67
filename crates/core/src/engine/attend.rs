//! Attention of a chunk's sequences over their group's prefix and themselves.
//!
//! Queries, keys and values lie in rows of `3·width`. A query meets a few dozen keys, so its scores are scalar products of 64
//! numbers, and what it gathers stays in registers; nothing but one row of probabilities is ever formed.
//!
//! Made for prefixes of 1 to 70 rows and names of 1 to 10. It does 11 to 14 GFLOP/s on a core, an eighth of the fused peak:
//! short sums, and scores computed again on the way back. That is 4 to 5 % of a step.

use super::plan::{Chunk, Sequence};
use crate::kernels::rows::{self, axpy, dot, softmax, vectorised};

/// Width of a head, in every tower of every CLIP.
const HEAD: usize = crate::HEAD_WIDTH;

/// The head that begins at `offset`.
#[inline(always)]
fn head(row: &[f32], offset: usize) -> &rows::Head {
    let (head, _) = row[offset..].as_chunks();
    &head[0]
}

/// As [`head`], to be changed.
#[inline(always)]
fn head_mut(row: &mut [f32], offset: usize) -> &mut rows::Head {
    let (head, _) = row[offset..].as_chunks_mut();
    &mut head[0]
}

/// By group: queries, keys and values of its prefix from the first row on, and how many rows it has.
pub(crate) struct Prefixes<'a>(pub(crate) Box<dyn Fn(usize) -> (&'a [f32], usize) + 'a>);

/// A chunk's attention at one block.
pub(crate) struct Attention<'a> {
    pub(crate) chunk: &'a Chunk,
    /// `(rows, 3·width)`.
    pub(crate) qkv: &'a [f32],
    pub(crate) prefixes: Prefixes<'a>,
    pub(crate) width: usize,
    /// The rows that ask, ascending.
    pub(crate) asking: &'a [u32],
}

/// A query: its sequence, its row there, and its place among those that ask.
struct Query<'a> {
    sequence: &'a Sequence,
    at: usize,
    index: usize,
}

impl Attention<'_> {
    fn queries(&self) -> impl Iterator<Item = Query<'_>> {
        let mut sequences = self.chunk.sequences.iter();
        let mut current = sequences.next();
        self.asking
            .iter()
            .enumerate()
            .map_while(move |(index, row)| {
                let row = *row as usize;
                while current.is_some_and(|s| row >= s.start + s.len) {
                    current = sequences.next();
                }
                let sequence = current?;
                let at = row - sequence.start;
                Some(Query {
                    sequence,
                    at,
                    index,
                })
            })
    }

    /// What the asking rows gather, `(asking, width)`; `scratch` holds a row of probabilities.
    pub(crate) fn forward(&self, mixed: &mut [f32], scratch: &mut [f32]) {
        vectorised(
            #[inline(always)]
            || {
                for query in self.queries() {
                    let (prefix, known) = (self.prefixes.0)(query.sequence.group);
                    let own = &self.qkv[query.sequence.start * 3 * self.width..];
                    let p = &mut scratch[..known + query.at + 1];
                    let out = &mut mixed[query.index * self.width..][..self.width];
                    for offset in (0..self.width).step_by(HEAD) {
                        let seen = Seen::new(prefix, own, offset, self.width, known);
                        seen.probabilities(query.at, p);
                        let mut sum = [0.0f32; HEAD];
                        for (j, p) in p.iter().enumerate() {
                            axpy(*p, seen.value(j), &mut sum);
                        }
                        *head_mut(out, offset) = sum;
                    }
                }
            },
        );
    }

    /// Adds the gradients of the chunk's own queries, keys and values to `d_qkv`, and those of a prefix's keys and values to
    /// `owing`, rows of `2·width` from where `debt` says for its group, if anywhere.
    pub(crate) fn backward(
        &self,
        d_mixed: &[f32],
        d_qkv: &mut [f32],
        scratch: &mut [f32],
        owing: &mut [f32],
        debt: impl Fn(usize) -> Option<usize>,
    ) {
        let width = self.width;
        let (all_p, all_d) = scratch.split_at_mut(scratch.len() / 2);
        for query in self.queries() {
            let group = query.sequence.group;
            let mut debt = debt(group).map(|first| &mut owing[first..]);
            let (prefix, known) = (self.prefixes.0)(group);
            let first = query.sequence.start * 3 * width;
            let own = &self.qkv[first..];
            let d_own = &mut d_qkv[first..];
            let keys = known + query.at + 1;
            let (p, d_p) = (&mut all_p[..keys], &mut all_d[..keys]);
            let d_mixed = &d_mixed[query.index * width..][..width];
            vectorised(
                #[inline(always)]
                || {
                    for offset in (0..width).step_by(HEAD) {
                        let seen = Seen::new(prefix, own, offset, width, known);
                        let d_out = head(d_mixed, offset);
                        seen.probabilities(query.at, p);
                        let mut mean = 0.0;
                        for (j, (d_p, p)) in d_p.iter_mut().zip(&*p).enumerate() {
                            *d_p = dot(d_out, seen.value(j));
                            mean += p * *d_p;
                        }
                        let q = seen.query(query.at);
                        let mut d_q = [0.0f32; HEAD];
                        for (j, (d_p, p)) in d_p.iter().zip(&*p).enumerate() {
                            let d_score = SCALE * p * (*d_p - mean);
                            axpy(d_score, seen.key(j), &mut d_q);
                            let (d_key, d_value) = match (j.checked_sub(known), &mut debt) {
                                (Some(j), _) => d_own[(3 * j + 1) * width..].split_at_mut(width),
                                (None, Some(debt)) => debt[2 * j * width..].split_at_mut(width),
                                (None, None) => continue,
                            };
                            axpy(d_score, q, head_mut(d_key, offset));
                            axpy(*p, d_out, head_mut(d_value, offset));
                        }
                        axpy(
                            1.0,
                            &d_q,
                            head_mut(&mut d_own[query.at * 3 * width..], offset),
                        );
                    }
                },
            );
        }
    }
}

/// `1 / √64`.
const SCALE: f32 = 0.125;

/// A head's part of a prefix and of a sequence.
struct Seen<'a> {
    prefix: &'a [f32],
    own: &'a [f32],
    offset: usize,
    width: usize,
    known: usize,
}

impl<'a> Seen<'a> {
    #[inline(always)]
    fn new(prefix: &'a [f32], own: &'a [f32], offset: usize, width: usize, known: usize) -> Self {
        Self {
            prefix,
            own,
            offset,
            width,
            known,
        }
    }

    #[inline(always)]
    fn part(&self, j: usize, which: usize) -> &'a rows::Head {
        let (rows, j) = match j.checked_sub(self.known) {
            Some(j) => (self.own, j),
            None => (self.prefix, j),
        };
        head(rows, (3 * j + which) * self.width + self.offset)
    }

    #[inline(always)]
    fn query(&self, at: usize) -> &'a rows::Head {
        self.part(self.known + at, 0)
    }

    #[inline(always)]
    fn key(&self, j: usize) -> &'a rows::Head {
        self.part(j, 1)
    }

    #[inline(always)]
    fn value(&self, j: usize) -> &'a rows::Head {
        self.part(j, 2)
    }

    /// Over the prefix's keys and the sequence's own up to `at`.
    #[inline(always)]
    fn probabilities(&self, at: usize, p: &mut [f32]) {
        let q = self.query(at);
        for (j, p) in p.iter_mut().enumerate() {
            *p = SCALE * dot(q, self.key(j));
        }
        softmax(p);
    }
}
