//! Mistakes are refused before work, with the file, the value and a way out.

use crate::support::{CLASSES, Scene, clip, fit_args};

#[test]
fn unknown_names() {
    let scene = Scene::with_photos(1);
    scene.refused(&["describe", "cop"], &["cop", "did you mean `coop`"]);
    scene.refused(
        &fit_args(&["--set", "n_ctxx=4"]),
        &["--set n_ctxx=4", "did you mean `n_ctx`"],
    );
    scene.refused(
        &fit_args(&["--set", "train.lr=fast"]),
        &["--set train.lr=fast", "a number"],
    );
    scene.refused(&fit_args(&["--lr", "-1"]), &["--lr -1", "above 0"]);
    scene.refused(
        &fit_args(&["--set", "n_ctx"]),
        &["--set n_ctx", "KEY=VALUE"],
    );
    let eval = ["eval", "--clip", "CLIP", "--images", "photos"];
    scene.refused(
        &[&eval[..], &["--ensemble", "select8"]].concat(),
        &["--ensemble", "select8", "select7"],
    );
    scene.refused(
        &[&eval[..], &["--template", "a photo"]].concat(),
        &["--template", "{}"],
    );
    scene.refused(
        &[&eval[..], &["--dataset", "pets"]].concat(),
        &["--dataset", "pets", "oxford_pets"],
    );
    assert_eq!(scene.run(&["fit", "--shoots", "4"]).code, Some(2));
    assert_eq!(scene.run(&["eval", "--images", "photos"]).code, Some(2));
    assert_eq!(scene.names(), ["photos"]);
}

#[test]
fn beginnings_that_do_not_fit() {
    let scene = Scene::with_photos(3);
    scene.fit(&["--epochs", "1", "-o", "first"]);
    let refused = |method: &str, args: &[&str], parts: &[&str]| {
        let fit = [
            "fit", "--clip", "CLIP", "--images", "photos", "--method", method, "-o", "second",
        ];
        scene.refused(&[&fit[..], args].concat(), parts);
    };
    refused("coop", &["--init", "absent"], &["--init", "absent"]);
    refused(
        "kgcoop",
        &["--init", "first"],
        &["--init first", "a prompt of coop", "a fit of kgcoop"],
    );
    refused(
        "coop",
        &["--init", "first", "--set", "n_ctx=3"],
        &["`ctx` has shape [2,", "expected [3,"],
    );
    refused("zeroshot", &["--init", "first"], &["is not trained"]);
    scene.write("fit.toml", "init = [\"first\", \"absent\"]\n");
    let fit = fit_args(&["--config", "fit.toml", "-o", "second"]);
    scene.refused(&fit, &["absent"]);
}

#[test]
fn fit_files() {
    let scene = Scene::with_photos(1);
    for (text, parts) in [
        ("seed = 1\nshoots = 4\n", ["fit.toml:2", "shoots"]),
        (
            "seed = 1\n[config]\nn_ctxx = 4\n",
            ["fit.toml:3", "did you mean `n_ctx`"],
        ),
        (
            "[config]\nn_ctx = 4\ntrain.lr = \"x\"\n",
            ["fit.toml:3", "a number"],
        ),
        ("seed = -1\n", ["fit.toml:1", "-1"]),
        ("seed = \n", ["fit.toml:1", ""]),
        ("epochs = 0\n", ["fit.toml:1: epochs = 0", "at least one"]),
    ] {
        scene.write("fit.toml", text);
        let args = [
            "fit", "--config", "fit.toml", "--clip", "CLIP", "--images", "photos", "--method",
            "coop", "-o", "p",
        ];
        scene.refused(&args, &parts);
    }
    scene.refused(&["fit", "--config", "absent.toml"], &["absent.toml"]);
    scene.refused(&["fit"], &["--clip is missing"]);
    scene.refused(
        &["fit", "--clip", "CLIP", "--images", "photos", "-o", "p"],
        &["--method is missing", "coop"],
    );
}

#[test]
fn weights() {
    let scene = Scene::with_photos(1);
    let eval = |clip: &str, parts: &[&str]| {
        scene.refused(
            &[
                "eval", "--clip", clip, "--images", "photos", "--split", "all",
            ],
            parts,
        );
        scene.refused(
            &["convert", "--clip", clip, "--to", "hf", "-o", "out"],
            parts,
        );
    };
    eval("absent.pt", &["absent.pt", "No such file"]);
    let bytes = std::fs::read(clip()).unwrap();
    scene.write("cut.pt", &bytes[..bytes.len() / 2]);
    eval("cut.pt", &["cut.pt"]);
    scene.write("empty.pt", b"");
    eval("empty.pt", &["empty.pt"]);
    eval("photos", &["photos"]);
    assert!(!scene.path("out").exists());
}

#[test]
fn images_that_cannot_be_read() {
    let scene = Scene::with_photos(6);
    // Whichever list they fall into, `--shots 0` and `--split all` meet them.
    scene.write("photos/airplane/3.png", b"");
    let half = scene.read("photos/motorbike/4.png");
    scene.write("photos/motorbike/4.png", &half[..half.len() / 2]);
    let eval = [
        "eval", "--clip", "CLIP", "--images", "photos", "--split", "all",
    ];
    scene.refused(&eval, &["3.png"]);
    let skipped = scene.ok(&[&eval[..], &["--skip-bad-images", "--json"]].concat());
    assert_eq!(skipped.json()["skipped_images"], 2);
    assert_eq!(skipped.json()["total"], 6 * CLASSES.len() - 2);
    assert!(
        skipped.err.contains("airplane/3.png") && skipped.err.contains("motorbike/4.png"),
        "{}",
        skipped.err
    );
    scene.fit(&["--skip-bad-images"]);
    let predict = [
        "predict",
        "--clip",
        "CLIP",
        "--prompt",
        "prompt.safetensors",
        "photos",
        "--format",
        "json",
    ];
    scene.refused(&predict, &["3.png", "--skip-bad-images"]);
    let skipped = scene.ok(&[&predict[..], &["--skip-bad-images"]].concat());
    assert_eq!(
        skipped.json().as_array().unwrap().len(),
        6 * CLASSES.len() - 2
    );
    assert!(
        skipped.err.contains("2 images could not be read"),
        "{}",
        skipped.err
    );
}

#[test]
fn data_that_cannot_be_used() {
    let scene = Scene::with_photos(3);
    scene.refused(&fit_args(&["--images", "absent"]), &["absent"]);
    std::fs::create_dir(scene.path("photos/nothing")).unwrap();
    scene.refused(&fit_args(&[]), &["photos/nothing", "no JPEG or PNG"]);
    std::fs::remove_dir(scene.path("photos/nothing")).unwrap();
    scene.write("a.csv", "path,label\nphotos/airplane/0.png\n");
    scene.refused(&fit_args(&["--images", "a.csv"]), &["a.csv", "line 2"]);
    scene.write("a.json", "{\"train\": [],\n \"val\": [,");
    scene.refused(&fit_args(&["--images", "a.json"]), &["a.json", "line 2"]);
    scene.write("a.txt", "x");
    scene.refused(&fit_args(&["--images", "a.txt"]), &["a.txt", "expected"]);
    let predict = ["predict", "--clip", "CLIP", "--classes", "a,b"];
    scene.refused(&[&predict[..], &["absent.png"]].concat(), &["absent.png"]);
    std::fs::create_dir(scene.path("bare")).unwrap();
    scene.refused(
        &[&predict[..], &["bare"]].concat(),
        &["bare", "no JPEG or PNG"],
    );
    scene.refused(
        &["predict", "--clip", "CLIP", "photos"],
        &["--prompt", "--classes"],
    );
    // Not a mistake, but said.
    let few = scene.fit(&["--shots", "8"]);
    assert!(
        few.err.contains("warning")
            && few.err.contains("fewer than 8")
            && few.err.contains("airplane"),
        "{}",
        few.err
    );
}

#[test]
fn places_that_cannot_be_written() {
    let scene = Scene::with_photos(1);
    scene.refused(
        &fit_args(&["-o", "absent/p.safetensors"]),
        &["absent", "make it first"],
    );
    scene.refused(&fit_args(&["-o", "photos"]), &["photos", "is a folder"]);
    scene.write("file", b"");
    scene.refused(&fit_args(&["-o", "file/p.safetensors"]), &["file"]);
    #[cfg(target_os = "linux")]
    scene.refused(
        &fit_args(&["-o", "/proc/p.safetensors"]),
        &["/proc/p.safetensors"],
    );
    assert_eq!(scene.names(), ["file", "photos"]);
}

#[test]
fn prompts_that_do_not_fit() {
    let scene = Scene::with_photos(2);
    scene.fit(&[]);
    // The same sizes, other numbers: a conversion that loses digits.
    scene.ok(&[
        "convert",
        "--clip",
        "CLIP",
        "--to",
        "safetensors",
        "--dtype",
        "bf16",
        "-o",
        "other.safetensors",
    ]);
    let predict = [
        "predict",
        "--clip",
        "other.safetensors",
        "--prompt",
        "prompt.safetensors",
        "photos",
    ];
    scene.refused(&predict, &["prompt.safetensors", "weights", "trained on"]);
    let predict = |prompt: &str, parts: &[&str]| {
        scene.refused(
            &["predict", "--clip", "CLIP", "--prompt", prompt, "photos"],
            parts,
        );
    };
    predict("absent.safetensors", &["absent.safetensors"]);
    predict(
        "other.safetensors",
        &["other.safetensors", "not a prompt file"],
    );
    let bytes = scene.read("prompt.safetensors");
    scene.write("cut.safetensors", &bytes[..bytes.len() - 9]);
    predict("cut.safetensors", &["cut.safetensors"]);
    scene.write("photo.safetensors", scene.read("photos/airplane/0.png"));
    predict("photo.safetensors", &["photo.safetensors"]);
    scene.refused(
        &[
            "import",
            "--clip",
            "CLIP",
            "--method",
            "coop",
            "--checkpoint",
            "prompt.safetensors",
            "--classes",
            "a",
            "-o",
            "p",
        ],
        &["prompt.safetensors"],
    );
    scene.refused(
        &[
            "import",
            "--clip",
            "CLIP",
            "--method",
            "zeroshot",
            "--checkpoint",
            "x",
            "--classes",
            "a",
            "-o",
            "p",
        ],
        &["zeroshot", "coop"],
    );
}
