"""Other ways to the token and margin of one row of logits, and ours beside them.

float16 and bfloat16 rows are torch's, whose softmax widens them to float32 as it reads; numpy, which computes slowly
in the one and not at all in the other, is given them widened.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from offramp.decision import decide

Contenders: TypeAlias = dict[str, Callable[[], Any]]
"""By name; each returns a token, a margin and, unless that is `WITHIN`, how far the margin may be from ours."""

OURS, READ = "offramp", "one read"
SOFTMAX = "torch softmax + topk"
WITHIN = 1e-6
# torch's softmax adds in float32, in an order that was seen to cost 7e-5 of the margin at V = 151 936.
SOFTMAX_WITHIN = 1e-4
# torch's logsumexp is a float32 around 20, where half a unit in the last place is 9.5e-7 of either probability.
LOGSUMEXP_WITHIN = 2e-6
VOCABULARIES = (32_000, 51_200, 128_256, 151_936, 256_000)
DTYPES = ("float32", "float16", "bfloat16")


def like_a_model(vocabulary: int, seed: int = 0) -> NDArray[np.float32]:
    """Draw a row as a model's: a wide heap, and a few tokens above it."""
    rng = np.random.default_rng(seed)
    logits = rng.standard_normal(vocabulary) * 2.5 - 2
    likely = rng.integers(0, vocabulary, 1 + vocabulary // 2000)
    logits[likely] += rng.uniform(0, 15, len(likely))
    return logits.astype(np.float32)


def contenders(logits: NDArray[np.float32], dtype: str) -> Contenders:
    """Name the ways to decide on the row as this dtype, and one read of it as float32, the floor in every dtype.

    Without torch there is float32 only.
    """
    if find_spec("torch") is None:
        return {OURS: lambda: decide(logits, 0.5)[:2], "numpy": lambda: by_numpy(logits), READ: logits.max}
    import torch  # noqa: PLC0415 - an optional dependency

    tensor = torch.from_numpy(logits).to(getattr(torch, dtype))
    widened = tensor.float().numpy()
    return {
        OURS: lambda: decide(tensor, 0.5)[:2],
        SOFTMAX: lambda: _by_softmax(torch, tensor),
        "torch logsumexp + topk": lambda: _by_logsumexp(torch, tensor),
        "numpy": lambda: by_numpy(widened),
        READ: widened.max,
    }


def agree(ours: tuple[int, float], other: tuple[int, float] | tuple[int, float, float]) -> bool:
    """Whether the token is the same, and the margin as far as the other computes it."""
    within = other[2] if len(other) == 3 else WITHIN
    return ours[0] == other[0] and abs(ours[1] - other[1]) <= within


def by_numpy(logits: NDArray[np.float32]) -> tuple[int, float]:
    """Softmax without the division, and a partition for the two largest."""
    weights = np.exp(logits - logits.max())
    second, first = np.partition(weights, -2)[-2:]
    return int(logits.argmax()), float((first - second) / weights.sum(dtype=np.float64))


def _by_softmax(torch: Any, logits: Any) -> tuple[int, float, float]:
    top = torch.softmax(logits, -1, dtype=torch.float32).topk(2)
    first, second = top.values.tolist()
    return int(top.indices[0]), first - second, SOFTMAX_WITHIN


def _by_logsumexp(torch: Any, logits: Any) -> tuple[int, float, float]:
    top = logits.topk(2)
    first, second = (top.values.float() - torch.logsumexp(logits.float(), -1)).exp().tolist()
    return int(top.indices[0]), first - second, LOGSUMEXP_WITHIN
