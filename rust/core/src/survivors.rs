//! Samples of which only some are left: scores and flags as given, beside a bitmask.

use crate::error::Result;
use crate::order::Score;
use crate::run::Run;
use crate::samples::{BLOCK, Block, Lane, Loaded, Pairs, Samples};
use crate::tally::Counts;
use crate::validate::require_valid;

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
    pub fn of(scores: &'a [S], correct: &'a [u8], alive: &'a [u64]) -> Self {
        let mut before = vec![0];
        let mut sum = 0;
        for words in alive.chunks(MARK) {
            sum += count(words);
            before.push(sum);
        }
        Self {
            scores,
            correct,
            alive,
            before,
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

    /// Visit the samples from `start` on, at most `most`: with their number from `start`, 64 together where they stand so.
    #[inline(always)]
    fn visit(&self, start: usize, most: usize, mut visit: impl FnMut(usize, &[S], &[u8])) -> usize {
        let (first, bit) = self.locate(start);
        let mut done = 0;
        for (place, &word) in self.alive.iter().enumerate().skip(first) {
            let mut rest = if place == first {
                word >> bit << bit
            } else {
                word
            };
            let base = place * WORD;
            if rest == u64::MAX && done + WORD <= most {
                visit(
                    done,
                    &self.scores[base..base + WORD],
                    &self.correct[base..base + WORD],
                );
                done += WORD;
                rest = 0;
            }
            while rest != 0 && done < most {
                let at = base + rest.trailing_zeros() as usize;
                rest &= rest - 1;
                visit(done, &self.scores[at..=at], &self.correct[at..=at]);
                done += 1;
            }
            if done == most {
                break;
            }
        }
        done
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
}

macro_rules! left {
    ($score:ty, $lane:ty) => {
        impl Samples for Left<'_, $score> {
            type Lane = $lane;

            #[inline(always)]
            fn load(&self, start: usize, block: &mut Block<$lane>) -> Loaded<$lane> {
                let Block { keys, weights } = block;
                let (mut finite, mut flags) = (true, 0);
                let count = self.visit(start, BLOCK, |place, scores, correct| {
                    for (key, score) in keys[place..].iter_mut().zip(scores) {
                        *key = <$lane>::of(score.key());
                        finite &= score.is_finite();
                    }
                    for (weight, &flag) in weights[place..].iter_mut().zip(correct) {
                        *weight = <$lane>::weight(flag);
                        flags |= flag;
                    }
                });
                keys[count..].fill(<$lane>::MIN);
                weights[count..].fill(0);
                Loaded {
                    weight: weights.iter().fold(0, |sum, &more| <$lane>::add(sum, more)),
                    lowest: keys[..count].iter().copied().min().unwrap_or(<$lane>::MAX),
                    valid: finite && flags <= 1,
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
pub(crate) fn count(alive: &[u64]) -> usize {
    alive.iter().map(|word| word.count_ones() as usize).sum()
}

/// Take out the samples from a key up, none without one, and count them; refuses invalid ones, also among those that
/// were out before.
pub(crate) fn take_from<S: Score>(
    alive: &mut [u64],
    scores: &[S],
    correct: &[u8],
    key: Option<S::Key>,
    run: &Run,
) -> Result<Counts> {
    let size = (alive.len() / 16).clamp(1, 1 << 12);
    let tasks = alive
        .chunks_mut(size)
        .zip(scores.chunks(size * WORD))
        .zip(correct.chunks(size * WORD))
        .collect();
    let take = |((words, scores), correct): ((&mut [u64], &[S]), &[u8])| {
        let (mut counts, mut valid) = (Counts::default(), true);
        let samples = scores.chunks(WORD).zip(correct.chunks(WORD));
        for (word, (scores, correct)) in words.iter_mut().zip(samples) {
            let (mut reached, mut right) = ([0u8; WORD], [0u8; WORD]);
            for (reached, score) in reached.iter_mut().zip(scores) {
                *reached = u8::from(key.is_some_and(|key| score.key() >= key));
                valid &= score.is_finite();
            }
            right[..correct.len()].copy_from_slice(correct);
            valid &= right.iter().fold(0, |all, &flag| all | flag) <= 1;
            let taken = *word & bits(&reached);
            counts += Counts {
                accepted: taken.count_ones() as usize,
                correct: (taken & bits(&right)).count_ones() as usize,
            };
            *word &= !taken;
        }
        (counts, valid)
    };
    let mut sum = Counts::default();
    for (counts, valid) in run.map(tasks, take)? {
        if !valid {
            require_valid(scores, correct, None, run)?;
        }
        sum += counts;
    }
    Ok(sum)
}

/// The lowest bit of each byte.
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
            let left = Left::of(&scores, &correct, &alive);
            let expected: Vec<_> = (0..scores.len())
                .filter(|at| alive[at / WORD] >> (at % WORD) & 1 == 1)
                .map(|at| (scores[at].key(), correct[at]))
                .collect();
            let found: Vec<_> = (0..left.len()).map(|index| left.get(index)).collect();
            assert_eq!(found, expected);
            for start in (0..left.len()).step_by(BLOCK) {
                let mut block = Block::new();
                let loaded = left.load(start, &mut block);
                let part = &expected[start..expected.len().min(start + BLOCK)];
                let keys: Vec<_> = part.iter().map(|&(key, _)| i32::of(key)).collect();
                assert_eq!(block.keys[..part.len()], keys);
                assert!(block.keys[part.len()..].iter().all(|&key| key == i32::MIN));
                assert_eq!(loaded.lowest, *keys.iter().min().unwrap());
                let right = part.iter().map(|&(_, flag)| usize::from(flag)).sum();
                let accepted = part.len();
                assert_eq!(
                    loaded.weight.counts(),
                    Counts {
                        accepted,
                        correct: right
                    }
                );
                assert!(loaded.valid);
            }
        }
    }
}
