//! A case on disk, and the models that cases name.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::rc::Rc;

use anyhow::{Context, Result, anyhow, bail};
use candle_core::{DType, Device, Tensor};
use cliptune_core::{Classes, Clip};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

/// `case.json`; what a method alone reads stays in `config`.
#[derive(Debug, Default, Deserialize)]
pub(crate) struct CaseJson {
    pub(crate) schema: Option<u64>,
    pub(crate) clip: Option<String>,
    #[serde(default)]
    pub(crate) classnames: Vec<String>,
    #[serde(default)]
    pub(crate) texts: Vec<String>,
    #[serde(default)]
    pub(crate) config: Value,
    pub(crate) optimizer: Option<Value>,
    #[serde(default)]
    pub(crate) lr_per_step: Vec<f64>,
    /// Rates of several optimisers, by what they are called.
    #[serde(default)]
    pub(crate) lr_per_step_groups: BTreeMap<String, Vec<f64>>,
    #[serde(default)]
    pub(crate) params: BTreeMap<String, String>,
}

/// A case: what to build, tensors in, tensors to expect.
#[derive(Debug)]
pub(crate) struct Case {
    pub(crate) path: PathBuf,
    pub(crate) json: CaseJson,
    tensors: BTreeMap<String, Tensor>,
    read: RefCell<BTreeSet<String>>,
}

impl Case {
    pub(crate) fn read(slug: &str, path: &Path) -> Result<Self> {
        // The tokenizer's case has a format of its own, which its runner reads.
        if !path.join("case.json").exists() && path.ends_with("tokenizer") {
            let (json, tensors, read) = Default::default();
            return Ok(Self {
                path: path.to_path_buf(),
                json,
                tensors,
                read,
            });
        }
        let json_path = path.join("case.json");
        let text =
            std::fs::read_to_string(&json_path).with_context(|| json_path.display().to_string())?;
        let value: Value =
            serde_json::from_str(&text).with_context(|| json_path.display().to_string())?;
        if let Some(method) = value.get("method").and_then(Value::as_str)
            && method != slug
            && slug != "clip-cases"
        {
            bail!(
                "{}: method `{method}` in folder `{slug}`",
                json_path.display()
            );
        }
        let json: CaseJson =
            serde_json::from_value(value).with_context(|| json_path.display().to_string())?;
        if json.schema != Some(1) {
            bail!(
                "{}: schema {:?}, this version reads schema 1",
                json_path.display(),
                json.schema
            );
        }
        let tensors = candle_core::safetensors::load(path.join("case.safetensors"), &Device::Cpu)
            .with_context(|| path.join("case.safetensors").display().to_string())?;
        Ok(Self {
            path: path.to_path_buf(),
            json,
            tensors: tensors.into_iter().collect(),
            read: RefCell::default(),
        })
    }

    /// The method's settings.
    pub(crate) fn config<C: DeserializeOwned>(&self) -> Result<C> {
        C::deserialize(&self.json.config).context("config")
    }

    pub(crate) fn classes(&self) -> Result<Classes> {
        Ok(Classes::new(self.json.classnames.clone())?)
    }

    /// A tensor that must be there.
    pub(crate) fn tensor(&self, name: &str) -> Result<&Tensor> {
        self.get(name)
            .ok_or_else(|| anyhow!("the case holds no `{name}`"))
    }

    pub(crate) fn get(&self, name: &str) -> Option<&Tensor> {
        self.read.borrow_mut().insert(name.to_owned());
        self.tensors.get(name)
    }

    /// Rows of integers, such as labels or token ids.
    pub(crate) fn ids(&self, name: &str) -> Result<Vec<u32>> {
        let ids = self.tensor(name)?.to_dtype(DType::U32)?.flatten_all()?;
        Ok(ids.to_vec1()?)
    }

    /// Start values of trained parameters, by the authors' key.
    pub(crate) fn initial(&self) -> Result<BTreeMap<String, Tensor>> {
        let value = |key: &String| Ok((key.clone(), self.tensor(&format!("init.{key}"))?.clone()));
        self.json.params.values().map(value).collect()
    }

    pub(crate) fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    pub(crate) fn was_read(&self, name: &str) -> bool {
        self.read.borrow().contains(name)
    }
}

/// Models below `clip/`, each loaded once.
pub(crate) struct Models {
    root: PathBuf,
    loaded: BTreeMap<String, Rc<Clip>>,
}

impl Models {
    pub(crate) fn new(root: PathBuf) -> Self {
        Self {
            root,
            loaded: BTreeMap::new(),
        }
    }

    pub(crate) fn folder(&self, case: &Case) -> Result<PathBuf> {
        let name = case
            .json
            .clip
            .as_deref()
            .ok_or_else(|| anyhow!("the case names no model"))?;
        Ok(self.root.join(name))
    }

    /// The model that the case names, from OpenAI's layout.
    pub(crate) fn of(&mut self, case: &Case) -> Result<Rc<Clip>> {
        let path = self.folder(case)?.join("openai.pt");
        let name = case.json.clip.clone().unwrap_or_default();
        if let Some(clip) = self.loaded.get(&name) {
            return Ok(clip.clone());
        }
        let clip = Rc::new(Clip::load(path)?);
        self.loaded.insert(name, clip.clone());
        Ok(clip)
    }
}
