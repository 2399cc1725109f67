//! Signs of mojibake: neighbouring characters that hardly ever stand together in real text.

use std::collections::HashMap;
use std::sync::LazyLock;

/// A set of kinds of characters, one bit each. A character can be of several kinds.
type Kinds = u32;

const COMMON: Kinds = 1 << 0;
const C1: Kinds = 1 << 1;
const BAD: Kinds = 1 << 2;
const LAW: Kinds = 1 << 3;
const CURRENCY: Kinds = 1 << 4;
const OPENING: Kinds = 1 << 5;
const CLOSING: Kinds = 1 << 6;
const NUMERIC: Kinds = 1 << 7;
/// Letters that draw faces.
const FACES: Kinds = 1 << 8;
const UPPER: Kinds = 1 << 9;
const LOWER: Kinds = 1 << 10;
const COMMON_UPPER: Kinds = 1 << 11;
const COMMON_LOWER: Kinds = 1 << 12;
const BOX: Kinds = 1 << 13;
// Kinds that are not listed but computed.
const ASCII_UPPER: Kinds = 1 << 14;
const ASCII_LOWER: Kinds = 1 << 15;
const NOT_ASCII_LETTER: Kinds = 1 << 16;
const WHITE: Kinds = 1 << 17;
const WORD: Kinds = 1 << 18;
const IN_LINE: Kinds = 1 << 19;

const ACCENTED: Kinds = LOWER | UPPER;
const ASCII_LETTER: Kinds = ASCII_LOWER | ASCII_UPPER;
const SYMBOLS: Kinds = OPENING | CLOSING | CURRENCY | NUMERIC | LAW;

/// The characters of each kind; `a-b` is a range.
const LISTED: [(Kinds, &str); 14] = [
    (COMMON, "\u{a0}\u{ad}·´–—―…’"),
    (C1, "\u{80}-\u{9f}"),
    (BAD, "¦¤¨¬¯¸ƒˆˇ˘˛˜†‡‰⌐◊\u{fffd}ªº"),
    (LAW, "¶§"),
    (CURRENCY, "¢£¥₧€"),
    (OPENING, "¡«¿©΄΅‘‚“„•‹\u{f8ff}"),
    (CLOSING, "®»˝”›™"),
    (NUMERIC, "²³¹±¼½¾×µ÷⁄∂∆∏∑√∞∩∫≈≠≡≤≥№"),
    (FACES, "Ò-ÖÙ-Üò-öø-üŐŌŪŲ°"),
    (UPPER, "À-ÑØÜÝĂĀĄĆČĎĐĘĚĒĖĞĢİĪĶĹĽŁĻŃŇŅŒŘŚŞŠŢŤŮŰŸŹŻŽҐ"),
    (LOWER, "ßà-ñăąāćčďđęěēėğģįīķĺľłļœŕśşšťüźżžґﬁﬂ"),
    (COMMON_UPPER, "ÞΑ-ΩΆΈΉΊΌΎΏΪΫЁ-Я"),
    (COMMON_LOWER, "α-ωάέήίΰа-џ"),
    (BOX, "│┌┐┘├┤┬┼═-╬▀▄█▌▐░▒▓"),
];

/// One place of a sign: a character of one of some kinds, or one of some characters.
#[derive(Clone, Copy, Debug)]
struct Place(Kinds, &'static str);

const fn kinds(kinds: Kinds) -> Place {
    Place(kinds, "")
}

const fn chars(chars: &'static str) -> Place {
    Place(0, chars)
}

/// What follows `Â`, `Ã`, `Î` and `Ð` in UTF-8 read as Windows-1252.
const AFTER_LEAD: Place = Place(OPENING | CLOSING, "€œŠš¢£Ÿž\u{a0}\u{ad}®©°·»–—´");
/// What follows `Ø` and `Ù` in Arabic read as Windows-1252.
const AFTER_ARABIC_LEAD: Place = Place(COMMON | CURRENCY | BAD | NUMERIC | OPENING, "ŸŠ®°µ»");
const CYRILLIC_LEAD: Place = chars("ВГРС");
const GREEK_LEAD: Place = chars("ΒΓΞΟ");

/// Sequences of which one is enough to call a text bad.
#[rustfmt::skip]
const SIGNS: &[&[Place]] = &[
    &[kinds(C1)],
    &[kinds(BAD | ACCENTED | BOX | SYMBOLS), kinds(BAD)],
    &[kinds(ASCII_LETTER), kinds(COMMON_LOWER | COMMON_UPPER), kinds(BAD)],
    &[kinds(BAD), kinds(ACCENTED | BOX | SYMBOLS)],
    &[kinds(LOWER | COMMON_LOWER | BOX | CLOSING | CURRENCY | NUMERIC), kinds(UPPER)],
    &[kinds(BOX | CLOSING | CURRENCY | NUMERIC), kinds(LOWER)],
    &[kinds(LOWER | BOX | CLOSING), kinds(CURRENCY)],
    &[kinds(WHITE), kinds(UPPER), kinds(CURRENCY)],
    &[kinds(UPPER | BOX), kinds(NUMERIC | LAW)],
    &[kinds(ACCENTED | BOX | CURRENCY | CLOSING), kinds(OPENING), kinds(NUMERIC)],
    &[kinds(ACCENTED | CURRENCY | NUMERIC | BOX | LAW), kinds(CLOSING), kinds(OPENING)],
    &[kinds(CURRENCY | NUMERIC | BOX), kinds(OPENING)],
    &[kinds(ASCII_LOWER), kinds(UPPER), kinds(OPENING | CURRENCY)],
    &[kinds(BOX), kinds(FACES)],
    &[kinds(ACCENTED | SYMBOLS), kinds(BOX)],
    &[kinds(BOX), kinds(CLOSING)],
    &[kinds(ACCENTED), kinds(OPENING | CLOSING), kinds(WORD)],
    &[chars("Œœ"), kinds(NOT_ASCII_LETTER)],
    &[kinds(UPPER), chars("°")],
    &[chars("ÂÃÎÐ"), AFTER_LEAD],
    &[chars("×"), chars("²³")],
    &[chars("ØÙ"), AFTER_ARABIC_LEAD, chars("ØÙ"), AFTER_ARABIC_LEAD],
    // South Asian scripts.
    &[chars("à"), chars("²µ¹¼½¾")],
    // UTF-8 read as MacRoman.
    &[chars("√"), chars("±∂†≠®™´≤≥¥µø")],
    &[chars("≈"), chars("°¢")],
    &[chars("‚"), chars("Ä"), chars("ìîïòôúùû†°¢π")],
    &[chars("‚"), chars("âó"), chars("àä°ê")],
    // UTF-8 read as Windows-1251.
    &[chars("в"), chars("Ђ")],
    &[CYRILLIC_LEAD, Place(C1 | BAD | OPENING | CLOSING | CURRENCY, "°µ"), CYRILLIC_LEAD],
    &[chars("Г"), chars("ў"), chars("В"), chars("Ђ"), chars("В"), kinds(IN_LINE), Place(ASCII_LETTER, " ")],
    // Letters whose second byte is a no-break space, or a space that was one.
    &[chars("Ã"), chars("\u{a0}¡")],
    &[kinds(ASCII_LOWER), chars("ÃÂ"), chars(" ")],
    &[kinds(ASCII_LOWER), kinds(WHITE), chars("ÃÂ"), chars(" ")],
    &[Place(ASCII_LOWER | CLOSING, ".,?!"), chars("Â"), Place(OPENING | CLOSING, " ")],
    // UTF-8 read as Windows-1253.
    &[chars("β"), chars("€"), chars("™\u{a0}Ά\u{ad}®°")],
    &[GREEK_LEAD, Place(C1 | BAD | OPENING | CLOSING | CURRENCY, "°"), GREEK_LEAD],
    // UTF-8 read as Windows-1257.
    &[chars("ā"), chars("€")],
];

static LISTED_KINDS: LazyLock<HashMap<char, Kinds>> = LazyLock::new(|| {
    let mut kinds_of: HashMap<char, Kinds> = HashMap::new();
    for (kind, characters) in LISTED {
        let mut rest = characters.chars().peekable();
        while let Some(from) = rest.next() {
            let to = if rest.next_if_eq(&'-').is_some() {
                rest.next().unwrap_or(from)
            } else {
                from
            };
            for c in from..=to {
                *kinds_of.entry(c).or_default() |= kind;
            }
        }
    }
    kinds_of
});

fn kinds_of(c: char) -> Kinds {
    let mut kinds = LISTED_KINDS.get(&c).copied().unwrap_or(0);
    let mut add = |kind, is| kinds |= if is { kind } else { 0 };
    add(ASCII_UPPER, c.is_ascii_uppercase());
    add(ASCII_LOWER, c.is_ascii_lowercase());
    add(NOT_ASCII_LETTER, !c.is_ascii_alphabetic());
    add(WHITE, c.is_whitespace() || matches!(c, '\x1C'..='\x1F'));
    add(
        WORD,
        c == '_' || (c.is_alphanumeric() && !unicode_normalization::char::is_combining_mark(c)),
    );
    add(IN_LINE, c != '\n');
    kinds
}

/// Whether `text` looks as if it had been decoded with the wrong character set.
pub(super) fn is_bad(text: &str) -> bool {
    let characters: Vec<(char, Kinds)> = text.chars().map(|c| (c, kinds_of(c))).collect();
    let begins = |at: usize, sign: &[Place]| {
        characters.get(at..at + sign.len()).is_some_and(|window| {
            let fits = |(&(c, kinds), place): (&(char, Kinds), &Place)| {
                kinds & place.0 != 0 || place.1.contains(c)
            };
            window.iter().zip(sign).all(fits)
        })
    };
    begins(0, &[chars("ÃÂ"), chars(" ")])
        || (0..characters.len()).any(|at| SIGNS.iter().any(|sign| begins(at, sign)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn real_text_is_not_bad() {
        for text in [
            "naïve café",
            "Ångström",
            "À la carte – 5 €",
            "œuvre",
            "Привет, мир",
            "Größe ½",
            "¿Qué? ¡Sí!",
            "Ã",
            "20 °C",
        ] {
            assert!(!is_bad(text), "{text}");
        }
    }

    #[test]
    fn mojibake_is_bad() {
        for text in [
            "cafÃ©",
            "donâ€™t",
            "Ã la mode",
            "Ð¿Ñ€Ð¸Ð²ÐµÑ‚",
            "it\u{92}s",
            "Â£5",
            "вЂњ",
            "β€™",
            "ā€™",
            "‚Äî",
            "à²•",
        ] {
            assert!(is_bad(text), "{text}");
        }
    }
}
