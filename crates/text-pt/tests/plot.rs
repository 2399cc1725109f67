//! PLOT's checks: what its card promises, on a tiny random CLIP.

#![allow(clippy::unwrap_used)] // Helpers too: a missing value is a failed test.

mod common;

use candle_core::{IndexOp, Tensor, Var};
use cliptune_core::checkpoint::TorchState;
use cliptune_core::method::{Predictor, Settings};
use cliptune_core::prompt::{ClassTokenPosition, ClassTokens};
use cliptune_core::task::ImageBatch;
use cliptune_core::train::{Batch, Loss, Step, gradients};
use cliptune_core::transport::{Domain, PlanGradients, Sinkhorn, StopRule};
use cliptune_core::{Classes, Clip, Gradients, ImageNeeds, Learned, Result, ops};
use cliptune_text_pt::plot::{self, Plot, PlotConfig};
use common::*;
use serde_json::json;

fn config(n_prompts: usize) -> PlotConfig {
    PlotConfig {
        n_prompts,
        n_ctx: 3,
        ..PlotConfig::default()
    }
}

fn plot(config: &PlotConfig, clip: &Clip) -> Result<Learned<Plot>> {
    let method = Learned::<Plot>::new(config, clip, &flowers()?, 1)?;
    // Contexts that differ enough for plans that are not uniform.
    let spread = drawn(5, (config.n_prompts, config.n_ctx, 64))?;
    method.params().load(&with(&method, "ctx", spread)?)?;
    Ok(method)
}

/// Raw features of every token of `n` pictures.
fn places(clip: &Clip, n: usize) -> Result<ImageBatch> {
    ImageBatch::encode(clip, &drawn(9, (n, 3, 32, 32))?, ImageNeeds::LocalFeatures)
}

fn logits_of(method: &Learned<Plot>, clip: &Clip, images: &ImageBatch) -> Result<Tensor> {
    method.classifier(clip, &flowers()?)?.logits(images)
}

fn local_step(
    method: &mut Learned<Plot>,
    clip: &Clip,
    classes: &Classes,
) -> Result<(Loss, Gradients)> {
    let tokens = ClassTokens::new(clip.text(), classes)?;
    let batch = Batch {
        images: &places(clip, 3)?,
        labels: &[0, 1, 2],
        classes: &tokens,
    };
    let step = Step {
        seed: 0,
        epoch: 0,
        epochs: 1,
        index: 0,
        steps: 1,
    };
    gradients(method, clip, &batch, step)
}

#[test]
fn one_prompt_is_compared_with_the_mean_place() -> Result<()> {
    let (clip, images) = (clip()?, places(&clip()?, 4)?);
    let method = plot(&config(1), &clip)?;
    let tokens = ClassTokens::new(clip.text(), &flowers()?)?;
    let text = method.text_features(&clip, &tokens)?.squeeze(0)?;
    let text = ops::unit_length(&text, "text")?;
    let local = images.local_features()?.i((.., 1..))?;
    let mean = ops::unit_length(&local, "place")?.mean(1)?;
    let expected = (mean.matmul(&text.t()?)? * clip.scale())?;
    assert!(difference(&logits_of(&method, &clip, &images)?, &expected)? < 1e-5);
    Ok(())
}

#[test]
fn the_global_feature_is_added_where_asked() -> Result<()> {
    let (clip, images) = (clip()?, places(&clip()?, 4)?);
    let without = plot(&config(3), &clip)?;
    let with_global = PlotConfig {
        add_global: true,
        ..config(3)
    };
    let with_global = plot(&with_global, &clip)?;
    let tokens = ClassTokens::new(clip.text(), &flowers()?)?;
    let mean = without.text_features(&clip, &tokens)?.mean(0)?;
    let expected =
        (logits_of(&without, &clip, &images)? + clip.cosine_logits(images.features()?, &mean)?)?;
    assert!(difference(&logits_of(&with_global, &clip, &images)?, &expected)? < 1e-5);
    Ok(())
}

#[test]
fn the_order_of_prompts_and_places_does_not_matter_and_that_of_classes_is_kept() -> Result<()> {
    let (clip, images) = (clip()?, places(&clip()?, 4)?);
    let method = plot(&config(3), &clip)?;
    let expected = logits_of(&method, &clip, &images)?;
    let device = clip.device();

    let tokens = images.local_features()?;
    let turned: Vec<u32> = (0..tokens.dim(1)? as u32).collect();
    let turned: Vec<u32> = turned[..1]
        .iter()
        .chain(turned[1..].iter().rev())
        .copied()
        .collect();
    let turned = tokens.index_select(&Tensor::new(turned, device)?, 1)?;
    let turned = ImageBatch::of_local_features(turned)?;
    assert!(difference(&logits_of(&method, &clip, &turned)?, &expected)? < 1e-5);

    let names: Vec<&str> = vec!["hard-leaved pocket orchid", "daisy", "common_sunflower"];
    let found = method
        .classifier(&clip, &classes(&names)?)?
        .logits(&images)?;
    let back = found.index_select(&Tensor::new(&[1u32, 2, 0], device)?, 1)?;
    assert!(difference(&back, &expected)? < 1e-5);

    let ctx = method.tensors()?.remove(0).1;
    let other = ctx.index_select(&Tensor::new(&[2u32, 0, 1], device)?, 0)?;
    method.params().load(&with(&method, "ctx", other)?)?;
    assert!(difference(&logits_of(&method, &clip, &images)?, &expected)? < 1e-5);
    Ok(())
}

#[test]
fn equal_contexts_get_equal_gradients() -> Result<()> {
    let clip = clip()?;
    let mut method = plot(&config(3), &clip)?;
    let ctx = method.tensors()?.remove(0).1;
    let ctx = Tensor::cat(&[ctx.i(..1)?, ctx.i(..1)?, ctx.i(2..)?], 0)?;
    method.params().load(&with(&method, "ctx", ctx)?)?;
    let (_, gradients) = local_step(&mut method, &clip, &flowers()?)?;
    let gradient = gradients.get("ctx").unwrap();
    assert!(difference(&gradient.i(0)?, &gradient.i(1)?)? < 1e-5);
    assert!(difference(&gradient.i(0)?, &gradient.i(2)?)? > 1e-2);
    Ok(())
}

#[test]
fn a_detached_plan_gives_the_aggregated_places_as_gradient() -> Result<()> {
    let (clip, images) = (clip()?, places(&clip()?, 2)?);
    let method = plot(&config(3), &clip)?;
    let unit = ops::unit_length(&drawn(3, (3, 2, 32))?, "text")?;
    let text = Var::from_tensor(&unit)?;
    let matched = method.matched(&clip, &images, text.as_tensor())?;
    let gradients = matched.logits.sum_all()?.backward()?;
    let found = gradients.get(text.as_tensor()).unwrap();
    // Σ_b Σ_m T_mn f_m, of which the part along t_n is lost in the scaling to unit length.
    let local = ops::unit_length(&images.local_features()?.i((.., 1..))?, "place")?;
    let m = local.dim(1)?;
    let plan = matched.transport.plan.reshape((2, 2, m, 3))?;
    let local = local
        .unsqueeze(1)?
        .broadcast_as((2, 2, m, 32))?
        .contiguous()?;
    let sums = plan.transpose(2, 3)?.contiguous()?.matmul(&local)?.sum(0)?;
    let sums = (sums.transpose(0, 1)? * clip.scale())?;
    let along = (&sums * &unit)?.sum_keepdim(2)?;
    let expected = (&sums - unit.broadcast_mul(&along)?)?;
    assert!(difference(found, &expected)? < 1e-4);
    Ok(())
}

#[test]
fn with_the_plans_own_gradient_the_whole_is_a_slope() -> Result<()> {
    let (clip, names) = (clip()?, flowers()?);
    let config = PlotConfig {
        transport: Sinkhorn {
            max_iter: 10_000,
            threshold: 1e-10,
            stop: StopRule::Marginals,
            domain: Domain::Log,
            gradients: PlanGradients::Implicit,
            ..Sinkhorn::default()
        },
        add_global: true,
        ..config(3)
    };
    let mut method = plot(&config, &clip)?;
    let gradient = local_step(&mut method, &clip, &names)?.1;
    let gradient = gradient.get("ctx").unwrap();
    let size = f64::from(gradient.sqr()?.sum_all()?.sqrt()?.to_scalar::<f32>()?);
    let start = method.tensors()?.remove(0).1;
    let mut at = |h: f64| -> Result<f64> {
        let moved = (&start + (gradient * (h / size))?)?;
        method.params().load(&with(&method, "ctx", moved)?)?;
        let loss = local_step(&mut method, &clip, &names)?.0.total;
        Ok(f64::from(loss.to_scalar::<f32>()?))
    };
    let slope = (at(0.02)? - at(-0.02)?) / 0.04;
    assert!((slope - size).abs() < 0.02 * size, "{slope} {size}");
    Ok(())
}

#[test]
fn images_that_stop_for_themselves_do_not_see_their_batch() -> Result<()> {
    let (clip, images) = (clip()?, places(&clip()?, 4)?);
    let mut config = config(3);
    config.transport.stop = StopRule::PerProblem;
    let method = plot(&config, &clip)?;
    let together = logits_of(&method, &clip, &images)?;
    for i in 0..4 {
        let one = images.local_features()?.i(i..=i)?.contiguous()?;
        let alone = logits_of(&method, &clip, &ImageBatch::of_local_features(one)?)?;
        assert!(difference(&alone, &together.i(i..=i)?)? < 1e-5);
    }
    Ok(())
}

#[test]
fn checkpoints_of_the_authors_code_are_read() -> Result<()> {
    let (clip, images) = (clip()?, places(&clip()?, 4)?);
    let method = plot(&config(3), &clip)?;
    let state = TorchState {
        tensors: method.tensors()?.into_iter().collect(),
        epoch: None,
    };
    let imported = plot::ENTRY.import.unwrap()(&state, &json!({}), &clip, &flowers()?)?;
    assert_eq!(imported.config["n_prompts"], 3);
    assert_eq!(imported.config["n_ctx"], 3);
    let found = imported
        .predictor
        .classifier(&clip, &flowers()?)?
        .logits(&images)?;
    assert_eq!(bits(&found)?, bits(&logits_of(&method, &clip, &images)?)?);
    let settings = json!({"class_token_position": "front"});
    let found = refused(Learned::<Plot>::import(
        &state,
        &settings,
        &clip,
        &flowers()?,
    ));
    assert!(found.contains("class_token_position = front"), "{found}");
    Ok(())
}

#[test]
fn settings_are_laid_over_the_papers() -> Result<()> {
    let config = PlotConfig::read(&json!({"train": {"epochs": 2}, "transport": {"eps": 0.2}}))?;
    assert_eq!(
        (config.train.epochs, config.train.batch_size),
        (Some(2), 128)
    );
    assert_eq!(
        (config.transport.eps, config.transport.max_iter),
        (0.2, 100)
    );
    assert_eq!((config.n_prompts, config.n_ctx), (4, 16));
    Ok(())
}

#[test]
fn misuse_is_refused() -> Result<()> {
    let clip = clip()?;
    for (settings, expected) in [
        (
            json!({"n_prompts": 0}),
            "n_prompts = 0: at least one prompt",
        ),
        (json!({"n_ctx": 0}), "n_ctx = 0: at least one context token"),
        (json!({"transport": {"eps": 0.0}}), "eps = 0"),
        (json!({"transport": {"max_iter": 0}}), "max_iter = 0"),
        (
            json!({"class_token_position": "middle"}),
            "class_token_position = middle: end, with more than one prompt",
        ),
        (
            json!({"class_specific": true}),
            "unknown field `class_specific`",
        ),
        (
            json!({"ctx_init": "a photo of a"}),
            "unknown field `ctx_init`",
        ),
        (json!({"n_ctx": 75}), "the text tower takes 77"),
    ] {
        let found = refused(
            PlotConfig::read(&settings)
                .and_then(|config| Learned::<Plot>::new(&config, &clip, &flowers()?, 1)),
        );
        assert!(found.contains(expected), "{settings}: {found}");
    }
    let alone = PlotConfig {
        class_token_position: ClassTokenPosition::Middle,
        ..config(1)
    };
    assert!(Learned::<Plot>::new(&alone, &clip, &flowers()?, 1).is_ok());

    let method = plot(&config(2), &clip)?;
    let found = refused(logits_of(&method, &clip, &images(&clip, 2)?));
    assert!(found.contains("holds no local image features"), "{found}");
    let tokens = places(&clip, 2)?.local_features()?.clone();
    let global = ImageBatch::of_local_features(tokens.i((.., ..1))?.contiguous()?)?;
    let found = refused(logits_of(&method, &clip, &global));
    assert!(found.contains("no local features"), "{found}");
    for bad in [f64::NAN, f64::INFINITY, 0.0] {
        let broken = ImageBatch::of_local_features((&tokens * bad)?)?;
        let found = refused(logits_of(&method, &clip, &broken));
        assert!(found.contains("a local image feature"), "{found}");
    }
    let mut tiny = config(2);
    tiny.transport.eps = 1e-4;
    let found = refused(logits_of(&plot(&tiny, &clip)?, &clip, &places(&clip, 2)?));
    assert!(found.contains("domain = \"log\""), "{found}");
    Ok(())
}
