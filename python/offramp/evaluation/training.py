"""The picture of a training: agreement and coverage of every head against the tokens it has seen.

Needs matplotlib (``offramp[plot]``).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, PercentFormatter

from offramp.evaluation.palette import marks
from offramp.llm.training import COVERAGE_EPS, HeadMetrics

_SHOWN_EPS = 0.9


def plot_training(history: Sequence[HeadMetrics], file: Path) -> None:
    """Draw agreement, and coverage at ε = .9, of every head against tokens seen.

    Parameters
    ----------
    history
        From `EarlyExitModel.train_heads`.
    file
        Where to write; the suffix says in which format.
    """
    layers = sorted({item.layer for item in history})
    place = COVERAGE_EPS.index(_SHOWN_EPS)
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2, sharex=True)
    for layer, colour in zip(layers, marks(len(layers), dark=False), strict=True):
        items = [item for item in history if item.layer == layer]
        tokens = [item.tokens for item in items]
        style = {"color": colour, "label": f"after layer {layer}", "marker": "o", "markersize": 3}
        left.plot(tokens, [item.accuracy for item in items], **style)
        right.plot(tokens, [item.coverage[place] for item in items], **style)
    left.set_title("Agreement with the whole model")
    right.set_title(f"Tokens that would exit at ε = {_SHOWN_EPS:g}")
    for ax in (left, right):
        ax.set_xlabel("tokens trained on, counted again every epoch")
        ax.xaxis.set_major_formatter(EngFormatter(sep=""))
        ax.yaxis.set_major_formatter(PercentFormatter(1))
        ax.set_ylim(bottom=0)
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.2)
    left.legend(frameon=False)
    figure.savefig(file, dpi=150)
