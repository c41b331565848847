"""What a decoder hands each of its layers, found by running its own forward over stand-ins for them.

Masks, rotary angles, position embeddings and whatever else a family computes before its layers need no code of ours.
For `trunk` only.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.cache_utils import Cache

from offramp.llm.cache import SeenCache, cache_argument


class Call(NamedTuple):
    """What one layer was called with, the hidden states left out."""

    arguments: tuple[Any, ...]
    keywords: dict[str, Any]

    def on(self, layer: nn.Module, hidden: torch.Tensor, cache: Cache | None) -> torch.Tensor:
        """Make the call on a real layer, with a real cache or none."""

        def real(value: Any) -> Any:
            return cache if isinstance(value, SeenCache) else value

        keywords = {name: real(value) for name, value in self.keywords.items()}
        output: Any = layer(hidden, *map(real, self.arguments), **keywords)
        hidden_out: torch.Tensor = output[0] if isinstance(output, tuple) else output
        return hidden_out

    def to(self, dtype: torch.dtype) -> Call:
        """Give the same call with every tensor of floats in another dtype."""

        def cast(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(map(cast, value))
            return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value

        return Call(cast(self.arguments), {name: cast(value) for name, value in self.keywords.items()})


class Shadow:
    """A copy of the decoder's outermost module whose layers only note what they are called with.

    Shares every parameter and every other module with the decoder, which is not touched.

    Parameters
    ----------
    decoder
        The module that runs the layers.
    name
        The attribute that holds them.
    """

    def __init__(self, decoder: nn.Module, name: str) -> None:
        layers = decoder.get_submodule(name)
        self._stand_ins = [_StandIn(layer) for layer in layers.children()]
        shadow = copy.copy(decoder)
        # A forward put on the instance (accelerate does) is bound to the original.
        shadow.__dict__ = {key: value for key, value in vars(decoder).items() if key != "forward"}
        shadow._modules = {**decoder._modules, name: nn.ModuleList(self._stand_ins)}
        self._decoder = shadow
        self._one_at_a_time = threading.Lock()

    def returns_tuples(self, outputs: list[Any]) -> None:
        """Learn from what the real layers returned whether each returns a tuple."""
        for stand_in, output in zip(self._stand_ins, outputs, strict=True):
            stand_in.returns_tuple = isinstance(output, tuple)

    def embed(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Input (B, T, H) of the first layer for token ids and positions (B, T)."""
        with self._running():
            self._decoder(input_ids=tokens, position_ids=positions, use_cache=False)
            hidden = self._stand_ins[0].hidden
            assert hidden is not None
            return hidden

    def calls(
        self, hidden: torch.Tensor, positions: torch.Tensor, attention_mask: torch.Tensor | None, seen: int
    ) -> list[Call]:
        """Find what every layer would be called with for new rows (B, q, H) after ``seen`` tokens."""
        with self._running():
            self._decoder(
                inputs_embeds=hidden,
                attention_mask=attention_mask,
                position_ids=positions,
                use_cache=True,
                **cache_argument(self._decoder.forward, SeenCache(len(self._stand_ins), seen)),
            )
            return [stand_in.call for stand_in in self._stand_ins if stand_in.call is not None]

    @contextmanager
    def _running(self) -> Iterator[None]:
        with self._one_at_a_time:
            try:
                yield
            finally:
                for stand_in in self._stand_ins:
                    stand_in.hidden = stand_in.call = None


class _StandIn(nn.Module):
    """Takes the place of a layer: notes its arguments and gives its input back."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        # Beside the registered modules: the layer is not part of the shadow.
        self.__dict__["_layer"] = layer
        self.returns_tuple = False
        self.hidden: torch.Tensor | None = None
        self.call: Call | None = None

    def forward(self, *arguments: Any, **keywords: Any) -> Any:
        """Note the call."""
        if arguments:
            hidden, *rest = arguments
        else:
            rest, hidden = [], keywords.pop("hidden_states")
        self.hidden, self.call = hidden, Call(tuple(rest), keywords)
        return (hidden,) if self.returns_tuple else hidden

    def __getattr__(self, name: str) -> Any:
        """Give what decoders read of their layers, such as the kind of attention."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_layer"], name)
