//! A page of the guide, taken apart.

use std::path::{Path, PathBuf};

use serde_json::Value;

/// A page below `docs/`.
#[derive(Debug)]
pub(crate) struct Page {
    /// Its name without the ending; a method's page has the method's slug.
    pub(crate) name: String,
    pub(crate) text: String,
}

fn docs() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs")
}

impl Page {
    fn at(path: &Path) -> Self {
        let name = path.file_stem().unwrap().to_str().unwrap().to_owned();
        let text = std::fs::read_to_string(path);
        let text = text.unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        Self { name, text }
    }

    /// `docs/NAME.md`.
    pub(crate) fn read(name: &str) -> Self {
        Self::at(&docs().join(format!("{name}.md")))
    }

    /// A method's page.
    pub(crate) fn of_method(slug: &str) -> Self {
        Self::at(&docs().join(format!("methods/{slug}.md")))
    }

    /// Every file of `docs/methods`, by name.
    pub(crate) fn of_methods() -> Vec<Self> {
        let entries = std::fs::read_dir(docs().join("methods")).unwrap();
        let mut paths: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
        paths.sort();
        paths.iter().map(|path| Self::at(path)).collect()
    }

    /// Where it lies.
    pub(crate) fn path(&self) -> PathBuf {
        let of_method = docs().join(format!("methods/{}.md", self.name));
        match of_method.exists() {
            true => of_method,
            false => docs().join(format!("{}.md", self.name)),
        }
    }

    /// The contents of its `sh` blocks.
    pub(crate) fn scripts(&self) -> Vec<&str> {
        let blocks = self.text.split("\n```sh\n").skip(1);
        let ended = blocks.map(|block| block.split_once("\n```").map(|(script, _)| script));
        ended
            .collect::<Option<_>>()
            .unwrap_or_else(|| panic!("{self}: a block has no end"))
    }

    /// Names and defaults in the tables whose heading begins with `setting | default`.
    pub(crate) fn settings(&self) -> Vec<(String, String)> {
        let mut settings = Vec::new();
        let mut inside = false;
        for line in self.text.lines() {
            let cells: Vec<&str> = line.split('|').map(str::trim).collect();
            let ["", name, default, ..] = cells[..] else {
                inside = false;
                continue;
            };
            match (name, default) {
                ("setting", "default") => inside = true,
                ("---", "---") => {}
                _ if inside => {
                    let plain = |cell: &str| cell.trim_matches('`').to_owned();
                    settings.push((plain(name), plain(default)));
                }
                _ => {}
            }
        }
        settings
    }

    /// Targets of its links.
    pub(crate) fn links(&self) -> Vec<&str> {
        let after = self.text.split("](").skip(1);
        after
            .map(|rest| rest.split(')').next().unwrap_or(rest))
            .collect()
    }
}

impl std::fmt::Display for Page {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "docs page {}", self.name)
    }
}

/// Settings that hold no further ones, by name with dots.
pub(crate) fn leaves(config: &Value) -> Vec<(String, Value)> {
    let Value::Object(table) = config else {
        return Vec::new();
    };
    let each = |(key, value): (&String, &Value)| match value {
        Value::Object(_) => {
            let below = leaves(value).into_iter();
            below
                .map(|(name, value)| (format!("{key}.{name}"), value))
                .collect()
        }
        value => vec![(key.clone(), value.clone())],
    };
    table.iter().flat_map(each).collect()
}

/// Whether a table's cell, in TOML or `not set`, means `value`.
pub(crate) fn says(cell: &str, value: &Value) -> bool {
    if cell == "not set" {
        return value.is_null();
    }
    let read = toml::from_str::<toml::Table>(&format!("value = {cell}"));
    let read = read
        .ok()
        .and_then(|table| serde_json::to_value(&table["value"]).ok());
    read.is_some_and(|read| match (read.as_f64(), value.as_f64()) {
        (Some(read), Some(value)) => read == value,
        _ => read == *value,
    })
}
