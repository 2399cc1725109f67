//! Charts as inline SVG. Sizes are chosen so that letters stay readable on a phone, where a chart is as wide as the screen.

use super::html::escape;

const WIDTH: f64 = 360.0;
const HEIGHT: f64 = 250.0;
const LEFT: f64 = 40.0;
const RIGHT: f64 = 120.0;
const TOP: f64 = 12.0;
const BOTTOM: f64 = 40.0;
/// Least distance of two lines of text.
const LINE: f64 = 13.0;

/// A point with the length of its error bar to either side.
#[derive(Clone, Copy, Debug)]
pub(super) struct Point {
    pub(super) x: f64,
    pub(super) y: f64,
    pub(super) spread: f64,
}

impl Point {
    /// The ends of its bar: no percentage is below 0 or above 100.
    fn bar(&self) -> [f64; 2] {
        [self.y - self.spread, self.y + self.spread].map(|y| y.clamp(0.0, 100.0))
    }
}

/// A line with marks, or a mark.
#[derive(Clone, Debug)]
pub(super) struct Series {
    pub(super) label: String,
    /// Decides on colour and mark.
    pub(super) place: usize,
    pub(super) points: Vec<Point>,
}

/// Lines over a common pair of axes.
#[derive(Clone, Debug)]
pub(super) struct Chart {
    /// For those who cannot see it.
    pub(super) title: String,
    pub(super) x_title: String,
    pub(super) y_title: String,
    pub(super) x_ticks: Vec<(f64, String)>,
    /// Dashed lines across: name, place, height.
    pub(super) levels: Vec<(String, usize, f64)>,
    pub(super) series: Vec<Series>,
}

/// The class of a contestant's colour.
pub(super) fn color(place: usize) -> String {
    // The first colour is grey and belongs to what learns nothing.
    match place {
        0 => "c0".to_owned(),
        place => format!("c{}", 1 + (place - 1) % 6),
    }
}

impl Chart {
    pub(super) fn svg(&self) -> String {
        let axes = Axes::of(self);
        let mut svg = format!(
            "<svg viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\"><title>{}</title>",
            escape(&self.title)
        );
        svg.push_str(&self.grid(&axes));
        for (_, place, y) in &self.levels {
            let y = axes.y(*y);
            svg.push_str(&format!(
                "<line class=\"level {}\" x1=\"{LEFT}\" x2=\"{:.1}\" y1=\"{y:.1}\" y2=\"{y:.1}\"/>",
                color(*place),
                WIDTH - RIGHT
            ));
        }
        self.series
            .iter()
            .for_each(|series| svg.push_str(&series.svg(&axes)));
        svg.push_str(&self.names(&axes));
        svg.push_str("</svg>");
        svg
    }

    fn grid(&self, axes: &Axes) -> String {
        let (right, bottom) = (WIDTH - RIGHT, HEIGHT - BOTTOM);
        let mut svg = String::new();
        for tick in axes.y_ticks() {
            let y = axes.y(tick);
            svg.push_str(&format!(
                "<line class=\"rule\" x1=\"{LEFT}\" x2=\"{right}\" y1=\"{y:.1}\" y2=\"{y:.1}\"/><text class=\"faint\" x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{tick}</text>",
                LEFT - 6.0,
                y + 4.0
            ));
        }
        for (x, text) in &self.x_ticks {
            svg.push_str(&format!(
                "<text class=\"faint\" x=\"{:.1}\" y=\"{}\" text-anchor=\"middle\">{}</text>",
                axes.x(*x),
                bottom + 15.0,
                escape(text)
            ));
        }
        let middle = (TOP + bottom) / 2.0;
        svg.push_str(&format!(
            "<text class=\"faint\" x=\"{:.1}\" y=\"{}\" text-anchor=\"middle\">{}</text><text class=\"faint\" transform=\"translate(10 {middle:.1}) rotate(-90)\" text-anchor=\"middle\">{}</text>",
            (LEFT + right) / 2.0,
            HEIGHT - 8.0,
            escape(&self.x_title),
            escape(&self.y_title)
        ));
        svg
    }

    /// Names at the right ends of the lines, moved apart where they would cover each other.
    fn names(&self, axes: &Axes) -> String {
        let of_series = self.series.iter().filter_map(|series| {
            let last = series.points.last()?;
            Some(Name::new(
                axes.y(last.y),
                series.place,
                &series.label,
                false,
            ))
        });
        let of_levels = self.levels.iter();
        let of_levels = of_levels.map(|(name, place, y)| Name::new(axes.y(*y), *place, name, true));
        let mut names: Vec<Name<'_>> = of_series.chain(of_levels).collect();
        names.sort_by(|a, b| a.y.total_cmp(&b.y));
        move_apart(&mut names);
        names.iter().map(Name::svg).collect()
    }
}

/// A name beside the chart.
struct Name<'a> {
    y: f64,
    place: usize,
    lines: Vec<&'a str>,
    /// Whether it belongs to a dashed line.
    dashed: bool,
}

impl<'a> Name<'a> {
    fn new(y: f64, place: usize, name: &'a str, dashed: bool) -> Self {
        // What stands in brackets goes on a line of its own.
        let lines = match name.find(" (") {
            Some(at) => vec![&name[..at], &name[at + 1..]],
            None => vec![name],
        };
        Self {
            y,
            place,
            lines,
            dashed,
        }
    }

    fn svg(&self) -> String {
        let (y, x) = (self.y, WIDTH - RIGHT + 12.0);
        let key = match self.dashed {
            true => format!(
                "<line class=\"level\" x1=\"{:.1}\" x2=\"{:.1}\" y1=\"{y:.1}\" y2=\"{y:.1}\"/>",
                x - 4.0,
                x + 5.0
            ),
            false => mark(self.place, x, y),
        };
        let mut svg = format!("<g class=\"{}\">{key}", color(self.place));
        for (i, line) in self.lines.iter().enumerate() {
            svg.push_str(&format!(
                "<text class=\"name\" x=\"{:.1}\" y=\"{:.1}\">{}</text>",
                x + 9.0,
                y + 4.0 + LINE * i as f64,
                escape(line)
            ));
        }
        svg.push_str("</g>");
        svg
    }
}

/// Moves sorted names down until none covers another, then up again as far as they left the chart.
fn move_apart(names: &mut [Name<'_>]) {
    let mut free = TOP;
    for name in names.iter_mut() {
        name.y = name.y.max(free);
        free = name.y + LINE * name.lines.len() as f64 + 2.0;
    }
    let mut end = HEIGHT - 14.0;
    for name in names.iter_mut().rev() {
        name.y = name.y.min(end - LINE * (name.lines.len() - 1) as f64);
        end = name.y - LINE - 2.0;
    }
}

impl Series {
    fn svg(&self, axes: &Axes) -> String {
        let mut svg = format!("<g class=\"{}\">", color(self.place));
        let at = |p: &Point| format!("{:.1},{:.1}", axes.x(p.x), axes.y(p.y));
        let path: Vec<String> = self.points.iter().map(at).collect();
        if path.len() > 1 {
            svg.push_str(&format!(
                "<polyline class=\"line\" points=\"{}\"/>",
                path.join(" ")
            ));
        }
        for point in &self.points {
            let (x, y) = (axes.x(point.x), axes.y(point.y));
            if point.spread > 0.0 {
                svg.push_str(&format!(
                    "<line class=\"spread\" x1=\"{x:.1}\" x2=\"{x:.1}\" y1=\"{:.1}\" y2=\"{:.1}\"/>",
                    axes.y(point.bar()[0]),
                    axes.y(point.bar()[1])
                ));
            }
            svg.push_str(&mark(self.place, x, y));
        }
        svg.push_str("</g>");
        svg
    }
}

/// Circle, square, diamond, triangle: a second sign beside the colour.
pub(super) fn mark(place: usize, x: f64, y: f64) -> String {
    let corners: &[(f64, f64)] = match place % 4 {
        1 => return format!("<circle class=\"mark\" cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"4.2\"/>"),
        2 => &[(-4.0, -4.0), (4.0, -4.0), (4.0, 4.0), (-4.0, 4.0)],
        3 => &[(0.0, -5.5), (5.5, 0.0), (0.0, 5.5), (-5.5, 0.0)],
        _ => &[(0.0, -5.2), (5.0, 4.0), (-5.0, 4.0)],
    };
    let corner = |(dx, dy): &(f64, f64)| format!("{:.1},{:.1}", x + dx, y + dy);
    let corners: Vec<String> = corners.iter().map(corner).collect();
    format!("<polygon class=\"mark\" points=\"{}\"/>", corners.join(" "))
}

/// Where values lie on the paper.
struct Axes {
    x: (f64, f64),
    y: (f64, f64),
    step: f64,
}

impl Axes {
    fn of(chart: &Chart) -> Self {
        let points = || chart.series.iter().flat_map(|series| &series.points);
        let xs = points()
            .map(|p| p.x)
            .chain(chart.x_ticks.iter().map(|tick| tick.0));
        let ys = points()
            .flat_map(|p| p.bar())
            .chain(chart.levels.iter().map(|level| level.2));
        let (x, y) = (range(xs), range(ys));
        let step = [1.0, 2.0, 5.0, 10.0, 20.0]
            .into_iter()
            .find(|step| (y.1 - y.0) / step <= 6.0);
        let step = step.unwrap_or(25.0);
        let margin = ((x.1 - x.0) * 0.06).max(0.1);
        let y = ((y.0 / step).floor() * step, (y.1 / step).ceil() * step);
        Self {
            x: (x.0 - margin, x.1 + margin),
            y: (y.0, y.1.max(y.0 + step)),
            step,
        }
    }

    fn x(&self, value: f64) -> f64 {
        LEFT + (WIDTH - RIGHT - LEFT) * (value - self.x.0) / (self.x.1 - self.x.0)
    }

    fn y(&self, value: f64) -> f64 {
        let bottom = HEIGHT - BOTTOM;
        bottom - (bottom - TOP) * (value - self.y.0) / (self.y.1 - self.y.0)
    }

    fn y_ticks(&self) -> impl Iterator<Item = f64> {
        let count = ((self.y.1 - self.y.0) / self.step).round() as usize;
        let (first, step) = (self.y.0, self.step);
        (0..=count).map(move |i| first + step * i as f64)
    }
}

fn range(values: impl Iterator<Item = f64>) -> (f64, f64) {
    values.fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), v| {
        (low.min(v), high.max(v))
    })
}

/// A contestant's value in a row of [`dots`].
#[derive(Clone, Copy, Debug)]
pub(super) struct Dot {
    /// Decides on colour and mark.
    pub(super) place: usize,
    pub(super) value: f64,
    pub(super) spread: f64,
}

/// Rows with a dot for each contestant.
pub(super) fn dots(title: &str, x_title: &str, rows: &[(String, Vec<Dot>)]) -> String {
    const NAMES: f64 = 78.0;
    const EACH: f64 = 30.0;
    let right = WIDTH - 14.0;
    let values = rows.iter().flat_map(|row| &row.1);
    let highest = values
        .map(|dot| (dot.value + dot.spread).min(100.0))
        .fold(10.0, f64::max);
    let limit = (highest / 10.0).ceil() * 10.0;
    let at = |value: f64| NAMES + (right - NAMES) * value.max(0.0) / limit;
    let height = rows.len() as f64 * EACH + 40.0;
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
        let middle = EACH * (i as f64 + 0.5);
        svg.push_str(&format!(
            "<text x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
            NAMES - 10.0,
            middle + 4.0,
            escape(name)
        ));
        for (j, dot) in row.iter().enumerate() {
            let Dot {
                place,
                value,
                spread,
            } = *dot;
            // One below the other, so that equal values stay apart.
            let y = middle + 7.0 * (j as f64 - (row.len() as f64 - 1.0) / 2.0);
            svg.push_str(&format!(
                "<g class=\"{}\"><line class=\"spread\" x1=\"{:.1}\" x2=\"{:.1}\" y1=\"{y:.1}\" y2=\"{y:.1}\"/>{}</g>",
                color(place),
                at(value - spread),
                at((value + spread).min(100.0)),
                mark(place, at(value), y)
            ));
        }
    }
    svg.push_str(&format!(
        "<text class=\"faint\" x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text></svg>",
        (NAMES + right) / 2.0,
        height - 6.0,
        escape(x_title)
    ));
    svg
}

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

#[cfg(test)]
mod tests {
    use super::*;

    fn chart(points: &[(f64, f64)]) -> Chart {
        let point = |&(x, y): &(f64, f64)| Point { x, y, spread: 1.0 };
        Chart {
            title: "a < b".into(),
            x_title: "x".into(),
            y_title: "y".into(),
            x_ticks: vec![(0.0, "1".into())],
            levels: vec![("zero-shot".into(), 0, 50.0)],
            series: vec![Series {
                label: "CoOp (class-specific)".into(),
                place: 1,
                points: points.iter().map(point).collect(),
            }],
        }
    }

    #[test]
    fn higher_values_are_higher_on_the_paper_and_nothing_leaves_it() {
        let axes = Axes::of(&chart(&[(0.0, 40.0), (1.0, 60.0)]));
        assert!(axes.y(60.0) < axes.y(40.0) && axes.x(1.0) > axes.x(0.0));
        assert!(axes.y(61.0) >= TOP && axes.y(39.0) <= HEIGHT - BOTTOM);
        assert!(axes.x(1.0) <= WIDTH - RIGHT && axes.x(0.0) >= LEFT);
    }

    #[test]
    fn a_single_value_is_a_chart_too() {
        let svg = chart(&[(0.0, 50.0)]).svg();
        assert!(
            !svg.contains("NaN") && !svg.contains("inf") && !svg.contains("polyline"),
            "{svg}"
        );
        assert!(svg.contains("a &lt; b"));
    }

    #[test]
    fn names_do_not_cover_each_other() {
        let mut names: Vec<Name<'_>> = (0..5)
            .map(|i| Name::new(200.0, i, "a (b)", false))
            .collect();
        move_apart(&mut names);
        for pair in names.windows(2) {
            assert!(
                pair[1].y - pair[0].y >= 2.0 * LINE,
                "{} {}",
                pair[0].y,
                pair[1].y
            );
        }
        assert!(names.iter().all(|name| name.y < HEIGHT - LINE));
    }
}
