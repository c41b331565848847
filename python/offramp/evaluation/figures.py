"""The report's pictures, as SVG that takes text colour and fonts from the page it is put in.

Needs matplotlib (``offramp[plot]``).
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from offramp.evaluation.drawing import EVALUATION, WHOLE
from offramp.evaluation.palette import COLOURS, line
from offramp.evaluation.speed import PLAIN

if TYPE_CHECKING:
    from offramp.evaluation.findings import Findings

# Matplotlib draws in these; afterwards each becomes a colour of the page, which knows light from dark.
_TEXT = "#010203"
_WHOLE = "#010204"
_PAGE_COLOURS = {_TEXT: "currentColor", _WHOLE: "var(--whole)", WHOLE.lower(): "var(--whole)"} | {
    colour.lower(): f"var(--line{place})" for place, colour in enumerate(COLOURS)
}
_STYLE: Any = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 12,
    "text.color": _TEXT,
    "axes.edgecolor": _TEXT,
    "axes.labelcolor": _TEXT,
    "xtick.color": _TEXT,
    "ytick.color": _TEXT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "legend.frameon": False,
    "legend.fontsize": 10.5,
    "grid.color": _TEXT,
    "grid.alpha": 0.15,
}


def draw_all(result: Findings) -> dict[str, str]:
    """Draw every picture the findings have the numbers for: SVG elements by name."""
    pictures: dict[str, Callable[..., None]] = {}
    if result.decoded:
        pictures |= {"agreement": _agreement, "exits": _exits}
    if result.speed is not None:
        pictures["speed"] = _speed
    pictures["curves"] = _curves
    return {name: _svg(name, partial(_alone, draw, result)) for name, draw in pictures.items()}


def draw_sorting(result: Findings) -> dict[str, str]:
    """Draw how well each confidence sorts: SVG elements by caption, for what the findings have the rows of."""
    return {
        picture.caption: _svg(name, partial(picture.drawn_from, result.sorting))
        for name, picture in EVALUATION.items()
        if all(result.sorting.get(table) for table in picture.tables)
    }


def _alone(draw: Callable[..., None], result: Findings, figure: Figure) -> None:
    draw(figure.add_subplot(), result=result)


def _agreement(ax: Any, result: Findings) -> None:
    targets = [item.eps for item in result.decoded]
    low = min(targets) - 0.05
    ax.plot([low, 1], [low, 1], color=_TEXT, alpha=0.4, linewidth=1, linestyle="--", label="what ε asks for")
    early, everything = _mark(0), _mark(1)
    errors = [
        [_finite(abs(bound - item.agreement)) for bound in item.intervals["agreement"]]
        for item in result.decoded
    ]
    ax.errorbar(
        targets,
        [item.agreement for item in result.decoded],
        yerr=list(zip(*errors, strict=True)),
        color=everything,
        marker="o",
        capsize=3,
        label="all emitted tokens",
    )
    ax.plot(
        targets,
        [item.early_agreement for item in result.decoded],
        color=early,
        marker="s",
        label="tokens that left early",
    )
    ax.set(xlabel="target accuracy ε", ylabel="agree with the full model")
    # Short and small, since 0.9 and 0.95 stand close together.
    ax.set_xticks(targets, [f"{eps:g}" for eps in targets], fontsize="small")
    ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    ax.grid(axis="y")
    ax.legend(loc="lower right")


def _exits(ax: Any, result: Findings) -> None:
    colours = [*map(_mark, range(len(result.calibration.layers))), _WHOLE]
    names = [f"ε = {item.eps:g}" for item in result.decoded]
    left = [0.0] * len(names)
    layers = result.decoded[0].layers
    for layer, colour in zip(layers, colours, strict=True):
        shares = [item.exits[layer] / item.tokens for item in result.decoded]
        whole = layer == layers[-1]
        ax.barh(
            names, shares, left=left, color=colour, label="whole model" if whole else f"after layer {layer}"
        )
        left = [start + share for start, share in zip(left, shares, strict=True)]
    ax.invert_yaxis()
    ax.set(xlabel="emitted tokens", xlim=(0, 1))
    ax.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)


def _speed(ax: Any, result: Findings) -> None:
    assert result.speed is not None
    names = list(result.speed.tokens_per_second)
    values = [result.speed.median(name) for name in names]
    colours = [_WHOLE if name == PLAIN else _mark(1) for name in names]
    labels = [name.replace(", ", ",\n", 1) for name in names]
    bars = ax.barh(labels, values, color=colours)
    ax.bar_label(bars, [f"{value:.1f}" for value in values], padding=4)
    ax.invert_yaxis()
    ax.set(xlabel="tokens a second, batch 1, median", xlim=(0, 1.15 * max(values)))


def _curves(ax: Any, result: Findings) -> None:
    calibration = result.calibration
    heads = zip(calibration.layers, calibration.curves, calibration.alone, strict=True)
    for index, (layer, curve, (place, accuracy)) in enumerate(heads):
        look = line(index) | {"color": _mark(index)}
        # The legend shows the marker too; on the curve it stands at the threshold.
        ax.plot([], [], label=f"after layer {layer}", **look)
        ax.step(curve.coverage, curve.accuracy, where="pre", **look | {"marker": None})
        if place:
            ax.plot([place], [accuracy], **look)
    ax.axhline(calibration.eps, color=_TEXT, alpha=0.4, linewidth=1, linestyle="--")
    ax.set(xlabel="share of tokens the head would take", ylabel="agree with the full model", xlim=(0, 1))
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter(PercentFormatter(1, decimals=0))
    ax.grid(axis="y")
    ax.legend(loc="lower left")


def _finite(value: float) -> float:
    return value if math.isfinite(value) else 0.0


def _svg(name: str, draw: Callable[[Figure], None]) -> str:
    # The salt keeps the ids of pictures on one page apart, and the same from run to run.
    with mpl.rc_context({**_STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=(4.8, 3.3), layout="constrained")
        draw(figure)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = re.sub(r"<metadata>.*?</metadata>", "", buffer.getvalue(), flags=re.DOTALL)
    for drawn, shown in _PAGE_COLOURS.items():
        svg = svg.replace(drawn, shown)
    svg = re.sub(r"#0103([0-9a-f]{2})", lambda found: f"var(--mark{int(found[1], 16)})", svg)
    # The page sizes the picture, and its caption speaks for it.
    return re.sub(r' width="[^"]*" height="[^"]*"', ' aria-hidden="true"', svg[svg.index("<svg") :], count=1)


def _mark(index: int) -> str:
    """Stand in for the colour of exit number `index`."""
    return f"#0103{index:02x}"
