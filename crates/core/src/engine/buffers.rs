//! Buffers that outlive a step, so that the next one allocates nothing large and touches no fresh pages.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

/// Buffers that nobody uses at the moment.
#[derive(Debug, Default)]
pub(crate) struct Buffers {
    spare: Mutex<Vec<Vec<f32>>>,
    /// Whether a training pass was here since the last [`Buffers::clear`].
    trained: AtomicBool,
}

impl Buffers {
    /// A buffer of at least `len` floats, whose contents are arbitrary: the smallest spare one that is large enough, else a
    /// new one in place of the largest that is too small.
    pub(crate) fn take(&self, len: usize) -> Vec<f32> {
        // Nearly equal sizes share buffers. What nobody touches of a fresh one takes no memory.
        let len = len.next_multiple_of(len.next_power_of_two() / 8 + 1);
        let mut spare = self.spare.lock().unwrap_or_else(PoisonError::into_inner);
        let fitting = spare
            .iter()
            .enumerate()
            // Not one that is far too large: another user will want it.
            .filter(|(_, b)| b.len() >= len && b.len() / 2 <= len)
            .min_by_key(|(_, b)| b.len());
        match fitting.map(|(i, _)| i) {
            Some(i) => spare.swap_remove(i),
            None => {
                let smaller = spare.iter().enumerate().filter(|(_, b)| b.len() < len);
                let outgrown = smaller.max_by_key(|(_, b)| b.len()).map(|(i, _)| i);
                let outgrown = outgrown.map(|i| spare.swap_remove(i));
                drop(spare);
                drop(outgrown);
                vec![0.0; len]
            }
        }
    }

    /// Keeps a buffer for the next that asks.
    pub(crate) fn give(&self, buffer: Vec<f32>) {
        if !buffer.is_empty() {
            let mut spare = self.spare.lock().unwrap_or_else(PoisonError::into_inner);
            spare.push(buffer);
        }
    }

    /// Says that the pass that begins keeps something for its way back, or not. The first that does not frees what training
    /// has left: it may be over.
    pub(crate) fn begin(&self, training: bool) {
        if self.trained.swap(training, Ordering::Relaxed) && !training {
            self.clear();
        }
    }

    /// Frees what is spare.
    pub(crate) fn clear(&self) {
        let spare = std::mem::take(&mut *self.spare.lock().unwrap_or_else(PoisonError::into_inner));
        drop(spare);
    }
}

/// Cuts a buffer into pieces.
pub(crate) struct Cut<'a>(&'a mut [f32]);

impl<'a> Cut<'a> {
    pub(crate) fn new(buffer: &'a mut [f32]) -> Self {
        Self(buffer)
    }

    pub(crate) fn take(&mut self, len: usize) -> &'a mut [f32] {
        let (piece, rest) = std::mem::take(&mut self.0).split_at_mut(len);
        self.0 = rest;
        piece
    }
}
