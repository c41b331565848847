//! One pass over the samples: count above every edge, and gather the samples of a few narrow ranges.

mod arch;

use crate::error::Result;
use crate::run::Run;
use crate::samples::{BLOCK, Block, Lane, Samples};
use crate::tally::Counts;
pub(crate) use arch::{Pass, Simd, Vectors, pass};
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Samples one thread scans before it looks for more work: a few milliseconds.
const PIECE: usize = 1 << 20;
/// Fewer samples are scanned by the calling thread alone: starting another was seen to gain nothing.
const WORTH_A_THREAD: usize = 1 << 20;
/// Edges compared with a key that is loaded once.
const TOGETHER: usize = 6;

/// How far ahead of the present block samples are fetched.
const AHEAD: usize = 2 * BLOCK;

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
    /// The samples of each range, in their order and in parts; none at all if there was no room.
    pub gathered: Option<Vec<Parts<L>>>,
    /// Whether all samples are valid; if not, the rest means nothing.
    pub valid: bool,
}

/// Packed samples, in the parts they were gathered in: to join them would take twice the memory.
pub(crate) type Parts<L> = Vec<Vec<<L as Lane>::Packed>>;

/// Pass over all samples once.
pub(crate) fn survey<X: Samples>(
    samples: &X,
    plan: &Plan<X::Lane>,
    run: &Run,
) -> Result<Survey<X::Lane>> {
    let gathered = AtomicUsize::new(0);
    let isa = run.instruction_set();
    let parts = run.map(pieces(samples.places(), run), |part| {
        let scan = Scan {
            samples,
            part,
            plan,
            gathered: &gathered,
        };
        pass(isa, scan)
    })?;
    let mut whole = Survey::new(plan);
    for part in parts {
        whole.append(part);
    }
    Ok(whole)
}

/// What one thread looks at before it takes more work.
pub(crate) fn pieces(len: usize, run: &Run) -> Vec<Range<usize>> {
    let piece = if len >= WORTH_A_THREAD && run.threads() > 1 {
        (len / (4 * run.threads()))
            .next_multiple_of(BLOCK)
            .clamp(WORTH_A_THREAD / 8, PIECE)
    } else {
        PIECE
    };
    (0..len)
        .step_by(piece)
        .map(|start| start..len.min(start + piece))
        .collect()
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
                for (parts, more) in gathered.iter_mut().zip(next) {
                    parts.extend(more.into_iter().filter(|part| !part.is_empty()));
                }
                gathered
            });
        self.total += next.total;
        self.lowest = self.lowest.min(next.lowest);
        self.valid &= next.valid;
    }
}

/// Scan a part of the samples.
struct Scan<'a, X: Samples> {
    samples: &'a X,
    part: Range<usize>,
    plan: &'a Plan<X::Lane>,
    /// How many samples all threads have gathered.
    gathered: &'a AtomicUsize,
}

impl<X: Samples> Pass<X::Lane> for Scan<'_, X> {
    type Found = Survey<X::Lane>;

    #[inline(always)]
    fn run(self, simd: impl Simd<X::Lane>) -> Survey<X::Lane> {
        let plan = self.plan;
        let mut survey = Survey::new(plan);
        let mut lists: Option<Parts<X::Lane>> =
            Some(plan.ranges.iter().map(|_| Vec::new()).collect());
        let mut block = Block::new();
        for start in self.part.clone().step_by(BLOCK) {
            self.prefetch(simd, start, 0);
            let loaded = self.samples.load(simd, start, &mut block);
            survey.total += loaded.weight.counts();
            survey.lowest = survey.lowest.min(loaded.lowest);
            survey.valid &= loaded.valid;
            let groups = plan
                .edges
                .chunks(TOGETHER)
                .zip(survey.counts.chunks_mut(TOGETHER));
            self.prefetch(simd, start, 1);
            for (edges, counts) in groups {
                match *edges {
                    [a, b, c, d, e, f] => add(counts, simd.count(&block, [a, b, c, d, e, f])),
                    [a, b, c, d, e] => add(counts, simd.count(&block, [a, b, c, d, e])),
                    [a, b, c, d] => add(counts, simd.count(&block, [a, b, c, d])),
                    [a, b, c] => add(counts, simd.count(&block, [a, b, c])),
                    [a, b] => add(counts, simd.count(&block, [a, b])),
                    [a] => add(counts, simd.count(&block, [a])),
                    _ => {}
                }
            }
            self.prefetch(simd, start, 2);
            let Some(open) = &mut lists else { continue };
            let mut found = 0;
            for (range, list) in plan.ranges.iter().zip(open) {
                let before = list.len();
                simd.gather(&block, range, list);
                found += list.len() - before;
            }
            self.prefetch(simd, start, 3);
            let all = || self.gathered.fetch_add(found, Ordering::Relaxed) + found;
            if found > 0 && all() > plan.room {
                lists = None;
            }
        }
        survey.gathered = lists.map(|lists| {
            let part = |mut list: Vec<_>| {
                list.shrink_to_fit();
                vec![list]
            };
            lists.into_iter().map(part).collect()
        });
        survey
    }
}

impl<X: Samples> Scan<'_, X> {
    /// Fetch a quarter of a block ahead, between the steps of the present one: a whole block at once would be waited
    /// for, and the processor's own guesses end with each page.
    #[inline(always)]
    fn prefetch(&self, simd: impl Simd<X::Lane>, start: usize, quarter: usize) {
        let from = start + AHEAD + quarter * (BLOCK / 4);
        self.samples.prefetch(simd, from..from + BLOCK / 4);
    }
}

#[inline(always)]
fn add<L: Lane, const N: usize>(counts: &mut [Counts], sums: [L; N]) {
    for (counts, sum) in counts.iter_mut().zip(sums) {
        *counts += sum.counts();
    }
}
