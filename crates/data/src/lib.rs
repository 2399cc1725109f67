#![doc = include_str!("../README.md")]

mod cache;
mod dataset;
pub mod decode;
mod disk;
mod error;
mod few_shot;
pub mod metrics;
mod python_random;
#[cfg(test)]
mod testing;

pub use cache::{CachedFeatures, Event};
pub use dataset::{ClassCounts, Dataset, SplitOrigin};
pub use disk::{BadImage, DiskImages};
pub use error::{Error, Result};
pub use few_shot::{ClassSubset, Draw, DrawnImage, FewShot, Shortage};
pub use metrics::Confusion;
pub use python_random::PythonRandom;
