//! What a step is made of, once: sums of products in two times sixteen float32 lanes, whatever the processor's vectors
//! are, and functions of one number that a compiler turns into vectors.
//!
//! A weight is read in chunks of 32 numbers, in order and once, and each chunk is multiplied with that of every row.
//! Of bfloat16 the even numbers go to the first sixteen lanes and the odd ones to the others, which takes one
//! instruction each; of other types the first half and the second.  Rows are widened once, into the weight's order.

use half::{bf16, f16};

pub(super) const LANES: usize = 16;
pub(super) const CHUNK: usize = 2 * LANES;

/// Sixteen float32 lanes and what a step does with them: all an instruction set has to provide.
pub trait Simd: Copy {
    /// One float32 a lane.
    type Lanes: Copy;
    /// For so many rows at once the sums stay in registers: at most [`MOST_TOGETHER`].
    const TOGETHER: usize;

    /// Ask for what will be read soon.
    fn fetch<T>(self, number: &T);
    /// Ask for what will be read later, into the second cache.
    fn fetch_early<T>(self, number: &T);
    fn splat(self, value: f32) -> Self::Lanes;
    fn load(self, values: &[f32; LANES]) -> Self::Lanes;
    fn store(self, a: Self::Lanes, values: &mut [f32; LANES]);
    fn load_f32(self, numbers: &[f32; CHUNK]) -> [Self::Lanes; 2];
    fn load_f16(self, numbers: &[f16; CHUNK]) -> [Self::Lanes; 2];
    /// The even numbers and the odd ones.
    fn load_bf16(self, numbers: &[bf16; CHUNK]) -> [Self::Lanes; 2];
    fn load_i8(self, numbers: &[i8; CHUNK]) -> [Self::Lanes; 2];

    fn add(self, a: Self::Lanes, b: Self::Lanes) -> Self::Lanes;
    /// `a * b + c`, rounded once.
    fn mul_add(self, a: Self::Lanes, b: Self::Lanes, c: Self::Lanes) -> Self::Lanes;
    /// Lane i plus lane i + 8, of these i plus i + 4, then i + 2, then i + 1.
    fn sum(self, a: Self::Lanes) -> f32;
}

pub(super) const MOST_TOGETHER: usize = 8;

/// Bytes that memory is read in.
pub(super) const LINE: usize = 64;

/// What a weight can be made of: `f32`, `f16`, `bf16`, or `i8` that stand for themselves times a scale.
pub trait Weight: Copy + Send + Sync + 'static + sealed::Weight {}

/// A type of numbers to compute with: `f32`, `f16` or `bf16`.
pub trait Number: Weight + sealed::Number {}

impl Weight for f32 {}
impl Weight for f16 {}
impl Weight for bf16 {}
impl Weight for i8 {}
impl Number for f32 {}
impl Number for f16 {}
impl Number for bf16 {}

mod sealed {
    use super::{CHUNK, LANES, Simd};
    use half::{bf16, f16};

    pub trait Weight: Sized {
        const ZERO: Self;
        /// Whether even and odd numbers are loaded apart, instead of the first half and the second.
        const IN_TURNS: bool;
        fn load<S: Simd>(simd: S, numbers: &[Self; CHUNK]) -> [S::Lanes; 2];

        /// Where in a chunk a lane of the first or second sixteen comes from.
        #[inline(always)]
        fn place(half: usize, lane: usize) -> usize {
            if Self::IN_TURNS {
                2 * lane + half
            } else {
                half * LANES + lane
            }
        }
    }

    pub trait Number: Weight {
        fn to_f32(self) -> f32;
        fn from_f32(value: f32) -> Self;
    }

    macro_rules! weight {
        ($type:ty, $zero:expr, $load:ident, $in_turns:expr) => {
            impl Weight for $type {
                const ZERO: Self = $zero;
                const IN_TURNS: bool = $in_turns;

                #[inline(always)]
                fn load<S: Simd>(simd: S, numbers: &[Self; CHUNK]) -> [S::Lanes; 2] {
                    simd.$load(numbers)
                }
            }
        };
    }

    weight!(f32, 0.0, load_f32, false);
    weight!(f16, f16::ZERO, load_f16, false);
    weight!(bf16, bf16::ZERO, load_bf16, true);
    weight!(i8, 0, load_i8, false);

    macro_rules! number {
        ($float:ty, $to_f32:expr, $from_f32:expr) => {
            impl Number for $float {
                #[inline(always)]
                fn to_f32(self) -> f32 {
                    $to_f32(self)
                }

                #[inline(always)]
                fn from_f32(value: f32) -> Self {
                    $from_f32(value)
                }
            }
        };
    }

    /// Without a branch, so that a compiler can do many at once; the library's makes a quiet number of NaN first.
    #[inline(always)]
    fn widened(number: bf16) -> f32 {
        f32::from_bits(u32::from(number.to_bits()) << 16)
    }

    /// To the nearest, of two the even one.
    #[inline(always)]
    fn narrowed(value: f32) -> bf16 {
        let bits = value.to_bits();
        let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1));
        let kept = if value.is_nan() {
            bits | 0x40_0000
        } else {
            rounded
        };
        bf16::from_bits((kept >> 16) as u16)
    }

    number!(f32, f32::from, f32::from);
    number!(f16, f16::to_f32, f16::from_f32);
    number!(bf16, widened, narrowed);
}

/// A chunk of a row in float32, in the order a weight's lanes are loaded in; no load crosses a line of the cache.
#[derive(Clone, Copy)]
#[repr(align(64))]
pub(super) struct Chunk([[f32; LANES]; 2]);

/// Rows (R, width) in groups of as many as are multiplied together, in each group chunk by chunk of all its rows, in
/// the order of a weight made of `W`.
#[inline(always)]
pub(super) fn widen<S: Simd, W: Weight, T: Number>(
    simd: S,
    rows: &[T],
    width: usize,
) -> Vec<Chunk> {
    let chunks = chunks(width);
    let mut widened = Vec::with_capacity(rows.len() / width * chunks);
    for group in rows.chunks(together::<S>(width) * width) {
        for place in 0..chunks {
            for row in group.chunks_exact(width) {
                widened.push(widen_chunk::<S, W, T>(simd, &chunk_at(row, place * CHUNK)));
            }
        }
    }
    widened
}

#[inline(always)]
fn widen_chunk<S: Simd, W: Weight, T: Number>(simd: S, numbers: &[T; CHUNK]) -> Chunk {
    let mut chunk = Chunk([[0.0; LANES]; 2]);
    if T::IN_TURNS == W::IN_TURNS {
        let [a, b] = T::load(simd, numbers);
        simd.store(a, &mut chunk.0[0]);
        simd.store(b, &mut chunk.0[1]);
    } else {
        for half in 0..2 {
            for lane in 0..LANES {
                chunk.0[half][lane] = numbers[W::place(half, lane)].to_f32();
            }
        }
    }
    chunk
}

/// The chunk that starts at `start`, filled up with zeros.
#[inline(always)]
pub(super) fn chunk_at<T: Weight>(row: &[T], start: usize) -> [T; CHUNK] {
    let mut chunk = [T::ZERO; CHUNK];
    let there = CHUNK.min(row.len() - start);
    chunk[..there].copy_from_slice(&row[start..start + there]);
    chunk
}

/// Bytes of rows that are multiplied together, so that they stay in the fastest cache beside a weight's.
const ROWS_AT_HAND: usize = 24 << 10;

/// How many rows of so many numbers are multiplied together.
#[inline(always)]
pub(super) fn together<S: Simd>(width: usize) -> usize {
    (ROWS_AT_HAND / (width * size_of::<f32>())).clamp(1, S::TOGETHER)
}

/// How many chunks a row of so many numbers has.
#[inline(always)]
pub(super) fn chunks(width: usize) -> usize {
    width.div_ceil(CHUNK)
}

/// The sums for a group of `count` rows; what is beyond them is 0.  As many numbers as there are of `ahead` are asked
/// for meanwhile.
#[inline(always)]
pub(super) fn dots<S: Simd, W: Weight>(
    simd: S,
    weight: &[W],
    ahead: &[W],
    group: &[Chunk],
    count: usize,
) -> [f32; MOST_TOGETHER] {
    match count {
        1 => dots_of::<S, W, 1>(simd, weight, ahead, group),
        2 => dots_of::<S, W, 2>(simd, weight, ahead, group),
        3 => dots_of::<S, W, 3>(simd, weight, ahead, group),
        4 => dots_of::<S, W, 4>(simd, weight, ahead, group),
        5 => dots_of::<S, W, 5>(simd, weight, ahead, group),
        6 => dots_of::<S, W, 6>(simd, weight, ahead, group),
        7 => dots_of::<S, W, 7>(simd, weight, ahead, group),
        _ => dots_of::<S, W, 8>(simd, weight, ahead, group),
    }
}

// Loops over indices: what an iterator's closure does with lanes is not compiled for the instruction set everywhere.
#[inline(always)]
fn dots_of<S: Simd, W: Weight, const R: usize>(
    simd: S,
    weight: &[W],
    ahead: &[W],
    group: &[Chunk],
) -> [f32; MOST_TOGETHER] {
    let mut sums = [[simd.splat(0.0); 2]; R];
    let (whole, rest) = weight.as_chunks::<CHUNK>();
    let (group, _) = group.as_chunks::<R>();
    let (ahead, _) = ahead.as_chunks::<CHUNK>();
    for (place, (numbers, rows)) in whole.iter().zip(group).enumerate() {
        if let Some(later) = ahead.get(place) {
            for line in 0..size_of::<[W; CHUNK]>().div_ceil(LINE) {
                simd.fetch_early(&later[line * LINE / size_of::<W>()]);
            }
        }
        add_products(simd, numbers, rows, &mut sums);
    }
    if let (false, Some(rows)) = (rest.is_empty(), group.last()) {
        add_products(simd, &chunk_at(rest, 0), rows, &mut sums);
    }
    let mut found = [0.0; MOST_TOGETHER];
    for row in 0..R {
        found[row] = simd.sum(simd.add(sums[row][0], sums[row][1]));
    }
    found
}

#[inline(always)]
fn add_products<S: Simd, W: Weight, const R: usize>(
    simd: S,
    numbers: &[W; CHUNK],
    rows: &[Chunk; R],
    sums: &mut [[S::Lanes; 2]; R],
) {
    let [a, b] = W::load(simd, numbers);
    for row in 0..R {
        let [first, second] = &rows[row].0;
        sums[row][0] = simd.mul_add(a, simd.load(first), sums[row][0]);
        sums[row][1] = simd.mul_add(b, simd.load(second), sums[row][1]);
    }
}

/// The sum of the squares of numbers.
#[inline(always)]
pub(super) fn sum_of_squares<S: Simd, T: Number>(simd: S, numbers: &[T]) -> f32 {
    let mut sums = [simd.splat(0.0); 2];
    let (whole, rest) = numbers.as_chunks::<CHUNK>();
    for chunk in whole {
        add_squares(simd, chunk, &mut sums);
    }
    if !rest.is_empty() {
        add_squares(simd, &chunk_at(rest, 0), &mut sums);
    }
    simd.sum(simd.add(sums[0], sums[1]))
}

#[inline(always)]
fn add_squares<S: Simd, T: Number>(simd: S, chunk: &[T; CHUNK], sums: &mut [S::Lanes; 2]) {
    let [a, b] = T::load(simd, chunk);
    sums[0] = simd.mul_add(a, a, sums[0]);
    sums[1] = simd.mul_add(b, b, sums[1]);
}

/// `x / (1 + exp(-x))`; of what is below -87, where it is next to nothing, that of -87.
#[inline(always)]
pub(super) fn silu(x: f32) -> f32 {
    let x = if x < -87.0 { -87.0 } else { x };
    x / (1.0 + exp(-x))
}

/// Adding it to a small float32 leaves the rounded integer in the low bits, on top of a float32's exponent bias.
const ROUNDER: f32 = 12_582_912.0 + 127.0; // 1.5 * 2^23 + bias
// ln 2 as two float32, the first with so few bits that a product with an exponent is exact.
const LN_2: [f32; 2] = [0.693_359_4, -2.121_944_4e-4];
// exp(r) for |r| <= ln(2)/2 to 4e-9 relative: 1 + r + r^2 (C[0] + C[1] r + C[2] r^2 + ...), minimax.
const C: [f32; 5] = [
    0.499_999_94,
    0.166_665_21,
    0.041_668_39,
    0.008_368_745,
    0.001_381_454,
];

/// The exponential, off by at most 1.5e-7 of itself; of what is below -87 that of -87, of what is above 88 that of 88.
#[inline(always)]
pub(super) fn exp(x: f32) -> f32 {
    // Comparisons that leave NaN as it is.
    let x = if x < -87.0 { -87.0 } else { x };
    let x = if x > 88.0 { 88.0 } else { x };
    let rounded = x.mul_add(std::f32::consts::LOG2_E, ROUNDER);
    let power = rounded - ROUNDER;
    let rest = power.mul_add(-LN_2[1], power.mul_add(-LN_2[0], x));
    let series = rest.mul_add(C[4], C[3]);
    let series = rest.mul_add(series, C[2]);
    let series = rest.mul_add(series, C[1]);
    let series = rest.mul_add(series, C[0]);
    let value = (rest * rest).mul_add(series, rest) + 1.0;
    value * f32::from_bits(rounded.to_bits() << 23)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_exponential_is_near_that_of_float64() {
        for step in -870_000..=880_000 {
            let x = step as f32 / 10_000.0;
            let exact = f64::from(x).exp();
            let error = (f64::from(exp(x)) - exact).abs() / exact;
            assert!(error < 1.5e-7, "{x}: {error:e}");
        }
        assert_eq!(exp(0.0), 1.0);
        assert_eq!((exp(-200.0), exp(200.0)), (exp(-87.0), exp(88.0)));
        assert!(exp(f32::NAN).is_nan());
    }

    /// As by the library, which has been tested by many: ties, infinities, NaN, subnormals.
    #[test]
    fn bfloat16_is_widened_and_rounded_as_by_the_library() {
        for bits in 0..=u16::MAX {
            let number = bf16::from_bits(bits);
            let wide = sealed::Number::to_f32(number);
            assert!(wide == bf16::to_f32(number) || wide.is_nan() && number.is_nan());
            for below in [0, 1, 0x7fff, 0x8000, 0x8001, 0xffff] {
                let value = f32::from_bits(u32::from(bits) << 16 | below);
                let (ours, theirs) = (
                    <bf16 as sealed::Number>::from_f32(value),
                    bf16::from_f32(value),
                );
                assert!(
                    ours == theirs || ours.is_nan() && theirs.is_nan(),
                    "{value:e}"
                );
                assert_eq!(ours.is_nan(), value.is_nan());
            }
        }
    }

    #[test]
    fn silu_ends_where_it_should() {
        assert_eq!((silu(0.0), silu(100.0)), (0.0, 100.0));
        for x in [-100.0, -1e38, f32::NEG_INFINITY] {
            assert!(silu(x).abs() < 1e-30);
        }
        assert!(silu(f32::NAN).is_nan());
    }
}
