//! Comparing, and keeping account of what was compared.

use std::collections::BTreeSet;

use anyhow::{Result, ensure};
use candle_core::{DType, Tensor};

use super::case::Case;

/// Relative tolerance of everything before the first update.
pub(crate) const START: f64 = 1e-4;
/// Relative tolerance of everything that depends on the updates.
pub(crate) const AFTER: f64 = 1e-3;
/// Relative tolerance of what a parameter moved.
const MOVED: f64 = 1e-2;
/// Absolute tolerance where zeros are expected.
const ZERO: f64 = 1e-6;

struct Comparison {
    name: String,
    error: f64,
    failure: Option<String>,
}

/// What was compared in a case, and how well it agreed.
#[derive(Default)]
pub(crate) struct Check {
    comparisons: Vec<Comparison>,
    seen: BTreeSet<String>,
    warnings: Vec<String>,
}

impl Check {
    pub(crate) fn passed(&self) -> bool {
        !self.comparisons.is_empty() && self.failures().next().is_none()
    }

    pub(crate) fn compared(&self) -> usize {
        self.comparisons.len()
    }

    pub(crate) fn warnings(&self) -> &[String] {
        &self.warnings
    }

    pub(crate) fn warn(&mut self, warning: String) {
        self.warnings.push(warning);
    }

    pub(crate) fn failures(&self) -> impl Iterator<Item = String> + '_ {
        let none = self
            .comparisons
            .is_empty()
            .then(|| "nothing was compared".to_owned());
        none.into_iter()
            .chain(self.comparisons.iter().filter_map(|c| c.failure.clone()))
    }

    pub(crate) fn worst(&self) -> (f64, &str) {
        let worst = self
            .comparisons
            .iter()
            .max_by(|a, b| a.error.total_cmp(&b.error));
        worst.map_or((0.0, "nothing"), |c| (c.error, c.name.as_str()))
    }

    /// Records a comparison made elsewhere; `failure` says what is wrong.
    pub(crate) fn record(&mut self, name: &str, error: f64, failure: Option<String>) {
        self.seen.insert(name.to_owned());
        let failure = failure.map(|f| format!("{name}: {f}"));
        self.comparisons.push(Comparison {
            name: name.to_owned(),
            error,
            failure,
        });
    }

    /// Compares with the first rows of the case's tensor: a causal tower may stop at the end token, `rows` being what it must have.
    pub(crate) fn leading_rows(
        &mut self,
        case: &Case,
        name: &str,
        ours: &Tensor,
        rows: usize,
    ) -> Result<()> {
        let Some(expected) = case.get(name) else {
            return Ok(());
        };
        let found = ours.dim(0)?;
        if found < rows || found > expected.dim(0)? {
            self.record(
                name,
                f64::INFINITY,
                Some(format!(
                    "{found} rows, expected {rows} to {:?}",
                    expected.dims()
                )),
            );
            return Ok(());
        }
        self.numbers(
            name,
            &values(ours)?,
            &values(&expected.narrow(0, 0, found)?)?,
            START,
        );
        Ok(())
    }

    /// Compares with the case's tensor `name`, if there is one.
    pub(crate) fn tensor(
        &mut self,
        case: &Case,
        name: &str,
        ours: &Tensor,
        tolerance: f64,
    ) -> Result<()> {
        let Some(expected) = case.get(name) else {
            return Ok(());
        };
        if expected.dims() != ours.dims() {
            let failure = format!("shape {:?}, expected {:?}", ours.dims(), expected.dims());
            self.record(name, f64::INFINITY, Some(failure));
            return Ok(());
        }
        if expected.dtype() == DType::I64 {
            let equal = integers(expected)? == integers(ours)?;
            self.record(name, 0.0, (!equal).then(|| "integers differ".to_owned()));
            return Ok(());
        }
        self.numbers(name, &values(ours)?, &values(expected)?, tolerance);
        Ok(())
    }

    /// As [`Check::tensor`] for a list of numbers.
    pub(crate) fn list(
        &mut self,
        case: &Case,
        name: &str,
        ours: &[f64],
        tolerance: f64,
    ) -> Result<()> {
        let Some(expected) = case.get(name) else {
            return Ok(());
        };
        let expected = values(expected)?;
        ensure!(
            expected.len() == ours.len(),
            "{name}: {} values, expected {}",
            ours.len(),
            expected.len()
        );
        self.numbers(name, ours, &expected, tolerance);
        Ok(())
    }

    pub(crate) fn numbers(&mut self, name: &str, ours: &[f64], expected: &[f64], tolerance: f64) {
        let difference = largest(ours.iter().zip(expected).map(|(a, b)| a - b));
        let scale = largest(expected.iter().copied());
        let (error, limit) = if scale == 0.0 {
            (difference, ZERO)
        } else {
            (difference / scale, tolerance)
        };
        // Written so that NaN fails.
        let fine = error <= limit;
        let failure = (!fine).then(|| {
            format!("error {error:.2e}, tolerance {limit:.0e} (largest value {scale:.3e})")
        });
        self.record(name, error, failure);
    }

    /// Compares a parameter after the steps: its value, and how far it moved.
    pub(crate) fn parameter(&mut self, case: &Case, key: &str, ours: &Tensor) -> Result<()> {
        let name = format!("expect.after.{key}");
        let Some(expected) = case.get(&name) else {
            return Ok(());
        };
        self.tensor(case, &name, ours, AFTER)?;
        let (start, expected, ours) = (
            values(case.tensor(&format!("init.{key}"))?)?,
            values(expected)?,
            values(ours)?,
        );
        if expected.len() != ours.len() || start.len() != ours.len() {
            return Ok(());
        }
        let moved =
            |to: &[f64]| -> Vec<f64> { to.iter().zip(&start).map(|(a, b)| a - b).collect() };
        let (expected_move, our_move) = (moved(&expected), moved(&ours));
        let difference = largest(our_move.iter().zip(&expected_move).map(|(a, b)| a - b));
        let limit = MOVED * largest(expected_move.iter().copied())
            + 2e-6 * largest(expected.iter().copied());
        let fine = difference <= limit;
        let failure = (!fine)
            .then(|| format!("the update differs by {difference:.2e}, tolerance {limit:.2e}"));
        // Not part of the "largest error": its scale is the update, not the parameter.
        self.record(&format!("{name} - init"), 0.0, failure);
        Ok(())
    }

    /// Fails the case for every expectation that nothing compared; warns of inputs that nothing read.
    pub(crate) fn finish(&mut self, case: &Case) {
        for name in case.names() {
            if name.starts_with("expect.") && !self.seen.contains(name) {
                let failure = Some(format!("{name}: nothing compares it"));
                self.comparisons.push(Comparison {
                    name: name.to_owned(),
                    error: f64::INFINITY,
                    failure,
                });
            }
            let input = ["input.", "noise.", "init."]
                .iter()
                .any(|prefix| name.starts_with(prefix));
            if input && !case.was_read(name) {
                self.warnings.push(format!("{name} was never read"));
            }
        }
    }
}

/// The largest magnitude; NaN if there is one.
fn largest(values: impl Iterator<Item = f64>) -> f64 {
    values.fold(0.0, |max: f64, v| {
        if v.is_nan() || max.is_nan() {
            f64::NAN
        } else {
            max.max(v.abs())
        }
    })
}

pub(crate) fn values(t: &Tensor) -> Result<Vec<f64>> {
    Ok(t.to_dtype(DType::F64)?.flatten_all()?.to_vec1()?)
}

fn integers(t: &Tensor) -> Result<Vec<i64>> {
    Ok(t.to_dtype(DType::I64)?.flatten_all()?.to_vec1()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_differs_fails() {
        let failed = |ours: &[f64], expected: &[f64]| {
            let mut check = Check::default();
            check.numbers("x", ours, expected, START);
            !check.passed()
        };
        assert!(!failed(&[1.0, 2.0], &[1.0, 2.0001]));
        assert!(failed(&[1.0, 2.0], &[1.0, 2.001]));
        assert!(failed(&[1.0, f64::NAN], &[1.0, 2.0]));
        assert!(failed(&[1.0, 2.0], &[1.0, f64::NAN]));
        assert!(!failed(&[5e-7], &[0.0]));
        assert!(failed(&[2e-6], &[0.0]));
        assert!(
            !Check::default().passed(),
            "a case that compares nothing does not pass"
        );
    }
}
