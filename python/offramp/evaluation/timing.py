"""Timing contenders alternately, so that a machine's moods fall on all of them alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from statistics import median


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


def medians(taken: Mapping[str, list[float]]) -> dict[str, float]:
    """Reduce the seconds of each contender to their median."""
    return {name: median(values) for name, values in taken.items()}
