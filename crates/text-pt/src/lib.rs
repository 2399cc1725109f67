#![doc = include_str!("../README.md")]

pub mod cocoop;
pub mod coop;
pub mod kgcoop;
pub mod plot;
pub mod proda;
pub mod prograd;
pub mod subpt;
pub mod vpt;
pub mod zeroshot;

use cliptune_core::method::Entry;

pub use cocoop::{CoCoOp, CoCoOpConfig};
pub use coop::{CoOp, CoOpConfig};
pub use kgcoop::{KgCoOp, KgCoOpConfig};
pub use plot::{Plot, PlotConfig};
pub use proda::{ProDa, ProDaConfig};
pub use prograd::{ProGrad, ProGradConfig};
pub use subpt::{SubPt, SubPtConfig};
pub use vpt::{Vpt, VptConfig};
pub use zeroshot::{ZeroShot, ZeroShotConfig};

/// The family's methods, in the order in which they are listed. A new method adds its file and its line here.
pub const METHODS: &[Entry] = &[
    zeroshot::ENTRY,
    coop::ENTRY,
    cocoop::ENTRY,
    kgcoop::ENTRY,
    prograd::ENTRY,
    subpt::ENTRY,
    vpt::ENTRY,
    proda::ENTRY,
    plot::ENTRY,
];
