//! Radix sort, least significant digit first: stable, and as fast on any input as on random ones.
//!
//! Many items are first parted by their keys into buckets, piece by piece; each bucket is then put together and sorted
//! by itself.  That is work for all threads, and a bucket fits a cache that all items would not.

use crate::error::Result;
use crate::order::{Key, Score};
use crate::run::{Check, Run};
use crate::validate::{require_pairs, require_valid};
use std::ops::Range;

const DIGIT_BITS: u32 = 8;
const DIGITS: usize = 1 << DIGIT_BITS;
/// Samples handled between two questions whether to stop.
pub(crate) const PIECE: usize = 1 << 20;
/// Items from which on they are parted.
const WORTH_PARTING: usize = 1 << 17;
/// Buckets at most, as a power of two.
const BUCKET_BITS: u32 = 10;
/// The share of the items from which on a bucket is too much for one thread: all are then sorted as they are.
const CROWDED: usize = 4;

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
    let check = || run.check();
    let (scores, correct) = (copy(scores, &check)?, copy(correct, &check)?);
    sort_pairs(scores, correct, S::key, run)
}

/// Keys ascending.
pub(crate) fn sort_keys<K: Key>(mut keys: Vec<K>, run: &Run) -> Result<Vec<K>> {
    if keys.len() <= DIGITS {
        keys.sort_unstable();
        return Ok(keys);
    }
    let nothing = vec![(); keys.len()];
    sort_pairs(keys, nothing, |key| key, run).map(|(keys, _)| keys)
}

/// Items with their flags in stable ascending order of the items' keys.
pub(crate) fn sort_pairs<T, F, K>(
    mut items: Vec<T>,
    mut flags: Vec<F>,
    key: impl Fn(T) -> K + Copy + Sync,
    run: &Run,
) -> Result<(Vec<T>, Vec<F>)>
where
    T: Copy + Send + Sync,
    F: Copy + Send + Sync,
    K: Key,
{
    let check = || run.check();
    if items.len() < WORTH_PARTING {
        sort_here(&mut items, &mut flags, key, &check)?;
        return Ok((items, flags));
    }
    let buckets = Buckets::of(&items, key, run)?;
    let pieces = items.chunks_mut(PIECE).zip(flags.chunks_mut(PIECE));
    let starts = run.map(pieces.collect(), |(items, flags)| {
        buckets.part(items, flags, key)
    })?;
    let sizes: Vec<usize> = (0..buckets.count)
        .map(|bucket| {
            starts
                .iter()
                .map(|starts| within(starts, bucket).len())
                .sum()
        })
        .collect();
    if sizes.iter().any(|&size| size > items.len() / CROWDED) {
        sort_here(&mut items, &mut flags, key, &check)?;
        return Ok((items, flags));
    }
    let (mut sorted_items, mut sorted_flags) = (copy(&items, &check)?, copy(&flags, &check)?);
    let (mut rest_items, mut rest_flags) = (&mut sorted_items[..], &mut sorted_flags[..]);
    let mut tasks = Vec::with_capacity(buckets.count);
    for (bucket, &size) in sizes.iter().enumerate() {
        let (items, more_items) = rest_items.split_at_mut(size);
        let (flags, more_flags) = rest_flags.split_at_mut(size);
        (rest_items, rest_flags) = (more_items, more_flags);
        tasks.push((bucket, items, flags));
    }
    run.try_map(tasks, |(bucket, sorted_items, sorted_flags), check| {
        let mut end = 0;
        let pieces = items.chunks(PIECE).zip(flags.chunks(PIECE));
        for ((items, flags), starts) in pieces.zip(&starts) {
            check()?;
            let part = within(starts, bucket);
            let place = end..end + part.len();
            end = place.end;
            sorted_items[place.clone()].copy_from_slice(&items[part.clone()]);
            sorted_flags[place].copy_from_slice(&flags[part]);
        }
        sort_here(sorted_items, sorted_flags, key, check)
    })?;
    Ok((sorted_items, sorted_flags))
}

/// Where in a piece the items of a bucket are.
fn within(starts: &[u32], bucket: usize) -> Range<usize> {
    starts[bucket] as usize..starts[bucket + 1] as usize
}

/// Ranges of keys of one width.
struct Buckets {
    low: usize,
    shift: u32,
    count: usize,
}

impl Buckets {
    /// Over all keys of the items.
    fn of<T: Copy + Sync, K: Key>(
        items: &[T],
        key: impl Fn(T) -> K + Copy + Sync,
        run: &Run,
    ) -> Result<Self> {
        let extremes = run.map(items.chunks(PIECE).collect(), |items| {
            let keys = items.iter().map(|&item| key(item).index());
            keys.fold((usize::MAX, 0), |(low, high), key| {
                (low.min(key), high.max(key))
            })
        })?;
        let low = extremes.iter().map(|&(low, _)| low).min().unwrap_or(0);
        let high = extremes.iter().map(|&(_, high)| high).max().unwrap_or(0);
        let shift = (usize::BITS - (high - low).leading_zeros()).saturating_sub(BUCKET_BITS);
        Ok(Self {
            low,
            shift,
            count: ((high - low) >> shift) + 1,
        })
    }

    /// Put the items of a piece in stable order of their buckets; where each bucket starts, and the end.
    fn part<T: Copy, F: Copy, K: Key>(
        &self,
        items: &mut [T],
        flags: &mut [F],
        key: impl Fn(T) -> K,
    ) -> Vec<u32> {
        let bucket = |item| (key(item).index() - self.low) >> self.shift;
        let mut starts = vec![0; self.count + 1];
        for &item in items.iter() {
            starts[bucket(item) + 1] += 1;
        }
        for bucket in 0..self.count {
            starts[bucket + 1] += starts[bucket];
        }
        let mut next = starts.clone();
        let (given_items, given_flags) = (items.to_vec(), flags.to_vec());
        for (item, flag) in given_items.into_iter().zip(given_flags) {
            let slot = &mut next[bucket(item)];
            items[*slot as usize] = item;
            flags[*slot as usize] = flag;
            *slot += 1;
        }
        starts
    }
}

/// Items with their flags in stable ascending order of the items' keys, where they are.
fn sort_here<T: Copy, F: Copy, K: Key>(
    items: &mut [T],
    flags: &mut [F],
    key: impl Fn(T) -> K + Copy,
    check: Check<'_>,
) -> Result<()> {
    let passes = passes(items, key, check)?;
    let (mut other_items, mut other_flags) = (copy(items, check)?, copy(flags, check)?);
    let (mut from, mut to) = ((items, flags), (&mut other_items[..], &mut other_flags[..]));
    let is_elsewhere = passes.len() % 2 == 1;
    for pass in passes {
        let mut next = pass.starts;
        for (items, flags) in from.0.chunks(PIECE).zip(from.1.chunks(PIECE)) {
            check()?;
            for (&item, &flag) in items.iter().zip(flags) {
                let slot = &mut next[key(item).digit(pass.shift)];
                to.0[*slot] = item;
                to.1[*slot] = flag;
                *slot += 1;
            }
        }
        std::mem::swap(&mut from, &mut to);
    }
    if is_elsewhere {
        let places = to.0.chunks_mut(PIECE).zip(to.1.chunks_mut(PIECE));
        let sorted = from.0.chunks(PIECE).zip(from.1.chunks(PIECE));
        for ((to_items, to_flags), (items, flags)) in places.zip(sorted) {
            check()?;
            to_items.copy_from_slice(items);
            to_flags.copy_from_slice(flags);
        }
    }
    Ok(())
}

/// A copy, which takes seconds for a billion items.
fn copy<T: Copy>(items: &[T], check: Check<'_>) -> Result<Vec<T>> {
    let mut copied = Vec::with_capacity(items.len());
    for piece in items.chunks(PIECE) {
        check()?;
        copied.extend_from_slice(piece);
    }
    Ok(copied)
}

/// One pass of the sort: the digit it looks at, and where the run of each digit value starts.
struct Pass {
    shift: u32,
    starts: [usize; DIGITS],
}

/// The passes that change anything: a digit that all keys share needs none.
fn passes<T: Copy, K: Key>(
    items: &[T],
    key: impl Fn(T) -> K,
    check: Check<'_>,
) -> Result<Vec<Pass>> {
    let mut counts = vec![[0usize; DIGITS]; (K::BITS / DIGIT_BITS) as usize];
    for chunk in items.chunks(PIECE) {
        check()?;
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
