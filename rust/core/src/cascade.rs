//! Thresholds for several heads of which each only sees what no shallower one took.

use crate::budget::{Allowance, cheapest};
use crate::clusters::{Clusters, Tally, wealth_suffices};
use crate::error::{Error, Result};
use crate::guarantee::{Claim, require_level};
use crate::ladder::Ladder;
use crate::run::Run;
use crate::samples::Given;
use crate::survivors::{Survivors, count, everyone, take_from};
use crate::tally::{Counts, Target};
use crate::threshold::{Calibratable, Rule};
use crate::validate::{require_pairs, require_targets, require_valid};

/// Steps of the path of thresholds that is certified, from conservative to aggressive.
const STEPS: usize = 20;
/// A head enters the path when one half of the samples predicts this much more than the other half must show.
const IN_HAND: f64 = 10.0;

/// Scores and flags of several heads, shallowest first: a row each.
#[derive(Debug, Clone, Copy)]
pub struct Heads<'a, S> {
    pub(crate) scores: &'a [S],
    pub(crate) correct: &'a [u8],
    pub(crate) count: usize,
    pub(crate) samples: usize,
}

/// What is asked of a cascade.
#[derive(Debug, Clone, Copy)]
pub enum Goal<'a> {
    /// Every head accurate enough on all samples, as if it were alone.
    Marginal,
    /// Every head accurate enough on the samples that reach it.
    Sequential,
    /// The lowest cost, with at most this share of all samples wrong; a cost for every head and for the whole model.
    Budget(&'a [f64], f64),
}

/// Samples set apart to certify on, and the confidence.
#[derive(Debug, Clone, Copy)]
pub struct HoldOut<'a> {
    /// 1 where a sample belongs to the half that certifies, 0 where to the half that proposes.
    pub half: &'a [u8],
    /// How likely the certificate may be false.
    pub delta: f64,
    /// Groups within which samples are alike; both halves must hold whole ones.
    pub clusters: Option<Clusters<'a>>,
}

/// Thresholds, and what they do on the samples counted.
#[derive(Debug, Clone, PartialEq)]
pub struct Cascade {
    /// One a head; +inf where it never exits.
    pub thresholds: Vec<f64>,
    /// Samples each head takes of those that reach it.
    pub accepted: Vec<usize>,
    /// The correct ones among them.
    pub correct: Vec<usize>,
    /// Samples counted: all, or those of the certifying half.
    pub samples: usize,
    /// Whether any head ever exits.
    pub found: bool,
}

/// A threshold for each head as a key; None where it never exits.
pub(crate) type Keys<S> = Vec<Option<<S as crate::order::Score>::Key>>;

impl<'a, S: Calibratable> Heads<'a, S> {
    /// Rows of equal length, laid end to end.
    pub fn new(scores: &'a [S], correct: &'a [u8], count: usize) -> Result<Self> {
        require_pairs(scores, correct)?;
        if count == 0 || !scores.len().is_multiple_of(count) {
            return Err(Error::UnevenHeads {
                scores: scores.len(),
                heads: count,
            });
        }
        Ok(Self {
            scores,
            correct,
            count,
            samples: scores.len() / count,
        })
    }

    pub(crate) fn row(&self, head: usize) -> (&'a [S], &'a [u8]) {
        let part = head * self.samples..(head + 1) * self.samples;
        (&self.scores[part.clone()], &self.correct[part])
    }
}

/// Thresholds for all heads.
pub fn calibrate_cascade<S: Calibratable>(
    heads: &Heads<S>,
    eps: f64,
    goal: Goal,
    held_out: Option<HoldOut>,
    run: &Run,
) -> Result<Cascade> {
    require_targets(&[eps])?;
    let found = match held_out {
        None => plug_in(heads, eps, goal, run),
        Some(held_out) => certified(heads, eps, goal, held_out, run),
    };
    match found {
        // What is wrong with a sample is told by its place among all, scores before flags.
        Err(error @ (Error::NotFinite { .. } | Error::NotALabel { .. })) => {
            require_valid(heads.scores, heads.correct, Some(heads.samples), run).and(Err(error))
        }
        other => other,
    }
}

fn plug_in<S: Calibratable>(heads: &Heads<S>, eps: f64, goal: Goal, run: &Run) -> Result<Cascade> {
    let alive = everyone(heads.samples);
    let target = Target::new(eps);
    let (keys, outcome) = match goal {
        Goal::Marginal => {
            let alone = |head| {
                let (scores, correct) = heads.row(head);
                let found = S::lowest(Given { scores, correct }, &[target], Rule::Set, run)?;
                Ok(found[0].map(|(key, _)| key))
            };
            let keys = (0..heads.count).map(alone).collect::<Result<Keys<S>>>()?;
            let outcome = outcome(heads, &alive, &keys, run)?;
            (keys, outcome)
        }
        Goal::Sequential => sequential(heads, &alive, target, run)?,
        Goal::Budget(costs, share) => {
            let keys = budgeted(heads, &alive, eps, costs, share, run)?;
            let outcome = outcome(heads, &alive, &keys, run)?;
            (keys, outcome)
        }
    };
    Ok(Cascade::of::<S>(&keys, &outcome, heads.samples))
}

fn budgeted<S: Calibratable>(
    heads: &Heads<S>,
    alive: &[u64],
    eps: f64,
    costs: &[f64],
    share: f64,
    run: &Run,
) -> Result<Keys<S>> {
    let (start, _) = sequential(heads, alive, Target::new(eps), run)?;
    cheapest(heads, alive, &start, Allowance { costs, share }, run)
}

impl Cascade {
    fn of<S: Calibratable>(keys: &Keys<S>, outcome: &[Counts], samples: usize) -> Self {
        let threshold =
            |key: &Option<S::Key>| key.map_or(f64::INFINITY, |key| S::from_key(key).value());
        Self {
            thresholds: keys.iter().map(threshold).collect(),
            accepted: outcome.iter().map(|counts| counts.accepted).collect(),
            correct: outcome.iter().map(|counts| counts.correct).collect(),
            samples,
            found: keys.iter().any(Option::is_some),
        }
    }
}

/// The lowest threshold of each head on the samples the heads before it left, and what it takes of them.
fn sequential<S: Calibratable>(
    heads: &Heads<S>,
    alive: &[u64],
    target: Target,
    run: &Run,
) -> Result<(Keys<S>, Vec<Counts>)> {
    let mut alive = alive.to_vec();
    let mut left = count(&alive, run);
    let (mut keys, mut outcome) = (Vec::new(), Vec::new());
    for head in 0..heads.count {
        let (scores, correct) = heads.row(head);
        let given = Given { scores, correct };
        let found = if left == heads.samples {
            S::lowest(given, &[target], Rule::Set, run)?[0]
        } else {
            S::lowest_left(given, &alive, target, run)?
        };
        let counts = found.map_or(Counts::default(), |(_, counts)| counts);
        left -= counts.accepted;
        outcome.push(counts);
        keys.push(found.map(|(key, _)| key));
        if head + 1 < heads.count {
            take_from(&mut alive, scores, correct, keys[head], run)?;
        }
    }
    Ok((keys, outcome))
}

/// What each head takes of the samples that reach it.
fn outcome<S: Calibratable>(
    heads: &Heads<S>,
    alive: &[u64],
    keys: &Keys<S>,
    run: &Run,
) -> Result<Vec<Counts>> {
    let mut alive = alive.to_vec();
    keys.iter()
        .enumerate()
        .map(|(head, &key)| {
            let (scores, correct) = heads.row(head);
            take_from(&mut alive, scores, correct, key, run)
        })
        .collect()
}

/// Propose a path of ever lower thresholds on one half and walk it on the other as long as it holds there.
///
/// The path is fixed before the second half is looked at, so each step may be tested at the full delta and the walk
/// ends at the first that fails.  A step fails if any of its heads does, and is wrongly passed with probability delta
/// at most, however many heads there are: one head that misses is enough for the step to be false.
fn certified<S: Calibratable>(
    heads: &Heads<S>,
    eps: f64,
    goal: Goal,
    held_out: HoldOut,
    run: &Run,
) -> Result<Cascade> {
    require_level(held_out.delta)?;
    if held_out.half.len() != heads.samples {
        return Err(Error::NotGroups);
    }
    if let Some(clusters) = held_out.clusters {
        clusters.require(heads.samples)?;
    }
    require_valid(heads.scores, heads.correct, Some(heads.samples), run)?;
    let (proposing, certifying) = (mask(held_out.half, 0), mask(held_out.half, 1));
    let trial = Trial {
        heads,
        held_out,
        run,
    };
    let mut last: Keys<S> = vec![None; heads.count];
    let mut entered = vec![false; heads.count];
    for step in 1..=STEPS {
        let share = step as f64 / STEPS as f64;
        let (keys, holds) = match goal {
            Goal::Budget(costs, allowed) => {
                let target = 1.0 - (1.0 - eps) * share;
                let keys = budgeted(heads, &proposing, target, costs, allowed * share, run)?;
                let claim = Claim {
                    alpha: allowed,
                    delta: held_out.delta,
                };
                let holds = trial.total_holds(&keys, &certifying, claim)?;
                (keys, holds)
            }
            Goal::Sequential | Goal::Marginal => {
                let claim = Claim::new(eps, held_out.delta);
                let target = Target::new(1.0 - claim.alpha * share);
                let keys = trial.propose(&proposing, &certifying, target, claim, &mut entered)?;
                if keys.iter().all(Option::is_none) {
                    continue;
                }
                let holds = trial.heads_hold(&keys, &certifying, claim)?;
                (keys, holds)
            }
        };
        if !holds {
            break;
        }
        last = keys;
    }
    let outcome = outcome(heads, &certifying, &last, run)?;
    Ok(Cascade::of::<S>(&last, &outcome, count(&certifying, run)))
}

struct Trial<'a, S> {
    heads: &'a Heads<'a, S>,
    held_out: HoldOut<'a>,
    run: &'a Run<'a>,
}

impl<S: Calibratable> Trial<'_, S> {
    /// Sequential thresholds for a target accuracy, of the heads that promise to hold on the other half.
    fn propose(
        &self,
        proposing: &[u64],
        certifying: &[u64],
        target: Target,
        claim: Claim,
        entered: &mut [bool],
    ) -> Result<Keys<S>> {
        let mut alive = proposing.to_vec();
        let mut keys = Vec::with_capacity(self.heads.count);
        let claim = Claim {
            delta: claim.delta / IN_HAND,
            ..claim
        };
        for (head, entered) in entered.iter_mut().enumerate() {
            let (scores, correct) = self.heads.row(head);
            let left = Survivors {
                scores,
                correct,
                alive: Some(&alive),
            };
            let found = Ladder::count(left, self.run)?.lowest(target)?;
            if let (Some((key, counts)), false) = (found, *entered) {
                *entered = match self.held_out.clusters {
                    None => claim.holds(scaled(
                        counts,
                        count(proposing, self.run),
                        count(certifying, self.run),
                    )),
                    Some(clusters) => self.bet(head, key, &alive, clusters, claim),
                };
            }
            let key = found.filter(|_| *entered).map(|(key, _)| key);
            if let Some(key) = key {
                take_from(&mut alive, scores, correct, Some(key), self.run)?;
            }
            keys.push(key);
        }
        Ok(keys)
    }

    /// Whether every head that exits is accurate enough on the samples that reach it.
    fn heads_hold(&self, keys: &Keys<S>, certifying: &[u64], claim: Claim) -> Result<bool> {
        let Some(clusters) = self.held_out.clusters else {
            let counts = outcome(self.heads, certifying, keys, self.run)?;
            return Ok(keys
                .iter()
                .zip(counts)
                .all(|(key, counts)| key.is_none() || claim.holds(counts)));
        };
        let mut alive = certifying.to_vec();
        for (head, key) in keys.iter().enumerate() {
            let Some(key) = *key else { continue };
            if !self.bet(head, key, &alive, clusters, claim) {
                return Ok(false);
            }
            let (scores, correct) = self.heads.row(head);
            take_from(&mut alive, scores, correct, Some(key), self.run)?;
        }
        Ok(true)
    }

    /// Whether few enough of all samples leave early and wrong.
    fn total_holds(&self, keys: &Keys<S>, certifying: &[u64], claim: Claim) -> Result<bool> {
        let Some(clusters) = self.held_out.clusters else {
            let counts = outcome(self.heads, certifying, keys, self.run)?;
            let wrong: usize = counts
                .iter()
                .map(|counts| counts.accepted - counts.correct)
                .sum();
            let accepted = count(certifying, self.run);
            return Ok(claim.holds(Counts {
                accepted,
                correct: accepted - wrong,
            }));
        };
        let mut tallies = vec![Tally::default(); clusters.count];
        for sample in (0..self.heads.samples).filter(|&sample| is_alive(certifying, sample)) {
            let exit = (0..self.heads.count).find(|&head| {
                keys[head].is_some_and(|key| self.heads.row(head).0[sample].key() >= key)
            });
            let flag = exit.map_or(1, |head| self.heads.row(head).1[sample]);
            tallies[clusters.of[sample] as usize].add(flag);
        }
        Ok(wealth_suffices(&tallies, claim, clusters.most))
    }

    /// Whether bets on the groups refute a higher risk of what a head takes.
    fn bet(
        &self,
        head: usize,
        key: S::Key,
        alive: &[u64],
        clusters: Clusters,
        claim: Claim,
    ) -> bool {
        let (scores, correct) = self.heads.row(head);
        let mut tallies = vec![Tally::default(); clusters.count];
        for (sample, score) in scores.iter().enumerate() {
            if is_alive(alive, sample) && score.key() >= key {
                tallies[clusters.of[sample] as usize].add(correct[sample]);
            }
        }
        wealth_suffices(&tallies, claim, clusters.most)
    }
}

/// The counts another number of samples should give, rounded to the disadvantage.
fn scaled(counts: Counts, from: usize, to: usize) -> Counts {
    let accepted = (counts.accepted as u128 * to as u128 / from.max(1) as u128) as usize;
    let wrong = (counts.accepted - counts.correct) as u128 * to as u128;
    let wrong = wrong.div_ceil(from.max(1) as u128) as usize;
    Counts {
        accepted,
        correct: accepted.saturating_sub(wrong),
    }
}

/// The samples of one half.
fn mask(half: &[u8], which: u8) -> Vec<u64> {
    let word = |flags: &[u8]| {
        flags
            .iter()
            .enumerate()
            .fold(0, |word, (at, &flag)| word | u64::from(flag == which) << at)
    };
    half.chunks(64).map(word).collect()
}

fn is_alive(alive: &[u64], sample: usize) -> bool {
    alive[sample / 64] >> (sample % 64) & 1 == 1
}
