#![doc = include_str!("../README.md")]

pub mod registry;

#[doc(no_inline)]
pub use cliptune_core::*;
pub use cliptune_data as data;
#[cfg(feature = "multimodal-pt")]
pub use cliptune_multimodal_pt as multimodal_pt;
#[cfg(feature = "text-pt")]
pub use cliptune_text_pt as text_pt;
#[cfg(feature = "visual-pt")]
pub use cliptune_visual_pt as visual_pt;
