"""The paper's figures from their rows of numbers, as PNG and SVG.

Needs matplotlib (``offramp[plot]``).  Colours are Okabe and Ito's, told apart by eyes that see few hues; every line
also has its own marker or dashes, so that a grey print can be read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from offramp.llm.files import written_whole

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES = ("-", "--", "-.", ":")
WHOLE = "#9A9A9A"
# Inches: text of 12 points is still ten pixels high where a phone shows the whole width.
_WIDTH = 6.4

_STYLE: Any = {
    "font.family": "sans-serif",
    "font.size": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "legend.fontsize": 10.5,
    "lines.linewidth": 1.8,
    "lines.markersize": 5.5,
    "svg.hashsalt": "offramp",
    "savefig.dpi": 200,
}

CAPTIONS = {
    "fig1-training": "Fig. 1: agreement with the model and entropy during training, on tokens held back from it.",
    "fig2-score": "Fig. 2: benchmark score against the target accuracy ε.",
    "fig3-speed": "Fig. 3: measured speed-up against ε, batch 1; bars are 95% intervals over the prompts.",
    "fig4-exits": "Fig. 4: the layer each emitted token left after, against ε.",
    "fig5-risk-coverage": "Fig. 5: risk, the share of accepted tokens that are wrong, against coverage, by margin.",
    "fig6-confidence": "Fig. 6: the same of one head set, by each confidence.",
}

Rows = Sequence[Mapping[str, Any]]


def draw_figures(tables: Mapping[str, Rows], folder: Path) -> dict[str, Path]:
    """Draw every figure whose rows are there; returns its PNG by name.

    Parameters
    ----------
    tables : mapping of str to rows
        From `offramp.evaluation.paper.make_figures`.
    folder : Path
        Where ``NAME.png`` and ``NAME.svg`` go.
    """
    wanted: dict[str, tuple[str, float, Callable[[Figure, Rows], None]]] = {
        "fig1-training": ("training", 8.6, _training),
        "fig2-score": ("score", 4.4, _score),
        "fig3-speed": ("speed", 4.4, _speed),
        "fig4-exits": ("exits", 4.4, _exits),
        "fig5-risk-coverage": ("curves", 5.6, _by_heads),
        "fig6-confidence": ("curves", 5.6, _by_confidence),
    }
    drawn = {}
    for name, (table, height, draw) in wanted.items():
        if not tables.get(table):
            continue
        with mpl.rc_context(_STYLE):
            figure = Figure(figsize=(_WIDTH, height), layout="constrained")
            draw(figure, tables[table])
            for kind in ("svg", "png"):
                path = folder / f"{name}.{kind}"
                with written_whole(path) as temporary:
                    figure.savefig(temporary, format=kind, metadata={"Date": None} if kind == "svg" else None)
        drawn[name] = folder / f"{name}.png"
    return drawn


def _training(figure: Figure, rows: Rows) -> None:
    """Fig. 1: a row for each head set; accuracy on the left, entropy on the right, a line for each exit."""
    names, layers = _distinct(rows, "heads"), _distinct(rows, "layer")
    axes = figure.subplots(len(names), 2, sharex=True, sharey="col", squeeze=False)
    for panels, name in zip(axes, names, strict=True):
        for place, layer in enumerate(layers):
            found = [row for row in rows if row["heads"] == name and row["layer"] == layer]
            steps = [row["step"] for row in found]
            for ax, value in zip(panels, ("accuracy", "entropy"), strict=True):
                ax.plot(steps, [row[value] for row in found], label=f"after layer {layer}", **_look(place))
        panels[0].set_ylabel(name)
        panels[0].yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    for ax, title in zip(axes[0], ("agrees with the model", "entropy, nats"), strict=True):
        ax.set_title(title, fontsize=12)
    for ax in axes[-1]:
        ax.set_xlabel("training steps")
        ax.set_ylim(0, None)
    _legend_below(figure, 2)


def _score(figure: Figure, rows: Rows) -> None:
    """Fig. 2: a line for each benchmark, dashed where the whole model answers."""
    ax = figure.subplots()
    for place, task in enumerate(_distinct(rows, "task")):
        # One line a task: length-normalised accuracy where there is one, as the harness's leaderboards do.
        metrics = {row["metric"] for row in rows if row["task"] == task}
        metric = next((name for name in ("acc_norm", "acc", "exact_match") if name in metrics), min(metrics))
        found = [row for row in rows if row["task"] == task and row["metric"] == metric]
        at = [row for row in found if math.isfinite(row["eps"])]
        look = _look(place)
        ax.plot([row["eps"] for row in at], [row["score"] for row in at], label=f"{task}, {metric}", **look)
        for row in found:
            if not math.isfinite(row["eps"]):
                ax.axhline(row["score"], color=look["color"], linewidth=1, linestyle=":", alpha=0.9)
    ax.set(xlabel="target accuracy ε", ylabel="score (dotted: the whole model)", ylim=(0, 1))
    ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    ax.legend(loc="best")


def _speed(figure: Figure, rows: Rows) -> None:
    """Fig. 3: speed beside exits off, and beside plain transformers, with intervals."""
    ax = figure.subplots()
    at = [row for row in rows if math.isfinite(row["eps"])]
    targets = [row["eps"] for row in at]
    sides = (("ratio_off", "× our engine, exits off"), ("ratio", "× transformers generate"))
    for place, (column, label) in enumerate(sides):
        values = [row[column] for row in at]
        errors = [
            [_finite(abs(row[f"{column}_{end}"] - row[column])) for row in at] for end in ("low", "high")
        ]
        ax.errorbar(targets, values, yerr=errors, capsize=3, label=label, **_look(place))
    ax.axhline(1, color="black", linewidth=1)
    ax.set(xlabel="target accuracy ε", ylabel="speed-up, batch 1", ylim=(0, None))
    ax.legend(loc="best")


def _exits(figure: Figure, rows: Rows) -> None:
    """Fig. 4: shares of tokens by exit, a bar for each ε."""
    ax = figure.subplots()
    layers = [int(name.removeprefix("exits_")) for name in rows[0] if name.startswith("exits_")]
    names = [f"{row['eps']:g}" for row in rows]
    below = [0.0] * len(rows)
    for place, layer in enumerate(layers):
        shares = [row[f"exits_{layer}"] / row["tokens"] for row in rows]
        whole = layer == layers[-1]
        ax.bar(
            names,
            shares,
            bottom=below,
            width=0.72,
            color=WHOLE if whole else COLOURS[place % len(COLOURS)],
            edgecolor="white",
            hatch="" if whole else ("//", "..", "xx", "\\\\", "++", "oo", "--")[place % 7],
            label="whole model" if whole else f"after layer {layer}",
        )
        below = [start + share for start, share in zip(below, shares, strict=True)]
    ax.set(xlabel="target accuracy ε", ylabel="emitted tokens", ylim=(0, 1))
    ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    ax.grid(visible=False)
    figure.legend(loc="outside upper center", ncols=3)


def _by_heads(figure: Figure, rows: Rows) -> None:
    """Fig. 5: risk against coverage by margin; a panel for each exit, a line for each head set."""
    _curves(figure, [row for row in rows if row["confidence"] == "margin"], "heads")


def _by_confidence(figure: Figure, rows: Rows) -> None:
    """Fig. 6: risk against coverage of the last head set; a panel for each exit, a line for each confidence."""
    name = rows[-1]["heads"]
    figure.suptitle(f"{name} heads", fontsize=12)
    _curves(figure, [row for row in rows if row["heads"] == name], "confidence")


def _curves(figure: Figure, rows: Rows, line: str) -> None:
    """Risk against coverage; a panel for each exit, a line for each of what the column ``line`` holds."""
    layers, lines = sorted(_distinct(rows, "layer")), _distinct(rows, line)
    height = -(-len(layers) // 2)
    figure.set_figheight(2.3 * height + 1.1)
    axes = figure.subplots(height, 2, sharex=True, sharey=True, squeeze=False)
    for ax, layer in zip(axes.flat, layers, strict=False):
        for place, name in enumerate(lines):
            found = [row for row in rows if row["layer"] == layer and row[line] == name]
            ax.plot(
                [row["coverage"] for row in found],
                [row["risk"] for row in found],
                color=COLOURS[place % len(COLOURS)],
                linestyle=DASHES[place % len(DASHES)],
                label=name,
            )
        ax.set_title(f"after layer {layer}", fontsize=12)
    for ax in axes.flat[len(layers) :]:
        ax.set_visible(False)
    for ax in axes[:, 0]:
        ax.set_ylabel("risk")
    for ax in axes[-1]:
        ax.set_xlabel("coverage")
    axes[0, 0].set(xlim=(0, 1), ylim=(0, None), xticks=(0, 0.5, 1))
    for axis in (axes[0, 0].xaxis, axes[0, 0].yaxis):
        axis.set_major_formatter(PercentFormatter(1, decimals=0))
    _legend_below(figure, 2)


def _legend_below(figure: Figure, columns: int) -> None:
    """Put one legend for all panels under them, in words each panel would repeat."""
    known: dict[str, Any] = {}
    for panel in figure.axes:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            known.setdefault(label, handle)
    figure.legend(known.values(), known.keys(), loc="outside lower center", ncols=columns)


def _look(place: int) -> dict[str, Any]:
    return {
        "color": COLOURS[place % len(COLOURS)],
        "marker": MARKERS[place % len(MARKERS)],
        "linestyle": DASHES[place % len(DASHES)],
    }


def _distinct(rows: Rows, name: str) -> list[Any]:
    return list(dict.fromkeys(row[name] for row in rows))


def _finite(value: float) -> float:
    return value if math.isfinite(value) else 0.0
