//! Products of torch's tensors, which are known by their addresses: a way through numpy takes longer than the product.

use crate::{isa, team};
use half::{bf16, f16};
use offramp_core::product::{Number, Product};
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;
use std::slice;

/// Whether `few_rows` is fast here: by vector instructions, and on torch's threads.
#[pyfunction]
pub fn multiplies_few_rows() -> PyResult<bool> {
    Ok(isa::chosen()?.name() != "portable" && team::is_there())
}

/// Multiply a weight (height, width) with `count` rows of that width and add a bias, into `out` (count, height).
///
/// Memory is given by its address, 0 for no bias; it is contiguous, of the dtype, and nobody writes to it meanwhile.
#[pyfunction]
#[pyo3(signature = (dtype, weight, bias, rows, out, count, height, width, threads, /))]
#[expect(
    clippy::too_many_arguments,
    reason = "a call for each product of a step"
)]
pub fn few_rows(
    py: Python<'_>,
    dtype: &str,
    weight: usize,
    bias: usize,
    rows: usize,
    out: usize,
    count: usize,
    height: usize,
    width: usize,
    threads: u32,
) -> PyResult<()> {
    let product = Operands {
        weight,
        bias,
        rows,
        out,
        count,
        height,
        width,
    };
    match dtype {
        "float32" => product.multiply::<f32>(py, threads),
        "float16" => product.multiply::<f16>(py, threads),
        "bfloat16" => product.multiply::<bf16>(py, threads),
        other => Err(PyTypeError::new_err(format!(
            "rows have dtype {other}: give float16, bfloat16 or float32"
        ))),
    }
}

/// Addresses and sizes.
struct Operands {
    weight: usize,
    bias: usize,
    rows: usize,
    out: usize,
    count: usize,
    height: usize,
    width: usize,
}

impl Operands {
    fn multiply<T: Number>(&self, py: Python<'_>, threads: u32) -> PyResult<()> {
        let isa = isa::chosen()?;
        let addresses = [self.weight, self.rows, self.out];
        let sizes = [self.count, self.height, self.width];
        if addresses.contains(&0)
            || sizes.contains(&0)
            || (addresses.iter().chain([&self.bias])).any(|address| address % align_of::<T>() != 0)
        {
            return Err(PyValueError::new_err(
                "there is nothing to multiply, or it is not aligned",
            ));
        }
        let (weight, rows) = (self.height * self.width, self.count * self.width);
        // SAFETY: `offramp.llm.products`, the only caller, hands over tensors on the CPU of this type, these sizes
        // and one number after the other, which it keeps alive; `out` is one it has just made, so nobody else has it.
        let (weight, bias, rows, out) = unsafe {
            (
                slice::from_raw_parts(self.weight as *const T, weight),
                (self.bias != 0).then(|| slice::from_raw_parts(self.bias as *const T, self.height)),
                slice::from_raw_parts(self.rows as *const T, rows),
                slice::from_raw_parts_mut(self.out as *mut T, self.count * self.height),
            )
        };
        py.detach(|| {
            let product = Product::new(isa, weight, bias, rows, out, self.width, threads as usize);
            team::run(threads, || product.work());
        });
        Ok(())
    }
}
