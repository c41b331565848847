"""What certification and cascades give back: a threshold or several, and what may be said of them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


class Counted:
    """The shares that follow from ``accepted`` and ``correct`` samples among ``n``."""

    accepted: int
    correct: int
    n: int

    @property
    def coverage(self) -> float:
        """Share of the samples accepted."""
        return self.accepted / self.n

    @property
    def accuracy(self) -> float:
        """Accuracy of the accepted samples; NaN if there are none."""
        return self.correct / self.accepted if self.accepted else math.nan


@dataclass(frozen=True)
class Certificate(Counted):
    """A threshold with a finite-sample promise; made by `offramp.certify`.

    Attributes
    ----------
    tau : float
        The lowest threshold that is certified; +inf if none is, which accepts nothing.
    accepted, correct : int
        Samples that score at least ``tau``, and the correct ones among them; 0 if none is certified.  With
        ``group_method="one-per-group"`` of the samples drawn.
    bound : float
        At confidence 1 - delta the accuracy is at least this; NaN if nothing is certified.
    method : {"e-process", "fixed-sequence", "bonferroni", "sgr", "betting"}
        The test that was made: the method asked for, or ``"betting"`` where it bet on groups.
    assumptions : str
        What has to be true of the samples, in words.
    found : bool
        Whether any threshold is certified.
    n : int
        Samples the certificate rests on.
    eps, delta : float
        As asked for.
    """

    tau: float
    accepted: int
    correct: int
    bound: float
    method: str
    assumptions: str
    found: bool
    n: int
    eps: float
    delta: float

    def __str__(self) -> str:
        """Say it in words."""
        if not self.found:
            said = f"No threshold is certified for accuracy {self.eps:g} at confidence {1 - self.delta:g}"
        else:
            said = (
                f"At confidence {1 - self.delta:g} accuracy is at least {self.bound:.6g} where score >= {self.tau:.6g}"
                f" (coverage {self.coverage:.1%}, {self.accuracy:.2%} correct in the sample)"
            )
        return f"{said}.\nMethod {self.method}, {self.n} samples. {self.assumptions}"


@dataclass(frozen=True, eq=False)
class Cascade:
    """Thresholds for several heads, each of which only sees what no shallower one took.

    Attributes
    ----------
    thresholds : numpy.ndarray, shape (K,), float64
        One a head, shallowest first; +inf where it never exits.
    accepted, correct : numpy.ndarray, shape (K,), int64
        Samples each head takes of those that reach it, and the correct ones among them.
    accuracy : float
        Accuracy of all samples taken by any head; NaN if there are none.
    expected_cost : float
        Mean cost of a sample; NaN where no ``costs`` were given.
    found : bool
        Whether any head ever exits.
    n : int
        Samples counted: all, or with ``delta`` those of the half that certified.
    mode : str
        As asked for.
    eps : float
        As asked for.
    delta : float or None
        How likely the promise may be false; None where there is no promise.
    assumptions : str
        What may be said of new samples, and what has to be true of these.
    """

    thresholds: NDArray[np.float64]
    accepted: NDArray[np.int64]
    correct: NDArray[np.int64]
    accuracy: float
    expected_cost: float
    found: bool
    n: int
    mode: str
    eps: float
    delta: float | None
    assumptions: str

    @classmethod
    def of(
        cls,
        thresholds: NDArray[np.float64],
        accepted: NDArray[np.int64],
        correct: NDArray[np.int64],
        *,
        n: int,
        costs: NDArray[np.float64] | None,
        mode: str,
        eps: float,
        delta: float | None,
        assumptions: str,
    ) -> Cascade:
        """Add up what the heads take."""
        taken, right = int(accepted.sum()), int(correct.sum())
        expected = math.nan
        if costs is not None:
            expected = float(np.append(accepted, n - taken) @ costs) / n
        return cls(
            thresholds,
            accepted,
            correct,
            accuracy=right / taken if taken else math.nan,
            expected_cost=expected,
            found=bool(np.isfinite(thresholds).any()),
            n=n,
            mode=mode,
            eps=eps,
            delta=delta,
            assumptions=assumptions,
        )

    @property
    def coverage(self) -> NDArray[np.float64]:
        """Share of all samples each head takes, float64 (K,)."""
        return self.accepted / self.n

    @property
    def head_accuracy(self) -> NDArray[np.float64]:
        """Accuracy of each head on what it takes, float64 (K,); NaN for a head that takes nothing."""
        nothing = np.full(len(self.accepted), math.nan)
        found: NDArray[np.float64] = np.divide(
            self.correct, self.accepted, out=nothing, where=self.accepted > 0
        )
        return found

    @property
    def guarantees(self) -> tuple[str, ...]:
        """What is promised of new samples at each threshold, in a few words."""
        if self.delta is None:
            promised = f"no guarantee ({self.mode})"
        else:
            what = "the budget, with all heads" if self.mode == "budget" else f"at least {self.eps:g}"
            promised = f"{what}, at confidence {1 - self.delta:g}"
        return tuple(promised if math.isfinite(tau) else "never exits" for tau in self.thresholds)

    def __str__(self) -> str:
        """Table of the heads."""
        promise = "" if self.delta is None else f", certified at confidence {1 - self.delta:g}"
        lines = [
            f"Cascade at ε = {self.eps:g}, mode {self.mode}{promise}, {self.n} samples",
            "head    threshold       takes   accuracy",
        ]
        rows = zip(self.thresholds, self.coverage, self.head_accuracy, strict=True)
        for head, (threshold, coverage, accuracy) in enumerate(rows):
            shown = f"{threshold:10.6f}" if math.isfinite(threshold) else "     never"
            right = f"{accuracy:8.2%}" if math.isfinite(accuracy) else "       -"
            lines.append(f"{head:>4}   {shown}   {coverage:>9.1%}   {right}")
        total = f"{self.accuracy:8.2%}" if math.isfinite(self.accuracy) else "       -"
        lines.append(f" all                {self.coverage.sum():>9.1%}   {total}")
        if math.isfinite(self.expected_cost):
            lines.append(f"expected cost {self.expected_cost:.6g}")
        return "\n".join([*lines, self.assumptions])
