"""Training metrics on disk: a JSON file, and events that TensorBoard shows where its package is installed.

For `training`.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from offramp.llm.files import write_json

if TYPE_CHECKING:
    from offramp.llm.training import HeadMetrics

EVENTS = "tensorboard"
"""Folder, beside the JSON file, that TensorBoard is pointed at."""


class MetricsLog:
    """Writes the metrics of a training as they come.

    Parameters
    ----------
    folder
        Where ``metrics.json`` and the folder ``tensorboard`` go.
    history
        Metrics so far: a training that goes on from a checkpoint has some, and may have written later ones before.
    """

    def __init__(self, folder: Path, history: Sequence[HeadMetrics]) -> None:
        self._file = folder / "metrics.json"
        self._items: list[HeadMetrics] = []
        self._events: Any = None
        shutil.rmtree(folder / EVENTS, ignore_errors=True)
        if find_spec("tensorboard"):
            from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415  # an extra, and slow to import

            self._events = SummaryWriter(str(folder / EVENTS))
        self.add(history)

    def add(self, metrics: Sequence[HeadMetrics]) -> None:
        """Write metrics of some heads; steps are counted in tokens."""
        self._items += metrics
        write_json(self._file, {"metrics": [asdict(item) for item in self._items]})
        if self._events is None:
            return
        for item in metrics:
            values = {"loss": item.loss, "accuracy": item.accuracy, "entropy": item.entropy}
            values |= {
                f"coverage at {eps:g}": share for eps, share in zip(item.eps, item.coverage, strict=True)
            }
            for name, value in values.items():
                self._events.add_scalar(f"{name}/after layer {item.layer}", value, item.tokens)
        self._events.flush()

    def close(self) -> None:
        """Finish the files."""
        if self._events is not None:
            self._events.close()
