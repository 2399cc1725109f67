//! Tests of reading and writing whole checkpoints; `robust` feeds damaged ones.

mod robust;
mod writers;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use serde_json::{Value, json};

use super::*;
use crate::{Activation, Error, VisionArch};
use writers::Pickle;

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../../fixtures/parity")
        .join(name)
}

fn hash(path: &Path) -> String {
    weights_hash(&Checkpoint::open(path).unwrap().tensors).unwrap()
}

fn put(path: &Path, content: &[u8]) {
    crate::files::write_atomically(path, |to| to.write_all(content)).unwrap();
}

/// The smallest ViT that has every kind of tensor.
fn vit() -> Arch {
    Arch {
        embed_dim: 8,
        image_resolution: 8,
        vision: VisionArch::Vit {
            layers: 1,
            width: 64,
            patch_size: 4,
        },
        context_length: 6,
        vocab_size: 10,
        text_width: 64,
        text_layers: 1,
        activation: Activation::QuickGelu,
    }
}

fn resnet() -> Arch {
    Arch {
        image_resolution: 32,
        vision: VisionArch::ResNet {
            layers: [1, 2, 1, 1],
            width: 2,
        },
        ..vit()
    }
}

#[test]
fn every_layout_of_a_model_holds_the_same_weights() {
    for (model, layouts) in [
        (
            "micro-vit",
            &["openai.pt", "state_dict.pth", "open_clip", "hf"][..],
        ),
        ("micro-rn", &["openai.pt", "state_dict.pth", "open_clip"]),
    ] {
        let all: Vec<_> = layouts
            .iter()
            .map(|l| Checkpoint::open(&fixture(&format!("clip/{model}/{l}"))).unwrap())
            .collect();
        let first = &all[0];
        for other in &all {
            assert_eq!(other.arch, first.arch, "{}", other.path.display());
            assert_eq!(other.preprocess, first.preprocess);
            assert_eq!(
                weights_hash(&other.tensors).unwrap(),
                weights_hash(&first.tensors).unwrap(),
                "{}",
                other.path.display()
            );
        }
        // Types stay as they are stored: OpenAI keeps norms and embeddings in f32.
        assert_eq!(first.tensors["ln_final.weight"].dtype(), DType::F32);
        assert_eq!(first.tensors["text_projection"].dtype(), DType::F16);
        assert_eq!(all[2].tensors["ln_final.weight"].dtype(), DType::F16);
        let scale = first.tensors["logit_scale"].to_scalar::<f32>().unwrap();
        assert_eq!(f64::from(scale), 4.605_468_75);
    }
}

#[test]
fn sizes_are_those_of_the_list_of_models() {
    let models: Value =
        serde_json::from_slice(&std::fs::read(fixture("clip/models.json")).unwrap()).unwrap();
    for (name, sizes) in models["models"].as_object().unwrap() {
        let arch = Checkpoint::open(&fixture(&format!("clip/{name}/openai.pt")))
            .unwrap()
            .arch;
        let (layers, width, patch) = match arch.vision {
            VisionArch::Vit {
                layers,
                width,
                patch_size,
            } => (json!(layers), width, json!(patch_size)),
            VisionArch::ResNet { layers, width } => (json!(layers), width, Value::Null),
        };
        let found = json!({
            "embed_dim": arch.embed_dim, "image_resolution": arch.image_resolution, "vision_layers": layers,
            "vision_width": width, "vision_patch_size": patch, "context_length": arch.context_length,
            "vocab_size": arch.vocab_size, "transformer_width": arch.text_width,
            "transformer_heads": arch.text_heads(), "transformer_layers": arch.text_layers,
        });
        assert_eq!(&found, sizes, "{name}");
        assert_eq!(arch.activation, Activation::QuickGelu);
    }
}

#[test]
fn files_inside_a_folder_open_like_the_folder() {
    let vit = hash(&fixture("clip/micro-vit/openai.pt"));
    assert_eq!(hash(&fixture("clip/micro-vit/hf/model.safetensors")), vit);
    assert_eq!(
        hash(&fixture(
            "clip/micro-vit/open_clip/open_clip_model.safetensors"
        )),
        vit
    );
}

#[test]
fn what_is_saved_opens_as_it_was() {
    let dir = tempfile::tempdir().unwrap();
    for (i, mut arch) in [vit(), resnet()].into_iter().enumerate() {
        arch.activation = if i == 0 {
            Activation::Gelu
        } else {
            Activation::QuickGelu
        };
        let mut checkpoint = random(&arch, 7).unwrap();
        checkpoint.preprocess.mean = [0.5, 0.4, 0.3];
        checkpoint.preprocess.std = [0.2, 0.25, 0.3];
        for layout in [Layout::Hf, Layout::OpenClip, Layout::Safetensors] {
            let out = dir.path().join(format!("{i}-{layout:?}"));
            if layout == Layout::Hf && i == 1 {
                let error = checkpoint.save(layout, None, &out).unwrap_err().to_string();
                assert!(error.contains("a ResNet"), "{error}");
                continue;
            }
            checkpoint.save(layout, None, &out).unwrap();
            let again = Checkpoint::open(&out).unwrap();
            assert_eq!(
                (&again.arch, &again.preprocess),
                (&arch, &checkpoint.preprocess)
            );
            assert_eq!(
                weights_hash(&again.tensors).unwrap(),
                weights_hash(&checkpoint.tensors).unwrap()
            );

            let out = dir.path().join(format!("{i}-{layout:?}-half"));
            checkpoint.save(layout, Some(DType::F16), &out).unwrap();
            let half = Checkpoint::open(&out).unwrap();
            for (name, tensor) in &half.tensors {
                let expected: Vec<half::f16> = checkpoint.tensors[name]
                    .to_dtype(DType::F16)
                    .unwrap()
                    .flatten_all()
                    .unwrap()
                    .to_vec1()
                    .unwrap();
                assert_eq!(
                    tensor
                        .flatten_all()
                        .unwrap()
                        .to_vec1::<half::f16>()
                        .unwrap(),
                    expected,
                    "{name}"
                );
            }
        }
    }
    // Nothing but the results is left.
    assert!(
        std::fs::read_dir(dir.path()).unwrap().all(|e| !e
            .unwrap()
            .file_name()
            .to_string_lossy()
            .starts_with('.'))
    );
}

#[test]
fn an_existing_folder_is_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    put(&dir.path().join("a.txt"), b"mine");
    let checkpoint = random(&vit(), 0).unwrap();
    let error = checkpoint
        .save(Layout::OpenClip, None, dir.path())
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("exists and is not an empty folder"),
        "{error}"
    );
    let empty = dir.path().join("empty");
    std::fs::create_dir(&empty).unwrap();
    checkpoint.save(Layout::OpenClip, None, &empty).unwrap();
    Checkpoint::open(&empty).unwrap();
}

#[test]
fn a_value_beyond_half_precision_is_not_saved_as_half() {
    let mut checkpoint = random(&vit(), 0).unwrap();
    checkpoint.tensors.insert(
        "visual.class_embedding".into(),
        Tensor::full(1e6f32, 64, &Device::Cpu).unwrap(),
    );
    let out = tempfile::tempdir().unwrap();
    let error = checkpoint
        .save(Layout::Safetensors, Some(DType::F16), &out.path().join("x"))
        .unwrap_err();
    assert!(matches!(error, Error::NotFinite { .. }), "{error}");
}

#[test]
fn every_form_of_torch_save_is_read() {
    let dir = tempfile::tempdir().unwrap();
    for arch in [vit(), resnet()] {
        let mut checkpoint = random(&arch, 3).unwrap();
        let half = checkpoint.tensors["text_projection"]
            .to_dtype(DType::BF16)
            .unwrap();
        checkpoint.tensors.insert("text_projection".into(), half);
        let tensors = &checkpoint.tensors;
        let expected = weights_hash(tensors).unwrap();
        let plain = Pickle::new().state_dict(tensors, "", false).stop();
        let nested = Pickle::new()
            .raw(b"}(")
            .text("epoch")
            .int(4)
            .text("state_dict")
            .state_dict(tensors, "module.", false)
            .raw(b"u");
        for (name, content) in [
            ("plain", writers::zip_of(&plain, tensors, false)),
            ("deflated", writers::zip_of(&plain, tensors, true)),
            ("nested", writers::zip_of(&nested.stop(), tensors, false)),
            (
                "script",
                writers::zip_of(&Pickle::new().modules(tensors).stop(), tensors, false),
            ),
            ("legacy", writers::legacy(tensors)),
        ] {
            // No extension: the content decides.
            let path = dir.path().join(name);
            put(&path, &content);
            assert_eq!(hash(&path), expected, "{name}");
        }
        assert_eq!(
            read_torch_state(&dir.path().join("nested")).unwrap().epoch,
            Some(4)
        );
    }
}

#[test]
fn a_folder_of_dassl_is_its_newest_file_or_its_parts() {
    let keys = |path: &Path| -> Vec<String> {
        let state = read_torch_state(path).unwrap();
        assert_eq!(state.epoch, Some(5));
        state.tensors.into_keys().collect()
    };
    let run = fixture("coop/checkpoint-dassl");
    let part = run.join("prompt_learner");
    assert_eq!(keys(&part), ["ctx", "token_prefix", "token_suffix"]);
    let whole = keys(&run);
    assert_eq!(whole[0], "prompt_learner.ctx");
    assert_eq!(whole.len(), 3);
    // Two parts, and what does not fit together.
    let dir = tempfile::tempdir().unwrap();
    let refused = |expected: &str| {
        let message = read_torch_state(dir.path()).unwrap_err().to_string();
        assert!(message.contains(expected), "{message}");
    };
    refused("name the file itself");
    let file = std::fs::read(part.join("model.pth.tar-5")).unwrap();
    for name in ["a.b", "c"] {
        std::fs::create_dir(dir.path().join(name)).unwrap();
        put(&dir.path().join(name).join("model.pth.tar-5"), &file);
        put(
            &dir.path().join(name).join("checkpoint"),
            b"model.pth.tar-5\n",
        );
    }
    let both = keys(dir.path());
    assert_eq!((both.len(), both[0].as_str()), (6, "a.b.ctx"));
    put(&dir.path().join("c/checkpoint"), b"model.pth.tar-6");
    refused("model.pth.tar-6");
    put(&dir.path().join("c/checkpoint"), b"/");
    refused("names no file");
}

#[test]
fn the_tensors_of_a_dassl_checkpoint() {
    let state = read_torch_state(&fixture(
        "coop/checkpoint-dassl/prompt_learner/model.pth.tar-5",
    ))
    .unwrap();
    assert_eq!(state.epoch, Some(5));
    assert_eq!(
        state.tensors.keys().collect::<Vec<_>>(),
        ["ctx", "token_prefix", "token_suffix"]
    );
    let expected = candle_core::safetensors::load(
        fixture("coop/checkpoint-dassl/case.safetensors"),
        &Device::Cpu,
    )
    .unwrap();
    for (name, tensor) in &state.tensors {
        let expected = &expected[&format!("expect.state.{name}")];
        assert_eq!(tensor.dims(), expected.dims());
        let values = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert_eq!(values(tensor), values(expected), "{name}");
    }
}

/// What opening gives for a checkpoint of which something was changed.
fn refusal(change: impl FnOnce(&mut Checkpoint)) -> String {
    let mut checkpoint = random(&vit(), 1).unwrap();
    change(&mut checkpoint);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("w.safetensors");
    checkpoint.save(Layout::Safetensors, None, &path).unwrap();
    let error = Checkpoint::open(&path).unwrap_err().to_string();
    assert!(error.contains("w.safetensors"), "{error}");
    error
}

#[test]
fn tensors_that_do_not_fit_are_named() {
    let full = |value: f32, shape: &[usize]| Tensor::full(value, shape, &Device::Cpu).unwrap();
    let error = refusal(|c| drop(c.tensors.remove("visual.ln_post.bias")));
    assert!(
        error.ends_with("tensor `visual.ln_post.bias` is missing"),
        "{error}"
    );
    let error = refusal(|c| drop(c.tensors.insert("visual.proj".into(), full(0.0, &[64, 9]))));
    assert!(
        error.contains("tensor `visual.proj`")
            && error.ends_with("has shape [64, 9], expected [64, 8]"),
        "{error}"
    );
    let error = refusal(|c| drop(c.tensors.insert("text_bias".into(), full(0.0, &[1]))));
    assert!(
        error.contains("`text_bias` is not part of a CLIP"),
        "{error}"
    );
    let error = refusal(|c| drop(c.tensors.insert("logit_scale".into(), full(f32::NAN, &[]))));
    assert!(
        error.contains("tensor `logit_scale`") && error.contains("NaN"),
        "{error}"
    );
    let counts = Tensor::new(&[[1i64, 2]], &Device::Cpu).unwrap();
    let error = refusal(|c| drop(c.tensors.insert("vocab_size".into(), counts)));
    assert!(
        error.ends_with("`vocab_size` is 1, but the tensors have 10"),
        "{error}"
    );
    let error = refusal(|c| {
        drop(c.tensors.insert(
            "logit_scale".into(),
            Tensor::new(1i64, &Device::Cpu).unwrap(),
        ))
    });
    assert!(error.contains("`logit_scale` is stored as I64"), "{error}");
}

/// Saves a folder, changes its config and opens it.
fn with_config(layout: Layout, file: &str, pointer: &str, value: Value) -> Result<Checkpoint> {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("model");
    random(&vit(), 1).unwrap().save(layout, None, &out).unwrap();
    let path = out.join(file);
    let mut config: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    let (parent, key) = pointer.rsplit_once('/').unwrap();
    config.pointer_mut(parent).unwrap()[key] = value;
    put(&path, config.to_string().as_bytes());
    Checkpoint::open(&out)
}

#[test]
fn a_config_that_contradicts_the_tensors_is_an_error() {
    for (pointer, value) in [
        ("/projection_dim", json!(9)),
        ("/text_config/hidden_size", json!(128)),
        ("/text_config/num_attention_heads", json!(2)),
        ("/text_config/layer_norm_eps", json!(1e-6)),
        ("/text_config/hidden_act", json!("gelu")),
        ("/vision_config/hidden_act", json!("relu")),
        ("/vision_config/patch_size", json!(8)),
        ("/vision_config/image_size", json!("8")),
        ("/vision_config/num_hidden_layers", json!(null)),
        ("/model_type", json!("siglip")),
        ("/vision_config_dict", json!({"num_hidden_layers": 3})),
    ] {
        let error = with_config(Layout::Hf, "config.json", pointer, value)
            .unwrap_err()
            .to_string();
        assert!(error.contains("config.json: "), "{error}");
    }
    for (pointer, value) in [
        ("/model_cfg/embed_dim", json!(null)),
        ("/model_cfg/quick_gelu", json!("yes")),
        ("/model_cfg/custom_text", json!(true)),
        ("/model_cfg/vision_cfg/timm_model_name", json!("vit")),
        ("/model_cfg/vision_cfg/pool_type", json!("avg")),
        ("/model_cfg/vision_cfg/head_width", json!(80)),
        ("/model_cfg/vision_cfg/layers", json!([1, 1, 1, 1])),
        ("/model_cfg/text_cfg/hf_model_name", json!("roberta-base")),
        ("/model_cfg/text_cfg/no_causal_mask", json!(true)),
        ("/model_cfg/text_cfg/norm_kwargs", json!({"eps": 1e-6})),
        ("/model_cfg/text_cfg/heads", json!(8)),
        ("/model_cfg/text_cfg/vocab_size", json!(49408)),
        ("/preprocess_cfg/resize_mode", json!("squash")),
        ("/preprocess_cfg/mean", json!([0.5])),
        ("/preprocess_cfg/std", json!([0.5, 0.0, 0.5])),
        ("/preprocess_cfg/size", json!(224)),
    ] {
        let error = with_config(Layout::OpenClip, "open_clip_config.json", pointer, value)
            .unwrap_err()
            .to_string();
        assert!(error.contains("open_clip_config.json: "), "{error}");
    }
    let error = with_config(
        Layout::Hf,
        "config.json",
        "/text_config/hidden_size",
        json!(512),
    )
    .unwrap_err()
    .to_string();
    assert!(
        error.ends_with("config.json: text_config.hidden_size is 512, but the tensors have 64"),
        "{error}"
    );
}

#[test]
fn settings_that_change_nothing_are_taken() {
    for (pointer, value) in [
        ("/model_cfg/custom_text", json!(false)),
        ("/model_cfg/vision_cfg/mlp_ratio", json!(4)),
        ("/model_cfg/vision_cfg/head_width", json!(64)),
        ("/model_cfg/vision_cfg/timm_model_name", json!(null)),
        ("/model_cfg/text_cfg/pool_type", json!("argmax")),
        ("/model_cfg/text_cfg/norm_kwargs", json!({})),
        ("/preprocess_cfg/size", json!([8, 8])),
    ] {
        with_config(Layout::OpenClip, "open_clip_config.json", pointer, value).unwrap();
    }
    // OpenCLIP's default is the exact GELU.
    let gelu = with_config(
        Layout::OpenClip,
        "open_clip_config.json",
        "/model_cfg/quick_gelu",
        json!(null),
    )
    .unwrap();
    assert_eq!(gelu.arch.activation, Activation::Gelu);
}

#[test]
fn random_weights_are_those_of_the_seed() {
    let weights = |seed| weights_hash(&random(&vit(), seed).unwrap().tensors).unwrap();
    assert_eq!(weights(1), weights(1));
    assert_ne!(weights(1), weights(2));
    let tensors = random(
        &Arch {
            vocab_size: 1000,
            ..vit()
        },
        1,
    )
    .unwrap()
    .tensors;
    let spread = |name: &str| {
        let t = tensors[name].flatten_all().unwrap();
        t.sqr()
            .unwrap()
            .mean_all()
            .unwrap()
            .to_scalar::<f32>()
            .unwrap()
            .sqrt()
    };
    for (name, std) in [
        ("token_embedding.weight", 0.02),
        ("transformer.resblocks.0.attn.in_proj_weight", 0.125),
        (
            "transformer.resblocks.0.mlp.c_proj.weight",
            0.125 / 2f32.sqrt(),
        ),
        (
            "visual.transformer.resblocks.0.mlp.c_fc.weight",
            0.125 / 2f32.sqrt(),
        ),
        ("visual.conv1.weight", 48f32.powf(-0.5)),
        ("visual.ln_pre.weight", 1.0),
        ("ln_final.bias", 0.0),
    ] {
        assert!(
            (spread(name) - std).abs() <= 0.05 * std,
            "{name}: {} instead of {std}",
            spread(name)
        );
    }
}
