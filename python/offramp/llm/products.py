"""Linear maps over few rows, by a product that reads weights at the speed of memory.

A step of decoding multiplies every weight with one row or a few, and costs what reading the weights costs; libraries
are made for many rows.  So few are multiplied by the compiled core, on torch's own threads, and what an output is does
not depend on the rows beside it.  For `lean`, `trunk` and `heads`, and for `training`, which asks about bfloat16.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from offramp import _core

_PROCESSOR: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
MATRIX_UNITS = bool(_PROCESSOR.get("amx_bf16"))
"""Whether the processor has units for matrices of bfloat16 (AMX), which multiply ten times as fast as float32."""
BFLOAT16_PRODUCTS = MATRIX_UNITS or bool(_PROCESSOR.get("avx512_bf16"))
"""Whether it multiplies bfloat16 faster than float32 at all: with AVX-512 alone twice as fast."""

_OURS = _core.multiplies_few_rows()
# Measured on Zen 5, two threads: of more rows torch's product takes as long, and in float32 of 9 twice as long as of 8.
_FEW = {torch.float32: 16, torch.float16: 8, torch.bfloat16: 8}
_NAMES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
_PLAIN = (torch.Tensor, torch.nn.Parameter)

# Without AVX-512 torch multiplies 16-bit numbers row by row: from 4 rows on, a float32 copy of each weight for the
# moment of the product is faster (40 rows: 5 times).
WIDENS_HALVES = torch.backends.mkl.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX2"
"""Whether several rows of 16-bit numbers are multiplied in float32."""
_WORTH_WIDENING = 4
# Rows of a weight that are widened at a time, so that they stay in the processor's cache.
_PART = 2048


def linear(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """``functional.linear`` over rows (..., H), by the product that is fastest for so many."""
    rows = hidden.numel() // hidden.shape[-1]
    if _OURS and 0 < rows <= _FEW.get(hidden.dtype, 0) and _is_read_as_it_is(hidden, weight, bias):
        return _few_rows(rows, hidden, weight, bias)
    if rows < _WORTH_WIDENING or not widens(hidden):
        return functional.linear(hidden, weight, bias)
    columns = hidden.reshape(rows, -1).T.float()
    found = torch.cat([torch.mm(part.float(), columns) for part in weight.split(_PART)]).to(hidden.dtype)
    found = found.T.contiguous().view(*hidden.shape[:-1], -1)
    return found if bias is None else found + bias


def widens(hidden: torch.Tensor) -> bool:
    """Whether several rows like these are multiplied in float32, and faster so than by a module of torch."""
    return WIDENS_HALVES and hidden.dtype in (torch.bfloat16, torch.float16) and hidden.device.type == "cpu"


def _is_read_as_it_is(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """Whether these are plain numbers in order, of one type, on the CPU, and nobody wants to know how they came."""
    return (
        hidden.is_cpu
        and weight.is_cpu
        and hidden.dtype is weight.dtype
        and type(hidden) in _PLAIN
        and type(weight) in _PLAIN
        and weight.is_contiguous()
        and hidden.shape[-1:] == weight.shape[1:]
        and (bias is None or _fits(bias, weight))
        and not torch.is_autocast_enabled("cpu")
        and not (torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad))
    )


def _fits(bias: torch.Tensor, weight: torch.Tensor) -> bool:
    return bias.is_cpu and bias.dtype is weight.dtype and bias.is_contiguous() and len(bias) == len(weight)


def _few_rows(
    rows: int, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    height, width = weight.shape
    hidden = hidden.contiguous()
    out = hidden.new_empty((*hidden.shape[:-1], height))
    _core.few_rows(
        _NAMES[hidden.dtype],
        weight.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        hidden.data_ptr(),
        out.data_ptr(),
        rows,
        height,
        width,
        torch.get_num_threads(),
    )
    return out
