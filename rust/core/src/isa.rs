//! The instruction sets the core is compiled to, and which of them this processor has.
//!
//! The one place that asks the processor.  Each set beyond what every processor can do is a proof: a value exists
//! only where its features do, which is what makes the calls into functions compiled for them sound.

/// The instructions a computation uses; all of them give the same result.  The processor has those of every value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct InstructionSet(Kind);

/// The sets, for those who have a function for each.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Portable,
    #[cfg(target_arch = "x86_64")]
    Avx2(Avx2),
    #[cfg(target_arch = "x86_64")]
    Avx512(Avx512),
}

/// Every instruction set this processor has, the fastest last; a list of them would be an allocation a decision.
fn kinds() -> impl Iterator<Item = InstructionSet> {
    #[cfg(target_arch = "x86_64")]
    let more = [
        Avx2::detect().map(Kind::Avx2),
        Avx512::detect().map(Kind::Avx512),
    ];
    #[cfg(not(target_arch = "x86_64"))]
    let more: [Option<Kind>; 0] = [];
    [Some(Kind::Portable)]
        .into_iter()
        .chain(more)
        .flatten()
        .map(InstructionSet)
}

impl InstructionSet {
    /// Every instruction set this processor has, the fastest last.
    pub fn available() -> Vec<Self> {
        kinds().collect()
    }

    /// The fastest.
    pub fn best() -> Self {
        kinds().last().unwrap_or(Self(Kind::Portable))
    }

    /// Its name.
    pub fn name(self) -> &'static str {
        match self.0 {
            Kind::Portable => "portable",
            #[cfg(target_arch = "x86_64")]
            Kind::Avx2(_) => "avx2",
            #[cfg(target_arch = "x86_64")]
            Kind::Avx512(_) => "avx512",
        }
    }

    /// Whether it has instructions for vectors.
    pub fn has_vectors(self) -> bool {
        self.0 != Kind::Portable
    }

    pub(crate) fn kind(self) -> Kind {
        self.0
    }
}

/// A proof that the processor has AVX2, BMI1, BMI2, F16C, FMA, LZCNT and POPCNT.
#[cfg(target_arch = "x86_64")]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Avx2(());

#[cfg(target_arch = "x86_64")]
impl Avx2 {
    fn detect() -> Option<Self> {
        let all = is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("bmi1")
            && is_x86_feature_detected!("bmi2")
            && is_x86_feature_detected!("f16c")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("lzcnt")
            && is_x86_feature_detected!("popcnt");
        all.then_some(Self(()))
    }
}

/// A proof that the processor has, beside what [`Avx2`] stands for, AVX-512 F, BW, CD, DQ and VL.
#[cfg(target_arch = "x86_64")]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Avx512(());

#[cfg(target_arch = "x86_64")]
impl Avx512 {
    fn detect() -> Option<Self> {
        let all = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512cd")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl");
        (all && Avx2::detect().is_some()).then_some(Self(()))
    }
}
