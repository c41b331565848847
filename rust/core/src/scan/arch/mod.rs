//! The same pass compiled for each instruction set, and the steps that need intrinsics.

#[cfg(target_arch = "x86_64")]
#[expect(
    unsafe_code,
    reason = "intrinsics, each behind a proof that the processor has them"
)]
mod avx2;
#[cfg(target_arch = "x86_64")]
#[expect(
    unsafe_code,
    reason = "intrinsics, each behind a proof that the processor has them"
)]
mod avx512;
mod portable;

use crate::isa::{InstructionSet, Kind};
use crate::samples::{BLOCK, Block, Lane};
use std::ops::Range;

/// What a pass does with a block beyond what the compiler turns into vector instructions by itself.
pub(crate) trait Simd<L: Lane>: Copy {
    /// The summed weights of the samples at or above each edge.
    #[inline(always)]
    fn count<const N: usize>(self, block: &Block<L>, edges: [L; N]) -> [L; N] {
        let mut sums = [L::ZERO; N];
        let end = block.end();
        for (&key, &weight) in block.keys[..end].iter().zip(&block.weights[..end]) {
            for (sum, edge) in sums.iter_mut().zip(edges) {
                *sum = sum.add(if key >= edge { weight } else { L::ZERO });
            }
        }
        sums
    }

    /// Append the samples in the range, packed.
    fn gather(self, block: &Block<L>, range: &Range<L>, list: &mut Vec<L::Packed>);

    /// Move the samples whose bit is set to the front, in their order; how many there are.
    fn keep(self, block: &mut Block<L>, bits: &Bits) -> usize;

    /// Fetch what will be read soon.
    #[inline(always)]
    fn prefetch<T>(self, _: &[T]) {}

    /// The lowest bit of each byte.
    #[inline(always)]
    fn bits(self, bytes: &[u8; 64]) -> u64 {
        let mut found = 0;
        for (place, eight) in bytes.as_chunks::<8>().0.iter().enumerate() {
            // Byte i moves to bit 56 + i; no two meet, so nothing carries.
            let ones = u64::from_le_bytes(*eight) & 0x0101_0101_0101_0101;
            found |= (ones.wrapping_mul(0x0102_0408_1020_4080) >> 56) << (8 * place);
        }
        found
    }
}

/// A bit for each sample of a block.
pub(crate) type Bits = [u64; BLOCK / 64];

/// A pass over a part of the samples, compiled anew for each instruction set.
pub(crate) trait Pass<L: Lane> {
    type Found;

    /// Always inlined, so that it is compiled with the caller's instructions.
    fn run(self, simd: impl Simd<L>) -> Self::Found;
}

/// Make a pass with these instructions.
pub(crate) fn pass<L: Lane, P: Pass<L>>(isa: InstructionSet, pass: P) -> P::Found {
    match isa.kind() {
        Kind::Portable => pass.run(portable::Portable),
        #[cfg(target_arch = "x86_64")]
        Kind::Avx2(proof) => avx2::pass(proof, pass),
        #[cfg(target_arch = "x86_64")]
        Kind::Avx512(proof) => avx512::pass(proof, pass),
    }
}

/// What every instruction set asks of a lane.
#[cfg(target_arch = "x86_64")]
pub(crate) trait Vectors: avx2::Compress + avx512::Masked {}
#[cfg(target_arch = "x86_64")]
impl<L: avx2::Compress + avx512::Masked> Vectors for L {}

/// Nothing is asked where there are no intrinsics.
#[cfg(not(target_arch = "x86_64"))]
pub(crate) trait Vectors {}
#[cfg(not(target_arch = "x86_64"))]
impl<L> Vectors for L {}
