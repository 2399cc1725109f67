//! Image files to pixels.

use std::path::Path;

use cliptune_core::preprocess::{Mode, Pixels};

use crate::{Error, Result};

/// Decodes an image file to RGB.
///
/// # Errors
/// [`Error::Image`] naming the file.
pub fn decode(bytes: &[u8], name: &Path) -> Result<Pixels> {
    let image = image::load_from_memory(bytes).map_err(|e| Error::image(name, e.to_string()))?;
    let image = image.into_rgb8();
    let (width, height) = (image.width() as usize, image.height() as usize);
    Ok(Pixels::new(width, height, Mode::Rgb, image.into_raw())?)
}
