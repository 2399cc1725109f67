//! Pixels to tensors as the references do it: OpenAI's fixed view and the random crops that few-shot methods train on.
//!
//! Both are exact: 8-bit pixels before normalisation equal those of Pillow 13 and torchvision. Decoding of files is not part of this
//! crate.

mod pixels;
mod resample;

pub use pixels::{Mode, Pixels};

use crate::{Error, Preprocess, Result};
use resample::{Axis, Source};

/// Largest side of a tower's input; more is a damaged configuration.
const LARGEST_RESOLUTION: usize = 1 << 14;
/// Share of the picture's area that a random crop takes.
const CROP_AREA: [f64; 2] = [0.08, 1.0];
/// Width over height of a random crop.
const CROP_RATIO: [f64; 2] = [3.0 / 4.0, 4.0 / 3.0];
/// How often a random crop is drawn anew that does not fit into the picture.
const CROP_TRIES: usize = 10;

/// The view of testing, `(3, side, side)`: shorter side resized to the resolution, square cut from the centre, both in the mode of
/// the file; then red, green and blue, scaled to `[0, 1]` and normalised.
///
/// # Errors
/// [`Error::Config`] if the resolution is zero or absurd.
pub fn fixed_view(image: &Pixels, preprocess: &Preprocess) -> Result<Vec<f32>> {
    let side = checked_side(preprocess)?;
    let (width, height) = (image.width(), image.height());
    let short = width.min(height);
    // The longer side is truncated. The product may be huge, but only the centre is ever computed.
    let resized = |length: usize| {
        if length == short {
            side
        } else {
            (side as f64 * length as f64 / short as f64) as usize
        }
    };
    let axis = |length: usize| {
        let output = resized(length).max(side);
        let start = ((output - side) as f64 / 2.0).round_ties_even() as usize;
        Axis {
            input: length,
            output,
            kept: start..start + side,
        }
    };
    let rgb = if short == side {
        let crop = crop(image, &axis(width), &axis(height));
        pixels::to_rgb(&crop, image.mode())
    } else {
        let view = resize(image, &axis(width), &axis(height));
        pixels::to_rgb(&view, image.mode())
    };
    normalise(&rgb, preprocess)
}

/// A view of training, `(3, side, side)`: converted to red, green and blue, a random rectangle resized to the resolution, flipped
/// half the time, normalised. `uniform` gives numbers in `[0, 1)`, all that is random: area, ratio, top and left of the crop, flip.
///
/// # Errors
/// As [`fixed_view`].
pub fn random_view(
    image: &Pixels,
    preprocess: &Preprocess,
    uniform: &mut impl FnMut() -> f64,
) -> Result<Vec<f32>> {
    let side = checked_side(preprocess)?;
    let crop = random_crop(image.width(), image.height(), uniform);
    let rgb = image.to_rgb();
    let stride = image.width() * 3;
    let source = Source {
        data: &rgb[crop.top * stride..],
        stride,
        offset: crop.left * 3,
    };
    let axis = |input| Axis {
        input,
        output: side,
        kept: 0..side,
    };
    let mut view = resample::resize::<u8, 3>(source, &axis(crop.width), &axis(crop.height));
    if uniform() < 0.5 {
        for row in view.chunks_exact_mut(side * 3) {
            row.as_chunks_mut::<3>().0.reverse();
        }
    }
    normalise(&view, preprocess)
}

/// Bytes `(pixels, 3)` scaled to `[0, 1]` and normalised, `(3, pixels)`.
///
/// # Errors
/// [`Error::Shape`] if `rgb` is not a multiple of three long.
pub fn normalise(rgb: &[u8], preprocess: &Preprocess) -> Result<Vec<f32>> {
    let (pixels, []) = rgb.as_chunks::<3>() else {
        return Err(Error::Shape {
            what: "red, green and blue".into(),
            found: vec![rgb.len()],
            expected: vec![rgb.len() / 3, 3],
        });
    };
    let mut out = Vec::with_capacity(rgb.len());
    for (channel, (mean, std)) in preprocess.mean.iter().zip(preprocess.std).enumerate() {
        let of_byte: [f32; 256] = std::array::from_fn(|v| (v as f32 / 255.0 - mean) / std);
        out.extend(
            pixels
                .iter()
                .map(|pixel| of_byte[usize::from(pixel[channel])]),
        );
    }
    Ok(out)
}

fn checked_side(preprocess: &Preprocess) -> Result<usize> {
    match preprocess.resolution {
        side @ 1..=LARGEST_RESOLUTION => Ok(side),
        other => Err(Error::config(
            "resolution",
            other,
            format!("expected 1 to {LARGEST_RESOLUTION} pixels"),
        )),
    }
}

/// Resizes in the mode of the file; gives the kept pixels in the same mode.
fn resize(image: &Pixels, columns: &Axis, rows: &Axis) -> Vec<u8> {
    let data = image.data();
    let source = |data| Source::<u8> {
        data,
        stride: image.width() * image.mode().bytes_per_pixel(),
        offset: 0,
    };
    match image.mode() {
        Mode::Bilevel | Mode::Palette(_) => resample::nearest(source(data), columns, rows),
        Mode::I16 => {
            let samples: Vec<u16> = data
                .as_chunks::<2>()
                .0
                .iter()
                .map(|&bytes| u16::from_le_bytes(bytes))
                .collect();
            let source = Source {
                data: &samples[..],
                stride: image.width(),
                offset: 0,
            };
            resample::resize::<u16, 1>(source, columns, rows)
                .into_iter()
                .flat_map(u16::to_le_bytes)
                .collect()
        }
        Mode::L => resample::resize::<u8, 1>(source(data), columns, rows),
        Mode::Rgb => resample::resize::<u8, 3>(source(data), columns, rows),
        Mode::Cmyk => resample::resize::<u8, 4>(source(data), columns, rows),
        Mode::La => {
            let mut view =
                resample::resize::<u8, 2>(source(&pixels::premultiply::<2>(data)), columns, rows);
            pixels::unpremultiply::<2>(&mut view);
            view
        }
        Mode::Rgba => {
            let mut view =
                resample::resize::<u8, 4>(source(&pixels::premultiply::<4>(data)), columns, rows);
            pixels::unpremultiply::<4>(&mut view);
            view
        }
    }
}

/// The kept pixels of axes that do not resize.
fn crop(image: &Pixels, columns: &Axis, rows: &Axis) -> Vec<u8> {
    let bytes = image.mode().bytes_per_pixel();
    let lines = image
        .data()
        .chunks_exact(image.width() * bytes)
        .take(rows.kept.end)
        .skip(rows.kept.start);
    lines
        .flat_map(|line| &line[columns.kept.start * bytes..columns.kept.end * bytes])
        .copied()
        .collect()
}

/// A rectangle of a picture, in pixels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Crop {
    left: usize,
    top: usize,
    width: usize,
    height: usize,
}

/// torchvision's `RandomResizedCrop.get_params`.
fn random_crop(width: usize, height: usize, uniform: &mut impl FnMut() -> f64) -> Crop {
    let (w, h) = (width as f64, height as f64);
    let mut between = |from: f64, to: f64| from + (to - from) * uniform();
    let [narrowest, widest] = CROP_RATIO;
    for _ in 0..CROP_TRIES {
        let area = w * h * between(CROP_AREA[0], CROP_AREA[1]);
        let ratio = between(narrowest.ln(), widest.ln()).exp();
        let crop_w = (area * ratio).sqrt().round_ties_even();
        let crop_h = (area / ratio).sqrt().round_ties_even();
        if (1.0..=w).contains(&crop_w) && (1.0..=h).contains(&crop_h) {
            // One of the places where the crop fits.
            let mut place = |room: f64| (between(0.0, room + 1.0).floor().min(room)) as usize;
            let top = place(h - crop_h);
            let left = place(w - crop_w);
            return Crop {
                left,
                top,
                width: crop_w as usize,
                height: crop_h as usize,
            };
        }
    }
    // The centre, as much of it as the ratio allows.
    let (crop_w, crop_h) = if w / h < narrowest {
        (
            width,
            ((w / narrowest).round_ties_even() as usize).clamp(1, height),
        )
    } else if w / h > widest {
        (
            ((h * widest).round_ties_even() as usize).clamp(1, width),
            height,
        )
    } else {
        (width, height)
    };
    Crop {
        left: (width - crop_w) / 2,
        top: (height - crop_h) / 2,
        width: crop_w,
        height: crop_h,
    }
}

#[cfg(test)]
mod tests;
