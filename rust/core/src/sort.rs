//! Radix sort, least significant digit first: stable, and as fast on any input as on random ones.

use crate::error::Result;
use crate::order::{Key, Score};
use crate::run::Run;
use crate::validate::{require_pairs, require_valid};

const DIGIT_BITS: u32 = 8;
const DIGITS: usize = 1 << DIGIT_BITS;
/// Samples handled between two questions whether to stop.
pub(crate) const PIECE: usize = 1 << 20;

/// Scores ascending, and the correctness flags that belong to them; equal scores keep their order.
///
/// -0.0 and +0.0 are equal, and each keeps its sign.
pub fn sort_by_score<S: Score>(
    scores: &[S],
    correct: &[u8],
    run: &Run,
) -> Result<(Vec<S>, Vec<u8>)> {
    require_pairs(scores, correct)?;
    require_valid(scores, correct, None, run)?;
    sort_pairs(scores.to_vec(), correct.to_vec(), S::key, run)
}

/// Keys ascending.
pub(crate) fn sort_keys<K: Key>(mut keys: Vec<K>, run: &Run) -> Result<Vec<K>> {
    if keys.len() <= DIGITS {
        keys.sort_unstable();
        return Ok(keys);
    }
    let mut sorted = vec![K::default(); keys.len()];
    for pass in passes(&keys, |key| key, run)? {
        let mut next = pass.starts;
        for keys in keys.chunks(PIECE) {
            run.check()?;
            for &key in keys {
                let slot = &mut next[key.digit(pass.shift)];
                sorted[*slot] = key;
                *slot += 1;
            }
        }
        std::mem::swap(&mut keys, &mut sorted);
    }
    Ok(keys)
}

/// Items with their flags in stable ascending order of the items' keys.
pub(crate) fn sort_pairs<T: Copy, K: Key>(
    mut items: Vec<T>,
    mut flags: Vec<u8>,
    key: impl Fn(T) -> K + Copy,
    run: &Run,
) -> Result<(Vec<T>, Vec<u8>)> {
    let passes = passes(&items, key, run)?;
    let (mut sorted_items, mut sorted_flags) = (items.clone(), flags.clone());
    for pass in passes {
        let mut next = pass.starts;
        for (items, flags) in items.chunks(PIECE).zip(flags.chunks(PIECE)) {
            run.check()?;
            for (&item, &flag) in items.iter().zip(flags) {
                let slot = &mut next[key(item).digit(pass.shift)];
                sorted_items[*slot] = item;
                sorted_flags[*slot] = flag;
                *slot += 1;
            }
        }
        std::mem::swap(&mut items, &mut sorted_items);
        std::mem::swap(&mut flags, &mut sorted_flags);
    }
    Ok((items, flags))
}

/// One pass of the sort: the digit it looks at, and where the run of each digit value starts.
struct Pass {
    shift: u32,
    starts: [usize; DIGITS],
}

/// The passes that change anything: a digit that all keys share needs none.
fn passes<T: Copy, K: Key>(items: &[T], key: impl Fn(T) -> K, run: &Run) -> Result<Vec<Pass>> {
    let mut counts = vec![[0usize; DIGITS]; (K::BITS / DIGIT_BITS) as usize];
    for chunk in items.chunks(PIECE) {
        run.check()?;
        for &item in chunk {
            let key = key(item);
            for (digit, counts) in counts.iter_mut().enumerate() {
                counts[key.digit(digit as u32 * DIGIT_BITS)] += 1;
            }
        }
    }
    let passes = counts
        .iter()
        .enumerate()
        .filter(|(_, counts)| !counts.contains(&items.len()));
    Ok(passes
        .map(|(digit, counts)| {
            let mut end = 0;
            let starts = counts.map(|count| {
                end += count;
                end - count
            });
            Pass {
                shift: digit as u32 * DIGIT_BITS,
                starts,
            }
        })
        .collect())
}
