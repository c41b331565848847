//! What any processor can do.

use crate::samples::{BLOCK, Block, Lane};
use std::ops::Range;

/// Nothing more is asked of the keys where there are no intrinsics for them.
#[cfg(not(target_arch = "x86_64"))]
pub(crate) trait Compress {}

#[cfg(not(target_arch = "x86_64"))]
impl<T> Compress for T {}

/// Append the block's samples in the range, packed.
///
/// Every sample is written, and the next one over it if it is not in the range: no branch to mispredict.
#[inline(always)]
pub(super) fn compress<L: Lane>(block: &Block<L>, range: &Range<L>, list: &mut Vec<L::Packed>) {
    let mut packed = [L::Packed::default(); BLOCK + 1];
    let mut count = 0;
    for (&key, &weight) in block.keys.iter().zip(&block.weights) {
        packed[count.min(BLOCK)] = key.pack(range.start, weight);
        count += usize::from(range.contains(&key));
    }
    list.extend_from_slice(&packed[..count]);
}
