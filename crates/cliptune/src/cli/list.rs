//! `cliptune list`: the methods.

use anyhow::Result;
use cliptune::registry;
use serde_json::json;

use super::out;
use super::table::Table;

/// List the methods
#[derive(Debug, clap::Args)]
pub(crate) struct List {
    /// Print JSON
    #[arg(long)]
    json: bool,
}

impl List {
    pub(crate) fn run(&self) -> Result<()> {
        let methods = registry::methods();
        if self.json {
            let list: Vec<_> = methods
                .iter()
                .map(|e| json!({"method": e.slug, "name": e.name, "family": e.family, "paper": e.paper}))
                .collect();
            return out::result(&format!("{}\n", serde_json::to_string_pretty(&list)?));
        }
        let mut table = Table::new(&["METHOD", "NAME", "FAMILY", "PAPER"]);
        for entry in methods {
            let paper = format!(
                "{} ({}, arXiv {})",
                entry.paper.title, entry.paper.venue, entry.paper.arxiv
            );
            table.row(vec![
                entry.slug.into(),
                entry.name.into(),
                entry.family.into(),
                paper,
            ]);
        }
        out::result(&table.render(out::width()))
    }
}
