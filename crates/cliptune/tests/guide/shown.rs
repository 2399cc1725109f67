//! Runs what a page shows, in a folder that has what the pages speak of.

use std::path::Path;

use crate::checkpoint;
use crate::page::Page;
use crate::support::{Ran, Scene, finish};

/// The built-in CLIP, in which every name has features of its own.
const CLIP: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../fixtures/clip");

/// The pictures of each class of `flowers/`: 4 to learn from, 1 to choose by, 3 to measure on.
const PICTURES: u8 = 8;

const FLOWERS: [(&str, [u8; 3]); 4] = [
    ("daisy", [220, 215, 190]),
    ("dandelion", [210, 190, 40]),
    ("rose", [190, 30, 60]),
    ("tulip", [150, 60, 170]),
];

/// `ViT-B-16.pt` (the built-in CLIP), `flowers/`, `new.jpg`, `more/` and `names.txt`.
fn folder() -> Scene {
    let scene = Scene::empty();
    std::os::unix::fs::symlink(CLIP, scene.path("ViT-B-16.pt")).unwrap();
    for (class, colour) in FLOWERS {
        for i in 0..PICTURES {
            scene.photo(&format!("flowers/{class}/{i}.jpg"), colour, i);
        }
        scene.photo(&format!("more/{class}.jpg"), colour, 99);
    }
    scene.photo("new.jpg", FLOWERS[2].1, 100);
    let names: Vec<&str> = FLOWERS.iter().map(|(class, _)| *class).collect();
    scene.write("names.txt", names.join("\n"));
    scene
}

/// Runs the blocks of `page` one after the other.
///
/// # Errors
/// The first one that ends with a status other than 0, and what it printed.
pub(crate) fn run(page: &Page) -> Result<(), String> {
    let scene = folder();
    for script in page.scripts() {
        if let Some(file) = argument(script, "--checkpoint") {
            give_checkpoint(&scene, page, &scene.path(file));
        }
        let Ran { code, out, err } = shell(&scene, script);
        if code != Some(0) {
            return Err(format!("{page}: status {code:?} of\n{script}\n{out}{err}"));
        }
    }
    Ok(())
}

/// What follows `flag` in `script`.
fn argument<'a>(script: &'a str, flag: &str) -> Option<&'a str> {
    let mut words = script.split_whitespace();
    words.find(|word| *word == flag)?;
    words.next()
}

/// `script` in a shell that stops at the first failure and finds this build's `cliptune`.
fn shell(scene: &Scene, script: &str) -> Ran {
    let built = Path::new(env!("CARGO_BIN_EXE_cliptune")).parent().unwrap();
    let mut path = built.as_os_str().to_owned();
    path.push(":");
    path.push(std::env::var_os("PATH").unwrap_or_default());
    let mut command = scene.program("sh");
    command.env("PATH", path).args(["-e", "-c", script]);
    finish(command)
}

/// A checkpoint as the method's authors would have left it, with what an earlier block learned.
fn give_checkpoint(scene: &Scene, page: &Page, file: &Path) {
    let prompt = scene.path(&format!("{}.safetensors", page.name));
    std::fs::create_dir_all(file.parent().unwrap()).unwrap();
    checkpoint::write(&prompt, file);
}
