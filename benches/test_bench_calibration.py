"""Calibration beside its peers: a group for every row, peers and one read of the inputs in each.

A contender must find the same threshold before it is timed.
"""

from __future__ import annotations

from functools import lru_cache

import ml_dtypes
import numpy as np
import pytest
from offramp import fast_calibrate, sort_by_score, threshold_curve
from offramp.evaluation.peers.calibration import by_argsort, one_read, peers

EPS = 0.9
OURS, READ = "offramp", "one read"
SIZES = {"N=1e4": 10_000, "N=1e6": 1_000_000, "N=1e8": 100_000_000}
PEERS = [
    "numpy argsort + cumsum",
    "numpy sort of packed keys",
    "torch.sort + cumsum",
    "polars sort + cum_sum",
    "sklearn precision_recall_curve",
]
# The usual code holds indices, sorted copies, sums and quotients.
BYTES_A_SAMPLE = 60

pytestmark = pytest.mark.benchmark(max_time=2.0, min_rounds=2)


@lru_cache(1)
def uniform(size):
    """Scores that mean what they say, from one half up."""
    rng = np.random.default_rng(0)
    scores = rng.random(size, dtype=np.float32)
    return scores, rng.random(size, dtype=np.float32) < 0.5 + 0.5 * scores


def contender(name, scores, correct):
    """Return a function that finds the threshold; skip what is not installed or cannot."""
    if name == OURS:
        return lambda: fast_calibrate(scores, correct, EPS)
    if name == READ:
        return lambda: one_read(scores, correct)
    found = peers(scores).get(name)
    if found is None:
        pytest.skip(f"{name}: not installed, or not for such scores")
    return lambda: found(scores, correct, EPS)


@pytest.mark.parametrize("name", [OURS, READ, *PEERS])
@pytest.mark.parametrize("row", SIZES)
def test_float32(benchmark, size, require_memory, row, name):
    benchmark.group = f"threshold, float32, {row}"
    samples = size(SIZES[row], 3000)
    require_memory(BYTES_A_SAMPLE * samples)
    scores, correct = uniform(samples)
    run = contender(name, scores, correct)
    expected = fast_calibrate(scores, correct, EPS)
    assert 0.55 < expected < 0.65
    if name != READ:
        assert run() == expected
    benchmark(run)


@pytest.mark.parametrize("name", [OURS, READ, "numpy argsort + cumsum"])
def test_heads_and_targets(benchmark, size, require_memory, name):
    benchmark.group = "thresholds, 4 heads x 20 targets, float32, N=1e7"
    heads, samples = 4, size(10_000_000, 3000)
    require_memory(heads * 10 * samples + BYTES_A_SAMPLE * samples)
    scores, correct = (array.reshape(heads, samples) for array in uniform(heads * samples))
    eps = np.linspace(0.78, 0.97, 20)
    found = fast_calibrate(scores, correct, eps)
    if name == OURS:
        benchmark(lambda: fast_calibrate(scores, correct, eps))
    elif name == READ:
        benchmark(lambda: one_read(scores, correct))
    else:
        # One pair is checked, since a loop over all of them takes minutes.
        assert by_argsort(scores[1], correct[1], eps[3]) == found[1, 3]
        loop = lambda: [[by_argsort(*row, target) for target in eps] for row in zip(scores, correct)]  # noqa: B905, E731
        assert benchmark.pedantic(loop, rounds=1) == found.tolist()


def ascending(size):
    scores, correct = uniform(size)
    order = np.argsort(scores)
    return scores[order], correct[order]


def crossing(size):
    """Accuracy passes the target at every rank."""
    scores, _ = uniform(size)
    correct = np.empty(size, bool)
    correct[np.argsort(scores)] = np.arange(size) % 10 != 9
    return scores, correct


def walk(size):
    """Accuracy wanders around the target, as if it could not make up its mind."""
    scores, _ = uniform(size)
    correct = np.empty(size, bool)
    correct[np.argsort(scores)] = np.random.default_rng(1).random(size) < EPS
    return scores, correct


def sawtooth(size):
    scores, _ = uniform(size)
    correct = np.empty(size, bool)
    correct[np.argsort(scores)] = np.arange(size) % 1000 < 1000 * EPS
    return scores, correct


def cast(dtype):
    def make(size):
        scores, correct = uniform(size)
        return scores.astype(dtype), correct

    return make


KINDS = {
    "float32": uniform,
    "float16": cast(np.float16),
    "bfloat16": cast(ml_dtypes.bfloat16),
    "float64": cast(np.float64),
    "heavy ties": lambda size: (np.round(uniform(size)[0] * 20) / 20, uniform(size)[1]),
    "two values": lambda size: ((uniform(size)[0] > 0.8).astype(np.float32), uniform(size)[1]),
    "all equal": lambda size: (np.full(size, 0.5, np.float32), uniform(size)[1]),
    "presorted": ascending,
    "reversed": lambda size: tuple(np.ascontiguousarray(array[::-1]) for array in ascending(size)),
    "crossing at every rank": crossing,
    "random walk around the target": walk,
    "sawtooth": sawtooth,
}
KINDS = {kind: lru_cache(1)(make) for kind, make in KINDS.items()}


@pytest.mark.parametrize("name", [OURS, "offramp, all sorted", READ, *PEERS[:4]])
@pytest.mark.parametrize("kind", KINDS)
def test_kinds(benchmark, size, require_memory, monkeypatch, kind, name):
    benchmark.group = f"threshold, {kind}, N=1e7"
    samples = size(10_000_000, 3000)
    require_memory(2 * BYTES_A_SAMPLE * samples)
    scores, correct = KINDS[kind](samples)
    if name == "offramp, all sorted":
        monkeypatch.setenv("OFFRAMP_CALIBRATION", "sort")
        name = OURS
    if scores.dtype == ml_dtypes.bfloat16 and name == READ:
        run = lambda: one_read(scores.view(np.uint16), correct)  # noqa: E731 - numpy is slow to compare bfloat16
    else:
        run = contender(name, scores, correct)
    if name != READ:
        assert run() == by_argsort(scores.astype(np.float64), correct, EPS)
    benchmark(run)


def stable_argsort(scores, correct):
    order = np.argsort(scores, kind="stable")
    return scores[order], correct[order]


def curve_by_argsort(scores, correct):
    order = np.argsort(scores)
    thresholds, starts = np.unique(scores[order], return_index=True)
    return thresholds, np.cumsum(correct[order][::-1])[::-1][starts]


def by_ours(scores, correct):
    curve = threshold_curve(scores, correct)
    return curve.thresholds, curve.correct


@pytest.mark.parametrize(
    ("function", "other"),
    [
        (sort_by_score, stable_argsort),
        (stable_argsort, None),
        (by_ours, curve_by_argsort),
        (curve_by_argsort, None),
    ],
    ids=["sort_by_score", "numpy stable argsort", "threshold_curve", "numpy argsort + unique + cumsum"],
)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_full_order(benchmark, size, require_memory, dtype, function, other):
    benchmark.group = f"full order, {dtype}, N=1e7"
    samples = size(10_000_000, 3000)
    require_memory(2 * BYTES_A_SAMPLE * samples)
    scores, correct = KINDS[dtype](samples)
    if other is not None:
        for ours, theirs in zip(function(scores, correct), other(scores, correct), strict=True):
            assert (ours == theirs).all()
    benchmark(lambda: function(scores, correct))
