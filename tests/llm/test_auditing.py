"""Early tokens compared with the whole model's own: the right ones, whatever waits, and what follows from an alarm."""

from __future__ import annotations

import dataclasses
import math
import warnings

import numpy as np
import pytest
import torch
from offramp import AgreementError, EarlyExitModel, HeadConfig, InputError, Monitor
from test_decoding import rows_of
from tiny import VOCAB

NEW = 30


class Recorder(Monitor):
    """A monitor that remembers what it was told."""

    def reset(self):
        super().reset()
        self.told = []

    def update(self, checked, wrong, *, most, tokens):
        self.told.append((checked, wrong, most, tokens))
        super().update(checked, wrong, most=most, tokens=tokens)


@pytest.fixture
def ee(trained):
    """The trained exits with a monitor that never sounds."""
    trained.monitor = Recorder(trained.layers, 0.001)
    yield trained
    trained.monitor = None


def truth(ee, rows, thresholds):
    """Early tokens of each row by exit, and those not the model's own, from one pass over the text."""
    checked = np.zeros((len(rows), len(ee.layers)), int)
    wrong = np.zeros_like(checked)
    for row, item in enumerate(rows):
        scores = ee.score([item])
        for place, exit_ in enumerate(scores.first_exit(thresholds)):
            if exit_ < len(ee.layers):
                checked[row, exit_] += 1
                wrong[row, exit_] += scores.choices[exit_, place] != scores.model_choices[place]
    return checked, wrong


@pytest.mark.parametrize("cap", [0, 1, 4, None])
def test_every_early_token_is_compared(ee, thresholds, prompts, cap):
    """Whatever waits and whenever it is flushed: what is counted is what one pass of the whole model says."""
    ids, mask = prompts
    # The last head takes all that reaches it, so that it errs, too.
    thresholds = [*thresholds[:2], -1.0]
    settings = {
        "attention_mask": mask,
        "max_new_tokens": NEW,
        "thresholds": thresholds,
        "max_pending": cap,
        "return_dict_in_generate": True,
    }
    plain = ee.generate(ids, **settings)
    output = ee.generate(ids, audit=1.0, **settings)
    assert torch.equal(plain.sequences, output.sequences)
    assert torch.equal(plain.exit_layers, output.exit_layers)
    checked, wrong, most, tokens = ee.monitor.told[0]
    expected, errors = truth(ee, rows_of(output, ids.shape[1], mask), thresholds)
    assert checked.tolist() == expected.tolist()
    assert wrong.tolist() == errors.tolist()
    assert (most == NEW).all()
    assert tokens.tolist() == (output.exit_layers > 0).sum(dim=1).tolist()
    assert (wrong.sum(axis=0) > 0).all()
    assert (checked > wrong).any()


@pytest.mark.parametrize("cap", [0, None])
def test_what_the_whole_model_wrote_in_a_heads_place_is_not_compared(ee, prompts, cap):
    listed = ee.heads.after(1).shortlist.tolist()
    foreign = [token for token in range(6, VOCAB) if token not in listed]

    def every_third(input_ids, scores):
        outside = torch.ones(scores.shape[1], dtype=torch.bool)
        outside[listed if input_ids.shape[1] % 3 else foreign] = False
        return scores.masked_fill(outside, -math.inf)

    ids, mask = prompts
    output = ee.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=12,
        eos_token_id=None,
        audit=1.0,
        max_pending=cap,
        thresholds=[-1.0] * 3,
        logits_processor=[every_third],
        return_dict_in_generate=True,
    )
    early = (output.exit_layers == 1).sum(dim=1).tolist()
    assert early == [8] * 4
    assert ee.monitor.told[0][0].tolist() == [[count, 0, 0] for count in early]


def test_the_end_is_not_left_out(ee, prompts):
    """An exit that takes everything leaves nothing but what waits at the end."""
    thresholds = [0.0, math.inf, math.inf]
    output = ee.generate(
        prompts[0][:1], max_new_tokens=NEW, audit=1.0, thresholds=thresholds, return_dict_in_generate=True
    )
    assert ee.monitor.told[0][0].tolist() == [[output.exit_layers.shape[1], 0, 0]]


def test_a_share_is_drawn_beforehand(ee, thresholds, prompts):
    ids, mask = prompts
    drawn, checked, early = 0, 0, 0
    for _ in range(8):
        output = ee.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=NEW,
            audit=0.25,
            thresholds=thresholds,
            return_dict_in_generate=True,
        )
        counts, _, most, tokens = ee.monitor.told[-1]
        assert (counts.sum(axis=1) <= tokens).all()
        assert (tokens <= most).all()
        drawn += most.sum()
        checked += counts.sum()
        early += int(((output.exit_layers > 0) & (output.exit_layers < ee.num_layers)).sum())
    assert drawn == pytest.approx(8 * 4 * NEW * 0.25, rel=0.2)
    assert checked == pytest.approx(early * 0.25, rel=0.3)


def test_finished_rows_are_not_looked_at(ee, model, thresholds, prompts):
    ids, mask = prompts
    text = model.generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False)
    ends = text[:, 12:30:5].flatten().unique().tolist()
    for mode in ("exit", "verify"):
        output = ee.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=NEW,
            audit=1.0,
            mode=mode,
            eos_token_id=ends,
            thresholds=thresholds,
            return_dict_in_generate=True,
        )
        lengths = (output.exit_layers > 0).sum(dim=1)
        assert len(lengths.unique()) > 1
        assert ee.monitor.told[-1][3].tolist() == lengths.tolist()


@pytest.mark.parametrize(("row", "cap"), [(0, 1), (1, None), (2, 4), (3, None)])
def test_drafts_are_compared_for_nothing(ee, thresholds, prompts, row, cap):
    """In verify mode each position of the model's own text is drafted once, if a head takes it."""
    ids = prompts[0][row : row + 1, int((prompts[1][row] == 0).sum()) :]
    settings = {"max_new_tokens": NEW, "mode": "verify", "thresholds": thresholds, "max_pending": cap}
    plain = ee.generate(ids, return_dict_in_generate=True, **settings)
    output = ee.generate(ids, audit=0.01, return_dict_in_generate=True, **settings)
    assert torch.equal(plain.sequences, output.sequences)
    assert plain.stats.layer_runs == output.stats.layer_runs
    checked, wrong, most, _ = ee.monitor.told[0]
    expected, errors = truth(ee, rows_of(output, ids.shape[1], torch.ones_like(ids)), thresholds)
    assert checked.tolist() == expected.tolist()
    assert wrong.tolist() == errors.tolist()
    assert most.tolist() == [NEW]


def test_drafts_of_a_batch(ee, thresholds, prompts):
    ids, mask = prompts
    output = ee.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=NEW,
        mode="verify",
        audit=1.0,
        thresholds=thresholds,
        return_dict_in_generate=True,
    )
    checked, wrong, _, _ = ee.monitor.told[0]
    expected, errors = truth(ee, rows_of(output, ids.shape[1], mask), thresholds)
    # A column is drafted only where heads answer for all rows.
    assert (checked <= expected).all()
    assert (wrong <= errors).all()
    assert wrong.sum() > 0
    drafted = (output.exit_layers > 0) & (output.exit_layers < ee.num_layers)
    assert (checked - wrong).sum() == int(drafted.sum())


@pytest.mark.parametrize("mode", ["exit", "verify"])
def test_sampled_tokens_are_judged_by_the_first_choices(ee, thresholds, prompts, mode):
    """ε speaks of first choices on raw logits, whatever is drawn from them."""
    ids, mask = prompts
    torch.manual_seed(0)
    output = ee.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=NEW,
        mode=mode,
        audit=1.0,
        thresholds=thresholds,
        do_sample=True,
        temperature=2.0,
        return_dict_in_generate=True,
    )
    checked, wrong, _, _ = ee.monitor.told[0]
    expected, errors = truth(ee, rows_of(output, ids.shape[1], mask), thresholds)
    if mode == "exit":
        assert checked.tolist() == expected.tolist()
        assert wrong.tolist() == errors.tolist()
    assert (checked <= expected).all()
    assert checked.sum() > 0


# Drift.


@pytest.fixture(scope="module")
def calibrated(model):
    """Exits after layers 2 and 4, trained and calibrated on what follows 100 prompts, and those prompts."""
    generator = torch.Generator().manual_seed(11)
    prompts = torch.randint(6, VOCAB // 2, (100, 10), generator=generator)
    ee = EarlyExitModel(model, None, layers=(2, 4), head=HeadConfig("mlp", shortlist=None))
    written = ee.continue_greedily(list(prompts), max_new_tokens=20)
    ee.train_heads(sequences=written, epochs=6, batch_size=64, seed=1)
    ee.calibrate(0.8, sequences=written)
    return ee, prompts


@pytest.fixture
def exits(calibrated):
    ee, prompts = calibrated
    yield ee, prompts
    ee.monitor = None


def hard(ee, count):
    """Prompts of another kind: of many, those after which the heads are wrong most often."""
    pool = torch.randint(6, VOCAB, (2 * count, 10), generator=torch.Generator().manual_seed(12))
    checked, wrong = truth(ee, ee.continue_greedily(list(pool), max_new_tokens=20), ee.calibration.thresholds)
    rate = wrong.sum(axis=1) / np.maximum(checked.sum(axis=1), 1)
    return pool[np.argsort(-rate)[:count].copy()]


def test_nothing_sounds_on_text_of_the_same_kind(exits):
    ee, prompts = exits
    ee.monitor = Monitor(ee.layers, 0.75)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for part in prompts.split(25):
            ee.generate(part, max_new_tokens=20, audit=0.9)
    assert ee.monitor.total.checked > 500
    assert ee.monitor.alarms == ()


def test_another_kind_of_text_is_noticed(exits):
    ee, _ = exits
    ee.monitor = Monitor(ee.layers, 0.75)
    with pytest.warns(UserWarning, match="another kind than the calibration text"):
        ee.generate(hard(ee, 80), max_new_tokens=20, audit=0.9)
    assert None in ee.monitor.alarms
    assert ee.monitor.total.upper <= 0.75


def generated_by(ee, ids, **settings):
    output = ee.generate(ids, max_new_tokens=8, return_dict_in_generate=True, **settings)
    return set(output.exit_layers.flatten().tolist()) - {0}


def test_a_failed_head_is_left_out_and_the_others_are_calibrated_without_it(exits, monkeypatch):
    ee, prompts = exits
    ee.monitor = Monitor(ee.layers, 0.8, on_alarm="disable")
    assert generated_by(ee, prompts[:16]) == {2, 4, 6}
    with pytest.warns(UserWarning, match="after layer 2 .*left out"):
        ee.monitor.update([[8, 32]] * 60, [[4, 0]] * 60)
    assert generated_by(ee, prompts[:16]) == {4, 6}
    assert generated_by(ee, prompts[:16], thresholds=[0.0, 0.0]) == {4}
    taken = [exit_.threshold for exit_ in ee._exits("exit", None, None)]
    assert taken == [ee.calibration.at(0.8, heads=(1,))[1]]
    with pytest.warns(UserWarning, match="all exits"):
        ee.monitor.update([[8, 8]] * 60, [[4, 4]] * 60)
    assert generated_by(ee, prompts[:16]) == {6}
    ee.monitor.reset()
    assert generated_by(ee, prompts[:16]) == {2, 4, 6}


def test_an_alarm_may_stop_everything(exits):
    ee, prompts = exits
    ee.monitor = Monitor(ee.layers, 0.999, on_alarm="raise")
    with pytest.raises(AgreementError, match=r"agreement of at least 0.999 .* is refuted"):
        ee.generate(prompts[:16], max_new_tokens=20, thresholds=[0.0, 0.0], audit=1.0)
    assert ee.last_stats.tokens > 100
    with pytest.raises(AgreementError):
        ee.generate(prompts[:1], max_new_tokens=2)
    # Without exits there is nothing to fear.
    ee.generate(prompts[:1], max_new_tokens=2, mode="off", audit=1.0)


# What is tested.


def test_a_monitor_is_made_of_what_is_promised(exits):
    ee, prompts = exits
    ee.generate(prompts[:2], max_new_tokens=2)
    ee.generate(prompts[:2], max_new_tokens=2, audit=0.0)
    assert ee.monitor is None
    ee.generate(prompts[:2], max_new_tokens=2, audit=0.5, eps=0.7)
    assert (ee.monitor.eps, ee.monitor.share_of, ee.monitor.layers) == (0.7, "exits", (2, 4))
    made = ee.monitor
    # More may be promised than is tested.
    ee.generate(prompts[:2], max_new_tokens=2, audit=0.5)
    assert ee.monitor is made


def test_a_budget_is_a_share_of_all_tokens(exits, monkeypatch):
    ee, prompts = exits
    monkeypatch.setattr(ee, "calibration", dataclasses.replace(ee.calibration, mode="budget", _known={}))
    ee.generate(prompts[:4], max_new_tokens=10, audit=1.0)
    assert ee.monitor.share_of == "tokens"
    assert ee.monitor.total.checked == ee.last_stats.tokens
    assert 0 < sum(head.checked for head in ee.monitor.heads) < ee.last_stats.tokens


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"audit": 1.5}, "audit is 1.5"),
        ({"audit": True}, "audit is True"),
        ({"audit": "all"}, "audit is 'all'"),
        ({"audit": 0.1, "thresholds": [0.5, 0.5]}, "promise nothing to test"),
    ],
)
def test_refusals(exits, settings, message):
    ee, prompts = exits
    with pytest.raises(InputError, match=message):
        ee.generate(prompts[:1], max_new_tokens=2, **settings)


def test_a_monitor_of_something_else_is_refused(exits):
    ee, prompts = exits
    ee.monitor = Monitor((2, 5), 0.8)
    with pytest.raises(InputError, match="monitor is for exits after"):
        ee.generate(prompts[:1], max_new_tokens=2, audit=0.1)
    ee.monitor = Monitor(ee.layers, 0.9)
    with pytest.raises(InputError, match=r"promise 0.8 and the monitor tests for 0.9"):
        ee.generate(prompts[:1], max_new_tokens=2, audit=0.1)
