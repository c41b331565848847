//! The instruction sets: how sixteen float32 lanes are held and worked on.  The only unsafe code of the module.

#[cfg(target_arch = "x86_64")]
#[expect(
    unsafe_code,
    reason = "intrinsics, each behind a proof that the processor has them"
)]
mod avx2;
mod portable;

use super::Top2;
use super::lanes::{self, Fault, Logit};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Portable,
    #[cfg(target_arch = "x86_64")]
    Avx2(avx2::Avx2),
}

impl Kind {
    /// What this processor can run, the fastest last.
    pub(super) fn available() -> Vec<Self> {
        #[allow(
            unused_mut,
            reason = "only some targets have more than the portable form"
        )]
        let mut kinds = vec![Self::Portable];
        #[cfg(target_arch = "x86_64")]
        kinds.extend(avx2::Avx2::detect().map(Self::Avx2));
        kinds
    }

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Portable => "portable",
            #[cfg(target_arch = "x86_64")]
            Self::Avx2(_) => "avx2",
        }
    }

    pub(super) fn top2_margin<T: Logit>(self, logits: &[T]) -> Result<Top2, Fault> {
        match self {
            Self::Portable => lanes::top2_margin(portable::Portable, logits),
            #[cfg(target_arch = "x86_64")]
            Self::Avx2(avx2) => avx2.top2_margin(logits),
        }
    }
}
