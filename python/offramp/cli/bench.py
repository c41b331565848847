"""``offramp bench``: the core beside its peers on this machine."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from math import nan
from pathlib import Path
from typing import Any

import click
from rich.table import Table

from offramp import machine
from offramp.cli.session import Session, with_session
from offramp.evaluation import calibration_speed
from offramp.evaluation.peers.decision import (
    DTYPES,
    OURS,
    READ,
    VOCABULARIES,
    as_held,
    check,
    contenders,
    like_a_model,
)
from offramp.evaluation.tables import write_csv
from offramp.evaluation.timing import in_turn

_EPS = 0.9


@click.command()
@click.argument("what", type=click.Choice(["all", "calibrate", "decide"]), default="all")
@click.option(
    "--samples",
    type=click.IntRange(1),
    default=1_000_000,
    show_default=True,
    help="Scores to calibrate on, at most.",
)
@click.option(
    "--vocabulary",
    type=click.IntRange(2),
    help="Logits in a row; default: those of five families of models, 32,000 to 256,000.",
)
@click.option(
    "--rounds", type=click.IntRange(1), default=15, show_default=True, help="Timed runs of each contender."
)
@click.option(
    "--plot",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Draw seconds against the number of scores into this picture (png, svg, pdf).",
)
@click.option(
    "--patience",
    type=click.FloatRange(0),
    default=4.0,
    show_default=True,
    help="Seconds one run of a peer may take; at sizes where it is likely to take more it is left out.",
)
@click.option(
    "--csv",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write the seconds, the times of ours and of one read into this file.",
)
@with_session
def bench(
    session: Session,
    what: str,
    samples: int,
    vocabulary: int | None,
    rounds: int,
    plot: Path | None,
    patience: float,
    csv: Path | None,
) -> None:
    """Time the core beside its peers, all in turn.

    Threshold search on 1000, 10,000, ... scores up to --samples, as far as memory goes, and exit decision in every
    dtype.
    """
    results: dict[str, Any] = {}
    if what in ("all", "calibrate"):
        results["calibrate"] = _calibrate(session, samples, rounds, plot, patience)
    if what in ("all", "decide"):
        results["decide"] = _decisions(session, vocabulary, rounds)
    if csv is not None:
        write_csv(csv, list(_rows(results)))
        session.say(f"wrote {csv}")
    session.show(", ".join(f"{name} {value}" for name, value in machine.describe().items()))
    session.result(
        {
            "seconds": results,
            "samples": samples,
            "vocabulary": vocabulary,
            "rounds": rounds,
            "machine": machine.describe(),
        }
    )


def _rows(results: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Lay results out as rows: what was timed, on what, by whom."""
    calibrate = results.get("calibrate", {})
    tables = {
        "size": calibrate.get("by_size", {}),
        "heads and targets": {"all": calibrate["heads_and_targets"]} if calibrate else {},
        "kind": {kind: {OURS: seconds} for kind, seconds in calibrate.get("kinds", {}).items()},
        "decision": results.get("decide", {}),
    }
    for table, rows in tables.items():
        for row, seconds in rows.items():
            read = seconds.get(READ, seconds.get(calibration_speed.READ, nan))
            for name, value in seconds.items():
                yield {
                    "table": table,
                    "row": row,
                    "contender": name,
                    "microseconds": 1e6 * value,
                    "times_ours": value / seconds[OURS],
                    "reads": value / read,
                }


def _calibrate(
    session: Session, samples: int, rounds: int, plot: Path | None, patience: float
) -> dict[str, Any]:
    """Time thresholds: by size with the peers, for heads and targets, and for kinds of scores."""
    options: dict[str, Any] = {"rounds": rounds, "threads": session.threads, "seed": session.seed}
    sizes = [size for size in (10**power for power in range(3, 12)) if size < samples] + [samples]
    rows = []
    for row in calibration_speed.by_size(sizes, eps=_EPS, patience=patience, **options):
        session.say(f"timed {row[0]:,} scores: {', '.join(row[1])}")
        rows.append(row)
    for size, seconds in rows:
        session.show(_table(f"threshold for ε = {_EPS} from {size:,} scores", seconds))
    if plot is not None:
        calibration_speed.draw(rows, plot)
        session.say(f"wrote {plot}")
    few = min(samples, 1_000_000)
    session.say("timing heads and targets, kinds of scores")
    pairs, (heads, targets) = calibration_speed.heads_and_targets(few, **options)
    session.show(_table(f"{heads} heads, {targets} targets, {few:,} scores a head", pairs))
    kinds = calibration_speed.by_kind(few, eps=_EPS, **options)
    session.show(_table(f"offramp on {few:,} scores of each kind", kinds))
    return {
        "by_size": {str(size): seconds for size, seconds in rows},
        "heads_and_targets": pairs,
        "kinds": kinds,
    }


def _decisions(session: Session, vocabulary: int | None, rounds: int) -> dict[str, dict[str, float]]:
    """Time the decision on rows of every size and dtype; seconds by contender."""
    dtypes: tuple[str, ...] = DTYPES[:1]
    if find_spec("torch") is not None:
        import torch  # noqa: PLC0415 - an optional dependency

        dtypes = DTYPES
        torch.set_num_threads(session.threads or min(2, torch.get_num_threads()))
    seconds = {}
    for size in VOCABULARIES if vocabulary is None else (vocabulary,):
        logits = like_a_model(size, session.seed)
        for dtype in dtypes:
            session.say(f"timing decide: {size:,} logits, {dtype}")
            held = as_held(logits, dtype)
            found = contenders(held, dtype)
            for name, run in found.items():
                if name != READ:
                    check(run, name, held)
            seconds[f"{size} {dtype}"] = in_turn(
                found,
                lambda ours, other: ours[0] == other[0],
                rounds=rounds,
                seconds=60,
                unlike={READ},
            )
    session.show(_decision_table(seconds))
    return seconds


def _decision_table(seconds: dict[str, dict[str, float]]) -> Table:
    table = Table(title="token and margin of one row of logits, µs", title_justify="left")
    names = [name for name in next(iter(seconds.values())) if name != OURS]
    for title in ("logits", "dtype", OURS, *names, "reads"):
        table.add_column(title, justify="left" if title == "dtype" else "right")
    for row, found in seconds.items():
        size, dtype = row.split()
        ours = found[OURS]
        peers = (
            f"{1e6 * found[name]:,.1f}" + ("" if name == READ else f" ({found[name] / ours:.1f}×)")
            for name in names
        )
        table.add_row(f"{int(size):,}", dtype, f"{1e6 * ours:,.1f}", *peers, f"{ours / found[READ]:.1f}")
    return table


def _table(title: str, seconds: dict[str, float]) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("")
    table.add_column("median", justify="right")
    first = next(iter(seconds.values()))
    table.add_column(f"times {next(iter(seconds))}", justify="right")
    for name, value in seconds.items():
        table.add_row(
            name,
            f"{value * 1e6:,.1f} µs" if value < 1e-3 else f"{value * 1e3:,.2f} ms",
            f"{value / first:.2f}",
        )
    return table
