//! What DPT with CAVPT promises: the limits in which it is something simpler, what the gradient reaches, what it refuses.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::sync::Arc;

use candle_core::{Device, Tensor};
use cliptune_core::checkpoint::{TorchState, random};
use cliptune_core::method::{Method, Predictor, Settings};
use cliptune_core::prompt::{ClassTokens, Prompts};
use cliptune_core::rng::Rng;
use cliptune_core::schedule::Schedule;
use cliptune_core::task::{MemoryImages, Split};
use cliptune_core::train::{Batch, Loss, Objective, Recipe, Step, gradients};
use cliptune_core::visual_prompt::{Tokens, VisualPrompts};
use cliptune_core::{
    Activation, Arch, Classes, Clip, Error, Gradients, ImageBatch, Labelled, Learned, Result, Run,
    Storage, VisionArch,
};
use cliptune_multimodal_pt::cavpt::{ENTRY, Variant};
use cliptune_multimodal_pt::{Cavpt, CavptConfig};
use serde_json::json;

const BLOCKS: usize = 3;
const TEXT: &str = "prompt_learner.ctx";
const VISUAL: &str = "image_encoder.transformer.ctx_learner.ctx";
const GENERATOR: &str = "image_encoder.transformer.extractor.";

fn clip_with(vision: VisionArch) -> Result<Clip> {
    let arch = Arch {
        embed_dim: 32,
        image_resolution: 32,
        vision,
        context_length: 77,
        vocab_size: 49_408,
        text_width: 64,
        text_layers: 2,
        activation: Activation::QuickGelu,
    };
    Clip::from_checkpoint(random(&arch, 1)?, Storage::F32)
}

fn clip() -> Result<Clip> {
    clip_with(VisionArch::Vit {
        layers: BLOCKS,
        width: 64,
        patch_size: 16,
    })
}

fn named(names: &[&str]) -> Result<Classes> {
    Classes::new(names.iter().map(|name| (*name).to_owned()).collect())
}

fn classes() -> Result<Classes> {
    named(&["daisy", "common_sunflower", "rose", "tulip"])
}

fn pixels(n: usize) -> Result<Tensor> {
    let values = Rng::stream(5, "pixels", &[]).normal(n * 3 * 32 * 32);
    let values: Vec<f32> = values.into_iter().map(|x| x as f32).collect();
    Ok(Tensor::from_vec(values, (n, 3, 32, 32), &Device::Cpu)?)
}

fn largest(t: &Tensor) -> Result<f32> {
    Ok(t.abs()?.max_all()?.to_scalar::<f32>()?)
}

fn close(a: &Tensor, b: &Tensor) -> Result<bool> {
    Ok(largest(&(a - b)?)? < 2e-5 * largest(b)?)
}

fn number(t: &Tensor) -> Result<f64> {
    Ok(f64::from(t.to_scalar::<f32>()?))
}

/// A small method: 3 free tokens, 2 candidates.
fn config() -> CavptConfig {
    CavptConfig {
        n_ctx: Some(4),
        vpt_n_ctx: 3,
        class_prompt_num: 2,
        generator_n_ctx: 4,
        attention_dim: 5,
        ..CavptConfig::default()
    }
}

fn at(epoch: usize) -> Step {
    Step {
        seed: 0,
        epoch,
        epochs: 60,
        index: 0,
        steps: 1,
    }
}

/// Loss and gradients on as many pictures as there are labels.
fn step(
    method: &mut Learned<Cavpt>,
    clip: &Clip,
    classes: &Classes,
    labels: &[u32],
    epoch: usize,
) -> Result<(Loss, Gradients)> {
    let classes = ClassTokens::new(clip.text(), classes)?;
    let images = ImageBatch::of_pixels(pixels(labels.len())?);
    let batch = Batch {
        images: &images,
        labels,
        classes: &classes,
    };
    gradients(method, clip, &batch, at(epoch))
}

fn logits(method: &dyn Predictor, clip: &Clip, classes: &Classes) -> Result<Tensor> {
    let images = ImageBatch::of_pixels(pixels(3)?);
    method.classifier(clip, classes)?.logits(&images)
}

/// The candidates of three pictures.
fn candidates(method: &Cavpt, clip: &Clip, classes: &Classes) -> Result<Vec<Vec<u32>>> {
    let classes = ClassTokens::new(clip.text(), classes)?;
    let frozen = method.frozen_text_features(clip, &classes)?;
    let plain = clip.image().encode(&pixels(3)?)?;
    let candidates = method.candidates(clip, &plain, &frozen)?;
    Ok(candidates.unwrap().to_vec2()?)
}

#[test]
fn without_prompts_it_is_zero_shot() -> Result<()> {
    let (clip, classes) = (clip()?, classes()?);
    let config = CavptConfig {
        n_ctx: None,
        ctx_init: Some("a photo of a".into()),
        vpt_n_ctx: 0,
        class_prompt_num: 0,
        ..config()
    };
    let method = Learned::<Cavpt>::new(&config, &clip, &classes, 1)?;
    let tokens = ClassTokens::new(clip.text(), &classes)?;
    let sentences = Prompts::of_tokens(tokens.fill("a photo of a {}.")?);
    let text = clip.text().encode(&sentences)?;
    let zero_shot = clip.cosine_logits(&clip.image().encode(&pixels(3)?)?, &text)?;
    assert!(close(&logits(&method, &clip, &classes)?, &zero_shot)?);
    // Every prompt that is added counts.
    for changed in [
        CavptConfig {
            vpt_n_ctx: 1,
            ..config.clone()
        },
        CavptConfig {
            class_prompt_num: 1,
            ..config.clone()
        },
    ] {
        let method = Learned::<Cavpt>::new(&changed, &clip, &classes, 1)?;
        assert!(!close(&logits(&method, &clip, &classes)?, &zero_shot)?);
    }
    Ok(())
}

#[test]
fn without_candidates_the_upper_blocks_read_the_image_alone() -> Result<()> {
    let (clip, classes) = (clip()?, classes()?);
    let config = CavptConfig {
        class_prompt_num: 0,
        ..config()
    };
    let mut method = Learned::<Cavpt>::new(&config, &clip, &classes, 1)?;
    let visual = method.params().get(VISUAL).unwrap().value()?;
    let mut prompts = VisualPrompts::new();
    for block in 0..BLOCKS - 1 {
        prompts.replace(block, Tokens::Shared(visual.get(block)?));
    }
    prompts.remove(BLOCKS - 1);
    let images = clip.image().encode_prompted(&pixels(3)?, &prompts)?;
    let tokens = ClassTokens::new(clip.text(), &classes)?;
    let text = method.text_features(&clip, &tokens)?;
    let expected = clip.cosine_logits(&images, &text)?;
    assert!(close(&logits(&method, &clip, &classes)?, &expected)?);
    // Nothing is added to the loss, and of the generator the auxiliary classifier has no gradient, the rest a zero one.
    let (loss, gradients) = step(&mut method, &clip, &classes, &[0, 1, 2], 40)?;
    assert_eq!(number(loss.term("aux").unwrap())?, 0.0);
    assert_eq!(number(&loss.total)?, number(loss.term("main").unwrap())?);
    for (name, gradient) in gradients.iter() {
        match gradient {
            None => assert!(name.contains(".classfiers.") || name.contains(".lns.")),
            Some(gradient) => {
                assert_eq!(
                    largest(gradient)? == 0.0,
                    name.starts_with(GENERATOR),
                    "{name}"
                )
            }
        }
    }
    Ok(())
}

/// Every learned tensor gets a gradient, and its length is the slope of the loss along it.
fn gradients_are_slopes(config: &CavptConfig, cut: &[&str]) -> Result<()> {
    let (clip, classes) = (clip()?, classes()?);
    let mut method = Learned::<Cavpt>::new(config, &clip, &classes, 1)?;
    // Labels that are candidates, so that the auxiliary classifier learns.
    let labels: Vec<u32> = match config.variant {
        Variant::Dpt => candidates(&method, &clip, &classes)?
            .iter()
            .map(|c| c[1])
            .collect(),
        Variant::Vlp => vec![0, 1, 2],
    };
    let (_, gradients) = step(&mut method, &clip, &classes, &labels, 0)?;
    let start: BTreeMap<String, Tensor> = method.params().tensors()?.into_iter().collect();
    for (name, gradient) in gradients.iter() {
        let gradient = gradient.ok_or_else(|| Error::Data(format!("`{name}` gets no gradient")))?;
        let size = number(&gradient.sqr()?.sum_all()?.sqrt()?)?;
        assert!(size > 1e-7, "the gradient of `{name}` is {size}");
        if cut.contains(&name) {
            continue;
        }
        let h = 2e-3 / size.max(1e-2);
        let mut at = |sign: f64| -> Result<f64> {
            let mut moved = start.clone();
            let value = (&start[name] + (gradient * (sign * h / size))?)?;
            moved.insert(name.to_owned(), value);
            method.params().load(&moved)?;
            number(&step(&mut method, &clip, &classes, &labels, 0)?.0.total)
        };
        let slope = (at(1.0)? - at(-1.0)?) / (2.0 * h);
        method.params().load(&start)?;
        assert!(
            (slope - size).abs() < 0.03 * size + 1e-3,
            "`{name}`: slope {slope}, gradient {size}"
        );
    }
    Ok(())
}

#[test]
fn the_gradient_reaches_everything_that_is_learned() -> Result<()> {
    // The free tokens also move what the generator reads, where no gradient flows.
    gradients_are_slopes(&config(), &[VISUAL])?;
    let vlp = CavptConfig {
        variant: Variant::Vlp,
        ..config()
    };
    gradients_are_slopes(&vlp, &[])
}

#[test]
fn the_order_of_candidates_does_not_matter() -> Result<()> {
    let (clip, classes) = (clip()?, classes()?);
    let config = CavptConfig {
        class_prompt_num: 3,
        bottom_limit: Some(2),
        ..config()
    };
    let method = Learned::<Cavpt>::new(&config, &clip, &classes, 1)?;
    let tokens = ClassTokens::new(clip.text(), &classes)?;
    let text = method.text_features(&clip, &tokens)?;
    let see = |order: [u32; 3]| {
        let candidates = Tensor::new(&[order, [0, 1, 2], [3, 1, 0]], &Device::Cpu)?;
        method.see(&clip, &pixels(3)?, &text, Some(&candidates))
    };
    let (one, other) = (see([0, 1, 3])?, see([3, 0, 1])?);
    assert!(close(&one.features, &other.features)?);
    let (one, other) = (one.class_logits.unwrap(), other.class_logits.unwrap());
    // A prompt for each candidate and upper block, and a logit for each class.
    assert_eq!(one.dims(), [3, 2, 3, 4]);
    let turn = Tensor::new(&[2u32, 0, 1], &Device::Cpu)?;
    assert!(close(&one.get(0)?.index_select(&turn, 1)?, &other.get(0)?)?);
    assert!(close(&one.get(1)?, &other.get(1)?)?);
    // Other candidates are another matter.
    assert!(!close(
        &see([0, 1, 2])?.features,
        &see([0, 1, 3])?.features
    )?);
    Ok(())
}

#[test]
fn candidates_are_the_likeliest_classes_and_of_equals_the_first() -> Result<()> {
    let clip = clip()?;
    let classes = classes()?;
    let method = Learned::<Cavpt>::new(&config(), &clip, &classes, 1)?;
    let dim = clip.arch().embed_dim;
    let row =
        |place: usize, value: f32| (0..dim).map(move |i| if i == place { value } else { 0.0 });
    let frozen: Vec<f32> = [3, 0, 1, 0].into_iter().flat_map(|i| row(i, 1.0)).collect();
    let frozen = Tensor::from_vec(frozen, (4, dim), &Device::Cpu)?;
    let plain: Vec<f32> = row(0, 2.0).chain(row(1, 2.0)).collect();
    let plain = Tensor::from_vec(plain, (2, dim), &Device::Cpu)?;
    let found = method.candidates(&clip, &plain, &frozen)?.unwrap();
    assert_eq!(found.to_vec2::<u32>()?, [[1, 3], [2, 0]]);
    // No more than there are.
    let all = CavptConfig {
        class_prompt_num: 10,
        ..config()
    };
    let method = Learned::<Cavpt>::new(&all, &clip, &classes, 1)?;
    let found = method.candidates(&clip, &plain, &frozen)?.unwrap();
    assert_eq!(found.to_vec2::<u32>()?[0], [1, 3, 0, 2]);
    Ok(())
}

#[test]
fn a_label_that_is_no_candidate_teaches_the_auxiliary_classifier_nothing() -> Result<()> {
    let (clip, classes) = (clip()?, classes()?);
    let mut method = Learned::<Cavpt>::new(&config(), &clip, &classes, 1)?;
    let likely = candidates(&method, &clip, &classes)?;
    let outside = |likely: &Vec<u32>| (0..4).find(|class| !likely.contains(class)).unwrap();
    let mut labels: Vec<u32> = likely.iter().map(outside).collect();
    let (loss, gradients) = step(&mut method, &clip, &classes, &labels, 40)?;
    assert_eq!(number(loss.term("aux").unwrap())?, 0.0);
    let head = format!("{GENERATOR}classfiers.0.weight");
    assert!(gradients.get(&head).is_none());
    // One that is a candidate counts by itself, whatever the others.
    labels[1] = likely[1][0];
    let (loss, gradients) = step(&mut method, &clip, &classes, &labels, 40)?;
    let auxiliary = number(loss.term("aux").unwrap())?;
    assert!(auxiliary > 0.0 && gradients.get(&head).is_some());
    let main = number(loss.term("main").unwrap())?;
    let total = main + 0.3 * auxiliary;
    assert!((number(&loss.total)? - total).abs() < 1e-5 * total);
    Ok(())
}

#[test]
fn guidance_ends_after_its_epochs() -> Result<()> {
    let (clip, classes) = (clip()?, classes()?);
    let mut method = Learned::<Cavpt>::new(&config(), &clip, &classes, 1)?;
    let mut of = |epoch| -> Result<(f64, BTreeMap<&str, f64>)> {
        let (loss, _) = step(&mut method, &clip, &classes, &[0, 1, 2], epoch)?;
        let terms = loss.terms.iter();
        let terms = terms.map(|(name, term)| Ok((*name, number(term)?)));
        Ok((number(&loss.total)?, terms.collect::<Result<_>>()?))
    };
    let ((guided, terms), (free, later)) = (of(29)?, of(30)?);
    let by_hand = terms["text"] + terms["image"] + 0.1 * terms["main"] + 0.3 * terms["aux"];
    assert!((guided - by_hand).abs() < 1e-5 * guided);
    assert_eq!(later.keys().collect::<Vec<_>>(), [&"aux", &"main"]);
    assert!((free - (later["main"] + 0.3 * later["aux"])).abs() < 1e-5 * free);
    Ok(())
}

#[test]
fn permuting_the_classes_permutes_everything() -> Result<()> {
    let (clip, classes) = (clip()?, classes()?);
    let mut method = Learned::<Cavpt>::new(&config(), &clip, &classes, 1)?;
    let order = [2u32, 0, 3, 1];
    let names: Vec<&str> = order
        .iter()
        .map(|&i| classes.names()[i as usize].as_str())
        .collect();
    let permuted = named(&names)?;
    let turn = Tensor::new(&order, &Device::Cpu)?;
    let mut tensors: BTreeMap<String, Tensor> = method.tensors()?.into_iter().collect();
    let head = format!("{GENERATOR}classfiers.0.weight");
    let rows = tensors[&head].index_select(&turn, 0)?;
    tensors.insert(head, rows);
    let mut other = Learned::<Cavpt>::with_tensors(&config(), &clip, &permuted, 0, &tensors)?;
    let found = logits(&other, &clip, &permuted)?;
    let expected = logits(&method, &clip, &classes)?.index_select(&turn, 1)?;
    assert!(close(&found, &expected)?);
    let label = |class: u32| order.iter().position(|&i| i == class).unwrap() as u32;
    let (mine, theirs) = ([0, 1, 2], [label(0), label(1), label(2)]);
    let (mine, _) = step(&mut method, &clip, &classes, &mine, 0)?;
    let (theirs, _) = step(&mut other, &clip, &permuted, &theirs, 0)?;
    assert!((number(&mine.total)? - number(&theirs.total)?).abs() < 1e-4);
    Ok(())
}

#[test]
fn to_predict_is_the_same_pass_as_to_learn() -> Result<()> {
    let (clip, classes) = (clip()?, classes()?);
    for bottom_limit in 1..=BLOCKS {
        let config = CavptConfig {
            bottom_limit: Some(bottom_limit),
            ..config()
        };
        let mut method = Learned::<Cavpt>::new(&config, &clip, &classes, 1)?;
        let (loss, _) = step(&mut method, &clip, &classes, &[0, 1, 2], 0)?;
        let difference = (logits(&method, &clip, &classes)? - loss.logits.unwrap())?;
        assert_eq!(largest(&difference)?, 0.0, "bottom_limit {bottom_limit}");
        // Any other number of classes, with which the auxiliary classifier has nothing to do.
        let other = logits(&method, &clip, &named(&["poppy"])?)?;
        assert_eq!(other.dims(), [3, 1]);
    }
    Ok(())
}

#[test]
fn each_side_learns_at_its_own_rate() -> Result<()> {
    let (clip, classes) = (clip()?, classes()?);
    let method = Learned::<Cavpt>::new(&CavptConfig::default(), &clip, &classes, 1)?;
    // The text context has one epoch of warm-up, the others ten.
    let rate = |epoch| method.rate(TEXT, epoch, 60);
    assert_eq!((rate(0), rate(1)), (Some(1e-5), Some(0.002)));
    assert_eq!(method.rate(VISUAL, 0, 60), None);
    let recipe = CavptConfig::default().train;
    let shared = |epoch| recipe.schedule.rate(recipe.lr, epoch, 60);
    assert_eq!((shared(9), shared(10)), (1e-5, 0.01));

    let images = Arc::new(MemoryImages::new(pixels(4)?));
    let data = Labelled {
        train: Split::new(images, vec![(0, 0), (1, 1), (2, 2), (3, 3)])?,
        val: None,
        classes: classes.clone(),
    };
    let moved = |lr: f64, text_lr: f64| -> Result<(f32, f32)> {
        let config = CavptConfig {
            text_lr,
            train: Recipe {
                epochs: Some(1),
                lr,
                schedule: Schedule::default(),
                ..Recipe::default()
            },
            ..config()
        };
        let fitted = config.fit(&clip, &data, &mut Run::quiet(1))?;
        let start = Learned::<Cavpt>::new(&config, &clip, &classes, 1)?;
        let by = |name: &str| -> Result<f32> {
            let value = |method: &Learned<Cavpt>| method.params().get(name).unwrap().value();
            largest(&(value(&fitted)? - value(&start)?)?)
        };
        Ok((by(VISUAL)?, by(TEXT)?))
    };
    let (visual, text) = moved(1e-20, 0.1)?;
    assert!(visual == 0.0 && text > 1e-5, "{visual} {text}");
    let (visual, text) = moved(0.1, 1e-20)?;
    assert!(visual > 1e-5 && text == 0.0, "{visual} {text}");
    Ok(())
}

#[test]
fn checkpoints_say_what_was_learned() -> Result<()> {
    let (clip, classes) = (clip()?, classes()?);
    let settings = json!({"class_prompt_num": 2});
    for config in [
        CavptConfig {
            bottom_limit: Some(2),
            n_ctx: Some(5),
            ..config()
        },
        CavptConfig {
            class_specific: true,
            bottom_limit: Some(1),
            ..config()
        },
        CavptConfig {
            variant: Variant::Vlp,
            ..config()
        },
    ] {
        let method = Learned::<Cavpt>::new(&config, &clip, &classes, 2)?;
        let state = TorchState {
            tensors: method.tensors()?.into_iter().collect(),
            epoch: None,
        };
        let imported = (ENTRY.import.unwrap())(&state, &settings, &clip, &classes)?.predictor;
        let ours = logits(&method, &clip, &classes)?;
        let difference = (ours - logits(imported.as_ref(), &clip, &classes)?)?;
        assert_eq!(largest(&difference)?, 0.0);
        // Without the class-aware part it is the other variant, whose free tokens stand in every block.
        if config.variant == Variant::Dpt {
            let mut tensors = state.tensors;
            tensors.retain(|name, _| !name.starts_with(GENERATOR));
            let state = TorchState {
                tensors,
                epoch: None,
            };
            let refused = (ENTRY.import.unwrap())(&state, &settings, &clip, &classes);
            assert!(refused.unwrap_err().to_string().contains(VISUAL));
        }
    }
    Ok(())
}

#[test]
fn what_cannot_be_is_refused_before_any_work() -> Result<()> {
    let (clip, classes) = (clip()?, classes()?);
    let told = |settings: serde_json::Value, classes: &Classes| -> String {
        let made = CavptConfig::read(&settings)
            .and_then(|config| Learned::<Cavpt>::new(&config, &clip, classes, 1).map(|_| ()));
        made.err().map(|e| e.to_string()).unwrap_or_default()
    };
    for (settings, expected) in [
        (json!({"bottom_limit": 0}), "bottom_limit"),
        (json!({"bottom_limit": BLOCKS + 1}), "1 to 3"),
        (json!({"class_prompt_num": -1}), "cavpt"),
        (json!({"n_ctx": 0}), "n_ctx"),
        (json!({"attention_dim": 0}), "attention_dim"),
        (json!({"generator_n_ctx": 0}), "generator_n_ctx"),
        (json!({"alpha": -0.1}), "alpha"),
        (json!({"text_lr": 0.0}), "text_lr"),
        (json!({"dataset": "garden"}), "set one yourself"),
        (json!({"template": "a photo"}), "{}"),
        (
            json!({"ctx_init": "a photo of a", "class_specific": true}),
            "class_specific",
        ),
    ] {
        let found = told(settings, &classes);
        assert!(found.contains(expected), "{expected}: {found}");
    }
    let one = named(&["daisy"])?;
    assert!(told(json!({}), &one).contains("single class"));
    assert_eq!(told(json!({"alpha": 0.0}), &one), "");
    assert_eq!(told(json!({"variant": "vlp"}), &one), "");
    let long = named(&["daisy", &"word ".repeat(80)])?;
    assert!(told(json!({}), &long).contains("takes 77"));
    let resnet = clip_with(VisionArch::ResNet {
        layers: [1, 1, 1, 1],
        width: 16,
    })?;
    let refused = Learned::<Cavpt>::new(&config(), &resnet, &classes, 1);
    assert!(refused.unwrap_err().to_string().contains("ResNet"));
    // A context for each class serves no other.
    let specific = CavptConfig {
        class_specific: true,
        ..config()
    };
    let method = Learned::<Cavpt>::new(&specific, &clip, &classes, 1)?;
    assert!(method.classifier(&clip, &one).is_err());
    // What is learned has the sizes that it is said to have.
    let method = Learned::<Cavpt>::new(&config(), &clip, &classes, 1)?;
    let width = 64;
    let generator = (32 * width + width) + 2 * 5 * width + width * width + 4 * width;
    let vectors = 4 * 64 + 2 * 3 * width + 4 * width;
    let classifier = classes.len() * width;
    assert_eq!(method.params().count(), generator + vectors + classifier);
    Ok(())
}
