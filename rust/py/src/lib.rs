//! `offramp._core`: check arguments, release the GIL, call the core, map the error.  Nothing else.

mod calibration;
mod decision;
mod error;
mod guarantee;
mod isa;
#[expect(unsafe_code, reason = "torch's memory, known by its address")]
mod memory;
mod step;
#[expect(
    unsafe_code,
    reason = "a function of C, by which torch's threads are asked"
)]
mod team;

use pyo3::prelude::*;

#[pymodule]
mod _core {
    use super::*;

    #[pymodule_export]
    use super::calibration::{fast_calibrate, sort_by_score, threshold_curve};
    #[pymodule_export]
    use super::decision::{exits_rows, top2_margin_at, top2_margin_row, top2_margin_rows};
    #[pymodule_export]
    use super::isa::{instruction_set_name, instruction_sets};
    #[pymodule_export]
    use super::step::{Layers, multiply_rows, norm_rows, steps_fast};

    #[pymodule_export]
    use super::guarantee::{
        binomial_p_value, binomial_upper_bound, calibrate_cascade, certify, evidence_suffices,
    };

    #[pymodule_init]
    fn init(module: &Bound<'_, PyModule>) -> PyResult<()> {
        module.add("__version__", env!("CARGO_PKG_VERSION"))
    }
}
