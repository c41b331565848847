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
from offramp.decision import decide
from offramp.evaluation.timing import alternate, medians

Contenders = dict[str, Callable[[], Any]]
_EPS = 0.9


@click.command()
@click.argument("what", type=click.Choice(["all", "calibrate", "decide"]), default="all")
@click.option(
    "--samples", type=click.IntRange(1), default=1_000_000, show_default=True, help="Scores to calibrate on."
)
@click.option(
    "--vocabulary", type=click.IntRange(2), default=49_152, show_default=True, help="Logits in a row."
)
@click.option(
    "--rounds", type=click.IntRange(1), default=15, show_default=True, help="Timed runs of each contender."
)
@with_session
def bench(session: Session, what: str, samples: int, vocabulary: int, rounds: int) -> None:
    """Time the core beside numpy and torch.

    Threshold search and exit decision, on float32, in alternation.
    """
    random = np.random.default_rng(session.seed)
    suites: dict[str, tuple[str, Contenders, Callable[[Any, Any], bool]]] = {}
    if what in ("all", "calibrate"):
        suites["calibrate"] = (
            f"threshold for ε = {_EPS} from {samples:,} scores",
            _calibrate(random, samples, session.threads),
            _same,
        )
    if what in ("all", "decide"):
        suites["decide"] = (
            f"token and margin of a row of {vocabulary:,} logits",
            _decide(random, vocabulary),
            _close,
        )
    results = {}
    for name, (title, contenders, agree) in suites.items():
        session.say(f"timing {name}: {', '.join(contenders)}")
        _require_agreement(contenders, agree)
        repeats = _repeats(contenders)
        timed = medians(
            alternate(
                {key: _repeated(run, repeats) for key, run in contenders.items()}, rounds=rounds, seconds=60
            )
        )
        results[name] = {key: seconds / repeats for key, seconds in timed.items()}
        session.show(_table(title, results[name]))
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


def _decide(random: np.random.Generator, vocabulary: int) -> Contenders:
    logits = (random.standard_normal(vocabulary) * 3).astype(np.float32)
    contenders: Contenders = {
        "offramp": lambda: tuple(decide(logits, _EPS))[:2],
        "numpy softmax + partition": lambda: _numpy_margin(logits),
    }
    if find_spec("torch") is not None:
        import torch  # noqa: PLC0415 - an optional dependency

        tensor = torch.from_numpy(logits)

        def with_torch() -> tuple[int, float]:
            top = torch.softmax(tensor, -1).topk(2)
            return int(top.indices[0]), float(top.values[0] - top.values[1])

        contenders["torch softmax + topk"] = with_torch
    return contenders


def _numpy_margin(logits: NDArray[np.float32]) -> tuple[int, float]:
    weights = np.exp(logits - logits.max())
    second, first = np.partition(weights, -2)[-2:]
    return int(logits.argmax()), float((first - second) / weights.sum())


def _same(one: float, other: float) -> bool:
    return one == other


def _close(one: tuple[int, float], other: tuple[int, float]) -> bool:
    return one[0] == other[0] and abs(one[1] - other[1]) < 1e-4


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
