//! The algorithm, once: products are added to two times sixteen float32 lanes, whatever the processor's vectors are.
//!
//! A weight is read in chunks of 32 numbers, in order and once, and each chunk is multiplied with that of every row.
//! Of bfloat16 the even numbers go to the first sixteen lanes and the odd ones to the others, which takes one
//! instruction each; of other types the first half and the second.  Rows are widened once, into the same order.

use super::Part;
use half::{bf16, f16};

pub(super) const LANES: usize = 16;
pub(super) const CHUNK: usize = 2 * LANES;

/// Sixteen float32 lanes and what the product does with them: all an instruction set has to provide.
pub trait Simd: Copy {
    /// One float32 a lane.
    type Lanes: Copy;
    /// For so many rows at once the sums stay in registers: at most [`MOST_TOGETHER`].
    const TOGETHER: usize;

    fn zero(self) -> Self::Lanes;
    fn load(self, values: &[f32; LANES]) -> Self::Lanes;
    fn store(self, a: Self::Lanes, values: &mut [f32; LANES]);
    fn load_f32(self, numbers: &[f32; CHUNK]) -> [Self::Lanes; 2];
    fn load_f16(self, numbers: &[f16; CHUNK]) -> [Self::Lanes; 2];
    /// The even numbers and the odd ones.
    fn load_bf16(self, numbers: &[bf16; CHUNK]) -> [Self::Lanes; 2];

    fn add(self, a: Self::Lanes, b: Self::Lanes) -> Self::Lanes;
    /// `a * b + c`, rounded once.
    fn mul_add(self, a: Self::Lanes, b: Self::Lanes, c: Self::Lanes) -> Self::Lanes;
    /// Lane i plus lane i + 8, of these i plus i + 4, then i + 2, then i + 1.
    fn sum(self, a: Self::Lanes) -> f32;
}

const MOST_TOGETHER: usize = 8;

/// A type of numbers: `f32`, `f16` or `bf16`.
pub trait Number: Copy + Send + Sync + 'static + sealed::Number {}

impl Number for f32 {}
impl Number for f16 {}
impl Number for bf16 {}

mod sealed {
    use super::{CHUNK, Simd};
    use half::{bf16, f16};

    pub trait Number: Sized {
        const ZERO: Self;
        fn to_f32(self) -> f32;
        fn from_f32(value: f32) -> Self;
        fn load<S: Simd>(simd: S, numbers: &[Self; CHUNK]) -> [S::Lanes; 2];
    }

    macro_rules! number {
        ($float:ty, $zero:expr, $to_f32:expr, $from_f32:expr, $load:ident) => {
            impl Number for $float {
                const ZERO: Self = $zero;

                #[inline(always)]
                fn to_f32(self) -> f32 {
                    $to_f32(self)
                }

                #[inline(always)]
                fn from_f32(value: f32) -> Self {
                    $from_f32(value)
                }

                #[inline(always)]
                fn load<S: Simd>(simd: S, numbers: &[Self; CHUNK]) -> [S::Lanes; 2] {
                    simd.$load(numbers)
                }
            }
        };
    }

    number!(f32, 0.0, f32::from, f32::from, load_f32);
    number!(f16, f16::ZERO, f16::to_f32, f16::from_f32, load_f16);
    number!(bf16, bf16::ZERO, bf16::to_f32, bf16::from_f32, load_bf16);
}

/// A chunk of a row in float32, in the order its lanes are loaded in; no load crosses a line of the cache.
#[derive(Clone, Copy)]
#[repr(align(64))]
pub(super) struct Chunk([[f32; LANES]; 2]);

/// Rows (R, width) in groups of as many as are multiplied together, in each group chunk by chunk of all its rows.
#[inline(always)]
pub(super) fn widen<S: Simd, T: Number>(simd: S, rows: &[T], width: usize) -> Vec<Chunk> {
    let chunks = width.div_ceil(CHUNK);
    let mut widened = Vec::with_capacity(rows.len() / width * chunks);
    for group in rows.chunks(S::TOGETHER * width) {
        for place in 0..chunks {
            for row in group.chunks_exact(width) {
                let [a, b] = T::load(simd, &chunk_at(row, place * CHUNK));
                let mut chunk = Chunk([[0.0; LANES]; 2]);
                simd.store(a, &mut chunk.0[0]);
                simd.store(b, &mut chunk.0[1]);
                widened.push(chunk);
            }
        }
    }
    widened
}

/// The chunk that starts at `start`, filled up with zeros.
#[inline(always)]
fn chunk_at<T: Number>(row: &[T], start: usize) -> [T; CHUNK] {
    let mut chunk = [T::ZERO; CHUNK];
    let there = CHUNK.min(row.len() - start);
    chunk[..there].copy_from_slice(&row[start..start + there]);
    chunk
}

/// The outputs of a part.
#[inline(always)]
pub(super) fn multiply<S: Simd, T: Number>(
    simd: S,
    part: Part<'_, T>,
    rows: &[Chunk],
    width: usize,
) {
    let Part {
        weight,
        bias,
        mut out,
    } = part;
    let chunks = width.div_ceil(CHUNK);
    for (output, weight) in weight.chunks_exact(width).enumerate() {
        let bias = bias.map_or(0.0, |bias| bias[output].to_f32());
        let mut rows = rows;
        for out in out.chunks_mut(S::TOGETHER) {
            let (group, rest) = rows.split_at(chunks * out.len());
            rows = rest;
            let sums = dots(simd, weight, group, out.len());
            for (out, sum) in out.iter_mut().zip(sums) {
                out[output] = T::from_f32(sum + bias);
            }
        }
    }
}

/// The sums for a group of `count` rows; what is beyond them is 0.
#[inline(always)]
fn dots<S: Simd, T: Number>(
    simd: S,
    weight: &[T],
    group: &[Chunk],
    count: usize,
) -> [f32; MOST_TOGETHER] {
    match count {
        1 => dots_of::<S, T, 1>(simd, weight, group),
        2 => dots_of::<S, T, 2>(simd, weight, group),
        3 => dots_of::<S, T, 3>(simd, weight, group),
        4 => dots_of::<S, T, 4>(simd, weight, group),
        5 => dots_of::<S, T, 5>(simd, weight, group),
        6 => dots_of::<S, T, 6>(simd, weight, group),
        7 => dots_of::<S, T, 7>(simd, weight, group),
        _ => dots_of::<S, T, 8>(simd, weight, group),
    }
}

// Loops over indices: what an iterator's closure does with lanes is not compiled for the instruction set everywhere.
#[inline(always)]
fn dots_of<S: Simd, T: Number, const R: usize>(
    simd: S,
    weight: &[T],
    group: &[Chunk],
) -> [f32; MOST_TOGETHER] {
    let mut sums = [[simd.zero(); 2]; R];
    let (whole, rest) = weight.as_chunks::<CHUNK>();
    let (group, _) = group.as_chunks::<R>();
    for (numbers, rows) in whole.iter().zip(group) {
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
fn add_products<S: Simd, T: Number, const R: usize>(
    simd: S,
    numbers: &[T; CHUNK],
    rows: &[Chunk; R],
    sums: &mut [[S::Lanes; 2]; R],
) {
    let [a, b] = T::load(simd, numbers);
    for row in 0..R {
        let [first, second] = &rows[row].0;
        sums[row][0] = simd.mul_add(a, simd.load(first), sums[row][0]);
        sums[row][1] = simd.mul_add(b, simd.load(second), sums[row][1]);
    }
}
