//! The `cliptune` command from outside, on a tiny CLIP and coloured pictures.

// Helpers are tests too: a failure here is a failed test.
#![allow(clippy::unwrap_used)]

mod crash;
mod mistakes;
mod same_bits;
mod support;
mod work;
