//! The instruction sets: the same scan compiled for each, and the one step that needs intrinsics.

#[cfg(target_arch = "x86_64")]
#[expect(
    unsafe_code,
    reason = "intrinsics, each behind a proof that the processor has them"
)]
mod avx2;
mod portable;

use super::{Plan, Survey, scan};
use crate::samples::Samples;
#[cfg(target_arch = "x86_64")]
pub(crate) use avx2::Compress;
#[cfg(not(target_arch = "x86_64"))]
pub(crate) use portable::Compress;
use std::ops::Range;
use std::sync::atomic::AtomicUsize;

/// The instructions a search is compiled to; a value exists only where the processor has them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct InstructionSet(Kind);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Portable,
    #[cfg(target_arch = "x86_64")]
    Avx2(avx2::Avx2),
}

impl InstructionSet {
    /// Every instruction set this processor can run, the fastest last.
    pub fn available() -> Vec<Self> {
        let portable = std::iter::once(Kind::Portable);
        #[cfg(target_arch = "x86_64")]
        let kinds = portable.chain(avx2::Avx2::detect().map(Kind::Avx2));
        #[cfg(not(target_arch = "x86_64"))]
        let kinds = portable;
        kinds.map(Self).collect()
    }

    /// The fastest.
    pub fn best() -> Self {
        Self::available().pop().unwrap_or(Self(Kind::Portable))
    }

    /// Its name.
    pub fn name(self) -> &'static str {
        match self.0 {
            Kind::Portable => "portable",
            #[cfg(target_arch = "x86_64")]
            Kind::Avx2(_) => "avx2",
        }
    }

    pub(super) fn scan<X: Samples>(
        self,
        samples: &X,
        part: Range<usize>,
        plan: &Plan<X::Lane>,
        gathered: &AtomicUsize,
    ) -> Survey<X::Lane> {
        match self.0 {
            Kind::Portable => scan(samples, part, plan, gathered, portable::compress),
            #[cfg(target_arch = "x86_64")]
            Kind::Avx2(avx2) => avx2.scan(samples, part, plan, gathered),
        }
    }
}
