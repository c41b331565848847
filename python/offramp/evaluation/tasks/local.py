"""The documents of the local tasks; lm-evaluation-harness loads this file by its place beside them."""

import json
from pathlib import Path
from typing import Any

import datasets

_FOLDER = Path(__file__).parent


def facts(**_: Any) -> dict[str, Any]:
    """Questions with four choices."""
    return _load("facts")


def endings(**_: Any) -> dict[str, Any]:
    """Scenes with four endings."""
    return _load("endings")


def pronouns(**_: Any) -> dict[str, Any]:
    """Sentences with a gap and two names."""
    return _load("pronouns")


def answer_place(doc: dict[str, str]) -> int:
    """Index of the name that fills the gap."""
    return int(doc["answer"]) - 1


def after_the_gap(doc: dict[str, str]) -> str:
    """Give the rest of the sentence, which is scored."""
    return doc["sentence"].partition("_")[2].strip()


def up_to_the_gap(doc: dict[str, str]) -> list[str]:
    """Give the sentence up to its gap, filled with each of the names."""
    start = doc["sentence"].partition("_")[0]
    return [start + doc["option1"], start + doc["option2"]]


def _load(name: str) -> dict[str, Any]:
    lines = (_FOLDER / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return {"test": datasets.Dataset.from_list([json.loads(line) for line in lines])}
