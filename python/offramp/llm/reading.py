"""A head during one generation: its own state, and what its segment has put out that it has not read yet.

A head with attention of its own is deferred and cropped like a segment: it reads every row its segment puts out, in
order, however many wait.  For `decoding` and `planning`.
"""

from __future__ import annotations

import torch

from offramp.llm.heads import ExitHead


class Reader:
    """The reading of one head.

    Parameters
    ----------
    head
        The head.
    """

    def __init__(self, head: ExitHead) -> None:
        self.head = head
        self.state = head.new_state()
        self._unread: list[torch.Tensor] = []

    @property
    def waiting(self) -> int:
        """Rows it will have to read when it is asked, beside those of the steps to come."""
        return 0 if self.state is None else sum(part.shape[1] for part in self._unread)

    def see(self, hidden: torch.Tensor) -> None:
        """Take the newest rows (B, q, H) its segment put out; a head without memory needs the last alone."""
        if self.state is None:
            self._unread = [hidden[:, -1:]]
        else:
            self._unread.append(hidden)

    def answer(self, positions: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """Logits (B, S) after the newest row, with positions and mask (B, T) of the whole sequence so far."""
        return self.head.logits(self._read(positions, mask))

    def catch_up(self, positions: torch.Tensor, mask: torch.Tensor | None) -> None:
        """Read what waits without an answer."""
        if self.waiting:
            self._read(positions, mask)

    def crop(self, length: int) -> None:
        """Forget the rows from ``length`` on."""
        if self.state is None or length <= self.state.length:
            self._unread = []
        if self.state is None:
            return
        if length < self.state.length:
            self.state.crop(length)
        elif self._unread:
            self._unread = [torch.cat(self._unread, dim=1)[:, : length - self.state.length]]

    def _read(self, positions: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        hidden = self._unread[0] if len(self._unread) == 1 else torch.cat(self._unread, dim=1)
        seen = positions.shape[1] - 1 if self.state is None else self.state.length
        try:
            features = self.head.advance(
                hidden, self.state, positions[:, seen : seen + hidden.shape[1]], mask
            )
        except BaseException:
            # A head that failed has not read: the rows still wait.
            if self.state is not None:
                self.state.crop(seen)
            raise
        self._unread = []
        return features
