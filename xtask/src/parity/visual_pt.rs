//! Cases of the visual-pt family.

use anyhow::{Result, bail, ensure};
use candle_core::{Device, Tensor};
use cliptune_core::method::{Classifier, Predictor};
use cliptune_core::prompt::{ClassTokens, Prompts};
use cliptune_core::task::ImageBatch;
use cliptune_core::train::{Batch, Loss, Objective, Step};
use cliptune_core::{Classes, Clip, ImageNeeds, Learned};
use cliptune_visual_pt::vp::{self, Place, Prompter};
use cliptune_visual_pt::{Vp, VpConfig};
use serde::Deserialize;

use super::case::{Case, Models};
use super::check::{AFTER, Check, START};
use super::objective::{self, FIRST};
use super::text_pt::padded;

#[derive(Deserialize)]
struct VpCase {
    prompter: Prompter,
    prompt_size: usize,
    image_size: usize,
    template: String,
}

/// The method with the case's places of the patch in the place of those that it draws.
#[derive(Debug)]
struct Placed<'a> {
    vp: &'a Vp,
    /// One for each step.
    places: &'a [Place],
}

impl Objective for Placed<'_> {
    fn needs(&self) -> ImageNeeds {
        self.vp.needs()
    }

    fn classifier<'a>(
        &'a self,
        clip: &'a Clip,
        classes: &Classes,
    ) -> cliptune_core::Result<Box<dyn Classifier + 'a>> {
        self.vp.classifier(clip, classes)
    }

    fn loss(&self, clip: &Clip, batch: &Batch<'_>, step: Step) -> cliptune_core::Result<Loss> {
        let place = &self.places[step.index..=step.index];
        self.vp.loss_at(clip, batch, place, step)
    }
}

pub(crate) fn vp(case: &Case, models: &mut Models, check: &mut Check) -> Result<()> {
    let clip = models.of(case)?;
    let json: VpCase = case.config()?;
    let side = clip.arch().image_resolution;
    if json.image_size != side {
        bail!(
            "config.image_size {}, the model takes {side}",
            json.image_size
        );
    }
    let config = VpConfig {
        prompter: json.prompter,
        prompt_size: Some(json.prompt_size),
        template: Some(json.template.clone()),
        ..VpConfig::default()
    };
    let classes = case.classes()?;
    let vp = Learned::<Vp>::with_tensors(&config, &clip, &classes, 0, &case.initial()?)?;
    let steps = case.json.lr_per_step.len();
    let (places, last) = match json.prompter {
        Prompter::RandomPatch => (
            places(case, "noise.positions")?,
            places(case, "noise.position_after")?[0],
        ),
        Prompter::Padding | Prompter::FixedPatch => (vec![(0, 0); steps], (0, 0)),
    };
    ensure!(
        places.len() >= steps,
        "{} places for {steps} steps",
        places.len()
    );

    let tokens = ClassTokens::new(clip.text(), &classes)?;
    let sentences = vp::spoken(&clip, tokens.names())?.fill(&json.template)?;
    let ids = padded(&sentences, clip.text().context_length())?;
    check.tensor(case, "input.tokenized_prompts", &ids, 0.0)?;
    let text = clip.text().encode(&Prompts::of_tokens(sentences))?;
    check.tensor(case, "expect.text_features", &text, START)?;

    let pixels = case.tensor("images")?;
    let delta = vp.perturbations(&places[..1])?.detach();
    let prompted = pixels.broadcast_add(&delta)?;
    check.tensor(case, "expect.prompted_images", &prompted, START)?;
    let features = vp.image_features(&clip, pixels, &delta)?;
    check.tensor(case, "expect.image_features", &features, START)?;
    let plain = clip.cosine_logits(&clip.image().encode(pixels)?, &text)?;
    check.tensor(case, "expect.logits_unprompted", &plain, START)?;

    let images = ImageBatch::of_pixels(pixels.clone());
    let labels = case.ids("labels")?;
    let batch = Batch {
        images: &images,
        labels: &labels,
        classes: &tokens,
    };
    // Before the first step the scale is not clamped yet, as in the first loss.
    let logits = vp.loss_at(&clip, &batch, &places[..1], FIRST)?.logits;
    if let Some(logits) = logits {
        check.tensor(case, "expect.logits", &logits, START)?;
    }
    let placed = Placed {
        vp: &vp,
        places: &places,
    };
    let mut placed = Learned::of(placed, vp.params().clone());
    objective::train(case, &clip, &mut placed, &batch, check)?;
    let scale = Tensor::new(vp::logit_scale(&clip, steps) as f32, &Device::Cpu)?;
    check.tensor(case, "expect.logit_scale_after", &scale, AFTER)?;
    let after = Step {
        index: steps,
        ..FIRST
    };
    let logits = vp.loss_at(&clip, &batch, &[last], after)?.logits;
    if let Some(logits) = logits {
        check.tensor(case, "expect.logits_after", &logits, AFTER)?;
    }
    // What predicts has the same numbers where nothing is drawn.
    if json.prompter != Prompter::RandomPatch {
        let logits = vp.classifier(&clip, &classes)?.logits(&images)?;
        check.tensor(case, "expect.logits_after", &logits, AFTER)?;
    }
    Ok(())
}

/// Rows and columns.
fn places(case: &Case, name: &str) -> Result<Vec<Place>> {
    let numbers = case.ids(name)?;
    let (pairs, _) = numbers.as_chunks::<2>();
    ensure!(!pairs.is_empty(), "{name}: no place");
    Ok(pairs
        .iter()
        .map(|&[row, column]| (row as usize, column as usize))
        .collect())
}
