"""What every head would say on given text, by one teacher-forced pass, and what any ε would make of it.

Caches under exits are exact for the tokens that stand in a text, so one pass shows which exit each of its positions
takes at any thresholds: a grid of ε needs no decoding.  For ``offramp evaluate`` and ``offramp figures``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from offramp.decision import top2_margin
from offramp.errors import InputError
from offramp.evaluation.metrics import Areas, Reliability, areas, interval, reliability
from offramp.evaluation.shares import Shares
from offramp.llm.calibrating import Calibration
from offramp.llm.heads import ExitHead
from offramp.llm.model import EarlyExitModel
from offramp.llm.planning import Costs, Replay
from offramp.llm.scoring import Scores, model_choice
from offramp.llm.sequences import TokenSequence
from offramp.llm.states import Picked, Progress, teacher_forced

CONFIDENCES = ("margin", "max_prob", "entropy")
"""Top-2 margin, largest probability, and negated entropy: of each, more means surer."""

_CHUNK = 256


@dataclass(frozen=True, eq=False)
class Reading:
    """What the heads of one head set say on N tokens of text.

    Attributes
    ----------
    layers : tuple of int
        The exits.
    num_layers : int
        Layers of the whole model.
    confidence : dict of str to (K, N) float32
        Each of `CONFIDENCES`, from the head's raw logits; ``entropy`` is negated, in nats.
    choices : (K, N) int64
        The heads' first choices.
    model_choices : (N,) int64
        The full model's first choice.
    groups : (N,) int64
        The sequence each token came from; tokens of one sequence are adjacent and in order.
    emitted : (N,) int64
        The token that stands in the text.
    """

    layers: tuple[int, ...]
    num_layers: int
    confidence: Mapping[str, NDArray[np.float32]]
    choices: NDArray[np.int64]
    model_choices: NDArray[np.int64]
    groups: NDArray[np.int64]
    emitted: NDArray[np.int64]

    @property
    def correct(self) -> NDArray[np.bool_]:
        """Whether each head's first choice is the full model's, (K, N)."""
        return np.asarray(self.choices == self.model_choices)

    def scores(self, confidence: str = "margin") -> Scores:
        """Give what calibration works on, with one of the confidences as the score."""
        return Scores(
            self.confidence[confidence],
            self.correct,
            self.groups,
            self.choices,
            self.model_choices,
            self.emitted,
        )

    def areas(self, confidence: str) -> tuple[Areas, ...]:
        """Areas under the risk-coverage curve of every head."""
        pairs = zip(self.confidence[confidence], self.correct, strict=True)
        return tuple(areas(scores, correct) for scores, correct in pairs)

    def area_intervals(self, confidence: str, *, resamples: int = 200, seed: int = 0) -> NDArray[np.float64]:
        """Bootstrap intervals of the AURC of every head over the sequences, (K, 2)."""
        scores, correct = self.confidence[confidence], self.correct

        def aurc(picked: NDArray[np.int64]) -> NDArray[np.float64]:
            pairs = zip(scores[:, picked], correct[:, picked], strict=True)
            return np.array([areas(one, right).aurc for one, right in pairs])

        found: NDArray[np.float64] = interval(self.groups, aurc, resamples=resamples, seed=seed)
        return found

    def reliability(self) -> tuple[Reliability, ...]:
        """How often each head is right beside its largest probability, in 15 bins."""
        pairs = zip(self.confidence["max_prob"], self.correct, strict=True)
        return tuple(reliability(np.minimum(scores, 1), correct) for scores, correct in pairs)


@torch.no_grad()
def read(
    exits: Mapping[str, EarlyExitModel],
    sequences: Sequence[TokenSequence],
    *,
    progress: Progress | None = None,
) -> dict[str, Reading]:
    """Read text with several head sets of one model in one pass.

    Parameters
    ----------
    exits : mapping of str to EarlyExitModel
        Head sets by name, all on the same loaded model.
    sequences : sequence of TokenSequence
        The text; the positions after each prompt count.
    progress : callable, optional
        Called as ``progress(stage, done, total)``.

    Returns
    -------
    dict of str to Reading

    Raises
    ------
    InputError
        If the head sets stand on different models, or one is not trained.
    """
    first = next(iter(exits.values()))
    for name, ee in exits.items():
        if ee.model is not first.model:
            raise InputError(f"{name} stands on another model: load all head sets on the same one")
    layers = sorted({layer for ee in exits.values() for layer in ee.layers})
    heads = {name: ee.heads_in_use for name, ee in exits.items()}
    parts: dict[str, list[list[NDArray[Any]]]] = {name: [] for name in exits}
    shared: list[tuple[NDArray[np.int64], ...]] = []
    for states in teacher_forced(first.trunk, sequences, layers, progress=progress, stage="reading"):
        for name, chosen in heads.items():
            said = [_said(chosen.after(layer), states.exits[layer], states.picked) for layer in chosen.layers]
            parts[name].append([np.stack(column) for column in zip(*said, strict=True)])
        model = model_choice(first.trunk, states.final)
        rest = (states.emitted, states.groups, states.positions)
        shared.append((model, *(tensor.numpy() for tensor in rest)))
    model_choices, emitted, groups, positions = (
        np.concatenate(column) for column in zip(*shared, strict=True)
    )
    # Batches go by length; this is the order of the sequences and, inside one, of time.
    order = np.lexsort((positions, groups))
    readings = {}
    for name, ee in exits.items():
        *confidence, choices = (
            np.concatenate(column, axis=-1)[:, order] for column in zip(*parts[name], strict=True)
        )
        readings[name] = Reading(
            ee.layers,
            ee.num_layers,
            dict(zip(CONFIDENCES, confidence, strict=True)),
            choices,
            model_choices[order],
            groups[order],
            emitted[order],
        )
    return readings


def _said(head: ExitHead, hidden: torch.Tensor, picked: Picked) -> tuple[NDArray[Any], ...]:
    """Margin, largest probability, negated entropy, and choice of a head at picked rows of (B, T, H), each (n,)."""
    columns = []
    for chunk in head.read(hidden, picked).split(_CHUNK):
        logits = head.logits(chunk)
        rows, margins = top2_margin(logits)
        log_p = logits.float().log_softmax(dim=-1)
        # p log p is 0 where p is; log p may be -inf there.
        entropy = torch.special.entr(log_p.exp()).sum(dim=-1)
        columns.append(
            (
                margins,
                log_p.amax(dim=-1).exp().cpu().numpy(),
                -entropy.cpu().numpy(),
                head.tokens(torch.as_tensor(rows).to(logits.device)).cpu().numpy(),
            )
        )
    return tuple(np.concatenate(column) for column in zip(*columns, strict=True))


@dataclass(frozen=True)
class Point:
    """What exits at one ε do on given text.

    Attributes
    ----------
    eps : float
        Target accuracy.
    thresholds : tuple of float
        τ of every exit; inf where it never exits.
    exits : dict of int to int
        Tokens by the layer they leave after, the number of layers for the whole model.
    head_agreement : tuple of float
        Agreement of each head on the tokens that really leave there; NaN where none does.
    shares : Shares
        Agreement, tokens that leave early, and mean layers, with intervals.
    predicted : float
        Seconds a token takes, predicted from the costs of the parts on this machine; NaN if not asked for.
    guarantees : tuple of str
        What is promised at each threshold, in words.
    """

    eps: float
    thresholds: tuple[float, ...]
    exits: dict[int, int]
    head_agreement: tuple[float, ...]
    shares: Shares
    predicted: float = float("nan")
    guarantees: tuple[str, ...] = ()


def sweep(
    reading: Reading,
    calibration: Calibration,
    grid: Sequence[float],
    *,
    mode: str | None = None,
    delta: float | None = None,
    costs: Costs | None = None,
    seed: int = 0,
) -> list[Point]:
    """Take the calibration's thresholds at every ε of a grid through text that was read.

    Parameters
    ----------
    reading : Reading
        From `read`; best of text the full model wrote, which is what calibration speaks of.
    calibration : Calibration
        Gives the thresholds.
    grid : sequence of float
        Targets, in (0, 1).
    mode, delta : optional
        Take the thresholds of another mode of `offramp.calibrate_cascade` than the calibration's, certified or not.
    costs : Costs, optional
        From ``EarlyExitModel.plan``; with them time is predicted.
    seed : int
        Seed of the intervals' bootstrap.
    """
    scores = reading.scores()
    replay = Replay(costs, scores, reading.layers, reading.num_layers) if costs is not None else None
    depths = np.array([*reading.layers, reading.num_layers])
    # What the whole model answers agrees by definition.
    right = np.append(scores.correct, np.ones((1, len(scores.groups)), bool), axis=0)
    points = []
    for eps in grid:
        cascade = calibration.cascade(eps, mode=mode, delta=delta)
        thresholds = tuple(cascade.thresholds.tolist())
        at = scores.first_exit(thresholds)
        agrees = right[at, np.arange(len(at))]
        there = [agrees[at == index] for index in range(len(reading.layers))]
        points.append(
            Point(
                eps,
                thresholds,
                {int(layer): int((depths[at] == layer).sum()) for layer in depths},
                tuple(float(found.mean()) if len(found) else float("nan") for found in there),
                Shares.of(scores.groups, agrees, depths[at], reading.num_layers, seed=seed),
                replay.exit(thresholds) if replay is not None else float("nan"),
                cascade.guarantees,
            )
        )
    return points
