use std::path::PathBuf;

use proptest::prelude::*;
use serde::Deserialize;

use super::*;

/// Numbers that the script which made the fixture draws too.
struct Lcg(u64);

impl Lcg {
    fn next(&mut self) -> u64 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        self.0
    }

    fn byte(&mut self) -> u8 {
        (self.next() >> 56) as u8
    }

    fn uniform(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }
}

/// FNV-1a.
fn hash(bytes: &[u8]) -> String {
    let hash = bytes.iter().fold(0xcbf2_9ce4_8422_2325u64, |h, &b| {
        (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3)
    });
    format!("{hash:016x}")
}

#[derive(Deserialize)]
struct Case {
    mode: String,
    size: [usize; 2],
    n: usize,
    seed: u64,
    fixed: String,
    random: String,
    crop: [usize; 4],
}

#[derive(Deserialize)]
struct Fixture {
    cases: Vec<Case>,
}

fn mode(name: &str) -> Mode {
    match name {
        "1" => Mode::Bilevel,
        "L" => Mode::L,
        "LA" => Mode::La,
        "I;16" => Mode::I16,
        "P" => Mode::Palette(Box::new(std::array::from_fn(|i| {
            let i = i as u8;
            [
                i.wrapping_mul(7),
                i.wrapping_mul(13).wrapping_add(5),
                255 - i,
            ]
        }))),
        "RGB" => Mode::Rgb,
        "RGBA" => Mode::Rgba,
        "CMYK" => Mode::Cmyk,
        other => panic!("mode {other}"),
    }
}

/// Noise; where the seed is odd, of the two extreme values only, so that overshoots are clipped.
fn noise(name: &str, width: usize, height: usize, seed: u64) -> Pixels {
    let mode = mode(name);
    let mut lcg = Lcg(seed);
    let extreme = name == "1" || (seed % 2 == 1 && !matches!(name, "P" | "I;16"));
    let mut sample = || match lcg.byte() {
        v if extreme => {
            if v >= 128 {
                255
            } else {
                0
            }
        }
        v => v,
    };
    let data = (0..width * height * mode.bytes_per_pixel())
        .map(|_| sample())
        .collect();
    Pixels::new(width, height, mode, data).unwrap()
}

/// The bytes `(side, side, 3)` that a view was made of.
fn bytes(view: &[f32], preprocess: &Preprocess) -> Vec<u8> {
    let plane = view.len() / 3;
    let byte = |i: usize, c: usize| {
        let value = (view[c * plane + i] * preprocess.std[c] + preprocess.mean[c]) * 255.0;
        assert!((value - value.round()).abs() < 1e-3, "{value} is no byte");
        value.round() as u8
    };
    (0..plane)
        .flat_map(|i| [byte(i, 0), byte(i, 1), byte(i, 2)])
        .collect()
}

#[test]
fn views_of_noise_equal_pillow_in_every_mode() {
    let path = PathBuf::from(concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../../fixtures/preprocess/pillow.json"
    ));
    let fixture: Fixture = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    assert!(fixture.cases.len() > 100);
    let mut wrong = Vec::new();
    for case in &fixture.cases {
        let [width, height] = case.size;
        let image = noise(&case.mode, width, height, case.seed);
        let preprocess = Preprocess::openai(case.n);
        let fixed = bytes(&fixed_view(&image, &preprocess).unwrap(), &preprocess);
        if hash(&fixed) != case.fixed {
            wrong.push(format!(
                "fixed view of {} {width} x {height} at {}",
                case.mode, case.n
            ));
        }
        let mut lcg = Lcg(case.seed + 1000);
        let [left, top, w, h] = case.crop;
        assert_eq!(
            random_crop(width, height, &mut || lcg.uniform()),
            Crop {
                left,
                top,
                width: w,
                height: h
            }
        );
        let mut lcg = Lcg(case.seed + 1000);
        let random = random_view(&image, &preprocess, &mut || lcg.uniform()).unwrap();
        if hash(&bytes(&random, &preprocess)) != case.random {
            wrong.push(format!(
                "random view of {} {width} x {height} at {}",
                case.mode, case.n
            ));
        }
    }
    assert!(
        wrong.is_empty(),
        "{} differ:\n{}",
        wrong.len(),
        wrong.join("\n")
    );
}

#[test]
fn bad_sizes_are_errors() {
    let error = Pixels::new(3, 2, Mode::Rgb, vec![0; 17])
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("3 x 2") && error.contains("17 bytes"),
        "{error}"
    );
    assert!(Pixels::new(0, 2, Mode::L, vec![]).is_err());
    assert!(Pixels::new(usize::MAX, usize::MAX, Mode::Rgba, vec![]).is_err());
    let image = Pixels::new(1, 1, Mode::L, vec![9]).unwrap();
    let error = fixed_view(&image, &Preprocess::openai(0))
        .unwrap_err()
        .to_string();
    assert!(error.starts_with("resolution = 0"), "{error}");
    assert!(random_view(&image, &Preprocess::openai(usize::MAX), &mut || 0.5).is_err());
    assert!(normalise(&[1, 2], &Preprocess::openai(1)).is_err());
}

#[test]
fn a_very_long_picture_costs_little() {
    let image = Pixels::new(1_000_000, 1, Mode::L, vec![7; 1_000_000]).unwrap();
    assert_eq!(
        fixed_view(&image, &Preprocess::openai(224)).unwrap().len(),
        3 * 224 * 224
    );
    assert_eq!(
        random_view(&image, &Preprocess::openai(224), &mut || 0.99)
            .unwrap()
            .len(),
        3 * 224 * 224
    );
}

const MODES: [&str; 8] = ["1", "L", "LA", "I;16", "P", "RGB", "RGBA", "CMYK"];

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn any_picture_gives_finite_views(
        name in prop::sample::select(&MODES[..]), width in 1..60usize, height in 1..60usize, side in 1..40usize, seed: u64,
    ) {
        let image = noise(name, width, height, seed);
        let preprocess = Preprocess::openai(side);
        let mut lcg = Lcg(seed);
        for view in [fixed_view(&image, &preprocess), random_view(&image, &preprocess, &mut || lcg.uniform())] {
            let view = view.unwrap();
            prop_assert_eq!(view.len(), 3 * side * side);
            prop_assert!(view.iter().all(|v| v.is_finite()));
        }
    }

    #[test]
    fn a_plain_picture_stays_plain(
        name in prop::sample::select(&["L", "P", "RGB", "CMYK"][..]), width in 1..60usize, height in 1..60usize, side in 1..40usize,
        value: u8, seed: u64,
    ) {
        let mode = mode(name);
        let image = Pixels::new(width, height, mode.clone(), vec![value; width * height * mode.bytes_per_pixel()]).unwrap();
        let preprocess = Preprocess::openai(side);
        let expected = image.to_rgb()[..3].to_vec();
        let mut lcg = Lcg(seed);
        for view in [fixed_view(&image, &preprocess), random_view(&image, &preprocess, &mut || lcg.uniform())] {
            for pixel in bytes(&view.unwrap(), &preprocess).chunks(3) {
                prop_assert_eq!(pixel, &expected[..]);
            }
        }
    }

    #[test]
    fn crops_lie_inside(width in 1..3000usize, height in 1..3000usize, draws in prop::collection::vec(0.0..1.0f64, 40)) {
        let mut draws = draws.into_iter().cycle();
        let crop = random_crop(width, height, &mut || draws.next().unwrap());
        prop_assert!(crop.width >= 1 && crop.left + crop.width <= width);
        prop_assert!(crop.height >= 1 && crop.top + crop.height <= height);
    }
}

/// Pillow's `_transform` of OpenAI on the files of the parity suite is checked where files are decoded, in `cliptune-data`.
#[test]
fn a_photo_takes_milliseconds() {
    let image = noise("RGB", 500, 375, 2);
    let preprocess = Preprocess::openai(224);
    let start = std::time::Instant::now();
    for _ in 0..20 {
        fixed_view(&image, &preprocess).unwrap();
    }
    let each = start.elapsed() / 20;
    println!("fixed view of 500 x 375 at 224: {each:?}");
    assert!(each.as_millis() < 50, "took {each:?}");
}
