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
fn only_the_images_own_end_marker_counts() {
    let whole = fixture("photo_q90_97x65.jpg");
    let name = Path::new("a.jpg");
    let pixels = decode(&whole, name).unwrap();
    // Something appended that itself looks truncated, as in a motion photo.
    let appended = [&whole[..], b"\xff\xd8\xff\xda\0\x08"].concat();
    assert_eq!(decode(&appended, name).unwrap(), pixels);
    // A thumbnail in a segment, and then the end is missing.
    let thumbnail = b"\xff\xe1\0\x06\xff\xd8\xff\xd9";
    let cut = [&whole[..2], thumbnail, &whole[2..whole.len() - 2]].concat();
    assert!(reason(&cut).contains("truncated"));
    let with_thumbnail = [&whole[..2], thumbnail, &whole[2..]].concat();
    assert_eq!(decode(&with_thumbnail, name).unwrap(), pixels);
}

#[test]
fn a_small_file_cannot_claim_much_memory() {
    let mut jpeg = fixture("gray_40x56.jpg");
    let frame = jpeg
        .windows(2)
        .position(|pair| pair == [0xff, 0xc0])
        .unwrap();
    jpeg[frame + 5..frame + 9].copy_from_slice(&[0x20, 0, 0x20, 0]);
    assert!(
        reason(&jpeg).contains("cannot hold 8192 x 8192 pixels"),
        "{}",
        reason(&jpeg)
    );
    let mut png = fixture("gray_50x41.png");
    png[16..24].copy_from_slice(&[0, 0, 0x20, 0, 0, 0, 0x20, 0]);
    let crc = crc32(&png[12..29]);
    png[29..33].copy_from_slice(&crc.to_be_bytes());
    assert!(
        reason(&png).contains("cannot hold 8192 x 8192 pixels"),
        "{}",
        reason(&png)
    );
}

/// A PNG of one row.
fn png_file(color: ColorType, depth: BitDepth, width: u32, palette: &[u8], row: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut encoder = png::Encoder::new(&mut bytes, width, 1);
    encoder.set_color(color);
    encoder.set_depth(depth);
    if color == ColorType::Indexed {
        encoder.set_palette(palette.to_vec());
    }
    encoder
        .write_header()
        .unwrap()
        .write_image_data(row)
        .unwrap();
    bytes
}

#[test]
fn rare_pngs_become_what_pillow_makes_of_them() {
    use BitDepth::{Eight, Four, One, Sixteen, Two};
    use ColorType::{Grayscale, GrayscaleAlpha, Indexed, Rgb, Rgba};
    let colours = [10, 20, 30, 40, 50, 60];
    let two_colours = [[10, 20, 30], [40, 50, 60], [0; 3], [0; 3]].as_flattened();
    let rows: [(_, _, _, &[u8], &[u8]); 10] = [
        (Indexed, Eight, 4, &[0, 1, 2, 3], two_colours),
        (Indexed, Two, 4, &[0b0001_1011], two_colours),
        (Indexed, One, 2, &[0b0100_0000], &two_colours[..6]),
        (Grayscale, One, 2, &[0b0100_0000], &[0, 0, 0, 255, 255, 255]),
        (
            Grayscale,
            Two,
            2,
            &[0b0110_0000],
            &[85, 85, 85, 170, 170, 170],
        ),
        (Grayscale, Four, 2, &[0x5a], &[85, 85, 85, 170, 170, 170]),
        (
            Grayscale,
            Sixteen,
            2,
            &[0, 7, 1, 0],
            &[7, 7, 7, 255, 255, 255],
        ),
        (GrayscaleAlpha, Sixteen, 1, &[1, 200, 3, 4], &[1, 1, 1]),
        (Rgb, Sixteen, 1, &[100, 1, 102, 2, 104, 3], &[100, 102, 104]),
        (
            Rgba,
            Sixteen,
            1,
            &[100, 1, 102, 2, 104, 3, 0, 0],
            &[100, 102, 104],
        ),
    ];
    for (color, depth, width, row, expected) in rows {
        let file = png_file(color, depth, width, &colours, row);
        let pixels = decode(&file, Path::new("a.png")).unwrap();
        assert_eq!(&pixels.to_rgb()[..], expected, "{color:?} {depth:?}");
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
