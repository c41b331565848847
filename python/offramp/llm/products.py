"""Linear maps by the product that is fastest for so many rows.

For `lean`, `trunk` and `heads`, and for `training`, which asks about bfloat16.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from offramp.llm import few

_PROCESSOR: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
BFLOAT16_PRODUCTS = bool(_PROCESSOR.get("amx_bf16") or _PROCESSOR.get("avx512_bf16"))
"""Whether the processor multiplies bfloat16 faster than float32: with AMX ten times, with AVX-512 twice."""

# Without AVX-512 torch multiplies 16-bit numbers row by row: from 4 rows on, a float32 copy of each weight for the
# moment of the product is faster (40 rows: 5 times).
WIDENS_HALVES = torch.backends.mkl.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX2"
"""Whether several rows of 16-bit numbers are multiplied in float32."""
_WORTH_WIDENING = 4
# Rows of a weight that are widened at a time, so that they stay in the processor's cache.
_PART = 2048


def linear(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    narrow: few.Narrow | None = None,
) -> torch.Tensor:
    """``functional.linear`` over rows (..., H), by the product that is fastest for so many; takes a `few.Linear`."""
    rows = hidden.numel() // hidden.shape[-1]
    if few.are_few(hidden) and _fit(hidden := hidden.contiguous(), one := few.Linear(weight, bias, narrow)):
        return few.multiply(hidden, one)
    if rows < _WORTH_WIDENING or not widens(hidden):
        return functional.linear(hidden, weight, bias)
    columns = hidden.reshape(rows, -1).T.float()
    found = torch.cat([torch.mm(part.float(), columns) for part in weight.split(_PART)]).to(hidden.dtype)
    found = found.T.contiguous().view(*hidden.shape[:-1], -1)
    return found if bias is None else found + bias


def widens(hidden: torch.Tensor) -> bool:
    """Whether several rows like these are multiplied in float32, and faster so than by a module of torch."""
    return WIDENS_HALVES and hidden.dtype in (torch.bfloat16, torch.float16) and hidden.device.type == "cpu"


def _fit(hidden: torch.Tensor, linear: few.Linear) -> bool:
    """Whether these are what a product in the core takes; torch says what is wrong with others."""
    weight, bias, _ = linear
    given = (hidden, weight) if bias is None else (hidden, weight, bias)
    fits = linear.has_shape(len(weight), hidden.shape[-1])
    return fits and len(weight) > 0 and few.are_plain(hidden.dtype, given)
