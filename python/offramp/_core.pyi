"""The compiled core: arguments are checked and laid out by `offramp.calibration` and its neighbours."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "__version__",
    "attend_rows",
    "binomial_p_value",
    "binomial_upper_bound",
    "calibrate_cascade",
    "certify",
    "evidence_suffices",
    "exits_rows",
    "fast_calibrate",
    "instruction_set",
    "instruction_sets",
    "multiply_rows",
    "norm_rows",
    "sort_by_score",
    "steps_fast",
    "threshold_curve",
    "top2_margin_at",
    "top2_margin_row",
    "top2_margin_rows",
]

__version__: str

def fast_calibrate(
    scores: NDArray[Any],
    dtype: str,
    correct: NDArray[np.uint8],
    heads: int | None,
    eps: NDArray[np.float64],
    by_index: bool,
    threads: int,
) -> NDArray[np.float64]: ...
def sort_by_score(
    scores: NDArray[Any], dtype: str, correct: NDArray[np.uint8], threads: int
) -> tuple[NDArray[Any], NDArray[np.uint8]]: ...
def threshold_curve(
    scores: NDArray[Any], dtype: str, correct: NDArray[np.uint8], threads: int
) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.int64]]: ...
def instruction_set() -> str: ...
def instruction_sets() -> list[str]: ...
def steps_fast() -> bool: ...
def multiply_rows(
    dtype: str,
    linears: list[tuple[int, int, int]],
    rows: int,
    out: int,
    count: int,
    width: int,
    threads: int,
    norm: tuple[int, float] | None = None,
    residual: int = 0,
    factor: float = 1.0,
    gated: bool = False,
) -> None: ...
def norm_rows(dtype: str, rows: int, out: int, count: int, width: int, norm: tuple[int, float]) -> None: ...
def attend_rows(
    dtype: str,
    projected: int,
    rotary: tuple[int, int, int],
    cache: tuple[int, int],
    out: int,
    count: int,
    seen: int,
    heads: tuple[int, int, int],
    scaling: float,
    window: int,
    threads: int,
    norms: tuple[tuple[int, float], tuple[int, float]] | None = None,
) -> None: ...
def exits_rows(
    logits: NDArray[Any],
    dtype: str,
    tau: float,
    tokens: NDArray[np.int64],
    exits: NDArray[np.bool_],
) -> None: ...
def top2_margin_row(logits: object) -> tuple[int, float] | None: ...
def top2_margin_at(address: int, count: int, dtype: str) -> tuple[int, float]: ...
def top2_margin_rows(logits: NDArray[Any], dtype: str) -> tuple[NDArray[np.int64], NDArray[np.float32]]: ...
def binomial_p_value(errors: int, n: int, alpha: float) -> float: ...
def binomial_upper_bound(errors: int, n: int, delta: float) -> float: ...
def evidence_suffices(errors: int, n: int, alpha: float, delta: float) -> bool: ...
def certify(
    scores: NDArray[Any],
    dtype: str,
    correct: NDArray[np.uint8],
    eps: float,
    delta: float,
    method: str,
    grid: NDArray[np.float64] | None,
    places: list[int],
    unit: bool,
    groups: tuple[NDArray[np.uint32], int, int] | None,
    threads: int,
) -> tuple[float, int, int, float]: ...
def calibrate_cascade(
    scores: NDArray[Any],
    dtype: str,
    correct: NDArray[np.uint8],
    heads: int,
    eps: float,
    mode: str,
    costs: list[float],
    budget: float,
    held_out: tuple[NDArray[np.uint8], float] | None,
    groups: tuple[NDArray[np.uint32], int, int] | None,
    threads: int,
) -> tuple[list[float], list[int], list[int], int]: ...
