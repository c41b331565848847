"""Equation (1), its gradient, and a training loop that can stop and go on."""

from __future__ import annotations

import itertools
import json
import math
import os
import random
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import resumable
import torch
from offramp import EarlyExitModel, ExitHead, HeadConfig, InputError, StorageError, register_head
from offramp.llm.data import CorpusPlan, prepare_corpus
from offramp.llm.generating import continue_prompts
from offramp.llm.heads import AdapterHead, MLPHead, choose_shortlist, fit_linear, make_head
from offramp.llm.prompts import prompts
from offramp.llm.sequences import as_sequences, encode_prompts
from offramp.llm.training import (
    HeadMetrics,
    Teacher,
    Trainer,
    TrainingConfig,
    _schedule,
    best_of,
    build_heads,
    exit_gradient,
    exit_loss,
)
from offramp.llm.trunk import Trunk
from safetensors import safe_open
from safetensors.torch import save_file
from test_placement import quantised
from tiny import byte_tokenizer, make_model


def problem(seed=0, rows=5, size=11, width=7):
    generator = torch.Generator().manual_seed(seed)
    make = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731  # short
    target = (2 * make(rows, size)).softmax(dim=-1)
    return make(rows, width), make(size, width), make(size), target


@pytest.mark.parametrize("weight", [0.0, 0.1, 0.5, 0.95])
def test_the_loss_is_equation_one(weight):
    features, matrix, bias, target = problem()
    loss, entropy = exit_loss(features, matrix, bias, target, weight)
    expected = 0.0
    for row in range(len(features)):
        logits = [float(matrix[j] @ features[row] + bias[j]) for j in range(len(matrix))]
        q = np.exp(np.array(logits) - np.logaddexp.reduce(logits))
        cross = -sum(float(target[row, j]) * np.log(q[j]) for j in range(len(q)))
        own = -sum(q[j] * np.log(q[j]) for j in range(len(q)))
        expected += (1 - weight) * cross - weight * own
        assert float(entropy[row]) == pytest.approx(own, rel=1e-12)
    assert float(loss) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_only_the_product_is_narrow_in_mixed_precision(weight):
    features, matrix, bias, target = (part.float() for part in problem(rows=40, size=300))
    with torch.autocast("cpu", torch.bfloat16):
        logits = torch.nn.functional.linear(features, matrix, bias).double()
        loss, entropy = exit_loss(features, matrix, bias, target, weight)
        gradient = exit_gradient(features, matrix, bias, target, weight)
    assert loss.dtype == entropy.dtype == gradient.dtype == torch.float32
    logits.requires_grad_()
    log_q = logits.log_softmax(dim=-1)
    own = -(log_q.exp() * log_q).sum(dim=-1)
    expected = -(1 - weight) * (target.double() * log_q).sum() - weight * own.sum()
    expected.backward()
    torch.testing.assert_close(loss.double(), expected.detach(), rtol=1e-5, atol=0)
    torch.testing.assert_close(entropy.double(), own.detach(), rtol=1e-5, atol=0)
    torch.testing.assert_close(gradient.double(), logits.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("weight", [0.0, 0.1, 0.95])
@pytest.mark.parametrize("with_bias", [True, False])
def test_the_gradient_is_that_of_finite_differences(weight, with_bias):
    features, matrix, bias, target = problem(1)
    bias = bias if with_bias else torch.zeros_like(bias)
    gradient = exit_gradient(features, matrix, bias, target, weight)
    for row, token in itertools.product(range(len(features)), range(len(bias))):
        step = torch.zeros_like(bias)
        step[token] = 1e-6
        # A step of one token's bias is a step of its logit, in one row.
        rows = slice(row, row + 1)
        above, below = (
            exit_loss(features[rows], matrix, bias + sign * step, target[rows], weight)[0] for sign in (1, -1)
        )
        assert float(gradient[row, token]) == pytest.approx(float(above - below) / 2e-6, abs=1e-8)


def test_the_teacher_is_the_models_softmax(model, texts):
    trunk = Trunk(model)
    hidden = torch.randn(9, trunk.hidden_size, generator=torch.Generator().manual_seed(0))
    logits = trunk.logits(hidden)
    rows = hidden, logits.logsumexp(dim=-1)
    torch.testing.assert_close(
        Teacher(trunk, None).probabilities(*rows), logits.softmax(dim=-1), rtol=1e-4, atol=1e-6
    )
    shortlist = torch.arange(10, 40)
    partial = Teacher(trunk, shortlist).probabilities(*rows)
    torch.testing.assert_close(partial.sum(dim=-1), torch.ones(9))
    inside = logits.softmax(dim=-1)[:, shortlist]
    spread = inside + (1 - inside.sum(dim=-1, keepdim=True)) / 30
    torch.testing.assert_close(partial, spread, rtol=1e-4, atol=1e-6)


def test_a_narrow_model_teaches_with_the_logits_it_has():
    """With other ones, rounding would pass for probability outside the list."""
    model = make_model().bfloat16()
    model.model.norm.weight.data.mul_(8)
    trunk = Trunk(model)
    hidden = torch.randn(40, trunk.hidden_size, generator=torch.Generator().manual_seed(0)).bfloat16()
    logits = trunk.logits(hidden).float()
    assert float(logits.amax()) > 8  # where bfloat16 is coarse
    taught = Teacher(trunk, None).probabilities(hidden, logits.logsumexp(dim=-1))
    torch.testing.assert_close(taught, logits.softmax(dim=-1), rtol=1e-5, atol=1e-6)


def test_ridge_finds_a_linear_map():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(500, 8, generator=generator)
    matrix, offset = torch.randn(8, 8, generator=generator), torch.randn(8, generator=generator)
    layer = torch.nn.Linear(8, 8)
    fit_linear(layer, inputs, inputs @ matrix.T + offset, strength=1e-9)
    torch.testing.assert_close(layer(inputs), inputs @ matrix.T + offset, rtol=1e-4, atol=1e-4)


def test_the_shortlist_is_the_most_counted_in_order():
    counts = torch.tensor([3, 9, 0, 9, 3, 1])
    assert choose_shortlist(counts, 3).tolist() == [0, 1, 3]
    assert choose_shortlist(counts, 4).tolist() == [0, 1, 3, 4]
    assert choose_shortlist(counts, 6) is None
    assert choose_shortlist(counts, None) is None


@pytest.mark.parametrize(
    "head",
    [
        HeadConfig("mlp", shortlist=40),
        HeadConfig("mlp", shortlist=None, width=8),
        HeadConfig("linear", shortlist=None),
        HeadConfig("linear", shortlist=40, init="scratch"),
        HeadConfig("adapter", shortlist=40),
        HeadConfig("adapter", shortlist=None, depth=2),
    ],
    ids=str,
)
def test_training_lowers_the_loss_of_every_head(model, texts, head, tmp_path):
    trainer = trainer_of(model, texts, tmp_path, head=head)
    trainer.watched = trainer.train
    before = trainer.watch()
    # As watched, since the parameters kept are those that agreed most, on random text often the first.
    after = trainer.run()[-len(before) :]
    for old, new in zip(before, after, strict=True):
        if trainer.heads.after(old.layer).fits == old.layer:
            assert old.accuracy > 0.99  # it reads what the model's own layers would, and is their copy
            continue
        # The ridge fit an mlp starts from leaves it little to gain on random text.
        assert new.loss < old.loss - (0.01 if head.kind == "linear" else 0.0005)


def test_the_base_model_is_not_trained(model, texts):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    EarlyExitModel(model, layers=(2,)).train_heads(sequences=texts, epochs=1)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in model.parameters())


class StopError(Exception):
    pass


@register_head("counts its steps")
class Counting(MLPHead):
    """A kind that keeps something besides its parameters."""

    def __init__(self, trunk, config, shortlist, rows=None):
        super().__init__(trunk, config, shortlist, rows)
        self.register_buffer("reads", torch.zeros(1))

    def features(self, hidden):
        if torch.is_grad_enabled():
            self.reads += 1
        return super().features(hidden) * (1 + self.reads / 1000)


def trainer_of(
    model,
    texts,
    folder,
    seed=4,
    head=HeadConfig("mlp", shortlist=50),  # noqa: B008  # frozen
    learning_rate=None,
):
    trunk = Trunk(model)
    sequences = as_sequences(texts, None, max_positions=160)
    corpus = prepare_corpus(trunk, CorpusPlan((2, 4), 5000), folder / "corpus", sequences=sequences)
    config = TrainingConfig(
        epochs=2, batch_size=32, learning_rate=learning_rate, seed=seed, precision="float32"
    )
    heads = build_heads(trunk, corpus, HeadConfig.for_layers(head, (2, 4)), seed)
    return Trainer(
        trunk,
        heads,
        corpus,
        config,
        folder=folder,
        identity={},
        checkpoint_seconds=0,
    )


@pytest.mark.parametrize(
    ("head", "weight"),
    [
        (HeadConfig("mlp", shortlist=50), 0.3),
        (HeadConfig("linear", shortlist=None), 0.0),
        (HeadConfig("adapter", shortlist=50), 0.0),
        (HeadConfig("adapter", shortlist=None, depth=2), 0.3),
        (HeadConfig("counts its steps", shortlist=50), 0.0),
    ],
    ids=str,
)
def test_an_interrupted_training_goes_on_to_the_same_bits(model, texts, tmp_path, head, weight):
    def trainer_in(folder):
        trainer = trainer_of(model, texts, tmp_path / folder, head=head)
        trainer.config = replace(trainer.config, entropy_weight=weight)
        return trainer

    whole = trainer_in("a")
    whole.run()

    def interrupt(stage, done, _total):
        if stage == "training" and done == 40:
            raise StopError

    with pytest.raises(StopError):
        trainer_in("b").run(interrupt)
    resumed = trainer_in("b")
    steps = []
    resumed.run(lambda stage, done, _total: steps.append(done) if stage == "training" else None)
    assert steps[0] == 40  # the step that was under way when it stopped is done again
    assert resumed.history == whole.history
    theirs = whole.heads.own_state()
    for name, mine in resumed.heads.own_state().items():
        assert torch.equal(mine, theirs[name]), name


def test_another_training_in_between_loses_nothing(model, texts, tmp_path):
    def interrupt(stage, done, _total):
        if stage == "training" and done == 40:
            raise StopError

    with pytest.raises(StopError):
        trainer_of(model, texts, tmp_path).run(interrupt)
    other = trainer_of(model, texts, tmp_path, seed=5)
    other.run()
    kept = other.checkpoint.parent.joinpath("metrics.json").read_bytes()
    steps = []
    trainer_of(model, texts, tmp_path).run(lambda _stage, done, _total: steps.append(done))
    assert steps[0] == 40
    assert other.checkpoint.parent.joinpath("metrics.json").read_bytes() == kept
    trainer_of(model, texts, tmp_path, seed=5).run(lambda *_: pytest.fail("done again"))


def test_the_state_is_kept_as_often_as_it_is_asked_to_be(model, texts, tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("offramp.llm.training.time.monotonic", lambda: clock[0])
    trainer = trainer_of(model, texts, tmp_path)
    trainer.checkpoint_seconds = 120.0
    saved, save = [], trainer._save
    monkeypatch.setattr(trainer, "_save", lambda **how: (saved.append(trainer.step), save(**how)))

    def tick(*_):
        clock[0] += 50.0

    trainer.run(tick)
    assert saved == [*range(3, trainer.total_steps + 1, 3), trainer.total_steps]


def test_a_finished_training_is_not_done_again_but_another_one_is(model, texts, tmp_path):
    steps = []
    count = lambda stage, done, _total: steps.append(done) if stage == "training" else None  # noqa: E731  # short
    first = trainer_of(model, texts, tmp_path)
    first.run(count)
    assert steps
    steps.clear()
    again = trainer_of(model, texts, tmp_path)
    metrics = again.run(count)
    assert not steps
    # What only further steps would need is gone.
    with safe_open(first.checkpoint, framework="pt") as file:
        assert not [name for name in file.keys() if name.startswith("optimizer")]  # noqa: SIM118  # not a dict
    assert metrics == first.history
    assert [item.layer for item in best_of(metrics)] == [2, 4]
    for mine, theirs in zip(again.heads.parameters(), first.heads.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    trainer_of(model, texts, tmp_path, seed=5).run(count)
    assert steps


@pytest.mark.parametrize(
    "head", [HeadConfig("mlp", shortlist=50), HeadConfig("adapter", shortlist=50)], ids=str
)
def test_other_exits_in_the_same_cache_are_trained_as_in_one_of_their_own(model, texts, tmp_path, head):
    def train(layers, folder, head=head):
        steps = []
        ee = EarlyExitModel(model, layers=layers, head=head)
        count = lambda stage, done, _total: steps.append(done) if stage == "training" else None  # noqa: E731
        history = ee.train_heads(
            sequences=texts[:30],
            epochs=1,
            batch_size=64,
            precision="float32",
            cache=tmp_path / folder,
            progress=count,
        )
        return history, ee.heads.own_state(), steps

    for number, layers in enumerate([(2, 4), (2, 3), (2,)]):
        history, state, steps = train(layers, "shared")
        alone, expected, _ = train(layers, f"own {number}")
        assert steps
        assert history == alone
        assert state.keys() == expected.keys()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in state.items())
        assert not train(layers, "shared")[2]
    # Nor is another kind of head the same for being after the same layer.
    other = replace(head, kind="linear")
    assert train((2,), "shared", other)[2]


@pytest.mark.parametrize("kind", ["mlp", "adapter"])
def test_heads_are_made_without_what_is_held_back(model, texts, tmp_path, kind):
    trainer = trainer_of(model, texts, tmp_path)
    trunk, corpus = trainer.trunk, trainer.corpus

    def made_with_other(numbers):
        for shard, place in map(corpus._locate, numbers.tolist()):
            text = shard.predictions(place)
            text["top"].fill_(88)
            for states in (text["final"], *(shard.states(layer, place) for layer in shard.hidden)):
                states.copy_(states.flip(-1) * 2)
        return build_heads(trunk, corpus, {2: HeadConfig(kind, shortlist=10)}, 0).state_dict()

    first = made_with_other(torch.tensor([], dtype=torch.int64))
    second, third = made_with_other(trainer.watched), made_with_other(trainer.train)
    assert len(trainer.watched) > 0
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    fitted = "2.transform.linear.weight" if kind == "mlp" else "2.linear.weight"
    assert not any(torch.equal(first[name], third[name]) for name in (fitted, "2.shortlist"))


KIND = """
from offramp import ExitHead
from torch import nn


class Changing(ExitHead):
    def __init__(self, trunk, config, shortlist, rows=None):
        super().__init__(trunk, config, shortlist, rows)
        self.map = nn.Linear(trunk.hidden_size, trunk.hidden_size)

    def features(self, hidden, factor=1.0):
        return factor * self.map(hidden)
"""


@pytest.mark.parametrize(
    ("place", "old", "new"),
    [
        ("file", "self.map(hidden)", "self.map(2 * hidden)"),
        ("file", "factor=1.0", "factor=2.0"),
        # As in a notebook, which has no source of a class.
        ("nowhere", "self.map(hidden)", "self.map(2 * hidden)"),
        ("nowhere", "factor * self", "2.0 * self"),
    ],
)
def test_a_kind_whose_code_was_changed_is_trained_anew(model, texts, tmp_path, monkeypatch, place, old, new):
    module = ModuleType("kinds_of_mine")
    module.__file__ = str(tmp_path / "kinds.py")
    if place == "file":
        monkeypatch.setitem(sys.modules, module.__name__, module)

    def steps_with(code):
        Path(module.__file__).write_text(code)
        exec(code, module.__dict__)
        register_head(f"changing {place}")(module.Changing)
        steps = []
        trainer = trainer_of(model, texts[:20], tmp_path, head=HeadConfig(f"changing {place}", shortlist=50))
        trainer.run(lambda _stage, done, _total: steps.append(done))
        return steps

    assert steps_with(KIND)
    assert not steps_with(KIND)
    assert steps_with(KIND.replace(old, new))
    assert not steps_with(KIND)


def test_what_another_version_trained_is_trained_anew(model, texts, tmp_path, monkeypatch):
    trainer_of(model, texts, tmp_path).run()
    monkeypatch.setattr("offramp.llm.training._FORMAT", 1000)
    steps = []
    trainer_of(model, texts, tmp_path).run(lambda _stage, done, _total: steps.append(done))
    assert steps


@pytest.mark.parametrize("where", [0.02, 0.3, 0.9, 1.0])
def test_a_damaged_state_is_named_and_not_gone_on_from(model, texts, tmp_path, where):
    trainer_of(model, texts, tmp_path).run()
    path = trainer_of(model, texts, tmp_path).checkpoint
    whole = path.read_bytes()
    place = min(int(len(whole) * where), len(whole) - 1)
    path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    with pytest.raises(
        StorageError, match=r"^cache: \S+state\.safetensors is damaged; delete it to train anew"
    ):
        trainer_of(model, texts, tmp_path).run()
    path.write_bytes(whole[:-10])
    with pytest.raises(StorageError, match=r"state\.safetensors is damaged"):
        trainer_of(model, texts, tmp_path).run()
    path.write_bytes(whole)
    trainer_of(model, texts, tmp_path).run(lambda *_: pytest.fail("done again"))


def test_how_far_a_state_has_come_is_in_its_checksum(model, texts, tmp_path):
    """What is no tensor: the step, the metrics, and whose state it is."""
    trainer_of(model, texts, tmp_path).run()
    path = trainer_of(model, texts, tmp_path).checkpoint
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a dict
    for name in ("step", "tokens", "history", "identity"):
        save_file(tensors, path, metadata=metadata | {name: metadata[name] + " "})
        with pytest.raises(StorageError, match="is damaged"):
            trainer_of(model, texts, tmp_path).run()
    save_file(tensors, path, metadata=metadata)
    trainer_of(model, texts, tmp_path).run(lambda *_: pytest.fail("done again"))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"tokens": 0}, "tokens is 0"),
        ({"epochs": 0}, "epochs is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"learning_rate": 0.0}, "learning_rate is 0"),
        ({"learning_rate": math.inf}, "learning_rate is inf"),
        ({"learning_rate": "fast"}, "learning_rate is 'fast'"),
        ({"learning_rate": True}, "learning_rate is True"),
        ({"entropy_weight": 1.0}, "entropy_weight is 1"),
        ({"entropy_weight": None}, "entropy_weight is None"),
        ({"precision": "int8"}, "precision is 'int8'"),
        ({"patience": 0}, "patience is 0"),
        ({"prompts": []}, "prompts need a tokenizer"),
        ({"sequences": []}, "sequences is empty"),
        ({"sequences": [[3]]}, r"sequences\[0\] has 1 tokens"),
        ({"sequences": [[3, 4], [3, 400]]}, r"sequences\[1\] holds token 400"),
        ({"sequences": [[3] * 161]}, r"sequences\[0\] needs 161 tokens"),
        ({"sequences": [[0.5, 1.0]]}, "whole numbers"),
        ({"sequences": ["text"]}, "give EarlyExitModel a tokenizer"),
        ({"sequences": [[3, 4]], "prompts": ["x"]}, "both given"),
    ],
)
def test_bad_settings_get_a_sentence(model, settings, words):
    with pytest.raises(InputError, match=words):
        EarlyExitModel(model, layers=(2,)).train_heads(**settings)


@register_head("own and perhaps broken")
class Broken(ExitHead):
    """A kind of a user's own with the fault its options name."""

    def __init__(self, trunk, config, shortlist, rows=None):
        super().__init__(trunk, config, shortlist, rows)
        self.fault = config.options["fault"]
        if self.fault == "constructor":
            raise KeyError("width")
        if self.fault != "nothing to train":
            self.map = torch.nn.Linear(trunk.hidden_size, trunk.hidden_size - (self.fault == "shape"))

    def features(self, hidden):
        if self.fault == "features":
            return super().features(hidden)
        return hidden if self.fault == "nothing to train" else self.map(hidden)

    def peak_rate(self, skipped):
        if self.fault == "rate's code":
            return 1 / 0
        return None if self.fault == "rate" else 1e-3


@pytest.mark.parametrize(
    ("head", "words"),
    [
        (HeadConfig("adapter", depth=6), "^depth is 6: this model has 6 layers"),
        ("constructor", "^head kind 'own and perhaps broken' does not work, mend it: KeyError: 'width'$"),
        (
            "features",
            "^head kind 'own and perhaps broken' does not work, mend it: .*Broken defines no features$",
        ),
        ("shape", r"^head kind 'own and perhaps broken' gives features of shape \(1, 31\) .* be \(1, 32\)$"),
        (
            "rate",
            "^peak_rate of head kind 'own and perhaps broken' gives None: let it return a positive number$",
        ),
        ("rate's code", "^head kind 'own and perhaps broken' does not work, mend it: ZeroDivisionError: "),
        ("nothing to train", "^head: there is nothing to train in own and perhaps broken; give a kind with "),
    ],
    ids=str,
)
def test_heads_that_cannot_be_trained_are_refused_before_text_is_written(
    model, texts, tmp_path, monkeypatch, head, words
):
    monkeypatch.setattr("offramp.llm.model.prepare_corpus", lambda *_, **__: pytest.fail("text is written"))
    if isinstance(head, str):
        head = HeadConfig("own and perhaps broken", shortlist=30, options={"fault": head})
    # Beside heads that are as they should be.
    sound = head if "nothing to train" in words else HeadConfig("mlp")
    drawn = torch.get_rng_state()
    with pytest.raises(InputError, match=words):
        EarlyExitModel(model, layers=(1, 2, 3), head={1: sound, 2: head, 3: head}).train_heads(
            sequences=texts, cache=tmp_path / "cache"
        )
    assert not (tmp_path / "cache").exists()
    assert torch.equal(torch.get_rng_state(), drawn)


def test_layers_that_are_quantised_are_refused_before_text_is_written(texts, tmp_path, monkeypatch):
    monkeypatch.setattr("offramp.llm.model.prepare_corpus", lambda *_, **__: pytest.fail("text is written"))
    make_model().save_pretrained(tmp_path)
    with pytest.raises(InputError, match="quantised and cannot be trained"):
        EarlyExitModel(quantised(tmp_path), layers=(1,), head="adapter").train_heads(sequences=texts)


def test_a_head_without_parameters_may_stand_beside_one_that_is_trained(model, texts):
    bare = HeadConfig("own and perhaps broken", shortlist=30, options={"fault": "nothing to train"})
    ee = EarlyExitModel(model, layers=(2, 4), head={2: bare, 4: "mlp"})
    assert len(ee.train_heads(sequences=texts[:10], epochs=1)) >= 2


def test_too_little_text_to_fit_a_head_to_gets_a_sentence(model):
    with pytest.raises(InputError, match=r"^tokens: there is too little text to fit a head to, 1 states"):
        EarlyExitModel(model, layers=(2,)).train_heads(sequences=[[3, 4]])


def test_a_rate_may_be_numpys(model, texts, tmp_path):
    rate = np.float32(1e-3)
    numpys, own = (trainer_of(model, texts, tmp_path, learning_rate=given) for given in (rate, float(rate)))
    assert numpys.checkpoint == own.checkpoint
    assert TrainingConfig(entropy_weight=np.float32(0.5)) == TrainingConfig(entropy_weight=0.5)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"kind": "big"}, "head kind is 'big'"),
        ({"init": "ones"}, "init is 'ones'"),
        ({"shortlist": 1}, "shortlist is 1"),
        ({"width": 0}, "width is 0"),
    ],
)
def test_heads_nobody_can_build_are_refused(settings, words):
    with pytest.raises(InputError, match=words):
        HeadConfig(**settings)


def test_what_needs_trained_heads_says_so(model, tmp_path):
    ee = EarlyExitModel(model, layers=(2,))
    for work in (
        lambda: ee.calibrate(0.9),
        lambda: ee.score([[1, 2, 3]]),
        lambda: ee.generate(torch.ones(1, 3, dtype=torch.int64)),
        lambda: ee.save_pretrained(tmp_path / "x"),
    ):
        with pytest.raises(InputError, match="not trained"):
            work()


@torch.no_grad()
def test_the_metrics_are_those_of_the_rows_held_back_at_the_heads_own_layer(model, texts, tmp_path):
    trainer = trainer_of(model, texts, tmp_path)
    rows = trainer.corpus.batch(trainer.watched, (2, 4))
    assert 0 < len(trainer.watched) < len(trainer.train)
    [(teacher, _)] = trainer.teachers
    target = teacher.probabilities(rows.final, rows.log_normalizer)
    for weight in (0.0, 0.6):
        trainer.config = replace(trainer.config, entropy_weight=weight)
        for item in trainer.watch():
            hidden = rows.hidden[item.layer][rows.picked].float()
            log_q = trainer.heads.after(item.layer)(hidden).log_softmax(dim=-1)
            entropy = -(log_q.exp() * log_q).sum(dim=-1).mean()
            cross = -(target * log_q).sum(dim=-1).mean()
            assert item.loss == pytest.approx(float((1 - weight) * cross - weight * entropy), rel=1e-4)
            assert item.entropy == pytest.approx(float(entropy), rel=1e-4)


@pytest.mark.parametrize("kind", ["linear", "adapter"])
def test_a_step_follows_the_mean_gradient_whatever_the_pieces(model, texts, tmp_path, monkeypatch, kind):
    gradients = []
    for times, states, rows in (
        (1, 2**23, 128),
        (3, 2**23, 128),
        (1, 32 * 29 * 2, 128),
        (1, 2**23, 7),
    ):
        trainer = trainer_of(model, texts, tmp_path, head=HeadConfig(kind, shortlist=50))
        monkeypatch.setattr("offramp.llm.training._STATES_BUDGET", states)
        monkeypatch.setattr("offramp.llm.training._CPU_ROWS", rows)
        trainer.train_step(trainer.train[:5].repeat(times))
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in trainer.parameters]))
    assert float(gradients[0].abs().max()) > 0
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("weight", [0.0, 0.3])
@pytest.mark.parametrize("kind", ["linear", "mlp", "adapter"])
def test_the_gradient_of_every_parameter_is_that_of_automatic_differentiation(
    texts, tmp_path, monkeypatch, kind, weight
):
    """With a bias on the output rows, and in several pieces."""
    model = make_model()
    model.lm_head = torch.nn.Linear(32, 89)
    trainer = trainer_of(model.requires_grad_(False), texts, tmp_path, head=HeadConfig(kind, shortlist=50))
    trainer.config = replace(trainer.config, entropy_weight=weight)
    if kind == "mlp":
        # Away from zero, where the residual block starts and its first map has no gradient.
        for layer in trainer.layers:
            torch.nn.init.normal_(trainer.heads.after(layer).transform.down.weight, std=0.1)
    numbers = trainer.train[:6]
    batch = trainer.corpus.batch(numbers, trainer.layers)
    [(teacher, _)] = trainer.teachers
    target = teacher.probabilities(batch.final, batch.log_normalizer)
    losses = []
    for layer in trainer.layers:
        head = trainer.heads.after(layer)
        features = head.read(batch.hidden[layer].float(), batch.picked).double()
        bias = head.bias.double()
        log_q = (features @ head.weight.double().T + bias).log_softmax(dim=-1)
        cross, entropy = -(target * log_q).sum(-1), -(log_q.exp() * log_q).sum(-1)
        losses.append(((1 - weight) * cross - weight * entropy).mean())
    expected = torch.autograd.grad(sum(losses), trainer.parameters)
    monkeypatch.setattr("offramp.llm.training._CPU_ROWS", 30)
    at_once = []
    monkeypatch.setattr(
        "offramp.llm.training.exit_gradient",
        lambda features, *rest: at_once.append(len(features)) or exit_gradient(features, *rest),
    )
    # The step itself changes the parameters, but not their gradients.
    trainer.train_step(numbers)
    # As few pieces of at most 30 rows as there can be, of one size, for each head.
    assert max(at_once) <= 30
    assert min(at_once) >= max(at_once) - 1
    assert len(at_once) == 2 * math.ceil(len(batch) / 30) > 2
    assert sum(at_once) == 2 * len(batch)
    names = {id(parameter): name for name, parameter in trainer.heads.named_parameters()}
    if kind == "linear":
        assert {"2.weight", "2.bias", "4.weight", "4.bias"} <= set(names.values())
    for parameter, gradient in zip(trainer.parameters, expected, strict=True):
        largest = float(gradient.abs().max())
        assert largest > 0, names[id(parameter)]
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-4 * largest)


def test_the_rate_warms_up_and_falls_to_nothing(model, texts, tmp_path):
    rates = [_schedule(step, 200) for step in range(200)]
    assert rates[:10] == pytest.approx([step / 10 for step in range(1, 11)])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[105] == pytest.approx(0.5, abs=0.01)
    assert rates[-1] < 1e-3
    trainer = trainer_of(model, texts, tmp_path)
    trainer.run()
    assert trainer.optimizer.param_groups[0]["lr"] < 1e-3 * 1e-2


def test_heads_of_a_users_kind_are_asked_for_their_rate(model, texts, tmp_path, monkeypatch):
    monkeypatch.setattr(AdapterHead, "peak_rate", lambda _, skipped: skipped)
    trainer = trainer_of(model, texts, tmp_path, head=HeadConfig("adapter", shortlist=50))
    assert trainer.peaks == pytest.approx({2: 4 / 6, 4: 2 / 6})
    for rate in (0.0, -1.0, math.nan, math.inf):
        monkeypatch.setattr(AdapterHead, "peak_rate", lambda *_, rate=rate: rate)
        with pytest.raises(InputError, match="peak_rate of head kind 'adapter' gives"):
            trainer_of(model, texts, tmp_path, head=HeadConfig("adapter", shortlist=50))


def test_every_head_has_the_rate_that_suits_it_unless_one_is_given(model, texts, tmp_path):
    assert model.config.num_hidden_layers == 6

    def rates(kind, learning_rate=None):
        head = HeadConfig(kind, shortlist=50)
        trainer = trainer_of(model, texts, tmp_path, head=head, learning_rate=learning_rate)
        before = [[parameter.clone() for parameter in head.parameters()] for head in trainer.heads.values()]
        trainer.train_step(trainer.train[:4])
        # The first step of AdamW moves every parameter by the rate, where it has a gradient.
        return [
            max(float((now - then).abs().max()) for now, then in zip(head.parameters(), old, strict=True))
            / _schedule(0, trainer.total_steps)
            for head, old in zip(trainer.heads.values(), before, strict=True)
        ]

    for kind in ("adapter", "mlp"):
        assert rates(kind) == pytest.approx([9e-3 * 4 / 6, 9e-3 * 2 / 6], rel=0.02)
        assert rates(kind, 0.02) == pytest.approx([0.02, 0.02], rel=0.02)
    assert rates("linear") == pytest.approx([1e-3, 1e-3], rel=0.02)


def test_a_linear_head_starts_as_the_models_own_output():
    """With a bias on the output rows, which few families have."""
    model = make_model()
    model.lm_head = torch.nn.Linear(32, 89)
    model.model.norm.weight.copy_(torch.linspace(0.5, 2, 32))
    trunk = Trunk(model.requires_grad_(False))
    hidden = 3 * torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    shortlist = torch.tensor([3, 20, 21, 88])
    whole = make_head(trunk, HeadConfig("linear", shortlist=None), None)
    listed = make_head(trunk, HeadConfig("linear", shortlist=4), shortlist)
    torch.testing.assert_close(whole(hidden), trunk.logits(hidden))
    torch.testing.assert_close(listed(hidden), trunk.logits(hidden)[:, shortlist])


def start(folder, **environment):
    """Run `resumable` in a process of its own."""
    paths = [str(Path(resumable.__file__).parent), *(path for path in sys.path if path)]
    return subprocess.Popen(
        [sys.executable, resumable.__file__, str(folder)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", **environment},
    )


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_as_if_it_had_not_been(tmp_path):
    """SIGKILL while generating and while training: no shard is lost, and at most one checkpoint interval."""
    whole = resumable.train(tmp_path / "whole")
    chance = random.Random(time.time())
    reached = {"generating": 0, "training": 0}
    written = {}
    for stage, count in (("generating", 1), ("generating", 1), ("training", 5), ("training", 20)):
        process = start(tmp_path / "cut")
        lines = chance.randrange(1, count + 1)
        for line in process.stdout:
            name, number = line.split()
            if name in reached:
                reached[name] = int(number)
            lines -= name == stage
            if not lines:
                break
        time.sleep(chance.random() / 50)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        corpus = tmp_path / "cut" / "corpus"
        noted = [path for note in corpus.glob("shard-*.json") for path in corpus.glob(f"{note.stem}.*")]
        for path in noted:
            # A shard made anew would be the same to the byte.
            found = path.stat().st_ino, path.stat().st_mtime_ns
            assert written.setdefault(path.name, found) == found
    assert len(written) >= 2 * 4
    kept = {path.name: path.read_bytes() for path in corpus.glob("*.safetensors")}
    steps, generated = [], []
    seen = {"generating": generated, "training": steps, "reading": []}
    again = resumable.train(tmp_path / "cut", lambda stage, at, _total: seen[stage].append(at))
    assert not generated
    # Saved after every step, before the next one is told of.
    assert steps[0] >= reached["training"]
    for name, found in written.items():
        assert found == ((corpus / name).stat().st_ino, (corpus / name).stat().st_mtime_ns)
    for name, content in kept.items():
        for folder in ("cut", "whole"):
            assert (tmp_path / folder / "corpus" / name).read_bytes() == content
    assert again.history == whole.history
    for mine, theirs in zip(again.heads.parameters(), whole.heads.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def start_two(folder):
    """Run `resumable` in two processes that train together."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    # The second one finds other metrics: the first one's decide for both, which parameters are kept and when it ends.
    own = [{"RANK": "0", "LOCAL_RANK": "0"}, {"RANK": "1", "LOCAL_RANK": "1", "DISAGREE": "1"}]
    return [start(folder, **shared, **each) for each in own]


@pytest.fixture(scope="module")
def of_two(tmp_path_factory):
    """What each of two processes printed that trained together."""
    both = start_two(tmp_path_factory.mktemp("two"))
    outputs = [process.communicate(timeout=300)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    return outputs


@pytest.mark.slow
def test_two_processes_that_were_killed_go_on_together(of_two, tmp_path):
    first, second = start_two(tmp_path)
    reached = 0
    for line in first.stdout:
        stage, number = line.split()
        reached = int(number) if stage == "training" else 0
        if reached >= 10:
            break
    for process in (first, second):
        process.kill()
        process.communicate()
    assert first.returncode == -signal.SIGKILL
    both = start_two(tmp_path)
    again = [process.communicate(timeout=300)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    for lines, whole in zip(again, of_two, strict=True):
        told = [line.split() for line in lines.splitlines()]
        # Saved after every step, before the next one is told of.
        assert not any(stage == "generating" for stage, *_ in told)
        assert next(int(number) for stage, number, *_ in told if stage == "training") >= reached
        assert result(lines, "heads") == result(whole, "heads")
    assert result(again[0], "history") == result(of_two[0], "history")


def result(lines, name):
    return next(line for line in lines.splitlines() if line.startswith(f"{name} "))


@pytest.mark.slow
def test_two_processes_train_as_one_does(of_two, tmp_path):
    outputs = of_two
    assert "history" not in outputs[1]
    first, second = (dict(line.split(" ", 1) for line in lines.splitlines()) for lines in outputs)
    assert first["heads"] == second["heads"]
    found = json.loads(first["history"])
    one = resumable.train(tmp_path / "one")
    # AdamW hides a factor; the sums that gradients are made of do not.
    assert float(first["gradient"]) == pytest.approx(one.first_gradient, rel=1e-4)
    assert len(found) == len(one.history) > 10
    for mine, theirs in zip(found, one.history, strict=True):
        assert mine["loss"] == pytest.approx(theirs.loss, rel=1e-4)
        assert (mine["layer"], mine["step"], mine["tokens"]) == (theirs.layer, theirs.step, theirs.tokens)
    # It says something only if the loss moved, and if not all heads were best in the end, as the second one finds.
    assert min(item.step for item in best_of(one.history)) < one.step
    assert one.history[-1].loss < one.history[1].loss - 0.001


def test_heads_of_several_kinds_are_trained_as_each_would_be_alone(model, texts, tmp_path):
    """Every list has a teacher of its own, whatever else is trained beside it."""
    kinds = {
        2: HeadConfig("mlp", shortlist=30),
        3: HeadConfig("adapter", shortlist=None),
        4: HeadConfig("linear", shortlist=60),
    }

    def train(configs, folder):
        ee = EarlyExitModel(model, layers=sorted(configs), head=configs)
        ee.train_heads(
            sequences=texts[:30], epochs=1, batch_size=64, precision="float32", cache=tmp_path / folder
        )
        return ee.heads.own_state()

    together = train(kinds, "all")
    for layer, kind in kinds.items():
        alone = train({layer: kind}, "all")
        for name, tensor in alone.items():
            torch.testing.assert_close(together[name], tensor, rtol=1e-5, atol=1e-7)
    with pytest.raises(InputError, match=r"head is given for layers 2, 4: give one for each exit, 2, 3"):
        EarlyExitModel(model, layers=(2, 3), head={2: "mlp", 4: "mlp"})


def test_calibration_continues_the_calibration_prompts_and_none_that_was_trained_on(texts, monkeypatch):
    model, tokenizer = make_model(max_position_embeddings=2048), byte_tokenizer()
    ee = EarlyExitModel(model, tokenizer, layers=(2,))
    ee.train_heads(sequences=texts[:10], epochs=1)
    continued, original = [], continue_prompts

    def noting(trunk, prompts, **settings):
        continued.extend(tuple(prompt.tolist()) for prompt in prompts)
        return original(trunk, prompts, **settings)

    monkeypatch.setattr("offramp.llm.model.continue_prompts", noting)
    ee.calibrate(0.5, tokens=300, max_new_tokens=4)
    splits = {
        split: {tuple(ids.tolist()) for ids in encode_prompts(prompts(split), tokenizer, max_positions=2048)}
        for split in ("training", "calibration", "held_out")
    }
    assert len(set(continued)) == len(continued) >= 70
    assert set(continued) <= splits["calibration"]
    assert not splits["training"] & (splits["calibration"] | splits["held_out"])
    assert not splits["calibration"] & splits["held_out"]


def test_a_cache_in_use_is_left_alone(model, texts, tmp_path):
    ee = EarlyExitModel(model, layers=(2,))
    tried = []

    def meanwhile(*_):
        if not tried:
            tried.append(EarlyExitModel(model, layers=(2,)))
            with pytest.raises(StorageError, match=r"^cache: another process is using \S+; wait for it"):
                tried[0].train_heads(sequences=texts[:10], epochs=1, cache=tmp_path)

    ee.train_heads(sequences=texts[:10], epochs=1, cache=tmp_path, progress=meanwhile)
    assert tried
    tried[0].train_heads(sequences=texts[:10], epochs=1, cache=tmp_path, progress=lambda *_: None)


@pytest.mark.parametrize("kind", ["mlp", "adapter"])
def test_heads_taught_another_positions_answers_calibrate_to_nothing(model, texts, tmp_path, kind):
    covered = []
    for shuffled in (False, True):
        trunk = Trunk(model)
        sequences = as_sequences(texts, None, max_positions=160)
        corpus = prepare_corpus(trunk, CorpusPlan((5,), 5000), tmp_path / "c", sequences=sequences)
        for shard in corpus.shards if shuffled else ():
            order = torch.randperm(shard.rows, generator=torch.Generator().manual_seed(0))
            shard.text |= {name: shard.text[name][order] for name in ("final", "log_normalizer", "top")}
        heads = build_heads(trunk, corpus, {5: HeadConfig(kind, shortlist=60)}, 0)
        if kind == "adapter" and shuffled:
            # Its first map was fitted to the layer below the last, which is not shuffled: start from nothing.
            torch.nn.init.zeros_(heads.after(5).linear.weight)
        Trainer(trunk, heads, corpus, TrainingConfig(epochs=3, batch_size=64, precision="float32")).run()
        ee = EarlyExitModel(model, layers=(5,), head=HeadConfig(kind, shortlist=60))
        ee.heads = heads.requires_grad_(False)
        covered.append(ee.calibrate(0.6, sequences=texts).coverage[0])
    assert covered[0] > 0.5
    assert covered[1] < 0.02


def test_half_precision_follows_the_same_gradient(model, texts, tmp_path):
    gradients = []
    for precision in ("float32", "bfloat16"):
        trainer = trainer_of(model, texts, tmp_path, head=HeadConfig("adapter", shortlist=50))
        trainer.config = replace(trainer.config, precision=precision)
        trainer.train_step(trainer.train[:20])
        assert all(parameter.dtype == torch.float32 for parameter in trainer.parameters)
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in trainer.parameters]))
    assert not torch.equal(*gradients)
    assert float(torch.nn.functional.cosine_similarity(*gradients, dim=0)) > 0.99


def test_every_head_keeps_its_best_and_training_ends_when_none_gains(model, texts, tmp_path, monkeypatch):
    trainer = trainer_of(model, texts, tmp_path)
    trainer.config = replace(trainer.config, patience=1)
    trainer.steps = [trainer.steps[0]] * 10
    trainer.total_steps = sum(trainer.steps)
    said = iter([(0.1, 0.1), (0.2, 0.3), (0.4, 0.2), *[(0.1, 0.1)] * 50])
    kept = []

    def watch():
        kept.append({name: p.detach().clone() for name, p in trainer.heads.named_parameters()})
        pairs = zip((2, 4), next(said), strict=True)
        return [
            HeadMetrics(at, trainer.step, trainer.tokens, 1.0, share, 1.0, (0, 0, 0)) for at, share in pairs
        ]

    monkeypatch.setattr(trainer, "watch", watch)
    history = trainer.run()
    assert [(item.layer, item.accuracy) for item in best_of(history)] == [(2, 0.4), (4, 0.3)]
    # The better of the two gained last at the second watch of the first epoch: it ends an epoch after that.
    assert trainer.steps[0] < trainer.step <= 2 * trainer.steps[0]
    for name, parameter in trainer.heads.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(parameter, kept[2 if name.startswith("2.") else 1][name])


@pytest.mark.parametrize("patience", [1, 2])
def test_patience_ends_so_many_epochs_after_a_best_at_an_epochs_end(
    model, texts, tmp_path, monkeypatch, patience
):
    trainer = trainer_of(model, texts, tmp_path)
    trainer.config = replace(trainer.config, patience=patience)
    trainer.steps = [len(trainer._batches(epoch)) for epoch in range(6)]
    trainer.total_steps = sum(trainer.steps)
    best = trainer.steps[0]

    def watch():
        share = trainer.step / best if trainer.step <= best else 0.5
        return [
            HeadMetrics(at, trainer.step, trainer.tokens, 1.0, share, 1.0, (0, 0, 0)) for at in trainer.layers
        ]

    monkeypatch.setattr(trainer, "watch", watch)
    history = trainer.run()
    assert {item.step for item in best_of(history)} == {best}
    assert trainer.step == sum(trainer.steps[: 1 + patience])


def test_metrics_are_written_for_tensorboard(model, texts, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = trainer_of(model, texts, tmp_path)
    history = trainer.run()
    again = trainer_of(model, texts, tmp_path)
    assert again.run() == history  # written anew, not twice
    events = EventAccumulator(str(again.checkpoint.parent / "tensorboard"))
    events.Reload()
    for layer in (2, 4):
        mine = [item for item in history if item.layer == layer]
        for name, values in (
            ("loss", [item.loss for item in mine]),
            ("accuracy", [item.accuracy for item in mine]),
            ("entropy", [item.entropy for item in mine]),
            ("coverage at 0.9", [item.coverage[1] for item in mine]),
        ):
            found = events.Scalars(f"{name}/after layer {layer}")
            assert [item.step for item in found] == [item.tokens for item in mine]
            assert [item.value for item in found] == pytest.approx(values, rel=1e-5)
    stored = json.loads((again.checkpoint.parent / "metrics.json").read_text())["metrics"]
    assert [item["loss"] for item in stored] == [item.loss for item in history]


def test_coverage_is_that_of_the_calibrated_thresholds(model, texts, tmp_path):
    trainer = trainer_of(model, texts, tmp_path)
    # So many that a threshold does not move far by the rounding of what is stored.
    trainer.watched = trainer.train
    items = trainer.watch()
    sequences = [trainer.corpus.sequence(int(number)) for number in trainer.watched]
    ee = EarlyExitModel(model, layers=(2, 4), head=HeadConfig("mlp", shortlist=50))
    ee.heads = trainer.heads.requires_grad_(False)
    calibration = ee.calibrate(0.8, sequences=sequences)
    scores = ee.score(sequences)
    for index, item in enumerate(items):
        # Stored states are rounded to 16 bits.
        assert item.accuracy == pytest.approx(float(scores.correct[index].mean()), abs=0.03)
        for eps, share in zip(item.eps, item.coverage, strict=True):
            exact = float((scores.scores[index] >= calibration.at(eps)[index]).mean())
            assert share == pytest.approx(exact, abs=0.06)
