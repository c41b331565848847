"""Verify mode: whatever the heads draft, the output is the whole model's own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from offramp import EarlyExitModel, HeadConfig, InputError
from offramp.llm import verifying
from offramp.llm.cache import cache_argument
from scipy import stats
from tiny import make_model
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    TextStreamer,
    TopPLogitsWarper,
)

NEW = 30


@pytest.fixture(params=[None, 0, 1, 4], ids=lambda cap: f"cap {cap}")
def cap(request):
    return request.param


def test_greedy_output_is_the_models_own(trained, model, thresholds, prompts, cap):
    ids, mask = prompts
    own = model.generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False)
    output = trained.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=NEW,
        mode="verify",
        thresholds=thresholds,
        max_pending=cap,
        return_dict_in_generate=True,
    )
    assert torch.equal(output.sequences, own)
    assert output.stats.rejected_drafts > 0
    # Drafts that hold are kept as what they are.
    assert set(output.exit_layers.flatten().tolist()) - {0, trained.num_layers}
    assert output.stats.tokens == sum(output.stats.tokens_by_exit.values())
    assert output.exit_layers.shape[1] == output.sequences.shape[1] - ids.shape[1]


@pytest.mark.parametrize("row", range(4))
def test_one_row_alone(trained, model, thresholds, prompts, row, cap, monkeypatch):
    drafted, append = [], verifying._Text._append
    monkeypatch.setattr(
        verifying._Text, "_append", lambda text, *given: drafted.append(given) or append(text, *given)
    )
    ids = prompts[0][row : row + 1, int((prompts[1][row] == 0).sum()) :]
    own = model.generate(ids, max_new_tokens=NEW, do_sample=False)
    assert torch.equal(
        trained.generate(ids, max_new_tokens=NEW, mode="verify", thresholds=thresholds, max_pending=cap), own
    )
    # Every draft is kept or refused.
    found = trained.last_stats
    kept = int((found.exit_layers < trained.num_layers).sum())
    assert found.rejected_drafts == len(drafted) - kept


def test_heads_that_are_always_sure_and_always_wrong_cost_only_time(trained, model, prompts):
    ids, mask = prompts
    own = model.generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False)
    output = trained.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=NEW,
        mode="verify",
        thresholds=[0.0] * 3,
        return_dict_in_generate=True,
    )
    assert torch.equal(output.sequences, own)
    assert output.stats.rejected_drafts > NEW


@pytest.mark.parametrize("sure", [0, 1, 2])
def test_the_cap_holds_wherever_drafts_wait(trained, prompts, cap, sure, monkeypatch):
    """Of a head that takes every token that reaches it, drafts wait right behind it."""
    waited = []
    feed = verifying._Text.feed

    def noted(text):
        waited.append(max(text.rollout.pending(segment) for segment in range(1, 4)))
        feed(text)

    monkeypatch.setattr(verifying._Text, "feed", noted)
    trained.generate(
        prompts[0][:1],
        max_new_tokens=NEW,
        mode="verify",
        thresholds=[1.0] * sure + [0.0] * (3 - sure),
        max_pending=cap,
    )
    # Without a cap the prompt waits with the first drafts.
    assert max(waited) > 9 if cap is None else max(waited) == cap


def test_rows_that_end_at_different_steps(trained, model, thresholds, prompts, cap):
    ids, mask = prompts
    text = model.generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False)
    ends = text[:, 12:30:5].flatten().unique().tolist()
    settings = {"attention_mask": mask, "max_new_tokens": NEW, "do_sample": False, "eos_token_id": ends}
    own = model.generate(ids, **settings)
    output = trained.generate(
        ids, mode="verify", thresholds=thresholds, max_pending=cap, return_dict_in_generate=True, **settings
    )
    assert torch.equal(output.sequences, own)
    lengths = (output.exit_layers > 0).sum(dim=1)
    assert len(lengths.unique()) > 1
    assert output.stats.tokens == int(lengths.sum())


def test_processors_act_on_confirmed_text(trained, model, thresholds, prompts, cap):
    ids, mask = prompts
    settings = {
        "attention_mask": mask,
        "repetition_penalty": 1.3,
        "no_repeat_ngram_size": 3,
        "min_new_tokens": 5,
        "max_new_tokens": NEW,
        "do_sample": False,
    }
    own = model.generate(ids, **settings)
    mine = trained.generate(ids, mode="verify", thresholds=thresholds, max_pending=cap, **settings)
    assert torch.equal(mine, own)


class NotTwice(LogitsProcessor):
    """The user's own: no token above the one before it by an even number."""

    def __call__(self, input_ids, scores):
        above = torch.arange(scores.shape[1]) - input_ids[:, -1:]
        return scores.masked_fill((above >= 0) & (above % 2 == 0), -torch.inf)


class OneByOne(StoppingCriteria):
    """The user's own: each row after another number of tokens."""

    def __call__(self, input_ids, scores, **kwargs):
        return torch.arange(len(input_ids)) * 4 < input_ids.shape[1] - 14


def own_settings(mask, ends):
    """All that a user can bring, as transformers takes it."""
    config = GenerationConfig(
        max_new_tokens=NEW, do_sample=False, repetition_penalty=1.1, eos_token_id=ends, pad_token_id=0
    )
    return {
        "attention_mask": mask,
        "generation_config": config,
        "logits_processor": LogitsProcessorList([NotTwice()]),
        "stopping_criteria": StoppingCriteriaList([OneByOne()]),
    }


@pytest.mark.parametrize("stops", [False, True])
def test_the_users_own_config_processors_and_criteria_act_on_confirmed_text(
    trained, model, thresholds, prompts, cap, stops
):
    ids, mask = prompts
    settings = own_settings(mask, [5, 7])
    if not stops:
        del settings["stopping_criteria"]
    own = model.generate(ids, **settings)
    assert not torch.equal(own, model.generate(ids, **{**settings, "logits_processor": None}))
    output = trained.generate(
        ids, mode="verify", thresholds=thresholds, max_pending=cap, return_dict_in_generate=True, **settings
    )
    assert torch.equal(output.sequences, own)
    assert (own.shape[1] < 9 + NEW) == stops
    assert output.stats.tokens_by_exit[trained.num_layers] < output.stats.tokens
    assert output.stats.rejected_drafts > 0


def test_the_users_own_config_processors_and_criteria_act_on_exits(trained, thresholds, prompts):
    ids, mask = prompts
    settings = own_settings(mask, [5, 7])
    output = trained.generate(ids, thresholds=thresholds, return_dict_in_generate=True, **settings)
    early = (output.exit_layers > 0) & (output.exit_layers < trained.num_layers)
    assert early.any()
    kept = output.exit_layers > 0
    steps = output.sequences[:, 9:] - output.sequences[:, 8:-1]
    assert ((steps < 0) | (steps % 2 == 1))[kept].all()
    for row, new in enumerate(kept.sum(dim=1).tolist()):
        assert new == 6 + 4 * row or (new < 6 + 4 * row and output.sequences[row, 8 + new] in (5, 7))
    plainly = {"max_new_tokens": NEW, "repetition_penalty": 1.1, "eos_token_id": [5, 7], "pad_token_id": 0}
    del settings["generation_config"]
    assert torch.equal(trained.generate(ids, thresholds=thresholds, **settings, **plainly), output.sequences)


@pytest.mark.parametrize("mode", ["exit", "verify"])
def test_top_p_samples_alike_from_one_seed_and_leaves_the_first_choice_where_it_is_small(
    trained, model, thresholds, prompts, mode
):
    ids, mask = prompts
    settings = {"attention_mask": mask, "mode": mode, "thresholds": thresholds}
    texts = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        config = GenerationConfig(
            max_new_tokens=NEW, do_sample=True, top_p=0.9, temperature=1.5, pad_token_id=0
        )
        texts.append(trained.generate(ids, generation_config=config, **settings))
    assert torch.equal(texts[0], texts[1])
    assert not torch.equal(texts[0], texts[2])
    first = trained.generate(ids, do_sample=False, max_new_tokens=NEW, **settings)
    sampled = trained.generate(ids, do_sample=True, top_p=1e-6, max_new_tokens=NEW, **settings)
    assert torch.equal(sampled, first)
    own = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=NEW)
    assert torch.equal(first, own) == (mode == "verify")


def test_the_streamer_sees_confirmed_tokens_only(trained, thresholds, prompts):
    class Recorder(TextStreamer):
        def __init__(self):
            self.parts, self.ended = [], False

        def put(self, value):
            self.parts.append(value)

        def end(self):
            self.ended = True

    for rows in (1, len(prompts[0])):
        ids, mask = (part[:rows] for part in prompts)
        recorder = Recorder()
        output = trained.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=NEW,
            mode="verify",
            thresholds=thresholds,
            streamer=recorder,
        )
        assert recorder.ended
        # As transformers hands them over: the prompts, then one token of every row at a time.
        assert torch.equal(recorder.parts[0], ids)
        assert all(part.shape == (rows,) for part in recorder.parts[1:])
        assert torch.equal(torch.stack(recorder.parts[1:], dim=1), output[:, ids.shape[1] :])


def test_keys_and_values_are_the_full_models_after_rejections(
    trained, model, thresholds, prompts, monkeypatch
):
    kept = []
    judge = verifying._Text
    monkeypatch.setattr(verifying, "_Text", lambda *arguments: kept.append(judge(*arguments)) or kept[-1])
    ids, mask = prompts
    output = trained.generate(
        ids, attention_mask=mask, max_new_tokens=NEW, mode="verify", thresholds=thresholds
    )
    rollout = kept[0].rollout
    mask = torch.cat([mask, mask.new_ones(len(ids), NEW)], dim=1)[:, : output.shape[1] - 1]
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(
            input_ids=output[:, :-1],
            attention_mask=mask,
            position_ids=positions,
            **cache_argument(model.forward, cache),
        )
    for mine, full in zip(rollout.cache.layers, cache.layers, strict=True):
        for name in ("keys", "values"):
            one, other = (getattr(layer, name).transpose(1, 2)[mask.bool()] for layer in (mine, full))
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kept", [1.0, 0.8])
def test_sampling_has_the_full_models_distribution(kept):
    """Pairs of sampled tokens, counted over thousands of rows, against the exact probabilities."""
    model = make_model(vocab_size=8, eos_token_id=None, pad_token_id=0)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.mul_(0.5)
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(0, 8, (20,), generator=generator) for _ in range(20)]
    ee = EarlyExitModel(model, None, layers=(2, 4), head=HeadConfig("mlp", shortlist=6))
    ee.train_heads(sequences=texts, epochs=1, learning_rate=1e-3)
    thresholds = [float(np.median(ee.score(texts).scores[0])), 0.0]
    rows = 4000
    prompt = torch.tensor([[1, 5, 2]])
    with torch.no_grad():
        cut = TopPLogitsWarper(kept) if kept < 1 else lambda _, scores: scores
        first = cut(prompt, model(prompt).logits[:, -1] / 0.9).softmax(-1)[0]
        longer = torch.cat([prompt.expand(8, 3), torch.arange(8)[:, None]], dim=1)
        second = cut(longer, model(longer).logits[:, -1] / 0.9).softmax(-1)
    expected = (first[:, None] * second).flatten().numpy().astype(float)
    counts = {}
    for mode in ("verify", "exit"):
        torch.manual_seed(3)
        output = ee.generate(
            prompt.expand(rows, 3).contiguous(),
            mode=mode,
            thresholds=thresholds,
            do_sample=True,
            temperature=0.9,
            top_k=0,
            top_p=kept,
            max_new_tokens=3,
            return_dict_in_generate=True,
        )
        pairs = output.sequences[:, 3] * 8 + output.sequences[:, 4]
        counts[mode] = np.bincount(pairs.numpy(), minlength=64)
        if mode == "verify":
            assert output.stats.rejected_drafts > 100
            assert all(output.stats.tokens_by_exit.values())
    large = expected * rows >= 5

    def p_value(observed):
        kept = np.append(observed[large], observed[~large].sum())
        wanted = np.append(expected[large], expected[~large].sum()) * rows
        if wanted[-1] == 0:
            kept, wanted = kept[:-1], wanted[:-1]
        return stats.chisquare(kept, wanted * kept.sum() / wanted.sum()).pvalue

    assert p_value(counts["verify"]) > 1e-3
    assert counts["verify"][expected == 0].sum() == 0
    assert (expected == 0).any() == (kept < 1)
    # The test can fail: plain exits sample from the heads.
    assert p_value(counts["exit"]) < 1e-6


def test_a_rejection_gives_what_the_draft_took_too_much_of():
    """Drafts from q, kept or replaced, are as if drawn from p; and as many are kept as can be."""
    rows = 200_000
    torch.manual_seed(5)
    logits = torch.tensor([1.0, 0.3, -0.5, 2.0, -3.0, 0.0, 0.7, -1.0])
    q = torch.tensor([0.3, 0.0, 0.1, 0.2, 0.1, 0.0, 0.15, 0.15])
    p = logits.softmax(-1)
    rule = verifying._Rule(LogitsProcessorList(), sample=True, vocab_size=8)
    drafts = torch.multinomial(q, rows, replacement=True)
    ids = torch.zeros(rows, 1, dtype=torch.int64)
    stands, own = rule.judge(ids, logits.expand(rows, 8), drafts=drafts, q=q.expand(rows, 8))
    counts = torch.where(stands, drafts, own).bincount(minlength=8)
    assert stats.chisquare(counts.numpy(), p.double().numpy() / float(p.double().sum()) * rows).pvalue > 1e-3
    kept = float(torch.minimum(p, q).sum())
    # From p itself every draft is kept, and nothing is left to draw another from.
    same = torch.multinomial(p, rows, replacement=True)
    assert rule.judge(ids, logits.expand(rows, 8), drafts=same, q=p.expand(rows, 8))[0].all()
    assert int(stands.sum()) == pytest.approx(kept * rows, abs=4 * (rows * kept * (1 - kept)) ** 0.5)


def test_scores_are_refused(trained, thresholds, prompts):
    with pytest.raises(InputError, match="verify mode"):
        trained.generate(
            prompts[0],
            mode="verify",
            thresholds=thresholds,
            max_new_tokens=4,
            return_dict_in_generate=True,
            output_scores=True,
        )
