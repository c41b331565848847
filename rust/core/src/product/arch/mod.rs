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

use super::Part;
use super::lanes::{self, Chunk, Number};
use crate::isa::{InstructionSet, Kind};

/// Rows as these instructions take them.
pub(super) fn widen<T: Number>(isa: InstructionSet, rows: &[T], width: usize) -> Vec<Chunk> {
    match isa.kind() {
        Kind::Portable => lanes::widen(portable::Portable, rows, width),
        #[cfg(target_arch = "x86_64")]
        Kind::Avx2(proof) => avx2::widen(proof, rows, width),
        #[cfg(target_arch = "x86_64")]
        Kind::Avx512(proof) => avx512::widen(proof, rows, width),
    }
}

/// The outputs of a part with these instructions.
pub(super) fn multiply<T: Number>(
    isa: InstructionSet,
    part: Part<'_, T>,
    rows: &[Chunk],
    width: usize,
) {
    match isa.kind() {
        Kind::Portable => lanes::multiply(portable::Portable, part, rows, width),
        #[cfg(target_arch = "x86_64")]
        Kind::Avx2(proof) => avx2::multiply(proof, part, rows, width),
        #[cfg(target_arch = "x86_64")]
        Kind::Avx512(proof) => avx512::multiply(proof, part, rows, width),
    }
}
