"""Training exit heads on a corpus: the loss of the paper's equation (1), and the loop.

For `model`; needs `heads` and `data`.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from types import CodeType
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.nn.attention import SDPBackend, sdpa_kernel

from offramp.calibration import fast_calibrate
from offramp.decision import top2_margin
from offramp.errors import InputError, OfframpError, StorageError
from offramp.llm.data import Batch, Corpus, batches
from offramp.llm.files import written_whole
from offramp.llm.heads import (
    ExitHead,
    ExitHeads,
    HeadConfig,
    choose_shortlist,
    make_head,
    make_heads,
    output_rows,
)
from offramp.llm.metrics import MetricsLog
from offramp.llm.processes import Processes
from offramp.llm.products import BFLOAT16_PRODUCTS, linear
from offramp.llm.states import Progress
from offramp.llm.trunk import Trunk

COVERAGE_EPS = (0.8, 0.9, 0.95)
"""Target accuracies at which coverage is watched."""

# To be raised when the same corpus, heads and settings come to be trained to something else, by a shipped kind's code,
# the loss or the order of things: a training kept in a cache is not taken for one of another format.
_FORMAT = 2
_WATCHED_ROWS = 4096
_WATCHES_PER_EPOCH = 4
# Floats of one logits matrix held at a time: 2^23 is 32 MiB.
_LOGITS_BUDGET = 1 << 23
# On a CPU so many rows instead, whose logits over a shortlist its caches keep from one pass to the next: a step is a
# tenth faster than with all at once.
_CPU_ROWS = 160
# A CPU trains attention faster from whole matrices of weights, a step by a sixth at 170 tokens; so many floats of one
# for each head of attention.
_WEIGHTS_BUDGET = 1 << 21
# Floats of hidden states read at a time, padding included, one layer's.
_STATES_BUDGET = 1 << 23


@dataclass(frozen=True)
class TrainingConfig:
    """How heads are trained.

    Attributes
    ----------
    epochs : int
        Passes over the corpus.
    batch_size : int
        Generated tokens a step, about, in whole sequences; small batches train better than few large ones.
    learning_rate : float, optional
        Peak of AdamW's rate: linear warm-up over the first twentieth of the steps, then a cosine to zero.  ``None``:
        what suits each head, from its `ExitHead.peak_rate`.
    entropy_weight : float
        λ of equation (1), in [0, 1): the weight of the entropy bonus.
    seed : int
        Seed of initial weights and the order of the sequences.
    precision : {"auto", "float32", "bfloat16"}
        What matrix products are computed in; parameters, softmax and targets are float32 in any case.  ``"auto"`` is
        bfloat16 on a GPU that has it and on a CPU that multiplies it faster (AMX, AVX-512 BF16).
    patience : int, optional
        Stop when no head has agreed more on the sequences held back for so many epochs; ``None``: never.  Each head
        keeps the parameters it agreed most with, in either case.
    """

    epochs: int = 2
    batch_size: int = 256
    learning_rate: float | None = None
    entropy_weight: float = 0.0
    seed: int = 0
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    patience: int | None = 2

    def __post_init__(self) -> None:
        """Refuse settings nothing can be trained with."""
        for name in ("epochs", "batch_size", "patience"):
            value = getattr(self, name)
            if name == "patience" and value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise InputError(f"{name} is {value!r}: give a whole number of at least 1")
        for name in ("learning_rate", "entropy_weight"):
            value = getattr(self, name)
            if isinstance(value, int | float | np.floating) and not isinstance(value, bool):
                # JSON, which the state's name is made from, knows none of numpy's.
                object.__setattr__(self, name, float(value))
        rate, weight = self.learning_rate, self.entropy_weight
        if rate is not None and not (isinstance(rate, float) and 0 < rate < math.inf):
            raise InputError(f"learning_rate is {rate!r}: give a positive number, or None")
        if not (isinstance(weight, float) and 0 <= weight < 1):
            raise InputError(
                f"entropy_weight is {self.entropy_weight!r}: give λ from 0 up to, not including, 1"
            )
        if self.precision not in ("auto", "float32", "bfloat16"):
            raise InputError(f"precision is {self.precision!r}: choose 'auto', 'float32' or 'bfloat16'")


@dataclass(frozen=True)
class HeadMetrics:
    """The paper's three training metrics of one head, and what it is worth, on sequences held back from training.

    Attributes
    ----------
    layer : int
        The exit.
    step : int
        Optimiser steps done.
    tokens : int
        Tokens trained on so far, counted again in every epoch.
    loss : float
        Equation (1), nats a token.
    accuracy : float
        Share of tokens where the head's first choice is the model's: its agreement.
    entropy : float
        Mean entropy of the head's distribution, nats.
    coverage : tuple of float
        Share of tokens the head would emit at ε = .8, .9 and .95, with thresholds found on these same tokens.
    """

    layer: int
    step: int
    tokens: int
    loss: float
    accuracy: float
    entropy: float
    coverage: tuple[float, ...]

    @property
    def eps(self) -> tuple[float, ...]:
        """The ε of each coverage."""
        return COVERAGE_EPS


Watch = Callable[[list[HeadMetrics]], None]
"""Called with the metrics of every head, several times an epoch."""


@torch.no_grad()
def exit_loss(
    features: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    entropy_weight: float,
) -> tuple[torch.Tensor, torch.Tensor]:
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
        In nats; what training follows is its gradient, from `exit_gradient`.
    entropy : (n,)
        Entropy of the head's distribution, nats.
    """
    log_q = _log_probabilities(features, weight, bias, target.dtype)
    # No dot products: with bfloat16 products on, they would be rounded as those are.
    cross_entropy = -(target * log_q).sum(dim=-1)
    entropy = -log_q.exp().mul_(log_q).sum(dim=-1)
    return (1 - entropy_weight) * cross_entropy.sum() - entropy_weight * entropy.sum(), entropy


@torch.no_grad()
def exit_gradient(
    features: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    entropy_weight: float,
) -> torch.Tensor:
    """Gradient (n, S) of `exit_loss` by the head's logits z, written out.

    With q = softmax(z) and H its entropy it is ``(1-λ)(q - p_θ) + λ·q·(log q + H)``.  Automatic differentiation would
    keep the logits and pass over them several times more, which at thousands of tokens is most of a head's training.
    """
    if not entropy_weight:
        logits = torch.nn.functional.linear(features, weight, bias)
        return torch.softmax(logits, dim=-1, dtype=target.dtype).sub_(target)
    log_q = _log_probabilities(features, weight, bias, target.dtype)
    q = log_q.exp()
    log_q -= (q * log_q).sum(dim=-1, keepdim=True)
    return torch.lerp(q - target, log_q.mul_(q), entropy_weight)


def _log_probabilities(
    features: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    logits = torch.nn.functional.linear(features, weight, bias)
    return torch.log_softmax(logits, dim=-1, dtype=dtype)


class Teacher:
    """The model's own probabilities over the tokens a head can emit, from the stored last hidden state.

    Recomputing them from the (H,) state with the output rows is exact and costs one matrix product shared by all
    heads of one list; storing V floats a token would cost a hundred times the disk.  Probability outside a shortlist
    is spread evenly over it, so that a head learns to be unsure where the model's answer is not in its list.
    """

    def __init__(self, trunk: Trunk, shortlist: torch.Tensor | None) -> None:
        self.norm = trunk.norm
        self.cap = trunk.cap
        weight, bias = output_rows(trunk, shortlist)
        # In the model's own precision, as its log normalizer was: an error of a logit is a factor of a probability, and
        # what rounding takes from the sum would pass for probability outside the list.
        self.weight = weight.to(trunk.dtype)
        self.bias = None if bias is None else bias.to(trunk.dtype)

    @torch.no_grad()
    def probabilities(self, final: torch.Tensor, log_normalizer: torch.Tensor) -> torch.Tensor:
        """Return (n, S), each row summing to 1, for last states (n, H) and the model's log normalizers (n,)."""
        device = self.weight.device
        # Whatever the heads are trained in.
        with torch.autocast(device.type, enabled=False):
            features = self.norm(final.to(device)).to(self.weight.dtype)
            logits = self.cap(linear(features, self.weight, self.bias)).float()
            listed = logits.sub_(log_normalizer.to(device)[:, None]).exp_()
            missing = (1 - listed.sum(dim=-1, keepdim=True)).clamp(min=0)
            listed += missing / listed.shape[-1]
            return listed.div_(listed.sum(dim=-1, keepdim=True))


def build_heads(trunk: Trunk, corpus: Corpus, configs: Mapping[int, HeadConfig], seed: int) -> ExitHeads:
    """Make untrained heads, by the layer they follow: shortlists from the corpus, first maps by ridge regression.

    What is held back to watch them plays no part.
    """
    train, _ = corpus.split()
    counts = corpus.top_counts(trunk.vocab_size, train)
    sizes = {config.shortlist for config in configs.values()}
    shortlists = {size: choose_shortlist(counts, size) for size in sizes}
    with _seeded(trunk, seed):
        heads = make_heads(
            trunk, configs, {at: shortlists[config.shortlist] for at, config in configs.items()}
        )
    for layer in heads.layers:
        head = heads.after(layer)
        if head.fits is not None:
            inputs, targets = (
                corpus.fit_rows(trunk, at, train).to(trunk.device) for at in (layer, head.fits)
            )
            head.fit(inputs, targets)
    return heads.eval()


@contextmanager
def _seeded(trunk: Trunk, seed: int) -> Iterator[None]:
    """Draw from a seed, and leave the user's own random numbers as they were."""
    with torch.random.fork_rng(devices=[trunk.device] if trunk.device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def _teachers(trunk: Trunk, heads: ExitHeads) -> list[tuple[Teacher, list[int]]]:
    """Make a teacher for every list of tokens, with the layers whose heads it teaches."""
    found: list[tuple[torch.Tensor | None, list[int]]] = []
    for layer in heads.layers:
        tokens = heads.after(layer).shortlist
        for known, layers in found:
            if known is tokens or (known is not None and tokens is not None and torch.equal(known, tokens)):
                layers.append(layer)
                break
        else:
            found.append((tokens, [layer]))
    return [(Teacher(trunk, tokens), layers) for tokens, layers in found]


class Trainer:
    """Trains all heads together, one pass over the sequences an epoch, and can stop and go on.

    Parameters
    ----------
    folder
        Where to keep the state and the metrics, in a folder that is named after what is trained: another training
        does not touch it.  ``None`` keeps none.
    identity
        What the state belongs to besides these heads and this configuration: the corpus, and with it the model.
    checkpoint_seconds
        Time between checkpoints.
    processes
        Those that train together, each on its share of every batch.
    """

    def __init__(
        self,
        trunk: Trunk,
        heads: ExitHeads,
        corpus: Corpus,
        config: TrainingConfig,
        *,
        folder: Path | None = None,
        identity: dict[str, Any] | None = None,
        checkpoint_seconds: float = 120.0,
        processes: Processes | None = None,
    ) -> None:
        self.trunk, self.heads, self.corpus, self.config = trunk, heads, corpus, config
        self.layers = heads.layers
        self.teachers = _teachers(trunk, heads)
        self.processes = processes or Processes()
        self._narrowed: dict[int, torch.Tensor] = {}
        self.generated, self.lengths = corpus.generated, corpus.lengths
        self.train, watched = corpus.split()
        watched = watched if len(watched) else self.train
        self.watched = watched[
            self.generated[watched].cumsum(0) <= max(_WATCHED_ROWS, int(self.generated.max()))
        ]
        self.steps = [len(self._batches(epoch)) for epoch in range(config.epochs)]
        self.total_steps = sum(self.steps)
        self.parameters = [p for p in heads.parameters() if p.requires_grad]
        self.peaks = {
            layer: config.learning_rate or _peak_rate(heads.after(layer), 1 - layer / trunk.num_layers)
            for layer in self.layers
        }
        self.optimizer = torch.optim.AdamW(_groups(heads, self.peaks), weight_decay=0.0, fused=True)
        self.step = self.tokens = 0
        self.history: list[HeadMetrics] = []
        self.best = Best(heads)
        self._log: MetricsLog | None = None
        self.checkpoint_seconds = checkpoint_seconds
        self.identity = _digest(
            {
                "format": _FORMAT,
                "config": asdict(config),
                "heads": {layer: _trained_by(heads.after(layer).config) for layer in self.layers},
                "code": {layer: _code_of(type(heads.after(layer))) for layer in self.layers},
                "state": {name: tuple(tensor.shape) for name, tensor in heads.own_state().items()},
                "peaks": list(self.peaks.values()),
                "rows": corpus.rows,
                **(identity or {}),
            }
        )
        self.checkpoint: Path | None = None
        if folder is not None:
            self.checkpoint = folder / f"training-{self.identity[:12]}" / "state.safetensors"

    @staticmethod
    def try_heads(trunk: Trunk, configs: Mapping[int, HeadConfig], config: TrainingConfig) -> None:
        """Refuse heads that cannot be built, read with or trained, by layer, before text is written for them.

        Raises
        ------
        InputError
            Naming the kind.
        """
        tried: list[tuple[HeadConfig, ExitHead]] = []
        with _seeded(trunk, config.seed):
            for layer, wanted in configs.items():
                known = [head for other, head in tried if other == wanted]
                with _blamed(wanted.kind):
                    head = known[0] if known else _try_head(trunk, wanted)
                    if config.learning_rate is None:
                        _peak_rate(head, 1 - layer / trunk.num_layers)
                tried.append((wanted, head))
        if not any(parameter.requires_grad for _, head in tried for parameter in head.parameters()):
            raise InputError(
                f"head: there is nothing to train in {', '.join({wanted.kind: None for wanted, _ in tried})}; give a "
                "kind with parameters that require gradients"
            )

    def run(self, progress: Progress | None = None, watch: Watch | None = None) -> list[HeadMetrics]:
        """Train to the end, and give every head the parameters it agreed most with.

        Returns
        -------
        list of HeadMetrics
            Of every head, shallow to deep, each time they were watched.
        """
        self._resume()
        self._start_alike()
        if self.checkpoint is not None and self.processes.first:
            self.checkpoint.parent.mkdir(parents=True, exist_ok=True)
            self._log = MetricsLog(self.checkpoint.parent, self.history)
        if not self.history:
            self._watch(watch)
        saved = time.monotonic()
        while self.step < self.total_steps:
            epoch, start = self._place()
            # Asked between epochs only, so that a training gone on with ends where one in one go does.
            if not start and self._settled(epoch):
                break
            watches = _watches(self.steps[epoch])
            for number, batch in enumerate(self._batches(epoch)[start:], start + 1):
                self.train_step(batch)
                if progress is not None:
                    progress("training", self.step, self.total_steps)
                if number in watches:
                    self._watch(watch)
                if time.monotonic() - saved > self.checkpoint_seconds:
                    self._save()
                    saved = time.monotonic()
        self._save(finished=True)
        if self._log is not None:
            self._log.close()
        self.best.restore(self.heads)
        # Buffers that each process filled from its own share of the text.
        self._share_heads()
        return self.history

    def train_step(self, numbers: torch.Tensor) -> None:
        """Take one step on a batch of sequences, in as many pieces as the memory set aside for them asks."""
        share = _schedule(self.step, self.total_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * share
        self.optimizer.zero_grad()
        total = int(self.generated[numbers].sum())
        for batch in self._pieces(numbers[self.processes.rank :: self.processes.count]):
            self._add_gradients(batch, total)
        self.processes.add([_gradient(parameter) for parameter in self.parameters])
        self.optimizer.step()
        self.step += 1
        self.tokens += total

    @torch.no_grad()
    def watch(self) -> list[HeadMetrics]:
        """Metrics of every head on the sequences held back (on those trained on if there are none)."""
        weight = self.config.entropy_weight
        sums = torch.zeros(len(self.layers), 2, dtype=torch.float64)
        margins: list[list[NDArray[np.float32]]] = [[] for _ in self.layers]
        right: list[list[NDArray[np.bool_]]] = [[] for _ in self.layers]
        for batch in self._pieces(self.watched):
            features = self._features(batch)
            model_choice = batch.top[:, 0].numpy()
            for rows in self._chunks(len(batch)):
                targets = self._targets(batch, rows)
                for index, layer in enumerate(self.layers):
                    head = self.heads.after(layer)
                    target = targets[layer]
                    with self._precision():
                        loss, entropy = exit_loss(features[index][rows], *self._rows_of(head), target, weight)
                    sums[index] += torch.stack([loss.double(), entropy.double().sum()]).cpu()
                    choice, margin = top2_margin(head.logits(features[index][rows].float()))
                    chosen = head.tokens(torch.as_tensor(choice, device=self.trunk.device)).cpu().numpy()
                    margins[index].append(np.atleast_1d(margin))
                    right[index].append(np.atleast_1d(chosen == model_choice[rows]))
        found = []
        for index, layer in enumerate(self.layers):
            margin, correct = np.concatenate(margins[index]), np.concatenate(right[index])
            loss, entropy = (sums[index] / len(margin)).tolist()
            thresholds = fast_calibrate(margin, correct, COVERAGE_EPS)
            coverage = tuple(float((margin.astype(np.float64) >= tau).mean()) for tau in thresholds)
            accuracy = float(correct.mean())
            found.append(HeadMetrics(layer, self.step, self.tokens, loss, accuracy, entropy, coverage))
        return found

    def _start_alike(self) -> None:
        """Let all processes begin with the first one's parameters, at the same step."""
        step = self.processes.from_first(lambda: self.step)
        if step != self.step:
            raise StorageError(
                f"cache: one process begins at step {self.step} and the first at step {step}; "
                "give all of them a folder they share"
            )
        self._share_heads()

    def _share_heads(self) -> None:
        self.processes.share([t for t in self.heads.state_dict().values() if t.is_floating_point()])

    def _watch(self, watch: Watch | None) -> None:
        # What is kept and when it ends follows from the metrics: processes that disagreed in a last bit would part.
        metrics = self.processes.from_first(self.watch)
        self.history += metrics
        self.best.see(self.heads, metrics)
        if self._log is not None:
            self._log.add(metrics)
        if watch is not None and self.processes.first:
            watch(metrics)

    def _settled(self, epochs: int) -> bool:
        """Whether after so many epochs no head has gained for so long that none is expected to."""
        patience = self.config.patience
        if patience is None or epochs < patience:
            return False
        return max(self.best.steps.values()) <= sum(self.steps[: epochs - patience])

    def _add_gradients(self, batch: Batch, total: int) -> None:
        """Add a piece's share of the gradient of the mean loss over ``total`` tokens.

        All heads read the piece; then their logits are made and taken back, some rows and one head at a time.
        """
        features = self._features(batch)
        backwards = [torch.zeros_like(rows) for rows in features]
        for rows in self._chunks(len(batch)):
            targets = self._targets(batch, rows)
            for layer, read, backward in zip(self.layers, features, backwards, strict=True):
                head = self.heads.after(layer)
                self._go_back(head, read[rows].detach(), backward[rows], targets[layer], total)
        differentiable = [pair for pair in zip(features, backwards, strict=True) if pair[0].requires_grad]
        torch.autograd.backward([rows for rows, _ in differentiable], [grad for _, grad in differentiable])

    @torch.no_grad()
    def _go_back(
        self, head: ExitHead, features: torch.Tensor, backward: torch.Tensor, target: torch.Tensor, total: int
    ) -> None:
        """Write the gradient by some rows' features into ``backward``, and add that by output rows that are trained."""
        weight, bias = self._rows_of(head)
        with self._precision():
            gradient = exit_gradient(features, weight, bias, target, self.config.entropy_weight).div_(total)
            backward.copy_(gradient @ weight)
            if head.weight.requires_grad:
                _gradient(head.weight).add_(gradient.T @ features)
        if head.bias is not None and head.bias.requires_grad:
            _gradient(head.bias).add_(gradient.sum(dim=0))

    def _rows_of(self, head: ExitHead) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Output rows of a head as products take them: those that are not trained are narrowed once for all."""
        if self._narrow and not head.weight.requires_grad:
            known = self._narrowed.get(id(head.weight))
            if known is None:
                known = self._narrowed[id(head.weight)] = head.weight.bfloat16()
            return known, head.bias
        return head.weight, head.bias

    def _features(self, batch: Batch) -> list[torch.Tensor]:
        device = self.trunk.device
        picked = (batch.picked[0].to(device), batch.picked[1].to(device))
        with self._precision(), _attention(device, batch.hidden[self.layers[0]].shape):
            return [
                self.heads.after(layer).read(batch.hidden[layer].to(device).float(), picked)
                for layer in self.layers
            ]

    def _targets(self, batch: Batch, rows: slice) -> dict[int, torch.Tensor]:
        final, log_normalizer = batch.final[rows], batch.log_normalizer[rows]
        found: dict[int, torch.Tensor] = {}
        for teacher, layers in self.teachers:
            found |= dict.fromkeys(layers, teacher.probabilities(final, log_normalizer))
        return found

    @property
    def _narrow(self) -> bool:
        wanted = self.config.precision
        kind = self.trunk.device.type
        able = torch.cuda.is_bf16_supported() if kind == "cuda" else kind == "cpu" and BFLOAT16_PRODUCTS
        return wanted == "bfloat16" or (wanted == "auto" and able)

    def _precision(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.trunk.device.type, torch.bfloat16, enabled=self._narrow)

    def _pieces(self, numbers: torch.Tensor) -> Iterator[Batch]:
        """Read sequences a few at a time."""
        if len(numbers):
            size = int(self.lengths[numbers].max()) * self.trunk.hidden_size
            for part in numbers.split(max(1, _STATES_BUDGET // size)):
                yield self.corpus.batch(part, self.layers)

    def _chunks(self, rows: int) -> Iterator[slice]:
        size = _CPU_ROWS
        if self.trunk.device.type != "cpu":
            size = max(1, _LOGITS_BUDGET // max(len(teacher.weight) for teacher, _ in self.teachers))
        # Of equal size: what would be left over takes as long as many.
        pieces = max(1, math.ceil(rows / size))
        ends = (rows * piece // pieces for piece in range(pieces + 1))
        return (slice(start, end) for start, end in pairwise(ends))

    def _batches(self, epoch: int) -> list[torch.Tensor]:
        size, seed = self.config.batch_size, self.config.seed
        return batches(self.train, self.generated[self.train], size, seed=seed, epoch=epoch)

    def _place(self) -> tuple[int, int]:
        """Epoch, and step in it, that comes next."""
        start = self.step
        for epoch, steps in enumerate(self.steps):
            if start < steps:
                return epoch, start
            start -= steps
        raise AssertionError("training is over")

    def _save(self, *, finished: bool = False) -> None:
        if self.checkpoint is None or not self.processes.first:
            return
        tensors = {f"head.{name}": tensor for name, tensor in self.heads.own_state().items()}
        tensors |= {f"best.{name}": tensor for name, tensor in self.best.parameters.items()}
        # No more steps, no more use for the moments, which are twice as large as the heads.
        for index, state in self.optimizer.state_dict()["state"].items() if not finished else ():
            tensors |= {f"optimizer.{index}.{key}": torch.as_tensor(value) for key, value in state.items()}
        metadata = {
            "identity": self.identity,
            "step": str(self.step),
            "tokens": str(self.tokens),
            "history": json.dumps([asdict(item) for item in self.history]),
        }
        # Copies, because tied or sliced tensors share memory, which the format refuses.
        copies = {name: tensor.clone().contiguous() for name, tensor in tensors.items()}
        metadata["sha256"] = _checksum(metadata, copies)
        with written_whole(self.checkpoint) as temporary:
            save_file(copies, temporary, metadata=metadata)

    def _resume(self) -> None:
        if self.checkpoint is None or not self.checkpoint.exists():
            return
        damaged = StorageError(f"cache: {self.checkpoint} is damaged; delete it to train anew")
        try:
            with safe_open(self.checkpoint, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a dict
        except SafetensorError as error:
            raise damaged from error
        checksum = metadata.pop("sha256", None)
        if checksum != _checksum(metadata, tensors) or metadata["identity"] != self.identity:
            raise damaged
        with torch.no_grad():
            for name, tensor in self.heads.own_state().items():
                tensor.copy_(tensors[f"head.{name}"])
        self.step, self.tokens = int(metadata["step"]), int(metadata["tokens"])
        self.history = [
            HeadMetrics(**(item | {"coverage": tuple(item["coverage"])}))
            for item in json.loads(metadata["history"])
        ]
        self.best.resume(self.history, tensors)
        state: dict[int, dict[str, torch.Tensor]] = {}
        for name, tensor in tensors.items():
            if name.startswith("optimizer."):
                _, index, key = name.split(".")
                state.setdefault(int(index), {})[key] = tensor
        if state:
            groups = self.optimizer.state_dict()["param_groups"]
            self.optimizer.load_state_dict({"state": state, "param_groups": groups})


class Best:
    """For every head the parameters it agreed most with on the sequences held back.

    Attributes
    ----------
    accuracy, steps : dict of int to float, int
        By layer, the best agreement and the step it was seen at.
    parameters : dict of str to Tensor
        By name, as in the heads.
    """

    def __init__(self, heads: ExitHeads) -> None:
        self.accuracy = dict.fromkeys(heads.layers, -1.0)
        self.steps = dict.fromkeys(heads.layers, 0)
        self.parameters: dict[str, torch.Tensor] = {}

    def see(self, heads: ExitHeads, metrics: Sequence[HeadMetrics]) -> None:
        """Keep the parameters of the heads that are better than they were."""
        for item in metrics:
            if item.accuracy > self.accuracy[item.layer]:
                self.accuracy[item.layer], self.steps[item.layer] = item.accuracy, item.step
                for name, tensor in heads.after(item.layer).own_state().items():
                    self.parameters[f"{item.layer}.{name}"] = tensor.clone()

    @torch.no_grad()
    def restore(self, heads: ExitHeads) -> None:
        """Give the heads what was kept."""
        for name, tensor in heads.own_state().items():
            if name in self.parameters:
                tensor.copy_(self.parameters[name])

    def resume(self, history: Sequence[HeadMetrics], tensors: Mapping[str, torch.Tensor]) -> None:
        """Go on from the metrics so far and the parameters a checkpoint holds."""
        for item in best_of(history):
            self.accuracy[item.layer], self.steps[item.layer] = item.accuracy, item.step
        self.parameters = {
            name.removeprefix("best."): tensor for name, tensor in tensors.items() if name.startswith("best.")
        }


def best_of(history: Sequence[HeadMetrics]) -> list[HeadMetrics]:
    """Metrics of every head, shallow to deep, when it agreed most: those of the parameters it keeps."""
    best: dict[int, HeadMetrics] = {}
    for item in history:
        if item.layer not in best or item.accuracy > best[item.layer].accuracy:
            best[item.layer] = item
    return [best[layer] for layer in sorted(best)]


def _peak_rate(head: ExitHead, skipped: float) -> float:
    """Ask a head, possibly of a kind of the user's own, what rate suits it."""
    given = head.peak_rate(skipped)
    try:
        rate = float(given)
    except (TypeError, ValueError):
        rate = math.nan
    if not 0 < rate < math.inf:
        raise InputError(
            f"peak_rate of head kind {head.config.kind!r} gives {given!r}: let it return a positive number"
        )
    return rate


@contextmanager
def _blamed(kind: str) -> Iterator[None]:
    """Say which kind of head it is whose code raises."""
    try:
        yield
    except (OfframpError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise InputError(
            f"head kind {kind!r} does not work, mend it: {type(error).__name__}: {error}"
        ) from error


@torch.no_grad()
def _try_head(trunk: Trunk, config: HeadConfig) -> ExitHead:
    """Make a head over tokens that are as good as any, and let it read one of two."""
    shortlist = choose_shortlist(torch.zeros(trunk.vocab_size), config.shortlist)
    head = make_head(trunk, config, shortlist).eval()
    hidden = torch.ones(1, 2, trunk.hidden_size, device=trunk.device)
    row = torch.zeros(1, dtype=torch.int64, device=trunk.device)
    features = head.read(hidden, (row, row + 1))
    if features.shape != (1, head.weight.shape[1]):
        raise InputError(
            f"head kind {config.kind!r} gives features of shape {tuple(features.shape)} for one token: let them be "
            f"{(1, head.weight.shape[1])}"
        )
    return head


def _trained_by(config: HeadConfig) -> dict[str, Any]:
    """Give what training depends on of a config: nothing is rounded in it."""
    return {name: value for name, value in config.to_dict().items() if name != "bits"}


def _code_of(kind: type[ExitHead]) -> list[str]:
    """Code of a kind of the user's own, class by class; of ours `_FORMAT` tells."""
    found: list[str] = []
    for part in kind.__mro__:
        if f"{part.__module__}.".startswith(("offramp.", "torch.", "builtins.")):
            continue
        # A notebook has no source of a class, and a file may have been edited since it was read.
        with suppress(OSError, TypeError, SyntaxError):
            found.append(inspect.getsource(part))
        for name, item in vars(part).items():
            code = getattr(inspect.unwrap(item), "__code__", None)
            if code is not None:
                found.append(f"{name}: {_compiled(code)}")
            elif isinstance(item, str | int | float) and not name.startswith("__"):
                found.append(f"{name}: {item!r}")
    return found


def _compiled(code: CodeType) -> str:
    """Write down what a function does, the same in every process and wherever it stands."""
    constants = []
    for item in code.co_consts:
        plain = sorted(map(repr, item)) if isinstance(item, frozenset) else repr(item)
        constants.append(_compiled(item) if isinstance(item, CodeType) else plain)
    return f"{code.co_code.hex()} {code.co_names} {constants}"


def _groups(heads: ExitHeads, peaks: Mapping[int, float]) -> list[dict[str, Any]]:
    """Parameters to train, a group a head; one that heads share belongs to the first."""
    groups: list[dict[str, Any]] = []
    seen: set[int] = set()
    for layer, peak in peaks.items():
        own = [p for p in heads.after(layer).parameters() if p.requires_grad and id(p) not in seen]
        seen.update(map(id, own))
        if own:
            groups.append({"params": own, "peak": peak})
    return groups


def _attention(device: torch.device, shape: torch.Size) -> AbstractContextManager[Any]:
    """Choose how attention is computed while sequences (B, T, H) are trained on."""
    whole = device.type == "cpu" and shape[0] * shape[1] ** 2 <= _WEIGHTS_BUDGET
    return sdpa_kernel(SDPBackend.MATH) if whole else nullcontext()


def _gradient(parameter: torch.Tensor) -> torch.Tensor:
    """Give a parameter's gradient so far; zero where there is none."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad


def _watches(steps: int) -> set[int]:
    """Choose the steps of an epoch after which the heads are watched; its last is one."""
    return {max(1, round(steps * part / _WATCHES_PER_EPOCH)) for part in range(1, _WATCHES_PER_EPOCH + 1)}


def _schedule(step: int, total: int) -> float:
    """Share of the peak rate at a step: warm-up over a twentieth of the steps, then half a cosine."""
    warm = max(1, total // 20)
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, total - warm)))


def _checksum(metadata: Mapping[str, str], tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 of a state, to be kept in its own file: a file beside it could not be replaced in the same moment."""
    found = hashlib.sha256(json.dumps(dict(metadata), sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.cpu().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def _digest(value: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
