"""The report: one HTML page that needs nothing beside itself.

Needs jinja2 (``offramp[cli]``) and matplotlib (``offramp[plot]``).
"""

from __future__ import annotations

import base64
import math

from jinja2 import Environment, PackageLoader, StrictUndefined

from offramp.evaluation.decoded import Token
from offramp.evaluation.figures import draw_all, draw_sorting
from offramp.evaluation.findings import Findings
from offramp.evaluation.palette import COLOURS, backgrounds, marks
from offramp.evaluation.speed import OFF, PLAIN, exits_at


def render_report(found: Findings) -> str:
    """Lay findings out as one HTML page with its pictures, styles and script inside.

    Returns
    -------
    str
        The page; it loads nothing from anywhere.
    """
    calibration = found.calibration
    layers = list(calibration.layers)
    thresholds = dict(zip(layers, found.shown.thresholds if found.shown else (), strict=False))
    environment = Environment(
        loader=PackageLoader("offramp.evaluation", "."), autoescape=True, undefined=StrictUndefined
    )
    environment.filters |= {
        "percent": lambda value: f"{value:.1%}" if math.isfinite(value) else "–",
        "between": lambda bounds: f"{bounds[0]:.1%}–{bounds[1]:.1%}" if math.isfinite(bounds[0]) else "–",
        "rate": lambda bounds: f"{bounds[0]:.1f}–{bounds[1]:.1f}" if math.isfinite(bounds[0]) else "–",
        "number": lambda value: f"{value:.4f}" if math.isfinite(value) else "–",
        "threshold": lambda value: f"{value:.6f}" if math.isfinite(value) else "never exits",
        "classes": lambda token: _classes(token, layers),
        "about": lambda token: _about(token, thresholds),
        "data": lambda svg: "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode(),
    }
    return environment.get_template("report.html.j2").render(
        found=found,
        layers=layers,
        whole=calibration.num_layers,
        heads=list(
            zip(
                layers,
                calibration.thresholds,
                calibration.coverage,
                calibration.accuracy,
                calibration.cascade().guarantees,
                strict=True,
            )
        ),
        figures=draw_all(found),
        sorting=draw_sorting(found),
        lines=COLOURS,
        colours={
            dark: (backgrounds(len(layers), dark=dark), marks(len(layers), dark=dark))
            for dark in (False, True)
        },
        plain=PLAIN,
        off=OFF,
        exits_at=exits_at,
    )


def _classes(token: Token, layers: list[int]) -> str:
    names = [f"exit{layers.index(token.layer)}"] if token.layer in layers else []
    return " ".join([*names, *([] if token.agrees else ["differs"])])


def _about(token: Token, thresholds: dict[int, float]) -> str:
    """Say who emitted a token, and what every head and the whole model would have said there."""
    where = "whole model"
    if token.layer in thresholds and token.margin is not None:
        where = f"left after layer {token.layer}, margin {token.margin:.3f} ≥ {thresholds[token.layer]:.3f}"
    lines = [f"{_quoted(token.text)} · {where}"]
    if not token.agrees:
        lines.append(f"the full model would have written {_quoted(token.model_choice) or 'another token'}")
    said = [f"after {layer}: {_quoted(choice)} {margin:.3f}" for layer, choice, margin in token.heads]
    if said:
        lines.append(" · ".join([*said, f"whole model: {_quoted(token.model_choice)}"]))
    return "\n".join(lines)


def _quoted(text: str) -> str:
    return f"“{text.replace(chr(10), '↵')}”" if text else "(part of a character)"
