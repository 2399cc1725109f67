//! Cases of CLIP itself: features and hidden states of both towers, and one model in every layout.

use std::path::Path;

use anyhow::{Result, bail};
use candle_core::{DType, IndexOp, Tensor};
use cliptune_core::prompt::Prompts;
use cliptune_core::tokenizer::Tokenizer;
use cliptune_core::{Clip, VisionArch, ops};

use super::case::{Case, Models};
use super::check::{Check, START};
use super::text_pt::padded;

pub(crate) fn run(case: &Case, models: &mut Models, check: &mut Check) -> Result<()> {
    if case.json.texts.is_empty() {
        formats(case, models, check)
    } else {
        forward(case, models, check)
    }
}

/// Token ids of each text up to its end token, the largest id.
fn prompts(tokens: &Tensor) -> Result<Prompts> {
    let rows = tokens.to_dtype(DType::U32)?.to_vec2::<u32>()?;
    Ok(Prompts::of_tokens(rows.into_iter().map(|row| {
        let end = (0..row.len()).fold(0, |best, i| if row[i] > row[best] { i } else { best });
        row[..=end].to_vec()
    })))
}

/// Every layout of a model gives the same features.
fn formats(case: &Case, models: &mut Models, check: &mut Check) -> Result<()> {
    let folder = models.folder(case)?;
    let layouts = ["openai.pt", "state_dict.pth", "hf", "open_clip"].map(|name| folder.join(name));
    let layouts: Vec<_> = layouts.iter().filter(|path| path.exists()).collect();
    if layouts.len() < 2 {
        bail!("{}: fewer than two layouts", folder.display());
    }
    for path in layouts {
        features(case, path, check)?;
    }
    Ok(())
}

fn features(case: &Case, path: &Path, check: &mut Check) -> Result<()> {
    let clip = Clip::load(path)?;
    let image = clip.image().encode(case.tensor("images")?)?;
    let text = clip
        .text()
        .encode(&prompts(case.tensor("input.tokens")?)?)?;
    check.tensor(case, "expect.image_features", &image, START)?;
    check.tensor(case, "expect.text_features", &text, START)?;
    check.tensor(
        case,
        "expect.logits_per_image",
        &clip.cosine_logits(&image, &text)?,
        START,
    )
}

fn forward(case: &Case, models: &mut Models, check: &mut Check) -> Result<()> {
    let clip = models.of(case)?;
    let length = clip.text().context_length();
    let tokens: Vec<Vec<u32>> = case
        .json
        .texts
        .iter()
        .map(|text| Tokenizer::get().tokenize_truncated(text, length))
        .collect();
    check.tensor(case, "input.tokens", &padded(&tokens, length)?, 0.0)?;

    clip.text().encode_probed(
        &Prompts::of_tokens(tokens[..1].to_vec()),
        &mut |name, hidden| {
            let (name, rows) = (format!("expect.text.{name}"), tokens[0].len());
            check
                .leading_rows(case, &name, &hidden.i(0)?, rows)
                .map_err(into_core)
        },
    )?;

    let pixels = case.tensor("images")?;
    clip.image()
        .encode_probed(&pixels.i(..1)?, &mut |name, hidden| {
            let mut hidden = hidden.i(0)?;
            if name == "conv1" {
                // The case holds the convolution's map, we the patches as rows.
                let (patches, width) = hidden.dims2()?;
                let side = (patches as f64).sqrt() as usize;
                hidden = hidden.t()?.reshape((width, side, side))?;
            }
            check
                .tensor(case, &format!("expect.image.{name}"), &hidden, START)
                .map_err(into_core)
        })?;

    let text = clip.text().encode(&Prompts::of_tokens(tokens))?;
    let image = clip.image().encode(pixels)?;
    let (unit_image, unit_text) = (
        ops::unit_length(&image, "image")?,
        ops::unit_length(&text, "text")?,
    );
    let logits = clip.cosine_logits(&image, &text)?;
    check.tensor(case, "expect.image_features", &image, START)?;
    check.tensor(case, "expect.text_features", &text, START)?;
    check.tensor(case, "expect.image_features_norm", &unit_image, START)?;
    check.tensor(case, "expect.text_features_norm", &unit_text, START)?;
    check.tensor(case, "expect.logits", &logits, START)?;
    check.tensor(case, "expect.logits_per_image", &logits, START)?;
    check.tensor(case, "expect.logits_per_text", &logits.t()?, START)?;
    check.tensor(
        case,
        "expect.dense_tokens",
        &clip.image().encode_dense(pixels)?,
        START,
    )?;

    if let VisionArch::ResNet { .. } = clip.arch().vision {
        pool(case, &clip, "", pixels, check)?;
        if let Some(large) = case.get("input.images_large") {
            pool(case, &clip, ".large", large, check)?;
        }
    }
    Ok(())
}

/// The attention pool's global and local features, with and without positions.
fn pool(case: &Case, clip: &Clip, suffix: &str, pixels: &Tensor, check: &mut Check) -> Result<()> {
    let stage = clip.image().last_stage(pixels)?;
    let (_, _, h, w) = stage.dims4()?;
    check.tensor(case, &format!("expect.layer4{suffix}"), &stage, START)?;
    for (name, with_positions) in [("pos0", false), ("pos1", true)] {
        let all = clip
            .image()
            .encode_dense_at_any_size(pixels, with_positions)?;
        let (batch, _, width) = all.dims3()?;
        let local = all
            .i((.., 1..))?
            .transpose(1, 2)?
            .reshape((batch, width, h, w))?;
        let prefix = format!("expect.attnpool{suffix}.{name}");
        check.tensor(case, &format!("{prefix}.global"), &all.i((.., 0))?, START)?;
        check.tensor(case, &format!("{prefix}.local"), &local, START)?;
    }
    Ok(())
}

fn into_core(e: anyhow::Error) -> cliptune_core::Error {
    cliptune_core::Error::Data(format!("{e:#}"))
}
