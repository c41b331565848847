"""Token sequences: what users hand over (prompts, texts, ids) and how it is grouped into batches.

For `states`, `data`, `scoring` and `model`; knows tokenizers but no model.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from offramp.errors import InputError


@dataclass(frozen=True, eq=False)
class TokenSequence:
    """One sequence and where its generated part begins.

    Attributes
    ----------
    tokens : (T,) int64, CPU
        Prompt and continuation.
    prompt_length : int
        Tokens that were given, at least 1; the tokens after them are the positions that count.
    """

    tokens: torch.Tensor
    prompt_length: int = 1

    @property
    def generated(self) -> int:
        """Number of positions that count."""
        return len(self.tokens) - self.prompt_length


def encode_prompts(prompts: Iterable[str], tokenizer: Any, *, max_positions: int) -> list[torch.Tensor]:
    """Token ids (T,) of prompts, through the tokenizer's chat template where it has one.

    Raises
    ------
    InputError
        Without a tokenizer, without prompts, for an empty prompt, or one that leaves no room to generate.
    """
    if isinstance(prompts, str | bytes):
        raise InputError("prompts is a single text: give a list of texts")
    prompts = list(prompts)
    if tokenizer is None:
        raise InputError(
            "prompts need a tokenizer: give one to EarlyExitModel, or pass token ids as sequences="
        )
    if not prompts:
        raise InputError("prompts is empty: give at least one prompt")
    encoded = []
    for index, prompt in enumerate(prompts):
        if not isinstance(prompt, str) or not prompt.strip():
            raise InputError(f"prompts[{index}] is {prompt!r}: give a text that is not empty")
        if tokenizer.chat_template:
            chat = [{"role": "user", "content": prompt}]
            ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)[
                "input_ids"
            ]
        else:
            ids = tokenizer(prompt)["input_ids"]
        if not ids:
            raise InputError(f"prompts[{index}] is {prompt!r}: it has no tokens")
        check_length(len(ids) + 1, max_positions, f"prompts[{index}]")
        encoded.append(torch.tensor(ids, dtype=torch.int64))
    return encoded


def as_sequences(sequences: Any, tokenizer: Any, *, max_positions: int) -> list[TokenSequence]:
    """Read the user's own text as sequences.

    Parameters
    ----------
    sequences
        A list of texts, lists of token ids, 1-D tensors or `TokenSequence`; or a (B, T) tensor.  Every token after
        the first counts, unless a `TokenSequence` says otherwise.
    max_positions
        Longest sequence the model takes.

    Raises
    ------
    InputError
        Naming the sequence at fault: of another type, shorter than two tokens, or longer than the model's context.
    """
    # A tokenizer's output is a mapping, and iterating it would give its keys as texts.
    if isinstance(sequences, str | bytes | Mapping) or not isinstance(sequences, Iterable):
        raise InputError("sequences is not a list: give a list of texts or of token ids")
    found = [_as_sequence(item, index, tokenizer) for index, item in enumerate(sequences)]
    if not found:
        raise InputError("sequences is empty: give at least one sequence")
    for index, item in enumerate(found):
        if not 1 <= item.prompt_length < len(item.tokens):
            raise InputError(
                f"sequences[{index}] has {len(item.tokens)} tokens of which {item.prompt_length} are the prompt: "
                "at least one token of prompt and one after it are needed"
            )
        check_length(len(item.tokens), max_positions, f"sequences[{index}]")
    return found


def _as_sequence(item: Any, index: int, tokenizer: Any) -> TokenSequence:
    given = 1
    if isinstance(item, TokenSequence):
        item, given = item.tokens, item.prompt_length
    elif isinstance(item, str):
        if tokenizer is None:
            raise InputError(
                f"sequences[{index}] is a text: give EarlyExitModel a tokenizer, or pass token ids"
            )
        item = tokenizer(item)["input_ids"]
    try:
        tokens = torch.as_tensor(item)
    except (TypeError, ValueError, RuntimeError):
        tokens = torch.zeros(1, 1)
    wrong = tokens.ndim != 1 or tokens.is_floating_point() or tokens.dtype == torch.bool
    if wrong and tokens.numel():
        raise InputError(
            f"sequences[{index}] is not one row of token ids: give whole numbers in one dimension"
        )
    return TokenSequence(tokens.detach().to("cpu", torch.int64), given)


def check_length(length: int, max_positions: int, what: str) -> None:
    """Refuse a sequence longer than the model's context window."""
    if length > max_positions:
        raise InputError(
            f"{what} needs {length} tokens, but the model's context window holds {max_positions}: shorten it"
        )


def left_pad(rows: Sequence[torch.Tensor], pad: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Stack rows of ids of different lengths as (B, T) ids and mask, padding on the left; no mask if none is needed."""
    longest = max(len(row) for row in rows)
    tokens = torch.full((len(rows), longest), pad, dtype=torch.int64)
    mask = torch.zeros((len(rows), longest), dtype=torch.int64)
    for index, row in enumerate(rows):
        tokens[index, longest - len(row) :] = row
        mask[index, longest - len(row) :] = 1
    return tokens, None if bool(mask.all()) else mask


def batches_by_length(
    sequences: Sequence[TokenSequence], tokens_per_batch: int
) -> Iterator[tuple[list[int], torch.Tensor]]:
    """Yield indices and right-padded ids (B, T) of sequences of like length, about ``tokens_per_batch`` at a time.

    Right padding needs no mask in a causal model: no token attends to what follows it.
    """
    order = sorted(range(len(sequences)), key=lambda index: len(sequences[index].tokens))
    start = 0
    while start < len(order):
        end = start + 1
        while end < len(order) and (end + 1 - start) * len(sequences[order[end]].tokens) <= tokens_per_batch:
            end += 1
        members = order[start:end]
        rows = [sequences[index].tokens for index in members]
        yield members, torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        start = end


def hash_of(items: Sequence[Any]) -> str:
    """SHA-256 of prompts, token rows or sequences: says whether two runs used the same text."""
    plain = [
        [item.tokens.tolist(), item.prompt_length]
        if isinstance(item, TokenSequence)
        else item.tolist()
        if isinstance(item, torch.Tensor)
        else item
        for item in items
    ]
    return hashlib.sha256(json.dumps(plain, separators=(",", ":")).encode()).hexdigest()
