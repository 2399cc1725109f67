//! How a set of prompts is run: which rows are computed, and what attends to what.
//!
//! The text tower is causal, so equal beginnings have equal rows at every layer. Prompts are put into groups; a group's
//! common beginning, its *prefix*, is computed once, and what is left of each prompt, its *suffix*, attends to the prefix's
//! keys and values. Suffixes are packed one after the other, without padding, into *chunks* that run through the tower on
//! their own. A plan depends on the prompts alone, never on the machine.

use std::ops::Range;

/// Rows of a chunk to aim at: its widest matrix then fits the second-level cache.
pub(crate) const CHUNK_ROWS: usize = 120;

/// What stands at a place of a prompt: two places are the same if these are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Place {
    /// Row of the table of input embeddings.
    pub(crate) row: u32,
    /// One more than the place's number among those that deeper layers replace; 0 for most.
    pub(crate) deep: u32,
}

impl Place {
    pub(crate) fn shallow(row: u32) -> Self {
        Self { row, deep: 0 }
    }
}

/// A run of rows that belongs to one prompt, or is the prefix of a group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Sequence {
    /// First row in the chunk.
    pub(crate) start: usize,
    /// Rows.
    pub(crate) len: usize,
    /// The group whose prefix it attends to; for a prefix the group itself.
    pub(crate) group: usize,
    /// The prompt whose end is the last row; for a prefix that of none.
    pub(crate) prompt: usize,
}

/// Rows that run through the tower together.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Chunk {
    /// First of its rows among all rows of the plan.
    pub(crate) first: usize,
    pub(crate) rows: usize,
    pub(crate) sequences: Vec<Sequence>,
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
        let mut order: Vec<usize> = (0..prompts.len()).collect();
        order.sort_by(|a, b| prompts[*a].cmp(&prompts[*b]).then(a.cmp(b)));
        let mut groups = Vec::new();
        if !order.is_empty() {
            partition(prompts, &order, 0, &mut groups);
        }
        // In the order of the prompts, as far as groups allow: what a reader of memory expects.
        for group in &mut groups {
            group.members.sort_unstable();
        }
        groups.sort_by_key(|group| group.members[0]);
        let mut plan = Self {
            prompts: prompts.len(),
            ..Self::default()
        };
        let prefixes = groups.iter().enumerate().filter(|(_, g)| g.prefix > 0);
        let prefixes: Vec<Part> = prefixes
            .map(|(group, g)| Part {
                group,
                prompt: g.members[0],
                range: 0..g.prefix,
            })
            .collect();
        plan.beginnings = plan.pack(prompts, &prefixes, chunk_rows);
        let suffixes: Vec<Part> = groups
            .iter()
            .enumerate()
            .flat_map(|(group, g)| {
                g.members.iter().map(move |&prompt| Part {
                    group,
                    prompt,
                    range: g.prefix..prompts[prompt].len(),
                })
            })
            .collect();
        plan.endings = plan.pack(prompts, &suffixes, chunk_rows);
        plan.prefixes = groups.into_iter().map(|g| g.prefix).collect();
        plan
    }

    /// All rows.
    pub(crate) fn rows(&self) -> usize {
        self.places.len()
    }

    /// Packs whole parts into chunks of about equal size.
    fn pack(&mut self, prompts: &[Vec<Place>], parts: &[Part], chunk_rows: usize) -> Vec<Chunk> {
        let total: usize = parts.iter().map(|p| p.range.len()).sum();
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
        let mut done = 0;
        for part in parts {
            chunk.sequences.push(Sequence {
                start: chunk.rows,
                len: part.range.len(),
                group: part.group,
                prompt: part.prompt,
            });
            chunk.rows += part.range.len();
            self.places
                .extend_from_slice(&prompts[part.prompt][part.range.clone()]);
            self.positions
                .extend(part.range.clone().map(|at| at as u32));
            // Ends are taken at multiples of the aim, so that the chunks stay balanced to the last.
            if done + chunk.rows >= aim * (packed.len() + 1) {
                done += chunk.rows;
                let next = Chunk {
                    first: self.places.len(),
                    ..Chunk::default()
                };
                packed.push(std::mem::replace(&mut chunk, next));
            }
        }
        if chunk.rows > 0 {
            packed.push(chunk);
        }
        packed
    }
}

struct Part {
    group: usize,
    prompt: usize,
    range: Range<usize>,
}

struct Group {
    prefix: usize,
    members: Vec<usize>,
}

/// Divides `order`, sorted prompts that agree in their first `known` places, into groups of the fewest rows in all, and returns
/// that number.
fn partition(
    prompts: &[Vec<Place>],
    order: &[usize],
    known: usize,
    groups: &mut Vec<Group>,
) -> usize {
    let (first, last) = (&prompts[order[0]], &prompts[order[order.len() - 1]]);
    let alone = |groups: &mut Vec<Group>| {
        groups.push(Group {
            prefix: 0,
            members: order.to_vec(),
        });
        order.iter().map(|&i| prompts[i].len()).sum::<usize>()
    };
    if order.len() == 1 {
        return alone(groups);
    }
    // Sorted, so what first and last share is shared by all. The end itself belongs to the suffix.
    let shortest = order.iter().map(|&i| prompts[i].len()).min().unwrap_or(0);
    let common = (known..shortest.saturating_sub(1))
        .take_while(|&at| first[at] == last[at])
        .last()
        .map_or(known.min(shortest.saturating_sub(1)), |at| at + 1);
    let together = common
        + order
            .iter()
            .map(|&i| prompts[i].len() - common)
            .sum::<usize>();
    let whole = Group {
        prefix: common,
        members: order.to_vec(),
    };
    let before = groups.len();
    let mut apart = 0;
    let mut start = 0;
    for end in 1..=order.len() {
        let differs = end == order.len()
            || prompts[order[end]].get(common) != prompts[order[start]].get(common);
        if differs {
            if start == 0 && end == order.len() {
                // They differ only behind the shortest one's end: nothing to divide by.
                groups.push(whole);
                return together;
            }
            apart += partition(prompts, &order[start..end], common, groups);
            start = end;
        }
    }
    if together <= apart {
        groups.truncate(before);
        groups.push(whole);
        return together;
    }
    apart
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn prompt(rows: &[u32]) -> Vec<Place> {
        rows.iter().map(|&row| Place::shallow(row)).collect()
    }

    /// What each prompt reads, put together from the plan's rows again.
    fn unpacked(plan: &Plan) -> Vec<Vec<Place>> {
        let mut prefixes = vec![Vec::new(); plan.prefixes.len()];
        let rows = |chunk: &Chunk, s: &Sequence| {
            let first = chunk.first + s.start;
            plan.places[first..first + s.len].to_vec()
        };
        for chunk in &plan.beginnings {
            for s in &chunk.sequences {
                prefixes[s.group] = rows(chunk, s);
            }
        }
        let mut prompts = vec![Vec::new(); plan.prompts];
        for chunk in &plan.endings {
            for s in &chunk.sequences {
                prompts[s.prompt] = [prefixes[s.group].clone(), rows(chunk, s)].concat();
            }
        }
        prompts
    }

    #[test]
    fn a_shared_context_is_one_group_and_several_are_several() {
        // [SOS] ctx ctx name . [EOS]
        let coop = |ctx: u32, name: u32| prompt(&[0, ctx, ctx + 1, name, 8, 9]);
        let shared: Vec<_> = (100..110).map(|name| coop(20, name)).collect();
        let plan = Plan::new(&shared, CHUNK_ROWS);
        assert_eq!(plan.prefixes, [3]);
        assert_eq!(plan.rows(), 3 + 30);
        let several: Vec<_> = (0..40)
            .map(|i| coop(20 + 2 * (i / 10), 100 + i % 10))
            .collect();
        let plan = Plan::new(&several, CHUNK_ROWS);
        assert_eq!(plan.prefixes, [3; 4]);
        assert_eq!(plan.rows(), 4 * 33);
        let specific: Vec<_> = (0..10).map(|i| coop(20 + 2 * i, 100 + i)).collect();
        assert_eq!(Plan::new(&specific, CHUNK_ROWS).prefixes, [1]);
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
                let longest = chunk.sequences.iter().map(|s| s.len).max().unwrap_or(0);
                prop_assert!(chunk.rows < chunk_rows + longest + chunk_rows);
                next += chunk.rows;
            }
            prop_assert_eq!(next, plan.rows());
            for (row, &position) in plan.positions.iter().enumerate() {
                prop_assert!(position < 9, "row {row}");
            }
        }
    }
}
