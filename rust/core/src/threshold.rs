//! The lowest threshold that reaches a target accuracy.
//!
//! `tau = min { v : c(v) / n(v) >= eps }`, where `n(v)` samples score at least `v` and `c(v)` of them are correct.
//! Suffix accuracy is not monotone in the threshold, so nothing here bisects over it.

use crate::error::{Error, Result};
use crate::exhaust::{by_counting, by_sorting, exhaust};
use crate::ladder::{Bucketed, Ladder};
use crate::order::Score;
use crate::run::{Method, Run};
use crate::samples::{Given, Lane, Samples};
use crate::search::search;
use crate::survivors::{Left, Survivors};
use crate::tally::{Counts, Criterion, Group, Target};
use crate::validate::{require_pairs, require_targets, require_valid};
use half::{bf16, f16};

/// Samples of a row from which on all threads share it; shorter rows are shared out.
const WORTH_ALL_THREADS: usize = 1 << 20;
/// Samples from which on a table of all 16-bit keys pays.
const WORTH_A_TABLE: usize = 1 << 13;

/// Which scores may become the threshold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rule {
    /// The start of each group of equal scores: the deployed rule `score >= tau` meets the target on the data.
    Set,
    /// Every sample in stable ascending order: the formula of the paper to the letter, which may stop inside a
    /// group of equal scores.
    Index,
}

/// The threshold for every target, in the targets' order; +inf where none qualifies.
pub fn fast_calibrate<S: Calibratable>(
    scores: &[S],
    correct: &[u8],
    eps: &[f64],
    rule: Rule,
    run: &Run,
) -> Result<Vec<f64>> {
    require_pairs(scores, correct)?;
    require_targets(eps)?;
    calibrate_head(scores, correct, eps, rule, run)
}

/// The same for several heads at once: `heads` rows of scores and flags give `heads` rows of thresholds.
pub fn fast_calibrate_heads<S: Calibratable>(
    scores: &[S],
    correct: &[u8],
    heads: usize,
    eps: &[f64],
    rule: Rule,
    run: &Run,
) -> Result<Vec<f64>> {
    require_pairs(scores, correct)?;
    require_targets(eps)?;
    if !scores.len().is_multiple_of(heads) {
        return Err(Error::UnevenHeads {
            scores: scores.len(),
            heads,
        });
    }
    let samples = scores.len() / heads;
    let rows = scores
        .chunks_exact(samples)
        .zip(correct.chunks_exact(samples));
    let found = if samples < WORTH_ALL_THREADS {
        // Short rows side by side; long ones each on all threads.
        let (method, isa) = (run.method(), run.instruction_set());
        let alone = |(scores, correct)| {
            let run = Run::on(1).with_method(method).with_instruction_set(isa);
            calibrate_head(scores, correct, eps, rule, &run)
        };
        run.map(rows.collect(), alone)?
            .into_iter()
            .collect::<Result<Vec<_>>>()
    } else {
        rows.map(|(scores, correct)| calibrate_head(scores, correct, eps, rule, run))
            .collect()
    };
    match found {
        Ok(thresholds) => Ok(thresholds.concat()),
        Err(Error::Interrupted) => Err(Error::Interrupted),
        // What is wrong with a row is told by its place among all, scores before flags.
        Err(error) => require_valid(scores, correct, Some(samples), run).and(Err(error)),
    }
}

fn calibrate_head<S: Calibratable>(
    scores: &[S],
    correct: &[u8],
    eps: &[f64],
    rule: Rule,
    run: &Run,
) -> Result<Vec<f64>> {
    let mut targets: Vec<Target> = eps.iter().copied().map(Target::new).collect();
    targets.sort_unstable();
    targets.dedup();
    let found = S::lowest(Given { scores, correct }, &targets, rule, run)?;
    let threshold = |&eps: &f64| {
        let key = targets
            .binary_search(&Target::new(eps))
            .ok()
            .and_then(|place| found[place]);
        key.map_or(f64::INFINITY, |(key, _)| S::from_key(key).value())
    };
    Ok(eps.iter().map(threshold).collect())
}

/// A score type thresholds can be found for.
pub trait Calibratable: Bucketed {
    /// The lowest group that reaches each target, ascending.
    #[doc(hidden)]
    fn lowest(samples: Given<Self>, targets: &[Target], rule: Rule, run: &Run) -> Groups<Self>;

    /// The lowest group from which on the samples meet a criterion.
    #[doc(hidden)]
    fn lowest_that_meets(
        samples: Given<Self>,
        criterion: impl Criterion,
        run: &Run,
    ) -> Result<Option<Group<Self::Key>>>;

    /// The lowest group that reaches a target among the samples that are left.
    #[doc(hidden)]
    fn lowest_left(
        samples: Given<Self>,
        alive: &[u64],
        target: Target,
        run: &Run,
    ) -> Result<Option<Group<Self::Key>>>;
}

type Groups<S> = Result<Vec<Option<Group<<S as Score>::Key>>>>;

macro_rules! count_or_sort {
    ($($score:ty),*) => {$(
        impl Calibratable for $score {
            fn lowest(samples: Given<Self>, targets: &[Target], rule: Rule, run: &Run) -> Groups<Self> {
                require_valid(samples.scores, samples.correct, None, run)?;
                match (rule, run.method()) {
                    (Rule::Set, Method::Fastest) if samples.scores.len() >= WORTH_A_TABLE => {
                        by_counting(&samples, targets, run)
                    }
                    _ => by_sorting(&samples, Counts::default(), targets, rule, run),
                }
            }

            fn lowest_that_meets(
                samples: Given<Self>,
                criterion: impl Criterion,
                run: &Run,
            ) -> Result<Option<Group<Self::Key>>> {
                let all = Survivors::all(samples.scores, samples.correct);
                Ladder::count(all, run)?.lowest(criterion)
            }

            fn lowest_left(
                samples: Given<Self>,
                alive: &[u64],
                target: Target,
                run: &Run,
            ) -> Result<Option<Group<Self::Key>>> {
                let left = Survivors {
                    scores: samples.scores,
                    correct: samples.correct,
                    alive: Some(alive),
                };
                Ladder::count(left, run)?.lowest(target)
            }
        }
    )*};
}

count_or_sort!(f16, bf16);

fn with_key<L: Lane>((lane, counts): Group<L>) -> Group<L::Key> {
    (lane.key(), counts)
}

/// The lowest group that meets each target, by the method that is asked for.
fn find<X: Samples>(
    samples: &X,
    targets: &[impl Criterion],
    rule: Rule,
    run: &Run,
) -> Result<Vec<Option<Group<X::Lane>>>> {
    match run.method() {
        Method::Fastest => search(samples, Counts::default(), targets, rule, run),
        Method::Sort => exhaust(samples, Counts::default(), targets, rule, run),
    }
}

macro_rules! search_or_sort {
    ($($score:ty),*) => {$(
        impl Calibratable for $score {
            fn lowest(samples: Given<Self>, targets: &[Target], rule: Rule, run: &Run) -> Groups<Self> {
                let found = find(&samples, targets, rule, run)?;
                Ok(found.into_iter().map(|group| group.map(with_key)).collect())
            }

            fn lowest_that_meets(
                samples: Given<Self>,
                criterion: impl Criterion,
                run: &Run,
            ) -> Result<Option<Group<Self::Key>>> {
                let found = find(&samples, &[criterion], Rule::Set, run)?;
                Ok(found[0].map(with_key))
            }

            fn lowest_left(
                samples: Given<Self>,
                alive: &[u64],
                target: Target,
                run: &Run,
            ) -> Result<Option<Group<Self::Key>>> {
                let left = Left::of(samples.scores, samples.correct, alive, run);
                let found = search(&left, Counts::default(), &[target], Rule::Set, run)?;
                Ok(found[0].map(with_key))
            }
        }
    )*};
}

search_or_sort!(f32, f64);
