"""The training corpus: self-generated sequences with the hidden states of the exit layers, in shards on disk.

Sequences are kept whole, prompt included, because heads with attention of their own read them whole.  A shard is
written whole or not at all and carries checksums, so an interrupted run goes on where it stopped.  Every layer's
states are a file of their own beside the shard's text: other exits, head kinds and λ read what is there, and a layer
that is not is added by one pass of the model over the stored text, without writing it again.
For `training` and `model`.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from offramp.errors import InputError, StorageError
from offramp.llm.files import read_json, sha256_of, write_json, written_whole
from offramp.llm.fingerprint import fingerprint
from offramp.llm.generating import TOP, continue_prompts
from offramp.llm.sequences import TokenSequence, hash_of
from offramp.llm.states import Picked, Progress, teacher_forced
from offramp.llm.trunk import Trunk

FIT_ROWS = 20_000
"""Rows a head's first linear map is fitted on."""

_FORMAT = 5
_BATCH = 96
# Tokens of a batch that is continued, were all its prompts as long as the longest: keys, values and states of so many
# are held.  Prompts of up to some 400 tokens still go 96 at a time.
_BATCH_TOKENS = _BATCH * 512
_LOGITS_CHUNK = 256
# Every prompt is continued greedily first, which is what calibration and serving see; warmer continuations are more
# text of the same prompts, new ones however often their turn comes.
_WARM = (0.5, 0.8, 1.0)
# One topic in so many is kept from training, to watch it.
_WATCHED_TOPICS = 25


@dataclass(frozen=True)
class CorpusPlan:
    """What a corpus is made of.

    Attributes
    ----------
    layers : tuple of int
        Exit layers whose hidden states are kept.
    tokens : int
        Tokens wanted: a folder that holds more is read as far as that, one that holds fewer is added to.
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


@dataclass(frozen=True, eq=False)
class Batch:
    """Whole sequences, and the rows in them that predict generated tokens.

    Attributes
    ----------
    hidden : dict of (B, T, H)
        The residual after each layer, padded on the right; in the dtype it is stored in.
    picked : (n,), (n,) int64
        Row and position of each prediction.
    final : (n, H)
        The residual before the last norm there.
    log_normalizer : (n,) float32
        Log of the sum of the exponentials of the model's logits there.
    top : (n, 8) int32
        The model's first choices there.
    """

    hidden: dict[int, torch.Tensor]
    picked: Picked
    final: torch.Tensor
    log_normalizer: torch.Tensor
    top: torch.Tensor

    def __len__(self) -> int:
        """Count the predictions."""
        return len(self.log_normalizer)


class Corpus:
    """Shards of whole sequences in a folder.

    A shard's text file holds ``tokens`` of its sequences one after the other, their ``lengths``, ``prompt_lengths``
    and ``topics`` (the number of what each is about), and for every generated token ``final`` (H,), the
    residual before the last norm where it was predicted, ``log_normalizer`` and ``top``.  A layer's file holds
    ``hidden`` (H,) after that layer for every token of every sequence but the last.

    Parameters
    ----------
    folder
        Where the shards are.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self.shards: list[_Shard] = []

    @property
    def rows(self) -> int:
        """Number of generated tokens."""
        return sum(shard.rows for shard in self.shards)

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers whose states every shard has."""
        kept = [set(shard.hidden) for shard in self.shards]
        return tuple(sorted(set.intersection(*kept))) if kept else ()

    @property
    def generated(self) -> torch.Tensor:
        """Generated tokens of every sequence, int64."""
        return torch.cat([s.text["lengths"] - s.text["prompt_lengths"] for s in self.shards]).long()

    @property
    def lengths(self) -> torch.Tensor:
        """Tokens of every sequence, prompt included, int64."""
        return torch.cat([shard.text["lengths"] for shard in self.shards]).long()

    def __len__(self) -> int:
        """Count the sequences."""
        return sum(len(shard) for shard in self.shards)

    def sequence(self, number: int) -> TokenSequence:
        """One of the sequences."""
        shard, place = self._locate(number)
        return shard.sequence(place)

    def top_counts(self, vocab_size: int, numbers: torch.Tensor) -> torch.Tensor:
        """How often each token (V,) is among the model's first eight choices, in sequences ``numbers``."""
        counts = torch.zeros(vocab_size, dtype=torch.int64)
        for shard, rows in zip(self.shards, self._rows_of(numbers), strict=True):
            counts += torch.bincount(shard.text["top"][rows].reshape(-1).long(), minlength=vocab_size)
        return counts

    def split(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Numbers of the sequences for training and of those for watching it.

        Every 25th topic is held back with all that was made of it; of one topic alone nothing is.
        """
        topics = torch.cat([shard.text["topics"] for shard in self.shards])
        held = topics % _WATCHED_TOPICS == 0
        if not held.any() or held.all():
            held = torch.unique(topics, return_inverse=True)[1] % _WATCHED_TOPICS == 0
        if held.all():
            held = ~held
        return (~held).nonzero().flatten(), held.nonzero().flatten()

    def batch(self, numbers: torch.Tensor, layers: Sequence[int]) -> Batch:
        """Read sequences by number, with the states after ``layers``."""
        found = [self._locate(int(number)) for number in numbers]
        rows, places = [], []
        for row, (shard, place) in enumerate(found):
            given, total = shard.prompt_lengths[place], shard.lengths[place]
            rows.append(torch.full((total - given,), row))
            places.append(torch.arange(given - 1, total - 1))
        text = [shard.predictions(place) for shard, place in found]
        return Batch(
            hidden={
                layer: torch.nn.utils.rnn.pad_sequence(
                    [shard.states(layer, place) for shard, place in found], batch_first=True
                )
                for layer in layers
            },
            picked=(torch.cat(rows), torch.cat(places)),
            final=torch.cat([part["final"] for part in text]),
            log_normalizer=torch.cat([part["log_normalizer"] for part in text]),
            top=torch.cat([part["top"] for part in text]),
        )

    def fit_rows(self, trunk: Trunk, layer: int, numbers: torch.Tensor) -> torch.Tensor:
        """States (n, H) after a layer, possibly the last, where tokens of sequences ``numbers`` are predicted.

        The first 20 000 of them at most.
        """
        kept: list[torch.Tensor] = []
        rows = 0
        for index, (shard, chosen) in enumerate(zip(self.shards, self._rows_of(numbers), strict=True)):
            # Others count too: no more shards than these have the states of layers that are no exits.
            if rows >= FIT_ROWS and any(map(len, kept)):
                break
            if layer != trunk.num_layers and layer not in shard.hidden:
                shard = self.shards[index] = shard.with_layers(trunk, [layer])  # noqa: PLW2901  # the same, completed
            rows += shard.rows
            last = layer == trunk.num_layers
            kept.append((shard.text["final"] if last else shard.hidden[layer][shard.predicting])[chosen])
        return torch.cat(kept)[:FIT_ROWS]

    def open(self, tokens: int) -> None:
        """Open the finished shards as far as ``tokens``, checking every file against its checksum.

        Raises
        ------
        StorageError
            Naming a file that does not hold what was written.
        """
        self.shards = []
        noted = {path.name for path in self.folder.glob("shard-*.json")}
        while self.rows < tokens and noted:
            note = _note(self.folder, len(self.shards))
            if note.name not in noted:
                raise _damaged(note)  # later ones are there, and would be written over
            noted.remove(note.name)
            self.shards.append(_Shard(self.folder, len(self.shards)))

    def add(self, text: dict[str, torch.Tensor], hidden: dict[int, torch.Tensor]) -> None:
        """Write one shard, whole or not at all, and open it."""
        index = len(self.shards)
        checksums = {"text": _write(self.folder, index, "text", text)}
        for layer, states in hidden.items():
            checksums[f"layer-{layer}"] = _write(self.folder, index, f"layer-{layer}", {"hidden": states})
        write_json(_note(self.folder, index), {"sha256": checksums})
        self.shards.append(_Shard(self.folder, index))

    def complete(self, trunk: Trunk, layers: Sequence[int], progress: Progress | None = None) -> None:
        """Add the states after layers that are not there, by one pass of the model over the text."""
        for index, shard in enumerate(self.shards):
            missing = [layer for layer in layers if layer not in shard.hidden]
            if missing:
                self.shards[index] = shard.with_layers(trunk, missing)
                if progress is not None:
                    progress("reading", index + 1, len(self.shards))

    def _rows_of(self, numbers: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Tell of every shard's generated tokens (n,) which are of the sequences ``numbers``."""
        chosen = torch.zeros(len(self), dtype=torch.bool)
        chosen[numbers] = True
        rows = chosen.repeat_interleave(self.generated)
        return torch.split(rows, [shard.rows for shard in self.shards])

    def _locate(self, number: int) -> tuple[_Shard, int]:
        for shard in self.shards:
            if number < len(shard):
                return shard, number
            number -= len(shard)
        raise IndexError(number)


class _Shard:
    """One shard, its files mapped into memory."""

    def __init__(self, folder: Path, index: int) -> None:
        self.folder, self.index = folder, index
        checksums = read_json(_note(folder, index)).get("sha256")
        if not isinstance(checksums, dict) or not _names_parts(checksums):
            raise _damaged(_note(folder, index))
        parts = {part: _read(folder, index, part, checksum) for part, checksum in checksums.items()}
        self.checksums = checksums
        self.text = parts.pop("text")
        self.hidden = {int(part.removeprefix("layer-")): held["hidden"] for part, held in parts.items()}
        self.lengths: list[int] = self.text["lengths"].tolist()
        self.prompt_lengths: list[int] = self.text["prompt_lengths"].tolist()
        generated = self.text["lengths"] - self.text["prompt_lengths"]
        self._tokens = [0, *self.text["lengths"].cumsum(0).tolist()]
        self._states = [0, *(self.text["lengths"] - 1).cumsum(0).tolist()]
        self._predictions = [0, *generated.cumsum(0).tolist()]

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def rows(self) -> int:
        return int(self._predictions[-1])

    @property
    def predicting(self) -> torch.Tensor:
        """Rows of the layers' files that predict generated tokens."""
        spans = zip(self._states[1:], self.lengths, self.prompt_lengths, strict=True)
        return torch.cat([torch.arange(end - (length - given), end) for end, length, given in spans])

    def sequence(self, place: int) -> TokenSequence:
        tokens = self.text["tokens"][self._tokens[place] : self._tokens[place + 1]]
        return TokenSequence(tokens.long(), self.prompt_lengths[place])

    def states(self, layer: int, place: int) -> torch.Tensor:
        return self.hidden[layer][self._states[place] : self._states[place + 1]]

    def predictions(self, place: int) -> dict[str, torch.Tensor]:
        rows = slice(self._predictions[place], self._predictions[place + 1])
        return {name: self.text[name][rows] for name in ("final", "log_normalizer", "top")}

    def with_layers(self, trunk: Trunk, layers: Sequence[int]) -> _Shard:
        """Compute and write the states after more layers; returns the shard opened anew."""
        sequences = [self.sequence(place) for place in range(len(self))]
        found: list[dict[int, torch.Tensor]] = [{} for _ in sequences]
        for states in teacher_forced(trunk, sequences, layers):
            for row, place in enumerate(states.members):
                found[place] = {
                    layer: hidden[row, : self.lengths[place] - 1].cpu()
                    for layer, hidden in states.exits.items()
                }
        for layer in layers:
            hidden = _stored(torch.cat([states[layer] for states in found]))
            checksum = _write(self.folder, self.index, f"layer-{layer}", {"hidden": hidden})
            self.checksums[f"layer-{layer}"] = checksum
        write_json(_note(self.folder, self.index), {"sha256": self.checksums})
        return _Shard(self.folder, self.index)


def prepare_corpus(
    trunk: Trunk,
    plan: CorpusPlan,
    folder: str | os.PathLike[str],
    *,
    prompts: Sequence[torch.Tensor] | None = None,
    topics: Sequence[int] | None = None,
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
        Where it is or will be.  A folder that holds a corpus of another model, text or seed is refused.
    prompts
        Token ids of starting prompts, continued by the model itself, in this order.
    topics
        Number of what each prompt is about, so that what is held back is about something else than what is trained
        on; default: each about something of its own, but for equal ones.
    sequences
        The user's own text instead: nothing is generated, and of more than ``plan.tokens`` tokens only so many
        sequences are drawn as reach them.
    end_tokens
        Tokens that end a continuation.

    Raises
    ------
    StorageError
        If the folder belongs to something else or is damaged, or the disk has no room for what is missing.
    """
    corpus = Corpus(folder)
    _claim(corpus.folder, _identity(trunk, plan, prompts, sequences, end_tokens))
    corpus.open(plan.tokens)
    needed = corpus_bytes(trunk, plan, prompts=prompts, sequences=sequences)
    _check_room(corpus, {*plan.layers, *_fitted(trunk)}, needed)
    if prompts is not None:
        about = _first_places(prompts) if topics is None else topics
        _generate(corpus, trunk, plan, prompts, about, end_tokens, progress)
    else:
        _read_own(corpus, trunk, plan, sequences or (), progress)
    corpus.complete(trunk, plan.layers, progress)
    return corpus


def corpus_bytes(
    trunk: Trunk,
    plan: CorpusPlan,
    *,
    prompts: Sequence[torch.Tensor] | None = None,
    sequences: Sequence[TokenSequence] | None = None,
) -> int:
    """Bytes the corpus of a plan takes on disk, nearly: what continuations end early by is not known before."""
    if prompts is not None:
        given = sum(len(prompt) for prompt in prompts) / max(1, len(prompts))
        rows = float(plan.tokens)
        states = rows * (1 + (given - 1) / plan.max_new_tokens)
    else:
        own = sequences or ()
        everything = sum(item.generated for item in own)
        rows = min(float(everything), float(plan.tokens))
        states = rows * sum(len(item.tokens) - 1 for item in own) / max(1, everything)
    final = trunk.hidden_size * torch.empty(0, dtype=trunk.dtype).element_size()
    fitted = min(rows, FIT_ROWS) / max(1.0, rows)
    hidden = trunk.hidden_size * _stored(torch.empty(0, dtype=trunk.dtype)).element_size()
    return round(rows * (final + 4 + 4 * TOP) + states * (4 + hidden * (len(plan.layers) + fitted)))


def _generate(
    corpus: Corpus,
    trunk: Trunk,
    plan: CorpusPlan,
    prompts: Sequence[torch.Tensor],
    topics: Sequence[int],
    end_tokens: Sequence[int],
    progress: Progress | None,
) -> None:
    while corpus.rows < plan.tokens:
        # Seeded by shard, so that a resumed run makes the shards an uninterrupted one would have made.
        generator = torch.Generator().manual_seed(plan.seed * 1_000_003 + len(corpus.shards))
        turns = _turns(corpus, plan, prompts)
        fitted = _fitted(trunk) if corpus.rows < FIT_ROWS else ()
        written = continue_prompts(
            trunk,
            [prompts[place] for _, place in turns],
            max_new_tokens=plan.max_new_tokens,
            end_tokens=end_tokens,
            temperatures=[_WARM[(turn - 1) % len(_WARM)] if turn else 0.0 for turn, _ in turns],
            generator=generator,
            capture=sorted({*plan.layers, *fitted}),
        )
        text = {
            **_text(written.sequences, [topics[place] for _, place in turns]),
            "final": torch.cat(written.final).cpu(),
            "log_normalizer": torch.cat(written.log_normalizer).cpu(),
            "top": torch.cat(written.top).cpu(),
        }
        corpus.add(text, {layer: _stored(torch.cat(rows).cpu()) for layer, rows in written.exits.items()})
        if progress is not None:
            progress("generating", min(corpus.rows, plan.tokens), plan.tokens)


def _turns(corpus: Corpus, plan: CorpusPlan, prompts: Sequence[torch.Tensor]) -> list[tuple[int, int]]:
    """Choose what is continued next: the turn and place of each prompt, as many as there is memory set aside for."""
    rows = min(_BATCH, -(-(plan.tokens - corpus.rows) // plan.max_new_tokens))
    turns: list[tuple[int, int]] = []
    longest = 0
    for number in range(len(corpus), len(corpus) + rows):
        turn, place = divmod(number, len(prompts))
        longest = max(longest, len(prompts[place]))
        if turns and (len(turns) + 1) * (longest + plan.max_new_tokens) > _BATCH_TOKENS:
            break
        turns.append((turn, place))
    return turns


def _read_own(
    corpus: Corpus,
    trunk: Trunk,
    plan: CorpusPlan,
    sequences: Sequence[TokenSequence],
    progress: Progress | None,
) -> None:
    # In random order, so that where the tokens wanted cut it off no kind of text is favoured.
    order = torch.randperm(len(sequences), generator=torch.Generator().manual_seed(plan.seed)).tolist()
    about = _first_places([item.tokens for item in sequences])
    wanted = min(plan.tokens, sum(item.generated for item in sequences))
    while corpus.rows < wanted:
        picked, rows = [], corpus.rows
        for number in order[len(corpus) : len(corpus) + _BATCH]:
            if rows < wanted:
                picked.append(number)
                rows += sequences[number].generated
        chosen = [sequences[number] for number in picked]
        fitted = _fitted(trunk) if corpus.rows < FIT_ROWS else ()
        topics = [about[number] for number in picked]
        corpus.add(*_taken(trunk, chosen, topics, sorted({*plan.layers, *fitted})))
        if progress is not None:
            progress("reading", min(corpus.rows, wanted), wanted)


def _taken(
    trunk: Trunk, sequences: list[TokenSequence], topics: list[int], layers: Sequence[int]
) -> tuple[dict[str, torch.Tensor], dict[int, torch.Tensor]]:
    """Text and states of a shard of given sequences."""
    hidden: list[dict[int, torch.Tensor]] = [{} for _ in sequences]
    final: list[torch.Tensor] = [torch.empty(0) for _ in sequences]
    for states in teacher_forced(trunk, sequences, layers):
        for row, place in enumerate(states.members):
            length = len(sequences[place].tokens)
            hidden[place] = {layer: held[row, : length - 1].cpu() for layer, held in states.exits.items()}
            final[place] = states.final[states.picked[0] == row].cpu()
    normalizers, tops = [], []
    for chunk in torch.cat(final).split(_LOGITS_CHUNK):
        logits = trunk.logits(chunk.to(trunk.device)).float()
        normalizers.append(logits.logsumexp(dim=-1).cpu())
        tops.append(logits.topk(min(TOP, logits.shape[-1]), dim=-1).indices.int().cpu())
    text = {
        **_text(sequences, topics),
        "final": torch.cat(final),
        "log_normalizer": torch.cat(normalizers),
        "top": torch.cat(tops),
    }
    return text, {layer: _stored(torch.cat([held[layer] for held in hidden])) for layer in layers}


def _text(sequences: Sequence[TokenSequence], topics: Sequence[int]) -> dict[str, torch.Tensor]:
    return {
        "tokens": torch.cat([item.tokens for item in sequences]).int(),
        "lengths": torch.tensor([len(item.tokens) for item in sequences], dtype=torch.int32),
        "prompt_lengths": torch.tensor([item.prompt_length for item in sequences], dtype=torch.int32),
        "topics": torch.tensor(topics, dtype=torch.int32),
    }


def _first_places(texts: Sequence[torch.Tensor]) -> list[int]:
    """Give texts the place of the first that is equal: what is held back must not be trained on elsewhere."""
    first: dict[bytes, int] = {}
    return [first.setdefault(text.numpy().tobytes(), place) for place, text in enumerate(texts)]


def _stored(hidden: torch.Tensor) -> torch.Tensor:
    """States of exits as they are kept: in 16 bits, since what a head reads need not be exact, unlike its target."""
    return hidden.bfloat16() if hidden.dtype in (torch.float32, torch.float64) else hidden


def _fitted(trunk: Trunk) -> tuple[int, ...]:
    """Layers, besides the exits, that heads' first maps are fitted to: that whose output the last layer reads."""
    return (trunk.num_layers - 1,) if trunk.num_layers > 1 else ()


def _identity(
    trunk: Trunk,
    plan: CorpusPlan,
    prompts: Sequence[torch.Tensor] | None,
    sequences: Sequence[TokenSequence] | None,
    end_tokens: Sequence[int],
) -> dict[str, Any]:
    return {
        "format": _FORMAT,
        "model": fingerprint(trunk.model).digest,
        "dtype": str(trunk.dtype),
        "max_new_tokens": plan.max_new_tokens,
        "seed": plan.seed,
        # Token ids: another tokenizer is another text.
        "text": hash_of(list(prompts if prompts is not None else sequences or ())),
        "end": sorted(end_tokens) if prompts is not None else [],
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


def _check_room(corpus: Corpus, layers: Collection[int], needed: int) -> None:
    """Refuse to begin what the disk cannot hold."""
    parts = ("text", *(f"layer-{layer}" for layer in layers))
    files = (_file(corpus.folder, index, part) for index in range(len(corpus.shards)) for part in parts)
    there = sum(path.stat().st_size for path in files if path.exists())
    free = shutil.disk_usage(corpus.folder).free
    if needed - there > free:
        raise StorageError(
            f"cache: the corpus needs {(needed - there) / 1e9:.1f} GB more and {corpus.folder} has {free / 1e9:.1f} "
            "GB free; ask for fewer tokens or exits, or choose another folder"
        )


def _note(folder: Path, index: int) -> Path:
    return folder / f"shard-{index:05d}.json"


def _file(folder: Path, index: int, part: str) -> Path:
    return folder / f"shard-{index:05d}.{part}.safetensors"


def _names_parts(checksums: dict[str, Any]) -> bool:
    layers = [part.removeprefix("layer-") for part in checksums if part.startswith("layer-")]
    return {*checksums} == {"text", *(f"layer-{layer}" for layer in layers)} and all(
        map(str.isdecimal, layers)
    )


def _write(folder: Path, index: int, part: str, tensors: dict[str, torch.Tensor]) -> str:
    """Write a file of a shard, whole or not at all; returns its checksum."""
    with written_whole(_file(folder, index, part)) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary)
        return sha256_of(temporary)


def _read(folder: Path, index: int, part: str, checksum: str) -> dict[str, torch.Tensor]:
    path = _file(folder, index, part)
    if not path.exists() or sha256_of(path) != checksum:
        raise _damaged(path)
    try:
        tensors: dict[str, torch.Tensor] = load_file(path)
    except SafetensorError as error:
        raise _damaged(path) from error
    return tensors


def _damaged(path: Path) -> StorageError:
    return StorageError(f"cache: {path} is damaged; delete the folder {path.parent} to make it anew")


def batches(
    numbers: torch.Tensor, generated: torch.Tensor, size: int, *, seed: int, epoch: int
) -> list[torch.Tensor]:
    """Sequences ``numbers`` in random order, in batches of about ``size`` tokens; the same for one seed and epoch.

    ``generated`` says how many tokens each of them has.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = torch.randperm(len(numbers), generator=generator)
    ends = generated[order].cumsum(0)
    # The batch a sequence falls into: how often the wanted size was full before it.
    batch = (ends - generated[order]) // size
    return list(numbers[order].split(batch.unique_consecutive(return_counts=True)[1].tolist()))
