"""What a monitor's bets have become, by definition: every sequence's new stakes, through all that follows."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

SHARES = [0.9 / 2**j for j in range(9)]


def kept(units: int) -> float:
    """Share of the capital not yet at stake."""
    return 0.5 / (1.0 + math.log(units)) if units else 1.0


def wealth(hits: Sequence[int], checked: Sequence[int], most: Sequence[int], rate: float) -> float:
    """Evidence against "it happens at no more than this rate" after all sequences; the capital was 1."""
    rows = [(h, n, limit) for h, n, limit in zip(hits, checked, most, strict=True) if n]
    total = kept(len(rows))
    for start in range(len(rows)):
        for share in SHARES:
            stake = (kept(start) - kept(start + 1)) / len(SHARES)
            for h, n, limit in rows[start:]:
                stake *= 1.0 + share * (h / (rate * limit) - n / limit)
            total += stake
    return total


def lower_bound(hits: Sequence[int], checked: Sequence[int], most: Sequence[int], delta: float) -> float:
    """Return the highest rate in steps of 1/200 up to which every one is refuted at level delta; 0 if none is."""
    found = 0.0
    for rate in np.arange(1, 200) / 200:
        if wealth(hits, checked, most, float(rate)) < 1.0 / delta:
            break
        found = float(rate)
    return found
