//! One pass over the samples: count above every edge, and gather the samples of a few narrow ranges.

mod arch;

use crate::error::Result;
use crate::run::Run;
use crate::samples::{BLOCK, Block, Lane, Samples};
use crate::tally::Counts;
pub(crate) use arch::Compress;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Samples one thread scans before it looks for more work: a few milliseconds.
const PIECE: usize = 1 << 20;
/// Fewer samples are scanned by the calling thread alone: starting another takes as long.
const WORTH_A_THREAD: usize = 1 << 17;
/// Edges compared with a key that is loaded once.
const TOGETHER: usize = 4;

/// What a pass looks for.
#[derive(Debug)]
pub(crate) struct Plan<L> {
    /// Keys from which on samples are counted, ascending.
    pub edges: Vec<L>,
    /// Disjoint ranges of keys whose samples are gathered, each less than half of all keys wide.
    pub ranges: Vec<Range<L>>,
    /// How many samples may be gathered before gathering is given up.
    pub room: usize,
}

/// What a pass found.
pub(crate) struct Survey<L: Lane> {
    /// The counts of all samples.
    pub total: Counts,
    /// The counts from each edge up.
    pub counts: Vec<Counts>,
    /// The lowest key.
    pub lowest: L,
    /// The samples of each range, in their order; none at all if there was no room.
    pub gathered: Option<Vec<Vec<L::Packed>>>,
    /// Whether all samples are valid; if not, the rest means nothing.
    pub valid: bool,
}

/// Pass over all samples once.
pub(crate) fn survey<X: Samples>(
    samples: &X,
    plan: &Plan<X::Lane>,
    run: &Run,
) -> Result<Survey<X::Lane>> {
    let len = samples.len();
    let piece = match run.threads() {
        threads if threads > 1 && len >= WORTH_A_THREAD => (len / (4 * threads))
            .next_multiple_of(BLOCK)
            .clamp(WORTH_A_THREAD / 4, PIECE),
        _ => PIECE,
    };
    let pieces = (0..len)
        .step_by(piece)
        .map(|start| start..len.min(start + piece))
        .collect();
    let gathered = AtomicUsize::new(0);
    let isa = run.instruction_set();
    let parts = run.map(pieces, |range| {
        arch::scan(isa, samples, range, plan, &gathered)
    })?;
    let mut whole = Survey::new(plan);
    for (place, list) in whole.gathered.iter_mut().flatten().enumerate() {
        let parts = parts.iter().flat_map(|part| &part.gathered);
        list.reserve_exact(parts.map(|lists| lists[place].len()).sum());
    }
    for part in parts {
        whole.append(part);
    }
    Ok(whole)
}

impl<L: Lane> Survey<L> {
    fn new(plan: &Plan<L>) -> Self {
        Self {
            total: Counts::default(),
            lowest: L::MAX,
            counts: vec![Counts::default(); plan.edges.len()],
            gathered: Some(plan.ranges.iter().map(|_| Vec::new()).collect()),
            valid: true,
        }
    }

    /// Add what was found in the samples that follow.
    fn append(&mut self, next: Self) {
        for (counts, more) in self.counts.iter_mut().zip(next.counts) {
            *counts += more;
        }
        self.gathered = self
            .gathered
            .take()
            .zip(next.gathered)
            .map(|(mut gathered, next)| {
                for (samples, mut more) in gathered.iter_mut().zip(next) {
                    samples.append(&mut more);
                }
                gathered
            });
        self.total += next.total;
        self.lowest = self.lowest.min(next.lowest);
        self.valid &= next.valid;
    }
}

/// Scan a part of the samples.  Inlined into a function for each instruction set, which compiles it anew.
#[inline(always)]
fn scan<X: Samples>(
    samples: &X,
    part: Range<usize>,
    plan: &Plan<X::Lane>,
    gathered: &AtomicUsize,
    compress: impl Fn(&Block<X::Lane>, &Range<X::Lane>, &mut Vec<<X::Lane as Lane>::Packed>),
) -> Survey<X::Lane> {
    let mut survey = Survey::new(plan);
    let mut block = Block::new();
    for start in part.step_by(BLOCK) {
        let loaded = samples.load(start, &mut block);
        survey.total += loaded.weight.counts();
        survey.lowest = survey.lowest.min(loaded.lowest);
        survey.valid &= loaded.valid;
        let groups = plan
            .edges
            .chunks(TOGETHER)
            .zip(survey.counts.chunks_mut(TOGETHER));
        for (edges, counts) in groups {
            match *edges {
                [a, b, c, d] => count(&block, [a, b, c, d], counts),
                [a, b, c] => count(&block, [a, b, c], counts),
                [a, b] => count(&block, [a, b], counts),
                [a] => count(&block, [a], counts),
                _ => {}
            }
        }
        let Some(lists) = &mut survey.gathered else {
            continue;
        };
        let before: usize = lists.iter().map(Vec::len).sum();
        for (range, list) in plan.ranges.iter().zip(lists.iter_mut()) {
            compress(&block, range, list);
        }
        let found = lists.iter().map(Vec::len).sum::<usize>() - before;
        if found > 0 && gathered.fetch_add(found, Ordering::Relaxed) + found > plan.room {
            survey.gathered = None;
        }
    }
    survey
        .gathered
        .iter_mut()
        .flatten()
        .for_each(Vec::shrink_to_fit);
    survey
}

/// Add the samples at or above each edge to its counts.
#[inline(always)]
fn count<L: Lane, const N: usize>(block: &Block<L>, edges: [L; N], counts: &mut [Counts]) {
    let mut sums = [L::ZERO; N];
    for (&key, &weight) in block.keys.iter().zip(&block.weights) {
        for (sum, edge) in sums.iter_mut().zip(edges) {
            *sum = sum.add(if key >= edge { weight } else { L::ZERO });
        }
    }
    for (counts, sum) in counts.iter_mut().zip(sums) {
        *counts += sum.counts();
    }
}
