//! Fresh pictures and captions of a step, and what is known of them.

use anyhow::Result;
use candle_core::{Device, Tensor};
use cliptune_core::clip::Glimpses;
use cliptune_core::preprocess::normalise;
use cliptune_core::rng::Rng;
use cliptune_core::tokenizer::Tokenizer;
use cliptune_core::{CONTEXT_LENGTH, Preprocess};
use cliptune_scenes::{
    self as scenes, Color, Kind, Layout, Pattern, Picture, Place, Shape, Style, Texture, Wording,
    World,
};
use rayon::prelude::*;

/// Side of a patch in pixels, and patches along a side.
pub(crate) const PATCH: usize = 8;
pub(crate) const GRID: usize = scenes::SIDE / PATCH;

/// The heads, and how many classes each tells apart.
pub(crate) fn heads() -> Vec<(&'static str, usize)> {
    vec![
        ("shape", Shape::ALL.len()),
        ("kind", Kind::ALL.len()),
        ("color", Color::ALL.len()),
        ("pattern", Pattern::ALL.len()),
        ("variety", 3 * Shape::ALL.len()),
        ("count", 6),
        ("ground", Color::ALL.len()),
        ("texture", Texture::ALL.len()),
        ("style", Style::ALL.len()),
        ("place", Place::ALL.len()),
    ]
}

/// The class that a head should name, where the picture has one answer.
fn answer(picture: &Picture, head: &str) -> Option<u32> {
    let scene = &picture.scene;
    let object = &scene.objects[0];
    let alike = scene.layout != Layout::Multi;
    let index = match head {
        "count" => scene.objects.len() - 1,
        "ground" => scene.ground.index(),
        "texture" => scene.texture.index(),
        "style" => scene.style.index(),
        _ if !alike => return None,
        "shape" => object.shape.index(),
        "kind" => object.shape.kind().index(),
        "color" if scene.style.keeps_color() => object.color.index(),
        "pattern" if scene.style.keeps_pattern() => object.pattern.index(),
        "variety" => {
            if object.shape.varieties().is_empty() {
                return None;
            }
            3 * object.shape.index() + object.variety
        }
        "place" if scene.layout == Layout::Single => object.place().index(),
        _ => return None,
    };
    Some(index as u32)
}

/// What pictures and captions a step draws.
#[derive(Clone, Debug)]
pub(crate) struct Draw {
    pub(crate) world: World,
    pub(crate) wording: Wording,
    pub(crate) pictures: usize,
    /// Patches that the image tower sees of each picture, those under objects first.
    pub(crate) kept: usize,
    /// At most so many patches of a picture are to name the shape above them.
    pub(crate) named: usize,
}

/// A step's pictures and captions.
#[derive(Debug)]
pub(crate) struct Batch {
    /// `(pictures, 3, side, side)`.
    pub(crate) pixels: Tensor,
    /// Token ids of the captions.
    pub(crate) captions: Vec<Vec<u32>>,
    /// What the tower sees of each picture.
    pub(crate) kept: Vec<Vec<usize>>,
    /// Patches that name a shape: picture, place among the kept, shape.
    pub(crate) named: Vec<(usize, usize, u32)>,
    /// By head: the pictures with an answer, and the answers.
    pub(crate) answers: Vec<(&'static str, Vec<u32>, Vec<u32>)>,
    /// The shape, where all objects of a picture are alike.
    pub(crate) shapes: Vec<Option<u32>>,
}

impl Batch {
    /// The batch of `step`: pictures `step · n ..` of the world of `seed`.
    pub(crate) fn draw(
        draw: &Draw,
        preprocess: &Preprocess,
        seed: u64,
        step: usize,
    ) -> Result<Self> {
        let n = draw.pictures;
        let first = (step * n) as u64;
        let drawn: Vec<Drawn> = (first..first + n as u64)
            .into_par_iter()
            .map(|index| Drawn::new(draw, preprocess, seed, index))
            .collect::<Result<_>>()?;
        let mut pixels: Vec<f32> = Vec::with_capacity(n * 3 * scenes::SIDE * scenes::SIDE);
        drawn.iter().for_each(|d| pixels.extend(&d.pixels));
        let answers = heads().into_iter().map(|(head, _)| {
            let known = drawn.iter().enumerate();
            let known = known.filter_map(|(i, d)| Some((i as u32, answer(&d.picture, head)?)));
            let (pictures, answers) = known.unzip();
            (head, pictures, answers)
        });
        let answers = answers.collect();
        let named = drawn.iter().enumerate();
        let named = named.flat_map(|(i, d)| d.named.iter().map(move |(p, shape)| (i, *p, *shape)));
        let side = scenes::SIDE;
        Ok(Self {
            pixels: Tensor::from_vec(pixels, (n, 3, side, side), &Device::Cpu)?,
            named: named.collect(),
            answers,
            shapes: drawn.iter().map(|d| answer(&d.picture, "shape")).collect(),
            kept: drawn.iter().map(|d| d.kept.clone()).collect(),
            captions: drawn.into_iter().map(|d| d.caption).collect(),
        })
    }

    /// The glimpses of pictures `range`, and which of [`Batch::named`] they are.
    pub(crate) fn glimpses(&self, range: std::ops::Range<usize>) -> Glimpses {
        let values = self.named.iter().filter(|(i, ..)| range.contains(i));
        Glimpses {
            values: values.map(|(i, p, _)| (i - range.start, *p)).collect(),
            kept: self.kept[range.clone()].to_vec(),
        }
    }
}

struct Drawn {
    picture: Picture,
    pixels: Vec<f32>,
    caption: Vec<u32>,
    kept: Vec<usize>,
    named: Vec<(usize, u32)>,
}

impl Drawn {
    fn new(draw: &Draw, preprocess: &Preprocess, seed: u64, index: u64) -> Result<Self> {
        let picture = draw.world.picture(seed, index);
        let caption = scenes::caption(&picture.scene, &draw.wording, seed, index);
        let mut rng = Rng::stream(seed, "glimpse", &[index]);
        let cover = cover(&picture);
        let mut order = rng.permutation(GRID * GRID);
        // Under objects first, in random order each.
        order.sort_by_key(|p| cover[*p].is_none());
        order.truncate(draw.kept);
        order.sort_unstable();
        let mut named: Vec<(usize, u32)> = order
            .iter()
            .enumerate()
            .filter_map(|(place, p)| match cover[*p] {
                Some((object, share)) if share >= 0.5 => {
                    Some((place, picture.scene.objects[object].shape.index() as u32))
                }
                _ => None,
            })
            .collect();
        let chosen = rng.permutation(named.len());
        let mut chosen = chosen[..draw.named.min(named.len())].to_vec();
        chosen.sort_unstable();
        named = chosen.into_iter().map(|i| named[i]).collect();
        Ok(Self {
            pixels: normalise(&picture.rgb, preprocess)?,
            caption: Tokenizer::get().tokenize(&caption, CONTEXT_LENGTH)?,
            kept: order,
            named,
            picture,
        })
    }
}

/// For each patch the object that covers most of it, and its share of the patch's pixels.
pub(crate) fn cover(picture: &Picture) -> Vec<Option<(usize, f32)>> {
    let objects = picture.scene.objects.len();
    let mut counts = vec![vec![0u32; objects]; GRID * GRID];
    for (at, &object) in picture.mask.iter().enumerate() {
        if object > 0 {
            let patch = at / scenes::SIDE / PATCH * GRID + at % scenes::SIDE / PATCH;
            counts[patch][object as usize - 1] += 1;
        }
    }
    let most = |counts: Vec<u32>| {
        let (object, count) = counts
            .into_iter()
            .enumerate()
            .max_by_key(|(i, count)| (*count, std::cmp::Reverse(*i)))?;
        (count > 0).then_some((object, count as f32 / (PATCH * PATCH) as f32))
    };
    counts.into_iter().map(most).collect()
}
