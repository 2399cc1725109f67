//! CoOp's checks: what its card promises, on a tiny random CLIP.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use candle_core::{Device, IndexOp, Tensor};
use cliptune_core::checkpoint::random;
use cliptune_core::method::{Method, Predictor};
use cliptune_core::prompt::{ClassTokenPosition, ClassTokens};
use cliptune_core::rng::Rng;
use cliptune_core::run::{CheckpointPlan, Progress, TrainStatus};
use cliptune_core::task::{MemoryImages, Split};
use cliptune_core::train::{Batch, Keep, Objective, Step, gradients};
use cliptune_core::{
    Activation, Arch, Classes, Clip, Error, ImageBatch, Labelled, Result, Run, Storage, VisionArch,
};
use cliptune_text_pt::{CoOp, CoOpConfig, ZeroShot, ZeroShotConfig};
use serde_json::json;

fn clip() -> Result<Clip> {
    let arch = Arch {
        embed_dim: 32,
        image_resolution: 32,
        vision: VisionArch::Vit {
            layers: 1,
            width: 64,
            patch_size: 16,
        },
        context_length: 77,
        vocab_size: 49_408,
        text_width: 64,
        text_layers: 2,
        activation: Activation::QuickGelu,
    };
    Clip::from_checkpoint(random(&arch, 1)?, Storage::F32)
}

fn classes(names: &[&str]) -> Result<Classes> {
    Classes::new(names.iter().map(|n| (*n).to_owned()).collect())
}

fn flowers() -> Result<Classes> {
    classes(&["daisy", "common_sunflower", "hard-leaved pocket orchid"])
}

fn images(n: usize) -> Result<Tensor> {
    let values = Rng::stream(9, "pixels", &[]).normal(n * 3 * 32 * 32);
    let values: Vec<f32> = values.into_iter().map(|x| x as f32).collect();
    Ok(Tensor::from_vec(values, (n, 3, 32, 32), &Device::Cpu)?)
}

fn data() -> Result<Labelled> {
    let source = Arc::new(MemoryImages::new(images(14)?));
    let items = |range: std::ops::Range<usize>| range.map(|i| (i, (i % 3) as u32)).collect();
    Ok(Labelled {
        train: Split::new(source.clone(), items(0..11))?,
        val: Some(Split::new(source, items(11..14))?),
        classes: flowers()?,
    })
}

fn config() -> CoOpConfig {
    let mut config = CoOpConfig {
        n_ctx: Some(3),
        ..CoOpConfig::default()
    };
    config.train.epochs = Some(3);
    config.train.batch_size = 4;
    config
}

fn bits(t: &Tensor) -> Result<Vec<u32>> {
    Ok(t.flatten_all()?
        .to_vec1::<f32>()?
        .into_iter()
        .map(f32::to_bits)
        .collect())
}

fn difference(a: &Tensor, b: &Tensor) -> Result<f32> {
    Ok((a - b)?.abs()?.max_all()?.to_scalar::<f32>()? / b.abs()?.max_all()?.to_scalar::<f32>()?)
}

fn logits(predictor: &dyn Predictor, clip: &Clip, classes: &Classes) -> Result<Tensor> {
    let images = ImageBatch::of_features(clip.image().encode(&images(4)?)?);
    predictor.classifier(clip, classes)?.logits(&images)
}

/// Loss and gradient of the context on a batch.
fn gradient(clip: &Clip, coop: &mut CoOp, classes: &Classes) -> Result<(f32, Tensor)> {
    let tokens = ClassTokens::new(clip.text(), classes)?;
    let images = ImageBatch::of_features(clip.image().encode(&images(4)?)?);
    let batch = Batch {
        images: &images,
        labels: &[0, 1, 2, 1],
        classes: &tokens,
    };
    let step = Step {
        seed: 0,
        epoch: 0,
        epochs: 1,
        index: 0,
        steps: 1,
    };
    let (loss, gradients) = gradients(coop, clip, &batch, step)?;
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
    let coop = CoOp::new(&config, &clip, &classes, 1)?;
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
    let coop = CoOp::new(&config(), &clip, &flowers()?, 1)?;
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
        let mut shared_coop = CoOp::new(&shared, &clip, &classes, 1)?;
        let ctx = shared_coop.params().tensors()?.remove(0).1;
        let copies = Tensor::stack(&[&ctx, &ctx, &ctx], 0)?;
        let own = CoOpConfig {
            class_specific: true,
            ..shared
        };
        let mut own_coop = CoOp::with_tensors(
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
        let mut coop = CoOp::new(&config, &clip, &classes, 1)?;
        let start = (coop.params().tensors()?.remove(0).1 * 20.0)?;
        coop.params()
            .load(&[("ctx".to_owned(), start.clone())].into())?;
        let (_, g) = gradient(&clip, &mut coop, &classes)?;
        let size = g.sqr()?.sum_all()?.sqrt()?.to_scalar::<f32>()?;
        let direction = (&g / f64::from(size))?;
        let h = 0.02;
        let mut at = |sign: f64| -> Result<f64> {
            coop.params()
                .load(&[("ctx".to_owned(), (&start + (&direction * (sign * h))?)?)].into())?;
            Ok(f64::from(gradient(&clip, &mut coop, &classes)?.0))
        };
        let numeric = (at(1.0)? - at(-1.0)?) / (2.0 * h);
        assert!(
            (numeric - f64::from(size)).abs() < 0.01 * f64::from(size),
            "{position:?}: {numeric} {size}"
        );
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

/// Sets the run's cancel flag after a number of steps.
struct StopAfter(Arc<std::sync::atomic::AtomicBool>, Arc<AtomicUsize>, usize);

impl Progress for StopAfter {
    fn start(&mut self, _: &str, _: u64, _: u64) {}
    fn trained(&mut self, _: u64, _: &TrainStatus) {
        if self.1.fetch_add(1, Ordering::Relaxed) + 1 == self.2 {
            self.0.store(true, Ordering::Relaxed);
        }
    }
    fn advanced(&mut self, _: u64) {}
    fn finish(&mut self) {}
    fn note(&mut self, _: &str) {}
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
            stopped.progress = Box::new(StopAfter(stopped.cancel.clone(), Arc::default(), stop));
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
            // Another seed, other settings: refused, and the file stays.
            let other = Run { seed: 8, ..run() };
            let refused = config
                .fit(&clip, &data, &mut { other })
                .unwrap_err()
                .to_string();
            assert!(
                refused.contains("unfinished run with other weights, data, settings or seed"),
                "{refused}"
            );
            assert!(plan.path.exists());
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
            .and_then(|config| CoOp::new(&config, &clip, &classes(names)?, 1));
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

    let own = CoOp::new(
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
    let found = CoOp::with_tensors(
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
