"""Where the decision reads logits: on the host, in memory that is not allocated anew from step to step.

On the CPU that is the tensor's own memory where its rows lie there as they are.  From a CUDA device the logits go into
page-locked memory that is kept and filled again: copied on a stream of its own, so that later work of the model need
not wait, and waited for by an event.
For `decoding`, `scoring` and `model`; needs the decision only.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from offramp import _core

_NAMES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


class Stream(Protocol):
    """Copies from a device, one after another, beside its other work."""

    def memory(self, size: int) -> torch.Tensor:
        """Allocate so many bytes (size,) of the host."""

    def copy(self, logits: torch.Tensor, buffer: torch.Tensor) -> None:
        """Begin to copy as soon as the logits are computed; returns at once."""

    def wait(self) -> None:
        """Return when everything begun has arrived."""


class Stage:
    """Takes decisions on logits (B, S) wherever they are.

    Each generation has its own: what one has under way, finished or abandoned, cannot reach another's memory.  Logits
    that must be copied go into one memory, as large as the largest so far.

    Parameters
    ----------
    stream
        How logits come from their device; ``None`` where the host can read them.

    Examples
    --------
    >>> import torch
    >>> stage = Stage.on(torch.device("cpu"))
    >>> tokens, exits = stage.exits(torch.tensor([[0.0, 3.0, 1.0]]), 0.5)
    >>> tokens.tolist(), exits.tolist()
    ([1], [True])
    """

    def __init__(self, stream: Stream | None = None) -> None:
        self._stream = stream
        self._memory = _allocate(0)
        self._answers = np.empty(0, np.int64), np.empty(0, np.bool_)
        self._buffers: dict[tuple[torch.Size, torch.dtype], tuple[torch.Tensor, NDArray[Any]]] = {}

    @classmethod
    def on(cls, device: torch.device) -> Stage:
        """Return a stage for logits on this device."""
        return cls(CudaStream(device) if device.type == "cuda" else None)

    def exits(self, logits: torch.Tensor, tau: float) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Find each row's token, and whether its margin reaches ``tau``, as :func:`offramp.decide` does.

        The margin itself is not computed where the two largest logits show that it falls short.

        Parameters
        ----------
        logits : (B, S)
            float32, float16 or bfloat16, on the stage's device.
        tau
            The threshold.

        Returns
        -------
        tokens : int64 array (B,)
            Written anew by the next call, as is ``exits``.
        exits : bool array (B,)

        Raises
        ------
        TypeError
            Another dtype.
        ValueError
            NaN or +inf, a row of nothing but -inf, or no logits.
        """
        tokens, exits = self._answers
        if len(tokens) != len(logits):
            tokens, exits = self._answers = np.empty(len(logits), np.int64), np.empty(len(logits), np.bool_)
        _core.exits_rows(self._read(logits), _name(logits), tau, tokens, exits)
        return tokens, exits

    def top2_margin(self, logits: torch.Tensor) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Find each row's token (B,) and margin (B,), as :func:`offramp.top2_margin` does.

        Takes and refuses what `exits` does; both arrays are new ones.
        """
        return _core.top2_margin_rows(self._read(logits), _name(logits))

    def _read(self, logits: torch.Tensor) -> NDArray[Any]:
        """Logits as memory of the host, valid until the next call."""
        if self._stream is None:
            try:
                view = _view(logits)
            except (RuntimeError, TypeError):
                # In need of a gradient, negated, or elsewhere; to ask beforehand takes as long as to look.
                view = None
            if view is not None and view.flags.c_contiguous:
                return view
        buffer, view = self._buffers.get((logits.shape, logits.dtype)) or self._buffer(logits)
        if self._stream is None:
            buffer.copy_(logits.detach())
        else:
            self._stream.copy(logits.detach(), buffer)
            self._stream.wait()
        return view

    def _buffer(self, logits: torch.Tensor) -> tuple[torch.Tensor, NDArray[Any]]:
        """Lay logits out in the memory, row after row; as a tensor and as numpy sees it."""
        size = logits.numel() * logits.itemsize
        if size > len(self._memory):
            self._buffers.clear()
            allocate = _allocate if self._stream is None else self._stream.memory
            self._memory = allocate(size)
        buffer = self._memory[:size].view(logits.dtype).view(logits.shape)
        found = self._buffers[logits.shape, logits.dtype] = buffer, _view(buffer)
        return found


class CudaStream:
    """A stream beside the device's current one, and page-locked memory."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._computed, self._copied = torch.cuda.Event(), torch.cuda.Event()

    def memory(self, size: int) -> torch.Tensor:
        """Allocate page-locked memory, which the device writes to without the processor's help."""
        return _allocate(size, pin_memory=True)

    def copy(self, logits: torch.Tensor, buffer: torch.Tensor) -> None:
        """Begin to copy once the current stream has computed the logits."""
        self._computed.record(torch.cuda.current_stream(logits.device))
        self._stream.wait_event(self._computed)
        with torch.cuda.stream(self._stream):
            buffer.copy_(logits, non_blocking=True)
        # Should the caller drop the logits, their memory is not used again before they are copied.
        logits.record_stream(self._stream)
        self._copied.record(self._stream)

    def wait(self) -> None:
        """Wait for the copies."""
        self._copied.synchronize()


def _allocate(size: int, *, pin_memory: bool = False) -> torch.Tensor:
    # Elsewhere than on the CPU not even where torch is told to allocate there unless told otherwise.
    return torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=pin_memory)


def _name(logits: torch.Tensor) -> str:
    return _NAMES.get(logits.dtype) or str(logits.dtype).removeprefix("torch.")


def _view(tensor: torch.Tensor) -> NDArray[Any]:
    """View a tensor as numpy does; numbers of two bytes as their bits, since numpy has no bfloat16."""
    return (tensor.view(torch.uint16) if tensor.itemsize == 2 else tensor).numpy()
