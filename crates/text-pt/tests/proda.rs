//! ProDA's checks: no authors' code is public, so its card's equations are tested themselves.

mod common;

use std::collections::BTreeMap;

use candle_core::{DType, Device, IndexOp, Tensor};
use cliptune_core::checkpoint::TorchState;
use cliptune_core::method::{Method, Predictor, Settings};
use cliptune_core::prompt::{ClassTokenPosition, ClassTokens};
use cliptune_core::rng::Rng;
use cliptune_core::train::{Batch, Objective, Step};
use cliptune_core::{Clip, ImageBatch, Learned, Result, Run, ops};
use cliptune_text_pt::proda::{self, diversity, variances};
use cliptune_text_pt::{CoOpConfig, ProDa, ProDaConfig};
use common::*;
use serde_json::json;

fn small() -> ProDaConfig {
    ProDaConfig {
        n_prompts: 8,
        n_ctx: 3,
        ..ProDaConfig::default()
    }
}

fn proda(config: &ProDaConfig, clip: &Clip) -> Result<Learned<ProDa>> {
    Learned::<ProDa>::new(config, clip, &flowers()?, 1)
}

/// With contexts large enough that prompts differ visibly.
fn lively(config: &ProDaConfig, clip: &Clip) -> Result<Learned<ProDa>> {
    let method = proda(config, clip)?;
    let ctx = (method.tensors()?.remove(0).1 * 20.0)?;
    method.params().load(&with(&method, "ctx", ctx)?)?;
    Ok(method)
}

fn unit(seed: u64, shape: impl Into<candle_core::Shape>) -> Result<Tensor> {
    ops::unit_length(&drawn(seed, shape)?, "features")
}

#[test]
fn one_context_is_coop() -> Result<()> {
    let (clip, data) = (clip()?, data()?);
    let mut ours = ProDaConfig {
        n_prompts: 1,
        prompt_batch: 1,
        ..ProDaConfig::default()
    };
    (ours.train.epochs, ours.train.batch_size) = (Some(3), 4);
    let theirs = CoOpConfig {
        train: ours.train.clone(),
        ..CoOpConfig::default()
    };
    let ours = ours.fit(&clip, &data, &mut Run::quiet(1))?;
    let theirs = theirs.fit(&clip, &data, &mut Run::quiet(1))?;
    let (a, b) = (&ours.tensors()?[0].1, &theirs.tensors()?[0].1);
    assert_eq!((a.dims(), b.dims()), (&[1, 16, 64][..], &[16, 64][..]));
    assert!(difference(&a.squeeze(0)?, b)? < 1e-5);
    let names = flowers()?;
    let (a, b) = (
        logits(&ours, &clip, &names)?,
        logits(&theirs, &clip, &names)?,
    );
    assert!(difference(&a, &b)? < 1e-5);
    Ok(())
}

#[test]
fn variances_are_those_of_the_plain_covariance() -> Result<()> {
    let (samples, n_cls, dim, batch) = (4, 5, 12, 3);
    let (image, features) = (unit(1, (batch, dim))?, unit(2, (samples, n_cls, dim))?);
    let labels = [3, 0, 4];
    let found = variances(&image, &features, &labels)?.to_vec2::<f32>()?;
    let v: Vec<Vec<f32>> = image.to_vec2()?;
    let w: Vec<Vec<Vec<f32>>> = features.to_vec3()?;
    let mean = |i: usize, d: usize| (0..samples).map(|k| w[k][i][d]).sum::<f32>() / samples as f32;
    let delta = |k: usize, i: usize, d: usize| f64::from(w[k][i][d] - mean(i, d));
    // The covariance of the two classes in dimension d, as the reference forms it.
    let covariance = |i: usize, j: usize, d: usize| {
        (0..samples)
            .map(|k| delta(k, i, d) * delta(k, j, d))
            .sum::<f64>()
            / (samples + 1) as f64
    };
    for b in 0..batch {
        let y = labels[b] as usize;
        let a = |i: usize, j: usize| -> f64 {
            (0..dim)
                .map(|d| f64::from(v[b][d]).powi(2) * covariance(i, j, d))
                .sum()
        };
        for j in 0..n_cls {
            let plain = a(y, y) + a(j, j) - 2.0 * a(y, j);
            let squares: f64 = (0..samples)
                .flat_map(|k| (0..dim).map(move |d| (k, d)))
                .map(|(k, d)| (f64::from(v[b][d]) * (delta(k, j, d) - delta(k, y, d))).powi(2))
                .sum();
            let squares = squares / (samples + 1) as f64;
            let found = f64::from(found[b][j]);
            assert!((found - plain).abs() < 1e-6, "{found} {plain}");
            assert!((found - squares).abs() < 1e-6, "{found} {squares}");
            assert!(found > -1e-7);
            assert_eq!(j == y, found.abs() < 1e-7, "{found}");
        }
    }
    // Samples in another order are the same Gaussian.
    let order = Tensor::new(&[2u32, 0, 3, 1], &Device::Cpu)?;
    let permuted = variances(&image, &features.index_select(&order, 0)?, &labels)?;
    assert!(difference(&permuted, &variances(&image, &features, &labels)?)? < 1e-5);
    // A single sample has no deviation.
    let single = variances(&image, &features.narrow(0, 0, 1)?, &labels)?;
    assert!(single.abs()?.max_all()?.to_scalar::<f32>()? < 1e-7);
    Ok(())
}

#[test]
fn the_surrogate_is_above_the_expected_cross_entropy_and_the_means() -> Result<()> {
    let (samples, n_cls, dim, scale) = (4, 5, 12, 10.0);
    let (image, features) = (unit(1, (3, dim))?, unit(2, (samples, n_cls, dim))?);
    let labels = [3, 0, 4];
    let mean = features.mean(0)?;
    let logits = ((&image * scale)?.matmul(&mean.t()?))?;
    let raised = (&logits + (variances(&image, &features, &labels)? * (0.5 * scale * scale))?)?;
    let loss =
        |logits: &Tensor| -> Result<f32> { Ok(ops::cross_entropy(logits, &labels)?.to_scalar()?) };
    let (plain, surrogate) = (loss(&logits)?, loss(&raised)?);
    assert!(plain < surrogate, "{plain} {surrogate}");
    // Classes from the Gaussian with covariance S_d[i, j], independent between dimensions: w = m + Σ_k ε_{d,k} δ_{·,k,d}/√(K+1).
    let deviations = features.broadcast_sub(&mean)?;
    let mut rng = Rng::stream(5, "gaussian", &[]);
    let (mut total, draws) = (0.0, 4000);
    for _ in 0..draws {
        let noise: Vec<f32> = rng
            .normal(samples * dim)
            .into_iter()
            .map(|x| x as f32)
            .collect();
        let noise = Tensor::from_vec(noise, (samples, 1, dim), &Device::Cpu)?;
        let moved = (deviations.broadcast_mul(&noise)?.sum(0)? / (samples as f64 + 1.0).sqrt())?;
        total += loss(&(&image * scale)?.matmul(&(&mean + moved)?.t()?)?)?;
    }
    let expected = total / draws as f32;
    assert!(
        plain < expected && expected < surrogate,
        "{plain} {expected} {surrogate}"
    );
    Ok(())
}

#[test]
fn diversity_is_the_mean_of_what_pairs_have_in_common() -> Result<()> {
    let value = |t: Tensor| -> Result<f32> { Ok(diversity(&t)?.to_scalar()?) };
    let features = unit(1, (5, 12))?;
    let rows: Vec<Vec<f32>> = features.to_vec2()?;
    let mut expected = 0.0;
    for (i, a) in rows.iter().enumerate() {
        for (j, b) in rows.iter().enumerate() {
            if i != j {
                expected += a.iter().zip(b).map(|(a, b)| a * b).sum::<f32>().abs() / 20.0;
            }
        }
    }
    assert!((value(features.clone())? - expected).abs() < 1e-5);
    let row = features.narrow(0, 0, 1)?;
    assert!((value(row.repeat((4, 1))?)? - 1.0).abs() < 1e-5);
    assert!(value(row)?.abs() < 1e-6);
    Ok(())
}

#[test]
fn equal_contexts_differ_by_their_places_alone() -> Result<()> {
    let (clip, names) = (clip()?, flowers()?);
    let mut method = proda(&small(), &clip)?;
    let one = (drawn(3, (1, 3, 64))? * 0.5)?;
    method
        .params()
        .load(&with(&method, "ctx", one.repeat((8, 1, 1))?)?)?;
    let (loss, _) = step(&mut method, &clip, &names, 3)?;
    assert!((term(&loss, "diversity")? - 1.0).abs() < 1e-5);
    let tokens = ClassTokens::new(clip.text(), &names)?;
    let image = ops::unit_length(images(&clip, 3)?.features()?, "image")?;
    let spread = |chosen: &[usize]| -> Result<f32> {
        let (features, _) = method.text_features(&clip, &tokens, chosen, false)?;
        let found = variances(&image, &features, &[0, 1, 2])?;
        Ok(found.abs()?.max_all()?.to_scalar()?)
    };
    assert!(spread(&[4, 5, 6, 7])? < 1e-9);
    assert!(spread(&[0, 2, 4, 6])? > 1e-7);
    Ok(())
}

#[test]
fn a_quarter_in_front_a_quarter_around_half_behind() -> Result<()> {
    let (clip, names) = (clip()?, flowers()?);
    let method = lively(&small(), &clip)?;
    let tokens = ClassTokens::new(clip.text(), &names)?;
    let ctx = method.tensors()?.remove(0).1;
    let all: Vec<usize> = (0..8).collect();
    let (features, nameless) = method.text_features(&clip, &tokens, &all, true)?;
    assert_eq!(nameless.expect("asked for").dims(), [8, 32]);
    use ClassTokenPosition::{End, Front, Middle};
    for (k, position) in [Front, Front, Middle, Middle, End, End, End, End]
        .into_iter()
        .enumerate()
    {
        assert_eq!(method.position(k), position);
        let prompts = tokens.weave(&ctx.i(k)?, "X X X", position)?;
        let alone = ops::unit_length(&clip.text().encode(&prompts)?, "text")?;
        assert!(difference(&features.i(k)?, &alone)? < 1e-5, "{k}");
    }
    // The mean of all predicts, at its own length.
    let mean = features.mean(0)?;
    let expected = clip.unit_logits(images(&clip, 4)?.features()?, &mean)?;
    assert!(difference(&logits(&method, &clip, &names)?, &expected)? < 1e-5);
    let lengths = mean.sqr()?.sum(1)?.to_vec1::<f32>()?;
    assert!(lengths.iter().all(|l| *l < 0.999), "{lengths:?}");
    Ok(())
}

#[test]
fn every_context_is_taken_once_in_a_round() -> Result<()> {
    let clip = clip()?;
    let config = ProDaConfig {
        prompt_batch: 2,
        ..small()
    };
    let method = proda(&config, &clip)?;
    // Three steps an epoch: a round of four goes on through the next epoch.
    let at = |global: usize| Step {
        seed: 1,
        epoch: global / 3,
        epochs: 9,
        index: global % 3,
        steps: 3,
    };
    let rounds: Vec<Vec<usize>> = (0..3)
        .map(|round| {
            (0..4)
                .flat_map(|i| method.drawn(at(4 * round + i)))
                .collect()
        })
        .collect();
    for round in &rounds {
        let mut sorted = round.clone();
        sorted.sort_unstable();
        assert_eq!(sorted, (0..8).collect::<Vec<_>>());
    }
    assert!(rounds[0] != rounds[1] || rounds[1] != rounds[2]);
    Ok(())
}

#[test]
fn the_loss_is_its_terms_and_never_below_the_means_cross_entropy() -> Result<()> {
    let (clip, names) = (clip()?, flowers()?);
    let (loss, gradients) = step(&mut lively(&small(), &clip)?, &clip, &names, 3)?;
    let ce = term(&loss, "ce")?;
    let total = ce + 0.1 * term(&loss, "diversity")?;
    assert!((loss.total.to_scalar::<f32>()? - total).abs() < 1e-5);
    let means = loss.logits.clone().expect("logits of the mean");
    let plain = ops::cross_entropy(&means, &[0, 1, 2])?.to_scalar::<f32>()?;
    assert!(plain < ce, "{plain} {ce}");
    let config = ProDaConfig {
        surrogate: false,
        ..small()
    };
    let (without, _) = step(&mut lively(&config, &clip)?, &clip, &names, 3)?;
    assert!((term(&without, "ce")? - plain).abs() < 1e-6);
    // The diversity term reaches the contexts that the step does not take.
    let g = gradients.get("ctx").expect("a gradient").abs()?;
    let by_context = g.sum((1, 2))?.to_vec1::<f32>()?;
    assert!(by_context.iter().all(|g| *g > 0.0), "{by_context:?}");
    Ok(())
}

#[test]
fn gradients_are_the_slopes_of_the_loss() -> Result<()> {
    let (clip, names) = (clip()?, flowers()?);
    for (surrogate, alpha) in [(true, 0.1), (false, 0.0), (true, 5.0)] {
        let config = ProDaConfig {
            surrogate,
            alpha,
            ..small()
        };
        let mut method = lively(&config, &clip)?;
        gradients_are_slopes(&mut method, &clip, &names, 3, 0.01)?;
    }
    Ok(())
}

#[test]
fn training_lowers_the_loss() -> Result<()> {
    let (clip, data) = (clip()?, data()?);
    let mut config = ProDaConfig {
        prompt_batch: 8,
        ..small()
    };
    (config.train.lr, config.train.epochs) = (0.02, Some(30));
    let method = config.fit(&clip, &data, &mut Run::quiet(1))?;
    let losses: Vec<f64> = method.history().epochs.iter().map(|e| e.loss).collect();
    assert!(losses[29] < 0.9 * losses[0], "{losses:?}");
    Ok(())
}

#[test]
fn checkpoints_say_how_many_contexts_there_are() -> Result<()> {
    let (clip, names) = (clip()?, flowers()?);
    let import = proda::ENTRY.import.expect("ProDA reads checkpoints");
    let config = ProDaConfig {
        n_prompts: 12,
        ..small()
    };
    let method = proda(&config, &clip)?;
    let mut tensors: BTreeMap<String, Tensor> = method.tensors()?.into_iter().collect();
    for key in ["token_prefix", "nc_token_prefix"] {
        let zeros = Tensor::zeros((1, 1, 64), DType::F16, &Device::Cpu)?;
        tensors.insert(key.into(), zeros);
    }
    let mut state = TorchState {
        tensors,
        epoch: None,
    };
    let imported = import(&state, &json!({}), &clip, &classes(&["rose"])?)?;
    assert_eq!(imported.config["n_prompts"], 12);
    let found = logits(imported.predictor.as_ref(), &clip, &names)?;
    assert_eq!(bits(&found)?, bits(&logits(&method, &clip, &names)?)?);
    for (shape, expected) in [
        (&[3, 64][..], "is it CoOp's?"),
        (&[6, 3, 64], "n_prompts = 6: 1, or a number that 4 divides"),
        (&[8, 3, 80], "shape [8, 3, 80], expected [8, 3, 64]"),
    ] {
        let zeros = Tensor::zeros(shape, DType::F32, &Device::Cpu)?;
        state.tensors.insert("ctx".into(), zeros);
        let found = refused(import(&state, &json!({}), &clip, &names));
        assert!(found.contains(expected), "{found}");
    }
    Ok(())
}

#[test]
fn permuted_classes_permute_logits_and_more_classes_change_none() -> Result<()> {
    let clip = clip()?;
    let method = lively(&small(), &clip)?;
    let before = logits(&method, &clip, &flowers()?)?;
    let other = classes(&[
        "hard-leaved pocket orchid",
        "daisy",
        "rose",
        "common_sunflower",
    ])?;
    let after = logits(&method, &clip, &other)?;
    for (from, to) in [(0, 1), (1, 3), (2, 0)] {
        assert!(difference(&after.i((.., to))?, &before.i((.., from))?)? < 1e-5);
    }
    Ok(())
}

#[test]
fn misuse_is_refused() -> Result<()> {
    let (clip, names) = (clip()?, flowers()?);
    for (settings, expected) in [
        (
            json!({"n_prompts": 6, "prompt_batch": 3}),
            "n_prompts = 6: 1, or a number that 4 divides",
        ),
        (json!({"n_prompts": 0}), "n_prompts = 0"),
        (
            json!({"prompt_batch": 5}),
            "prompt_batch = 5: a divisor of n_prompts = 32",
        ),
        (json!({"prompt_batch": 0}), "prompt_batch = 0"),
        (json!({"alpha": -1.0}), "alpha = -1: a finite number"),
        (json!({"n_ctx": 0}), "n_ctx = 0: at least one context token"),
        (json!({"n_ctx": 75}), "text tower takes 77"),
    ] {
        let outcome =
            ProDaConfig::read(&settings).and_then(|c| Learned::<ProDa>::new(&c, &clip, &names, 1));
        let found = refused(outcome);
        assert!(found.contains(expected), "{found}");
    }
    // Labels out of range, labels missing.
    let method = proda(&small(), &clip)?;
    let tokens = ClassTokens::new(clip.text(), &names)?;
    let two: ImageBatch = images(&clip, 2)?;
    for (labels, expected) in [
        (&[0, 3][..], "label 3 with 3 classes"),
        (&[], "for 0 labels"),
    ] {
        let batch = Batch {
            images: &two,
            labels,
            classes: &tokens,
        };
        let step = Step {
            seed: 0,
            epoch: 0,
            epochs: 1,
            index: 0,
            steps: 1,
        };
        let found = refused(method.loss(&clip, &batch, step));
        assert!(found.contains(expected), "{found}");
    }
    Ok(())
}
