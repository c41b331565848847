//! Attention of a few new positions to all before them and to themselves.
//!
//! Every query head mixes the values of its key head, `softmax(scaling * K q) V`, in float32, over the positions up
//! to its own, or over the last `window` of them.  Positions are read in blocks, all heads of one by one member of the
//! team; what the blocks mix is put together in their order (Dao et al.: Flash-Decoding, 2023).

use super::Queue;
use super::arch::{self, Work};
use super::lanes::{self, CHUNK, Chunk, LANES, LINE, MOST_TOGETHER, Number, Simd};
use super::product::{Norm, normalise};
use crate::isa::InstructionSet;
use std::ops::Range;
use std::sync::{Mutex, PoisonError};

/// How a position's numbers are divided into heads, and what they see.
#[derive(Debug, Clone, Copy)]
pub struct Heads {
    /// Query heads, a multiple of those of keys and values.
    pub wide: usize,
    /// Heads of keys and values.
    pub narrow: usize,
    /// Numbers of a head.
    pub size: usize,
    /// Factor of the scores.
    pub scaling: f32,
    /// How many positions a query sees at most, its own among them.
    pub window: Option<usize>,
}

/// What is done to queries and keys before they meet.
#[derive(Clone, Copy)]
pub struct Before<'a, T> {
    /// Norms of each query head and of each key head, of its size.
    pub norms: Option<[Norm<'a, T>; 2]>,
    /// How they are turned then.
    pub rotary: Option<Rotary<'a, T>>,
}

/// How queries and keys are turned: `x * cosine + x[partner] * sine`, each (R, head size) but for the partners.
#[derive(Clone, Copy)]
pub struct Rotary<'a, T> {
    /// R * head size numbers.
    pub cosines: &'a [T],
    /// R * head size numbers, with their signs.
    pub sines: &'a [T],
    /// The number of a head that each is turned with.
    pub partners: &'a [i64],
}

/// Positions whose keys and values are read together: a fixed number, so that it does not change the result.
const BLOCK: usize = 128;

/// Attention that a team of threads works on together.
pub struct Attention<'a, T> {
    isa: InstructionSet,
    heads: Heads,
    keys: &'a [T],
    values: &'a [T],
    groups: Vec<Group>,
    blocks: Queue<Range<usize>>,
    found: Mutex<Vec<(usize, Vec<Mixed>)>>,
    out: &'a mut [T],
}

/// Up to eight queries that share a key head.
struct Group {
    /// Their key head.
    head: usize,
    /// What each sees.
    seen: Vec<Range<usize>>,
    /// Where in `out` what each mixes goes.
    places: Vec<usize>,
    queries: Vec<Chunk>,
}

/// What a group mixes of some positions: the largest scores, the sums of the weights, of which the largest is 1, and
/// the values times the weights, query by query.
struct Mixed {
    largest: Each,
    sums: Each,
    values: Vec<f32>,
}

/// A number for each query of a group.
type Each = [f32; MOST_TOGETHER];

impl<'a, T: Number> Attention<'a, T> {
    /// Norm and turn queries and keys of new positions, `projected` (R, wide + 2 narrow heads), append keys and values to those
    /// of `seen` positions, and prepare what each query mixes, `out` (R, wide heads).
    ///
    /// `keys` and `values` have room for seen + R positions, each of narrow heads.
    ///
    /// # Panics
    /// If the sizes do not fit together.
    pub fn begin(
        isa: InstructionSet,
        heads: Heads,
        projected: &[T],
        before: Before<'_, T>,
        (keys, values): (&'a mut [T], &'a mut [T]),
        seen: usize,
        out: &'a mut [T],
    ) -> Self {
        let Heads {
            wide, narrow, size, ..
        } = heads;
        assert!(narrow > 0 && size > 0 && wide.is_multiple_of(narrow));
        let (whole, new) = ((wide + 2 * narrow) * size, narrow * size);
        let count = projected.len() / whole;
        assert!(count > 0);
        assert!(projected.len() == count * whole && out.len() == count * wide * size);
        assert!(keys.len() == (seen + count) * new && values.len() == keys.len());
        assert!(before.fits(count, size));
        let turned = arch::run(
            isa,
            Turning {
                projected,
                before,
                heads,
            },
        );
        for (row, numbers) in turned.chunks_exact(whole).enumerate() {
            let (_, own) = numbers.split_at(wide * size);
            let (key, value) = own.split_at(new);
            let at = (seen + row) * new;
            keys[at..at + new].copy_from_slice(key);
            values[at..at + new].copy_from_slice(value);
        }
        let groups = arch::run(
            isa,
            Grouping {
                turned: &turned,
                heads,
                seen,
            },
        );
        let first = groups[0].seen[0].start;
        let blocks: Vec<_> = (first / BLOCK..(seen + count).div_ceil(BLOCK))
            .map(|block| block * BLOCK..(seen + count).min((block + 1) * BLOCK))
            .collect();
        Self {
            isa,
            heads,
            keys,
            values,
            groups,
            blocks: Queue::of(blocks),
            found: Mutex::new(Vec::new()),
            out,
        }
    }

    /// How many members of a team would find something to do.
    pub fn parts(&self) -> usize {
        self.blocks.count
    }

    /// Take block after block until none is left; every member of the team calls it, in any order, or one alone does.
    pub fn work(&self) {
        while let Some(block) = self.blocks.next() {
            let first = block.start;
            let mixing = Mixing {
                heads: self.heads,
                keys: self.keys,
                values: self.values,
                groups: &self.groups,
                block,
            };
            let mixed = arch::run(self.isa, mixing);
            // Poisoning cannot matter: to add to the list does not panic half way.
            let mut found = self.found.lock().unwrap_or_else(PoisonError::into_inner);
            found.push((first, mixed));
        }
    }

    /// Write what all blocks come to, once the work is done.
    pub fn finish(self) {
        let mut found = self
            .found
            .into_inner()
            .unwrap_or_else(PoisonError::into_inner);
        found.sort_unstable_by_key(|(first, _)| *first);
        let size = self.heads.size;
        let mut values = vec![0.0; size];
        for (number, group) in self.groups.iter().enumerate() {
            for (query, place) in group.places.iter().enumerate() {
                let parts = found.iter().map(|(_, groups)| &groups[number]);
                let largest = parts.clone().map(|part| part.largest[query]);
                let largest = largest.fold(f32::NEG_INFINITY, larger);
                values.fill(0.0);
                let mut sum = 0.0;
                for part in parts {
                    let factor = lanes::exp(part.largest[query] - largest);
                    sum += part.sums[query] * factor;
                    let own = &part.values[query * size..][..size];
                    for (value, own) in values.iter_mut().zip(own) {
                        *value += own * factor;
                    }
                }
                for (number, value) in self.out[*place..][..size].iter_mut().zip(&values) {
                    *number = T::from_f32(value / sum);
                }
            }
        }
    }
}

impl<T: Copy> Before<'_, T> {
    fn fits(&self, count: usize, size: usize) -> bool {
        let norms = self.norms.iter().flatten();
        self.rotary.is_none_or(|rotary| rotary.fits(count, size))
            && norms.into_iter().all(|norm| norm.weight.len() == size)
    }
}

impl<T> Rotary<'_, T> {
    fn fits(&self, count: usize, size: usize) -> bool {
        self.cosines.len() == count * size
            && self.sines.len() == count * size
            && self.partners.len() == size
            && self
                .partners
                .iter()
                .all(|&partner| (0..size as i64).contains(&partner))
    }
}

/// The queries of each key head, row by row.
struct Grouping<'a, T> {
    turned: &'a [T],
    heads: Heads,
    seen: usize,
}

impl<T: Number> Work for Grouping<'_, T> {
    type Output = Vec<Group>;

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> Vec<Group> {
        let Heads {
            wide,
            narrow,
            size,
            window,
            ..
        } = self.heads;
        let (sharing, whole) = (wide / narrow, (wide + 2 * narrow) * size);
        let count = self.turned.len() / whole;
        let mut groups = Vec::new();
        let mut queries = Vec::with_capacity(MOST_TOGETHER * size);
        for head in 0..narrow {
            for first in (0..count * sharing).step_by(MOST_TOGETHER) {
                let together = first..(count * sharing).min(first + MOST_TOGETHER);
                let (mut seen, mut places) = (Vec::new(), Vec::new());
                queries.clear();
                for number in together {
                    let (row, query) = (number / sharing, head * sharing + number % sharing);
                    let end = self.seen + row + 1;
                    seen.push(window.map_or(0, |window| end.saturating_sub(window))..end);
                    places.push((row * wide + query) * size);
                    queries.extend_from_slice(&self.turned[row * whole + query * size..][..size]);
                }
                groups.push(Group {
                    head,
                    seen,
                    places,
                    queries: lanes::widen::<S, T, T>(simd, &queries, size),
                });
            }
        }
        groups
    }
}

struct Turning<'a, T> {
    projected: &'a [T],
    before: Before<'a, T>,
    heads: Heads,
}

impl<T: Number> Work for Turning<'_, T> {
    type Output = Vec<T>;

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> Vec<T> {
        let Heads {
            wide, narrow, size, ..
        } = self.heads;
        let mut turned = self.projected.to_vec();
        let mut given = vec![T::ZERO; size];
        for (row, numbers) in turned
            .chunks_exact_mut((wide + 2 * narrow) * size)
            .enumerate()
        {
            let heads = numbers[..(wide + narrow) * size].chunks_exact_mut(size);
            for (number, head) in heads.enumerate() {
                if let Some(norms) = self.before.norms {
                    normalise(simd, head, norms[usize::from(number >= wide)]);
                }
                if let Some(rotary) = self.before.rotary {
                    given.copy_from_slice(head);
                    turn(&given, rotary, row * size, head);
                }
            }
        }
        turned
    }
}

#[inline(always)]
fn turn<T: Number>(given: &[T], rotary: Rotary<'_, T>, start: usize, head: &mut [T]) {
    let cosines = &rotary.cosines[start..][..head.len()];
    let sines = &rotary.sines[start..][..head.len()];
    for (place, number) in head.iter_mut().enumerate() {
        let other = given[rotary.partners[place] as usize];
        let straight = T::from_f32(given[place].to_f32() * cosines[place].to_f32());
        let across = T::from_f32(other.to_f32() * sines[place].to_f32());
        *number = T::from_f32(straight.to_f32() + across.to_f32());
    }
}

struct Mixing<'a, T> {
    heads: Heads,
    keys: &'a [T],
    values: &'a [T],
    groups: &'a [Group],
    block: Range<usize>,
}

impl<T: Number> Work for Mixing<'_, T> {
    type Output = Vec<Mixed>;

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> Vec<Mixed> {
        let Heads { narrow, size, .. } = self.heads;
        let mut all = Vec::with_capacity(self.groups.len());
        for (group, mut weights) in self.groups.iter().zip(self.scores(simd)) {
            let (largest, sums) = softmax(&mut weights);
            let count = group.places.len();
            let mut values = vec![0.0; count * size];
            for start in (0..size).step_by(CHUNK) {
                let chunk = Values {
                    numbers: &self.values[(self.block.start * narrow + group.head) * size..],
                    apart: narrow * size,
                    start,
                    size,
                };
                let mixed = chunk.mix(simd, &weights, count);
                for query in 0..count {
                    let own = &mut values[query * size..][start..size.min(start + CHUNK)];
                    own.copy_from_slice(&mixed[query][..own.len()]);
                }
            }
            all.push(Mixed {
                largest,
                sums,
                values,
            });
        }
        all
    }
}

impl<T: Number> Mixing<'_, T> {
    /// The scores of each query of each group at every position, -inf where it does not look.
    ///
    /// Position by position, as keys lie in memory; values, which are read by head, are fetched meanwhile.
    #[inline(always)]
    fn scores<S: Simd>(&self, simd: S) -> Vec<Vec<Each>> {
        let Heads { narrow, size, .. } = self.heads;
        let nothing = vec![[f32::NEG_INFINITY; MOST_TOGETHER]; self.block.len()];
        let mut all = vec![nothing; self.groups.len()];
        for place in 0..self.block.len() {
            let position = self.block.start + place;
            let here = position * narrow * size..(position + 1) * narrow * size;
            let keys = &self.keys[here.clone()];
            for line in self.values[here].chunks(LINE / size_of::<T>()) {
                simd.fetch(&line[0]);
            }
            for (group, scores) in self.groups.iter().zip(&mut all) {
                let key = &keys[group.head * size..][..size];
                self.score(simd, key, group, position, &mut scores[place]);
            }
        }
        all
    }

    #[inline(always)]
    fn score<S: Simd>(
        &self,
        simd: S,
        key: &[T],
        group: &Group,
        position: usize,
        scores: &mut Each,
    ) {
        let Heads { size, scaling, .. } = self.heads;
        let mut queries: &[Chunk] = &group.queries;
        let together = lanes::together::<S>(size);
        for first in (0..group.seen.len()).step_by(together) {
            let seen = &group.seen[first..group.seen.len().min(first + together)];
            let (own, rest) = queries.split_at(lanes::chunks(size) * seen.len());
            queries = rest;
            let sums = lanes::dots(simd, key, &[], own, seen.len());
            for query in 0..seen.len() {
                if seen[query].contains(&position) {
                    scores[first + query] = sums[query] * scaling;
                }
            }
        }
    }
}

/// Turn scores into weights, of which the largest is 1; returns the largest scores and the sums of the weights.
#[inline(always)]
fn softmax(scores: &mut [Each]) -> (Each, Each) {
    let mut most = [f32::NEG_INFINITY; MOST_TOGETHER];
    for scores in scores.iter() {
        for query in 0..MOST_TOGETHER {
            most[query] = larger(most[query], scores[query]);
        }
    }
    let mut sums = [0.0; MOST_TOGETHER];
    for scores in scores.iter_mut() {
        for query in 0..MOST_TOGETHER {
            let score = scores[query];
            let weight = lanes::exp(score - most[query]);
            scores[query] = if score == f32::NEG_INFINITY {
                0.0
            } else {
                weight
            };
            sums[query] += scores[query];
        }
    }
    (most, sums)
}

/// The larger; what is not a number is passed over here, and found again in the weights.
#[inline(always)]
fn larger(a: f32, b: f32) -> f32 {
    if b > a { b } else { a }
}

/// A chunk of the values of one head at each position.
struct Values<'a, T> {
    numbers: &'a [T],
    /// From one position to the next.
    apart: usize,
    start: usize,
    size: usize,
}

impl<T: Number> Values<'_, T> {
    /// What each of `count` queries mixes: the sum over positions, each times its weight.
    #[inline(always)]
    fn mix<S: Simd>(
        &self,
        simd: S,
        weights: &[Each],
        count: usize,
    ) -> [[f32; CHUNK]; MOST_TOGETHER] {
        match count {
            1 => self.mix_of::<S, 1>(simd, weights),
            2 => self.mix_of::<S, 2>(simd, weights),
            3 => self.mix_of::<S, 3>(simd, weights),
            4 => self.mix_of::<S, 4>(simd, weights),
            5 => self.mix_of::<S, 5>(simd, weights),
            6 => self.mix_of::<S, 6>(simd, weights),
            7 => self.mix_of::<S, 7>(simd, weights),
            _ => self.mix_of::<S, 8>(simd, weights),
        }
    }

    #[inline(always)]
    fn mix_of<S: Simd, const R: usize>(
        &self,
        simd: S,
        weights: &[Each],
    ) -> [[f32; CHUNK]; MOST_TOGETHER] {
        let mut sums = [[simd.splat(0.0); 2]; R];
        for (place, weights) in weights.iter().enumerate() {
            let numbers = &self.numbers[place * self.apart..][..self.size];
            let [a, b] = match numbers[self.start..].first_chunk::<CHUNK>() {
                Some(numbers) => T::load(simd, numbers),
                None => T::load(simd, &lanes::chunk_at(numbers, self.start)),
            };
            for query in 0..R {
                let weight = simd.splat(weights[query]);
                sums[query][0] = simd.mul_add(a, weight, sums[query][0]);
                sums[query][1] = simd.mul_add(b, weight, sums[query][1]);
            }
        }
        let mut mixed = [[0.0; CHUNK]; MOST_TOGETHER];
        for query in 0..R {
            for half in 0..2 {
                let mut lanes = [0.0; LANES];
                simd.store(sums[query][half], &mut lanes);
                for lane in 0..LANES {
                    mixed[query][T::place(half, lane)] = lanes[lane];
                }
            }
        }
        mixed
    }
}
