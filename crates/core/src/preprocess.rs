//! Pixels to tensors as the reference does it.
