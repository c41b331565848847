//! Refusing what cannot be calibrated, with the first offence named.

use crate::error::{Error, Position, Result};
use crate::order::Score;
use crate::run::Run;

/// Elements looked at between two questions whether to stop.
const CHUNK: usize = 1 << 20;

/// One flag for every score, and at least one.
pub(crate) fn require_pairs<S>(scores: &[S], correct: &[u8]) -> Result<()> {
    if scores.is_empty() {
        return Err(Error::Empty { argument: "scores" });
    }
    if scores.len() != correct.len() {
        return Err(Error::LengthMismatch {
            scores: scores.len(),
            correct: correct.len(),
        });
    }
    Ok(())
}

/// Finite scores, flags of 0 and 1; positions are told by rows of `columns` where there are rows.
pub(crate) fn require_valid<S: Score>(
    scores: &[S],
    correct: &[u8],
    columns: Option<usize>,
    run: &Run,
) -> Result<()> {
    let position = |index| match columns {
        Some(columns) => Position {
            head: Some(index / columns),
            index: index % columns,
        },
        None => Position { head: None, index },
    };
    if let Some(index) = first(scores, |score| !score.is_finite(), run)? {
        return Err(Error::NotFinite {
            position: position(index),
            value: scores[index].value(),
        });
    }
    if let Some(index) = first(correct, |flag| flag > 1, run)? {
        return Err(Error::NotALabel {
            position: position(index),
            value: correct[index],
        });
    }
    Ok(())
}

/// Targets from 0 to 1, at least one.
pub(crate) fn require_targets(eps: &[f64]) -> Result<()> {
    if eps.is_empty() {
        return Err(Error::Empty { argument: "eps" });
    }
    match eps.iter().position(|target| !(0.0..=1.0).contains(target)) {
        Some(index) => Err(Error::NotATarget {
            index,
            value: eps[index],
        }),
        None => Ok(()),
    }
}

/// The index of the first item that is bad.
fn first<T: Copy>(items: &[T], bad: impl Fn(T) -> bool, run: &Run) -> Result<Option<usize>> {
    for (number, chunk) in items.chunks(CHUNK).enumerate() {
        run.check()?;
        // A fold without an early exit is what the compiler turns into vector instructions.
        if chunk.iter().fold(false, |any, &item| any | bad(item)) {
            return Ok(chunk
                .iter()
                .position(|&item| bad(item))
                .map(|i| number * CHUNK + i));
        }
    }
    Ok(None)
}
