"""What three kinds of thresholds keep of their target on held-out text: marginal, sequential, certified.

    python benches/guarantees.py HEADS --output runs/guarantees

HEADS is a folder of calibrated heads.  Their calibration tokens give the thresholds; the whole model continues held-out
prompts, and every head is read on that text.  Writes guarantees.csv and guarantees.png.
"""

from __future__ import annotations

import argparse
import math
from functools import partial
from pathlib import Path
from statistics import median

from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from offramp import EarlyExitModel
from offramp.decision import decide
from offramp.evaluation.decoded import model_inputs
from offramp.evaluation.forced import read, sweep
from offramp.evaluation.palette import marks
from offramp.evaluation.tables import write_csv
from offramp.llm.planning import measure_costs
from offramp.llm.prompts import prompts as shipped_prompts

KINDS = ("marginal", "sequential", "certified")


def points(ee, reading, kind, eps, delta, costs):
    """What held-out text makes of one kind of thresholds."""
    mode, delta = ("sequential", delta) if kind == "certified" else (kind, None)
    return sweep(reading, ee.calibration, [eps], mode=mode, delta=delta, costs=costs)[0]


def measured(ee, texts, thresholds, tokens):
    """Seconds a token of each list of thresholds, in turns, the first turn to warm up; medians over the prompts."""
    taken = [[] for _ in thresholds]
    for turn, text in enumerate([texts[0], *texts]):
        inputs = model_inputs(ee, [text])
        for row, own in zip(taken, thresholds, strict=True):
            ee.generate(**inputs, thresholds=own, max_new_tokens=tokens, do_sample=False)
            if turn:
                row.append(ee.last_stats.seconds / ee.last_stats.tokens)
    return [median(row) for row in taken]


def rows_of(ee, reading, kind, point, seconds):
    """One row for every head and one for all together."""
    common = {
        "kind": kind,
        "eps": point.eps,
        "predicted_ms": 1e3 * point.predicted,
        "measured_ms": 1e3 * seconds,
    }
    total = sum(point.exits.values())
    columns = (ee.layers, point.thresholds, point.head_agreement, point.guarantees)
    rows = [
        {**common, "layer": layer, "threshold": tau, "takes": point.exits[layer] / total, "agrees": agrees}
        | {"guarantee": guarantee, "tokens": total}
        for layer, tau, agrees, guarantee in zip(*columns, strict=True)
    ]
    shares = point.shares
    low, high = shares.intervals["early_agreement"]
    together = {
        "takes": shares.early,
        "agrees": shares.early_agreement,
        "agrees_low": low,
        "agrees_high": high,
    }
    return [*rows, {**common, "layer": "all", **together, "mean_layers": shares.mean_layers, "tokens": total}]


def draw(rows, layers, file):
    """Agreement of every head on what it takes, against the target, a panel for each kind."""
    figure = Figure(figsize=(11.5, 3.6), layout="constrained")
    panels = figure.subplots(1, len(KINDS), sharey=True)
    for ax, kind in zip(panels, KINDS, strict=True):
        for layer, colour in zip([*layers, "all"], [*marks(len(layers), dark=False), "black"], strict=True):
            found = [row for row in rows if row["kind"] == kind and row["layer"] == layer]
            style = {"color": colour, "marker": "o", "markersize": 3}
            name = "all exits" if layer == "all" else f"after layer {layer}"
            ax.plot([row["eps"] for row in found], [row["agrees"] for row in found], label=name, **style)
        targets = sorted({row["eps"] for row in rows})
        ax.plot(targets, targets, color="grey", linestyle="--", label="target ε")
        ax.set_title(kind)
        ax.set_xlabel("ε")
        ax.yaxis.set_major_formatter(PercentFormatter(1))
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.2)
    panels[0].set_ylabel("agreement on held-out text")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", frameon=False)
    figure.savefig(file, dpi=130)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("heads", type=Path)
    parser.add_argument("--output", type=Path, default=Path("runs/guarantees"))
    parser.add_argument("--eps", type=float, nargs="+", default=[0.7, 0.8, 0.85, 0.9, 0.95])
    parser.add_argument("--delta", type=float, default=0.1)
    parser.add_argument("--calibrate", type=int, metavar="TOKENS", help="calibrate anew on so many tokens")
    parser.add_argument("--count", type=int, default=60, help="held-out prompts to read")
    parser.add_argument("--timed", type=int, default=5, help="how many of them to time; 0 for none")
    parser.add_argument("--time-at", type=float, default=0.9, help="the ε to time at")
    parser.add_argument("-n", "--max-new-tokens", type=int, default=64)
    options = parser.parse_args()
    ee = EarlyExitModel.from_pretrained(options.heads)
    if options.calibrate:
        ee.calibrate(0.9, tokens=options.calibrate, max_new_tokens=options.max_new_tokens)
    texts = shipped_prompts("held_out")[: options.count]
    written = ee.continue_greedily(texts, max_new_tokens=options.max_new_tokens)
    reading = read({"heads": ee}, written)["heads"]
    costs = measure_costs(ee.trunk, ee.heads_in_use, partial(decide, tau=0.5))
    found = {
        (kind, eps): points(ee, reading, kind, eps, options.delta, costs)
        for eps in options.eps
        for kind in KINDS
    }
    seconds = dict.fromkeys(KINDS, math.nan)
    off = math.nan
    if options.timed and options.time_at in options.eps:
        ways = [found[kind, options.time_at].thresholds for kind in KINDS] + [(math.inf,) * len(ee.layers)]
        *times, off = measured(ee, texts[: options.timed], ways, options.max_new_tokens)
        seconds = dict(zip(KINDS, times, strict=True))
    rows = []
    for (kind, eps), point in found.items():
        rows += rows_of(ee, reading, kind, point, seconds[kind] if eps == options.time_at else math.nan)
    options.output.mkdir(parents=True, exist_ok=True)
    write_csv(options.output / "guarantees.csv", rows)
    draw(rows, ee.layers, options.output / "guarantees.png")
    calibration = ee.calibration
    print(f"calibrated on {calibration.n} tokens of {calibration.sequences} sequences, {calibration.dtype}")
    print(f"read {rows[0]['tokens']} held-out tokens; exits off {1e3 * off:.1f} ms a token")
    for row in rows:
        print({key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()})


if __name__ == "__main__":
    main()
