//! Work on several threads whose results are taken in order, so that no sum depends on who was first.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use rayon::Scope;

use super::buffers::Cut;

/// Results that may wait or be in the making for each worker. One that is held up by other programs then stops the others
/// before what they have done fills the memory.
pub(super) const AHEAD: usize = 2;

/// Calls `work` for `0..n` on up to `at_a_time` threads, and `take` with its results in their order.
pub(super) fn in_order<T: Send>(
    n: usize,
    at_a_time: usize,
    work: impl Fn(usize) -> T + Sync,
    mut take: impl FnMut(usize, T) + Send,
) {
    let workers = n.min(at_a_time).min(rayon::current_num_threads());
    if workers < 2 {
        return (0..n).for_each(|i| take(i, work(i)));
    }
    let line = Line {
        n,
        workers,
        work,
        state: Mutex::new(State {
            running: workers,
            begun: 0,
            taken: 0,
            done: BTreeMap::new(),
            take,
        }),
    };
    rayon::scope(|scope| (0..workers).for_each(|_| scope.spawn(|scope| line.run(scope))));
}

/// As [`in_order`], giving each piece of work a part of `buffer` of its own: one after the other, of these sizes.
pub(super) fn in_order_into<T: Send>(
    buffer: &mut [f32],
    sizes: impl Iterator<Item = usize>,
    at_a_time: usize,
    work: impl Fn(usize, &mut [f32]) -> T + Sync,
    take: impl FnMut(usize, T) + Send,
) {
    let mut cut = Cut::new(buffer);
    let parts: Vec<Mutex<&mut [f32]>> = sizes.map(|size| Mutex::new(cut.take(size))).collect();
    let work = |i: usize| {
        let mut part = parts[i].lock().unwrap_or_else(PoisonError::into_inner);
        work(i, &mut part)
    };
    in_order(parts.len(), at_a_time, work, take);
}

struct Line<T, W, F> {
    n: usize,
    workers: usize,
    work: W,
    state: Mutex<State<T, F>>,
}

struct State<T, F> {
    /// Workers that have not gone home.
    running: usize,
    begun: usize,
    taken: usize,
    done: BTreeMap<usize, T>,
    take: F,
}

impl<T: Send, W: Fn(usize) -> T + Sync, F: FnMut(usize, T) + Send> Line<T, W, F> {
    /// A worker. One that would be too far ahead goes home, and is called back by the one that all wait for: it must not
    /// wait itself, since that one may be below it on its thread's stack.
    fn run<'s>(&'s self, scope: &Scope<'s>) {
        loop {
            let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
            let i = state.begun;
            if i == self.n.min(state.taken + AHEAD * self.workers) {
                state.running -= 1;
                return;
            }
            state.begun += 1;
            drop(state);
            let result = (self.work)(i);
            let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
            let state = &mut *state;
            state.done.insert(i, result);
            while let Some(result) = state.done.remove(&state.taken) {
                (state.take)(state.taken, result);
                state.taken += 1;
            }
            while state.running < self.workers && state.begun < self.n {
                state.running += 1;
                scope.spawn(|scope| self.run(scope));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::time::{Duration, Instant};

    use super::*;

    #[test]
    fn nobody_gets_far_ahead_of_one_that_is_held_up() {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(3);
        let (begun, taken) = (AtomicUsize::new(0), AtomicUsize::new(0));
        let ahead = AtomicUsize::new(0);
        let mut order = Vec::new();
        pool.build().unwrap().install(|| {
            let work = |i: usize| {
                let now = begun.fetch_add(1, Ordering::SeqCst) + 1;
                ahead.fetch_max(now - taken.load(Ordering::SeqCst), Ordering::SeqCst);
                // Twice one is held up until the others are as far as they may get, and a little longer.
                if i % 20 == 3 {
                    let (started, limit) = (Instant::now(), Duration::from_secs(20));
                    while begun.load(Ordering::SeqCst) < i + AHEAD * 3 && started.elapsed() < limit
                    {
                        std::thread::yield_now();
                    }
                    std::thread::sleep(Duration::from_millis(5));
                }
                i * i
            };
            in_order(40, 3, work, |i, square| {
                taken.fetch_add(1, Ordering::SeqCst);
                order.push((i, square));
            });
        });
        assert!(order.into_iter().eq((0..40).map(|i| (i, i * i))));
        assert_eq!(ahead.into_inner(), AHEAD * 3);
    }
}
