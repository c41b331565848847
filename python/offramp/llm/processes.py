"""Several processes that train together, through accelerate: ``torchrun`` starts them.

For `training` and `model`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TypeVar, cast

import torch

T = TypeVar("T")


class Processes:
    """Tell this process among those that train together; alone unless a launcher started more.

    Parameters
    ----------
    device : torch.device or str, optional
        Where they train; default: on CUDA where there is one.
    """

    def __init__(self, device: torch.device | str | None = None) -> None:
        self.count, self.rank = 1, 0
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            from accelerate import PartialState  # noqa: PLC0415  # slow to import, and seldom needed

            # The others wait for the first while it generates, which may take hours.
            cpu = str(device).startswith("cpu") if device is not None else not torch.cuda.is_available()
            state = PartialState(cpu=cpu, timeout=timedelta(days=7))
            self.count, self.rank = state.num_processes, state.process_index

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files."""
        return self.rank == 0

    def add(self, tensors: Sequence[torch.Tensor]) -> None:
        """Put in every tensor, in place, its sum over the processes."""
        if self.count == 1:
            return
        from accelerate.utils import reduce  # noqa: PLC0415

        flat = torch.cat([tensor.flatten() for tensor in tensors])
        summed: torch.Tensor = reduce(flat, reduction="sum")
        for tensor, part in zip(tensors, summed.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))

    def share(self, tensors: Sequence[torch.Tensor]) -> None:
        """Put in every tensor, in place, what the first process has in it."""
        if self.count == 1:
            return
        from accelerate.utils import broadcast  # noqa: PLC0415

        for tensor in tensors:
            tensor.copy_(broadcast(tensor.clone()))

    def from_first(self, make: Callable[[], T]) -> T:
        """Give what the first process makes, in all of them; the others make nothing."""
        if self.count == 1:
            return make()
        from accelerate.utils import broadcast_object_list  # noqa: PLC0415

        made = [make() if self.first else None]
        return cast(T, broadcast_object_list(made)[0])

    def wait(self) -> None:
        """Go on when all processes are here."""
        if self.count > 1:
            from accelerate.utils import wait_for_everyone  # noqa: PLC0415

            wait_for_everyone()
