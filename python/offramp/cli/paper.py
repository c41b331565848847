"""What ``offramp figures`` does and shows; loads torch and matplotlib."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from offramp.cli.pipeline import check_eps_list, open_model
from offramp.cli.session import Session
from offramp.evaluation.drawing import PAPER, draw_figures
from offramp.evaluation.evaluate import calibration_of
from offramp.evaluation.paper.config import PaperConfig
from offramp.evaluation.paper.stages import make_figures
from offramp.evaluation.report import render_report
from offramp.llm.files import write_text
from offramp.llm.model import EarlyExitModel


def figures(
    session: Session,
    name: str,
    folder: Path,
    *,
    quick: bool,
    layers: tuple[int, ...],
    eps: tuple[float, ...],
    tasks: tuple[str, ...],
    limit: int | None,
    shortlist: int | None,
    tokens: int | None,
    count: int | None,
    heads: Path | None,
    dtype: str | None,
    device: str | None,
) -> None:
    """Measure what is missing, and draw."""
    check_eps_list(eps)
    config = PaperConfig(layers=layers, shortlist=shortlist, grid=eps, tasks=tasks, seed=session.seed)
    config = config.quick() if quick else config
    config = replace(
        config,
        documents=limit or config.documents,
        tokens=tokens or config.tokens,
        prompts=count or config.prompts,
    )
    model, tokenizer = open_model(session, name, dtype=dtype, device=device)
    given = None
    if heads is not None:
        given = EarlyExitModel.from_pretrained(heads, model=model, tokenizer=tokenizer)
        calibration_of(str(heads), given)
    with session.progress() as progress:
        tables, findings = make_figures(
            model, tokenizer, folder, config, heads=given, say=session.say, progress=progress
        )
    drawn = draw_figures(PAPER, tables, folder)
    gallery = {PAPER[key].caption: path.with_suffix(".svg").read_text("utf-8") for key, path in drawn.items()}
    report = folder / "report.html"
    write_text(report, render_report(replace(findings, gallery=gallery)))
    for path in (*drawn.values(), report):
        session.show(str(path))
    session.show(f"Each picture beside its SVG; the numbers of all: {folder}/*.csv")
    session.result(
        {"folder": str(folder), "figures": {name: str(path) for name, path in drawn.items()}, **tables}
    )
