//! What a run's method learned to add to every picture, as pictures beside its result.

use std::path::Path;

use anyhow::{Context, Result};
use candle_core::{Device, Tensor};
use cliptune::{Preprocess, files};

use super::prepare::png_of;

/// What is added alone, grey where that is nothing.
pub(crate) const ALONE: &str = "added.png";
/// A test picture with it.
pub(crate) const ON_A_PICTURE: &str = "added-to-a-picture.png";

/// Writes the pictures into a run's folder: what is `added (1, 3, side, side)`, and that on a `picture` of the same shape, as CLIP
/// reads it.
pub(super) fn write(
    folder: &Path,
    preprocess: &Preprocess,
    added: &Tensor,
    picture: &Tensor,
) -> Result<()> {
    std::fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
    let write = |name: &str, pixels: &Tensor| -> Result<()> {
        let png = png_of(preprocess, pixels)?;
        Ok(files::write_atomically(&folder.join(name), |w| {
            w.write_all(&png)
        })?)
    };
    write(ALONE, &on_grey(preprocess, added)?)?;
    write(ON_A_PICTURE, &(picture + added)?)
}

/// What is added to a picture that is grey all over.
fn on_grey(preprocess: &Preprocess, added: &Tensor) -> Result<Tensor> {
    let channels = preprocess.mean.iter().zip(preprocess.std);
    let grey: Vec<f32> = channels.map(|(mean, std)| (0.5 - mean) / std).collect();
    let grey = Tensor::from_vec(grey, (1, 3, 1, 1), &Device::Cpu)?;
    Ok(added.broadcast_add(&grey)?)
}

/// The pictures of a run below the output folder, as far as there are any.
pub(crate) fn of_run(out: &Path, folder: &Path) -> Option<[String; 2]> {
    let file = |name: &str| folder.join(name).to_string_lossy().into_owned();
    let files = [ALONE, ON_A_PICTURE].map(file);
    files
        .iter()
        .all(|file| out.join(file).exists())
        .then_some(files)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_grey_and_too_much_is_cut() -> Result<()> {
        let preprocess = Preprocess::openai(2);
        let added = Tensor::new(&[0f32, 0.0, 9.0, -9.0], &Device::Cpu)?;
        let added = added.reshape((1, 1, 2, 2))?.repeat((1, 3, 1, 1))?;
        let png = png_of(&preprocess, &on_grey(&preprocess, &added)?)?;
        let mut reader = png::Decoder::new(std::io::Cursor::new(png)).read_info()?;
        let mut rgb = vec![0; 12];
        reader.next_frame(&mut rgb)?;
        assert_eq!(rgb, [128, 128, 128, 128, 128, 128, 255, 255, 255, 0, 0, 0]);
        Ok(())
    }
}
