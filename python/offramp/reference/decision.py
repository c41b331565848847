"""The decision by definition: every float32 operation written out, in the order all instruction sets keep."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from offramp.decision import Decision, Margins, Tokens, read_logits, read_tau, widen
from offramp.errors import InputError

__all__ = ["Decision", "decide", "top2_margin"]

_LANES = 16
_BLOCK = 256

_WINDOW = np.float32(64)
_FLOOR = np.float32(-80)
_ROUNDER = np.float32(1.5 * 2**23 + 127)
_LOG2_E = np.float32(1.44269504)
_LN_2 = np.float32(0.6931472)
_C = [np.float32(c) for c in (0.4999923, 0.16667115, 0.04189033, 0.0083125)]


def top2_margin(logits: Any) -> tuple[Tokens, Margins]:
    """Find the most likely token and its top-2 softmax margin, as :func:`offramp.top2_margin` does."""
    rows = widen(read_logits(logits))
    if rows.ndim == 1:
        return _row(0, rows)
    token, margin = zip(*(_row(index, row) for index, row in enumerate(rows)), strict=True)
    return np.array(token, dtype=np.int64), np.array(margin, dtype=np.float32)


def decide(logits: Any, tau: ArrayLike) -> Decision:
    """Decide for each row which token it names and whether to exit, as :func:`offramp.decide` does."""
    token, margin = top2_margin(logits)
    if isinstance(margin, float):
        return Decision(token, margin, margin >= float(read_tau(tau, None)))
    return Decision(token, margin, margin.astype(np.float64) >= read_tau(tau, len(margin)))


def _row(index: int, row: NDArray[np.float32]) -> tuple[int, float]:
    faulty = np.isnan(row) | (row == np.inf)
    if faulty.any():
        first = int(faulty.argmax())
        raise InputError(
            f"logits must be finite or -inf, but row {index} holds {row[first]} at index {first}: repair it"
        )
    token = int(row.argmax())
    l1 = row[token]
    others = row.copy()
    others[token] = -np.inf
    if l1 == -np.inf:
        raise InputError(
            f"logits must leave a token to choose, but row {index} is -inf throughout: unmask one"
        )
    gap = _one_minus_exp(float(others.max()) - float(l1))
    return token, float(np.float32(gap / (1.0 + _sum_others(row, token))))


def _sum_others(row: NDArray[np.float32], token: int) -> float:
    """Sum exp(l - l1) over all but the token: float32 in a block of 16 x 16, float64 from block to block."""
    l1 = row[token]
    shift = np.float32(0) if -_WINDOW / 2 <= l1 < _WINDOW else np.rint(l1 / _WINDOW) * _WINDOW
    blocks = np.pad(row, (0, -len(row) % _BLOCK), constant_values=-np.inf).reshape(-1, _BLOCK)
    # accumulate, unlike sum, promises to add from the first to the last.
    total = np.add.accumulate(_sum_blocks(blocks, shift), axis=0)[-1]
    # In float32 the token's term would round all that it is added to, so its block is added anew.
    block = blocks[token // _BLOCK]
    total = total - _sum_blocks(block[None], shift)[0]
    block[token % _BLOCK] = -np.inf
    lanes = total + _sum_blocks(block[None], shift)[0]
    while len(lanes) > 1:
        lanes = lanes[0::2] + lanes[1::2]
    x = l1 - shift
    n = _mul_add(x, _LOG2_E, _ROUNDER) - _ROUNDER
    power: float = 2.0 ** float(n)
    largest = (1.0 + _expm1_near_zero(float(x) - float(n) * float(_LN_2))) * power
    return float(lanes[0]) / largest


def _sum_blocks(blocks: NDArray[np.float32], shift: np.float32) -> NDArray[np.float64]:
    """Sixteen lanes of each block (B, 256): in a lane, the terms are added as a balanced tree."""
    terms = _terms(blocks, shift).reshape(-1, _BLOCK // _LANES, _LANES)
    while terms.shape[1] > 1:
        terms = terms[:, 0::2] + terms[:, 1::2]
    return terms[:, 0].astype(np.float64)


def _terms(logits: NDArray[np.float32], shift: np.float32) -> NDArray[np.float32]:
    """exp(logit - shift); what lies below the floor counts as much as the floor."""
    with np.errstate(over="ignore"):  # what is -inf then lies below the floor
        x = np.maximum(logits - shift, _FLOOR)
    n = _mul_add(x, _LOG2_E, _ROUNDER) - _ROUNDER
    r = _mul_add(n, -_LN_2, x)
    r2 = r * r
    series = _mul_add(_mul_add(_C[3], r, _C[2]), r2, _mul_add(_C[1], r, _C[0]))
    power = np.ldexp(np.float32(1), n.astype(np.int32))
    return _mul_add(_mul_add(series, r2, r), power, power)


def _mul_add(a: Any, b: Any, c: Any) -> NDArray[np.float32]:
    """Multiply and add float32, ``a * b + c``, rounded once.

    The product is exact in float64; a sum that is not is rounded to odd, from where rounding to float32 is as rounding
    once (Boldo and Melquiond: Emulation of a FMA and correctly rounded sums, 2008).
    """
    product, c = np.float64(a) * np.float64(b), np.float64(c)
    total = np.asarray(product + c)
    added = total - product
    rest = (product - (total - added)) + (c - added)
    bits = total.view(np.int64)
    outwards = np.where((rest > 0) == (total > 0), 1, -1)
    odd = np.where((np.abs(rest) > 0) & (bits % 2 == 0), bits + outwards, bits)
    return odd.view(np.float64).astype(np.float32)


def _one_minus_exp(y: float) -> float:
    """1 - exp(y) for y <= 0, exact to a few ulps also near zero."""
    if y < -45.0:
        return 1.0
    n = float(np.rint(y * 1.4426950408889634))
    reduced = (y - n * 0.6931471803691238) - n * 1.9082149292705877e-10
    power: float = 2.0**n
    return (1.0 - power) - power * _expm1_near_zero(reduced)


def _expm1_near_zero(r: float) -> float:
    """exp(r) - 1 for |r| <= 0.35, by Taylor's series to r^13."""
    series = 1.0 / 6227020800
    for factorial in (479001600, 39916800, 3628800, 362880, 40320, 5040, 720, 120, 24, 6, 2, 1):
        series = series * r + 1.0 / factorial
    return series * r
