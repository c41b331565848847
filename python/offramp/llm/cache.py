"""The key-value cache of a decoder whose layers may have seen different numbers of tokens.

For `trunk` to write and `decoding` to keep; knows nothing of heads or exits.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicLayer

_LEAST_ROOM = 64


class GrowingLayer(DynamicLayer):
    """One layer's keys and values in buffers that grow by half when full, so that a step copies only its own rows.

    `keys` and `values` are views of shape (batch, heads, tokens, head size) on the filled part.  The buffers behind
    them hold one token after the other, so that what is appended is written in one piece.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # transformers annotates it in part
        self._length = 0
        self._buffers: tuple[torch.Tensor, torch.Tensor] | None = None
        # Who found which buffers in order: `stepping` looks at new ones alone.
        self.checked: tuple[object, object] = (None, None)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_args: Any, **_kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append rows and return all keys and values, each (batch, heads, tokens, head size)."""
        return self.append(key_states.transpose(1, 2), value_states.transpose(1, 2))

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Append rows (batch, new tokens, heads, head size); returns what `update` does."""
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
        end = self._length + keys.shape[1]
        key_buffer, value_buffer = self._reserve(keys, values, end)
        key_buffer[:, self._length : end] = keys
        value_buffer[:, self._length : end] = values
        self._length = end
        return _view(key_buffer, end), _view(value_buffer, end)

    def reserve(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Give the buffers (batch, capacity, heads, head size), with room for so many more rows.

        There must be some already.  What the caller writes behind them is appended by `extend`.
        """
        assert self._buffers is not None
        return self._reserve(*self._buffers, self._length + count)

    def extend(self, count: int) -> None:
        """Append rows that are written in the buffers already."""
        self._length += count

    @property
    def keys(self) -> torch.Tensor | None:
        """Keys of all rows; made when they are asked for, since not every step asks."""
        return None if self._buffers is None else _view(self._buffers[0], self._length)

    @keys.setter
    def keys(self, given: torch.Tensor | None) -> None:
        _nothing(given)

    @property
    def values(self) -> torch.Tensor | None:
        """Values of all rows."""
        return None if self._buffers is None else _view(self._buffers[1], self._length)

    @values.setter
    def values(self, given: torch.Tensor | None) -> None:
        _nothing(given)

    def get_seq_length(self) -> int:
        """Tokens this layer has seen."""
        return self._length

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``abs(tokens_to_remove)`` tokens; the count is negative, as in transformers."""
        if tokens_to_remove > 0:
            raise ValueError(
                f"tokens_to_remove is {tokens_to_remove}: give a negative count of tokens to remove"
            )
        if self._buffers is not None:
            self._length = max(0, self._length + tokens_to_remove)

    def reset(self) -> None:
        """Forget everything, buffers included."""
        self._buffers = None
        self._length = 0
        # Else transformers 5.0 would fill with zeros what is there no more.
        self.is_initialized = False
        super().reset()

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep only these batch rows."""
        self._map_buffers(lambda buffer: buffer[indices])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every batch row ``repeats`` times."""
        self._map_buffers(lambda buffer: buffer.repeat_interleave(repeats, dim=0))

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Reorder the batch rows."""
        self._map_buffers(lambda buffer: buffer.index_select(0, beam_idx.to(buffer.device)))

    def _map_buffers(self, change: Any) -> None:
        if self._buffers is not None:
            keys, values = self._buffers
            self._buffers = change(keys), change(values)

    def _reserve(
        self, keys: torch.Tensor, values: torch.Tensor, needed: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self._buffers is None or self._buffers[0].shape[1] < needed:
            capacity = needed + max(_LEAST_ROOM, needed // 2)
            grown = tuple(new.new_empty(len(new), capacity, *new.shape[2:]) for new in (keys, values))
            if self._buffers is not None:
                for old, new in zip(self._buffers, grown, strict=True):
                    new[:, : self._length] = old[:, : self._length]
            self._buffers = (grown[0], grown[1])
        return self._buffers


def _view(buffer: torch.Tensor, length: int) -> torch.Tensor:
    # Sliced by `narrow`, which takes half the time of an index.
    return buffer.narrow(1, 0, length).transpose(1, 2)


def _nothing(given: torch.Tensor | None) -> None:
    """Pass over the nothing that transformers sets where a layer begins anew; refuse anything else."""
    if given is not None and given.numel():
        raise ValueError("keys and values of this cache are appended, not set: use update, crop and reset")


class GrowingCache(Cache):
    """A transformers cache of `GrowingLayer`, one a decoder layer.

    Parameters
    ----------
    num_layers
        Decoder layers of the model.
    """

    def __init__(self, num_layers: int) -> None:
        self.growing = [GrowingLayer() for _ in range(num_layers)]
        super().__init__(layers=[*self.growing])

    def length(self, layer: int) -> int:
        """Tokens layer number ``layer`` (from 0) has seen."""
        return self.growing[layer].get_seq_length()

    def crop_to(self, first: int, last: int, length: int) -> None:
        """Cut layers ``first`` to ``last - 1`` back to ``length`` tokens where they hold more."""
        for layer in self.growing[first:last]:
            layer.crop(min(0, length - layer.get_seq_length()))


def cache_argument(forward: Callable[..., Any], cache: Cache) -> dict[str, Cache]:
    """Give a model's forward its cache: transformers 5.24 renamed ``past_key_values`` to ``cache``."""
    renamed = "cache" in inspect.signature(forward).parameters
    return {"cache" if renamed else "past_key_values": cache}


class SeenCache(Cache):
    """An empty cache that says every layer has seen ``length`` tokens: what mask builders ask a cache for.

    Parameters
    ----------
    num_layers
        Decoder layers of the model.
    length
        Tokens seen.
    """

    def __init__(self, num_layers: int, length: int) -> None:
        super().__init__(layers=[_SeenLayer(length)] * num_layers)


class _SeenLayer(GrowingLayer):
    def __init__(self, length: int) -> None:
        super().__init__()
        self._length = length
        self.is_initialized = True

    def update(self, *_args: Any, **_kwargs: Any) -> Any:
        raise RuntimeError("a cache that is only asked for its length was written to")
