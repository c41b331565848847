//! A sample of the samples, to guess where the threshold falls and which counts will prove it.
//!
//! Guesses decide how much work the search has, never what it finds.

use crate::curve::Ascending;
use crate::error::Result;
use crate::run::Run;
use crate::samples::{Lane, Pairs, Samples};
use crate::tally::{Counts, Criterion};
use std::collections::BTreeMap;
use std::ops::{ControlFlow, Range};

/// Neighbours drawn together: they share a cache line or two, and most of what a draw costs is to fetch those.
const NEIGHBOURS: usize = 16;
/// Groups drawn between two questions whether to stop.
const BETWEEN_CHECKS: usize = 1 << 12;
/// Standard errors on either side of the guess: wider means more samples gathered, narrower more second passes.
const SURE: f64 = 3.0;
/// Standard errors kept in hand when ranges below the guess are cut so wide that their counts will rule them out.
const LIKELY: f64 = 2.5;
/// Cuts below the guess, at most.
const CUTS_BELOW: usize = 12;
/// Samples looked at to learn the range of most.
const PROBES: usize = 128;
/// The share of all samples from which on equal ones are counted apart.
const HEAVY: usize = 64;

/// Where to count and what to gather in the first pass.
#[derive(Debug)]
pub(crate) struct Cuts<L> {
    /// Keys to count from, ascending, and whether a sample is known to have that key.
    pub edges: Vec<(L, bool)>,
    /// Ranges between two edges whose samples to gather.
    pub ranges: Vec<Range<L>>,
}

/// Distinct keys of the sample, ascending, with the counts from each one up.
pub(crate) struct Sketch<L> {
    keys: Vec<L>,
    counts: Vec<Counts>,
    /// How many samples each one drawn stands for.
    scale: f64,
}

impl<L: Lane> Sketch<L> {
    /// Draw about `size` samples, spread evenly.
    pub fn draw<X: Samples<Lane = L>>(samples: &X, size: usize, run: &Run) -> Result<Self> {
        let groups = (size / NEIGHBOURS).max(1);
        let stride = (samples.len() / groups).max(NEIGHBOURS);
        let mut drawn = Vec::with_capacity(size);
        let mut noise = Noise(0);
        for (group, start) in (0..samples.len()).step_by(stride).enumerate() {
            if group % BETWEEN_CHECKS == 0 {
                run.check()?;
            }
            // Even spacing would see only one phase of periodic data.
            let start = samples
                .len()
                .min(start + noise.below(stride - NEIGHBOURS + 1));
            let end = samples.len().min(start + NEIGHBOURS);
            samples.append(start..end, &mut drawn);
        }
        let scale = samples.len() as f64 / drawn.len().max(1) as f64;
        let drawn = Drawn(drawn);
        let ascending = Ascending::sorted(&drawn, run)?;
        let mut keys = Vec::with_capacity(drawn.len());
        let mut counts = Vec::with_capacity(drawn.len());
        drop(drawn);
        ascending.groups(Counts::default(), run, |key, from_here_up| {
            keys.push(L::of(key));
            counts.push(from_here_up);
            ControlFlow::Continue(())
        })?;
        Ok(Self {
            keys,
            counts,
            scale,
        })
    }

    /// Plan a pass for all targets, hardest target first, since its threshold is the highest and its cuts serve the
    /// others below; none if it would gather more than about `room` samples.
    pub fn cuts(&self, above: Counts, targets: &[impl Criterion], room: usize) -> Option<Cuts<L>> {
        let mut draft = Draft {
            edges: BTreeMap::new(),
            wanted: Vec::new(),
            room: room as f64,
        };
        for &target in targets.iter().rev() {
            let guess = Guess {
                sketch: self,
                above,
                target,
            };
            let bracket = guess.bracket();
            self.cut_inside(&mut draft, &bracket);
            guess.cut_below(&mut draft, bracket.start);
        }
        (draft.room >= 0.0).then(|| draft.finish())
    }

    /// The key of a group, or the end of all keys.
    fn key(&self, group: usize) -> L {
        self.keys.get(group).copied().unwrap_or(L::MAX)
    }

    /// The sample's counts from a group up.
    fn counts(&self, group: usize) -> Counts {
        self.counts.get(group).copied().unwrap_or_default()
    }

    /// Gather where the threshold is guessed to be, but count frequent keys apart, so that there is nothing to
    /// gather of them.
    fn cut_inside(&self, draft: &mut Draft<L>, bracket: &Range<usize>) {
        let heavy = (self.counts(0).accepted / HEAVY).max(2);
        for end in [bracket.start, bracket.end] {
            if let Some(&key) = self.keys.get(end) {
                draft.edge(key, true);
            }
        }
        let mut light = 0;
        for group in bracket.clone() {
            let equal = self.counts(group).accepted - self.counts(group + 1).accepted;
            if equal >= heavy {
                draft.edge(self.key(group), true);
                draft.edge(self.key(group).next(), false);
            } else {
                light += equal;
            }
        }
        draft.room -= light as f64 * self.scale;
        if self.key(bracket.start) < L::MAX {
            // Below the lowest sample drawn there may be others.
            let low = match bracket.start {
                0 => self.key(bracket.end).reach_down(),
                start => self.key(start),
            };
            draft.edge(low, false);
            draft.wanted.push(low..self.key(bracket.end));
        }
    }
}

/// One target seen through the sample.
struct Guess<'a, L, C> {
    sketch: &'a Sketch<L>,
    above: Counts,
    target: C,
}

impl<L: Lane, C: Criterion> Guess<'_, L, C> {
    /// By how many correct samples the set from this group up exceeds the target, and the standard error of that.
    fn surplus(&self, group: usize) -> (f64, f64) {
        let drawn = self.sketch.counts(group);
        let (right, wrong) = (
            drawn.correct as f64,
            (drawn.accepted - drawn.correct) as f64,
        );
        let scale = self.sketch.scale;
        let accepted = self.above.accepted as f64 + scale * drawn.accepted as f64;
        let correct = self.above.correct as f64 + scale * right;
        let eps = self.target.accuracy();
        let variance = right * (1.0 - eps).powi(2) + wrong * eps.powi(2) + 1.0;
        (
            correct - self.target.correct_among(accepted),
            scale * variance.sqrt(),
        )
    }

    /// From the lowest group that may reach the target to the lowest that surely does.
    fn bracket(&self) -> Range<usize> {
        let first = |errors: f64| {
            let reaches = |&group: &usize| {
                let (surplus, error) = self.surplus(group);
                surplus + errors * error >= 0.0
            };
            (0..self.sketch.keys.len())
                .find(reaches)
                .unwrap_or(self.sketch.keys.len())
        };
        first(SURE)..first(-SURE)
    }

    /// Cut below the bracket so that the counts will rule every piece out: a piece is ruled out if even all its
    /// correct samples on top of what is accepted above it do not reach the target.
    fn cut_below(&self, draft: &mut Draft<L>, mut from: usize) {
        for _ in 0..CUTS_BELOW {
            if from == 0 {
                return;
            }
            let (surplus, error) = self.surplus(from);
            let lacking =
                -(surplus + LIKELY * error) / (1.0 - self.target.accuracy()) / self.sketch.scale;
            let right = self.sketch.counts(from).correct;
            let ruled_out = |group: usize| {
                let inside = (self.sketch.counts(group).correct - right) as f64;
                inside + 2.0 * inside.sqrt() + 1.0 <= lacking
            };
            if !ruled_out(from - 1) {
                // One key by itself is decided by its count; of what lies between the keys there is little.
                let key = self.sketch.key(from - 1);
                draft.edge(key, true);
                draft.edge(key.next(), false);
                draft.wanted.push(key.next()..self.sketch.key(from));
                from -= 1;
                continue;
            }
            // Fewer correct samples lie above a higher group, so the groups that will do end where the first fails.
            let (mut fails, mut lowest) = (0, from - 1);
            while fails < lowest {
                let middle = fails.midpoint(lowest);
                if ruled_out(middle) {
                    lowest = middle
                } else {
                    fails = middle + 1
                }
            }
            from = draft
                .reuse(&self.sketch.keys, lowest..from)
                .unwrap_or(lowest);
            draft.edge(self.sketch.key(from), true);
        }
    }
}

/// A plan in the making.
struct Draft<L> {
    edges: BTreeMap<L, bool>,
    wanted: Vec<Range<L>>,
    room: f64,
}

impl<L: Lane> Draft<L> {
    fn edge(&mut self, key: L, exists: bool) {
        *self.edges.entry(key).or_insert(false) |= exists;
    }

    /// The lowest of the groups that is an edge already.
    fn reuse(&self, keys: &[L], groups: Range<usize>) -> Option<usize> {
        let mut edges = self.edges.range(keys[groups.start]..keys[groups.end - 1]);
        let (key, _) = edges.find(|(_, exists)| **exists)?;
        keys.binary_search(key).ok()
    }

    fn finish(self) -> Cuts<L> {
        let edges: Vec<_> = self.edges.into_iter().collect();
        let ends = edges.iter().map(|(key, _)| *key).skip(1).chain([L::MAX]);
        let spans = edges
            .iter()
            .zip(ends)
            .map(|(&(low, exists), high)| (low..high, exists));
        let wanted = |span: &Range<L>| {
            self.wanted
                .iter()
                .any(|range| range.start <= span.start && span.end <= range.end)
        };
        let ranges = spans
            .filter(|(span, exists)| !(*exists && span.start.next() == span.end))
            .map(|(span, _)| span)
            .filter(|span| span.end.reach_down() <= span.start && wanted(span))
            .collect();
        Cuts { edges, ranges }
    }
}

/// The lowest and the highest key of a few samples, spread evenly: most samples lie between.
pub(crate) fn probe<X: Samples>(samples: &X) -> (X::Lane, X::Lane) {
    let stride = samples.len().div_ceil(PROBES);
    let mut noise = Noise(0);
    let keys = (0..samples.len()).step_by(stride).map(|start| {
        let index = start + noise.below(stride.min(samples.len() - start));
        X::Lane::of(samples.get(index).0)
    });
    keys.fold((X::Lane::MAX, X::Lane::MIN), |(low, high), key| {
        (low.min(key), high.max(key))
    })
}

/// Samples that were drawn.
struct Drawn<K>(Vec<(K, u8)>);

impl<K: crate::order::Key> Pairs for Drawn<K> {
    type Key = K;

    fn len(&self) -> usize {
        self.0.len()
    }

    fn get(&self, index: usize) -> (K, u8) {
        self.0[index]
    }
}

/// Splitmix64: the same every time, so that a slow call is slow again.
struct Noise(u64);

impl Noise {
    fn below(&mut self, end: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((mixed ^ (mixed >> 31)) % end.max(1) as u64) as usize
    }
}
