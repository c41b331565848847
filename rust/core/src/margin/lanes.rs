//! The algorithm, once: sixteen float32 lanes over blocks of 256 logits, whatever the processor's vectors are.
//!
//! Logit i of a block belongs to lane i % 16.  In a block a lane's sixteen terms are added in float32 as a
//! balanced tree; the lanes of consecutive blocks are added in float64, and at the end the sixteen lanes as a
//! tree.  The last block is filled up with -inf.  In float32 every product that is added to is added to unrounded: a
//! fused multiply-add is one operation where processors have it, and what it gives is defined where they have not; so
//! the result is one on every machine.
//!
//! Terms are exp(l - shift), that of the floor where l - shift lies below it; and what `shift` is depends on the
//! maximum so coarsely that it can be guessed from the first logits: a row is read once, unless the guess turns out
//! wrong.  Where the maximum is known before the sum, as when the two largest might settle the question, ranges of
//! blocks below the floor are not summed: one block stands for all.  In one pass nothing tells that such ranges come.

use super::Top2;
use crate::error::Error;
use half::{bf16, f16};

pub(super) const LANES: usize = 16;
const BLOCK: usize = 256;
const TERMS: usize = BLOCK / LANES;

/// Shifts are its multiples; the maximum lies within half of it below the shift and a whole above, so that
/// exponentials of what is left are within float32.
const WINDOW: f32 = 64.0;
/// Shifted logits below it count as much as it does: less than exp(-48) of the largest, nothing even in float64.
const FLOOR: f32 = -80.0;
/// Adding it to a small float32 leaves the rounded integer in the low bits, on top of a float32's exponent bias.
const ROUNDER: f32 = 12_582_912.0 + 127.0; // 1.5 * 2^23 + bias
const LOG2_E: f32 = std::f32::consts::LOG2_E;
const LN_2: f32 = std::f32::consts::LN_2;
// exp(r) for |r| <= ln(2)/2 to 1.1e-7 relative: 1 + r + r^2 (C[0] + C[1] r + C[2] r^2 + C[3] r^3), minimax.
const C: [f32; 4] = [0.499_992_3, 0.166_671_15, 0.041_890_33, 0.008_312_5];

/// Sixteen float32 lanes and what the algorithm does with them: all an instruction set has to provide.
pub trait Simd: Copy {
    /// One float32 a lane.
    type Lanes: Copy;
    /// One float64 a lane.
    type Doubles: Copy;
    /// Which logits were NaN.
    type Mask: Copy;

    fn splat(self, value: f32) -> Self::Lanes;
    fn load_f32(self, logits: &[f32; LANES]) -> Self::Lanes;
    fn load_f16(self, logits: &[f16; LANES]) -> Self::Lanes;
    /// May take the even lanes before the odd ones, if [`Simd::add_neighbours_bf16`] knows.
    fn load_bf16(self, logits: &[bf16; LANES]) -> Self::Lanes;

    fn add(self, a: Self::Lanes, b: Self::Lanes) -> Self::Lanes;
    fn sub(self, a: Self::Lanes, b: Self::Lanes) -> Self::Lanes;
    fn mul(self, a: Self::Lanes, b: Self::Lanes) -> Self::Lanes;
    /// `a * b + c`, rounded once.
    fn mul_add(self, a: Self::Lanes, b: Self::Lanes, c: Self::Lanes) -> Self::Lanes;
    /// `a` where it is larger, else (also where one is NaN) `b`.
    fn max(self, a: Self::Lanes, b: Self::Lanes) -> Self::Lanes;
    /// The float32 whose exponent is the low bits that [`ROUNDER`] leaves.
    fn power_of_two(self, rounded: Self::Lanes) -> Self::Lanes;

    fn no_nan(self) -> Self::Mask;
    fn or_nan(self, mask: Self::Mask, a: Self::Lanes, b: Self::Lanes) -> Self::Mask;
    fn any(self, mask: Self::Mask) -> bool;
    fn largest(self, a: Self::Lanes) -> f32;

    fn zeros(self) -> Self::Doubles;
    fn widening_add(self, sums: Self::Doubles, a: Self::Lanes) -> Self::Doubles;
    fn widening_sub(self, sums: Self::Doubles, a: Self::Lanes) -> Self::Doubles;
    /// Lane 0 plus lane 1, lane 2 plus lane 3, and so on.
    fn add_neighbours(self, sums: Self::Doubles) -> [f64; LANES / 2];
    /// The same, of lanes in the order of [`Simd::load_bf16`].
    fn add_neighbours_bf16(self, sums: Self::Doubles) -> [f64; LANES / 2] {
        self.add_neighbours(sums)
    }
}

/// A type of logits: `f32`, `f16` or `bf16`.
pub trait Logit: Copy + PartialEq + Send + Sync + 'static + sealed::Logit {}

impl Logit for f32 {}
impl Logit for f16 {}
impl Logit for bf16 {}

mod sealed {
    use super::{LANES, Simd};
    use half::{bf16, f16};

    pub trait Logit: Sized {
        const NEG_INFINITY: Self;
        fn to_f32(self) -> f32;
        fn from_f32(value: f32) -> Self;
        fn load<S: Simd>(simd: S, logits: &[Self; LANES]) -> S::Lanes;
        fn add_neighbours<S: Simd>(simd: S, sums: S::Doubles) -> [f64; LANES / 2];
    }

    macro_rules! logit {
        ($float:ty, $to_f32:expr, $from_f32:expr, $load:ident, $add_neighbours:ident) => {
            impl Logit for $float {
                const NEG_INFINITY: Self = <$float>::NEG_INFINITY;

                #[inline(always)]
                fn to_f32(self) -> f32 {
                    $to_f32(self)
                }

                #[inline(always)]
                fn from_f32(value: f32) -> Self {
                    $from_f32(value)
                }

                #[inline(always)]
                fn load<S: Simd>(simd: S, logits: &[Self; LANES]) -> S::Lanes {
                    simd.$load(logits)
                }

                #[inline(always)]
                fn add_neighbours<S: Simd>(simd: S, sums: S::Doubles) -> [f64; LANES / 2] {
                    simd.$add_neighbours(sums)
                }
            }
        };
    }

    logit!(f32, f32::from, f32::from, load_f32, add_neighbours);
    logit!(f16, f16::to_f32, f16::from_f32, load_f16, add_neighbours);
    logit!(
        bf16,
        bf16::to_f32,
        bf16::from_f32,
        load_bf16,
        add_neighbours_bf16
    );
}

/// What is wrong with a row.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Fault {
    Empty,
    NotALogit { index: usize, value: f32 },
    AllMasked,
}

impl Fault {
    pub(super) fn in_row(self, row: usize) -> Error {
        match self {
            Self::Empty => Error::Empty { argument: "logits" },
            Self::NotALogit { index, value } => Error::NotALogit { row, index, value },
            Self::AllMasked => Error::AllMasked { row },
        }
    }
}

type Block<T> = [T; BLOCK];

/// The token and margin of a row.
#[inline(always)]
pub(super) fn top2_margin<S: Simd, T: Logit>(simd: S, logits: &[T]) -> Result<Top2, Fault> {
    let mut row = Row::new(logits);
    let guess = shift_for(largest(simd, row.range(0), &mut simd.no_nan()));
    let (peaks, others) = if let Some(total) = row.read(simd, guess) {
        let peaks = row.find_peaks(simd);
        let others = row.without_token(simd, total, &peaks, guess);
        (peaks, others)
    } else {
        row.survey(simd, logits)?;
        let peaks = row.find_peaks(simd);
        let others = row.sum_others(simd, &peaks);
        (peaks, others)
    };
    Ok(Top2 {
        token: peaks.token,
        margin: peaks.margin(others),
    })
}

/// The token of a row and whether its margin reaches `tau`; the sum is left out where the top two tell.
#[inline(always)]
pub(super) fn exits<S: Simd, T: Logit>(
    simd: S,
    logits: &[T],
    tau: f64,
) -> Result<(usize, bool), Fault> {
    let mut row = Row::new(logits);
    row.survey(simd, logits)?;
    let peaks = row.find_peaks(simd);
    let exit = peaks.largest_margin() >= tau && {
        let others = row.sum_others(simd, &peaks);
        f64::from(peaks.margin(others)) >= tau
    };
    Ok((peaks.token, exit))
}

/// Into how many ranges of blocks a row is divided at most, its end not counted.
const RANGES: usize = 512;

/// A row in ranges of blocks, and what is known about it.
struct Row<'a, T> {
    whole: &'a [Block<T>],
    /// What follows the whole blocks, filled up with -inf.
    tail: Block<T>,
    ranges: usize,
    blocks_per_range: usize,
    /// The largest logit of each range.
    highs: [f32; RANGES + 1],
    /// The largest of all, the range it is in, and the largest of other ranges.
    first: f32,
    best: usize,
    runner_up: f32,
}

impl<'a, T: Logit> Row<'a, T> {
    #[inline(always)]
    fn new(logits: &'a [T]) -> Self {
        let (whole, rest) = logits.as_chunks::<BLOCK>();
        let mut tail = [T::NEG_INFINITY; BLOCK];
        tail[..rest.len()].copy_from_slice(rest);
        let blocks_per_range = whole.len().div_ceil(RANGES).max(4);
        Self {
            whole,
            tail,
            ranges: whole.len().div_ceil(blocks_per_range)
                + usize::from(!rest.is_empty() || whole.is_empty()),
            blocks_per_range,
            highs: [f32::NEG_INFINITY; RANGES + 1],
            first: f32::NEG_INFINITY,
            best: 0,
            runner_up: f32::NEG_INFINITY,
        }
    }

    /// The blocks of a range.
    #[inline(always)]
    fn range(&self, range: usize) -> &[Block<T>] {
        let start = range * self.blocks_per_range;
        if start >= self.whole.len() {
            return std::slice::from_ref(&self.tail);
        }
        &self.whole[start..self.whole.len().min(start + self.blocks_per_range)]
    }

    /// Note the largest logit of the next range.
    #[inline(always)]
    fn note(&mut self, range: usize, high: f32) {
        self.highs[range] = high;
        if high > self.first {
            (self.best, self.first, self.runner_up) = (range, high, self.first);
        } else if high > self.runner_up {
            self.runner_up = high;
        }
    }

    /// Find the largest logit and add up all terms at once, given how they are shifted; `None` where the largest
    /// wants another shift, or some logit is none.
    #[inline(always)]
    fn read<S: Simd>(&mut self, simd: S, shift: f32) -> Option<S::Doubles> {
        let mut total = simd.zeros();
        for range in 0..self.ranges {
            let mut high = simd.splat(f32::NEG_INFINITY);
            for block in self.range(range) {
                let terms = sum_block(simd, block, shift, &mut high);
                total = simd.widening_add(total, terms);
            }
            self.note(range, simd.largest(high));
            if shift_for(self.first) != shift {
                return None;
            }
        }
        // Terms that are shifted right are finite, so what is no number comes from what is none.
        let sum = add_eight(T::add_neighbours(simd, total));
        (self.first.is_finite() && !sum.is_nan()).then_some(total)
    }

    /// Find the largest logit, and what is no logit.
    #[inline(always)]
    fn survey<S: Simd>(&mut self, simd: S, logits: &[T]) -> Result<(), Fault> {
        (self.first, self.runner_up) = (f32::NEG_INFINITY, f32::NEG_INFINITY);
        let mut nan = simd.no_nan();
        for range in 0..self.ranges {
            let high = largest(simd, self.range(range), &mut nan);
            self.note(range, high);
        }
        if simd.any(nan) || self.first.is_infinite() {
            return Err(find_fault(logits));
        }
        Ok(())
    }

    /// Find the two largest logits, once all ranges have been looked at.
    #[inline(always)]
    fn find_peaks<S: Simd>(&self, simd: S) -> Peaks<T> {
        let blocks = self.range(self.best);
        let place = position(blocks.as_flattened(), T::from_f32(self.first));
        let (with, at) = (&blocks[place / BLOCK], place % BLOCK);
        let mut without = *with;
        without[at] = T::NEG_INFINITY;
        let (before, after) = (&blocks[..place / BLOCK], &blocks[place / BLOCK + 1..]);
        let mut second = self.runner_up;
        for others in [before, std::slice::from_ref(&without), after] {
            let high = largest(simd, others, &mut simd.no_nan());
            second = if high > second { high } else { second };
        }
        // Adding +0.0 turns -0.0 into it: which zero a maximum returns depends on the order of its operands.
        Peaks {
            token: self.whole.len().min(self.best * self.blocks_per_range) * BLOCK + place,
            first: self.first + 0.0,
            second: second + 0.0,
            with: *with,
            without,
        }
    }

    /// The sum of exp(l - l1) over all logits but the token's, once all ranges have been looked at.
    #[inline(always)]
    fn sum_others<S: Simd>(&self, simd: S, peaks: &Peaks<T>) -> f64 {
        let shift = shift_for(peaks.first);
        let mut total = simd.zeros();
        let high = &mut simd.splat(f32::NEG_INFINITY);
        for range in 0..self.ranges {
            let blocks = self.range(range);
            if self.highs[range] - shift <= FLOOR {
                // One such block is like another.
                let terms = sum_block(simd, &blocks[0], shift, high);
                for _ in blocks {
                    total = simd.widening_add(total, terms);
                }
                continue;
            }
            for block in blocks {
                let terms = sum_block(simd, block, shift, high);
                total = simd.widening_add(total, terms);
            }
        }
        self.without_token(simd, total, peaks, shift)
    }

    /// What a sum over all logits is without the token's term, in units of that term.
    ///
    /// In float32 the token's term would round all that it is added to; so its block is added anew.
    #[inline(always)]
    fn without_token<S: Simd>(
        &self,
        simd: S,
        total: S::Doubles,
        peaks: &Peaks<T>,
        shift: f32,
    ) -> f64 {
        let high = &mut simd.splat(f32::NEG_INFINITY);
        let with = sum_block(simd, &peaks.with, shift, high);
        let without = sum_block(simd, &peaks.without, shift, high);
        let total = simd.widening_add(simd.widening_sub(total, with), without);
        add_eight(T::add_neighbours(simd, total)) / term_of_largest(simd, peaks.first, shift)
    }
}

/// The two largest logits, and the block of the largest with it and without.
struct Peaks<T> {
    token: usize,
    first: f32,
    second: f32,
    with: Block<T>,
    without: Block<T>,
}

impl<T> Peaks<T> {
    /// p(1) - p(2), given the sum of exp(l - l1) over all logits but the token's.
    #[inline(always)]
    fn margin(&self, others: f64) -> f32 {
        (self.gap() / (1.0 + others)) as f32
    }

    /// No margin with these two is larger: the second logit is one of the others.
    ///
    /// The slack covers the error of the sum, of the division and of rounding to float32, subnormal or not.
    #[inline(always)]
    fn largest_margin(&self) -> f64 {
        let gap = self.gap();
        gap / (2.0 - gap) * (1.0 + 1e-6) + f64::from(f32::from_bits(1))
    }

    /// 1 - exp(l2 - l1).
    #[inline(always)]
    fn gap(&self) -> f64 {
        one_minus_exp(f64::from(self.second) - f64::from(self.first))
    }
}

/// The largest logit of some blocks, NaN passed over but marked.
#[inline(always)]
fn largest<S: Simd, T: Logit>(simd: S, blocks: &[Block<T>], nan: &mut S::Mask) -> f32 {
    let (rows, _) = blocks.as_flattened().as_chunks::<{ 2 * LANES }>();
    let mut high = [simd.splat(f32::NEG_INFINITY); 2];
    for row in rows {
        let (two, _) = row.as_chunks::<LANES>();
        let (a, b) = (T::load(simd, &two[0]), T::load(simd, &two[1]));
        *nan = simd.or_nan(*nan, a, b);
        high = [simd.max(a, high[0]), simd.max(b, high[1])];
    }
    simd.largest(simd.max(high[0], high[1]))
}

/// The first place that holds `value`; it is among the logits.
#[inline(always)]
fn position<T: Logit>(logits: &[T], value: T) -> usize {
    let (rows, _) = logits.as_chunks::<{ 2 * LANES }>();
    let holds = |row: &[T; 2 * LANES]| {
        row.iter()
            .fold(false, |found, &logit| found | (logit == value))
    };
    let row = rows.iter().position(holds).unwrap_or(0);
    row * 2 * LANES
        + rows[row]
            .iter()
            .position(|&logit| logit == value)
            .unwrap_or(0)
}

/// What stopped a row: the first NaN or +inf, or that there is nothing but -inf.
#[cold]
fn find_fault<T: Logit>(logits: &[T]) -> Fault {
    if logits.is_empty() {
        return Fault::Empty;
    }
    let values = logits.iter().map(|&logit| logit.to_f32());
    let mut faulty = values
        .enumerate()
        .filter(|&(_, value)| value.is_nan() || value == f32::INFINITY);
    faulty
        .next()
        .map_or(Fault::AllMasked, |(index, value)| Fault::NotALogit {
            index,
            value,
        })
}

/// What is subtracted from every logit of a row with this maximum: exact for all within 25 of it, and 0 for most
/// models' rows.
#[inline(always)]
fn shift_for(maximum: f32) -> f32 {
    if (-WINDOW / 2.0..WINDOW).contains(&maximum) || maximum.is_infinite() {
        0.0
    } else {
        (maximum / WINDOW).round_ties_even() * WINDOW
    }
}

/// The term of the largest logit in float64, with n and ln 2 as all terms have them.
#[inline(always)]
fn term_of_largest<S: Simd>(simd: S, maximum: f32, shift: f32) -> f64 {
    let x = maximum - shift;
    let n = simd.largest(round_multiple(simd, simd.splat(x))) - ROUNDER;
    let r = f64::from(x) - f64::from(n) * f64::from(LN_2);
    let power = f64::from_bits(((1023.0 + f64::from(n)) as u64) << 52);
    (1.0 + exp_m1_near_zero(r)) * power
}

/// The sums of a block's terms, as a balanced tree; `high` learns of its logits, NaN passed over.
#[inline(always)]
fn sum_block<S: Simd, T: Logit>(
    simd: S,
    block: &Block<T>,
    shift: f32,
    high: &mut S::Lanes,
) -> S::Lanes {
    // Most rows are not shifted, and one operation in fourteen is then saved.
    if shift == 0.0 {
        sum_shifted::<S, T, false>(simd, block, shift, high)
    } else {
        sum_shifted::<S, T, true>(simd, block, shift, high)
    }
}

// No closures here: they are compiled without the caller's instruction set.
#[inline(always)]
fn sum_shifted<S: Simd, T: Logit, const SHIFTED: bool>(
    simd: S,
    block: &Block<T>,
    shift: f32,
    high: &mut S::Lanes,
) -> S::Lanes {
    let (rows, _) = block.as_chunks::<LANES>();
    let (pairs, _) = rows.as_chunks::<2>();
    let mut sums = [simd.splat(0.0); TERMS / 2];
    for (pair, sum) in pairs.iter().zip(&mut sums) {
        let [mut a, mut b] = [T::load(simd, &pair[0]), T::load(simd, &pair[1])];
        *high = simd.max(simd.max(a, b), *high);
        if SHIFTED {
            [a, b] = [
                simd.sub(a, simd.splat(shift)),
                simd.sub(b, simd.splat(shift)),
            ];
        }
        *sum = simd.add(term(simd, a), term(simd, b));
    }
    let first = simd.add(simd.add(sums[0], sums[1]), simd.add(sums[2], sums[3]));
    let second = simd.add(simd.add(sums[4], sums[5]), simd.add(sums[6], sums[7]));
    simd.add(first, second)
}

/// exp(x), that of the floor where x lies below it.
#[inline(always)]
fn term<S: Simd>(simd: S, x: S::Lanes) -> S::Lanes {
    // In this order NaN stays NaN.
    let x = simd.max(simd.splat(FLOOR), x);
    let rounded = round_multiple(simd, x);
    let n = simd.sub(rounded, simd.splat(ROUNDER));
    let rest = simd.mul_add(n, simd.splat(-LN_2), x);
    let power = simd.power_of_two(rounded);
    simd.mul_add(exp_m1(simd, rest), power, power)
}

/// x / ln 2 to the nearest integer n, on top of [`ROUNDER`].
#[inline(always)]
fn round_multiple<S: Simd>(simd: S, x: S::Lanes) -> S::Lanes {
    simd.mul_add(x, simd.splat(LOG2_E), simd.splat(ROUNDER))
}

/// exp(r) - 1 for |r| <= ln(2)/2.
#[inline(always)]
fn exp_m1<S: Simd>(simd: S, r: S::Lanes) -> S::Lanes {
    let r2 = simd.mul(r, r);
    let low = simd.mul_add(simd.splat(C[1]), r, simd.splat(C[0]));
    let high = simd.mul_add(simd.splat(C[3]), r, simd.splat(C[2]));
    let series = simd.mul_add(high, r2, low);
    simd.mul_add(series, r2, r)
}

#[inline(always)]
fn add_eight(sums: [f64; 8]) -> f64 {
    ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]))
}

/// 1 - exp(y) for y <= 0, exact to a few float64 ulps also near zero.
#[inline(always)]
fn one_minus_exp(y: f64) -> f64 {
    const LN2_HIGH: f64 = 0.693_147_180_369_123_8; // 32 bits, so its product with an integer is exact
    const LN2_LOW: f64 = 1.908_214_929_270_587_7e-10;
    if y < -45.0 {
        return 1.0; // exp(-45) is less than half an ulp of 1
    }
    let n = (y * std::f64::consts::LOG2_E).round_ties_even();
    let reduced = (y - n * LN2_HIGH) - n * LN2_LOW;
    let power = f64::from_bits(((1023.0 + n) as u64) << 52);
    (1.0 - power) - power * exp_m1_near_zero(reduced)
}

/// exp(r) - 1 for |r| <= 0.35: Taylor's series to r^13, whose remainder is below 5e-18 of it.
#[inline(always)]
fn exp_m1_near_zero(r: f64) -> f64 {
    const FACTORIALS: [f64; 12] = [
        479_001_600.0,
        39_916_800.0,
        3_628_800.0,
        362_880.0,
        40_320.0,
        5_040.0,
        720.0,
        120.0,
        24.0,
        6.0,
        2.0,
        1.0,
    ];
    FACTORIALS
        .iter()
        .fold(1.0 / 6_227_020_800.0, |series, factorial| {
            series * r + 1.0 / factorial
        })
        * r
}

#[cfg(test)]
mod tests {
    use super::super::arch::portable::Portable;
    use super::*;
    use std::cell::Cell;

    /// The sum as it is defined: every block, one as another.
    fn defined_sum(row: &Row<'_, f32>, peaks: &Peaks<f32>) -> f64 {
        let (simd, shift) = (Portable, shift_for(peaks.first));
        let mut total = simd.zeros();
        for block in row.whole.iter().chain([&row.tail]) {
            let terms = sum_block(simd, block, shift, &mut simd.splat(0.0));
            total = simd.widening_add(total, terms);
        }
        row.without_token(simd, total, peaks, shift)
    }

    /// A margin's float32 is too coarse to show terms this small, so their sum is looked at.
    #[test]
    fn what_is_skipped_adds_the_same() {
        for top in [
            0.0, 12.5, -31.5, -32.5, 63.5, 64.0, 95.0, -96.5, 300.0, -1e4, 1e9,
        ] {
            let floor = shift_for(top) + FLOOR;
            let (below, above) = (floor.next_down(), floor.next_up());
            for kinds in [
                [below, floor, above],
                [f32::NEG_INFINITY, top - 1.0, below],
                [f32::NEG_INFINITY, floor, below],
            ] {
                // Ranges of 1024 alike, and some of two kinds.
                for period in [1, 1024, 1500] {
                    let logit = |i: usize| {
                        if i == 2000 {
                            top
                        } else {
                            kinds[i / period % 3]
                        }
                    };
                    let logits: Vec<f32> = (0..9 * 1024 + 5).map(logit).collect();
                    let row = surveyed(&logits);
                    let peaks = row.find_peaks(Portable);
                    let sum = row.sum_others(Portable, &peaks);
                    assert_eq!(sum.to_bits(), defined_sum(&row, &peaks).to_bits(), "{top}");
                    let margin = top2_margin(Portable, &logits).map(|top2| top2.margin);
                    assert_eq!(margin, Ok(peaks.margin(sum)), "{top}");
                }
            }
        }
    }

    /// With two logits the margin is what the bound is made from, so nothing is to spare but rounding.
    #[test]
    fn the_bound_on_the_margin_holds_where_it_is_tight() {
        let mut gap = 1e-45f64;
        while gap < 100.0 {
            for first in [0.0, 3.7, -40.0, 1e3] {
                let logits = [first, (f64::from(first) - gap) as f32];
                let Top2 { margin, .. } = top2_margin(Portable, &logits).expect("legal logits");
                let least = f64::from(margin);
                assert_eq!(exits(Portable, &logits, least), Ok((0, true)), "{gap}");
                assert_eq!(
                    exits(Portable, &logits, least.next_up()),
                    Ok((0, false)),
                    "{gap}"
                );
                let bound = surveyed(&logits).find_peaks(Portable).largest_margin();
                assert!(
                    least <= bound && bound <= least * (1.0 + 3e-6) + 1e-44,
                    "{gap}"
                );
            }
            gap *= 1.05;
        }
    }

    /// The portable lanes, counting the vectors whose exponentials are made.
    #[derive(Clone, Copy)]
    struct Counted<'a>(&'a Cell<usize>);

    impl Counted<'_> {
        /// Blocks whose exponentials were made since the last time.
        fn blocks(self) -> usize {
            assert_eq!(self.0.get() % TERMS, 0);
            self.0.take() / TERMS
        }
    }

    macro_rules! as_portable {
        ($($name:ident($($argument:ident: $kind:ty),*) -> $result:ty;)*) => {
            $(fn $name(self, $($argument: $kind),*) -> $result {
                Portable.$name($($argument),*)
            })*
        };
    }

    type Lanes = <Portable as Simd>::Lanes;
    type Doubles = <Portable as Simd>::Doubles;
    type Mask = <Portable as Simd>::Mask;

    impl Simd for Counted<'_> {
        type Lanes = Lanes;
        type Doubles = Doubles;
        type Mask = Mask;

        fn power_of_two(self, rounded: Lanes) -> Lanes {
            self.0.set(self.0.get() + 1);
            Portable.power_of_two(rounded)
        }

        as_portable! {
            splat(value: f32) -> Lanes;
            load_f32(logits: &[f32; LANES]) -> Lanes;
            load_f16(logits: &[f16; LANES]) -> Lanes;
            load_bf16(logits: &[bf16; LANES]) -> Lanes;
            add(a: Lanes, b: Lanes) -> Lanes;
            sub(a: Lanes, b: Lanes) -> Lanes;
            mul(a: Lanes, b: Lanes) -> Lanes;
            mul_add(a: Lanes, b: Lanes, c: Lanes) -> Lanes;
            max(a: Lanes, b: Lanes) -> Lanes;
            no_nan() -> Mask;
            or_nan(mask: Mask, a: Lanes, b: Lanes) -> Mask;
            any(mask: Mask) -> bool;
            largest(a: Lanes) -> f32;
            zeros() -> Doubles;
            widening_add(sums: Doubles, a: Lanes) -> Doubles;
            widening_sub(sums: Doubles, a: Lanes) -> Doubles;
            add_neighbours(sums: Doubles) -> [f64; LANES / 2];
        }
    }

    /// Of 64 blocks in 16 ranges, with -inf in half of the ranges.
    fn half_masked() -> Vec<f32> {
        let logit = |i: usize| match (i / (4 * BLOCK) % 2, i) {
            (_, 3000) => 6.0,
            (_, 3001) => 5.0,
            (0, _) => f32::NEG_INFINITY,
            _ => (i % 97) as f32 * 0.01,
        };
        (0..64 * BLOCK).map(logit).collect()
    }

    /// Shortcuts leave no trace in what is found, so what they save is counted: `2` is the token's block, anew.
    #[test]
    fn the_shortcuts_are_taken_where_they_may_be_and_nowhere_else() {
        let logits = half_masked();
        let (count, margin) = (Cell::new(0), top2_margin(Portable, &logits));
        let (simd, margin) = (Counted(&count), f64::from(margin.expect("legal").margin));
        let whole = top2_margin(simd, &logits).expect("legal");
        assert_eq!((whole.token, simd.blocks()), (3000, 64 + 2));
        let bound = surveyed(&logits).find_peaks(Portable).largest_margin();
        assert!(margin < 0.9 * bound && bound < 0.9);
        for tau in [bound.next_up(), 0.9, f64::INFINITY] {
            assert_eq!(exits(simd, &logits, tau), Ok((3000, false)));
            assert_eq!(
                simd.blocks(),
                0,
                "two logits show that {tau} is not reached"
            );
        }
        for tau in [bound, margin.next_up(), margin, 0.0] {
            assert_eq!(exits(simd, &logits, tau), Ok((3000, margin >= tau)));
            // Range 2 has 3000, so seven of eight masked ones are masked throughout.
            assert_eq!(simd.blocks(), 9 * 4 + 7 + 2, "{tau}");
        }
    }

    fn surveyed(logits: &[f32]) -> Row<'_, f32> {
        let mut row = Row::new(logits);
        row.survey(Portable, logits).expect("legal logits");
        row
    }
}
