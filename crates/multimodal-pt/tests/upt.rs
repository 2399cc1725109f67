//! What UPT promises: who sees whom, where it equals CLIP, what it refuses.

#![allow(clippy::unwrap_used)]

mod support;

use std::collections::BTreeMap;

use candle_core::{DType, Device, Tensor};
use cliptune_core::checkpoint::TorchState;
use cliptune_core::method::{Predictor, Settings};
use cliptune_core::prompt::{ClassTokens, Prompts};
use cliptune_core::visual_prompt::{Tokens, VisualPrompts};
use cliptune_core::{Classes, ImageBatch, Learned, Result, VisionArch};
use cliptune_multimodal_pt::upt::{Depth, UptPrompts};
use cliptune_multimodal_pt::{Interaction, Upt, UptConfig, upt};
use serde_json::{Value, json};

use crate::support::{
    BLOCKS, classes, clip, clip_with, close, gradients_are_slopes, largest, pixels, step,
};

fn config(settings: Value) -> UptConfig {
    UptConfig::read(&settings).unwrap()
}

#[test]
fn the_gradient_reaches_everything_that_is_learned() -> Result<()> {
    let (clip, classes) = (clip()?, classes()?);
    for settings in [
        json!({"dropout": 0.0}),
        json!({"dropout": 0.3, "class_token_position": "middle"}),
        json!({"interaction": "attention", "heads": 2, "dropout": 0.3}),
        json!({"depth": "deep", "n_ctx": 2, "class_token_position": "front"}),
    ] {
        let config = config(settings);
        gradients_are_slopes(
            &mut Learned::<Upt>::new(&config, &clip, &classes, 1)?,
            &clip,
        )?;
    }
    Ok(())
}

/// Which rows of the block's output change with one shared prompt.
#[test]
fn prompts_see_one_another_if_they_are_asked_to() -> Result<()> {
    let (clip, classes) = (clip()?, classes()?);
    for interaction in [Interaction::None, Interaction::Attention] {
        let config = config(json!({"interaction": interaction}));
        let upt = Learned::<Upt>::new(&config, &clip, &classes, 1)?;
        let before = upt.block(None)?;
        let shared = upt.params().get("uni_ctx").unwrap();
        let start = shared.value()?;
        for changed in 0..8 {
            let row = start.narrow(1, changed, 1)?;
            let rows = [
                start.narrow(1, 0, changed)?,
                (row * 2.0)?,
                start.narrow(1, changed + 1, 7 - changed)?,
            ];
            let rows: Vec<_> = rows.into_iter().filter(|t| t.elem_count() > 0).collect();
            shared.set(&Tensor::cat(&rows, 1)?)?;
            let moved = (upt.block(None)? - &before)?.abs()?.max(1)?;
            for (token, moved) in moved.to_vec1::<f32>()?.into_iter().enumerate() {
                let expected = token == changed || interaction == Interaction::Attention;
                assert_eq!(moved > 0.0, expected, "{interaction:?} {changed} {token}");
            }
        }
    }
    Ok(())
}

#[test]
fn dropout_is_drawn_for_a_step_and_absent_otherwise() -> Result<()> {
    let (clip, classes) = (clip()?, classes()?);
    let loss = |dropout: f64| -> Result<f64> {
        let config = config(json!({"dropout": dropout}));
        let mut upt = Learned::<Upt>::new(&config, &clip, &classes, 1)?;
        let first = step(&mut upt, &clip)?.0;
        assert_eq!(first, step(&mut upt, &clip)?.0);
        // To predict nothing is dropped.
        let logits = |upt: &Learned<Upt>| -> Result<Vec<Vec<f32>>> {
            let images = ImageBatch::of_pixels(pixels(2)?);
            Ok(upt
                .classifier(&clip, &classes)?
                .logits(&images)?
                .to_vec2()?)
        };
        assert_eq!(logits(&upt)?, logits(&upt)?);
        Ok(first)
    };
    assert_ne!(loss(0.0)?, loss(0.5)?);
    Ok(())
}

#[test]
fn without_image_prompts_and_with_words_it_is_clip() -> Result<()> {
    let (clip, classes) = (clip()?, classes()?);
    let tokens = ClassTokens::new(clip.text(), &classes)?;
    let upt = Learned::<Upt>::new(&UptConfig::default(), &clip, &classes, 1)?;
    let words = clip.text().tokenizer()?.encode("a photo of a");
    let width = 128;
    let prompts = UptPrompts {
        text: clip.text().embed(&words)?,
        visual: Tensor::zeros((0, width), DType::F32, &Device::Cpu)?,
    };
    let sentence = Prompts::of_tokens(tokens.fill("a photo of a {}.")?);
    let sentence = clip.text().encode(&sentence)?;
    assert!(close(
        &upt.text_features(&clip, &tokens, &prompts)?,
        &sentence
    )?);
    let plain = clip.image().encode(&pixels(2)?)?;
    let found = upt.image_features(&clip, &pixels(2)?, &prompts)?;
    assert_eq!(largest(&(found - &plain)?)?, 0.0);
    let own = upt.prompts(None)?;
    assert!(!close(
        &upt.image_features(&clip, &pixels(2)?, &own)?,
        &plain
    )?);
    // The tokenizer's words matter only where there are more of them than prompts.
    let features = |settings: Value| -> Result<Tensor> {
        let upt = Learned::<Upt>::new(&config(settings), &clip, &classes, 1)?;
        upt.text_features(&clip, &tokens, &own)
    };
    let plain = features(json!({}))?;
    assert!(close(
        &features(json!({"ctx_init": "a_photo_of_a"}))?,
        &plain
    )?);
    assert!(!close(
        &features(json!({"ctx_init": "a photo of a big"}))?,
        &plain
    )?);
    Ok(())
}

#[test]
fn image_prompts_have_no_order_and_text_prompts_have() -> Result<()> {
    let (clip, classes) = (clip()?, classes()?);
    let tokens = ClassTokens::new(clip.text(), &classes)?;
    let upt = Learned::<Upt>::new(&UptConfig::default(), &clip, &classes, 1)?;
    let prompts = upt.prompts(None)?;
    let order = Tensor::new(&[2u32, 0, 3, 1], &Device::Cpu)?;
    let mixed = UptPrompts {
        text: prompts.text.index_select(&order, 0)?,
        visual: prompts.visual.index_select(&order, 0)?,
    };
    let images = |prompts: &UptPrompts| upt.image_features(&clip, &pixels(2)?, prompts);
    assert!(close(&images(&mixed)?, &images(&prompts)?)?);
    let text = |prompts: &UptPrompts| upt.text_features(&clip, &tokens, prompts);
    assert!(!close(&text(&mixed)?, &text(&prompts)?)?);
    Ok(())
}

#[test]
fn classes_and_pictures_come_in_any_order() -> Result<()> {
    let clip = clip()?;
    let upt = Learned::<Upt>::new(&UptConfig::default(), &clip, &classes()?, 1)?;
    let named = |names: &[&str]| Classes::new(names.iter().map(|n| (*n).to_owned()).collect());
    let logits = |names: &[&str], pixels: Tensor| -> Result<Vec<Vec<f32>>> {
        let images = ImageBatch::of_pixels(pixels);
        let classifier = upt.classifier(&clip, &named(names)?)?;
        Ok(classifier.logits(&images)?.to_vec2()?)
    };
    let turned = Tensor::new(&[2u32, 1, 0], &Device::Cpu)?;
    let found = logits(&["daisy", "poppy", "common_lily"], pixels(3)?)?;
    let other = logits(
        &["common_lily", "daisy", "poppy"],
        pixels(3)?.index_select(&turned, 0)?,
    )?;
    for (row, other) in found.iter().zip(other.iter().rev()) {
        for (a, b) in row.iter().zip([other[1], other[2], other[0]]) {
            assert!((a - b).abs() < 1e-4, "{a} {b}");
        }
    }
    Ok(())
}

/// Vector j·L + l is prompt j of block l.
#[test]
fn deep_prompts_go_to_their_blocks() -> Result<()> {
    let (clip, classes) = (clip()?, classes()?);
    let config = config(json!({"depth": "deep", "n_ctx": 2}));
    let upt = Learned::<Upt>::new(&config, &clip, &classes, 1)?;
    let prompts = upt.prompts(None)?;
    assert_eq!(prompts.text.dims(), [2, 64]);
    assert_eq!(prompts.visual.dims(), [2 * BLOCKS, 128]);
    let mut by_hand = VisualPrompts::new();
    for block in 0..BLOCKS {
        let rows = [block as u32, (BLOCKS + block) as u32];
        let rows = Tensor::new(&rows, &Device::Cpu)?;
        let tokens = prompts.visual.index_select(&rows, 0)?;
        by_hand.replace(block, Tokens::Shared(tokens));
    }
    let found = upt.image_features(&clip, &pixels(2)?, &prompts)?;
    let expected = clip.image().encode_prompted(&pixels(2)?, &by_hand)?;
    assert_eq!(largest(&(found - expected)?)?, 0.0);
    Ok(())
}

#[test]
fn checkpoints_say_how_many_prompts_there_are() -> Result<()> {
    let (clip, classes) = (clip()?, classes()?);
    let images = ImageBatch::of_pixels(pixels(2)?);
    let import = upt::ENTRY.import.unwrap();
    for settings in [
        json!({"n_ctx": 3}),
        json!({"n_ctx": 2, "depth": "deep", "interaction": "attention"}),
    ] {
        let own = config(settings.clone());
        let upt = Learned::<Upt>::new(&own, &clip, &classes, 2)?;
        let mut tensors: BTreeMap<String, Tensor> = upt.tensors()?.into_iter().collect();
        tensors.insert("token_prefix".into(), pixels(1)?);
        let state = TorchState {
            tensors,
            epoch: None,
        };
        let mut given = settings.clone();
        given.as_object_mut().unwrap().remove("n_ctx");
        let imported = import(&state, &given, &clip, &classes)?;
        assert_eq!(imported.config["n_ctx"], settings["n_ctx"]);
        let logits = |method: &dyn Predictor| method.classifier(&clip, &classes)?.logits(&images);
        let difference = (logits(&upt)? - logits(imported.predictor.as_ref())?)?;
        assert_eq!(largest(&difference)?, 0.0);
    }
    // Another number of vectors, or vectors of another width.
    let upt = Learned::<Upt>::new(&UptConfig::default(), &clip, &classes, 2)?;
    let told = |shape: (usize, usize, usize)| -> Result<String> {
        let mut tensors: BTreeMap<String, Tensor> = upt.tensors()?.into_iter().collect();
        let uni_ctx = Tensor::zeros(shape, DType::F32, &Device::Cpu)?;
        tensors.insert("uni_ctx".into(), uni_ctx);
        let state = TorchState {
            tensors,
            epoch: None,
        };
        let refused = import(&state, &json!({}), &clip, &classes).err().unwrap();
        Ok(refused.to_string())
    };
    assert!(told((1, 7, 64))?.contains("7 vectors"));
    assert!(told((1, 8, 32))?.contains("[1, 8, 32], expected [1, 8, 64]"));
    assert!(told((3, 8, 64))?.contains("[3, 8, 64], expected [1, 8, 64]"));
    let tensors = upt.tensors()?.into_iter().collect();
    let other = config(json!({"n_ctx": 5}));
    let refused = Learned::<Upt>::with_tensors(&other, &clip, &classes, 0, &tensors);
    assert!(refused.err().unwrap().to_string().contains("uni_ctx"));
    Ok(())
}

#[test]
fn what_cannot_be_is_refused_before_any_work() -> Result<()> {
    let (clip, classes) = (clip()?, classes()?);
    let told = |settings: Value, classes: &Classes| -> String {
        let made = UptConfig::read(&settings)
            .and_then(|config| Learned::<Upt>::new(&config, &clip, classes, 1).map(|_| ()));
        made.err().map(|e| e.to_string()).unwrap_or_default()
    };
    assert!(told(json!({"n_ctx": 0}), &classes).contains("n_ctx"));
    assert!(told(json!({"heads": 0}), &classes).contains("heads"));
    assert!(told(json!({"heads": 3}), &classes).contains("divides the width 64"));
    assert!(told(json!({"dropout": 1.0}), &classes).contains("below 1"));
    assert!(told(json!({"ctx_init": "a photo"}), &classes).contains("2 tokens"));
    let long = Classes::new(vec!["word ".repeat(71)])?;
    assert!(told(json!({}), &long).contains("takes 77"));
    assert!(told(json!({"n_ctx": 3}), &long).is_empty());
    let resnet = clip_with(VisionArch::ResNet {
        layers: [1, 1, 1, 1],
        width: 16,
    })?;
    let refused = Learned::<Upt>::new(&UptConfig::default(), &resnet, &classes, 1).err();
    assert!(refused.unwrap().to_string().contains("ResNet"));
    let deep = UptConfig {
        depth: Depth::Deep,
        ..UptConfig::default()
    };
    let upt = Learned::<Upt>::new(&deep, &clip, &classes, 1)?;
    assert_eq!(upt.needs(), upt::ENTRY.needs);
    Ok(())
}
