"""Telling whether two loads of a language model hold the same weights, whatever their dtype or device.

For `storage` (heads belong to one model) and `data` (a corpus belongs to one model).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import nn

_SAMPLES_PER_PARAMETER = 64
# A weight rounded to bfloat16 moves by up to 2^-9 of itself; float16 loses what lies under 2^-25.
_RELATIVE = 2.0**-7
_ABSOLUTE = 2.0**-24


@dataclass(frozen=True, eq=False)
class Fingerprint:
    """A sample of a model's weights.

    Attributes
    ----------
    samples : (M,) float32, CPU
        Up to 64 values of every parameter, at evenly spaced places, parameters in the order of their names.
    shapes : str
        SHA-256 of the parameters' names and shapes.
    """

    samples: torch.Tensor
    shapes: str

    @property
    def digest(self) -> str:
        """SHA-256 of shapes and samples: equal for equal weights in one dtype, different after a cast."""
        data = self.samples.numpy().astype("<f4").tobytes()
        return hashlib.sha256(self.shapes.encode() + data).hexdigest()

    def matches(self, other: Fingerprint) -> bool:
        """Tell whether the other weights are these, up to the rounding of a cast to 16 bits."""
        if self.shapes != other.shapes or self.samples.shape != other.samples.shape:
            return False
        return bool(torch.allclose(self.samples, other.samples, rtol=_RELATIVE, atol=_ABSOLUTE))


def fingerprint(model: nn.Module) -> Fingerprint:
    """Take the fingerprint of a model's parameters; milliseconds, whatever the model's size."""
    names, samples = [], []
    for name, parameter in sorted(model.named_parameters()):
        names.append(f"{name}{tuple(parameter.shape)}")
        flat = parameter.detach().reshape(-1)
        count = min(_SAMPLES_PER_PARAMETER, flat.numel())
        places = torch.arange(count, device=flat.device) * flat.numel() // max(count, 1)
        samples.append(flat[places].to(device="cpu", dtype=torch.float32))
    shapes = hashlib.sha256("\n".join(names).encode()).hexdigest()
    return Fingerprint(torch.cat(samples) if samples else torch.zeros(0), shapes)
