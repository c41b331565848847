"""The compiled core: arguments are checked and laid out by `offramp.calibration` and its neighbours."""

from typing import Any, final

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "Layers",
    "__version__",
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
    linear: tuple[int, int, int, int],
    rows: int,
    out: int,
    count: int,
    width: int,
    threads: int,
) -> None: ...
def norm_rows(dtype: str, rows: int, out: int, count: int, width: int, norm: tuple[int, float]) -> None: ...
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

@final
class Layers:
    def __new__(
        cls,
        dtype: str,
        width: int,
        layers: list[Any],
        before: tuple[int, int, int, int] | None = None,
        after: tuple[int, float] | None = None,
    ) -> Layers: ...
    def run(self, first: int, last: int, threads: int, given: Any) -> None: ...
