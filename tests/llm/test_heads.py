"""Heads with attention of their own: exact for the emitted sequence however decoding went, and kinds users bring."""

from __future__ import annotations

import copy
import math

import numpy as np
import offramp
import pytest
import torch
from offramp import EarlyExitModel, ExitHead, HeadConfig, InputError, register_head
from offramp.llm import few
from offramp.llm.decoding import Exit, Rollout
from offramp.llm.heads import AdapterHead, make_head
from offramp.llm.reading import Reader
from offramp.llm.sequences import TokenSequence
from offramp.llm.stepping import Steps
from offramp.llm.storage import load_exits
from offramp.llm.trunk import Trunk
from test_families import FAMILIES, make
from tiny import make_model
from torch import nn

NEW = 30


@pytest.fixture(scope="module")
def adapted(model, texts):
    """Adapters after layers 1, 3 and 5 of 6."""
    ee = EarlyExitModel(model, None, layers=(1, 3, 5), head=HeadConfig("adapter", shortlist=60))
    ee.train_heads(sequences=texts, epochs=2, batch_size=64, seed=3)
    ee.calibrate(0.5, sequences=texts)
    return ee


@pytest.fixture(scope="module")
def taus(adapted, texts):
    scores = adapted.score(texts).scores
    return [float(np.quantile(row, share)) for row, share in zip(scores, (0.75, 0.6, 0.5), strict=True)]


def rows_of(output, prompt_length, mask):
    rows = []
    for sequence, layers, kept in zip(output.sequences, output.exit_layers, mask, strict=True):
        padding = int((kept == 0).sum())
        tokens = sequence[padding : prompt_length + int((layers > 0).sum())]
        rows.append(TokenSequence(tokens, prompt_length - padding))
    return rows


@pytest.mark.parametrize("lean", [True, False])
@pytest.mark.parametrize("depth", [1, 2])
def test_an_adapter_that_maps_perfectly_is_the_model(depth, lean, monkeypatch):
    """Untrained, fed what the model's last layers are fed, whole and in pieces, padded on the left."""
    trunk = Trunk(make_model())
    trunk.prove((2,))
    assert trunk.is_lean
    if not lean:
        monkeypatch.setattr(trunk, "_lean", None)
    head = make_head(trunk, HeadConfig("adapter", shortlist=None, depth=depth), None).requires_grad_(False)
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(6, 89, (3, 14), generator=generator)
    mask = torch.ones_like(tokens)
    mask[1, :4] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        output = trunk.model(tokens, attention_mask=mask, position_ids=positions, output_hidden_states=True)
        hidden = output.hidden_states[6 - depth]
        whole = head(hidden[[0, 2]])
        torch.testing.assert_close(whole, output.logits[[0, 2]], rtol=1e-4, atol=1e-4)
        state = head.new_state()
        for start, end in ((0, 6), (6, 7), (7, 11), (11, 14)):
            found = head.advance(hidden[:, start:end], state, positions[:, start:end], mask)
            torch.testing.assert_close(head.logits(found), output.logits[:, end - 1], rtol=1e-4, atol=1e-4)
        state.crop(8)
        found = head.advance(hidden[:, 8:12], state, positions[:, 8:12], mask)
        torch.testing.assert_close(head.logits(found), output.logits[:, 11], rtol=1e-4, atol=1e-4)
        assert state.length == 12


def test_rows_that_waited_stop_at_the_attention_of_the_last_layer(monkeypatch):
    """Of what a head reads before it answers only the newest row is asked for."""
    trunk = Trunk(make_model())
    head = make_head(trunk, HeadConfig("adapter", shortlist=None, depth=2), None).requires_grad_(False)
    hidden = torch.randn(2, 9, trunk.hidden_size, generator=torch.Generator().manual_seed(1))
    positions = torch.arange(9).expand(2, 9)
    state = head.new_state()
    head.advance(hidden[:, :4], state, positions[:, :4], None)
    rows = {}

    def watched(normed, weight, bias, _narrow=None):
        rows[id(weight)] = len(normed)
        return torch.nn.functional.linear(normed, weight, bias)

    monkeypatch.setattr("offramp.llm.layer.linear", watched)
    head.advance(hidden[:, 4:], state, positions[:, 4:], None)
    first, last = head.layers
    every, newest = 2 * 5, 2
    for layer, below in ((first, every), (last, newest)):
        attention, block = layer.self_attn, layer.mlp
        before = (attention.q_proj, attention.k_proj, attention.v_proj)
        after = (attention.o_proj, block.gate_proj, block.up_proj, block.down_proj)
        assert {rows[id(part.weight)] for part in before} == {every}
        assert {rows[id(part.weight)] for part in after} == {below}


@pytest.mark.parametrize("learns", [True, False])
def test_a_head_that_failed_half_way_reads_its_rows_again(monkeypatch, learns):
    """After keys and values were added, of which nothing may be left; where nothing is learnt, by the core."""
    trunk = Trunk(make_model())
    head = make_head(trunk, HeadConfig("adapter", shortlist=None, depth=2), None).requires_grad_(False)
    hidden = torch.randn(1, 8, trunk.hidden_size, generator=torch.Generator().manual_seed(1))
    positions = torch.arange(8)[None]
    answers, run = [], Steps.run

    def fail(*given):
        if len(given) > 1:
            run(*given)
        raise ZeroDivisionError

    failing = {"head": (head, "finish", fail), "core": (Steps, "run", fail)}
    for fails in (False, True):
        reader = Reader(head)
        for start, end in ((0, 5), (5, 7), (7, 8)):
            reader.see(hidden[:, start:end])
            with torch.set_grad_enabled(learns):
                if fails:
                    where = "core" if start and not learns and few.IS_FAST else "head"
                    with monkeypatch.context() as patched:
                        patched.setattr(*failing[where])
                        with pytest.raises(ZeroDivisionError):
                            reader.answer(positions[:, :end], None)
                    assert reader.state.length == start
                answers.append(reader.answer(positions[:, :end], None))
            assert reader.state.length == end
    for mine, expected in zip(answers[3:], answers[:3], strict=True):
        assert torch.equal(mine, expected)


@torch.no_grad()
def test_a_kind_that_finishes_in_its_own_way_does_so_in_decoding_too():
    @register_head("doubled")
    class Doubled(AdapterHead):
        def finish(self, hidden):
            return 2 * super().finish(hidden)

    trunk = Trunk(make_model())
    head = make_head(trunk, HeadConfig("doubled", shortlist=None), None)
    hidden = torch.randn(1, 8, trunk.hidden_size, generator=torch.Generator().manual_seed(1))
    positions, reader = torch.arange(8)[None], Reader(head)
    for start, end in ((0, 5), (5, 6), (6, 8)):
        reader.see(hidden[:, start:end])
        found = reader.answer(positions[:, :end], None)
    torch.testing.assert_close(found[0], head(hidden)[0, -1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("cap", [0, 3, None])
def test_decoded_exits_are_the_teacher_forced_ones(adapted, taus, prompts, cap):
    ids, mask = prompts
    output = adapted.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=NEW,
        thresholds=taus,
        max_pending=cap,
        return_dict_in_generate=True,
    )
    scores = adapted.score(rows_of(output, ids.shape[1], mask))
    exits = scores.first_exit(taus)
    depths = np.array([1, 3, 5, 6])[exits]
    decoded = torch.cat([layers[layers > 0] for layers in output.exit_layers]).numpy()
    gap = np.abs(scores.scores - np.array(taus)[:, None]).min(axis=0)
    assert ((depths == decoded) | (gap < 1e-5)).all()
    chosen = np.vstack([scores.choices, scores.model_choices[None]])[exits, np.arange(len(exits))]
    assert ((chosen == scores.emitted) | (depths != decoded)).all()
    assert set(decoded.tolist()) == {1, 3, 5, 6}


def test_a_batch_gives_what_its_rows_give_alone(adapted, taus, prompts):
    ids, mask = prompts
    settings = {"thresholds": taus, "max_new_tokens": NEW, "return_dict_in_generate": True}
    together = adapted.generate(ids, attention_mask=mask, **settings)
    for row in range(len(ids)):
        alone = ids[row : row + 1, int((mask[row] == 0).sum()) :]
        single = adapted.generate(alone, **settings)
        new = single.exit_layers.shape[1]
        assert torch.equal(single.sequences[0, alone.shape[1] :], together.sequences[row, 9 : 9 + new])
        assert torch.equal(single.exit_layers[0], together.exit_layers[row, :new])


@pytest.mark.parametrize("cap", [0, 2, None])
def test_what_a_head_has_read_is_the_emitted_text(adapted, taus, prompts, cap):
    """Keys and values after steps, flushes and rewinds, against one reading of the whole sequence."""
    ids, mask = prompts
    with torch.no_grad():
        exits = [Exit(at, adapted.heads.after(at), tau) for at, tau in zip((1, 3, 5), taus, strict=True)]
        rollout = Rollout(adapted._trunk, exits, ids, mask, cap)
        needed = torch.ones(len(ids), dtype=torch.bool)
        tokens, waited = ids, 0
        for turn in range(24):
            step = rollout.step(needed)
            rollout.relieve()
            waited = max(waited, *(reader.waiting for reader in rollout.readers))
            assert cap is None or max(reader.waiting for reader in rollout.readers) <= cap
            rollout.feed(step.tokens)
            tokens = torch.cat([tokens, step.tokens[:, None]], dim=1)
            if turn % 8 == 7:
                rollout.flush()
                waited = max(waited, *(reader.waiting for reader in rollout.readers))
                kept = tokens.shape[1] - 3
                rollout.rewind(kept)
                tokens = tokens[:, : kept + 1]
                rollout.feed(tokens[:, -1])
        rollout.flush()
        whole = torch.cat([mask, mask.new_ones(len(ids), tokens.shape[1] - 9)], dim=1)
        positions = (whole.cumsum(-1) - 1).clamp(min=0)
        hidden = adapted.model(
            tokens, attention_mask=whole, position_ids=positions, output_hidden_states=True
        ).hidden_states
        for reader, at in zip(rollout.readers, (1, 3, 5), strict=True):
            reader.catch_up(rollout.positions, rollout.mask)
            state = reader.head.new_state()
            reader.head.advance(hidden[at], state, positions, whole)
            assert reader.state.length == state.length == tokens.shape[1]
            for name in ("keys", "values"):
                mine, expected = (getattr(held.cache.layers[5], name) for held in (reader.state, state))
                assert mine.shape == expected.shape
                real = whole.bool()[:, None, :, None].expand_as(mine)
                torch.testing.assert_close(mine[real], expected[real], rtol=1e-4, atol=1e-4)
    assert waited > 0


def test_verified_text_is_the_models(adapted, taus, model, prompts):
    ids, mask = prompts
    own = model.generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False)
    for cap in (None, 3):
        mine = adapted.generate(
            ids, attention_mask=mask, max_new_tokens=NEW, thresholds=taus, mode="verify", max_pending=cap
        )
        assert torch.equal(mine, own)
        assert adapted.last_stats.tokens_by_exit[1] > 0
        assert adapted.last_stats.rejected_drafts > 0


@pytest.mark.parametrize("cap", [3, None])
def test_little_waits_before_a_head_that_is_never_asked(adapted, model, prompts, cap, monkeypatch):
    """In verify mode its rows come with the flushes, while a shallower head drafts everything."""
    unread, feed = [], Rollout.feed

    def noted(rollout, tokens):
        unread.append(max(reader.waiting for reader in rollout.readers))
        feed(rollout, tokens)

    monkeypatch.setattr(Rollout, "feed", noted)
    settings = {"max_new_tokens": NEW, "thresholds": [0.0] * 3, "max_pending": cap}
    mine = adapted.generate(prompts[0][:1], mode="verify", **settings)
    assert torch.equal(mine, model.generate(prompts[0][:1], max_new_tokens=NEW, do_sample=False))
    assert max(unread) > 9 if cap is None else max(unread) <= cap


def test_an_adapter_knows_more_than_its_layer_by_itself(adapted, texts):
    """It is worth having attention: shuffled earlier tokens change what it says, which they could not otherwise."""
    sequence = texts[0]
    other = sequence.clone()
    other[:20] = other[torch.arange(19, -1, -1)]
    found = []
    for tokens in (sequence, other):
        hidden = adapted.model(tokens[None], output_hidden_states=True).hidden_states[1]
        found.append(adapted.heads.after(1)(hidden)[0, -1])
    assert not torch.allclose(found[0], found[1], atol=1e-3)


def test_adapters_are_stored_without_what_is_the_models(adapted, texts, tmp_path, monkeypatch):
    adapted.save_pretrained(tmp_path / "x")
    saved = load_exits(tmp_path / "x")
    assert not [
        name for name in saved.tensors if ".norm." in name or name.split(".", 1)[-1] in ("weight", "bias")
    ]
    own = {name: tensor for name, tensor in saved.tensors.items() if name[0].isdigit()}
    assert sum("shortlist" in name for name in own) == 3
    stored = sum(tensor.numel() for name, tensor in own.items() if "shortlist" not in name)
    layer = sum(parameter.numel() for parameter in adapted.model.model.layers[5].parameters())
    assert stored == 3 * (layer + 32 * 32 + 32)
    again = EarlyExitModel.from_pretrained(tmp_path / "x", model=adapted.model)
    assert again.head_configs == adapted.head_configs
    first, second = (ee.score(texts[:5]) for ee in (adapted, again))
    assert np.array_equal(first.scores, second.scores)
    assert again.calibration.thresholds == adapted.calibration.thresholds


def test_the_plan_counts_what_a_head_reads(adapted, texts):
    adapted.calibrate(0.5, sequences=texts)
    plan = adapted.plan(measure=0)
    assert all(len(costs) == 8 and min(costs) > 0 for costs in plan.costs.heads)
    # Sixteen times the rows are more work for a head that reads them all, whatever the noise.
    assert all(plan.costs.head(index, 512) > 4 * plan.costs.head(index, 1) for index in range(3))


def test_costs_count_what_is_read(model, adapted, trained):
    linear = make_head(Trunk(model), HeadConfig("linear", shortlist=None), None)
    assert linear.cost()["multiply_adds"] == 89 * 32
    assert linear.cost()["parameters"] == 89 * 32 + 32
    head = adapted.heads.after(3)
    matrices = 2 * 32 * 32 + 2 * 16 * 32 + 3 * 64 * 32
    assert head.cost()["multiply_adds"] == matrices + 32 * 32 + 60 * 32
    assert head.cost()["bytes"] == 4 * head.cost()["parameters"]
    half = copy.deepcopy(head).to(torch.bfloat16)
    assert half.cost()["bytes"] == 2 * head.cost()["parameters"]


def test_half_precision_heads_decode(model, texts):
    """Heads are cast with the model, lean layers and all."""
    half = make_model().to(torch.bfloat16)
    ee = EarlyExitModel(half, None, layers=(3,), head=HeadConfig("adapter", shortlist=60))
    ee.train_heads(sequences=texts[:20], epochs=1, batch_size=64)
    ee.calibrate(0.5, sequences=texts[:20])
    ids = torch.stack(texts[:6])[:, :9]
    for mode in ("exit", "verify"):
        ee.generate(ids, max_new_tokens=12, thresholds=[-1.0], mode=mode)
        assert ee.last_stats.tokens_by_exit[3] > 0
    assert ee.heads.after(3).linear.weight.dtype == torch.float32


class _Running(ExitHead):
    """A user's kind with memory: the mean of all rows so far, and a trained map."""

    def __init__(self, trunk, config, shortlist, rows=None):
        super().__init__(trunk, config, shortlist, rows)
        self.map = nn.Linear(trunk.hidden_size, trunk.hidden_size, bias=config.options["bias"])

    def read(self, hidden, picked):
        counts = torch.arange(1, hidden.shape[1] + 1, device=hidden.device)[:, None]
        return self.map((hidden.cumsum(dim=1) / counts)[picked])

    def new_state(self):
        return _Sum()

    def advance(self, hidden, state, positions, mask):
        state.rows += list(hidden.unbind(dim=1))
        return self.map(torch.stack(state.rows).mean(dim=0))


class _Sum:
    def __init__(self):
        self.rows = []

    @property
    def length(self):
        return len(self.rows)

    def crop(self, length):
        del self.rows[length:]


def test_a_kind_of_the_users_own_does_everything_the_shipped_ones_do(model, texts, tmp_path):
    with pytest.raises(InputError, match="register"):
        HeadConfig("running-mean")
    register_head("running-mean")(_Running)
    register_head("running-mean")(_Running)
    head = HeadConfig("running-mean", shortlist=60, options={"bias": True})
    ee = EarlyExitModel(model, None, layers=(1, 4), head=head)
    ee.train_heads(sequences=texts, epochs=2, batch_size=64)
    ee.calibrate(0.5, sequences=texts)
    scores = ee.score(texts[:8])
    ids = texts[0][None, :9]
    taus = [float(np.quantile(row, 0.6)) for row in scores.scores]
    out = ee.generate(ids, max_new_tokens=NEW, thresholds=taus, return_dict_in_generate=True)
    exits = ee.score([TokenSequence(out.sequences[0], 9)]).first_exit(taus)
    assert np.array([1, 4, 6])[exits].tolist() == out.exit_layers[0].tolist()
    assert len(set(exits.tolist())) > 1
    own = model.generate(ids, max_new_tokens=NEW, do_sample=False)
    assert torch.equal(ee.generate(ids, max_new_tokens=NEW, thresholds=taus, mode="verify"), own)
    ee.save_pretrained(tmp_path / "mine")
    again = EarlyExitModel.from_pretrained(tmp_path / "mine", model=model)
    assert np.array_equal(again.score(texts[:8]).scores, scores.scores)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_norm_from_scratch_does_nothing_but_normalise(family):
    trunk = Trunk(make(family))
    for parameter in trunk.norm.parameters():
        parameter.uniform_(0.3, 3)
    head = make_head(trunk, HeadConfig("linear", shortlist=None, init="scratch"), None)
    hidden = torch.randn(5, trunk.hidden_size, generator=torch.Generator().manual_seed(0))
    hidden -= hidden.mean(dim=-1, keepdim=True)
    hidden /= hidden.square().mean(dim=-1, keepdim=True).sqrt()
    torch.testing.assert_close(head.features(hidden), hidden, rtol=1e-3, atol=1e-4)
    assert all(parameter.requires_grad for parameter in head.parameters())


def test_kinds_that_are_none_are_refused(model):
    with pytest.raises(InputError, match="subclass of ExitHead"):
        register_head("x")(nn.Linear)
    with pytest.raises(InputError, match="another head of this name"):
        register_head("mlp")(_Running)
    # Nor by a class that has the name of the one that is there.
    with pytest.raises(InputError, match="another head of this name"):
        register_head("mlp")(type("MLPHead", (ExitHead,), {"__qualname__": "MLPHead"}))
    with pytest.raises(InputError, match="depth is 6"):
        EarlyExitModel(model, None, layers=(2,), head=HeadConfig("adapter", depth=6)).train_heads(
            sequences=[[3, 4, 5]]
        )
    with pytest.raises(InputError, match="depth is 0"):
        HeadConfig("adapter", depth=0)
    assert math.isfinite(offramp.HeadConfig.of("adapter").shortlist)
