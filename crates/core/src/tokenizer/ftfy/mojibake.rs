//! Text that was UTF-8, was decoded with a single-byte character set, and can be decoded again.

use std::ops::RangeInclusive;

use super::MOST_ROUNDS;
use super::badness::is_bad;
use super::charsets::{CHARSETS, CLUES, Charset, LOST};
use crate::tokenizer::html::WINDOWS_1252;

/// Repairs `text` as long as it looks damaged and something can be done about it.
pub(super) fn fix_encoding(mut text: String) -> String {
    for _ in 0..MOST_ROUNDS {
        match fix_once(&text) {
            Some(fixed) if fixed != text => text = fixed,
            _ => break,
        }
    }
    text
}

/// Reads the C1 controls, which nobody writes, as the characters that Windows has in their places.
pub(super) fn fix_c1_controls(text: String) -> String {
    if !text.contains(is_c1) {
        return text;
    }
    text.chars()
        .map(|c| {
            if is_c1(c) {
                WINDOWS_1252[c as usize - 0x80]
            } else {
                c
            }
        })
        .collect()
}

fn is_c1(c: char) -> bool {
    matches!(c, '\u{80}'..='\u{9f}')
}

fn fix_once(text: &str) -> Option<String> {
    if text.is_ascii() || !is_bad(text) {
        return None;
    }
    let decoded = CHARSETS
        .iter()
        .find_map(|set| decode(set.encode(text)?, set));
    decoded
        .or_else(|| fix_embedded(text))
        .or_else(|| Some(fix_c1_controls(text.to_owned())))
}

/// `bytes` as UTF-8, after repairs of what programs do to the bytes of mojibake.
fn decode(mut bytes: Vec<u8>, set: &Charset) -> Option<String> {
    if set.spaces_may_be_a0 && (0..bytes.len()).any(|at| length_at(SPACED, &bytes, at).is_some()) {
        bytes = restore_a0(&bytes);
    }
    if set.lossy {
        bytes = replace(LOSSY, &bytes, |_| "\u{fffd}".as_bytes().to_vec());
    }
    decode_utf8_variants(&bytes)
}

/// UTF-8 that may hold surrogate pairs, three bytes each (CESU-8), or a zero in two bytes.
fn decode_utf8_variants(bytes: &[u8]) -> Option<String> {
    let mut out = String::with_capacity(bytes.len());
    let mut plain = 0;
    let mut at = 0;
    while at < bytes.len() {
        let (c, used) = match bytes[at..] {
            [
                0xED,
                a @ 0xA0..=0xAF,
                b @ 0x80..=0xBF,
                0xED,
                c @ 0xB0..=0xBF,
                d @ 0x80..=0xBF,
                ..,
            ] => {
                let bits = |byte: u8, mask: u8, shift: u32| u32::from(byte & mask) << shift;
                let value =
                    bits(a, 0x0F, 16) + bits(b, 0x3F, 10) + bits(c, 0x0F, 6) + bits(d, 0x3F, 0);
                (char::from_u32(value + 0x1_0000)?, 6)
            }
            // The second: a peculiarity of ftfy at the end of a line.
            [0xC0, 0x80, ..] | [0xC0, b'\n'] => ('\0', 2),
            _ => {
                at += 1;
                continue;
            }
        };
        out.push_str(std::str::from_utf8(&bytes[plain..at]).ok()?);
        out.push(c);
        at += used;
        plain = at;
    }
    out.push_str(std::str::from_utf8(&bytes[plain..]).ok()?);
    Some(out)
}

/// Repairs sequences that look like UTF-8 inside a text that cannot be decoded as a whole.
fn fix_embedded(text: &str) -> Option<String> {
    let clues = &*CLUES;
    let characters: Vec<char> = text.chars().collect();
    let sequence_at = |at: usize| {
        (2..=4).find(|&len| {
            let Some([first, rest @ ..]) = characters.get(at..at + len) else {
                return false;
            };
            clues.first[len - 2].contains(first)
                && rest.iter().all(|c| clues.continuation.contains(c))
        })
    };
    let mut out = String::with_capacity(text.len());
    let mut at = 0;
    while at < characters.len() {
        let mut end = at;
        // Part of a larger garble is better left alone.
        if at == 0 || !clues.strict_continuation.contains(&characters[at - 1]) {
            while let Some(len) = sequence_at(end) {
                end += len;
            }
        }
        if end == at {
            out.push(characters[at]);
            at += 1;
            continue;
        }
        let sequence: String = characters[at..end].iter().collect();
        // A sequence that is the whole text would be looked at for ever.
        let fixed = end - at < characters.len() && is_bad(&sequence);
        out.push_str(&if fixed {
            fix_encoding(sequence)
        } else {
            sequence
        });
        at = end;
    }
    (out != text).then_some(out)
}

/// A sequence of bytes by the ranges that each may lie in.
type Sequence = &'static [&'static [RangeInclusive<u8>]];

const SPACE: &[RangeInclusive<u8>] = &[b' '..=b' '];
const NO_SPACE: &[RangeInclusive<u8>] = &[0x80..=0x84, 0x86..=0x9F, 0xA1..=0xBF];
const CONTINUATION: &[RangeInclusive<u8>] = &[0x80..=0xBF];

/// UTF-8 in which a space is where 0xA0 was, as far as that makes characters that are likely.
#[rustfmt::skip]
const SPACED: &[Sequence] = &[
    &[&[0xC2..=0xC3, 0xC5..=0xC5, 0xCE..=0xCE, 0xD0..=0xD0, 0xD9..=0xD9], SPACE],
    &[&[0xE2..=0xE3], SPACE, NO_SPACE],
    &[&[0xE0..=0xE3], NO_SPACE, SPACE],
    &[&[0xF0..=0xF0], SPACE, CONTINUATION, CONTINUATION],
    &[&[0xF0..=0xF0], CONTINUATION, SPACE, CONTINUATION],
    &[&[0xF0..=0xF0], CONTINUATION, CONTINUATION, SPACE],
];

const LOST_BYTE: &[RangeInclusive<u8>] = &[LOST..=LOST];
const LOST_OR_ASKED: &[RangeInclusive<u8>] = &[LOST..=LOST, b'?'..=b'?'];
const LOST_OR_KEPT: &[RangeInclusive<u8>] = &[LOST..=LOST, 0x80..=0xBF];
const LOST_ASKED_OR_KEPT: &[RangeInclusive<u8>] = &[LOST..=LOST, b'?'..=b'?', 0x80..=0xBF];
const TWO: &[RangeInclusive<u8>] = &[0xC2..=0xDF];
const THREE: &[RangeInclusive<u8>] = &[0xE0..=0xEF];
const FOUR: &[RangeInclusive<u8>] = &[0xF0..=0xF4];
const SURROGATE: &[RangeInclusive<u8>] = &[0xED..=0xED];
const HIGH: &[RangeInclusive<u8>] = &[0xA0..=0xAF];
const LOW: &[RangeInclusive<u8>] = &[0xB0..=0xBF];

/// UTF-8 of which bytes were lost; a question mark may stand for one of them.
#[rustfmt::skip]
const LOSSY: &[Sequence] = &[
    &[TWO, LOST_BYTE],
    &[&[0xC2..=0xC3], &[b'?'..=b'?']],
    &[SURROGATE, HIGH, LOST_OR_ASKED, SURROGATE, LOW, LOST_ASKED_OR_KEPT],
    &[SURROGATE, HIGH, LOST_ASKED_OR_KEPT, SURROGATE, LOW, LOST_OR_ASKED],
    &[THREE, LOST_OR_ASKED, LOST_OR_KEPT],
    &[THREE, LOST_OR_KEPT, LOST_OR_ASKED],
    &[FOUR, LOST_OR_ASKED, LOST_OR_KEPT, LOST_OR_KEPT],
    &[FOUR, LOST_OR_KEPT, LOST_OR_ASKED, LOST_OR_KEPT],
    &[FOUR, LOST_OR_KEPT, LOST_OR_KEPT, LOST_OR_ASKED],
    &[LOST_BYTE],
];

/// Length of the first of `sequences` that `bytes` has at `at`.
fn length_at(sequences: &[Sequence], bytes: &[u8], at: usize) -> Option<usize> {
    let fits = |sequence: &Sequence| {
        bytes.get(at..at + sequence.len()).is_some_and(|window| {
            window
                .iter()
                .zip(*sequence)
                .all(|(byte, ranges)| ranges.iter().any(|range| range.contains(byte)))
        })
    };
    sequences
        .iter()
        .find(|sequence| fits(sequence))
        .map(|sequence| sequence.len())
}

/// `bytes` with every occurrence of one of `sequences` replaced.
fn replace(sequences: &[Sequence], bytes: &[u8], with: impl Fn(&[u8]) -> Vec<u8>) -> Vec<u8> {
    let mut out = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while at < bytes.len() {
        match length_at(sequences, bytes, at) {
            Some(len) => {
                out.extend(with(&bytes[at..at + len]));
                at += len;
            }
            None => {
                out.push(bytes[at]);
                at += 1;
            }
        }
    }
    out
}

/// Puts back 0xA0 where a program wrote a space for it.
///
/// `Ã ` is an `à`, and mostly a word of its own: its space then stays, unless what follows makes it one of the Portuguese
/// `àquele`, `àquela`, `àquilo` and `às`.
fn restore_a0(bytes: &[u8]) -> Vec<u8> {
    let mut words = Vec::with_capacity(bytes.len());
    for (at, &byte) in bytes.iter().enumerate() {
        words.push(byte);
        let rest = &bytes[at + 1..];
        let joined = [&b" "[..], b"quele", b"quela", b"quilo", b"s "];
        if byte == 0xC3
            && let [b' ', next @ ..] = rest
            && !joined.iter().any(|end| next.starts_with(end))
        {
            words.push(0xA0);
        }
    }
    replace(SPACED, &words, |found| {
        found
            .iter()
            .map(|&b| if b == b' ' { 0xA0 } else { b })
            .collect()
    })
}
