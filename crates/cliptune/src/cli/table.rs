//! Plain tables: columns as wide as their content, the last one wrapped to the terminal.

use console::measure_text_width;

/// Spaces between two columns.
const GAP: usize = 2;
/// The last column gets at least this much, however narrow the terminal.
const LEAST: usize = 20;

/// Rows of equal length under a heading.
#[derive(Debug)]
pub(crate) struct Table {
    rows: Vec<Vec<String>>,
    right: Vec<usize>,
}

impl Table {
    pub(crate) fn new(heading: &[&str]) -> Self {
        Self {
            rows: vec![heading.iter().map(|cell| (*cell).to_owned()).collect()],
            right: Vec::new(),
        }
    }

    /// Sets columns flush right.
    pub(crate) fn right(mut self, columns: &[usize]) -> Self {
        self.right = columns.to_vec();
        self
    }

    pub(crate) fn row(&mut self, cells: Vec<String>) {
        self.rows.push(cells);
    }

    /// The table for a terminal of `width` columns, with a line break at the end of each line.
    pub(crate) fn render(&self, width: usize) -> String {
        let n_columns = self.rows.iter().map(Vec::len).max().unwrap_or(0);
        let widest = |column: usize| {
            let cells = self.rows.iter().filter_map(|row| row.get(column));
            cells
                .map(|cell| measure_text_width(cell))
                .max()
                .unwrap_or(0)
        };
        let widths: Vec<usize> = (0..n_columns.saturating_sub(1)).map(widest).collect();
        let indent: usize = widths.iter().map(|width| width + GAP).sum();
        let rest = width.saturating_sub(indent).max(LEAST);
        let mut text = String::new();
        for row in &self.rows {
            let mut line = String::new();
            for (column, cell) in row.iter().enumerate() {
                let Some(width) = widths.get(column) else {
                    let lines = wrap(cell, rest);
                    line.push_str(&lines.join(&format!("\n{}", " ".repeat(indent))));
                    continue;
                };
                let padding = " ".repeat(width.saturating_sub(measure_text_width(cell)));
                match self.right.contains(&column) {
                    true => line.extend([&padding, cell.as_str()]),
                    false => line.extend([cell.as_str(), &padding]),
                }
                line.push_str(&" ".repeat(GAP));
            }
            text.push_str(line.trim_end());
            text.push('\n');
        }
        text
    }
}

/// Breaks `text` at spaces into lines of at most `width` columns; a longer word stands alone.
pub(crate) fn wrap(text: &str, width: usize) -> Vec<String> {
    let mut lines = vec![String::new()];
    for word in text.split_whitespace() {
        let Some(line) = lines.last_mut() else { break };
        if line.is_empty() {
            line.push_str(word);
        } else if measure_text_width(line) + 1 + measure_text_width(word) <= width {
            line.push(' ');
            line.push_str(word);
        } else {
            lines.push(word.to_owned());
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up_and_the_last_one_wraps() {
        let mut table = Table::new(&["name", "n", "what"]).right(&[1]);
        table.row(vec![
            "a".into(),
            "10".into(),
            "one two three four five six".into(),
        ]);
        table.row(vec!["äöü".into(), "9".into(), String::new()]);
        let expected =
            "name   n  what\na     10  one two three four\n          five six\näöü    9\n";
        assert_eq!(table.render(30), expected);
    }
}
