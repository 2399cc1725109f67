//! What a training needs to go on after it was stopped, and its curve as a table.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use anyhow::{Context, Result, bail};
use candle_core::{Device, Tensor};
use cliptune_core::files::write_atomically;
use serde::{Deserialize, Serialize};

use super::{Point, Settings, Training};

#[derive(Serialize, Deserialize)]
struct Header {
    settings: Settings,
    step: usize,
    seconds: f64,
    curve: Vec<Point>,
}

const HEADER: &str = "pretrain";

impl Training {
    /// Replaces the state file.
    pub(super) fn save(&self, path: &Path) -> Result<()> {
        let header = Header {
            settings: self.settings.clone(),
            step: self.step,
            seconds: self.seconds,
            curve: self.curve.clone(),
        };
        let mut tensors: BTreeMap<String, Tensor> = BTreeMap::new();
        for (name, tensor) in self.learner.params.tensors()? {
            tensors.insert(format!("params/{name}"), tensor);
        }
        for (i, (params, optimizer)) in self.groups.iter().enumerate() {
            for (name, tensor) in optimizer.tensors(params)? {
                tensors.insert(format!("optimizer{i}/{name}"), tensor);
            }
        }
        let metadata = HashMap::from([(HEADER.to_owned(), serde_json::to_string(&header)?)]);
        let bytes = safetensors::serialize(&tensors, Some(metadata))?;
        write_atomically(path, |file| file.write_all(&bytes))?;
        Ok(())
    }

    /// Goes on where the state file ends.
    pub(super) fn resume(&mut self, path: &Path) -> Result<()> {
        let named = || path.display().to_string();
        let bytes = std::fs::read(path).with_context(named)?;
        let (_, metadata) = safetensors::SafeTensors::read_metadata(&bytes)
            .with_context(|| format!("{}: not a state of this command", path.display()))?;
        let header = metadata.metadata().as_ref().and_then(|m| m.get(HEADER));
        let header = header.with_context(|| format!("{}: no header", path.display()))?;
        let header: Header = serde_json::from_str(header).with_context(named)?;
        if header.settings != self.settings {
            bail!(
                "{} belongs to another training ({:?} instead of {:?}); --fresh throws it away",
                path.display(),
                header.settings,
                self.settings
            );
        }
        let tensors = candle_core::safetensors::load_buffer(&bytes, &Device::Cpu)?;
        let part = |prefix: &str| -> BTreeMap<String, Tensor> {
            let own = tensors.iter();
            let own = own.filter_map(|(name, t)| Some((name.strip_prefix(prefix)?, t)));
            own.map(|(name, t)| (name.to_owned(), t.clone())).collect()
        };
        self.learner.params.load(&part("params/"))?;
        for (i, (params, optimizer)) in self.groups.iter_mut().enumerate() {
            optimizer.load(params, &part(&format!("optimizer{i}/")))?;
        }
        self.step = header.step;
        self.seconds = header.seconds;
        self.curve = header.curve;
        Ok(())
    }

    /// The training curve as CSV.
    pub(super) fn write_curve(&self, path: &Path) -> Result<()> {
        let mut text = String::from("step,loss,contrastive,patches,scale");
        if let Some(point) = self.curve.first() {
            point
                .zero_shot
                .iter()
                .for_each(|(task, _)| text.push_str(&format!(",{task}")));
        }
        text.push_str(",seconds\n");
        for p in &self.curve {
            text.push_str(&format!(
                "{},{:.4},{:.4},{:.4},{:.2}",
                p.step, p.loss, p.contrastive, p.named, p.scale
            ));
            p.zero_shot
                .iter()
                .for_each(|(_, accuracy)| text.push_str(&format!(",{accuracy:.2}")));
            text.push_str(&format!(",{:.0}\n", p.seconds));
        }
        write_atomically(path, |file| file.write_all(text.as_bytes()))?;
        Ok(())
    }
}
