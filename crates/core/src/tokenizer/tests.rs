use std::path::PathBuf;

use proptest::prelude::*;
use serde::Deserialize;

use super::*;

#[derive(Deserialize)]
struct Fixture {
    cases: Vec<Case>,
    #[serde(default)]
    length: Vec<Length>,
    #[serde(default)]
    decode: Vec<Decode>,
}

#[derive(Deserialize)]
struct Case {
    text: String,
    ids: Vec<u32>,
    eot: Option<usize>,
    fits: Option<bool>,
    cleaned: Option<String>,
}

#[derive(Deserialize)]
struct Length {
    text: String,
    context_length: usize,
    n_tokens: usize,
    error: Option<String>,
    truncated: Vec<u32>,
}

#[derive(Deserialize)]
struct Decode {
    ids: Vec<u32>,
    text: String,
}

fn fixture(name: &str) -> Fixture {
    let path = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../../fixtures")).join(name);
    let text = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    serde_json::from_str(&text).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// Every case of a file, with all that differs.
fn check(name: &str) -> usize {
    let tokenizer = Tokenizer::get();
    let fixture = fixture(name);
    let mut wrong = Vec::new();
    for case in &fixture.cases {
        let expected = case.cleaned.as_ref().unwrap_or(&case.text);
        let cleaned = clean(&case.text);
        if cleaned != *expected {
            wrong.push(format!(
                "cleaning {:?} gives {cleaned:?}, not {expected:?}",
                case.text
            ));
        }
        let ids = tokenizer.encode(&case.text);
        if ids != case.ids {
            wrong.push(format!("{:?} gives {ids:?}, not {:?}", case.text, case.ids));
        }
        if let Some(fits) = case.fits {
            assert_eq!(
                tokenizer.tokenize(&case.text, 77).is_ok(),
                fits,
                "{:?}",
                case.text
            );
        }
        if let Some(eot) = case.eot {
            let row = tokenizer.tokenize_truncated(&case.text, 77);
            assert_eq!(
                row.iter().position(|&id| id == END),
                Some(eot),
                "{:?}",
                case.text
            );
        }
    }
    for case in &fixture.length {
        let ids = tokenizer.tokenize(&case.text, case.context_length);
        match ids {
            Ok(ids) => assert!(case.error.is_none() && ids.len() == case.n_tokens),
            Err(Error::PromptTooLong {
                text,
                tokens,
                context_length,
            }) => {
                assert!(case.error.is_some(), "{text}");
                assert_eq!(
                    (tokens, context_length),
                    (case.n_tokens, case.context_length)
                );
            }
            Err(other) => panic!("{other}"),
        }
        let mut row = tokenizer.tokenize_truncated(&case.text, case.context_length);
        row.resize(case.context_length, 0);
        assert_eq!(
            row, case.truncated,
            "{:?} at {}",
            case.text, case.context_length
        );
    }
    for case in &fixture.decode {
        assert_eq!(tokenizer.decode(&case.ids), case.text, "{:?}", case.ids);
    }
    assert!(
        wrong.is_empty(),
        "{} of {} cases differ:\n{}",
        wrong.len(),
        fixture.cases.len(),
        wrong.join("\n")
    );
    fixture.cases.len() + fixture.length.len() + fixture.decode.len()
}

#[test]
fn ids_equal_the_reference() {
    assert_eq!(check("parity/clip-cases/tokenizer/tokenizer.json"), 622);
}

#[test]
fn ids_of_damaged_and_foreign_text_equal_the_reference() {
    assert!(check("tokenizer/more.json") > 500);
}

#[test]
fn the_vocabulary_equals_an_independent_copy() {
    let other = instant_clip_tokenizer::Tokenizer::new();
    let ours = &Tokenizer::get().vocabulary;
    assert_eq!(ours.len(), START as usize);
    for id in 0..START {
        let token = instant_clip_tokenizer::Token::from_u16(id as u16, &other).unwrap();
        let mut bytes = Vec::new();
        assert!(ours.decode_token(id, &mut bytes));
        let text = String::from_utf8_lossy(&bytes).replace("</w>", " ");
        assert_eq!(text, other.decode([token]), "token {id}");
        // Tokens that end a word are words themselves, so both must find them again, or the same tokens in their place.
        if let Some(word) = std::str::from_utf8(&bytes)
            .ok()
            .and_then(|text| text.strip_suffix("</w>"))
            && word.bytes().all(|b| b.is_ascii_lowercase())
        {
            let mut expected = Vec::new();
            other.encode(word, &mut expected);
            let expected: Vec<u32> = expected
                .into_iter()
                .map(|token| token.to_u16().into())
                .collect();
            assert_eq!(Tokenizer::get().encode(word), expected, "{word}");
        }
    }
}

#[test]
fn a_huge_word_takes_a_moment() {
    let start = std::time::Instant::now();
    for word in ["a", "ab", "é", "中", "&amp;", "!", "Ã©"] {
        let text = word.repeat(1_000_000 / word.len());
        assert!(!Tokenizer::get().encode(&text).is_empty());
    }
    assert!(start.elapsed().as_secs() < 60, "took {:?}", start.elapsed());
}

#[test]
fn truncation_keeps_to_any_length() {
    let tokenizer = Tokenizer::get();
    assert!(tokenizer.tokenize_truncated("a cat", 0).is_empty());
    assert_eq!(tokenizer.tokenize_truncated("a cat", 1), [END]);
    assert_eq!(tokenizer.tokenize_truncated("a cat", 2), [START, END]);
    assert_eq!(
        tokenizer.tokenize_truncated("a cat", 9),
        [START, 320, 2368, END]
    );
    let error = tokenizer.tokenize("a cat", 3).unwrap_err().to_string();
    assert!(error.contains("`a cat` needs 4 tokens"), "{error}");
}

/// Strings of characters that the repairs look at.
fn damaged() -> impl Strategy<Value = String> {
    let characters = prop::sample::select(
        "Ã©â€™œ\u{9d}\u{80}\u{fffd}\u{1a} &#x;amlt<>ß\n\r\u{1b}[0mÐпŃ‚Äî√À\u{a0}'ſＡİΣé̈"
            .chars()
            .collect::<Vec<_>>(),
    );
    prop::collection::vec(characters, 0..40).prop_map(|chars| chars.into_iter().collect())
}

proptest! {
    #[test]
    fn any_text_gives_ids_of_the_vocabulary(text in prop_oneof![any::<String>(), damaged()]) {
        for id in Tokenizer::get().encode(&text) {
            prop_assert!(id < START);
        }
    }

    #[test]
    fn any_ids_decode(ids in prop::collection::vec(prop_oneof![0..50_000u32, any::<u32>()], 0..20)) {
        let text = Tokenizer::get().decode(&ids);
        prop_assert!(ids.is_empty() || !text.is_empty());
    }

    #[test]
    fn words_come_back(words in prop::collection::vec("[a-z]{1,12}", 1..8)) {
        let text = words.join(" ");
        let tokenizer = Tokenizer::get();
        let ids = tokenizer.encode(&text);
        prop_assert_eq!(tokenizer.decode(&ids), text.clone() + " ");
        let mut other = Vec::new();
        instant_clip_tokenizer::Tokenizer::encode(&OTHER, &text, &mut other);
        prop_assert_eq!(ids, other.into_iter().map(|token| token.to_u16().into()).collect::<Vec<u32>>());
    }

    #[test]
    fn cleaning_plain_text_twice_changes_nothing(text in "[ -%'-~\\t\\n]{0,60}") {
        let once = clean(&text);
        prop_assert_eq!(clean(&once), once);
    }

    #[test]
    fn cleaned_text_has_no_spare_white_space(text in prop_oneof![any::<String>(), damaged()]) {
        let cleaned = clean(&text);
        prop_assert_eq!(cleaned.split_whitespace().collect::<Vec<_>>().join(" "), cleaned);
    }
}

static OTHER: LazyLock<instant_clip_tokenizer::Tokenizer> =
    LazyLock::new(instant_clip_tokenizer::Tokenizer::new);
