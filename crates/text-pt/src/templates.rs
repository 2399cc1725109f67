//! Hand-written sentences: each data set's own, as the CoOp authors chose it, and the published lists.

use cliptune_core::{Error, Result};
use serde::{Deserialize, Serialize};

/// The sentence for a data set that has none of its own.
pub const DEFAULT: &str = "a photo of a {}.";

/// `(id, name in the authors' configs, template)` of each data set.
const DATASETS: &[(&str, &str, &str)] = &[
    ("imagenet", "ImageNet", DEFAULT),
    ("caltech101", "Caltech101", DEFAULT),
    (
        "oxford_pets",
        "OxfordPets",
        "a photo of a {}, a type of pet.",
    ),
    ("stanford_cars", "StanfordCars", DEFAULT),
    (
        "oxford_flowers",
        "OxfordFlowers",
        "a photo of a {}, a type of flower.",
    ),
    ("food101", "Food101", "a photo of {}, a type of food."),
    (
        "fgvc_aircraft",
        "FGVCAircraft",
        "a photo of a {}, a type of aircraft.",
    ),
    ("sun397", "SUN397", DEFAULT),
    ("dtd", "DescribableTextures", "{} texture."),
    ("eurosat", "EuroSAT", "a centered satellite photo of {}."),
    ("ucf101", "UCF101", "a photo of a person doing {}."),
    ("imagenetv2", "ImageNetV2", DEFAULT),
    ("imagenet_sketch", "ImageNetSketch", DEFAULT),
    ("imagenet_a", "ImageNetA", DEFAULT),
    ("imagenet_r", "ImageNetR", DEFAULT),
];

/// The template that the CoOp authors use for a data set, by its id or by its name in their configs.
///
/// # Errors
/// [`Error::Config`] listing the known ids.
pub fn for_dataset(name: &str) -> Result<&'static str> {
    match DATASETS
        .iter()
        .find(|(id, theirs, _)| *id == name || *theirs == name)
    {
        Some((_, _, template)) => Ok(template),
        None => {
            let known: Vec<_> = DATASETS.iter().map(|d| d.0).collect();
            Err(Error::config(
                "dataset",
                name,
                format!("one of {}", known.join(", ")),
            ))
        }
    }
}

/// Whether a data set is ImageNet itself (its variants are not).
pub(crate) fn is_imagenet(name: &str) -> bool {
    matches!(name, "imagenet" | "ImageNet")
}

/// A published list of templates.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Ensemble {
    /// The seven that OpenAI selected for ImageNet.
    Select7,
    /// All eighty of OpenAI's list for ImageNet.
    Imagenet80,
}

impl Ensemble {
    /// Its templates, in order.
    pub fn templates(self) -> &'static [&'static str] {
        match self {
            Self::Select7 => SELECT_7,
            Self::Imagenet80 => IMAGENET_80,
        }
    }
}

const SELECT_7: &[&str] = &[
    "itap of a {}.",
    "a bad photo of the {}.",
    "a origami {}.",
    "a photo of the large {}.",
    "a {} in a video game.",
    "art of the {}.",
    "a photo of the small {}.",
];

const IMAGENET_80: &[&str] = &[
    "a bad photo of a {}.",
    "a photo of many {}.",
    "a sculpture of a {}.",
    "a photo of the hard to see {}.",
    "a low resolution photo of the {}.",
    "a rendering of a {}.",
    "graffiti of a {}.",
    "a bad photo of the {}.",
    "a cropped photo of the {}.",
    "a tattoo of a {}.",
    "the embroidered {}.",
    "a photo of a hard to see {}.",
    "a bright photo of a {}.",
    "a photo of a clean {}.",
    "a photo of a dirty {}.",
    "a dark photo of the {}.",
    "a drawing of a {}.",
    "a photo of my {}.",
    "the plastic {}.",
    "a photo of the cool {}.",
    "a close-up photo of a {}.",
    "a black and white photo of the {}.",
    "a painting of the {}.",
    "a painting of a {}.",
    "a pixelated photo of the {}.",
    "a sculpture of the {}.",
    "a bright photo of the {}.",
    "a cropped photo of a {}.",
    "a plastic {}.",
    "a photo of the dirty {}.",
    "a jpeg corrupted photo of a {}.",
    "a blurry photo of the {}.",
    "a photo of the {}.",
    "a good photo of the {}.",
    "a rendering of the {}.",
    "a {} in a video game.",
    "a photo of one {}.",
    "a doodle of a {}.",
    "a close-up photo of the {}.",
    "a photo of a {}.",
    "the origami {}.",
    "the {} in a video game.",
    "a sketch of a {}.",
    "a doodle of the {}.",
    "a origami {}.",
    "a low resolution photo of a {}.",
    "the toy {}.",
    "a rendition of the {}.",
    "a photo of the clean {}.",
    "a photo of a large {}.",
    "a rendition of a {}.",
    "a photo of a nice {}.",
    "a photo of a weird {}.",
    "a blurry photo of a {}.",
    "a cartoon {}.",
    "art of a {}.",
    "a sketch of the {}.",
    "a embroidered {}.",
    "a pixelated photo of a {}.",
    "itap of the {}.",
    "a jpeg corrupted photo of the {}.",
    "a good photo of a {}.",
    "a plushie {}.",
    "a photo of the nice {}.",
    "a photo of the small {}.",
    "a photo of the weird {}.",
    "the cartoon {}.",
    "art of the {}.",
    "a drawing of the {}.",
    "a photo of the large {}.",
    "a black and white photo of a {}.",
    "the plushie {}.",
    "a dark photo of a {}.",
    "itap of a {}.",
    "graffiti of the {}.",
    "a toy {}.",
    "itap of my {}.",
    "a photo of a cool {}.",
    "a photo of a small {}.",
    "a tattoo of the {}.",
];
