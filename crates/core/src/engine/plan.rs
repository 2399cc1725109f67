//! How a set of prompts is run: which rows are computed, and what attends to what.
//!
//! The text tower is causal, so equal beginnings have equal rows at every layer. They are computed once in two ways:
//!
//! - Prompts are put into *groups*; a group's common beginning, its *prefix*, is run first and kept, and what is left of each
//!   prompt, its *suffix*, attends to the prefix's keys and values.
//! - Suffixes are packed one after the other, without padding, into *chunks* that run through the tower on their own. Where a
//!   suffix begins as the one before it in its chunk, it goes on from that one's rows, as a trie does; the next chunk computes
//!   them again. So memory does not grow with what names share (`black and tan dog`, `black and tan cat`).
//!
//! A plan depends on the prompts alone, never on the machine.

use std::collections::HashMap;
use std::ops::Range;

/// Rows of a chunk to aim at: its widest matrix then fits the second-level cache.
pub(crate) const CHUNK_ROWS: usize = 120;

/// What stands at a place of a prompt: two places are the same if these are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Place {
    /// Row of the table of input embeddings: frozen words, then learned rows.
    pub(crate) row: u32,
    /// One more than the place's number among those that deeper layers replace; 0 for most.
    pub(crate) deep: u32,
}

impl Place {
    pub(crate) fn shallow(row: u32) -> Self {
        Self { row, deep: 0 }
    }
}

/// A run of rows that ends a prompt, or is the prefix of a group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Sequence {
    /// First row in the chunk.
    pub(crate) start: usize,
    /// Rows.
    pub(crate) len: usize,
    /// Rows of the chunk that the last row attends to, in the order of the prompt: those of sequences before it from which
    /// it goes on, then its own.
    pub(crate) reads: Vec<u32>,
    /// The group whose prefix it attends to before; for a prefix the group itself.
    pub(crate) group: usize,
    /// The prompt whose end is the last row; for a prefix that of none.
    pub(crate) prompt: usize,
}

impl Sequence {
    /// What its row `at` attends to in the chunk.
    pub(crate) fn read_by(&self, at: usize) -> &[u32] {
        &self.reads[..self.reads.len() - self.len + at + 1]
    }
}

/// Rows that run through the tower together.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Chunk {
    /// First of its rows among all rows of the plan.
    pub(crate) first: usize,
    pub(crate) rows: usize,
    pub(crate) sequences: Vec<Sequence>,
    /// Rows that are the first of the chunk to hold what they hold where they hold it: `.` at position 20, say.
    pub(crate) firsts: Vec<u32>,
    /// By row: which of `firsts` holds the same at the same position, so has the same input.
    pub(crate) twins: Vec<u32>,
}

impl Chunk {
    pub(crate) fn range(&self) -> Range<usize> {
        self.first..self.first + self.rows
    }

    /// The last row of every sequence.
    pub(crate) fn ends(&self) -> impl Iterator<Item = u32> {
        self.sequences.iter().map(|s| (s.start + s.len - 1) as u32)
    }

    /// The groups of its sequences, each once.
    pub(crate) fn groups(&self) -> impl Iterator<Item = usize> {
        let mut last = None;
        let groups = self.sequences.iter().map(|s| s.group);
        groups.filter(move |group| last.replace(*group) != Some(*group))
    }
}

/// A plan. Rows are numbered through all chunks, prefixes first.
#[derive(Clone, Debug, Default)]
pub(crate) struct Plan {
    /// What each row starts from.
    pub(crate) places: Vec<Place>,
    /// Position of each row in its prompt.
    pub(crate) positions: Vec<u32>,
    /// Rows of each group's prefix.
    pub(crate) prefixes: Vec<usize>,
    /// Chunks of prefixes.
    pub(crate) beginnings: Vec<Chunk>,
    /// Chunks of suffixes.
    pub(crate) endings: Vec<Chunk>,
    pub(crate) prompts: usize,
}

impl Plan {
    /// The plan for prompts that end with their last place. Every prompt has at least one.
    pub(crate) fn new(prompts: &[Vec<Place>], chunk_rows: usize) -> Self {
        let groups = Division::of(prompts, chunk_rows);
        let mut plan = Self {
            prompts: prompts.len(),
            prefixes: groups.iter().map(|g| g.prefix).collect(),
            ..Self::default()
        };
        let (mut prefixes, mut suffixes) = (Vec::new(), Vec::new());
        for (group, Group { prefix, members }) in groups.into_iter().enumerate() {
            let part = |prompt, range, shared| Part {
                group,
                prompt,
                range,
                shared,
            };
            if prefix > 0 {
                prefixes.push(part(members[0], 0..prefix, 0));
            }
            let mut before: Option<usize> = None;
            for prompt in members {
                let shared = before.map_or(0, |b| agreement(prompts, b, prompt) - prefix);
                suffixes.push(part(prompt, prefix..prompts[prompt].len(), shared));
                before = Some(prompt);
            }
        }
        plan.beginnings = plan.pack(prompts, &prefixes, chunk_rows);
        plan.endings = plan.pack(prompts, &suffixes, chunk_rows);
        plan
    }

    /// All rows.
    pub(crate) fn rows(&self) -> usize {
        self.places.len()
    }

    /// Packs parts into chunks of about equal size.
    fn pack(&mut self, prompts: &[Vec<Place>], parts: &[Part], chunk_rows: usize) -> Vec<Chunk> {
        let total: usize = parts.iter().map(Part::added).sum();
        let chunks = match total.div_ceil(chunk_rows) {
            0 | 1 => 1,
            // Multiples of four go round on two and four threads, and nearly so on more.
            n => n.next_multiple_of(4),
        };
        let aim = total.div_ceil(chunks);
        let mut packed = Vec::new();
        let mut chunk = Chunk {
            first: self.places.len(),
            ..Chunk::default()
        };
        let (mut done, mut firsts) = (0, HashMap::new());
        for part in parts {
            let before = chunk.sequences.last();
            let mut reads = before.map_or(Vec::new(), |s| s.reads[..part.shared].to_vec());
            let own = part.range.start + reads.len()..part.range.end;
            let (start, len) = (chunk.rows, own.len());
            reads.extend((start..start + len).map(|row| row as u32));
            chunk.sequences.push(Sequence {
                start,
                len,
                reads,
                group: part.group,
                prompt: part.prompt,
            });
            chunk.rows += len;
            self.places
                .extend_from_slice(&prompts[part.prompt][own.clone()]);
            self.positions.extend(own.clone().map(|at| at as u32));
            for (row, at) in (start as u32..).zip(own) {
                let word = (prompts[part.prompt][at].row, at);
                let first = *firsts.entry(word).or_insert_with(|| {
                    chunk.firsts.push(row);
                    chunk.firsts.len() as u32 - 1
                });
                chunk.twins.push(first);
            }
            // Ends are taken at multiples of the aim, so that the chunks stay balanced to the last.
            done += part.added();
            if done >= aim * (packed.len() + 1) {
                let next = Chunk {
                    first: self.places.len(),
                    ..Chunk::default()
                };
                packed.push(std::mem::replace(&mut chunk, next));
                firsts.clear();
            }
        }
        if chunk.rows > 0 {
            packed.push(chunk);
        }
        packed
    }
}

/// A prefix, or what is left of a prompt behind it.
struct Part {
    group: usize,
    prompt: usize,
    /// Its places in the prompt.
    range: Range<usize>,
    /// How many of them are those of the part before, of the same group.
    shared: usize,
}

impl Part {
    /// Rows that it adds to a chunk that holds the part before.
    fn added(&self) -> usize {
        self.range.len() - self.shared
    }
}

/// How many places prompt `b` can take over from prompt `a`: its end is always its own.
fn agreement(prompts: &[Vec<Place>], a: usize, b: usize) -> usize {
    let both = prompts[a].iter().zip(&prompts[b]);
    let equal = both.take_while(|(a, b)| a == b).count();
    equal.min(prompts[b].len() - 1)
}

struct Group {
    prefix: usize,
    /// Sorted, so that what can be shared stands side by side.
    members: Vec<usize>,
}

/// Sorted prompts on their way into groups.
struct Division<'a> {
    prompts: &'a [Vec<Place>],
    order: Vec<usize>,
    /// What each can take over from the one before.
    shared: Vec<usize>,
    chunk_rows: usize,
    groups: Vec<Group>,
}

impl Division<'_> {
    fn of(prompts: &[Vec<Place>], chunk_rows: usize) -> Vec<Group> {
        let mut order: Vec<usize> = (0..prompts.len()).collect();
        order.sort_by(|a, b| prompts[*a].cmp(&prompts[*b]).then(a.cmp(b)));
        let neighbours = order.windows(2);
        let shared = neighbours.map(|pair| agreement(prompts, pair[0], pair[1]));
        let mut division = Division {
            shared: std::iter::once(0).chain(shared).collect(),
            prompts,
            order,
            chunk_rows,
            groups: Vec::new(),
        };
        division.open(0);
        division.divide(0..prompts.len(), 0);
        let mut groups = division.groups;
        groups.retain(|group| !group.members.is_empty());
        groups
    }

    fn open(&mut self, prefix: usize) -> usize {
        self.groups.push(Group {
            prefix,
            members: Vec::new(),
        });
        self.groups.len() - 1
    }

    fn len(&self, at: usize) -> usize {
        self.prompts[self.order[at]].len()
    }

    /// Gives a range of the order, whose prompts begin with the prefix of `group`, to that group and to new ones.
    fn divide(&mut self, range: Range<usize>, group: usize) {
        let Range { start, end } = range;
        if end - start < 2 {
            self.groups[group].members.extend(&self.order[range]);
            return;
        }
        // Where the first one ends, there is nothing for the others to share with it.
        let first_end = self.len(start) - 1;
        let common = self.shared[start + 1..end].iter().copied();
        let common = common.fold(first_end, usize::min);
        let added = |i: usize| self.len(i) - self.shared[i];
        let rows = self.len(start) - common + (start + 1..end).map(added).sum::<usize>();
        // Kept, the common beginning costs its rows once; else what the group's prefix lacks of it, in every chunk.
        let lacking = common - self.groups[group].prefix;
        let group = match lacking * rows > common * self.chunk_rows {
            true => self.open(common),
            false => group,
        };
        let mut from = start;
        for to in start + 1..=end {
            let apart =
                to == end || self.shared[to] == common || (to == start + 1 && first_end == common);
            if apart {
                self.divide(from..to, group);
                from = to;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;
    use proptest::prelude::*;

    fn prompt(rows: &[u32]) -> Vec<Place> {
        rows.iter().map(|&row| Place::shallow(row)).collect()
    }

    /// What each prompt reads, put together from the plan's rows again.
    fn unpacked(plan: &Plan) -> Vec<Vec<Place>> {
        let mut prefixes = vec![Vec::new(); plan.prefixes.len()];
        let rows = |chunk: &Chunk, s: &Sequence, known: usize| -> Vec<Place> {
            let own = s.start as u32..(s.start + s.len) as u32;
            assert!(s.reads.iter().rev().copied().take(s.len).eq(own.rev()));
            let reads = s.reads.iter().map(|row| chunk.first + *row as usize);
            let positions = reads.clone().map(|row| plan.positions[row] as usize);
            assert!(positions.eq(known..known + s.reads.len()));
            reads.map(|row| plan.places[row]).collect()
        };
        for chunk in &plan.beginnings {
            for s in &chunk.sequences {
                prefixes[s.group] = rows(chunk, s, 0);
            }
        }
        let mut prompts = vec![Vec::new(); plan.prompts];
        for chunk in &plan.endings {
            for s in &chunk.sequences {
                let prefix = prefixes[s.group].clone();
                assert_eq!(prefix.len(), plan.prefixes[s.group]);
                let own = rows(chunk, s, prefix.len());
                prompts[s.prompt] = [prefix, own].concat();
            }
        }
        prompts
    }

    /// `[SOS] ctx ctx name . [EOS]`.
    fn coop(ctx: u32, name: &[u32]) -> Vec<Place> {
        prompt(&[&[0, ctx, ctx + 1], name, &[8, 9]].concat())
    }

    #[test]
    fn a_shared_context_is_one_group_and_several_are_several() {
        let shared: Vec<_> = (100..110).map(|name| coop(20, &[name])).collect();
        let plan = Plan::new(&shared, 12);
        assert_eq!(plan.prefixes, [3]);
        assert_eq!(plan.rows(), 3 + 30);
        let several: Vec<_> = (0..40)
            .map(|i| coop(20 + 2 * (i / 10), &[100 + i % 10]))
            .collect();
        let plan = Plan::new(&several, 12);
        assert_eq!(plan.prefixes, [3; 4]);
        assert_eq!(plan.rows(), 4 * 33);
        let specific: Vec<_> = (0..10).map(|i| coop(20 + 2 * i, &[100 + i])).collect();
        assert_eq!(Plan::new(&specific, 12).prefixes, [1]);
        // What fits into one chunk needs no prefix to be kept.
        let plan = Plan::new(&shared, CHUNK_ROWS);
        assert_eq!((plan.prefixes.as_slice(), plan.rows()), (&[0][..], 3 + 30));
    }

    #[test]
    fn what_names_share_is_computed_once_in_each_chunk_and_kept_by_none() {
        let names = (0..1000).map(|i| [100 + i / 40, 500 + i % 40]);
        let prompts: Vec<_> = names.map(|name| coop(20, &name)).collect();
        let plan = Plan::new(&prompts, CHUNK_ROWS);
        assert_eq!(plan.prefixes, [3]);
        assert_eq!(plan.beginnings.iter().map(|c| c.rows).sum::<usize>(), 3);
        // Of each name the second word, `.` and [EOS]; the first words again where a chunk begins among those who share it.
        let once = 3 + 1000 * 3 + 25;
        assert_eq!(plan.endings.len(), 28);
        assert!((once..once + 28).contains(&plan.rows()), "{}", plan.rows());
        assert_eq!(unpacked(&plan), prompts);
    }

    #[test]
    fn equal_prompts_and_prompts_inside_others_keep_their_ends() {
        let prompts = [
            prompt(&[1, 2, 3]),
            prompt(&[1, 2, 3]),
            prompt(&[1, 2, 3, 4]),
            prompt(&[1]),
        ];
        let plan = Plan::new(&prompts, 4);
        assert_eq!(unpacked(&plan), prompts);
        assert_eq!(Plan::new(&[], 4).rows(), 0);
    }

    proptest! {
        #[test]
        fn every_prompt_reads_its_own_places(
            prompts in prop::collection::vec(prop::collection::vec(0u32..3, 1..9), 1..30),
            chunk_rows in 1usize..40,
        ) {
            let prompts: Vec<_> = prompts.iter().map(|p| prompt(p)).collect();
            let plan = Plan::new(&prompts, chunk_rows);
            prop_assert_eq!(unpacked(&plan), prompts.clone());
            let all: usize = prompts.iter().map(Vec::len).sum();
            prop_assert!(plan.rows() <= all);
            let mut next = 0;
            for chunk in plan.beginnings.iter().chain(&plan.endings) {
                prop_assert_eq!(chunk.first, next);
                prop_assert!(chunk.rows > 0);
                prop_assert!(chunk.rows < 2 * chunk_rows + 9 + 9);
                let input = |row: u32| {
                    let row = chunk.first + row as usize;
                    (plan.places[row], plan.positions[row])
                };
                prop_assert_eq!(chunk.twins.len(), chunk.rows);
                for (row, &twin) in (0..).zip(&chunk.twins) {
                    prop_assert_eq!(input(chunk.firsts[twin as usize]), input(row));
                }
                let different: HashSet<_> = chunk.firsts.iter().map(|&row| input(row)).collect();
                prop_assert_eq!(different.len(), chunk.firsts.len());
                next += chunk.rows;
            }
            prop_assert_eq!(next, plan.rows());
            for (row, &position) in plan.positions.iter().enumerate() {
                prop_assert!(position < 9, "row {row}");
            }
        }
    }
}
