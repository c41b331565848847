"""Timing contenders alternately, so that a machine's moods fall on all of them alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
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
) -> dict[str, list[float]]:
    """Run contenders, which should be warm, all in turn, and return the seconds each run took.

    Parameters
    ----------
    contenders : mapping of str to callable
        What to time.
    rounds : int
        How often to run each.
    seconds : float
        Start no further round once this much time is used; each contender is timed at least once.

    Returns
    -------
    dict of str to list of float
        Wall-clock seconds, one a round.
    """
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
    contenders: Mapping[str, Callable[[], Any]],
    same: Callable[[Any, Any], Any],
    *,
    rounds: int,
    seconds: float = float("inf"),
    unlike: Collection[str] = (),
) -> dict[str, float]:
    """Median seconds of contenders that find the same, each run so often in a row that the clock can tell.

    Parameters
    ----------
    contenders, rounds, seconds
        As for `alternate`.
    same : callable
        Whether what a contender found is what the first one found.
    unlike : collection of str
        Those that look for something else, such as one read of the input.

    Raises
    ------
    RuntimeError
        A contender found something else.
    """
    found, once = {}, {}
    for name, run in contenders.items():
        found[name], once[name] = _clocked(run)
        if once[name] < _LOADING:
            once[name] = _clocked(run)[1]
    alike = [name for name in contenders if name not in unlike]
    for name in alike[1:]:
        if not same(found[alike[0]], found[name]):
            raise RuntimeError(f"{name} found something else, so its time means nothing")
    repeats = {name: max(1, round(_SHORTEST / once[name])) for name in contenders}
    looped = {name: partial(_loop, run, repeats[name]) for name, run in contenders.items()}
    taken = alternate(looped, rounds=rounds, seconds=seconds)
    return {name: value / repeats[name] for name, value in medians(taken).items()}


def _clocked(run: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    return run(), time.perf_counter() - start


def _loop(run: Callable[[], Any], repeats: int) -> None:
    for _ in range(repeats):
        run()


def medians(taken: Mapping[str, list[float]]) -> dict[str, float]:
    """Reduce the seconds of each contender to their median."""
    return {name: median(values) for name, values in taken.items()}
