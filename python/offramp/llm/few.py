"""A few rows through a layer by the compiled core, on torch's own threads: for `products` and `lean`.

A step of decoding has one row, or the few that waited, and costs what reading the weights costs; libraries are made
for many rows.  Here a weight is read once and in order, what is done before and after a product is done on the way,
and what comes out, as long as it is finite, does not depend on the rows beside it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from offramp import _core
from offramp.arrays import float_names

Linear = tuple[torch.Tensor, torch.Tensor | None]
Norm = tuple[torch.Tensor, float]
"""Weight (I,) and ε, by which rows are scaled to unit root mean square."""

IS_FAST = _core.steps_fast()
"""Whether the processor has the instructions, and torch the threads, for it."""

_NAMES = float_names(torch)
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


def multiply(
    rows: torch.Tensor,
    linears: Sequence[Linear],
    *,
    norm: Norm | None = None,
    residual: torch.Tensor | None = None,
    factor: float = 1.0,
    gated: bool = False,
) -> torch.Tensor:
    """Multiply rows (..., I) with weights (O, I): (..., O), one weight's products after another's.

    Everything has to be plain.

    Parameters
    ----------
    norm
        Of the rows, before.
    residual : (..., O), optional
        What the products times ``factor`` are added to.
    gated
        The products of two weights are ``silu`` of the first's times the second's.
    """
    width = rows.shape[-1]
    heights = [len(weight) for weight, _ in linears]
    out = rows.new_empty((*rows.shape[:-1], heights[0] if gated else sum(heights)))
    given = [
        (weight.data_ptr(), 0 if bias is None else bias.data_ptr(), height)
        for (weight, bias), height in zip(linears, heights, strict=True)
    ]
    fits = all(
        weight.shape[1] == width and (bias is None or len(bias) == len(weight)) for weight, bias in linears
    )
    fits = fits and (not gated or heights[0] == heights[-1])
    fits = fits and (norm is None or len(norm[0]) == width)
    if not fits or (residual is not None and residual.shape != out.shape):
        raise ValueError("rows, weights and what is done before and after do not fit together")
    _core.multiply_rows(
        _NAMES[rows.dtype],
        given,
        rows.data_ptr(),
        out.data_ptr(),
        rows.numel() // width,
        width,
        torch.get_num_threads(),
        None if norm is None else _given(norm),
        0 if residual is None else residual.data_ptr(),
        factor,
        gated,
    )
    return out


def apply_norm(rows: torch.Tensor, norm: Norm) -> torch.Tensor:
    """Norm plain rows (..., I)."""
    out, width = torch.empty_like(rows), rows.shape[-1]
    if len(norm[0]) != width:
        raise ValueError("rows and the weight of their norm do not fit together")
    count = rows.numel() // width
    _core.norm_rows(_NAMES[rows.dtype], rows.data_ptr(), out.data_ptr(), count, width, _given(norm))
    return out


def attend(
    projected: torch.Tensor,
    heads: tuple[int, int, int],
    rotary: tuple[torch.Tensor, torch.Tensor] | None,
    partner: torch.Tensor,
    cache: tuple[torch.Tensor, torch.Tensor],
    seen: int,
    scaling: float,
    window: int | None,
    norms: tuple[Norm, Norm] | None = None,
) -> torch.Tensor:
    """Let new positions attend to those before and to themselves, (R, query heads * size).

    Everything has to be plain.

    Parameters
    ----------
    projected : (R, (query heads + 2 key heads) * size)
        Queries, keys and values.
    heads
        Query heads, key heads and the size of one.
    rotary
        Cosines and signed sines, each (1, R, 1, size); ``partner`` (size,) int64 is the dimension each is turned with.
    cache
        Keys and values (1, at least seen + R, key heads, size); those of the new positions are written behind those
        of ``seen`` ones.
    norms
        Of each query head and of each key head, before they are turned.
    """
    count, (wide, narrow, size) = len(projected), heads
    out = projected.new_empty((count, wide * size))
    turned = (0, 0, 0)
    fits = projected.shape[1] == (wide + 2 * narrow) * size
    for buffer in cache:
        fits = fits and buffer.shape[0] == 1 and buffer.shape[1] >= seen + count
        fits = fits and buffer.shape[2:] == (narrow, size)
    if rotary is not None:
        fits = fits and rotary[0].numel() == rotary[1].numel() == count * size and len(partner) == size
        turned = rotary[0].data_ptr(), rotary[1].data_ptr(), partner.data_ptr()
    if not fits:
        raise ValueError("new positions, their angles and the cache do not fit together")
    _core.attend_rows(
        _NAMES[projected.dtype],
        projected.data_ptr(),
        turned,
        (cache[0].data_ptr(), cache[1].data_ptr()),
        out.data_ptr(),
        count,
        seen,
        heads,
        scaling,
        window or 0,
        torch.get_num_threads(),
        None if norms is None else (_given(norms[0]), _given(norms[1])),
    )
    return out


def _given(norm: Norm) -> tuple[int, float]:
    return norm[0].data_ptr(), norm[1]
