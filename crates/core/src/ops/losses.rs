//! Comparisons of features, and losses.

use candle_core::{D, Tensor};

use crate::{Error, Result};

/// Softmax over the last axis, differentiable.
pub fn softmax(x: &Tensor) -> Result<Tensor> {
    Ok(log_softmax(x)?.exp()?)
}

/// Logarithm of the softmax over the last axis, differentiable.
pub fn log_softmax(x: &Tensor) -> Result<Tensor> {
    // The maximum only shifts; its own gradient cancels.
    let x = x.broadcast_sub(&x.max_keepdim(D::Minus1)?.detach())?;
    let log_sum = x.exp()?.sum_keepdim(D::Minus1)?.log()?;
    Ok(x.broadcast_sub(&log_sum)?)
}

/// Mean cross entropy of `logits (batch, n_cls)` against class labels.
///
/// # Errors
/// [`Error::Data`] if a label is not below `n_cls` or the batch is empty.
pub fn cross_entropy(logits: &Tensor, labels: &[u32]) -> Result<Tensor> {
    negative_log_likelihood(&log_softmax(logits)?, labels)
}

/// Mean over the batch of `−log p` at the label, from `log_probs (batch, n_cls)`.
///
/// # Errors
/// As [`cross_entropy`].
pub fn negative_log_likelihood(log_probs: &Tensor, labels: &[u32]) -> Result<Tensor> {
    let (batch, n_cls) = log_probs.dims2()?;
    check_labels(labels, batch, n_cls)?;
    let labels = Tensor::new(labels, log_probs.device())?.unsqueeze(1)?;
    Ok(log_probs.gather(&labels, 1)?.mean_all()?.neg()?)
}

/// Mean over the batch of `−Σ_c q_c · log p_c` for `logits (batch, n_cls)` and targets of the same shape: how much of each
/// class an image shows, at least 0 and divided here by its sum over the classes (1 for every class of a multi-label image).
///
/// # Errors
/// [`Error::Shape`] if the two do not have the same shape; [`Error::Data`] if a target is negative or not finite, or an image
/// has none.
pub fn soft_cross_entropy(logits: &Tensor, targets: &Tensor) -> Result<Tensor> {
    if targets.dims() != logits.dims() {
        return Err(Error::Shape {
            what: "targets of a batch".into(),
            found: targets.dims().to_vec(),
            expected: logits.dims().to_vec(),
        });
    }
    let targets = targets.to_dtype(logits.dtype())?.detach();
    for (row, values) in targets.to_vec2::<f32>()?.iter().enumerate() {
        let usable = values.iter().all(|x| x.is_finite() && *x >= 0.0);
        if !usable || values.iter().all(|x| *x == 0.0) {
            return Err(Error::Data(format!(
                "targets of image {row} of the batch: expected numbers of at least 0, one of them above it"
            )));
        }
    }
    let shares = targets.broadcast_div(&targets.sum_keepdim(D::Minus1)?)?;
    let terms = (shares * log_softmax(logits)?)?;
    Ok(terms.sum(D::Minus1)?.mean_all()?.neg()?)
}

/// Refuses labels that are not one class for each image.
///
/// # Errors
/// [`Error::Data`] if a label is not below `n_cls`, their number is not `batch`, or there is none.
pub fn check_labels(labels: &[u32], batch: usize, n_cls: usize) -> Result<()> {
    if batch != labels.len() || batch == 0 {
        return Err(Error::Data(format!(
            "{batch} rows of logits for {} labels",
            labels.len()
        )));
    }
    if let Some(label) = labels.iter().find(|&&l| l as usize >= n_cls) {
        return Err(Error::Data(format!("label {label} with {n_cls} classes")));
    }
    Ok(())
}

/// Rows of unit length: plain division by the norm, as the authors do, no epsilon.
///
/// # Errors
/// [`Error::NotFinite`] if a row is zero or not finite; `what` names the rows.
pub fn unit_length(x: &Tensor, what: &str) -> Result<Tensor> {
    let norm = x.sqr()?.sum_keepdim(D::Minus1)?.sqrt()?;
    for (row, norm) in norm
        .flatten_all()?
        .to_vec1::<f32>()?
        .into_iter()
        .enumerate()
    {
        if norm == 0.0 || !norm.is_finite() {
            return Err(Error::NotFinite {
                what: format!("{what}, row {row}, of length {norm}, scaled to unit length,"),
                value: f64::NAN,
            });
        }
    }
    Ok(x.broadcast_div(&norm)?)
}

/// Dot products of each image with its own set of text features: `image (batch, dim)`, `text (batch, n_cls, dim)` →
/// `(batch, n_cls)`, differentiable.
///
/// # Errors
/// If the shapes do not fit together.
pub fn own_dots(image: &Tensor, text: &Tensor) -> Result<Tensor> {
    Ok(text
        .contiguous()?
        .matmul(&image.unsqueeze(2)?.contiguous()?)?
        .squeeze(2)?)
}

/// `1 − mean over rows of cos(aᵢ, bᵢ)` for rows of unit length, differentiable; from 0 to 2.
///
/// # Errors
/// [`Error::Shape`] if the two do not have the same shape.
pub fn cosine_distance(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    same_shape(a, b)?;
    Ok((a * b)?.sum(D::Minus1)?.mean_all()?.affine(-1.0, 1.0)?)
}

/// Mean over rows of `‖aᵢ − bᵢ‖²`, differentiable; twice the [`cosine_distance`] where all rows are of unit length.
///
/// # Errors
/// As [`cosine_distance`].
pub fn squared_distance(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    same_shape(a, b)?;
    Ok((a - b)?.sqr()?.sum(D::Minus1)?.mean_all()?)
}

fn same_shape(a: &Tensor, b: &Tensor) -> Result<()> {
    match a.dims() == b.dims() {
        true => Ok(()),
        false => Err(Error::Shape {
            what: "one of two sets of features to compare".into(),
            found: b.dims().to_vec(),
            expected: a.dims().to_vec(),
        }),
    }
}

/// Logarithm of the mean of `exp(x)` over the first axis, differentiable; exact where all are equal.
///
/// # Errors
/// If `x` has no axis, or nothing on it.
pub fn log_mean_exp(x: &Tensor) -> Result<Tensor> {
    // The maximum only shifts; its own gradient cancels.
    let max = x.max_keepdim(0)?.detach();
    let mean = x.broadcast_sub(&max)?.exp()?.mean(0)?;
    Ok((mean.log()? + max.squeeze(0)?)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Rng;
    use candle_core::{Device, IndexOp, Shape, Var};

    fn drawn(seed: u64, shape: impl Into<Shape>) -> Result<Tensor> {
        let shape = shape.into();
        let values = Rng::stream(seed, "test", &[]).normal(shape.elem_count());
        let values: Vec<f32> = values.into_iter().map(|x| x as f32).collect();
        Ok(Tensor::from_vec(values, shape, &Device::Cpu)?)
    }

    fn value(t: &Tensor) -> Result<f32> {
        Ok(t.to_scalar()?)
    }

    #[test]
    fn own_dots_are_the_diagonal_of_all_dots() -> Result<()> {
        let (image, text) = (drawn(1, (3, 8))?, drawn(2, (3, 5, 8))?);
        let own = own_dots(&image, &text)?;
        for b in 0..3 {
            let all = image.matmul(&text.i(b)?.t()?)?;
            let error = (all.i(b)? - own.i(b)?)?.abs()?.max_all()?;
            assert!(value(&error)? < 1e-5);
        }
        assert!(own_dots(&image, &text.narrow(0, 0, 2)?).is_err());
        Ok(())
    }

    #[test]
    fn distances_of_unit_rows_agree_and_pull_along_the_sphere() -> Result<()> {
        let b = unit_length(&drawn(2, (4, 8))?, "b")?;
        let raw = Var::from_tensor(&drawn(1, (4, 8))?)?;
        let a = unit_length(raw.as_tensor(), "a")?;
        let cosine = cosine_distance(&a, &b)?;
        let squared = squared_distance(&a, &b)?;
        assert!((value(&squared)? - 2.0 * value(&cosine)?).abs() < 1e-5);
        assert!((0.0..=2.0).contains(&value(&cosine)?));
        assert!(value(&cosine_distance(&b, &b)?)?.abs() < 1e-6);
        assert!((value(&cosine_distance(&b.neg()?, &b)?)? - 2.0).abs() < 1e-6);
        // Only the direction of a row counts, so the gradient is orthogonal to the row.
        let gradients = cosine.backward()?;
        let g = gradients.get(raw.as_tensor()).cloned();
        let g = g.ok_or_else(|| Error::Data("no gradient".into()))?;
        let along = (&g * raw.as_tensor())?.sum(1)?.abs()?.max_all()?;
        assert!(value(&along)? < 1e-6 && value(&g.abs()?.max_all()?)? > 1e-3);
        assert!(cosine_distance(&a, &b.narrow(0, 0, 3)?).is_err());
        Ok(())
    }

    #[test]
    fn the_mean_of_exponentials_stays_in_range() -> Result<()> {
        let x = drawn(1, (5, 3, 4))?;
        let plain = x.exp()?.mean(0)?.log()?;
        let error = (log_mean_exp(&x)? - plain)?.abs()?.max_all()?;
        assert!(value(&error)? < 1e-5);
        // Jensen: the mean of the logarithms is below.
        let gap = (log_mean_exp(&x)? - x.mean(0)?)?.min_all()?;
        assert!(value(&gap)? > 0.0);
        let far = (x.narrow(0, 0, 1)? * 1000.0)?;
        let same = log_mean_exp(&far.repeat((4, 1, 1))?)?;
        let error = (same - far.squeeze(0)?)?.abs()?.max_all()?;
        assert_eq!(value(&error)?, 0.0);
        // Its gradient is a softmax over the first axis.
        let var = Var::from_tensor(&x)?;
        let gradients = log_mean_exp(var.as_tensor())?.sum_all()?.backward()?;
        let g = gradients.get(var.as_tensor()).cloned();
        let g = g.ok_or_else(|| Error::Data("no gradient".into()))?;
        let softmax = softmax(&x.transpose(0, 2)?.contiguous()?)?.transpose(0, 2)?;
        assert!(value(&(g - softmax)?.abs()?.max_all()?)? < 1e-6);
        Ok(())
    }

    #[test]
    fn soft_targets_are_shares() -> Result<()> {
        let logits = Tensor::new(&[[1f32, 2.0, -1.0], [0.5, 0.0, 3.0]], &Device::Cpu)?;
        let close = |a: Tensor, b: f32| -> Result<bool> { Ok((value(&a)? - b).abs() < 1e-6) };
        // One class is a label, whatever its number.
        let one = Tensor::new(&[[0f32, 7.0, 0.0], [0.0, 0.0, 1.0]], &Device::Cpu)?;
        let by_label = value(&cross_entropy(&logits, &[1, 2])?)?;
        assert!(close(soft_cross_entropy(&logits, &one)?, by_label)?);
        // Two count half each.
        let two = Tensor::new(&[[1f32, 1.0, 0.0], [0.0, 0.0, 1.0]], &Device::Cpu)?;
        let halves = (value(&cross_entropy(&logits, &[0, 2])?)? + by_label) / 2.0;
        assert!(close(soft_cross_entropy(&logits, &two)?, halves)?);
        for bad in [[0f32, 0.0, 0.0], [1.0, -1.0, 0.0], [f32::NAN, 1.0, 0.0]] {
            let bad = Tensor::new(&[[1f32, 0.0, 0.0], bad], &Device::Cpu)?;
            let told = soft_cross_entropy(&logits, &bad).unwrap_err().to_string();
            assert!(told.contains("image 1"), "{told}");
        }
        assert!(soft_cross_entropy(&logits, &one.narrow(1, 0, 2)?).is_err());
        Ok(())
    }
}
