//! One residual block on the tokens of one image, forward and backward.

use super::attend::{Sizes, attend, attend_backward};
use crate::HEAD_WIDTH;
use crate::clip::FrozenBlock;
use crate::engine::buffers::{Buffers, Cut};
use crate::kernels::rows;
use crate::ops::Threads;

/// Rows that pass the MLP at a time.
pub(crate) const MLP_ROWS: usize = 200;

/// Which rows an image has at a block.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Shape {
    /// Rows that run through the block.
    pub(crate) rows: usize,
    /// Rows that are seen; behind `rows` stand guests, of which only keys and values exist.
    pub(crate) keys: usize,
    /// How many of the rows ask, the first ones: those whose output somebody reads.
    pub(crate) asking: usize,
    pub(crate) width: usize,
}

impl Shape {
    /// As many tokens as there are, the first `asking` of which are read.
    pub(crate) fn plain(tokens: usize, asking: usize, width: usize) -> Self {
        Self {
            rows: tokens,
            keys: tokens,
            asking,
            width,
        }
    }

    fn heads(self) -> usize {
        self.width / HEAD_WIDTH
    }

    fn mlp(self) -> usize {
        MLP_ROWS.min(self.asking) * 4 * self.width
    }

    /// Floats that a pass forward is computed in.
    pub(crate) fn room(self) -> usize {
        self.rows * self.width + self.mlp() + self.asking * self.keys
    }

    /// Floats that a way back is computed in, for the gradient from row `from` on.
    pub(crate) fn room_back(self, from: usize) -> usize {
        self.rows * self.width
            + self.mlp()
            + 3 * self.keys * self.width
            + self.attention(from).room()
    }

    /// Floats of [`Made`].
    pub(crate) fn made(self) -> usize {
        (3 * self.keys + 5 * self.asking) * self.width + self.heads() * self.asking
    }

    /// Floats of [`Made`] if nobody goes back.
    pub(crate) fn made_in_passing(self) -> usize {
        3 * self.keys * self.width + 4 * self.width
    }

    fn attention(self, from: usize) -> Sizes {
        Sizes {
            width: self.width,
            asking: self.asking,
            keys: self.keys,
            from,
        }
    }
}

/// What a block makes on its way.
pub(crate) struct Made<'a> {
    /// Queries, keys and values `(keys, 3·width)`; those of the guests are there before.
    pub(crate) qkv: &'a mut [f32],
    /// `(asking, heads)`, see [`attend`]; or empty.
    pub(crate) log_sums: &'a mut [f32],
    /// After attention, `(asking, width)`; or empty.
    pub(crate) middle: &'a mut [f32],
    /// In the MLP before the activation, `(asking, 4·width)`; or room for one row.
    pub(crate) hidden: &'a mut [f32],
}

impl<'a> Made<'a> {
    /// Everything that the way back needs, in [`Shape::made`] floats.
    pub(crate) fn kept(buffer: &'a mut [f32], shape: Shape) -> Self {
        let mut cut = Cut::new(buffer);
        Self {
            qkv: cut.take(3 * shape.keys * shape.width),
            log_sums: cut.take(shape.asking * shape.heads()),
            middle: cut.take(shape.asking * shape.width),
            hidden: cut.take(4 * shape.asking * shape.width),
        }
    }

    /// What nobody reads later, in [`Shape::made_in_passing`] floats.
    pub(crate) fn in_passing(buffer: &'a mut [f32], shape: Shape) -> Self {
        let mut cut = Cut::new(buffer);
        Self {
            qkv: cut.take(3 * shape.keys * shape.width),
            log_sums: &mut [],
            middle: &mut [],
            hidden: cut.take(4 * shape.width),
        }
    }
}

/// How far a pass forward goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Until {
    /// What is made for the way back is there; the output is not.
    Made,
    Output,
}

/// Takes the rows of `x` through a block in place; of the output only the asking rows are what they shall be.
pub(crate) fn forward(
    block: &FrozenBlock<'_>,
    shape: Shape,
    x: &mut [f32],
    made: Made<'_>,
    room: &mut [f32],
    threads: Threads,
    until: Until,
) {
    let Shape {
        rows,
        keys,
        asking,
        width,
    } = shape;
    let mut cut = Cut::new(room);
    let (normed, hidden, p) = (
        cut.take(rows * width),
        cut.take(shape.mlp()),
        cut.take(asking * keys),
    );
    block.ln_1.normalise(&x[..rows * width], normed);
    block.in_proj.apply(normed, asking, made.qkv, threads);
    if asking < rows {
        let (normed, qkv) = (
            &normed[asking * width..],
            &mut made.qkv[asking * 3 * width..],
        );
        block.in_proj.apply_keys(normed, rows - asking, qkv);
    }
    let mixed = &mut normed[..asking * width];
    attend(made.qkv, (keys, width), threads, p, made.log_sums, mixed);
    let x = &mut x[..asking * width];
    block.out_proj.add(mixed, asking, x, threads);
    if !made.middle.is_empty() {
        made.middle.copy_from_slice(x);
    }
    let normed = mixed;
    block.ln_2.normalise(x, normed);
    let kept = made.hidden.len() >= asking * 4 * width;
    for (i, (x, normed)) in x
        .chunks_mut(MLP_ROWS * width)
        .zip(normed.chunks(MLP_ROWS * width))
        .enumerate()
    {
        let m = x.len() / width;
        let first = i * MLP_ROWS * 4 * width;
        if until == Until::Made {
            let hidden = &mut made.hidden[first..][..m * 4 * width];
            block.c_fc.apply(normed, m, hidden, threads);
            continue;
        }
        let hidden = &mut hidden[..m * 4 * width];
        block.c_fc.apply(normed, m, hidden, threads);
        for (j, hidden) in hidden.chunks_exact_mut(4 * width).enumerate() {
            let at = if kept { first + j * 4 * width } else { 0 };
            let line = &mut made.hidden[at..][..4 * width];
            line.copy_from_slice(hidden);
            rows::activate(block.activation, line, hidden);
        }
        block.c_proj.add(hidden, m, x, threads);
    }
}

/// What the way back through a block reads: its input `(rows, width)`, and [`Made`].
pub(crate) struct Kept<'a> {
    pub(crate) x: &'a [f32],
    pub(crate) qkv: &'a [f32],
    pub(crate) log_sums: &'a [f32],
    pub(crate) middle: &'a [f32],
    pub(crate) hidden: &'a [f32],
}

impl<'a> Kept<'a> {
    pub(crate) fn new(x: &'a [f32], made: &'a [f32], shape: Shape) -> Self {
        let (qkv, rest) = made.split_at(3 * shape.keys * shape.width);
        let (log_sums, rest) = rest.split_at(shape.asking * shape.heads());
        let (middle, rest) = rest.split_at(shape.asking * shape.width);
        Self {
            x,
            qkv,
            log_sums,
            middle,
            hidden: &rest[..4 * shape.asking * shape.width],
        }
    }
}

/// Turns the gradient of the asking rows' outputs in `d` into that of the rows' inputs, from row `from` on, and gives that of
/// the guests' queries (zero), keys and values, rows of `3·width` inside `room`.
///
/// `d_norms`, if not empty, takes the gradients of `ln_1`'s gain and bias and `ln_2`'s; `from` is then 0.
#[allow(clippy::too_many_arguments)] // a block with what it reads and where it writes
pub(crate) fn backward<'r>(
    block: &FrozenBlock<'_>,
    shape: Shape,
    kept: &Kept<'_>,
    from: usize,
    d: &mut [f32],
    d_norms: &mut [f32],
    room: &'r mut [f32],
    threads: Threads,
    buffers: &Buffers,
) -> &'r [f32] {
    let Shape {
        rows,
        keys,
        asking,
        width,
    } = shape;
    let mut cut = Cut::new(room);
    let (d_normed, d_hidden, d_qkv) = (
        cut.take(rows * width),
        cut.take(shape.mlp()),
        cut.take(3 * keys * width),
    );
    let d_out = &mut d[..asking * width];
    for ((d_out, d_normed), hidden) in d_out
        .chunks(MLP_ROWS * width)
        .zip(d_normed.chunks_mut(MLP_ROWS * width))
        .zip(kept.hidden.chunks(MLP_ROWS * 4 * width))
    {
        let m = d_out.len() / width;
        let d_hidden = &mut d_hidden[..m * 4 * width];
        block.c_proj.backward(d_out, m, d_hidden, threads);
        rows::activate_backward(block.activation, hidden, d_hidden);
        block.c_fc.backward(d_hidden, m, d_normed, threads);
    }
    let d_mixed = &mut d_normed[..asking * width];
    if !d_norms.is_empty() {
        let d_ln_2 = &mut d_norms[2 * width..];
        block.ln_2.weights_backward(kept.middle, d_mixed, d_ln_2);
    }
    block.ln_2.backward(kept.middle, d_mixed, d_out);
    block.out_proj.backward(d_out, asking, d_mixed, threads);
    attend_backward(
        kept.qkv,
        kept.log_sums,
        d_mixed,
        shape.attention(from),
        threads,
        buffers,
        d_qkv,
    );
    if from < rows {
        let (d_normed, x) = (&mut d_normed[from * width..], &kept.x[from * width..]);
        let d_own = &d_qkv[from * 3 * width..rows * 3 * width];
        block
            .in_proj
            .backward(d_own, rows - from, d_normed, threads);
        if !d_norms.is_empty() {
            block.ln_1.weights_backward(x, d_normed, d_norms);
        }
        d[asking * width..rows * width].fill(0.0);
        let d = &mut d[from * width..rows * width];
        block.ln_1.backward(x, d_normed, d);
    }
    &d_qkv[rows * 3 * width..keys * 3 * width]
}
