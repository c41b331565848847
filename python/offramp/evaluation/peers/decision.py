"""Other ways to the token and margin of one row of logits, and ours beside them.

float16 and bfloat16 rows are torch's, which widens them to float32; numpy, which computes slowly
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
"""By name; each returns a token and a margin."""

OURS, READ = "offramp", "one read"
SOFTMAX, FUSED = "torch softmax + topk", "torch.softmax() + topk"
LOGSUMEXP = "torch logsumexp + topk"
WITHIN = 1e-6
# torch's own softmax adds in float32, in an order that was seen to lose 7e-5 at V = 151 936; the one written out below
# adds as torch.sum does, in parts.  Which of the two is faster depends on the machine.
ROUNDING = {FUSED: 1e-4}
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

    widened = as_held(logits, dtype)
    tensor = torch.from_numpy(widened).to(getattr(torch, dtype))
    return {
        OURS: lambda: decide(tensor, 0.5)[:2],
        SOFTMAX: lambda: _by_softmax(tensor),
        FUSED: lambda: _by_fused_softmax(torch, tensor),
        LOGSUMEXP: lambda: _by_logsumexp(torch, tensor),
        "numpy": lambda: by_numpy(widened),
        READ: widened.max,
    }


def as_held(logits: NDArray[np.float32], dtype: str) -> NDArray[np.float32]:
    """Round a row to what this dtype holds; other dtypes than float32 need torch."""
    if dtype == "float32":
        return logits
    import torch  # noqa: PLC0415 - an optional dependency

    return torch.from_numpy(logits).to(getattr(torch, dtype)).float().numpy()


def check(found: Callable[[], tuple[int, float]], name: str, logits: NDArray[np.float32]) -> None:
    """Require a contender's token to be the row's, and its margin to lie within 1e-6 of exact arithmetic's.

    Contenders in `ROUNDING` may be off by as much as their own rounding is known to cost.

    Raises
    ------
    RuntimeError
        It is not.
    """
    token, margin = found()
    first, exact = exactly(logits)
    if token != first or not abs(margin - exact) <= ROUNDING.get(name, WITHIN):
        raise RuntimeError(
            f"{name} found token {token} by {margin!r}, where it is {first} by {exact!r}: its time means nothing"
        )


def exactly(logits: NDArray[np.float32]) -> tuple[int, float]:
    """Token and margin in float64."""
    descending = np.sort(logits.astype(np.float64))[::-1]
    weights = np.exp(descending - descending[0])
    return int(logits.argmax()), float(-np.expm1(descending[1] - descending[0]) / weights[::-1].sum())


def by_numpy(logits: NDArray[np.float32]) -> tuple[int, float]:
    """Softmax without the division, and a partition for the two largest."""
    weights = np.exp(logits - logits.max())
    second, first = np.partition(weights, -2)[-2:]
    return int(logits.argmax()), float((first - second) / weights.sum(dtype=np.float64))


def _by_softmax(logits: Any) -> tuple[int, float]:
    widened = logits.float()
    weights = (widened - widened.max()).exp()
    top = weights.topk(2)
    first, second = top.values.tolist()
    return int(top.indices[0]), (first - second) / float(weights.sum())


def _by_fused_softmax(torch: Any, logits: Any) -> tuple[int, float]:
    top = torch.softmax(logits, -1, dtype=torch.float32).topk(2)
    first, second = top.values.tolist()
    return int(top.indices[0]), first - second


def _by_logsumexp(torch: Any, logits: Any) -> tuple[int, float]:
    top = logits.topk(2)
    # Taken from the largest, so that the logarithm is near zero, where a float32 is fine enough.
    largest = top.values[0].float()
    rest = torch.logsumexp(logits.float() - largest, -1)
    first, second = (top.values.float() - largest - rest).exp().tolist()
    return int(top.indices[0]), first - second
