//! What VP promises: what δ is, what it leaves alone, what is drawn, what is refused.

#![allow(clippy::unwrap_used)]

mod common;

use std::collections::BTreeMap;

use candle_core::{DType, Device, IndexOp, Tensor};
use cliptune_core::checkpoint::TorchState;
use cliptune_core::method::{Method, Predictor, Settings};
use cliptune_core::prompt::ClassTokens;
use cliptune_core::templates::Sentences;
use cliptune_core::train::{Batch, Loss, Objective, Step, gradients};
use cliptune_core::{Clip, Gradients, ImageBatch, Learned, Result, Run, Storage};
use cliptune_visual_pt::vp::{self, Prompter};
use cliptune_visual_pt::{Vp, VpConfig};
use common::{
    RESNET, SIDE, STEP, VIT, classes, clip, clip_with, close, data, gradients_are_slopes, largest,
    named, pixels, rows, weights,
};
use serde_json::json;

const ALL: [Prompter; 3] = [
    Prompter::Padding,
    Prompter::FixedPatch,
    Prompter::RandomPatch,
];

fn config(prompter: Prompter, size: usize) -> VpConfig {
    VpConfig {
        prompter,
        prompt_size: Some(size),
        ..VpConfig::default()
    }
}

fn vp(clip: &Clip, prompter: Prompter, size: usize) -> Result<Learned<Vp>> {
    Learned::new(&config(prompter, size), clip, &classes()?, 1)
}

/// The method with every learned pixel at 0.
fn at_zero(clip: &Clip, prompter: Prompter) -> Result<Learned<Vp>> {
    let vp = vp(clip, prompter, 5)?;
    let zeros = vp.params().tensors()?.into_iter();
    let zeros = zeros.map(|(name, t)| Ok((name, t.zeros_like()?)));
    vp.params().load(&zeros.collect::<Result<_>>()?)?;
    Ok(vp)
}

fn loss(vp: &Learned<Vp>, clip: &Clip, labels: &[u32], step: Step) -> Result<Loss> {
    let images = ImageBatch::of_pixels(pixels(labels.len())?);
    let batch = Batch {
        images: &images,
        labels,
        classes: &ClassTokens::new(clip.text(), &classes()?)?,
    };
    vp.loss(clip, &batch, step)
}

#[test]
fn without_a_perturbation_it_is_zero_shot_to_the_bit() -> Result<()> {
    for vision in [VIT, RESNET] {
        let clip = clip_with(vision)?;
        let tokens = ClassTokens::new(clip.text(), &classes()?)?;
        let sentence = Sentences::new(vec![VpConfig::TEMPLATE.into()])?;
        let features = clip.image().encode(&pixels(3)?)?;
        let zero_shot = rows(&clip.unit_logits(&features, &sentence.mean(&clip, &tokens)?)?)?;
        for prompter in ALL {
            let vp = at_zero(&clip, prompter)?;
            let learning = loss(&vp, &clip, &[0, 1, 2], STEP)?.logits.unwrap();
            assert_eq!(rows(&learning)?, zero_shot, "{prompter:?}");
            let classifier = vp.classifier(&clip, &classes()?)?;
            let predicted = classifier.logits(&ImageBatch::of_pixels(pixels(3)?))?;
            assert_eq!(rows(&predicted)?, zero_shot, "{prompter:?}");
        }
    }
    Ok(())
}

#[test]
fn the_frame_is_tiled_and_its_inside_is_zero() -> Result<()> {
    let clip = clip()?;
    // 16 leaves no inside.
    for p in [1, 5, 15, 16] {
        let vp = vp(&clip, Prompter::Padding, p)?;
        assert_eq!(vp.params().count(), 12 * p * (SIDE - p));
        let filled = vp.params().tensors()?.into_iter().enumerate();
        let filled =
            filled.map(|(i, (name, t))| Ok((name, t.ones_like()?.affine(i as f64 + 1.0, 0.0)?)));
        vp.params().load(&filled.collect::<Result<_>>()?)?;
        let delta = vp.perturbations(&[(0, 0)])?;
        assert_eq!(delta.dims(), [1, 3, SIDE, SIDE]);
        let picture = delta.i((0, 1))?.detach().to_vec2::<f32>()?;
        for (row, line) in picture.iter().enumerate() {
            for (column, &found) in line.iter().enumerate() {
                let expected = match (row, column) {
                    _ if row < p => 1.0,
                    _ if row >= SIDE - p => 2.0,
                    _ if column < p => 3.0,
                    _ if column >= SIDE - p => 4.0,
                    _ => 0.0,
                };
                assert_eq!(found, expected, "p {p}, row {row}, column {column}");
            }
        }
        // What is not there has no gradient; what is there has one.
        let gradients = Gradients::of(&delta.sum_all()?, vp.params())?;
        for (name, gradient) in gradients.iter().filter(|(_, g)| g.is_some()) {
            assert_eq!(largest(&(gradient.unwrap() - 1.0)?)?, 0.0, "{name}");
        }
        let reached = gradients.iter().filter(|(_, g)| g.is_some()).count();
        assert_eq!(reached, if p == 16 { 2 } else { 4 });
    }
    Ok(())
}

#[test]
fn a_fixed_patch_is_a_random_one_in_the_corner() -> Result<()> {
    let clip = clip()?;
    let (fixed, random) = (
        vp(&clip, Prompter::FixedPatch, 7)?,
        vp(&clip, Prompter::RandomPatch, 7)?,
    );
    let corner = |vp: &Vp| -> Result<Vec<f32>> {
        Ok(vp.perturbations(&[(0, 0)])?.flatten_all()?.to_vec1()?)
    };
    assert_eq!(corner(&fixed)?, corner(&random)?);
    let moved = random.perturbations(&[(3, 25), (0, 0)])?;
    assert_eq!(moved.dims(), [2, 3, SIDE, SIDE]);
    let patch = fixed.params().get("patch").unwrap().value()?;
    let there = moved.i((0..1, .., 3..10, 25..32))?;
    assert_eq!(largest(&(there - &patch)?)?, 0.0);
    assert!(close(
        &moved.i(0)?.sqr()?.sum_all()?,
        &patch.sqr()?.sum_all()?
    )?);
    Ok(())
}

/// What is drawn depends on the seed and on how many images came before.
#[test]
fn places_are_drawn_for_the_batch_or_for_each_image() -> Result<()> {
    let (clip, classes) = (clip()?, classes()?);
    let twins = pixels(1)?.repeat((2, 1, 1, 1))?;
    let twins = ImageBatch::of_pixels(twins);
    for per_image in [false, true] {
        let config = VpConfig {
            per_image,
            ..config(Prompter::RandomPatch, 9)
        };
        let vp = Learned::<Vp>::new(&config, &clip, &classes, 1)?;
        let classifier = vp.classifier(&clip, &classes)?;
        let (first, second) = (
            rows(&classifier.logits(&twins)?)?,
            rows(&classifier.logits(&twins)?)?,
        );
        assert_eq!(first[0] == first[1], !per_image);
        assert_ne!(first, second, "every batch has its place");
        let again = vp.classifier(&clip, &classes)?;
        assert_eq!(rows(&again.logits(&twins)?)?, first);
        let step = |index| Step {
            index,
            steps: 9,
            ..STEP
        };
        let losses: Vec<f32> = (0..5)
            .map(|i| Ok(loss(&vp, &clip, &[0, 1], step(i))?.total.to_scalar()?))
            .collect::<Result<_>>()?;
        let same = loss(&vp, &clip, &[0, 1], step(3))?
            .total
            .to_scalar::<f32>()?;
        assert_eq!(losses[3], same);
        assert!(losses[1..].iter().any(|loss| *loss != losses[1]));
    }
    // As large as the image it has one place.
    let whole = vp(&clip, Prompter::RandomPatch, SIDE)?;
    assert!(loss(&whole, &clip, &[0, 1], STEP).is_ok());
    Ok(())
}

#[test]
fn the_perturbation_moves_every_images_patches_alike() -> Result<()> {
    let clip = clip()?;
    let (vp, x) = (vp(&clip, Prompter::Padding, 6)?, pixels(3)?);
    let delta = vp.perturbations(&[(0, 0)])?.detach();
    let prompted = x.broadcast_add(&delta)?;
    let moved = (clip.image().patches(&prompted)? - clip.image().patches(&x)?)?;
    let expected = clip.image().patches(&delta)?;
    for image in 0..3 {
        let error = largest(&(moved.i(image)? - expected.i(0)?)?)?;
        assert!(error < 1e-5 * largest(&expected)?, "{error}");
    }
    let ours = vp.image_features(&clip, &x, &delta)?;
    assert!(close(&ours, &clip.image().encode(&prompted)?)?);
    Ok(())
}

#[test]
fn the_gradient_is_the_slope_in_any_tower() -> Result<()> {
    for vision in [VIT, RESNET] {
        let clip = clip_with(vision)?;
        let tokens = ClassTokens::new(clip.text(), &classes()?)?;
        let images = ImageBatch::of_pixels(pixels(3)?);
        for prompter in ALL {
            let step = |method: &mut Learned<Vp>| {
                let batch = Batch {
                    images: &images,
                    labels: &[0, 1, 0],
                    classes: &tokens,
                };
                let (loss, gradients) = gradients(method, &clip, &batch, STEP)?;
                Ok((f64::from(loss.total.to_scalar::<f32>()?), gradients))
            };
            gradients_are_slopes(&mut vp(&clip, prompter, 6)?, step)?;
        }
    }
    Ok(())
}

#[test]
fn the_order_of_classes_does_not_matter() -> Result<()> {
    let clip = clip()?;
    let names = ["daisy", "common_sunflower", "lily"];
    let order = [2usize, 0, 1];
    let mut vp = vp(&clip, Prompter::Padding, 6)?;
    let images = ImageBatch::of_pixels(pixels(3)?);
    let mut step = |names: &[&str], labels: &[u32]| -> Result<(Vec<Vec<f32>>, Gradients)> {
        let batch = Batch {
            images: &images,
            labels,
            classes: &ClassTokens::new(clip.text(), &named(names)?)?,
        };
        let (loss, gradients) = gradients(&mut vp, &clip, &batch, STEP)?;
        Ok((rows(&loss.logits.unwrap())?, gradients))
    };
    let (logits, gradient) = step(&names, &[0, 1, 2])?;
    // Class c stands at the place that holds c.
    let permuted = order.map(|c| names[c]);
    let (logits_permuted, gradient_permuted) = step(&permuted, &[1, 2, 0])?;
    for (row, row_permuted) in logits.iter().zip(&logits_permuted) {
        assert_eq!(order.map(|c| row[c]).to_vec(), *row_permuted);
    }
    for (name, gradient) in gradient.iter() {
        assert!(close(
            gradient_permuted.get(name).unwrap(),
            gradient.unwrap()
        )?);
    }
    Ok(())
}

#[test]
fn the_scale_is_clamped_after_the_first_step() -> Result<()> {
    let mut weights = weights(VIT, 1)?;
    weights
        .tensors
        .insert("logit_scale".into(), Tensor::new(5f32, &Device::Cpu)?);
    let clip = Clip::from_checkpoint(weights, Storage::F32)?;
    let vp = vp(&clip, Prompter::Padding, 6)?;
    let logits = |index| -> Result<Tensor> {
        let step = Step {
            index,
            steps: 9,
            ..STEP
        };
        Ok(loss(&vp, &clip, &[0, 1], step)?.logits.unwrap())
    };
    let ratio = 5f64.exp() / 4.6052f64.exp();
    assert!(close(&logits(0)?, &(logits(1)? * ratio)?)?);
    assert_eq!(rows(&logits(1)?)?, rows(&logits(7)?)?);
    let images = ImageBatch::of_pixels(pixels(2)?);
    let predicted = vp.classifier(&clip, &classes()?)?.logits(&images)?;
    assert_eq!(rows(&predicted)?, rows(&logits(1)?)?);
    Ok(())
}

#[test]
fn names_are_spoken_as_the_authors_do() -> Result<()> {
    let clip = clip()?;
    let spoken = |name: &str| vp::spoken(&clip, &[name.to_owned()]);
    assert_eq!(
        spoken("Hard-leaved_Pocket orchid")?.names(),
        ["hard leaved pocket orchid"]
    );
    assert!(spoken("-_-").is_err());
    let method = vp(&clip, Prompter::Padding, 6)?;
    let features = |name: &str| -> Result<Tensor> {
        method.text_features(&clip, &ClassTokens::new(clip.text(), &named(&[name])?)?)
    };
    assert_eq!(rows(&features("T-shirt")?)?, rows(&features("t_shirt")?)?);
    Ok(())
}

#[test]
fn the_recipe_is_the_authors() -> Result<()> {
    let recipe = VpConfig::default().train;
    let step = |global: usize| Step {
        epoch: global,
        epochs: 4000,
        ..STEP
    };
    let rates = [0, 999, 1000].map(|s| recipe.schedule.rate_at(recipe.lr, step(s)));
    assert_eq!(rates, [0.04, 40.0, 40.0]);
    assert!(recipe.schedule.rate_at(recipe.lr, step(3999)) < 1e-4);
    // The last batch is kept.
    assert_eq!(
        [recipe.steps(255), recipe.steps(256), recipe.steps(257)],
        [1, 1, 2]
    );
    // 30 pixels of 224, and as much of others.
    let size = |side| VpConfig::default().size_for(side).unwrap();
    assert_eq!([size(224), size(336), size(64), size(3)], [30, 45, 9, 1]);
    Ok(())
}

#[test]
fn a_run_learns_and_is_the_same_from_its_file() -> Result<()> {
    let (clip, data) = (clip()?, data(5)?);
    let mut config = config(Prompter::Padding, 6);
    config.train.epochs = Some(20);
    config.train.batch_size = 3;
    config.train.lr = 1.0;
    let fitted = config.fit(&clip, &data, &mut Run::quiet(1))?;
    let losses: Vec<f64> = fitted.history().epochs.iter().map(|e| e.loss).collect();
    assert!(losses[19] < 0.8 * losses[0], "{losses:?}");
    // Two steps an epoch, 40 in all: the first half warms up.
    assert_eq!(fitted.history().epochs[9].lr, 1.0);
    let tensors = fitted.tensors()?.into_iter().collect();
    let loaded = Learned::<Vp>::with_tensors(&config, &clip, &data.classes, 1, &tensors)?;
    let images = ImageBatch::of_pixels(pixels(5)?);
    let logits = |vp: &Learned<Vp>| rows(&vp.classifier(&clip, &data.classes)?.logits(&images)?);
    assert_eq!(logits(&fitted)?, logits(&loaded)?);
    Ok(())
}

#[test]
fn what_cannot_be_is_refused_before_any_work() -> Result<()> {
    let (clip, data) = (clip()?, data(3)?);
    let told = |settings: serde_json::Value| -> String {
        let made = VpConfig::read(&settings);
        let made = made.and_then(|config| config.fit(&clip, &data, &mut Run::quiet(1)));
        made.err().map(|e| e.to_string()).unwrap_or_default()
    };
    assert!(told(json!({"prompt_size": 0})).contains("at least one pixel"));
    assert!(told(json!({"prompt_size": 17})).contains("1 to 16 for a frame"));
    assert!(
        told(json!({"prompter": "fixed_patch", "prompt_size": 33})).contains("1 to 32 for a patch")
    );
    assert!(told(json!({"per_image": true})).contains("random_patch"));
    assert!(told(json!({"template": "a photo"})).contains("a photo"));
    let warmup = |steps: usize| {
        let schedule = json!({"warmup": {"kind": "linear_by_steps", "steps": steps}});
        json!({"train": {"epochs": 3, "schedule": schedule}})
    };
    assert!(told(warmup(3)).contains("the run's 3 steps"));
    assert_eq!(told(warmup(2)), "");

    let vp = vp(&clip, Prompter::Padding, 6)?;
    let larger = Tensor::zeros((2, 3, 48, 48), DType::F32, &Device::Cpu)?;
    let classifier = vp.classifier(&clip, &data.classes)?;
    let refused = classifier
        .logits(&ImageBatch::of_pixels(larger))
        .unwrap_err()
        .to_string();
    assert!(
        refused.contains("32×32") && refused.contains("48×48"),
        "{refused}"
    );
    Ok(())
}

#[test]
fn checkpoints_say_how_large_the_prompt_is() -> Result<()> {
    let (clip, classes) = (clip()?, classes()?);
    let images = ImageBatch::of_pixels(pixels(2)?);
    let import = |tensors: BTreeMap<String, Tensor>, settings| {
        let state = TorchState {
            tensors,
            epoch: Some(3),
        };
        Learned::<Vp>::import(&state, &settings, &clip, &classes)
    };
    for (prompter, name, other) in [
        (Prompter::Padding, "padding", "fixed_patch"),
        (Prompter::FixedPatch, "fixed_patch", "padding"),
    ] {
        let saved = vp(&clip, prompter, 7)?;
        let tensors: BTreeMap<String, Tensor> = saved.tensors()?.into_iter().collect();
        let (config, imported) = import(tensors.clone(), json!({"prompter": name}))?;
        assert_eq!(config.prompt_size, Some(7));
        let logits = |vp: &Learned<Vp>| rows(&vp.classifier(&clip, &classes)?.logits(&images)?);
        assert_eq!(logits(&imported)?, logits(&saved)?);
        let refused = import(tensors, json!({"prompter": other}))
            .unwrap_err()
            .to_string();
        assert!(
            refused.contains(&format!("set prompter to \"{name}\"")),
            "{refused}"
        );
    }
    assert!(
        import(BTreeMap::new(), json!({}))
            .unwrap_err()
            .to_string()
            .contains("pad_up")
    );
    // Learned for other images.
    let of_224 = Tensor::zeros((1, 3, 30, 224), DType::F32, &Device::Cpu)?;
    let refused = import([("pad_up".to_owned(), of_224)].into(), json!({}));
    let refused = refused.unwrap_err().to_string();
    assert!(
        refused.contains("224×224") && refused.contains("32×32"),
        "{refused}"
    );
    let flat = Tensor::zeros((3, 30), DType::F32, &Device::Cpu)?;
    assert!(import([("pad_up".to_owned(), flat)].into(), json!({})).is_err());
    Ok(())
}
