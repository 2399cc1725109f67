//! From a scene to pixels.

use std::sync::LazyLock;

use crate::outline::{Level, direction};
use crate::stream::Stream;
use crate::{Color, Object, Pattern, Picture, SIDE, Scene, Style, Texture, forms};

/// Red, green and blue from 0 to 1.
pub type Rgb = [f32; 3];

pub(crate) const WHITE: Rgb = [1.0; 3];
pub(crate) const BLACK: Rgb = [0.0; 3];
const PIXELS: usize = SIDE * SIDE;

/// The middle of each colour.
pub(crate) fn pure(color: Color) -> Rgb {
    match color {
        Color::Red => [0.86, 0.11, 0.12],
        Color::Orange => [0.97, 0.52, 0.05],
        Color::Yellow => [0.94, 0.83, 0.12],
        Color::Green => [0.13, 0.62, 0.2],
        Color::Blue => [0.1, 0.3, 0.86],
        Color::Purple => [0.5, 0.14, 0.68],
        Color::Pink => [0.97, 0.5, 0.74],
        Color::Brown => [0.46, 0.27, 0.12],
        Color::Black => [0.06, 0.06, 0.06],
        Color::Grey => [0.53, 0.53, 0.53],
    }
}

/// `a` with a share `t` of `b`.
#[inline]
pub(crate) fn mix(a: Rgb, b: Rgb, t: f32) -> Rgb {
    [
        a[0] + t * (b[0] - a[0]),
        a[1] + t * (b[1] - a[1]),
        a[2] + t * (b[2] - a[2]),
    ]
}

/// Sum of the absolute differences of two colours, 0 to 3.
pub(crate) fn difference(a: Rgb, b: Rgb) -> f32 {
    (a[0] - b[0]).abs() + (a[1] - b[1]).abs() + (a[2] - b[2]).abs()
}

/// Brightness from 0 to 1.
pub(crate) fn luma(rgb: Rgb) -> f32 {
    0.299 * rgb[0] + 0.587 * rgb[1] + 0.114 * rgb[2]
}

/// Draws a scene; `stream` decides what the scene leaves open (phases, grain, noise).
pub(crate) fn paint(scene: Scene, stream: &mut Stream) -> Picture {
    let mut canvas = Canvas {
        pixels: vec![scene.tones[0]; PIXELS],
        mask: vec![0; PIXELS],
    };
    match scene.style {
        Style::Sketch => canvas.sketch(&scene, stream),
        _ => canvas.colored(&scene, stream),
    }
    canvas.restyle(scene.style, stream);
    Picture {
        rgb: canvas.pixels.iter().flatten().map(|&v| byte(v)).collect(),
        mask: canvas.mask,
        scene,
    }
}

/// The nearest of 256 levels.
fn byte(value: f32) -> u8 {
    (value.clamp(0.0, 1.0) * 255.0 + 0.5) as u8
}

/// Colours not yet rounded to bytes.
struct Canvas {
    pixels: Vec<Rgb>,
    mask: Vec<u8>,
}

impl Canvas {
    /// Ground and objects in their colours.
    fn colored(&mut self, scene: &Scene, stream: &mut Stream) {
        self.ground(scene, stream);
        for (object, label) in scene.objects.iter().zip(1..) {
            let cover = Cover::new(object, stream);
            Placed::new(object).each_covered(|at, alpha, u, v| {
                let paint = mix(object.tint, object.accent, cover.share(u, v));
                self.pixels[at] = mix(self.pixels[at], paint, alpha);
                self.label(at, alpha, label);
            });
        }
    }

    /// Dark outlines on paper.
    fn sketch(&mut self, scene: &Scene, stream: &mut Stream) {
        let paper = mix(scene.tones[0], WHITE, 0.8);
        let ink = mix(BLACK, paper, stream.range(0.05, 0.3));
        self.pixels.fill(paper);
        for (object, label) in scene.objects.iter().zip(1..) {
            let mut alphas = vec![0.0; PIXELS];
            Placed::new(object).each_covered(|at, alpha, _, _| {
                alphas[at] = alpha;
                self.label(at, alpha, label);
            });
            let (dilated, eroded) = (around(&alphas, f32::max), around(&alphas, f32::min));
            for (pixel, (wide, narrow)) in self.pixels.iter_mut().zip(dilated.iter().zip(eroded)) {
                *pixel = mix(*pixel, ink, wide - narrow);
            }
        }
    }

    fn label(&mut self, at: usize, alpha: f32, label: u8) {
        if alpha > 0.5 {
            self.mask[at] = label;
        }
    }

    fn ground(&mut self, scene: &Scene, stream: &mut Stream) {
        let [first, second] = scene.tones;
        if scene.texture == Texture::Plain {
            return;
        }
        let ground = Ground::new(scene.texture, stream);
        for (at, pixel) in self.pixels.iter_mut().enumerate() {
            *pixel = mix(first, second, ground.share(at % SIDE, at / SIDE));
        }
    }

    /// What a style does to the finished picture.
    fn restyle(&mut self, style: Style, stream: &mut Stream) {
        if style == Style::Blur {
            // Three box filters of these widths have a standard deviation of 2.2 pixels together.
            [3, 5, 5].into_iter().for_each(|width| self.blur(width));
        }
        let sigma = match style {
            Style::Noise => 0.22,
            _ => stream.range(0.0, 0.04),
        };
        self.noise(sigma, stream.bits());
        match style {
            Style::Inverted => self.each(|rgb| rgb.map(|v| 1.0 - v)),
            Style::Grey => self.each(|rgb| [luma(rgb); 3]),
            _ => {}
        }
    }

    fn each(&mut self, change: impl Fn(Rgb) -> Rgb) {
        self.pixels
            .iter_mut()
            .for_each(|pixel| *pixel = change(pixel.map(|v| v.clamp(0.0, 1.0))));
    }

    /// Adds the same kind of noise to every channel: the sum of three 7-bit numbers, close to normal.
    fn noise(&mut self, sigma: f32, seed: u64) {
        let bell = |bits: u64| (bits & 127) + (bits >> 7 & 127) + (bits >> 14 & 127);
        for (pixel, i) in self.pixels.iter_mut().zip(0..) {
            let bits = scramble(seed.wrapping_add(i));
            for (channel, value) in pixel.iter_mut().enumerate() {
                // Mean 190.5, standard deviation 64.
                *value += (bell(bits >> (21 * channel)) as f32 - 190.5) / 64.0 * sigma;
            }
        }
    }

    /// A box filter of an odd `width`; the border is repeated outwards.
    fn blur(&mut self, width: usize) {
        let reach = width / 2;
        let clamped = |i: usize, step: usize| (i + step).saturating_sub(reach).min(SIDE - 1);
        for (dx, dy) in [(1, 0), (0, 1)] {
            let source = self.pixels.clone();
            for (at, pixel) in self.pixels.iter_mut().enumerate() {
                let (x, y) = (at % SIDE, at / SIDE);
                let mut sum = [0.0; 3];
                for step in 0..width {
                    let (i, j) = if dx > dy {
                        (clamped(x, step), y)
                    } else {
                        (x, clamped(y, step))
                    };
                    for (s, v) in sum.iter_mut().zip(source[j * SIDE + i]) {
                        *s += v;
                    }
                }
                *pixel = sum.map(|s| s / width as f32);
            }
        }
    }
}

/// Mixes the bits of a counter (the last step of SplitMix64).
fn scramble(counter: u64) -> u64 {
    let mut z = counter.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// The largest or smallest of each pixel and its eight neighbours.
fn around(values: &[f32], choose: fn(f32, f32) -> f32) -> Vec<f32> {
    let pass = |values: &[f32], step: usize, place: fn(usize) -> usize| -> Vec<f32> {
        (0..PIXELS)
            .map(|at| {
                let before = if place(at) > 0 {
                    values[at - step]
                } else {
                    values[at]
                };
                let after = if place(at) < SIDE - 1 {
                    values[at + step]
                } else {
                    values[at]
                };
                choose(choose(before, after), values[at])
            })
            .collect()
    };
    let rows = pass(values, 1, |at| at % SIDE);
    pass(&rows, SIDE, |at| at / SIDE)
}

/// An object's mask placed in the picture.
struct Placed<'a> {
    mask: Level<'a>,
    center: (f32, f32),
    radius: f32,
    /// Rows of the map from pixels to the object's own axes, in units of its radius.
    across: (f32, f32),
    down: (f32, f32),
}

impl Placed<'_> {
    fn new(object: &Object) -> Self {
        let (sin, cos) = (libm::sinf(object.angle), libm::cosf(object.angle));
        let flip = if object.mirrored { -1.0 } else { 1.0 };
        let (kx, ky) = (
            flip / (object.radius * object.aspect),
            object.aspect / object.radius,
        );
        Self {
            mask: forms::mask(object.shape, object.variety).level(object.radius),
            center: object.center,
            radius: object.radius * object.aspect.max(1.0 / object.aspect),
            across: (cos * kx, sin * kx),
            down: (-sin * ky, cos * ky),
        }
    }

    /// Calls `visit` with the index, the coverage and the own coordinates of each pixel that the object touches.
    fn each_covered(&self, mut visit: impl FnMut(usize, f32, f32, f32)) {
        let (columns, rows) = (self.span(self.center.0), self.span(self.center.1));
        for y in rows {
            let dy = y as f32 + 0.5 - self.center.1;
            for x in columns.clone() {
                let dx = x as f32 + 0.5 - self.center.0;
                let u = self.across.0 * dx + self.across.1 * dy;
                let v = self.down.0 * dx + self.down.1 * dy;
                let alpha = self.mask.coverage(u, v);
                if alpha > 0.0 {
                    visit(y * SIDE + x, alpha, u, v);
                }
            }
        }
    }

    /// The pixels along one axis that the object can touch.
    fn span(&self, center: f32) -> std::ops::Range<usize> {
        let from = (center - self.radius - 2.0).max(0.0) as usize;
        let to = (center + self.radius + 2.0).max(0.0) as usize;
        from.min(SIDE)..to.min(SIDE)
    }
}

/// The sine of a full turn.
static SINE: LazyLock<[f32; 1024]> =
    LazyLock::new(|| std::array::from_fn(|i| direction(i as f32 / 1024.0).1));

/// The sine after `turns` full turns, from a table.
#[inline]
fn sine(turns: f32) -> f32 {
    SINE[((turns - turns.floor()) * 1024.0) as usize & 1023]
}

/// 0 and 1 with a soft edge where `s` changes sign.
#[inline]
fn soft(s: f32) -> f32 {
    (0.5 + 2.0 * s).clamp(0.0, 1.0)
}

/// Distance from the middle of the unit cell along one axis, -0.5 to 0.5.
#[inline]
fn within_cell(x: f32) -> f32 {
    x - x.floor() - 0.5
}

/// How an object's second colour is spread over it.
struct Cover {
    pattern: Pattern,
    /// Periods per radius.
    rate: f32,
    /// Direction of stripes and shading.
    along: (f32, f32),
    phase: (f32, f32),
}

impl Cover {
    fn new(object: &Object, stream: &mut Stream) -> Self {
        const DIAGONAL: f32 = core::f32::consts::FRAC_1_SQRT_2;
        let directions = [
            (1.0, 0.0),
            (0.0, 1.0),
            (DIAGONAL, DIAGONAL),
            (DIAGONAL, -DIAGONAL),
        ];
        Self {
            pattern: object.pattern,
            rate: object.radius / (0.42 * object.radius).max(4.5),
            along: stream.pick(&directions),
            phase: (stream.uniform(), stream.uniform()),
        }
    }

    /// Share of the second colour at (`u`, `v`) in units of the radius.
    fn share(&self, u: f32, v: f32) -> f32 {
        let (x, y) = (u * self.rate + self.phase.0, v * self.rate + self.phase.1);
        match self.pattern {
            Pattern::Plain => 0.0,
            Pattern::Striped => soft(sine(self.along.0 * x + self.along.1 * y)),
            Pattern::Dotted => {
                let shift = if y.floor() % 2.0 == 0.0 { 0.0 } else { 0.5 };
                let (dx, dy) = (within_cell(x + shift), within_cell(y));
                soft((0.11 - dx * dx - dy * dy) * 4.0)
            }
            Pattern::Checkered => soft(2.0 * sine(x / 1.7) * sine(y / 1.7)),
            Pattern::Wavy => soft(sine(y + 0.28 * sine(x / 1.6))),
            Pattern::Plaid => 0.55 * soft(sine(x / 1.3) - 0.25) + 0.45 * soft(sine(y / 1.3) - 0.25),
            Pattern::Shaded => (0.5 + 0.62 * (self.along.0 * u + self.along.1 * v)).clamp(0.0, 1.0),
            Pattern::Marbled => {
                let warp = 0.35 * sine(y / 2.3 + self.phase.0) + 0.2 * sine(x / 1.3 - y / 1.9);
                let vein = sine(x / 3.1 + y / 4.3 + warp).abs();
                (1.0 - 2.4 * vein).clamp(0.0, 1.0)
            }
        }
    }
}

/// How the second tone is spread over the ground.
enum Ground {
    Gradient { slope: (f32, f32) },
    Cloudy { coarse: Lattice, fine: Lattice },
    Grainy { seed: u64 },
    Lined { slope: (f32, f32), phase: f32 },
    Tiled { rate: f32, phase: (f32, f32) },
}

impl Ground {
    /// `texture` is not plain.
    fn new(texture: Texture, stream: &mut Stream) -> Self {
        match texture {
            Texture::Plain | Texture::Gradient => Self::Gradient {
                slope: direction(stream.uniform()),
            },
            Texture::Cloudy => Self::Cloudy {
                coarse: Lattice::new(4, stream),
                fine: Lattice::new(8, stream),
            },
            Texture::Grainy => Self::Grainy {
                seed: stream.bits(),
            },
            Texture::Lined => {
                let (x, y) = direction(stream.below(4) as f32 / 8.0);
                let rate = 1.0 / stream.range(5.0, 8.0);
                Self::Lined {
                    slope: (x * rate, y * rate),
                    phase: stream.uniform(),
                }
            }
            Texture::Tiled => Self::Tiled {
                rate: 1.0 / stream.range(8.0, 12.0),
                phase: (stream.uniform(), stream.uniform()),
            },
        }
    }

    /// Share of the second tone at a pixel.
    fn share(&self, x: usize, y: usize) -> f32 {
        let (px, py) = (x as f32, y as f32);
        match self {
            Self::Gradient { slope } => {
                let middle = SIDE as f32 / 2.0;
                (0.5 + ((px - middle) * slope.0 + (py - middle) * slope.1) / (1.1 * SIDE as f32))
                    .clamp(0.0, 1.0)
            }
            Self::Cloudy { coarse, fine } => {
                let sum = 0.7 * coarse.at(px, py) + 0.3 * fine.at(px, py);
                (0.5 + 2.2 * (sum - 0.5)).clamp(0.0, 1.0)
            }
            Self::Grainy { seed } => {
                let block = (y / 2 * SIDE + x / 2) as u64;
                (scramble(seed.wrapping_add(block)) & 255) as f32 / 255.0
            }
            Self::Lined { slope, phase } => {
                soft(1.5 * (sine(px * slope.0 + py * slope.1 + phase) - 0.6))
            }
            Self::Tiled { rate, phase } => {
                let (dx, dy) = (
                    within_cell(px * rate + phase.0),
                    within_cell(py * rate + phase.1),
                );
                let grout = dx.abs().max(dy.abs()) - 0.4;
                (0.5 + grout / rate).clamp(0.0, 1.0)
            }
        }
    }
}

/// Smooth noise: random values on a grid and blends between them.
struct Lattice {
    values: Vec<f32>,
    cells: usize,
}

impl Lattice {
    fn new(cells: usize, stream: &mut Stream) -> Self {
        let values = (0..(cells + 1) * (cells + 1))
            .map(|_| stream.uniform())
            .collect();
        Self { values, cells }
    }

    fn at(&self, x: f32, y: f32) -> f32 {
        let scale = self.cells as f32 / SIDE as f32;
        let (x, y) = (x * scale, y * scale);
        let (i, j) = (x as usize, y as usize);
        let ease = |t: f32| t * t * (3.0 - 2.0 * t);
        let (fx, fy) = (ease(x - i as f32), ease(y - j as f32));
        let value = |i: usize, j: usize| self.values[j * (self.cells + 1) + i];
        let top = value(i, j) + fx * (value(i + 1, j) - value(i, j));
        let bottom = value(i, j + 1) + fx * (value(i + 1, j + 1) - value(i, j + 1));
        top + fy * (bottom - top)
    }
}
