//! Class names to measure with: made from a fixed list of words, 1 to 7 tokens each, 2.5 on average.

const KINDS: [&str; 40] = [
    "dog",
    "cat",
    "sparrow",
    "owl",
    "terrier",
    "retriever",
    "horse",
    "frog",
    "lizard",
    "spider",
    "beetle",
    "butterfly",
    "shark",
    "ray",
    "crab",
    "snail",
    "rose",
    "orchid",
    "daisy",
    "mushroom",
    "oak",
    "apple",
    "soup",
    "bread",
    "teapot",
    "lamp",
    "chair",
    "bookcase",
    "guitar",
    "accordion",
    "bicycle",
    "minivan",
    "steam locomotive",
    "sailboat",
    "bridge",
    "lighthouse",
    "castle",
    "running shoe",
    "ice cream",
    "ptarmigan",
];

/// The first leaves the kind alone.
const VARIETIES: [&str; 25] = [
    "",
    "red",
    "great white",
    "golden",
    "giant",
    "spotted",
    "old english",
    "mountain",
    "sea",
    "irish",
    "black and tan",
    "miniature",
    "african",
    "long-haired",
    "wild",
    "electric",
    "garden",
    "painted",
    "silver",
    "common",
    "desert",
    "toy",
    "blue",
    "winter",
    "tropical",
];

/// The first `n` of 1,000 different names.
pub(super) fn names(n: usize) -> Vec<String> {
    let (kinds, varieties) = (KINDS.len(), VARIETIES.len());
    let name = |i: usize| {
        // Both lists are walked at once, so that the first hundred are as varied as all.
        let (kind, variety) = (KINDS[i % kinds], VARIETIES[(i + i / kinds) % varieties]);
        format!("{variety} {kind}").trim_start().to_owned()
    };
    (0..n).map(name).collect()
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use cliptune_core::tokenizer::Tokenizer;

    use super::*;

    #[test]
    fn names_differ_and_are_as_long_as_real_ones() {
        let all = names(1000);
        assert_eq!(all.iter().collect::<HashSet<_>>().len(), 1000);
        for n in [50, 100, 1000] {
            let lengths: Vec<usize> = all[..n]
                .iter()
                .map(|name| Tokenizer::get().encode(name).len())
                .collect();
            let mean = lengths.iter().sum::<usize>() as f64 / n as f64;
            assert!((2.3..2.7).contains(&mean), "{n} names: mean {mean}");
            assert_eq!(lengths.iter().min(), Some(&1));
            assert!(lengths.iter().all(|&n| n <= 7), "{lengths:?}");
        }
    }
}
