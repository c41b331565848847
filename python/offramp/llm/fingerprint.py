"""Telling whether two loads of a language model hold the same weights, whatever their dtype or device.

For `storage` (heads belong to one model) and `data` (a corpus belongs to one model).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import nn

from offramp.errors import ModelError
from offramp.llm.trunk import plain_values

_SAMPLES_PER_PARAMETER = 64
# Two roundings of one weight, to bfloat16 and to float16, lie within 2^-8 of it; float16 loses what is under 2^-25.
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
        """Tell whether the other weights are these, up to a cast to 16 bits.

        Equal after the cast and not merely close, since a short fine-tuning moves weights by less than a rounding
        does.  Only float16 beside bfloat16, where neither is a cast of the other, is compared with a tolerance.
        """
        if self.shapes != other.shapes or self.samples.shape != other.samples.shape:
            return False
        mine, theirs = self.samples, other.samples
        halves = (torch.float16, torch.bfloat16)
        if torch.equal(mine, theirs) or any(
            torch.equal(mine, _cast(theirs, half)) or torch.equal(_cast(mine, half), theirs)
            for half in halves
        ):
            return True
        fits = [[torch.equal(samples, _cast(samples, half)) for half in halves] for samples in (mine, theirs)]
        if sorted(fits) != [[False, True], [True, False]]:
            return False
        return bool(torch.allclose(mine, theirs, rtol=_RELATIVE, atol=_ABSOLUTE))


def _cast(samples: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return samples.to(dtype).float()


def fingerprint(model: nn.Module) -> Fingerprint:
    """Take the fingerprint of a model's parameters; milliseconds, whatever the model's size.

    Raises
    ------
    ModelError
        If weights are offloaded.
    """
    names, samples = [], []
    for name, parameter in sorted(model.named_parameters()):
        if parameter.is_meta:
            raise ModelError(
                f"model: {name} is not in memory but offloaded; load the model with a device_map that offloads nothing"
            )
        names.append(f"{name}{tuple(parameter.shape)}")
        flat = plain_values(parameter).reshape(-1)
        count = min(_SAMPLES_PER_PARAMETER, flat.numel())
        places = torch.arange(count, device=flat.device) * flat.numel() // max(count, 1)
        samples.append(flat[places].to(device="cpu", dtype=torch.float32))
    shapes = hashlib.sha256("\n".join(names).encode()).hexdigest()
    return Fingerprint(torch.cat(samples) if samples else torch.zeros(0), shapes)
