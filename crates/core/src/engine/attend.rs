//! Attention of a chunk's sequences over their group's prefix and what they read of the chunk.
//!
//! Queries, keys and values lie in rows of `3·width`. A query meets a few dozen keys, so its scores are scalar products of 64
//! numbers, and what it gathers stays in registers; nothing but one row of probabilities is ever formed.
//!
//! Made for prefixes of 1 to 70 rows and names of 1 to 10. It does 11 to 15 GFLOP/s on a core, an eighth of the fused peak:
//! short sums, and scores computed again on the way back. That is 4 to 5 % of a step.

use super::plan::Chunk;
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

/// A query: its sequence's group, its row in the chunk, what it reads there, and its place among those that ask.
struct Query<'a> {
    group: usize,
    row: usize,
    reads: &'a [u32],
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
                Some(Query {
                    group: sequence.group,
                    row,
                    reads: sequence.read_by(row - sequence.start),
                    index,
                })
            })
    }

    fn seen<'a>(&'a self, query: &Query<'a>, (prefix, known): (&'a [f32], usize)) -> Seen<'a> {
        Seen {
            prefix,
            known,
            own: self.qkv,
            reads: query.reads,
            query: query.row,
            width: self.width,
        }
    }

    /// What the asking rows gather, `(asking, width)`; `scratch` holds a row of probabilities.
    pub(crate) fn forward(&self, mixed: &mut [f32], scratch: &mut [f32]) {
        vectorised(
            #[inline(always)]
            || {
                for query in self.queries() {
                    let seen = self.seen(&query, (self.prefixes.0)(query.group));
                    let p = &mut scratch[..seen.keys()];
                    let out = &mut mixed[query.index * self.width..][..self.width];
                    for offset in (0..self.width).step_by(HEAD) {
                        seen.probabilities(offset, p);
                        let mut sum = [0.0f32; HEAD];
                        for (j, p) in p.iter().enumerate() {
                            axpy(*p, seen.value(j, offset), &mut sum);
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
            let mut debt = debt(query.group).map(|first| &mut owing[first..]);
            let seen = self.seen(&query, (self.prefixes.0)(query.group));
            let (p, d_p) = (&mut all_p[..seen.keys()], &mut all_d[..seen.keys()]);
            let d_mixed = &d_mixed[query.index * width..][..width];
            vectorised(
                #[inline(always)]
                || {
                    for offset in (0..width).step_by(HEAD) {
                        let d_out = head(d_mixed, offset);
                        seen.probabilities(offset, p);
                        let mut mean = 0.0;
                        for (j, (d_p, p)) in d_p.iter_mut().zip(&*p).enumerate() {
                            *d_p = dot(d_out, seen.value(j, offset));
                            mean += p * *d_p;
                        }
                        let q = seen.query(offset);
                        let mut d_q = [0.0f32; HEAD];
                        for (j, (d_p, p)) in d_p.iter().zip(&*p).enumerate() {
                            let d_score = SCALE * p * (*d_p - mean);
                            axpy(d_score, seen.key(j, offset), &mut d_q);
                            let (d_key, d_value) = match (j.checked_sub(seen.known), &mut debt) {
                                (Some(j), _) => {
                                    let row = query.reads[j] as usize;
                                    d_qkv[(3 * row + 1) * width..].split_at_mut(width)
                                }
                                (None, Some(debt)) => debt[2 * j * width..].split_at_mut(width),
                                (None, None) => continue,
                            };
                            axpy(d_score, q, head_mut(d_key, offset));
                            axpy(*p, d_out, head_mut(d_value, offset));
                        }
                        let d_query = &mut d_qkv[query.row * 3 * width..];
                        axpy(1.0, &d_q, head_mut(d_query, offset));
                    }
                },
            );
        }
    }
}

/// `1 / √64`.
const SCALE: f32 = 0.125;

/// What a query attends to: a prefix, then rows of its chunk.
struct Seen<'a> {
    prefix: &'a [f32],
    /// Rows of the prefix.
    known: usize,
    own: &'a [f32],
    reads: &'a [u32],
    query: usize,
    width: usize,
}

impl<'a> Seen<'a> {
    fn keys(&self) -> usize {
        self.known + self.reads.len()
    }

    #[inline(always)]
    fn part(&self, j: usize, which: usize, offset: usize) -> &'a rows::Head {
        let (rows, j) = match j.checked_sub(self.known) {
            Some(j) => (self.own, self.reads[j] as usize),
            None => (self.prefix, j),
        };
        head(rows, (3 * j + which) * self.width + offset)
    }

    #[inline(always)]
    fn query(&self, offset: usize) -> &'a rows::Head {
        head(self.own, 3 * self.query * self.width + offset)
    }

    #[inline(always)]
    fn key(&self, j: usize, offset: usize) -> &'a rows::Head {
        self.part(j, 1, offset)
    }

    #[inline(always)]
    fn value(&self, j: usize, offset: usize) -> &'a rows::Head {
        self.part(j, 2, offset)
    }

    #[inline(always)]
    fn probabilities(&self, offset: usize, p: &mut [f32]) {
        let q = self.query(offset);
        for (j, p) in p.iter_mut().enumerate() {
            *p = SCALE * dot(q, self.key(j, offset));
        }
        softmax(p);
    }
}
