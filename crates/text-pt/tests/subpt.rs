//! SubPT's checks: what its card promises, on a tiny random CLIP.

#![allow(clippy::unwrap_used)] // Helpers too: a missing value is a failed test.

mod common;

use std::collections::BTreeSet;
use std::time::Duration;

use candle_core::{DType, Tensor};
use cliptune_core::checkpoint::TorchState;
use cliptune_core::method::{Method, Predictor, Settings};
use cliptune_core::optim::OptimizerConfig;
use cliptune_core::run::CheckpointPlan;
use cliptune_core::schedule::{Decay, Schedule};
use cliptune_core::subspace::Subspace;
use cliptune_core::{Classes, Error, Learned, Result, Run};
use cliptune_text_pt::subpt::{self, Restart, SubPt, SubPtConfig, Variant};
use cliptune_text_pt::{CoOp, CoOpConfig};
use common::*;
use serde_json::json;

fn config() -> SubPtConfig {
    let mut config = SubPtConfig {
        n_ctx: 3,
        ..SubPtConfig::default()
    };
    (config.train.epochs, config.train.batch_size) = (Some(4), 4);
    (config.n_early, config.rank) = (Some(3), Some(2));
    config
}

fn with_novel(names: &[&str]) -> SubPtConfig {
    SubPtConfig {
        variant: Variant::Nfl,
        novel_classes: names.iter().map(|n| (*n).to_owned()).collect(),
        ..config()
    }
}

fn sgd(momentum: f64, weight_decay: f64) -> OptimizerConfig {
    OptimizerConfig::Sgd {
        momentum,
        weight_decay,
        dampening: 0.0,
        nesterov: false,
    }
}

fn coop(config: &SubPtConfig) -> CoOpConfig {
    CoOpConfig {
        n_ctx: Some(config.n_ctx),
        train: config.train.clone(),
        ..CoOpConfig::default()
    }
}

fn ctx(method: &dyn Predictor) -> Result<Tensor> {
    Ok(method.tensors()?.remove(0).1)
}

#[test]
fn a_subspace_of_everything_is_coop() -> Result<()> {
    let (clip, names) = (clip()?, flowers()?);
    let mut ours = Learned::<SubPt>::new(&config(), &clip, &names, 2)?;
    let everything = Tensor::eye(3 * 64, DType::F32, clip.device())?;
    ours.project_onto(Subspace::from_components(&everything)?)?;
    let mut theirs = Learned::<CoOp>::new(&coop(&config()), &clip, &names, 2)?;
    let ours = step(&mut ours, &clip, &names, 3)?.1;
    let theirs = step(&mut theirs, &clip, &names, 3)?.1;
    let (ours, theirs) = (ours.get("ctx").unwrap(), theirs.get("ctx").unwrap());
    assert_eq!(bits(ours)?, bits(theirs)?);
    Ok(())
}

#[test]
fn the_directions_are_those_of_coops_early_contexts() -> Result<()> {
    let (clip, data) = (clip()?, data()?);
    let mut config = config();
    (config.n_early, config.rank) = (Some(2), Some(1));
    config.train.schedule = Schedule {
        decay: Decay::Constant {},
        ..Schedule::default()
    };
    let ours = config.fit(&clip, &data, &mut Run::quiet(1))?;
    assert_eq!(ours.history().epochs.len(), 4);
    let after = |epochs: usize| -> Result<Tensor> {
        let mut coop = coop(&config);
        coop.train.epochs = Some(epochs);
        ctx(&coop.fit(&clip, &data, &mut Run::quiet(1))?)
    };
    let way = (after(2)? - after(1)?)?;
    let subspace = ours.subspace().unwrap();
    assert_eq!(subspace.rank(), 1);
    assert!(difference(&subspace.project(&way)?, &way)? < 1e-4);
    Ok(())
}

#[test]
fn without_weight_decay_the_context_stays_in_its_plane() -> Result<()> {
    let (clip, data) = (clip()?, data()?);
    // How much of the way from `start` lies outside the subspace.
    let outside = |config: &SubPtConfig, start: &Tensor| -> Result<f32> {
        let fitted = config.fit(&clip, &data, &mut Run::quiet(1))?;
        let way = (ctx(&fitted)? - start)?;
        difference(&fitted.subspace().unwrap().project(&way)?, &way)
    };
    let start = ctx(&Learned::<SubPt>::new(&config(), &clip, &data.classes, 1)?)?;
    let mut config = config();
    for (momentum, decay, confine, inside) in [
        (0.0, 0.0, false, true),
        (0.9, 0.0, false, true),
        (0.9, 0.5, false, false),
        (0.9, 0.5, true, true),
    ] {
        config.train.optimizer = sgd(momentum, decay);
        config.confine_decay = confine;
        let found = outside(&config, &start)?;
        assert_eq!(
            found < 1e-3,
            inside,
            "{momentum} {decay} {confine}: {found}"
        );
    }
    // From the context after the first epoch.
    config.train.optimizer = sgd(0.0, 0.0);
    config.confine_decay = false;
    config.train.schedule = Schedule {
        decay: Decay::Constant {},
        ..Schedule::default()
    };
    config.restart = Restart::FirstEpoch;
    let mut first = coop(&config);
    first.train.epochs = Some(1);
    let first = ctx(&first.fit(&clip, &data, &mut Run::quiet(1))?)?;
    assert!(outside(&config, &first)? < 1e-3);
    assert!(difference(&first, &start)? > 1e-4);
    Ok(())
}

#[test]
fn the_novel_learner_without_weight_is_coop_and_with_it_is_not() -> Result<()> {
    let (clip, names) = (clip()?, flowers()?);
    let mut theirs = Learned::<CoOp>::new(&coop(&config()), &clip, &names, 2)?;
    let theirs = step(&mut theirs, &clip, &names, 3)?.1;
    let theirs = theirs.get("ctx").unwrap();
    for (lambda, same) in [(0.0, true), (1.0, false)] {
        let config = SubPtConfig {
            lambda,
            ..with_novel(&["rose", "polka-dotted"])
        };
        let mut ours = Learned::<SubPt>::new(&config, &clip, &names, 2)?;
        let (loss, gradients) = step(&mut ours, &clip, &names, 3)?;
        let ours = gradients.get("ctx").unwrap();
        assert_eq!(difference(ours, theirs)? < 1e-5, same);
        let value = |name| -> Result<f32> { Ok(loss.term(name).unwrap().to_scalar()?) };
        let total: f32 = loss.total.to_scalar()?;
        let sum = value("xe")? + lambda as f32 * value("nfl")?;
        assert!((total - sum).abs() < 1e-5 * sum, "{total} {sum}");
    }
    Ok(())
}

#[test]
fn the_novel_loss_knows_neither_the_images_nor_the_order_of_its_names() -> Result<()> {
    let (clip, names) = (clip()?, flowers()?);
    let loss = |novel: &[&str], images: usize| -> Result<f32> {
        let mut method = Learned::<SubPt>::new(&with_novel(novel), &clip, &names, 2)?;
        let loss = step(&mut method, &clip, &names, images)?.0;
        Ok(loss.term("nfl").unwrap().to_scalar()?)
    };
    let expected = loss(&["rose", "polka-dotted", "yin_yang"], 3)?;
    assert!((1e-3..2.0).contains(&expected), "{expected}");
    for (novel, images) in [
        (["rose", "polka-dotted", "yin_yang"], 2),
        (["yin_yang", "rose", "polka-dotted"], 3),
    ] {
        assert!((loss(&novel, images)? - expected).abs() < 1e-6);
    }
    Ok(())
}

#[test]
fn gradients_are_slopes_with_and_without_novel_names() -> Result<()> {
    let (clip, names) = (clip()?, flowers()?);
    for config in [config(), with_novel(&["rose", "yin_yang"])] {
        let mut method = Learned::<SubPt>::new(&config, &clip, &names, 3)?;
        gradients_are_slopes(&mut method, &clip, &names, 3, 0.02)?;
    }
    Ok(())
}

#[test]
fn the_anchors_are_clips_eighty_sentences_and_the_data_sets_own() -> Result<()> {
    let (clip, names) = (clip()?, flowers()?);
    let anchors = |dataset: Option<&str>, template: Option<&str>| -> Result<Vec<u32>> {
        let config = SubPtConfig {
            dataset: dataset.map(str::to_owned),
            template: template.map(str::to_owned),
            ..with_novel(&["rose", "yin_yang"])
        };
        let method = Learned::<SubPt>::new(&config, &clip, &names, 3)?;
        bits(&method.novel_features(&clip)?.unwrap().1)
    };
    let alone = anchors(None, None)?;
    assert_eq!(anchors(Some("ImageNet"), None)?, alone);
    let pets = anchors(Some("oxford_pets"), None)?;
    assert!(pets != alone);
    assert_eq!(
        anchors(None, Some("a type of pet, a photo of a {}."))?,
        pets
    );
    Ok(())
}

#[test]
fn the_authors_novel_names_are_found_by_their_place() -> Result<()> {
    let all: Vec<String> = (0..1000).map(|label| format!("class {label}")).collect();
    let novel = subpt::novel_of_imagenet(&Classes::new(all.clone())?)?;
    assert_eq!(novel.iter().collect::<BTreeSet<_>>().len(), 100);
    assert_eq!(novel[..2], ["class 717", "class 988"]);
    assert_eq!(novel[98..], ["class 59", "class 186"]);
    let found = refused(subpt::novel_of_imagenet(&Classes::new(all[1..].to_vec())?));
    assert!(found.contains("1000 classes, these are 999"), "{found}");
    Ok(())
}

#[test]
fn a_run_stopped_in_either_training_goes_on_to_the_same_bits() -> Result<()> {
    let (clip, data) = (clip()?, data()?);
    let folder = tempfile::tempdir().map_err(|e| Error::io("temp", e))?;
    let whole = config().fit(&clip, &data, &mut Run::quiet(7))?;
    // Two steps an epoch, three early epochs, then four: in the first training, at the end of an epoch, in the second.
    for stop in [1, 4, 5, 7, 8, 11] {
        let plan = CheckpointPlan {
            path: folder.path().join(format!("{stop}.ckpt")),
            every: Duration::ZERO,
        };
        let run = || Run {
            checkpoint: Some(plan.clone()),
            ..Run::quiet(7)
        };
        let mut stopped = run();
        stopped.progress = Box::new(Watcher::stopping(&stopped, stop));
        let outcome = config().fit(&clip, &data, &mut stopped);
        assert!(matches!(outcome, Err(Error::Cancelled)));
        let resumed = config().fit(&clip, &data, &mut run())?;
        assert_eq!(bits(&ctx(&resumed)?)?, bits(&ctx(&whole)?)?, "after {stop}");
        assert_eq!(resumed.history(), whole.history());
        let left: Vec<_> = std::fs::read_dir(folder.path())
            .map_err(|e| Error::io(folder.path(), e))?
            .map(|entry| entry.unwrap().path())
            .collect();
        assert!(
            left.iter().all(|p| p.extension().unwrap() == "ckpt"),
            "{left:?}"
        );
    }
    Ok(())
}

#[test]
fn early_epochs_and_rank_follow_the_shots_and_what_there_is() -> Result<()> {
    let paper = SubPtConfig::default();
    for (shots, epochs, expected) in [
        (1, 50, (10, 5)),
        (2, 100, (20, 10)),
        (4, 100, (30, 10)),
        (8, 200, (40, 10)),
        (16, 200, (50, 10)),
        (16, 6, (6, 5)),
        (1, 2, (2, 1)),
    ] {
        assert_eq!(paper.subspace_for(shots, epochs)?, expected);
    }
    let found = refused(paper.subspace_for(16, 1));
    assert!(
        found.contains("n_early = 1: from 2 to the 1 epochs"),
        "{found}"
    );
    let late = SubPtConfig {
        n_early: Some(60),
        ..paper
    };
    let found = refused(late.subspace_for(1, 50));
    assert!(
        found.contains("n_early = 60: from 2 to the 50 epochs"),
        "{found}"
    );
    Ok(())
}

#[test]
fn checkpoints_of_the_authors_code_are_read() -> Result<()> {
    let (clip, names) = (clip()?, flowers()?);
    let import = subpt::ENTRY.import.unwrap();
    for class_specific in [false, true] {
        let config = SubPtConfig {
            class_specific,
            ..config()
        };
        let method = Learned::<SubPt>::new(&config, &clip, &names, 5)?;
        let mut tensors: std::collections::BTreeMap<_, _> = method.tensors()?.into_iter().collect();
        tensors.insert("token_prefix_nfl".into(), drawn(1, (2, 1, 64))?);
        let state = TorchState {
            tensors,
            epoch: None,
        };
        let imported = import(&state, &json!({}), &clip, &names)?;
        assert_eq!(imported.config["n_ctx"], 3);
        assert_eq!(imported.config["class_specific"], class_specific);
        let found = logits(imported.predictor.as_ref(), &clip, &names)?;
        assert_eq!(bits(&found)?, bits(&logits(&method, &clip, &names)?)?);
        let other = classes(&["rose", "tulip", "lily"])?;
        let other = refused(imported.predictor.classifier(&clip, &other));
        assert_eq!(other.contains("cannot serve other classes"), class_specific);
    }
    Ok(())
}

#[test]
fn misuse_is_refused_before_any_work() -> Result<()> {
    let (clip, data) = (clip()?, data()?);
    let nfl = |more: serde_json::Value| -> serde_json::Value {
        let mut settings = json!({"variant": "nfl", "novel_classes": ["rose"]});
        for (key, value) in more.as_object().unwrap() {
            settings[key] = value.clone();
        }
        settings
    };
    for (settings, expected) in [
        (json!({"n_ctx": 0}), "n_ctx = 0: at least one context token"),
        (json!({"n_early": 1}), "n_early = 1: from 2"),
        (
            json!({"n_early": 5, "train": {"epochs": 4}}),
            "n_early = 5: from 2 to as many as there are epochs",
        ),
        (json!({"rank": 0}), "rank = 0: at least 1"),
        (
            json!({"n_early": 4, "rank": 4}),
            "rank = 4: at least 1 and below n_early",
        ),
        (
            json!({"rank": 5, "train": {"epochs": 5}}),
            "rank = 5: at least 1 and below the 5 early epochs",
        ),
        (
            json!({"confine_decay": true, "train": {"optimizer": {"kind": "adam"}}}),
            "confine_decay = true: needs train.optimizer.kind",
        ),
        (
            json!({"ctx_init": "a photo of a", "class_specific": true}),
            "one context for all classes",
        ),
        (
            json!({"ctx_init": "a photo of a", "n_ctx": 3}),
            "n_ctx = 3: at least the 4 words",
        ),
        (
            json!({"variant": "nfl"}),
            "novel_classes = []: at least one novel class name",
        ),
        (
            nfl(json!({"novel_classes": [" "]})),
            "the name of class 0 is empty",
        ),
        (
            nfl(json!({"class_specific": true})),
            "novel classes have no context of their own",
        ),
        (
            nfl(json!({"class_token_position": "front"})),
            "class_token_position = front: end",
        ),
        (nfl(json!({"lambda": -1.0})), "lambda = -1"),
        (
            nfl(json!({"dataset": "fruit"})),
            "dataset = fruit: no sentence is known for it",
        ),
        (
            nfl(json!({"dataset": "dtd", "template": "a {}."})),
            "either a template or a data set",
        ),
        (nfl(json!({"template": "a photo"})), "a template has {}"),
        (json!({"ranks": 4}), "unknown field `ranks`"),
    ] {
        let found = refused(
            SubPtConfig::read(&settings)
                .and_then(|config| config.fit(&clip, &data, &mut Run::quiet(1))),
        );
        assert!(found.contains(expected), "{settings}: {found}");
    }
    let mut method = Learned::<SubPt>::new(&config(), &clip, &flowers()?, 1)?;
    let other = Tensor::eye(64, DType::F32, clip.device())?;
    let found = refused(method.project_onto(Subspace::from_components(&other)?));
    assert!(
        found.contains("has shape [64, 64], expected [64, 192]"),
        "{found}"
    );
    Ok(())
}

#[test]
fn contexts_that_do_not_move_have_no_subspace() -> Result<()> {
    let (clip, data) = (clip()?, data()?);
    let mut config = config();
    config.train.lr = 1e-30;
    config.train.schedule = Schedule {
        decay: Decay::Constant {},
        ..Schedule::default()
    };
    let found = refused(config.fit(&clip, &data, &mut Run::quiet(1)));
    assert!(
        found.contains("rank = 2: the 3 rows span 0 directions only"),
        "{found}"
    );
    Ok(())
}
