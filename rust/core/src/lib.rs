//! The algorithms behind offramp: exact threshold calibration and the per-step exit decision.
//!
//! No Python, no global state.  `offramp.reference` is the specification these functions are tested against.

pub mod binomial;
mod budget;
mod cascade;
mod clusters;
mod curve;
mod error;
mod exhaust;
mod guarantee;
mod isa;
mod ladder;
pub mod margin;
mod order;
mod run;
mod samples;
mod scan;
mod search;
mod sketch;
mod sort;
pub mod step;
mod survivors;
mod table;
mod tally;
mod threshold;
mod validate;

pub use cascade::{Cascade, Goal, Heads, HoldOut, calibrate_cascade};
pub use clusters::Clusters;
pub use curve::{Curve, threshold_curve};
pub use error::{Error, Position, Result};
pub use guarantee::{Certificate, Certification, Walk, certify};
pub use isa::InstructionSet;
pub use ladder::Bucketed;
pub use order::{Key, Score};
pub use run::{Method, Run};
pub use sort::sort_by_score;
pub use threshold::{Calibratable, Rule, fast_calibrate, fast_calibrate_heads};
