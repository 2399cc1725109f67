//! ProGrad's checks: what its card promises, on a tiny random CLIP.

#![allow(clippy::unwrap_used)] // Helpers too: a missing value is a failed test.

mod common;

use candle_core::Tensor;
use cliptune_core::checkpoint::TorchState;
use cliptune_core::method::{Method, Predictor, Settings};
use cliptune_core::prompt::{ClassTokenPosition, ClassTokens};
use cliptune_core::{Clip, Gradients, Learned, Result, Run};
use cliptune_text_pt::{CoOp, CoOpConfig, ProGrad, ProGradConfig, prograd};
use common::*;
use serde_json::json;

fn random() -> ProGradConfig {
    ProGradConfig {
        n_ctx: 3,
        ctx_init: false,
        ..ProGradConfig::default()
    }
}

fn dot(a: &Tensor, b: &Tensor) -> Result<f32> {
    Ok((a * b)?.sum_all()?.to_scalar()?)
}

/// Gradients of the task and of the teacher at the start, and what became of the first.
fn both(method: &mut Learned<ProGrad>, clip: &Clip) -> Result<(Tensor, Tensor, Tensor)> {
    let (loss, shaped) = step(method, clip, &flowers()?, 3)?;
    let of = |loss: &Tensor| -> Result<Tensor> {
        let gradients = Gradients::of(loss, method.params())?;
        Ok(gradients.get("ctx").unwrap().clone())
    };
    let kl = loss.term("kl").unwrap();
    Ok((
        of(&loss.total)?,
        of(kl)?,
        shaped.get("ctx").unwrap().clone(),
    ))
}

#[test]
fn without_lambda_it_is_coop() -> Result<()> {
    let (clip, data) = (clip()?, data()?);
    let mut ours = ProGradConfig {
        lambda: 0.0,
        ..random()
    };
    (ours.train.epochs, ours.train.batch_size) = (Some(3), 4);
    let theirs = CoOpConfig {
        n_ctx: Some(3),
        train: ours.train.clone(),
        ..CoOpConfig::default()
    };
    let coop = theirs.fit(&clip, &data, &mut Run::quiet(1))?;
    let found = ours.fit(&clip, &data, &mut Run::quiet(1))?;
    assert_eq!(bits(&found.tensors()?[0].1)?, bits(&coop.tensors()?[0].1)?);
    // With it, some step of this run was in conflict.
    ours.lambda = 1.0;
    let found = ours.fit(&clip, &data, &mut Run::quiet(1))?;
    assert!(bits(&found.tensors()?[0].1)? != bits(&coop.tensors()?[0].1)?);
    Ok(())
}

#[test]
fn a_step_follows_the_task_and_only_a_conflict_is_taken_out() -> Result<()> {
    let clip = clip()?;
    let mut conflicts = Vec::new();
    for seed in 0..12 {
        for lambda in [1.0, 0.3] {
            let config = ProGradConfig { lambda, ..random() };
            let mut method = Learned::<ProGrad>::new(&config, &clip, &flowers()?, seed)?;
            let (task, general, shaped) = both(&mut method, &clip)?;
            let size = dot(&task, &task)?.sqrt() * dot(&general, &general)?.sqrt();
            let cosine = dot(&task, &general)? / size;
            assert!((f64::from(cosine) - method.cosine().unwrap()).abs() < 1e-5);
            conflicts.push(cosine < 0.0);
            if cosine < 0.0 {
                let left = (1.0 - lambda as f32) * cosine;
                assert!((dot(&shaped, &general)? / size - left).abs() < 1e-5);
                assert!(dot(&shaped, &shaped)? <= dot(&task, &task)?);
            } else {
                assert_eq!(bits(&shaped)?, bits(&task)?);
            }
        }
    }
    assert!(conflicts.contains(&true) && conflicts.contains(&false));
    Ok(())
}

#[test]
fn a_student_that_speaks_its_teachers_sentence_has_nothing_to_learn_from_it() -> Result<()> {
    let (clip, names) = (clip()?, flowers()?);
    for (dataset, n_ctx) in [("imagenet", 4), ("OxfordPets", 8), ("food101", 7)] {
        let config = ProGradConfig {
            n_ctx,
            dataset: Some(dataset.into()),
            temperature: 2.0,
            ..ProGradConfig::default()
        };
        let mut method = Learned::<ProGrad>::new(&config, &clip, &names, 1)?;
        let (task, general, _) = both(&mut method, &clip)?;
        assert!(dot(&general, &general)?.sqrt() < 1e-3 * dot(&task, &task)?.sqrt());
        // Zeros in front of the words are another sentence.
        let config = ProGradConfig {
            n_ctx: 16,
            ..config
        };
        let mut method = Learned::<ProGrad>::new(&config, &clip, &names, 1)?;
        let (task, general, _) = both(&mut method, &clip)?;
        assert!(dot(&general, &general)?.sqrt() > 1e-2 * dot(&task, &task)?.sqrt());
    }
    Ok(())
}

#[test]
fn gradients_of_both_losses_are_slopes() -> Result<()> {
    let (clip, names) = (clip()?, flowers()?);
    for position in [
        ClassTokenPosition::End,
        ClassTokenPosition::Middle,
        ClassTokenPosition::Front,
    ] {
        // Strength 0 leaves the gradient of the loss as it is.
        let config = ProGradConfig {
            class_token_position: position,
            lambda: 0.0,
            ..random()
        };
        let mut method = Learned::<ProGrad>::new(&config, &clip, &names, 3)?;
        gradients_are_slopes(&mut method, &clip, &names, 3, 0.005)?;
    }
    let config = ProGradConfig {
        temperature: 2.0,
        ..random()
    };
    let mut method = Learned::<ProGrad>::new(&config, &clip, &names, 3)?;
    let (_, general, _) = both(&mut method, &clip)?;
    let size = dot(&general, &general)?.sqrt();
    let start = method.tensors()?.remove(0).1;
    let mut at = |h: f64| -> Result<f32> {
        let moved = (&start + (&general * (h / f64::from(size)))?)?;
        method.params().load(&with(&method, "ctx", moved)?)?;
        let loss = step(&mut method, &clip, &names, 3)?.0;
        Ok(loss.term("kl").unwrap().to_scalar()?)
    };
    let slope = (at(0.004)? - at(-0.004)?) / 0.008;
    assert!((slope - size).abs() < 0.02 * size, "{slope} {size}");
    Ok(())
}

#[test]
fn a_prompt_keeps_its_own_words_for_other_classes() -> Result<()> {
    let clip = clip()?;
    let config = ProGradConfig {
        dataset: Some("oxford_pets".into()),
        n_ctx: 8,
        ..ProGradConfig::default()
    };
    let method = Learned::<ProGrad>::new(&config, &clip, &flowers()?, 1)?;
    let other = ClassTokens::new(clip.text(), &classes(&["rose", "tulip"])?)?;
    // Eight of the nine tokens are learned, and start where the sentence has them.
    let found = method.context.text_features(&clip, &other)?;
    let sentence = other.fill("a type of pet, a photo of a {}.")?;
    let sentence = clip
        .text()
        .encode(&cliptune_core::prompt::Prompts::of_tokens(sentence))?;
    assert!(difference(&found, &sentence)? < 1e-4);
    Ok(())
}

#[test]
fn checkpoints_of_the_authors_code_are_read() -> Result<()> {
    let (clip, names) = (clip()?, flowers()?);
    let import = prograd::ENTRY.import.unwrap();
    for class_specific in [false, true] {
        let config = ProGradConfig {
            class_specific,
            ..random()
        };
        let method = Learned::<ProGrad>::new(&config, &clip, &names, 5)?;
        let state = TorchState {
            tensors: method.tensors()?.into_iter().collect(),
            epoch: None,
        };
        let imported = import(&state, &json!({"ctx_init": false}), &clip, &names)?;
        assert_eq!(imported.config["n_ctx"], 3);
        assert_eq!(imported.config["class_specific"], class_specific);
        let found = logits(imported.predictor.as_ref(), &clip, &names)?;
        assert_eq!(bits(&found)?, bits(&logits(&method, &clip, &names)?)?);
        let other = classes(&["rose", "tulip", "lily"])?;
        let other = refused(imported.predictor.classifier(&clip, &other));
        assert_eq!(other.contains("cannot serve other classes"), class_specific);
    }
    // Words that the settings name must have been in the checkpoint.
    let state = TorchState {
        tensors: [("ctx".to_owned(), drawn(1, (3, 64))?)].into(),
        epoch: None,
    };
    let found = refused(import(&state, &json!({}), &clip, &names));
    assert!(found.contains("n_ctx = 3: at least the 4 words"), "{found}");
    Ok(())
}

#[test]
fn misuse_is_refused_before_any_work() -> Result<()> {
    let clip = clip()?;
    for (settings, expected) in [
        (json!({"n_ctx": 0}), "n_ctx = 0: at least one context token"),
        (
            json!({"n_ctx": 3}),
            "n_ctx = 3: at least the 4 words of `a photo of a`",
        ),
        (
            json!({"dataset": "fruit"}),
            "dataset = fruit: no sentence is known for it",
        ),
        (
            json!({"dataset": "dtd", "template": "a {}."}),
            "either a template or a data set",
        ),
        (json!({"template": "{} texture."}), "ends in ` {}.`"),
        (json!({"template": "a photo"}), "ends in ` {}.`"),
        (
            json!({"template": "a photo", "ctx_init": false}),
            "a template has {}",
        ),
        (
            json!({"class_specific": true}),
            "class_specific = true: initial words (ctx_init)",
        ),
        (json!({"temperature": 0.0}), "temperature = 0"),
        (json!({"lamda": 1.0}), "unknown field `lamda`"),
        (
            json!({"dataset": "oxford_pets", "class_token_position": "front"}),
            "class_token_position = front: end",
        ),
        (json!({"n_ctx": 75}), "the text tower takes 77"),
    ] {
        let found = refused(
            ProGradConfig::read(&settings)
                .and_then(|config| Learned::<ProGrad>::new(&config, &clip, &flowers()?, 1)),
        );
        assert!(found.contains(expected), "{settings}: {found}");
    }
    let config = ProGradConfig {
        lambda: f64::NAN,
        ..random()
    };
    assert!(
        refused(Learned::<ProGrad>::new(&config, &clip, &flowers()?, 1)).contains("lambda = NaN")
    );
    Ok(())
}

#[test]
fn a_lambda_outside_its_range_is_a_warning() -> Result<()> {
    let (clip, data) = (clip()?, data()?);
    for (lambda, warned) in [(1.5, true), (-0.1, true), (0.0, false), (1.0, false)] {
        let mut config = ProGradConfig { lambda, ..random() };
        config.train.epochs = Some(1);
        let watcher = Watcher::default();
        let mut run = Run::quiet(1);
        run.progress = Box::new(watcher.clone());
        config.fit(&clip, &data, &mut run)?;
        let found = watcher.notes.lock().unwrap().join(" ");
        assert_eq!(
            found.contains(&format!("lambda = {lambda}")),
            warned,
            "{found}"
        );
    }
    Ok(())
}

#[test]
fn it_starts_as_coop_does() -> Result<()> {
    let (clip, names) = (clip()?, flowers()?);
    let ours = Learned::<ProGrad>::new(&random(), &clip, &names, 4)?;
    let theirs = CoOpConfig {
        n_ctx: Some(3),
        ..CoOpConfig::default()
    };
    let theirs = Learned::<CoOp>::new(&theirs, &clip, &names, 4)?;
    assert_eq!(bits(&ours.tensors()?[0].1)?, bits(&theirs.tensors()?[0].1)?);
    assert_eq!(ours.cosine(), None);
    Ok(())
}
