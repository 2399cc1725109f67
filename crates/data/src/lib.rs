#![doc = include_str!("../README.md")]

pub mod decode;
mod disk;
mod error;
mod preprocess_stub;
mod python_random;
#[cfg(test)]
mod testing;

pub use disk::{BadImage, DiskImages};
pub use error::{Error, Result};
pub use python_random::PythonRandom;
