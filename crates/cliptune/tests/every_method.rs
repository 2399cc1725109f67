//! The behaviours that every method of the registry must show; a new entry is tested by being there.

use std::collections::BTreeMap;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use cliptune::checkpoint::{TorchState, random};
use cliptune::method::{Entry, Predictor, Task};
use cliptune::prompt_file::PromptFile;
use cliptune::rng::Rng;
use cliptune::task::{MemoryImages, Split};
use cliptune::{
    Activation, Arch, Classes, Clip, ImageBatch, ImageNeeds, Labelled, Result, Run, Storage, View,
    VisionArch, registry,
};
use serde_json::{Value, json};

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
        text_layers: 1,
        activation: Activation::QuickGelu,
    };
    Clip::from_checkpoint(random(&arch, 1)?, Storage::F32)
}

fn data() -> Result<Labelled> {
    let values = Rng::stream(3, "pixels", &[]).normal(9 * 3 * 32 * 32);
    let values: Vec<f32> = values.into_iter().map(|x| x as f32).collect();
    let pixels = Tensor::from_vec(values, (9, 3, 32, 32), &Device::Cpu)?;
    let source = Arc::new(MemoryImages::new(pixels));
    let items = |range: std::ops::Range<usize>| range.map(|i| (i, (i % 3) as u32)).collect();
    Ok(Labelled {
        train: Split::new(source.clone(), items(0..6))?,
        val: Some(Split::new(source, items(6..9))?),
        classes: Classes::new(vec!["daisy".into(), "common_rose".into(), "lily".into()])?,
    })
}

/// Settings for a short run: two epochs where the method trains.
fn settings(entry: &Entry) -> Value {
    match (entry.defaults)().get("train") {
        Some(_) => json!({"train": {"epochs": 2, "batch_size": 4}}),
        None => json!({}),
    }
}

fn fit(entry: &Entry, clip: &Clip, data: &Labelled, seed: u64) -> Result<Box<dyn Predictor>> {
    let method = (entry.configure)(&settings(entry))?;
    method.fit(clip, Task::Labelled(data), &mut Run::quiet(seed))
}

fn logits(predictor: &dyn Predictor, clip: &Clip, data: &Labelled) -> Result<Vec<Vec<f32>>> {
    let positions: Vec<usize> = (0..data.train.len()).collect();
    let images: ImageBatch = data
        .train
        .images(clip, &positions, predictor.needs(), View::Fixed)?;
    let classifier = predictor.classifier(clip, &data.classes)?;
    Ok(classifier.logits(&images)?.to_vec2()?)
}

#[test]
fn slugs_are_found_and_unique() {
    let slugs: BTreeMap<_, _> = registry::methods()
        .into_iter()
        .map(|e| (e.slug, e.name))
        .collect();
    assert_eq!(slugs.len(), registry::methods().len());
    for slug in slugs.keys() {
        assert_eq!(registry::find(slug).unwrap().slug, *slug);
    }
}

#[test]
fn defaults_read_back_and_unknown_keys_are_refused() {
    for entry in registry::methods() {
        let defaults = (entry.defaults)();
        let method = (entry.configure)(&defaults).unwrap();
        assert_eq!(method.config(), defaults, "{}", entry.slug);
        let refused = (entry.configure)(&json!({"no_such_setting": 1}))
            .err()
            .unwrap()
            .to_string();
        assert!(
            refused.contains("no_such_setting"),
            "{}: {refused}",
            entry.slug
        );
    }
}

#[test]
fn the_same_seed_gives_the_same_tensors() -> Result<()> {
    let (clip, data) = (clip()?, data()?);
    for entry in registry::methods() {
        let values = |seed| -> Result<Vec<(String, Vec<f32>)>> {
            let tensors = fit(&entry, &clip, &data, seed)?.tensors()?;
            tensors
                .into_iter()
                .map(|(name, t)| Ok((name, t.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?)))
                .collect()
        };
        assert_eq!(values(1)?, values(1)?, "{}", entry.slug);
        assert!(
            values(1)?.is_empty() || values(1)? != values(2)?,
            "{} ignores the seed",
            entry.slug
        );
    }
    Ok(())
}

#[test]
fn a_saved_predictor_predicts_the_same_after_loading() -> Result<()> {
    let (clip, data) = (clip()?, data()?);
    let folder = tempfile::tempdir().map_err(|e| cliptune::Error::io("temp", e))?;
    for entry in registry::methods() {
        let fitted = fit(&entry, &clip, &data, 1)?;
        let config = (entry.configure)(&settings(&entry))?.config();
        let (slug, notes) = (entry.slug, Value::Null);
        let file = PromptFile::new(
            slug,
            config,
            &clip,
            &data.classes,
            1,
            notes,
            fitted.as_ref(),
        )?;
        let path = folder.path().join(slug);
        file.save(&path)?;
        let loaded = PromptFile::load(&path)?;
        loaded.check_clip(&clip)?;
        let loaded = (entry.load)(&loaded, &clip)?;
        assert_eq!(loaded.needs(), entry.needs, "{slug}");
        let (before, after) = (
            logits(fitted.as_ref(), &clip, &data)?,
            logits(loaded.as_ref(), &clip, &data)?,
        );
        assert_eq!(before, after, "{slug}");
        assert!(before.iter().flatten().all(|x| x.is_finite()), "{slug}");
    }
    Ok(())
}

#[test]
fn what_learns_in_the_image_tower_shows_where_it_looks() -> Result<()> {
    let (clip, data) = (clip()?, data()?);
    for entry in registry::methods() {
        let fitted = fit(&entry, &clip, &data, 1)?;
        let positions: Vec<usize> = (0..data.train.len()).collect();
        let images = data
            .train
            .images(&clip, &positions, fitted.needs(), View::Fixed)?;
        let classifier = fitted.classifier(&clip, &data.classes)?;
        let before = classifier.logits(&images)?.to_vec2::<f32>()?;
        let slug = entry.slug;
        let map = classifier.class_attention(&images)?;
        assert_eq!(
            map.is_some(),
            fitted.needs() == ImageNeeds::Pixels,
            "{slug}"
        );
        let Some(map) = map else { continue };
        assert_eq!(map.dims(), [6, 2, 2], "{slug}");
        for shares in map.flatten_from(1)?.to_vec2::<f32>()? {
            assert!((shares.iter().sum::<f32>() - 1.0).abs() < 1e-5, "{slug}");
        }
        // Looking changes nothing.
        let fresh = fitted.classifier(&clip, &data.classes)?;
        fresh.class_attention(&images)?;
        let after = fresh.logits(&images)?.to_vec2::<f32>()?;
        assert_eq!(before, after, "{slug}");
    }
    Ok(())
}

#[test]
fn other_class_names_are_served() -> Result<()> {
    let (clip, data) = (clip()?, data()?);
    for entry in registry::methods() {
        let fitted = fit(&entry, &clip, &data, 1)?;
        let other = Labelled {
            classes: Classes::new(vec!["water_lily".into(), "peony".into()])?,
            ..data.clone()
        };
        let logits = logits(fitted.as_ref(), &clip, &other)?;
        assert!(
            logits
                .iter()
                .all(|row| row.len() == 2 && row.iter().all(|x| x.is_finite())),
            "{}",
            entry.slug
        );
        let long = Classes::new(vec!["word ".repeat(80)])?;
        let refused = fitted.classifier(&clip, &long).err().unwrap().to_string();
        assert!(refused.contains("takes 77"), "{}: {refused}", entry.slug);
    }
    Ok(())
}

#[test]
fn checkpoints_of_the_authors_code_are_read_by_their_keys() -> Result<()> {
    let (clip, data) = (clip()?, data()?);
    for entry in registry::methods() {
        let Some(import) = entry.import else {
            continue;
        };
        let fitted = fit(&entry, &clip, &data, 1)?;
        let own = fitted.tensors()?;
        let import = |tensors: Vec<(String, Tensor)>| {
            let state = TorchState {
                tensors: tensors.into_iter().collect(),
                epoch: None,
            };
            import(&state, &json!({}), &clip, &data.classes)
        };
        let width = clip.text().width();
        let buffer = Tensor::zeros((3, 1, width), DType::F32, &Device::Cpu)?;
        let mut saved = own.clone();
        saved.push(("token_prefix".into(), buffer));
        let imported = import(saved)?;
        let values = |tensors: Vec<(String, Tensor)>| -> Result<Vec<(String, Vec<f32>)>> {
            let values = tensors.into_iter();
            let values = values.map(|(name, t)| Ok((name, t.flatten_all()?.to_vec1()?)));
            values.collect()
        };
        let found = values(imported.predictor.tensors()?)?;
        assert_eq!(found, values(own.clone())?, "{}", entry.slug);
        for (missing, (name, _)) in own.iter().enumerate() {
            let mut rest = own.clone();
            rest.remove(missing);
            let refused = import(rest).err();
            let refused =
                refused.unwrap_or_else(|| panic!("{}: nothing misses `{name}`", entry.slug));
            let refused = refused.to_string();
            assert!(refused.contains(name.as_str()), "{}: {refused}", entry.slug);
        }
    }
    Ok(())
}
