"""Hidden states kept between scorings of the same benchmarks, up to a budget.  For `harness` and `stages`."""

from __future__ import annotations

import torch

BUDGET = 2 << 30
"""Bytes of hidden states that are kept at most."""

States = tuple[dict[int, torch.Tensor], torch.Tensor]


class Remembered(dict[bytes, States]):
    """Hidden states after every exit and after the last layer, by their tokens.

    Parameters
    ----------
    budget : int
        Bytes; states that would pass it are not kept, so that they are computed anew when they are asked for.

    Attributes
    ----------
    kept : int
        Bytes that are kept.
    full : bool
        Whether something was not.
    """

    def __init__(self, budget: int) -> None:
        super().__init__()
        self.budget, self.kept, self.full = budget, 0, False

    def __setitem__(self, tokens: bytes, states: States) -> None:
        """Keep states if there is room."""
        exits, final = states
        size = sum(tensor.nbytes for tensor in (*exits.values(), final))
        if self.kept + size <= self.budget:
            self.kept += size
            super().__setitem__(tokens, states)
        else:
            self.full = True
