"""What a report is made of, whichever command found it.  For `report` and `figures`, which draw it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from offramp import machine
from offramp.evaluation.decoded import Decoded
from offramp.evaluation.forced import Point
from offramp.evaluation.speed import Speed
from offramp.llm.calibrating import Calibration


@dataclass(frozen=True)
class Findings:
    """What a report is made of; what is empty is left out of it.

    Attributes
    ----------
    model : str
        The base model.
    calibration : Calibration
        Of the heads that were measured.
    decoded : tuple of Decoded
        Held-out prompts decoded at some ε.
    shown : Decoded or None
        The one whose text is shown.
    speed : Speed or None
        Tokens a second.
    forced : sequence of Point
        What any ε would do, from one teacher-forced pass.
    sorting : mapping of str to rows
        How well each confidence sorts: ``confidence``, ``curves`` and ``reliability`` of `Evaluation.tables`.
    gallery : mapping of str to str
        Further pictures: SVG text by caption.
    facts : mapping of str to str
        How it was measured.
    machine : mapping of str to str
        What it ran on.
    """

    model: str
    calibration: Calibration
    decoded: tuple[Decoded, ...] = ()
    shown: Decoded | None = None
    speed: Speed | None = None
    forced: Sequence[Point] = ()
    sorting: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    gallery: Mapping[str, str] = field(default_factory=dict)
    facts: Mapping[str, str] = field(default_factory=dict)
    machine: Mapping[str, str] = field(default_factory=machine.describe)
