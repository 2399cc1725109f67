//! Image files to pixels.

use std::path::Path;

use crate::preprocess_stub::Pixels;
use crate::{Error, Result};

/// Decodes an image file to RGB.
///
/// # Errors
/// [`Error::Image`] naming the file.
pub fn decode(bytes: &[u8], name: &Path) -> Result<Pixels> {
    let image = image::load_from_memory(bytes).map_err(|e| Error::image(name, e.to_string()))?;
    let image = image.into_rgb8();
    Ok(Pixels {
        width: image.width() as usize,
        height: image.height() as usize,
        rgb: image.into_raw(),
    })
}
