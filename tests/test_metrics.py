"""Evaluation metrics against their definitions, written out, and against the libraries that have them."""

import math

import numpy as np
import pytest
from offramp import InputError
from offramp.evaluation.metrics import areas, interval, reliability
from sklearn.calibration import calibration_curve


def random_samples(seed, n=500, levels=None):
    random = np.random.default_rng(seed)
    scores = random.random(n).astype(np.float32)
    if levels:
        scores = np.round(scores * levels).astype(np.float32) / np.float32(levels)
    return scores, random.random(n) < 0.3 + 0.6 * scores


@pytest.mark.parametrize("levels", [None, 7, 1])
def test_areas_average_over_every_sample_as_threshold(levels):
    scores, correct = random_samples(1, levels=levels)
    risks = [1 - correct[scores >= tau].mean() for tau in scores]
    generalised = [(~correct[scores >= tau]).sum() / len(scores) for tau in scores]
    best = np.sort(correct)[::-1]
    optimal = np.mean([1 - best[: k + 1].mean() for k in range(len(best))])
    found = areas(scores, correct)
    assert found.aurc == pytest.approx(np.mean(risks))
    assert found.e_aurc == pytest.approx(np.mean(risks) - optimal)
    assert found.augrc == pytest.approx(np.mean(generalised))


def test_a_perfect_ranking_has_no_excess_area():
    scores = np.arange(100.0)
    assert areas(scores, scores >= 40).e_aurc == pytest.approx(0, abs=1e-12)
    assert areas(scores, scores < 40).e_aurc > 0.2
    assert areas(scores, np.ones(100, bool)).aurc == 0
    assert areas(scores, np.zeros(100, bool)) == areas(-scores, np.zeros(100, bool))
    assert areas(scores, np.zeros(100, bool)).e_aurc == pytest.approx(0)


def test_reliability_is_that_of_scikit_learn():
    scores, correct = random_samples(2, n=400)
    found = reliability(scores, correct, bins=10)
    accuracy, confidence = calibration_curve(correct, scores.astype(np.float64), n_bins=10)
    filled = found.count > 0
    np.testing.assert_allclose(found.accuracy[filled], accuracy)
    np.testing.assert_allclose(found.confidence[filled], confidence)
    assert found.count.sum() == 400


def test_calibration_error_by_hand():
    # Two bins of 15: (13/15, 14/15] holds .9, .9, .92; (1/15, 2/15] holds .1.
    found = reliability([0.9, 0.9, 0.92, 0.1], [1, 1, 0, 0])
    assert found.ece == pytest.approx((3 * abs(2.72 / 3 - 2 / 3) + abs(0.1 - 0)) / 4)
    assert found.count[13] == 3
    assert found.count[1] == 1
    assert math.isnan(found.accuracy[0])
    assert reliability([0.0, 1.0], [0, 1]).ece == 0
    assert reliability([0.0, 1.0], [0, 1]).count[[0, -1]].tolist() == [1, 1]
    # What lies on an edge belongs below it.
    assert reliability([1 / 3, 2 / 3], [1, 1], bins=3).count.tolist() == [1, 1, 0]


@pytest.mark.parametrize(
    ("confidence", "correct", "words"),
    [
        ([0.5, 1.2], [1, 0], "outside"),
        ([0.5, math.nan], [1, 0], "outside"),
        ([0.5], [1, 0], "shape"),
        ([], [], "shape"),
    ],
)
def test_what_is_no_probability_is_refused(confidence, correct, words):
    with pytest.raises(InputError, match=words):
        reliability(confidence, correct)


def test_intervals_draw_whole_groups():
    """Against scipy's bootstrap of the same ratio over groups."""
    from scipy.stats import bootstrap

    random = np.random.default_rng(3)
    sizes = random.integers(5, 40, 30)
    groups = np.repeat(np.arange(30), sizes)
    right = random.random(len(groups)) < random.beta(8, 2, 30)[groups]
    low, high = interval(groups, lambda picked: right[picked].mean(), resamples=4000)
    counts = np.array([right[groups == g].sum() for g in range(30)])
    theirs = bootstrap(
        (counts, sizes),
        lambda a, n, axis=-1: a.sum(axis) / n.sum(axis),
        paired=True,
        method="percentile",
        n_resamples=4000,
        rng=np.random.default_rng(0),
    ).confidence_interval
    assert low == pytest.approx(theirs.low, abs=0.01)
    assert high == pytest.approx(theirs.high, abs=0.01)
    # Drawing tokens instead of groups would give a much narrower interval.
    naive = 2 * 1.96 * math.sqrt(right.mean() * (1 - right.mean()) / len(right))
    assert high - low > 1.3 * naive


def test_intervals_of_arrays_and_of_nothing():
    groups = np.repeat(np.arange(5), 2)
    values = np.arange(10.0)
    bounds = interval(
        groups, lambda picked: np.array([values[picked].mean(), math.nan, len(picked)]), resamples=50
    )
    assert bounds.shape == (3, 2)
    assert bounds[0, 0] < values.mean() < bounds[0, 1]
    assert np.isnan(bounds[1]).all()
    assert bounds[2].tolist() == [10, 10]
    assert all(map(math.isnan, interval(np.zeros(4), lambda picked: 1.0, resamples=5)))
    spread = np.random.default_rng(0).random(100)
    same = [interval(np.arange(100), lambda picked: spread[picked].sum(), seed=seed) for seed in (1, 1, 2)]
    assert same[0] == same[1] != same[2]
