//! Outlines made of polygons, and the masks they are rasterised to.

/// A closed polygon; x to the right, y down, any unit.
pub(crate) type Contour = Vec<(f32, f32)>;

/// Side of the finest mask in cells.
const FINE: usize = 128;
/// Samples across a cell of the finest mask.
const SAMPLES: usize = 3;
/// Half the side of the masks in units of the object's radius; more than 1 so that edges have room.
const REACH: f32 = 1.1;

/// Polygons that are added and cut out in order.
#[derive(Default)]
pub(crate) struct Outline {
    parts: Vec<(Contour, bool)>,
}

impl Outline {
    /// Adds a polygon.
    pub(crate) fn add(mut self, contour: Contour) -> Self {
        self.parts.push((contour, true));
        self
    }

    /// Adds several polygons.
    pub(crate) fn add_all(mut self, contours: impl IntoIterator<Item = Contour>) -> Self {
        self.parts.extend(contours.into_iter().map(|c| (c, true)));
        self
    }

    /// Removes a polygon from what was added before.
    pub(crate) fn cut(mut self, contour: Contour) -> Self {
        self.parts.push((contour, false));
        self
    }

    /// Removes several polygons.
    pub(crate) fn cut_all(mut self, contours: impl IntoIterator<Item = Contour>) -> Self {
        self.parts.extend(contours.into_iter().map(|c| (c, false)));
        self
    }

    /// Turns everything by `angle` radians.
    pub(crate) fn turn(mut self, angle: f32) -> Self {
        let (sin, cos) = (libm::sinf(angle), libm::cosf(angle));
        for (x, y) in self.parts.iter_mut().flat_map(|(contour, _)| contour) {
            (*x, *y) = (cos * *x - sin * *y, sin * *x + cos * *y);
        }
        self
    }

    /// Moves the middle of the bounding box to the origin and scales so that the farthest point is at distance 1.
    fn fit(mut self) -> Self {
        let added = || {
            self.parts
                .iter()
                .filter(|part| part.1)
                .flat_map(|part| &part.0)
        };
        let bounds = added().fold([f32::MAX, f32::MIN, f32::MAX, f32::MIN], |b, &(x, y)| {
            [b[0].min(x), b[1].max(x), b[2].min(y), b[3].max(y)]
        });
        let (cx, cy) = ((bounds[0] + bounds[1]) / 2.0, (bounds[2] + bounds[3]) / 2.0);
        let far = added().fold(0.0f32, |far, &(x, y)| {
            far.max((x - cx) * (x - cx) + (y - cy) * (y - cy))
        });
        let scale = 1.0 / far.sqrt();
        for (x, y) in self.parts.iter_mut().flat_map(|(contour, _)| contour) {
            (*x, *y) = ((*x - cx) * scale, (*y - cy) * scale);
        }
        self
    }

    /// The mask of the outline, scaled to the unit disc.
    pub(crate) fn mask(self) -> Mask {
        let outline = self.fit();
        let mut counts = vec![0u16; FINE * FINE];
        let mut row = [false; FINE * SAMPLES];
        for j in 0..FINE * SAMPLES {
            outline.fill_row(sample_position(j), &mut row);
            let cells = &mut counts[j / SAMPLES * FINE..][..FINE];
            for (cell, samples) in cells.iter_mut().zip(row.chunks_exact(SAMPLES)) {
                *cell += samples.iter().map(|&s| u16::from(s)).sum::<u16>();
            }
        }
        let full = (SAMPLES * SAMPLES) as u16;
        let finest = counts.iter().map(|&c| (c * 255 / full) as u8).collect();
        Mask::pyramid(finest)
    }

    /// Which samples of the row at height `y` are inside.
    fn fill_row(&self, y: f32, row: &mut [bool; FINE * SAMPLES]) {
        row.fill(false);
        for (contour, added) in &self.parts {
            for pair in crossings(contour, y).chunks_exact(2) {
                let (from, to) = (sample_index(pair[0]), sample_index(pair[1]));
                row[from..to.max(from)].fill(*added);
            }
        }
    }
}

/// Position of sample `i` along a side of the finest mask.
fn sample_position(i: usize) -> f32 {
    ((i as f32 + 0.5) / (FINE * SAMPLES) as f32 * 2.0 - 1.0) * REACH
}

/// The first sample at or after position `x`.
fn sample_index(x: f32) -> usize {
    let i = (x / REACH + 1.0) / 2.0 * (FINE * SAMPLES) as f32 + 0.5;
    (i.max(0.0) as usize).min(FINE * SAMPLES)
}

/// Where the polygon crosses the horizontal line at `y`, from left to right.
fn crossings(contour: &[(f32, f32)], y: f32) -> Vec<f32> {
    let next = contour.iter().cycle().skip(1);
    let mut xs: Vec<f32> = contour
        .iter()
        .zip(next)
        .filter(|(a, b)| (a.1 <= y) != (b.1 <= y))
        .map(|(a, b)| a.0 + (y - a.1) / (b.1 - a.1) * (b.0 - a.0))
        .collect();
    xs.sort_by(f32::total_cmp);
    xs
}

/// How much of each cell an object covers (0 to 255), at several resolutions.
pub(crate) struct Mask {
    /// From the finest to the coarsest; each half the side of the one before.
    levels: Vec<Vec<u8>>,
}

impl Mask {
    fn pyramid(finest: Vec<u8>) -> Self {
        let mut levels = vec![finest];
        for level in 1..4 {
            let coarser = halve(&levels[level - 1], FINE >> (level - 1));
            levels.push(coarser);
        }
        Self { levels }
    }

    /// The coarsest level that has at least a cell for each pixel of an object of `radius` pixels.
    pub(crate) fn level(&self, radius: f32) -> Level<'_> {
        let per_radius = |i: usize| (FINE >> i) as f32 / (2.0 * REACH);
        let chosen = (0..self.levels.len())
            .rev()
            .find(|&i| per_radius(i) >= radius);
        let i = chosen.unwrap_or(0);
        Level {
            cells: &self.levels[i],
            side: FINE >> i,
            scale: per_radius(i),
        }
    }
}

/// One resolution of a mask.
pub(crate) struct Level<'a> {
    cells: &'a [u8],
    side: usize,
    /// Cells per radius of the object.
    scale: f32,
}

impl Level<'_> {
    /// Coverage from 0 to 1 at (`u`, `v`) in units of the radius, bilinear.
    #[inline]
    pub(crate) fn coverage(&self, u: f32, v: f32) -> f32 {
        let middle = self.side as f32 / 2.0 - 0.5;
        let (x, y) = (u * self.scale + middle, v * self.scale + middle);
        let last = (self.side - 1) as f32;
        if !(x >= 0.0 && y >= 0.0 && x < last && y < last) {
            return 0.0;
        }
        let (i, j) = (x as usize, y as usize);
        let (fx, fy) = (x - i as f32, y - j as f32);
        let at = |i: usize, j: usize| f32::from(self.cells[j * self.side + i]);
        let top = at(i, j) + fx * (at(i + 1, j) - at(i, j));
        let bottom = at(i, j + 1) + fx * (at(i + 1, j + 1) - at(i, j + 1));
        (top + fy * (bottom - top)) / 255.0
    }
}

/// Means of 2×2 cells.
fn halve(cells: &[u8], side: usize) -> Vec<u8> {
    let at = |i: usize, j: usize| u16::from(cells[j * side + i]);
    let mut halved = Vec::with_capacity(cells.len() / 4);
    for j in (0..side).step_by(2) {
        for i in (0..side).step_by(2) {
            let sum = at(i, j) + at(i + 1, j) + at(i, j + 1) + at(i + 1, j + 1);
            halved.push(((sum + 2) / 4) as u8);
        }
    }
    halved
}

/// An ellipse.
pub(crate) fn disc(cx: f32, cy: f32, rx: f32, ry: f32) -> Contour {
    arc(cx, cy, rx, ry, 0.0, 1.0)
}

/// The points of an ellipse from turn `from` to turn `to` (0 is to the right, 0.25 down), closed by a chord.
pub(crate) fn arc(cx: f32, cy: f32, rx: f32, ry: f32, from: f32, to: f32) -> Contour {
    const POINTS: usize = 48;
    (0..=POINTS)
        .map(|i| {
            let (x, y) = direction(from + (to - from) * i as f32 / POINTS as f32);
            (cx + rx * x, cy + ry * y)
        })
        .collect()
}

/// The direction after `turn` full turns from the x axis, clockwise as seen.
pub(crate) fn direction(turn: f32) -> (f32, f32) {
    let angle = turn * 2.0 * core::f32::consts::PI;
    (libm::cosf(angle), libm::sinf(angle))
}

/// An upright rectangle.
pub(crate) fn rect(left: f32, top: f32, right: f32, bottom: f32) -> Contour {
    vec![(left, top), (right, top), (right, bottom), (left, bottom)]
}

/// A polygon.
pub(crate) fn poly(points: &[(f32, f32)]) -> Contour {
    points.to_vec()
}

/// A star with `points` tips at distance 1 (the first straight up) and inner corners at distance `inner`.
pub(crate) fn burst(points: usize, inner: f32) -> Contour {
    (0..2 * points)
        .map(|i| {
            let (x, y) = direction(i as f32 / (2 * points) as f32 - 0.25);
            let r = if i % 2 == 0 { 1.0 } else { inner };
            (r * x, r * y)
        })
        .collect()
}

/// An ellipse whose long axis goes from `a` to `b`.
pub(crate) fn petal(a: (f32, f32), b: (f32, f32), width: f32) -> Contour {
    let (dx, dy) = ((b.0 - a.0) / 2.0, (b.1 - a.1) / 2.0);
    let half = width / 2.0 / (dx * dx + dy * dy).sqrt();
    let (nx, ny) = (-dy * half, dx * half);
    disc(0.0, 0.0, 1.0, 1.0)
        .into_iter()
        .map(|(s, t)| (a.0 + dx + s * dx + t * nx, a.1 + dy + s * dy + t * ny))
        .collect()
}

/// A line through `points` with round joints.
pub(crate) fn line(points: &[(f32, f32)], width: f32) -> Vec<Contour> {
    let half = width / 2.0;
    let joints = points.iter().map(|p| disc(p.0, p.1, half, half));
    let sides = points.windows(2).map(|ends| {
        let (a, b) = (ends[0], ends[1]);
        let (dx, dy) = (b.0 - a.0, b.1 - a.1);
        let k = half / (dx * dx + dy * dy).sqrt();
        let (nx, ny) = (-dy * k, dx * k);
        vec![
            (a.0 + nx, a.1 + ny),
            (b.0 + nx, b.1 + ny),
            (b.0 - nx, b.1 - ny),
            (a.0 - nx, a.1 - ny),
        ]
    });
    joints.chain(sides).collect()
}

/// A smooth closed curve through `points` (Catmull–Rom).
pub(crate) fn smooth(points: &[(f32, f32)]) -> Contour {
    const STEPS: usize = 8;
    let n = points.len();
    let mut contour = Vec::with_capacity(n * STEPS);
    for i in 0..n {
        let [a, b, c, d] = [
            points[(i + n - 1) % n],
            points[i],
            points[(i + 1) % n],
            points[(i + 2) % n],
        ];
        for step in 0..STEPS {
            let t = step as f32 / STEPS as f32;
            contour.push((spline(a.0, b.0, c.0, d.0, t), spline(a.1, b.1, c.1, d.1, t)));
        }
    }
    contour
}

/// The Catmull–Rom spline between `b` and `c`.
fn spline(a: f32, b: f32, c: f32, d: f32, t: f32) -> f32 {
    let cubic = (3.0 * (b - c) + d - a) * t;
    let square = (2.0 * a - 5.0 * b + 4.0 * c - d + cubic) * t;
    b + 0.5 * (c - a + square) * t
}
