//! Samples that come in groups and are alike within them, as the tokens of one sequence are.
//!
//! Groups are independent of one another, so a test bets on one after the other: with `Z = (alpha n - e) / most` for
//! `n` accepted samples of a group, `e` of them wrong, wealth is multiplied by `1 + stake Z`.  If the risk exceeds
//! alpha, no Z is above 0 on average, and wealth reaches `1 / delta` with probability delta at most (Ville).

use crate::binomial::SAFE;
use crate::error::{Error, Result};
use crate::guarantee::Claim;
use crate::ladder::{Bucketed, Placed, Steps};
use crate::order::{Key, Score};
use crate::run::Run;
use crate::survivors::Survivors;
use crate::tally::Counts;
use crate::validate::require_valid;

/// The share of the highest stake that is ever put in, so that no group can take everything.
const BOLDNESS: f64 = 0.9;
/// Samples parted together.
const PIECE: usize = 1 << 16;

/// The group of every sample.
#[derive(Debug, Clone, Copy)]
pub struct Clusters<'a> {
    /// Group numbers below `count`, one a sample.
    pub of: &'a [u32],
    /// How many groups there are.
    pub count: usize,
    /// The most samples one group can have, fixed beforehand.
    pub most: u32,
}

/// Accepted and wrong samples of a group.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct Tally {
    pub accepted: u32,
    pub wrong: u32,
}

impl Tally {
    pub fn add(&mut self, flag: u8) {
        self.accepted += 1;
        self.wrong += u32::from(flag == 0);
    }
}

impl Clusters<'_> {
    /// A group for every sample, each one known.
    pub(crate) fn require(&self, samples: usize) -> Result<()> {
        self.suit(samples, highest(self.of))
    }

    fn suit(&self, samples: usize, highest: u32) -> Result<()> {
        if self.of.len() == samples && self.most > 0 && (highest as usize) < self.count {
            Ok(())
        } else {
            Err(Error::NotGroups)
        }
    }
}

fn highest(groups: &[u32]) -> u32 {
    groups.iter().fold(0, |most, &group| most.max(group))
}

/// Whether bets on the groups, in their order, refute a risk above alpha.
///
/// The stake is the mean of the earlier Z over the mean of their squares, as if there had been one Z of alpha / 2
/// before the first; whatever it is, the test is valid.
pub(crate) fn wealth_suffices(groups: &[Tally], claim: Claim, most: u32) -> bool {
    let Claim { alpha, delta } = claim;
    if alpha >= 1.0 {
        return groups.iter().any(|group| group.accepted > 0);
    }
    if alpha <= 0.0 {
        return false;
    }
    let highest = BOLDNESS / (1.0 - alpha);
    let (mut sum, mut squares) = (alpha / 2.0, alpha / 2.0 * (alpha / 2.0));
    let mut wealth = 1.0f64;
    for group in groups.iter().filter(|group| group.accepted > 0) {
        let z = (alpha * f64::from(group.accepted) - f64::from(group.wrong)) / f64::from(most);
        wealth *= 1.0 + (sum / squares).clamp(0.0, highest) * z;
        if wealth * (1.0 - SAFE) * delta >= 1.0 {
            return true;
        }
        sum += z;
        squares += z * z;
    }
    false
}

/// Samples parted by the thresholds they lie between, to bet at one threshold after another.
pub(crate) struct Bets<'a, S: Score> {
    clusters: Clusters<'a>,
    parts: Vec<Part<S::Key>>,
    tallies: Vec<Tally>,
    /// The threshold at which the tallies stand, and where they start: one past the last that a score can reach.
    place: usize,
    end: usize,
}

/// The groups of some samples, by threshold and then by flag.
struct Part<K> {
    groups: Vec<u32>,
    starts: Vec<u32>,
    highest: u32,
    /// The lowest and the highest score.
    range: (K, K),
    valid: bool,
}

impl<'a, S: Bucketed> Bets<'a, S> {
    /// For thresholds in ascending order.
    pub fn place(
        samples: &Survivors<S>,
        thresholds: &[f64],
        clusters: Clusters<'a>,
        run: &Run,
    ) -> Result<Self> {
        clusters.suit(samples.scores.len(), 0)?;
        let steps = Steps::<S>::at(thresholds);
        let pieces = samples
            .scores
            .chunks(PIECE)
            .zip(samples.correct.chunks(PIECE))
            .zip(clusters.of.chunks(PIECE))
            .collect();
        let isa = run.instruction_set();
        let parts = run.map(pieces, |((scores, correct), groups)| {
            let placed = steps.place(scores, correct, isa);
            Part::of(&placed, 2 * (steps.count() + 1), groups)
        })?;
        if parts.iter().any(|part| !part.valid) {
            require_valid(samples.scores, samples.correct, None, run)?;
        }
        let highest = parts.iter().map(|part| part.highest).max();
        clusters.suit(samples.scores.len(), highest.unwrap_or(0))?;
        Ok(Self {
            clusters,
            parts,
            tallies: vec![Tally::default(); clusters.count],
            place: steps.count(),
            end: steps.count(),
        })
    }

    /// Whether all scores are at least the one number and below the other.
    pub fn lie_within(&self, low: f64, beyond: f64) -> bool {
        let (low, beyond) = (S::at_least(low), S::at_least(beyond));
        self.parts.iter().all(|part| {
            low.is_some_and(|low| part.range.0 >= low)
                && beyond.is_none_or(|beyond| part.range.1 < beyond)
        })
    }

    /// What a threshold accepts.
    pub fn counts(&self, place: usize) -> Counts {
        let from_here_up = 2 * (place + 1);
        let cells = self.parts.iter().flat_map(|part| {
            let ends = part.starts.windows(2).enumerate();
            ends.skip(from_here_up)
        });
        cells.fold(Counts::default(), |sum, (cell, ends)| {
            let accepted = (ends[1] - ends[0]) as usize;
            sum + Counts {
                accepted,
                correct: accepted * (cell % 2),
            }
        })
    }

    /// Whether bets on what a threshold accepts refute a risk above alpha.
    pub fn suffice(&mut self, place: usize, claim: Claim) -> bool {
        while self.place > place {
            self.place -= 1;
            self.tally(1);
        }
        while self.place < place.min(self.end) {
            self.tally(-1);
            self.place += 1;
        }
        wealth_suffices(&self.tallies, claim, self.clusters.most)
    }

    /// Count the samples from the present threshold up to the next so many times.
    fn tally(&mut self, times: i32) {
        for part in &self.parts {
            for wrong in [true, false] {
                // Below the first threshold is a place of its own.
                let cell = 2 * (self.place + 1) + usize::from(!wrong);
                let stretch = part.starts[cell] as usize..part.starts[cell + 1] as usize;
                for &group in &part.groups[stretch] {
                    let tally = &mut self.tallies[group as usize];
                    tally.accepted = tally.accepted.wrapping_add_signed(times);
                    if wrong {
                        tally.wrong = tally.wrong.wrapping_add_signed(times);
                    }
                }
            }
        }
    }
}

impl<K: Key> Part<K> {
    fn of(placed: &Placed<K>, count: usize, groups: &[u32]) -> Self {
        let cells = &placed.cells;
        let mut starts = vec![0; count + 1];
        for &cell in cells {
            starts[cell as usize + 1] += 1;
        }
        for cell in 1..=count {
            starts[cell] += starts[cell - 1];
        }
        let mut next = starts.clone();
        let mut parted = vec![0; groups.len()];
        for (&cell, &group) in cells.iter().zip(groups) {
            let slot = &mut next[cell as usize];
            parted[*slot as usize] = group;
            *slot += 1;
        }
        Self {
            groups: parted,
            starts,
            highest: highest(groups),
            range: placed.range,
            valid: placed.valid,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CLAIM: Claim = Claim {
        alpha: 0.5,
        delta: 0.05,
    };

    fn group(accepted: u32, wrong: u32) -> Tally {
        Tally { accepted, wrong }
    }

    #[test]
    fn groups_must_be_known() {
        let clusters = |count, most| Clusters {
            of: &[0, 2, 1],
            count,
            most,
        };
        assert_eq!(clusters(3, 1).require(3), Ok(()));
        assert_eq!(clusters(2, 1).require(3), Err(Error::NotGroups));
        assert_eq!(clusters(3, 0).require(3), Err(Error::NotGroups));
        assert_eq!(clusters(3, 1).require(2), Err(Error::NotGroups));
    }

    #[test]
    fn what_accepts_nothing_is_never_certified() {
        let claim = Claim {
            alpha: 1.0,
            ..CLAIM
        };
        assert!(!wealth_suffices(&[group(0, 0)], claim, 1));
        assert!(wealth_suffices(&[group(0, 0), group(1, 1)], claim, 1));
    }

    #[test]
    fn wealth_that_is_just_enough_is_not() {
        // One bet at the highest stake, 0.9 / 0.5, on a Z of 1 / 2.
        let wealth = 1.9;
        let certified = |delta| wealth_suffices(&[group(1, 0)], Claim { delta, ..CLAIM }, 1);
        assert!(!certified(1.0 / wealth));
        assert!(certified(1.0 / wealth * (1.0 + 1e-8)));
    }

    #[test]
    fn bets_may_go_up_and_down() {
        let noise = |i: usize, m: usize| i.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40 & (m - 1);
        let samples = 3 * PIECE / 2;
        let scores: Vec<f32> = (0..samples).map(|i| noise(i, 64) as f32).collect();
        let correct: Vec<u8> = (0..samples).map(|i| noise(i + 7, 2) as u8).collect();
        let of: Vec<u32> = (0..samples).map(|i| noise(i / 3, 128) as u32).collect();
        let clusters = Clusters {
            of: &of,
            count: 128,
            most: samples as u32,
        };
        let thresholds = [3.0, 3.5, 17.0, 40.0, 63.0, 64.0, 1e9];
        let (samples, run) = (Survivors::all(&scores, &correct), Run::on(2));
        let place = || Bets::place(&samples, &thresholds, clusters, &run).unwrap();
        let mut bets = place();
        for at in [4, 1, 0, 3, 2, 6, 5, 0, 6] {
            bets.suffice(at, CLAIM);
            let mut expected = vec![Tally::default(); 128];
            for ((&score, &flag), &group) in scores.iter().zip(&correct).zip(&of) {
                if f64::from(score) >= thresholds[at] {
                    expected[group as usize].add(flag);
                }
            }
            assert_eq!(bets.tallies, expected, "{at}");
            let sum = |of: fn(&Tally) -> u32| expected.iter().map(|t| of(t) as usize).sum();
            let counts = bets.counts(at);
            let accepted: usize = sum(|tally| tally.accepted);
            assert_eq!(counts.accepted, accepted);
            let wrong: usize = sum(|tally| tally.wrong);
            assert_eq!(accepted - counts.correct, wrong);
        }
        assert!(place().lie_within(0.0, 64.0));
        assert!(!place().lie_within(0.0, 63.0) && !place().lie_within(0.5, 64.0));
    }
}
