#![doc = include_str!("../README.md")]

mod caption;
mod forms;
mod outline;
mod paint;
mod scene;
mod stream;
mod task;
mod words;
mod world;

pub use caption::{Wording, caption, vocabulary};
pub use paint::Rgb;
pub use scene::{Layout, Object, Picture, Scene};
pub use task::Task;
pub use words::{Coarse, Color, Kind, Pattern, Place, Shape, Style, Texture};
pub use world::{World, multi_label};

/// Side of the pictures in pixels.
pub const SIDE: usize = 64;
