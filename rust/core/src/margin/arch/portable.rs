//! Plain arrays, which the compiler turns into whatever vectors its target has.

use super::super::lanes::{LANES, LN_2_HIGH, LN_2_LOW, Simd};
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
    fn sub_multiple_of_ln_2(self, x: Lanes, n: Lanes) -> Lanes {
        from_fn(|i| (x[i] - n[i] * LN_2_HIGH) - n[i] * LN_2_LOW)
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
    fn one_plus_times(self, a: Lanes, power: Lanes) -> Lanes {
        from_fn(|i| (1.0 + a[i]) * power[i])
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
