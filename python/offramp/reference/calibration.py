"""Calibration by definition: try the candidate thresholds from the lowest up until one passes.

Scores are widened to float64, which is exact for every supported dtype.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, SupportsIndex

import numpy as np
from numpy.typing import NDArray

from offramp.arrays import (
    as_floats,
    as_labels,
    as_targets,
    as_thread_count,
    bfloat16_to_float32,
    not_a_label,
    position,
    require_same_shape,
    restore_floats,
)
from offramp.errors import InputError


def fast_calibrate(
    scores: Any,
    correct: Any,
    eps: Any,
    *,
    rule: Literal["set", "index"] = "set",
    threads: SupportsIndex | None = None,
) -> Any:
    """Find the lowest threshold that accepts an accurate enough set; see `offramp.fast_calibrate`."""
    if rule not in ("set", "index"):
        raise InputError(f"rule must be 'set' or 'index', but it is {rule!r}")
    values, labels = _samples(scores, correct)
    if values.ndim not in (1, 2):
        raise InputError(f"scores has shape {values.shape}: give (N,), or (K, N) for K heads")
    targets, single = as_targets(eps, "eps")
    as_thread_count(threads)
    _require_valid(values, labels)
    search = _by_set if rule == "set" else _by_index
    heads = zip(np.atleast_2d(values), np.atleast_2d(labels), strict=True)
    found = np.array([[search(row, flags, target) for target in targets] for row, flags in heads])
    if single:
        found = found[:, 0]
    if values.ndim == 1:
        found = found[0]
    return float(found) if found.ndim == 0 else found


def _by_set(scores: NDArray[np.float64], correct: NDArray[np.uint8], eps: float) -> float:
    """Return min { v : c(v) / n(v) >= eps } over the distinct scores v."""
    for threshold in np.unique(scores):
        accepted = scores >= threshold
        if np.count_nonzero(correct & accepted) / np.count_nonzero(accepted) >= eps:
            return float(threshold) + 0.0  # -0.0 becomes +0.0
    return float("inf")


def _by_index(scores: NDArray[np.float64], correct: NDArray[np.uint8], eps: float) -> float:
    """Return s_(j), j the first index in stable ascending order from which on mean(correct) >= eps."""
    order = np.argsort(scores, kind="stable")
    for j in range(len(order)):
        if np.count_nonzero(correct[order[j:]]) / (len(order) - j) >= eps:
            return float(scores[order[j]]) + 0.0
    return float("inf")


def sort_by_score(
    scores: Any, correct: Any, *, threads: SupportsIndex | None = None
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Sort samples by ascending score, equal ones in their given order; see `offramp.sort_by_score`."""
    values, labels = _samples(scores, correct)
    _require_one_row(values)
    as_thread_count(threads)
    _require_valid(values, labels)
    order = np.argsort(values, kind="stable")
    memory, dtype = as_floats(scores, "scores")
    return restore_floats(memory[order], dtype, scores), labels[order].astype(
        as_labels(correct, "correct").dtype
    )


def threshold_curve(scores: Any, correct: Any, *, threads: SupportsIndex | None = None) -> ThresholdCurve:
    """Count what every threshold accepts; see `offramp.threshold_curve`."""
    values, labels = _samples(scores, correct)
    _require_one_row(values)
    as_thread_count(threads)
    _require_valid(values, labels)
    thresholds = np.unique(values) + 0.0
    accepted = [np.count_nonzero(values >= threshold) for threshold in thresholds]
    right = [np.count_nonzero(labels[values >= threshold]) for threshold in thresholds]
    return ThresholdCurve(
        thresholds, np.array(accepted, dtype=np.int64), np.array(right, dtype=np.int64), len(values)
    )


@dataclass(frozen=True, eq=False)
class ThresholdCurve:
    """The risk-coverage curve; see `offramp.ThresholdCurve`."""

    thresholds: NDArray[np.float64]
    accepted: NDArray[np.int64]
    correct: NDArray[np.int64]
    n: int

    @property
    def coverage(self) -> NDArray[np.float64]:
        """Share of all samples accepted at each threshold."""
        return self.accepted / self.n

    @property
    def accuracy(self) -> NDArray[np.float64]:
        """Accuracy of the samples accepted at each threshold."""
        return self.correct / self.accepted

    def at(self, eps: Any) -> Any:
        """Look up the threshold for a target accuracy."""
        targets, single = as_targets(eps, "eps")
        found = np.array([self._first(target) for target in targets])
        return float(found[0]) if single else found

    def _first(self, eps: float) -> float:
        for threshold, accuracy in zip(self.thresholds, self.accuracy, strict=True):
            if accuracy >= eps:
                return float(threshold)
        return float("inf")

    def aurc(self) -> float:
        """Area under the risk-coverage curve: each sample counts the selective risk at its own score."""
        group = self.accepted - np.append(self.accepted[1:], 0)
        risk = (self.accepted - self.correct) / self.accepted
        return float(np.sum(group * risk) / self.n)


def _samples(scores: Any, correct: Any) -> tuple[NDArray[np.float64], NDArray[np.uint8]]:
    memory, dtype = as_floats(scores, "scores")
    labels = as_labels(correct, "correct").values
    require_same_shape("scores", memory.shape, "correct", labels.shape)
    if dtype == "float16":
        memory = memory.view(np.float16)
    elif dtype == "bfloat16":
        memory = bfloat16_to_float32(memory)
    return memory.astype(np.float64), labels


def _require_one_row(values: NDArray[np.float64]) -> None:
    if values.ndim != 1:
        raise InputError(f"scores has shape {values.shape}: give shape (N,)")


def _require_valid(values: NDArray[np.float64], labels: NDArray[np.uint8]) -> None:
    for index in np.argwhere(~np.isfinite(values))[:1]:
        value = values[tuple(index)]
        raise InputError(
            f"scores must be finite, but scores{position(index)} is {value}: repair or remove it"
        )
    for index in np.argwhere(labels > 1)[:1]:
        raise InputError(not_a_label("correct", position(index), labels[tuple(index)]))
