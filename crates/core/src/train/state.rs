//! What a killed run needs to go on, in one file that is replaced as a whole.

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::Tensor;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{EpochRecord, History, Objective, Tally};
use crate::files::write_atomically;
use crate::learned::Learned;
use crate::optim::Optimizer;
use crate::params::Params;
use crate::prompt_file::{read_safetensors, to_safetensors};
use crate::run::Run;
use crate::task::Labelled;
use crate::{Clip, Error, Result};

/// How far a run is.
#[derive(Debug, Default)]
pub(super) struct Saved {
    /// The epoch in hand, from 0.
    pub(super) epoch: usize,
    /// What it has seen so far.
    pub(super) tally: Tally,
    /// The epochs before it.
    pub(super) history: History,
    /// Parameters of the best epoch by validation accuracy.
    pub(super) best: Option<BTreeMap<String, Tensor>>,
}

impl Saved {
    /// Closes the epoch in hand.
    pub(super) fn finish_epoch(
        &mut self,
        lr: f64,
        val_accuracy: Option<f64>,
        params: &Params,
    ) -> Result<()> {
        let best_before = self
            .history
            .epochs
            .iter()
            .filter_map(|e| e.val_accuracy)
            .fold(f64::NEG_INFINITY, f64::max);
        match val_accuracy {
            Some(accuracy) if accuracy > best_before => {
                self.best = Some(params.tensors()?.into_iter().collect());
                self.history.kept = self.epoch + 1;
            }
            Some(_) => {}
            None => self.history.kept = self.epoch + 1,
        }
        let (loss, accuracy) = (self.tally.mean_loss(), self.tally.accuracy());
        self.history.epochs.push(EpochRecord {
            epoch: self.epoch + 1,
            lr,
            loss,
            accuracy,
            val_accuracy,
        });
        self.epoch += 1;
        self.tally = Tally::default();
        Ok(())
    }
}

#[derive(Serialize, Deserialize)]
struct Header {
    identity: String,
    epoch: usize,
    tally: Tally,
    history: History,
}

/// A hash of everything that determines a run's result.
pub(super) fn identity(
    clip: &Clip,
    data: &Labelled,
    settings: &Value,
    run: &Run,
    params: &Params,
) -> Result<String> {
    let mut hasher = blake3::Hasher::new();
    let mut add_bytes = |bytes: &[u8]| {
        hasher.update(&(bytes.len() as u64).to_le_bytes());
        hasher.update(bytes);
    };
    let mut add = |text: &str| add_bytes(text.as_bytes());
    add(env!("CARGO_PKG_VERSION"));
    add(clip.weights_hash());
    add(&settings.to_string());
    add(&run.seed.to_string());
    data.classes.names().iter().for_each(|name| add(name));
    add(&data.train.fingerprint()?);
    if let Some(val) = &data.val {
        add(&val.fingerprint()?);
    }
    for param in params.iter() {
        add(&format!("{} {:?}", param.name(), param.tensor().dims()));
    }
    if run.start.is_some() {
        for param in params.iter() {
            let values = param.value()?.flatten_all()?.to_vec1::<f32>()?;
            let bytes: Vec<u8> = values.into_iter().flat_map(f32::to_le_bytes).collect();
            add_bytes(&bytes);
        }
    }
    Ok(hasher.finalize().to_hex().to_string())
}

pub(super) fn save<O: Objective>(
    path: &Path,
    identity: &str,
    saved: &Saved,
    learned: &Learned<O>,
    optimizer: &Optimizer,
) -> Result<()> {
    let header = Header {
        identity: identity.to_owned(),
        epoch: saved.epoch,
        tally: saved.tally,
        history: saved.history.clone(),
    };
    let header = serde_json::to_string(&header).map_err(|e| Error::format(path, e.to_string()))?;
    let mut tensors = BTreeMap::new();
    let mut add = |group: &str, list: Vec<(String, Tensor)>| {
        tensors.extend(
            list.into_iter()
                .map(|(name, tensor)| (format!("{group}/{name}"), tensor)),
        );
    };
    add("param", learned.params().tensors()?);
    add("optimizer", optimizer.tensors(learned.params())?);
    add("state", learned.state());
    if let Some(best) = &saved.best {
        add("best", best.clone().into_iter().collect());
    }
    let bytes =
        to_safetensors(&tensors, &header).map_err(|e| Error::format(path, e.to_string()))?;
    write_atomically(path, |out| out.write_all(&bytes))
}

/// Restores a run if there is one to restore.
pub(super) fn load<O: Objective>(
    path: &Path,
    identity: &str,
    learned: &mut Learned<O>,
    optimizer: &mut Optimizer,
) -> Result<Option<Saved>> {
    if !path.exists() {
        return Ok(None);
    }
    let advice = "remove it to start over";
    let missing = format!("not a checkpoint of a run; {advice}");
    let (header, tensors) = read_safetensors(path, "cliptune", &missing)?;
    let header: Header = serde_json::from_str(&header)
        .map_err(|e| Error::format(path, format!("not a checkpoint of a run: {e}; {advice}")))?;
    if header.identity != identity {
        let message = format!(
            "holds an unfinished run with other weights, data, settings or seed; finish that one, or {advice}"
        );
        return Err(Error::format(path, message));
    }
    let group = |group: &str| -> BTreeMap<String, Tensor> {
        let prefix = format!("{group}/");
        let named = |(name, tensor): (&String, &Tensor)| {
            Some((name.strip_prefix(&prefix)?.to_owned(), tensor.clone()))
        };
        tensors.iter().filter_map(named).collect()
    };
    learned.params().load(&group("param"))?;
    optimizer.load(learned.params(), &group("optimizer"))?;
    learned.load_state(&group("state"))?;
    let best = group("best");
    let Header {
        epoch,
        tally,
        history,
        ..
    } = header;
    Ok(Some(Saved {
        epoch,
        tally,
        history,
        best: (!best.is_empty()).then_some(best),
    }))
}
