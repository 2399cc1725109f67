//! Seeded randomness: one independent stream per purpose, so that nothing depends on the order of draws or on threads.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

/// A stream of random numbers that its purpose, the run's seed and some counters determine.
#[derive(Clone, Debug)]
pub struct Rng(ChaCha8Rng);

impl Rng {
    /// The stream for `purpose` (`"init/ctx"`, `"order"`, ...) in a run with `seed`; `counters` tell epochs, items, ... apart.
    pub fn stream(seed: u64, purpose: &str, counters: &[u64]) -> Self {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&seed.to_le_bytes());
        hasher.update(&(counters.len() as u64).to_le_bytes());
        counters.iter().for_each(|c| {
            hasher.update(&c.to_le_bytes());
        });
        hasher.update(purpose.as_bytes());
        Self(ChaCha8Rng::from_seed(*hasher.finalize().as_bytes()))
    }

    /// Uniform in `[0, 1)`, 53 bits.
    pub fn uniform(&mut self) -> f64 {
        (self.0.next_u64() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Uniform in `0..n`, without bias; 0 if `n` is 0.
    pub fn below(&mut self, n: usize) -> usize {
        let n = n as u64;
        if n < 2 {
            return 0;
        }
        let limit = u64::MAX - u64::MAX % n;
        loop {
            let x = self.0.next_u64();
            if x < limit {
                return (x % n) as usize;
            }
        }
    }

    /// `count` numbers from N(0, 1) (Box–Muller in f64).
    pub fn normal(&mut self, count: usize) -> Vec<f64> {
        let mut out = Vec::with_capacity(count + 1);
        while out.len() < count {
            let radius = (-2.0 * (1.0 - self.uniform()).ln()).sqrt();
            let angle = 2.0 * std::f64::consts::PI * self.uniform();
            out.extend([radius * angle.cos(), radius * angle.sin()]);
        }
        out.truncate(count);
        out
    }

    /// `0..n` in random order.
    pub fn permutation(&mut self, n: usize) -> Vec<usize> {
        let mut order: Vec<usize> = (0..n).collect();
        for i in (1..n).rev() {
            order.swap(i, self.below(i + 1));
        }
        order
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn streams_are_reproducible_and_apart() {
        let draw =
            |seed, purpose: &str, counters: &[u64]| Rng::stream(seed, purpose, counters).normal(4);
        assert_eq!(draw(1, "order", &[2]), draw(1, "order", &[2]));
        assert_ne!(draw(1, "order", &[2]), draw(2, "order", &[2]));
        assert_ne!(draw(1, "order", &[2]), draw(1, "order", &[3]));
        assert_ne!(draw(1, "order", &[2]), draw(1, "init", &[2]));
    }

    #[test]
    fn moments_and_permutations() {
        let x = Rng::stream(7, "test", &[]).normal(20_000);
        let mean = x.iter().sum::<f64>() / x.len() as f64;
        let variance = x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / x.len() as f64;
        assert!(
            mean.abs() < 0.03 && (variance - 1.0).abs() < 0.04,
            "{mean} {variance}"
        );
        let mut order = Rng::stream(7, "test", &[]).permutation(100);
        order.sort_unstable();
        assert_eq!(order, (0..100).collect::<Vec<_>>());
    }
}
