"""Certificates: exact tails, the same as the specification, and false no more often than they say."""

from __future__ import annotations

import math

import mpmath
import numpy as np
import pytest
from generators import CORRECT, DTYPES, SCORES
from offramp import InputError, _core, certify, decide, design, fast_calibrate, reference
from offramp.design import as_groups, lattice, lattice_starts
from offramp.reference.guarantee import is_evident
from scipy import stats

METHODS = ("e-process", "fixed-sequence", "bonferroni", "sgr")
RISKS = (1 - 0.5, 1 - 0.9, 1 - 0.95, 1 - 0.999, 1e-6, 0.97)


def exact_tail(errors, n, risk):
    """P(Bin(n, risk) <= errors) to 20 digits, as a sum from the largest term down, which is counted as 2 to the 128."""
    p, whole = risk.as_integer_ratio()
    upper = errors * whole >= n * p
    k = first = errors + 1 if upper else errors
    total = term = 1 << 128
    while 0 < k < n and term > total >> 67:
        if upper:
            term = term * ((n - k) * p) // ((k + 1) * (whole - p))
            k += 1
        else:
            term = term * (k * (whole - p)) // ((n - k + 1) * p)
            k -= 1
        total += term
    with mpmath.workdps(40):
        log_mass = (
            mpmath.loggamma(n + 1)
            - mpmath.loggamma(first + 1)
            - mpmath.loggamma(n - first + 1)
            + first * mpmath.log(mpmath.mpf(p) / whole)
            + (n - first) * mpmath.log(mpmath.mpf(whole - p) / whole)
        )
        tail = mpmath.exp(log_mass) * total / (1 << 128)
        return 1 - tail if upper else tail


def tail_cases():
    for n in (1, 2, 16, 50, 1000, 10_000):
        for risk in RISKS:
            middle, deviation = n * risk, math.sqrt(n * risk * (1 - risk))
            for z in (-3, -0.5, 0, 0.5, 1.645, 3, 8, 25):
                errors = int(middle - z * deviation)
                if 0 <= errors < n:
                    yield errors, n, risk
    for n in (10**7, 10**9):
        for risk in RISKS:
            # Where levels from 0.05 down to those of many starts decide, and far beyond.
            for z in (1.6, 1.645, 2, 2.5, 3, 3.5, 4, 8, 20, 30):
                errors = int(n * risk - z * math.sqrt(n * risk * (1 - risk)))
                if errors >= 0:
                    yield errors, n, risk


def tail_by_quadrature(errors, n, risk):
    """The same tail as the integral of a beta density, to 20 digits."""
    a, b = n - errors, errors + 1
    with mpmath.workdps(40):
        x = 1 - mpmath.mpf(risk)
        mode = mpmath.mpf(a - 1) / (n - 1)
        deviation = mpmath.sqrt(mode * (1 - mode) / n)
        log_mass = mpmath.loggamma(n + 1) - mpmath.loggamma(a) - mpmath.loggamma(b)

        def density(t):
            return mpmath.exp(log_mass + (a - 1) * mpmath.log(t) + (b - 1) * mpmath.log1p(-t))

        pieces = [x - step * deviation for step in range(16, -1, -2)]
        return mpmath.quad(density, [t for t in pieces if t > 0], maxdegree=8)


def test_the_exact_tail_is_mpmaths():
    for errors, n, risk in ((0, 9, 0.1), (3, 100, 0.05), (60, 300, 0.25), (200, 300, 0.5)):
        with mpmath.workdps(40):
            expected = mpmath.betainc(n - errors, errors + 1, 0, 1 - mpmath.mpf(risk), regularized=True)
        assert float(exact_tail(errors, n, risk) / expected - 1) == pytest.approx(0, abs=1e-20)
    for n in (10**7, 10**9):
        for risk, z in ((1 - 0.95, 1.645), (1 - 0.95, 4), (0.5, 2.5), (1 - 0.999, 3)):
            errors = int(n * risk - z * math.sqrt(n * risk * (1 - risk)))
            expected = tail_by_quadrature(errors, n, risk)
            assert float(exact_tail(errors, n, risk) / expected - 1) == pytest.approx(0, abs=1e-15)


def test_tails_are_exact_and_rounded_up():
    cases = list(tail_cases())
    assert len(cases) > 220
    for errors, n, risk in cases:
        found, exact = _core.binomial_p_value(errors, n, risk), exact_tail(errors, n, risk)
        assert found <= 1.0
        if exact < 1e-280:
            assert exact <= found <= 1e-279
        else:
            assert exact <= found or exact > 1 - 1e-9
            assert found <= exact * (1 + mpmath.mpf("1.01e-9")), (errors, n, risk)


def test_tails_against_scipy():
    rng = np.random.default_rng(1)
    n = (10 ** rng.uniform(0, 9, 3000)).astype(np.int64)
    risk = rng.choice(RISKS, 3000)
    z = rng.normal(size=3000) * 3
    errors = np.clip(n * risk + z * np.sqrt(n * risk * (1 - risk)), 0, n).astype(np.int64)
    expected = stats.binom.cdf(errors, n, risk)
    found = np.array(
        [_core.binomial_p_value(*case) for case in zip(errors.tolist(), n.tolist(), risk, strict=True)]
    )
    likely = expected > 1e-200
    assert likely.mean() > 0.95
    # At a risk of 1e-6 scipy itself is off by up to 5e-9; the sums above say so.
    np.testing.assert_allclose(found[likely], np.minimum(expected * (1 + 1e-9), 1)[likely], rtol=1e-8)
    plain = likely & (risk > 1e-4)
    np.testing.assert_allclose(found[plain], np.minimum(expected * (1 + 1e-9), 1)[plain], rtol=3e-10)


@pytest.mark.parametrize(("errors", "n", "risk", "p"), [(0, 0, 0.1, 1.0), (5, 5, 0.1, 1.0), (0, 5, 0.0, 1.0)])
def test_tails_at_the_ends(errors, n, risk, p):
    assert _core.binomial_p_value(errors, n, risk) == p


def test_upper_bounds_refute_and_barely():
    rng = np.random.default_rng(2)
    for _ in range(400):
        n = int(10 ** rng.uniform(0, 9))
        errors = int(rng.choice([0, 1, n // 1000, n // 20, n // 2, n - 1, n]))
        errors = min(max(errors, 0), n)
        delta = float(rng.choice([0.05, 1e-3, 1e-9, 0.5]))
        bound = _core.binomial_upper_bound(errors, n, delta)
        if errors == n:
            assert bound == 1.0
            continue
        assert _core.binomial_p_value(errors, n, bound) <= delta
        assert _core.binomial_p_value(errors, n, bound * (1 - 1e-8)) > delta
        assert bound == pytest.approx(stats.beta.ppf(1 - delta, errors + 1, n - errors), rel=1e-7)


@pytest.mark.parametrize("n", [1, 30, 1000, 10**7, 10**9])
@pytest.mark.parametrize("delta", [0.05, 1e-4])
def test_upper_bounds_are_mpmaths(n, delta):
    """By Clopper and Pearson: as few errors have probability delta, to what rounding to the safe side may cost."""
    for errors in {0, 1, n // 1000, n // 20, n // 2, n - 1} - {n}:
        bound = _core.binomial_upper_bound(errors, n, delta)
        assert exact_tail(errors, n, bound) <= delta < exact_tail(errors, n, bound * (1 - 1e-8))
        if n <= 1000:
            with mpmath.workdps(30):
                root = mpmath.findroot(
                    lambda risk, errors=errors: (
                        mpmath.betainc(n - errors, errors + 1, 0, 1 - risk, regularized=True) - delta
                    ),
                    (bound * (1 - 1e-6), min(bound * (1 + 1e-6), 1 - 1e-15)),
                    solver="anderson",
                )
            assert float(root) <= bound <= float(root) * (1 + 1e-8)


def log_evidence(errors, n, alpha):
    """By the formula, with integrals to 30 digits."""
    with mpmath.workdps(50):
        x = mpmath.mpf(alpha)
        b = (1 - x) / x
        p, q = 1 + errors, b + n - errors
        # The incomplete beta function as its hypergeometric series.
        total = term = mpmath.mpf(1)
        j = 0
        while term > total * mpmath.mpf(10) ** -25 or j < 100:
            term *= (p + q + j) / (p + 1 + j) * x
            total += term
            j += 1
        numerator = p * mpmath.log(x) + q * mpmath.log1p(-x) - mpmath.log(p) + mpmath.log(total)
        denominator = mpmath.log((1 - (1 - x) ** b) / b)
        return numerator - denominator - errors * mpmath.log(x) - (n - errors) * mpmath.log1p(-x)


def test_the_series_is_the_beta_integral():
    for errors, n, alpha in ((0, 10, 0.1), (3, 100, 0.05), (40, 300, 0.2)):
        with mpmath.workdps(30):
            b = (1 - mpmath.mpf(alpha)) / alpha
            log_wealth = (
                mpmath.log(mpmath.betainc(1 + errors, b + n - errors, 0, alpha))
                - mpmath.log(mpmath.betainc(1, b, 0, alpha))
                - errors * mpmath.log(alpha)
                - (n - errors) * mpmath.log1p(-mpmath.mpf(alpha))
            )
        assert float(log_evidence(errors, n, alpha)) == pytest.approx(float(log_wealth), rel=1e-9)


@pytest.mark.parametrize("alpha", [0.5, 1 - 0.95, 1 - 0.999, 0.9])
@pytest.mark.parametrize("n", [1, 30, 1000, 10**5])
def test_evidence_flips_where_it_should(n, alpha):
    for delta in (0.05, 1e-6):
        low, high = -1, int(alpha * n) + 1
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if _core.evidence_suffices(middle, n, alpha, delta) else (low, middle)
        if low >= 0:
            assert log_evidence(low, n, alpha) >= -math.log(delta)
            assert is_evident(low, n, alpha, delta)
        if high < alpha * n:
            assert log_evidence(high, n, alpha) < -math.log(delta) + 2e-9
            assert not is_evident(high, n, alpha, delta)


def test_evidence_at_a_billion():
    n, alpha = 10**9, 1 - 0.95
    deviation = math.sqrt(n * alpha * (1 - alpha))
    verdicts = [
        _core.evidence_suffices(int(n * alpha - z * deviation), n, alpha, 0.05) for z in (0, 2, 3, 6, 300)
    ]
    assert verdicts == [False, False, False, True, True]
    assert not _core.evidence_suffices(n, n, alpha, 0.05)
    assert not _core.evidence_suffices(0, 0, alpha, 0.05)


# The same as the specification.


def assert_same(scores, correct, eps, **options):
    ours, theirs = (
        certify(scores, correct, eps, **options),
        reference.certify(scores, correct, eps, **options),
    )
    for name in ("tau", "accepted", "correct", "found", "n", "method", "assumptions"):
        assert getattr(ours, name) == getattr(theirs, name), (name, ours, theirs)
    assert ours.bound == pytest.approx(theirs.bound, rel=1e-8, nan_ok=True)
    return ours.found


def options(rng, size):
    groups = rng.integers(0, max(1, size // 5), size)
    grid = np.sort(rng.normal(size=9))
    yield from ({"method": method} for method in METHODS)
    yield {"grid": grid}
    yield {"method": "fixed-sequence", "grid": grid}
    yield {"population": True, "seed": 3}
    yield {"groups": groups, "group_method": "one-per-group", "seed": 5}
    yield {"groups": groups, "grid": grid}
    if size > 3:
        yield {"method": "bonferroni", "grid": [1, size // 3 + 1]}


def within_unit(scores):
    return bool((scores.astype(np.float64) >= 0).all() and (scores.astype(np.float64) <= 1).all())


@pytest.mark.parametrize("dtype", DTYPES)
def test_agrees_with_the_reference(dtype):
    rng = np.random.default_rng([ord(letter) for letter in dtype])
    found = cases = 0
    for make_scores in SCORES.values():
        for make_correct in CORRECT.values():
            size = int(rng.choice([1, 2, 3, 17, 200, 700]))
            scores = np.ascontiguousarray(make_scores(rng, (1, size), DTYPES[dtype]))
            correct = make_correct(rng, scores)[0]
            for option in options(rng, size):
                if (
                    option.get("method") == "fixed-sequence"
                    and "grid" not in option
                    and not within_unit(scores)
                ):
                    with pytest.raises(InputError, match="grid="):
                        certify(scores[0], correct, 0.7, **option)
                    continue
                eps = float(rng.choice([0.0, 0.3, 0.5, 0.7, 0.9, 1.0]))
                found += assert_same(scores[0], correct, eps, delta=float(rng.choice([0.05, 0.3])), **option)
                cases += 1
    assert cases > 700
    assert found > 100


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["uniform", "near one", "normal", "heavy ties", "any bits"])
def test_agrees_with_the_reference_where_scores_are_counted_in_buckets(dtype, kind):
    rng = np.random.default_rng([ord(letter) for letter in dtype + kind])
    scores = np.ascontiguousarray(SCORES[kind](rng, (1, 70_000), DTYPES[dtype]))
    for correct in (CORRECT["calibrated"](rng, scores)[0], CORRECT["at target"](rng, scores)[0]):
        for option in options(rng, 70_000):
            if option.get("method") == "fixed-sequence" and "grid" not in option and not within_unit(scores):
                continue
            if "groups" not in option:
                assert_same(scores[0], correct, float(rng.choice([0.6, 0.74, 0.9])), **option)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("kind", ["smooth", "flat at the target", "tied"])
def test_evidence_agrees_with_the_reference_where_few_buckets_are_searched(kind, dtype):
    rng = np.random.default_rng([ord(letter) for letter in dtype + kind])
    size = (1 << 18) + 40_001
    scores = rng.random(size).astype(dtype)
    if kind == "tied":
        scores = np.round(scores, 3)
    chance = np.full(size, 0.9) if kind == "flat at the target" else 0.7 + 0.3 * scores
    for target in (0.9, 0.8999) if kind == "flat at the target" else (0.8, 0.9, 0.97):
        correct = rng.random(size) < chance
        found = assert_same(scores, correct, target)
        assert found or kind == "flat at the target"


def test_bets_agree_on_the_lattice():
    rng = np.random.default_rng(8)
    groups = np.repeat(rng.permutation(300), 40)
    scores = rng.random(len(groups)).astype(np.float32)
    correct = rng.random(len(groups)) < 0.5 + scores / 2
    assert assert_same(scores, correct, 0.7, groups=groups)
    assert assert_same(scores, correct, 0.7, groups=groups, max_group_size=60)
    assert assert_same(scores, correct, 0.7, groups=groups.astype("U5"), method="fixed-sequence")


def test_bets_agree_on_many_samples_in_any_order():
    rng = np.random.default_rng(9)
    groups = rng.integers(0, 300, 140_000)
    scores = rng.random(len(groups)).astype(np.float32)
    correct = rng.random(len(groups)) < 0.5 + scores / 2
    assert assert_same(scores, correct, 0.85, groups=groups)
    assert assert_same(scores, correct, 0.8, groups=groups, grid=rng.random(30))


# How often they are false.

SIZE, RUNS, DELTA = 600, 2000, 0.1
# Exceeded by chance once in ten thousand tests if the rate is delta, always if it is twice that.
MOST = stats.binom.ppf(1 - 1e-4, RUNS, DELTA)
assert stats.binom.cdf(MOST, RUNS, 2 * DELTA) < 1e-10
FINE = (np.arange(20_000) + 0.5) / 20_000
TARGET = 0.9
RIGHT = {
    "smooth": lambda score: 0.5 + 0.5 * score,
    "flat at the target": lambda score: np.full_like(score, TARGET - 0.0005),
    "overconfident top": lambda score: np.where(score > 0.98, 0.6, np.where(score > 0.5, 0.99, 0.8)),
    "sawtooth": lambda score: np.where((score * 12) % 1 < 0.5, 0.83, 0.96),
}


def false_share(right, seed, *, size=SIZE, runs=RUNS, find=None, **options):
    """How often the threshold found misses the target where the truth is known, and how often there is one."""
    rng = np.random.default_rng(seed)
    accuracy = right(FINE)[::-1].cumsum()[::-1] / np.arange(len(FINE), 0, -1)
    found = []
    for run in range(runs):
        scores = rng.random(size)
        correct = rng.random(size) < right(scores)
        if find is None:
            tau = certify(scores, correct, TARGET, seed=run, threads=1, **options).tau
        else:
            tau = find(scores, correct)
        found.append(tau)
    finite = np.array([tau for tau in found if tau <= FINE[-1]])
    return int((accuracy[np.searchsorted(FINE, finite)] < TARGET).sum()), len(finite)


@pytest.mark.parametrize("method", ["e-process", "fixed-sequence", "bonferroni", "sgr", "population"])
@pytest.mark.parametrize("kind", RIGHT)
def test_certificates_are_seldom_false(kind, method):
    """Of sgr nothing is proven for the last two, where risk falls with coverage in places; it holds all the same."""
    options = {"population": True} if method == "population" else {"method": method}
    misses, found = false_share(RIGHT[kind], 21, delta=DELTA, **options)
    assert misses <= MOST
    if kind == "smooth":
        assert found > 0.1 * RUNS
    if kind == "overconfident top":
        assert found > 0.95 * RUNS


# One threshold for each that has a share of delta for every threshold, so that it may be false as often as delta.
SHARP = {
    "e-process": {},
    "population": {"population": True},
    "fixed-sequence": {"method": "fixed-sequence", "grid": [0.0]},
    "bonferroni": {"method": "bonferroni", "grid": [SIZE - 1]},
}


@pytest.mark.parametrize("method", SHARP)
def test_the_harness_catches_twice_the_delta(method):
    flat = RIGHT["flat at the target"]
    assert false_share(flat, 21, delta=DELTA, **SHARP[method])[0] <= MOST
    assert false_share(flat, 21, delta=2 * DELTA, **SHARP[method])[0] > MOST


@pytest.mark.parametrize("kind", RIGHT)
def test_the_harness_catches_the_naive_threshold(kind):
    misses, _ = false_share(
        RIGHT[kind], 21, find=lambda scores, correct: fast_calibrate(scores, correct, TARGET)
    )
    assert misses > 1.5 * MOST


def test_the_harness_catches_a_pointwise_test():
    """Taking the best of many exact tests, each at the full delta, is false too often where risk is flat."""

    def find(scores, correct):
        order = np.argsort(-scores)
        errors = np.cumsum(~correct[order])
        passes = stats.binom.cdf(errors, np.arange(1, SIZE + 1), 1 - TARGET) <= DELTA
        return scores[order[np.flatnonzero(passes)[-1]]] if passes.any() else math.inf

    assert false_share(RIGHT["flat at the target"], 22, find=find)[0] > MOST


def test_the_harness_catches_bisection_at_the_full_delta():
    steps = math.ceil(math.log2(SIZE))
    misses, _ = false_share(RIGHT["flat at the target"], 22, method="sgr", delta=min(steps * DELTA, 1 - 1e-9))
    assert misses > MOST


@pytest.mark.parametrize("start", [1.0, 1 - 2**-12, 1 - 2**-8, 1 - 2**-6])
def test_a_single_start_dies_in_an_overconfident_top(start, monkeypatch):
    monkeypatch.setattr(design, "lattice_starts", lambda grid: (int(np.searchsorted(grid, start)),))
    _, found = false_share(RIGHT["overconfident top"], 21, runs=200, method="fixed-sequence", delta=DELTA)
    assert found == 0


def test_bisection_loses_what_lies_beyond_a_dip():
    """Upper half at 85%, lower half all right: 92.5% of everything, which sgr, failing at the half, never tries."""

    def dip(score):
        return np.where(score > 0.5, 0.85, 1.0)

    assert false_share(dip, 23, size=3000, runs=200, method="sgr")[1] < 10
    assert false_share(dip, 23, size=3000, runs=200, method="e-process")[1] > 180


GROUP, GROUPS = 20, 300


def clustered_share(**options):
    """Groups right or wrong nearly together: 12% of each group's samples are wrong on average, all scores alike."""
    rng = np.random.default_rng(23)
    groups = np.repeat(np.arange(GROUPS), GROUP)
    options = {"groups": groups, "threads": 1} | options
    misses = 0
    for run in range(RUNS):
        risk = np.repeat(rng.beta(0.12, 0.88, GROUPS), GROUP)
        scores = rng.random(len(groups))
        correct = rng.random(len(groups)) >= risk
        misses += certify(scores, correct, 0.8801, seed=run, **({"delta": DELTA} | options)).found
    return misses


@pytest.mark.parametrize(
    "options",
    [
        {"method": "fixed-sequence"},
        *({"group_method": "one-per-group", "method": method} for method in METHODS),
        {"group_method": "one-per-group", "population": True},
    ],
)
def test_groups_are_heeded(options):
    assert clustered_share(**options) <= MOST


@pytest.mark.parametrize(
    "options",
    [
        {"grid": [0.0]},
        {"group_method": "one-per-group"},
        {"group_method": "one-per-group", "method": "fixed-sequence", "grid": [0.0]},
        {"group_method": "one-per-group", "method": "bonferroni", "grid": [GROUPS - 1]},
    ],
)
def test_the_harness_catches_twice_the_delta_in_groups(options):
    assert clustered_share(**options) <= MOST
    assert clustered_share(delta=2 * DELTA, **options) > MOST


@pytest.mark.parametrize("method", METHODS)
def test_the_harness_catches_independence_where_there_is_none(method):
    assert clustered_share(groups=None, method=method) > 1.2 * MOST


LARGEST = 200


def unseen_share(**options):
    """One group in 1,700 has 200 samples, all wrong; all others have one, which is right: a risk of 10.5%."""
    rng = np.random.default_rng(24)
    misses = 0
    for _ in range(RUNS):
        is_large = rng.random(300) < 0.1 / (0.9 * LARGEST) * 1.05
        sizes = np.where(is_large, LARGEST, 1)
        misses += certify(
            rng.random(sizes.sum()),
            np.repeat(~is_large, sizes),
            TARGET,
            delta=DELTA,
            groups=np.repeat(np.arange(300), sizes),
            grid=[0.0],
            threads=1,
            **options,
        ).found
    return misses


def test_the_largest_group_has_to_be_known_where_larger_ones_are_worse():
    assert unseen_share() > 5 * MOST
    assert unseen_share(max_group_size=LARGEST) <= MOST


def test_a_known_largest_group_costs_power_only():
    rng = np.random.default_rng(25)
    groups = np.repeat(np.arange(1500), 10)
    scores = rng.random(len(groups))
    correct = rng.random(len(groups)) < 0.7 + 0.3 * scores
    found = [
        certify(scores, correct, 0.9, groups=groups, max_group_size=most) for most in (None, 10, 30, 100)
    ]
    assert found[0].tau == found[1].tau < found[2].tau < found[3].tau
    assert "no group can have more than 10 samples, the most one has here;" in found[0].assumptions
    assert "no group can have more than 10 samples;" in found[1].assumptions


def test_bets_certify_what_is_plain():
    rng = np.random.default_rng(24)
    groups = np.repeat(np.arange(2000), 10)
    scores = rng.random(len(groups))
    correct = rng.random(len(groups)) < 0.5 + 0.5 * scores
    found = certify(scores, correct, 0.8, groups=groups)
    assert found.found
    assert 0.2 < found.tau < 0.4
    assert found.bound == 0.8
    assert "10 samples" in found.assumptions
    assert found.method == "betting"
    assert "Method betting, 20000 samples." in str(found)
    assert certify(scores, correct, 0.8, groups=groups, method="fixed-sequence") == found


@pytest.mark.parametrize("method", METHODS)
def test_certificates_name_the_test_that_was_made(method):
    rng = np.random.default_rng(26)
    scores, groups = rng.random(500), np.repeat(np.arange(100), 5)
    correct = rng.random(500) < scores
    assert certify(scores, correct, 0.8, method=method).method == method
    drawn = certify(scores, correct, 0.8, method=method, groups=groups, group_method="one-per-group")
    assert drawn.method == method
    assert "one sample of each was drawn" in drawn.assumptions
    assert "Samples are independent" not in drawn.assumptions


def test_the_population_of_groups_is_named():
    rng = np.random.default_rng(27)
    found = certify(
        rng.random(5000),
        np.ones(5000, bool),
        0.8,
        groups=np.arange(5000) // 10,
        group_method="one-per-group",
        population=True,
    )
    assert found.found
    assert found.n < 500
    assert "the risk is that of a random sample of a random group" in found.assumptions
    assert "for the risk of the population" in found.assumptions
    assert "Samples are independent" not in found.assumptions


# What others get wrong.


def test_empty_thresholds_do_not_spoil_the_rest():
    """MAPIE 1.6.0: one empty grid point gives p = NaN, and nothing is returned; scores capped at .95 trigger it."""
    rng = np.random.default_rng(31)
    scores = np.minimum(rng.random(20_000), 0.95)
    correct = rng.random(20_000) < 0.6 + 0.4 * scores
    for method in METHODS:
        found = certify(scores, correct, 0.9, method=method)
        assert found.found, method
        assert found.bound >= 0.9
        assert 0.5 < found.tau <= 0.95


def test_errors_are_counted_not_rebuilt():
    """SGR's own code: int(m * rate) loses the one error among 49; others ceil a float rate and gain one."""
    assert int(49 * (1 / 49)) == 0
    scores, correct = np.arange(98.0), np.ones(98, bool)
    correct[49] = False
    found = certify(scores, correct, 0.8, method="sgr")
    assert found.accepted - found.correct == 1
    steps = math.ceil(math.log2(98))
    assert 1 - found.bound == pytest.approx(stats.beta.ppf(1 - 0.05 / steps, 2, found.accepted - 1), rel=1e-7)


def test_calibration_and_decision_compare_alike():
    """BranchyLLM: calibrates with <=, decides with <; and without a qualifying threshold tokens still exit."""
    tau = fast_calibrate([0.2, 0.5, 0.5], [0, 1, 1], 0.9)
    assert tau == 0.5
    logits = np.log(np.array([0.75, 0.25], np.float32))
    margin = float(decide(logits, 0.0).margin)
    assert decide(logits, margin).exit
    assert not decide(logits, np.nextafter(margin, 1)).exit
    assert not decide(np.array([100.0, 0.0], np.float32), fast_calibrate([0.9], [0], 0.5)).exit
    nothing = certify(np.linspace(0, 1, 100), np.zeros(100, int), 0.5)
    assert (nothing.found, nothing.tau, nothing.accepted) == (False, math.inf, 0)
    assert math.isnan(nothing.bound)


def test_no_index_runs_past_the_thresholds():
    """sklearn's precision_recall_curve appends a precision of 1 without a threshold: argmax can land there."""
    assert fast_calibrate([0.1, 0.2, 0.3], [1, 1, 0], 1.0) == math.inf
    assert not certify([0.1, 0.2, 0.3], [1, 1, 0], 1.0).found


def test_a_wrong_top_does_not_hide_full_coverage():
    """torch-uncertainty's CovAtxRisk: of 100 samples only the top one wrong; risk .05 allows full coverage."""
    scores = np.linspace(0, 1, 100)
    assert fast_calibrate(scores, np.arange(100) != 99, 0.95) == 0.0
    scores = np.linspace(0, 1, 3000)
    correct = np.arange(3000) < 2990
    for method in METHODS:
        found = certify(scores, correct, 0.95, method=method)
        assert found.coverage > 0.9, method


# Arguments.


def test_walks_start_within_the_lattice():
    grid = lattice()
    assert (np.diff(grid) > 0).all()
    assert [grid[place] for place in lattice_starts(grid)][:2] == [1.0, 1 - 2**-12]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"method": "holm"}, "method is 'holm': choose 'e-process'"),
        ({"group_method": "mean"}, "group_method is 'mean'"),
        ({"delta": 0.0}, "delta is 0.0"),
        ({"delta": True}, "delta is True"),
        ({"eps": [0.5, 0.6]}, "eps has shape"),
        ({"eps": 1.5}, "eps must lie in"),
        ({"groups": [1, 2]}, "groups has shape"),
        ({"groups": [1, 2, 3], "method": "sgr"}, "use 'one-per-group'"),
        ({"groups": [1, 2, 3], "population": True}, "population does not go with"),
        ({"groups": [1, 1, 3], "max_group_size": 1}, "max_group_size is 1: .* of at least 2"),
        ({"groups": [1, 1, 3], "max_group_size": 2.5}, "max_group_size is 2.5"),
        ({"groups": [1, 1, 3], "max_group_size": 1 << 32}, "max_group_size is 4294967296"),
        ({"max_group_size": 5}, "give groups as well"),
        (
            {"groups": [1, 2, 3], "group_method": "one-per-group", "max_group_size": 5},
            "max_group_size is for bets",
        ),
        ({"method": "sgr", "population": True}, "population goes with method 'e-process'"),
        ({"method": "sgr", "grid": [0.5]}, "grid does not go with method 'sgr'"),
        ({"method": "bonferroni", "grid": [3]}, "whole numbers from 1 to 2"),
        ({"grid": [math.nan]}, "grid must hold thresholds"),
        ({"seed": -1}, "seed is -1"),
        ({"threads": 0}, "threads must be at least 1"),
        ({"scores": [0.1, math.nan, 0.2]}, r"scores\[1\] is nan"),
        ({"correct": [0, 1, 2]}, r"correct\[2\] is 2"),
    ],
)
def test_refusals(option, message):
    arguments = {"scores": [0.1, 0.2, 0.3], "correct": [0, 1, 1], "eps": 0.5} | option
    for function in (certify, reference.certify):
        with pytest.raises(InputError, match=message):
            function(**arguments)


def test_certificates_say_what_they_are():
    assert "No threshold is certified for accuracy 0.9 at confidence 0.95" in str(certify([0.5], [1], 0.9))
    found = certify(np.linspace(0, 1, 1000), np.ones(1000, bool), 0.9)
    assert str(found).startswith("At confidence 0.95 accuracy is at least 0.9 where score >= 0")
    assert found.coverage == found.accuracy == 1.0


def test_the_largest_group_bounds_every_bet():
    groups = as_groups(np.array([3, 3, 3, 8, 3]), 5)
    assert (groups.of.tolist(), groups.number, groups.most) == ([0, 0, 0, 1, 0], 2, 4)
