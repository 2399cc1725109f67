//! `cargo xtask reproduce` as people call it, on a tiny CLIP with random weights.

// Helpers are tests too: a failure here is a failed test.
#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::LazyLock;
use std::time::{Duration, Instant};

use cliptune_core::checkpoint::{self, Layout};
use cliptune_core::{Activation, Arch, VisionArch, files};
use serde_json::Value;
use tempfile::TempDir;

type TestResult<T = ()> = Result<T, Box<dyn std::error::Error>>;

/// Weights for all tests.
static CLIP: LazyLock<TempDir> = LazyLock::new(|| {
    let arch = Arch {
        embed_dim: 16,
        image_resolution: 32,
        vision: VisionArch::Vit {
            layers: 1,
            width: 64,
            patch_size: 16,
        },
        context_length: 77,
        vocab_size: 49_408,
        text_width: 64,
        text_layers: 1,
        activation: Activation::QuickGelu,
    };
    let folder = tempfile::tempdir().unwrap();
    let weights = checkpoint::random(&arch, 1).unwrap();
    weights
        .save(Layout::Hf, None, &folder.path().join("clip"))
        .unwrap();
    folder
});

/// A folder for one test's results.
struct Scene {
    dir: TempDir,
}

impl Scene {
    fn new() -> TestResult<Self> {
        Ok(Self {
            dir: tempfile::tempdir()?,
        })
    }

    fn out(&self) -> PathBuf {
        self.dir.path().join("out")
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_xtask"));
        command.arg("reproduce").arg("--out").arg(self.out());
        command.arg("--clip").arg(CLIP.path().join("clip"));
        command.args(arguments);
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    fn run(&self, arguments: &[&str]) -> TestResult<Ran> {
        Ok(Ran::of(self.command(arguments).output()?))
    }

    fn start(&self, arguments: &[&str]) -> TestResult<Child> {
        Ok(self.command(arguments).spawn()?)
    }

    /// The result files there are.
    fn results(&self) -> Vec<PathBuf> {
        let mut found = Vec::new();
        let mut folders = vec![self.out()];
        while let Some(folder) = folders.pop() {
            for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
                match entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                    true => folders.push(entry.path()),
                    false if entry.file_name() == "result.json" => found.push(entry.path()),
                    false => {}
                }
            }
        }
        found.sort();
        found
    }

    fn report(&self) -> TestResult<String> {
        Ok(std::fs::read_to_string(self.out().join("report.html"))?)
    }
}

/// What a call left behind.
#[derive(Debug)]
struct Ran {
    good: bool,
    out: String,
    err: String,
}

impl Ran {
    fn of(output: Output) -> Self {
        Self {
            good: output.status.success(),
            out: String::from_utf8_lossy(&output.stdout).into_owned(),
            err: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }
}

fn read(path: &Path) -> TestResult<Value> {
    Ok(serde_json::from_slice(&std::fs::read(path)?)?)
}

/// All tags are closed, in order.
fn assert_well_formed(html: &str) {
    let body = html.strip_prefix("<!DOCTYPE html>\n").unwrap();
    let mut open: Vec<&str> = Vec::new();
    let mut rest = body;
    while let Some(start) = rest.find('<') {
        assert!(
            !rest[..start].contains('>'),
            "a stray > in {}",
            &rest[..start]
        );
        let end = start + rest[start..].find('>').unwrap();
        let tag = &rest[start + 1..end];
        assert_eq!(tag.matches('"').count() % 2, 0, "quotes of <{tag}>");
        if let Some(name) = tag.strip_prefix('/') {
            assert_eq!(open.pop(), Some(name));
        } else if !tag.ends_with('/') {
            open.push(tag.split(' ').next().unwrap());
        }
        // Style sheets hold their own brackets.
        let skip = tag == "style";
        rest = &rest[end + 1..];
        if skip {
            rest = &rest[rest.find("</style>").unwrap()..];
        }
    }
    assert!(open.is_empty(), "{open:?} left open");
}

const SMALL: &[&str] = &[
    "--methods=zeroshot,coop",
    "--tasks=texture",
    "--shots=1,2",
    "--seeds=1,2",
    "--set=train.epochs=2",
];

#[test]
fn a_call_leaves_results_a_table_and_a_report_and_the_next_one_skips() -> TestResult {
    let scene = Scene::new()?;
    let ran = scene.run(SMALL)?;
    assert!(ran.good, "{ran:?}");
    let results = scene.results();
    // Few-shot: zero-shot once, two contestants × 2 shots × 2 seeds. Base to new: zero-shot once, CoOp × 2 seeds.
    assert_eq!(results.len(), 9 + 3);
    let html = scene.report()?;
    assert_well_formed(&html);
    assert!(!html.contains("<script") && !html.contains("http"));

    // The figures that are shown are those of the results.
    let accuracy = |seed: usize| -> TestResult<f64> {
        let path = format!("few-shot/texture/coop/shots_2/seed_{seed}/result.json");
        let record = read(&scene.out().join(path))?;
        assert_eq!(record["run"]["shots"], 2);
        assert!(record["peak_memory_bytes"].as_u64() > Some(1 << 20));
        assert_eq!(record["training"]["epochs"].as_array().unwrap().len(), 2);
        Ok(record["tests"][0]["accuracy"].as_f64().unwrap())
    };
    let (a, b) = (accuracy(1)?, accuracy(2)?);
    let (mean, sd) = ((a + b) / 2.0, (a - b).abs() / 2f64.sqrt());
    let shown = format!("{mean:.1} ± {sd:.1}");
    assert!(ran.out.contains(&shown), "{shown} in {}", ran.out);
    assert!(html.contains(&shown.replace(' ', "\u{a0}")), "{shown}");

    let before: Vec<Vec<u8>> = results
        .iter()
        .map(std::fs::read)
        .collect::<Result<_, _>>()?;
    let again = scene.run(SMALL)?;
    assert!(
        again.good && again.err.contains("all 12 runs are there already"),
        "{again:?}"
    );
    let after: Vec<Vec<u8>> = results
        .iter()
        .map(std::fs::read)
        .collect::<Result<_, _>>()?;
    assert_eq!(before, after);
    assert_eq!(ran.out, again.out);
    Ok(())
}

#[test]
fn the_report_shows_what_is_added_to_pictures() -> TestResult {
    let scene = Scene::new()?;
    let arguments = [
        "--methods=zeroshot,vp",
        "--protocols=few-shot",
        "--tasks=texture",
        "--shots=1",
        "--seeds=1",
        "--set=train.epochs=2",
    ];
    let ran = scene.run(&arguments)?;
    assert!(ran.good, "{ran:?}");
    let html = scene.report()?;
    assert_well_formed(&html);
    assert!(html.contains("What is added to a picture"));
    let folder = scene.out().join("few-shot/texture/vp/shots_1/seed_1");
    for name in ["added.png", "added-to-a-picture.png"] {
        let decoder = png::Decoder::new(std::io::BufReader::new(std::fs::File::open(
            folder.join(name),
        )?));
        let mut reader = decoder.read_info()?;
        let mut rgb = vec![0; reader.output_buffer_size().unwrap()];
        reader.next_frame(&mut rgb)?;
        assert_eq!(rgb.len(), 3 * 32 * 32);
        // Grey inside of the frame, and not in the frame.
        let pixel = |row: usize, column: usize| &rgb[3 * (32 * row + column)..][..3];
        let grey = |row, column| pixel(row, column) == [128; 3];
        if name == "added.png" {
            assert!(grey(16, 16) && grey(4, 4) && grey(27, 27));
            assert!((0..32).any(|column| !grey(0, column)));
            assert!((0..32).any(|row| !grey(row, 31)));
        }
    }
    Ok(())
}

#[test]
fn damaged_results_are_set_aside_and_made_again() -> TestResult {
    let scene = Scene::new()?;
    assert!(scene.run(SMALL)?.good);
    let results = scene.results();
    let before: Vec<Value> = results
        .iter()
        .map(|path| read(path))
        .collect::<TestResult<_>>()?;
    let text = std::fs::read(&results[0])?;
    let write = |path: &Path, bytes: &[u8]| files::write_atomically(path, |w| w.write_all(bytes));
    // Cut off; another file's content; figures that contradict each other.
    write(&results[0], &text[..text.len() / 2])?;
    write(&results[1], &text)?;
    let mut lie = before[2].clone();
    lie["tests"][0]["accuracy"] = 99.0.into();
    write(&results[2], &serde_json::to_vec(&lie)?)?;

    let ran = scene.run(SMALL)?;
    assert!(ran.good, "{ran:?}");
    assert!(
        ran.err.contains("3 runs to make, 9 there already"),
        "{}",
        ran.err
    );
    for path in &results[..3] {
        assert!(ran.err.contains(path.to_str().unwrap()), "{}", ran.err);
        assert!(path.with_file_name("result.json.damaged").exists());
    }
    for (path, before) in results.iter().zip(&before) {
        let after = read(path)?;
        assert_eq!(after["tests"], before["tests"], "{}", path.display());
    }
    Ok(())
}

#[test]
fn another_configuration_is_refused_and_fresh_starts_over() -> TestResult {
    let scene = Scene::new()?;
    let few = &[
        "--methods=coop-class-specific",
        "--tasks=texture",
        "--shots=1",
        "--seeds=1",
    ];
    let with = |more: &[&'static str]| -> Vec<&'static str> { [few, more].concat() };
    assert!(scene.run(&with(&["--set=train.epochs=1"]))?.good);
    let foreign = scene.out().join("few-shot/notes.txt");
    files::write_atomically(&foreign, |w| w.write_all(b"mine"))?;

    let other = scene.run(&with(&["--set=train.epochs=2"]))?;
    assert!(!other.good);
    for part in [
        "another configuration",
        "train.epochs=1 there",
        "train.epochs=2 now",
        "--fresh",
    ] {
        assert!(other.err.contains(part), "{part} in {}", other.err);
    }
    let fresh = scene.run(&with(&["--set=train.epochs=2", "--fresh"]))?;
    assert!(
        fresh.good && fresh.err.contains("1 run to make, 0 there already"),
        "{fresh:?}"
    );
    assert!(foreign.exists());

    // A folder of somebody else's is not touched.
    let elsewhere = Scene::new()?;
    std::fs::create_dir(elsewhere.out())?;
    files::write_atomically(&elsewhere.out().join("thesis.txt"), |w| {
        w.write_all(b"mine")
    })?;
    let ran = elsewhere.run(&with(&["--fresh"]))?;
    assert!(
        !ran.good && ran.err.contains("not one of this command's"),
        "{ran:?}"
    );
    Ok(())
}

/// Many short runs.
const LONG: &[&str] = &[
    "--methods=coop",
    "--tasks=texture",
    "--protocols=few-shot",
    "--shots=1,2,4",
    "--seeds=1,2,3,4",
    "--set=train.epochs=3",
    "--jobs=2",
];

#[test]
fn a_killed_call_goes_on_and_two_at_once_are_refused() -> TestResult {
    let scene = Scene::new()?;
    let mut first = scene.start(LONG)?;
    let started = Instant::now();
    while scene.results().is_empty() {
        assert!(
            started.elapsed() < Duration::from_secs(100),
            "no result yet"
        );
        std::thread::sleep(Duration::from_millis(20));
    }
    let second = scene.run(LONG)?;
    first.kill()?;
    first.wait()?;
    assert!(
        !second.good && second.err.contains("another call works in this folder"),
        "{second:?}"
    );

    let kept = scene.results().len();
    let third = scene.run(LONG)?;
    assert!(third.good, "{third:?}");
    assert_eq!(scene.results().len(), 24);
    // Runs in hand when the first call died may have been finished by then, nothing else.
    let made = 24 - kept;
    let lost = (made.saturating_sub(2)..=made).map(|n| format!("{n} run"));
    assert!(
        lost.into_iter().any(|text| third.err.contains(&text)),
        "{kept}: {}",
        third.err
    );
    Ok(())
}

#[test]
fn a_run_that_fails_is_named_and_the_others_go_on() -> TestResult {
    let scene = Scene::new()?;
    let arguments = [
        SMALL,
        &["--set=train.keep=best_val", "--protocols=few-shot"],
    ]
    .concat();
    let ran = scene.run(&arguments)?;
    assert!(!ran.good);
    assert!(
        ran.err
            .contains("failed: few-shot texture coop, 1 shot, seed 1"),
        "{}",
        ran.err
    );
    assert!(ran.err.contains("needs validation images"), "{}", ran.err);
    assert_eq!(scene.results().len(), 1);
    assert_well_formed(&scene.report()?);
    Ok(())
}

#[test]
fn what_is_unknown_is_refused_before_any_work() -> TestResult {
    let scene = Scene::new()?;
    let message = |arguments: &[&str]| -> TestResult<String> {
        let ran = scene.run(arguments)?;
        assert!(!ran.good, "{ran:?}");
        Ok(ran.err)
    };
    assert!(message(&["--methods=coopp"])?.contains("did you mean `coop`?"));
    assert!(message(&["--protocols=fewshot"])?.contains("did you mean `few-shot`?"));
    assert!(message(&["--tasks=textur"])?.contains("did you mean `texture`?"));
    assert!(message(&["--tasks=xyzzy"])?.contains("there are shape, "));
    assert!(message(&["--seeds=one"])?.contains("invalid value 'one'"));
    assert!(message(&["--shots=0"])?.contains("at least one"));
    assert!(message(&["--shots=64"])?.contains("have 32 training pictures"));
    assert!(message(&["--jobs=0"])?.contains("at least one run"));
    assert!(message(&["--set=train.epoch=1"])?.contains("did you mean `train.epochs`?"));
    assert!(message(&["--data=/nowhere"])?.contains("/nowhere"));
    assert!(
        message(&["--tasks=texture", "--protocols=domain-shift"])?.contains("add it to --tasks")
    );
    assert!(message(&["--report-only"])?.contains("there are no results"));
    assert!(!scene.out().exists());
    Ok(())
}

#[test]
fn damaged_weights_are_named() -> TestResult {
    let scene = Scene::new()?;
    let clip = scene.dir.path().join("clip");
    std::fs::create_dir(&clip)?;
    for name in [
        "config.json",
        "preprocessor_config.json",
        "model.safetensors",
    ] {
        let bytes = std::fs::read(CLIP.path().join("clip").join(name))?;
        let kept = if name.starts_with("model") {
            bytes.len() / 2
        } else {
            bytes.len()
        };
        files::write_atomically(&clip.join(name), |w| w.write_all(&bytes[..kept]))?;
    }
    let ran = scene.run(&["--clip", clip.to_str().unwrap()])?;
    let message = "the argument '--clip <WEIGHTS>' cannot be used multiple times";
    assert!(ran.err.contains(message));
    let mut command = Command::new(env!("CARGO_BIN_EXE_xtask"));
    command.arg("reproduce").arg("--out").arg(scene.out());
    let ran = Ran::of(command.arg("--clip").arg(&clip).output()?);
    assert!(
        !ran.good && ran.err.contains("model.safetensors"),
        "{ran:?}"
    );
    assert!(!scene.out().exists());
    Ok(())
}

#[test]
fn a_data_set_of_ones_own_replaces_the_tasks() -> TestResult {
    let scene = Scene::new()?;
    let root = scene.dir.path().join("My <photos>");
    for (class, name) in ["cat & dog", "fish", "house", "tree"]
        .into_iter()
        .enumerate()
    {
        std::fs::create_dir_all(root.join(name))?;
        for i in 0..10u8 {
            let mut png = Vec::new();
            let mut encoder = png::Encoder::new(&mut png, 24, 24);
            encoder.set_color(png::ColorType::Rgb);
            let shade = |k: usize| (class * 60 + k % 7 * 3) as u8 ^ i;
            let rgb: Vec<u8> = (0..24 * 24 * 3).map(shade).collect();
            encoder.write_header()?.write_image_data(&rgb)?;
            files::write_atomically(&root.join(name).join(format!("{i}.png")), |w| {
                w.write_all(&png)
            })?;
        }
    }
    let root = root.to_str().unwrap();
    let arguments = [
        "--data",
        root,
        "--methods=zeroshot,coop",
        "--shots=2",
        "--seeds=1,2",
        "--set=train.epochs=2",
    ];
    let ran = scene.run(&arguments)?;
    assert!(ran.good, "{ran:?}");
    // Few-shot: 1 + 2 × 2 runs; base to new: 1 + 2.
    assert_eq!(scene.results().len(), 8);
    let html = scene.report()?;
    assert_well_formed(&html);
    assert!(html.contains("My &lt;photos&gt;") && html.contains("cat &amp; dog"));
    assert!(html.contains("data:image/png;base64,"));

    let list = scene.run(&[&arguments[..], &["--dry-run"]].concat())?;
    assert!(
        list.good && list.out.lines().all(|line| line.starts_with("there ")),
        "{list:?}"
    );
    let shift = scene.run(&[&arguments[..], &["--protocols=domain-shift"]].concat())?;
    assert!(
        !shift.good && shift.err.contains("built-in tasks only"),
        "{shift:?}"
    );
    Ok(())
}
