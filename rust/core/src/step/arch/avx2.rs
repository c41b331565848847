//! Two AVX registers for sixteen lanes; float16 through F16C.

use super::super::lanes::{CHUNK, LANES, Simd};
use super::Work;
use crate::isa::Avx2;
use half::{bf16, f16};
use std::arch::x86_64::*;

pub(super) fn run<W: Work>(avx2: Avx2, work: W) -> W::Output {
    // SAFETY: `avx2` proves that the processor has what the function is compiled for.
    unsafe { run_with_avx2(avx2, work) }
}

#[target_feature(enable = "avx2,fma,f16c")]
fn run_with_avx2<W: Work>(avx2: Avx2, work: W) -> W::Output {
    work.run(avx2)
}

impl Simd for Avx2 {
    type Lanes = [__m256; 2];
    // Four registers of sums a row, of sixteen.
    const TOGETHER: usize = 2;

    #[inline(always)]
    fn fetch<T>(self, number: &T) {
        // SAFETY: `self` proves AVX2, and with it SSE; nothing is read but what the reference is to.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(std::ptr::from_ref(number).cast()) }
    }

    #[inline(always)]
    fn fetch_early<T>(self, number: &T) {
        // SAFETY: `self` proves AVX2, and with it SSE; nothing is read but what the reference is to.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(std::ptr::from_ref(number).cast()) }
    }

    #[inline(always)]
    fn splat(self, value: f32) -> Self::Lanes {
        // SAFETY: `self` proves AVX2.
        unsafe { [_mm256_set1_ps(value); 2] }
    }

    #[inline(always)]
    fn load(self, values: &[f32; LANES]) -> Self::Lanes {
        let at = values.as_ptr();
        // SAFETY: `self` proves AVX2; the two unaligned loads of eight float32 lie in the sixteen.
        unsafe { [_mm256_loadu_ps(at), _mm256_loadu_ps(at.add(8))] }
    }

    #[inline(always)]
    fn store(self, a: Self::Lanes, values: &mut [f32; LANES]) {
        let at = values.as_mut_ptr();
        // SAFETY: `self` proves AVX2; the two unaligned stores of eight float32 fill exactly the sixteen.
        unsafe {
            _mm256_storeu_ps(at, a[0]);
            _mm256_storeu_ps(at.add(8), a[1]);
        }
    }

    #[inline(always)]
    fn load_f32(self, numbers: &[f32; CHUNK]) -> [Self::Lanes; 2] {
        let (halves, _) = numbers.as_chunks::<LANES>();
        [self.load(&halves[0]), self.load(&halves[1])]
    }

    #[inline(always)]
    fn load_f16(self, numbers: &[f16; CHUNK]) -> [Self::Lanes; 2] {
        let at = numbers.as_ptr().cast::<__m128i>();
        // SAFETY: `self` proves F16C; the four unaligned loads of eight float16 are the chunk.
        unsafe {
            [
                [
                    _mm256_cvtph_ps(_mm_loadu_si128(at)),
                    _mm256_cvtph_ps(_mm_loadu_si128(at.add(1))),
                ],
                [
                    _mm256_cvtph_ps(_mm_loadu_si128(at.add(2))),
                    _mm256_cvtph_ps(_mm_loadu_si128(at.add(3))),
                ],
            ]
        }
    }

    /// A bfloat16 is the upper half of its float32: the even ones are shifted up, the odd ones stand right.
    #[inline(always)]
    fn load_bf16(self, numbers: &[bf16; CHUNK]) -> [Self::Lanes; 2] {
        let at = numbers.as_ptr().cast::<__m256i>();
        // SAFETY: `self` proves AVX2; the two unaligned loads of sixteen bfloat16 are the chunk.
        unsafe {
            let (first, second) = (_mm256_loadu_si256(at), _mm256_loadu_si256(at.add(1)));
            let upper = _mm256_set1_epi32(-0x1_0000);
            [
                [
                    _mm256_castsi256_ps(_mm256_slli_epi32::<16>(first)),
                    _mm256_castsi256_ps(_mm256_slli_epi32::<16>(second)),
                ],
                [
                    _mm256_castsi256_ps(_mm256_and_si256(first, upper)),
                    _mm256_castsi256_ps(_mm256_and_si256(second, upper)),
                ],
            ]
        }
    }

    #[inline(always)]
    fn load_i8(self, numbers: &[i8; CHUNK]) -> [Self::Lanes; 2] {
        let at = numbers.as_ptr();
        // SAFETY: `self` proves AVX2, and with it SSE2; the four unaligned loads of eight bytes are the chunk.
        unsafe {
            let [a, b] = [
                _mm_loadl_epi64(at.cast()),
                _mm_loadl_epi64(at.add(8).cast()),
            ];
            let [c, d] = [
                _mm_loadl_epi64(at.add(16).cast()),
                _mm_loadl_epi64(at.add(24).cast()),
            ];
            [
                [
                    _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(a)),
                    _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(b)),
                ],
                [
                    _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(c)),
                    _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(d)),
                ],
            ]
        }
    }

    #[inline(always)]
    fn add(self, a: Self::Lanes, b: Self::Lanes) -> Self::Lanes {
        // SAFETY: `self` proves AVX2.
        unsafe { [_mm256_add_ps(a[0], b[0]), _mm256_add_ps(a[1], b[1])] }
    }

    #[inline(always)]
    fn mul_add(self, a: Self::Lanes, b: Self::Lanes, c: Self::Lanes) -> Self::Lanes {
        // SAFETY: `self` proves FMA.
        unsafe {
            [
                _mm256_fmadd_ps(a[0], b[0], c[0]),
                _mm256_fmadd_ps(a[1], b[1], c[1]),
            ]
        }
    }

    #[inline(always)]
    fn sum(self, a: Self::Lanes) -> f32 {
        // SAFETY: `self` proves AVX2, and with it SSE3.
        unsafe {
            let eight = _mm256_add_ps(a[0], a[1]);
            let four = _mm_add_ps(
                _mm256_castps256_ps128(eight),
                _mm256_extractf128_ps::<1>(eight),
            );
            let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
        }
    }
}
