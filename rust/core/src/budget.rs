//! The cheapest thresholds of a cascade that keep the share of wrong samples within an allowance.
//!
//! A price on every wrong sample turns the allowance into a part of the cost; for a given price each head in turn
//! takes the threshold that is best with the others as they are.  The price is found by bisection, and at the end the
//! heads take turns once more under the allowance itself.
//!
//! With the others as they are, a sample that a head takes changes the sum by an amount of its own, so the best
//! threshold is where the sums over its falling scores are lowest.  Sums over stretches, in floating point, tell which
//! stretches may hold it; inside those, values are computed from integer counts.

use crate::cascade::{Heads, Keys};
use crate::error::{Error, Result};
use crate::run::Run;
use crate::scan::{Pass, Simd, pass};
use crate::sort::sort_pairs;
use crate::threshold::Calibratable;

/// Prices tried, each half as far from the best as the one before.
const PRICES: usize = 24;
/// The lowest and the highest price, as powers of two times the whole model's cost.
const RANGE: (f64, f64) = (-12.0, 28.0);
/// Rounds of the heads, at most.
const ROUNDS: usize = 20;
/// The state of a sample that does not reach the head.
const GONE: u8 = u8::MAX;
/// Flags beside the number of the next exit.
const WRONG_HERE: u8 = 0x40;
const WRONG_NEXT: u8 = 0x80;
/// All states.
const STATES: usize = 256;
/// Numbers that fit beside the flags: of the heads, of the whole model, and one that is left for [`GONE`].
const EXITS: usize = 64;
const MOST_HEADS: usize = EXITS - 2;
/// Samples summed together, and samples one thread looks at before it takes more work.
const STRETCH: usize = 1 << 12;
const PIECE: usize = 1 << 18;
/// Samples whose states lie in the second-level cache.  More are numbered by one head's scores: those that are near by
/// another's then tend to be near in memory too.
const NEAR: usize = 1 << 21;
/// What sums over a stretch may be wrong by through rounding: this share of the most that all samples could change.
/// Two to the twelfth samples round two to the twelfth times, each time by 1.1e-16 of what they add up to.
const ROUNDED: f64 = 1e-12;

/// What the samples may cost and miss.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Allowance<'a> {
    /// For every head and for the whole model.
    pub costs: &'a [f64],
    /// Of all samples that may leave early and wrong.
    pub share: f64,
}

/// The best thresholds found, starting from others that may or may not keep within the allowance.
pub(crate) fn cheapest<S: Calibratable>(
    heads: &Heads<S>,
    alive: &[u64],
    start: &Keys<S>,
    allowance: Allowance,
    run: &Run,
) -> Result<Keys<S>> {
    Search::new(heads, alive, allowance, NEAR, run)?.cheapest(start, run)
}

/// The cheapest thresholds so far.
struct Best {
    cost: f64,
    ends: Vec<usize>,
}

impl Best {
    /// Whether the thresholds keep within the allowance; the cheapest are kept.
    fn offer<S: Calibratable>(
        &mut self,
        search: &Search<S>,
        choice: &Choice,
        run: &Run,
    ) -> Result<bool> {
        let (taken, wrong) = search.totals(choice, run)?;
        if !search.allows(wrong) {
            return Ok(false);
        }
        let costs = taken.iter().zip(search.allowance.costs);
        let cost = costs.map(|(&n, cost)| n as f64 * cost).sum();
        if cost < self.cost {
            *self = Self {
                cost,
                ends: choice.ends.clone(),
            };
        }
        Ok(true)
    }
}

/// What the heads are to keep low: the cost and a price for every wrong sample, perhaps within the allowance only.
#[derive(Clone, Copy)]
struct Terms {
    price: f64,
    bounded: bool,
}

/// A threshold for each head.
#[derive(Clone)]
struct Choice {
    /// How many of all samples, by falling score, reach it.
    ends: Vec<usize>,
    /// For each sample a bit for every head whose threshold it reaches.
    reached: Vec<u64>,
}

/// What changes if a head takes some samples: how many it takes, which exits lose them, how many more are wrong.
#[derive(Clone)]
struct Exchange {
    head: usize,
    taken: i64,
    lost: [i64; EXITS],
    wrong: i64,
}

impl Exchange {
    fn none(head: usize) -> Self {
        Self {
            head,
            taken: 0,
            lost: [0; EXITS],
            wrong: 0,
        }
    }

    /// Let the head take so many samples of one state.
    fn take(&mut self, state: u8, times: i64) {
        if state != GONE {
            self.taken += times;
            self.lost[usize::from(state & !(WRONG_HERE | WRONG_NEXT))] += times;
            self.wrong += times * more_wrong(state);
        }
    }

    fn cost(&self, costs: &[f64]) -> f64 {
        let lost = self.lost.iter().zip(costs).skip(self.head + 1);
        self.taken as f64 * costs[self.head] - lost.map(|(&n, cost)| n as f64 * cost).sum::<f64>()
    }
}

/// By how many more samples are wrong if the head takes one.
fn more_wrong(state: u8) -> i64 {
    i64::from(state & WRONG_HERE != 0) - i64::from(state & WRONG_NEXT != 0)
}

/// What the samples of a stretch change.
struct Stretch {
    states: [u32; STATES],
    /// The lowest value and the fewest wrong samples from its start on, less those at its start.
    lowest: f64,
    fewest: i64,
}

impl Stretch {
    fn of<K>(items: &[(K, u32)], states: &[u8], changes: &[(f64, i64); STATES]) -> Self {
        let mut stretch = Self {
            states: [0; STATES],
            lowest: f64::INFINITY,
            fewest: i64::MAX,
        };
        let (mut value, mut wrong) = (0.0, 0);
        for &(_, sample) in items {
            let state = usize::from(states[sample as usize]);
            stretch.states[state] += 1;
            value += changes[state].0;
            wrong += changes[state].1;
            // Not `min`, which would mind NaN.
            if value < stretch.lowest {
                stretch.lowest = value;
            }
            stretch.fewest = stretch.fewest.min(wrong);
        }
        stretch
    }
}

struct Search<'a, S: Calibratable> {
    allowance: Allowance<'a>,
    /// How many samples count.
    samples: usize,
    /// Those by falling score, for each head.
    falling: Vec<Vec<(S::Key, u32)>>,
    /// For each of them a bit for every head that is wrong.
    wrong: Vec<u64>,
}

impl<'a, S: Calibratable> Search<'a, S> {
    /// More than `near` samples are numbered by a head's scores.
    fn new(
        heads: &Heads<S>,
        alive: &[u64],
        allowance: Allowance<'a>,
        near: usize,
        run: &Run,
    ) -> Result<Self> {
        if heads.count > MOST_HEADS {
            return Err(Error::TooManyHeads {
                heads: heads.count,
                most: MOST_HEADS,
            });
        }
        let is_alive = |&sample: &usize| alive[sample / 64] >> (sample % 64) & 1 == 1;
        let falling = |head: usize, samples: &[usize]| {
            let scores = heads.row(head).0;
            let keys = samples.iter().map(|&at| scores[at].key());
            let items: Vec<_> = keys.zip(0..).collect();
            let flags = vec![(); items.len()];
            let (mut items, _) = sort_pairs(items, flags, |item: (S::Key, u32)| item.0, run)?;
            items.reverse();
            Ok(items)
        };
        let mut samples: Vec<usize> = (0..heads.samples).filter(is_alive).collect();
        if samples.len() > near {
            let order: Vec<(S::Key, u32)> = falling(0, &samples)?;
            samples = order.iter().map(|&(_, at)| samples[at as usize]).collect();
        }
        let wrong = |&at: &usize| {
            let is_wrong = |head: usize| u64::from(heads.row(head).1[at] == 0) << head;
            (0..heads.count).map(is_wrong).sum()
        };
        Ok(Self {
            allowance,
            samples: samples.len(),
            falling: (0..heads.count)
                .map(|head| falling(head, &samples))
                .collect::<Result<_>>()?,
            wrong: samples.iter().map(wrong).collect(),
        })
    }

    fn cheapest(&self, start: &Keys<S>, run: &Run) -> Result<Keys<S>> {
        let heads = self.falling.len();
        let start = self.choice(start);
        let mut best = Best {
            cost: f64::INFINITY,
            ends: vec![0; heads],
        };
        best.offer(self, &self.choice(&vec![None; heads]), run)?;
        best.offer(self, &start, run)?;
        let (mut low, mut high) = RANGE;
        for _ in 0..PRICES {
            let middle = low.midpoint(high);
            let terms = Terms {
                price: self.allowance.costs[heads] * middle.exp2(),
                bounded: false,
            };
            let found = self.rounds(start.clone(), terms, run)?;
            if best.offer(self, &found, run)? {
                high = middle;
            } else {
                low = middle;
            }
        }
        let terms = Terms {
            price: 0.0,
            bounded: true,
        };
        for choice in [self.choice(&self.keys(&best.ends)), start] {
            let found = self.rounds(choice, terms, run)?;
            best.offer(self, &found, run)?;
        }
        Ok(self.keys(&best.ends))
    }

    fn allows(&self, wrong: i64) -> bool {
        wrong as f64 / self.samples.max(1) as f64 <= self.allowance.share
    }

    /// The bit of the whole model, which all samples reach.
    fn model(&self) -> u64 {
        1 << self.falling.len()
    }

    fn choice(&self, keys: &Keys<S>) -> Choice {
        let mut choice = Choice {
            ends: vec![0; keys.len()],
            reached: vec![self.model(); self.samples],
        };
        for (head, key) in keys.iter().enumerate() {
            let end = key.map_or(0, |key| {
                self.falling[head].partition_point(|&(other, _)| other >= key)
            });
            self.set(&mut choice, head, end);
        }
        choice
    }

    fn keys(&self, ends: &[usize]) -> Keys<S> {
        let key = |(&end, falling): (&usize, &Vec<(S::Key, u32)>)| {
            end.checked_sub(1).map(|last| falling[last].0)
        };
        ends.iter().zip(&self.falling).map(key).collect()
    }

    /// Move a threshold.
    fn set(&self, choice: &mut Choice, head: usize, end: usize) {
        let before = std::mem::replace(&mut choice.ends[head], end);
        for &(_, sample) in &self.falling[head][before.min(end)..before.max(end)] {
            choice.reached[sample as usize] ^= 1 << head;
        }
    }

    /// Samples by exit, and how many are wrong.
    fn totals(&self, choice: &Choice, run: &Run) -> Result<(Vec<i64>, i64)> {
        let pieces = choice.reached.chunks(PIECE).zip(self.wrong.chunks(PIECE));
        let found = run.map(pieces.collect(), |(reached, wrong)| {
            let (mut taken, mut sum) = (vec![0; self.falling.len() + 1], 0);
            for (reached, wrong) in reached.iter().zip(wrong) {
                let exit = reached.trailing_zeros();
                taken[exit as usize] += 1;
                sum += (wrong >> exit & 1) as i64;
            }
            (taken, sum)
        })?;
        let mut totals = (vec![0; self.falling.len() + 1], 0);
        for (taken, wrong) in found {
            for (sum, n) in totals.0.iter_mut().zip(taken) {
                *sum += n;
            }
            totals.1 += wrong;
        }
        Ok(totals)
    }

    /// Let the heads take turns until none changes its threshold.
    fn rounds(&self, mut choice: Choice, terms: Terms, run: &Run) -> Result<Choice> {
        let heads = self.falling.len();
        let mut settled = 0;
        for turn in 0..ROUNDS * heads {
            let head = turn % heads;
            let end = self.turn(head, &choice, terms, run)?;
            if end == choice.ends[head] {
                settled += 1;
            } else {
                self.set(&mut choice, head, end);
                settled = 1;
            }
            if settled == heads {
                break;
            }
        }
        Ok(choice)
    }

    /// The best threshold of a head with the others as they are: the lowest value, of equal ones the highest.
    fn turn(&self, head: usize, choice: &Choice, terms: Terms, run: &Run) -> Result<usize> {
        let (states, wrong) = self.without(head, choice, run)?;
        let costs = self.allowance.costs;
        let value = |exchange: &Exchange| {
            let value = exchange.cost(costs) + terms.price * exchange.wrong as f64;
            (!terms.bounded || self.allows(wrong + exchange.wrong)).then_some(value)
        };
        let changes = std::array::from_fn(|state| {
            let mut one = Exchange::none(head);
            one.take(state as u8, 1);
            (one.cost(costs) + terms.price * one.wrong as f64, one.wrong)
        });
        let falling = &self.falling[head];
        let stretches = run.map(falling.chunks(STRETCH).collect(), |items| {
            Stretch::of(items, &states, &changes)
        })?;
        // Where each begins, and the least that its values can be.
        let mut exchange = Exchange::none(head);
        let mut best = (value(&exchange).unwrap_or(f64::INFINITY), 0);
        let mut open = Vec::new();
        for (place, stretch) in stretches.iter().enumerate() {
            if !terms.bounded || self.allows(wrong + exchange.wrong + stretch.fewest) {
                let before = exchange.cost(costs) + terms.price * exchange.wrong as f64;
                open.push((before + stretch.lowest, place, exchange.clone()));
            }
            for (state, &times) in stretch.states.iter().enumerate() {
                exchange.take(state as u8, i64::from(times));
            }
        }
        open.sort_by(|a, b| a.0.total_cmp(&b.0));
        let most = costs.iter().copied().fold(0.0, f64::max) + terms.price;
        let slack = ROUNDED * self.samples as f64 * most;
        for (lowest, place, mut exchange) in open {
            if lowest > best.0 + slack {
                break;
            }
            let first = place * STRETCH;
            for end in first + 1..=falling.len().min(first + STRETCH) {
                let (key, sample) = falling[end - 1];
                exchange.take(states[sample as usize], 1);
                if falling.get(end).is_some_and(|next| next.0 == key) {
                    continue;
                }
                let better = |&value: &f64| value < best.0 || value == best.0 && end < best.1;
                if let Some(value) = value(&exchange).filter(better) {
                    best = (value, end);
                }
            }
        }
        Ok(best.1)
    }

    /// The state of every sample if a head took none, and how many would be wrong.
    fn without(&self, head: usize, choice: &Choice, run: &Run) -> Result<(Vec<u8>, i64)> {
        let mut states = vec![0; self.samples];
        let pieces = choice
            .reached
            .chunks(PIECE)
            .zip(self.wrong.chunks(PIECE))
            .zip(states.chunks_mut(PIECE))
            .collect();
        let isa = run.instruction_set();
        let wrong = run.map(pieces, |((reached, wrong), states)| {
            let without = Without {
                head,
                reached,
                wrong,
                states,
            };
            pass(isa, without)
        })?;
        Ok((states, wrong.into_iter().sum()))
    }
}

/// The states of some samples if a head took none, and how many would be wrong.
struct Without<'a> {
    head: usize,
    reached: &'a [u64],
    wrong: &'a [u64],
    states: &'a mut [u8],
}

impl Pass<i32> for Without<'_> {
    type Found = i64;

    #[inline(always)]
    fn run(self, _: impl Simd<i32>) -> i64 {
        let head = 1 << self.head;
        let mut sum = 0;
        let samples = self.reached.iter().zip(self.wrong);
        for (state, (reached, wrong)) in self.states.iter_mut().zip(samples) {
            let others = reached & !head;
            let next = others & others.wrapping_neg();
            let (here, there) = (wrong & head != 0, wrong & next != 0);
            sum += i64::from(there);
            let known = next.trailing_zeros() as u8
                | if here { WRONG_HERE } else { 0 }
                | if there { WRONG_NEXT } else { 0 };
            *state = if next > head { known } else { GONE };
        }
        sum
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::survivors::everyone;

    #[test]
    fn the_numbering_of_samples_changes_nothing() {
        let noise = |i: usize| (i * 7919 % 1009) as f64 / 1009.0;
        let scores: Vec<f64> = (0..3 * 5000)
            .map(|i| (noise(i % 5000) + noise(i + 1)) / 2.0)
            .map(|score| (score * 500.0).round())
            .collect();
        let correct: Vec<u8> = (0..3 * 5000)
            .map(|i| u8::from(noise(3 * i) * 500.0 < scores[i] + 100.0))
            .collect();
        let heads = Heads::new(&scores, &correct, 3).unwrap();
        let (alive, run) = (everyone(5000), Run::on(2));
        let allowance = Allowance {
            costs: &[1.0, 2.0, 3.0, 6.0],
            share: 0.1,
        };
        let found = [0, usize::MAX].map(|near| {
            let search = Search::new(&heads, &alive, allowance, near, &run).unwrap();
            search.cheapest(&vec![None; 3], &run).unwrap()
        });
        assert!(found[0].iter().any(Option::is_some));
        assert_eq!(found[0], found[1]);
    }
}
