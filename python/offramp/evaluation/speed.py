"""Tokens a second: plain transformers, our engine with exits off, and with exits, alternating in one run."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offramp.evaluation.decoded import model_inputs
from offramp.evaluation.metrics import interval
from offramp.llm.model import EarlyExitModel

PLAIN = "transformers generate, KV cache"
OFF = "offramp, exits off"

# Tokens each contender writes before it is timed.
_WARM_UP = 3


@dataclass(frozen=True)
class Speed:
    """Decoding of one prompt at a time.

    Attributes
    ----------
    tokens_per_second : dict of str to list of float
        For each contender one value a prompt, in the order of the prompts.
    same_tokens : bool
        Whether exits off wrote token for token what plain transformers wrote.
    max_new_tokens : int
        Tokens asked for.
    seed : int
        Seed of the intervals' bootstrap.
    """

    tokens_per_second: dict[str, list[float]]
    same_tokens: bool
    max_new_tokens: int
    seed: int = 0

    def median(self, name: str) -> float:
        """Median tokens a second of a contender."""
        return median(self.tokens_per_second[name])

    def interval(self, name: str) -> tuple[float, float]:
        """95% bootstrap interval of `median` over the prompts; NaN with a single prompt."""
        return self._median_interval(np.array(self.tokens_per_second[name]))

    def ratio(self, name: str, to: str = PLAIN) -> float:
        """Median over the prompts of a contender's speed divided by another's on the same prompt."""
        pairs = zip(self.tokens_per_second[name], self.tokens_per_second[to], strict=True)
        return median(one / other for one, other in pairs)

    def ratio_interval(self, name: str, to: str = PLAIN) -> tuple[float, float]:
        """95% bootstrap interval of `ratio` over the prompts; NaN with a single prompt."""
        return self._median_interval(
            np.array(self.tokens_per_second[name]) / np.array(self.tokens_per_second[to])
        )

    def _median_interval(self, values: NDArray[np.float64]) -> tuple[float, float]:
        """95% bootstrap interval of the median of one value a prompt."""
        low, high = interval(np.arange(len(values)), lambda picked: np.median(values[picked]), seed=self.seed)
        return low, high

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "tokens_per_second": {name: self.median(name) for name in self.tokens_per_second},
            "tokens_per_second_interval": {name: self.interval(name) for name in self.tokens_per_second},
            "ratio_to_transformers": {name: self.ratio(name) for name in self.tokens_per_second},
            "ratio_interval": {name: self.ratio_interval(name) for name in self.tokens_per_second},
            "prompts": len(self.tokens_per_second[PLAIN]),
            "same_tokens": self.same_tokens,
            "max_new_tokens": self.max_new_tokens,
        }


def measure_speed(
    ee: EarlyExitModel,
    prompts: Sequence[str],
    *,
    eps: Sequence[float],
    max_new_tokens: int,
    progress: Callable[[str, int, int], None] | None = None,
) -> Speed:
    """Decode each prompt greedily with every contender in turn, at batch 1.

    Parameters
    ----------
    ee : EarlyExitModel
        With trained heads and a calibration.
    prompts : sequence of str
        Texts; the first is also used to warm up.
    eps : sequence of float
        Targets to time exits at.
    max_new_tokens : int
        Tokens to generate at most.
    progress : callable, optional
        Called as ``progress(stage, done, total)``.

    Returns
    -------
    Speed
    """
    ask: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": False}
    # The methods of transformers' models are untyped.
    plain: Any = ee.model.generate
    contenders: dict[str, Callable[..., Any]] = {
        PLAIN: partial(plain, **ask),
        OFF: partial(ee.generate, mode="off", **ask),
    }
    contenders |= {exits_at(target): partial(ee.generate, mode="exit", eps=target, **ask) for target in eps}
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    same = True
    for run in contenders.values():
        run(**model_inputs(ee, prompts[:1]) | {"max_new_tokens": _WARM_UP})
    for number, prompt in enumerate(prompts, 1):
        inputs = model_inputs(ee, [prompt])
        written = {}
        for name, run in contenders.items():
            start = time.perf_counter()
            written[name] = run(**inputs)[0, inputs["input_ids"].shape[1] :].tolist()
            taken[name].append(len(written[name]) / (time.perf_counter() - start))
        same = same and written[PLAIN] == written[OFF]
        if progress is not None:
            progress("timing", number, len(prompts))
    return Speed(taken, same, max_new_tokens)


def exits_at(eps: float) -> str:
    """Name the contender that exits at ε."""
    return f"offramp, exits at ε = {eps:g}"
