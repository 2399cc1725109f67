//! x
pub mod arch;
pub mod checkpoint;
pub mod clip;
mod error;
pub mod files;
pub mod preprocess;
pub mod task;
pub mod tokenizer;

pub use arch::{Activation, Arch, Preprocess, VisionArch};
pub use checkpoint::Checkpoint;
pub use clip::Clip;
pub use error::{Error, Result};
