//! A step over torch's tensors.

use crate::memory::{Plain, maybe, numbers, numbers_mut, size};
use crate::{isa, team};
use half::{bf16, f16};
use offramp_core::step::{
    Attention, Before, Finish, Heads, Linear, Norm, Number, Product, Rotary, Rows,
};
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;

/// Whether these functions are fast here: by vector instructions, and on torch's threads.
#[pyfunction]
pub fn steps_fast() -> PyResult<bool> {
    Ok(isa::chosen()?.has_vectors() && team::is_there())
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
/// `norm` is a weight and ε that the rows are normed with before, `residual` what the products times `factor` are added to; `gated`
/// products are of two weights, the second's times `silu` of the first's.  Memory is given by its address, 0 where
/// there is none; it is contiguous, of the dtype, and nobody writes to it meanwhile.
#[pyfunction]
#[pyo3(signature = (dtype, linears, rows, out, count, width, threads, norm=None, residual=0, factor=1.0, gated=false))]
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
    factor: f32,
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
        factor,
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
    factor: f32,
    gated: bool,
}

impl Multiplication {
    fn run<T: Number + Plain>(&self, py: Python<'_>, threads: u32) -> PyResult<()> {
        let isa = isa::chosen()?;
        let (count, width) = (self.count, self.width);
        let heights = self.linears.iter().map(|&(_, _, height)| height);
        let height = match self.gated {
            false => heights.sum(),
            true => heights.min().unwrap_or(0),
        };
        let linear = |&(weight, bias, height): &(usize, usize, usize)| {
            Ok(Linear {
                weight: numbers(weight, size(&[height, width])?)?,
                bias: maybe(bias, height)?,
            })
        };
        let linears: Vec<Linear<'_, T>> =
            self.linears.iter().map(linear).collect::<PyResult<_>>()?;
        if self.gated && linears.len() != 2 {
            return Err(PyValueError::new_err("a gated block has two weights"));
        }
        let norm = self.norm.map(|given| norm(given, width)).transpose()?;
        let finish = match maybe(self.residual, size(&[count, height])?)? {
            _ if self.gated => Finish::Gate,
            Some(residual) => Finish::Add(residual, self.factor),
            None => Finish::Store,
        };
        let rows = Rows {
            numbers: numbers(self.rows, size(&[count, width])?)?,
            width,
            norm,
        };
        let out = numbers_mut(self.out, size(&[count, height])?)?;
        py.detach(|| {
            let team = threads as usize;
            let product = Product::new(isa, &linears, finish, rows, out, team);
            team::run(members(threads, product.parts()), || product.work());
        });
        Ok(())
    }
}

/// Scale `count` rows to unit root mean square, and then by a weight of their size, into `out`.
#[pyfunction]
pub fn norm_rows(
    dtype: &str,
    rows: usize,
    out: usize,
    count: usize,
    width: usize,
    weight: usize,
    eps: f64,
) -> PyResult<()> {
    let call = Norming {
        rows,
        out,
        count: size(&[count, width])?,
        norm: (weight, eps),
        width,
    };
    of_dtype!(dtype, call.run())
}

struct Norming {
    rows: usize,
    out: usize,
    count: usize,
    norm: (usize, f64),
    width: usize,
}

impl Norming {
    fn run<T: Number + Plain>(&self) -> PyResult<()> {
        let out = numbers_mut(self.out, self.count)?;
        out.copy_from_slice(numbers(self.rows, self.count)?);
        offramp_core::step::norm_rows::<T>(isa::chosen()?, norm(self.norm, self.width)?, out);
        Ok(())
    }
}

/// Let new positions attend to those before and to themselves, as `step::Attention` does, into `out`.
///
/// `heads` are those of queries, of keys, and their size; `rotary` cosines, sines and partners, or zeros; `cache` keys
/// and values, with room for the new positions after those `seen`; a window of 0 is none; `norms` are weight and ε of
/// those of each query head and of each key head.
#[pyfunction]
#[pyo3(signature = (dtype, projected, rotary, cache, out, count, seen, heads, scaling, window, threads, norms=None))]
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
    norms: Option<((usize, f64), (usize, f64))>,
) -> PyResult<()> {
    let (wide, narrow, size) = heads;
    let call = Attending {
        projected,
        norms,
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
    norms: Option<((usize, f64), (usize, f64))>,
    rotary: (usize, usize, usize),
    cache: (usize, usize),
    out: usize,
    count: usize,
    seen: usize,
    heads: Heads,
}

impl Attending {
    fn run<T: Number + Plain>(&self, py: Python<'_>, threads: u32) -> PyResult<()> {
        let isa = isa::chosen()?;
        let Heads {
            wide,
            narrow,
            size: each,
            ..
        } = self.heads;
        let (count, new) = (self.count, size(&[narrow, each])?);
        let queries = size(&[count, wide, each])?;
        let projected = numbers(self.projected, queries + size(&[2, count, new])?)?;
        let (cosines, sines, partners) = self.rotary;
        let rotary = match maybe(cosines, size(&[count, each])?)? {
            None => None,
            Some(cosines) => Some(Rotary {
                cosines,
                sines: numbers(sines, size(&[count, each])?)?,
                partners: numbers(partners, each)?,
            }),
        };
        let norms = match self.norms {
            None => None,
            Some((of_queries, of_keys)) => Some([norm(of_queries, each)?, norm(of_keys, each)?]),
        };
        let before = Before { norms, rotary };
        let kept = size(&[self.seen + count, new])?;
        let cache = (
            numbers_mut(self.cache.0, kept)?,
            numbers_mut(self.cache.1, kept)?,
        );
        let out = numbers_mut(self.out, queries)?;
        py.detach(|| {
            let attention =
                Attention::<T>::begin(isa, self.heads, projected, before, cache, self.seen, out);
            team::run(members(threads, attention.parts()), || attention.work());
            attention.finish();
        });
        Ok(())
    }
}

/// The whole team or nobody else: OpenMP lets threads go when a team is smaller than the last, and starts them anew.
fn members(threads: u32, parts: usize) -> u32 {
    if parts > 1 { threads } else { 1 }
}

fn norm<'a, T: Plain>((weight, eps): (usize, f64), width: usize) -> PyResult<Norm<'a, T>> {
    Ok(Norm {
        weight: numbers(weight, width)?,
        eps,
    })
}
