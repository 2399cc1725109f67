//! What each contestant is, in the registry's words.

use std::collections::BTreeMap;

use cliptune::method::Entry;
use cliptune::registry;
use serde_json::Value;

use super::html::escape;
use super::words::{listed, named};
use crate::reproduce::record::Record;
use crate::reproduce::summary::{Results, Who};

/// Every contestant with its mark: what it does, what it learns, what that costs, where it was published.
pub(super) fn methods(results: &Results) -> String {
    let mut contestants: BTreeMap<Who, &Record> = BTreeMap::new();
    for record in results.all() {
        contestants
            .entry(results.who_made(record))
            .or_insert(record);
    }
    let entries: String = contestants
        .iter()
        .filter_map(|(who, record)| Some(told(who, record, &registry::find(&record.method).ok()?)))
        .collect();
    match entries.is_empty() {
        true => String::new(),
        false => format!(
            "<p>Marks and colours are the same in all charts below. Numbers of vectors and other settings are under <a href=\"#setting\">What was run</a>.</p>\n<dl class=\"methods\">{entries}</dl>\n"
        ),
    }
}

fn told(who: &Who, record: &Record, entry: &Entry) -> String {
    let paper = &entry.paper;
    let mut text = match who.slug == entry.slug {
        true => escape(entry.summary).into_owned(),
        false => format!(
            "{} with {}.",
            escape(entry.name),
            escape(&listed(&differences(&record.config, &(entry.defaults)())))
        ),
    };
    if who.slug == entry.slug {
        text.push_str(&format!(
            " <small>Learned: {}. A step costs: {}. {}, arXiv {}.</small>",
            escape(entry.learns),
            escape(entry.cost),
            escape(paper.venue),
            escape(paper.arxiv)
        ));
    }
    format!("<dt>{}</dt><dd>{text}</dd>", named(who))
}

/// Settings of a variant that are not the method's defaults, as `class_specific = true`; those that the benchmark sets for all
/// (sentences, training) are left out.
fn differences(config: &Value, defaults: &Value) -> Vec<String> {
    let (Value::Object(config), Value::Object(defaults)) = (config, defaults) else {
        return Vec::new();
    };
    let differs = |(key, value): &(&String, &Value)| {
        !["train", "template", "templates"].contains(&key.as_str())
            && defaults.get(*key) != Some(*value)
    };
    let shown = |(key, value): (&String, &Value)| format!("{key} = {value}");
    config.iter().filter(differs).map(shown).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_variant_is_told_by_what_it_changes() {
        let defaults = json!({"class_specific": false, "n_ctx": null, "template": null, "train": {"epochs": 1}});
        let config = json!({"class_specific": true, "n_ctx": 4, "template": "a {}.", "train": {"epochs": 9}});
        assert_eq!(
            differences(&config, &defaults),
            ["class_specific = true", "n_ctx = 4"]
        );
        assert!(differences(&defaults, &defaults).is_empty());
    }
}
