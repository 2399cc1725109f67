//! Optimal transport: what every plan must satisfy, and a plain f64 reference beside it.

#![allow(clippy::unwrap_used, missing_docs)]

use candle_core::{Device, Tensor, Var};
use cliptune_core::transport::{Domain, PlanGradients, Sinkhorn, StopRule, Transport};
use cliptune_core::{Error, Result};
use proptest::prelude::*;

/// The updates as the papers write them, in f64, with the authors' rule for one problem or many.
fn reference(problems: &[Vec<f64>], n: usize, s: &Sinkhorn) -> (Vec<Vec<f64>>, u32) {
    let m = problems[0].len() / n;
    let kernels: Vec<Vec<f64>> = problems
        .iter()
        .map(|cost| cost.iter().map(|c| (-c / s.eps).exp()).collect())
        .collect();
    let mut r = vec![vec![1.0; m]; problems.len()];
    let mut c = vec![vec![1.0; n]; problems.len()];
    let mut done = 0;
    for _ in 0..s.max_iter {
        done += 1;
        let mut change = 0.0;
        for ((k, r), c) in kernels.iter().zip(&mut r).zip(&mut c) {
            for i in 0..m {
                let sum: f64 = (0..n).map(|j| k[i * n + j] * c[j]).sum();
                let fresh = 1.0 / m as f64 / sum;
                change += (fresh - r[i]).abs();
                r[i] = fresh;
            }
            for j in 0..n {
                let sum: f64 = (0..m).map(|i| k[i * n + j] * r[i]).sum();
                c[j] = 1.0 / n as f64 / sum;
            }
        }
        if change / ((m * problems.len()) as f64) < s.threshold {
            break;
        }
    }
    let plan = |p: usize| {
        (0..m * n)
            .map(|at| r[p][at / n] * kernels[p][at] * c[p][at % n])
            .collect()
    };
    ((0..problems.len()).map(plan).collect(), done)
}

fn tensor(problems: &[Vec<f64>], n: usize) -> Result<Tensor> {
    let m = problems[0].len() / n;
    let values: Vec<f32> = problems.iter().flatten().map(|&x| x as f32).collect();
    Ok(Tensor::from_vec(
        values,
        (problems.len(), m, n),
        &Device::Cpu,
    )?)
}

fn plans(transport: &Transport) -> Result<Vec<Vec<f32>>> {
    let (problems, m, n) = transport.plan.dims3()?;
    Ok(transport.plan.reshape((problems, m * n))?.to_vec2()?)
}

fn bits(transport: &Transport) -> Result<Vec<u32>> {
    Ok(plans(transport)?
        .concat()
        .into_iter()
        .map(f32::to_bits)
        .collect())
}

/// Runs until the row sums are right to seven digits.
fn at_rest(eps: f64) -> Sinkhorn {
    Sinkhorn {
        eps,
        max_iter: 100_000,
        threshold: 1e-9,
        stop: StopRule::Marginals,
        domain: Domain::Log,
        gradients: PlanGradients::Detached,
    }
}

const KERNEL: Sinkhorn = Sinkhorn {
    eps: 0.1,
    max_iter: 100,
    threshold: 1e-2,
    stop: StopRule::Batch,
    domain: Domain::Kernel,
    gradients: PlanGradients::Detached,
};

/// Problems of one shape: their costs and `n`.
fn problems() -> impl Strategy<Value = (Vec<Vec<f64>>, usize)> {
    (1usize..5, 1usize..8, 1usize..6).prop_flat_map(|(count, m, n)| {
        let cost = prop::collection::vec(0.0..2.0f64, m * n);
        (prop::collection::vec(cost, count), Just(n))
    })
}

fn close(ours: &[f32], expected: &[f64], tolerance: f64) -> std::result::Result<(), TestCaseError> {
    let largest = expected.iter().fold(0.0, |a: f64, b| a.max(b.abs()));
    for (a, b) in ours.iter().zip(expected) {
        prop_assert!((f64::from(*a) - b).abs() <= tolerance * largest, "{a} {b}");
    }
    prop_assert_eq!(ours.len(), expected.len());
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn both_domains_agree_with_the_reference((costs, n) in problems(), eps in 0.1..5.0f64, updates in 1usize..20) {
        for domain in [Domain::Kernel, Domain::Log] {
            let s = Sinkhorn { eps, max_iter: updates, threshold: 0.0, domain, ..KERNEL };
            let ours = s.solve(&tensor(&costs, n).unwrap()).unwrap();
            let (expected, done) = reference(&costs, n, &s);
            prop_assert_eq!(&ours.iterations, &vec![done; costs.len()]);
            for (ours, expected) in plans(&ours).unwrap().iter().zip(&expected) {
                close(ours, expected, 1e-5)?;
            }
        }
    }

    #[test]
    fn column_sums_are_exact_and_row_sums_as_good_as_asked((costs, n) in problems(), eps in 0.1..5.0f64) {
        let m = costs[0].len() / n;
        for domain in [Domain::Kernel, Domain::Log] {
            let s = Sinkhorn { domain, threshold: 1e-4, ..at_rest(eps) };
            for plan in plans(&s.solve(&tensor(&costs, n).unwrap()).unwrap()).unwrap() {
                prop_assert!(plan.iter().all(|t| *t >= 0.0));
                for j in 0..n {
                    let sum: f32 = (0..m).map(|i| plan[i * n + j]).sum();
                    prop_assert!((sum - 1.0 / n as f32).abs() < 1e-6, "{}", sum);
                }
                let missed: f32 = plan.chunks(n).map(|row| (row.iter().sum::<f32>() - 1.0 / m as f32).abs()).sum();
                prop_assert!(missed < 1.1e-4, "{}", missed);
            }
        }
    }

    #[test]
    fn turned_costs_turn_the_plan((costs, n) in problems(), eps in 0.1..5.0f64) {
        let cost = tensor(&costs, n).unwrap();
        let plan = at_rest(eps).solve(&cost).unwrap().plan;
        let turned = at_rest(eps).solve(&cost.transpose(1, 2).unwrap()).unwrap().plan.transpose(1, 2).unwrap();
        let difference = (plan - turned).unwrap().abs().unwrap().max_all().unwrap();
        prop_assert!(difference.to_scalar::<f32>().unwrap() < 1e-6);
    }

    #[test]
    fn reordering_rows_and_columns_reorders_the_plan((costs, n) in problems(), shift in 0usize..5) {
        let m = costs[0].len() / n;
        let moved = |at: usize| (at / n + shift) % m * n + (at % n + shift) % n;
        let reordered: Vec<Vec<f64>> = costs.iter().map(|c| (0..m * n).map(|at| c[moved(at)]).collect()).collect();
        for domain in [Domain::Kernel, Domain::Log] {
            let s = Sinkhorn { domain, max_iter: 7,
                threshold: 0.0,
                ..KERNEL };
            let plan = plans(&s.solve(&tensor(&costs, n).unwrap()).unwrap()).unwrap();
            let other = plans(&s.solve(&tensor(&reordered, n).unwrap()).unwrap()).unwrap();
            for (plan, other) in plan.iter().zip(&other) {
                let expected: Vec<f64> = (0..m * n).map(|at| f64::from(plan[moved(at)])).collect();
                close(other, &expected, 1e-5)?;
            }
        }
    }

    #[test]
    fn the_gradient_at_rest_is_that_of_finite_differences((costs, n) in problems(), eps in 0.2..3.0f64) {
        let costs = &costs[..1];
        // Of L = Σ w·T with weights w that are no sum of a row's and a column's number.
        let weight = |at: usize| (1.0 + at as f64 * 1.7).sin();
        let s = Sinkhorn { gradients: PlanGradients::Implicit, ..at_rest(eps) };
        let cost = Var::from_tensor(&tensor(costs, n).unwrap()).unwrap();
        let weights: Vec<Vec<f64>> = vec![(0..costs[0].len()).map(weight).collect()];
        let plan = s.solve(cost.as_tensor()).unwrap().plan;
        let loss = (plan * tensor(&weights, n).unwrap()).unwrap().sum_all().unwrap();
        let gradient = loss.backward().unwrap().get(cost.as_tensor()).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();

        let settled = Sinkhorn { eps, max_iter: 20_000, threshold: 1e-14, ..KERNEL };
        let loss = |cost: Vec<f64>| -> f64 {
            let (plan, _) = reference(&[cost], n, &settled);
            plan[0].iter().zip(&weights[0]).map(|(t, w)| t * w).sum()
        };
        let h = 1e-5;
        let numeric: Vec<f64> = (0..costs[0].len()).map(|at| {
            let moved = |by: f64| { let mut c = costs[0].clone(); c[at] += by; loss(c) };
            (moved(h) - moved(-h)) / (2.0 * h)
        }).collect();
        let largest = numeric.iter().fold(0.0, |a: f64, b| a.max(b.abs()));
        for (a, b) in gradient.iter().zip(&numeric) {
            prop_assert!((f64::from(*a) - b).abs() < 1e-3 * largest + 1e-6, "{:?} {:?}", gradient, numeric);
        }
    }
}

/// Costs of `count` problems that spread like those of PLOT: one minus small cosines.
fn spread(count: usize, m: usize, n: usize) -> Vec<Vec<f64>> {
    let cost = |p: usize, at: usize| 1.0 - 0.3 * (1.0 + p as f64 * 0.7 + at as f64 * 1.3).sin();
    (0..count)
        .map(|p| (0..m * n).map(|at| cost(p, at)).collect())
        .collect()
}

#[test]
fn the_authors_rule_stops_all_problems_at_once() -> Result<()> {
    let costs = spread(7, 6, 3);
    let (_, expected) = reference(&costs, 3, &KERNEL);
    assert!((2..100).contains(&expected), "{expected}");
    for domain in [Domain::Kernel, Domain::Log] {
        let s = Sinkhorn { domain, ..KERNEL };
        let found = s.solve(&tensor(&costs, 3)?)?.iterations;
        assert_eq!(found, vec![expected; 7]);
    }
    Ok(())
}

#[test]
fn only_the_authors_rule_looks_at_the_rest_of_the_batch() -> Result<()> {
    // One problem that rests at once beside one that does not.
    let mut costs = spread(1, 6, 3);
    costs.push(costs[0].iter().map(|c| (c - 1.0) * 3.0 + 1.0).collect());
    costs.push(vec![1.0; 18]);
    let both = tensor(&costs, 3)?;
    for stop in [StopRule::Batch, StopRule::PerProblem, StopRule::Marginals] {
        let s = Sinkhorn { stop, ..KERNEL };
        let together = s.solve(&both)?;
        let alone = (0..3)
            .map(|i| s.solve(&tensor(&costs[i..i + 1], 3)?))
            .collect::<Result<Vec<_>>>()?;
        let iterations: Vec<u32> = alone.iter().map(|a| a.iterations[0]).collect();
        let same = alone.iter().map(bits).collect::<Result<Vec<_>>>()?.concat() == bits(&together)?;
        assert_eq!(
            iterations == together.iterations,
            stop != StopRule::Batch,
            "{stop:?}"
        );
        assert_eq!(same, stop != StopRule::Batch, "{stop:?}");
    }
    Ok(())
}

#[test]
fn a_common_factor_of_the_kernel_moves_the_stop_but_not_the_plan_at_rest() -> Result<()> {
    let costs = spread(3, 6, 3);
    let higher: Vec<Vec<f64>> = costs
        .iter()
        .map(|c| c.iter().map(|c| c + 0.5).collect())
        .collect();
    let at_rest = at_rest(0.1);
    let close = |s: &Sinkhorn| -> Result<bool> {
        let (a, b) = (
            s.solve(&tensor(&costs, 3)?)?,
            s.solve(&tensor(&higher, 3)?)?,
        );
        let difference = (a.plan - b.plan)?.abs()?.max_all()?.to_scalar::<f32>()?;
        Ok(a.iterations == b.iterations && difference < 1e-6)
    };
    assert!(close(&at_rest)?);
    assert!(
        !close(&KERNEL)?,
        "exp(5) is a different scale for the authors' rule"
    );
    Ok(())
}

#[test]
fn plans_of_tiny_and_huge_eps_are_the_assignment_and_the_product() -> Result<()> {
    // The cheapest assignment is (0, 2), (1, 0), (2, 1).
    let cost = vec![vec![0.9, 0.8, 0.1, 0.2, 0.9, 0.7, 0.6, 0.3, 0.9]];
    let cost = tensor(&cost, 3)?;
    let third = 1.0 / 3.0;
    for (eps, expected) in [
        (1e-4, [0.0, 0.0, third, third, 0.0, 0.0, 0.0, third, 0.0]),
        (1e6, [third / 3.0; 9]),
    ] {
        let plan = &plans(&at_rest(eps).solve(&cost)?)?[0];
        let wrong = plan
            .iter()
            .zip(expected)
            .map(|(a, b)| (f64::from(*a) - b).abs());
        assert!(wrong.fold(0.0, f64::max) < 1e-6, "eps {eps}: {plan:?}");
        let kernel = Sinkhorn { eps, ..KERNEL }.solve(&cost);
        match kernel {
            Ok(_) => assert!(eps > 1.0),
            Err(e) => {
                assert!(eps < 1.0);
                assert!(e.to_string().contains("domain = \"log\""), "{e}");
            }
        }
    }
    Ok(())
}

#[test]
fn costs_that_say_nothing_give_uniform_plans() -> Result<()> {
    for (m, n, vary) in [(5, 3, false), (1, 4, true), (6, 1, true), (1, 1, true)] {
        let costs = match vary {
            true => spread(2, m, n),
            false => vec![vec![0.7; m * n]; 2],
        };
        for domain in [Domain::Kernel, Domain::Log] {
            let s = Sinkhorn { domain, ..KERNEL };
            for plan in plans(&s.solve(&tensor(&costs, n)?)?)? {
                let even = 1.0 / (m * n) as f32;
                assert!(
                    plan.iter().all(|t| (t - even).abs() < 1e-6),
                    "{m}×{n}: {plan:?}"
                );
            }
        }
    }
    Ok(())
}

#[test]
fn weights_of_ones_own_are_the_sums_of_the_plan() -> Result<()> {
    let (rows, columns) = ([0.5, 0.2, 0.2, 0.1], [0.7, 0.3]);
    let plan = at_rest(0.1)
        .solve_between(&tensor(&spread(2, 4, 2), 2)?, &rows, &columns)?
        .plan;
    let sums = |axis: usize| plan.sum(axis).and_then(|s| s.to_vec2::<f32>());
    for (found, expected) in [(sums(2)?, &rows[..]), (sums(1)?, &columns[..])] {
        for (a, b) in found[1].iter().zip(expected) {
            assert!((f64::from(*a) - b).abs() < 1e-6, "{a} {b}");
        }
    }
    Ok(())
}

#[test]
fn the_gradient_of_an_assignment_is_zero_and_finite() -> Result<()> {
    let cost = Var::from_tensor(&tensor(&[vec![0.1, 0.9, 0.9, 0.1]], 2)?)?;
    let s = Sinkhorn {
        gradients: PlanGradients::Implicit,
        ..at_rest(1e-4)
    };
    let weights = Tensor::new(&[[[1f32, -2.0], [0.5, 3.0]]], &Device::Cpu)?;
    let loss = (s.solve(cost.as_tensor())?.plan * weights)?.sum_all()?;
    let gradients = loss.backward()?;
    let gradient = gradients
        .get(cost.as_tensor())
        .unwrap()
        .flatten_all()?
        .to_vec1::<f32>()?;
    assert_eq!(gradient, [0.0; 4]);
    Ok(())
}

#[test]
fn a_detached_plan_is_a_constant() -> Result<()> {
    let cost = Var::from_tensor(&tensor(&spread(2, 4, 3), 3)?)?;
    assert!(!KERNEL.solve(cost.as_tensor())?.plan.track_op());
    let implicit = Sinkhorn {
        gradients: PlanGradients::Implicit,
        ..KERNEL
    };
    assert!(implicit.solve(cost.as_tensor())?.plan.track_op());
    Ok(())
}

#[test]
fn threads_change_no_bit() -> Result<()> {
    let cost = tensor(&spread(300, 7, 3), 3)?;
    let run = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .build()
            .unwrap();
        pool.install(|| bits(&KERNEL.solve(&cost)?))
    };
    assert_eq!(run(1)?, run(5)?);
    Ok(())
}

#[test]
fn bad_input_is_refused() -> Result<()> {
    let cost = tensor(&spread(2, 3, 2), 2)?;
    let refused = |s: Sinkhorn| s.solve(&cost).unwrap_err().to_string();
    for (s, expected) in [
        (
            Sinkhorn { eps: 0.0, ..KERNEL },
            "eps = 0: a finite number above 0",
        ),
        (
            Sinkhorn {
                eps: f64::NAN,
                ..KERNEL
            },
            "eps = NaN",
        ),
        (
            Sinkhorn {
                max_iter: 0,
                ..KERNEL
            },
            "max_iter = 0: at least one update",
        ),
        (
            Sinkhorn {
                threshold: -1.0,
                ..KERNEL
            },
            "threshold = -1",
        ),
    ] {
        let found = refused(s);
        assert!(found.contains(expected), "{found}");
    }
    for empty in [(0, 3, 2), (2, 0, 2), (2, 3, 0)] {
        let cost = Tensor::zeros(empty, candle_core::DType::F32, &Device::Cpu)?;
        assert!(matches!(KERNEL.solve(&cost), Err(Error::Shape { .. })));
    }
    let flat = Tensor::zeros((3, 2), candle_core::DType::F32, &Device::Cpu)?;
    assert!(matches!(KERNEL.solve(&flat), Err(Error::Shape { .. })));
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let cost = Tensor::new(&[[[0f32, bad]]], &Device::Cpu)?;
        let found = KERNEL.solve(&cost).unwrap_err().to_string();
        assert!(found.contains("the transport cost"), "{found}");
    }
    let third = 1.0 / 3.0;
    for (rows, columns, expected) in [
        (vec![0.5, 0.5], vec![0.5, 0.5], "2 row weights for 3 rows"),
        (vec![third; 3], vec![1.0], "1 column weights for 2 columns"),
        (vec![0.5, 0.5, 0.0], vec![0.5, 0.5], "a row weight of 0"),
        (vec![third; 3], vec![1.5, -0.5], "a column weight of -0.5"),
        (vec![third; 3], vec![0.5, 0.4], "unequal sums"),
    ] {
        let found = KERNEL
            .solve_between(&cost, &rows, &columns)
            .unwrap_err()
            .to_string();
        assert!(found.contains(expected), "{found}");
    }
    Ok(())
}
