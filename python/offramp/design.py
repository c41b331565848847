"""What certificates fix before they look at a label: thresholds, ranks, starts, groups and halves.

Shared by the compiled core's face and the specification, so that both answer the same question.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, SupportsIndex

import numpy as np
from numpy.typing import NDArray

from offramp.arrays import as_targets
from offramp.errors import InputError

METHODS = ("e-process", "fixed-sequence", "bonferroni", "sgr")
GROUP_METHODS = ("betting", "one-per-group")
MODES = ("sequential", "marginal", "budget")

_RANKS = 200
_STARTS = 8
# Between a half and 1 the lattice is even in the logarithm of the distance to 1, since scores crowd there.
_START_EXPONENTS = (12, 8, 6, 4, 3, 2, 1)

_INDEPENDENT = "Samples are independent draws from what the threshold will meet."
_PER_GROUP = (
    "Groups are independent draws; one sample of each was drawn, so the risk is that of a random sample of a random"
    " group."
)
_IN_GROUPS = (
    "Groups are independent draws, their ids tell nothing of their labels, and no group can have more than {most}"
    " samples{known}; within one, samples may be alike in any way."
)
_WALKED = "The thresholds tried were fixed before the labels were seen."
_VALID = {
    "e-process": (
        "Valid at all thresholds at once for the mean risk of the samples that were scored; for the risk of the"
        " population at a fixed number of samples that is an approximation, which population=True removes."
    ),
    "fixed-sequence": _WALKED,
    "betting": _WALKED,
    "bonferroni": "The ranks tried were fixed beforehand.",
    "sgr": "Risk rises with coverage; where it does not, the promise is unproven.",
}
_POPULATION = "Valid at all thresholds at once, for the risk of the population."


class Groups(NamedTuple):
    """The group of every sample."""

    of: NDArray[np.uint32]
    """Group numbers from 0 on, (N,)."""
    number: int
    """How many groups there are."""
    most: int
    """The most samples one group can have."""


@dataclass(frozen=True)
class Question:
    """A certificate asked for, read and laid out.

    Attributes
    ----------
    eps, delta : float
        Accuracy to certify, and how likely the certificate may be false.
    method : str
        What to compute: one of `METHODS`, or "betting" on groups.
    keep : (M,) int64 or None
        The samples to use; None for all.
    grid : (G,) float64 or None
        Thresholds to try, ascending; None for all scores.
    places : tuple of int
        Starts among the thresholds, or the ranks of ``bonferroni``.
    unit : bool
        Whether the thresholds are the default ones, which are for scores in [0, 1].
    groups : Groups or None
        For tests that bet on groups.
    assumptions : str
        In words.
    """

    eps: float
    delta: float
    method: str
    keep: NDArray[np.int64] | None
    grid: NDArray[np.float64] | None
    places: tuple[int, ...]
    unit: bool
    groups: Groups | None
    assumptions: str


def ask(
    samples: int,
    eps: Any,
    *,
    delta: Any,
    method: str,
    groups: Any,
    group_method: str,
    max_group_size: Any,
    grid: Any,
    population: bool,
    seed: int,
) -> Question:
    """Read the arguments of ``certify`` for a number of samples.

    Raises
    ------
    InputError
        An argument that cannot be used, or does not go with another.
    """
    for name, value, known in (("method", method, METHODS), ("group_method", group_method, GROUP_METHODS)):
        if value not in known:
            raise InputError(f"{name} is {value!r}: choose {_listed(known)}")
    target = as_target(eps)
    level = as_level(delta)
    if population and method != "e-process":
        raise InputError(
            f"population goes with method 'e-process' only: method {method!r} needs no such step"
        )
    bets = groups is not None and group_method == "betting"
    if max_group_size is not None and not bets:
        raise InputError("max_group_size is for bets on groups: give groups as well, or leave it out")
    keep, known_groups, drawn = None, None, _INDEPENDENT
    if bets:
        method = _betting_for(method, population=population)
        known_groups = as_groups(groups, samples, max_group_size)
        drawn = _in_groups(known_groups, max_group_size)
    elif groups is not None:
        keep = one_per_group(as_groups(groups, samples), seed)
        drawn = _PER_GROUP
    if population:
        keep = poisson_part(samples, keep, seed)
    thresholds, places = _tries(method, grid, samples if keep is None else len(keep))
    return Question(
        target,
        level,
        method,
        keep,
        thresholds,
        places,
        unit=grid is None and thresholds is not None,
        groups=known_groups,
        assumptions=f"{drawn}  {_POPULATION if population else _VALID[method]}",
    )


def _betting_for(method: str, *, population: bool) -> str:
    if method in ("bonferroni", "sgr"):
        raise InputError(
            f"group_method is 'betting', which walks thresholds, but method is {method!r}: use 'one-per-group',"
            " or method 'fixed-sequence'"
        )
    if population:
        raise InputError("population does not go with bets on groups: leave it out")
    return "betting"


def _in_groups(groups: Groups, max_group_size: Any) -> str:
    known = ", the most one has here" if max_group_size is None else ""
    return _IN_GROUPS.format(most=groups.most, known=known)


def _tries(method: str, grid: Any, samples: int) -> tuple[NDArray[np.float64] | None, tuple[int, ...]]:
    """Return thresholds to try, None for all scores, and the starts among them; for ``bonferroni`` the ranks."""
    if method == "bonferroni":
        return None, ranks(grid, samples)
    if method == "sgr" and grid is not None:
        raise InputError("grid does not go with method 'sgr', which bisects over ranks: leave it out")
    walks = method in ("fixed-sequence", "betting")
    if grid is not None:
        thresholds = as_grid(grid)
        return thresholds, even_starts(len(thresholds)) if walks else ()
    if walks:
        thresholds = lattice()
        return thresholds, lattice_starts(thresholds)
    return None, ()


_PROMISES = {
    "marginal": "Each head was calibrated by itself on all samples: what shallower heads leave can be harder.",
    "sequential": "Each head was calibrated on what the heads before it left.  Of new samples nothing is promised.",
    "budget": "The share holds on these samples.  Of new samples nothing is promised.",
}
_CERTIFIED = {
    "sequential": "on new samples every head that exits is accurate to at least {eps:g} on what reaches it",
    "budget": "of all new samples at most {budget:g} leave early and wrong",
}


@dataclass(frozen=True)
class CascadeQuestion:
    """A cascade asked for, read and laid out.

    Attributes
    ----------
    eps, budget : float
        Target accuracy, and the share of all samples that may leave early and wrong.
    costs : (K + 1,) float64 or None
        By exit, the whole model last.
    delta : float or None
        How likely the certificate may be false.
    half : (N,) uint8 or None
        With delta: 0 for samples that propose, 1 for those that certify.
    groups : Groups or None
        For tests that bet on groups.
    assumptions : str
        In words.
    """

    eps: float
    budget: float
    costs: NDArray[np.float64] | None
    delta: float | None
    half: NDArray[np.uint8] | None
    groups: Groups | None
    assumptions: str


def ask_cascade(
    heads: int,
    samples: int,
    eps: Any,
    *,
    mode: str,
    costs: Any,
    budget: Any,
    delta: Any,
    groups: Any,
    max_group_size: Any,
    seed: Any,
) -> CascadeQuestion:
    """Read the arguments of ``calibrate_cascade`` for (heads, samples).

    Raises
    ------
    InputError
        An argument that cannot be used, or does not go with another.
    """
    if mode not in MODES:
        raise InputError(f"mode is {mode!r}: choose {_listed(MODES)}")
    target = as_target(eps)
    known_costs = as_costs(costs, heads)
    if mode == "budget" and known_costs is None:
        raise InputError(
            "costs are needed for mode 'budget': give the cost of a sample by exit, the whole model last"
        )
    if mode != "budget" and budget is not None:
        raise InputError(f"budget goes with mode 'budget', but mode is {mode!r}: leave it out")
    share = 1.0 - target
    if budget is not None:
        shares, single = as_targets(budget, "budget")
        if not single:
            raise InputError(f"budget has shape ({len(shares)},): give one number")
        share = float(shares[0])
    if max_group_size is not None and (delta is None or groups is None):
        raise InputError(
            "max_group_size is for certificates on groups: give delta and groups as well, or leave it out"
        )
    if delta is None:
        if groups is not None:
            raise InputError("groups matter to certificates only: give delta as well, or leave them out")
        return CascadeQuestion(target, share, known_costs, None, None, None, _PROMISES[mode])
    if mode == "marginal":
        raise InputError(
            "delta goes with mode 'sequential' or 'budget': marginal thresholds hold for heads alone"
        )
    level = as_level(delta)
    known_groups = None if groups is None else as_groups(groups, samples, max_group_size)
    certified = _CERTIFIED[mode].format(eps=target, budget=share)
    drawn = _INDEPENDENT if known_groups is None else _in_groups(known_groups, max_group_size)
    return CascadeQuestion(
        target,
        share,
        known_costs,
        level,
        halves(samples, known_groups, as_seed(seed)),
        known_groups,
        f"At confidence {1 - level:g} {certified}.  {drawn}",
    )


def lattice() -> NDArray[np.float64]:
    """Thresholds for scores in [0, 1], about even in the log-odds: eight to each halving of the distance to 0 or 1."""
    eighths = 1.0 + np.arange(8) / 8.0
    to_zero = np.concatenate([2.0**-k * eighths for k in range(5, 1, -1)])
    to_one = np.concatenate([2.0**-k * eighths for k in range(16, 1, -1)])
    return np.concatenate([[0.0], to_zero, [0.5], 1.0 - to_one[::-1], [1.0]])


def lattice_starts(thresholds: NDArray[np.float64]) -> tuple[int, ...]:
    """Places in the lattice a walk starts from."""
    wanted = np.array([1.0, *(1.0 - 2.0**-k for k in _START_EXPONENTS)])
    return tuple(int(place) for place in np.searchsorted(thresholds, wanted))


def even_starts(count: int) -> tuple[int, ...]:
    """Places a walk starts from among thresholds of the user's own, evenly spread, the highest one among them."""
    starts = min(_STARTS, count)
    return tuple(count - 1 - start * count // starts for start in range(starts))


def ranks(grid: Any, samples: int) -> tuple[int, ...]:
    """Ranks to try: the user's own, else evenly spread."""
    if grid is None:
        even = {rank * samples // (_RANKS + 1) for rank in range(1, _RANKS + 1)}
        return tuple(sorted(even - {0}))
    found = np.unique(np.asarray(grid))
    if found.dtype.kind not in "iu" or found.size == 0 or found[0] < 1 or found[-1] >= samples:
        raise InputError(
            f"grid must hold ranks for method 'bonferroni': whole numbers from 1 to {samples - 1}, the samples less one"
        )
    return tuple(int(rank) for rank in found)


def as_grid(grid: Any) -> NDArray[np.float64]:
    """Read thresholds of the user's own."""
    found = np.asarray(grid)
    if found.dtype.kind not in "iuf" or found.ndim != 1 or found.size == 0 or not np.isfinite(found).all():
        raise InputError(
            "grid must hold thresholds: give finite numbers of shape (G,), fixed before seeing labels"
        )
    return np.unique(found.astype(np.float64)) + 0.0


def as_groups(groups: Any, samples: int, max_group_size: Any = None) -> Groups:
    """Read group ids, one a sample, of any dtype that can be compared, and the most samples a group can have."""
    found = np.asarray(groups)
    if found.shape != (samples,) or found.dtype.hasobject:
        raise InputError(f"groups has shape {found.shape}: give one id for each of the {samples} samples")
    # Tokens of a sequence mostly stand together: number the stretches, which are few.
    begins = np.ones(samples, bool)
    begins[1:] = found[1:] != found[:-1]
    starts = np.flatnonzero(begins)
    _, numbers = np.unique(found[starts], return_inverse=True)
    lengths = np.diff(np.append(starts, samples))
    of = np.repeat(numbers.astype(np.uint32), lengths)
    sizes = np.bincount(numbers, weights=lengths)
    largest = int(sizes.max())
    most = largest if max_group_size is None else max_group_size
    if (
        isinstance(most, bool)
        or not isinstance(most, SupportsIndex)
        or not largest <= most.__index__() < 2**32
    ):
        raise InputError(
            f"max_group_size is {most!r}: give a whole number below 2^32 and of at least {largest}, which is what the"
            " largest group has here"
        )
    return Groups(of, len(sizes), most.__index__())


def one_per_group(groups: Groups, seed: int) -> NDArray[np.int64]:
    """Draw one sample of each group; ascending."""
    order = np.random.default_rng(seed).permutation(len(groups.of))
    chosen = np.empty(groups.number, np.int64)
    chosen[groups.of[order]] = order
    return np.sort(chosen)


def poisson_part(samples: int, keep: NDArray[np.int64] | None, seed: int) -> NDArray[np.int64]:
    """Draw a Poisson number of samples at random, none in the rare case that there are not so many."""
    known = np.arange(samples, dtype=np.int64) if keep is None else keep
    rng = np.random.default_rng([seed, 1])
    wanted = int(rng.poisson(max(len(known) - 4.0 * math.sqrt(len(known)), 0.0)))
    if wanted > len(known):
        return known[:0]
    return np.sort(rng.permutation(known)[:wanted])


def halves(samples: int, groups: Groups | None, seed: int) -> NDArray[np.uint8]:
    """Split the groups, or the samples where there are none, at random: 0 to propose thresholds, 1 to certify them."""
    count = samples if groups is None else groups.number
    half = np.zeros(count, np.uint8)
    half[np.random.default_rng(seed).permutation(count)[: (count + 1) // 2]] = 1
    return half if groups is None else half[groups.of]


def as_target(eps: Any) -> float:
    """Read one target accuracy in [0, 1]."""
    targets, single = as_targets(eps, "eps")
    if not single:
        raise InputError(f"eps has shape ({len(targets)},): give one number")
    return float(targets[0])


def as_level(delta: Any) -> float:
    """Read a failure probability."""
    if isinstance(delta, bool) or not isinstance(delta, int | float | np.floating) or not 0 < delta < 1:
        raise InputError(
            f"delta is {delta!r}: give the probability that the certificate may be false, between 0 and 1, such as 0.05"
        )
    return float(delta)


def as_seed(seed: Any) -> int:
    """Read a seed."""
    if isinstance(seed, bool) or not isinstance(seed, SupportsIndex) or seed.__index__() < 0:
        raise InputError(f"seed is {seed!r}: give a whole number of at least 0")
    return seed.__index__()


def as_costs(costs: Any, heads: int) -> NDArray[np.float64] | None:
    """Read the cost of a sample by where it leaves, the whole model last."""
    if costs is None:
        return None
    found = np.asarray(costs)
    if found.dtype.kind not in "iuf" or found.shape != (heads + 1,):
        raise InputError(
            f"costs has shape {found.shape}: give {heads + 1} numbers, one for each head and one for the whole model"
        )
    values = found.astype(np.float64)
    if not (np.isfinite(values).all() and (values >= 0).all() and values[-1] > 0):
        raise InputError("costs must be finite and not negative, and the whole model's above 0")
    return values


def _listed(names: Sequence[str]) -> str:
    quoted = [repr(name) for name in names]
    return f"{', '.join(quoted[:-1])} or {quoted[-1]}"
