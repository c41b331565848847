//! Samples as the search reads them: a block at a time, each one a signed integer in the scores' order and a weight.

use crate::error::Result;
use crate::order::{Key, Score};
use crate::run::Run;
use crate::scan::{Parts, Simd, Vectors};
use crate::tally::Counts;
use crate::validate::require_valid;
use std::fmt::Debug;
use std::ops::Range;

/// How many samples are looked at together; their keys and weights stay in the first-level cache.
pub(crate) const BLOCK: usize = 1024;

/// A signed integer in the scores' order.  Signed, because that is what vector units compare.
///
/// No finite score has the key `MIN` or `MAX`: `MIN` can fill a block up, and `MAX` is above all.
pub(crate) trait Lane:
    Vectors + Copy + Ord + Debug + Default + Send + Sync + 'static
{
    /// A key and its flag in one: `2 * (key - low) + flag` for keys less than half the range above some `low`.
    type Packed: Copy + Default + Send + Sync + 'static;
    /// The unsigned key of the same order.
    type Key: Key;
    const MIN: Self;
    const MAX: Self;
    const ZERO: Self;

    /// The key of the highest finite score; its complement is that of the lowest.
    const HIGHEST: Self;

    fn next(self) -> Self;
    /// How far this key lies above a lower one.
    fn above(self, low: Self) -> u64;
    /// The key so far above this one, or `MAX`.
    fn raised(self, distance: u128) -> Self;
    /// The lowest key whose distance from this one can be packed.
    fn reach_down(self) -> Self;

    fn of(key: Self::Key) -> Self;
    fn key(self) -> Self::Key;
    fn add(self, other: Self) -> Self;
    /// One sample: counts of up to [`BLOCK`] samples add up without a carry from one half into the other.
    fn weight(flag: u8) -> Self;
    fn counts(self) -> Counts;
    /// The weight with 32 bits for each count.
    fn word(self) -> u64;
    fn pack(self, low: Self, weight: Self) -> Self::Packed;
    fn unpack(packed: Self::Packed) -> (Self, Self);
}

macro_rules! lane {
    ($lane:ty, $bits:ty, $half:expr, $highest:expr) => {
        impl Lane for $lane {
            type Packed = $bits;
            type Key = $bits;
            const MIN: Self = <$lane>::MIN;
            const MAX: Self = <$lane>::MAX;
            const ZERO: Self = 0;
            const HIGHEST: Self = $highest;

            #[inline(always)]
            fn next(self) -> Self {
                self.wrapping_add(1)
            }

            #[inline(always)]
            fn above(self, low: Self) -> u64 {
                u64::from(self.wrapping_sub(low) as $bits)
            }

            fn raised(self, distance: u128) -> Self {
                <$bits>::try_from(distance).map_or(Self::MAX, |distance| {
                    self.checked_add_unsigned(distance).unwrap_or(Self::MAX)
                })
            }

            fn reach_down(self) -> Self {
                self.saturating_sub(<$lane>::MAX).max(<$lane>::MIN + 1)
            }

            #[inline(always)]
            fn of(key: $bits) -> Self {
                (key ^ (1 << (<$bits>::BITS - 1))) as $lane
            }

            #[inline(always)]
            fn key(self) -> $bits {
                self as $bits ^ (1 << (<$bits>::BITS - 1))
            }

            #[inline(always)]
            fn add(self, other: Self) -> Self {
                self.wrapping_add(other)
            }

            #[inline(always)]
            fn weight(flag: u8) -> Self {
                1 + (<$lane>::from(flag) << $half)
            }

            #[inline(always)]
            fn counts(self) -> Counts {
                let bits = self as $bits;
                Counts {
                    accepted: (bits & ((1 << $half) - 1)) as usize,
                    correct: (bits >> $half) as usize,
                }
            }

            #[inline(always)]
            fn word(self) -> u64 {
                let bits = self as $bits;
                let (accepted, correct) = (bits & ((1 << $half) - 1), bits >> $half);
                u64::from(accepted) | u64::from(correct) << 32
            }

            #[inline(always)]
            fn pack(self, low: Self, weight: Self) -> $bits {
                (self.wrapping_sub(low) as $bits) << 1 | (weight as $bits) >> $half
            }

            #[inline(always)]
            fn unpack(packed: $bits) -> (Self, Self) {
                ((packed >> 1) as $lane, 1 + ((packed & 1) << $half) as $lane)
            }
        }
    };
}

lane!(i32, u32, 16, 0x7f7f_ffff);
lane!(i64, u64, 32, 0x7fef_ffff_ffff_ffff);

/// Places of a block that are looked at or not together: as many as the widest vector has lanes.
const TOGETHER: usize = 16;

/// Keys and weights of samples in their order, filled up with weightless ones.
#[repr(align(64))]
pub(crate) struct Block<L> {
    pub keys: [L; BLOCK],
    pub weights: [L; BLOCK],
    /// A multiple of [`TOGETHER`], at most [`BLOCK`].
    end: usize,
}

/// What is known of the samples in a block at once.
pub(crate) struct Loaded<L> {
    /// Their summed weights.
    pub weight: L,
    /// Their lowest key.
    pub lowest: L,
    /// Whether all of them are valid.
    pub valid: bool,
}

impl<L: Lane> Block<L> {
    pub fn new() -> Self {
        Self {
            keys: [L::MIN; BLOCK],
            weights: [L::ZERO; BLOCK],
            end: BLOCK,
        }
    }

    /// Past the last place that needs to be looked at: a multiple of sixteen, at most [`BLOCK`].
    #[inline(always)]
    pub fn end(&self) -> usize {
        self.end
    }

    /// Say how many samples there are.
    #[inline(always)]
    pub fn close(&mut self, count: usize) {
        self.end = count.next_multiple_of(TOGETHER).min(BLOCK);
        self.keys[count.min(BLOCK)..self.end].fill(L::MIN);
        self.weights[count.min(BLOCK)..self.end].fill(L::ZERO);
    }
}

/// Keys with their flags.
pub(crate) trait Pairs: Sync {
    type Key: Key;

    fn len(&self) -> usize;
    fn get(&self, index: usize) -> (Self::Key, u8);

    /// Append those from one index up to another.
    fn append(&self, indices: Range<usize>, list: &mut Vec<(Self::Key, u8)>) {
        list.extend(indices.map(|index| self.get(index)));
    }
}

/// Pairs that can be searched.
pub(crate) trait Samples: Pairs<Key = <Self::Lane as Lane>::Key> {
    type Lane: Lane;

    /// How many places there are to load from; some may be empty.
    fn places(&self) -> usize {
        self.len()
    }

    /// Fetch what lies at these places, if there are so many.
    fn prefetch(&self, simd: impl Simd<Self::Lane>, places: Range<usize>);

    /// Fill the block with the samples from place `start` on, a multiple of [`BLOCK`].
    fn load(
        &self,
        simd: impl Simd<Self::Lane>,
        start: usize,
        block: &mut Block<Self::Lane>,
    ) -> Loaded<Self::Lane>;
    /// The error that describes what [`load`](Self::load) found.
    fn validate(&self, run: &Run) -> Result<()>;
}

/// Samples as the caller gave them.
pub struct Given<'a, S> {
    pub scores: &'a [S],
    pub correct: &'a [u8],
}

impl<S: Score> Given<'_, S> {
    /// Fetch the samples at these places, if there are so many.
    #[inline(always)]
    pub(crate) fn prefetch<L: Lane>(&self, simd: impl Simd<L>, places: Range<usize>) {
        if places.end <= self.scores.len() {
            simd.prefetch(&self.scores[places.clone()]);
            simd.prefetch(&self.correct[places]);
        }
    }
}

impl<S: Score> Pairs for Given<'_, S> {
    type Key = S::Key;

    #[inline(always)]
    fn len(&self) -> usize {
        self.scores.len()
    }

    #[inline(always)]
    fn get(&self, index: usize) -> (S::Key, u8) {
        (self.scores[index].key(), self.correct[index])
    }

    /// As slices: the fewer instructions between far places, the more of these are fetched at once.
    fn append(&self, indices: Range<usize>, list: &mut Vec<(S::Key, u8)>) {
        let samples = self.scores[indices.clone()]
            .iter()
            .zip(&self.correct[indices]);
        list.extend(samples.map(|(score, &flag)| (score.key(), flag)));
    }
}

macro_rules! given {
    ($score:ty, $lane:ty) => {
        impl Samples for Given<'_, $score> {
            type Lane = $lane;

            #[inline(always)]
            fn prefetch(&self, simd: impl Simd<$lane>, places: Range<usize>) {
                Given::prefetch(self, simd, places);
            }

            #[inline(always)]
            fn load(
                &self,
                _: impl Simd<$lane>,
                start: usize,
                block: &mut Block<$lane>,
            ) -> Loaded<$lane> {
                let count = BLOCK.min(self.len() - start);
                let scores = &self.scores[start..start + count];
                let correct = &self.correct[start..start + count];
                let (mut lowest, mut highest) = (<$lane>::MAX, <$lane>::MIN);
                for (key, score) in block.keys.iter_mut().zip(scores) {
                    *key = <$lane>::of(score.key());
                    lowest = lowest.min(*key);
                    highest = highest.max(*key);
                }
                let (mut flags, mut sum) = (0, 0);
                for (weight, &flag) in block.weights.iter_mut().zip(correct) {
                    *weight = <$lane>::weight(flag);
                    sum = <$lane>::add(sum, *weight);
                    flags |= flag;
                }
                block.close(count);
                Loaded {
                    weight: sum,
                    lowest,
                    // Infinities lie beyond the finite scores, and NaN beyond them.
                    valid: highest <= <$lane>::HIGHEST && lowest >= !<$lane>::HIGHEST && flags <= 1,
                }
            }

            fn validate(&self, run: &Run) -> Result<()> {
                require_valid(self.scores, self.correct, None, run)
            }
        }
    };
}

given!(f32, i32);
given!(f64, i64);

/// Samples gathered from a range of keys, which count from the range's low end.
pub(crate) struct Gathered<L: Lane> {
    parts: Parts<L>,
    /// The index of each part's first sample, and the number of all.
    starts: Vec<usize>,
}

impl<L: Lane> Gathered<L> {
    pub fn new(parts: Parts<L>) -> Self {
        let mut starts = vec![0];
        for part in &parts {
            starts.push(starts[starts.len() - 1] + part.len());
        }
        Self { parts, starts }
    }

    /// The part a sample is in, and its place there.
    #[inline(always)]
    fn find(&self, index: usize) -> (usize, usize) {
        let part = self.starts.partition_point(|&start| start <= index) - 1;
        (part, index - self.starts[part])
    }
}

impl<L: Lane> Pairs for Gathered<L> {
    type Key = L::Key;

    #[inline(always)]
    fn len(&self) -> usize {
        self.starts[self.parts.len()]
    }

    #[inline(always)]
    fn get(&self, index: usize) -> (L::Key, u8) {
        let (part, place) = self.find(index);
        let (key, weight) = L::unpack(self.parts[part][place]);
        (key.key(), weight.counts().correct as u8)
    }
}

impl<L: Lane> Samples for Gathered<L> {
    type Lane = L;

    /// What was gathered was written a moment ago.
    #[inline(always)]
    fn prefetch(&self, _: impl Simd<L>, _: Range<usize>) {}

    #[inline(always)]
    fn load(&self, _: impl Simd<L>, start: usize, block: &mut Block<L>) -> Loaded<L> {
        let (mut part, mut place) = self.find(start);
        let (mut sum, mut lowest, mut count) = (L::ZERO, L::MAX, 0);
        while count < BLOCK && part < self.parts.len() {
            let rest = &self.parts[part][place..];
            let rest = &rest[..rest.len().min(BLOCK - count)];
            let keys = block.keys[count..].iter_mut();
            let places = keys.zip(&mut block.weights[count..]);
            for ((key, weight), &packed) in places.zip(rest) {
                (*key, *weight) = L::unpack(packed);
                sum = sum.add(*weight);
                lowest = lowest.min(*key);
            }
            count += rest.len();
            (part, place) = (part + 1, 0);
        }
        block.close(count);
        Loaded {
            weight: sum,
            lowest,
            valid: true,
        }
    }

    fn validate(&self, _: &Run) -> Result<()> {
        Ok(())
    }
}
