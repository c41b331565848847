"""Decoders taken apart into lean layers: for decoding, where overhead costs as much as arithmetic.

Works on the model's own parameters (no copy) and on `GrowingCache`.  It exists for speed alone: `trunk` uses it only
for layers it can describe and only after it has proved equal to the model's own forward.  Heads of such layers are
trained by it, too, because it can leave out what nobody reads.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from operator import is_
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from offramp.llm import few
from offramp.llm.cache import GrowingCache
from offramp.llm.few import Linear
from offramp.llm.layer import LeanLayer, Map, RMSNorm, Rotary, attention_mask, by_core
from offramp.llm.products import widens
from offramp.llm.stepping import Steps


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
        # Made when there is a step.
        self._steps: Steps | None = None

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

    def begin(self) -> None:
        """Look where weights are, when a sequence begins: every step would take longer for it."""
        if self._steps is not None and not self._steps.is_current:
            self._steps = None

    def run_own(
        self,
        hidden: torch.Tensor,
        first: int,
        last: int,
        cache: GrowingCache,
        positions: torch.Tensor,
        padding: torch.Tensor | None,
    ) -> torch.Tensor:
        """Run layers ``first`` to ``last - 1`` of the model's own over new rows, as `Trunk.run` does."""
        if self._steps is None and few.are_few(hidden):
            self._steps = Steps(self.layers)
        found = None
        if self._steps is not None:
            found = self.step(self._steps, hidden, first, first, last, cache, positions, padding)
        if found is None:
            found = self.run(self.layers[first:last], hidden, first, cache, positions, padding)
        return found

    def step(
        self,
        steps: Steps,
        hidden: torch.Tensor,
        start: int,
        first: int,
        last: int,
        cache: GrowingCache,
        positions: torch.Tensor,
        padding: torch.Tensor | None,
        picked: Sequence[int] | None = None,
    ) -> torch.Tensor | None:
        """Do what `run` does over the few rows of a step, in one call of the core; ``None`` for other rows.

        The layers from number ``start`` of ``steps`` on stand for layers ``first`` to ``last - 1``.
        """
        seen = cache.length(first)
        if len(hidden) > 1 or padding is not None or not seen or not steps.takes(hidden):
            return None
        tables = [self._table(kind, seen + hidden.shape[1], hidden) for kind in steps.kinds]
        found = steps.run(hidden, start, cache.growing[first:last], positions, tables, self._partner, picked)
        return found if picked is None else found[0]

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
        for layer, held in zip(layers, caches, strict=False):
            if layer.kind not in rotary and layer.kind is not None:
                cosines, sines = self._table(layer.kind, length, hidden)
                rotary[layer.kind] = cosines[positions].unsqueeze(2), sines[positions].unsqueeze(2)
            wanted = picked if layer is layers[-1] else None
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
        here = hidden.device
        if known is None or len(known[0]) < length or known[0].device != here or self._partner.device != here:
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
    plain = plain_norm(norm)
    found = None if plain is None else by_core(hidden, plain)
    if found is None:
        found = norm(hidden)
    return found


def plain_norm(norm: nn.Module) -> RMSNorm | None:
    """Take a norm apart; ``None`` where it is more than an RMS norm."""
    changed = norm._forward_hooks or norm._forward_pre_hooks or "forward" in vars(norm)
    return _rms(norm) if _is_rms(norm) and not changed else None


def _norm(owner: Any, name: str | None) -> Map | None:
    norm: Any = getattr(owner, name, None) if name else None
    if norm is None:
        return None
    if not _is_rms(norm):
        found: Map = norm
        return found
    return _rms(norm)


def _rms(norm: Any) -> RMSNorm:
    return RMSNorm(norm.weight, float(norm.variance_epsilon))


def _is_rms(norm: nn.Module) -> bool:
    """Whether a norm is an RMS norm and no more: Gemma's adds one to its weight."""
    return type(norm).__name__.endswith("RMSNorm") and hasattr(norm, "variance_epsilon")


def _activation(mlp: Any) -> Map:
    found: Map = getattr(mlp, "act_fn", None) or mlp.activation_fn
    return (
        functional.silu if isinstance(found, nn.SiLU) or type(found).__name__ == "SiLUActivation" else found
    )


def _linears(owner: Any, *names: str) -> list[Linear]:
    """Linear maps by name; nothing where the owner has no such maps."""
    found = [getattr(owner, name, None) for name in names]
    return [] if None in found else [Linear.of(linear) for linear in found if linear is not None]
