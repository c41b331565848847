"""The prompts that start self-generated text when the user brings none."""

from __future__ import annotations

import tomllib
from functools import cache
from importlib.resources import files
from typing import Literal, get_args

from offramp.errors import InputError

Split = Literal["training", "calibration", "held_out"]


def prompts(split: Split) -> list[str]:
    """Return the shipped English prompts of one split, the most varied first.

    Prompts are composed from task templates (explanations, how-to, stories, code, letters, dialogue,
    opinions, comparisons, travel, arithmetic, rewriting, openings to continue) and topics.  Every topic
    belongs to one split, so no two splits share a prompt or a topic.  Any prefix of the list mixes the kinds,
    and no topic appears twice before every topic has appeared once: to take fewer, take the first n.

    Parameters
    ----------
    split : {"training", "calibration", "held_out"}
        Text to train heads on, to calibrate thresholds on, or to evaluate on.

    Returns
    -------
    list of str
        At least 16 000, 300 and 100 prompts of at most 40 tokens; the same list in every process.

    Raises
    ------
    InputError
        If `split` is not one of the three.

    Notes
    -----
    Valade (2024, arXiv 2407.21082v1, Table 1) starts from a table of training and calibration prompts.  None of
    these prompts is taken from it: the copies of the paper that could be read when this list was written end before
    the table, and no such list was found in the author's published code (github.com/FlorianVal/BranchyLLM and
    HF_branchy_model).  To reproduce the paper, pass its prompts to `train_heads` and `calibrate` as ``prompts=``.

    Examples
    --------
    >>> from offramp.llm.prompts import prompts
    >>> len(prompts("training")) >= 16_000
    True
    >>> set(prompts("training")) & set(prompts("held_out"))
    set()
    """
    return [prompt for prompt, _ in _compose(split)]


def topics(split: Split) -> list[int]:
    """Return the number of every prompt's topic, in their order: the place of the first prompt about it."""
    first: dict[tuple[int, int], int] = {}
    return [first.setdefault(topic, place) for place, (_, topic) in enumerate(_compose(split))]


@cache
def _compose(split: Split) -> tuple[tuple[str, tuple[int, int]], ...]:
    """Every prompt with its topic: number of the kind, and of the topic in it."""
    if split not in get_args(Split):
        raise InputError(f"split must be 'training', 'calibration' or 'held_out', not {split!r}")
    kinds = tomllib.loads(files("offramp.llm").joinpath("prompts.toml").read_text(encoding="utf-8"))
    ordered: list[tuple[int, float, str, tuple[int, int]]] = []
    for number, kind in enumerate(kinds.values()):
        templates: list[str] = kind["templates"]
        about: list[str] = kind[split]
        for index, topic in enumerate(about):
            # Every round takes each topic once; neighbours start at different templates, and a kind's topics
            # are spread evenly over the round, so that a prefix holds the kinds in their proportions.
            place = (index + 0.5) / len(about)
            for turn in range(len(templates)):
                prompt = templates[(index + turn) % len(templates)].format(topic)
                ordered.append((turn, place, prompt, (number, index)))
    return tuple((prompt, topic) for _, _, prompt, topic in sorted(ordered))
