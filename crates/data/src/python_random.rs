//! Python's `random` module, bit for bit, as far as few-shot draws use it.
//!
//! The authors' code draws with `random.sample` after `random.seed(seed)`; seeds 1, 2 and 3 of the papers name the same images
//! only with the same generator (MT19937) and the same way from its words to a sample. This follows CPython 3.11; the
//! algorithms have been the same since 3.2 (`sample` from a sequence).

use std::collections::HashSet;

const N: usize = 624;
const M: usize = 397;

/// The generator behind Python's `random.seed`, `getrandbits`, `sample` and `shuffle`.
#[derive(Clone)]
pub struct PythonRandom {
    state: [u32; N],
    next: usize,
}

impl std::fmt::Debug for PythonRandom {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PythonRandom")
            .field("next", &self.next)
            .finish_non_exhaustive()
    }
}

impl PythonRandom {
    /// `random.seed(seed)` for a seed that is not negative (Python uses the magnitude of a negative one).
    pub fn new(seed: u64) -> Self {
        let (low, high) = (seed as u32, (seed >> 32) as u32);
        if high == 0 {
            Self::from_key(&[low])
        } else {
            Self::from_key(&[low, high])
        }
    }

    /// MT19937's `init_by_array`.
    fn from_key(key: &[u32]) -> Self {
        let mut state = [0u32; N];
        state[0] = 19_650_218;
        for i in 1..N {
            let last = state[i - 1];
            state[i] = 1_812_433_253u32
                .wrapping_mul(last ^ (last >> 30))
                .wrapping_add(i as u32);
        }
        let mix = |last: u32, factor: u32| (last ^ (last >> 30)).wrapping_mul(factor);
        let mut i = 1;
        for step in 0..N.max(key.len()) {
            let j = step % key.len();
            state[i] = (state[i] ^ mix(state[i - 1], 1_664_525))
                .wrapping_add(key[j])
                .wrapping_add(j as u32);
            i += 1;
            if i == N {
                state[0] = state[N - 1];
                i = 1;
            }
        }
        for _ in 1..N {
            state[i] = (state[i] ^ mix(state[i - 1], 1_566_083_941)).wrapping_sub(i as u32);
            i += 1;
            if i == N {
                state[0] = state[N - 1];
                i = 1;
            }
        }
        state[0] = 0x8000_0000;
        Self { state, next: N }
    }

    fn refill(&mut self) {
        for i in 0..N {
            let y = (self.state[i] & 0x8000_0000) | (self.state[(i + 1) % N] & 0x7fff_ffff);
            let odd = if y & 1 == 1 { 0x9908_b0df } else { 0 };
            self.state[i] = self.state[(i + M) % N] ^ (y >> 1) ^ odd;
        }
        self.next = 0;
    }

    /// The next 32 bits.
    pub fn next_u32(&mut self) -> u32 {
        if self.next >= N {
            self.refill();
        }
        let mut y = self.state[self.next];
        self.next += 1;
        y ^= y >> 11;
        y ^= (y << 7) & 0x9d2c_5680;
        y ^= (y << 15) & 0xefc6_0000;
        y ^ (y >> 18)
    }

    /// `random.getrandbits(bits)` for up to 64 bits; more are taken as 64, none gives 0.
    pub fn bits(&mut self, bits: u32) -> u64 {
        match bits {
            0 => 0,
            1..=32 => u64::from(self.next_u32() >> (32 - bits)),
            _ => {
                let low = u64::from(self.next_u32());
                let high = u64::from(self.next_u32() >> (64 - bits.min(64)));
                (high << 32) | low
            }
        }
    }

    /// `random.randrange(n)`: uniform in `0..n`; 0 if `n` is 0.
    pub fn below(&mut self, n: usize) -> usize {
        if n == 0 {
            return 0;
        }
        let n = n as u64;
        let bits = u64::BITS - n.leading_zeros();
        loop {
            let drawn = self.bits(bits);
            if drawn < n {
                return drawn as usize;
            }
        }
    }

    /// `random.sample(range(n), k)`: `k` different numbers below `n`, in the order drawn. `k` above `n` is taken as `n`.
    pub fn sample(&mut self, n: usize, k: usize) -> Vec<usize> {
        let k = k.min(n);
        // Python keeps a pool while that is smaller than a set of the numbers drawn; the two draw differently.
        let mut set_size = 21usize;
        if k > 5 {
            let mut power = 1usize;
            while power < k.saturating_mul(3) {
                power = power.saturating_mul(4);
            }
            set_size = set_size.saturating_add(power);
        }
        if n <= set_size {
            let mut pool: Vec<usize> = (0..n).collect();
            let draw = |i| {
                let j = self.below(n - i);
                let drawn = pool[j];
                pool[j] = pool[n - i - 1];
                drawn
            };
            (0..k).map(draw).collect()
        } else {
            let mut seen = HashSet::with_capacity(k);
            let draw = |_| loop {
                let j = self.below(n);
                if seen.insert(j) {
                    return j;
                }
            };
            (0..k).map(draw).collect()
        }
    }

    /// `random.shuffle(items)`.
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for i in (1..items.len()).rev() {
            items.swap(i, self.below(i + 1));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde::Deserialize;

    /// What CPython draws; `fixtures/python-random/generate.py` writes it.
    #[derive(Deserialize)]
    struct Vectors {
        cases: Vec<Case>,
    }

    #[derive(Deserialize)]
    struct Case {
        seed: u64,
        words: Vec<u32>,
        /// `[bits, value]`
        bits: Vec<(u32, u64)>,
        /// `[n, value]`
        below: Vec<(usize, usize)>,
        samples: Vec<Sample>,
        shuffled: Vec<usize>,
    }

    #[derive(Deserialize)]
    struct Sample {
        n: usize,
        k: usize,
        drawn: Vec<usize>,
    }

    #[test]
    fn draws_what_cpython_draws() {
        let vectors = include_str!("../../../fixtures/python-random/vectors.json");
        let vectors: Vectors = serde_json::from_str(vectors).unwrap();
        assert!(vectors.cases.len() >= 20);
        for case in vectors.cases {
            let seed = case.seed;
            let mut random = PythonRandom::new(seed);
            for word in case.words {
                assert_eq!(random.next_u32(), word, "seed {seed}");
            }
            for (bits, value) in case.bits {
                assert_eq!(random.bits(bits), value, "seed {seed}, {bits} bits");
            }
            for (n, value) in case.below {
                assert_eq!(random.below(n), value, "seed {seed}, below {n}");
            }
            for Sample { n, k, drawn } in case.samples {
                assert_eq!(random.sample(n, k), drawn, "seed {seed}, {k} of {n}");
            }
            let mut items: Vec<usize> = (0..case.shuffled.len()).collect();
            random.shuffle(&mut items);
            assert_eq!(items, case.shuffled, "seed {seed}");
        }
    }

    #[test]
    fn the_papers_seeds() {
        let mut one = PythonRandom::new(1);
        let words = [577_090_037, 2_444_712_010, 3_639_700_191, 3_445_702_192];
        assert_eq!([(); 4].map(|()| one.next_u32()), words);
        let mut one = PythonRandom::new(1);
        let first = [8, 36, 4, 16, 7, 31, 28, 30, 24, 25, 6, 3, 15, 0, 12, 13];
        assert_eq!(one.sample(40, 16), first);
        let second = [
            1, 228, 136, 117, 52, 162, 15, 11, 13, 277, 4, 195, 110, 216, 14, 270,
        ];
        assert_eq!(one.sample(300, 16), second);
        assert_eq!(one.sample(30, 1), [7]);
        assert_eq!(one.sample(22, 4), [14, 15, 17, 7]);
        let two = [3, 5, 38, 23, 10, 19, 16, 13, 2, 18, 21, 37, 32, 20, 12, 36];
        assert_eq!(PythonRandom::new(2).sample(40, 16), two);
        let three = [15, 37, 34, 8, 23, 30, 4, 0, 38, 36, 17, 7, 6, 22, 39, 29];
        assert_eq!(PythonRandom::new(3).sample(40, 16), three);
    }

    #[test]
    fn odd_sizes_are_answered() {
        let mut random = PythonRandom::new(0);
        assert_eq!(random.below(0), 0);
        assert_eq!(random.bits(0), 0);
        assert!(random.sample(0, 5).is_empty());
        let mut all = random.sample(30, 99);
        all.sort_unstable();
        assert!(all.into_iter().eq(0..30));
    }
}
