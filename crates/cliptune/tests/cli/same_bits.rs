//! Equal runs give equal files, whatever the machine does.

use crate::support::{Scene, finish, fit_args, fixture};

#[test]
fn threads_do_not_matter() {
    let scene = Scene::with_photos(3);
    let prompt = |threads: &str, args: &[&str]| {
        let mut command = scene.command(&fit_args(&[&["--no-cache"], args].concat()));
        let ran = finish({
            command.env("RAYON_NUM_THREADS", threads);
            command
        });
        assert_eq!(ran.code, Some(0), "{}", ran.err);
        scene.read("prompt.safetensors")
    };
    let one = prompt("1", &[]);
    assert!(one == prompt("2", &[]), "2 threads give other bits");
    assert!(one == prompt("4", &[]), "4 threads give other bits");
    assert!(
        one == prompt("4", &["--threads", "3"]),
        "3 threads give other bits"
    );
}

#[test]
fn the_cache_does_not_matter() {
    let scene = Scene::with_photos(3);
    let prompt = |args: &[&str]| {
        scene.fit(args);
        scene.read("prompt.safetensors")
    };
    let none = prompt(&["--no-cache"]);
    assert!(
        none == prompt(&["--cache", "features"]),
        "a new cache gives other bits"
    );
    assert!(
        none == prompt(&["--cache", "features"]),
        "a full cache gives other bits"
    );
    let crops = ["--set", "train.augment=crop_flip", "--set", "train.views=2"];
    let none = prompt(&[&crops[..], &["--no-cache"]].concat());
    assert!(
        none == prompt(&[&crops[..], &["--cache", "features"]].concat()),
        "cached crops give other bits"
    );
}

#[test]
fn layouts_do_not_matter() {
    let scene = Scene::with_photos(2);
    let fit = |clip: &str| {
        let args = [
            "fit", "--clip", clip, "--images", "photos", "--method", "coop",
        ];
        let settings = ["--set", "n_ctx=2", "--batch", "4", "--epochs", "2"];
        scene.ok(&[&args[..], &settings, &["-o", "prompt.safetensors"]].concat());
        scene.read("prompt.safetensors")
    };
    let resnet = fixture("clip/tiny-rn/openai.pt");
    let resnet = resnet.to_str().unwrap();
    // transformers has no ResNet.
    for (clip, layouts) in [
        ("CLIP", &["hf", "open-clip", "safetensors"][..]),
        (resnet, &["open-clip", "safetensors"]),
    ] {
        let original = fit(clip);
        for (i, to) in layouts.iter().enumerate() {
            let out = format!("weights-{}-{i}", if clip == "CLIP" { "vit" } else { "rn" });
            scene.ok(&["convert", "--clip", clip, "--to", to, "-o", &out]);
            assert!(fit(&out) == original, "{to} gives other bits");
        }
    }
}
