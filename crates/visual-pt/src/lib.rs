#![doc = include_str!("../README.md")]

pub mod vp;

use cliptune_core::method::Entry;

pub use vp::{Vp, VpConfig};

/// The family's methods, in the order in which they are listed. A new method adds its file and its line here.
pub const METHODS: &[Entry] = &[vp::ENTRY];
