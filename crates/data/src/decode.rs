//! Image files to pixels, in the modes in which Pillow opens them.

use std::io::Cursor;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use cliptune_core::preprocess::{Mode, Pixels};
use png::{BitDepth, ColorType};
use zune_jpeg::JpegDecoder;
use zune_jpeg::zune_core::bytestream::ZCursor;
use zune_jpeg::zune_core::colorspace::ColorSpace;
use zune_jpeg::zune_core::options::DecoderOptions;

use crate::{Error, Result};

/// Most pixels of an image: what Pillow refuses as a decompression bomb.
const MAX_PIXELS: u64 = 178_956_970;

/// Decodes a JPEG or PNG, told apart by content. EXIF orientation is ignored, as the reference does.
///
/// Modes are Pillow's: palettes, black and white, grey with alpha, 16-bit grey and CMYK stay what they are, since the reference
/// resizes in them.
///
/// # Errors
/// [`Error::Image`] naming the file and what it is instead: empty, truncated, another format, too large.
pub fn decode(bytes: &[u8], name: &Path) -> Result<Pixels> {
    let decoder = match bytes {
        [] => return Err(Error::image(name, "the file is empty")),
        [0xff, 0xd8, 0xff, ..] => jpeg,
        [0x89, b'P', b'N', b'G', ..] => png,
        _ => {
            let reason = format!("{}; JPEG and PNG are read", describe(bytes));
            return Err(Error::image(name, reason));
        }
    };
    // The decoders are other people's code on strangers' bytes: a bug there must not end the program.
    let decoded = catch_unwind(AssertUnwindSafe(|| decoder(bytes)));
    decoded
        .unwrap_or_else(|_| Err("the decoder gave up on it".to_owned()))
        .map_err(|reason| Error::image(name, reason))
}

/// What a file is that cannot be read.
fn describe(bytes: &[u8]) -> &'static str {
    match bytes {
        [b'G', b'I', b'F', b'8', ..] => "a GIF file",
        [b'B', b'M', ..] => "a BMP file",
        [
            b'R',
            b'I',
            b'F',
            b'F',
            _,
            _,
            _,
            _,
            b'W',
            b'E',
            b'B',
            b'P',
            ..,
        ] => "a WebP file",
        [b'I', b'I', 42, 0, ..] | [b'M', b'M', 0, 42, ..] => "a TIFF file",
        [_, _, _, _, b'f', b't', b'y', b'p', ..] => "an AVIF, HEIC or video file",
        [b'<', ..] => "a text file, perhaps a web page saved under the image's name",
        _ => "not an image file that is known here",
    }
}

fn check_size(width: u64, height: u64) -> Result<(), String> {
    match width.saturating_mul(height) {
        0 => Err(format!("the image is {width} x {height} pixels")),
        n if n > MAX_PIXELS => Err(format!(
            "{width} x {height} pixels are more than {MAX_PIXELS}"
        )),
        _ => Ok(()),
    }
}

fn jpeg(bytes: &[u8]) -> Result<Pixels, String> {
    let options = DecoderOptions::default()
        .set_strict_mode(false)
        .set_max_width(1 << 16)
        .set_max_height(1 << 16);
    let wrong = |e: &dyn std::fmt::Display| format!("not a readable JPEG: {e}");
    let mut decoder = JpegDecoder::new_with_options(ZCursor::new(bytes), options);
    decoder.decode_headers().map_err(|e| wrong(&e))?;
    let (width, height) = decoder.dimensions().ok_or_else(|| wrong(&"no size"))?;
    check_size(width as u64, height as u64)?;
    // The decoder fills what is missing with grey; the reference refuses a file that stops before its end marker.
    if !reaches_end_marker(bytes) {
        return Err("the JPEG is truncated: its end marker is missing".into());
    }
    // A block of 64 pixels takes at least a bit, so this cannot be whole either, and would take much memory.
    if width as u64 * height as u64 > 64 * 8 * bytes.len() as u64 {
        return Err(format!(
            "the JPEG is truncated: {} bytes cannot hold {width} x {height} pixels",
            bytes.len()
        ));
    }
    let input = decoder
        .input_colorspace()
        .ok_or_else(|| wrong(&"no colour space"))?;
    let (mode, output) = match input {
        ColorSpace::Luma => (Mode::L, ColorSpace::Luma),
        ColorSpace::CMYK | ColorSpace::YCCK => (Mode::Cmyk, input),
        _ => (Mode::Rgb, ColorSpace::RGB),
    };
    decoder.set_options(options.jpeg_set_out_colorspace(output));
    let mut data = decoder.decode().map_err(|e| wrong(&e))?;
    match input {
        // Adobe writes inks inverted, and the reference assumes Adobe.
        ColorSpace::CMYK => data.iter_mut().for_each(|v| *v = 255 - *v),
        ColorSpace::YCCK => data
            .as_chunks_mut::<4>()
            .0
            .iter_mut()
            .for_each(ycck_to_cmyk),
        _ => {}
    }
    Pixels::new(width, height, mode, data).map_err(|e| e.to_string())
}

/// Whether the image's own end marker is there; those of thumbnails lie inside segments, those of appended files behind.
fn reaches_end_marker(jpeg: &[u8]) -> bool {
    let mut rest = jpeg;
    while let Some(at) = rest.iter().position(|&byte| byte == 0xff) {
        rest = match rest[at + 1..] {
            [0xd9, ..] => return true,
            // A byte of the image, or a marker that stands alone.
            [0x00 | 0x01 | 0xd0..=0xd8, ref after @ ..] => after,
            [0xff, ..] => &rest[at + 1..],
            [_, high, low, ..] => {
                let length = usize::from(u16::from_be_bytes([high, low]));
                rest.get(at + 2 + length..).unwrap_or_default()
            }
            _ => return false,
        };
    }
    false
}

/// `YCCK` to inks: the colour behind YCC is the complement of the inverted inks.
fn ycck_to_cmyk(pixel: &mut [u8; 4]) {
    let [y, cb, cr, k] = pixel.map(f32::from);
    let (cb, cr) = (cb - 128.0, cr - 128.0);
    let rgb = [
        y + 1.402 * cr,
        y - 0.344_136 * cb - 0.714_136 * cr,
        y + 1.772 * cb,
    ];
    let [c, m, y] = rgb.map(|v| v.round().clamp(0.0, 255.0) as u8);
    *pixel = [c, m, y, 255 - k as u8];
}

fn png(bytes: &[u8]) -> Result<Pixels, String> {
    let wrong = |e: png::DecodingError| match e {
        png::DecodingError::IoError(e) if e.kind() == std::io::ErrorKind::UnexpectedEof => {
            "the PNG is truncated".to_owned()
        }
        e => format!("not a readable PNG: {e}"),
    };
    // Eight bytes a pixel is the widest mode.
    let limits = png::Limits {
        bytes: MAX_PIXELS as usize * 8,
    };
    let mut decoder = png::Decoder::new_with_limits(Cursor::new(bytes), limits);
    decoder.set_transformations(png::Transformations::IDENTITY);
    decoder.ignore_checksums(false);
    let mut reader = decoder.read_info().map_err(wrong)?;
    let (width, height) = reader.info().size();
    check_size(width.into(), height.into())?;
    let size = reader.output_buffer_size().ok_or("the PNG is too large")?;
    // Compressed data grow at most 1032 times.
    if size as u64 > 1032 * bytes.len() as u64 {
        return Err(format!(
            "the PNG is truncated: {} bytes cannot hold {width} x {height} pixels",
            bytes.len()
        ));
    }
    let mut raw = vec![0; size];
    let frame = reader.next_frame(&mut raw).map_err(wrong)?;
    let (width, height) = (width as usize, height as usize);
    if (frame.width as usize, frame.height as usize) != (width, height) {
        return Err("the PNG's first frame is smaller than the image".into());
    }
    let rows = raw.chunks_exact(frame.line_size.max(1)).take(height);
    let samples = |per_row: usize| -> Vec<u8> {
        rows.clone()
            .flat_map(|row| &row[..per_row])
            .copied()
            .collect()
    };
    let high_bytes = |channels: usize| -> Vec<u8> {
        samples(2 * channels * width)
            .into_iter()
            .step_by(2)
            .collect()
    };
    let depth = frame.bit_depth;
    let packed = || -> Vec<u8> {
        rows.clone()
            .flat_map(|row| unpack(row, depth as usize, width))
            .collect()
    };
    let (mode, data) = match (frame.color_type, depth) {
        (ColorType::Grayscale, BitDepth::One) => {
            (Mode::Bilevel, packed().iter().map(|v| v * 255).collect())
        }
        (ColorType::Grayscale, BitDepth::Two) => {
            (Mode::L, packed().iter().map(|v| v * 85).collect())
        }
        (ColorType::Grayscale, BitDepth::Four) => {
            (Mode::L, packed().iter().map(|v| v * 17).collect())
        }
        (ColorType::Grayscale, BitDepth::Eight) => (Mode::L, samples(width)),
        (ColorType::Grayscale, BitDepth::Sixteen) => {
            let mut data = samples(2 * width);
            data.as_chunks_mut::<2>()
                .0
                .iter_mut()
                .for_each(|pair| pair.swap(0, 1));
            (Mode::I16, data)
        }
        (ColorType::GrayscaleAlpha, BitDepth::Sixteen) => {
            let data = high_bytes(2);
            (
                Mode::Rgba,
                data.as_chunks::<2>()
                    .0
                    .iter()
                    .flat_map(|&[v, a]| [v, v, v, a])
                    .collect(),
            )
        }
        (ColorType::GrayscaleAlpha, _) => (Mode::La, samples(2 * width)),
        (ColorType::Rgb, BitDepth::Sixteen) => (Mode::Rgb, high_bytes(3)),
        (ColorType::Rgb, _) => (Mode::Rgb, samples(3 * width)),
        (ColorType::Rgba, BitDepth::Sixteen) => (Mode::Rgba, high_bytes(4)),
        (ColorType::Rgba, _) => (Mode::Rgba, samples(4 * width)),
        (ColorType::Indexed, _) => {
            let palette = reader
                .info()
                .palette
                .as_deref()
                .ok_or("the PNG has no palette")?;
            (Mode::Palette(colours(palette)), packed())
        }
    };
    Pixels::new(width, height, mode, data).map_err(|e| e.to_string())
}

/// Samples of `depth` bits, the highest bits first.
fn unpack(row: &[u8], depth: usize, width: usize) -> impl Iterator<Item = u8> + '_ {
    let (per_byte, mask) = (8 / depth, 0xff >> (8 - depth));
    row.iter()
        .flat_map(move |byte| (1..=per_byte).map(move |i| (byte >> (8 - depth * i)) & mask))
        .take(width)
}

/// The file's colours; numbers beyond them are black, as in Pillow.
fn colours(palette: &[u8]) -> Box<[[u8; 3]; 256]> {
    let mut colours = Box::new([[0; 3]; 256]);
    colours
        .iter_mut()
        .zip(palette.as_chunks::<3>().0)
        .for_each(|(to, from)| *to = *from);
    colours
}

#[cfg(test)]
mod tests;
