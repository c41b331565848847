"""What every subcommand shares: the options --json, --quiet, --seed, --threads, and where output goes.

Results go to stdout, everything else to stderr.
"""

from __future__ import annotations

import functools
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import click
from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

ProgressCallback = Callable[[str, int, int], None]

_SECONDS_BETWEEN_LINES = 10.0


class _Output(Console):
    """A console whose reader may leave, as `head` does: `app` ends the command then, not rich."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


@dataclass(frozen=True)
class Session:
    """One run of one subcommand.

    Attributes
    ----------
    as_json, quiet : bool
        Print one JSON object instead of tables; say nothing about progress.
    seed : int
        For everything random.
    threads : int or None
        Threads for torch and for the core; None leaves the choice to them.
    """

    as_json: bool
    quiet: bool
    seed: int
    threads: int | None
    out: Console = field(default_factory=lambda: _Output(highlight=False))
    err: Console = field(default_factory=lambda: Console(stderr=True, highlight=False))

    def say(self, text: str) -> None:
        """Tell a person what is being done."""
        if not self.quiet:
            self.err.print(text, markup=False)

    def show(self, *parts: RenderableType) -> None:
        """Print the result for a person."""
        if not self.as_json:
            self.out.print(*parts)

    def result(self, values: Mapping[str, Any]) -> None:
        """Print the result for a program; an infinite threshold and NaN become null."""
        if self.as_json:
            click.echo(json.dumps(plain(values), allow_nan=False))

    @property
    def draws(self) -> bool:
        """Whether progress is drawn as bars: not when quiet, and not into a log."""
        return self.err.is_terminal and not self.quiet

    @contextmanager
    def progress(self) -> Iterator[ProgressCallback | None]:
        """Give a callback ``(stage, done, total)`` that draws bars, or lines where there is no terminal."""
        if self.quiet:
            yield None
        elif self.draws:
            with _bars(self.err) as callback:
                yield callback
        else:
            yield _Lines(self.err)


def with_session(function: Callable[..., None]) -> Callable[..., None]:
    """Give a subcommand the shared options, gathered in a `Session` as its first argument."""

    @click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
    @click.option("-q", "--quiet", is_flag=True, help="Say nothing about progress.")
    @click.option(
        "--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True, help="Random seed."
    )
    @click.option(
        "--threads",
        type=click.IntRange(1, 4096),
        help="CPU threads to use  [default: all cores; bench decide: two for torch].",
    )
    @functools.wraps(function)
    def wrapped(*, as_json: bool, quiet: bool, seed: int, threads: int | None, **options: Any) -> None:
        session = Session(as_json, quiet, seed, threads)
        if not session.draws:
            # The bars of libraries, some of which can be told in no other way; read when tqdm is imported.
            os.environ.setdefault("TQDM_DISABLE", "1")
        function(session, **options)

    return wrapped


def plain(value: Any) -> Any:
    """Reduce to what JSON holds: numpy scalars and arrays to numbers and lists, non-finite floats to None."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int | str) else str(value)


@contextmanager
def _bars(console: Console) -> Iterator[ProgressCallback]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        tasks: dict[str, Any] = {}

        def callback(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = progress.add_task(stage)
            progress.update(tasks[stage], completed=done, total=total)

        yield callback


class _Lines:
    """Progress for a log: a line when a stage starts, when it ends, and now and then between."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._last: dict[str, float] = {}

    def __call__(self, stage: str, done: int, total: int) -> None:
        now = time.monotonic()
        if stage in self._last and done < total and now - self._last[stage] < _SECONDS_BETWEEN_LINES:
            return
        self._last[stage] = now
        self._console.print(f"{stage}: {done}/{total}", markup=False)
