//! The guide in `docs/`: every method has its page, the commands on it run, and its tables of settings are true.

// The commands are run by a shell, as a reader's are.
#![cfg(unix)]
// Helpers are tests too: a failure here is a failed test.
#![allow(clippy::unwrap_used)]

#[allow(dead_code)] // Shared with the tests of the command, which need more of it.
#[path = "../cli/support.rs"]
mod support;

mod checkpoint;
mod page;
mod shown;

use std::collections::BTreeSet;

use cliptune::ImageNeeds;
use cliptune::method::Entry;
use cliptune::registry;
use serde_json::Value;

use crate::page::{Page, leaves};

/// What all methods that train have in common is told once.
const TRAINING: &str = "training";

#[test]
fn every_method_has_a_page_and_every_page_a_method() {
    let slugs: BTreeSet<String> = registry::methods()
        .iter()
        .map(|entry| entry.slug.to_owned())
        .collect();
    let pages: BTreeSet<String> = Page::of_methods()
        .into_iter()
        .map(|page| page.name)
        .collect();
    assert_eq!(
        slugs, pages,
        "methods on the left, docs/methods on the right"
    );
    let overview = Page::read("README");
    let front = Page::read("../README");
    for slug in slugs {
        for (page, link) in [
            (&overview, format!("(methods/{slug}.md)")),
            (&front, format!("(docs/methods/{slug}.md)")),
        ] {
            assert!(page.text.contains(&link), "{page}: no link {link}");
        }
    }
}

/// What a page must show that a person can do with the method.
fn commands_of(entry: &Entry) -> Vec<String> {
    let mut commands = vec![
        format!("--method {}", entry.slug),
        "cliptune fit ".to_owned(),
        "cliptune eval ".to_owned(),
        "cliptune predict ".to_owned(),
    ];
    if entry.import.is_some() {
        commands.push("cliptune import ".to_owned());
        // All of them can learn on base classes and serve new ones.
        commands.extend(["--subset base".to_owned(), "--subset new".to_owned()]);
    }
    commands
}

#[test]
fn a_page_says_what_the_registry_says_and_shows_every_command() {
    for entry in registry::methods() {
        let page = Page::of_method(entry.slug);
        let heading = format!("# {}\n", entry.name);
        assert!(
            page.text.starts_with(&heading),
            "{page}: expected {heading}"
        );
        for part in [entry.paper.venue, entry.paper.arxiv] {
            assert!(page.text.contains(part), "{page}: no `{part}`");
        }
        // Only the repository: a commit is a detail of the registry.
        let code = entry.paper.code.split('@').next().unwrap();
        assert!(page.text.contains(code), "{page}: no `{code}`");
        let scripts = page.scripts().join("\n");
        for command in commands_of(&entry) {
            assert!(scripts.contains(&command), "{page}: no `{command}`");
        }
        if entry.needs == ImageNeeds::LocalFeatures {
            assert!(page.text.contains("places"), "{page}: what is read?");
        }
    }
}

#[test]
fn the_settings_of_a_page_are_those_of_the_method() {
    let training = Page::read(TRAINING);
    let shared = training.settings();
    for entry in registry::methods() {
        let page = Page::of_method(entry.slug);
        let defaults = (entry.defaults)();
        let listed = page.settings();
        for (key, default) in &listed {
            let found = defaults.pointer(&format!("/{}", key.replace('.', "/")));
            let found = found.unwrap_or_else(|| panic!("{page}: there is no setting `{key}`"));
            assert!(
                page::says(default, found),
                "{page}: `{key}` is {found} and not {default}"
            );
        }
        let names = |key: &String| listed.iter().any(|(listed, _)| listed == key);
        for (key, value) in leaves(&defaults) {
            let common = shared.iter().find(|(shared, _)| *shared == key);
            match common {
                // Told by the other page, unless this method has it otherwise.
                Some((_, default)) => assert!(
                    page::says(default, &value) || names(&key),
                    "{page}: `{key}` is {value} here and is not listed"
                ),
                None => assert!(names(&key), "{page}: `{key}` is not listed"),
            }
        }
    }
    // What is told once is there at all.
    let coop = (registry::find("coop").unwrap().defaults)();
    for (key, default) in &shared {
        let found = coop.pointer(&format!("/{}", key.replace('.', "/")));
        assert!(
            found.is_some_and(|found| page::says(default, found)),
            "{training}: `{key}` is {found:?} and not {default}"
        );
    }
}

#[test]
fn the_commands_of_all_pages_run() {
    let mut pages = Page::of_methods();
    pages.extend([Page::read("README"), Page::read(TRAINING)]);
    let failures: Vec<String> = std::thread::scope(|scope| {
        let started: Vec<_> = pages
            .iter()
            .map(|page| scope.spawn(|| shown::run(page)))
            .collect();
        let ended = started.into_iter().map(|thread| thread.join().unwrap());
        ended.filter_map(Result::err).collect()
    });
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

#[test]
fn a_command_that_fails_is_a_failure() {
    for (script, reason) in [
        (
            "cliptune describe coopp\ncliptune list",
            "did you mean `coop`?",
        ),
        (
            "cliptune list --jsn | cat\ncliptune lst",
            "unrecognized subcommand",
        ),
        (
            "cliptune fit --clip ViT-B-16.pt --images flowers --method coop --set n_ctxx=4 -o a",
            "n_ctxx",
        ),
        (
            "cliptune list >/dev/null\nno-such-command",
            "no-such-command",
        ),
    ] {
        let page = Page {
            name: "made-up".to_owned(),
            text: format!("# Made up\n\n```sh\n{script}\n```\n"),
        };
        let failure = shown::run(&page).unwrap_err();
        assert!(failure.contains(reason), "no `{reason}` in {failure}");
    }
}

#[test]
fn links_lead_somewhere() {
    let mut pages = Page::of_methods();
    pages.extend([Page::read("README"), Page::read(TRAINING)]);
    for page in pages {
        let folder = page.path().parent().unwrap().to_owned();
        for target in page.links() {
            let file = target.split('#').next().unwrap();
            assert!(
                target.starts_with("https://") || folder.join(file).exists(),
                "{page}: {target} is not there"
            );
        }
    }
}

#[test]
fn tables_are_read_as_they_are_written() {
    let text = "# A\n\n| setting | default | |\n| --- | --- | --- |\n| `n` | `4` | a |\n| `words` | not set | b |\n\n| other | x |\n| --- | --- |\n| `m` | 1 |\n";
    let page = Page {
        name: "a".to_owned(),
        text: text.to_owned(),
    };
    let settings = page.settings();
    let pairs: Vec<(&str, &str)> = settings
        .iter()
        .map(|(key, default)| (key.as_str(), default.as_str()))
        .collect();
    assert_eq!(pairs, [("n", "4"), ("words", "not set")]);
    assert!(page::says("not set", &Value::Null) && !page::says("not set", &Value::from(1)));
    assert!(page::says("0.002", &Value::from(0.002)) && !page::says("0.02", &Value::from(0.002)));
    assert!(page::says("\"a b\"", &Value::from("a b")));
    let nested = serde_json::json!({"a": {"b": 1, "c": {}}, "d": []});
    let keys: Vec<String> = leaves(&nested).into_iter().map(|(key, _)| key).collect();
    assert_eq!(keys, ["a.b", "d"]);
}
