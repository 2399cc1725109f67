//! The frozen vision transformer forward, on plain slices.
//!
//! An image is one task: it runs through all blocks in a buffer that the thread's next image finds again. Nothing that is
//! computed depends on the other images or on the number of threads.

use rayon::prelude::*;

use crate::HEAD_WIDTH;
use crate::clip::FrozenBlock;
use crate::engine::buffers::{Buffers, Cut};
use crate::kernels::{self, Mat, rows};
use crate::ops::{FrozenLinear, FrozenNorm, Threads};

/// Rows that ask at a time in attention: their probabilities stay in the first caches.
const QUERIES: usize = 64;
/// Rows that pass the MLP at a time.
const MLP_ROWS: usize = 200;

/// The tower's parts.
pub(super) struct Runner<'a> {
    /// `(width)`.
    pub(super) class_embedding: Vec<f32>,
    /// `(1 + grid², width)`.
    pub(super) positions: Vec<f32>,
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

/// What one image needs on its way, cut from one buffer.
struct Room<'a> {
    /// `(tokens, width)`.
    x: &'a mut [f32],
    /// After a LayerNorm, then what attention gives, `(tokens, width)`.
    normed: &'a mut [f32],
    /// Queries, keys and values, `(tokens, 3·width)`; at first the embedded patches and the patches' pixels.
    qkv: &'a mut [f32],
    /// Inside the MLP, `(MLP_ROWS, 4·width)`.
    hidden: &'a mut [f32],
    /// A row of `hidden` before the activation.
    line: &'a mut [f32],
    /// Probabilities of a head, `(tokens, tokens)`.
    p: &'a mut [f32],
    /// Tokens and width.
    sizes: (usize, usize),
    /// Who computes a product: all threads if there are more than images.
    threads: Threads,
}

impl Runner<'_> {
    fn width(&self) -> usize {
        self.class_embedding.len()
    }

    fn tokens(&self) -> usize {
        self.positions.len() / self.width()
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
        let [x, normed, qkv, hidden, line, p] = sizes.map(|size| cut.take(size));
        let mut room = Room {
            x,
            normed,
            qkv,
            hidden,
            line,
            p,
            sizes: (tokens, width),
            threads,
        };
        self.enter(pixels, &mut room);
        for (layer, block) in self.blocks.iter().enumerate() {
            // What the last block does to the other rows is never read.
            let asking = match layer + 1 == self.blocks.len() {
                true => wanted,
                false => tokens,
            };
            apply(block, asking, &mut room);
        }
        let normed = &mut room.normed[..wanted * width];
        self.ln_post.normalise(&room.x[..wanted * width], normed);
        self.projection.apply(normed, wanted, out, threads);
        buffers.give(buffer);
    }

    /// The rows that the first block reads.
    fn enter(&self, pixels: &[f32], room: &mut Room<'_>) {
        let (width, tokens) = (self.width(), self.tokens());
        let (embedded, patches) = room.qkv.split_at_mut(tokens * width);
        self.patch_rows(pixels, patches);
        embedded[..width].copy_from_slice(&self.class_embedding);
        self.patches
            .apply(patches, tokens - 1, &mut embedded[width..], room.threads);
        rows::add_into(embedded, &self.positions);
        self.ln_pre.normalise(embedded, room.x);
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

/// Floats of [`Room`]'s parts, in their order.
pub(super) fn sizes(tokens: usize, width: usize, patch_size: usize) -> [usize; 6] {
    let patch = 3 * patch_size * patch_size;
    [
        tokens * width,
        tokens * width,
        tokens * (3 * width).max(width + patch),
        MLP_ROWS.min(tokens) * 4 * width,
        4 * width,
        tokens * tokens,
    ]
}

/// One block; only the first `asking` rows of `room.x` are what they shall be.
fn apply(block: &FrozenBlock<'_>, asking: usize, room: &mut Room<'_>) {
    let ((tokens, width), threads) = (room.sizes, room.threads);
    let (normed, qkv) = (&mut *room.normed, &mut *room.qkv);
    block.ln_1.normalise(room.x, normed);
    block.in_proj.apply(normed, asking, qkv, threads);
    if asking < tokens {
        block.in_proj.apply_keys(normed, tokens, qkv);
    }
    let mixed = &mut normed[..asking * width];
    attend(qkv, (tokens, width), threads, room.p, mixed);
    let x = &mut room.x[..asking * width];
    block.out_proj.add(mixed, asking, x, threads);
    let normed = mixed;
    block.ln_2.normalise(x, normed);
    for (x, normed) in x
        .chunks_mut(MLP_ROWS * width)
        .zip(normed.chunks(MLP_ROWS * width))
    {
        let m = x.len() / width;
        let hidden = &mut room.hidden[..m * 4 * width];
        block.c_fc.apply(normed, m, hidden, threads);
        for hidden in hidden.chunks_exact_mut(4 * width) {
            room.line.copy_from_slice(hidden);
            rows::activate(block.activation, room.line, hidden);
        }
        block.c_proj.add(hidden, m, x, threads);
    }
}

/// Attention of as many rows as `mixed` has, the first ones, to all; `p` has room for their probabilities in one head.
pub(super) fn attend(
    qkv: &[f32],
    (tokens, width): (usize, usize),
    threads: Threads,
    p: &mut [f32],
    mixed: &mut [f32],
) {
    let some = |(i, (mixed, p)): (usize, (&mut [f32], &mut [f32]))| {
        attend_some(qkv, (tokens, width), i * QUERIES, p, mixed);
    };
    let (rows, probabilities) = (QUERIES * width, QUERIES * tokens);
    match threads {
        Threads::One => mixed
            .chunks_mut(rows)
            .zip(p.chunks_mut(probabilities))
            .enumerate()
            .for_each(some),
        Threads::All => mixed
            .par_chunks_mut(rows)
            .zip(p.par_chunks_mut(probabilities))
            .enumerate()
            .for_each(some),
    }
}

/// As [`attend`], from row `first` on.
fn attend_some(
    qkv: &[f32],
    (tokens, width): (usize, usize),
    first: usize,
    p: &mut [f32],
    mixed: &mut [f32],
) {
    let m = mixed.len() / width;
    let p = &mut p[..m * tokens];
    let scale = 1.0 / (HEAD_WIDTH as f32).sqrt();
    for head in (0..width).step_by(HEAD_WIDTH) {
        let q = Mat::rows(&qkv[first * 3 * width + head..], 3 * width);
        let k = Mat::columns(&qkv[width + head..], 3 * width);
        let v = Mat::rows(&qkv[2 * width + head..], 3 * width);
        kernels::gemm(m, tokens, HEAD_WIDTH, scale, q, k, 0.0, p, tokens);
        rows::vectorised(
            #[inline(always)]
            || p.chunks_exact_mut(tokens).for_each(rows::softmax),
        );
        let p = Mat::rows(p, tokens);
        let mixed = &mut mixed[head..];
        kernels::gemm(m, HEAD_WIDTH, tokens, 1.0, p, v, 0.0, mixed, width);
    }
}
