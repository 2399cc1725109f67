//! What MVLPT promises: what its variants equal, what tasks count, where an adaptation begins, what it refuses.

#![allow(clippy::unwrap_used)]

mod support;

use std::collections::BTreeMap;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use cliptune_core::checkpoint::TorchState;
use cliptune_core::method::{Method, Predictor, Settings};
use cliptune_core::prompt::{ClassTokens, Prompts};
use cliptune_core::task::{MemoryImages, Split};
use cliptune_core::tasks;
use cliptune_core::train::{Batch, Objective, Step};
use cliptune_core::visual_prompt::{Tokens, VisualPrompts};
use cliptune_core::{
    Classes, Clip, Error, ImageBatch, ImageNeeds, Labelled, Learned, Result, Run, VisionArch, ops,
    params,
};
use cliptune_multimodal_pt::{Mvlpt, MvlptConfig, mvlpt};
use serde_json::{Value, json};

use crate::support::{
    BLOCKS, classes, clip, clip_with, close, gradients_are_slopes, largest, pixels, step,
};

const STEP: Step = Step {
    seed: 3,
    epoch: 0,
    epochs: 1,
    index: 0,
    steps: 1,
};

fn made(settings: Value, clip: &Clip, classes: &Classes) -> Result<Learned<Mvlpt>> {
    Learned::<Mvlpt>::new(&MvlptConfig::read(&settings)?, clip, classes, 1)
}

fn named(names: &[&str]) -> Result<Classes> {
    Classes::new(names.iter().map(|n| (*n).to_owned()).collect())
}

/// Every combination of what changes what is learned.
fn variants() -> Vec<Value> {
    vec![
        json!({"variant": "coop", "n_ctx": 3}),
        json!({"variant": "coop", "n_ctx": 2, "class_specific": true}),
        json!({"variant": "vpt", "n_ctx_vision": 2}),
        json!({"variant": "vpt", "n_ctx_vision": 2, "vpt_deep": false, "vpt_project": 16}),
        json!({"variant": "vpt", "n_ctx_vision": 2, "vpt_project": 16, "vpt_dropout": 0.3}),
        json!({"project_dim": 32, "n_ctx": 2, "n_ctx_vision": 2}),
        json!({"project_dim": 64, "interaction": "attention", "n_ctx": 2, "n_ctx_vision": 2}),
        json!({"project_dim": 128, "n_ctx": 2, "n_ctx_vision": 1, "class_specific": true}),
        json!({"project_method": "mlp", "project_dim": 32, "vpt_deep": false}),
        json!({"project_method": "identity", "vpt_project": 16}),
        json!({"variant": "cocoop", "n_ctx": 2}),
    ]
}

#[test]
fn the_gradient_reaches_everything_that_is_learned() -> Result<()> {
    let (clip, classes) = (clip()?, classes()?);
    for settings in variants() {
        let mut mvlpt = made(settings.clone(), &clip, &classes)?;
        gradients_are_slopes(&mut mvlpt, &clip)?;
        let sees = mvlpt.params().get("vpt_embeddings").is_some();
        assert_eq!(mvlpt.needs() == ImageNeeds::Pixels, sees, "{settings}");
    }
    Ok(())
}

#[test]
fn a_context_of_words_starts_as_the_sentence() -> Result<()> {
    let (clip, classes) = (clip()?, classes()?);
    let tokens = ClassTokens::new(clip.text(), &classes)?;
    let sentence = Prompts::of_tokens(tokens.fill("a photo of a {}.")?);
    let sentence = clip.text().encode(&sentence)?;
    let coop = made(
        json!({"variant": "coop", "ctx_init": "a_photo_of_a", "class_token_position": "end"}),
        &clip,
        &classes,
    )?;
    let features = coop.text_features(&clip, &tokens, &coop.prompts()?)?;
    assert!(close(&features, &sentence)?);
    // Hand-written, at unit length.
    let vpt = made(json!({"variant": "vpt"}), &clip, &classes)?;
    let features = vpt.text_features(&clip, &tokens, &vpt.prompts()?)?;
    let unit = ops::unit_length(&sentence, "a sentence")?;
    assert!(close(&features, &unit)?);
    // Without an image to shift it, CoCoOp's context is CoOp's.
    let cocoop = made(
        json!({"variant": "cocoop", "ctx_init": "a photo of a"}),
        &clip,
        &classes,
    )?;
    let features = cocoop.text_features(&clip, &tokens, &cocoop.prompts()?)?;
    assert!(close(&features, &sentence)?);
    Ok(())
}

/// Without a network the two halves are CoOp and VPT.
#[test]
fn uncoupled_prompts_are_those_of_the_other_variants() -> Result<()> {
    let (clip, classes) = (clip()?, classes()?);
    let tokens = ClassTokens::new(clip.text(), &classes)?;
    let both = made(json!({"project_method": "identity"}), &clip, &classes)?;
    let held: BTreeMap<String, Tensor> = both.tensors()?.into_iter().collect();
    let of = |settings: Value| -> Result<Learned<Mvlpt>> {
        let config = MvlptConfig::read(&settings)?;
        Learned::<Mvlpt>::with_tensors(&config, &clip, &classes, 0, &held)
    };
    let coop = of(json!({"variant": "coop", "n_ctx": 4}))?;
    let text = |m: &Mvlpt| m.text_features(&clip, &tokens, &m.prompts()?);
    assert_eq!(largest(&(text(&both)? - text(&coop)?)?)?, 0.0);
    let vpt = of(json!({"variant": "vpt", "n_ctx_vision": 4}))?;
    let images = ImageBatch::of_pixels(pixels(2)?);
    let seen = |m: &Mvlpt| m.image_features(&clip, &images, &m.prompts()?, None);
    assert_eq!(largest(&(seen(&both)? - seen(&vpt)?)?)?, 0.0);
    // And these are deep prompts behind the first LayerNorm.
    let mut by_hand = VisualPrompts::new();
    by_hand.replace(0, Tokens::Shared(held["vpt_embeddings"].squeeze(0)?));
    for block in 1..BLOCKS {
        let tokens = held["vpt_embeddings_deep"].get(block - 1)?;
        by_hand.replace(block, Tokens::Shared(tokens));
    }
    let expected = clip.image().encode_prompted(&pixels(2)?, &by_hand)?;
    assert_eq!(largest(&(seen(&vpt)? - expected)?)?, 0.0);
    Ok(())
}

/// Which prompts change with those of one block.
#[test]
fn coupled_prompts_see_one_another_if_they_are_asked_to() -> Result<()> {
    let (clip, classes) = (clip()?, classes()?);
    for interaction in ["none", "attention"] {
        let mvlpt = made(json!({"interaction": interaction}), &clip, &classes)?;
        let before = mvlpt.prompts()?;
        let deeper = mvlpt.params().get("vpt_embeddings_deep").unwrap();
        let start = deeper.value()?;
        let changed = [(start.narrow(0, 0, 1)? * 2.0)?, start.narrow(0, 1, 1)?];
        deeper.set(&Tensor::cat(&changed, 0)?)?;
        let after = mvlpt.prompts()?;
        let (text, text_after) = (before.text.unwrap(), after.text.unwrap());
        let (visual, visual_after) = (before.visual.unwrap(), after.visual.unwrap());
        let sees = interaction == "attention";
        assert_eq!(largest(&(text - text_after)?)? > 0.0, sees);
        for block in 0..BLOCKS {
            let moved = (visual.get(block)? - visual_after.get(block)?)?;
            let expected = sees || block == 1;
            assert_eq!(largest(&moved)? > 0.0, expected, "{interaction} {block}");
        }
    }
    Ok(())
}

#[test]
fn dropout_is_drawn_for_every_image_of_a_step() -> Result<()> {
    let (clip, classes) = (clip()?, classes()?);
    let mut vpt = made(
        json!({"variant": "vpt", "vpt_dropout": 0.5}),
        &clip,
        &classes,
    )?;
    assert_eq!(step(&mut vpt, &clip)?.0, step(&mut vpt, &clip)?.0);
    // The same picture twice: equal to predict, different in training.
    let twice = Tensor::cat(&[pixels(1)?, pixels(1)?], 0)?;
    let images = ImageBatch::of_pixels(twice);
    let prompts = vpt.prompts()?;
    let apart = |training| -> Result<f32> {
        let features = vpt.image_features(&clip, &images, &prompts, training)?;
        largest(&(features.get(0)? - features.get(1)?)?)
    };
    assert_eq!(apart(None)?, 0.0);
    assert!(apart(Some(STEP))? > 0.0);
    Ok(())
}

const PETS: [&str; 2] = ["beagle", "sphynx"];
const LAND: [&str; 3] = ["river", "forest", "highway"];

fn all_names() -> Result<Classes> {
    named(&[&PETS[..], &LAND[..]].concat())
}

fn masked(mask: &str) -> Value {
    json!({
        "variant": "coop", "n_ctx": 2, "task_mask": mask,
        "tasks": [{"name": "pets", "n_cls": 2}, {"name": "land", "n_cls": 3}],
    })
}

#[test]
fn other_tasks_count_as_the_mask_says() -> Result<()> {
    let clip = clip()?;
    let classes = all_names()?;
    let tokens = ClassTokens::new(clip.text(), &classes)?;
    let images = ImageBatch::encode(&clip, &pixels(3)?, ImageNeeds::GlobalFeatures)?;
    let labels = [1u32, 4, 2];
    let batch = Batch {
        images: &images,
        labels: &labels,
        classes: &tokens,
    };
    for mask in ["none", "zero", "neg_inf"] {
        let mvlpt = made(masked(mask), &clip, &classes)?;
        let logits = mvlpt.classifier(&clip, &classes)?.logits(&images)?;
        // −log of the share of the own class, by hand.
        let mut expected = 0.0;
        for (row, label) in logits.to_vec2::<f32>()?.iter().zip(labels) {
            let own = if label < 2 { 0..2 } else { 2..5 };
            let weight = |(class, logit): (usize, &f32)| match (own.contains(&class), mask) {
                (true, _) | (_, "none") => f64::from(*logit).exp(),
                (false, "zero") => 1.0,
                _ => 0.0,
            };
            let total: f64 = row.iter().enumerate().map(weight).sum();
            expected += (total.ln() - f64::from(row[label as usize])) / 3.0;
        }
        let loss = mvlpt.loss(&clip, &batch, STEP)?;
        let total = f64::from(loss.total.to_scalar::<f32>()?);
        assert!(
            (total - expected).abs() < 1e-4 * expected.max(1.0),
            "{mask}"
        );
        // Targets of one class are labels, and the mask's low logits make no NaN.
        let mut targets = vec![0f32; 15];
        for (image, label) in labels.iter().enumerate() {
            targets[image * 5 + *label as usize] = 2.0;
        }
        let targets = Tensor::from_vec(targets, (3, 5), &Device::Cpu)?;
        let soft = mvlpt.loss_of_targets(&clip, &images, &tokens, (&targets, &[0, 1, 1]), STEP)?;
        let soft = f64::from(soft.total.to_scalar::<f32>()?);
        assert!((soft - total).abs() < 1e-5, "{mask}: {soft} {total}");
    }
    Ok(())
}

/// Pictures of both tasks: the first 4 of pets, the others of land.
fn two_tasks() -> Result<(Labelled, Labelled)> {
    let source = Arc::new(MemoryImages::new(pixels(10)?));
    let part = |first: usize, names: &[&str]| -> Result<Labelled> {
        let n = names.len();
        let items = (0..n).map(|i| (first + i, i as u32)).collect();
        let val = (0..n).map(|i| (first + n + i, i as u32)).collect();
        Ok(Labelled {
            train: Split::new(source.clone(), items)?,
            val: Some(Split::new(source.clone(), val)?),
            classes: named(names)?,
        })
    };
    Ok((part(0, &PETS)?, part(4, &LAND)?))
}

#[test]
fn tasks_are_learned_together_and_measured_apart() -> Result<()> {
    let clip = clip()?;
    let (pets, land) = two_tasks()?;
    let (data, found) = tasks::union(&[("pets", &pets), ("land", &land)])?;
    let mut config = MvlptConfig::read(&masked("neg_inf"))?;
    assert_eq!(config.tasks, found);
    config.train.epochs = Some(3);
    config.train.batch_size = 5;
    config.train.keep = cliptune_core::train::Keep::BestVal;
    let fitted = config.fit(&clip, &data, &mut Run::quiet(1))?;
    let val = data.val.as_ref().unwrap();
    let apart = found.accuracies(&fitted, &clip, val, &data.classes)?;
    // A task by itself gives the same: among its own classes, whatever others there are.
    for (own, accuracy) in [&pets, &land].iter().zip(&apart) {
        let val = own.val.as_ref().unwrap();
        let alone = cliptune_core::train::accuracy(&fitted, &clip, val, &own.classes)?;
        assert_eq!(Some(alone), *accuracy);
    }
    let mean = apart.iter().flatten().sum::<f64>() / 2.0;
    assert_eq!(
        found.mean_accuracy(&fitted, &clip, val, &data.classes)?,
        mean
    );
    let kept = &fitted.history().epochs[fitted.history().kept - 1];
    assert_eq!(kept.val_accuracy, Some(mean));
    // Fewer classes than the tasks have.
    let refused = config.fit(&clip, &pets, &mut Run::quiet(1)).unwrap_err();
    assert!(refused.to_string().contains("5 classes, the data 2"));
    Ok(())
}

#[test]
fn an_adaptation_begins_with_the_mean_of_its_sources() -> Result<()> {
    let clip = clip()?;
    let (pets, land) = two_tasks()?;
    let mut config = MvlptConfig::read(&json!({"n_ctx": 2, "n_ctx_vision": 2}))?;
    config.train.epochs = Some(1);
    let source = |seed: u64| -> Result<BTreeMap<String, Tensor>> {
        let fitted = config.fit(&clip, &pets, &mut Run::quiet(seed))?;
        Ok(fitted.tensors()?.into_iter().collect())
    };
    let sources = [source(1)?, source(2)?, source(3)?];
    let mean = params::mean(&sources.iter().collect::<Vec<_>>())?;
    for (name, tensor) in &mean {
        let sum = (&sources[0][name] + &sources[1][name])?;
        let sum = (sum + &sources[2][name])?;
        assert!(largest(&(sum - (tensor * 3.0)?)?)? < 1e-5, "{name}");
    }
    // A rate of next to nothing shows where it began.
    config.train.lr = 1e-30;
    config.train.schedule = serde_json::from_value(json!({
        "decay": {"kind": "cosine"}, "warmup": {"kind": "none"},
    }))
    .unwrap();
    let mut run = Run::quiet(4);
    run.start = Some(mean.clone());
    let adapted = config.fit(&clip, &land, &mut run)?;
    for (name, tensor) in adapted.tensors()? {
        assert_eq!(largest(&(tensor - &mean[&name])?)?, 0.0, "{name}");
    }
    // Prompts of other lengths do not fit.
    let other = MvlptConfig {
        n_ctx: Some(3),
        ..config.clone()
    };
    let refused = other.fit(&clip, &land, &mut run).unwrap_err().to_string();
    assert!(refused.contains("`ctx` has shape [2, 64]"), "{refused}");
    Ok(())
}

#[test]
fn checkpoints_say_what_was_learned() -> Result<()> {
    let (clip, classes) = (clip()?, classes()?);
    for settings in variants() {
        let mvlpt = made(settings.clone(), &clip, &classes)?;
        let mut tensors: BTreeMap<String, Tensor> = mvlpt.tensors()?.into_iter().collect();
        tensors.insert("token_prefix".into(), pixels(1)?);
        // As older checkpoints have it.
        let old = tensors.into_iter();
        let old = old.map(|(key, t)| (key.replace("mvlpt_proj", "upt_proj"), t));
        let state = TorchState {
            tensors: old.collect(),
            epoch: None,
        };
        let given = json!({"interaction": settings.get("interaction").unwrap_or(&json!("none"))});
        let imported = mvlpt::import(&state, &given, &clip, &classes)?;
        for (key, value) in settings.as_object().unwrap() {
            if key != "vpt_dropout" {
                assert_eq!(imported.config[key], *value, "{settings}: {key}");
            }
        }
        let images = ImageBatch::encode(&clip, &pixels(2)?, mvlpt.needs())?;
        let logits = |method: &dyn Predictor| method.classifier(&clip, &classes)?.logits(&images);
        let difference = (logits(&mvlpt)? - logits(imported.predictor.as_ref())?)?;
        assert_eq!(largest(&difference)?, 0.0, "{settings}");
    }
    let empty = TorchState {
        tensors: BTreeMap::new(),
        epoch: None,
    };
    let refused = mvlpt::import(&empty, &json!({}), &clip, &classes).unwrap_err();
    assert!(refused.to_string().contains("`ctx`"));
    Ok(())
}

#[test]
fn what_cannot_be_is_refused_before_any_work() -> Result<()> {
    let (clip, classes) = (clip()?, classes()?);
    let told = |settings: Value| -> String {
        let made = made(settings, &clip, &classes);
        made.err().map(|e| e.to_string()).unwrap_or_default()
    };
    for (settings, part) in [
        (json!({"n_ctx": 0}), "n_ctx = 0"),
        (json!({"n_ctx_vision": 0}), "n_ctx_vision = 0"),
        (json!({"project_dim": 0}), "project_dim = 0"),
        (json!({"vpt_dropout": 1.0}), "below 1"),
        (
            json!({"variant": "vpt", "n_ctx": 4}),
            "variant = coop, upt, cocoop",
        ),
        (
            json!({"variant": "coop", "n_ctx_vision": 4}),
            "variant = vpt, upt",
        ),
        (
            json!({"variant": "cocoop", "class_specific": true}),
            "variant = coop, upt",
        ),
        (
            json!({"class_specific": true, "ctx_init": "a photo"}),
            "leave one of the two out",
        ),
        (json!({"vpt_project": 16}), "project_method = \"identity\""),
        (json!({"task_mask": "zero"}), "tasks = []"),
        (
            json!({"tasks": [{"name": "a", "n_cls": 1}, {"name": "a", "n_cls": 1}]}),
            "no other task",
        ),
        (
            json!({"tasks": [{"name": "a", "n_cls": 0}]}),
            "at least one class",
        ),
        (json!({"tasks": [{"name": "a", "n_cls": 3}]}), "the data 2"),
    ] {
        let told = told(settings.clone());
        assert!(told.contains(part), "{settings}: {told}");
    }
    let long = named(&["word ".repeat(80).as_str()])?;
    for settings in [
        json!({}),
        json!({"variant": "vpt"}),
        json!({"variant": "cocoop"}),
    ] {
        let refused = made(settings, &clip, &long).err().unwrap().to_string();
        assert!(refused.contains("takes 77"), "{refused}");
    }
    // Contexts of their own classes serve no others.
    let own = made(json!({"class_specific": true}), &clip, &classes)?;
    let refused = own.classifier(&clip, &named(&["rose", "tulip"])?).err();
    assert!(refused.unwrap().to_string().contains("class-specific"));
    let resnet = clip_with(VisionArch::ResNet {
        layers: [1, 1, 1, 1],
        width: 16,
    })?;
    for variant in ["vpt", "upt"] {
        let refused = made(json!({"variant": variant}), &resnet, &classes).err();
        assert!(refused.unwrap().to_string().contains("ResNet"));
    }
    for variant in ["coop", "cocoop"] {
        assert!(made(json!({"variant": variant}), &resnet, &classes).is_ok());
    }
    let batch = Tensor::zeros((2, 3, 16, 16), DType::F32, &Device::Cpu)?;
    let vpt = made(json!({"variant": "vpt"}), &clip, &classes)?;
    let images = ImageBatch::of_pixels(batch);
    let refused = vpt.classifier(&clip, &classes)?.logits(&images).err();
    assert!(matches!(refused, Some(Error::Shape { .. })));
    Ok(())
}
