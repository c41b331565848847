"""Seconds to the threshold against the number of scores: ours, the peers, and one read of the inputs."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offramp.calibration import fast_calibrate
from offramp.evaluation.peers.calibration import by_argsort, one_read, peers
from offramp.evaluation.timing import in_turn

OURS, READ = "offramp", "one read of the inputs"
# What the usual code allocates for a sample: indices, sorted copies, sums, quotients.
_BYTES_A_SAMPLE = 60

Samples = tuple[NDArray[Any], NDArray[np.bool_]]
Seconds = dict[str, float]


def uniform(size: int, seed: int) -> Samples:
    """Draw float32 scores that mean what they say, from one half up."""
    rng = np.random.default_rng(seed)
    scores = rng.random(size, dtype=np.float32)
    return scores, rng.random(size, dtype=np.float32) < 0.5 + 0.5 * scores


def by_size(
    sizes: Sequence[int], *, eps: float, rounds: int, threads: int | None, seed: int, patience: float
) -> Iterator[tuple[int, Seconds]]:
    """Time all contenders on ascending sizes, as long as the data fits into memory.

    Parameters
    ----------
    sizes : sequence of int
        Numbers of scores, ascending.
    eps : float
        Target accuracy.
    rounds : int
        Timed runs of each contender, in turn.
    threads : int, optional
        For ours; the peers take what they take.
    seed : int
        For the scores.
    patience : float
        Seconds one run of a contender may take; it is left out of sizes at which it is likely to take more.

    Yields
    ------
    size, seconds : int, dict of str to float
        Median seconds of each contender, ours first.

    Raises
    ------
    RuntimeError
        A peer found another threshold.
    """
    slow: set[str] = set()
    for size in sizes:
        if size * _BYTES_A_SAMPLE > free_memory():
            return
        scores, correct = uniform(size, seed)
        contenders: dict[str, Callable[[], Any]] = {
            OURS: lambda: fast_calibrate(scores, correct, eps, threads=threads),  # noqa: B023 - used at once
            READ: lambda: one_read(scores, correct),  # noqa: B023
        }
        for name, search in peers(scores).items():
            if name not in slow:
                contenders[name] = partial(search, scores, correct, eps)
        seconds = in_turn(contenders, np.array_equal, rounds=rounds, unlike={READ})
        yield size, seconds
        slow |= {
            name for name, value in seconds.items() if value * 10 > patience and name not in (OURS, READ)
        }


def heads_and_targets(
    size: int, *, rounds: int, threads: int | None, seed: int
) -> tuple[Seconds, tuple[int, int]]:
    """Time 4 heads with 20 targets in one call, and a loop of the usual code over all pairs."""
    heads, eps = 4, np.linspace(0.78, 0.97, 20)
    scores, correct = (array.reshape(heads, size) for array in uniform(heads * size, seed))

    def loop() -> NDArray[np.float64]:
        rows = zip(scores, correct, strict=True)
        return np.array([[by_argsort(*row, target) for target in eps] for row in rows])

    contenders: dict[str, Callable[[], Any]] = {
        OURS: lambda: fast_calibrate(scores, correct, eps, threads=threads),
        "numpy argsort + cumsum, in a loop": loop,
    }
    return in_turn(contenders, np.array_equal, rounds=min(rounds, 3)), (heads, len(eps))


def by_kind(size: int, *, eps: float, rounds: int, threads: int | None, seed: int) -> Seconds:
    """Time ours on scores and orders of many kinds."""
    scores, correct = uniform(size, seed)
    order = np.argsort(scores)
    crossing, walk = np.empty(size, bool), np.empty(size, bool)
    crossing[order] = np.arange(size) % 10 < 10 * eps
    walk[order] = np.random.default_rng(seed).random(size) < eps
    kinds: dict[str, Samples] = {
        "float32": (scores, correct),
        "float64": (scores.astype(np.float64), correct),
        "float16": (scores.astype(np.float16), correct),
        "twenty values": (np.round(scores * 20) / 20, correct),
        "two values": (np.round(scores), correct),
        "all equal": (np.full(size, 0.5, np.float32), correct),
        "sorted": (scores[order], correct[order]),
        "reversed": (scores[order][::-1].copy(), correct[order][::-1].copy()),
        "target crossed at every rank": (scores, crossing),
        "random walk around the target": (scores, walk),
    }
    contenders: dict[str, Callable[[], Any]] = {
        kind: partial(fast_calibrate, *samples, eps, threads=threads) for kind, samples in kinds.items()
    }
    return in_turn(contenders, np.array_equal, rounds=rounds, unlike=set(kinds))


def draw(rows: Sequence[tuple[int, Seconds]], path: Path) -> None:
    """Draw seconds against the number of scores into a picture; needs matplotlib.

    Parameters
    ----------
    rows : sequence of (size, seconds)
        As `by_size` yields them.
    path : pathlib.Path
        The picture; its suffix says which kind.
    """
    from matplotlib.figure import Figure  # noqa: PLC0415 - an optional dependency

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    ax = figure.add_subplot()
    styles: dict[str, dict[str, Any]] = {
        OURS: {"linewidth": 3, "color": "#d55e00"},
        READ: {"linestyle": "--", "color": "0.5"},
    }
    names = dict.fromkeys(name for _, seconds in rows for name in seconds)
    # Okabe and Ito's colours, which the colour-blind can tell apart.
    colours = iter(("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9"))
    for name in names:
        points = [(size, seconds[name]) for size, seconds in rows if name in seconds]
        style = styles.get(name) or {"color": next(colours, "black")}
        ax.loglog(*zip(*points, strict=True), marker="o", markersize=4, label=name, **style)
    ax.set(xlabel="scores", ylabel="seconds, median")
    ax.grid(alpha=0.3)
    ax.legend(fontsize=9)
    figure.savefig(path)


def free_memory() -> int:
    """Bytes that can be allocated without swapping; plenty where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 2**33
