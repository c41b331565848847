//! The lowest threshold the plain way: put all samples in order and try every candidate from the lowest up.

use crate::curve::Ascending;
use crate::error::Result;
use crate::order::{Key, Score};
use crate::run::Run;
use crate::samples::{Given, Lane, Pairs, Samples};
use crate::sort::{PIECE, sort_pairs};
use crate::tally::{Counts, Criterion, Group, lowest_that_meets};
use crate::threshold::Rule;
use std::ops::ControlFlow;

/// Groups that are ruled out together, where none of them can do.
const TOGETHER: usize = 1 << 10;

/// For each target, ascending, the lowest key from which on the samples, with those above them, reach it; and the counts
/// of these.
pub(crate) fn exhaust<X: Samples>(
    samples: &X,
    above: Counts,
    targets: &[impl Criterion],
    rule: Rule,
    run: &Run,
) -> Result<Vec<Option<Group<X::Lane>>>> {
    samples.validate(run)?;
    let found = by_sorting(samples, above, targets, rule, run)?;
    let lane = |(key, counts)| (X::Lane::of(key), counts);
    Ok(found.into_iter().map(|group| group.map(lane)).collect())
}

/// The same for samples known to be valid.
pub(crate) fn by_sorting<P: Pairs>(
    samples: &P,
    above: Counts,
    targets: &[impl Criterion],
    rule: Rule,
    run: &Run,
) -> Result<Vec<Option<Group<P::Key>>>> {
    let mut answers = Answers::new(targets);
    match rule {
        Rule::Set => {
            let mut block = Vec::with_capacity(TOGETHER + 1);
            Ascending::sorted(samples, run)?.groups(above, run, |key, from_here_up| {
                block.push((key, from_here_up));
                if block.len() <= TOGETHER {
                    return ControlFlow::Continue(());
                }
                let found = answers.offer_all(&block[..TOGETHER], from_here_up);
                block.drain(..TOGETHER);
                found
            })?;
            // Nothing is left to be met where the groups were not all needed.
            let _ = answers.offer_all(&block, above);
        }
        Rule::Index => {
            let (mut keys, mut flags) = (Vec::new(), Vec::new());
            for start in (0..samples.len()).step_by(PIECE) {
                run.check()?;
                let piece = start..samples.len().min(start + PIECE);
                keys.extend(piece.clone().map(|index| samples.get(index).0));
                flags.extend(piece.map(|index| samples.get(index).1));
            }
            let (keys, flags) = sort_pairs(keys, flags, |key| key, run)?;
            let correct = flags.iter().map(|&flag| usize::from(flag)).sum();
            let mut left = above
                + Counts {
                    accepted: keys.len(),
                    correct,
                };
            for (&key, &flag) in keys.iter().zip(&flags) {
                if answers.offer(key, left).is_break() {
                    break;
                }
                left = left
                    - Counts {
                        accepted: 1,
                        correct: usize::from(flag),
                    };
            }
        }
    }
    Ok(answers.found)
}

/// Few enough keys to count the samples of each: the groups without a sort.
pub(crate) fn by_counting<S: Score>(
    samples: &Given<S>,
    targets: &[impl Criterion],
    run: &Run,
) -> Result<Vec<Option<Group<S::Key>>>> {
    let groups = count_keys(samples, run)?;
    let mut left = groups
        .iter()
        .fold(Counts::default(), |sum, &group| sum + group);
    let mut answers = Answers::new(targets);
    for (index, &group) in groups
        .iter()
        .enumerate()
        .filter(|(_, group)| group.accepted > 0)
    {
        if answers.offer(S::Key::from_index(index), left).is_break() {
            break;
        }
        left = left - group;
    }
    Ok(answers.found)
}

/// The samples of every 16-bit key.
fn count_keys<S: Score>(samples: &Given<S>, run: &Run) -> Result<Vec<Counts>> {
    let pieces = samples
        .scores
        .chunks(PIECE)
        .zip(samples.correct.chunks(PIECE))
        .collect();
    // Both counts in one word, so that a sample costs one addition; 2^32 samples of one key would be too many.
    let tables = run.fold(
        pieces,
        || vec![Counts::default(); 1 << S::Key::BITS],
        |table, (scores, correct)| {
            let mut small = vec![0u64; 1 << S::Key::BITS];
            for (score, &flag) in scores.iter().zip(correct) {
                small[score.key().index()] += 1 + (u64::from(flag) << 32);
            }
            for (counts, sum) in table.iter_mut().zip(small) {
                let (accepted, correct) = (sum as u32 as usize, (sum >> 32) as usize);
                *counts += Counts { accepted, correct };
            }
        },
    )?;
    let add = |mut sum: Vec<Counts>, table: Vec<Counts>| {
        for (counts, more) in sum.iter_mut().zip(table) {
            *counts += more;
        }
        sum
    };
    Ok(tables.into_iter().reduce(add).unwrap_or_default())
}

/// Targets that are still to be met while candidates come in ascending order.
struct Answers<'a, K, C> {
    targets: &'a [C],
    met: usize,
    found: Vec<Option<Group<K>>>,
}

impl<'a, K: Key, C: Criterion> Answers<'a, K, C> {
    /// Targets ascending, the easiest first.
    fn new(targets: &'a [C]) -> Self {
        Self {
            targets,
            met: 0,
            found: vec![None; targets.len()],
        }
    }

    /// Ascending groups, and what is accepted above them.  Breaks when every target is met.
    fn offer_all(&mut self, groups: &[Group<K>], above: Counts) -> ControlFlow<()> {
        while let Some(&target) = self.targets.get(self.met) {
            let Some(found) = lowest_that_meets(groups, above, target) else {
                return ControlFlow::Continue(());
            };
            self.found[self.met] = Some(found);
            self.met += 1;
        }
        ControlFlow::Break(())
    }

    /// From `key` up so much is accepted.  Breaks when every target is met.
    fn offer(&mut self, key: K, counts: Counts) -> ControlFlow<()> {
        while let Some(&target) = self.targets.get(self.met) {
            if !target.is_met(counts) {
                return ControlFlow::Continue(());
            }
            self.found[self.met] = Some((key, counts));
            self.met += 1;
        }
        ControlFlow::Break(())
    }
}
