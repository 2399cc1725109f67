//! What a person does: learn, measure, use.

use cliptune::prompt_file::PromptFile;

use crate::support::{CLASSES, Scene, fixture};

#[test]
fn learn_measure_and_use() {
    let scene = Scene::with_photos(6);
    let fit = scene.fit(&[
        "--shots",
        "2",
        "--epochs",
        "20",
        "--set",
        "class_specific=true",
        "--lr",
        "0.1",
    ]);
    assert_eq!(fit.out, "");
    assert!(
        fit.err.contains("given by") || fit.err.contains("50/20/30"),
        "{}",
        fit.err
    );
    assert!(fit.err.contains("cliptune eval --clip"), "{}", fit.err);
    assert_eq!(scene.names(), ["cache", "photos", "prompt.safetensors"]);

    let eval = [
        "eval",
        "--clip",
        "CLIP",
        "--images",
        "photos",
        "--prompt",
        "prompt.safetensors",
    ];
    let json = scene.ok(&[&eval[..], &["--json"]].concat()).json();
    assert_eq!(json["method"], "coop");
    assert_eq!(json["split"], "test");
    assert_eq!(json["skipped_images"], 0);
    assert_eq!(json["classes"].as_array().unwrap().len(), CLASSES.len());
    let sum = |key: &str| -> u64 {
        json["per_class"]
            .as_array()
            .unwrap()
            .iter()
            .map(|class| class[key].as_u64().unwrap())
            .sum()
    };
    assert_eq!(json["total"], sum("total"));
    assert_eq!(json["correct"], sum("correct"));
    let accuracy = 100.0 * sum("correct") as f64 / sum("total") as f64;
    assert_eq!(json["accuracy"].as_f64().unwrap(), accuracy);
    // One colour per class: far above the 25 % of chance.
    assert!(accuracy > 60.0, "{accuracy}");

    let all = scene.ok(&[&eval[..], &["--json", "--split", "all"]].concat());
    assert_eq!(all.json()["total"], 6 * CLASSES.len());
    assert!(
        all.err.contains("trained on images of this data"),
        "{}",
        all.err
    );

    let table = scene.ok(&eval);
    assert!(table.out.starts_with("accuracy  "), "{}", table.out);
    for (class, _) in CLASSES {
        assert!(table.out.contains(class), "{}", table.out);
    }

    let predict = [
        "predict",
        "--clip",
        "CLIP",
        "--prompt",
        "prompt.safetensors",
        "photos",
        "-k",
        "2",
    ];
    let json = scene
        .ok(&[&predict[..], &["--format", "json"]].concat())
        .json();
    let images = json.as_array().unwrap();
    assert_eq!(images.len(), 6 * CLASSES.len());
    let right = images.iter().filter(|image| {
        let best = image["predictions"][0]["class"].as_str().unwrap();
        image["image"].as_str().unwrap().contains(best)
    });
    assert_eq!(
        right.count(),
        all.json()["correct"].as_u64().unwrap() as usize
    );
    let csv = scene.ok(&[&predict[..], &["--format", "csv"]].concat()).out;
    let lines: Vec<&str> = csv.lines().collect();
    assert_eq!(lines[0], "image,rank,class,probability");
    assert_eq!(lines.len(), 1 + 2 * images.len());
    scene.ok(&[&predict[..], &["--format", "csv", "-o", "out.csv"]].concat());
    assert_eq!(scene.read("out.csv"), csv.as_bytes());
    let one = scene
        .ok(&[&predict[..5], &["photos/airplane/0.png", "-k", "9"]].concat())
        .out;
    assert_eq!(one.lines().count(), 1 + CLASSES.len(), "{one}");
}

#[test]
fn probabilities_add_up() {
    let scene = Scene::with_photos(1);
    let args = [
        "predict",
        "--clip",
        "CLIP",
        "--classes",
        "airplane,motorbike,T-shirt",
        "photos",
        "--format",
        "json",
    ];
    for image in scene.ok(&args).json().as_array().unwrap() {
        let predictions = image["predictions"].as_array().unwrap();
        let p: Vec<f64> = predictions
            .iter()
            .map(|p| p["probability"].as_f64().unwrap())
            .collect();
        assert!((p.iter().sum::<f64>() - 1.0).abs() < 1e-9, "{p:?}");
        assert!(p.is_sorted_by(|a, b| a >= b), "{p:?}");
    }
}

#[test]
fn csv_lists_and_split_files_are_data_sets() {
    let scene = Scene::with_photos(6);
    let mut csv = "path,label,split\n".to_owned();
    let mut lists = serde_json::json!({"train": [], "val": [], "test": []});
    for (label, (class, _)) in CLASSES.iter().enumerate() {
        for (i, split) in ["train", "train", "train", "val", "test", "test"]
            .iter()
            .enumerate()
        {
            csv.push_str(&format!("photos/{class}/{i}.png,{class},{split}\n"));
            let entry = serde_json::json!([format!("{class}/{i}.png"), label, class]);
            lists[*split].as_array_mut().unwrap().push(entry);
        }
    }
    scene.write("list.csv", csv);
    scene.write("coop/split_zhou_photos.json", lists.to_string());
    for (class, colour) in CLASSES {
        for i in 0..6 {
            scene.photo(&format!("coop/images/{class}/{i}.png"), colour, i);
        }
    }
    for images in ["list.csv", "coop", "coop/split_zhou_photos.json"] {
        let fit = scene.fit(&["--images", images, "--shots", "2"]);
        assert!(fit.err.contains("12 train, 4 val, 8 test"), "{}", fit.err);
        assert!(fit.err.contains("8 images of 4 classes"), "{}", fit.err);
        let eval = [
            "eval",
            "--clip",
            "CLIP",
            "--images",
            images,
            "--prompt",
            "prompt.safetensors",
            "--json",
        ];
        assert_eq!(scene.ok(&eval).json()["total"], 8);
        let val = scene.ok(&[&eval[..], &["--split", "val"]].concat());
        assert_eq!(val.json()["total"], 4);
    }
}

#[test]
fn a_file_says_what_flags_say() {
    let scene = Scene::with_photos(3);
    scene.fit(&[
        "--shots",
        "1",
        "--seed",
        "3",
        "--set",
        "train.optimizer.momentum=0",
    ]);
    let flags = scene.read("prompt.safetensors");
    let file = format!(
        "clip = {:?}\nimages = \"../photos\"\nmethod = \"coop\"\nshots = 1\nseed = 3\nout = \"../prompt.safetensors\"\nepochs = 7\nbatch = 4\n[config]\nn_ctx = 2\n[config.train.optimizer]\nmomentum = 0\n",
        crate::support::clip()
    );
    scene.write("deep/fit.toml", file);
    scene.ok(&["fit", "--config", "deep/fit.toml", "--epochs", "2"]);
    assert!(
        scene.read("prompt.safetensors") == flags,
        "the prompts differ"
    );
}

#[test]
fn several_data_sets_are_learned_together() {
    let scene = Scene::with_photos(6);
    for (set, class) in [("a", 0), ("a", 1), ("b", 2), ("b", 3)] {
        let (name, _) = CLASSES[class];
        let (from, to) = (format!("photos/{name}"), format!("{set}/{name}"));
        std::fs::create_dir_all(scene.path(set)).unwrap();
        std::fs::rename(scene.path(&from), scene.path(&to)).unwrap();
    }
    let fit = |method: &str, out: &str, args: &[&str]| {
        let fit = [
            "fit", "--clip", "CLIP", "--images", "a", "--images", "b", "--method", method,
            "--epochs", "1", "--batch", "4", "-o", out,
        ];
        scene.ok(&[&fit[..], args].concat())
    };
    for (method, args) in [
        ("coop", &["--set", "n_ctx=2"][..]),
        (
            "mvlpt",
            &["--set", "task_mask=neg_inf", "--set", "train.keep=best_val"],
        ),
    ] {
        fit(method, method, args);
        let file = PromptFile::load(&scene.path(method)).unwrap();
        assert_eq!(file.classes.names(), CLASSES.map(|(name, _)| name));
        // Each is measured among its own classes.
        for set in ["a", "b"] {
            let eval = [
                "eval", "--clip", "CLIP", "--images", set, "--prompt", method, "--json",
            ];
            assert_eq!(
                scene.ok(&eval).json()["per_class"]
                    .as_array()
                    .unwrap()
                    .len(),
                2
            );
        }
    }
    let file = PromptFile::load(&scene.path("mvlpt")).unwrap();
    let tasks = serde_json::json!([{"name": "a", "n_cls": 2}, {"name": "b", "n_cls": 2}]);
    assert_eq!(file.config["tasks"], tasks);
    // The same as a list in a file; twice the same is no two tasks.
    let config = "images = [\"a\", \"b\"]\ninit = \"coop\"\nmethod = \"coop\"\nepochs = 1\n[config]\nn_ctx = 2\n";
    scene.write("fit.toml", config);
    scene.ok(&[
        "fit", "--config", "fit.toml", "--clip", "CLIP", "-o", "again",
    ]);
    let twice = [
        "fit", "--clip", "CLIP", "--images", "a", "--images", "a", "--method", "mvlpt", "-o", "p",
    ];
    scene.refused(&twice, &["a name that no other task has"]);
}

#[test]
fn zero_shot_needs_no_prompt() {
    let scene = Scene::with_photos(3);
    let eval = |args: &[&str]| {
        let json = scene
            .ok(&[
                &["eval", "--clip", "CLIP", "--images", "photos", "--json"],
                args,
            ]
            .concat())
            .json();
        assert_eq!(json["method"], "zeroshot");
        assert_eq!(json["total"], 4);
    };
    eval(&[]);
    eval(&[
        "--template",
        "a photo of a {}.",
        "--template",
        "art of the {}.",
    ]);
    eval(&["--ensemble", "select7"]);
    eval(&["--dataset", "oxford_pets"]);
    scene.write("names.txt", "airplane\nT-shirt\n");
    let args = [
        "predict",
        "--clip",
        "CLIP",
        "--classes",
        "names.txt",
        "photos/airplane/0.png",
        "--template",
        "{} texture.",
    ];
    assert!(scene.ok(&args).out.contains("T-shirt"));
}

#[test]
fn base_classes_serve_new_ones() {
    let scene = Scene::with_photos(3);
    scene.fit(&["--shots", "1", "--subset", "base"]);
    let eval = [
        "eval",
        "--clip",
        "CLIP",
        "--images",
        "photos",
        "--prompt",
        "prompt.safetensors",
        "--json",
    ];
    let new = scene.ok(&[&eval[..], &["--subset", "new"]].concat()).json();
    assert_eq!(
        new["classes"],
        serde_json::json!(["golden_retriever", "motorbike"])
    );
    assert_eq!(new["total"], 2);
    scene.fit(&[
        "--shots",
        "1",
        "--subset",
        "base",
        "--set",
        "class_specific=true",
    ]);
    scene.refused(
        &[&eval[..], &["--subset", "new"]].concat(),
        &["photos", "class-specific", "other classes"],
    );
}

#[test]
fn authors_checkpoints_become_prompts() {
    let scene = Scene::with_photos(1);
    let checkpoint = fixture("coop/checkpoint-dassl/prompt_learner/model.pth.tar-5");
    let checkpoint = checkpoint.display().to_string();
    let import = [
        "import",
        "--clip",
        "CLIP",
        "--method",
        "coop",
        "--checkpoint",
        &checkpoint,
        "-o",
        "p.safetensors",
    ];
    scene.ok(&[
        &import[..],
        &["--classes", "golden_retriever,motorbike,airplane"],
    ]
    .concat());
    let shown = scene.ok(&["inspect", "--prompt", "p.safetensors"]).json();
    assert_eq!(shown["config"]["n_ctx"], 4);
    assert_eq!(shown["tensors"]["ctx"], serde_json::json!([4, 128]));
    assert_eq!(shown["notes"]["epoch"], 5);
    scene.ok(&[
        "predict",
        "--clip",
        "CLIP",
        "--prompt",
        "p.safetensors",
        "photos",
    ]);
    scene.ok(&[
        &import[..],
        &["--images", "photos", "--set", "class_token_position=front"],
    ]
    .concat());
    let shown = scene.ok(&["inspect", "--prompt", "p.safetensors"]).json();
    assert_eq!(shown["config"]["class_token_position"], "front");
    assert_eq!(shown["classes"].as_array().unwrap().len(), CLASSES.len());
}

#[test]
fn methods_are_listed_and_described() {
    let scene = Scene::empty();
    assert!(scene.ok(&["list"]).out.contains("coop"));
    let list = scene.ok(&["list", "--json"]).json();
    for method in list.as_array().unwrap() {
        let slug = method["method"].as_str().unwrap();
        assert!(scene.ok(&["describe", slug]).out.contains("[config]"));
        let described = scene.ok(&["describe", slug, "--json"]).json();
        assert_eq!(described["paper"], method["paper"]);
    }
    let weights = scene.ok(&["inspect", "--clip", "CLIP"]).json();
    assert_eq!(weights["arch"]["embed_dim"], 96);
}

#[test]
fn quiet_is_quiet() {
    let scene = Scene::with_photos(3);
    assert_eq!(scene.fit(&["--quiet"]).err, "");
    let args = [
        "eval",
        "-q",
        "--clip",
        "CLIP",
        "--images",
        "photos",
        "--prompt",
        "prompt.safetensors",
    ];
    assert_eq!(scene.ok(&args).err, "");
}
