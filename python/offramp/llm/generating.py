"""The model writing its own text: batched continuation of prompts by the whole, frozen model.

For `data` (training tokens, with hidden states) and `model` (calibration text); exits play no part here.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from offramp.llm.cache import GrowingCache
from offramp.llm.sequences import TokenSequence, left_pad
from offramp.llm.trunk import Trunk, positions_from_mask


@dataclass
class Continuations:
    """A batch of continued prompts.

    Attributes
    ----------
    sequences : list of TokenSequence
        Prompt and continuation of each row, the end-of-sequence token included.
    exits : dict of (n, H)
        Residual after each captured layer at the position that predicted each generated token; rows in the order of
        ``sequences``, each sequence from its first token to its last.
    final : (n, H) or None
        Residual after the last layer at those positions.
    """

    sequences: list[TokenSequence]
    exits: dict[int, torch.Tensor] = field(default_factory=dict)
    final: torch.Tensor | None = None


@torch.no_grad()
def continue_prompts(
    trunk: Trunk,
    prompts: Sequence[torch.Tensor],
    *,
    max_new_tokens: int,
    end_tokens: Sequence[int] = (),
    temperatures: Sequence[float] | None = None,
    generator: torch.Generator | None = None,
    capture: Sequence[int] | None = None,
) -> Continuations:
    """Continue prompts, sampling or greedily, in one left-padded batch.

    Parameters
    ----------
    prompts
        Token ids (T,) of each row.
    max_new_tokens
        Tokens to generate a row, unless it ends before or its context window is full.
    end_tokens
        Tokens that end a row.
    temperatures
        Sampling temperature of each row, 0 for greedy; default all greedy.
    generator
        Source of randomness, on the CPU.
    capture
        Exit layers whose hidden states to keep, with those of the last layer; ``None`` keeps none.

    Returns
    -------
    Continuations
        The rows in the order of the prompts.
    """
    state = _Batch(trunk, prompts, temperatures, generator)
    bounds = (0, *(capture or ()), trunk.num_layers)
    room = trunk.max_positions - max(len(row) for row in prompts)
    for _ in range(min(max_new_tokens, room)):
        hidden = state.next_inputs()
        kept = []
        for first, last in itertools.pairwise(bounds):
            hidden = state.run(hidden, first, last)
            kept.append(hidden[:, -1])
        state.append(trunk.logits(kept[-1]), kept if capture is not None else None)
        if state.drop_finished(end_tokens):
            break
    return state.result(prompts, capture)


class _Batch:
    """The rows still being continued, and what has been kept of all of them."""

    def __init__(
        self,
        trunk: Trunk,
        prompts: Sequence[torch.Tensor],
        temperatures: Sequence[float] | None,
        generator: torch.Generator | None,
    ) -> None:
        tokens, mask = left_pad(prompts, pad=0)
        self.trunk = trunk
        self.cache: GrowingCache = trunk.new_cache()
        self.generator = generator
        self.mask = None if mask is None else mask.to(trunk.device)
        self.positions = positions_from_mask(torch.ones_like(tokens) if mask is None else mask).to(
            trunk.device
        )
        self.temperatures = torch.tensor(list(temperatures) if temperatures else [0.0] * len(prompts))
        self.rows = torch.arange(len(prompts))
        self._inputs = tokens.to(trunk.device)
        self._emitted: list[list[int]] = [[] for _ in prompts]
        # One entry a step: the rows that were alive, and their hidden states a captured layer.
        self._kept: list[tuple[torch.Tensor, list[torch.Tensor]]] = []

    def next_inputs(self) -> torch.Tensor:
        return self.trunk.embed(self._inputs, self.positions[:, -self._inputs.shape[1] :])

    def run(self, hidden: torch.Tensor, first: int, last: int) -> torch.Tensor:
        positions = self.positions[:, -hidden.shape[1] :]
        return self.trunk.run(
            hidden, first, last, cache=self.cache, positions=positions, attention_mask=self.mask
        )

    def append(self, logits: torch.Tensor, kept: list[torch.Tensor] | None) -> None:
        tokens = _pick(logits.float().cpu(), self.temperatures, self.generator)
        for row, token in zip(self.rows.tolist(), tokens.tolist(), strict=True):
            self._emitted[row].append(token)
        if kept is not None:
            self._kept.append((self.rows, kept))
        self._inputs = tokens.to(self.trunk.device)[:, None]
        self.positions = torch.cat([self.positions, self.positions[:, -1:] + 1], dim=1)
        if self.mask is not None:
            self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.rows), 1)], dim=1)

    def drop_finished(self, end_tokens: Sequence[int]) -> bool:
        """Take rows that just ended out of the batch; tell whether none is left."""
        last = [self._emitted[row][-1] for row in self.rows.tolist()]
        alive = torch.tensor([token not in end_tokens for token in last])
        if bool(alive.all()):
            return False
        self.rows, self.temperatures = self.rows[alive], self.temperatures[alive]
        places = alive.nonzero().flatten().to(self.trunk.device)
        self._inputs, self.positions = self._inputs[places], self.positions[places]
        self.mask = None if self.mask is None else self.mask[places]
        self.cache.batch_select_indices(places)
        return len(self.rows) == 0

    def result(self, prompts: Sequence[torch.Tensor], capture: Sequence[int] | None) -> Continuations:
        sequences = [
            TokenSequence(torch.cat([prompt, torch.tensor(new, dtype=torch.int64)]), len(prompt))
            for prompt, new in zip(prompts, self._emitted, strict=True)
        ]
        if capture is None:
            return Continuations(sequences)
        # Steps were kept in the order of time; a stable sort by row puts each sequence together.
        order = torch.cat([rows for rows, _ in self._kept]).argsort(stable=True)
        states = [
            torch.cat(layer)[order.to(layer[0].device)]
            for layer in zip(*(k for _, k in self._kept), strict=True)
        ]
        return Continuations(sequences, dict(zip(capture, states[:-1], strict=True)), states[-1])


def _pick(
    logits: torch.Tensor, temperatures: torch.Tensor, generator: torch.Generator | None
) -> torch.Tensor:
    """Next token of every row: argmax where the temperature is 0, else a sample."""
    tokens = logits.argmax(dim=-1)
    warm = temperatures > 0
    if bool(warm.any()):
        scaled = (logits[warm] / temperatures[warm, None]).softmax(dim=-1)
        tokens[warm] = torch.multinomial(scaled, 1, generator=generator).squeeze(1)
    return tokens
