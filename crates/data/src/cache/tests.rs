use std::collections::HashSet;
use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};

use proptest::prelude::*;

use super::*;
use crate::DiskImages;
use crate::testing::{TestResult, tiny_clip, write_picture};

/// Counts the different images that go through the tower.
#[derive(Debug)]
struct Counting {
    inner: DiskImages,
    encoded: AtomicUsize,
}

impl Counting {
    fn new(folder: &Path, n: usize) -> Arc<Self> {
        let file = |i: usize| {
            let name = format!("{i}.png");
            if !folder.join(&name).exists() {
                write_picture(&folder.join(&name), i as u8, (18 + i, 22));
            }
            (name.clone(), folder.join(name))
        };
        Arc::new(Self {
            inner: DiskImages::new((0..n).map(file)),
            encoded: AtomicUsize::new(0),
        })
    }

    fn encoded(&self) -> usize {
        self.encoded.swap(0, Ordering::Relaxed)
    }
}

impl ImageSource for Counting {
    fn len(&self) -> usize {
        self.inner.len()
    }

    fn name(&self, index: usize) -> String {
        self.inner.name(index)
    }

    fn fingerprint(&self, indices: &[usize]) -> cliptune_core::Result<String> {
        self.inner.fingerprint(indices)
    }

    fn pixels(
        &self,
        indices: &[usize],
        p: &Preprocess,
        view: View,
    ) -> cliptune_core::Result<Tensor> {
        let different: HashSet<&usize> = indices.iter().collect();
        self.encoded.fetch_add(different.len(), Ordering::Relaxed);
        self.inner.pixels(indices, p, view)
    }
}

/// Prepares and returns the warnings.
fn prepare(
    cache: &CachedFeatures,
    clip: &Clip,
    items: &[usize],
    (needs, view): (ImageNeeds, View),
) -> Result<Vec<String>> {
    let mut warnings = Vec::new();
    let mut last = 0;
    cache.prepare(clip, items, needs, view, &mut |event| match event {
        Event::Progress { done, total } => {
            assert!(last <= done && done <= total);
            last = done;
        }
        Event::Warning(text) => warnings.push(text.to_owned()),
    })?;
    Ok(warnings)
}

fn values_of(batch: &ImageBatch, needs: ImageNeeds) -> Vec<f32> {
    let features = features_of(batch, needs).unwrap();
    features.flatten_all().unwrap().to_vec1().unwrap()
}

/// Features without a cache file, each image on its own.
fn fresh(
    source: &Counting,
    clip: &Clip,
    items: &[usize],
    (needs, view): (ImageNeeds, View),
) -> TestResult<Vec<f32>> {
    let row_shape = Context::of(clip, needs, view)?.row_shape;
    let mut values = Vec::new();
    for &item in items {
        let bytes = encode(source, clip, &[item], (needs, view), &row_shape)?;
        let row: Vec<f32> = bytes
            .as_chunks()
            .0
            .iter()
            .map(|b| f32::from_le_bytes(*b))
            .collect();
        // The tower's own batch of one may round otherwise, but not more than that.
        let plain = values_of(&source.images(clip, &[item], needs, view)?, needs);
        assert!(row.iter().zip(&plain).all(|(a, b)| (a - b).abs() < 1e-5));
        values.extend(row);
    }
    source.encoded();
    Ok(values)
}

fn files(folder: &Path) -> Vec<PathBuf> {
    let mut files: Vec<PathBuf> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    files.sort();
    files
}

fn overwrite(path: &Path, bytes: &[u8]) {
    cliptune_core::files::write_atomically(path, |w| w.write_all(bytes)).unwrap();
}

const GLOBAL: (ImageNeeds, View) = (ImageNeeds::GlobalFeatures, View::Fixed);

#[test]
fn cached_features_have_the_bits_of_fresh_ones() -> TestResult {
    let dir = tempfile::tempdir()?;
    let (pictures, folder) = (dir.path().join("p"), dir.path().join("cache"));
    let clip = tiny_clip(1);
    let random = View::Random { seed: 7, draw: 2 };
    for needs in [ImageNeeds::GlobalFeatures, ImageNeeds::LocalFeatures] {
        for view in [View::Fixed, random] {
            let source = Counting::new(&pictures, 40);
            let cache = CachedFeatures::new(source.clone(), &clip, Some(folder.clone()));
            let most: Vec<usize> = (0..38).collect();
            assert!(prepare(&cache, &clip, &most, (needs, view))?.is_empty());
            assert_eq!(source.encoded(), 38);

            // One image was not prepared; another is asked for twice.
            let asked = [37, 3, 39, 0, 3];
            let cached = cache.images(&clip, &asked, needs, view)?;
            assert_eq!(source.encoded(), 1);
            assert_eq!(cached.features()?.dims(), [5, 8]);
            let expected = fresh(&source, &clip, &asked, (needs, view))?;
            assert_eq!(values_of(&cached, needs), expected);
        }
    }
    Ok(())
}

#[test]
fn another_run_encodes_only_what_is_new() -> TestResult {
    let dir = tempfile::tempdir()?;
    let (pictures, folder) = (dir.path().join("p"), dir.path().join("cache"));
    let clip = tiny_clip(1);
    let source = Counting::new(&pictures, 12);
    let first = CachedFeatures::new(source.clone(), &clip, Some(folder.clone()));
    prepare(&first, &clip, &[0, 1, 2, 3], GLOBAL)?;
    prepare(&first, &clip, &[0, 1, 2, 3, 3], GLOBAL)?;
    assert_eq!(source.encoded(), 4);

    let again = CachedFeatures::new(source.clone(), &clip, Some(folder.clone()));
    prepare(&again, &clip, &[2, 3, 4], GLOBAL)?;
    assert_eq!(source.encoded(), 1);
    let cached = again.images(&clip, &[4, 3, 2], GLOBAL.0, GLOBAL.1)?;
    assert_eq!(source.encoded(), 0);
    let expected = fresh(&source, &clip, &[4, 3, 2], GLOBAL)?;
    assert_eq!(values_of(&cached, GLOBAL.0), expected);
    source.encoded();

    // Other weights, another view, another need: nothing of it is reused.
    let other = tiny_clip(2);
    let cache = CachedFeatures::new(source.clone(), &other, Some(folder.clone()));
    prepare(&cache, &other, &[2, 3], GLOBAL)?;
    assert_eq!(source.encoded(), 2);
    assert!(prepare(&cache, &clip, &[2, 3], GLOBAL).is_err());
    cache.images(&clip, &[2, 3], GLOBAL.0, GLOBAL.1)?;
    assert_eq!(source.encoded(), 2);
    for kind in [
        (ImageNeeds::LocalFeatures, View::Fixed),
        (
            ImageNeeds::GlobalFeatures,
            View::Random { seed: 1, draw: 0 },
        ),
        (
            ImageNeeds::GlobalFeatures,
            View::Random { seed: 1, draw: 1 },
        ),
        (
            ImageNeeds::GlobalFeatures,
            View::Random { seed: 2, draw: 0 },
        ),
    ] {
        prepare(&again, &clip, &[2, 3], kind)?;
        assert_eq!(source.encoded(), 2);
    }
    // Pixels are not kept.
    prepare(&again, &clip, &[2, 3], (ImageNeeds::Pixels, View::Fixed))?;
    assert_eq!(source.encoded(), 0);

    // A picture that has changed is another picture.
    write_picture(&pictures.join("2.png"), 77, (20, 22));
    let source = Counting::new(&pictures, 12);
    let cache = CachedFeatures::new(source.clone(), &clip, Some(folder));
    prepare(&cache, &clip, &[2, 3], GLOBAL)?;
    assert_eq!(source.encoded(), 1);
    let cached = cache.images(&clip, &[2], GLOBAL.0, GLOBAL.1)?;
    let expected = fresh(&source, &clip, &[2], GLOBAL)?;
    assert_eq!(values_of(&cached, GLOBAL.0), expected);
    Ok(())
}

#[test]
fn damaged_files_are_noticed_and_replaced() -> TestResult {
    let dir = tempfile::tempdir()?;
    let (pictures, folder) = (dir.path().join("p"), dir.path().join("cache"));
    let clip = tiny_clip(1);
    let source = Counting::new(&pictures, 3);
    let expected = fresh(&source, &clip, &[0, 1, 2], GLOBAL)?;
    let cache = || CachedFeatures::new(source.clone(), &clip, Some(folder.clone()));
    prepare(&cache(), &clip, &[0, 1, 2], GLOBAL)?;
    let [path] = files(&folder).try_into().unwrap();
    let good = fs::read(&path)?;
    let one_bit = |at: usize| {
        let mut bytes = good.clone();
        bytes[at] ^= 4;
        bytes
    };
    let first_feature = good.len() - 32 - 3 * (32 + 32);
    for bad in [
        Vec::new(),
        good[..7].to_vec(),
        good[..good.len() - 1].to_vec(),
        good[..good.len() - 64].to_vec(),
        [&good[..], b"x"].concat(),
        one_bit(0),
        one_bit(20),
        one_bit(first_feature),
        one_bit(good.len() - 1),
    ] {
        overwrite(&path, &bad);
        source.encoded();
        let cache = cache();
        let warnings = prepare(&cache, &clip, &[0, 1, 2], GLOBAL)?;
        assert_eq!(warnings.len(), 1);
        assert!(
            warnings[0].contains(&path.display().to_string()),
            "{warnings:?}"
        );
        assert_eq!(source.encoded(), 3);
        let cached = cache.images(&clip, &[0, 1, 2], GLOBAL.0, GLOBAL.1)?;
        assert_eq!(values_of(&cached, GLOBAL.0), expected);
        assert_eq!(fs::read(&path)?, good);
    }
    Ok(())
}

#[test]
fn the_file_is_safetensors() -> TestResult {
    let dir = tempfile::tempdir()?;
    let folder = dir.path().join("cache");
    let clip = tiny_clip(1);
    let source = Counting::new(&dir.path().join("p"), 3);
    let cache = CachedFeatures::new(source.clone(), &clip, Some(folder.clone()));
    prepare(
        &cache,
        &clip,
        &[0, 1, 2],
        (ImageNeeds::LocalFeatures, View::Fixed),
    )?;
    let bytes = fs::read(&files(&folder)[0])?;
    let file = safetensors::SafeTensors::deserialize(&bytes)?;
    assert_eq!(file.tensor("features")?.shape(), [3, 5, 8]);
    assert_eq!(file.tensor("items")?.shape(), [3, 32]);
    assert_eq!(file.len(), 3);
    Ok(())
}

#[test]
fn without_a_usable_folder_it_works_and_says_so() -> TestResult {
    let dir = tempfile::tempdir()?;
    let clip = tiny_clip(1);
    let source = Counting::new(&dir.path().join("p"), 3);
    let none = CachedFeatures::new(source.clone(), &clip, None);
    assert!(prepare(&none, &clip, &[0, 1, 2], GLOBAL)?.is_empty());

    // A file where the folder should be: refused to every user, root too.
    let blocked = dir.path().join("blocked");
    overwrite(&blocked, b"");
    let cache = CachedFeatures::new(source.clone(), &clip, Some(blocked.join("cache")));
    let warnings = prepare(&cache, &clip, &[0, 1, 2], GLOBAL)?;
    assert_eq!(warnings.len(), 1);
    assert!(warnings[0].contains("blocked"), "{warnings:?}");

    source.encoded();
    for cache in [none, cache] {
        let cached = cache.images(&clip, &[2, 0], GLOBAL.0, GLOBAL.1)?;
        assert_eq!(source.encoded(), 0);
        let expected = fresh(&source, &clip, &[2, 0], GLOBAL)?;
        assert_eq!(values_of(&cached, GLOBAL.0), expected);
        source.encoded();
    }
    Ok(())
}

#[test]
fn a_bad_image_is_named_and_leaves_no_file() -> TestResult {
    let dir = tempfile::tempdir()?;
    let (pictures, folder) = (dir.path().join("p"), dir.path().join("cache"));
    let clip = tiny_clip(1);
    let source = Counting::new(&pictures, 3);
    overwrite(&pictures.join("1.png"), b"no picture");
    let cache = CachedFeatures::new(source, &clip, Some(folder.clone()));
    let error = prepare(&cache, &clip, &[0, 1, 2], GLOBAL).unwrap_err();
    assert!(error.to_string().contains("1.png"), "{error}");
    assert!(files(&folder).is_empty());
    Ok(())
}

#[test]
fn several_may_fill_one_folder_at_once() -> TestResult {
    let dir = tempfile::tempdir()?;
    let (pictures, folder) = (dir.path().join("p"), dir.path().join("cache"));
    let clip = tiny_clip(1);
    let source = Counting::new(&pictures, 6);
    let expected = fresh(&source, &clip, &[0, 5], GLOBAL)?;
    std::thread::scope(|scope| {
        let fill = || {
            let cache = CachedFeatures::new(source.clone(), &clip, Some(folder.clone()));
            let warnings = prepare(&cache, &clip, &[0, 1, 2, 3, 4, 5], GLOBAL).unwrap();
            let cached = cache.images(&clip, &[0, 5], GLOBAL.0, GLOBAL.1).unwrap();
            (warnings, values_of(&cached, GLOBAL.0))
        };
        let threads: Vec<_> = (0..4).map(|_| scope.spawn(fill)).collect();
        for thread in threads {
            let (warnings, values) = thread.join().unwrap();
            assert!(warnings.is_empty(), "{warnings:?}");
            assert_eq!(values, expected);
        }
    });
    assert_eq!(files(&folder).len(), 1);
    Ok(())
}

fn small_context() -> Context {
    Context {
        key: "0123".into(),
        row_shape: vec![2],
    }
}

fn small_file() -> Vec<u8> {
    let mut file = Vec::new();
    let items = [(0, [1; 32]), (1, [2; 32]), (2, [3; 32])];
    shard::write(&mut file, &small_context(), &items, 2, &mut |batch| {
        Ok(vec![7; 8 * batch.len()])
    })
    .unwrap();
    file
}

/// Everything that may be done with a file.
fn use_file(bytes: &[u8]) -> Result<(), String> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("f");
    overwrite(&path, bytes);
    let shard = Shard::open(&path, &small_context())?;
    let rows = shard.keys().count();
    for row in 0..rows {
        assert_eq!(shard.row(row).map(<[u8]>::len), Some(8));
    }
    assert!(shard.row(rows).is_none());
    shard.verify()
}

#[test]
fn the_small_file_is_good() {
    assert_eq!(use_file(&small_file()), Ok(()));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn no_file_makes_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        prop_assert!(use_file(&bytes).is_err());
    }

    #[test]
    fn no_damage_goes_unnoticed(at in any::<prop::sample::Index>(), to: u8, cut in any::<prop::sample::Index>()) {
        let good = small_file();
        let mut bad = good.clone();
        let at = at.index(bad.len());
        bad[at] = to;
        bad.truncate(cut.index(bad.len()) + 1);
        if bad != good {
            prop_assert!(use_file(&bad).is_err());
        }
        let mut bad = good.clone();
        bad[at] = to;
        prop_assert_eq!(use_file(&bad).is_ok(), bad == good);
    }
}
