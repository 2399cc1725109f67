//! Cases of the text-pt family.

use anyhow::{Context, Result};
use candle_core::{DType, Device, Tensor};
use cliptune_core::checkpoint::read_torch_state;
use cliptune_core::method::{Predictor, Settings};
use cliptune_core::prompt::{ClassTokenPosition, ClassTokens, placeholder};
use cliptune_core::task::ImageBatch;
use cliptune_core::train::{Batch, Loss, Objective, Step};
use cliptune_core::{Classes, Clip, ImageNeeds, Learned, Params, ops};
use cliptune_text_pt::{CoOp, CoOpConfig, ZeroShot, ZeroShotConfig};
use serde::Deserialize;
use serde_json::json;

use super::case::{Case, Models};
use super::check::{AFTER, Check, START, values};
use super::objective;

/// Token ids padded with zeros to `length`, as the cases hold them.
pub(crate) fn padded(tokens: &[Vec<u32>], length: usize) -> Result<Tensor> {
    let ids = tokens.iter().flat_map(|row| {
        let row = row.iter().map(|&id| i64::from(id));
        row.chain(std::iter::repeat(0))
            .take(length)
            .collect::<Vec<_>>()
    });
    Ok(Tensor::from_iter(ids, &Device::Cpu)?.reshape((tokens.len(), length))?)
}

/// Percent of rows whose largest entry is at the label.
fn accuracy(logits: &Tensor, labels: &[u32]) -> Result<f64> {
    let rows = logits.argmax(1)?.to_vec1::<u32>()?;
    let correct = rows.iter().zip(labels).filter(|(a, b)| a == b).count();
    Ok(100.0 * correct as f64 / labels.len() as f64)
}

#[derive(Deserialize)]
struct ZeroShotCase {
    templates: Vec<String>,
    dataset: Option<String>,
    #[serde(default)]
    ensemble: bool,
}

pub(crate) fn zeroshot(case: &Case, models: &mut Models, check: &mut Check) -> Result<()> {
    let clip = models.of(case)?;
    let json: ZeroShotCase = case.config()?;
    let config = ZeroShotConfig {
        templates: json.templates.clone(),
        ..ZeroShotConfig::default()
    };
    // Where the case names the authors' data set, our own tables must give the same sentences.
    if let Some(dataset) = json.dataset {
        let ensemble = match (json.ensemble, json.templates.len()) {
            (false, _) => None,
            (true, 80) => Some("imagenet80"),
            (true, _) => Some("select7"),
        };
        let own =
            ZeroShotConfig::read(&json!({"dataset": dataset, "ensemble": ensemble}))?.resolve()?;
        let failure = (own != json.templates).then(|| format!("our templates are {own:?}"));
        check.record("config.templates", 0.0, failure);
    }
    let method = ZeroShot::new(&config)?;
    let classes = ClassTokens::new(clip.text(), &case.classes()?)?;
    let text = method.text_features(&clip, &classes)?;
    let images = clip.image().encode(case.tensor("images")?)?;
    let logits = clip.unit_logits(&images, &text)?;
    check.tensor(case, "expect.text_features", &text, START)?;
    check.tensor(case, "expect.image_features", &images, START)?;
    check.tensor(case, "expect.logits", &logits, START)?;
    check.tensor(case, "expect.probs", &ops::softmax(&logits)?, START)?;
    let classifier = method.classifier(&clip, &case.classes()?)?;
    let logits = classifier.logits(&ImageBatch::of_features(images))?;
    check.tensor(case, "expect.logits", &logits, START)
}

#[derive(Deserialize)]
struct CoOpCase {
    n_ctx: usize,
    ctx_init: Option<String>,
    csc: bool,
    class_token_position: ClassTokenPosition,
    new_classnames: Option<Vec<String>>,
    checkpoint: Option<String>,
    epoch: Option<usize>,
}

pub(crate) fn coop(case: &Case, models: &mut Models, check: &mut Check) -> Result<()> {
    let clip = models.of(case)?;
    let json: CoOpCase = case.config()?;
    let config = CoOpConfig {
        n_ctx: Some(json.n_ctx),
        ctx_init: json.ctx_init.clone().filter(|words| !words.is_empty()),
        class_specific: json.csc,
        class_token_position: json.class_token_position,
        ..CoOpConfig::default()
    };
    let classes = case.classes()?;
    let tokens = ClassTokens::new(clip.text(), &classes)?;
    let mut method = Learned::<CoOp>::with_tensors(&config, &clip, &classes, 0, &case.initial()?)?;
    let words = words(config.ctx_init.as_deref().unwrap_or(""), json.n_ctx);
    if config.ctx_init.is_some() {
        let fresh = Learned::<CoOp>::new(&config, &clip, &classes, 0)?;
        compare_start(case, fresh.params(), "ctx", check)?;
    }
    compare_tokens(case, &clip, &tokens, &words, json.n_ctx, "init", check)?;

    let pixels = case.tensor("images")?;
    let images = ImageBatch::encode(&clip, pixels, ImageNeeds::GlobalFeatures)?;
    let labels = case.ids("labels")?;
    let logits = |method: &Learned<CoOp>, classes: &Classes| -> Result<Tensor> {
        Ok(method.classifier(&clip, classes)?.logits(&images)?)
    };
    check.tensor(case, "expect.image_features", images.features()?, START)?;

    if let Some(checkpoint) = &json.checkpoint {
        // The expectations of a released checkpoint belong to its state, not to the start.
        let state = read_torch_state(&case.path.join(checkpoint))?;
        check.record(
            "config.epoch",
            0.0,
            (state.epoch != json.epoch).then(|| format!("epoch {:?}", state.epoch)),
        );
        for (key, tensor) in &state.tensors {
            check.tensor(case, &format!("expect.state.{key}"), tensor, 0.0)?;
        }
        compare_tokens(
            case,
            &clip,
            &tokens,
            &words,
            json.n_ctx,
            "expect.state",
            check,
        )?;
        let settings = json!({"class_token_position": json.class_token_position});
        let (_, imported) = Learned::<CoOp>::import(&state, &settings, &clip, &classes)?;
        check.tensor(case, "expect.logits", &logits(&imported, &classes)?, START)?;
        if let Some(names) = json.new_classnames {
            let other = logits(&imported, &Classes::new(names)?)?;
            check.tensor(case, "expect.logits_new_classes", &other, START)?;
        }
        let batch = Batch {
            images: &images,
            labels: &labels,
            classes: &tokens,
        };
        return objective::train(case, &clip, &mut method, &batch, check);
    }

    check.tensor(
        case,
        "expect.text_features",
        &method.context.text_features(&clip, &tokens)?,
        START,
    )?;
    let before = logits(&method, &classes)?;
    check.tensor(case, "expect.logits", &before, START)?;
    check.list(case, "expect.acc", &[accuracy(&before, &labels)?], 1e-6)?;
    let batch = Batch {
        images: &images,
        labels: &labels,
        classes: &tokens,
    };
    let step = Step {
        seed: 0,
        epoch: 0,
        epochs: 1,
        index: 0,
        steps: 1,
    };
    let Loss {
        logits: Some(training),
        ..
    } = method.loss(&clip, &batch, step)?
    else {
        anyhow::bail!("the loss holds no logits");
    };
    check.tensor(case, "expect.logits", &training, START)?;
    objective::train(case, &clip, &mut method, &batch, check)?;
    check.tensor(
        case,
        "expect.logits_after",
        &logits(&method, &classes)?,
        AFTER,
    )
}

/// What the tokenizer sees in the place of a context: initial words, or placeholders where there are none.
pub(super) fn words(ctx_init: &str, n_ctx: usize) -> String {
    match ctx_init {
        "" => placeholder(n_ctx),
        words => words.replace('_', " "),
    }
}

/// A parameter that does not start at random must start where the case does, exactly.
pub(super) fn compare_start(
    case: &Case,
    fresh: &Params,
    key: &str,
    check: &mut Check,
) -> Result<()> {
    let name = format!("init.{key}");
    let ours = fresh
        .get(key)
        .with_context(|| format!("no parameter `{key}`"))?;
    let expected = values(case.tensor(&name)?)?;
    check.numbers(&name, &values(&ours.value()?)?, &expected, 0.0);
    Ok(())
}

/// Compares our tokens with the case's, and the embeddings of the tokens around the context with the authors' buffers.
pub(super) fn compare_tokens(
    case: &Case,
    clip: &Clip,
    classes: &ClassTokens,
    words: &str,
    n_ctx: usize,
    prefix: &str,
    check: &mut Check,
) -> Result<()> {
    let length = clip.text().context_length();
    let ids = padded(&classes.sentences(words)?, length)?;
    check.tensor(case, "input.tokenized_prompts", &ids, 0.0)?;
    let lens = Tensor::from_iter(classes.name_lens().iter().map(|&n| n as i64), &Device::Cpu)?;
    check.tensor(case, "input.name_lens", &lens, 0.0)?;
    let flat = ids.flatten_all()?.to_dtype(DType::U32)?.to_vec1::<u32>()?;
    let embedded =
        clip.text()
            .embed(&flat)?
            .reshape((classes.len(), length, clip.text().width()))?;
    check.tensor(
        case,
        &format!("{prefix}.token_prefix"),
        &embedded.narrow(1, 0, 1)?,
        0.0,
    )?;
    let suffix = embedded.narrow(1, 1 + n_ctx, length - 1 - n_ctx)?;
    check.tensor(case, &format!("{prefix}.token_suffix"), &suffix, 0.0)
}
