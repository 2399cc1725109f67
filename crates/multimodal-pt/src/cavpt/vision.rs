//! Images through the prompted tower: free tokens in the lower blocks, class-aware ones in the upper.

use candle_core::Tensor;
use cliptune_core::visual_prompt::{Tokens, VisualPrompts};
use cliptune_core::{Clip, Result};

use super::Cavpt;

/// What the prompted image tower says of a batch.
#[derive(Clone, Debug)]
pub struct Seen {
    /// Raw features, `(batch, embed_dim)`.
    pub features: Tensor,
    /// The auxiliary classifier's logits, `(batch, upper blocks, candidates, n_cls)`; none for
    /// [`super::Variant::Vlp`] and to predict.
    pub class_logits: Option<Tensor>,
}

/// What is seen: images as the tower takes them, with the raw features of the classes `(n_cls, embed_dim)` and each image's
/// candidates.
#[derive(Clone, Copy)]
pub(super) struct Given<'a> {
    pub(super) images: &'a Tensor,
    pub(super) text: &'a Tensor,
    pub(super) candidates: Option<&'a Tensor>,
}

impl Given<'_> {
    fn has_no_candidates(self) -> Result<bool> {
        Ok(match self.candidates {
            Some(candidates) => candidates.dim(1)? == 0,
            None => false,
        })
    }
}

/// What the last block reads, of class-aware tokens.
struct Made {
    block: usize,
    /// The images' own tokens, `(batch, 1 + grid², width)`.
    tokens: Tensor,
    prompts: VisualPrompts,
    /// By upper block, `(batch, candidates, n_cls)`; empty where nothing learns.
    class_logits: Vec<Tensor>,
}

/// Raw features without prompts, `(batch, embed_dim)`.
pub(super) fn plain(clip: &Clip, images: &Tensor) -> Result<Tensor> {
    clip.image().encode_prompted(images, &VisualPrompts::new())
}

/// Nothing leads back from what is not learned.
fn kept(tokens: Tensor, learns: bool) -> Tensor {
    match learns {
        true => tokens,
        false => tokens.detach(),
    }
}

impl Cavpt {
    /// Images with their prompts, pixels `(batch, 3, side, side)` or their patches `(batch, grid², width)`; `text` are the raw [`Cavpt::text_features`]. Gradients flow
    /// to all that is learned.
    ///
    /// # Errors
    /// [`cliptune_core::Error::Shape`] if the pixels are not of the tower's resolution.
    pub fn see(
        &self,
        clip: &Clip,
        images: &Tensor,
        text: &Tensor,
        candidates: Option<&Tensor>,
    ) -> Result<Seen> {
        let given = Given {
            images,
            text,
            candidates,
        };
        self.pass(clip, given, true)
    }

    /// As [`Cavpt::see`]; where nothing `learns`, nothing is kept for the way back.
    pub(super) fn pass(&self, clip: &Clip, given: Given<'_>, learns: bool) -> Result<Seen> {
        let tower = clip.image();
        let Some(made) = self.climb(clip, given, learns)? else {
            let free = self.free(given, learns)?;
            return Ok(Seen {
                features: tower.encode_prompted(given.images, &free)?,
                class_logits: match (&self.generator, given.candidates) {
                    (Some(generator), Some(candidates)) if learns => {
                        Some(generator.no_class_logits(candidates.dim(0)?)?)
                    }
                    _ => None,
                },
            });
        };
        let features = tower.encode_prompted_from(&made.tokens, made.block, &made.prompts)?;
        Ok(Seen {
            features,
            class_logits: match learns {
                true => Some(Tensor::stack(&made.class_logits, 1)?),
                false => None,
            },
        })
    }

    /// Where the class token looks in the last block, as [`cliptune_core::clip::ImageTower::class_attention`].
    pub(super) fn class_attention(&self, clip: &Clip, given: Given<'_>) -> Result<Tensor> {
        match self.climb(clip, given, false)? {
            Some(made) => clip.image().class_attention_from(&made.tokens),
            None => {
                let free = self.free(given, false)?;
                clip.image().class_attention(given.images, &free)
            }
        }
    }

    /// The free tokens; blocks without candidates read the image alone.
    fn free(&self, given: Given<'_>, learns: bool) -> Result<VisualPrompts> {
        let blocks = self.visual.tensor().dim(0)?;
        let mut free = VisualPrompts::new();
        for block in 0..blocks {
            let tokens = kept(self.visual.tensor().get(block)?, learns);
            free.replace(block, Tokens::Shared(tokens));
        }
        if given.has_no_candidates()? {
            free.remove(blocks);
        }
        Ok(free)
    }

    /// Up to the last block, where tokens are made for it; `None` where all blocks read free tokens or none.
    fn climb(&self, clip: &Clip, given: Given<'_>, learns: bool) -> Result<Option<Made>> {
        let (Some(generator), Some(candidates)) = (&self.generator, given.candidates) else {
            return Ok(None);
        };
        if given.has_no_candidates()? {
            return Ok(None);
        }
        let tower = clip.image();
        let chosen = given.text.index_select(&candidates.flatten_all()?, 0)?;
        let (batch, k) = candidates.dims2()?;
        let chosen = chosen.reshape((batch, k, ()))?;
        let first = self.visual.tensor().dim(0)?;
        let free = self.free(given, learns)?;
        let mut tokens = tower.prompted_tokens(given.images, first, &free)?;
        let mut prompts = VisualPrompts::new();
        let mut class_logits = Vec::new();
        let upper = first..first + generator.sizes().blocks;
        for (i, block) in upper.clone().enumerate() {
            if i > 0 {
                tokens = tower.prompted_tokens_from(&tokens, block - 1, block, &prompts)?;
            }
            let made = generator.make(i, &tokens, &chosen)?;
            if learns {
                class_logits.push(generator.class_logits(i, &made)?);
            }
            prompts = VisualPrompts::new();
            prompts.replace(block, Tokens::PerImage(kept(made.prompts, learns)));
        }
        Ok(Some(Made {
            block: upper.end - 1,
            tokens,
            prompts,
            class_logits,
        }))
    }
}
