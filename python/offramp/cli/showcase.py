"""What ``offramp demo`` does and shows; loads torch, matplotlib and jinja2."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

from offramp.cli import views
from offramp.cli.pipeline import open_model
from offramp.cli.session import Session
from offramp.evaluation.demo import DemoConfig, DemoResult, run_demo
from offramp.evaluation.report import render_report
from offramp.llm.files import write_text

_SHOWN_PASSAGES = 3


def demo(session: Session, folder: Path, *, tokens: int, dtype: str | None, device: str | None) -> None:
    """Run the demo, show it, and write its report."""
    config = DemoConfig(training_tokens=tokens, seed=session.seed)
    model, tokenizer = open_model(session, "demo", dtype=dtype, device=device, unpacked=folder / "model")
    with session.progress() as progress:
        result = run_demo(model, tokenizer, folder, config, say=session.say, progress=progress)
    report = folder / "report.html"
    write_text(report, render_report(result.findings()))
    _show(session, result)
    session.show(f"\nThe report with pictures and all texts: {report}")
    session.result({**result.to_dict(), "report": str(report)})


def _show(session: Session, result: DemoResult) -> None:
    shown = result.shown
    session.show(f"\n{result.calibration}")
    for passage in islice(shown.passages, _SHOWN_PASSAGES):
        session.show(f"\n[bold]{_escaped(passage.prompt)}[/bold]")
        session.show(
            views.coloured_text(
                ((token.text, token.layer) for token in passage.tokens), result.calibration.layers
            )
        )
    session.show(f"\nTokens by exit, all {len(shown.passages)} texts at ε = {shown.eps:g}:")
    session.show(views.legend(result.calibration.layers, shown.exits), "")
    session.show(views.agreement_table(result.decoded), "")
    session.show(views.speed_table(result.speed))


def _escaped(text: str) -> str:
    return text.replace("[", r"\[")
