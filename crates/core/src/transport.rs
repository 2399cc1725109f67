//! Entropic optimal transport between discrete distributions, many small problems at once (Sinkhorn's algorithm).
//!
//! For a cost `C (m, n)`, weights `u (m)` and `v (n)` and a regularisation `ε`, the plan is
//! `T = diag(r)·K·diag(c)` with `K = exp(−C/ε)`, where `r ← u / (K·c)` and `c ← v / (Kᵀ·r)` are repeated until they rest
//! (Cuturi, NIPS 2013, arXiv 1306.0895). The last update is that of `c`: column sums are exact, row sums as good as the
//! stopping rule asks.
//!
//! Forward and backward are one candle op each (`Solve`, `PlanGradient`), the place for a kernel on another device.

use std::sync::{Arc, OnceLock};

use candle_core::{CpuStorage, CustomOp1, CustomOp2, Layout, Shape, Tensor};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::method::{check_positive, check_weight};
use crate::ops::values;
use crate::params::check_finite;
use crate::{Error, Result};

/// Problems that one task takes at least.
const PROBLEMS_PER_TASK: usize = 32;

/// In what numbers the plan is sought.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Domain {
    /// `r`, `c` and `K` themselves, in f32, as PLOT's authors do. `K` underflows where `C/ε` exceeds about 87.
    #[default]
    Kernel,
    /// Their logarithms, in f64: slower, right for every `ε`.
    Log,
}

/// When the updates end, before [`Sinkhorn::max_iter`] at the latest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StopRule {
    /// As PLOT's authors: the mean of `|r − r before|` over the entries of *all* problems. A problem's plan then depends,
    /// a little, on what else is in the batch.
    #[default]
    Batch,
    /// The same mean, over each problem's own entries.
    PerProblem,
    /// Each problem's `Σ |row sum − u|`, which no scale of the kernel changes.
    Marginals,
}

/// What the gradient of the plan is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PlanGradients {
    /// None: the plan is a constant, as PLOT's authors take it.
    #[default]
    Detached,
    /// That of the plan at rest, by the implicit function theorem. As exact as the plan is at rest: choose a small threshold.
    Implicit,
}

/// How problems of optimal transport are solved; the defaults are PLOT's.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Sinkhorn {
    /// Strength `ε` of the entropy, in units of the cost.
    pub eps: f64,
    /// Updates of `r` and `c` at most.
    pub max_iter: usize,
    /// What the stopping rule's number has to fall below; 0 makes every update.
    pub threshold: f64,
    /// Which number that is.
    pub stop: StopRule,
    /// In what numbers the plan is sought.
    pub domain: Domain,
    /// What the gradient of the plan is.
    pub gradients: PlanGradients,
}

impl Default for Sinkhorn {
    fn default() -> Self {
        Self {
            eps: 0.1,
            max_iter: 100,
            threshold: 1e-2,
            stop: StopRule::default(),
            domain: Domain::default(),
            gradients: PlanGradients::default(),
        }
    }
}

/// Plans, and what they took.
#[derive(Clone, Debug)]
pub struct Transport {
    /// `(problems, m, n)`; the entries of a problem sum to 1.
    pub plan: Tensor,
    /// Updates of `r` and `c`, of each problem.
    pub iterations: Vec<u32>,
}

impl Sinkhorn {
    /// # Errors
    /// [`Error::Config`].
    pub fn check(&self) -> Result<()> {
        check_positive("eps", self.eps)?;
        if self.max_iter == 0 {
            return Err(Error::config("max_iter", 0, "at least one update"));
        }
        check_weight("threshold", self.threshold)
    }

    /// Plans between uniform weights: `cost (problems, m, n)`.
    ///
    /// # Errors
    /// As [`Sinkhorn::solve_between`].
    pub fn solve(&self, cost: &Tensor) -> Result<Transport> {
        let (_, m, n) = dims(cost)?;
        self.solve_between(cost, &vec![1.0 / m as f64; m], &vec![1.0 / n as f64; n])
    }

    /// Plans whose rows sum to `rows (m)` and whose columns sum to `columns (n)`, of every problem of `cost (problems, m, n)`.
    ///
    /// # Errors
    /// [`Error::Config`]; [`Error::Shape`] if a side is empty; [`Error::Data`] if weights are not positive, not as many as
    /// the cost has rows and columns, or do not sum to the same; [`Error::NotFinite`] for the cost, and for a plan whose
    /// kernel underflows.
    pub fn solve_between(&self, cost: &Tensor, rows: &[f64], columns: &[f64]) -> Result<Transport> {
        self.check()?;
        let (_, m, n) = dims(cost)?;
        check_weights("row", rows, m)?;
        check_weights("column", columns, n)?;
        let (total, of_columns) = (rows.iter().sum::<f64>(), columns.iter().sum::<f64>());
        if (total - of_columns).abs() > 1e-6 * total {
            let message = format!(
                "row weights sum to {total}, column weights to {of_columns}; nothing can be moved between unequal sums"
            );
            return Err(Error::Data(message));
        }
        check_finite(cost, "the transport cost")?;
        let iterations = Arc::default();
        let op = Solve {
            settings: self.clone(),
            rows: rows.to_vec(),
            columns: columns.to_vec(),
            iterations: Arc::clone(&iterations),
        };
        let cost = cost.contiguous()?;
        let plan = match self.gradients {
            PlanGradients::Detached => cost.detach().apply_op1_no_bwd(&op)?,
            PlanGradients::Implicit => cost.apply_op1(op)?,
        };
        let what = match self.domain {
            Domain::Kernel => format!(
                "a transport plan at eps {} (kernel domain; where exp(-cost/eps) underflows, domain = \"log\" does not)",
                self.eps
            ),
            Domain::Log => format!("a transport plan at eps {}", self.eps),
        };
        check_finite(&plan, &what)?;
        let iterations = iterations.get().cloned().unwrap_or_default();
        Ok(Transport { plan, iterations })
    }
}

fn dims(cost: &Tensor) -> Result<(usize, usize, usize)> {
    match *cost.dims() {
        [problems, m, n] if problems * m * n > 0 => Ok((problems, m, n)),
        _ => Err(Error::Shape {
            what: "transport cost (problems, m, n)".into(),
            found: cost.dims().to_vec(),
            expected: vec![1, 1, 1],
        }),
    }
}

fn check_weights(side: &str, weights: &[f64], len: usize) -> Result<()> {
    if weights.len() != len {
        let message = format!("{} {side} weights for {len} {side}s", weights.len());
        return Err(Error::Data(message));
    }
    match weights.iter().find(|w| !(w.is_finite() && **w > 0.0)) {
        Some(w) => Err(Error::Data(format!(
            "a {side} weight of {w}; weights are positive, leave the {side} out"
        ))),
        None => Ok(()),
    }
}

/// `cost (problems, m, n)` → plan of the same shape.
struct Solve {
    settings: Sinkhorn,
    rows: Vec<f64>,
    columns: Vec<f64>,
    /// Where the number of updates is left.
    iterations: Arc<OnceLock<Vec<u32>>>,
}

impl CustomOp1 for Solve {
    fn name(&self) -> &'static str {
        "sinkhorn"
    }

    fn cpu_fwd(
        &self,
        storage: &CpuStorage,
        layout: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let cost = values(storage, layout)?;
        let mut plan = vec![0.0; cost.len()];
        let iterations = match self.settings.domain {
            Domain::Kernel => self.run::<Kernel>(cost, &mut plan),
            Domain::Log => self.run::<Logarithms>(cost, &mut plan),
        };
        // Nobody else holds the cell before the op has run once.
        let _ = self.iterations.set(iterations);
        Ok((CpuStorage::F32(plan), layout.shape().clone()))
    }

    fn bwd(&self, _: &Tensor, plan: &Tensor, dy: &Tensor) -> candle_core::Result<Option<Tensor>> {
        let op = PlanGradient {
            eps: self.settings.eps,
        };
        let plan = plan.detach().contiguous()?;
        Ok(Some(plan.apply_op2_no_bwd(&dy.contiguous()?, &op)?))
    }
}

impl Solve {
    fn run<P: Problem>(&self, cost: &[f32], plan: &mut [f32]) -> Vec<u32> {
        let (settings, m) = (&self.settings, self.rows.len());
        let size = m * self.columns.len();
        let mut problems: Vec<P> = cost
            .par_chunks(size)
            .with_min_len(PROBLEMS_PER_TASK)
            .map(|cost| P::new(cost, settings.eps, &self.rows, &self.columns))
            .collect();
        let threshold = settings.threshold;
        // The authors' mean is an f32.
        let rests =
            |change: f64, entries: usize| f64::from((change / entries as f64) as f32) < threshold;
        let until = |problems: &mut Vec<P>, rests: &(dyn Fn(usize, Sweep) -> bool + Sync)| {
            let run = |problem: &mut P| {
                let last = (1..=settings.max_iter).find(|&i| rests(i, problem.sweep()));
                last.unwrap_or(settings.max_iter) as u32
            };
            let problems = problems.par_iter_mut().with_min_len(PROBLEMS_PER_TASK);
            problems.map(run).collect()
        };
        let iterations = match settings.stop {
            StopRule::PerProblem => until(&mut problems, &|_, sweep| rests(sweep.change, m)),
            // A sweep tells the row sums that it found, and before the first there is no plan.
            StopRule::Marginals => {
                until(&mut problems, &|i, sweep| i > 1 && sweep.missed < threshold)
            }
            StopRule::Batch => {
                let mut sweep = || {
                    let problems = problems.par_iter_mut().with_min_len(PROBLEMS_PER_TASK);
                    let changes: Vec<f64> = problems.map(|p| p.sweep().change).collect();
                    // Summed in order, so that threads do not matter.
                    rests(changes.iter().sum(), changes.len() * m)
                };
                let last = (1..=settings.max_iter).find(|_| sweep());
                let last = last.unwrap_or(settings.max_iter) as u32;
                vec![last; problems.len()]
            }
        };
        plan.par_chunks_mut(size)
            .zip(&problems)
            .with_min_len(PROBLEMS_PER_TASK)
            .for_each(|(plan, problem)| problem.write_plan(plan));
        iterations
    }
}

/// What an update of `r` and `c` found.
struct Sweep {
    /// `Σ |r − r before|`.
    change: f64,
    /// `Σ |row sum − u|` before the update.
    missed: f64,
}

/// A problem on its way, in numbers of one kind.
trait Problem: Send + Sync + Sized {
    fn new(cost: &[f32], eps: f64, rows: &[f64], columns: &[f64]) -> Self;
    /// Updates `r`, then `c`.
    fn sweep(&mut self) -> Sweep;
    fn write_plan(&self, plan: &mut [f32]);
}

/// [`Domain::Kernel`].
struct Kernel {
    k: Vec<f32>,
    r: Vec<f32>,
    c: Vec<f32>,
    u: Vec<f32>,
    v: Vec<f32>,
}

impl Problem for Kernel {
    fn new(cost: &[f32], eps: f64, rows: &[f64], columns: &[f64]) -> Self {
        let narrow = |weights: &[f64]| weights.iter().map(|&w| w as f32).collect();
        let eps = eps as f32;
        Self {
            k: cost.iter().map(|cost| (-cost / eps).exp()).collect(),
            r: vec![1.0; rows.len()],
            c: vec![1.0; columns.len()],
            u: narrow(rows),
            v: narrow(columns),
        }
    }

    fn sweep(&mut self) -> Sweep {
        let n = self.c.len();
        let (mut change, mut missed) = (0.0, 0.0);
        let mut column_sums = vec![0.0; n];
        for ((k, r), u) in self.k.chunks_exact(n).zip(&mut self.r).zip(&self.u) {
            let row_sum: f32 = k.iter().zip(&self.c).map(|(k, c)| k * c).sum();
            let fresh = u / row_sum;
            change += f64::from((fresh - *r).abs());
            missed += f64::from((*r * row_sum - u).abs());
            *r = fresh;
            for (sum, k) in column_sums.iter_mut().zip(k) {
                *sum += k * fresh;
            }
        }
        for ((c, v), sum) in self.c.iter_mut().zip(&self.v).zip(column_sums) {
            *c = v / sum;
        }
        Sweep { change, missed }
    }

    fn write_plan(&self, plan: &mut [f32]) {
        let n = self.c.len();
        for ((plan, k), r) in plan
            .chunks_exact_mut(n)
            .zip(self.k.chunks_exact(n))
            .zip(&self.r)
        {
            for ((plan, k), c) in plan.iter_mut().zip(k).zip(&self.c) {
                *plan = r * c * k;
            }
        }
    }
}

/// [`Domain::Log`]: the logarithms of what [`Kernel`] holds.
struct Logarithms {
    k: Vec<f64>,
    r: Vec<f64>,
    c: Vec<f64>,
    u: Vec<f64>,
    v: Vec<f64>,
}

impl Problem for Logarithms {
    fn new(cost: &[f32], eps: f64, rows: &[f64], columns: &[f64]) -> Self {
        let logarithms = |weights: &[f64]| weights.iter().map(|w| w.ln()).collect();
        Self {
            k: cost.iter().map(|&cost| -f64::from(cost) / eps).collect(),
            r: vec![0.0; rows.len()],
            c: vec![0.0; columns.len()],
            u: logarithms(rows),
            v: logarithms(columns),
        }
    }

    fn sweep(&mut self) -> Sweep {
        let n = self.c.len();
        let (mut change, mut missed) = (0.0, 0.0);
        for ((k, r), u) in self.k.chunks_exact(n).zip(&mut self.r).zip(&self.u) {
            let fresh = u - log_sum_exp(k.iter().zip(&self.c).map(|(k, c)| k + c));
            change += (fresh.exp() - r.exp()).abs();
            missed += u.exp() * (*r - fresh).exp_m1().abs();
            *r = fresh;
        }
        for (j, (c, v)) in self.c.iter_mut().zip(&self.v).enumerate() {
            let column = self.k.iter().skip(j).step_by(n);
            *c = v - log_sum_exp(column.zip(&self.r).map(|(k, r)| k + r));
        }
        Sweep { change, missed }
    }

    fn write_plan(&self, plan: &mut [f32]) {
        let n = self.c.len();
        for ((plan, k), r) in plan
            .chunks_exact_mut(n)
            .zip(self.k.chunks_exact(n))
            .zip(&self.r)
        {
            for ((plan, k), c) in plan.iter_mut().zip(k).zip(&self.c) {
                *plan = (r + c + k).exp() as f32;
            }
        }
    }
}

fn log_sum_exp(terms: impl Iterator<Item = f64> + Clone) -> f64 {
    let largest = terms.clone().fold(f64::NEG_INFINITY, f64::max);
    largest + terms.map(|t| (t - largest).exp()).sum::<f64>().ln()
}

/// `(plan, gradient G of the plan)` → gradient of the cost, for plans at rest.
///
/// A change of the cost moves the plan along `T∘(x ⊕ y − dC)/ε`, with `x` and `y` such that neither row nor column sums
/// change. Turned around: `dL/dC = T∘(x ⊕ y − G)/ε` with `diag(T·1)·x + T·y = (T∘G)·1` and `Tᵀ·x + diag(Tᵀ·1)·y = (T∘G)ᵀ·1`.
struct PlanGradient {
    eps: f64,
}

impl CustomOp2 for PlanGradient {
    fn name(&self) -> &'static str {
        "sinkhorn-gradient"
    }

    fn cpu_fwd(
        &self,
        plan: &CpuStorage,
        plan_layout: &Layout,
        dy: &CpuStorage,
        dy_layout: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let (plan, dy) = (values(plan, plan_layout)?, values(dy, dy_layout)?);
        let (_, m, n) = plan_layout.shape().dims3()?;
        let mut out = vec![0.0; plan.len()];
        out.par_chunks_mut(m * n)
            .zip(plan.par_chunks(m * n).zip(dy.par_chunks(m * n)))
            .with_min_len(PROBLEMS_PER_TASK)
            .for_each(|(out, (plan, dy))| cost_gradient(plan, dy, (m, n), self.eps, out));
        Ok((CpuStorage::F32(out), plan_layout.shape().clone()))
    }
}

fn cost_gradient(plan: &[f32], dy: &[f32], (m, n): (usize, usize), eps: f64, out: &mut [f32]) {
    // `x` is eliminated, so its side is made the longer one.
    let turned = m < n;
    let (long, short) = if turned { (n, m) } else { (m, n) };
    let at = |i: usize, j: usize| if turned { j * n + i } else { i * n + j };
    let (mut long_sums, mut short_sums) = (vec![0.0; long], vec![0.0; short]);
    let (mut long_moved, mut short_moved) = (vec![0.0; long], vec![0.0; short]);
    for i in 0..long {
        for j in 0..short {
            let (t, g) = (f64::from(plan[at(i, j)]), f64::from(dy[at(i, j)]));
            long_sums[i] += t;
            short_sums[j] += t;
            long_moved[i] += t * g;
            short_moved[j] += t * g;
        }
    }
    // (diag(short sums) − Tᵀ·diag(1/long sums)·T)·y = short moved − Tᵀ·(long moved / long sums)
    let mut matrix = vec![0.0; short * short];
    let mut y = short_moved;
    for j in 0..short {
        matrix[j * short + j] = short_sums[j];
    }
    for i in (0..long).filter(|&i| long_sums[i] > 0.0) {
        for j in 0..short {
            let share = f64::from(plan[at(i, j)]) / long_sums[i];
            y[j] -= share * long_moved[i];
            for l in 0..short {
                matrix[j * short + l] -= share * f64::from(plan[at(i, l)]);
            }
        }
    }
    solve_semidefinite(&mut matrix, &short_sums, &mut y);
    for i in 0..long {
        let mut x = long_moved[i];
        for (j, y) in y.iter().enumerate() {
            x -= f64::from(plan[at(i, j)]) * y;
        }
        // A row that carries nothing has no gradient, whatever `x` is.
        x = if long_sums[i] > 0.0 {
            x / long_sums[i]
        } else {
            0.0
        };
        for j in 0..short {
            let (t, g) = (f64::from(plan[at(i, j)]), f64::from(dy[at(i, j)]));
            out[at(i, j)] = (t * (x + y[j] - g) / eps) as f32;
        }
    }
}

/// Solves `matrix·x = b` in place for a symmetric, positive semi-definite matrix and a `b` in its range.
///
/// Elimination without exchanges; a pivot that rounding alone keeps from 0, measured against `scale`, belongs to a direction
/// that the matrix does not see, and its unknown is 0.
fn solve_semidefinite(matrix: &mut [f64], scale: &[f64], b: &mut [f64]) {
    let n = b.len();
    let seen = |pivot: f64, j: usize| pivot > 1e-12 * scale[j];
    for j in 0..n {
        let pivot = matrix[j * n + j];
        if !seen(pivot, j) {
            continue;
        }
        for i in j + 1..n {
            let factor = matrix[i * n + j] / pivot;
            for l in j..n {
                matrix[i * n + l] -= factor * matrix[j * n + l];
            }
            b[i] -= factor * b[j];
        }
    }
    for j in (0..n).rev() {
        let pivot = matrix[j * n + j];
        if !seen(pivot, j) {
            b[j] = 0.0;
            continue;
        }
        for l in j + 1..n {
            b[j] -= matrix[j * n + l] * b[l];
        }
        b[j] /= pivot;
    }
}
