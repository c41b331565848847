//! Certificates and cascades over numpy memory.

use crate::calibration::{detached, with_scores};
use half::slice::HalfBitsSliceExt;
use half::{bf16, f16};
use numpy::PyReadonlyArray1;
use offramp_core::{Certification, Clusters, Goal, Heads, HoldOut, Walk, binomial};
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;

/// P(Bin(n, alpha) <= errors), rounded up.
#[pyfunction]
pub fn binomial_p_value(errors: u64, n: u64, alpha: f64) -> f64 {
    binomial::p_value(errors, n, alpha)
}

/// Clopper-Pearson upper bound of the risk, rounded up.
#[pyfunction]
pub fn binomial_upper_bound(errors: u64, n: u64, delta: f64) -> f64 {
    binomial::upper_bound(errors, n, delta)
}

/// Whether the evidence against a risk above alpha reaches 1 / delta.
#[pyfunction]
pub fn evidence_suffices(errors: u64, n: u64, alpha: f64, delta: f64) -> bool {
    binomial::evidence_suffices(errors, n, alpha, delta)
}

/// Group numbers, how many groups there are, and the most samples one can have.
type Groups<'py> = (PyReadonlyArray1<'py, u32>, usize, u32);

fn clusters<'a>(groups: &'a Option<Groups<'_>>) -> PyResult<Option<Clusters<'a>>> {
    let clusters = |(of, count, most): &'a Groups<'_>| {
        Ok(Clusters {
            of: of.as_slice()?,
            count: *count,
            most: *most,
        })
    };
    groups.as_ref().map(clusters).transpose()
}

/// Threshold, accepted and correct samples, and the bound of the accuracy.
#[pyfunction]
#[expect(
    clippy::too_many_arguments,
    reason = "a flat call costs the least to make from Python"
)]
pub fn certify<'py>(
    py: Python<'py>,
    scores: &Bound<'py, PyAny>,
    dtype: &str,
    correct: PyReadonlyArray1<'py, u8>,
    eps: f64,
    delta: f64,
    method: &str,
    grid: Option<PyReadonlyArray1<'py, f64>>,
    places: Vec<usize>,
    unit: bool,
    groups: Option<Groups<'py>>,
    threads: usize,
) -> PyResult<(f64, usize, usize, f64)> {
    let correct = correct.as_slice()?;
    let grid = grid.as_ref().map(|grid| grid.as_slice()).transpose()?;
    let walk = |thresholds| Walk {
        thresholds,
        starts: &places,
        unit,
    };
    let method = match (method, grid, clusters(&groups)?) {
        ("e-process", grid, None) => Certification::Evidence(grid),
        ("fixed-sequence", Some(grid), None) => Certification::FixedSequence(walk(grid)),
        ("fixed-sequence", Some(grid), Some(groups)) => Certification::Betting(walk(grid), groups),
        ("bonferroni", None, None) => Certification::Bonferroni(&places),
        ("sgr", None, None) => Certification::Sgr,
        (method, ..) => {
            return Err(PyValueError::new_err(format!(
                "{method} does not go with this grid or these groups"
            )));
        }
    };
    with_scores!(scores, dtype, |scores| {
        let found = detached(py, threads, |run| {
            offramp_core::certify(scores, correct, eps, delta, method, &run)
        })?;
        Ok((found.threshold, found.accepted, found.correct, found.bound))
    })
}

/// What `calibrate_cascade` finds: thresholds, accepted and correct a head, samples counted.
type Cascade = (Vec<f64>, Vec<usize>, Vec<usize>, usize);

/// Thresholds of `heads` rows laid end to end.
#[pyfunction]
#[expect(
    clippy::too_many_arguments,
    reason = "a flat call costs the least to make from Python"
)]
pub fn calibrate_cascade<'py>(
    py: Python<'py>,
    scores: &Bound<'py, PyAny>,
    dtype: &str,
    correct: PyReadonlyArray1<'py, u8>,
    heads: usize,
    eps: f64,
    mode: &str,
    costs: Vec<f64>,
    budget: f64,
    held_out: Option<(PyReadonlyArray1<'py, u8>, f64)>,
    groups: Option<Groups<'py>>,
    threads: usize,
) -> PyResult<Cascade> {
    let correct = correct.as_slice()?;
    let clusters = clusters(&groups)?;
    let half = |(half, delta): &'_ (PyReadonlyArray1<'py, u8>, f64)| -> PyResult<_> {
        Ok((half.as_slice()?.to_vec(), *delta))
    };
    let held_out = held_out.as_ref().map(half).transpose()?;
    let held_out = held_out.as_ref().map(|(half, delta)| HoldOut {
        half,
        delta: *delta,
        clusters,
    });
    let goal = match mode {
        "marginal" => Goal::Marginal,
        "sequential" => Goal::Sequential,
        "budget" => Goal::Budget(&costs, budget),
        other => return Err(PyValueError::new_err(format!("mode is {other}"))),
    };
    with_scores!(scores, dtype, |scores| {
        let found = detached(py, threads, |run| {
            let heads = Heads::new(scores, correct, heads)?;
            offramp_core::calibrate_cascade(&heads, eps, goal, held_out, &run)
        })?;
        Ok((
            found.thresholds,
            found.accepted,
            found.correct,
            found.samples,
        ))
    })
}
