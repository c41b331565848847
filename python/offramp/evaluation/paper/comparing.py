"""Tables of what was read: paired differences between confidences, and the two rules for ties."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offramp.calibration import fast_calibrate
from offramp.evaluation.evaluate import Rows
from offramp.evaluation.forced import Reading
from offramp.evaluation.metrics import areas, interval
from offramp.llm.calibrating import Measured

Side = tuple[str, str]
"""A head set and one of its confidences."""


def difference_rows(
    readings: Mapping[str, Reading], pairs: Iterable[tuple[Side, Side]], *, seed: int = 0
) -> Rows:
    """Differences in area, ``one`` minus ``other``, head by head: negative where ``one`` sorts better.

    Both sides are read on the same tokens and drawn with the same prompts, so what the prompts have in common cancels.
    The seed is that of the bootstrap.
    """
    return [row for one, other in pairs for row in _differences(readings, one, other, seed)]


def _differences(readings: Mapping[str, Reading], one: Side, other: Side, seed: int) -> Rows:
    sides = [(readings[name], confidence) for name, confidence in (one, other)]
    first = sides[0][0]

    def differences(picked: NDArray[np.int64] | slice) -> NDArray[np.float64]:
        found = []
        for index in range(len(first.layers)):
            left, right = (
                areas(reading.confidence[confidence][index, picked], reading.correct[index, picked])
                for reading, confidence in sides
            )
            found.append([left.aurc - right.aurc, left.e_aurc - right.e_aurc])
        return np.array(found)

    values = differences(slice(None))
    bounds = interval(first.groups, differences, resamples=200, seed=seed)
    rows: Rows = []
    for index, layer in enumerate(first.layers):
        row: dict[str, Any] = {"one": " ".join(one), "other": " ".join(other), "layer": layer}
        for column, name in enumerate(("aurc", "e_aurc")):
            row[name] = float(values[index, column])
            row[f"{name}_low"], row[f"{name}_high"] = bounds[index, column].tolist()
        rows.append(row)
    return rows


def tie_rows(name: str, layers: Sequence[int], measured: Measured, grid: Sequence[float]) -> Rows:
    """Put the paper's formula to the letter (``rule="index"``) beside the rule that minds ties (``rule="set"``)."""
    rows: Rows = []
    for layer, margins, correct in zip(layers, measured.scores, measured.correct, strict=True):
        for eps in grid:
            row: dict[str, Any] = {
                "heads": name,
                "layer": layer,
                "eps": eps,
                "tokens": len(margins),
                "tied": len(margins) - len(np.unique(margins)),
            }
            for rule in ("set", "index"):
                tau = fast_calibrate(margins, correct, eps, rule=rule)
                taken = margins.astype(np.float64) >= tau
                row[f"{rule}_threshold"] = tau
                row[f"{rule}_accuracy"] = float(correct[taken].mean()) if taken.any() else math.nan
            rows.append(row)
    return rows
