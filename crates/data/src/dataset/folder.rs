//! Class folders.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use super::{Item, Listing, Lists};
use crate::{Error, Result};

/// Extensions of the files that can be decoded.
const EXTENSIONS: [&str; 4] = ["jpg", "jpeg", "jpe", "png"];

/// The names that make a sub-folder a split, by list.
const SPLITS: [&[&str]; 3] = [&["train"], &["val", "valid", "validation"], &["test"]];

fn is_split_name(name: &str) -> bool {
    SPLITS.iter().any(|names| names.contains(&name))
}

/// What is directly in a folder, hidden entries left out, in the order of names.
struct Entries {
    folders: Vec<String>,
    files: Vec<String>,
}

fn entries(folder: &Path) -> Result<Entries> {
    let mut found = Entries {
        folders: Vec::new(),
        files: Vec::new(),
    };
    for entry in std::fs::read_dir(folder).map_err(|e| Error::io(folder, e))? {
        let entry = entry.map_err(|e| Error::io(folder, e))?;
        let name = entry.file_name();
        if name.as_encoded_bytes().first() == Some(&b'.') {
            continue;
        }
        let Some(name) = name.to_str() else {
            return Err(Error::dataset(
                entry.path(),
                "the name is not valid UTF-8; rename it",
            ));
        };
        // Follows links. A dangling one counts as a file and is found missing later.
        match std::fs::metadata(entry.path()) {
            Ok(meta) if meta.is_dir() => found.folders.push(name.to_owned()),
            _ => found.files.push(name.to_owned()),
        }
    }
    found.folders.sort_unstable();
    found.files.sort_unstable();
    Ok(found)
}

/// The images of one class, sorted by path, and a count of the other files.
fn images_below(
    folder: &Path,
    prefix: &str,
    above: &mut Vec<PathBuf>,
    images: &mut Vec<(String, PathBuf)>,
    ignored: &mut BTreeMap<String, usize>,
) -> Result<()> {
    let real = std::fs::canonicalize(folder).map_err(|e| Error::io(folder, e))?;
    if above.contains(&real) {
        return Err(Error::dataset(
            folder,
            "the folder is a link to one that it lies in",
        ));
    }
    above.push(real);
    let Entries { folders, files } = entries(folder)?;
    for file in files {
        let name = format!("{prefix}/{file}");
        if count_or_keep(&file, ignored) {
            images.push((name, folder.join(&file)));
        }
    }
    for sub in folders {
        let prefix = format!("{prefix}/{sub}");
        images_below(&folder.join(&sub), &prefix, above, images, ignored)?;
    }
    above.pop();
    Ok(())
}

/// Whether `file` is an image; counts it by its extension if not.
fn count_or_keep(file: &str, ignored: &mut BTreeMap<String, usize>) -> bool {
    let extension = Path::new(file).extension().and_then(|e| e.to_str());
    let extension = extension.unwrap_or("").to_ascii_lowercase();
    let image = EXTENSIONS.contains(&extension.as_str());
    if !image {
        *ignored.entry(extension).or_default() += 1;
    }
    image
}

pub(super) fn read(path: &Path) -> Result<Listing> {
    let top = entries(path)?;
    let (splits, others): (Vec<&String>, Vec<&String>) =
        top.folders.iter().partition(|name| is_split_name(name));
    // A class may well be called `train`; a split is told by the folders inside it.
    let holds_classes = |name: &&String| holds_folders_only(&path.join(name));
    let given: Vec<bool> = splits.iter().map(holds_classes).collect::<Result<_>>()?;
    if !given.contains(&true) {
        // A data set that keeps its class folders in `images/` and nothing else beside it.
        if top.folders == ["images"] && holds_folders_only(&path.join("images"))? {
            return read(&path.join("images"));
        }
        return read_classes(path, &top);
    }
    if let Some((name, _)) = splits.iter().zip(&given).find(|(_, given)| !**given) {
        let message = "the split folder holds no class folders, or images beside them; expected <class>/<image>";
        return Err(Error::dataset(path.join(name), message));
    }
    if let Some(other) = others.first() {
        return Err(Error::dataset(
            path,
            format!(
                "holds split folders ({}) and other folders (`{other}`); move the others away, or rename classes of these names",
                list(&splits)
            ),
        ));
    }
    read_splits(path, &top)
}

fn list(names: &[&String]) -> String {
    let names: Vec<String> = names.iter().map(|name| format!("`{name}`")).collect();
    names.join(", ")
}

/// Whether `folder` holds folders and no image of its own.
fn holds_folders_only(folder: &Path) -> Result<bool> {
    let inside = entries(folder)?;
    let image = |file: &String| count_or_keep(file, &mut BTreeMap::new());
    Ok(!inside.folders.is_empty() && !inside.files.iter().any(image))
}

fn read_classes(path: &Path, top: &Entries) -> Result<Listing> {
    let mut listing = Listing {
        classes: top.folders.clone(),
        ..Listing::default()
    };
    let mut loose = 0;
    for file in &top.files {
        if count_or_keep(file, &mut listing.ignored) {
            loose += 1;
        }
    }
    if top.folders.is_empty() {
        let found = match loose {
            0 => "holds no class folders".to_owned(),
            n => format!("holds {n} images but no class folders"),
        };
        let message = format!("{found}; expected <class>/<image>, or train/<class>/<image>");
        return Err(Error::dataset(path, message));
    }
    if loose > 0 {
        let message = format!("holds {loose} images outside the class folders; move them into one");
        return Err(Error::dataset(path, message));
    }
    for (label, class) in top.folders.iter().enumerate() {
        let before = listing.files.len();
        add_class(
            &path.join(class),
            class,
            label as u32,
            &mut listing,
            |listing, item| {
                listing.all.push(item);
            },
        )?;
        if listing.files.len() == before {
            let message = "the class folder holds no JPEG or PNG image; remove it or add images";
            return Err(Error::dataset(path.join(class), message));
        }
    }
    Ok(listing)
}

fn add_class(
    folder: &Path,
    prefix: &str,
    label: u32,
    listing: &mut Listing,
    mut add: impl FnMut(&mut Listing, Item),
) -> Result<()> {
    let mut images = Vec::new();
    images_below(
        folder,
        prefix,
        &mut Vec::new(),
        &mut images,
        &mut listing.ignored,
    )?;
    images.sort_unstable();
    for image in images {
        let item = (listing.files.len(), label);
        listing.files.push(image);
        add(listing, item);
    }
    Ok(())
}

fn read_splits(path: &Path, top: &Entries) -> Result<Listing> {
    let mut folders: Vec<Option<String>> = Vec::new();
    let mut names = BTreeSet::new();
    for aliases in SPLITS {
        let mut found = top.folders.iter().filter(|f| aliases.contains(&f.as_str()));
        let folder = found.next().cloned();
        if let (Some(first), Some(second)) = (&folder, found.next()) {
            let message = format!("holds both `{first}` and `{second}`; keep one");
            return Err(Error::dataset(path, message));
        }
        if let Some(folder) = &folder {
            let inside = entries(&path.join(folder))?;
            names.extend(inside.folders);
        }
        folders.push(folder);
    }
    let mut listing = Listing {
        classes: names.into_iter().collect(),
        ..Listing::default()
    };
    for file in &top.files {
        if count_or_keep(file, &mut listing.ignored) {
            let message = format!("image `{file}` lies outside the split folders");
            return Err(Error::dataset(path, message));
        }
    }
    let mut lists = Lists::default();
    let targets = [&mut lists.train, &mut lists.val, &mut lists.test];
    for (folder, items) in folders.into_iter().zip(targets) {
        let Some(folder) = folder else { continue };
        for (label, class) in listing.classes.clone().iter().enumerate() {
            let below = path.join(&folder).join(class);
            if below.is_dir() {
                let prefix = format!("{folder}/{class}");
                add_class(&below, &prefix, label as u32, &mut listing, |_, item| {
                    items.push(item)
                })?;
            }
        }
    }
    let labels: BTreeSet<u32> = [&lists.train, &lists.val, &lists.test]
        .into_iter()
        .flatten()
        .map(|&(_, label)| label)
        .collect();
    let empty = (0..listing.classes.len()).find(|&label| !labels.contains(&(label as u32)));
    if let Some(class) = empty.and_then(|label| listing.classes.get(label)) {
        let message =
            format!("class `{class}` has no JPEG or PNG image in any of the split folders");
        return Err(Error::dataset(path, message));
    }
    listing.given = Some(lists);
    Ok(listing)
}
