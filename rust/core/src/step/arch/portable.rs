//! Plain arrays, which the compiler turns into whatever vectors its target has.  For tests where there are others.

use super::super::lanes::{CHUNK, LANES, Simd};
use half::{bf16, f16};
use std::array::from_fn;

#[derive(Debug, Clone, Copy)]
pub(super) struct Portable;

type Lanes = [f32; LANES];

impl Simd for Portable {
    type Lanes = Lanes;
    const TOGETHER: usize = 2;

    #[inline(always)]
    fn fetch<T>(self, _: &T) {}

    #[inline(always)]
    fn fetch_early<T>(self, _: &T) {}

    #[inline(always)]
    fn splat(self, value: f32) -> Lanes {
        [value; LANES]
    }

    #[inline(always)]
    fn load(self, values: &[f32; LANES]) -> Lanes {
        *values
    }

    #[inline(always)]
    fn store(self, a: Lanes, values: &mut [f32; LANES]) {
        *values = a;
    }

    #[inline(always)]
    fn load_f32(self, numbers: &[f32; CHUNK]) -> [Lanes; 2] {
        [from_fn(|i| numbers[i]), from_fn(|i| numbers[LANES + i])]
    }

    #[inline(always)]
    fn load_f16(self, numbers: &[f16; CHUNK]) -> [Lanes; 2] {
        [
            from_fn(|i| numbers[i].to_f32()),
            from_fn(|i| numbers[LANES + i].to_f32()),
        ]
    }

    #[inline(always)]
    fn load_bf16(self, numbers: &[bf16; CHUNK]) -> [Lanes; 2] {
        [
            from_fn(|i| numbers[2 * i].to_f32()),
            from_fn(|i| numbers[2 * i + 1].to_f32()),
        ]
    }

    #[inline(always)]
    fn load_i8(self, numbers: &[i8; CHUNK]) -> [Lanes; 2] {
        [
            from_fn(|i| f32::from(numbers[i])),
            from_fn(|i| f32::from(numbers[LANES + i])),
        ]
    }

    #[inline(always)]
    fn add(self, a: Lanes, b: Lanes) -> Lanes {
        from_fn(|i| a[i] + b[i])
    }

    #[inline(always)]
    fn mul_add(self, a: Lanes, b: Lanes, c: Lanes) -> Lanes {
        from_fn(|i| a[i].mul_add(b[i], c[i]))
    }

    #[inline(always)]
    fn sum(self, a: Lanes) -> f32 {
        let eight: [f32; 8] = from_fn(|i| a[i] + a[i + 8]);
        let four: [f32; 4] = from_fn(|i| eight[i] + eight[i + 4]);
        (four[0] + four[2]) + (four[1] + four[3])
    }
}
