use std::fs;
use std::path::Path;

use proptest::prelude::*;

use super::*;
use crate::testing::{TestResult, write_picture, write_text};

fn pictures(root: &Path, names: &[&str]) {
    for (i, name) in names.iter().enumerate() {
        write_picture(&root.join(name), i as u8, (9, 8));
    }
}

fn names(set: &Dataset, items: &[Item]) -> Vec<String> {
    items
        .iter()
        .map(|&(item, _)| set.images.name(item))
        .collect()
}

fn refusal(result: Result<Dataset>) -> String {
    result.unwrap_err().to_string()
}

fn write(path: &Path, bytes: &[u8]) {
    cliptune_core::files::write_atomically(path, |w| w.write_all(bytes)).unwrap();
}

#[test]
fn class_folders() -> TestResult {
    let dir = tempfile::tempdir()?;
    let root = dir.path();
    let listed = [
        "b/2.png",
        "b/10.PNG",
        "b/deep/er/1.jpg",
        "Z/x.jpeg",
        "a_c/y.png",
    ];
    pictures(root, &listed);
    for other in [
        "b/notes.txt",
        "b/.hidden.png",
        ".git/config.png",
        "read.me",
        "a_c/w.webp",
    ] {
        write_text(&root.join(other), "");
    }
    let set = Dataset::open(root)?;
    assert_eq!(set.classes().names(), ["Z", "a_c", "b"]);
    assert_eq!(set.images().len(), 5);
    let all: Vec<String> = (0..5).map(|i| set.images().name(i)).collect();
    assert_eq!(
        all,
        [
            "Z/x.jpeg",
            "a_c/y.png",
            "b/10.PNG",
            "b/2.png",
            "b/deep/er/1.jpg"
        ]
    );
    let ignored: Vec<(&str, usize)> = set
        .ignored()
        .iter()
        .map(|(e, n)| (e.as_str(), *n))
        .collect();
    assert_eq!(ignored, [("me", 1), ("txt", 1), ("webp", 1)]);
    assert_eq!(set.origin(), SplitOrigin::Rule);
    assert_eq!(set.all_as_test()?.items().len(), 5);
    assert_eq!(
        set.counts()[2],
        ClassCounts {
            train: 2,
            val: 0,
            test: 1
        }
    );

    // The same data set in another place, and with `images/` around the classes.
    let other = tempfile::tempdir()?;
    pictures(&other.path().join("images"), &listed);
    let moved = Dataset::open(other.path())?;
    assert_eq!(moved.fingerprint(), set.fingerprint());
    Ok(())
}

#[test]
fn the_rule_is_fixed_and_fair() -> TestResult {
    let dir = tempfile::tempdir()?;
    let root = dir.path();
    let of = |class: &str, n: usize| {
        (0..n)
            .map(|i| format!("{class}/{i:02}.png"))
            .collect::<Vec<_>>()
    };
    let mut all = of("ten", 10);
    for (class, n) in [("one", 1), ("two", 2), ("three", 3), ("five", 5)] {
        all.extend(of(class, n));
    }
    for name in &all {
        write_picture(&root.join(name), 1, (4, 4));
    }
    let set = Dataset::open(root)?;
    let counts: Vec<(usize, usize, usize)> = set
        .counts()
        .iter()
        .map(|c| (c.train, c.val, c.test))
        .collect();
    // five, one, ten, three, two
    assert_eq!(
        counts,
        [(3, 1, 1), (1, 0, 0), (5, 2, 3), (2, 0, 1), (1, 0, 1)]
    );
    // Written down, so that it cannot change unnoticed: it decides what published numbers were measured on.
    let test = names(&set, &set.test);
    let of_ten: Vec<&String> = test
        .iter()
        .filter(|name| name.starts_with("ten/"))
        .collect();
    assert_eq!(of_ten, TEST_OF_TEN);

    // One image more moves few others: each list keeps all of its images but one at most.
    write_picture(&root.join("ten/extra.png"), 1, (4, 4));
    let more = Dataset::open(root)?;
    for (before, after) in [
        (&set.train, &more.train),
        (&set.val, &more.val),
        (&set.test, &more.test),
    ] {
        let after = names(&more, after);
        let lost = names(&set, before)
            .iter()
            .filter(|name| !after.contains(name))
            .count();
        assert!(lost <= 1, "{lost}");
    }
    Ok(())
}

const TEST_OF_TEN: [&str; 3] = ["ten/00.png", "ten/02.png", "ten/04.png"];

#[test]
fn split_folders() -> TestResult {
    let dir = tempfile::tempdir()?;
    let root = dir.path();
    pictures(
        root,
        &[
            "train/b/1.png",
            "train/a/1.png",
            "validation/a/2.png",
            "test/c/3.png",
            "test/a/1.png",
        ],
    );
    let set = Dataset::open(root)?;
    assert_eq!(set.classes().names(), ["a", "b", "c"]);
    assert_eq!(set.origin(), SplitOrigin::Folders);
    assert_eq!(names(&set, &set.train), ["train/a/1.png", "train/b/1.png"]);
    assert_eq!(names(&set, &set.val), ["validation/a/2.png"]);
    assert_eq!(
        set.test()?.items().iter().map(|i| i.1).collect::<Vec<_>>(),
        [0, 2]
    );
    assert!(
        set.all_as_test()
            .unwrap_err()
            .to_string()
            .contains("sub-folders")
    );

    pictures(root, &["extra/1.png"]);
    assert!(refusal(Dataset::open(root)).contains("`extra`"));
    fs::remove_dir_all(root.join("extra"))?;
    pictures(root, &["val/a/2.png"]);
    assert!(refusal(Dataset::open(root)).contains("both `val` and `validation`"));
    fs::remove_dir_all(root.join("val"))?;
    pictures(root, &["test/loose.png"]);
    assert!(refusal(Dataset::open(root)).contains("test: the split folder holds no class folders"));

    // A class that happens to be called `train`.
    let vehicles = tempfile::tempdir()?;
    pictures(vehicles.path(), &["train/1.png", "car/1.png"]);
    assert_eq!(
        Dataset::open(vehicles.path())?.classes().names(),
        ["car", "train"]
    );
    Ok(())
}

#[test]
fn folders_that_are_no_data_set() -> TestResult {
    let dir = tempfile::tempdir()?;
    let root = dir.path();
    assert!(refusal(Dataset::open(root)).contains("no class folders"));
    pictures(root, &["loose.png"]);
    assert!(refusal(Dataset::open(root)).contains("1 images but no class folders"));
    pictures(root, &["a/1.png"]);
    assert!(refusal(Dataset::open(root)).contains("outside the class folders"));
    fs::remove_file(root.join("loose.png"))?;
    write_text(&root.join("empty/readme.txt"), "");
    assert!(refusal(Dataset::open(root)).contains("empty: the class folder holds no"));
    assert!(refusal(Dataset::open(&root.join("none"))).contains("none"));
    assert!(refusal(Dataset::open(&root.join("empty/readme.txt"))).contains("not a data set"));
    Ok(())
}

#[cfg(unix)]
#[test]
fn a_link_in_a_circle_is_refused() -> TestResult {
    let dir = tempfile::tempdir()?;
    pictures(dir.path(), &["a/1.png"]);
    std::os::unix::fs::symlink(dir.path().join("a"), dir.path().join("a/again"))?;
    assert!(refusal(Dataset::open(dir.path())).contains("again"));
    Ok(())
}

#[test]
fn csv_files() -> TestResult {
    let dir = tempfile::tempdir()?;
    pictures(dir.path(), &["p/1.png", "p/2.png", "3.png"]);
    let file = dir.path().join("list.csv");
    let absolute = dir.path().join("3.png");
    let text = format!(
        "\u{feff}Label, path ,split\nzebra,p/1.png,train\n\"cat, big\",p/2.png,val\nzebra,{},test\n",
        absolute.display()
    );
    write_text(&file, &text);
    let set = Dataset::open(&file)?;
    assert_eq!(set.classes().names(), ["zebra", "cat, big"]);
    assert_eq!(set.origin(), SplitOrigin::Column);
    assert_eq!(set.train()?.items(), [(0, 0)]);
    assert_eq!(set.val()?.items(), [(1, 1)]);
    assert_eq!(set.test()?.items(), [(2, 0)]);

    write_text(&file, "path,label\np/1.png,a\np/2.png,a\n3.png,b\n");
    let set = Dataset::open(&file)?;
    assert_eq!(set.origin(), SplitOrigin::Rule);
    assert_eq!(set.all_as_test()?.len(), 3);

    for (text, line, words) in [
        ("", 1, "no column `path`"),
        ("path;label\n", 1, "unknown column `path;label`"),
        ("path,label,splt\n", 1, "unknown column `splt`"),
        ("path,path,label\n", 1, "twice"),
        ("path,label\na.png\n", 2, "1 fields where the header has 2"),
        ("path,label\na.png,x\n,x\n", 3, "the path is empty"),
        ("path,label\na.png,x\nb.png, \n", 3, "the label is empty"),
        (
            "path,label\na.png,x\n\nb.png,x\na.png,y\n",
            5,
            "already listed in line 2",
        ),
        ("path,label,split\na.png,x,dev\n", 2, "split is `dev`"),
        ("path,label,split\na.png,x,\n", 2, "split is ``"),
    ] {
        write_text(&file, text);
        let message = refusal(Dataset::open(&file));
        assert!(
            message.contains(&format!("list.csv, line {line}: ")),
            "{message}"
        );
        assert!(message.contains(words), "{message}");
    }
    write(&file, b"path,label\na.png,x\nb.png,\xff\n");
    assert!(refusal(Dataset::open(&file)).contains("line 3: the text is not valid UTF-8"));
    write_text(&file, "path,label\n");
    assert!(refusal(Dataset::open(&file)).contains("lists no image"));
    Ok(())
}

const SPLIT: &str = r#"{"train": [["b/1.png", 1, "bee"], ["a/1.png", 0, "ant"]],
 "val": [["./a/2.png", 0, "ant"]],
 "test": [["b/2.png", 1, "bee"]]}"#;

#[test]
fn split_files() -> TestResult {
    let dir = tempfile::tempdir()?;
    let root = dir.path();
    pictures(
        &root.join("images"),
        &["a/1.png", "a/2.png", "b/1.png", "b/2.png"],
    );
    let file = root.join("split_zhou_Insects.json");
    write_text(&file, SPLIT);
    let set = Dataset::open(root)?;
    assert_eq!(set.path(), file);
    assert_eq!(set.origin(), SplitOrigin::SplitFile);
    assert_eq!(set.classes().names(), ["ant", "bee"]);
    assert_eq!(names(&set, &set.train), ["b/1.png", "a/1.png"]);
    assert_eq!(set.train, [(0, 1), (1, 0)]);
    assert_eq!(names(&set, &set.val), ["a/2.png"]);
    assert!(set.images().path(0).unwrap().ends_with("images/b/1.png"));
    assert_eq!(Dataset::open(&file)?.fingerprint(), set.fingerprint());

    // Published sets have other names for the folder.
    fs::rename(root.join("images"), root.join("2750"))?;
    assert!(Dataset::open(root)?.test().is_ok());
    fs::rename(root.join("2750"), root.join("images"))?;

    write_text(&root.join("split_zhou_Other.json"), SPLIT);
    let message = refusal(Dataset::open(root));
    assert!(
        message.contains("split_zhou_Insects.json, split_zhou_Other.json"),
        "{message}"
    );
    fs::remove_file(root.join("split_zhou_Other.json"))?;

    for (from, to, words) in [
        (
            "\"val\"",
            "\"dev\"",
            "line 2, column 6: unknown field `dev`",
        ),
        (
            "[[\"b/1.png\", 1,",
            "[[\"b/1.png\", -1,",
            "line 1, column 25: invalid value",
        ),
        (
            "[[\"b/1.png\", 1,",
            "[[\"b/1.png\" 1,",
            "line 1, column 23: expected",
        ),
        (
            "b/2.png",
            "../b/2.png",
            "test[0], `../b/2.png`: the path must be relative",
        ),
        (
            "b/2.png",
            "/b/2.png",
            "test[0], `/b/2.png`: the path must be relative",
        ),
        ("b/2.png", "x/../../b/2.png", "must be relative"),
        (
            "b/2.png\", 1, \"bee",
            "b/2.png\", 1, \"wasp",
            "label 1 is called `wasp` here and `bee` at `b/1.png`",
        ),
        (
            "b/2.png\", 1, \"bee",
            "b/2.png\", 3, \"wasp",
            "label 3 (`wasp`) is used but label 2 is not",
        ),
        ("b/2.png", "a/1.png", "is in train too"),
        (
            "a/1.png\", 0, \"ant",
            "b/1.png\", 0, \"ant",
            "has label 0 here and 1 elsewhere",
        ),
    ] {
        assert!(SPLIT.contains(from));
        write_text(&file, &SPLIT.replace(from, to));
        let message = refusal(Dataset::open(root));
        assert!(message.contains(words), "{message}");
        assert!(message.contains("split_zhou_Insects.json"), "{message}");
    }
    write_text(&file, r#"{"train": [], "val": [], "test": []}"#);
    assert!(refusal(Dataset::open(root)).contains("lists no image"));
    Ok(())
}

#[test]
fn missing_and_broken_images() -> TestResult {
    let dir = tempfile::tempdir()?;
    let root = dir.path();
    pictures(&root.join("images"), &["a/1.png", "b/1.png", "b/2.png"]);
    write_text(&root.join("split_zhou_X.json"), SPLIT);
    let set = Dataset::open(root)?;
    assert_eq!(set.train()?.len(), 2);
    let message = set.val().unwrap_err().to_string();
    assert!(
        message.ends_with("images/a/2.png: the file is missing"),
        "{message}"
    );
    assert!(set.few_shot(1, 1).is_err());

    write_text(&root.join("images/b/2.png"), "no image");
    let last = std::sync::Mutex::new((0, 0));
    let bad = set.check_images(&|done, total| {
        let mut last = last.lock().unwrap();
        *last = (done.max(last.0), total);
    });
    assert_eq!(last.into_inner()?, (4, 4));
    let names: Vec<&str> = bad.iter().map(|b| b.name.as_str()).collect();
    assert_eq!(names, ["a/2.png", "b/2.png"]);
    let good = set.without(&bad)?;
    assert_eq!(good.skipped(), 2);
    assert_eq!((good.val()?.len(), good.test()?.len()), (0, 0));
    assert!(good.few_shot(1, 1)?.labelled.val.is_none());
    assert!(good.check_images(&|_, _| {}).is_empty());
    assert_ne!(good.fingerprint(), set.fingerprint());

    write_text(&root.join("images/a/1.png"), "");
    let bad = set.check_images(&|_, _| {});
    let message = set.without(&bad).unwrap_err().to_string();
    assert!(
        message.contains("none of the 1 training images of class `ant`"),
        "{message}"
    );
    Ok(())
}

/// Valid text with a few bytes changed, taken out or doubled.
pub(crate) fn damaged(valid: &'static [u8]) -> impl Strategy<Value = Vec<u8>> {
    let edit = (any::<prop::sample::Index>(), 0u8..3, any::<u8>());
    prop::collection::vec(edit, 1..6).prop_map(move |edits| {
        let mut bytes = valid.to_vec();
        for (at, kind, byte) in edits {
            if bytes.is_empty() {
                break;
            }
            let at = at.index(bytes.len());
            match kind {
                0 => bytes[at] = byte,
                1 => drop(bytes.remove(at)),
                _ => bytes.insert(at, byte),
            }
        }
        bytes
    })
}

/// Whatever was accepted must hang together.
fn consistent(listing: &Listing) {
    let Some(lists) = &listing.given else {
        assert!(!listing.all.is_empty());
        return;
    };
    let all = [&lists.train, &lists.val, &lists.test];
    for &(item, label) in all.into_iter().flatten() {
        assert!(item < listing.files.len() && (label as usize) < listing.classes.len());
    }
}

proptest! {
    #[test]
    fn csv_never_panics(bytes in prop_oneof![
        prop::collection::vec(any::<u8>(), 0..200),
        damaged(b"path,label,split\na.png,x,train\n\"b,c\".png,y,test\nd.png,x,val\n"),
    ]) {
        if let Ok(listing) = csv::parse(&bytes, Path::new("f.csv")) {
            consistent(&listing);
        }
    }

    #[test]
    fn split_json_never_panics(bytes in prop_oneof![
        prop::collection::vec(any::<u8>(), 0..200),
        damaged(SPLIT.as_bytes()),
    ]) {
        if let Ok(listing) = split_json::parse(&bytes, Path::new("f.json")) {
            consistent(&listing);
        }
    }

    #[test]
    fn paths_stay_inside(path in "(\\.\\.|\\.|/|a|b){0,6}") {
        if let Some(inside) = split_json::inside(&path) {
            let plain = |part| matches!(part, std::path::Component::Normal(_));
            prop_assert!(Path::new(&inside).components().all(plain));
        }
    }
}
