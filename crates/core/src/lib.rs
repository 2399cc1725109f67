#![doc = include_str!("../README.md")]

pub mod arch;
pub mod checkpoint;
pub mod clip;
pub mod conditional;
pub mod context;
mod engine;
mod error;
pub mod files;
#[cfg(feature = "internals")]
#[doc(hidden)]
pub mod internals;
mod kernels;
pub mod layers;
pub mod learned;
pub mod method;
pub mod ops;
pub mod optim;
pub mod params;
mod patches;
pub mod preprocess;
pub mod prompt;
pub mod prompt_file;
pub mod rng;
pub mod run;
pub mod schedule;
pub mod subspace;
pub mod task;
pub mod tasks;
pub mod templates;
pub mod tokenizer;
pub mod train;
pub mod transport;
pub mod visual_prompt;

pub use arch::{Activation, Arch, CONTEXT_LENGTH, HEAD_WIDTH, Preprocess, VOCAB_SIZE, VisionArch};
pub use checkpoint::Checkpoint;
pub use clip::{Clip, Storage};
pub use error::{Error, Result};
pub use learned::Learned;
pub use params::{Gradients, Param, Params};
pub use run::Run;
pub use task::{Classes, ImageBatch, ImageNeeds, ImageSource, Labelled, Split, View};

/// Keeps candle's own thread pool out of the way; the first thing a program should do.
///
/// Our kernels share one rayon pool. candle runs larger element-wise operations on a second pool whose threads spin at a
/// barrier, which costs more than it gains and slows everything beside it down (20 steps of `cargo xtask pretrain` on two idle
/// cores: 19 s with it, 11 s without). It reads `CANDLE_NUM_THREADS` once; what the user has set stays.
pub fn one_candle_thread() {
    const NAME: &str = "CANDLE_NUM_THREADS";
    if std::env::var_os(NAME).is_none() {
        // SAFETY: meant for the first line of `main`, where no other thread reads the environment.
        unsafe { std::env::set_var(NAME, "1") };
    }
}
