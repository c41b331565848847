//! A step over torch's tensors, which are known by their addresses: a way through numpy takes longer than a product.

use crate::{isa, team};
use half::{bf16, f16};
use offramp_core::step::{Attention, Finish, Heads, Linear, Norm, Number, Product, Rotary, Rows};
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;
use std::slice;

/// Whether these functions are fast here: by vector instructions, and on torch's threads.
#[pyfunction]
pub fn steps_fast() -> PyResult<bool> {
    Ok(isa::chosen()?.name() != "portable" && team::is_there())
}

/// Call a method for the type a dtype names.
macro_rules! of_dtype {
    ($dtype:expr, $value:ident.$method:ident($($argument:expr),*)) => {
        match $dtype {
            "float32" => $value.$method::<f32>($($argument),*),
            "float16" => $value.$method::<f16>($($argument),*),
            "bfloat16" => $value.$method::<bf16>($($argument),*),
            other => Err(PyTypeError::new_err(format!(
                "rows have dtype {other}: give float16, bfloat16 or float32"
            ))),
        }
    };
}

/// Multiply `count` rows of a width with weights of that width, given as (weight, bias, height), into `out`.
///
/// `norm` is a weight and ε that the rows are normed with before, `residual` what is added to the products; `gated`
/// products are of two weights, the second's times `silu` of the first's.  Memory is given by its address, 0 where
/// there is none; it is contiguous, of the dtype, and nobody writes to it meanwhile.
#[pyfunction]
#[pyo3(signature = (dtype, linears, rows, out, count, width, threads, norm=None, residual=0, gated=false))]
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
    norm: Option<(usize, f64)>,
    residual: usize,
    gated: bool,
) -> PyResult<()> {
    let call = Multiplication {
        linears,
        rows,
        out,
        count,
        width,
        norm,
        residual,
        gated,
    };
    of_dtype!(dtype, call.run(py, threads))
}

struct Multiplication {
    linears: Vec<(usize, usize, usize)>,
    rows: usize,
    out: usize,
    count: usize,
    width: usize,
    norm: Option<(usize, f64)>,
    residual: usize,
    gated: bool,
}

impl Multiplication {
    fn run<T: Number>(&self, py: Python<'_>, threads: u32) -> PyResult<()> {
        let isa = isa::chosen()?;
        let (count, width) = (self.count, self.width);
        let heights = self.linears.iter().map(|&(_, _, height)| height);
        let height = match self.gated {
            false => heights.sum(),
            true => heights.min().unwrap_or(0),
        };
        let linear = |&(weight, bias, height): &(usize, usize, usize)| {
            Ok(Linear {
                weight: numbers(weight, height * width)?,
                bias: maybe(bias, height)?,
            })
        };
        let linears: Vec<Linear<'_, T>> =
            self.linears.iter().map(linear).collect::<PyResult<_>>()?;
        if self.gated && linears.len() != 2 {
            return Err(PyValueError::new_err("a gated block has two weights"));
        }
        let norm = match self.norm {
            None => None,
            Some((weight, eps)) => Some(Norm {
                weight: numbers(weight, width)?,
                eps,
            }),
        };
        let finish = match maybe(self.residual, count * height)? {
            _ if self.gated => Finish::Gate,
            Some(residual) => Finish::Add(residual),
            None => Finish::Store,
        };
        let rows = Rows {
            numbers: numbers(self.rows, count * width)?,
            width,
            norm,
        };
        let out = numbers_mut(self.out, count * height)?;
        py.detach(|| {
            let team = threads as usize;
            let product = Product::new(isa, &linears, finish, rows, out, team);
            team::run(threads, || product.work());
        });
        Ok(())
    }
}

/// Let new positions attend to those before and to themselves, as `step::Attention` does, into `out`.
///
/// `heads` are those of queries, of keys, and their size; `rotary` cosines, sines and partners, or zeros; `cache` keys
/// and values, with room for the new positions after those `seen`; a window of 0 is none.
#[pyfunction]
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
) -> PyResult<()> {
    let (wide, narrow, size) = heads;
    let call = Attending {
        projected,
        rotary,
        cache,
        out,
        count,
        seen,
        heads: Heads {
            wide,
            narrow,
            size,
            scaling,
            window: (window > 0).then_some(window),
        },
    };
    of_dtype!(dtype, call.run(py, threads))
}

struct Attending {
    projected: usize,
    rotary: (usize, usize, usize),
    cache: (usize, usize),
    out: usize,
    count: usize,
    seen: usize,
    heads: Heads,
}

impl Attending {
    fn run<T: Number>(&self, py: Python<'_>, threads: u32) -> PyResult<()> {
        let isa = isa::chosen()?;
        let Heads {
            wide, narrow, size, ..
        } = self.heads;
        let projected = numbers(self.projected, self.count * (wide + 2 * narrow) * size)?;
        let (cosines, sines, partners) = self.rotary;
        let rotary = match maybe(cosines, self.count * size)? {
            None => None,
            Some(cosines) => Some(Rotary {
                cosines,
                sines: numbers(sines, self.count * size)?,
                partners: numbers(partners, size)?,
            }),
        };
        let kept = (self.seen + self.count) * narrow * size;
        let cache = (
            numbers_mut(self.cache.0, kept)?,
            numbers_mut(self.cache.1, kept)?,
        );
        let out = numbers_mut(self.out, self.count * wide * size)?;
        py.detach(|| {
            let attention =
                Attention::<T>::new(isa, self.heads, projected, rotary, cache, self.seen, out);
            let parts = u32::try_from(attention.parts()).unwrap_or(threads);
            team::run(threads.min(parts), || attention.work());
            attention.finish();
        });
        Ok(())
    }
}

fn maybe<'a, T>(address: usize, count: usize) -> PyResult<Option<&'a [T]>> {
    (address != 0).then(|| numbers(address, count)).transpose()
}

fn numbers<'a, T>(address: usize, count: usize) -> PyResult<&'a [T]> {
    check::<T>(address, count)?;
    // SAFETY: `offramp.llm.products`, the only caller, hands over addresses of tensors on the CPU that it keeps alive
    // for the call, of these types and sizes, one number after the other.
    Ok(unsafe { slice::from_raw_parts(address as *const T, count) })
}

fn numbers_mut<'a, T>(address: usize, count: usize) -> PyResult<&'a mut [T]> {
    check::<T>(address, count)?;
    // SAFETY: as above; it hands over what it has just made, or a cache that is no one else's.
    Ok(unsafe { slice::from_raw_parts_mut(address as *mut T, count) })
}

fn check<T>(address: usize, count: usize) -> PyResult<()> {
    if address == 0 || count == 0 || !address.is_multiple_of(align_of::<T>()) {
        return Err(PyValueError::new_err(
            "there is nothing at this address, or it is not aligned",
        ));
    }
    Ok(())
}
