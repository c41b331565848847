"""Cascades by definition: every head in turn, on the samples that the heads before it left."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, SupportsIndex

import numpy as np
from numpy.typing import NDArray

from offramp.arrays import as_thread_count
from offramp.design import CascadeQuestion, ask_cascade
from offramp.errors import InputError
from offramp.outcomes import Cascade
from offramp.reference.calibration import _require_valid, _samples
from offramp.reference.guarantee import holds, risk_below, wealth_suffices

STEPS = 20
IN_HAND = 10.0
PRICES = 24
RANGE = (-12.0, 28.0)
ROUNDS = 20

Rows = NDArray[np.float64]
Flags = NDArray[np.uint8]
Mask = NDArray[np.bool_]
Worth = Callable[[NDArray[np.float64], NDArray[np.int64], int], NDArray[np.float64]]


def calibrate_cascade(
    scores: Any,
    correct: Any,
    eps: Any,
    *,
    mode: Literal["sequential", "marginal", "budget"] = "sequential",
    costs: Any = None,
    budget: Any = None,
    delta: float | None = None,
    groups: Any = None,
    max_group_size: SupportsIndex | None = None,
    seed: int = 0,
    threads: SupportsIndex | None = None,
) -> Cascade:
    """Find a threshold for each of several heads; see `offramp.calibrate_cascade`."""
    values, labels = _samples(scores, correct)
    if values.ndim != 2:
        raise InputError(f"scores has shape {values.shape}: give (K, N), a row for each of K heads")
    heads, samples = values.shape
    question = ask_cascade(
        heads,
        samples,
        eps,
        mode=mode,
        costs=costs,
        budget=budget,
        delta=delta,
        groups=groups,
        max_group_size=max_group_size,
        seed=seed,
    )
    as_thread_count(threads)
    _require_valid(values, labels)
    counted = np.ones(samples, bool)
    if question.half is not None:
        counted = question.half == 1
        thresholds = certified(values, labels, mode, question)
    elif mode == "budget":
        thresholds = budgeted(values, labels, counted, question.eps, question.costs, question.budget)
    elif mode == "sequential":
        thresholds = sequential(values, labels, counted, question.eps)
    else:
        thresholds = np.array(
            [lowest(row, flags, question.eps) for row, flags in zip(values, labels, strict=True)]
        )
    accepted, right = outcome(values, labels, counted, thresholds)
    return Cascade.of(
        thresholds,
        accepted,
        right,
        n=int(counted.sum()),
        costs=question.costs,
        mode=mode,
        eps=question.eps,
        delta=question.delta,
        assumptions=question.assumptions,
    )


def lowest(scores: NDArray[np.float64], correct: Flags, eps: float) -> float:
    """Return min { v : c(v) / n(v) >= eps } over the distinct scores v; +inf where none qualifies."""
    order = np.argsort(scores, kind="stable")
    ordered = scores[order]
    accepted = np.arange(len(order), 0, -1)
    right = np.cumsum(correct[order][::-1], dtype=np.int64)[::-1]
    begins = np.append(True, ordered[1:] != ordered[:-1])[: len(order)]
    passing = np.flatnonzero(begins & (right / accepted >= eps))
    return float(ordered[passing[0]]) + 0.0 if len(passing) else math.inf


def sequential(scores: Rows, correct: Flags, alive: Mask, eps: float) -> NDArray[np.float64]:
    """Find each threshold on the samples the heads before it left."""
    alive = alive.copy()
    thresholds = []
    for row, flags in zip(scores, correct, strict=True):
        thresholds.append(lowest(row[alive], flags[alive], eps))
        alive &= row < thresholds[-1]
    return np.array(thresholds)


def exits(scores: Rows, thresholds: NDArray[np.float64], first: int = 0) -> NDArray[np.int64]:
    """Return the first head from ``first`` on that takes each sample; K where none does."""
    reached = scores[first:] >= thresholds[first:, None]
    if not len(reached):
        return np.full(scores.shape[1], len(scores))
    return np.where(reached.any(axis=0), first + reached.argmax(axis=0), len(scores))


def outcome(
    scores: Rows, correct: Flags, alive: Mask, thresholds: NDArray[np.float64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Count what each head takes of the samples that reach it, and what of that is correct."""
    leave = exits(scores, thresholds)
    taken = [alive & (leave == head) for head in range(len(scores))]
    accepted = np.array([np.count_nonzero(mask) for mask in taken], dtype=np.int64)
    right = np.array([np.count_nonzero(flags[mask]) for flags, mask in zip(correct, taken, strict=True)])
    return accepted, right.astype(np.int64)


def certified(scores: Rows, correct: Flags, mode: str, question: CascadeQuestion) -> NDArray[np.float64]:
    """Propose a path of ever lower thresholds on one half; keep the last step that holds on the other."""
    assert question.half is not None
    assert question.delta is not None
    proposing, certifying = question.half == 0, question.half == 1
    alpha = question.budget if mode == "budget" else risk_below(question.eps)
    trial = _Trial(scores, correct, question, alpha)
    last = np.full(len(scores), math.inf)
    entered = np.zeros(len(scores), bool)
    for step in range(1, STEPS + 1):
        share = step / STEPS
        if mode == "budget":
            eps = 1.0 - (1.0 - question.eps) * share
            thresholds = budgeted(scores, correct, proposing, eps, question.costs, question.budget * share)
            passes = trial.total_holds(thresholds, certifying)
        else:
            thresholds = trial.propose(proposing, certifying, 1.0 - alpha * share, entered)
            if np.isinf(thresholds).all():
                continue
            passes = trial.heads_hold(thresholds, certifying)
        if not passes:
            break
        last = thresholds
    return last


@dataclass(frozen=True)
class _Trial:
    scores: Rows
    correct: Flags
    question: CascadeQuestion
    alpha: float

    def propose(self, proposing: Mask, certifying: Mask, eps: float, entered: Mask) -> NDArray[np.float64]:
        """Sequential thresholds of the heads that promise to hold on the other half."""
        assert self.question.delta is not None
        alive, thresholds = proposing.copy(), []
        for head, row in enumerate(self.scores):
            tau = lowest(row[alive], self.correct[head][alive], eps)
            taken = alive & (row >= tau)
            if math.isfinite(tau) and not entered[head]:
                entered[head] = self._promises(head, taken, proposing, certifying)
            thresholds.append(tau if entered[head] else math.inf)
            alive &= row < thresholds[-1]
        return np.array(thresholds)

    def _promises(self, head: int, taken: Mask, proposing: Mask, certifying: Mask) -> bool:
        assert self.question.delta is not None
        delta = self.question.delta / IN_HAND
        if self.question.groups is not None:
            return self._bet(head, taken, delta)
        here, there = int(proposing.sum()), int(certifying.sum())
        wrong = int(np.count_nonzero(self.correct[head][taken] == 0))
        accepted = int(taken.sum()) * there // here
        return bool(holds(accepted, max(accepted - -(-wrong * there // here), 0), self.alpha, delta))

    def heads_hold(self, thresholds: NDArray[np.float64], certifying: Mask) -> bool:
        assert self.question.delta is not None
        leave = exits(self.scores, thresholds)
        for head in np.flatnonzero(np.isfinite(thresholds)).tolist():
            taken = certifying & (leave == head)
            if self.question.groups is not None:
                passes = self._bet(head, taken, self.question.delta)
            else:
                right = np.count_nonzero(self.correct[head][taken])
                passes = bool(holds(taken.sum(), right, self.alpha, self.question.delta))
            if not passes:
                return False
        return True

    def total_holds(self, thresholds: NDArray[np.float64], certifying: Mask) -> bool:
        assert self.question.delta is not None
        leave = exits(self.scores, thresholds)
        wrong = certifying & (
            np.vstack([self.correct, np.ones(len(leave), np.uint8)])[leave, np.arange(len(leave))] == 0
        )
        if self.question.groups is None:
            n = int(certifying.sum())
            return bool(holds(n, n - np.count_nonzero(wrong), self.alpha, self.question.delta))
        return self._wealth(certifying, wrong, self.question.delta)

    def _bet(self, head: int, taken: Mask, delta: float) -> bool:
        return self._wealth(taken, taken & (self.correct[head] == 0), delta)

    def _wealth(self, taken: Mask, wrong: Mask, delta: float) -> bool:
        groups = self.question.groups
        assert groups is not None
        accepted = np.bincount(groups.of[taken], minlength=groups.number)
        errors = np.bincount(groups.of[wrong], minlength=groups.number)
        return wealth_suffices(accepted, errors, self.alpha, delta, groups.most)


def budgeted(
    scores: Rows,
    correct: Flags,
    alive: Mask,
    eps: float,
    costs: NDArray[np.float64] | None,
    share: float,
) -> NDArray[np.float64]:
    """Search the cheapest thresholds with at most a share of all samples taken early and wrong.

    A price on every wrong sample, found by bisection, turns the allowance into a part of the cost; for each price
    the heads take turns, each at its best threshold with the others as they are.  At the end they take turns under
    the allowance itself.
    """
    assert costs is not None
    search = _Search(scores[:, alive], correct[:, alive], costs, share)
    start = search.sequential(eps)
    never = np.full(len(scores), math.inf)
    best = (math.inf, never)
    for thresholds in (never, start):
        best = search.better(best, thresholds)[0]
    low, high = RANGE
    for _ in range(PRICES):
        middle = (low + high) / 2.0
        price = float(costs[-1]) * 2.0**middle
        thresholds = search.rounds(start, partial(_priced, price))
        best, allowed = search.better(best, thresholds)
        low, high = (low, middle) if allowed else (middle, high)

    def within(cost: NDArray[np.float64], wrong: NDArray[np.int64], others: int) -> NDArray[np.float64]:
        return np.where((others + wrong) / max(int(alive.sum()), 1) <= share, cost, math.inf)

    for thresholds in (best[1], start):
        best = search.better(best, search.rounds(thresholds, within))[0]
    return best[1]


def _priced(price: float, cost: NDArray[np.float64], wrong: NDArray[np.int64], _: int) -> NDArray[np.float64]:
    return cost + price * wrong


@dataclass(frozen=True)
class _Search:
    scores: Rows
    correct: Flags
    costs: NDArray[np.float64]
    share: float

    def sequential(self, eps: float) -> NDArray[np.float64]:
        return sequential(self.scores, self.correct, np.ones(self.scores.shape[1], bool), eps)

    def _wrong(self, leave: NDArray[np.int64]) -> Mask:
        right = np.vstack([self.correct, np.ones(len(leave), np.uint8)])
        wrong: Mask = right[leave, np.arange(len(leave))] == 0
        return wrong

    def better(
        self, best: tuple[float, NDArray[np.float64]], thresholds: NDArray[np.float64]
    ) -> tuple[tuple[float, NDArray[np.float64]], bool]:
        """Keep the cheaper one, if it is within the allowance; tell whether it is."""
        leave = exits(self.scores, thresholds)
        if np.count_nonzero(self._wrong(leave)) / max(len(leave), 1) > self.share:
            return best, False
        taken = np.bincount(leave, minlength=len(self.costs))
        cost = sum(float(n) * float(c) for n, c in zip(taken, self.costs, strict=True))
        return ((cost, thresholds.copy()) if cost < best[0] else best), True

    def rounds(self, thresholds: NDArray[np.float64], worth: Worth) -> NDArray[np.float64]:
        """Let the heads take turns until none changes its threshold."""
        thresholds = thresholds.copy()
        for _ in range(ROUNDS):
            before = thresholds.copy()
            for head in range(len(thresholds)):
                thresholds[head] = math.inf
                thresholds[head] = self.turn(head, thresholds, worth)
            if (thresholds == before).all():
                break
        return thresholds

    def turn(self, head: int, thresholds: NDArray[np.float64], worth: Worth) -> float:
        """Find the best threshold of a head with the others as they are; of equal ones the highest."""
        leave = exits(self.scores, thresholds)
        wrong_now = self._wrong(leave)
        reach = np.flatnonzero(leave > head)
        order = reach[np.argsort(-self.scores[head][reach], kind="stable")]
        lost = [np.cumsum(leave[order] == other) for other in range(head + 1, len(self.costs))]
        more = np.cumsum((self.correct[head][order] == 0).astype(np.int64) - wrong_now[order])
        taken = np.arange(1, len(order) + 1)
        saved = np.zeros(len(order))
        for count, cost in zip(lost, self.costs[head + 1 :], strict=True):
            saved = saved + count * cost
        others = int(np.count_nonzero(wrong_now))
        values = worth(taken * self.costs[head] - saved, more, others)
        nothing = float(worth(np.zeros(1), np.zeros(1, np.int64), others)[0])
        ordered = self.scores[head][order]
        values = np.where(np.append(ordered[1:] != ordered[:-1], True)[: len(order)], values, math.inf)
        if not len(values) or not values.min() < nothing:
            return math.inf
        return float(ordered[values.argmin()]) + 0.0
