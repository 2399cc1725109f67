//! Cases of MVLPT.

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use candle_core::Tensor;
use cliptune_core::checkpoint::TorchState;
use cliptune_core::method::{Classifier, Predictor};
use cliptune_core::prompt::{ClassTokenPosition, ClassTokens};
use cliptune_core::task::ImageBatch;
use cliptune_core::tasks::Tasks;
use cliptune_core::templates::DEFAULT;
use cliptune_core::train::{Batch, Loss, Objective, Step};
use cliptune_core::{Classes, Clip, ImageNeeds, Learned, ops, params};
use cliptune_multimodal_pt::mvlpt::{ProjectMethod, TaskMask, Variant};
use cliptune_multimodal_pt::{Interaction, Mvlpt, MvlptConfig};
use serde::Deserialize;
use serde_json::json;

use super::case::{Case, Models};
use super::check::{AFTER, Check, START};
use super::objective;
use super::text_pt::{compare_start, padded, words};

#[derive(Deserialize)]
struct Json {
    variant: Variant,
    coop_n_ctx: usize,
    coop_ctx_init: String,
    csc: bool,
    class_token_position: ClassTokenPosition,
    vpt_n_ctx: usize,
    vpt_deep: bool,
    vpt_project: i64,
    vpt_dropout: f64,
    cocoop_n_ctx: usize,
    project_method: ProjectMethod,
    project_dim: usize,
    interaction: Interaction,
    cut_contextlen: bool,
    context_length: usize,
    #[serde(default)]
    tasks: Tasks,
    task_mask: TaskMask,
    source_classnames: Option<Vec<String>>,
}

impl Json {
    /// Words of the text context, if it starts from some.
    fn words(&self) -> Option<&str> {
        Some(self.coop_ctx_init.as_str()).filter(|words| !words.is_empty())
    }

    fn config(&self) -> MvlptConfig {
        let has_context = matches!(self.variant, Variant::Coop | Variant::Upt);
        let sees = matches!(self.variant, Variant::Vpt | Variant::Upt);
        let words = self.words().filter(|_| has_context);
        MvlptConfig {
            variant: self.variant,
            n_ctx: match self.variant {
                // Words count themselves.
                Variant::Coop | Variant::Upt => words.is_none().then_some(self.coop_n_ctx),
                Variant::Cocoop => Some(self.cocoop_n_ctx),
                Variant::Vpt => None,
            },
            ctx_init: words.map(str::to_owned),
            // The authors' code drops it where words are given.
            class_specific: self.csc && has_context && words.is_none(),
            class_token_position: self.class_token_position,
            n_ctx_vision: sees.then_some(self.vpt_n_ctx),
            vpt_deep: self.vpt_deep,
            vpt_project: usize::try_from(self.vpt_project).ok().filter(|_| sees),
            vpt_dropout: self.vpt_dropout,
            project_method: self.project_method,
            project_dim: self.project_dim,
            interaction: self.interaction,
            tasks: self.tasks.clone(),
            task_mask: self.task_mask,
            ..MvlptConfig::default()
        }
    }
}

/// The method with the case's targets and tasks in the place of labels.
#[derive(Debug)]
struct Targeted<'a> {
    mvlpt: &'a Mvlpt,
    /// `(batch, n_cls)`; labels without them.
    targets: Option<Tensor>,
    tasks: Vec<usize>,
}

impl Objective for Targeted<'_> {
    fn needs(&self) -> ImageNeeds {
        self.mvlpt.needs()
    }

    fn classifier<'a>(
        &'a self,
        clip: &'a Clip,
        classes: &Classes,
    ) -> cliptune_core::Result<Box<dyn Classifier + 'a>> {
        self.mvlpt.classifier(clip, classes)
    }

    fn loss(&self, clip: &Clip, batch: &Batch<'_>, step: Step) -> cliptune_core::Result<Loss> {
        let Some(targets) = &self.targets else {
            return self.mvlpt.loss(clip, batch, step);
        };
        let targets = (targets, self.tasks.as_slice());
        self.mvlpt
            .loss_of_targets(clip, batch.images, batch.classes, targets, step)
    }
}

pub(crate) fn run(case: &Case, models: &mut Models, check: &mut Check) -> Result<()> {
    let clip = models.of(case)?;
    let json: Json = case.config()?;
    let config = json.config();
    let classes = case.classes()?;
    let tokens = ClassTokens::new(clip.text(), &classes)?;
    compare_tokens(case, &clip, &tokens, &json, check)?;
    let fresh = Learned::<Mvlpt>::new(&config, &clip, &classes, 0)?;
    if config.ctx_init.is_some() {
        compare_start(case, fresh.params(), "ctx", check)?;
    }
    // The authors' checkpoint says what it holds.
    let state = TorchState {
        tensors: case.initial()?,
        epoch: None,
    };
    let given = json!({
        "class_token_position": json.class_token_position, "interaction": json.interaction,
        "tasks": json.tasks, "task_mask": json.task_mask, "project_dim": json.project_dim,
        "vpt_dropout": json.vpt_dropout,
    });
    let (told, mvlpt) = Learned::<Mvlpt>::import(&state, &given, &clip, &classes)?;
    compare_shapes(&mvlpt, &fresh, &told, check);
    compare_mean(case, &json, &config, &clip, check)?;

    let pixels = case.tensor("images")?;
    let images = ImageBatch::encode(&clip, pixels, mvlpt.needs())?;
    let prompts = mvlpt.prompts()?;
    if let (Variant::Upt, Some(text), Some(visual)) = (json.variant, &prompts.text, &prompts.visual)
    {
        check.tensor(case, "expect.coupled_ctx", text, START)?;
        let (first, others) = (visual.narrow(0, 0, 1)?, visual.dim(0)? - 1);
        check.tensor(case, "expect.coupled_vpt", &first, START)?;
        if others > 0 {
            let deeper = visual.narrow(0, 1, others)?;
            check.tensor(case, "expect.coupled_vpt_deep", &deeper, START)?;
        }
    }
    let image_features = mvlpt.image_features(&clip, &images, &prompts, None)?;
    check.tensor(case, "expect.image_features", &image_features, START)?;
    let text = match (mvlpt.conditional(), json.variant) {
        (Some(conditional), _) => {
            let unit = ops::unit_length(&image_features, "an image feature")?;
            let contexts = conditional.contexts(&unit)?;
            conditional
                .context
                .text_features_under(&contexts, &clip, &tokens)?
        }
        // The method keeps them at unit length.
        (None, Variant::Vpt) => clip
            .text()
            .encode(&cliptune_core::prompt::Prompts::of_tokens(
                tokens.fill(DEFAULT)?,
            ))?,
        (None, _) => mvlpt.text_features(&clip, &tokens, &prompts)?,
    };
    check.tensor(case, "expect.text_features", &text, START)?;

    let tasks = match case.get("input.tasks") {
        Some(_) => case.ids("input.tasks")?,
        None => Vec::new(),
    };
    let tasks: Vec<usize> = tasks.into_iter().map(|task| task as usize).collect();
    let logits = || -> Result<Tensor> {
        let logits = mvlpt.classifier(&clip, &classes)?.logits(&images)?;
        Ok(mvlpt.masked(&logits, &tasks)?)
    };
    check.tensor(case, "expect.logits", &logits()?, START)?;
    let labels = case.tensor("labels")?;
    let (targets, labels) = match labels.rank() {
        1 => (None, case.ids("labels")?),
        _ => (Some(labels.clone()), vec![0; images.len()]),
    };
    if targets.is_none() && !tasks.is_empty() {
        let found = json.tasks.of_labels(&labels)?;
        let failure = (found != tasks).then(|| format!("our tasks are {found:?}"));
        check.record("input.tasks", 0.0, failure);
    }
    let targeted = Targeted {
        mvlpt: &mvlpt,
        targets,
        tasks: tasks.clone(),
    };
    let batch = Batch {
        images: &images,
        labels: &labels,
        classes: &tokens,
    };
    let mut learned = Learned::of(targeted, mvlpt.params().clone());
    objective::train(case, &clip, &mut learned, &batch, check)?;
    check.tensor(case, "expect.logits_after", &logits()?, AFTER)
}

/// Compares our tokens with the case's, as long as its longest sentence where it is cut to that, and the embeddings around the
/// context with the authors' buffers.
fn compare_tokens(
    case: &Case,
    clip: &Clip,
    classes: &ClassTokens,
    json: &Json,
    check: &mut Check,
) -> Result<()> {
    let n_ctx = match json.variant {
        Variant::Cocoop => json.cocoop_n_ctx,
        Variant::Vpt => 0,
        _ => json.coop_n_ctx,
    };
    let words = match json.variant {
        Variant::Vpt => "a photo of a".to_owned(),
        Variant::Cocoop => words("", n_ctx),
        _ => words(&json.coop_ctx_init, n_ctx),
    };
    let sentences = classes.sentences(&words)?;
    let longest = sentences.iter().map(Vec::len).max().unwrap_or(0);
    let length = match json.cut_contextlen {
        true => longest,
        false => clip.text().context_length(),
    };
    let failure = (length != json.context_length).then(|| format!("ours is {length}"));
    check.record("config.context_length", 0.0, failure);
    let ids = padded(&sentences, length)?;
    check.tensor(case, "input.tokenized_prompts", &ids, 0.0)?;
    let flat = ids.flatten_all()?.to_dtype(candle_core::DType::U32)?;
    let width = clip.text().width();
    let embedded =
        clip.text()
            .embed(&flat.to_vec1::<u32>()?)?
            .reshape((classes.len(), length, width))?;
    let prefix = embedded.narrow(1, 0, 1)?;
    check.tensor(case, "init.token_prefix", &prefix, 0.0)?;
    let suffix = embedded.narrow(1, 1 + n_ctx, length - 1 - n_ctx)?;
    check.tensor(case, "init.token_suffix", &suffix, 0.0)
}

/// What the checkpoint told gives the tensors that the settings give.
fn compare_shapes(
    imported: &Learned<Mvlpt>,
    fresh: &Learned<Mvlpt>,
    told: &MvlptConfig,
    check: &mut Check,
) {
    let shapes = |learned: &Learned<Mvlpt>| -> BTreeMap<String, Vec<usize>> {
        let params = learned.params().iter();
        params
            .map(|p| (p.name().to_owned(), p.tensor().dims().to_vec()))
            .collect()
    };
    let failure = (shapes(imported) != shapes(fresh)).then(|| format!("read as {told:?}"));
    check.record("config", 0.0, failure);
}

/// The mean of source checkpoints, which is where the case starts.
fn compare_mean(
    case: &Case,
    json: &Json,
    config: &MvlptConfig,
    clip: &Clip,
    check: &mut Check,
) -> Result<()> {
    let Some(names) = &json.source_classnames else {
        return Ok(());
    };
    let sources = Classes::new(names.clone())?;
    let width = clip.text().width();
    let runs = (1..=3)
        .map(|seed| {
            let run = case.json.params.values().map(|key| {
                let tensor = case.tensor(&format!("input.seed{seed}.{key}"))?;
                Ok((key.clone(), tensor.clone()))
            });
            let mut run: BTreeMap<String, Tensor> = run.collect::<Result<_>>()?;
            // Checkpoints hold the buffers of the source's classes, too.
            let buffer = Tensor::zeros(
                (sources.len(), 1, width),
                candle_core::DType::F32,
                &candle_core::Device::Cpu,
            )?;
            run.insert("token_prefix".into(), buffer);
            Ok(run)
        })
        .collect::<Result<Vec<_>>>()?;
    let mean = params::mean(&runs.iter().collect::<Vec<_>>())?;
    for (key, tensor) in &mean {
        check.tensor(case, &format!("expect.averaged.{key}"), tensor, START)?;
    }
    let classes = case.classes()?;
    let begun = Learned::<Mvlpt>::with_tensors(config, clip, &classes, 0, &mean)?;
    for (key, tensor) in begun.tensors()? {
        let expected = case.get(&format!("init.{key}")).context("no start")?;
        check.numbers(
            &format!("start of {key}"),
            &super::check::values(&tensor)?,
            &super::check::values(expected)?,
            START,
        );
    }
    Ok(())
}
