"""An alarm for deployment: early tokens no longer agree with the whole model as often as they should.

Some early tokens are compared with what the whole model says in their place.  `Monitor` bets against the promise after
every generated sequence: with ``Z = (wrong - (1 - eps) checked) / most`` of a sequence, ``most`` known before it began,
a stake is multiplied by ``1 + f Z / (1 - eps)``, f below 1.  As long as the promise holds no stake grows on average,
so all of them together ever reach ``1 / delta`` with probability delta at most, however often one looks (Ville).
That is betting as in Waudby-Smith and Ramdas (Estimating means of bounded random variables by betting, JRSSB 2024)
with a fixed mixture of stakes; new stakes keep coming in, so that a promise broken late is noticed soon.
``docs/guarantees.md`` says what has to be true.  Needs numpy only.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from offramp.design import as_level, as_seed
from offramp.errors import AgreementError, InputError

OnAlarm: TypeAlias = Literal["warn", "raise", "disable"]
ShareOf: TypeAlias = Literal["exits", "tokens"]

STAKES = 0.9 * 2.0 ** -np.arange(9)
"""Shares of the highest stake that could not lose everything; small ones notice small breaches."""
SAFE = 1e-9
_RATES = np.arange(1, 200) / 200
# Nothing grows beyond this, so that later losses still show; by far enough to refute anything.
_MOST_WEALTH = 1e100


def reserve(units: int) -> float:
    """Share of the capital that is not yet at stake after a number of sequences."""
    return 1.0 if units == 0 else 0.5 / (1.0 + math.log(units))


class Bets:
    """Evidence that something happens at more than a rate, for many rates at once, sequence by sequence.

    Parameters
    ----------
    rates : (M,) float64
        Strictly between 0 and 1, ascending.
    """

    def __init__(self, rates: NDArray[np.float64]) -> None:
        self.rates = rates
        self.units = 0
        self._stakes = np.zeros((len(rates), len(STAKES)))

    def add(self, hits: int, checked: int, most: int) -> None:
        """Take in one sequence: how often it happened, in how many cases, of how many there could have been."""
        if checked == 0:
            return
        fresh = reserve(self.units) - reserve(self.units + 1)
        self.units += 1
        z = hits / (self.rates * most) - checked / most
        self._stakes = (self._stakes + fresh / len(STAKES)) * (1.0 + STAKES * z[:, None])
        np.minimum(self._stakes, _MOST_WEALTH, out=self._stakes)

    @property
    def wealth(self) -> NDArray[np.float64]:
        """What the capital of 1 has become at each rate, (M,); it falls as rates rise."""
        found: NDArray[np.float64] = reserve(self.units) + self._stakes.sum(axis=1)
        return found

    def refuted(self, delta: float) -> NDArray[np.bool_]:
        """Whether the claim that the rate is no higher is refuted at level delta, (M,)."""
        return self.wealth * (1.0 - SAFE) * delta >= 1.0

    def bound(self, delta: float) -> float:
        """Return a rate that is exceeded, at confidence 1 - delta; 0 if none is known."""
        refuted = self.refuted(delta)
        # Up to the first that stands, so that one fixed test answers for the bound.
        count = len(refuted) if refuted.all() else int(refuted.argmin())
        return float(self.rates[count - 1]) if count else 0.0


@dataclass(frozen=True)
class Watched:
    """What is known of one head, or of all together.

    Attributes
    ----------
    layer : int or None
        The exit; None for all together.
    checked, agreed : int
        Tokens compared with the whole model's own, and those that were the same.
    lower, upper : float
        Bounds of the agreement while it stays what it is; each holds at all times, for all heads together, at
        confidence 1 - delta.  After a change they follow slowly: `Monitor.reset` starts anew.
    wealth : float
        Evidence against the promise: the chance that it ever gets to w although the promise holds is at most 1 / w.
    alarm : bool
        Whether the promise was refuted at some time.
    """

    layer: int | None
    checked: int
    agreed: int
    lower: float
    upper: float
    wealth: float
    alarm: bool

    @property
    def agreement(self) -> float:
        """Share of the checked tokens that agree; NaN if there are none."""
        return self.agreed / self.checked if self.checked else math.nan


class _Test:
    """Bets on both sides of one agreement, and whether the promise was ever refuted."""

    def __init__(self, layer: int | None, eps: float) -> None:
        self.layer = layer
        self.checked = self.agreed = 0
        self.alarm = False
        errors = np.union1d(_RATES, 1.0 - eps)
        self._place = int(np.searchsorted(errors, 1.0 - eps))
        self._errors = Bets(errors)
        self._agreements = Bets(_RATES)

    def add(self, wrong: int, checked: int, most: int) -> None:
        self.checked += checked
        self.agreed += checked - wrong
        self._errors.add(wrong, checked, most)
        self._agreements.add(checked - wrong, checked, most)

    def refuted(self, delta: float) -> bool:
        return bool(self._errors.refuted(delta)[self._place])

    def watched(self, delta: float) -> Watched:
        return Watched(
            self.layer,
            self.checked,
            self.agreed,
            self._agreements.bound(delta),
            1.0 - self._errors.bound(delta),
            float(self._errors.wealth[self._place]),
            self.alarm,
        )


class Monitor:
    """An anytime-valid test that exits agree with the whole model as often as promised; printing it shows a table.

    Parameters
    ----------
    layers : sequence of int
        The exits, shallow to deep.
    eps : float
        The agreement to test for, in (0, 1): what was promised, or less to be told of larger breaches only.
    delta : float
        How likely any false alarm is, ever, over all heads.
    on_alarm : {"warn", "raise", "disable"}
        ``"warn"``: warn once for every head.  ``"raise"``: `AgreementError`, at once and from every later use of the
        exits, until `reset`.  ``"disable"``: warn once, and leave the head out from then on; all of them if all
        together fail.
    share_of : {"exits", "tokens"}
        ``"exits"``: at least eps of the tokens that leave early agree, at every head and altogether.  ``"tokens"``: at
        most 1 - eps of all tokens leave early and disagree, as calibration in mode ``"budget"`` promises; heads are
        then shown and not tested.
    seed : int
        Seed of the choice of tokens that are checked.

    Attributes
    ----------
    sequences : int
        Sequences taken in that had a token to check.

    Examples
    --------
    >>> from offramp import Monitor
    >>> monitor = Monitor((18, 22), eps=0.9, on_alarm="disable")
    >>> for _ in range(9):  # sequences, with 5 tokens checked at each exit, 1 of them wrong at the deeper one
    ...     monitor.update([[5, 5]], [[0, 1]])
    >>> monitor.alarms, monitor.heads[1].agreement
    ((), 0.8)
    """

    def __init__(
        self,
        layers: Sequence[int],
        eps: float,
        *,
        delta: float = 0.05,
        on_alarm: OnAlarm = "warn",
        share_of: ShareOf = "exits",
        seed: int = 0,
    ) -> None:
        if isinstance(eps, bool) or not isinstance(eps, int | float | np.floating) or not 0 < eps < 1:
            raise InputError(f"eps is {eps!r}: give the agreement to test for, between 0 and 1, such as 0.9")
        if on_alarm not in get_args(OnAlarm):
            raise InputError(f"on_alarm is {on_alarm!r}: choose 'warn', 'raise' or 'disable'")
        if share_of not in get_args(ShareOf):
            raise InputError(f"share_of is {share_of!r}: choose 'exits' or 'tokens'")
        self.layers = tuple(layers)
        if not self.layers:
            raise InputError("layers is empty: give the layers the exits follow")
        self.eps = float(eps)
        self.delta = as_level(delta)
        self.on_alarm = on_alarm
        self.share_of = share_of
        self.rng = np.random.default_rng(as_seed(seed))
        self.reset()

    def reset(self) -> None:
        """Forget everything seen, alarms too."""
        self.sequences = 0
        self._heads = [_Test(layer, self.eps) for layer in self.layers]
        self._all = _Test(None, self.eps)
        self._told: set[int | None] = set()

    def update(
        self,
        checked: ArrayLike,
        wrong: ArrayLike,
        *,
        most: ArrayLike | None = None,
        tokens: ArrayLike | None = None,
    ) -> None:
        """Take in sequences, in their order.

        Which tokens are checked must not depend on how they turned out.

        Parameters
        ----------
        checked : (S, K) int
            Tokens checked in each sequence by the head that emitted them.
        wrong : (S, K) int
            Those of them that are not the whole model's own.
        most : (S,) int, optional
            How many tokens of each sequence could have been checked, fixed before it began; default: those that were,
            which is right only where their number was fixed.
        tokens : (S,) int, optional
            For ``share_of="tokens"``: tokens looked at, those among them that the whole model wrote.

        Raises
        ------
        InputError
            For counts that contradict each other.
        AgreementError
            If there is an alarm and ``on_alarm`` is ``"raise"``.
        """
        answered, errors = np.asarray(checked, dtype=np.int64), np.asarray(wrong, dtype=np.int64)
        if answered.ndim != 2 or answered.shape[1] != len(self.layers) or errors.shape != answered.shape:
            raise InputError(
                f"checked has shape {answered.shape} and wrong {errors.shape}: give both "
                f"(sequences, {len(self.layers)})"
            )
        early = answered.sum(axis=1)
        whole = early if tokens is None else np.asarray(tokens, dtype=np.int64)
        limit = whole if most is None else np.asarray(most, dtype=np.int64)
        if whole.shape != early.shape or limit.shape != early.shape:
            raise InputError(f"tokens and most must have a number for each of the {len(early)} sequences")
        if (errors < 0).any() or (errors > answered).any() or (early > whole).any() or (whole > limit).any():
            raise InputError(
                "checked, wrong, tokens and most contradict each other: wrong <= checked, and all that were "
                "checked <= tokens <= most"
            )
        for row in range(len(answered)):
            self._add(answered[row].tolist(), errors[row].tolist(), int(whole[row]), int(limit[row]))
        self._sound()

    def _add(self, checked: list[int], wrong: list[int], tokens: int, most: int) -> None:
        total = tokens if self.share_of == "tokens" else sum(checked)
        self.sequences += total > 0
        self._all.add(sum(wrong), total, most)
        for test, count, errors in zip(self._heads, checked, wrong, strict=True):
            test.add(errors, count, most)
        for test in self._tested:
            # Wealth may fall again; what it once proved stays proven.
            test.alarm = test.alarm or test.refuted(self.level)

    @property
    def _tested(self) -> list[_Test]:
        return [self._all] if self.share_of == "tokens" else [*self._heads, self._all]

    @property
    def level(self) -> float:
        """Every test's share of delta."""
        return self.delta / (len(self.layers) + 1)

    @property
    def heads(self) -> tuple[Watched, ...]:
        """What is known of every head."""
        return tuple(test.watched(self.level) for test in self._heads)

    @property
    def total(self) -> Watched:
        """What is known of all heads together."""
        return self._all.watched(self.level)

    @property
    def alarms(self) -> tuple[int | None, ...]:
        """The exits whose promise was refuted; None for all of them together."""
        return tuple(test.layer for test in self._tested if test.alarm)

    @property
    def disabled(self) -> frozenset[int]:
        """The exits to leave out; none unless ``on_alarm`` is ``"disable"``."""
        if self.on_alarm != "disable":
            return frozenset()
        return frozenset(self.layers) if None in self.alarms else frozenset(self.alarms)  # type: ignore[arg-type]

    def require_silence(self) -> None:
        """Refuse to go on after an alarm, if ``on_alarm`` is ``"raise"``.

        Raises
        ------
        AgreementError
            Naming what failed.
        """
        if self.on_alarm == "raise" and self.alarms:
            raise AgreementError(self._said(self.alarms))

    def _sound(self) -> None:
        self.require_silence()
        fresh = [layer for layer in self.alarms if layer not in self._told]
        if fresh:
            self._told.update(fresh)
            warnings.warn(self._said(fresh), UserWarning, stacklevel=3)

    def _said(self, layers: Sequence[int | None]) -> str:
        named = [
            "all exits together" if layer is None else f"the exit after layer {layer}" for layer in layers
        ]
        whose = "tokens" if self.share_of == "tokens" else "early tokens"
        promise = f"agreement of at least {self.eps:g}"
        off = "; left out from now on" if self.on_alarm == "disable" else ""
        return (
            f"{promise} with the whole model is refuted for {' and '.join(named)} by {self._all.checked} {whose} "
            f"checked{off}: the text is of another kind than the calibration text; calibrate on text like it, then "
            "monitor.reset()"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "eps": self.eps,
            "delta": self.delta,
            "share_of": self.share_of,
            "on_alarm": self.on_alarm,
            "sequences": self.sequences,
            "heads": [asdict(head) for head in self.heads],
            "total": asdict(self.total),
        }

    def __str__(self) -> str:
        """Table of the heads."""
        lines = [
            f"Monitor of agreement {self.eps:g}, false alarms with probability {self.delta:g} at most; "
            f"{self.sequences} sequences",
            "after layer   checked   agreement   between       and   evidence",
        ]
        for row in (*self.heads, self.total):
            name = "all" if row.layer is None else str(row.layer)
            share = f"{row.agreement:9.1%}" if row.checked else "        -"
            alarm = "   ALARM" if row.alarm else ""
            lines.append(
                f"{name:>11}   {row.checked:>7}   {share}   {row.lower:7.1%}   {row.upper:7.1%}   {row.wealth:8.3g}"
                f"{alarm}"
            )
        return "\n".join(lines)
