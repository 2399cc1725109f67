//! Decoding, resizing, cropping and normalising, against Pillow and torchvision.

use anyhow::{Context, Result};
use cliptune_core::Preprocess;
use cliptune_core::preprocess::fixed_view;
use cliptune_data::decode::decode;
use serde::Deserialize;

use super::case::{Case, Models};
use super::check::{Check, values};

#[derive(Deserialize)]
struct File {
    mean: [f32; 3],
    std: [f32; 3],
    images: Vec<Image>,
}

#[derive(Deserialize)]
struct Image {
    file: String,
    decoded: Option<String>,
    n_px: Vec<usize>,
}

pub(crate) fn run(case: &Case, _: &mut Models, check: &mut Check) -> Result<()> {
    let path = case.path.join("case.json");
    let file: File = serde_json::from_str(&std::fs::read_to_string(&path)?)
        .with_context(|| path.display().to_string())?;
    for image in &file.images {
        for &n_px in &image.n_px {
            let name = format!("{}.{n_px}", image.file);
            let expected = values(case.tensor(&name)?)?;
            let differences = |from: &str| -> Result<(f64, f64)> {
                let path = case.path.join(from);
                let bytes = std::fs::read(&path).with_context(|| path.display().to_string())?;
                let preprocess = Preprocess {
                    resolution: n_px,
                    mean: file.mean,
                    std: file.std,
                };
                let ours = fixed_view(&decode(&bytes, &path)?, &preprocess)?;
                anyhow::ensure!(
                    ours.len() == expected.len(),
                    "{name}: {} values",
                    ours.len()
                );
                // In steps of 1/255, before the normalisation.
                let steps = ours
                    .iter()
                    .zip(&expected)
                    .enumerate()
                    .map(|(i, (&ours, theirs))| {
                        let std = f64::from(file.std[i / (n_px * n_px)]);
                        ((f64::from(ours) - theirs) * std * 255.0).abs()
                    });
                let steps: Vec<f64> = steps.collect();
                let equal = steps.iter().filter(|d| **d < 0.01).count() as f64 / steps.len() as f64;
                Ok((steps.into_iter().fold(0.0, f64::max), equal))
            };
            let (largest, equal) = differences(image.decoded.as_deref().unwrap_or(&image.file))?;
            let fine = largest <= 1.01 && equal > 0.5;
            let failure = format!(
                "differs by up to {largest:.2}/255, equal on {:.1} %",
                100.0 * equal
            );
            check.record(&name, largest / 255.0, (!fine).then_some(failure));
            if image.decoded.is_some() {
                let (largest, equal) = differences(&image.file)?;
                let equal = 100.0 * equal;
                check.warn(format!("{name}, from our own JPEG decoder: up to {largest:.2}/255, equal on {equal:.1} %"));
            }
        }
    }
    Ok(())
}
