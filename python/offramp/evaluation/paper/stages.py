"""The stages of the paper's figures: each leaves its numbers as CSV, and pictures are drawn from those.

A stage whose numbers are there, from the same settings, is not run again, so that one command goes on where it was
stopped.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import offramp
from offramp import machine
from offramp.evaluation.decoded import Decoded, decode_prompts
from offramp.evaluation.evaluate import (
    Progress,
    Rows,
    Say,
    calibration_of,
    confidence_rows,
    curve_rows,
    decoded_row,
    forced_row,
    name_of,
    speed_rows,
)
from offramp.evaluation.findings import Findings
from offramp.evaluation.forced import CONFIDENCES, Reading, read, sweep
from offramp.evaluation.memory import BUDGET, Remembered
from offramp.evaluation.metrics import areas
from offramp.evaluation.paper.comparing import difference_rows, tie_rows
from offramp.evaluation.paper.config import PaperConfig
from offramp.evaluation.paper.heads import SETTINGS, HeadSets, describe_heads
from offramp.evaluation.speed import exits_at, measure_speed
from offramp.evaluation.tables import read_csv, write_csv
from offramp.llm.files import read_json, write_json
from offramp.llm.model import EarlyExitModel
from offramp.llm.prompts import prompts

GIVEN = "given"
"""Name of the user's own heads among the head sets."""

_COMPARED = (
    ("copied λ=0.95", "copied λ=0"),
    ("scratch λ=0.95", "scratch λ=0.1"),
    ("copied λ=0.95", "scratch λ=0.95"),
)
_RECORD = "stages.json"
_DECODED = "decoded.json"


@dataclass
class Work:
    """What the stages share."""

    folder: Path
    config: PaperConfig
    sets: HeadSets
    given: EarlyExitModel | None
    say: Say
    progress: Progress | None

    @cached_property
    def tasks(self) -> Any:
        """The benchmarks with their data, as `task_scores` takes them."""
        from offramp.evaluation.harness import find_tasks  # noqa: PLC0415 - an extra

        return find_tasks(self.config.tasks)

    @cached_property
    def all_sets(self) -> dict[str, EarlyExitModel]:
        """The linear head sets, and the user's."""
        return {**self.sets, **({GIVEN: self.given} if self.given is not None else {})}

    @cached_property
    def main(self) -> EarlyExitModel:
        """Heads of Figs. 2 to 4: the user's, or the linear ones whose margin sorts best on the calibration text."""
        if self.given is not None:
            return self.given
        return min(self.sets.values(), key=_area)

    @cached_property
    def readings(self) -> dict[str, Reading]:
        """What every head set says on the full model's continuations of the held-out prompts."""
        sets = self.all_sets
        self.say("Reading held-out text with every head")
        text = next(iter(sets.values())).continue_greedily(
            self.held_out, max_new_tokens=2 * self.config.max_new_tokens, progress=self.progress
        )
        return read(sets, text, progress=self.progress)

    @property
    def held_out(self) -> list[str]:
        """The prompts everything is measured on."""
        return prompts("held_out")[: self.config.prompts]

    def tell(self, stage: str, done: int, total: int) -> None:
        """Call ``progress``, if there is one."""
        if self.progress is not None:
            self.progress(stage, done, total)


def _area(ee: EarlyExitModel) -> float:
    measured = calibration_of("heads", ee).measured
    return sum(areas(*pair).aurc for pair in zip(measured.scores, measured.correct, strict=True))


def training(work: Work) -> Rows:
    """Fig. 1: accuracy and entropy during training, of every head set."""
    return work.sets.training_rows()


def confidence(work: Work) -> Rows:
    """AURC of every head set, head and confidence on held-out text, with intervals."""
    return [
        row
        for name, reading in work.readings.items()
        for row in confidence_rows(name, reading, seed=work.config.seed)
    ]


def differences(work: Work) -> Rows:
    """Paired differences on the same tokens: between λ, between starts, between confidences."""
    pairs = [((one, "margin"), (other, "margin")) for one, other in _COMPARED]
    pairs += [((name, "margin"), (name, other)) for name in work.readings for other in CONFIDENCES[1:]]
    return difference_rows(work.readings, pairs, seed=work.config.seed)


def curves(work: Work) -> Rows:
    """Fig. 5: risk against coverage."""
    return [row for name, reading in work.readings.items() for row in curve_rows(name, reading)]


def forced(work: Work) -> Rows:
    """Whether held-out text reaches ε, with the paper's thresholds and with those of the tokens left over."""
    rows: Rows = []
    for name, reading in work.readings.items():
        calibration = calibration_of(name, work.all_sets[name])
        for mode in ("marginal", "sequential"):
            points = sweep(reading, calibration, work.config.grid, mode=mode, seed=work.config.seed)
            rows += [{"mode": mode, **forced_row(name, point)} for point in points]
    return rows


def ties(work: Work) -> Rows:
    """Both rules for ties on the calibration text."""
    rows: Rows = []
    for name, ee in work.all_sets.items():
        rows += tie_rows(name, ee.layers, calibration_of(name, ee).measured, work.config.grid)
    return rows


def exits(work: Work) -> Rows:
    """Fig. 4: where tokens leave, decoded and checked against the full model."""
    ee, config = work.main, work.config
    work.say(f"Decoding held-out prompts with exits ({describe_heads(ee)}) and checking every token")
    decoded = []
    for number, eps in enumerate(config.grid):
        found = decode_prompts(ee, work.held_out, eps=eps, max_new_tokens=config.max_new_tokens)
        decoded.append(replace(found, seed=config.seed))
        work.tell("decoding", number + 1, len(config.grid))
    write_json(work.folder / _DECODED, {"decoded": [item.to_dict() for item in decoded]})
    return [{"heads": describe_heads(ee), **decoded_row(item)} for item in decoded]


def score(work: Work) -> Rows:
    """Fig. 2: benchmark scores; one pass over the layers serves every ε, as far as its states fit the budget."""
    from offramp.evaluation.harness import OfframpLM, task_scores  # noqa: PLC0415 - an extra

    config, heads = work.config, describe_heads(work.main)
    remembered = Remembered(BUDGET)
    model = OfframpLM(work.main, mode="off", batch_size=8, remember=remembered)
    settings: list[dict[str, Any]] = [{"mode": "off"}, *({"eps": eps} for eps in config.grid)]
    rows: Rows = []
    for number, setting in enumerate(settings):
        model.use(**setting)
        # The harness's bars and notes would come anew for every ε; what goes wrong is raised.
        with contextlib.redirect_stderr(io.StringIO()):
            scores = list(task_scores(model, work.tasks, limit=config.documents))
        if remembered.full and not number:
            work.say(
                f"The benchmarks' hidden states take more than {BUDGET / 2**30:.1f} GiB: "
                "the rest are computed anew at every ε, which takes longer"
            )
        for task, metric, value, error in scores:
            found = {"eps": setting.get("eps", math.nan), "score": value, "standard_error": error}
            rows.append({"heads": heads, "task": task, "metric": metric, **found})
        work.tell("scoring", number + 1, len(settings))
    return rows


def speed(work: Work) -> Rows:
    """Fig. 3: tokens a second, beside plain transformers and beside exits off."""
    config, heads = work.config, describe_heads(work.main)
    work.say("Timing one prompt at a time, in alternation with plain transformers")
    found = measure_speed(
        work.main,
        work.held_out[: config.timed],
        eps=config.grid,
        max_new_tokens=config.max_new_tokens,
        progress=work.progress,
    )
    found = replace(found, seed=config.seed)
    targets = {exits_at(eps): eps for eps in config.grid}
    return [
        {"heads": heads, "eps": targets.get(row["contender"], math.nan), **row} for row in speed_rows(found)
    ]


_READ = (*SETTINGS, "prompts", "max_new_tokens")

STAGES: dict[str, tuple[Callable[[Work], Rows], tuple[str, ...]]] = {
    "training": (training, SETTINGS),
    "confidence": (confidence, _READ),
    "differences": (differences, _READ),
    "curves": (curves, _READ),
    "forced": (forced, (*_READ, "grid")),
    "ties": (ties, (*SETTINGS, "grid")),
    "exits": (exits, (*_READ, "grid")),
    "score": (score, (*SETTINGS, "grid", "tasks", "documents")),
    "speed": (speed, (*_READ, "grid", "timed")),
}
"""Every stage, and the settings its numbers depend on."""


def make_figures(
    model: Any,
    tokenizer: Any,
    folder: Path,
    config: PaperConfig,
    *,
    heads: EarlyExitModel | None = None,
    say: Say = lambda _: None,
    progress: Progress | None = None,
) -> tuple[dict[str, Rows], Findings]:
    """Measure what the paper's figures show, or what of it is still missing in ``folder``.

    Parameters
    ----------
    model, tokenizer
        From `offramp.load_model`.
    folder : Path
        Where numbers, heads and training tokens are kept.
    config : PaperConfig
        What to measure.
    heads : EarlyExitModel, optional
        Calibrated heads on the same model for Figs. 2 to 4; default: of the four linear head sets the one whose margin
        sorts best on the calibration text.
    say, progress : callable
        Told in a sentence what comes next; called as ``progress(stage, done, total)``.

    Returns
    -------
    tables : dict of str to list of dict
        The rows of every CSV file, by its name.
    findings : Findings
        What a report is made of.

    Raises
    ------
    InputError
        For settings nothing can be measured with; before anything is run.
    """
    config = config.on(model)
    if heads is not None:
        calibration_of("heads", heads)
    work = Work(
        folder, config, HeadSets(model, tokenizer, folder, config, say, progress), heads, say, progress
    )
    if config.tasks:
        # What is wrong with them is said before an hour of work rather than after it.
        _ = work.tasks
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "settings.json", asdict(config))
    wanted = [stage for stage in STAGES if stage != "score" or config.tasks]
    tables = {stage: _rows(work, stage) for stage in wanted}
    return tables, _findings(work, tables)


def _rows(work: Work, stage: str) -> Rows:
    """Read a stage's numbers, measuring them first where they are missing or of other settings."""
    measure, settings = STAGES[stage]
    path = work.folder / f"{stage}.csv"
    done = _record(work)
    identity = _identity(work, stage, settings)
    if path.exists() and done.get(stage, {}).get("identity") == identity:
        work.say(f"Using {path}")
    else:
        start = time.monotonic()
        if done.pop(stage, None):
            # What is written next may stop half-way, and must not pass for what the record says is there.
            write_json(work.folder / _RECORD, done)
        write_csv(path, measure(work))
        done[stage] = {
            "identity": identity,
            "seconds": round(time.monotonic() - start, 1),
            "machine": machine.describe(),
        }
        write_json(work.folder / _RECORD, done)
    return read_csv(path)


def _record(work: Work) -> dict[str, Any]:
    """Read what is known of the stages that were measured: identity, seconds, machine."""
    record = work.folder / _RECORD
    return read_json(record) if record.exists() else {}


def _machines(stages: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Say what the stages were measured on; where they differ, which on what."""
    machines = {stage: done.get("machine", {}) for stage, done in stages.items()}
    found = {}
    for name in dict.fromkeys(name for described in machines.values() for name in described):
        places: dict[str, list[str]] = {}
        for stage, described in machines.items():
            places.setdefault(described.get(name, "not recorded"), []).append(stage)
        found[name] = "; ".join(
            value if len(places) == 1 else f"{value} ({', '.join(there)})" for value, there in places.items()
        )
    return found


def _identity(work: Work, stage: str, settings: tuple[str, ...]) -> str:
    """Digest of all that decides a stage's numbers."""
    config = {name: getattr(work.config, name) for name in settings}
    given = None if work.given is None else calibration_of(GIVEN, work.given).to_dict()
    if stage == "training":
        given = None
    known = [offramp.__version__, stage, config, work.sets.identity, given]
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()


def _findings(work: Work, tables: Mapping[str, Rows]) -> Findings:
    config, ee = work.config, work.main
    calibration = calibration_of("heads", ee)
    decoded = tuple(Decoded.from_dict(item) for item in read_json(work.folder / _DECODED)["decoded"])
    return Findings(
        name_of(ee.model),
        calibration,
        decoded,
        min(decoded, key=lambda item: abs(item.eps - calibration.eps)),
        sorting={"confidence": tables["confidence"]},
        facts={
            "heads of Figs. 2 to 4 and of the text": describe_heads(ee),
            "linear heads": f"trained {config.epochs} times on {config.tokens:,} tokens, seed {config.seed}",
            "decoding": f"greedy, {config.prompts} prompts, at most {config.max_new_tokens} tokens each",
        },
        machine=_machines({stage: done for stage, done in _record(work).items() if stage in tables}),
    )
