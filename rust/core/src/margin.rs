//! The exit decision of one step: the most likely token and the top-2 softmax margin p(1) - p(2).
//!
//! `margin = (1 - exp(l2 - l1)) / (1 + sum of exp(l_i - l1) over every i but the token)`, in two passes over
//! the logits: the two largest, then the sum.  [`lanes`] holds the algorithm, once, for every instruction set;
//! every instruction set returns the same bits.
//!
//! Against exact arithmetic the margin is off by at most 2e-7, and by at most 6e-7 of itself where it is a
//! normal float32, for rows of up to 300 000 logits.  The sum S' over all logits but the token's is off by at
//! most 5.2e-7 of itself: 1.9e-7 for the polynomial and its rounding, 0.9e-7 for ln 2 as a float32, 2.4e-7 for
//! four float32 additions in a row.  It weighs S' / (1 + S')^2 <= 1/4 in the margin; 3e-8 for rounding the
//! result and exp(-32) for each logit below the cut-off come on top.

mod arch;
mod lanes;

pub use lanes::Logit;

use crate::error::{Error, Result};
use crate::isa::InstructionSet;

/// The most likely token of a row and how far it is ahead.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Top2 {
    /// The lowest index that holds the maximum.
    pub token: usize,
    /// p(1) - p(2), in [0, 1].
    pub margin: f32,
}

/// The most likely token of one row of logits and its margin.
///
/// # Errors
/// An empty row, NaN or +inf in it, nothing but -inf.
pub fn top2_margin<T: Logit>(isa: InstructionSet, logits: &[T]) -> Result<Top2> {
    arch::top2_margin(isa, logits).map_err(|fault| fault.in_row(0))
}

/// [`top2_margin`] of every row of a (B, V) matrix; `tokens` and `margins` have length B and B divides the logits.
///
/// # Errors
/// As [`top2_margin`]; the row that is named is the first with a fault.
///
/// # Panics
/// If the lengths do not fit together.
pub fn top2_margin_rows<T: Logit>(
    isa: InstructionSet,
    logits: &[T],
    tokens: &mut [i64],
    margins: &mut [f32],
) -> Result<()> {
    let rows = tokens.len();
    assert!(rows > 0 && margins.len() == rows && logits.len().is_multiple_of(rows));
    let vocabulary = logits.len() / rows;
    if vocabulary == 0 {
        return Err(Error::Empty { argument: "logits" });
    }
    let outputs = tokens.iter_mut().zip(margins);
    for (index, (row, (token, margin))) in logits.chunks_exact(vocabulary).zip(outputs).enumerate()
    {
        let top2 = arch::top2_margin(isa, row).map_err(|fault| fault.in_row(index))?;
        *token = top2.token as i64;
        *margin = top2.margin;
    }
    Ok(())
}
