//! What RePrompt promises: the limits in which it is something simpler, what is found, what is left out, what is refused.

#![allow(clippy::unwrap_used)]

mod common;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use candle_core::{DType, Device, IndexOp, Tensor};
use cliptune_core::context::Start;
use cliptune_core::method::{Method, Predictor, Settings};
use cliptune_core::prompt::ClassTokens;
use cliptune_core::prompt_file::PromptFile;
use cliptune_core::run::{Progress, TrainStatus};
use cliptune_core::task::{MemoryImages, Split};
use cliptune_core::templates::{DEFAULT, Sentences};
use cliptune_core::train::{Augment, Batch, Loss, Objective, accuracy, gradients};
use cliptune_core::visual_prompt::{Tokens, VisualPrompts};
use cliptune_core::{
    Clip, Gradients, ImageBatch, Labelled, Learned, Params, Result, Run, Storage, ops,
};
use cliptune_visual_pt::retrieval::Database;
use cliptune_visual_pt::{RePrompt, RePromptConfig, reprompt};
use common::{
    BLOCKS, RESNET, STEP, VIT, WIDTH, classes, clip, clip_with, close, data, gradients_are_slopes,
    largest, named, pixels, rows, split, weights,
};
use serde_json::json;

const IMAGES: usize = 6;

/// Settings of a short run.
fn config() -> RePromptConfig {
    let mut config = RePromptConfig {
        k: Some(3),
        passes: 1,
        ..RePromptConfig::default()
    };
    config.train.epochs = Some(1);
    config
}

/// The method with the pictures of [`split`] as its database, at its start.
fn started(config: &RePromptConfig, clip: &Clip) -> Result<Learned<RePrompt>> {
    let mut method = Learned::<RePrompt>::new(config, clip, &classes()?, 1)?;
    let database = Database::of_split(clip, &split(IMAGES)?, 0, &mut Run::quiet(1))?;
    method.set_database(database)?;
    Ok(method)
}

/// As [`started`], with a network that does not give zeros.
fn shifted(config: &RePromptConfig, clip: &Clip) -> Result<Learned<RePrompt>> {
    let method = started(config, clip)?;
    let values = Params::new(7);
    for param in method.params().iter().filter(|p| p.name().contains("up.")) {
        let shape = param.tensor().shape().clone();
        param.set(values.clone().normal(param.name(), shape, 0.1)?.tensor())?;
    }
    Ok(method)
}

fn images(n: usize) -> Result<ImageBatch> {
    Ok(ImageBatch::of_pixels(pixels(n)?).with_items((0..n).collect()))
}

fn step(method: &mut Learned<RePrompt>, clip: &Clip, labels: &[u32]) -> Result<(Loss, Gradients)> {
    let batch = Batch {
        images: &images(labels.len())?,
        labels,
        classes: &ClassTokens::new(clip.text(), &classes()?)?,
    };
    gradients(method, clip, &batch, STEP)
}

fn logits(method: &Learned<RePrompt>, clip: &Clip, names: &[&str]) -> Result<Vec<Vec<f32>>> {
    let classifier = method.classifier(clip, &named(names)?)?;
    rows(&classifier.logits(&images(4)?)?)
}

const NAMES: [&str; 3] = ["daisy", "common_sunflower", "lily"];

fn probabilities(logits: &[f32]) -> Vec<f32> {
    let most = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let exps: Vec<f32> = logits.iter().map(|x| (x - most).exp()).collect();
    let total: f32 = exps.iter().sum();
    exps.iter().map(|x| x / total).collect()
}

fn same(a: &[f32], b: &[f32]) -> bool {
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-5)
}

fn queries(clip: &Clip, n: usize) -> Result<Vec<Vec<f32>>> {
    let features = clip.image().encode(&pixels(n)?)?;
    Ok(ops::unit_length(&features, "features")?.to_vec2()?)
}

#[test]
fn without_retrieval_it_is_prompts_in_both_towers() -> Result<()> {
    let clip = clip()?;
    let config = RePromptConfig {
        beta: Some(0.0),
        lambda: Some(0.0),
        ..config()
    };
    let mut method = started(&config, &clip)?;
    let (found, gradients) = step(&mut method, &clip, &[0, 1, 2])?;

    // By hand, from the same start.
    let mut params = Params::new(1);
    let start = Start::of_words(Some("a photo of a"), None, 4);
    let context = start.context(&mut params, clip.text(), &classes()?)?;
    let visual = params.normal("visual_prompts", (BLOCKS, 4, WIDTH), 0.02)?;
    let mut prompts = VisualPrompts::new();
    for block in 0..BLOCKS {
        let tokens = Tokens::Shared(visual.tensor().i(block)?);
        match block {
            0 => prompts.join_before_ln_pre(tokens),
            _ => prompts.replace(block, tokens),
        }
    }
    let tokens = ClassTokens::new(clip.text(), &classes()?)?;
    let text = context.text_features(&clip, &tokens)?;
    let image = clip.image().encode_prompted(&pixels(3)?, &prompts)?;
    let by_hand = Loss::cross_entropy(clip.cosine_logits(&image, &text)?, &[0, 1, 2])?;
    assert_eq!(
        rows(&found.logits.unwrap())?,
        rows(&by_hand.logits.unwrap())?
    );
    assert_eq!(
        found.total.to_scalar::<f32>()?,
        by_hand.total.to_scalar::<f32>()?
    );
    let expected = Gradients::of(&by_hand.total, &params)?;
    for (name, expected) in expected.iter() {
        assert!(
            close(gradients.get(name).unwrap(), expected.unwrap())?,
            "{name}"
        );
    }
    // The network learns from its last map on.
    let gradient = |part: &str| gradients.get(&format!("retrieval_net.{part}")).map(largest);
    assert!(gradient("up.weight").unwrap()? > 0.0);
    assert_eq!(gradient("down.weight").unwrap()?, 0.0);
    Ok(())
}

#[test]
fn without_visual_prompts_it_starts_as_zero_shot() -> Result<()> {
    let clip = clip()?;
    let config = RePromptConfig {
        n_ctx_vision: 0,
        lambda: Some(0.0),
        ..config()
    };
    let method = started(&config, &clip)?;
    let names: Vec<&str> = method.params().iter().map(|p| p.name()).collect();
    assert_eq!(names, ["ctx"]);
    let tokens = ClassTokens::new(clip.text(), &classes()?)?;
    let text = Sentences::new(vec![DEFAULT.into()])?.mean(&clip, &tokens)?;
    let expected = clip.unit_logits(&clip.image().encode(&pixels(4)?)?, &text)?;
    let found = logits(&method, &clip, &NAMES)?;
    for (found, expected) in found.iter().zip(rows(&expected)?) {
        assert!(same(found, &expected));
    }
    Ok(())
}

#[test]
fn probabilities_are_mixed_as_probabilities() -> Result<()> {
    let clip = clip()?;
    let at = |lambda: f64| -> Result<Vec<Vec<f32>>> {
        let config = RePromptConfig {
            lambda: Some(lambda),
            ..config()
        };
        let rows = logits(&shifted(&config, &clip)?, &clip, &NAMES)?;
        Ok(rows.iter().map(|row| probabilities(row)).collect())
    };
    let (model, mixed, votes) = (at(0.0)?, at(0.3)?, at(1.0)?);
    let found = shifted(&config(), &clip)?.look_up(&clip, &queries(&clip, 4)?, None)?;
    for i in 0..4 {
        assert!((found.votes[i].iter().sum::<f32>() - 1.0).abs() < 1e-6);
        assert!(
            same(&votes[i], &found.votes[i]),
            "lambda = 1 is the neighbours alone"
        );
        let by_hand = model[i].iter().zip(&found.votes[i]);
        let by_hand: Vec<f32> = by_hand.map(|(p, v)| 0.7 * p + 0.3 * v).collect();
        assert!(same(&mixed[i], &by_hand));
    }
    Ok(())
}

#[test]
fn what_is_near_weighs_more_and_at_no_temperature_all() -> Result<()> {
    let keys = Tensor::new(
        &[[1f32, 0.0], [0.6, 0.8], [0.0, 1.0], [-1.0, 0.0]],
        &Device::Cpu,
    )?;
    let database = Database::new(&keys, vec![2, 0, 1, 0])?;
    let query = [0.8f32, 0.6];
    let found = database.nearest(&query, (3, 0.05), None)?;
    assert_eq!(
        found.iter().map(|(entry, _)| *entry).collect::<Vec<_>>(),
        [1, 0, 2]
    );
    // Cosines 0.96, 0.8, 0.6.
    let weights = probabilities(&[0.96 / 0.05, 0.8 / 0.05, 0.6 / 0.05]);
    assert!(same(
        &found.iter().map(|(_, w)| *w).collect::<Vec<_>>(),
        &weights
    ));
    assert!(same(
        &database.votes(&found, 3),
        &[weights[0], weights[2], weights[1]]
    ));
    let cold = database.nearest(&query, (3, 1e-4), None)?;
    assert_eq!(database.votes(&cold, 3), [1.0, 0.0, 0.0]);

    // In any order of the entries.
    let order = [3u32, 1, 0, 2];
    let shuffled = keys.index_select(&Tensor::new(&order, &Device::Cpu)?, 0)?;
    let shuffled = Database::new(&shuffled, vec![0, 0, 2, 1])?;
    let again = shuffled.nearest(&query, (3, 0.05), None)?;
    assert_eq!(shuffled.votes(&again, 3), database.votes(&found, 3));

    // An entry that occurs twice votes twice.
    let twice = database
        .clone()
        .joined(&Database::new(&keys.i(0..1)?, vec![2])?)?;
    let votes = twice.votes(&twice.nearest(&query, (5, 0.05), None)?, 3);
    let once = database.votes(&database.nearest(&query, (4, 0.05), None)?, 3);
    assert!((votes[2] / votes[0] - 2.0 * once[2] / once[0]).abs() < 1e-4);
    Ok(())
}

#[test]
fn a_training_image_never_finds_itself() -> Result<()> {
    let clip = clip()?;
    // Image 1 stands there twice: excluded by its number, not by how near it is.
    let source = Arc::new(MemoryImages::new(pixels(4)?));
    let items = vec![(0, 0), (1, 1), (2, 2), (1, 1), (3, 0)];
    let train = Split::<cliptune_core::task::Train>::new(source, items)?;
    let database = Database::of_split(&clip, &train, 0, &mut Run::quiet(1))?;
    assert_eq!((database.len(), database.available()), (5, 3));
    for (item, query) in queries(&clip, 4)?.iter().enumerate() {
        let found = database.nearest(query, (3, 0.05), Some(item))?;
        let own = |(entry, _): &(usize, f32)| train.items()[*entry].0 == item;
        assert!(!found.iter().any(own), "{item}: {found:?}");
        let all = database.nearest(query, (1, 0.05), None)?;
        assert!(own(&all[0]), "unasked it finds itself first");
    }
    // External images are left in whatever their numbers were.
    let joined = database.clone().joined(&database)?;
    assert_eq!(joined.available(), 8);
    let found = joined.nearest(&queries(&clip, 2)?[1], (1, 0.05), Some(1))?;
    assert!(found[0].0 >= 5);
    Ok(())
}

#[test]
fn the_order_of_classes_does_not_matter() -> Result<()> {
    let clip = clip()?;
    let config = RePromptConfig {
        lambda: Some(0.5),
        ..config()
    };
    let method = shifted(&config, &clip)?;
    let found = logits(&method, &clip, &NAMES)?;
    let order = [2usize, 0, 1];
    let permuted = logits(&method, &clip, &order.map(|c| NAMES[c]))?;
    for (row, permuted) in found.iter().zip(&permuted) {
        assert!(same(&order.map(|c| row[c]), permuted));
    }
    Ok(())
}

#[test]
fn of_other_classes_the_database_says_nothing() -> Result<()> {
    let clip = clip()?;
    let at = |lambda| {
        let config = RePromptConfig {
            lambda: Some(lambda),
            ..config()
        };
        shifted(&config, &clip)
    };
    for names in [
        &["peony", "tulip", "rose"][..],
        &["daisy", "lily"],
        &["daisy", "daisy", "lily"],
    ] {
        let found = logits(&at(0.5)?, &clip, names)?;
        assert_eq!(found, logits(&at(0.0)?, &clip, names)?, "{names:?}");
    }
    Ok(())
}

#[test]
fn neighbours_weigh_the_loss() -> Result<()> {
    let clip = clip()?;
    let at = |beta, k| -> Result<Learned<RePrompt>> {
        let config = RePromptConfig {
            beta: Some(beta),
            k: Some(k),
            ..config()
        };
        shifted(&config, &clip)
    };
    let labels = [0, 1, 2, 0];
    let mut method = at(0.3, 3)?;
    let (loss, _) = step(&mut method, &clip, &labels)?;
    let items: Vec<usize> = (0..labels.len()).collect();
    let found = method.look_up(&clip, &queries(&clip, labels.len())?, Some(&items))?;
    let logits = rows(loss.logits.as_ref().unwrap())?;
    let by_hand = (0..labels.len()).map(|i| {
        let label = labels[i] as usize;
        let guidance = (-found.votes[i][label].ln()).min(5.0);
        (1.0 + 0.3 * guidance) * -probabilities(&logits[i])[label].ln()
    });
    let by_hand = by_hand.sum::<f32>() / labels.len() as f32;
    let total = loss.total.to_scalar::<f32>()?;
    assert!((total - by_hand).abs() < 1e-4, "{total} {by_hand}");
    let ce = loss.term("ce").unwrap().to_scalar::<f32>()?;
    assert!(total > ce + 0.01);

    // Neighbours that are all right: cross entropy alone.
    let mut right = at(0.3, 1)?;
    let database = right.database()?.tensors()?;
    let keys = &database[0].1;
    // Each picture of class 0 has an external twin.
    right.set_database(Database::new(&keys.i(0..1)?, vec![0])?)?;
    let (loss, _) = step(&mut right, &clip, &[0, 0, 0])?;
    let ce = loss.term("ce").unwrap().to_scalar::<f32>()?;
    assert_eq!(loss.total.to_scalar::<f32>()?, ce);
    Ok(())
}

/// Notes what a run tells.
#[derive(Clone, Default)]
struct Notes(Arc<Mutex<Vec<String>>>);

impl Progress for Notes {
    fn start(&mut self, _: &str, _: u64, _: u64) {}
    fn trained(&mut self, _: u64, _: &TrainStatus) {}
    fn advanced(&mut self, _: u64) {}
    fn finish(&mut self) {}
    fn note(&mut self, message: &str) {
        self.0.lock().unwrap().push(message.to_owned());
    }
}

/// With one picture of each class no training picture finds one of its class.
#[test]
fn one_shot_is_not_guided() -> Result<()> {
    let (clip, one_shot) = (clip()?, data(3)?);
    let fit = |beta| -> Result<(Learned<RePrompt>, Vec<String>)> {
        let config = RePromptConfig {
            beta,
            k: Some(2),
            ..config()
        };
        let notes = Notes::default();
        let mut run = Run::quiet(1);
        run.progress = Box::new(notes.clone());
        let fitted = config.fit(&clip, &one_shot, &mut run)?;
        let notes = notes.0.lock().unwrap().clone();
        Ok((fitted, notes))
    };
    let (mut unguided, silent) = fit(None)?;
    let (loss, plain) = step(&mut unguided, &clip, &[0, 1, 2])?;
    assert_eq!(loss.terms.len(), 1);
    assert!(silent.is_empty(), "{silent:?}");
    let (mut guided, told) = fit(Some(0.4))?;
    assert!(told[0].contains("beta"), "{told:?}");
    // F is at its bound for all: the gradient is cross entropy's times a constant.
    guided
        .params()
        .load(&unguided.tensors()?.into_iter().collect())?;
    let (_, gradient) = step(&mut guided, &clip, &[0, 1, 2])?;
    for (name, plain) in plain.iter() {
        let expected = (plain.unwrap() * (1.0 + 5.0 * 0.4))?;
        assert!(close(gradient.get(name).unwrap(), &expected)?, "{name}");
    }
    Ok(())
}

#[test]
fn the_gradient_is_the_slope() -> Result<()> {
    let clip = clip()?;
    for depth in [1, BLOCKS] {
        let config = RePromptConfig {
            prompt_depth_vision: Some(depth),
            hidden: Some(5),
            ..config()
        };
        gradients_are_slopes(&mut shifted(&config, &clip)?, |method| {
            let (loss, gradients) = step(method, &clip, &[0, 1, 0])?;
            Ok((f64::from(loss.total.to_scalar::<f32>()?), gradients))
        })?;
    }
    Ok(())
}

/// Pictures that look the same at every step are looked up by what is known of them.
#[test]
fn fixed_views_are_looked_up_once() -> Result<()> {
    let (clip, data) = (clip()?, data(IMAGES)?);
    let fit = |augment| -> Result<Vec<Vec<f32>>> {
        let mut config = config();
        config.train.augment = augment;
        config.train.epochs = Some(3);
        // In memory there is one view, whatever is asked for.
        let fitted = config.fit(&clip, &data, &mut Run::quiet(1))?;
        let values = fitted.tensors()?.into_iter();
        let values = values.map(|(_, t)| Ok(t.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?));
        values.collect()
    };
    assert_eq!(fit(Augment::None)?, fit(Augment::CropFlip)?);
    Ok(())
}

#[test]
fn the_share_of_the_votes_is_chosen_on_validation_images() -> Result<()> {
    let clip = clip()?;
    let val = Arc::new(MemoryImages::new(pixels(12)?));
    // Labels that hang on nothing: some share is better than others.
    let labelled = Labelled {
        val: Some(Split::new(
            val,
            (0..12).map(|i| (i, (i / 5) as u32)).collect(),
        )?),
        ..data(IMAGES)?
    };
    let config = RePromptConfig {
        lambda: None,
        ..config()
    };
    let chosen = config.fit(&clip, &labelled, &mut Run::quiet(1))?;
    let val = labelled.val.as_ref().unwrap();
    let best = accuracy(&chosen, &clip, val, &labelled.classes)?;
    let mut smallest_best = None;
    for i in 0..20 {
        let config = RePromptConfig {
            lambda: Some(f64::from(i) / 20.0),
            ..config.clone()
        };
        let fixed = config.fit(&clip, &labelled, &mut Run::quiet(1))?;
        let here = accuracy(&fixed, &clip, val, &labelled.classes)?;
        assert!(here <= best, "{here} at {i}, chosen {best}");
        if here == best {
            smallest_best = smallest_best.or(Some(i as f32 / 20.0));
        }
    }
    let tensors: BTreeMap<String, Tensor> = chosen.tensors()?.into_iter().collect();
    assert_eq!(
        tensors["lambda"].to_vec1::<f32>()?,
        [smallest_best.unwrap()]
    );
    Ok(())
}

/// The database is in the file; other weights are refused.
#[test]
fn a_file_predicts_without_the_training_images() -> Result<()> {
    let (clip, data) = (clip()?, data(IMAGES)?);
    let config = RePromptConfig {
        lambda: Some(0.35),
        k: None,
        ..config()
    };
    let fitted = config.fit(&clip, &data, &mut Run::quiet(1))?;
    let settings = cliptune_core::method::value_of(&config);
    let file = PromptFile::new(
        "reprompt",
        settings,
        &clip,
        &data.classes,
        1,
        json!(null),
        &fitted,
    )?;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("prompt");
    file.save(&path)?;
    let file = PromptFile::load(&path)?;
    let loaded = reprompt::load(&file, &clip)?;
    let predict = |method: &dyn Predictor| -> Result<Vec<Vec<f32>>> {
        rows(
            &method
                .classifier(&clip, &data.classes)?
                .logits(&images(4)?)?,
        )
    };
    assert_eq!(predict(&fitted)?, predict(loaded.as_ref())?);

    let other = Clip::from_checkpoint(weights(VIT, 2)?, Storage::F32)?;
    let refused = reprompt::load(&file, &other).unwrap_err().to_string();
    assert!(refused.contains("trained on"), "{refused}");
    for missing in ["db_keys", "db_labels", "lambda"] {
        let mut file = file.clone();
        file.tensors.remove(missing);
        let refused = reprompt::load(&file, &clip).unwrap_err().to_string();
        assert!(refused.contains(missing), "{refused}");
    }
    let mut scaled = file.clone();
    let keys = (&scaled.tensors["db_keys"] * 2.0)?;
    scaled.tensors.insert("db_keys".into(), keys);
    let refused = reprompt::load(&scaled, &clip).unwrap_err().to_string();
    assert!(refused.contains("unit length"), "{refused}");
    let mut fewer = file.clone();
    fewer.classes = named(&["daisy", "lily"])?;
    let refused = reprompt::load(&fewer, &clip).unwrap_err().to_string();
    assert!(refused.contains("label 2"), "{refused}");
    Ok(())
}

#[test]
fn what_cannot_be_is_refused_before_training() -> Result<()> {
    let (clip, data) = (clip()?, data(IMAGES)?);
    let told = |settings: serde_json::Value| -> String {
        let made = RePromptConfig::read(&settings);
        let made = made.and_then(|config| config.fit(&clip, &data, &mut Run::quiet(1)));
        made.err().map(|e| e.to_string()).unwrap_or_default()
    };
    assert!(told(json!({"k": 6, "passes": 1})).contains("only 5 neighbours available"));
    for (settings, part) in [
        (json!({"k": 0}), "k = 0"),
        (json!({"tau": 0}), "tau"),
        (json!({"beta": -1}), "beta"),
        (json!({"lambda": 1.5}), "lambda"),
        (json!({"hidden": 0}), "hidden"),
        (json!({"prompt_depth_vision": 0}), "prompt_depth_vision"),
        (json!({"prompt_depth_vision": 4}), "1 to 3"),
        (json!({"n_ctx": 3}), "n_ctx"),
        (json!({"template": "a photo"}), "a photo"),
    ] {
        let found = told(settings);
        assert!(found.contains(part), "no `{part}` in {found}");
    }
    let resnet = clip_with(RESNET)?;
    let refused = Learned::<RePrompt>::new(&config(), &resnet, &data.classes, 1);
    assert!(refused.unwrap_err().to_string().contains("ResNet"));

    let refused = |made: Result<Database>| made.unwrap_err().to_string();
    let keys = |n: usize| Tensor::zeros((n, 2), DType::F32, &Device::Cpu);
    assert!(refused(Database::new(&keys(0)?, vec![])).contains("empty"));
    assert!(refused(Database::new(&keys(1)?, vec![0, 1])).contains("2 labels"));
    assert!(refused(Database::new(&keys(1)?, vec![0])).contains("length 0"));
    let narrow = Database::new(&Tensor::new(&[[1f32, 0.0]], &Device::Cpu)?, vec![0])?;
    let mut method = started(&config(), &clip)?;
    let other_width = method.set_database(narrow.clone()).unwrap_err().to_string();
    assert!(other_width.contains("width 2"), "{other_width}");
    let joined = method.database()?.clone().joined(&narrow);
    assert!(refused(joined).contains("width"));

    // Who does not say which training pictures these are cannot train.
    let batch = Batch {
        images: &ImageBatch::of_pixels(pixels(2)?),
        labels: &[0, 1],
        classes: &ClassTokens::new(clip.text(), &data.classes)?,
    };
    let untold = method.loss(&clip, &batch, STEP).unwrap_err().to_string();
    assert!(untold.contains("find themselves"), "{untold}");
    let bare = Learned::<RePrompt>::new(&config(), &clip, &data.classes, 1)?;
    assert!(bare.tensors().unwrap_err().to_string().contains("database"));
    Ok(())
}
