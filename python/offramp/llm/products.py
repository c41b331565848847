"""Linear maps over few rows, by the product that reads weights fastest.

A step of decoding multiplies every weight with one row or a few, and costs what reading the weights costs.  Libraries
are made for many rows; which of their products reads a weight at the speed of memory differs between processors.
For `lean`, `trunk` and `heads`, and for `training`, which asks about bfloat16.
"""

from __future__ import annotations

import time
from functools import cache
from typing import Any

import torch
from torch.nn import functional

_HALVES = (torch.bfloat16, torch.float16)
_FEW = 8
_PROCESSOR: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
MATRIX_UNITS = bool(_PROCESSOR.get("amx_bf16"))
"""Whether the processor has units for matrices of bfloat16 (AMX), which multiply ten times as fast as float32."""
BFLOAT16_PRODUCTS = MATRIX_UNITS or bool(_PROCESSOR.get("avx512_bf16"))
"""Whether it multiplies bfloat16 faster than float32 at all: with AVX-512 alone twice as fast."""
# With matrix units a few rows of bfloat16 are faster as columns, by a fifth, unless the weight has fewer rows than this.
_WIDE = 512
# Without AVX-512 torch multiplies 16-bit numbers row by row: from 4 rows on, a float32 copy of each weight for the
# moment of the product is faster (40 rows: 5 times).
WIDENS_HALVES = torch.backends.mkl.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX2"
"""Whether several rows of 16-bit numbers are multiplied in float32."""
_WORTH_WIDENING = 4
# Rows of a weight that are widened at a time, so that they stay in the processor's cache.
_PART = 2048
# Columns have to be so much faster than rows, for the choice not to hang on noise.
_CLEARLY = 1.25


def linear(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """``functional.linear`` over rows (..., H), by the product that is fastest for so many."""
    rows = hidden.numel() // hidden.shape[-1]
    if hidden.device.type != "cpu" or not _slow(rows, hidden.dtype, len(weight)):
        return functional.linear(hidden, weight, bias)
    flat = hidden.reshape(rows, -1)
    if hidden.dtype in _HALVES and WIDENS_HALVES:
        columns = flat.T.float()
        found = torch.cat([torch.mm(part.float(), columns) for part in weight.split(_PART)]).to(hidden.dtype)
    else:
        found = _by_columns(flat, weight)
    found = found.T.reshape(*hidden.shape[:-1], -1)
    return found if bias is None else found + bias


def _slow(rows: int, dtype: torch.dtype, height: int) -> bool:
    """Whether ``functional.linear`` of so many rows with a weight of so many is not the fastest."""
    if dtype == torch.float32:
        return 0 < rows <= _FEW and _columns_pay(1 if rows == 1 else _FEW // 2, torch.get_num_threads())
    if WIDENS_HALVES:
        return rows >= _WORTH_WIDENING and dtype in _HALVES
    return MATRIX_UNITS and 1 < rows <= _FEW and dtype == torch.bfloat16 and height >= _WIDE


def _by_columns(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Product (S, n) of a weight (S, H) with rows (n, H) as its columns.

    A single one goes twice: with one column MKL takes its product of matrix and vector, on one thread.
    """
    if len(rows) == 1:
        return torch.mm(weight, torch.cat((rows, rows)).T)[:, :1].contiguous()
    return torch.mm(weight, rows.T)


@cache
@torch.inference_mode()
def _columns_pay(rows: int, threads: int) -> bool:  # noqa: ARG001 - the answer is kept for each number of threads
    """Whether so many rows of float32 are multiplied clearly faster as columns, by trying both for some milliseconds.

    MKL's product of few rows takes as long as several of one on some processors, and that of one a single thread
    (measured on AMD's: Zen 3 1.1 to 4 times as long, Zen 4 3 to 4 times); on others rows are as fast.
    """
    # Together larger than most caches, as the weights of a model are.
    weights = torch.ones(8, 1536, 576)
    hidden = torch.ones(rows, 576)

    def fastest(product: Any) -> float:
        taken = []
        for _ in range(4):
            start = time.perf_counter()
            for weight in weights:
                product(hidden, weight)
            taken.append(time.perf_counter() - start)
        return min(taken)

    return fastest(functional.linear) > _CLEARLY * fastest(_by_columns)
