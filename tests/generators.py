"""Seeded samples that hurt: every dtype, tie pattern and order a calibration might meet."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

DTYPES: dict[str, Any] = {
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "float32": np.float32,
    "float64": np.float64,
}

Shape = tuple[int, int]
Rng = np.random.Generator


def _bits(rng: Rng, shape: Shape, dtype: Any) -> NDArray[Any]:
    """Any finite bit pattern: every magnitude, both zeros, subnormals."""
    itemsize = np.dtype(dtype).itemsize
    raw = rng.integers(0, 2 ** (8 * itemsize), shape, dtype=f"u{itemsize}").view(dtype)
    with np.errstate(invalid="ignore"):  # ml_dtypes warns of the signalling NaNs among them
        return np.where(np.isfinite(raw), raw, np.zeros((), dtype))


def _subnormal(rng: Rng, shape: Shape, dtype: Any) -> NDArray[Any]:
    itemsize = np.dtype(dtype).itemsize
    sign = rng.integers(0, 2, shape).astype(f"u{itemsize}") << np.array(8 * itemsize - 1, f"u{itemsize}")
    return (rng.integers(0, 5, shape).astype(f"u{itemsize}") | sign).view(dtype)


def _few(rng: Rng, shape: Shape, dtype: Any) -> NDArray[Any]:
    return rng.choice(np.array([-1.5, -0.0, 0.0, 0.25, 0.5, 3.0]), shape).astype(dtype)


def _uniform(rng: Rng, shape: Shape, dtype: Any) -> NDArray[Any]:
    return rng.random(shape).astype(dtype)


def _sawtooth(rng: Rng, shape: Shape, dtype: Any) -> NDArray[Any]:
    period = int(rng.integers(2, 8))
    return np.broadcast_to(np.arange(shape[1]) % period, shape).astype(dtype)


SCORES: dict[str, Callable[[Rng, Shape, Any], NDArray[Any]]] = {
    "uniform": _uniform,
    "normal": lambda rng, shape, dtype: rng.normal(size=shape).astype(dtype),
    "negative": lambda rng, shape, dtype: -_uniform(rng, shape, dtype),
    "near one": lambda rng, shape, dtype: (1.0 - rng.random(shape) ** 8 / 64).astype(dtype),
    "heavy ties": _few,
    "two values": lambda rng, shape, dtype: rng.choice(np.array([0.25, 0.75]), shape).astype(dtype),
    "all equal": lambda rng, shape, dtype: np.full(shape, rng.normal(), dtype),
    "zeros of both signs": lambda rng, shape, dtype: rng.choice(np.array([-0.0, 0.0]), shape).astype(dtype),
    "subnormal": _subnormal,
    "any bits": _bits,
    "sorted": lambda rng, shape, dtype: np.sort(_uniform(rng, shape, np.float64), axis=1).astype(dtype),
    "reversed": lambda rng, shape, dtype: -np.sort(_uniform(rng, shape, np.float64), axis=1).astype(dtype),
    "sawtooth": _sawtooth,
    "largest": lambda rng, shape, dtype: (
        rng.choice(np.array([-1.0, 1.0]), shape).astype(dtype) * np.array(ml_dtypes.finfo(dtype).max, dtype)
    ),
}


def _calibrated(rng: Rng, scores: NDArray[Any]) -> NDArray[Any]:
    """Higher scores are right more often, as a useful head's are."""
    ranks = scores.astype(np.float64).argsort(axis=1).argsort(axis=1)
    return rng.random(scores.shape) < (ranks + 1) / scores.shape[1]


def _at_target(rng: Rng, scores: NDArray[Any]) -> NDArray[Any]:
    """Accuracy wanders around 3/4 at every rank."""
    order = scores.astype(np.float64).argsort(axis=1, kind="stable")
    pattern = np.resize(np.array([1, 1, 0, 1]), scores.shape[1])
    correct = np.empty(scores.shape, np.int64)
    np.put_along_axis(correct, order, np.broadcast_to(pattern, scores.shape), axis=1)
    return correct


CORRECT: dict[str, Callable[[Rng, NDArray[Any]], NDArray[Any]]] = {
    "coin": lambda rng, scores: rng.random(scores.shape) < 0.5,
    "mostly right": lambda rng, scores: (rng.random(scores.shape) < 0.9).astype(np.uint8),
    "mostly wrong": lambda rng, scores: (rng.random(scores.shape) < 0.1).astype(np.int8),
    "all right": lambda rng, scores: np.ones(scores.shape, np.int32),
    "all wrong": lambda rng, scores: np.zeros(scores.shape, bool),
    "calibrated": _calibrated,
    "at target": _at_target,
}


def targets(rng: Rng, samples: int) -> NDArray[np.float64]:
    """Target accuracies on and just beside the quotients that can occur, and the ends of the range."""
    accepted = int(rng.integers(1, samples + 1))
    quotient = rng.integers(0, accepted + 1) / accepted
    beside = [np.nextafter(quotient, 0.0), quotient, np.nextafter(quotient, 1.0)]
    return rng.permutation(np.array([*beside, 0.0, 1.0, 0.75, rng.random(), 5e-324, 1.0 - 2**-53]))
