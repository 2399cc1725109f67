//! What is in a picture.

use crate::paint::Rgb;
use crate::{Color, Pattern, Place, SIDE, Shape, Style, Texture};

/// How the objects of a picture are arranged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// One object.
    Single,
    /// Several equal objects (or one, where the number is asked for).
    Same,
    /// Objects of different shapes.
    Multi,
}

/// One object of a picture.
#[derive(Clone, Debug, PartialEq)]
pub struct Object {
    /// What it is.
    pub shape: Shape,
    /// Which form of the shape: an index into [`Shape::varieties`], 0 if there are none.
    pub variety: usize,
    /// Its main colour.
    pub color: Color,
    /// What covers it.
    pub pattern: Pattern,
    /// Centre in pixels, x to the right and y down from the top left corner.
    pub center: (f32, f32),
    /// Radius in pixels of the circle around it.
    pub radius: f32,
    /// Turn in radians, clockwise as seen.
    pub angle: f32,
    /// Stretch along its own x axis; along y it is the inverse.
    pub aspect: f32,
    /// Whether left and right are swapped.
    pub mirrored: bool,
    /// The colour as drawn, RGB from 0 to 1.
    pub tint: Rgb,
    /// The second colour of the pattern.
    pub accent: Rgb,
}

impl Object {
    /// The name of the variety, if the shape has several.
    pub fn variety_word(&self) -> Option<&'static str> {
        self.shape.varieties().get(self.variety).copied()
    }

    /// Where the object is: at the centre within 6 pixels, else at the side it is nearest to.
    pub fn place(&self) -> Place {
        let middle = SIDE as f32 / 2.0;
        let (dx, dy) = (self.center.0 - middle, self.center.1 - middle);
        match () {
            () if dx.abs() < 6.0 && dy.abs() < 6.0 => Place::Centre,
            () if dx.abs() >= dy.abs() && dx < 0.0 => Place::Left,
            () if dx.abs() >= dy.abs() => Place::Right,
            () if dy < 0.0 => Place::Top,
            () => Place::Bottom,
        }
    }
}

/// What a picture shows.
#[derive(Clone, Debug, PartialEq)]
pub struct Scene {
    /// The objects; they do not overlap.
    pub objects: Vec<Object>,
    /// The colour of the ground.
    pub ground: Color,
    /// Whether the ground is mostly white with a tinge of its colour.
    pub pale: bool,
    /// The two tones of the ground as drawn; equal if the texture is plain.
    pub tones: [Rgb; 2],
    /// What the ground looks like.
    pub texture: Texture,
    /// How the picture is rendered.
    pub style: Style,
    /// How the objects are arranged.
    pub layout: Layout,
}

/// A picture of [`SIDE`]×[`SIDE`] pixels and what it shows.
#[derive(Clone, Debug, PartialEq)]
pub struct Picture {
    /// Row-major RGB, 3·[`SIDE`]² bytes.
    pub rgb: Vec<u8>,
    /// Per pixel: 0 for the ground, `i + 1` for object `i`.
    pub mask: Vec<u8>,
    /// What the picture shows.
    pub scene: Scene,
}
