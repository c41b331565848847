"""Confidence and correctness of every head at every generated position, by one teacher-forced pass.

What calibration is computed from.  For `model` and `offramp.evaluation`; needs `states` and `heads`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from offramp.llm.heads import ExitHead, ExitHeads
from offramp.llm.sequences import TokenSequence
from offramp.llm.staging import Stage
from offramp.llm.states import Picked, Progress, States, teacher_forced
from offramp.llm.trunk import Trunk

_CHUNK = 256


@dataclass(frozen=True, eq=False)
class Scores:
    """What calibration needs, for K heads and N tokens.

    Attributes
    ----------
    scores : (K, N) float32
        Margin between the head's two largest probabilities, from its raw logits.
    correct : (K, N) bool
        Whether the head's first choice is the full model's, given the same prefix.
    groups : (N,) int64
        The sequence each token came from; tokens of one sequence are in order and adjacent.
    choices : (K, N) int64
        The head's first choice.
    model_choices : (N,) int64
        The full model's first choice.
    emitted : (N,) int64
        The token that stands in the sequence.
    """

    scores: NDArray[np.float32]
    correct: NDArray[np.bool_]
    groups: NDArray[np.int64]
    choices: NDArray[np.int64]
    model_choices: NDArray[np.int64]
    emitted: NDArray[np.int64]

    def first_exit(self, thresholds: Sequence[float]) -> NDArray[np.int64]:
        """Index of the first head whose margin reaches its threshold, (N,); K where none does."""
        reached = self.scores.astype(np.float64) >= np.asarray(thresholds, dtype=np.float64)[:, None]
        return np.where(reached.any(axis=0), reached.argmax(axis=0), len(self.scores)).astype(np.int64)


@torch.no_grad()
def score_sequences(
    trunk: Trunk,
    heads: ExitHeads,
    sequences: Sequence[TokenSequence],
    *,
    progress: Progress | None = None,
) -> Scores:
    """Score every generated position of ``sequences`` with every head.

    Because the caches under exits are exact for the emitted tokens, one pass over a finished sequence shows which
    exit each of its positions takes; nothing needs decoding again.
    """
    layers = heads.layers
    stage = Stage.on(trunk.device)
    parts = []
    for states in teacher_forced(trunk, sequences, layers, progress=progress, stage="scoring"):
        model_choices = model_choice(trunk, states.final)
        margins, choices = zip(
            *(_score_head(heads.after(layer), states.exits[layer], states.picked, stage) for layer in layers),
            strict=True,
        )
        parts.append((np.stack(margins), np.stack(choices), model_choices, states))
    order = _original_order([states for *_, states in parts])
    scores, choices_all, model_all = (
        np.concatenate([part[i] for part in parts], axis=-1)[..., order] for i in range(3)
    )
    return Scores(
        scores=scores,
        correct=choices_all == model_all,
        groups=torch.cat([states.groups for *_, states in parts]).numpy()[order],
        choices=choices_all,
        model_choices=model_all,
        emitted=torch.cat([states.emitted for *_, states in parts]).numpy()[order],
    )


@torch.no_grad()
def agreement(
    trunk: Trunk, sequences: Sequence[TokenSequence], *, progress: Progress | None = None
) -> tuple[int, int]:
    """Count emitted tokens equal to the full model's first choice given the emitted prefix.

    Returns
    -------
    agreeing, total : int
        Over all generated positions of ``sequences``.
    """
    agreeing = total = 0
    for states in teacher_forced(trunk, sequences, (), progress=progress, stage="checking"):
        agreeing += int((model_choice(trunk, states.final) == states.emitted.numpy()).sum())
        total += len(states.emitted)
    return agreeing, total


def model_choice(trunk: Trunk, final: torch.Tensor) -> NDArray[np.int64]:
    """Argmax (n,) of the full model's raw logits for last-layer states (n, H)."""
    choices = [trunk.logits(chunk).argmax(dim=-1).cpu() for chunk in final.split(_CHUNK)]
    return torch.cat(choices).numpy()


def _score_head(
    head: ExitHead, hidden: torch.Tensor, picked: Picked, stage: Stage
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    margins, choices = [], []
    for chunk in head.read(hidden, picked).split(_CHUNK):
        rows, margin = stage.top2_margin(head.logits(chunk))
        margins.append(margin)
        choices.append(head.tokens(torch.as_tensor(rows)).cpu().numpy())
    return np.concatenate(margins), np.concatenate(choices)


def _original_order(parts: Sequence[States]) -> NDArray[np.int64]:
    """Permutation that puts the batches' rows back in the order of the sequences and, inside one, of time."""
    groups = torch.cat([states.groups for states in parts]).numpy()
    positions = torch.cat([states.positions for states in parts]).numpy()
    return np.lexsort((positions, groups)).astype(np.int64)
