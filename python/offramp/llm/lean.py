"""The same decoder layers as a handful of tensor operations: for decoding, where overhead costs as much as arithmetic.

Works on the model's own parameters (no copy) and on `GrowingCache`.  It exists for speed alone: `trunk` uses it only
for layers it can describe and only after it has proved equal to the model's own forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from offramp.llm.cache import GrowingLayer

# Decoder layers that are exactly: RMS norm, rotary attention, RMS norm, gated SiLU block, each on a residual.
_FAMILIES = ("LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer")


@dataclass(frozen=True, eq=False)
class LeanLayer:
    """The parts of one decoder layer, taken out of their modules.

    Attributes
    ----------
    attention_norm, block_norm : (weight (H,), epsilon)
        RMS norms before attention and before the gated block.
    query, key, value, output, gate, up, down : (weight, bias or None)
        Linear maps.
    head_size : int
        Width of one attention head.
    scaling : float
        Factor of the attention scores.
    """

    attention_norm: tuple[torch.Tensor, float]
    query: tuple[torch.Tensor, torch.Tensor | None]
    key: tuple[torch.Tensor, torch.Tensor | None]
    value: tuple[torch.Tensor, torch.Tensor | None]
    output: tuple[torch.Tensor, torch.Tensor | None]
    block_norm: tuple[torch.Tensor, float]
    gate: tuple[torch.Tensor, torch.Tensor | None]
    up: tuple[torch.Tensor, torch.Tensor | None]
    down: tuple[torch.Tensor, torch.Tensor | None]
    head_size: int
    scaling: float

    def run(
        self,
        hidden: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
        mask: torch.Tensor | None,
        cache: GrowingLayer,
    ) -> torch.Tensor:
        """Run the layer over new rows (B, q, H), appending their keys and values to the cache.

        ``rotary`` holds cosines and sines, each (B, 1, q, head size); ``mask`` is True where a query may look,
        (B or 1, 1, groups * q, cached + q), or ``None`` for a single query that sees everything.
        """
        batch, queries, _ = hidden.shape
        normed = functional.rms_norm(hidden, hidden.shape[-1:], *self.attention_norm)
        query, key, value = (
            functional.linear(normed, *weights).view(batch, queries, -1, self.head_size).transpose(1, 2)
            for weights in (self.query, self.key, self.value)
        )
        keys, values = cache.update(_rotate(key, *rotary), value)
        # Query heads that share a key head are laid out as more queries of it, so that keys are not repeated.
        query = _rotate(query, *rotary).reshape(batch, keys.shape[1], -1, self.head_size)
        mixed = functional.scaled_dot_product_attention(
            query, keys, values, attn_mask=mask, scale=self.scaling
        )
        mixed = mixed.reshape(batch, -1, queries, self.head_size).transpose(1, 2).reshape(batch, queries, -1)
        hidden = hidden + functional.linear(mixed, *self.output)
        normed = functional.rms_norm(hidden, hidden.shape[-1:], *self.block_norm)
        gated = functional.silu(functional.linear(normed, *self.gate)) * functional.linear(normed, *self.up)
        return hidden + functional.linear(gated, *self.down)


def describe(layers: Sequence[nn.Module], config: Any) -> list[LeanLayer] | None:
    """Take decoder layers apart; ``None`` where they are not of a family this module knows.

    Quantised, sharded or patched layers are not taken apart: their linear maps are more than a weight.
    """
    slides = "sliding_attention" in (getattr(config, "layer_types", None) or ("sliding_attention",)) and bool(
        getattr(config, "sliding_window", None)
    )
    known = all(type(layer).__name__ in _FAMILIES for layer in layers)
    if slides or not known or getattr(config, "hidden_act", None) != "silu":
        return None
    return None if any(_unusual(layer) for layer in layers) else [_describe(layer) for layer in layers]


def attention_mask(
    length: int, queries: int, groups: int, padding: torch.Tensor | None, device: torch.device
) -> torch.Tensor | None:
    """Which of ``length`` keys each of the last ``queries`` positions sees, for `LeanLayer.run`.

    ``padding`` is (B, at least length), 0 at the left padding.
    """
    if queries == 1 and padding is None:
        return None
    places = torch.arange(length, device=device)
    mask = (places <= places[length - queries :, None])[None, None]
    if padding is not None:
        mask = mask & padding[:, None, None, :length].bool()
    return mask.repeat(1, 1, groups, 1)


def _rotate(states: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
    first, second = states.chunk(2, dim=-1)
    return states * cosines + torch.cat((-second, first), dim=-1) * sines


def _unusual(layer: nn.Module) -> bool:
    linears = [module for module in layer.modules() if "Linear" in type(module).__name__]
    # transformers leaves hooks that note outputs on a model that was ever asked for its hidden states.
    hooked = any(
        not str(getattr(hook, "__module__", "")).startswith("transformers.utils")
        for module in layer.modules()
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    )
    patched = any("forward" in vars(module) for module in layer.modules())
    return hooked or patched or any(type(module) is not nn.Linear for module in linears)


def _describe(layer: Any) -> LeanLayer:
    attention, block = layer.self_attn, layer.mlp
    return LeanLayer(
        attention_norm=_norm(layer.input_layernorm),
        query=_linear(attention.q_proj),
        key=_linear(attention.k_proj),
        value=_linear(attention.v_proj),
        output=_linear(attention.o_proj),
        block_norm=_norm(layer.post_attention_layernorm),
        gate=_linear(block.gate_proj),
        up=_linear(block.up_proj),
        down=_linear(block.down_proj),
        head_size=int(attention.head_dim),
        scaling=float(attention.scaling),
    )


def _norm(norm: Any) -> tuple[torch.Tensor, float]:
    return norm.weight, float(norm.variance_epsilon)


def _linear(linear: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    return linear.weight, linear.bias
