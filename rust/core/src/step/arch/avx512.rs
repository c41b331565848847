//! One AVX-512 register for sixteen lanes; of the extensions, F and DQ suffice.

use super::super::lanes::{CHUNK, LANES, Simd};
use super::Work;
use crate::isa::Avx512;
use half::{bf16, f16};
use std::arch::x86_64::*;

pub(super) fn run<W: Work>(avx512: Avx512, work: W) -> W::Output {
    // SAFETY: `avx512` proves that the processor has what the function is compiled for.
    unsafe { run_with_avx512(avx512, work) }
}

#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")]
fn run_with_avx512<W: Work>(avx512: Avx512, work: W) -> W::Output {
    work.run(avx512)
}

impl Simd for Avx512 {
    type Lanes = __m512;
    const TOGETHER: usize = 8;

    #[inline(always)]
    fn fetch<T>(self, number: &T) {
        // SAFETY: `self` proves AVX-512 F, and with it SSE; nothing is read but what the reference is to.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(std::ptr::from_ref(number).cast()) }
    }

    #[inline(always)]
    fn fetch_early<T>(self, number: &T) {
        // SAFETY: `self` proves AVX-512 F, and with it SSE; nothing is read but what the reference is to.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(std::ptr::from_ref(number).cast()) }
    }

    #[inline(always)]
    fn splat(self, value: f32) -> Self::Lanes {
        // SAFETY: `self` proves AVX-512 F.
        unsafe { _mm512_set1_ps(value) }
    }

    #[inline(always)]
    fn load(self, values: &[f32; LANES]) -> Self::Lanes {
        // SAFETY: `self` proves AVX-512 F; the unaligned load of sixteen float32 is all of them.
        unsafe { _mm512_loadu_ps(values.as_ptr()) }
    }

    #[inline(always)]
    fn store(self, a: Self::Lanes, values: &mut [f32; LANES]) {
        // SAFETY: `self` proves AVX-512 F; the unaligned store fills exactly the sixteen.
        unsafe { _mm512_storeu_ps(values.as_mut_ptr(), a) }
    }

    #[inline(always)]
    fn load_f32(self, numbers: &[f32; CHUNK]) -> [Self::Lanes; 2] {
        let at = numbers.as_ptr();
        // SAFETY: `self` proves AVX-512 F; the two unaligned loads of sixteen float32 are the chunk.
        unsafe { [_mm512_loadu_ps(at), _mm512_loadu_ps(at.add(LANES))] }
    }

    #[inline(always)]
    fn load_f16(self, numbers: &[f16; CHUNK]) -> [Self::Lanes; 2] {
        let at = numbers.as_ptr().cast::<__m256i>();
        // SAFETY: `self` proves AVX-512 F; the two unaligned loads of sixteen float16 are the chunk.
        unsafe {
            [
                _mm512_cvtph_ps(_mm256_loadu_si256(at)),
                _mm512_cvtph_ps(_mm256_loadu_si256(at.add(1))),
            ]
        }
    }

    /// A bfloat16 is the upper half of its float32: the even ones are shifted up, the odd ones stand right.
    #[inline(always)]
    fn load_bf16(self, numbers: &[bf16; CHUNK]) -> [Self::Lanes; 2] {
        // SAFETY: `self` proves AVX-512 F; the unaligned load of 32 bfloat16 is the chunk.
        unsafe {
            let both = _mm512_loadu_si512(numbers.as_ptr().cast());
            let upper = _mm512_set1_epi32(-0x1_0000);
            [
                _mm512_castsi512_ps(_mm512_slli_epi32::<16>(both)),
                _mm512_castsi512_ps(_mm512_and_si512(both, upper)),
            ]
        }
    }

    #[inline(always)]
    fn load_i8(self, numbers: &[i8; CHUNK]) -> [Self::Lanes; 2] {
        let at = numbers.as_ptr().cast::<__m128i>();
        // SAFETY: `self` proves AVX-512 F, and with it SSE2; the two unaligned loads of sixteen bytes are the chunk.
        unsafe {
            [
                _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(at))),
                _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(at.add(1)))),
            ]
        }
    }

    #[inline(always)]
    fn add(self, a: Self::Lanes, b: Self::Lanes) -> Self::Lanes {
        // SAFETY: `self` proves AVX-512 F.
        unsafe { _mm512_add_ps(a, b) }
    }

    #[inline(always)]
    fn mul_add(self, a: Self::Lanes, b: Self::Lanes, c: Self::Lanes) -> Self::Lanes {
        // SAFETY: `self` proves AVX-512 F.
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }

    #[inline(always)]
    fn sum(self, a: Self::Lanes) -> f32 {
        // SAFETY: `self` proves AVX-512 F and DQ, and with them AVX and SSE3.
        unsafe {
            let eight = _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps::<1>(a));
            let four = _mm_add_ps(
                _mm256_castps256_ps128(eight),
                _mm256_extractf128_ps::<1>(eight),
            );
            let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
        }
    }
}
