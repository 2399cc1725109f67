//! The text tower: causal, frozen, reading declared prompts.

use std::sync::Arc;

use candle_core::{DType, IndexOp, Tensor};

use super::block::{Block, Weights};
use crate::engine::buffers::Buffers;
use crate::engine::memory::Forecast;
use crate::engine::plan::{CHUNK_ROWS, Chunk, Plan};
use crate::engine::run::Wanted;
use crate::engine::{self, Tape, Tower};
use crate::ops::{LayerNorm, Linear};
use crate::prompt::{LaidOut, Prompts};
use crate::tokenizer::Tokenizer;
use crate::{Arch, Error, Result, VOCAB_SIZE};

/// What is seen on the way through a tower: called with a name (`embedded`, `block0`, ..., `ln_final`) and the hidden state.
pub type Probe<'a> = &'a mut dyn FnMut(&str, &Tensor) -> Result<()>;

/// CLIP's text tower.
#[derive(Debug)]
pub struct TextTower {
    /// `(vocab, width)`, in 16 bits where that loses nothing.
    token_embedding: Tensor,
    /// `(context_length, width)`.
    positions: Tensor,
    /// Shared with the operations that run them.
    blocks: Arc<Vec<Block>>,
    ln_final: LayerNorm,
    projection: Linear,
    width: usize,
    context_length: usize,
    vocab_size: usize,
    /// Whether its weights are learned themselves.
    learned: bool,
    /// What a pass may take at most, in bytes.
    memory_budget: Option<u64>,
    /// What passes are computed in, from one to the next.
    buffers: Arc<Buffers>,
}

impl TextTower {
    pub(crate) fn load(w: &mut Weights, arch: &Arch) -> Result<Self> {
        let width = arch.text_width;
        let token_embedding = w.take("token_embedding.weight")?;
        if token_embedding.dims() != [arch.vocab_size, width] {
            let (found, expected) = (
                token_embedding.dims().to_vec(),
                vec![arch.vocab_size, width],
            );
            return Err(Error::Shape {
                what: "tensor `token_embedding.weight`".into(),
                found,
                expected,
            });
        }
        let token_embedding = w.table(&token_embedding)?;
        let blocks = (0..arch.text_layers).map(|i| {
            Block::load(
                w,
                &format!("transformer.resblocks.{i}"),
                width,
                arch.text_heads(),
                arch.activation,
            )
        });
        Ok(Self {
            token_embedding,
            blocks: Arc::new(blocks.collect::<Result<_>>()?),
            positions: w.tensor("positional_embedding", &[arch.context_length, width])?,
            ln_final: w.layer_norm("ln_final", width)?,
            projection: w.projection("text_projection", (width, arch.embed_dim))?,
            width,
            context_length: arch.context_length,
            vocab_size: arch.vocab_size,
            learned: w.is_learned(),
            memory_budget: None,
            buffers: Arc::default(),
        })
    }

    /// Width of a token: the last axis of every learned context.
    pub fn width(&self) -> usize {
        self.width
    }

    /// Blocks of the transformer.
    pub(crate) fn blocks(&self) -> usize {
        self.blocks.len()
    }

    /// Positions, start and end token included.
    pub fn context_length(&self) -> usize {
        self.context_length
    }

    /// The tokenizer that these weights were trained with.
    ///
    /// # Errors
    /// [`Error::Vocabulary`] if the token embedding has another size than CLIP's vocabulary.
    pub fn tokenizer(&self) -> Result<&'static Tokenizer> {
        if self.vocab_size != VOCAB_SIZE {
            return Err(Error::Vocabulary {
                found: self.vocab_size,
                expected: VOCAB_SIZE,
            });
        }
        Ok(Tokenizer::get())
    }

    /// Token embeddings, `(ids.len(), width)`.
    ///
    /// # Errors
    /// [`Error::Data`] if an id is not in the vocabulary.
    pub fn embed(&self, ids: &[u32]) -> Result<Tensor> {
        if let Some(id) = ids.iter().find(|&&id| id as usize >= self.vocab_size) {
            return Err(Error::Data(format!(
                "token {id} is not in the vocabulary of {}",
                self.vocab_size
            )));
        }
        let ids = Tensor::new(ids, self.token_embedding.device())?;
        Ok(self
            .token_embedding
            .index_select(&ids, 0)?
            .to_dtype(candle_core::DType::F32)?)
    }

    /// Raw features of the prompts, `(prompts.len(), embed_dim)`: the end token's row after `ln_final`, projected.
    ///
    /// Nothing after a prompt's end token is computed, and a beginning that prompts share only once: the tower is causal.
    ///
    /// # Errors
    /// [`Error::PromptTooLong`] if a prompt has more tokens than the tower has positions, [`Error::Shape`] if a learned
    /// tensor is not as wide as the tower, [`Error::NotFinite`] if it holds NaN or an infinity, [`Error::Memory`] if the
    /// memory budget is too small whatever is recomputed, [`Error::Data`] if there are no prompts or deeper rows for more
    /// blocks than there are.
    pub fn encode(&self, prompts: &Prompts) -> Result<Tensor> {
        match self.learned {
            true => self.run_plainly(prompts, None),
            false => self.encode_in_chunks(prompts, CHUNK_ROWS),
        }
    }

    /// As [`TextTower::encode`], showing every hidden state `(prompts, tokens, width)` to `probe`.
    ///
    /// # Errors
    /// As [`TextTower::encode`], and those of `probe`.
    pub fn encode_probed(&self, prompts: &Prompts, probe: Probe<'_>) -> Result<Tensor> {
        self.run_plainly(prompts, Some(probe))
    }

    /// All positions of all prompts, padded to the longest: for towers that are trained, and to look inside.
    fn run_plainly(&self, prompts: &Prompts, mut probe: Option<Probe<'_>>) -> Result<Tensor> {
        let mut show = |name: &str, x: &Tensor| match &mut probe {
            Some(probe) => probe(name, x),
            None => Ok(()),
        };
        let laid_out = prompts.lay_out(self)?;
        if !laid_out.deep.rows.is_empty() {
            return Err(Error::Data(
                "deeper rows are known to the prompt engine only".into(),
            ));
        }
        let (embedded, ends) = laid_out.padded()?;
        let (n, tokens, width) = embedded.dims3()?;
        let mut x = embedded.broadcast_add(&self.positions.i(..tokens)?)?;
        show("embedded", &x)?;
        for (i, block) in self.blocks.iter().enumerate() {
            x = block.forward(&x, true)?;
            show(&format!("block{i}"), &x)?;
        }
        if let Some(probe) = probe {
            probe("ln_final", &self.ln_final.forward(&x)?)?;
        }
        let rows: Vec<u32> = ends
            .iter()
            .enumerate()
            .map(|(i, end)| (i * tokens + end) as u32)
            .collect();
        let rows = Tensor::new(rows, x.device())?;
        let x = x.reshape((n * tokens, width))?.index_select(&rows, 0)?;
        self.projection.forward(&self.ln_final.forward(&x)?)
    }

    /// Through the prompt engine, in chunks of about so many rows.
    pub(crate) fn encode_in_chunks(&self, prompts: &Prompts, chunk_rows: usize) -> Result<Tensor> {
        let laid_out = prompts.lay_out(self)?;
        let (plan, wanted) = Self::plan(&laid_out, chunk_rows)?;
        let forecast = self.forecast_of(&laid_out, &plan, wanted)?;
        let device = laid_out.words.device().clone();
        let words = laid_out.words.flatten_all()?.to_vec1()?;
        drop(laid_out.words);
        let or_none = |table: Option<Tensor>| match table {
            Some(table) => Ok(table),
            None => Tensor::zeros((1, self.width), DType::F32, &device),
        };
        let tower = Tower {
            blocks: self.blocks.clone(),
            words,
            positions: Arc::new(self.positions.flatten_all()?.to_vec1()?),
            plan,
            deep: laid_out.deep,
            width: self.width,
            wanted,
            buffers: self.buffers.clone(),
            forecast,
            tape: Tape::default(),
        };
        let ends = tower.apply(&or_none(laid_out.learned)?, &or_none(laid_out.deep_table)?)?;
        self.projection.forward(&self.ln_final.forward(&ends)?)
    }

    /// How the prompts are run, and which of their rows need gradients.
    fn plan(laid_out: &LaidOut, chunk_rows: usize) -> Result<(Plan, Wanted)> {
        let plan = Plan::new(&laid_out.prompts, chunk_rows);
        let words = laid_out.words.dim(0)?;
        let tables = [&laid_out.learned, &laid_out.deep_table];
        let tracked = tables.into_iter().flatten().any(Tensor::track_op);
        let learned = |chunks: &[Chunk]| {
            let mut places = chunks.iter().flat_map(|c| &plan.places[c.range()]);
            places.any(|p| p.row as usize >= words || p.deep > 0)
        };
        let wanted = Wanted {
            beginnings: tracked && learned(&plan.beginnings),
            endings: tracked && learned(&plan.endings),
        };
        Ok((plan, wanted))
    }

    fn forecast_of(&self, laid_out: &LaidOut, plan: &Plan, wanted: Wanted) -> Result<Forecast> {
        let rows = |t: &Option<Tensor>| t.as_ref().map_or(Ok(0), |t| t.dim(0));
        engine::forecast(
            &self.blocks,
            plan,
            laid_out.words.dim(0)?,
            &laid_out.deep,
            self.width,
            wanted,
            rows(&laid_out.learned)?,
            rows(&laid_out.deep_table)?,
            self.memory_budget,
        )
    }

    /// What a forward and backward pass over the prompts will take, known before anything runs; where no gradient is tracked,
    /// a forward pass.
    ///
    /// # Errors
    /// As [`TextTower::encode`]; [`Error::Memory`] if the budget is too small whatever is recomputed.
    pub fn forecast(&self, prompts: &Prompts) -> Result<Forecast> {
        let laid_out = prompts.lay_out(self)?;
        let (plan, wanted) = Self::plan(&laid_out, CHUNK_ROWS)?;
        self.forecast_of(&laid_out, &plan, wanted)
    }

    /// See [`crate::Clip::set_memory_budget`].
    pub(crate) fn set_memory_budget(&mut self, bytes: Option<u64>) {
        self.memory_budget = bytes;
        self.buffers.clear();
    }

    /// Bytes of frozen weights held.
    pub fn bytes(&self) -> usize {
        let embedding =
            self.token_embedding.elem_count() * self.token_embedding.dtype().size_in_bytes();
        embedding + self.projection.bytes() + self.blocks.iter().map(Block::bytes).sum::<usize>()
    }
}
