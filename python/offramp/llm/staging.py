"""Where the decision reads logits: on the host, in place, allocating nothing from step to step.

On the CPU that is the tensor's own memory.  From a CUDA device the logits go into page-locked memory that is kept and
filled again: copied on a stream of its own, so that later work of the model need not wait, and waited for by an event.
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

    def buffer(self, logits: torch.Tensor) -> torch.Tensor:
        """Host memory for logits of this shape and dtype."""

    def copy(self, logits: torch.Tensor, buffer: torch.Tensor) -> None:
        """Begin to copy as soon as the logits are computed; returns at once."""

    def wait(self) -> None:
        """Return when everything begun has arrived."""


class Stage:
    """Takes decisions on logits (B, S) wherever they are.

    Each generation has its own: what one has under way, finished or abandoned, cannot reach another's memory.

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
        self._buffers: dict[tuple[torch.Size, torch.dtype], tuple[torch.Tensor, NDArray[Any]]] = {}

    @classmethod
    def on(cls, device: torch.device) -> Stage:
        """Return a stage for logits on this device."""
        return cls(CudaStream(device) if device.type == "cuda" else None)

    def exits(self, logits: torch.Tensor, tau: float) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Find each row's token (B,), and whether its margin reaches ``tau``, as :func:`offramp.decide` does.

        The margin itself is not computed where the two largest logits show that it falls short.
        """
        return _core.exits_rows(self._read(logits), _name(logits), tau)

    def top2_margin(self, logits: torch.Tensor) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Find each row's token (B,) and margin (B,), as :func:`offramp.top2_margin` does."""
        return _core.top2_margin_rows(self._read(logits), _name(logits))

    def _read(self, logits: torch.Tensor) -> NDArray[Any]:
        """Logits as memory of the host, valid until the next call."""
        if self._stream is None:
            try:
                view = _view(logits)
            except (RuntimeError, TypeError):
                # In need of a gradient, negated, or elsewhere; to ask beforehand takes as long as to look.
                view = None
            if view is None or not view.flags.c_contiguous:
                view = _view(logits.detach().resolve_neg().cpu().contiguous())
            return view
        key = (logits.shape, logits.dtype)
        if key not in self._buffers:
            buffer = self._stream.buffer(logits)
            self._buffers[key] = (buffer, _view(buffer))
        buffer, view = self._buffers[key]
        self._stream.copy(logits.detach(), buffer)
        self._stream.wait()
        return view


class CudaStream:
    """A stream beside the device's current one, and page-locked memory."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._computed, self._copied = torch.cuda.Event(), torch.cuda.Event()

    def buffer(self, logits: torch.Tensor) -> torch.Tensor:
        """Page-locked memory, which the device writes to without the processor's help."""
        return torch.empty(logits.shape, dtype=logits.dtype, pin_memory=True)

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


def _name(logits: torch.Tensor) -> str:
    return _NAMES.get(logits.dtype) or str(logits.dtype).removeprefix("torch.")


def _view(tensor: torch.Tensor) -> NDArray[Any]:
    """View a tensor as numpy does; numbers of two bytes as their bits, since numpy has no bfloat16."""
    return (tensor.view(torch.uint16) if tensor.itemsize == 2 else tensor).numpy()
