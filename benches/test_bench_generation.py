"""The benches of whole generations, on a model of a moment: that they run, and see what is wrong."""

from __future__ import annotations

import itertools
import math

import generation
import heads
import lossless
import offramp
import pytest
import rounding
import torch
from offramp.llm import few
from offramp.llm.sequences import TokenSequence
from transformers import LlamaConfig, LlamaForCausalLM

TOKENS = 12


@pytest.fixture(scope="module")
def ee():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        eos_token_id=2,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.mul_(7)
    exits = offramp.EarlyExitModel(model, None, layers=(1, 3), head=offramp.HeadConfig("mlp", shortlist=50))
    texts = list(torch.randint(3, 61, (40, 20)))
    exits.train_heads(sequences=texts, epochs=4, batch_size=64)
    exits.calibrate(0.3, sequences=texts)
    return exits


@pytest.fixture
def prompts():
    return [torch.arange(3 + row, 9 + 2 * row) for row in range(5)]


def ours(ee):
    """Exits that take something, drafts that are rejected, and the plan's."""
    at = [list(ee.calibration.at(eps)) for eps in (0.2, 0.3)]
    return {
        generation.OFF: ("off", None),
        "eager": ("exit", at[0]),
        generation.VERIFY: ("verify", at[1]),
        generation.PLANNED_VERIFY: ("verify", at[0]),
    }


def test_the_order_is_drawn_for_each_prompt_and_the_same_after_an_interruption(ee):
    began = []
    runs = {
        name: lambda ids, tokens, name=name: began.append(name) or torch.cat((ids, ids), dim=1)
        for name in "abcd"
    }
    prompts = [torch.arange(3, 9)] * 40
    results = list(generation.race(ee, runs, prompts, TOKENS))
    assert [list(result) for result in results] == [[*"abcd"]] * 40
    turns = [began[start : start + 4] for start in range(4, len(began), 4)]
    assert all(sorted(turn) == [*"abcd"] for turn in turns)
    followed = {pair for turn in turns for pair in itertools.pairwise(turn)}
    assert len(followed) == 4 * 3
    began.clear()
    list(generation.race(ee, runs, prompts[:2], TOKENS, first=38))
    assert began[4:] == turns[38] + turns[39]


def test_exits_that_were_not_planned_can_be_left_out(ee):
    every, planned = (generation.modes(ee, [0.3, 0.4], planned_only=only) for only in (False, True))
    assert planned.keys() < every.keys()
    assert list(planned) == [
        generation.OFF,
        "offramp, planned exits at ε = 0.3",
        "offramp, planned exits at ε = 0.4",
        generation.PLANNED_VERIFY,
    ]
    runs = generation.contenders(ee, planned)
    generation.check(ee, runs, [torch.arange(3, 9)], TOKENS, 1e-4)

    def other(ids, tokens):
        text = runs[generation.OFF](ids, tokens).clone()
        text[0, -1] = 3 + text[0, -1] % 50
        return text

    wrong = runs | {generation.PLANNED_VERIFY: other}
    with pytest.raises(SystemExit, match="planned verify"):
        generation.check(ee, wrong, [torch.arange(3, 9)], TOKENS, 1e-4)


def test_the_race_shows_every_contender_with_both_gains_apart(ee, prompts):
    runs = generation.contenders(ee, ours(ee))
    generation.check(ee, runs, prompts[:2], TOKENS, 1e-4)
    for name, settings in generation.peers(ee).items():
        layer = generation.fastest(settings, prompts[0], TOKENS)
        assert layer in ee.layers
        runs[name] = settings[layer]
    results = list(generation.race(ee, runs, prompts[:3], TOKENS))
    swapped = [result | {generation.OFF: result["eager"]} for result in results]
    (parted,) = [row for row in generation.rows(ee, swapped) if row["name"] == generation.OFF]
    assert parted["widest_gap"] > 0
    found = list(generation.rows(ee, results))
    by_name = {row["name"]: row for row in found}
    assert by_name.keys() == runs.keys()
    assert by_name[generation.PLAIN]["over_transformers"] == by_name[generation.OFF]["over_exits_off"] == 1
    for name in (generation.PLAIN, generation.OFF, generation.VERIFY, "transformers assistant_early_exit"):
        assert by_name[name]["agreement"] == 1
        assert by_name[name]["same_text"] == 3
        assert math.isnan(by_name[name]["widest_gap"])
    early = by_name["eager"]
    assert sum(early["tokens_by_exit"].values()) > early["tokens_by_exit"][4]
    assert early["agreement"] < 1
    assert early["same_text"] < 3
    lines = list(generation.table(found))
    assert len(lines) == 2 + len(runs)
    assert len({line.count("|") for line in lines}) == 1


def test_what_was_timed_is_kept_by_dtype(ee, prompts, tmp_path):
    path = tmp_path / "race.jsonl"
    kept = generation.Kept(path, "float32")
    kept.add(settings={"ours": ours(ee), "peers": {}})
    runs = generation.contenders(ee, kept.settings["ours"])
    for result in generation.race(ee, runs, prompts[:2], TOKENS):
        kept.add(result=result)
    generation.Kept(path, "bfloat16").add(result={})
    again = generation.Kept(path, "float32")
    assert again.settings["ours"].keys() == kept.settings["ours"].keys()
    one, other = (list(generation.rows(ee, item.results)) for item in (kept, again))
    assert one == other


def test_what_writes_another_text_is_not_timed(ee, prompts):
    runs = generation.contenders(ee, ours(ee))
    runs[generation.VERIFY] = runs["eager"]
    with pytest.raises(SystemExit, match=r"^offramp, verify does not write what transformers writes"):
        generation.check(ee, runs, prompts, TOKENS, 1e-4)


@pytest.mark.parametrize("batch", [1, 2])
def test_verify_mode_is_compared_text_by_text(ee, prompts, batch):
    found = lossless.summary(list(lossless.compare(ee, prompts, TOKENS, batch, thresholds=[0.5, 0.0])), 1e-4)
    assert found["prompts"] == found["identical_texts"] == len(prompts)
    assert found["kept_drafts"] > 0
    assert found["rejected_drafts"] > 0
    assert found["wrong"] == 0


def test_a_text_that_is_not_the_models_own_is_seen(ee, prompts, monkeypatch):
    right = ee.generate
    monkeypatch.setattr(ee, "generate", lambda ids, mode, **ask: right(ids, mode="exit", **ask))
    found = lossless.summary(list(lossless.compare(ee, prompts, TOKENS, thresholds=[0.5, 0.0])), 1e-4)
    assert found["wrong"] == len(found["gaps_at_first_difference"]) > 0


def test_kinds_of_heads_are_judged_on_text(ee):
    assert heads.head_of("adapter:2@16384") == offramp.HeadConfig("adapter", depth=2, shortlist=16384)
    assert heads.head_of("mlp") == offramp.HeadConfig("mlp", shortlist=8192)
    texts = [TokenSequence(text, 4) for text in torch.randint(3, 61, (10, 20))]
    found = ee.score([TokenSequence(text.tokens[:14], 4) for text in texts])
    for row, correct in zip(heads.judged("mlp", ee, texts, 10, 2.0), found.correct, strict=True):
        assert row["tokens"] == 100
        assert row["ended"] == 0
        assert row["agreement"] == pytest.approx(correct.mean())
        assert 1 >= row["coverage_80"] >= row["coverage_90"] >= row["coverage_95"] >= 0


def test_heads_are_judged_rounded_and_as_they_were_trained(ee):
    texts = [TokenSequence(text, 4) for text in torch.randint(3, 61, (10, 20))]
    trained, own = ee.heads, ee.score(texts)
    try:
        found = list(rounding.judged(ee, texts, 1))
    finally:
        ee.heads = trained
    assert [(row["bits"], row["layer"]) for row in found] == [
        ("as trained", 1),
        ("as trained", 3),
        (8, 1),
        (8, 3),
    ]
    for row, correct in zip(found[2:], own.correct, strict=True):
        assert row["agreement"] == pytest.approx(correct.mean())
    for row in found:
        assert row["tokens"] == 160
        assert row["milliseconds"] > 0
        assert 1 >= row["coverage_80"] >= row["coverage_90"] >= row["coverage_95"] >= 0
    if few.IS_FAST:
        assert all(
            small["megabytes"] < large["megabytes"] / 3
            for small, large in zip(found[2:], found[:2], strict=True)
        )
