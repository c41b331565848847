"""The alarm for deployment: its bets by definition, false alarms, drift noticed, and what it does then."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from offramp import AgreementError, InputError, Monitor
from offramp.monitor import _RATES, Bets
from offramp.reference import monitor as reference
from scipy import stats

EPS, DELTA = 0.9, 0.1
ROWS, MOST = 250, 6


def sequences(rng, agreement, count=ROWS, *, spread=3.0):
    """Checked tokens, wrong ones and how many there could have been; sequences differ, by ``spread``, in difficulty."""
    risk = rng.beta((1 - agreement) * spread, agreement * spread, count)
    checked = rng.binomial(MOST, 0.4, count)
    return checked, rng.binomial(checked, risk), np.full(count, MOST)


def feed(monitor, rows):
    checked, wrong, most = rows
    monitor.update(checked[:, None], wrong[:, None], most=most)


def quiet_monitor(**options):
    return Monitor((4,), EPS, **({"delta": DELTA} | options))


# Their definition.


@pytest.mark.parametrize("seed", range(4))
def test_bets_are_what_they_are_defined_to_be(seed):
    rng = np.random.default_rng(seed)
    checked, hits, most = sequences(rng, (0.2, 0.5, 0.9, 0.97)[seed], 40)
    rates = np.array([0.005, 0.1, 0.37, 0.995])
    bets = Bets(rates)
    for done in range(40):
        bets.add(int(hits[done]), int(checked[done]), int(most[done]))
        if done % 13 == 12:
            rows = [part[: done + 1].tolist() for part in (hits, checked, most)]
            expected = [reference.wealth(*rows, float(rate)) for rate in rates]
            np.testing.assert_allclose(bets.wealth, expected, rtol=1e-10)


@pytest.mark.parametrize("agreement", [0.3, 0.8, 0.95])
def test_bounds_are_what_they_are_defined_to_be(agreement):
    rows = sequences(np.random.default_rng(5), agreement, 60)
    monitor = quiet_monitor(on_alarm="warn")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        feed(monitor, rows)
    checked, wrong, most = (part.tolist() for part in rows)
    agreed = [n - e for n, e in zip(checked, wrong, strict=True)]
    head = monitor.heads[0]
    assert head.lower == reference.lower_bound(agreed, checked, most, DELTA / 2)
    assert head.upper == pytest.approx(1 - reference.lower_bound(wrong, checked, most, DELTA / 2))
    assert head.wealth == pytest.approx(reference.wealth(wrong, checked, most, 1 - EPS))
    assert head.lower < agreement < head.upper
    assert (head.checked, head.agreed) == (sum(checked), sum(agreed))


def test_an_alarm_is_an_upper_bound_below_the_promise():
    rng = np.random.default_rng(6)
    monitor = quiet_monitor()
    seen = set()
    for _ in range(200):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            feed(monitor, sequences(rng, 0.82, 1))
        if monitor.heads[0].alarm:
            assert monitor.heads[0].upper <= EPS
            break
        assert monitor.heads[0].upper > EPS
        seen.add(monitor.heads[0].upper)
    assert monitor.heads[0].alarm
    assert len(seen) > 5


# False alarms, and bounds that miss.

RUNS = 150
ALLOWED = stats.binom.ppf(1 - 1e-4, RUNS, DELTA)


def ever(verdict, agreement, runs=RUNS, *, spread=3.0, seed=7):
    """In how many runs a verdict is given at some time, looked at after every sequence."""
    rng = np.random.default_rng(seed)
    return sum(verdict(*sequences(rng, agreement, spread=spread)) for _ in range(runs))


def alarm_of_bets(checked, wrong, most):
    bets = Bets(np.array([1 - EPS]))
    for row in zip(wrong.tolist(), checked.tolist(), most.tolist(), strict=True):
        bets.add(*row)
        if bets.refuted(DELTA)[0]:
            return True
    return False


@pytest.mark.parametrize("spread", [0.3, 1000.0])
def test_false_alarms_are_seldom_however_often_one_looks(spread):
    """At exactly the promise, with sequences of one difficulty or of very different ones."""
    assert ever(alarm_of_bets, EPS, spread=spread) <= ALLOWED


def test_the_harness_catches_a_test_repeated_after_every_sequence():
    def verdict(checked, wrong, _):
        n, e = np.cumsum(checked), np.cumsum(wrong)
        return bool((stats.binom.sf(e - 1, n, 1 - EPS) <= DELTA)[n > 0].any())

    assert ever(verdict, EPS, spread=1000.0) > 2 * ALLOWED


def test_the_harness_catches_bets_on_tokens_that_are_alike():
    """Betting token after token takes the rest of a hard sequence for news."""

    def verdict(checked, wrong, _):
        bets = Bets(np.array([1 - EPS]))
        for n, e in zip(checked.tolist(), wrong.tolist(), strict=True):
            for token in range(n):
                bets.add(int(token < e), 1, 1)
                if bets.refuted(DELTA)[0]:
                    return True
        return False

    assert ever(verdict, EPS, spread=0.3) > ALLOWED


def test_bounds_seldom_miss_at_any_time():
    places = [int(np.searchsorted(_RATES, rate)) for rate in (1 - EPS, EPS)]

    def verdict(checked, wrong, most):
        """Both sides at the true agreement; the bounds miss it only if one of these tests is refuted."""
        sides = Bets(_RATES), Bets(_RATES)
        for n, e, limit in zip(checked.tolist(), wrong.tolist(), most.tolist(), strict=True):
            sides[0].add(e, n, limit)
            sides[1].add(n - e, n, limit)
            if sides[0].bound(DELTA / 2) > _RATES[places[0]] - 1e-9:
                return True
            if sides[1].bound(DELTA / 2) > _RATES[places[1]] - 1e-9:
                return True
        return False

    runs = 40
    assert ever(verdict, EPS, runs) <= stats.binom.ppf(1 - 1e-4, runs, DELTA)


def test_any_alarm_of_many_heads_is_seldom_false():
    rng = np.random.default_rng(8)
    alarms = 0
    for _ in range(runs := 30):
        monitor = Monitor(tuple(range(1, 9)), EPS, delta=0.2)
        rows = [sequences(rng, EPS, 100) for _ in range(8)]
        checked, wrong = (np.stack([row[part] for row in rows], axis=1) for part in (0, 1))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            monitor.update(checked, wrong, most=np.full(100, 8 * MOST))
        alarms += bool(monitor.alarms)
    assert alarms <= stats.binom.ppf(1 - 1e-4, runs, 0.2)


# Drift.


@pytest.mark.parametrize(("after", "within"), [(0.6, 40), (0.8, 130)])
@pytest.mark.parametrize("before", [0, 3000])
def test_drift_is_noticed_however_long_all_was_well(before, after, within):
    rng = np.random.default_rng(9)
    noticed = []
    for _ in range(10):
        bets = Bets(np.array([1 - EPS]))
        for row in zip(*(part.tolist() for part in sequences(rng, 0.95, before)), strict=True):
            bets.add(row[1], row[0], row[2])
        assert not bets.refuted(0.01)[0]
        rows = zip(*(part.tolist() for part in sequences(rng, after, 1000)), strict=True)
        for place, (checked, wrong, most) in enumerate(rows):
            bets.add(wrong, checked, most)
            if bets.refuted(0.01)[0]:
                noticed.append(place)
                break
    assert len(noticed) == 10
    assert np.median(noticed) <= within * (1 if before == 0 else 2)


def test_wealth_stays_finite_and_may_fall_again():
    bets = Bets(np.array([0.001]))
    for _ in range(300):
        bets.add(50, 50, 50)
    high = bets.wealth[0]
    assert 1e90 < high < np.inf
    for _ in range(300):
        bets.add(0, 50, 50)
    assert bets.wealth[0] < high / 2


# What happens then.

BROKEN = (np.full((40, 2), 3), np.tile([0, 2], (40, 1)))


def test_it_warns_once_for_every_head():
    monitor = Monitor((4, 8), EPS)
    with pytest.warns(UserWarning, match="refuted for the exit after layer 8") as caught:
        monitor.update(*BROKEN)
    assert len(caught) == 1
    assert monitor.alarms == (8, None)
    assert monitor.disabled == frozenset()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        monitor.update(*BROKEN)
    monitor.reset()
    assert monitor.alarms == ()
    with pytest.warns(UserWarning, match="all exits together"):
        monitor.update(*BROKEN)


def test_what_was_once_proven_stays_proven():
    monitor = Monitor((4,), EPS)
    with pytest.warns(UserWarning, match="refuted"):
        monitor.update([[3]] * 12, [[2]] * 12)
    monitor.update([[3]] * 600, [[0]] * 600)
    assert monitor.heads[0].wealth * monitor.level < 1
    assert monitor.alarms == (4, None)


def test_it_raises_until_it_is_reset():
    monitor = Monitor((4, 8), EPS, on_alarm="raise")
    monitor.require_silence()
    with pytest.raises(AgreementError, match="calibrate on text like it"):
        monitor.update(*BROKEN)
    with pytest.raises(AgreementError):
        monitor.require_silence()
    monitor.reset()
    monitor.require_silence()


def test_it_leaves_heads_out():
    monitor = Monitor((4, 8), EPS, on_alarm="disable")
    few_at_the_broken_one = (np.tile([9, 1], (60, 1)), np.tile([0, 1], (60, 1)))
    with pytest.warns(UserWarning, match="left out from now on"):
        monitor.update(*few_at_the_broken_one)
    assert monitor.disabled == {8}
    with pytest.warns(UserWarning, match="all exits together"):
        monitor.update(np.full((60, 2), 3), np.full((60, 2), 2))
    assert monitor.disabled == {4, 8}


def test_a_share_of_all_tokens():
    """An exit that is often wrong keeps a budget as long as it is seldom taken."""
    checked, wrong, tokens = np.full((200, 1), 1), np.arange(200)[:, None] % 2, np.full(200, 10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        monitor = Monitor((4,), EPS, share_of="tokens")
        monitor.update(checked, wrong, tokens=tokens)
    assert monitor.total.lower > EPS
    assert monitor.heads[0].upper < 0.7
    with pytest.warns(UserWarning, match="refuted"):
        quiet_monitor().update(checked, wrong, most=tokens)
    with pytest.warns(UserWarning, match="2000 tokens checked"):
        Monitor((4,), 0.97, share_of="tokens").update(checked, wrong, tokens=tokens)


def test_the_table_and_its_values():
    monitor = Monitor((4, 8), EPS)
    assert "-" in str(monitor)
    with pytest.warns(UserWarning, match="refuted"):
        monitor.update(*BROKEN)
    lines = str(monitor).splitlines()
    assert lines[0].endswith("40 sequences")
    assert [line.endswith("ALARM") for line in lines[2:]] == [False, True, True]
    values = monitor.to_dict()
    assert values["heads"][1]["layer"] == 8
    assert values["total"]["checked"] == 240
    assert values["total"]["alarm"]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"layers": ()}, "layers is empty"),
        ({"eps": 1.0}, "eps is 1.0"),
        ({"delta": 0}, "delta is 0"),
        ({"on_alarm": "shout"}, "on_alarm is 'shout'"),
        ({"share_of": "all"}, "share_of is 'all'"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_refusals(option, message):
    with pytest.raises(InputError, match=message):
        Monitor(**({"layers": (4,), "eps": 0.9} | option))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([[1, 2]], [[0, 0]]), r"checked has shape \(1, 2\)"),
        (([[1]], [[2]]), "contradict"),
        (([[1]], [[-1]]), "contradict"),
        (([[3]], [[1]], [2]), "contradict"),
        (([[3]], [[1]], [3, 3]), "a number for each"),
    ],
)
def test_counts_that_cannot_be(arguments, message):
    checked, wrong, *most = arguments
    with pytest.raises(InputError, match=message):
        quiet_monitor().update(checked, wrong, most=most[0] if most else None)
