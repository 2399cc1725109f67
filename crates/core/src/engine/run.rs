//! Runs a plan through the text tower's blocks, forward and backward.
//!
//! Every chunk of suffixes runs through all blocks by itself, one task a chunk. Backward adds what it owes to the prefixes'
//! keys and values into a buffer of its own; the buffers are summed in the order of the chunks. So the bits depend on the plan
//! alone.

use rayon::prelude::*;

use super::plan::{Chunk, Plan, Sequence};
use crate::clip::FrozenBlock;
use crate::kernels;

/// What is kept of a chunk at one block, for its way back.
#[derive(Debug, Default)]
struct Kept {
    /// Input, `(rows, width)`.
    x: Vec<f32>,
    /// Queries, keys and values, `(rows, 3·width)`.
    qkv: Vec<f32>,
    /// After attention; of the ends only in the last block.
    middle: Vec<f32>,
    /// Before the activation.
    hidden: Vec<f32>,
}

/// What a forward pass leaves for the backward pass.
#[derive(Debug)]
pub(crate) struct Tape {
    beginnings: Vec<Vec<Kept>>,
    endings: Vec<Vec<Kept>>,
}

/// Rows that replace others at deeper blocks.
#[derive(Debug, Default)]
pub(crate) struct Deep {
    /// By a place's `deep − 1`: the row of the table of deep rows at block 1, 2, ...
    pub(crate) rows: Vec<Vec<u32>>,
}

/// Which gradients are wanted.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Wanted {
    /// Of a prefix's input or of a deep row in one.
    pub(crate) beginnings: bool,
    /// Of a suffix's input or of a deep row in one.
    pub(crate) endings: bool,
}

/// The tower's blocks with a plan to run.
pub(crate) struct Runner<'a> {
    pub(crate) blocks: &'a [FrozenBlock<'a>],
    pub(crate) plan: &'a Plan,
    pub(crate) deep: &'a Deep,
    pub(crate) width: usize,
}

/// Where the prefixes' keys and values are: for each group, chunk of beginnings and first row there.
fn homes(plan: &Plan) -> Vec<Option<(usize, usize)>> {
    let mut homes = vec![None; plan.prefixes.len()];
    for (i, chunk) in plan.beginnings.iter().enumerate() {
        for s in &chunk.sequences {
            homes[s.group] = Some((i, s.start));
        }
    }
    homes
}

impl Runner<'_> {
    /// `inputs (rows, width)`, positions added, and the deep rows → the prompts' last rows after the last block,
    /// `(prompts, width)`, and what the way back needs if `keep`.
    pub(crate) fn forward(&self, inputs: &[f32], deep: &[f32], keep: bool) -> (Vec<f32>, Tape) {
        let beginnings: Vec<Vec<Kept>> = self
            .plan
            .beginnings
            .par_iter()
            .map(|chunk| self.chunk_forward(chunk, inputs, deep, None, keep).1)
            .collect();
        let homes = homes(self.plan);
        let done: Vec<(Vec<f32>, Vec<Kept>)> = self
            .plan
            .endings
            .par_iter()
            .map(|chunk| {
                let known = Known {
                    prefixes: &self.plan.prefixes,
                    homes: &homes,
                    beginnings: &beginnings,
                };
                self.chunk_forward(chunk, inputs, deep, Some(known), keep)
            })
            .collect();
        let mut ends = vec![0.0; self.plan.prompts * self.width];
        let mut endings = Vec::with_capacity(done.len());
        for (chunk, (rows, kept)) in self.plan.endings.iter().zip(done) {
            for (s, row) in chunk.sequences.iter().zip(rows.chunks_exact(self.width)) {
                ends[s.prompt * self.width..][..self.width].copy_from_slice(row);
            }
            endings.push(kept);
        }
        (
            ends,
            Tape {
                beginnings,
                endings,
            },
        )
    }

    /// One chunk through all blocks: the last rows of its sequences, and what was kept. A chunk of prefixes (`known` is none)
    /// needs nothing behind the last block's keys and values.
    fn chunk_forward(
        &self,
        chunk: &Chunk,
        inputs: &[f32],
        deep: &[f32],
        known: Option<Known<'_>>,
        keep: bool,
    ) -> (Vec<f32>, Vec<Kept>) {
        let width = self.width;
        let mut x = inputs[chunk.first * width..][..chunk.rows * width].to_vec();
        let mut kept = Vec::with_capacity(self.blocks.len());
        let mut ends = Vec::new();
        for (layer, block) in self.blocks.iter().enumerate() {
            self.replace(chunk, layer, deep, &mut x);
            let last = layer + 1 == self.blocks.len();
            let mut normed = vec![0.0; x.len()];
            block.ln_1.normalise(&x, &mut normed);
            let mut qkv = vec![0.0; 3 * x.len()];
            block.in_proj.apply(&normed, chunk.rows, &mut qkv);
            if last && known.is_none() {
                kept.push(Kept {
                    x,
                    qkv,
                    ..Kept::default()
                });
                break;
            }
            let rows: Vec<usize> = match last {
                true => ends_of(chunk),
                false => (0..chunk.rows).collect(),
            };
            let mut mixed = vec![0.0; rows.len() * width];
            attend(chunk, &qkv, known, layer, width, last, &mut mixed);
            let mut middle = gather(&x, &rows, width);
            block.out_proj.add(&mixed, rows.len(), &mut middle);
            let mut normed = mixed;
            block.ln_2.normalise(&middle, &mut normed);
            let mut hidden = vec![0.0; 4 * middle.len()];
            block.c_fc.apply(&normed, rows.len(), &mut hidden);
            let mut active = vec![0.0; hidden.len()];
            kernels::activate(block.activation, &hidden, &mut active);
            let mut next = middle.clone();
            block.c_proj.add(&active, rows.len(), &mut next);
            kept.push(match (keep, known) {
                (true, _) => Kept {
                    x,
                    qkv,
                    middle,
                    hidden,
                },
                // Suffixes read a prefix's keys and values.
                (false, None) => Kept {
                    qkv,
                    ..Kept::default()
                },
                (false, Some(_)) => Kept::default(),
            });
            match last {
                true => {
                    ends = next;
                    break;
                }
                false => x = next,
            }
        }
        (ends, kept)
    }

    fn replace(&self, chunk: &Chunk, layer: usize, deep: &[f32], x: &mut [f32]) {
        self.each_replaced(chunk, layer, |row, source| {
            x[row * self.width..][..self.width]
                .copy_from_slice(&deep[source * self.width..][..self.width]);
        });
    }

    /// Calls `f(row of the chunk, deep row)` for what is replaced at `layer`.
    fn each_replaced(&self, chunk: &Chunk, layer: usize, mut f: impl FnMut(usize, usize)) {
        if layer == 0 || self.deep.rows.is_empty() {
            return;
        }
        for (row, place) in self.plan.places[chunk.range()].iter().enumerate() {
            let Some(slot) = (place.deep as usize).checked_sub(1) else {
                continue;
            };
            if let Some(source) = self.deep.rows[slot].get(layer - 1) {
                f(row, *source as usize);
            }
        }
    }

    /// Gradients of `inputs` and of the deep rows from those of the ends.
    pub(crate) fn backward(
        &self,
        tape: &Tape,
        d_ends: &[f32],
        deep_len: usize,
        wanted: Wanted,
    ) -> (Vec<f32>, Vec<f32>) {
        let width = self.width;
        let homes = homes(self.plan);
        let done: Vec<Done> = self
            .plan
            .endings
            .par_iter()
            .zip(&tape.endings)
            .map(|(chunk, kept)| {
                let known = Known {
                    prefixes: &self.plan.prefixes,
                    homes: &homes,
                    beginnings: &tape.beginnings,
                };
                self.ending_backward(chunk, kept, known, d_ends, deep_len, wanted)
            })
            .collect();
        let mut d_inputs = vec![0.0; self.plan.rows() * width];
        let mut d_deep = vec![0.0; deep_len];
        // What each chunk of prefixes is owed at each layer, `(rows, 2·width)`.
        let mut owed: Vec<Vec<Vec<f32>>> = self
            .plan
            .beginnings
            .iter()
            .map(|chunk| vec![vec![0.0; chunk.rows * 2 * width]; self.blocks.len()])
            .collect();
        for (chunk, done) in self.plan.endings.iter().zip(done) {
            d_inputs[chunk.first * width..][..done.d_x.len()].copy_from_slice(&done.d_x);
            add_into(&mut d_deep, &done.d_deep);
            for (group, layers) in done.owed {
                let Some((home, first)) = homes[group] else {
                    continue;
                };
                for (sum, part) in owed[home].iter_mut().zip(layers) {
                    add_into(&mut sum[first * 2 * width..][..part.len()], &part);
                }
            }
        }
        if wanted.beginnings {
            let done: Vec<Done> = self
                .plan
                .beginnings
                .par_iter()
                .zip(&tape.beginnings)
                .zip(&owed)
                .map(|((chunk, kept), owed)| self.beginning_backward(chunk, kept, owed, deep_len))
                .collect();
            for (chunk, done) in self.plan.beginnings.iter().zip(done) {
                d_inputs[chunk.first * width..][..done.d_x.len()].copy_from_slice(&done.d_x);
                add_into(&mut d_deep, &done.d_deep);
            }
        }
        (d_inputs, d_deep)
    }

    fn ending_backward(
        &self,
        chunk: &Chunk,
        kept: &[Kept],
        known: Known<'_>,
        d_ends: &[f32],
        deep_len: usize,
        wanted: Wanted,
    ) -> Done {
        let width = self.width;
        let mut groups: Vec<usize> = chunk.sequences.iter().map(|s| s.group).collect();
        groups.dedup();
        let mut owed: Vec<(usize, Vec<Vec<f32>>)> = groups
            .into_iter()
            .filter(|_| wanted.beginnings)
            .map(|group| {
                let floats = self.plan.prefixes[group] * 2 * width;
                (group, vec![vec![0.0; floats]; self.blocks.len()])
            })
            .collect();
        let mut d_deep = vec![0.0; deep_len];
        let mut d_x: Vec<f32> = chunk
            .sequences
            .iter()
            .flat_map(|s| &d_ends[s.prompt * width..][..width])
            .copied()
            .collect();
        for (layer, (block, kept)) in self.blocks.iter().zip(kept).enumerate().rev() {
            let last = layer + 1 == self.blocks.len();
            let rows: Vec<usize> = match last {
                true => ends_of(chunk),
                false => (0..chunk.rows).collect(),
            };
            let (d_middle, d_mixed) = mlp_backward(block, kept, &d_x, rows.len());
            // The first block's own input is wanted only if something learned is in it.
            let own = layer > 0 || wanted.endings;
            let mut d_qkv = vec![0.0; chunk.rows * 3 * width];
            let mut debts: Vec<(usize, &mut [f32])> = owed
                .iter_mut()
                .map(|(group, layers)| (*group, layers[layer].as_mut_slice()))
                .collect();
            attend_backward(
                chunk,
                &kept.qkv,
                Some(known),
                layer,
                width,
                last,
                &d_mixed,
                &mut d_qkv,
                &mut debts,
            );
            if !own {
                d_x = Vec::new();
                break;
            }
            d_x = qkv_backward(block, kept, &d_qkv, chunk.rows);
            scatter_add(&d_middle, &rows, width, &mut d_x);
            self.take_deep(chunk, layer, &mut d_x, &mut d_deep);
        }
        Done { d_x, d_deep, owed }
    }

    fn beginning_backward(
        &self,
        chunk: &Chunk,
        kept: &[Kept],
        owed: &[Vec<f32>],
        deep_len: usize,
    ) -> Done {
        let width = self.width;
        let mut d_deep = vec![0.0; deep_len];
        let mut d_x: Vec<f32> = Vec::new();
        for (layer, (block, kept)) in self.blocks.iter().zip(kept).enumerate().rev() {
            let mut d_qkv = vec![0.0; chunk.rows * 3 * width];
            for (d_qkv, owed) in d_qkv
                .chunks_exact_mut(3 * width)
                .zip(owed[layer].chunks_exact(2 * width))
            {
                d_qkv[width..].copy_from_slice(owed);
            }
            if layer + 1 == self.blocks.len() {
                d_x = qkv_backward(block, kept, &d_qkv, chunk.rows);
            } else {
                let (d_middle, d_mixed) = mlp_backward(block, kept, &d_x, chunk.rows);
                attend_backward(
                    chunk,
                    &kept.qkv,
                    None,
                    layer,
                    width,
                    false,
                    &d_mixed,
                    &mut d_qkv,
                    &mut [],
                );
                d_x = qkv_backward(block, kept, &d_qkv, chunk.rows);
                add_into(&mut d_x, &d_middle);
            }
            self.take_deep(chunk, layer, &mut d_x, &mut d_deep);
        }
        Done {
            d_x,
            d_deep,
            owed: Vec::new(),
        }
    }

    /// Moves the gradients of replaced rows to the deep rows: what they replaced is owed nothing.
    fn take_deep(&self, chunk: &Chunk, layer: usize, d_x: &mut [f32], d_deep: &mut [f32]) {
        let width = self.width;
        self.each_replaced(chunk, layer, |row, source| {
            let d_row = &mut d_x[row * width..][..width];
            add_into(&mut d_deep[source * width..][..width], d_row);
            d_row.fill(0.0);
        });
    }
}

/// What a chunk's way back gives.
struct Done {
    d_x: Vec<f32>,
    d_deep: Vec<f32>,
    /// By group and layer: gradients of the prefix's keys and values, `(prefix, 2·width)`.
    owed: Vec<(usize, Vec<Vec<f32>>)>,
}

/// The prefixes as suffixes see them.
#[derive(Clone, Copy)]
struct Known<'a> {
    prefixes: &'a [usize],
    homes: &'a [Option<(usize, usize)>],
    beginnings: &'a [Vec<Kept>],
}

/// Queries, keys and values of the prefix that a sequence attends to, from its first row on, and how many rows it has.
fn prefix_of<'a>(
    known: Option<Known<'a>>,
    s: &Sequence,
    layer: usize,
    width: usize,
) -> (&'a [f32], usize) {
    match known.and_then(|k| Some((k, k.homes[s.group]?))) {
        Some((k, (home, first))) => (
            &k.beginnings[home][layer].qkv[first * 3 * width..],
            k.prefixes[s.group],
        ),
        None => (&[], 0),
    }
}

/// Gradients `(of the rows after attention, of what attention gave)` from those of the block's output.
fn mlp_backward(
    block: &FrozenBlock<'_>,
    kept: &Kept,
    d_out: &[f32],
    rows: usize,
) -> (Vec<f32>, Vec<f32>) {
    let mut d_active = vec![0.0; kept.hidden.len()];
    block.c_proj.backward(d_out, rows, &mut d_active);
    let mut d_hidden = vec![0.0; kept.hidden.len()];
    kernels::activate_backward(block.activation, &kept.hidden, &d_active, &mut d_hidden);
    let mut d_normed = vec![0.0; kept.middle.len()];
    block.c_fc.backward(&d_hidden, rows, &mut d_normed);
    let mut d_middle = vec![0.0; kept.middle.len()];
    block.ln_2.backward(&kept.middle, &d_normed, &mut d_middle);
    add_into(&mut d_middle, d_out);
    let mut d_mixed = d_normed;
    block.out_proj.backward(&d_middle, rows, &mut d_mixed);
    (d_middle, d_mixed)
}

/// The gradient of the block's input through queries, keys and values.
fn qkv_backward(block: &FrozenBlock<'_>, kept: &Kept, d_qkv: &[f32], rows: usize) -> Vec<f32> {
    let mut d_normed = vec![0.0; kept.x.len()];
    block.in_proj.backward(d_qkv, rows, &mut d_normed);
    let mut d_x = vec![0.0; kept.x.len()];
    block.ln_1.backward(&kept.x, &d_normed, &mut d_x);
    d_x
}

fn ends_of(chunk: &Chunk) -> Vec<usize> {
    chunk
        .sequences
        .iter()
        .map(|s| s.start + s.len - 1)
        .collect()
}

fn gather(x: &[f32], rows: &[usize], width: usize) -> Vec<f32> {
    rows.iter()
        .flat_map(|row| &x[row * width..][..width])
        .copied()
        .collect()
}

fn scatter_add(part: &[f32], rows: &[usize], width: usize, whole: &mut [f32]) {
    for (row, part) in rows.iter().zip(part.chunks_exact(width)) {
        add_into(&mut whole[row * width..][..width], part);
    }
}

fn add_into(sum: &mut [f32], part: &[f32]) {
    sum.iter_mut().zip(part).for_each(|(sum, x)| *sum += x);
}

/// Width of a head, in every tower of every CLIP.
const HEAD: usize = crate::HEAD_WIDTH;

/// The scalar product of two heads; eight sums side by side, so that vector units can be used, always in the same order.
fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut sums = [0.0f32; 8];
    for (a, b) in a[..HEAD].chunks_exact(8).zip(b[..HEAD].chunks_exact(8)) {
        for ((sum, a), b) in sums.iter_mut().zip(a).zip(b) {
            *sum += a * b;
        }
    }
    let [a, b, c, d, e, f, g, h] = sums;
    ((a + e) + (b + f)) + ((c + g) + (d + h))
}

/// `y += a·x` of two heads.
fn axpy(a: f32, x: &[f32], y: &mut [f32]) {
    for (y, x) in y[..HEAD].iter_mut().zip(&x[..HEAD]) {
        *y += a * x;
    }
}

/// The rows of a sequence that ask: all, or only the end.
fn queries(s: &Sequence, ends_only: bool) -> std::ops::Range<usize> {
    match ends_only {
        true => s.len - 1..s.len,
        false => 0..s.len,
    }
}

/// Probabilities of a query over the prefix's keys and its own up to itself.
fn probabilities(q: &[f32], prefix: &[f32], own: &[f32], at: usize, width: usize, p: &mut [f32]) {
    let known = p.len() - (at + 1);
    let scale = 1.0 / (HEAD as f32).sqrt();
    let (first, second) = p.split_at_mut(known);
    for (p, row) in first.iter_mut().zip(prefix.chunks(3 * width)) {
        *p = scale * dot(q, &row[width..]);
    }
    for (p, row) in second.iter_mut().zip(own.chunks(3 * width)) {
        *p = scale * dot(q, &row[width..]);
    }
    kernels::softmax_row(p);
}

/// Attention of a chunk's sequences: `mixed` holds the rows that ask, one after the other.
fn attend(
    chunk: &Chunk,
    qkv: &[f32],
    known: Option<Known<'_>>,
    layer: usize,
    width: usize,
    ends_only: bool,
    mixed: &mut [f32],
) {
    let mut p = Vec::new();
    let mut out = mixed.chunks_exact_mut(width);
    for s in &chunk.sequences {
        let (prefix, prefix_rows) = prefix_of(known, s, layer, width);
        let own = &qkv[s.start * 3 * width..][..s.len * 3 * width];
        for at in queries(s, ends_only) {
            let Some(out) = out.next() else { return };
            p.resize(prefix_rows + at + 1, 0.0);
            for head in (0..width).step_by(HEAD) {
                let (prefix, own) = (skip(prefix, head), skip(own, head));
                let q = &own[at * 3 * width..];
                probabilities(q, prefix, own, at, width, &mut p);
                let out = &mut out[head..head + HEAD];
                out.fill(0.0);
                let rows = prefix.chunks(3 * width).take(prefix_rows);
                for (p, row) in p.iter().zip(rows.chain(own.chunks(3 * width))) {
                    axpy(*p, &row[2 * width..], out);
                }
            }
        }
    }
}

/// From a head on, or nothing of nothing.
fn skip(rows: &[f32], head: usize) -> &[f32] {
    rows.get(head..).unwrap_or(&[])
}

/// The gradient of [`attend`]: of the chunk's own queries, keys and values, and by group of the prefix's keys and values.
#[allow(clippy::too_many_arguments)] // what attention reads, and where its gradients go
fn attend_backward(
    chunk: &Chunk,
    qkv: &[f32],
    known: Option<Known<'_>>,
    layer: usize,
    width: usize,
    ends_only: bool,
    d_mixed: &[f32],
    d_qkv: &mut [f32],
    debts: &mut [(usize, &mut [f32])],
) {
    let scale = 1.0 / (HEAD as f32).sqrt();
    let (mut p, mut d_p) = (Vec::new(), Vec::new());
    let mut d_out = d_mixed.chunks_exact(width);
    for s in &chunk.sequences {
        let (prefix, prefix_rows) = prefix_of(known, s, layer, width);
        let own = &qkv[s.start * 3 * width..][..s.len * 3 * width];
        let d_own = &mut d_qkv[s.start * 3 * width..][..s.len * 3 * width];
        let mut debt = debts
            .iter_mut()
            .find(|(group, _)| *group == s.group)
            .map(|(_, debt)| &mut **debt);
        for at in queries(s, ends_only) {
            let Some(d_out) = d_out.next() else { return };
            p.resize(prefix_rows + at + 1, 0.0);
            d_p.resize(prefix_rows + at + 1, 0.0);
            for head in (0..width).step_by(HEAD) {
                let (prefix, own) = (skip(prefix, head), skip(own, head));
                let d_out = &d_out[head..head + HEAD];
                let q = &own[at * 3 * width..];
                probabilities(q, prefix, own, at, width, &mut p);
                let rows = prefix.chunks(3 * width).take(prefix_rows);
                let rows = rows.chain(own.chunks(3 * width));
                let mut mean = 0.0;
                for ((d_p, p), row) in d_p.iter_mut().zip(&p).zip(rows.clone()) {
                    *d_p = dot(d_out, &row[2 * width..]);
                    mean += p * *d_p;
                }
                for (d_p, p) in d_p.iter_mut().zip(&p) {
                    *d_p = scale * p * (*d_p - mean);
                }
                let mut d_q = [0.0f32; HEAD];
                for (j, ((d_s, p), row)) in d_p.iter().zip(&p).zip(rows).enumerate() {
                    axpy(*d_s, &row[width..], &mut d_q);
                    let (d_k, d_v) = match j.checked_sub(prefix_rows) {
                        Some(j) => d_own[j * 3 * width + width + head..].split_at_mut(width),
                        None => match &mut debt {
                            Some(debt) => debt[j * 2 * width + head..].split_at_mut(width),
                            None => continue,
                        },
                    };
                    axpy(*d_s, q, d_k);
                    axpy(*p, d_out, d_v);
                }
                let d_row = &mut d_own[at * 3 * width + head..][..HEAD];
                add_into(d_row, &d_q);
            }
        }
    }
}
