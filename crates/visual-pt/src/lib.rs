#![doc = include_str!("../README.md")]

pub mod reprompt;
pub mod retrieval;
mod voting;
pub mod vp;

use cliptune_core::method::Entry;

pub use reprompt::{RePrompt, RePromptConfig};
pub use vp::{Vp, VpConfig};

/// The family's methods, in the order in which they are listed. A new method adds its file and its line here.
pub const METHODS: &[Entry] = &[vp::ENTRY, reprompt::ENTRY];
