"""``offramp info``: what is installed and what it runs on."""

from __future__ import annotations

import platform

import click
from rich.table import Table

from offramp import machine
from offramp.cli.session import Session, with_session


@click.command()
@with_session
def info(session: Session) -> None:
    """Print versions and what they run on.

    Processor features, the instruction set chosen for them, and threads.
    """
    facts = {
        "system": platform.platform(),
        "processor": machine.processor(),
        "features": machine.features(),
        "instruction_set": machine.instruction_set(),
        "cores": machine.cores(),
        "threads": session.threads or machine.cores(),
    }
    table = Table(show_header=False, box=None)
    for name, value in machine.versions().items():
        table.add_row(name, value or "not installed")
    for name, fact in facts.items():
        table.add_row(name.replace("_", " "), ", ".join(fact) if isinstance(fact, list) else str(fact))
    session.show(table)
    session.result({"versions": machine.versions(), **facts})
