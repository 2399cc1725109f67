//! The prompt engine's image side: runs declared visual prompts through the frozen vision transformer.
//!
//! [`plan`] finds out which rows there are and which of them are read, [`block`] and [`attend`] compute one image at one
//! block, and [`run`] all images at all blocks, as one operation of candle's graph.

pub(crate) mod attend;
pub(crate) mod block;
pub(crate) mod plan;
pub(crate) mod run;

use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{CpuStorage, CustomOp3, Layout, Shape, Tensor};

use self::plan::Plan;
use self::run::{Entry, Gradients, Inputs, Runner, Tape};
use super::buffers::Buffers;
use super::memory::{Forecast, Policy};
use crate::Result;
use crate::clip::{Block, FrozenBlock};
use crate::ops::{FrozenNorm, from_values, values, with_values};

/// Some of the image tower's blocks under a plan, as one operation: the table of prompt rows, the LayerNorms' gains and biases
/// and the images' patches or tokens in, the rows that are read out.
pub(crate) struct Tower {
    pub(crate) blocks: Arc<Vec<Block>>,
    /// What the patches pass before the first block; none if the input is a block's input already.
    pub(crate) entry: Option<Arc<Entry>>,
    /// What prompt rows pass before the first block.
    pub(crate) ln_pre: FrozenNorm,
    pub(crate) plan: Plan,
    /// Whether the second argument holds gains and biases in place of the blocks' own.
    pub(crate) normed: bool,
    pub(crate) buffers: Arc<Buffers>,
    pub(crate) forecast: Forecast,
    /// What the forward pass keeps for the way back.
    pub(crate) kept: Kept,
}

/// What a forward pass keeps.
#[derive(Debug, Default)]
pub(crate) struct Kept(Mutex<Arc<Tape>>);

impl Drop for Tower {
    fn drop(&mut self) {
        let kept = self
            .kept
            .0
            .get_mut()
            .unwrap_or_else(PoisonError::into_inner);
        if let Ok(tape) = Arc::try_unwrap(std::mem::take(kept)) {
            tape.give(&self.buffers);
        }
    }
}

/// What a pass over `plan` takes, in the fastest way that `budget` allows.
pub(crate) fn forecast(
    blocks: &[Block],
    ln_pre: &FrozenNorm,
    plan: &Plan,
    with_entry: bool,
    budget: Option<u64>,
) -> Result<Forecast> {
    let blocks = super::frozen(blocks)?;
    let blocks = &blocks[plan.first..][..plan.stages.len()];
    let runner = Runner {
        blocks,
        entry: None,
        ln_pre,
        plan,
        buffers: &Buffers::default(),
        policy: Policy::SaveAll,
        at_a_time: usize::MAX,
    };
    // No more images can be worked on than there are.
    let threads = rayon::current_num_threads().min(plan.runs()).max(1);
    let (policy, at_a_time, step) = runner.parts(with_entry).choose(budget, threads)?;
    let back = blocks.get(plan.lowest..).unwrap_or_default();
    let weights: usize = back.iter().map(FrozenBlock::bytes_to_come).sum();
    Ok(Forecast {
        policy,
        chunks_at_a_time: at_a_time,
        rows: plan.runs() * plan.rows(),
        step,
        weights: weights as u64,
    })
}

impl Tower {
    /// `table (rows, width)`, `norms (4·stages, width)` and `input (images, patches or tokens, width)` →
    /// `(runs, read rows, width)`.
    pub(crate) fn apply(self, table: &Tensor, norms: &Tensor, input: &Tensor) -> Result<Tensor> {
        let (table, norms) = (table.contiguous()?, norms.contiguous()?);
        let input = input.contiguous()?;
        Ok(match self.plan.wanted.any() {
            true => table.apply_op3(&norms, &input, self)?,
            false => table.apply_op3_no_bwd(&norms, &input, &ForwardOnly(self))?,
        })
    }

    /// Calls `f` with what runs the plan.
    fn run<T>(&self, norms: &[f32], f: impl FnOnce(Runner<'_>) -> T) -> candle_core::Result<T> {
        let width = self.plan.width;
        let mut blocks = super::frozen(&self.blocks)?;
        let blocks = &mut blocks[self.plan.first..][..self.plan.stages.len()];
        let own: Vec<FrozenNorm> = match self.normed {
            true => norms
                .chunks_exact(2 * width)
                .map(|n| FrozenNorm::new(n[..width].to_vec(), n[width..].to_vec()))
                .collect(),
            false => Vec::new(),
        };
        for (block, own) in blocks.iter_mut().zip(own.chunks_exact(2)) {
            (block.ln_1, block.ln_2) = (&own[0], &own[1]);
        }
        Ok(f(Runner {
            blocks,
            entry: self.entry.as_deref(),
            ln_pre: &self.ln_pre,
            plan: &self.plan,
            buffers: &self.buffers,
            policy: self.forecast.policy,
            at_a_time: self.forecast.chunks_at_a_time,
        }))
    }

    fn forward(
        &self,
        table: (&CpuStorage, &Layout),
        norms: (&CpuStorage, &Layout),
        input: (&CpuStorage, &Layout),
        keep: bool,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let inputs = Inputs {
            table: values(table.0, table.1)?,
            input: values(input.0, input.1)?,
        };
        self.buffers.begin(keep);
        let done = self.run(values(norms.0, norms.1)?, |runner| {
            runner.forward(inputs, keep)
        })?;
        match keep {
            true => {
                let mut kept = self.kept.0.lock().unwrap_or_else(PoisonError::into_inner);
                *kept = Arc::new(done.tape);
            }
            false => done.tape.give(&self.buffers),
        }
        let shape = (self.plan.runs(), self.plan.read(), self.plan.width);
        Ok((CpuStorage::F32(done.ends), shape.into()))
    }
}

const NAME: &str = "prompted-image-tower";

impl CustomOp3 for Tower {
    fn name(&self) -> &'static str {
        NAME
    }

    fn cpu_fwd(
        &self,
        table: &CpuStorage,
        table_layout: &Layout,
        norms: &CpuStorage,
        norms_layout: &Layout,
        input: &CpuStorage,
        input_layout: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        self.forward(
            (table, table_layout),
            (norms, norms_layout),
            (input, input_layout),
            true,
        )
    }

    fn bwd(
        &self,
        table: &Tensor,
        norms: &Tensor,
        input: &Tensor,
        _: &Tensor,
        d_ends: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        // Not held while the pool runs: a waiting thread may come back here.
        let tape = self
            .kept
            .0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        let wanted = self.plan.wanted;
        let room = |t: &Tensor, wanted| vec![0.0; if wanted { t.elem_count() } else { 0 }];
        let mut d = Gradients {
            table: room(table, wanted.table),
            norms: room(norms, wanted.norms),
            input: room(input, wanted.input),
        };
        with_values(d_ends, |d_ends| {
            with_values(table, |table| {
                with_values(norms, |norms| {
                    with_values(input, |input| {
                        let inputs = Inputs { table, input };
                        self.run(norms, |runner| {
                            runner.backward(inputs, &tape, d_ends, &mut d)
                        })
                    })
                })
            })
        })?????;
        let tensor = |values: Vec<f32>, like, wanted: bool| {
            wanted.then(|| from_values(values, like)).transpose()
        };
        Ok((
            tensor(d.table, table, wanted.table)?,
            tensor(d.norms, norms, wanted.norms)?,
            tensor(d.input, input, wanted.input)?,
        ))
    }
}

/// [`Tower`] for a pass that nobody goes back.
struct ForwardOnly(Tower);

impl CustomOp3 for ForwardOnly {
    fn name(&self) -> &'static str {
        NAME
    }

    fn cpu_fwd(
        &self,
        table: &CpuStorage,
        table_layout: &Layout,
        norms: &CpuStorage,
        norms_layout: &Layout,
        input: &CpuStorage,
        input_layout: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        self.0.forward(
            (table, table_layout),
            (norms, norms_layout),
            (input, input_layout),
            false,
        )
    }
}
