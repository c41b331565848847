//! Products of a weight with a few rows, which take as long as the weight takes to be read.
//!
//! `out[r, o] = sum over i of weight[o, i] * rows[r, i] + bias[o]`, summed in float32.  A step of decoding multiplies
//! every weight of a model with one row, or with the few that waited, so it costs what reading the weights costs;
//! libraries are made for many rows.  [`lanes`] holds the algorithm, once, for every instruction set.  An output has
//! the same bits whatever the instructions, the threads and the rows beside it.
//!
//! Each sum is one of 32 partial sums, so it is off by at most (n / 32 + 7) * 2^-24 of the sum of the absolute
//! products, n their number, before it is rounded to the type of the output.

mod arch;
mod lanes;

pub use lanes::Number;

use crate::isa::InstructionSet;
use lanes::Chunk;
use std::sync::{Mutex, PoisonError};

/// Outputs are handed out in so many parts a member of the team, so that one that comes late holds nobody up.
const PARTS_EACH: usize = 1;
/// A part of fewer bytes of the weight is not worth the asking.
const LEAST_PART: usize = 1 << 14;

/// A product that a team of threads works on together.
pub struct Product<'a, T> {
    isa: InstructionSet,
    width: usize,
    rows: Vec<Chunk>,
    left: Mutex<Part<'a, T>>,
    at_a_time: usize,
}

/// Some outputs in a row: what they are made of, and where they go in each row of `out`.
struct Part<'a, T> {
    weight: &'a [T],
    bias: Option<&'a [T]>,
    out: Vec<&'a mut [T]>,
}

impl<'a, T: Number> Product<'a, T> {
    /// Prepare the product of `weight` (O, I) with `rows` (R, I) into `out` (R, O), for a team of so many.
    ///
    /// # Panics
    /// If the lengths do not fit together, or a row has no numbers.
    pub fn new(
        isa: InstructionSet,
        weight: &'a [T],
        bias: Option<&'a [T]>,
        rows: &[T],
        out: &'a mut [T],
        width: usize,
        team: usize,
    ) -> Self {
        assert!(width > 0);
        let (height, count) = (weight.len() / width, rows.len() / width);
        assert!(weight.len() == height * width && rows.len() == count * width);
        assert!(out.len() == count * height && bias.is_none_or(|bias| bias.len() == height));
        let at_a_time = if team > 1 {
            let least = LEAST_PART.div_ceil(width * size_of::<T>());
            height.div_ceil(team * PARTS_EACH).max(least)
        } else {
            height
        };
        Self {
            isa,
            width,
            rows: arch::widen(isa, rows, width),
            left: Mutex::new(Part {
                weight,
                bias,
                out: out.chunks_exact_mut(height.max(1)).collect(),
            }),
            at_a_time,
        }
    }

    /// Take part after part until none is left; every member of the team calls it, in any order, or one alone does.
    pub fn work(&self) {
        while let Some(part) = self.next() {
            arch::multiply(self.isa, part, &self.rows, self.width);
        }
    }

    fn next(&self) -> Option<Part<'a, T>> {
        // Poisoning cannot matter: nobody panics between taking from the list and putting it in order again.
        let mut left = self.left.lock().unwrap_or_else(PoisonError::into_inner);
        let height = left.weight.len() / self.width;
        (height > 0).then(|| left.split_off(self.at_a_time.min(height), self.width))
    }
}

impl<T> Part<'_, T> {
    /// Take the first `height` outputs away.
    fn split_off(&mut self, height: usize, width: usize) -> Self {
        // Nothing is asked for that is not there.
        let bias = self.bias.as_mut();
        let out = self.out.iter_mut().map(|row| row.split_off_mut(..height));
        Self {
            weight: self.weight.split_off(..height * width).unwrap_or_default(),
            bias: bias.and_then(|bias| bias.split_off(..height)),
            out: out.map(Option::unwrap_or_default).collect(),
        }
    }
}
