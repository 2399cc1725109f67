//! Files to normalised views, against OpenAI's `_transform` on Pillow and torchvision.

#![allow(clippy::unwrap_used, reason = "helpers of tests")]

use std::path::{Path, PathBuf};

use cliptune_core::Preprocess;
use cliptune_core::preprocess::{Pixels, fixed_view};
use cliptune_data::decode::decode;
use safetensors::SafeTensors;
use serde::Deserialize;

#[derive(Deserialize)]
struct Cases {
    mean: [f32; 3],
    std: [f32; 3],
    images: Vec<Image>,
}

#[derive(Deserialize)]
struct Image {
    file: String,
    mode: String,
    size: [usize; 2],
    n_px: Vec<usize>,
    decoded: Option<String>,
}

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/parity/clip-cases/preprocess")
}

fn pixels(name: &str) -> Pixels {
    let path = folder().join(name);
    decode(&std::fs::read(&path).unwrap(), &path).unwrap()
}

/// Largest difference and share of equal values.
fn differences(ours: impl ExactSizeIterator<Item = i32>, theirs: &[i32]) -> (i32, f64) {
    assert_eq!(ours.len(), theirs.len());
    let all: Vec<i32> = ours.zip(theirs).map(|(a, b)| (a - b).abs()).collect();
    let equal = all.iter().filter(|d| **d == 0).count() as f64 / all.len() as f64;
    (all.into_iter().max().unwrap(), equal)
}

#[test]
fn every_view_equals_the_reference() {
    let cases: Cases =
        serde_json::from_slice(&std::fs::read(folder().join("case.json")).unwrap()).unwrap();
    let file = std::fs::read(folder().join("case.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&file).unwrap();
    let mut compared = 0;
    for image in &cases.images {
        for &side in &image.n_px {
            let name = format!("{}.{side}", image.file);
            let tensor = tensors.tensor(&name).unwrap();
            let expected: Vec<f32> = tensor
                .data()
                .as_chunks::<4>()
                .0
                .iter()
                .map(|&b| f32::from_le_bytes(b))
                .collect();
            let preprocess = Preprocess {
                resolution: side,
                mean: cases.mean,
                std: cases.std,
            };
            let bytes = |view: &[f32]| -> Vec<i32> {
                let channel = |i: usize| i / (side * side);
                let byte = |(i, v): (usize, &f32)| {
                    ((v * cases.std[channel(i)] + cases.mean[channel(i)]) * 255.0).round() as i32
                };
                view.iter().enumerate().map(byte).collect()
            };
            let view = |from: &str| fixed_view(&pixels(from), &preprocess).unwrap();
            let ours = view(image.decoded.as_deref().unwrap_or(&image.file));
            let (largest, equal) = differences(bytes(&ours).into_iter(), &bytes(&expected));
            if image.mode == "CMYK" {
                // The reference resizes the inks, the decoded file holds the colours.
                assert!(
                    largest <= 1 && equal > 0.5,
                    "{name}: up to {largest}, {equal:.4} equal"
                );
            } else {
                let off = ours
                    .iter()
                    .zip(&expected)
                    .map(|(a, b)| (a - b).abs())
                    .fold(0.0, f32::max);
                assert!(
                    largest == 0 && off < 1e-6,
                    "{name}: up to {largest} steps, {off} normalised"
                );
            }
            if image.decoded.is_some() {
                let (largest, equal) =
                    differences(bytes(&view(&image.file)).into_iter(), &bytes(&expected));
                println!(
                    "{name} from our decoder: up to {largest}, {:.1} % equal",
                    100.0 * equal
                );
                assert!(largest <= 10, "{name}: {largest}");
            }
            compared += 1;
        }
    }
    assert_eq!(compared, tensors.len());
}

#[test]
fn files_have_the_references_sizes_and_nearly_its_pixels() {
    let cases: Cases =
        serde_json::from_slice(&std::fs::read(folder().join("case.json")).unwrap()).unwrap();
    for image in &cases.images {
        let ours = pixels(&image.file);
        assert_eq!([ours.width(), ours.height()], image.size, "{}", image.file);
        let Some(decoded) = &image.decoded else {
            continue;
        };
        let ints =
            |pixels: &Pixels| -> Vec<i32> { pixels.to_rgb().iter().map(|&v| v.into()).collect() };
        let (largest, equal) = differences(ints(&ours).into_iter(), &ints(&pixels(decoded)));
        println!(
            "{} decoded: up to {largest}, {:.1} % equal",
            image.file,
            100.0 * equal
        );
        assert!(
            largest <= 10 && equal > 0.5,
            "{}: up to {largest}, {equal:.3} equal",
            image.file
        );
    }
}
