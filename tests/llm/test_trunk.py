"""Segments against the model's own forward, and models that must be refused."""

from __future__ import annotations

import pytest
import torch
from offramp import EarlyExitModel, InputError, ModelError
from offramp.llm import few
from offramp.llm.cache import GrowingCache
from offramp.llm.layer import LeanLayer
from offramp.llm.trunk import Trunk, positions_from_mask
from tiny import make_model, steps_by_the_core
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

SMALL = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def test_segments_compute_what_the_model_does(model):
    trunk = Trunk(model)
    tokens = torch.randint(0, 89, (2, 11), generator=torch.Generator().manual_seed(2))
    cache = trunk.new_cache()
    positions = torch.arange(11).expand(2, 11)
    hidden = trunk.embed(tokens, positions)
    for first, last in ((0, 2), (2, 5), (5, 6)):
        hidden = trunk.run(hidden, first, last, cache=cache, positions=positions)
    torch.testing.assert_close(trunk.logits(hidden), model(tokens).logits, rtol=1e-5, atol=1e-5)
    assert [cache.length(layer) for layer in range(6)] == [11] * 6


def test_several_rows_after_a_filled_cache_see_every_key(model):
    """The trap of a missing mask with several queries: keys before them would be dropped."""
    trunk = Trunk(model)
    tokens = torch.randint(0, 89, (1, 12), generator=torch.Generator().manual_seed(3))
    positions = torch.arange(12)[None]
    cache = trunk.new_cache()
    parts = [
        trunk.run(
            trunk.embed(tokens[:, rows], positions[:, rows]), 0, 6, cache=cache, positions=positions[:, rows]
        )
        for rows in (slice(0, 5), slice(5, 6), slice(6, 12))
    ]
    torch.testing.assert_close(
        trunk.logits(torch.cat(parts, dim=1)), model(tokens).logits, rtol=1e-5, atol=1e-5
    )


def test_positions_count_from_the_first_token():
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    assert positions_from_mask(mask).tolist() == [[0, 0, 0, 1], [0, 1, 2, 3]]


def test_a_relative_of_llama_is_proved_and_used():
    torch.manual_seed(0)
    qwen = Qwen2ForCausalLM(Qwen2Config(**SMALL, max_position_embeddings=64)).eval()
    ids = torch.randint(0, 50, (1, 6))
    ee = EarlyExitModel(qwen, layers=(1,))
    expected = qwen.generate(ids, max_new_tokens=10, do_sample=False)
    assert torch.equal(ee.generate(ids, max_new_tokens=10, mode="off"), expected)


@pytest.mark.parametrize("layer", [0, 3, 5])
def test_a_layer_that_computes_something_else_is_named(layer):
    model = make_model()
    attention = model.model.layers[layer].self_attn
    original = attention.forward

    def different(hidden_states, **kwargs):
        """Computes something else, but only when it is run with offramp's own cache."""
        output, weights = original(hidden_states, **kwargs)
        ours = any(isinstance(value, GrowingCache) for value in kwargs.values())
        return (output * 1.01 if ours else output), weights

    attention.forward = different
    with pytest.raises(ModelError, match=f"layer {layer + 1} differs"):
        EarlyExitModel(model, layers=(2, 4))


def test_the_lean_path_and_the_modules_compute_the_same():
    # A model of its own: other tests leave hooks on the shared one, which end the lean path.
    model = make_model()
    trunk = Trunk(model)
    assert trunk.is_lean
    tokens = torch.randint(0, 89, (2, 12), generator=torch.Generator().manual_seed(4))
    mask = torch.ones_like(tokens)
    mask[1, :3] = 0
    positions = positions_from_mask(mask)
    outputs = {}
    for short in (True, False):
        trunk = Trunk(model)
        trunk._lean = trunk._lean if short else None
        cache = trunk.new_cache()
        outputs[short] = torch.cat(
            [
                trunk.run(
                    trunk.embed(tokens[:, rows], positions[:, rows]),
                    0,
                    6,
                    cache=cache,
                    positions=positions[:, rows],
                    attention_mask=mask,
                )
                for rows in (slice(0, 5), slice(5, 6), slice(6, 12))
            ],
            dim=1,
        )[mask.bool()]
    torch.testing.assert_close(outputs[True], outputs[False], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("part", ["_attend", "_feed", "_add"])
def test_a_lean_path_that_deviates_is_given_up(monkeypatch, part):
    right = getattr(LeanLayer, part)
    monkeypatch.setattr(LeanLayer, part, lambda *arguments: 1.01 * right(*arguments))
    trunk = Trunk(make_model())
    assert trunk.is_lean
    trunk.prove((2, 4))
    assert not trunk.is_lean


@steps_by_the_core
def test_a_way_that_only_single_rows_go_is_proved_too(monkeypatch):
    right = few.apply_norm

    def wrong(rows, norm):
        return right(rows, norm) * (1.01 if rows.numel() == len(norm[0]) else 1)

    monkeypatch.setattr(few, "apply_norm", wrong)
    trunk = Trunk(make_model())
    assert trunk.is_lean
    trunk.prove((2, 4))
    assert not trunk.is_lean


def test_training_mode_is_named_as_the_reason():
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=3, n_head=4, vocab_size=50)).train()
    with pytest.raises(ModelError, match=r"differs from .* call model\.eval\(\) first"):
        EarlyExitModel(model, layers=(1,))
    EarlyExitModel(model.eval(), layers=(1,))


@pytest.mark.parametrize("share", [0.0, 1e-6])
def test_the_proof_says_how_far_off_it_was(monkeypatch, share):
    right = Trunk.logits
    monkeypatch.setattr(Trunk, "logits", lambda trunk, hidden: right(trunk, hidden) * (1 + share))
    trunk = Trunk(make_model())
    trunk._lean = None
    trunk.prove((2, 4))
    if share:
        assert trunk.deviation == pytest.approx(share, rel=0.2)
    else:
        assert trunk.deviation < 1e-6


def test_where_longer_texts_turn_all_keys_the_window_ends_before():
    torch.manual_seed(0)
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "rope_theta": 1e4}
    config = Phi3Config(
        **SMALL,
        max_position_embeddings=128,
        original_max_position_embeddings=16,
        rope_parameters=rope,
        pad_token_id=0,
    )
    model = Phi3ForCausalLM(config).eval()
    ee = EarlyExitModel(model, layers=(1,))
    ids = torch.randint(0, 50, (1, 9), generator=torch.Generator().manual_seed(1))
    expected = model.generate(ids, max_new_tokens=7, do_sample=False)
    assert torch.equal(ee.generate(ids, mode="off", max_new_tokens=7), expected)
    with pytest.raises(InputError, match="context window holds 16"):
        ee.generate(ids, mode="off", max_new_tokens=8)


@pytest.mark.parametrize("change", ["patched", "hooked"])
def test_unusual_layers_are_not_taken_apart(change):
    model = make_model()
    if change == "patched":
        model.model.layers[1].mlp.forward = model.model.layers[1].mlp.forward
    else:
        model.model.layers[1].self_attn.q_proj.register_forward_hook(lambda *_: None)
    trunk = Trunk(model)
    assert not trunk.is_lean
    trunk.prove((2, 4))


def test_proving_leaves_no_trace_on_the_model(model):
    hooks = [len(module._forward_hooks) for module in model.modules()]
    EarlyExitModel(model, layers=(2,))
    assert [len(module._forward_hooks) for module in model.modules()] == hooks


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            lambda: T5ForConditionalGeneration(T5Config(vocab_size=50, d_model=32, d_ff=32, num_layers=2)),
            "encoder-decoder",
        ),
        (lambda: make_model().model, "no output layer"),
        (lambda: torch.nn.Linear(2, 2), "give a Hugging Face causal language model"),
    ],
)
def test_models_without_the_structure_are_refused(make, words):
    with pytest.raises(ModelError, match=words):
        EarlyExitModel(make(), layers=(1,))


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        ((), "layers is"),
        ((0,), "layers contains 0"),
        ((6,), "exit can follow layers 1 to 5"),
        ((-1, 2), "layers contains -1"),
        ((3, 2), "from shallow to deep"),
        ((2, 2), "each once"),
        ((1.5,), "whole numbers"),
        ((True,), "whole numbers"),
        ("26", "whole numbers"),
    ],
)
def test_exits_outside_the_model_are_refused(model, layers, words):
    with pytest.raises(InputError, match=words):
        EarlyExitModel(model, layers=layers)
