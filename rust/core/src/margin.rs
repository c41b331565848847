//! The exit decision of one step: the most likely token and the top-2 softmax margin p(1) - p(2).
//!
//! `margin = (1 - exp(l2 - l1)) / (1 + sum of exp(l_i - l1) over every i but the token)`, in one pass over the
//! logits where the yes or no is not enough, and in two, the largest and then the sum, where it may be.  [`lanes`]
//! holds the algorithm, once, for every instruction set; every instruction set returns the same bits.
//!
//! Against exact arithmetic the margin is off by at most 2e-7, and by at most 6e-7 of itself where it is a
//! normal float32, for rows of up to 300 000 logits.  The sum S' over all logits but the token's is off by at
//! most 5.2e-7 of itself: 1.9e-7 for the polynomial and its rounding, 0.9e-7 for ln 2 as a float32, 2.4e-7 for
//! four float32 additions in a row.  It weighs S' / (1 + S')^2 <= 1/4 in the margin; 3e-8 for rounding the
//! result and exp(-48) for each logit below the floor come on top.

mod arch;
mod lanes;

pub use lanes::Logit;

use crate::error::{Error, Result};
use crate::isa::InstructionSet;
use crate::run::Run;

/// Fewer logits are left to the calling thread: starting another takes as long.
const WORTH_A_THREAD: usize = 1 << 18;

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

/// The most likely token of one row of logits and whether its margin reaches `tau`, as [`top2_margin`] finds it.
///
/// # Errors
/// As [`top2_margin`].
pub fn exits<T: Logit>(isa: InstructionSet, logits: &[T], tau: f64) -> Result<(usize, bool)> {
    arch::exits(isa, logits, tau).map_err(|fault| fault.in_row(0))
}

/// [`top2_margin`] of every row of a (B, V) matrix; `tokens` and `margins` have length B, which divides the logits.
///
/// # Errors
/// As [`top2_margin`]; the row that is named is the first with a fault.
///
/// # Panics
/// If the lengths do not fit together.
pub fn top2_margin_rows<T: Logit>(
    logits: &[T],
    tokens: &mut [i64],
    margins: &mut [f32],
    run: &Run<'_>,
) -> Result<()> {
    let isa = run.instruction_set();
    rows(logits, tokens, margins, run, |row| {
        arch::top2_margin(isa, row).map(|top2| (top2.token, top2.margin))
    })
}

/// [`exits`] of every row of a (B, V) matrix.
///
/// # Errors
/// As [`top2_margin_rows`].
///
/// # Panics
/// If the lengths do not fit together.
pub fn exits_rows<T: Logit>(
    logits: &[T],
    tau: f64,
    tokens: &mut [i64],
    exits: &mut [bool],
    run: &Run<'_>,
) -> Result<()> {
    let isa = run.instruction_set();
    rows(logits, tokens, exits, run, |row| arch::exits(isa, row, tau))
}

/// What `decide` finds for each row; on several threads where that is worth it.
fn rows<T: Logit, R: Send>(
    logits: &[T],
    tokens: &mut [i64],
    results: &mut [R],
    run: &Run<'_>,
    decide: impl Fn(&[T]) -> std::result::Result<(usize, R), lanes::Fault> + Sync,
) -> Result<()> {
    let count = tokens.len();
    assert!(results.len() == count);
    if count == 0 || logits.is_empty() {
        return Err(Error::Empty { argument: "logits" });
    }
    assert!(logits.len().is_multiple_of(count));
    let vocabulary = logits.len() / count;
    let at_a_time = if logits.len() < 2 * WORTH_A_THREAD || run.threads() == 1 {
        count
    } else {
        (WORTH_A_THREAD / 4).div_ceil(vocabulary)
    };
    let decide_from = |first: usize, logits: &[T], tokens: &mut [i64], results: &mut [R]| {
        let outputs = tokens.iter_mut().zip(results);
        for (row, (logits, (token, result))) in
            logits.chunks_exact(vocabulary).zip(outputs).enumerate()
        {
            let index = first + row;
            let (found, value) = decide(logits).map_err(|fault| fault.in_row(index))?;
            (*token, *result) = (found as i64, value);
        }
        Ok(())
    };
    if at_a_time == count {
        // Without the lists of parts: a step of decoding allocates nothing here.
        return decide_from(0, logits, tokens, results);
    }
    let parts = logits
        .chunks(at_a_time * vocabulary)
        .zip(tokens.chunks_mut(at_a_time))
        .zip(results.chunks_mut(at_a_time))
        .enumerate();
    let done = run.map(parts.collect(), |(part, ((logits, tokens), results))| {
        decide_from(part * at_a_time, logits, tokens, results)
    })?;
    done.into_iter().collect()
}
