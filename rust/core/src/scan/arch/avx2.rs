//! AVX2: the compiler vectorises the counting by itself; moving a few lanes together it does not.

use super::{Bits, Pass, Simd};
use crate::isa::Avx2;
use crate::samples::{BLOCK, Block, Lane};
use std::arch::x86_64::*;
use std::ops::Range;

pub(super) fn pass<L: Lane, P: Pass<L>>(proof: Avx2, pass: P) -> P::Found {
    // SAFETY: the proof exists, so the processor has the features.
    unsafe { pass_with_avx2(proof, pass) }
}

#[target_feature(enable = "avx2,bmi1,bmi2,lzcnt,popcnt")]
fn pass_with_avx2<L: Lane, P: Pass<L>>(proof: Avx2, pass: P) -> P::Found {
    pass.run(proof)
}

impl<L: Lane> Simd<L> for Avx2 {
    #[inline(always)]
    fn gather(self, block: &Block<L>, range: &Range<L>, list: &mut Vec<L::Packed>) {
        // SAFETY: `self` proves that the processor has the features.
        unsafe { Compress::compress(block, range, list) }
    }

    #[inline(always)]
    fn keep(self, block: &mut Block<L>, bits: &Bits) -> usize {
        // SAFETY: as above.
        unsafe { Compress::keep(block, bits) }
    }

    #[inline(always)]
    fn prefetch<T>(self, soon: &[T]) {
        prefetch(soon);
    }

    #[inline(always)]
    fn bits(self, bytes: &[u8; 64]) -> u64 {
        // SAFETY: as above; the loads are the halves of the array.
        let half = |at: usize| unsafe {
            let bytes = _mm256_loadu_si256(bytes.as_ptr().add(at).cast());
            // The lowest bit of each byte becomes its highest; what moves over from its neighbour stays below.
            _mm256_movemask_epi8(_mm256_slli_epi16::<7>(bytes)) as u32
        };
        u64::from(half(0)) | u64::from(half(32)) << 32
    }
}

/// Fetch every cache line of a slice.
#[inline(always)]
pub(super) fn prefetch<T>(soon: &[T]) {
    let start = soon.as_ptr().cast::<i8>();
    for at in (0..size_of_val(soon)).step_by(64) {
        // SAFETY: every x86-64 processor has the instruction; the address is within the slice, and nothing is read.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(start.add(at)) };
    }
}

/// Gathering with vector instructions.
pub(crate) trait Compress: Sized {
    /// Append the block's samples in the range, packed.
    ///
    /// # Safety
    /// The processor must have AVX2 and POPCNT.
    unsafe fn compress(
        block: &Block<Self>,
        range: &Range<Self>,
        list: &mut Vec<<Self as Lane>::Packed>,
    ) where
        Self: Lane;

    /// Move the samples whose bit is set to the front; how many there are.
    ///
    /// # Safety
    /// The processor must have AVX2 and POPCNT.
    unsafe fn keep(block: &mut Block<Self>, bits: &Bits) -> usize
    where
        Self: Lane;
}

/// For each mask of eight lanes, the lanes that are set, moved to the front.
static FRONT_OF_8: [[u32; 8]; 256] = {
    let mut table = [[0; 8]; 256];
    let mut mask = 0;
    while mask < 256 {
        let (mut lane, mut front) = (0, 0);
        while lane < 8 {
            if mask >> lane & 1 == 1 {
                table[mask][front] = lane as u32;
                front += 1;
            }
            lane += 1;
        }
        mask += 1;
    }
    table
};

/// The same for four lanes of 64 bits, as pairs of 32-bit lanes.
static FRONT_OF_4: [[u32; 8]; 16] = {
    let mut table = [[0; 8]; 16];
    let mut mask = 0;
    while mask < 16 {
        let (mut lane, mut front) = (0, 0);
        while lane < 4 {
            if mask >> lane & 1 == 1 {
                table[mask][front] = 2 * lane as u32;
                table[mask][front + 1] = 2 * lane as u32 + 1;
                front += 2;
            }
            lane += 1;
        }
        mask += 1;
    }
    table
};

impl Compress for i32 {
    #[inline(always)]
    unsafe fn compress(block: &Block<i32>, range: &Range<i32>, list: &mut Vec<u32>) {
        list.reserve(BLOCK);
        let mut len = list.len();
        // SAFETY: the caller vouches for the features.  Loads stay within the block, whose end is a multiple of
        // eight.  Each of the BLOCK / 8 stores writes eight lanes from `len`, which has grown by at most eight for
        // every earlier one, so the last one ends within the reserved BLOCK; lanes below `len` have been written.
        unsafe {
            let (low, high) = (_mm256_set1_epi32(range.start), _mm256_set1_epi32(range.end));
            for at in (0..block.end()).step_by(8) {
                let keys = _mm256_loadu_si256(block.keys.as_ptr().add(at).cast());
                let weights = _mm256_loadu_si256(block.weights.as_ptr().add(at).cast());
                let inside = _mm256_andnot_si256(
                    _mm256_cmpgt_epi32(low, keys),
                    _mm256_cmpgt_epi32(high, keys),
                );
                let mask = _mm256_movemask_ps(_mm256_castsi256_ps(inside)) as usize;
                let offset = _mm256_slli_epi32(_mm256_sub_epi32(keys, low), 1);
                let packed = _mm256_or_si256(offset, _mm256_srli_epi32(weights, 16));
                let front = _mm256_loadu_si256(FRONT_OF_8[mask].as_ptr().cast());
                let moved = _mm256_permutevar8x32_epi32(packed, front);
                _mm256_storeu_si256(list.as_mut_ptr().add(len).cast(), moved);
                len += mask.count_ones() as usize;
            }
            list.set_len(len);
        }
    }

    #[inline(always)]
    unsafe fn keep(block: &mut Block<i32>, bits: &Bits) -> usize {
        let mut count = 0;
        // SAFETY: the caller vouches for the features.  Loads stay within the block, whose length is a multiple of
        // eight.  Stores write eight lanes from `count`, which is no more than `at`.
        unsafe {
            let keys = block.keys.as_mut_ptr();
            let weights = block.weights.as_mut_ptr();
            for at in (0..BLOCK).step_by(8) {
                let kept = (bits[at / 64] >> (at % 64)) as usize & 0xff;
                let front = _mm256_loadu_si256(FRONT_OF_8[kept].as_ptr().cast());
                let moved = |lanes: *mut i32| {
                    _mm256_permutevar8x32_epi32(_mm256_loadu_si256(lanes.add(at).cast()), front)
                };
                _mm256_storeu_si256(keys.add(count).cast(), moved(keys));
                _mm256_storeu_si256(weights.add(count).cast(), moved(weights));
                count += kept.count_ones() as usize;
            }
        }
        count
    }
}

impl Compress for i64 {
    #[inline(always)]
    unsafe fn compress(block: &Block<i64>, range: &Range<i64>, list: &mut Vec<u64>) {
        list.reserve(BLOCK);
        let mut len = list.len();
        // SAFETY: as for i32, with four lanes for eight.
        unsafe {
            let (low, high) = (
                _mm256_set1_epi64x(range.start),
                _mm256_set1_epi64x(range.end),
            );
            for at in (0..block.end()).step_by(4) {
                let keys = _mm256_loadu_si256(block.keys.as_ptr().add(at).cast());
                let weights = _mm256_loadu_si256(block.weights.as_ptr().add(at).cast());
                let inside = _mm256_andnot_si256(
                    _mm256_cmpgt_epi64(low, keys),
                    _mm256_cmpgt_epi64(high, keys),
                );
                let mask = _mm256_movemask_pd(_mm256_castsi256_pd(inside)) as usize;
                let offset = _mm256_slli_epi64(_mm256_sub_epi64(keys, low), 1);
                let packed = _mm256_or_si256(offset, _mm256_srli_epi64(weights, 32));
                let front = _mm256_loadu_si256(FRONT_OF_4[mask].as_ptr().cast());
                let moved = _mm256_permutevar8x32_epi32(packed, front);
                _mm256_storeu_si256(list.as_mut_ptr().add(len).cast(), moved);
                len += mask.count_ones() as usize;
            }
            list.set_len(len);
        }
    }

    #[inline(always)]
    unsafe fn keep(block: &mut Block<i64>, bits: &Bits) -> usize {
        let mut count = 0;
        // SAFETY: as for i32, with four lanes for eight.
        unsafe {
            let keys = block.keys.as_mut_ptr();
            let weights = block.weights.as_mut_ptr();
            for at in (0..BLOCK).step_by(4) {
                let kept = (bits[at / 64] >> (at % 64)) as usize & 0xf;
                let front = _mm256_loadu_si256(FRONT_OF_4[kept].as_ptr().cast());
                let moved = |lanes: *mut i64| {
                    _mm256_permutevar8x32_epi32(_mm256_loadu_si256(lanes.add(at).cast()), front)
                };
                _mm256_storeu_si256(keys.add(count).cast(), moved(keys));
                _mm256_storeu_si256(weights.add(count).cast(), moved(weights));
                count += kept.count_ones() as usize;
            }
        }
        count
    }
}
