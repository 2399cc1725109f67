//! A method's settings from a file's table and from flags, each value remembering where it was written.

use anyhow::{Result, anyhow, bail};
use cliptune::method::{AnyMethod, Entry, lay_over};
use cliptune::{Error, registry};
use serde_json::{Map, Value};

/// One setting as somebody wrote it.
#[derive(Clone, Debug)]
pub(crate) struct Setting {
    /// Its name in pieces: `train`, `optimizer`, `momentum`.
    path: Vec<String>,
    value: Value,
    /// Where it was written, for messages: `--set n_ctx=0` or `fit.toml:7: config.n_ctx = 0`.
    origin: String,
}

impl Setting {
    /// From `--set KEY=VALUE`. The value is TOML; what is no TOML is taken as a word.
    pub(crate) fn from_flag(text: &str) -> Result<Self> {
        let origin = format!("--set {text}");
        let Some((key, value)) = text.split_once('=') else {
            bail!("{origin}: expected KEY=VALUE, for example --set n_ctx=4");
        };
        let path: Vec<String> = key
            .trim()
            .split('.')
            .map(|part| part.trim().to_owned())
            .collect();
        if path.iter().any(String::is_empty) {
            bail!("{origin}: the key is empty or has an empty part; expected KEY=VALUE");
        }
        if value.trim().is_empty() {
            bail!("{origin}: the value is missing; expected KEY=VALUE");
        }
        let value = parse_value(value.trim(), &origin)?;
        Ok(Self {
            path,
            value,
            origin,
        })
    }

    /// A flag that is another name for a setting (`--epochs` for `train.epochs`).
    pub(crate) fn from_alias(flag: &str, key: &str, value: impl Into<Value>) -> Self {
        let value = value.into();
        Self {
            path: key.split('.').map(str::to_owned).collect(),
            origin: format!("{flag} {value}"),
            value,
        }
    }

    /// A setting read from a file.
    pub(crate) fn from_file(
        path: Vec<String>,
        value: &toml::Value,
        origin: String,
    ) -> Result<Self> {
        let value = to_json(value, &origin)?;
        Ok(Self {
            path,
            value,
            origin,
        })
    }

    fn key(&self) -> String {
        self.path.join(".")
    }
}

fn parse_value(text: &str, origin: &str) -> Result<Value> {
    match toml::from_str::<toml::Table>(&format!("value = {text}")) {
        Ok(table) if table.len() == 1 => match table.get("value") {
            Some(value) => to_json(value, origin),
            None => Ok(Value::from(text)),
        },
        Err(e) if text.starts_with(['[', '{', '"', '\'']) => {
            Err(anyhow!("{origin}: the value is malformed: {}", e.message()))
        }
        _ => Ok(Value::from(text)),
    }
}

fn to_json(value: &toml::Value, origin: &str) -> Result<Value> {
    if value.as_float().is_some_and(|number| !number.is_finite()) {
        bail!("{origin}: expected a finite number");
    }
    Ok(serde_json::to_value(value)?)
}

/// The method with `file` over its defaults and `flags` over both.
///
/// # Errors
/// Names the setting, where it was written, and what was expected.
pub(crate) fn configure(
    entry: &Entry,
    file: &[Setting],
    flags: &[Setting],
) -> Result<Box<dyn AnyMethod>> {
    let defaults = (entry.defaults)();
    let config = layered(&defaults, file, flags);
    for setting in file.iter().chain(flags) {
        check_key(entry, &defaults, &config, setting)?;
    }
    (entry.configure)(&config).map_err(|error| {
        // The setting without which there would be no error.
        let without = |list: &[Setting], index: usize| {
            let mut list = list.to_vec();
            list.remove(index);
            list
        };
        let accepted = |file: &[Setting], flags: &[Setting]| {
            (entry.configure)(&layered(&defaults, file, flags)).is_ok()
        };
        let in_flags = (0..flags.len())
            .rev()
            .find(|&i| accepted(file, &without(flags, i)));
        let in_file = (0..file.len())
            .rev()
            .find(|&i| accepted(&without(file, i), flags));
        let culprit = match (in_flags, in_file) {
            (Some(i), _) => flags.get(i),
            (None, Some(i)) => file.get(i),
            (None, None) => None,
        };
        let message = in_words(&error);
        match culprit {
            Some(setting) => anyhow!("{}: {message}", setting.origin),
            None => anyhow!("settings of {}: {message}", entry.slug),
        }
    })
}

/// A refusal without the names of Rust's types.
fn in_words(error: &Error) -> String {
    let mut message = match error {
        // The whole was read at once, and the refusal names no key.
        Error::Config { key, expected, .. } if key == "settings" => expected.clone(),
        error => error.to_string(),
    };
    for (theirs, ours) in [
        ("expected usize", "expected a whole number"),
        ("expected u64", "expected a whole number"),
        ("expected f64", "expected a number"),
        ("expected a boolean", "expected true or false"),
        (
            "expected internally tagged enum",
            "expected a table with a `kind`, as",
        ),
    ] {
        message = message.replace(theirs, ours);
    }
    message
}

fn layered(defaults: &Value, file: &[Setting], flags: &[Setting]) -> Value {
    let mut config = defaults.clone();
    for layer in [file, flags] {
        let mut tree = Value::Object(Map::new());
        for setting in layer {
            insert(&mut tree, &setting.path, &setting.value);
        }
        lay_over(&mut config, &tree);
    }
    config
}

fn insert(tree: &mut Value, path: &[String], value: &Value) {
    let Some((first, rest)) = path.split_first() else {
        *tree = value.clone();
        return;
    };
    if !tree.is_object() {
        *tree = Value::Object(Map::new());
    }
    if let Value::Object(table) = tree {
        insert(
            table.entry(first.clone()).or_insert(Value::Null),
            rest,
            value,
        );
    }
}

/// Refuses a key that the method does not have, as far as its defaults show; the rest is the method's to refuse.
fn check_key(entry: &Entry, defaults: &Value, config: &Value, setting: &Setting) -> Result<()> {
    let (mut known, mut present) = (defaults, config);
    for (depth, part) in setting.path.iter().enumerate() {
        let Value::Object(table) = known else {
            return Ok(());
        };
        if table.contains_key("kind") && table.get("kind") != present.get("kind") {
            return Ok(());
        }
        let Some(next) = table.get(part) else {
            let prefix = |key: &str| {
                let mut path = setting.path[..depth].to_vec();
                path.push(key.to_owned());
                path.join(".")
            };
            let all: Vec<String> = table.keys().map(|key| prefix(key)).collect();
            let meant = registry::closest(&prefix(part), all.iter().map(String::as_str));
            let way_out = match meant {
                Some(meant) => format!("did you mean `{meant}`?"),
                None => format!("it has {}", all.join(", ")),
            };
            bail!(
                "{}: {} has no setting `{}`; {way_out} (`cliptune describe {}` lists all)",
                setting.origin,
                entry.slug,
                setting.key(),
                entry.slug
            );
        };
        known = next;
        present = present.get(part).unwrap_or(&Value::Null);
    }
    Ok(())
}

#[cfg(all(test, feature = "text-pt"))]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn coop(sets: &[&str]) -> Result<Value> {
        let flags: Vec<Setting> = sets
            .iter()
            .map(|set| Setting::from_flag(set))
            .collect::<Result<_>>()?;
        Ok(configure(&registry::find("coop")?, &[], &flags)?.config())
    }

    #[test]
    fn values_are_toml_and_words_need_no_quotes() -> Result<()> {
        let config = coop(&[
            "ctx_init=a photo of a",
            "train.optimizer.momentum=0",
            "class_token_position=\"front\"",
            "train.lr = 1e-3",
        ])?;
        assert_eq!(config["ctx_init"], "a photo of a");
        assert_eq!(config["train"]["optimizer"]["momentum"], 0.0);
        assert_eq!(config["train"]["optimizer"]["weight_decay"], 5e-4);
        assert_eq!(config["class_token_position"], "front");
        assert_eq!(config["train"]["lr"], 1e-3);
        Ok(())
    }

    #[test]
    fn another_kind_starts_from_its_own_defaults() -> Result<()> {
        let config = coop(&[
            "train.optimizer.weight_decay=0.1",
            "train.optimizer.kind=adamw",
        ])?;
        let optimizer = &config["train"]["optimizer"];
        assert_eq!(optimizer["weight_decay"], 0.1);
        assert_eq!(optimizer["eps"], 1e-8);
        assert!(optimizer.get("momentum").is_none());
        Ok(())
    }

    #[test]
    fn flags_win_over_the_file() -> Result<()> {
        let file = [
            Setting::from_alias("x", "n_ctx", 8),
            Setting::from_alias("x", "train.lr", 0.5),
        ];
        let flags = [Setting::from_flag("n_ctx=4")?];
        let config = configure(&registry::find("coop")?, &file, &flags)?.config();
        assert_eq!(
            (&config["n_ctx"], &config["train"]["lr"]),
            (&4.into(), &0.5.into())
        );
        Ok(())
    }

    #[test]
    fn refusals_name_what_was_written() {
        let message = |sets: &[&str]| coop(sets).unwrap_err().to_string();
        assert!(
            message(&["n_ctxx=4"])
                .starts_with("--set n_ctxx=4: coop has no setting `n_ctxx`; did you mean `n_ctx`?")
        );
        assert!(message(&["train.bath_size=4"]).contains("did you mean `train.batch_size`?"));
        assert!(
            message(&["n_ctx=abc", "train.lr=1"]).starts_with(
                "--set n_ctx=abc: invalid type: string \"abc\", expected a whole number"
            )
        );
        assert!(message(&["train.lr=1", "n_ctx=0"]).starts_with("--set n_ctx=0: "));
        assert!(message(&["train.lr=nan"]).contains("finite number"));
        assert!(message(&["n_ctx"]).contains("KEY=VALUE"));
        assert!(message(&["n_ctx="]).contains("value is missing"));
        assert!(message(&["a..b=1"]).contains("empty part"));
        assert!(message(&["ctx_init=\"a"]).contains("malformed"));
        assert!(
            message(&["train.optimizer.kind=adam", "train.optimizer.momentum=0.9"])
                .contains("momentum")
        );
        assert!(
            message(&["train.schedule.decay.kind=single_step"]).contains("missing field `step`")
        );
    }

    proptest! {
        #[test]
        fn no_setting_panics(text in "[a-z_.]{0,12}=?[a-z0-9\\[\\]{}\".,=\n -]{0,12}") {
            let _ = coop(&[&text]);
        }
    }
}
