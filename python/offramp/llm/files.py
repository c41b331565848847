"""Files that are written whole or not at all.  For `data`, `training` and `storage`."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from offramp.errors import StorageError


def write_json(path: Path, value: Any) -> None:
    """Write JSON to a file, whole or not at all."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write text to a file, whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def read_json(path: Path) -> Any:
    """Read JSON from a file.

    Raises
    ------
    StorageError
        If it is not there or not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise StorageError(f"{path} is missing") from error
    except (ValueError, OSError) as error:
        raise StorageError(f"{path} cannot be read as JSON: the folder is damaged") from error


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
