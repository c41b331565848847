"""Thresholds for several heads that hold together.

Head k only sees what no shallower head took.  Thresholds found for each head by itself then miss their target on the
deeper ones, which are left with what is hard; `calibrate_cascade` finds them on what really reaches each head.
"""

from __future__ import annotations

from typing import Any, Literal, SupportsIndex, TypeAlias

import numpy as np

from offramp import _core
from offramp.arrays import as_floats, as_labels, as_thread_count, require_same_shape
from offramp.design import ask_cascade
from offramp.errors import InputError
from offramp.outcomes import Cascade

Mode: TypeAlias = Literal["sequential", "marginal", "budget"]


def calibrate_cascade(
    scores: Any,
    correct: Any,
    eps: Any,
    *,
    mode: Mode = "sequential",
    costs: Any = None,
    budget: Any = None,
    delta: float | None = None,
    groups: Any = None,
    max_group_size: SupportsIndex | None = None,
    seed: int = 0,
    threads: SupportsIndex | None = None,
) -> Cascade:
    """Find a threshold for each of several heads, on the samples that really reach it.

    Parameters
    ----------
    scores, correct : array_like, shape (K, N)
        A row for each head, shallowest first; as for `offramp.fast_calibrate`.
    eps : float
        Target accuracy, in [0, 1].
    mode : {"sequential", "marginal", "budget"}
        ``"sequential"``: for each head the lowest threshold that reaches eps on what the heads before it left; all
        samples taken early then reach eps together.  ``"marginal"``: each head by itself on all samples, as in the
        paper.  ``"budget"``: the lowest expected cost with at most ``budget`` of all samples taken early and wrong.
    costs : array_like, shape (K + 1,), optional
        Cost of a sample by the head it leaves at, and of one the whole model answers; needed for ``"budget"``.
    budget : float, optional
        Share of all samples that may leave early and wrong; by default 1 - eps.
    delta : float, optional
        Certify: half of the groups propose ever lower thresholds, the other half tests them and keeps the last that
        hold.  Then at confidence 1 - delta every head reaches eps (``"budget"``: the share is kept) on new samples.
    groups : array_like, shape (N,), optional
        With ``delta``: an id for each sample, for samples that are alike within their groups, as the tokens of one
        sequence are.  Groups are then split whole and tests bet on one after the other.
    max_group_size : int, optional
        With ``groups``: the most samples a group can have, known before the data were, as for `offramp.certify`.  By
        default the largest group here; then the promise holds if no group can be larger.
    seed : int
        Seed of the split.
    threads : int, optional
        How many threads to use; by default every core this process may use.

    Returns
    -------
    Cascade
        Printing it shows a table.

    Raises
    ------
    ValueError, TypeError
        As for `offramp.fast_calibrate`, or arguments that do not go together.

    Examples
    --------
    >>> import numpy as np
    >>> from offramp import calibrate_cascade
    >>> scores = np.array([[0.9, 0.8, 0.3, 0.2], [0.9, 0.9, 0.6, 0.4]])
    >>> correct = np.array([[1, 1, 0, 0], [1, 1, 1, 0]])
    >>> cascade = calibrate_cascade(scores, correct, 0.9, costs=[1, 2, 4])
    >>> cascade.thresholds, cascade.accepted, cascade.expected_cost
    (array([0.8, 0.6]), array([2, 1]), 2.0)
    """
    values, dtype = as_floats(scores, "scores")
    labels = as_labels(correct, "correct").values
    require_same_shape("scores", values.shape, "correct", labels.shape)
    if values.ndim != 2:
        raise InputError(f"scores has shape {values.shape}: give (K, N), a row for each of K heads")
    heads, samples = values.shape
    question = ask_cascade(
        heads,
        samples,
        eps,
        mode=mode,
        costs=costs,
        budget=budget,
        delta=delta,
        groups=groups,
        max_group_size=max_group_size,
        seed=seed,
    )
    thresholds, accepted, right, counted = _core.calibrate_cascade(
        values.reshape(-1),
        dtype,
        labels.reshape(-1),
        heads,
        question.eps,
        mode,
        [] if question.costs is None else question.costs.tolist(),
        question.budget,
        None if question.half is None else (question.half, question.delta or 0.0),
        question.groups,
        as_thread_count(threads),
    )
    return Cascade.of(
        np.array(thresholds),
        np.array(accepted, dtype=np.int64),
        np.array(right, dtype=np.int64),
        n=counted,
        costs=question.costs,
        mode=mode,
        eps=question.eps,
        delta=question.delta,
        assumptions=question.assumptions,
    )
