"""The same decoder layers as a handful of tensor operations: for decoding, where overhead costs as much as arithmetic.

Works on the model's own parameters (no copy) and on `GrowingCache`.  It exists for speed alone: `trunk` uses it only
for layers it can describe and only after it has proved equal to the model's own forward.  Heads of such layers are
trained by it, too, because it can leave out what nobody reads.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import is_
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from offramp.llm import few
from offramp.llm.cache import GrowingCache, GrowingLayer
from offramp.llm.few import Linear
from offramp.llm.products import linear, widens

Map = Callable[[torch.Tensor], torch.Tensor]
Rotary = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class _Family:
    """What a family calls its norms and how it arranges a layer; the defaults are Llama's."""

    before_attention: str | None = "input_layernorm"
    after_attention: str | None = None
    before_block: str | None = "post_attention_layernorm"
    after_block: str | None = None
    # The block reads what attention reads, and both are added to the residual.
    beside: bool = False
    # Neighbours are rotated with each other, instead of the first half with the second.
    interleaved: bool = False
    # Queries and keys are normed before they are cut into heads.
    norms_whole: bool = False


_SANDWICH = _Family(
    after_attention="post_attention_layernorm",
    before_block="pre_feedforward_layernorm",
    after_block="post_feedforward_layernorm",
)
_FAMILIES = {
    "LlamaDecoderLayer": _Family(),
    "MistralDecoderLayer": _Family(),
    "Qwen2DecoderLayer": _Family(),
    "Qwen3DecoderLayer": _Family(),
    "Phi3DecoderLayer": _Family(),
    "GraniteDecoderLayer": _Family(),
    "SmolLM3DecoderLayer": _Family(),
    "StableLmDecoderLayer": _Family(),
    "Gemma2DecoderLayer": _SANDWICH,
    "Gemma3DecoderLayer": _SANDWICH,
    "Olmo2DecoderLayer": _Family(
        before_attention=None,
        after_attention="post_attention_layernorm",
        before_block=None,
        after_block="post_feedforward_layernorm",
        norms_whole=True,
    ),
    "CohereDecoderLayer": _Family(before_block=None, beside=True, interleaved=True),
    "PhiDecoderLayer": _Family(before_block=None, beside=True),
}
_FIXED_ANGLES = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True, eq=False)
class LeanLayer:
    """The parts of one decoder layer, taken out of their modules.

    Attributes
    ----------
    before_attention, after_attention, before_block, after_block : callable or None
        Norms.
    projections : list of (weight, bias or None)
        Query, key and value, or all three in one.
    output, down : (weight, bias or None)
        Linear maps back to the residual.
    block : list of (weight, bias or None)
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
        """Whether it is arranged as Llama's, norms of heads aside: what `step` can do."""
        return (
            isinstance(self.before_attention, _RMSNorm)
            and isinstance(self.before_block, _RMSNorm)
            and self.after_attention is None
            and self.after_block is None
            and isinstance(self.query_norm, _RMSNorm | None)
            and isinstance(self.key_norm, _RMSNorm | None)
            and not self.norms_whole
            and not self.beside
            and self.gated
            and self.activation is functional.silu
        )

    def can_step(self, hidden: torch.Tensor, rotary: Rotary | None, cache: GrowingLayer) -> bool:
        """Whether `step` can read all it takes, and takes these rows."""
        if not self.is_common:
            return False
        if rotary is not None and rotary[0].shape[1] != len(hidden):
            return False
        norms = (self.before_attention, self.before_block, self.query_norm, self.key_norm)
        weights = (norm.weight for norm in norms if isinstance(norm, _RMSNorm))
        linears = (*self.projections, self.output, *self.block, self.down)
        given = (tensor for one in linears for tensor in one if tensor is not None)
        return few.are_plain(
            hidden.dtype, (hidden, *cache.reserve(len(hidden)), *(rotary or ()), *weights, *given)
        )

    def step(
        self,
        hidden: torch.Tensor,
        rotary: Rotary | None,
        partner: torch.Tensor,
        cache: GrowingLayer,
        picked: torch.Tensor | None,
    ) -> torch.Tensor:
        """Compute what `run` does over a few rows (R, H) of one sequence, after others, in five calls of the core."""
        assert isinstance(self.before_attention, _RMSNorm)
        assert isinstance(self.before_block, _RMSNorm)
        norms = None
        if isinstance(self.query_norm, _RMSNorm) and isinstance(self.key_norm, _RMSNorm):
            norms = self.query_norm.parts, self.key_norm.parts
        wide, narrow, _ = self.widths
        mixed = few.attend(
            few.multiply(hidden, self.projections, norm=self.before_attention.parts),
            (wide // self.head_size, narrow // self.head_size, self.head_size),
            rotary,
            partner,
            cache.reserve(len(hidden)),
            cache.get_seq_length(),
            self.scaling,
            self.window,
            norms,
        )
        cache.extend(len(hidden))
        if picked is not None:
            hidden, mixed = hidden[picked], mixed[picked]
        hidden = few.multiply(mixed, [self.output], residual=hidden, factor=self.residual)
        fed = few.multiply(hidden, _halves(self.block), norm=self.before_block.parts, gated=True)
        return few.multiply(fed, [self.down], residual=hidden, factor=self.residual)

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


class Lean:
    """A decoder's layers as `LeanLayer`, with the tables of rotary angles they share.

    Parameters
    ----------
    layers
        The layers.
    family
        How they are arranged.
    angles
        The decoder's module that gives cosines and sines.
    config
        The decoder's config.
    """

    def __init__(self, layers: Sequence[nn.Module], family: _Family, angles: nn.Module, config: Any) -> None:
        window = getattr(config, "sliding_window", None)
        uniform = "sliding_attention" if window else "full_attention"
        self._types: list[str] = getattr(config, "layer_types", None) or [uniform] * len(layers)
        self._window, self._family, self._angles, self._config = window, family, angles, config
        self._by_kind = "layer_type" in inspect.signature(angles.forward).parameters
        self._tables: dict[tuple[str, torch.dtype], Rotary] = {}
        self._partner = torch.empty(0, dtype=torch.int64)
        self.layers = self.form(layers) or []
        self._parameters = _parameters(layers)

    def form(self, layers: Sequence[nn.Module]) -> list[LeanLayer] | None:
        """Take apart layers in the place of the model's last ones; ``None`` where they are more than they seem."""
        if any(map(_unusual, layers)):
            return None
        types = self._types[len(self._types) - len(layers) :]
        return [
            _describe(
                layer, kind, self._window if kind == "sliding_attention" else None, self._family, self._config
            )
            for layer, kind in zip(layers, types, strict=True)
        ]

    def fits(self, layers: Sequence[nn.Module]) -> bool:
        """Whether layers still are what was taken apart: have the same parameters, and are no more than they seem."""
        now = _parameters(layers)
        same = len(now) == len(self._parameters) and all(map(is_, now, self._parameters))
        return same and not any(map(_unusual, layers))

    def run(
        self,
        layers: Sequence[LeanLayer],
        hidden: torch.Tensor,
        first: int,
        cache: GrowingCache | None,
        positions: torch.Tensor,
        padding: torch.Tensor | None,
        picked: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Run layers, the first of which stands for layer ``first``, over new rows, as `Trunk.run` does.

        Without a cache the rows (B, q, H) are whole sequences.  The last layer computes ``picked`` rows (n,) of the
        B * q alone, where they are given, and returns (n, H).
        """
        batch, queries, _ = hidden.shape
        length = queries + (0 if cache is None else cache.length(first))
        caches = [None] * len(layers) if cache is None else cache.growing[first:]
        hidden = hidden.reshape(batch * queries, -1)
        rotary: dict[str | None, Rotary | None] = {None: None}
        masks: dict[int | None, torch.Tensor | None] = {}
        if cache is None and padding is None:
            # Where nothing but order says what is seen.
            masks[None] = None
        stepping = batch == 1 and padding is None and length > queries and few.are_few(hidden)
        for layer, held in zip(layers, caches, strict=False):
            if layer.kind not in rotary and layer.kind is not None:
                cosines, sines = self._table(layer.kind, length, hidden)
                rotary[layer.kind] = cosines[positions].unsqueeze(2), sines[positions].unsqueeze(2)
            wanted = picked if layer is layers[-1] else None
            if stepping and held is not None and layer.can_step(hidden, rotary[layer.kind], held):
                hidden = layer.step(hidden, rotary[layer.kind], self._partner, held, wanted)
                continue
            if layer.window not in masks:
                groups = layer.widths[0] // layer.widths[1]
                masks[layer.window] = attention_mask(
                    length, queries, groups, padding, layer.window, hidden.device
                )
            hidden = layer.run(
                hidden, batch, rotary[layer.kind], self._partner, masks[layer.window], held, wanted
            )
        return hidden.view(batch, queries, -1) if picked is None else hidden

    def pays(self, hidden: torch.Tensor, cached: int) -> bool:
        """Whether its products are faster than the model's own for rows (B, q, H) after ``cached`` tokens.

        Before the first token the model's modules do as well, in float32 to the last bit.
        """
        return cached > 0 or widens(hidden)

    def _table(self, kind: str, length: int, hidden: torch.Tensor) -> Rotary:
        """Cosines and signed sines for at least ``length`` positions; the table grows by doubling."""
        known = self._tables.get((kind, hidden.dtype))
        if known is None or len(known[0]) < length or known[0].device != hidden.device:
            known = self._tables[kind, hidden.dtype] = self._tabulate(kind, 2 * length, hidden)
        return known

    @torch.inference_mode(False)
    @torch.no_grad()
    def _tabulate(self, kind: str, length: int, hidden: torch.Tensor) -> Rotary:
        """Tables (length, head size) with which ``x * cos + x[partner] * sin`` is the rotated x.

        They outlive the call: a user's ``torch.inference_mode()`` would make them useless for training.
        """
        size = self.layers[0].head_size
        positions = torch.arange(length, device=hidden.device)[None]
        cosines, sines = (
            self._angles(hidden, positions, kind) if self._by_kind else self._angles(hidden, positions)
        )
        turned = cosines.shape[-1]
        places = torch.arange(size, device=hidden.device)
        if self._family.interleaved:
            first, partner = places % 2 == 0, places ^ 1
        else:
            first, partner = places < turned // 2, (places + turned // 2) % turned
        # What is not rotated passes: its cosine is 1 and its sine 0.
        self._partner = torch.where(places < turned, partner, places)
        rest = cosines.new_ones(length, size - turned)
        cosines = torch.cat([cosines[0], rest], dim=-1)
        sines = torch.cat([sines[0], torch.zeros_like(rest)], dim=-1)
        return cosines, torch.where(first, -sines, sines)


def describe(layers: Sequence[nn.Module], decoder: Any, config: Any) -> Lean | None:
    """Take a decoder apart; ``None`` where it is not of a family this module knows.

    Quantised, sharded or patched layers are not taken apart: their linear maps are more than a weight.
    """
    kinds = {type(layer).__name__ for layer in layers}
    family = _FAMILIES.get(kinds.pop()) if len(kinds) == 1 else None
    angles = getattr(decoder, "rotary_emb", None)
    if family is None or angles is None or not _has_fixed_angles(config) or any(map(_unusual, layers)):
        return None
    return Lean(layers, family, angles, config)


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


def is_plain(module: nn.Module) -> bool:
    """Whether a linear map is its weight and no more: quantisers replace the module, or what stands for its weight."""
    return type(module) is nn.Linear and type(module.weight) is nn.Parameter and "forward" not in vars(module)


def _has_fixed_angles(config: Any) -> bool:
    parameters = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, dict)] or [parameters]
    return all(item.get("rope_type", "default") in _FIXED_ANGLES for item in nested)


def _parameters(layers: Sequence[nn.Module]) -> list[nn.Parameter]:
    return [parameter for layer in layers for parameter in layer.parameters()]


def _unusual(layer: nn.Module) -> bool:
    # Gone through before every generation.
    modules = list(layer.modules())
    linears = [module for module in modules if "Linear" in type(module).__name__]
    # transformers leaves hooks that note outputs on a model that was ever asked for its hidden states.
    hooked = any(
        not str(getattr(hook, "__module__", "")).startswith("transformers.utils")
        for module in modules
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    )
    patched = any("forward" in vars(module) for module in modules)
    attention: Any = layer.self_attn
    # Soft caps, norms a head of their own and layers in parallel by choice are left to the modules.
    other = (
        getattr(attention, "attn_logit_softcapping", None) is not None
        or type(getattr(attention, "q_layernorm", None)).__name__ == "StableLmLayerNormPerHead"
        or bool(getattr(layer, "use_parallel_residual", False))
    )
    return hooked or patched or other or not all(map(is_plain, linears))


def _describe(layer: Any, kind: str, window: int | None, family: _Family, config: Any) -> LeanLayer:
    attention, mlp = layer.self_attn, layer.mlp
    size = int(attention.head_dim)
    wide, narrow = config.num_attention_heads * size, config.num_key_value_heads * size
    gated = not hasattr(mlp, "fc1")
    return LeanLayer(
        before_attention=_norm(layer, family.before_attention),
        after_attention=_norm(layer, family.after_attention),
        before_block=_norm(layer, family.before_block),
        after_block=_norm(layer, family.after_block),
        beside=family.beside,
        projections=_linears(attention, "qkv_proj") or _linears(attention, "q_proj", "k_proj", "v_proj"),
        output=(_linears(attention, "o_proj") or _linears(attention, "dense"))[0],
        block=_linears(mlp, "gate_up_proj") or _linears(mlp, "gate_proj", "up_proj") or _linears(mlp, "fc1"),
        gated=gated,
        down=(_linears(mlp, "down_proj") or _linears(mlp, "fc2"))[0],
        activation=_activation(mlp),
        query_norm=_norm(attention, "q_norm") or _norm(attention, "q_layernorm"),
        key_norm=_norm(attention, "k_norm") or _norm(attention, "k_layernorm"),
        norms_whole=family.norms_whole,
        widths=(wide, narrow, narrow),
        head_size=size,
        scaling=float(attention.scaling),
        residual=float(getattr(layer, "residual_multiplier", 1.0)),
        kind=kind if getattr(attention, "use_rope", True) else None,
        window=window,
    )


def normed(norm: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    """Apply a norm to rows (..., H): to a few by the core, where it is a plain one.

    On SmolLM2 transformers' module takes as long for a row as a tenth of a head.
    """
    plain: Any = norm
    if _is_rms(norm):
        changed = norm._forward_hooks or norm._forward_pre_hooks or "forward" in vars(norm)
        if (
            not changed
            and (found := _by_core(hidden, plain.weight, float(plain.variance_epsilon))) is not None
        ):
            return found
    own: torch.Tensor = norm(hidden)
    return own


def _norm(owner: Any, name: str | None) -> Map | None:
    norm: Any = getattr(owner, name, None) if name else None
    if norm is None:
        return None
    if not _is_rms(norm):
        found: Map = norm
        return found
    return _RMSNorm(norm.weight, float(norm.variance_epsilon))


@dataclass(frozen=True, eq=False)
class _RMSNorm:
    """An RMS norm and no more."""

    weight: torch.Tensor
    eps: float

    @property
    def parts(self) -> tuple[torch.Tensor, float]:
        return self.weight, self.eps

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        return _rms_norm(hidden, self.weight, self.eps)


def _is_rms(norm: nn.Module) -> bool:
    """Whether a norm is an RMS norm and no more: Gemma's adds one to its weight."""
    return type(norm).__name__.endswith("RMSNorm") and hasattr(norm, "variance_epsilon")


def _by_core(hidden: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor | None:
    """Norm rows (..., H) if they are few; ``None`` for others."""
    if few.are_few(hidden) and few.are_plain(hidden.dtype, (hidden, weight)):
        return few.apply_norm(hidden, (weight, eps))
    return None


def _rms_norm(hidden: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Scale to unit root mean square."""
    if (found := _by_core(hidden, weight, eps)) is not None:
        return found
    # Under autocast hidden states can be narrower than the weight, which torch's fused form does not take.
    return functional.rms_norm(hidden.to(weight.dtype), weight.shape, weight, eps)


def _activation(mlp: Any) -> Map:
    found: Map = getattr(mlp, "act_fn", None) or mlp.activation_fn
    return (
        functional.silu if isinstance(found, nn.SiLU) or type(found).__name__ == "SiLUActivation" else found
    )


def _halves(block: list[Linear]) -> list[Linear]:
    """Gate and up, also where they are one."""
    if len(block) == 2:
        return block
    ((weight, bias),) = block
    biases = (None, None) if bias is None else bias.chunk(2)
    return list(zip(weight.chunk(2), biases, strict=True))


def _linears(owner: Any, *names: str) -> list[Linear]:
    """Weights and biases by name; nothing where the owner has no such maps."""
    found = [getattr(owner, name, None) for name in names]
    return [] if None in found else [(linear.weight, linear.bias) for linear in found if linear is not None]
