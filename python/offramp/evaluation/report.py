"""The demo's report: one HTML page that needs nothing beside itself.

Needs jinja2 (``offramp[cli]``) and matplotlib (``offramp[plot]``).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from jinja2 import Environment, PackageLoader, StrictUndefined

from offramp.evaluation.decoded import Token
from offramp.evaluation.figures import draw_all
from offramp.evaluation.palette import backgrounds, marks
from offramp.evaluation.speed import OFF, PLAIN, exits_at

if TYPE_CHECKING:
    from offramp.evaluation.demo import DemoResult


def render_report(result: DemoResult) -> str:
    """Lay a demo's result out as one HTML page with its pictures, styles and script inside.

    Parameters
    ----------
    result : DemoResult
        What `offramp.evaluation.demo.run_demo` found.

    Returns
    -------
    str
        The page; it loads nothing from anywhere.
    """
    calibration = result.calibration
    layers = list(calibration.layers)
    environment = Environment(
        loader=PackageLoader("offramp.evaluation", "."), autoescape=True, undefined=StrictUndefined
    )
    environment.filters |= {
        "percent": lambda value: f"{value:.1%}" if math.isfinite(value) else "–",
        "threshold": lambda value: f"{value:.6f}" if math.isfinite(value) else "never exits",
        "classes": lambda token: _classes(token, layers),
        "about": lambda token: _about(token, dict(zip(layers, result.shown.thresholds, strict=True))),
    }
    return environment.get_template("report.html.j2").render(
        result=result,
        shown=result.shown,
        layers=layers,
        whole=calibration.num_layers,
        heads=list(
            zip(layers, calibration.thresholds, calibration.coverage, calibration.accuracy, strict=True)
        ),
        speed_prompts=len(result.speed.tokens_per_second[PLAIN]),
        figures=draw_all(result),
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
    text = token.text.replace("\n", "↵") or "(part of a character)"
    where = "whole model"
    if token.layer in thresholds and token.margin is not None:
        where = f"left after layer {token.layer}, margin {token.margin:.3f} ≥ {thresholds[token.layer]:.3f}"
    return f"“{text}” · {where}" + (
        "" if token.agrees else " · the full model would have written another token"
    )
