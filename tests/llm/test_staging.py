"""Decisions on logits that arrive late, and that the engine takes all of its own here."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
import torch
from offramp import _core, decide, top2_margin
from offramp.llm import staging
from offramp.llm.staging import CudaStream, Stage
from tiny import make_model

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
cuda = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DEVICES = ["cpu", "late", pytest.param("cuda", marks=cuda)]


class LateStream:
    """Copies in the background, and late: what is read before waiting is nonsense."""

    def __init__(self, delay=0.002):
        self.delay = delay
        self.under_way = []
        self.buffers = 0

    def buffer(self, logits):
        self.buffers += 1
        return torch.full_like(logits, torch.nan)

    def copy(self, logits, buffer):
        def arrive(before=self.under_way[-1:]):
            for earlier in before:
                earlier.join()
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
    if device == "late":
        assert stage._stream.buffers == 3


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_is_read_as_it_is_or_another_way(dtype):
    """Memory that does not say all of what it holds is left to the slower ways."""
    logits = rows(dtype, (1, 700))
    expected = [part.tolist() for part in _core.exits_rows(staging._view(logits), str(dtype)[6:], 0.1)]
    every_other = torch.stack([logits, logits.flip(1)], dim=-1)[:, :, 0]
    negated = torch._neg_view(-logits)
    subclass = logits.as_subclass(type("Other", (torch.Tensor,), {}))
    for kind in (logits, logits.clone().requires_grad_(), every_other, negated, subclass):
        assert [part.tolist() for part in Stage().exits(kind, 0.1)] == expected
        assert top2_margin(kind[0]) == top2_margin(logits[0])
    with pytest.raises(ValueError, match=r"row 0 holds nan at index 0"):
        Stage().exits(torch.full_like(logits, torch.nan), 0.1)


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
        max_new_tokens=15,
        thresholds=thresholds,
        return_dict_in_generate=True,
        **settings,
    )
    return output.sequences.tolist(), output.exit_layers.tolist()


@pytest.mark.parametrize("mode", ["exit", "verify"])
def test_late_logits_change_nothing(trained, thresholds, prompts, late, mode, monkeypatch):
    found = generated(trained, prompts, thresholds, mode=mode)
    assert len(late) == 1
    assert late[0].buffers == 1
    monkeypatch.undo()
    assert found == generated(trained, prompts, thresholds, mode=mode)


def test_models_decode_side_by_side(trained, thresholds, prompts, late):
    ids, mask = prompts
    alone = [generated(trained, (ids[row:], mask[row:]), thresholds) for row in range(3)]
    together = [None] * 3

    def decode(row):
        together[row] = generated(trained, (ids[row:], mask[row:]), thresholds)

    threads = [threading.Thread(target=decode, args=(row,)) for row in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone
    assert len(late) == 6


def test_an_abandoned_generation_reaches_no_other(trained, thresholds, prompts, late, monkeypatch):
    """It is interrupted while its logits are under way, and they arrive in the midst of the next one."""
    expected = generated(trained, prompts, thresholds)

    def interrupted(stream):
        if len(stream.under_way) and stream.waited == 3:
            raise KeyboardInterrupt
        stream.waited += 1
        whole(stream)

    whole = LateStream.wait
    monkeypatch.setattr(LateStream, "waited", 0, raising=False)
    monkeypatch.setattr(LateStream, "wait", interrupted)
    monkeypatch.setattr(LateStream, "delay", 0.05, raising=False)
    with pytest.raises(KeyboardInterrupt):
        generated(trained, prompts, thresholds)
    abandoned = late[-1]
    monkeypatch.setattr(LateStream, "wait", whole)
    assert generated(trained, prompts, thresholds) == expected
    assert abandoned.under_way
    whole(abandoned)


def test_the_engine_takes_every_decision_here(trained, thresholds, prompts, monkeypatch):
    """As many kernel calls as heads were asked: for each token those up to the one that answered."""
    calls = []
    core = staging._core

    class Counting:
        @staticmethod
        def exits_rows(*arguments):
            calls.append(arguments)
            return core.exits_rows(*arguments)

    def elsewhere(*_, **__):
        raise AssertionError("a decision was taken elsewhere")

    monkeypatch.setattr(staging, "_core", Counting)
    monkeypatch.setattr(torch, "softmax", elsewhere)
    monkeypatch.setattr(torch.Tensor, "topk", elsewhere)
    ids, mask = prompts
    depths = [*trained.layers, trained.num_layers]
    seen = set()
    for row in range(len(ids)):
        prompt = ids[row : row + 1, int((mask[row] == 0).sum()) :]
        calls.clear()
        output = trained.generate(
            prompt, max_new_tokens=30, thresholds=thresholds, return_dict_in_generate=True
        )
        asked = [min(depths.index(layer) + 1, 3) for layer in output.exit_layers[0].tolist()]
        assert len(calls) == sum(asked)
        seen.update(asked)
    assert seen == {1, 2, 3}


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_copies_wait_for_the_logits_and_leave_the_current_stream_alone():
    stream = CudaStream(torch.device("cuda"))
    logits = torch.zeros(1, 1 << 22, device="cuda")
    buffer = stream.buffer(logits)
    assert buffer.is_pinned()
    slow = torch.randn(4096, 4096, device="cuda")
    for value in range(1, 20):
        for _ in range(3):
            slow = torch.tanh(slow @ slow)
        logits.fill_(value)
        stream.copy(logits, buffer)
        stream.wait()
        assert buffer.eq(value).all()


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
    assert stage._stream.buffers == 3
