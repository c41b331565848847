//! What any processor can do.

use super::Simd;
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
        for (&key, &weight) in block.keys.iter().zip(&block.weights) {
            packed[count.min(BLOCK)] = key.pack(range.start, weight);
            count += usize::from(range.contains(&key));
        }
        list.extend_from_slice(&packed[..count]);
    }
}
