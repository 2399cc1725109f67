//! The image towers with what is learned inside them, against slow, plain ones: every row of every block, candle's own
//! operations, autograd through everything.

#![allow(clippy::unwrap_used)]

#[path = "../plain/mod.rs"]
mod plain;
mod resnet;
mod vit;
