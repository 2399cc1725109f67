//! Pieces of a page.

use std::borrow::Cow;

/// Text as it may stand between tags and inside double quotes.
pub(super) fn escape(text: &str) -> Cow<'_, str> {
    html_escape::encode_safe(text)
}

/// A table inside a box of its own that scrolls sideways on small screens.
pub(super) struct Table {
    columns: usize,
    html: String,
}

impl Table {
    pub(super) fn new(heading: &[&str]) -> Self {
        let mut html = "<div class=\"scroll\" tabindex=\"0\"><table><thead><tr>".to_owned();
        for (column, cell) in heading.iter().enumerate() {
            let class = if column == 0 { " class=\"l\"" } else { "" };
            html.push_str(&format!("<th scope=\"col\"{class}>{}</th>", escape(cell)));
        }
        html.push_str("</tr></thead><tbody>");
        Self {
            columns: heading.len(),
            html,
        }
    }

    /// A line across that names the rows below it.
    pub(super) fn group(&mut self, name: &str) {
        self.html.push_str(&format!(
            "<tr class=\"group\"><th scope=\"rowgroup\" class=\"l\" colspan=\"{}\">{}</th></tr>",
            self.columns,
            escape(name)
        ));
    }

    /// A row under the name in its first cell; the cell `best` is set in bold.
    pub(super) fn row(&mut self, cells: &[String], best: Option<usize>) {
        self.html.push_str("<tr>");
        for (column, cell) in cells.iter().enumerate() {
            let text = escape(cell);
            self.html.push_str(&match column {
                0 => format!("<th scope=\"row\" class=\"l\">{text}</th>"),
                _ if best == Some(column) => format!("<td class=\"best\">{text}</td>"),
                _ => format!("<td>{text}</td>"),
            });
        }
        self.html.push_str("</tr>");
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
    pub(super) tick: Option<f64>,
}

impl Bar<'_> {
    pub(super) fn html(&self) -> String {
        let tick = self.tick.map_or_else(String::new, |at| {
            format!("<b style=\"left:{:.1}%\"></b>", at.clamp(0.0, 100.0))
        });
        format!(
            "<span class=\"label\">{}</span><span class=\"track {}\"><i style=\"width:{:.1}%\"></i>{tick}</span><span class=\"value\">{}</span>",
            escape(self.label),
            self.color,
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
            text.push(if i <= group.len() {
                char::from(DIGITS[digit])
            } else {
                '='
            });
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_in_base_64() {
        let cases = [
            ("", ""),
            ("f", "Zg=="),
            ("fo", "Zm8="),
            ("foo", "Zm9v"),
            ("foob", "Zm9vYg=="),
        ];
        for (bytes, text) in cases {
            assert_eq!(base64(bytes.as_bytes()), text);
        }
        assert_eq!(base64(&[0xff, 0xfe, 0xfd]), "//79");
    }

    #[test]
    fn cells_are_escaped() {
        let mut table = Table::new(&["<b>", "n"]);
        table.group("a&b");
        table.row(&["x".into(), "1".into()], Some(1));
        let html = table.finish();
        assert!(html.contains("&lt;b&gt;") && html.contains("<td class=\"best\">1</td>"));
        assert!(html.contains("colspan=\"2\">a&amp;b"));
    }
}
