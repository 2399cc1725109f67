//! The tokenizer's cases, in a format of their own.

use anyhow::{Context, Result};
use cliptune_core::tokenizer::{END, Tokenizer, clean};
use serde::Deserialize;

use super::case::{Case, Models};
use super::check::Check;

#[derive(Deserialize)]
struct File {
    cases: Vec<Text>,
    length: Vec<Length>,
    decode: Vec<Decode>,
}

#[derive(Deserialize)]
struct Text {
    text: String,
    ids: Vec<u32>,
    fits: bool,
    eot: usize,
    cleaned: Option<String>,
}

#[derive(Deserialize)]
struct Length {
    text: String,
    context_length: usize,
    n_tokens: usize,
    truncated: Vec<u32>,
    error: Option<String>,
}

#[derive(Deserialize)]
struct Decode {
    ids: Vec<u32>,
    text: String,
}

pub(crate) fn run(case: &Case, _: &mut Models, check: &mut Check) -> Result<()> {
    let path = case.path.join("tokenizer.json");
    let text = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    let file: File = serde_json::from_str(&text).with_context(|| path.display().to_string())?;
    let tokenizer = Tokenizer::get();
    let mut compare = |what: &str, text: &str, equal: bool| {
        check.record(what, 0.0, (!equal).then(|| format!("differs for {text:?}")));
    };
    for case in &file.cases {
        compare("ids", &case.text, tokenizer.encode(&case.text) == case.ids);
        // `cleaned` is given where it differs from the text.
        compare(
            "cleaned",
            &case.text,
            clean(&case.text) == *case.cleaned.as_ref().unwrap_or(&case.text),
        );
        compare(
            "fits",
            &case.text,
            tokenizer.tokenize(&case.text, 77).is_ok() == case.fits,
        );
        // The reference finds the end token by its id, the largest: the first one counts.
        let ids = tokenizer.tokenize_truncated(&case.text, 77);
        let eot = ids.iter().position(|&id| id == END);
        compare("eot", &case.text, eot == Some(case.eot));
    }
    for case in &file.length {
        compare(
            "n_tokens",
            &case.text,
            tokenizer.encode(&case.text).len() + 2 == case.n_tokens,
        );
        let mut truncated = tokenizer.tokenize_truncated(&case.text, case.context_length);
        truncated.resize(case.context_length, 0);
        compare("truncated", &case.text, truncated == case.truncated);
        let refused = tokenizer.tokenize(&case.text, case.context_length).is_err();
        compare("error", &case.text, refused == case.error.is_some());
    }
    for case in &file.decode {
        compare(
            "decode",
            &case.text,
            tokenizer.decode(&case.ids) == case.text,
        );
    }
    Ok(())
}
