//! Samples of which only some are left: scores and flags as given, beside a bitmask.

use crate::error::Result;
use crate::order::Score;
use crate::run::Run;
use crate::samples::{BLOCK, Block, Lane, Loaded, Pairs, Samples};
use crate::scan::{Pass, Simd, pass};
use crate::tally::Counts;
use crate::validate::require_valid;
use std::ops::{Add, Range};

/// Samples in one word of the mask.
const WORD: usize = 64;

/// Samples with a mask of those that take part; all do without one.
#[derive(Clone, Copy)]
pub(crate) struct Survivors<'a, S> {
    pub scores: &'a [S],
    pub correct: &'a [u8],
    pub alive: Option<&'a [u64]>,
}

impl<'a, S: Score> Survivors<'a, S> {
    /// All of the samples.
    pub fn all(scores: &'a [S], correct: &'a [u8]) -> Self {
        Self {
            scores,
            correct,
            alive: None,
        }
    }

    /// Consecutive parts of about `size` samples, cut between words.
    pub fn pieces(&self, size: usize) -> Vec<Self> {
        let len = self.scores.len();
        let size = size.next_multiple_of(WORD);
        let part = |start: usize| {
            let end = len.min(start + size);
            let words = |alive: &'a [u64]| &alive[start / WORD..end.div_ceil(WORD)];
            Self {
                scores: &self.scores[start..end],
                correct: &self.correct[start..end],
                alive: self.alive.map(words),
            }
        };
        (0..len).step_by(size).map(part).collect()
    }

    /// Visit the samples a word of the mask at a time.
    #[inline(always)]
    pub fn words(&self, mut visit: impl FnMut(u64, &[S], &[u8])) {
        for (place, (scores, correct)) in self
            .scores
            .chunks(WORD)
            .zip(self.correct.chunks(WORD))
            .enumerate()
        {
            let alive = match self.alive {
                Some(alive) => alive[place],
                None => full(scores.len()),
            };
            visit(alive, scores, correct);
        }
    }

    /// Those that are left, by themselves; None if all are.
    pub fn compact(&self) -> Option<(Vec<S>, Vec<u8>)> {
        self.alive?;
        let (mut scores, mut flags) = (Vec::new(), Vec::new());
        self.words(|alive, given, correct| {
            for (at, (score, flag)) in given.iter().zip(correct).enumerate() {
                if alive >> at & 1 == 1 {
                    scores.push(*score);
                    flags.push(*flag);
                }
            }
        });
        Some((scores, flags))
    }
}

/// A word in which the first `count` samples are left.
fn full(count: usize) -> u64 {
    if count >= WORD {
        u64::MAX
    } else {
        (1 << count) - 1
    }
}

/// A mask of `len` samples that are all left.
pub(crate) fn everyone(len: usize) -> Vec<u64> {
    let mut alive = vec![u64::MAX; len.div_ceil(WORD)];
    if let (Some(last), rest @ 1..) = (alive.last_mut(), len % WORD) {
        *last = full(rest);
    }
    alive
}

/// Words between two places where it is known how many samples are left before.
const MARK: usize = BLOCK / WORD;

/// The samples that are left, numbered in their order, for a search that need not know of others.
pub(crate) struct Left<'a, S> {
    scores: &'a [S],
    correct: &'a [u8],
    alive: &'a [u64],
    /// How many are left before each mark, and in all.
    before: Vec<usize>,
}

impl<'a, S: Score> Left<'a, S> {
    pub fn of(scores: &'a [S], correct: &'a [u8], alive: &'a [u64], run: &Run) -> Self {
        Self {
            scores,
            correct,
            alive,
            before: pass(run.instruction_set(), Before(alive)),
        }
    }

    /// The word of a sample and its place there.
    fn locate(&self, index: usize) -> (usize, u32) {
        let mark = self.before.partition_point(|&before| before <= index) - 1;
        let mut rest = index - self.before[mark];
        for (place, &word) in self.alive.iter().enumerate().skip(mark * MARK) {
            let inside = word.count_ones() as usize;
            if rest < inside {
                let word = (0..rest).fold(word, |word, _| word & (word - 1));
                return (place, word.trailing_zeros());
            }
            rest -= inside;
        }
        (self.alive.len(), 0)
    }
}

impl<S: Score> Pairs for Left<'_, S> {
    type Key = S::Key;

    fn len(&self) -> usize {
        self.before[self.before.len() - 1]
    }

    fn get(&self, index: usize) -> (S::Key, u8) {
        let (word, bit) = self.locate(index);
        let at = word * WORD + bit as usize;
        (self.scores[at].key(), self.correct[at])
    }

    fn append(&self, indices: Range<usize>, list: &mut Vec<(S::Key, u8)>) {
        let (first, bit) = self.locate(indices.start);
        let mut wanted = indices.len();
        for (place, &word) in self.alive.iter().enumerate().skip(first) {
            let mut rest = if place == first {
                word >> bit << bit
            } else {
                word
            };
            while rest != 0 && wanted > 0 {
                let at = place * WORD + rest.trailing_zeros() as usize;
                list.push((self.scores[at].key(), self.correct[at]));
                rest &= rest - 1;
                wanted -= 1;
            }
            if wanted == 0 {
                return;
            }
        }
    }
}

/// What a block holds.
struct Seen<L> {
    loaded: Loaded<L>,
    /// Of all keys, also of those that are out.
    least: L,
    most: L,
    flags: u8,
}

impl<L: Lane> Seen<L> {
    /// Load up to [`HALF`] samples, of which those are left whose bit is set.
    #[inline(always)]
    fn load<S: Score<Key = L::Key>>(
        &mut self,
        (keys, weights): (&mut [L], &mut [L]),
        (scores, correct): (&[S], &[u8]),
        bits: u32,
    ) {
        let places = keys.iter_mut().zip(weights);
        let samples = scores.iter().zip(correct);
        for (((key, weight), (score, &flag)), bit) in places.zip(samples).zip(BITS) {
            let is_left = bits & bit != 0;
            let own = L::of(score.key());
            self.least = self.least.min(own);
            self.most = self.most.max(own);
            self.flags |= flag;
            *key = if is_left { own } else { L::MIN };
            *weight = if is_left { L::weight(flag) } else { L::ZERO };
            let highest = if is_left { own } else { L::MAX };
            self.loaded.lowest = self.loaded.lowest.min(highest);
            self.loaded.weight = self.loaded.weight.add(*weight);
        }
    }
}

/// The samples of which one half of a word tells whether they are left.
const HALF: usize = 32;
const BITS: [u32; HALF] = {
    let mut bits = [1; HALF];
    let mut place = 1;
    while place < HALF {
        bits[place] = bits[place - 1] << 1;
        place += 1;
    }
    bits
};

macro_rules! left {
    ($score:ty, $lane:ty) => {
        impl Samples for Left<'_, $score> {
            type Lane = $lane;

            /// Samples that are out leave their place empty: to look at them costs less than to move the others
            /// together.
            fn places(&self) -> usize {
                self.scores.len()
            }

            #[inline(always)]
            fn load(&self, start: usize, block: &mut Block<$lane>) -> Loaded<$lane> {
                let end = self.scores.len().min(start + BLOCK);
                let mut seen = Seen {
                    loaded: Loaded {
                        weight: 0,
                        lowest: <$lane>::MAX,
                        valid: true,
                    },
                    least: <$lane>::MAX,
                    most: <$lane>::MIN,
                    flags: 0,
                };
                let bits = |half: usize| {
                    let word = self.alive[start / WORD + half / 2];
                    (word >> (half % 2 * HALF)) as u32
                };
                let (keys, _) = block.keys.as_chunks_mut::<HALF>();
                let (weights, _) = block.weights.as_chunks_mut::<HALF>();
                let (scores, more_scores) = self.scores[start..end].as_chunks::<HALF>();
                let (correct, more_correct) = self.correct[start..end].as_chunks::<HALF>();
                let places = keys.iter_mut().zip(weights.iter_mut());
                for (half, (place, samples)) in places.zip(scores.iter().zip(correct)).enumerate() {
                    seen.load((place.0, place.1), (samples.0, samples.1), bits(half));
                }
                if !more_scores.is_empty() {
                    let half = scores.len();
                    let place = (&mut keys[half][..], &mut weights[half][..]);
                    seen.load(place, (more_scores, more_correct), bits(half));
                }
                block.keys[end - start..].fill(<$lane>::MIN);
                block.weights[end - start..].fill(0);
                let highest = <$lane>::HIGHEST;
                seen.loaded.valid =
                    seen.most <= highest && seen.least >= !highest && seen.flags <= 1;
                seen.loaded
            }

            fn validate(&self, run: &Run) -> Result<()> {
                require_valid(self.scores, self.correct, None, run)
            }
        }
    };
}

left!(f32, i32);
left!(f64, i64);

/// How many samples are left.
pub(crate) fn count(alive: &[u64], run: &Run) -> usize {
    let before = pass(run.instruction_set(), Before(alive));
    before[before.len() - 1]
}

/// Count those that are left before each mark, and all.
struct Before<'a>(&'a [u64]);

impl Pass<i32> for Before<'_> {
    type Found = Vec<usize>;

    #[inline(always)]
    fn run(self, _: impl Simd<i32>) -> Vec<usize> {
        let mut before = vec![0];
        let mut sum = 0;
        for words in self.0.chunks(MARK) {
            for word in words {
                sum += word.count_ones() as usize;
            }
            before.push(sum);
        }
        before
    }
}

/// Take out the valid samples from a key up, none without one, and count them.
pub(crate) fn take_from<S: Score>(
    alive: &mut [u64],
    scores: &[S],
    correct: &[u8],
    key: Option<S::Key>,
    run: &Run,
) -> Result<Counts> {
    let Some(key) = key else {
        return Ok(Counts::default());
    };
    let size = (alive.len() / 16).clamp(1, 1 << 12);
    let tasks = alive
        .chunks_mut(size)
        .zip(scores.chunks(size * WORD))
        .zip(correct.chunks(size * WORD))
        .collect();
    let isa = run.instruction_set();
    let found = run.map(tasks, |((alive, scores), correct)| {
        let take = Take {
            alive,
            scores,
            correct,
            key,
        };
        pass(isa, take)
    })?;
    Ok(found.into_iter().fold(Counts::default(), Counts::add))
}

struct Take<'a, S: Score> {
    alive: &'a mut [u64],
    scores: &'a [S],
    correct: &'a [u8],
    key: S::Key,
}

impl<S: Score> Pass<i32> for Take<'_, S> {
    type Found = Counts;

    #[inline(always)]
    fn run(self, _: impl Simd<i32>) -> Counts {
        let mut counts = Counts::default();
        let samples = self.scores.chunks(WORD).zip(self.correct.chunks(WORD));
        for (word, (scores, correct)) in self.alive.iter_mut().zip(samples) {
            if *word == 0 {
                continue;
            }
            let (mut reached, mut right) = ([0u8; WORD], [0u8; WORD]);
            for (reached, score) in reached.iter_mut().zip(scores) {
                *reached = u8::from(score.key() >= self.key);
            }
            right[..correct.len()].copy_from_slice(correct);
            let taken = *word & bits(&reached);
            counts += Counts {
                accepted: taken.count_ones() as usize,
                correct: (taken & bits(&right)).count_ones() as usize,
            };
            *word &= !taken;
        }
        counts
    }
}

/// The lowest bit of each byte.
#[inline(always)]
fn bits(bytes: &[u8; WORD]) -> u64 {
    let mut found = 0;
    for (place, eight) in bytes.as_chunks::<8>().0.iter().enumerate() {
        // Byte i moves to bit 56 + i; no two meet, so nothing carries.
        let ones = u64::from_le_bytes(*eight) & 0x0101_0101_0101_0101;
        found |= (ones.wrapping_mul(0x0102_0408_1020_4080) >> 56) << (8 * place);
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_become_bits() {
        for seed in 0..64u64 {
            let word = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ (1 << seed);
            let mut bytes = [0; WORD];
            for (at, byte) in bytes.iter_mut().enumerate() {
                *byte = (word >> at & 1) as u8;
            }
            assert_eq!(bits(&bytes), word);
        }
    }

    #[test]
    fn those_left_are_seen_as_if_alone() {
        let scores: Vec<f32> = (0..5000).map(|i| (i * 7919 % 5003) as f32).collect();
        let correct: Vec<u8> = (0..5000).map(|i| (i % 3 == 0) as u8).collect();
        for pattern in [u64::MAX, 0, 0x8000_0000_0000_0001, 0x5555_0000_ffff_0001] {
            let mut alive = everyone(scores.len());
            let words = alive.len();
            for (place, word) in alive.iter_mut().enumerate() {
                *word &= if place % 5 == 1 { u64::MAX } else { pattern };
            }
            alive[words - 2] = 0;
            let left = Left::of(&scores, &correct, &alive, &Run::on(1));
            let expected: Vec<_> = (0..scores.len())
                .filter(|at| alive[at / WORD] >> (at % WORD) & 1 == 1)
                .map(|at| (scores[at].key(), correct[at]))
                .collect();
            let found: Vec<_> = (0..left.len()).map(|index| left.get(index)).collect();
            assert_eq!(found, expected);
            let mut some = Vec::new();
            left.append(1..left.len(), &mut some);
            assert_eq!(some[..], expected[1..]);
            for start in (0..left.places()).step_by(BLOCK) {
                let mut block = Block::new();
                let loaded = left.load(start, &mut block);
                let is_left = |at: usize| alive[at / WORD] >> (at % WORD) & 1 == 1;
                let mut sum = Counts::default();
                for (place, at) in (start..start + BLOCK).enumerate() {
                    let is_there = at < scores.len() && is_left(at);
                    let (key, flag) = if is_there {
                        (i32::of(scores[at].key()), correct[at])
                    } else {
                        (i32::MIN, 0)
                    };
                    assert_eq!(block.keys[place], key);
                    let counts = Counts {
                        accepted: usize::from(is_there),
                        correct: usize::from(flag),
                    };
                    assert_eq!(block.weights[place].counts(), counts);
                    sum += counts;
                }
                assert_eq!(loaded.weight.counts(), sum);
                let lowest = block.keys.iter().filter(|&&key| key != i32::MIN).min();
                assert_eq!(loaded.lowest, lowest.copied().unwrap_or(i32::MAX));
                assert!(loaded.valid);
            }
        }
    }

    #[test]
    fn samples_that_are_out_must_be_valid_too() {
        let (scores, correct) = (vec![0.5f32; 2000], vec![1; 2000]);
        let mut alive = everyone(scores.len());
        alive[20] = 0;
        for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut scores = scores.clone();
            scores[20 * WORD + 7] = value;
            let left = Left::of(&scores, &correct, &alive, &Run::on(1));
            assert!(!left.load(BLOCK, &mut Block::new()).valid);
        }
        let mut correct = correct;
        correct[1999] = 2;
        alive[1999 / WORD] = 0;
        let left = Left::of(&scores, &correct, &alive, &Run::on(1));
        assert!(!left.load(BLOCK, &mut Block::new()).valid);
    }
}
