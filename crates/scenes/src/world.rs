//! Distributions of pictures.

use std::ops::Range;

use rayon::prelude::*;

use crate::paint::{BLACK, Rgb, WHITE, difference, luma, mix, paint, pure};
use crate::stream::{Purpose, Stream};
use crate::{Color, Layout, Object, Pattern, Picture, Place, SIDE, Scene, Shape, Style, Texture};

/// A distribution of pictures: what is drawn how often.
#[derive(Clone, Debug, PartialEq)]
pub struct World {
    /// Shares of the layouts single, same and multi.
    pub layouts: [f32; 3],
    /// Smallest and largest radius of single objects, in pixels.
    pub radius: (f32, f32),
    /// Share of saturated grounds; the others are pale.
    pub saturated: f32,
    /// Share of grounds without texture; the textures share the rest equally.
    pub plain_ground: f32,
    /// Share of pictures in a style; the styles share it equally.
    pub styled: f32,
}

impl World {
    /// Everything, mixed as a model should meet it in training.
    pub fn training() -> Self {
        Self {
            layouts: [0.55, 0.17, 0.28],
            radius: (14.0, 28.0),
            saturated: 0.3,
            plain_ground: 0.3,
            styled: 0.1,
        }
    }

    /// One large object on a pale plain ground, to start a training with.
    pub fn easy() -> Self {
        Self {
            layouts: [1.0, 0.0, 0.0],
            radius: (19.0, 28.0),
            saturated: 0.0,
            plain_ground: 1.0,
            styled: 0.0,
        }
    }

    /// Picture `index` of the world with this seed.
    pub fn picture(&self, seed: u64, index: u64) -> Picture {
        let mut stream = Stream::new(Purpose::World, seed, [index, 0]);
        let wish = self.wish(&mut stream);
        let scene = wish.scene(&mut stream);
        paint(scene, &mut stream)
    }

    /// Several pictures, drawn in parallel.
    pub fn pictures(&self, seed: u64, indices: Range<u64>) -> Vec<Picture> {
        indices
            .into_par_iter()
            .map(|index| self.picture(seed, index))
            .collect()
    }

    fn wish(&self, stream: &mut Stream) -> Wish {
        let layout = [Layout::Single, Layout::Same, Layout::Multi]
            [stream.weighted(self.layouts.into_iter())];
        let count = match layout {
            Layout::Single => 1,
            Layout::Same => 2 + stream.below(5),
            Layout::Multi => 2 + stream.below(3),
        };
        let plain_style = !stream.chance(self.styled);
        Wish {
            layout,
            count,
            radius: self.radius,
            style: if plain_style {
                Style::Plain
            } else {
                stream.pick(&Style::ALL[1..])
            },
            texture: Some(texture(self.plain_ground, stream)),
            saturated: self.saturated,
            ..Wish::default()
        }
    }
}

/// Plain with probability `plain`, else one of the other textures.
fn texture(plain: f32, stream: &mut Stream) -> Texture {
    if stream.chance(plain) {
        Texture::Plain
    } else {
        stream.pick(&Texture::ALL[1..])
    }
}

/// What a picture must show; what is `None` or empty is drawn.
#[derive(Clone, Debug)]
pub(crate) struct Wish {
    pub(crate) layout: Layout,
    pub(crate) count: usize,
    /// Range of the radius of a single object, in pixels.
    pub(crate) radius: (f32, f32),
    /// Shapes to choose from.
    pub(crate) shapes: Vec<Shape>,
    pub(crate) variety: Option<usize>,
    /// Colours of objects to choose from.
    pub(crate) colors: Vec<Color>,
    pub(crate) pattern: Option<Pattern>,
    pub(crate) ground: Option<Color>,
    /// Probability of a saturated ground.
    pub(crate) saturated: f32,
    /// Share of white in the ground's colour, where it must not depend on `saturated`.
    pub(crate) white: Option<(f32, f32)>,
    pub(crate) texture: Option<Texture>,
    pub(crate) style: Style,
    pub(crate) place: Option<Place>,
}

impl Default for Wish {
    fn default() -> Self {
        Self {
            layout: Layout::Single,
            count: 1,
            radius: (14.0, 26.0),
            shapes: Shape::ALL.to_vec(),
            variety: None,
            colors: Color::ALL.to_vec(),
            pattern: None,
            ground: None,
            saturated: 0.3,
            white: None,
            texture: None,
            style: Style::Plain,
            place: None,
        }
    }
}

/// A drawn ground.
struct Backdrop {
    color: Color,
    pale: bool,
    tones: [Rgb; 2],
}

impl Wish {
    /// A scene as wished.
    pub(crate) fn scene(&self, stream: &mut Stream) -> Scene {
        let texture = self.texture.unwrap_or_else(|| texture(0.3, stream));
        let different = if self.layout == Layout::Multi {
            self.count
        } else {
            1
        };
        let shapes = stream.some(&self.shapes, different);
        let (backdrop, colors) = self.colors_that_show(texture, shapes.len(), stream);
        let looks: Vec<Object> = shapes
            .iter()
            .zip(colors)
            .map(|(&shape, (color, tint))| self.object(shape, color, tint, &backdrop, stream))
            .collect();
        let mut objects: Vec<Object> = (0..self.count)
            .map(|i| looks[i % looks.len()].clone())
            .collect();
        self.arrange(&mut objects, stream);
        Scene {
            objects,
            ground: backdrop.color,
            pale: backdrop.pale,
            tones: backdrop.tones,
            texture,
            style: self.style,
            layout: self.layout,
        }
    }

    /// A ground and colours of `count` objects that all differ clearly from it.
    fn colors_that_show(
        &self,
        texture: Texture,
        count: usize,
        stream: &mut Stream,
    ) -> (Backdrop, Vec<(Color, Rgb)>) {
        loop {
            let backdrop = self.backdrop(texture, stream);
            let tinted: Vec<_> = self
                .colors
                .iter()
                .map(|&color| (color, jitter(color, stream)))
                .collect();
            let showing: Vec<_> = tinted
                .into_iter()
                .filter(|(_, tint)| self.shows(*tint, &backdrop))
                .collect();
            if !showing.is_empty() {
                let colors = (0..count).map(|_| stream.pick(&showing)).collect();
                return (backdrop, colors);
            }
        }
    }

    /// Whether an object of this colour can be seen on the ground.
    fn shows(&self, tint: Rgb, backdrop: &Backdrop) -> bool {
        let grey = self.style == Style::Grey;
        backdrop.tones.iter().all(|&tone| {
            difference(tint, tone) >= MIN_DIFFERENCE
                && (!grey || (luma(tint) - luma(tone)).abs() >= MIN_LUMA_DIFFERENCE)
        })
    }

    fn backdrop(&self, texture: Texture, stream: &mut Stream) -> Backdrop {
        let color = self.ground.unwrap_or_else(|| stream.pick(&Color::ALL));
        let saturated = stream.chance(self.saturated);
        let (low, high) = self
            .white
            .unwrap_or(if saturated { (0.0, 0.35) } else { (0.7, 0.95) });
        let white = stream.range(low, high);
        let tone = mix(jitter(color, stream), WHITE, white);
        Backdrop {
            color,
            pale: white > 0.6,
            tones: [tone, second_tone(tone, texture, stream)],
        }
    }

    fn object(
        &self,
        shape: Shape,
        color: Color,
        tint: Rgb,
        backdrop: &Backdrop,
        stream: &mut Stream,
    ) -> Object {
        Object {
            shape,
            variety: self.variety.unwrap_or_else(|| stream.below(shape.forms())),
            color,
            pattern: self.pattern.unwrap_or_else(|| stream.pick(&Pattern::ALL)),
            center: (0.0, 0.0),
            radius: 0.0,
            angle: 0.0,
            aspect: stream.range(0.93, 1.07),
            mirrored: stream.chance(0.5),
            tint,
            accent: accent(tint, backdrop.tones[0]),
        }
    }

    /// Gives the objects their places, sizes and turns.
    fn arrange(&self, objects: &mut [Object], stream: &mut Stream) {
        let quarters = if self.style == Style::Rotated {
            1 + stream.below(3)
        } else {
            0
        };
        if self.layout == Layout::Single {
            for object in objects.iter_mut() {
                self.put_single(object, stream);
            }
        } else {
            put_in_cells(objects, stream);
        }
        for object in objects {
            let sway = if object.shape.is_upright() { 0.22 } else { 0.5 };
            object.angle =
                stream.range(-sway, sway) + quarters as f32 * core::f32::consts::FRAC_PI_2;
        }
    }

    fn put_single(&self, object: &mut Object, stream: &mut Stream) {
        let radius = stream.range(self.radius.0, self.radius.1);
        let room = SIDE as f32 / 2.0 - radius - 1.0;
        let (dx, dy) = match self.place {
            None => (stream.range(-room, room), stream.range(-room, room)),
            Some(place) => {
                let (far, aside) = (stream.range(0.8, 1.0) * room, stream.range(-3.0, 3.0));
                match place {
                    Place::Left => (-far, aside),
                    Place::Right => (far, aside),
                    Place::Top => (aside, -far),
                    Place::Bottom => (aside, far),
                    Place::Centre => (aside, stream.range(-3.0, 3.0)),
                }
            }
        };
        object.radius = radius;
        object.center = (SIDE as f32 / 2.0 + dx, SIDE as f32 / 2.0 + dy);
    }
}

/// Least sum of absolute differences between an object's colour and the ground.
pub(crate) const MIN_DIFFERENCE: f32 = 0.6;
/// Least difference in brightness where colours are not shown.
pub(crate) const MIN_LUMA_DIFFERENCE: f32 = 0.15;

/// Puts up to nine objects into different cells of a grid of 2×2 (if they are few, half of the time) or 3×3.
fn put_in_cells(objects: &mut [Object], stream: &mut Stream) {
    let across = if objects.len() <= 4 && stream.chance(0.6) {
        2
    } else {
        3
    };
    let cell = SIDE as f32 / across as f32;
    let cells: Vec<usize> = (0..across * across).collect();
    let size = stream.range(0.72, 0.92) * cell / 2.0;
    for (object, at) in objects.iter_mut().zip(stream.some(&cells, across * across)) {
        object.radius = size * stream.range(0.93, 1.0);
        let room = cell / 2.0 - object.radius * 1.07;
        let mut middle = |i: usize| (i as f32 + 0.5) * cell + stream.range(-room, room);
        object.center = (middle(at % across), middle(at / across));
    }
}

/// The colour, a little brighter or darker and a little off in hue.
fn jitter(color: Color, stream: &mut Stream) -> Rgb {
    let light = stream.range(0.92, 1.06);
    let tint = pure(color).map(|v| v * light + stream.range(-0.025, 0.025));
    tint.map(|v| v.clamp(0.0, 1.0))
}

/// The other tone of a ground: darker on light grounds, lighter on dark ones.
fn second_tone(tone: Rgb, texture: Texture, stream: &mut Stream) -> Rgb {
    let step = match texture {
        Texture::Plain => return tone,
        Texture::Gradient => stream.range(0.18, 0.34),
        Texture::Cloudy | Texture::Grainy => stream.range(0.14, 0.26),
        Texture::Lined | Texture::Tiled => stream.range(0.1, 0.2),
    };
    let end = if luma(tone) > 0.4 { BLACK } else { WHITE };
    mix(tone, end, step)
}

/// The second colour of a pattern: the first one lightened or darkened, whichever stands out more.
fn accent(tint: Rgb, ground: Rgb) -> Rgb {
    let stands_out = |c: Rgb| difference(c, tint).min(difference(c, ground));
    let (lighter, darker) = (mix(tint, WHITE, 0.6), mix(tint, BLACK, 0.55));
    if stands_out(lighter) > stands_out(darker) {
        lighter
    } else {
        darker
    }
}

/// A picture of two to four different shapes, for multi-label tasks: the labels are the shapes of `scene.objects`.
pub fn multi_label(seed: u64, index: u64) -> Picture {
    let mut stream = Stream::new(Purpose::MultiLabel, seed, [index, 0]);
    let wish = Wish {
        layout: Layout::Multi,
        count: 2 + stream.below(3),
        ..Wish::default()
    };
    let scene = wish.scene(&mut stream);
    paint(scene, &mut stream)
}

/// Class `class`, picture `index` of a task, as wished by `wish`.
pub(crate) fn draw(
    seed: u64,
    counters: [u64; 2],
    wish: impl FnOnce(&mut Stream) -> Wish,
) -> Picture {
    let mut stream = Stream::new(Purpose::Task, seed, counters);
    let scene = wish(&mut stream).scene(&mut stream);
    paint(scene, &mut stream)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Task;

    fn assert_contrast(scene: &Scene) {
        for object in &scene.objects {
            for tone in scene.tones {
                assert!(difference(object.tint, tone) >= MIN_DIFFERENCE, "{scene:?}");
                let bright = (luma(object.tint) - luma(tone)).abs() >= MIN_LUMA_DIFFERENCE;
                assert!(bright || scene.style != Style::Grey, "{scene:?}");
            }
        }
    }

    #[test]
    fn every_object_stands_out_from_the_ground() {
        let world = World {
            styled: 0.5,
            ..World::training()
        };
        world
            .pictures(2, 0..2000)
            .iter()
            .for_each(|p| assert_contrast(&p.scene));
        for task in Task::ALL {
            for class in 0..task.classes().len() {
                (0..10).for_each(|i| assert_contrast(&task.picture(2, class, i).scene));
            }
        }
    }
}
