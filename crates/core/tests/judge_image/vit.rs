//! The vision transformer with visual prompts.

use crate::plain::{Plain, Tensors, block, error, layer_norm, linear};
use candle_core::{DType, Device, IndexOp, Tensor, Var};
use cliptune_core::checkpoint::random;
use cliptune_core::clip::Policy;
use cliptune_core::rng::Rng;
use cliptune_core::visual_prompt::{BlockNorms, NormWeights, Tokens, VisualPrompts};
use cliptune_core::{Activation, Arch, Clip, Error, Gradients, Param, Params, Storage, VisionArch};
use proptest::prelude::*;
use rayon::ThreadPoolBuilder;

const EMBED: usize = 24;
const PATCH: usize = 8;
const BLOCKS: usize = 4;
/// The learned tensor that is not a prompt.
const PIXELS: &str = "pixels";

fn arch(side: usize, width: usize, layers: usize, activation: Activation) -> Arch {
    Arch {
        embed_dim: EMBED,
        image_resolution: side,
        vision: VisionArch::Vit {
            layers,
            width,
            patch_size: PATCH,
        },
        context_length: 8,
        vocab_size: 8,
        text_width: 64,
        text_layers: 1,
        activation,
    }
}

fn drawn(rng: &mut Rng, shape: &[usize], size: f64) -> Plain<Tensor> {
    let values = rng.normal(shape.iter().product());
    let values: Vec<f32> = values.into_iter().map(|x| (x * size) as f32).collect();
    Tensor::from_vec(values, shape, &Device::Cpu)
}

/// Whose tokens join.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    Shared,
    PerImage,
    PerSet,
}

/// What happens at a block.
#[derive(Clone, Debug)]
struct Event {
    kind: Kind,
    n: usize,
    replaces: bool,
    learned: bool,
}

/// Where the authors' code lets prompt tokens stand.
#[derive(Clone, Copy, Debug)]
enum Position {
    BeforeAll,
    BehindClass,
    BehindPatches,
}

#[derive(Clone, Debug)]
struct Case {
    heads: usize,
    activation: Activation,
    images: usize,
    sets: usize,
    position: Position,
    before_ln_pre: Option<Event>,
    /// By block; an event without tokens that replaces drops what is there.
    blocks: Vec<Option<Event>>,
    norms: bool,
    pixels: bool,
    dense: bool,
    seed: u64,
}

fn kind() -> impl Strategy<Value = Kind> {
    prop_oneof![
        4 => Just(Kind::Shared), 2 => Just(Kind::PerImage), 1 => Just(Kind::PerSet),
    ]
}

fn event() -> impl Strategy<Value = Option<Event>> {
    let event = (kind(), 0usize..4, any::<bool>(), prop::bool::weighted(0.8));
    prop::option::of(event.prop_map(|(kind, n, replaces, learned)| Event {
        kind,
        n,
        replaces,
        learned,
    }))
}

fn case() -> impl Strategy<Value = Case> {
    let position = prop_oneof![
        Just(Position::BeforeAll),
        Just(Position::BehindClass),
        Just(Position::BehindPatches)
    ];
    let sizes = (1usize..3, any::<bool>(), 1usize..4, 1usize..3, position);
    let what = (event(), prop::collection::vec(event(), BLOCKS));
    let more = (
        prop::bool::weighted(0.3),
        prop::bool::weighted(0.3),
        prop::bool::weighted(0.3),
        0u64..1000,
    );
    (sizes, what, more).prop_map(|(sizes, what, more)| Case {
        heads: sizes.0,
        activation: match sizes.1 {
            true => Activation::Gelu,
            false => Activation::QuickGelu,
        },
        images: sizes.2,
        sets: sizes.3,
        position: sizes.4,
        before_ln_pre: what.0,
        blocks: what.1,
        norms: more.0,
        pixels: more.1,
        dense: more.2,
        seed: more.3,
    })
}

/// A case with its tensors: what both sides start from.
struct Setting {
    case: Case,
    clip: Clip,
    w: Tensors,
    /// By event: its name, tensor and block; none joins before `ln_pre`.
    tokens: Vec<(String, Tensor, Option<usize>, Event)>,
    pixels: Tensor,
    norms: Vec<(String, Tensor)>,
}

impl Setting {
    fn new(case: &Case) -> Plain<Self> {
        let width = 64 * case.heads;
        let checkpoint =
            random(&arch(3 * PATCH, width, BLOCKS, case.activation), case.seed).unwrap();
        let w = checkpoint.tensors.clone();
        let clip = Clip::from_checkpoint(checkpoint, Storage::F32).unwrap();
        let mut rng = Rng::stream(case.seed, "judge", &[]);
        let events = std::iter::once((None, &case.before_ln_pre))
            .chain(case.blocks.iter().enumerate().map(|(i, e)| (Some(i), e)));
        let mut tokens = Vec::new();
        for (block, event) in events {
            let Some(event) = event else { continue };
            let shape = match event.kind {
                Kind::Shared => vec![event.n, width],
                Kind::PerImage => vec![case.images, event.n, width],
                Kind::PerSet => vec![case.sets, event.n, width],
            };
            if event.n == 0 {
                continue;
            }
            let name = format!("tokens {block:?}");
            tokens.push((name, drawn(&mut rng, &shape, 0.5)?, block, event.clone()));
        }
        let pixels = drawn(&mut rng, &[case.images, 3, 3 * PATCH, 3 * PATCH], 1.0)?;
        let mut norms = Vec::new();
        for block in 0..BLOCKS {
            for part in ["ln_1.weight", "ln_1.bias", "ln_2.weight", "ln_2.bias"] {
                let name = format!("visual.transformer.resblocks.{block}.{part}");
                let value = (&w[&name] + drawn(&mut rng, &[width], 0.2)?)?;
                norms.push((name, value));
            }
        }
        Ok(Self {
            case: case.clone(),
            clip,
            w,
            tokens,
            pixels,
            norms,
        })
    }

    /// Parameters and the declaration.
    fn declare(&self) -> (Params, VisualPrompts, Tensor) {
        let mut params = Params::new(0);
        let mut learn = |name: &str, value: &Tensor, learned: bool| match learned {
            true => params
                .copied(name, value)
                .as_ref()
                .map(Param::tensor)
                .cloned()
                .unwrap(),
            false => value.clone(),
        };
        let mut prompts = VisualPrompts::new();
        for (block, event) in self.case.blocks.iter().enumerate() {
            if event.as_ref().is_some_and(|e| e.replaces) {
                prompts.remove(block);
            }
        }
        for (name, value, block, event) in &self.tokens {
            let tensor = learn(name, value, event.learned);
            let tokens = match event.kind {
                Kind::Shared => Tokens::Shared(tensor),
                Kind::PerImage => Tokens::PerImage(tensor),
                Kind::PerSet => Tokens::PerSet(tensor),
            };
            match (block, event.replaces) {
                (None, _) => prompts.join_before_ln_pre(tokens),
                (Some(block), false) => prompts.join(*block, tokens),
                (Some(block), true) => prompts.replace(*block, tokens),
            }
        }
        if self.case.norms {
            let mut all = self
                .norms
                .iter()
                .map(|(name, value)| learn(name, value, true));
            let mut next = || NormWeights {
                weight: all.next().unwrap(),
                bias: all.next().unwrap(),
            };
            let norms = (0..BLOCKS).map(|_| BlockNorms {
                ln_1: next(),
                ln_2: next(),
            });
            prompts.tune_layer_norms(norms.collect());
        }
        let pixels = learn(PIXELS, &self.pixels, self.case.pixels);
        (params, prompts, pixels)
    }

    /// Features of our tower, with the case's leading axes.
    fn encode(&self, images: &Tensor, prompts: &VisualPrompts) -> cliptune_core::Result<Tensor> {
        match self.case.dense {
            true => self.clip.image().encode_prompted_dense(images, prompts),
            false => self.clip.image().encode_prompted(images, prompts),
        }
    }

    fn in_sets(&self) -> bool {
        self.tokens
            .iter()
            .any(|(.., event)| event.kind == Kind::PerSet)
    }

    /// The plain computation: features, and the variables by name.
    fn plain(&self) -> Plain<(Tensor, Vec<(String, Var)>)> {
        let (case, width) = (&self.case, 64 * self.case.heads);
        let mut w = self.w.clone();
        let mut vars = Vec::new();
        let mut tokens = Vec::new();
        for (name, value, block, event) in &self.tokens {
            let var = Var::from_tensor(value)?;
            tokens.push((var.as_tensor().clone(), *block, event));
            if event.learned {
                vars.push((name.clone(), var));
            }
        }
        if case.norms {
            for (name, value) in &self.norms {
                let var = Var::from_tensor(value)?;
                w.insert(name.clone(), var.as_tensor().clone());
                vars.push((name.clone(), var));
            }
        }
        let pixels = Var::from_tensor(&self.pixels)?;
        let patches = pixels
            .as_tensor()
            .reshape(&[case.images, 3, 3, PATCH, 3, PATCH][..])?
            .permute([0, 2, 4, 1, 3, 5])?
            .reshape((case.images, 9, 3 * PATCH * PATCH))?;
        let conv = w["visual.conv1.weight"].reshape((width, 3 * PATCH * PATCH))?;
        let patches = patches.broadcast_matmul(&conv.t()?)?;
        if case.pixels {
            vars.push((PIXELS.into(), pixels));
        }
        let class = w["visual.class_embedding"]
            .reshape((1, 1, width))?
            .repeat((case.images, 1, 1))?;
        let own = Tensor::cat(&[&class, &patches], 1)?
            .broadcast_add(&w["visual.positional_embedding"])?;
        let sets = if self.in_sets() { case.sets } else { 1 };
        let mut features = Vec::new();
        for set in 0..sets {
            let of = |tensor: &Tensor, kind: Kind| match kind {
                Kind::Shared => tensor.unsqueeze(0)?.repeat((case.images, 1, 1)),
                Kind::PerImage => Ok(tensor.clone()),
                Kind::PerSet => tensor.i(set)?.unsqueeze(0)?.repeat((case.images, 1, 1)),
            };
            let join = |there: Option<Tensor>, block: Option<usize>| -> Plain<Option<Tensor>> {
                let joining = tokens.iter().filter(|(_, b, _)| *b == block);
                let mut all: Vec<Tensor> = there.into_iter().collect();
                for (tensor, _, event) in joining {
                    all.push(of(tensor, event.kind)?);
                }
                match all.is_empty() {
                    true => Ok(None),
                    false => Tensor::cat(&all, 1).map(Some),
                }
            };
            let ln_pre = |x: &Tensor| layer_norm(&w, "visual.ln_pre", x);
            let (mut own, mut prompts) = self.together(own.clone(), join(None, None)?, &ln_pre)?;
            for i in 0..BLOCKS {
                if case.blocks[i].as_ref().is_some_and(|e| e.replaces) && i > 0 {
                    prompts = None;
                }
                prompts = join(prompts, Some(i))?;
                let name = format!("visual.transformer.resblocks.{i}");
                (own, prompts) = self.together(own, prompts, &|x| {
                    block(&w, &name, case.activation, false, x)
                })?;
            }
            let read = if case.dense { own } else { own.i((.., 0))? };
            let read = layer_norm(&w, "visual.ln_post", &read)?;
            features.push(read.broadcast_matmul(&w["visual.proj"])?);
        }
        let features = match self.in_sets() {
            true => Tensor::stack(&features, 0)?,
            false => features.remove(0),
        };
        Ok((features, vars))
    }

    /// Applies `f` to all tokens in the order that the case says.
    fn together(
        &self,
        own: Tensor,
        prompts: Option<Tensor>,
        f: &dyn Fn(&Tensor) -> Plain<Tensor>,
    ) -> Plain<(Tensor, Option<Tensor>)> {
        let Some(prompts) = prompts else {
            return Ok((f(&own)?, None));
        };
        let (t, n) = (own.dim(1)?, prompts.dim(1)?);
        Ok(match self.case.position {
            Position::BeforeAll => {
                let x = f(&Tensor::cat(&[&prompts, &own], 1)?)?;
                (x.narrow(1, n, t)?, Some(x.narrow(1, 0, n)?))
            }
            Position::BehindClass => {
                let (class, patches) = (own.narrow(1, 0, 1)?, own.narrow(1, 1, t - 1)?);
                let x = f(&Tensor::cat(&[&class, &prompts, &patches], 1)?)?;
                let own = Tensor::cat(&[&x.narrow(1, 0, 1)?, &x.narrow(1, 1 + n, t - 1)?], 1)?;
                (own, Some(x.narrow(1, 1, n)?))
            }
            Position::BehindPatches => {
                let x = f(&Tensor::cat(&[&own, &prompts], 1)?)?;
                (x.narrow(1, 0, t)?, Some(x.narrow(1, t, n)?))
            }
        })
    }

    /// Features, then gradients in the order of the parameters.
    fn run(&self, threads: usize) -> Vec<(String, Tensor)> {
        let pool = ThreadPoolBuilder::new()
            .num_threads(threads)
            .build()
            .unwrap();
        pool.install(|| {
            let (params, prompts, pixels) = self.declare();
            let features = self.encode(&pixels, &prompts).unwrap();
            let loss = (&features * self.weights(&features))
                .unwrap()
                .sum_all()
                .unwrap();
            let mut all = vec![("features".to_owned(), features)];
            if !params.is_empty() {
                let gradients = Gradients::of(&loss, &params).unwrap();
                let gradients = gradients.iter().filter_map(|(name, g)| Some((name, g?)));
                all.extend(gradients.map(|(name, g)| (name.to_owned(), g.clone())));
            }
            all
        })
    }

    fn weights(&self, features: &Tensor) -> Tensor {
        let mut rng = Rng::stream(self.case.seed, "weights", &[]);
        drawn(&mut rng, features.dims(), 1.0).unwrap()
    }
}

fn bits(all: &[(String, Tensor)]) -> Vec<(String, Vec<u32>)> {
    let bits = |t: &Tensor| -> Vec<u32> {
        let values = t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        values.into_iter().map(f32::to_bits).collect()
    };
    all.iter()
        .map(|(name, t)| (name.clone(), bits(t)))
        .collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// Random prompts: counts, blocks, whose, replaced or beside the others, learned or not, LayerNorms, pixels.
    #[test]
    fn features_and_gradients_equal_the_plain_computation(case in case()) {
        let setting = Setting::new(&case)?;
        let ours = setting.run(2);
        let (theirs, vars) = setting.plain()?;
        prop_assert_eq!(ours[0].1.dims(), theirs.dims());
        let found = error(&ours[0].1, &theirs)?;
        prop_assert!(found < 1e-5, "features: {found}");
        let store = (&theirs * setting.weights(&theirs))?.sum_all()?.backward()?;
        for (name, var) in &vars {
            let ours = ours.iter().find(|(found, _)| found == name).map(|(_, g)| g);
            match (ours, store.get(var.as_tensor())) {
                (Some(ours), Some(theirs)) => {
                    let found = error(ours, theirs)?;
                    prop_assert!(found < 1e-5, "{name}: {found}");
                }
                (None, None) => {}
                (Some(ours), None) => prop_assert_eq!(ours.abs()?.max_all()?.to_scalar::<f32>()?, 0.0, "{}", name),
                (None, Some(theirs)) => prop_assert_eq!(theirs.abs()?.max_all()?.to_scalar::<f32>()?, 0.0, "{}", name),
            }
        }
    }

    /// Threads change no bit; nor does embedding the patches beforehand.
    #[test]
    fn bits_depend_on_the_declaration_alone(case in case()) {
        let setting = Setting::new(&case)?;
        let expected = bits(&setting.run(1));
        for threads in [2, 4] {
            prop_assert_eq!(&bits(&setting.run(threads)), &expected);
        }
        let (_, prompts, pixels) = setting.declare();
        if !case.pixels {
            let patches = setting.clip.image().patches(&pixels)?;
            let features = setting.encode(&patches, &prompts)?;
            prop_assert_eq!(&bits(&[("features".into(), features)])[0], &expected[0]);
        }
    }
}

/// Under a budget that is too small for everything, blocks are computed again, to the same bits.
#[test]
fn a_small_budget_changes_no_bit() -> cliptune_core::Result<()> {
    let event = |kind, replaces| {
        Some(Event {
            kind,
            n: 3,
            replaces,
            learned: true,
        })
    };
    let case = Case {
        heads: 2,
        activation: Activation::QuickGelu,
        images: 5,
        sets: 1,
        position: Position::BehindPatches,
        before_ln_pre: event(Kind::Shared, false),
        blocks: vec![
            None,
            event(Kind::PerImage, false),
            event(Kind::Shared, true),
            event(Kind::Shared, true),
        ],
        norms: true,
        pixels: false,
        dense: false,
        seed: 4,
    };
    let mut setting = Setting::new(&case)?;
    let expected = bits(&setting.run(2));
    let (_, prompts, _) = setting.declare();
    let mut budget = setting.clip.image().forecast_prompted(5, &prompts)?.step;
    let mut seen = Vec::new();
    let needed = loop {
        setting.clip.set_memory_budget(Some(budget - 1));
        match setting.clip.image().forecast_prompted(5, &prompts) {
            Ok(less) => {
                assert_eq!(less.policy, Policy::TwoPasses);
                assert!(less.step < budget);
                seen.push(less.chunks_at_a_time);
                budget = less.step;
                assert_eq!(bits(&setting.run(2)), expected);
            }
            Err(Error::Memory { needed, .. }) => break needed,
            Err(other) => return Err(other),
        }
    };
    assert_eq!((needed, seen.last()), (budget, Some(&1)));
    Ok(())
}

/// More rows than pass the MLP, or ask, at a time.
#[test]
fn many_patches_equal_the_plain_tower() -> cliptune_core::Result<()> {
    let side = 15 * PATCH;
    let clip = Clip::from_checkpoint(
        random(&arch(side, 64, 2, Activation::QuickGelu), 3)?,
        Storage::F32,
    )?;
    let mut rng = Rng::stream(3, "many", &[]);
    let pixels = drawn(&mut rng, &[2, 3, side, side], 1.0)?;
    let weights = drawn(&mut rng, &[2, EMBED], 1.0)?;
    let mut runs = Vec::new();
    for threads in [1, 3] {
        let pool = ThreadPoolBuilder::new()
            .num_threads(threads)
            .build()
            .unwrap();
        runs.push(pool.install(|| -> cliptune_core::Result<_> {
            let mut params = Params::new(0);
            let learned = params.copied(PIXELS, &pixels)?;
            let nothing = VisualPrompts::new();
            let features = clip.image().encode_prompted(learned.tensor(), &nothing)?;
            let loss = (&features * &weights)?.sum_all()?;
            let gradients = Gradients::of(&loss, &params)?;
            let ours = gradients.get(PIXELS).cloned().unwrap();
            Ok((features, ours))
        })?);
    }
    // The tower image by image, through candle's graph.
    let mut params = Params::new(0);
    let learned = params.copied(PIXELS, &pixels)?;
    let plainly = clip
        .image()
        .encode_probed(learned.tensor(), &mut |_, _| Ok(()))?;
    let gradients = Gradients::of(&(&plainly * &weights)?.sum_all()?, &params)?;
    let theirs = gradients.get(PIXELS).unwrap();
    let (features, ours) = &runs[0];
    assert!(
        error(features, &plainly)? < 1e-5,
        "{}",
        error(features, &plainly)?
    );
    assert!(error(ours, theirs)? < 1e-5, "{}", error(ours, theirs)?);
    let all =
        |run: &(Tensor, Tensor)| bits(&[("f".into(), run.0.clone()), ("g".into(), run.1.clone())]);
    assert_eq!(all(&runs[0]), all(&runs[1]));
    // Without prompts and gradients it is the tower that everybody uses, to the bit.
    let same = clip
        .image()
        .encode_prompted(&pixels, &VisualPrompts::new())?;
    let encoded = clip.image().encode(&pixels)?;
    assert_eq!(bits(&[("f".into(), same)]), bits(&[("f".into(), encoded)]));
    Ok(())
}

/// A tower cut in two gives what it gives in one piece, and so do its gradients.
#[test]
fn a_tower_in_two_stretches_is_the_same_tower() -> cliptune_core::Result<()> {
    let clip = Clip::from_checkpoint(
        random(&arch(3 * PATCH, 128, BLOCKS, Activation::QuickGelu), 5)?,
        Storage::F32,
    )?;
    let mut rng = Rng::stream(5, "cut", &[]);
    let pixels = drawn(&mut rng, &[3, 3, 3 * PATCH, 3 * PATCH], 1.0)?;
    let weights = drawn(&mut rng, &[3, EMBED], 1.0)?;
    let values: Vec<Tensor> = (0..BLOCKS)
        .map(|_| drawn(&mut rng, &[2, 128], 0.5))
        .collect::<Plain<_>>()?;
    let mut results = Vec::new();
    for cut in [None, Some(0), Some(1), Some(3)] {
        let mut params = Params::new(0);
        let (mut lower, mut upper) = (VisualPrompts::new(), VisualPrompts::new());
        for (block, value) in values.iter().enumerate() {
            let param = params.copied(&format!("{block}"), value)?;
            let tokens = Tokens::Shared(param.tensor().clone());
            match cut.is_some_and(|cut| block >= cut) {
                true => upper.replace(block, tokens),
                false => lower.replace(block, tokens),
            }
        }
        let features = match cut {
            None => clip.image().encode_prompted(&pixels, &lower)?,
            Some(cut) => {
                let tokens = clip.image().prompted_tokens(&pixels, cut, &lower)?;
                clip.image().encode_prompted_from(&tokens, cut, &upper)?
            }
        };
        let gradients = Gradients::of(&(&features * &weights)?.sum_all()?, &params)?;
        let gradients = gradients.iter().map(|(_, g)| g.cloned().unwrap());
        results.push(
            std::iter::once(features.clone())
                .chain(gradients)
                .collect::<Vec<_>>(),
        );
    }
    // Every block by itself.
    let mut params = Params::new(0);
    let mut tokens = clip
        .image()
        .prompted_tokens(&pixels, 0, &VisualPrompts::new())?;
    for (block, value) in values.iter().enumerate() {
        let param = params.copied(&format!("{block}"), value)?;
        let mut prompts = VisualPrompts::new();
        prompts.replace(block, Tokens::Shared(param.tensor().clone()));
        tokens = match block + 1 == BLOCKS {
            true => clip
                .image()
                .encode_prompted_from(&tokens, block, &prompts)?,
            false => {
                let next = block + 1;
                clip.image()
                    .prompted_tokens_from(&tokens, block, next, &prompts)?
            }
        };
    }
    let gradients = Gradients::of(&(&tokens * &weights)?.sum_all()?, &params)?;
    let gradients = gradients.iter().map(|(_, g)| g.cloned().unwrap());
    results.push(std::iter::once(tokens.clone()).chain(gradients).collect());
    let all =
        |run: &[Tensor]| -> Vec<_> { run.iter().map(|t| (String::new(), t.clone())).collect() };
    for run in &results[1..] {
        assert_eq!(bits(&all(run)), bits(&all(&results[0])));
    }
    Ok(())
}

/// The map of the class token is the softmax over patches of the plain tower's last scores, whatever prompts stand there.
#[test]
fn the_class_token_looks_where_it_does_in_the_plain_tower() -> cliptune_core::Result<()> {
    let arch = arch(3 * PATCH, 128, 2, Activation::QuickGelu);
    let checkpoint = random(&arch, 6)?;
    let w = checkpoint.tensors.clone();
    let clip = Clip::from_checkpoint(checkpoint, Storage::F32)?;
    let mut rng = Rng::stream(6, "look", &[]);
    let pixels = drawn(&mut rng, &[2, 3, 3 * PATCH, 3 * PATCH], 1.0)?;
    let mut prompts = VisualPrompts::new();
    prompts.join(0, Tokens::Shared(drawn(&mut rng, &[2, 128], 0.5)?));
    let mut deeper = prompts.clone();
    deeper.replace(1, Tokens::Shared(drawn(&mut rng, &[3, 128], 0.5)?));
    let map = clip.image().class_attention(&pixels, &prompts)?;
    assert_eq!(map.dims(), [2, 3, 3]);

    let x = clip.image().prompted_tokens(&pixels, 1, &prompts)?;
    let normed = layer_norm(&w, "visual.transformer.resblocks.1.ln_1", &x)?;
    let name = "visual.transformer.resblocks.1.attn.";
    let qkv = linear(&w, name, "in_proj_weight", "in_proj_bias", &normed)?;
    let mut shares = Tensor::zeros((2, 9), DType::F32, &Device::Cpu)?;
    for head in 0..2 {
        let query = qkv.narrow(1, 0, 1)?.narrow(2, 64 * head, 64)?;
        let keys = qkv.narrow(1, 1, 9)?.narrow(2, 128 + 64 * head, 64)?;
        let scores = query.broadcast_mul(&keys)?.sum(2)?;
        let exp = (scores / 8.0)?.exp()?;
        shares = (shares + exp.broadcast_div(&exp.sum_keepdim(1)?)?)?;
    }
    let shares = (shares / 2.0)?.reshape((2, 3, 3))?;
    assert!(error(&map, &shares)? < 1e-5, "{}", error(&map, &shares)?);
    let same = clip.image().class_attention(&pixels, &deeper)?;
    assert_eq!(bits(&[("".into(), same)]), bits(&[("".into(), map)]));
    Ok(())
}

#[test]
fn what_cannot_run_is_refused_in_words() -> cliptune_core::Result<()> {
    let clip = Clip::from_checkpoint(
        random(&arch(3 * PATCH, 64, 2, Activation::QuickGelu), 1)?,
        Storage::F32,
    )?;
    let image = clip.image();
    let ones = |shape: &[usize]| Tensor::ones(shape, candle_core::DType::F32, &Device::Cpu);
    let pixels = ones(&[2, 3, 3 * PATCH, 3 * PATCH])?;
    let told = |declare: &dyn Fn(&mut VisualPrompts)| {
        let mut prompts = VisualPrompts::new();
        declare(&mut prompts);
        image
            .encode_prompted(&pixels, &prompts)
            .unwrap_err()
            .to_string()
    };
    let tokens = ones(&[1, 64])?;
    let shared = Tokens::Shared(tokens.clone());
    let deep = told(&|p| p.replace(2, shared.clone()));
    assert!(
        deep.contains("block 2") && deep.contains("2 blocks"),
        "{deep}"
    );
    let narrow = Tokens::Shared(ones(&[1, 32])?);
    assert!(told(&|p| p.join(1, narrow.clone())).contains("[1, 64]"));
    let few = Tokens::PerImage(ones(&[3, 1, 64])?);
    assert!(told(&|p| p.join(1, few.clone())).contains("[2, 1, 64]"));
    let nan = Tokens::Shared((&tokens * f64::NAN)?);
    assert!(told(&|p| p.join_before_ln_pre(nan.clone())).contains("NaN"));
    let sets = |n| Tokens::PerSet(ones(&[n, 1, 64]).unwrap());
    assert!(
        told(&|p| {
            p.join(0, sets(2));
            p.join(1, sets(3));
        })
        .contains("3 sets")
    );
    let norms = image.block_norms()?;
    assert!(told(&|p| p.tune_layer_norms(norms[..1].to_vec())).contains("LayerNorms of 1 blocks"));
    // Images that do not fit.
    let mut prompts = VisualPrompts::new();
    prompts.replace(1, shared.clone());
    assert!(
        image
            .encode_prompted(&ones(&[2, 3, 8, 8])?, &prompts)
            .is_err()
    );
    assert!(
        image
            .encode_prompted(&ones(&[2, 8, 64])?, &prompts)
            .is_err()
    );
    assert!(
        image
            .encode_prompted(&ones(&[0, 9, 64])?, &prompts)
            .is_err()
    );
    // Stretches.
    let hidden = ones(&[2, 10, 64])?;
    assert!(image.encode_prompted_from(&hidden, 2, &prompts).is_err());
    assert!(image.prompted_tokens(&pixels, 0, &prompts).is_err());
    assert!(image.prompted_tokens(&pixels, 1, &prompts).is_err());
    let plain = VisualPrompts::new();
    assert!(image.prompted_tokens(&pixels, 2, &plain).is_err());
    assert!(image.prompted_tokens_from(&hidden, 0, 2, &plain).is_err());
    assert!(image.prompted_tokens_from(&hidden, 1, 1, &plain).is_err());
    assert!(image.prompted_tokens_from(&hidden, 0, 1, &plain).is_ok());
    let mut early = VisualPrompts::new();
    early.join_before_ln_pre(shared.clone());
    assert!(image.encode_prompted_from(&hidden, 1, &early).is_err());

    let resnet = Arch {
        image_resolution: 64,
        vision: VisionArch::ResNet {
            layers: [1, 1, 1, 1],
            width: 16,
        },
        ..arch(64, 64, 2, Activation::QuickGelu)
    };
    let resnet = Clip::from_checkpoint(random(&resnet, 1)?, Storage::F32)?;
    let error = resnet.image().encode_prompted(&pixels, &prompts);
    assert!(
        matches!(&error, Err(Error::Prompt(m)) if m.contains("ResNet")),
        "{error:?}"
    );
    Ok(())
}
