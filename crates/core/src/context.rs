//! Learned contexts: what they start from, the words that the tokenizer sees in their place, and the text features that they
//! give.

use candle_core::{DType, Shape, Tensor};
use serde_json::Value;

use crate::checkpoint::TorchState;
use crate::clip::TextTower;
use crate::method::{Classifier, TextClassifier};
use crate::prompt::{ClassTokenPosition, ClassTokens, Prompts, placeholder};
use crate::{Classes, Clip, Error, Param, Params, Result, ops};

/// The key of a context in the authors' checkpoints.
pub const KEY: &str = "ctx";

/// Standard deviation of a context that starts at random.
const STD: f64 = 0.02;

/// How many vectors a context has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Length {
    /// One for each token of the initial words; without words `otherwise`. Where `n_ctx` is set, it must be that number.
    OfWords {
        /// The number that the settings ask for.
        n_ctx: Option<usize>,
        /// The number without words and without `n_ctx`.
        otherwise: usize,
    },
    /// Always as many: initial words are the last of them, and zeros stand in front of the words.
    Fixed(usize),
}

/// What a context starts from, as the settings of a method say it.
#[derive(Clone, Debug)]
pub struct Start {
    /// Vectors of each context.
    pub length: Length,
    /// Words to start from; `None` draws from N(0, 0.02²). See [`initial_words`].
    pub words: Option<String>,
    /// One context per class instead of one for all.
    pub class_specific: bool,
    /// Where the class name sits among the context tokens.
    pub position: ClassTokenPosition,
}

impl Start {
    /// A shared context in front of the name with one vector for each token of `ctx_init`, spaces for underscores; without
    /// words `otherwise` of them. See [`Length::OfWords`].
    pub fn of_words(ctx_init: Option<&str>, n_ctx: Option<usize>, otherwise: usize) -> Self {
        Self {
            length: Length::OfWords { n_ctx, otherwise },
            words: initial_words(ctx_init),
            class_specific: false,
            position: ClassTokenPosition::End,
        }
    }

    /// Refuses a context without vectors, and initial words for class-specific contexts.
    ///
    /// # Errors
    /// [`Error::Config`] naming the key.
    pub fn check(&self) -> Result<()> {
        match self.length {
            Length::OfWords { n_ctx: Some(n), .. } | Length::Fixed(n) => check(n)?,
            Length::OfWords { n_ctx: None, .. } => {}
        }
        if self.class_specific && self.words.is_some() {
            let expected = "initial words (ctx_init) give one context for all classes; leave one of the two out";
            return Err(Error::config("class_specific", true, expected));
        }
        Ok(())
    }

    /// The context at its start, in `params` under [`KEY`].
    ///
    /// # Errors
    /// [`Error::Config`] as [`Start::check`], and for words that do not fit the length or the position;
    /// [`Error::PromptTooLong`] if a class name leaves no room.
    pub fn context(
        &self,
        params: &mut Params,
        tower: &TextTower,
        classes: &Classes,
    ) -> Result<Context> {
        self.check()?;
        let random = match self.length {
            Length::OfWords { n_ctx, otherwise } => n_ctx.unwrap_or(otherwise),
            Length::Fixed(n_ctx) => n_ctx,
        };
        let context = match (&self.words, self.length) {
            (Some(words), Length::OfWords { n_ctx, .. }) => {
                Context::of_words(params, tower, words, n_ctx)
            }
            (Some(words), Length::Fixed(n_ctx)) => {
                Context::of_last_words(params, tower, words, n_ctx)
            }
            (None, _) if self.class_specific => Context::per_class(params, tower, classes, random),
            (None, _) => Context::random(params, tower, random),
        };
        context?.at(self.position, tower, classes)
    }
}

/// Context vectors in front of, behind or around a class name.
#[derive(Clone, Debug)]
pub struct Context {
    param: Param,
    words: String,
    position: ClassTokenPosition,
    /// The classes that class-specific contexts belong to.
    own_classes: Option<Classes>,
}

impl Context {
    /// Vectors `(n_ctx, width)` from N(0, 0.02²).
    ///
    /// # Errors
    /// [`Error::Config`] if there are none, or the context exists already.
    pub fn random(params: &mut Params, tower: &TextTower, n_ctx: usize) -> Result<Self> {
        Self::drawn(params, (n_ctx, tower.width()).into(), n_ctx)
    }

    /// Several contexts at random, `(contexts, n_ctx, width)`.
    ///
    /// # Errors
    /// As [`Context::random`].
    pub fn several(
        params: &mut Params,
        tower: &TextTower,
        contexts: usize,
        n_ctx: usize,
    ) -> Result<Self> {
        Self::drawn(params, (contexts, n_ctx, tower.width()).into(), n_ctx)
    }

    /// One context per class at random, `(n_cls, n_ctx, width)`, that serves these classes alone.
    ///
    /// # Errors
    /// As [`Context::random`].
    pub fn per_class(
        params: &mut Params,
        tower: &TextTower,
        classes: &Classes,
        n_ctx: usize,
    ) -> Result<Self> {
        Ok(Self {
            own_classes: Some(classes.clone()),
            ..Self::several(params, tower, classes.len(), n_ctx)?
        })
    }

    fn drawn(params: &mut Params, shape: Shape, n_ctx: usize) -> Result<Self> {
        check(n_ctx)?;
        Ok(Self {
            param: params.normal(KEY, shape, STD)?,
            words: placeholder(n_ctx),
            position: ClassTokenPosition::End,
            own_classes: None,
        })
    }

    /// The embeddings of `words`, which must be one token each; `n_ctx`, if given, must be their number.
    ///
    /// # Errors
    /// [`Error::Config`] naming what does not agree.
    pub fn of_words(
        params: &mut Params,
        tower: &TextTower,
        words: &str,
        n_ctx: Option<usize>,
    ) -> Result<Self> {
        let ids = tower.tokenizer()?.encode(words);
        if let Some(n) = n_ctx.filter(|&n| n != ids.len()) {
            let expected = format!(
                "`{words}` is {} tokens; leave n_ctx out, make them agree, or start at random with ctx_init = \"\"",
                ids.len()
            );
            return Err(Error::config("n_ctx", n, expected));
        }
        if ids.len() != words.split(' ').count() {
            let expected = format!("words of one token each; these are {} tokens", ids.len());
            return Err(Error::config("ctx_init", words, expected));
        }
        let param = params.copied(KEY, &tower.embed(&ids)?)?;
        Ok(Self {
            param,
            words: words.to_owned(),
            position: ClassTokenPosition::End,
            own_classes: None,
        })
    }

    /// `n_ctx` vectors of which the last are embeddings of `words` and those before them zeros: ProGrad's start.
    ///
    /// There are as many embeddings as `words` has parts between spaces, as its authors count. Words of more tokens (a comma
    /// is one) keep the last of them frozen in front of the class name: see [`crate::prompt::ClassTokens::weave`].
    ///
    /// # Errors
    /// [`Error::Config`] if there are more words than vectors.
    pub fn of_last_words(
        params: &mut Params,
        tower: &TextTower,
        words: &str,
        n_ctx: usize,
    ) -> Result<Self> {
        let ids = tower.tokenizer()?.encode(words);
        let n_words = words.split(' ').count();
        if n_words > n_ctx || ids.len() < n_words {
            let expected = format!("at least the {n_words} words of `{words}`");
            return Err(Error::config("n_ctx", n_ctx, expected));
        }
        let zeros = n_ctx - n_words;
        let start = tower.embed(&ids[..n_words])?;
        let start = match zeros {
            0 => start,
            _ => {
                let before = Tensor::zeros((zeros, tower.width()), DType::F32, start.device())?;
                Tensor::cat(&[before, start], 0)?
            }
        };
        let words = format!("{} {words}", placeholder(zeros));
        Ok(Self {
            param: params.copied(KEY, &start)?,
            words: words.trim_start().to_owned(),
            position: ClassTokenPosition::End,
            own_classes: None,
        })
    }

    /// The context with the class name at `position`, once every name of `classes` is known to leave room for it.
    ///
    /// # Errors
    /// [`Error::Config`] if words leave tokens frozen in front of a name that does not stand behind the context;
    /// [`Error::PromptTooLong`].
    pub fn at(
        mut self,
        position: ClassTokenPosition,
        tower: &TextTower,
        classes: &Classes,
    ) -> Result<Self> {
        let tokens = tower.tokenizer()?.encode(&self.words).len();
        if tokens != self.n_ctx() && position != ClassTokenPosition::End {
            let expected = format!(
                "end: `{}` is {tokens} tokens for {} vectors, the others stand in front of the name",
                self.words,
                self.n_ctx()
            );
            return Err(Error::config("class_token_position", position, expected));
        }
        ClassTokens::new(tower, classes)?.sentences(&self.words)?;
        self.position = position;
        Ok(self)
    }

    /// The vectors; gradients flow to them.
    pub fn tensor(&self) -> &Tensor {
        self.param.tensor()
    }

    /// The sentence's beginning as the tokenizer sees it: initial words or `X X ... X`.
    pub fn words(&self) -> &str {
        &self.words
    }

    /// One prompt per class, for a shared context or one per class.
    ///
    /// # Errors
    /// As [`ClassTokens::weave`].
    pub fn prompts(&self, classes: &ClassTokens) -> Result<Prompts> {
        classes.weave(self.tensor(), &self.words, self.position)
    }

    /// As [`Context::prompts`] for several lists of classes under a shared context, one list after the other: what stands in
    /// front of the names is computed once.
    ///
    /// # Errors
    /// As [`ClassTokens::weave`].
    pub fn prompts_of(&self, lists: &[&ClassTokens]) -> Result<Prompts> {
        let mut prompts = Prompts::new();
        let source = prompts.learn(self.tensor());
        for classes in lists {
            let woven = classes.woven(&self.words, self.n_ctx())?;
            for prompt in woven.around(source, |_| 0, self.position) {
                prompts.push(prompt);
            }
        }
        Ok(prompts)
    }

    /// Raw text features of the classes, `(n_cls, embed_dim)`; gradients flow to the context.
    ///
    /// # Errors
    /// [`Error::PromptTooLong`]; [`Error::Prompt`] if class-specific contexts meet another number of classes.
    pub fn text_features(&self, clip: &Clip, classes: &ClassTokens) -> Result<Tensor> {
        clip.text().encode(&self.prompts(classes)?)
    }

    /// Raw text features of all classes under each of `contexts (n, n_ctx, width)`, `(n, n_cls, embed_dim)`: contexts that
    /// are made from this one for an image or a sample, or this one's own where there are several.
    ///
    /// # Errors
    /// [`Error::PromptTooLong`], [`Error::Shape`].
    pub fn text_features_under(
        &self,
        contexts: &Tensor,
        clip: &Clip,
        classes: &ClassTokens,
    ) -> Result<Tensor> {
        let prompts = classes.weave_each(contexts, &self.words, self.position)?;
        let features = clip.text().encode(&prompts)?;
        Ok(features.reshape((contexts.dim(0)?, classes.len(), ()))?)
    }

    /// Compares images with the classes' unit text features, encoded once.
    ///
    /// # Errors
    /// As [`Context::check_serves`] and [`Context::text_features`]; [`Error::NotFinite`] for a zero feature.
    pub fn classifier<'a>(
        &self,
        clip: &'a Clip,
        classes: &Classes,
    ) -> Result<Box<dyn Classifier + 'a>> {
        self.check_serves(classes)?;
        let classes = ClassTokens::new(clip.text(), classes)?;
        let features = self.text_features(clip, &classes)?.detach();
        let features = ops::unit_length(&features, "a text feature")?;
        Ok(Box::new(TextClassifier::new(clip, features)))
    }

    /// Refuses classes that the context was not trained for.
    ///
    /// # Errors
    /// [`Error::Prompt`] if it is class-specific and these are others.
    pub fn check_serves(&self, classes: &Classes) -> Result<()> {
        match self.own_classes.as_ref().filter(|own| *own != classes) {
            None => Ok(()),
            Some(own) => Err(Error::Prompt(format!(
                "class-specific context was trained on {} classes ({}, ...), not on these {}; it cannot serve other classes (train with class_specific = false)",
                own.len(),
                own.names()[0],
                classes.len()
            ))),
        }
    }

    /// Vectors of one context.
    pub fn n_ctx(&self) -> usize {
        let dims = self.tensor().dims();
        dims[dims.len() - 2]
    }
}

/// Refuses a context without vectors.
///
/// # Errors
/// [`Error::Config`].
pub fn check(n_ctx: usize) -> Result<()> {
    match n_ctx {
        0 => Err(Error::config("n_ctx", 0, "at least one context token")),
        _ => Ok(()),
    }
}

/// The initial words that a setting names, spaces for underscores; none if it is empty.
pub fn initial_words(ctx_init: Option<&str>) -> Option<String> {
    ctx_init
        .map(|words| words.replace('_', " "))
        .filter(|words| !words.trim().is_empty())
}

/// The initial words of a checkpoint's context: what it started from no longer matters, unless `given` settings name it.
pub fn words_in(given: &Value) -> Option<String> {
    let words = given.get("ctx_init").and_then(Value::as_str);
    words.map(str::to_owned)
}

/// The `count` tokens whose embeddings are nearest to each vector of a shared context `(n_ctx, width)`, with their distances
/// (Euclidean), nearest first: what can be read out of a learned context, which is often little.
///
/// # Errors
/// [`Error::Shape`] if the vectors are not the tower's, [`Error::Vocabulary`].
pub fn nearest_words(
    tower: &TextTower,
    ctx: &Tensor,
    count: usize,
) -> Result<Vec<Vec<(String, f64)>>> {
    let tokenizer = tower.tokenizer()?;
    let (width, vocabulary) = (tower.width(), crate::VOCAB_SIZE as u32);
    let ctx = match *ctx.dims() {
        [_, w] if w == width => ctx.to_dtype(DType::F32)?.to_vec2::<f32>()?,
        _ => {
            return Err(Error::Shape {
                what: "the context to read".into(),
                found: ctx.dims().to_vec(),
                expected: vec![ctx.dims().first().copied().unwrap_or(1), width],
            });
        }
    };
    let ids: Vec<u32> = (0..vocabulary).collect();
    let embeddings = tower.embed(&ids)?.to_vec2::<f32>()?;
    let of_vector = |vector: &Vec<f32>| {
        let distance = |embedding: &Vec<f32>| {
            let squares = vector.iter().zip(embedding);
            let squares = squares.map(|(a, b)| (f64::from(*a) - f64::from(*b)).powi(2));
            squares.sum::<f64>().sqrt()
        };
        let mut found: Vec<(u32, f64)> = ids
            .iter()
            .copied()
            .zip(embeddings.iter().map(distance))
            .collect();
        // Of equals the first.
        found.sort_by(|a, b| a.1.total_cmp(&b.1).then(a.0.cmp(&b.0)));
        found.truncate(count);
        let words = found.into_iter();
        words
            .map(|(id, distance)| (tokenizer.decode(&[id]), distance))
            .collect()
    };
    Ok(ctx.iter().map(of_vector).collect())
}

/// Sizes of the context in a checkpoint of the authors' code: contexts, `None` for a shared one, and vectors of each.
///
/// # Errors
/// [`Error::Prompt`] if there is none, [`Error::Shape`] if it is something else.
pub fn sizes_in(state: &TorchState, tower: &TextTower) -> Result<(Option<usize>, usize)> {
    sizes_of(KEY, state, tower)
}

/// As [`sizes_in`] where the context has another key, such as that of the whole model.
///
/// # Errors
/// As [`sizes_in`].
pub fn sizes_of(
    key: &str,
    state: &TorchState,
    tower: &TextTower,
) -> Result<(Option<usize>, usize)> {
    let ctx = state.tensor(key)?;
    match *ctx.dims() {
        [n_ctx, _] => Ok((None, n_ctx)),
        [contexts, n_ctx, _] => Ok((Some(contexts), n_ctx)),
        _ => Err(Error::Shape {
            what: format!("`{key}` of the checkpoint"),
            found: ctx.dims().to_vec(),
            expected: vec![16, tower.width()],
        }),
    }
}

/// Vectors of the shared context in a checkpoint of a method that has no other.
///
/// # Errors
/// As [`sizes_in`]; [`Error::Shape`] for several contexts.
pub fn shared_in(state: &TorchState, tower: &TextTower) -> Result<usize> {
    match sizes_in(state, tower)? {
        (None, n_ctx) => Ok(n_ctx),
        (Some(contexts), n_ctx) => Err(Error::Shape {
            what: format!("`{KEY}` of the checkpoint"),
            found: vec![contexts, n_ctx, tower.width()],
            expected: vec![n_ctx, tower.width()],
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::random;
    use crate::{Activation, Arch, Clip, Storage, VisionArch};

    fn clip() -> Result<Clip> {
        let arch = Arch {
            embed_dim: 16,
            image_resolution: 32,
            vision: VisionArch::Vit {
                layers: 1,
                width: 64,
                patch_size: 32,
            },
            context_length: 77,
            vocab_size: 49_408,
            text_width: 64,
            text_layers: 2,
            activation: Activation::QuickGelu,
        };
        Clip::from_checkpoint(random(&arch, 1)?, Storage::F32)
    }

    fn difference(a: &Tensor, b: &Tensor) -> Result<f32> {
        Ok((a - b)?.abs()?.max_all()?.to_scalar::<f32>()?)
    }

    #[test]
    fn words_give_the_sentence_they_are_taken_from() -> Result<()> {
        let clip = clip()?;
        let names = Classes::new(vec!["tabby_cat".into(), "dog".into()])?;
        let classes = ClassTokens::new(clip.text(), &names)?;
        let encoded = |template: &str| -> Result<Tensor> {
            clip.text()
                .encode(&Prompts::of_tokens(classes.fill(template)?))
        };
        let learned = |context: &Context| -> Result<Tensor> {
            clip.text().encode(&context.prompts(&classes)?)
        };
        let mut params = Params::new(0);
        let four = Context::of_words(&mut params, clip.text(), "a photo of a", Some(4))?;
        assert_eq!(learned(&four)?.dims(), [2, 16]);
        assert!(difference(&learned(&four)?, &encoded("a photo of a {}.")?)? < 1e-5);

        // Eight words, nine tokens, eight vectors: the ninth token stays in front of the name.
        let words = "a type of pet, a photo of a";
        let pet = Context::of_last_words(&mut Params::new(0), clip.text(), words, 8)?;
        assert_eq!(pet.n_ctx(), 8);
        let sentence = encoded("a type of pet, a photo of a {}.")?;
        assert!(difference(&learned(&pet)?, &sentence)? < 1e-5);

        let padded = Context::of_last_words(&mut Params::new(0), clip.text(), words, 16)?;
        assert_eq!(padded.words(), format!("{} {words}", placeholder(8)));
        let rows = padded.tensor().abs()?.sum(1)?.to_vec1::<f32>()?;
        assert!(rows[..8].iter().all(|&x| x == 0.0) && rows[8..].iter().all(|&x| x > 0.0));
        assert_eq!(learned(&padded)?.dims(), [2, 16]);
        let refused = Context::of_last_words(&mut Params::new(0), clip.text(), words, 7);
        assert!(refused.unwrap_err().to_string().contains("the 8 words"));
        Ok(())
    }

    #[test]
    fn settings_without_words_start_at_random() -> Result<()> {
        assert_eq!(initial_words(None), None);
        assert_eq!(initial_words(Some(" ")), None);
        assert_eq!(initial_words(Some("a_b")).as_deref(), Some("a b"));
        let clip = clip()?;
        let several = Context::several(&mut Params::new(0), clip.text(), 3, 5)?;
        assert_eq!(
            (several.tensor().dims(), several.n_ctx()),
            (&[3, 5, 64][..], 5)
        );
        assert_eq!(several.words(), "X X X X X");
        assert!(Context::random(&mut Params::new(0), clip.text(), 0).is_err());
        let names = |names: &[&str]| Classes::new(names.iter().map(|n| (*n).to_owned()).collect());
        let own = names(&["cat", "dog"])?;
        let specific = Context::per_class(&mut Params::new(0), clip.text(), &own, 5)?;
        assert_eq!(specific.tensor().dims(), [2, 5, 64]);
        assert!(specific.check_serves(&own).is_ok());
        assert!(specific.check_serves(&names(&["dog", "cat"])?).is_err());
        assert!(several.check_serves(&names(&["cow"])?).is_ok());
        Ok(())
    }
    #[test]
    fn a_context_of_words_reads_as_these_words() -> Result<()> {
        let clip = clip()?;
        let words = Context::of_words(&mut Params::new(0), clip.text(), "a photo of a", None)?;
        let read = nearest_words(clip.text(), words.tensor(), 3)?;
        let nearest: Vec<&str> = read.iter().map(|words| words[0].0.trim()).collect();
        assert_eq!(nearest, ["a", "photo", "of", "a"]);
        for words in &read {
            assert_eq!((words.len(), words[0].1), (3, 0.0));
            assert!(words[1].1 > 0.0 && words.is_sorted_by(|a, b| a.1 <= b.1));
        }
        let wide = Tensor::zeros((2, 80), DType::F32, words.tensor().device())?;
        let found = nearest_words(clip.text(), &wide, 3)
            .unwrap_err()
            .to_string();
        assert!(found.contains("shape [2, 80], expected [2, 64]"), "{found}");
        Ok(())
    }
}
