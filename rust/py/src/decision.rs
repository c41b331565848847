//! `top2_margin` over numpy memory.

use crate::error::refused;
use crate::isa;
use half::slice::HalfBitsSliceExt;
use half::{bf16, f16};
use numpy::{PyArray1, PyReadonlyArrayDyn, PyUntypedArrayMethods};
use offramp_core::margin::{self, Logit, Top2, top2_margin};
use pyo3::exceptions::PyTypeError;
use pyo3::prelude::*;

type Row = (usize, f32);
type Rows<'py> = (Bound<'py, PyArray1<i64>>, Bound<'py, PyArray1<f32>>);

/// Token and margin of one row: float32, or uint16 holding what `dtype` names.
#[pyfunction]
pub fn top2_margin_row(logits: &Bound<'_, PyAny>, dtype: &str) -> PyResult<Row> {
    let isa = isa::chosen()?;
    let Top2 { token, margin } = match dtype {
        "float32" => top2_margin(
            isa,
            logits.extract::<PyReadonlyArrayDyn<f32>>()?.as_slice()?,
        ),
        "float16" => top2_margin(isa, bits(logits)?.as_slice()?.reinterpret_cast::<f16>()),
        "bfloat16" => top2_margin(isa, bits(logits)?.as_slice()?.reinterpret_cast::<bf16>()),
        _ => return Err(unknown(dtype)),
    }
    .map_err(refused)?;
    Ok((token, margin))
}

/// Tokens and margins of the rows of a matrix: float32, or uint16 holding what `dtype` names.
#[pyfunction]
pub fn top2_margin_rows<'py>(logits: &Bound<'py, PyAny>, dtype: &str) -> PyResult<Rows<'py>> {
    let py = logits.py();
    match dtype {
        "float32" => {
            let logits = logits.extract::<PyReadonlyArrayDyn<f32>>()?;
            of_rows(py, logits.as_slice()?, logits.shape()[0])
        }
        "float16" => {
            let logits = bits(logits)?;
            of_rows(
                py,
                logits.as_slice()?.reinterpret_cast::<f16>(),
                logits.shape()[0],
            )
        }
        "bfloat16" => {
            let logits = bits(logits)?;
            of_rows(
                py,
                logits.as_slice()?.reinterpret_cast::<bf16>(),
                logits.shape()[0],
            )
        }
        _ => Err(unknown(dtype)),
    }
}

fn of_rows<'py, T: Logit>(py: Python<'py>, logits: &[T], rows: usize) -> PyResult<Rows<'py>> {
    let isa = isa::chosen()?;
    let (mut tokens, mut margins) = (vec![0; rows], vec![0.0; rows]);
    py.detach(|| margin::top2_margin_rows(isa, logits, &mut tokens, &mut margins))
        .map_err(refused)?;
    Ok((
        PyArray1::from_vec(py, tokens),
        PyArray1::from_vec(py, margins),
    ))
}

fn bits<'py>(logits: &Bound<'py, PyAny>) -> PyResult<PyReadonlyArrayDyn<'py, u16>> {
    logits.extract()
}

fn unknown(dtype: &str) -> PyErr {
    PyTypeError::new_err(format!(
        "logits has dtype {dtype}: give float16, bfloat16 or float32"
    ))
}
