//! The prompt engine: runs declared prompts through the frozen text tower, exactly, and what they share only once.
//!
//! [`plan`] finds out what has to be computed, [`memory`] what may be kept, and [`run`] computes it, as one operation of
//! candle's graph.

pub(crate) mod attend;
pub(crate) mod buffers;
mod chunk;
pub(crate) mod image;
pub(crate) mod memory;
mod order;
pub(crate) mod plan;
mod record;
pub(crate) mod run;
#[cfg(test)]
mod tests;

use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{CpuStorage, CustomOp2, Layout, Shape, Tensor};

use self::buffers::Buffers;
use self::memory::{Forecast, Policy};
use self::plan::Plan;
use self::run::{Deep, Gradients, Inputs, Runner, Wanted};
use crate::Result;
use crate::clip::{Block, FrozenBlock};
use crate::ops::{from_values, values, with_values};

/// The text tower's blocks under a plan, as one operation: learned rows and deep rows in, the prompts' last rows out.
pub(crate) struct Tower {
    pub(crate) blocks: Arc<Vec<Block>>,
    /// Embeddings of the frozen words, `(words, width)`.
    pub(crate) words: Vec<f32>,
    /// `(context, width)`.
    pub(crate) positions: Arc<Vec<f32>>,
    pub(crate) plan: Plan,
    pub(crate) deep: Deep,
    pub(crate) width: usize,
    pub(crate) wanted: Wanted,
    pub(crate) buffers: Arc<Buffers>,
    pub(crate) forecast: Forecast,
    /// What the forward pass keeps for the way back.
    pub(crate) tape: Tape,
}

/// What a forward pass keeps.
#[derive(Debug, Default)]
pub(crate) struct Tape(Mutex<Arc<Vec<f32>>>);

impl Drop for Tower {
    fn drop(&mut self) {
        let tape = self
            .tape
            .0
            .get_mut()
            .unwrap_or_else(PoisonError::into_inner);
        if let Ok(tape) = Arc::try_unwrap(std::mem::take(tape)) {
            self.buffers.give(tape);
        }
    }
}

fn frozen(blocks: &[Block]) -> candle_core::Result<Vec<FrozenBlock<'_>>> {
    let blocks: Option<Vec<FrozenBlock<'_>>> = blocks.iter().map(Block::frozen).collect();
    blocks.ok_or_else(|| candle_core::Error::Msg("the engine runs frozen towers only".into()).bt())
}

/// What a pass over `plan` takes, in the fastest way that `budget` allows.
#[allow(clippy::too_many_arguments)] // everything that a pass depends on
pub(crate) fn forecast(
    blocks: &[Block],
    plan: &Plan,
    words: usize,
    deep: &Deep,
    width: usize,
    wanted: Wanted,
    learned_rows: usize,
    deep_rows: usize,
    budget: Option<u64>,
) -> Result<Forecast> {
    let blocks = frozen(blocks)?;
    let buffers = Buffers::default();
    let runner = Runner {
        blocks: &blocks,
        plan,
        words,
        deep,
        width,
        wanted,
        buffers: &buffers,
        policy: Policy::SaveAll,
        at_a_time: usize::MAX,
    };
    // No more chunks can be worked on than there are.
    let chunks = plan.beginnings.len().max(plan.endings.len()).max(1);
    let threads = rayon::current_num_threads().min(chunks);
    let (policy, at_a_time, step) = runner
        .parts(learned_rows, deep_rows)
        .choose(budget, threads)?;
    let weights = match wanted.any() {
        true => blocks.iter().map(FrozenBlock::bytes_to_come).sum::<usize>(),
        false => 0,
    };
    Ok(Forecast {
        policy,
        chunks_at_a_time: at_a_time,
        rows: plan.rows(),
        step,
        weights: weights as u64,
    })
}

impl Tower {
    /// `learned (rows, width)`, without positions, and `deep (deep rows, width)` → `(prompts, width)`.
    pub(crate) fn apply(self, learned: &Tensor, deep: &Tensor) -> Result<Tensor> {
        let (learned, deep) = (learned.contiguous()?, deep.contiguous()?);
        Ok(match self.wanted.any() {
            true => learned.apply_op2(&deep, self)?,
            false => learned.apply_op2_no_bwd(&deep, &ForwardOnly(self))?,
        })
    }

    /// Calls `f` with what runs the plan.
    fn run<T>(&self, f: impl FnOnce(Runner<'_>) -> T) -> candle_core::Result<T> {
        let blocks = frozen(&self.blocks)?;
        Ok(f(Runner {
            blocks: &blocks,
            plan: &self.plan,
            words: self.words.len() / self.width,
            deep: &self.deep,
            width: self.width,
            wanted: self.wanted,
            buffers: &self.buffers,
            policy: self.forecast.policy,
            at_a_time: self.forecast.chunks_at_a_time,
        }))
    }

    fn inputs<'a>(&'a self, learned: &'a [f32], deep: &'a [f32]) -> Inputs<'a> {
        Inputs {
            words: &self.words,
            learned,
            positions: &self.positions,
            deep,
        }
    }

    fn forward(
        &self,
        (learned, learned_layout): (&CpuStorage, &Layout),
        (deep, deep_layout): (&CpuStorage, &Layout),
        keep: bool,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let inputs = self.inputs(values(learned, learned_layout)?, values(deep, deep_layout)?);
        self.buffers.begin(keep);
        let done = self.run(|runner| runner.forward(inputs, keep))?;
        match keep {
            true => {
                let mut tape = self.tape.0.lock().unwrap_or_else(PoisonError::into_inner);
                *tape = Arc::new(done.tape);
            }
            false => self.buffers.give(done.tape),
        }
        let shape = (self.plan.prompts, self.width);
        Ok((CpuStorage::F32(done.ends), shape.into()))
    }
}

const NAME: &str = "text-tower";

impl CustomOp2 for Tower {
    fn name(&self) -> &'static str {
        NAME
    }

    fn cpu_fwd(
        &self,
        learned: &CpuStorage,
        learned_layout: &Layout,
        deep: &CpuStorage,
        deep_layout: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        self.forward((learned, learned_layout), (deep, deep_layout), true)
    }

    fn bwd(
        &self,
        learned: &Tensor,
        deep: &Tensor,
        _: &Tensor,
        d_ends: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>)> {
        // Not held while the pool runs: a waiting thread may come back here.
        let tape = self
            .tape
            .0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        let mut d_learned = vec![0.0; learned.elem_count()];
        let mut d_deep = vec![0.0; deep.elem_count()];
        with_values(d_ends, |d_ends| {
            with_values(learned, |learned_values| {
                with_values(deep, |deep_values| {
                    let inputs = self.inputs(learned_values, deep_values);
                    let gradients = Gradients {
                        learned: &mut d_learned,
                        deep: &mut d_deep,
                    };
                    self.run(|runner| runner.backward(inputs, &tape, d_ends, gradients))
                })
            })
        })????;
        Ok((
            Some(from_values(d_learned, learned)?),
            Some(from_values(d_deep, deep)?),
        ))
    }
}

/// [`Tower`] for a pass that nobody goes back.
struct ForwardOnly(Tower);

impl CustomOp2 for ForwardOnly {
    fn name(&self) -> &'static str {
        NAME
    }

    fn cpu_fwd(
        &self,
        learned: &CpuStorage,
        learned_layout: &Layout,
        deep: &CpuStorage,
        deep_layout: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        self.0
            .forward((learned, learned_layout), (deep, deep_layout), false)
    }
}
