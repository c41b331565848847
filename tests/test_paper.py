"""The paper's figures on a tiny model: every number in its file, resumed where it stopped, and drawn."""

import errno
import json
import math
import sys
from dataclasses import replace
from importlib.util import find_spec
from xml.etree import ElementTree

import numpy as np
import offramp
import pytest

if find_spec("lm_eval") is None:
    pytest.skip("needs lm_eval (offramp[eval])", allow_module_level=True)

from offramp.evaluation.evaluate import curve_rows
from offramp.evaluation.forced import Reading
from offramp.evaluation.metrics import areas
from offramp.evaluation.paper import stages
from offramp.evaluation.paper.comparing import difference_rows, tie_rows
from offramp.evaluation.paper.config import PaperConfig
from offramp.evaluation.paper.heads import VARIANTS
from offramp.evaluation.paper.stages import make_figures
from offramp.evaluation.tables import read_csv, write_csv
from offramp.llm import files
from offramp.llm.calibrating import Measured
from test_cli_models import refuse, save_tiny_model, succeed

TABLES = tuple(stages.STAGES)
FIGURES = ("fig1-training", "fig2-score", "fig3-speed", "fig4-exits", "fig5-risk-coverage", "fig6-confidence")
SMALL = PaperConfig(
    layers=(2, 4), shortlist=8, tokens=300, epochs=2, calibration_tokens=150, grid=(0.3, 0.6),
    prompts=3, max_new_tokens=8, timed=2, tasks=("offramp_pronouns",), documents=4,
)  # fmt: skip


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("paper") / "tiny")


@pytest.fixture(scope="module")
def command(tiny):
    """The command's arguments, at a size for tests."""
    return (
        "figures", tiny, "--device", "cpu", "-q", "--layers", "2,4", "--shortlist", "8", "--quick",
        "--eps", ".3,.6", "--tasks", "offramp_pronouns", "--limit", "4", "--tokens", "300",
    )  # fmt: skip


@pytest.fixture(scope="module")
def made(command, tmp_path_factory):
    folder = tmp_path_factory.mktemp("figures")
    return folder, json.loads(succeed(*command, "--folder", folder, "--json"))


def test_every_figure_is_there_twice_with_its_numbers(made):
    folder, found = made
    for name in FIGURES:
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert ElementTree.parse(folder / f"{name}.svg").getroot().tag.endswith("svg")
    for name in TABLES:
        stored = read_csv(folder / f"{name}.csv")
        assert len(stored) == len(found[name]) > 0
        assert set(stored[0]) == set(found[name][0])


def test_the_numbers_fit_together(made):
    folder, _ = made
    rows = {name: read_csv(folder / f"{name}.csv") for name in TABLES}
    assert {row["heads"] for row in rows["training"]} == set(VARIANTS)
    assert {row["layer"] for row in rows["training"]} == {2, 4}
    for name in VARIANTS:
        steps = [row["step"] for row in rows["training"] if (row["heads"], row["layer"]) == (name, 2)]
        assert steps[0] == 0
        assert len(steps) > 3
        assert steps == sorted(set(steps))
    for row in rows["exits"]:
        assert sum(row[f"exits_{layer}"] for layer in (2, 4, 6)) == row["tokens"]
    assert [row["eps"] for row in rows["exits"]] == [0.3, 0.6]
    assert sum(math.isnan(row["eps"]) for row in rows["score"]) == 1
    assert len(rows["score"]) == 3
    areas = {(row["heads"], row["layer"], row["confidence"]): row for row in rows["confidence"]}
    assert len(areas) == 4 * 2 * 3
    for row in rows["differences"]:
        one, other = (row[side].rsplit(" ", 1) for side in ("one", "other"))
        expected = (
            areas[one[0], row["layer"], one[1]]["aurc"] - areas[other[0], row["layer"], other[1]]["aurc"]
        )
        assert row["aurc"] == pytest.approx(expected)
        assert row["aurc_low"] <= row["aurc_high"]
    assert len(rows["forced"]) == 4 * 2 * 2
    for row in rows["forced"]:
        assert sum(row[f"exits_{layer}"] for layer in (2, 4, 6)) == row["tokens"]
        assert row["agreement_low"] <= row["agreement"] <= row["agreement_high"]
    for row in rows["ties"]:
        # The rule that minds ties meets ε; the other need not, and never takes less.
        assert math.isnan(row["set_accuracy"]) or row["set_accuracy"] >= row["eps"]
        assert row["index_threshold"] <= row["set_threshold"]


def test_a_second_run_measures_nothing_again(made, command, monkeypatch):
    folder, found = made
    stamps = {path: path.stat().st_mtime_ns for path in folder.rglob("*.csv")}
    for name in ("read", "decode_prompts", "measure_speed"):
        monkeypatch.setattr(stages, name, lambda *_, **__: pytest.fail("measured again"))
    monkeypatch.setattr(offramp.EarlyExitModel, "train_heads", lambda *_, **__: pytest.fail("trained again"))
    again = json.loads(succeed(*command, "--folder", folder, "--json"))
    assert again == found
    assert stamps == {path: path.stat().st_mtime_ns for path in folder.rglob("*.csv")}


def test_numbers_of_other_settings_do_not_pass_for_those_asked_for(tiny, tmp_path, monkeypatch):
    model, tokenizer = offramp.load_model(tiny, device="cpu")
    config = replace(SMALL, tasks=())
    first, _ = make_figures(model, tokenizer, tmp_path, config)
    real = stages.write_csv

    def stopped(path, rows):
        real(path, rows)
        raise KeyboardInterrupt

    monkeypatch.setattr(stages, "write_csv", stopped)
    with pytest.raises(KeyboardInterrupt):
        make_figures(model, tokenizer, tmp_path, replace(config, grid=(0.7,)))
    monkeypatch.undo()
    again, _ = make_figures(model, tokenizer, tmp_path, config)
    assert again["forced"] == first["forced"]
    assert {row["eps"] for row in again["forced"]} == set(config.grid)


def test_an_interrupted_run_goes_on_where_it_stopped(tiny, tmp_path, monkeypatch):
    model, tokenizer = offramp.load_model(tiny, device="cpu")
    real, trained = offramp.EarlyExitModel.train_heads, []

    def train(ee, *arguments, **settings):
        if len(trained) == 2:
            raise KeyboardInterrupt
        trained.append((ee.head_configs[ee.layers[0]].init, settings["entropy_weight"]))
        return real(ee, *arguments, **settings)

    monkeypatch.setattr(offramp.EarlyExitModel, "train_heads", train)
    with pytest.raises(KeyboardInterrupt):
        make_figures(model, tokenizer, tmp_path, SMALL)
    assert not (tmp_path / "training.csv").exists()
    trained.clear()
    with monkeypatch.context() as patch:
        patch.setattr(stages, "measure_speed", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            make_figures(model, tokenizer, tmp_path, SMALL)
    assert trained == list(VARIANTS.values())[2:]
    written = {name: (tmp_path / f"{name}.csv").read_text() for name in TABLES[:-1]}
    for name in ("decode_prompts", "confidence_rows"):
        monkeypatch.setattr(stages, name, lambda *_, **__: pytest.fail("measured again"))
    tables, findings = make_figures(model, tokenizer, tmp_path, SMALL)
    assert set(tables) == set(TABLES)
    assert written == {name: (tmp_path / f"{name}.csv").read_text() for name in TABLES[:-1]}
    assert [item.eps for item in findings.decoded] == list(SMALL.grid)


def test_a_stage_is_measured_anew_when_what_it_depends_on_changes(tiny, tmp_path, monkeypatch):
    model, tokenizer = offramp.load_model(tiny, device="cpu")
    calls = []
    for name, (_, settings) in stages.STAGES.items():

        def measure(work, name=name):
            calls.append(name)
            return [{"stage": name, "eps": work.config.grid[0]}]

        monkeypatch.setitem(stages.STAGES, name, (measure, settings))
    monkeypatch.setattr(stages, "_findings", lambda *_: None)
    first = PaperConfig(layers=(2,), tasks=())

    def run(config):
        calls.clear()
        make_figures(model, tokenizer, tmp_path, config)
        return set(calls)

    everything = set(stages.STAGES) - {"score"}
    assert run(first) == everything
    assert run(first) == set()
    assert run(replace(first, timed=3)) == {"speed"}
    assert run(replace(first, timed=3, grid=(0.4,))) == {"forced", "ties", "exits", "speed"}
    assert run(replace(first, timed=3, grid=(0.4,), epochs=9)) == everything
    (tmp_path / "exits.csv").unlink()
    assert run(replace(first, timed=3, grid=(0.4,), epochs=9)) == {"exits"}


@pytest.mark.parametrize("share", [0, 0.5])
def test_benchmarks_larger_than_the_budget_are_scored_anew(made, tiny, monkeypatch, share):
    folder, _ = made
    model, tokenizer = offramp.load_model(tiny, device="cpu")
    ee = offramp.EarlyExitModel.from_pretrained(
        folder / "heads" / "copy-0" / "exits", model=model, tokenizer=tokenizer
    )
    held, said, stderr = [], [], sys.stderr

    def say(text):
        # Not where the harness's own notes are swallowed.
        assert sys.stderr is stderr
        said.append(text)

    class Watched(stages.Remembered):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            held.append(self)

    monkeypatch.setattr(stages, "Remembered", Watched)
    config = replace(SMALL, tasks=("offramp_pronouns", "offramp_endings"), documents=6)
    work = stages.Work(folder, config, {}, ee, say, None)
    expected = stages.score(work)
    assert said == []
    monkeypatch.setattr(stages, "BUDGET", int(share * held[0].kept))
    assert stages.score(work) == expected
    assert len(said) == 1
    assert "computed anew at every ε" in said[0]
    kept = sum(tensor.nbytes for exits, final in held[1].values() for tensor in (*exits.values(), final))
    assert kept == held[1].kept <= share * held[0].kept
    assert (kept > 0) == (share > 0)


def test_the_machine_of_every_stage_is_kept_and_shown(tiny, tmp_path, monkeypatch):
    model, tokenizer = offramp.load_model(tiny, device="cpu")
    described = {"processor": "Abacus 1", "system": "Linux"}
    monkeypatch.setattr(stages.machine, "describe", lambda: dict(described))
    config = replace(SMALL, tasks=())
    _, found = make_figures(model, tokenizer, tmp_path, config)
    assert found.machine == described
    described["processor"] = "Abacus 2"
    # Only the timing is run again, on the other machine.
    _, found = make_figures(model, tokenizer, tmp_path, replace(config, timed=1))
    stored = json.loads((tmp_path / "stages.json").read_text())
    assert {stage for stage, done in stored.items() if done["machine"]["processor"] == "Abacus 2"} == {
        "speed"
    }
    assert found.machine["system"] == "Linux"
    first, second = found.machine["processor"].split("; ")
    assert first.startswith("Abacus 1 (training, ")
    assert second == "Abacus 2 (speed)"
    assert "machine" not in json.loads((tmp_path / "settings.json").read_text())
    # A record from before machines were kept says so.
    del stored["ties"]["machine"]
    (tmp_path / "stages.json").write_text(json.dumps(stored))
    _, found = make_figures(model, tokenizer, tmp_path, replace(config, timed=1))
    assert "not recorded (ties)" in found.machine["processor"]


def test_a_full_disk_is_a_sentence_and_keeps_what_was_written(command, made, tmp_path, monkeypatch):
    folder, _ = made
    kept = {path.name: path.read_bytes() for path in folder.glob("*.csv")}

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    (folder / "stages.json").unlink()
    monkeypatch.setattr(stages, "write_csv", full)
    assert "the disk is full" in refuse(*command, "--folder", folder)
    monkeypatch.undo()
    assert kept == {path.name: path.read_bytes() for path in folder.glob("*.csv")}
    assert not list(folder.rglob("*.tmp"))
    # A write that stops half-way leaves the old file.
    write_csv(tmp_path / "rows.csv", [{"a": 1}])
    monkeypatch.setattr(files.os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        write_csv(tmp_path / "rows.csv", [{"a": 2}])
    assert read_csv(tmp_path / "rows.csv") == [{"a": 1}]
    assert [path.name for path in tmp_path.iterdir()] == ["rows.csv"]


@pytest.mark.usefixtures("own_tasks_only")
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (("--eps", ".5,1.2"), "eps is 1.2"),
        (("--eps", "nan"), "eps is nan"),
        (("--layers", "2,9"), "layers contains 9"),
        (("--heads", "{}/nowhere"), "nowhere"),
        (("--tasks", "offramp_pronouns,no_such_task"), "task 'no_such_task' does not exist"),
    ],
)
def test_bad_input_is_refused_before_anything_is_run(command, tmp_path, changes, words):
    changes = [change.format(tmp_path) for change in changes]
    assert words in refuse(*command, "--folder", tmp_path / "out", *changes)
    assert not list((tmp_path / "out").glob("*.csv"))


def test_heads_that_are_not_calibrated_are_named(tiny, tmp_path, command):
    model, tokenizer = offramp.load_model(tiny, device="cpu")
    ee = offramp.EarlyExitModel(model, tokenizer, layers=(3,), head=offramp.HeadConfig("mlp", shortlist=8))
    ee.train_heads(tokens=100, prompts=["a b", "c"], epochs=1)
    ee.save_pretrained(tmp_path / "raw")
    assert "raw is not calibrated" in refuse(
        *command, "--folder", tmp_path / "out", "--heads", tmp_path / "raw"
    )


def test_csv_cells_come_back_as_they_were(tmp_path):
    rows = [{"a": 1, "b": 0.1, "c": math.inf, "d": "x, y", "e": True}, {"a": 2, "b": math.nan, "f": -1.5}]
    write_csv(tmp_path / "rows.csv", rows)
    first, second = read_csv(tmp_path / "rows.csv")
    assert {name: first[name] for name in rows[0]} == rows[0]
    assert (second["a"], second["f"]) == (2, -1.5)
    assert math.isnan(second["b"])
    assert np.isnan(first["f"])
    # What is not a number leaves its cell empty, in the file as well.
    assert (tmp_path / "rows.csv").read_text() == 'a,b,c,d,e,f\n1,0.1,inf,"x, y",True,\n2,,,,,-1.5\n'


def reading(margin, correct, groups):
    """A single head's text: what it says is right where ``correct``."""
    count = len(groups)
    confidence = {"margin": margin, "max_prob": margin[::-1].copy(), "entropy": np.zeros(count)}
    return Reading(
        (3,),
        6,
        {name: values[None].astype(np.float32) for name, values in confidence.items()},
        np.where(correct, 1, 2)[None],
        np.ones(count, np.int64),
        np.asarray(groups),
        np.ones(count, np.int64),
    )


def test_differences_are_paired_and_negative_where_the_first_sorts_better():
    random = np.random.default_rng(0)
    groups = np.arange(300) // 10
    correct = random.random(300) < 0.6
    good, bad = correct + 0.8 * random.random(300), random.random(300)
    readings = {"good": reading(good, correct, groups), "bad": reading(bad, correct, groups)}
    (row,) = difference_rows(readings, [(("good", "margin"), ("bad", "margin"))])
    assert (row["one"], row["other"], row["layer"]) == ("good margin", "bad margin", 3)
    assert row["aurc"] == pytest.approx(areas(good, correct).aurc - areas(bad, correct).aurc, abs=1e-6)
    assert row["aurc_low"] < row["aurc"] < row["aurc_high"] < 0
    # The same errors on both sides: what the errors themselves cost cancels.
    assert row["e_aurc"] == pytest.approx(row["aurc"])
    (same,) = difference_rows(readings, [(("good", "margin"), ("good", "margin"))])
    assert [same[name] for name in ("aurc", "aurc_low", "aurc_high", "e_aurc")] == [0, 0, 0, 0]
    (other,) = difference_rows(readings, [(("good", "margin"), ("good", "max_prob"))])
    assert other["aurc"] == pytest.approx(
        areas(good, correct).aurc - areas(good[::-1], correct).aurc, abs=1e-6
    )


def test_the_papers_formula_lands_inside_a_tie():
    measured = Measured(
        np.array([[0.5, 0.5, 0.5, 0.9]], np.float32), np.array([[0, 1, 1, 1]], bool), np.arange(4)
    )
    never, inside = tie_rows("heads", (3,), measured, [0.999, 0.8])
    assert (inside["tokens"], inside["tied"]) == (4, 2)
    assert (inside["index_threshold"], inside["index_accuracy"]) == (0.5, 0.75)
    assert (inside["set_threshold"], inside["set_accuracy"]) == (pytest.approx(0.9), 1.0)
    assert never["set_accuracy"] == 1.0


def test_curves_end_at_full_coverage_and_the_share_of_errors():
    random = np.random.default_rng(1)
    correct = random.random(500) < 0.7
    rows = curve_rows("heads", reading(random.random(500), correct, np.arange(500)))
    found = [row for row in rows if row["confidence"] == "margin"]
    assert len(found) == 200
    ends = [max(found, key=lambda row: row["coverage"]), min(found, key=lambda row: row["coverage"])]
    assert (ends[0]["coverage"], ends[0]["risk"]) == (1.0, pytest.approx(1 - correct.mean()))
    assert ends[1]["coverage"] == pytest.approx(1 / 500)
