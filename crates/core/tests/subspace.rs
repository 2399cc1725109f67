//! Subspaces of gradients: what a projection must satisfy, and the decomposition behind it.

#![allow(clippy::unwrap_used, missing_docs)]

use candle_core::{D, Device, Tensor};
use cliptune_core::rng::Rng;
use cliptune_core::subspace::{Principal, Subspace, align};
use cliptune_core::{Error, Result};
use proptest::prelude::*;

fn normal(seed: u64, rows: usize, columns: usize) -> Tensor {
    let values = Rng::stream(seed, "rows", &[]).normal(rows * columns);
    let values: Vec<f32> = values.into_iter().map(|x| x as f32).collect();
    Tensor::from_vec(values, (rows, columns), &Device::Cpu).unwrap()
}

/// Rows with falling variance along random directions, on top of a common offset that dwarfs it.
fn rows(seed: u64, f: usize, d: usize, fall: f64) -> Tensor {
    let scales =
        Tensor::from_iter((0..f).map(|i| fall.powi(i as i32) as f32), &Device::Cpu).unwrap();
    let mixed = normal(seed, f, f).broadcast_mul(&scales).unwrap();
    let offset = (normal(seed + 1, 1, d) * 3.0).unwrap();
    mixed
        .matmul(&normal(seed + 2, f, d))
        .unwrap()
        .broadcast_add(&offset)
        .unwrap()
}

fn difference(a: &Tensor, b: &Tensor) -> f32 {
    let difference = (a - b).unwrap().abs().unwrap().max_all().unwrap();
    difference.to_scalar::<f32>().unwrap()
}

fn dot(a: &Tensor, b: &Tensor) -> f32 {
    (a * b)
        .unwrap()
        .sum_all()
        .unwrap()
        .to_scalar::<f32>()
        .unwrap()
}

fn principal(rows: &Tensor, rank: usize) -> Principal {
    Subspace::principal(rows, rank).unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn a_projection_is_idempotent_self_adjoint_and_of_its_rank(
        seed in 0u64..1000, f in 2usize..9, d in 8usize..40, rank in 1usize..8,
    ) {
        let rank = rank.min(f - 1);
        let subspace = principal(&rows(seed, f, d, 0.7), rank).subspace;
        let (x, y) = (normal(seed + 5, 1, d), normal(seed + 6, 1, d));
        let (px, py) = (subspace.project(&x).unwrap(), subspace.project(&y).unwrap());
        prop_assert!(difference(&subspace.project(&px).unwrap(), &px) < 1e-5);
        prop_assert!((dot(&px, &y) - dot(&x, &py)).abs() < 1e-4);
        // The trace of a projection is its rank.
        let identity = Tensor::eye(d, candle_core::DType::F32, &Device::Cpu).unwrap();
        let trace: f32 = (0..d).map(|i| {
            let unit = identity.narrow(0, i, 1).unwrap();
            dot(&subspace.project(&unit).unwrap(), &unit)
        }).sum();
        prop_assert!((trace - rank as f32).abs() < 1e-4, "{}", trace);
        let u = subspace.components().unwrap();
        prop_assert_eq!(u.dims(), &[rank, d]);
        let eye = Tensor::eye(rank, candle_core::DType::F32, &Device::Cpu).unwrap();
        prop_assert!(difference(&u.matmul(&u.t().unwrap()).unwrap(), &eye) < 1e-5);
    }

    #[test]
    fn an_aligned_gradient_keeps_what_its_strength_leaves_of_the_conflict(
        seed in 0u64..1000, strength in 0.0..1.0f64, scale in 0.01..100.0f64,
    ) {
        let (g, k) = (normal(seed, 4, 10), normal(seed + 1, 4, 10));
        let found = align(&g, &k, strength).unwrap();
        let before = dot(&g, &k);
        prop_assert_eq!(found.cosine < 0.0, before < 0.0);
        let left = if before < 0.0 { (1.0 - strength as f32) * before } else { before };
        prop_assert!((dot(&found.gradient, &k) - left).abs() < 1e-4);
        prop_assert!(dot(&found.gradient, &found.gradient) <= dot(&g, &g) * 1.00001);
        // The other gradient's length does not matter, and strength 0 is no change.
        let scaled = align(&g, &(&k * scale).unwrap(), strength).unwrap();
        prop_assert!(difference(&scaled.gradient, &found.gradient) < 1e-5);
        prop_assert!(difference(&align(&g, &k, 0.0).unwrap().gradient, &g) == 0.0);
    }

    #[test]
    fn signs_and_order_of_the_components_do_not_matter(seed in 0u64..1000, f in 3usize..9) {
        let (d, rank) = (20, f - 1);
        let subspace = principal(&rows(seed, f, d, 0.7), rank).subspace;
        let signs = Tensor::from_iter((0..rank).map(|i| if i % 2 == 0 { -1f32 } else { 1.0 }), &Device::Cpu).unwrap();
        let order = Tensor::from_iter((0..rank as u32).rev(), &Device::Cpu).unwrap();
        let other = subspace.components().unwrap().broadcast_mul(&signs.unsqueeze(1).unwrap()).unwrap();
        let other = Subspace::from_components(&other.index_select(&order, 0).unwrap()).unwrap();
        let x = normal(seed + 5, 4, d / 4);
        prop_assert!(difference(&subspace.project(&x).unwrap(), &other.project(&x).unwrap()) < 1e-6);
    }

    #[test]
    fn all_directions_of_the_rows_leave_their_differences_as_they_are(seed in 0u64..1000, f in 2usize..9) {
        let rows = rows(seed, f, 30, 0.5);
        let subspace = principal(&rows, f - 1).subspace;
        for i in 1..f {
            let step = (rows.narrow(0, i, 1).unwrap() - rows.narrow(0, 0, 1).unwrap()).unwrap();
            prop_assert!(difference(&subspace.project(&step).unwrap(), &step) < 1e-5);
        }
    }

    #[test]
    fn the_order_of_the_rows_and_a_common_offset_do_not_matter(seed in 0u64..1000, f in 3usize..9) {
        let base = rows(seed, f, 24, 0.5);
        let order: Vec<u32> = (0..f as u32).rev().collect();
        let order = Tensor::new(order, &Device::Cpu).unwrap();
        let moved = (base.index_select(&order, 0).unwrap() + 0.25).unwrap();
        let (a, b) = (principal(&base, 2), principal(&moved, 2));
        let x = normal(seed + 5, 1, 24);
        prop_assert!(difference(&a.subspace.project(&x).unwrap(), &b.subspace.project(&x).unwrap()) < 1e-3);
        for (a, b) in a.explained_variance_ratio.iter().zip(&b.explained_variance_ratio) {
            prop_assert!((a - b).abs() < 1e-5);
        }
    }
}

#[test]
fn known_directions_are_found_in_the_order_of_their_variance() -> Result<()> {
    // Around the mean (1, 2, 3, 4): ±3 along the last axis, ±2 along (1, 1, 0, 0)/√2, ±0.001 along the third.
    let h = 2.0 * std::f32::consts::FRAC_1_SQRT_2;
    let rows = Tensor::new(
        &[
            [1.0, 2.0, 3.0, 7.0],
            [1.0, 2.0, 3.0, 1.0],
            [1.0 + h, 2.0 + h, 3.0, 4.0],
            [1.0 - h, 2.0 - h, 3.0, 4.0],
            [1.0, 2.0, 3.001, 4.0],
            [1.0, 2.0, 2.999, 4.0f32],
        ],
        &Device::Cpu,
    )?;
    let found = Subspace::principal(&rows, 3)?;
    let components = found.subspace.components()?.abs()?;
    let s = std::f32::consts::FRAC_1_SQRT_2;
    let expected = Tensor::new(
        &[
            [0.0, 0.0, 0.0, 1.0],
            [s, s, 0.0, 0.0],
            [0.0, 0.0, 1.0, 0.0f32],
        ],
        &Device::Cpu,
    )?;
    assert!(difference(&components, &expected) < 1e-6);
    let total = 9.0 + 4.0 + 1e-6;
    for (ratio, part) in found.explained_variance_ratio.iter().zip([9.0, 4.0, 1e-6]) {
        assert!((ratio / (part / total) - 1.0).abs() < 1e-3, "{ratio}");
    }
    Ok(())
}

#[test]
fn what_is_projected_keeps_its_shape_and_a_full_subspace_keeps_everything() -> Result<()> {
    let identity = Tensor::eye(12, candle_core::DType::F32, &Device::Cpu)?;
    let everything = Subspace::from_components(&identity)?;
    let x = normal(1, 3, 4);
    let projected = everything.project(&x)?;
    assert_eq!(projected.dims(), [3, 4]);
    assert_eq!(projected.to_vec2::<f32>()?, x.to_vec2::<f32>()?);
    assert_eq!((everything.rank(), everything.dim()), (12, 12));
    Ok(())
}

#[test]
fn a_published_size_is_decomposed() -> Result<()> {
    let rows = rows(3, 50, 8192, 0.8);
    let found = Subspace::principal(&rows, 10)?;
    let u = found.subspace.components()?;
    // Directions of the rows: nothing of W·Uᵀ·U is new, and the rest is shorter in every row on average.
    let centred = rows.broadcast_sub(&rows.mean_keepdim(0)?)?;
    let along = centred.matmul(&u.t()?)?;
    let held = along.sqr()?.sum(D::Minus2)?.to_vec1::<f32>()?;
    let total = centred.sqr()?.sum_all()?.to_scalar::<f32>()?;
    for (held, ratio) in held.iter().zip(&found.explained_variance_ratio) {
        assert!(
            (f64::from(held / total) - ratio).abs() < 1e-4 * ratio,
            "{held} {ratio}"
        );
    }
    assert!(found.explained_variance_ratio.is_sorted_by(|a, b| a >= b));
    Ok(())
}

#[test]
fn a_zero_gradient_is_in_no_conflict() -> Result<()> {
    let (g, zero) = (normal(1, 2, 3), normal(1, 2, 3).zeros_like()?);
    for (a, b) in [(&g, &zero), (&zero, &g)] {
        let found = align(a, b, 1.0)?;
        assert_eq!(found.cosine, 0.0);
        assert_eq!(found.gradient.to_vec2::<f32>()?, a.to_vec2::<f32>()?);
    }
    let found = align(&g, &(&g * -0.5)?, 1.0)?;
    assert!((found.cosine + 1.0).abs() < 1e-12);
    assert!(found.gradient.abs()?.max_all()?.to_scalar::<f32>()? < 1e-7);
    let found = align(&g, &normal(1, 3, 2), 1.0).unwrap_err().to_string();
    assert!(
        found.contains("has shape [3, 2], expected [2, 3]"),
        "{found}"
    );
    Ok(())
}

#[test]
fn bad_input_is_refused() -> Result<()> {
    let refused = |rows: &Tensor, rank| Subspace::principal(rows, rank).unwrap_err().to_string();
    let rows = rows(1, 5, 20, 0.7);
    for rank in [0, 5, 6] {
        let found = refused(&rows, rank);
        assert!(
            found.contains(&format!("rank = {rank}: at least 1")),
            "{found}"
        );
    }
    let one = normal(1, 1, 20);
    assert!(refused(&one, 1).contains("1 rows around their mean span 0 directions"));
    let equal = one.broadcast_as((4, 20))?.contiguous()?;
    assert!(refused(&equal, 1).contains("the 4 rows span 0 directions only"));
    let line = normal(2, 4, 1).matmul(&one)?;
    let found = refused(&line, 3);
    assert!(found.contains("span 1 directions only"), "{found}");
    let nan = (&rows * f64::NAN)?;
    assert!(matches!(
        Subspace::principal(&nan, 1),
        Err(Error::NotFinite { .. })
    ));

    let slanted = Tensor::new(&[[1f32, 0.0], [0.1, 1.0]], &Device::Cpu)?;
    let found = Subspace::from_components(&slanted).unwrap_err().to_string();
    assert!(
        found.contains("components 0 and 1") && found.contains("not orthonormal"),
        "{found}"
    );
    let subspace = Subspace::principal(&rows, 2)?.subspace;
    let found = subspace.project(&normal(1, 3, 7)).unwrap_err().to_string();
    assert!(found.contains("has shape [3, 7], expected [20]"), "{found}");
    Ok(())
}
