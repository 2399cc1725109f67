//! One chunk through the tower's blocks, forward and backward.

use std::sync::{Mutex, PoisonError};

use super::attend::{Attention, Prefixes};
use super::buffers::Cut;
use super::plan::Chunk;
use super::record::{Before, Kind, Layout};
use super::run::{Inputs, Runner};
use crate::kernels::rows::{activate, activate_backward, add_into};
use crate::ops::Threads;

/// A chunk with what it reads.
#[derive(Clone, Copy)]
pub(super) struct Pass<'a> {
    pub(super) chunk: &'a Chunk,
    pub(super) layout: &'a Layout,
    pub(super) inputs: Inputs<'a>,
    /// What suffixes attend to.
    pub(super) before: Option<Before<'a>>,
    /// Who computes its products.
    pub(super) threads: Threads,
}

/// What a chunk's way back gives, in one buffer.
pub(super) struct Results<'a> {
    /// Gradients of prefixes' keys and values: of each group of the chunk, block by block, rows of `2·width`.
    pub(super) debts: &'a mut [f32],
    /// `(deep rows, width)`.
    pub(super) deep: &'a mut [f32],
    /// Of the chunk's learned rows.
    pub(super) learned: &'a mut [f32],
}

impl Runner<'_> {
    /// Floats of one row of probabilities.
    fn keys(&self, chunk: &Chunk) -> usize {
        let sequences = chunk.sequences.iter();
        let keys = sequences.map(|s| s.reads.len() + self.plan.prefixes[s.group]);
        keys.max().unwrap_or(0)
    }

    /// Floats that a chunk is worked in on the way forward.
    pub(super) fn room_forward(&self, chunk: &Chunk, layout: &Layout) -> usize {
        7 * chunk.rows * self.width + layout.spare(self.width) + self.keys(chunk)
    }

    /// Floats that a chunk is worked in on the way back.
    pub(super) fn room_back(&self, chunk: &Chunk) -> usize {
        12 * chunk.rows * self.width + 2 * self.keys(chunk)
    }

    /// Floats of [`Results`]' parts.
    pub(super) fn results_of(&self, layout: &Layout, chunk: &Chunk) -> [usize; 3] {
        let debts: usize = match layout.kind {
            Kind::Ending if self.wanted.beginnings => {
                chunk.groups().map(|g| self.plan.prefixes[g]).sum()
            }
            _ => 0,
        };
        [
            debts * 2 * self.blocks.len() * self.width,
            self.deep.table_rows() * self.width,
            layout.learned.len() * self.width,
        ]
    }

    pub(super) fn results<'b>(
        &self,
        layout: &Layout,
        chunk: &Chunk,
        buffer: &'b mut [f32],
    ) -> Results<'b> {
        let mut cut = Cut::new(buffer);
        let [debts, deep, learned] = self.results_of(layout, chunk).map(|len| cut.take(len));
        Results {
            debts,
            deep,
            learned,
        }
    }

    fn attention<'c>(&self, pass: &Pass<'c>, qkv: &'c [f32], layer: usize) -> Attention<'c> {
        let (before, width) = (pass.before, self.width);
        Attention {
            chunk: pass.chunk,
            qkv,
            prefixes: Prefixes(Box::new(move |group| {
                before.map_or((&[], 0), |before| before.prefix(group, layer, width))
            })),
            width,
            asking: &pass.layout.blocks[layer].asking,
        }
    }

    /// One chunk through all blocks, worked in `room`. `ends` takes the prompts' last rows, unless nobody wants them.
    pub(super) fn chunk_forward(
        &self,
        pass: Pass<'_>,
        record: &mut [f32],
        room: &mut [f32],
        ends: Option<&Mutex<&mut [f32]>>,
    ) {
        let (chunk, layout, inputs, threads) = (pass.chunk, pass.layout, pass.inputs, pass.threads);
        let (width, rows) = (self.width, chunk.rows * self.width);
        let mut cut = Cut::new(room);
        let (normed, mixed) = (cut.take(rows), cut.take(rows));
        let (active, out) = (cut.take(4 * rows), cut.take(rows));
        let scratch = cut.take(self.keys(chunk));
        let spare = cut.take(layout.spare(width));
        self.embed(chunk, inputs, layout.making(record, spare, 0, width).x);
        for (layer, block) in self.blocks.iter().enumerate() {
            let now = layout.making(record, spare, layer, width);
            self.each_replaced(chunk, layer, |row, source| {
                now.x[row * width..][..width]
                    .copy_from_slice(&inputs.deep[source * width..][..width]);
            });
            block.ln_1.normalise(now.x, normed);
            let asking = &layout.blocks[layer].asking;
            if asking.is_empty() {
                // The last block of a prefix, or every row is about to be replaced.
                block.in_proj.apply_keys(normed, chunk.rows, now.qkv);
                continue;
            }
            if layer == 0 {
                // Rows of the same input have the same queries, keys and values.
                let (n, found) = (chunk.firsts.len(), &mut active[..3 * rows]);
                gather(normed, &chunk.firsts, width, mixed);
                block.in_proj.apply(mixed, n, found, threads);
                gather(found, &chunk.twins, 3 * width, now.qkv);
            } else {
                block.in_proj.apply(normed, chunk.rows, now.qkv, threads);
            }
            let n = asking.len();
            let (normed, mixed) = (&mut normed[..n * width], &mut mixed[..n * width]);
            self.attention(&pass, now.qkv, layer)
                .forward(mixed, scratch);
            gather(now.x, asking, width, now.middle);
            block.out_proj.add(mixed, n, now.middle, threads);
            block.ln_2.normalise(now.middle, normed);
            block.c_fc.apply(normed, n, now.hidden, threads);
            let last = layer + 1 == self.blocks.len();
            if last && ends.is_none() {
                break;
            }
            let active = &mut active[..4 * n * width];
            activate(block.activation, now.hidden, active);
            let some = last || n < chunk.rows;
            let to = match some {
                true => &mut out[..n * width],
                false => &mut *now.next,
            };
            to.copy_from_slice(now.middle);
            block.c_proj.add(active, n, to, threads);
            let out = out.chunks_exact(width);
            if let Some(ends) = ends.filter(|_| last) {
                let mut ends = ends.lock().unwrap_or_else(PoisonError::into_inner);
                for (s, row) in chunk.sequences.iter().zip(out) {
                    ends[s.prompt * width..][..width].copy_from_slice(row);
                }
            } else if some {
                for (row, out) in asking.iter().zip(out) {
                    now.next[*row as usize * width..][..width].copy_from_slice(out);
                }
            }
        }
    }

    /// The input embeddings of a chunk's rows, with positions.
    fn embed(&self, chunk: &Chunk, inputs: Inputs<'_>, x: &mut [f32]) {
        let width = self.width;
        let places = &self.plan.places[chunk.range()];
        let positions = &self.plan.positions[chunk.range()];
        for ((x, place), position) in x.chunks_exact_mut(width).zip(places).zip(positions) {
            let position = &inputs.positions[*position as usize * width..][..width];
            for ((x, a), b) in x.iter_mut().zip(inputs.row(*place, width)).zip(position) {
                *x = a + b;
            }
        }
    }

    /// The way back of one chunk, worked in `room`: from the gradients of the prompts' ends for one of suffixes, from what all
    /// are owed for one of prefixes. `results` takes what it gives.
    pub(super) fn chunk_backward(
        &self,
        pass: Pass<'_>,
        record: &[f32],
        d_out_of_all: &[f32],
        room: &mut [f32],
        results: &mut [f32],
    ) {
        let (chunk, layout, threads) = (pass.chunk, pass.layout, pass.threads);
        let (width, layers) = (self.width, self.blocks.len());
        let Results {
            debts,
            deep: d_deep,
            learned: d_learned,
        } = self.results(layout, chunk, results);
        debts.fill(0.0);
        d_deep.fill(0.0);
        // Where the debts to each group's prefix begin.
        let mut places = Vec::new();
        let mut at = 0;
        for group in chunk.groups().filter(|_| !debts.is_empty()) {
            places.push((group, at));
            at += self.plan.prefixes[group] * 2 * width * layers;
        }
        let rows = chunk.rows * width;
        let mut cut = Cut::new(room);
        let (d_x, d_out) = (cut.take(rows), cut.take(rows));
        let (d_normed, d_middle, d_mixed) = (cut.take(rows), cut.take(rows), cut.take(rows));
        let (d_active, d_qkv) = (cut.take(4 * rows), cut.take(3 * rows));
        let scratch = cut.take(2 * self.keys(chunk));
        for (layer, block) in self.blocks.iter().enumerate().rev() {
            let kept = layout.kept(record, layer, width);
            let asking = &layout.blocks[layer].asking;
            let n = asking.len();
            let (d_middle, d_mixed) = (&mut d_middle[..n * width], &mut d_mixed[..n * width]);
            if n > 0 {
                let d_out = &mut d_out[..n * width];
                match layer + 1 == layers {
                    true => {
                        for (d_out, s) in d_out.chunks_exact_mut(width).zip(&chunk.sequences) {
                            d_out.copy_from_slice(&d_out_of_all[s.prompt * width..][..width]);
                        }
                    }
                    false => gather(d_x, asking, width, d_out),
                }
                let d_active = &mut d_active[..4 * n * width];
                block.c_proj.backward(d_out, n, d_active, threads);
                activate_backward(block.activation, kept.hidden, d_active);
                let d_normed = &mut d_normed[..n * width];
                block.c_fc.backward(d_active, n, d_normed, threads);
                d_middle.copy_from_slice(d_out);
                block.ln_2.backward(kept.middle, d_normed, d_middle);
                block.out_proj.backward(d_middle, n, d_mixed, threads);
            }
            d_qkv.fill(0.0);
            if layout.kind == Kind::Beginning {
                let first = (chunk.first * layers + chunk.rows * layer) * 2 * width;
                let owed = d_out_of_all[first..].chunks_exact(2 * width);
                for (d, owed) in d_qkv.chunks_exact_mut(3 * width).zip(owed) {
                    d[width..].copy_from_slice(owed);
                }
            }
            self.attention(&pass, kept.qkv, layer).backward(
                d_mixed,
                d_qkv,
                scratch,
                debts,
                |group| {
                    let place = places.iter().find(|(known, _)| *known == group)?;
                    Some(place.1 + layer * self.plan.prefixes[group] * 2 * width)
                },
            );
            if layer > 0 {
                block.in_proj.backward(d_qkv, chunk.rows, d_normed, threads);
                d_x.fill(0.0);
                block.ln_1.backward(kept.x, d_normed, d_x);
                for (row, d) in asking.iter().zip(d_middle.chunks_exact(width)) {
                    add_into(&mut d_x[*row as usize * width..][..width], d);
                }
                // What was replaced is owed nothing.
                self.each_replaced(chunk, layer, |row, source| {
                    let d_row = &mut d_x[row * width..][..width];
                    add_into(&mut d_deep[source * width..][..width], d_row);
                    d_row.fill(0.0);
                });
                continue;
            }
            // Of the first block's input only what is learned has a gradient.
            let learned = layout.learned.as_slice();
            let (n, d_normed) = (learned.len(), &mut d_normed[..d_learned.len()]);
            let (d_rows, x) = (&mut d_active[..3 * n * width], &mut d_out[..n * width]);
            gather(d_qkv, learned, 3 * width, d_rows);
            gather(kept.x, learned, width, x);
            block.in_proj.backward(d_rows, n, d_normed, threads);
            d_learned.fill(0.0);
            block.ln_1.backward(x, d_normed, d_learned);
            for (row, d) in asking.iter().zip(d_middle.chunks_exact(width)) {
                if let Ok(at) = learned.binary_search(row) {
                    add_into(&mut d_learned[at * width..][..width], d);
                }
            }
        }
    }

    /// The deep row that stands in a row's place from `layer` on.
    pub(super) fn replacement(&self, chunk: &Chunk, row: usize, layer: usize) -> Option<usize> {
        let slot = (self.plan.places[chunk.first + row].deep as usize).checked_sub(1)?;
        let rows = self.deep.rows.get(slot)?;
        rows.get(layer.checked_sub(1)?).map(|row| *row as usize)
    }

    /// Calls `f(row of the chunk, deep row)` for what is replaced at `layer`.
    fn each_replaced(&self, chunk: &Chunk, layer: usize, mut f: impl FnMut(usize, usize)) {
        if self.deep.rows.is_empty() {
            return;
        }
        for row in 0..chunk.rows {
            if let Some(source) = self.replacement(chunk, row, layer) {
                f(row, source);
            }
        }
    }
}

fn gather(x: &[f32], rows: &[u32], width: usize, out: &mut [f32]) {
    for (row, out) in rows.iter().zip(out.chunks_exact_mut(width)) {
        out.copy_from_slice(&x[*row as usize * width..][..width]);
    }
}
