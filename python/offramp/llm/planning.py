"""Which exits pay on this machine: measured costs of the parts, and a replay of the calibration text with them.

For `model`; needs `decoding`'s rules only in so far as it counts what `Rollout` would run.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from operator import truediv
from statistics import median
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from offramp.llm.calibrating import Measured
from offramp.llm.heads import ExitHeads
from offramp.llm.reading import Reader
from offramp.llm.scoring import Scores
from offramp.llm.trunk import Trunk

_ROWS = (1, 2, 3, 4, 6, 8, 16, 32)
_REPEATS = 15
_CONTEXT = 64
# Verify mode may take any thresholds: these target accuracies are tried.
_VERIFY_EPS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98)
# A gain smaller than this is not told from noise, and exits that do not pay are left out.
_WORTH = 0.02
# More tokens tell no more about the mean; and few tell which options are worth so many.
_REPLAYED = 3000
_TRIED_ON = 500
_FINALISTS = 12


@dataclass(frozen=True)
class Costs:
    """Seconds each part of a decoding step takes at batch 1.

    Attributes
    ----------
    layer : tuple of float
        One decoder layer over 1, 2, 3, 4, 6, 8, 16 and 32 rows.
    segment : float
        What a run of layers costs besides them: the more exits, the more runs a token takes.
    output : tuple of float
        Final norm, output matrix and argmax over as many rows.
    heads : tuple of tuple of float
        Each head with its decision, shallow to deep, over as many rows; a head without memory reads the last alone.
    step : float
        What a step costs beyond its parts.
    """

    layer: tuple[float, ...]
    segment: float
    output: tuple[float, ...]
    heads: tuple[tuple[float, ...], ...]
    step: float

    def layers(self, count: int, rows: int) -> float:
        """Seconds of one run of ``count`` layers over ``rows`` rows."""
        return self.segment + count * _between(self.layer, rows)

    def outputs(self, rows: int) -> float:
        """Seconds of the output layer over ``rows`` rows."""
        return _between(self.output, rows)

    def head(self, index: int, rows: int) -> float:
        """Seconds of asking a head that has ``rows`` rows to read."""
        return _between(self.heads[index], rows)


@dataclass(frozen=True)
class Option:
    """One way to decode, and what it is predicted to cost.

    Attributes
    ----------
    mode : str
        ``"off"``, ``"exit"`` or ``"verify"``.
    eps : float or None
        The thresholds' target accuracy.
    layers : tuple of int
        The exits switched on.
    thresholds : tuple of float
        One for each head of the model, inf for those switched off.
    predicted : float
        Seconds a token.
    measured : float
        Seconds a token; NaN where it was not measured.
    """

    mode: str
    eps: float | None
    layers: tuple[int, ...]
    thresholds: tuple[float, ...]
    predicted: float
    measured: float = math.nan


@dataclass(frozen=True)
class Plan:
    """The best option of each mode; printing it shows a table.

    Attributes
    ----------
    costs : Costs
        What was measured.
    off, exit, verify : Option
        The whole model for every token, and the fastest choice of exits in each mode.  Where no exit pays, ``layers``
        is empty and the prediction that of ``off``.
    considered : tuple of Option
        The options that were weighed to the end.
    rejected : tuple of Option
        Those that were predicted to pay and then measured to be slower than no exits.
    """

    costs: Costs
    off: Option
    exit: Option
    verify: Option
    considered: tuple[Option, ...] = field(default=(), repr=False)
    rejected: tuple[Option, ...] = ()

    def best(self, mode: str) -> Option:
        """Return the option of a mode."""
        return {"off": self.off, "exit": self.exit, "verify": self.verify}[mode]

    def with_measured(self, seconds: Mapping[str, Sequence[float]]) -> Plan:
        """Put measured seconds a token, of the same prompts in every mode, beside the predictions.

        Exits that were measured to be slower than none, prompt by prompt, are switched off, whatever was predicted.
        """
        timed = {
            mode: replace(self.best(mode), measured=median(found)) for mode, found in seconds.items() if found
        }
        off = timed.get("off", self.off)
        slower = {
            mode
            for mode, option in timed.items()
            if option.layers and median(map(truediv, seconds[mode], seconds["off"])) > 1
        }
        kept = {
            mode: replace(off, mode=mode, eps=option.eps) if mode in slower else option
            for mode, option in timed.items()
        }
        rejected = tuple(timed[mode] for mode in timed if mode in slower)
        return replace(self, **kept, rejected=rejected)  # type: ignore[arg-type]  # modes are fields

    def __str__(self) -> str:
        """Table of the modes; gains over no exits as predicted and as measured."""
        lines = ["mode     exits after    ms a token: predicted  measured   x exits off: predicted  measured"]
        lines += [self._row(option) for option in (self.off, self.exit, self.verify)]
        lines += [f"{self._row(option)}  switched off" for option in self.rejected]
        return "\n".join(lines)

    def _row(self, option: Option) -> str:
        exits = ", ".join(map(str, option.layers)) or "none"
        measured = [f"{1e3 * option.measured:8.1f}", f"{self.off.measured / option.measured:8.2f}"]
        if not math.isfinite(option.measured):
            measured = ["       -"] * 2
        return (
            f"{option.mode:<8} {exits:<14} {1e3 * option.predicted:21.1f}  {measured[0]} "
            f"{self.off.predicted / option.predicted:24.2f}  {measured[1]}"
        )


@torch.no_grad()
def measure_costs(trunk: Trunk, heads: ExitHeads, decide: Callable[[torch.Tensor], Any]) -> Costs:
    """Time layers, output matrix and heads on this machine, each alone, medians of several runs.

    In a step of decoding other weights have passed through the processor's caches before a head or the output matrix
    has its turn, so these are also timed after all layers.

    Parameters
    ----------
    decide
        Takes the decision on a head's logits (1, S).
    """
    tokens = torch.zeros(1, _CONTEXT, dtype=torch.int64, device=trunk.device)
    cache = trunk.new_cache()
    hidden = trunk.embed(tokens, _positions(trunk, 0, _CONTEXT))
    trunk.run(hidden, 0, trunk.num_layers, cache=cache, positions=_positions(trunk, 0, _CONTEXT))

    count = trunk.num_layers

    def layers(last: int, rows: int) -> None:
        positions = _positions(trunk, _CONTEXT, _CONTEXT + rows)
        trunk.run(hidden[:, :rows], 0, last, cache=cache, positions=positions)

    def crop() -> None:
        cache.crop_to(0, count, _CONTEXT)

    def after() -> None:
        crop()
        layers(count, 1)
        crop()

    every = [_seconds(partial(layers, count, rows), trunk, crop) for rows in _ROWS]
    # What a run of one layer takes longer than its share of a run of all.
    single = _seconds(partial(layers, 1, 1), trunk, after)
    segment = min(max(0.0, (count * single - every[0]) / (count - 1)), single)
    layer = tuple((seconds - segment) / count for seconds in every)
    output = _by_rows(lambda rows: _choose(trunk, hidden[:, :rows]), _ROWS, trunk, after)
    asked = measure_heads(trunk, heads, decide, after)
    one = tokens[:, :1]
    step = _seconds(lambda: trunk.embed(one, _positions(trunk, 0, 1)), trunk)
    return Costs(layer, segment, output, asked, step)


@torch.no_grad()
def measure_heads(
    trunk: Trunk,
    heads: ExitHeads,
    decide: Callable[[torch.Tensor], Any],
    after: Callable[[], Any] = lambda: None,
) -> tuple[tuple[float, ...], ...]:
    """Time each head with its decision, over 1, 2, 3, 4, 6, 8, 16 and 32 rows that wait, as in `Costs`.

    ``after`` is what runs before a head is asked in decoding; without it a head is timed by itself.  Heads of one
    config do the same work and are given the median of their times: what lies between them is noise, and would choose
    among them.
    """
    tokens = torch.zeros(1, _CONTEXT, dtype=torch.int64, device=trunk.device)
    hidden = trunk.embed(tokens, _positions(trunk, 0, _CONTEXT))
    every = [heads.after(at) for at in heads.layers]
    taken = [_head_costs(trunk, Reader(head), hidden, decide, after) for head in every]
    alike = [
        [seconds for seconds, other in zip(taken, every, strict=True) if other.config == head.config]
        for head in every
    ]
    return tuple(tuple(map(median, zip(*group, strict=True))) for group in alike)


def make_plan(
    costs: Costs,
    scores: Scores | Measured,
    layers: Sequence[int],
    num_layers: int,
    thresholds_at: Callable[[str, float, Sequence[int]], Sequence[float]],
    eps: float,
) -> Plan:
    """Replay the scored text with every set of exits, and take the fastest of each mode.

    Parameters
    ----------
    scores
        Of text the full model wrote, sequence by sequence.
    thresholds_at
        Thresholds in a mode for a target accuracy if only heads of these numbers are in use: a head meets more tokens
        where a shallower one is off.
    eps
        The target accuracy of exit mode.
    """
    nothing = tuple(math.inf for _ in layers)
    whole = Replay(costs, scores, layers, num_layers)
    off = Option("off", None, (), nothing, whole.exit(nothing))
    considered = [off]
    for mode, targets in (("exit", (eps,)), ("verify", _VERIFY_EPS)):
        options = []
        for target, kept in itertools.product(targets, _subsets(len(layers))):
            known = thresholds_at(mode, target, kept)
            chosen = tuple(float(known[index]) if index in kept else math.inf for index in range(len(layers)))
            on = tuple(layers[index] for index in kept)
            options.append(Option(mode, target, on, chosen, math.nan))
        if len(options) > _FINALISTS:
            tried = Replay(costs, scores, layers, num_layers, _TRIED_ON)
            options = sorted(map(tried.predict, options), key=lambda option: option.predicted)[:_FINALISTS]
        considered += map(whole.predict, options)

    def best(mode: str) -> Option:
        fastest = min((item for item in considered if item.mode == mode), key=lambda item: item.predicted)
        if fastest.predicted < (1 - _WORTH) * off.predicted:
            return fastest
        return Option(mode, fastest.eps, (), nothing, off.predicted)

    return Plan(costs, off, best("exit"), best("verify"), tuple(considered))


class Replay:
    """Counts what decoding a scored text would run, and adds up its time."""

    def __init__(
        self,
        costs: Costs,
        scores: Scores | Measured,
        layers: Sequence[int],
        num_layers: int,
        tokens: int = _REPLAYED,
    ) -> None:
        self.costs, self.layers, self.num_layers = costs, tuple(layers), num_layers
        self.margins = scores.scores[:, :tokens].astype(np.float64)
        self.correct = scores.correct[:, :tokens]
        groups = scores.groups[:tokens]
        self.starts = np.append(True, groups[1:] != groups[:-1])

    def predict(self, option: Option) -> Option:
        """Put the seconds a token into an option."""
        run = self.exit if option.mode == "exit" else self.verify
        return replace(option, predicted=run(option.thresholds))

    def exit(self, thresholds: Sequence[float]) -> float:
        """Seconds a token in exit mode."""
        walk = _Walk(self.costs, self.layers, self.num_layers, thresholds)
        exits = self._first_exit(thresholds)
        for start, at in zip(self.starts.tolist(), exits.tolist(), strict=True):
            if start:
                walk.clear()
            walk.token(at)
            if at == len(self.layers):
                walk.output(1)
        return walk.seconds / len(exits)

    def verify(self, thresholds: Sequence[float]) -> float:
        """Seconds a kept token in verify mode.

        What heads say after a wrong draft is not known; what they say of the right text there stands in for it.
        """
        walk = _Walk(self.costs, self.layers, self.num_layers, thresholds)
        exits = self._first_exit(thresholds).tolist()
        whole = len(self.layers)
        wrong: int | None = None
        at, drafts = 0, 0
        while at < len(exits):
            if self.starts[at] and wrong is None:
                walk.clear()
                drafts = 0
            exit_at = exits[at]
            walk.token(exit_at)
            if exit_at < whole:
                drafts += 1
                if wrong is None and not self.correct[exit_at, at]:
                    wrong = at
                at += 1
                # The end of a text confirms what is drafted.
                if at < len(exits) and not self.starts[at]:
                    continue
                walk.flush()
            asked = at + (exit_at == whole)
            walk.output(drafts + (exit_at == whole))
            if wrong is not None:
                walk.forget(asked - (wrong + 1))
            at = asked if wrong is None else wrong + 1
            wrong, drafts = None, 0
        return walk.seconds / len(exits)

    def _first_exit(self, thresholds: Sequence[float]) -> NDArray[np.int64]:
        reached = self.margins >= np.asarray(thresholds)[:, None]
        return np.where(reached.any(axis=0), reached.argmax(axis=0), len(self.layers)).astype(np.int64)


class _Walk:
    """Positions that wait before each segment, and the time spent."""

    def __init__(
        self, costs: Costs, layers: tuple[int, ...], whole: int, thresholds: Sequence[float]
    ) -> None:
        self.costs = costs
        self.on = [index for index, threshold in enumerate(thresholds) if threshold <= 1]
        bounds = (0, *(layers[index] for index in self.on), whole)
        self.sizes = [last - first for first, last in itertools.pairwise(bounds)]
        self.seconds = 0.0
        self.clear()

    def clear(self) -> None:
        self.waiting = [0] * len(self.sizes)
        self.unread = [0] * len(self.on)

    def token(self, exit_at: int) -> None:
        """Run the segments a token needs that leaves at exit number ``exit_at``, and ask the heads on the way."""
        self.seconds += self.costs.step
        self.waiting[0] += 1
        for segment in range(len(self.sizes)):
            self._run(segment)
            if segment < len(self.on):
                self.seconds += self.costs.head(self.on[segment], self.unread[segment])
                self.unread[segment] = 0
                if self.on[segment] == exit_at:
                    return

    def flush(self) -> None:
        for segment in range(len(self.sizes)):
            self._run(segment)

    def forget(self, rows: int) -> None:
        """Take the newest positions back."""
        self.unread = [max(0, unread - rows) for unread in self.unread]

    def output(self, rows: int) -> None:
        self.seconds += self.costs.outputs(rows)

    def _run(self, segment: int) -> None:
        rows = self.waiting[segment]
        if rows:
            self.seconds += self.costs.layers(self.sizes[segment], rows)
            self.waiting[segment] = 0
            if segment < len(self.unread):
                self.unread[segment] += rows
                self.waiting[segment + 1] += rows


def _subsets(count: int) -> list[tuple[int, ...]]:
    """Every set of exits but the empty one; beyond eight exits, sets of up to two."""
    sizes = range(1, (count if count <= 8 else 2) + 1)
    return [kept for size in sizes for kept in itertools.combinations(range(count), size)]


def _between(known: Sequence[float], rows: int) -> float:
    if rows <= _ROWS[-1]:
        return float(np.interp(rows, _ROWS, known))
    return known[-1] * rows / _ROWS[-1]


def _positions(trunk: Trunk, first: int, last: int) -> torch.Tensor:
    return torch.arange(first, last, device=trunk.device)[None]


def _choose(trunk: Trunk, hidden: torch.Tensor) -> torch.Tensor:
    return trunk.logits(hidden).argmax(dim=-1)


def _head_costs(
    trunk: Trunk,
    reader: Reader,
    hidden: torch.Tensor,
    decide: Callable[[torch.Tensor], Any],
    after: Callable[[], Any],
) -> tuple[float, ...]:
    """Seconds of asking a head that has read the context, with each number of rows waiting."""
    reader.see(hidden)
    reader.answer(_positions(trunk, 0, _CONTEXT), None)

    def ask(rows: int) -> None:
        reader.crop(_CONTEXT)
        reader.see(hidden[:, :rows])
        decide(reader.answer(_positions(trunk, 0, _CONTEXT + rows), None))

    if reader.state is None:
        return _by_rows(ask, _ROWS[:1], trunk, after) * len(_ROWS)
    return _by_rows(ask, _ROWS, trunk, after)


def _by_rows(
    work: Callable[[int], Any], counts: Sequence[int], trunk: Trunk, after: Callable[[], Any]
) -> tuple[float, ...]:
    """Seconds of work over each number of rows, in the state ``after`` leaves the processor's caches in."""
    warm = [_seconds(partial(work, rows), trunk) for rows in counts]
    # Reading from further away takes as much longer over any number of rows.
    longer = max(0.0, _seconds(partial(work, counts[0]), trunk, after) - warm[0])
    return tuple(seconds + longer for seconds in warm)


def _seconds(work: Callable[[], Any], trunk: Trunk, after: Callable[[], Any] = lambda: None) -> float:
    taken = []
    for turn in range(_REPEATS + 3):
        after()
        _finish(trunk)
        start = time.perf_counter()
        work()
        _finish(trunk)
        if turn >= 3:
            taken.append(time.perf_counter() - start)
    return median(taken)


def _finish(trunk: Trunk) -> None:
    """Wait for what a device has been told to do."""
    if trunk.device.type == "cuda":
        torch.cuda.synchronize(trunk.device)
