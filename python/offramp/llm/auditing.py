"""Early tokens compared with what the whole model says in their place, for `offramp.Monitor`.

When the last segment runs over waiting positions, the whole model's own tokens for them cost only the output layer.
Which positions are looked at is drawn before a generation begins.  Whether a position would ever reach the last
segment does depend on its token, so what still waits at the end is run through as well.
For `decoding` and `verifying`, which tell it what heads and model say.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from offramp.errors import InputError
from offramp.monitor import Monitor, ShareOf

if TYPE_CHECKING:
    from offramp.llm.decoding import Rollout, Step


class Audit:
    """The comparisons of one generation.

    Attributes
    ----------
    checked, wrong : (B, K) int64
        Tokens of each row compared with the whole model's own, by the head that wrote them, and those that differ.
    tokens : (B,) int64
        Tokens of each row looked at, those that the whole model wrote among them.
    """

    def __init__(self, looked_at: NDArray[np.bool_], places: list[int], heads: int) -> None:
        self._looked_at = looked_at
        self._places = places
        self._written = 0
        # Position, row, exit and token.
        self._waiting: list[tuple[int, int, int, int]] = []
        self.checked = np.zeros((len(looked_at), heads), np.int64)
        self.wrong = np.zeros_like(self.checked)
        self.tokens = np.zeros(len(looked_at), np.int64)

    @classmethod
    def drawn(cls, monitor: Monitor, layers: Sequence[int], share: float, rows: int, room: int) -> Audit:
        """Draw which of the tokens that may be written to each row are looked at.

        Parameters
        ----------
        layers
            The exits in use.
        share
            Probability of each token.
        rows, room
            How many rows there are, and how many tokens each may get.
        """
        looked_at = monitor.rng.random((rows, room)) < share
        return cls(looked_at, [monitor.layers.index(layer) for layer in layers], len(monitor.layers))

    def note(self, step: Step, needed: torch.Tensor, position: int) -> None:
        """Remember what heads said for the position after ``position``, before the whole model has its say."""
        looked_at = self._looked_at[:, self._written] & needed.cpu().numpy()
        self._written += 1
        self.tokens += looked_at
        exits = step.exits.numpy()
        for row in np.flatnonzero(looked_at & (exits >= 0)).tolist():
            self._waiting.append((position, row, int(exits[row]), int(step.tokens[row])))

    def forget(self, rows: NDArray[np.bool_], position: int) -> None:
        """Leave out rows (B,) in whose place the whole model has answered after all."""
        self._waiting = [item for item in self._waiting if not (item[0] == position and rows[item[1]])]

    def hear(self, rollout: Rollout, hidden: torch.Tensor, first: int) -> None:
        """Compare with what left the last layer (B, q, H), whose positions start at ``first``.

        They end with the newest: more waits before a segment only where the ones below have just run.
        """
        heard, self._waiting = self._waiting, []
        if not heard:
            return
        at = [position - first for position, _, _, _ in heard]
        own = rollout.full_logits(hidden[[row for _, row, _, _ in heard], at][None])[0].argmax(dim=-1)
        for (_, row, exit_, token), model_token in zip(heard, own.tolist(), strict=True):
            self.judge(row, exit_, agrees=token == model_token)

    def judge(self, row: int, exit_: int, *, agrees: bool) -> None:
        """Count one comparison."""
        self.checked[row, self._places[exit_]] += 1
        self.wrong[row, self._places[exit_]] += not agrees

    def finish(self, rollout: Rollout) -> None:
        """Hear what the whole model says of positions that still wait."""
        if self._waiting:
            rollout.flush()

    def report(self, monitor: Monitor) -> None:
        """Hand the counts to a monitor, a sequence for each row."""
        most = self._looked_at.sum(axis=1)
        monitor.update(self.checked, self.wrong, most=most, tokens=self.tokens)


def monitor_for(
    monitor: Monitor | None, layers: tuple[int, ...], promised: float | None, share_of: ShareOf
) -> Monitor:
    """Check that a monitor tests no more than is promised, or make one that tests just that.

    Parameters
    ----------
    monitor
        The one there is.
    layers
        All exits of the model.
    promised
        ε of the thresholds in use; None for thresholds of the user's own.
    share_of
        Of which tokens ε speaks.

    Raises
    ------
    InputError
        If it is for something else.
    """
    if monitor is None:
        if promised is None:
            raise InputError(
                "audit: thresholds of your own promise nothing to test; set monitor to an offramp.Monitor(layers, eps) "
                "first"
            )
        return Monitor(layers, promised, share_of=share_of)
    if monitor.layers != layers:
        raise InputError(f"monitor is for exits after {monitor.layers}, these follow {layers}: make another")
    if promised is not None and promised < monitor.eps:
        raise InputError(
            f"eps: these thresholds promise {promised:g} and the monitor tests for {monitor.eps:g}; set another "
            "monitor, or None for a new one"
        )
    return monitor
