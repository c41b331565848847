//! Samples of which only some are left: scores and flags as given, beside a bitmask.

use crate::error::Result;
use crate::order::Score;
use crate::run::Run;

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

/// Take out the samples from a key up.
pub(crate) fn remove_from<S: Score>(
    alive: &mut [u64],
    scores: &[S],
    key: S::Key,
    run: &Run,
) -> Result<()> {
    let size = (alive.len() / 16).clamp(1, 1 << 14);
    let tasks = alive
        .chunks_mut(size)
        .zip(scores.chunks(size * WORD))
        .collect();
    run.map(tasks, |(words, scores): (&mut [u64], &[S])| {
        for (word, scores) in words.iter_mut().zip(scores.chunks(WORD)) {
            let mut below = 0u64;
            for (at, score) in scores.iter().enumerate() {
                below |= u64::from(score.key() < key) << at;
            }
            *word &= below;
        }
    })?;
    Ok(())
}
