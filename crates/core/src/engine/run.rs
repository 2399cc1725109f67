//! Runs a plan through the text tower's blocks, forward and backward.
//!
//! Every chunk runs through all blocks by itself: first those of prefixes, then those of suffixes, which read the prefixes'
//! keys and values. On the way back each chunk of suffixes says what it owes to the prefixes' keys and values; these debts are
//! added in the order of the chunks, and then the prefixes go back. So the bits depend on the plan alone, not on the threads
//! nor on what is kept.

use std::sync::Mutex;

use super::buffers::Buffers;
use super::chunk::{Pass, Results};
use super::memory::{Part, Parts, Policy};
use super::order::{AHEAD, in_order, in_order_into};
use super::plan::{Chunk, Place, Plan};
use super::record::{Before, Keep, Kind, Layout, Records};
use crate::clip::FrozenBlock;
use crate::kernels::rows::add_into;
use crate::ops::Threads;

/// Rows that replace others at deeper blocks.
#[derive(Debug, Default)]
pub(crate) struct Deep {
    /// By a place's `deep − 1`: the row of the table of deep rows at block 1, 2, ...
    pub(crate) rows: Vec<Vec<u32>>,
}

impl Deep {
    /// Rows of the table.
    pub(super) fn table_rows(&self) -> usize {
        let last = self.rows.iter().flatten().max();
        last.map_or(0, |last| *last as usize + 1)
    }
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
    /// Input embeddings without positions: frozen words, the first rows of the plan's table, and learned rows behind them.
    /// `(words, width)`, `(learned rows, width)`.
    pub(crate) words: &'a [f32],
    pub(crate) learned: &'a [f32],
    /// `(context, width)`.
    pub(crate) positions: &'a [f32],
    /// Rows for deeper blocks, `(deep rows, width)`.
    pub(crate) deep: &'a [f32],
}

impl Inputs<'_> {
    pub(super) fn row(&self, place: Place, width: usize) -> &[f32] {
        let at = place.row as usize * width;
        match at.checked_sub(self.words.len()) {
            Some(at) => &self.learned[at..][..width],
            None => &self.words[at..][..width],
        }
    }
}

/// The tower's blocks with a plan to run.
#[derive(Clone, Copy)]
pub(crate) struct Runner<'a> {
    pub(crate) blocks: &'a [FrozenBlock<'a>],
    pub(crate) plan: &'a Plan,
    /// Rows of the plan's table that are frozen words.
    pub(crate) words: usize,
    pub(crate) deep: &'a Deep,
    pub(crate) width: usize,
    pub(crate) wanted: Wanted,
    pub(crate) buffers: &'a Buffers,
    pub(crate) policy: Policy,
    pub(crate) at_a_time: usize,
}

/// What a forward pass leaves: the prompts' last rows, and a buffer for the way back.
pub(crate) struct Forward {
    pub(crate) ends: Vec<f32>,
    pub(crate) tape: Vec<f32>,
}

/// Gradients to add to.
pub(crate) struct Gradients<'a> {
    /// `(learned rows, width)`.
    pub(crate) learned: &'a mut [f32],
    /// `(deep rows, width)`.
    pub(crate) deep: &'a mut [f32],
}

/// The chunks of a kind with their layouts, and what they read of the other kind.
#[derive(Clone, Copy)]
struct Side<'a> {
    chunks: &'a [Chunk],
    layouts: &'a [Layout],
    before: Option<Before<'a>>,
    records: &'a Records,
    inputs: Inputs<'a>,
}

impl<'a> Side<'a> {
    fn beginnings(plan: &'a Plan, records: &'a Records, inputs: Inputs<'a>) -> Self {
        Self {
            chunks: &plan.beginnings,
            layouts: &records.beginnings,
            before: None,
            records,
            inputs,
        }
    }

    /// `record` is that of the prefixes.
    fn endings(self, plan: &'a Plan, record: &'a [f32]) -> Self {
        let records = self.records;
        Self {
            chunks: &plan.endings,
            layouts: &records.endings,
            before: Some(Before {
                plan,
                records,
                record,
            }),
            ..self
        }
    }

    fn pass(self, i: usize, threads: Threads) -> Pass<'a> {
        Pass {
            chunk: &self.chunks[i],
            layout: &self.layouts[i],
            inputs: self.inputs,
            before: self.before,
            threads,
        }
    }
}

impl Runner<'_> {
    /// The prompts' last rows after the last block, `(prompts, width)`. `keep` if there will be a way back.
    pub(crate) fn forward(&self, inputs: Inputs<'_>, keep: bool) -> Forward {
        let records = self.records(keep);
        let mut tape = self.buffers.take(records.floats());
        let (beginnings, endings) = tape.split_at_mut(records.endings_from());
        let mut ends = vec![0.0; self.plan.prompts * self.width];
        let side = Side::beginnings(self.plan, &records, inputs);
        self.side_forward(side, beginnings, &mut ends);
        self.side_forward(side.endings(self.plan, beginnings), endings, &mut ends);
        Forward { ends, tape }
    }

    fn side_forward(&self, side: Side<'_>, record: &mut [f32], ends: &mut [f32]) {
        let ends = Mutex::new(ends);
        let threads = self.threads(side.chunks.len());
        in_order_into(
            record,
            side.layouts.iter().map(|l| l.floats),
            self.at_a_time,
            |i, part| {
                let mut room = self.buffers.take(side.records.room);
                self.chunk_forward(side.pass(i, threads), part, &mut room, Some(&ends));
                self.buffers.give(room);
            },
            |_, ()| (),
        );
    }

    /// Adds to the gradients, from those of the ends.
    pub(crate) fn backward(
        &self,
        inputs: Inputs<'_>,
        tape: &[f32],
        d_ends: &[f32],
        mut gradients: Gradients<'_>,
    ) {
        let records = self.records(true);
        let (beginnings, endings) = tape.split_at(records.endings_from());
        let mut owed = self.buffers.take(self.owed());
        owed[..self.owed()].fill(0.0);
        let side = Side::beginnings(self.plan, &records, inputs);
        let behind = side.endings(self.plan, beginnings);
        self.side_backward(behind, endings, d_ends, |i, results| {
            let (chunk, results) = self.collect(behind, i, results, &mut gradients);
            let (Some(before), false) = (behind.before, results.debts.is_empty()) else {
                return;
            };
            let mut debts = results.debts.chunks_exact(2 * self.width);
            for group in chunk.groups() {
                for layer in 0..self.blocks.len() {
                    let first = before.debt(group, layer) * 2 * self.width;
                    let owed = owed[first..].chunks_exact_mut(2 * self.width);
                    let rows = owed.take(self.plan.prefixes[group]);
                    rows.zip(&mut debts)
                        .for_each(|(to, debt)| add_into(to, debt));
                }
            }
        });
        if self.wanted.beginnings {
            self.side_backward(side, beginnings, &owed, |i, results| {
                self.collect(side, i, results, &mut gradients);
            });
        }
        self.buffers.give(owed);
    }

    /// The way back of every chunk, once more forward before it where its record does not hold everything. `take` is called
    /// with what each gives, in their order.
    fn side_backward(
        &self,
        side: Side<'_>,
        record: &[f32],
        d_out: &[f32],
        mut take: impl FnMut(usize, &mut [f32]) + Send,
    ) {
        let threads = self.threads(side.chunks.len());
        in_order(
            side.chunks.len(),
            self.at_a_time,
            |i| {
                let pass = side.pass(i, threads);
                let mut room = self.buffers.take(side.records.room);
                let mut results = self.buffers.take(side.records.results);
                if pass.layout.keep == Keep::Everything {
                    let record = &record[pass.layout.first..];
                    self.chunk_backward(pass, record, d_out, &mut room, &mut results);
                } else {
                    let layout = self.layout(pass.chunk, pass.layout.kind, Keep::Everything);
                    let (record, room) = room.split_at_mut(layout.floats);
                    let pass = Pass {
                        layout: &layout,
                        ..pass
                    };
                    self.chunk_forward(pass, record, room, None);
                    self.chunk_backward(pass, record, d_out, room, &mut results);
                }
                self.buffers.give(room);
                results
            },
            |i, mut results| {
                take(i, &mut results);
                self.buffers.give(results);
            },
        );
    }

    /// Adds what a chunk's way back gave to learned rows, and returns it.
    fn collect<'s>(
        &self,
        side: Side<'s>,
        i: usize,
        results: &'s mut [f32],
        gradients: &mut Gradients<'_>,
    ) -> (&'s Chunk, Results<'s>) {
        let (chunk, layout, width) = (&side.chunks[i], &side.layouts[i], self.width);
        let results = self.results(layout, chunk, results);
        for (row, d) in layout.learned.iter().zip(results.learned.chunks(width)) {
            let row = self.plan.places[chunk.first + *row as usize].row as usize - self.words;
            add_into(&mut gradients.learned[row * width..][..width], d);
        }
        add_into(gradients.deep, results.deep);
        (chunk, results)
    }

    /// How many floats a forward and backward pass takes, or a forward pass where there is no way back, with so many learned
    /// and deep rows.
    pub(crate) fn parts(&self, learned: usize, deep: usize) -> Parts {
        let back = self.wanted.any();
        let part = |policy| {
            let runner = Runner { policy, ..*self };
            let records = runner.records(back);
            let owed = if back { self.owed() } else { 0 };
            Part {
                kept: records.floats() + owed,
                each: records.room + AHEAD * records.results,
            }
        };
        // The ends, and these normalised, projected and of unit length; on the way back the gradients of all.
        let features = if back { 8 } else { 4 } * self.plan.prompts;
        let tables = self.words + (1 + usize::from(back)) * (learned + deep);
        Parts {
            save_all: part(Policy::SaveAll),
            two_passes: part(Policy::TwoPasses),
            fixed: (tables + features) * self.width,
        }
    }

    /// Floats of what prefixes are owed: at each block, rows of `2·width`.
    fn owed(&self) -> usize {
        let rows: usize = self.plan.beginnings.iter().map(|c| c.rows).sum();
        usize::from(self.wanted.beginnings) * rows * 2 * self.width * self.blocks.len()
    }

    /// Whether a chunk's products run on all threads: where too few chunks run at a time for one each. Bits are the same.
    fn threads(&self, chunks: usize) -> Threads {
        Threads::for_tasks(chunks.min(self.at_a_time))
    }

    fn layout(&self, chunk: &Chunk, kind: Kind, keep: Keep) -> Layout {
        let rows = 0..chunk.rows as u32;
        let asking = (1..=self.blocks.len()).map(|next| match (next == self.blocks.len(), kind) {
            (true, Kind::Beginning) => Vec::new(),
            (true, Kind::Ending) => chunk.ends().collect(),
            (false, _) if self.deep.rows.is_empty() => rows.clone().collect(),
            (false, _) => {
                let lasts = |row: &u32| self.replacement(chunk, *row as usize, next).is_none();
                rows.clone().filter(lasts).collect()
            }
        });
        let places = self.plan.places[chunk.range()].iter();
        let learned = rows.clone().zip(places);
        let learned = learned.filter(|(_, place)| place.row as usize >= self.words);
        let learned = learned.map(|(row, _)| row).collect();
        Layout::new(chunk, kind, keep, self.width, asking, learned)
    }

    /// What a pass keeps under the policy. `back` if it keeps anything for a way back.
    fn records(&self, back: bool) -> Records {
        let keep = |kind| match (kind, self.policy) {
            (_, Policy::SaveAll) if self.goes_back(kind, back) => Keep::Everything,
            (Kind::Beginning, _) => Keep::Keys,
            (Kind::Ending, _) => Keep::Nothing,
        };
        let layouts = |chunks: &[Chunk], kind| -> Vec<Layout> {
            let layouts = chunks.iter().map(|c| self.layout(c, kind, keep(kind)));
            layouts.collect()
        };
        let beginnings = layouts(&self.plan.beginnings, Kind::Beginning);
        let endings = layouts(&self.plan.endings, Kind::Ending);
        let mut records = Records::new(self.plan, beginnings, endings);
        let beginnings = records.beginnings.iter().zip(&self.plan.beginnings);
        let endings = records.endings.iter().zip(&self.plan.endings);
        let (mut room, mut results) = (0, 0);
        for (layout, chunk) in beginnings.chain(endings) {
            room = room.max(self.room_forward(chunk, layout));
            if self.goes_back(layout.kind, back) {
                room = room.max(self.room_twice(chunk, layout));
                results = results.max(self.results_of(layout, chunk).iter().sum());
            }
        }
        (records.room, records.results) = (room, results);
        records
    }

    /// Whether chunks of a kind have a way back if any has.
    fn goes_back(&self, kind: Kind, back: bool) -> bool {
        back && (kind == Kind::Ending || self.wanted.beginnings)
    }

    /// Floats that a chunk's way back is worked in, with a pass forward before it where its record does not hold everything.
    fn room_twice(&self, chunk: &Chunk, layout: &Layout) -> usize {
        if layout.keep == Keep::Everything {
            return self.room_back(chunk);
        }
        let layout = self.layout(chunk, layout.kind, Keep::Everything);
        let forward = self.room_forward(chunk, &layout);
        layout.floats + forward.max(self.room_back(chunk))
    }
}
