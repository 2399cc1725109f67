//! A confusion matrix as inline SVG.

use super::html::escape;

/// A confusion matrix of shares: rows are classes, columns predictions. The largest share has the full colour.
pub(super) fn heat(title: &str, classes: &[String], shares: &[Vec<f64>]) -> String {
    const CELL: f64 = 17.0;
    const NAMES: f64 = 84.0;
    let side = NAMES + CELL * classes.len() as f64;
    let mut svg = format!(
        "<svg viewBox=\"0 0 {side} {side}\" role=\"img\" style=\"width:{side}px;max-width:none\"><title>{}</title>",
        escape(title)
    );
    for (i, name) in classes.iter().enumerate() {
        let middle = NAMES + CELL * (i as f64 + 0.5);
        let name = escape(name);
        svg.push_str(&format!(
            "<text class=\"faint\" x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{name}</text><text class=\"faint\" transform=\"translate({:.1} {}) rotate(-90)\">{name}</text>",
            NAMES - 5.0,
            middle + 4.0,
            middle + 4.0,
            NAMES - 5.0
        ));
    }
    let largest = shares
        .iter()
        .flatten()
        .copied()
        .fold(f64::MIN_POSITIVE, f64::max);
    for (row, of_class) in shares.iter().enumerate() {
        for (column, share) in of_class
            .iter()
            .enumerate()
            .filter(|(_, share)| **share > 0.0)
        {
            let (x, y) = (NAMES + CELL * column as f64, NAMES + CELL * row as f64);
            let names = [row, column].map(|i| classes.get(i).map_or("", String::as_str));
            svg.push_str(&format!(
                "<rect class=\"heat\" x=\"{x}\" y=\"{y}\" width=\"{CELL}\" height=\"{CELL}\" fill-opacity=\"{:.2}\"><title>{} called {}: {:.0} %</title></rect>",
                share / largest,
                escape(names[0]),
                escape(names[1]),
                100.0 * share
            ));
        }
    }
    let end = side - 0.5;
    svg.push_str(&format!(
        "<path class=\"rule\" fill=\"none\" d=\"M{NAMES} {NAMES}H{end}V{end}H{NAMES}Z\"/></svg>"
    ));
    svg
}
