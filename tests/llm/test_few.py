"""Few rows through a layer by the compiled core: what the lean layer's own operations give, to rounding."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from offramp import _core
from offramp.llm import few, lean
from offramp.llm.trunk import Trunk
from test_families import make as build
from tiny import steps_by_the_core

# Arranged as Llama's: with a window, with biases, with all in one matrix, without angles in some layers, with norms of
# heads, with a factor of what is added.
COMMON = [
    "Llama",
    "Mistral",
    "Mistral, sliding",
    "Qwen2",
    "Qwen2, sliding",
    "Phi3",
    "Phi3, sliding",
    "SmolLM3",
    "Qwen3",
    "Qwen3, sliding",
    "Granite",
]
OTHERS = ["Gemma2, uncapped", "Gemma3", "Olmo2", "Cohere", "Phi", "StableLm"]


@pytest.fixture(params=[1, 2, 4], autouse=True)
def threads(request):
    """One thread is the caller; more are torch's, asked through OpenMP."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture
def calls(monkeypatch):
    """The rows that attended in the core."""
    seen, own = [], _core.attend_rows
    monkeypatch.setattr(_core, "attend_rows", lambda *given: seen.append(given[5]) or own(*given))
    return seen


def decoded(trunk, widths, length=5):
    """Outputs of all layers, keys and values after a prefill and runs of so many rows."""
    generator = torch.Generator().manual_seed(3)
    total = length + sum(widths)
    hidden = torch.randn(1, total, trunk.hidden_size, generator=generator).to(trunk.dtype)
    positions = torch.arange(total)[None]
    cache, found, start = trunk.new_cache(), [], 0
    for width in (length, *widths):
        part = slice(start, start + width)
        found.append(
            trunk.run(hidden[:, part], 0, trunk.num_layers, cache=cache, positions=positions[:, part])
        )
        start += width
    kept = [tensor for layer in cache.growing for tensor in (layer.keys, layer.values)]
    return torch.cat(found, dim=1), kept


@steps_by_the_core
@torch.no_grad()
@pytest.mark.parametrize("family", COMMON)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_it_gives_what_the_layers_own_operations_give(family, dtype, calls, monkeypatch):
    trunk = Trunk(build(family).to(dtype))
    ours, kept = decoded(trunk, (1, 3, 8, 1))
    assert calls == [rows for rows in (1, 3, 8, 1) for _ in range(trunk.num_layers)]
    monkeypatch.setattr(few, "IS_FAST", False)
    theirs, others = decoded(trunk, (1, 3, 8, 1))
    assert len(calls) == 4 * trunk.num_layers
    tolerance = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 6e-2}[dtype]
    for mine, other in zip([ours, *kept], [theirs, *others], strict=True):
        torch.testing.assert_close(mine, other, rtol=tolerance, atol=tolerance)


@steps_by_the_core
@torch.no_grad()
def test_a_row_comes_out_the_same_beside_whatever_rows():
    """To the bit, on however many threads."""
    trunk = Trunk(build("Llama").bfloat16())
    together, _ = decoded(trunk, (8,))
    for widths in ((1,) * 8, (3, 5), (2, 1, 4, 1)):
        assert torch.equal(decoded(trunk, widths)[0], together)
    # Beyond a block of attention, and where buffers had to grow.
    together, kept = decoded(trunk, (8,) * 12, length=40)
    torch.set_num_threads(3)
    alone, others = decoded(trunk, (1,) * 96, length=40)
    for mine, other in zip([together, *kept], [alone, *others], strict=True):
        assert torch.equal(mine, other)


@steps_by_the_core
@torch.no_grad()
@pytest.mark.parametrize("family", OTHERS)
def test_layers_that_are_arranged_otherwise_are_left_alone(family, calls):
    decoded(Trunk(build(family)), (1, 3))
    assert not calls


@steps_by_the_core
@torch.no_grad()
def test_what_it_cannot_do_is_left_to_the_layers_operations(calls):
    model = build("Llama")
    trunk = Trunk(model)
    decoded(trunk, (17,))
    assert not calls, "many rows"
    hidden = torch.randn(2, 6, trunk.hidden_size)
    cache, positions = trunk.new_cache(), torch.arange(6)[None].expand(2, 6)
    for part in (slice(0, 5), slice(5, 6)):
        trunk.run(hidden[:, part], 0, 2, cache=cache, positions=positions[:, part])
    cache = trunk.new_cache()
    mask = torch.tensor([[0, 1, 1, 1, 1, 1]])
    for part in (slice(0, 5), slice(5, 6)):
        trunk.run(hidden[:1, part], 0, 2, cache=cache, positions=positions[:1, part], attention_mask=mask)
    assert not calls, "several sequences, or padding"
    model.model.layers[0].mlp.down_proj.weight.data = (
        model.model.layers[0].mlp.down_proj.weight.data.T.contiguous().T
    )
    decoded(trunk, (1,))
    assert len(calls) == trunk.num_layers - 1, "a weight in another order"


@steps_by_the_core
def test_gradients_are_torchs(calls):
    trunk = Trunk(build("Llama").requires_grad_(True))
    with torch.enable_grad():
        found, _ = decoded(trunk, (2,))
        assert not calls
        assert found.requires_grad
        # Of what went in, where the model is frozen.
        trunk.model.requires_grad_(False)
        hidden = torch.randn(1, 6, trunk.hidden_size, requires_grad=True)
        cache, positions = trunk.new_cache(), torch.arange(6)[None]
        with torch.no_grad():
            trunk.run(hidden[:, :5], 0, 1, cache=cache, positions=positions[:, :5])
        trunk.run(hidden[:, 5:], 0, 1, cache=cache, positions=positions[:, 5:]).sum().backward()
    assert not calls
    assert hidden.grad[0, 5].abs().sum() > 0


@steps_by_the_core
@torch.no_grad()
def test_the_last_layer_computes_picked_rows_alone():
    trunk = Trunk(build("Llama"))
    form = trunk.lean_form(list(trunk.layers))
    hidden, positions = torch.randn(1, 9, trunk.hidden_size), torch.arange(9)[None]

    def run(picked):
        cache = trunk.new_cache()
        trunk.run(hidden[:, :5], 0, trunk.num_layers, cache=cache, positions=positions[:, :5])
        return trunk.run_lean(form, hidden[:, 5:], 0, cache=cache, positions=positions[:, 5:], picked=picked)

    assert torch.equal(run(torch.tensor([3, 1])), run(None)[0, [3, 1]])


@steps_by_the_core
def test_addresses_of_nothing_are_refused():
    rows, weight, out = torch.ones(1, 16), torch.ones(24, 16), torch.empty(1, 24)

    def multiply(dtype="float32", linears=((0, 0),), at=(0, 0), sizes=(1, 16), **more):
        given = [(weight.data_ptr() + weight_at, bias, 24) for weight_at, bias in linears]
        memory = (rows.data_ptr() + at[0], out.data_ptr() + at[1])
        _core.multiply_rows(dtype, given, *memory, *sizes, 1, **more)

    multiply()
    assert torch.equal(out, torch.full((1, 24), 16.0))
    with pytest.raises(TypeError, match="float64"):
        multiply("float64")
    for wrong in (
        {"linears": ((-weight.data_ptr(), 0),)},
        {"linears": ((1, 0),)},
        {"linears": ((0, 2),)},
        {"at": (-rows.data_ptr(), 0)},
        {"at": (0, 2)},
        {"sizes": (0, 16)},
        {"sizes": (1, 0)},
        {"norm": (2, 1e-5)},
        {"residual": 2},
        {"gated": True},
    ):
        with pytest.raises(ValueError, match=r"nothing at this address|two weights"):
            multiply(**wrong)


def test_without_vector_instructions_nothing_is_done_here():
    """In processes of their own: what the core computes with is chosen once."""
    code = "import torch; from offramp.llm import few; print(few.IS_FAST)"
    for isa in _core.instruction_sets():
        # Where nothing is done here anyway, nothing else can be expected of processes beside.
        if isa == "portable" or few.IS_FAST:
            done = subprocess.run(
                [sys.executable, "-c", code],
                env={"OFFRAMP_ISA": isa, "PATH": ""},
                capture_output=True,
                check=False,
                text=True,
            )
            assert done.stdout.strip() == str(isa != "portable"), done.stderr


@steps_by_the_core
def test_a_step_that_deviates_is_given_up(monkeypatch):
    """With the whole lean path, as any other deviation is."""
    right = lean.LeanLayer.step
    monkeypatch.setattr(lean.LeanLayer, "step", lambda *given: 1.01 * right(*given))
    trunk = Trunk(build("Llama"))
    assert trunk.is_lean
    trunk.prove((1, 2))
    assert not trunk.is_lean


@steps_by_the_core
@torch.no_grad()
def test_what_does_not_fit_together_is_refused():
    rows, weight, bias = torch.ones(2, 16), torch.ones(24, 16), torch.ones(24)
    for linears, more in (
        ([(weight[:, :8].contiguous(), None)], {}),
        ([(weight, bias[:7])], {}),
        ([(weight, None), (weight[:7], None)], {"gated": True}),
        ([(weight, None)], {"norm": (bias, 1e-5)}),
        ([(weight, None)], {"residual": rows}),
    ):
        with pytest.raises(ValueError, match="do not fit together"):
            few.multiply(rows, linears, **more)
    projected, angles, partner = torch.ones(2, 32), torch.ones(1, 2, 1, 8), torch.arange(8)
    cache = torch.ones(1, 9, 1, 8)
    right = (projected, (2, 1, 8), (angles, angles), partner, (cache, cache), 7, 1.0, None)
    few.attend(*right)
    for place, wrong in (
        (0, torch.ones(2, 40)),
        (2, (angles[:, :1], angles)),
        (3, partner[:7]),
        (4, (cache, cache[:, :8])),
        (4, (cache.expand(2, 9, 1, 8), cache)),
        (4, (cache.view(1, 9, 2, 4), cache)),
        (5, 8),
    ):
        with pytest.raises(ValueError, match="do not fit together"):
            few.attend(*right[:place], wrong, *right[place + 1 :])


def test_gate_and_up_may_be_one_with_a_bias():
    weight, bias = torch.arange(12.0).view(6, 2), torch.arange(6.0)
    (gate, first), (up, second) = lean._halves([(weight, bias)])
    assert torch.equal(torch.cat((gate, up)), weight)
    assert torch.equal(torch.cat((first, second)), bias)
