"""The planner: what it counts is what decoding runs, and what does not pay is left out."""

from __future__ import annotations

import math
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from offramp import EarlyExitModel, HeadConfig, InputError
from offramp.llm.heads import ExitHead, ExitHeads, make_head
from offramp.llm.layer import LeanLayer
from offramp.llm.planning import Costs, make_plan, measure_heads
from offramp.llm.scoring import Scores
from offramp.llm.sequences import TokenSequence
from offramp.llm.stepping import Steps
from offramp.llm.trunk import Trunk
from tiny import VOCAB, make_model

ROWS = (1, 2, 3, 4, 6, 8, 16, 32)


class Words:
    """A tokenizer that gives every prompt a few tokens of its own."""

    chat_template = None

    def __call__(self, text):
        return {"input_ids": [6 + sum(map(ord, word)) % (VOCAB - 6) for word in text.split()]}


@pytest.fixture(scope="module")
def ee():
    """Exits on a model whose deep layers change little, so that heads know what it says."""
    model = make_model()
    for layer in model.model.layers[1:]:
        for part in (layer.self_attn.o_proj, layer.mlp.down_proj):
            part.weight.mul_(0.1)
    exits = EarlyExitModel(model, Words(), layers=(1, 3, 5), head=HeadConfig("mlp", shortlist=60))
    generator = torch.Generator().manual_seed(2)
    starts = [torch.randint(6, VOCAB, (6,), generator=generator) for _ in range(60)]
    texts = exits.continue_greedily(starts, max_new_tokens=24)
    exits.train_heads(sequences=texts, epochs=4, batch_size=64)
    exits.calibrate(0.6, sequences=texts)
    return exits


def scores_of(margins, correct, starts):
    """Scores of made-up heads, (K, N)."""
    margins = np.asarray(margins, dtype=np.float32)
    none = np.zeros(margins.shape[1], dtype=np.int64)
    return Scores(margins, np.asarray(correct, dtype=bool), np.cumsum(starts), none, none, none)


def costs(layer=1.0, rows=0.0, output=0.0, head=0.0, step=0.0, segment=0.0):
    """A layer costs so much, and so much more for every further row; a run of layers so much besides."""
    return Costs(
        tuple(layer + rows * (count - 1) for count in ROWS),
        segment,
        tuple(output * count for count in ROWS),
        ((head,) * len(ROWS),) * 3,
        step,
    )


def test_the_replay_counts_the_layers_that_decoding_runs(ee):
    """With a layer for the only cost, the prediction for a text is the layer runs of writing it."""
    prompt = torch.randint(6, VOCAB, (1, 7), generator=torch.Generator().manual_seed(9))
    scored = ee.score(ee.continue_greedily([prompt[0]], max_new_tokens=40)).scores
    thresholds = [float(np.quantile(row, share)) for row, share in zip(scored, (0.8, 0.7, 0.6), strict=True)]
    output = ee.generate(
        prompt, thresholds=thresholds, max_new_tokens=40, eos_token_id=None, return_dict_in_generate=True
    )
    scores = ee.score([TokenSequence(output.sequences[0], 7)])
    assert len(set(output.exit_layers[0].tolist())) > 2
    plan = make_plan(costs(), scores, ee.layers, 6, lambda *_: thresholds, 0.9)
    every = next(item for item in plan.considered if item.mode == "exit" and item.layers == ee.layers)
    assert every.predicted * 40 == pytest.approx(output.stats.layer_runs)
    assert plan.off.predicted == 6


def test_rows_that_wait_are_paid_for():
    """One head after layer 1 of 6, every other token leaves: layer 1 always runs, the others over two rows at once."""
    scores = scores_of([[0.9, 0.1] * 20], [[True] * 40], [1] + [0] * 39)
    plan = make_plan(
        Costs(tuple(1 + 0.5 * (count - 1) for count in ROWS), 2.0, (0.25,) * 8, ((0.125,) * 8,), 0.0625),
        scores,
        (1,),
        6,
        lambda *_: [0.5],
        0.9,
    )
    (every,) = [item for item in plan.considered if item.mode == "exit"]
    early, late = 0.0625 + 2 + 1 + 0.125, 0.0625 + 2 + 1 + 0.125 + 2 + 5 * 1.5 + 0.25
    assert every.predicted == pytest.approx((early + late) / 2)
    assert plan.off.predicted == pytest.approx(0.0625 + 2 + 6 + 0.25)


def test_a_wrong_draft_is_paid_for_in_verify_mode():
    """Right drafts cost their share of one long pass; a wrong one throws away what was written after it."""
    right = scores_of([[0.9, 0.9, 0.9, 0.1]], [[True] * 4], [1, 0, 0, 0])
    wrong = scores_of([[0.9, 0.9, 0.9, 0.1]], [[False, True, True, True]], [1, 0, 0, 0])
    predicted = [
        next(
            item.predicted
            for item in make_plan(costs(), scores, (1,), 6, lambda *_: [0.5], 0.9).considered
            if item.mode == "verify"
        )
        for scores in (right, wrong)
    ]
    # Four times layer 1, once the other five.
    assert predicted[0] == pytest.approx((4 + 5) / 4)
    # The first round writes four tokens and keeps one, the second writes the other three again.
    assert predicted[1] == pytest.approx((4 + 5 + 3 + 5) / 4)


@pytest.mark.parametrize("mode", ["exit", "verify"])
def test_exits_that_do_not_pay_are_switched_off(mode):
    margins = np.tile([0.9, 0.9, 0.1, 0.9], 30)
    scores = scores_of([margins] * 3, [[True] * 120] * 3, [1] + [0] * 119)

    def plan(**cost):
        return make_plan(costs(**cost), scores, (1, 3, 5), 6, lambda *_: [0.5] * 3, 0.9).best(mode)

    cheap, dear, linear = plan(), plan(head=6.0), plan(rows=1.0)
    # The deeper heads know nothing the first does not: asking them is not worth their cost.
    assert cheap.layers == (1,)
    assert cheap.thresholds == (0.5, math.inf, math.inf)
    assert cheap.predicted < 6
    # Heads as dear as the model, or layers that take as long for two rows as for two tokens.
    for nothing in (dear, linear):
        assert nothing.layers == ()
        assert set(nothing.thresholds) == {math.inf}
        assert nothing.predicted == 6


def test_exits_that_prove_slower_than_none_are_switched_off():
    scores = scores_of([[0.9] * 40] * 3, [[True] * 40] * 3, [1] + [0] * 39)
    plan = make_plan(costs(), scores, (1, 3, 5), 6, lambda *_: [0.5] * 3, 0.9)
    assert plan.exit.layers
    assert plan.verify.layers
    # Exits gain where a prompt is slow, which the medians of each mode by itself would not show.
    found = plan.with_measured({"off": [6.0, 9.0, 5.0], "exit": [5.9, 8.0, 6.5], "verify": [6.1, 8.9, 5.1]})
    assert found.exit.layers == plan.exit.layers
    assert found.exit.measured == 6.5
    assert found.verify.layers == ()
    assert set(found.verify.thresholds) == {math.inf}
    assert found.verify.predicted == 6.0
    assert found.verify.measured == found.off.measured == 6.0
    # What was chosen stays to be seen beside what it took.
    assert found.rejected == (replace(plan.verify, measured=6.1),)
    assert str(found).splitlines()[-1].endswith("switched off")
    # Nothing is known of a mode that was not timed.
    assert plan.with_measured({"off": [6.0]}).verify.layers == plan.verify.layers
    assert plan.with_measured({"off": [], "exit": [], "verify": []}).exit == plan.exit


def test_rows_a_head_has_not_read_are_forgotten_with_a_wrong_draft():
    """A deep head with keys and values of its own does not catch up on positions that were taken back."""
    margins = [[0.9, 0.1, 0.9, 0.9], [0.1, 0.9, 0.1, 0.1]]
    scores = scores_of(margins, [[False, True, True, True], [True] * 4], [1, 0, 0, 0])
    prices = Costs((0.0,) * 8, 0.0, (0.0,) * 8, ((0.0,) * 8, tuple(float(rows) for rows in ROWS)), 0.0)
    plan = make_plan(prices, scores, (1, 3), 6, lambda *_: [0.5, 0.5], 0.9)
    both = next(item for item in plan.considered if item.mode == "verify" and item.layers == (1, 3))
    # Two rows for the second token; the end of the text brings two more, which go with the wrong first one, and the
    # second token is asked for again.
    assert both.predicted == pytest.approx((2 + 1) / 4)


def test_trying_on_few_tokens_first_loses_no_more_than_noise(monkeypatch):
    """Of four heads' 105 ways to verify, the one found is as fast as the fastest of all."""
    generator = np.random.default_rng(5)
    hard = generator.random(1500)
    known = np.linspace(0.2, 0.8, 4)[:, None]
    margins = np.clip(known + 0.3 - hard + 0.2 * generator.standard_normal((4, 1500)), 0, 1)
    right = generator.random((4, 1500)) < 0.5 + 0.6 * margins
    scores = scores_of(margins, right, np.arange(1500) % 50 == 0)
    prices = replace(costs(rows=0.05, output=0.2, step=0.1), heads=((0.2,) * 8,) * 4)

    def plan():
        thresholds = lambda mode, eps, heads: [eps] * 4  # noqa: E731  # short
        return make_plan(prices, scores, (2, 4, 6, 8), 12, thresholds, 0.7)

    found = plan()
    monkeypatch.setattr("offramp.llm.planning._FINALISTS", 1000)
    every = plan()
    assert len(every.considered) == 1 + 15 + 7 * 15
    assert len(found.considered) == 1 + 12 + 12
    for mode in ("exit", "verify"):
        assert every.best(mode).layers
        assert found.best(mode).predicted <= 1.01 * every.best(mode).predicted


class Clock:
    """Time that passes where the model computes, and nowhere else."""

    def __init__(self):
        self.now = 0.0

    def after(self, function, seconds):
        """Let a function take so long."""

        def run(*arguments, **keywords):
            found = function(*arguments, **keywords)
            self.now += seconds(found, *arguments)
            return found

        return run


def test_predicted_and_measured_time_agree(ee, monkeypatch):
    """On a machine without noise the prediction is within 15% of what generate then takes, in every mode."""
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", lambda: clock.now)
    monkeypatch.setattr(
        LeanLayer, "run", clock.after(LeanLayer.run, lambda out, *_: 1 + 0.1 * (len(out) - 1))
    )
    step = clock.after(Steps.run, lambda out, *given: len(given[3]) * (1 + 0.1 * (out.shape[1] - 1)))
    monkeypatch.setattr(Steps, "run", step)
    monkeypatch.setattr(ExitHead, "logits", clock.after(ExitHead.logits, lambda *_: 0.2))
    monkeypatch.setattr(
        Trunk, "logits", clock.after(Trunk.logits, lambda out, *_: 1 + 0.1 * (out[..., 0].numel() - 1))
    )
    monkeypatch.setattr(Trunk, "embed", clock.after(Trunk.embed, lambda *_: 0.05))
    # Of a run of layers as of a layer: what masks and angles cost.
    monkeypatch.setattr(Trunk, "run", clock.after(Trunk.run, lambda *_: 0.5))
    _, starts = ee._text(None, None, "calibration")
    scores = ee.score(ee.continue_greedily(starts[:20], max_new_tokens=40))
    ee._trunk.model.generation_config.eos_token_id, kept = None, ee.model.generation_config.eos_token_id
    try:
        plan = ee.plan(scores=scores, measure=20, max_new_tokens=40)
    finally:
        ee.model.generation_config.eos_token_id, ee._plan = kept, None
    assert plan.costs.layer == pytest.approx([1 + 0.1 * (count - 1) for count in ROWS])
    assert plan.costs.segment == pytest.approx(0.5)
    assert np.array(plan.costs.heads) == pytest.approx(np.full((3, len(ROWS)), 0.2))
    # The test says something only if exits are on in both modes.
    assert plan.exit.layers
    assert plan.verify.layers
    for option in (plan.off, plan.exit, plan.verify):
        assert option.measured == pytest.approx(option.predicted, rel=0.15), option.mode
    assert "x exits off" in str(plan)


def test_heads_that_do_the_same_work_are_given_the_same_time(monkeypatch):
    """So that noise does not choose among them; others keep their own."""
    trunk = Trunk(make_model())
    configs = {1: HeadConfig("mlp", shortlist=40), 3: HeadConfig("mlp", shortlist=50)}
    configs |= {2: configs[1], 4: HeadConfig("linear", shortlist=40), 5: configs[1]}
    heads = ExitHeads(
        {at: make_head(trunk, configs[at], torch.arange(configs[at].shortlist)) for at in range(1, 6)}
    )
    taken = iter([1.0, 5.0, 7.0, 8.0, 3.0])
    monkeypatch.setattr("offramp.llm.planning._head_costs", lambda *_: (time := next(taken), 2 * time))
    assert measure_heads(trunk, heads, None) == ((3, 6), (3, 6), (7, 14), (8, 16), (3, 6))


def slow(function, seconds):
    """A function that takes so long as well."""

    def run(*arguments, **keywords):
        found = function(*arguments, **keywords)
        time.sleep(seconds(found, *arguments))
        return found

    return run


def test_predicted_and_measured_time_agree_on_this_machine(ee, monkeypatch):
    """By the real clock, with all that a step does besides; parts that sleep are what weighs, not who else computes."""
    monkeypatch.setattr(
        LeanLayer, "run", slow(LeanLayer.run, lambda out, *_: 0.004 + 0.0004 * (len(out) - 1))
    )
    step = slow(Steps.run, lambda out, *given: len(given[3]) * (0.004 + 0.0004 * (out.shape[1] - 1)))
    monkeypatch.setattr(Steps, "run", step)
    monkeypatch.setattr(ExitHead, "logits", slow(ExitHead.logits, lambda *_: 0.001))
    monkeypatch.setattr(Trunk, "logits", slow(Trunk.logits, lambda out, *_: 0.004 * out[..., 0].numel()))
    monkeypatch.setattr("offramp.llm.planning._REPEATS", 5)
    monkeypatch.setattr(ee.model.generation_config, "eos_token_id", None)
    generator = torch.Generator().manual_seed(4)
    starts = [torch.randint(6, VOCAB, (6,), generator=generator) for _ in range(4)]
    scores = ee.score(ee.continue_greedily(starts, max_new_tokens=24))
    try:
        plan = ee.plan(scores=scores, prompts=starts, measure=4, max_new_tokens=24)
    finally:
        ee._plan = None
    assert plan.exit.layers
    assert plan.verify.layers
    for option in (plan.off, plan.exit, plan.verify):
        assert option.measured == pytest.approx(option.predicted, rel=0.15), str(plan)


class TestWhatGenerateTakesOfAPlan:
    """Of a plan for 0.97 where 0.6 was calibrated."""

    @pytest.fixture(autouse=True)
    def planned(self, ee, monkeypatch):
        # Layers are all that costs, so that exits pay.
        monkeypatch.setattr("offramp.llm.model.measure_costs", lambda *_: costs())
        ee.plan(0.97, measure=0)
        assert ee._plan.exit.layers
        yield
        ee._plan = ee.monitor = None

    def thresholds(self, ee, mode, eps=None, audited=False):
        return tuple(ee._thresholds(mode, eps, None, audited)[0])

    def test_no_less_than_what_was_calibrated_for(self, ee):
        kept = [head for head, tau in enumerate(self.thresholds(ee, "exit")) if tau <= 1]
        assert kept
        assert self.thresholds(ee, "exit") != ee._plan.exit.thresholds
        assert [self.thresholds(ee, "exit")[head] for head in kept] == [
            ee.calibration.at(0.6, kept)[head] for head in kept
        ]
        assert self.thresholds(ee, "exit", 0.97) == ee._plan.exit.thresholds

    def test_another_eps_is_planned_by_the_same_costs(self, ee, monkeypatch):
        monkeypatch.setattr("offramp.llm.model.measure_costs", None)
        (found,) = {self.thresholds(ee, "exit", 0.9) for _ in range(2)}
        assert found != ee._plan.exit.thresholds
        assert (
            found
            == make_plan(
                ee._plan.costs, ee.calibration.measured, ee.layers, 6, ee.calibration.planned, 0.9
            ).exit.thresholds
        )

    def test_the_fastest_in_verify_mode_whatever_eps(self, ee):
        assert (
            self.thresholds(ee, "verify", 0.95) == self.thresholds(ee, "verify") == ee._plan.verify.thresholds
        )
        # What was timed and did not pay stays off.
        ee._plan = ee._plan.with_measured({"off": [1.0], "verify": [2.0]})
        assert set(self.thresholds(ee, "verify", 0.95)) == {math.inf}

    def test_an_audit_looks_at_what_was_promised(self, ee):
        ee.generate(torch.tensor([[7, 8, 9]]), mode="verify", audit=0.5, max_new_tokens=4)
        assert ee.monitor.eps == 0.6
        assert self.thresholds(ee, "verify", audited=True) == ee.calibration.thresholds


def test_verify_mode_drafts_without_certificates(ee):
    """Which no head would get for so few tokens."""
    certified = replace(ee.calibration, delta=1e-9, max_group_size=24, _known={})
    assert set(certified.planned("exit", 0.6, (0, 1, 2))) == {math.inf}
    assert certified.planned("verify", 0.6, (0, 1, 2)) == ee.calibration.planned("verify", 0.6, (0, 1, 2))
    assert ee.calibration.planned("exit", 0.6, (1,)) == ee.calibration.at(0.6, (1,))


def test_a_plan_needs_no_tokenizer_where_token_ids_are_given(ee, monkeypatch):
    monkeypatch.setattr(ee, "tokenizer", None)
    ee.plan(measure=0)
    ee.plan(prompts=[torch.tensor([7, 8, 9])], measure=1, max_new_tokens=3)
    with pytest.raises(InputError, match="tokenizer"):
        ee.plan()
    with pytest.raises(InputError, match="measure is -1"):
        ee.plan(measure=-1)
    ee._plan = None
