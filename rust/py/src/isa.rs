//! Which instructions this process computes with.

use offramp_core::InstructionSet;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use std::sync::LazyLock;

/// Chosen once per process: the fastest, unless the environment names another.
static CHOSEN: LazyLock<Result<InstructionSet, String>> = LazyLock::new(|| {
    let available = InstructionSet::available();
    let wanted = std::env::var_os("OFFRAMP_ISA").map(|name| name.to_string_lossy().into_owned());
    let found = available
        .iter()
        .rfind(|isa| wanted.as_deref().is_none_or(|name| name == isa.name()));
    found.copied().ok_or_else(|| {
        let wanted = wanted.as_deref().unwrap_or_default();
        let names: Vec<_> = available.iter().map(|isa| isa.name()).collect();
        format!(
            "OFFRAMP_ISA is {wanted:?}: unset it, or use one this processor has: {}",
            names.join(", ")
        )
    })
});

/// The instruction set to compute with.
pub fn chosen() -> PyResult<InstructionSet> {
    CHOSEN.clone().map_err(PyValueError::new_err)
}

/// The name of the instruction set this process computes with.
#[pyfunction]
#[pyo3(name = "instruction_set")]
pub fn instruction_set_name() -> PyResult<&'static str> {
    chosen().map(InstructionSet::name)
}

/// The names of those this processor has, the slowest first; `OFFRAMP_ISA` takes one.
#[pyfunction]
pub fn instruction_sets() -> Vec<&'static str> {
    InstructionSet::available()
        .into_iter()
        .map(InstructionSet::name)
        .collect()
}
