//! Which rows an image has at every block, and how far down the way back goes.
//!
//! Attention of an image tower does not see order, and prompt tokens carry no position of their own: wherever a method lets
//! them stand, the image's own tokens come out the same. So they always stand behind them, and what is read of a block's
//! output is always its first rows.

use std::ops::Range;

use super::block::Shape;

/// Whose a table's rows are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Whose {
    Everyone,
    /// Every image has its own.
    Image,
    /// Every set has its own.
    Set,
}

/// Rows of the table that join the tokens at a block: `rows` for each of those whose they are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Joining {
    /// First row in the table.
    pub(crate) first: usize,
    pub(crate) rows: usize,
    pub(crate) whose: Whose,
    pub(crate) learned: bool,
}

impl Joining {
    /// The rows of a run.
    pub(crate) fn of(&self, run: Run) -> Range<usize> {
        let number = match self.whose {
            Whose::Everyone => 0,
            Whose::Image => run.image,
            Whose::Set => run.set,
        };
        let first = self.first + number * self.rows;
        first..first + self.rows
    }
}

/// An image with a set of prompts.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Run {
    pub(crate) image: usize,
    pub(crate) set: usize,
}

/// What happens at a block.
#[derive(Clone, Debug, Default)]
pub(crate) struct Declared {
    /// Whether the prompt tokens that come from below are dropped.
    pub(crate) replaces: bool,
    pub(crate) joining: Vec<Joining>,
    /// Their rows of the table.
    pub(crate) table: Range<usize>,
}

/// A block of the plan.
#[derive(Clone, Debug)]
pub(crate) struct Stage {
    pub(crate) joining: Vec<Joining>,
    /// Rows of the table that join here, for all runs.
    pub(crate) table: Range<usize>,
    /// Whether what joins runs through the block; if not, its output is not read, and only its keys and values are computed.
    pub(crate) live: bool,
    /// Rows that come from the block below.
    pub(crate) carried: usize,
    pub(crate) shape: Shape,
}

impl Stage {
    /// Rows that join a run.
    pub(crate) fn joined(&self) -> usize {
        self.joining.iter().map(|j| j.rows).sum()
    }
}

/// What has a gradient.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Wanted {
    /// Rows of the table.
    pub(crate) table: bool,
    /// Gains and biases of the blocks' LayerNorms.
    pub(crate) norms: bool,
    /// Patches, or the tokens that the first block reads.
    pub(crate) input: bool,
}

impl Wanted {
    pub(crate) fn any(self) -> bool {
        self.table || self.norms || self.input
    }
}

/// A plan. It depends on the declaration and the number of images alone.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    /// The tower's block that is the first stage.
    pub(crate) first: usize,
    pub(crate) stages: Vec<Stage>,
    /// Tokens of an image: class token and patches.
    pub(crate) tokens: usize,
    pub(crate) width: usize,
    pub(crate) images: usize,
    pub(crate) sets: usize,
    /// The table's first rows, which pass `ln_pre` before they join.
    pub(crate) normed: usize,
    /// Rows of the table.
    pub(crate) table: usize,
    /// The first stage at which the runs of one image differ or something has to be kept.
    pub(crate) parting: usize,
    /// The stage at which the way back ends; behind the last if there is none.
    pub(crate) lowest: usize,
    pub(crate) wanted: Wanted,
}

/// What a plan is made of.
pub(crate) struct Outline {
    pub(crate) first: usize,
    pub(crate) declared: Vec<Declared>,
    pub(crate) tokens: usize,
    pub(crate) width: usize,
    pub(crate) images: usize,
    pub(crate) sets: usize,
    pub(crate) normed: usize,
    pub(crate) table: usize,
    /// Tokens that are read after the last stage, the first ones.
    pub(crate) read: usize,
    pub(crate) wanted: Wanted,
}

impl Plan {
    /// At least one stage.
    pub(crate) fn new(outline: Outline) -> Self {
        let Outline {
            first,
            declared,
            tokens,
            width,
            images,
            sets,
            normed,
            table,
            read,
            wanted,
        } = outline;
        let mut stages = Vec::with_capacity(declared.len());
        let mut carried = tokens;
        for (i, at) in declared.iter().enumerate() {
            let next = declared.get(i + 1);
            let live = next.is_some_and(|next| !next.replaces);
            let joined: usize = at.joining.iter().map(|j| j.rows).sum();
            let (rows, guests) = match live {
                true => (carried + joined, 0),
                false => (carried, joined),
            };
            let asking = match (next, live) {
                (None, _) => read,
                (_, true) => rows,
                (_, false) => tokens,
            };
            stages.push(Stage {
                joining: at.joining.clone(),
                table: at.table.clone(),
                live,
                carried,
                shape: Shape {
                    rows,
                    keys: rows + guests,
                    asking,
                    width,
                },
            });
            carried = asking;
        }
        let last = stages.len().saturating_sub(1);
        let stage_with = |found: &dyn Fn(&Joining) -> bool| {
            let mut stages = stages.iter();
            stages.position(|s| s.joining.iter().any(found))
        };
        let lowest = match wanted {
            Wanted { norms: true, .. } | Wanted { input: true, .. } => 0,
            Wanted { table: true, .. } => stage_with(&|j| j.learned).unwrap_or(stages.len()),
            _ => stages.len(),
        };
        let parting = stage_with(&|_| true).unwrap_or(last).min(lowest).min(last);
        Self {
            first,
            stages,
            tokens,
            width,
            images,
            sets,
            normed,
            table,
            parting,
            lowest,
            wanted,
        }
    }

    /// Image by image within each set.
    pub(crate) fn runs(&self) -> usize {
        self.images * self.sets
    }

    pub(crate) fn run(&self, number: usize) -> Run {
        Run {
            image: number % self.images,
            set: number / self.images,
        }
    }

    /// Rows that are read of each run after the last stage.
    pub(crate) fn read(&self) -> usize {
        self.stages.last().map_or(0, |s| s.shape.asking)
    }

    /// The first row of a stage whose gradient is wanted.
    pub(crate) fn from(&self, stage: usize) -> usize {
        match stage == self.lowest && !self.wanted.norms && !self.wanted.input {
            true => self.stages[stage].carried,
            false => 0,
        }
    }

    /// Rows that run through the blocks, for one pass over one image and set, of all stages.
    pub(crate) fn rows(&self) -> usize {
        self.stages.iter().map(|s| s.shape.rows).max().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TOKENS: usize = 5;

    /// A plan of blocks at which so many shared, learned rows join, dropping what was there or not.
    fn plan(blocks: &[(bool, usize)], read: usize) -> Plan {
        let mut first = 0;
        let declared = blocks.iter().map(|&(replaces, rows)| {
            let joining = Joining {
                first,
                rows,
                whose: Whose::Everyone,
                learned: true,
            };
            first += rows;
            Declared {
                replaces,
                joining: (rows > 0).then_some(joining).into_iter().collect(),
                table: first - rows..first,
            }
        });
        let declared = declared.collect();
        Plan::new(Outline {
            first: 0,
            declared,
            tokens: TOKENS,
            width: 64,
            images: 2,
            sets: 1,
            normed: 0,
            table: first,
            read,
            wanted: Wanted {
                table: true,
                ..Wanted::default()
            },
        })
    }

    /// `(rows, keys, asking)` of every stage.
    fn shapes(plan: &Plan) -> Vec<(usize, usize, usize)> {
        let shape = |s: &Stage| (s.shape.rows, s.shape.keys, s.shape.asking);
        plan.stages.iter().map(shape).collect()
    }

    #[test]
    fn tokens_that_are_replaced_give_keys_and_values_only() {
        let deep = plan(&[(false, 2), (true, 2), (true, 2)], 1);
        assert_eq!(shapes(&deep), [(5, 7, 5), (5, 7, 5), (5, 7, 1)]);
        assert_eq!((deep.parting, deep.lowest), (0, 0));
        // Nothing of the image itself is learned, so at the lowest block no gradient of its rows is wanted.
        assert_eq!((deep.from(0), deep.from(1)), (5, 0));
    }

    #[test]
    fn tokens_that_stay_run_along_until_something_replaces_them() {
        let shallow = plan(&[(false, 2), (false, 0), (false, 0)], 1);
        assert_eq!(shapes(&shallow), [(7, 7, 7), (7, 7, 7), (7, 7, 1)]);
        assert_eq!(shallow.from(0), 5);
        let mixed = plan(&[(false, 2), (false, 1), (true, 3)], TOKENS);
        assert_eq!(shapes(&mixed), [(7, 7, 7), (7, 8, 5), (5, 8, 5)]);
        let dropped = plan(&[(false, 2), (true, 0)], 1);
        assert_eq!(shapes(&dropped), [(5, 7, 5), (5, 5, 1)]);
    }

    #[test]
    fn below_the_first_prompt_the_way_is_one_for_all() {
        let late = plan(&[(false, 0), (false, 0), (true, 2), (true, 2)], 1);
        assert_eq!((late.parting, late.lowest), (2, 2));
        assert_eq!(shapes(&late), [(5, 5, 5), (5, 5, 5), (5, 7, 5), (5, 7, 1)]);
        let none = plan(&[(false, 0), (false, 0)], 1);
        assert_eq!((none.parting, none.lowest), (1, 2));
    }
}
