//! What MaPLe, IVLP and deep VPT promise: where they start, what the gradient reaches, what they refuse.

#![allow(clippy::unwrap_used)]

mod support;

use std::collections::BTreeMap;

use candle_core::Tensor;
use cliptune_core::checkpoint::TorchState;
use cliptune_core::method::{Entry, Predictor, Settings};
use cliptune_core::prompt::{ClassTokens, Prompts};
use cliptune_core::{Error, ImageBatch, ImageNeeds, Learned, Result, VisionArch};
use cliptune_multimodal_pt::{
    DeepVpt, DeepVptConfig, Ivlp, IvlpConfig, MaPLe, MaPLeConfig, deep_vpt, ivlp, maple,
};
use serde_json::json;

use crate::support::{
    BLOCKS, classes, clip, clip_with, close, gradients_are_slopes, largest, pixels, step,
};

#[test]
fn the_gradient_reaches_everything_that_is_learned() -> Result<()> {
    let (clip, classes) = (clip()?, classes()?);
    for depth in 1..=BLOCKS {
        let config = MaPLeConfig {
            prompt_depth: Some(depth),
            ..MaPLeConfig::default()
        };
        gradients_are_slopes(
            &mut Learned::<MaPLe>::new(&config, &clip, &classes, 1)?,
            &clip,
        )?;
        let config = IvlpConfig {
            prompt_depth_text: Some(depth),
            prompt_depth_vision: Some(BLOCKS - depth),
            ..IvlpConfig::default()
        };
        gradients_are_slopes(
            &mut Learned::<Ivlp>::new(&config, &clip, &classes, 1)?,
            &clip,
        )?;
        let config = DeepVptConfig {
            prompt_depth_vision: Some(depth),
            ..DeepVptConfig::default()
        };
        gradients_are_slopes(
            &mut Learned::<DeepVpt>::new(&config, &clip, &classes, 1)?,
            &clip,
        )?;
    }
    Ok(())
}

#[test]
fn shallow_text_prompts_start_as_the_sentence() -> Result<()> {
    let (clip, classes) = (clip()?, classes()?);
    let tokens = ClassTokens::new(clip.text(), &classes)?;
    let sentence = Prompts::of_tokens(tokens.fill("a photo of a {}.")?);
    let sentence = clip.text().encode(&sentence)?;
    // Two of the four words are learned, the others stay.
    let config = MaPLeConfig {
        prompt_depth: Some(1),
        ..MaPLeConfig::default()
    };
    let maple = Learned::<MaPLe>::new(&config, &clip, &classes, 1)?;
    assert!(close(&maple.text_features(&clip, &tokens)?, &sentence)?);
    let plain = clip.image().encode(&pixels(2)?)?;
    assert!(!close(&maple.image_features(&clip, &pixels(2)?)?, &plain)?);
    // Without visual prompts the image tower is CLIP's, and its features may be kept.
    let config = IvlpConfig {
        prompt_depth_text: Some(1),
        n_ctx_vision: 0,
        ..IvlpConfig::default()
    };
    let ivlp = Learned::<Ivlp>::new(&config, &clip, &classes, 1)?;
    assert_eq!(ivlp.needs(), ImageNeeds::GlobalFeatures);
    assert!(close(&ivlp.text_features(&clip, &tokens)?, &sentence)?);
    // Five vectors leave the words out.
    let config = IvlpConfig {
        n_ctx_text: 5,
        ..IvlpConfig::default()
    };
    let random = Learned::<Ivlp>::new(&config, &clip, &classes, 1)?;
    assert!(!close(&random.text_features(&clip, &tokens)?, &sentence)?);
    Ok(())
}

#[test]
fn the_maps_of_deeper_blocks_start_alike_and_part() -> Result<()> {
    let (clip, classes) = (clip()?, classes()?);
    let mut maple = Learned::<MaPLe>::new(&MaPLeConfig::default(), &clip, &classes, 1)?;
    let names: Vec<_> = maple.params().iter().map(|p| p.name().to_owned()).collect();
    assert_eq!(
        names,
        [
            "prompt_learner.ctx",
            "prompt_learner.proj.weight",
            "prompt_learner.proj.bias",
            "prompt_learner.compound_prompts_text.0",
            "prompt_learner.compound_prompts_text.1",
            "prompt_learner.compound_prompt_projections.0.weight",
            "prompt_learner.compound_prompt_projections.0.bias",
            "prompt_learner.compound_prompt_projections.1.weight",
            "prompt_learner.compound_prompt_projections.1.bias",
        ]
    );
    let weight = |i: usize| format!("prompt_learner.compound_prompt_projections.{i}.weight");
    let value = |maple: &Learned<MaPLe>, name: &str| {
        let param = maple.params().get(name);
        param.ok_or_else(|| Error::Data(name.to_owned()))?.value()
    };
    let (first, second) = (value(&maple, &weight(0))?, value(&maple, &weight(1))?);
    assert_eq!(largest(&(first - second)?)?, 0.0);
    let (_, gradients) = step(&mut maple, &clip)?;
    let (first, second) = (gradients.get(&weight(0)), gradients.get(&weight(1)));
    assert!(!close(first.unwrap(), second.unwrap())?);
    Ok(())
}

/// With its maps written out, MaPLe sees images as IVLP does.
#[test]
fn maple_is_ivlp_with_prompts_that_are_tied() -> Result<()> {
    let (clip, classes) = (clip()?, classes()?);
    let maple = Learned::<MaPLe>::new(&MaPLeConfig::default(), &clip, &classes, 3)?;
    let mut tensors: BTreeMap<String, Tensor> = maple.tensors()?.into_iter().collect();
    for (block, tokens) in maple.vision_context()?.into_iter().enumerate() {
        let key = match block {
            0 => "image_encoder.VPT".to_owned(),
            _ => format!("image_encoder.transformer.resblocks.{block}.VPT_shallow"),
        };
        tensors.insert(key, tokens.detach());
    }
    for block in 1..BLOCKS {
        let text = tensors[&format!("prompt_learner.compound_prompts_text.{}", block - 1)].clone();
        let key = format!("text_encoder.transformer.resblocks.{block}.VPT_shallow");
        tensors.insert(key, text);
    }
    let config = IvlpConfig::default();
    let ivlp = Learned::<Ivlp>::with_tensors(&config, &clip, &classes, 0, &tensors)?;
    let images = ImageBatch::of_pixels(pixels(3)?);
    let logits = |method: &dyn Predictor| method.classifier(&clip, &classes)?.logits(&images);
    let difference = (logits(&maple)? - logits(&ivlp)?)?;
    assert_eq!(largest(&difference)?, 0.0);
    Ok(())
}

/// Checkpoints hold the whole model; shapes say what was learned.
#[test]
fn checkpoints_say_how_deep_they_are() -> Result<()> {
    let (clip, classes) = (clip()?, classes()?);
    let images = ImageBatch::of_pixels(pixels(2)?);
    let cases: [(&Entry, Box<dyn Predictor>); 3] = [
        (
            &maple::ENTRY,
            Box::new(Learned::<MaPLe>::new(
                &MaPLeConfig {
                    prompt_depth: Some(2),
                    n_ctx: 3,
                    ..MaPLeConfig::default()
                },
                &clip,
                &classes,
                2,
            )?),
        ),
        (
            &ivlp::ENTRY,
            Box::new(Learned::<Ivlp>::new(
                &IvlpConfig {
                    prompt_depth_text: Some(2),
                    prompt_depth_vision: Some(1),
                    ..IvlpConfig::default()
                },
                &clip,
                &classes,
                2,
            )?),
        ),
        (
            &deep_vpt::ENTRY,
            Box::new(Learned::<DeepVpt>::new(
                &DeepVptConfig {
                    prompt_depth_vision: Some(2),
                    n_ctx_vision: 5,
                    ..DeepVptConfig::default()
                },
                &clip,
                &classes,
                2,
            )?),
        ),
    ];
    for (entry, method) in cases {
        let mut tensors: BTreeMap<String, Tensor> = method.tensors()?.into_iter().collect();
        tensors.insert("image_encoder.conv1.weight".into(), pixels(1)?);
        let state = TorchState {
            tensors,
            epoch: None,
        };
        let import = entry.import.unwrap();
        let imported = import(&state, &json!({}), &clip, &classes)?.predictor;
        let logits = |method: &dyn Predictor| method.classifier(&clip, &classes)?.logits(&images);
        let difference = (logits(method.as_ref())? - logits(imported.as_ref())?)?;
        assert_eq!(largest(&difference)?, 0.0, "{}", entry.slug);
        let empty = TorchState {
            tensors: BTreeMap::new(),
            epoch: None,
        };
        assert!(import(&empty, &json!({}), &clip, &classes).is_err());
    }
    // Whether visual prompts are missing or were never there, only the settings can tell.
    let language = IvlpConfig {
        prompt_depth_vision: Some(0),
        ..IvlpConfig::default()
    };
    let state = TorchState {
        tensors: Learned::<Ivlp>::new(&language, &clip, &classes, 2)?
            .tensors()?
            .into_iter()
            .collect(),
        epoch: None,
    };
    let import = |settings| Learned::<Ivlp>::import(&state, &settings, &clip, &classes).map(|_| ());
    let refused = import(json!({})).unwrap_err().to_string();
    assert!(refused.contains("image_encoder.VPT") && refused.contains("prompt_depth_vision = 0"));
    assert!(import(json!({"prompt_depth_vision": 0})).is_ok());
    Ok(())
}

#[test]
fn what_cannot_be_is_refused_before_any_work() -> Result<()> {
    let (clip, classes) = (clip()?, classes()?);
    let told = |settings: serde_json::Value| -> String {
        let made = MaPLeConfig::read(&settings)
            .and_then(|config| Learned::<MaPLe>::new(&config, &clip, &classes, 1).map(|_| ()));
        made.err().map(|e| e.to_string()).unwrap_or_default()
    };
    assert!(told(json!({"prompt_depth": 4})).contains("1 to 3"));
    assert!(told(json!({"prompt_depth": 0})).contains("prompt_depth"));
    assert!(told(json!({"n_ctx": 0})).contains("n_ctx"));
    assert!(told(json!({"ctx_init": "photo"})).contains("at least 2 tokens"));
    let resnet = clip_with(VisionArch::ResNet {
        layers: [1, 1, 1, 1],
        width: 16,
    })?;
    let refused = |made: Option<Error>| made.map(|e| e.to_string()).unwrap_or_default();
    let maple = Learned::<MaPLe>::new(&MaPLeConfig::default(), &resnet, &classes, 1).err();
    assert!(refused(maple).contains("ResNet"));
    let vpt = Learned::<DeepVpt>::new(&DeepVptConfig::default(), &resnet, &classes, 1).err();
    assert!(refused(vpt).contains("ResNet"));
    let ivlp = Learned::<Ivlp>::new(&IvlpConfig::default(), &resnet, &classes, 1).err();
    assert!(refused(ivlp).contains("ResNet"));
    // Language prompts alone run with any image tower.
    let language = IvlpConfig {
        prompt_depth_vision: Some(0),
        ..IvlpConfig::default()
    };
    assert!(Learned::<Ivlp>::new(&language, &resnet, &classes, 1).is_ok());
    Ok(())
}
