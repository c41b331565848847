//! One pass that counts the samples in many cells of equal width: the whole course of the counts, where no few edges
//! can tell enough.

use crate::error::Result;
use crate::run::Run;
use crate::samples::{BLOCK, Block, Lane, Samples};
use crate::scan::{Pass, Simd, pass, pieces};
use crate::tally::Counts;
use std::ops::Range;

/// Cells of one width over a range of keys.
#[derive(Debug)]
pub(crate) struct Cells<L> {
    low: L,
    /// A cell is two to this power keys wide.
    shift: u32,
    count: usize,
}

/// What the pass found.
pub(crate) struct Table<L> {
    /// The counts of all samples.
    pub total: Counts,
    /// The counts from the start of each cell up, and from the end of the last.
    pub counts: Vec<Counts>,
    /// The lowest key.
    pub lowest: L,
    /// Whether all samples are valid; if not, the rest means nothing.
    pub valid: bool,
}

impl<L: Lane> Cells<L> {
    /// At most `most` cells, a power of two, that hold the keys from `low` to `high`.
    pub fn over(low: L, high: L, most: usize) -> Self {
        let width = high.above(low);
        let shift = (u64::BITS - width.leading_zeros()).saturating_sub(most.ilog2());
        Self {
            low,
            shift,
            count: (width >> shift) as usize + 1,
        }
    }

    /// Where each cell starts, and where the last ends.
    pub fn edges(&self) -> impl Iterator<Item = L> {
        (0..=self.count).map(|cell| self.low.raised((cell as u128) << self.shift))
    }

    /// Whether a cell is one key.
    pub fn are_keys(&self) -> bool {
        self.shift == 0
    }
}

/// Count the samples in each cell.
pub(crate) fn tabulate<X: Samples>(
    samples: &X,
    cells: &Cells<X::Lane>,
    run: &Run,
) -> Result<Table<X::Lane>> {
    let isa = run.instruction_set();
    let tables = run.fold(
        pieces(samples.places(), run),
        || Sums::new(cells),
        |sums, part| {
            pass(
                isa,
                Count {
                    samples,
                    part,
                    cells,
                    sums,
                },
            )
        },
    )?;
    let all = tables
        .into_iter()
        .reduce(Sums::plus)
        .unwrap_or_else(|| Sums::new(cells));
    let mut left = Counts::default();
    let mut counts: Vec<_> = all.slots[1..]
        .iter()
        .rev()
        .map(|&slot| {
            left += slot;
            left
        })
        .collect();
    counts.reverse();
    Ok(Table {
        total: left + all.slots[0],
        counts,
        lowest: all.lowest,
        valid: all.valid,
    })
}

/// What one thread has counted: below the cells, in each, above them.
struct Sums<L> {
    slots: Vec<Counts>,
    lowest: L,
    valid: bool,
}

impl<L: Lane> Sums<L> {
    fn new(cells: &Cells<L>) -> Self {
        Self {
            slots: vec![Counts::default(); cells.count + 2],
            lowest: L::MAX,
            valid: true,
        }
    }

    fn plus(mut self, other: Self) -> Self {
        for (slot, more) in self.slots.iter_mut().zip(other.slots) {
            *slot += more;
        }
        self.lowest = self.lowest.min(other.lowest);
        self.valid &= other.valid;
        self
    }
}

struct Count<'a, X: Samples> {
    samples: &'a X,
    part: Range<usize>,
    cells: &'a Cells<X::Lane>,
    sums: &'a mut Sums<X::Lane>,
}

impl<X: Samples> Pass<X::Lane> for Count<'_, X> {
    type Found = ();

    #[inline(always)]
    fn run(self, simd: impl Simd<X::Lane>) {
        let Cells { low, shift, count } = *self.cells;
        // Both counts in one word, so that a sample costs one addition; a part has fewer than 2^32 samples.
        let mut words = vec![0u64; count + 2];
        let mut block = Block::new();
        let mut slots = [0u32; BLOCK];
        for start in self.part.clone().step_by(BLOCK) {
            let loaded = self.samples.load(simd, start, &mut block);
            self.sums.lowest = self.sums.lowest.min(loaded.lowest);
            self.sums.valid &= loaded.valid;
            let end = block.end();
            for (slot, &key) in slots.iter_mut().zip(&block.keys[..end]) {
                let cell = (key.above(low) >> shift).min(count as u64) as u32;
                *slot = if key < low { 0 } else { cell + 1 };
            }
            for (&slot, &weight) in slots.iter().zip(&block.weights[..end]) {
                let word = &mut words[(slot as usize).min(count + 1)];
                *word += weight.word();
            }
        }
        for (slot, word) in self.sums.slots.iter_mut().zip(words) {
            *slot += Counts {
                accepted: word as u32 as usize,
                correct: (word >> 32) as usize,
            };
        }
    }
}
