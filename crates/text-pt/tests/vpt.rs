//! VPT's checks: what its card promises, on a tiny random CLIP.

mod common;

use std::collections::BTreeMap;

use candle_core::{D, DType, Device, IndexOp, Tensor};
use cliptune_core::checkpoint::TorchState;
use cliptune_core::method::{Method, Predictor, Settings};
use cliptune_core::prompt::ClassTokens;
use cliptune_core::train::Batch;
use cliptune_core::{Clip, ImageBatch, Learned, Result, Run, ops};
use cliptune_text_pt::vpt::{self, Bound, Prediction, VptType};
use cliptune_text_pt::{CoOp, CoOpConfig, Vpt, VptConfig, ZeroShot, ZeroShotConfig};
use common::*;
use serde_json::json;

const TYPES: [VptType; 2] = [VptType::CoopVpt, VptType::CocoopVpt];

fn of(vpt_type: VptType) -> VptConfig {
    VptConfig {
        vpt_type,
        samples: Some(3),
        ..VptConfig::default()
    }
}

fn vpt(config: &VptConfig, clip: &Clip) -> Result<Learned<Vpt>> {
    Learned::<Vpt>::new(config, clip, &flowers()?, 1)
}

/// As [`vpt`] with a narrower distribution, so that samples stay near the words.
fn narrow(config: &VptConfig, clip: &Clip) -> Result<Learned<Vpt>> {
    let method = vpt(config, clip)?;
    let mut tensors: BTreeMap<String, Tensor> = method.tensors()?.into_iter().collect();
    for (name, shift) in [
        ("std_posterior", -5.0),
        ("meta_net.weight_log_variance.module.4.bias", -5.0),
        ("mean_posterior", 0.01),
    ] {
        if let Some(tensor) = tensors.get_mut(name) {
            *tensor = (&*tensor + shift)?;
        }
    }
    method.params().load(&tensors)?;
    Ok(method)
}

#[test]
fn without_noise_and_mean_it_is_coop() -> Result<()> {
    let (clip, names) = (clip()?, flowers()?);
    let config = VptConfig {
        prediction: Prediction::Mean,
        ..VptConfig::default()
    };
    let ours = ops::softmax(&logits(&vpt(&config, &clip)?, &clip, &names)?)?;
    let coop = CoOpConfig {
        ctx_init: Some("a photo of a".into()),
        ..CoOpConfig::default()
    };
    let coop = Learned::<CoOp>::new(&coop, &clip, &names, 1)?;
    let zeroshot = ZeroShot::new(&ZeroShotConfig::template("a photo of a {}."))?;
    assert!(difference(&ours, &ops::softmax(&logits(&coop, &clip, &names)?)?)? < 1e-5);
    assert!(difference(&ours, &ops::softmax(&logits(&zeroshot, &clip, &names)?)?)? < 1e-5);
    Ok(())
}

#[test]
fn probabilities_sum_to_one_and_follow_their_classes() -> Result<()> {
    let clip = clip()?;
    for vpt_type in TYPES {
        let method = narrow(&of(vpt_type), &clip)?;
        let before = logits(&method, &clip, &flowers()?)?;
        let sums = before.exp()?.sum(D::Minus1)?.to_vec1::<f32>()?;
        assert!(sums.iter().all(|sum| (sum - 1.0).abs() < 1e-5), "{sums:?}");
        let turned = classes(&["hard-leaved pocket orchid", "daisy", "common_sunflower"])?;
        let after = logits(&method, &clip, &turned)?;
        for (from, to) in [(0, 1), (1, 2), (2, 0)] {
            assert!(difference(&after.i((.., to))?, &before.i((.., from))?)? < 1e-4);
        }
    }
    Ok(())
}

#[test]
fn predictions_do_not_depend_on_the_batch_unless_each_draws_anew() -> Result<()> {
    let (clip, names) = (clip()?, flowers()?);
    let all = images(&clip, 4)?;
    let one =
        |i| -> Result<ImageBatch> { Ok(ImageBatch::of_features(all.features()?.narrow(0, i, 1)?)) };
    for vpt_type in TYPES {
        for prediction in [Prediction::Samples, Prediction::Mean] {
            let config = VptConfig {
                prediction,
                ..of(vpt_type)
            };
            let method = narrow(&config, &clip)?;
            let classifier = method.classifier(&clip, &names)?;
            let together = classifier.logits(&all)?;
            for i in 0..4 {
                let alone = classifier.logits(&one(i)?)?;
                assert_eq!(bits(&alone)?, bits(&together.narrow(0, i, 1)?)?);
            }
        }
        let config = VptConfig {
            prediction: Prediction::Resample,
            ..of(vpt_type)
        };
        let method = narrow(&config, &clip)?;
        let classifier = method.classifier(&clip, &names)?;
        let (first, second) = (classifier.logits(&all)?, classifier.logits(&all)?);
        assert!(difference(&first, &second)? > 1e-4);
        // The sequence of draws can be repeated.
        let again = method.classifier(&clip, &names)?;
        assert_eq!(bits(&again.logits(&all)?)?, bits(&first)?);
        assert_eq!(bits(&again.logits(&all)?)?, bits(&second)?);
    }
    Ok(())
}

#[test]
fn a_batch_is_its_images_one_by_one() -> Result<()> {
    let (clip, names) = (clip()?, flowers()?);
    let all = images(&clip, 3)?;
    let tokens = ClassTokens::new(clip.text(), &names)?;
    for vpt_type in TYPES {
        let method = narrow(&of(vpt_type), &clip)?;
        let own = match vpt_type {
            VptType::CoopVpt => 1,
            VptType::CocoopVpt => 3,
        };
        let noise = drawn(8, (3, own, 64))?;
        let together = method.loss_with(
            &clip,
            &Batch {
                images: &all,
                labels: &[2, 0, 1],
                classes: &tokens,
            },
            &noise,
        )?;
        let (mut task, mut kl) = (0.0, 0.0);
        for (i, label) in [2, 0, 1].into_iter().enumerate() {
            let noise = noise.narrow(1, i.min(own - 1), 1)?;
            let one = ImageBatch::of_features(all.features()?.narrow(0, i, 1)?);
            let batch = Batch {
                images: &one,
                labels: &[label],
                classes: &tokens,
            };
            let loss = method.loss_with(&clip, &batch, &noise)?;
            task += term(&loss, "task")? / 3.0;
            kl += term(&loss, "kl")? / 3.0;
        }
        let found = (term(&together, "task")?, term(&together, "kl")?);
        assert!((found.0 - task).abs() < 1e-4 * task, "{found:?} {task}");
        assert!((found.1 - kl).abs() < 1e-5 * kl, "{found:?} {kl}");
    }
    Ok(())
}

#[test]
fn the_papers_bound_is_below_the_codes() -> Result<()> {
    let (clip, names) = (clip()?, flowers()?);
    for vpt_type in TYPES {
        let task = |bound, samples| -> Result<f32> {
            let config = VptConfig {
                bound,
                samples: Some(samples),
                ..of(vpt_type)
            };
            let mut method = narrow(&config, &clip)?;
            term(&step(&mut method, &clip, &names, 3)?.0, "task")
        };
        // As losses: the code's is never larger, and equal for one sample.
        assert!(task(Bound::Likelihood, 5)? < task(Bound::Elbo, 5)?);
        let (a, b) = (task(Bound::Likelihood, 1)?, task(Bound::Elbo, 1)?);
        assert!((a - b).abs() < 1e-5 * b, "{a} {b}");
    }
    Ok(())
}

#[test]
fn kl_is_zero_at_the_prior_alone() -> Result<()> {
    let (clip, names) = (clip()?, flowers()?);
    let kl = |mean: f64, log_variance: f64| -> Result<f32> {
        let mut method = vpt(&of(VptType::CoopVpt), &clip)?;
        let tensors = with(
            &method,
            "mean_posterior",
            drawn(1, (1, 64))?.affine(0.0, mean)?,
        )?;
        method.params().load(&tensors)?;
        let tensors = with(
            &method,
            "std_posterior",
            drawn(1, (1, 64))?.affine(0.0, log_variance)?,
        )?;
        method.params().load(&tensors)?;
        term(&step(&mut method, &clip, &names, 1)?.0, "kl")
    };
    assert!(kl(0.0, 0.0)?.abs() < 1e-7);
    for (mean, log_variance) in [(0.3f64, 0.0f64), (0.0, 0.4), (0.0, -0.4), (-1.0, 1.0)] {
        let expected = 0.5 * (log_variance.exp() + mean * mean - 1.0 - log_variance);
        let found = f64::from(kl(mean, log_variance)?);
        assert!((found - expected).abs() < 1e-5, "{found} {expected}");
        assert!(found > 0.0);
    }
    // At the start the log-variances are even in [0, 1).
    let mut method = vpt(&of(VptType::CoopVpt), &clip)?;
    let u = method
        .params()
        .get("std_posterior")
        .expect("coopvpt")
        .value()?;
    let u = u.flatten_all()?.to_vec1::<f32>()?;
    assert!(u.iter().all(|u| (0.0..1.0).contains(u)));
    let expected = u.iter().map(|u| 0.5 * (u.exp() - 1.0 - u)).sum::<f32>() / u.len() as f32;
    let found = term(&step(&mut method, &clip, &names, 1)?.0, "kl")?;
    assert!((found - expected).abs() < 1e-5, "{found} {expected}");
    Ok(())
}

#[test]
fn gradients_are_the_slopes_of_the_loss() -> Result<()> {
    let (clip, names) = (clip()?, flowers()?);
    for (vpt_type, bound) in [
        (VptType::CoopVpt, Bound::Likelihood),
        (VptType::CocoopVpt, Bound::Likelihood),
        (VptType::CoopVpt, Bound::Elbo),
    ] {
        let config = VptConfig {
            bound,
            kl_weight: 0.1,
            ..of(vpt_type)
        };
        let mut method = narrow(&config, &clip)?;
        let ctx = (drawn(4, (4, 64))? * 0.5)?;
        method.params().load(&with(&method, "ctx", ctx)?)?;
        gradients_are_slopes(&mut method, &clip, &names, 3, 0.01)?;
    }
    Ok(())
}

#[test]
fn keys_and_number_of_what_is_learned() -> Result<()> {
    let clip = clip()?;
    let shapes = |vpt_type| -> Result<Vec<(String, Vec<usize>)>> {
        let tensors = vpt(&of(vpt_type), &clip)?.tensors()?.into_iter();
        Ok(tensors.map(|(name, t)| (name, t.dims().to_vec())).collect())
    };
    let of = |name: &str, dims: &[usize]| (name.to_owned(), dims.to_vec());
    assert_eq!(
        shapes(VptType::CoopVpt)?,
        [
            of("ctx", &[4, 64]),
            of("mean_posterior", &[1, 64]),
            of("std_posterior", &[1, 64]),
        ]
    );
    let found = shapes(VptType::CocoopVpt)?;
    assert_eq!(found.len(), 13);
    for (i, net) in ["weight_mean", "weight_log_variance"].iter().enumerate() {
        let key = |end: &str| format!("meta_net.{net}.module.{end}");
        let expected = [
            of(&key("0.weight"), &[16, 32]),
            of(&key("0.bias"), &[16]),
            of(&key("2.weight"), &[16, 16]),
            of(&key("2.bias"), &[16]),
            of(&key("4.weight"), &[64, 16]),
            of(&key("4.bias"), &[64]),
        ];
        assert_eq!(found[1 + 6 * i..7 + 6 * i], expected);
    }
    Ok(())
}

#[test]
fn samples_and_epochs_are_the_authors() -> Result<()> {
    let of = |settings: serde_json::Value| VptConfig::read(&settings)?.samples_and_epochs();
    assert_eq!(of(json!({}))?, (10, 10));
    assert_eq!(of(json!({"dataset": "EuroSAT"}))?, (20, 60));
    assert_eq!(of(json!({"dataset": "ucf101"}))?, (5, 20));
    let settings = json!({"dataset": "ucf101", "samples": 2, "train": {"epochs": 3}});
    assert_eq!(of(settings)?, (2, 3));
    let (clip, data) = (clip()?, data()?);
    let mut config = VptConfig {
        samples: Some(1),
        ..VptConfig::default()
    };
    config.train.batch_size = 11;
    let method = config.fit(&clip, &data, &mut Run::quiet(1))?;
    assert_eq!((method.history().epochs.len(), method.samples()), (10, 1));
    Ok(())
}

#[test]
fn training_lowers_the_loss() -> Result<()> {
    let (clip, data) = (clip()?, data()?);
    for vpt_type in TYPES {
        let mut config = of(vpt_type);
        config.train.lr = 0.02;
        config.train.epochs = Some(40);
        let method = config.fit(&clip, &data, &mut Run::quiet(1))?;
        let losses: Vec<f64> = method.history().epochs.iter().map(|e| e.loss).collect();
        let mean = |losses: &[f64]| losses.iter().sum::<f64>() / losses.len() as f64;
        // Noisy by nature: the last five epochs against the first five.
        assert!(
            mean(&losses[35..]) < 0.95 * mean(&losses[..5]),
            "{vpt_type:?} {losses:?}"
        );
    }
    Ok(())
}

#[test]
fn the_authors_checkpoint_says_its_type() -> Result<()> {
    let (clip, names) = (clip()?, flowers()?);
    let import = vpt::ENTRY.import.expect("VPT reads checkpoints");
    for (vpt_type, own, other) in [
        (VptType::CoopVpt, "coopvpt", "cocoopvpt"),
        (VptType::CocoopVpt, "cocoopvpt", "coopvpt"),
    ] {
        let method = Learned::<Vpt>::new(&of(vpt_type), &clip, &names, 0)?;
        let mut tensors: BTreeMap<String, Tensor> = method.tensors()?.into_iter().collect();
        let prefix = Tensor::zeros((9, 1, 64), DType::F16, &Device::Cpu)?;
        tensors.insert("token_prefix".into(), prefix);
        let mut state = TorchState {
            tensors,
            epoch: None,
        };
        let imported = import(&state, &json!({"samples": 3}), &clip, &names)?;
        assert_eq!(imported.config["vpt_type"], own);
        let found = logits(imported.predictor.as_ref(), &clip, &names)?;
        assert_eq!(bits(&found)?, bits(&logits(&method, &clip, &names)?)?);
        let found = refused(import(&state, &json!({"vpt_type": other}), &clip, &names));
        assert!(found.contains("leave vpt_type out"), "{found}");
        // Another text tower's width.
        let wide = Tensor::zeros((4, 80), DType::F32, &Device::Cpu)?;
        state.tensors.insert("ctx".into(), wide);
        let found = refused(import(&state, &json!({}), &clip, &names));
        assert_eq!(
            found,
            "learned tensor `ctx` has shape [4, 80], expected [4, 64]"
        );
    }
    Ok(())
}

#[test]
fn misuse_is_refused() -> Result<()> {
    let (clip, names) = (clip()?, flowers()?);
    for (settings, expected) in [
        (json!({"samples": 0}), "samples = 0: at least one sample"),
        (json!({"n_ctx": 0}), "n_ctx = 0: at least one context token"),
        (
            json!({"kl_weight": -0.1}),
            "kl_weight = -0.1: a finite number of at least 0",
        ),
        (json!({"dataset": "flowers"}), "dataset = flowers: one of"),
        (
            json!({"vpt_type": "cocoopvpt", "strict": true, "train": {"batch_size": 4}}),
            "train.batch_size = 4: the authors' cocoopvpt is right for one image",
        ),
        (json!({"n_ctx": 5}), "`a photo of a` is 4 tokens"),
        (json!({"n_ctx": 75, "ctx_init": ""}), "text tower takes 77"),
        (json!({"vpt_type": "visual"}), "unknown variant `visual`"),
    ] {
        let outcome =
            VptConfig::read(&settings).and_then(|c| Learned::<Vpt>::new(&c, &clip, &names, 1));
        let found = refused(outcome);
        assert!(found.contains(expected), "{found}");
    }
    let strict = json!({"vpt_type": "cocoopvpt", "strict": true, "train": {"batch_size": 1}});
    assert!(VptConfig::read(&strict).is_ok());
    Ok(())
}
