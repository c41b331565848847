"""Exact threshold calibration: from confidence scores and correctness to the score that reaches an accuracy.

A head (or any classifier) gives each sample a confidence score; its answer was correct or not.  Accepting
every sample that scores at least tau accepts n(tau) samples, c(tau) of them correct.  The threshold for a
target accuracy eps is the lowest score at which the accepted set is accurate enough::

    tau(eps) = min { v among the scores : c(v) / n(v) >= eps }

Accuracy does not grow steadily with the threshold, so the search never bisects over it; the quotient is the
float64 division, and nothing is accumulated in floating point.

``OFFRAMP_CALIBRATION=sort`` in the environment sorts all samples instead of searching; the result is the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, SupportsIndex, TypeAlias

import numpy as np
from numpy.typing import NDArray

from offramp import _core
from offramp.arrays import (
    FloatName,
    as_floats,
    as_labels,
    as_targets,
    as_thread_count,
    require_same_shape,
    restore_floats,
)
from offramp.errors import InputError

Rule: TypeAlias = Literal["set", "index"]


def fast_calibrate(
    scores: Any,
    correct: Any,
    eps: Any,
    *,
    rule: Rule = "set",
    threads: SupportsIndex | None = None,
) -> Any:
    """Find the lowest threshold at which the accepted samples are accurate enough.

    Parameters
    ----------
    scores : array_like, shape (N,) or (K, N)
        Confidence scores, finite, higher meaning surer: float16, bfloat16, float32 or float64, as numpy
        array, torch tensor, DLPack object or list.  Rows are heads, calibrated one by one.
    correct : array_like, same shape
        Whether the prediction was correct: bool, or integers 0 and 1.
    eps : float or array_like, shape (E,)
        Target accuracy of the accepted samples, in [0, 1].
    rule : {"set", "index"}
        ``"set"``: the threshold is a score v for which the samples with ``score >= v`` reach eps, whatever
        the order of the input.  ``"index"``: the formula of the paper to the letter, over a stable ascending
        sort, the score at the first index from which on the mean of ``correct`` reaches eps; among equal
        scores that index may fall inside the group, and the deployed rule ``score >= tau`` may then miss eps.
    threads : int, optional
        How many threads to use; by default every core this process may use.

    Returns
    -------
    float or numpy.ndarray
        A float for scores (N,) and one eps, else float64 of shape (E,), (K,) or (K, E).  The threshold is one
        of the scores, exactly (+0.0 for a zero), or +inf where none qualifies: finite scores are then never
        accepted.

    Raises
    ------
    ValueError
        NaN or infinite scores, flags other than 0 and 1, eps outside [0, 1], shapes that differ, empty input.
        The message names the argument, the offending value and its first position.
    TypeError
        A dtype that is not listed above.

    Notes
    -----
    A threshold picked on its own calibration data carries no guarantee for new data.

    Examples
    --------
    >>> from offramp import fast_calibrate
    >>> fast_calibrate([0.2, 0.5, 0.7, 0.9], [0, 1, 0, 1], 0.6)
    0.5
    >>> fast_calibrate([0.2, 0.5, 0.7, 0.9], [0, 1, 0, 1], [0.5, 0.9])
    array([0.2, 0.9])
    >>> fast_calibrate([0.2, 0.5], [0, 0], 0.6)
    inf
    """
    if rule not in ("set", "index"):
        raise InputError(f"rule must be 'set' or 'index', but it is {rule!r}")
    values, dtype, labels, _ = _samples(scores, correct)
    if values.ndim not in (1, 2):
        raise InputError(f"scores has shape {values.shape}: give (N,), or (K, N) for K heads")
    targets, single = as_targets(eps, "eps")
    heads = values.shape[0] if values.ndim == 2 else None
    thresholds = _core.fast_calibrate(
        values.reshape(-1),
        dtype,
        labels.reshape(-1),
        heads,
        targets,
        rule == "index",
        as_thread_count(threads),
    )
    if heads is None:
        return float(thresholds[0]) if single else thresholds
    return thresholds if single else thresholds.reshape(heads, len(targets))


def sort_by_score(
    scores: Any, correct: Any, *, threads: SupportsIndex | None = None
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Sort samples by ascending score; samples with equal scores keep their order.

    Parameters
    ----------
    scores, correct : array_like, shape (N,)
        As for `fast_calibrate`.
    threads : int, optional
        How many threads to use; by default every core this process may use.

    Returns
    -------
    scores, correct : numpy.ndarray, shape (N,)
        Both in the new order and in the dtypes given; a bfloat16 torch tensor, for which numpy has no dtype
        of its own, comes back as float32 of the same values.  -0.0 and +0.0 are equal and keep their signs.

    Raises
    ------
    ValueError, TypeError
        As for `fast_calibrate`.

    Examples
    --------
    >>> from offramp import sort_by_score
    >>> sort_by_score([0.5, 0.1, 0.5], [0, 1, 1])
    (array([0.1, 0.5, 0.5]), array([1, 0, 1]))
    """
    values, dtype, labels, label_dtype = _samples(scores, correct)
    _require_one_row(values)
    sorted_values, sorted_labels = _core.sort_by_score(values, dtype, labels, as_thread_count(threads))
    return restore_floats(sorted_values, dtype, scores), sorted_labels.astype(label_dtype)


def threshold_curve(scores: Any, correct: Any, *, threads: SupportsIndex | None = None) -> ThresholdCurve:
    """Count what every threshold accepts: the risk-coverage curve.

    Parameters
    ----------
    scores, correct : array_like, shape (N,)
        As for `fast_calibrate`.
    threads : int, optional
        How many threads to use; by default every core this process may use.

    Returns
    -------
    ThresholdCurve
        One entry for every distinct score.

    Raises
    ------
    ValueError, TypeError
        As for `fast_calibrate`.

    Examples
    --------
    >>> from offramp import threshold_curve
    >>> curve = threshold_curve([0.2, 0.5, 0.7, 0.9], [0, 1, 0, 1])
    >>> curve.coverage
    array([1.  , 0.75, 0.5 , 0.25])
    >>> curve.at([0.6, 0.9])
    array([0.5, 0.9])
    """
    values, dtype, labels, _ = _samples(scores, correct)
    _require_one_row(values)
    thresholds, accepted, right = _core.threshold_curve(values, dtype, labels, as_thread_count(threads))
    return ThresholdCurve(thresholds, accepted, right, n=values.shape[0])


@dataclass(frozen=True, eq=False)
class ThresholdCurve:
    """What every threshold accepts, and how much of it is correct; made by `threshold_curve`.

    Attributes
    ----------
    thresholds : numpy.ndarray, shape (M,), float64
        Distinct scores, ascending.
    accepted, correct : numpy.ndarray, shape (M,), int64
        How many samples score at least the threshold, and how many of those are correct.
    n : int
        How many samples there are in all.
    complete : bool
        Whether every distinct score is present; False for a `staircase`.
    """

    thresholds: NDArray[np.float64]
    accepted: NDArray[np.int64]
    correct: NDArray[np.int64]
    n: int
    complete: bool = True

    @property
    def coverage(self) -> NDArray[np.float64]:
        """Share of all samples accepted at each threshold, float64 (M,)."""
        return self.accepted / self.n

    @property
    def accuracy(self) -> NDArray[np.float64]:
        """Accuracy of the samples accepted at each threshold ("selective accuracy"), float64 (M,)."""
        return self.correct / self.accepted

    def at(self, eps: Any) -> Any:
        """Look up the threshold for a target accuracy: bit for bit what `fast_calibrate` finds.

        Parameters
        ----------
        eps : float or array_like, shape (E,)
            Target accuracy, in [0, 1].

        Returns
        -------
        float or numpy.ndarray
            A float for one eps, else float64 (E,); +inf where no threshold qualifies.

        Raises
        ------
        ValueError
            eps outside [0, 1].
        """
        targets, single = as_targets(eps, "eps")
        best_so_far = np.maximum.accumulate(self.accuracy)
        first = np.searchsorted(best_so_far, targets, side="left")
        thresholds = np.append(self.thresholds, np.inf)[first]
        return float(thresholds[0]) if single else thresholds

    def staircase(self) -> ThresholdCurve:
        """Keep only the thresholds some target needs: the strict records of accuracy as the threshold rises.

        ``staircase().at(eps)`` equals ``at(eps)`` for every eps, from far fewer entries.
        """
        accuracy = self.accuracy
        record = np.append(True, accuracy[1:] > np.maximum.accumulate(accuracy)[:-1])
        return ThresholdCurve(
            self.thresholds[record], self.accepted[record], self.correct[record], self.n, complete=False
        )

    def aurc(self) -> float:
        """Area under the risk-coverage curve: selective risk averaged over the scores of all samples.

        ``AURC = 1/N * sum over samples x of (share of wrong ones among samples scoring >= score(x))``, so
        that a threshold shared by m samples counts m times (Geifman, Uziel, El-Yaniv: Bias-reduced
        uncertainty estimation for deep neural classifiers, ICLR 2019).

        Raises
        ------
        ValueError
            The curve is a `staircase`, which lacks the thresholds in between.
        """
        if not self.complete:
            raise InputError(
                "curve is a staircase, which has no area: call aurc() on the full threshold_curve"
            )
        group = self.accepted - np.append(self.accepted[1:], 0)
        risk = (self.accepted - self.correct) / self.accepted
        return float(np.sum(group * risk) / self.n)

    def to_dict(self) -> dict[str, Any]:
        """Lay the curve out in lists and numbers that JSON stores exactly; `from_dict` reads it back."""
        return {
            "thresholds": self.thresholds.tolist(),
            "accepted": self.accepted.tolist(),
            "correct": self.correct.tolist(),
            "n": self.n,
            "complete": self.complete,
        }

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> ThresholdCurve:
        """Read a curve that `to_dict` laid out.

        Raises
        ------
        ValueError
            A part is missing, or the parts contradict each other.
        """
        try:
            curve = cls(
                np.array(stored["thresholds"], dtype=np.float64),
                np.array(stored["accepted"], dtype=np.int64),
                np.array(stored["correct"], dtype=np.int64),
                int(stored["n"]),
                complete=bool(stored["complete"]),
            )
        except KeyError as error:
            raise InputError(f"stored curve lacks {error}: store it again with to_dict()") from error
        except (TypeError, ValueError, OverflowError) as error:
            raise InputError(f"stored curve is damaged ({error}): store it again with to_dict()") from error
        curve._require_consistent()
        return curve

    def plot(self, ax: Any = None) -> Any:
        """Draw risk against coverage with matplotlib.

        Parameters
        ----------
        ax : matplotlib.axes.Axes, optional
            Where to draw; by default a new figure.

        Returns
        -------
        matplotlib.axes.Axes

        Raises
        ------
        ImportError
            matplotlib is missing.
        """
        if ax is None:
            try:
                from matplotlib import pyplot  # noqa: PLC0415 - an optional dependency
            except ModuleNotFoundError as error:
                raise ImportError(
                    "plot needs matplotlib: install it with `pip install offramp[plot]`"
                ) from error
            _, ax = pyplot.subplots(layout="constrained")
        ax.step(self.coverage, 1.0 - self.accuracy, where="pre")
        ax.set(
            xlabel="coverage", ylabel="risk (share of accepted that is wrong)", xlim=(0, 1), ylim=(0, None)
        )
        return ax

    def __len__(self) -> int:
        return len(self.thresholds)

    def __repr__(self) -> str:
        kind = "thresholds" if self.complete else "records"
        return f"ThresholdCurve({len(self)} {kind}, {self.n} samples)"

    def _require_consistent(self) -> None:
        """Refuse a curve that no samples could have."""
        sizes = {array.shape for array in (self.thresholds, self.accepted, self.correct)}
        consistent = (
            len(sizes) == 1
            and self.thresholds.ndim == 1
            and len(self) > 0
            and bool(np.isfinite(self.thresholds).all())
            and bool((np.diff(self.thresholds) > 0).all())
            and bool((np.diff(self.accepted) < 0).all())
            and bool((np.diff(self.correct) <= 0).all())
            and int(self.accepted[0]) == self.n
            and bool((self.correct <= self.accepted).all())
            and int(self.accepted[-1]) > 0
            and int(self.correct[-1]) >= 0
        )
        if not consistent:
            raise InputError("stored curve contradicts itself: store it again with to_dict()")


def _samples(scores: Any, correct: Any) -> tuple[NDArray[Any], FloatName, NDArray[np.uint8], np.dtype[Any]]:
    """Read scores, what their memory means, as many flags, and the dtype those were given in."""
    values, dtype = as_floats(scores, "scores")
    labels, label_dtype = as_labels(correct, "correct")
    require_same_shape("scores", values.shape, "correct", labels.shape)
    return values, dtype, labels, label_dtype


def _require_one_row(values: NDArray[Any]) -> None:
    if values.ndim != 1:
        raise InputError(f"scores has shape {values.shape}: give shape (N,)")
