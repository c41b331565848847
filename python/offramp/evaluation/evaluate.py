"""What exits cost and gain on a user's own prompts: one teacher-forced pass for any ε, and decoding for some.

For ``offramp evaluate``; `Evaluation.tables` lays everything out in rows, which go to JSON and CSV as they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from offramp import machine
from offramp.calibration import threshold_curve
from offramp.decision import decide
from offramp.errors import InputError
from offramp.evaluation.decoded import Decoded, decode_prompts, model_inputs
from offramp.evaluation.findings import Findings
from offramp.evaluation.forced import CONFIDENCES, Point, Reading, read, sweep
from offramp.evaluation.metrics import BINS
from offramp.evaluation.shares import NAMES
from offramp.evaluation.speed import OFF, PLAIN, Speed, measure_speed
from offramp.llm.calibrating import Calibration, check_eps
from offramp.llm.loading import DEMO_MODEL
from offramp.llm.model import EarlyExitModel
from offramp.llm.planning import measure_costs
from offramp.llm.sequences import check_length

Say = Callable[[str], None]
Progress = Callable[[str, int, int], None]
Rows = list[dict[str, Any]]

_POINTS = 200

GRID = (0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.925, 0.95, 0.97, 0.98, 0.99)


@dataclass(frozen=True)
class Evaluation:
    """What was found.

    Attributes
    ----------
    model : str
        The base model.
    calibrations : dict of str to Calibration
        Of each head set, by its name.
    readings : dict of str to Reading
        What every head set says on the full model's own continuations of the prompts.
    forced : dict of str to list of Point
        The grid of ε on that text.
    decoded : tuple of Decoded
        The prompts decoded with the first head set, at some ε.
    speed : Speed or None
        Tokens a second with the first head set.
    seed : int
        Seed of the intervals' bootstrap.
    machine : dict of str to str
        What it ran on.
    """

    model: str
    calibrations: dict[str, Calibration]
    readings: dict[str, Reading]
    forced: dict[str, list[Point]]
    decoded: tuple[Decoded, ...]
    speed: Speed | None
    seed: int = 0
    machine: dict[str, str] = field(default_factory=machine.describe)

    def tables(self) -> dict[str, Rows]:
        """Everything in numbers, as rows of plain values by the name of their table."""
        names = ("forced", "thresholds", "confidence", "curves", "reliability")
        tables: dict[str, Rows] = {name: [] for name in names}
        for name, reading in self.readings.items():
            tables["forced"] += [forced_row(name, point) for point in self.forced[name]]
            for point in self.forced[name]:
                tables["thresholds"] += threshold_rows(name, point)
            tables["confidence"] += confidence_rows(name, reading, seed=self.seed)
            tables["curves"] += curve_rows(name, reading)
            tables["reliability"] += reliability_rows(name, reading)
        tables["decoded"] = [decoded_row(item) for item in self.decoded]
        tables["speed"] = speed_rows(self.speed) if self.speed is not None else []
        return tables

    def findings(self, facts: Mapping[str, str] | None = None) -> Findings:
        """Give what a report is made of, with the text of the ε nearest to the first head set's own."""
        name, calibration = next(iter(self.calibrations.items()))
        tables = self.tables()
        shown = min(self.decoded, key=lambda item: abs(item.eps - calibration.eps), default=None)
        return Findings(
            self.model,
            calibration,
            self.decoded,
            shown,
            self.speed,
            self.forced[name],
            {name: tables[name] for name in ("confidence", "curves", "reliability")},
            facts=facts or {},
            machine=self.machine,
        )


def evaluate(
    exits: Mapping[str, EarlyExitModel],
    prompts: Sequence[str],
    *,
    grid: Sequence[float] = GRID,
    eps: Sequence[float] = (0.8, 0.9, 0.95),
    max_new_tokens: int = 48,
    timed: int = 5,
    seed: int = 0,
    say: Say = lambda _: None,
    progress: Progress | None = None,
) -> Evaluation:
    """Measure head sets on prompts.

    Parameters
    ----------
    exits : mapping of str to EarlyExitModel
        Calibrated head sets by name, all on one loaded model.  All are read in the teacher-forced pass; only the
        first decodes.
    prompts : sequence of str
        Texts, handed to the model through its chat template where it has one.
    grid : sequence of float
        Targets for the teacher-forced pass, in (0, 1).
    eps : sequence of float
        Targets to decode at; none for no decoding.
    max_new_tokens : int
        Tokens to generate for each prompt at most.
    timed : int
        How many prompts to decode one at a time against the clock.
    seed : int
        Seed of the intervals' bootstrap.
    say, progress : callable
        Told in a sentence what comes next; called as ``progress(stage, done, total)``.

    Raises
    ------
    InputError
        For targets outside (0, 1), or head sets that are not trained and calibrated on one model.
    """
    first = next(iter(exits.values()))
    for target in (*grid, *eps):
        check_eps(target)
    calibrations = {name: calibration_of(name, ee) for name, ee in exits.items()}
    longest = model_inputs(first, prompts)["input_ids"].shape[1]
    check_length(
        longest + max_new_tokens, first.trunk.max_positions, "the longest prompt with its continuation"
    )
    say(f"Continuing {len(prompts)} prompts with the whole model, and reading that text with every head")
    text = first.continue_greedily(prompts, max_new_tokens=max_new_tokens, progress=progress)
    readings = read(exits, text, progress=progress)
    say("Timing the parts of a decoding step")
    forced = {}
    for name, ee in exits.items():
        costs = measure_costs(ee.trunk, ee.heads_in_use, lambda logits: decide(logits, 0.5))
        forced[name] = sweep(readings[name], calibrations[name], grid, costs=costs, seed=seed)
    decoded: list[Decoded] = []
    if eps:
        say("Decoding the prompts with exits, and checking every token against the full model")
    for number, target in enumerate(eps):
        found = decode_prompts(first, prompts, eps=target, max_new_tokens=max_new_tokens)
        decoded.append(replace(found, seed=seed))
        if progress is not None:
            progress("decoding", number + 1, len(eps))
    speed = None
    if timed and eps:
        say("Timing one prompt at a time, in alternation with plain transformers")
        speed = measure_speed(
            first, prompts[:timed], eps=eps, max_new_tokens=max_new_tokens, progress=progress
        )
        speed = replace(speed, seed=seed)
    return Evaluation(name_of(first.model), calibrations, readings, forced, tuple(decoded), speed, seed)


def calibration_of(name: str, ee: EarlyExitModel) -> Calibration:
    """Return the calibration of a head set, or say that there is none.

    Raises
    ------
    InputError
        If there is none.
    """
    if ee.calibration is None:
        raise InputError(f"{name} is not calibrated: run `offramp calibrate {name}`, or call calibrate")
    return ee.calibration


def name_of(model: Any) -> str:
    """Name a base model as a reader knows it."""
    name = str(model.config.name_or_path or "model")
    return DEMO_MODEL if name == "demo" else Path(name).name


def forced_row(name: str, point: Point) -> dict[str, Any]:
    """Shares, exits, thresholds and agreement of every head at one ε, with intervals."""
    row: dict[str, Any] = {"heads": name, "eps": point.eps, "tokens": sum(point.exits.values())}
    for share in NAMES:
        row[share] = getattr(point.shares, share)
        row[f"{share}_low"], row[f"{share}_high"] = point.shares.intervals[share]
    row["predicted_ms"] = 1e3 * point.predicted
    for layer, count in point.exits.items():
        row[f"exits_{layer}"] = count
    for layer, tau, agreement in zip(point.exits, point.thresholds, point.head_agreement, strict=False):
        row[f"threshold_{layer}"], row[f"agreement_{layer}"] = tau, agreement
    return row


def threshold_rows(name: str, point: Point) -> Rows:
    """Every head's threshold at one ε, what it takes of the text and how often it is right, and what is promised."""
    tokens = sum(point.exits.values())
    columns = (point.exits, point.thresholds, point.head_agreement, point.guarantees)
    return [
        {
            "heads": name,
            "eps": point.eps,
            "layer": layer,
            "threshold": tau,
            "takes": point.exits[layer] / tokens,
            "agreement": agreement,
            "guarantee": guarantee,
        }
        for layer, tau, agreement, guarantee in zip(*columns, strict=False)
    ]


def confidence_rows(name: str, reading: Reading, *, seed: int = 0) -> Rows:
    """Areas under the risk-coverage curve of every head and confidence, and the calibration error."""
    eces = [item.ece for item in reading.reliability()]
    rows = []
    for confidence in CONFIDENCES:
        bounds = reading.area_intervals(confidence, seed=seed)
        for index, found in enumerate(reading.areas(confidence)):
            rows.append(
                {
                    "heads": name,
                    "layer": reading.layers[index],
                    "confidence": confidence,
                    "accuracy": float(reading.correct[index].mean()),
                    "aurc": found.aurc,
                    "aurc_low": float(bounds[index, 0]),
                    "aurc_high": float(bounds[index, 1]),
                    "e_aurc": found.e_aurc,
                    "augrc": found.augrc,
                    # Only a probability can be compared with how often it is right.
                    "ece": eces[index] if confidence == "max_prob" else math.nan,
                }
            )
    return rows


def reliability_rows(name: str, reading: Reading) -> Rows:
    """How often every head is right beside its largest probability, in bins."""
    return [
        {
            "heads": name,
            "layer": layer,
            "bin_from": place / BINS,
            "bin_to": (place + 1) / BINS,
            "tokens": int(found.count[place]),
            "mean_max_prob": float(found.confidence[place]),
            "accuracy": float(found.accuracy[place]),
        }
        for layer, found in zip(reading.layers, reading.reliability(), strict=True)
        for place in range(BINS)
    ]


def curve_rows(name: str, reading: Reading) -> Rows:
    """Risk against coverage of every head and confidence, thinned to at most 200 points a curve."""
    rows: Rows = []
    for index, layer in enumerate(reading.layers):
        for confidence in CONFIDENCES:
            curve = threshold_curve(reading.confidence[confidence][index], reading.correct[index])
            kept = np.unique(np.linspace(0, len(curve) - 1, _POINTS).round().astype(int))
            points = zip(curve.coverage[kept].tolist(), (1 - curve.accuracy[kept]).tolist(), strict=True)
            rows += [
                {"heads": name, "layer": layer, "confidence": confidence, "coverage": coverage, "risk": risk}
                for coverage, risk in points
            ]
    return rows


def decoded_row(item: Decoded) -> dict[str, Any]:
    """Shares and exits of decoded text, with intervals."""
    row: dict[str, Any] = {"eps": item.eps, "tokens": item.tokens, "prompts": len(item.passages)}
    for share in NAMES:
        row[share] = getattr(item, share)
        row[f"{share}_low"], row[f"{share}_high"] = item.intervals[share]
    for layer, count in item.exits.items():
        row[f"exits_{layer}"] = count
    return row


def speed_rows(speed: Speed) -> Rows:
    """Tokens a second of every contender, and its ratios to plain transformers and to exits off, with intervals."""
    rows = []
    for name, values in speed.tokens_per_second.items():
        row: dict[str, Any] = {"contender": name, "tokens_per_second": speed.median(name)}
        row["tokens_per_second_low"], row["tokens_per_second_high"] = speed.interval(name)
        for column, other in (("ratio", PLAIN), ("ratio_off", OFF)):
            row[column] = speed.ratio(name, other)
            row[f"{column}_low"], row[f"{column}_high"] = speed.ratio_interval(name, other)
        rows.append({**row, "prompts": len(values), "same_tokens": speed.same_tokens})
    return rows
