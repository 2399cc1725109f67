//! Split files as CoOp publishes them.

use std::collections::{BTreeMap, HashMap};
use std::path::{Component, Path, PathBuf};

use serde::Deserialize;

use super::{Item, Listing, Lists};
use crate::{Error, Result};

/// `[relative path, label, class name]`.
type Entry = (String, u32, String);

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct SplitFile {
    train: Vec<Entry>,
    val: Vec<Entry>,
    test: Vec<Entry>,
}

/// The one split file in `folder`, if there is one.
pub(super) fn find(folder: &Path) -> Result<Option<PathBuf>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(|e| Error::io(folder, e))? {
        let entry = entry.map_err(|e| Error::io(folder, e))?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.starts_with("split_zhou_") && name.ends_with(".json") {
            found.push(name);
        }
    }
    found.sort_unstable();
    match found.as_slice() {
        [] => Ok(None),
        [name] => Ok(Some(folder.join(name))),
        several => {
            let message = format!(
                "holds several split files: {}; open one of them",
                several.join(", ")
            );
            Err(Error::dataset(folder, message))
        }
    }
}

/// A split file and the folder of its images.
pub(super) fn read(bytes: &[u8], path: &Path) -> Result<Listing> {
    let mut listing = parse(bytes, path)?;
    let root = images_folder(path, &listing.files)?;
    for (name, file) in &mut listing.files {
        *file = root.join(name);
    }
    Ok(listing)
}

/// The text of a split file; files are named, not yet placed.
pub(super) fn parse(bytes: &[u8], path: &Path) -> Result<Listing> {
    let file: SplitFile = serde_json::from_slice(bytes).map_err(|e| Error::json(path, &e))?;
    let mut lists = Lists::default();
    let mut listing = Listing::default();
    let mut classes: BTreeMap<u32, (String, String)> = BTreeMap::new();
    let mut seen: HashMap<String, (usize, u32, &'static str)> = HashMap::new();
    let mut add = |role: &'static str, entries: Vec<Entry>, items: &mut Vec<Item>| -> Result<()> {
        for (position, (file, label, class)) in entries.into_iter().enumerate() {
            let wrong = |message: String| {
                Error::dataset(path, format!("{role}[{position}], `{file}`: {message}"))
            };
            let name = inside(&file).ok_or_else(|| {
                wrong("the path must be relative and stay inside the image folder".into())
            })?;
            let (known, first) = classes
                .entry(label)
                .or_insert_with(|| (class.clone(), file.clone()));
            if *known != class {
                let message =
                    format!("label {label} is called `{class}` here and `{known}` at `{first}`");
                return Err(wrong(message));
            }
            let item = match seen.get(&name) {
                Some(&(_, _, other)) if other != role => {
                    return Err(wrong(format!(
                        "is in {other} too; remove it from one of the lists"
                    )));
                }
                Some(&(_, other, _)) if other != label => {
                    return Err(wrong(format!(
                        "has label {label} here and {other} elsewhere"
                    )));
                }
                Some(&(item, _, _)) => item,
                None => {
                    let item = listing.files.len();
                    seen.insert(name.clone(), (item, label, role));
                    listing.files.push((name, PathBuf::new()));
                    item
                }
            };
            items.push((item, label));
        }
        Ok(())
    };
    add("train", file.train, &mut lists.train)?;
    add("val", file.val, &mut lists.val)?;
    add("test", file.test, &mut lists.test)?;
    if listing.files.is_empty() {
        return Err(Error::dataset(path, "lists no image"));
    }
    for (expected, (label, (class, _))) in classes.into_iter().enumerate() {
        if label as usize != expected {
            let message = format!("label {label} (`{class}`) is used but label {expected} is not");
            return Err(Error::dataset(path, message));
        }
        listing.classes.push(class);
    }
    listing.given = Some(lists);
    Ok(listing)
}

/// The path with plain components only, joined by `/`; none if it leaves its folder.
pub(super) fn inside(path: &str) -> Option<String> {
    let mut parts = Vec::new();
    for component in Path::new(path).components() {
        match component {
            Component::Normal(part) => parts.push(part.to_str()?),
            Component::CurDir => {}
            Component::ParentDir | Component::RootDir | Component::Prefix(_) => return None,
        }
    }
    (!parts.is_empty()).then(|| parts.join("/"))
}

/// Published sets keep their images in `images`, `jpg`, `2750`, ...: the folder where most of a few dozen listed files are.
fn images_folder(path: &Path, files: &[(String, PathBuf)]) -> Result<PathBuf> {
    let beside = path.parent().unwrap_or(Path::new(""));
    let listed = if beside.as_os_str().is_empty() {
        Path::new(".")
    } else {
        beside
    };
    let mut others: Vec<PathBuf> = std::fs::read_dir(listed)
        .map_err(|e| Error::io(listed, e))?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.is_dir())
        .collect();
    others.sort_unstable();
    let mut candidates = vec![beside.join("images"), beside.to_path_buf()];
    candidates.extend(others);
    let step = (files.len() / 32).max(1);
    let hits = |folder: &PathBuf| {
        let sample = files.iter().step_by(step);
        sample
            .filter(|(name, _)| folder.join(name).is_file())
            .count()
    };
    let mut best = (0, None);
    for candidate in candidates {
        let hits = hits(&candidate);
        if hits > best.0 {
            best = (hits, Some(candidate));
        }
    }
    best.1.ok_or_else(|| {
        let first = files.first().map_or("", |(name, _)| name);
        let message = format!(
            "none of the listed images is here; expected `{}` and so on",
            beside.join("images").join(first).display()
        );
        Error::dataset(path, message)
    })
}
