//! What any processor can do.

use super::{Bits, Simd};
use crate::samples::{BLOCK, Block, Lane};
use std::ops::Range;

#[derive(Clone, Copy)]
pub(super) struct Portable;

impl<L: Lane> Simd<L> for Portable {
    /// Every sample is written, and the next one over it if it is not in the range: no branch to mispredict.
    #[inline(always)]
    fn gather(self, block: &Block<L>, range: &Range<L>, list: &mut Vec<L::Packed>) {
        let mut packed = [L::Packed::default(); BLOCK + 1];
        let mut count = 0;
        let end = block.end();
        for (&key, &weight) in block.keys[..end].iter().zip(&block.weights[..end]) {
            packed[count.min(BLOCK)] = key.pack(range.start, weight);
            count += usize::from(range.contains(&key));
        }
        list.extend_from_slice(&packed[..count]);
    }

    /// In the same way.
    #[inline(always)]
    fn keep(self, block: &mut Block<L>, bits: &Bits) -> usize {
        let mut count = 0;
        for at in 0..BLOCK {
            block.keys[count.min(at)] = block.keys[at];
            block.weights[count.min(at)] = block.weights[at];
            count += (bits[at / 64] >> (at % 64) & 1) as usize;
        }
        count
    }
}
