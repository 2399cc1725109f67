//! The layout of Hugging Face transformers' `CLIPModel`: its names and its `config.json`.

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::{DType, Tensor};
use serde_json::{Value, json};

use super::config::{Config, decimals};
use crate::{Activation, Arch, Error, Preprocess, Result, VisionArch};

/// OpenAI's and transformers' names outside the blocks; projections are transposed.
const NAMES: [(&str, &str); 16] = [
    ("logit_scale", "logit_scale"),
    (
        "token_embedding.weight",
        "text_model.embeddings.token_embedding.weight",
    ),
    (
        "positional_embedding",
        "text_model.embeddings.position_embedding.weight",
    ),
    ("ln_final.weight", "text_model.final_layer_norm.weight"),
    ("ln_final.bias", "text_model.final_layer_norm.bias"),
    ("text_projection", "text_projection.weight"),
    (
        "visual.class_embedding",
        "vision_model.embeddings.class_embedding",
    ),
    (
        "visual.conv1.weight",
        "vision_model.embeddings.patch_embedding.weight",
    ),
    (
        "visual.positional_embedding",
        "vision_model.embeddings.position_embedding.weight",
    ),
    // The missing letters are transformers' own.
    ("visual.ln_pre.weight", "vision_model.pre_layrnorm.weight"),
    ("visual.ln_pre.bias", "vision_model.pre_layrnorm.bias"),
    (
        "visual.ln_post.weight",
        "vision_model.post_layernorm.weight",
    ),
    ("visual.ln_post.bias", "vision_model.post_layernorm.bias"),
    ("visual.proj", "visual_projection.weight"),
    // Prefixes of the blocks.
    ("transformer.resblocks.", "text_model.encoder.layers."),
    (
        "visual.transformer.resblocks.",
        "vision_model.encoder.layers.",
    ),
];

/// The same inside a block, without `.weight` and `.bias`.
const BLOCK_NAMES: [(&str, &str); 5] = [
    ("attn.out_proj", "self_attn.out_proj"),
    ("ln_1", "layer_norm1"),
    ("ln_2", "layer_norm2"),
    ("mlp.c_fc", "mlp.fc1"),
    ("mlp.c_proj", "mlp.fc2"),
];

/// How a tensor of transformers becomes one of OpenAI's, or a third of one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Part {
    Whole,
    Transposed,
    Query,
    Key,
    Value,
}

const THIRDS: [(Part, &str); 3] = [
    (Part::Query, "q_proj"),
    (Part::Key, "k_proj"),
    (Part::Value, "v_proj"),
];

/// Whether names are those of transformers.
pub(super) fn has_names(mut names: impl Iterator<Item = impl AsRef<str>>) -> bool {
    names.any(|name| {
        name.as_ref().starts_with("text_model.") || name.as_ref().starts_with("vision_model.")
    })
}

fn openai_name(hf: &str) -> Option<(String, Part)> {
    if let Some((openai, _)) = NAMES
        .iter()
        .find(|(_, name)| *name == hf && !name.ends_with('.'))
    {
        let part = if hf.ends_with("_projection.weight") {
            Part::Transposed
        } else {
            Part::Whole
        };
        return Some(((*openai).to_owned(), part));
    }
    let (blocks, rest) = NAMES.iter().find_map(|(openai, name)| {
        Some((
            openai,
            hf.strip_prefix(name).filter(|_| name.ends_with('.'))?,
        ))
    })?;
    let (index, rest) = rest.split_once('.')?;
    let (module, kind) = rest
        .rsplit_once('.')
        .filter(|(_, kind)| matches!(*kind, "weight" | "bias"))?;
    if let Some((part, _)) = THIRDS
        .iter()
        .find(|(_, third)| module.strip_prefix("self_attn.") == Some(*third))
    {
        return Some((format!("{blocks}{index}.attn.in_proj_{kind}"), *part));
    }
    let (openai, _) = BLOCK_NAMES.iter().find(|(_, name)| *name == module)?;
    Some((format!("{blocks}{index}.{openai}.{kind}"), Part::Whole))
}

/// Which tensors of transformers make up each of OpenAI's.
pub(super) struct Plan(BTreeMap<String, Vec<(Part, String)>>);

impl Plan {
    /// # Errors
    /// Unknown names, and attention layers that lack one of query, key and value.
    pub(super) fn new<'a>(names: impl Iterator<Item = &'a String>, path: &Path) -> Result<Self> {
        let mut plan: BTreeMap<String, Vec<(Part, String)>> = BTreeMap::new();
        for name in names {
            let unknown = || {
                Error::format(
                    path,
                    format!("tensor `{name}` is not part of a CLIPModel of transformers"),
                )
            };
            let (openai, part) = openai_name(name).ok_or_else(unknown)?;
            plan.entry(openai).or_default().push((part, name.clone()));
        }
        for (openai, parts) in &mut plan {
            parts.sort();
            let found: Vec<Part> = parts.iter().map(|(part, _)| *part).collect();
            if let [Part::Whole | Part::Transposed] | [Part::Query, Part::Key, Part::Value] =
                found.as_slice()
            {
                continue;
            }
            let missing = THIRDS
                .iter()
                .find(|(part, _)| !found.contains(part))
                .map(|(_, third)| *third)
                .unwrap_or_default();
            let name = format!("{missing} of {openai}");
            return Err(Error::MissingTensor {
                path: path.to_path_buf(),
                name,
            });
        }
        Ok(Self(plan))
    }

    /// The shapes that OpenAI's tensors will have.
    pub(super) fn shapes(
        &self,
        hf: &BTreeMap<String, Vec<usize>>,
        path: &Path,
    ) -> Result<BTreeMap<String, Vec<usize>>> {
        let shape = |(openai, parts): (&String, &Vec<(Part, String)>)| {
            let shapes: Vec<&Vec<usize>> =
                parts.iter().filter_map(|(_, name)| hf.get(name)).collect();
            let mut fused = shapes.first().copied().cloned().unwrap_or_default();
            if let Some(other) = shapes.iter().find(|shape| ***shape != fused) {
                let what = format!(
                    "one of query, key and value of `{openai}` of {}",
                    path.display()
                );
                return Err(Error::Shape {
                    what,
                    found: (*other).clone(),
                    expected: fused,
                });
            }
            if parts
                .first()
                .is_some_and(|(part, _)| *part == Part::Transposed)
            {
                fused.reverse();
            }
            if let (3, Some(rows)) = (shapes.len(), fused.first_mut()) {
                *rows = rows.saturating_mul(3);
            }
            Ok((openai.clone(), fused))
        };
        self.0.iter().map(shape).collect()
    }

    /// Fuses and transposes; each tensor is let go as soon as it is used.
    pub(super) fn convert(
        self,
        mut hf: BTreeMap<String, Tensor>,
        path: &Path,
    ) -> Result<BTreeMap<String, Tensor>> {
        let mut take = |name: &String| {
            hf.remove(name).ok_or_else(|| Error::MissingTensor {
                path: path.to_path_buf(),
                name: name.clone(),
            })
        };
        let mut tensors = BTreeMap::new();
        for (openai, parts) in self.0 {
            let tensor = match parts.as_slice() {
                [(Part::Transposed, name)] => take(name)?.t()?.contiguous()?,
                [(_, name)] => take(name)?,
                parts => Tensor::cat(
                    &parts
                        .iter()
                        .map(|(_, name)| take(name))
                        .collect::<Result<Vec<_>>>()?,
                    0,
                )?,
            };
            tensors.insert(openai, tensor);
        }
        Ok(tensors)
    }
}

/// One of OpenAI's tensors as transformers' one or three.
pub(super) fn from_openai(openai: &str, tensor: &Tensor) -> Result<Vec<(String, Tensor)>> {
    let unknown = || {
        Error::Data(format!(
            "tensor `{openai}` has no place in a CLIPModel of transformers"
        ))
    };
    if let Some((_, name)) = NAMES.iter().find(|(name, _)| *name == openai) {
        let transposed = name.ends_with("_projection.weight");
        let tensor = if transposed {
            tensor.t()?.contiguous()?
        } else {
            tensor.clone()
        };
        return Ok(vec![((*name).to_owned(), tensor)]);
    }
    let (layers, rest) = NAMES
        .iter()
        .find_map(|(name, layers)| {
            Some((
                layers,
                openai.strip_prefix(name).filter(|_| name.ends_with('.'))?,
            ))
        })
        .ok_or_else(unknown)?;
    let (index, rest) = rest.split_once('.').ok_or_else(unknown)?;
    if let Some(kind) = rest.strip_prefix("attn.in_proj_") {
        let thirds = tensor.chunk(3, 0)?;
        let named = THIRDS.iter().zip(thirds);
        return named
            .map(|((_, third), tensor)| {
                Ok((
                    format!("{layers}{index}.self_attn.{third}.{kind}"),
                    tensor.contiguous()?,
                ))
            })
            .collect();
    }
    let (module, kind) = rest.rsplit_once('.').ok_or_else(unknown)?;
    let (_, name) = BLOCK_NAMES
        .iter()
        .find(|(name, _)| *name == module)
        .ok_or_else(unknown)?;
    Ok(vec![(
        format!("{layers}{index}.{name}.{kind}"),
        tensor.clone(),
    )])
}

/// What `config.json` says beyond the sizes, which are read off the tensors.
pub(super) struct HfConfig(Config);

impl HfConfig {
    pub(super) fn read(path: &Path) -> Result<Self> {
        let mut config = Config::read(path)?;
        if config.get("/model_type").and_then(Value::as_str) != Some("clip") {
            let found = config.root.get("model_type").cloned().unwrap_or_default();
            return Err(config.wrong("/model_type", found, "\"clip\""));
        }
        // Older files repeat the sections under a second name, which takes precedence in transformers.
        for section in ["text_config", "vision_config"] {
            let newer = config
                .root
                .get(format!("{section}_dict"))
                .and_then(Value::as_object)
                .cloned();
            let target = config.root.get_mut(section).and_then(Value::as_object_mut);
            match (newer, target) {
                (Some(newer), Some(target)) => target.extend(newer),
                (Some(newer), None) => {
                    if let Some(root) = config.root.as_object_mut() {
                        root.insert(section.to_owned(), Value::Object(newer));
                    }
                }
                _ => {}
            }
        }
        Ok(Self(config))
    }

    /// The activation, if both towers have the same.
    pub(super) fn activation(&self) -> Result<Activation> {
        let of = |pointer: &str| match self.0.get(pointer).map(|v| v.as_str()) {
            None | Some(Some("quick_gelu")) => Ok(Activation::QuickGelu),
            Some(Some("gelu")) => Ok(Activation::Gelu),
            Some(other) => {
                Err(self
                    .0
                    .wrong(pointer, other.unwrap_or("not text"), "quick_gelu or gelu"))
            }
        };
        let (text, image) = (
            of("/text_config/hidden_act")?,
            of("/vision_config/hidden_act")?,
        );
        if text != image {
            let message = format!(
                "text_config.hidden_act is {text:?}, vision_config.hidden_act {image:?}; both towers must have the same"
            );
            return Err(Error::format(&self.0.path, message));
        }
        Ok(text)
    }

    /// # Errors
    /// The first size that contradicts the tensors, and what the towers here cannot compute.
    pub(super) fn check(&self, arch: &Arch) -> Result<()> {
        let VisionArch::Vit {
            layers,
            width,
            patch_size,
        } = arch.vision
        else {
            return Err(Error::format(
                &self.0.path,
                "the tensors hold a ResNet, which transformers' CLIPModel does not know",
            ));
        };
        let agree = |pointer: &str, default, tensors| self.0.agree(pointer, default, tensors);
        agree("/projection_dim", 512, arch.embed_dim)?;
        agree("/text_config/hidden_size", 512, arch.text_width)?;
        agree(
            "/text_config/intermediate_size",
            2048,
            arch.text_width.saturating_mul(4),
        )?;
        agree("/text_config/num_hidden_layers", 12, arch.text_layers)?;
        agree("/text_config/vocab_size", 49_408, arch.vocab_size)?;
        agree(
            "/text_config/max_position_embeddings",
            77,
            arch.context_length,
        )?;
        agree("/vision_config/hidden_size", 768, width)?;
        agree(
            "/vision_config/intermediate_size",
            3072,
            width.saturating_mul(4),
        )?;
        agree("/vision_config/num_hidden_layers", 12, layers)?;
        agree("/vision_config/patch_size", 32, patch_size)?;
        agree("/vision_config/image_size", 224, arch.image_resolution)?;
        agree("/vision_config/num_channels", 3, 3)?;
        for (section, default, width) in [
            ("text_config", 8, arch.text_width),
            ("vision_config", 12, width),
        ] {
            let pointer = format!("/{section}/num_attention_heads");
            let heads = self.0.size(&pointer, default)?;
            let expected = width / crate::arch::HEAD_WIDTH;
            if heads != expected {
                return Err(self.0.wrong(
                    &pointer,
                    heads,
                    format!("{expected} (width {width} in heads of 64)"),
                ));
            }
            let pointer = format!("/{section}/layer_norm_eps");
            match self.0.get(&pointer) {
                Some(eps) if eps.as_f64().is_none_or(|eps| (eps - 1e-5).abs() > 1e-12) => {
                    return Err(self.0.wrong(&pointer, eps, "1e-5"));
                }
                _ => {}
            }
        }
        Ok(())
    }
}

/// Takes the normalisation over from `preprocessor_config.json`.
pub(super) fn read_preprocess(path: &Path, into: &mut Preprocess) -> Result<()> {
    Config::read(path)?.normalisation("/image_mean", "/image_std", into)
}

/// `config.json` for an architecture with a ViT; `dtype` if all tensors have the same.
pub(super) fn config_json(arch: &Arch, dtype: DType) -> Option<Value> {
    let VisionArch::Vit {
        layers,
        width,
        patch_size,
    } = arch.vision
    else {
        return None;
    };
    let hidden_act = match arch.activation {
        Activation::QuickGelu => "quick_gelu",
        Activation::Gelu => "gelu",
    };
    let dtype = match dtype {
        DType::F16 => "float16",
        DType::BF16 => "bfloat16",
        _ => "float32",
    };
    Some(json!({
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "torch_dtype": dtype,
        "projection_dim": arch.embed_dim,
        "logit_scale_init_value": 2.6592,
        "initializer_factor": 1.0,
        "text_config": {
            "model_type": "clip_text_model",
            "hidden_size": arch.text_width,
            "intermediate_size": arch.text_width.saturating_mul(4),
            "num_hidden_layers": arch.text_layers,
            "num_attention_heads": arch.text_heads(),
            "max_position_embeddings": arch.context_length,
            "vocab_size": arch.vocab_size,
            "projection_dim": arch.embed_dim,
            "hidden_act": hidden_act,
            "layer_norm_eps": 1e-5,
            "attention_dropout": 0.0,
            "initializer_factor": 1.0,
            "initializer_range": 0.02,
            "bos_token_id": arch.vocab_size.saturating_sub(2),
            "eos_token_id": arch.vocab_size.saturating_sub(1),
            "pad_token_id": 1,
        },
        "vision_config": {
            "model_type": "clip_vision_model",
            "hidden_size": width,
            "intermediate_size": width.saturating_mul(4),
            "num_hidden_layers": layers,
            "num_attention_heads": width / crate::arch::HEAD_WIDTH,
            "num_channels": 3,
            "image_size": arch.image_resolution,
            "patch_size": patch_size,
            "projection_dim": arch.embed_dim,
            "hidden_act": hidden_act,
            "layer_norm_eps": 1e-5,
            "attention_dropout": 0.0,
            "initializer_factor": 1.0,
            "initializer_range": 0.02,
        },
    }))
}

/// `preprocessor_config.json`.
pub(super) fn preprocess_json(preprocess: &Preprocess) -> Value {
    let side = preprocess.resolution;
    json!({
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": true,
        "size": {"shortest_edge": side},
        "resample": 3,
        "do_center_crop": true,
        "crop_size": {"height": side, "width": side},
        "do_convert_rgb": true,
        "do_rescale": true,
        "rescale_factor": 1.0 / 255.0,
        "do_normalize": true,
        "image_mean": decimals(preprocess.mean),
        "image_std": decimals(preprocess.std),
    })
}
