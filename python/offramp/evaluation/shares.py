"""What a reader meets of exits, counted over tokens: agreement, how many leave early, how deep, with intervals.

For `forced` and `decoded`, so that both say the same words about the same counts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from offramp.evaluation.metrics import interval

NAMES = ("agreement", "early_agreement", "early", "mean_layers")


@dataclass(frozen=True)
class Shares:
    """Shares of tokens, and 95% intervals of them.

    Attributes
    ----------
    agreement : float
        Share of all tokens that are the full model's first choice.
    early_agreement : float
        The same among the tokens that leave early, which ε speaks of; NaN where none does.
    early : float
        Share of the tokens that leave early.
    mean_layers : float
        Mean depth of the exits, in layers a token.
    intervals : dict of str to (float, float)
        For each of them, by bootstrap over the prompts; NaN with a single prompt.
    """

    agreement: float
    early_agreement: float
    early: float
    mean_layers: float
    intervals: dict[str, tuple[float, float]]

    @classmethod
    def of(
        cls,
        groups: NDArray[np.int64],
        agrees: NDArray[np.bool_],
        depths: NDArray[np.int64],
        whole: int,
        *,
        seed: int = 0,
    ) -> Shares:
        """Count tokens by their prompt, whether they agree, and the layer they leave after, each (N,).

        The seed is that of the bootstrap.
        """
        early = depths < whole

        def count(picked: NDArray[np.int64] | slice) -> NDArray[np.float64]:
            left = early[picked]
            among_early = agrees[picked][left].mean() if left.any() else np.nan
            return np.array([agrees[picked].mean(), among_early, left.mean(), depths[picked].mean()])

        bounds = interval(groups, count, seed=seed).tolist()
        intervals = {name: (low, high) for name, (low, high) in zip(NAMES, bounds, strict=True)}
        agreement, early_agreement, share, mean_layers = count(slice(None)).tolist()
        return cls(agreement, early_agreement, share, mean_layers, intervals)
