//! The instruction sets: how sixteen float32 lanes are held and worked on.  The only unsafe code of the module.

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

use super::lanes::Simd;
use crate::isa::{InstructionSet, Kind};

/// Something to compute with whatever instructions there are.
pub(super) trait Work {
    /// What comes out.
    type Output;

    /// Compute it; inlined into a function that is compiled for the instructions.
    fn run<S: Simd>(self, simd: S) -> Self::Output;
}

/// Compute it with these instructions.
pub(super) fn run<W: Work>(isa: InstructionSet, work: W) -> W::Output {
    match isa.kind() {
        Kind::Portable => work.run(portable::Portable),
        #[cfg(target_arch = "x86_64")]
        Kind::Avx2(proof) => avx2::run(proof, work),
        #[cfg(target_arch = "x86_64")]
        Kind::Avx512(proof) => avx512::run(proof, work),
    }
}
