//! Plain arrays, which the compiler turns into whatever vectors its target has.

use super::super::lanes::{LANES, Simd};
use half::{bf16, f16};
use std::array::from_fn;

#[derive(Debug, Clone, Copy)]
pub(in super::super) struct Portable;

type Lanes = [f32; LANES];

impl Simd for Portable {
    type Lanes = Lanes;
    type Doubles = [f64; LANES];
    type Mask = [bool; LANES];

    #[inline(always)]
    fn splat(self, value: f32) -> Lanes {
        [value; LANES]
    }

    #[inline(always)]
    fn load_f32(self, logits: &[f32; LANES]) -> Lanes {
        *logits
    }

    #[inline(always)]
    fn load_f16(self, logits: &[f16; LANES]) -> Lanes {
        from_fn(|i| widen_f16(logits[i]))
    }

    #[inline(always)]
    fn load_bf16(self, logits: &[bf16; LANES]) -> Lanes {
        from_fn(|i| f32::from_bits(u32::from(logits[i].to_bits()) << 16))
    }

    #[inline(always)]
    fn add(self, a: Lanes, b: Lanes) -> Lanes {
        from_fn(|i| a[i] + b[i])
    }

    #[inline(always)]
    fn sub(self, a: Lanes, b: Lanes) -> Lanes {
        from_fn(|i| a[i] - b[i])
    }

    #[inline(always)]
    fn mul(self, a: Lanes, b: Lanes) -> Lanes {
        from_fn(|i| a[i] * b[i])
    }

    #[inline(always)]
    fn mul_add(self, a: Lanes, b: Lanes, c: Lanes) -> Lanes {
        // Elsewhere the standard library calls a function for every number.
        if cfg!(any(target_feature = "fma", target_arch = "aarch64")) {
            from_fn(|i| a[i].mul_add(b[i], c[i]))
        } else {
            from_fn(|i| mul_add_without_fma(a[i], b[i], c[i]))
        }
    }

    #[inline(always)]
    fn max(self, a: Lanes, b: Lanes) -> Lanes {
        from_fn(|i| if a[i] > b[i] { a[i] } else { b[i] })
    }

    #[inline(always)]
    fn power_of_two(self, rounded: Lanes) -> Lanes {
        from_fn(|i| f32::from_bits(rounded[i].to_bits() << 23))
    }

    #[inline(always)]
    fn no_nan(self) -> Self::Mask {
        [false; LANES]
    }

    #[inline(always)]
    fn or_nan(self, mask: Self::Mask, a: Lanes, b: Lanes) -> Self::Mask {
        from_fn(|i| mask[i] | a[i].is_nan() | b[i].is_nan())
    }

    #[inline(always)]
    fn any(self, mask: Self::Mask) -> bool {
        mask.iter().any(|&lane| lane)
    }

    #[inline(always)]
    fn largest(self, a: Lanes) -> f32 {
        a.into_iter()
            .fold(f32::NEG_INFINITY, |a, b| if a > b { a } else { b })
    }

    #[inline(always)]
    fn zeros(self) -> Self::Doubles {
        [0.0; LANES]
    }

    #[inline(always)]
    fn widening_add(self, sums: Self::Doubles, a: Lanes) -> Self::Doubles {
        from_fn(|i| sums[i] + f64::from(a[i]))
    }

    #[inline(always)]
    fn widening_sub(self, sums: Self::Doubles, a: Lanes) -> Self::Doubles {
        from_fn(|i| sums[i] - f64::from(a[i]))
    }

    #[inline(always)]
    fn add_neighbours(self, sums: Self::Doubles) -> [f64; LANES / 2] {
        from_fn(|i| sums[2 * i] + sums[2 * i + 1])
    }
}

/// `a * b + c`, rounded once: in float64, where the product is exact, a sum that is not is rounded to odd, from where
/// rounding to float32 is as rounding once (Boldo and Melquiond: Emulation of a FMA and correctly rounded sums, 2008).
#[inline(always)]
fn mul_add_without_fma(a: f32, b: f32, c: f32) -> f32 {
    let (product, c) = (f64::from(a) * f64::from(b), f64::from(c));
    let sum = product + c;
    // What rounding took away, exactly (Knuth).
    let added = sum - product;
    let rest = (product - (sum - added)) + (c - added);
    let bits = sum.to_bits();
    let even = bits & 1 == 0;
    // The odd neighbour on the side of the true sum: up in magnitude where the rest has the sum's sign.
    let step = if (rest > 0.0) == (sum > 0.0) {
        1
    } else {
        u64::MAX
    };
    let odd = if even & (rest.abs() > 0.0) {
        bits.wrapping_add(step)
    } else {
        bits
    };
    f64::from_bits(odd) as f32
}

/// The value of a float16, from integer operations that a compiler can vectorise.
#[inline(always)]
fn widen_f16(value: f16) -> f32 {
    const REBIAS: u32 = (127 - 15) << 23;
    let bits = u32::from(value.to_bits());
    let magnitude = bits & 0x7fff;
    let normal = (magnitude << 13) + REBIAS;
    // Subnormals count in units of 2^-24; as float32 they are normal.
    let subnormal = (magnitude as f32 * f32::from_bits((127 - 24) << 23)).to_bits();
    let infinite = normal + REBIAS;
    let widened = match magnitude {
        0..0x400 => subnormal,
        0x400..0x7c00 => normal,
        _ => infinite,
    };
    f32::from_bits(widened | (bits & 0x8000) << 16)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Numbers of all sizes, and those whose sum lies at or beside the middle of two float32.
    #[test]
    fn multiplying_and_adding_rounds_once() {
        let mut state = 1u64;
        let mut number = || {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            let bits = (state >> 32) as u32;
            // Exponents from 2^-40 to 2^23, so that neither part is lost in the other every time.
            f32::from_bits(bits & 0x807f_ffff | (87 + (bits >> 23) % 64) << 23)
        };
        for _ in 0..2_000_000 {
            let (a, b, c) = (number(), number(), number());
            check(a, b, c);
            // The product's own end beyond the middle of two float32.
            check(a, b, (a * b) * f32::from_bits(0x4b80_0000));
        }
        for special in [
            f32::NAN,
            f32::INFINITY,
            f32::NEG_INFINITY,
            0.0,
            -0.0,
            1e-45,
            1e-20,
        ] {
            for (a, b, c) in [
                (special, 2.0, 1.0),
                (2.0, 1.0, special),
                (0.0, 1.0, special),
                (special, 1e-20, -3e-39),
            ] {
                check(a, b, c);
            }
        }
    }

    fn check(a: f32, b: f32, c: f32) {
        let ours = mul_add_without_fma(a, b, c);
        let exact = a.mul_add(b, c);
        assert!(
            ours.to_bits() == exact.to_bits() || (ours.is_nan() && exact.is_nan()),
            "{a:e} * {b:e} + {c:e}: {ours:e} for {exact:e}"
        );
    }

    #[test]
    fn every_float16_widens_to_its_value() {
        for bits in 0..=u16::MAX {
            let value = f16::from_bits(bits);
            let (ours, exact) = (widen_f16(value), value.to_f32_const());
            assert!(
                ours == exact || (ours.is_nan() && exact.is_nan()),
                "{bits:#06x}: {ours} for {exact}"
            );
        }
    }
}
