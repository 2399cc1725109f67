//! Equal runs give equal files, whatever the machine does.

use crate::support::{Scene, finish, fit_args};

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
    scene.fit(&[]);
    let original = scene.read("prompt.safetensors");
    for (to, out) in [
        ("hf", "w-hf"),
        ("open-clip", "w-oc"),
        ("safetensors", "w.safetensors"),
    ] {
        scene.ok(&["convert", "--clip", "CLIP", "--to", to, "-o", out]);
        scene.ok(&[
            "fit",
            "--clip",
            out,
            "--images",
            "photos",
            "--method",
            "coop",
            "--set",
            "n_ctx=2",
            "--batch",
            "4",
            "--epochs",
            "2",
            "-o",
            "other.safetensors",
        ]);
        assert!(
            scene.read("other.safetensors") == original,
            "{to} gives other bits"
        );
    }
}
