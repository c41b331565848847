"""The training corpus: self-generated tokens with the hidden states of the exit layers, in shards on disk.

A shard is written whole or not at all and carries a checksum, so an interrupted run goes on where it stopped, and
trying another head or λ costs no pass through the model.  For `training` and `model`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from offramp.errors import InputError, StorageError
from offramp.llm.files import read_json, sha256_of, write_json, written_whole
from offramp.llm.fingerprint import fingerprint
from offramp.llm.generating import continue_prompts
from offramp.llm.sequences import TokenSequence, hash_of
from offramp.llm.states import Progress, teacher_forced
from offramp.llm.trunk import Trunk

TOP = 8
"""Number of the model's first choices kept for every token; the shortlist is chosen from them."""

_BATCH = 64
_LOGITS_CHUNK = 256
# Greedy text is what calibration and serving see; warmer rows teach the heads what lies beside it.
_TEMPERATURES = (0.0, 0.5, 0.8, 1.0)


@dataclass(frozen=True)
class CorpusPlan:
    """What a corpus is made of; two plans that are equal make the same corpus.

    Attributes
    ----------
    layers : tuple of int
        Exit layers whose hidden states are kept.
    tokens : int
        Tokens wanted.
    max_new_tokens : int
        Tokens a prompt is continued by.
    seed : int
        Seed of the sampling.
    """

    layers: tuple[int, ...]
    tokens: int
    max_new_tokens: int = 96
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse a plan for nothing."""
        for name in ("tokens", "max_new_tokens"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise InputError(f"{name} is {value!r}: give a whole number of at least 1")


class Corpus:
    """Shards of training rows in a folder.

    Every row is one predicted token: ``hidden.<layer>`` (H,) at each exit, ``final`` (H,) before the last norm,
    ``log_normalizer``, the log of the sum of the exponentials of the model's logits, ``top`` (8,) the model's first
    choices, and ``sequence``, the number of the sequence it belongs to.

    Parameters
    ----------
    folder
        Where the shards are.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self.shards: list[dict[str, torch.Tensor]] = []

    @property
    def rows(self) -> int:
        """Number of tokens."""
        return sum(len(shard["sequence"]) for shard in self.shards)

    def add(self, shard: dict[str, torch.Tensor]) -> None:
        """Write one shard, whole or not at all, and open it."""
        path = self._path(len(self.shards))
        with written_whole(path) as temporary:
            save_file({name: tensor.contiguous() for name, tensor in shard.items()}, temporary)
            checksum = sha256_of(temporary)
        write_json(path.with_suffix(".json"), {"sha256": checksum, "rows": len(shard["sequence"])})
        self.shards.append(load_file(path))

    def open_shards(self) -> None:
        """Open every finished shard, checking each against its checksum.

        Raises
        ------
        StorageError
            Naming a shard that does not hold what was written.
        """
        self.shards = []
        while self._path(len(self.shards)).with_suffix(".json").exists():
            path = self._path(len(self.shards))
            note = read_json(path.with_suffix(".json"))
            if not path.exists() or sha256_of(path) != note.get("sha256"):
                raise StorageError(
                    f"cache: {path} is damaged; delete the folder {self.folder} to make it anew"
                )
            try:
                self.shards.append(load_file(path))
            except SafetensorError as error:
                raise StorageError(f"cache: {path} is damaged; delete the folder {self.folder}") from error

    def top_counts(self, vocab_size: int) -> torch.Tensor:
        """How often each token (V,) is among the model's first eight choices."""
        counts = torch.zeros(vocab_size, dtype=torch.int64)
        for shard in self.shards:
            counts += torch.bincount(shard["top"].reshape(-1).long(), minlength=vocab_size)
        return counts

    def split(self, share: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Row numbers for training and for watching it: every ``1/share``-th sequence is held back, whole."""
        sequence = torch.cat([shard["sequence"] + (index << 32) for index, shard in enumerate(self.shards)])
        _, number = torch.unique(sequence, return_inverse=True)
        held = number % round(1 / share) == 0
        if bool(held.all()):
            held[:] = False
        return (~held).nonzero().flatten(), held.nonzero().flatten()

    def take(self, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        """Rows by number, in the order given up to their shard, as one dict of tensors."""
        starts = torch.tensor([0, *(len(shard["sequence"]) for shard in self.shards)]).cumsum(0)
        owner = torch.bucketize(rows, starts, right=True) - 1
        parts = []
        for index in owner.unique().tolist():
            inside = rows[owner == index] - starts[index]
            parts.append({name: tensor[inside] for name, tensor in self.shards[index].items()})
        return {name: torch.cat([part[name] for part in parts]) for name in self.shards[0]}

    def _path(self, index: int) -> Path:
        return self.folder / f"shard-{index:05d}.safetensors"


def prepare_corpus(
    trunk: Trunk,
    plan: CorpusPlan,
    folder: str | os.PathLike[str],
    *,
    prompts: Sequence[torch.Tensor] | None = None,
    sequences: Sequence[TokenSequence] | None = None,
    end_tokens: Sequence[int] = (),
    progress: Progress | None = None,
) -> Corpus:
    """Open the corpus of a plan, making what is missing of it.

    Parameters
    ----------
    plan
        Layers, tokens, seed.
    folder
        Where it is or will be.  A folder that holds a corpus of another model, plan or text is refused.
    prompts
        Token ids of starting prompts, continued by the model itself.
    sequences
        The user's own text instead: nothing is generated, and of more than ``plan.tokens`` tokens only so many
        sequences are drawn as reach them.
    end_tokens
        Tokens that end a continuation.

    Raises
    ------
    StorageError
        If the folder belongs to something else, or is damaged.
    """
    corpus = Corpus(folder)
    _claim(corpus.folder, _identity(trunk, plan, prompts, sequences))
    corpus.open_shards()
    if prompts is not None:
        _generate(corpus, trunk, plan, prompts, end_tokens, progress)
    else:
        _read(corpus, trunk, plan, sequences or (), progress)
    return corpus


def _generate(
    corpus: Corpus,
    trunk: Trunk,
    plan: CorpusPlan,
    prompts: Sequence[torch.Tensor],
    end_tokens: Sequence[int],
    progress: Progress | None,
) -> None:
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(plan.seed)).tolist()
    while corpus.rows < plan.tokens:
        index = len(corpus.shards)
        # Seeded by shard, so that a resumed run makes the shards an uninterrupted one would have made.
        generator = torch.Generator().manual_seed(plan.seed * 1_000_003 + index)
        rows = min(_BATCH, -(-(plan.tokens - corpus.rows) // plan.max_new_tokens))
        turns = [divmod(index * _BATCH + row, len(order)) for row in range(rows)]
        picked = [prompts[order[place]] for _, place in turns]
        written = continue_prompts(
            trunk,
            picked,
            max_new_tokens=plan.max_new_tokens,
            end_tokens=end_tokens,
            # A prompt that comes round again comes warmer or cooler, so that few prompts still give varied text.
            temperatures=[
                _TEMPERATURES[(row + turn) % len(_TEMPERATURES)] for row, (turn, _) in enumerate(turns)
            ],
            generator=generator,
            capture=plan.layers,
        )
        assert written.final is not None
        sequence = torch.cat(
            [torch.full((item.generated,), row) for row, item in enumerate(written.sequences)]
        )
        corpus.add(_shard(trunk, written.exits, written.final, sequence))
        if progress is not None:
            progress("generating", min(corpus.rows, plan.tokens), plan.tokens)


def _read(
    corpus: Corpus,
    trunk: Trunk,
    plan: CorpusPlan,
    sequences: Sequence[TokenSequence],
    progress: Progress | None,
) -> None:
    chosen = _choose(sequences, plan)
    # One shard a batch; batches come in a fixed order, so the shards there are the first batches.
    for states in teacher_forced(trunk, chosen, plan.layers, skip=len(corpus.shards), progress=progress):
        corpus.add(_shard(trunk, states.exits, states.final, states.groups))


def _choose(sequences: Sequence[TokenSequence], plan: CorpusPlan) -> list[TokenSequence]:
    """Draw sequences until the plan's tokens are reached: batches go by length, so a cut there would be biased."""
    order = torch.randperm(len(sequences), generator=torch.Generator().manual_seed(plan.seed)).tolist()
    chosen: list[int] = []
    tokens = 0
    while len(chosen) < len(order) and tokens < plan.tokens:
        chosen.append(order[len(chosen)])
        tokens += sequences[chosen[-1]].generated
    return [sequences[index] for index in sorted(chosen)]


def _shard(
    trunk: Trunk, exits: dict[int, torch.Tensor], final: torch.Tensor, sequence: torch.Tensor
) -> dict[str, torch.Tensor]:
    normalizers, tops = [], []
    for chunk in final.split(_LOGITS_CHUNK):
        logits = trunk.logits(chunk).float()
        normalizers.append(logits.logsumexp(dim=-1).cpu())
        tops.append(logits.topk(min(TOP, logits.shape[-1]), dim=-1).indices.int().cpu())
    shard = {f"hidden.{layer}": states.cpu() for layer, states in exits.items()}
    return shard | {
        "final": final.cpu(),
        "log_normalizer": torch.cat(normalizers),
        "top": torch.cat(tops),
        "sequence": sequence.to(torch.int64),
    }


def _identity(
    trunk: Trunk,
    plan: CorpusPlan,
    prompts: Sequence[torch.Tensor] | None,
    sequences: Sequence[TokenSequence] | None,
) -> dict[str, Any]:
    return {
        "format": 1,
        "model": fingerprint(trunk.model).digest,
        "dtype": str(trunk.dtype),
        "layers": list(plan.layers),
        "tokens": plan.tokens,
        "max_new_tokens": plan.max_new_tokens,
        "seed": plan.seed,
        "text": hash_of(list(prompts if prompts is not None else sequences or ())),
    }


def _claim(folder: Path, identity: dict[str, Any]) -> None:
    """Make the folder this corpus's, or check that it is."""
    path = folder / "corpus.json"
    if path.exists():
        found = read_json(path)
        different = [name for name, value in identity.items() if found.get(name) != value]
        if different:
            raise StorageError(
                f"cache: {folder} holds a corpus with another {' and another '.join(different)}; "
                "choose another folder, or delete it"
            )
        return
    # A first run that was killed may have left the beginning of this very file.
    if folder.exists() and any(item.suffix != ".tmp" for item in folder.iterdir()):
        raise StorageError(f"cache: {folder} holds other files; choose an empty or a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(path, identity)


def batches(rows: torch.Tensor, size: int, *, seed: int, epoch: int) -> Iterator[torch.Tensor]:
    """Row numbers in random order, ``size`` at a time, the same for the same seed and epoch."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = rows[torch.randperm(len(rows), generator=generator)]
    yield from order.split(size)
