//! Samples of which only some are left: scores and flags as given, beside a bitmask.

use crate::error::Result;
use crate::order::Score;
use crate::run::Run;
use crate::samples::{BLOCK, Block, Given, Loaded, Pairs, Samples};
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

    /// Also those that are out.
    #[inline(always)]
    fn all(&self) -> Given<'a, S> {
        Given {
            scores: self.scores,
            correct: self.correct,
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

macro_rules! left {
    ($score:ty, $lane:ty) => {
        impl Samples for Left<'_, $score> {
            type Lane = $lane;

            fn places(&self) -> usize {
                self.scores.len()
            }

            #[inline(always)]
            fn prefetch(&self, simd: impl Simd<$lane>, places: Range<usize>) {
                self.all().prefetch(simd, places);
            }

            #[inline(always)]
            fn load(
                &self,
                simd: impl Simd<$lane>,
                start: usize,
                block: &mut Block<$lane>,
            ) -> Loaded<$lane> {
                // Also those that are out must be valid.
                let valid = self.all().load(simd, start, block).valid;
                let words = &self.alive[start / WORD..];
                let words = &words[..words.len().min(MARK)];
                let mut bits = [0; MARK];
                bits[..words.len()].copy_from_slice(words);
                let count = simd.keep(block, &bits);
                block.close(count);
                let (mut weight, mut lowest) = (0, <$lane>::MAX);
                for (&key, &more) in block.keys[..count].iter().zip(&block.weights[..count]) {
                    lowest = lowest.min(key);
                    weight += more;
                }
                Loaded {
                    weight,
                    lowest,
                    valid,
                }
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
    fn run(self, simd: impl Simd<i32>) -> Counts {
        let mut counts = Counts::default();
        let (scores, more_scores) = self.scores.as_chunks::<WORD>();
        let (correct, more_correct) = self.correct.as_chunks::<WORD>();
        let (alive, more_alive) = self.alive.split_at_mut(scores.len());
        for (at, ((alive, word), correct)) in alive.iter_mut().zip(scores).zip(correct).enumerate()
        {
            if let Some(soon) = scores.get(at + MARK) {
                simd.prefetch(soon);
            }
            counts += take_word(simd, alive, word, correct, self.key);
        }
        if let [alive] = more_alive {
            let mut correct = [0; WORD];
            correct[..more_correct.len()].copy_from_slice(more_correct);
            counts += take_word(simd, alive, more_scores, &correct, self.key);
        }
        counts
    }
}

#[inline(always)]
fn take_word<S: Score>(
    simd: impl Simd<i32>,
    alive: &mut u64,
    scores: &[S],
    correct: &[u8; WORD],
    key: S::Key,
) -> Counts {
    let mut reached = [0u8; WORD];
    for (reached, score) in reached.iter_mut().zip(scores) {
        *reached = u8::from(score.key() >= key);
    }
    let taken = *alive & simd.bits(&reached);
    *alive &= !taken;
    Counts {
        accepted: taken.count_ones() as usize,
        correct: (taken & simd.bits(correct)).count_ones() as usize,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::isa::InstructionSet;
    use crate::samples::Lane;

    /// One block, as each instruction set loads it.
    struct Load<'a>(&'a Left<'a, f32>, usize);

    impl Pass<i32> for Load<'_> {
        type Found = (Block<i32>, Loaded<i32>);

        fn run(self, simd: impl Simd<i32>) -> Self::Found {
            let mut block = Block::new();
            let loaded = self.0.load(simd, self.1, &mut block);
            (block, loaded)
        }
    }

    fn loads(left: &Left<f32>, start: usize) -> impl Iterator<Item = (Block<i32>, Loaded<i32>)> {
        let all = InstructionSet::available().into_iter();
        all.map(move |isa| pass(isa, Load(left, start)))
    }

    struct BitsOf<'a>(&'a [u8; WORD]);

    impl Pass<i32> for BitsOf<'_> {
        type Found = u64;

        fn run(self, simd: impl Simd<i32>) -> u64 {
            simd.bits(self.0)
        }
    }

    #[test]
    fn bytes_become_bits() {
        for seed in 0..64u64 {
            let word = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ (1 << seed);
            let mut bytes = [0xfe; WORD];
            for (at, byte) in bytes.iter_mut().enumerate() {
                *byte |= (word >> at & 1) as u8;
            }
            for isa in InstructionSet::available() {
                assert_eq!(pass(isa, BitsOf(&bytes)), word);
            }
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
            let is_left = |at: &usize| alive[at / WORD] >> (at % WORD) & 1 == 1;
            let expected = |places: Range<usize>| -> Vec<(u32, u8)> {
                let left = places.filter(is_left);
                left.map(|at| (scores[at].key(), correct[at])).collect()
            };
            let all = expected(0..scores.len());
            let found: Vec<_> = (0..left.len()).map(|index| left.get(index)).collect();
            assert_eq!(found, all);
            let mut some = Vec::new();
            left.append(1..left.len(), &mut some);
            assert_eq!(some[..], all[1..]);
            for start in (0..left.places()).step_by(BLOCK) {
                let expected = expected(start..scores.len().min(start + BLOCK));
                for (block, loaded) in loads(&left, start) {
                    let keys = block.keys.map(|key| key.key());
                    let flags = block.weights.map(|weight| weight.counts().correct as u8);
                    let found: Vec<_> = keys.into_iter().zip(flags).collect();
                    let (found, empty) = found[..block.end()].split_at(expected.len());
                    assert_eq!(found, expected);
                    assert!(empty.len() < 16 && empty.iter().all(|&pair| pair == (0, 0)));
                    assert!(
                        block.weights[expected.len()..block.end()]
                            .iter()
                            .all(|&w| w == 0)
                    );
                    let counts = Counts {
                        accepted: expected.len(),
                        correct: expected.iter().filter(|(_, flag)| *flag == 1).count(),
                    };
                    assert_eq!(loaded.weight.counts(), counts);
                    let lowest = expected.iter().map(|&(key, _)| i32::of(key)).min();
                    assert_eq!(loaded.lowest, lowest.unwrap_or(i32::MAX));
                    assert!(loaded.valid);
                }
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
            assert!(loads(&left, BLOCK).all(|(_, loaded)| !loaded.valid));
        }
        let mut correct = correct;
        correct[1999] = 2;
        alive[1999 / WORD] = 0;
        let left = Left::of(&scores, &correct, &alive, &Run::on(1));
        assert!(loads(&left, BLOCK).all(|(_, loaded)| !loaded.valid));
    }
}
