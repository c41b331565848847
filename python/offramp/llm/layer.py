"""One decoder layer as a handful of tensor operations on the model's own weights.

For `lean`, which takes models apart into such layers, and `stepping`, which hands them to the core.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch.nn import functional

from offramp.llm import few
from offramp.llm.cache import GrowingLayer
from offramp.llm.few import Linear
from offramp.llm.products import linear

Map = Callable[[torch.Tensor], torch.Tensor]
Rotary = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True, eq=False)
class RMSNorm:
    """An RMS norm and no more."""

    weight: torch.Tensor
    eps: float

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """Scale rows (..., H) to unit root mean square, and then by the weight."""
        if (found := by_core(hidden, self)) is not None:
            return found
        # Under autocast hidden states can be narrower than the weight, which torch's fused form does not take.
        return functional.rms_norm(hidden.to(self.weight.dtype), self.weight.shape, self.weight, self.eps)


@dataclass(frozen=True, eq=False)
class LeanLayer:
    """The parts of one decoder layer, taken out of their modules.

    Attributes
    ----------
    before_attention, after_attention, before_block, after_block : callable or None
        Norms.
    projections : list of Linear
        Query, key and value, or all three in one.
    output, down : Linear
        Linear maps back to the residual.
    block : list of Linear
        Gate and up, both in one, or up alone where nothing is gated.
    activation : callable
        Of the gate, or of up.
    query_norm, key_norm : callable or None
        Norms of each head, or of all of them where ``norms_whole``.
    widths : (int, int, int)
        Of query, key and value.
    head_size : int
        Width of one attention head.
    scaling, residual : float
        Factors of the attention scores, and of what is added to the residual.
    kind : str or None
        Which table of rotary angles to take; ``None`` for a layer without positions.
    window : int or None
        How far back a query sees.
    """

    before_attention: Map | None
    after_attention: Map | None
    before_block: Map | None
    after_block: Map | None
    beside: bool
    projections: list[Linear]
    output: Linear
    block: list[Linear]
    gated: bool
    down: Linear
    activation: Map
    query_norm: Map | None
    key_norm: Map | None
    norms_whole: bool
    widths: tuple[int, int, int]
    head_size: int
    scaling: float
    residual: float
    kind: str | None
    window: int | None

    def run(
        self,
        hidden: torch.Tensor,
        batch: int,
        rotary: Rotary | None,
        partner: torch.Tensor,
        mask: torch.Tensor | None,
        cache: GrowingLayer | None,
        picked: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Run the layer over new rows (B * q, H), appending their keys and values to the cache, if there is one.

        ``rotary`` holds cosines and signed sines, each (B, q, 1, head size), ``partner`` the dimension each is rotated
        with; ``mask`` is True where a query may look, (B or 1, 1, groups * q, cached + q), or ``None`` for a single
        query that sees everything within the window, and for whole sequences whose queries see all before them.  What
        follows attention is computed for ``picked`` rows (n,) alone, where they are given.
        """
        normed = self.before_attention(hidden) if self.before_attention else hidden
        seen = self._attend(normed, batch, rotary, partner, mask, cache)
        if picked is not None:
            hidden, normed, seen = hidden[picked], normed[picked], seen[picked]
        attended = linear(seen, *self.output)
        if self.beside:
            return hidden + attended + self._feed(normed)
        hidden = self._add(hidden, attended, self.after_attention)
        normed = self.before_block(hidden) if self.before_block else hidden
        return self._add(hidden, self._feed(normed), self.after_block)

    @cached_property
    def is_common(self) -> bool:
        """Whether it is arranged as Llama's, norms of heads aside: what the core takes."""
        return (
            isinstance(self.before_attention, RMSNorm)
            and isinstance(self.before_block, RMSNorm)
            and self.after_attention is None
            and self.after_block is None
            and isinstance(self.query_norm, RMSNorm | None)
            and isinstance(self.key_norm, RMSNorm | None)
            and not self.norms_whole
            and not self.beside
            and self.gated
            and self.activation is functional.silu
        )

    def _add(self, hidden: torch.Tensor, new: torch.Tensor, norm: Map | None) -> torch.Tensor:
        if norm is not None:
            new = norm(new)
        return hidden + (new if self.residual == 1 else new * self.residual)

    def _attend(
        self,
        normed: torch.Tensor,
        batch: int,
        rotary: Rotary | None,
        partner: torch.Tensor,
        mask: torch.Tensor | None,
        cache: GrowingLayer | None,
    ) -> torch.Tensor:
        """Mix the values (B * q, heads * head size) each row sees."""
        queries = len(normed) // batch
        query, key, value = self._project(normed)
        # Rotated together: the fewer operations, the better.
        both = torch.cat((query, key), dim=-1).view(batch, queries, -1, self.head_size)
        if rotary is not None:
            both = both * rotary[0] + both.index_select(-1, partner) * rotary[1]
        wide, narrow = self.widths[0] // self.head_size, self.widths[1] // self.head_size
        query, key = both.split((wide, narrow), dim=2)
        value = value.view(batch, queries, narrow, self.head_size)
        if cache is None:
            keys, values = key.transpose(1, 2), value.transpose(1, 2)
        else:
            keys, values = cache.append(key, value)
        if mask is None and self.window is not None:
            keys, values = keys[:, :, -self.window :], values[:, :, -self.window :]
        # Query heads that share a key head are laid out as more queries of it, so that keys are not repeated; a single
        # position is laid out so already.
        if queries > 1:
            query = query.transpose(1, 2)
        if queries > 1 and mask is None:
            # What lies behind a query is not computed and then masked.
            mixed = functional.scaled_dot_product_attention(
                query, keys, values, is_causal=True, scale=self.scaling, enable_gqa=wide != narrow
            )
        else:
            mixed = functional.scaled_dot_product_attention(
                query.reshape(batch, narrow, -1, self.head_size),
                keys,
                values,
                attn_mask=mask,
                scale=self.scaling,
            )
        if queries > 1:
            mixed = mixed.reshape(batch, wide, queries, self.head_size).transpose(1, 2)
        return mixed.reshape(len(normed), -1)

    def _project(self, normed: torch.Tensor) -> Sequence[torch.Tensor]:
        parts: Sequence[torch.Tensor] = [linear(normed, *weights) for weights in self.projections]
        if len(parts) == 1:
            parts = parts[0].split(self.widths, dim=-1)
        if self.query_norm is None or self.key_norm is None:
            return parts
        query, key, value = parts
        if self.norms_whole:
            return self.query_norm(query), self.key_norm(key), value
        query, key = (part.unflatten(-1, (-1, self.head_size)) for part in (query, key))
        return self.query_norm(query).flatten(-2), self.key_norm(key).flatten(-2), value

    def _feed(self, normed: torch.Tensor) -> torch.Tensor:
        parts: Sequence[torch.Tensor] = [linear(normed, *weights) for weights in self.block]
        if self.gated and len(parts) == 1:
            parts = parts[0].chunk(2, dim=-1)
        fed = self.activation(parts[0])
        return linear(fed * parts[1] if self.gated else fed, *self.down)


def attention_mask(
    length: int,
    queries: int,
    groups: int,
    padding: torch.Tensor | None,
    window: int | None,
    device: torch.device,
) -> torch.Tensor | None:
    """Which of ``length`` keys each of the last ``queries`` positions sees, for `LeanLayer.run`.

    ``padding`` is (B, at least length), 0 at the left padding.
    """
    if queries == 1 and padding is None:
        return None
    places = torch.arange(length, device=device)
    newest = places[length - queries :, None]
    mask = places <= newest
    if window is not None:
        mask = mask & (places > newest - window)
    mask = mask[None, None]
    if padding is not None:
        mask = mask & padding[:, None, None, :length].bool()
    return mask.repeat(1, 1, groups, 1)


def by_core(hidden: torch.Tensor, norm: RMSNorm) -> torch.Tensor | None:
    """Norm rows (..., H) if they are few; ``None`` for others."""
    if few.are_few(hidden) and few.are_plain(hidden.dtype, (hidden, norm.weight)):
        return few.apply_norm(hidden, (norm.weight, norm.eps))
    return None
