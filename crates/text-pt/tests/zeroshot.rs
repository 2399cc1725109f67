//! Zero-shot CLIP's checks, on a tiny random CLIP.

#![allow(clippy::unwrap_used)] // Helpers too: a missing value is a failed test.

mod common;

use candle_core::{D, IndexOp, Tensor};
use cliptune_core::method::Settings;
use cliptune_core::prompt::ClassTokens;
use cliptune_core::{Clip, Result, ops};
use cliptune_text_pt::{ZeroShot, ZeroShotConfig, zeroshot};
use common::*;
use serde_json::json;

fn resolved(settings: serde_json::Value) -> Result<Vec<String>> {
    ZeroShotConfig::read(&settings)?.resolve()
}

fn features(templates: &[&str], clip: &Clip) -> Result<Tensor> {
    let config = ZeroShotConfig {
        templates: templates.iter().map(|t| (*t).to_owned()).collect(),
        ..ZeroShotConfig::default()
    };
    let classes = ClassTokens::new(clip.text(), &flowers()?)?;
    ZeroShot::new(&config)?.text_features(clip, &classes)
}

#[test]
fn settings_name_the_sentences() -> Result<()> {
    assert_eq!(resolved(json!({}))?, ["a photo of a {}."]);
    let own = json!({"templates": ["a {}.", "the {}.", "a {}."]});
    assert_eq!(resolved(own)?, ["a {}.", "the {}.", "a {}."]);
    for name in ["OxfordPets", "oxford_pets"] {
        let pets = resolved(json!({"dataset": name}))?;
        assert_eq!(pets, ["a photo of a {}, a type of pet."]);
    }
    let seven = resolved(json!({"ensemble": "select7"}))?;
    assert_eq!(seven.len(), 7);
    assert_eq!(resolved(json!({"ensemble": "imagenet80"}))?.len(), 80);
    // The data set's own sentence joins the seven, but not for ImageNet; it does for ImageNet's variants.
    let with = |dataset: &str| resolved(json!({"ensemble": "select7", "dataset": dataset}));
    assert_eq!(with("ImageNet")?, seven);
    for (dataset, own) in [
        ("dtd", "{} texture."),
        ("imagenet_sketch", "a photo of a {}."),
    ] {
        let found = with(dataset)?;
        assert_eq!(found[..7], seven);
        assert_eq!(found[7..], [own]);
    }
    Ok(())
}

#[test]
fn several_sentences_are_the_mean_of_their_unit_features() -> Result<()> {
    let clip = clip()?;
    let (a, b) = (
        features(&["a {}."], &clip)?,
        features(&["two {}s."], &clip)?,
    );
    let length = a.sqr()?.sum(D::Minus1)?.to_vec1::<f32>()?;
    assert!(length.iter().all(|l| (l - 1.0).abs() < 1e-5), "{length:?}");
    let by_hand = ops::unit_length(&((&a + &b)? * 0.5)?, "a mean")?;
    let both = features(&["a {}.", "two {}s."], &clip)?;
    assert!(difference(&both, &by_hand)? < 1e-6);
    // The order does not matter; one that occurs twice counts twice.
    assert!(difference(&features(&["two {}s.", "a {}."], &clip)?, &both)? < 1e-6);
    let twice = features(&["a {}.", "a {}.", "two {}s."], &clip)?;
    let by_hand = ops::unit_length(&((&a * 2.0)? + &b)?, "a mean")?;
    assert!(difference(&twice, &by_hand)? < 1e-6);
    Ok(())
}

#[test]
fn permuted_classes_permute_logits_and_more_classes_change_none() -> Result<()> {
    let clip = clip()?;
    let method = ZeroShot::new(&ZeroShotConfig::default())?;
    let before = logits(&method, &clip, &flowers()?)?;
    let more = classes(&["hard-leaved pocket orchid", "daisy", "rose"])?;
    let after = logits(&method, &clip, &more)?;
    for (from, to) in [(0, 1), (2, 0)] {
        assert!(difference(&after.i((.., to))?, &before.i((.., from))?)? < 1e-5);
    }
    Ok(())
}

#[test]
fn misuse_is_refused() -> Result<()> {
    for (settings, expected) in [
        (json!({"dataset": "fruit"}), "dataset = fruit: no sentence"),
        (json!({"ensemble": "select8"}), "unknown variant `select8`"),
        (json!({"templates": ["a photo"]}), "a template has {}"),
        (
            json!({"templates": ["a {}."], "dataset": "dtd"}),
            "either templates of your own, or a data set's",
        ),
        (
            json!({"templates": ["a {}."], "ensemble": "select7"}),
            "either templates of your own, or a data set's",
        ),
        (json!({"template": "a {}."}), "unknown field `template`"),
    ] {
        let found = refused(ZeroShotConfig::read(&settings));
        assert!(found.contains(expected), "{settings}: {found}");
    }
    let clip = clip()?;
    let long = format!("{{}} {}", "word ".repeat(80));
    let found = refused(features(&[&long], &clip));
    assert!(found.contains("the text tower takes 77"), "{found}");
    assert!(zeroshot::ENTRY.import.is_none(), "nothing is learned");
    Ok(())
}
