//! OpenCLIP's `open_clip_config.json`; its tensors have OpenAI's names.

use std::path::Path;

use serde_json::{Value, json};

use super::config::{Config, decimals};
use crate::arch::HEAD_WIDTH;
use crate::{Activation, Arch, Error, Preprocess, Result, VisionArch};

/// What the towers here compute, setting by setting: the only value that a key may have.
const FIXED: [(&str, &str); 22] = [
    ("/model_cfg/custom_text", "false"),
    ("/model_cfg/vision_cfg/head_width", "64"),
    ("/model_cfg/vision_cfg/mlp_ratio", "4.0"),
    ("/model_cfg/vision_cfg/attentional_pool", "false"),
    ("/model_cfg/vision_cfg/no_ln_pre", "false"),
    ("/model_cfg/vision_cfg/pos_embed_type", "\"learnable\""),
    ("/model_cfg/vision_cfg/final_ln_after_pool", "false"),
    ("/model_cfg/vision_cfg/pool_type", "\"tok\""),
    ("/model_cfg/vision_cfg/output_tokens", "false"),
    ("/model_cfg/vision_cfg/act_kwargs", "{}"),
    ("/model_cfg/vision_cfg/norm_kwargs", "{}"),
    ("/model_cfg/text_cfg/mlp_ratio", "4.0"),
    ("/model_cfg/text_cfg/embed_cls", "false"),
    ("/model_cfg/text_cfg/no_causal_mask", "false"),
    ("/model_cfg/text_cfg/final_ln_after_pool", "false"),
    ("/model_cfg/text_cfg/pool_type", "\"argmax\""),
    ("/model_cfg/text_cfg/proj_type", "\"linear\""),
    ("/model_cfg/text_cfg/proj_bias", "false"),
    ("/model_cfg/text_cfg/output_tokens", "false"),
    ("/model_cfg/text_cfg/act_kwargs", "{}"),
    ("/model_cfg/text_cfg/norm_kwargs", "{}"),
    ("/preprocess_cfg/mode", "\"RGB\""),
];

/// Keys that are read below, or that say nothing about the numbers a trained model computes.
const FREE: [&str; 28] = [
    "/model_cfg/embed_dim",
    "/model_cfg/quick_gelu",
    "/model_cfg/init_logit_scale",
    "/model_cfg/cast_dtype",
    "/model_cfg/vision_cfg",
    "/model_cfg/vision_cfg/image_size",
    "/model_cfg/vision_cfg/layers",
    "/model_cfg/vision_cfg/width",
    "/model_cfg/vision_cfg/patch_size",
    "/model_cfg/vision_cfg/patch_dropout",
    "/model_cfg/vision_cfg/attn_pooler_queries",
    "/model_cfg/vision_cfg/attn_pooler_heads",
    "/model_cfg/text_cfg",
    "/model_cfg/text_cfg/context_length",
    "/model_cfg/text_cfg/vocab_size",
    "/model_cfg/text_cfg/width",
    "/model_cfg/text_cfg/heads",
    "/model_cfg/text_cfg/layers",
    "/model_cfg/text_cfg/pad_id",
    "/model_cfg/text_cfg/eos_id",
    "/preprocess_cfg/mean",
    "/preprocess_cfg/std",
    "/preprocess_cfg/size",
    "/preprocess_cfg/interpolation",
    "/preprocess_cfg/resize_mode",
    "/preprocess_cfg/fill_color",
    "/preprocess_cfg/use_timm",
    "/preprocess_cfg/aug_cfg",
];

/// What the file says beyond the sizes, which are read off the tensors.
pub(super) struct OpenClipConfig(Config);

impl OpenClipConfig {
    /// # Errors
    /// Names the first setting that the towers here do not compute.
    pub(super) fn read(path: &Path) -> Result<Self> {
        let config = Config::read(path)?;
        if !config.get("/model_cfg").is_some_and(Value::is_object) {
            return Err(Error::format(path, "expected an object `model_cfg`"));
        }
        for section in [
            "/model_cfg",
            "/model_cfg/vision_cfg",
            "/model_cfg/text_cfg",
            "/preprocess_cfg",
        ] {
            let Some(settings) = config.get(section) else {
                continue;
            };
            let settings = settings
                .as_object()
                .ok_or_else(|| config.wrong(section, settings, "an object"))?;
            for (key, value) in settings {
                known(&config, &format!("{section}/{key}"), value)?;
            }
        }
        Ok(Self(config))
    }

    /// QuickGELU only where the flag says so.
    pub(super) fn activation(&self) -> Result<Activation> {
        match self.0.get("/model_cfg/quick_gelu") {
            None | Some(Value::Bool(false)) => Ok(Activation::Gelu),
            Some(Value::Bool(true)) => Ok(Activation::QuickGelu),
            Some(other) => Err(self
                .0
                .wrong("/model_cfg/quick_gelu", other, "true or false")),
        }
    }

    /// # Errors
    /// The first size that contradicts the tensors.
    pub(super) fn check(&self, arch: &Arch) -> Result<()> {
        let agree = |pointer: &str, default, tensors| self.0.agree(pointer, default, tensors);
        // Without a default the file must say it.
        agree("/model_cfg/embed_dim", 0, arch.embed_dim)?;
        agree(
            "/model_cfg/vision_cfg/image_size",
            224,
            arch.image_resolution,
        )?;
        match arch.vision {
            VisionArch::Vit {
                layers,
                width,
                patch_size,
            } => {
                agree("/model_cfg/vision_cfg/layers", 12, layers)?;
                agree("/model_cfg/vision_cfg/width", 768, width)?;
                agree("/model_cfg/vision_cfg/patch_size", 16, patch_size)?;
            }
            VisionArch::ResNet { layers, width } => {
                let pointer = "/model_cfg/vision_cfg/layers";
                let said = self.0.get(pointer).cloned().unwrap_or(json!(12));
                if said != json!(layers) {
                    let message = format!(
                        "model_cfg.vision_cfg.layers is {said}, but the tensors have {layers:?}"
                    );
                    return Err(Error::format(&self.0.path, message));
                }
                // OpenCLIP's own default is the ViT's.
                agree("/model_cfg/vision_cfg/width", 768, width)?;
            }
        }
        agree(
            "/model_cfg/text_cfg/context_length",
            77,
            arch.context_length,
        )?;
        agree("/model_cfg/text_cfg/vocab_size", 49_408, arch.vocab_size)?;
        agree("/model_cfg/text_cfg/width", 512, arch.text_width)?;
        agree("/model_cfg/text_cfg/layers", 12, arch.text_layers)?;
        let heads = self.0.size("/model_cfg/text_cfg/heads", 8)?;
        if heads != arch.text_heads() {
            let expected = format!(
                "{} (width {} in heads of {HEAD_WIDTH})",
                arch.text_heads(),
                arch.text_width
            );
            return Err(self.0.wrong("/model_cfg/text_cfg/heads", heads, expected));
        }
        Ok(())
    }

    /// Takes the normalisation over.
    ///
    /// # Errors
    /// Resizing other than bicubic to the shorter side, or a size that is not the tower's.
    pub(super) fn preprocess(&self, into: &mut Preprocess) -> Result<()> {
        let is = |pointer: &str, expected: &str| match self.0.get(pointer) {
            Some(v) if v.as_str() != Some(expected) => Err(self.0.wrong(pointer, v, expected)),
            _ => Ok(()),
        };
        is("/preprocess_cfg/interpolation", "bicubic")?;
        is("/preprocess_cfg/resize_mode", "shortest")?;
        let side = into.resolution;
        match self.0.get("/preprocess_cfg/size") {
            Some(v)
                if *v != json!(side)
                    && *v != json!([side, side])
                    && *v != json!([3, side, side]) =>
            {
                return Err(self.0.wrong("/preprocess_cfg/size", v, side));
            }
            _ => {}
        }
        self.0
            .normalisation("/preprocess_cfg/mean", "/preprocess_cfg/std", into)
    }
}

fn known(config: &Config, pointer: &str, value: &Value) -> Result<()> {
    // A setting that is switched off changes nothing, whatever it is.
    if FREE.contains(&pointer) || matches!(value, Value::Null | Value::Bool(false)) {
        return Ok(());
    }
    let Some((_, expected)) = FIXED.iter().find(|(fixed, _)| *fixed == pointer) else {
        return Err(config.wrong(
            pointer,
            value,
            "nothing: it is not one that CLIP's own towers have",
        ));
    };
    let same_number = value.as_f64().is_some_and(|v| expected.parse() == Ok(v));
    let same = same_number
        || serde_json::from_str::<Value>(expected).is_ok_and(|expected| expected == *value);
    match same {
        true => Ok(()),
        false => Err(config.wrong(pointer, value, expected)),
    }
}

/// `open_clip_config.json` for an architecture.
pub(super) fn config_json(arch: &Arch, preprocess: &Preprocess) -> Value {
    let (layers, width, patch_size) = match arch.vision {
        VisionArch::Vit {
            layers,
            width,
            patch_size,
        } => (json!(layers), width, Some(patch_size)),
        VisionArch::ResNet { layers, width } => (json!(layers), width, None),
    };
    json!({
        "model_cfg": {
            "embed_dim": arch.embed_dim,
            "quick_gelu": arch.activation == Activation::QuickGelu,
            "vision_cfg": {"image_size": arch.image_resolution, "layers": layers, "width": width, "patch_size": patch_size},
            "text_cfg": {
                "context_length": arch.context_length,
                "vocab_size": arch.vocab_size,
                "width": arch.text_width,
                "heads": arch.text_heads(),
                "layers": arch.text_layers,
            },
        },
        "preprocess_cfg": {
            "mean": decimals(preprocess.mean),
            "std": decimals(preprocess.std),
            "interpolation": "bicubic",
            "resize_mode": "shortest",
        },
    })
}
