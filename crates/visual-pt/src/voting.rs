//! How RePrompt predicts: probabilities of the prompts, mixed with what the neighbours vote.

use candle_core::{D, Device, Tensor};
use cliptune_core::method::Classifier;
use cliptune_core::prompt::ClassTokens;
use cliptune_core::task::Val;
use cliptune_core::train::EVALUATION_BATCH;
use cliptune_core::{Classes, Clip, ImageBatch, ImageNeeds, Result, Split, View, ops};

use crate::reprompt::{Found, RePrompt, queries};

/// Compares images, seen with prompts of their own, with the classes, and lets their neighbours vote.
#[derive(Debug)]
pub(crate) struct Voting<'a> {
    clip: &'a Clip,
    method: &'a RePrompt,
    /// `(n_cls, embed_dim)`, of unit length.
    text_features: Tensor,
    /// The votes' share.
    lambda: f32,
    /// Which of the classes trained on each class is; none if they are others, of which the database knows nothing.
    columns: Vec<usize>,
}

impl<'a> Voting<'a> {
    /// For `classes`; neighbours vote with the share `lambda` if these are the classes trained on, `own`.
    ///
    /// # Errors
    /// [`cliptune_core::Error::PromptTooLong`].
    pub(crate) fn new(
        clip: &'a Clip,
        method: &'a RePrompt,
        own: &Classes,
        classes: &Classes,
        lambda: f32,
    ) -> Result<Self> {
        let tokens = ClassTokens::new(clip.text(), classes)?;
        let text = method.text_features(clip, &tokens)?.detach();
        let columns = columns(own, classes);
        Ok(Self {
            clip,
            method,
            text_features: ops::unit_length(&text, "a text feature")?,
            lambda: if columns.is_some() { lambda } else { 0.0 },
            columns: columns.unwrap_or_default(),
        })
    }

    /// The share with the best accuracy on `val`, of 0, 0.05, ..., 0.95; the smallest of equals.
    ///
    /// # Errors
    /// As [`Split::images`].
    pub(crate) fn best_share(&self, val: &Split<Val>) -> Result<f32> {
        let labels: Vec<u32> = val.labels().collect();
        let positions: Vec<usize> = (0..val.len()).collect();
        let candidates: Vec<f32> = (0..20u8).map(|i| f32::from(i) / 20.0).collect();
        let mut correct = vec![0; candidates.len()];
        for positions in positions.chunks(EVALUATION_BATCH) {
            let images = val.images(self.clip, positions, ImageNeeds::Pixels, View::Fixed)?;
            let (logits, votes) = self.both(&images)?;
            for (lambda, correct) in candidates.iter().zip(&mut correct) {
                let guesses = mix(&logits, &votes, *lambda)?.argmax(D::Minus1)?;
                let guesses = guesses.to_vec1::<u32>()?;
                let guessed = guesses.iter().zip(positions);
                *correct += guessed.filter(|(guess, p)| **guess == labels[**p]).count();
            }
        }
        let most = correct.iter().max();
        let best = correct.iter().position(|n| Some(n) == most).unwrap_or(0);
        Ok(candidates[best])
    }

    /// Logits without the votes, and these, `(batch, n_cls)` each.
    fn both(&self, images: &ImageBatch) -> Result<(Tensor, Tensor)> {
        let seen = images.pixels_or_patches()?;
        let found = self.look_up(seen)?;
        let features = self
            .method
            .image_features(self.clip, seen, &found.context)?;
        let logits = self
            .clip
            .unit_logits(&features.detach(), &self.text_features)?;
        let votes = found.votes.iter();
        let votes = votes.flat_map(|votes| self.columns.iter().map(|&column| votes[column]));
        let votes: Vec<f32> = votes.collect();
        let shape = (images.len(), self.columns.len());
        Ok((logits, Tensor::from_vec(votes, shape, &Device::Cpu)?))
    }

    /// Without numbers: these may be images of another source, and training images count as any other.
    fn look_up(&self, images: &Tensor) -> Result<Found> {
        let queries = queries(self.clip, images)?;
        self.method.look_up(self.clip, &queries, None)
    }
}

impl Classifier for Voting<'_> {
    fn logits(&self, images: &ImageBatch) -> Result<Tensor> {
        let (logits, votes) = self.both(images)?;
        mix(&logits, &votes, self.lambda)
    }

    fn class_attention(&self, images: &ImageBatch) -> Result<Option<Tensor>> {
        let images = images.pixels_or_patches()?;
        let context = self.look_up(images)?.context;
        let Some(prompts) = self.method.visual_prompts(&context)? else {
            return Ok(None);
        };
        let image = self.clip.image();
        Ok(Some(image.class_attention(images, &prompts)?))
    }
}

/// For each of `classes` which of `own` it is, if they are the same names in any order.
fn columns(own: &Classes, classes: &Classes) -> Option<Vec<usize>> {
    if own.len() != classes.len() {
        return None;
    }
    let mut taken = vec![false; own.len()];
    let find = |name: &String| {
        // Names may occur twice: in the order in which they stand.
        let mut free = own.names().iter().enumerate().filter(|(i, _)| !taken[*i]);
        let (found, _) = free.find(|(_, own)| *own == name)?;
        taken[found] = true;
        Some(found)
    };
    classes.names().iter().map(find).collect()
}

/// `log( lambda·votes + (1 − lambda)·softmax(logits) )`, or the logits themselves where nothing votes.
fn mix(logits: &Tensor, votes: &Tensor, lambda: f32) -> Result<Tensor> {
    if lambda == 0.0 {
        return Ok(logits.clone());
    }
    let lambda = f64::from(lambda);
    let mixed = ((ops::softmax(logits)? * (1.0 - lambda))? + (votes * lambda)?)?;
    // A class without any vote has a logarithm too.
    Ok(mixed.maximum(f32::MIN_POSITIVE)?.log()?)
}
