//! Declared prompts: a method says of what pieces its prompts consist, the text tower decides how to run them.
//!
//! No method handles positions, padding or the end token's place itself.

use std::collections::HashMap;
use std::ops::Range;

use candle_core::Tensor;
use serde::{Deserialize, Serialize};

use crate::engine::plan::Place;
use crate::engine::run::Deep;
use crate::params::check_finite;
use crate::tokenizer::{END, START, Tokenizer};
use crate::{Classes, Error, Result, clip::TextTower};

/// A piece of a prompt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Piece {
    /// Frozen tokens.
    Words(Vec<u32>),
    /// Rows of a learned tensor.
    Learned {
        /// Which of [`Prompts`]' learned tensors, as [`Prompts::learn`] numbered it.
        source: usize,
        /// Which context of it, for one with several (per class): 0 for a shared one.
        context: usize,
        /// Which rows of that context.
        rows: Range<usize>,
    },
}

/// Where the class name sits among the context tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ClassTokenPosition {
    /// `[SOS] name ctx . [EOS]`
    Front,
    /// `[SOS] first half of ctx, name, second half . [EOS]`; an odd context has the longer half behind.
    Middle,
    /// `[SOS] ctx name . [EOS]`
    #[default]
    End,
}

impl std::fmt::Display for ClassTokenPosition {
    /// As in settings.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Front => "front",
            Self::Middle => "middle",
            Self::End => "end",
        })
    }
}

/// A set of prompts to encode together.
#[derive(Clone, Debug, Default)]
pub struct Prompts {
    learned: Vec<Tensor>,
    /// Learned tensors with rows for deeper blocks.
    deeper: Vec<(usize, Tensor)>,
    rows: Vec<Vec<Piece>>,
}

impl Prompts {
    /// No prompts.
    pub fn new() -> Self {
        Self::default()
    }

    /// Prompts of frozen words alone: start and end token included, not padded.
    pub fn of_tokens(tokens: impl IntoIterator<Item = Vec<u32>>) -> Self {
        let rows = tokens
            .into_iter()
            .map(|ids| vec![Piece::Words(ids)])
            .collect();
        Self {
            rows,
            ..Self::default()
        }
    }

    /// Adds a learned tensor, `(rows, width)` or `(contexts, rows, width)`, and returns its number for [`Piece::Learned`].
    pub fn learn(&mut self, tensor: &Tensor) -> usize {
        self.learned.push(tensor.clone());
        self.learned.len() - 1
    }

    /// Adds a prompt; its last piece ends with the end token.
    pub fn push(&mut self, pieces: Vec<Piece>) {
        self.rows.push(pieces);
    }

    /// Number of prompts.
    pub fn len(&self) -> usize {
        self.rows.len()
    }

    /// Whether there is no prompt.
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// Replaces the rows of learned tensor `source` again at deeper blocks: `deeper (blocks, rows, width)` holds what stands
    /// there at the input of block 1, 2, ... (MaPLe's deep prompts). Behind the last of them the rows run on.
    ///
    /// # Errors
    /// [`Error::Shape`] if it has not as many rows as the learned tensor's contexts, [`Error::Data`] if there are deeper rows
    /// for it already.
    pub fn deepen(&mut self, source: usize, deeper: &Tensor) -> Result<()> {
        if self.deeper.iter().any(|(known, _)| *known == source) {
            let message = format!("learned tensor {source} has deeper rows already");
            return Err(Error::Data(message));
        }
        let rows = self.learned.get(source).map(|t| t.dims());
        match (rows, deeper.dims()) {
            (Some([.., rows, width]), [_, r, w]) if (rows, width) == (r, w) => {
                self.deeper.push((source, deeper.clone()));
                Ok(())
            }
            (learned, found) => Err(Error::Shape {
                what: format!("deeper rows of learned tensor {source}"),
                found: found.to_vec(),
                expected: learned.unwrap_or_default().to_vec(),
            }),
        }
    }

    /// What each prompt reads, and the tables of what there is to read.
    ///
    /// Rows are numbered through the distinct words and the learned rows behind them, so the gradient of each learned row is the
    /// sum over the prompts that share it.
    pub(crate) fn lay_out(&self, tower: &TextTower) -> Result<LaidOut> {
        let (width, room) = (tower.width(), tower.context_length());
        if self.rows.is_empty() {
            return Err(Error::Data("there are no prompts to encode".into()));
        }
        for (_, rows) in &self.deeper {
            let blocks = rows.dim(0)?;
            if blocks >= tower.blocks() {
                return Err(Error::Data(format!(
                    "deeper rows for {blocks} blocks; behind the first the tower has {}",
                    tower.blocks() - 1
                )));
            }
        }
        let mut words: Vec<u32> = Vec::new();
        let mut word_rows = HashMap::new();
        for id in self.rows.iter().flatten().flat_map(|p| match p {
            Piece::Words(ids) => ids.as_slice(),
            Piece::Learned { .. } => &[],
        }) {
            word_rows.entry(*id).or_insert_with(|| {
                words.push(*id);
                words.len() - 1
            });
        }
        let mut learned = Vec::with_capacity(self.learned.len());
        let mut first_row = words.len();
        let mut sources = Vec::with_capacity(self.learned.len());
        for (i, tensor) in self.learned.iter().enumerate() {
            let (contexts, rows) = match *tensor.dims() {
                [rows, w] if w == width => (1, rows),
                [contexts, rows, w] if w == width => (contexts, rows),
                _ => {
                    let what = format!("learned context {i} of the prompts");
                    let mut expected = tensor.dims().to_vec();
                    if let Some(last) = expected.last_mut() {
                        *last = width;
                    }
                    return Err(Error::Shape {
                        what,
                        found: tensor.dims().to_vec(),
                        expected,
                    });
                }
            };
            check_finite(tensor, &format!("learned context {i} of the prompts"))?;
            learned.push(tensor.reshape((contexts * rows, width))?);
            sources.push((first_row, contexts, rows));
            first_row += contexts * rows;
        }
        let (deep, deep_table, slots) = self.lay_out_deeper()?;
        let mut laid_out = Vec::with_capacity(self.rows.len());
        for pieces in &self.rows {
            let (mut row, mut end) = (Vec::new(), None);
            for piece in pieces {
                match piece {
                    Piece::Words(ids) => {
                        let first_end = ids.iter().position(|&id| id == END);
                        end = end.or(first_end.map(|at| row.len() + at + 1));
                        row.extend(ids.iter().map(|id| Place::shallow(word_rows[id] as u32)));
                    }
                    Piece::Learned {
                        source,
                        context,
                        rows,
                    } => match sources.get(*source) {
                        Some(&(first, contexts, n)) if *context < contexts && rows.end <= n => {
                            let deep = slots.get(source);
                            row.extend(rows.clone().map(|r| Place {
                                row: (first + context * n + r) as u32,
                                deep: deep.map_or(0, |first| (first + r + 1) as u32),
                            }));
                        }
                        _ => {
                            let message = format!(
                                "a prompt uses rows {rows:?} of context {context} of learned tensor {source}, which do not exist"
                            );
                            return Err(Error::Data(message));
                        }
                    },
                }
            }
            if row.len() > room {
                return Err(Error::PromptTooLong {
                    text: self.describe(pieces),
                    tokens: row.len(),
                    context_length: room,
                });
            }
            if row.is_empty() {
                return Err(Error::Data("a prompt has no tokens".into()));
            }
            // The feature is taken at the first end token, as the authors find it, even inside a name; nothing behind it
            // matters.
            row.truncate(end.unwrap_or(row.len()));
            laid_out.push(row);
        }
        Ok(LaidOut {
            words: tower.embed(&words)?,
            learned: one_table(&learned)?,
            prompts: laid_out,
            deep,
            deep_table,
        })
    }

    /// The deep rows, the table they are in, and each deepened source's first slot.
    fn lay_out_deeper(&self) -> Result<(Deep, Option<Tensor>, HashMap<usize, usize>)> {
        let (mut deep, mut slots, mut tables) = (Deep::default(), HashMap::new(), Vec::new());
        let mut first = 0;
        for (source, tensor) in &self.deeper {
            let (blocks, rows, width) = tensor.dims3()?;
            check_finite(tensor, &format!("deeper rows of learned context {source}"))?;
            slots.insert(*source, deep.rows.len());
            deep.rows.extend((0..rows).map(|row| {
                let at = |block: usize| (first + block * rows + row) as u32;
                (0..blocks).map(at).collect::<Vec<u32>>()
            }));
            tables.push(tensor.reshape((blocks * rows, width))?);
            first += blocks * rows;
        }
        Ok((deep, one_table(&tables)?, slots))
    }

    fn describe(&self, pieces: &[Piece]) -> String {
        let text = pieces.iter().map(|piece| match piece {
            Piece::Words(ids) => {
                let ids: Vec<u32> = ids
                    .iter()
                    .copied()
                    .filter(|&id| id != START && id != END)
                    .collect();
                Tokenizer::get().decode(&ids).trim().to_owned()
            }
            Piece::Learned { rows, .. } => format!("[{} learned]", rows.len()),
        });
        text.filter(|t| !t.is_empty()).collect::<Vec<_>>().join(" ")
    }
}

/// Prompts in rows of tables.
pub(crate) struct LaidOut {
    /// Input embeddings of frozen words, without positions, `(words, width)`.
    pub(crate) words: Tensor,
    /// Learned input embeddings, `(rows, width)`, whose numbers follow those of the words.
    pub(crate) learned: Option<Tensor>,
    /// What each prompt reads; its end is the last.
    pub(crate) prompts: Vec<Vec<Place>>,
    pub(crate) deep: Deep,
    /// `(deep rows, width)`.
    pub(crate) deep_table: Option<Tensor>,
}

impl LaidOut {
    /// Input embeddings `(prompts, longest, width)` without positions, and each prompt's last place.
    pub(crate) fn padded(&self) -> Result<(Tensor, Vec<usize>)> {
        let longest = self.prompts.iter().map(Vec::len).max().unwrap_or(0);
        let ends = self.prompts.iter().map(|places| places.len() - 1).collect();
        // What pads the shorter prompts stands behind their end token, where the causal tower never looks.
        let index: Vec<u32> = self
            .prompts
            .iter()
            .flat_map(|places| {
                let padding = std::iter::repeat(places[0].row);
                places.iter().map(|p| p.row).chain(padding).take(longest)
            })
            .collect();
        let index = Tensor::new(index, self.words.device())?;
        let width = self.words.dim(1)?;
        let tables: Vec<&Tensor> = std::iter::once(&self.words).chain(&self.learned).collect();
        let embedded = Tensor::cat(&tables, 0)?.index_select(&index, 0)?.reshape((
            self.prompts.len(),
            longest,
            width,
        ))?;
        Ok((embedded, ends))
    }
}

/// Several tables as one, if there are any.
fn one_table(tables: &[Tensor]) -> Result<Option<Tensor>> {
    Ok(match tables {
        [] => None,
        [table] => Some(table.clone()),
        tables => Some(Tensor::cat(tables, 0)?),
    })
}

/// Class names as the text tower's tokenizer sees them.
#[derive(Clone, Debug)]
pub struct ClassTokens {
    names: Vec<String>,
    name_lens: Vec<usize>,
    tokenizer: &'static Tokenizer,
    context_length: usize,
}

impl ClassTokens {
    /// Tokenises class names for a tower; underscores become spaces.
    ///
    /// # Errors
    /// [`Error::Vocabulary`] if the tower does not speak CLIP's vocabulary, [`Error::Data`] if a name has no token.
    pub fn new(tower: &TextTower, classes: &Classes) -> Result<Self> {
        let tokenizer = tower.tokenizer()?;
        let names: Vec<String> = classes
            .names()
            .iter()
            .map(|name| name.replace('_', " "))
            .collect();
        let name_lens: Vec<usize> = names
            .iter()
            .map(|name| tokenizer.encode(name).len())
            .collect();
        if let Some(i) = name_lens.iter().position(|&n| n == 0) {
            return Err(Error::Data(format!(
                "class name `{}` has no token",
                names[i]
            )));
        }
        Ok(Self {
            names,
            name_lens,
            tokenizer,
            context_length: tower.context_length(),
        })
    }

    /// Number of classes.
    pub fn len(&self) -> usize {
        self.names.len()
    }

    /// Never true.
    pub fn is_empty(&self) -> bool {
        self.names.is_empty()
    }

    /// Names with spaces for underscores.
    pub fn names(&self) -> &[String] {
        &self.names
    }

    /// Tokens of each name alone (paper: name_len).
    pub fn name_lens(&self) -> &[usize] {
        &self.name_lens
    }

    /// Tokens of `"{words} {name}."` of every class, start and end token included, not padded.
    ///
    /// The sentence is tokenised as a whole: the last word of a name may merge with the full stop.
    ///
    /// # Errors
    /// [`Error::PromptTooLong`].
    pub fn sentences(&self, words: &str) -> Result<Vec<Vec<u32>>> {
        let sentence = |name: &String| {
            self.tokenizer
                .tokenize(&format!("{words} {name}."), self.context_length)
        };
        self.names.iter().map(sentence).collect()
    }

    /// Tokens of a template with `{}` for the name.
    ///
    /// # Errors
    /// [`Error::PromptTooLong`]; [`Error::Config`] if the template has no `{}`.
    pub fn fill(&self, template: &str) -> Result<Vec<Vec<u32>>> {
        if !template.contains("{}") {
            return Err(Error::config(
                "template",
                template,
                "a template has {} where the class name goes",
            ));
        }
        let fill = |name: &String| {
            self.tokenizer
                .tokenize(&template.replace("{}", name), self.context_length)
        };
        self.names.iter().map(fill).collect()
    }

    /// One prompt per class: learned context around the class name.
    ///
    /// `ctx` is `(n_ctx, width)` for all classes or `(n_cls, n_ctx, width)`, one context per class. `words` are the
    /// context's placeholder (`X X X X`) or initial words; the first `n_ctx` of their tokens give way to the context, more
    /// of them stay frozen in front of the name.
    ///
    /// # Errors
    /// [`Error::PromptTooLong`]; [`Error::Prompt`] if a context per class meets another number of classes, or `words` are
    /// fewer than `n_ctx` tokens.
    pub fn weave(
        &self,
        ctx: &Tensor,
        words: &str,
        position: ClassTokenPosition,
    ) -> Result<Prompts> {
        let (n_ctx, per_class) = match *ctx.dims() {
            [n_ctx, _] => (n_ctx, false),
            [n_cls, n_ctx, _] if n_cls == self.len() => (n_ctx, true),
            [n_cls, ..] => {
                return Err(Error::Prompt(format!(
                    "class-specific context was trained on {n_cls} classes, not on these {}; it cannot serve other classes (train with class_specific = false)",
                    self.len()
                )));
            }
            [] => return Err(Error::Prompt("the context is a scalar".into())),
        };
        let mut prompts = Prompts::new();
        let source = prompts.learn(ctx);
        let own = |class| if per_class { class } else { 0 };
        let woven = self.woven(words, n_ctx)?;
        prompts.rows.extend(woven.around(source, own, position));
        Ok(prompts)
    }

    /// Every class with each of several contexts `(contexts, n_ctx, width)`: one context per image, per sample or per
    /// prompt. Class `c` with context `k` is prompt `k · n_cls + c`.
    ///
    /// # Errors
    /// As [`ClassTokens::weave`]; [`Error::Shape`] if `contexts` has another number of axes.
    pub fn weave_each(
        &self,
        contexts: &Tensor,
        words: &str,
        position: ClassTokenPosition,
    ) -> Result<Prompts> {
        let [n, n_ctx, _] = *contexts.dims() else {
            return Err(Error::Shape {
                what: "contexts".into(),
                found: contexts.dims().to_vec(),
                expected: vec![1, self.tokenizer.encode(words).len()],
            });
        };
        let mut prompts = Prompts::new();
        let source = prompts.learn(contexts);
        let woven = self.woven(words, n_ctx)?;
        for context in 0..n {
            prompts
                .rows
                .extend(woven.around(source, |_| context, position));
        }
        Ok(prompts)
    }

    /// The sentences of all classes, ready to take contexts of `n_ctx` vectors in the place of `words`.
    ///
    /// # Errors
    /// As [`ClassTokens::weave`].
    pub fn woven(&self, words: &str, n_ctx: usize) -> Result<Woven> {
        let found = self.tokenizer.encode(words).len();
        if found < n_ctx {
            return Err(Error::config(
                "ctx_init",
                words,
                format!(
                    "the words are {found} tokens, the context has {n_ctx}; use words that are one token each"
                ),
            ));
        }
        Ok(Woven {
            sentences: self.sentences(words)?,
            name_lens: self.name_lens.clone(),
            n_ctx,
        })
    }
}

/// Tokenised sentences of a list of classes that take any context: what methods with prompts of several kinds build from.
#[derive(Clone, Debug)]
pub struct Woven {
    sentences: Vec<Vec<u32>>,
    name_lens: Vec<usize>,
    n_ctx: usize,
}

impl Woven {
    /// One prompt per class, in order: context `own(class)` of learned tensor `source`, numbered as by [`Prompts::learn`],
    /// around the class's name.
    pub fn around(
        &self,
        source: usize,
        own: impl Fn(usize) -> usize,
        position: ClassTokenPosition,
    ) -> impl Iterator<Item = Vec<Piece>> {
        let n_ctx = self.n_ctx;
        let sentences = self.sentences.iter().zip(&self.name_lens).enumerate();
        sentences.map(move |(class, (sentence, &name_len))| {
            let context = own(class);
            let learned = |rows| Piece::Learned {
                source,
                context,
                rows,
            };
            let words = |ids: &[u32]| Piece::Words(ids.to_vec());
            let (start, suffix) = (&sentence[..1], &sentence[1 + n_ctx..]);
            let (name, rest) = suffix.split_at(name_len.min(suffix.len()));
            match position {
                ClassTokenPosition::End => vec![words(start), learned(0..n_ctx), words(suffix)],
                ClassTokenPosition::Middle => {
                    let half = n_ctx / 2;
                    vec![
                        words(start),
                        learned(0..half),
                        words(name),
                        learned(half..n_ctx),
                        words(rest),
                    ]
                }
                ClassTokenPosition::Front => {
                    vec![words(start), words(name), learned(0..n_ctx), words(rest)]
                }
            }
        })
    }
}

/// The placeholder of a context without initial words: `n` times `X`, one token each.
pub fn placeholder(n: usize) -> String {
    vec!["X"; n].join(" ")
}
