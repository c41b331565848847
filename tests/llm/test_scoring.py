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
from offramp.llm.calibrating import calibrate_scores
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
                head = trained.heads.after(layer)
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
def test_thresholds_at_any_epsilon_are_those_of_the_core(trained, texts, eps):
    scores = trained.score(texts)
    expected = offramp.fast_calibrate(scores.scores, scores.correct, eps)
    assert trained.calibration.at(eps) == tuple(expected.tolist())
    calibration = trained.calibrate(eps, sequences=texts)
    assert calibration.thresholds == tuple(expected.tolist())
    for k, tau in enumerate(calibration.thresholds):
        accepted = scores.scores[k].astype(np.float64) >= tau
        assert calibration.accepted[k] == int(accepted.sum())
        assert calibration.correct[k] == int(scores.correct[k][accepted].sum())
        if accepted.any():
            assert calibration.accuracy[k] >= eps
    trained.calibrate(0.5, sequences=texts)


def test_a_calibration_survives_json(trained):
    stored = json.loads(json.dumps(trained.calibration.to_dict()))
    loaded = Calibration.from_dict(stored)
    assert loaded.thresholds == trained.calibration.thresholds
    assert loaded.coverage == trained.calibration.coverage
    for eps in EPSILONS:
        assert loaded.at(eps) == trained.calibration.at(eps)
    assert str(loaded) == str(trained.calibration)
    for name in stored:
        if name not in ("thresholds", "accepted", "correct"):
            with pytest.raises(StorageError, match="calibrate again"):
                Calibration.from_dict({key: value for key, value in stored.items() if key != name})


def test_the_table_says_what_it_rests_on(trained):
    text = str(trained.calibration)
    assert "ε = 0.5 on 1740 tokens of 60 sequences" in text
    assert "marginal" in text
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
    assert Calibration.from_dict(stored).thresholds == calibration.thresholds


@pytest.mark.parametrize("eps", [0, 1, -0.1, 1.2, math.nan, "0.9", True, None])
def test_epsilon_outside_the_open_interval_is_refused(trained, texts, eps):
    with pytest.raises(InputError, match="eps is"):
        trained.calibrate(eps, sequences=texts)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"mode": "sequential"}, "mode is 'sequential'"),
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
