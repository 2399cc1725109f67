//! CLIP tokenizer.
