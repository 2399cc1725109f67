#![doc = include_str!("../README.md")]

pub mod arch;
pub mod checkpoint;
pub mod clip;
mod error;
pub mod files;
mod kernels;
pub mod method;
pub mod ops;
pub mod optim;
pub mod params;
pub mod preprocess;
pub mod prompt;
pub mod prompt_file;
pub mod rng;
pub mod run;
pub mod schedule;
pub mod task;
pub mod tokenizer;
pub mod train;

pub use arch::{Activation, Arch, CONTEXT_LENGTH, HEAD_WIDTH, Preprocess, VOCAB_SIZE, VisionArch};
pub use checkpoint::Checkpoint;
pub use clip::{Clip, Storage};
pub use error::{Error, Result};
pub use params::{Gradients, Param, Params};
pub use run::Run;
pub use task::{Classes, ImageBatch, ImageNeeds, ImageSource, Labelled, Split, View};
