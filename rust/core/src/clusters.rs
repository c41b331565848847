//! Samples that come in groups and are alike within them, as the tokens of one sequence are.
//!
//! Groups are independent of one another, so a test bets on one after the other: with `Z = (alpha n - e) / most` for
//! `n` accepted samples of a group, `e` of them wrong, wealth is multiplied by `1 + stake Z`.  If the risk exceeds
//! alpha, no Z is above 0 on average, and wealth reaches `1 / delta` with probability delta at most (Ville).

use crate::binomial::SAFE;
use crate::error::{Error, Result};
use crate::guarantee::Claim;
use crate::ladder::Bucketed;
use crate::run::Run;
use crate::survivors::Survivors;

/// The share of the highest stake that is ever put in, so that no group can take everything.
const BOLDNESS: f64 = 0.9;

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
        let fits = self.of.len() == samples
            && self.most > 0
            && self.of.iter().all(|&group| (group as usize) < self.count);
        if fits { Ok(()) } else { Err(Error::NotGroups) }
    }
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

/// Whether the bets suffice at each of these thresholds, ascending.
pub(crate) fn bet_at_each<S: Bucketed>(
    samples: &Survivors<S>,
    thresholds: &[f64],
    clusters: Clusters,
    claim: Claim,
    run: &Run,
) -> Result<Vec<bool>> {
    clusters.require(samples.scores.len())?;
    // A threshold no score can reach comes last.
    let edges: Vec<S::Key> = thresholds
        .iter()
        .map_while(|&edge| S::at_least(edge))
        .collect();
    let mut between: Vec<Vec<(u32, u8)>> = vec![Vec::new(); edges.len()];
    for ((score, &flag), &group) in samples.scores.iter().zip(samples.correct).zip(clusters.of) {
        if let Some(place) = edges
            .partition_point(|&edge| edge <= score.key())
            .checked_sub(1)
        {
            between[place].push((group, flag));
        }
    }
    let mut tallies = vec![Tally::default(); clusters.count];
    let mut passes = vec![false; thresholds.len()];
    for (place, tokens) in between.into_iter().enumerate().rev() {
        run.check()?;
        for (group, flag) in tokens {
            tallies[group as usize].add(flag);
        }
        passes[place] = wealth_suffices(&tallies, claim, clusters.most);
    }
    Ok(passes)
}
