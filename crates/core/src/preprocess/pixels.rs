//! Decoded pictures in the mode of their file.

use std::borrow::Cow;

use crate::{Error, Result};

/// What the samples of a picture mean. The names follow Pillow's modes.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Mode {
    /// Black and white: one byte a pixel, 0 or 255 (`1`).
    Bilevel,
    /// Grey (`L`).
    L,
    /// Grey and alpha (`LA`).
    La,
    /// Grey in 16 bits: two bytes a pixel, the lower one first (`I;16`).
    I16,
    /// Numbers of colours, one byte a pixel (`P`). Transparency is not kept: the reference ignores it.
    Palette(Box<[[u8; 3]; 256]>),
    /// Red, green, blue (`RGB`).
    Rgb,
    /// Red, green, blue, alpha (`RGBA`).
    Rgba,
    /// Cyan, magenta, yellow, black; 255 is full ink (`CMYK`).
    Cmyk,
}

impl Mode {
    /// Bytes of a pixel.
    pub fn bytes_per_pixel(&self) -> usize {
        match self {
            Self::Bilevel | Self::L | Self::Palette(_) => 1,
            Self::La | Self::I16 => 2,
            Self::Rgb => 3,
            Self::Rgba | Self::Cmyk => 4,
        }
    }
}

/// A decoded picture: rows from the top, pixels from the left, as in the file (no orientation applied).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pixels {
    width: usize,
    height: usize,
    mode: Mode,
    data: Vec<u8>,
}

impl Pixels {
    /// A picture of `width · height` pixels.
    ///
    /// # Errors
    /// [`Error::Data`] if it has no pixel, or `data` has another length than the sizes and the mode say.
    pub fn new(width: usize, height: usize, mode: Mode, data: Vec<u8>) -> Result<Self> {
        let expected = width
            .checked_mul(height)
            .and_then(|n| n.checked_mul(mode.bytes_per_pixel()));
        if expected == Some(0) || expected != Some(data.len()) {
            return Err(Error::Data(format!(
                "a picture of {width} x {height} pixels with {} bytes each cannot have {} bytes",
                mode.bytes_per_pixel(),
                data.len()
            )));
        }
        Ok(Self {
            width,
            height,
            mode,
            data,
        })
    }

    /// Pixels in a row.
    pub fn width(&self) -> usize {
        self.width
    }

    /// Rows.
    pub fn height(&self) -> usize {
        self.height
    }

    /// What the samples mean.
    pub fn mode(&self) -> &Mode {
        &self.mode
    }

    /// The samples, [`Mode::bytes_per_pixel`] bytes a pixel.
    pub fn data(&self) -> &[u8] {
        &self.data
    }

    /// The picture as `(height, width, 3)` bytes of red, green and blue. Alpha is dropped, not blended; 16-bit grey is cut off at 255.
    pub fn to_rgb(&self) -> Cow<'_, [u8]> {
        match self.mode {
            Mode::Rgb => Cow::Borrowed(&self.data),
            _ => Cow::Owned(to_rgb(&self.data, &self.mode)),
        }
    }
}

/// Samples of any mode as red, green and blue.
pub(super) fn to_rgb(data: &[u8], mode: &Mode) -> Vec<u8> {
    match mode {
        Mode::Bilevel | Mode::L => data.iter().flat_map(|&v| [v; 3]).collect(),
        Mode::La => data
            .as_chunks::<2>()
            .0
            .iter()
            .flat_map(|&[v, _]| [v; 3])
            .collect(),
        Mode::I16 => data
            .as_chunks::<2>()
            .0
            .iter()
            .flat_map(|&[low, high]| [if high > 0 { 255 } else { low }; 3])
            .collect(),
        Mode::Palette(colours) => data.iter().flat_map(|&i| colours[usize::from(i)]).collect(),
        Mode::Rgb => data.to_vec(),
        Mode::Rgba => data
            .as_chunks::<4>()
            .0
            .iter()
            .flat_map(|&[r, g, b, _]| [r, g, b])
            .collect(),
        Mode::Cmyk => {
            let light = |ink, black: u8| (255 - black).saturating_sub(times(ink, 255 - black));
            data.as_chunks::<4>()
                .0
                .iter()
                .flat_map(|&[c, m, y, k]| [light(c, k), light(m, k), light(y, k)])
                .collect()
        }
    }
}

/// `a · b / 255`, rounded as Pillow rounds it.
fn times(a: u8, b: u8) -> u8 {
    let t = u32::from(a) * u32::from(b) + 128;
    (((t >> 8) + t) >> 8) as u8
}

/// Colours times alpha, for pixels of `N` samples of which the last is alpha.
pub(super) fn premultiply<const N: usize>(data: &[u8]) -> Vec<u8> {
    let mut out = data.to_vec();
    for pixel in out.as_chunks_mut::<N>().0 {
        if let [colours @ .., alpha] = &mut pixel[..] {
            colours.iter_mut().for_each(|c| *c = times(*c, *alpha));
        }
    }
    out
}

/// The reverse of [`premultiply`], as far as there is one.
pub(super) fn unpremultiply<const N: usize>(data: &mut [u8]) {
    for pixel in data.as_chunks_mut::<N>().0 {
        if let [colours @ .., alpha @ 1..=254] = &mut pixel[..] {
            let alpha = u32::from(*alpha);
            colours
                .iter_mut()
                .for_each(|c| *c = (u32::from(*c) * 255 / alpha).min(255) as u8);
        }
    }
}
