"""The engine against the model's own generate, and deferred caches against the full model's."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from offramp import EarlyExitModel, InputError, top2_margin
from offramp.llm.cache import GrowingCache, cache_argument
from offramp.llm.decoding import Exit, Rollout
from offramp.llm.sequences import TokenSequence
from tiny import VOCAB, byte_tokenizer
from transformers import (
    CompileConfig,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    SynthIDTextWatermarkingConfig,
    TextStreamer,
)
from transformers.cache_utils import DynamicCache

NEW = 40


def own(model, ids, mask, **kwargs):
    return model.generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, **kwargs)


def rows_of(output, prompt_length, mask):
    """Emitted sequences without padding, up to the last token that counts."""
    rows = []
    for sequence, layers, kept in zip(output.sequences, output.exit_layers, mask, strict=True):
        tokens = sequence[: prompt_length + int((layers > 0).sum())]
        padding = int((kept == 0).sum())
        rows.append(TokenSequence(tokens[padding:], prompt_length - padding))
    return rows


@pytest.mark.parametrize("mode", ["off", "never"])
def test_with_every_exit_off_the_tokens_are_the_models(trained, model, prompts, mode):
    ids, mask = prompts
    settings = {"mode": "off"} if mode == "off" else {"thresholds": [math.inf] * 3}
    output = trained.generate(ids, attention_mask=mask, max_new_tokens=NEW, **settings)
    assert torch.equal(output, own(model, ids, mask))
    for row in range(len(ids)):
        alone = ids[row : row + 1, int((mask[row] == 0).sum()) :]
        single = trained.generate(alone, max_new_tokens=NEW, **settings)
        assert torch.equal(single, own(model, alone, torch.ones_like(alone)))


@pytest.mark.parametrize("cap", [0, 1, 4, None])
def test_decoded_exits_are_the_teacher_forced_ones(trained, thresholds, prompts, cap):
    """What each position of the emitted text would do, from one pass of the full model, is what decoding did."""
    ids, mask = prompts
    output = trained.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=NEW,
        thresholds=thresholds,
        max_pending=cap,
        return_dict_in_generate=True,
    )
    rows = rows_of(output, ids.shape[1], mask)
    scores = trained.score(rows)
    exits = scores.first_exit(thresholds)
    depths = np.array([*trained.layers, trained.num_layers])[exits]
    decoded = torch.cat([layers[layers > 0] for layers in output.exit_layers]).numpy()
    gap = np.abs(scores.scores - np.array(thresholds)[:, None]).min(axis=0)
    assert ((depths == decoded) | (gap < 1e-5)).all()
    chosen = np.vstack([scores.choices, scores.model_choices[None]])[exits, np.arange(len(exits))]
    assert ((chosen == scores.emitted) | (depths != decoded)).all()
    # The test says something only if every depth occurs.
    assert set(decoded.tolist()) == {*trained.layers, trained.num_layers}


def test_caps_do_not_change_the_tokens(trained, thresholds, prompts):
    ids, mask = prompts
    outputs = [
        trained.generate(ids, attention_mask=mask, max_new_tokens=NEW, thresholds=thresholds, max_pending=cap)
        for cap in (0, 1, 4, None)
    ]
    assert all(torch.equal(outputs[0], other) for other in outputs[1:])


def rollout_of(trained, thresholds, ids, mask, cap=None):
    exits = [
        Exit(layer, trained.heads.after(layer), tau)
        for layer, tau in zip(trained.layers, thresholds, strict=True)
    ]
    return Rollout(trained._trunk, exits, ids, mask, cap)


@pytest.mark.parametrize("cap", [1, 4, None])
def test_the_flushed_cache_is_the_full_models(trained, model, thresholds, prompts, cap):
    ids, mask = prompts
    with torch.no_grad():
        rollout = rollout_of(trained, thresholds, ids, mask, cap)
        waited = 0
        tokens = ids
        for _ in range(25):
            step = rollout.step(torch.ones(len(ids), dtype=torch.bool))
            rollout.relieve()
            waiting = [rollout.pending(segment) for segment in range(1, 4)]
            waited = max(waited, *waiting)
            assert cap is None or max(waiting) <= cap
            rollout.feed(step.tokens)
            tokens = torch.cat([tokens, step.tokens[:, None]], dim=1)
        assert waited > 0
        rollout.flush()
        mask = torch.cat([mask, mask.new_ones(len(ids), 25)], dim=1)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        cache = DynamicCache(config=model.config)
        model(
            input_ids=tokens,
            attention_mask=mask,
            position_ids=positions,
            **cache_argument(model.forward, cache),
        )
    kept = mask.bool()
    for layer in range(trained.num_layers):
        for name in ("keys", "values"):
            mine = getattr(rollout.cache.layers[layer], name).transpose(1, 2)[kept]
            full = getattr(cache.layers[layer], name).transpose(1, 2)[kept]
            assert mine.shape == full.shape
            torch.testing.assert_close(mine, full, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", ["off", "exit", "verify"])
def test_the_cache_that_is_returned_serves_the_model_itself(trained, model, thresholds, prompts, mode):
    """The model goes on from it as from its own, whichever layers the tokens left after."""
    ids, mask = prompts
    settings = {"mode": mode, "thresholds": thresholds if mode != "off" else None, "max_new_tokens": 20}
    output = trained.generate(ids, attention_mask=mask, return_dict_in_generate=True, **settings)
    (cache,) = [value for value in output.values() if isinstance(value, GrowingCache)]
    length = output.sequences.shape[1]
    assert {cache.length(layer) for layer in range(6)} == {length - 1}
    more = {"attention_mask": torch.cat([mask, mask.new_ones(4, length - 9)], dim=1), "max_new_tokens": 8}
    expected = model.generate(output.sequences, do_sample=False, **more)
    cached = cache_argument(model.forward, cache)
    assert torch.equal(model.generate(output.sequences, do_sample=False, **more, **cached), expected)
    without = trained.generate(
        ids, attention_mask=mask, return_dict_in_generate=True, use_cache=False, **settings
    )
    assert not any(isinstance(value, GrowingCache) for value in without.values())


def test_a_batch_gives_what_its_rows_give_alone(trained, thresholds, prompts):
    ids, mask = prompts
    together = trained.generate(
        ids, attention_mask=mask, max_new_tokens=NEW, thresholds=thresholds, return_dict_in_generate=True
    )
    for row in range(len(ids)):
        alone = ids[row : row + 1, int((mask[row] == 0).sum()) :]
        single = trained.generate(
            alone, max_new_tokens=NEW, thresholds=thresholds, return_dict_in_generate=True
        )
        new = single.exit_layers.shape[1]
        assert torch.equal(single.sequences[0, alone.shape[1] :], together.sequences[row, 9 : 9 + new])
        assert torch.equal(single.exit_layers[0], together.exit_layers[row, :new])


def test_rows_that_end_at_different_steps_give_what_they_give_alone(trained, thresholds, prompts):
    ids, mask = prompts
    settings = {"max_new_tokens": NEW, "thresholds": thresholds, "return_dict_in_generate": True}
    text = trained.generate(ids, attention_mask=mask, **settings).sequences
    ends = text[:, 12:30:5].flatten().unique().tolist()
    together = trained.generate(ids, attention_mask=mask, eos_token_id=ends, **settings)
    lengths, depths = set(), set()
    for row in range(len(ids)):
        alone = ids[row : row + 1, int((mask[row] == 0).sum()) :]
        single = trained.generate(alone, eos_token_id=ends, **settings)
        new = single.exit_layers.shape[1]
        assert torch.equal(single.sequences[0, alone.shape[1] :], together.sequences[row, 9 : 9 + new])
        assert torch.equal(single.exit_layers[0], together.exit_layers[row, :new])
        assert not together.sequences[row, 9 + new :].any()  # padding
        assert not together.exit_layers[row, new:].any()
        lengths.add(new)
        depths |= set(single.exit_layers[0].tolist())
    assert len(lengths) > 2
    assert len(depths) > 2


def test_finished_rows_are_padded_and_ask_for_nothing(trained, model, thresholds, prompts):
    """With the most frequent tokens as ends, rows finish at different steps."""
    ids, mask = prompts
    ends = own(model, ids, mask)[:, 12:30:5].flatten().unique().tolist()
    expected = model.generate(
        ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, eos_token_id=ends
    )
    output = trained.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=NEW,
        mode="off",
        eos_token_id=ends,
        return_dict_in_generate=True,
    )
    assert torch.equal(output.sequences, expected)
    lengths = (output.exit_layers > 0).sum(dim=1)
    assert len(lengths.unique()) > 1
    assert output.stats.tokens == int(lengths.sum()) == sum(output.stats.tokens_by_exit.values())


def test_statistics_count_what_happened(trained, thresholds, prompts):
    ids, mask = prompts
    output = trained.generate(
        ids, attention_mask=mask, max_new_tokens=NEW, thresholds=thresholds, return_dict_in_generate=True
    )
    stats = output.stats
    assert stats is trained.last_stats
    for layer, count in stats.tokens_by_exit.items():
        assert count == int((output.exit_layers == layer).sum())
    assert stats.mean_layers == pytest.approx(
        output.exit_layers[output.exit_layers > 0].float().mean().item()
    )
    # Layer 1 runs every step, deeper layers only when a row needs them.
    steps = output.exit_layers.shape[1]
    assert steps < stats.layer_runs < steps * trained.num_layers
    assert stats.seconds > 0


def test_one_deep_row_takes_the_batch_along_but_not_its_exit(trained, thresholds, prompts):
    ids, mask = prompts
    output = trained.generate(
        ids, attention_mask=mask, max_new_tokens=NEW, thresholds=thresholds, return_dict_in_generate=True
    )
    assert any(len(column.unique()) > 1 for column in output.exit_layers.T)


def test_processors_and_stopping_act_as_in_transformers(trained, model, prompts):
    ids, mask = prompts
    settings = {
        "repetition_penalty": 1.3,
        "no_repeat_ngram_size": 3,
        "min_new_tokens": 5,
        "max_new_tokens": 30,
    }
    expected = model.generate(ids, attention_mask=mask, do_sample=False, **settings)
    assert torch.equal(trained.generate(ids, attention_mask=mask, mode="off", **settings), expected)


@pytest.mark.parametrize("mode", ["off", "verify"])
@pytest.mark.parametrize("place", ["given", "config", "the model's config"])
def test_stop_strings_end_rows(trained, model, thresholds, prompts, monkeypatch, mode, place):
    (ids, mask), tokenizer = prompts, byte_tokenizer(VOCAB)
    free = own(model, ids, mask)
    strings = [tokenizer.decode(row[12:14]) for row in free[:2]]
    expected = own(model, ids, mask, stop_strings=strings, tokenizer=tokenizer)
    settings = {"attention_mask": mask, "mode": mode, "max_new_tokens": NEW, "do_sample": False}
    settings |= {"thresholds": thresholds} if mode == "verify" else {}
    if place == "given":
        settings["stop_strings"] = strings
    elif place == "config":
        settings["generation_config"] = GenerationConfig(
            **{name: settings.pop(name) for name in ("max_new_tokens", "do_sample")}, stop_strings=strings
        )
    else:
        monkeypatch.setattr(model.generation_config, "stop_strings", strings)
    assert torch.equal(trained.generate(ids, tokenizer=tokenizer, **settings), expected)
    monkeypatch.setattr(trained, "tokenizer", tokenizer)
    assert torch.equal(trained.generate(ids, **settings), expected)
    assert not torch.equal(trained.generate(ids, **settings | {"stop_strings": None}), expected)


def test_stop_strings_end_rows_that_leave_early(trained, thresholds, prompts):
    (ids, mask), tokenizer = prompts, byte_tokenizer(VOCAB)
    settings = {"attention_mask": mask, "thresholds": thresholds, "max_new_tokens": NEW}
    free = trained.generate(ids[:1], **settings | {"attention_mask": mask[:1]})
    text = tokenizer.decode(free[0, 15:18])
    ended = trained.generate(
        ids[:1], stop_strings=text, tokenizer=tokenizer, **settings | {"attention_mask": mask[:1]}
    )
    assert ended.shape[1] <= 18 < free.shape[1]
    assert torch.equal(ended, free[:, : ended.shape[1]])
    assert tokenizer.decode(ended[0]).endswith(text)


class Grammar(LogitsProcessor):
    """Allows these tokens at even positions, those at odd ones, and bans the rest by a score of its own."""

    def __init__(self, even, odd, banned):
        self.sides, self.banned = (even, odd), banned

    def __call__(self, input_ids, scores):
        outside = torch.ones(scores.shape[1], dtype=torch.bool)
        outside[self.sides[input_ids.shape[1] % 2]] = False
        return scores.masked_fill(outside, self.banned)


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("cap", [0, None])
@pytest.mark.parametrize("mode", ["exit", "verify"])
@pytest.mark.parametrize("by", ["the model's call", -math.inf, torch.finfo(torch.float32).min])
def test_where_a_head_has_no_allowed_token_the_whole_model_answers(
    trained, model, prompts, mode, cap, sampled, by
):
    """Grammars allow few tokens, and a shortlist may hold none of them."""
    ids, mask = prompts
    listed = trained.heads.after(1).shortlist.tolist()
    foreign = [token for token in range(6, VOCAB) if token not in listed][:3]
    settings = {
        "attention_mask": mask,
        "max_new_tokens": 12,
        "eos_token_id": None,
        "do_sample": sampled,
    }
    if sampled:
        # It cannot be asked about nothing.
        settings["eta_cutoff"] = 1e-3
    # In turns: what any head can emit, and what none can.
    if by == "the model's call":
        settings["prefix_allowed_tokens_fn"] = lambda _, text: foreign if len(text) % 2 else listed
    else:
        settings["logits_processor"] = LogitsProcessorList([Grammar(listed, foreign, by)])
    output = trained.generate(
        ids,
        mode=mode,
        thresholds=[-1.0] * 3,
        max_pending=cap,
        return_dict_in_generate=True,
        **settings,
    )
    new = output.sequences[:, 9:]
    assert torch.isin(new[:, 0::2], torch.tensor(foreign)).all()
    assert torch.isin(new[:, 1::2], torch.tensor(listed)).all()
    assert (output.exit_layers[:, 0::2] == trained.num_layers).all()
    if mode == "exit":
        assert (output.exit_layers[:, 1::2] == 1).all()
    if not sampled and mode == "verify":
        assert torch.equal(output.sequences, model.generate(ids, **settings))


def test_guidance_works_with_exits_off(trained, model, prompts):
    ids = prompts[0][:1]
    settings = {"guidance_scale": 1.5, "max_new_tokens": 12, "do_sample": False}
    expected = model.generate(ids, **settings)
    assert not torch.equal(expected, model.generate(ids, **settings | {"guidance_scale": None}))
    assert torch.equal(trained.generate(ids, mode="off", **settings), expected)


def test_sampling_with_a_seed_is_transformers_sampling_when_off(trained, model, prompts):
    ids, mask = prompts
    settings = {"do_sample": True, "temperature": 0.8, "top_k": 20, "max_new_tokens": 20}
    torch.manual_seed(11)
    expected = model.generate(ids, attention_mask=mask, **settings)
    torch.manual_seed(11)
    assert torch.equal(trained.generate(ids, attention_mask=mask, mode="off", **settings), expected)


@pytest.mark.parametrize("mode", ["exit", "verify"])
def test_a_prompt_is_answered_as_often_as_asked(trained, model, thresholds, prompts, mode):
    ids, mask = prompts
    asked = {"attention_mask": mask, "num_return_sequences": 3, "max_new_tokens": 8, "do_sample": True}
    torch.manual_seed(3)
    own = model.generate(ids, **asked)
    for taus in (thresholds, [2.0] * 3):
        torch.manual_seed(3)
        said = trained.generate(ids, mode=mode, thresholds=taus, **asked)
        assert torch.equal(said[:, : ids.shape[1]], ids.repeat_interleave(3, dim=0))
        assert len({tuple(row.tolist()) for row in said}) > len(ids)
    if mode == "exit":
        assert torch.equal(said, own)  # the exits were off


@pytest.mark.parametrize("mode", ["exit", "verify"])
def test_time_that_is_up_ends_the_text(trained, thresholds, prompts, mode):
    ids, mask = prompts
    said = trained.generate(
        ids, attention_mask=mask, mode=mode, thresholds=thresholds, max_new_tokens=50, max_time=1e-9
    )
    assert said.shape[1] == ids.shape[1] + 1


def test_sampled_exits_emit_only_tokens_their_head_can(trained, thresholds, prompts):
    ids, mask = prompts
    output = trained.generate(
        ids,
        attention_mask=mask,
        thresholds=thresholds,
        do_sample=True,
        temperature=2.0,
        max_new_tokens=NEW,
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
    )
    listed = trained.heads.after(1).shortlist
    early = (output.exit_layers > 0) & (output.exit_layers < trained.num_layers)
    assert early.any()
    assert torch.isin(output.sequences[:, 9:][early], listed).all()
    assert len(output.scores) == len(output.logits) == output.exit_layers.shape[1]
    first_early = early[:, 0].nonzero().flatten()
    for row in first_early.tolist():
        finite = output.logits[0][row].isfinite().nonzero().flatten()
        assert torch.equal(finite, listed)


def test_the_streamer_sees_every_token(trained, thresholds, prompts):
    class Recorder(TextStreamer):
        def __init__(self):
            self.parts, self.ended = [], False

        def put(self, value):
            self.parts.append(value.reshape(-1))

        def end(self):
            self.ended = True

    ids = prompts[0][:1]
    recorder = Recorder()
    output = trained.generate(ids, max_new_tokens=12, thresholds=thresholds, streamer=recorder)
    assert recorder.ended
    assert torch.equal(torch.cat(recorder.parts), output[0])


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"mode": "fast"}, "mode is 'fast'"),
        ({"eps": 1.5}, "eps is 1.5"),
        ({"eps": 0.9, "thresholds": [1, 1, 1]}, "eps and thresholds are both given"),
        ({"thresholds": 0.5}, "one number for each of the 3 exits"),
        ({"thresholds": ["x"] * 3}, "one number for each of the 3 exits"),
        ({"thresholds": [0.5]}, "one number for each of the 3 exits"),
        ({"thresholds": [0.5, math.nan, 0.5]}, "thresholds is"),
        ({"max_pending": -1}, "max_pending is -1"),
        ({"num_beams": 3}, "beam search"),
        ({"penalty_alpha": 0.6, "top_k": 4}, "contrastive search"),
        ({"prompt_lookup_num_tokens": 3}, "assisted generation"),
        ({"assistant_early_exit": 2}, "assisted generation"),
        ({"dola_layers": "high"}, "DoLa"),
        ({"force_words_ids": [[5]], "num_beams": 2}, "constrained search"),
        ({"output_hidden_states": True}, "output_hidden_states are not kept"),
        ({"output_attentions": True}, "output_attentions and"),
        ({"attention_mask": torch.ones(4)}, r"attention_mask is not a \(4, 9\) tensor"),
        ({"attention_mask": torch.ones(4, 8)}, r"attention_mask is not a \(4, 9\) tensor"),
        ({"token_type_ids": torch.zeros(4, 9)}, "token_type_ids cannot be used"),
        ({"token_healing": True}, "token_healing rewrites the prompt"),
        ({"generation_config": GenerationConfig(token_healing=True)}, "token_healing rewrites the prompt"),
        ({"stop_strings": ["a"]}, "stop_strings need the model's tokenizer"),
        ({"stop_strings": []}, "stop_strings is empty"),
        ({"guidance_scale": 1.5}, "guidance_scale cannot be used with exits"),
        ({"mode": "verify", "guidance_scale": 1.5}, "guidance_scale cannot be used with exits"),
        (
            {
                "mode": "verify",
                "watermarking_config": SynthIDTextWatermarkingConfig(keys=[1, 2, 3], ngram_len=3),
            },
            "SynthID watermarking cannot be used with exits",
        ),
        ({"position_ids": torch.arange(9)[None]}, "position_ids cannot be used"),
        ({"cache": DynamicCache()}, "cache cannot be used"),
        ({"max_new_tokens": 500}, "context window holds 160"),
        ({"past_key_values": DynamicCache()}, "past_key_values cannot be used"),
        ({"cache_implementation": "static"}, "cache_implementation is 'static': offramp keeps"),
        ({"cache_implementation": "quantized"}, "cache_implementation is 'quantized'"),
        ({"cache_config": {"nbits": 4}}, "cache_config is"),
        ({"prefill_chunk_size": 4}, "prefill_chunk_size is 4"),
        ({"compile_config": CompileConfig()}, "compile_config is"),
        (
            {"generation_config": GenerationConfig(cache_implementation="offloaded")},
            "cache_implementation is 'offloaded'",
        ),
    ],
)
def test_bad_arguments_get_a_sentence(trained, prompts, kwargs, words):
    with pytest.raises(InputError, match=words):
        trained.generate(prompts[0], **({"max_new_tokens": 4} | kwargs))


def test_a_cache_nobody_asked_for_is_no_reason_to_refuse(trained, model, prompts, monkeypatch):
    """Gemma's own generation_config names one."""
    ids, mask = prompts
    settings = {"attention_mask": mask, "mode": "off", "max_new_tokens": 10}
    expected = trained.generate(ids, **settings)
    assert torch.equal(trained.generate(ids, cache_implementation="dynamic", **settings), expected)
    monkeypatch.setattr(model.generation_config, "cache_implementation", "static")
    assert torch.equal(trained.generate(ids, **settings), expected)
    brought = copy.deepcopy(model.generation_config)
    assert torch.equal(trained.generate(ids, generation_config=brought, **settings), expected)


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        (None, "input_ids is not"),
        (torch.zeros(3, dtype=torch.int64), "input_ids is not"),
        (torch.zeros((1, 0), dtype=torch.int64), "input_ids is not"),
        (torch.full((1, 4), 89), "vocabulary has 89 tokens"),
        (torch.tensor([[5, -1, 7]]), "holds token -1"),
        (torch.full((1, 4), -1), "vocabulary has 89 tokens"),
        (torch.full((1, 160), 7), "context window holds 160"),
    ],
)
def test_bad_prompts_get_a_sentence(trained, ids, words):
    with pytest.raises(InputError, match=words):
        trained.generate(ids, max_new_tokens=4)


def test_prompts_are_continued_until_there_are_enough_tokens(model, prompts):
    """Continuations that end early must not leave prompts behind."""
    ee = EarlyExitModel(model, layers=(2,))
    ends = own(model, *prompts)[:, 12:30:2].flatten().unique().tolist()
    starts = [torch.full((3,), token) for token in range(6, 76)]
    model.generation_config.eos_token_id, kept = ends, model.generation_config.eos_token_id
    try:
        written = ee.continue_greedily(starts, tokens=300, max_new_tokens=50)
        everything = ee.continue_greedily(starts, tokens=10**6, max_new_tokens=50)
    finally:
        model.generation_config.eos_token_id = kept
    assert (
        sum(item.generated for item in written[:6]) < 300
    )  # what six full-length continuations would have given
    assert 300 <= sum(item.generated for item in written) < 400
    assert [item.tokens[:3].tolist() for item in everything] == [item.tolist() for item in starts]
    assert [item.tokens.tolist() for item in written] == [
        item.tokens.tolist() for item in everything[: len(written)]
    ]


@pytest.mark.parametrize(
    ("starts", "words"),
    [
        ([], "prompts need a tokenizer"),
        ([torch.tensor([3, 89])], r"prompts\[0\] holds token 89"),
        ([torch.full((160,), 7)], "context window holds 160"),
    ],
)
def test_starts_that_cannot_be_continued_get_a_sentence(model, starts, words):
    with pytest.raises(InputError, match=words):
        EarlyExitModel(model, layers=(2,)).continue_greedily(starts)


def test_rows_that_stop_in_another_way_than_by_a_token_go_on_as_in_transformers(trained, model, prompts):
    ids, mask = prompts

    class StopOneByOne(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.arange(len(input_ids)) * 3 < input_ids.shape[1] - 12

    settings = {
        "attention_mask": mask,
        "max_new_tokens": NEW,
        "do_sample": False,
        "eos_token_id": None,
        "stopping_criteria": StoppingCriteriaList([StopOneByOne()]),
    }
    kept, model.generation_config.eos_token_id = model.generation_config.eos_token_id, None
    try:
        expected = model.generate(ids, **settings)
        assert torch.equal(trained.generate(ids, mode="off", **settings), expected)
    finally:
        model.generation_config.eos_token_id = kept
    assert expected.shape[1] < 9 + NEW


@pytest.mark.parametrize("rows", [1, 4])
def test_a_margin_equal_to_its_threshold_exits(trained, prompts, rows):
    ids = prompts[0][:rows]
    head = trained.heads.after(3)
    needed = torch.ones(rows, dtype=torch.bool)
    with torch.no_grad():
        probe = Rollout(trained._trunk, [Exit(3, head, math.inf)], ids)
        _, margins = top2_margin(head(probe.run(0)[:, -1]))
        margin = float(margins.max())
        for threshold, exits in ((margin, True), (math.nextafter(margin, 2), False)):
            step = Rollout(trained._trunk, [Exit(3, head, threshold)], ids).step(needed)
            assert step.exits.tolist() == [
                0 if exits and value == margin else 1 for value in margins.tolist()
            ]


@pytest.mark.parametrize("cap", [0, 2])
def test_the_cap_holds_before_every_segment_when_every_token_leaves_at_once(trained, prompts, cap):
    with torch.no_grad():
        rollout = rollout_of(trained, [-1.0, 2.0, 2.0], *(part[:1] for part in prompts), cap)
        for _ in range(12):
            step = rollout.step(torch.ones(1, dtype=torch.bool))
            assert step.exits.tolist() == [0]
            rollout.relieve()
            assert max(rollout.pending(segment) for segment in range(1, 4)) <= cap
            rollout.feed(step.tokens)
