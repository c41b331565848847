"""Training exit heads on a corpus: the loss of the paper's equation (1), and the loop.

For `model`; needs `heads` and `data`.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from offramp.errors import InputError, StorageError
from offramp.llm.data import Corpus, batches
from offramp.llm.files import written_whole
from offramp.llm.heads import ExitHead, ExitHeads, HeadConfig, RidgeMLP, choose_shortlist, output_rows
from offramp.llm.states import Progress
from offramp.llm.trunk import Trunk

_RIDGE_ROWS = 20_000
_WATCHED_SHARE = 0.04
_WATCHED_ROWS = 4096
# Floats of one logits matrix held at a time: 2^23 is 32 MiB.
_LOGITS_BUDGET = 1 << 23


@dataclass(frozen=True)
class TrainingConfig:
    """How heads are trained.

    Attributes
    ----------
    epochs : int
        Passes over the corpus.
    batch_size : int
        Tokens a step; small batches train better than few large ones.
    learning_rate : float
        Peak of AdamW's rate: linear warm-up over the first twentieth of the steps, then a cosine to zero.
    entropy_weight : float
        λ of equation (1), in [0, 1): the weight of the entropy bonus.
    seed : int
        Seed of initial weights and the order of the tokens.
    """

    epochs: int = 2
    batch_size: int = 128
    learning_rate: float = 1e-3
    entropy_weight: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse settings nothing can be trained with."""
        for name in ("epochs", "batch_size"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)!r}: give a whole number of at least 1")
        if not self.learning_rate > 0:
            raise InputError(f"learning_rate is {self.learning_rate!r}: give a positive number")
        if not 0 <= self.entropy_weight < 1:
            raise InputError(
                f"entropy_weight is {self.entropy_weight!r}: give λ from 0 up to, not including, 1"
            )


@dataclass(frozen=True)
class HeadMetrics:
    """The paper's three training metrics of one head, on tokens held back from training.

    Attributes
    ----------
    layer : int
        The exit.
    step : int
        Optimiser steps done.
    loss : float
        Equation (1), nats a token.
    accuracy : float
        Share of tokens where the head's first choice is the model's.
    entropy : float
        Mean entropy of the head's distribution, nats.
    """

    layer: int
    step: int
    loss: float
    accuracy: float
    entropy: float


class _ExitLoss(torch.autograd.Function):
    """Sum over tokens of equation (1), with the gradient written out.

    With q = softmax(z) and H its entropy, d/dz of (1-λ)·CE - λ·H is (1-λ)(q - p) + λ·q·(log q + H); computing it in
    the forward pass frees the logits at once and halves the work autograd would do.
    """

    @staticmethod
    def forward(
        ctx: Any,
        features: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        target: torch.Tensor,
        entropy_weight: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        log_q = torch.nn.functional.linear(features, weight, bias).log_softmax(dim=-1)
        q = log_q.exp()
        cross_entropy = -(target * log_q).sum(dim=-1)
        entropy = -(q * log_q).sum(dim=-1)
        loss = (1 - entropy_weight) * cross_entropy.sum() - entropy_weight * entropy.sum()
        gradient = (1 - entropy_weight) * (q - target)
        if entropy_weight:
            gradient += entropy_weight * q * (log_q + entropy[:, None])
        needs = ctx.needs_input_grad
        ctx.save_for_backward(
            gradient @ weight if needs[0] else None,
            gradient.T @ features if needs[1] else None,
            gradient.sum(dim=0) if bias is not None and needs[2] else None,
        )
        choice = log_q.argmax(dim=-1)
        ctx.mark_non_differentiable(entropy, choice)
        return loss, entropy, choice

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
        saved = [None if tensor is None else grad * tensor for tensor in ctx.saved_tensors]
        return (*saved, None, None)


def exit_loss(
    features: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    entropy_weight: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Equation (1) of Valade (2024) for one head: ``(1-λ)·CE(p_k, p_θ) - λ·Entropy(p_k)``, summed over tokens.

    Parameters
    ----------
    features : (n, H)
        Input of the head's output rows.
    weight : (S, H)
        Output rows; ``bias`` (S,) or None.
    target : (n, S)
        The model's probabilities p_θ, each row summing to 1.
    entropy_weight
        λ.

    Returns
    -------
    loss : scalar
        Differentiable with respect to features, weight and bias.
    entropy : (n,)
        Entropy of the head's distribution, nats.
    choice : (n,) int64
        The head's first choice, as a row number.
    """
    result: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = _ExitLoss.apply(
        features, weight, bias, target, entropy_weight
    )
    return result


class Teacher:
    """The model's own probabilities over the tokens a head can emit, from the stored last hidden state.

    Recomputing them from the (H,) state with the output rows is exact and costs one matrix product shared by all
    heads; storing V floats a token would cost a hundred times the disk.  Probability outside a shortlist is spread
    evenly over it, so that a head learns to be unsure where the model's answer is not in its list.
    """

    def __init__(self, trunk: Trunk, shortlist: torch.Tensor | None) -> None:
        self.norm = trunk.norm
        self.cap = trunk.cap
        self.weight, self.bias = output_rows(trunk, shortlist)

    @torch.no_grad()
    def probabilities(self, rows: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return (n, S), each row summing to 1."""
        device = self.weight.device
        features = self.norm(rows["final"].to(device)).float()
        logits = self.cap(torch.nn.functional.linear(features, self.weight, self.bias))
        listed = (logits - rows["log_normalizer"].to(device)[:, None]).exp()
        missing = (1 - listed.sum(dim=-1, keepdim=True)).clamp(min=0)
        spread = listed + missing / listed.shape[-1]
        return spread / spread.sum(dim=-1, keepdim=True)


def build_heads(
    trunk: Trunk, corpus: Corpus, layers: Sequence[int], config: HeadConfig, seed: int
) -> ExitHeads:
    """Make untrained heads for the exits: shortlist from the corpus, linear maps by ridge regression."""
    shortlist = choose_shortlist(corpus.top_counts(trunk.vocab_size), config.shortlist)
    with torch.random.fork_rng(devices=[trunk.device] if trunk.device.type == "cuda" else []):
        torch.manual_seed(seed)
        rows = output_rows(trunk, shortlist)
        heads = ExitHeads({layer: ExitHead(trunk, config, shortlist, rows) for layer in layers})
    sample = corpus.take(torch.linspace(0, corpus.rows - 1, min(corpus.rows, _RIDGE_ROWS)).long())
    for layer in layers:
        transform = heads.after(layer).transform
        if isinstance(transform, RidgeMLP):
            transform.fit(sample[f"hidden.{layer}"].to(trunk.device), sample["final"].to(trunk.device))
    return heads


class Trainer:
    """Trains all heads together, one pass over the rows an epoch, and can stop and go on.

    Parameters
    ----------
    checkpoint
        File to keep the state in; ``None`` keeps none.
    identity
        What the state belongs to: model, corpus, heads.  A checkpoint of something else is ignored.
    """

    def __init__(
        self,
        trunk: Trunk,
        heads: ExitHeads,
        corpus: Corpus,
        config: TrainingConfig,
        *,
        checkpoint: Path | None = None,
        identity: dict[str, Any] | None = None,
        checkpoint_seconds: float = 120.0,
    ) -> None:
        self.trunk, self.heads, self.corpus, self.config = trunk, heads, corpus, config
        self.layers = heads.layers
        self.teacher = Teacher(trunk, heads.after(self.layers[0]).shortlist)
        self.train_rows, self.watched_rows = corpus.split(_WATCHED_SHARE)
        self.watched_rows = self.watched_rows[:_WATCHED_ROWS]
        self.steps_per_epoch = -(-len(self.train_rows) // config.batch_size)
        self.total_steps = self.steps_per_epoch * config.epochs
        self.parameters = [p for p in heads.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=config.learning_rate, weight_decay=0.0)
        self.step = 0
        self.checkpoint = checkpoint
        self.checkpoint_seconds = checkpoint_seconds
        self.identity = _digest({"config": asdict(config), **(identity or {})})

    def run(self, progress: Progress | None = None) -> list[HeadMetrics]:
        """Train to the end; returns the metrics of every head, at the end of every epoch."""
        self._resume()
        history: list[HeadMetrics] = []
        saved = time.monotonic()
        while self.step < self.total_steps:
            epoch, start = divmod(self.step, self.steps_per_epoch)
            order = list(batches(self.train_rows, self.config.batch_size, seed=self.config.seed, epoch=epoch))
            for rows in order[start:]:
                self._train_step(self.corpus.take(rows))
                if progress is not None:
                    progress("training", self.step, self.total_steps)
                if time.monotonic() - saved > self.checkpoint_seconds:
                    self._save()
                    saved = time.monotonic()
            history += self.watch()
        self._save()
        return history or self.watch()

    @torch.no_grad()
    def watch(self) -> list[HeadMetrics]:
        """Loss, accuracy and entropy of every head on the rows held back (on the training rows if there are none)."""
        rows = self.watched_rows if len(self.watched_rows) else self.train_rows[:_WATCHED_ROWS]
        sums = torch.zeros(len(self.layers), 3, dtype=torch.float64)
        for part in rows.split(self._micro_batch()):
            batch = self.corpus.take(part)
            target = self.teacher.probabilities(batch)
            model_choice = batch["top"][:, 0].to(target.device)
            for index, layer in enumerate(self.layers):
                loss, entropy, choice = self._head_loss(layer, batch, target)
                right = (self.heads.after(layer).tokens(choice) == model_choice).sum()
                sums[index] += torch.stack([loss.double(), right.double(), entropy.double().sum()]).cpu()
        means = (sums / len(rows)).tolist()
        return [HeadMetrics(layer, self.step, *mean) for layer, mean in zip(self.layers, means, strict=True)]

    def _train_step(self, batch: dict[str, torch.Tensor]) -> None:
        rate = self.config.learning_rate * _schedule(self.step, self.total_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        total = len(batch["sequence"])
        for start in range(0, total, self._micro_batch()):
            part = {name: tensor[start : start + self._micro_batch()] for name, tensor in batch.items()}
            target = self.teacher.probabilities(part)
            for layer in self.layers:
                loss, _, _ = self._head_loss(layer, part, target)
                (loss / total).backward()
        self.optimizer.step()
        self.step += 1

    def _head_loss(
        self, layer: int, batch: dict[str, torch.Tensor], target: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        head = self.heads.after(layer)
        features = head.features(batch[f"hidden.{layer}"].to(target.device).float())
        return exit_loss(features, head.weight, head.bias, target, self.config.entropy_weight)

    def _micro_batch(self) -> int:
        return max(1, _LOGITS_BUDGET // self.teacher.weight.shape[0])

    def _save(self) -> None:
        if self.checkpoint is None:
            return
        tensors = {f"head.{name}": p.detach() for name, p in self.heads.named_parameters()}
        for index, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{key}": torch.as_tensor(value) for key, value in state.items()}
        with written_whole(self.checkpoint) as temporary:
            # Copies, because tied or sliced tensors share memory, which the format refuses.
            save_file(
                {name: tensor.clone().contiguous() for name, tensor in tensors.items()},
                temporary,
                metadata={"identity": self.identity, "step": str(self.step)},
            )

    def _resume(self) -> None:
        if self.checkpoint is None or not self.checkpoint.exists():
            return
        try:
            with safe_open(self.checkpoint, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a dict
        except SafetensorError as error:
            raise StorageError(f"cache: {self.checkpoint} is damaged; delete it to train anew") from error
        if metadata.get("identity") != self.identity:
            return
        with torch.no_grad():
            for name, parameter in self.heads.named_parameters():
                parameter.copy_(tensors[f"head.{name}"])
        self.step = int(metadata["step"])
        state: dict[int, dict[str, torch.Tensor]] = {}
        for name, tensor in tensors.items():
            if name.startswith("optimizer."):
                _, index, key = name.split(".")
                state.setdefault(int(index), {})[key] = tensor
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})


def _schedule(step: int, total: int) -> float:
    """Share of the peak rate at a step: warm-up over a twentieth of the steps, then half a cosine."""
    warm = max(1, total // 20)
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, total - warm)))


def _digest(value: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
