"""The exit decision of one step: the most likely token, its top-2 softmax margin, and whether to exit."""

from __future__ import annotations

from math import isnan
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from offramp import _core
from offramp.arrays import Floats, as_floats, bfloat16_to_float32, tensor_row
from offramp.errors import InputError

Tokens: TypeAlias = int | NDArray[np.int64]
Margins: TypeAlias = float | NDArray[np.float32]
Exits: TypeAlias = bool | NDArray[np.bool_]


class Decision(NamedTuple):
    """What :func:`decide` returns: Python scalars for one row of logits, arrays (B,) for a batch."""

    token: Tokens
    """Index of the largest logit; the lowest such index."""
    margin: Margins
    """p(1) - p(2) of the softmax, a float32 value."""
    exit: Exits
    """Whether the margin reaches tau."""


def top2_margin(logits: Any) -> tuple[Tokens, Margins]:
    """Find the most likely token and by how much probability it leads: p(1) - p(2) of the softmax.

    The margin is ``-expm1(l2 - l1) / sum(exp(l - l1))`` with l1, l2 the two largest logits (Scheffer et al.
    2001, "breaking ties").  Every machine and instruction set returns the same bits, and so does
    :func:`offramp.reference.top2_margin`.  Against exact arithmetic the margin is off by at most 2e-7, and by
    at most 6e-7 of itself where it is a normal float32 number, for up to 300 000 logits.

    Parameters
    ----------
    logits : array_like, shape (V,) or (B, V)
        float32, float16 or bfloat16, read in place where the memory allows; lists are read as float32.
        -inf marks tokens that cannot be chosen.

    Returns
    -------
    token : int, or int64 array of shape (B,)
        Index of the largest logit; of several, the lowest.
    margin : float, or float32 array of shape (B,)
        In [0, 1]; 0 where the maximum is tied, 1 where only one token can be chosen.

    Raises
    ------
    TypeError
        Another dtype.
    ValueError
        Another shape, nothing in it, NaN or +inf, or a row of nothing but -inf; row and index are named.

    Examples
    --------
    >>> import numpy as np
    >>> import offramp
    >>> token, margin = offramp.top2_margin(np.log(np.array([0.2, 0.7, 0.1], dtype=np.float32)))
    >>> token, round(margin, 6)
    (1, 0.5)
    """
    if type(logits) is np.ndarray:
        if (found := _core.top2_margin_row(logits)) is not None:
            return found
    elif (row := tensor_row(logits)) is not None:
        return _core.top2_margin_at(*row)
    values, dtype = read_logits(logits)
    if values.ndim == 1:
        tokens, margins = _core.top2_margin_rows(values[None], dtype)
        return int(tokens[0]), float(margins[0])
    return _core.top2_margin_rows(values, dtype)


def decide(logits: Any, tau: ArrayLike) -> Decision:
    """Decide for each row of logits which token it names and whether its margin reaches the threshold.

    Parameters
    ----------
    logits : array_like, shape (V,) or (B, V)
        As :func:`top2_margin` takes them.
    tau : float or array_like of shape (B,)
        The threshold, or one for each row; compared as float64.  +inf never exits.

    Returns
    -------
    Decision
        ``(token, margin, exit)``; ``exit`` is ``float64(margin) >= tau``.

    Raises
    ------
    TypeError
        A dtype that is not supported.
    ValueError
        As :func:`top2_margin`; a tau that is NaN or has another shape.

    Examples
    --------
    >>> import numpy as np
    >>> import offramp
    >>> logits = np.log(np.array([[0.2, 0.7, 0.1], [0.4, 0.35, 0.25]], dtype=np.float32))
    >>> offramp.decide(logits, 0.4).exit
    array([ True, False])
    """
    token, margin = top2_margin(logits)
    if isinstance(margin, float):
        return Decision(token, margin, margin >= _one_tau(tau))
    return Decision(token, margin, margin.astype(np.float64) >= read_tau(tau, len(margin)))


def _one_tau(tau: Any) -> float:
    # Reading any kind of threshold takes far longer than seeing that a float is not NaN.
    # numpy's float64 is one, too, and compares to numpy's bool.
    return float(tau if isinstance(tau, float) and not isnan(tau) else read_tau(tau, None))


def read_logits(logits: Any) -> Floats:
    """Read logits of shape (V,) or (B, V) in a dtype the decision works in."""
    if isinstance(logits, (list, tuple)):
        with np.errstate(over="ignore"):
            logits = np.asarray(as_floats(logits, "logits").values, dtype=np.float32)
    floats = as_floats(logits, "logits")
    if floats.dtype == "float64":
        raise TypeError(
            "logits has dtype float64: give float16, bfloat16 or float32, for instance"
            " logits.astype('float32')"
        )
    if floats.values.ndim not in (1, 2):
        raise InputError(
            f"logits has shape {floats.values.shape}: give one row of shape (V,) or a batch of shape (B, V)"
        )
    return floats


def read_tau(tau: Any, rows: int | None) -> NDArray[np.float64]:
    """Read a threshold, or one for each of `rows` rows, as float64."""
    if isinstance(tau, (float, int, np.integer)):
        values = np.array(tau, dtype=np.float64)
    else:
        values = widen(as_floats(tau, "tau")).astype(np.float64)
    if values.shape not in ((), (rows,)):
        expected = "one number" if rows is None else f"one number or an array of shape ({rows},)"
        raise InputError(f"tau has shape {values.shape}: give {expected}")
    if np.isnan(values).any():
        where = "it" if values.ndim == 0 else f"tau[{int(np.isnan(values).argmax())}]"
        raise InputError(f"tau must be a number, but {where} is nan; inf never exits")
    return values


def widen(floats: Floats) -> NDArray[Any]:
    """Hold 16-bit floats as float32, leave the others."""
    if floats.dtype == "bfloat16":
        return bfloat16_to_float32(floats.values)
    if floats.dtype == "float16":
        return floats.values.view(np.float16).astype(np.float32)
    return floats.values
