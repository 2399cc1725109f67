//! Charts as inline SVG. Sizes are chosen so that letters stay readable on a phone, where a chart is as wide as the screen.

use super::html::escape;

pub(super) const WIDTH: f64 = 360.0;
/// Height, and what is added for each name beyond the first few: the names stand below each other beside the lines.
const LEAST_HEIGHT: f64 = 250.0;
const HEIGHT_OF_A_NAME: f64 = 14.0;
const FEW_NAMES: usize = 7;
const LEFT: f64 = 40.0;
const RIGHT: f64 = 132.0;
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
        place => format!("c{}", 1 + (place - 1) % COLORS),
    }
}

/// Colours in the style sheet beside the grey one.
pub(super) const COLORS: usize = 10;

impl Chart {
    pub(super) fn svg(&self) -> String {
        let axes = Axes::of(self);
        let mut svg = format!(
            "<svg viewBox=\"0 0 {WIDTH} {}\" role=\"img\"><title>{}</title>",
            axes.height,
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
        let (right, bottom) = (WIDTH - RIGHT, axes.bottom());
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
            axes.height - 8.0,
            escape(&self.x_title),
            escape(&self.y_title)
        ));
        svg
    }

    /// Names at the right ends of the lines, moved apart where they would cover each other, and thin lines from one to the
    /// other.
    fn names(&self, axes: &Axes) -> String {
        let of_series = self.series.iter().filter_map(|series| {
            let last = series.points.last()?;
            let end = (series.points.len() > 1).then(|| axes.x(last.x));
            Some(Name::new(axes.y(last.y), end, series.place, &series.label))
        });
        let of_levels = self.levels.iter();
        let of_levels = of_levels.map(|(name, place, y)| Name {
            dashed: true,
            ..Name::new(axes.y(*y), Some(WIDTH - RIGHT), *place, name)
        });
        let mut names: Vec<Name<'_>> = of_series.chain(of_levels).collect();
        names.sort_by(|a, b| a.y.total_cmp(&b.y));
        move_apart(&mut names, axes.height);
        names.iter().map(Name::svg).collect()
    }
}

/// A name beside the chart.
struct Name<'a> {
    y: f64,
    /// The end of its line, if it has one.
    end: Option<(f64, f64)>,
    place: usize,
    lines: Vec<&'a str>,
    /// Whether it belongs to a dashed line.
    dashed: bool,
}

impl<'a> Name<'a> {
    fn new(y: f64, end: Option<f64>, place: usize, name: &'a str) -> Self {
        // What stands in brackets goes on a line of its own.
        let lines = match name.find(" (") {
            Some(at) => vec![&name[..at], &name[at + 1..]],
            None => vec![name],
        };
        Self {
            y,
            end: end.map(|x| (x, y)),
            place,
            lines,
            dashed: false,
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
        let lead = self.end.map_or_else(String::new, |(end, height)| {
            format!(
                "<line class=\"lead\" x1=\"{end:.1}\" x2=\"{:.1}\" y1=\"{height:.1}\" y2=\"{y:.1}\"/>",
                x - 5.0
            )
        });
        let mut svg = format!("<g class=\"{}\">{lead}{key}", color(self.place));
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
fn move_apart(names: &mut [Name<'_>], height: f64) {
    let mut free = TOP;
    for name in names.iter_mut() {
        name.y = name.y.max(free);
        free = name.y + LINE * name.lines.len() as f64 + 2.0;
    }
    let mut end = height - 14.0;
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

/// Circle, square, diamond, triangles, then the same hollow: a second sign beside the colour. Where colours come again, filled and
/// hollow change places, and after that the shapes move on.
pub(super) fn mark(place: usize, x: f64, y: f64) -> String {
    let before = place.saturating_sub(1);
    let class = match (before / 5 + before / COLORS) % 2 {
        0 => "mark",
        _ => "mark hollow",
    };
    let corners: &[(f64, f64)] = match (place + before / (2 * COLORS) * 2) % 5 {
        1 => return format!("<circle class=\"{class}\" cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"4.2\"/>"),
        2 => &[(-4.0, -4.0), (4.0, -4.0), (4.0, 4.0), (-4.0, 4.0)],
        3 => &[(0.0, -5.5), (5.5, 0.0), (0.0, 5.5), (-5.5, 0.0)],
        4 => &[(0.0, -5.2), (5.0, 4.0), (-5.0, 4.0)],
        _ => &[(0.0, 5.2), (5.0, -4.0), (-5.0, -4.0)],
    };
    let corner = |(dx, dy): &(f64, f64)| format!("{:.1},{:.1}", x + dx, y + dy);
    let corners: Vec<String> = corners.iter().map(corner).collect();
    format!(
        "<polygon class=\"{class}\" points=\"{}\"/>",
        corners.join(" ")
    )
}

/// Where values lie on the paper.
struct Axes {
    x: (f64, f64),
    y: (f64, f64),
    step: f64,
    height: f64,
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
        let names = chart.series.len() + chart.levels.len();
        Self {
            height: LEAST_HEIGHT + HEIGHT_OF_A_NAME * names.saturating_sub(FEW_NAMES) as f64,
            x: (x.0 - margin, x.1 + margin),
            y: (y.0, y.1.max(y.0 + step)),
            step,
        }
    }

    fn x(&self, value: f64) -> f64 {
        LEFT + (WIDTH - RIGHT - LEFT) * (value - self.x.0) / (self.x.1 - self.x.0)
    }

    fn bottom(&self) -> f64 {
        self.height - BOTTOM
    }

    fn y(&self, value: f64) -> f64 {
        let bottom = self.bottom();
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

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

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
        assert!(axes.y(61.0) >= TOP && axes.y(39.0) <= axes.bottom());
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

    /// Names of two lines each.
    fn moved(count: usize, height: f64) -> Vec<Name<'static>> {
        let mut names: Vec<Name<'_>> = (0..count)
            .map(|i| Name::new(200.0, Some(100.0), i, "a (b)"))
            .collect();
        move_apart(&mut names, height);
        names
    }

    #[test]
    fn names_do_not_cover_each_other() {
        let names = moved(5, LEAST_HEIGHT);
        for pair in names.windows(2) {
            assert!(
                pair[1].y - pair[0].y >= 2.0 * LINE,
                "{} {}",
                pair[0].y,
                pair[1].y
            );
        }
        assert!(names.iter().all(|name| name.y < LEAST_HEIGHT - LINE));
        // The line leads from where the values end to where the name went.
        assert!(names.iter().all(|name| name.end == Some((100.0, 200.0))));
    }

    #[test]
    fn a_chart_of_many_is_tall_enough_for_their_names() {
        let mut many = chart(&[(0.0, 40.0), (1.0, 60.0)]);
        many.series = (1..=20)
            .map(|place| Series {
                label: "CoOp".to_owned(),
                place,
                ..many.series[0].clone()
            })
            .collect();
        let axes = Axes::of(&many);
        assert!(axes.height > LEAST_HEIGHT);
        let names = many.series.iter();
        let mut names: Vec<Name<'_>> = names
            .map(|series| Name::new(axes.y(60.0), None, series.place, &series.label))
            .collect();
        move_apart(&mut names, axes.height);
        assert!(names[0].y >= TOP, "{}", names[0].y);
    }

    #[test]
    fn no_two_learners_look_alike() {
        let looks = |place| (color(place), mark(place, 0.0, 0.0));
        let all: BTreeSet<_> = (1..=4 * COLORS).map(looks).collect();
        assert_eq!(all.len(), 4 * COLORS);
    }

    #[test]
    fn the_first_ten_learners_differ_in_colour_and_in_mark() {
        let colors: BTreeSet<String> = (0..=COLORS).map(color).collect();
        assert_eq!(colors.len(), COLORS + 1);
        let marks: BTreeSet<String> = (1..=COLORS).map(|place| mark(place, 0.0, 0.0)).collect();
        assert_eq!(marks.len(), COLORS);
        let style = include_str!("style.css");
        for color in colors {
            // Its value by day and by night, and its use.
            assert_eq!(style.matches(&format!("--{color}: ")).count(), 2, "{color}");
            let rule = format!(".{color} {{ color: var(--{color}); }}");
            assert!(style.contains(&rule), "{color}");
        }
    }
}
