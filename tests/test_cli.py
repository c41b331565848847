import json
import math
import os
import subprocess
import sys

import numpy as np
import offramp
import pytest
from offramp.cli.app import command, run
from offramp.evaluation.tables import read_csv

SCORES = [0.2, 0.5, 0.7, 0.9]
CORRECT = [0, 1, 0, 1]


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save("scores.npy", np.array(SCORES, np.float32))
    np.save("correct.npy", np.array(CORRECT, bool))
    return tmp_path


def ok(capsys, *arguments):
    code = run([str(item) for item in arguments])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    return captured.out


def refused(capsys, *arguments):
    code = run([str(item) for item in arguments])
    captured = capsys.readouterr()
    assert code == 2, captured.err
    assert captured.out == ""
    assert captured.err.count("\n") == 1, captured.err
    assert "Traceback" not in captured.err
    return captured.err


def process(code, *arguments, **kwargs):
    """Run a line of Python and then the command, in a process of its own."""
    script = f"{code}\nfrom offramp.cli import main\nmain()"
    return subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        **kwargs,
    )


# threshold


def test_threshold_finds_what_fast_calibrate_finds(files, capsys):
    found = json.loads(ok(capsys, "threshold", "scores.npy", "correct.npy", "--eps", ".6,.9", "--json"))
    assert found["n"] == 4
    taus = [row["threshold"] for row in found["thresholds"]]
    assert taus == offramp.fast_calibrate(np.array(SCORES, np.float32), CORRECT, [0.6, 0.9]).tolist()
    assert [(row["accepted"], row["correct"]) for row in found["thresholds"]] == [(3, 2), (1, 1)]
    assert [row["coverage"] for row in found["thresholds"]] == [0.75, 0.25]
    assert [row["accuracy"] for row in found["thresholds"]] == [2 / 3, 1.0]


def test_threshold_shows_a_table(files, capsys):
    out = ok(capsys, "threshold", "scores.npy", "correct.npy", "--eps", ".6")
    assert "0.5" in out
    assert "75.0%" in out
    assert "{" not in out


def test_a_threshold_that_nothing_reaches_is_null(files, capsys):
    np.save("correct.npy", np.zeros(4, bool))
    (row,) = json.loads(ok(capsys, "threshold", "scores.npy", "correct.npy", "--json"))["thresholds"]
    assert row["threshold"] is None
    assert row["accepted"] == 0
    assert row["accuracy"] is None
    assert "none reaches it" in ok(capsys, "threshold", "scores.npy", "correct.npy")


def test_threshold_of_several_heads_at_several_targets(files, capsys):
    random = np.random.default_rng(0)
    scores, correct = random.random((3, 50)).astype(np.float16), random.random((3, 50)) < 0.7
    np.save("scores.npy", scores)
    np.save("correct.npy", correct)
    rows = json.loads(ok(capsys, "threshold", "scores.npy", "correct.npy", "--eps", ".7,.8", "--json"))[
        "thresholds"
    ]
    assert [(row["head"], row["eps"]) for row in rows] == [(h, e) for h in range(3) for e in (0.7, 0.8)]
    expected = offramp.fast_calibrate(scores, correct, [0.7, 0.8])
    for row in rows:
        tau = expected[row["head"], [0.7, 0.8].index(row["eps"])]
        assert row["threshold"] == (tau if math.isfinite(tau) else None)
        accepted = scores[row["head"]].astype(float) >= tau
        assert (row["accepted"], row["correct"]) == (accepted.sum(), correct[row["head"]][accepted].sum())


def test_threshold_by_index_counts_ties_as_the_paper_does(files, capsys):
    np.save("scores.npy", np.array([0.5, 0.5, 0.5, 0.9]))
    np.save("correct.npy", np.array([0, 1, 1, 1]))
    arguments = ("threshold", "scores.npy", "correct.npy", "--eps", "0.8", "--json")
    assert json.loads(ok(capsys, *arguments))["thresholds"][0]["threshold"] == 0.9
    assert json.loads(ok(capsys, *arguments, "--rule", "index"))["thresholds"][0]["threshold"] == 0.5


@pytest.mark.parametrize(
    "text",
    [
        "score,correct\n0.2,0\n0.5,1\n0.7,0\n0.9,1\n",
        'correct,note,score\nfalse,a,0.2\ntrue,b,0.5\nFalse,"c,d",0.7\nTRUE,e,0.9\n',
        "﻿score,correct\r\n0.2,0.0\r\n0.5,1.0\r\n0.7,0.0\r\n0.9,1.0\r\n",
    ],
    ids=["plain", "words and quotes", "excel"],
)
def test_one_csv_table_is_enough(files, capsys, text):
    (files / "table.csv").write_text(text, encoding="utf-8", newline="")
    (row,) = json.loads(ok(capsys, "threshold", "table.csv", "--eps", "0.6", "--json"))["thresholds"]
    assert (row["threshold"], row["accepted"], row["correct"]) == (0.5, 3, 2)


def test_columns_of_a_csv_are_chosen_by_name(files, capsys):
    (files / "table.csv").write_text("margin,other,right\n0.2,9,0\n0.5,9,1\n0.7,9,0\n0.9,9,1\n")
    columns = ("--score-column", "margin", "--correct-column", "right")
    (row,) = json.loads(ok(capsys, "threshold", "table.csv", "--eps", "0.6", "--json", *columns))[
        "thresholds"
    ]
    assert row["threshold"] == 0.5
    assert "margin, other, right" in refused(capsys, "threshold", "table.csv")
    assert "'sore'" in refused(capsys, "threshold", "table.csv", "--score-column", "sore")


def test_a_headless_csv_of_one_column(files, capsys):
    (files / "scores.csv").write_text("0.2\n0.5\n0.7\n0.9\n")
    (files / "correct.csv").write_text("0\n1\n0\n1\n")
    (row,) = json.loads(ok(capsys, "threshold", "scores.csv", "correct.csv", "--eps", "0.6", "--json"))[
        "thresholds"
    ]
    assert (row["n"], row["threshold"]) == (4, 0.5)


def test_parquet_with_or_without_a_reader(files, capsys):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(
        pyarrow.table({"score": SCORES, "correct": [bool(c) for c in CORRECT]}), "table.parquet"
    )
    (row,) = json.loads(ok(capsys, "threshold", "table.parquet", "--eps", "0.6", "--json"))["thresholds"]
    assert row["threshold"] == 0.5


def test_parquet_without_a_reader_says_what_to_install(files, capsys, monkeypatch):
    monkeypatch.setattr("offramp.cli.columns.find_spec", lambda name: None)
    (files / "table.parquet").write_bytes(b"PAR1")
    assert "pip install pyarrow" in refused(capsys, "threshold", "table.parquet")


# what is the user's fault


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["threshold", "missing.npy", "correct.npy"], "missing.npy"),
        (["threshold", "scores.npy"], "CORRECT"),
        (["threshold"], "SCORES"),
        (["threshold", "scores.npy", "correct.npy", "--eps", "1.5"], "eps"),
        (["threshold", "scores.npy", "correct.npy", "--eps", "nan"], "eps"),
        (["threshold", "scores.npy", "correct.npy", "--eps", "high"], "'high'"),
        (["threshold", "scores.npy", "correct.npy", "--esp", "0.9"], "--esp"),
        (["threshold", "scores.npy", "correct.npy", "--rule", "sets"], "'sets'"),
        (["threshold", "scores.npy", "correct.npy", "--threads", "0"], "--threads"),
        (["threshold", "scores.npy", "correct.npy", "third.npy"], "third.npy"),
        (["threshold", "nan.npy", "correct.npy"], "scores"),
        (["threshold", "short.npy", "correct.npy"], "shape"),
        (["threshold", "scores.npy", "twos.npy"], "correct"),
        (["threshold", "whole.npy", "correct.npy"], "scores"),
        (["threshold", "objects.npy", "correct.npy"], "objects.npy"),
        (["threshold", "torn.npy", "correct.npy"], "torn.npy"),
        (["threshold", "empty.npy", "correct.npy"], "empty.npy"),
        (["threshold", "scores.txt", "correct.npy"], ".npy, .csv, .parquet"),
        (["threshold", "folder", "correct.npy"], "folder"),
        (["threshold", "words.csv", "correct.npy"], "line 3"),
        (["threshold", "ragged.csv"], "ragged.csv"),
        (["threshold", "binary.csv"], "binary.csv: this is not a csv table"),
        (["threshold", "header.csv"], "header.csv: there are no rows"),
        (["threshold", "scores.npy", "mixed.csv"], "line 1"),
        (["threshold", "empty.csv", "correct.npy"], "empty.csv"),
        (["thresh"], "thresh"),
        (["--jason"], "--jason"),
        (["info", "extra"], "extra"),
        (["bench", "sorting"], "sorting"),
        (["bench", "--samples", "0"], "--samples"),
        (["calibrate", "nowhere", "--eps", "1"], "--eps"),
        (["generate", "nowhere", "Hello", "--eps", "0"], "--eps"),
        (["train", "demo", "--output", "x"], "--layers"),
        (["train", "demo", "--output", "x", "--layers", "a,b"], "'a,b'"),
        (["train", "demo", "--output", "x", "--layers", "1", "--prompts", "none.txt"], "none.txt"),
    ],
)
def test_input_at_fault_is_said_in_one_sentence(files, capsys, arguments, expected):
    np.save("nan.npy", np.array([0.2, math.nan, 0.7, 0.9]))
    np.save("short.npy", np.array([0.2, 0.7]))
    np.save("twos.npy", np.array([0, 1, 2, 1]))
    np.save("whole.npy", np.array([1, 2, 3, 4]))
    np.save("objects.npy", np.array([{}, 1, 2, 3], dtype=object), allow_pickle=True)
    (files / "torn.npy").write_bytes((files / "scores.npy").read_bytes()[:-3])
    for name in ("empty.npy", "empty.csv", "scores.txt"):
        (files / name).touch()
    (files / "folder").mkdir()
    (files / "words.csv").write_text("score\n0.2\nhigh\n0.7\n0.9\n")
    (files / "mixed.csv").write_text("0.5\ntrue\nfalse\ntrue\n")
    (files / "binary.csv").write_bytes(bytes(range(255, 0, -1)))
    (files / "header.csv").write_text("score,correct\n\n")
    (files / "ragged.csv").write_text("score,correct\n0.2,0\n0.5\n")
    assert expected in refused(capsys, *arguments)


def test_nothing_is_pickled(files, capsys):
    class Trap:
        def __reduce__(self):
            return (os.mkdir, ("sprung",))

    np.save("trap.npy", np.array([Trap()] * 4, dtype=object), allow_pickle=True)
    refused(capsys, "threshold", "trap.npy", "correct.npy")
    assert not (files / "sprung").exists()


# the frame


def test_no_command_lists_the_commands(capsys):
    out = ok(capsys)
    for name in ("demo", "train", "calibrate", "generate", "evaluate", "bench", "threshold", "info"):
        assert name in out


# lm-eval's arguments are the harness's own.
@pytest.mark.parametrize("name", sorted(set(command.commands) - {"lm-eval"}))
def test_every_command_has_help_and_the_shared_options(capsys, name):
    out = ok(capsys, name, "--help")
    for option in ("--json", "--quiet", "--seed", "--threads"):
        assert option in out


def test_version(capsys):
    assert offramp.__version__ in ok(capsys, "--version")


def test_info_names_versions_and_instruction_set(capsys):
    facts = json.loads(ok(capsys, "info", "--json", "--threads", "3"))
    assert facts["versions"]["offramp"] == offramp.__version__
    assert facts["versions"]["numpy"] == np.__version__
    assert facts["threads"] == 3
    assert facts["instruction_set"]
    assert facts["instruction_set"] in ok(capsys, "info")


def test_a_bug_is_shown_with_its_traceback(capsys, monkeypatch):
    def broken():
        raise ZeroDivisionError

    monkeypatch.setattr("offramp.machine.versions", broken)
    assert run(["info"]) == 1
    err = capsys.readouterr().err
    assert "ZeroDivisionError" in err
    assert "bug" in err


def test_an_interrupt_ends_with_130(capsys, monkeypatch):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr("offramp.machine.versions", interrupted)
    assert run(["info"]) == 130
    assert "Traceback" not in capsys.readouterr().err


def test_bench_prints_a_number_for_every_contender(capsys, tmp_path):
    picture, table = tmp_path / "speed.png", tmp_path / "speed.csv"
    arguments = ("bench", "--samples", "2000", "--vocabulary", "500", "--rounds", "1", "--quiet", "--json")
    seconds = json.loads(ok(capsys, *arguments, "--plot", str(picture), "--csv", str(table)))["seconds"]
    assert set(seconds) == {"calibrate", "decide"}
    assert set(seconds["decide"]) == {"500 float32", "500 float16", "500 bfloat16"}
    assert set(seconds["calibrate"]["by_size"]) == {"1000", "2000"}
    suites = [
        *seconds["calibrate"].pop("by_size").values(),
        *seconds["calibrate"].values(),
        *seconds["decide"].values(),
    ]
    for contenders in suites:
        assert contenders
        assert all(value > 0 for value in contenders.values())
    assert {"offramp", "one read of the inputs", "numpy argsort + cumsum"} <= set(suites[0])
    assert picture.read_bytes().startswith(b"\x89PNG")
    rows = read_csv(table)
    assert {row["table"] for row in rows} == {"size", "heads and targets", "kind", "decision"}
    for row in rows:
        if (row["table"], row["row"]) == ("size", 2000):
            assert row["microseconds"] == 1e6 * suites[1][row["contender"]]
            assert row["reads"] == pytest.approx(
                suites[1][row["contender"]] / suites[1]["one read of the inputs"]
            )
        if row["contender"] == "offramp":
            assert row["times_ours"] == 1.0


def test_bench_leaves_slow_peers_out_of_large_sizes(capsys):
    arguments = ("bench", "calibrate", "--samples", "3000", "--rounds", "1", "--quiet", "--json")
    seconds = json.loads(ok(capsys, *arguments, "--patience", "0"))["seconds"]["calibrate"]["by_size"]
    assert len(seconds["1000"]) > len(seconds["3000"]) == 2


def test_bench_prints_tables(capsys):
    printed = ok(capsys, "bench", "calibrate", "--samples", "1000", "--rounds", "1")
    for words in ("from 1,000 scores", "one read of the inputs", "4 heads, 20 targets", "all equal"):
        assert words in printed


def test_bench_refuses_to_time_contenders_that_disagree(capsys, monkeypatch):
    monkeypatch.setattr("offramp.evaluation.peers.calibration._lowest", lambda ordered, good: -1.0)
    assert run(["bench", "calibrate", "--samples", "100", "--rounds", "1"]) == 1
    assert "something else, so its time means nothing" in capsys.readouterr().err


# processes of their own


def test_the_installed_script_runs(files):
    script = os.path.join(os.path.dirname(sys.executable), "offramp")
    done = subprocess.run(
        [script, "threshold", "scores.npy", "correct.npy", "--json"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout)["n"] == 4
    assert subprocess.run([script, "--nope"], capture_output=True, check=False).returncode == 2


@pytest.mark.parametrize("missing", ["click", "rich"])
def test_without_the_cli_extra_one_sentence_says_so(missing):
    done = process(f"import sys; sys.modules[{missing!r}] = None", "info")
    assert done.returncode == 2
    assert (
        done.stderr == f"offramp: the command needs {missing}: install it with `pip install offramp[cli]`\n"
    )


def test_threshold_and_info_need_no_torch(files):
    hide = "import sys; sys.modules['torch'] = sys.modules['transformers'] = None"
    assert json.loads(process(hide, "threshold", "scores.npy", "correct.npy", "--json").stdout)["n"] == 4
    assert process(hide, "info", "--json").returncode == 0
    done = process(hide, "train", "demo", "--layers", "3", "--output", "x")
    assert done.returncode == 2
    assert done.stderr == "offramp: this needs torch: run `pip install offramp[llm]`\n"


def test_help_does_not_load_torch():
    done = process(
        "import atexit, sys; atexit.register(lambda: print('torch' in sys.modules))", "train", "--help"
    )
    assert done.stdout.endswith("False\n")


def test_a_reader_that_leaves_is_no_bug(files):
    code = "import os; reader, writer = os.pipe(); os.dup2(writer, 1); os.close(reader); os.close(writer)"
    done = process(code, "threshold", "scores.npy", "correct.npy")
    assert (done.returncode, done.stderr) == (0, "")
