//! A folder with pictures, and the command run inside it.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Words that the tiny CLIP knows (the rows of other words are zero), with a colour for each.
pub(crate) const CLASSES: [(&str, [u8; 3]); 4] = [
    ("T-shirt", [220, 40, 40]),
    ("airplane", [40, 200, 60]),
    ("golden_retriever", [50, 60, 220]),
    ("motorbike", [210, 210, 60]),
];

/// Weights in OpenAI's layout.
pub(crate) fn clip() -> PathBuf {
    fixture("clip/tiny-vit/openai.pt")
}

pub(crate) fn fixture(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../../fixtures/parity")
        .join(path)
}

/// What a command left.
#[derive(Debug)]
pub(crate) struct Ran {
    pub(crate) code: Option<i32>,
    pub(crate) out: String,
    pub(crate) err: String,
}

impl Ran {
    pub(crate) fn json(&self) -> serde_json::Value {
        serde_json::from_str(&self.out).unwrap_or_else(|e| panic!("{e}: {}", self.out))
    }
}

/// A temporary folder to work in.
#[derive(Debug)]
pub(crate) struct Scene {
    dir: tempfile::TempDir,
}

impl Scene {
    pub(crate) fn empty() -> Self {
        Self {
            dir: tempfile::tempdir().unwrap(),
        }
    }

    /// With `images` pictures in each class folder of `photos/`.
    pub(crate) fn with_photos(images: usize) -> Self {
        let scene = Self::empty();
        for (class, colour) in CLASSES {
            for i in 0..images {
                scene.photo(&format!("photos/{class}/{i}.png"), colour, i as u8);
            }
        }
        scene
    }

    pub(crate) fn path(&self, path: &str) -> PathBuf {
        self.dir.path().join(path)
    }

    /// A picture of about this colour.
    pub(crate) fn photo(&self, path: &str, [r, g, b]: [u8; 3], seed: u8) {
        let path = self.path(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        let noise =
            |x: u32, y: u32, k: u32| ((x * 31 + y * 17 + k * 7 + u32::from(seed) * 13) % 30) as u8;
        let image = image::RgbImage::from_fn(40, 36, |x, y| {
            image::Rgb([r + noise(x, y, 1), g + noise(x, y, 2), b + noise(x, y, 3)])
        });
        image.save(path).unwrap();
    }

    pub(crate) fn write(&self, path: &str, content: impl AsRef<[u8]>) {
        let path = self.path(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        cliptune::files::write_atomically(&path, |out| out.write_all(content.as_ref())).unwrap();
    }

    pub(crate) fn read(&self, path: &str) -> Vec<u8> {
        std::fs::read(self.path(path)).unwrap_or_else(|e| panic!("{path}: {e}"))
    }

    /// Names in the folder, sorted; nothing hidden may be left behind.
    pub(crate) fn names(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.dir.path()).unwrap();
        let mut names: Vec<String> = entries
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    /// `program`, in the folder.
    pub(crate) fn program(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command.current_dir(self.dir.path()).stdin(Stdio::null());
        command
            .env("XDG_CACHE_HOME", self.path("cache"))
            .env("HOME", self.path("home"));
        command
    }

    /// `cliptune` with `args`, in the folder. The word `CLIP` stands for the weights.
    pub(crate) fn command(&self, args: &[&str]) -> Command {
        let mut command = self.program(env!("CARGO_BIN_EXE_cliptune"));
        for arg in args {
            match *arg {
                "CLIP" => command.arg(clip()),
                arg => command.arg(arg),
            };
        }
        command
    }

    pub(crate) fn run(&self, args: &[&str]) -> Ran {
        finish(self.command(args))
    }

    /// Runs what must work.
    pub(crate) fn ok(&self, args: &[&str]) -> Ran {
        let ran = self.run(args);
        assert_eq!(
            ran.code,
            Some(0),
            "cliptune {}\n{}",
            args.join(" "),
            ran.err
        );
        ran
    }

    /// Runs what must be refused with exit status 1 and a message that has all of `parts`.
    pub(crate) fn refused(&self, args: &[&str], parts: &[&str]) -> Ran {
        let ran = self.run(args);
        let shown = format!("cliptune {}\n{}", args.join(" "), ran.err);
        assert_eq!(ran.code, Some(1), "{shown}");
        assert!(
            ran.err.lines().any(|line| line.starts_with("error: ")),
            "{shown}"
        );
        assert!(!ran.err.contains("panicked"), "{shown}");
        for part in parts {
            assert!(
                ran.err.contains(part),
                "no `{part}` in the output of {shown}"
            );
        }
        ran
    }

    /// A fit that takes a moment: `args` after the flags that every fit here needs.
    pub(crate) fn fit(&self, args: &[&str]) -> Ran {
        self.ok(&fit_args(args))
    }
}

/// The flags of a short fit on `photos/`, and `args`.
pub(crate) fn fit_args<'a>(args: &[&'a str]) -> Vec<&'a str> {
    let mut all = vec![
        "fit", "--clip", "CLIP", "--method", "coop", "--set", "n_ctx=2", "--batch", "4",
    ];
    if !args.contains(&"--images") {
        all.extend(["--images", "photos"]);
    }
    if !args.contains(&"--epochs") {
        all.extend(["--epochs", "2"]);
    }
    if !args.contains(&"-o") {
        all.extend(["-o", "prompt.safetensors"]);
    }
    all.extend(args);
    all
}

pub(crate) fn finish(mut command: Command) -> Ran {
    let output = command.output().unwrap();
    Ran {
        code: output.status.code(),
        out: String::from_utf8(output.stdout).unwrap(),
        err: String::from_utf8(output.stderr).unwrap(),
    }
}
