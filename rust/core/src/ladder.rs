//! What thresholds accept, counted without sorting: a histogram of the keys, refined where it matters.
//!
//! A first pass counts the samples of every bucket of a fixed non-decreasing map; the counts from each bucket's low
//! end up are then exact.  A second pass gathers the few buckets in which a threshold may lie.

use crate::curve::Ascending;
use crate::error::Result;
use crate::isa::InstructionSet;
use crate::order::{Key, Score};
use crate::run::Run;
use crate::samples::Given;
use crate::scan::{Pass, Simd, pass};
use crate::sort::sort_pairs;
use crate::survivors::Survivors;
use crate::tally::{Counts, Criterion, Group, lowest_that_meets};
use crate::validate::require_valid;
use std::ops::{ControlFlow, RangeInclusive};

/// Samples that are sorted: a histogram has more buckets.
const FEW: usize = 1 << 15;
/// Samples one thread counts before its table is added up.
const PIECE: usize = 1 << 22;
/// Samples whose buckets are computed together, which the compiler does with vector instructions.
const TOGETHER: usize = 64;
/// Gathered samples that are worth another look at the data, at least.
const ROOM: usize = 1 << 16;
/// The share of the samples that is gathered in one pass at most, if one bucket does not hold more.
const ROOM_SHARE: usize = 64;

/// The upper half of the bits of 1/2 and 1 as float32 keys.
const HALF: u32 = 0xbf00;
const ONE: u32 = 0xbf80;
/// Buckets between 1/2 and 1: float32 has 2944 that differ in the upper half of the bits of 1 - x, and 1 has its own.
const CROWDED: u32 = 2946;
/// All buckets.
const BUCKETS: usize = (0x1_0000 - ONE + HALF + CROWDED) as usize;

/// The counts of samples by score, as fine as needed.
pub(crate) struct Ladder<'a, S: Score> {
    samples: Survivors<'a, S>,
    run: &'a Run<'a>,
    rungs: Rungs<S::Key>,
}

enum Rungs<K> {
    /// Every distinct key, ascending.
    Fine(Vec<Group<K>>),
    /// From each bucket up.
    Coarse(Vec<Counts>),
}

/// The place of a score among float32 buckets: the upper half of the bits of its key, but between 1/2 and 1 of the
/// distance to 1, since scores crowd there.
///
/// `1 - x` is exact for x in [1/2, 1].  One unit is taken off its bits, so that a distance whose lower half is zero still
/// belongs to the bucket below it, of which it is then the low end.
#[inline(always)]
fn bucket_of_float(key: u32) -> u32 {
    let top = key >> 16;
    let score = f32::from_bits(key & 0x7fff_ffff);
    let away = (1.0 - score).to_bits().saturating_sub(1) >> 16;
    let crowded = HALF + (HALF - 0x8001).wrapping_sub(away).min(CROWDED - 1);
    let is_crowded = key.wrapping_sub(HALF << 16) <= (ONE - HALF) << 16;
    let plain = if top < HALF {
        top
    } else {
        top + CROWDED - (ONE - HALF)
    };
    if is_crowded { crowded } else { plain }
}

/// Scores that fall into the buckets.
pub trait Bucketed: Score {
    /// The float32 key of the largest float32 that is not above the score.
    #[doc(hidden)]
    fn float_key(self) -> u32;
    /// The score nearest to a number.
    #[doc(hidden)]
    fn near(number: f64) -> Self;

    /// The lowest key whose score is at least a number; None if the number is above all finite scores.
    #[doc(hidden)]
    fn at_least(number: f64) -> Option<Self::Key> {
        let near = Self::near(number);
        let key = near.key();
        let key = if near.value() < number {
            Self::Key::from_index(key.index() + 1)
        } else {
            key
        };
        Self::from_key(key).is_finite().then_some(key)
    }
}

impl Bucketed for f32 {
    #[inline(always)]
    fn float_key(self) -> u32 {
        Score::key(self)
    }

    fn near(number: f64) -> Self {
        number as f32
    }
}

impl Bucketed for f64 {
    #[inline(always)]
    fn float_key(self) -> u32 {
        let near = self as f32;
        let key = Score::key(near);
        key - u32::from(f64::from(near) > self)
    }

    fn near(number: f64) -> Self {
        number
    }
}

impl Bucketed for half::f16 {
    #[inline(always)]
    fn float_key(self) -> u32 {
        Score::key(self.to_f32())
    }

    fn near(number: f64) -> Self {
        Self::from_f64(number)
    }
}

impl Bucketed for half::bf16 {
    #[inline(always)]
    fn float_key(self) -> u32 {
        Score::key(f32::from_bits(u32::from(self.to_bits()) << 16))
    }

    fn near(number: f64) -> Self {
        Self::from_f64(number)
    }
}

#[inline(always)]
fn bucket<S: Bucketed>(score: S) -> u32 {
    bucket_of_float(score.float_key())
}

impl<'a, S: Bucketed> Ladder<'a, S> {
    /// Count the samples, refusing invalid ones.
    pub fn count(samples: Survivors<'a, S>, run: &'a Run<'a>) -> Result<Self> {
        let rungs = if samples.scores.len() <= FEW {
            require_valid(samples.scores, samples.correct, None, run)?;
            Rungs::Fine(fine(&samples, run)?)
        } else {
            Rungs::Coarse(coarse(&samples, run)?)
        };
        Ok(Self {
            samples,
            run,
            rungs,
        })
    }

    /// The counts of all samples.
    pub fn total(&self) -> Counts {
        let first = match &self.rungs {
            Rungs::Fine(groups) => groups.first().map(|&(_, counts)| counts),
            Rungs::Coarse(from) => from.first().copied(),
        };
        first.unwrap_or_default()
    }

    /// The lowest score whose counts meet a criterion.
    pub fn lowest(&self, criterion: impl Criterion) -> Result<Option<Group<S::Key>>> {
        let from = match &self.rungs {
            Rungs::Fine(groups) => {
                return Ok(lowest_that_meets(groups, Counts::default(), criterion));
            }
            Rungs::Coarse(from) => from,
        };
        let room = ROOM.max(self.total().accepted / ROOM_SHARE);
        let mut open = Vec::new();
        find_open(from, 0, BUCKETS, criterion, &mut open);
        let mut rest = open.as_slice();
        while !rest.is_empty() {
            let mut held = 0;
            let is_full = |&bucket: &usize| {
                held += (from[bucket] - from[bucket + 1]).accepted;
                held > room
            };
            let some = rest.iter().position(is_full).unwrap_or(rest.len() - 1);
            let groups = self.expand(&rest[..=some])?;
            let found = lowest_that_meets(&groups, from[rest[some] + 1], criterion);
            if found.is_some() {
                return Ok(found);
            }
            rest = &rest[some + 1..];
        }
        Ok(None)
    }

    /// What is accepted from each of these scores up, ascending.
    pub fn at(&self, thresholds: &[f64]) -> Result<Vec<Counts>> {
        let edges: Vec<Option<S::Key>> = thresholds.iter().map(|&edge| S::at_least(edge)).collect();
        let first_from = |groups: &[Group<S::Key>], key: S::Key| {
            groups
                .get(groups.partition_point(|&(other, _)| other < key))
                .copied()
        };
        let from = match &self.rungs {
            Rungs::Fine(groups) => {
                let counts = |edge: &Option<S::Key>| {
                    edge.and_then(|key| first_from(groups, key))
                        .map_or(Counts::default(), |(_, counts)| counts)
                };
                return Ok(edges.iter().map(counts).collect());
            }
            Rungs::Coarse(from) => from,
        };
        // A bucket whose low end is the threshold needs no second look.
        let cuts: Vec<Option<(usize, bool)>> = edges
            .iter()
            .map(|edge| edge.map(|key| (bucket(S::from_key(key)) as usize, is_low_end::<S>(key))))
            .collect();
        let mut wanted: Vec<usize> = cuts
            .iter()
            .flatten()
            .filter(|(bucket, whole)| !whole && from[*bucket] != from[bucket + 1])
            .map(|&(bucket, _)| bucket)
            .collect();
        wanted.dedup();
        let groups = self.expand(&wanted)?;
        let counts = edges.iter().zip(&cuts).map(|(edge, cut)| {
            let (Some(key), Some((bucket, whole))) = (*edge, *cut) else {
                return Counts::default();
            };
            if whole {
                return from[bucket];
            }
            match first_from(&groups, key) {
                Some((next, counts)) if self::bucket(S::from_key(next)) as usize == bucket => {
                    counts
                }
                _ => from[bucket + 1],
            }
        });
        Ok(counts.collect())
    }

    /// The groups in which the samples of these ranks lie; rank 1 is the highest score, ranks ascend.
    pub fn ranks(&self, ranks: &[usize]) -> Result<Vec<Group<S::Key>>> {
        match &self.rungs {
            Rungs::Fine(groups) => Ok(ranks.iter().map(|&rank| of_rank(groups, rank)).collect()),
            Rungs::Coarse(from) => {
                let place =
                    |&rank: &usize| from.partition_point(|counts| counts.accepted >= rank) - 1;
                let mut wanted: Vec<usize> = ranks.iter().rev().map(place).collect();
                wanted.dedup();
                let groups = self.expand(&wanted)?;
                Ok(ranks.iter().map(|&rank| of_rank(&groups, rank)).collect())
            }
        }
    }

    /// The lowest of the keys of the samples of these ranks, ascending, such that what scores higher passes; with the
    /// counts of that.
    ///
    /// Of `passes` the same is asked as of a [`Criterion`].
    pub fn lowest_above(
        &self,
        ranks: &[usize],
        passes: impl Fn(Counts) -> bool,
    ) -> Result<Option<Group<S::Key>>> {
        let place = |groups: &[Group<S::Key>], rank| {
            groups.partition_point(|&(_, counts)| counts.accepted >= rank) - 1
        };
        let from = match &self.rungs {
            Rungs::Fine(groups) => {
                let above = |&rank: &usize| {
                    let at = place(groups, rank);
                    let above = groups.get(at + 1).map(|&(_, counts)| counts);
                    (groups[at].0, above.unwrap_or_default())
                };
                let mut boundaries = ranks.iter().rev().map(above);
                return Ok(boundaries.find(|&(_, counts)| passes(counts)));
            }
            Rungs::Coarse(from) => from,
        };
        let rung = |rank: usize| from.partition_point(|counts| counts.accepted >= rank) - 1;
        // At best all correct samples of the bucket lie above.
        let might_pass = |&rank: &usize| {
            let (low, high) = (from[rung(rank)], from[rung(rank) + 1]);
            let right = (low - high).correct;
            passes(Counts {
                accepted: high.accepted + right,
                correct: high.correct + right,
            })
        };
        let mut open = ranks.iter().rev().copied().filter(might_pass);
        // The first passes more often than not; each further look at the data takes in twice as many.
        for look in 0.. {
            let some: Vec<usize> = open.by_ref().take(1 << look).collect();
            if some.is_empty() {
                break;
            }
            let mut wanted: Vec<usize> = some.iter().map(|&rank| rung(rank)).collect();
            wanted.dedup();
            let groups = self.expand(&wanted)?;
            let above = |rank| {
                let at = place(&groups, rank);
                let bucket = self::bucket(S::from_key(groups[at].0)) as usize;
                // The group after may lie in a bucket further up.
                let next = groups
                    .get(at + 1)
                    .filter(|(key, _)| self::bucket(S::from_key(*key)) as usize == bucket);
                let above = next.map_or(from[bucket + 1], |&(_, counts)| counts);
                (groups[at].0, above)
            };
            let mut boundaries = some.into_iter().map(above);
            if let Some(found) = boundaries.find(|&(_, counts)| passes(counts)) {
                return Ok(Some(found));
            }
        }
        Ok(None)
    }

    /// The groups of the buckets that hold a stretch of ranks; None where they are too many to gather.
    pub fn stretch(&self, first: usize, last: usize) -> Result<Option<Vec<Group<S::Key>>>> {
        let Rungs::Coarse(from) = &self.rungs else {
            return Ok(None);
        };
        let place = |rank: usize| from.partition_point(|counts| counts.accepted >= rank) - 1;
        let (low, high) = (place(last), place(first));
        let room = ROOM.max(self.total().accepted / ROOM_SHARE);
        if from[low].accepted - from[high + 1].accepted > room {
            return Ok(None);
        }
        let wanted: Vec<usize> = (low..=high)
            .filter(|&bucket| from[bucket] != from[bucket + 1])
            .collect();
        self.expand(&wanted).map(Some)
    }

    /// Bounds of the counts from the sample of a rank up: the most and the least its group can hold.
    pub fn around_rank(&self, rank: usize) -> (Counts, Counts) {
        match &self.rungs {
            Rungs::Fine(groups) => {
                let (_, counts) = groups[groups.partition_point(|&(_, c)| c.accepted >= rank) - 1];
                (counts, counts)
            }
            Rungs::Coarse(from) => {
                let place = from.partition_point(|counts| counts.accepted >= rank) - 1;
                (from[place], from[place + 1])
            }
        }
    }

    /// The groups of some buckets, ascending.
    fn expand(&self, wanted: &[usize]) -> Result<Vec<Group<S::Key>>> {
        let Rungs::Coarse(from) = &self.rungs else {
            return Ok(Vec::new());
        };
        if wanted.is_empty() {
            return Ok(Vec::new());
        }
        let (keys, flags) = self.gather(wanted)?;
        let (keys, flags) = sort_pairs(keys, flags, |key| key, self.run)?;
        let mut groups: Vec<Group<S::Key>> = Vec::new();
        let mut inside = usize::MAX;
        let mut counts = Counts::default();
        for (&key, &flag) in keys.iter().zip(&flags).rev() {
            let bucket = bucket(S::from_key(key)) as usize;
            if bucket != inside {
                inside = bucket;
                counts = from[bucket + 1];
            }
            counts += Counts {
                accepted: 1,
                correct: usize::from(flag),
            };
            match groups.last_mut() {
                Some((last, sum)) if *last == key => *sum = counts,
                _ => groups.push((key, counts)),
            }
        }
        groups.reverse();
        Ok(groups)
    }

    /// The samples of some buckets, in no order.
    fn gather(&self, wanted: &[usize]) -> Result<(Vec<S::Key>, Vec<u8>)> {
        let mut is_wanted = vec![false; BUCKETS];
        wanted.iter().for_each(|&bucket| is_wanted[bucket] = true);
        let within = keys_of::<S>(wanted[0] as u32, wanted[wanted.len() - 1] as u32);
        let isa = self.run.instruction_set();
        let found = self.run.map(self.samples.pieces(PIECE / 16), |samples| {
            let gather = Gather {
                samples,
                is_wanted: &is_wanted,
                within: within.clone(),
            };
            pass(isa, gather)
        })?;
        let (mut keys, mut flags) = (Vec::new(), Vec::new());
        for (more_keys, more_flags) in found {
            keys.extend(more_keys);
            flags.extend(more_flags);
        }
        Ok((keys, flags))
    }
}

/// The group, among ascending ones, in which the sample of a rank lies.
pub(crate) fn of_rank<K: Key>(groups: &[Group<K>], rank: usize) -> Group<K> {
    groups[groups.partition_point(|&(_, counts)| counts.accepted >= rank) - 1]
}

/// Collect the buckets from `low` up to `high` in which a threshold may do, ascending, as far as the first whose low end
/// does; tell whether there is one.
fn find_open(
    from: &[Counts],
    low: usize,
    high: usize,
    criterion: impl Criterion,
    open: &mut Vec<usize>,
) -> bool {
    if !from[low].might_meet(from[high], criterion) {
        return false;
    }
    if high - low == 1 {
        // The low end of a bucket is that of its lowest sample: if it does, nothing above matters.
        open.push(low);
        return criterion.is_met(from[low]);
    }
    let middle = low.midpoint(high);
    find_open(from, low, middle, criterion, open) || find_open(from, middle, high, criterion, open)
}

/// The keys of the buckets from `low` to `high`, both of which have scores.
fn keys_of<S: Bucketed>(low: u32, high: u32) -> RangeInclusive<S::Key> {
    let first_from = |limit: u32| {
        let (mut below, mut from) = (0, usize::MAX >> (usize::BITS - S::Key::BITS));
        while below < from {
            let middle = below.midpoint(from);
            if bucket(S::from_key(S::Key::from_index(middle))) < limit {
                below = middle + 1;
            } else {
                from = middle;
            }
        }
        from
    };
    S::Key::from_index(first_from(low))..=S::Key::from_index(first_from(high + 1) - 1)
}

/// Whether the key is the lowest of its bucket.
fn is_low_end<S: Bucketed>(key: S::Key) -> bool {
    // The key below that of zero belongs to -0.0, which has zero's.
    let below = |steps| S::from_key(S::Key::from_index(key.index().saturating_sub(steps)));
    let before = if below(1).key() == key {
        below(2)
    } else {
        below(1)
    };
    bucket(before) != bucket(S::from_key(key))
}

/// Every distinct key.
fn fine<S: Bucketed>(samples: &Survivors<S>, run: &Run) -> Result<Vec<Group<S::Key>>> {
    let mut groups = Vec::new();
    let collect = |key, counts| {
        groups.push((key, counts));
        ControlFlow::Continue(())
    };
    match samples.compact() {
        Some((scores, correct)) => {
            let given = Given {
                scores: &scores,
                correct: &correct,
            };
            Ascending::sorted(&given, run)?.groups(Counts::default(), run, collect)?;
        }
        None => {
            let given = Given {
                scores: samples.scores,
                correct: samples.correct,
            };
            Ascending::sorted(&given, run)?.groups(Counts::default(), run, collect)?;
        }
    }
    Ok(groups)
}

/// The counts from each bucket up.
fn coarse<S: Bucketed>(samples: &Survivors<S>, run: &Run) -> Result<Vec<Counts>> {
    let size = (samples.scores.len() / (4 * run.threads())).clamp(PIECE / 16, PIECE);
    let isa = run.instruction_set();
    let tables = run.fold(samples.pieces(size), Table::new, |table, samples| {
        pass(isa, Count { samples, table });
    })?;
    if tables.iter().any(|table| !table.valid) {
        require_valid(samples.scores, samples.correct, None, run)?;
    }
    let mut from = vec![Counts::default(); BUCKETS + 1];
    for mut table in tables {
        table.empty();
        for (counts, more) in from.iter_mut().zip(table.sums) {
            *counts += more;
        }
    }
    let mut sum = Counts::default();
    for counts in from.iter_mut().rev() {
        sum += *counts;
        *counts = sum;
    }
    Ok(from)
}

/// The samples of each bucket, as one thread counts them.
struct Table {
    /// Both counts in one word, so that a sample costs one addition; 2^32 samples of one bucket would be too many.
    words: Vec<u64>,
    held: usize,
    /// What was counted before.
    sums: Vec<Counts>,
    valid: bool,
}

impl Table {
    fn new() -> Self {
        Self {
            words: vec![0; BUCKETS],
            held: 0,
            sums: vec![Counts::default(); BUCKETS],
            valid: true,
        }
    }

    fn empty(&mut self) {
        for (counts, word) in self.sums.iter_mut().zip(&mut self.words) {
            let (accepted, correct) = (*word as u32 as usize, (*word >> 32) as usize);
            *counts += Counts { accepted, correct };
            *word = 0;
        }
        self.held = 0;
    }
}

/// Count the samples of each bucket.
struct Count<'a, S> {
    samples: Survivors<'a, S>,
    table: &'a mut Table,
}

impl<S: Bucketed> Pass<i32> for Count<'_, S> {
    type Found = ();

    #[inline(always)]
    fn run(self, _: impl Simd<i32>) {
        let Self { samples, table } = self;
        if table.held + samples.scores.len() > u32::MAX as usize {
            table.empty();
        }
        table.held += samples.scores.len();
        let mut buckets = [0u32; TOGETHER];
        let mut offence = false;
        samples.words(|alive, scores, correct| {
            for ((bucket, score), flag) in buckets.iter_mut().zip(scores).zip(correct) {
                *bucket = self::bucket(*score);
                offence |= !score.is_finite() | (*flag > 1);
            }
            if alive == u64::MAX {
                for (&bucket, &flag) in buckets.iter().zip(correct) {
                    table.words[bucket as usize] += 1 + (u64::from(flag) << 32);
                }
            } else {
                let mut rest = alive;
                while rest != 0 {
                    let at = rest.trailing_zeros() as usize;
                    rest &= rest - 1;
                    table.words[buckets[at] as usize] += 1 + (u64::from(correct[at]) << 32);
                }
            }
        });
        table.valid &= !offence;
    }
}

/// Collect the samples of some buckets.
struct Gather<'a, S: Score> {
    samples: Survivors<'a, S>,
    is_wanted: &'a [bool],
    /// From the lowest key of the lowest bucket to the highest of the highest: a comparison costs less than a bucket.
    within: RangeInclusive<S::Key>,
}

impl<S: Bucketed> Pass<i32> for Gather<'_, S> {
    type Found = (Vec<S::Key>, Vec<u8>);

    #[inline(always)]
    fn run(self, _: impl Simd<i32>) -> Self::Found {
        let (mut keys, mut flags) = (Vec::new(), Vec::new());
        let (first, last) = self.within.into_inner();
        self.samples.words(|alive, scores, correct| {
            let mut any = false;
            for score in scores {
                any |= (first <= score.key()) & (score.key() <= last);
            }
            if !any {
                return;
            }
            for (at, (score, flag)) in scores.iter().zip(correct).enumerate() {
                let is_near = (first <= score.key()) & (score.key() <= last);
                if is_near && alive >> at & 1 == 1 && self.is_wanted[bucket(*score) as usize] {
                    keys.push(score.key());
                    flags.push(*flag);
                }
            }
        });
        (keys, flags)
    }
}

/// Thresholds by bucket, so that the place of a score among them is found at once.
pub(crate) struct Steps<S: Score> {
    /// The lowest keys that reach them, ascending; none of those that no score can reach.
    edges: Vec<S::Key>,
    /// For each bucket, how many of them all its scores reach, and how many some may.
    reached: Vec<(u32, u32)>,
}

impl<S: Bucketed> Steps<S> {
    /// From thresholds in ascending order.
    pub fn at(thresholds: &[f64]) -> Self {
        let edges: Vec<S::Key> = thresholds
            .iter()
            .map_while(|&edge| S::at_least(edge))
            .collect();
        let mut added = vec![(0, 0); BUCKETS];
        for &edge in &edges {
            let (all, some) = &mut added[bucket(S::from_key(edge)) as usize];
            *some += 1;
            *all += u32::from(is_low_end::<S>(edge));
        }
        let mut below = 0;
        let reached = added.into_iter().map(|(all, some)| {
            let first = below;
            below += some;
            (first + all, first + some)
        });
        Self {
            reached: reached.collect(),
            edges,
        }
    }

    /// How many there are that a score can reach.
    pub fn count(&self) -> usize {
        self.edges.len()
    }

    /// Place samples among them.
    pub fn place(&self, scores: &[S], correct: &[u8], isa: InstructionSet) -> Placed<S::Key> {
        let place = Place {
            scores,
            correct,
            steps: self,
        };
        pass(isa, place)
    }
}

/// Samples among thresholds.
pub(crate) struct Placed<K> {
    /// How many thresholds each reaches; twice that, and one more where it is correct.
    pub cells: Vec<u32>,
    /// The lowest and the highest key.
    pub range: (K, K),
    /// Whether all are valid; if not, the rest means nothing.
    pub valid: bool,
}

/// Place samples among thresholds.
struct Place<'a, S: Score> {
    scores: &'a [S],
    correct: &'a [u8],
    steps: &'a Steps<S>,
}

impl<S: Bucketed> Pass<i32> for Place<'_, S> {
    type Found = Placed<S::Key>;

    #[inline(always)]
    fn run(self, _: impl Simd<i32>) -> Self::Found {
        let Steps { edges, reached } = self.steps;
        let mut cells = Vec::with_capacity(self.scores.len());
        let mut buckets = [0u32; TOGETHER];
        let (mut lowest, mut highest) = (S::Key::from_index(usize::MAX), S::Key::default());
        let mut valid = true;
        Survivors::all(self.scores, self.correct).words(|_, scores, correct| {
            for ((bucket, score), flag) in buckets.iter_mut().zip(scores).zip(correct) {
                *bucket = self::bucket(*score);
                lowest = lowest.min(score.key());
                highest = highest.max(score.key());
                valid &= score.is_finite() & (*flag <= 1);
            }
            let samples = scores.iter().zip(correct);
            cells.extend(
                buckets
                    .iter()
                    .zip(samples)
                    .map(|(&bucket, (score, &flag))| {
                        let (all, some) = reached[bucket as usize];
                        let inside = &edges[all as usize..some as usize];
                        let above = inside.partition_point(|&edge| edge <= score.key());
                        2 * (all + above as u32) + u32::from(flag & 1)
                    }),
            );
        });
        Placed {
            cells,
            range: (lowest, highest),
            valid,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_do_not_fall_and_low_ends_are_what_they_should_be() {
        let mut last = 0;
        let mut keys: Vec<u32> = (0..=u32::MAX).step_by(4099).collect();
        keys.extend(Score::key(0.4999f32)..Score::key(0.5001f32));
        keys.extend(Score::key(0.99999f32)..Score::key(1.001f32));
        keys.sort_unstable();
        for key in keys {
            let bucket = bucket_of_float(key);
            assert!((bucket as usize) < BUCKETS && bucket >= last, "{key:x}");
            last = bucket;
        }
        for k in 1..=20 {
            for m in 0..8 {
                let away = (1.0 + f64::from(m) / 8.0) / f64::from(1u32 << k);
                for edge in [away.min(0.5), 1.0 - away.min(0.5), 1.0, 0.0] {
                    assert!(is_low_end::<f32>(Score::key(edge as f32)), "{edge}");
                    assert!(is_low_end::<f64>(Score::key(edge)), "{edge}");
                }
            }
        }
        assert!(is_low_end::<f32>(Score::key(1.0f32.next_up())));
    }

    #[test]
    fn the_keys_of_buckets_are_theirs_alone() {
        fn check<S: Bucketed>(scores: &[S]) {
            for &score in scores {
                let bucket = bucket(score);
                let keys = keys_of::<S>(bucket, bucket);
                assert!(keys.contains(&score.key()), "{score:?}");
                let (first, last) = (keys.start().index(), keys.end().index());
                for (index, inside) in [
                    (first - 1, false),
                    (first, true),
                    (last, true),
                    (last + 1, false),
                ] {
                    let score = S::from_key(S::Key::from_index(index));
                    assert_eq!(self::bucket(score) == bucket, inside, "{score:?}");
                }
                let wider = keys_of::<S>(bucket - 1, bucket);
                assert!(wider.start() <= keys.start() && wider.end() == keys.end());
            }
        }
        let numbers = [
            -3e38, -1.0, -1e-40, 0.0, 1e-40, 0.3, 0.5, 0.75, 0.9999, 1.0, 1.1, 3e38,
        ];
        check(&numbers.map(|number| number as f32));
        check(&numbers);
        let small: Vec<f64> = numbers
            .iter()
            .copied()
            .filter(|x: &f64| x.abs() < 2.0)
            .collect();
        check(
            &small
                .iter()
                .map(|&x| half::bf16::from_f64(x))
                .collect::<Vec<_>>(),
        );
        check(
            &small
                .iter()
                .map(|&x| half::f16::from_f64(x))
                .collect::<Vec<_>>(),
        );
    }
}
