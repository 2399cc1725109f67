//! The frozen vision transformer forward, on plain slices.
//!
//! An image is one task: it runs through all blocks in a buffer that the thread's next image finds again. Nothing that is
//! computed depends on the other images or on the number of threads.

use rayon::prelude::*;

use crate::clip::FrozenBlock;
use crate::engine::buffers::{Buffers, Cut};
use crate::engine::image::block::{self, Made, Shape, Until};
use crate::engine::image::run::Entry;
use crate::ops::{FrozenLinear, FrozenNorm, Threads};

/// The tower's parts.
pub(super) struct Runner<'a> {
    pub(super) entry: &'a Entry,
    pub(super) patches: &'a FrozenLinear,
    pub(super) ln_pre: &'a FrozenNorm,
    pub(super) blocks: Vec<FrozenBlock<'a>>,
    pub(super) ln_post: &'a FrozenNorm,
    pub(super) projection: &'a FrozenLinear,
    pub(super) patch_size: usize,
    /// Pixels of a side.
    pub(super) side: usize,
}

/// Whose features are wanted.
#[derive(Clone, Copy, Debug)]
pub(super) enum Wanted {
    ClassToken,
    EveryToken,
}

impl Runner<'_> {
    fn width(&self) -> usize {
        self.entry.class_embedding.len()
    }

    fn tokens(&self) -> usize {
        self.entry.positions.len() / self.width()
    }

    /// `(batch, 3, side, side)` → `(batch, embed_dim)`, or of every token `(batch, tokens, embed_dim)`.
    pub(super) fn run(&self, pixels: &[f32], wanted: Wanted) -> Vec<f32> {
        let rows = match wanted {
            Wanted::ClassToken => 1,
            Wanted::EveryToken => self.tokens(),
        };
        let image = 3 * self.side * self.side;
        let feature = rows * self.projection.out_width();
        let mut features = vec![0.0; pixels.len() / image * feature];
        let buffers = Buffers::default();
        let threads = Threads::for_tasks(pixels.len() / image);
        features
            .par_chunks_mut(feature)
            .zip(pixels.par_chunks(image))
            .with_max_len(1)
            .for_each(|(out, image)| self.image(image, rows, threads, &buffers, out));
        features
    }

    /// One image; features of its first `wanted` tokens.
    fn image(
        &self,
        pixels: &[f32],
        wanted: usize,
        threads: Threads,
        buffers: &Buffers,
        out: &mut [f32],
    ) {
        let (width, tokens) = (self.width(), self.tokens());
        let sizes = sizes(tokens, width, self.patch_size);
        let mut buffer = buffers.take(sizes.iter().sum());
        let mut cut = Cut::new(&mut buffer);
        let [x, made, room] = sizes.map(|size| cut.take(size));
        self.enter(pixels, x, room, threads);
        for (layer, block) in self.blocks.iter().enumerate() {
            // What the last block does to the other rows is never read.
            let asking = match layer + 1 == self.blocks.len() {
                true => wanted,
                false => tokens,
            };
            let shape = Shape::plain(tokens, asking, width);
            let made = Made::in_passing(made, shape);
            block::forward(block, shape, x, made, room, threads, Until::Output);
        }
        let (x, normed) = (&x[..wanted * width], &mut room[..wanted * width]);
        self.ln_post.normalise(x, normed);
        self.projection.apply(normed, wanted, out, threads);
        buffers.give(buffer);
    }

    /// The rows that the first block reads.
    fn enter(&self, pixels: &[f32], x: &mut [f32], room: &mut [f32], threads: Threads) {
        let (width, tokens) = (self.width(), self.tokens());
        let mut cut = Cut::new(room);
        let (embedded, of_patches) = (cut.take(tokens * width), cut.take((tokens - 1) * width));
        let patches = cut.take((tokens - 1) * 3 * self.patch_size * self.patch_size);
        self.patch_rows(pixels, patches);
        self.patches.apply(patches, tokens - 1, of_patches, threads);
        self.entry.embed(of_patches, embedded);
        self.ln_pre.normalise(embedded, x);
    }

    /// Every patch's pixels as a row of a matrix: a convolution whose step is its kernel is a product with it.
    fn patch_rows(&self, pixels: &[f32], out: &mut [f32]) {
        let (side, p) = (self.side, self.patch_size);
        let grid = side / p;
        for (i, row) in out
            .chunks_exact_mut(3 * p * p)
            .take(grid * grid)
            .enumerate()
        {
            let corner = i / grid * p * side + i % grid * p;
            for (line, to) in row.chunks_exact_mut(p).enumerate() {
                let from = line / p * side * side + corner + line % p * side;
                to.copy_from_slice(&pixels[from..][..p]);
            }
        }
    }
}

/// Floats in which one image is computed: its tokens, what a block makes, and room for the rest.
pub(super) fn sizes(tokens: usize, width: usize, patch_size: usize) -> [usize; 3] {
    let shape = Shape::plain(tokens, tokens, width);
    let patches = (tokens - 1) * 3 * patch_size * patch_size;
    [
        tokens * width,
        shape.made_in_passing(),
        shape.room().max(2 * tokens * width + patches),
    ]
}
