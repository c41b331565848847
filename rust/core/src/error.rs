//! What can be wrong with an input: one variant, one sentence.

use std::fmt;

/// Everything the core refuses.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum Error {
    /// No samples were given.
    Empty {
        /// The argument's name.
        argument: &'static str,
    },
    /// Two arguments that pair up element by element differ in length.
    LengthMismatch {
        /// How many scores there are.
        scores: usize,
        /// How many correctness flags there are.
        correct: usize,
    },
    /// The samples cannot be divided into rows of one length, one row a head.
    UnevenHeads {
        /// How many scores there are.
        scores: usize,
        /// How many heads they should belong to.
        heads: usize,
    },
    /// A score is NaN or infinite.
    NotFinite {
        /// Where the first such score stands.
        position: Position,
        /// The score.
        value: f64,
    },
    /// A correctness flag is neither 0 nor 1.
    NotALabel {
        /// Where the first such flag stands.
        position: Position,
        /// The flag.
        value: u8,
    },
    /// A target accuracy is NaN or outside [0, 1].
    NotATarget {
        /// Its index among the targets.
        index: usize,
        /// The target.
        value: f64,
    },
    /// A failure probability is not strictly between 0 and 1.
    NotALevel {
        /// The probability.
        value: f64,
    },
    /// More heads than a budget can be shared among.
    TooManyHeads {
        /// How many heads there are.
        heads: usize,
        /// How many there may be.
        most: usize,
    },
    /// Scores outside [0, 1] where thresholds are for scores inside.
    OffLattice,
    /// Groups do not go with the samples.
    NotGroups,
    /// A logit is NaN or +inf.
    NotALogit {
        /// Its row, 0 where there is only one.
        row: usize,
        /// Its index in the row.
        index: usize,
        /// The logit.
        value: f32,
    },
    /// Every logit of a row is -inf.
    AllMasked {
        /// The row, 0 where there is only one.
        row: usize,
    },
    /// The caller asked to stop before the result was ready.
    Interrupted,
}

/// Where a sample stands: its index, after its head's where there are several heads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Position {
    /// The row, where the scores have rows.
    pub head: Option<usize>,
    /// The index in the row.
    pub index: usize,
}

/// A result whose error is the core's.
pub type Result<T> = std::result::Result<T, Error>;

impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.head {
            Some(head) => write!(f, "[{head}, {}]", self.index),
            None => write!(f, "[{}]", self.index),
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Empty { argument } => write!(f, "{argument} is empty: give at least one value"),
            Self::LengthMismatch { scores, correct } => write!(
                f,
                "scores has length {scores} but correct has length {correct}: make them equal"
            ),
            Self::UnevenHeads { scores, heads } => write!(
                f,
                "scores has length {scores}, which {heads} heads cannot share evenly"
            ),
            Self::NotFinite { position, value } => {
                let name = match value {
                    value if value.is_nan() => "nan",
                    value if value.is_sign_negative() => "-inf",
                    _ => "inf",
                };
                write!(
                    f,
                    "scores must be finite, but scores{position} is {name}: repair or remove it"
                )
            }
            Self::NotALabel { position, value } => write!(
                f,
                "correct must hold only 0 and 1, but correct{position} is {value}"
            ),
            Self::NotATarget { index, value } => {
                write!(f, "eps must lie in [0, 1], but eps[{index}] is {value}")
            }
            Self::NotALevel { value } => {
                write!(f, "delta must lie between 0 and 1, but it is {value}")
            }
            Self::TooManyHeads { heads, most } => write!(
                f,
                "scores has {heads} heads, but mode 'budget' takes at most {most}: leave some out"
            ),
            Self::OffLattice => write!(
                f,
                "scores must lie in [0, 1] for the default thresholds: give grid=, thresholds fixed before the labels were seen"
            ),
            Self::NotGroups => write!(
                f,
                "groups must hold one group number for every sample: give an array of the samples' length"
            ),
            Self::Interrupted => write!(f, "interrupted before the result was ready"),
            Self::NotALogit { row, index, value } => {
                let name = if value.is_nan() { "nan" } else { "inf" };
                write!(
                    f,
                    "logits must be finite or -inf, but row {row} holds {name} at index {index}: repair it"
                )
            }
            Self::AllMasked { row } => write!(
                f,
                "logits must leave a token to choose, but row {row} is -inf throughout: unmask one"
            ),
        }
    }
}

impl std::error::Error for Error {}
