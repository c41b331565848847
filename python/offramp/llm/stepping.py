"""Decoder layers prepared for the core, which runs the few rows of a step through all of them in one call.

What is done from Python between two products takes as long as the products: a third of a step of SmolLM2, and half of
asking a head.  For `lean`, and for `branch`, whose heads have a linear map before their layers and a norm after them.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch

from offramp import _core
from offramp.llm import few
from offramp.llm.cache import GrowingLayer
from offramp.llm.few import Linear
from offramp.llm.layer import LeanLayer, RMSNorm, Rotary

_address = torch.Tensor.data_ptr


class _Layer(NamedTuple):
    """What the core is told of a layer; it reads these names."""

    before_attention: tuple[int, float]
    projections: list[few.LinearAt]
    norms: tuple[tuple[int, float], tuple[int, float]] | None
    heads: tuple[int, int, int]
    scaling: float
    window: int
    output: few.LinearAt
    before_block: tuple[int, float]
    block: tuple[few.LinearAt, few.LinearAt]
    down: few.LinearAt
    residual: float
    table: int | None


class _Run(NamedTuple):
    """What the core is told of a run; it reads these names."""

    rows: int
    new: int
    positions: int
    tables: list[tuple[int, int, int]]
    partners: int
    caches: list[tuple[int, int]]
    seen: int
    picked: list[int] | None
    out: int


class Steps:
    """Layers in a row, with what a head has before and after them.

    Parameters
    ----------
    layers
        The layers.
    before
        A linear map of the rows, before the first layer.
    after
        A norm of the rows, after the last one.
    """

    @torch.no_grad()
    def __init__(
        self, layers: Sequence[LeanLayer], *, before: Linear | None = None, after: RMSNorm | None = None
    ) -> None:
        self.kinds = sorted({layer.kind for layer in layers if layer.kind is not None})
        linears = [item for layer in layers for item in _linears(layer)] + ([before] if before else [])
        norms = [item for layer in layers for item, _ in _norms(layer)] + ([after] if after else [])
        self._tensors = [
            tensor
            for tensor in chain(
                *((item.weight, item.bias) for item in linears), (item.weight for item in norms)
            )
            if tensor is not None
        ]
        self._places = [*map(_address, self._tensors)]
        # Their memory stays, also where somebody gives a parameter other memory meanwhile.
        self._kept = [tensor.detach() for tensor in self._tensors], linears
        self.dtype, self.width = linears[0].weight.dtype, len(layers[0].output.weight)
        self._heads = [_heads(layer)[1:] for layer in layers]
        self._core: _core.Layers | None = None
        if (
            self.dtype in few.NAMES
            and all(layer.is_common and _fit_together(layer, self.width) for layer in layers)
            and (before is None or before.has_shape(self.width, self.width))
            and (after is None or len(after.weight) == self.width)
            and few.are_plain(self.dtype, self._tensors)
        ):
            narrow = all(item.narrow is not None for item in linears)
            self._core = _core.Layers(
                few.NAMES[self.dtype],
                self.width,
                [self._layer(layer, narrow=narrow) for layer in layers],
                few.address(before, narrow=narrow) if before else None,
                _norm(after) if after else None,
            )

    @property
    def is_current(self) -> bool:
        """Whether everything is where it was when it was prepared."""
        return [*map(_address, self._tensors)] == self._places

    def takes(self, hidden: torch.Tensor) -> bool:
        """Whether rows (1, q, H) can go this way: nobody learns from them, and they are few."""
        return (
            self._core is not None
            and hidden.dtype is self.dtype
            and not torch.is_grad_enabled()
            and few.are_few(hidden)
        )

    def run(
        self,
        hidden: torch.Tensor,
        first: int,
        caches: Sequence[GrowingLayer],
        positions: torch.Tensor,
        tables: Sequence[Rotary],
        partner: torch.Tensor,
        picked: Sequence[int] | None = None,
    ) -> torch.Tensor:
        """Run layers, from number ``first`` on one for each cache, over new rows (1, q, H) of one sequence.

        Parameters
        ----------
        caches
            Of one length and not empty; keys and values of the rows are appended.
        positions : (1, q) int64
            Rotary positions of the rows.
        tables
            Cosines and signed sines (positions, head size), for each of `kinds`.
        partner : (head size,) int64
            The dimension each is turned with.
        picked : (n,) ints, optional
            Rows of which alone what follows the last layer's attention is computed.

        Returns
        -------
        torch.Tensor
            (1, q, H), or (1, n, H).

        Raises
        ------
        ValueError
            If what is given does not fit together; the caches are then as they were.
        """
        assert self._core is not None
        count, seen = hidden.shape[1], caches[0].get_seq_length()
        buffers = [cache.reserve(count) for cache in caches]
        if not (
            hidden.shape == (1, count, self.width)
            and few.are_plain(torch.int64, (positions, partner))
            and positions.shape == (1, count)
            and self._fit_angles(tables, len(partner))
            and all(cache.get_seq_length() == seen for cache in caches)
            and all(map(self._fits, caches, buffers, self._heads[first:]))
        ):
            raise ValueError("rows, their positions, their angles and the caches do not fit together")
        hidden = hidden.contiguous()
        kept = count if picked is None else len(picked)
        out = hidden.new_empty(1, kept, self.width)
        self._core.run(
            first,
            first + len(caches),
            torch.get_num_threads(),
            _Run(
                hidden.data_ptr(),
                count,
                positions.data_ptr(),
                [(cosines.data_ptr(), sines.data_ptr(), len(cosines)) for cosines, sines in tables],
                partner.data_ptr(),
                [(keys.data_ptr(), values.data_ptr()) for keys, values in buffers],
                seen,
                None if picked is None else list(picked),
                out.data_ptr(),
            ),
        )
        for cache in caches:
            cache.extend(count)
        return out

    def _fit_angles(self, tables: Sequence[Rotary], size: int) -> bool:
        """Whether there is a table for each kind, and for each number of a head an angle."""
        wanted = not tables or all(each == size for _, each in self._heads)
        return (
            wanted
            and len(tables) == len(self.kinds)
            and all(
                cosines.shape == sines.shape == (len(cosines), size)
                and few.are_plain(self.dtype, (cosines, sines))
                for cosines, sines in tables
            )
        )

    def _fits(
        self, cache: GrowingLayer, buffers: tuple[torch.Tensor, torch.Tensor], heads: tuple[int, int]
    ) -> bool:
        """Whether a cache's buffers are for keys and values of one sequence; for how many, it has seen to itself."""
        by, which = cache.checked
        if by is self and which is buffers:
            return True
        keys, values = buffers
        shape = keys.shape
        fits = shape == values.shape and shape[0] == 1 and shape[2:] == heads
        fits = fits and few.are_plain(self.dtype, buffers)
        if fits:
            cache.checked = self, buffers
        return fits

    def _layer(self, layer: LeanLayer, *, narrow: bool) -> _Layer:
        norms = None
        if layer.query_norm is not None and layer.key_norm is not None:
            norms = _norm(layer.query_norm), _norm(layer.key_norm)
        gate, up = halves(layer.block)
        return _Layer(
            _norm(layer.before_attention),
            [few.address(item, narrow=narrow) for item in layer.projections],
            norms,
            _heads(layer),
            layer.scaling,
            layer.window or 0,
            few.address(layer.output, narrow=narrow),
            _norm(layer.before_block),
            (few.address(gate, narrow=narrow), few.address(up, narrow=narrow)),
            few.address(layer.down, narrow=narrow),
            layer.residual,
            None if layer.kind is None else self.kinds.index(layer.kind),
        )


def halves(block: Sequence[Linear]) -> Sequence[Linear]:
    """Gate and up, also where they are one."""
    if len(block) == 2:
        return block
    ((weight, bias, narrow),) = block
    biases = (None, None) if bias is None else bias.chunk(2)
    numbers = (None, None) if narrow is None else map(few.Narrow, *(part.chunk(2) for part in narrow))
    return list(map(Linear, weight.chunk(2), biases, numbers))


def _heads(layer: LeanLayer) -> tuple[int, int, int]:
    """How many heads queries have, how many keys have, and their size."""
    wide, narrow, _ = layer.widths
    return wide // layer.head_size, narrow // layer.head_size, layer.head_size


def _fit_together(layer: LeanLayer, width: int) -> bool:
    """Whether the parts of a layer over rows of a width are of the sizes the core takes them to be."""
    gate, up = halves(layer.block)
    inner = len(gate.weight)
    heights = [len(item.weight) for item in layer.projections]
    return (
        sum(heights) == sum(layer.widths)
        and all(item.has_shape(high, width) for item, high in zip(layer.projections, heights, strict=True))
        and layer.output.has_shape(width, layer.widths[0])
        and gate.has_shape(inner, width)
        and up.has_shape(inner, width)
        and layer.down.has_shape(width, inner)
        and all(len(norm.weight) == size for norm, size in _norms(layer))
    )


def _linears(layer: LeanLayer) -> list[Linear]:
    return [*layer.projections, layer.output, *layer.block, layer.down]


def _norms(layer: LeanLayer) -> list[tuple[RMSNorm, int]]:
    """Give the layer's norms, each with the width of what it norms."""
    whole, each = len(layer.output.weight), layer.head_size
    norms = (
        (layer.before_attention, whole),
        (layer.before_block, whole),
        (layer.query_norm, each),
        (layer.key_norm, each),
    )
    return [(norm, size) for norm, size in norms if isinstance(norm, RMSNorm)]


def _norm(norm: Any) -> tuple[int, float]:
    # Of a common layer all norms are of this kind.
    assert isinstance(norm, RMSNorm)
    return norm.weight.data_ptr(), norm.eps
