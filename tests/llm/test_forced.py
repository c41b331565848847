"""One teacher-forced pass against a walk over every position, and its exits against decoded ones."""

from __future__ import annotations

import copy
import math

import numpy as np
import offramp
import pytest
import torch
from offramp import InputError
from offramp.evaluation.forced import CONFIDENCES, read, sweep
from offramp.evaluation.metrics import areas
from offramp.llm.decoding import EarlyExitOutput
from offramp.llm.sequences import TokenSequence


@pytest.fixture(scope="module")
def other(model, texts):
    """A second head set on the same model: other layers, the paper's kind."""
    ee = offramp.EarlyExitModel(model, None, layers=(2, 5), head="linear")
    ee.train_heads(sequences=texts, epochs=1, batch_size=64)
    return ee


@pytest.fixture(scope="module")
def continued(trained, texts):
    """Text the model wrote itself, of two lengths, so that batches put it out of order."""
    starts = [text[: 4 + 9 * (index % 2)] for index, text in enumerate(texts[:12])]
    return trained.continue_greedily(starts, max_new_tokens=12)


@pytest.fixture(scope="module")
def readings(trained, other, continued):
    return read({"mlp": trained, "linear": other}, continued)


@torch.no_grad()
def test_every_confidence_is_that_of_the_heads_softmax(trained, other, model, continued, readings):
    place = 0
    for group, item in enumerate(continued):
        hidden = model(item.tokens[None], output_hidden_states=True).hidden_states
        for position in range(item.prompt_length, len(item.tokens)):
            for name, ee in (("mlp", trained), ("linear", other)):
                reading = readings[name]
                assert reading.groups[place] == group
                assert reading.emitted[place] == item.tokens[position] == reading.model_choices[place]
                for index, layer in enumerate(ee.layers):
                    head = ee.heads_in_use.after(layer)
                    p = head(hidden[layer][0, position - 1]).double().softmax(dim=-1)
                    top = p.topk(2)
                    expected = (top.values[0] - top.values[1], top.values[0], (p * p.log()).sum())
                    for confidence, value in zip(CONFIDENCES, expected, strict=True):
                        found = reading.confidence[confidence][index, place]
                        assert found == pytest.approx(float(value), abs=5e-5), confidence
                    assert reading.choices[index, place] == int(head.tokens(top.indices[:1]))
            place += 1
    assert place == len(readings["mlp"].groups)


def test_one_pass_for_all_head_sets_gives_what_each_alone_gives(trained, other, continued, readings):
    for name, ee in (("mlp", trained), ("linear", other)):
        alone, scores = ee.score(continued), readings[name].scores()
        np.testing.assert_allclose(scores.scores, alone.scores, atol=1e-6)
        for field in ("correct", "choices", "model_choices", "groups", "emitted"):
            assert np.array_equal(getattr(scores, field), getattr(alone, field)), field


@pytest.mark.parametrize("eps", [0.2, 0.5, 0.9])
def test_a_point_counts_the_first_exits(readings, trained, eps):
    reading = readings["mlp"]
    (point,) = sweep(reading, trained.calibration, [eps])
    assert point.thresholds == trained.calibration.at(eps)
    depths, agreeing = [], []
    for place in range(len(reading.groups)):
        taken = [k for k in range(3) if float(reading.confidence["margin"][k, place]) >= point.thresholds[k]]
        depths.append((*trained.layers, 6)[taken[0] if taken else 3])
        choice = reading.choices[taken[0], place] if taken else reading.model_choices[place]
        agreeing.append(choice == reading.model_choices[place])
    depths, agreeing = np.array(depths), np.array(agreeing)
    assert point.exits == {layer: int((depths == layer).sum()) for layer in (1, 3, 5, 6)}
    assert point.shares.agreement == pytest.approx(agreeing.mean())
    assert point.shares.mean_layers == pytest.approx(depths.mean())
    assert point.shares.early == pytest.approx((depths < 6).mean())
    early = agreeing[depths < 6]
    assert (
        point.shares.early_agreement == pytest.approx(early.mean())
        if len(early)
        else math.isnan(point.shares.early_agreement)
    )
    for layer, found in zip(trained.layers, point.head_agreement, strict=True):
        there = agreeing[depths == layer]
        assert found == pytest.approx(there.mean()) if len(there) else math.isnan(found)
    low, high = point.shares.intervals["agreement"]
    assert low <= point.shares.agreement <= high


def test_a_sweep_takes_the_thresholds_of_the_mode_asked_for(readings, trained):
    calibration = trained.calibration
    (marginal,), (sequential,), (own,) = (
        sweep(readings["mlp"], calibration, [0.5], mode=mode) for mode in ("marginal", "sequential", None)
    )
    measured = calibration.measured
    assert (
        list(marginal.thresholds) == offramp.fast_calibrate(measured.scores, measured.correct, 0.5).tolist()
    )
    assert sequential.thresholds == own.thresholds != marginal.thresholds


def test_exits_found_by_one_pass_are_the_exits_decoding_takes(trained, texts, thresholds):
    """On the text exits wrote, at the thresholds they wrote it with."""
    for text in texts[:4]:
        prompt = text[None, :6]
        out = trained.generate(prompt, thresholds=thresholds, max_new_tokens=14, return_dict_in_generate=True)
        assert isinstance(out, EarlyExitOutput)
        reading = read({"": trained}, [TokenSequence(out.sequences[0], 6)])[""]
        at = reading.scores().first_exit(thresholds)
        assert np.array([1, 3, 5, 6])[at].tolist() == out.exit_layers[0].tolist()


def test_time_is_predicted_from_costs(readings, trained, texts):
    plan = copy.copy(trained).plan(0.5, scores=trained.score(texts), measure=0)
    points = sweep(readings["mlp"], trained.calibration, [0.1, 0.9999], costs=plan.costs)
    assert 0 < points[0].predicted < points[1].predicted
    assert math.isnan(sweep(readings["mlp"], trained.calibration, [0.5])[0].predicted)


def test_areas_and_reliability_are_those_of_each_head(readings):
    reading = readings["mlp"]
    for confidence in CONFIDENCES:
        bounds = reading.area_intervals(confidence, resamples=40)
        for index, found in enumerate(reading.areas(confidence)):
            assert found == areas(reading.confidence[confidence][index], reading.correct[index])
            assert bounds[index, 0] <= found.aurc <= bounds[index, 1]
    assert [item.count.sum() for item in reading.reliability()] == [len(reading.groups)] * 3


def test_head_sets_must_share_a_trained_model(trained, model, texts):
    untrained = offramp.EarlyExitModel(model, None, layers=(2,))
    with pytest.raises(InputError, match="not trained"):
        read({"a": trained, "b": untrained}, trained.continue_greedily([texts[0][:4]], max_new_tokens=2))
    elsewhere = copy.copy(trained)
    elsewhere.model = copy.deepcopy(model)
    with pytest.raises(InputError, match="b stands on another model"):
        read({"a": trained, "b": elsewhere}, texts)
