"""Timing contenders alternately, so that a machine's moods fall on all of them alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from statistics import median
from typing import Any

# Long enough that the last contender's threads, which spin for some milliseconds before they sleep, matter little.
_SHORTEST = 2e-2
# A first run that takes longer than this is no longer one that loads modules for the most part.
_LOADING = 2.0


def alternate(
    contenders: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    seconds: float = float("inf"),
    warm: bool = False,
) -> dict[str, list[float]]:
    """Run every contender once to warm up, then all in turn, and return the seconds each run took.

    Parameters
    ----------
    contenders : mapping of str to callable
        What to time.
    rounds : int
        How often to run each, the warm-up not counted.
    seconds : float
        Start no further round once this much time is used; each contender is timed at least once.
    warm : bool
        They have run already.

    Returns
    -------
    dict of str to list of float
        Wall-clock seconds, one a round.
    """
    for run in () if warm else contenders.values():
        run()
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    end = time.perf_counter() + seconds
    for turn in range(rounds):
        if turn and time.perf_counter() >= end:
            break
        for name, run in contenders.items():
            start = time.perf_counter()
            run()
            taken[name].append(time.perf_counter() - start)
    return taken


def in_turn(
    contenders: Mapping[str, Callable[[], object]],
    once: Mapping[str, float],
    *,
    rounds: int,
    seconds: float = float("inf"),
) -> dict[str, float]:
    """Median seconds of contenders that have run, each so often in a row that the clock can tell.

    Parameters
    ----------
    contenders, rounds, seconds
        As for `alternate`.
    once : mapping of str to float
        About how many seconds a run of each takes.
    """
    repeats = {name: max(1, round(_SHORTEST / once[name])) for name in contenders}
    looped = {name: partial(_loop, run, repeats[name]) for name, run in contenders.items()}
    taken = alternate(looped, rounds=rounds, seconds=seconds, warm=True)
    return {name: value / repeats[name] for name, value in medians(taken).items()}


def clocked(run: Callable[[], Any]) -> tuple[Any, float]:
    """Return what a run returns, and the seconds it takes: of two runs the second, unless they are long."""
    found, seconds = _clocked(run)
    return _clocked(run) if seconds < _LOADING else (found, seconds)


def _clocked(run: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    return run(), time.perf_counter() - start


def _loop(run: Callable[[], Any], repeats: int) -> None:
    for _ in range(repeats):
        run()


def medians(taken: Mapping[str, list[float]]) -> dict[str, float]:
    """Reduce the seconds of each contender to their median."""
    return {name: median(values) for name, values in taken.items()}
