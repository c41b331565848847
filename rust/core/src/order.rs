//! Scores and ordered integer keys: `a < b` as scores if and only if `key(a) < key(b)`.
//!
//! Everything is integer arithmetic on the bits, so the result does not depend on the processor's
//! flush-denormals-to-zero mode, which other libraries switch on.  -0.0 and +0.0 share one key; from it comes +0.0.

use half::{bf16, f16};
use std::fmt::Debug;

/// An unsigned integer whose order is the scores' order.
pub trait Key: Copy + Ord + Debug + Default + Send + Sync + 'static {
    /// How many bits the key has.
    const BITS: u32;
    /// The eight bits that start at `shift`.
    fn digit(self, shift: u32) -> usize;
    /// The key as an index into a table of all keys.
    fn index(self) -> usize;
    /// The key with that index.
    fn from_index(index: usize) -> Self;
    /// Whether the score is zero or more, which leaves the highest bit free for a flag below the lowest.
    fn is_positive(self) -> bool;
    /// A positive key and a flag in one, in the order of the keys.
    fn with_flag(self, flag: u8) -> Self;
    /// The key and the flag put together by [`with_flag`](Self::with_flag).
    fn apart(self) -> (Self, u8);
}

/// A floating-point type scores may have.
pub trait Score: Copy + Debug + Send + Sync + 'static {
    /// The integers its values are ordered by.
    type Key: Key;
    /// The ordered key of a finite score.
    fn key(self) -> Self::Key;
    /// The score a key belongs to; +0.0 for zero.
    fn from_key(key: Self::Key) -> Self;
    /// The score's value, exactly.
    fn value(self) -> f64;
    /// Neither NaN nor infinite.
    fn is_finite(self) -> bool;
}

macro_rules! key {
    ($($bits:ty),*) => {$(
        impl Key for $bits {
            const BITS: u32 = <$bits>::BITS;

            #[inline(always)]
            fn digit(self, shift: u32) -> usize {
                usize::from((self >> shift) as u8)
            }

            #[inline(always)]
            fn index(self) -> usize {
                self as usize
            }

            #[inline(always)]
            fn from_index(index: usize) -> Self {
                index as $bits
            }

            #[inline(always)]
            fn is_positive(self) -> bool {
                self >> (Self::BITS - 1) == 1
            }

            #[inline(always)]
            fn with_flag(self, flag: u8) -> Self {
                self << 1 | Self::from(flag)
            }

            #[inline(always)]
            fn apart(self) -> (Self, u8) {
                (self >> 1 | 1 << (Self::BITS - 1), (self & 1) as u8)
            }
        }
    )*};
}

key!(u16, u32, u64);

macro_rules! score {
    ($float:ty, $bits:ty, $signed:ty, $infinity:expr, $value:expr) => {
        impl Score for $float {
            type Key = $bits;

            #[inline(always)]
            fn key(self) -> $bits {
                const SIGN: $bits = 1 << (<$bits>::BITS - 1);
                let bits = self.to_bits();
                let bits = if bits == SIGN { 0 } else { bits };
                // Negative numbers grow downwards as integers: turn all their bits, else only the sign.
                bits ^ ((bits as $signed >> (<$bits>::BITS - 1)) as $bits | SIGN)
            }

            #[inline(always)]
            fn from_key(key: $bits) -> Self {
                const SIGN: $bits = 1 << (<$bits>::BITS - 1);
                let negative = !(key as $signed >> (<$bits>::BITS - 1)) as $bits;
                Self::from_bits(key ^ (negative | SIGN))
            }

            #[inline(always)]
            fn value(self) -> f64 {
                let widen: fn($float) -> f64 = $value;
                widen(self)
            }

            #[inline(always)]
            fn is_finite(self) -> bool {
                const INFINITY: $bits = $infinity;
                self.to_bits() & (<$bits>::MAX >> 1) < INFINITY
            }
        }
    };
}

score!(f16, u16, i16, 0x7c00, |score| f64::from(score.to_f32()));
score!(bf16, u16, i16, 0x7f80, |score| widen(
    u32::from(score.to_bits()) << 16
));
score!(f32, u32, i32, 0x7f80_0000, |score| widen(score.to_bits()));
score!(f64, u64, i64, 0x7ff0_0000_0000_0000, |score| score);

/// The value of a float32 given as its bits; subnormal ones survive denormals-are-zero mode.
fn widen(bits: u32) -> f64 {
    if bits & 0x7f80_0000 != 0 {
        return f64::from(f32::from_bits(bits));
    }
    let magnitude = f64::from(bits & 0x007f_ffff) * f64::from_bits((1023 - 149) << 52);
    if bits >> 31 == 1 {
        -magnitude
    } else {
        magnitude
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keys_order_all_16_bit_scores<S: Score<Key = u16>>(from_bits: fn(u16) -> S) {
        let mut scores: Vec<S> = (0..=u16::MAX)
            .map(from_bits)
            .filter(|s| s.is_finite())
            .collect();
        scores.sort_by(|a, b| a.value().partial_cmp(&b.value()).expect("finite"));
        for pair in scores.windows(2) {
            assert_eq!(
                pair[0].value().partial_cmp(&pair[1].value()),
                Some(pair[0].key().cmp(&pair[1].key()))
            );
        }
        for score in scores {
            assert_eq!(S::from_key(score.key()).value(), score.value());
        }
    }

    #[test]
    fn sixteen_bits_exhaustively() {
        keys_order_all_16_bit_scores(f16::from_bits);
        keys_order_all_16_bit_scores(bf16::from_bits);
    }

    #[test]
    fn widening_agrees_with_the_processor() {
        for bits in (0..=u32::MAX).step_by(9973).chain(0..100_000) {
            let score = f32::from_bits(bits);
            if score.is_finite() {
                assert_eq!(score.value().to_bits(), f64::from(score).to_bits());
                assert_eq!(f32::from_key(score.key()), score);
            }
        }
    }

    #[test]
    fn zeros_are_one() {
        assert_eq!((-0.0f32).key(), 0.0f32.key());
        assert_eq!(f64::from_key((-0.0f64).key()).to_bits(), 0);
        assert!((-f64::MIN_POSITIVE).key() < 0.0f64.key());
        assert!(f32::from_bits(0x8000_0001).key() < (-0.0f32).key());
    }

    #[test]
    fn infinities_and_nan_are_not_finite() {
        for score in [f32::INFINITY, f32::NEG_INFINITY, f32::NAN, -f32::NAN] {
            assert!(
                !score.is_finite()
                    && !bf16::from_f32(score).is_finite()
                    && !f16::from_f32(score).is_finite()
            );
            assert!(!Score::is_finite(f64::from(score)));
        }
        assert!(
            Score::is_finite(f32::MAX) && Score::is_finite(f64::MIN) && Score::is_finite(f16::MAX)
        );
    }
}
