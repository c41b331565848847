"""How well a confidence sorts right from wrong, and how sure a number is: areas, calibration error, intervals.

Numpy and the calibration core only; for everything else in `offramp.evaluation`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from offramp.calibration import ThresholdCurve, threshold_curve
from offramp.errors import InputError

BINS = 15
RESAMPLES = 1000
LEVEL = 0.95


@dataclass(frozen=True)
class Areas:
    """Areas under the risk-coverage curve of one confidence; smaller is better.

    Attributes
    ----------
    aurc : float
        Selective risk averaged over the samples as thresholds (`ThresholdCurve.aurc`).
    e_aurc : float
        What of it is not owed to the errors themselves: `aurc` minus that of a confidence that ranks every right
        sample above every wrong one (Geifman, Uziel, El-Yaniv 2019, with the exact sum for the best ranking).
    augrc : float
        The same average of the generalised risk, the share of all samples that are accepted and wrong
        (Traub et al. 2024).
    """

    aurc: float
    e_aurc: float
    augrc: float


def areas(scores: ArrayLike, correct: ArrayLike) -> Areas:
    """Summarise how well ``scores`` (N,) rank right above wrong; see `Areas`."""
    curve = threshold_curve(scores, correct)
    aurc = curve.aurc()
    right = int(curve.correct[0])
    # The best ranking accepts all right samples first; from then on every sample adds an error.
    accepted = np.arange(right + 1, curve.n + 1)
    best = float(np.sum((accepted - right) / accepted) / curve.n)
    return Areas(aurc, aurc - best, _augrc(curve))


def _augrc(curve: ThresholdCurve) -> float:
    group = curve.accepted - np.append(curve.accepted[1:], 0)
    return float(np.sum(group * (curve.accepted - curve.correct)) / curve.n**2)


@dataclass(frozen=True, eq=False)
class Reliability:
    """A reliability diagram: bins of equal width over [0, 1] and what is in them.

    Attributes
    ----------
    count : (bins,) int64
        Samples in each bin; a bin is open to the left, as (1/15, 2/15], and 0 is in the first.
    confidence, accuracy : (bins,) float64
        Their mean confidence and the share of them that is right; NaN in an empty bin.
    """

    count: NDArray[np.int64]
    confidence: NDArray[np.float64]
    accuracy: NDArray[np.float64]

    @property
    def ece(self) -> float:
        """Expected calibration error: the mean gap between confidence and accuracy, weighted by count."""
        gaps = np.abs(self.confidence - self.accuracy)[self.count > 0]
        return float(np.sum(gaps * self.count[self.count > 0]) / self.count.sum())


def reliability(confidence: ArrayLike, correct: ArrayLike, *, bins: int = BINS) -> Reliability:
    """Bin probabilities and compare them with how often they are right (Guo et al. 2017).

    Parameters
    ----------
    confidence : (N,)
        Probabilities that ought to be the chance of being right, such as the maximum of a softmax.
    correct : (N,) bool or 0/1
        Whether the sample is right.
    bins : int
        Bins of equal width.

    Raises
    ------
    InputError
        For confidences outside [0, 1], or arrays that differ in shape.
    """
    values = np.asarray(confidence, dtype=np.float64)
    right = np.asarray(correct, dtype=np.float64)
    if values.ndim != 1 or values.shape != right.shape or not values.size:
        raise InputError(
            f"confidence has shape {values.shape} and correct {right.shape}: give two arrays (N,)"
        )
    if not ((values >= 0) & (values <= 1)).all():
        raise InputError("confidence has values outside [0, 1]: give probabilities")
    place = np.clip(np.ceil(values * bins).astype(np.int64) - 1, 0, bins - 1)
    count = np.bincount(place, minlength=bins)
    with np.errstate(invalid="ignore"):
        means = [np.bincount(place, weights=column, minlength=bins) / count for column in (values, right)]
    return Reliability(count, *means)


def interval(
    groups: ArrayLike,
    statistic: Callable[[NDArray[np.int64]], Any],
    *,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
    seed: int = 0,
) -> Any:
    """Bootstrap a percentile interval by drawing whole groups with replacement.

    Samples of one group (the tokens of one prompt) are not independent, so groups are drawn and not samples.

    Parameters
    ----------
    groups : (N,) int
        Group of every sample; samples of one group are adjacent.
    statistic : callable
        Takes the numbers of the samples drawn, (n,) int64, and returns a number or an array.
    resamples : int
        How often to draw.
    level : float
        Share of the draws that lies within.

    Returns
    -------
    (low, high) or numpy.ndarray
        Two floats, or (..., 2) for a statistic that is an array.  NaN with fewer than two groups, and draws whose
        statistic is NaN do not count.
    """
    ids = np.asarray(groups)
    starts = np.flatnonzero(np.append(True, ids[1:] != ids[:-1]))
    sizes = np.diff(np.append(starts, len(ids)))
    random = np.random.default_rng(seed)
    found = []
    for _ in range(resamples):
        drawn = random.integers(0, len(starts), len(starts))
        # The samples of the groups drawn, one group after the other.
        ends = sizes[drawn].cumsum()
        within = np.arange(ends[-1]) - np.repeat(ends - sizes[drawn], sizes[drawn])
        found.append(statistic(np.repeat(starts[drawn], sizes[drawn]) + within))
    draws = np.asarray(found, dtype=np.float64)
    bounds = np.full((2, *draws.shape[1:]), np.nan)
    usable = ~np.isnan(draws).all(axis=0)
    if len(starts) > 1 and usable.any():
        tail = (1 - level) / 2
        bounds[..., usable] = np.nanquantile(draws[..., usable], [tail, 1 - tail], axis=0)
    return tuple(bounds.tolist()) if bounds.ndim == 1 else np.moveaxis(bounds, 0, -1)
