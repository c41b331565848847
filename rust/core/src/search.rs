//! The lowest threshold without sorting: count above a few keys, rule ranges out, look into those that remain.
//!
//! A range of keys can hold the threshold only if its best case reaches the target: all its correct samples first,
//! on top of what is accepted above it.  The counts are exact, so a range that is ruled out is out for good.  A
//! sample of the data guesses keys that leave little to look into; a bad guess costs time, nothing else.

use crate::error::Result;
use crate::exhaust::exhaust;
use crate::run::Run;
use crate::samples::{Gathered, Lane, Samples};
use crate::scan::{Parts, Plan, survey};
use crate::sketch::{Sketch, probe};
use crate::table::{Cells, tabulate};
use crate::tally::{Counts, Criterion, Group};
use crate::threshold::Rule;
use std::collections::BTreeMap;
use std::ops::Range;

/// Samples that are sorted rather than searched.
const FEW: usize = 512;
/// Samples from which on a guess pays; fewer are counted in a table at once.
const WORTH_A_SKETCH: usize = 1 << 15;
/// Targets from which on the table of all is cheaper than edges around the guess for each.
const WORTH_A_TABLE: usize = 3;
/// Targets from which on one sort answers faster than a search for each.
const MANY_TARGETS: usize = 64;
/// Cells of a table at most, so that it stays in the first-level cache, and samples it should have for each.
const CELLS: usize = 1 << 12;
const SAMPLES_A_CELL: usize = 32;
/// The share of the samples between two open spans up to which they are looked into as one.
const GAP: usize = 64;
/// Samples always worth gathering, whatever share of the data they are.
const ROOM: usize = 1 << 18;
/// The share of a large input that is gathered at most before the search goes on by counting.
const ROOM_SHARE: usize = 11;
/// Passes after the first before the search gives way to a sort.
const PASSES: usize = 3;

/// For each target, ascending, the lowest key from which on the samples, with those above them, reach it; and the counts
/// of these.
pub(crate) fn search<X: Samples, C: Criterion>(
    samples: &X,
    above: Counts,
    targets: &[C],
    rule: Rule,
    run: &Run,
) -> Result<Vec<Option<Group<X::Lane>>>> {
    let len = samples.len();
    if len <= FEW || targets.len() > MANY_TARGETS {
        return exhaust(samples, above, targets, rule, run);
    }
    let room = ROOM.max(len / ROOM_SHARE);
    let mut held: Held<X::Lane> = BTreeMap::new();
    let guessed = guess(samples, above, targets, room, &mut held, run)?;
    let (map, gap) = match guessed {
        Some(map) => (map, None),
        None => (count_in_cells(samples, above, run)?, Some(len / GAP)),
    };

    let mut answers = vec![None; targets.len()];
    let open = map.open_ranges(targets, rule, gap);
    let mut passes = 0;
    for (place, (spans, wanting)) in open.iter().enumerate() {
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
        let end = map.key(spans.end);
        // Whatever was planned, only a list of all the spans' samples will do.
        let inside = map.inside(spans).accepted;
        let is_whole = |parts: &Parts<X::Lane>| parts.iter().map(Vec::len).sum::<usize>() == inside;
        if !held.get(&end).is_some_and(|(_, parts)| is_whole(parts)) {
            let next = open[place..]
                .iter()
                .filter(|(_, wanting)| !unanswered(wanting).is_empty());
            let ranges = lowest_up_to(room, next.map(|(spans, _)| spans), &map);
            passes += 1;
            let packs = ranges
                .iter()
                .all(|range| range.end.reach_down() <= range.start);
            if passes > PASSES || !packs || inside > len / 2 {
                return exhaust(samples, above, targets, rule, run);
            }
            gather(samples, ranges, &mut held, run)?;
        }
        let (start, parts) = held.remove(&end).unwrap_or((end, Vec::new()));
        let within = Gathered::<X::Lane>::new(parts);
        let wanted: Vec<C> = wanting.iter().map(|&target| targets[target]).collect();
        // A search that keeps most of its samples gets nowhere.
        let beyond = map.counts(spans.end);
        let lowest = if inside > len / 2 {
            exhaust(&within, beyond, &wanted, rule, run)?
        } else {
            search(&within, beyond, &wanted, rule, run)?
        };
        for (target, found) in wanting.into_iter().zip(lowest) {
            answers[target] = found.map(|(key, counts)| (start.add(key), counts));
        }
    }
    let at_edge = |target| {
        let edge = map.first_that_reaches(target);
        edge.map(|edge| (map.key(edge), map.counts(edge)))
    };
    Ok(answers
        .into_iter()
        .zip(targets)
        .map(|(answer, &target)| answer.or_else(|| at_edge(target)))
        .collect())
}

/// Samples gathered from ranges: the range's end, its start, and the samples, which count from there.
type Held<L> = BTreeMap<L, (L, Parts<L>)>;

/// Count above a few edges around the guess, and gather what is likely to be looked into; none where that would be
/// too much.
fn guess<X: Samples>(
    samples: &X,
    above: Counts,
    targets: &[impl Criterion],
    room: usize,
    held: &mut Held<X::Lane>,
    run: &Run,
) -> Result<Option<Map<X::Lane>>> {
    let len = samples.len();
    if len < WORTH_A_SKETCH || targets.len() >= WORTH_A_TABLE {
        return Ok(None);
    }
    let sketch = Sketch::draw(samples, sketch_size(len), run)?;
    let Some(cuts) = sketch.cuts(above, targets, room) else {
        return Ok(None);
    };
    let plan = Plan {
        edges: cuts.edges.iter().map(|(key, _)| *key).collect(),
        ranges: cuts.ranges,
        room,
    };
    let found = survey(samples, &plan, run)?;
    if !found.valid {
        samples.validate(run)?;
    }
    for (range, parts) in plan
        .ranges
        .into_iter()
        .zip(found.gathered.unwrap_or_default())
    {
        held.insert(range.end, (range.start, parts));
    }
    let edges = cuts.edges.into_iter().zip(found.counts);
    Ok(Some(Map::new(edges, found.lowest, found.total, above)))
}

/// Count in cells of equal width over the keys that most samples have.
fn count_in_cells<X: Samples>(samples: &X, above: Counts, run: &Run) -> Result<Map<X::Lane>> {
    let (low, high) = probe(samples);
    let most = (samples.len() / SAMPLES_A_CELL).clamp(2, CELLS);
    let cells = Cells::over(low, high, 1 << most.ilog2());
    let found = tabulate(samples, &cells, run)?;
    if !found.valid {
        samples.validate(run)?;
    }
    let next = found.counts[1..]
        .iter()
        .chain([&Counts::default()])
        .copied()
        .collect::<Vec<_>>();
    let exists = found
        .counts
        .iter()
        .zip(next)
        .map(|(counts, next)| cells.are_keys() && *counts != next);
    let edges = cells.edges().zip(exists).zip(found.counts.iter().copied());
    Ok(Map::new(edges, found.lowest, found.total, above))
}

/// A larger sample gathers less; about here both cost the same.
fn sketch_size(len: usize) -> usize {
    (len as f64).powf(2.0 / 3.0) as usize
}

/// The lowest ranges that hold about `room` samples together, at least one.
fn lowest_up_to<'a, L: Lane>(
    room: usize,
    ranges: impl Iterator<Item = &'a Range<usize>>,
    map: &Map<L>,
) -> Vec<Range<L>> {
    let mut total = 0;
    ranges
        .take_while(|spans| {
            let first = total == 0;
            total += map.inside(spans).accepted;
            first || total <= room
        })
        .map(|spans| map.key(spans.start)..map.key(spans.end))
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
    for (range, parts) in plan.ranges.into_iter().zip(lists) {
        held.insert(range.end, (range.start, parts));
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
    /// From edges that exist or not, with the counts from each one up.
    fn new(
        edges: impl Iterator<Item = ((L, bool), Counts)>,
        lowest: L,
        total: Counts,
        above: Counts,
    ) -> Self {
        let start = Edge {
            key: lowest,
            exists: true,
            counts: total + above,
        };
        let end = Edge {
            key: L::MAX,
            exists: false,
            counts: above,
        };
        let between = edges
            .map(|((key, exists), counts)| Edge {
                key,
                exists,
                counts: counts + above,
            })
            .filter(|edge| lowest < edge.key && edge.key < L::MAX);
        Self {
            edges: std::iter::once(start).chain(between).chain([end]).collect(),
        }
    }

    fn key(&self, edge: usize) -> L {
        self.edges[edge].key
    }

    fn counts(&self, edge: usize) -> Counts {
        self.edges[edge].counts
    }

    /// The samples in spans that follow one another.
    fn inside(&self, spans: &Range<usize>) -> Counts {
        self.counts(spans.start) - self.counts(spans.end)
    }

    fn first_that_reaches(&self, target: impl Criterion) -> Option<usize> {
        self.edges
            .iter()
            .position(|edge| edge.exists && target.is_met(edge.counts))
    }

    /// Spans that may hold the lowest threshold, ascending, with the targets in question; open spans with no more
    /// than `gap` samples between them are one range.
    fn open_ranges(
        &self,
        targets: &[impl Criterion],
        rule: Rule,
        gap: Option<usize>,
    ) -> Vec<(Range<usize>, Vec<usize>)> {
        let mut wanting: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
        for (place, &target) in targets.iter().enumerate() {
            for span in self.open_spans(target, rule) {
                wanting.entry(span).or_default().push(place);
            }
        }
        let mut ranges: Vec<(Range<usize>, Vec<usize>)> = Vec::new();
        for (span, mut targets) in wanting {
            let joins = |range: &Range<usize>| {
                gap.is_some_and(|gap| self.inside(&(range.end..span)).accepted <= gap)
            };
            match ranges.last_mut().filter(|(range, _)| joins(range)) {
                Some((range, others)) => {
                    range.end = span + 1;
                    others.append(&mut targets);
                    others.sort_unstable();
                    others.dedup();
                }
                None => ranges.push((span..span + 1, targets)),
            }
        }
        ranges
    }

    /// Spans that may hold a threshold lower than the first edge that is one.
    fn open_spans(&self, target: impl Criterion, rule: Rule) -> Vec<usize> {
        let mut open = Vec::new();
        for (span, edges) in self.edges.windows(2).enumerate() {
            let (low, high) = (&edges[0], &edges[1]);
            let reaches = target.is_met(low.counts);
            if low.exists && reaches {
                break;
            }
            // The only threshold in a span of one key is the key, and its count has been looked at; by the index
            // rule, each of the samples is one.
            let decided = rule == Rule::Set && low.exists && low.key.next() == high.key;
            if !decided && low.counts.might_meet(high.counts, target) {
                open.push(span);
            }
            // The lowest sample of the span is a threshold.
            if reaches && low.counts.accepted > high.counts.accepted {
                break;
            }
        }
        open
    }
}
