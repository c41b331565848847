"""Hidden states of whole sequences by one teacher-forced pass.

For `data` (training on the user's own text) and `scoring`; needs `trunk` and `sequences`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from offramp.llm.sequences import TokenSequence, batches_by_length
from offramp.llm.trunk import Trunk

Progress = Callable[[str, int, int], None]
"""Called as ``progress(stage, done, total)``; may raise to stop the work."""

Picked = tuple[torch.Tensor, torch.Tensor]
"""Sequence and position (n,), int64, of each row of interest in states (B, T, H)."""

_TOKENS_PER_BATCH = 2048


@dataclass(frozen=True, eq=False)
class States:
    """What the model holds for a few sequences, and where it predicts their n generated tokens.

    Attributes
    ----------
    exits : dict of (B, T, H)
        The residual after each exit layer at every token, padded on the right.
    picked : (n,), (n,) int64
        Row and position, in ``exits``, that predict the generated tokens.
    final : (n, H)
        The residual after the last layer, before the final norm, at those.
    emitted : (n,) int64
        The token the sequence has next.
    groups : (n,) int64
        Index of the sequence each prediction came from.
    positions : (n,) int64
        Index, within its sequence, of the token in ``emitted``.
    members : list of int
        Index of the sequence in each of the B rows.
    """

    exits: dict[int, torch.Tensor]
    picked: Picked
    final: torch.Tensor
    emitted: torch.Tensor
    groups: torch.Tensor
    positions: torch.Tensor
    members: list[int]


@torch.no_grad()
def teacher_forced(
    trunk: Trunk,
    sequences: Sequence[TokenSequence],
    layers: Sequence[int],
    *,
    progress: Progress | None = None,
    stage: str = "reading",
) -> Iterator[States]:
    """Run the model once over ``sequences`` and yield `States`, a batch at a time, in order of length."""
    done = 0
    for members, tokens in batches_by_length(sequences, _TOKENS_PER_BATCH):
        done += len(members)
        batch = [sequences[index] for index in members]
        rows = torch.cat([torch.full((item.generated,), row) for row, item in enumerate(batch)])
        places = torch.cat([torch.arange(item.prompt_length, len(item.tokens)) for item in batch])
        exits, last = _run_layers(trunk, tokens.to(trunk.device), layers)
        picked = (rows.to(trunk.device), places.to(trunk.device) - 1)
        groups = torch.tensor(members)[rows]
        yield States(exits, picked, last[picked], tokens[rows, places], groups, places, members)
        if progress is not None:
            progress(stage, done, len(sequences))


def _run_layers(
    trunk: Trunk, tokens: torch.Tensor, layers: Sequence[int]
) -> tuple[dict[int, torch.Tensor], torch.Tensor]:
    """States (B, T, H) after each of ``layers``, and after the last."""
    positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    cache = trunk.new_cache()
    hidden = trunk.embed(tokens, positions)
    exits = {}
    bounds = (0, *layers, trunk.num_layers)
    for first, last in itertools.pairwise(bounds):
        hidden = trunk.run(hidden, first, last, cache=cache, positions=positions)
        for layer in cache.growing[first:last]:
            layer.reset()
        exits[last] = hidden
    return exits, exits.pop(trunk.num_layers)
