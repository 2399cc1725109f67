//! What a pass keeps, and how much memory it takes: known from the plan before anything runs.

use crate::{Error, Result};

/// What a forward pass keeps for its way back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Policy {
    /// Everything: forward once, backward once.
    SaveAll,
    /// Of prefixes keys and values, of suffixes nothing: each chunk runs forward again before it goes back. About half as
    /// long again. Of the memory only features and their gradients grow with the number of prompts; prefixes do with that of
    /// contexts. In the image tower the input of every block is kept, and each block runs forward again before it goes back.
    TwoPasses,
}

/// Memory of a forward and backward pass, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Forecast {
    /// The policy that fits the budget.
    pub policy: Policy,
    /// Chunks that are worked on at a time: as many as there are threads, or fewer to fit the budget.
    pub chunks_at_a_time: usize,
    /// Rows that run through the tower at each block; prompts of 77 positions would have `77 · prompts`.
    pub rows: usize,
    /// What the pass takes: what is kept, what is worked in, gradients, and the features.
    pub step: u64,
    /// Frozen matrices laid out for the way back, which the first backward pass makes and later ones find.
    pub weights: u64,
}

impl Forecast {
    /// By how much the process grows: [`Forecast::step`] and [`Forecast::weights`].
    pub fn bytes(&self) -> u64 {
        self.step + self.weights
    }
}

/// Floats of a pass.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Parts {
    pub(crate) save_all: Part,
    pub(crate) two_passes: Part,
    /// What it takes whatever the policy: tables, features, gradients.
    pub(crate) fixed: usize,
}

/// Floats that depend on the policy.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Part {
    /// Kept until the way back.
    pub(crate) kept: usize,
    /// For each chunk that is worked on at a time.
    pub(crate) each: usize,
}

impl Parts {
    fn bytes(&self, policy: Policy, at_a_time: usize) -> u64 {
        let part = match policy {
            Policy::SaveAll => self.save_all,
            Policy::TwoPasses => self.two_passes,
        };
        4 * (self.fixed + part.kept + at_a_time * part.each) as u64
    }

    /// The fastest way that fits into `budget` bytes, and what it takes.
    ///
    /// The bits of a result do not depend on it: chunks are the same, and so is the order in which their parts are summed.
    pub(crate) fn choose(
        &self,
        budget: Option<u64>,
        threads: usize,
    ) -> Result<(Policy, usize, u64)> {
        let ways = std::iter::once((Policy::SaveAll, threads))
            .chain((1..=threads).rev().map(|n| (Policy::TwoPasses, n)));
        let mut least = u64::MAX;
        for (policy, at_a_time) in ways {
            let bytes = self.bytes(policy, at_a_time);
            if budget.is_none_or(|budget| bytes <= budget) {
                return Ok((policy, at_a_time, bytes));
            }
            least = least.min(bytes);
        }
        Err(Error::Memory {
            needed: least,
            budget: budget.unwrap_or(0),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_fastest_way_that_fits_is_taken() {
        let parts = Parts {
            save_all: Part {
                kept: 1000,
                each: 20,
            },
            two_passes: Part {
                kept: 10,
                each: 100,
            },
            fixed: 5,
        };
        let all = 4 * (5 + 1000 + 4 * 20);
        assert_eq!(parts.choose(None, 4).unwrap(), (Policy::SaveAll, 4, all));
        assert_eq!(parts.choose(Some(all), 4).unwrap().0, Policy::SaveAll);
        let two = |n: u64| 4 * (15 + 100 * n);
        assert_eq!(
            parts.choose(Some(all - 1), 4).unwrap(),
            (Policy::TwoPasses, 4, two(4))
        );
        assert_eq!(
            parts.choose(Some(two(3) - 1), 4).unwrap(),
            (Policy::TwoPasses, 2, two(2))
        );
        match parts.choose(Some(two(1) - 1), 4) {
            Err(Error::Memory { needed, .. }) => assert_eq!(needed, two(1)),
            other => panic!("{other:?}"),
        }
    }
}
