//! `cargo xtask bench` as people call it, with tiny towers and without Python: candle is the judge.

// Helpers are tests too: a failure here is a failed test.
#![allow(clippy::unwrap_used)]

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::{Value, json};

type TestResult<T = ()> = Result<T, Box<dyn std::error::Error>>;

fn bench(folder: &Path, arguments: &[&str]) -> TestResult<Output> {
    let mut command = Command::new(env!("CARGO_BIN_EXE_xtask"));
    command.args(["bench", "--tiny", "--rounds", "1"]);
    command.args(["--without", "authors", "--without", "fair"]);
    command.arg("--work").arg(folder.join("work"));
    command.arg("--out").arg(folder.join("out"));
    Ok(command.args(arguments).output()?)
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// The only file of the results with this extension.
fn result(folder: &Path, extension: &str) -> TestResult<PathBuf> {
    let files = std::fs::read_dir(folder.join("out"))?.collect::<Result<Vec<_>, _>>()?;
    let mut found = files.iter().map(std::fs::DirEntry::path);
    let path = found.find(|path| path.extension().is_some_and(|e| e == extension));
    Ok(path.ok_or("no result")?)
}

#[test]
fn rows_are_listed() -> TestResult {
    let dir = tempfile::tempdir()?;
    let output = bench(dir.path(), &["--list"])?;
    assert!(output.status.success());
    let names: Vec<String> = text(&output.stdout)
        .lines()
        .map(|line| line.split(' ').next().unwrap().to_owned())
        .collect();
    let expected = [
        "coop-100",
        "coop-1000",
        "cocoop",
        "plot",
        "vpt",
        "maple",
        "deep-vpt",
        "vp",
        "zeroshot",
        "vit-b16",
        "rn50",
    ];
    assert_eq!(names, expected);
    assert_eq!(std::fs::read_dir(dir.path())?.count(), 0);
    Ok(())
}

#[test]
fn what_is_not_known_is_refused_before_any_work() -> TestResult {
    let dir = tempfile::tempdir()?;
    for (arguments, complaint) in [
        (["--row", "coop"], "--row coop: expected one of coop-100, "),
        (
            ["--without", "ours"],
            "--without ours: expected one of authors, fair, candle, ours-twice",
        ),
        (["--threads", "0"], "--threads 0: expected at least one"),
    ] {
        let output = bench(dir.path(), &arguments)?;
        assert!(!output.status.success());
        let said = text(&output.stderr);
        assert!(said.contains(complaint), "{said}");
    }
    assert_eq!(std::fs::read_dir(dir.path())?.count(), 0);
    Ok(())
}

#[test]
fn ours_equals_candle_in_every_row() -> TestResult {
    let dir = tempfile::tempdir()?;
    let output = bench(dir.path(), &[])?;
    assert!(output.status.success(), "{}", text(&output.stderr));
    let results: Value = serde_json::from_slice(&std::fs::read(result(dir.path(), "json")?)?)?;
    let rows = results["rows"].as_array().unwrap();
    assert_eq!(rows.len(), 11);
    let page = std::fs::read_to_string(result(dir.path(), "md")?)?;
    for row in rows {
        let name = row["row"].as_str().unwrap();
        // candle checks a part of the large row only.
        let (reference, other) = match name {
            "coop-1000" => ("ours", "candle"),
            _ => ("candle", "ours"),
        };
        assert_eq!(row["reference"], reference);
        assert_eq!(row["failures"], json!([]));
        assert_eq!(row["same_bits"]["ours"], json!([1, 2, 4]), "{name}");
        let contenders = row["contenders"].as_array().unwrap();
        let ours = contenders
            .iter()
            .find(|m| m["contender"] == "ours")
            .unwrap();
        assert_eq!(ours["wall"].as_array().unwrap().len(), 1);
        assert!(ours["base"].as_u64().unwrap() > 0);
        let other = contenders.iter().find(|m| m["contender"] == other).unwrap();
        let compared: Vec<&String> = other["errors"].as_object().unwrap().keys().collect();
        let expected: &[&str] = match name {
            "coop-100" => &["features", "grad.ctx", "logits"],
            "coop-1000" => &["features"],
            "cocoop" => &[
                "features",
                "grad.ctx",
                "grad.meta_net.linear1.bias",
                "grad.meta_net.linear1.weight",
                "grad.meta_net.linear2.bias",
                "grad.meta_net.linear2.weight",
                "logits",
            ],
            "plot" => &["features", "grad.ctx", "logits", "plan"],
            "vpt" => &[
                "grad.ctx",
                "grad.mean_posterior",
                "grad.std_posterior",
                "logits",
                "loss",
            ],
            "maple" => &[
                "grad.prompt_learner.compound_prompt_projections.0.bias",
                "grad.prompt_learner.compound_prompt_projections.0.weight",
                "grad.prompt_learner.compound_prompts_text.0",
                "grad.prompt_learner.ctx",
                "grad.prompt_learner.proj.bias",
                "grad.prompt_learner.proj.weight",
                "image_features",
                "logits",
                "text_features",
            ],
            "deep-vpt" => &[
                "grad.image_encoder.VPT",
                "grad.image_encoder.transformer.resblocks.1.VPT_shallow",
                "grad.image_encoder.transformer.resblocks.2.VPT_shallow",
                "image_features",
                "logits",
            ],
            "vp" => &[
                "grad.pad_down",
                "grad.pad_left",
                "grad.pad_right",
                "grad.pad_up",
                "image_features",
                "logits",
            ],
            "zeroshot" => &["features", "weights"],
            _ => &["features"],
        };
        assert_eq!(compared, expected, "{name}");
        for (tensor, error) in other["errors"].as_object().unwrap() {
            let error = error.as_f64().unwrap();
            assert!(error < 1e-5, "{name}: {tensor} {error}");
        }
        assert!(page.contains(&format!("## {name}: ")), "{page}");
        assert!(text(&output.stdout).contains(&format!("{name}: ")));
    }
    Ok(())
}

#[test]
fn a_wrong_result_fails_the_row() -> TestResult {
    let dir = tempfile::tempdir()?;
    assert!(bench(dir.path(), &["--row", "vit-b16"])?.status.success());
    // The same row with other weights for one of the two would need a fault; a file of inputs that is not a number is one.
    let inputs = dir.path().join("work/inputs-vit-b16-tiny-2.safetensors");
    let mut bytes = std::fs::read(&inputs)?;
    let last = bytes.len() - 4;
    bytes[last..].copy_from_slice(&f32::NAN.to_le_bytes());
    cliptune_core::files::write_atomically(&inputs, |w| w.write_all(&bytes))?;
    let output = bench(dir.path(), &["--row", "vit-b16"])?;
    assert!(!output.status.success());
    let said = text(&output.stdout);
    assert!(
        said.contains("FAILED: ours: features differs by "),
        "{said}"
    );
    Ok(())
}

#[test]
fn a_worker_speaks_the_protocol() -> TestResult {
    let dir = tempfile::tempdir()?;
    assert!(bench(dir.path(), &["--row", "coop-100"])?.status.success());
    let work = dir.path().join("work");
    let mut child = Command::new(env!("CARGO_BIN_EXE_xtask"))
        .args(["bench", "--worker"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()?;
    let job = json!({
        "contender": "ours",
        "task": { "kind": "coop", "classes": 100, "graph": 100, "n_ctx": 16, "batch": 32 },
        "weights": work.join("weights-vit-b16-text-tiny-2.safetensors"),
        "inputs": work.join("inputs-coop-100-tiny-2.safetensors"),
        "threads": 1,
    });
    let outputs = dir.path().join("outputs.safetensors");
    let mut input = child.stdin.take().ok_or("no input")?;
    writeln!(
        input,
        "{job}\n{}\n{}",
        json!({ "check": outputs }),
        json!({ "step": 0 })
    )?;
    drop(input);
    let output = child.wait_with_output()?;
    assert!(output.status.success());
    let said = text(&output.stdout);
    let replies: Vec<Value> = said
        .lines()
        .map(serde_json::from_str)
        .collect::<Result<_, _>>()?;
    assert_eq!(replies.len(), 3, "{said}");
    assert_eq!(
        replies[0]["ready"]["versions"]["cliptune"],
        env!("CARGO_PKG_VERSION")
    );
    assert!(replies[1]["took"].as_f64().unwrap() > 0.0);
    assert!(replies[2]["took"].as_f64().unwrap() > 0.0);
    let tensors = std::fs::read(&outputs)?;
    let tensors = safetensors::SafeTensors::deserialize(&tensors)?;
    assert_eq!(tensors.tensor("logits")?.shape(), [32, 100]);
    assert_eq!(tensors.tensor("grad.ctx")?.shape(), [16, 64]);
    Ok(())
}
