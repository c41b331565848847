"""Certificates by their formulas; scipy's binomial and beta functions are imported when called.

Every p-value is enlarged by a billionth of itself, so that rounding never certifies; the core does the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, SupportsIndex

import numpy as np
from numpy.typing import NDArray

from offramp.arrays import as_floats, as_thread_count
from offramp.design import Groups, Question, as_seed, ask
from offramp.errors import InputError
from offramp.outcomes import Certificate
from offramp.reference.calibration import _require_one_row, _require_valid, _samples

SAFE = 1e-9
TINY = 1e-290
BOLDNESS = 0.9

Counts = NDArray[np.int64]
Found = tuple[float, int, int, float]


def certify(
    scores: Any,
    correct: Any,
    eps: Any,
    *,
    delta: float = 0.05,
    method: Literal["e-process", "fixed-sequence", "bonferroni", "sgr"] = "e-process",
    groups: Any = None,
    group_method: Literal["betting", "one-per-group"] = "betting",
    max_group_size: SupportsIndex | None = None,
    grid: Any = None,
    population: bool = False,
    seed: int = 0,
    threads: SupportsIndex | None = None,
) -> Certificate:
    """Find the lowest threshold whose accuracy is at least eps, at confidence 1 - delta; see `offramp.certify`."""
    values, labels = _samples(scores, correct)
    _require_one_row(values)
    question = ask(
        len(values),
        eps,
        delta=delta,
        method=method,
        groups=groups,
        group_method=group_method,
        max_group_size=max_group_size,
        grid=grid,
        population=population,
        seed=as_seed(seed),
    )
    as_thread_count(threads)
    if question.keep is not None:
        values, labels = values[question.keep], labels[question.keep]
    tau, accepted, right, bound = math.inf, 0, 0, math.nan
    if len(values):
        _require_valid(values, labels)
        if question.unit and (
            values.min() < 0.0 or values.max() >= np.nextafter(np.float32(1), np.float32(2))
        ):
            raise InputError(
                "scores must lie in [0, 1] for the default thresholds: give grid=, thresholds fixed before the labels"
                " were seen"
            )
        tau, accepted, right, bound = _FIND[question.method](values, labels, question, scores)
    return Certificate(
        tau=tau,
        accepted=accepted,
        correct=right,
        bound=bound,
        method=question.method,
        assumptions=question.assumptions,
        found=math.isfinite(tau),
        n=len(values),
        eps=question.eps,
        delta=question.delta,
    )


def p_value(errors: Any, n: Any, alpha: float) -> Any:
    """P(Bin(n, alpha) <= errors), the p-value of "the risk exceeds alpha"; 1 for no samples."""
    from scipy.stats import binom  # noqa: PLC0415 - an optional dependency

    return np.clip(binom.cdf(errors, n, alpha) * (1.0 + SAFE), TINY, 1.0)


def upper_bound(errors: int, n: int, delta: float) -> float:
    """Clopper-Pearson: the risk above which as few errors have probability delta."""
    from scipy.stats import beta  # noqa: PLC0415 - an optional dependency

    return 1.0 if errors >= n else float(beta.ppf(1.0 - delta, errors + 1, n - errors))


def is_evident(errors: Any, n: Any, alpha: float, delta: float) -> Any:
    """Whether W >= 1 / delta, W the mixture likelihood ratio of risks below alpha against alpha."""
    from scipy.special import betainc, betaln  # noqa: PLC0415 - an optional dependency

    a, b = 1.0, (1.0 - alpha) / alpha
    right = n - errors
    with np.errstate(divide="ignore", invalid="ignore"):
        wealth = (
            np.log(betainc(a + errors, b + right, alpha))
            + betaln(a + errors, b + right)
            - math.log(betainc(a, b, alpha))
            - betaln(a, b)
            - errors * math.log(alpha)
            - right * math.log1p(-alpha)
        )
    # An underflowing betainc gives -inf or NaN: not certified.
    return (errors < alpha * n) & (wealth - math.log1p(SAFE) >= -math.log(delta))


def risk_below(eps: float) -> float:
    """1 - eps, never rounded up."""
    alpha = 1.0 - eps
    return math.nextafter(alpha, 0.0) if 1.0 - alpha < eps else alpha


def holds(accepted: Any, right: Any, alpha: float, delta: float) -> Any:
    """Whether the exact binomial test refutes a risk above alpha at level delta."""
    accepted, right = np.asarray(accepted), np.asarray(right)
    if alpha >= 1.0:
        return accepted > 0
    return (accepted > 0) & (p_value(accepted - right, accepted, alpha) <= delta)


def wealth_suffices(accepted: Counts, wrong: Counts, alpha: float, delta: float, most: int) -> bool:
    """Whether bets on the groups, in their order, refute a risk above alpha at level delta."""
    if alpha >= 1.0:
        return bool((accepted > 0).any())
    if alpha <= 0.0:
        return False
    total, squares, wealth = alpha / 2.0, alpha / 2.0 * (alpha / 2.0), 1.0
    highest = BOLDNESS / (1.0 - alpha)
    for n, e in zip(accepted.tolist(), wrong.tolist(), strict=True):
        z = (alpha * n - e) / most
        wealth *= 1.0 + min(max(total / squares, 0.0), highest) * z
        if wealth * (1.0 - SAFE) * delta >= 1.0:
            return True
        total += z
        squares += z * z
    return False


def counts_at(
    values: NDArray[np.float64],
    labels: NDArray[np.uint8],
    grid: Sequence[float] | NDArray[np.float64],
) -> tuple[Counts, Counts]:
    """Count accepted and correct samples at each threshold."""
    order = np.argsort(values, kind="stable")
    first = np.searchsorted(values[order], grid, side="left")
    right_below = np.append(0, np.cumsum(labels[order], dtype=np.int64))
    return len(values) - first, right_below[-1] - right_below[first]


def walk(starts: Sequence[int], passes: Callable[[int], bool]) -> int | None:
    """Return the lowest place that a walk down from one of the starts reaches before its first failure."""
    lowest = None
    for start in starts:
        place = start
        while place >= 0 and passes(place):
            lowest = place if lowest is None else min(lowest, place)
            place -= 1
    return lowest


def _pick(grid: Any, accepted: Counts, right: Counts, place: int | None, bound: float) -> Found:
    if place is None:
        return math.inf, 0, 0, math.nan
    return float(grid[place]) + 0.0, int(accepted[place]), int(right[place]), bound


def _by_evidence(values: NDArray[np.float64], labels: NDArray[np.uint8], question: Question, _: Any) -> Found:
    alpha = risk_below(question.eps)
    grid = np.unique(values) if question.grid is None else question.grid
    accepted, right = counts_at(values, labels, grid)
    if alpha >= 1.0:
        evident = accepted > 0
    elif alpha <= 0.0:
        evident = np.zeros(len(grid), bool)
    else:
        evident = (accepted > 0) & is_evident(accepted - right, accepted, alpha, question.delta)
    place = int(evident.argmax()) if evident.any() else None
    return _pick(grid, accepted, right, place, question.eps)


def _by_walking(values: NDArray[np.float64], labels: NDArray[np.uint8], question: Question, _: Any) -> Found:
    grid, alpha = question.grid, risk_below(question.eps)
    assert grid is not None
    delta = question.delta / len(question.places)
    accepted, right = counts_at(values, labels, grid.tolist())
    if question.groups is None:
        passes = holds(accepted, right, alpha, delta)
    else:
        passes = _bets(values, labels, grid, alpha, delta, question.groups)
    return _pick(
        grid, accepted, right, walk(question.places, lambda place: bool(passes[place])), question.eps
    )


def _bets(
    values: NDArray[np.float64],
    labels: NDArray[np.uint8],
    grid: NDArray[np.float64],
    alpha: float,
    delta: float,
    groups: Groups,
) -> NDArray[np.bool_]:
    found = []
    for threshold in grid:
        taken = values >= threshold
        accepted = np.bincount(groups.of[taken], minlength=groups.number)
        wrong = np.bincount(groups.of[taken & (labels == 0)], minlength=groups.number)
        found.append(wealth_suffices(accepted, wrong, alpha, delta, groups.most))
    return np.array(found)


def _by_ranks(
    values: NDArray[np.float64], labels: NDArray[np.uint8], question: Question, given: Any
) -> Found:
    if not question.places:
        return math.inf, 0, 0, math.nan
    delta = question.delta / len(question.places)
    falling = np.sort(values)[::-1]
    # What scores strictly above the (m + 1)-th highest, by the next number of the scores' own dtype.
    grid = [_next_up(float(falling[rank]), given) for rank in reversed(question.places)]
    accepted, right = counts_at(values, labels, grid)
    passes = holds(accepted, right, risk_below(question.eps), delta)
    place = int(passes.argmax()) if passes.any() else None
    if place is None:
        return math.inf, 0, 0, math.nan
    return _pick(grid, accepted, right, place, _bound(int(accepted[place]), int(right[place]), delta))


def _next_up(value: float, given: Any) -> float:
    dtype = as_floats(given, "scores").dtype
    if dtype == "bfloat16":
        bits = int(np.float32(value + 0.0).view(np.uint32)) >> 16
        bits += 1 if value >= 0 else -1
        return float(np.uint32(bits << 16).view(np.float32)) + 0.0
    kind = np.dtype(dtype).type
    with np.errstate(over="ignore"):  # beyond the largest number nothing is accepted
        return float(np.nextafter(kind(value), kind(np.inf))) + 0.0


def _by_bisection(
    values: NDArray[np.float64], labels: NDArray[np.uint8], question: Question, _: Any
) -> Found:
    ascending = np.sort(values)
    n = len(values)
    steps = math.ceil(math.log2(n))
    low, high, last = 1, n, None
    for _step in range(steps):
        middle = -(-(low + high) // 2)
        accepted, right = counts_at(values, labels, [float(ascending[middle - 1])])
        if holds(accepted[0], right[0], risk_below(question.eps), question.delta / steps):
            high = middle
            last = float(ascending[middle - 1]), int(accepted[0]), int(right[0])
        else:
            low = middle
    if last is None:
        return math.inf, 0, 0, math.nan
    tau, taken, correct = last
    return tau + 0.0, taken, correct, _bound(taken, correct, question.delta / steps)


def _bound(accepted: int, right: int, delta: float) -> float:
    return 1.0 - upper_bound(accepted - right, accepted, delta)


_FIND: dict[str, Callable[..., Found]] = {
    "e-process": _by_evidence,
    "fixed-sequence": _by_walking,
    "betting": _by_walking,
    "bonferroni": _by_ranks,
    "sgr": _by_bisection,
}
