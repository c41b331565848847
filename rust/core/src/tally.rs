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

    /// Whether some threshold in a range of scores might do, if from its upper end up the counts are `above` and from
    /// its lower end up they are `self`: at best all its correct samples come first.
    pub fn might_reach_above(self, above: Self, target: Target) -> bool {
        let inside = self - above;
        if inside.accepted == 0 {
            return false;
        }
        // A range without a correct sample offers a wrong one at best.
        let first = inside.correct.max(1);
        let best = Self {
            accepted: above.accepted + first,
            correct: above.correct + inside.correct,
        };
        best.reach(target)
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
