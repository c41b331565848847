"""Scores against a walk over every position, and calibrations against the calibration core."""

from __future__ import annotations

import copy
import json
import math
import warnings

import numpy as np
import offramp
import pytest
import torch
from offramp import Calibration, InputError, StorageError
from offramp.llm.calibrating import Measured, calibrate_scores
from offramp.llm.sequences import TokenSequence

EPSILONS = (0.05, 0.2, 0.3, 0.45, 0.5, 0.6, 0.75, 0.9, 0.99)


@pytest.fixture(scope="module")
def ragged():
    generator = torch.Generator().manual_seed(3)
    lengths = [(12, 4), (5, 1), (30, 11), (12, 11), (7, 2)]
    return [
        TokenSequence(torch.randint(6, 89, (total,), generator=generator), given) for total, given in lengths
    ]


@torch.no_grad()
def test_every_position_is_scored_as_if_it_stood_alone(trained, model, ragged):
    scores = trained.score(ragged)
    place = 0
    for group, item in enumerate(ragged):
        for position in range(item.prompt_length, len(item.tokens)):
            output = model(item.tokens[None, :position], output_hidden_states=True)
            choice = int(output.logits[0, -1].argmax())
            assert scores.model_choices[place] == choice
            assert scores.groups[place] == group
            assert scores.emitted[place] == int(item.tokens[position])
            for index, layer in enumerate(trained.layers):
                head = trained.heads_in_use.after(layer)
                probabilities = head(output.hidden_states[layer][0, -1]).double().softmax(dim=-1)
                top = probabilities.topk(2)
                assert scores.scores[index, place] == pytest.approx(
                    float(top.values[0] - top.values[1]), abs=2e-5
                )
                assert scores.choices[index, place] == int(head.tokens(top.indices[:1]))
                assert scores.correct[index, place] == (scores.choices[index, place] == choice)
            place += 1
    assert scores.scores.shape == (3, place)
    assert scores.scores.dtype == np.float32
    assert scores.correct.dtype == bool


def test_the_first_exit_is_the_first_margin_that_reaches_its_threshold(trained, ragged):
    scores = trained.score(ragged)
    thresholds = [float(scores.scores[0].max()), float(np.median(scores.scores[1])), math.inf]
    exits = scores.first_exit(thresholds)
    for place, exit_ in enumerate(exits):
        reached = [k for k in range(3) if float(scores.scores[k, place]) >= thresholds[k]]
        assert exit_ == (reached[0] if reached else 3)
    assert {0, 1, 3} == set(exits.tolist())


def test_agreement_counts_the_models_own_choices(trained, model, prompts):
    ids = prompts[0][:1]
    own = model.generate(ids, max_new_tokens=20, do_sample=False)[0]
    assert trained.agreement([own], [9]) == (20, 20)
    changed = own.clone()
    changed[-1] = (changed[-1] + 1) % 80 + 6
    assert trained.agreement([changed], [9]) == (19, 20)


@pytest.mark.parametrize("eps", EPSILONS)
@pytest.mark.parametrize("mode", ["marginal", "sequential", "budget"])
def test_thresholds_at_any_epsilon_are_those_of_the_core(trained, texts, eps, mode):
    scores = trained.score(texts)
    costs = [*trained.layers, trained.num_layers]
    expected = offramp.calibrate_cascade(scores.scores, scores.correct, eps, mode=mode, costs=costs)
    calibration = calibrate_scores(scores, (1, 3, 5), 6, 0.4, mode=mode, dtype="float32", text_hash="")
    assert calibration.at(eps) == tuple(expected.thresholds.tolist())
    found = calibration.cascade(eps)
    assert (found.accepted.tolist(), found.expected_cost) == (
        expected.accepted.tolist(),
        expected.expected_cost,
    )
    alone = offramp.fast_calibrate(scores.scores, scores.correct, eps).tolist()
    assert [curve.at(eps) for curve in calibration.curves] == alone
    if mode == "marginal":
        assert calibration.at(eps) == tuple(alone)


def test_a_switched_off_head_leaves_its_tokens_to_the_others(trained, texts):
    scores = trained.score(texts)
    found = trained.calibration.at(0.5, heads=(1, 2))
    expected = offramp.calibrate_cascade(scores.scores[1:], scores.correct[1:], 0.5)
    assert found == (math.inf, *expected.thresholds.tolist())
    assert trained.calibration.at(0.5, heads=(0, 1, 2)) == trained.calibration.thresholds


def test_certified_thresholds_keep_sequences_whole(trained, texts):
    scores = trained.score(texts)
    calibration = calibrate_scores(scores, (1, 3, 5), 6, 0.3, delta=0.2, dtype="float32", text_hash="")
    expected = offramp.calibrate_cascade(scores.scores, scores.correct, 0.3, delta=0.2, groups=scores.groups)
    assert calibration.thresholds == tuple(expected.thresholds.tolist())
    assert calibration.promise == expected.assumptions
    assert "confidence 0.8" in calibration.promise
    assert "sequential, certified" in calibration.side_by_side()


def test_the_models_own_text_is_certified_for_the_longest_it_could_be(trained, texts, monkeypatch):
    ee = copy.copy(trained)
    starts = [text[:5] for text in texts]
    monkeypatch.setattr(ee, "_text", lambda prompts, sequences, kind: (sequences, starts))
    # A third of the vocabulary ends a text, so that few are as long as they may be.
    monkeypatch.setattr(ee, "_end_tokens", lambda: list(range(0, 89, 3)))
    own = ee.calibrate(0.1, delta=0.4, tokens=10_000, max_new_tokens=200)
    sizes = np.bincount(own.measured.groups)
    assert sizes.max() < 200 == own.max_group_size
    asked = (own.measured.scores, own.measured.correct, 0.1)
    options = {"delta": 0.4, "groups": own.measured.groups, "costs": [1, 3, 5, 6]}
    expected = offramp.calibrate_cascade(*asked, **options, max_group_size=200)
    assert own.thresholds == tuple(expected.thresholds.tolist())
    assert own.promise == expected.assumptions
    assert "more than 200 samples;" in own.promise
    # Nothing is promised without delta, and other certificates are asked for later.
    assert not own.cascade(mode="sequential").delta
    assert "more than 200 samples;" in own.cascade(0.2, mode="budget", delta=0.3).assumptions

    stored = json.loads(json.dumps(own.to_dict()))
    assert Calibration.from_dict(stored, own.measured).promise == own.promise
    del stored["max_group_size"]
    earlier = Calibration.from_dict(stored, own.measured)
    assert earlier.promise == offramp.calibrate_cascade(*asked, **options).assumptions
    for damage in (int(sizes.max()) - 1, 1.5, "9"):
        with pytest.raises(StorageError, match=r"max_group_size is .*calibrate again"):
            Calibration.from_dict({**stored, "max_group_size": damage}, own.measured)

    given = ee.calibrate(0.1, delta=0.4, sequences=texts, max_new_tokens=200)
    assert given.max_group_size is None
    assert "more than 29 samples, the most one has here;" in given.promise


def test_a_calibration_survives_json(trained):
    calibration = trained.calibration
    stored = json.loads(json.dumps(calibration.to_dict()))
    loaded = Calibration.from_dict(stored, Measured.from_arrays(calibration.measured.to_arrays()))
    assert loaded.thresholds == calibration.thresholds
    assert loaded.coverage == calibration.coverage
    for eps in EPSILONS:
        assert loaded.at(eps) == calibration.at(eps)
    assert str(loaded) == str(calibration)
    for name in stored:
        if name not in ("thresholds", "accepted", "correct", "promise", "max_group_size"):
            with pytest.raises(StorageError, match="calibrate again"):
                Calibration.from_dict(
                    {key: value for key, value in stored.items() if key != name}, calibration.measured
                )
    arrays = calibration.measured.to_arrays()
    for name in arrays:
        with pytest.raises(StorageError, match="calibrate again"):
            Measured.from_arrays({key: value for key, value in arrays.items() if key != name})
        with pytest.raises(StorageError, match="contradicts itself"):
            Measured.from_arrays({**arrays, name: arrays[name][..., 1:]})


def test_the_table_says_what_it_rests_on(trained):
    text = str(trained.calibration)
    assert "ε = 0.5 on 1740 tokens of 60 sequences" in text
    assert "mode sequential" in text
    assert "nothing is promised" in text
    assert len([line for line in text.splitlines() if " of 6 " in line]) == 3


def test_a_head_that_never_agrees_never_exits(trained, texts):
    scores = trained.score(texts)
    scores.correct[1] = False
    calibration = calibrate_scores(scores, (1, 3, 5), 6, 0.5, dtype="float32", text_hash="")
    assert calibration.thresholds[1] == math.inf
    assert calibration.accepted[1] == 0
    assert math.isnan(calibration.accuracy[1])
    assert "never" in str(calibration)
    stored = calibration.to_dict()
    assert stored["thresholds"][1] is None
    assert Calibration.from_dict(stored, calibration.measured).thresholds == calibration.thresholds


@pytest.mark.parametrize("eps", [0, 1, -0.1, 1.2, math.nan, "0.9", True, None])
def test_epsilon_outside_the_open_interval_is_refused(trained, texts, eps):
    with pytest.raises(InputError, match="eps is"):
        trained.calibrate(eps, sequences=texts)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"mode": "holm"}, "mode is 'holm'"),
        ({"mode": "marginal", "delta": 0.1}, "delta goes with mode"),
        ({"delta": 2}, "delta is 2"),
        ({"prompts": ["a"]}, "prompts need a tokenizer"),
        ({"sequences": [[1]], "prompts": ["a"]}, "both given"),
    ],
)
def test_bad_settings_get_a_sentence(trained, settings, words):
    with pytest.raises(InputError, match=words):
        trained.calibrate(0.9, **settings)


def test_heads_in_another_dtype_warn_once(trained, model, texts, tmp_path):
    trained.save_pretrained(tmp_path / "heads")
    half = copy.deepcopy(model).to(torch.bfloat16)
    ee = offramp.EarlyExitModel.from_pretrained(tmp_path / "heads", model=half)
    ids = torch.full((1, 4), 9)
    with pytest.warns(UserWarning, match="calibrated in float32 and the model runs in bfloat16"):
        ee.generate(ids, max_new_tokens=3)
    with warnings.catch_warnings(record=True) as record:
        ee.generate(ids, max_new_tokens=3)
    assert not [item for item in record if "calibrated in" in str(item.message)]
    assert ee.generate(ids, max_new_tokens=3, mode="off").shape == (1, 7)
