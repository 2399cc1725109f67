//! What a pass over a chunk writes down, and where: block by block in one buffer.

use super::buffers::Cut;

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

/// Where a chunk's parts of every block lie, from its first float on.
#[derive(Debug)]
pub(super) struct Layout {
    pub(super) keep: Keep,
    pub(super) rows: usize,
    /// By block: where its part begins, and how many rows ask there.
    pub(super) blocks: Vec<(usize, usize)>,
    pub(super) floats: usize,
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
    pub(super) fn kept<'a>(&self, record: &'a [f32], block: usize, width: usize) -> Kept<'a> {
        let (first, asking) = self.blocks[block];
        let (x, rest) = record[first..].split_at(self.rows * width);
        let (qkv, rest) = rest.split_at(3 * self.rows * width);
        let (middle, rest) = rest.split_at(asking * width);
        Kept {
            x,
            qkv,
            middle,
            hidden: &rest[..4 * asking * width],
        }
    }

    /// Where the queries, keys and values of a block begin.
    pub(super) fn qkv(&self, block: usize, width: usize) -> usize {
        let before = match self.keep {
            Keep::Everything => self.rows * width,
            _ => 0,
        };
        self.blocks[block].0 + before
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
        let (first, asking) = self.blocks[block];
        let (rows, asking) = (self.rows * width, asking * width);
        if self.keep == Keep::Everything {
            let mut cut = Cut::new(&mut record[first..]);
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
            Keep::Keys => &mut record[first..][..3 * rows],
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
