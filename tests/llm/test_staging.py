"""Decisions on logits that arrive late, and that the engine takes all of its own here."""

from __future__ import annotations

import threading
import time

import numpy as np
import offramp
import pytest
import torch
from offramp import decide, top2_margin
from offramp.llm import staging
from offramp.llm.reading import Reader
from offramp.llm.staging import CudaStream, Stage
from tiny import make_model
from torch.utils._python_dispatch import TorchDispatchMode

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
cuda = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DEVICES = ["cpu", "late", pytest.param("cuda", marks=cuda)]


def needs_cuda(test):
    for mark in cuda:
        test = mark(test)
    return test


class LateStream:
    """Copies in the background, and late: what is read before waiting is nonsense."""

    def __init__(self, delay=0.002):
        self.delay = delay
        self.gate = None
        self.under_way = []
        self.allocated = []

    def memory(self, size):
        self.allocated.append(size)
        return torch.full((size,), 255, dtype=torch.uint8)  # NaN in every dtype

    def copy(self, logits, buffer):
        def arrive(before=self.under_way[-1:], gate=self.gate):
            for earlier in before:
                earlier.join()
            if gate is not None:
                gate.wait(10)
            time.sleep(self.delay)
            buffer.copy_(logits)

        self.under_way.append(threading.Thread(target=arrive))
        self.under_way[-1].start()

    def wait(self):
        for copy in self.under_way:
            copy.join()
        self.under_way.clear()


def stage_for(device):
    return Stage(LateStream()) if device == "late" else Stage.on(torch.device(device))


def rows(dtype, shape=(3, 700), seed=0):
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 3).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("device", DEVICES)
def test_decisions_are_those_of_decide(device, dtype):
    stage = stage_for(device)
    for seed in range(20):
        logits = rows(dtype, seed=seed)
        given = logits if device == "late" else logits.to(device)
        expected = decide(logits, 0.1)
        token, exits = stage.exits(given, 0.1)
        assert token.tolist() == expected.token.tolist()
        assert exits.tolist() == expected.exit.tolist()
        token, margin = stage.top2_margin(given)
        assert token.tolist() == expected.token.tolist()
        assert margin.tobytes() == expected.margin.tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
def test_on_the_cpu_the_tensors_own_memory_is_read(dtype):
    logits = rows(dtype)
    assert np.shares_memory(Stage()._read(logits), staging._view(logits))
    every_other = rows(dtype, (3, 1400))[:, ::2]
    assert Stage().top2_margin(every_other)[1].tobytes() == top2_margin(every_other)[1].tobytes()


@pytest.mark.parametrize("device", ["late", pytest.param("cuda", marks=cuda)])
def test_buffers_are_used_again(device):
    stage = stage_for(device)
    views = [
        stage._read(rows(dtype, seed=seed).to(device.replace("late", "cpu")))
        for seed in range(5)
        for dtype in DTYPES
    ]
    assert all(view is views[at % 3] for at, view in enumerate(views))
    assert len({view.ctypes.data for view in views}) == 1


@pytest.mark.parametrize("device", ["late", pytest.param("cuda", marks=cuda)])
def test_memory_is_as_large_as_the_largest_logits(device):
    """It does not add up over batches and dtypes, and what is laid out in it anew is right."""
    stage = stage_for(device)
    shapes = [(2, 300), (7, 300), (1, 300), (7, 1), (3, 900), (7, 300), (2, 300)]
    for seed, shape in enumerate(shapes * 2):
        for dtype in DTYPES:
            logits = rows(dtype, shape, seed)
            token, margin = stage.top2_margin(logits.to(device.replace("late", "cpu")))
            expected = top2_margin(logits)
            assert token.tolist() == expected[0].tolist()
            assert margin.tobytes() == expected[1].tobytes()
    assert len(stage._memory) == 4 * 3 * 900
    if device == "late":
        assert stage._stream.allocated == [4 * 2 * 300, 4 * 7 * 300, 4 * 3 * 900]


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_laid_out_otherwise_are_copied_into_the_same_memory(dtype):
    """A product of a few rows comes as columns."""
    stage = Stage()
    views = []
    for seed in range(4):
        columns = rows(dtype, (700, 3), seed).T
        expected = top2_margin(columns.contiguous())
        token, margin = stage.top2_margin(columns)
        assert token.tolist() == expected[0].tolist()
        assert margin.tobytes() == expected[1].tobytes()
        views.append(stage._read(columns))
    assert all(view is views[0] for view in views)
    assert not np.shares_memory(views[0], staging._view(columns))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_is_read_as_it_is_or_another_way(dtype):
    """Memory that does not say all of what it holds is left to the slower ways."""
    logits = rows(dtype, (1, 700))
    found = offramp.decide(logits, 0.1)
    expected = [found.token.tolist(), found.exit.tolist()]
    every_other = torch.stack([logits, logits.flip(1)], dim=-1)[:, :, 0]
    negated = torch._neg_view(-logits)
    subclass = logits.as_subclass(type("Other", (torch.Tensor,), {}))
    for kind in (logits, logits.clone().requires_grad_(), every_other, negated, subclass):
        assert [part.tolist() for part in Stage().exits(kind, 0.1)] == expected
        assert top2_margin(kind[0]) == top2_margin(logits[0])
    with pytest.raises(ValueError, match=r"row 0 holds nan at index 0"):
        Stage().exits(torch.full_like(logits, torch.nan), 0.1)


@pytest.mark.parametrize("mode", ["exit", "verify"])
def test_every_generation_has_a_stage_of_its_own(trained, thresholds, prompts, mode, monkeypatch):
    """Threads that shared one would overwrite each other's answers."""
    answered, exits = [], Stage.exits

    def noting(stage, logits, tau):
        found = exits(stage, logits, tau)
        answered[-1].append((stage, *found))
        return found

    monkeypatch.setattr(Stage, "exits", noting)
    for _ in range(2):
        answered.append([])
        generated(trained, prompts, thresholds, mode=mode)
    (first, *mine), (second, *its) = answered[0][0], answered[1][0]
    assert first is not second
    assert not any(np.shares_memory(one, other) for one, other in zip(mine, its, strict=True))


def test_no_rows_are_refused():
    with pytest.raises(ValueError, match=r"^logits is empty"):
        Stage().exits(torch.empty(0, 5), 0.5)


def test_answers_take_no_memory_of_their_own():
    stage = Stage()
    first = stage.exits(rows(torch.float32), 0.1)
    for seed in range(5):
        logits = rows(torch.float32, seed=seed)
        again, expected = stage.exits(logits, 0.1), decide(logits, 0.1)
        assert all(now is before for now, before in zip(again, first, strict=True))
        assert again[0].tolist() == expected.token.tolist()
        assert again[1].tolist() == expected.exit.tolist()
    assert [len(part) for part in stage.exits(rows(torch.float32, (1, 700)), 0.1)] == [1, 1]


def test_other_dtypes_are_refused():
    with pytest.raises(TypeError, match=r"^logits has dtype float64: give float16, bfloat16 or float32"):
        Stage().exits(torch.zeros(1, 3, dtype=torch.float64), 0.5)


@pytest.fixture
def late(monkeypatch):
    """Let every generation's logits arrive late; returns the streams."""
    streams = []

    def on(cls, device):
        streams.append(LateStream(0.0005))
        return cls(streams[-1])

    monkeypatch.setattr(Stage, "on", classmethod(on))
    return streams


def generated(ee, prompts, thresholds, **settings):
    ids, mask = prompts
    output = ee.generate(
        ids,
        attention_mask=mask,
        thresholds=thresholds,
        return_dict_in_generate=True,
        **{"max_new_tokens": 15} | settings,
    )
    return output.sequences.tolist(), output.exit_layers.tolist()


@pytest.mark.parametrize("mode", ["exit", "verify"])
def test_late_logits_change_nothing(trained, thresholds, prompts, late, mode, monkeypatch):
    found = generated(trained, prompts, thresholds, mode=mode)
    assert len(late) == 1
    assert len(late[0].allocated) == 1
    monkeypatch.undo()
    assert found == generated(trained, prompts, thresholds, mode=mode)


@pytest.fixture(scope="module")
def another(texts):
    """A model of another depth, vocabulary and width of heads, with heads and thresholds of its own."""
    model = make_model(seed=1, vocab_size=131, num_hidden_layers=4)
    ee = offramp.EarlyExitModel(model, None, layers=(1, 2), head=offramp.HeadConfig("mlp", shortlist=110))
    ee.train_heads(sequences=texts, epochs=2, batch_size=64, seed=3)
    return ee, [float(np.quantile(scores, 0.5)) for scores in ee.score(texts).scores]


@pytest.mark.parametrize("logits_arrive", ["at once", "late"])
def test_models_decode_side_by_side(trained, thresholds, another, prompts, logits_arrive, request):
    """Two models that share nothing, two generations of each, all under way at once."""
    streams = request.getfixturevalue("late") if logits_arrive == "late" else []
    ids, mask = prompts
    work = [
        (ee, (ids[row:], mask[row:]), settings)
        for row in range(2)
        for ee, settings in ((trained, thresholds), another)
    ]
    alone = [generated(*arguments) for arguments in work]
    layers = [np.unique(exit_layers).tolist() for _, exit_layers in alone]
    assert all(len(found) > 1 for found in layers), layers
    together = [None] * len(work)
    start = threading.Barrier(len(work))

    def decode(index):
        start.wait()
        together[index] = generated(*work[index])

    threads = [threading.Thread(target=decode, args=(index,)) for index in range(len(work))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone
    assert len(streams) == (2 * len(work) if logits_arrive == "late" else 0)


def test_an_abandoned_generation_reaches_no_other(trained, thresholds, prompts, late, monkeypatch):
    """It is interrupted while its logits are under way; they arrive where the next one is about to read its own."""
    expected = generated(trained, prompts, thresholds)
    late.clear()
    arrive, waits = threading.Event(), []
    wait, copy = LateStream.wait, LateStream.copy

    def held(stream, logits, buffer):
        """Let the abandoned generation's fourth copy bring NaN, when it is told to."""
        if stream is late[0] and len(waits) == 3:
            stream.gate = arrive
            logits = torch.full_like(logits, torch.nan)
        copy(stream, logits, buffer)

    def interrupted(stream):
        if stream is late[0]:
            if stream.gate is not None:
                raise KeyboardInterrupt
            waits.append(stream)
            return wait(stream)
        wait(stream)
        arrive.set()
        return wait(late[0])

    monkeypatch.setattr(LateStream, "copy", held)
    monkeypatch.setattr(LateStream, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        generated(trained, prompts, thresholds)
    assert late[0].under_way[-1].is_alive()
    assert generated(trained, prompts, thresholds) == expected
    assert arrive.is_set()
    assert not late[0].under_way


def test_an_interrupted_stage_can_be_asked_again():
    """What it left under way has arrived before what comes after it is read."""
    stage = Stage(LateStream(0.05))
    first, second = rows(torch.float32, seed=1), rows(torch.float32, seed=2)
    stage._read(first)
    stage._stream.copy(first, stage._buffer(first)[0])
    token, margin = stage.top2_margin(second)
    expected = top2_margin(second)
    assert token.tolist() == expected[0].tolist()
    assert margin.tobytes() == expected[1].tobytes()


class DecisionsByTorch(TorchDispatchMode):
    """Collects what torch computes from logits of this width towards a choice or a confidence of its own."""

    SUSPECTS = ("topk", "softmax", "logsumexp", "argmax", "max", "amax", "sort", "exp", "kthvalue", "aminmax")

    def __init__(self, width):
        super().__init__()
        self.width = width
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        of_logits = any(
            isinstance(given, torch.Tensor) and given.ndim and given.shape[-1] == self.width for given in args
        )
        name = func.overloadpacket.__name__.strip("_")
        if of_logits and any(suspect in name.split("_") for suspect in self.SUSPECTS):
            self.found.append(name)
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("batched", [False, True], ids=["row by row", "batch"])
@pytest.mark.parametrize("mode", ["exit", "verify"])
def test_the_engine_takes_every_decision_here(trained, thresholds, prompts, monkeypatch, mode, batched):
    """As many kernel calls as answers of heads, each on those logits; torch is not asked for a choice among them."""
    answers, calls = [], []
    core, answer = staging._core, Reader.answer
    width = trained.heads_in_use.after(1).logits(torch.zeros(1, 32)).shape[-1]

    class Counting:
        @staticmethod
        def exits_rows(logits, dtype, tau, tokens, exits):
            calls.append((logits.copy(), tau))
            core.exits_rows(logits, dtype, tau, tokens, exits)

    def noting(reader, positions, mask):
        logits = answer(reader, positions, mask)
        answers.append((logits.numpy().copy(), thresholds[trained.layers.index(layer_of[id(reader.head)])]))
        return logits

    layer_of = {id(trained.heads_in_use.after(layer)): layer for layer in trained.layers}
    monkeypatch.setattr(staging, "_core", Counting)
    monkeypatch.setattr(Reader, "answer", noting)
    ids, mask = prompts
    batches = [(ids, mask)] if batched else [(ids[row:][:1], mask[row:][:1]) for row in range(len(ids))]
    depths = [*trained.layers, trained.num_layers]
    seen, taus = set(), set()
    for batch in batches:
        calls.clear()
        answers.clear()
        with DecisionsByTorch(width) as by_torch:
            _, exit_layers = generated(trained, batch, thresholds, mode=mode, max_new_tokens=30)
        assert not by_torch.found
        assert len(calls) == len(answers)
        for (logits, tau), (answered, threshold) in zip(calls, answers, strict=True):
            np.testing.assert_array_equal(logits, answered)
            assert tau == threshold
            taus.add(tau)
        # A step asks as deep as its deepest row goes; drafts that were taken back were asked for, too.
        asked = [
            max(min(depths.index(layer) + 1, 3) for layer in column if layer)
            for column in zip(*exit_layers, strict=True)
        ]
        assert len(calls) == sum(asked) if mode == "exit" else len(calls) >= len(asked)
        seen.update(asked)
    assert taus == set(thresholds)
    assert batched or seen == {1, 2, 3}


def test_decisions_by_torch_would_be_noticed():
    logits = torch.zeros(2, 60)
    with DecisionsByTorch(60) as by_torch:
        logits.softmax(-1).topk(2)
        logits.argmax(-1), logits.max(-1), torch.logsumexp(logits, -1), torch.sort(logits)
        torch.zeros(2, 89).argmax(-1)
    assert len(by_torch.found) >= 6


BUSY = 200_000_000
"""Cycles: a tenth of a second or so on any device, far longer than whatever is asserted meanwhile."""


@pytest.fixture
def streams():
    """A stream of the stage, the current one, logits on the device and memory for them."""
    beside = CudaStream(torch.device("cuda"))
    logits = torch.zeros(1, 1 << 22, device="cuda")
    buffer = beside.memory(logits.numel() * 4).view(torch.float32).view(logits.shape)
    beside.copy(logits, buffer)
    beside.wait()
    torch.cuda._sleep(1000)
    torch.cuda.synchronize()
    return beside, torch.cuda.current_stream(), logits, buffer


@needs_cuda
def test_copies_wait_for_the_logits(streams):
    beside, current, logits, buffer = streams
    assert buffer.is_pinned()
    for value in range(1, 20):
        torch.cuda._sleep(BUSY // 20)
        logits.fill_(value)
        beside.copy(logits, buffer)
        assert not beside._copied.query()
        assert not current.query()
        beside.wait()
        assert buffer.eq(value).all()


@needs_cuda
def test_copies_leave_the_current_stream_alone(streams):
    beside, current, logits, buffer = streams
    assert beside._stream != current
    assert beside._stream != torch.cuda.default_stream()
    logits.fill_(7)
    with torch.cuda.stream(beside._stream):
        torch.cuda._sleep(BUSY)
    beside.copy(logits, buffer)
    assert torch.cuda.current_stream() == current
    # What the model does next does not queue behind the copy.
    later = torch.ones(1000, device="cuda").cumsum(0)
    done = torch.cuda.Event()
    done.record(current)
    done.synchronize()
    assert not beside._copied.query()
    assert later[-1] == 1000
    beside.wait()
    assert beside._copied.query()
    assert buffer.eq(7).all()


@needs_cuda
def test_waiting_for_a_copy_is_not_waiting_for_the_model(streams):
    beside, current, logits, buffer = streams
    logits.fill_(8)
    beside.copy(logits, buffer)
    torch.cuda._sleep(BUSY)
    beside.wait()
    assert not current.query()
    assert buffer.eq(8).all()


@needs_cuda
def test_logits_under_way_keep_their_memory(streams):
    beside, _, logits, buffer = streams
    dropped = logits.clone().fill_(9)
    address = dropped.data_ptr()
    with torch.cuda.stream(beside._stream):
        torch.cuda._sleep(BUSY)
    beside.copy(dropped, buffer)
    del dropped
    others = [torch.zeros_like(logits) for _ in range(4)]
    assert not beside._copied.query()
    assert address not in [other.data_ptr() for other in others]
    beside.wait()
    assert buffer.eq(9).all()


def test_logits_of_any_width_decode(model, texts):
    """Heads of different widths each keep their memory."""
    stage = Stage(LateStream(0))
    other = make_model(seed=1)
    for step in range(3):
        for source in (model, other):
            logits = source(texts[step][None]).logits[:, -1]
            for width in (7, 60, logits.shape[1]):
                part = logits[:, :width].contiguous()
                assert stage.exits(part, 0.2)[0].tolist() == part.argmax(dim=-1).tolist()
    assert stage._stream.allocated == [4 * width for width in (7, 60, logits.shape[1])]
