//! Single-byte character sets that UTF-8 is mistaken for.

use std::collections::{HashMap, HashSet};
use std::sync::LazyLock;

use super::super::html::WINDOWS_1252;

/// A single-byte character set whose first half is ASCII.
#[derive(Debug)]
pub(super) struct Charset {
    upper: [char; 128],
    bytes: HashMap<char, u8>,
    /// Whether U+FFFD may stand for a byte that was lost, written as byte 0x1A.
    pub(super) lossy: bool,
    /// Whether a space may stand for byte 0xA0. In MacRoman the sequence is often a dash and a space.
    pub(super) spaces_may_be_a0: bool,
}

/// The byte that a lossy set writes for U+FFFD.
pub(super) const LOST: u8 = 0x1A;

impl Charset {
    fn new(upper: [char; 128], lossy: bool, spaces_may_be_a0: bool) -> Self {
        let bytes = upper.into_iter().zip(0x80..=0xFF).collect();
        Self {
            upper,
            bytes,
            lossy,
            spaces_may_be_a0,
        }
    }

    /// `text` in this set, if it has all its characters.
    pub(super) fn encode(&self, text: &str) -> Option<Vec<u8>> {
        text.chars()
            .map(|c| match c {
                '\u{1A}' if self.lossy => None,
                char::REPLACEMENT_CHARACTER if self.lossy => Some(LOST),
                c if c.is_ascii() => Some(c as u8),
                c => self.bytes.get(&c).copied(),
            })
            .collect()
    }
}

/// The sets in the order in which they are tried. The Windows sets have C1 controls where Windows has nothing.
pub(super) static CHARSETS: LazyLock<[Charset; 10]> = LazyLock::new(|| {
    let latin1 = std::array::from_fn(|i| char::from(i as u8 + 0x80));
    let mut windows_1252 = latin1;
    windows_1252[..32].copy_from_slice(&WINDOWS_1252);
    [
        Charset::new(latin1, false, true),
        Charset::new(windows_1252, true, true),
        Charset::new(table(WINDOWS_1251), true, true),
        Charset::new(table(WINDOWS_1250), true, true),
        Charset::new(table(WINDOWS_1253), true, true),
        Charset::new(table(WINDOWS_1254), true, true),
        Charset::new(table(WINDOWS_1257), true, true),
        Charset::new(table(ISO_8859_2), false, true),
        Charset::new(table(MACROMAN), false, false),
        Charset::new(table(CP437), false, true),
    ]
});

/// How many of [`CHARSETS`] order their letters as Latin-1 does, so that their characters tell which byte of UTF-8 they may be.
const LIKE_LATIN_1: usize = 7;

/// Which characters may be which byte of a UTF-8 sequence.
#[derive(Debug)]
pub(super) struct Utf8Clues {
    /// First bytes of sequences of two, three and four bytes.
    pub(super) first: [HashSet<char>; 3],
    /// Bytes that continue a sequence, and the space.
    pub(super) continuation: HashSet<char>,
    /// [`Utf8Clues::continuation`] without what stands for itself in ordinary text.
    pub(super) strict_continuation: HashSet<char>,
}

/// The clues of all sets that resemble Latin-1.
pub(super) static CLUES: LazyLock<Utf8Clues> = LazyLock::new(|| {
    let of_bytes = |bytes: &[u8]| -> HashSet<char> {
        let sets = &CHARSETS[..LIKE_LATIN_1];
        sets.iter()
            .flat_map(|set| bytes.iter().map(|&b| set.upper[usize::from(b) - 0x80]))
            .collect()
    };
    let range = |from: u8, to: u8| (from..=to).collect::<Vec<_>>();
    let mut continuation = of_bytes(&range(0x80, 0xBF));
    let strict_continuation = continuation
        .iter()
        .copied()
        .filter(|c| !"–—―‘’‚“”„•…".contains(*c))
        .collect();
    continuation.insert(' ');
    // Of the sequences of four bytes only those of 0xF0 and 0xF3 have characters that are in use.
    let first = [
        of_bytes(&range(0xC2, 0xDF)),
        of_bytes(&range(0xE0, 0xEF)),
        of_bytes(&[0xF0, 0xF3]),
    ];
    Utf8Clues {
        first,
        continuation,
        strict_continuation,
    }
});

/// The upper half of a set, written as a text of 128 characters, or of 96 where the C1 controls come first.
fn table(characters: &str) -> [char; 128] {
    let mut table = std::array::from_fn(|i| char::from(i as u8 + 0x80));
    let skip = 128usize.saturating_sub(characters.chars().count());
    for (place, c) in table[skip..].iter_mut().zip(characters.chars()) {
        *place = c;
    }
    table
}

const WINDOWS_1251: &str = "\
    ЂЃ‚ѓ„…†‡€‰Љ‹ЊЌЋЏђ‘’“”•–—\u{98}™љ›њќћџ\u{a0}ЎўЈ¤Ґ¦§Ё©Є«¬\u{ad}®Ї°±Ііґµ¶·ё№є»јЅѕї\
    АБВГДЕЖЗИЙКЛМНОПРСТУФХЦЧШЩЪЫЬЭЮЯабвгдежзийклмнопрстуфхцчшщъыьэюя";
const WINDOWS_1250: &str = "\
    €\u{81}‚\u{83}„…†‡\u{88}‰Š‹ŚŤŽŹ\u{90}‘’“”•–—\u{98}™š›śťžź\u{a0}ˇ˘Ł¤Ą¦§¨©Ş«¬\u{ad}®Ż°±˛ł´µ¶·¸ąş»Ľ˝ľż\
    ŔÁÂĂÄĹĆÇČÉĘËĚÍÎĎĐŃŇÓÔŐÖ×ŘŮÚŰÜÝŢßŕáâăäĺćçčéęëěíîďđńňóôőö÷řůúűüýţ˙";
const WINDOWS_1253: &str = "\
    €\u{81}‚ƒ„…†‡\u{88}‰\u{8a}‹\u{8c}\u{8d}\u{8e}\u{8f}\u{90}‘’“”•–—\u{98}™\u{9a}›\u{9c}\u{9d}\u{9e}\u{9f}\u{a0}΅Ά£¤¥¦§¨©ª«¬\u{ad}®―°±²³΄µ¶·ΈΉΊ»Ό½ΎΏ\
    ΐΑΒΓΔΕΖΗΘΙΚΛΜΝΞΟΠΡÒΣΤΥΦΧΨΩΪΫάέήίΰαβγδεζηθικλμνξοπρςστυφχψωϊϋόύώÿ";
const WINDOWS_1254: &str = "\
    €\u{81}‚ƒ„…†‡ˆ‰Š‹Œ\u{8d}\u{8e}\u{8f}\u{90}‘’“”•–—˜™š›œ\u{9d}\u{9e}Ÿ\u{a0}¡¢£¤¥¦§¨©ª«¬\u{ad}®¯°±²³´µ¶·¸¹º»¼½¾¿\
    ÀÁÂÃÄÅÆÇÈÉÊËÌÍÎÏĞÑÒÓÔÕÖ×ØÙÚÛÜİŞßàáâãäåæçèéêëìíîïğñòóôõö÷øùúûüışÿ";
const WINDOWS_1257: &str = "\
    €\u{81}‚\u{83}„…†‡\u{88}‰\u{8a}‹\u{8c}¨ˇ¸\u{90}‘’“”•–—\u{98}™\u{9a}›\u{9c}¯˛\u{9f}\u{a0}¡¢£¤¥¦§Ø©Ŗ«¬\u{ad}®Æ°±²³´µ¶·ø¹ŗ»¼½¾æ\
    ĄĮĀĆÄÅĘĒČÉŹĖĢĶĪĻŠŃŅÓŌÕÖ×ŲŁŚŪÜŻŽßąįāćäåęēčéźėģķīļšńņóōõö÷ųłśūüżž˙";
const ISO_8859_2: &str = "\
    \u{a0}Ą˘Ł¤ĽŚ§¨ŠŞŤŹ\u{ad}ŽŻ°ą˛ł´ľśˇ¸šşťź˝žżŔÁÂĂÄĹĆÇČÉĘËĚÍÎĎĐŃŇÓÔŐÖ×ŘŮÚŰÜÝŢß\
    ŕáâăäĺćçčéęëěíîďđńňóôőö÷řůúűüýţ˙";
const MACROMAN: &str = "\
    ÄÅÇÉÑÖÜáàâäãåçéèêëíìîïñóòôöõúùûü†°¢£§•¶ß®©™´¨≠ÆØ∞±≤≥¥µ∂∑∏π∫ªºΩæø\
    ¿¡¬√ƒ≈∆«»…\u{a0}ÀÃÕŒœ–—“”‘’÷◊ÿŸ⁄€‹›ﬁﬂ‡·‚„‰ÂÊÁËÈÍÎÏÌÓÔÒÚÛÙıˆ˜¯˘˙˚¸˝˛ˇ";
const CP437: &str = "\
    ÇüéâäàåçêëèïîìÄÅÉæÆôöòûùÿÖÜ¢£¥₧ƒáíóúñÑªº¿⌐¬½¼¡«»░▒▓│┤╡╢╖╕╣║╗╝╜╛┐\
    └┴┬├─┼╞╟╚╔╩╦╠═╬╧╨╤╥╙╘╒╓╫╪┘┌█▄▌▐▀αßΓπΣσµτΦΘΩδ∞φε∩≡±≥≤⌠⌡÷≈°∙·√ⁿ²■\u{a0}";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_are_complete() {
        for characters in [
            WINDOWS_1251,
            WINDOWS_1250,
            WINDOWS_1253,
            WINDOWS_1254,
            WINDOWS_1257,
            MACROMAN,
            CP437,
        ] {
            assert_eq!(characters.chars().count(), 128, "{characters}");
        }
        assert_eq!(ISO_8859_2.chars().count(), 96);
        for set in &*CHARSETS {
            assert_eq!(
                set.bytes.len(),
                128,
                "a character is there twice: {:?}",
                set.upper
            );
        }
    }

    #[test]
    fn encoding_gives_the_bytes_of_the_set() {
        assert_eq!(
            CHARSETS[1].encode("é€\u{fffd}").as_deref(),
            Some(&[0xE9, 0x80, LOST][..])
        );
        assert_eq!(CHARSETS[0].encode("€"), None);
        assert_eq!(CHARSETS[2].encode("Щ").as_deref(), Some(&[0xD9][..]));
        assert_eq!(CHARSETS[7].encode("Ž").as_deref(), Some(&[0xAE][..]));
        assert_eq!(CHARSETS[8].encode("Ω").as_deref(), Some(&[0xBD][..]));
        assert_eq!(CHARSETS[9].encode("■").as_deref(), Some(&[0xFE][..]));
    }
}
