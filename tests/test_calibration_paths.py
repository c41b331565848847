"""Every way the core can take, forced, around the sizes where it changes its mind; results are always the same.

Instruction sets other than the fastest run these tests through test_instruction_sets.py.
"""

from __future__ import annotations

import _thread
import signal
import threading
import time

import numpy as np
import pytest
from generators import CORRECT, DTYPES, SCORES, targets
from offramp import fast_calibrate
from test_calibration_differential import assert_same_bytes, by_numpy

# Few samples, blocks of the scan, the table of 16-bit keys, pieces for threads.
SIZES = (1, 2, 511, 512, 513, 1023, 1024, 1025, 1537, 4096, 8191, 8192, 8193, 20_000)
LARGE = (32_767, 32_768, 65_536, 300_000)


@pytest.fixture(params=["sort", "fastest"])
def path(request, monkeypatch):
    monkeypatch.setenv("OFFRAMP_CALIBRATION", request.param)
    return request.param


def assert_right(scores, correct, eps):
    for rule in ("set", "index"):
        expected = by_numpy(scores, correct, eps, rule)
        for threads in (1, 3):
            assert_same_bytes(fast_calibrate(scores, correct, eps, rule=rule, threads=threads), expected)
        assert_same_bytes(fast_calibrate(scores, correct, eps[:1], rule=rule), expected[:1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", SCORES)
def test_around_every_size(path, dtype, kind):
    rng = np.random.default_rng([ord(letter) for letter in kind + dtype])
    for size in SIZES:
        name = rng.choice(list(CORRECT))
        scores = np.ascontiguousarray(SCORES[kind](rng, (1, size), DTYPES[dtype]))
        assert_right(scores[0], CORRECT[name](rng, scores)[0], targets(rng, size))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("size", [*LARGE, (1 << 20) + 1])
def test_large(path, dtype, size):
    rng = np.random.default_rng(size)
    for kind in rng.choice(list(SCORES), 3, replace=False):
        name = rng.choice(list(CORRECT))
        scores = np.ascontiguousarray(SCORES[kind](rng, (1, size), DTYPES[dtype]))
        assert_right(scores[0], CORRECT[name](rng, scores)[0], targets(rng, size))


def adversaries(rng, size):
    """Labels in the order of ascending scores, made to mislead a search that guesses."""
    wave = np.cumsum(rng.choice([-1, 1], size))
    yield "random walk around the target", np.resize([1, 0], size) ^ (wave % 7 == 0)
    yield "the target met at every rank", np.resize([1, 1, 0, 1], size)
    for share in (0.001, 0.03, 0.5, 0.97, 0.999):
        yield f"all wrong up to {share}", np.arange(size) > share * size
        yield f"all right up to {share}", np.arange(size) < share * size
    yield "one right sample below a wrong half", (np.arange(size) > size / 2) | (np.arange(size) == 7)
    yield "sawtooth", np.arange(size) % 1000 < 750
    yield "growing sawtooth", np.sqrt(np.arange(size)) % 2 < 1.5


@pytest.mark.parametrize("order", ["shuffled", "sorted", "reversed"])
@pytest.mark.parametrize("ties", [1, 40, 5000])
def test_adversaries(path, order, ties):
    rng = np.random.default_rng(ties)
    size = 60_000
    for name, ascending in adversaries(rng, size):
        scores = (np.arange(size) // ties).astype(np.float32)
        shuffle = rng.permutation(size) if order == "shuffled" else np.arange(size)
        shuffle = shuffle[::-1] if order == "reversed" else shuffle
        eps = np.array([0.75, 0.5, 0.7499, 0.7501, 0.03, 1.0, 0.0])
        scores, correct = scores[shuffle], ascending[shuffle].astype(bool)
        for few in (eps, eps[:1]):
            expected = by_numpy(scores, correct, few, "set")
            assert fast_calibrate(scores, correct, few).tolist() == expected.tolist(), name


def test_many_targets_share_the_work(path):
    rng = np.random.default_rng(3)
    scores = rng.random((4, 100_000)).astype(np.float32)
    correct = rng.random(scores.shape) < scores
    for count in (2, 20, 32, 33, 1000):
        eps = rng.random(count)
        found = fast_calibrate(scores, correct, eps)
        assert found.shape == (4, count)
        for row in range(4):
            assert_same_bytes(found[row], by_numpy(scores[row], correct[row], eps, "set"))


def test_rows_in_parallel_name_the_first_offence(path):
    scores, correct = np.zeros((50, 3000), np.float32), np.zeros((50, 3000), np.uint8)
    correct[3, 7] = 9
    with pytest.raises(ValueError, match=r"^correct must hold only 0 and 1, but correct\[3, 7\] is 9"):
        fast_calibrate(scores, correct, 0.5)
    scores[40, 2999] = -np.inf
    with pytest.raises(ValueError, match=r"^scores must be finite, but scores\[40, 2999\] is -inf"):
        fast_calibrate(scores, correct, 0.5)


def test_unknown_paths_are_refused(monkeypatch):
    monkeypatch.setenv("OFFRAMP_CALIBRATION", "guess")
    with pytest.raises(ValueError, match=r'OFFRAMP_CALIBRATION is "guess": unset it, or use fastest or sort'):
        fast_calibrate([0.5], [1], 0.5)


@pytest.mark.parametrize("method", ["sort", "fastest"])
def test_interrupts_are_answered(monkeypatch, method):
    monkeypatch.setenv("OFFRAMP_CALIBRATION", method)
    scores, correct = np.random.default_rng(0).random((16, 4_000_000)), np.zeros((16, 4_000_000), bool)
    raised = []

    def interrupt():
        raised.append(time.perf_counter())
        _thread.interrupt_main()

    def calibrate_for_ever():
        while time.perf_counter() < deadline:
            fast_calibrate(scores, correct, [0.1, 0.2, 0.3])

    # A background job ignores Ctrl-C; this test must not.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    deadline = time.perf_counter() + 60
    threading.Timer(0.1, interrupt).start()
    try:
        with pytest.raises(KeyboardInterrupt):
            calibrate_for_ever()
    finally:
        signal.signal(signal.SIGINT, before)
    # A tenth of a second is the promise; a loaded machine needs more.
    assert time.perf_counter() - raised[0] < 1.0
