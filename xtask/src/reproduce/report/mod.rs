//! `report.html`: one file that holds all it shows, made from the results alone.

mod added;
mod attention;
mod charts;
mod details;
mod few_shot;
mod heat;
mod html;
mod methods;
mod overview;
mod strips;
mod transfer;
mod words;

use std::path::Path;

use self::html::escape;
use super::record::Protocol;
use super::summary::Results;

/// The page. Test pictures are read from below `out`.
pub(crate) fn html(results: &Results, out: &Path) -> String {
    let parts = [
        ("findings", "What came out", overview::findings(results)),
        ("methods", "The methods", methods::methods(results)),
        ("setting", "What was run", overview::setting(results)),
        (
            "few-shot",
            "Few-shot: accuracy and cost",
            few_shot::few_shot(results),
        ),
        ("base-to-new", "Base to new", transfer::base_to_new(results)),
        (
            "cross-dataset",
            "Cross-dataset",
            transfer::elsewhere(results, Protocol::CrossDataset, out),
        ),
        (
            "domain-shift",
            "Domain shift",
            transfer::elsewhere(results, Protocol::DomainShift, out),
        ),
        (
            "multi-task",
            "Many tasks first",
            few_shot::multi_task(results),
        ),
        ("supervised", "Supervised", few_shot::supervised(results)),
        (
            "attention",
            "Where the class token looks",
            attention::attention(results, out),
        ),
        ("classes", "Class by class", details::classes(results)),
        ("pictures", "Test pictures", details::pictures(results, out)),
        (
            "added",
            "What is added to a picture",
            added::added(results, out),
        ),
        (
            "zero-shot",
            "Zero-shot on every task",
            overview::zero_shot(results),
        ),
    ];
    let parts: Vec<_> = parts
        .into_iter()
        .filter(|(_, _, text)| !text.is_empty())
        .collect();
    let links: String = parts
        .iter()
        .map(|(id, title, _)| format!("<a href=\"#{id}\">{title}</a> "))
        .collect();
    let sections: String = parts
        .iter()
        .map(|(id, title, text)| {
            format!("<section id=\"{id}\"><h2>{title}</h2>\n{text}</section>\n")
        })
        .collect();
    let page = format!(
        "<!DOCTYPE html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"/><meta name=\"viewport\" content=\"width=device-width, initial-scale=1\"/><title>{title}</title><style>{style}</style></head>\n<body><main>\n<h1>{title}</h1>\n{lead}\n<nav aria-label=\"Sections\">{links}</nav>\n{sections}</main></body></html>\n",
        title = escape("cliptune: what the methods learn from a few pictures"),
        style = include_str!("style.css"),
        lead = overview::lead(results),
    );
    // A number and its sign stay on one line.
    page.replace(" %", "\u{a0}%")
        .replace(" ± ", "\u{a0}±\u{a0}")
}
