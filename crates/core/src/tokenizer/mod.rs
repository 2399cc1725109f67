//! CLIP's tokenizer: text to the ids that the text tower takes.
//!
//! Gives the ids of OpenAI's `SimpleTokenizer` (openai/CLIP d05afc4 with ftfy 6.3.1). A text is cleaned ([`clean`]), split into
//! contractions, runs of letters, single digits and runs of other characters, and each piece is merged from its bytes.
//!
//! # What cleaning covers
//! All default repairs of `ftfy.fix_text`: references with a semicolon, mojibake through ten character sets (with lost bytes,
//! spaces for no-break spaces, embedded sequences), C1 controls, ligatures, character widths, quotation marks, line breaks,
//! terminal escapes, control characters, NFC; repeated until nothing changes. Not covered:
//! - lone surrogates, which a Rust string cannot hold;
//! - damage nested more than 64 times (`&amp;amp;amp;…`), where ftfy goes on;
//! - differences between the Unicode versions of Python and of this build, for characters that only one of them knows.

mod bpe;
mod clean;
mod ftfy;
mod html;

use std::sync::{LazyLock, OnceLock};

use regex::Regex;

use crate::{Error, Result};
pub use clean::clean;

/// Id of the start token, which a literal `<|startoftext|>` in a text also gives.
pub const START: u32 = 49_406;
/// Id of the end token, which a literal `<|endoftext|>` in a text also gives.
pub const END: u32 = 49_407;

const START_TEXT: &str = "<|startoftext|>";
const END_TEXT: &str = "<|endoftext|>";

#[expect(clippy::expect_used, reason = "a constant pattern")]
static PIECES: LazyLock<Regex> = LazyLock::new(|| {
    // The reference ignores case everywhere. Where it matters: `ſ` is an `s`, and U+0345, a mark whose capital is a letter, is in
    // no class at all.
    let pattern = r"(?i:<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d)|\p{L}+|\p{N}|[^\s\p{L}\p{N}\u{345}]+";
    Regex::new(pattern).expect("the pattern is valid")
});

/// CLIP's only vocabulary with its byte-pair encoding.
#[derive(Debug)]
pub struct Tokenizer {
    vocabulary: bpe::Vocabulary,
}

impl Tokenizer {
    /// The tokenizer; its tables are built on the first call.
    pub fn get() -> &'static Self {
        static TOKENIZER: OnceLock<Tokenizer> = OnceLock::new();
        TOKENIZER.get_or_init(|| Self {
            vocabulary: bpe::Vocabulary::new(),
        })
    }

    /// Ids of the cleaned `text`, without the start and the end token.
    pub fn encode(&self, text: &str) -> Vec<u32> {
        let mut ids = Vec::new();
        for piece in PIECES.find_iter(&clean(text)) {
            match piece.as_str() {
                START_TEXT => ids.push(START),
                END_TEXT => ids.push(END),
                word => self.vocabulary.encode_word(word, &mut ids),
            }
        }
        ids
    }

    /// The text of `ids`: words as they were cleaned, a space after each piece. Bytes that are no UTF-8, and ids that no token
    /// has, become U+FFFD.
    pub fn decode(&self, ids: &[u32]) -> String {
        let mut bytes = Vec::new();
        for &id in ids {
            match id {
                START => bytes.extend_from_slice(START_TEXT.as_bytes()),
                END => bytes.extend_from_slice(END_TEXT.as_bytes()),
                id if self.vocabulary.decode_token(id, &mut bytes) => {}
                _ => bytes.extend_from_slice("\u{fffd}".as_bytes()),
            }
        }
        String::from_utf8_lossy(&bytes).replace("</w>", " ")
    }

    /// Start token, ids of `text`, end token; not padded.
    ///
    /// # Errors
    /// [`Error::PromptTooLong`] if these are more than `context_length`.
    pub fn tokenize(&self, text: &str, context_length: usize) -> Result<Vec<u32>> {
        let ids = self.with_ends(text);
        if ids.len() > context_length {
            return Err(Error::PromptTooLong {
                text: text.to_owned(),
                tokens: ids.len(),
                context_length,
            });
        }
        Ok(ids)
    }

    /// As [`Tokenizer::tokenize`], but a text that is too long is cut to `context_length` ids, of which the last is the end token.
    pub fn tokenize_truncated(&self, text: &str, context_length: usize) -> Vec<u32> {
        let mut ids = self.with_ends(text);
        if ids.len() > context_length {
            ids.truncate(context_length);
            if let Some(last) = ids.last_mut() {
                *last = END;
            }
        }
        ids
    }

    fn with_ends(&self, text: &str) -> Vec<u32> {
        let mut ids = vec![START];
        ids.extend(self.encode(text));
        ids.push(END);
        ids
    }
}

#[cfg(test)]
mod tests;
