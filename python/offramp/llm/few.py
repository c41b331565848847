"""What the compiled core computes over a few rows, on torch's own threads, and how it is told of tensors.

A step of decoding has one row, or the few that waited, and costs what reading the weights costs; libraries are made
for many rows.  Here a weight is read once and in order, and what comes out, as long as it is finite, does not depend on
the rows beside it.  For `products`, `layer`, `rounding`, and `stepping`, which has whole layers computed so.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import nn

from offramp import _core
from offramp.arrays import float_names


class Narrow(NamedTuple):
    """A weight as whole numbers (O, I) int8 times scales (O,) float32, on the CPU."""

    values: torch.Tensor
    scales: torch.Tensor


class Linear(NamedTuple):
    """A linear map: weight (O, I), bias (O,), and the weight once more as whole numbers, a quarter or half to read."""

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    narrow: Narrow | None = None

    @classmethod
    def of(cls, module: nn.Linear) -> Linear:
        """Take a module's, with the whole numbers that `rounding` left there."""
        narrow: Narrow | None = vars(module).get("narrow")
        return cls(module.weight, module.bias, narrow)

    def has_shape(self, height: int, width: int) -> bool:
        """Whether weight, bias and whole numbers are those of so many outputs and inputs."""
        weight, bias, narrow = self
        return (
            weight.shape == (height, width)
            and (bias is None or bias.shape == (height,))
            and (
                narrow is None
                or (
                    narrow.values.shape == (height, width)
                    and narrow.scales.shape == (height,)
                    and are_plain(torch.int8, narrow[:1])
                    and are_plain(torch.float32, narrow[1:])
                )
            )
        )


Norm = tuple[torch.Tensor, float]
"""Weight (I,) and ε, by which rows are scaled to unit root mean square."""
LinearAt = tuple[int, int, int, int]
"""Addresses of weight, scales and bias, 0 where there are none, and the number of outputs."""

IS_FAST = _core.steps_fast()
"""Whether the processor has the instructions, and torch the threads, for it."""

NAMES = float_names(torch)
# Measured on Zen 5, two threads: of more rows torch's product takes as long, and in float32 of 17 half as long again.
_MOST = {torch.float32: 16, torch.float16: 8, torch.bfloat16: 8}
_PLAIN = (torch.Tensor, torch.nn.Parameter)


def are_few(hidden: torch.Tensor) -> bool:
    """Whether rows (..., H) are on the CPU and so few that this is the fastest way."""
    return (
        IS_FAST
        and hidden.is_cpu
        and 0 < hidden.numel() <= hidden.shape[-1] * _MOST.get(hidden.dtype, 0)
        and not torch.is_autocast_enabled("cpu")
    )


def are_plain(dtype: torch.dtype, tensors: Iterable[torch.Tensor]) -> bool:
    """Whether tensors are numbers of a dtype in order, on the CPU, and nobody wants to learn from them."""
    learns = torch.is_grad_enabled()
    return all(
        tensor.dtype is dtype
        and tensor.is_cpu
        and tensor.is_contiguous()
        and type(tensor) in _PLAIN
        and not (learns and tensor.requires_grad)
        for tensor in tensors
    )


def multiply(rows: torch.Tensor, linear: Linear) -> torch.Tensor:
    """Multiply rows (..., I) with a weight (O, I): (..., O), with its whole numbers where it has them.

    Everything has to be plain.
    """
    width, height = rows.shape[-1], len(linear.weight)
    if not linear.has_shape(height, width):
        raise ValueError("rows, weight and bias do not fit together")
    out = rows.new_empty((*rows.shape[:-1], height))
    _core.multiply_rows(
        NAMES[rows.dtype],
        address(linear, narrow=linear.narrow is not None),
        rows.data_ptr(),
        out.data_ptr(),
        rows.numel() // width,
        width,
        torch.get_num_threads(),
    )
    return out


def apply_norm(rows: torch.Tensor, norm: Norm) -> torch.Tensor:
    """Norm plain rows (..., I)."""
    out, width = torch.empty_like(rows), rows.shape[-1]
    if len(norm[0]) != width:
        raise ValueError("rows and the weight of their norm do not fit together")
    count = rows.numel() // width
    _core.norm_rows(
        NAMES[rows.dtype], rows.data_ptr(), out.data_ptr(), count, width, (norm[0].data_ptr(), norm[1])
    )
    return out


def address(linear: Linear, *, narrow: bool) -> LinearAt:
    """Where the core finds a linear map: its weight, or the whole numbers instead."""
    weight, bias, numbers = linear
    behind = 0 if bias is None else bias.data_ptr()
    if narrow and numbers is not None:
        return numbers.values.data_ptr(), numbers.scales.data_ptr(), behind, len(weight)
    return weight.data_ptr(), 0, behind, len(weight)
