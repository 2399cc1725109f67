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
    let scale = Scale::of(rows.iter().flat_map(|(_, row)| row));
    let at = |value: f64| names + (right - names) * scale.share(value);
    let height = rows.len() as f64 * each + 40.0;
    let bottom = height - 36.0;
    let mut svg = format!(
        "<svg viewBox=\"0 0 {WIDTH} {height}\" role=\"img\"><title>{}</title>",
        escape(title)
    );
    for tick in scale.ticks() {
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
                at((value - spread).max(scale.low)),
                at((value + spread).min(scale.high)),
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

/// What the rows have in common: tens that hold all values, and marks between.
struct Scale {
    low: f64,
    high: f64,
    step: f64,
}

impl Scale {
    fn of<'a>(dots: impl Iterator<Item = &'a Dot>) -> Self {
        let bars = dots.map(|dot| {
            let ends = [dot.value - dot.spread, dot.value + dot.spread];
            ends.map(|end| end.clamp(0.0, 100.0))
        });
        let (low, high) = bars.fold((100.0f64, 0.0f64), |(low, high), [a, b]| {
            (low.min(a), high.max(b))
        });
        let low = (low / 10.0).floor() * 10.0;
        let high = ((high / 10.0).ceil() * 10.0).max(low + 10.0);
        let steps = [2.0, 5.0, 10.0, 20.0].into_iter();
        let step = steps.clone().find(|step| (high - low) / step <= 5.0);
        Self {
            low,
            high,
            step: step.unwrap_or(20.0),
        }
    }

    fn share(&self, value: f64) -> f64 {
        (value - self.low) / (self.high - self.low)
    }

    fn ticks(&self) -> impl Iterator<Item = f64> {
        let count = ((self.high - self.low) / self.step).floor() as usize;
        let (low, step) = (self.low, self.step);
        (0..=count).map(move |i| low + step * i as f64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scale(values: &[(f64, f64)]) -> Scale {
        let dots: Vec<Dot> = values
            .iter()
            .map(|&(value, spread)| Dot {
                place: 1,
                mark: 1,
                value,
                spread,
            })
            .collect();
        Scale::of(dots.iter())
    }

    #[test]
    fn all_values_and_bars_lie_on_the_scale() {
        for values in [
            vec![(34.0, 2.0), (38.5, 4.0)],
            vec![(0.0, 3.0), (100.0, 3.0)],
            vec![(50.0, 0.0)],
            vec![(100.0, 0.0)],
        ] {
            let scale = scale(&values);
            for (value, spread) in values {
                for end in [value - spread, value, value + spread] {
                    let share = scale.share(end.clamp(0.0, 100.0));
                    assert!((0.0..=1.0).contains(&share), "{value} {spread}");
                }
            }
            assert!(
                scale
                    .ticks()
                    .all(|tick| (0.0..=1.0).contains(&scale.share(tick)))
            );
            assert!((2..=6).contains(&scale.ticks().count()));
        }
        assert!(dots("t", "x", &[]).ends_with("</svg>"));
    }
}
