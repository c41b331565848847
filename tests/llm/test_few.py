"""Few rows through a layer by the compiled core: what the lean layer's own operations give, to rounding."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from offramp import _core
from offramp.llm import few, stepping
from offramp.llm.few import Linear, Narrow
from offramp.llm.layer import RMSNorm
from offramp.llm.rounding import round_linear
from offramp.llm.stepping import Steps
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
    """The rows, and how many layers they went through, of each call of the core."""
    seen, own = [], Steps.run

    def run(steps, hidden, first, caches, *rest, **more):
        seen.append((hidden.shape[1], len(caches)))
        return own(steps, hidden, first, caches, *rest, **more)

    monkeypatch.setattr(Steps, "run", run)
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
    assert calls == [(rows, trunk.num_layers) for rows in (1, 3, 8, 1)]
    monkeypatch.setattr(few, "IS_FAST", False)
    theirs, others = decoded(trunk, (1, 3, 8, 1))
    assert len(calls) == 4
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
@pytest.mark.parametrize("family", ["Llama", "Qwen3, sliding", "SmolLM3"])
def test_layers_part_by_part_are_all_of_them(family, calls):
    trunk = Trunk(build(family))
    whole, kept = decoded(trunk, (1, 3))
    run = trunk.run

    def parts(hidden, first, last, **more):
        for at in range(first, last, 3):
            hidden = run(hidden, at, min(at + 3, last), **more)
        return hidden

    trunk.run = parts
    calls.clear()
    found, others = decoded(trunk, (1, 3))
    assert calls == [(rows, layers) for rows in (1, 3) for layers in (3, 1)]
    for mine, other in zip([whole, *kept], [found, *others], strict=True):
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
    down = model.model.layers[0].mlp.down_proj.weight
    down.data = down.data.T.contiguous().T
    decoded(trunk, (1,))
    assert not calls, "a weight in another order"
    down.data = down.data.contiguous()
    decoded(trunk, (1,))
    assert calls


@steps_by_the_core
@torch.no_grad()
def test_weights_that_are_elsewhere_are_found_when_a_sequence_begins(calls):
    model = build("Llama")
    trunk = Trunk(model)
    before, _ = decoded(trunk, (1, 2))
    model.double().float()
    again, _ = decoded(trunk, (1, 2))
    assert torch.equal(again, before)
    up = model.model.layers[1].mlp.up_proj.weight
    up.data = 2 * up.data
    changed, _ = decoded(trunk, (1, 2))
    assert len(calls) == 6
    fresh, _ = decoded(Trunk(model), (1, 2))
    assert torch.equal(changed, fresh)
    assert not torch.equal(changed, before)
    model.bfloat16()
    decoded(trunk, (1, 2))
    assert len(calls) == 10, "in another dtype"


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
    steps = Steps(form)
    hidden, positions = torch.randn(1, 9, trunk.hidden_size), torch.arange(9)[None]

    def run(way, what, picked):
        cache = trunk.new_cache()
        trunk.run(hidden[:, :5], 0, trunk.num_layers, cache=cache, positions=positions[:, :5])
        more = {"attention_mask": None, "picked": picked}
        return way(what, hidden[:, 5:], 0, cache=cache, positions=positions[:, 5:], **more)

    every = run(trunk.step_lean, steps, None)
    assert torch.equal(run(trunk.step_lean, steps, [3, 1]), every[0, [3, 1]])
    for picked in (None, [3, 1]):
        ours = run(trunk.step_lean, steps, picked)
        theirs = run(trunk.run_lean, form, None if picked is None else torch.tensor(picked))
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@steps_by_the_core
@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rounds", [False, True])
def test_what_a_head_has_before_and_after_its_layers_is_done_on_the_way(dtype, rounds):
    trunk = Trunk(build("Llama").to(dtype))
    width = trunk.hidden_size
    linears = [module for module in trunk.layers[-1].modules() if isinstance(module, torch.nn.Linear)]
    before = torch.nn.Linear(width, width, dtype=dtype)
    if rounds:
        for linear in (before, *linears):
            round_linear(linear)
    (layer,) = trunk.lean_form([trunk.layers[-1]])
    after = layer.before_block
    steps = Steps([layer], before=Linear.of(before), after=after)
    first = trunk.num_layers - 1
    hidden, positions = torch.randn(1, 9, width).to(dtype), torch.arange(9)[None]
    kept = []
    for ours in (True, False):
        cache = trunk.new_cache()
        trunk.run_lean([layer], hidden[:, :5], first, cache=cache, positions=positions[:, :5])
        given, at = hidden[:, 5:], {"cache": cache, "positions": positions[:, 5:]}
        if ours:
            found = trunk.step_lean(steps, given, first, **at, attention_mask=None, picked=None)
        else:
            found = after(trunk.run_lean([layer], before(given), first, **at))
        kept.append((found, cache.growing[first].keys, cache.growing[first].values))
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 6e-2}[dtype]
    for mine, other in zip(*kept, strict=True):
        torch.testing.assert_close(mine, other, rtol=tolerance, atol=tolerance)


@steps_by_the_core
def test_addresses_of_nothing_are_refused():
    rows, weight, out = torch.ones(1, 16), torch.ones(24, 16), torch.empty(1, 24)

    def multiply(dtype="float32", linear=(0, 0, 0), at=(0, 0), sizes=(1, 16)):
        weight_at, scales, bias = linear
        memory = (rows.data_ptr() + at[0], out.data_ptr() + at[1])
        _core.multiply_rows(dtype, (weight.data_ptr() + weight_at, scales, bias, 24), *memory, *sizes, 1)

    multiply()
    assert torch.equal(out, torch.full((1, 24), 16.0))
    with pytest.raises(TypeError, match="float64"):
        multiply("float64")
    for wrong in (
        {"linear": (-weight.data_ptr(), 0, 0)},
        {"linear": (1, 0, 0)},
        {"linear": (0, 2, 0)},
        {"linear": (0, 0, 2)},
        {"at": (-rows.data_ptr(), 0)},
        {"at": (0, 2)},
        {"sizes": (0, 16)},
        {"sizes": (1, 0)},
    ):
        with pytest.raises(ValueError, match="nothing at this address"):
            multiply(**wrong)


@steps_by_the_core
def test_layers_whose_addresses_lead_nowhere_are_refused():
    memory = torch.ones(64, 64)
    at = memory.data_ptr()
    square, norm = (at, 0, 0, 16), (at, 1e-5)
    layer = stepping._Layer(
        norm, [(at, 0, 0, 48)], None, (2, 2, 8), 1.0, 0, square, norm, (square, square), square, 1.0, 0
    )
    places, partner = torch.tensor([8]), torch.arange(8)
    keys, values, out = torch.zeros(64), torch.zeros(64), torch.zeros(16)
    caches = [(keys.data_ptr(), values.data_ptr())]
    given = stepping._Run(
        at, 1, places.data_ptr(), [(at, at, 9)], partner.data_ptr(), caches, 3, None, out.data_ptr()
    )

    def run(first=0, last=1, layer=layer, **other):
        _core.Layers("float32", 16, [layer], **other.pop("beside", {})).run(
            first, last, 1, given._replace(**other)
        )

    run()
    assert out.isfinite().all()
    assert out.abs().sum() > 0
    for message, wrong in (
        ("no such layers", {"last": 2}),
        ("no such layers", {"last": 0}),
        ("no such layers", {"caches": []}),
        ("no such table", {"layer": layer._replace(table=1)}),
        ("not in the table", {"tables": [(at, at, 8)]}),
        ("not there is picked", {"picked": [1]}),
        ("nothing at this address", {"rows": 0}),
        ("nothing at this address", {"caches": [(0, at)]}),
        ("nothing at this address", {"picked": []}),
        ("nothing at this address", {"layer": layer._replace(down=(0, 0, 0, 16))}),
        ("int8 and others are not", {"layer": layer._replace(down=(at, at, 0, 16))}),
        ("int8 and others are not", {"beside": {"before": (at, at, 0, 16)}}),
    ):
        with pytest.raises(ValueError, match=message):
            run(**wrong)
    with pytest.raises(TypeError, match="float64"):
        _core.Layers("float64", 16, [layer]).run(0, 1, 1, given)


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
    right = Steps.run
    monkeypatch.setattr(Steps, "run", lambda *given: 1.01 * right(*given))
    trunk = Trunk(build("Llama"))
    assert trunk.is_lean
    trunk.prove((1, 2))
    assert not trunk.is_lean


@steps_by_the_core
@torch.no_grad()
def test_what_does_not_fit_together_is_refused():
    rows, weight, bias = torch.ones(2, 16), torch.ones(24, 16), torch.ones(24)
    for linear in (Linear(weight[:, :8].contiguous()), Linear(weight, bias[:7])):
        with pytest.raises(ValueError, match="do not fit together"):
            few.multiply(rows, linear)
    with pytest.raises(ValueError, match="do not fit together"):
        few.apply_norm(rows, (bias, 1e-5))
    trunk = Trunk(build("Llama"))
    steps = Steps(trunk.lean_form(list(trunk.layers)))
    table = torch.ones(9, 8)
    hidden, positions = torch.randn(1, 7, trunk.hidden_size), torch.arange(7)[None]

    def given():
        cache = trunk.new_cache()
        trunk.run(hidden[:, :5], 0, trunk.num_layers, cache=cache, positions=positions[:, :5])
        return [hidden[:, 5:], 0, cache.growing, positions[:, 5:], [(table, table)], torch.arange(8)]

    steps.run(*given())

    def filled(*shape, dtype=torch.float32, lengths=(5, 5, 5, 5)):
        """Caches of that many tokens, each (batch, heads, tokens, head size)."""
        caches = trunk.new_cache().growing
        for layer, length in zip(caches, lengths, strict=True):
            new = torch.ones(shape[0], shape[1], length, shape[2]).to(dtype)
            layer.update(new, new)
        return caches

    assert trunk.num_layers == 4
    steps.run(*given()[:2], filled(1, 2, 8), *given()[3:])
    for place, wrong in (
        (0, hidden[:, 5:, :16]),
        (0, hidden[:, 5:].expand(2, 2, -1)),
        (2, filled(1, 2, 8, dtype=torch.bfloat16)),
        (2, filled(1, 4, 8)),
        (2, filled(1, 2, 16)),
        (2, filled(2, 2, 8)),
        (2, filled(1, 2, 8, lengths=(5, 5, 3, 5))),
        (2, filled(1, 2, 8, lengths=(5, 5, 5, 200))),
        (2, [*filled(1, 2, 8), *filled(1, 2, 8)]),
        (3, positions[:, 4:]),
        (3, positions[:, 5:].expand(2, 2)),
        (3, positions[:, 5:].int()),
        (4, []),
        (4, [(table, table[:, :6])]),
        (4, [(table, table[:8])]),
        (4, [(table, table.double())]),
        (4, [(table.T.contiguous().T, table)]),
        (5, torch.arange(7)),
        (5, torch.arange(8).int()),
    ):
        arguments = given()
        arguments[place] = wrong
        lengths = [cache.get_seq_length() for cache in arguments[2]]
        with pytest.raises(ValueError, match=r"do not fit together|no such layers"):
            steps.run(*arguments)
        assert [cache.get_seq_length() for cache in arguments[2]] == lengths


@torch.no_grad()
@pytest.mark.parametrize(
    "change",
    [
        lambda layer: {"output": Linear(layer.output.weight[:, :16].contiguous())},
        lambda layer: {"down": Linear(layer.down.weight[:, :16].contiguous())},
        lambda layer: {"down": layer.down._replace(bias=torch.ones(7))},
        lambda layer: {"projections": layer.projections[:2]},
        lambda layer: {"block": [layer.block[0], Linear(layer.block[1].weight[:16])]},
        lambda layer: {"before_block": replace(layer.before_block, weight=torch.ones(7))},
        lambda layer: {
            "down": layer.down._replace(narrow=Narrow(torch.ones(7, 7).to(torch.int8), torch.ones(7)))
        },
    ],
)
def test_layers_whose_parts_do_not_fit_together_are_not_prepared(change):
    trunk = Trunk(build("Llama"))
    (layer,) = trunk.lean_form([trunk.layers[-1]])
    hidden = torch.ones(1, 1, trunk.hidden_size)
    assert Steps([layer]).takes(hidden) == few.IS_FAST
    assert not Steps([replace(layer, **change(layer))]).takes(hidden)
    width = trunk.hidden_size
    for beside in (
        {"before": Linear(torch.ones(width, 16))},
        {"before": Linear(torch.ones(16, width))},
        {"after": RMSNorm(torch.ones(16), 1e-5)},
    ):
        assert not Steps([layer], **beside).takes(hidden)
    assert not Steps(Trunk(build("Llama").double()).lean_form(list(trunk.layers))).takes(hidden.double())


def test_gate_and_up_may_be_one_with_a_bias():
    weight, bias = torch.arange(12.0).view(6, 2), torch.arange(6.0)
    narrow = Narrow(torch.arange(12, dtype=torch.int8).view(6, 2), torch.arange(6.0))
    gate, up = stepping.halves([Linear(weight, bias, narrow)])
    assert torch.equal(torch.cat((gate.weight, up.weight)), weight)
    assert torch.equal(torch.cat((gate.bias, up.bias)), bias)
    assert torch.equal(torch.cat((gate.narrow.values, up.narrow.values)), narrow.values)
    assert torch.equal(torch.cat((gate.narrow.scales, up.narrow.scales)), narrow.scales)
    assert stepping.halves([gate, up]) == [gate, up]
    alone, _ = stepping.halves([Linear(weight)])
    assert alone.bias is alone.narrow is None
