//! Hand-written sentences: each data set's own, as the CoOp authors chose it, the published lists, and their features.

use std::sync::{Mutex, PoisonError};

use candle_core::Tensor;
use serde::{Deserialize, Serialize};

use crate::prompt::{ClassTokens, Prompts};
use crate::{Clip, Error, Result, ops};

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
                format!(
                    "no sentence is known for it; set one yourself, or name one of {}",
                    known.join(", ")
                ),
            ))
        }
    }
}

/// The id of a data set that is called by its name in the authors' configs; any other name as it is.
pub fn id_of(name: &str) -> &str {
    let known = DATASETS.iter().find(|(_, theirs, _)| *theirs == name);
    known.map_or(name, |d| d.0)
}

/// As [`for_dataset`], with the type of the class in front: what ProGrad's and SubPT's authors use.
///
/// # Errors
/// As [`for_dataset`].
pub fn type_first(name: &str) -> Result<&'static str> {
    Ok(match for_dataset(name)? {
        "a photo of a {}, a type of pet." => "a type of pet, a photo of a {}.",
        "a photo of a {}, a type of flower." => "a type of flower, a photo of a {}.",
        "a photo of a {}, a type of aircraft." => "a type of aircraft, a photo of a {}.",
        "a photo of {}, a type of food." => "a type of food, a photo of {}.",
        "{} texture." => "a texture of {}.",
        without_a_type => without_a_type,
    })
}

/// The sentence that settings name: one of their own, or what `of_dataset` finds for a data set; `None` if they name neither.
///
/// # Errors
/// [`Error::Config`] for both at once, and as `of_dataset`.
pub fn chosen<'a>(
    template: Option<&'a str>,
    dataset: Option<&'a str>,
    of_dataset: impl Fn(&'a str) -> Result<&'static str>,
) -> Result<Option<&'a str>> {
    match (template, dataset) {
        (Some(template), Some(dataset)) => {
            let expected = format!("either a template or a data set, not `{dataset}` as well");
            Err(Error::config("template", template, expected))
        }
        (Some(template), None) => Ok(Some(template)),
        (None, Some(dataset)) => of_dataset(dataset).map(Some),
        (None, None) => Ok(None),
    }
}

/// Whether a data set is ImageNet itself (its variants are not).
pub fn is_imagenet(name: &str) -> bool {
    matches!(name, "imagenet" | "ImageNet")
}

/// Hand-written sentences whose features a frozen tower computes once: the classes of zero-shot CLIP, the anchors that
/// learned prompts are held to, the teacher that they learn from.
///
/// The features of the classes seen last are kept, so a loss may ask at every step.
#[derive(Debug)]
pub struct Sentences {
    templates: Vec<String>,
    /// Of which weights and classes, and what they are.
    kept: Mutex<Option<(String, Vec<String>, Tensor)>>,
}

impl Clone for Sentences {
    fn clone(&self) -> Self {
        Self {
            templates: self.templates.clone(),
            kept: Mutex::default(),
        }
    }
}

impl Sentences {
    /// Sentences with `{}` for the class name; one that occurs twice counts twice.
    ///
    /// # Errors
    /// [`Error::Config`] if there is none, or one has no `{}`.
    pub fn new(templates: Vec<String>) -> Result<Self> {
        if templates.is_empty() {
            return Err(Error::config("templates", "[]", "at least one template"));
        }
        if let Some(template) = templates.iter().find(|t| !t.contains("{}")) {
            return Err(Error::config("templates", template, NO_PLACE));
        }
        Ok(Self {
            templates,
            kept: Mutex::default(),
        })
    }

    /// The sentences.
    pub fn templates(&self) -> &[String] {
        &self.templates
    }

    /// Unit features of every sentence and class, `(templates, n_cls, embed_dim)`.
    ///
    /// # Errors
    /// [`Error::PromptTooLong`], [`Error::NotFinite`] for a zero feature.
    pub fn each(&self, clip: &Clip, classes: &ClassTokens) -> Result<Tensor> {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((weights, names, features)) = kept.as_ref()
            && weights == clip.weights_hash()
            && names == classes.names()
        {
            return Ok(features.clone());
        }
        let encode = |template: &String| -> Result<Tensor> {
            let prompts = Prompts::of_tokens(classes.fill(template)?);
            ops::unit_length(&clip.text().encode(&prompts)?, "a text feature")
        };
        let features: Vec<Tensor> = self.templates.iter().map(encode).collect::<Result<_>>()?;
        let features = Tensor::stack(&features, 0)?;
        let weights = clip.weights_hash().to_owned();
        *kept = Some((weights, classes.names().to_vec(), features.clone()));
        Ok(features)
    }

    /// One unit feature per class, `(n_cls, embed_dim)`: the mean over the sentences, scaled to unit length again.
    ///
    /// # Errors
    /// As [`Sentences::each`].
    pub fn mean(&self, clip: &Clip, classes: &ClassTokens) -> Result<Tensor> {
        let each = self.each(clip, classes)?;
        match self.templates.len() {
            1 => Ok(each.squeeze(0)?),
            // A zero mean: sentences that cancel each other.
            _ => ops::unit_length(&each.mean(0)?, "a mean text feature"),
        }
    }
}

const NO_PLACE: &str = "a template has {} where the class name goes";

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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::random;
    use crate::{Activation, Arch, Classes, Storage, VisionArch};

    fn clip(seed: u64) -> Result<Clip> {
        let arch = Arch {
            embed_dim: 16,
            image_resolution: 32,
            vision: VisionArch::Vit {
                layers: 1,
                width: 64,
                patch_size: 32,
            },
            context_length: 77,
            vocab_size: 49_408,
            text_width: 64,
            text_layers: 1,
            activation: Activation::QuickGelu,
        };
        Clip::from_checkpoint(random(&arch, seed)?, Storage::F32)
    }

    fn tokens(clip: &Clip, names: &[&str]) -> Result<ClassTokens> {
        let classes = Classes::new(names.iter().map(|n| (*n).to_owned()).collect())?;
        ClassTokens::new(clip.text(), &classes)
    }

    fn values(t: &Tensor) -> Result<Vec<f32>> {
        Ok(t.flatten_all()?.to_vec1()?)
    }

    #[test]
    fn what_is_kept_belongs_to_its_weights_and_classes() -> Result<()> {
        let (one, other) = (clip(1)?, clip(2)?);
        let sentences = || Sentences::new(vec!["a {}.".into(), "two {}s.".into()]);
        let shared = sentences()?;
        for names in [&["cat", "dog"][..], &["cat", "cow"], &["cat"]] {
            for clip in [&one, &other, &other] {
                let classes = tokens(clip, names)?;
                let fresh = sentences()?.mean(clip, &classes)?;
                assert_eq!(values(&shared.mean(clip, &classes)?)?, values(&fresh)?);
            }
        }
        Ok(())
    }

    #[test]
    fn a_sentence_twice_counts_twice_and_none_is_refused() -> Result<()> {
        let clip = clip(1)?;
        let classes = tokens(&clip, &["cat", "dog"])?;
        let of = |templates: &[&str]| {
            Sentences::new(templates.iter().map(|t| (*t).to_owned()).collect())
        };
        let each = of(&["a {}.", "the {}."])?.each(&clip, &classes)?;
        let mean = of(&["a {}.", "a {}.", "the {}."])?.mean(&clip, &classes)?;
        let by_hand = ((each.get(0)? * 2.0)? + each.get(1)?)?;
        let by_hand = ops::unit_length(&by_hand, "sum")?;
        for (a, b) in values(&mean)?.into_iter().zip(values(&by_hand)?) {
            assert!((a - b).abs() < 1e-6, "{a} {b}");
        }
        assert!(of(&[]).is_err());
        let found = of(&["a {}.", "a cat."]).unwrap_err().to_string();
        assert!(found.contains("a cat."), "{found}");
        Ok(())
    }
}
