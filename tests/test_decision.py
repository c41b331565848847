"""Shapes, dtypes, thresholds, special values and refusals of the decision."""

from __future__ import annotations

import sys
import threading
import time

import ml_dtypes
import numpy as np
import offramp
import pytest
import torch
from offramp import Decision, _core, decide, reference, top2_margin
from offramp.cli.app import run
from offramp.evaluation.peers import decision as peers

BOTH = pytest.mark.parametrize("module", [offramp, reference], ids=["core", "reference"])
NAN, INF = float("nan"), float("inf")


@BOTH
def test_one_row_gives_python_scalars(module):
    decision = module.decide(np.log(np.array([0.2, 0.7, 0.1], np.float32)), 0.4)
    assert [type(value) for value in decision] == [int, float, bool]
    assert decision == (1, pytest.approx(0.5), True)
    assert isinstance(decision, Decision)


@BOTH
def test_a_batch_gives_arrays(module):
    logits = np.log(np.array([[0.2, 0.7, 0.1], [0.4, 0.35, 0.25]], np.float32))
    decision = module.decide(logits, 0.4)
    assert [value.dtype for value in decision] == [np.int64, np.float32, np.bool_]
    assert [value.shape for value in decision] == [(2,)] * 3
    assert decision.token.tolist() == [1, 0]
    assert decision.exit.tolist() == [True, False]


@BOTH
@pytest.mark.parametrize("size", [1, 2, 15, 16, 17, 255, 256, 257, 1024, 1025, 5000])
def test_ties_take_the_lowest_index_anywhere(module, size):
    for first in {0, size // 3, size - 1}:
        for second in {first, size // 2, size - 1}:
            logits = np.full(size, -3.0, np.float32)
            logits[[first, second]] = 2.0
            token, margin = module.top2_margin(logits)
            assert token == min(first, second)
            assert (margin == 0.0) == (first != second)


@BOTH
def test_zeros_of_both_signs_tie(module):
    for logits in ([0.0, -0.0], [-0.0, 0.0], [-0.0, -0.0], [-1.0, -0.0, 0.0]):
        token, margin = module.top2_margin(np.array(logits, np.float32))
        assert (token, str(margin)) == (len(logits) - 2, "0.0")


@BOTH
def test_one_possible_token_has_margin_one(module):
    assert module.top2_margin(np.array([-7.0], np.float32)) == (0, 1.0)
    assert module.top2_margin(np.array([-INF, 3.0, -INF], np.float32)) == (1, 1.0)
    assert module.top2_margin(np.array([0.0, -200.0], np.float32)) == (0, 1.0)


@BOTH
def test_close_logits_keep_their_small_margin(module):
    low = np.float32(1.0)
    high = np.nextafter(low, np.float32(2))
    _, margin = module.top2_margin(np.array([low, high]))
    assert margin == pytest.approx((float(high) - 1.0) / 2, rel=3e-7)


@BOTH
@pytest.mark.parametrize(
    ("logits", "message"),
    [
        ([1.0, NAN], "row 0 holds nan at index 1"),
        ([INF, 1.0], "row 0 holds inf at index 0"),
        ([INF, NAN], "row 0 holds inf at index 0"),
        ([-INF, -INF], "row 0 is -inf throughout"),
        ([[1.0, 2.0], [1.0, NAN]], "row 1 holds nan at index 1"),
        ([[1.0, 2.0], [-INF, -INF], [NAN, 0.0]], "row 1 is -inf throughout"),
        ([], "logits is empty"),
        ([[]], "logits is empty"),
        (3.0, r"logits has shape \(\)"),
        ([[[1.0]]], r"logits has shape \(1, 1, 1\)"),
    ],
)
def test_refused_values(module, logits, message):
    with pytest.raises(offramp.InputError, match=message):
        module.top2_margin(np.array(logits, np.float32))
    with pytest.raises(ValueError, match="logits"):
        module.decide(np.array(logits, np.float32), 0.5)


@BOTH
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
@pytest.mark.parametrize("value", [NAN, INF])
def test_a_fault_is_found_wherever_it_stands(module, dtype, value):
    for size in (40, 256, 700, 1024, 1500):
        for place in range(0, size, 37):
            logits = np.zeros(size, dtype)
            logits[place] = value
            with pytest.raises(ValueError, match=f"holds {value} at index {place}:"):
                module.top2_margin(logits)


@BOTH
@pytest.mark.parametrize("dtype", [np.float64, np.int64, bool, complex, object])
def test_refused_dtypes(module, dtype):
    with pytest.raises(TypeError, match=r"^logits"):
        module.top2_margin(np.ones(3, dtype))


@BOTH
def test_lists_are_float32(module):
    assert module.top2_margin([1, 2.5, 0]) == module.top2_margin(np.array([1, 2.5, 0], np.float32))
    with pytest.raises(ValueError, match="holds inf at index 0"):
        module.top2_margin([1e39, 0.0])


@BOTH
@pytest.mark.parametrize(
    "tau", [0.5, 1, 0, -INF, INF, np.float64(0.5), np.float32(0.5), np.float16(0.5), torch.tensor(0.5)]
)
def test_scalar_taus(module, tau):
    logits = np.log(np.array([[0.2, 0.7, 0.1], [0.4, 0.35, 0.25]], np.float32))
    decision = module.decide(logits, tau)
    assert decision.exit.tolist() == [float(m) >= float(tau) for m in decision.margin]
    assert module.decide(logits[0], tau).exit is (float(decision.margin[0]) >= float(tau))


@BOTH
@pytest.mark.parametrize(
    "tau",
    [
        [0.4, INF],
        np.array([0.4, 0.01]),
        torch.tensor([0.4, 0.01], dtype=torch.bfloat16),
        np.array([0.4, 0.01], np.float16),
    ],
)
def test_a_tau_for_each_row(module, tau):
    logits = np.log(np.array([[0.2, 0.7, 0.1], [0.4, 0.35, 0.25]], np.float32))
    decision = module.decide(logits, tau)
    assert decision.exit.tolist() == [
        m >= float(t) for m, t in zip(decision.margin.tolist(), tau, strict=True)
    ]


@BOTH
def test_tau_is_compared_in_float64(module):
    logits = np.array([1.0, 0.3], np.float32)
    _, margin = module.top2_margin(logits)
    above = np.nextafter(margin, 2.0)
    assert np.float32(above) == np.float32(margin)
    assert module.decide(logits, margin).exit
    assert not module.decide(logits, above).exit
    assert module.decide(logits[None], [margin]).exit.all()
    assert not module.decide(logits[None], [above]).exit.any()


@BOTH
@pytest.mark.parametrize(
    ("rows", "tau", "message"),
    [
        (1, NAN, "^tau must be a number, but it is nan"),
        (2, [0.1, NAN], r"^tau must be a number, but tau\[1\] is nan"),
        (1, [0.1], r"^tau has shape \(1,\): give one number"),
        (2, [0.1], r"^tau has shape \(1,\): give one number or an array of shape \(2,\)"),
        (2, [[0.1, 0.2]], r"^tau has shape \(1, 2\)"),
        (2, [], "^tau is empty"),
    ],
)
def test_refused_taus(module, rows, tau, message):
    logits = np.zeros((rows, 4), np.float32)
    with pytest.raises(offramp.InputError, match=message):
        module.decide(logits if rows > 1 else logits[0], tau)


@BOTH
def test_tau_of_another_type(module):
    for tau in ("high", None, 0.5j):
        with pytest.raises(TypeError, match=r"^tau"):
            module.decide(np.zeros(3, np.float32), tau)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_torch_tensors_are_read_as_their_numbers(dtype):
    logits = torch.randn(3, 700, generator=torch.Generator().manual_seed(1)).to(dtype)
    expected = reference.top2_margin(logits.float().numpy())
    for given in (logits, logits.clone().requires_grad_()):
        token, margin = top2_margin(given)
        np.testing.assert_array_equal(token, expected[0])
        np.testing.assert_array_equal(margin, expected[1])
        assert top2_margin(given[1]) == (expected[0][1], expected[1][1])
        assert top2_margin(given[:, ::2][1]) == reference.top2_margin(given.detach()[1, ::2].float().numpy())
    assert token.tolist() == logits.argmax(dim=1).tolist()


@pytest.mark.parametrize("kind", [np.float32, torch.float32, torch.float16, torch.bfloat16])
def test_one_row_goes_the_short_way_and_faults_are_told_as_ever(kind, monkeypatch):
    make = np.array if kind is np.float32 else torch.tensor
    row = make([0.0, 3.0, 1.0], dtype=kind)
    with monkeypatch.context() as only:
        only.setattr("offramp.decision.read_logits", lambda *_: pytest.fail("the long way"))
        assert top2_margin(row) == reference.top2_margin(np.array([0.0, 3.0, 1.0], dtype=np.float32))
    for values, words in (
        ([], "empty"),
        ([0.0, NAN], "nan at index 1"),
        ([INF, 0.0], "inf at index 0"),
        ([-INF, -INF], "row 0"),
        (0.5, r"shape \(\)"),
    ):
        with pytest.raises(ValueError, match=words):
            top2_margin(make(values, dtype=kind))


def test_what_only_looks_like_logits_is_refused():
    masked = np.ma.masked_array(np.array([0.0, 3.0, 1.0], dtype=np.float32), mask=[False, True, False])
    for given in (
        masked,
        np.array([0, 3, 1], dtype=np.uint16),
        torch.tensor([0, 3, 1], dtype=torch.uint16),
        torch.tensor([0.0, 3.0], dtype=torch.float64),
    ):
        with pytest.raises(TypeError, match="logits"):
            top2_margin(given)


def test_layouts_are_read_correctly_and_left_alone():
    logits = np.random.default_rng(0).standard_normal((4, 600)).astype(np.float32)
    expected = top2_margin(logits)
    frozen = logits.copy()
    frozen.flags.writeable = False
    unaligned = (
        np.frombuffer(bytearray(b"\0" + logits.tobytes()), np.uint8)[1:]
        .view(np.float32)
        .reshape(logits.shape)
    )
    wide = np.repeat(logits, 2, axis=1)
    for view in (frozen, np.asfortranarray(logits), unaligned, wide[:, ::2], logits.astype(">f4")):
        before = view.tobytes()
        token, margin = top2_margin(view)
        np.testing.assert_array_equal(token, expected[0])
        np.testing.assert_array_equal(margin, expected[1])
        assert top2_margin(view[2]) == (expected[0][2], expected[1][2])
        assert view.tobytes() == before
    for tensor in (torch.from_numpy(unaligned), torch.from_numpy(wide)[:, ::2], torch.from_numpy(logits)):
        assert top2_margin(tensor[2]) == (expected[0][2], expected[1][2])


def test_argmax_agrees_with_torch_and_numpy_on_ties():
    rng = np.random.default_rng(3)
    for _ in range(200):
        logits = rng.integers(0, 4, rng.integers(1, 900)).astype(np.float32)
        token, _ = decide(logits, 0.5)[:2]
        assert token == logits.argmax() == int(torch.from_numpy(logits).argmax())


def test_other_threads_run_during_a_batch():
    """The interpreter is released for a batch, and for a single row, which takes microseconds, it is not."""
    rows = np.zeros((64, 50_000), np.float32)
    rows[:, 7] = 1
    steps, stop = 0, threading.Event()

    def work():
        nonlocal steps
        while not stop.is_set():
            steps += 1
            time.sleep(0)

    def progress(decide, tries):
        """Whether another thread got on between the beginning of some call and its end."""
        for _ in range(tries):
            before = steps
            decide()
            if steps > before:
                return True
            time.sleep(0)
        return False

    def exits(rows, tau):
        _core.exits_rows(rows, "float32", tau, np.empty(len(rows), np.int64), np.empty(len(rows), bool))

    thread, interval = threading.Thread(target=work), sys.getswitchinterval()
    # From here on a thread runs until it lets go of the interpreter itself.
    sys.setswitchinterval(1000)
    try:
        thread.start()
        assert not progress(lambda: _core.top2_margin_row(rows[0]), 100)
        assert not progress(lambda: exits(rows[:1], 0.5), 100)
        assert progress(lambda: _core.top2_margin_rows(rows, "float32"), 1000)
        assert progress(lambda: exits(rows, 0.5), 1000)
    finally:
        stop.set()
        sys.setswitchinterval(interval)
        thread.join()


@pytest.mark.parametrize(
    ("contender", "within"),
    [
        ("decide", 1e-6),
        ("by_numpy", 1e-6),
        ("_by_logsumexp", 1e-6),
        ("_by_softmax", 1e-6),
        ("_by_fused_softmax", 1e-4),
    ],
)
def test_the_bench_times_what_finds_the_same(monkeypatch, capsys, contender, within):
    """A contender whose margin is further off than its own arithmetic, or whose token is another, ends the bench."""
    arguments = ["bench", "decide", "--vocabulary", "500", "--rounds", "1", "--quiet", "--json"]
    honest = getattr(peers, contender)
    for token_off, margin_off, code in ((0, 0.5, 0), (0, 3.0, 1), (1, 0.0, 1)):

        def off(*given, token_off=token_off, margin_off=margin_off):
            token, *_ = honest(*given)
            (row,) = (item for item in given if isinstance(item, torch.Tensor | np.ndarray))
            _, exact = peers.exactly(np.float32(row.tolist()))
            return token + token_off, exact + margin_off * within

        monkeypatch.setattr(peers, contender, off)
        assert run(arguments) == code
        assert ("its time means nothing" in capsys.readouterr().err) == (code == 1)
