//! What `ftfy.fix_text` does to a text before CLIP tokenises it: repairs of text that went through the wrong software.
//!
//! Behaves as ftfy 6.3.1 with its default settings. The signs of mojibake ([`badness`]) and the order of the repairs
//! are ftfy's (Robyn Speer, Apache-2.0); without the same ones, ids would differ from the reference's.

mod badness;
mod charsets;
mod mojibake;

use std::sync::LazyLock;

use regex::Regex;
use unicode_normalization::{UnicodeNormalization, is_nfc};

use super::html;

/// Characters that are repaired together where there are no line breaks.
const LONGEST_SEGMENT: usize = 1_000_000;
/// Repairs are repeated until nothing changes; damage nested deeper than this is not undone.
const MOST_ROUNDS: usize = 64;

/// Repairs `text` line by line.
pub(super) fn fix_text(text: &str) -> String {
    if text
        .bytes()
        .all(|b| matches!(b, b' '..=b'~' | b'\t' | b'\n' | b'\x0C') && b != b'&')
    {
        return text.to_owned();
    }
    let mut out = String::with_capacity(text.len());
    // A `<` says that this is HTML, whose references are meant to stay; it counts for the lines after it as well.
    let mut unescape = true;
    for segment in text.split_inclusive('\n').flat_map(segments) {
        unescape &= !segment.contains('<');
        out.push_str(&fix_segment(segment, unescape));
    }
    out
}

/// `line` in pieces of at most [`LONGEST_SEGMENT`] characters.
fn segments(line: &str) -> impl Iterator<Item = &str> {
    let mut rest = line;
    std::iter::from_fn(move || {
        let end = rest
            .char_indices()
            .nth(LONGEST_SEGMENT)
            .map_or(rest.len(), |(at, _)| at);
        let (segment, remaining) = rest.split_at(end);
        rest = remaining;
        (!segment.is_empty()).then_some(segment)
    })
}

fn fix_segment(segment: &str, unescape: bool) -> String {
    let mut text = segment.to_owned();
    for _ in 0..MOST_ROUNDS {
        let mut fixed = if unescape && !text.contains('<') {
            unescape_html(&text)
        } else {
            text.clone()
        };
        fixed = mojibake::fix_encoding(fixed);
        fixed = mojibake::fix_c1_controls(fixed);
        fixed = replace_characters(&fixed);
        fixed = fixed
            .replace("\r\n", "\n")
            .replace(['\r', '\u{2028}', '\u{2029}', '\u{85}'], "\n");
        if fixed.contains('\x1b') {
            fixed = TERMINAL_ESCAPE.replace_all(&fixed, "").into_owned();
        }
        fixed.retain(|c| !is_control(c));
        if !is_nfc(&fixed) {
            fixed = fixed.nfc().collect();
        }
        if fixed == text {
            break;
        }
        text = fixed;
    }
    text
}

#[expect(clippy::expect_used, reason = "a constant pattern")]
static TERMINAL_ESCAPE: LazyLock<Regex> =
    LazyLock::new(|| Regex::new(r"\x1b\[[\d;]*[a-zA-Z]").expect("the pattern is valid"));

/// Resolves only references that end in a semicolon, and capital spellings such as `&NTILDE;`.
fn unescape_html(text: &str) -> String {
    const LONGEST: usize = 24;
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find('&') {
        out.push_str(&rest[..at]);
        rest = &rest[at..];
        let digits = rest[1..].trim_start_matches('#');
        let hashes = rest.len() - 1 - digits.len();
        let len = digits.bytes().take_while(u8::is_ascii_alphanumeric).count();
        if hashes > 1 || !(1..=LONGEST).contains(&len) || !digits[len..].starts_with(';') {
            out.push('&');
            rest = &rest[1..];
            continue;
        }
        let (reference, remaining) = rest.split_at(1 + hashes + len + 1);
        match resolve(reference, hashes > 0) {
            Some(characters) => out.push_str(&characters),
            None => out.push_str(reference),
        }
        rest = remaining;
    }
    out.push_str(rest);
    out
}

/// The characters of `reference`, `&` and `;` included.
fn resolve(reference: &str, numeric: bool) -> Option<String> {
    if numeric {
        // What is left of a reference that was resolved in part still has its semicolon.
        return Some(html::unescape(reference).into_owned()).filter(|text| !text.contains(';'));
    }
    let name = &reference[1..reference.len() - 1];
    html::entity(name).or_else(|| {
        let is_capital = !name.bytes().any(|b| b.is_ascii_lowercase());
        let ambiguous = html::unescape(reference) != reference;
        let lower =
            html::entity(&name.to_ascii_lowercase()).filter(|_| is_capital && !ambiguous)?;
        Some(lower.to_uppercase())
    })
}

/// Ligatures are taken apart, characters get their usual width, quotation marks become straight.
fn replace_characters(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        let letters = match c {
            'Ĳ' => "IJ",
            'ĳ' => "ij",
            'ŉ' => "ʼn",
            'Ǳ' => "DZ",
            'ǲ' => "Dz",
            'ǳ' => "dz",
            'Ǆ' => "DŽ",
            'ǅ' => "Dž",
            'ǆ' => "dž",
            'Ǉ' => "LJ",
            'ǈ' => "Lj",
            'ǉ' => "lj",
            'Ǌ' => "NJ",
            'ǋ' => "Nj",
            'ǌ' => "nj",
            'ﬀ' => "ff",
            'ﬁ' => "fi",
            'ﬂ' => "fl",
            'ﬃ' => "ffi",
            'ﬄ' => "ffl",
            'ﬅ' => "ſt",
            'ﬆ' => "st",
            '\u{3000}' => " ",
            '\u{FF01}'..='\u{FFEF}' => {
                out.extend(std::iter::once(c).nfkc());
                continue;
            }
            '\u{201C}'..='\u{201F}' => "\"",
            '\u{2BC}' | '\u{2018}'..='\u{201B}' => "'",
            _ => {
                out.push(c);
                continue;
            }
        };
        // The quotation marks inside the replacements are straightened as well.
        out.extend(
            letters
                .chars()
                .map(|c| if c == '\u{2BC}' { '\'' } else { c }),
        );
    }
    out
}

/// Characters that show nothing and are no white space.
fn is_control(c: char) -> bool {
    matches!(c,
        '\0'..='\x08' | '\x0B' | '\x0E'..='\x1F' | '\x7F' | '\u{206A}'..='\u{206F}' | '\u{FEFF}' | '\u{FFF9}'..='\u{FFFC}')
}
