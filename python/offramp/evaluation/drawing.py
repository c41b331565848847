"""The paper's figures, and those of an evaluation, from their rows of numbers, as PNG and SVG.

Needs matplotlib (``offramp[plot]``).  Lines look as `palette` says, so that few hues or a grey print can be read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from offramp.evaluation.palette import COLOURS, line
from offramp.llm.files import written_whole

WHOLE = "#9A9A9A"
"""Colour of the whole model, and of what stands behind lines."""

Rows = Sequence[Mapping[str, Any]]
Tables = Mapping[str, Rows]

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


@dataclass(frozen=True)
class Picture:
    """A figure: the tables it is drawn from, by whom, how high in inches, and what is said under it."""

    tables: tuple[str, ...]
    draw: Callable[..., None]
    height: float
    caption: str

    def drawn_from(self, tables: Tables, figure: Figure) -> None:
        """Draw into a figure."""
        self.draw(figure, *(tables[name] for name in self.tables))


def draw_figures(pictures: Mapping[str, Picture], tables: Tables, folder: Path) -> dict[str, Path]:
    """Draw every figure whose rows are there; returns its PNG by name.

    Parameters
    ----------
    pictures : mapping of str to Picture
        `PAPER` or `EVALUATION`.
    tables : mapping of str to rows
        From `offramp.evaluation.paper.make_figures`, or `Evaluation.tables`.
    folder : Path
        Where ``NAME.png`` and ``NAME.svg`` go.
    """
    drawn = {}
    for name, picture in pictures.items():
        if not all(tables.get(table) for table in picture.tables):
            continue
        with mpl.rc_context(_STYLE):
            figure = Figure(figsize=(_WIDTH, picture.height), layout="constrained")
            picture.drawn_from(tables, figure)
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
                ax.plot(steps, [row[value] for row in found], label=f"after layer {layer}", **line(place))
        panels[0].set_ylabel(name)
        panels[0].yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    for ax, title in zip(axes[0], ("agrees with the model", "entropy, nats"), strict=True):
        ax.set_title(title, fontsize=12)
    for ax in axes[-1]:
        ax.set_xlabel("training steps")
        ax.set_ylim(0, None)
    _legend_below(figure, 2)


def _score(figure: Figure, rows: Rows) -> None:
    """Fig. 2: a line for each benchmark with its standard errors, and at the right what the whole model scores."""
    ax = figure.subplots()
    tasks = _distinct(rows, "task")
    for place, task in enumerate(tasks):
        # One line a task: length-normalised accuracy where there is one, as the harness's leaderboards do.
        metrics = {row["metric"] for row in rows if row["task"] == task}
        metric = next((name for name in ("acc_norm", "acc", "exact_match") if name in metrics), min(metrics))
        found = [row for row in rows if row["task"] == task and row["metric"] == metric]
        look = line(place)
        # Side by side, so that the bars of one benchmark do not hide those of another, nor stray to the next ε.
        aside = min(0.006, 0.03 / len(tasks)) * (place - (len(tasks) - 1) / 2)
        for whole in (False, True):
            shown = [row for row in found if math.isfinite(row["eps"]) != whole]
            ax.errorbar(
                [(1.04 if whole else row["eps"]) + aside for row in shown],
                [row["score"] for row in shown],
                yerr=[_finite(row["standard_error"]) for row in shown],
                capsize=3,
                **look | ({"markerfacecolor": "none"} if whole else {"label": f"{task}, {metric}"}),
            )
        for row in found:
            if not math.isfinite(row["eps"]):
                ax.axhline(row["score"], color=look["color"], linewidth=0.8, linestyle=":", alpha=0.7)
    targets = sorted({row["eps"] for row in rows if math.isfinite(row["eps"])})
    ax.set_xticks([*targets, 1.04], [*(f"{eps:g}" for eps in targets), "off"])
    ax.set(xlabel="target accuracy ε (off: the whole model)", ylabel="score", ylim=(0, 1))
    ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    _legend_below(figure, 1)


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
        ax.errorbar(targets, values, yerr=errors, capsize=3, label=label, **line(place))
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


def _by_heads(figure: Figure, curves: Rows) -> None:
    """Fig. 5: risk against coverage by margin; a panel for each exit, a line for each head set."""
    rows = [row for row in curves if row["confidence"] == "margin"]
    lines, layers = _distinct(rows, "heads"), sorted(_distinct(rows, "layer"))
    panels = _panels(figure, [f"after layer {layer}" for layer in layers], "coverage", "risk")
    for ax, layer in zip(panels, layers, strict=True):
        for place, name in enumerate(lines):
            _risk(ax, [row for row in rows if row["layer"] == layer and row["heads"] == name], name, place)
    panels[0].set_ylim(0, _highest(rows))
    _legend_below(figure, 2)


def _by_confidence(figure: Figure, curves: Rows, confidence: Rows) -> None:
    """Fig. 6: risk against coverage of the last head set; a panel for each exit, a line for each confidence."""
    name = curves[-1]["heads"]
    figure.suptitle(f"{name} heads", fontsize=12)
    _by_head(figure, [row for row in curves if row["heads"] == name], confidence)


def _by_head(figure: Figure, curves: Rows, confidence: Rows) -> None:
    """Risk against coverage: a panel for each head, in it a line for each confidence with its AURC."""
    areas = {(*_head(row), row["confidence"]): row["aurc"] for row in confidence}
    heads, lines = list(dict.fromkeys(map(_head, curves))), _distinct(curves, "confidence")
    panels = _panels(figure, _titles(heads), "coverage", "risk")
    # Room for the legends above the curves.
    panels[0].set_ylim(0, min(1, 1.3 * _highest(curves)))
    for ax, head in zip(panels, heads, strict=True):
        for place, name in enumerate(lines):
            rows = [row for row in curves if _head(row) == head and row["confidence"] == name]
            _risk(ax, rows, f"{name} {areas[*head, name]:.3f}", place)
        ax.legend(title="AURC", loc="best", fontsize=10, title_fontsize=10, handlelength=3)


def _risk(ax: Any, rows: Rows, label: str, place: int) -> None:
    ax.plot(
        [row["coverage"] for row in rows],
        [row["risk"] for row in rows],
        label=label,
        # A few markers, at other places on every line.
        markevery=(0.05 + 0.04 * place, 0.3),
        **line(place),
    )


def _highest(curves: Rows) -> float:
    """Give the highest risk to show: that of the very first tokens is 0 or 1 by chance."""
    return 1.05 * max([row["risk"] for row in curves if row["coverage"] >= 0.05], default=1)


def _reliability(figure: Figure, reliability: Rows, confidence: Rows) -> None:
    """How often each head is right beside its largest probability, in bins, with its ECE; a panel for each."""
    eces = {_head(row): row["ece"] for row in confidence if row["confidence"] == "max_prob"}
    heads = list(dict.fromkeys(map(_head, reliability)))
    panels = _panels(figure, _titles(heads), "largest probability", "right")
    panels[0].set_ylim(0, 1)
    for ax, head in zip(panels, heads, strict=True):
        rows = [row for row in reliability if _head(row) == head]
        total = sum(row["tokens"] for row in rows)
        ax.bar(
            [row["bin_from"] for row in rows],
            [row["tokens"] / total for row in rows],
            width=[row["bin_to"] - row["bin_from"] for row in rows],
            align="edge",
            color=WHOLE,
            alpha=0.5,
            label="share of the tokens",
        )
        ax.plot([0, 1], [0, 1], color=WHOLE, linewidth=1, label="as often right as sure")
        held = [row for row in rows if row["tokens"]]
        ax.plot(
            [row["mean_max_prob"] for row in held],
            [row["accuracy"] for row in held],
            label="share that is right",
            **line(0),
        )
        ax.text(0.04, 0.94, f"ECE {eces[head]:.3f}", transform=ax.transAxes, va="top")
    _legend_below(figure, 2)


def _head(row: Mapping[str, Any]) -> tuple[str, int]:
    return row["heads"], row["layer"]


def _titles(heads: Sequence[tuple[str, int]]) -> list[str]:
    """Name heads by their layer and, where there are several head sets, by the end of the set's name."""
    several = len({name for name, _ in heads}) > 1
    return [f"{name[-28:]}\n" * several + f"after layer {layer}" for name, layer in heads]


def _panels(figure: Figure, titles: Sequence[str], across: str, up: str) -> list[Any]:
    """Give axes of shares for each title, two in a row where there is room, and the figure the height they need."""
    width = figure.get_figwidth()
    columns = 2 if width >= _WIDTH else 1
    rows = -(-len(titles) // columns)
    figure.set_figheight(width * ((0.36 if columns == 2 else 0.5) * rows + 0.17))
    axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flat
    for ax in axes[len(titles) :]:
        ax.remove()
    shown = list(axes[: len(titles)])
    for place, (ax, title) in enumerate(zip(shown, titles, strict=True)):
        ax.set_title(title, fontsize=12)
        ax.grid(visible=True)
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_major_formatter(PercentFormatter(1, decimals=0))
        left, lowest = place % columns == 0, place + columns >= len(shown)
        ax.tick_params(labelleft=left, labelbottom=lowest)
        ax.set(xlim=(0, 1), xticks=(0, 0.5, 1), ylabel=up if left else "", xlabel=across if lowest else "")
    return shown


def _legend_below(figure: Figure, columns: int) -> None:
    """Put one legend for all panels under them, in words each panel would repeat."""
    known: dict[str, Any] = {}
    for panel in figure.axes:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            known.setdefault(label, handle)
    figure.legend(known.values(), known.keys(), loc="outside lower center", ncols=columns)


def _distinct(rows: Rows, name: str) -> list[Any]:
    return list(dict.fromkeys(row[name] for row in rows))


def _finite(value: float) -> float:
    return value if math.isfinite(value) else 0.0


PAPER = {
    "fig1-training": Picture(
        ("training",),
        _training,
        8.6,
        "Fig. 1: agreement with the model and entropy during training, on tokens held back from it.",
    ),
    "fig2-score": Picture(
        ("score",),
        _score,
        4.8,
        "Fig. 2: benchmark score against the target accuracy ε; bars are standard errors.",
    ),
    "fig3-speed": Picture(
        ("speed",),
        _speed,
        4.4,
        "Fig. 3: measured speed-up against ε, batch 1; bars are 95% intervals over the prompts.",
    ),
    "fig4-exits": Picture(
        ("exits",), _exits, 4.4, "Fig. 4: the layer each emitted token left after, against ε."
    ),
    "fig5-risk-coverage": Picture(
        ("curves",),
        _by_heads,
        5.6,
        "Fig. 5: risk, the share of accepted tokens that are wrong, against coverage, by margin.",
    ),
    "fig6-confidence": Picture(
        ("curves", "confidence"), _by_confidence, 5.6, "Fig. 6: the same of one head set, by each confidence."
    ),
}
"""The figures of ``offramp figures``."""

EVALUATION = {
    "risk-coverage": Picture(
        ("curves", "confidence"),
        _by_head,
        5.6,
        "Risk, the share of accepted tokens that are wrong, against the share accepted, surest first, by each "
        "confidence. AURC is the mean risk: smaller is better.",
    ),
    "reliability": Picture(
        ("reliability", "confidence"),
        _reliability,
        5.6,
        "How often each head is the full model's, beside its largest probability, in 15 bins; bars are their share "
        "of the tokens. ECE is the mean distance to the diagonal, by tokens.",
    ),
}
"""The figures of ``offramp evaluate``."""
