//! CoCoOp's checks: what its card promises, on a tiny random CLIP.

mod common;

use std::collections::BTreeMap;

use candle_core::{DType, Device, IndexOp, Tensor};
use cliptune_core::checkpoint::TorchState;
use cliptune_core::method::{Method, Predictor, Settings};
use cliptune_core::prompt::ClassTokens;
use cliptune_core::{Clip, ImageBatch, Learned, Result, Run, ops};
use cliptune_text_pt::{CoCoOp, CoCoOpConfig, CoOp, CoOpConfig, ZeroShot, ZeroShotConfig, cocoop};
use common::*;
use serde_json::json;

fn cocoop(clip: &Clip) -> Result<Learned<CoCoOp>> {
    Learned::<CoCoOp>::new(&CoCoOpConfig::default(), clip, &flowers()?, 1)
}

/// With a Meta-Net large enough that images differ visibly.
fn lively(clip: &Clip) -> Result<Learned<CoCoOp>> {
    let method = cocoop(clip)?;
    let tensors = method.params().tensors()?.into_iter();
    let tensors = tensors.map(|(name, t)| match name.starts_with("meta_net") {
        true => Ok((name, (t * 2.0)?)),
        false => Ok((name, t)),
    });
    method.params().load(&tensors.collect::<Result<_>>()?)?;
    Ok(method)
}

#[test]
fn a_meta_net_of_zeros_is_coop_for_every_image() -> Result<()> {
    let (clip, names) = (clip()?, flowers()?);
    let method = cocoop(&clip)?;
    let zeros = method.params().tensors()?.into_iter();
    let zeros: BTreeMap<String, Tensor> = zeros
        .map(|(name, t)| match name == "ctx" {
            true => Ok((name, t)),
            false => Ok((name, t.zeros_like()?)),
        })
        .collect::<Result<_>>()?;
    method.params().load(&zeros)?;
    let config = CoOpConfig {
        ctx_init: Some("a photo of a".into()),
        ..CoOpConfig::default()
    };
    let coop = Learned::<CoOp>::new(&config, &clip, &names, 1)?;
    let zeroshot = ZeroShot::new(&ZeroShotConfig::template("a photo of a {}."))?;
    let ours = logits(&method, &clip, &names)?;
    assert!(difference(&ours, &logits(&coop, &clip, &names)?)? < 1e-5);
    assert!(difference(&ours, &logits(&zeroshot, &clip, &names)?)? < 1e-5);
    Ok(())
}

#[test]
fn an_image_is_judged_alone_and_only_by_its_direction() -> Result<()> {
    let (clip, names) = (clip()?, flowers()?);
    let method = lively(&clip)?;
    let classifier = method.classifier(&clip, &names)?;
    let images = images(&clip, 4)?;
    let features = images.features()?;
    let all = classifier.logits(&images)?;
    for i in 0..4 {
        let one = features.narrow(0, i, 1)?;
        let alone = classifier.logits(&ImageBatch::of_features(one.clone()))?;
        assert_eq!(bits(&alone)?, bits(&all.narrow(0, i, 1)?)?);
        let scaled = classifier.logits(&ImageBatch::of_features((one * 7.0)?))?;
        assert!(difference(&scaled, &alone)? < 1e-4);
    }
    // And images do differ in their prompts, not only in their features.
    let unit = ops::unit_length(features, "image")?;
    let tokens = ClassTokens::new(clip.text(), &names)?;
    let contexts = method.contexts(&unit)?;
    let text = method
        .context
        .text_features_under(&contexts, &clip, &tokens)?;
    assert_eq!(text.dims(), [4, 3, 32]);
    assert!(difference(&text.i(0)?, &text.i(1)?)? > 1e-3);
    Ok(())
}

#[test]
fn a_batch_is_its_images_one_by_one() -> Result<()> {
    let (clip, names) = (clip()?, flowers()?);
    let mut method = lively(&clip)?;
    let (loss, gradients) = step(&mut method, &clip, &names, 3)?;
    // The trained logits are those of prediction: the shared prefix of an image changes nothing.
    let trained = loss.logits.expect("cross entropy keeps its logits");
    let predicted = logits(&method, &clip, &names)?;
    assert!(difference(&trained, &predicted.narrow(0, 0, 3)?)? < 1e-5);
    // A prompt written out for each image and class gives the same gradient.
    let unit = ops::unit_length(images(&clip, 3)?.features()?, "image")?;
    let tokens = ClassTokens::new(clip.text(), &names)?;
    let contexts = method.contexts(&unit)?;
    let mut total = None;
    for image in 0..3 {
        let copies = contexts.i(image)?.unsqueeze(0)?.repeat((3, 1, 1))?;
        let prompts = tokens.weave(&copies, "a photo of a", Default::default())?;
        let text = clip.text().encode(&prompts)?;
        let logits = clip.cosine_logits(&unit.narrow(0, image, 1)?, &text)?;
        let term = (ops::cross_entropy(&logits, &[image as u32])? / 3.0)?;
        total = Some(match total {
            Some(total) => (total + term)?,
            None => term,
        });
    }
    let naive = total.expect("three images").backward()?;
    for (name, gradient) in gradients.iter() {
        let param = method.params().get(name).expect("a parameter");
        let naive = naive.get(param.tensor()).expect("a gradient");
        let gradient = gradient.expect("a gradient");
        assert!(difference(gradient, naive)? < 1e-4, "{name}");
    }
    Ok(())
}

#[test]
fn permuted_classes_permute_logits_and_more_classes_change_none() -> Result<()> {
    let clip = clip()?;
    let method = lively(&clip)?;
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
fn gradients_are_the_slopes_of_the_loss() -> Result<()> {
    let (clip, names) = (clip()?, flowers()?);
    let mut method = lively(&clip)?;
    let ctx = (drawn(4, (4, 64))? * 0.5)?;
    let tensors = with(&method, "ctx", ctx)?;
    method.params().load(&tensors)?;
    gradients_are_slopes(&mut method, &clip, &names, 3, 0.01)
}

#[test]
fn keys_shapes_and_number_of_what_is_learned() -> Result<()> {
    let clip = clip_of_dim(40)?;
    let method = cocoop(&clip)?;
    let found: Vec<(String, Vec<usize>)> = method
        .tensors()?
        .into_iter()
        .map(|(name, t)| (name, t.dims().to_vec()))
        .collect();
    let of = |name: &str, dims: &[usize]| (name.to_owned(), dims.to_vec());
    let expected = [
        of("ctx", &[4, 64]),
        of("meta_net.linear1.weight", &[2, 40]),
        of("meta_net.linear1.bias", &[2]),
        of("meta_net.linear2.weight", &[64, 2]),
        of("meta_net.linear2.bias", &[64]),
    ];
    assert_eq!(found, expected);
    // M·d_t + d·⌊d/16⌋ + ⌊d/16⌋ + ⌊d/16⌋·d_t + d_t
    let formula = 4 * 64 + 40 * 2 + 2 + 2 * 64 + 64;
    assert_eq!(method.params().count(), formula);
    Ok(())
}

#[test]
fn training_lowers_the_loss() -> Result<()> {
    let (clip, data) = (clip()?, data()?);
    let mut config = CoCoOpConfig::default();
    config.train.lr = 0.02;
    config.train.epochs = Some(30);
    let method = config.fit(&clip, &data, &mut Run::quiet(1))?;
    let losses: Vec<f64> = method.history().epochs.iter().map(|e| e.loss).collect();
    assert!(losses[29] < 0.9 * losses[0], "{losses:?}");
    Ok(())
}

#[test]
fn the_authors_checkpoint_is_read_for_any_classes() -> Result<()> {
    let (clip, names) = (clip()?, flowers()?);
    let config = CoCoOpConfig {
        n_ctx: Some(7),
        ctx_init: None,
        ..CoCoOpConfig::default()
    };
    let method = Learned::<CoCoOp>::new(&config, &clip, &names, 5)?;
    let mut tensors: BTreeMap<String, Tensor> = method.tensors()?.into_iter().collect();
    let half = |t: &Tensor| t.to_dtype(DType::F16);
    let zeros = |shape: (usize, usize, usize)| Tensor::zeros(shape, DType::F16, &Device::Cpu);
    for tensor in tensors.values_mut() {
        *tensor = half(tensor)?;
    }
    tensors.insert("token_prefix".into(), zeros((9, 1, 64))?);
    tensors.insert("token_suffix".into(), zeros((9, 69, 64))?);
    let mut state = TorchState {
        tensors,
        epoch: Some(10),
    };
    let import = cocoop::ENTRY.import.expect("CoCoOp reads checkpoints");
    let imported = import(&state, &json!({}), &clip, &classes(&["rose"])?)?;
    assert_eq!(imported.config["n_ctx"], 7);
    assert_eq!(imported.config["ctx_init"], json!(null));
    let found = logits(imported.predictor.as_ref(), &clip, &names)?;
    assert!(difference(&found, &logits(&method, &clip, &names)?)? < 1e-2);

    // Another backbone's joint space is 96 wide.
    let wide = Tensor::zeros((2, 96), DType::F32, &Device::Cpu)?;
    state.tensors.insert("meta_net.linear1.weight".into(), wide);
    let found = refused(import(&state, &json!({}), &clip, &names));
    assert_eq!(
        found,
        "learned tensor `meta_net.linear1.weight` has shape [2, 96], expected [2, 32]"
    );
    state.tensors.remove("meta_net.linear1.weight");
    let found = refused(import(&state, &json!({}), &clip, &names));
    assert!(
        found.contains("`meta_net.linear1.weight` is missing"),
        "{found}"
    );
    let several = Tensor::zeros((3, 7, 64), DType::F32, &Device::Cpu)?;
    state.tensors.insert("ctx".into(), several);
    let found = refused(import(&state, &json!({}), &clip, &names));
    assert!(
        found.contains("shape [3, 7, 64], expected [7, 64]"),
        "{found}"
    );
    Ok(())
}

#[test]
fn misuse_is_refused() -> Result<()> {
    let (clip, names) = (clip()?, flowers()?);
    for (settings, expected) in [
        (json!({"n_ctx": 0}), "n_ctx = 0: at least one context token"),
        (json!({"class_specific": true}), "unknown field"),
        (
            json!({"n_ctx": 8}),
            "`a photo of a` is 4 tokens; leave n_ctx out, make them agree, or start at random with ctx_init = \"\"",
        ),
        (json!({"n_ctx": 75, "ctx_init": ""}), "text tower takes 77"),
    ] {
        let outcome = CoCoOpConfig::read(&settings)
            .and_then(|c| Learned::<CoCoOp>::new(&c, &clip, &names, 1));
        let found = refused(outcome);
        assert!(found.contains(expected), "{found}");
    }
    let found = refused(cocoop(&clip_of_dim(15)?));
    assert!(found.contains("15 dimensions") && found.contains("at least 16"));
    // A zero feature has no direction.
    let zero = ImageBatch::of_features(Tensor::zeros((2, 32), DType::F32, &Device::Cpu)?);
    let method = cocoop(&clip)?;
    let found = refused(method.classifier(&clip, &names)?.logits(&zero));
    assert!(found.contains("an image feature, row 0"), "{found}");
    Ok(())
}
