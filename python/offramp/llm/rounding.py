"""Weights rounded to eight bits, for heads in use: a step over few rows takes as long as its weights take to be read.

For `heads`; the products are `few`'s.
"""

from __future__ import annotations

import torch
from torch import nn

from offramp.llm import few
from offramp.llm.few import Narrow

_LARGEST = 127


@torch.no_grad()
def round_to_bytes(weight: torch.Tensor) -> Narrow:
    """Whole numbers q and scales s with which ``q[o, i] * s[o]`` is next to a weight (O, I), at most ``s[o] / 2`` off.

    The largest of a row becomes 127 or next to it.  Scales have eight significant bits, so that what the whole numbers
    stand for is exact in float32: to multiply with either is the same there, but for the order of the sums.
    """
    wide = weight.float()
    least = torch.finfo(torch.bfloat16).tiny
    scales = (wide.abs().amax(dim=1) / _LARGEST).bfloat16().float().clamp(min=least)
    values = (wide / scales[:, None]).round().clamp(-_LARGEST, _LARGEST)
    # What is no number makes a scale that is none, by which all of the row is told from numbers.
    return Narrow(values.nan_to_num(0).to(torch.int8), scales)


def round_linear(linear: nn.Linear) -> None:
    """Round the weight of a linear map, and keep the whole numbers as its ``narrow`` where `few` multiplies by them."""
    linear.weight.data, narrow = rounded(linear.weight)
    # The name under which `few.Linear.of` finds it; not a buffer, which a change of dtype would change.
    linear.narrow = narrow  # type: ignore[assignment]  # modules are typed to hold tensors and modules


@torch.no_grad()
def rounded(weight: torch.Tensor) -> tuple[torch.Tensor, Narrow | None]:
    """Give a weight (O, I) as it is after rounding, and the whole numbers where `few` multiplies by them."""
    narrow = round_to_bytes(weight)
    wide = (narrow.values * narrow.scales[:, None]).to(weight.dtype)
    return wide, narrow if few.IS_FAST and weight.is_cpu else None
