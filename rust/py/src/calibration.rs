//! Calibration: scores and flags in, thresholds out.

use crate::error::refused;
use crate::isa;
use half::slice::HalfBitsSliceExt;
use half::vec::HalfFloatVecExt;
use half::{bf16, f16};
use numpy::{IntoPyArray, PyArray1, PyReadonlyArray1};
use offramp_core::{Error, Method, Rule, Run};
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;
use std::cell::{Cell, RefCell};
use std::time::{Duration, Instant};

/// Time between two looks at Python's signals: Ctrl-C is answered at once to a human, and small inputs never pay.
const BETWEEN_SIGNALS: Duration = Duration::from_millis(20);

/// Evaluate an expression with the scores as a slice of their type.
macro_rules! with_scores {
    ($scores:expr, $dtype:expr, |$slice:ident| $body:expr) => {
        match $dtype {
            "float16" => {
                let array = $scores.extract::<PyReadonlyArray1<u16>>()?;
                let $slice = array.as_slice()?.reinterpret_cast::<f16>();
                $body
            }
            "bfloat16" => {
                let array = $scores.extract::<PyReadonlyArray1<u16>>()?;
                let $slice = array.as_slice()?.reinterpret_cast::<bf16>();
                $body
            }
            "float32" => {
                let array = $scores.extract::<PyReadonlyArray1<f32>>()?;
                let $slice = array.as_slice()?;
                $body
            }
            "float64" => {
                let array = $scores.extract::<PyReadonlyArray1<f64>>()?;
                let $slice = array.as_slice()?;
                $body
            }
            other => Err(PyTypeError::new_err(format!(
                "dtype must be float16, bfloat16, float32 or float64, not {other}"
            ))),
        }
    };
}

pub(crate) use with_scores;

/// Thresholds of one head, or of `heads` rows laid end to end, for every target: row-major float64.
#[pyfunction]
#[expect(
    clippy::too_many_arguments,
    reason = "a flat call costs the least to make from Python"
)]
pub fn fast_calibrate<'py>(
    py: Python<'py>,
    scores: &Bound<'py, PyAny>,
    dtype: &str,
    correct: PyReadonlyArray1<'py, u8>,
    heads: Option<usize>,
    eps: PyReadonlyArray1<'py, f64>,
    by_index: bool,
    threads: usize,
) -> PyResult<Bound<'py, PyArray1<f64>>> {
    let (correct, eps) = (correct.as_slice()?, eps.as_slice()?);
    let rule = if by_index { Rule::Index } else { Rule::Set };
    let method = method_chosen()?;
    with_scores!(scores, dtype, |scores| {
        let thresholds = detached(py, threads, |run| {
            let run = run.with_method(method);
            match heads {
                None => offramp_core::fast_calibrate(scores, correct, eps, rule, &run),
                Some(heads) => {
                    offramp_core::fast_calibrate_heads(scores, correct, heads, eps, rule, &run)
                }
            }
        })?;
        Ok(thresholds.into_pyarray(py))
    })
}

/// Scores and flags in stable ascending order; 16-bit scores as their bits.
#[pyfunction]
pub fn sort_by_score<'py>(
    py: Python<'py>,
    scores: &Bound<'py, PyAny>,
    dtype: &str,
    correct: PyReadonlyArray1<'py, u8>,
    threads: usize,
) -> PyResult<(Bound<'py, PyAny>, Bound<'py, PyArray1<u8>>)> {
    let correct = correct.as_slice()?;
    with_scores!(scores, dtype, |scores| {
        let (scores, correct) = detached(py, threads, |run| {
            offramp_core::sort_by_score(scores, correct, &run)
        })?;
        Ok((Output::array(scores, py), correct.into_pyarray(py)))
    })
}

/// Distinct scores ascending, and the samples accepted and correct at each.
#[pyfunction]
#[expect(clippy::type_complexity, reason = "three arrays, which Python unpacks")]
pub fn threshold_curve<'py>(
    py: Python<'py>,
    scores: &Bound<'py, PyAny>,
    dtype: &str,
    correct: PyReadonlyArray1<'py, u8>,
    threads: usize,
) -> PyResult<(
    Bound<'py, PyArray1<f64>>,
    Bound<'py, PyArray1<i64>>,
    Bound<'py, PyArray1<i64>>,
)> {
    let correct = correct.as_slice()?;
    with_scores!(scores, dtype, |scores| {
        let curve = detached(py, threads, |run| {
            offramp_core::threshold_curve(scores, correct, &run)
        })?;
        Ok((
            curve.thresholds.into_pyarray(py),
            curve.accepted.into_pyarray(py),
            curve.correct.into_pyarray(py),
        ))
    })
}

/// The fastest method, unless the environment names another.
fn method_chosen() -> PyResult<Method> {
    // Read in each call, so that a test or a benchmark may change it, and with the GIL held, under which Python does.
    match std::env::var_os("OFFRAMP_CALIBRATION") {
        None => Ok(Method::Fastest),
        Some(name) if name.is_empty() || name == "fastest" => Ok(Method::Fastest),
        Some(name) if name == "sort" => Ok(Method::Sort),
        Some(name) => Err(PyValueError::new_err(format!(
            "OFFRAMP_CALIBRATION is {name:?}: unset it, or use fastest or sort"
        ))),
    }
}

/// Run the core with the GIL released, looking for Ctrl-C from time to time.
pub(crate) fn detached<T: Send>(
    py: Python<'_>,
    threads: usize,
    work: impl FnOnce(Run<'_>) -> Result<T, Error> + Send,
) -> PyResult<T> {
    let isa = isa::chosen()?;
    py.detach(|| {
        let asked = Cell::new(Instant::now());
        let raised = RefCell::new(None);
        let interrupted = || {
            if asked.get().elapsed() < BETWEEN_SIGNALS {
                return false;
            }
            asked.set(Instant::now());
            let signal = Python::attach(|py| py.check_signals()).err();
            let stop = signal.is_some();
            raised.replace(signal);
            stop
        };
        let run = Run::interruptible(threads, &interrupted);
        let result = work(run.with_instruction_set(isa));
        match raised.take() {
            Some(signal) => Err(signal),
            None => result.map_err(refused),
        }
    })
}

/// Scores that numpy can hold: 16-bit ones as their bits.
trait Output: Sized {
    fn array(scores: Vec<Self>, py: Python<'_>) -> Bound<'_, PyAny>;
}

macro_rules! output {
    ($($float:ty => $array:expr),*) => {$(
        impl Output for $float {
            fn array(scores: Vec<Self>, py: Python<'_>) -> Bound<'_, PyAny> {
                let array: fn(Vec<$float>, Python<'_>) -> Bound<'_, PyAny> = $array;
                array(scores, py)
            }
        }
    )*};
}

output!(
    f16 => |scores, py| scores.reinterpret_into().into_pyarray(py).into_any(),
    bf16 => |scores, py| scores.reinterpret_into().into_pyarray(py).into_any(),
    f32 => |scores, py| scores.into_pyarray(py).into_any(),
    f64 => |scores, py| scores.into_pyarray(py).into_any()
);
