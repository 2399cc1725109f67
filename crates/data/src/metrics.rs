//! How good predictions are.

use std::cmp::Ordering;
use std::collections::BTreeMap;

use candle_core::{DType, Tensor};
use cliptune_core::Error as CoreError;

use crate::{Error, Result};

/// Counts what was predicted for what, batch by batch.
///
/// The class with the largest logit is predicted, of equal ones that with the lowest label, as `torch.argmax` and `torch.max` do
/// on the CPU. All figures are in percent.
#[derive(Clone, Debug)]
pub struct Confusion {
    n_cls: usize,
    /// Images by (label, prediction); most pairs never occur.
    counts: BTreeMap<(u32, u32), u64>,
    /// Images by the place of their label when classes are ordered by logit.
    places: BTreeMap<usize, u64>,
    total: u64,
}

impl Confusion {
    /// For `n_cls` classes, with nothing counted.
    pub fn new(n_cls: usize) -> Self {
        Self {
            n_cls,
            counts: BTreeMap::new(),
            places: BTreeMap::new(),
            total: 0,
        }
    }

    /// Counts a batch: `logits` `(batch, n_cls)`, one label for each row.
    ///
    /// # Errors
    /// If the shapes do not fit, a label is out of range or a logit is not a number; nothing is counted then.
    pub fn add(&mut self, logits: &Tensor, labels: &[u32]) -> Result<()> {
        let rows = rows(logits)?;
        if logits.dims() != [labels.len(), self.n_cls] {
            return Err(Error::Core(CoreError::Shape {
                what: "batch of logits".into(),
                found: logits.dims().to_vec(),
                expected: vec![labels.len(), self.n_cls],
            }));
        }
        if let Some(label) = labels.iter().find(|label| **label as usize >= self.n_cls) {
            let message = format!(
                "label {label} has no logit, there are {} classes",
                self.n_cls
            );
            return Err(Error::Core(CoreError::Data(message)));
        }
        for (row, &label) in rows.iter().zip(labels) {
            let mut best = 0;
            for (class, value) in row.iter().enumerate() {
                if Some(value) > row.get(best) {
                    best = class;
                }
            }
            let own = row
                .get(label as usize)
                .copied()
                .unwrap_or(f32::NEG_INFINITY);
            let before = |&(class, value): &(usize, &f32)| {
                *value > own || (*value == own && class < label as usize)
            };
            let place = row.iter().enumerate().filter(before).count();
            *self.counts.entry((label, best as u32)).or_default() += 1;
            *self.places.entry(place).or_default() += 1;
            self.total += 1;
        }
        Ok(())
    }

    /// Number of classes.
    pub fn n_cls(&self) -> usize {
        self.n_cls
    }

    /// Images counted.
    pub fn total(&self) -> u64 {
        self.total
    }

    /// Images counted as (label, prediction).
    pub fn count(&self, label: u32, prediction: u32) -> u64 {
        self.counts.get(&(label, prediction)).copied().unwrap_or(0)
    }

    /// The whole matrix: a row for each label, a column for each prediction.
    pub fn matrix(&self) -> Vec<Vec<u64>> {
        let classes = 0..self.n_cls as u32;
        let row = |label| classes.clone().map(|p| self.count(label, p)).collect();
        classes.clone().map(row).collect()
    }

    /// Share of images whose class was predicted.
    ///
    /// # Errors
    /// [`CoreError::Data`] if nothing was counted.
    pub fn accuracy(&self) -> Result<f64> {
        self.top_k_accuracy(1)
    }

    /// Share of images whose class was among the `k` with the largest logits.
    ///
    /// # Errors
    /// [`CoreError::Data`] if nothing was counted.
    pub fn top_k_accuracy(&self, k: usize) -> Result<f64> {
        self.some()?;
        let right: u64 = self.places.range(..k).map(|(_, count)| count).sum();
        Ok(100.0 * right as f64 / self.total as f64)
    }

    /// Accuracy over the images of each class; none for a class without images.
    pub fn per_class_accuracy(&self) -> Vec<Option<f64>> {
        let per_class = |(right, of_class, _): (u64, u64, u64)| {
            (of_class > 0).then(|| 100.0 * right as f64 / of_class as f64)
        };
        self.tallies().into_iter().map(per_class).collect()
    }

    /// Mean of the classes' F1 scores, over the classes that have images (as Dassl reports it).
    ///
    /// # Errors
    /// [`CoreError::Data`] if nothing was counted.
    pub fn macro_f1(&self) -> Result<f64> {
        self.some()?;
        let f1 = |(right, of_class, predicted): (u64, u64, u64)| {
            (of_class > 0).then(|| 2.0 * right as f64 / (of_class + predicted) as f64)
        };
        let scores: Vec<f64> = self.tallies().into_iter().filter_map(f1).collect();
        Ok(100.0 * scores.iter().sum::<f64>() / scores.len() as f64)
    }

    /// For each class: images predicted right, images that it has, images predicted to be of it.
    fn tallies(&self) -> Vec<(u64, u64, u64)> {
        let mut tallies = vec![(0, 0, 0); self.n_cls];
        for (&(label, prediction), &count) in &self.counts {
            if let Some(tally) = tallies.get_mut(label as usize) {
                tally.1 += count;
                if label == prediction {
                    tally.0 += count;
                }
            }
            if let Some(tally) = tallies.get_mut(prediction as usize) {
                tally.2 += count;
            }
        }
        tallies
    }

    fn some(&self) -> Result<()> {
        if self.total == 0 {
            return Err(Error::Core(CoreError::Data(
                "there is no image to measure on".into(),
            )));
        }
        Ok(())
    }
}

/// The `k` largest logits of each row `(batch, n_cls)` with their classes, largest first; of equal ones the lowest class.
///
/// # Errors
/// If `logits` is not a matrix or holds a value that is not a number.
pub fn top_k(logits: &Tensor, k: usize) -> Result<Vec<Vec<(u32, f32)>>> {
    let top = |row: Vec<f32>| {
        let mut classes: Vec<(u32, f32)> = (0..).zip(row).collect();
        // Stable, so equal logits stay in the order of classes; none is NaN.
        classes.sort_by(|a, b| b.1.partial_cmp(&a.1).unwrap_or(Ordering::Equal));
        classes.truncate(k);
        classes
    };
    Ok(rows(logits)?.into_iter().map(top).collect())
}

fn rows(logits: &Tensor) -> Result<Vec<Vec<f32>>> {
    let to_rows = || logits.to_dtype(DType::F32)?.to_vec2::<f32>();
    let rows = to_rows().map_err(CoreError::from)?;
    if let Some(value) = rows.iter().flatten().find(|value| value.is_nan()) {
        return Err(Error::Core(CoreError::NotFinite {
            what: "batch of logits".into(),
            value: f64::from(*value),
        }));
    }
    Ok(rows)
}

/// `2ab / (a + b)`, in the unit of `a` and `b`; 0 if either is 0. The papers' H of base and new accuracy.
pub fn harmonic_mean(a: f64, b: f64) -> f64 {
    if a <= 0.0 || b <= 0.0 {
        return 0.0;
    }
    2.0 * a * b / (a + b)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::TestResult;
    use candle_core::Device;
    use proptest::prelude::*;

    fn tensor(rows: &[Vec<f32>]) -> Tensor {
        Tensor::new(rows.to_vec(), &Device::Cpu).unwrap()
    }

    #[test]
    fn figures_by_hand() -> TestResult {
        let mut confusion = Confusion::new(4);
        assert!(confusion.accuracy().is_err() && confusion.macro_f1().is_err());
        // Labels 0, 0, 1, 1, 2; predictions 0, 1, 1, 1, 3 (the first of two equal ones); class 3 has no images.
        let first = tensor(&[
            vec![9., 1., 0., 0.],
            vec![2., 9., 3., 0.],
            vec![0., 5., 5., 5.],
        ]);
        confusion.add(&first, &[0, 0, 1])?;
        let second = tensor(&[vec![-1., 5., 4., 4.], vec![0., 1., 2., 7.]]);
        confusion.add(&second, &[1, 2])?;
        assert_eq!(confusion.total(), 5);
        assert_eq!(confusion.accuracy()?, 60.0);
        assert_eq!(confusion.top_k_accuracy(2)?, 80.0);
        assert_eq!(confusion.top_k_accuracy(3)?, 100.0);
        assert_eq!(confusion.top_k_accuracy(99)?, 100.0);
        let per_class = [Some(50.0), Some(100.0), Some(0.0), None];
        assert_eq!(confusion.per_class_accuracy(), per_class);
        let matrix = [[1, 1, 0, 0], [0, 2, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0]];
        assert_eq!(confusion.matrix(), matrix.map(|row| row.to_vec()));
        // F1: 2/3, 4/5, 0; scikit-learn with labels = [0, 1, 2] gives their mean.
        let expected = 100.0 * (2.0 / 3.0 + 0.8) / 3.0;
        assert!((confusion.macro_f1()? - expected).abs() < 1e-12);
        Ok(())
    }

    #[test]
    fn what_does_not_fit_is_refused_and_not_counted() {
        let mut confusion = Confusion::new(2);
        let two = tensor(&[vec![0., 1.]]);
        assert!(confusion.add(&two, &[2]).is_err());
        assert!(confusion.add(&two, &[0, 1]).is_err());
        assert!(confusion.add(&tensor(&[vec![0., 1., 2.]]), &[0]).is_err());
        assert!(confusion.add(&tensor(&[vec![0., f32::NAN]]), &[0]).is_err());
        assert_eq!(confusion.total(), 0);
    }

    #[test]
    fn the_papers_harmonic_mean() {
        // CoCoOp's table: averages over eleven data sets.
        assert!((harmonic_mean(80.47, 71.69) - 75.83).abs() < 0.005);
        assert_eq!(harmonic_mean(0.0, 50.0), 0.0);
        assert_eq!(harmonic_mean(50.0, 0.0), 0.0);
        assert_eq!(harmonic_mean(40.0, 40.0), 40.0);
    }

    #[test]
    fn the_largest_come_first() -> TestResult {
        let top = top_k(&tensor(&[vec![1., 3., 3., 2.]]), 3)?;
        assert_eq!(top, [[(1, 3.), (2, 3.), (3, 2.)]]);
        assert_eq!(top_k(&tensor(&[vec![1., 2.]]), 5)?[0].len(), 2);
        Ok(())
    }

    proptest! {
        #[test]
        fn batches_do_not_matter(rows in prop::collection::vec((prop::collection::vec(-2i8..3, 4), 0u32..4), 1..20)) {
            let (logits, labels): (Vec<Vec<f32>>, Vec<u32>) = rows
                .into_iter()
                .map(|(row, label)| (row.into_iter().map(f32::from).collect(), label))
                .unzip();
            let mut whole = Confusion::new(4);
            whole.add(&tensor(&logits), &labels).unwrap();
            let mut single = Confusion::new(4);
            for (row, label) in logits.iter().zip(&labels) {
                single.add(&tensor(std::slice::from_ref(row)), &[*label]).unwrap();
            }
            prop_assert_eq!(whole.matrix(), single.matrix());
            // Two ways to the same number.
            let diagonal: u64 = (0..4).map(|i| whole.count(i, i)).sum();
            prop_assert_eq!(whole.accuracy().unwrap(), 100.0 * diagonal as f64 / labels.len() as f64);
            let best = top_k(&tensor(&logits), 1).unwrap();
            let right = best.iter().zip(&labels).filter(|(top, label)| top[0].0 == **label).count();
            prop_assert_eq!(right as u64, diagonal);
        }
    }
}
