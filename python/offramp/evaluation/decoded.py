"""Decoding held-out prompts with exits, and checking every emitted token against the full model.

Agreement is what a reader meets: the share of emitted tokens that equal the full model's first choice given
the emitted prefix.  For `demo` and ``offramp evaluate``.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache, cached_property
from typing import Any

import numpy as np

from offramp.errors import InputError
from offramp.evaluation.shares import Shares
from offramp.llm.decoding import EarlyExitOutput
from offramp.llm.model import EarlyExitModel
from offramp.llm.scoring import Scores
from offramp.llm.sequences import TokenSequence, encode_prompts, left_pad


@dataclass(frozen=True)
class Token:
    """One emitted token.

    Attributes
    ----------
    text : str
        What it adds to the text; empty for the first bytes of a character that later tokens complete.
    layer : int
        The layer it left after; the number of layers where the whole model answered.
    margin : float or None
        The exit head's margin; None where the whole model answered.
    agrees : bool
        Whether it is the full model's first choice given the text before it.
    heads : tuple of (int, str, float)
        Of every head, shallow to deep, also of those decoding did not ask: its layer, its first choice, its margin.
    model_choice : str
        The full model's first choice.
    """

    text: str
    layer: int
    margin: float | None
    agrees: bool
    heads: tuple[tuple[int, str, float], ...] = ()
    model_choice: str = ""


@dataclass(frozen=True)
class Passage:
    """One prompt and what was generated from it."""

    prompt: str
    tokens: tuple[Token, ...]


@dataclass(frozen=True)
class Decoded:
    """Held-out prompts decoded at one ε.

    Attributes
    ----------
    eps : float
        Target accuracy the thresholds were taken for.
    thresholds : tuple of float
        τ of every exit; inf where it never exits.
    layers : tuple of int
        The exits, and last the number of layers of the whole model.
    passages : tuple of Passage
        The text.
    seed : int
        Seed of the intervals' bootstrap.
    """

    eps: float
    thresholds: tuple[float, ...]
    layers: tuple[int, ...]
    passages: tuple[Passage, ...]
    seed: int = 0

    @property
    def tokens(self) -> int:
        """Emitted tokens."""
        return sum(len(passage.tokens) for passage in self.passages)

    @property
    def exits(self) -> dict[int, int]:
        """Emitted tokens by the layer they left after."""
        found = [token.layer for passage in self.passages for token in passage.tokens]
        return {layer: found.count(layer) for layer in self.layers}

    @property
    def agreement(self) -> float:
        """Share of all emitted tokens that agree with the full model."""
        return self._share(self.layers)

    @property
    def early_agreement(self) -> float:
        """Share of the tokens that left early that agree: what ε speaks of.  NaN if none left early."""
        return self._share(self.layers[:-1])

    @property
    def early(self) -> float:
        """Share of the tokens that left early."""
        return 1 - self.exits[self.layers[-1]] / self.tokens

    @property
    def mean_layers(self) -> float:
        """Mean depth of the exits, in layers a token."""
        return sum(layer * count for layer, count in self.exits.items()) / self.tokens

    @cached_property
    def intervals(self) -> dict[str, tuple[float, float]]:
        """95% bootstrap intervals over the prompts of the four shares above, by name; NaN with a single prompt."""
        groups = np.repeat(np.arange(len(self.passages)), [len(passage.tokens) for passage in self.passages])
        tokens = [token for passage in self.passages for token in passage.tokens]
        agrees, depths = (np.array([getattr(t, name) for t in tokens]) for name in ("agrees", "layer"))
        return Shares.of(groups, agrees, depths, self.layers[-1], seed=self.seed).intervals

    def summary(self) -> dict[str, Any]:
        """Give the numbers without the text, as plain values for JSON."""
        return {
            "eps": self.eps,
            "thresholds": list(self.thresholds),
            "tokens": self.tokens,
            "exits": self.exits,
            "early": self.early,
            "agreement": self.agreement,
            "early_agreement": self.early_agreement,
            "mean_layers": self.mean_layers,
            "intervals": self.intervals,
        }

    def to_dict(self) -> dict[str, Any]:
        """Give everything as plain values for JSON, an infinite threshold as None; `from_dict` reads it back."""
        stored = asdict(self)
        stored["thresholds"] = [tau if math.isfinite(tau) else None for tau in self.thresholds]
        return stored

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> Decoded:
        """Read what `to_dict` gave."""
        return cls(
            stored["eps"],
            tuple(math.inf if tau is None else tau for tau in stored["thresholds"]),
            tuple(stored["layers"]),
            tuple(
                Passage(passage["prompt"], tuple(_token(token) for token in passage["tokens"]))
                for passage in stored["passages"]
            ),
            stored.get("seed", 0),
        )

    def _share(self, layers: Sequence[int]) -> float:
        agrees = [t.agrees for passage in self.passages for t in passage.tokens if t.layer in layers]
        return sum(agrees) / len(agrees) if agrees else float("nan")


def _token(stored: Mapping[str, Any]) -> Token:
    heads = tuple((layer, choice, margin) for layer, choice, margin in stored["heads"])
    return Token(**{**stored, "heads": heads})


def decode_prompts(
    ee: EarlyExitModel, prompts: Sequence[str], *, eps: float, max_new_tokens: int, batch: int = 16
) -> Decoded:
    """Generate greedily with exits at ε, then check what was emitted in one pass of the full model.

    Parameters
    ----------
    ee : EarlyExitModel
        With trained heads and a calibration.
    prompts : sequence of str
        Texts, handed to the model through its chat template where it has one.
    eps : float
        Target accuracy, in (0, 1).
    max_new_tokens : int
        Tokens to generate for each prompt at most.
    batch : int
        Prompts decoded together.

    Returns
    -------
    Decoded
    """
    sequences: list[TokenSequence] = []
    exits: list[list[int]] = []
    for start in range(0, len(prompts), batch):
        written, depths = _generate(ee, prompts[start : start + batch], eps, max_new_tokens)
        sequences += written
        exits += depths
    passages = _passages(ee, prompts, sequences, exits, ee.score(sequences))
    if ee.calibration is None:
        raise InputError("ee has no calibration: call calibrate first")
    return Decoded(eps, ee.calibration.at(eps), (*ee.layers, ee.num_layers), tuple(passages))


def _generate(
    ee: EarlyExitModel, prompts: Sequence[str], eps: float, max_new_tokens: int
) -> tuple[list[TokenSequence], list[list[int]]]:
    inputs = model_inputs(ee, prompts)
    out = ee.generate(
        **inputs,
        mode="exit",
        eps=eps,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        return_dict_in_generate=True,
    )
    assert isinstance(out, EarlyExitOutput)
    assert out.exit_layers is not None
    width = inputs["input_ids"].shape[1]
    sequences, exits = [], []
    for row, depths, mask in zip(
        out.sequences.cpu(), out.exit_layers.tolist(), inputs["attention_mask"].cpu(), strict=True
    ):
        # A depth of 0 marks the padding behind a row that ended before the others.
        kept = [depth for depth in depths if depth]
        prompt = row[:width][mask.bool()]
        tokens = row[width : width + len(kept)]
        sequences.append(TokenSequence(prompt.new_tensor([*prompt.tolist(), *tokens.tolist()]), len(prompt)))
        exits.append(kept)
    return sequences, exits


def model_inputs(ee: EarlyExitModel, prompts: Sequence[str]) -> dict[str, Any]:
    """Encode prompts for `generate`: ``input_ids`` and ``attention_mask``, (B, P) int64, left-padded."""
    longest = getattr(ee.model.config, "max_position_embeddings", sys.maxsize)
    rows = encode_prompts(prompts, ee.tokenizer, max_positions=longest)
    ids, mask = left_pad(rows, ee.tokenizer.pad_token_id or 0)
    mask = ids.new_ones(ids.shape) if mask is None else mask
    return {"input_ids": ids.to(ee.model.device), "attention_mask": mask.to(ee.model.device)}


def _passages(
    ee: EarlyExitModel,
    prompts: Sequence[str],
    sequences: Sequence[TokenSequence],
    exits: Sequence[Sequence[int]],
    scores: Scores,
) -> list[Passage]:
    agrees = scores.emitted == scores.model_choices
    place = {layer: index for index, layer in enumerate(ee.layers)}
    write = cache(ee.tokenizer.decode)
    passages, start = [], 0
    for prompt, sequence, depths in zip(prompts, sequences, exits, strict=True):
        pieces = split_text(ee.tokenizer, sequence.tokens[sequence.prompt_length :].tolist())
        tokens = []
        for offset, (piece, depth) in enumerate(zip(pieces, depths, strict=True)):
            at = start + offset
            heads = tuple(
                (layer, write(int(scores.choices[index, at])), float(scores.scores[index, at]))
                for layer, index in place.items()
            )
            margin = heads[place[depth]][2] if depth in place else None
            choice = write(int(scores.model_choices[at]))
            tokens.append(Token(piece, depth, margin, bool(agrees[at]), heads, choice))
        start += len(tokens)
        passages.append(Passage(prompt, tuple(tokens)))
    return passages


def split_text(tokenizer: Any, tokens: Sequence[int]) -> list[str]:
    """Split the text of ``tokens`` into what each adds; joined, the pieces are the text.

    A token that ends inside a character adds nothing, and the one that completes it adds the character.
    """
    pieces, shown = [], ""
    for end in range(1, len(tokens) + 1):
        text = tokenizer.decode(tokens[:end], clean_up_tokenization_spaces=False)
        if text.endswith("�") and end < len(tokens):
            pieces.append("")
            continue
        pieces.append(text[len(shown) :])
        shown = text
    return pieces
