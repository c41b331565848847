//! The same scan compiled for each instruction set, and the one step that needs intrinsics.

#[cfg(target_arch = "x86_64")]
#[expect(
    unsafe_code,
    reason = "intrinsics, each behind a proof that the processor has them"
)]
mod avx2;
mod portable;

use super::{Plan, Survey};
use crate::isa::{InstructionSet, Kind};
use crate::samples::Samples;
#[cfg(target_arch = "x86_64")]
pub(crate) use avx2::Compress;
#[cfg(not(target_arch = "x86_64"))]
pub(crate) use portable::Compress;
use std::ops::Range;
use std::sync::atomic::AtomicUsize;

/// Scan a part of the samples with these instructions.
pub(super) fn scan<X: Samples>(
    isa: InstructionSet,
    samples: &X,
    part: Range<usize>,
    plan: &Plan<X::Lane>,
    gathered: &AtomicUsize,
) -> Survey<X::Lane> {
    match isa.kind() {
        Kind::Portable => super::scan(samples, part, plan, gathered, portable::compress),
        #[cfg(target_arch = "x86_64")]
        Kind::Avx2(proof) => avx2::scan(proof, samples, part, plan, gathered),
        #[cfg(target_arch = "x86_64")]
        Kind::Avx512(proof) => avx2::scan(proof.avx2(), samples, part, plan, gathered),
    }
}
