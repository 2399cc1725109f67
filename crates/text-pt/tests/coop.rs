//! CoOp's checks, on a tiny random CLIP.

#![allow(clippy::unwrap_used)] // Helpers too: a missing value is a failed test.

mod common;

use std::collections::BTreeMap;
use std::time::Duration;

use candle_core::{Device, IndexOp, Tensor};
use cliptune_core::checkpoint::TorchState;
use cliptune_core::method::{Method, Predictor, Settings};
use cliptune_core::prompt::ClassTokenPosition;
use cliptune_core::run::CheckpointPlan;
use cliptune_core::train::Keep;
use cliptune_core::{Classes, Clip, Error, Learned, Result, Run};
use cliptune_text_pt::{CoOp, CoOpConfig, ZeroShot, ZeroShotConfig, coop};
use common::*;
use serde_json::json;

fn config() -> CoOpConfig {
    let mut config = CoOpConfig {
        n_ctx: Some(3),
        ..CoOpConfig::default()
    };
    config.train.epochs = Some(3);
    config.train.batch_size = 4;
    config
}

/// Loss and gradient of the context on a batch.
fn gradient(clip: &Clip, coop: &mut Learned<CoOp>, classes: &Classes) -> Result<(f32, Tensor)> {
    let (loss, gradients) = step(coop, clip, classes, 4)?;
    let names: Vec<_> = gradients
        .iter()
        .map(|(name, g)| (name.to_owned(), g.is_some()))
        .collect();
    assert_eq!(
        names,
        [("ctx".to_owned(), true)],
        "every learned tensor gets a gradient"
    );
    let ctx = gradients.get("ctx").cloned().ok_or(Error::Cancelled)?;
    Ok((loss.total.to_scalar()?, ctx))
}

#[test]
fn words_as_context_are_zero_shot() -> Result<()> {
    let (clip, classes) = (clip()?, flowers()?);
    let config = CoOpConfig {
        ctx_init: Some("a_photo_of_a".into()),
        ..CoOpConfig::default()
    };
    let coop = Learned::<CoOp>::new(&config, &clip, &classes, 1)?;
    let zeroshot = ZeroShot::new(&ZeroShotConfig::template("a photo of a {}."))?;
    assert_eq!(
        bits(&logits(&coop, &clip, &classes)?)?,
        bits(&logits(&zeroshot, &clip, &classes)?)?
    );
    Ok(())
}

#[test]
fn permuted_classes_permute_logits_and_more_classes_change_none() -> Result<()> {
    let clip = clip()?;
    let coop = Learned::<CoOp>::new(&config(), &clip, &flowers()?, 1)?;
    let before = logits(&coop, &clip, &flowers()?)?;
    let after = logits(
        &coop,
        &clip,
        &classes(&[
            "hard-leaved pocket orchid",
            "daisy",
            "rose",
            "common_sunflower",
        ])?,
    )?;
    for (from, to) in [(0, 1), (1, 3), (2, 0)] {
        assert!(difference(&after.i((.., to))?, &before.i((.., from))?)? < 1e-5);
    }
    Ok(())
}

#[test]
fn a_shared_context_is_equal_contexts_per_class_with_the_sum_of_their_gradients() -> Result<()> {
    let (clip, classes) = (clip()?, flowers()?);
    for position in [
        ClassTokenPosition::Front,
        ClassTokenPosition::Middle,
        ClassTokenPosition::End,
    ] {
        let shared = CoOpConfig {
            class_token_position: position,
            ..config()
        };
        let mut shared_coop = Learned::<CoOp>::new(&shared, &clip, &classes, 1)?;
        let ctx = shared_coop.params().tensors()?.remove(0).1;
        let copies = Tensor::stack(&[&ctx, &ctx, &ctx], 0)?;
        let own = CoOpConfig {
            class_specific: true,
            ..shared
        };
        let mut own_coop = Learned::<CoOp>::with_tensors(
            &own,
            &clip,
            &classes,
            1,
            &[("ctx".to_owned(), copies)].into(),
        )?;
        let (loss, g) = gradient(&clip, &mut shared_coop, &classes)?;
        let (own_loss, own_g) = gradient(&clip, &mut own_coop, &classes)?;
        assert_eq!(loss, own_loss);
        assert!(difference(&own_g.sum(0)?, &g)? < 1e-5, "{position:?}");
    }
    Ok(())
}

#[test]
fn the_gradient_agrees_with_finite_differences() -> Result<()> {
    let (clip, classes) = (clip()?, flowers()?);
    for (class_specific, position) in [
        (false, ClassTokenPosition::End),
        (true, ClassTokenPosition::Middle),
        (false, ClassTokenPosition::Front),
    ] {
        let config = CoOpConfig {
            class_specific,
            class_token_position: position,
            ..config()
        };
        let mut coop = Learned::<CoOp>::new(&config, &clip, &classes, 1)?;
        let start = (coop.params().tensors()?.remove(0).1 * 20.0)?;
        coop.params().load(&[("ctx".to_owned(), start)].into())?;
        let worst = worst_slope(&mut coop, &clip, &classes, 4, 0.02)?;
        assert!(worst < 0.01, "{position:?}: {worst}");
    }
    Ok(())
}

#[test]
fn the_longer_half_of_a_context_stands_behind_the_name() -> Result<()> {
    let (clip, classes) = (clip()?, flowers()?);
    let of = |position| -> Result<Vec<u32>> {
        let config = CoOpConfig {
            n_ctx: Some(1),
            class_token_position: position,
            ..config()
        };
        let coop = Learned::<CoOp>::new(&config, &clip, &classes, 1)?;
        bits(&logits(&coop, &clip, &classes)?)
    };
    // Half of one is nothing: the middle is the front.
    assert_eq!(
        of(ClassTokenPosition::Middle)?,
        of(ClassTokenPosition::Front)?
    );
    assert_ne!(
        of(ClassTokenPosition::Middle)?,
        of(ClassTokenPosition::End)?
    );
    Ok(())
}

#[test]
fn checkpoints_of_the_authors_code_are_read() -> Result<()> {
    let (clip, names) = (clip()?, flowers()?);
    let import = coop::ENTRY.import.unwrap();
    for class_specific in [false, true] {
        let config = CoOpConfig {
            class_specific,
            class_token_position: ClassTokenPosition::Front,
            ..config()
        };
        let coop = Learned::<CoOp>::new(&config, &clip, &names, 5)?;
        let mut tensors: BTreeMap<_, _> = coop.tensors()?.into_iter().collect();
        // Buffers of the names it was trained on: rebuilt, whatever they are.
        tensors.insert("token_prefix".into(), drawn(1, (9, 1, 64))?);
        tensors.insert("token_suffix".into(), drawn(1, (9, 73, 64))?);
        let mut state = TorchState {
            tensors,
            epoch: Some(50),
        };
        let settings = json!({"class_token_position": "front"});
        let imported = import(&state, &settings, &clip, &names)?;
        assert_eq!(imported.config["n_ctx"], 3);
        assert_eq!(imported.config["class_specific"], class_specific);
        let found = logits(imported.predictor.as_ref(), &clip, &names)?;
        assert_eq!(bits(&found)?, bits(&logits(&coop, &clip, &names)?)?);
        let other = classes(&["rose", "tulip", "lily"])?;
        let other = refused(imported.predictor.classifier(&clip, &other));
        assert_eq!(other.contains("cannot serve other classes"), class_specific);

        let two = classes(&["rose", "tulip"])?;
        let found = refused(import(&state, &settings, &clip, &two));
        let expected = "learned tensor `ctx` has shape [3, 3, 64], expected [2, 3, 64]";
        assert_eq!(found == expected, class_specific, "{found}");
        for (wrong, expected) in [
            (drawn(1, (3, 80))?, "shape [3, 80], expected [3, 64]"),
            (drawn(1, 64)?, "`ctx` of the checkpoint has shape [64]"),
        ] {
            state.tensors.insert("ctx".into(), wrong);
            let found = refused(import(&state, &settings, &clip, &names));
            assert!(found.contains(expected), "{found}");
        }
        state.tensors.remove("ctx");
        let found = refused(import(&state, &settings, &clip, &names));
        assert!(found.contains("the checkpoint holds no `ctx`"), "{found}");
    }
    Ok(())
}

#[test]
fn training_moves_the_context_alone_and_lowers_the_loss() -> Result<()> {
    let (clip, data) = (clip()?, data()?);
    let mut config = config();
    config.train.epochs = Some(30);
    config.train.lr = 0.02;
    let coop = config.fit(&clip, &data, &mut Run::quiet(1))?;
    let losses: Vec<f64> = coop.history().epochs.iter().map(|e| e.loss).collect();
    assert_eq!(losses.len(), 30);
    assert!(losses[29] < 0.9 * losses[0], "{losses:?}");
    assert_eq!(coop.history().epochs[0].lr, 1e-5);
    assert_eq!(coop.history().epochs[1].lr, 0.02);
    assert_eq!(coop.tensors()?.len(), 1);
    Ok(())
}

#[test]
fn a_stopped_run_goes_on_to_the_same_bits() -> Result<()> {
    let (clip, data) = (clip()?, data()?);
    let folder = tempfile::tempdir().map_err(|e| Error::io("temp", e))?;
    for keep in [Keep::Last, Keep::BestVal] {
        let mut config = config();
        config.train.keep = keep;
        let whole = config.fit(&clip, &data, &mut Run::quiet(7))?;
        // Two steps an epoch, three epochs: stop in the first, at the end of the second, in the last.
        for stop in [1, 4, 5] {
            let plan = CheckpointPlan {
                path: folder.path().join(format!("{keep:?}-{stop}.ckpt")),
                every: Duration::ZERO,
            };
            let run = || Run {
                checkpoint: Some(plan.clone()),
                ..Run::quiet(7)
            };
            let mut stopped = run();
            stopped.progress = Box::new(Watcher::stopping(&stopped, stop));
            assert!(matches!(
                config.fit(&clip, &data, &mut stopped),
                Err(Error::Cancelled)
            ));
            let resumed = config.fit(&clip, &data, &mut run())?;
            assert_eq!(
                bits(&resumed.tensors()?[0].1)?,
                bits(&whole.tensors()?[0].1)?,
                "stopped after {stop}"
            );
            assert_eq!(resumed.history(), whole.history());
            // Another seed, another start: refused, and the file stays.
            let start = Some(whole.tensors()?.into_iter().collect());
            for mut other in [Run { seed: 8, ..run() }, Run { start, ..run() }] {
                let refused = config.fit(&clip, &data, &mut other).unwrap_err();
                let refused = refused.to_string();
                assert!(
                    refused.contains("unfinished run with other weights, data, settings or seed"),
                    "{refused}"
                );
                assert!(plan.path.exists());
            }
        }
    }
    Ok(())
}

#[test]
fn a_diverging_run_names_epoch_step_and_tensor() -> Result<()> {
    let (clip, data) = (clip()?, data()?);
    let mut config = config();
    config.train.lr = 1e30;
    let refused = config
        .fit(&clip, &data, &mut Run::quiet(1))
        .unwrap_err()
        .to_string();
    assert!(
        refused.contains("epoch") && refused.contains("step"),
        "{refused}"
    );
    Ok(())
}

#[test]
fn misuse_is_refused_before_any_work() -> Result<()> {
    let clip = clip()?;
    let refused = |settings: serde_json::Value, names: &[&str]| -> Result<String> {
        let outcome = CoOpConfig::read(&settings)
            .and_then(|config| Learned::<CoOp>::new(&config, &clip, &classes(names)?, 1));
        Ok(outcome.err().map(|e| e.to_string()).unwrap_or_default())
    };
    let names = &["daisy", "rose"];
    for (settings, expected) in [
        (json!({"n_ctx": 0}), "n_ctx = 0: at least one context token"),
        (json!({"n_ctxx": 4}), "unknown field `n_ctxx`"),
        (json!({"train": {"epoch": 4}}), "unknown field `epoch`"),
        (
            json!({"train": {"lr": -1.0}}),
            "train.lr = -1: a finite number above 0",
        ),
        (json!({"train": {"batch_size": 0}}), "train.batch_size = 0"),
        (
            json!({"ctx_init": "a photo of a", "class_specific": true}),
            "one context for all classes",
        ),
        (
            json!({"ctx_init": "a photo of a", "n_ctx": 5}),
            "`a photo of a` is 4 tokens",
        ),
        (
            json!({"ctx_init": "a photo, of a"}),
            "words of one token each; these are 5 tokens",
        ),
        (
            json!({"n_ctx": 75}),
            "needs 79 tokens, the text tower takes 77",
        ),
    ] {
        let found = refused(settings, names)?;
        assert!(found.contains(expected), "{found}");
    }

    let own = Learned::<CoOp>::new(
        &CoOpConfig {
            class_specific: true,
            ..config()
        },
        &clip,
        &classes(names)?,
        1,
    )?;
    for other in [&["daisy", "tulip"][..], &["daisy", "rose", "tulip"]] {
        let found = logits(&own, &clip, &classes(other)?)
            .unwrap_err()
            .to_string();
        assert!(found.contains("cannot serve other classes"), "{found}");
    }
    let wide = Tensor::zeros((3, 80), candle_core::DType::F32, &Device::Cpu)?;
    let found = Learned::<CoOp>::with_tensors(
        &config(),
        &clip,
        &classes(names)?,
        1,
        &[("ctx".to_owned(), wide)].into(),
    );
    let found = found.unwrap_err().to_string();
    assert_eq!(
        found,
        "learned tensor `ctx` has shape [3, 80], expected [3, 64]"
    );
    Ok(())
}

#[test]
fn an_empty_class_or_a_label_without_a_name_is_refused() -> Result<()> {
    let (clip, mut data) = (clip()?, data()?);
    data.classes = classes(&["daisy", "rose", "tulip", "lily"])?;
    let found = config()
        .fit(&clip, &data, &mut Run::quiet(1))
        .unwrap_err()
        .to_string();
    assert!(
        found.contains("class `lily` has no training image"),
        "{found}"
    );
    data.classes = classes(&["daisy", "rose"])?;
    let found = config()
        .fit(&clip, &data, &mut Run::quiet(1))
        .unwrap_err()
        .to_string();
    assert!(found.contains("label 2 has no name"), "{found}");
    Ok(())
}
