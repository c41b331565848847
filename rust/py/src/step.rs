//! A step over torch's tensors.
//!
//! Memory is given by its address, 0 where there is none; it is contiguous, of the dtype that is named, and nobody
//! writes to it meanwhile.

use crate::memory::{Plain, maybe, numbers, numbers_mut, size};
use crate::{isa, team};
use half::{bf16, f16};
use offramp_core::step::{
    self, Finish, Heads, Layer, Linear, Machine, Norm, Number, Rotary, Rows, Seen, Weight,
};
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;

/// The address of a norm's weight, and ε.
type NormAt = (usize, f64);
/// Addresses of weight, scales and bias, and how many outputs there are.  With scales the weight is of int8, and the
/// scales, one a row of it, of float32.
type LinearAt = (usize, usize, usize, usize);

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

/// Multiply `count` rows of a width with a weight of that width into `out`.
#[pyfunction]
#[expect(clippy::too_many_arguments, reason = "a call for each product")]
pub fn multiply_rows(
    py: Python<'_>,
    dtype: &str,
    linear: LinearAt,
    rows: usize,
    out: usize,
    count: usize,
    width: usize,
    threads: u32,
) -> PyResult<()> {
    let machine = Machine {
        isa: isa::chosen()?,
        team: &team::Torch(threads),
    };
    let (given, found) = (size(&[count, width])?, size(&[count, linear.3])?);
    with_type!(dtype, |T| {
        let rows = Rows {
            numbers: numbers::<T>(rows, given)?,
            width,
            norm: None,
        };
        let out = numbers_mut(out, found)?;
        if linear.1 == 0 {
            let linear: Linear<'_, T> = linear_at(linear, width)?;
            py.detach(|| machine.multiply_into(&[linear], Finish::Store, rows, out));
        } else {
            let linear: Linear<'_, T, i8> = linear_at(linear, width)?;
            py.detach(|| machine.multiply_into(&[linear], Finish::Store, rows, out));
        }
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

/// A decoder layer, as `offramp.llm.stepping` describes it.
#[derive(FromPyObject)]
struct LayerAt {
    before_attention: NormAt,
    projections: Vec<LinearAt>,
    norms: Option<(NormAt, NormAt)>,
    /// How many heads queries have, how many keys have, and their size.
    heads: (usize, usize, usize),
    scaling: f32,
    /// 0 for none.
    window: usize,
    output: LinearAt,
    before_block: NormAt,
    block: (LinearAt, LinearAt),
    down: LinearAt,
    residual: f32,
    /// Which angles its queries and keys are turned by.
    table: Option<usize>,
}

/// Decoder layers in a row, arranged as Llama's, and what a head has before and after them; those run all or none.
///
/// What they are made of is given by its address and must stay there.
#[pyclass(frozen, module = "offramp._core")]
pub struct Layers {
    dtype: String,
    width: usize,
    /// Whether all weights have scales; else none has.
    scaled: bool,
    layers: Vec<LayerAt>,
    before: Option<LinearAt>,
    after: Option<NormAt>,
}

/// What a run is about.
#[derive(FromPyObject)]
struct Run {
    /// The new rows (R, width), how many there are, and their positions, R int64.
    rows: usize,
    new: usize,
    positions: usize,
    /// Cosines and signed sines of so many positions, each (positions, head size).
    tables: Vec<(usize, usize, usize)>,
    /// The number of a head that each is turned with, int64.
    partners: usize,
    /// Keys and values of each layer, with room for the new positions after those seen.
    caches: Vec<(usize, usize)>,
    seen: usize,
    /// Rows of which alone what follows the last layer's attention is computed.
    picked: Option<Vec<usize>>,
    /// (picked rows or all, width)
    out: usize,
}

#[pymethods]
impl Layers {
    #[new]
    #[pyo3(signature = (dtype, width, layers, before=None, after=None))]
    fn new(
        dtype: String,
        width: usize,
        layers: Vec<LayerAt>,
        before: Option<LinearAt>,
        after: Option<NormAt>,
    ) -> PyResult<Self> {
        let weights = layers.iter().flat_map(LayerAt::linears).chain(before);
        let scaled: Vec<bool> = weights.map(|(_, scales, _, _)| scales != 0).collect();
        let first = scaled.first().is_some_and(|&first| first);
        if scaled.iter().any(|&other| other != first) {
            return Err(PyValueError::new_err(
                "some weights are of int8 and others are not",
            ));
        }
        Ok(Self {
            dtype,
            width,
            scaled: first,
            layers,
            before,
            after,
        })
    }

    /// Run layers `first` to `last - 1` on so many threads.
    fn run(
        &self,
        py: Python<'_>,
        first: usize,
        last: usize,
        threads: u32,
        given: Run,
    ) -> PyResult<()> {
        let machine = Machine {
            isa: isa::chosen()?,
            team: &team::Torch(threads),
        };
        let partly = self.before.is_none() && self.after.is_none();
        let part = self.layers.get(first..last).filter(|part| {
            let whole = part.len() == self.layers.len();
            !part.is_empty() && part.len() == given.caches.len() && (whole || partly)
        });
        let Some(part) = part else {
            return Err(PyValueError::new_err("there are no such layers"));
        };
        with_type!(self.dtype.as_str(), |T| {
            if self.scaled {
                self.pass::<T, i8>(py, machine, part, given)
            } else {
                self.pass::<T, T>(py, machine, part, given)
            }
        })
    }
}

impl Layers {
    fn pass<T: Number + Plain, W: Weight + Plain>(
        &self,
        py: Python<'_>,
        machine: Machine<'_>,
        part: &[LayerAt],
        given: Run,
    ) -> PyResult<()> {
        let layers = part.iter().map(|layer| layer.at::<T, W>(self.width));
        let layers = layers.collect::<PyResult<Vec<_>>>()?;
        let before: Option<Linear<'_, T, W>> = self
            .before
            .map(|linear| linear_at(linear, self.width))
            .transpose()?;
        let after: Option<Norm<'_, T>> = self
            .after
            .map(|norm| norm_at(norm, self.width))
            .transpose()?;
        let angles = given.angles::<T>(part)?;
        let seen = given.seen::<T>(part)?;
        let rows = numbers::<T>(given.rows, size(&[given.new, self.width])?)?;
        let picked = given.picked()?;
        let kept = picked.map_or(given.new, <[usize]>::len);
        let out = numbers_mut::<T>(given.out, size(&[kept, self.width])?)?;
        py.detach(|| {
            let mut rows = rows.to_vec();
            if let Some(linear) = before {
                let given = Rows {
                    numbers: &rows,
                    width: self.width,
                    norm: None,
                };
                rows = machine.multiply(&[linear], Finish::Store, given);
            }
            let last = layers.len() - 1;
            for (index, (layer, seen)) in layers.iter().zip(seen).enumerate() {
                let rotary = part[index].table.map(|table| angles[table].rotary());
                rows = layer.run(
                    machine,
                    rows,
                    rotary,
                    seen,
                    picked.filter(|_| index == last),
                );
            }
            out.copy_from_slice(&rows);
            if let Some(norm) = after {
                step::norm_rows(machine.isa, norm, out);
            }
        });
        Ok(())
    }
}

impl LayerAt {
    fn linears(&self) -> impl Iterator<Item = LinearAt> {
        let rest = [self.output, self.block.0, self.block.1, self.down];
        self.projections.iter().copied().chain(rest)
    }

    fn at<'a, T: Number + Plain, W: Weight + Plain>(
        &self,
        width: usize,
    ) -> PyResult<Layer<'a, T, W>> {
        let (wide, narrow, each) = self.heads;
        let (gate, up) = self.block;
        let norms = match self.norms {
            None => None,
            Some((queries, keys)) => Some([norm_at(queries, each)?, norm_at(keys, each)?]),
        };
        let projections = self.projections.iter();
        Ok(Layer {
            before_attention: norm_at(self.before_attention, width)?,
            projections: projections
                .map(|&linear| linear_at(linear, width))
                .collect::<PyResult<_>>()?,
            norms,
            heads: Heads {
                wide,
                narrow,
                size: each,
                scaling: self.scaling,
                window: (self.window > 0).then_some(self.window),
            },
            output: linear_at(self.output, size(&[wide, each])?)?,
            before_block: norm_at(self.before_block, width)?,
            block: [linear_at(gate, width)?, linear_at(up, width)?],
            down: linear_at(self.down, gate.3)?,
            residual: self.residual,
        })
    }
}

/// Angles of the rows: cosines, signed sines, and partners.
struct Angles<'a, T>(Vec<T>, Vec<T>, &'a [i64]);

impl<T> Angles<'_, T> {
    fn rotary(&self) -> Rotary<'_, T> {
        Rotary {
            cosines: &self.0,
            sines: &self.1,
            partners: self.2,
        }
    }
}

impl Run {
    fn picked(&self) -> PyResult<Option<&[usize]>> {
        let picked = self.picked.as_deref();
        if picked.is_some_and(|rows| rows.iter().any(|&row| row >= self.new)) {
            return Err(PyValueError::new_err("a row that is not there is picked"));
        }
        Ok(picked)
    }

    /// The rows' angles by each table.
    fn angles<'a, T: Number + Plain>(&self, part: &[LayerAt]) -> PyResult<Vec<Angles<'a, T>>> {
        if part
            .iter()
            .any(|layer| layer.table >= Some(self.tables.len()))
        {
            return Err(PyValueError::new_err("there is no such table of angles"));
        }
        let each = part.first().map_or(0, |layer| layer.heads.2);
        let positions = numbers::<i64>(self.positions, self.new)?;
        let tables = self.tables.iter().map(|&(cosines, sines, known)| {
            let whole = size(&[known, each])?;
            if positions.iter().any(|&at| !(0..known as i64).contains(&at)) {
                return Err(PyValueError::new_err(
                    "a position is not in the table of angles",
                ));
            }
            let take = |table: &[T]| {
                let rows = positions.iter();
                rows.flat_map(|&at| &table[at as usize * each..][..each])
                    .copied()
                    .collect()
            };
            Ok(Angles(
                take(numbers(cosines, whole)?),
                take(numbers(sines, whole)?),
                numbers(self.partners, each)?,
            ))
        });
        tables.collect()
    }

    fn seen<'a, T: Number + Plain>(&self, part: &[LayerAt]) -> PyResult<Vec<Seen<'a, T>>> {
        let caches = part
            .iter()
            .zip(&self.caches)
            .map(|(layer, &(keys, values))| {
                let (_, narrow, each) = layer.heads;
                let kept = size(&[self.seen + self.new, narrow, each])?;
                Ok(Seen {
                    keys: numbers_mut(keys, kept)?,
                    values: numbers_mut(values, kept)?,
                    count: self.seen,
                })
            });
        caches.collect()
    }
}

fn linear_at<'a, T: Plain, W: Plain>(
    (weight, scales, bias, height): LinearAt,
    width: usize,
) -> PyResult<Linear<'a, T, W>> {
    Ok(Linear {
        weight: numbers(weight, size(&[height, width])?)?,
        scales: maybe(scales, height)?,
        bias: maybe(bias, height)?,
    })
}

fn norm_at<'a, T: Plain>((weight, eps): NormAt, width: usize) -> PyResult<Norm<'a, T>> {
    Ok(Norm {
        weight: numbers(weight, width)?,
        eps,
    })
}
