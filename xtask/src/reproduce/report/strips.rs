//! Rows with dots on a common scale, as inline SVG.

use super::charts::{WIDTH, color, mark};
use super::html::escape;

/// A value in a row.
#[derive(Clone, Copy, Debug)]
pub(super) struct Dot {
    /// Place of the contestant, which decides on the colour.
    pub(super) place: usize,
    /// Decides on the mark.
    pub(super) mark: usize,
    pub(super) value: f64,
    pub(super) spread: f64,
}

/// Room that the names of rows take.
fn room<'a>(names: impl Iterator<Item = &'a str>) -> f64 {
    let longest = names.map(|name| name.chars().count()).max().unwrap_or(0);
    (6.6 * longest as f64 + 16.0).clamp(78.0, WIDTH / 2.0)
}

/// Named rows of dots, percent.
pub(super) fn dots(title: &str, x_title: &str, rows: &[(String, Vec<Dot>)]) -> String {
    /// Distance of two dots of a row, which stand one below the other so that equal values stay apart.
    const APART: f64 = 8.0;
    let names = room(rows.iter().map(|(name, _)| name.as_str()));
    let most = rows.iter().map(|(_, row)| row.len()).max().unwrap_or(0);
    let each = (APART * most as f64 + 8.0).max(24.0);
    let right = WIDTH - 14.0;
    let values = rows.iter().flat_map(|row| &row.1);
    let highest = values
        .map(|dot| (dot.value + dot.spread).min(100.0))
        .fold(10.0, f64::max);
    let limit = (highest / 10.0).ceil() * 10.0;
    let at = |value: f64| names + (right - names) * value.max(0.0) / limit;
    let height = rows.len() as f64 * each + 40.0;
    let bottom = height - 36.0;
    let mut svg = format!(
        "<svg viewBox=\"0 0 {WIDTH} {height}\" role=\"img\"><title>{}</title>",
        escape(title)
    );
    for tick in (0..=4).map(|i| limit * f64::from(i) / 4.0) {
        let x = at(tick);
        svg.push_str(&format!(
            "<line class=\"rule\" x1=\"{x:.1}\" x2=\"{x:.1}\" y1=\"2\" y2=\"{bottom:.1}\"/><text class=\"faint\" x=\"{x:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{tick}</text>",
            bottom + 14.0
        ));
    }
    for (i, (name, row)) in rows.iter().enumerate() {
        let middle = each * (i as f64 + 0.5);
        let top = each * i as f64;
        if i % 2 == 1 {
            svg.push_str(&format!(
                "<rect class=\"band\" x=\"0\" y=\"{top:.1}\" width=\"{WIDTH}\" height=\"{each:.1}\"/>"
            ));
        }
        svg.push_str(&format!(
            "<text x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
            names - 10.0,
            middle + 4.0,
            escape(name)
        ));
        for (j, dot) in row.iter().enumerate() {
            let Dot {
                place,
                mark: sign,
                value,
                spread,
            } = *dot;
            let y = middle + APART * (j as f64 - (row.len() as f64 - 1.0) / 2.0);
            svg.push_str(&format!(
                "<g class=\"{}\"><line class=\"spread\" x1=\"{:.1}\" x2=\"{:.1}\" y1=\"{y:.1}\" y2=\"{y:.1}\"/>{}</g>",
                color(place),
                at(value - spread),
                at((value + spread).min(100.0)),
                mark(sign, at(value), y)
            ));
        }
    }
    svg.push_str(&format!(
        "<text class=\"faint\" x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text></svg>",
        (names + right) / 2.0,
        height - 6.0,
        escape(x_title)
    ));
    svg
}
