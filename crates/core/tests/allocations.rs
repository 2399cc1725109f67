//! What a training step asks of the allocator once its buffers are there.

#![allow(clippy::unwrap_used, missing_docs)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

use candle_core::Var;
use cliptune_core::checkpoint::random;
use cliptune_core::prompt::{ClassTokenPosition, ClassTokens, placeholder};
use cliptune_core::rng::Rng;
use cliptune_core::{Activation, Arch, Classes, Clip, Result, Storage, VisionArch};

/// Counts bytes that are asked for, whether or not they are given back.
struct Counting;

static BYTES: AtomicUsize = AtomicUsize::new(0);

// SAFETY: everything is handed on to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        BYTES.fetch_add(layout.size(), Ordering::Relaxed);
        // SAFETY: handed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: handed on.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

const WIDTH: usize = 128;
const CLASSES: usize = 60;

/// Bytes that a step of CoOp asks for after two others, and those that a step keeps until its way back is over.
fn step(layers: usize) -> Result<(usize, u64)> {
    let arch = Arch {
        embed_dim: 64,
        image_resolution: 32,
        vision: VisionArch::Vit {
            layers: 1,
            width: 64,
            patch_size: 16,
        },
        context_length: 77,
        vocab_size: 49_408,
        text_width: WIDTH,
        text_layers: layers,
        activation: Activation::QuickGelu,
    };
    let clip = Clip::from_checkpoint(random(&arch, 1)?, Storage::F32)?;
    let names = ["daisy", "garden rose", "water lily", "snowdrop"];
    let names = (0..CLASSES).map(|i| format!("{} number {i}", names[i % names.len()]));
    let classes = ClassTokens::new(clip.text(), &Classes::new(names.collect())?)?;
    let values = Rng::stream(2, "context", &[]).normal(16 * WIDTH);
    let values: Vec<f32> = values.into_iter().map(|x| 0.02 * x as f32).collect();
    let ctx = Var::from_vec(values, (16, WIDTH), &candle_core::Device::Cpu)?;
    let prompts = || classes.weave(ctx.as_tensor(), &placeholder(16), ClassTokenPosition::End);
    let once = || -> Result<()> {
        let features = clip.text().encode(&prompts()?)?;
        features.sqr()?.sum_all()?.backward()?;
        Ok(())
    };
    once()?;
    once()?;
    let before = BYTES.load(Ordering::Relaxed);
    once()?;
    let asked = BYTES.load(Ordering::Relaxed) - before;
    Ok((asked, clip.text().forecast(&prompts()?)?.step))
}

/// Tables of rows, features and their gradients are new in every step, and do not grow with the tower; tapes and work areas
/// are there already.
#[test]
fn a_step_asks_for_little_and_no_more_in_a_deeper_tower() -> Result<()> {
    let (shallow, _) = step(2)?;
    let (deep, works_in) = step(8)?;
    println!("2 blocks: {shallow} bytes, 8 blocks: {deep} bytes, works in {works_in} bytes");
    assert!((deep as u64) < works_in / 10, "{deep} of {works_in}");
    // Four bytes a row and block are lists of rows.
    assert!(deep - shallow < shallow / 4, "{shallow} {deep}");
    Ok(())
}
