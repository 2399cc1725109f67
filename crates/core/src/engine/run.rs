//! Runs a plan through the text tower's blocks, forward and backward.
//!
//! Every chunk runs through all blocks by itself: first those of prefixes, then those of suffixes, which read the prefixes'
//! keys and values. On the way back each chunk of suffixes says what it owes to the prefixes' keys and values; these debts are
//! added in the order of the chunks, and then the prefixes go back. So the bits depend on the plan alone, not on the threads
//! nor on what is kept.

use std::borrow::Cow;
use std::sync::{Mutex, PoisonError};

use super::attend::{Attention, Prefixes};
use super::buffers::{Buffers, Cut};
use super::memory::{Parts, Policy};
use super::order::in_order;
use super::plan::{Chunk, Plan};
use super::record::{Keep, Kind, Layout};
use crate::clip::FrozenBlock;
use crate::kernels::rows::{activate, activate_backward, add_into};
use crate::ops::Threads;

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

impl Wanted {
    /// Whether there is a way back at all.
    pub(crate) fn any(self) -> bool {
        self.beginnings || self.endings
    }
}

/// What a chunk runs from.
#[derive(Clone, Copy)]
pub(crate) struct Inputs<'a> {
    /// Input embeddings without positions, `(rows of the table, width)`.
    pub(crate) table: &'a [f32],
    /// `(context, width)`.
    pub(crate) positions: &'a [f32],
    /// Rows for deeper blocks, `(deep rows, width)`.
    pub(crate) deep: &'a [f32],
}

/// The tower's blocks with a plan to run.
#[derive(Clone, Copy)]
pub(crate) struct Runner<'a> {
    pub(crate) blocks: &'a [FrozenBlock<'a>],
    pub(crate) plan: &'a Plan,
    pub(crate) deep: &'a Deep,
    pub(crate) width: usize,
    pub(crate) wanted: Wanted,
    pub(crate) buffers: &'a Buffers,
    pub(crate) policy: Policy,
    pub(crate) at_a_time: usize,
}

/// Which part of a plan's record belongs to which chunk.
struct Records {
    beginnings: Vec<Layout>,
    endings: Vec<Layout>,
    /// First float of each chunk of prefixes.
    firsts: Vec<usize>,
    /// First float of each chunk of suffixes, behind the prefixes'.
    starts: Vec<usize>,
    /// Floats of the prefixes.
    endings_from: usize,
    floats: usize,
    /// By group: chunk of its prefix and first row there.
    homes: Vec<Option<(usize, usize)>>,
}

/// The prefixes, run, as suffixes see them.
#[derive(Clone, Copy)]
struct Before<'a> {
    records: &'a Records,
    record: &'a [f32],
}

/// What a forward pass leaves: the prompts' last rows, and a buffer for the way back.
pub(crate) struct Forward {
    pub(crate) ends: Vec<f32>,
    pub(crate) tape: Vec<f32>,
}

/// What a chunk's way back gives, in buffers.
struct Done {
    /// Gradient of the chunk's input; empty if nobody wants it.
    d_x: Vec<f32>,
    d_deep: Vec<f32>,
    /// Gradients of prefixes' keys and values: of each group of the chunk, block by block, rows of `2·width`.
    owing: Vec<f32>,
}

impl Runner<'_> {
    /// The prompts' last rows after the last block, `(prompts, width)`. `keep` if there will be a way back.
    pub(crate) fn forward(&self, inputs: Inputs<'_>, keep: bool) -> Forward {
        let records = self.records(keep);
        let mut tape = self.buffers.take(records.floats);
        let (beginnings, endings) = tape.split_at_mut(records.endings_from);
        let run = |i: usize, record: &mut [f32], threads| {
            let chunk = &self.plan.beginnings[i];
            self.chunk_forward(
                chunk,
                &records.beginnings[i],
                inputs,
                record,
                None,
                &mut [],
                threads,
            );
        };
        self.each(
            &self.plan.beginnings,
            &records.beginnings,
            beginnings,
            &run,
            |_, ()| (),
        );
        let beginnings = &*beginnings;
        let width = self.width;
        let mut ends = vec![0.0; self.plan.prompts * width];
        let before = Some(Before {
            records: &records,
            record: beginnings,
        });
        let run = |i: usize, record: &mut [f32], threads| {
            let chunk = &self.plan.endings[i];
            let mut own = self.buffers.take(chunk.sequences.len() * width);
            self.chunk_forward(
                chunk,
                &records.endings[i],
                inputs,
                record,
                before,
                &mut own,
                threads,
            );
            own
        };
        self.each(
            &self.plan.endings,
            &records.endings,
            endings,
            &run,
            |i, own| {
                for (s, row) in self.plan.endings[i]
                    .sequences
                    .iter()
                    .zip(own.chunks_exact(width))
                {
                    ends[s.prompt * width..][..width].copy_from_slice(row);
                }
                self.buffers.give(own);
            },
        );
        Forward { ends, tape }
    }

    /// Adds the gradients of the table's and the deep rows, from those of the ends.
    pub(crate) fn backward(
        &self,
        inputs: Inputs<'_>,
        tape: &[f32],
        d_ends: &[f32],
        d_table: &mut [f32],
        d_deep: &mut [f32],
    ) {
        let width = self.width;
        let records = self.records(true);
        let (beginnings, endings) = tape.split_at(records.endings_from);
        let before = Some(Before {
            records: &records,
            record: beginnings,
        });
        // What each chunk of prefixes is owed at each block, rows of `2·width`.
        let layers = self.blocks.len();
        let total: usize = self.plan.beginnings.iter().map(|c| c.rows).sum();
        let total = match self.wanted.beginnings {
            true => total * 2 * width * layers,
            false => 0,
        };
        let mut owed = self.buffers.take(total);
        owed[..total].fill(0.0);
        let threads = self.threads(self.plan.endings.len());
        in_order(
            self.plan.endings.len(),
            self.at_a_time,
            |i| {
                let (chunk, layout) = (&self.plan.endings[i], &records.endings[i]);
                if layout.keep == Keep::Everything {
                    let record = &endings[records.starts[i]..];
                    return self.chunk_backward(
                        chunk,
                        layout,
                        record,
                        before,
                        d_ends,
                        &[],
                        threads,
                    );
                }
                let layout = self.layout(chunk, Kind::Ending, Keep::Everything);
                let mut record = self.buffers.take(layout.floats);
                let mut own = self.buffers.take(chunk.sequences.len() * width);
                self.chunk_forward(
                    chunk,
                    &layout,
                    inputs,
                    &mut record,
                    before,
                    &mut own,
                    threads,
                );
                self.buffers.give(own);
                let done =
                    self.chunk_backward(chunk, &layout, &record, before, d_ends, &[], threads);
                self.buffers.give(record);
                done
            },
            |i, done| {
                let chunk = &self.plan.endings[i];
                let mut from = 0;
                for group in chunk.groups().filter(|_| self.wanted.beginnings) {
                    let rows = self.plan.prefixes[group];
                    for layer in 0..layers {
                        let part = &done.owing[from..][..rows * 2 * width];
                        let at = self.debt(&records, group, layer, layers);
                        add_into(&mut owed[at..][..part.len()], part);
                        from += part.len();
                    }
                }
                self.collect(chunk, done, d_table, d_deep);
            },
        );
        if self.wanted.beginnings {
            let threads = self.threads(self.plan.beginnings.len());
            in_order(
                self.plan.beginnings.len(),
                self.at_a_time,
                |i| {
                    let chunk = &self.plan.beginnings[i];
                    let layout = &records.beginnings[i];
                    let (at, len) = (
                        chunk.first * 2 * width * layers,
                        chunk.rows * 2 * width * layers,
                    );
                    let owed = &owed[at..][..len];
                    let record = &beginnings[records.firsts[i]..];
                    self.chunk_backward(chunk, layout, record, None, &[], owed, threads)
                },
                |i, done| self.collect(&self.plan.beginnings[i], done, d_table, d_deep),
            );
        }
        self.buffers.give(owed);
    }

    /// How many floats the parts of a forward and backward pass take.
    pub(crate) fn parts(&self, table: usize, deep: usize) -> Parts {
        let (width, layers) = (self.width, self.blocks.len());
        if !self.wanted.any() {
            return self.parts_forward(table);
        }
        let records = self.records(true);
        let all = |chunk: &Chunk| self.layout(chunk, Kind::Ending, Keep::Everything);
        let (mut work, mut work_twice) = (0, 0);
        for chunk in &self.plan.endings {
            let layout = all(chunk);
            let debts: usize = chunk.groups().map(|g| self.plan.prefixes[g]).sum();
            let owed = usize::from(self.wanted.beginnings) * debts * 2 * width * layers;
            let back = self.work_back(chunk) + chunk.rows * width + deep * width + owed;
            work = work.max(back.max(self.work_forward(chunk, &layout)));
            work_twice =
                work_twice.max(layout.floats + back.max(self.work_forward(chunk, &layout)));
        }
        let mut owed = 0;
        for chunk in self
            .plan
            .beginnings
            .iter()
            .filter(|_| self.wanted.beginnings)
        {
            let layout = self.layout(chunk, Kind::Beginning, Keep::Everything);
            let back = self.work_back(chunk) + chunk.rows * width + deep * width;
            let needed = back.max(self.work_forward(chunk, &layout));
            (work, work_twice) = (work.max(needed), work_twice.max(needed));
            owed += chunk.rows * 2 * width * layers;
        }
        Parts {
            beginnings: records.endings_from + owed,
            endings: self.plan.endings.iter().map(|c| all(c).floats).sum(),
            work,
            work_twice,
            // Table, deep rows and ends with their gradients; the ends also normalised and projected, with gradients.
            fixed: (2 * table + 2 * deep + 8 * self.plan.prompts) * width,
        }
    }

    /// As [`Runner::parts`] for prompts with nothing learned, which nobody goes back.
    fn parts_forward(&self, table: usize) -> Parts {
        let work =
            |chunk: &Chunk, kind, keep| self.work_forward(chunk, &self.layout(chunk, kind, keep));
        let endings = self.plan.endings.iter();
        let beginnings = self.plan.beginnings.iter();
        let work = endings
            .map(|c| work(c, Kind::Ending, Keep::Nothing))
            .chain(beginnings.map(|c| work(c, Kind::Beginning, Keep::Keys)))
            .max()
            .unwrap_or(0);
        Parts {
            beginnings: self.records(false).floats,
            endings: 0,
            work,
            work_twice: work,
            // Table and ends; the ends also normalised and projected.
            fixed: (table + 4 * self.plan.prompts) * self.width,
        }
    }

    /// Whether a chunk's products run on all threads: where too few chunks run at a time for one each. Bits are the same.
    fn threads(&self, chunks: usize) -> Threads {
        Threads::for_tasks(chunks.min(self.at_a_time))
    }

    /// Runs `f` for every chunk with its part of the record, which holds the chunks' parts one after the other, and hands
    /// the results to `take` in their order.
    fn each<T: Send>(
        &self,
        chunks: &[Chunk],
        layouts: &[Layout],
        record: &mut [f32],
        f: &(impl Fn(usize, &mut [f32], Threads) -> T + Sync),
        take: impl FnMut(usize, T) + Send,
    ) {
        let mut cut = Cut::new(record);
        let parts: Vec<Mutex<&mut [f32]>> = layouts
            .iter()
            .map(|l| Mutex::new(cut.take(l.floats)))
            .collect();
        let threads = self.threads(chunks.len());
        in_order(
            chunks.len(),
            self.at_a_time,
            |i| {
                let mut part = parts[i].lock().unwrap_or_else(PoisonError::into_inner);
                f(i, &mut part, threads)
            },
            take,
        );
    }

    /// The rows that ask at a block: those whose output somebody reads.
    fn asking<'c>(&'c self, chunk: &'c Chunk, kind: Kind, layer: usize) -> Cow<'c, [u32]> {
        if layer + 1 == self.blocks.len() {
            return match kind {
                Kind::Beginning => Cow::Borrowed(&[]),
                Kind::Ending => Cow::Owned(chunk.ends().collect()),
            };
        }
        let mut lasting: Vec<u32> = (0..chunk.rows as u32).collect();
        if !self.deep.rows.is_empty() {
            lasting.retain(|row| self.replacement(chunk, *row as usize, layer + 1).is_none());
        }
        Cow::Owned(lasting)
    }

    /// The deep row that stands in a row's place from `layer` on.
    fn replacement(&self, chunk: &Chunk, row: usize, layer: usize) -> Option<usize> {
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

    fn layout(&self, chunk: &Chunk, kind: Kind, keep: Keep) -> Layout {
        let width = self.width;
        let mut floats = 0;
        let blocks = (0..self.blocks.len())
            .map(|layer| {
                let asking = self.asking(chunk, kind, layer).len();
                let first = floats;
                floats += match keep {
                    Keep::Everything => (4 * chunk.rows + 5 * asking) * width,
                    Keep::Keys => 3 * chunk.rows * width,
                    Keep::Nothing => 0,
                };
                (first, asking)
            })
            .collect();
        Layout {
            keep,
            rows: chunk.rows,
            blocks,
            floats,
        }
    }

    fn records(&self, back: bool) -> Records {
        let beginnings = match back && self.wanted.beginnings {
            true => Keep::Everything,
            false => Keep::Keys,
        };
        let endings = match back && self.policy == Policy::SaveAll {
            true => Keep::Everything,
            false => Keep::Nothing,
        };
        let layouts = |chunks: &[Chunk], kind, keep| -> Vec<Layout> {
            chunks.iter().map(|c| self.layout(c, kind, keep)).collect()
        };
        let starts = |layouts: &[Layout]| -> Vec<usize> {
            let mut at = 0;
            layouts
                .iter()
                .map(|l| {
                    at += l.floats;
                    at - l.floats
                })
                .collect()
        };
        let beginnings = layouts(&self.plan.beginnings, Kind::Beginning, beginnings);
        let endings = layouts(&self.plan.endings, Kind::Ending, endings);
        let endings_from = beginnings.iter().map(|l| l.floats).sum();
        let mut homes = vec![None; self.plan.prefixes.len()];
        for (i, chunk) in self.plan.beginnings.iter().enumerate() {
            for s in &chunk.sequences {
                homes[s.group] = Some((i, s.start));
            }
        }
        Records {
            firsts: starts(&beginnings),
            starts: starts(&endings),
            floats: endings_from + endings.iter().map(|l| l.floats).sum::<usize>(),
            endings_from,
            beginnings,
            endings,
            homes,
        }
    }

    /// Where the debts to a group's prefix at a block begin.
    fn debt(&self, records: &Records, group: usize, layer: usize, layers: usize) -> usize {
        let Some((chunk, start)) = records.homes[group] else {
            return 0;
        };
        let chunk = &self.plan.beginnings[chunk];
        (chunk.first * layers + chunk.rows * layer + start) * 2 * self.width
    }

    /// The prefixes' queries, keys and values at a block.
    fn prefixes<'r>(&'r self, before: Option<Before<'r>>, layer: usize) -> Prefixes<'r> {
        let width = self.width;
        Prefixes(Box::new(move |group| {
            match before.map(|b| (b, b.records.homes[group])) {
                Some((before, Some((chunk, start)))) => {
                    let qkv = before.records.beginnings[chunk].qkv(layer, width);
                    let first = before.records.firsts[chunk] + qkv + start * 3 * width;
                    (&before.record[first..], self.plan.prefixes[group])
                }
                _ => (&[], 0),
            }
        }))
    }

    /// Floats of one row of probabilities.
    fn keys(&self, chunk: &Chunk) -> usize {
        let known = |s: &super::plan::Sequence| s.len + self.plan.prefixes[s.group];
        chunk.sequences.iter().map(known).max().unwrap_or(0)
    }

    fn work_forward(&self, chunk: &Chunk, layout: &Layout) -> usize {
        7 * chunk.rows * self.width + layout.spare(self.width) + self.keys(chunk)
    }

    fn work_back(&self, chunk: &Chunk) -> usize {
        11 * chunk.rows * self.width + 2 * self.keys(chunk)
    }

    /// One chunk through all blocks. `ends` takes the last rows of its sequences; prefixes have none.
    #[allow(clippy::too_many_arguments)] // a chunk with what it reads and where it writes
    fn chunk_forward(
        &self,
        chunk: &Chunk,
        layout: &Layout,
        inputs: Inputs<'_>,
        record: &mut [f32],
        before: Option<Before<'_>>,
        ends: &mut [f32],
        threads: Threads,
    ) {
        let width = self.width;
        let kind = if before.is_some() {
            Kind::Ending
        } else {
            Kind::Beginning
        };
        let mut work = self.buffers.take(self.work_forward(chunk, layout));
        let mut cut = Cut::new(&mut work);
        let (normed, mixed, active, out) = (
            cut.take(chunk.rows * width),
            cut.take(chunk.rows * width),
            cut.take(4 * chunk.rows * width),
            cut.take(chunk.rows * width),
        );
        let scratch = cut.take(self.keys(chunk));
        let spare = cut.take(layout.spare(width));
        let first = layout.making(record, spare, 0, width).x;
        let places = &self.plan.places[chunk.range()];
        let positions = &self.plan.positions[chunk.range()];
        for ((x, place), position) in first.chunks_exact_mut(width).zip(places).zip(positions) {
            let word = &inputs.table[place.row as usize * width..][..width];
            let position = &inputs.positions[*position as usize * width..][..width];
            for ((x, a), b) in x.iter_mut().zip(word).zip(position) {
                *x = a + b;
            }
        }
        for (layer, block) in self.blocks.iter().enumerate() {
            let now = layout.making(record, spare, layer, width);
            self.each_replaced(chunk, layer, |row, source| {
                now.x[row * width..][..width]
                    .copy_from_slice(&inputs.deep[source * width..][..width]);
            });
            block.ln_1.normalise(now.x, normed);
            let asking = self.asking(chunk, kind, layer);
            if asking.is_empty() {
                // The last block of a prefix, or every row is about to be replaced.
                block.in_proj.apply_keys(normed, chunk.rows, now.qkv);
                continue;
            }
            block.in_proj.apply(normed, chunk.rows, now.qkv, threads);
            let n = asking.len();
            let (normed, mixed) = (&mut normed[..n * width], &mut mixed[..n * width]);
            let active = &mut active[..4 * n * width];
            let prefixes = self.prefixes(before, layer);
            self.attention(chunk, now.qkv, prefixes, &asking)
                .forward(mixed, scratch);
            gather(now.x, &asking, width, now.middle);
            block.out_proj.add(mixed, n, now.middle, threads);
            block.ln_2.normalise(now.middle, normed);
            block.c_fc.apply(normed, n, now.hidden, threads);
            activate(block.activation, now.hidden, active);
            let last = layer + 1 == self.blocks.len();
            let to = match (last, n == chunk.rows) {
                (true, _) => &mut *ends,
                (false, true) => &mut *now.next,
                (false, false) => &mut out[..n * width],
            };
            let to = &mut to[..n * width];
            to.copy_from_slice(now.middle);
            block.c_proj.add(active, n, to, threads);
            if !last && n < chunk.rows {
                for (row, out) in asking.iter().zip(out.chunks_exact(width)) {
                    now.next[*row as usize * width..][..width].copy_from_slice(out);
                }
            }
        }
        self.buffers.give(work);
    }

    fn attention<'c>(
        &self,
        chunk: &'c Chunk,
        qkv: &'c [f32],
        prefixes: Prefixes<'c>,
        asking: &'c [u32],
    ) -> Attention<'c> {
        Attention {
            chunk,
            qkv,
            prefixes,
            width: self.width,
            asking,
        }
    }

    /// The way back of one chunk: from the gradients of the prompts' ends for one of suffixes, from what it is `owed` for
    /// one of prefixes.
    #[allow(clippy::too_many_arguments)] // a chunk with what it reads
    fn chunk_backward(
        &self,
        chunk: &Chunk,
        layout: &Layout,
        record: &[f32],
        before: Option<Before<'_>>,
        d_ends: &[f32],
        owed: &[f32],
        threads: Threads,
    ) -> Done {
        let (width, layers) = (self.width, self.blocks.len());
        let (kind, wanted) = match before {
            Some(_) => (Kind::Ending, self.wanted.endings),
            None => (Kind::Beginning, self.wanted.beginnings),
        };
        // Where the debts to each group's prefix begin.
        let mut places = Vec::new();
        let mut debts = 0;
        for group in chunk
            .groups()
            .filter(|_| before.is_some() && self.wanted.beginnings)
        {
            places.push((group, debts));
            debts += self.plan.prefixes[group] * 2 * width * layers;
        }
        let mut owing = self.buffers.take(debts);
        owing[..debts].fill(0.0);
        let deep = self
            .deep
            .rows
            .iter()
            .flatten()
            .max()
            .map_or(0, |last| *last as usize + 1);
        let mut d_deep = self.buffers.take(deep * width);
        d_deep[..deep * width].fill(0.0);
        let mut d_x = self.buffers.take(chunk.rows * width);
        let mut work = self.buffers.take(self.work_back(chunk));
        let mut cut = Cut::new(&mut work);
        let rows = chunk.rows * width;
        let (d_out, d_normed, d_middle, d_mixed) = (
            cut.take(rows),
            cut.take(rows),
            cut.take(rows),
            cut.take(rows),
        );
        let (d_active, d_qkv) = (cut.take(4 * rows), cut.take(3 * rows));
        let scratch = cut.take(2 * self.keys(chunk));
        for (layer, block) in self.blocks.iter().enumerate().rev() {
            let kept = layout.kept(record, layer, width);
            let asking = self.asking(chunk, kind, layer);
            let n = asking.len();
            let d_middle = &mut d_middle[..n * width];
            let (d_normed_of_asking, d_mixed) =
                (&mut d_normed[..n * width], &mut d_mixed[..n * width]);
            if n > 0 {
                let d_out = &mut d_out[..n * width];
                match layer + 1 == layers {
                    true => {
                        for (d_out, s) in d_out.chunks_exact_mut(width).zip(&chunk.sequences) {
                            d_out.copy_from_slice(&d_ends[s.prompt * width..][..width]);
                        }
                    }
                    false => gather(&d_x, &asking, width, d_out),
                }
                let d_active = &mut d_active[..4 * n * width];
                block.c_proj.backward(d_out, n, d_active, threads);
                activate_backward(block.activation, kept.hidden, d_active);
                block
                    .c_fc
                    .backward(d_active, n, d_normed_of_asking, threads);
                d_middle.copy_from_slice(d_out);
                block
                    .ln_2
                    .backward(kept.middle, d_normed_of_asking, d_middle);
                block.out_proj.backward(d_middle, n, d_mixed, threads);
            }
            d_qkv.fill(0.0);
            if kind == Kind::Beginning {
                let owed = &owed[layer * 2 * rows..][..2 * rows];
                for (d, owed) in d_qkv
                    .chunks_exact_mut(3 * width)
                    .zip(owed.chunks_exact(2 * width))
                {
                    d[width..].copy_from_slice(owed);
                }
            }
            let prefixes = self.prefixes(before, layer);
            self.attention(chunk, kept.qkv, prefixes, &asking).backward(
                d_mixed,
                d_qkv,
                scratch,
                &mut owing,
                |group| {
                    let place = places.iter().find(|(known, _)| *known == group)?;
                    Some(place.1 + layer * self.plan.prefixes[group] * 2 * width)
                },
            );
            // The first block's own input is wanted only if something learned is in it.
            if layer == 0 && !wanted {
                break;
            }
            block.in_proj.backward(d_qkv, chunk.rows, d_normed, threads);
            d_x[..rows].fill(0.0);
            block.ln_1.backward(kept.x, d_normed, &mut d_x[..rows]);
            for (row, d) in asking.iter().zip(d_middle.chunks_exact(width)) {
                add_into(&mut d_x[*row as usize * width..][..width], d);
            }
            // What was replaced is owed nothing.
            self.each_replaced(chunk, layer, |row, source| {
                let d_row = &mut d_x[row * width..][..width];
                add_into(&mut d_deep[source * width..][..width], d_row);
                d_row.fill(0.0);
            });
        }
        self.buffers.give(work);
        if !wanted {
            self.buffers.give(std::mem::take(&mut d_x));
        }
        Done { d_x, d_deep, owing }
    }

    /// Adds what a chunk's way back gave to the whole, and gives its buffers back.
    fn collect(&self, chunk: &Chunk, done: Done, d_table: &mut [f32], d_deep: &mut [f32]) {
        let width = self.width;
        if !done.d_x.is_empty() {
            let places = &self.plan.places[chunk.range()];
            for (place, d) in places.iter().zip(done.d_x.chunks_exact(width)) {
                add_into(&mut d_table[place.row as usize * width..][..width], d);
            }
        }
        if !self.deep.rows.is_empty() {
            add_into(d_deep, &done.d_deep);
        }
        for buffer in [done.d_x, done.d_deep, done.owing] {
            self.buffers.give(buffer);
        }
    }
}

fn gather(x: &[f32], rows: &[u32], width: usize, out: &mut [f32]) {
    for (row, out) in rows.iter().zip(out.chunks_exact_mut(width)) {
        out.copy_from_slice(&x[*row as usize * width..][..width]);
    }
}
