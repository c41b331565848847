//! The core's errors as Python's.

use pyo3::PyErr;
use pyo3::import_exception;

import_exception!(offramp.errors, InputError);

/// What the core refuses is a value at fault: `offramp.InputError`, a `ValueError`.
pub fn refused(error: offramp_core::Error) -> PyErr {
    InputError::new_err(error.to_string())
}
