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
pub(super) mod portable;

use super::Top2;
use super::lanes::{self, Fault, Logit};
use crate::isa::{InstructionSet, Kind};

/// Token and margin of a row with these instructions.
pub(super) fn top2_margin<T: Logit>(isa: InstructionSet, logits: &[T]) -> Result<Top2, Fault> {
    match isa.kind() {
        Kind::Portable => lanes::top2_margin(portable::Portable, logits),
        #[cfg(target_arch = "x86_64")]
        Kind::Avx2(proof) => avx2::top2_margin(proof, logits),
        #[cfg(target_arch = "x86_64")]
        Kind::Avx512(proof) => avx512::top2_margin(proof, logits),
    }
}

/// Token of a row with these instructions, and whether its margin reaches `tau`.
pub(super) fn exits<T: Logit>(
    isa: InstructionSet,
    logits: &[T],
    tau: f64,
) -> Result<(usize, bool), Fault> {
    match isa.kind() {
        Kind::Portable => lanes::exits(portable::Portable, logits, tau),
        #[cfg(target_arch = "x86_64")]
        Kind::Avx2(proof) => avx2::exits(proof, logits, tau),
        #[cfg(target_arch = "x86_64")]
        Kind::Avx512(proof) => avx512::exits(proof, logits, tau),
    }
}
