//! The lowest threshold without sorting: count above a few keys, rule ranges out, look into those that remain.
//!
//! A range of keys can hold the threshold only if its best case reaches the target: all its correct samples first,
//! on top of what is accepted above it.  The counts are exact, so a range that is ruled out is out for good.  A
//! sample of the data guesses keys that leave little to look into; a bad guess costs time, nothing else.

use crate::error::Result;
use crate::exhaust::exhaust;
use crate::run::Run;
use crate::samples::{Gathered, Lane, Pairs, Samples};
use crate::scan::{Plan, Survey, survey};
use crate::sketch::Sketch;
use crate::tally::{Counts, Target};
use crate::threshold::Rule;
use std::collections::BTreeMap;
use std::ops::Range;

/// Samples that are sorted rather than searched.
const FEW: usize = 512;
/// Targets from which on one sort answers faster than a search for each.
const MANY_TARGETS: usize = 32;
/// Samples always worth gathering, whatever share of the data they are.
const ROOM: usize = 1 << 18;
/// The share of a large input that is gathered at most before the search goes on by counting.
const ROOM_SHARE: usize = 24;
/// Passes after the first before the search gives way to a sort.
const PASSES: usize = 3;

/// For each target, ascending, the lowest key from which on the samples, with those above them, reach it.
pub(crate) fn search<X: Samples>(
    samples: &X,
    above: Counts,
    targets: &[Target],
    rule: Rule,
    run: &Run,
) -> Result<Vec<Option<X::Lane>>> {
    let len = samples.len();
    if len <= FEW || targets.len() > MANY_TARGETS {
        return exhaust(samples, above, targets, rule, run);
    }
    let room = ROOM.max(len / ROOM_SHARE);
    let sketch = Sketch::draw(samples, sketch_size(len), run)?;
    let cuts = sketch.cuts(above, targets, room);
    let edges = cuts.edges.iter().map(|(key, _)| *key).collect();
    let plan = Plan {
        edges,
        ranges: cuts.ranges,
        room,
    };
    let found = survey(samples, &plan, run)?;
    if !found.valid {
        samples.validate(run)?;
    }
    let map = Map::new(&cuts.edges, &found, above);
    let mut held: Held<X::Lane> = BTreeMap::new();
    for (range, list) in plan
        .ranges
        .into_iter()
        .zip(found.gathered.unwrap_or_default())
    {
        held.insert(range.end, (range.start, list));
    }

    let mut answers = vec![None; targets.len()];
    let open = map.open_spans(targets, rule);
    let mut passes = 0;
    for (place, &(span, ref wanting)) in open.iter().enumerate() {
        let unanswered = |wanting: &[usize]| {
            wanting
                .iter()
                .copied()
                .filter(|&target| answers[target].is_none())
                .collect::<Vec<_>>()
        };
        let wanting = unanswered(wanting);
        if wanting.is_empty() {
            continue;
        }
        let end = map.key(span + 1);
        // Whatever was planned, only a list of all the span's samples will do.
        let is_whole = |list: &Vec<_>| list.len() == map.inside(span).accepted;
        if !held.get(&end).is_some_and(|(_, list)| is_whole(list)) {
            let next = open[place..]
                .iter()
                .filter(|(_, wanting)| !unanswered(wanting).is_empty());
            let ranges = lowest_up_to(room, next.map(|(span, _)| *span), &map);
            passes += 1;
            let packs = ranges
                .iter()
                .all(|range| range.end.reach_down() <= range.start);
            if passes > PASSES || !packs || map.inside(span).accepted > len / 2 {
                return exhaust(samples, above, targets, rule, run);
            }
            gather(samples, ranges, &mut held, run)?;
        }
        let (start, list) = held.remove(&end).unwrap_or((end, Vec::new()));
        let within = Gathered::<X::Lane>(list);
        let wanted: Vec<Target> = wanting.iter().map(|&target| targets[target]).collect();
        // A search that keeps most of its samples gets nowhere.
        let find = if within.len() > len / 2 {
            exhaust
        } else {
            search
        };
        let lowest = find(&within, map.counts(span + 1), &wanted, rule, run)?;
        for (target, key) in wanting.into_iter().zip(lowest) {
            answers[target] = key.map(|key| start.add(key));
        }
    }
    let at_edge = |target| map.first_that_reaches(target).map(|edge| map.key(edge));
    Ok(answers
        .into_iter()
        .zip(targets)
        .map(|(answer, &target)| answer.or_else(|| at_edge(target)))
        .collect())
}

/// Samples gathered from ranges: the range's end, its start, and the samples, which count from there.
type Held<L> = BTreeMap<L, (L, Vec<<L as Lane>::Packed>)>;

/// A larger sample gathers less; about here both cost the same.
fn sketch_size(len: usize) -> usize {
    (len as f64).powf(2.0 / 3.0) as usize
}

/// The lowest spans that hold about `room` samples together, at least one.
fn lowest_up_to<L: Lane>(
    room: usize,
    spans: impl Iterator<Item = usize>,
    map: &Map<L>,
) -> Vec<Range<L>> {
    let mut total = 0;
    spans
        .take_while(|&span| {
            let first = total == 0;
            total += map.inside(span).accepted;
            first || total <= room
        })
        .map(|span| map.range(span))
        .collect()
}

/// Gather the samples of each range.
fn gather<X: Samples>(
    samples: &X,
    ranges: Vec<Range<X::Lane>>,
    held: &mut Held<X::Lane>,
    run: &Run,
) -> Result<()> {
    let plan = Plan {
        edges: Vec::new(),
        ranges,
        room: usize::MAX,
    };
    let lists = survey(samples, &plan, run)?.gathered.unwrap_or_default();
    for (range, list) in plan.ranges.into_iter().zip(lists) {
        held.insert(range.end, (range.start, list));
    }
    Ok(())
}

/// All keys from the lowest sample up, cut into spans by edges with exact counts.
struct Map<L> {
    edges: Vec<Edge<L>>,
}

struct Edge<L> {
    key: L,
    /// Whether a sample has this key, so that it may be a threshold.
    exists: bool,
    counts: Counts,
}

impl<L: Lane> Map<L> {
    fn new(edges: &[(L, bool)], found: &Survey<L>, above: Counts) -> Self {
        let lowest = Edge {
            key: found.lowest,
            exists: true,
            counts: found.total + above,
        };
        let end = Edge {
            key: L::MAX,
            exists: false,
            counts: above,
        };
        let between = edges
            .iter()
            .zip(&found.counts)
            .map(|(&(key, exists), &counts)| Edge {
                key,
                exists,
                counts: counts + above,
            })
            .filter(|edge| edge.key > found.lowest);
        Self {
            edges: std::iter::once(lowest)
                .chain(between)
                .chain([end])
                .collect(),
        }
    }

    fn key(&self, edge: usize) -> L {
        self.edges[edge].key
    }

    fn counts(&self, edge: usize) -> Counts {
        self.edges[edge].counts
    }

    /// The keys of a span.
    fn range(&self, span: usize) -> Range<L> {
        self.key(span)..self.key(span + 1)
    }

    /// The samples in a span.
    fn inside(&self, span: usize) -> Counts {
        self.counts(span) - self.counts(span + 1)
    }

    fn first_that_reaches(&self, target: Target) -> Option<usize> {
        self.edges
            .iter()
            .position(|edge| edge.exists && edge.counts.reach(target))
    }

    /// Spans that may hold a threshold lower than the first edge that is one, ascending, with the targets in question.
    fn open_spans(&self, targets: &[Target], rule: Rule) -> Vec<(usize, Vec<usize>)> {
        let ends: Vec<usize> = targets
            .iter()
            .map(|&target| {
                self.first_that_reaches(target)
                    .unwrap_or(self.edges.len() - 1)
            })
            .collect();
        let wanting = |span: usize| -> Vec<usize> {
            (0..targets.len())
                .filter(|&t| span < ends[t] && self.is_open(span, targets[t], rule))
                .collect()
        };
        let spans = 0..self.edges.len() - 1;
        spans
            .map(|span| (span, wanting(span)))
            .filter(|(_, wanting)| !wanting.is_empty())
            .collect()
    }

    fn is_open(&self, span: usize, target: Target, rule: Rule) -> bool {
        let (low, high) = (&self.edges[span], &self.edges[span + 1]);
        // The only threshold in a span of one key is the key, and its count has been looked at; by the index rule,
        // each of the samples is one.
        let decided = rule == Rule::Set && low.exists && low.key.next() == high.key;
        !decided && low.counts.might_reach_above(high.counts, target)
    }
}
