"""What fast_calibrate, sort_by_score and threshold_curve promise, example by example."""

from __future__ import annotations

import builtins
import json
import math
import subprocess
import sys
import threading

import ml_dtypes
import numpy as np
import offramp
import pytest
from generators import DTYPES
from offramp import InputError, ThresholdCurve, fast_calibrate, reference, sort_by_score, threshold_curve

IMPLEMENTATIONS = pytest.mark.parametrize("calibrate", [fast_calibrate, reference.fast_calibrate])


@IMPLEMENTATIONS
def test_set_rule_meets_the_target_where_the_index_rule_stops_inside_a_group(calibrate):
    scores, correct = [0.5, 0.5, 0.5, 0.9], [0, 1, 1, 1]
    assert calibrate(scores, correct, 0.8) == 0.9
    assert calibrate(scores, correct, 0.8, rule="index") == 0.5


@IMPLEMENTATIONS
def test_accuracy_need_not_grow_with_the_threshold(calibrate):
    # Accuracy from the bottom up: 3/5, 1/2, 1/3, 0, 0.  Bisection would look at the middle and go up.
    assert calibrate([0.1, 0.2, 0.3, 0.4, 0.5], [1, 1, 1, 0, 0], 0.6) == 0.1


@IMPLEMENTATIONS
def test_no_threshold_is_infinity(calibrate):
    assert calibrate([0.1, 0.9], [0, 0], 0.5) == math.inf
    assert calibrate([0.1, 0.9], [0, 0], 5e-324) == math.inf


@IMPLEMENTATIONS
def test_a_target_of_zero_accepts_everything(calibrate):
    assert calibrate([0.9, 0.1], [0, 0], 0.0) == 0.1
    assert calibrate([0.9, 0.1], [0, 0], -0.0) == 0.1


@IMPLEMENTATIONS
def test_zeros_are_equal_and_returned_positive(calibrate):
    for scores in ([-0.0, 0.0], [0.0, -0.0], [-0.0, -0.0]):
        # Apart, the wrong sample would be left below and +0.0 reach 1.0.
        assert calibrate(scores, [0, 1], 0.75) == math.inf
        for rule in ("set", "index"):
            assert math.copysign(1.0, calibrate(scores, [1, 1], 1.0, rule=rule)) == 1.0


@IMPLEMENTATIONS
def test_the_quotient_is_the_float64_division(calibrate):
    # 0.9 is a little more than the real 9/10, and so is 9/10 in float64: equal, so it passes.
    assert calibrate([float(i) for i in range(10)], [0] + [1] * 9, 0.9) == 0.0
    assert calibrate([float(i) for i in range(10)], [0] + [1] * 9, np.nextafter(0.9, 1)) == 1.0


@IMPLEMENTATIONS
def test_result_shapes_follow_the_arguments(calibrate):
    scores, correct = np.array([[0.1, 0.2], [0.3, 0.4], [0.5, 0.6]]), np.array([[0, 1], [1, 1], [0, 0]])
    assert type(calibrate(scores[0], correct[0], 0.5)) is float
    for eps in ([0.5, 1.0], (0.5, 1.0), np.array([0.5, 1.0], np.float32)):
        one = calibrate(scores[0], correct[0], eps)
        assert one.dtype == np.float64
        assert one.tolist() == [0.1, 0.2]
    per_head = calibrate(scores, correct, 0.75)
    assert per_head.dtype == np.float64
    assert per_head.tolist() == [0.2, 0.3, math.inf]
    assert calibrate(scores, correct, [0.5, 1.0]).tolist() == [[0.1, 0.2], [0.3, 0.3], [math.inf, math.inf]]
    assert calibrate(scores[:1], correct[:1], [1]).shape == (1, 1)
    assert calibrate(scores[:1], correct[:1], 1).shape == (1,)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_threshold_is_the_score_itself(dtype):
    scores = np.array([0.1, 0.3, 0.7], DTYPES[dtype])
    assert fast_calibrate(scores, [0, 1, 1], 1.0) == float(scores[1])


def test_input_is_never_written():
    scores, correct = np.array([0.5, -0.0, 0.9, 0.5]), np.array([True, False, True, False])
    before = scores.tobytes(), correct.tobytes()
    for array in (scores, correct):
        array.flags.writeable = False
    for rule in ("set", "index"):
        fast_calibrate(scores, correct, [0.1, 0.9], rule=rule)
    sort_by_score(scores, correct)
    threshold_curve(scores, correct)
    assert (scores.tobytes(), correct.tobytes()) == before


def test_results_do_not_depend_on_threads():
    rng = np.random.default_rng(5)
    scores, correct = rng.random((3, 50_000)).astype(np.float32), rng.random((3, 50_000)) < 0.6
    expected = fast_calibrate(scores, correct, [0.6, 0.61, 0.7], threads=1)
    for threads in (2, 3, 8, np.int64(2), None):
        assert (fast_calibrate(scores, correct, [0.6, 0.61, 0.7], threads=threads) == expected).all()


def test_denormals_as_zero_mode_changes_nothing():
    torch = pytest.importorskip("torch")
    tiny = np.array([1, 2, 3, 0x8000_0001], np.uint32).view(np.float32)
    correct = [0, 1, 1, 0]
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor has no such mode")
    try:
        found = fast_calibrate(tiny, correct, [0.5, 1.0])
        curve = threshold_curve(tiny, correct)
        unreachable = fast_calibrate(tiny, [0] * 4, 5e-324)
    finally:
        torch.set_flush_denormal(False)
    assert found.tolist() == [float(tiny[3]), float(tiny[1])]
    assert curve.thresholds.tolist() == sorted(map(float, tiny))
    assert unreachable == math.inf


# --- bad input

GOOD = np.array([0.1, 0.2, 0.3]), np.array([0, 1, 1])


@IMPLEMENTATIONS
@pytest.mark.parametrize(
    ("scores", "correct", "eps", "message"),
    [
        (
            [0.1, math.nan, math.nan],
            GOOD[1],
            0.5,
            "scores must be finite, but scores[1] is nan: repair or remove it",
        ),
        (
            [0.1, 0.2, math.inf],
            GOOD[1],
            0.5,
            "scores must be finite, but scores[2] is inf: repair or remove it",
        ),
        (
            [-math.inf, 0.2, 1.0],
            GOOD[1],
            0.5,
            "scores must be finite, but scores[0] is -inf: repair or remove it",
        ),
        (
            [[0.1, 1], [0.1, math.nan]],
            [[0, 1], [1, 1]],
            0.5,
            "scores must be finite, but scores[1, 1] is nan",
        ),
        (GOOD[0], np.array([0, 1, 2], np.uint8), 0.5, "correct must hold only 0 and 1, but correct[2] is 2"),
        (GOOD[0], np.array([0, -1, 2], np.int8), 0.5, "correct must hold only 0 and 1, but correct[1] is -1"),
        (GOOD[0], [0, 1, 300], 0.5, "correct must hold only 0 and 1, but correct[2] is 300"),
        (
            [[0.1], [0.2]],
            np.array([[1], [7]], np.uint8),
            0.5,
            "correct must hold only 0 and 1, but correct[1, 0] is 7",
        ),
        (*GOOD, 1.5, "eps must lie in [0, 1], but it is 1.5"),
        (*GOOD, math.nan, "eps must lie in [0, 1], but it is nan"),
        (*GOOD, [0.5, -0.25], "eps must lie in [0, 1], but eps[1] is -0.25"),
        (*GOOD, [], "eps is empty: give at least one value"),
        (*GOOD, [[0.5]], "eps has shape (1, 1): give one number or an array of shape (E,)"),
        (GOOD[0], [0, 1], 0.5, "scores has shape (3,) but correct has shape (2,): make them equal"),
        ([], [], 0.5, "scores is empty: give at least one value"),
        (np.empty((0, 3)), np.empty((0, 3), bool), 0.5, "scores is empty: give at least one value"),
        (np.empty((3, 0)), np.empty((3, 0), bool), 0.5, "scores is empty: give at least one value"),
        (0.5, 1, 0.5, "scores has shape (): give (N,), or (K, N) for K heads"),
        (np.ones((1, 1, 1)), np.ones((1, 1, 1), bool), 0.5, "scores has shape (1, 1, 1): give (N,)"),
        ([[0.1, 0.2], [0.3]], GOOD[1], 0.5, "scores is no regular array"),
    ],
)
def test_values_at_fault_are_named(calibrate, scores, correct, eps, message):
    with pytest.raises(InputError) as caught:
        calibrate(scores, correct, eps)
    assert str(caught.value).startswith(message)
    assert isinstance(caught.value, ValueError)


@IMPLEMENTATIONS
@pytest.mark.parametrize(
    ("scores", "correct", "eps", "message"),
    [
        (
            np.array([1, 2, 3]),
            GOOD[1],
            0.5,
            "scores has dtype int64: give float16, bfloat16, float32 or float64",
        ),
        (np.ones(3, np.complex64), GOOD[1], 0.5, "scores has dtype complex64"),
        (np.ones(3, np.longdouble), GOOD[1], 0.5, "scores has dtype "),
        (np.ones(3, ml_dtypes.float8_e4m3fn), GOOD[1], 0.5, "scores has dtype float8_e4m3fn"),
        (["a", "b", "c"], GOOD[1], 0.5, "scores has dtype str"),
        ([None, 1.0, 2.0], GOOD[1], 0.5, "scores is list, not an array of numbers"),
        ([True, False, True], GOOD[1], 0.5, "scores has dtype bool"),
        (GOOD[0], [0.0, 1.0, 1.0], 0.5, "correct has dtype float64: give bool or integers 0 and 1"),
        (*GOOD, "high", "eps has dtype str"),
        (*GOOD, True, "eps has dtype bool"),
        (*GOOD, None, "eps is NoneType, not an array of numbers"),
        (np.ma.masked_array(GOOD[0], [0, 1, 0]), GOOD[1], 0.5, "scores is a masked array"),
    ],
)
def test_dtypes_at_fault_are_named(calibrate, scores, correct, eps, message):
    with pytest.raises(TypeError) as caught:
        calibrate(scores, correct, eps)
    assert str(caught.value).startswith(message)


@IMPLEMENTATIONS
def test_options_at_fault_are_named(calibrate):
    with pytest.raises(ValueError, match=r"^rule must be 'set' or 'index', but it is 'lowest'"):
        calibrate(*GOOD, 0.5, rule="lowest")
    with pytest.raises(ValueError, match=r"^threads must be at least 1, but it is 0"):
        calibrate(*GOOD, 0.5, threads=0)
    for threads in (1.5, "2", True):
        with pytest.raises(TypeError, match=r"^threads must be a whole number or None"):
            calibrate(*GOOD, 0.5, threads=threads)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("position", [0, 1, 999, 65_536, 1_048_575, 1_048_576, 1_199_999])
def test_one_bad_sample_is_found_anywhere(dtype, position):
    scores, correct = np.zeros(1_200_000, DTYPES[dtype]), np.zeros(1_200_000, np.uint8)
    correct[position] = 255
    with pytest.raises(
        ValueError, match=rf"^correct must hold only 0 and 1, but correct\[{position}\] is 255"
    ):
        fast_calibrate(scores, correct, 0.5)
    scores[position:] = np.nan
    for function in (lambda *a: fast_calibrate(*a, 0.5), sort_by_score, threshold_curve):
        with pytest.raises(ValueError, match=rf"^scores must be finite, but scores\[{position}\] is nan"):
            function(scores, correct)


@pytest.mark.parametrize("function", [sort_by_score, threshold_curve])
def test_sorting_and_curves_take_one_row(function):
    with pytest.raises(ValueError, match=r"^scores has shape \(1, 2\): give shape \(N,\)"):
        function([[0.1, 0.2]], [[0, 1]])
    with pytest.raises(ValueError, match=r"^scores is empty"):
        function([], [])


# --- sorting


def test_sort_keeps_the_order_of_equal_scores_and_the_sign_of_zeros():
    scores, correct = np.array([0.0, -0.0, -1.0, 0.0, -0.0], np.float32), np.array([1, 0, 1, 0, 1])
    sorted_scores, sorted_correct = sort_by_score(scores, correct)
    assert np.signbit(sorted_scores).tolist() == [True, False, True, False, True]
    assert sorted_correct.tolist() == [1, 1, 0, 0, 1]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("flags", [bool, np.uint8, np.int8, np.int64, ">i4"])
def test_sort_returns_the_dtypes_given(dtype, flags):
    scores, correct = np.array([0.5, 0.25], DTYPES[dtype]), np.array([1, 0]).astype(flags)
    sorted_scores, sorted_correct = sort_by_score(scores, correct)
    assert sorted_scores.dtype == scores.dtype
    assert sorted_correct.dtype == np.dtype(flags).newbyteorder("=")
    assert sorted_scores.tolist() == [0.25, 0.5]
    assert sorted_correct.tolist() == [0, 1]


# --- curves


def test_curve_counts():
    curve = threshold_curve([0.9, 0.5, 0.5, 0.2], [1, 1, 0, 0])
    assert curve.thresholds.tolist() == [0.2, 0.5, 0.9]
    assert curve.accepted.tolist() == [4, 3, 1]
    assert curve.correct.tolist() == [2, 2, 1]
    assert curve.coverage.tolist() == [1.0, 0.75, 0.25]
    assert curve.accuracy.tolist() == [0.5, 2 / 3, 1.0]
    assert curve.n == 4
    assert (curve.thresholds.dtype, curve.accepted.dtype, curve.correct.dtype) == (
        np.float64,
        np.int64,
        np.int64,
    )
    assert repr(curve) == "ThresholdCurve(3 thresholds, 4 samples)"


def test_aurc_without_ties_is_the_mean_selective_risk():
    rng = np.random.default_rng(1)
    scores, correct = rng.permutation(500) / 500, rng.random(500) < 0.7
    wrong = ~correct[np.argsort(-scores)]
    assert threshold_curve(scores, correct).aurc() == pytest.approx(
        np.mean(np.cumsum(wrong) / np.arange(1, 501))
    )


def test_aurc_counts_a_shared_score_once_a_sample():
    assert threshold_curve([0.5, 0.5, 0.9], [1, 0, 1]).aurc() == pytest.approx((1 / 3 + 1 / 3 + 0) / 3)
    assert threshold_curve([0.5, 0.5], [1, 0]).aurc() == 0.5


def test_staircase_keeps_the_records_only():
    curve = threshold_curve([0.1, 0.2, 0.3, 0.4, 0.5, 0.6], [0, 1, 0, 1, 1, 1])
    stairs = curve.staircase()
    assert stairs.thresholds.tolist() == [0.1, 0.2, 0.4]
    assert len(stairs) == 3
    assert repr(stairs) == "ThresholdCurve(3 records, 6 samples)"
    assert stairs.staircase().thresholds.tolist() == [0.1, 0.2, 0.4]
    with pytest.raises(ValueError, match=r"^curve is a staircase"):
        stairs.aurc()


def test_stored_curves_come_back_exactly():
    rng = np.random.default_rng(2)
    curve = threshold_curve(rng.normal(size=999), rng.random(999) < 0.6)
    for stored in (curve, curve.staircase()):
        again = ThresholdCurve.from_dict(json.loads(json.dumps(stored.to_dict())))
        for name in ("thresholds", "accepted", "correct"):
            assert (getattr(again, name) == getattr(stored, name)).all()
            assert getattr(again, name).dtype == getattr(stored, name).dtype
        assert (again.n, again.complete) == (stored.n, stored.complete)


@pytest.mark.parametrize(
    "damage",
    [
        {"thresholds": [0.5, 0.1]},
        {"thresholds": [0.1]},
        {"thresholds": [0.1, math.nan]},
        {"thresholds": [0.1, math.inf]},
        {"thresholds": "high"},
        {"thresholds": [[0.1, 0.5]]},
        {"accepted": [1, 2]},
        {"accepted": [2, 0]},
        {"accepted": [2, 2**70]},
        {"correct": [3, 1]},
        {"correct": [1, -1]},
        {"correct": [0, 1]},
        {"correct": None},
        {"n": 3},
        {"n": "many"},
        {"thresholds": [], "accepted": [], "correct": []},
    ],
)
def test_damaged_curves_are_refused(damage):
    good = {"thresholds": [0.1, 0.5], "accepted": [2, 1], "correct": [1, 1], "n": 2, "complete": True}
    assert ThresholdCurve.from_dict(good).at(1.0) == 0.5
    with pytest.raises(ValueError, match=r"^stored curve"):
        ThresholdCurve.from_dict({**good, **damage})
    for part in good:
        with pytest.raises(ValueError, match=rf"^stored curve lacks '{part}'"):
            ThresholdCurve.from_dict({key: value for key, value in good.items() if key != part})


def test_plot_draws_risk_against_coverage():
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    curve = threshold_curve([0.9, 0.5, 0.5, 0.2], [1, 1, 0, 0])
    ax = curve.plot()
    x, y = ax.lines[0].get_data()
    assert list(x) == [1.0, 0.75, 0.25]
    assert list(y) == pytest.approx([0.5, 1 / 3, 0.0])
    assert curve.plot(ax=ax) is ax
    assert len(ax.lines) == 2


def test_plot_without_matplotlib_says_what_to_install(monkeypatch):
    original = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ImportError, match=r"pip install offramp\[plot\]"):
        threshold_curve([0.5], [1]).plot()


# --- beside Python


def test_other_threads_run_meanwhile():
    scores, correct = np.random.default_rng(0).random(3_000_000), np.ones(3_000_000, bool)
    ticks, done = [], threading.Event()

    def tick():
        while not done.wait(0.001):
            ticks.append(None)

    ticker = threading.Thread(target=tick)
    ticker.start()
    sort_by_score(scores, correct, threads=1)
    done.set()
    ticker.join()
    assert len(ticks) >= 5


def test_importing_brings_in_numpy_only():
    program = (
        "import sys, offramp; print(sorted({'torch', 'scipy', 'matplotlib', 'ml_dtypes'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
    assert offramp.__version__
