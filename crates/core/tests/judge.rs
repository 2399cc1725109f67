//! The text tower against a slow, plain one: all 77 positions, candle's own operations, autograd through everything.

mod plain;

use candle_core::{Device, IndexOp, Tensor, Var};
use cliptune_core::checkpoint::random;
use cliptune_core::prompt::{Piece, Prompts};
use cliptune_core::rng::Rng;
use cliptune_core::tokenizer::{END, START};
use cliptune_core::{Activation, Arch, Clip, Gradients, Params, Storage, VisionArch};
use plain::{Plain, Tensors, block, error, layer_norm};
use proptest::prelude::*;

const CONTEXT: usize = 77;
const LAYERS: usize = 3;

fn arch(activation: Activation, text_width: usize) -> Arch {
    Arch {
        embed_dim: 24,
        image_resolution: 32,
        vision: VisionArch::Vit {
            layers: 1,
            width: 64,
            patch_size: 16,
        },
        context_length: CONTEXT,
        vocab_size: 49_408,
        text_width,
        text_layers: LAYERS,
        activation,
    }
}

/// Rows `(blocks, n_ctx, width)` that stand in each prompt from a place on, at the input of block 1, 2, ...
type Deeper<'a> = Option<(&'a Tensor, &'a [usize])>;

/// Features of prompts given as full rows of input embeddings, `(n, 77, width)`.
fn plain(
    w: &Tensors,
    activation: Activation,
    embedded: &Tensor,
    ends: &[usize],
    deeper: Deeper<'_>,
) -> Plain<Tensor> {
    let mut x = embedded.broadcast_add(&w["positional_embedding"])?;
    for i in 0..LAYERS {
        if let Some((rows, starts)) = deeper.filter(|(rows, _)| i > 0 && i <= rows.dims()[0]) {
            let rows = rows.i(i - 1)?;
            let replaced: Plain<Vec<Tensor>> = starts
                .iter()
                .enumerate()
                .map(|(prompt, &start)| {
                    let after = start + rows.dims()[0];
                    Tensor::cat(
                        &[&x.i((prompt, ..start))?, &rows, &x.i((prompt, after..))?],
                        0,
                    )
                })
                .collect();
            x = Tensor::stack(&replaced?, 0)?;
        }
        x = block(
            w,
            &format!("transformer.resblocks.{i}"),
            activation,
            true,
            &x,
        )?;
    }
    let x = layer_norm(w, "ln_final", &x)?;
    let rows: Plain<Vec<Tensor>> = ends
        .iter()
        .enumerate()
        .map(|(i, &end)| x.i((i, end)))
        .collect();
    Tensor::stack(&rows?, 0)?.matmul(&w["text_projection"])
}

/// Lengths of class names: few, whose prompts fit into one chunk of the plan, or so many that what they begin with is run first
/// and kept (40 prompts with 3 to 5 rows of their own are more than the 120 rows of a chunk).
fn names() -> impl Strategy<Value = Vec<usize>> {
    let lengths = |count| prop::collection::vec(1usize..5, count);
    prop_oneof![3 => lengths(1..5), 1 => lengths(40..60)]
}

/// A word of class `c`, whose name has `words` of them. Longer names share their first word with every fifth of the others.
fn word(c: usize, words: usize, at: usize) -> u32 {
    match at {
        0 if words > 1 => 900 + (c % 5) as u32,
        _ => (1000 + 10 * c + at) as u32,
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]

    /// Random prompts: words, learned rows of a shared and of a per-prompt tensor, in any order and number.
    #[test]
    fn features_and_gradients_equal_the_plain_computation(
        shapes in prop::collection::vec((0usize..6, 0usize..8, 1usize..30), 1..4),
        heads in 1usize..3, gelu in any::<bool>(), seed in 0u64..1000,
    ) {
        let activation = if gelu { Activation::Gelu } else { Activation::QuickGelu };
        let width = 64 * heads;
        let checkpoint = random(&arch(activation, width), seed)?;
        let w = checkpoint.tensors.clone();
        let clip = Clip::from_checkpoint(checkpoint, Storage::F32)?;
        let mut rng = Rng::stream(seed, "judge", &[]);
        let mut draw = |shape: &[usize]| -> Plain<Tensor> {
            let values = rng.normal(shape.iter().product());
            Tensor::from_vec(values.into_iter().map(|x| x as f32 * 0.3).collect::<Vec<_>>(), shape, &Device::Cpu)
        };
        let (shared, own) = (draw(&[8, width])?, draw(&[shapes.len(), 8, width])?);
        let weights = draw(&[shapes.len(), 24])?;
        let mut params = Params::new(0);
        let (shared_param, own_param) = (params.copied("shared", &shared)?, params.copied("own", &own)?);
        let (shared_var, own_var) = (Var::from_tensor(&shared)?, Var::from_tensor(&own)?);

        let mut prompts = Prompts::new();
        let sources = [prompts.learn(shared_param.tensor()), prompts.learn(own_param.tensor())];
        let (mut rows, mut ends) = (Vec::new(), Vec::new());
        for (i, &(before, from, words)) in shapes.iter().enumerate() {
            let ids: Vec<u32> = (0..before + words).map(|k| ((seed as usize * 31 + i * 7 + k * 997) % 49_000) as u32).collect();
            let (head, tail) = ids.split_at(before);
            let opening: Vec<u32> = std::iter::once(START).chain(head.iter().copied()).collect();
            let closing: Vec<u32> = tail.iter().copied().chain([END]).collect();
            let learned = |which: usize, context, rows| Piece::Learned { source: sources[which], context, rows };
            prompts.push(vec![
                Piece::Words(opening.clone()), learned(0, 0, 0..from), learned(1, i, from..8), Piece::Words(closing.clone()),
            ]);
            let embed = |ids: &[u32]| w["token_embedding.weight"].index_select(&Tensor::new(ids, &Device::Cpu)?, 0);
            let length = opening.len() + 8 + closing.len();
            ends.push(length - 1);
            let mut pieces = vec![embed(&opening)?];
            if from > 0 {
                pieces.push(shared_var.as_tensor().i(..from)?);
            }
            pieces.push(own_var.as_tensor().i((i, from..8))?);
            pieces.push(embed(&closing)?);
            pieces.push(embed(&vec![0; CONTEXT - length])?);
            rows.push(Tensor::cat(&pieces, 0)?);
        }
        let theirs = plain(&w, activation, &Tensor::stack(&rows, 0)?, &ends, None)?;
        let store = (&theirs * &weights)?.sum_all()?.backward()?;
        let ours = clip.text().encode(&prompts)?;
        let gradients = Gradients::of(&(&ours * &weights)?.sum_all()?, &params)?;

        prop_assert!(error(&ours, &theirs)? < 1e-5, "features: {}", error(&ours, &theirs)?);
        for (name, var) in [("shared", &shared_var), ("own", &own_var)] {
            match (gradients.get(name), store.get(var.as_tensor())) {
                (Some(ours), Some(theirs)) => prop_assert!(error(ours, theirs)? < 1e-5, "{name}: {}", error(ours, theirs)?),
                // A learned tensor of which no row is used.
                (ours, None) => prop_assert!(ours.is_none_or(|g| error(g, &g.zeros_like().unwrap()).unwrap() == 0.0)),
                (None, Some(_)) => prop_assert!(false, "{name} got no gradient"),
            }
        }
    }

    /// Several contexts before, inside or behind every class's name, replaced again at deeper blocks or not: what CoOp,
    /// PLOT, DualCoOp, CoCoOp and MaPLe declare.
    #[test]
    fn groups_and_deeper_rows_equal_the_plain_computation(
        contexts in 1usize..4, n_ctx in 1usize..6, names in names(),
        before in 0usize..3, split in 0usize..6, depth in 0usize..LAYERS, start in any::<bool>(), seed in 0u64..1000,
    ) {
        let width = 128;
        let checkpoint = random(&arch(Activation::QuickGelu, width), seed)?;
        let w = checkpoint.tensors.clone();
        let clip = Clip::from_checkpoint(checkpoint, Storage::F32)?;
        let mut rng = Rng::stream(seed, "groups", &[]);
        let mut draw = |shape: &[usize]| -> Plain<Tensor> {
            let values = rng.normal(shape.iter().product());
            Tensor::from_vec(values.into_iter().map(|x| x as f32 * 0.3).collect::<Vec<_>>(), shape, &Device::Cpu)
        };
        let ctx = draw(&[contexts, n_ctx, width])?;
        let deeper = draw(&[depth.max(1), n_ctx, width])?;
        let weights = draw(&[contexts * names.len(), 24])?;
        let mut params = Params::new(0);
        let (ctx_param, deeper_param) = (params.copied("ctx", &ctx)?, params.copied("deeper", &deeper)?);
        let (ctx_var, deeper_var) = (Var::from_tensor(&ctx)?, Var::from_tensor(&deeper)?);
        // Deeper rows belong to the whole context; a context in two parts is for shallow prompts.
        let split = if depth > 0 { n_ctx } else { split.min(n_ctx) };

        let mut prompts = Prompts::new();
        let source = prompts.learn(ctx_param.tensor());
        if depth > 0 {
            prompts.deepen(source, deeper_param.tensor())?;
        }
        let embed = |ids: &[u32]| w["token_embedding.weight"].index_select(&Tensor::new(ids, &Device::Cpu)?, 0);
        // Without a start token a prefix may consist of learned rows alone.
        let opening: Vec<u32> = start.then_some(START).into_iter().chain((0..before).map(|i| 500 + i as u32)).collect();
        let (mut rows, mut ends, mut starts) = (Vec::new(), Vec::new(), Vec::new());
        for context in 0..contexts {
            for (c, &name) in names.iter().enumerate() {
                let name: Vec<u32> = (0..name).map(|i| word(c, name, i)).collect();
                let closing = vec![269, END];
                let learned = |rows| Piece::Learned { source, context, rows };
                prompts.push(vec![
                    Piece::Words(opening.clone()), learned(0..split), Piece::Words(name.clone()),
                    learned(split..n_ctx), Piece::Words(closing.clone()),
                ]);
                let length = opening.len() + n_ctx + name.len() + closing.len();
                ends.push(length - 1);
                starts.push(opening.len());
                let mut pieces = Vec::new();
                if !opening.is_empty() {
                    pieces.push(embed(&opening)?);
                }
                for (range, words) in [(0..split, &name), (split..n_ctx, &closing)] {
                    if !range.is_empty() {
                        pieces.push(ctx_var.as_tensor().i((context, range))?);
                    }
                    pieces.push(embed(words)?);
                }
                pieces.push(embed(&vec![0; CONTEXT - length])?);
                rows.push(Tensor::cat(&pieces, 0)?);
            }
        }
        let deep = (depth > 0).then_some((deeper_var.as_tensor(), starts.as_slice()));
        let theirs = plain(&w, Activation::QuickGelu, &Tensor::stack(&rows, 0)?, &ends, deep)?;
        let store = (&theirs * &weights)?.sum_all()?.backward()?;
        let ours = clip.text().encode(&prompts)?;
        let gradients = Gradients::of(&(&ours * &weights)?.sum_all()?, &params)?;
        prop_assert!(error(&ours, &theirs)? < 1e-5, "features: {}", error(&ours, &theirs)?);
        for (name, var) in [("ctx", &ctx_var), ("deeper", &deeper_var)] {
            match (gradients.get(name), store.get(var.as_tensor())) {
                (Some(ours), Some(theirs)) => prop_assert!(error(ours, theirs)? < 1e-5, "{name}: {}", error(ours, theirs)?),
                (None, None) => prop_assert!(name == "deeper" && depth == 0),
                (ours, theirs) => prop_assert!(false, "{name}: ours {}, theirs {}", ours.is_some(), theirs.is_some()),
            }
        }
    }
}
