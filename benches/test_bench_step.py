"""A step through decoder layers beside its peers: a group for every number of rows and dtype.

The layers are as wide as SmolLM2-135M's, with weights at random, and so many that they are read from memory as in a
step of decoding.  Before it is timed a contender must find what float64 finds, up to its rounding.  One read of the
weights is the floor.
"""

from __future__ import annotations

import pytest
import torch
from offramp.llm import few
from offramp.llm.trunk import Trunk
from transformers import LlamaConfig, LlamaForCausalLM

OURS, OPERATIONS, MODULES, READ = "offramp", "operations of torch", "transformers' modules", "one read"
CONTEXT = 128
# The largest error of a layer, as a share of the largest output.
ROUNDING = {"float32": 1e-5, "bfloat16": 3e-2}

pytestmark = pytest.mark.benchmark(max_time=1.0, min_rounds=20)


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    torch.set_num_threads(min(before, 2))
    with torch.no_grad():
        yield
    torch.set_num_threads(before)


@pytest.fixture
def model(size, dtype):
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=size(30, 2),
        num_attention_heads=9,
        num_key_value_heads=3,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval().to(getattr(torch, dtype))


def prepared(trunk, hidden):
    """A cache that holds the context, and a function of the rows after it that leaves it as it was."""
    cache, count = trunk.new_cache(), trunk.num_layers
    trunk.run(hidden[:, :CONTEXT], 0, count, cache=cache, positions=torch.arange(CONTEXT)[None])
    positions = torch.arange(CONTEXT, hidden.shape[1])[None]

    def run():
        cache.crop_to(0, count, CONTEXT)
        return trunk.run(hidden[:, CONTEXT:], 0, count, cache=cache, positions=positions)

    return run


@pytest.mark.parametrize("name", [OURS, OPERATIONS, MODULES, READ])
@pytest.mark.parametrize("rows", [1, 2, 4, 8])
@pytest.mark.parametrize("dtype", list(ROUNDING))
def test_all_layers(benchmark, monkeypatch, model, dtype, rows, name):
    """Of SmolLM2's width and depth."""
    benchmark.group = f"layers, {rows} rows, {dtype}"
    generator = torch.Generator().manual_seed(rows)
    hidden = torch.randn(1, CONTEXT + rows, 576, generator=generator).to(getattr(torch, dtype))
    if name == READ:
        weights = [weight for layer in model.model.layers for weight in layer.parameters()]
        # A largest number is found faster than a sum.
        benchmark(lambda: [weight.view(torch.int32).amax() for weight in weights])
        return
    expected = prepared(Trunk(model.double()), hidden.double())()
    trunk = Trunk(model.to(hidden.dtype))
    if name != OURS:
        monkeypatch.setattr(few, "IS_FAST", False)
    if name == MODULES:
        trunk._lean = None
    run = prepared(trunk, hidden)
    error = (run().double() - expected).abs().max() / expected.abs().max()
    assert error < ROUNDING[dtype], f"{name} is off by {error:.1e} of the largest output"
    benchmark(run)
