//! Deep prompts of one tower: what the first block reads, and what replaces it at the blocks behind.

use candle_core::Tensor;
use cliptune_core::checkpoint::TorchState;
use cliptune_core::method::Classifier;
use cliptune_core::prompt::{ClassTokenPosition, ClassTokens, Prompts, placeholder};
use cliptune_core::train::{Augment, Recipe};
use cliptune_core::visual_prompt::{Tokens, VisualPrompts};
use cliptune_core::{Clip, Error, ImageBatch, Param, Params, Result, context, ops};

/// Standard deviation of prompts that start at random.
pub(crate) const STD: f64 = 0.02;

/// Longest context that starts from words; for longer ones the authors' code leaves the words out.
const MOST_WORDS: usize = 4;

/// The key of the text context in the authors' checkpoints.
pub(crate) const CTX: &str = "prompt_learner.ctx";

/// The recipe that the methods of MaPLe's repository share, but for the rate.
pub(crate) fn recipe(lr: f64) -> Recipe {
    Recipe {
        epochs: Some(5),
        batch_size: 4,
        lr,
        // The image tower runs at every step whatever the view.
        augment: Augment::CropFlip,
        ..Recipe::default()
    }
}

/// The blocks that prompts enter: as `set`, or the paper's number as far as the tower has blocks.
///
/// # Errors
/// [`Error::Config`] if there are fewer blocks than that, or less than `least` is set.
pub(crate) fn depth(
    key: &str,
    set: Option<usize>,
    papers: usize,
    blocks: usize,
    least: usize,
) -> Result<usize> {
    match set {
        None => Ok(papers.min(blocks)),
        Some(depth) if (least..=blocks).contains(&depth) => Ok(depth),
        Some(depth) => {
            let expected = format!("{least} to {blocks}, the blocks of the tower");
            Err(Error::config(key, depth, expected))
        }
    }
}

/// Text context at the input of the first block: parameter [`CTX`], `(n_ctx, width)`, and the words that the tokenizer sees.
///
/// The first `n_ctx` of the initial words are learned, and the others stay in front of the class name. Without words, or with
/// more than four vectors, it starts at random.
///
/// # Errors
/// [`Error::Config`] if there are fewer words than vectors.
pub(crate) fn text_context(
    params: &mut Params,
    clip: &Clip,
    n_ctx: usize,
    ctx_init: Option<&str>,
) -> Result<(Param, String)> {
    let tower = clip.text();
    let words = context::initial_words(ctx_init).filter(|_| n_ctx <= MOST_WORDS);
    let Some(words) = words else {
        let param = params.normal(CTX, (n_ctx, tower.width()), STD)?;
        return Ok((param, placeholder(n_ctx)));
    };
    let ids = tower.tokenizer()?.encode(&words);
    let Some(learned) = ids.get(..n_ctx) else {
        let expected = format!(
            "at least {n_ctx} tokens, one for each vector; these are {}",
            ids.len()
        );
        return Err(Error::config("ctx_init", words, expected));
    };
    let param = params.copied(CTX, &tower.embed(learned)?)?;
    Ok((param, words))
}

/// One prompt per class: `[SOS] ctx words name . [EOS]`, whose context `deeper` replaces at block 1, 2, ...
///
/// # Errors
/// As [`ClassTokens::weave`].
pub(crate) fn text_prompts(
    classes: &ClassTokens,
    (ctx, words): (&Tensor, &str),
    deeper: &[Tensor],
) -> Result<Prompts> {
    let mut prompts = classes.weave(ctx, words, ClassTokenPosition::End)?;
    if !deeper.is_empty() {
        // The context is the prompts' only learned tensor.
        prompts.deepen(0, &Tensor::stack(deeper, 0)?)?;
    }
    Ok(prompts)
}

/// Free visual prompts of the first blocks under the authors' keys, `(n_ctx, width)` each.
#[derive(Debug)]
pub(crate) struct VisualSide(Vec<Param>);

impl VisualSide {
    /// The key of a block's prompts.
    pub(crate) fn key(block: usize) -> String {
        match block {
            0 => "image_encoder.VPT".into(),
            _ => format!("image_encoder.transformer.resblocks.{block}.VPT_shallow"),
        }
    }

    /// Prompts at random.
    pub(crate) fn new(
        params: &mut Params,
        width: usize,
        n_ctx: usize,
        depth: usize,
    ) -> Result<Self> {
        let prompt = |block| params.normal(&Self::key(block), (n_ctx, width), STD);
        let prompts = (0..depth).map(prompt);
        Ok(Self(prompts.collect::<Result<_>>()?))
    }

    /// To learn.
    pub(crate) fn prompts(&self) -> VisualPrompts {
        VisualPrompts::deep(
            self.0
                .iter()
                .map(|param| Tokens::Shared(param.tensor().clone())),
        )
    }

    /// To predict: without gradients.
    pub(crate) fn constants(&self) -> Result<VisualPrompts> {
        Ok(VisualPrompts::deep(
            values(&self.0)?.into_iter().map(Tokens::Shared),
        ))
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// Present values, without gradients.
pub(crate) fn values(params: &[Param]) -> Result<Vec<Tensor>> {
    params.iter().map(Param::value).collect()
}

/// How many of the keys `key(first)`, `key(first + 1)`, ... a checkpoint holds.
pub(crate) fn count(state: &TorchState, first: usize, key: impl Fn(usize) -> String) -> usize {
    let held = (first..).take_while(|i| state.tensors.contains_key(&key(*i)));
    held.count()
}

/// Rows of a prompt in a checkpoint of the authors' code.
///
/// # Errors
/// [`Error::Prompt`] if it is missing, [`Error::Shape`] if it is no matrix.
pub(crate) fn rows_of(state: &TorchState, key: &str) -> Result<usize> {
    let tensor = state.tensor(key)?;
    match *tensor.dims() {
        [rows, _] => Ok(rows),
        _ => Err(Error::Shape {
            what: format!("`{key}` of the checkpoint"),
            found: tensor.dims().to_vec(),
            expected: vec![4, tensor.dims().last().copied().unwrap_or(0)],
        }),
    }
}

/// Blocks and rows of prompts that a checkpoint of the authors' code holds as one tensor, `(blocks, rows, width)`.
///
/// # Errors
/// As [`rows_of`].
pub(crate) fn leading_of(state: &TorchState, key: &str) -> Result<[usize; 2]> {
    let tensor = state.tensor(key)?;
    match *tensor.dims() {
        [blocks, rows, _] => Ok([blocks, rows]),
        _ => Err(Error::Shape {
            what: format!("`{key}` of the checkpoint"),
            found: tensor.dims().to_vec(),
            expected: vec![11, 10, tensor.dims().last().copied().unwrap_or(0)],
        }),
    }
}

/// Compares images, seen with constant prompts, with one fixed feature per class.
#[derive(Debug)]
pub(crate) struct PromptedClassifier<'a> {
    clip: &'a Clip,
    prompts: VisualPrompts,
    /// `(n_cls, embed_dim)`, of unit length.
    text_features: Tensor,
}

impl<'a> PromptedClassifier<'a> {
    /// For raw text features.
    pub(crate) fn new(
        clip: &'a Clip,
        prompts: VisualPrompts,
        text_features: &Tensor,
    ) -> Result<Self> {
        let unit = ops::unit_length(&text_features.detach(), "a text feature")?;
        Ok(Self::of_unit(clip, prompts, unit))
    }

    /// For text features of unit length.
    pub(crate) fn of_unit(clip: &'a Clip, prompts: VisualPrompts, text_features: Tensor) -> Self {
        Self {
            clip,
            prompts,
            text_features,
        }
    }
}

impl Classifier for PromptedClassifier<'_> {
    fn logits(&self, images: &ImageBatch) -> Result<Tensor> {
        let images = self
            .clip
            .image()
            .encode_prompted(images.pixels_or_patches()?, &self.prompts)?;
        self.clip.unit_logits(&images, &self.text_features)
    }

    fn class_attention(&self, images: &ImageBatch) -> Result<Option<Tensor>> {
        let image = self.clip.image();
        Ok(Some(image.class_attention(
            images.pixels_or_patches()?,
            &self.prompts,
        )?))
    }
}
