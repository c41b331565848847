"""One colour for every exit, the same in the terminal, the pictures and the report; and the look of every line."""

from __future__ import annotations

import colorsys
from typing import Any

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's colours for lines and bars, told apart by eyes that see few hues."""

_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
# Lengths of stroke and gap, in line widths.
_DASHES: tuple[Any, ...] = (
    "-",
    (0, (5, 1.6)),
    (0, (1, 1.4)),
    (0, (7, 1.6, 1, 1.6)),
    (0, (2.5, 1.4)),
    (0, (7, 1.4, 1, 1.4, 1, 1.4)),
    (0, (10, 3)),
)

# From the shallowest exit to the deepest; neighbours differ in more than hue to eyes that see few hues.
_HUES = (0.46, 0.57, 0.75, 0.92, 0.06, 0.14)


def line(place: int) -> dict[str, Any]:
    """Give matplotlib the look of line number `place`: its colour and, for a grey print, its own marker and dashes.

    The first seven lines share nothing; all of the first 49 differ in marker or dashes.
    """
    count = len(_MARKERS)
    return {
        "color": COLOURS[place % len(COLOURS)],
        "marker": _MARKERS[place % count],
        "linestyle": _DASHES[(place + place // count) % count],
    }


def marks(count: int, *, dark: bool) -> list[str]:
    """Hex colours for lines and bars of `count` exits, on a light page or on a dark one."""
    return _colours(count, 0.64 if dark else 0.40, 0.60)


def backgrounds(count: int, *, dark: bool) -> list[str]:
    """Hex colours to lie behind dark text, or behind light text on a dark page."""
    return _colours(count, 0.27 if dark else 0.86, 0.45 if dark else 0.70)


def _colours(count: int, lightness: float, saturation: float) -> list[str]:
    # Every other colour is a little darker, so that lightness helps to tell them apart.
    return [
        _hex(_HUES[index % len(_HUES)], lightness - 0.05 * (index % 2), saturation) for index in range(count)
    ]


def _hex(hue: float, lightness: float, saturation: float) -> str:
    return "#" + "".join(
        f"{round(255 * part):02x}" for part in colorsys.hls_to_rgb(hue, lightness, saturation)
    )
