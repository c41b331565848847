"""Every family on a tiny random model of its config: attached, decoded, and compared with the model's own generate."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
from offramp import EarlyExitModel, HeadConfig, ModelError
from offramp.llm import few
from offramp.llm.cache import cache_argument
from offramp.llm.decoding import Exit, Rollout
from offramp.llm.heads import make_head
from offramp.llm.lean import normed
from offramp.llm.sequences import TokenSequence
from offramp.llm.trunk import Trunk, positions_from_mask

VOCAB = 83
LLAMA = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MULTI_HEAD = LLAMA | {"num_key_value_heads": 4}
GPT = {
    "vocab_size": VOCAB,
    "n_positions": 128,
    "n_embd": 32,
    "n_layer": 4,
    "n_head": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FALCON = {name: LLAMA[name] for name in LLAMA if name not in ("intermediate_size", "num_key_value_heads")}
GEMMA = LLAMA | {"head_dim": 8, "sliding_window": 6}
ALTERNATING = ["sliding_attention", "full_attention"] * 2
# The model's class in transformers, without ForCausalLM or LMHeadModel, and its config.
FAMILIES = {
    "Llama": LLAMA,
    "Mistral": LLAMA,
    "Mistral, sliding": LLAMA | {"sliding_window": 5},
    "Qwen2": LLAMA,
    "Qwen2, sliding": LLAMA | {"use_sliding_window": True, "sliding_window": 5, "layer_types": ALTERNATING},
    "Qwen3": LLAMA | {"head_dim": 8},
    "Qwen3, sliding": LLAMA
    | {"head_dim": 8, "use_sliding_window": True, "sliding_window": 5, "layer_types": ALTERNATING},
    "Phi": MULTI_HEAD,
    "Phi3": LLAMA,
    "Phi3, sliding": LLAMA | {"sliding_window": 5},
    "Gemma2": GEMMA | {"query_pre_attn_scalar": 8, "final_logit_softcapping": 5.0},
    "Gemma2, uncapped": GEMMA | {"query_pre_attn_scalar": 8, "attn_logit_softcapping": None},
    "Gemma3": GEMMA | {"query_pre_attn_scalar": 8, "layer_types": ALTERNATING},
    "GPT2": GPT,
    "GPTNeoX": {name: value for name, value in LLAMA.items() if name != "num_key_value_heads"},
    "OPT": {
        name: value
        for name, value in LLAMA.items()
        if name not in ("intermediate_size", "num_key_value_heads")
    }
    | {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0},
    "Falcon": FALCON | {"new_decoder_architecture": False, "multi_query": True, "alibi": False},
    "Falcon, alibi": FALCON | {"new_decoder_architecture": False, "multi_query": False, "alibi": True},
    "Olmo2": LLAMA,
    "Granite": LLAMA | {"logits_scaling": 4.0, "embedding_multiplier": 3.0, "residual_multiplier": 0.7},
    "SmolLM3": LLAMA | {"no_rope_layers": [1, 0, 1, 0]},
    "Cohere": MULTI_HEAD | {"logit_scale": 0.25},
    "Cohere, normed": MULTI_HEAD | {"logit_scale": 0.25, "use_qk_norm": True},
    "Cohere2": LLAMA | {"logit_scale": 0.25, "sliding_window": 5, "layer_types": ALTERNATING},
    "StableLm": LLAMA,
    "Bloom": {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "n_layer": 4,
        "n_head": 4,
        "pad_token_id": 0,
        "bos_token_id": 1,
    }
    | {"eos_token_id": 2},
}

# What decodes by the model's own modules; all others take the lean path.
GENERAL = {"Gemma2", "GPT2", "GPTNeoX", "OPT", "Falcon", "Falcon, alibi", "Cohere2", "Bloom"}


def make(family):
    name = family.split(",")[0]
    settings = FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(transformers, "Gemma3TextConfig" if name == "Gemma3" else f"{name}Config")(**settings)
    kind = getattr(transformers, f"{name}LMHeadModel", None) or getattr(transformers, f"{name}ForCausalLM")
    model = kind(config).eval().requires_grad_(False)
    # Peaked logits, which can be told apart.
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.mul_(4)
    return model


@pytest.fixture(scope="module", params=FAMILIES)
def model(request):
    return make(request.param)


@pytest.fixture(scope="module")
def texts():
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, VOCAB, (20,), generator=generator) for _ in range(20)]


@pytest.fixture(scope="module")
def ee(model, texts):
    exits = EarlyExitModel(model, None, layers=(1, 3), head=HeadConfig("mlp", shortlist=60))
    exits.train_heads(sequences=texts, epochs=1, batch_size=64)
    return exits


def batch():
    """Three prompts of different lengths, longer than every sliding window."""
    ids = torch.randint(3, VOCAB, (3, 12), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    for row, padding in enumerate((0, 4, 1)):
        ids[row, :padding] = 0
        mask[row, :padding] = 0
    return ids, mask


def test_the_lean_path_is_taken_where_the_family_is_described(request, ee):
    assert ee._trunk.is_lean == (request.node.callspec.params["model"] not in GENERAL)


def test_with_exits_off_tokens_are_those_of_generate(model, ee):
    ids, mask = batch()
    for rows in (slice(0, 1), slice(0, 3)):
        settings = {"attention_mask": mask[rows], "max_new_tokens": 20, "do_sample": False}
        own = model.generate(ids[rows], **settings)
        assert torch.equal(ee.generate(ids[rows], mode="off", **settings), own)


@pytest.fixture(scope="module")
def thresholds(ee, texts):
    """Each head takes half of all tokens, whatever it knows."""
    return [float(value) for value in np.median(ee.score(texts).scores, axis=1)]


def test_verified_tokens_are_those_of_generate(model, ee, thresholds):
    ids, mask = batch()
    rejected = 0
    for rows in (slice(0, 1), slice(0, 3)):
        settings = {"attention_mask": mask[rows], "max_new_tokens": 20, "do_sample": False}
        own = model.generate(ids[rows], **settings)
        # The second head drafts whatever the first leaves.
        assert torch.equal(
            ee.generate(ids[rows], mode="verify", thresholds=[thresholds[0], 0.0], **settings), own
        )
        rejected += ee.last_stats.rejected_drafts
    assert rejected > 0


def test_decoded_exits_are_the_teacher_forced_ones_and_rows_do_as_they_do_alone(ee, thresholds):
    """Exit mode has no generate to compare with: one pass of the full model over what was written says what is due."""
    check_decoded(ee, thresholds)


def check_decoded(ee, thresholds):
    ids, mask = batch()
    settings = {"thresholds": thresholds, "max_new_tokens": 20, "return_dict_in_generate": True}
    together = ee.generate(ids, attention_mask=mask, **settings)
    taken = set()
    for row, layers in enumerate(together.exit_layers):
        padding, new = int((mask[row] == 0).sum()), int((layers > 0).sum())
        tokens = together.sequences[row, padding : ids.shape[1] + new]
        alone = ee.generate(ids[row : row + 1, padding:], **settings)
        assert torch.equal(alone.sequences[0], tokens)
        assert torch.equal(alone.exit_layers[0], layers[:new])
        scores = ee.score([TokenSequence(tokens, ids.shape[1] - padding)])
        due = scores.first_exit(thresholds)
        depths = np.array([*ee.layers, ee.num_layers])
        gap = np.abs(scores.scores - np.array(thresholds)[:, None]).min(axis=0)
        decoded = layers[:new].numpy()
        assert ((depths[due] == decoded) | (gap < 1e-5)).all()
        chosen = np.vstack([scores.choices, scores.model_choices[None]])[due, np.arange(new)]
        assert ((chosen == scores.emitted) | (gap < 1e-5)).all()
        taken |= set(decoded.tolist())
    assert len(taken) > 1


def test_keys_and_values_under_exits_are_the_full_models(model, ee, thresholds):
    ids, mask = batch()
    trunk = Trunk(model)
    trunk.prove((1, 3))
    exits = [
        Exit(layer, ee.heads.after(layer), threshold)
        for layer, threshold in zip((1, 3), thresholds, strict=True)
    ]
    with torch.no_grad():
        rollout = Rollout(trunk, exits, ids, mask)
        tokens, depths = [ids], set()
        for _ in range(15):
            step = rollout.step(torch.ones(3, dtype=torch.bool))
            depths |= set(step.exits.tolist())
            tokens.append(step.tokens[:, None])
            rollout.feed(step.tokens)
        rollout.flush()
        ids = torch.cat(tokens, dim=1)
        mask = torch.cat([mask, torch.ones(3, 15, dtype=mask.dtype)], dim=1)
        # A cache without windows, so that every key is there to compare.
        own = transformers.DynamicCache()
        model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions_from_mask(mask),
            **cache_argument(model.forward, own),
        )
    assert len(depths) > 1
    for mine, theirs in zip(rollout.cache.layers, own.layers, strict=True):
        for name in ("keys", "values"):
            one, other = (getattr(layer, name).transpose(1, 2)[mask.bool()] for layer in (mine, theirs))
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", sorted({*FAMILIES} - GENERAL))
@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("narrow", [False, True])
def test_a_head_reads_and_learns_by_the_lean_path_what_it_does_by_modules(family, depth, narrow, monkeypatch):
    """Some rows of whole sequences, one, none, a sequence of one, and the gradients of all that is trained."""
    trunk = Trunk(make(family))
    trunk.prove((1,))
    torch.manual_seed(3)
    head = make_head(trunk, HeadConfig("adapter", shortlist=None, depth=depth), None).eval()
    assert trunk.lean_form(list(head.layers)) is not None
    hidden = torch.randn(3, 11, trunk.hidden_size)
    several = torch.tensor([0, 0, 0, 1, 2, 2]), torch.tensor([10, 7, 8, 0, 3, 9])
    one, none = (torch.tensor([1]), torch.tensor([10])), (torch.tensor([], dtype=torch.int64),) * 2
    cases = [(hidden, several), (hidden, one), (hidden, none), (hidden[:1, :1], (one[0] * 0, one[0] * 0))]

    def found(hidden, picked):
        head.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=narrow):
            features = head.read(hidden, picked).float()
        (features * torch.linspace(-1, 1, features.numel()).view_as(features)).sum().backward()
        return [features.detach(), *(value.grad for value in head.parameters() if value.grad is not None)]

    # Tables of angles made here must do for training, too.
    with torch.inference_mode():
        head.read(torch.randn(2, 40, trunk.hidden_size), one)
    short = [found(*case) for case in cases]
    monkeypatch.setattr(trunk, "_lean", None)
    for mine, modules in zip(short, [found(*case) for case in cases], strict=True):
        assert len(mine) == len(modules) > 8
        for value, other in zip(mine, modules, strict=True):
            if not narrow:
                largest = float(other.abs().max()) if other.numel() else 0.0
                torch.testing.assert_close(value, other, rtol=1e-4, atol=1e-4 * largest)
            else:
                assert float((value - other).norm()) <= 0.1 * float(other.norm()) + 1e-6


@pytest.mark.parametrize("family", sorted({*FAMILIES} - GENERAL))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_norm_of_a_few_rows_is_the_modules(family, dtype, monkeypatch):
    """By the core, where it is fast; many rows, gradients and what users add are the module's own."""
    norm = Trunk(make(family)).norm.to(dtype)
    rows = 7 * torch.randn(20, 32, generator=torch.Generator().manual_seed(1)).to(dtype)
    calls, own = [], type(norm).forward
    monkeypatch.setattr(type(norm), "forward", lambda self, *given: calls.append(given) or own(self, *given))
    bound = 1e-2 if dtype == torch.bfloat16 else 1e-6
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(2))
        mine = normed(norm, rows[:1])
        plain = (
            not family.startswith(("Cohere", "Gemma", "StableLm"))
            and family != "Phi"
            and dtype != torch.float64
            and few.IS_FAST
        )
        assert bool(calls) != plain
        assert mine.dtype == dtype
        torch.testing.assert_close(mine, own(norm, rows[:1]), rtol=bound, atol=bound)
        torch.testing.assert_close(normed(norm, rows[:3]), own(norm, rows[:3]), rtol=bound, atol=bound)
        assert torch.equal(normed(norm, rows), own(norm, rows))
    row = rows[:1].clone().requires_grad_()
    found = [torch.autograd.grad(out.square().sum(), row)[0] for out in (normed(norm, row), norm(row))]
    assert torch.equal(*found)
    for register in (norm.register_forward_hook, norm.register_forward_pre_hook):
        hook = register(lambda *given: torch.zeros_like(given[-1][0]))
        assert not torch.equal(normed(norm, rows[:1]), mine)
        hook.remove()
    norm.forward = lambda _: torch.zeros(1)
    assert not normed(norm, rows[:1]).any()


@pytest.mark.parametrize("family", ["GPT2", "Falcon", "Gemma2", "GPTNeoX"])
def test_a_head_of_the_familys_own_layers_is_trained_and_decodes(texts, family):
    """What the lean path does not know: its last layer, copied and trained, with keys and values of its own."""
    model = make(family)
    ee = EarlyExitModel(model, None, layers=(1, 2), head=HeadConfig("adapter", shortlist=60))
    ee.train_heads(sequences=texts[:8], epochs=1, batch_size=80, precision="float32")
    assert not ee.trunk.is_lean
    # One that reads what the last layer reads is the model, before it is trained: of its kind, with its window.
    trunk, text = ee.trunk, texts[0][None]
    perfect = make_head(trunk, HeadConfig("adapter", shortlist=None), None)
    positions = torch.arange(text.shape[1])[None]
    with torch.no_grad():
        hidden = trunk.run(trunk.embed(text, positions), 0, 3, cache=trunk.new_cache(), positions=positions)
        found = trunk.cap(perfect(hidden))
    torch.testing.assert_close(found, model(text).logits, rtol=1e-4, atol=1e-4)
    thresholds = [float(value) for value in np.median(ee.score(texts).scores, axis=1)]
    check_decoded(ee, thresholds)
    ids, mask = batch()
    settings = {"attention_mask": mask, "max_new_tokens": 16, "do_sample": False}
    verified = ee.generate(ids, mode="verify", thresholds=[thresholds[0], 0.0], **settings)
    assert torch.equal(verified, model.generate(ids, **settings))
    assert ee.last_stats.rejected_drafts > 0
    assert ee.last_stats.tokens_by_exit[1] > 0


def test_scores_are_of_the_models_own_choices(model, ee, texts):
    scores = ee.score(texts[:3])
    expected = [model(text[None]).logits[0, :-1].argmax(dim=-1).numpy() for text in texts[:3]]
    assert (scores.model_choices == np.concatenate(expected)).all()


def test_the_teacher_is_the_models_own_distribution(model, ee, texts):
    from offramp.llm.states import teacher_forced
    from offramp.llm.training import Teacher

    trunk = ee._trunk
    (states,) = teacher_forced(trunk, [TokenSequence(texts[0], 1)], (1,))
    logits = model(texts[0][None]).logits[0, :-1].double()
    found = Teacher(trunk, None).probabilities(states.final, logits.logsumexp(-1).float())
    torch.testing.assert_close(found.double(), logits.softmax(-1), rtol=1e-4, atol=1e-6)


# Of each kind one: state spaces, linear attention, convolutions, both in one layer, recurrence, and an encoder before.
REFUSED = {
    "MambaForCausalLM": {"vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4},
    "MiniMaxForCausalLM": LLAMA
    | {"head_dim": 8, "layer_types": ["linear_attention", "full_attention"] * 2, "num_local_experts": 2},
    "Lfm2ForCausalLM": LLAMA | {"layer_types": ["conv", "full_attention"] * 2},
    "FalconH1ForCausalLM": LLAMA
    | {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_ssm": 64, "mamba_d_state": 8},
    "RwkvForCausalLM": {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2},
    "RecurrentGemmaForCausalLM": LLAMA | {"num_hidden_layers": 3},
    "T5ForConditionalGeneration": {
        "vocab_size": VOCAB,
        "d_model": 32,
        "d_ff": 32,
        "num_layers": 2,
        "num_heads": 4,
    },
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_architectures_are_refused(name):
    kind = getattr(transformers, name)
    model = kind(kind.config_class(**REFUSED[name]))
    with pytest.raises(ModelError, match=r"^model: \w+ (has|is an encoder-decoder)"):
        EarlyExitModel(model, layers=(1,))
