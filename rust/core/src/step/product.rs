//! Products of weights with a few rows.
//!
//! `out[r, o] = (sum over i of weight[o, i] * rows[r, i]) * scale[o] + bias[o]`, summed in float32.  Each sum is one of
//! 32 partial sums, so it is off by at most (n / 32 + 8) * 2^-24 of the sum of the absolute products, n their number,
//! before it is rounded to the type of the output.

use super::Queue;
use super::arch::{self, Work};
use super::lanes::{self, Chunk, Number, Simd, Weight};
use crate::isa::InstructionSet;
use std::marker::PhantomData;

/// A part of fewer bytes of a weight is not worth the asking.
const LEAST_PART: usize = 1 << 14;

/// A weight (O, I), row by row, and perhaps a scale for each of its rows, and a bias (O).
#[derive(Clone, Copy)]
pub struct Linear<'a, T, W = T> {
    /// O * I numbers.
    pub weight: &'a [W],
    /// O numbers.
    pub scales: Option<&'a [f32]>,
    /// O numbers.
    pub bias: Option<&'a [T]>,
}

/// Scale rows to unit root mean square, and then by a weight (I): `x / sqrt(mean(x^2) + eps) * weight`.
#[derive(Clone, Copy)]
pub struct Norm<'a, T> {
    /// I numbers.
    pub weight: &'a [T],
    /// What keeps rows of zeros finite.
    pub eps: f64,
}

/// Rows (R, `width`).
#[derive(Clone, Copy)]
pub struct Rows<'a, T> {
    /// R * `width` numbers.
    pub numbers: &'a [T],
    /// Numbers of a row.
    pub width: usize,
    /// What is done to them before they are multiplied.
    pub norm: Option<Norm<'a, T>>,
}

/// What is done with the products.
#[derive(Clone, Copy)]
pub enum Finish<'a, T> {
    /// Nothing: those of several weights stand one after another in each row.
    Store,
    /// They are multiplied by a factor and added to rows of their size, a residual.
    Add(&'a [T], f32),
    /// Those of the second weight are multiplied by `silu` of the first one's, as in a gated block.
    Gate,
}

/// Products that a team of threads works on together.
pub struct Product<'a, T, W = T> {
    isa: InstructionSet,
    width: usize,
    rows: Vec<Chunk>,
    parts: Queue<Part<'a, T, W>>,
}

/// Some outputs in a row: what they are made of, and where they go in each row of `out`.
struct Part<'a, T, W> {
    linear: Linear<'a, T, W>,
    then: Then<'a, T, W>,
    out: Vec<&'a mut [T]>,
}

enum Then<'a, T, W> {
    Store,
    Add(Vec<&'a [T]>, f32),
    GateOf(Linear<'a, T, W>),
}

impl<'a, T: Number, W: Weight> Product<'a, T, W> {
    /// Prepare the products of rows for a team of so many; `out` has (R, O) numbers, O the outputs of all weights, or
    /// of one where they are gated.
    ///
    /// # Panics
    /// If the sizes do not fit together, there are no rows, or a row has no numbers.
    pub fn new(
        isa: InstructionSet,
        linears: &[Linear<'a, T, W>],
        finish: Finish<'a, T>,
        rows: Rows<'_, T>,
        out: &'a mut [T],
        team: usize,
    ) -> Self {
        let width = rows.width;
        assert!(width > 0 && rows.numbers.len().is_multiple_of(width));
        assert!(rows.norm.is_none_or(|norm| norm.weight.len() == width));
        let count = rows.numbers.len() / width;
        assert!(count > 0);
        let parts = divide(linears, finish, width, count, out, team);
        Self {
            isa,
            width,
            rows: arch::run(isa, Widening(rows, PhantomData::<W>)),
            parts: Queue::of(parts),
        }
    }

    /// How many members of a team would find something to do.
    pub fn parts(&self) -> usize {
        self.parts.count
    }

    /// Take part after part until none is left; every member of the team calls it, in any order, or one alone does.
    pub fn work(&self) {
        while let Some(part) = self.parts.next() {
            arch::run(
                self.isa,
                Multiplying {
                    part,
                    rows: &self.rows,
                    width: self.width,
                },
            );
        }
    }
}

/// Divide outputs among a team.
fn divide<'a, T: Number, W: Weight>(
    linears: &[Linear<'a, T, W>],
    finish: Finish<'a, T>,
    width: usize,
    count: usize,
    out: &'a mut [T],
    team: usize,
) -> Vec<Part<'a, T, W>> {
    let (computed, mut gated) = match (finish, linears) {
        (Finish::Gate, [gate, up]) => (std::slice::from_ref(gate), Some(*up)),
        (Finish::Gate, _) => panic!("a gated block has two weights"),
        _ => (linears, None),
    };
    let heights = computed.iter().map(|linear| linear.height(width));
    let total: usize = heights.sum();
    assert!(out.len() == count * total && gated.is_none_or(|up| up.height(width) == total));
    let mut out: Vec<&mut [T]> = out.chunks_exact_mut(total.max(1)).collect();
    let mut residual: Option<(Vec<&[T]>, f32)> = match finish {
        Finish::Add(rows, factor) => {
            assert!(rows.len() == count * total);
            Some((rows.chunks_exact(total.max(1)).collect(), factor))
        }
        _ => None,
    };
    let least = LEAST_PART.div_ceil(width * size_of::<W>());
    let mut parts = Vec::with_capacity(team * computed.len());
    for linear in computed {
        let mut linear = *linear;
        let mut left = linear.height(width);
        let at_a_time = left.div_ceil(team.max(1)).max(least);
        while left > 0 {
            let height = at_a_time.min(left);
            left -= height;
            let then = match (&mut residual, &mut gated) {
                (Some((rows, factor)), _) => Then::Add(
                    rows.iter_mut().map(|row| take(row, height)).collect(),
                    *factor,
                ),
                (_, Some(up)) => Then::GateOf(up.take(height, width)),
                _ => Then::Store,
            };
            parts.push(Part {
                linear: linear.take(height, width),
                then,
                out: out.iter_mut().map(|row| take_mut(row, height)).collect(),
            });
        }
    }
    parts
}

impl<T, W> Linear<'_, T, W> {
    /// How many outputs there are.
    pub(super) fn height(&self, width: usize) -> usize {
        let height = self.weight.len() / width;
        assert!(self.weight.len() == height * width);
        assert!(self.scales.is_none_or(|scales| scales.len() == height));
        assert!(self.bias.is_none_or(|bias| bias.len() == height));
        height
    }

    /// Take the first outputs away.
    fn take(&mut self, height: usize, width: usize) -> Self {
        Self {
            weight: take(&mut self.weight, height * width),
            scales: self.scales.as_mut().map(|scales| take(scales, height)),
            bias: self.bias.as_mut().map(|bias| take(bias, height)),
        }
    }
}

fn take<'a, T>(numbers: &mut &'a [T], count: usize) -> &'a [T] {
    numbers.split_off(..count).expect("as many are left")
}

fn take_mut<'a, T>(numbers: &mut &'a mut [T], count: usize) -> &'a mut [T] {
    numbers.split_off_mut(..count).expect("as many are left")
}

/// Rows, normed and widened for products with a weight made of `W`.
struct Widening<'a, T, W>(Rows<'a, T>, PhantomData<W>);

impl<T: Number, W: Weight> Work for Widening<'_, T, W> {
    type Output = Vec<Chunk>;

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> Vec<Chunk> {
        let Rows {
            numbers,
            width,
            norm,
        } = self.0;
        let Some(norm) = norm else {
            return lanes::widen::<S, W, T>(simd, numbers, width);
        };
        let mut normed = numbers.to_vec();
        let norming = Norming {
            norm,
            rows: &mut normed,
        };
        norming.run(simd);
        lanes::widen::<S, W, T>(simd, &normed, width)
    }
}

/// Norm rows in their place.
///
/// # Panics
/// If the rows are not of the norm's size.
pub fn norm_rows<T: Number>(isa: InstructionSet, norm: Norm<'_, T>, rows: &mut [T]) {
    assert!(rows.len().is_multiple_of(norm.weight.len()));
    arch::run(isa, Norming { norm, rows });
}

struct Norming<'a, T> {
    norm: Norm<'a, T>,
    rows: &'a mut [T],
}

impl<T: Number> Work for Norming<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        for row in self.rows.chunks_exact_mut(self.norm.weight.len()) {
            normalise(simd, row, self.norm);
        }
    }
}

/// Norm a row in its place.
#[inline(always)]
pub(super) fn normalise<S: Simd, T: Number>(simd: S, row: &mut [T], norm: Norm<'_, T>) {
    let mean = f64::from(lanes::sum_of_squares(simd, row)) / row.len() as f64;
    let scale = (1.0 / (mean + norm.eps).sqrt()) as f32;
    for (number, weight) in row.iter_mut().zip(norm.weight) {
        let unit = T::from_f32(number.to_f32() * scale);
        *number = T::from_f32(unit.to_f32() * weight.to_f32());
    }
}

struct Multiplying<'a, T, W> {
    part: Part<'a, T, W>,
    rows: &'a [Chunk],
    width: usize,
}

impl<T: Number, W: Weight> Work for Multiplying<'_, T, W> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Part {
            linear,
            then,
            mut out,
        } = self.part;
        multiply(simd, linear, self.rows, self.width, &mut out);
        match then {
            Then::Store => {}
            Then::Add(residual, factor) => {
                for (row, residual) in out.iter_mut().zip(residual) {
                    for (number, residual) in row.iter_mut().zip(residual) {
                        let new = T::from_f32(number.to_f32() * factor);
                        *number = T::from_f32(residual.to_f32() + new.to_f32());
                    }
                }
            }
            Then::GateOf(up) => {
                let (count, height) = (out.len(), out[0].len());
                let mut gated = vec![T::ZERO; count * height];
                let mut ups: Vec<&mut [T]> = gated.chunks_exact_mut(height).collect();
                multiply(simd, up, self.rows, self.width, &mut ups);
                for (row, ups) in out.iter_mut().zip(&ups) {
                    for (number, up) in row.iter_mut().zip(ups.iter()) {
                        let gate = T::from_f32(lanes::silu(number.to_f32()));
                        *number = T::from_f32(gate.to_f32() * up.to_f32());
                    }
                }
            }
        }
    }
}

/// Bytes of a weight that are multiplied with one group of rows before the next.
const WEIGHT_AT_HAND: usize = 16 << 10;

/// So far ahead, in bytes, a weight is asked for.  Zen 4's own prefetch fails beside the loads of several rows: without,
/// a thread takes twice as long over 2 rows of bfloat16 as over one, and with it as long.
const AHEAD: usize = 8 << 10;

/// Sums of a weight's rows with all rows.
#[inline(always)]
fn multiply<S: Simd, T: Number, W: Weight>(
    simd: S,
    linear: Linear<'_, T, W>,
    rows: &[Chunk],
    width: usize,
    out: &mut [&mut [T]],
) {
    let (chunks, together) = (lanes::chunks(width), lanes::together::<S>(width));
    let height = linear.weight.len() / width;
    let at_a_time = (WEIGHT_AT_HAND / (width * size_of::<W>())).max(1);
    for first in (0..height).step_by(at_a_time) {
        let mut rows = rows;
        for (number, out) in out.chunks_mut(together).enumerate() {
            let (group, rest) = rows.split_at(chunks * out.len());
            rows = rest;
            for output in first..height.min(first + at_a_time) {
                let from_here = &linear.weight[output * width..];
                // By the first group alone: the others find the weight at hand.
                let ahead = from_here
                    .get(AHEAD / size_of::<W>()..)
                    .filter(|_| number == 0);
                let ahead = ahead.unwrap_or_default();
                let scale = linear.scales.map_or(1.0, |scales| scales[output]);
                let bias = linear.bias.map_or(0.0, |bias| bias[output].to_f32());
                let sums = lanes::dots(simd, &from_here[..width], ahead, group, out.len());
                for (out, sum) in out.iter_mut().zip(sums) {
                    out[output] = T::from_f32(sum * scale + bias);
                }
            }
        }
    }
}
