//! Work on several threads whose results are taken in order, so that no sum depends on who was first.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

/// Calls `work` for `0..n` on up to `at_a_time` threads, and `take` with its results in their order.
pub(super) fn in_order<T: Send>(
    n: usize,
    at_a_time: usize,
    work: impl Fn(usize) -> T + Sync,
    take: impl FnMut(usize, T) + Send,
) {
    struct Waiting<T, F> {
        next: usize,
        done: BTreeMap<usize, T>,
        take: F,
    }
    let waiting = Mutex::new(Waiting {
        next: 0,
        done: BTreeMap::new(),
        take,
    });
    let next = AtomicUsize::new(0);
    let worker = || {
        loop {
            let i = next.fetch_add(1, Ordering::Relaxed);
            if i >= n {
                return;
            }
            let result = work(i);
            let mut waiting = waiting.lock().unwrap_or_else(PoisonError::into_inner);
            let waiting = &mut *waiting;
            waiting.done.insert(i, result);
            while let Some(result) = waiting.done.remove(&waiting.next) {
                (waiting.take)(waiting.next, result);
                waiting.next += 1;
            }
        }
    };
    match n.min(at_a_time).min(rayon::current_num_threads()) {
        0 | 1 => worker(),
        workers => rayon::scope(|scope| (0..workers).for_each(|_| scope.spawn(|_| worker()))),
    }
}
