"""Linear maps over few rows, by the product that reads weights fastest.

A step of decoding multiplies every weight with one row or a few, and costs what reading the weights costs.  Libraries
are made for many rows; which of their products reads a weight at the speed of memory differs between processors.
For `lean`, `trunk` and `heads`, and for `training`, which asks about bfloat16.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

_HALVES = (torch.bfloat16, torch.float16)
_FEW = 8
_PROCESSOR: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
_WIDTH = torch.backends.cpu.get_cpu_capability()
MATRIX_UNITS = bool(_PROCESSOR.get("amx_bf16"))
"""Whether the processor has units for matrices of bfloat16 (AMX), which multiply ten times as fast as float32."""
BFLOAT16_PRODUCTS = MATRIX_UNITS or bool(_PROCESSOR.get("avx512_bf16"))
"""Whether it multiplies bfloat16 faster than float32 at all: with AVX-512 alone twice as fast."""

# With matrix units a few rows of bfloat16 are faster as columns, by a fifth, but for weights of fewer rows than this.
_WIDE = 512
# Without AVX-512 torch multiplies 16-bit numbers row by row: from 4 rows on, a float32 copy of each weight for the
# moment of the product is faster (40 rows: 5 times).
WIDENS_HALVES = torch.backends.mkl.is_available() and _WIDTH == "AVX2"
"""Whether several rows of 16-bit numbers are multiplied in float32."""
_WORTH_WIDENING = 4
# Rows of a weight that are widened at a time, so that they stay in the processor's cache.
_PART = 2048


def _least_as_columns() -> int | None:
    """How many rows of float32, at least, are multiplied faster as columns; ``None`` where none are.

    Not tried out at run time: products round differently, and the same machine should write the same text.  On AMD's
    processors MKL takes as long for few rows as for several single ones, and one thread for one.  Measured with two
    threads, weights of 192 to 49152 rows: on Zen 4 a row takes 1.7 to 4 times as long as columns, 2 to 8 rows 1.5 to 9
    times; on Zen 3, with AVX2, 2 to 8 rows 1.1 to 4 times.
    """
    if not torch.backends.mkl.is_available():
        return None
    if _WIDTH == "AVX512" and str(_PROCESSOR.get("cpu_name")).startswith("AMD"):
        return 1
    return 2 if _WIDTH == "AVX2" else None


_AS_COLUMNS_FROM = _least_as_columns()


def _most_without_onednn() -> int:
    """How many rows of bfloat16, at most, torch multiplies faster by itself than through oneDNN.

    On AMD's processors with AVX-512 BF16 (Zen 5, two threads, torch 2.15, weights of 192 to 49152 rows read from
    memory) a single row takes .43 to .7 of the time, two .46 to .92, four already as long or longer.  On Intel's with
    AMX large weights take twice as long.
    """
    fast = bool(_PROCESSOR.get("avx512_bf16")) and str(_PROCESSOR.get("cpu_name")).startswith("AMD")
    return 2 if fast and torch.__version__ >= "2.15" else 0


_WITHOUT_ONEDNN = _most_without_onednn()


def linear(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """``functional.linear`` over rows (..., H), by the product that is fastest for so many."""
    rows = hidden.numel() // hidden.shape[-1]
    if hidden.device.type == "cpu" and hidden.dtype == torch.bfloat16 and rows <= _WITHOUT_ONEDNN:
        return _without_onednn(hidden, weight, bias)
    if hidden.device.type != "cpu" or not _slow(rows, hidden.dtype, len(weight)):
        return functional.linear(hidden, weight, bias)
    flat = hidden.reshape(rows, -1)
    if widens(hidden):
        columns = flat.T.float()
        found = torch.cat([torch.mm(part.float(), columns) for part in weight.split(_PART)]).to(hidden.dtype)
    else:
        found = _by_columns(flat, weight)
    found = found.T.contiguous().view(*hidden.shape[:-1], -1)
    return found if bias is None else found + bias


def widens(hidden: torch.Tensor) -> bool:
    """Whether several rows like these are multiplied in float32, and faster so than by a module of torch."""
    return WIDENS_HALVES and hidden.dtype in _HALVES and hidden.device.type == "cpu"


def _slow(rows: int, dtype: torch.dtype, height: int) -> bool:
    """Whether ``functional.linear`` of so many rows with a weight of so many is not the fastest."""
    if dtype == torch.float32:
        return _AS_COLUMNS_FROM is not None and _AS_COLUMNS_FROM <= rows <= _FEW
    if WIDENS_HALVES:
        return rows >= _WORTH_WIDENING and dtype in _HALVES
    return MATRIX_UNITS and 1 < rows <= _FEW and dtype == torch.bfloat16 and height >= _WIDE


def _without_onednn(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """``functional.linear`` by torch's own product.

    The switch is the process's: what other threads multiply meanwhile may go the same way, and round differently.  It
    is turned back only by who turned it, so that threads cannot leave it off.  The public way to turn it takes as
    long as a small product.
    """
    if not torch._C._get_mkldnn_enabled():
        return functional.linear(hidden, weight, bias)
    torch._C._set_mkldnn_enabled(False)
    try:
        return functional.linear(hidden, weight, bias)
    finally:
        torch._C._set_mkldnn_enabled(True)


def _by_columns(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Product (S, n) of a weight (S, H) with rows (n, H) as its columns.

    A single one goes twice: with one column MKL takes its product of matrix and vector, on one thread.
    """
    columns = torch.cat((rows, rows)).T if len(rows) == 1 else rows.T
    return torch.mm(weight, columns)[:, : len(rows)]
