//! What a step of decoding computes over the few rows it has: products with every weight, and attention.
//!
//! Both take as long as what they read takes to be read, so both read it once and in order, and what is between them
//! (norms, activations, sums) is done on the way.  [`lanes`] holds what they are made of, once, for every instruction
//! set.  What comes out, as long as it is finite, has the same bits whatever the instructions, the threads and the rows
//! beside it, and is rounded to the type of the model wherever a tensor of it would be.

mod arch;
mod attention;
mod lanes;
mod layer;
mod product;

pub use attention::{Attention, Before, Heads, Rotary};
pub use lanes::{Number, Weight};
pub use layer::{Layer, Machine, Seen, Team};
pub use product::{Finish, Linear, Norm, Product, Rows, norm_rows};

use std::sync::{Mutex, PoisonError};

/// What is left to do, for whoever of a team asks next.
struct Queue<P> {
    left: Mutex<std::vec::IntoIter<P>>,
    /// How many parts there were.
    count: usize,
}

impl<P> Queue<P> {
    fn of(parts: Vec<P>) -> Self {
        Self {
            count: parts.len(),
            left: Mutex::new(parts.into_iter()),
        }
    }

    fn next(&self) -> Option<P> {
        // Poisoning cannot matter: to take from the list cannot panic.
        let mut left = self.left.lock().unwrap_or_else(PoisonError::into_inner);
        left.next()
    }
}
