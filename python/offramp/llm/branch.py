"""Decoder layers of a head's own, run in the place of the model's last ones.

They are of the model's own class, so masks, rotary angles and whatever else its decoder hands to its last layers is
handed to them.  For `heads` only.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from offramp.errors import InputError
from offramp.llm.cache import GrowingCache
from offramp.llm.few import Linear
from offramp.llm.layer import LeanLayer, RMSNorm
from offramp.llm.states import Picked
from offramp.llm.stepping import Steps
from offramp.llm.trunk import Trunk, is_composite


class BranchState:
    """Keys and values of a head's own layers for one generation.

    Parameters
    ----------
    cache
        Of the model's number of layers, of which only the last are used.
    first
        Number, in the model, of the first layer they stand for.
    layers
        Their lean form, where they have one.
    steps
        These prepared for few rows, with what is before and after them.
    """

    def __init__(
        self, cache: GrowingCache, first: int, layers: list[LeanLayer] | None, steps: Steps | None
    ) -> None:
        self.cache, self.first, self.lean, self.steps = cache, first, layers, steps

    @property
    def length(self) -> int:
        """Rows read."""
        return self.cache.length(self.first)

    def crop(self, length: int) -> None:
        """Forget the rows from ``length`` on."""
        self.cache.crop_to(self.first, len(self.cache.growing), length)


class Branch:
    """A way beside the model's last layers.

    Parameters
    ----------
    trunk
        The model.
    depth
        How many of its last layers have a counterpart.

    Raises
    ------
    InputError
        If the model has fewer, or they cannot be copied and trained.
    """

    def __init__(self, trunk: Trunk, depth: int) -> None:
        if depth >= trunk.num_layers:
            raise InputError(
                f"depth is {depth}: this model has {trunk.num_layers} layers; give fewer than that"
            )
        self._trunk = trunk
        self.first = trunk.num_layers - depth

    def __deepcopy__(self, _memo: Any) -> Branch:
        """Heads are copied to be cast; what they are a branch of is not."""
        return self

    def new_layers(self) -> nn.ModuleList:
        """Copy the layers in float32, to be trained."""
        own = self._trunk.layers[self.first :]
        weights = [weight for layer in own for weight in layer.parameters()]
        if any(is_composite(weight) or not weight.is_floating_point() for weight in weights):
            raise InputError(
                "head is 'adapter': the layers of this model are quantised and cannot be trained; choose 'mlp'"
            )
        layers = nn.ModuleList(copy.deepcopy(layer) for layer in own)
        return layers.float().requires_grad_(True)

    def new_state(self, layers: nn.ModuleList, before: Linear, after: RMSNorm | None) -> BranchState:
        """Begin a generation with a head's layers as they are now, and what is `before` and `after` them in `step`."""
        form = self._trunk.lean_form(list(layers))
        steps = None if form is None or after is None else Steps(form, before=before, after=after)
        return BranchState(self._trunk.new_cache(), self.first, form, steps)

    def step(
        self, hidden: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor | None, state: BranchState
    ) -> torch.Tensor | None:
        """Do what `advance` does with what is before and after the layers, in one call; ``None`` for many rows."""
        if state.steps is None:
            return None
        rows = hidden.shape[1]
        found = self._trunk.step_lean(
            state.steps,
            hidden,
            self.first,
            cache=state.cache,
            positions=positions,
            attention_mask=mask,
            picked=None if rows == 1 else [rows - 1],
        )
        return None if found is None else found.view(1, -1)

    def read(self, layers: nn.ModuleList, hidden: torch.Tensor, picked: Picked) -> torch.Tensor:
        """Run a head's layers over whole sequences (B, T, H), padded on the right or not at all, for training too.

        Gives the output (n, H) at the rows picked.  Where the layers have a lean form, the last one computes attention
        alone for others, such as those of prompts: with a third of such rows a step of training takes a tenth less.
        """
        positions = torch.arange(hidden.shape[1], device=hidden.device)[None]
        form = self._trunk.lean_form(list(layers))
        if form is None:
            return self._by_modules(layers, hidden, positions.expand(hidden.shape[:2]), None, None)[picked]
        wanted = picked[0] * hidden.shape[1] + picked[1]
        return self._trunk.run_lean(form, hidden, self.first, cache=None, positions=positions, picked=wanted)

    def advance(
        self,
        layers: nn.ModuleList,
        hidden: torch.Tensor,
        positions: torch.Tensor,
        mask: torch.Tensor | None,
        state: BranchState,
    ) -> torch.Tensor:
        """Run a head's layers over new rows (B, q, H), after those in ``state``, which takes their keys and values.

        Gives the output (B, H) at the newest row.  In lean form, which takes all but the first rows of a generation,
        nothing else goes through all of the last layer.

        Parameters
        ----------
        positions : (B, q) int64
            Rotary positions of the rows.
        mask : (B, at least read + q), optional
            0 at left padding; ``None`` where there is none.
        """
        seen, (batch, queries, _) = state.length, hidden.shape
        if state.lean is not None and seen:
            newest = None
            if queries > 1:
                newest = torch.arange(queries - 1, batch * queries, queries, device=hidden.device)
            found = self._trunk.run_lean(
                state.lean,
                hidden,
                self.first,
                cache=state.cache,
                positions=positions,
                attention_mask=mask,
                picked=newest,
            )
            return found.view(batch, -1)
        if mask is not None:
            mask = mask[:, : seen + queries]
        return self._by_modules(layers, hidden, positions, mask, state)[:, -1]

    def _by_modules(
        self,
        layers: nn.ModuleList,
        hidden: torch.Tensor,
        positions: torch.Tensor,
        mask: torch.Tensor | None,
        state: BranchState | None,
    ) -> torch.Tensor:
        cache, seen = (None, 0) if state is None else (state.cache, state.length)
        for layer, call in zip(layers, self._calls(hidden, positions, mask, seen), strict=True):
            hidden = call.to(hidden.dtype).on(layer, hidden, cache)
        return hidden

    @torch.no_grad()
    def _calls(
        self, hidden: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor | None, seen: int
    ) -> Sequence[Any]:
        # In the model's dtype, since its own modules are run for it; heads are trained in float32.
        return self._trunk.calls(hidden.detach().to(self._trunk.dtype), positions, mask, seen)[self.first :]
