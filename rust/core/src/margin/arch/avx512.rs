//! One AVX-512 register for sixteen lanes; of the extensions, F and DQ suffice.

use super::super::Top2;
use super::super::lanes::{self, Fault, LANES, Logit, Simd};
use crate::isa::Avx512;
use half::{bf16, f16};
use std::arch::x86_64::*;

pub(super) fn top2_margin<T: Logit>(avx512: Avx512, logits: &[T]) -> Result<Top2, Fault> {
    // SAFETY: `avx512` proves that the processor has what the function is compiled for.
    unsafe { top2_margin_with_avx512(avx512, logits) }
}

pub(super) fn exits<T: Logit>(
    avx512: Avx512,
    logits: &[T],
    tau: f64,
) -> Result<(usize, bool), Fault> {
    // SAFETY: as above.
    unsafe { exits_with_avx512(avx512, logits, tau) }
}

#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")]
fn top2_margin_with_avx512<T: Logit>(avx512: Avx512, logits: &[T]) -> Result<Top2, Fault> {
    lanes::top2_margin(avx512, logits)
}

#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")]
fn exits_with_avx512<T: Logit>(
    avx512: Avx512,
    logits: &[T],
    tau: f64,
) -> Result<(usize, bool), Fault> {
    lanes::exits(avx512, logits, tau)
}

/// Write the methods of [`Simd`] that are one intrinsic.
macro_rules! lanewise {
    ($($name:ident($($operand:ident),*) = $intrinsic:ident($($argument:expr),*);)*) => {$(
        #[inline(always)]
        fn $name(self, $($operand: Self::Lanes),*) -> Self::Lanes {
            // SAFETY: `self` proves AVX-512 F.
            unsafe { $intrinsic($($argument),*) }
        }
    )*};
}

impl Simd for Avx512 {
    type Lanes = __m512;
    type Doubles = [__m512d; 2];
    type Mask = __mmask16;

    lanewise! {
        add(a, b) = _mm512_add_ps(a, b);
        sub(a, b) = _mm512_sub_ps(a, b);
        mul(a, b) = _mm512_mul_ps(a, b);
        mul_add(a, b, c) = _mm512_fmadd_ps(a, b, c);
        max(a, b) = _mm512_max_ps(a, b);
    }

    #[inline(always)]
    fn splat(self, value: f32) -> Self::Lanes {
        // SAFETY: `self` proves AVX-512 F.
        unsafe { _mm512_set1_ps(value) }
    }

    #[inline(always)]
    fn load_f32(self, logits: &[f32; LANES]) -> Self::Lanes {
        // SAFETY: `self` proves AVX-512 F; the unaligned load of sixteen float32 is all of them.
        unsafe { _mm512_loadu_ps(logits.as_ptr()) }
    }

    #[inline(always)]
    fn load_f16(self, logits: &[f16; LANES]) -> Self::Lanes {
        // SAFETY: `self` proves AVX-512 F; the unaligned load of sixteen float16 is all of them.
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(logits.as_ptr().cast())) }
    }

    /// A bfloat16 is the upper half of its float32.
    #[inline(always)]
    fn load_bf16(self, logits: &[bf16; LANES]) -> Self::Lanes {
        // SAFETY: `self` proves AVX-512 F; the unaligned load of sixteen bfloat16 is all of them.
        unsafe {
            let bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256(logits.as_ptr().cast()));
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(bits))
        }
    }

    #[inline(always)]
    fn power_of_two(self, rounded: Self::Lanes) -> Self::Lanes {
        // SAFETY: `self` proves AVX-512 F.
        unsafe { _mm512_castsi512_ps(_mm512_slli_epi32::<23>(_mm512_castps_si512(rounded))) }
    }

    #[inline(always)]
    fn no_nan(self) -> Self::Mask {
        0
    }

    #[inline(always)]
    fn or_nan(self, mask: Self::Mask, a: Self::Lanes, b: Self::Lanes) -> Self::Mask {
        // SAFETY: `self` proves AVX-512 F.
        mask | unsafe { _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(a, b) }
    }

    #[inline(always)]
    fn any(self, mask: Self::Mask) -> bool {
        mask != 0
    }

    #[inline(always)]
    fn largest(self, a: Self::Lanes) -> f32 {
        // SAFETY: `self` proves AVX-512 F.
        unsafe { _mm512_reduce_max_ps(a) }
    }

    #[inline(always)]
    fn zeros(self) -> Self::Doubles {
        // SAFETY: `self` proves AVX-512 F.
        unsafe { [_mm512_setzero_pd(); 2] }
    }

    #[inline(always)]
    fn widening_add(self, sums: Self::Doubles, a: Self::Lanes) -> Self::Doubles {
        // SAFETY: `self` proves AVX-512 F and DQ.
        unsafe {
            let [low, high] = widen(a);
            [_mm512_add_pd(sums[0], low), _mm512_add_pd(sums[1], high)]
        }
    }

    #[inline(always)]
    fn widening_sub(self, sums: Self::Doubles, a: Self::Lanes) -> Self::Doubles {
        // SAFETY: `self` proves AVX-512 F and DQ.
        unsafe {
            let [low, high] = widen(a);
            [_mm512_sub_pd(sums[0], low), _mm512_sub_pd(sums[1], high)]
        }
    }

    #[inline(always)]
    fn add_neighbours(self, sums: Self::Doubles) -> [f64; LANES / 2] {
        let mut lanes = [0.0; LANES];
        for (eight, register) in lanes.as_chunks_mut::<8>().0.iter_mut().zip(sums) {
            // SAFETY: `self` proves AVX-512 F; the unaligned store fills exactly the eight.
            unsafe { _mm512_storeu_pd(eight.as_mut_ptr(), register) };
        }
        std::array::from_fn(|i| lanes[2 * i] + lanes[2 * i + 1])
    }
}

/// # Safety
/// The processor has AVX-512 F and DQ.
#[inline(always)]
unsafe fn widen(a: __m512) -> [__m512d; 2] {
    // SAFETY: the caller's promise.
    unsafe {
        [
            _mm512_cvtps_pd(_mm512_castps512_ps256(a)),
            _mm512_cvtps_pd(_mm512_extractf32x8_ps::<1>(a)),
        ]
    }
}
