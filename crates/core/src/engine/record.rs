//! What a pass over a chunk writes down, and where: block by block in one buffer.

use super::buffers::Cut;
use super::plan::{Chunk, Plan};

/// What stays of a pass over a chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Keep {
    /// What the way back reads.
    Everything,
    /// Of a prefix, what suffixes read.
    Keys,
    Nothing,
}

/// Prefixes end with the last block's keys and values, suffixes with their prompts' ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Beginning,
    Ending,
}

/// A chunk's part of the record at one block.
#[derive(Debug)]
pub(super) struct At {
    /// Its first float, from the chunk's on.
    pub(super) first: usize,
    /// The rows that ask: those whose output somebody reads.
    pub(super) asking: Vec<u32>,
}

/// What is written down of a chunk, block by block.
#[derive(Debug)]
pub(super) struct Layout {
    pub(super) keep: Keep,
    pub(super) kind: Kind,
    pub(super) rows: usize,
    pub(super) blocks: Vec<At>,
    pub(super) floats: usize,
    /// The chunk's first float among those of its kind.
    pub(super) first: usize,
    /// The rows of the chunk that are learned.
    pub(super) learned: Vec<u32>,
}

/// Of a chunk at one block: input `(rows, width)`, queries, keys and values `(rows, 3·width)`, and of the rows that ask
/// what is there after attention `(asking, width)` and before the activation `(asking, 4·width)`.
pub(super) struct Kept<'a> {
    pub(super) x: &'a [f32],
    pub(super) qkv: &'a [f32],
    pub(super) middle: &'a [f32],
    pub(super) hidden: &'a [f32],
}

/// [`Kept`] to be written, and the next block's input.
pub(super) struct Making<'a> {
    pub(super) x: &'a mut [f32],
    pub(super) qkv: &'a mut [f32],
    pub(super) middle: &'a mut [f32],
    pub(super) hidden: &'a mut [f32],
    pub(super) next: &'a mut [f32],
}

impl Layout {
    /// Of a chunk whose rows ask as `asking` says, block by block.
    pub(super) fn new(
        chunk: &Chunk,
        kind: Kind,
        keep: Keep,
        width: usize,
        asking: impl Iterator<Item = Vec<u32>>,
        learned: Vec<u32>,
    ) -> Self {
        let mut floats = 0;
        let blocks = asking.map(|asking| {
            let first = floats;
            floats += match keep {
                Keep::Everything => (4 * chunk.rows + 5 * asking.len()) * width,
                Keep::Keys => 3 * chunk.rows * width,
                Keep::Nothing => 0,
            };
            At { first, asking }
        });
        Self {
            keep,
            kind,
            rows: chunk.rows,
            blocks: blocks.collect(),
            floats,
            first: 0,
            learned,
        }
    }

    pub(super) fn kept<'a>(&self, record: &'a [f32], block: usize, width: usize) -> Kept<'a> {
        let At { first, asking } = &self.blocks[block];
        let (x, rest) = record[*first..].split_at(self.rows * width);
        let (qkv, rest) = rest.split_at(3 * self.rows * width);
        let (middle, rest) = rest.split_at(asking.len() * width);
        Kept {
            x,
            qkv,
            middle,
            hidden: &rest[..4 * asking.len() * width],
        }
    }

    /// Where the queries, keys and values of a block begin.
    fn qkv(&self, block: usize, width: usize) -> usize {
        let before = match self.keep {
            Keep::Everything => self.rows * width,
            _ => 0,
        };
        self.blocks[block].first + before
    }

    /// Floats beside the record that a pass forward writes what is not kept to.
    pub(super) fn spare(&self, width: usize) -> usize {
        match self.keep {
            Keep::Everything => 0,
            Keep::Keys => 7 * self.rows * width,
            Keep::Nothing => 10 * self.rows * width,
        }
    }

    pub(super) fn making<'a>(
        &self,
        record: &'a mut [f32],
        spare: &'a mut [f32],
        block: usize,
        width: usize,
    ) -> Making<'a> {
        let At { first, asking } = &self.blocks[block];
        let (rows, asking) = (self.rows * width, asking.len() * width);
        if self.keep == Keep::Everything {
            let mut cut = Cut::new(&mut record[*first..]);
            return Making {
                x: cut.take(rows),
                qkv: cut.take(3 * rows),
                middle: cut.take(asking),
                hidden: cut.take(4 * asking),
                next: match block + 1 == self.blocks.len() {
                    true => &mut [],
                    false => cut.take(rows),
                },
            };
        }
        let mut cut = Cut::new(spare);
        let (even, odd) = (cut.take(rows), cut.take(rows));
        let (x, next) = if block.is_multiple_of(2) {
            (even, odd)
        } else {
            (odd, even)
        };
        let (middle, hidden) = (cut.take(asking), cut.take(4 * asking));
        let qkv = match self.keep {
            Keep::Keys => &mut record[*first..][..3 * rows],
            _ => cut.take(3 * rows),
        };
        Making {
            x,
            qkv,
            middle,
            hidden,
            next,
        }
    }
}

/// What a pass keeps of a whole plan, first of its prefixes and then of its suffixes, and what it is worked in.
pub(super) struct Records {
    pub(super) beginnings: Vec<Layout>,
    pub(super) endings: Vec<Layout>,
    /// Floats that one chunk is worked in, whichever it is.
    pub(super) room: usize,
    /// Floats of what the way back of one chunk gives, whichever it is.
    pub(super) results: usize,
    /// By group: chunk of its prefix and first row there.
    homes: Vec<Option<(usize, usize)>>,
}

impl Records {
    pub(super) fn new(plan: &Plan, mut beginnings: Vec<Layout>, mut endings: Vec<Layout>) -> Self {
        for layouts in [&mut beginnings, &mut endings] {
            let mut at = 0;
            for layout in layouts {
                layout.first = at;
                at += layout.floats;
            }
        }
        let mut homes = vec![None; plan.prefixes.len()];
        for (i, chunk) in plan.beginnings.iter().enumerate() {
            for s in &chunk.sequences {
                homes[s.group] = Some((i, s.start));
            }
        }
        Self {
            beginnings,
            endings,
            room: 0,
            results: 0,
            homes,
        }
    }

    /// Floats of the prefixes.
    pub(super) fn endings_from(&self) -> usize {
        self.beginnings.iter().map(|l| l.floats).sum()
    }

    /// All floats.
    pub(super) fn floats(&self) -> usize {
        self.endings_from() + self.endings.iter().map(|l| l.floats).sum::<usize>()
    }
}

/// The prefixes, run, as suffixes see them.
#[derive(Clone, Copy)]
pub(super) struct Before<'a> {
    pub(super) plan: &'a Plan,
    pub(super) records: &'a Records,
    pub(super) record: &'a [f32],
}

impl<'a> Before<'a> {
    /// Queries, keys and values of a group's prefix at a block, from its first row on, and how many rows it has.
    pub(super) fn prefix(self, group: usize, block: usize, width: usize) -> (&'a [f32], usize) {
        let Some((chunk, start)) = self.records.homes[group] else {
            return (&[], 0);
        };
        let layout = &self.records.beginnings[chunk];
        let first = layout.first + layout.qkv(block, width) + start * 3 * width;
        (&self.record[first..], self.plan.prefixes[group])
    }

    /// Where the debts to a group's prefix at a block begin, in rows of `2·width`: those to a chunk of prefixes lie one after
    /// the other, each block by block.
    pub(super) fn debt(self, group: usize, block: usize) -> usize {
        let Some((chunk, start)) = self.records.homes[group] else {
            return 0;
        };
        let blocks = self.records.beginnings[chunk].blocks.len();
        let chunk = &self.plan.beginnings[chunk];
        chunk.first * blocks + chunk.rows * block + start
    }
}
