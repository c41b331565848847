"""``offramp threshold``: calibration for the scores of any classifier."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import click
import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from offramp.calibration import fast_calibrate
from offramp.cli.columns import read_column
from offramp.cli.options import EPS_LIST
from offramp.cli.session import Session, with_session
from offramp.errors import InputError
from offramp.outcomes import Counted


@dataclass(frozen=True)
class Row(Counted):
    """A threshold, and what it accepts of the data it was found on."""

    head: int
    eps: float
    threshold: float
    accepted: int
    correct: int
    n: int


@click.command()
@click.argument("scores", type=click.Path(path_type=Path))
@click.argument("correct", type=click.Path(path_type=Path), required=False)
@click.option(
    "--eps", type=EPS_LIST, default="0.9", show_default=True, help="Target accuracies in [0, 1], as .9,.95."
)
@click.option(
    "--rule", type=click.Choice(["set", "index"]), default="set", show_default=True, help="How ties count."
)
@click.option("--score-column", help="Column of SCORES, if it is a table  [default: score].")
@click.option("--correct-column", help="Column of CORRECT, if it is a table  [default: correct].")
@with_session
def threshold(
    session: Session,
    *,
    scores: Path,
    correct: Path | None,
    eps: tuple[float, ...],
    rule: Literal["set", "index"],
    score_column: str | None,
    correct_column: str | None,
) -> None:
    """Calibrate the scores of any classifier.

    Finds the lowest score from which on predictions are accurate enough.

    SCORES holds a confidence for each prediction, CORRECT whether it was right (0/1 or true/false): npy, csv
    or parquet.  One table with both columns may be given alone.  An npy array of shape (K, N) holds K heads.
    """
    if correct is None and scores.suffix == ".npy":
        raise InputError(
            f"CORRECT is missing: give a second file that says which predictions of {scores} were right"
        )
    values = read_column(scores, score_column, ("score", "scores"))
    flags = _as_flags(read_column(correct or scores, correct_column, ("correct",)))
    try:
        found = fast_calibrate(values, flags, np.array(eps), rule=rule, threads=session.threads)
    except TypeError as error:
        raise InputError(str(error)) from error
    rows = _count(values, flags, eps, found)
    session.show(_table(rows, heads=values.ndim == 2))
    session.result({"rule": rule, "n": rows[0].n, "thresholds": [_plain(row) for row in rows]})


def _as_flags(values: NDArray[Any]) -> NDArray[Any]:
    """Take whole floats, all that csv and many tables have, for the integers they are."""
    if values.dtype.kind == "f" and bool(np.isin(values, (0, 1)).all()):
        return values.astype(np.int8)
    return values


def _count(
    scores: NDArray[Any], flags: NDArray[Any], eps: tuple[float, ...], found: NDArray[np.float64]
) -> list[Row]:
    rows = []
    scores, flags, found = np.atleast_2d(scores), np.atleast_2d(flags), np.atleast_2d(found)
    for head, (head_scores, head_flags, taus) in enumerate(zip(scores, flags, found, strict=True)):
        for target, tau in zip(eps, taus, strict=True):
            # A finite tau is one of the scores, so their own dtype holds it exactly.
            accepted = head_scores >= head_scores.dtype.type(tau)
            rows.append(
                Row(
                    head,
                    target,
                    float(tau),
                    int(accepted.sum()),
                    int(np.count_nonzero(head_flags[accepted])),
                    len(head_scores),
                )
            )
    return rows


def _plain(row: Row) -> dict[str, Any]:
    return {**asdict(row), "coverage": row.coverage, "accuracy": row.accuracy}


def _table(rows: list[Row], *, heads: bool) -> Table:
    table = Table(title=f"Thresholds from {rows[0].n:,} predictions", title_justify="left")
    for name in (("head",) if heads else ()) + (
        "target accuracy",
        "threshold",
        "accepted",
        "coverage",
        "accuracy",
    ):
        table.add_column(name, justify="right")
    for row in rows:
        reached = math.isfinite(row.threshold)
        cells = [f"{row.eps:g}", repr(row.threshold) if reached else "none reaches it", f"{row.accepted:,}"]
        cells += [f"{row.coverage:.1%}", f"{row.accuracy:.4f}" if reached else "–"]
        table.add_row(*([str(row.head)] if heads else []), *cells)
    return table
