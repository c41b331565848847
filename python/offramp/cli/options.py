"""Option types the subcommands share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])


class _Numbers(click.ParamType[tuple[float, ...]]):
    """Comma-separated numbers."""

    name = "numbers"

    def convert(
        self, value: str | tuple[float, ...], param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[float, ...]:
        if not isinstance(value, str):
            return value
        try:
            return tuple(float(part) for part in value.split(","))
        except ValueError:
            self.fail(f"{value!r} is not a list of numbers such as .9,.95", param, ctx)


class _Layers(click.ParamType[tuple[int, ...]]):
    """Comma-separated layer numbers."""

    name = "layers"

    def convert(
        self, value: str | tuple[int, ...], param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        if not isinstance(value, str):
            return value
        try:
            return tuple(int(part) for part in value.split(","))
        except ValueError:
            self.fail(f"{value!r} is not a list of layers such as 18,22,26", param, ctx)


EPS_LIST = _Numbers()
LAYERS = _Layers()
COUNT = click.IntRange(1)
FOLDER = click.Path(path_type=Path, file_okay=False)
EPS = click.FloatRange(0, 1, min_open=True, max_open=True)


def where_options(function: F) -> F:
    """Give a subcommand --dtype and --device."""
    function = click.option("--device", help="Where the model runs  [default: CUDA where there is one].")(
        function
    )
    return click.option("--dtype", help="The model's dtype  [default: float32 on a CPU].")(function)


def prompts_option(function: F) -> F:
    """Give a subcommand --prompts."""
    return click.option(
        "--prompts",
        type=click.Path(path_type=Path, exists=True, dir_okay=False),
        help="A text file of starting prompts, one a line  [default: those shipped].",
    )(function)
