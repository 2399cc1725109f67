//! Work that runs share: encoded pictures, and the test pictures that the report shows.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result};
use candle_core::Tensor;
use cliptune::data::Event;
use cliptune::{Clip, ImageNeeds, ImageSource, Preprocess, View, files};

use super::progress::Show;
use super::worker::{Job, cached, picture_file, sample_positions};

/// What runs need of one task's pictures.
#[derive(Debug)]
struct Needed {
    source: Arc<dyn ImageSource>,
    /// Items to encode, by what is read of them.
    items: Vec<(ImageNeeds, BTreeSet<usize>)>,
    shown: BTreeSet<usize>,
}

/// Encodes what `jobs` will ask for and no cache file holds, once for all of them. `needs` belong to the jobs, in order.
///
/// # Errors
/// Pictures that cannot be read, files that cannot be written.
pub(crate) fn prepare(
    clip: &Clip,
    out: &Path,
    jobs: &[(Job, ImageNeeds)],
    show: &mut Show,
) -> Result<()> {
    let mut tasks: BTreeMap<String, Needed> = BTreeMap::new();
    for (job, needs) in jobs {
        for (task, source, items, shown) in job.pictures()? {
            let needed = tasks.entry(task).or_insert_with(|| Needed {
                source,
                items: Vec::new(),
                shown: BTreeSet::new(),
            });
            needed.add(*needs, items, shown);
        }
    }
    let each = |needed: &Needed| {
        needed
            .items
            .iter()
            .map(|(_, items)| items.len())
            .sum::<usize>()
    };
    let total: usize = tasks.values().map(each).sum();
    show.start("encoding pictures", total as u64);
    let mut before = 0;
    for (task, needed) in &tasks {
        let source = cached(out, task, needed.source.clone(), clip);
        let folder = out.join(super::folder::FEATURES).join(task);
        std::fs::create_dir_all(&folder).with_context(|| folder.display().to_string())?;
        for (needs, items) in &needed.items {
            let items: Vec<usize> = items.iter().copied().collect();
            source.prepare(
                clip,
                &items,
                *needs,
                View::Fixed,
                &mut |event| match event {
                    Event::Progress { done, .. } => show.at((before + done) as u64, task),
                    Event::Warning(message) => show.note(&format!("warning: {message}")),
                },
            )?;
            before += items.len();
        }
        needed.write_shown(clip, out, task)?;
    }
    show.finish();
    Ok(())
}

impl Needed {
    fn add(&mut self, needs: ImageNeeds, items: Vec<usize>, shown: Vec<usize>) {
        self.shown.extend(shown);
        match self.items.iter_mut().find(|(known, _)| *known == needs) {
            Some((_, known)) => known.extend(items),
            None => self.items.push((needs, items.into_iter().collect())),
        }
    }

    /// Writes the pictures that the report shows, as CLIP sees them.
    fn write_shown(&self, clip: &Clip, out: &Path, task: &str) -> Result<()> {
        for &item in &self.shown {
            let file = out.join(picture_file(task, item));
            if file.exists() {
                continue;
            }
            if let Some(folder) = file.parent() {
                std::fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
            }
            let preprocess = clip.preprocess();
            let pixels = self.source.pixels(&[item], preprocess, View::Fixed)?;
            let png = png_of(preprocess, &pixels)?;
            files::write_atomically(&file, |w| w.write_all(&png))?;
        }
        Ok(())
    }
}

/// A picture as the image tower reads it, `(1, 3, side, side)`, before normalisation.
pub(super) fn png_of(preprocess: &Preprocess, pixels: &Tensor) -> Result<Vec<u8>> {
    let side = preprocess.resolution;
    let channels = pixels.flatten_from(2)?.squeeze(0)?.to_vec2::<f32>()?;
    let mut rgb = vec![0u8; 3 * side * side];
    for (c, (channel, (mean, std))) in channels
        .iter()
        .zip(preprocess.mean.iter().zip(preprocess.std))
        .enumerate()
    {
        for (pixel, value) in rgb.iter_mut().skip(c).step_by(3).zip(channel) {
            // Saturates outside of 0 to 255.
            *pixel = (255.0 * (value * std + mean)).round() as u8;
        }
    }
    let mut out = Vec::new();
    let mut encoder = png::Encoder::new(&mut out, side as u32, side as u32);
    encoder.set_color(png::ColorType::Rgb);
    encoder.write_header()?.write_image_data(&rgb)?;
    Ok(out)
}

/// Task, pictures, items to encode, items to show.
type Pictures = (String, Arc<dyn ImageSource>, Vec<usize>, Vec<usize>);

impl Job {
    /// The pictures that the run will read.
    fn pictures(&self) -> Result<Vec<Pictures>> {
        let (labelled, tests) = self.data()?;
        let items = |split: &[(usize, u32)]| split.iter().map(|item| item.0).collect::<Vec<_>>();
        let train = &labelled.train;
        let mut learned_from = items(train.items());
        learned_from.extend(labelled.val.iter().flat_map(|val| items(val.items())));
        let mut pictures = vec![(
            self.key.task.clone(),
            train.source().clone(),
            learned_from,
            Vec::new(),
        )];
        for test in tests {
            let all = items(test.split.items());
            let shown = sample_positions(all.len())
                .filter_map(|p| all.get(p).copied())
                .collect();
            pictures.push((test.task.clone(), test.split.source().clone(), all, shown));
        }
        Ok(pictures)
    }
}
