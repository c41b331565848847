"""The outcome of a calibration: thresholds, what they rest on, and the ε → τ staircase of every head.

For `model`, `storage` and the command line; needs only the calibration core, no model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from offramp.calibration import ThresholdCurve, threshold_curve
from offramp.errors import InputError, StorageError
from offramp.llm.scoring import Scores


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
        Target accuracy ε: on the calibration tokens each head, taken alone, agrees with the full model on at least
        this share of the tokens whose margin reaches its threshold.
    curves : tuple of ThresholdCurve
        For every head the records of its risk-coverage curve, which answer any ε.
    mode : str
        ``"marginal"``: every head is calibrated by itself on all tokens, as in the paper.
    n : int
        Calibration tokens.
    sequences : int
        Sequences they came from.
    dtype : str
        dtype of the model the margins were measured with.
    text_hash : str
        SHA-256 of the prompts or sequences used.
    """

    layers: tuple[int, ...]
    num_layers: int
    eps: float
    curves: tuple[ThresholdCurve, ...]
    mode: str
    n: int
    sequences: int
    dtype: str
    text_hash: str

    @property
    def thresholds(self) -> tuple[float, ...]:
        """τ of every head at ``eps``; inf where the head never exits."""
        return self.at(self.eps)

    def at(self, eps: float) -> tuple[float, ...]:
        """τ of every head at another ε in (0, 1), without a new calibration."""
        eps = check_eps(eps)
        return tuple(float(curve.at(eps)) for curve in self.curves)

    @property
    def accepted(self) -> tuple[int, ...]:
        """Calibration tokens each head, by itself, would emit."""
        return tuple(
            int(curve.accepted[place]) if place is not None else 0 for curve, place in self._places()
        )

    @property
    def correct(self) -> tuple[int, ...]:
        """Those of them where the head agrees with the full model."""
        return tuple(int(curve.correct[place]) if place is not None else 0 for curve, place in self._places())

    @property
    def coverage(self) -> tuple[float, ...]:
        """Share of the calibration tokens each head, by itself, would emit."""
        return tuple(accepted / self.n for accepted in self.accepted)

    @property
    def accuracy(self) -> tuple[float, ...]:
        """Agreement on those tokens; NaN for a head that never exits."""
        pairs = zip(self.correct, self.accepted, strict=True)
        return tuple(correct / accepted if accepted else math.nan for correct, accepted in pairs)

    def _places(self) -> list[tuple[ThresholdCurve, int | None]]:
        found: list[tuple[ThresholdCurve, int | None]] = []
        for curve, threshold in zip(self.curves, self.thresholds, strict=True):
            place = int(np.searchsorted(curve.thresholds, threshold)) if math.isfinite(threshold) else None
            found.append((curve, place))
        return found

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; `from_dict` gives back an equal calibration.  A threshold of inf becomes None."""
        return {
            "mode": self.mode,
            "eps": self.eps,
            "layers": list(self.layers),
            "num_layers": self.num_layers,
            "thresholds": [tau if math.isfinite(tau) else None for tau in self.thresholds],
            "accepted": list(self.accepted),
            "correct": list(self.correct),
            "n": self.n,
            "sequences": self.sequences,
            "dtype": self.dtype,
            "text_hash": self.text_hash,
            "curves": [curve.to_dict() for curve in self.curves],
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Calibration:
        """Read what `to_dict` gave.

        Raises
        ------
        StorageError
            If something is missing or of another kind.
        """
        try:
            found = cls(
                layers=tuple(int(layer) for layer in values["layers"]),
                num_layers=int(values["num_layers"]),
                eps=check_eps(values["eps"]),
                curves=tuple(ThresholdCurve.from_dict(curve) for curve in values["curves"]),
                mode=str(values["mode"]),
                n=int(values["n"]),
                sequences=int(values["sequences"]),
                dtype=str(values["dtype"]),
                text_hash=str(values["text_hash"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise StorageError(f"the stored calibration is damaged ({error}): calibrate again") from error
        if len(found.curves) != len(found.layers) or any(curve.n != found.n for curve in found.curves):
            raise StorageError(
                "the stored calibration is damaged (its curves are not its layers'): calibrate again"
            )
        return found

    def __str__(self) -> str:
        """Table of the heads."""
        return "\n".join(
            [
                f"Calibration at ε = {self.eps:g} on {self.n} tokens of {self.sequences} sequences",
                "after layer   threshold   exits alone   agreement",
                *(
                    f"{layer:>5} of {self.num_layers:<3}  {_number(threshold, '10.6f', 'never'):>10}"
                    f"   {coverage:>10.1%}   {_number(accuracy, '9.1%', '-'):>9}"
                    for layer, threshold, coverage, accuracy in zip(
                        self.layers, self.thresholds, self.coverage, self.accuracy, strict=True
                    )
                ),
                "Each head was calibrated by itself on all tokens (mode 'marginal', as in the paper): where a "
                "shallower head takes the easy tokens first, a deeper one can agree less than ε on what is left.",
            ]
        )


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


def calibrate_scores(
    scores: Scores, layers: tuple[int, ...], num_layers: int, eps: float, *, dtype: str, text_hash: str
) -> Calibration:
    """Calibrate every head by itself on all tokens."""
    curves = tuple(
        threshold_curve(margins, correct).staircase()
        for margins, correct in zip(scores.scores, scores.correct, strict=True)
    )
    return Calibration(
        layers=layers,
        num_layers=num_layers,
        eps=check_eps(eps),
        curves=curves,
        mode="marginal",
        n=scores.scores.shape[1],
        sequences=len(np.unique(scores.groups)),
        dtype=dtype,
        text_hash=text_hash,
    )


def _number(value: float, form: str, missing: str) -> str:
    return format(value, form) if math.isfinite(value) else missing
