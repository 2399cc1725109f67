//! The prompt engine: runs declared prompts through the frozen text tower, exactly, and what they share only once.
//!
//! [`plan`] finds out what has to be computed; [`run`] computes it, as one operation of candle's graph.

pub(crate) mod plan;
pub(crate) mod run;

use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{CpuStorage, CustomOp2, Layout, Shape, Tensor};

use self::plan::Plan;
use self::run::{Deep, Runner, Tape, Wanted};
use crate::Result;
use crate::clip::{Block, FrozenBlock};
use crate::ops::{from_values, values};

/// The text tower's blocks under a plan, as one operation: input rows and deep rows in, the prompts' last rows out.
pub(crate) struct Tower {
    pub(crate) blocks: Arc<Vec<Block>>,
    pub(crate) plan: Plan,
    pub(crate) deep: Deep,
    pub(crate) width: usize,
    pub(crate) wanted: Wanted,
    /// What the forward pass keeps for the way back.
    tape: Mutex<Option<Tape>>,
}

impl Tower {
    pub(crate) fn new(
        blocks: Arc<Vec<Block>>,
        plan: Plan,
        deep: Deep,
        width: usize,
        wanted: Wanted,
    ) -> Self {
        Self {
            blocks,
            plan,
            deep,
            width,
            wanted,
            tape: Mutex::new(None),
        }
    }

    /// `inputs (rows, width)` with positions added, `deep (deep rows, width)` → `(prompts, width)`.
    pub(crate) fn apply(self, inputs: &Tensor, deep: &Tensor) -> Result<Tensor> {
        let (inputs, deep) = (inputs.contiguous()?, deep.contiguous()?);
        Ok(match inputs.track_op() || deep.track_op() {
            true => inputs.apply_op2(&deep, self)?,
            false => inputs.apply_op2_no_bwd(&deep, &Forward(self))?,
        })
    }

    /// Calls `f` with what runs the plan.
    fn run<T>(&self, f: impl FnOnce(Runner<'_>) -> T) -> candle_core::Result<T> {
        let blocks: Option<Vec<FrozenBlock<'_>>> = self.blocks.iter().map(Block::frozen).collect();
        let Some(blocks) = blocks else {
            return Err(candle_core::Error::Msg("the engine runs frozen towers only".into()).bt());
        };
        Ok(f(Runner {
            blocks: &blocks,
            plan: &self.plan,
            deep: &self.deep,
            width: self.width,
        }))
    }

    fn forward(
        &self,
        (inputs, inputs_layout): (&CpuStorage, &Layout),
        (deep, deep_layout): (&CpuStorage, &Layout),
        keep: bool,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let (inputs, deep) = (values(inputs, inputs_layout)?, values(deep, deep_layout)?);
        let (ends, tape) = self.run(|runner| runner.forward(inputs, deep, keep))?;
        if keep {
            *self.tape.lock().unwrap_or_else(PoisonError::into_inner) = Some(tape);
        }
        let shape = (self.plan.prompts, self.width);
        Ok((CpuStorage::F32(ends), shape.into()))
    }
}

const NAME: &str = "text-tower";

impl CustomOp2 for Tower {
    fn name(&self) -> &'static str {
        NAME
    }

    fn cpu_fwd(
        &self,
        inputs: &CpuStorage,
        inputs_layout: &Layout,
        deep: &CpuStorage,
        deep_layout: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        self.forward((inputs, inputs_layout), (deep, deep_layout), true)
    }

    fn bwd(
        &self,
        inputs: &Tensor,
        deep: &Tensor,
        _: &Tensor,
        d_ends: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>)> {
        let tape = self.tape.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(tape) = tape.as_ref() else {
            return Err(candle_core::Error::Msg("the tower was not run forward".into()).bt());
        };
        let d_ends = d_ends.flatten_all()?.to_vec1::<f32>()?;
        let (d_inputs, d_deep) =
            self.run(|runner| runner.backward(tape, &d_ends, deep.elem_count(), self.wanted))?;
        Ok((
            Some(from_values(d_inputs, inputs)?),
            Some(from_values(d_deep, deep)?),
        ))
    }
}

/// [`Tower`] for a pass that nobody goes back.
struct Forward(Tower);

impl CustomOp2 for Forward {
    fn name(&self) -> &'static str {
        NAME
    }

    fn cpu_fwd(
        &self,
        inputs: &CpuStorage,
        inputs_layout: &Layout,
        deep: &CpuStorage,
        deep_layout: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        self.0
            .forward((inputs, inputs_layout), (deep, deep_layout), false)
    }
}
