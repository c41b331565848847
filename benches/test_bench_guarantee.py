"""Certificates and cascades beside the usual code in numpy and scipy, and beside a threshold without a promise.

Every answer is held to numpy's before it is timed.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import pytest
from offramp import calibrate_cascade, certify, fast_calibrate
from offramp.design import lattice, lattice_starts
from scipy import special, stats

EPS, DELTA, GROUP = 0.9, 0.05, 50
RANKS = 200
METHODS = ("fixed-sequence", "e-process", "bonferroni", "sgr", "betting")

pytestmark = pytest.mark.benchmark(max_time=2.0, min_rounds=2)


@lru_cache(1)
def uniform(size):
    """Scores that mean what they say, from one half up, in groups of 50."""
    rng = np.random.default_rng(0)
    scores = rng.random(size, dtype=np.float32)
    return scores, rng.random(size, dtype=np.float32) < 0.5 + 0.5 * scores, np.arange(size) // GROUP


@lru_cache(1)
def heads(size):
    """Four heads, of which deeper ones know more; samples that are hard for one are hard for all."""
    rng = np.random.default_rng(1)
    hardness = rng.random(size, dtype=np.float32)
    knows = np.array([[0.9], [0.75], [0.6], [0.4]], dtype=np.float32)
    chance = 1 - hardness**3 * knows - 0.05 * rng.random((4, size), dtype=np.float32)
    return chance, rng.random((4, size), dtype=np.float32) < chance


def counts_from(scores, correct):
    """Ascending scores, and what is accepted and correct from each one up."""
    order = np.argsort(scores)
    right = np.cumsum(correct[order][::-1])[::-1]
    return scores[order], np.arange(len(scores), 0, -1), right


def refuted(accepted, right, delta):
    return (accepted > 0) & (stats.binom.cdf(accepted - right, accepted, 1 - EPS) <= delta)


def walked(grid, passes):
    """The lowest threshold that a walk down from a start reaches."""
    lowest = math.inf
    for start in lattice_starts(grid):
        place = start
        while place >= 0 and passes(place):
            lowest = min(lowest, grid[place])
            place -= 1
    return lowest


def fixed_sequence(scores, correct, _):
    grid = lattice()
    ordered, accepted, right = counts_from(scores, correct)
    first = np.searchsorted(ordered, grid.astype(np.float32))
    accepted, right = np.append(accepted, 0)[first], np.append(right, 0)[first]
    passes = refuted(accepted, right, DELTA / len(lattice_starts(grid)))
    return walked(grid, lambda place: passes[place])


def e_process(scores, correct, _):
    ordered, accepted, right = counts_from(scores, correct)
    alpha = 1 - EPS
    errors, a, b = accepted - right, 1.0, EPS / alpha
    with np.errstate(divide="ignore", invalid="ignore"):
        wealth = (
            np.log(special.betainc(a + errors, b + right, alpha))
            + special.betaln(a + errors, b + right)
            - math.log(special.betainc(a, b, alpha))
            - special.betaln(a, b)
            - errors * math.log(alpha)
            - right * math.log(EPS)
        )
    starts = np.append(True, ordered[1:] != ordered[:-1])
    found = np.flatnonzero(starts & (errors < alpha * accepted) & (wealth >= -math.log(DELTA)))
    return float(ordered[found[0]]) if len(found) else math.inf


def bonferroni(scores, correct, _):
    ordered, _, right = counts_from(scores, correct)
    n = len(scores)
    ranks = np.array([rank * n // (RANKS + 1) for rank in range(1, RANKS + 1)])
    above = np.searchsorted(ordered, ordered[n - 1 - ranks], side="right")
    accepted, right = n - above, np.append(right, 0)[above]
    passes = np.flatnonzero(refuted(accepted, right, DELTA / len(ranks)))
    if not len(passes):
        return math.inf
    return float(np.nextafter(ordered[n - 1 - ranks[passes[-1]]], np.float32(np.inf)))


def sgr(scores, correct, _):
    ordered, _, right = counts_from(scores, correct)
    n, last = len(scores), math.inf
    low, high, steps = 1, n, math.ceil(math.log2(n))
    for _step in range(steps):
        middle = -(-(low + high) // 2)
        first = np.searchsorted(ordered, ordered[middle - 1])
        if refuted(n - first, right[first], DELTA / steps):
            high, last = middle, float(ordered[middle - 1])
        else:
            low = middle
    return last


def betting(scores, correct, groups):
    grid, alpha = lattice(), 1 - EPS
    starts = lattice_starts(grid)
    delta, known = DELTA / len(starts), {}

    def passes(place):
        if place not in known:
            taken = scores >= np.float32(grid[place])
            accepted = np.bincount(groups[taken])
            wrong = np.bincount(groups[taken & ~correct], minlength=len(accepted))
            z = (alpha * accepted - wrong)[accepted > 0] / GROUP
            total = alpha / 2 + np.append(0, np.cumsum(z)[:-1])
            squares = alpha**2 / 4 + np.append(0, np.cumsum(z * z)[:-1])
            stakes = np.clip(total / squares, 0, 0.9 / EPS)
            known[place] = bool((np.cumsum(np.log1p(stakes * z)) >= -math.log(delta)).any())
        return known[place]

    return walked(grid, passes)


USUAL = {
    "fixed-sequence": fixed_sequence,
    "e-process": e_process,
    "bonferroni": bonferroni,
    "sgr": sgr,
    "betting": betting,
}


def certified(method, scores, correct, groups):
    if method == "betting":
        return certify(scores, correct, EPS, delta=DELTA, groups=groups).tau
    return certify(scores, correct, EPS, delta=DELTA, method=method).tau


@pytest.mark.parametrize("name", ["offramp", "numpy + scipy", "fast_calibrate"])
@pytest.mark.parametrize("method", METHODS)
def test_certificates(benchmark, size, require_memory, method, name):
    benchmark.group = f"certify, {method}, float32, N=1e7"
    samples = size(10_000_000, 60_000)
    require_memory(200 * samples)
    data = uniform(samples)
    if name == "fast_calibrate":
        benchmark(fast_calibrate, *data[:2], EPS)
        return
    found = certified(method, *data)
    # Without a promise it is 0.6.
    assert 0.6 < found < 0.8
    if name == "offramp":
        benchmark(certified, method, *data)
    else:
        assert benchmark.pedantic(USUAL[method], data, rounds=1) == found


def survivors(scores, correct):
    """The usual loop: sort what is left, head after head."""
    left, thresholds = np.ones(scores.shape[1], bool), []
    for row, flags in zip(scores, correct, strict=True):
        ordered, accepted, right = counts_from(row[left], flags[left])
        starts = np.append(True, ordered[1:] != ordered[:-1])
        passing = np.flatnonzero(starts & (right / accepted >= EPS))
        thresholds.append(float(ordered[passing[0]]) if len(passing) else math.inf)
        left &= row < thresholds[-1]
    return thresholds


@pytest.mark.parametrize("name", ["offramp", "numpy"])
def test_cascade(benchmark, size, require_memory, name):
    benchmark.group = "cascade of 4 heads, float32, N=1e7"
    samples = size(10_000_000, 20_000)
    require_memory(120 * samples)
    scores, correct = heads(samples)
    found = calibrate_cascade(scores, correct, EPS)
    assert found.coverage[0] > 0.2
    if name == "offramp":
        benchmark(calibrate_cascade, scores, correct, EPS)
    else:
        assert benchmark.pedantic(survivors, (scores, correct), rounds=1) == found.thresholds.tolist()
