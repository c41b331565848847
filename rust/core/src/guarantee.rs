//! Thresholds with a finite-sample promise: at confidence 1 - delta, what they accept is accurate enough.
//!
//! Every method asks the same question of counts it may trust, and differs in which thresholds it may ask about:
//! see `docs/guarantees.md`.

use crate::binomial::{evidence_suffices, p_value_within, upper_bound};
use crate::clusters::{Bets, Clusters};
use crate::error::{Error, Result};
use crate::ladder::{Bucketed, Ladder, of_rank};
use crate::order::Key;
use crate::run::Run;
use crate::samples::Given;
use crate::survivors::Survivors;
use crate::tally::{Counts, Criterion};
use crate::threshold::Calibratable;
use crate::validate::{require_pairs, require_targets};

/// How a threshold is certified.
#[derive(Debug, Clone, Copy)]
pub enum Certification<'a> {
    /// Evidence that may be read at every threshold: at all scores, or at given thresholds, ascending.
    Evidence(Option<&'a [f64]>),
    /// Thresholds fixed beforehand, walked downwards.
    FixedSequence(Walk<'a>),
    /// The same with samples that are alike within their groups.
    Betting(Walk<'a>, Clusters<'a>),
    /// Ranks fixed beforehand, counted from the highest score, ascending, each below the number of samples.
    Bonferroni(&'a [usize]),
    /// Bisection over ranks (Geifman and El-Yaniv 2017).
    Sgr,
}

/// Thresholds to walk down.
#[derive(Debug, Clone, Copy)]
pub struct Walk<'a> {
    /// Ascending.
    pub thresholds: &'a [f64],
    /// Indices to start from, each at its share of delta.
    pub starts: &'a [usize],
    /// Whether they suit scores from 0 to 1 only.
    pub unit: bool,
}

/// A threshold and what is promised of it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Certificate {
    /// The lowest threshold that is certified; +inf if none is.
    pub threshold: f64,
    /// Samples it accepts.
    pub accepted: usize,
    /// The correct ones among them.
    pub correct: usize,
    /// What the accuracy is at least, at confidence 1 - delta; NaN if nothing is certified.
    pub bound: f64,
}

/// The question whether a risk is at most `alpha`, asked at level `delta`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Claim {
    pub alpha: f64,
    pub delta: f64,
}

impl Claim {
    /// The risk that remains below `eps`, never rounded up.
    pub fn new(eps: f64, delta: f64) -> Self {
        let alpha = 1.0 - eps;
        // For eps below 1/2 the difference is rounded; its own difference from 1 is not.
        let alpha = if 1.0 - alpha < eps {
            alpha.next_down()
        } else {
            alpha
        };
        Self { alpha, delta }
    }

    /// The same asked `times` times.
    pub fn shared(self, times: usize) -> Self {
        Self {
            delta: self.delta / times as f64,
            ..self
        }
    }

    /// Whether the exact binomial test refutes a higher risk.
    pub fn holds(self, counts: Counts) -> bool {
        let (n, errors) = (
            counts.accepted as u64,
            (counts.accepted - counts.correct) as u64,
        );
        n > 0 && (self.alpha >= 1.0 || p_value_within(errors, n, self.alpha, self.delta))
    }

    fn is_evident(self, counts: Counts) -> bool {
        let (n, errors) = (
            counts.accepted as u64,
            (counts.accepted - counts.correct) as u64,
        );
        n > 0 && (self.alpha >= 1.0 || evidence_suffices(errors, n, self.alpha, self.delta))
    }
}

/// That there is evidence for a claim.
#[derive(Clone, Copy)]
struct Evidence(Claim);

impl Criterion for Evidence {
    fn is_met(self, counts: Counts) -> bool {
        self.0.is_evident(counts)
    }

    /// By Laplace's method evidence is `exp(z^2 / 2)` of the lead in standard errors z, times the density of the risks
    /// it averages over at alpha, times the width of the likelihood.
    fn correct_among(self, accepted: f64) -> f64 {
        let Claim { alpha, delta } = self.0;
        if alpha <= 0.0 || alpha >= 1.0 {
            return (1.0 - alpha) * accepted;
        }
        let b = (1.0 - alpha) / alpha;
        let left = (b * (-alpha).ln_1p()).exp();
        let density = b * left / (1.0 - alpha) / (1.0 - left);
        let width = (std::f64::consts::TAU * alpha * (1.0 - alpha) / accepted).sqrt();
        let z = (-2.0 * (delta * density * width).ln()).max(0.0).sqrt();
        (1.0 - alpha) * accepted + z * (accepted * alpha * (1.0 - alpha)).sqrt()
    }

    fn accuracy(self) -> f64 {
        1.0 - self.0.alpha
    }
}

/// Certify a threshold for the accuracy `eps` at confidence `1 - delta`.
pub fn certify<S: Calibratable>(
    scores: &[S],
    correct: &[u8],
    eps: f64,
    delta: f64,
    method: Certification,
    run: &Run,
) -> Result<Certificate> {
    require_pairs(scores, correct)?;
    require_targets(&[eps])?;
    require_level(delta)?;
    let claim = Claim::new(eps, delta);
    let samples = Survivors::all(scores, correct);
    let ladder = || Ladder::count(samples, run);
    let found = match method {
        Certification::Evidence(None) => {
            let given = Given { scores, correct };
            S::lowest_that_meets(given, Evidence(claim), run)?
                .map(|(key, counts)| (S::from_key(key).value(), counts, eps))
        }
        Certification::Evidence(Some(grid)) => {
            let counts = ladder()?.at(grid)?;
            let place = counts.iter().position(|&counts| claim.is_evident(counts));
            place.map(|place| (grid[place], counts[place], eps))
        }
        Certification::FixedSequence(Walk {
            thresholds: grid,
            starts,
            unit,
        }) => {
            let ladder = ladder()?;
            let counts = ladder.at(&[0.0, beyond_unit()])?;
            let is_within = counts[0] == ladder.total() && counts[1].accepted == 0;
            require_unit(unit, is_within)?;
            let counts = ladder.at(grid)?;
            let claim = claim.shared(starts.len());
            let place = walk(starts, |place| Ok(claim.holds(counts[place])))?;
            place.map(|place| (grid[place], counts[place], eps))
        }
        Certification::Betting(
            Walk {
                thresholds: grid,
                starts,
                unit,
            },
            clusters,
        ) => {
            let mut bets = Bets::place(&samples, grid, clusters, run)?;
            require_unit(unit, bets.lie_within(0.0, beyond_unit()))?;
            let claim = claim.shared(starts.len());
            let place = walk(starts, |place| {
                run.check()?;
                Ok(bets.suffice(place, claim))
            })?;
            place.map(|place| (grid[place], bets.counts(place), eps))
        }
        Certification::Bonferroni(ranks) => bonferroni(&ladder()?, ranks, claim)?,
        Certification::Sgr => sgr(&ladder()?, claim)?,
    };
    let nothing = (f64::INFINITY, Counts::default(), f64::NAN);
    let (threshold, counts, bound) = found.unwrap_or(nothing);
    Ok(Certificate {
        threshold,
        accepted: counts.accepted,
        correct: counts.correct,
        bound,
    })
}

type Found = Option<(f64, Counts, f64)>;

/// A confidence is a probability that leaves something open.
pub(crate) fn require_level(delta: f64) -> Result<()> {
    if delta > 0.0 && delta < 1.0 {
        Ok(())
    } else {
        Err(Error::NotALevel { value: delta })
    }
}

/// Thresholds from 0 to 1 are no good for other scores.
fn require_unit(unit: bool, are_within: bool) -> Result<()> {
    if are_within || !unit {
        Ok(())
    } else {
        Err(Error::OffLattice)
    }
}

/// What float32 can tell from 1.
fn beyond_unit() -> f64 {
    f64::from(1.0f32.next_up())
}

/// The lowest place that a walk down from one of the starts reaches before its first failure.
fn walk(starts: &[usize], mut passes: impl FnMut(usize) -> Result<bool>) -> Result<Option<usize>> {
    let mut starts = starts.to_vec();
    starts.sort_unstable();
    for start in starts {
        // A walk from above that gets here goes on as this one, one that does not stops higher.
        if passes(start)? {
            let mut lowest = start;
            while lowest > 0 && passes(lowest - 1)? {
                lowest -= 1;
            }
            return Ok(Some(lowest));
        }
    }
    Ok(None)
}

/// At ranks fixed beforehand, accept what scores higher than the rank after; every rank at its share of delta.
fn bonferroni<S: Bucketed>(ladder: &Ladder<S>, ranks: &[usize], claim: Claim) -> Result<Found> {
    let claim = claim.shared(ranks.len());
    let beyond: Vec<usize> = ranks.iter().map(|rank| rank + 1).collect();
    let found = ladder.lowest_above(&beyond, |counts| claim.holds(counts))?;
    Ok(found.map(|(key, counts)| {
        // What scores strictly above a boundary is what the next key up accepts.
        let next = S::from_key(S::Key::from_index(key.index() + 1));
        (next.value() + 0.0, counts, bound(counts, claim.delta))
    }))
}

/// Bisect over ranks as if risk rose with coverage, every step at its share of delta.
fn sgr<S: Bucketed>(ladder: &Ladder<S>, claim: Claim) -> Result<Found> {
    let n = ladder.total().accepted;
    let steps = n.next_power_of_two().trailing_zeros() as usize;
    if steps == 0 {
        return Ok(None);
    }
    let claim = claim.shared(steps);
    // Places in ascending order, as in the paper: from place z on, the n - z + 1 highest are accepted.
    let (mut low, mut high, mut last) = (1, n, None);
    let mut near = None;
    for _ in 0..steps {
        let middle = (low + high).div_ceil(2);
        let rank = n - middle + 1;
        let (most, least) = ladder.around_rank(rank);
        // Few buckets are wide enough to leave it open.
        let passes = claim.holds(most.best_case(least))
            && (claim.holds(worst_of(most, least)) || {
                // All ranks that are still in question, once they are few: the steps that follow stay among them.
                if near.is_none() {
                    near = ladder.stretch(n - high + 1, n - low + 1)?;
                }
                match &near {
                    Some(groups) => claim.holds(of_rank(groups, rank).1),
                    None => claim.holds(ladder.ranks(&[rank])?[0].1),
                }
            });
        if passes {
            high = middle;
            last = Some(rank);
        } else {
            low = middle;
        }
    }
    let Some(rank) = last else { return Ok(None) };
    let (key, counts) = ladder.ranks(&[rank])?[0];
    Ok(Some((
        S::from_key(key).value(),
        counts,
        bound(counts, claim.delta),
    )))
}

/// The worst a threshold between two others can do: all wrong samples in between come first.
fn worst_of(low: Counts, high: Counts) -> Counts {
    let inside = low - high;
    Counts {
        accepted: high.accepted + inside.accepted - inside.correct,
        correct: high.correct,
    }
}

fn bound(counts: Counts, delta: f64) -> f64 {
    let (n, errors) = (
        counts.accepted as u64,
        (counts.accepted - counts.correct) as u64,
    );
    // The difference is rounded; one step down is on the safe side.
    (1.0 - upper_bound(errors, n, delta)).next_down().max(0.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_more_risk_is_allowed_than_was_asked_for() {
        let mut rounded = 0;
        for step in 0..1000 {
            let eps = f64::from(step) / 1000.0 + 1e-9;
            let alpha = Claim::new(eps, 0.05).alpha;
            // Exact for alpha of a half or more, as it is for eps below a half.
            assert!(1.0 - alpha >= eps, "{eps}");
            rounded += usize::from(1.0 - (1.0 - eps) < eps);
        }
        assert!(rounded > 0);
    }

    /// The lowest group that is evident, one after the other from the lowest.
    fn plainly<S: Calibratable>(scores: &[S], correct: &[u8], claim: Claim) -> (f64, usize) {
        let mut samples: Vec<(S::Key, u8)> = scores
            .iter()
            .map(|score| score.key())
            .zip(correct.iter().copied())
            .collect();
        samples.sort_unstable();
        let mut left = Counts {
            accepted: samples.len(),
            correct: correct.iter().map(|&flag| usize::from(flag)).sum(),
        };
        let mut last = None;
        for (key, flag) in samples {
            if last != Some(key) && claim.is_evident(left) {
                return (S::from_key(key).value(), left.accepted);
            }
            last = Some(key);
            left = left
                - Counts {
                    accepted: 1,
                    correct: usize::from(flag),
                };
        }
        (f64::INFINITY, 0)
    }

    #[test]
    fn evidence_is_found_at_the_lowest_score_that_has_it() {
        fn check<S: Calibratable>(scores: &[S], correct: &[u8], eps: f64) -> bool {
            let expected = plainly(scores, correct, Claim::new(eps, 0.05));
            for threads in [1, 3] {
                let run = Run::on(threads);
                let found = certify(
                    scores,
                    correct,
                    eps,
                    0.05,
                    Certification::Evidence(None),
                    &run,
                )
                .expect("legal samples");
                assert_eq!((found.threshold, found.accepted), expected, "{eps}");
            }
            expected.0 < f64::INFINITY
        }
        let mut state = 1u64;
        let mut draw = || {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            (state >> 11) as f64 / (1u64 << 53) as f64
        };
        let mut certified = 0;
        for size in [1, 60, 700, 33_000, 150_000] {
            // Accuracy that rises, that stays at the target, and that is best in the middle; few distinct scores.
            for kind in 0..4 {
                let scores: Vec<f64> = (0..size)
                    .map(|_| {
                        if kind == 3 {
                            (draw() * 40.0).floor() / 40.0
                        } else {
                            draw()
                        }
                    })
                    .collect();
                let correct: Vec<u8> = scores
                    .iter()
                    .map(|score| {
                        let accuracy = match kind {
                            1 => 0.905,
                            2 => 0.99 - (score - 0.5).powi(2),
                            _ => 0.6 + 0.4 * score,
                        };
                        u8::from(draw() < accuracy)
                    })
                    .collect();
                let singles: Vec<f32> = scores.iter().map(|&score| score as f32).collect();
                let halves: Vec<half::bf16> = scores
                    .iter()
                    .map(|&score| half::bf16::from_f64(score))
                    .collect();
                for eps in [0.0, 0.5, 0.9, 0.93, 1.0] {
                    certified += usize::from(check(&scores, &correct, eps));
                    check(&singles, &correct, eps);
                    check(&halves, &correct, eps);
                }
            }
        }
        assert!((40..90).contains(&certified), "{certified}");
    }

    #[test]
    fn the_guess_is_near_what_evidence_asks_for() {
        for (eps, accepted) in [(0.9, 1e4), (0.93, 7e7), (0.5, 1e6), (0.99, 1e6)] {
            let evidence = Evidence(Claim::new(eps, 0.05));
            let guess = evidence.correct_among(accepted);
            let met = |correct: f64| {
                evidence.is_met(Counts {
                    accepted: accepted as usize,
                    correct: correct as usize,
                })
            };
            let error = (accepted * eps * (1.0 - eps)).sqrt();
            assert!(
                met(guess + 0.3 * error) && !met(guess - 0.3 * error),
                "{eps}"
            );
        }
    }

    #[test]
    fn bounds_are_rounded_down() {
        for wrong in 0..100 {
            let counts = Counts {
                accepted: 1000,
                correct: 1000 - wrong,
            };
            // The difference from 1 is exact, since the bound is above a half.
            assert!(1.0 - bound(counts, 0.05) >= upper_bound(wrong as u64, 1000, 0.05));
        }
    }

    #[test]
    fn a_lattice_up_to_one_takes_what_float32_would_round_to_one() {
        let walk = Walk {
            thresholds: &[0.0, 0.5, 1.0],
            starts: &[1],
            unit: true,
        };
        let clusters = Clusters {
            of: &[0; 100],
            count: 1,
            most: 100,
        };
        let (run, correct) = (Run::on(1), [1; 100]);
        for method in [
            Certification::FixedSequence(walk),
            Certification::Betting(walk, clusters),
        ] {
            let found = |highest: f64, lowest: f64| {
                let mut scores = [0.7; 100];
                (scores[3], scores[4]) = (highest, lowest);
                certify(&scores, &correct, 0.9, 0.05, method, &run).map(|found| found.accepted)
            };
            assert!(found(1.0 + 5e-8, 0.0).is_ok());
            assert_eq!(found(1.0 + 2e-7, 0.0), Err(Error::OffLattice));
            assert_eq!(found(1.0, -1e-9), Err(Error::OffLattice));
        }
    }
}
