"""The outcome of a calibration: thresholds, what they rest on, and everything another ε needs.

For `model`, `storage` and the command line; needs only the calibration core, no model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offramp.calibration import ThresholdCurve, threshold_curve
from offramp.cascade import calibrate_cascade
from offramp.design import MODES, as_groups, as_level
from offramp.errors import InputError, StorageError
from offramp.llm.scoring import Scores
from offramp.outcomes import Cascade


@dataclass(frozen=True, eq=False)
class Measured:
    """What the heads said on the calibration tokens: what any ε is answered from.

    Attributes
    ----------
    scores : (K, N) float32
        Margins.
    correct : (K, N) bool
        Whether the head agrees with the full model.
    groups : (N,) int64
        The sequence each token came from.
    """

    scores: NDArray[np.float32]
    correct: NDArray[np.bool_]
    groups: NDArray[np.int64]

    @classmethod
    def from_arrays(cls, arrays: dict[str, NDArray[Any]]) -> Measured:
        """Read what `to_arrays` gave.

        Raises
        ------
        StorageError
            If an array is missing or does not go with the others.
        """
        try:
            found = cls(arrays["scores"], arrays["correct"].astype(bool), arrays["groups"])
        except KeyError as error:
            raise StorageError(f"the stored calibration lacks {error}: calibrate again") from error
        heads, tokens = found.scores.shape if found.scores.ndim == 2 else (0, 0)
        fits = found.correct.shape == (heads, tokens) and found.groups.shape == (tokens,) and tokens > 0
        if not fits or found.scores.dtype != np.float32 or not np.isfinite(found.scores).all():
            raise StorageError("the stored calibration contradicts itself: calibrate again")
        return found

    def to_arrays(self) -> dict[str, NDArray[Any]]:
        """Give arrays safetensors can hold."""
        arrays = {"scores": self.scores, "correct": self.correct.astype(np.uint8), "groups": self.groups}
        # safetensors writes memory as it lies, whatever the strides.
        return {name: np.ascontiguousarray(array) for name, array in arrays.items()}


@dataclass(frozen=True, eq=False)
class Calibration:
    """Thresholds for the heads of one model; printing it shows a table.

    Attributes
    ----------
    layers : tuple of int
        The exits, shallow to deep.
    num_layers : int
        Layers of the whole model.
    eps : float
        Target accuracy ε: on the calibration tokens each head agrees with the full model on at least this share of
        the tokens whose margin reaches its threshold, of all of them or of those that reach the head (see ``mode``).
    curves : tuple of ThresholdCurve
        For every head taken alone the records of its risk-coverage curve.
    measured : Measured
        What the heads said on the calibration tokens.
    mode : str
        ``"sequential"``: every head on the tokens the heads before it left.  ``"marginal"``: every head by itself on
        all tokens, as in the paper.  ``"budget"``: the fewest layers with at most 1 - ε of all tokens early and wrong.
    delta : float or None
        How likely the promise for new tokens may be false; None where nothing is promised.
    n : int
        Calibration tokens.
    sequences : int
        Sequences they came from.
    dtype : str
        dtype of the model the margins were measured with.
    text_hash : str
        SHA-256 of the prompts or sequences used.
    max_group_size : int or None
        The most tokens a sequence could have, where that was known before there were any.
    """

    layers: tuple[int, ...]
    num_layers: int
    eps: float
    curves: tuple[ThresholdCurve, ...]
    measured: Measured
    mode: str
    delta: float | None
    n: int
    sequences: int
    dtype: str
    text_hash: str
    max_group_size: int | None = None
    _known: dict[tuple[Any, ...], Cascade] = field(default_factory=dict, repr=False)

    @property
    def thresholds(self) -> tuple[float, ...]:
        """τ of every head at ``eps``; inf where the head never exits."""
        return self.at(self.eps)

    def at(self, eps: float, heads: Sequence[int] | None = None) -> tuple[float, ...]:
        """τ of every head at another ε in (0, 1), without a new calibration.

        Parameters
        ----------
        eps
            Target accuracy.
        heads
            Numbers of the heads in use, ascending; the others get inf.  A head meets more tokens if a shallower one is
            switched off, so thresholds are found for exactly these.
        """
        return tuple(self.cascade(eps, heads=heads).thresholds.tolist())

    def planned(self, mode: str, eps: float, heads: Sequence[int]) -> tuple[float, ...]:
        """τ of every head for a plan: in verify mode, where they only tell which drafts are worth a try, uncertified.

        Parameters
        ----------
        mode
            ``"exit"`` or ``"verify"``.
        eps, heads
            As for `at`.
        """
        if mode == "verify":
            return tuple(self.cascade(eps, mode="sequential", heads=heads).thresholds.tolist())
        return self.at(eps, heads)

    def cascade(
        self,
        eps: float | None = None,
        *,
        mode: str | None = None,
        delta: float | None = None,
        heads: Sequence[int] | None = None,
    ) -> Cascade:
        """Calibrate the measured tokens anew, by default as they were.

        Parameters
        ----------
        eps
            Target accuracy.
        mode, delta
            As for `offramp.calibrate_cascade`; a mode without delta promises nothing.
        heads
            Numbers of the heads in use.

        Returns
        -------
        Cascade
            Costs are layers.
        """
        eps = self.eps if eps is None else check_eps(eps)
        if mode is None:
            mode, delta = self.mode, self.delta
        used = tuple(range(len(self.layers))) if heads is None else tuple(heads)
        key = (eps, mode, delta, used)
        if key not in self._known:
            self._known[key] = self._calibrate(eps, mode, delta, used)
        return self._known[key]

    def _calibrate(self, eps: float, mode: str, delta: float | None, used: tuple[int, ...]) -> Cascade:
        costs = [*(self.layers[head] for head in used), self.num_layers]
        found = calibrate_cascade(
            self.measured.scores[list(used)],
            self.measured.correct[list(used)],
            eps,
            mode=mode,  # type: ignore[arg-type]  # checked when it was calibrated
            costs=costs,
            delta=delta,
            groups=None if delta is None else self.measured.groups,
            max_group_size=None if delta is None else self.max_group_size,
        )
        if len(used) == len(self.layers):
            return found
        thresholds = np.full(len(self.layers), math.inf)
        accepted, correct = np.zeros((2, len(self.layers)), np.int64)
        thresholds[list(used)], accepted[list(used)], correct[list(used)] = (
            found.thresholds,
            found.accepted,
            found.correct,
        )
        return Cascade.of(
            thresholds,
            accepted,
            correct,
            n=found.n,
            costs=np.array([*self.layers, self.num_layers], dtype=np.float64),
            mode=mode,
            eps=eps,
            delta=delta,
            assumptions=found.assumptions,
        )

    @property
    def accepted(self) -> tuple[int, ...]:
        """Tokens each head takes of those that reach it; with ``delta`` on the half that certified."""
        return tuple(self.cascade().accepted.tolist())

    @property
    def correct(self) -> tuple[int, ...]:
        """Those of them where the head agrees with the full model."""
        return tuple(self.cascade().correct.tolist())

    @property
    def coverage(self) -> tuple[float, ...]:
        """Share of the tokens counted that each head takes."""
        return tuple(self.cascade().coverage.tolist())

    @property
    def accuracy(self) -> tuple[float, ...]:
        """Agreement on those tokens; NaN for a head that takes none."""
        return tuple(self.cascade().head_accuracy.tolist())

    @property
    def alone(self) -> tuple[tuple[float, float], ...]:
        """Coverage and agreement of each head if it were the only one: the points of the curves in use."""
        found = []
        rows = zip(self.measured.scores, self.measured.correct, self.thresholds, strict=True)
        for margins, correct, threshold in rows:
            taken = margins.astype(np.float64) >= threshold
            accepted = int(taken.sum())
            found.append((accepted / self.n, int(correct[taken].sum()) / accepted if accepted else math.nan))
        return tuple(found)

    @property
    def promise(self) -> str:
        """What the thresholds promise, in words."""
        return self.cascade().assumptions

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, all but ``measured``; `from_dict` gives back an equal calibration.

        A threshold of inf becomes None.
        """
        return {
            "mode": self.mode,
            "delta": self.delta,
            "eps": self.eps,
            "layers": list(self.layers),
            "num_layers": self.num_layers,
            "thresholds": [tau if math.isfinite(tau) else None for tau in self.thresholds],
            "accepted": list(self.accepted),
            "correct": list(self.correct),
            "promise": self.promise,
            "n": self.n,
            "sequences": self.sequences,
            "dtype": self.dtype,
            "text_hash": self.text_hash,
            "max_group_size": self.max_group_size,
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any], measured: Measured) -> Calibration:
        """Read what `to_dict` gave.

        Raises
        ------
        StorageError
            If something is missing or of another kind.
        """
        try:
            layers = tuple(int(layer) for layer in values["layers"])
            found = cls(
                layers=layers,
                num_layers=int(values["num_layers"]),
                eps=check_eps(values["eps"]),
                curves=_curves(measured),
                measured=measured,
                mode=str(values["mode"]),
                delta=None if values["delta"] is None else as_level(values["delta"]),
                n=int(values["n"]),
                sequences=int(values["sequences"]),
                dtype=str(values["dtype"]),
                text_hash=str(values["text_hash"]),
                max_group_size=_longest(values.get("max_group_size"), measured),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise StorageError(f"the stored calibration is damaged ({error}): calibrate again") from error
        if found.mode not in MODES or measured.scores.shape != (len(layers), found.n):
            raise StorageError(
                "the stored calibration is damaged (its tokens are not its layers'): calibrate again"
            )
        return found

    def __str__(self) -> str:
        """Table of the heads."""
        promised = "" if self.delta is None else f", certified at confidence {1 - self.delta:g}"
        takes = "exits alone" if self.mode == "marginal" else "takes"
        return "\n".join(
            [
                f"Calibration at ε = {self.eps:g} on {self.n} tokens of {self.sequences} sequences, mode {self.mode}"
                f"{promised}",
                f"after layer   threshold   {takes:>11}   agreement",
                *(
                    f"{layer:>5} of {self.num_layers:<3}  {_number(threshold, '10.6f', 'never'):>10}"
                    f"   {coverage:>11.1%}   {_number(accuracy, '9.1%', '-'):>9}"
                    for layer, threshold, coverage, accuracy in zip(
                        self.layers, self.thresholds, *self._shown(), strict=True
                    )
                ),
                self.promise,
            ]
        )

    def _shown(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        if self.mode != "marginal":
            return self.coverage, self.accuracy
        coverage, accuracy = zip(*self.alone, strict=True)
        return coverage, accuracy

    def by_mode(self) -> dict[str, dict[str, Any]]:
        """Plain values for JSON: what `side_by_side` shows."""
        return {
            name: {
                "thresholds": [tau if math.isfinite(tau) else None for tau in found.thresholds.tolist()],
                "accepted": found.accepted.tolist(),
                "correct": found.correct.tolist(),
                "n": found.n,
                "expected_layers": found.expected_cost,
            }
            for name, found in self._kinds().items()
        }

    def side_by_side(self) -> str:
        """Table of marginal and sequential thresholds and, where there are others, of those in use."""
        kinds = self._kinds()
        lines = [
            f"What heads take of the tokens that reach them, at ε = {self.eps:g}",
            "after layer  " + "".join(f"  {name:^29}" for name in kinds),
            "             " + "  threshold    takes  agreement" * len(kinds),
        ]
        for head, layer in enumerate(self.layers):
            cells = [
                _cells(found.thresholds[head], found.coverage[head], found.head_accuracy[head])
                for found in kinds.values()
            ]
            lines.append(f"{layer:>5} of {self.num_layers:<4}" + "".join(cells))
        together = [_cells(None, found.coverage.sum(), found.accuracy) for found in kinds.values()]
        layers = [f"{found.expected_cost:>31.1f}" for found in kinds.values()]
        return "\n".join([*lines, f"{'all':<13}" + "".join(together), "layers/token " + "".join(layers)])

    def _kinds(self) -> dict[str, Cascade]:
        kinds = {mode: self.cascade(mode=mode) for mode in ("marginal", "sequential")}
        if self.delta is not None:
            kinds[f"{self.mode}, certified"] = self.cascade()
        elif self.mode not in kinds:
            kinds[self.mode] = self.cascade()
        return kinds


def check_eps(eps: Any) -> float:
    """Return ε as a float, or say what is wrong with it.

    Raises
    ------
    InputError
        If it is not a number strictly between 0 and 1.
    """
    if isinstance(eps, bool) or not isinstance(eps, int | float | np.floating) or not 0 < eps < 1:
        raise InputError(
            f"eps is {eps!r}: give the share of tokens that must agree, between 0 and 1, such as 0.9"
        )
    return float(eps)


def check_mode(mode: Any, delta: Any) -> None:
    """Refuse a mode there is not, or one that cannot be certified.

    Raises
    ------
    InputError
        Naming the argument at fault.
    """
    if mode not in MODES:
        raise InputError(f"mode is {mode!r}: choose 'sequential', 'marginal' or 'budget'")
    if delta is not None:
        as_level(delta)
        if mode == "marginal":
            raise InputError(
                "delta goes with mode 'sequential' or 'budget': marginal thresholds hold for heads alone"
            )


def calibrate_scores(
    scores: Scores,
    layers: tuple[int, ...],
    num_layers: int,
    eps: float,
    *,
    mode: str = "sequential",
    delta: float | None = None,
    dtype: str,
    text_hash: str,
    max_group_size: int | None = None,
) -> Calibration:
    """Calibrate the heads on scored tokens."""
    check_mode(mode, delta)
    measured = Measured(scores.scores, scores.correct, scores.groups)
    return Calibration(
        layers=layers,
        num_layers=num_layers,
        eps=check_eps(eps),
        curves=_curves(measured),
        measured=measured,
        mode=mode,
        delta=delta,
        n=scores.scores.shape[1],
        sequences=len(np.unique(scores.groups)),
        dtype=dtype,
        text_hash=text_hash,
        max_group_size=max_group_size,
    )


def _longest(stored: Any, measured: Measured) -> int | None:
    """Read the most tokens a sequence could have; earlier versions did not know it."""
    return None if stored is None else as_groups(measured.groups, len(measured.groups), stored).most


def _curves(measured: Measured) -> tuple[ThresholdCurve, ...]:
    return tuple(
        threshold_curve(margins, correct).staircase()
        for margins, correct in zip(measured.scores, measured.correct, strict=True)
    )


def _cells(threshold: float | None, coverage: float, accuracy: float) -> str:
    shown = "" if threshold is None else _number(threshold, ".6f", "never")
    return f"  {shown:>9}  {coverage:>7.1%}  {_number(accuracy, '9.1%', '-'):>9}"


def _number(value: float, form: str, missing: str) -> str:
    return format(value, form) if math.isfinite(value) else missing
