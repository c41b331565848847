//! The algorithms behind offramp: exact threshold calibration and the per-step exit decision.
//!
//! No Python, no global state.  `offramp.reference` is the specification these functions are tested against.

mod curve;
mod error;
mod exhaust;
mod isa;
pub mod margin;
mod order;
mod run;
mod samples;
mod scan;
mod search;
mod sketch;
mod sort;
mod tally;
mod threshold;
mod validate;

pub use curve::{Curve, threshold_curve};
pub use error::{Error, Position, Result};
pub use isa::InstructionSet;
pub use order::{Key, Score};
pub use run::{Method, Run};
pub use sort::sort_by_score;
pub use threshold::{Calibratable, Rule, fast_calibrate, fast_calibrate_heads};
