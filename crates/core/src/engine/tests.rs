//! What a result may depend on, and what not. That it is right is judged in `tests/judge.rs`.

use candle_core::{Device, Tensor};
use proptest::prelude::*;
use rayon::ThreadPoolBuilder;

use crate::checkpoint::random;
use crate::clip::Policy;
use crate::prompt::{Piece, Prompts};
use crate::rng::Rng;
use crate::tokenizer::{END, START};
use crate::{Activation, Arch, Clip, Error, Gradients, Params, Storage, VisionArch};

const WIDTH: usize = 128;
const LAYERS: usize = 3;

fn clip(seed: u64) -> Clip {
    clip_of(WIDTH, LAYERS, seed)
}

fn clip_of(text_width: usize, text_layers: usize, seed: u64) -> Clip {
    let arch = Arch {
        embed_dim: 24,
        image_resolution: 32,
        vision: VisionArch::Vit {
            layers: 1,
            width: 64,
            patch_size: 16,
        },
        context_length: 40,
        vocab_size: 49_408,
        text_width,
        text_layers,
        activation: Activation::QuickGelu,
    };
    Clip::from_checkpoint(random(&arch, seed).unwrap(), Storage::F32).unwrap()
}

fn numbers(shape: &[usize], seed: u64) -> Tensor {
    let values = Rng::stream(seed, "engine", &[]).normal(shape.iter().product());
    let values: Vec<f32> = values.into_iter().map(|x| x as f32 * 0.3).collect();
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
}

/// Several contexts in front of every name, or behind it, maybe replaced at deeper blocks. Three names in a row begin alike.
struct Case {
    params: Params,
    prompts: Prompts,
}

impl Case {
    fn new(contexts: usize, names: &[usize], behind: bool, depth: usize, seed: u64) -> Self {
        let n_ctx = 3;
        let mut params = Params::new(0);
        let ctx = params
            .copied("ctx", &numbers(&[contexts, n_ctx, WIDTH], seed))
            .unwrap();
        let mut prompts = Prompts::new();
        let source = prompts.learn(ctx.tensor());
        if depth > 0 {
            let deeper = numbers(&[depth, n_ctx, WIDTH], seed ^ 1);
            prompts
                .deepen(source, params.copied("deeper", &deeper).unwrap().tensor())
                .unwrap();
        }
        for context in 0..contexts {
            for (i, &name) in names.iter().enumerate() {
                let rest = (1..name).map(|k| (600 + 40 * i + k) as u32);
                let name = std::iter::once(500 + i as u32 / 3).chain(rest).collect();
                let (name, ctx) = (
                    Piece::Words(name),
                    Piece::Learned {
                        source,
                        context,
                        rows: 0..n_ctx,
                    },
                );
                let [first, second] = if behind { [name, ctx] } else { [ctx, name] };
                prompts.push(vec![
                    Piece::Words(vec![START]),
                    first,
                    second,
                    Piece::Words(vec![269, END]),
                ]);
            }
        }
        Self { params, prompts }
    }

    /// Features, then gradients, as numbers.
    fn run(&self, clip: &Clip, chunk_rows: usize, threads: usize) -> Vec<Vec<f32>> {
        let pool = ThreadPoolBuilder::new()
            .num_threads(threads)
            .build()
            .unwrap();
        pool.install(|| {
            let features = clip
                .text()
                .encode_in_chunks(&self.prompts, chunk_rows)
                .unwrap();
            let weights = numbers(features.dims(), 7);
            let loss = (&features * weights).unwrap().sum_all().unwrap();
            let gradients = Gradients::of(&loss, &self.params).unwrap();
            std::iter::once(&features)
                .chain(gradients.iter().filter_map(|(_, g)| g))
                .map(|t| t.flatten_all().unwrap().to_vec1().unwrap())
                .collect()
        })
    }
}

fn close(a: &[Vec<f32>], b: &[Vec<f32>]) -> bool {
    let largest = |x: &[f32]| x.iter().fold(1e-20f32, |m, x| m.max(x.abs()));
    a.len() == b.len()
        && a.iter().zip(b).all(|(a, b)| {
            let limit = 1e-5 * largest(b);
            a.iter().zip(b).all(|(a, b)| (a - b).abs() < limit)
        })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]

    /// Threads and the memory budget change no bit, the size of the chunks only the last ones.
    #[test]
    fn results_depend_on_the_prompts_alone(
        contexts in 1usize..4, names in prop::collection::vec(1usize..6, 1..12), behind in any::<bool>(),
        depth in 0usize..LAYERS, chunk_rows in 1usize..60, seed in 0u64..1000,
    ) {
        let mut clip = clip(seed);
        let case = Case::new(contexts, &names, behind, depth, seed);
        let expected = case.run(&clip, chunk_rows, 1);
        prop_assert_eq!(expected.len(), if depth > 0 { 3 } else { 2 });
        for threads in [2, 4] {
            prop_assert_eq!(&case.run(&clip, chunk_rows, threads), &expected);
        }
        // Less than all that is to be saved: two passes, on as many threads as the memory allows.
        clip.set_memory_budget(Some(1));
        let least = match clip.text().encode_in_chunks(&case.prompts, chunk_rows) {
            Err(Error::Memory { needed, budget: 1 }) => needed,
            other => return Err(TestCaseError::fail(format!("{other:?}"))),
        };
        for (budget, threads) in [(least, 1), (least, 3), (least + least / 2, 3)] {
            clip.set_memory_budget(Some(budget));
            prop_assert_eq!(&case.run(&clip, chunk_rows, threads), &expected);
        }
        clip.set_memory_budget(None);
        prop_assert!(close(&case.run(&clip, 120, 2), &expected));
    }
}

/// CoOp's prompts: one context of 16 in front of `n` of 1,000 names of two words, of which there are 25 and 40.
fn coop(n: usize, width: usize) -> Prompts {
    let mut prompts = Prompts::new();
    let ctx = candle_core::Var::from_tensor(&numbers(&[16, width], 1)).unwrap();
    let source = prompts.learn(&ctx);
    for i in 0..n {
        let name = [600 + (i + i / 40) % 25, 1000 + i % 40].map(|id| id as u32);
        prompts.push(vec![
            Piece::Words(vec![START]),
            Piece::Learned {
                source,
                context: 0,
                rows: 0..16,
            },
            Piece::Words([&name[..], &[269, END]].concat()),
        ]);
    }
    prompts
}

#[test]
fn two_passes_take_memory_that_hardly_grows_with_the_prompts() {
    let width = 128;
    // As deep as published towers: what grows are features, what does not is what chunks keep of every block.
    let mut clip = clip_of(width, 12, 1);
    let pool = ThreadPoolBuilder::new().num_threads(2).build().unwrap();
    let mut forecasts = |n: usize| {
        let prompts = coop(n, width);
        pool.install(|| {
            clip.set_memory_budget(None);
            let saved = clip.text().forecast(&prompts).unwrap();
            clip.set_memory_budget(Some(saved.step - 1));
            (saved, clip.text().forecast(&prompts).unwrap())
        })
    };
    let ((all_of_few, few), (all_of_many, many)) = (forecasts(100), forecasts(1000));
    for (saved, twice) in [(all_of_few, few), (all_of_many, many)] {
        assert_eq!(saved.policy, Policy::SaveAll);
        assert_eq!(
            (twice.policy, twice.chunks_at_a_time),
            (Policy::TwoPasses, 2)
        );
        assert_eq!(twice.rows, saved.rows);
    }
    let ratio = many.bytes() as f64 / few.bytes() as f64;
    assert!(ratio <= 1.5, "{few:?} {many:?}");
    assert!(5 * many.step < all_of_many.step, "{many:?} {all_of_many:?}");
    // Once and then as often as there are chunks: 17 rows of the context; of each name the second word, `.` and [EOS].
    let rows = 17 + 25 + 3000;
    assert!((rows..rows + 28).contains(&many.rows), "{}", many.rows);
}

#[test]
fn what_is_wrong_with_learned_tensors_is_said_before_any_work() {
    let clip = clip(1);
    let prompt = |ctx: &Tensor| {
        let mut prompts = Prompts::new();
        let source = prompts.learn(ctx);
        prompts.push(vec![
            Piece::Words(vec![START]),
            Piece::Learned {
                source,
                context: 0,
                rows: 0..1,
            },
            Piece::Words(vec![END]),
        ]);
        clip.text().encode(&prompts)
    };
    let mut values = vec![0.5f32; WIDTH];
    values[3] = f32::NAN;
    let error = prompt(&Tensor::from_vec(values, (1, WIDTH), &Device::Cpu).unwrap()).unwrap_err();
    assert!(error.to_string().contains("learned context 0"), "{error}");
    let error = prompt(&numbers(&[1, WIDTH + 64], 1)).unwrap_err();
    assert!(matches!(error, Error::Shape { .. }), "{error}");
}
