"""Results as tables and coloured text for a terminal."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from offramp.evaluation.palette import backgrounds

if TYPE_CHECKING:
    from offramp.evaluation.decoded import Decoded
    from offramp.evaluation.forced import Point
    from offramp.evaluation.speed import Speed
    from offramp.llm.training import HeadMetrics

_BAR = 30


def coloured_text(pieces: Iterable[tuple[str, int]], layers: Sequence[int]) -> Text:
    """Colour pieces of text by the exit that wrote them; what the whole model wrote stays plain."""
    styles = _styles(layers)
    text = Text()
    for piece, layer in pieces:
        text.append(piece, styles.get(layer))
    return text


def legend(layers: Sequence[int], counts: Mapping[int, int]) -> Text:
    """Say which colour is which exit, and how many tokens it wrote, with bars."""
    styles, total = _styles(layers), sum(counts.values())
    lines = []
    for layer, count in counts.items():
        share = count / total if total else 0.0
        name = f" after layer {layer} " if layer in styles else " whole model "
        line = Text().append(f"{name:<16}", styles.get(layer))
        line.append(f" {share:6.1%} ").append("█" * round(_BAR * share), "dim")
        lines.append(line)
    return Text("\n").join(lines)


def agreement_table(decoded: Sequence[Decoded]) -> Table:
    """Tabulate agreement with the full model against ε."""
    table = _table(
        f"Decoded: agreement with the full model, on about {decoded[0].tokens:,} held-out tokens",
        "ε",
        "all tokens",
        "95% interval",
        "early tokens",
        "95% interval",
        "left early",
        "layers a token",
    )
    for item in decoded:
        table.add_row(
            f"{item.eps:g}",
            percent(item.agreement),
            between(item.intervals["agreement"]),
            percent(item.early_agreement),
            between(item.intervals["early_agreement"]),
            percent(item.early),
            f"{item.mean_layers:.1f} of {item.layers[-1]}",
        )
    return table


def forced_tables(forced: Mapping[str, Sequence[Point]]) -> list[Table]:
    """Tabulate what any ε would do, a table for each head set."""
    tables = []
    for name, points in forced.items():
        table = _table(
            f"{name}: what any ε would do on {sum(points[0].exits.values()):,} tokens the full model wrote",
            "ε",
            "all tokens",
            "early tokens",
            "95% interval",
            "left early",
            "layers a token",
            "ms a token, predicted",
        )
        for point in points:
            shares = point.shares
            table.add_row(
                f"{point.eps:g}",
                percent(shares.agreement),
                percent(shares.early_agreement),
                between(shares.intervals["early_agreement"]),
                percent(shares.early),
                f"{shares.mean_layers:.1f} of {max(point.exits)}",
                f"{1e3 * point.predicted:.1f}",
            )
        tables.append(table)
    return tables


def thresholds_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Tabulate thresholds and what is promised of each: rows of `Evaluation.tables`."""
    table = _table(
        "Thresholds, what heads take of the text the full model wrote, and what was promised",
        "heads",
        "ε",
        "after layer",
        "threshold",
        "takes",
        "agrees",
        "guarantee",
    )
    for row in rows:
        table.add_row(
            row["heads"],
            f"{row['eps']:g}",
            str(row["layer"]),
            f"{row['threshold']:.6f}" if math.isfinite(row["threshold"]) else "never",
            percent(row["takes"]),
            percent(row["agreement"]),
            row["guarantee"],
        )
    return table


def confidence_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Tabulate how well each confidence sorts: rows of `Evaluation.tables`."""
    table = _table(
        "How well each confidence sorts right from wrong (areas: smaller is better)",
        "heads",
        "after layer",
        "confidence",
        "AURC",
        "95% interval",
        "E-AURC",
        "AUGRC",
        "ECE",
    )
    for row in rows:
        ece = f"{row['ece']:.3f}" if math.isfinite(row["ece"]) else "–"
        table.add_row(
            row["heads"],
            str(row["layer"]),
            row["confidence"],
            f"{row['aurc']:.4f}",
            f"{row['aurc_low']:.4f}–{row['aurc_high']:.4f}",
            f"{row['e_aurc']:.4f}",
            f"{row['augrc']:.4f}",
            ece,
        )
    return table


def speed_table(speed: Speed) -> Table:
    """Tabulate tokens a second, every contender on the same prompts."""
    prompts = len(next(iter(speed.tokens_per_second.values())))
    table = _table(
        f"Speed, batch 1, medians over {prompts} prompts",
        "",
        "tokens/s",
        "95% interval",
        "× transformers",
        "95% interval",
    )
    for name in speed.tokens_per_second:
        (low, high), (slow, fast) = speed.ratio_interval(name), speed.interval(name)
        table.add_row(
            name,
            f"{speed.median(name):.1f}",
            f"{slow:.1f}–{fast:.1f}",
            f"{speed.ratio(name):.2f}",
            f"{low:.2f}–{high:.2f}",
        )
    table.caption = (
        "exits off wrote the tokens of plain transformers, every one"
        if speed.same_tokens
        else "exits off and plain transformers differ in some tokens, where logits round to a tie"
    )
    table.caption_justify = "left"
    return table


def metrics_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Tabulate what training made of the heads, and what each costs."""
    table = _table(
        "Heads, on prompts held back from training",
        "after layer",
        "loss",
        "agreement",
        "entropy",
        *(f"exits at ε={eps:g}" for eps in rows[0]["eps"]),
        "ms a token",
        "MB a token",
    )
    for row in rows:
        table.add_row(
            str(row["layer"]),
            f"{row['loss']:.3f}",
            percent(row["accuracy"]),
            f"{row['entropy']:.3f}",
            *map(percent, row["coverage"]),
            f"{1e3 * row['seconds']:.2f}",
            f"{row['bytes'] / 1e6:.1f}",
        )
    return table


def metrics_line(metrics: Sequence[HeadMetrics]) -> str:
    """Say in a line how training stands: for every head its agreement, loss and entropy."""
    heads = "; ".join(
        f"after {item.layer} agreement {percent(item.accuracy)}, loss {item.loss:.3f}, entropy {item.entropy:.2f}"
        for item in metrics
    )
    return f"{metrics[0].tokens:,} tokens: {heads}"


def percent(value: float) -> str:
    """Format a share; a dash for what has no value."""
    return f"{value:.1%}" if math.isfinite(value) else "–"


def between(bounds: tuple[float, float]) -> str:
    """Format an interval of shares; a dash for one that is not known."""
    return f"{percent(bounds[0])}–{percent(bounds[1])}" if math.isfinite(bounds[0]) else "–"


def _styles(layers: Sequence[int]) -> dict[int, str]:
    colours = backgrounds(len(layers), dark=False)
    return {layer: f"black on {colour}" for layer, colour in zip(layers, colours, strict=True)}


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, justify="right" if column else "left")
    return table
