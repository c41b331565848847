"""The model of lm-evaluation-harness: against the harness's own with exits off, against a walk with exits on."""

from __future__ import annotations

import contextlib
import io
import json
import math
import subprocess
import sys
import types
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import offramp
import offramp_lm_eval
import pytest
import torch
from tiny import byte_tokenizer, make_model
from transformers import GPT2Config, GPT2LMHeadModel

if find_spec("lm_eval") is None:
    pytest.skip("needs lm_eval (offramp[eval])", allow_module_level=True)

import lm_eval
from lm_eval.models.huggingface import HFLM
from offramp import InputError
from offramp.cli.app import run
from offramp.evaluation.harness import LOCAL_TASKS, OfframpLM, find_tasks, local_tasks, task_scores
from offramp.evaluation.memory import BUDGET, Remembered

TASKS = Path(__file__).parents[1] / "data" / "lm_eval"
NAMES = [*local_tasks(), "offramp_test_rolling", "offramp_test_continue"]
LAYERS = (1, 3, 5)


@pytest.fixture(scope="module")
def exits():
    """A tiny model whose window the longer documents exceed, with calibrated heads."""
    model = make_model(seed=4, max_position_embeddings=120)
    ee = offramp.EarlyExitModel(
        model, byte_tokenizer(), layers=LAYERS, head=offramp.HeadConfig("mlp", shortlist=60)
    )
    generator = torch.Generator().manual_seed(2)
    texts = [torch.randint(6, 60, (24,), generator=generator) for _ in range(30)]
    ee.train_heads(sequences=texts, epochs=2, batch_size=64)
    ee.calibrate(0.4, sequences=texts)
    return ee


@pytest.fixture(scope="module")
def samples(exits):
    """What the harness got for every request, with its own model and with ours, exits off, also where it remembers."""
    models = {
        "own": HFLM(pretrained=exits.model, tokenizer=byte_tokenizer(), batch_size=3),
        "ours": OfframpLM(exits, mode="off", batch_size=3),
        "remembering": OfframpLM(exits, mode="off", batch_size=3, remember=Remembered(BUDGET)),
    }
    found = {}
    for name, model in models.items():
        tasks, manager = find_tasks(NAMES, [TASKS])
        result = lm_eval.simple_evaluate(
            model=model, tasks=tasks, task_manager=manager, limit=6, bootstrap_iters=0
        )
        found[name] = (result["samples"], result["results"])
    return found


@pytest.mark.parametrize("model", ["ours", "remembering"])
def test_with_exits_off_every_request_gets_what_the_harness_gives_it(samples, model):
    own, ours = samples["own"][0], samples[model][0]
    assert set(own) == set(ours) == set(NAMES)
    compared = 0
    for task in NAMES:
        for mine, theirs in zip(ours[task], own[task], strict=True):
            assert mine["arguments"] == theirs["arguments"]
            for one, other in zip(mine["resps"], theirs["resps"], strict=True):
                compared += 1
                if task == "offramp_test_continue":
                    assert one == other
                elif task == "offramp_test_rolling":
                    assert one == pytest.approx(other, abs=1e-5)
                else:
                    assert one[0][0] == pytest.approx(other[0][0], abs=1e-5)
                    assert one[0][1] == other[0][1]
    # Letters, endings, names; rolled passages; continuations.
    assert compared == 6 * 4 + 6 * 4 + 6 * 2 + 4 + 4
    # Of each kind some are longer than the window: cut on the left, rolled, cut to leave room for the continuation.
    for task, room in (("offramp_facts", 120), ("offramp_test_rolling", 120), ("offramp_test_continue", 100)):
        lengths = [len(request[0]) for item in own[task] for request in item["arguments"]]
        assert max(lengths) > room
    expected, found = samples["own"][1], samples[model][1]
    assert expected.keys() == found.keys()
    for task, metrics in expected.items():
        numbers = {name: value for name, value in metrics.items() if isinstance(value, int | float)}
        assert numbers
        assert {name: found[task][name] for name in numbers} == pytest.approx(numbers, rel=1e-5, nan_ok=True)


def test_continuations_say_something(samples):
    texts = [item["resps"][0][0] for item in samples["ours"][0]["offramp_test_continue"]]
    assert any(texts)
    assert len(set(texts)) > 1


@torch.no_grad()
def test_each_position_takes_the_first_head_that_would_have_exited(exits):
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(6, 60, (3, 20), generator=generator)
    scores = exits.score(tokens).scores
    thresholds = [float(np.quantile(row, share)) for row, share in zip(scores, (0.8, 0.6, 0.5), strict=True)]
    ours = OfframpLM(exits, thresholds=thresholds, batch_size=2)
    logits = ours._model_call(tokens)
    output = exits.model(tokens, output_hidden_states=True)
    taken = set()
    for row in range(3):
        for position in range(20):
            expected, answering = output.logits[row, position], 3
            for index in reversed(range(3)):
                head = exits.heads_in_use.after(LAYERS[index])
                said = head(output.hidden_states[LAYERS[index]][row, position])
                p = said.softmax(-1).topk(2).values
                if float(p[0] - p[1]) >= thresholds[index]:
                    expected, answering = torch.full((89,), -math.inf), index
                    expected[head.shortlist] = said
            taken.add(answering)
            torch.testing.assert_close(logits[row, position], expected, atol=1e-4, rtol=1e-4)
    assert taken == {0, 1, 2, 3}


def test_verify_mode_scores_as_the_whole_model(exits):
    """What it emits is the whole model's, whatever its heads draft."""
    tokens = torch.randint(6, 60, (2, 20), generator=torch.Generator().manual_seed(6))
    off, verify, early = (
        OfframpLM(exits, mode=mode, thresholds=thresholds, batch_size=2)._model_call(tokens)
        for mode, thresholds in (("off", None), ("verify", [0.0] * 3), ("exit", [0.0] * 3))
    )
    assert torch.equal(verify, off)
    assert not torch.equal(early, off)


@torch.no_grad()
def test_positions_count_from_the_first_token():
    """Seen only where they are learnt: turned ones tell distances alone."""
    torch.manual_seed(3)
    config = GPT2Config(vocab_size=89, n_embd=32, n_layer=4, n_head=4, n_positions=64)
    model = GPT2LMHeadModel(config).eval()
    ours = OfframpLM(offramp.EarlyExitModel(model, byte_tokenizer(), layers=(2,)), mode="off")
    tokens = torch.randint(6, 60, (2, 20), generator=torch.Generator().manual_seed(6))
    _, final = ours._states(tokens)
    torch.testing.assert_close(ours.exits.trunk.logits(final), model(tokens).logits)


def test_texts_of_one_length_are_remembered_apart(exits):
    generator = torch.Generator().manual_seed(6)
    keeping, plain = (OfframpLM(exits, eps=0.3, remember=memory) for memory in (Remembered(BUDGET), None))
    for _ in range(2):
        tokens = torch.randint(6, 60, (2, 20), generator=generator)
        assert torch.equal(keeping._model_call(tokens), plain._model_call(tokens))


def test_a_temperature_asks_for_samples(exits, monkeypatch):
    asked = []
    monkeypatch.setattr(exits, "generate", lambda **settings: asked.append(settings) or settings["input_ids"])
    ours = OfframpLM(exits, eps=0.3)
    tokens = torch.full((1, 5), 7)
    for settings in (
        {},
        {"temperature": 0.0},
        {"temperature": 0.7},
        {"temperature": 0.7, "do_sample": False},
    ):
        ours._model_generate(tokens, 8, ["</s>"], **settings)
    assert [item["do_sample"] for item in asked] == [False, False, True, False]
    assert [item.get("temperature") for item in asked] == [None, None, 0.7, 0.7]
    assert {item["max_length"] for item in asked} == {8}


def test_what_is_remembered_scores_as_what_is_run(exits, monkeypatch):
    plain = OfframpLM(exits, eps=0.3, batch_size=2)
    keeping = OfframpLM(exits, eps=0.5, batch_size=2, remember=Remembered(BUDGET))
    tasks = find_tasks(["offramp_endings"])
    fresh = list(task_scores(plain, tasks, limit=4))
    list(task_scores(keeping, tasks, limit=4))
    keeping.use(eps=0.3)
    monkeypatch.setattr(type(exits.trunk), "run", lambda *_, **__: pytest.fail("a layer ran again"))
    again = list(task_scores(keeping, tasks, limit=4))
    assert [row[:3] for row in again] == [row[:3] for row in fresh]
    assert {row[1] for row in again} == {"acc", "acc_norm"}


def test_generation_goes_through_the_engine(exits):
    """With exits on, the harness gets what `generate` writes."""
    ours = OfframpLM(exits, eps=0.3, batch_size=1)
    tasks, manager = find_tasks(["offramp_test_continue"], [TASKS])
    result = lm_eval.simple_evaluate(model=ours, tasks=tasks, task_manager=manager, bootstrap_iters=0)
    early = 0
    for item in result["samples"]["offramp_test_continue"]:
        # As the harness cuts it: twenty of the window's 120 tokens are for the continuation.
        ids = exits.tokenizer(item["arguments"][0][0], return_tensors="pt")["input_ids"][:, -100:]
        written = exits.generate(ids, eps=0.3, max_new_tokens=20, do_sample=False)[0, ids.shape[1] :]
        early += sum(count for layer, count in exits.last_stats.tokens_by_exit.items() if layer < 6)
        text = exits.tokenizer.decode(written, skip_special_tokens=True)
        assert item["resps"][0][0] == text.split("\n\n")[0].split("5")[0]
    assert early > 0


def test_the_models_own_tokenizer_and_pad_token_stay_as_they_were(exits):
    before = exits.tokenizer.pad_token
    exits.tokenizer.pad_token = None
    OfframpLM(exits)
    assert exits.tokenizer.pad_token is None
    exits.tokenizer.pad_token = before


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"eps": 1.5}, "eps is 1.5"),
        ({"mode": "fast"}, "mode is 'fast'"),
        ({"thresholds": [0.5]}, "thresholds is"),
    ],
)
def test_bad_settings_are_refused(exits, settings, words):
    with pytest.raises(InputError, match=words):
        OfframpLM(exits, **settings)


@pytest.mark.usefixtures("own_tasks_only")
def test_an_unknown_task_is_named():
    with pytest.raises(InputError, match="task 'no_such_task' does not exist"):
        find_tasks(["offramp_facts", "no_such_task"])


@pytest.fixture
def groups(tmp_path):
    """Tasks for a group with a score of its own, inside another, and for one without."""
    part = "output_type: multiple_choice\ntest_split: test\n" + "".join(
        f"{line}\n"
        for line in (LOCAL_TASKS / "offramp_endings.yaml").read_text().splitlines()
        if line.startswith(("doc_to", "metric_list", "  "))
    )
    for name in ("local.py", "endings.jsonl"):
        (tmp_path / name).write_text((LOCAL_TASKS / name).read_text())
    for name in "abc":
        (tmp_path / f"{name}.yaml").write_text(
            f"task: part_{name}\ncustom_dataset: !function local.endings\n{part}"
        )
    score = "aggregate_metric_list:\n  - metric: acc\n    weight_by_size: true\n"
    (tmp_path / "inner.yaml").write_text(f"group: inner\ntask: [part_a, part_b]\n{score}")
    (tmp_path / "outer.yaml").write_text(f"group: outer\ntask: [inner, part_c]\n{score}")
    (tmp_path / "plain.yaml").write_text("group: plain\ntask: [part_a, part_b]\n")
    return tmp_path


@pytest.mark.usefixtures("own_tasks_only")
@pytest.mark.parametrize(
    ("task", "scored"), [("outer", {"outer"}), ("inner", {"inner"}), ("plain", {"part_a", "part_b"})]
)
def test_a_group_with_a_score_stands_for_its_tasks(exits, groups, monkeypatch, task, scored):
    monkeypatch.setattr("offramp.evaluation.harness.LOCAL_TASKS", groups)
    found = list(task_scores(OfframpLM(exits, eps=0.3), find_tasks([task]), limit=2))
    assert {name for name, *_ in found} == scored


@pytest.mark.usefixtures("own_tasks_only")
def test_data_that_cannot_be_had_is_a_sentence(exits, groups, monkeypatch):
    (groups / "local.py").write_text("def endings(**_):\n    raise ConnectionError('no way to the hub')\n")
    with pytest.raises(InputError, match="tasks part_a cannot be loaded: no way to the hub"):
        find_tasks(["part_a"], [groups])
    exits.model.save_pretrained(groups / "model")
    monkeypatch.setattr(
        "offramp.evaluation.harness.HarnessCLI.execute",
        lambda *_: (_ for _ in ()).throw(ConnectionError("no way to the hub")),
    )
    code, _, err = command("--model", "offramp", "--tasks", "part_a")
    assert code == 2
    assert err.splitlines()[-1].endswith("the data of the tasks cannot be had: no way to the hub")


@pytest.mark.usefixtures("own_tasks_only")
def test_loading_tasks_says_nothing(caplog):
    find_tasks(local_tasks())
    assert not caplog.records


def command(*arguments):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run(["lm-eval", *map(str, arguments)])
    return code, out.getvalue(), err.getvalue()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (("pretrained={}", "offramp_facts,no_such_task"), "no_such_task"),
        (("pretrained={}", "offramp_facts"), "was not written by offramp"),
        (("pretrained={}/nowhere", "offramp_facts"), "nowhere"),
    ],
)
@pytest.mark.usefixtures("own_tasks_only")
def test_the_harness_command_refuses_in_a_sentence(exits, tmp_path, settings, words):
    exits.model.save_pretrained(tmp_path)
    model_args, tasks = (item.format(tmp_path) for item in settings)
    code, _, err = command(
        "--model", "offramp", "--model_args", model_args, "--device", "cpu", "--tasks", tasks
    )
    assert code == 2
    assert words in err.splitlines()[-1]
    assert "Traceback" not in err


@pytest.fixture(scope="module")
def stored(exits, tmp_path_factory):
    """The folder of the exits, and beside it their base model's."""
    folder = tmp_path_factory.mktemp("harness")
    exits.model.save_pretrained(folder / "tiny")
    exits.tokenizer.save_pretrained(folder / "tiny")
    model, tokenizer = offramp.load_model(folder / "tiny", device="cpu")
    ee = offramp.EarlyExitModel(model, tokenizer, layers=LAYERS, head=exits.head_configs)
    ee.heads, ee.calibration = exits.heads, exits.calibration
    ee.save_pretrained(folder / "exits")
    return folder / "exits"


def asked(stored, output):
    """Arguments of the command for a small task, and where its result will be."""
    return [
        *("--model", "offramp", "--model_args", f"pretrained={stored},eps=0.5", "--limit", "3"),
        *("--tasks", "offramp_pronouns", "--output_path", str(output)),
    ]


def result_in(output):
    (stored,) = output.rglob("results*.json")
    return json.loads(stored.read_text())


@pytest.mark.usefixtures("own_tasks_only")
def test_the_harness_command_knows_the_model(stored, tmp_path):
    code, out, err = command(*asked(stored, tmp_path))
    assert code == 0, err
    assert "offramp_pronouns" in out
    found = result_in(tmp_path)
    assert 0 <= found["results"]["offramp_pronouns"]["acc,none"] <= 1
    assert np.isfinite(found["config"]["model_num_parameters"])
    assert sys.argv[0] != "lm_eval"


@pytest.mark.slow
def test_the_harness_own_command_knows_the_model_too(stored, tmp_path):
    tool = Path(sys.executable).with_name("lm_eval")
    arguments = [*asked(stored, tmp_path), "--include_path", str(LOCAL_TASKS)]
    done = subprocess.run([tool, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    ours = OfframpLM(stored, eps=0.5, device="cpu")
    expected = {
        metric: value for _, metric, value, _ in task_scores(ours, find_tasks(["offramp_pronouns"]), limit=3)
    }
    assert result_in(tmp_path)["results"]["offramp_pronouns"]["acc,none"] == expected["acc"]


def test_torch_is_imported_whatever_the_harness_looks_like(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.api.registry", types.ModuleType("lm_eval.api.registry"))
    offramp_lm_eval.announce()
    monkeypatch.delitem(sys.modules, "lm_eval")
    offramp_lm_eval.announce()
    assert "lm_eval" not in sys.modules
