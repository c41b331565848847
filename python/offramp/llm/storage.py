"""Heads and thresholds on disk: ``heads.safetensors``, ``config.json``, ``calibration.json`` and a model card.

What the heads said on the calibration tokens, from which any ε is answered, is in ``calibration.safetensors``.

For `model`; nothing else knows the layout of the folder.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file as load_arrays
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import load_file, save_file

from offramp import __version__
from offramp.errors import InputError, ModelError, StorageError
from offramp.llm.calibrating import Calibration, Measured
from offramp.llm.files import read_json, sha256_of, write_json, write_text
from offramp.llm.fingerprint import Fingerprint, fingerprint
from offramp.llm.heads import ExitHeads, HeadConfig, make_heads
from offramp.llm.trunk import Trunk

HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only")
"""How the Hub is asked for heads as well as for their base model."""

_FORMAT = 2
_HEADS = "heads.safetensors"
_CONFIG = "config.json"
_CALIBRATION = "calibration.json"
_MEASURED = "calibration.safetensors"
_CARD = "README.md"
_FILES = (_HEADS, _CONFIG, _CALIBRATION, _MEASURED, _CARD)
_FINGERPRINT = "base_model.fingerprint"
_SHORTLIST = "shortlist"
_OTHER_HEADS = f"{_HEADS} does not hold the heads {_CONFIG} describes: the folder is damaged"
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


@dataclass(frozen=True, eq=False)
class SavedExits:
    """What a folder holds, not yet tied to a model.

    Attributes
    ----------
    config : dict
        The contents of ``config.json``.
    tensors : dict of torch.Tensor
        Head parameters and shortlists, named ``<layer>.<parameter>``.
    base : Fingerprint
        Of the model the heads were trained on.
    calibration : Calibration or None
        Thresholds, if they were calibrated.
    """

    config: dict[str, Any]
    tensors: dict[str, torch.Tensor]
    base: Fingerprint
    calibration: Calibration | None

    @property
    def layers(self) -> tuple[int, ...]:
        """The exits."""
        return tuple(self.config["layers"])

    @property
    def head_configs(self) -> dict[int, HeadConfig]:
        """The kind of head after each layer."""
        heads = self.config["heads"]
        # Heads that were written before there was a choice were calibrated as they were trained.
        return {layer: HeadConfig(**{"bits": None, **heads[str(layer)]}) for layer in self.layers}

    @property
    def unregistered(self) -> str | None:
        """A kind of head that this process does not know, if there is one."""
        for layer in self.layers:
            kind: str = self.config["heads"][str(layer)]["kind"]
            try:
                HeadConfig(kind)
            except InputError:
                return kind
        return None

    @property
    def base_model(self) -> str | None:
        """Name the base model was loaded by, where it is known."""
        name: str | None = self.config["base_model"]
        return name

    def heads_for(self, trunk: Trunk) -> ExitHeads:
        """Build the heads on a model.

        Raises
        ------
        ModelError
            If the model's weights are not those the heads were trained on.
        StorageError
            If the tensors do not fit.
        """
        if self.config["vocab_size"] != trunk.vocab_size:
            raise ModelError(
                f"model: the heads are for a vocabulary of {self.config['vocab_size']} tokens, and this model's has "
                f"{trunk.vocab_size}; load {self.base_model or 'the model they were trained on'}"
            )
        if not self.base.matches(fingerprint(trunk.model)):
            raise ModelError(
                f"model: these heads were trained on {self.base_model or 'another model'}, and the weights of the "
                "model given differ; load that model, or train heads for this one"
            )
        state = {name: tensor for name, tensor in self.tensors.items() if name != _FINGERPRINT}
        shortlists: dict[int, torch.Tensor | None] = {}
        shared: dict[bytes, torch.Tensor] = {}
        for layer in self.layers:
            tokens = state.pop(f"{layer}.{_SHORTLIST}", None)
            # Heads of one list share it, and with it its output rows.
            shortlists[layer] = (
                None if tokens is None else shared.setdefault(tokens.numpy().tobytes(), tokens.long())
            )
        heads = make_heads(trunk, self.head_configs, shortlists)
        try:
            # What is missing is the model's own, and there already.
            found = heads.load_state_dict(state, strict=False)
        except RuntimeError as error:
            raise StorageError(_OTHER_HEADS) from error
        if found.unexpected_keys or not heads.own_state().keys() <= state.keys():
            raise StorageError(_OTHER_HEADS)
        return heads


def save_exits(
    folder: str | os.PathLike[str],
    trunk: Trunk,
    heads: ExitHeads,
    calibration: Calibration | None,
    trained: dict[str, Any],
) -> None:
    """Write a folder of heads; the old contents are replaced only when the new ones are complete.

    Parameters
    ----------
    trained
        How the heads were trained, for ``config.json`` and the card: plain values.

    Raises
    ------
    StorageError
        If the folder exists and holds anything else.
    """
    target = Path(folder)
    require_free(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        temporary.chmod(0o755)
        _write(temporary, trunk, heads, calibration, trained)
        _replace(target, temporary)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def require_free(folder: Path) -> None:
    """Refuse a folder that heads cannot be written to, because something other than heads is in it.

    Raises
    ------
    StorageError
        If the folder exists and holds anything else.
    """
    if not folder.exists():
        return
    if not folder.is_dir() or (any(folder.iterdir()) and not _is_ours(folder)):
        raise StorageError(f"folder {folder} holds other files: choose an empty or a new folder")
    # The folder is replaced whole, and they would go with it.
    others = sorted(path.name for path in folder.iterdir() if path.name not in _FILES)
    if others:
        raise StorageError(
            f"folder {folder} holds other files beside the heads, such as {others[0]}: move them away, or choose an "
            "empty or a new folder"
        )


def push_exits(folder: Path, repo_id: str, **kwargs: Any) -> str:
    """Upload a folder of heads to the Hub, making repository and branch where there are none.

    What earlier heads had and these have not, a calibration, is deleted there; files of others stay.

    Parameters
    ----------
    kwargs
        ``private``, ``token``, ``revision``, ``commit_message`` and ``create_pr``, as `huggingface_hub` takes them.

    Returns
    -------
    str
        Address of the commit.

    Raises
    ------
    StorageError
        If the Hub refuses or cannot be reached.
    """
    private, token = kwargs.pop("private", None), kwargs.pop("token", None)
    api = HfApi(token=token)
    try:
        repo = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        branch = kwargs.get("revision")
        # A pull request goes to a branch that is there, often one of a repository of somebody else.
        if branch is not None and not branch.startswith("refs/pr") and not kwargs.get("create_pr"):
            api.create_branch(repo, branch=branch, exist_ok=True)
        kwargs.setdefault("commit_message", "Exit heads and thresholds")
        commit = api.upload_folder(repo_id=repo, folder_path=folder, delete_patterns=list(_FILES), **kwargs)
        return str(commit.commit_url)
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise StorageError(f"repo_id is {repo_id}: the Hub did not take it ({_reason(error)})") from error


def fetch_exits(name: str | os.PathLike[str], **where: Any) -> Path:
    """Find a folder of heads: a local one, or the copy of a Hub repository of the form ``owner/name``.

    Parameters
    ----------
    where
        ``revision``, ``token`` and `HUB_OPTIONS`, as `huggingface_hub` takes them.

    Raises
    ------
    StorageError
        If there is neither.
    """
    if Path(name).is_dir() or not _REPOSITORY.fullmatch(str(name)):
        return Path(name)
    try:
        return Path(snapshot_download(str(name), allow_patterns=list(_FILES), **where))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise StorageError(
            f"folder {name} does not exist, and the Hub did not give it ({_reason(error)})"
        ) from error


def load_exits(folder: str | os.PathLike[str]) -> SavedExits:
    """Read a folder of heads.

    Raises
    ------
    StorageError
        If it is missing, damaged, or of a newer version; the sentence names the file.
    InputError
        If the heads are of a kind that is not registered.
    """
    source = Path(folder)
    if not source.is_dir():
        raise StorageError(f"folder {source} does not exist: give a folder written by save_pretrained")
    config = read_json(source / _CONFIG)
    if config.get("library_name") != "offramp":
        raise StorageError(
            f"{source / _CONFIG} was not written by offramp: give a folder written by save_pretrained"
        )
    if config.get("format") in range(1, _FORMAT):
        raise StorageError(
            f"folder {source} was written by an older offramp ({config.get('version')}), with one kind of head for all "
            "exits: train and save the heads again"
        )
    if config.get("format") != _FORMAT:
        raise StorageError(
            f"folder {source} was written by a newer offramp ({config.get('version')}): update offramp"
        )
    heads = source / _HEADS
    if not heads.exists():
        raise StorageError(f"{heads} is missing: the folder is damaged")
    try:
        with safe_open(heads, framework="pt"):
            pass
    except SafetensorError as error:
        raise StorageError(f"{heads} is truncated or damaged: save the heads again") from error
    digest = sha256_of(heads)
    if digest != config.get("sha256"):
        raise StorageError(
            f"{heads} is not the file {_CONFIG} describes: the folder is damaged; save the heads again"
        )
    tensors = load_file(heads)
    stored = source / _CALIBRATION
    calibration = _calibration(source, digest) if stored.exists() else None
    try:
        base = Fingerprint(tensors[_FINGERPRINT], config["base_model_shapes"])
        saved = SavedExits(config, tensors, base, calibration)
        layers, unknown = saved.layers, saved.unregistered
        _ = unknown or saved.head_configs, saved.base_model
    except (KeyError, TypeError, InputError) as error:
        raise StorageError(f"{source / _CONFIG} is damaged ({error}): save the heads again") from error
    if unknown is not None:
        raise InputError(
            f"folder {source}: these heads are of kind {unknown!r}, which is not registered here: import the module "
            "that registers it"
        )
    if calibration is not None and calibration.layers != layers:
        raise StorageError(f"{stored} belongs to heads after other layers: calibrate again")
    return saved


def _calibration(folder: Path, heads: str) -> Calibration:
    """Read the calibration of the heads with this SHA-256."""
    values, arrays = read_json(folder / _CALIBRATION), folder / _MEASURED
    measured = values.get("measured")
    if not arrays.exists() or not isinstance(measured, dict) or sha256_of(arrays) != measured.get("sha256"):
        raise StorageError(
            f"{arrays} is missing or is not the file {_CALIBRATION} describes: calibrate again"
        )
    # Earlier versions did not write whose it is.
    if values.get("heads_sha256", heads) != heads:
        raise StorageError(
            f"{folder / _CALIBRATION} belongs to other heads than {_HEADS}: delete it, and calibrate again"
        )
    return Calibration.from_dict(values, Measured.from_arrays(load_arrays(arrays)))


def _write(
    folder: Path,
    trunk: Trunk,
    heads: ExitHeads,
    calibration: Calibration | None,
    trained: dict[str, Any],
) -> None:
    base = fingerprint(trunk.model)
    tensors = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in heads.own_state().items()}
    for layer in heads.layers:
        shortlist = heads.after(layer).shortlist
        if shortlist is not None:
            tensors[f"{layer}.{_SHORTLIST}"] = shortlist.to("cpu", torch.int32)
    tensors[_FINGERPRINT] = base.samples
    save_file(tensors, folder / _HEADS, metadata={"format": "pt"})
    config = {
        "library_name": "offramp",
        "format": _FORMAT,
        "version": __version__,
        "base_model": getattr(trunk.model.config, "_name_or_path", None) or None,
        "base_model_type": trunk.config.model_type,
        "base_model_shapes": base.shapes,
        "base_model_fingerprint": base.digest,
        "num_layers": trunk.num_layers,
        "hidden_size": trunk.hidden_size,
        "vocab_size": trunk.vocab_size,
        "layers": list(heads.layers),
        "heads": {str(layer): heads.after(layer).config.to_dict() for layer in heads.layers},
        "training": trained,
        "sha256": sha256_of(folder / _HEADS),
    }
    if calibration is not None:
        save_arrays(calibration.measured.to_arrays(), folder / _MEASURED)
        digests = {"heads_sha256": config["sha256"], "measured": {"sha256": sha256_of(folder / _MEASURED)}}
        write_json(folder / _CALIBRATION, calibration.to_dict() | digests)
    write_text(folder / _CARD, _card(config, calibration))
    write_json(folder / _CONFIG, config)


def _replace(target: Path, new: Path) -> None:
    """Put the folder ``new`` where ``target`` is; at no moment is there half a folder."""
    if not target.exists():
        os.replace(new, target)
        return
    retired = Path(tempfile.mkdtemp(prefix=f".{target.name}-old-", dir=target.parent))
    try:
        os.replace(target, retired)
        os.replace(new, target)
    except BaseException:  # Ctrl-C between the two included
        if not target.exists():
            os.replace(retired, target)
        shutil.rmtree(retired, ignore_errors=True)
        raise
    shutil.rmtree(retired, ignore_errors=True)


def _is_ours(folder: Path) -> bool:
    try:
        config = read_json(folder / _CONFIG)
    except StorageError:
        return False
    return config.get("library_name") == "offramp"


def _reason(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _card(config: dict[str, Any], calibration: Calibration | None) -> str:
    base = config["base_model"] or "a local model"
    # The Hub links a card to its base model by name; a path of somebody's disk is no name.
    named = _REPOSITORY.fullmatch(base) and not Path(base).exists()
    table = f"```\n{calibration}\n```" if calibration is not None else "Not calibrated yet."
    exits = ", ".join(f"{layer} (`{config['heads'][str(layer)]['kind']}`)" for layer in config["layers"])
    return f"""---
library_name: offramp
pipeline_tag: text-generation
{f"base_model: {base}" if named else "# base_model: its name on the Hub"}
tags:
- early-exit
---

# Early exits for {base}

Heads after layers {exits} of {config["num_layers"]}, trained on the model's own predictions. \
The base model is not in here and is not changed.

```python
import offramp

ee = offramp.EarlyExitModel.from_pretrained("this folder or repository")
out = ee.generate(**inputs, max_new_tokens=64)
```

## Calibration

{table}

The thresholds speak of text like the calibration text; they promise nothing about other text.
"""
