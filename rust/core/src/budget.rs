//! The cheapest thresholds of a cascade that keep the share of wrong samples within an allowance.
//!
//! A price on every wrong sample turns the allowance into a part of the cost; for a given price each head in turn
//! takes the threshold that is best with the others as they are, which one pass over its scores in order finds
//! exactly.  The price is found by bisection, and at the end the heads take turns once more under the allowance
//! itself.  All sums are integer counts until they are compared.

use crate::cascade::{Heads, Keys};
use crate::error::{Error, Result};
use crate::run::Run;
use crate::sort::sort_pairs;
use crate::threshold::Calibratable;

/// Prices tried, each half as far from the best as the one before.
const PRICES: usize = 24;
/// The lowest and the highest price, as powers of two times the whole model's cost.
const RANGE: (f64, f64) = (-12.0, 28.0);
/// Rounds of the heads, at most.
const ROUNDS: usize = 20;
/// A sample that does not reach the head.
const GONE: u8 = u8::MAX;
/// Flags beside the number of the next exit.
const WRONG_HERE: u8 = 0x40;
const WRONG_NEXT: u8 = 0x80;
/// Heads whose numbers fit beside the flags.
const MOST_HEADS: usize = 62;

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
    start: Keys<S>,
    allowance: Allowance,
    run: &Run,
) -> Result<Keys<S>> {
    let search = Search::new(heads, alive, allowance, run)?;
    let mut best = Best {
        cost: f64::INFINITY,
        keys: vec![None; heads.count],
    };
    let (mut low, mut high) = RANGE;
    let none = vec![None; heads.count];
    best.offer(&search, &none);
    best.offer(&search, &start);
    for _ in 0..PRICES {
        let middle = low.midpoint(high);
        let price = allowance.costs[heads.count] * middle.exp2();
        let keys = search.rounds(
            start.clone(),
            |exchange, _| Some(exchange.cost(allowance.costs) + price * exchange.wrong as f64),
            run,
        )?;
        if best.offer(&search, &keys) {
            high = middle;
        } else {
            low = middle;
        }
    }
    for keys in [best.keys.clone(), start] {
        let keys = search.rounds(
            keys,
            |exchange, wrong| {
                search
                    .allows(wrong + exchange.wrong)
                    .then(|| exchange.cost(allowance.costs))
            },
            run,
        )?;
        best.offer(&search, &keys);
    }
    Ok(best.keys)
}

/// The cheapest thresholds so far.
struct Best<K> {
    cost: f64,
    keys: Vec<Option<K>>,
}

impl<K: crate::order::Key> Best<K> {
    /// Whether the thresholds keep within the allowance; the cheapest are kept.
    fn offer<S: Calibratable<Key = K>>(&mut self, search: &Search<S>, keys: &Keys<S>) -> bool {
        let (taken, wrong) = search.totals(keys);
        if !search.allows(wrong) {
            return false;
        }
        let cost = taken
            .iter()
            .zip(search.allowance.costs)
            .map(|(&n, cost)| n as f64 * cost)
            .sum();
        if cost < self.cost {
            *self = Self {
                cost,
                keys: keys.clone(),
            };
        }
        true
    }
}

/// What changes if a head takes some samples: how many it takes, which exits lose them, how many more are wrong.
struct Exchange {
    head: usize,
    taken: i64,
    lost: Vec<i64>,
    wrong: i64,
}

impl Exchange {
    fn cost(&self, costs: &[f64]) -> f64 {
        let lost = self.lost.iter().zip(costs).skip(self.head + 1);
        self.taken as f64 * costs[self.head] - lost.map(|(&n, cost)| n as f64 * cost).sum::<f64>()
    }
}

struct Search<'a, S: Calibratable> {
    heads: &'a Heads<'a, S>,
    allowance: Allowance<'a>,
    /// The samples that count.
    samples: Vec<u32>,
    /// Those by falling score, for each head.
    falling: Vec<Vec<(S::Key, u32)>>,
}

impl<'a, S: Calibratable> Search<'a, S> {
    fn new(
        heads: &'a Heads<S>,
        alive: &[u64],
        allowance: Allowance<'a>,
        run: &Run,
    ) -> Result<Self> {
        if heads.count > MOST_HEADS {
            return Err(Error::TooManyHeads {
                heads: heads.count,
                most: MOST_HEADS,
            });
        }
        let is_alive = |&sample: &u32| alive[sample as usize / 64] >> (sample % 64) & 1 == 1;
        let samples: Vec<u32> = (0..heads.samples as u32).filter(is_alive).collect();
        let falling = |head| {
            let scores = heads.row(head).0;
            let items: Vec<_> = samples
                .iter()
                .map(|&at| (scores[at as usize].key(), at))
                .collect();
            let flags = vec![0; items.len()];
            let (mut items, _) = sort_pairs(items, flags, |item| item.0, run)?;
            items.reverse();
            Ok(items)
        };
        let falling = (0..heads.count).map(falling).collect::<Result<_>>()?;
        Ok(Self {
            heads,
            allowance,
            samples,
            falling,
        })
    }

    fn allows(&self, wrong: i64) -> bool {
        wrong as f64 / self.samples.len().max(1) as f64 <= self.allowance.share
    }

    /// The first head from `head` on that takes a sample; the number of heads where none does.
    fn exit(&self, keys: &Keys<S>, head: usize, sample: usize) -> usize {
        let takes = |&head: &usize| {
            keys[head].is_some_and(|key| self.heads.row(head).0[sample].key() >= key)
        };
        (head..self.heads.count)
            .find(takes)
            .unwrap_or(self.heads.count)
    }

    fn is_wrong(&self, exit: usize, sample: usize) -> bool {
        exit < self.heads.count && self.heads.row(exit).1[sample] == 0
    }

    /// Samples by exit, and how many are wrong.
    fn totals(&self, keys: &Keys<S>) -> (Vec<i64>, i64) {
        let mut taken = vec![0; self.heads.count + 1];
        let mut wrong = 0;
        for &sample in &self.samples {
            let exit = self.exit(keys, 0, sample as usize);
            taken[exit] += 1;
            wrong += i64::from(self.is_wrong(exit, sample as usize));
        }
        (taken, wrong)
    }

    /// Let the heads take turns until none changes its threshold.
    ///
    /// `worth` values an exchange, given how many samples are wrong without the head; the lowest wins, and of equal
    /// ones the highest threshold.
    fn rounds(
        &self,
        mut keys: Keys<S>,
        worth: impl Fn(&Exchange, i64) -> Option<f64>,
        run: &Run,
    ) -> Result<Keys<S>> {
        for _ in 0..ROUNDS {
            let before = keys.clone();
            for head in 0..self.heads.count {
                run.check()?;
                keys[head] = None;
                keys[head] = self.turn(head, &keys, &worth);
            }
            if keys == before {
                break;
            }
        }
        Ok(keys)
    }

    /// The best threshold of a head with the others as they are.
    fn turn(
        &self,
        head: usize,
        keys: &Keys<S>,
        worth: impl Fn(&Exchange, i64) -> Option<f64>,
    ) -> Option<S::Key> {
        let mut next = vec![GONE; self.heads.samples];
        let mut wrong = 0;
        for &sample in &self.samples {
            let at = sample as usize;
            let first = self.exit(keys, 0, at);
            wrong += i64::from(self.is_wrong(first, at));
            if first > head {
                let here = if self.is_wrong(head, at) {
                    WRONG_HERE
                } else {
                    0
                };
                let there = if self.is_wrong(first, at) {
                    WRONG_NEXT
                } else {
                    0
                };
                next[at] = first as u8 | here | there;
            }
        }
        let mut exchange = Exchange {
            head,
            taken: 0,
            lost: vec![0; self.heads.count + 1],
            wrong: 0,
        };
        let mut best = (worth(&exchange, wrong).unwrap_or(f64::INFINITY), None);
        for group in self.falling[head].chunk_by(|a, b| a.0 == b.0) {
            for &(_, sample) in group {
                let state = next[sample as usize];
                if state != GONE {
                    exchange.taken += 1;
                    exchange.lost[usize::from(state & !(WRONG_HERE | WRONG_NEXT))] += 1;
                    exchange.wrong +=
                        i64::from(state & WRONG_HERE != 0) - i64::from(state & WRONG_NEXT != 0);
                }
            }
            if let Some(value) = worth(&exchange, wrong).filter(|&value| value < best.0) {
                best = (value, Some(group[0].0));
            }
        }
        best.1
    }
}
