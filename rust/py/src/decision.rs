//! The decision over numpy memory.

use crate::error::refused;
use crate::isa;
use crate::memory::numbers;
use half::slice::HalfBitsSliceExt;
use half::{bf16, f16};
use numpy::{
    Element, PyArray1, PyArrayMethods, PyReadonlyArrayDyn, PyReadwriteArray1, PyUntypedArrayMethods,
};
use offramp_core::margin::{self, Logit, Top2, top2_margin};
use offramp_core::{Error, Run};
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;

type Found = (usize, f32);
type Rows<'py> = (Bound<'py, PyArray1<i64>>, Bound<'py, PyArray1<f32>>);

/// Evaluate an expression with logits, float32 or uint16 holding what `dtype` names, as a slice and their shape.
macro_rules! with_logits {
    ($logits:expr, $dtype:expr, |$slice:ident, $shape:ident| $body:expr) => {
        match $dtype {
            "float32" => {
                let array = $logits.extract::<PyReadonlyArrayDyn<f32>>()?;
                let ($slice, $shape) = (in_rows(&array)?, array.shape());
                $body
            }
            "float16" => {
                let array = $logits.extract::<PyReadonlyArrayDyn<u16>>()?;
                let ($slice, $shape) = (in_rows(&array)?.reinterpret_cast::<f16>(), array.shape());
                $body
            }
            "bfloat16" => {
                let array = $logits.extract::<PyReadonlyArrayDyn<u16>>()?;
                let ($slice, $shape) = (in_rows(&array)?.reinterpret_cast::<bf16>(), array.shape());
                $body
            }
            other => Err(no_logits(other)),
        }
    };
}

/// The values row by row.
fn in_rows<'a, T: Element>(array: &'a PyReadonlyArrayDyn<'_, T>) -> PyResult<&'a [T]> {
    // A slice is given of Fortran's order, too.
    if array.is_c_contiguous() {
        Ok(array.as_slice()?)
    } else {
        Err(PyValueError::new_err("logits are not C-contiguous"))
    }
}

/// Token and margin of one row in a numpy array of float32 or float16 that can be read as it is; None for all else.
#[pyfunction]
pub fn top2_margin_row(logits: &Bound<'_, PyAny>) -> PyResult<Option<Found>> {
    if let Ok(logits) = logits.cast::<PyArray1<f32>>() {
        return read_row(logits);
    }
    if let Ok(logits) = logits.cast::<PyArray1<f16>>() {
        return read_row(logits);
    }
    Ok(None)
}

/// Token and margin of one row of a torch tensor, which is `count` numbers at an address.
#[pyfunction]
pub fn top2_margin_at(address: usize, count: usize, dtype: &str) -> PyResult<Found> {
    match dtype {
        "float32" => decide::<f32>(numbers(address, count)?),
        "float16" => decide::<f16>(numbers(address, count)?),
        "bfloat16" => decide::<bf16>(numbers(address, count)?),
        other => Err(no_logits(other)),
    }
}

fn decide<L: Logit>(logits: &[L]) -> PyResult<Found> {
    let Top2 { token, margin } = top2_margin(isa::chosen()?, logits).map_err(refused)?;
    Ok((token, margin))
}

fn no_logits(dtype: &str) -> PyErr {
    PyTypeError::new_err(format!(
        "logits has dtype {dtype}: give float16, bfloat16 or float32"
    ))
}

fn read_row<L: Logit + Element>(logits: &Bound<'_, PyArray1<L>>) -> PyResult<Option<Found>> {
    if !logits.is_c_contiguous() || !logits.data().is_aligned() {
        return Ok(None);
    }
    let Ok(logits) = logits.try_readonly() else {
        return Ok(None);
    };
    decide(logits.as_slice()?).map(Some)
}

/// Tokens and margins of the rows of a matrix.
#[pyfunction]
pub fn top2_margin_rows<'py>(logits: &Bound<'py, PyAny>, dtype: &str) -> PyResult<Rows<'py>> {
    let py = logits.py();
    with_logits!(logits, dtype, |values, shape| {
        let (mut tokens, mut margins) = (vec![0; shape[0]], vec![0.0; shape[0]]);
        fill(py, shape[0], |run| {
            margin::top2_margin_rows(values, &mut tokens, &mut margins, run)
        })?;
        Ok((
            PyArray1::from_vec(py, tokens),
            PyArray1::from_vec(py, margins),
        ))
    })
}

/// Write tokens of the rows of a matrix, and whether their margins reach `tau`, into arrays the caller keeps.
#[pyfunction]
pub fn exits_rows<'py>(
    logits: &Bound<'py, PyAny>,
    dtype: &str,
    tau: f64,
    mut tokens: PyReadwriteArray1<'py, i64>,
    mut exits: PyReadwriteArray1<'py, bool>,
) -> PyResult<()> {
    let (tokens, exits) = (tokens.as_slice_mut()?, exits.as_slice_mut()?);
    with_logits!(logits, dtype, |values, shape| {
        if [tokens.len(), exits.len()] != [shape[0]; 2] {
            return Err(PyValueError::new_err(format!(
                "there are {} rows of logits: give as many tokens and exits",
                shape[0]
            )));
        }
        fill(logits.py(), shape[0], |run| {
            margin::exits_rows(values, tau, tokens, exits, run)
        })
    })
}

/// Let `decide` fill what there is for each row; the GIL is held for a single one, which takes microseconds.
fn fill(
    py: Python<'_>,
    rows: usize,
    decide: impl FnOnce(&Run<'_>) -> Result<(), Error> + Send,
) -> PyResult<()> {
    let isa = isa::chosen()?;
    if rows == 1 {
        return decide(&Run::on(1).with_instruction_set(isa)).map_err(refused);
    }
    py.detach(|| decide(&Run::on(0).with_instruction_set(isa)))
        .map_err(refused)
}
