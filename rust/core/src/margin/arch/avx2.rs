//! Two AVX registers for sixteen lanes; float16 through F16C.

use super::super::Top2;
use super::super::lanes::{self, Fault, LANES, Logit, Simd};
use crate::isa::Avx2;
use half::{bf16, f16};
use std::arch::x86_64::*;

pub(super) fn top2_margin<T: Logit>(avx2: Avx2, logits: &[T]) -> Result<Top2, Fault> {
    // SAFETY: `avx2` proves that the processor has what the function is compiled for.
    unsafe { top2_margin_with_avx2(avx2, logits) }
}

pub(super) fn exits<T: Logit>(avx2: Avx2, logits: &[T], tau: f64) -> Result<(usize, bool), Fault> {
    // SAFETY: as above.
    unsafe { exits_with_avx2(avx2, logits, tau) }
}

#[target_feature(enable = "avx2,fma,f16c")]
fn top2_margin_with_avx2<T: Logit>(avx2: Avx2, logits: &[T]) -> Result<Top2, Fault> {
    lanes::top2_margin(avx2, logits)
}

#[target_feature(enable = "avx2,fma,f16c")]
fn exits_with_avx2<T: Logit>(avx2: Avx2, logits: &[T], tau: f64) -> Result<(usize, bool), Fault> {
    lanes::exits(avx2, logits, tau)
}

/// Write the methods of [`Simd`] that are one intrinsic a register.
macro_rules! lanewise {
    ($($name:ident($($operand:ident),*) = $intrinsic:ident($($argument:ident),*);)*) => {$(
        #[inline(always)]
        fn $name(self, $($operand: Self::Lanes),*) -> Self::Lanes {
            // SAFETY: `self` proves AVX2 and FMA.
            unsafe { [$intrinsic($($argument[0]),*), $intrinsic($($argument[1]),*)] }
        }
    )*};
}

impl Simd for Avx2 {
    type Lanes = [__m256; 2];
    type Doubles = [__m256d; 4];
    type Mask = __m256;

    lanewise! {
        add(a, b) = _mm256_add_ps(a, b);
        sub(a, b) = _mm256_sub_ps(a, b);
        mul(a, b) = _mm256_mul_ps(a, b);
        mul_add(a, b, c) = _mm256_fmadd_ps(a, b, c);
        max(a, b) = _mm256_max_ps(a, b);
        power_of_two(rounded) = shift_to_exponent(rounded);
    }

    #[inline(always)]
    fn splat(self, value: f32) -> Self::Lanes {
        // SAFETY: `self` proves AVX2.
        unsafe { [_mm256_set1_ps(value); 2] }
    }

    #[inline(always)]
    fn load_f32(self, logits: &[f32; LANES]) -> Self::Lanes {
        let at = logits.as_ptr();
        // SAFETY: `self` proves AVX2; the two unaligned loads of eight float32 lie in the sixteen.
        unsafe { [_mm256_loadu_ps(at), _mm256_loadu_ps(at.add(8))] }
    }

    #[inline(always)]
    fn load_f16(self, logits: &[f16; LANES]) -> Self::Lanes {
        let at = logits.as_ptr().cast::<__m128i>();
        // SAFETY: `self` proves F16C; the two unaligned loads of eight float16 lie in the sixteen.
        unsafe {
            [
                _mm256_cvtph_ps(_mm_loadu_si128(at)),
                _mm256_cvtph_ps(_mm_loadu_si128(at.add(1))),
            ]
        }
    }

    /// A bfloat16 is the upper half of its float32: the even lanes are shifted up, the odd ones stand right.
    #[inline(always)]
    fn load_bf16(self, logits: &[bf16; LANES]) -> Self::Lanes {
        // SAFETY: `self` proves AVX2; the unaligned load of sixteen bfloat16 is all of them.
        unsafe {
            let both = _mm256_loadu_si256(logits.as_ptr().cast());
            let upper = _mm256_set1_epi32(-0x1_0000);
            [
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(both)),
                _mm256_castsi256_ps(_mm256_and_si256(both, upper)),
            ]
        }
    }

    #[inline(always)]
    fn no_nan(self) -> Self::Mask {
        // SAFETY: `self` proves AVX2.
        unsafe { _mm256_setzero_ps() }
    }

    #[inline(always)]
    fn or_nan(self, mask: Self::Mask, a: Self::Lanes, b: Self::Lanes) -> Self::Mask {
        // SAFETY: `self` proves AVX2.
        unsafe {
            let first = _mm256_cmp_ps::<_CMP_UNORD_Q>(a[0], a[1]);
            let second = _mm256_cmp_ps::<_CMP_UNORD_Q>(b[0], b[1]);
            _mm256_or_ps(mask, _mm256_or_ps(first, second))
        }
    }

    #[inline(always)]
    fn any(self, mask: Self::Mask) -> bool {
        // SAFETY: `self` proves AVX2.
        unsafe { _mm256_movemask_ps(mask) != 0 }
    }

    #[inline(always)]
    fn largest(self, a: Self::Lanes) -> f32 {
        // SAFETY: `self` proves AVX2, and with it SSE3.
        unsafe {
            let eight = _mm256_max_ps(a[0], a[1]);
            let four = _mm_max_ps(
                _mm256_castps256_ps128(eight),
                _mm256_extractf128_ps::<1>(eight),
            );
            let two = _mm_max_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)))
        }
    }

    #[inline(always)]
    fn zeros(self) -> Self::Doubles {
        // SAFETY: `self` proves AVX2.
        unsafe { [_mm256_setzero_pd(); 4] }
    }

    #[inline(always)]
    fn widening_add(self, sums: Self::Doubles, a: Self::Lanes) -> Self::Doubles {
        // SAFETY: `self` proves AVX2.
        unsafe {
            let [w, x, y, z] = widen(a);
            [
                _mm256_add_pd(sums[0], w),
                _mm256_add_pd(sums[1], x),
                _mm256_add_pd(sums[2], y),
                _mm256_add_pd(sums[3], z),
            ]
        }
    }

    #[inline(always)]
    fn widening_sub(self, sums: Self::Doubles, a: Self::Lanes) -> Self::Doubles {
        // SAFETY: `self` proves AVX2.
        unsafe {
            let [w, x, y, z] = widen(a);
            [
                _mm256_sub_pd(sums[0], w),
                _mm256_sub_pd(sums[1], x),
                _mm256_sub_pd(sums[2], y),
                _mm256_sub_pd(sums[3], z),
            ]
        }
    }

    #[inline(always)]
    fn add_neighbours(self, sums: Self::Doubles) -> [f64; LANES / 2] {
        let lanes = store(sums);
        std::array::from_fn(|i| lanes[2 * i] + lanes[2 * i + 1])
    }

    #[inline(always)]
    fn add_neighbours_bf16(self, sums: Self::Doubles) -> [f64; LANES / 2] {
        let lanes = store(sums);
        std::array::from_fn(|i| lanes[i] + lanes[i + LANES / 2])
    }
}

fn store(sums: [__m256d; 4]) -> [f64; LANES] {
    let mut lanes = [0.0; LANES];
    for (four, register) in lanes.as_chunks_mut::<4>().0.iter_mut().zip(sums) {
        // SAFETY: a register can only be held where there is AVX; the unaligned store fills exactly the four.
        unsafe { _mm256_storeu_pd(four.as_mut_ptr(), register) };
    }
    lanes
}

/// # Safety
/// The processor has AVX2.
#[inline(always)]
unsafe fn widen(a: [__m256; 2]) -> [__m256d; 4] {
    // SAFETY: the caller's promise.
    unsafe {
        [
            _mm256_cvtps_pd(_mm256_castps256_ps128(a[0])),
            _mm256_cvtps_pd(_mm256_extractf128_ps::<1>(a[0])),
            _mm256_cvtps_pd(_mm256_castps256_ps128(a[1])),
            _mm256_cvtps_pd(_mm256_extractf128_ps::<1>(a[1])),
        ]
    }
}

/// # Safety
/// The processor has AVX2.
#[inline(always)]
unsafe fn shift_to_exponent(rounded: __m256) -> __m256 {
    // SAFETY: the caller's promise.
    unsafe { _mm256_castsi256_ps(_mm256_slli_epi32::<23>(_mm256_castps_si256(rounded))) }
}
