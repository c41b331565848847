"""Files written whole or not at all, and folders used by one process at a time.  For `data`, `training`, `storage`."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from offramp.errors import StorageError


def write_json(path: Path, value: Any) -> None:
    """Write JSON to a file, whole or not at all."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write text to a file, whole or not at all."""
    with written_whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Give a file to write to beside ``path``; it takes that name at the end, or goes if the writing fails."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keep a folder to this process, until the end or its death.

    Raises
    ------
    StorageError
        If another process has it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / "in-use.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise StorageError(
            f"cache: another process is using {folder}; wait for it to end, or choose another folder"
        ) from error
    except (OSError, NotImplementedError) as error:
        # Which of them a disk without locks (some network disks) brings depends on the version of filelock.
        raise StorageError(
            f"cache: {folder} cannot be locked ({error}); choose a folder on another disk"
        ) from error
    try:
        yield
    finally:
        lock.release()


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file.

    Raises
    ------
    StorageError
        If it is not there or holds no JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise StorageError(f"{path} is missing") from error
    except (ValueError, OSError) as error:
        raise StorageError(f"{path} cannot be read as JSON: the folder is damaged") from error
    if not isinstance(value, dict):
        raise StorageError(f"{path} does not hold a JSON object: the folder is damaged")
    return value


def read_json_if_whole(path: Path) -> dict[str, Any] | None:
    """Read a JSON object from a file; ``None`` where there is no file, or a damaged one: for what can be made anew."""
    try:
        return read_json(path)
    except StorageError:
        return None


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
