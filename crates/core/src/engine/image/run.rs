//! Runs a plan through the image tower's blocks, forward and backward.
//!
//! Every image with every set of prompts is a run, and runs through all blocks by itself. What runs have in common is done
//! once: the way to the first block at which they part, and the keys and values of prompt rows whose output nobody reads. On
//! the way back each run says what it owes to the rows of the table; these debts are added in the order of the runs, and then
//! the rows go back through the norms and projections that they passed. So the bits depend on the declaration alone, not on
//! the threads nor on what is kept.

use rayon::prelude::*;

use super::block::{self, Kept, Made, Shape, Until};
use super::plan::{Plan, Run, Stage};
use crate::clip::FrozenBlock;
use crate::engine::buffers::{Buffers, Cut};
use crate::engine::memory::{Part, Parts, Policy};
use crate::engine::order::{AHEAD, in_order, in_order_into};
use crate::kernels::rows::add_into;
use crate::ops::{FrozenNorm, Threads};

/// What stands before and under the patches.
#[derive(Debug)]
pub(crate) struct Entry {
    /// `(width)`.
    pub(crate) class_embedding: Vec<f32>,
    /// `(1 + grid², width)`.
    pub(crate) positions: Vec<f32>,
}

impl Entry {
    /// Class token and patches `(grid², width)` at their places: `(1 + grid², width)`, before `ln_pre`.
    pub(crate) fn embed(&self, patches: &[f32], out: &mut [f32]) {
        let width = self.class_embedding.len();
        out[..width].copy_from_slice(&self.class_embedding);
        out[width..].copy_from_slice(patches);
        add_into(out, &self.positions);
    }
}

/// What the runs start from.
#[derive(Clone, Copy)]
pub(crate) struct Inputs<'a> {
    /// Rows of the prompts, `(rows, width)`.
    pub(crate) table: &'a [f32],
    /// `(images, grid², width)`, or the tokens that the first block reads, `(images, 1 + grid², width)`.
    pub(crate) input: &'a [f32],
}

/// Gradients to be filled, of those arguments of which they are wanted.
pub(crate) struct Gradients {
    pub(crate) table: Vec<f32>,
    /// `(4·stages, width)`: by block gain and bias of `ln_1` and of `ln_2`.
    pub(crate) norms: Vec<f32>,
    pub(crate) input: Vec<f32>,
}

/// What a forward pass keeps, in buffers.
#[derive(Debug, Default)]
pub(crate) struct Tape {
    /// See [`Shared`].
    shared: Vec<f32>,
    /// Run after run, see [`Layout`].
    records: Vec<f32>,
}

impl Tape {
    pub(crate) fn give(self, buffers: &Buffers) {
        buffers.give(self.shared);
        buffers.give(self.records);
    }
}

/// What a forward pass leaves: the rows that are read, `(runs, read, width)`, and buffers for the way back.
pub(crate) struct Forward {
    pub(crate) ends: Vec<f32>,
    pub(crate) tape: Tape,
}

/// The prompts' rows as they join, `(rows, width)`, and of those whose output is not read the keys and values,
/// `(rows, 3·width)`.
#[derive(Clone, Copy)]
struct Shared<'a> {
    rows: &'a [f32],
    keys: &'a [f32],
}

/// Where a run's record has what it keeps of each stage: the block's input, and behind it what the block makes.
struct Layout {
    /// By stage; none of those that nobody goes back to.
    firsts: Vec<Option<usize>>,
    /// Whether more than the inputs is kept.
    made: bool,
    floats: usize,
}

/// Where a run's way back puts what it owes.
struct Owing {
    /// By stage: gradients of the rows that join, `width` of each that runs along, else `3·width`.
    firsts: Vec<usize>,
    /// Gradients of gains and biases, of the tokens that the first stage reads.
    norms: usize,
    input: usize,
    floats: usize,
}

/// The tower's blocks with a plan to run.
#[derive(Clone, Copy)]
pub(crate) struct Runner<'a> {
    /// Those of the stages.
    pub(crate) blocks: &'a [FrozenBlock<'a>],
    pub(crate) entry: Option<&'a Entry>,
    pub(crate) ln_pre: &'a FrozenNorm,
    pub(crate) plan: &'a Plan,
    pub(crate) buffers: &'a Buffers,
    pub(crate) policy: Policy,
    pub(crate) at_a_time: usize,
}

impl Runner<'_> {
    /// The rows that are read. `keep` if there will be a way back.
    pub(crate) fn forward(&self, inputs: Inputs<'_>, keep: bool) -> Forward {
        let (plan, buffers) = (self.plan, self.buffers);
        let mut shared = buffers.take(4 * plan.table * plan.width);
        self.prepare(inputs.table, &mut shared);
        let starts = self.starts(inputs.input);
        let layout = self.layout(keep);
        let mut records = buffers.take(layout.floats * plan.runs());
        let read = plan.read() * plan.width;
        let mut ends = vec![0.0; plan.runs() * read];
        let threads = self.threads(plan.runs());
        in_order_into(
            &mut records,
            std::iter::repeat_n(layout.floats, plan.runs()),
            self.at_a_time,
            |i, record| {
                let run = plan.run(i);
                self.run_forward(run, self.shared(&shared), &starts, &layout, record, threads)
            },
            |i, own: Vec<f32>| {
                ends[i * read..][..read].copy_from_slice(&own[..read]);
                buffers.give(own);
            },
        );
        buffers.give(starts);
        let tape = Tape { shared, records };
        Forward { ends, tape }
    }

    /// Fills the gradients, from those of the rows that were read.
    pub(crate) fn backward(
        &self,
        inputs: Inputs<'_>,
        tape: &Tape,
        d_ends: &[f32],
        d: &mut Gradients,
    ) {
        let (plan, buffers, width) = (self.plan, self.buffers, self.plan.width);
        let (layout, owing) = (self.layout(true), self.owing());
        let shared = self.shared(&tape.shared);
        let mut d_table = buffers.take(4 * plan.table * width);
        d_table[..4 * plan.table * width].fill(0.0);
        let (d_rows, d_keys) = d_table.split_at_mut(plan.table * width);
        let tokens = plan.tokens * width;
        let starts = if plan.wanted.input {
            plan.images * tokens
        } else {
            0
        };
        let mut d_starts = buffers.take(starts);
        d_starts[..starts].fill(0.0);
        let read = plan.read() * width;
        let threads = self.threads(plan.runs());
        in_order(
            plan.runs(),
            self.at_a_time,
            |i| {
                let record = &tape.records[i * layout.floats..][..layout.floats];
                let d_ends = &d_ends[i * read..][..read];
                let run = plan.run(i);
                self.run_backward(run, shared, &layout, record, d_ends, &owing, threads)
            },
            |i, own| {
                let run = plan.run(i);
                for (stage, first) in plan.stages.iter().zip(&owing.firsts).skip(plan.lowest) {
                    let mut own = &own[*first..];
                    let (sum, each) = match stage.live {
                        true => (&mut *d_rows, width),
                        false => (&mut *d_keys, 3 * width),
                    };
                    for joining in &stage.joining {
                        let (part, rest) = own.split_at(joining.rows * each);
                        add_into(&mut sum[joining.of(run).start * each..][..part.len()], part);
                        own = rest;
                    }
                }
                add_into(&mut d.norms, &own[owing.norms..]);
                if plan.wanted.input {
                    add_into(
                        &mut d_starts[run.image * tokens..][..tokens],
                        &own[owing.input..],
                    );
                }
                buffers.give(own);
            },
        );
        self.finish_table(inputs.table, shared, d_rows, d_keys, d);
        self.finish_input(inputs.input, &d_starts, &mut d.input);
        buffers.give(d_table);
        buffers.give(d_starts);
    }

    /// How many floats the parts of a pass take, `with_entry` if it begins with patches.
    pub(crate) fn parts(&self, with_entry: bool) -> Parts {
        let (plan, width) = (self.plan, self.plan.width);
        let back = plan.wanted.any();
        let kept = |policy| Self { policy, ..*self }.layout(back).floats * plan.runs();
        let owing = AHEAD * self.owing().floats;
        let forward = self.work_forward() + AHEAD * plan.read() * width;
        let part = |policy, again| Part {
            kept: kept(policy),
            each: match back {
                true => forward.max(self.work_back() + again + owing),
                false => forward,
            },
        };
        let tokens = plan.images * plan.tokens * width;
        let input = match with_entry {
            true => tokens - plan.images * width,
            false => tokens,
        };
        let mut fixed = 5 * plan.table * width + tokens + 4 * plan.runs() * plan.read() * width;
        if back {
            fixed += 5 * plan.table * width;
        }
        if plan.wanted.input {
            fixed += tokens + 2 * input;
        }
        Parts {
            save_all: part(Policy::SaveAll, 0),
            two_passes: part(Policy::TwoPasses, self.work_again()),
            fixed,
        }
    }

    /// Whether a run's products run on all threads: where too few run at a time for one each. Bits are the same.
    fn threads(&self, tasks: usize) -> Threads {
        Threads::for_tasks(tasks.min(self.at_a_time))
    }

    fn shared<'s>(&self, buffer: &'s [f32]) -> Shared<'s> {
        let (rows, keys) = buffer.split_at(self.plan.table * self.plan.width);
        Shared { rows, keys }
    }

    /// Stages with their numbers and blocks.
    fn stages(
        &self,
    ) -> impl DoubleEndedIterator<Item = (usize, &Stage, &FrozenBlock<'_>)> + ExactSizeIterator
    {
        let stages = self.plan.stages.iter().enumerate();
        stages
            .zip(self.blocks)
            .map(|((i, stage), block)| (i, stage, block))
    }

    fn largest(&self, f: impl Fn(usize, Shape) -> usize) -> usize {
        let stages = self.plan.stages.iter().enumerate();
        stages.map(|(i, s)| f(i, s.shape)).max().unwrap_or(0)
    }

    fn work_forward(&self) -> usize {
        let width = self.plan.width;
        self.largest(|_, s| s.rows * width)
            + self.largest(|_, s| s.room())
            + self.largest(|_, s| s.made_in_passing())
            + self.plan.read() * width
    }

    fn work_back(&self) -> usize {
        let width = self.plan.width;
        let from = |stage| {
            if stage < self.plan.lowest {
                0
            } else {
                self.plan.from(stage)
            }
        };
        self.largest(|_, s| s.rows * width) + self.largest(|i, s| s.room_back(from(i)))
    }

    /// What it takes to make again what was not kept.
    fn work_again(&self) -> usize {
        let width = self.plan.width;
        self.largest(|_, s| s.rows * width)
            + self.largest(|_, s| s.room())
            + self.largest(|_, s| s.made())
    }

    fn layout(&self, keep: bool) -> Layout {
        let made = self.policy == Policy::SaveAll;
        let mut floats = 0;
        let firsts = self.plan.stages.iter().enumerate().map(|(i, stage)| {
            if !keep || i < self.plan.lowest {
                return None;
            }
            let first = floats;
            let shape = stage.shape;
            floats += shape.rows * shape.width + if made { shape.made() } else { 0 };
            Some(first)
        });
        Layout {
            firsts: firsts.collect(),
            made,
            floats,
        }
    }

    fn owing(&self) -> Owing {
        let (plan, width) = (self.plan, self.plan.width);
        let mut at = 0;
        let firsts = plan.stages.iter().enumerate().map(|(i, stage)| {
            let first = at;
            if i >= plan.lowest {
                at += stage.joined() * if stage.live { width } else { 3 * width };
            }
            first
        });
        let firsts = firsts.collect();
        let norms = at;
        if plan.wanted.norms {
            at += 4 * plan.stages.len() * width;
        }
        let input = at;
        if plan.wanted.input {
            at += plan.tokens * width;
        }
        Owing {
            firsts,
            norms,
            input,
            floats: at,
        }
    }

    /// Fills the buffer of [`Shared`].
    fn prepare(&self, table: &[f32], shared: &mut [f32]) {
        let (plan, width) = (self.plan, self.plan.width);
        let (rows, keys) = shared.split_at_mut(plan.table * width);
        let normed = plan.normed * width;
        self.ln_pre.normalise(&table[..normed], &mut rows[..normed]);
        rows[normed..].copy_from_slice(&table[normed..plan.table * width]);
        let rows = &*rows;
        let mut cut = Cut::new(keys);
        let parts: Vec<_> = self
            .stages()
            .map(|(_, stage, block)| (stage, block, cut.take(stage.table.len() * 3 * width)))
            .filter(|(stage, ..)| !stage.live && !stage.table.is_empty())
            .collect();
        parts.into_par_iter().for_each(|(stage, block, keys)| {
            let (own, n) = (self.of_stage(rows, stage), stage.table.len());
            let mut normed = self.buffers.take(n * width);
            block.ln_1.normalise(own, &mut normed[..n * width]);
            block.in_proj.apply_keys(&normed, n, keys);
            self.buffers.give(normed);
        });
    }

    /// A stage's part of rows of the table.
    fn of_stage<'s>(&self, rows: &'s [f32], stage: &Stage) -> &'s [f32] {
        let width = self.plan.width;
        &rows[stage.table.start * width..stage.table.end * width]
    }

    /// Every image's tokens where its runs part, `(images, tokens, width)`, in a buffer.
    fn starts(&self, input: &[f32]) -> Vec<f32> {
        let (plan, width) = (self.plan, self.plan.width);
        let size = plan.tokens * width;
        let mut starts = self.buffers.take(plan.images * size);
        let each = input.len() / plan.images;
        let threads = self.threads(plan.images);
        in_order_into(
            &mut starts,
            std::iter::repeat_n(size, plan.images),
            self.at_a_time,
            |i, x| {
                let input = &input[i * each..][..each];
                let mut work = self.buffers.take(self.work_forward().max(size));
                match self.entry {
                    Some(entry) => {
                        entry.embed(input, &mut work[..size]);
                        self.ln_pre.normalise(&work[..size], x);
                    }
                    None => x.copy_from_slice(input),
                }
                for (_, stage, block) in self.stages().take(plan.parting) {
                    let mut cut = Cut::new(&mut work);
                    let shape = stage.shape;
                    let made = Made::in_passing(cut.take(shape.made_in_passing()), shape);
                    let room = cut.take(shape.room());
                    block::forward(block, shape, x, made, room, threads, Until::Output);
                }
                self.buffers.give(work);
            },
            |_, ()| (),
        );
        starts
    }

    /// Copies the keys and values of a run's guests behind those of its rows.
    fn seat_guests(&self, stage: &Stage, run: Run, shared: Shared<'_>, qkv: &mut [f32]) {
        let each = 3 * self.plan.width;
        let mut cut = Cut::new(&mut qkv[stage.shape.rows * each..]);
        for joining in stage.joining.iter().filter(|_| !stage.live) {
            let rows = joining.of(run);
            cut.take(rows.len() * each)
                .copy_from_slice(&shared.keys[rows.start * each..rows.end * each]);
        }
    }

    /// One run from where it parts from the others. Gives the rows that are read.
    fn run_forward(
        &self,
        run: Run,
        shared: Shared<'_>,
        starts: &[f32],
        layout: &Layout,
        record: &mut [f32],
        threads: Threads,
    ) -> Vec<f32> {
        let (plan, width) = (self.plan, self.plan.width);
        let mut work = self.buffers.take(self.work_forward());
        let mut cut = Cut::new(&mut work);
        let x = cut.take(self.largest(|_, s| s.rows * width));
        let room = cut.take(self.largest(|_, s| s.room()));
        let passing = cut.take(self.largest(|_, s| s.made_in_passing()));
        let tokens = plan.tokens * width;
        x[..tokens].copy_from_slice(&starts[run.image * tokens..][..tokens]);
        for (i, stage, block) in self.stages().skip(plan.parting) {
            let shape = stage.shape;
            let mut cut = Cut::new(&mut x[stage.carried * width..]);
            for joining in stage.joining.iter().filter(|_| stage.live) {
                let rows = joining.of(run);
                cut.take(rows.len() * width)
                    .copy_from_slice(&shared.rows[rows.start * width..rows.end * width]);
            }
            let made = match layout.firsts[i] {
                Some(first) => {
                    let (input, rest) = record[first..].split_at_mut(shape.rows * width);
                    input.copy_from_slice(&x[..shape.rows * width]);
                    match layout.made {
                        true => Made::kept(rest, shape),
                        false => Made::in_passing(passing, shape),
                    }
                }
                None => Made::in_passing(passing, shape),
            };
            self.seat_guests(stage, run, shared, made.qkv);
            block::forward(block, shape, x, made, room, threads, Until::Output);
        }
        let read = plan.read() * width;
        let mut own = self.buffers.take(read);
        own[..read].copy_from_slice(&x[..read]);
        self.buffers.give(work);
        own
    }

    /// The way back of one run, in a buffer as [`Owing`] says.
    #[allow(clippy::too_many_arguments)] // a run with what it reads
    fn run_backward(
        &self,
        run: Run,
        shared: Shared<'_>,
        layout: &Layout,
        record: &[f32],
        d_ends: &[f32],
        owing: &Owing,
        threads: Threads,
    ) -> Vec<f32> {
        let (plan, width) = (self.plan, self.plan.width);
        let mut own = self.buffers.take(owing.floats);
        own[owing.norms..owing.input].fill(0.0);
        let again = if layout.made { 0 } else { self.work_again() };
        let mut work = self.buffers.take(self.work_back() + again);
        let mut cut = Cut::new(&mut work);
        let d = cut.take(self.largest(|_, s| s.rows * width));
        let room = cut.take(self.work_back() - d.len());
        let again = cut.take(again);
        d[..d_ends.len()].copy_from_slice(d_ends);
        for (i, stage, block) in self.stages().skip(plan.lowest).rev() {
            let shape = stage.shape;
            let Some(first) = layout.firsts[i] else {
                continue;
            };
            let (x, rest) = record[first..].split_at(shape.rows * width);
            let made = match layout.made {
                true => rest,
                false => self.make_again(stage, block, run, shared, x, again, threads),
            };
            let kept = Kept::new(x, made, shape);
            let d_norms = match plan.wanted.norms {
                true => &mut own[owing.norms + i * 4 * width..][..4 * width],
                false => &mut [],
            };
            let d_guests = block::backward(
                block,
                shape,
                &kept,
                plan.from(i),
                d,
                d_norms,
                room,
                threads,
                self.buffers,
            );
            let owed = match stage.live {
                true => &d[stage.carried * width..shape.rows * width],
                false => d_guests,
            };
            own[owing.firsts[i]..][..owed.len()].copy_from_slice(owed);
        }
        if plan.wanted.input {
            let tokens = plan.tokens * width;
            own[owing.input..][..tokens].copy_from_slice(&d[..tokens]);
        }
        self.buffers.give(work);
        own
    }

    /// What a block made on the way forward, from its input, in a part of `work`.
    #[allow(clippy::too_many_arguments)] // a run at a block
    fn make_again<'w>(
        &self,
        stage: &Stage,
        block: &FrozenBlock<'_>,
        run: Run,
        shared: Shared<'_>,
        input: &[f32],
        work: &'w mut [f32],
        threads: Threads,
    ) -> &'w [f32] {
        let shape = stage.shape;
        let mut cut = Cut::new(work);
        let (x, room) = (cut.take(input.len()), cut.take(shape.room()));
        let buffer = cut.take(shape.made());
        x.copy_from_slice(input);
        let made = Made::kept(&mut *buffer, shape);
        self.seat_guests(stage, run, shared, made.qkv);
        block::forward(block, shape, x, made, room, threads, Until::Made);
        buffer
    }

    /// From the gradients of rows as they join, or of their keys and values, to those of the table.
    fn finish_table(
        &self,
        table: &[f32],
        shared: Shared<'_>,
        d_rows: &mut [f32],
        d_keys: &[f32],
        d: &mut Gradients,
    ) {
        let (plan, width) = (self.plan, self.plan.width);
        if !plan.wanted.table && !plan.wanted.norms {
            return;
        }
        for (i, stage, block) in self.stages().skip(plan.lowest) {
            let n = stage.table.len();
            if stage.live || n == 0 {
                continue;
            }
            let d_keys = &d_keys[stage.table.start * 3 * width..stage.table.end * 3 * width];
            let mut d_normed = self.buffers.take(n * width);
            let all = Threads::All;
            block
                .in_proj
                .backward(d_keys, n, &mut d_normed[..n * width], all);
            let x = self.of_stage(shared.rows, stage);
            if plan.wanted.norms {
                let d_ln_1 = &mut d.norms[i * 4 * width..];
                block
                    .ln_1
                    .weights_backward(x, &d_normed[..n * width], d_ln_1);
            }
            let d_own = &mut d_rows[stage.table.start * width..stage.table.end * width];
            block.ln_1.backward(x, &d_normed, d_own);
            self.buffers.give(d_normed);
        }
        if plan.wanted.table {
            let normed = plan.normed * width;
            let (through, past) = d.table.split_at_mut(normed);
            self.ln_pre.backward(&table[..normed], d_rows, through);
            add_into(past, &d_rows[normed..]);
        }
    }

    /// From the gradients of the tokens that the first stage reads to those of the input.
    fn finish_input(&self, input: &[f32], d_starts: &[f32], d_input: &mut [f32]) {
        let (plan, width) = (self.plan, self.plan.width);
        if !plan.wanted.input {
            return;
        }
        let Some(entry) = self.entry else {
            return add_into(d_input, d_starts);
        };
        let (tokens, patches) = (plan.tokens * width, (plan.tokens - 1) * width);
        d_input
            .par_chunks_mut(patches)
            .zip(input.par_chunks(patches))
            .zip(d_starts.par_chunks(tokens))
            .for_each(|((d_input, input), d)| {
                let mut work = self.buffers.take(2 * tokens);
                let (embedded, d_embedded) = work[..2 * tokens].split_at_mut(tokens);
                entry.embed(input, embedded);
                d_embedded.fill(0.0);
                self.ln_pre.backward(embedded, d, d_embedded);
                d_input.copy_from_slice(&d_embedded[width..]);
                self.buffers.give(work);
            });
    }
}
