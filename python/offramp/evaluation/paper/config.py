"""How much is measured for the paper's figures."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from offramp.errors import InputError
from offramp.llm.calibrating import check_eps


@dataclass(frozen=True)
class PaperConfig:
    """What is measured, and how much of it.

    Attributes
    ----------
    layers : tuple of int
        Exits of the linear heads; empty for four, evenly spaced.
    shortlist : int or None
        Tokens the heads can emit; None for the whole vocabulary, as in the paper, which is slow without a GPU.
    tokens, epochs : int
        Tokens to train on, and how often.
    batch_size, learning_rate
        As for `EarlyExitModel.train_heads`: many small steps, so that heads from scratch get somewhere.
    calibration_tokens : int
        Tokens to calibrate on.
    grid : tuple of float
        Targets ε, in (0, 1).
    prompts, max_new_tokens : int
        Held-out prompts decoded at each of them, and tokens generated for each at most.
    timed : int
        How many of them to time.
    tasks : tuple of str
        Benchmarks of Fig. 2, by the harness's names; empty for none.
    documents : int or None
        Documents of each at most.
    seed : int
        Seed of the training and of the intervals.
    """

    layers: tuple[int, ...] = ()
    shortlist: int | None = 8192
    tokens: int = 20_000
    epochs: int = 5
    batch_size: int = 96
    learning_rate: float = 3e-3
    calibration_tokens: int = 4_000
    grid: tuple[float, ...] = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
    prompts: int = 24
    max_new_tokens: int = 40
    timed: int = 6
    tasks: tuple[str, ...] = ("offramp_facts", "offramp_endings", "offramp_pronouns")
    documents: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse targets nothing can be calibrated for."""
        for eps in self.grid:
            check_eps(eps)

    def quick(self) -> PaperConfig:
        """Give the same at about a tenth of the size."""
        return replace(
            self,
            tokens=2_000,
            epochs=3,
            calibration_tokens=800,
            prompts=6,
            max_new_tokens=24,
            timed=2,
            documents=8,
        )

    def on(self, model: Any) -> PaperConfig:
        """Give the same with exits for a model where none are named.

        Raises
        ------
        InputError
            For a model of a single layer.
        """
        if self.layers:
            return self
        count = model.config.get_text_config(decoder=True).num_hidden_layers
        if count < 2:
            raise InputError(f"this model has {count} layer: exits need one with at least 2")
        layers = {min(count - 1, max(1, round(count * fifth / 5))) for fifth in (1, 2, 3, 4)}
        return replace(self, layers=tuple(sorted(layers)))
