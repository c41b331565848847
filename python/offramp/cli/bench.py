"""``offramp bench``: the core beside its peers on this machine."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from offramp import machine
from offramp.calibration import fast_calibrate
from offramp.cli.session import Session, with_session
from offramp.evaluation.peers.decision import (
    DTYPES,
    OURS,
    READ,
    VOCABULARIES,
    agree,
    contenders,
    like_a_model,
)
from offramp.evaluation.timing import alternate, medians

Contenders = dict[str, Callable[[], Any]]
_EPS = 0.9


@click.command()
@click.argument("what", type=click.Choice(["all", "calibrate", "decide"]), default="all")
@click.option(
    "--samples", type=click.IntRange(1), default=1_000_000, show_default=True, help="Scores to calibrate on."
)
@click.option(
    "--vocabulary",
    type=click.IntRange(2),
    help="Logits in a row; default: those of five families of models, 32,000 to 256,000.",
)
@click.option(
    "--rounds", type=click.IntRange(1), default=15, show_default=True, help="Timed runs of each contender."
)
@with_session
def bench(session: Session, what: str, samples: int, vocabulary: int | None, rounds: int) -> None:
    """Time the core beside numpy and torch.

    Threshold search on float32, exit decision in every dtype; contenders in turns.
    """
    random = np.random.default_rng(session.seed)
    results: dict[str, Any] = {}
    if what in ("all", "calibrate"):
        searches = _calibrate(random, samples, session.threads)
        session.say(f"timing calibrate: {', '.join(searches)}")
        results["calibrate"] = _timed(searches, _same, rounds)
        session.show(_table(f"threshold for ε = {_EPS} from {samples:,} scores", results["calibrate"]))
    if what in ("all", "decide"):
        results["decide"] = _decisions(session, vocabulary, rounds)
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


def _timed(contenders: Contenders, same: Callable[[Any, Any], bool], rounds: int) -> dict[str, float]:
    """Seconds of each contender, timed in turns once they agree."""
    _require_agreement(contenders, same)
    repeats = _repeats(contenders)
    repeated = {key: _repeated(run, repeats) for key, run in contenders.items()}
    timed = medians(alternate(repeated, rounds=rounds, seconds=60))
    return {key: seconds / repeats for key, seconds in timed.items()}


def _calibrate(random: np.random.Generator, samples: int, threads: int | None) -> Contenders:
    scores = random.random(samples, dtype=np.float32)
    correct = random.random(samples, dtype=np.float32) < 0.5 + 0.5 * scores
    contenders: Contenders = {
        "offramp": lambda: fast_calibrate(scores, correct, _EPS, threads=threads),
        "numpy argsort + cumsum": lambda: _numpy_threshold(scores, correct),
    }
    if find_spec("torch") is not None:
        import torch  # noqa: PLC0415 - an optional dependency

        scores_tensor, correct_tensor = torch.from_numpy(scores), torch.from_numpy(correct)

        def with_torch() -> float:
            ordered, order = torch.sort(scores_tensor)
            return _first_good(ordered.numpy(), correct_tensor[order].numpy())

        contenders["torch.sort + cumsum"] = with_torch
    return contenders


def _numpy_threshold(scores: NDArray[np.float32], correct: NDArray[np.bool_]) -> float:
    order = np.argsort(scores)
    return _first_good(scores[order], correct[order])


def _first_good(scores: NDArray[np.float32], correct: NDArray[np.bool_]) -> float:
    """Find the threshold in ascending scores, as most evaluation scripts do, but minding ties."""
    right = np.cumsum(correct[::-1])[::-1]
    accuracy = right / np.arange(len(scores), 0, -1)
    starts = np.append(True, scores[1:] != scores[:-1])
    good = np.flatnonzero(starts & (accuracy >= _EPS))
    return float(scores[good[0]]) if len(good) else float("inf")


def _decisions(session: Session, vocabulary: int | None, rounds: int) -> dict[str, dict[str, float]]:
    """Time the decision on rows of every size and dtype; seconds by contender."""
    dtypes = DTYPES if find_spec("torch") is not None else DTYPES[:1]
    seconds = {}
    for size in VOCABULARIES if vocabulary is None else (vocabulary,):
        logits = like_a_model(size, session.seed)
        for dtype in dtypes:
            session.say(f"timing decide: {size:,} logits, {dtype}")
            seconds[f"{size} {dtype}"] = _timed(contenders(logits, dtype), _close, rounds)
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


def _same(one: float, other: float) -> bool:
    return one == other


def _close(one: Any, other: Any) -> bool:
    # One read finds no margin.
    return not isinstance(other, tuple) or agree(one, other)


def _require_agreement(contenders: Contenders, agree: Callable[[Any, Any], bool]) -> None:
    (first, *others) = contenders.values()
    expected = first()
    for run in others:
        if not agree(expected, run()):
            raise RuntimeError("contenders disagree, so their times mean nothing")


def _repeats(contenders: Contenders) -> int:
    """Enough runs in a row that the slowest contender is timed over a millisecond."""
    slowest = max(medians(alternate(contenders, rounds=1)).values())
    return max(1, round(1e-3 / slowest))


def _repeated(run: Callable[[], Any], repeats: int) -> Callable[[], None]:
    def loop() -> None:
        for _ in range(repeats):
            run()

    return loop


def _table(title: str, seconds: dict[str, float]) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("")
    table.add_column("median", justify="right")
    table.add_column("times offramp", justify="right")
    for name, value in seconds.items():
        table.add_row(
            name,
            f"{value * 1e6:,.1f} µs" if value < 1e-3 else f"{value * 1e3:,.2f} ms",
            f"{value / seconds['offramp']:.2f}",
        )
    return table
