"""Rows of numbers as CSV files, whole or not at all.  For `evaluate` and `paper`."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from offramp.llm.files import write_text


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows under a header; what a row lacks, and what is NaN, stays empty, and infinity is ``inf``."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: _cell(value) for name, value in row.items()} for row in rows)
    write_text(path, text.getvalue())


def read_csv(path: Path) -> list[dict[str, Any]]:
    """Read rows that `write_csv` wrote: numbers as numbers, an empty cell as NaN."""
    with path.open(newline="", encoding="utf-8") as file:
        return [{name: _value(cell) for name, cell in row.items()} for row in csv.DictReader(file)]


def _cell(value: Any) -> Any:
    return "" if isinstance(value, float) and math.isnan(value) else value


def _value(cell: str) -> Any:
    if not cell:
        return math.nan
    for kind in (int, float):
        try:
            return kind(cell)
        except ValueError:
            continue
    return {"True": True, "False": False}.get(cell, cell)
