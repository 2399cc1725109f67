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
    let last = |marker: u8| bytes.windows(2).rposition(|pair| pair == [0xff, marker]);
    if last(0xd9) < last(0xda) {
        return Err("the JPEG is truncated: its end marker is missing".into());
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

/// The file's colours; numbers beyond them are shades of grey, as in Pillow.
fn colours(palette: &[u8]) -> Box<[[u8; 3]; 256]> {
    let mut colours = Box::new(std::array::from_fn(|i| [i as u8; 3]));
    colours
        .iter_mut()
        .zip(palette.as_chunks::<3>().0)
        .for_each(|(to, from)| *to = *from);
    colours
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn fixture(name: &str) -> Vec<u8> {
        let folder = concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/../../fixtures/parity/clip-cases/preprocess"
        );
        std::fs::read(Path::new(folder).join(name)).unwrap()
    }

    fn reason(bytes: &[u8]) -> String {
        decode(bytes, Path::new("a.jpg")).unwrap_err().to_string()
    }

    #[test]
    fn modes_are_those_of_the_file() {
        for (name, mode) in [
            ("bilevel_45x33.png", Mode::Bilevel),
            ("gray_50x41.png", Mode::L),
            ("gray_alpha_52x36.png", Mode::La),
            ("gray16_60x40.png", Mode::I16),
            ("rgba_44x50.png", Mode::Rgba),
            ("gradient_64x48.png", Mode::Rgb),
            ("gray_40x56.jpg", Mode::L),
            ("cmyk_50x60.jpg", Mode::Cmyk),
            ("progressive_48x48.jpg", Mode::Rgb),
        ] {
            let pixels = decode(&fixture(name), Path::new(name)).unwrap();
            assert_eq!(*pixels.mode(), mode, "{name}");
            assert!(
                name.contains(&format!("{}x{}", pixels.width(), pixels.height())),
                "{name}"
            );
        }
    }

    #[test]
    fn jpegs_decode_to_within_a_few_steps_of_libjpeg() {
        // Another inverse transform and other rounding in the colour conversion; the widest case has edges of colour.
        for (name, most) in [
            ("photo_q90_97x65.jpg", 3),
            ("photo_q60_420_64x80.jpg", 3),
            ("progressive_48x48.jpg", 3),
            ("gray_40x56.jpg", 3),
            ("exif_rot6_70x46.jpg", 10),
            ("cmyk_50x60.jpg", 3),
        ] {
            let ours = decode(&fixture(name), Path::new(name)).unwrap();
            let theirs = decode(&fixture(&format!("{name}.decoded.png")), Path::new(name)).unwrap();
            let (ours, theirs) = (ours.to_rgb(), theirs.to_rgb());
            let largest = ours
                .iter()
                .zip(theirs.iter())
                .map(|(a, b)| a.abs_diff(*b))
                .max()
                .unwrap();
            assert!(largest <= most, "{name}: {largest}");
        }
    }

    #[test]
    fn what_is_not_an_image_says_what_it_is() {
        assert_eq!(reason(b""), "a.jpg: the file is empty");
        assert!(reason(b"GIF89a...").contains("a GIF file; JPEG and PNG are read"));
        assert!(reason(b"<html>").contains("a web page"));
        assert!(reason(b"RIFF....WEBPVP8 ").contains("WebP"));
        assert!(reason(&[0; 100]).contains("not an image file"));
    }

    #[test]
    fn a_truncated_file_is_refused() {
        for name in [
            "photo_q90_97x65.jpg",
            "progressive_48x48.jpg",
            "gray_50x41.png",
            "palette_64x48.png",
        ] {
            let whole = fixture(name);
            for cut in [10, whole.len() / 3, whole.len() / 2, whole.len() * 9 / 10] {
                let outcome = decode(&whole[..cut], Path::new(name));
                assert!(outcome.is_err(), "{name} cut at {cut}");
            }
        }
    }

    #[test]
    fn a_decompression_bomb_is_refused_by_its_header() {
        let mut bytes = fixture("gray_50x41.png");
        bytes[16..24].copy_from_slice(&[0, 1, 0, 0, 0, 1, 0, 0]);
        // The header's checksum, so that the size itself is what is looked at.
        let crc = crc32(&bytes[12..29]);
        bytes[29..33].copy_from_slice(&crc.to_be_bytes());
        assert!(
            reason(&bytes).contains("65536 x 65536 pixels are more than"),
            "{}",
            reason(&bytes)
        );
    }

    fn crc32(bytes: &[u8]) -> u32 {
        !bytes.iter().fold(!0u32, |crc, byte| {
            (0..8).fold(crc ^ u32::from(*byte), |crc, _| {
                if crc & 1 == 1 {
                    crc >> 1 ^ 0xedb8_8320
                } else {
                    crc >> 1
                }
            })
        })
    }

    const FILES: [&str; 8] = [
        "photo_q60_420_64x80.jpg",
        "progressive_48x48.jpg",
        "cmyk_50x60.jpg",
        "gray_40x56.jpg",
        "bilevel_45x33.png",
        "palette_transparent_40x40.png",
        "rgba_44x50.png",
        "gray16_60x40.png",
    ];

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(256))]

        #[test]
        fn random_bytes_never_panic(start in prop::sample::select(vec![&[0xffu8, 0xd8, 0xff][..], b"\x89PNG\r\n\x1a\n", b""]), bytes in prop::collection::vec(any::<u8>(), 0..400)) {
            let _ = decode(&[start, &bytes].concat(), Path::new("a"));
        }

        #[test]
        fn mutated_files_never_panic(file in 0..FILES.len(), changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..12), cut in any::<prop::sample::Index>(), cuts in any::<bool>()) {
            let mut bytes = fixture(FILES[file]);
            for (at, value) in changes {
                let at = at.index(bytes.len());
                bytes[at] = value;
            }
            if cuts {
                bytes.truncate(cut.index(bytes.len()));
            }
            if let Ok(pixels) = decode(&bytes, Path::new("a")) {
                prop_assert_eq!(pixels.to_rgb().len(), 3 * pixels.width() * pixels.height());
            }
        }
    }
}
