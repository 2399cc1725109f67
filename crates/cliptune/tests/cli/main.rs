//! The `cliptune` command from outside, on a tiny CLIP and coloured pictures.

mod crash;
mod mistakes;
mod same_bits;
mod support;
mod work;
