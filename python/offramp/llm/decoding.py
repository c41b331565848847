"""The step loop: run a segment, ask its head, stop or go deeper; keys and values stay exact.

A token that leaves early has no keys and values above its exit.  Its hidden state waits there until a later token
goes deeper; then all waiting positions run through the segment together.  Every layer runs at most once a kept token
and the cache is the full model's own for the emitted tokens (see ``docs/method.md``).
For `model`; needs `trunk`, `cache` and `heads`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import GenerationConfig, LogitsProcessorList
from transformers.generation.utils import GenerateDecoderOnlyOutput

from offramp.errors import InputError, OutOfMemoryError
from offramp.llm.auditing import Audit
from offramp.llm.heads import ExitHead
from offramp.llm.reading import Reader
from offramp.llm.staging import Stage
from offramp.llm.trunk import Trunk, not_numbers, positions_from_mask


@dataclass(frozen=True, eq=False)
class Exit:
    """A place to leave: after ``layer``, when the head's margin reaches ``threshold``."""

    layer: int
    head: ExitHead
    threshold: float


@dataclass
class GenerationStats:
    """What one call of `generate` did.

    Attributes
    ----------
    tokens : int
        New tokens, over all rows, padding of finished rows left out.
    tokens_by_exit : dict of int to int
        New tokens by the layer they left after; the number of layers where the whole model answered.
    layer_runs : int
        Times a decoder layer ran, over whatever rows and positions waited for it.
    rejected_drafts : int
        Early tokens taken back (0 in exit mode, which takes none back).
    seconds : float
        Wall time of the decoding loop.
    exit_layers : (B, new tokens) int64
        The layer every token left after; 0 for the padding of finished rows.
    """

    tokens: int = 0
    tokens_by_exit: dict[int, int] = field(default_factory=dict)
    layer_runs: int = 0
    rejected_drafts: int = 0
    seconds: float = 0.0
    exit_layers: torch.Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.int64))

    @classmethod
    def of(
        cls, exit_layers: torch.Tensor, rollout: Rollout, seconds: float, rejected: int = 0
    ) -> GenerationStats:
        """Count the exits (B, new tokens) of a finished rollout."""
        counts = {depth: int((exit_layers == depth).sum()) for depth in rollout.bounds[1:]}
        return cls(sum(counts.values()), counts, rollout.layer_runs, rejected, seconds, exit_layers)

    @property
    def mean_layers(self) -> float:
        """Mean depth of the exits, in layers a token; NaN without tokens."""
        total = sum(layer * count for layer, count in self.tokens_by_exit.items())
        return total / self.tokens if self.tokens else float("nan")

    @property
    def tokens_per_second(self) -> float:
        """New tokens a second of the decoding loop, prefill included."""
        return self.tokens / self.seconds if self.seconds else float("nan")

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "tokens": self.tokens,
            "tokens_by_exit": {str(layer): count for layer, count in self.tokens_by_exit.items()},
            "mean_layers": self.mean_layers if self.tokens else None,
            "layer_runs": self.layer_runs,
            "rejected_drafts": self.rejected_drafts,
            "seconds": self.seconds,
            "tokens_per_second": self.tokens_per_second if self.seconds else None,
            "exit_layers": self.exit_layers.tolist(),
        }


@dataclass
class EarlyExitOutput(GenerateDecoderOnlyOutput):
    """What `generate` returns with ``return_dict_in_generate=True``: transformers' output and two more fields.

    Attributes
    ----------
    exit_layers : (B, new tokens) int64
        The layer every new token left after; the number of layers where the whole model answered, 0 for padding.
    stats : GenerationStats
        Counts and time.
    """

    exit_layers: torch.Tensor | None = None
    stats: GenerationStats | None = None


@dataclass(eq=False)
class Step:
    """The outcome of one step: who answered for each row, and with what logits.

    Attributes
    ----------
    tokens : (B,) int64
        The answering head's first choice; 0 for rows that needed none.
    exits : (B,) int64, CPU
        Index of the answering exit, K for the whole model, -1 for rows that needed none.
    logits : list of (rows, logits, head)
        Raw logits by answering exit; the head is ``None`` for the whole model.
    """

    tokens: torch.Tensor
    exits: torch.Tensor
    logits: list[tuple[torch.Tensor, torch.Tensor, ExitHead | None]]

    def full_logits(self, vocab_size: int) -> torch.Tensor:
        """Float32 logits (B, V) of whoever answered; -inf where a head has no such token."""
        device = self.tokens.device
        full = torch.zeros(len(self.tokens), vocab_size, device=device)
        for rows, logits, head in self.logits:
            full[rows] = logits[rows].float() if head is None else head.scatter(logits[rows], vocab_size)
        return full


class Rollout:
    """The state of one generation: a cache whose segments may lag, and what waits before each of them.

    Parameters
    ----------
    exits
        The exits to ask, shallow to deep.  Heads whose threshold is inf are better left out: each costs a call.
    input_ids : (B, P) int64
        The prompts, left-padded.
    attention_mask : (B, P), optional
        0 at the padding; ``None`` without padding.
    max_pending
        Most positions that may wait before a segment after a step; ``None`` for no limit.
    audit
        Told what heads and model say in each other's place.
    """

    def __init__(
        self,
        trunk: Trunk,
        exits: Sequence[Exit],
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        max_pending: int | None = None,
        audit: Audit | None = None,
    ) -> None:
        self.trunk = trunk
        self.audit = audit
        self.exits = list(exits)
        self.bounds = (0, *(item.layer for item in self.exits), trunk.num_layers)
        self.cache = trunk.new_cache()
        self.readers = [Reader(item.head) for item in self.exits]
        self._stage = Stage.on(trunk.device)
        self.max_pending = max_pending
        self.layer_runs = 0
        self.mask = attention_mask
        self.positions = positions_from_mask(
            torch.ones_like(input_ids) if attention_mask is None else attention_mask
        )
        # What waits before each segment: inputs of a contiguous run of positions that ends with the newest.
        self._waiting: list[list[torch.Tensor]] = [[] for _ in self.bounds[1:]]
        self._waiting[0].append(trunk.embed(input_ids, self.positions))

    def feed(self, tokens: torch.Tensor) -> None:
        """Append one emitted token (B,) to every row."""
        self.positions = torch.cat([self.positions, self.positions[:, -1:] + 1], dim=1)
        if self.mask is not None:
            self.mask = torch.cat([self.mask, self.mask.new_ones(len(tokens), 1)], dim=1)
        self._waiting[0].append(self.trunk.embed(tokens[:, None], self.positions[:, -1:]))

    def step(self, needed: torch.Tensor) -> Step:
        """Find the next token of the ``needed`` rows (B,) bool, going only as deep as one of them asks for."""
        step, unanswered = self.ask(needed)
        if self.audit is not None:
            self.audit.note(step, needed, self.positions.shape[1] - 1)
        if unanswered.any():
            self.answer_whole(step, unanswered)
        return step

    def answer_whole(self, step: Step, rows: NDArray[np.bool_]) -> None:
        """Let the whole model answer rows (B,), also in the place of a head that did."""
        if self.audit is not None:
            self.audit.forget(rows, self.positions.shape[1] - 1)
        logits = next((logits for _, logits, head in step.logits if head is None), None)
        if logits is None:
            hidden = self.flush()
            assert hidden is not None
            logits = self.full_logits(hidden[:, -1])
        places = torch.from_numpy(np.flatnonzero(rows))
        chosen = logits.argmax(dim=-1)[places.to(logits.device)]
        self._answer(step, places, len(self.exits), chosen, logits, None)

    def ask(self, needed: torch.Tensor) -> tuple[Step, NDArray[np.bool_]]:
        """Ask the heads, from shallow to deep, until every needed row is answered; also tells which rows are not."""
        batch = len(needed)
        device = self.positions.device
        step = Step(torch.zeros(batch, dtype=torch.int64, device=device), torch.full((batch,), -1), [])
        unanswered = needed.cpu().numpy().copy()
        for index, item in enumerate(self.exits):
            if not unanswered.any():
                break
            self.run(index)
            logits = self.readers[index].answer(self.positions, self.mask)
            try:
                choice, reached = self._stage.exits(logits, item.threshold)
            except InputError as error:
                raise not_numbers(f"the head after layer {item.layer}") from error
            leaving = unanswered & reached
            if leaving.any():
                rows = torch.from_numpy(np.flatnonzero(leaving))
                chosen = item.head.tokens(torch.from_numpy(choice[leaving]).to(device))
                self._answer(step, rows, index, chosen, logits, item.head)
                unanswered &= ~reached
        return step, unanswered

    def run(self, segment: int) -> torch.Tensor:
        """Run a segment over everything that waits before it; returns its output (B, waiting, H), the newest last."""
        waiting = self._waiting[segment]
        hidden = waiting[0] if len(waiting) == 1 else torch.cat(waiting, dim=1)
        first, last = self.bounds[segment], self.bounds[segment + 1]
        filled = self.cache.length(first)
        positions = self.positions[:, filled : filled + hidden.shape[1]]
        try:
            hidden = self.trunk.run(
                hidden, first, last, cache=self.cache, positions=positions, attention_mask=self.mask
            )
        except BaseException as error:
            # A segment that failed has not run: its inputs still wait, and its layers are of one length again.
            self.cache.crop_to(first, last, filled)
            if _is_out_of_memory(error):
                raise OutOfMemoryError(
                    f"out of memory in layers {first + 1} to {last} over {hidden.shape[1]} positions of "
                    f"{len(hidden)} rows: use shorter prompts, fewer rows or a smaller max_pending"
                ) from error
            raise
        self.layer_runs += last - first
        self._waiting[segment] = []
        if segment < len(self.readers):
            self.readers[segment].see(hidden)
            self._waiting[segment + 1].append(hidden)
        elif self.audit is not None:
            self.audit.hear(self, hidden, filled)
        return hidden

    def full_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits (..., V) of the whole model for the last layer's output (..., H).

        Raises
        ------
        ModelError
            If they hold NaN.
        """
        logits = self.trunk.logits(hidden)
        if bool(logits.isnan().any()):
            raise not_numbers("its last layer")
        return logits

    def pending(self, segment: int) -> int:
        """Positions that wait before a segment."""
        return sum(part.shape[1] for part in self._waiting[segment])

    @property
    def unconfirmed(self) -> int:
        """Positions the last segment has yet to see, wherever they wait."""
        return self.positions.shape[1] - self.cache.length(self.trunk.num_layers - 1)

    def flush(self) -> torch.Tensor | None:
        """Run whatever waits, so that every layer has seen every fed token; returns what left the last layer."""
        hidden = None
        for segment in range(len(self._waiting)):
            if self._waiting[segment]:
                hidden = self.run(segment)
        return hidden

    def rewind(self, length: int) -> None:
        """Forget the positions from ``length`` on; nothing may be waiting."""
        assert not any(self._waiting)
        self.cache.crop_to(0, self.trunk.num_layers, length)
        for reader in self.readers:
            reader.crop(length)
        self.positions = self.positions[:, :length]
        if self.mask is not None:
            self.mask = self.mask[:, :length]

    def relieve(self) -> None:
        """Keep the number of waiting positions within its limit, from below upwards; done after a step."""
        if self.max_pending is None:
            return
        for segment in range(1, len(self._waiting)):
            if self.pending(segment) > self.max_pending:
                self.run(segment)
        self.relieve_heads(self.max_pending)

    def relieve_heads(self, limit: int) -> None:
        """Let heads with a memory read on where more than ``limit`` rows wait for them."""
        for reader in self.readers:
            if reader.waiting > limit:
                reader.catch_up(self.positions, self.mask)

    @staticmethod
    def _answer(
        step: Step,
        rows: torch.Tensor,
        index: int,
        tokens: torch.Tensor,
        logits: torch.Tensor,
        head: ExitHead | None,
    ) -> None:
        on_device = rows.to(step.tokens.device)
        step.tokens[on_device] = tokens
        step.exits[rows] = index
        step.logits.append((on_device, logits, head))


def _is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed; on the CPU torch says so in a RuntimeError of its own words."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    )


@torch.no_grad()
def decode(
    rollout: Rollout,
    input_ids: torch.Tensor,
    *,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: GenerationConfig,
    streamer: Any = None,
) -> EarlyExitOutput:
    """Generate with early exits, as transformers' own sampling loop does without.

    Processors and sampling act on the logits of whoever answered, after the exit is chosen from the raw logits.

    Parameters
    ----------
    rollout
        The state, holding the prompts.
    input_ids : (B, P) int64
        The prompts.
    logits_processor, stopping_criteria, generation_config, streamer
        As transformers prepares them.
    """
    started = time.perf_counter()
    pick = _picker(logits_processor, generation_config, rollout)
    # As in transformers: rows that end in another way than by a token (stop strings) are not padded.
    pads = any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria)
    pad = generation_config._pad_token_tensor if pads else None
    depths = torch.tensor([*rollout.bounds[1:], 0])
    unfinished = torch.ones(len(input_ids), dtype=torch.bool, device=input_ids.device)
    exit_layers: list[torch.Tensor] = []
    all_scores: tuple[torch.Tensor, ...] = ()
    all_logits: tuple[torch.Tensor, ...] = ()
    keep_scores = generation_config.return_dict_in_generate and generation_config.output_scores
    keep_logits = generation_config.return_dict_in_generate and generation_config.output_logits
    while True:
        step = rollout.step(unfinished if pads else torch.ones_like(unfinished))
        tokens, scores = pick(input_ids, step)
        rollout.relieve()
        if keep_logits:
            all_logits += (step.full_logits(rollout.trunk.vocab_size),)
        if keep_scores:
            all_scores += (scores if scores is not None else step.full_logits(rollout.trunk.vocab_size),)
        if pad is not None:
            tokens = torch.where(unfinished, tokens, pad.to(tokens.device))
        exit_layers.append(depths[step.exits])
        input_ids = torch.cat([input_ids, tokens[:, None]], dim=1)
        if streamer is not None:
            streamer.put(tokens.cpu())
        unfinished = unfinished & ~stopping_criteria(input_ids, all_scores or None)
        if not bool(unfinished.any()):
            break
        rollout.feed(tokens)
    if streamer is not None:
        streamer.end()
    if rollout.audit is not None:
        rollout.audit.finish(rollout)
    stats = GenerationStats.of(torch.stack(exit_layers, dim=1), rollout, time.perf_counter() - started)
    return EarlyExitOutput(
        sequences=cast(torch.LongTensor, input_ids),
        scores=cast(Any, all_scores or None),
        logits=cast(Any, all_logits or None),
        exit_layers=stats.exit_layers,
        stats=stats,
        **finished_cache(rollout, generation_config),
    )


def finished_cache(rollout: Rollout, generation_config: GenerationConfig) -> dict[str, Any]:
    """Give the caller who asked for an output object its cache, whole: every token but the last, in every layer."""
    if not (generation_config.return_dict_in_generate and generation_config.use_cache):
        return {}
    rollout.flush()
    # transformers 5.24 renamed it.
    renamed = any(item.name == "cache" for item in fields(GenerateDecoderOnlyOutput))
    return {"cache" if renamed else "past_key_values": rollout.cache}


def process(
    processors: Any, input_ids: torch.Tensor, logits: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Give processed scores (B, V), and which rows (B,) they leave no token to choose.

    So it is where a head answered whose shortlist has none of the tokens that a processor allows.
    """
    known = logits > -torch.inf
    listed = ~known.all(dim=-1)
    stuck = torch.zeros_like(listed)
    if not listed.any():
        return processors(input_ids, logits), stuck
    scores = logits
    for processor in processors:
        apply: Any = LogitsProcessorList([processor])
        # Some give scores of their own to tokens that have none, and some the lowest number there is.
        scores = apply(input_ids, scores).masked_fill(~known, -torch.inf)
        stuck |= listed & ~(scores.amax(dim=-1) > torch.finfo(scores.dtype).min)
        # What follows may not know what to do with a row of nothing.
        scores = scores.masked_fill(stuck[:, None], 0.0)
    return scores, stuck


def _picker(
    logits_processor: Any, generation_config: GenerationConfig, rollout: Rollout
) -> Callable[[torch.Tensor, Step], tuple[torch.Tensor, torch.Tensor | None]]:
    """How the next tokens follow from a step: greedy without processors needs no logits over the vocabulary."""
    if not generation_config.do_sample and len(logits_processor) == 0:
        return lambda _, step: (step.tokens, None)

    def pick(input_ids: torch.Tensor, step: Step) -> tuple[torch.Tensor, torch.Tensor]:
        scores, stuck = process(logits_processor, input_ids, step.full_logits(rollout.trunk.vocab_size))
        stuck = stuck.cpu() & (step.exits >= 0) & (step.exits < len(rollout.exits))
        if stuck.any():
            rollout.answer_whole(step, stuck.numpy())
            scores, _ = process(logits_processor, input_ids, step.full_logits(rollout.trunk.vocab_size))
        if generation_config.do_sample:
            return torch.multinomial(scores.softmax(dim=-1), 1).squeeze(1), scores
        return scores.argmax(dim=-1), scores

    return pick
