//! Shaping gradients: the projection onto the main directions of a set of rows, and away from a conflict with another
//! gradient.
//!
//! For rows `W (f, d)` minus their mean, `W − 1·w̄ᵀ = A·Σ·U`, the subspace of rank `k` is spanned by the first `k` rows of `U`
//! (principal component analysis), and the projection of a gradient is `g ← Uᵀ·(U·g)`. Signs, and the order inside `U`,
//! do not matter to it.

use candle_core::{DType, Device, Tensor};

use crate::params::check_finite;
use crate::{Error, Result};

/// How far from orthonormal given components may be.
const ORTHONORMAL: f64 = 1e-3;
/// Passes over all pairs of rows at most; a handful is enough.
const MAX_PASSES: usize = 60;

/// Orthonormal directions of a space of parameters or gradients.
#[derive(Clone, Debug)]
pub struct Subspace {
    /// Row by row.
    components: Vec<f32>,
    rank: usize,
    dim: usize,
}

/// A [`Subspace`] and how much of its rows it holds.
#[derive(Clone, Debug)]
pub struct Principal {
    /// The main directions.
    pub subspace: Subspace,
    /// Share of the rows' variance along each of them, falling.
    pub explained_variance_ratio: Vec<f64>,
}

impl Subspace {
    /// The `rank` main directions of `rows (f, d)` around their mean, computed in f64.
    ///
    /// # Errors
    /// [`Error::Config`] if `rank` is 0 or not below `f`, or if the rows do not span that many directions;
    /// [`Error::NotFinite`].
    pub fn principal(rows: &Tensor, rank: usize) -> Result<Principal> {
        let (f, d) = rows.dims2()?;
        if rank == 0 || rank >= f || rank > d {
            let expected = format!(
                "at least 1, at most {d} and below the {f} rows that it is found in: {f} rows around their mean span {} directions",
                f.saturating_sub(1)
            );
            return Err(Error::config("rank", rank, expected));
        }
        check_finite(rows, "a row of the subspace")?;
        let mut rows = rows.to_dtype(DType::F64)?.flatten_all()?.to_vec1::<f64>()?;
        let longest = lengths(&rows, d).fold(0.0, f64::max);
        centre(&mut rows, d);
        orthogonalise(&mut rows, d);
        let lengths: Vec<f64> = lengths(&rows, d).collect();
        let mut order: Vec<usize> = (0..f).collect();
        order.sort_by(|&a, &b| lengths[b].total_cmp(&lengths[a]));
        let total: f64 = lengths.iter().map(|s| s * s).sum();
        let ratio: Vec<f64> = order
            .iter()
            .map(|&i| lengths[i] * lengths[i] / total)
            .collect();
        // Shorter directions are the rounding of the rows, which are f32.
        let least = longest * f64::from(f32::EPSILON / 2.0);
        let spanned = order.iter().filter(|&&i| lengths[i] > least).count();
        if spanned < rank {
            let shares: Vec<String> = ratio.iter().map(|r| format!("{r:.1e}")).collect();
            let expected = format!(
                "the {f} rows span {spanned} directions only beyond rounding (shares of the variance: {}); take fewer, or rows that differ more",
                shares.join(", ")
            );
            return Err(Error::config("rank", rank, expected));
        }
        let components = order[..rank]
            .iter()
            .flat_map(|&i| {
                let (row, length) = (&rows[i * d..(i + 1) * d], lengths[i]);
                row.iter().map(move |x| (x / length) as f32)
            })
            .collect();
        let subspace = Self {
            components,
            rank,
            dim: d,
        };
        Ok(Principal {
            subspace,
            explained_variance_ratio: ratio[..rank].to_vec(),
        })
    }

    /// Directions found elsewhere, `(rank, d)`.
    ///
    /// # Errors
    /// [`Error::Data`] if they are not orthonormal, [`Error::NotFinite`].
    pub fn from_components(components: &Tensor) -> Result<Self> {
        let (rank, dim) = components.dims2()?;
        check_finite(components, "a component of the subspace")?;
        let components = components.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?;
        let subspace = Self {
            components,
            rank,
            dim,
        };
        for a in 0..rank {
            for b in 0..=a {
                let product = dot(subspace.component(a), subspace.component(b));
                let expected = f64::from(u8::from(a == b));
                if (product - expected).abs() > ORTHONORMAL {
                    return Err(Error::Data(format!(
                        "components {b} and {a} of the subspace have the product {product}, expected {expected}: they are not orthonormal"
                    )));
                }
            }
        }
        Ok(subspace)
    }

    /// The directions, `(rank, d)`, rows of unit length.
    ///
    /// # Errors
    /// Whatever the tensor library refuses.
    pub fn components(&self) -> Result<Tensor> {
        let shape = (self.rank, self.dim);
        Ok(Tensor::from_slice(&self.components, shape, &Device::Cpu)?)
    }

    /// Number of directions.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// Length of a direction.
    pub fn dim(&self) -> usize {
        self.dim
    }

    /// `Uᵀ·(U·x)` for a tensor of any shape with [`Subspace::dim`] elements, taken row by row; no gradient flows through.
    ///
    /// # Errors
    /// [`Error::Shape`] for another number of elements.
    pub fn project(&self, x: &Tensor) -> Result<Tensor> {
        if x.elem_count() != self.dim {
            return Err(Error::Shape {
                what: "what is projected onto the subspace".into(),
                found: x.dims().to_vec(),
                expected: vec![self.dim],
            });
        }
        let values = x.flatten_all()?.to_dtype(DType::F32)?.to_vec1::<f32>()?;
        let mut projected = vec![0.0; self.dim];
        for i in 0..self.rank {
            let component = self.component(i);
            let share = dot(component, &values);
            for (sum, c) in projected.iter_mut().zip(component) {
                *sum += share * f64::from(*c);
            }
        }
        let projected = projected.into_iter().map(|x| x as f32).collect();
        Ok(Tensor::from_vec::<_, f32>(
            projected,
            x.shape(),
            x.device(),
        )?)
    }

    fn component(&self, i: usize) -> &[f32] {
        &self.components[i * self.dim..(i + 1) * self.dim]
    }
}

/// A gradient beside another one.
#[derive(Clone, Debug)]
pub struct Aligned {
    /// The gradient that does not point against the other.
    pub gradient: Tensor,
    /// Cosine of the two as they came, 0 if one of them is zero.
    pub cosine: f64,
}

/// Takes from `gradient` what points against `general`: `g − strength·(g·k̂)·k̂` with `k̂ = general / ‖general‖` where
/// their cosine is below 0, else `g` itself. Strength 1 leaves nothing of the conflict, 0 all of it.
///
/// # Errors
/// [`Error::Shape`] if the two differ in shape.
pub fn align(gradient: &Tensor, general: &Tensor, strength: f64) -> Result<Aligned> {
    if gradient.dims() != general.dims() {
        return Err(Error::Shape {
            what: "the gradient to align with".into(),
            found: general.dims().to_vec(),
            expected: gradient.dims().to_vec(),
        });
    }
    let g = gradient.flatten_all()?.to_vec1::<f32>()?;
    let k = general.flatten_all()?.to_vec1::<f32>()?;
    let (gk, gg, kk) = (dot(&g, &k), dot(&g, &g), dot(&k, &k));
    let cosine = match gg * kk > 0.0 {
        true => gk / (gg.sqrt() * kk.sqrt()),
        false => 0.0,
    };
    let gradient = match cosine < 0.0 {
        true => {
            let share = strength * gk / kk;
            let rest = g.iter().zip(&k);
            let rest = rest.map(|(g, k)| (f64::from(*g) - share * f64::from(*k)) as f32);
            Tensor::from_iter(rest, gradient.device())?.reshape(gradient.shape())?
        }
        false => gradient.clone(),
    };
    Ok(Aligned { gradient, cosine })
}

fn dot(a: &[f32], b: &[f32]) -> f64 {
    let products = a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b));
    products.sum()
}

fn centre(rows: &mut [f64], d: usize) {
    let f = rows.len() / d;
    for column in 0..d {
        let entries = || (0..f).map(|row| row * d + column);
        let mean = entries().map(|at| rows[at]).sum::<f64>() / f as f64;
        entries().for_each(|at| rows[at] -= mean);
    }
}

fn lengths(rows: &[f64], d: usize) -> impl Iterator<Item = f64> {
    rows.chunks_exact(d).map(|row| product(row, row).sqrt())
}

fn product(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// Rotates pairs of rows until all are orthogonal (one-sided Jacobi). They are then the right singular vectors, as long as
/// the singular values, small ones as exact as large ones.
fn orthogonalise(rows: &mut [f64], d: usize) {
    let f = rows.len() / d;
    // Rows that are rounding beside the others are orthogonal to them by being nothing.
    let nothing = f64::EPSILON * f64::EPSILON * product(rows, rows);
    let orthogonal = f64::EPSILON * (d as f64).sqrt();
    for _ in 0..MAX_PASSES {
        let mut rotated = false;
        for i in 0..f {
            for j in i + 1..f {
                let (head, tail) = rows.split_at_mut(j * d);
                let (a, b) = (&mut head[i * d..(i + 1) * d], &mut tail[..d]);
                let (aa, bb, ab) = (product(a, a), product(b, b), product(a, b));
                if ab.abs() <= orthogonal * (aa * bb).sqrt() || aa.min(bb) <= nothing {
                    continue;
                }
                rotated = true;
                let zeta = (bb - aa) / (2.0 * ab);
                let tangent = zeta.signum() / (zeta.abs() + zeta.hypot(1.0));
                let cosine = 1.0 / tangent.hypot(1.0);
                let sine = cosine * tangent;
                for (a, b) in a.iter_mut().zip(b) {
                    (*a, *b) = (cosine * *a - sine * *b, sine * *a + cosine * *b);
                }
            }
        }
        if !rotated {
            break;
        }
    }
}
