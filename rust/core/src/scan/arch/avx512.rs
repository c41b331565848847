//! AVX-512: comparisons give masks, masks add and compress.

use super::avx2::prefetch;
use super::{Bits, Pass, Simd};
use crate::isa::Avx512;
use crate::samples::{BLOCK, Block, Lane};
use std::arch::x86_64::*;
use std::ops::Range;

pub(super) fn pass<L: Lane, P: Pass<L>>(proof: Avx512, pass: P) -> P::Found {
    // SAFETY: the proof exists, so the processor has the features.
    unsafe { pass_with_avx512(proof, pass) }
}

#[target_feature(enable = "avx512f,avx512bw,avx512cd,avx512dq,avx512vl,bmi1,bmi2,lzcnt,popcnt")]
fn pass_with_avx512<L: Lane, P: Pass<L>>(proof: Avx512, pass: P) -> P::Found {
    pass.run(proof)
}

impl<L: Lane> Simd<L> for Avx512 {
    #[inline(always)]
    fn count<const N: usize>(self, block: &Block<L>, edges: [L; N]) -> [L; N] {
        // SAFETY: `self` proves that the processor has the features.
        unsafe { Masked::count(block, edges) }
    }

    #[inline(always)]
    fn gather(self, block: &Block<L>, range: &Range<L>, list: &mut Vec<L::Packed>) {
        // SAFETY: as above.
        unsafe { Masked::compress(block, range, list) }
    }

    #[inline(always)]
    fn keep(self, block: &mut Block<L>, bits: &Bits) -> usize {
        // SAFETY: as above.
        unsafe { Masked::keep(block, bits) }
    }

    #[inline(always)]
    fn prefetch<T>(self, soon: &[T]) {
        prefetch(soon);
    }

    #[inline(always)]
    fn bits(self, bytes: &[u8; 64]) -> u64 {
        // SAFETY: as above; the load is the array.
        unsafe {
            let bytes = _mm512_loadu_si512(bytes.as_ptr().cast());
            _mm512_test_epi8_mask(bytes, _mm512_set1_epi8(1))
        }
    }
}

/// Counting and gathering under masks.
pub(crate) trait Masked: Sized {
    /// The summed weights of the samples at or above each edge.
    ///
    /// # Safety
    /// The processor must have AVX-512 F.
    unsafe fn count<const N: usize>(block: &Block<Self>, edges: [Self; N]) -> [Self; N]
    where
        Self: Lane;

    /// Append the block's samples in the range, packed.
    ///
    /// # Safety
    /// The processor must have AVX-512 F and POPCNT.
    unsafe fn compress(
        block: &Block<Self>,
        range: &Range<Self>,
        list: &mut Vec<<Self as Lane>::Packed>,
    ) where
        Self: Lane;

    /// Move the samples whose bit is set to the front; how many there are.
    ///
    /// # Safety
    /// The processor must have AVX-512 F and POPCNT.
    unsafe fn keep(block: &mut Block<Self>, bits: &Bits) -> usize
    where
        Self: Lane;
}

/// Write [`Masked`] for a lane: how many fit a register, how far a weight's flag is from the lowest bit, intrinsics.
macro_rules! masked {
    (
        $lane:ty, $packed:ty, $mask:ty, $lanes:literal, $flag:literal, $set1:ident, $not_less:ident, $less:ident,
        $add_masked:ident, $sum:ident, $sub:ident, $shift_left:ident, $shift_right:ident, $or:ident, $compress:ident
    ) => {
        impl Masked for $lane {
            #[inline(always)]
            unsafe fn count<const N: usize>(block: &Block<$lane>, edges: [$lane; N]) -> [$lane; N] {
                // SAFETY: the caller vouches for the features.  Loads stay within the block, whose end is a
                // multiple of the lanes.
                unsafe {
                    let edges = edges.map(|edge| $set1(edge));
                    let mut sums = [_mm512_setzero_si512(); N];
                    for at in (0..block.end()).step_by($lanes) {
                        let keys = _mm512_loadu_si512(block.keys.as_ptr().add(at).cast());
                        let weights = _mm512_loadu_si512(block.weights.as_ptr().add(at).cast());
                        for (sum, edge) in sums.iter_mut().zip(edges) {
                            *sum = $add_masked(*sum, $not_less(keys, edge), *sum, weights);
                        }
                    }
                    sums.map(|sum| $sum(sum))
                }
            }

            #[inline(always)]
            unsafe fn compress(
                block: &Block<$lane>,
                range: &Range<$lane>,
                list: &mut Vec<$packed>,
            ) {
                list.reserve(BLOCK);
                let mut len = list.len();
                // SAFETY: the caller vouches for the features.  Loads stay within the block, whose end is a
                // multiple of the lanes.  Each of the stores writes all lanes from `len`, which has grown by at
                // most that many for every earlier one, so the last one ends within the reserved BLOCK; lanes
                // below `len` have been written.
                unsafe {
                    let (low, high) = ($set1(range.start), $set1(range.end));
                    for at in (0..block.end()).step_by($lanes) {
                        let keys = _mm512_loadu_si512(block.keys.as_ptr().add(at).cast());
                        let weights = _mm512_loadu_si512(block.weights.as_ptr().add(at).cast());
                        let inside = $not_less(keys, low) & $less(keys, high);
                        let offset = $shift_left::<1>($sub(keys, low));
                        let packed = $or(offset, $shift_right::<$flag>(weights));
                        // Into a register and from there: compressing into memory is slow on some processors.
                        let front = $compress(inside, packed);
                        _mm512_storeu_si512(list.as_mut_ptr().add(len).cast(), front);
                        len += inside.count_ones() as usize;
                    }
                    list.set_len(len);
                }
            }

            #[inline(always)]
            unsafe fn keep(block: &mut Block<$lane>, bits: &Bits) -> usize {
                let mut count = 0;
                // SAFETY: the caller vouches for the features.  Loads stay within the block, whose length is a
                // multiple of the lanes.  Stores write all lanes from `count`, which is no more than `at`.
                unsafe {
                    let keys = block.keys.as_mut_ptr();
                    let weights = block.weights.as_mut_ptr();
                    for at in (0..BLOCK).step_by($lanes) {
                        let kept = (bits[at / 64] >> (at % 64)) as $mask;
                        let front = $compress(kept, _mm512_loadu_si512(keys.add(at).cast()));
                        _mm512_storeu_si512(keys.add(count).cast(), front);
                        let front = $compress(kept, _mm512_loadu_si512(weights.add(at).cast()));
                        _mm512_storeu_si512(weights.add(count).cast(), front);
                        count += kept.count_ones() as usize;
                    }
                }
                count
            }
        }
    };
}

masked!(
    i32,
    u32,
    u16,
    16,
    16,
    _mm512_set1_epi32,
    _mm512_cmpge_epi32_mask,
    _mm512_cmplt_epi32_mask,
    _mm512_mask_add_epi32,
    _mm512_reduce_add_epi32,
    _mm512_sub_epi32,
    _mm512_slli_epi32,
    _mm512_srli_epi32,
    _mm512_or_si512,
    _mm512_maskz_compress_epi32
);
masked!(
    i64,
    u64,
    u8,
    8,
    32,
    _mm512_set1_epi64,
    _mm512_cmpge_epi64_mask,
    _mm512_cmplt_epi64_mask,
    _mm512_mask_add_epi64,
    _mm512_reduce_add_epi64,
    _mm512_sub_epi64,
    _mm512_slli_epi64,
    _mm512_srli_epi64,
    _mm512_or_si512,
    _mm512_maskz_compress_epi64
);
