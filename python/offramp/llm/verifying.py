"""Lossless decoding: tokens that leave early are drafts, which the whole model confirms or corrects.

A draft waits, like every early token, until the last segment runs; then the full model's logits for all waiting
positions say how far the drafts hold.  Greedy output is the full model's own; sampling accepts a draft x with
probability ``min(1, p(x) / q(x))`` and else draws from ``max(0, p - q)``, which leaves the full model's distribution
p whatever the head's q is (Leviathan, Kalman, Matias: Fast inference from transformers via speculative decoding, 2023).
For `model`; needs `decoding`.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, cast

import torch
from transformers import GenerationConfig

from offramp.llm.auditing import Audit
from offramp.llm.decoding import (
    EarlyExitOutput,
    GenerationStats,
    Rollout,
    Step,
    finished_cache,
    process,
)


@torch.no_grad()
def decode_verified(
    rollout: Rollout,
    input_ids: torch.Tensor,
    *,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: GenerationConfig,
    streamer: Any = None,
    max_pending: int | None = None,
    audit: Audit | None = None,
) -> EarlyExitOutput:
    """Generate what the whole model would, drafting with the exits.

    Parameters
    ----------
    rollout
        The state, holding the prompts; without a limit of its own on what waits.
    input_ids : (B, P) int64
        The prompts.
    logits_processor, stopping_criteria, generation_config, streamer
        As transformers prepares them; the streamer sees confirmed tokens only.
    max_pending
        Most positions that may wait for the last segment after a step; ``None`` for no limit.
    audit
        Told which drafts are the whole model's own first choice.
    """
    started = time.perf_counter()
    rule = _Rule(logits_processor, generation_config.do_sample, rollout.trunk.vocab_size)
    pads = any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria)
    pad = generation_config._pad_token_tensor if pads else None
    text = _Text(rollout, input_ids, rule, None if pad is None else int(pad), max_pending, audit)
    streamed = input_ids.shape[1]
    while True:
        text.advance(text.unfinished if pads else torch.ones_like(text.unfinished))
        stops = stopping_criteria(text.tokens, None)
        if not text.confirmed and (bool((stops & text.unfinished).any()) or text.too_many):
            text.verify()
            stops = stopping_criteria(text.tokens, None)
        if text.confirmed:
            text.unfinished &= ~stops
            if streamer is not None and text.tokens.shape[1] > streamed:
                for column in text.tokens[:, streamed:].T.cpu():
                    streamer.put(column)
                streamed = text.tokens.shape[1]
        if not bool(text.unfinished.any()):
            break
        text.feed()
    if streamer is not None:
        streamer.end()
    if audit is not None:
        audit.tokens[:] = (text.depths > 0).sum(dim=1).numpy()
    stats = GenerationStats.of(text.depths, rollout, time.perf_counter() - started, rejected=text.rejected)
    return EarlyExitOutput(
        sequences=cast(torch.LongTensor, text.tokens),
        exit_layers=stats.exit_layers,
        stats=stats,
        **finished_cache(rollout, generation_config),
    )


class _Rule:
    """How the next token follows from logits: processors, then the largest or a sample."""

    def __init__(self, processors: Any, sample: bool, vocab_size: int) -> None:
        self.processors, self.sample, self.vocab_size = processors, sample, vocab_size
        self.plain = not sample and len(processors) == 0

    def draft(self, prefix: torch.Tensor, step: Step) -> tuple[torch.Tensor, torch.Tensor | None] | None:
        """Tokens (B,) by whoever answered, and for sampling the probabilities (B, V) they were drawn with.

        None where processors leave a row that was answered no token its head can emit.
        """
        if self.plain:
            return step.tokens, None
        scores, stuck = process(self.processors, prefix, step.full_logits(self.vocab_size))
        if (stuck.cpu() & (step.exits >= 0)).any():
            return None
        if not self.sample:
            return scores.argmax(dim=-1), None
        q = scores.softmax(dim=-1)
        return torch.multinomial(q, 1).squeeze(1), q

    def judge(
        self,
        prefix: torch.Tensor,
        logits: torch.Tensor,
        *,
        drafts: torch.Tensor | None,
        q: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Whether each draft (B,) stands before the full model's logits (B, V), and the token (B,) it gives else."""
        if not self.plain:
            logits = self.processors(prefix, logits.float())
        if not self.sample:
            own = logits.argmax(dim=-1)
            return (own == drafts if drafts is not None else torch.zeros_like(own, dtype=torch.bool)), own
        p = logits.softmax(dim=-1)
        if drafts is None:
            return torch.zeros(len(p), dtype=torch.bool, device=p.device), torch.multinomial(p, 1).squeeze(1)
        assert q is not None
        ratio = (p.gather(1, drafts[:, None]) / q.gather(1, drafts[:, None])).squeeze(1)
        stands = torch.rand(len(p), device=p.device) < ratio
        rest = (p - q).clamp(min=0)
        # Where q is p there is no rest, and no draft is refused either.
        rest = torch.where(rest.sum(dim=-1, keepdim=True) > 0, rest, p)
        return stands, torch.multinomial(rest, 1).squeeze(1)


@dataclass
class _Draft:
    """One drafted column: its step, the probabilities (B, V) of its tokens, and which rows (B,) need no verdict."""

    step: Step
    q: torch.Tensor | None
    settled: list[bool]


Confirmed = list[tuple[int, int]]
"""Tokens of one row and the layers they left after."""


class _Text:
    """The rows as far as they are written: confirmed columns, then drafted ones.

    Rows are cut back together, to the one confirmed least; what others have confirmed beyond waits in ``ahead`` and
    is written to them again.
    """

    def __init__(
        self,
        rollout: Rollout,
        prompts: torch.Tensor,
        rule: _Rule,
        pad: int | None,
        limit: int | None,
        audit: Audit | None,
    ) -> None:
        self.rollout, self.rule, self.pad, self.limit, self.audit = rollout, rule, pad, limit, audit
        self.tokens = prompts
        self.depths = torch.zeros(len(prompts), 0, dtype=torch.int64)
        self.unfinished = torch.ones(len(prompts), dtype=torch.bool, device=prompts.device)
        self.rejected = 0
        self._prompt = self._fed = prompts.shape[1]
        self._drafts: list[_Draft] = []
        self._ahead: list[Confirmed] = [[] for _ in prompts]
        self._active = self.unfinished
        self._by_exit = torch.tensor([*rollout.bounds[1:], 0])

    @property
    def confirmed(self) -> bool:
        """Whether no column is a draft."""
        return not self._drafts

    @property
    def too_many(self) -> bool:
        """Whether more positions wait for the last segment, before it or before an earlier one, than may."""
        return self.limit is not None and self.rollout.unconfirmed > self.limit

    def feed(self) -> None:
        """Hand the newest tokens to the model."""
        self.rollout.feed(self.tokens[:, -1])
        self._fed += 1

    def advance(self, active: torch.Tensor) -> None:
        """Write the next column: by the heads where they answer every active row, else by the whole model."""
        self._active = active
        ahead = [bool(queue) for queue in self._ahead]
        step, unanswered = self.rollout.ask(active & ~torch.tensor(ahead, device=active.device))
        drafted = None if unanswered.any() else self.rule.draft(self.tokens, step)
        if drafted is None:
            self.verify()
            return
        tokens, q = drafted
        depths = self._by_exit[step.exits]
        if self.pad is not None:
            tokens = torch.where(self.unfinished, tokens, torch.full_like(tokens, self.pad))
        for row, queue in enumerate(self._ahead):
            if queue:
                tokens[row], depths[row] = queue.pop(0)
        self._append(tokens, depths)
        settled = [waits or not asked for waits, asked in zip(ahead, active.tolist(), strict=True)]
        self._drafts.append(_Draft(step, q, settled))

    def verify(self) -> None:
        """Run the last segment over all that waits; keep what holds, and write the column after it."""
        hidden = self.rollout.flush()
        assert hidden is not None
        first = self.tokens.shape[1] - len(self._drafts)
        verdicts = self._judge(first, self.rollout.full_logits(hidden[:, first - self._fed - 1 :]))
        found = [self._confirmed(row, first, *verdict) for row, verdict in enumerate(verdicts)]
        active = [row for row, asked in enumerate(self._active.tolist()) if asked]
        # The next column follows positions the model has been fed.
        width = min(self._fed + 1 - first, *(len(found[row]) for row in active))
        filler = (self.pad or 0, 0)
        columns = [(row + [filler] * width)[:width] for row in found]
        self._ahead = [found[row][width:] if row in active else [] for row in range(len(found))]
        self._rewrite(first, columns)

    def _judge(self, first: int, logits: torch.Tensor) -> list[tuple[int, int | None]]:
        """Find for each row the first column that does not stand, and the full model's token for it, if any.

        ``logits`` (B, n, V) are for the columns from ``first`` on: all drafts, and one more unless the newest
        position has a draft already.
        """
        written = self.tokens.shape[1]
        # Where nothing is drafted yet, rows that are ahead or done have their token all the same.
        exempt = [row for row, active in enumerate(self._active.tolist()) if self._ahead[row] or not active]
        verdicts: list[tuple[int, int | None]] = [(written, None)] * len(self.tokens)
        for place in range(logits.shape[1]):
            at = first + place
            draft = self._drafts[place] if at < written else None
            drafted = self.tokens[:, at] if draft is not None else None
            # Before processors, which may change what they are given.
            choices = logits[:, place].argmax(dim=-1).tolist() if self.audit is not None else []
            stands, own = self.rule.judge(
                self.tokens[:, :at], logits[:, place], drafts=drafted, q=None if draft is None else draft.q
            )
            for row, (holds, token) in enumerate(zip(stands.tolist(), own.tolist(), strict=True)):
                settled = draft.settled[row] if draft is not None else row in exempt
                if (
                    self.audit is not None
                    and draft is not None
                    and not settled
                    and verdicts[row][0] == written
                ):
                    self.audit.judge(
                        row, int(draft.step.exits[row]), agrees=int(draft.step.tokens[row]) == choices[row]
                    )
                if not (holds or settled) and verdicts[row] == (written, None):
                    verdicts[row] = (at, token)
        return verdicts

    def _confirmed(self, row: int, first: int, end: int, token: int | None) -> Confirmed:
        """List what a row has confirmed from column ``first`` on."""
        kept = zip(
            self.tokens[row, first:end].tolist(),
            self.depths[row, first - self._prompt :].tolist(),
            strict=False,
        )
        self.rejected += self.tokens.shape[1] - end
        own = [] if token is None else [(token, self.rollout.trunk.num_layers)]
        return [*kept, *own, *self._ahead[row]]

    def _rewrite(self, first: int, columns: list[Confirmed]) -> None:
        """Put confirmed columns in the place of the drafts and forget the positions after them."""
        self._drafts = []
        tokens, depths = torch.tensor(columns).unbind(dim=-1)
        self.tokens = torch.cat([self.tokens[:, :first], tokens.to(self.tokens.device)], dim=1)
        self.depths = torch.cat([self.depths[:, : first - self._prompt], depths], dim=1)
        self._fed = self.tokens.shape[1] - 1
        self.rollout.rewind(self._fed)
        if self.limit is not None:
            self.rollout.relieve_heads(self.limit)

    def _append(self, tokens: torch.Tensor, depths: torch.Tensor) -> None:
        self.tokens = torch.cat([self.tokens, tokens[:, None]], dim=1)
        self.depths = torch.cat([self.depths, depths[:, None]], dim=1)
