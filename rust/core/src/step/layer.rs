//! A decoder layer arranged as Llama's, over the few rows of a step.

use super::attention::{Attention, Before, Heads, Rotary};
use super::lanes::{Number, Weight};
use super::product::{Finish, Linear, Norm, Product, Rows};
use crate::isa::InstructionSet;

/// Who works on a step.
pub trait Team: Sync {
    /// How many there are.
    fn size(&self) -> usize;

    /// Let them all call `work` at the same time, or one alone where there are not two parts; returns when all have.
    fn run(&self, parts: usize, work: &(dyn Fn() + Sync));
}

/// What a step is computed with.
#[derive(Clone, Copy)]
pub struct Machine<'a> {
    /// The instructions.
    pub isa: InstructionSet,
    /// The threads.
    pub team: &'a dyn Team,
}

impl Machine<'_> {
    /// The products of rows, as of [`Product::new`].
    ///
    /// # Panics
    /// If the sizes do not fit together, there are no rows, or a row has no numbers.
    pub fn multiply<T: Number, W: Weight>(
        self,
        linears: &[Linear<'_, T, W>],
        finish: Finish<'_, T>,
        rows: Rows<'_, T>,
    ) -> Vec<T> {
        let count = rows.numbers.len() / rows.width;
        let counted = match finish {
            Finish::Gate => &linears[..1],
            _ => linears,
        };
        let height: usize = counted.iter().map(|linear| linear.height(rows.width)).sum();
        let mut out = vec![T::ZERO; count * height];
        self.multiply_into(linears, finish, rows, &mut out);
        out
    }

    /// The same, into numbers that are there.
    ///
    /// # Panics
    /// As [`Product::new`].
    pub fn multiply_into<'a, T: Number, W: Weight>(
        self,
        linears: &[Linear<'a, T, W>],
        finish: Finish<'a, T>,
        rows: Rows<'_, T>,
        out: &'a mut [T],
    ) {
        let product = Product::new(self.isa, linears, finish, rows, out, self.team.size());
        self.team.run(product.parts(), &|| product.work());
    }
}

/// A layer: `h + residual * output(attention(projections(norm h)))`, and the same once more with a gated block.
pub struct Layer<'a, T, W = T> {
    /// Of the rows, before they are projected.
    pub before_attention: Norm<'a, T>,
    /// Queries, keys and values, in one or several.
    pub projections: Vec<Linear<'a, T, W>>,
    /// Norms of each query head and of each key head.
    pub norms: Option<[Norm<'a, T>; 2]>,
    /// How they are divided.
    pub heads: Heads,
    /// Back to the rows' width.
    pub output: Linear<'a, T, W>,
    /// Of the rows, before the block.
    pub before_block: Norm<'a, T>,
    /// Gate and up.
    pub block: [Linear<'a, T, W>; 2],
    /// Back to the rows' width.
    pub down: Linear<'a, T, W>,
    /// Factor of what is added to the rows.
    pub residual: f32,
}

/// Positions a layer has seen: room for theirs and for new ones' keys and values, each of narrow heads.
pub struct Seen<'a, T> {
    /// Keys.
    pub keys: &'a mut [T],
    /// Values.
    pub values: &'a mut [T],
    /// How many positions they hold.
    pub count: usize,
}

impl<T: Number, W: Weight> Layer<'_, T, W> {
    /// Run it over the rows of new positions (R, width), whose keys and values are appended to what was seen; what comes
    /// after attention is computed for the `picked` rows alone, where there are any.
    ///
    /// # Panics
    /// If the sizes do not fit together, or a row that is not there is picked.
    pub fn run(
        &self,
        machine: Machine<'_>,
        mut rows: Vec<T>,
        rotary: Option<Rotary<'_, T>>,
        seen: Seen<'_, T>,
        picked: Option<&[usize]>,
    ) -> Vec<T> {
        let width = self.before_attention.weight.len();
        let mut mixed = self.attend(machine, &rows, rotary, seen);
        if let Some(picked) = picked {
            mixed = pick(&mixed, self.heads.wide * self.heads.size, picked);
            rows = pick(&rows, width, picked);
        }
        let add = |linear, numbers: &[T], inner, rows: &[T]| {
            let products = Rows {
                numbers,
                width: inner,
                norm: None,
            };
            machine.multiply(&[linear], Finish::Add(rows, self.residual), products)
        };
        rows = add(
            self.output,
            &mixed,
            self.heads.wide * self.heads.size,
            &rows,
        );
        let normed = Rows {
            numbers: &rows,
            width,
            norm: Some(self.before_block),
        };
        let fed = machine.multiply(&self.block, Finish::Gate, normed);
        let inner = self.block[0].height(width);
        add(self.down, &fed, inner, &rows)
    }

    /// What the queries of all rows mix (R, wide heads).
    fn attend(
        &self,
        machine: Machine<'_>,
        rows: &[T],
        rotary: Option<Rotary<'_, T>>,
        seen: Seen<'_, T>,
    ) -> Vec<T> {
        let width = self.before_attention.weight.len();
        let normed = Rows {
            numbers: rows,
            width,
            norm: Some(self.before_attention),
        };
        let projected = machine.multiply(&self.projections, Finish::Store, normed);
        let mut mixed = vec![T::ZERO; rows.len() / width * self.heads.wide * self.heads.size];
        let before = Before {
            norms: self.norms,
            rotary,
        };
        let attention = Attention::begin(
            machine.isa,
            self.heads,
            &projected,
            before,
            (seen.keys, seen.values),
            seen.count,
            &mut mixed,
        );
        machine.team.run(attention.parts(), &|| attention.work());
        attention.finish();
        mixed
    }
}

fn pick<T: Copy>(rows: &[T], width: usize, picked: &[usize]) -> Vec<T> {
    let mut found = Vec::with_capacity(picked.len() * width);
    for &row in picked {
        found.extend_from_slice(&rows[row * width..][..width]);
    }
    found
}
