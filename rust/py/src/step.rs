//! A step over torch's tensors.
//!
//! Memory is given by its address, 0 where there is none; it is contiguous, of the dtype that is named, and nobody
//! writes to it meanwhile.

use crate::memory::{Plain, maybe, numbers, numbers_mut, size};
use crate::{isa, team};
use half::{bf16, f16};
use offramp_core::step::{
    self, Attention, Before, Finish, Heads, Linear, Norm, Product, Rotary, Rows,
};
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;

/// The address of a norm's weight, and ε.
type NormAt = (usize, f64);

/// Evaluate an expression with the type a dtype names.
macro_rules! with_type {
    ($dtype:expr, |$type:ident| $body:expr) => {
        match $dtype {
            "float32" => {
                type $type = f32;
                $body
            }
            "float16" => {
                type $type = f16;
                $body
            }
            "bfloat16" => {
                type $type = bf16;
                $body
            }
            other => Err(PyTypeError::new_err(format!(
                "rows have dtype {other}: give float16, bfloat16 or float32"
            ))),
        }
    };
}

/// Whether these functions are fast here: by vector instructions, and on torch's threads.
#[pyfunction]
pub fn steps_fast() -> PyResult<bool> {
    Ok(isa::chosen()?.has_vectors() && team::is_there())
}

/// Multiply `count` rows of a width with weights of that width, given as (weight, bias, height), into `out`.
///
/// `norm` is what the rows are normed with before, `residual` what the products times `factor` are added to; `gated`
/// products are of two weights, the second's times `silu` of the first's.
#[pyfunction]
#[pyo3(signature = (
    dtype, linears, rows, out, count, width, threads, norm=None, residual=0, factor=1.0, gated=false
))]
#[expect(
    clippy::too_many_arguments,
    reason = "a call for each product of a step"
)]
pub fn multiply_rows(
    py: Python<'_>,
    dtype: &str,
    linears: Vec<(usize, usize, usize)>,
    rows: usize,
    out: usize,
    count: usize,
    width: usize,
    threads: u32,
    norm: Option<NormAt>,
    residual: usize,
    factor: f32,
    gated: bool,
) -> PyResult<()> {
    let isa = isa::chosen()?;
    if gated && linears.len() != 2 {
        return Err(PyValueError::new_err("a gated block has two weights"));
    }
    let computed = &linears[..linears.len() - usize::from(gated)];
    let height = computed.iter().map(|&(_, _, height)| height).sum();
    let (given, found) = (size(&[count, width])?, size(&[count, height])?);
    with_type!(dtype, |T| {
        let linear = |&(weight, bias, height): &(usize, usize, usize)| -> PyResult<_> {
            Ok(Linear {
                weight: numbers::<T>(weight, size(&[height, width])?)?,
                bias: maybe(bias, height)?,
            })
        };
        let linears: Vec<_> = linears.iter().map(linear).collect::<PyResult<_>>()?;
        let finish = match maybe(residual, found)? {
            _ if gated => Finish::Gate,
            Some(residual) => Finish::Add(residual, factor),
            None => Finish::Store,
        };
        let rows = Rows {
            numbers: numbers(rows, given)?,
            width,
            norm: norm.map(|norm| norm_at(norm, width)).transpose()?,
        };
        let out = numbers_mut(out, found)?;
        py.detach(|| {
            let product = Product::new(isa, &linears, finish, rows, out, threads as usize);
            team::run(members(threads, product.parts()), || product.work());
        });
        Ok(())
    })
}

/// Norm `count` rows of a width into `out`.
#[pyfunction]
pub fn norm_rows(
    dtype: &str,
    rows: usize,
    out: usize,
    count: usize,
    width: usize,
    norm: NormAt,
) -> PyResult<()> {
    let isa = isa::chosen()?;
    let count = size(&[count, width])?;
    with_type!(dtype, |T| {
        let out = numbers_mut::<T>(out, count)?;
        out.copy_from_slice(numbers(rows, count)?);
        step::norm_rows(isa, norm_at(norm, width)?, out);
        Ok(())
    })
}

/// Let new positions attend to those before and to themselves, as `step::Attention` does, into `out`.
///
/// `heads` are those of queries, of keys, and their size; `rotary` cosines, sines and partners, or zeros; `cache` keys
/// and values, with room for the new positions after those `seen`; a window of 0 is none; `norms` are those of each
/// query head and of each key head.
#[pyfunction]
#[pyo3(signature = (
    dtype, projected, rotary, cache, out, count, seen, heads, scaling, window, threads, norms=None
))]
#[expect(clippy::too_many_arguments, reason = "a call for each layer of a step")]
pub fn attend_rows(
    py: Python<'_>,
    dtype: &str,
    projected: usize,
    rotary: (usize, usize, usize),
    cache: (usize, usize),
    out: usize,
    count: usize,
    seen: usize,
    heads: (usize, usize, usize),
    scaling: f32,
    window: usize,
    threads: u32,
    norms: Option<(NormAt, NormAt)>,
) -> PyResult<()> {
    let isa = isa::chosen()?;
    let (wide, narrow, each) = heads;
    let (queries, angles) = (size(&[count, wide, each])?, size(&[count, each])?);
    let (new, kept) = (
        size(&[2, count, narrow, each])?,
        size(&[seen + count, narrow, each])?,
    );
    let heads = Heads {
        wide,
        narrow,
        size: each,
        scaling,
        window: (window > 0).then_some(window),
    };
    with_type!(dtype, |T| {
        let projected = numbers::<T>(projected, queries + new)?;
        let (cosines, sines, partners) = rotary;
        let rotary = match maybe(cosines, angles)? {
            None => None,
            Some(cosines) => Some(Rotary {
                cosines,
                sines: numbers(sines, angles)?,
                partners: numbers(partners, each)?,
            }),
        };
        let norms = match norms {
            None => None,
            Some((queries, keys)) => Some([norm_at(queries, each)?, norm_at(keys, each)?]),
        };
        let before = Before { norms, rotary };
        let cache = (numbers_mut(cache.0, kept)?, numbers_mut(cache.1, kept)?);
        let out = numbers_mut(out, queries)?;
        py.detach(|| {
            let attention = Attention::begin(isa, heads, projected, before, cache, seen, out);
            team::run(members(threads, attention.parts()), || attention.work());
            attention.finish();
        });
        Ok(())
    })
}

/// The whole team or nobody else: OpenMP lets threads go when a team is smaller than the last, and starts them anew.
fn members(threads: u32, parts: usize) -> u32 {
    if parts > 1 { threads } else { 1 }
}

fn norm_at<'a, T: Plain>((weight, eps): NormAt, width: usize) -> PyResult<Norm<'a, T>> {
    Ok(Norm {
        weight: numbers(weight, width)?,
        eps,
    })
}
