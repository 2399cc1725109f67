//! KgCoOp's checks: what its card promises, on a tiny random CLIP.

mod common;

use std::collections::BTreeMap;

use candle_core::{DType, Device, IndexOp, Tensor, Var};
use cliptune_core::checkpoint::TorchState;
use cliptune_core::method::{Method, Predictor, Settings};
use cliptune_core::{Clip, ImageBatch, Learned, Result, Run, ops};
use cliptune_text_pt::kgcoop::{self, Distance};
use cliptune_text_pt::{CoOpConfig, KgCoOp, KgCoOpConfig, ZeroShot, ZeroShotConfig};
use common::*;
use serde_json::json;

fn random() -> KgCoOpConfig {
    KgCoOpConfig {
        ctx_init: None,
        ..KgCoOpConfig::default()
    }
}

fn kgcoop(config: &KgCoOpConfig, clip: &Clip) -> Result<Learned<KgCoOp>> {
    Learned::<KgCoOp>::new(config, clip, &flowers()?, 1)
}

#[test]
fn without_weight_it_is_coop() -> Result<()> {
    let (clip, data) = (clip()?, data()?);
    let mut ours = KgCoOpConfig {
        w: 0.0,
        ..KgCoOpConfig::default()
    };
    (ours.train.epochs, ours.train.batch_size) = (Some(3), 4);
    let theirs = CoOpConfig {
        ctx_init: Some("a photo of a".into()),
        train: ours.train.clone(),
        ..CoOpConfig::default()
    };
    let ours = ours.fit(&clip, &data, &mut Run::quiet(1))?;
    let theirs = theirs.fit(&clip, &data, &mut Run::quiet(1))?;
    assert_eq!(bits(&ours.tensors()?[0].1)?, bits(&theirs.tensors()?[0].1)?);
    Ok(())
}

#[test]
fn the_distance_starts_at_zero_at_its_own_sentence_only() -> Result<()> {
    let (clip, names) = (clip()?, flowers()?);
    let distance = |config: KgCoOpConfig| -> Result<f32> {
        let mut method = kgcoop(&config, &clip)?;
        term(&step(&mut method, &clip, &names, 3)?.0, "kg")
    };
    assert!(distance(KgCoOpConfig::default())?.abs() < 1e-6);
    for (dataset, template) in [
        ("oxford_pets", "a photo of a {}, a type of pet."),
        ("DescribableTextures", "a photo of a {}, a type of texture."),
        ("dtd", "a photo of a {}, a type of texture."),
    ] {
        let of_dataset = distance(KgCoOpConfig {
            dataset: Some(dataset.into()),
            ..KgCoOpConfig::default()
        })?;
        let of_template = distance(KgCoOpConfig {
            template: Some(template.into()),
            ..KgCoOpConfig::default()
        })?;
        assert_eq!(of_dataset, of_template);
        assert!(of_dataset > 1e-4 && of_dataset <= 2.0, "{of_dataset}");
    }
    Ok(())
}

#[test]
fn the_papers_distance_is_twice_the_codes() -> Result<()> {
    let (clip, names) = (clip()?, flowers()?);
    let code = random();
    let paper = KgCoOpConfig {
        distance: Distance::Squared,
        w: code.w / 2.0,
        ..random()
    };
    let (code, code_g) = step(&mut kgcoop(&code, &clip)?, &clip, &names, 3)?;
    let (paper, paper_g) = step(&mut kgcoop(&paper, &clip)?, &clip, &names, 3)?;
    let (a, b) = (term(&paper, "kg")?, 2.0 * term(&code, "kg")?);
    assert!((a - b).abs() < 1e-5 * b, "{a} {b}");
    assert!((term(&code, "ce")? - term(&paper, "ce")?).abs() < 1e-6);
    let gradient = |g: cliptune_core::Gradients| g.get("ctx").cloned().expect("a gradient");
    assert!(difference(&gradient(paper_g), &gradient(code_g))? < 1e-4);
    let total = term(&code, "ce")? + 8.0 * term(&code, "kg")?;
    assert!((code.total.to_scalar::<f32>()? - total).abs() < 1e-5);
    Ok(())
}

#[test]
fn gradients_are_the_slopes_of_the_loss() -> Result<()> {
    let (clip, names) = (clip()?, flowers()?);
    for (class_specific, distance) in [(false, Distance::Squared), (true, Distance::Cosine)] {
        let config = KgCoOpConfig {
            class_specific,
            distance,
            ..random()
        };
        let mut method = kgcoop(&config, &clip)?;
        let start = (method.tensors()?.remove(0).1 * 20.0)?;
        method.params().load(&with(&method, "ctx", start)?)?;
        gradients_are_slopes(&mut method, &clip, &names, 3, 0.02)?;
    }
    Ok(())
}

#[test]
fn the_distance_pulls_a_feature_across_its_own_direction() -> Result<()> {
    let feature = Var::from_tensor(&drawn(1, (5, 16))?)?;
    let target = ops::unit_length(&drawn(2, (5, 16))?, "a target")?;
    let unit = ops::unit_length(feature.as_tensor(), "a feature")?;
    let gradients = ops::cosine_distance(&unit, &target)?.backward()?;
    let gradient = gradients.get(feature.as_tensor()).expect("a gradient");
    let along = (gradient * &unit)?
        .sum(1)?
        .abs()?
        .max(0)?
        .to_scalar::<f32>()?;
    let size = gradient.abs()?.max_all()?.to_scalar::<f32>()?;
    assert!(size > 1e-3 && along < 1e-6, "{along} {size}");
    Ok(())
}

#[test]
fn the_loss_does_not_depend_on_the_order_of_the_classes() -> Result<()> {
    let clip = clip()?;
    let turned = classes(&["hard-leaved pocket orchid", "daisy", "common_sunflower"])?;
    let mut method = kgcoop(&random(), &clip)?;
    // Labels 0, 1, 2 are permuted among the same three images, so only the distance is equal.
    let (before, _) = step(&mut method, &clip, &flowers()?, 3)?;
    let (after, _) = step(&mut method, &clip, &turned, 3)?;
    assert!((term(&before, "kg")? - term(&after, "kg")?).abs() < 1e-6);
    let (before, after) = (
        logits(&method, &clip, &flowers()?)?,
        logits(&method, &clip, &turned)?,
    );
    for (from, to) in [(0, 1), (1, 2), (2, 0)] {
        assert!(difference(&after.i((.., to))?, &before.i((.., from))?)? < 1e-5);
    }
    Ok(())
}

#[test]
fn a_large_weight_leads_to_the_hand_written_classifier() -> Result<()> {
    let (clip, data) = (clip()?, data()?);
    let template = "a drawing of a {}.";
    let zeroshot = ZeroShot::new(&ZeroShotConfig::template(template))?;
    let mut config = KgCoOpConfig {
        w: 100.0,
        template: Some(template.into()),
        ..random()
    };
    config.train.epochs = Some(300);
    config.train.lr = 1e-4;
    let names = flowers()?;
    let far = |method: &Learned<KgCoOp>| -> Result<f32> {
        difference(
            &logits(method, &clip, &names)?,
            &logits(&zeroshot, &clip, &names)?,
        )
    };
    let start = far(&kgcoop(&config, &clip)?)?;
    let end = far(&config.fit(&clip, &data, &mut Run::quiet(1))?)?;
    assert!(end < 0.5 * start, "{end} {start}");
    Ok(())
}

#[test]
fn prediction_does_not_read_the_sentence() -> Result<()> {
    let (clip, names) = (clip()?, flowers()?);
    let other = KgCoOpConfig {
        template: Some("a drawing of a {}.".into()),
        ..random()
    };
    let (a, b) = (kgcoop(&random(), &clip)?, kgcoop(&other, &clip)?);
    assert_eq!(
        bits(&logits(&a, &clip, &names)?)?,
        bits(&logits(&b, &clip, &names)?)?
    );
    Ok(())
}

#[test]
fn the_authors_checkpoint_is_read_with_its_dead_tensors() -> Result<()> {
    let (clip, names) = (clip()?, flowers()?);
    let method = kgcoop(&random(), &clip)?;
    let mut tensors: BTreeMap<String, Tensor> = method.tensors()?.into_iter().collect();
    let zeros = |shape: &[usize]| Tensor::zeros(shape, DType::F16, &Device::Cpu);
    for (key, shape) in [
        ("bias_vectors", &[1, 512][..]),
        ("meta_net.linear1.weight", &[512, 512]),
        ("meta_net.linear1.bias", &[512]),
        ("token_prefix", &[3, 1, 64]),
        ("token_suffix", &[3, 72, 64]),
    ] {
        tensors.insert(key.into(), zeros(shape)?);
    }
    let state = TorchState {
        tensors,
        epoch: Some(100),
    };
    let import = kgcoop::ENTRY.import.expect("KgCoOp reads checkpoints");
    let imported = import(&state, &json!({}), &clip, &classes(&["rose"])?)?;
    let found = logits(imported.predictor.as_ref(), &clip, &names)?;
    assert_eq!(bits(&found)?, bits(&logits(&method, &clip, &names)?)?);
    assert_eq!(imported.predictor.tensors()?.len(), 1);

    // Class-specific contexts are recognised, and belong to their classes.
    let specific = KgCoOpConfig {
        class_specific: true,
        ..random()
    };
    let specific = kgcoop(&specific, &clip)?;
    let state = TorchState {
        tensors: specific.tensors()?.into_iter().collect(),
        epoch: None,
    };
    let imported = import(&state, &json!({}), &clip, &names)?;
    assert_eq!(imported.config["class_specific"], true);
    let other = classes(&["rose", "tulip", "lily"])?;
    let found = refused(imported.predictor.classifier(&clip, &other));
    assert!(found.contains("cannot serve other classes"), "{found}");
    Ok(())
}

#[test]
fn misuse_is_refused() -> Result<()> {
    let (clip, names) = (clip()?, flowers()?);
    for (settings, expected) in [
        (json!({"n_ctx": 0}), "n_ctx = 0: at least one context token"),
        (json!({"w": -1.0}), "w = -1: a finite number of at least 0"),
        (
            json!({"class_specific": true}),
            "one context for all classes",
        ),
        (
            json!({"dataset": "flowers"}),
            "dataset = flowers: no sentence is known for it; set one yourself",
        ),
        (
            json!({"dataset": "dtd", "template": "a {}."}),
            "either a template or a data set",
        ),
        (json!({"template": "a flower"}), "a template has {}"),
        (json!({"n_ctx": 5}), "`a photo of a` is 4 tokens"),
        (json!({"n_ctx": 75, "ctx_init": ""}), "text tower takes 77"),
    ] {
        let outcome = KgCoOpConfig::read(&settings)
            .and_then(|c| Learned::<KgCoOp>::new(&c, &clip, &names, 1));
        let found = refused(outcome);
        assert!(found.contains(expected), "{found}");
    }
    let zero = ImageBatch::of_features(Tensor::zeros((2, 32), DType::F32, &Device::Cpu)?);
    let method = kgcoop(&random(), &clip)?;
    let found = refused(method.classifier(&clip, &names)?.logits(&zero));
    assert!(found.contains("an image feature, row 0"), "{found}");
    Ok(())
}
