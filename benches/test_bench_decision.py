"""The decision beside its peers: a group for every row size and dtype, with one read of the row as the floor.

Before it is timed a contender must find the row's token, and the margin of exact arithmetic to 1e-6 (torch's own
softmax: to what its rounding costs).
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from offramp import reference, top2_margin
from offramp.evaluation.peers.decision import (
    DTYPES,
    FUSED,
    LOGSUMEXP,
    OURS,
    READ,
    ROUNDING,
    SOFTMAX,
    VOCABULARIES,
    as_held,
    check,
    contenders,
    like_a_model,
)
from offramp.llm.staging import Stage

NAMES = [OURS, READ, SOFTMAX, FUSED, LOGSUMEXP, "numpy"]

pytestmark = pytest.mark.benchmark(max_time=0.5, min_rounds=20)


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    torch.set_num_threads(min(before, 2))
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_one_row(benchmark, vocabulary, dtype, name):
    benchmark.group = f"decision, V={vocabulary}, {dtype}"
    logits = as_held(like_a_model(vocabulary), dtype)
    run = contenders(logits, dtype)[name]
    if name != READ:
        check(run, name, logits)
    benchmark(run)


@pytest.mark.parametrize("name", ["numpy float32", "torch float32", "torch bfloat16"])
def test_from_python(benchmark, name):
    """The way there and back: of sixteen logits the core makes no more than the clock can tell."""
    benchmark.group = "overhead from Python, V=16"
    row = like_a_model(16)
    given = {
        "numpy float32": row,
        "torch float32": torch.from_numpy(row),
        "torch bfloat16": torch.from_numpy(row).bfloat16(),
    }[name]
    assert top2_margin(given) == reference.top2_margin(np.float32(given.tolist()))
    benchmark(top2_margin, given)


@pytest.mark.parametrize("name", ["whole margin", "yes or no, far below", "yes or no, reached", READ])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_engines_question(benchmark, dtype, name):
    """What the engine asks of each head: the token, and whether its margin reaches a threshold."""
    benchmark.group = f"yes or no, V=51200, {dtype}"
    row = like_a_model(51_200)
    logits, stage = torch.from_numpy(row)[None].to(getattr(torch, dtype)), Stage()
    runs = {
        "whole margin": lambda: stage.top2_margin(logits),
        "yes or no, far below": lambda: stage.exits(logits, 0.9999),
        "yes or no, reached": lambda: stage.exits(logits, 0.0),
        READ: as_held(row, dtype).max,
    }
    assert stage.exits(logits, 0.0)[1].all()
    assert not stage.exits(logits, 0.9999)[1].any()
    benchmark(runs[name])


@pytest.mark.parametrize("name", [OURS, FUSED])
def test_a_batch(benchmark, size, name):
    """Rows in parallel."""
    rows = size(256, 8)
    benchmark.group = f"decision, {rows} rows of 51200, float32"
    logits = torch.stack([torch.from_numpy(like_a_model(51_200, seed)) for seed in range(rows)])
    stage = Stage()

    def with_torch():
        top = torch.softmax(logits, -1).topk(2)
        return top.indices[:, 0].numpy(), (top.values[:, 0] - top.values[:, 1]).numpy()

    runs = {OURS: lambda: stage.top2_margin(logits), FUSED: with_torch}
    tokens, margins = runs[name]()
    expected, exact = zip(*map(top2_margin, logits), strict=True)
    assert (tokens == expected).all()
    assert abs(margins - exact).max() <= ROUNDING.get(name, 0)
    benchmark(runs[name])
