//! Images in files.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};

use candle_core::{Device, Tensor};
use cliptune_core::preprocess::{Pixels, fixed_view, random_view};
use cliptune_core::rng::Rng;
use cliptune_core::{ImageSource, Preprocess, View};
use rayon::prelude::*;

use crate::decode::decode;
use crate::{Error, Result};

/// Image files as an [`ImageSource`]: read, decoded and transformed when asked for, in parallel.
#[derive(Debug)]
pub struct DiskImages {
    files: Vec<ImageFile>,
}

#[derive(Debug)]
struct ImageFile {
    /// As the data set's lists name it: relative to its folder, with `/`.
    name: String,
    path: PathBuf,
    /// BLAKE3 of the content when it was first asked for.
    hash: OnceLock<blake3::Hash>,
}

/// An image that cannot be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BadImage {
    /// Item of the source.
    pub item: usize,
    /// Its name.
    pub name: String,
    /// Why it cannot be used.
    pub reason: String,
}

impl DiskImages {
    /// Images from `(name, path)` pairs; files are opened when their images are asked for.
    pub fn new(files: impl IntoIterator<Item = (String, PathBuf)>) -> Self {
        let file = |(name, path)| ImageFile {
            name,
            path,
            hash: OnceLock::new(),
        };
        Self {
            files: files.into_iter().map(file).collect(),
        }
    }

    /// The file of item `index`, if there is such an item.
    pub fn path(&self, index: usize) -> Option<&Path> {
        self.files.get(index).map(|file| file.path.as_path())
    }

    /// Decodes every one of `indices` and returns those that cannot be, in order.
    ///
    /// `progress` is told how many are done, from several threads.
    pub fn check(&self, indices: &[usize], progress: &(dyn Fn(usize) + Sync)) -> Vec<BadImage> {
        let done = AtomicUsize::new(0);
        let check = |&item: &usize| {
            let result = self.file(item).and_then(|file| file.pixels());
            progress(done.fetch_add(1, Ordering::Relaxed) + 1);
            let reason = match result {
                Ok(_) => return None,
                Err(Error::Image { reason, .. }) => reason,
                Err(other) => other.to_string(),
            };
            Some(BadImage {
                item,
                name: self.name(item),
                reason,
            })
        };
        indices.par_iter().filter_map(check).collect()
    }

    fn file(&self, index: usize) -> Result<&ImageFile> {
        self.files.get(index).ok_or_else(|| {
            Error::Core(cliptune_core::Error::Data(format!(
                "there is no image {index} among {}",
                self.files.len()
            )))
        })
    }

    /// `(3, side, side)`.
    fn transformed(&self, index: usize, preprocess: &Preprocess, view: View) -> Result<Vec<f32>> {
        let pixels = self.file(index)?.pixels()?;
        Ok(match view {
            View::Fixed => fixed_view(&pixels, preprocess)?,
            View::Random { seed, draw } => {
                // One stream per image, so the order of threads does not matter.
                let mut rng = Rng::stream(seed, "view", &[draw as u64, index as u64]);
                random_view(&pixels, preprocess, &mut || rng.uniform())?
            }
        })
    }
}

impl ImageFile {
    fn bytes(&self) -> Result<Vec<u8>> {
        let bytes =
            std::fs::read(&self.path).map_err(|e| Error::image(&self.path, e.to_string()))?;
        if bytes.is_empty() {
            return Err(Error::image(&self.path, "the file is empty"));
        }
        Ok(bytes)
    }

    fn pixels(&self) -> Result<Pixels> {
        let bytes = self.bytes()?;
        // What was hashed is what caches are keyed by, so nothing else may be decoded later under the same name.
        if let Some(hash) = self.hash.get()
            && *hash != blake3::hash(&bytes)
        {
            return Err(Error::image(
                &self.path,
                "the file has changed since the run began",
            ));
        }
        decode(&bytes, &self.path)
    }

    fn hash(&self) -> Result<blake3::Hash> {
        if let Some(hash) = self.hash.get() {
            return Ok(*hash);
        }
        let hash = blake3::hash(&self.bytes()?);
        Ok(*self.hash.get_or_init(|| hash))
    }
}

/// All values, or the error of the first item that has one: the same message on every run and any number of threads.
pub(crate) fn first_error<T: Send, E: Send>(
    results: impl IndexedParallelIterator<Item = std::result::Result<T, E>>,
) -> std::result::Result<Vec<T>, E> {
    let results: Vec<std::result::Result<T, E>> = results.collect();
    results.into_iter().collect()
}

impl ImageSource for DiskImages {
    fn len(&self) -> usize {
        self.files.len()
    }

    fn name(&self, index: usize) -> String {
        let name = self.files.get(index).map(|file| file.name.clone());
        name.unwrap_or_else(|| format!("image {index}"))
    }

    /// BLAKE3 over the BLAKE3 of each file's content, in the order asked: neither names nor folders matter.
    fn fingerprint(&self, indices: &[usize]) -> cliptune_core::Result<String> {
        let hash = |&index: &usize| self.file(index)?.hash();
        let hashes: Vec<blake3::Hash> = first_error(indices.par_iter().map(hash))?;
        let mut hasher = blake3::Hasher::new();
        for hash in hashes {
            hasher.update(hash.as_bytes());
        }
        Ok(hasher.finalize().to_hex().to_string())
    }

    fn pixels(
        &self,
        indices: &[usize],
        preprocess: &Preprocess,
        view: View,
    ) -> cliptune_core::Result<Tensor> {
        let one = |&index: &usize| self.transformed(index, preprocess, view);
        let images: Vec<Vec<f32>> = first_error(indices.par_iter().map(one))?;
        let shape = (
            images.len(),
            3,
            preprocess.resolution,
            preprocess.resolution,
        );
        Ok(Tensor::from_vec(images.concat(), shape, &Device::Cpu)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{TestResult, write_picture};

    #[test]
    fn the_first_of_several_errors_is_told() {
        let bad = |i: usize| if i % 7 == 3 { Err(i) } else { Ok(i) };
        for _ in 0..50 {
            assert_eq!(first_error((0..200usize).into_par_iter().map(bad)), Err(3));
        }
        assert_eq!(
            first_error((0..3usize).into_par_iter().map(bad)),
            Ok(vec![0, 1, 2])
        );
    }

    fn three(dir: &Path) -> DiskImages {
        let file = |i: usize| {
            let name = format!("{i}.png");
            write_picture(&dir.join(&name), i as u8, (20 + i, 30));
            (name.clone(), dir.join(name))
        };
        DiskImages::new((0..3).map(file))
    }

    fn values(t: &Tensor) -> Vec<f32> {
        t.flatten_all().unwrap().to_vec1().unwrap()
    }

    #[test]
    fn a_view_depends_on_its_arguments_alone() -> TestResult {
        let dir = tempfile::tempdir()?;
        let images = three(dir.path());
        let preprocess = Preprocess::openai(16);
        for view in [View::Fixed, View::Random { seed: 3, draw: 1 }] {
            let all = images.pixels(&[0, 1, 2, 1], &preprocess, view)?;
            assert_eq!(all.dims(), [4, 3, 16, 16]);
            for (position, index) in [0, 1, 2, 1].into_iter().enumerate() {
                let alone = images.pixels(&[index], &preprocess, view)?;
                assert_eq!(values(&all.get(position)?), values(&alone));
            }
        }
        let random = |seed, draw| -> TestResult<Vec<f32>> {
            Ok(values(&images.pixels(
                &[0],
                &preprocess,
                View::Random { seed, draw },
            )?))
        };
        assert_eq!(random(1, 0)?, random(1, 0)?);
        assert_ne!(random(1, 0)?, random(1, 1)?);
        assert_ne!(random(1, 0)?, random(2, 0)?);
        assert_eq!(
            images.pixels(&[], &preprocess, View::Fixed)?.dims(),
            [0, 3, 16, 16]
        );
        Ok(())
    }

    #[test]
    fn bad_files_are_named() -> TestResult {
        let dir = tempfile::tempdir()?;
        let good = dir.path().join("good.png");
        write_picture(&good, 1, (20, 20));
        let bytes = std::fs::read(&good)?;
        let mut files = vec![("good.png".to_owned(), good)];
        let bad: [(&str, &[u8]); 3] = [
            ("empty.png", b""),
            ("text.jpg", b"not an image at all"),
            ("half.png", &bytes[..bytes.len() / 2]),
        ];
        for (name, bytes) in bad {
            let path = dir.path().join(name);
            std::fs::File::create(&path)
                .and_then(|mut f| std::io::Write::write_all(&mut f, bytes))?;
            files.push((name.to_owned(), path));
        }
        files.push(("gone.png".to_owned(), dir.path().join("gone.png")));
        let images = DiskImages::new(files);
        for index in 1..5 {
            let error = images.pixels(&[0, index], &Preprocess::openai(8), View::Fixed);
            let message = error.unwrap_err().to_string();
            assert!(message.contains(&images.name(index)), "{message}");
        }
        let count = AtomicUsize::new(0);
        let bad = images.check(&[0, 1, 2, 3, 4], &|_| {
            count.fetch_add(1, Ordering::Relaxed);
        });
        assert_eq!(bad.iter().map(|b| b.item).collect::<Vec<_>>(), [1, 2, 3, 4]);
        assert_eq!(bad[0].reason, "the file is empty");
        assert_eq!(count.into_inner(), 5);
        assert!(
            images
                .pixels(&[9], &Preprocess::openai(8), View::Fixed)
                .is_err()
        );
        Ok(())
    }

    #[test]
    fn the_fingerprint_follows_the_content() -> TestResult {
        let dir = tempfile::tempdir()?;
        let images = three(dir.path());
        let all = images.fingerprint(&[0, 1, 2])?;
        assert_eq!(three(dir.path()).fingerprint(&[0, 1, 2])?, all);
        assert_ne!(images.fingerprint(&[0, 2, 1])?, all);
        assert_ne!(images.fingerprint(&[0, 1])?, all);

        // One pixel more or less is other data, and a source that has hashed the old file refuses the new one.
        write_picture(&dir.path().join("1.png"), 99, (21, 30));
        let other =
            DiskImages::new((0..3).map(|i| (i.to_string(), dir.path().join(format!("{i}.png")))));
        assert_ne!(other.fingerprint(&[0, 1, 2])?, all);
        let refused = images.pixels(&[1], &Preprocess::openai(8), View::Fixed);
        assert!(refused.unwrap_err().to_string().contains("changed"));
        Ok(())
    }
}
