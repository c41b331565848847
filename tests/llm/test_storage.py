"""What is saved comes back; what is damaged, missing or another model's is refused with a sentence."""

from __future__ import annotations

import json
import os
import shutil
from fnmatch import fnmatch
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard, RepoUrl
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from offramp import EarlyExitModel, HeadConfig, InputError, ModelError, StorageError
from offramp.llm import storage
from offramp.llm.fingerprint import fingerprint
from tiny import make_model


@pytest.fixture
def folder(trained, tmp_path):
    path = tmp_path / "exits"
    trained.save_pretrained(path)
    return path


@pytest.fixture
def retrained(trained, model, texts):
    """Heads after the same layers as `trained`, of another training, not calibrated."""
    ee = EarlyExitModel(model, None, layers=trained.layers, head=HeadConfig("mlp", shortlist=60))
    ee.train_heads(sequences=texts[:10], epochs=1)
    return ee


def test_heads_and_thresholds_come_back(trained, model, folder, thresholds, prompts):
    loaded = EarlyExitModel.from_pretrained(folder, model=model)
    assert loaded.layers == trained.layers
    assert loaded.head_configs == trained.head_configs
    for mine, theirs in zip(loaded.heads.parameters(), trained.heads.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert torch.equal(loaded.heads.after(1).shortlist, trained.heads.after(1).shortlist)
    assert loaded.calibration.to_dict() == trained.calibration.to_dict()
    ids, mask = prompts
    settings = {"attention_mask": mask, "max_new_tokens": 15, "thresholds": thresholds}
    assert torch.equal(loaded.generate(ids, **settings), trained.generate(ids, **settings))
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md",
        "calibration.json",
        "calibration.safetensors",
        "config.json",
        "heads.safetensors",
    ]


@pytest.mark.parametrize(
    "head", [HeadConfig("linear", shortlist=None), HeadConfig("mlp", shortlist=None, width=5)], ids=str
)
def test_every_kind_of_head_comes_back(model, texts, tmp_path, head):
    ee = EarlyExitModel(model, layers=(2, 4), head=head)
    ee.train_heads(sequences=texts[:10], epochs=1)
    ee.save_pretrained(tmp_path / "x")
    loaded = EarlyExitModel.from_pretrained(tmp_path / "x", model=model)
    assert loaded.calibration is None
    hidden = torch.randn(3, 32)
    assert torch.equal(loaded.heads.after(4)(hidden), ee.heads.after(4)(hidden))


def test_heads_of_several_kinds_come_back(model, texts, tmp_path):
    """Those of one shortlist share its output rows."""
    small, large = HeadConfig("mlp", shortlist=20), HeadConfig("adapter", shortlist=60, depth=2)
    configs = {1: small, 2: small, 3: large, 4: HeadConfig("linear", shortlist=None)}
    ee = EarlyExitModel(model, layers=(1, 2, 3, 4), head=configs)
    ee.train_heads(sequences=texts[:10], epochs=1)
    ee.calibrate(0.5, sequences=texts)
    ee.save_pretrained(tmp_path / "x")
    loaded = EarlyExitModel.from_pretrained(tmp_path / "x", model=model)
    assert loaded.head_configs == configs
    for made in (ee, loaded):
        heads = [made.heads.after(layer) for layer in made.layers]
        assert [None if head.shortlist is None else len(head.shortlist) for head in heads] == [
            20,
            20,
            60,
            None,
        ]
        assert heads[0].weight.data_ptr() == heads[1].weight.data_ptr()
        assert set(heads[0].shortlist.tolist()) < set(heads[2].shortlist.tolist())
    mine, theirs = (made.score(texts[:8]) for made in (ee, loaded))
    assert (mine.scores == theirs.scores).all()
    assert (mine.correct == theirs.correct).all()
    thresholds = [float(np.quantile(scores, 0.6)) for scores in mine.scores]
    for mode in ("exit", "verify"):
        said, layers = [], set()
        for made in (ee, loaded):
            output = made.generate(
                torch.stack(texts[:4])[:, :6],
                thresholds=thresholds,
                max_new_tokens=25,
                mode=mode,
                return_dict_in_generate=True,
            )
            said.append(output.sequences)
            layers |= set(output.exit_layers.flatten().tolist())
        assert torch.equal(*said)
        assert len(layers & {1, 2, 3, 4}) >= 2, layers


def test_the_models_own_rows_are_not_saved(folder, model):
    from safetensors import safe_open

    with safe_open(folder / "heads.safetensors", framework="pt") as file:
        names = set(file.keys())
    assert not any(name.endswith((".weight", ".bias")) and name.count(".") == 1 for name in names)


def test_the_config_says_what_was_done(folder):
    config = json.loads((folder / "config.json").read_text())
    assert config["library_name"] == "offramp"
    assert config["layers"] == [1, 3, 5]
    assert config["training"]["tokens"] == 1740
    assert {item["layer"] for item in config["training"]["metrics"]} == {1, 3, 5}
    card = (folder / "README.md").read_text()
    assert "ε = 0.5" in card
    assert "library_name: offramp" in card


def test_saving_again_replaces_and_leaves_nothing_beside(retrained, folder):
    retrained.save_pretrained(folder)
    assert {path.name for path in folder.iterdir()} == {"README.md", "config.json", "heads.safetensors"}
    assert [path.name for path in folder.parent.iterdir()] == ["exits"]


def test_what_others_put_beside_the_heads_is_left_alone(retrained, folder):
    (folder / "cache").mkdir()
    (folder / "cache" / "corpus.json").write_text("{}")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(StorageError, match="holds other files beside the heads, such as cache"):
        retrained.save_pretrained(folder)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert [path.name for path in folder.parent.iterdir()] == ["exits"]


def test_a_folder_of_something_else_is_left_alone(trained, tmp_path):
    target = tmp_path / "thesis"
    target.mkdir()
    (target / "chapter1.txt").write_text("words")
    with pytest.raises(StorageError, match="holds other files"):
        trained.save_pretrained(target)
    assert [path.name for path in target.iterdir()] == ["chapter1.txt"]


def test_an_interrupted_save_leaves_the_old_heads(trained, folder, model, monkeypatch):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def interrupt(*_args, **_kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("offramp.llm.storage.write_text", interrupt)
    with pytest.raises(KeyboardInterrupt):
        trained.save_pretrained(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in folder.parent.iterdir()] == ["exits"]


def test_an_interrupted_replacement_leaves_the_old_heads(trained, folder, monkeypatch):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    replace, calls = os.replace, []

    def interrupt(source, target):
        calls.append(target)
        # The writes of three files, the old folder aside, and then the new one in its place.
        if target == folder and len(calls) == 5:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr("offramp.llm.storage.os.replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        trained.save_pretrained(folder)
    assert len(calls) == 6
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in folder.parent.iterdir()] == ["exits"]


def cut(path):
    path.write_bytes(path.read_bytes()[:-40])


def cut_header(path):
    path.write_bytes(path.read_bytes()[:20])


def flip(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


def change(**values):
    def apply(path):
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return apply


@pytest.mark.parametrize(
    ("name", "damage", "words"),
    [
        ("heads.safetensors", cut, "truncated or damaged"),
        ("heads.safetensors", cut_header, "truncated or damaged"),
        ("heads.safetensors", flip, "not the file config.json describes"),
        ("heads.safetensors", lambda path: path.unlink(), "heads.safetensors is missing"),
        ("config.json", cut, "cannot be read as JSON"),
        ("config.json", lambda path: path.unlink(), "config.json is missing"),
        ("config.json", change(library_name="peft"), "not written by offramp"),
        ("config.json", change(format=99), "newer offramp"),
        ("config.json", change(format=1), "older offramp .*train and save the heads again"),
        ("config.json", change(format="x"), "newer offramp"),
        ("config.json", lambda path: path.write_text("[]"), "does not hold a JSON object"),
        ("calibration.json", lambda path: path.write_text("3"), "does not hold a JSON object"),
        ("calibration.json", change(layers=[1, 3, 4]), "other layers"),
        ("calibration.json", change(layers=[1, 3]), "calibration is damaged"),
        ("calibration.json", change(eps=2), "calibration is damaged"),
        ("calibration.json", change(n=7), "calibration is damaged"),
        ("config.json", change(heads={layer: {"kind": "mlp", "depth": 0} for layer in "135"}), "is damaged"),
        ("config.json", change(heads={layer: {"depth": 1} for layer in "135"}), "config.json is damaged"),
        (
            "config.json",
            change(heads={layer: {"kind": "mlp", "shortlist": 60, "width": 3} for layer in "135"}),
            "does not hold the heads",
        ),
        ("calibration.json", cut, "cannot be read as JSON"),
        ("calibration.json", change(mode="best"), "calibration is damaged"),
        ("calibration.json", change(delta=3), "calibration is damaged"),
        ("calibration.json", change(measured=None), "not the file calibration.json describes"),
        ("calibration.safetensors", flip, "not the file calibration.json describes"),
        ("calibration.safetensors", lambda path: path.unlink(), "calibration.safetensors is missing"),
    ],
)
def test_a_damaged_folder_is_refused(folder, model, name, damage, words):
    damage(folder / name)
    with pytest.raises(StorageError, match=words):
        EarlyExitModel.from_pretrained(folder, model=model)


def test_heads_of_a_kind_nobody_registered_are_whole(folder, model):
    change(heads={layer: {"kind": "scaled", "options": {}} for layer in "135"})(folder / "config.json")
    words = "exits: these heads are of kind 'scaled', which is not registered here: import the module"
    with pytest.raises(InputError, match=words):
        EarlyExitModel.from_pretrained(folder, model=model)


def test_a_calibration_of_other_heads_is_refused(folder, retrained, model, tmp_path):
    retrained.save_pretrained(tmp_path / "anew")
    for name in ("heads.safetensors", "config.json"):
        shutil.copy(tmp_path / "anew" / name, folder)
    with pytest.raises(StorageError, match=r"belongs to other heads than heads\.safetensors: delete it"):
        EarlyExitModel.from_pretrained(folder, model=model)


def test_a_calibration_that_does_not_say_whose_it_is_is_taken(trained, folder, model):
    path = folder / "calibration.json"
    values = json.loads(path.read_text())
    del values["heads_sha256"]
    path.write_text(json.dumps(values))
    loaded = EarlyExitModel.from_pretrained(folder, model=model)
    assert loaded.calibration.to_dict() == trained.calibration.to_dict()


class Hub:
    """One repository, with a folder for each branch; what else is asked for is not there."""

    def __init__(self, folder):
        self.folder, self.asked = folder, {}

    def __call__(self, token=None):
        self.asked["token"] = token
        return self

    def create_repo(self, repo_id, *, private, exist_ok):
        assert exist_ok
        self.asked |= {"repo_id": repo_id, "private": private}
        (self.folder / "main").mkdir(parents=True, exist_ok=True)
        return RepoUrl(f"https://hub.test/{repo_id}", endpoint="https://hub.test")

    def create_branch(self, repo_id, *, branch, exist_ok):
        assert exist_ok
        assert repo_id == self.asked["repo_id"]
        if not (self.folder / branch).exists():
            shutil.copytree(self.folder / "main", self.folder / branch)

    def upload_folder(self, *, repo_id, folder_path, delete_patterns=(), revision=None, **kwargs):
        self.asked |= kwargs
        branch = self.folder / (revision or "main")
        # Files that are deleted and uploaded again are not deleted; the others stay unless they are named.
        for path in list(branch.iterdir()):
            if any(fnmatch(path.name, pattern) for pattern in delete_patterns):
                path.unlink()
        for path in folder_path.iterdir():
            shutil.copy(path, branch)
        return SimpleNamespace(commit_url=f"https://hub.test/{repo_id}/commit/1")

    def download(self, repo_id, *, allow_patterns, **where):
        self.where = where
        branch = self.folder / (where["revision"] or "main")
        if repo_id != self.asked.get("repo_id") or not branch.exists():
            raise LocalEntryNotFoundError("no such repository or branch")
        snapshot = self.folder.with_name("snapshot")
        shutil.rmtree(snapshot, ignore_errors=True)
        snapshot.mkdir()
        for path in branch.iterdir():
            if any(fnmatch(path.name, pattern) for pattern in allow_patterns):
                shutil.copy(path, snapshot)
        return str(snapshot)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    found = Hub(tmp_path / "hub")
    monkeypatch.setattr(storage, "HfApi", found)
    monkeypatch.setattr(storage, "snapshot_download", found.download)
    return found


def test_heads_go_to_the_hub_and_come_back(trained, model, hub):
    address = trained.push_to_hub(
        "someone/exits", private=True, token="secret", commit_message="Better heads"
    )
    assert address == "https://hub.test/someone/exits/commit/1"
    assert hub.asked == {
        "repo_id": "someone/exits",
        "private": True,
        "token": "secret",
        "commit_message": "Better heads",
    }
    loaded = EarlyExitModel.from_pretrained("someone/exits", model=model)
    assert loaded.calibration.to_dict() == trained.calibration.to_dict()
    with pytest.raises(
        StorageError, match="folder someone/others does not exist, and the Hub did not give it"
    ):
        EarlyExitModel.from_pretrained("someone/others", model=model)


def test_heads_trained_anew_leave_no_earlier_calibration_on_the_hub(trained, retrained, model, hub):
    trained.push_to_hub("someone/exits")
    (hub.folder / "main" / "picture.png").write_bytes(b"somebody's")
    retrained.push_to_hub("someone/exits")
    left = {path.name for path in (hub.folder / "main").iterdir()}
    assert left == {"README.md", "config.json", "heads.safetensors", "picture.png"}
    assert EarlyExitModel.from_pretrained("someone/exits", model=model).calibration is None


def test_heads_go_to_a_branch_which_is_made_where_there_is_none(trained, retrained, model, hub):
    trained.push_to_hub("someone/exits")
    for _ in range(2):
        retrained.push_to_hub("someone/exits", revision="v2")
    assert EarlyExitModel.from_pretrained("someone/exits", model=model).calibration is not None
    assert EarlyExitModel.from_pretrained("someone/exits", model=model, revision="v2").calibration is None


@pytest.mark.parametrize(
    "where", [{"revision": "refs/pr/1"}, {"revision": "main", "create_pr": True}], ids=str
)
def test_a_pull_request_makes_no_branch(trained, hub, monkeypatch, where):
    """Those who may open one may often make no branch."""
    (hub.folder / "refs" / "pr" / "1").mkdir(parents=True)
    monkeypatch.setattr(hub, "create_branch", None)
    trained.push_to_hub("someone/exits", **where)
    assert (hub.folder / where["revision"] / "heads.safetensors").exists()


def test_heads_and_their_base_model_are_read_with_the_same_rights_from_the_same_place(
    trained, model, hub, monkeypatch, tmp_path
):
    asked = []
    monkeypatch.setattr(model.config, "_name_or_path", "someone/model")
    monkeypatch.setattr(
        "offramp.llm.model.load_model", lambda name, **where: asked.append((name, where)) or (model, "tokens")
    )
    trained.push_to_hub("someone/exits", revision="v2")
    places = {"cache_dir": tmp_path, "local_files_only": True}
    loaded = EarlyExitModel.from_pretrained(
        "someone/exits", revision="v2", token="secret", dtype="float32", **places
    )
    assert loaded.tokenizer == "tokens"
    # The revision is of the heads' repository; the base model's has others.
    assert hub.where == {"revision": "v2", "token": "secret", **places}
    assert asked == [("someone/model", {"token": "secret", "dtype": "float32", **places})]


def test_a_hub_that_refuses_gets_a_sentence(trained, hub, monkeypatch):
    def refuse(*_, **__):
        raise HFValidationError("Repo id must be of the form 'owner/name'")

    monkeypatch.setattr(hub, "create_repo", refuse)
    with pytest.raises(StorageError, match=r"^repo_id is a/b/c: the Hub did not take it \(Repo id"):
        trained.push_to_hub("a/b/c")


def test_the_card_is_one_the_hub_reads_and_holds_the_calibration(trained, folder, monkeypatch, tmp_path):
    card = ModelCard.load(folder / "README.md")
    assert card.data.library_name == "offramp"
    assert card.data.pipeline_tag == "text-generation"
    assert card.data.base_model is None
    assert str(trained.calibration) in card.text
    monkeypatch.setattr(trained.model.config, "_name_or_path", "someone/model")
    trained.save_pretrained(tmp_path / "named")
    assert ModelCard.load(tmp_path / "named" / "README.md").data.base_model == "someone/model"


def test_a_missing_folder_is_refused(model, tmp_path):
    with pytest.raises(StorageError, match="does not exist"):
        EarlyExitModel.from_pretrained(tmp_path / "nowhere", model=model)


def test_heads_are_refused_on_other_weights(folder):
    with pytest.raises(ModelError, match="weights of the model given differ"):
        EarlyExitModel.from_pretrained(folder, model=make_model(seed=1))
    wider = make_model(hidden_size=64)
    with pytest.raises(ModelError, match="weights of the model given differ"):
        EarlyExitModel.from_pretrained(folder, model=wider)


def test_the_fingerprint_survives_a_cast_and_nothing_else():
    model = make_model()
    own = fingerprint(model)
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        cast = fingerprint(make_model().to(dtype))
        assert own.matches(cast)
        assert cast.matches(own)
    assert fingerprint(make_model().double()).digest == own.digest
    assert fingerprint(make_model().bfloat16()).digest != own.digest
    tuned = make_model()
    tuned.model.layers[3].mlp.down_proj.weight.mul_(1.02)
    assert not own.matches(fingerprint(tuned))
    assert not own.matches(fingerprint(make_model(num_hidden_layers=5)))
    assert fingerprint(make_model().bfloat16()).matches(fingerprint(make_model().half()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_short_fine_tuning_is_another_model(dtype):
    """Weights that moved by less than bfloat16 rounds are still other weights."""
    tuned = make_model()
    generator = torch.Generator().manual_seed(0)
    for parameter in tuned.parameters():
        parameter.mul_(1 + 0.002 * torch.randn(parameter.shape, generator=generator))
    assert not fingerprint(make_model()).matches(fingerprint(tuned.to(dtype)))
    assert not fingerprint(tuned).matches(fingerprint(make_model()))
