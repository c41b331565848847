//! What a threshold accepts, and the one place where it is compared with a target.

use std::ops::{Add, AddAssign, Sub};

/// Samples at or above some score, and the correct ones among them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    pub accepted: usize,
    pub correct: usize,
}

impl Counts {
    /// Whether the accepted samples are accurate enough.
    ///
    /// The quotient is the IEEE double division, everywhere the same; it is monotone in the exact quotient, so
    /// bounds may be tested with it too.  Both sides are non-negative, so their bits compare as they do, and a
    /// subnormal target is itself even where the processor takes denormals for zero.
    ///
    /// Most counts are far from the target, and a product tells so sooner than a quotient.
    #[inline(always)]
    pub fn reach(self, target: Target) -> bool {
        let (correct, accepted) = (self.correct as f64, self.accepted as f64);
        // Less than the rounding of both can make up for.
        let far_below = correct < target.value() * accepted * (1.0 - 1e-12);
        self.accepted > 0 && !far_below && (correct / accepted).to_bits() >= target.0
    }

    /// The best a threshold in a range of scores can do, if from its upper end up the counts are `above` and from its
    /// lower end up they are `self`: all its correct samples come first.
    pub fn best_case(self, above: Self) -> Self {
        let inside = self - above;
        // A range without a correct sample offers a wrong one at best.
        Self {
            accepted: above.accepted + inside.correct.max(1).min(inside.accepted),
            correct: above.correct + inside.correct,
        }
    }

    /// Whether some threshold in that range might do.
    pub fn might_meet(self, above: Self, criterion: impl Criterion) -> bool {
        self.accepted > above.accepted && criterion.is_met(self.best_case(above))
    }
}

impl Add for Counts {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            accepted: self.accepted + other.accepted,
            correct: self.correct + other.correct,
        }
    }
}

impl AddAssign for Counts {
    fn add_assign(&mut self, other: Self) {
        *self = *self + other;
    }
}

impl Sub for Counts {
    type Output = Self;

    fn sub(self, other: Self) -> Self {
        Self {
            accepted: self.accepted - other.accepted,
            correct: self.correct - other.correct,
        }
    }
}

/// A group of equal scores: their key, and what is accepted from it up.
pub type Group<K> = (K, Counts);

/// What the counts of a threshold have to come to.
///
/// It minds neither fewer errors beside as many correct samples nor more correct ones beside as many errors.
pub trait Criterion: Copy {
    /// Whether they do.
    fn is_met(self, counts: Counts) -> bool;
    /// How many correct samples there should be among so many, about: for guesses, which decide nothing.
    fn correct_among(self, accepted: f64) -> f64;
    /// How fast that number grows: the accuracy that is asked for.
    fn accuracy(self) -> f64;
}

/// The first of ascending groups whose counts meet a criterion, given the counts above all of them.
///
/// Groups are ruled out together where their best case is.
pub fn lowest_that_meets<K: Copy>(
    groups: &[Group<K>],
    above: Counts,
    criterion: impl Criterion,
) -> Option<Group<K>> {
    let &(key, counts) = groups.first()?;
    if groups.len() == 1 {
        return criterion.is_met(counts).then_some((key, counts));
    }
    if !counts.might_meet(above, criterion) {
        return None;
    }
    let (low, high) = groups.split_at(groups.len() / 2);
    lowest_that_meets(low, high[0].1, criterion)
        .or_else(|| lowest_that_meets(high, above, criterion))
}

impl Criterion for Target {
    #[inline(always)]
    fn is_met(self, counts: Counts) -> bool {
        counts.reach(self)
    }

    fn correct_among(self, accepted: f64) -> f64 {
        self.value() * accepted
    }

    fn accuracy(self) -> f64 {
        self.value()
    }
}

/// A target accuracy, as the bits of a non-negative double.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Target(u64);

impl Target {
    /// From a number in [0, 1]; -0.0 is 0.
    pub fn new(eps: f64) -> Self {
        Self(eps.abs().to_bits())
    }

    /// The number.
    pub fn value(self) -> f64 {
        f64::from_bits(self.0)
    }
}
