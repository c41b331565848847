"""The specification itself, against a definition in plain Python and exact fractions."""

from __future__ import annotations

import inspect
import math
from fractions import Fraction

import numpy as np
import offramp
import pytest
from offramp import reference


def lowest_threshold(scores, correct, eps):
    """By definition, in exact fractions."""
    for threshold in sorted(set(scores)):
        accepted = [flag for score, flag in zip(scores, correct, strict=True) if score >= threshold]
        if Fraction(sum(accepted), len(accepted)) >= eps:
            return threshold
    return math.inf


def first_index(scores, correct, eps):
    pairs = sorted(zip(scores, correct, strict=True), key=lambda pair: pair[0])
    for index, (score, _) in enumerate(pairs):
        rest = [flag for _, flag in pairs[index:]]
        if Fraction(sum(rest), len(rest)) >= eps:
            return score
    return math.inf


@pytest.mark.parametrize(("rule", "definition"), [("set", lowest_threshold), ("index", first_index)])
def test_small_cases_by_definition(rule, definition):
    # Dyadic targets are exact in float64, so fractions and float64 division agree on every comparison.
    rng = np.random.default_rng(11)
    for _ in range(3000):
        size = int(rng.integers(1, 9))
        scores = (rng.integers(-2, 3, size) / 2).tolist()
        correct = rng.integers(0, 2, size).tolist()
        eps = int(rng.integers(0, 17)) / 16
        assert reference.fast_calibrate(scores, correct, eps, rule=rule) == definition(
            scores, correct, Fraction(eps)
        )


def test_curve_by_definition():
    rng = np.random.default_rng(12)
    for _ in range(500):
        size = int(rng.integers(1, 12))
        scores, correct = (rng.integers(-2, 3, size) / 2).tolist(), rng.integers(0, 2, size).tolist()
        curve = reference.threshold_curve(scores, correct)
        assert curve.thresholds.tolist() == sorted(set(scores))
        for threshold, accepted, right in zip(curve.thresholds, curve.accepted, curve.correct, strict=True):
            kept = [flag for score, flag in zip(scores, correct, strict=True) if score >= threshold]
            assert (accepted, right) == (len(kept), sum(kept))


def test_sort_by_definition():
    scores, correct = [2.0, 1.0, 2.0, 1.0, -3.0], [0, 1, 1, 0, 1]
    ordered = reference.sort_by_score(scores, correct)
    assert [part.tolist() for part in ordered] == [[-3.0, 1.0, 1.0, 2.0, 2.0], [1, 1, 0, 0, 1]]


FUNCTIONS = (
    "calibrate_cascade",
    "certify",
    "decide",
    "fast_calibrate",
    "sort_by_score",
    "threshold_curve",
    "top2_margin",
)


def test_all_of_the_specification_is_public():
    assert set(reference.__all__) == {*FUNCTIONS, "Decision", "ThresholdCurve", "monitor"}
    assert reference.monitor.wealth([0], [0], [1], 0.5) == 1.0


@pytest.mark.parametrize("name", FUNCTIONS)
def test_signatures_match(name):
    ours, theirs = (inspect.signature(getattr(module, name)) for module in (offramp, reference))
    assert list(ours.parameters) == list(theirs.parameters)
    for mine, its in zip(ours.parameters.values(), theirs.parameters.values(), strict=True):
        assert (mine.kind, mine.default) == (its.kind, its.default)
