"""Heads in use have weights of eight bits: what rounding does to them, and that nothing else is rounded."""

from __future__ import annotations

import json

import pytest
import torch
from offramp import EarlyExitModel, HeadConfig, InputError, ModelError
from offramp.llm import few, products
from offramp.llm.few import Linear
from offramp.llm.rounding import round_linear, round_to_bytes
from tiny import make_model, steps_by_the_core
from torch.nn import functional

FLOATS = [torch.float32, torch.bfloat16, torch.float16]


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("size", [1e-30, 0.02, 1.0, 1e30])
def test_a_rounded_weight_is_at_most_half_a_step_off(size):
    weight = size * drawn(50, 300)
    weight[7, 3] *= 40
    values, scales = round_to_bytes(weight)
    assert (values.dtype, scales.dtype) == (torch.int8, torch.float32)
    assert (values.abs().amax(dim=1) >= 126).all()
    assert values.min() >= -127
    exact = values.double() * scales.double()[:, None]
    off = (weight - exact).abs() / scales[:, None]
    assert off.max() <= 0.5 + 1e-6
    assert torch.equal((values * scales[:, None]).double(), exact), "what stands for it is exact in float32"


def test_rows_of_nothing_and_of_next_to_nothing_stay_so():
    weight = torch.zeros(3, 8)
    weight[1], weight[2, 5] = 1e-42, -1e-38
    values, scales = round_to_bytes(weight)
    assert not values[:2].any()
    assert scales.isfinite().all()
    assert (values * scales[:, None] - weight).abs().max() <= scales.max() / 2


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_what_is_no_number_stays_none(wrong):
    linear = torch.nn.Linear(40, 5)
    linear.weight.data[3, 17] = wrong
    round_linear(linear)
    for rows in (1, 50):
        found = products.linear(drawn(1, rows, 40), *Linear.of(linear)).detach()
        assert not found[..., 3].isfinite().any()
        assert found[..., [0, 1, 2, 4]].isfinite().all()


@torch.no_grad()
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("rows", [1, 3, 8, 40])
@pytest.mark.parametrize("biased", [False, True])
def test_few_rows_and_many_are_multiplied_with_the_same_weight(dtype, rows, biased):
    linear = torch.nn.Linear(100, 70, bias=biased)
    before = linear.weight.clone()
    round_linear(linear)
    wide = linear.weight.double()
    assert 0 < (before - wide).abs().max() < before.abs().max() / 200
    hidden = drawn(1, rows, 100).to(dtype)
    bias = linear.bias.double() if biased else None
    linear = linear.to(dtype)
    found = products.linear(hidden, *Linear.of(linear))
    exact = functional.linear(hidden.double(), wide, None if bias is None else bias.to(dtype).double())
    # Many rows meet the weight in its dtype.
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(found.double(), exact, rtol=tolerance, atol=5 * tolerance)


@steps_by_the_core
@torch.no_grad()
def test_few_rows_are_multiplied_with_the_whole_numbers(monkeypatch):
    linear = torch.nn.Linear(100, 70)
    round_linear(linear)
    hidden = drawn(1, 2, 100)
    found = products.linear(hidden, *Linear.of(linear))
    linear.weight.data.zero_()
    assert torch.equal(products.linear(hidden, *Linear.of(linear)), found)
    many = hidden.expand(20, 2, 100)
    assert torch.equal(products.linear(many, *Linear.of(linear)), linear.bias.expand(20, 2, 70))
    monkeypatch.setattr(few, "IS_FAST", False)
    round_linear(linear)
    assert Linear.of(linear).narrow is None


@pytest.fixture(scope="module", params=["mlp", "adapter", "linear"])
def exits(request, texts):
    config = HeadConfig(request.param, shortlist=60)
    ee = EarlyExitModel(make_model(), None, layers=(2, 4), head=config)
    ee.train_heads(sequences=texts[:20], epochs=1, batch_size=64)
    ee.calibrate(0.5, sequences=texts[:20])
    return ee


def test_heads_in_use_are_rounded_and_the_trained_ones_are_not(exits):
    before = {name: tensor.clone() for name, tensor in exits.heads.state_dict().items()}
    served = exits.heads_in_use
    assert exits.heads_in_use is served
    for name, tensor in exits.heads.state_dict().items():
        assert torch.equal(tensor, before[name])
    for layer in exits.layers:
        mine, theirs = served.after(layer), exits.heads.after(layer)
        pairs = [(mine.weight, theirs.weight)]
        pairs += [(a.weight, b.weight) for a, b in zip(mine.linears(), theirs.linears(), strict=True)]
        kinds = {"mlp": 4, "adapter": 9, "linear": 1}
        assert len(pairs) == kinds[theirs.config.kind]
        for rounded, trained in pairs:
            values, scales = round_to_bytes(trained)
            assert torch.equal(rounded, values * scales[:, None])
            if trained.any():
                assert not torch.equal(rounded, trained)
        others = mine.own_state().keys() - {
            name for name, tensor in mine.own_state().items() if tensor.ndim == 2
        }
        for name in others:
            assert torch.equal(mine.own_state()[name], theirs.own_state()[name])


def test_heads_of_one_list_share_their_rows(exits):
    if exits.head_configs[2].kind == "linear":
        pytest.skip("has rows of its own")
    first, second = map(exits.heads_in_use.after, (2, 4))
    assert first.weight is second.weight
    assert first._narrow is second._narrow


def test_a_head_that_is_not_rounded_may_share_its_rows_with_one_that_is(exits, texts):
    kind = exits.head_configs[2].kind
    configs = {2: HeadConfig(kind, shortlist=60, bits=None), 4: HeadConfig(kind, shortlist=60)}
    ee = EarlyExitModel(exits.model, None, layers=(2, 4), head=configs)
    ee.train_heads(sequences=texts[:20], epochs=1, batch_size=64)
    exact, rounded = map(ee.heads_in_use.after, (2, 4))
    assert torch.equal(exact.weight, ee.heads.after(2).weight)
    assert not torch.equal(rounded.weight, ee.heads.after(4).weight)
    assert exact._narrow is None


def test_heads_in_use_follow_the_model_to_another_dtype(texts):
    ee = EarlyExitModel(make_model(), None, layers=(2,), head=HeadConfig("adapter", shortlist=60))
    ee.train_heads(sequences=texts[:20], epochs=1, batch_size=64)
    ids, settings = texts[0][None, :9], {"max_new_tokens": 8, "thresholds": [0.0]}
    with torch.inference_mode():
        before = ee.generate(ids, **settings)
    assert not ee.heads_in_use.after(2).weight.is_inference()
    ee.model.bfloat16()
    ee.generate(ids, **settings)
    assert ee.heads_in_use.after(2).weight.dtype is torch.bfloat16
    assert ee.last_stats.tokens_by_exit[2] > 0
    ee.model.float()
    assert ee.generate(ids, **settings).shape == before.shape


@steps_by_the_core
def test_costs_count_the_whole_numbers(exits):
    for layer in exits.layers:
        wide, narrow = exits.heads.after(layer).cost(), exits.heads_in_use.after(layer).cost()
        assert narrow["parameters"] == wide["parameters"]
        assert narrow["multiply_adds"] == wide["multiply_adds"]
        head = exits.heads.after(layer)
        rounded = [head.weight, *(linear.weight for linear in head.linears())]
        saved = sum(3 * weight.numel() - 4 * len(weight) for weight in rounded)
        assert narrow["bytes"] == wide["bytes"] - saved


def test_who_wants_them_as_they_were_trained_says_so(exits, texts):
    config = HeadConfig(exits.head_configs[2].kind, shortlist=60, bits=None)
    exact = EarlyExitModel(exits.model, None, layers=(2, 4), head=config)
    exact.train_heads(sequences=texts[:20], epochs=1, batch_size=64)
    for name, tensor in exact.heads_in_use.state_dict().items():
        assert torch.equal(tensor, exact.heads.state_dict()[name])
        assert torch.equal(tensor, exits.heads.state_dict()[name]), "training is the same"
    rounded, own = exits.score(texts[:10]), exact.score(texts[:10])
    assert 0 < abs(rounded.scores - own.scores).max() < 0.05
    assert HeadConfig.of("linear").bits is None
    assert HeadConfig.of("mlp").bits == HeadConfig.of("adapter").bits == 8
    for wrong in (4, 16, 0, "8"):
        with pytest.raises(InputError, match="bits is"):
            HeadConfig(bits=wrong)


def test_heads_are_not_trained_again_to_be_rounded(texts, tmp_path):
    watched = []
    for bits in (8, None, 8):
        head = HeadConfig("mlp", shortlist=60, bits=bits)
        ee = EarlyExitModel(make_model(), None, layers=(2,), head=head)
        settings = {"sequences": texts[:20], "epochs": 1, "batch_size": 64, "cache": tmp_path}
        ee.train_heads(**settings, watch=watched.append)
        watched.append(bits)
    assert watched[-3:] == [8, None, 8]
    assert len(watched) > 3
    assert len([*tmp_path.glob("training-*")]) == 1


def test_what_is_stored_says_how_it_is_used(exits, texts, tmp_path):
    exits.save_pretrained(tmp_path / "heads")
    again = EarlyExitModel.from_pretrained(tmp_path / "heads", exits.model)
    assert again.head_configs == exits.head_configs
    assert (again.score(texts[:5]).scores == exits.score(texts[:5]).scores).all()
    config = json.loads((tmp_path / "heads" / "config.json").read_text())
    for head in config["heads"].values():
        assert head.pop("bits") == 8
    (tmp_path / "heads" / "config.json").write_text(json.dumps(config))
    older = EarlyExitModel.from_pretrained(tmp_path / "heads", exits.model)
    assert {head.bits for head in older.head_configs.values()} == {None}


def test_a_head_that_is_no_number_is_refused_when_it_is_asked(exits):
    ids = torch.arange(6, 12)[None]
    kept = exits.heads.after(4)
    weight = kept.linears()[0].weight if kept.linears() else kept.weight
    with torch.no_grad():
        before = weight.clone()
        weight[0, 0] = torch.nan
        exits._serving = None
        try:
            with pytest.raises(ModelError, match="the head after layer 4"):
                exits.generate(ids, max_new_tokens=4, thresholds=[torch.inf, 0.5])
        finally:
            weight.copy_(before)
            exits._serving = None
    exits.generate(ids, max_new_tokens=4, thresholds=[torch.inf, 0.5])
