//! Pieces of a page.

use std::borrow::Cow;

/// Text as it may stand between tags and inside double quotes.
pub(super) fn escape(text: &str) -> Cow<'_, str> {
    html_escape::encode_safe(text)
}

/// A table inside a box of its own that scrolls sideways on small screens.
pub(super) struct Table {
    /// Columns that are flush left.
    left: usize,
    html: String,
    above: String,
}

impl Table {
    pub(super) fn new(heading: &[&str], left: usize) -> Self {
        let mut html = "<div class=\"scroll\" tabindex=\"0\"><table><thead><tr>".to_owned();
        for (column, cell) in heading.iter().enumerate() {
            let class = if column < left { " class=\"l\"" } else { "" };
            html.push_str(&format!("<th scope=\"col\"{class}>{}</th>", escape(cell)));
        }
        html.push_str("</tr></thead><tbody>");
        Self { left, html, above: String::new() }
    }

    /// A row; the first of a group, as its first cell tells, is set apart. `best` is set in bold.
    pub(super) fn row(&mut self, cells: &[String], best: Option<usize>) {
        let name = cells.first().cloned().unwrap_or_default();
        let grouped = self.left > 1;
        let first = grouped && name != self.above;
        self.html.push_str(if first { "<tr class=\"first\">" } else { "<tr>" });
        for (column, cell) in cells.iter().enumerate() {
            let text = match column == 0 && grouped && !first {
                true => Cow::Borrowed(""),
                false => escape(cell),
            };
            let class = match (column < self.left, best == Some(column)) {
                (true, _) => " class=\"l\"",
                (false, true) => " class=\"best\"",
                (false, false) => "",
            };
            match column == 0 && !grouped {
                true => self.html.push_str(&format!("<th scope=\"row\"{class}>{text}</th>")),
                false => self.html.push_str(&format!("<td{class}>{text}</td>")),
            }
        }
        self.html.push_str("</tr>");
        self.above = name;
    }

    pub(super) fn finish(mut self) -> String {
        self.html.push_str("</tbody></table></div>\n");
        self.html
    }
}

/// A bar of `percent` with its name and value; `tick` marks another value on it.
pub(super) struct Bar<'a> {
    pub(super) label: &'a str,
    pub(super) percent: f64,
    pub(super) value: &'a str,
    /// Class of the colour.
    pub(super) color: &'a str,
    /// Class of the filling.
    pub(super) filling: &'a str,
    pub(super) tick: Option<f64>,
}

impl Bar<'_> {
    pub(super) fn html(&self) -> String {
        let tick = self.tick.map_or_else(String::new, |at| {
            format!("<b style=\"left:{:.1}%\"></b>", at.clamp(0.0, 100.0))
        });
        format!(
            "<span class=\"label\">{}</span><span class=\"track {}\"><i class=\"{}\" style=\"width:{:.1}%\"></i>{tick}</span><span class=\"value\">{}</span>",
            escape(self.label),
            self.color,
            self.filling,
            self.percent.clamp(0.0, 100.0),
            escape(self.value)
        )
    }
}

/// Bytes in base 64.
pub(super) fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for group in bytes.chunks(3) {
        let byte = |i: usize| u32::from(group.get(i).copied().unwrap_or(0));
        let bits = byte(0) << 16 | byte(1) << 8 | byte(2);
        for i in 0..4usize {
            // A group of n bytes has n + 1 digits.
            let digit = (bits >> (18 - 6 * i)) as usize % 64;
            text.push(if i <= group.len() { char::from(DIGITS[digit]) } else { '=' });
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_in_base_64() {
        let cases = [("", ""), ("f", "Zg=="), ("fo", "Zm8="), ("foo", "Zm9v"), ("foob", "Zm9vYg==")];
        for (bytes, text) in cases {
            assert_eq!(base64(bytes.as_bytes()), text);
        }
        assert_eq!(base64(&[0xff, 0xfe, 0xfd]), "//79");
    }

    #[test]
    fn cells_are_escaped_and_groups_named_once() {
        let mut table = Table::new(&["task", "<b>", "n"], 2);
        table.row(&["a&b".into(), "x".into(), "1".into()], Some(2));
        table.row(&["a&b".into(), "y".into(), "2".into()], None);
        let html = table.finish();
        assert!(html.contains("&lt;b&gt;") && html.contains("<td class=\"best\">1</td>"));
        assert_eq!(html.matches("a&amp;b").count(), 1);
    }
}
