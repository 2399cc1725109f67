//! Killed runs, full disks, closed pipes.

use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use crate::support::{Scene, clip, finish, fit_args};

const LONG: [&str; 6] = ["--epochs", "60", "--checkpoint-every", "0", "--shots", "2"];

/// A run that is killed `delay` after its first checkpoint; false if it was over before.
fn killed(scene: &Scene, delay: Duration) -> bool {
    let mut child = scene
        .command(&fit_args(&LONG))
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let started = Instant::now();
    let checkpoint = scene.path("prompt.safetensors.ckpt");
    while !checkpoint.exists() && child.try_wait().unwrap().is_none() {
        assert!(
            started.elapsed() < Duration::from_secs(60),
            "no checkpoint appears"
        );
        sleep(Duration::from_millis(1));
    }
    sleep(delay);
    let running = child.try_wait().unwrap().is_none();
    child.kill().unwrap();
    child.wait().unwrap();
    running
}

#[test]
fn a_killed_run_ends_with_the_same_bits() {
    let scene = Scene::with_photos(4);
    scene.fit(&LONG);
    let whole = scene.read("prompt.safetensors");
    std::fs::remove_file(scene.path("prompt.safetensors")).unwrap();
    let kills = [3, 31, 97, 171].map(|ms| killed(&scene, Duration::from_millis(ms)));
    assert!(kills[0], "the run is too short to be killed");
    let resumed = scene.fit(&LONG);
    if kills.iter().all(|killed| *killed) {
        assert!(
            resumed.err.contains("going on from epoch"),
            "{}",
            resumed.err
        );
    }
    assert!(
        scene.read("prompt.safetensors") == whole,
        "the resumed run gives other bits"
    );
    assert!(!scene.path("prompt.safetensors.ckpt").exists());
}

#[test]
fn a_checkpoint_of_another_run_is_refused() {
    let scene = Scene::with_photos(4);
    assert!(killed(&scene, Duration::ZERO));
    let other = [&LONG[..], &["--lr", "0.5"]].concat();
    scene.refused(&fit_args(&other), &["prompt.safetensors.ckpt", "--fresh"]);
    scene.fit(&[&other[..], &["--fresh"]].concat());
    scene.write("prompt.safetensors.ckpt", b"garbage");
    scene.refused(&fit_args(&LONG), &["prompt.safetensors.ckpt", "--fresh"]);
}

#[cfg(unix)]
#[test]
fn an_interrupt_keeps_what_was_learned() {
    let scene = Scene::with_photos(4);
    let long = [
        "--epochs",
        "100000",
        "--checkpoint-every",
        "0",
        "--shots",
        "2",
    ];
    let mut command = scene.command(&fit_args(&long));
    let child = command.stderr(Stdio::piped()).spawn().unwrap();
    while !scene.path("prompt.safetensors.ckpt").exists() {
        sleep(Duration::from_millis(1));
    }
    let kill = Command::new("kill")
        .args(["-INT", &child.id().to_string()])
        .status()
        .unwrap();
    assert!(kill.success());
    let output = child.wait_with_output().unwrap();
    let err = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{err}");
    assert!(
        err.contains("error: stopped") && err.contains("prompt.safetensors.ckpt"),
        "{err}"
    );
    assert!(scene.path("prompt.safetensors.ckpt").exists());
}

/// `cliptune` where no file may grow beyond 4 KiB, as on a disk that fills up.
#[cfg(unix)]
fn on_a_full_disk(scene: &Scene, args: &[&str]) -> Command {
    let mut shell = Command::new("sh");
    shell.args([
        "-c",
        r#"trap '' XFSZ; ulimit -f 8; exec "$@""#,
        "sh",
        env!("CARGO_BIN_EXE_cliptune"),
    ]);
    shell.current_dir(scene.path(""));
    for arg in args {
        match *arg {
            "CLIP" => shell.arg(clip()),
            arg => shell.arg(arg),
        };
    }
    shell
}

#[cfg(unix)]
#[test]
fn a_full_disk_loses_nothing() {
    let scene = Scene::with_photos(2);
    let big = ["--no-cache", "--set", "n_ctx=32"];
    scene.write("prompt.safetensors", b"an older prompt");
    let ran = finish(on_a_full_disk(&scene, &fit_args(&big)));
    assert_eq!(ran.code, Some(1), "{}", ran.err);
    assert!(
        ran.err.contains("error: ") && ran.err.contains("prompt.safetensors: "),
        "{}",
        ran.err
    );
    assert_eq!(scene.read("prompt.safetensors"), b"an older prompt");
    assert_eq!(scene.names(), ["photos", "prompt.safetensors"]);

    // The checkpoint of a run that was cut off outlives a disk that fills up at the end.
    let long = [&LONG[..], &big].concat();
    let mut child = scene
        .command(&fit_args(&long))
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    while !scene.path("prompt.safetensors.ckpt").exists() {
        sleep(Duration::from_millis(1));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    let checkpoint = scene.read("prompt.safetensors.ckpt");
    let ran = finish(on_a_full_disk(&scene, &fit_args(&long)));
    assert_eq!(ran.code, Some(1), "{}", ran.err);
    assert!(ran.err.contains("prompt.safetensors.ckpt: "), "{}", ran.err);
    assert!(scene.read("prompt.safetensors.ckpt") == checkpoint);
    scene.fit(&long);
    assert_ne!(scene.read("prompt.safetensors"), b"an older prompt");
}

#[test]
fn a_closed_pipe_is_no_error() {
    let scene = Scene::empty();
    let mut command = scene.command(&["list"]);
    let mut child = command
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(0));
    assert_eq!(String::from_utf8(output.stderr).unwrap(), "");
}

#[cfg(target_os = "linux")]
#[test]
fn a_full_standard_output_is_an_error() {
    let scene = Scene::empty();
    let full = std::fs::OpenOptions::new()
        .write(true)
        .open("/dev/full")
        .unwrap();
    let output = scene.command(&["list"]).stdout(full).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(
        String::from_utf8(output.stderr)
            .unwrap()
            .starts_with("error: standard output")
    );
}
