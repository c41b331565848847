"""The model writing its own text: batched continuation of prompts by the whole, frozen model.

For `data` (training tokens, with hidden states) and `model` (calibration text); exits play no part here.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from offramp.llm.cache import GrowingCache
from offramp.llm.sequences import TokenSequence, left_pad
from offramp.llm.trunk import Trunk, not_numbers, positions_from_mask

TOP = 8
"""Number of the model's first choices kept for every token; the shortlist is chosen from them."""

# Rows that have ended stay in the batch until they are so large a share of it: taking them out moves all keys and
# values of the others, which costs more than to carry a few along.
_CARRIED = 1 / 8
# A prefix shared by all prompts (a chat template's beginning) is run once; below this it is not worth a pass.
_LEAST_SHARED = 8
# Logits that a CPU reads together: so many stay in its cache, and take no new memory every time.
_READ_TOGETHER = 1 << 18


@dataclass
class Continuations:
    """A batch of continued prompts.

    Attributes
    ----------
    sequences : list of TokenSequence
        Prompt and continuation of each row, the end-of-sequence token included.
    exits : dict of list of (T - 1, H)
        For each captured layer and sequence the residual after it at every token but the last, which predicts
        nothing.
    final : list of (n, H)
        For each sequence the residual after the last layer at the positions that predicted its n generated tokens.
    log_normalizer : list of (n,)
        Log of the sum of the exponentials of the model's logits there.
    top : list of (n, 8) int32
        The model's first choices there.
    """

    sequences: list[TokenSequence]
    exits: dict[int, list[torch.Tensor]] = field(default_factory=dict)
    final: list[torch.Tensor] = field(default_factory=list)
    log_normalizer: list[torch.Tensor] = field(default_factory=list)
    top: list[torch.Tensor] = field(default_factory=list)


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
    state = _Batch(trunk, prompts, temperatures, generator, capture)
    for _ in range(max_new_tokens):
        state.step()
        if state.drop_finished(end_tokens):
            break
    return state.result(prompts)


@dataclass
class _Kept:
    """What one step leaves: whose row is whose, their states a segment, and what the model said."""

    rows: torch.Tensor
    states: list[torch.Tensor]
    log_normalizer: torch.Tensor
    top: torch.Tensor


class _Batch:
    """The rows still being continued, and what has been kept of all of them.

    Rows that have ended belong to nobody, a number one past the last prompt's, until they are taken out.
    """

    def __init__(
        self,
        trunk: Trunk,
        prompts: Sequence[torch.Tensor],
        temperatures: Sequence[float] | None,
        generator: torch.Generator | None,
        capture: Sequence[int] | None,
    ) -> None:
        self.trunk = trunk
        self.cache: GrowingCache = trunk.new_cache()
        self.generator = generator
        self.capture = capture
        self.temperatures = torch.tensor(list(temperatures) if temperatures else [0.0] * len(prompts))
        self.rows = torch.arange(len(prompts))
        self._room = [*(trunk.max_positions - len(prompt) for prompt in prompts), 0]
        self._bounds = (0, *(capture or ()), trunk.num_layers)
        self._nobody = len(prompts)
        self._emitted: list[list[int]] = [[] for _ in range(self._nobody + 1)]
        self._kept: list[_Kept] = []
        # Padding after a shared prefix would count as positions within a window.
        self._shared = 0 if trunk.forgets else _shared_length(prompts)
        tokens, mask = left_pad([prompt[self._shared :] for prompt in prompts], pad=0)
        self._inputs = tokens.to(trunk.device)
        whole = torch.ones(len(prompts), self._shared + tokens.shape[1], dtype=torch.int64)
        if mask is not None:
            # The padding lies between the shared prefix and what is a row's own.
            whole[:, self._shared :] = mask
        self.mask = None if mask is None else whole.to(trunk.device)
        self.positions = positions_from_mask(whole).to(trunk.device)
        self._prefix = self._run_shared(prompts[0][: self._shared]) if self._shared else []

    def step(self) -> None:
        """Write one token to every row."""
        states = self._run(self._inputs, self.positions[:, -self._inputs.shape[1] :], self.mask)
        logits = self.trunk.logits(states[-1][:, -1])
        if self.capture is not None:
            top = logits.topk(min(TOP, logits.shape[-1]), dim=-1).indices.int()
            self._kept.append(_Kept(self.rows, states, _log_normalizer(logits), top))
        tokens = _pick(logits.cpu(), self.temperatures, self.generator)
        for row, token in zip(self.rows.tolist(), tokens.tolist(), strict=True):
            self._emitted[row].append(token)
        self._inputs = tokens.to(self.trunk.device)[:, None]
        # Only rows of nobody come to the end of the window.
        later = (self.positions[:, -1:] + 1).clamp(max=self.trunk.max_positions - 1)
        self.positions = torch.cat([self.positions, later], dim=1)
        if self.mask is not None:
            self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.rows), 1)], dim=1)

    def drop_finished(self, end_tokens: Sequence[int]) -> bool:
        """Take rows out of the batch that just ended or filled their context window; tell whether none is left."""
        emitted = [(row, self._emitted[row]) for row in self.rows.tolist()]
        alive = torch.tensor(
            [new[-1] not in end_tokens and len(new) < self._room[row] for row, new in emitted]
        )
        self.rows = torch.where(alive, self.rows, self._nobody)
        left = int(alive.sum())
        if left >= (1 - _CARRIED) * len(alive):
            return False
        self.rows, self.temperatures = self.rows[alive], self.temperatures[alive]
        places = alive.nonzero().flatten().to(self.trunk.device)
        self._inputs, self.positions = self._inputs[places], self.positions[places]
        self.mask = None if self.mask is None else self.mask[places]
        self.cache.batch_select_indices(places)
        return left == 0

    def result(self, prompts: Sequence[torch.Tensor]) -> Continuations:
        sequences = [
            TokenSequence(torch.cat([prompt, torch.tensor(new, dtype=torch.int64)]), len(prompt))
            for prompt, new in zip(prompts, self._emitted[:-1], strict=True)
        ]
        if self.capture is None:
            return Continuations(sequences)
        states = [self._states(index, sequences) for index in range(len(self._bounds) - 1)]
        final = [rows[-item.generated :] for rows, item in zip(states[-1], sequences, strict=True)]
        return Continuations(
            sequences,
            dict(zip(self.capture, states[:-1], strict=True)),
            final,
            self._by_row([kept.log_normalizer for kept in self._kept]),
            self._by_row([kept.top for kept in self._kept]),
        )

    def _run(
        self, tokens: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor | None
    ) -> list[torch.Tensor]:
        """Output (B, q, H) of every segment, of the last alone where nothing is captured."""
        hidden = self.trunk.embed(tokens, positions)
        states = []
        for first, last in itertools.pairwise(self._bounds):
            hidden = self.trunk.run(
                hidden, first, last, cache=self.cache, positions=positions, attention_mask=mask
            )
            states.append(hidden)
        return states

    def _run_shared(self, prefix: torch.Tensor) -> list[torch.Tensor]:
        """Run the prefix once for all rows; returns its states (q, H) after every segment."""
        tokens = prefix[None].to(self.trunk.device)
        positions = torch.arange(len(prefix), device=self.trunk.device)[None]
        states = self._run(tokens, positions, None)
        self.cache.batch_repeat_interleave(len(self.rows))
        return [hidden[0] for hidden in states]

    def _states(self, segment: int, sequences: Sequence[TokenSequence]) -> list[torch.Tensor]:
        """Output (T - 1, H) of a segment for every row, from the prefix over the prompt to the last step."""
        first, *later = [kept.states[segment] for kept in self._kept]
        own = [item.prompt_length - self._shared for item in sequences]
        steps = self._by_row([first[:, :0].flatten(0, 1), *(hidden[:, 0] for hidden in later)], first=1)
        prefix = self._prefix[segment] if self._shared else first[0, :0]
        return [
            torch.cat([prefix, first[row, first.shape[1] - length :], steps[row]])
            for row, length in enumerate(own)
        ]

    def _by_row(self, steps: list[torch.Tensor], first: int = 0) -> list[torch.Tensor]:
        """Values (rows, ...) of each step, from step ``first`` on, put together by row; those of nobody left out."""
        rows = torch.cat([self.rows[:0], *(kept.rows for kept in self._kept[first:])])
        counts = rows.bincount(minlength=len(self._emitted)).tolist()
        # Steps were kept in the order of time; a stable sort by row puts each sequence together.
        together = torch.cat(steps)[rows.argsort(stable=True).to(steps[0].device)]
        return list(together.split(counts))[:-1]


def _shared_length(prompts: Sequence[torch.Tensor]) -> int:
    """Tokens all prompts begin with, one left for each of its own; 0 where sharing them is not worth it."""
    length = min(len(row) for row in prompts) - 1
    beginnings = torch.stack([row[:length] for row in prompts])
    differs = (beginnings != beginnings[0]).any(dim=0).nonzero().flatten()
    shared = int(differs[0]) if len(differs) else length
    return shared if shared >= _LEAST_SHARED and len(prompts) > 1 else 0


def _log_normalizer(logits: torch.Tensor) -> torch.Tensor:
    """Log of the sum of the exponentials of each row (n, V), float32."""
    rows = max(1, _READ_TOGETHER // logits.shape[-1]) if logits.device.type == "cpu" else len(logits)
    return torch.cat([part.float().logsumexp(dim=-1) for part in logits.split(rows)])


def _pick(
    logits: torch.Tensor, temperatures: torch.Tensor, generator: torch.Generator | None
) -> torch.Tensor:
    """Next token of every row: argmax where the temperature is 0, else a sample."""
    largest, tokens = logits.max(dim=-1)
    if bool(largest.isnan().any()):
        raise not_numbers("its last layer")
    warm = temperatures > 0
    if bool(warm.any()):
        tokens[warm] = _sample(logits[warm].float(), temperatures[warm], generator)
    return tokens


def _sample(
    logits: torch.Tensor, temperatures: torch.Tensor, generator: torch.Generator | None
) -> torch.Tensor:
    """Draw a token a row by inversion: one random number, where ``multinomial`` takes one for every token.

    In the memory of the logits (n, V), float32: to ask for as much anew takes as long as to go through it.
    """
    weights = logits.sub_(logits.amax(dim=-1, keepdim=True)).div_(temperatures[:, None]).exp_()
    # numpy adds up in float64 without a copy of the weights in it.
    sums = torch.from_numpy(np.cumsum(weights.numpy(), axis=-1, dtype=np.float64))
    drawn = torch.rand(len(sums), 1, dtype=torch.float64, generator=generator) * sums[:, -1:]
    return torch.searchsorted(sums, drawn, right=True).squeeze(1).clamp_(max=logits.shape[-1] - 1)
