//! Byte-pair encoding over CLIP's vocabulary.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};

/// The merges of OpenAI's `bpe_simple_vocab_16e6` (MIT licence) as pairs of token ids, each id two bytes, little-endian; merge `i` makes token `512 + i`.
static MERGES: &[u8] = include_bytes!("merges.bin");

/// Tokens of a single byte: 256 inside a word, then the same 256 at its end.
const BYTE_TOKENS: usize = 512;
/// What the reference appends to the last byte of a word; it shows in decoded bytes.
const END_OF_WORD: &[u8] = b"</w>";
const NONE: u32 = u32::MAX;

/// The vocabulary without the start and the end token.
#[derive(Debug)]
pub(super) struct Vocabulary {
    /// Token of a byte inside a word; 256 more at its end.
    of_byte: [u16; 256],
    /// Byte of the tokens below 256.
    to_byte: [u8; 256],
    /// The two halves of token `512 + i`.
    halves: Vec<(u16, u16)>,
    merged: HashMap<(u16, u16), u16>,
}

impl Vocabulary {
    pub(super) fn new() -> Self {
        // Printable bytes come first, in the order of Latin-1; the rest follows, in the order of their values.
        let printable = |b: &u8| matches!(b, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
        let order = (0..=255u8)
            .filter(printable)
            .chain((0..=255u8).filter(|b| !printable(b)));
        let mut of_byte = [0; 256];
        let mut to_byte = [0; 256];
        for (id, byte) in (0u16..).zip(order) {
            of_byte[usize::from(byte)] = id;
            to_byte[usize::from(id)] = byte;
        }
        let (pairs, _) = MERGES.as_chunks::<4>();
        let halves: Vec<_> = pairs
            .iter()
            .map(|&[a, b, c, d]| (u16::from_le_bytes([a, b]), u16::from_le_bytes([c, d])))
            .collect();
        let merged = halves.iter().copied().zip(BYTE_TOKENS as u16..).collect();
        Self {
            of_byte,
            to_byte,
            halves,
            merged,
        }
    }

    /// Number of tokens.
    pub(super) fn len(&self) -> usize {
        BYTE_TOKENS + self.halves.len()
    }

    /// Appends the tokens of one word to `ids`, in `O(n log n)` of its length.
    ///
    /// The reference repeats: take the pair of neighbours that was learnt first and merge it everywhere, from the left.
    /// A token's merges are always learnt after the token itself, so taking single pairs by (merge, position) does the same.
    pub(super) fn encode_word(&self, word: &str, ids: &mut Vec<u32>) {
        let mut symbols: Vec<u16> = word.bytes().map(|b| self.of_byte[usize::from(b)]).collect();
        let Some(last) = symbols.last_mut() else {
            return;
        };
        *last += 256;

        let n = symbols.len();
        // Neighbours of what is left of the word. A symbol that was merged into its left neighbour is its own right neighbour.
        let mut left: Vec<u32> = (0..n as u32).map(|i| i.wrapping_sub(1)).collect();
        let mut right: Vec<u32> = (1..n as u32).chain([NONE]).collect();
        let candidate = |symbols: &[u16], at: u32, next: u32| {
            let pair = (*symbols.get(at as usize)?, *symbols.get(next as usize)?);
            self.merged.get(&pair).map(|&token| Reverse((token, at)))
        };
        let mut queue: BinaryHeap<_> = (1..n as u32)
            .filter_map(|next| candidate(&symbols, next - 1, next))
            .collect();
        while let Some(Reverse((token, at))) = queue.pop() {
            let next = right[at as usize];
            // Either symbol may have changed or gone since the pair was queued.
            if next == at || candidate(&symbols, at, next) != Some(Reverse((token, at))) {
                continue;
            }
            symbols[at as usize] = token;
            let after = right[next as usize];
            right[at as usize] = after;
            right[next as usize] = next;
            if after != NONE {
                left[after as usize] = at;
                queue.extend(candidate(&symbols, at, after));
            }
            let before = left[at as usize];
            if before != NONE {
                queue.extend(candidate(&symbols, before, at));
            }
        }
        let mut at = 0;
        while at != NONE {
            ids.push(symbols[at as usize].into());
            at = right[at as usize];
        }
    }

    /// Appends the bytes of token `id`; the end of a word is written as `</w>`. Unknown ids add nothing and give `false`.
    pub(super) fn decode_token(&self, id: u32, bytes: &mut Vec<u8>) -> bool {
        if id as usize >= self.len() {
            return false;
        }
        let mut pending = vec![id as usize];
        while let Some(id) = pending.pop() {
            match id {
                0..256 => bytes.push(self.to_byte[id]),
                256..BYTE_TOKENS => {
                    bytes.push(self.to_byte[id - 256]);
                    bytes.extend_from_slice(END_OF_WORD);
                }
                _ => {
                    let (first, second) = self.halves[id - BYTE_TOKENS];
                    pending.extend([usize::from(second), usize::from(first)]);
                }
            }
        }
        true
    }
}
