//! `cliptune describe`: one method, with its settings as TOML.

use std::fmt::Write;

use anyhow::Result;
use cliptune::method::Entry;
use cliptune::{ImageNeeds, registry};
use serde_json::{Value, json};

use super::out;
use super::table::wrap;

/// Describe a method and its settings
#[derive(Debug, clap::Args)]
pub(crate) struct Describe {
    /// The method's name, as `cliptune list` prints it
    method: String,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

impl Describe {
    pub(crate) fn run(&self) -> Result<()> {
        let entry = registry::find(&self.method)?;
        if self.json {
            let description = json!({
                "method": entry.slug,
                "name": entry.name,
                "family": entry.family,
                "paper": entry.paper,
                "summary": entry.summary,
                "learns": entry.learns,
                "cost": entry.cost,
                "needs": entry.needs,
                "imports_authors_checkpoints": entry.import.is_some(),
                "settings": (entry.defaults)(),
            });
            return out::result(&format!(
                "{}\n",
                serde_json::to_string_pretty(&description)?
            ));
        }
        out::result(&describe(&entry, out::width())?)
    }
}

fn describe(entry: &Entry, width: usize) -> Result<String> {
    let paper = &entry.paper;
    let needs = match entry.needs {
        ImageNeeds::GlobalFeatures => "one feature per image; images are encoded once and cached",
        ImageNeeds::LocalFeatures => {
            "one feature per image patch; images are encoded once and cached"
        }
        ImageNeeds::Pixels => "pixels; the image tower runs at every step",
    };
    let import = match entry.import {
        Some(_) => "checkpoints of the authors' code, with `cliptune import`",
        None => "nothing",
    };
    let mut text = format!("{} ({})\n\n", entry.name, entry.slug);
    for line in wrap(entry.summary, width) {
        writeln!(text, "{line}")?;
    }
    text.push('\n');
    let paper_line = format!(
        "{}. {}. {}, arXiv {}",
        paper.title, paper.authors, paper.venue, paper.arxiv
    );
    let facts = [
        ("learns", entry.learns),
        ("cost", entry.cost),
        ("reads", needs),
        ("imports", import),
        ("paper", &paper_line),
        ("authors' code", paper.code),
    ];
    for (name, fact) in facts {
        let lines = wrap(fact, width.saturating_sub(15).max(20));
        writeln!(
            text,
            "{name:<13}  {}",
            lines.join(&format!("\n{}", " ".repeat(15)))
        )?;
    }
    text.push_str(
        "\nSettings with their defaults, for the file that `cliptune fit --config` reads\n",
    );
    text.push_str(
        "(on the command line: --set KEY=VALUE, with dots: --set train.optimizer.kind=adam).\n",
    );
    writeln!(
        text,
        "What each of them does: docs/methods/{}.md in the repository.\n",
        entry.slug
    )?;
    text.push_str("[config]\n");
    settings(&mut text, "config", &(entry.defaults)())?;
    Ok(text)
}

/// Settings as TOML below the table `path`: plain values first, then the tables.
fn settings(text: &mut String, path: &str, value: &Value) -> Result<()> {
    let Value::Object(table) = value else {
        return Ok(());
    };
    for (key, value) in table.iter().filter(|(_, value)| !value.is_object()) {
        match value {
            // TOML has no word for "not set".
            Value::Null => writeln!(text, "# {key} =   (not set)")?,
            value => writeln!(text, "{key} = {}", toml::Value::try_from(value)?)?,
        }
    }
    for (key, value) in table.iter().filter(|(_, value)| value.is_object()) {
        let path = format!("{path}.{key}");
        // A table of tables needs no heading of its own.
        if value
            .as_object()
            .is_some_and(|table| table.values().any(|v| !v.is_object()))
        {
            writeln!(text, "\n[{path}]")?;
        }
        settings(text, &path, value)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_printed_can_be_pasted() -> Result<()> {
        for entry in registry::methods() {
            let text = describe(&entry, 80)?;
            let start = text.find("[config]").unwrap();
            let pasted: toml::Table = toml::from_str(&text[start..])?;
            let config = serde_json::to_value(&pasted["config"])?;
            let configured = (entry.configure)(&config)?.config();
            assert_eq!(configured, (entry.defaults)(), "{}", entry.slug);
        }
        Ok(())
    }
}
