#![doc = include_str!("../README.md")]

pub mod cavpt;
mod coupling;
pub mod deep_vpt;
pub mod ivlp;
pub mod maple;
pub mod mvlpt;
mod sides;
pub mod upt;

use cliptune_core::method::Entry;

pub use cavpt::{Cavpt, CavptConfig};
pub use coupling::Interaction;
pub use deep_vpt::{DeepVpt, DeepVptConfig};
pub use ivlp::{Ivlp, IvlpConfig};
pub use maple::{MaPLe, MaPLeConfig};
pub use mvlpt::{Mvlpt, MvlptConfig};
pub use upt::{Upt, UptConfig};

/// The family's methods, in the order in which they are listed. A new method adds its file and its line here.
pub const METHODS: &[Entry] = &[
    maple::ENTRY,
    ivlp::ENTRY,
    deep_vpt::ENTRY,
    upt::ENTRY,
    mvlpt::ENTRY,
    cavpt::ENTRY,
];
