//! CSV lists.

use std::collections::HashMap;
use std::path::Path;

use super::{Listing, Lists};
use crate::{Error, Result};

const EXPECTED: &str = "expected the columns `path`, `label` and perhaps `split`";

struct Columns {
    path: usize,
    label: usize,
    split: Option<usize>,
}

impl Columns {
    fn of(header: &csv::StringRecord, path: &Path) -> Result<Self> {
        let names: Vec<String> = header
            .iter()
            .map(|name| name.trim().to_ascii_lowercase())
            .collect();
        let wrong = |found: String| Error::line(path, 1, format!("{found}; {EXPECTED}"));
        for (i, name) in names.iter().enumerate() {
            if !["path", "label", "split"].contains(&name.as_str()) {
                return Err(wrong(format!("unknown column `{name}`")));
            }
            if names.iter().take(i).any(|other| other == name) {
                return Err(wrong(format!("column `{name}` is there twice")));
            }
        }
        let find = |wanted: &str| names.iter().position(|name| name == wanted);
        let need =
            |wanted: &str| find(wanted).ok_or_else(|| wrong(format!("no column `{wanted}`")));
        Ok(Self {
            path: need("path")?,
            label: need("label")?,
            split: find("split"),
        })
    }
}

/// Reads the text of a CSV file; `path` is where it lies.
pub(super) fn parse(bytes: &[u8], path: &Path) -> Result<Listing> {
    // Spreadsheets put a byte-order mark in front.
    let bytes = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(bytes);
    let mut reader = csv::ReaderBuilder::new().from_reader(bytes);
    let columns = Columns::of(reader.headers().map_err(|e| csv_error(&e, path))?, path)?;
    let folder = path.parent().unwrap_or(Path::new(""));

    let mut listing = Listing::default();
    let mut lists = Lists::default();
    let mut labels: HashMap<String, u32> = HashMap::new();
    let mut lines: HashMap<String, u64> = HashMap::new();
    for record in reader.records() {
        let record = record.map_err(|e| csv_error(&e, path))?;
        let line = record.position().map_or(0, csv::Position::line);
        let field = |column: usize| record.get(column).unwrap_or("").trim();
        let (file, class) = (field(columns.path), field(columns.label));
        if file.is_empty() || class.is_empty() {
            let which = if file.is_empty() { "path" } else { "label" };
            return Err(Error::line(path, line, format!("the {which} is empty")));
        }
        if let Some(first) = lines.insert(file.to_owned(), line) {
            let message = format!("`{file}` is already listed in line {first}");
            return Err(Error::line(path, line, message));
        }
        let label = match labels.get(class) {
            Some(&label) => label,
            None => {
                let label = listing.classes.len() as u32;
                listing.classes.push(class.to_owned());
                labels.insert(class.to_owned(), label);
                label
            }
        };
        let item = (listing.files.len(), label);
        // Joining leaves an absolute path as it is.
        listing.files.push((file.to_owned(), folder.join(file)));
        match columns.split.map(field) {
            None => listing.all.push(item),
            Some("train") => lists.train.push(item),
            Some("val") => lists.val.push(item),
            Some("test") => lists.test.push(item),
            Some(other) => {
                let message = format!("split is `{other}`, expected train, val or test");
                return Err(Error::line(path, line, message));
            }
        }
    }
    if listing.files.is_empty() {
        return Err(Error::dataset(path, "lists no image"));
    }
    if columns.split.is_some() {
        listing.given = Some(lists);
    }
    Ok(listing)
}

fn csv_error(error: &csv::Error, path: &Path) -> Error {
    let line = error.position().map_or(1, csv::Position::line);
    let message = match error.kind() {
        csv::ErrorKind::UnequalLengths {
            expected_len, len, ..
        } => {
            format!("{len} fields where the header has {expected_len}")
        }
        csv::ErrorKind::Utf8 { .. } => "the text is not valid UTF-8".to_owned(),
        _ => error.to_string(),
    };
    Error::line(path, line, message)
}
