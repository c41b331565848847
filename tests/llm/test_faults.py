"""What goes wrong while generating: a clear error, and everything usable afterwards."""

from __future__ import annotations

import copy

import pytest
import torch
from offramp import EarlyExitModel, HeadConfig, InputError, ModelError, OutOfMemoryError
from offramp.llm.cache import cache_argument
from offramp.llm.decoding import Exit, Rollout
from offramp.llm.stepping import Steps
from tiny import END, VOCAB, make_model
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel

NEW = 30


class Failing:
    """Stands in for a function and fails at one of its calls."""

    def __init__(self, function, at, error):
        self.function, self.at, self.error, self.calls = function, at, error, 0

    def __call__(self, *arguments, **keywords):
        self.calls += 1
        if self.calls == self.at:
            raise self.error
        return self.function(*arguments, **keywords)


def fail_in_layer(monkeypatch, trunk, layer, at, error):
    """Let a layer fail at its call number ``at``, after it wrote to its cache."""
    mine = trunk._lean.layers[layer] if trunk.is_lean else trunk.layers[layer]
    name = "run" if trunk.is_lean else "forward"
    count = 0

    def failing(run, runs_mine):
        def call(self, *arguments, **keywords):
            nonlocal count
            hidden = run(self, *arguments, **keywords)
            if runs_mine(self, *arguments):
                count += 1
                if count == at:
                    raise error
            return hidden

        return call

    alone = failing(getattr(type(mine), name), lambda self, *_: self is mine)
    monkeypatch.setattr(type(mine), name, alone)
    # Several in one call, where the core runs them; a head's own are prepared apart.
    among = failing(
        Steps.run,
        lambda self, _, first, caches, *__: (
            trunk._lean is not None and self is trunk._lean._steps and first <= layer < first + len(caches)
        ),
    )
    monkeypatch.setattr(Steps, "run", among)


def make_gpt2():
    """A random GPT-2 of the tiny Llama's sizes, which is decoded by its own modules."""
    torch.manual_seed(0)
    ends = {"eos_token_id": END, "pad_token_id": 0, "bos_token_id": 1}
    sizes = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 6, "n_head": 4, "n_positions": 160}
    model = GPT2LMHeadModel(GPT2Config(**sizes, **ends)).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.mul_(4)
    return model


MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory"),
    MemoryError(),
    RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"),
]


@pytest.fixture(scope="module", params=[make_model, make_gpt2], ids=["lean", "general"])
def exits(request, texts):
    """On a model of its own: other tests leave hooks on the shared one, which end the lean path."""
    ee = EarlyExitModel(request.param(), None, layers=(1, 3, 5), head=HeadConfig("mlp", shortlist=60))
    assert ee.trunk.is_lean == (request.param is make_model)
    ee.train_heads(sequences=texts[:20], epochs=1, batch_size=64)
    return ee


@pytest.fixture(params=["batch", "row"])
def prompts(request, prompts):
    """A padded batch, or a row by itself, whose segments are one call of the core."""
    ids, mask = prompts
    if request.param == "batch":
        return ids, mask
    assert mask[0].all()
    return ids[:1], mask[:1]


@pytest.mark.parametrize("mode", ["exit", "verify"])
@pytest.mark.parametrize("error", MEMORY, ids=["device", "python", "host"])
def test_running_out_of_memory_gets_a_sentence_and_leaves_everything_usable(
    exits, prompts, monkeypatch, mode, error
):
    ids, mask = prompts
    settings = {"attention_mask": mask, "max_new_tokens": NEW, "do_sample": False}
    own = exits.model.generate(ids, **settings)
    weights = {name: value.clone() for name, value in exits.model.state_dict().items()}
    expected = exits.generate(ids, mode=mode, thresholds=[0.3] * 3, **settings)
    fail_in_layer(monkeypatch, exits._trunk, 3, 4, error)
    with pytest.raises(
        OutOfMemoryError, match=rf"^out of memory in layers 4 to 5 over \d+ positions of {len(ids)} rows"
    ):
        exits.generate(ids, mode=mode, thresholds=[0.3] * 3, **settings)
    monkeypatch.undo()
    assert torch.equal(exits.generate(ids, mode=mode, thresholds=[0.3] * 3, **settings), expected)
    assert torch.equal(exits.model.generate(ids, **settings), own)
    assert all(torch.equal(value, weights[name]) for name, value in exits.model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in exits.model.modules())


def test_a_segment_that_failed_can_be_run_again(exits, prompts, monkeypatch):
    """Its inputs still wait, its layers have not kept half of the keys, and the cache comes out as the full model's."""
    ids, mask = prompts
    trunk, model = exits._trunk, exits.model
    heads = [Exit(layer, exits.heads_in_use.after(layer), 0.3) for layer in exits.layers]
    fail_in_layer(monkeypatch, trunk, 4, 3, MEMORY[0])
    tokens, failed = ids, 0
    with torch.no_grad():
        rollout = Rollout(trunk, heads, ids, mask)
        for _ in range(20):
            try:
                new = rollout.step(torch.ones(len(ids), dtype=torch.bool)).tokens
            except OutOfMemoryError:
                failed += 1
                assert len({rollout.cache.length(layer) for layer in (3, 4)}) == 1
                new = trunk.logits(rollout.flush()[:, -1]).argmax(dim=-1)
            rollout.feed(new)
            tokens = torch.cat([tokens, new[:, None]], dim=1)
        rollout.flush()
        mask = torch.cat([mask, mask.new_ones(len(ids), 20)], dim=1)
        cache = DynamicCache(config=model.config)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        model(
            input_ids=tokens,
            attention_mask=mask,
            position_ids=positions,
            **cache_argument(model.forward, cache),
        )
    assert failed == 1
    for mine, full in zip(rollout.cache.layers, cache.layers, strict=True):
        one, other = (layer.keys.transpose(1, 2)[mask.bool()] for layer in (mine, full))
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("where", ["head", "segment"])
def test_another_failure_half_way_is_passed_on_and_changes_nothing(exits, prompts, monkeypatch, where):
    ids, mask = prompts
    settings = {"attention_mask": mask, "max_new_tokens": NEW, "do_sample": False}
    before = exits.model.generate(ids, **settings)
    if where == "head":
        head = exits.heads_in_use.after(3)
        monkeypatch.setattr(head, "advance", Failing(head.advance, 5, KeyboardInterrupt()))
    else:
        fail_in_layer(monkeypatch, exits._trunk, 2, 5, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        exits.generate(ids, thresholds=[2, 0.3, 2], **settings)
    monkeypatch.undo()
    assert torch.equal(exits.model.generate(ids, **settings), before)
    assert torch.equal(exits.generate(ids, mode="off", **settings), before)


@pytest.mark.parametrize("mode", ["off", "exit", "verify"])
@pytest.mark.parametrize("sample", [False, True])
def test_a_model_whose_logits_are_nan_is_named(exits, prompts, monkeypatch, mode, sample):
    ids, mask = prompts
    settings = {
        "attention_mask": mask,
        "max_new_tokens": NEW,
        "thresholds": None if mode == "off" else [2, 2, 0.3],
    }
    logits, calls = exits._trunk.logits, 0

    def broken(hidden):
        nonlocal calls
        calls += 1
        found = logits(hidden)
        if calls == 3:
            found[..., -1, 7] = torch.nan
        return found

    monkeypatch.setattr(exits._trunk, "logits", broken)
    with pytest.raises(ModelError, match=r"^model: its last layer gave logits that are not numbers"):
        exits.generate(ids, mode=mode, do_sample=sample, **settings)
    monkeypatch.undo()
    own = exits.model.generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False)
    assert torch.equal(exits.generate(ids, mode="off", attention_mask=mask, max_new_tokens=NEW), own)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("mode", ["exit", "verify"])
def test_a_head_whose_logits_are_not_numbers_is_named(exits, prompts, monkeypatch, mode, value):
    head = exits.heads_in_use.after(3)
    logits = head.logits
    monkeypatch.setattr(head, "logits", lambda features: logits(features) * value)
    with pytest.raises(ModelError, match=r"^model: the head after layer 3 gave logits that are not numbers"):
        exits.generate(prompts[0], mode=mode, thresholds=[2, 0.3, 0.3], max_new_tokens=NEW)


def test_weights_that_are_nan_are_named_at_attach():
    model = make_model()
    model.model.layers[2].mlp.down_proj.weight[0, 0] = torch.nan
    with pytest.raises(ModelError, match="layer 3"):
        EarlyExitModel(model, layers=(2,))


def test_a_vocabulary_resized_after_attaching_is_noticed(texts, prompts):
    model = make_model()
    ee = EarlyExitModel(model, None, layers=(3,))
    model.resize_token_embeddings(120)
    with pytest.raises(ModelError, match="output layer was replaced"):
        ee.generate(prompts[0], mode="off", max_new_tokens=4)


def double(layer):
    layer.mlp.down_proj.weight = torch.nn.Parameter(2 * layer.mlp.down_proj.weight, requires_grad=False)


@pytest.mark.parametrize(
    "change",
    [
        double,
        lambda layer: setattr(layer.mlp, "down_proj", torch.nn.Linear(64, 32, bias=True)),
        lambda layer: layer.self_attn.register_forward_hook(lambda *_: None),
    ],
    ids=["weight", "module", "hook"],
)
def test_layers_changed_after_attaching_are_noticed(change, prompts):
    """Some of their parts would be used as they were, some as they are."""
    model = make_model()
    ee = EarlyExitModel(model, None, layers=(3,))
    change(model.model.layers[1])
    with pytest.raises(ModelError, match="its layers were changed after exits were attached"):
        ee.generate(prompts[0], mode="off", max_new_tokens=4)
    again = EarlyExitModel(model, None, layers=(3,)).generate(prompts[0], mode="off", max_new_tokens=4)
    assert torch.equal(again, model.generate(prompts[0], max_new_tokens=4, do_sample=False))


@pytest.mark.parametrize("make", [make_model, make_gpt2])
def test_a_layer_put_in_after_attaching_is_noticed(make, prompts):
    model = make()
    ee = EarlyExitModel(model, None, layers=(3,))
    stack = model.model.layers if make is make_model else model.transformer.h
    stack[1] = copy.deepcopy(stack[1])
    with pytest.raises(ModelError, match="its layers were changed after exits were attached"):
        ee.generate(prompts[0], mode="off", max_new_tokens=4)


def test_values_put_into_the_models_own_weights_count_at_once(prompts):
    model = make_model()
    ee = EarlyExitModel(model, None, layers=(3,))
    model.model.layers[1].mlp.down_proj.weight.data.mul_(2)
    found = ee.generate(prompts[0], mode="off", max_new_tokens=4)
    assert torch.equal(found, model.generate(prompts[0], max_new_tokens=4, do_sample=False))


def test_heads_for_another_vocabulary_are_refused(exits, tmp_path):
    exits.save_pretrained(tmp_path / "exits")
    with pytest.raises(
        ModelError, match="the heads are for a vocabulary of 89 tokens, and this model's has 120"
    ):
        EarlyExitModel.from_pretrained(tmp_path / "exits", make_model(vocab_size=120))


def test_a_prompt_that_fills_the_context_is_refused_before_anything_runs(exits):
    with pytest.raises(InputError, match="context window holds 160"):
        exits.generate(torch.full((1, 150), 7), mode="off", max_new_tokens=20)
