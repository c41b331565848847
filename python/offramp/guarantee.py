"""Thresholds with a finite-sample promise.

A threshold picked on its own calibration data promises nothing: on new data it misses its target about every second
time, however many samples there were.  `certify` finds the lowest threshold whose accuracy is at least eps at
confidence 1 - delta, by an exact test of the counts; ``docs/guarantees.md`` tells which test for which data.
"""

from __future__ import annotations

import math
from typing import Any, Literal, SupportsIndex, TypeAlias

import numpy as np

from offramp import _core
from offramp.arrays import as_floats, as_labels, as_thread_count, require_same_shape
from offramp.design import as_seed, ask
from offramp.errors import InputError
from offramp.outcomes import Certificate

CertifyMethod: TypeAlias = Literal["e-process", "fixed-sequence", "bonferroni", "sgr"]
GroupMethod: TypeAlias = Literal["betting", "one-per-group"]


def certify(
    scores: Any,
    correct: Any,
    eps: Any,
    *,
    delta: float = 0.05,
    method: CertifyMethod = "e-process",
    groups: Any = None,
    group_method: GroupMethod = "betting",
    max_group_size: SupportsIndex | None = None,
    grid: Any = None,
    population: bool = False,
    seed: int = 0,
    threads: SupportsIndex | None = None,
) -> Certificate:
    """Find the lowest threshold whose accuracy is at least eps, at confidence 1 - delta.

    Parameters
    ----------
    scores, correct : array_like, shape (N,)
        As for `offramp.fast_calibrate`.
    eps : float
        Accuracy to certify, in [0, 1].
    delta : float
        How likely the certificate may be false, between 0 and 1.
    method : {"e-process", "fixed-sequence", "bonferroni", "sgr"}
        ``"e-process"``: a test that may be read at every threshold, so that looking at the curve is no sin.
        ``"fixed-sequence"``: walks thresholds fixed beforehand from several starts downwards, each start at its share
        of delta, and stops at the first failure; the strongest where accuracy rises with the score.
        ``"bonferroni"``: ranks fixed beforehand, every one at its share of delta.
        ``"sgr"``: bisection over ranks (Geifman, El-Yaniv: Selective classification for deep neural networks,
        NIPS 2017), for risks that rise with coverage.
    groups : array_like, shape (N,), optional
        An id for each sample where samples are not independent, as the tokens of one sequence are not.  Tests that
        take them for independent certify falsely several times as often as delta.  Bets are made in the order of the
        ids, which must therefore tell nothing of the labels, as numbers given by difficulty would.
    group_method : {"betting", "one-per-group"}
        ``"betting"``: the walk of ``"fixed-sequence"`` with a test that bets on group after group, whatever the samples
        of one group have in common; with methods ``"e-process"`` and ``"fixed-sequence"``.  ``"one-per-group"``: one
        random sample of each group, then any method.
    max_group_size : int, optional
        For bets: the most samples a group can have, known before the data were, such as the longest sequence allowed.
        By default the largest group here; then the promise holds if no group can be larger, and may be false far more
        often than delta if larger ones are rare and worse.  The more it is, the less is certified.
    grid : array_like, shape (G,), optional
        Thresholds to try, fixed before the labels were seen; for ``"bonferroni"`` ranks counted from the highest score.
        By default all scores for ``"e-process"``, for walks a lattice over [0, 1] even in the log-odds, and 200 even
        ranks.
    population : bool
        With ``"e-process"``: use a Poisson number of the samples, 4 sqrt(N) fewer on average, which makes the promise
        exact for the risk of the population.
    seed : int
        Seed of what is drawn for ``"one-per-group"`` and ``population``.
    threads : int, optional
        How many threads to use; by default every core this process may use.

    Returns
    -------
    Certificate
        With ``found`` False and ``tau`` +inf where nothing can be certified.

    Raises
    ------
    ValueError, TypeError
        As for `offramp.fast_calibrate`, or arguments that do not go together.

    Examples
    --------
    >>> import numpy as np
    >>> from offramp import certify, fast_calibrate
    >>> rng = np.random.default_rng(0)
    >>> scores = rng.random(10_000)
    >>> correct = rng.random(10_000) < scores
    >>> round(fast_calibrate(scores, correct, 0.9), 3)
    0.827
    >>> certificate = certify(scores, correct, 0.9)
    >>> certificate.found, round(certificate.tau, 3)
    (True, 0.876)
    """
    values, dtype = as_floats(scores, "scores")
    labels = as_labels(correct, "correct").values
    require_same_shape("scores", values.shape, "correct", labels.shape)
    if values.ndim != 1:
        raise InputError(f"scores has shape {values.shape}: give shape (N,)")
    question = ask(
        len(values),
        eps,
        delta=delta,
        method=method,
        groups=groups,
        group_method=group_method,
        max_group_size=max_group_size,
        grid=grid,
        population=population,
        seed=as_seed(seed),
    )
    if question.keep is not None:
        values, labels = values[question.keep], labels[question.keep]
    tau, accepted, right, bound = math.inf, 0, 0, math.nan
    if len(values):
        tau, accepted, right, bound = _core.certify(
            values,
            dtype,
            labels,
            question.eps,
            question.delta,
            # The core tells bets from tests by the groups.
            "fixed-sequence" if question.method == "betting" else question.method,
            question.grid,
            list(question.places),
            question.unit,
            question.groups,
            as_thread_count(threads),
        )
    return Certificate(
        tau=tau,
        accepted=accepted,
        correct=right,
        bound=bound,
        method=question.method,
        assumptions=question.assumptions,
        found=bool(np.isfinite(tau)),
        n=len(values),
        eps=question.eps,
        delta=question.delta,
    )
