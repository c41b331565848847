"""Cascades: the same as the specification, what they promise, and the cheapest ones by trying all."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from generators import CORRECT, DTYPES, SCORES
from offramp import InputError, calibrate_cascade, fast_calibrate, reference
from scipy import stats


def assert_same(scores, correct, eps, **options):
    ours = calibrate_cascade(scores, correct, eps, **options)
    theirs = reference.calibrate_cascade(scores, correct, eps, **options)
    for name in ("thresholds", "accepted", "correct"):
        assert getattr(ours, name).tolist() == getattr(theirs, name).tolist(), (name, ours, theirs)
    for name in ("n", "found", "mode", "assumptions"):
        assert getattr(ours, name) == getattr(theirs, name)
    for name in ("accuracy", "expected_cost"):
        assert np.array_equal([getattr(ours, name)], [getattr(theirs, name)], equal_nan=True)
    return ours


def options(rng, heads, size):
    costs = np.sort(rng.random(heads + 1)) + 0.1
    groups = rng.integers(0, max(1, size // 5), size)
    yield {"mode": "marginal"}
    yield {"costs": costs}
    yield {"delta": 0.2, "seed": 4}
    yield {"delta": 0.2, "groups": groups}
    yield {"delta": 0.2, "groups": groups, "max_group_size": size + 3}
    yield {"mode": "budget", "costs": costs}
    yield {"mode": "budget", "costs": rng.permutation(costs), "budget": 0.05}
    if size < 50:
        yield {"mode": "budget", "costs": costs, "delta": 0.3, "budget": 0.3}
        certified = {"mode": "budget", "costs": costs, "delta": 0.3, "budget": 0.3, "groups": groups}
        yield certified
        yield certified | {"max_group_size": size + 3}


@pytest.mark.parametrize("dtype", DTYPES)
def test_agrees_with_the_reference(dtype):
    rng = np.random.default_rng([ord(letter) for letter in dtype])
    cases = found = 0
    for make_scores in SCORES.values():
        for make_correct in rng.permutation(list(CORRECT.values()))[:2]:
            heads, size = int(rng.integers(1, 5)), int(rng.choice([1, 2, 3, 17, 40, 80]))
            scores = np.ascontiguousarray(make_scores(rng, (heads, size), DTYPES[dtype]))
            correct = make_correct(rng, scores)
            for option in options(rng, heads, size):
                found += assert_same(scores, correct, float(rng.choice([0.3, 0.6, 0.9, 1.0])), **option).found
                cases += 1
    assert cases > 150
    assert found > 30


def heads_like(rng, heads, size, dtype=np.float32):
    """Deeper heads know more, and scores of one sample are alike."""
    hardness = rng.random(size)
    knows = np.linspace(0.35, 0.9, heads)[:, None]
    chance = np.clip(1 - hardness**3 * (1.4 - knows) - rng.random((heads, size)) * 0.1, 0, 1)
    return chance.astype(dtype), rng.random((heads, size)) < chance


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_agrees_with_the_reference_where_scores_are_counted_in_buckets(dtype):
    rng = np.random.default_rng(2)
    scores, correct = heads_like(rng, 3, 50_000, dtype)
    assert assert_same(scores, correct, 0.9).found
    assert assert_same(scores, correct, 0.9, delta=0.1).found
    grouped = {"delta": 0.1, "groups": np.arange(50_000) // 10}
    assert assert_same(scores, correct, 0.9, **grouped).found
    assert assert_same(scores, correct, 0.9, **grouped, max_group_size=20).found


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_budgets_agree_with_the_reference_where_samples_are_summed_in_stretches(dtype):
    scores, correct = heads_like(np.random.default_rng(3), 2, 10_000, dtype)
    costs = [1.0, 2.0, 4.0]
    assert assert_same(scores, correct, 0.9, mode="budget", costs=costs).found
    assert assert_same(scores, correct, 0.9, mode="budget", costs=[2.0, 1.0, 4.0], budget=0.05).found


@pytest.mark.parametrize("groups", [None, np.arange(1500) // 10])
def test_certified_budgets_agree_with_the_reference(groups):
    asked = {"mode": "budget", "costs": [1.0, 2.0, 4.0], "delta": 0.1, "groups": groups}
    for seed, (budget, places) in enumerate([(0.12, 9), (0.15, 9), (0.2, 2)]):
        scores, correct = heads_like(np.random.default_rng(seed), 2, 1500)
        scores = np.round(scores, places)
        assert assert_same(scores, correct, 0.9, budget=budget, **asked).found


def test_sequential_thresholds_hold_on_what_reaches_each_head():
    rng = np.random.default_rng(3)
    for _ in range(20):
        scores, correct = heads_like(rng, 4, 3000)
        for eps in (0.8, 0.9, 0.95):
            cascade = calibrate_cascade(scores, correct, eps)
            alive = np.ones(3000, bool)
            for head, tau in enumerate(cascade.thresholds):
                assert tau == fast_calibrate(scores[head, alive], correct[head, alive], eps)
                taken = alive & (scores[head] >= tau)
                assert (cascade.accepted[head], cascade.correct[head]) == (
                    taken.sum(),
                    correct[head][taken].sum(),
                )
                alive &= ~taken
            assert cascade.accuracy >= eps
            assert cascade.head_accuracy[np.isfinite(cascade.thresholds)].min() >= eps


def test_marginal_thresholds_are_the_papers():
    rng = np.random.default_rng(4)
    scores, correct = heads_like(rng, 3, 2000)
    cascade = calibrate_cascade(scores, correct, 0.9, mode="marginal")
    assert cascade.thresholds.tolist() == fast_calibrate(scores, correct, 0.9).tolist()
    # What the first head leaves is harder.
    assert cascade.head_accuracy[1:].min() < 0.9


def cheapest(scores, correct, costs, budget):
    """Every combination of thresholds."""
    heads, size = scores.shape
    best = math.inf
    for thresholds in itertools.product(*(np.append(np.unique(row), np.inf) for row in scores)):
        reached = scores >= np.array(thresholds)[:, None]
        leave = np.where(reached.any(axis=0), reached.argmax(axis=0), heads)
        right = np.vstack([correct, np.ones(size, bool)])[leave, np.arange(size)]
        if np.count_nonzero(~right) / size <= budget:
            best = min(best, float(np.bincount(leave, minlength=heads + 1) @ costs) / size)
    return best


def test_budgets_are_kept_and_spent_almost_as_well_as_can_be():
    rng = np.random.default_rng(5)
    optimal, gaps = 0, []
    for _ in range(100):
        heads, size = int(rng.integers(1, 4)), int(rng.integers(4, 13))
        scores, correct = heads_like(rng, heads, size)
        scores = np.round(scores, 2)
        costs = np.sort(rng.random(heads + 1)) + 0.2
        budget = float(rng.choice([0.0, 0.1, 0.25, 0.4]))
        cascade = calibrate_cascade(scores, correct, 1 - budget, mode="budget", costs=costs, budget=budget)
        wrong = cascade.accepted.sum() - cascade.correct.sum()
        assert wrong / size <= budget
        best = cheapest(scores, correct, costs, budget)
        assert cascade.expected_cost >= best - 1e-12
        optimal += cascade.expected_cost <= best + 1e-12
        gaps.append(cascade.expected_cost / best - 1)
    assert optimal >= 90
    assert np.mean(gaps) < 0.005


def test_a_budget_is_spent_better_than_a_rate():
    rng = np.random.default_rng(6)
    scores, correct = heads_like(rng, 4, 4000)
    costs = [1, 2, 3, 4, 6]
    by_rate = calibrate_cascade(scores, correct, 0.95, costs=costs)
    by_budget = calibrate_cascade(scores, correct, 0.95, mode="budget", costs=costs)
    assert by_budget.expected_cost < by_rate.expected_cost


RUNS, DELTA, EPS = 500, 0.1, 0.9
# Exceeded by chance once in ten thousand tests if the rate is delta, all but once in a hundred if it is twice that.
MOST = stats.binom.ppf(1 - 1e-4, RUNS, DELTA)
assert stats.binom.cdf(MOST, RUNS, 2 * DELTA) < 0.01
GROUPS, GROUP = 600, 8


def draw(rng, size, group=1):
    """Three heads; within a group samples are equally hard, and most labels come from one throw of the dice."""
    hardness = np.repeat(rng.random(size // group), group)
    scores = np.clip(
        1 - hardness**2 * np.array([[0.9], [0.7], [0.5]]) + 0.1 * rng.normal(size=(3, size)), 0, 1
    )
    chance = np.clip(1 - hardness**3 * np.array([[0.9], [0.75], [0.6]]), 0, 1)
    own = rng.random((3, size)) < 0.3
    dice = np.where(own, rng.random((3, size)), np.repeat(rng.random((3, size // group)), group, axis=1))
    return scores, dice < chance


def misses(find, *, group=1):
    """How often some head misses ε on a large sample of the same population."""
    rng = np.random.default_rng(7)
    scores, correct = draw(rng, 200_000)
    missed = found = 0
    for run in range(RUNS):
        cascade = find(*draw(rng, GROUPS * GROUP, group), run)
        found += cascade.found
        reached = scores >= cascade.thresholds[:, None]
        leave = np.where(reached.any(axis=0), reached.argmax(axis=0), 3)
        taken = np.bincount(leave, minlength=4)[:3]
        right = [np.count_nonzero(correct[head][leave == head]) for head in range(3)]
        missed += (np.array(right) < (EPS - 0.002) * taken).any()
    return missed, found


def test_certified_cascades_are_seldom_false():
    missed, found = misses(
        lambda *data: calibrate_cascade(*data[:2], EPS, delta=DELTA, seed=data[2], threads=1)
    )
    assert missed <= MOST
    assert found > 0.9 * RUNS


def test_certified_cascades_heed_groups():
    groups = np.repeat(np.arange(GROUPS), GROUP)

    def find(scores, correct, run):
        return calibrate_cascade(scores, correct, EPS, delta=DELTA, groups=groups, seed=run, threads=1)

    missed, found = misses(find, group=GROUP)
    assert missed <= MOST
    assert found > 0.9 * RUNS


@pytest.mark.parametrize("group", [1, GROUP])
@pytest.mark.parametrize("mode", ["marginal", "sequential"])
def test_the_harness_catches_thresholds_without_a_promise(mode, group):
    missed, _ = misses(
        lambda scores, correct, _: calibrate_cascade(scores, correct, EPS, mode=mode, threads=1),
        group=group,
    )
    assert missed > 3 * MOST


# One head whose accuracy falls quickly to the target and stays there: the last step of the path is mostly false.

SHARP_RUNS, HALF = 1000, 0.5
SHARP_MOST = stats.binom.ppf(1 - 1e-4, SHARP_RUNS, DELTA)


def sharp_misses(*, samples=3000, group=1, groups=None, delta=DELTA):
    rng = np.random.default_rng(8)
    missed = found = 0
    for run in range(SHARP_RUNS):
        scores = np.repeat(rng.random(samples // group), group)
        chance = np.where(scores > 0.7, 0.8, np.where(scores > 0.4, 0.2, HALF - 1e-4))
        correct = np.repeat(rng.random(samples // group), group) < chance
        cascade = calibrate_cascade(
            scores[None], correct[None], HALF, delta=delta, groups=groups, seed=run, threads=1
        )
        found += cascade.found
        missed += cascade.thresholds[0] < 0.4
    return missed, found


def test_the_harness_catches_three_times_the_delta():
    missed, found = sharp_misses()
    assert missed <= SHARP_MOST
    assert found > 0.8 * SHARP_RUNS
    assert sharp_misses(delta=3 * DELTA)[0] > SHARP_MOST


def test_the_harness_catches_groups_that_are_not_heeded():
    clustered = {"samples": 6 * 800, "group": 6}
    missed, found = sharp_misses(**clustered, groups=np.repeat(np.arange(800), 6))
    assert missed <= SHARP_MOST
    assert found > 0.7 * SHARP_RUNS
    assert sharp_misses(**clustered)[0] > SHARP_MOST


# Two heads with scores of their own, so that the share of wrong samples is known: a (1 - tau)^2 of what a head sees.

WORSE = np.array([0.25, 0.15])


def budget_misses(*, group=1, runs=RUNS, **options):
    rng = np.random.default_rng(9)
    broken = found = 0
    for run in range(runs):
        scores = np.repeat(rng.random((2, 500)), group, axis=1)
        dice = np.repeat(rng.random((2, 500)), group, axis=1)
        correct = dice >= 2 * WORSE[:, None] * (1 - scores)
        asked = {"mode": "budget", "costs": [1, 2, 4], "budget": 0.05, "seed": run, "threads": 1}
        first, second = calibrate_cascade(scores, correct, 0.9, **asked, **options).thresholds.clip(max=1)
        found += min(first, second) < 1
        broken += WORSE[0] * (1 - first) ** 2 + first * WORSE[1] * (1 - second) ** 2 > 0.05
    return broken, found


def test_certified_budgets_are_seldom_broken():
    broken, found = budget_misses(delta=DELTA)
    assert broken <= MOST
    assert found > 0.9 * RUNS


def test_certified_budgets_heed_groups():
    runs = 120
    most = stats.binom.ppf(1 - 1e-4, runs, DELTA)
    broken, found = budget_misses(delta=DELTA, group=8, runs=runs, groups=np.repeat(np.arange(500), 8))
    assert broken <= most
    assert found > 0.9 * runs
    assert budget_misses(delta=DELTA, group=8, runs=runs)[0] > most


@pytest.mark.parametrize("mode", ["sequential", "budget"])
def test_a_known_largest_group_costs_power_only(mode):
    rng = np.random.default_rng(11)
    scores = rng.random((1, 15_000))
    correct = rng.random(scores.shape) < 0.5 + 0.6 * scores
    asked = {"mode": mode, "costs": [1, 2], "delta": DELTA, "groups": np.repeat(np.arange(1500), 10)}
    known = (None, 10, 80, 10_000)
    found = [assert_same(scores, correct, 0.8, **asked, max_group_size=most) for most in known]
    taus = [float(cascade.thresholds[0]) for cascade in found]
    assert taus[0] == taus[1] < taus[2] < taus[3] == math.inf
    assert "no group can have more than 10 samples, the most one has here;" in found[0].assumptions
    assert "no group can have more than 10 samples;" in found[1].assumptions


def test_the_harness_catches_budgets_without_a_promise():
    assert budget_misses()[0] > 3 * MOST


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"mode": "best"}, "mode is 'best': choose 'sequential'"),
        ({"mode": "budget"}, "costs are needed"),
        ({"budget": 0.1}, "budget goes with mode 'budget'"),
        ({"mode": "budget", "costs": [1, 2, 3], "budget": 2.0}, "budget must lie in"),
        ({"costs": [1, 2]}, "give 3 numbers"),
        ({"costs": [1, -2, 3]}, "costs must be finite"),
        ({"groups": [1, 2, 3]}, "give delta as well"),
        ({"delta": 0.1, "mode": "marginal"}, "delta goes with mode"),
        ({"delta": 0.1, "groups": [1, 2]}, "groups has shape"),
        ({"max_group_size": 5}, "give delta and groups as well"),
        ({"groups": [1, 1, 3], "max_group_size": 5}, "give delta and groups as well"),
        ({"delta": 0.1, "max_group_size": 5}, "give delta and groups as well"),
        ({"delta": 0.1, "groups": [1, 1, 3], "max_group_size": 1}, "max_group_size is 1: .* of at least 2"),
        ({"delta": 0.1, "groups": [1, 1, 3], "max_group_size": 2.5}, "max_group_size is 2.5"),
        ({"eps": math.nan}, "eps must lie in"),
        ({"scores": [0.1, 0.2, 0.3], "correct": [1, 1, 0]}, r"give \(K, N\)"),
        ({"scores": [[0.1, 0.2, 0.3], [0.1, math.inf, 0.3]]}, r"scores\[1, 1\] is inf"),
        ({"correct": [[0, 0, 1], [0, 3, 1]]}, r"correct\[1, 1\] is 3"),
    ],
)
def test_refusals(option, message):
    arguments = {"scores": np.ones((2, 3)) / 2, "correct": np.ones((2, 3), int), "eps": 0.9} | option
    for function in (calibrate_cascade, reference.calibrate_cascade):
        with pytest.raises(InputError, match=message):
            function(**arguments)


def test_what_is_promised_of_each_threshold():
    scores, correct = heads_like(np.random.default_rng(9), 2, 2000)
    scores[1], correct[1] = 0.5, False
    plain = calibrate_cascade(scores, correct, 0.9, mode="marginal")
    assert plain.guarantees == ("no guarantee (marginal)", "never exits")
    certified = calibrate_cascade(scores, correct, 0.9, delta=0.1)
    assert certified.guarantees == ("at least 0.9, at confidence 0.9", "never exits")
    budget = calibrate_cascade(scores, correct, 0.9, delta=0.1, mode="budget", costs=[1, 2, 3])
    assert budget.guarantees[0] == "the budget, with all heads, at confidence 0.9"


def test_printed_as_a_table():
    cascade = calibrate_cascade(
        [[0.9, 0.8, 0.1], [0.9, 0.5, 0.1]], [[1, 0, 0], [1, 1, 0]], 0.9, costs=[1, 2, 4]
    )
    text = str(cascade)
    assert "mode sequential" in text
    assert "expected cost 2.33333" in text
    assert "nothing is promised" in text
    nothing = calibrate_cascade([[0.5]], [[0]], 0.9)
    assert not nothing.found
    assert "never" in str(nothing)
    assert math.isnan(nothing.accuracy)
