//! The risk-coverage curve: what is accepted, and what of it is correct, at every distinct score.

use crate::error::Result;
use crate::order::{Key, Score};
use crate::run::Run;
use crate::samples::{Given, Pairs};
use crate::sort::{PIECE, sort_keys};
use crate::tally::Counts;
use crate::validate::{require_pairs, require_valid};
use std::ops::ControlFlow;

/// One entry for every distinct score, ascending.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Curve {
    /// The distinct scores.
    pub thresholds: Vec<f64>,
    /// How many samples score at least the threshold.
    pub accepted: Vec<i64>,
    /// How many of those are correct.
    pub correct: Vec<i64>,
}

/// The curve of all samples.
pub fn threshold_curve<S: Score>(scores: &[S], correct: &[u8], run: &Run) -> Result<Curve> {
    require_pairs(scores, correct)?;
    require_valid(scores, correct, None, run)?;
    let mut curve = Curve::default();
    Ascending::sorted(&Given { scores, correct }, run)?.groups(
        Counts::default(),
        run,
        |key, from_here_up| {
            curve.thresholds.push(S::from_key(key).value());
            curve.accepted.push(from_here_up.accepted as i64);
            curve.correct.push(from_here_up.correct as i64);
            ControlFlow::Continue(())
        },
    )?;
    Ok(curve)
}

/// Samples in ascending order of their keys, where only counts matter.
pub(crate) enum Ascending<K> {
    /// Each key with its flag in its lowest bit, which positive scores leave room for.
    Together(Vec<K>),
    /// The keys of the correct and of the wrong samples: to sort bare keys twice moves less memory than to sort
    /// keys with a flag attached.
    Apart { correct: Vec<K>, wrong: Vec<K> },
}

impl<K: Key> Ascending<K> {
    /// Sort the samples.
    pub fn sorted(samples: &impl Pairs<Key = K>, run: &Run) -> Result<Self> {
        let mut together = vec![K::default(); samples.len()];
        let pieces = together.chunks_mut(PIECE).enumerate().collect();
        let positive = run.map(pieces, |(piece, keys): (usize, &mut [K])| {
            let mut positive = true;
            for (offset, together) in keys.iter_mut().enumerate() {
                let (key, flag) = samples.get(piece * PIECE + offset);
                positive &= key.is_positive();
                *together = key.with_flag(flag);
            }
            positive
        })?;
        if positive.contains(&false) {
            drop(together);
            return Self::sorted_apart(samples, run);
        }
        Ok(Self::Together(sort_keys(together, run)?))
    }

    fn sorted_apart(samples: &impl Pairs<Key = K>, run: &Run) -> Result<Self> {
        let (mut correct, mut wrong) = (Vec::new(), Vec::new());
        for start in (0..samples.len()).step_by(PIECE) {
            run.check()?;
            for index in start..samples.len().min(start + PIECE) {
                let (key, flag) = samples.get(index);
                if flag == 0 {
                    wrong.push(key)
                } else {
                    correct.push(key)
                }
            }
        }
        Ok(Self::Apart {
            correct: sort_keys(correct, run)?,
            wrong: sort_keys(wrong, run)?,
        })
    }

    /// Visit the groups of equal keys, ascending, until told to stop: the key, and what is accepted from it up,
    /// with `above` more above all of them.
    pub fn groups(
        &self,
        above: Counts,
        run: &Run,
        visit: impl FnMut(K, Counts) -> ControlFlow<()>,
    ) -> Result<()> {
        match self {
            Self::Together(keys) => groups_together(keys, above, run, visit),
            Self::Apart { correct, wrong } => groups_apart(correct, wrong, above, run, visit),
        }
    }
}

fn groups_together<K: Key>(
    keys: &[K],
    above: Counts,
    run: &Run,
    mut visit: impl FnMut(K, Counts) -> ControlFlow<()>,
) -> Result<()> {
    let flags = keys.iter().map(|key| usize::from(key.apart().1));
    let mut left = above
        + Counts {
            accepted: keys.len(),
            correct: flags.sum(),
        };
    let mut last = None;
    for piece in keys.chunks(PIECE) {
        run.check()?;
        for &together in piece {
            let (key, flag) = together.apart();
            if last != Some(key) && visit(key, left).is_break() {
                return Ok(());
            }
            last = Some(key);
            left = left
                - Counts {
                    accepted: 1,
                    correct: usize::from(flag),
                };
        }
    }
    Ok(())
}

fn groups_apart<K: Key>(
    mut right: &[K],
    mut wrong: &[K],
    above: Counts,
    run: &Run,
    mut visit: impl FnMut(K, Counts) -> ControlFlow<()>,
) -> Result<()> {
    let all = Counts {
        accepted: right.len() + wrong.len(),
        correct: right.len(),
    };
    let mut left = above + all;
    let mut visited = 0;
    while let Some(key) = right
        .first()
        .into_iter()
        .chain(wrong.first())
        .min()
        .copied()
    {
        if visited % PIECE == 0 {
            run.check()?;
        }
        visited += 1;
        let correct = take_equal(&mut right, key);
        let group = Counts {
            accepted: correct + take_equal(&mut wrong, key),
            correct,
        };
        if visit(key, left).is_break() {
            return Ok(());
        }
        left = left - group;
    }
    Ok(())
}

/// Drop the keys equal to `key` from the front, and count them.
fn take_equal<K: Key>(keys: &mut &[K], key: K) -> usize {
    let equal = keys.iter().take_while(|&&other| other == key).count();
    *keys = &keys[equal..];
    equal
}
