"""Other ways to the threshold for one row of scores: all exact, all mindful of ties.

Each takes ``(scores, correct, eps)`` as numpy arrays and a float and returns the lowest score whose accepted set
reaches eps, +inf if there is none.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Search: TypeAlias = Callable[[NDArray[Any], NDArray[np.bool_], float], float]

# scikit-learn takes minutes and tens of gigabytes beyond this many samples.
_SKLEARN_LIMIT = 10_000_000


def peers(scores: NDArray[Any]) -> dict[str, Search]:
    """Name the peers that are installed and can handle these scores."""
    found: dict[str, Search] = {"numpy argsort + cumsum": by_argsort}
    if scores.dtype == np.float32 and not np.signbit(scores).any():
        found["numpy sort of packed keys"] = by_packed_sort
    if scores.dtype.kind == "f" and find_spec("torch") is not None:
        found["torch.sort + cumsum"] = by_torch
    if scores.dtype in (np.float32, np.float64):
        if find_spec("polars") is not None:
            found["polars sort + cum_sum"] = by_polars
        if find_spec("sklearn") is not None and len(scores) <= _SKLEARN_LIMIT:
            found["sklearn precision_recall_curve"] = by_sklearn
    return found


def one_read(scores: NDArray[Any], correct: NDArray[np.bool_]) -> tuple[float, int]:
    """Read both inputs once, which is the floor of any search."""
    return float(scores.max()), int(np.count_nonzero(correct))


def by_argsort(scores: NDArray[Any], correct: NDArray[np.bool_], eps: float) -> float:
    """Sort indices and sum up: the usual code."""
    order = np.argsort(scores)
    ordered = scores[order]
    accuracy = np.cumsum(correct[order][::-1])[::-1] / np.arange(len(order), 0, -1)
    return _lowest(ordered, accuracy >= eps)


def by_packed_sort(scores: NDArray[Any], correct: NDArray[np.bool_], eps: float) -> float:
    """Sort bare integers, which numpy does with vector instructions: non-negative scores leave the sign bit free."""
    keys = scores.view(np.uint32) << np.uint32(1)
    keys |= correct
    keys.sort()
    right = np.cumsum((keys & np.uint32(1))[::-1], dtype=np.uint32)[::-1]
    accuracy = right / np.arange(len(keys), 0, -1, dtype=np.uint32)
    keys >>= np.uint32(1)
    return _lowest(keys.view(np.float32), accuracy >= eps)


def by_torch(scores: NDArray[Any], correct: NDArray[np.bool_], eps: float) -> float:
    """Sort and sum with torch, on all its threads."""
    import torch  # noqa: PLC0415 - an optional dependency

    ordered, order = torch.sort(torch.from_numpy(scores))
    right = torch.from_numpy(correct)[order].flip(0).cumsum(0).flip(0)
    accuracy = right.double() / torch.arange(len(order), 0, -1)
    return _lowest(ordered.numpy(), (accuracy >= eps).numpy())


def by_polars(scores: NDArray[Any], correct: NDArray[np.bool_], eps: float) -> float:
    """Sort and sum in a lazy polars query, on all its threads."""
    import polars as pl  # noqa: PLC0415 - an optional dependency

    score, right = pl.col("score"), pl.col("correct").cum_sum(reverse=True)
    accuracy = right.cast(pl.Float64) / pl.int_range(pl.len(), 0, -1)
    starts = (score != score.shift(1)).fill_null(True)
    query = pl.LazyFrame({"score": scores, "correct": correct}).sort("score")
    found = query.filter(starts & (accuracy >= eps)).select(score.min()).collect().item()
    return float("inf") if found is None else float(found)


def by_sklearn(scores: NDArray[Any], correct: NDArray[np.bool_], eps: float) -> float:
    """Read the threshold off scikit-learn's precision-recall curve."""
    from sklearn.metrics import precision_recall_curve  # noqa: PLC0415 - an optional dependency

    precision, _, thresholds = precision_recall_curve(correct, scores)
    # The last precision belongs to no threshold.
    good = np.flatnonzero(precision[:-1] >= eps)
    return float(thresholds[good[0]]) if len(good) else float("inf")


def _lowest(ordered: NDArray[Any], good: NDArray[np.bool_]) -> float:
    """Take the first good one of ascending scores that is no repetition of the score before it."""
    good[1:] &= ordered[1:] != ordered[:-1]
    first = int(good.argmax())
    return float(ordered[first]) if good[first] else float("inf")
