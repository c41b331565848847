"""The compiled core against the specification: equal, never close."""

from __future__ import annotations

import itertools

import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import numpy as np
import pytest
from generators import CORRECT, DTYPES, SCORES, targets
from hypothesis import given, settings
from offramp import fast_calibrate, reference, sort_by_score, threshold_curve

RULES = ("set", "index")


def assert_same_bytes(ours, theirs):
    assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
    assert ours.tobytes() == theirs.tobytes()


def assert_all_agree(scores, correct, eps):
    """One row: both rules, sorting, the curve and its answers."""
    for rule in RULES:
        assert_same_bytes(
            fast_calibrate(scores, correct, eps, rule=rule),
            reference.fast_calibrate(scores, correct, eps, rule=rule),
        )
    for ours, theirs in zip(
        sort_by_score(scores, correct), reference.sort_by_score(scores, correct), strict=True
    ):
        assert_same_bytes(ours, theirs)
    curve, expected = threshold_curve(scores, correct), reference.threshold_curve(scores, correct)
    for name in ("thresholds", "accepted", "correct", "coverage", "accuracy"):
        assert_same_bytes(getattr(curve, name), getattr(expected, name))
    assert curve.n == expected.n
    assert curve.aurc() == expected.aurc()
    at_set = fast_calibrate(scores, correct, eps)
    for answers in (curve.at(eps), curve.staircase().at(eps), expected.at(eps)):
        assert_same_bytes(answers, at_set)


def finite_or_zero(scores):
    with np.errstate(invalid="ignore"):  # ml_dtypes warns when it meets a signalling NaN
        return np.where(np.isfinite(scores), scores, 0)


@st.composite
def samples(draw):
    dtype = np.dtype(DTYPES[draw(st.sampled_from(sorted(DTYPES)))])
    size = draw(st.integers(1, 40))
    bits = hnp.arrays(f"u{dtype.itemsize}", size, elements=st.integers(0, 2 ** (8 * dtype.itemsize) - 1))
    few = hnp.arrays(np.int8, size, elements=st.integers(-2, 2)).map(lambda a: a.astype(dtype))
    scores = draw(st.one_of(few, bits.map(lambda a: finite_or_zero(a.view(dtype)))))
    correct = draw(hnp.arrays(bool, size))
    accepted = draw(st.integers(1, size))
    quotient = draw(st.integers(0, accepted)) / accepted
    eps = draw(st.lists(st.one_of(st.floats(0, 1), st.just(quotient)), min_size=1, max_size=4))
    return scores.astype(dtype), correct, eps


@given(samples())
@settings(max_examples=1500)
def test_any_samples(case):
    assert_all_agree(*case)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rule", RULES)
def test_bulk(dtype, rule):
    """Every kind of scores with every kind of correctness, rows of one size at a time."""
    rng = np.random.default_rng([ord(letter) for letter in dtype + rule])
    cases = 0
    for make_scores, make_correct in itertools.product(SCORES.values(), CORRECT.values()):
        for size, rows in ((1, 4), (2, 16), (int(rng.integers(3, 8)), 40), (int(rng.integers(8, 40)), 20)):
            scores = np.ascontiguousarray(make_scores(rng, (rows, size), DTYPES[dtype]))
            correct = make_correct(rng, scores)
            eps = targets(rng, size)
            ours = fast_calibrate(scores, correct, eps, rule=rule)
            assert_same_bytes(ours, reference.fast_calibrate(scores, correct, eps, rule=rule))
            cases += ours.size
    assert cases > 70_000


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", SCORES)
def test_sorting_and_curves_in_bulk(dtype, kind):
    rng = np.random.default_rng([ord(letter) for letter in dtype + kind])
    for make_correct in CORRECT.values():
        for size in (1, 2, 17, 255, 256, 257, int(rng.integers(300, 1000))):
            scores = np.ascontiguousarray(SCORES[kind](rng, (1, size), DTYPES[dtype]))
            correct = make_correct(rng, scores)[0]
            for ours, theirs in zip(
                sort_by_score(scores[0], correct), reference.sort_by_score(scores[0], correct), strict=True
            ):
                assert_same_bytes(ours, theirs)
        assert_all_agree(scores[0, :99], correct[:99], targets(rng, 99))


def by_numpy(scores, correct, eps, rule):
    """The usual code, sort and cumulative sum: a specification fast enough for large inputs."""
    order = np.argsort(scores, kind="stable")
    ordered = scores[order].astype(np.float64) + 0.0
    accepted = np.arange(len(order), 0, -1)
    accuracy = np.cumsum(correct[order][::-1], dtype=np.int64)[::-1] / accepted
    candidate = np.ones(len(order), bool)
    if rule == "set":
        candidate[1:] = ordered[1:] != ordered[:-1]
    passing = [np.flatnonzero(candidate & (accuracy >= target)) for target in eps]
    return np.array([ordered[found[0]] if len(found) else np.inf for found in passing])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", SCORES)
def test_large(dtype, kind):
    rng = np.random.default_rng([ord(letter) for letter in kind + dtype])
    for size, name in zip((30_000, 99_999, 300_000), rng.permutation(list(CORRECT))[:3], strict=True):
        scores = np.ascontiguousarray(SCORES[kind](rng, (1, size), DTYPES[dtype]))
        correct = CORRECT[name](rng, scores)[0]
        eps = targets(rng, size)
        curve = threshold_curve(scores[0], correct)
        for rule in RULES:
            expected = by_numpy(scores[0], correct, eps, rule)
            assert_same_bytes(fast_calibrate(scores[0], correct, eps, rule=rule), expected)
        expected = by_numpy(scores[0], correct, eps, "set")
        assert_same_bytes(curve.at(eps), expected)
        assert_same_bytes(curve.staircase().at(eps), expected)
