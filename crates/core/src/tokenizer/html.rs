//! HTML character references, as Python's `html.unescape` resolves them.

use std::borrow::Cow;

/// Longest name that is looked up, in characters.
const LONGEST_NAME: usize = 32;

/// Names that HTML knows without their semicolon too, in order of their bytes.
#[rustfmt::skip]
const WITHOUT_SEMICOLON: [&str; 106] = [
    "AElig", "AMP", "Aacute", "Acirc", "Agrave", "Aring", "Atilde", "Auml", "COPY", "Ccedil", "ETH", "Eacute", "Ecirc",
    "Egrave", "Euml", "GT", "Iacute", "Icirc", "Igrave", "Iuml", "LT", "Ntilde", "Oacute", "Ocirc", "Ograve", "Oslash",
    "Otilde", "Ouml", "QUOT", "REG", "THORN", "Uacute", "Ucirc", "Ugrave", "Uuml", "Yacute", "aacute", "acirc", "acute",
    "aelig", "agrave", "amp", "aring", "atilde", "auml", "brvbar", "ccedil", "cedil", "cent", "copy", "curren", "deg",
    "divide", "eacute", "ecirc", "egrave", "eth", "euml", "frac12", "frac14", "frac34", "gt", "iacute", "icirc", "iexcl",
    "igrave", "iquest", "iuml", "laquo", "lt", "macr", "micro", "middot", "nbsp", "not", "ntilde", "oacute", "ocirc",
    "ograve", "ordf", "ordm", "oslash", "otilde", "ouml", "para", "plusmn", "pound", "quot", "raquo", "reg", "sect", "shy",
    "sup1", "sup2", "sup3", "szlig", "thorn", "times", "uacute", "ucirc", "ugrave", "uml", "uuml", "yacute", "yen", "yuml",
];

/// What Windows-1252 has at 0x80 to 0x9F; HTML reads numeric references to these places so. Five places are empty there.
pub(super) const WINDOWS_1252: [char; 32] = [
    '€', '\u{81}', '‚', 'ƒ', '„', '…', '†', '‡', 'ˆ', '‰', 'Š', '‹', 'Œ', '\u{8d}', 'Ž',
    '\u{8f}', //
    '\u{90}', '‘', '’', '“', '”', '•', '–', '—', '˜', '™', 'š', '›', 'œ', '\u{9d}', 'ž', 'Ÿ',
];

/// The characters of the entity `name`, given without ampersand and semicolon, if HTML has it.
pub(super) fn entity(name: &str) -> Option<String> {
    // A name that could end early would be resolved in part.
    if name.is_empty() || !name.bytes().all(|b| b.is_ascii_alphanumeric()) {
        return None;
    }
    let reference = format!("&{name};");
    let text = html_escape::decode_html_entities(&reference);
    (text != reference.as_str()).then(|| text.into_owned())
}

/// Replaces every character reference: with and without semicolon, by name (the longest known beginning) and by number.
pub(super) fn unescape(text: &str) -> Cow<'_, str> {
    let Some(first) = text.find('&') else {
        return Cow::Borrowed(text);
    };
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    let mut next = Some(first);
    while let Some(at) = next {
        out.push_str(&rest[..at]);
        rest = &rest[at + 1..];
        let used = number(rest, &mut out).or_else(|| name(rest, &mut out));
        match used {
            Some(used) => rest = &rest[used..],
            None => out.push('&'),
        }
        next = rest.find('&');
    }
    out.push_str(rest);
    Cow::Owned(out)
}

/// Resolves `#123;` or `#x1f;` at the start of `text`; gives the bytes used.
fn number(text: &str, out: &mut String) -> Option<usize> {
    let digits = text.strip_prefix('#')?;
    let (digits, radix) = match digits.strip_prefix(['x', 'X']) {
        Some(digits) => (digits, 16),
        None => (digits, 10),
    };
    let len = digits
        .bytes()
        .take_while(|&b| char::from(b).is_digit(radix))
        .count();
    if len == 0 {
        return None;
    }
    let value = digits[..len]
        .chars()
        .filter_map(|c| c.to_digit(radix))
        .fold(0u32, |value, digit| {
            value.saturating_mul(radix).saturating_add(digit)
        });
    out.extend(referenced(value));
    let start = text.len() - digits.len();
    Some(start + len + usize::from(digits[len..].starts_with(';')))
}

/// The character that a numeric reference stands for; some stand for none.
fn referenced(value: u32) -> Option<char> {
    match value {
        0 => Some(char::REPLACEMENT_CHARACTER),
        0x0D => Some('\r'),
        0x80..=0x9F => Some(WINDOWS_1252[value as usize - 0x80]),
        0x01..=0x08 | 0x0B | 0x0E..=0x1F | 0x7F | 0xFDD0..=0xFDEF => None,
        _ => match char::from_u32(value) {
            Some(_) if value & 0xFFFE == 0xFFFE => None,
            Some(c) => Some(c),
            None => Some(char::REPLACEMENT_CHARACTER),
        },
    }
}

/// Resolves a name at the start of `text`; gives the bytes used.
fn name(text: &str, out: &mut String) -> Option<usize> {
    let stop = |c: char| matches!(c, '\t' | '\n' | '\x0C' | ' ' | '<' | '&' | '#' | ';');
    let len: usize = text
        .chars()
        .take(LONGEST_NAME)
        .take_while(|&c| !stop(c))
        .map(char::len_utf8)
        .sum();
    let name = &text[..len];
    if text[len..].starts_with(';')
        && let Some(characters) = entity(name)
    {
        out.push_str(&characters);
        return Some(len + 1);
    }
    let longest = WITHOUT_SEMICOLON
        .iter()
        .filter(|known| name.starts_with(**known))
        .max_by_key(|known| known.len())?;
    out.push_str(&entity(longest)?);
    Some(longest.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn references_are_resolved_as_browsers_do() {
        for (text, expected) in [
            ("&amp;amp;", "&amp;"),
            ("&notit;", "¬it;"),
            ("&notin;", "∉"),
            ("&copy2020 &COPY", "©2020 ©"),
            (
                "&unknown; & &; &#; &#x; &#xg",
                "&unknown; & &; &#; &#x; &#xg",
            ),
            ("&#8364&#x20AC;&#128;&#X80", "€€€€"),
            ("a&#1;b&#xFFFE;c&#xFDD0;d&#x1FFFF;e", "abcde"),
            (
                "&#0;&#xD800;&#x110000;&#99999999999999999999;",
                "\u{fffd}\u{fffd}\u{fffd}\u{fffd}",
            ),
            ("&#129;&#13;", "\u{81}\r"),
            ("&NotEqualTilde;", "≂\u{338}"),
            ("&&lt;&", "&<&"),
            ("&ampé;", "&é;"),
            ("&CounterClockwiseContourIntegral;", "∳"),
        ] {
            assert_eq!(unescape(text), expected, "{text}");
        }
    }

    #[test]
    fn every_short_name_is_an_entity() {
        for name in WITHOUT_SEMICOLON {
            assert!(entity(name).is_some(), "{name}");
        }
        assert!(WITHOUT_SEMICOLON.is_sorted());
    }
}
